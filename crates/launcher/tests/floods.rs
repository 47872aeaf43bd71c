//! Floods at every port of a running job of two nodes: refused in bounded memory and few lines, and the job goes on.

#![allow(clippy::print_stderr, reason = "ranks talk to the test by their output")]

mod job;

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use job::process::Process;
use job::{Finished, Job, PATIENCE, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use paceline_testing::strangers;
use tempfile::TempDir;

const NODES: usize = 2;
const RANKS_PER_NODE: usize = 2;
const RANKS: usize = NODES * RANKS_PER_NODE;

/// What a process may grow by while it is attacked. The limits that lead to it are in docs/configuration.md: handshakes at
/// a time and what each may leave with us, above all.
const GROWTH_KIB: u64 = 48 * 1024;

/// Lines about refusals that a process may write in a second: 20 about connections, and some about launchers.
const LINES_PER_SECOND: usize = 30;

/// How much garbage is sent in all, in bytes.
const GARBAGE: usize = 1_000_000_000;

/// How many handshakes are begun at the rendezvous, at each port over UDP, and at all ranks' ports over TCP.
const HALF_OPEN: usize = 10_000;

/// Connections that are held open at a time; a test may have some 1000 files.
const HELD: usize = 400;

/// The longest UDP payload that is not cut into pieces on an Ethernet.
const LONGEST_DATAGRAM: usize = 1472;

fn main() {
    job::main(rank, || {
        let on = |fabric: &'static str| {
            let over = |name: &str, test: fn(&str)| trial(format!("{name}::{fabric}"), move || test(fabric));
            [
                over("a_gigabyte_of_garbage_is_refused_in_bounded_memory_and_the_job_goes_on", garbage),
                over(
                    "ten_thousand_half_open_handshakes_at_each_port_cost_little_memory_and_the_job_goes_on",
                    half_open,
                ),
            ]
        };
        let keeps_out = "ten_thousand_half_open_handshakes_at_the_rendezvous_keep_no_node_out";
        ["quic", "tls"].into_iter().flat_map(on).chain([trial(keeps_out, late_node_in_a_flood)]).collect()
    });
}

/// Two launchers that know each other by a secret, and what their ranks do.
struct Nodes {
    folder: TempDir,
    endpoint: SocketAddr,
}

impl Nodes {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let secret = folder.path().join("secret");
        fs::write(&secret, "b1946ac92492d2347c6235b4d2611184").expect("written");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("changed");
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        Self { folder, endpoint: free.expect("a free port") }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("text").to_owned()
    }

    fn start(&self, node: usize, fabric: &str, part: &str) -> Job {
        let (node, nodes, each) = (node.to_string(), NODES.to_string(), RANKS_PER_NODE.to_string());
        let (endpoint, secret) = (self.endpoint.to_string(), self.path("secret"));
        let flags = [
            ["--nnodes", &nodes],
            ["--node-rank", &node],
            ["--rdzv-endpoint", &endpoint],
            ["--nproc-per-node", &each],
            ["--job-secret", &secret],
            ["--fabric", fabric],
            ["--bind", "none"],
        ];
        // Ranks of one machine: they are to use what ranks of several would.
        let variables = [("PACELINE_SHARED_MEMORY", "off")];
        Job::launch(flags.as_flattened(), &variables, part, &[&self.path("")])
    }
}

/// A job in a loop of all_reduce, its processes, and when the attack began.
struct Victim {
    nodes: Nodes,
    jobs: Vec<Job>,
    processes: Vec<Process>,
    began: Instant,
    operations: u64,
}

impl Victim {
    fn start(fabric: &str) -> Self {
        let nodes = Nodes::new();
        let mut jobs: Vec<Job> = (0..NODES).map(|node| nodes.start(node, fabric, "loop")).collect();
        let lines = jobs.iter_mut().flat_map(|job| job.wait_for(" looping as ", RANKS_PER_NODE));
        let mut processes: Vec<Process> = lines.map(|line| Process::of_line(&line)).collect();
        processes.extend(jobs.iter().map(|job| Process::look(job.launcher.id().to_string())));
        let operations = operations_after(&nodes, 0);
        Self { nodes, jobs, processes, began: Instant::now(), operations }
    }

    /// The ranks' ports over UDP.
    fn over_udp(&self) -> Vec<SocketAddr> {
        self.processes.iter().flat_map(|process| process.udp.clone()).collect()
    }

    /// The ranks' ports over TCP, without the rendezvous.
    fn over_tcp(&self) -> Vec<SocketAddr> {
        let all = self.processes.iter().flat_map(|process| process.tcp.clone());
        all.filter(|addr| addr.port() != self.nodes.endpoint.port()).collect()
    }

    /// Waits until the job has gone on, ends it, and checks what the attack has done to it.
    fn end(self) -> Vec<Finished> {
        let Self { nodes, jobs, processes, began, operations: before } = self;
        let now = operations_after(&nodes, before);
        for process in &processes {
            let grown = process.grown_kib();
            assert!(grown < GROWTH_KIB, "process {} has grown by {grown} KiB", process.pid);
        }
        fs::write(nodes.path("stop"), "").expect("the folder can be written");
        let finished: Vec<Finished> = jobs.into_iter().map(Job::finish).collect();
        // A second of theirs begins when something was refused: at both ends there is one that is not whole.
        let seconds = began.elapsed().as_secs() as usize + 2;
        let about_refusals = |finished: &Finished| {
            finished.assert_success();
            assert_eq!(finished.lines_with("looped well").len(), RANKS_PER_NODE);
            finished.lines.iter().filter(|line| line.contains("refused")).count()
        };
        let lines: usize = finished.iter().map(about_refusals).sum();
        let limit = LINES_PER_SECOND * processes.len() * seconds;
        assert!(lines <= limit, "{lines} lines about refusals in {seconds} s");
        eprintln!("{lines} lines about refusals in {seconds} s, {} operations", now - before);
        finished
    }
}

/// How many operations the job has made; waits until they are more than `before`.
fn operations_after(nodes: &Nodes, before: u64) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(nodes.path("operations"));
        if let Some(count) = text.ok().and_then(|text| text.parse().ok()).filter(|&count| count > before) {
            return count;
        }
        assert!(Instant::now() < deadline, "the job makes no operation");
        thread::sleep(Duration::from_millis(10));
    }
}

fn garbage(fabric: &str) {
    let victim = Victim::start(fabric);
    let (over_udp, mut over_tcp) = (victim.over_udp(), victim.over_tcp());
    over_tcp.push(victim.nodes.endpoint);
    assert_eq!(over_udp.is_empty(), fabric == "tls", "ports over UDP");
    let bytes = strangers::garbage(1, 16 << 20);
    let each = if over_udp.is_empty() { GARBAGE } else { GARBAGE / 2 };
    thread::scope(|scope| {
        scope.spawn(|| send_datagrams(&bytes, &over_udp, each));
        scope.spawn(|| send_streams(&bytes, &over_tcp, each));
    });
    let count = |finished: &[Finished], text: &str| {
        let about = |finished: &Finished| finished.lines.iter().filter(|line| line.contains(text)).count();
        finished.iter().map(about).sum::<usize>()
    };
    let finished = victim.end();
    assert!(count(&finished, "does not speak TLS") > 0, "nothing was said about garbage over TCP");
    assert_eq!(count(&finished, "refused datagrams"), 0, "a datagram without the knock came in");
}

/// Sends datagrams of all lengths to the ports in turn, `amount` bytes in all. What the host has no room for is lost.
fn send_datagrams(garbage: &[u8], to: &[SocketAddr], amount: usize) {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback has free ports");
    let (mut sent, mut at) = (0, 0);
    for (number, &addr) in (0_usize..).zip(to.iter().cycle()) {
        let len = number * 7919 % LONGEST_DATAGRAM + 1;
        at = if at + len > garbage.len() { 0 } else { at };
        // A full socket buffer drops datagrams, which is all right here.
        let _ = socket.send_to(&garbage[at..at + len], addr);
        (sent, at) = (sent + len, at + len);
        if sent >= amount {
            return;
        }
    }
}

/// Writes to one connection after the other for as long as it takes anything, `amount` bytes in all.
fn send_streams(garbage: &[u8], to: &[SocketAddr], amount: usize) {
    let deadline = Instant::now() + PATIENCE;
    let (mut sent, mut at) = (0, 0);
    for addr in to.iter().cycle() {
        assert!(Instant::now() < deadline, "{sent} of {amount} bytes could be sent");
        let Ok(mut stream) = TcpStream::connect_timeout(addr, Duration::from_secs(1)) else { continue };
        stream.set_write_timeout(Some(Duration::from_secs(1))).expect("a time");
        while sent < amount {
            at = if at + 65_536 > garbage.len() { 0 } else { at };
            match stream.write(&garbage[at..at + 65_536]) {
                Ok(count) => (sent, at) = (sent + count, at + count),
                // Refused in the middle.
                Err(_) => break,
            }
        }
        if sent >= amount {
            return;
        }
    }
}

fn half_open(fabric: &str) {
    let victim = Victim::start(fabric);
    let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback has free ports");
    let over_udp = victim.over_udp();
    if !over_udp.is_empty() {
        for (number, datagram) in strangers::initial_datagrams(HALF_OPEN).iter().enumerate() {
            for addr in &over_udp {
                // A full socket buffer drops datagrams, which is all right here.
                let _ = socket.send_to(datagram, addr);
            }
            // But not most of them: the ranks are to see them.
            if number % 50 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
    let always = || true;
    begin_handshakes(&[victim.nodes.endpoint], HALF_OPEN, &always);
    let over_tcp = victim.over_tcp();
    if !over_tcp.is_empty() {
        begin_handshakes(&over_tcp, HALF_OPEN, &always);
    }
    victim.end();
}

/// Begins handshakes with the ports in turn and goes on with none: of members, of launchers, and some that say nothing.
/// Stops after `count`, and not before `enough`. The last [`HELD`] stay open.
fn begin_handshakes(to: &[SocketAddr], count: usize, enough: &dyn Fn() -> bool) {
    let mut hellos = strangers::client_hellos(100, strangers::OVER_TCP);
    hellos.extend(strangers::client_hellos(100, strangers::BOOTSTRAP));
    hellos.extend(vec![Vec::new(); 50]);
    let mut held = std::collections::VecDeque::new();
    for (number, addr) in to.iter().cycle().enumerate() {
        if number >= count && enough() {
            return;
        }
        // Refused or not answered: either is all right.
        let Ok(mut stream) = TcpStream::connect_timeout(addr, Duration::from_millis(100)) else { continue };
        let _ = stream.write_all(&hellos[number % hellos.len()]);
        held.push_back(stream);
        if held.len() > HELD {
            held.pop_front();
        }
    }
}

fn late_node_in_a_flood() {
    let nodes = Nodes::new();
    let mut first = nodes.start(0, "tls", "sum");
    first.wait_for("waiting for node 1 to come to", 1);
    let launcher = Process::look(first.launcher.id().to_string());
    let met = AtomicBool::new(false);
    let flooding = AtomicBool::new(false);
    let finished = thread::scope(|scope| {
        scope.spawn(|| {
            begin_handshakes(&[nodes.endpoint], 1000, &|| true);
            flooding.store(true, Ordering::Relaxed);
            begin_handshakes(&[nodes.endpoint], HALF_OPEN, &|| met.load(Ordering::Relaxed));
        });
        while !flooding.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
        let mut second = nodes.start(1, "tls", "sum");
        second.wait_for("has the sum 10", RANKS_PER_NODE);
        met.store(true, Ordering::Relaxed);
        let grown = launcher.grown_kib();
        assert!(grown < GROWTH_KIB, "the launcher has grown by {grown} KiB");
        fs::write(nodes.path("stop"), "").expect("the folder can be written");
        [first, second].map(Job::finish)
    });
    finished.iter().for_each(Finished::assert_success);
}

fn rank(part: &str, args: &[String]) {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let mut world = World::join().expect("all ranks are started");
    let rank = world.rank();
    let folder = Path::new(&args[0]);
    match part {
        "loop" => eprintln!("rank {rank} looping as {}", std::process::id()),
        _ => {
            let mut buffer = [rank as f32 + 1.0];
            world.communicator().all_reduce(&mut buffer, ReduceOp::Sum).expect("the job goes on");
            eprintln!("rank {rank} has the sum {}", buffer[0]);
        }
    }
    reduce_until_told(&mut world, folder);
    world.leave().expect("all ranks leave");
    eprintln!("rank {rank} looped well");
}

/// Sums until the file `stop` is in the folder; rank 0 looks, and notes in the file `operations` how many they were.
fn reduce_until_told(world: &mut World, folder: &Path) {
    let rank = world.rank();
    let mut stop = [0.0f32];
    for operation in 1_u64.. {
        let mut buffer = vec![rank as f32 + 1.0; 100_000];
        world.communicator().all_reduce(&mut buffer, ReduceOp::Sum).expect("the job goes on");
        let expected = (RANKS * (RANKS + 1) / 2) as f32;
        assert!(buffer.iter().all(|&sum| sum == expected), "a sum is wrong");
        if rank == 0 {
            // In one step: whoever reads it finds the one number or the other.
            fs::write(folder.join("new"), operation.to_string()).expect("the folder can be written");
            fs::rename(folder.join("new"), folder.join("operations")).expect("the folder can be written");
            stop[0] = if folder.join("stop").exists() { 1.0 } else { 0.0 };
        }
        world.communicator().broadcast(&mut stop, 0).expect("the job goes on");
        if stop[0] != 0.0 {
            return;
        }
    }
}
