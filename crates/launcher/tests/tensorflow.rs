//! TensorFlow's own training under `paceline run`, as in the pods of a TFJob: the same loss as without a launcher, also when
//! processes are killed.
//!
//! `cargo xtask tensorflow` installs TensorFlow and runs this. It says with PYTHON_EXEC which interpreter has it.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

/// What takes longer hangs: four interpreters that import TensorFlow take some 15 s on two busy cores.
const LIMIT: Duration = Duration::from_secs(240);

/// Processes that end by a signal at once, as a rule, get this long.
const GRACE: &str = "10";

const SECRET: &str = "b1946ac92492d2347c6235b4d2611184";

/// One of the programs below `tensorflow/`.
type Script = (&'static str, &'static str);

const WORKERS: Script = ("workers.py", include_str!("tensorflow/workers.py"));
const SERVERS: Script = ("servers.py", include_str!("tensorflow/servers.py"));

/// The tasks of a cluster in the order in which launchers count them.
const TWO_WORKERS: [(&str, usize); 2] = [("worker", 0), ("worker", 1)];
const WITH_SERVER: [(&str, usize); 4] = [("chief", 0), ("worker", 0), ("worker", 1), ("ps", 0)];

/// A cluster on this machine: a process for each task, with a log of its own.
struct Cluster {
    folder: TempDir,
    script: Script,
    tasks: &'static [(&'static str, usize)],
    /// The ports of the tasks, then that of the launchers.
    ports: Vec<u16>,
    processes: Vec<Child>,
}

impl Cluster {
    fn new(script: Script, tasks: &'static [(&'static str, usize)]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join(script.0), script.1).expect("written");
        let secret = folder.path().join("secret");
        fs::write(&secret, SECRET).expect("written");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("changed");
        // All are held until all are known, so that none comes twice.
        let held: Vec<(u16, TcpListener)> = (0..=tasks.len()).map(|_| free_port()).collect();
        let ports = held.iter().map(|(port, _)| *port).collect();
        Self { folder, script, tasks, ports, processes: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the operator tells this task.
    fn tf_config(&self, task: usize) -> String {
        let mut cluster = json!({});
        for ((role, _), port) in self.tasks.iter().zip(&self.ports) {
            let address = format!("127.0.0.1:{port}");
            match cluster[role].as_array_mut() {
                Some(addresses) => addresses.push(address.into()),
                None => cluster[role] = json!([address]),
            }
        }
        let (role, index) = self.tasks[task];
        json!({ "cluster": cluster, "task": { "type": role, "index": index }, "environment": "cloud" })
            .to_string()
    }

    /// Starts the tasks without a launcher.
    fn by_hand(script: Script, tasks: &'static [(&'static str, usize)]) -> Self {
        let mut cluster = Self::new(script, tasks);
        for task in 0..tasks.len() {
            let mut command = Command::new(python());
            // Without -u what it prints is written in one piece, between TensorFlow's own lines in the same file.
            command.arg(cluster.path(script.0)).arg(cluster.folder.path());
            cluster.start(task, command);
        }
        cluster
    }

    /// Starts each task under a launcher of its own, with these words for the script.
    fn under_launchers(mut self, restarts: u32, words: &[&str]) -> Self {
        for task in 0..self.tasks.len() {
            let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
            command.args([
                "run",
                "--bind",
                "none",
                "--grace",
                GRACE,
                "--max-restarts",
                &restarts.to_string(),
            ]);
            command.arg(self.path(self.script.0)).arg(self.folder.path()).args(words);
            command.env("PACELINE_JOB_SECRET_FILE", self.path("secret"));
            command.env("PACELINE_PORT", self.ports[self.tasks.len()].to_string());
            self.start(task, command);
        }
        self
    }

    fn start(&mut self, task: usize, mut command: Command) {
        let log = File::create(self.path(&format!("log.{task}"))).expect("a log");
        command.env("TF_CONFIG", self.tf_config(task)).env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a descriptor")).stderr(log);
        self.processes.push(command.spawn().expect("it starts"));
    }

    fn log(&self, task: usize) -> String {
        String::from_utf8_lossy(&fs::read(self.path(&format!("log.{task}"))).expect("a log")).into_owned()
    }

    /// The last lines of all tasks.
    fn logs(&self) -> String {
        let last = |task: usize| {
            let (log, (role, index)) = (self.log(task), self.tasks[task]);
            let lines: Vec<&str> = log.lines().collect();
            format!("--- {role} {index}\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
        };
        (0..self.tasks.len()).map(last).collect::<Vec<_>>().join("\n")
    }

    /// The lines of a task with these words.
    fn lines(&self, task: usize, words: &str) -> Vec<String> {
        self.log(task).lines().filter(|line| line.contains(words)).map(str::to_owned).collect()
    }

    /// Waits until a task has said so often something with these words. Returns the last word of the last such line, which is a
    /// process's number in those that are waited for.
    fn wait_for(&mut self, task: usize, words: &str, count: usize) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            // Asked before the log is read, which has all of one that has ended.
            let ended = self.processes[task].try_wait().expect("it is our child");
            if let Some(line) = self.lines(task, words).get(count - 1) {
                return line.rsplit(' ').next().expect("there is one").to_owned();
            }
            assert!(ended.is_none(), "{ended:?} without `{words}`\n{}", self.logs());
            assert!(Instant::now() < deadline, "no `{words}`\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_for_end(&mut self, task: usize) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.processes[task].try_wait().expect("it is our child") {
                return status;
            }
            assert!(Instant::now() < deadline, "it hangs\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the end of all launchers, which have this code.
    fn assert_codes(&mut self, code: i32) {
        for task in 0..self.tasks.len() {
            let status = self.wait_for_end(task);
            assert_eq!(status.code(), Some(code), "{:?}\n{}", self.tasks[task], self.logs());
        }
    }

    fn assert_said(&self, task: usize, words: &str, count: usize) {
        let found = self.lines(task, words).len();
        assert_eq!(found, count, "`{words}` of {:?}\n{}", self.tasks[task], self.logs());
    }

    /// The loss that a task has printed in the end.
    fn loss(&self, task: usize) -> f64 {
        let lines = self.lines(task, " has the loss ");
        let loss = lines.last().and_then(|line| line.rsplit(' ').next()?.parse().ok());
        loss.unwrap_or_else(|| panic!("no loss of {:?}\n{}", self.tasks[task], self.logs()))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// A free port of those that the system does not give out by itself. A task that is started again needs its own once more: with
/// one of the system's an outgoing connection of any process may have taken it, and keeps it for a minute after its end.
fn free_port() -> (u16, TcpListener) {
    let mut tried = std::iter::repeat_with(|| fastrand::u16(15_000..32_000)).take(1000);
    let free = tried.find_map(|port| Some((port, TcpListener::bind(("0.0.0.0", port)).ok()?)));
    free.expect("one of a thousand is free")
}

fn python() -> String {
    std::env::var("PYTHON_EXEC").expect("`cargo xtask tensorflow` sets PYTHON_EXEC")
}

fn kill(pid: &str) {
    let pid = Pid::from_raw(pid.parse().expect("a number")).expect("a pid");
    kill_process(pid, Signal::KILL).expect("it runs");
}

/// A mean of two gradients has one value, and a step that is done again begins with what was saved. What may differ is the last bit
/// of a product, whose terms the processor's threads may add in another order.
const SAME_STEPS: f64 = 1e-6;

/// Steps come in any order, and lead to one minimum. Near it the loss does not change by more than f32 tells apart: 6e-8 for one
/// sum, times some tens of sums.
const SAME_MINIMUM: f64 = 5e-6;

fn assert_same(by_hand: f64, here: f64, tolerance: f64) {
    assert!((here / by_hand - 1.0).abs() <= tolerance, "{by_hand} by hand, {here} under Paceline");
}

/// The job as a manifest under `paceline local`. Returns all that was printed.
fn local(cluster: &Cluster) -> String {
    let command = json!([
        env!("CARGO_BIN_EXE_paceline"),
        "run",
        "--bind",
        "none",
        "--grace",
        GRACE,
        cluster.path(cluster.script.0),
        cluster.folder.path()
    ]);
    let replicas = |role: &str| cluster.tasks.iter().filter(|(of, _)| *of == role).count();
    let specs: String = [("Chief", "chief"), ("Worker", "worker"), ("PS", "ps")]
        .into_iter()
        .filter(|(_, role)| replicas(role) > 0)
        .map(|(name, role)| {
            format!(
                "    {name}: {{replicas: {}, restartPolicy: Never, template: {{spec: {{containers: [{{name: tensorflow, \
                 image: tensorflow, command: {command}}}]}}}}}}\n",
                replicas(role)
            )
        })
        .collect();
    let success = if replicas("chief") == 0 { "  successPolicy: AllWorkers\n" } else { "" };
    let manifest = format!(
        "apiVersion: kubeflow.org/v1\nkind: TFJob\nmetadata: {{name: job}}\nspec:\n{success}  tfReplicaSpecs:\n{specs}"
    );
    fs::write(cluster.path("job.yaml"), manifest).expect("written");
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", &LIMIT.as_secs().to_string(), env!("CARGO_BIN_EXE_paceline")]);
    command.args(["local", "--network", "loopback"]).arg(cluster.path("job.yaml")).env("NO_COLOR", "1");
    let output = command.output().expect("it starts");
    let [out, err] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let said = format!("{out}{err}");
    assert!(output.status.success(), "{}\n{said}", output.status);
    assert!(said.contains("TFJob job has succeeded"), "{said}");
    said
}

/// The losses in all that was printed.
fn losses(said: &str) -> Vec<f64> {
    let lines = said.lines().filter(|line| line.contains(" has the loss "));
    lines.map(|line| line.rsplit(' ').next().expect("one").parse().expect("a number")).collect()
}

#[test]
fn workers_train_to_the_same_loss_also_when_one_is_killed() {
    let mut by_hand = Cluster::by_hand(WORKERS, &TWO_WORKERS);
    by_hand.assert_codes(0);
    let expected = by_hand.loss(0);

    let losses = losses(&local(&Cluster::new(WORKERS, &TWO_WORKERS)));
    assert_eq!(losses.len(), 2);
    losses.iter().for_each(|&loss| assert_same(expected, loss, SAME_STEPS));

    let mut job = Cluster::new(WORKERS, &TWO_WORKERS).under_launchers(3, &["hold"]);
    // It stays in the step that it has begun, and the other one waits for it in a collective.
    kill(&job.wait_for(1, "worker 1 holds as ", 1));
    job.assert_codes(0);
    for task in 0..TWO_WORKERS.len() {
        assert_same(expected, job.loss(task), SAME_STEPS);
        job.assert_said(task, "; the job starts again (1 of 3)", 1);
        job.assert_said(task, "; the job starts again (", 1);
        let begun = job.lines(task, &format!("worker {task} begins with step "));
        assert!(begun.len() == 2 && !begun[1].contains(" step 0 "), "not from what was saved: {begun:?}");
    }
    job.assert_said(1, "rank 1 (pid ", 1);
    job.assert_said(0, "rank 1 on node 1 was killed by signal 9 (SIGKILL); the job starts again (1 of 3)", 1);
}

#[test]
fn with_parameter_servers_the_loss_is_the_same_also_when_a_worker_a_server_and_the_chief_are_killed() {
    let (chief, worker, ps) = (0, 1, 3);
    let mut by_hand = Cluster::by_hand(SERVERS, &WITH_SERVER);
    assert!(by_hand.wait_for_end(chief).success(), "{}", by_hand.logs());
    let expected = by_hand.loss(chief);
    // Nobody ends its workers and servers.
    drop(by_hand);

    let losses = losses(&local(&Cluster::new(SERVERS, &WITH_SERVER)));
    assert_eq!(losses.len(), 1);
    assert_same(expected, losses[0], SAME_MINIMUM);

    let mut job = Cluster::new(SERVERS, &WITH_SERVER).under_launchers(3, &["2", "4", "6"]);
    let go = |job: &Cluster, epoch: &str| fs::write(job.path(&format!("go.{epoch}")), "").expect("written");

    // A worker takes its own place, and the chief trains on.
    job.wait_for(chief, "chief trains on in epoch 2 as ", 1);
    kill(&job.wait_for(worker, "worker 0 serves as ", 1));
    job.wait_for(worker, "was killed by signal 9 (SIGKILL); pid ", 1);
    job.wait_for(worker, "worker 0 serves as ", 2);
    go(&job, "2");
    job.wait_for(chief, "chief trains on in epoch 4 as ", 1);
    assert!(!job.logs().contains("starts again"), "a worker has cost more than itself\n{}", job.logs());

    // A parameter server takes the weights with it: all start again, once.
    kill(&job.wait_for(ps, "ps 0 serves as ", 1));
    go(&job, "4");
    job.wait_for(chief, "chief begins with epoch 4 as ", 1);
    for task in 0..WITH_SERVER.len() {
        job.assert_said(task, "; the job starts again (1 of 3)", 1);
    }

    // So they do when the chief is lost.
    kill(&job.wait_for(chief, "chief trains on in epoch 6 as ", 1));
    go(&job, "6");
    job.wait_for(chief, "chief begins with epoch 6 as ", 1);

    job.assert_codes(0);
    assert_same(expected, job.loss(chief), SAME_MINIMUM);
    for task in 0..WITH_SERVER.len() {
        job.assert_said(task, "; the job starts again (2 of 3)", 1);
        job.assert_said(task, "; the job starts again (", 2);
        let is_ended = task != chief;
        let words = "rank 0 on node 0 has finished, and with it the job; the job has ended";
        job.assert_said(task, words, usize::from(is_ended));
    }
}

#[test]
fn a_worker_that_cannot_bind_its_port_is_named_by_all_in_place_of_a_silent_hang() {
    let job = Cluster::new(SERVERS, &WITH_SERVER);
    let _occupied = TcpListener::bind(("0.0.0.0", job.ports[2])).expect("it was free a moment ago");
    let mut job = job.under_launchers(1, &[]);
    job.assert_codes(1);
    job.assert_said(2, "exited with code 1; pid ", 1);
    for task in [0, 1, 3] {
        job.assert_said(task, "rank 2 on node 2 exited with code 1; the job has ended", 1);
    }
    // The launcher of that worker passes on what TensorFlow says.
    let report = job.lines(2, "rank 2 (pid ").pop().expect("a report");
    assert!(report.ends_with("; the job has ended"), "{}", job.logs());
    assert!(
        job.log(2)
            .lines()
            .any(|line| line.starts_with("    ") && line.contains("Could not start gRPC server")),
        "{}",
        job.logs()
    );
}
