//! The behaviour list between hosts, over links that are sound, slow, lossy, broken and mended.
//!
//! Hosts are network namespaces (`paceline_testbed`), which takes root. Where it is missing one line says so, and every
//! test counts as ignored. `cargo test` leaves this suite out; `cargo xtask root` and CI run it.

#![allow(clippy::print_stderr, clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod job;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use job::sockets::Socket;
use job::{Finished, Job, PACELINE, now_us, trial};
use libtest_mimic::Trial;
use paceline_runtime::World;
use paceline_runtime::collectives::{Communicator, Config, Error, ReduceOp};
use paceline_testbed::{
    Bed, Faults, Plan, Relay, SWITCH_ADDRESS, SWITCH_ADDRESS_V6, host_address, host_address_v6,
};
use paceline_testing::{ALL, Behaviour};

/// What carries data between hosts: each of them runs the whole suite.
const LINKS: &[&str] = &["quic", "tls"];

/// The largest world of the behaviour list but one: five ranks on two processors show nothing about hosts.
const HOSTS: usize = 4;

/// Thousands of operations each; a world of 3 is the smallest that has all their cases.
const LONG: &[&str] =
    &["every_collective_is_right_for_every_dtype_and_op", "rings_are_right_too", "halving_is_right_too"];

/// The behaviours that run over bad links too: those that move much, that wait for each other, and that end badly.
const OVER_BAD_LINKS: &[&str] = &[
    "sums_have_the_same_bits_whatever_the_segments",
    "long_messages_pass_in_both_directions_at_once",
    "started_operations_run_in_order_and_give_their_buffers_back",
    "another_collective_is_a_mismatch_on_every_rank",
    "an_orderly_leave_is_not_a_loss",
    "what_was_sent_before_leaving_arrives",
    "a_rank_that_drops_its_communicator_is_lost",
    "a_split_outlives_its_parent",
];

/// The worlds of those.
const OVER_BAD_LINKS_RANKS: [usize; 2] = [2, 4];

/// A link that is cut for good must be noticed by itself, without any deadline of the program: QUIC gives a silent peer
/// up after 10 s, and the news must get around.
const NOTICED: Duration = Duration::from_secs(13);

/// Joined by the kernel alone.
static SOUND: LazyLock<Bed> = LazyLock::new(|| build(&Plan::clean(HOSTS, 1500)));

/// Joined by the kernel alone, with jumbo frames.
static JUMBO: LazyLock<Bed> = LazyLock::new(|| build(&Plan::clean(2, 9000)));

/// Joined by a relay whose faults each test sets.
static RELAYED: LazyLock<Bed> = LazyLock::new(|| {
    let seed = std::env::var("PACELINE_TEST_SEED")
        .map_or_else(|_| now_us() as u64, |text| text.parse().expect("PACELINE_TEST_SEED is a number"));
    eprintln!("PACELINE_TEST_SEED={seed} begins with the same chances");
    build(&Plan::relayed(HOSTS, Faults::default(), seed))
});

fn build(plan: &Plan) -> Bed {
    Bed::build(plan).expect("hosts can be made here")
}

fn main() {
    let missing = match std::env::args().nth(1).as_deref() {
        Some("as-rank") => None,
        _ => paceline_testbed::missing(),
    };
    if let Some(reason) = &missing {
        println!("skipped, all of it: {reason}");
    }
    let ignored = missing.is_some();
    job::main(rank, || trials().into_iter().map(|trial| trial.with_ignored_flag(ignored)).collect());
}

fn trials() -> Vec<Trial> {
    for name in LONG.iter().chain(OVER_BAD_LINKS) {
        assert!(ALL.iter().any(|behaviour| behaviour.name == *name), "no behaviour is called {name}");
    }
    let mut trials = Vec::new();
    for &links in LINKS {
        trials.extend(over_sound_links(links));
        trials.extend(over_jumbo_frames(links));
        for (name, faults) in bad_links() {
            trials.extend(over_bad_links(links, name, faults));
        }
        let over = |name: &str, test: fn(&str)| trial(format!("{name}::over_{links}"), move || test(links));
        trials.extend([
            over("a_link_that_is_cut_for_300_ms_fails_no_operation", cut_for_a_moment),
            over("a_host_that_is_cut_off_is_named_by_all_without_any_deadline", |links| {
                cut_for_good(links, &[], NOTICED);
            }),
            over("a_host_that_is_cut_off_is_named_by_all_within_the_deadline", |links| {
                // A second for the news to get around, and one for a busy machine.
                cut_for_good(links, &["--timeout", "2"], Duration::from_secs(4));
            }),
            over("a_link_that_is_open_one_way_only_is_noticed_by_all", half_open),
            over("a_path_that_swallows_long_packets_does_not_hang_anybody", black_hole),
            over("a_slow_receiver_holds_up_its_sender_in_bounded_memory", slow_receiver),
            over("a_link_with_a_rate_keeps_it", keeps_its_rate),
            over("a_host_that_is_frozen_for_a_moment_is_not_lost", frozen_for_a_moment),
        ]);
    }
    trials.extend(["tls", "tcp"].map(|links| {
        let name = "connections_that_are_reset_are_made_again_and_no_operation_fails";
        trial(format!("{name}::over_{links}"), move || reset(links))
    }));
    let has_ipv6 = paceline_testbed::has_ipv6();
    trials.extend(
        LINKS.iter().flat_map(|links| over_ipv6(links)).map(|trial| trial.with_ignored_flag(!has_ipv6)),
    );
    trials.push(trial("links_over_two_interfaces_take_both::over_tls", two_interfaces));
    trials.push(trial("a_bed_whose_process_is_killed_leaves_nothing_behind", killed_owner));
    trials
}

/// Every behaviour of several ranks, a host for each; and of four ranks on two hosts.
fn over_sound_links(links: &'static str) -> Vec<Trial> {
    let one_each = ALL.iter().flat_map(|behaviour| {
        let worlds: &[usize] = if LONG.contains(&behaviour.name) { &[3] } else { &[2, 4] };
        // A behaviour of one size has it for a reason.
        let worlds = if behaviour.world_sizes.len() == 1 { behaviour.world_sizes } else { worlds };
        worlds.iter().map(move |&ranks| (behaviour, ranks, 1))
    });
    let two_each = ALL.iter().filter(|behaviour| behaviour.world_sizes.contains(&4));
    one_each
        .chain(two_each.map(|behaviour| (behaviour, 4, 2)))
        .map(|(behaviour, ranks, ranks_per_host)| {
            let hosts = ranks / ranks_per_host;
            let name = format!("{}::on_{ranks}_ranks_of_{hosts}_hosts_over_{links}", behaviour.name);
            trial(name, move || {
                play(&SOUND, links, ranks, ranks_per_host, &[], behaviour.name).assert_success();
            })
        })
        .collect()
}

/// Batches of segments that are six times as long.
fn over_jumbo_frames(links: &'static str) -> Vec<Trial> {
    let heavy = ALL.iter().filter(|behaviour| behaviour.heavy);
    heavy
        .map(|behaviour| {
            trial(format!("{}::on_2_hosts_over_{links}_with_jumbo_frames", behaviour.name), move || {
                play(&JUMBO, links, 2, 1, &[], behaviour.name).assert_success();
            })
        })
        .collect()
}

/// What moves much, over IPv6 alone; and what an interface's choice and a longer header change.
fn over_ipv6(links: &'static str) -> Vec<Trial> {
    let heavy = ALL.iter().filter(|behaviour| behaviour.heavy);
    let mut trials: Vec<Trial> = heavy
        .map(|behaviour| {
            trial(format!("{}::on_2_hosts_over_{links}_and_ipv6", behaviour.name), move || {
                play(&SOUND, links, 2, 1, &["--rdzv-endpoint", &endpoint_v6()], behaviour.name)
                    .assert_success();
            })
        })
        .collect();
    trials.push(trial(format!("an_interface_of_another_family_has_the_links::over_{links}"), move || {
        interface_of_another_family(links);
    }));
    if links == "quic" {
        trials.push(trial("datagrams_fill_a_jumbo_frame_over_ipv4_and_ipv6", full_frames));
    }
    trials
}

fn endpoint_v6() -> String {
    format!("[{SWITCH_ADDRESS_V6}]:0")
}

/// The ranks meet over IPv4.
fn interface_of_another_family(links: &str) {
    let finished = play(&SOUND, links, 2, 1, &["--interface", "eth*:ipv6,switch:ipv6"], "sockets");
    finished.assert_success();
    for rank in 0..2 {
        let (links_of, others): (Vec<Socket>, Vec<Socket>) =
            finished.sockets(rank).into_iter().partition(|socket| socket.local.ip() == host_address_v6(rank));
        // A door, and over TLS a link of two connections.
        assert_eq!(links_of.len(), if links == "tls" { 3 } else { 1 }, "rank {rank}: {links_of:?}");
        let to_launcher = |socket: &Socket| socket.is_tcp && socket.remote.ip() == SWITCH_ADDRESS;
        assert!(others.len() == 1 && to_launcher(&others[0]), "rank {rank}: {others:?}");
    }
}

/// The header of IPv6 is longer, so the same frame holds less; and what does not fit is lost.
fn full_frames() {
    let bed = build(&Plan { mtu: 9000, ..Plan::relayed(2, Faults::default(), 0) });
    let relay = bed.relay().expect("it was built with one");
    for flags in [&[][..], &["--rdzv-endpoint", &endpoint_v6()]] {
        relay.clear_counts();
        let running = Reducing::start_on(&bed, "quic", 2, flags);
        let deadline = Instant::now() + job::PATIENCE;
        while relay.counts().longest < 9000 {
            assert!(Instant::now() < deadline, "{flags:?}: the frames are not full: {}", relay.counts());
            std::thread::yield_now();
        }
        running.end().assert_success();
    }
}

/// What may be wrong with all links, the launcher's included.
fn bad_links() -> [(&'static str, Faults); 4] {
    let sound = Faults::default();
    [
        ("losing_1_percent", Faults { loss: 0.01, ..sound }),
        ("of_50_ms", Faults { delay: Duration::from_millis(50), ..sound }),
        ("that_reorder_5_percent", Faults { reorder: 0.05, ..sound }),
        ("that_duplicate_5_percent", Faults { duplicate: 0.05, ..sound }),
    ]
}

fn over_bad_links(links: &'static str, which: &'static str, faults: Faults) -> Vec<Trial> {
    let chosen = ALL.iter().filter(|behaviour| OVER_BAD_LINKS.contains(&behaviour.name));
    // A round of an algorithm moves one segment: in pieces of 64 bytes a few kilobytes take half a minute at 50 ms.
    let is_quick = |behaviour: &&Behaviour| {
        faults.delay.is_zero() || (behaviour.config)().segment_bytes >= Config::default().segment_bytes
    };
    let chosen = chosen.filter(is_quick);
    let with_ranks = |behaviour: &'static Behaviour| {
        let ranks = OVER_BAD_LINKS_RANKS.into_iter().filter(|ranks| behaviour.world_sizes.contains(ranks));
        ranks.map(move |ranks| (behaviour, ranks))
    };
    chosen
        .flat_map(with_ranks)
        .map(|(behaviour, ranks)| {
            let name = format!("{}::on_{ranks}_hosts_over_{links}_links_{which}", behaviour.name);
            trial(name, move || {
                let relay = relay_with(faults);
                play(&RELAYED, links, ranks, 1, &[], behaviour.name).assert_success();
                let counts = relay.counts();
                assert!(counts.arrived > 0, "the packets went another way");
                // Of a few packets none may be hit.
                let hit = counts.lost + counts.late + counts.duplicated;
                let is_hit = !behaviour.heavy || !faults.delay.is_zero() || hit > 0;
                assert!(is_hit, "no packet had a fault: {counts}");
            })
        })
        .collect()
}

/// Runs a job whose ranks are on the bed's hosts and whose launcher is at the switch.
fn play(bed: &Bed, links: &str, ranks: usize, ranks_per_host: usize, flags: &[&str], part: &str) -> Finished {
    start(bed, links, ranks, ranks_per_host, flags, part, &[]).finish()
}

fn start(
    bed: &Bed,
    links: &str,
    ranks: usize,
    ranks_per_host: usize,
    flags: &[&str],
    part: &str,
    args: &[&str],
) -> Job {
    let endpoint = format!("{SWITCH_ADDRESS}:0");
    let mut launcher = bed.on_switch(PACELINE);
    launcher.env("PACELINE_FABRIC", links);
    let meeting =
        if flags.contains(&"--rdzv-endpoint") { vec![] } else { vec!["--rdzv-endpoint", &endpoint] };
    let flags = [&["--grace", "1"], &meeting[..], flags].concat();
    Job::start_elsewhere(launcher, ranks, &flags, &bed.rank_words(ranks_per_host), part, args)
}

/// The links, all with the same faults, and nothing counted yet.
fn relay_with(faults: Faults) -> &'static Relay {
    let relay = RELAYED.relay().expect("it was built with one");
    relay.change_all(|now| *now = faults);
    relay.clear_counts();
    relay
}

/// A link between two of three hosts is cut for a moment in a loop of all_reduce.
fn cut_for_a_moment(links: &str) {
    let relay = relay_with(Faults::default());
    let running = Reducing::start(links, &[]);
    relay.cut(0, 1);
    std::thread::sleep(Duration::from_millis(300));
    relay.heal(0, 1);
    assert!(relay.counts().cut > 0, "nothing was sent in that time");
    // It ends by one more all_reduce of all three.
    running.end().assert_success();
}

/// Hosts with two interfaces each: half of what is sent goes over the second.
fn two_interfaces() {
    let bed = build(&Plan { interfaces: 2, ..Plan::clean(2, 1500) });
    let both = ["--interface", "eth0,switch+eth1,switch1"];
    play(&bed, "tls", 2, 1, &both, "timed").assert_success();
    let sent = |device: &str| {
        let output = bed.on_host(0, "cat").arg("/proc/net/dev").output().expect("cat runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix(&format!("{device}:")));
        // Eight numbers about what was received stand before it.
        let bytes = line.and_then(|line| line.split_whitespace().nth(8)?.parse::<usize>().ok());
        bytes.unwrap_or_else(|| panic!("{device} is not in this list:\n{text}"))
    };
    for device in ["eth0", "eth1"] {
        let half = TIMED_BYTES / 2;
        assert!(
            (half * 9 / 10..half * 12 / 10).contains(&sent(device)),
            "{} bytes over {device}",
            sent(device)
        );
    }
    // And everything else that links are for.
    for behaviour in ["long_messages_pass_in_both_directions_at_once", "a_split_outlives_its_parent"] {
        play(&bed, "tls", 2, 1, &both, behaviour).assert_success();
    }
    let output = play(&bed, "quic", 2, 1, &both, "timed");
    assert!(output.lines.iter().any(|line| line.contains("links over several interfaces are TLS's")));
}

/// How often the connections of a running job are reset.
const RESETS: usize = 20;

/// The kernels of three hosts reset the connections between the ranks again and again in a loop of all_reduce, as something
/// in between does that has forgotten them.
fn reset(links: &str) {
    relay_with(Faults::default());
    let flags: &[&str] = if links == "tcp" { &["--insecure"] } else { &[] };
    let running = Reducing::start(links, flags);
    let mut killed = 0;
    for turn in 0..RESETS {
        // From one side, from the other, and from both at the same time.
        let (host, peer) = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)][turn % 6];
        let pairs = if turn % 4 == 3 { vec![(host, peer), (peer, host)] } else { vec![(host, peer)] };
        let resets: Vec<_> = pairs.iter().map(|&(host, peer)| reset_connections(host, peer)).collect();
        for reset in resets {
            let output = reset.wait_with_output().expect("ss runs");
            killed += String::from_utf8_lossy(&output.stdout).matches("ESTAB").count();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let finished = running.end();
    finished.assert_success();
    assert!(killed >= RESETS, "only {killed} connections were reset");
    let again = finished.lines.iter().filter(|line| line.contains("a connection was made again")).count();
    let all = finished.lines.join("\n");
    assert!(again >= RESETS, "{killed} connections were reset and {again} made again:\n{all}");
}

/// Has the kernel of `host` reset its connections to `peer`. Both see that: one as aborted, one as reset.
fn reset_connections(host: usize, peer: usize) -> Child {
    let mut ss = RELAYED.on_host(host, "ss");
    ss.args(["--kill", "--tcp", "--numeric", "dst", &host_address(peer).to_string()]);
    ss.stdout(Stdio::piped()).spawn().expect("ss runs")
}

/// Host 2 loses its links to the other hosts for good, but not that to the launcher.
fn cut_for_good(links: &str, flags: &[&str], within: Duration) {
    let relay = relay_with(Faults::default());
    let running = Reducing::start(links, flags);
    let since_us = now_us();
    relay.cut(0, 2);
    relay.cut(1, 2);
    running.assert_all_fail(since_us, within, &[&[2], &[2], &[0, 1, 2]]);
}

/// Host 0 hears host 1, and host 1 does not hear host 0. Host 1 gives host 0 up, which may learn that from host 2.
fn half_open(links: &str) {
    let relay = relay_with(Faults::default());
    let running = Reducing::start(links, &[]);
    let since_us = now_us();
    relay.change(0, 1, |faults| faults.cut = true);
    running.assert_all_fail(since_us, NOTICED, &[&[0, 1], &[0], &[0, 1]]);
}

/// Packets of the length that was found to pass vanish from now on, as when a tunnel comes into the way.
fn black_hole(links: &str) {
    let relay = relay_with(Faults::default());
    let running = Reducing::start(links, &[]);
    let deadline = Instant::now() + job::PATIENCE;
    while relay.counts().longest < 1400 {
        assert!(Instant::now() < deadline, "no packet of the path's length: {:?}", relay.counts());
        std::thread::yield_now();
    }
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
        relay.change(from, to, |faults| faults.largest = Some(1300));
    }
    // QUIC finds out which length passes (RFC 8899). TCP does not unless the host is set to
    // (net.ipv4.tcp_mtu_probing): the connections are exchanged for some with short segments.
    running.end().assert_success();
    assert!(relay.counts().too_large > 0, "no packet was too long");
}

/// Whoever sends must wait for a receiver that is busy, and not hold what it has not taken.
fn slow_receiver(links: &str) {
    relay_with(Faults::default());
    play(&RELAYED, links, 2, 1, &[], "slow").assert_success();
}

/// A host that does nothing for a moment, as one whose memory is being swapped, is not lost.
fn frozen_for_a_moment(links: &str) {
    relay_with(Faults::default());
    let running = Reducing::start(links, &[]);
    let pid = running.pids[1].clone();
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &pid]).status().expect("kill runs").success());
    };
    signal("-STOP");
    std::thread::sleep(Duration::from_millis(1500));
    signal("-CONT");
    running.end().assert_success();
}

/// Three hosts in a loop of all_reduce.
struct Reducing {
    job: Job,
    pids: Vec<String>,
    folder: tempfile::TempDir,
}

impl Reducing {
    /// Starts them and waits until they have begun.
    fn start(links: &str, flags: &[&str]) -> Self {
        Self::start_on(&RELAYED, links, 3, flags)
    }

    /// The same on so many hosts of this bed.
    fn start_on(bed: &Bed, links: &str, hosts: usize, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_str().expect("the system's folder for such has a simple name").to_owned();
        let mut job = start(bed, links, hosts, 1, flags, "reduce", &[&path]);
        let mut lines = job.wait_for("reduces in process ", hosts);
        // "[2] rank 2 reduces in process 1234"
        lines.sort();
        let pids =
            lines.iter().map(|line| line.rsplit(' ').next().expect("it has words").to_owned()).collect();
        Self { job, pids, folder }
    }

    /// Has them make one more all_reduce and end.
    fn end(self) -> Finished {
        fs::write(self.folder.path().join("end"), "").expect("the folder is ours");
        self.job.finish()
    }

    /// Each rank fails within that time, and puts it down to nobody but those ranks. A rank that the others gave up says
    /// that it was itself.
    fn assert_all_fail(self, since_us: u128, within: Duration, reasons: &[&[usize]]) {
        let finished = self.job.finish();
        let all = finished.lines.join("\n");
        for (rank, allowed) in reasons.iter().enumerate() {
            let start = format!("rank {rank} failed at ");
            let line = finished.lines.iter().find_map(|line| line.split_once(&start)).map(|(_, rest)| rest);
            let line = line.unwrap_or_else(|| panic!("rank {rank} has not failed:\n{all}"));
            let mut words = line.split(' ');
            let at_us: u128 = words.next().and_then(|at| at.parse().ok()).expect("the time");
            let named = words.next().expect("the ranks").split(',').map(|rank| rank.parse().expect("a rank"));
            let named: Vec<usize> = named.collect();
            assert!(named.iter().all(|rank| allowed.contains(rank)), "rank {rank} names {named:?}:\n{all}");
            let took = Duration::from_micros(at_us.saturating_sub(since_us) as u64);
            assert!(took < within, "rank {rank} failed after {took:?}:\n{all}");
        }
    }
}

/// 100 Mbit/s are 100 Mbit/s, whoever holds the packets back.
fn keeps_its_rate(links: &str) {
    let rate = Some(100_000_000);
    let by_kernel = Plan { rate, ..Plan::clean(2, 1500) };
    let by_relay = Plan::relayed(2, Faults { rate, ..Faults::default() }, 0);
    for plan in [by_kernel, by_relay] {
        let finished = play(&build(&plan), links, 2, 1, &[], "timed");
        finished.assert_success();
        let line = finished.lines_with("took ms: ")[0];
        let took_ms: u64 =
            line.rsplit(' ').next().and_then(|ms| ms.parse().ok()).expect("the line ends with it");
        let floor_ms = TIMED_BYTES as u64 * 8 * 1000 / 100_000_000;
        // What may be on its way at the start: a burst of tbf.
        assert!(took_ms > floor_ms * 9 / 10, "{TIMED_BYTES} bytes took {took_ms} ms with {plan:?}");
    }
}

/// A process that makes hosts and is killed leaves none behind, nor what ran on them.
fn killed_owner() {
    let mut owner = Command::new(std::env::current_exe().expect("a test has an executable"));
    let mut owner = owner.args(["as-rank", "owner"]).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    BufReader::new(owner.stdout.take().expect("it is piped")).read_line(&mut line).expect("it says where");
    let words: Vec<&str> = line.split_whitespace().collect();
    let &[file, guest] = words.as_slice() else { panic!("not a file and a process: {line:?}") };
    assert!(Path::new(file).exists() && Path::new(&format!("/proc/{guest}")).exists());
    owner.kill().expect("it runs");
    owner.wait().expect("it is our child");
    // The kernel takes namespaces down one after the other, and there may be many of other tests.
    let deadline = Instant::now() + Duration::from_secs(60);
    // An orphan stays a zombie until somebody reaps it.
    let lives =
        |pid: &str| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    while Path::new(file).exists() || lives(guest) {
        assert!(Instant::now() < deadline, "{file} or process {guest} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn rank(part: &str, args: &[String]) {
    match part {
        "owner" => own_hosts(),
        "reduce" => reduce_until_told(Path::new(&args[0])),
        "sockets" => join(Config::default(), say_sockets),
        "timed" => join(Config::default(), send_against_the_clock),
        "slow" => join(Config::default(), send_to_a_slow_receiver),
        _ => {
            let behaviour = ALL.iter().find(|one| one.name == part).expect("the name is in the list");
            join((behaviour.config)(), behaviour.run);
        }
    }
}

fn say_sockets(mut communicator: Communicator) {
    communicator.all_reduce(&mut [1.0f32; 100_000], ReduceOp::Sum).expect("all ranks call it");
    for socket in Socket::own() {
        println!("rank {} socket {socket}", communicator.rank());
    }
    communicator.leave().expect("both leave");
}

/// A second at 100 Mbit/s.
const TIMED_BYTES: usize = 12_500_000;

fn send_against_the_clock(mut communicator: Communicator) {
    let mut message = vec![1u8; TIMED_BYTES];
    let start = Instant::now();
    if communicator.rank() == 0 {
        communicator.send(&message, 1).expect("rank 1 receives");
    } else {
        communicator.recv(&mut message, 0).expect("rank 0 sends");
        println!("took ms: {}", start.elapsed().as_millis());
    }
    communicator.leave().expect("both leave");
}

/// Takes this process's place in its job.
fn join(config: Config, act: impl FnOnce(Communicator)) {
    let world = World::join_with(config).expect("all ranks are started");
    let (communicator, _membership) = world.into_parts();
    act(communicator);
}

/// Makes a host, starts a program on it, and waits to be killed.
fn own_hosts() {
    let bed = build(&Plan::clean(1, 1500));
    let mut guest = bed.on_host(0, "sleep").arg("600").spawn().expect("it starts");
    println!("{} {}", bed.host_file(0), guest.id());
    guest.wait().expect("it is our child");
}

/// 256 KiB of f32: long enough to fill the path, short enough for hundreds in a second.
const REDUCED: usize = 65_536;

/// Sums until the file `end` is in the folder; rank 0 looks, and the last element tells the others.
fn reduce_until_told(folder: &Path) {
    tracing_subscriber::fmt().with_writer(std::io::stdout).with_ansi(false).init();
    let mut world = World::join().expect("all ranks are started");
    let (rank, world_size) = (world.rank(), world.world_size());
    let expected = (world_size * (world_size + 1) / 2) as f32;
    for operation in 0.. {
        let ends = rank == 0 && folder.join("end").exists();
        let mut buffer = vec![rank as f32 + 1.0; REDUCED + 1];
        buffer[REDUCED] = f32::from(u8::from(ends));
        if let Err(error) = world.communicator().all_reduce(&mut buffer, ReduceOp::Sum) {
            println!("rank {rank} failed at {} {} in: {error}", now_us(), named(&error, rank));
            std::process::exit(1);
        }
        assert!(buffer[..REDUCED].iter().all(|&sum| sum == expected), "operation {operation}");
        if operation == 20 {
            println!("rank {rank} reduces in process {}", std::process::id());
        }
        if buffer[REDUCED] != 0.0 {
            return world.leave().expect("all ranks leave");
        }
    }
}

/// The ranks that an error is put down to, with commas between them.
fn named(error: &Error, own: usize) -> String {
    match error {
        Error::PeerLost { rank, .. } => rank.to_string(),
        Error::TimedOut { waiting_for, .. } if !waiting_for.is_empty() => {
            waiting_for.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
        }
        _ if error.to_string().contains("gave this rank up") => own.to_string(),
        _ => panic!("neither PeerLost nor TimedOut with a name, nor given up: {error}"),
    }
}

/// What a sender may hold of what the receiver has not taken: windows and socket buffers, of which the largest has 4 MiB.
const HELD_BYTES: u64 = 32 << 20;

fn send_to_a_slow_receiver(mut communicator: Communicator) {
    let message: Vec<i32> = (0..16 << 20).collect();
    if communicator.rank() == 0 {
        let before = peak_bytes();
        communicator.send(&message, 1).expect("rank 1 receives");
        let held = peak_bytes() - before;
        assert!(held < HELD_BYTES, "the sender has taken {held} bytes more");
    } else {
        let before = peak_bytes();
        std::thread::sleep(Duration::from_secs(2));
        let mut received = vec![0; message.len()];
        communicator.recv(&mut received, 0).expect("rank 0 sends");
        assert!(received == message);
        let held = peak_bytes().saturating_sub(before + 4 * message.len() as u64);
        assert!(held < HELD_BYTES, "the receiver has taken {held} bytes more");
    }
    communicator.leave().expect("both leave");
}

/// The most memory this process has had at any time.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the line is there");
    let kib: u64 = line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number");
    kib * 1024
}
