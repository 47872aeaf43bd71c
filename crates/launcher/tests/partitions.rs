//! Networks that fall apart under a job whose membership may change: a launcher with one rank on each of several hosts, and
//! links between them that are cut, both ways and one way, and mended.
//!
//! What counts is the result, as in `elastic`; and that those who are enough go on without a restart, while the others
//! make no step and come back. Hosts are network namespaces (`paceline_testbed`), which takes root: `cargo xtask root`.
//! `PACELINE_CHAOS_FAULTS=50` adds so many partitions at random, `PACELINE_CHAOS_SEED` repeats their choices.

#![allow(clippy::print_stderr, clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod cluster;
mod job;
mod training;

use std::sync::LazyLock;

use cluster::{Cluster, Setup};
use fastrand::Rng;
use job::{Job, PACELINE, PATIENCE, now_us, trial};
use libtest_mimic::Trial;
use paceline_runtime::membership::Mode;
use paceline_testbed::{Bed, Faults, Plan, host_address};
use rustix::process::{Pid, Signal, kill_process};
use training::{STEPS, number_from, pause, set_pace, train};

/// The largest job here.
const HOSTS: usize = 5;

static BED: LazyLock<Bed> = LazyLock::new(|| {
    Bed::build(&Plan::relayed(HOSTS, Faults::default(), now_us() as u64)).expect("hosts can be made here")
});

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
    vec![
        trial("of_five_hosts_three_go_on_and_two_come_back_however_the_network_falls_apart", of_five),
        trial("of_four_hosts_the_half_with_the_lowest_goes_on_and_no_sample_is_lost", of_four),
        trial("with_a_lease_exactly_one_of_two_hosts_that_lose_each_other_goes_on", leased),
        trial("of_two_launchers_0_of_one_lease_that_never_meet_the_later_one_goes_on", deposed),
    ]
}

fn rank(part: &str, args: &[String]) {
    println!("process {} at {}", std::process::id(), now_us());
    match part {
        "slots" => train(Mode::Slots, args),
        "shrink" => train(Mode::Shrink, args),
        "sleep" => std::thread::sleep(PATIENCE),
        other => panic!("no part {other}"),
    }
}

/// A launcher on each of so many hosts.
fn start(nodes: usize, part: &'static str, passes: u64, more: &[&str]) -> Cluster {
    mend();
    let count = format!("1:{nodes}");
    let flags = ["--nnodes", &count].iter().chain(more).map(|&flag| flag.to_owned()).collect();
    let endpoint = format!("{}:29400", host_address(0));
    let on_node = Box::new(|node, program: &str| BED.on_host(node, program));
    let mut cluster = Cluster::start(Setup { nodes, endpoint, on_node, part, passes, flags, restarts: true });
    cluster.until("all were members", Cluster::is_whole);
    cluster
}

// ---- the network ----

fn cut(from: usize, to: usize) {
    BED.relay().expect("the bed has one").change(from, to, |faults| faults.cut = true);
}

/// Cuts all links between these hosts and the others.
fn split(some: &[usize], others: &[usize]) {
    some.iter().flat_map(|&a| others.iter().map(move |&b| (a, b))).for_each(|(a, b)| {
        cut(a, b);
        cut(b, a);
    });
}

fn mend() {
    BED.relay().expect("the bed has one").change_all(|faults| faults.cut = false);
}

// ---- what must come of it ----

/// How long a part of the network is cut off.
#[derive(Clone, Copy)]
enum Until {
    /// The others have gone on.
    OthersGoOn,
    /// Its launchers have given up, too.
    TheyGiveUp,
}

/// `some` are enough to go on without `others`, who come back afterwards.
fn partition(cluster: &mut Cluster, some: &[usize], others: &[usize], until: Until) {
    let (epoch, before) = (cluster.epoch, cluster.processes(some));
    split(some, others);
    cluster.gave_up.clear();
    cluster.until("those who are enough had gone on", |c| c.went_on(some, epoch));
    let step = cluster.step;
    cluster.until("they had made steps", |c| c.step >= step + STEPS);
    if let Until::TheyGiveUp = until {
        cluster.until("the others had given up", |c| others.iter().all(|node| c.gave_up.contains(node)));
    }
    cluster.catch_up();
    let gone_on = others.iter().filter(|node| {
        let said = cluster.nodes.get(node).and_then(|node| node.said);
        said.is_some_and(|(of, _)| of > epoch)
    });
    assert_eq!(gone_on.count(), 0, "those who are too few go on:\n{}", cluster.tail());
    mend();
    cluster.until_whole(epoch);
    assert_eq!(before, cluster.processes(some), "a survivor was started again:\n{}", cluster.tail());
}

/// What these say does not reach those, who hear nobody of them and are heard.
fn one_way(cluster: &mut Cluster, from: &[usize], to: &[usize], all: usize) {
    let epoch = cluster.epoch;
    from.iter().for_each(|&a| to.iter().for_each(|&b| cut(a, b)));
    cluster.until("somebody had been left out", |c| c.epoch > epoch);
    let step = cluster.step;
    cluster.until("the others had made steps", |c| c.step >= step + STEPS);
    mend();
    let epoch = cluster.epoch;
    cluster.until("all were members again", |c| c.epoch >= epoch && c.is_whole());
    assert_eq!(cluster.nodes.len(), all);
}

fn of_five() {
    let more = number_from("PACELINE_CHAOS_FAULTS").unwrap_or(0);
    let mut cluster = start(HOSTS, "slots", 150 + 60 * more, &[]);
    partition(&mut cluster, &[0, 1, 2], &[3, 4], Until::OthersGoOn);
    // Node 0, where the others meet, among those who are too few.
    partition(&mut cluster, &[1, 2, 4], &[0, 3], Until::TheyGiveUp);
    one_way(&mut cluster, &[1], &[3], HOSTS);
    one_way(&mut cluster, &[0], &[1, 2, 3, 4], HOSTS);
    at_random(&mut cluster, HOSTS, more);
    cluster.complete(Mode::Slots);
}

fn of_four() {
    let more = number_from("PACELINE_CHAOS_FAULTS").unwrap_or(0);
    let mut cluster = start(4, "shrink", 120 + 60 * more, &[]);
    partition(&mut cluster, &[0, 1], &[2, 3], Until::OthersGoOn);
    partition(&mut cluster, &[0, 3], &[1, 2], Until::OthersGoOn);
    one_way(&mut cluster, &[2, 3], &[0, 1], 4);
    at_random(&mut cluster, 4, more);
    cluster.complete(Mode::Shrink);
}

/// Either may win; never do both.
fn leased() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("lease").to_string_lossy().into_owned();
    let more = number_from("PACELINE_CHAOS_FAULTS").unwrap_or(0);
    let mut cluster = start(2, "slots", 60 + 40 * more, &["--lease", &file]);
    for _ in 0..2 + more / 4 {
        let epoch = cluster.epoch;
        let before = [0, 1].map(|node| cluster.processes(&[node]));
        split(&[0], &[1]);
        cluster.until("one had gone on", |c| (0..2).any(|node| c.went_on(&[node], epoch)));
        let winner = (0..2).find(|&node| cluster.went_on(&[node], epoch)).expect("just found");
        let step = cluster.step;
        cluster.until("it had made steps", |c| c.step >= step + STEPS);
        cluster.catch_up();
        let other = cluster.nodes.get(&(1 - winner)).and_then(|node| node.said);
        assert!(other.is_none_or(|(of, _)| of <= epoch), "both go on:\n{}", cluster.tail());
        mend();
        cluster.until_whole(epoch);
        assert_eq!(before[winner], cluster.processes(&[winner]), "it was started again:\n{}", cluster.tail());
    }
    one_way(&mut cluster, &[0], &[1], 2);
    one_way(&mut cluster, &[1], &[0], 2);
    cluster.complete(Mode::Slots);
}

/// Ranks that all start again after a change. Each host has a launcher 0, and could be enough alone.
fn deposed() {
    mend();
    split(&[0], &[1]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("lease").to_string_lossy().into_owned();
    let endpoint = format!("{}:29400", host_address(0));
    let nodes = ["--nnodes", "1:2", "--max-restarts", "3", "--rdzv-backend", "c10d"];
    let meeting =
        ["--rdzv-conf", "is_host=true,last_call_timeout=1", "--rdzv-endpoint", &endpoint, "--insecure"];
    let flags = [&nodes[..], &meeting, &["--lease", &file]].concat();
    let start = |host| {
        let mut job = Job::start_elsewhere(BED.on_host(host, PACELINE), 1, &flags, &[], "sleep", &[]);
        job.wait_for("process ", 1);
        job
    };
    let first = start(0);
    let second = start(1);
    let first = first.finish();
    let reason = format!("may not go on: another launcher 0 has taken the lease ({file})");
    assert!(first.lines.iter().any(|line| line.contains(&reason)), "{}", first.lines.join("\n"));
    assert_eq!(first.status.code(), Some(1), "nobody is asked to start it again");
    kill_process(Pid::from_child(&second.launcher), Signal::TERM).expect("it goes on");
    let second = second.finish();
    assert_eq!((second.status.code(), second.lines_with("process ").len()), (Some(143), 1));
    mend();
}

fn at_random(cluster: &mut Cluster, hosts: usize, partitions: u64) {
    let seed = number_from("PACELINE_CHAOS_SEED").unwrap_or_else(|| Rng::new().u64(..));
    println!("PACELINE_CHAOS_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    for _ in 0..partitions {
        set_pace(&cluster.pace(), cluster.step / STEPS + 2);
        pause(&mut rng, 50);
        let mut nodes: Vec<usize> = (0..hosts).collect();
        rng.shuffle(&mut nodes);
        // Half of four are enough with the lowest.
        if let Some(at) = nodes.iter().position(|&node| node == 0).filter(|_| hosts.is_multiple_of(2)) {
            nodes.swap(0, at);
        }
        let enough = rng.usize(hosts.div_ceil(2)..hosts);
        let (some, others) = nodes.split_at(enough);
        match rng.u32(0..8) {
            0 => partition(cluster, some, others, Until::TheyGiveUp),
            1..5 => partition(cluster, some, others, Until::OthersGoOn),
            5 => one_way(cluster, some, others, hosts),
            6 => one_way(cluster, others, some, hosts),
            _ => one_way(cluster, &nodes[..1], &nodes[1..2], hosts),
        }
    }
}
