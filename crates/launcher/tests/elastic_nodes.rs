//! Launchers that are killed and frozen while their workers train: four of them on this machine, with a rank each, which
//! know each other by the job secret and the endpoint alone. A supervisor starts again what was killed.
//!
//! What counts is the result, as in `elastic`. `PACELINE_CHAOS_FAULTS=1000` sets the number of faults at random moments
//! (`cargo xtask chaos`), `PACELINE_CHAOS_SEED` repeats a run's choices.

#![allow(clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod cluster;
mod job;
mod training;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

use cluster::{Cluster, Node, RESTART_AFTER, Setup};
use fastrand::Rng;
use job::{now_us, trial};
use paceline_runtime::membership::Mode;
use rustix::process::Signal;
use training::{COMPUTING, STEPS, large, number_from, pause, print_times, set_pace, train};

fn main() {
    job::main(rank, || {
        let mut trials = vec![
            trial("the_loss_of_any_launcher_and_of_two_at_once_changes_no_bit_of_the_result", one_by_one),
            trial(
                "chaos::launchers_lost_and_frozen_at_random_change_no_bit_of_the_result_with_slots",
                || chaos(Mode::Slots),
            ),
            trial("chaos::every_sample_is_used_once_in_each_pass_whichever_launcher_is_lost", || {
                chaos(Mode::Shrink)
            }),
            trial("with_a_lease_either_of_two_launchers_is_lost_and_the_other_goes_on", leased),
            trial("a_lease_that_is_damaged_ends_the_job_with_a_line_that_says_so", damaged_lease),
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
        "large" => large(Duration::ZERO),
        "computing" => large(COMPUTING),
        "fixed" => match paceline_runtime::World::join() {
            Ok(_) => println!("a world"),
            Err(error) => println!("no world: {error}"),
        },
        other => panic!("no part {other}"),
    }
}

/// How many launchers there are, with one rank each.
const NODES: usize = training::RANKS;

/// A port that stays free while nobody has it: below those from which connections are made, which a launcher that
/// dials node 0 in vain might be given.
fn free_endpoint() -> SocketAddr {
    let mut ports = std::iter::repeat_with(|| fastrand::u16(20_000..32_000));
    let free = ports.find_map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok());
    free.and_then(|listener| listener.local_addr().ok()).expect("one of them is free")
}

/// Four launchers of this machine.
fn start(part: &'static str, nnodes: &str, passes: u64, more: &[&str]) -> Cluster {
    start_of(NODES, part, nnodes, passes, more)
}

fn start_of(nodes: usize, part: &'static str, nnodes: &str, passes: u64, more: &[&str]) -> Cluster {
    let flags = ["--nnodes", nnodes].iter().chain(more).map(|&flag| flag.to_owned()).collect();
    let (endpoint, on_node) =
        (free_endpoint().to_string(), Box::new(|_, program: &str| Command::new(program)));
    Cluster::start(Setup { nodes, endpoint, on_node, part, passes, flags, restarts: false })
}

// ---- losses ----

fn one_by_one() {
    let mut cluster = start("slots", "1:4", 120, &[]);
    cluster.until("all were members", Cluster::is_whole);
    for lost in [&[2][..], &[0], &[1, 3], &[0]] {
        cluster.lose(lost);
    }
    cluster.complete(Mode::Slots);
}

/// Whichever of two is lost, the other goes on by itself.
fn leased() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("lease").to_string_lossy().into_owned();
    let mut cluster = start_of(2, "slots", "1:2", 80, &["--fence", "lease", "--lease", &file]);
    cluster.until("both were members", Cluster::is_whole);
    for lost in [1, 0, 0] {
        let (epoch, other) = (cluster.epoch, [1 - lost]);
        let before = cluster.processes(&other);
        cluster.kill(lost, None);
        cluster.until("the other had gone on", |cluster| cluster.went_on(&other, epoch));
        let step = cluster.step;
        cluster.until("it had made steps", |cluster| cluster.step > step + STEPS);
        cluster.start_again(lost);
        cluster.until_whole(epoch);
        assert_eq!(before, cluster.processes(&other), "the survivor was started again");
    }
    cluster.complete(Mode::Slots);
}

/// A lease that nobody can use any more.
fn damaged_lease() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("lease");
    let flags = ["--lease", &file.to_string_lossy()];
    let mut cluster = start_of(2, "slots", "1:2", 1_000_000, &flags);
    cluster.until("both were members", Cluster::is_whole);
    std::fs::write(&file, "paceline-lease 1 half of a").expect("written");
    cluster.kill(0, None);
    let ended = cluster.finish();
    assert_eq!(ended.statuses[&1].code(), Some(138), "{}", ended.lines.join("\n"));
    let says = |line: &String| line.contains("it is damaged; remove it when no launcher of the job runs");
    assert!(ended.lines.iter().any(says), "{}", ended.lines.join("\n"));
}

/// The numbers of faults by their kinds.
type Tally = BTreeMap<&'static str, u64>;

fn chaos(mode: Mode) {
    let faults = number_from("PACELINE_CHAOS_FAULTS").unwrap_or(6);
    let seed = number_from("PACELINE_CHAOS_SEED").unwrap_or_else(|| Rng::new().u64(..));
    println!("PACELINE_CHAOS_SEED={seed}");
    let (mut rng, started) = (Rng::with_seed(seed), Instant::now());
    let part = if mode == Mode::Slots { "slots" } else { "shrink" };
    let mut cluster = start(part, "1:4", 100 + 12 * faults, &[]);
    cluster.until("all were members", Cluster::is_whole);
    let mut tally = Tally::new();
    while tally.values().sum::<u64>() < faults {
        set_pace(&cluster.pace(), cluster.step / STEPS + 2);
        pause(&mut rng, 50);
        let (kind, struck) = strike(&mut cluster, &mut rng);
        *tally.entry(kind).or_default() += struck;
    }
    cluster.complete(mode);
    println!("four launchers, {mode:?}, {:.0} s: {tally:?}", started.elapsed().as_secs_f64());
}

/// A fault and what follows from it, until all are members again. Says what it was, and how many they were.
fn strike(cluster: &mut Cluster, rng: &mut Rng) -> (&'static str, u64) {
    let mut nodes: Vec<usize> = (0..NODES).collect();
    rng.shuffle(&mut nodes);
    let (node, epoch) = (nodes[0], cluster.epoch);
    match rng.u32(0..16) {
        0..3 => {
            cluster.lose(&[node]);
            ("launcher killed", 1)
        }
        3..5 => {
            cluster.lose(&[0]);
            ("leader's launcher killed", 1)
        }
        // Two of four with the lowest left are a quorum.
        5..8 => {
            nodes.retain(|&node| node != 0);
            cluster.lose(&nodes[..2]);
            ("two launchers killed at once", 2)
        }
        // Again while it comes in, or just after.
        8..11 => {
            cluster.kill(node, Some(RESTART_AFTER));
            cluster.until("another process had been started", |c| {
                c.nodes.get(&node).is_some_and(|node| node.rank.is_some())
            });
            pause(rng, 60);
            cluster.kill(node, Some(RESTART_AFTER));
            cluster.until_whole(epoch);
            ("launcher killed, and again while joining", 2)
        }
        11 => {
            let before = cluster.processes(&[node]);
            cluster.signal_rank(node, Signal::KILL);
            cluster.until("there was another process", |cluster| cluster.processes(&[node]) != before);
            cluster.until_whole(epoch);
            ("rank killed under its launcher", 1)
        }
        12 => {
            let rest: Vec<usize> = nodes[1..].to_vec();
            cluster.kill(node, None);
            cluster.until("the others had gone on", |cluster| cluster.went_on(&rest, epoch));
            cluster.start_again(node);
            cluster.until_whole(epoch);
            ("launcher killed, and joining later", 1)
        }
        // Long enough to be removed, or not: what counts is what all say afterwards.
        which => {
            let whole = which < 15;
            let signal = |cluster: &Cluster, signal| match whole {
                true => cluster.signal(node, signal),
                false => cluster.signal_rank(node, signal),
            };
            signal(cluster, Signal::STOP);
            pause(rng, 1500);
            // What was said before it goes on counts for nothing.
            cluster.catch_up();
            cluster.nodes.values_mut().for_each(|node| node.said = None);
            signal(cluster, Signal::CONT);
            cluster.until("all were members again", Cluster::is_whole);
            (if whole { "launcher frozen" } else { "rank frozen" }, 1)
        }
    }
}

fn no_quorum() {
    let mut cluster = start("slots", "1:4", 1_000_000, &[]);
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
    let mut cluster = start("slots", "2:4", 1_000_000, &["--rdzv-timeout", "30"]);
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
    let cluster = start("fixed", "1:4", 0, &["--rdzv-timeout", "30"]);
    let ended = cluster.finish();
    let says = |line: &&String| line.contains("no world: ") && line.contains("give --nnodes one number");
    assert!(ended.lines.iter().filter(says).count() > 0, "{}", ended.lines.join("\n"));
}

// ---- measuring ----

/// When a node had applied the first step that was reduced after that epoch: the first stable step of a later one is the
/// one that its members began from.
fn went_on(node: &Node, epoch: u64) -> Option<u128> {
    let began = node.stable.iter().find(|(_, of)| *of > epoch)?.0;
    node.applied.iter().find(|(step, _)| *step == began + 1).map(|(_, at)| *at)
}

/// From SIGKILL of a launcher, that of the lowest seat, which leads, and others in turn, to the next step that all three
/// other ranks have applied. Shrink mode, as for the ranks of one machine, and as there once with steps that compute.
fn measure() {
    let kills = number_from("PACELINE_MEASURE_FAULTS").unwrap_or(20);
    measure_part("large", "", kills);
    measure_part("computing", &format!(", {} ms of computing", COMPUTING.as_millis()), kills);
}

fn measure_part(part: &'static str, suffix: &str, kills: u64) {
    let mut cluster = start(part, "1:4", 0, &[]);
    cluster.until("all were members", |cluster| cluster.is_whole() && cluster.step > 10);
    let mut rng = Rng::with_seed(5);
    let (mut leader, mut others) = (Vec::new(), Vec::new());
    for kill in 0..kills {
        pause(&mut rng, 300);
        let victim = if kill % 2 == 0 { 0 } else { rng.usize(1..NODES) };
        let (epoch, at) = (cluster.epoch, now_us());
        cluster.signal(victim, Signal::KILL);
        cluster.kill(victim, Some(RESTART_AFTER));
        cluster.until("the others went on", |c| c.nodes.values().all(|n| went_on(n, epoch).is_some()));
        let last = cluster.nodes.values().filter_map(|node| went_on(node, epoch)).max();
        let elapsed_ms = (last.expect("three survivors") - at) as f64 / 1e3;
        if victim == 0 { &mut leader } else { &mut others }.push(elapsed_ms);
        cluster.until_whole(epoch);
        for node in cluster.nodes.values_mut() {
            node.stable.clear();
            node.applied.clear();
        }
    }
    print_times(&format!("SIGKILL of the leader's launcher{suffix}"), leader);
    print_times(&format!("SIGKILL of another launcher{suffix}"), others);
}
