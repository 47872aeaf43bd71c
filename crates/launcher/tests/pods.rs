//! Launchers as the entrypoints of pods: no flags, only the variables that operators set.

#![allow(clippy::print_stderr, reason = "ranks talk to the test by their output")]

mod job;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use job::{Finished, Job, PACELINE, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use tempfile::TempDir;

/// What the pods of these jobs share.
const SECRET: &str = "b1946ac92492d2347c6235b4d2611184";

fn main() {
    job::main(rank, || {
        vec![
            trial("the_pods_of_a_pytorchjob_form_the_job_without_a_flag", pytorchjob),
            trial("the_pods_of_a_tfjob_form_the_job_and_know_their_roles", tfjob),
            trial("when_the_chief_succeeds_servers_and_workers_are_stopped_and_exit_with_0", chief_succeeds),
            trial("a_worker_of_parameter_servers_that_is_killed_is_started_again_alone", replaced_alone),
            trial("a_flag_wins_over_the_pod", flags_win),
            trial("a_pod_whose_variables_contradict_each_other_starts_nothing", contradiction),
            trial("a_pod_that_is_not_told_of_the_others_says_so_and_runs_by_itself", sparse),
            trial("a_doctor_that_finds_nothing_wrong_exits_with_0", sound_doctor),
            trial("a_doctor_that_finds_a_contradiction_says_what_to_do_and_exits_with_1", alarmed_doctor),
            trial("env_prints_what_it_has_understood_as_text_and_as_json", env),
        ]
    });
}

/// The secret and the port of one job's pods on this machine.
struct Pods {
    folder: TempDir,
    secret: String,
    port: String,
    part: &'static str,
}

impl Pods {
    fn new() -> Self {
        Self::playing("sum")
    }

    fn playing(part: &'static str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        fs::write(&path, SECRET).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("changed");
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a port")
            .port();
        let secret = path.to_str().expect("text").to_owned();
        Self { folder, secret, port: port.to_string(), part }
    }

    /// A file that ends the job, where its part looks for one.
    fn stop(&self) -> PathBuf {
        self.folder.path().join("stop")
    }

    fn start(&self, flags: &[&str], variables: &[(&str, &str)]) -> Job {
        let shared = [
            ("PACELINE_JOB_SECRET_FILE", self.secret.as_str()),
            ("PACELINE_PORT", &self.port),
            ("PACELINE_SHARED_MEMORY", "off"),
        ];
        let variables = [&shared, variables].concat();
        let stop = self.stop().to_str().expect("text").to_owned();
        Job::launch(&[&["--bind", "none"], flags].concat(), &variables, self.part, &[&stop])
    }
}

fn replaced_alone() {
    let pods = Pods::playing("serve-and-say");
    let cluster = r#""cluster":{"chief":["127.0.0.1:1"],"worker":["127.0.0.1:2"],"ps":["127.0.0.1:3"]}"#;
    let job = |role: &str| {
        let config = format!(r#"{{{cluster},"task":{{"type":"{role}","index":0}}}}"#);
        pods.start(&["--max-restarts", "2"], &[("TF_CONFIG", &config)])
    };
    let [mut chief, mut worker, mut ps] = ["chief", "worker", "ps"].map(job);
    for job in [&mut chief, &mut ps] {
        job.wait_for("serving as ", 1);
    }
    for (kills, pauses) in [(1, 0), (2, 1)] {
        let line = worker.wait_for("serving as ", kills).remove(kills - 1);
        let pid = line.rsplit(' ').next().expect("the line ends with the pid");
        assert!(Command::new("kill").args(["-9", pid]).status().expect("kill runs").success());
        worker.wait_for("serving as ", kills + 1);
        worker.wait_for(" takes its place", kills);
        worker.wait_for("killed by signal 9 (SIGKILL); it is started again in 1 s", pauses);
    }
    fs::write(pods.stop(), "").expect("written");
    let [chief, worker, ps] = [chief, worker, ps].map(Job::finish);
    for (finished, starts) in [(&chief, 1), (&worker, 3), (&ps, 1)] {
        finished.assert_success();
        assert_eq!(finished.lines_with("serving as ").len(), starts, "{}", all(finished));
        assert!(!all(finished).contains("starts again"), "{}", all(finished));
    }
}

fn pytorchjob() {
    let pods = Pods::new();
    let job = |number| {
        pods.start(
            &[],
            &[("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "23456"), ("WORLD_SIZE", "3"), ("RANK", number)],
        )
    };
    let jobs = ["2", "0", "1"].map(job);
    for (finished, role) in jobs.map(Job::finish).iter().zip(["worker 1", "master 0", "worker 0"]) {
        finished.assert_success();
        assert_eq!(
            finished.lines_with(&format!("sum 3 as {role} of master:1,worker:2")).len(),
            1,
            "{}",
            all(finished)
        );
    }
}

fn tfjob() {
    let pods = Pods::new();
    let cluster = r#""cluster":{"chief":["127.0.0.1:1"],"worker":["127.0.0.1:2"],"ps":["127.0.0.1:3"]}"#;
    let job = |role: &str| {
        let config = format!(r#"{{{cluster},"task":{{"type":"{role}","index":0}},"environment":"cloud"}}"#);
        pods.start(&[], &[("TF_CONFIG", &config)])
    };
    let roles = ["ps", "worker", "chief"];
    for (finished, role) in roles.map(job).map(Job::finish).iter().zip(roles) {
        finished.assert_success();
        let line = format!("sum 3 as {role} 0 of chief:1,worker:1,ps:1");
        assert_eq!(finished.lines_with(&line).len(), 1, "{}", all(finished));
    }
}

/// Nobody but the chief ends by itself, as with TensorFlow's servers.
fn chief_succeeds() {
    let pods = Pods::playing("serve");
    let cluster = r#""cluster":{"chief":["127.0.0.1:1"],"worker":["127.0.0.1:2"],"ps":["127.0.0.1:3"]}"#;
    let job = |role: &str| {
        let config = format!(r#"{{{cluster},"task":{{"type":"{role}","index":0}}}}"#);
        pods.start(&[], &[("TF_CONFIG", &config)])
    };
    let [chief, worker, ps] = ["chief", "worker", "ps"].map(job).map(Job::finish);
    chief.assert_success();
    for served in [worker, ps] {
        served.assert_success();
        assert_eq!(report(&served), "rank 0 on node 0 has finished, and with it the job; the job has ended");
    }
}

/// The line of the launcher that is not about waiting.
fn report(finished: &Finished) -> &str {
    let lines = finished.lines.iter().filter_map(|line| line.strip_prefix("paceline: "));
    let mut reports = lines.filter(|line| !line.starts_with("waiting for "));
    reports.next().unwrap_or_else(|| panic!("no report in\n{}", all(finished)))
}

fn flags_win() {
    let pods = Pods::new();
    let pod = [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1"), ("WORLD_SIZE", "3"), ("RANK", "2")];
    let finished = pods.start(&["--nnodes", "1", "-n", "2"], &pod).finish();
    finished.assert_success();
    assert_eq!(finished.lines_with("sum 2 as").len(), 2, "{}", all(&finished));
}

fn contradiction() {
    let pods = Pods::new();
    let pod = [("MASTER_ADDR", "127.0.0.1"), ("WORLD_SIZE", "3"), ("RANK", "3")];
    let finished = pods.start(&[], &pod).finish();
    assert_eq!(finished.status.code(), Some(2));
    let line = "RANK is 3, but there are 3 pods by WORLD_SIZE; it counts pods, from 0 to 2";
    assert_eq!(finished.lines, [format!("paceline: {line}")]);
}

fn sparse() {
    let pods = Pods::new();
    let config = r#"{"cluster":{"worker":{"1":"127.0.0.1:2"},"ps":["127.0.0.1:3"]},"task":{"type":"worker","index":1}}"#;
    let finished = pods.start(&[], &[("TF_CONFIG", config)]).finish();
    finished.assert_success();
    assert_eq!(finished.lines_with("sum 1 as worker 1").len(), 1, "{}", all(&finished));
    assert!(
        finished.report().contains("worker 1 of a TFJob is not told of all others"),
        "{}",
        all(&finished)
    );
}

fn env() {
    let print = |flags: &[&str], rank: &str| -> Output {
        let variables =
            [("MASTER_ADDR", "job-master-0"), ("MASTER_PORT", "1"), ("WORLD_SIZE", "2"), ("RANK", rank)];
        Command::new(PACELINE).arg("env").args(flags).envs(variables).output().expect("it starts")
    };
    let text = print(&[], "1");
    assert!(text.status.success());
    let text = String::from_utf8(text.stdout).expect("text");
    assert!(text.contains("1   worker 0      job-worker-0 (this pod)"), "{text}");
    let json = print(&["--json"], "1");
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("a document");
    assert_eq!(json["meet_at"], serde_json::json!({ "value": "job-master-0", "from": "MASTER_ADDR" }));
    let wrong = print(&[], "2");
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).starts_with("paceline: RANK is 2"));
}

/// It finds itself, on the loopback interface.
fn sound_doctor() {
    let pods = Pods::new();
    let mut command = Command::new(PACELINE);
    command.args(["doctor", "--wait", "60", "--port", &pods.port, "--job-secret", &pods.secret, "127.0.0.1"]);
    let output = command.output().expect("it starts");
    let report = String::from_utf8(output.stdout).expect("text");
    assert_eq!(output.status.code(), Some(0), "{report}");
    for line in [
        "job secret",
        "open files",
        "TCP to 127.0.0.1",
        "UDP to 127.0.0.1",
        "packets to 127.0.0.1",
        "clock of 127.0.0.1",
    ] {
        assert!(
            report.lines().any(|found| found.starts_with(&format!("ok       {line}"))),
            "no `{line}` in\n{report}"
        );
    }
    assert!(report.ends_with(" 0 failed\n"), "{report}");
}

fn alarmed_doctor() {
    let variables = [("MASTER_ADDR", "m"), ("WORLD_SIZE", "2"), ("RANK", "2")];
    let output = Command::new(PACELINE).arg("doctor").envs(variables).output().expect("it starts");
    let report = String::from_utf8(output.stdout).expect("text");
    assert_eq!(output.status.code(), Some(1), "{report}");
    let line = report.lines().find(|line| line.starts_with("failed   environment")).expect("it is a failure");
    assert!(
        line.contains("RANK is 2, but there are 2 pods") && line.ends_with("paceline env shows them"),
        "{line}"
    );
}

fn all(finished: &Finished) -> String {
    finished.lines.join("\n")
}

/// A rank: sums a one of each, or serves until it is stopped.
fn rank(part: &str, args: &[String]) {
    if part == "serve-and-say" {
        eprintln!("serving as {}", std::process::id());
        let is_chief = std::env::var("PACELINE_ROLE").as_deref() == Ok("chief");
        while !(is_chief && Path::new(&args[0]).exists()) {
            std::thread::sleep(Duration::from_millis(20));
        }
        return;
    }
    if part == "serve" {
        while std::env::var("PACELINE_ROLE").as_deref() != Ok("chief") {
            std::thread::park();
        }
        return;
    }
    let mut world = World::join().expect("the world");
    let mut ones = [1.0f32];
    world.communicator().all_reduce(&mut ones, ReduceOp::Sum).expect("all come");
    let told = |name| std::env::var(name).unwrap_or_default();
    let (role, index) = (told("PACELINE_ROLE"), told("PACELINE_ROLE_INDEX"));
    eprintln!("sum {} as {role} {index} of {}", ones[0], told("PACELINE_ROLES"));
    world.leave().expect("all have come");
}
