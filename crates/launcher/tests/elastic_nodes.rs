//! Launchers that are killed and frozen while their workers train: four of them on this machine, with a rank each, which
//! know each other by the job secret and the endpoint alone. A supervisor starts again what was killed.
//!
//! What counts is the result, as in `elastic`. `PACELINE_CHAOS_FAULTS=1000` sets the number of faults at random moments,
//! `PACELINE_CHAOS_SEED` repeats a run's choices.

#![allow(clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod job;
mod training;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use fastrand::Rng;
use job::{PACELINE, PATIENCE, now_us, trial};
use paceline_runtime::membership::Mode;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;
use training::{STEPS, check, large, number_from, pause, print_times, set_pace, train};

fn main() {
    job::main(rank, || {
        let mut trials = vec![
            trial("the_loss_of_any_launcher_and_of_two_at_once_changes_no_bit_of_the_result", one_by_one),
            trial("launchers_lost_and_frozen_at_random_change_no_bit_of_the_result_with_slots", || {
                chaos(Mode::Slots)
            }),
            trial("every_sample_is_used_once_in_each_pass_whichever_launcher_is_lost", || {
                chaos(Mode::Shrink)
            }),
            trial("half_of_the_launchers_without_the_lowest_stop_and_ask_for_a_restart", no_quorum),
            trial("fewer_nodes_than_the_least_number_go_on_no_longer_than_others_may_take", too_few),
            trial("a_program_with_a_fixed_membership_is_told_what_to_do", fixed_program),
        ];
        if std::env::var_os("PACELINE_MEASURE_FAULTS").is_some() {
            trials.push(trial("measure_how_long_survivors_take_after_the_loss_of_a_launcher", measure));
        }
        trials
    });
}

fn rank(part: &str, args: &[String]) {
    println!("process {} at {}", std::process::id(), now_us());
    match part {
        "slots" => train(Mode::Slots, args),
        "shrink" => train(Mode::Shrink, args),
        "large" => large(),
        "fixed" => match paceline_runtime::World::join() {
            Ok(_) => println!("a world"),
            Err(error) => println!("no world: {error}"),
        },
        other => panic!("no part {other}"),
    }
}

/// How many launchers there are, with one rank each.
const NODES: usize = training::RANKS;

/// When the supervisor starts again what has been killed.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// A line of a node's output, or its end.
type Line = (usize, u32, Option<String>);

struct Node {
    launcher: Child,
    /// Counts the processes.
    life: u32,
    /// The process of its rank.
    rank: Option<Pid>,
    /// The epoch and the number of members that its rank has named last.
    said: Option<(u64, usize)>,
    /// The steps that it has said to be stable, with their epochs, and those that it has applied, with the time in
    /// microseconds; since the last fault.
    stable: Vec<(u64, u64)>,
    applied: Vec<(u64, u128)>,
    /// Whether its output is at its end.
    closed: bool,
}

/// Four launchers and their supervisor.
struct Cluster {
    folder: TempDir,
    flags: Vec<String>,
    part: &'static str,
    passes: u64,
    nodes: BTreeMap<usize, Node>,
    /// Nodes that are down, and when they are started again.
    down: BTreeMap<usize, Option<Instant>>,
    lives: u32,
    sender: Sender<Line>,
    lines: Receiver<Line>,
    seen: Vec<String>,
    step: u64,
    epoch: u64,
}

/// A port that stays free while nobody has it: below those from which connections are made, which a launcher that
/// dials node 0 in vain might be given.
fn free_endpoint() -> SocketAddr {
    let mut ports = std::iter::repeat_with(|| fastrand::u16(20_000..32_000));
    let free = ports.find_map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok());
    free.and_then(|listener| listener.local_addr().ok()).expect("one of them is free")
}

impl Cluster {
    fn start(part: &'static str, nnodes: &str, passes: u64, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let secret = folder.path().join("secret");
        fs::write(&secret, "b1946ac92492d2347c6235b4d2611184").expect("written");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("changed");
        let endpoint = free_endpoint().to_string();
        let secret = secret.to_string_lossy();
        let flags = ["--nnodes", nnodes, "-n", "1", "--bind", "none", "--max-restarts", "1000"];
        let flags = flags.into_iter().chain(["--rdzv-endpoint", &endpoint, "--job-secret", &secret]);
        let flags = flags.chain(more.iter().copied()).map(str::to_owned).collect();
        let (sender, lines) = channel();
        let (nodes, down) = (BTreeMap::new(), BTreeMap::new());
        let mut cluster = Self {
            folder,
            flags,
            part,
            passes,
            nodes,
            down,
            lives: 0,
            sender,
            lines,
            seen: Vec::new(),
            step: 0,
            epoch: 0,
        };
        (0..NODES).for_each(|node| cluster.launch(node));
        cluster
    }

    fn pace(&self) -> PathBuf {
        self.folder.path().join("pace")
    }

    fn launch(&mut self, node: usize) {
        let mut command = Command::new(PACELINE);
        command.arg("run").args(&self.flags).args(["--node-rank", &node.to_string(), "--"]);
        command.arg(std::env::current_exe().expect("a test has an executable"));
        command.args(["as-rank", self.part, &self.passes.to_string()]).arg(self.pace());
        // Ranks of one machine: they are to use what ranks of several would.
        command.env("PACELINE_SHARED_MEMORY", "off").env("RUST_BACKTRACE", "0");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut launcher = command.spawn().expect("the launcher starts");
        self.lives += 1;
        let life = self.lives;
        let out = launcher.stdout.take().expect("it is piped");
        let errors = launcher.stderr.take().expect("it is piped");
        let both: [Box<dyn Read + Send>; 2] = [Box::new(out), Box::new(errors)];
        let readers = both.map(|stream| {
            let sender = self.sender.clone();
            std::thread::spawn(move || {
                let lines = BufReader::new(stream).lines().map_while(Result::ok);
                lines.for_each(|line| drop(sender.send((node, life, Some(line)))));
            })
        });
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            readers.into_iter().for_each(|reader| drop(reader.join()));
            drop(sender.send((node, life, None)));
        });
        self.nodes.insert(
            node,
            Node {
                launcher,
                life,
                rank: None,
                said: None,
                stable: Vec::new(),
                applied: Vec::new(),
                closed: false,
            },
        );
    }

    /// Kills the launcher, and sees that nothing of it is left.
    fn kill(&mut self, node: usize, restart: Option<Duration>) {
        let mut killed = self.nodes.remove(&node).expect("it runs");
        killed.launcher.kill().expect("it is our child");
        killed.launcher.wait().expect("it is our child");
        let deadline = Instant::now() + PATIENCE;
        while killed.rank.is_some_and(|rank| !is_gone(rank)) {
            assert!(Instant::now() < deadline, "the rank of node {node} outlives its launcher");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.down.insert(node, restart.map(|after| Instant::now() + after));
    }

    fn signal(&self, node: usize, signal: Signal) {
        let pid = Pid::from_raw(self.nodes[&node].launcher.id() as i32).expect("a process");
        kill_process(pid, signal).expect("it is our child");
    }

    /// Reads a line, if one comes soon, and starts what is due.
    fn go_on(&mut self) {
        let due = |at: &Option<Instant>| at.is_some_and(|at| at <= Instant::now());
        let starting: Vec<usize> =
            self.down.iter().filter(|(_, at)| due(at)).map(|(&node, _)| node).collect();
        for node in starting {
            self.down.remove(&node);
            self.launch(node);
        }
        if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(50)) {
            self.take(line);
        }
    }

    /// Reads what has come by now.
    fn catch_up(&mut self) {
        while let Ok(line) = self.lines.try_recv() {
            self.take(line);
        }
    }

    fn take(&mut self, (node, life, line): Line) {
        match line {
            Some(line) => {
                self.read(node, life, &line);
                self.seen.push(format!("{node}.{life} {line}"));
            }
            None => {
                if let Some(node) = self.nodes.get_mut(&node).filter(|node| node.life == life) {
                    node.closed = true;
                }
            }
        }
    }

    fn read(&mut self, node: usize, life: u32, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap_or(0);
        let Some(node) = self.nodes.get_mut(&node).filter(|node| node.life == life) else { return };
        match words[..] {
            [_, "process", pid, ..] => {
                node.rank = pid.parse().ok().and_then(Pid::from_raw);
                node.said = None;
            }
            [_, "stable", _, "epoch", _, "members", _, ..] => {
                node.said = Some((number(4), number(6) as usize));
                node.stable.push((number(2), number(4)));
                self.epoch = self.epoch.max(number(4));
                self.step = self.step.max(number(2));
            }
            [_, "applied", _, "at", at] => node.applied.push((number(2), at.parse().unwrap_or(0))),
            _ => {}
        }
    }

    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "it never came to be that {what}:\n{}", self.tail());
            let ended = self.nodes.values().find(|node| node.closed);
            assert!(ended.is_none(), "a launcher ended before {what}:\n{}", self.tail());
            self.go_on();
        }
    }

    /// Whether every rank has said that it is a member of the newest view, and that all are.
    fn is_whole(&self) -> bool {
        self.nodes.len() == NODES && self.nodes.values().all(|node| node.said == Some((self.epoch, NODES)))
    }

    fn until_whole(&mut self, after_epoch: u64) {
        self.until("all were members again", |cluster| cluster.epoch > after_epoch && cluster.is_whole());
    }

    fn tail(&self) -> String {
        self.seen[self.seen.len().saturating_sub(80)..].join("\n")
    }

    /// Kills these launchers before any of the others can have noticed.
    fn kill_at_once(&mut self, nodes: &[usize], restart: Option<Duration>) {
        nodes.iter().for_each(|&node| self.signal(node, Signal::KILL));
        nodes.iter().for_each(|&node| self.kill(node, restart));
    }

    /// Kills these launchers at once, and waits until all are members again.
    fn lose(&mut self, nodes: &[usize]) {
        let epoch = self.epoch;
        assert!(self.is_whole(), "a fault strikes a job that is whole:\n{}", self.tail());
        self.kill_at_once(nodes, Some(RESTART_AFTER));
        self.until_whole(epoch);
    }

    /// Waits for the end of all launchers.
    fn finish(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        while !self.nodes.values().all(|node| node.closed) {
            assert!(Instant::now() < deadline, "the job hangs:\n{}", self.tail());
            self.go_on();
        }
        let wait = |node: &mut Node| node.launcher.wait().expect("it is our child");
        let statuses = self.nodes.iter_mut().map(|(&number, node)| (number, wait(node))).collect();
        Ended { statuses, lines: std::mem::take(&mut self.seen) }
    }

    /// Lets it train to the end, and looks at the result.
    fn complete(self, mode: Mode) {
        set_pace(&self.pace(), u64::MAX);
        let passes = self.passes;
        let ended = self.finish();
        let lines = ended.lines.join("\n");
        assert!(ended.statuses.values().all(ExitStatus::success), "{:?}\n{lines}", ended.statuses);
        let complete: Vec<&str> =
            ended.lines.iter().map(String::as_str).filter(|line| line.contains("complete digest ")).collect();
        check(&complete, mode, passes);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in self.nodes.values_mut() {
            let _ = node.launcher.kill();
            let _ = node.launcher.wait();
        }
    }
}

struct Ended {
    statuses: BTreeMap<usize, ExitStatus>,
    lines: Vec<String>,
}

/// Whether a process is no more, or only waits for somebody to ask how it ended: in a container without an init that may
/// be for ever.
fn is_gone(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap_or_default();
    let is_zombie = status.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'));
    is_zombie || test_kill_process(pid).is_err()
}

// ---- losses ----

fn one_by_one() {
    let mut cluster = Cluster::start("slots", "1:4", 120, &[]);
    cluster.until("all were members", Cluster::is_whole);
    for lost in [&[2][..], &[0], &[1, 3], &[0]] {
        cluster.lose(lost);
    }
    cluster.complete(Mode::Slots);
}

fn chaos(mode: Mode) {
    let faults = number_from("PACELINE_CHAOS_FAULTS").unwrap_or(4);
    let seed = number_from("PACELINE_CHAOS_SEED").unwrap_or_else(|| Rng::new().u64(..));
    println!("PACELINE_CHAOS_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let part = if mode == Mode::Slots { "slots" } else { "shrink" };
    let mut cluster = Cluster::start(part, "1:4", 20 + 40 * faults, &[]);
    cluster.until("all were members", Cluster::is_whole);
    for _ in 0..faults {
        set_pace(&cluster.pace(), cluster.step / STEPS + 2);
        pause(&mut rng, 50);
        strike(&mut cluster, &mut rng);
    }
    cluster.complete(mode);
}

/// A fault and what follows from it, until all are members again.
fn strike(cluster: &mut Cluster, rng: &mut Rng) {
    let mut nodes: Vec<usize> = (0..NODES).collect();
    rng.shuffle(&mut nodes);
    match rng.u32(0..10) {
        0..4 => cluster.lose(&nodes[..1]),
        // Two of four with the lowest left are a quorum.
        4..6 => {
            nodes.retain(|&node| node != 0);
            cluster.lose(&nodes[..2]);
        }
        // Again while it comes in, or just after.
        6..8 => {
            let (node, epoch) = (nodes[0], cluster.epoch);
            cluster.kill(node, Some(RESTART_AFTER));
            cluster.until("another process had been started", |c| {
                c.nodes.get(&node).is_some_and(|node| node.rank.is_some())
            });
            pause(rng, 60);
            cluster.kill(node, Some(RESTART_AFTER));
            cluster.until_whole(epoch);
        }
        // Long enough to be removed, or not: what counts is what all say afterwards.
        _ => {
            cluster.signal(nodes[0], Signal::STOP);
            pause(rng, 1500);
            // What was said before it goes on counts for nothing.
            cluster.catch_up();
            cluster.nodes.values_mut().for_each(|node| node.said = None);
            cluster.signal(nodes[0], Signal::CONT);
            cluster.until("all were members again", Cluster::is_whole);
        }
    }
}

fn no_quorum() {
    let mut cluster = Cluster::start("slots", "1:4", 1_000_000, &[]);
    cluster.until("all were members", Cluster::is_whole);
    // One after the other they would leave a quorum each time.
    cluster.kill_at_once(&[0, 1], None);
    let ended = cluster.finish();
    for node in [2, 3] {
        assert_eq!(ended.statuses[&node].code(), Some(138), "{}", ended.lines.join("\n"));
    }
    let says = |line: &&String| line.contains("too few launchers are reachable");
    assert!(ended.lines.iter().filter(says).count() >= 2, "{}", ended.lines.join("\n"));
}

fn too_few() {
    let mut cluster = Cluster::start("slots", "2:4", 1_000_000, &["--rdzv-timeout", "30"]);
    cluster.until("all were members", Cluster::is_whole);
    for node in [3, 2, 1] {
        let epoch = cluster.epoch;
        cluster.kill(node, None);
        if node > 1 {
            cluster.until("the others went on", |cluster| cluster.epoch > epoch);
        }
    }
    let ended = cluster.finish();
    assert_eq!(ended.statuses[&0].code(), Some(138), "{}", ended.lines.join("\n"));
    let says = |line: &String| line.contains("1 nodes are left and at least 2 are to go on");
    assert!(ended.lines.iter().any(says), "{}", ended.lines.join("\n"));
}

fn fixed_program() {
    let cluster = Cluster::start("fixed", "1:4", 0, &["--rdzv-timeout", "30"]);
    let ended = cluster.finish();
    let says = |line: &&String| line.contains("no world: ") && line.contains("give --nnodes one number");
    assert!(ended.lines.iter().filter(says).count() > 0, "{}", ended.lines.join("\n"));
}

// ---- measuring ----

impl Node {
    /// When it had applied the first step that was reduced after that epoch: the first stable step of a later one is the
    /// one that its members began from.
    fn went_on(&self, epoch: u64) -> Option<u128> {
        let began = self.stable.iter().find(|(_, of)| *of > epoch)?.0;
        self.applied.iter().find(|(step, _)| *step == began + 1).map(|(_, at)| *at)
    }
}

/// From SIGKILL of a launcher, that of the lowest seat, which leads, and others in turn, to the next step that all three
/// other ranks have applied. Shrink mode, as for the ranks of one machine.
fn measure() {
    let kills = number_from("PACELINE_MEASURE_FAULTS").unwrap_or(20);
    let mut cluster = Cluster::start("large", "1:4", 0, &[]);
    cluster.until("all were members", |cluster| cluster.is_whole() && cluster.step > 10);
    let mut rng = Rng::with_seed(5);
    let (mut leader, mut others) = (Vec::new(), Vec::new());
    for kill in 0..kills {
        pause(&mut rng, 300);
        let victim = if kill % 2 == 0 { 0 } else { rng.usize(1..NODES) };
        let (epoch, at) = (cluster.epoch, now_us());
        cluster.signal(victim, Signal::KILL);
        cluster.kill(victim, Some(RESTART_AFTER));
        cluster.until("the others went on", |c| c.nodes.values().all(|n| n.went_on(epoch).is_some()));
        let last = cluster.nodes.values().filter_map(|node| node.went_on(epoch)).max();
        let elapsed_ms = (last.expect("three survivors") - at) as f64 / 1e3;
        if victim == 0 { &mut leader } else { &mut others }.push(elapsed_ms);
        cluster.until_whole(epoch);
        for node in cluster.nodes.values_mut() {
            node.stable.clear();
            node.applied.clear();
        }
    }
    print_times("SIGKILL of the leader's launcher", leader);
    print_times("SIGKILL of another launcher", others);
}
