//! `paceline local`: manifests shaped like Kubeflow's own examples, on this machine.
//!
//! Each runs with all pods on loopback, and, where network namespaces can be made, with each pod on a host of its own.

#![allow(clippy::print_stderr, clippy::print_stdout, reason = "pods talk to the test by their output")]

mod job;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use job::{PACELINE, PATIENCE, trial};
use libtest_mimic::Trial;
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;

/// A manifest, and whether what ran is right.
type Case = fn(&str);

fn main() {
    let no_hosts = match std::env::args().nth(1).as_deref() {
        Some("as-rank") => None,
        _ => paceline_testbed::missing(),
    };
    job::main(part, || {
        let cases: [(&str, Case); 4] = [
            ("a_tfjob_with_servers_ends_with_its_workers_and_stops_the_servers", servers),
            ("a_tfjob_of_workers_alone_forms_one_job", multi_worker),
            ("a_pytorchjob_with_a_master_runs_the_processes_of_all_pods", master_and_worker),
            ("an_elastic_pytorchjob_finds_its_numbers_in_its_names", elastic),
        ];
        let on = |network: &'static str, ignored: bool| {
            cases.map(|(name, case)| {
                trial(format!("{name}::on_{network}"), move || case(network)).with_ignored_flag(ignored)
            })
        };
        let mut trials: Vec<Trial> =
            on("loopback", false).into_iter().chain(on("hosts", no_hosts.is_some())).collect();
        trials.extend([
            trial("a_pod_that_is_killed_is_started_again_if_its_policy_says_so", started_again),
            trial("a_pod_that_fails_for_good_ends_the_job_with_its_code", failed),
            trial("a_manifest_that_cannot_be_run_is_refused_in_one_line", refused),
        ]);
        trials
    });
}

/// Runs `paceline local` on the manifest. Returns the exit code and everything printed, in lines of standard output and then
/// of standard error.
fn run(manifest: &str, network: &str) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("job.yaml");
    fs::write(&file, manifest).expect("written");
    let mut command = Command::new(PACELINE);
    command.args(["local", "--network", network, "--grace", "5"]).arg(&file).env("PACELINE_FABRIC", "tls");
    let output = command.output().expect("it starts");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}

fn assert_succeeded((code, text): &(Option<i32>, String)) {
    assert_eq!(*code, Some(0), "{text}");
    assert!(text.trim_end().ends_with("has succeeded"), "{text}");
}

/// This program in one of its parts, as the words of a YAML list.
fn words(part: &str) -> String {
    let program = std::env::current_exe().expect("a test has an executable");
    format!("{:?}, as-rank, {part}", program.to_str().expect("text"))
}

/// Like dist-mnist: servers and workers, which find each other by TF_CONFIG.
fn servers(network: &str) {
    let manifest = format!(
        "
apiVersion: \"kubeflow.org/v1\"
kind: \"TFJob\"
metadata:
  name: \"dist-mnist-for-e2e-test\"
spec:
  tfReplicaSpecs:
    PS:
      replicas: 2
      restartPolicy: Never
      template:
        spec:
          containers:
            - name: tensorflow
              image: kubeflow/tf-dist-mnist-test:1.0
              command: [{ps}]
    Worker:
      replicas: 3
      restartPolicy: Never
      template:
        spec:
          containers:
            - name: tensorflow
              image: kubeflow/tf-dist-mnist-test:1.0
              command: [{worker}]
",
        ps = words("ps"),
        worker = words("tf-worker")
    );
    let ended = run(&manifest, network);
    assert_succeeded(&ended);
    assert!(ended.1.contains("[0]: worker 0 of 3 was served by 2"), "{}", ended.1);
}

/// Like multi_worker_tfjob: one kind of pod, and a volume that is not looked at.
fn multi_worker(network: &str) {
    let manifest = format!(
        "
apiVersion: kubeflow.org/v1
kind: TFJob
metadata:
  name: multi-worker
  namespace: kubeflow-user
spec:
  runPolicy:
    cleanPodPolicy: None
  successPolicy: AllWorkers
  tfReplicaSpecs:
    Worker:
      replicas: 3
      restartPolicy: Never
      template:
        spec:
          containers:
            - name: tensorflow
              image: kubeflow/multi-worker-strategy:latest
              command: [{PACELINE:?}, run, --bind, none, --, {sum}]
              volumeMounts:
                - mountPath: /train
                  name: training
          volumes:
            - name: training
              persistentVolumeClaim:
                claimName: strategy-volume
",
        sum = words("sum")
    );
    let ended = run(&manifest, network);
    assert_succeeded(&ended);
    assert_eq!(ended.1.matches("sum 3").count(), 3, "{}", ended.1);
}

/// Like the simple PyTorchJob: a master and workers, of two processes each.
fn master_and_worker(network: &str) {
    let manifest = format!(
        "
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: pytorch-simple
  namespace: kubeflow
spec:
  nprocPerNode: \"2\"
  pytorchReplicaSpecs:
    Master:
      replicas: 1
      restartPolicy: OnFailure
      template:
        spec:
          containers:
            - name: pytorch
              image: docker.io/kubeflowkatib/pytorch-mnist:v1beta1-45c5727
              imagePullPolicy: Always
              command: [{PACELINE:?}, run, --bind, none, --, {sum}]
    Worker:
      replicas: 1
      restartPolicy: OnFailure
      template:
        spec:
          containers:
            - name: pytorch
              image: docker.io/kubeflowkatib/pytorch-mnist:v1beta1-45c5727
              imagePullPolicy: Always
              command: [{PACELINE:?}, run, --bind, none, --, {sum}]
",
        sum = words("sum")
    );
    let ended = run(&manifest, network);
    assert_succeeded(&ended);
    assert_eq!(ended.1.matches("[0]: [").count(), 2, "two of the master's:\n{}", ended.1);
    assert!(ended.1.contains("sum 4"), "{}", ended.1);
}

/// Like the elastic echo: no master, and nothing that says which pod this is but its name.
fn elastic(network: &str) {
    let manifest = format!(
        "
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: elastic-example-echo
spec:
  elasticPolicy:
    rdzvBackend: c10d
    minReplicas: 2
    maxReplicas: 2
    maxRestarts: 0
  pytorchReplicaSpecs:
    Worker:
      replicas: 2
      restartPolicy: OnFailure
      template:
        spec:
          containers:
            - name: pytorch
              image: kubeflow/pytorch-elastic-example-echo:1.0.0
              env:
                - name: LOGLEVEL
                  value: DEBUG
              command: [{PACELINE:?}, run, --bind, none, -n, \"1\", --, {sum}]
",
        sum = words("sum")
    );
    let ended = run(&manifest, network);
    assert_succeeded(&ended);
    assert!(ended.1.contains("sum 2"), "{}", ended.1);
}

/// A PyTorchJob whose worker has this command and this policy, and whose master plays this part.
fn pair(master: &str, policy: &str, worker: &str) -> String {
    format!(
        "
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {{name: pair}}
spec:
  pytorchReplicaSpecs:
    Master: {{template: {{spec: {{containers: [{{name: pytorch, command: [sh, -c, {master:?}]}}]}}}}}}
    Worker: {{restartPolicy: {policy}, template: {{spec: {{containers: [{{name: pytorch, command: [sh, -c, {worker:?}]}}]}}}}}}
"
    )
}

fn started_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    // The second worker of that name lets the master end. In a manifest `$$` is one dollar.
    let worker = format!(
        "if [ -e {0} ]; then touch {1}; else touch {0}; kill -9 $$$$; fi",
        path("first"),
        path("second")
    );
    let master = format!("until [ -e {} ]; do sleep 0.1; done", path("second"));
    let (code, text) = run(&pair(&master, "ExitCode", &worker), "loopback");
    assert_eq!(code, Some(0), "{text}");
    assert!(
        text.contains("paceline: [1] was killed by signal 9 (SIGKILL); it is started again in 1 s"),
        "{text}"
    );
}

fn failed() {
    let folder = tempfile::tempdir().expect("a folder");
    let told = folder.path().join("told");
    let ready = folder.path().join("ready");
    let master = format!(
        "trap 'touch {}; exit 0' TERM; touch {}; while true; do sleep 0.1; done",
        told.display(),
        ready.display()
    );
    let worker = format!("until [ -e {} ]; do sleep 0.1; done; exit 3", ready.display());
    let (code, text) = run(&pair(&master, "ExitCode", &worker), "loopback");
    assert_eq!(code, Some(3), "{text}");
    assert!(
        text.ends_with("paceline: PyTorchJob pair has failed: pair-worker-0 exited with code 3\n"),
        "{text}"
    );
    assert!(Path::new(&told).exists(), "the master was told to end");
}

fn refused() {
    let (code, text) = run("kind: Pod\n", "loopback");
    assert_eq!((code, text.lines().count()), (Some(2), 1), "{text}");
    assert!(
        text.starts_with("paceline: ")
            && text.contains("job.yaml: it cannot be read as a TFJob or PyTorchJob"),
        "{text}"
    );
}

/// What a pod does.
fn part(part: &str, _args: &[String]) {
    match part {
        "sum" => sum(),
        "ps" => ps(),
        "tf-worker" => tf_worker(),
        other => panic!("no part is called {other}"),
    }
}

fn sum() {
    let mut world = World::join().expect("the world");
    let mut ones = [1.0f32];
    world.communicator().all_reduce(&mut ones, ReduceOp::Sum).expect("all come");
    // A job ends with its first pod, so that one speaks last.
    world.communicator().barrier().expect("all come");
    println!("sum {}", ones[0]);
    world.leave().expect("all have come");
}

/// The addresses of a role, and this pod's number.
fn tf_config(role: &str) -> (Vec<String>, usize) {
    let text = std::env::var("TF_CONFIG").expect("the operator sets it");
    let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let addresses = config["cluster"][role].as_array().expect("a list").iter();
    let index = config["task"]["index"].as_u64().expect("a number") as usize;
    (addresses.map(|address| address.as_str().expect("text").to_owned()).collect(), index)
}

/// Serves until it is stopped, as TensorFlow's servers do.
fn ps() {
    let (addresses, index) = tf_config("ps");
    let (_, port) = addresses[index].rsplit_once(':').expect("host:port");
    let listener = TcpListener::bind(format!("0.0.0.0:{port}")).expect("the port is free");
    for stream in listener.incoming() {
        let _ = stream.and_then(|mut stream| stream.write_all(format!("ps {index}").as_bytes()));
    }
}

fn tf_worker() {
    let ((servers, index), (workers, _)) = (tf_config("ps"), tf_config("worker"));
    for (number, server) in servers.iter().enumerate() {
        assert_eq!(ask(server), format!("ps {number}"));
    }
    println!("worker {index} of {} was served by {}", workers.len(), servers.len());
}

fn ask(server: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut answer = String::new();
        match TcpStream::connect(server).and_then(|mut stream| stream.read_to_string(&mut answer)) {
            Ok(_) => return answer,
            Err(error) => assert!(Instant::now() < deadline, "{server}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
