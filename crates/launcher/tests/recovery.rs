//! Jobs of three launchers, and of two with a lease, whose workers and launchers are killed, with PyTorch's own training as the
//! program; whoever has started the launchers starts a killed one again after a second, as a pod's kubelet would.
//!
//! `cargo xtask torchrun` kills each five times; with `--kills N` it kills each N times, and torchrun's workers and agents too, and
//! prints all beside each other. It says with PYTHON_EXEC which interpreter has PyTorch.

#![allow(clippy::print_stdout, reason = "prints what it has measured")]

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How often each is killed where nobody says how often.
const KILLS: usize = 5;

/// What takes longer hangs: a start of three interpreters with PyTorch takes some 10 s on two busy cores.
const LIMIT: Duration = Duration::from_secs(240);

/// torchrun's agents are given up after this time.
const PATIENCE: Duration = Duration::from_secs(120);

/// When whoever looks after the launchers starts a killed one again.
const SUPERVISION: Duration = Duration::from_secs(1);

const SECRET: &str = "b1946ac92492d2347c6235b4d2611184";

const ENDLESS: &str = include_str!("endless.py");

/// What kind of launchers a job has, each with one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Launchers {
    Paceline,
    /// Two, of which whichever has the lease may lead.
    PacelineWithLease,
    Torchrun,
}

/// What is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Worker,
    /// A launcher other than that of node 0, and its worker with it.
    Launcher,
    /// Where the others meet.
    LeadingLauncher,
}

impl fmt::Display for Launchers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launchers::Paceline => "3 paceline run",
            Launchers::PacelineWithLease => "2 with --lease",
            Launchers::Torchrun => "3 torchrun",
        })
    }
}

impl Launchers {
    fn count(self) -> usize {
        match self {
            Launchers::Paceline | Launchers::Torchrun => 3,
            Launchers::PacelineWithLease => 2,
        }
    }

    /// How long their recovery is waited for.
    fn patience(self) -> Duration {
        match self {
            Launchers::Paceline | Launchers::PacelineWithLease => LIMIT,
            Launchers::Torchrun => PATIENCE,
        }
    }
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Victim::Worker => "a worker",
            Victim::Launcher => "a launcher",
            Victim::LeadingLauncher => "the leading launcher",
        })
    }
}

const VICTIMS: [Victim; 3] = [Victim::Worker, Victim::Launcher, Victim::LeadingLauncher];

#[test]
fn a_job_survives_sigkill_of_a_worker_of_a_launcher_and_of_the_launcher_that_leads() {
    survives(Launchers::Paceline);
}

#[test]
fn a_job_of_two_launchers_with_a_lease_survives_the_same() {
    survives(Launchers::PacelineWithLease);
}

fn survives(launchers: Launchers) {
    let mut job = Job::start(launchers);
    for victim in VICTIMS {
        for round in 0..KILLS {
            if let Err(why) = job.recover_from(victim, round) {
                panic!("{victim}, {} of {KILLS}: {why}\n{}", round + 1, job.logs());
            }
        }
    }
    job.end();
}

/// What torchrun does not recover from is a line of the table alone.
#[test]
#[ignore = "takes minutes to hours; cargo xtask torchrun --kills N"]
fn both_launchers_are_killed_and_measured_in_one_run() {
    let kills = |name: &str| -> usize {
        let text = std::env::var(name).unwrap_or_else(|_| panic!("cargo xtask torchrun sets {name}"));
        text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, and no number"))
    };
    let ours = kills("PACELINE_TEST_KILLS");
    let of_each = [
        (Launchers::Paceline, ours),
        (Launchers::PacelineWithLease, ours),
        (Launchers::Torchrun, kills("PACELINE_TEST_TORCHRUN_KILLS")),
    ];
    let mut table = vec!["killed               launchers       recovered     median    longest".to_owned()];
    let mut in_vain = 0;
    for victim in VICTIMS {
        for (launchers, times) in of_each {
            let took = measure(launchers, victim, times);
            if launchers != Launchers::Torchrun {
                in_vain += times - took.len();
            }
            table.push(row(launchers, victim, times, took));
        }
    }
    println!("\nfrom SIGKILL to the first step of all ranks in the next generation\n{}", table.join("\n"));
    assert_eq!(in_vain, 0, "not all have recovered under paceline run");
}

/// Kills so often, and returns how long each recovery took. A job that has not recovered is of no more use, and another one
/// takes its place.
fn measure(launchers: Launchers, victim: Victim, times: usize) -> Vec<Duration> {
    let mut took = Vec::new();
    let mut present: Option<Job> = None;
    for round in 0..times {
        let mut job = present.take().unwrap_or_else(|| Job::start(launchers));
        match job.recover_from(victim, round) {
            Ok(time) => {
                println!("{launchers}, {victim}, {} of {times}: {:.1} s", round + 1, time.as_secs_f64());
                took.push(time);
                present = Some(job);
            }
            Err(why) => {
                println!("{launchers}, {victim}, {} of {times}: {why}", round + 1);
                if launchers != Launchers::Torchrun {
                    println!("{}", job.logs());
                }
            }
        }
    }
    took
}

fn row(launchers: Launchers, victim: Victim, times: usize, mut took: Vec<Duration>) -> String {
    took.sort();
    let in_words =
        |time: Option<&Duration>| time.map_or("-".to_owned(), |t| format!("{:.1} s", t.as_secs_f64()));
    let (victim, launchers) = (victim.to_string(), launchers.to_string());
    let recovered = format!("{} of {times}", took.len());
    let [median, longest] = [took.get(took.len() / 2), took.last()].map(in_words);
    format!("{victim:<20} {launchers:<14} {recovered:>10} {median:>10} {longest:>10}")
}

/// A job that trains.
struct Job {
    launchers: Launchers,
    folder: TempDir,
    endpoint: String,
    nodes: Vec<Child>,
    /// Every process that has done a step.
    workers: BTreeSet<i32>,
}

/// What a rank says about its process.
#[derive(Clone, Copy, Debug)]
struct First {
    pid: i32,
    /// When it had done its first step, in seconds since 1970.
    at_s: f64,
    /// The steps that it did not have to do, since its state was saved.
    step: u64,
}

impl Job {
    /// Starts it and waits for its first step.
    fn start(launchers: Launchers) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("endless.py"), ENDLESS).expect("written");
        let secret = folder.path().join("secret");
        fs::write(&secret, SECRET).expect("written");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&secret, mode).expect("changed");
        let endpoint = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let endpoint = endpoint.expect("a port").to_string();
        let mut job = Self { launchers, folder, endpoint, nodes: Vec::new(), workers: BTreeSet::new() };
        for node in 0..launchers.count() {
            let started = job.launch(node);
            job.nodes.push(started);
        }
        if let Err(why) = job.wait_for_steps(&vec![0; launchers.count()], LIMIT) {
            panic!("{launchers}: the job has not started: {why}\n{}", job.logs());
        }
        job
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn launch(&self, node: usize) -> Child {
        let python = std::env::var("PYTHON_EXEC").expect("`cargo xtask torchrun` sets PYTHON_EXEC");
        let mut command = match self.launchers {
            Launchers::Paceline | Launchers::PacelineWithLease => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
                command.args([
                    "run",
                    "--node-rank",
                    &node.to_string(),
                    "--grace",
                    "5",
                    "--rdzv-timeout",
                    "120",
                ]);
                command.arg("--job-secret").arg(self.path("secret"));
                if self.launchers == Launchers::PacelineWithLease {
                    command.arg("--fence=lease").arg("--lease").arg(self.path("lease"));
                }
                command
            }
            Launchers::Torchrun => {
                let mut command = Command::new(python);
                command.args(["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-id=job"]);
                command.arg(format!("--rdzv-conf=is_host={}", node == 0));
                command
            }
        };
        let log = File::options().create(true).append(true).open(self.path(&format!("log.{node}")));
        let log = log.expect("a log");
        let count = self.launchers.count().to_string();
        command.args(["--nnodes", &count, "--nproc-per-node", "1", "--max-restarts", "10000"]);
        command.args(["--rdzv-endpoint", &self.endpoint]);
        command.arg(self.path("endless.py")).arg(self.folder.path()).env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a descriptor")).stderr(log);
        command.spawn().expect("the launcher starts")
    }

    /// Kills one, and waits for all ranks' first step after that. Returns how long that took, or why it did not come.
    fn recover_from(&mut self, victim: Victim, round: usize) -> Result<Duration, String> {
        let before = self.firsts();
        let pids: Vec<i32> = before.iter().map(|first| first.as_ref().expect("it trains").pid).collect();
        let killed_at =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs_f64();
        match victim {
            Victim::Worker => kill(pids[round % pids.len()]),
            Victim::Launcher => self.replace(1 + round % (pids.len() - 1)),
            Victim::LeadingLauncher => self.replace(0),
        }
        let firsts = self.wait_for_steps(&pids, self.launchers.patience())?;
        for (before, after) in before.iter().flatten().zip(&firsts) {
            assert!(before.step <= after.step, "steps were forgotten: {before:?} and then {after:?}");
        }
        let last = firsts.iter().map(|first| first.at_s).fold(0.0, f64::max);
        Ok(Duration::from_secs_f64((last - killed_at).max(0.0)))
    }

    fn replace(&mut self, node: usize) {
        self.nodes[node].kill().expect("it runs");
        self.nodes[node].wait().expect("it is our child");
        std::thread::sleep(SUPERVISION);
        self.nodes[node] = self.launch(node);
    }

    fn firsts(&self) -> Vec<Option<First>> {
        (0..self.launchers.count()).map(|rank| read(&self.path(&format!("first.{rank}")))).collect()
    }

    /// Waits until each rank has another process than that one, which has done a step. torchrun's agents that end are
    /// started again too; Paceline's launchers do not end.
    fn wait_for_steps(&mut self, before: &[i32], limit: Duration) -> Result<Vec<First>, String> {
        let deadline = Instant::now() + limit;
        loop {
            let firsts: Vec<First> = self.firsts().into_iter().flatten().collect();
            self.workers.extend(firsts.iter().map(|first| first.pid));
            if firsts.len() == before.len()
                && firsts.iter().zip(before).all(|(first, before)| first.pid != *before)
            {
                return Ok(firsts);
            }
            if Instant::now() >= deadline {
                return Err(format!("no step of all ranks within {} s", limit.as_secs()));
            }
            for node in 0..before.len() {
                let ended =
                    self.nodes.get_mut(node).and_then(|node| node.try_wait().expect("it is our child"));
                let Some(status) = ended else { continue };
                if self.launchers != Launchers::Torchrun {
                    return Err(format!("launcher {node} has ended: {status}"));
                }
                std::thread::sleep(SUPERVISION);
                self.nodes[node] = self.launch(node);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Lets the training end.
    fn end(mut self) {
        fs::write(self.path("stop"), "").expect("written");
        let deadline = Instant::now() + LIMIT;
        for node in 0..self.launchers.count() {
            let status = loop {
                match self.nodes[node].try_wait().expect("it is our child") {
                    Some(status) => break status,
                    None if Instant::now() >= deadline => panic!("launcher {node} hangs\n{}", self.logs()),
                    None => std::thread::sleep(Duration::from_millis(20)),
                }
            };
            assert!(status.success(), "launcher {node}: {status}\n{}", self.logs());
        }
        for rank in 0..self.launchers.count() {
            assert!(self.logs().contains(&format!("rank {rank} has done ")), "{}", self.logs());
        }
    }

    /// The last lines of each launcher.
    fn logs(&self) -> String {
        let log = |node| {
            let text = fs::read_to_string(self.path(&format!("log.{node}"))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("--- node {node}\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
        };
        (0..self.launchers.count()).map(log).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            let _ = node.kill();
            let _ = node.wait();
        }
        // Those of a killed agent of torchrun live on.
        let folder = self.folder.path().to_string_lossy().into_owned();
        for &pid in &self.workers {
            // The number may be somebody else's by now.
            if fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|words| words.contains(&folder)) {
                kill(pid);
            }
        }
    }
}

fn read(file: &std::path::Path) -> Option<First> {
    let text = fs::read_to_string(file).ok()?;
    let mut words = text.split_whitespace();
    let mut next = || words.next();
    Some(First { pid: next()?.parse().ok()?, at_s: next()?.parse().ok()?, step: next()?.parse().ok()? })
}

fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("it runs");
}
