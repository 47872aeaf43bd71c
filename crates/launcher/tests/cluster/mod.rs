//! Launchers with a rank each, on this machine or on hosts of a test bed, and the supervisor that starts again what was
//! killed, as a pod's controller would.

#![allow(dead_code, reason = "each test uses a part of this")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use paceline_runtime::membership::Mode;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;

use crate::job::{PACELINE, PATIENCE};
use crate::training::{check_of, set_pace};

/// When the supervisor starts again what has ended.
pub const RESTART_AFTER: Duration = Duration::from_secs(1);

/// The exit code that asks for a restart.
const START_AGAIN: i32 = 138;

/// A command that runs that program on the machine of that node.
pub type OnNode = Box<dyn Fn(usize, &str) -> Command>;

/// What a cluster is to be.
pub struct Setup {
    /// Launchers, with one rank each.
    pub nodes: usize,
    /// Where node 0 is reached.
    pub endpoint: String,
    /// See [`OnNode`].
    pub on_node: OnNode,
    /// What the ranks are.
    pub part: &'static str,
    /// How often they go through the samples.
    pub passes: u64,
    /// Flags of all launchers besides.
    pub flags: Vec<String>,
    /// Whether a launcher that ends with the code that asks for a restart gets one.
    pub restarts: bool,
}

/// A line of a node's output, or its end.
type Line = (usize, u32, Option<String>);

pub struct Node {
    launcher: Child,
    /// Counts the processes.
    pub life: u32,
    /// The process of its rank, and how many there have been under this launcher.
    pub rank: Option<Pid>,
    pub ranks: u32,
    /// The epoch and the number of members that its rank has named last.
    pub said: Option<(u64, usize)>,
    /// The steps that it has said to be stable, with their epochs, and those that it has applied, with the time in
    /// microseconds; since the last fault.
    pub stable: Vec<(u64, u64)>,
    pub applied: Vec<(u64, u128)>,
    /// Whether its output is at its end.
    closed: bool,
}

/// Launchers and their supervisor.
pub struct Cluster {
    folder: TempDir,
    setup: Setup,
    pub nodes: BTreeMap<usize, Node>,
    /// Nodes that are down, and when they are started again.
    down: BTreeMap<usize, Option<Instant>>,
    /// Nodes whose launchers have asked for a restart, since this was emptied.
    pub gave_up: BTreeSet<usize>,
    lives: u32,
    sender: Sender<Line>,
    lines: Receiver<Line>,
    seen: Vec<String>,
    pub step: u64,
    pub epoch: u64,
}

pub struct Ended {
    pub statuses: BTreeMap<usize, ExitStatus>,
    pub lines: Vec<String>,
}

impl Cluster {
    pub fn start(setup: Setup) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let secret = folder.path().join("secret");
        fs::write(&secret, "b1946ac92492d2347c6235b4d2611184").expect("written");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("changed");
        let (sender, lines) = channel();
        let (nodes, down) = (BTreeMap::new(), BTreeMap::new());
        let count = setup.nodes;
        let mut cluster = Self {
            folder,
            setup,
            nodes,
            down,
            gave_up: BTreeSet::new(),
            lives: 0,
            sender,
            lines,
            seen: Vec::new(),
            step: 0,
            epoch: 0,
        };
        (0..count).for_each(|node| cluster.launch(node));
        cluster
    }

    pub fn pace(&self) -> PathBuf {
        self.folder.path().join("pace")
    }

    fn size(&self) -> usize {
        self.setup.nodes
    }

    fn launch(&mut self, node: usize) {
        let Setup { on_node, endpoint, flags, part, passes, .. } = &self.setup;
        let mut command = on_node(node, PACELINE);
        command.args(["run", "-n", "1", "--bind", "none", "--max-restarts", "1000"]);
        command.args(["--rdzv-endpoint", endpoint, "--node-rank", &node.to_string(), "--job-secret"]);
        command.arg(self.folder.path().join("secret")).args(flags).arg("--");
        command.arg(std::env::current_exe().expect("a test has an executable"));
        command.args(["as-rank", part, &passes.to_string()]).arg(self.pace());
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
        let (stable, applied) = (Vec::new(), Vec::new());
        let node_of =
            Node { launcher, life, rank: None, ranks: 0, said: None, stable, applied, closed: false };
        self.nodes.insert(node, node_of);
    }

    /// Kills the launcher, and sees that nothing of it is left.
    pub fn kill(&mut self, node: usize, restart: Option<Duration>) {
        let mut killed = self.nodes.remove(&node).expect("it runs");
        killed.launcher.kill().expect("it is our child");
        killed.launcher.wait().expect("it is our child");
        await_end(node, killed.rank);
        self.down.insert(node, restart.map(|after| Instant::now() + after));
    }

    /// Starts one that was killed for good.
    pub fn start_again(&mut self, node: usize) {
        self.down.insert(node, Some(Instant::now()));
    }

    pub fn signal(&self, node: usize, signal: Signal) {
        let pid = Pid::from_raw(self.nodes[&node].launcher.id() as i32).expect("a process");
        kill_process(pid, signal).expect("it is our child");
    }

    /// Signals the rank of a node and not its launcher.
    pub fn signal_rank(&self, node: usize, signal: Signal) {
        // Fails when it has just ended by itself.
        let _ = self.nodes[&node].rank.map(|rank| kill_process(rank, signal));
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
    pub fn catch_up(&mut self) {
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
            None => self.close(node, life),
        }
    }

    fn close(&mut self, number: usize, life: u32) {
        let Some(node) = self.nodes.get_mut(&number).filter(|node| node.life == life) else { return };
        node.closed = true;
        let asks = |status: ExitStatus| status.code() == Some(START_AGAIN);
        if self.setup.restarts && asks(node.launcher.wait().expect("it is our child")) {
            await_end(number, node.rank);
            self.nodes.remove(&number);
            self.gave_up.insert(number);
            self.down.insert(number, Some(Instant::now() + RESTART_AFTER));
        }
    }

    fn read(&mut self, node: usize, life: u32, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap_or(0);
        let Some(node) = self.nodes.get_mut(&node).filter(|node| node.life == life) else { return };
        match words[..] {
            [_, "process", pid, ..] => {
                node.rank = pid.parse().ok().and_then(Pid::from_raw);
                node.ranks += 1;
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

    pub fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "it never came to be that {what}:\n{}", self.tail());
            let ended = self.nodes.values().find(|node| node.closed);
            assert!(ended.is_none(), "a launcher ended before {what}:\n{}", self.tail());
            self.go_on();
        }
    }

    /// Whether the ranks of these nodes, and no others, have said that they are the members of a view after that epoch.
    pub fn went_on(&self, nodes: &[usize], epoch: u64) -> bool {
        nodes.iter().all(|node| self.is_member_of(*node, epoch, nodes.len()))
    }

    fn is_member_of(&self, node: usize, after_epoch: u64, members: usize) -> bool {
        let said = self.nodes.get(&node).and_then(|node| node.said);
        said.is_some_and(|(epoch, of)| epoch > after_epoch && of == members)
    }

    /// Whether every rank has said that it is a member of the newest view, and that all are.
    pub fn is_whole(&self) -> bool {
        let size = self.size();
        self.nodes.len() == size && self.nodes.values().all(|node| node.said == Some((self.epoch, size)))
    }

    pub fn until_whole(&mut self, after_epoch: u64) {
        self.until("all were members again", |cluster| cluster.epoch > after_epoch && cluster.is_whole());
    }

    pub fn tail(&self) -> String {
        self.seen[self.seen.len().saturating_sub(120)..].join("\n")
    }

    /// Kills these launchers before any of the others can have noticed.
    pub fn kill_at_once(&mut self, nodes: &[usize], restart: Option<Duration>) {
        nodes.iter().for_each(|&node| self.signal(node, Signal::KILL));
        nodes.iter().for_each(|&node| self.kill(node, restart));
    }

    /// Kills these launchers at once, and waits until all are members again, the others as the same processes.
    pub fn lose(&mut self, nodes: &[usize]) {
        let epoch = self.epoch;
        assert!(self.is_whole(), "a fault strikes a job that is whole:\n{}", self.tail());
        let others: Vec<usize> = (0..self.size()).filter(|node| !nodes.contains(node)).collect();
        let before = self.processes(&others);
        self.kill_at_once(nodes, Some(RESTART_AFTER));
        self.until_whole(epoch);
        assert_eq!(before, self.processes(&others), "a survivor was started again:\n{}", self.tail());
    }

    /// The launchers of these nodes and their ranks, by their numbers: those that are the same afterwards have not been
    /// started again.
    pub fn processes(&self, nodes: &[usize]) -> Vec<(u32, u32)> {
        nodes.iter().map(|node| self.nodes.get(node).map_or((0, 0), |node| (node.life, node.ranks))).collect()
    }

    /// Waits for the end of all launchers, for as long as they do something.
    pub fn finish(mut self) -> Ended {
        let (mut lines, mut last) = (0, Instant::now());
        while !self.nodes.values().all(|node| node.closed) {
            assert!(last.elapsed() < PATIENCE, "the job hangs:\n{}", self.tail());
            self.go_on();
            if self.seen.len() > lines {
                (lines, last) = (self.seen.len(), Instant::now());
            }
        }
        let wait = |node: &mut Node| node.launcher.wait().expect("it is our child");
        let statuses = self.nodes.iter_mut().map(|(&number, node)| (number, wait(node))).collect();
        self.nodes.iter().for_each(|(&number, node)| await_end(number, node.rank));
        Ended { statuses, lines: std::mem::take(&mut self.seen) }
    }

    /// Lets it train to the end, and looks at the result.
    pub fn complete(self, mode: Mode) {
        set_pace(&self.pace(), u64::MAX);
        let (passes, size) = (self.setup.passes, self.size());
        let ended = self.finish();
        let lines = ended.lines.join("\n");
        assert!(ended.statuses.values().all(ExitStatus::success), "{:?}\n{lines}", ended.statuses);
        let complete: Vec<&str> =
            ended.lines.iter().map(String::as_str).filter(|line| line.contains("complete digest ")).collect();
        check_of(size, &complete, mode, passes);
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

/// No rank outlives its launcher.
fn await_end(node: usize, rank: Option<Pid>) {
    let deadline = Instant::now() + PATIENCE;
    while rank.is_some_and(|rank| !is_gone(rank)) {
        assert!(Instant::now() < deadline, "the rank of node {node} outlives its launcher");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process is no more, or only waits for somebody to ask how it ended: in a container without an init that may
/// be for ever.
fn is_gone(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap_or_default();
    let is_zombie = status.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'));
    is_zombie || test_kill_process(pid).is_err()
}
