//! Workers that are killed and frozen while they train, as real processes under the launcher.
//!
//! What counts is the result: with slots the final state is that of a run that nobody disturbed, bit by bit; with a
//! shrinking membership every sample of every pass is used exactly once. `PACELINE_CHAOS_FAULTS=1000` sets the number of
//! faults of each mode, `PACELINE_CHAOS_SEED` repeats a run's choices.

#![allow(clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod job;
mod training;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fastrand::Rng;
use job::{Job, PATIENCE, now_us, trial};
use paceline_runtime::elastic::{self, End, Program, Stable, Stop, Tensor};
use paceline_runtime::membership::Mode;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use training::{
    COMPUTING, Model, RANKS, STEPS, check, config, large, number_from, pause, print_times, set_pace, train,
};

fn main() {
    job::main(rank, || {
        let mut trials = vec![
            trial("chaos::killed_and_frozen_workers_change_no_bit_of_the_result_with_slots", || {
                chaos(Mode::Slots)
            }),
            trial("chaos::every_sample_is_used_once_in_each_pass_whoever_is_killed", || chaos(Mode::Shrink)),
            trial("without_restarts_left_a_death_ends_the_job", out_of_restarts),
            trial(
                "before_the_training_all_start_again_and_within_it_the_lost_one_alone_on_one_account",
                one_account,
            ),
            trial(
                "a_newcomer_that_no_member_can_reach_is_left_out_and_the_others_go_on",
                unreachable_newcomer,
            ),
            trial(
                "a_worker_that_cannot_be_reached_from_the_start_is_replaced_and_the_others_go_on",
                unreachable_from_the_start,
            ),
            trial("a_worker_that_hangs_in_its_program_is_replaced_when_the_others_have_waited", hangs),
            trial("a_worker_that_is_asked_to_leave_goes_and_the_others_finish", leaves),
            trial("ranks_that_do_not_join_the_training_are_waited_for_no_longer_than_was_said", absent),
            trial("no_worker_outlives_a_launcher_that_is_killed", orphans),
            trial("when_all_workers_are_lost_the_launcher_says_so_and_asks_for_a_restart", all_lost),
        ];
        if std::env::var_os("PACELINE_MEASURE_FAULTS").is_some() {
            trials.push(trial("measure_how_long_survivors_take_after_a_kill", measure));
        }
        trials
    });
}

// ---- the program ----

fn rank(part: &str, args: &[String]) {
    println!("process {} at {}", std::process::id(), now_us());
    match part {
        "slots" => train(Mode::Slots, args),
        "shrink" => train(Mode::Shrink, args),
        "hang" => hang(args),
        "leave" => leave(args),
        "absent" if std::env::var("RANK").is_ok_and(|rank| rank == "2") => loop {
            std::thread::park();
        },
        "absent" => train(Mode::Slots, args),
        "late" => late(args),
        "unreachable" => unreachable(args),
        "unreachable-first" => unreachable_first(args),
        "large" => large(Duration::ZERO),
        "computing" => large(COMPUTING),
        other => panic!("no part {other}"),
    }
}

/// Rank 1 fails before anybody has joined, the first time that all start.
fn late(args: &[String]) {
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found == value);
    match (is("TORCHELASTIC_RESTART_COUNT", "0"), is("RANK", "1")) {
        (true, true) => std::process::exit(9),
        (true, false) => loop {
            std::thread::park();
        },
        (false, _) => train(Mode::Slots, args),
    }
}

/// The second process of rank 1 has another kind of links than the others.
fn unreachable(args: &[String]) {
    let is_second = is_rank_1() && !is_first_at(args, "first") && is_first_at(args, "second");
    train_beyond_reach_if(is_second, args);
}

/// The first one has.
fn unreachable_first(args: &[String]) {
    train_beyond_reach_if(is_rank_1() && is_first_at(args, "first"), args);
}

fn is_rank_1() -> bool {
    std::env::var("RANK").is_ok_and(|rank| rank == "1")
}

fn is_first_at(args: &[String], name: &str) -> bool {
    fs::File::create_new(Path::new(&args[1]).with_extension(name)).is_ok()
}

fn train_beyond_reach_if(is_beyond: bool, args: &[String]) {
    if !is_beyond {
        return train(Mode::Slots, args);
    }
    let program = std::env::current_exe().expect("a test has an executable");
    let error =
        Command::new(program).args(["as-rank", "slots"]).args(args).env("PACELINE_FABRIC", "quic").exec();
    panic!("{error}");
}

/// The first process of rank 1 stops in the middle of its third step, with all of its other threads alive.
fn hang(args: &[String]) {
    struct Hanging(Model, bool);

    impl Program for Hanging {
        type Gradient = f64;
        fn gradient_len(&self) -> usize {
            self.0.gradient_len()
        }
        fn state(&mut self) -> Vec<Tensor<'_>> {
            self.0.state()
        }
        fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
            if self.1 && self.0.steps[0] == 2 {
                loop {
                    std::thread::park();
                }
            }
            self.0.gradient(samples, gradient)
        }
        fn apply(&mut self, gradient: &[f64]) {
            self.0.apply(gradient);
        }
        fn stable(&mut self, stable: &Stable) {
            self.0.stable(stable);
        }
    }

    let is_first = || fs::File::create_new(Path::new(&args[1]).with_extension("hung")).is_ok();
    let hangs = std::env::var("RANK").is_ok_and(|rank| rank == "1") && is_first();
    let passes = args[0].parse().expect("a number of passes");
    let mut program = Hanging(Model::new(None), hangs);
    let end =
        elastic::train(&config(Mode::Slots, passes), &mut program).unwrap_or_else(|error| panic!("{error}"));
    // Its successor may come when the others are at the end.
    let is_successor = std::env::var("RANK").is_ok_and(|rank| rank == "1");
    if is_successor && end == End::Elsewhere {
        return;
    }
    assert_eq!(end, End::Complete);
    println!("complete digest {} least {passes} most {passes}", program.0.digest());
}

/// Rank 1 is asked to leave in the middle.
fn leave(args: &[String]) {
    struct Leaving(Model, Stop);

    impl Program for Leaving {
        type Gradient = f64;
        fn gradient_len(&self) -> usize {
            self.0.gradient_len()
        }
        fn state(&mut self) -> Vec<Tensor<'_>> {
            self.0.state()
        }
        fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
            self.0.gradient(samples, gradient)
        }
        fn apply(&mut self, gradient: &[f64]) {
            self.0.apply(gradient);
        }
        fn stable(&mut self, stable: &Stable) {
            self.0.stable(stable);
            if stable.step.0 == 5 && std::env::var("RANK").is_ok_and(|rank| rank == "1") {
                self.1.request();
            }
        }
    }

    let passes: u64 = args[0].parse().expect("a number of passes");
    let mut program = Leaving(Model::new(None), Stop::new());
    let stop = program.1.clone();
    match elastic::train_until(&config(Mode::Slots, passes), &mut program, &stop) {
        Ok(End::Complete) => println!("complete digest {} least {passes} most {passes}", program.0.digest()),
        end => println!("ended with {end:?}"),
    }
}

// ---- chaos ----

/// What the test knows of a job by its output.
struct Watch {
    job: Job,
    /// The process of each rank.
    pids: BTreeMap<usize, Pid>,
    /// The epoch and the number of members that the present process of each rank has named last.
    ranks: BTreeMap<usize, (u64, usize)>,
    step: u64,
    epoch: u64,
    members: usize,
}

impl Watch {
    fn new(job: Job) -> Self {
        Self { job, pids: BTreeMap::new(), ranks: BTreeMap::new(), step: 0, epoch: 0, members: 0 }
    }

    /// Reads until that is so; the training must not be over before.
    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "it never came to be that {what}:\n{}", self.tail());
            let Some(line) = self.job.next_line() else {
                panic!("the job ended before {what}:\n{}", self.tail());
            };
            self.read(&line);
        }
    }

    fn read(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap_or(0);
        let rank = || words[0].trim_matches(['[', ']', ':']).parse().expect("a rank");
        match words[..] {
            [_, "process", pid, ..] => {
                let pid = pid.parse().ok().and_then(Pid::from_raw).expect("a process");
                self.pids.insert(rank(), pid);
                self.ranks.remove(&rank());
            }
            [_, "stable", _, "epoch", _, "members", _, ..] => {
                self.ranks.insert(rank(), (number(4), number(6) as usize));
                if number(4) >= self.epoch {
                    (self.step, self.epoch) = (self.step.max(number(2)), number(4));
                    self.members = number(6) as usize;
                }
            }
            _ => {}
        }
    }

    fn tail(&self) -> String {
        let lines = &self.job.seen;
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    fn signal(&self, rank: usize, signal: Signal) {
        // Fails when it has just ended by itself.
        let _ = kill_process(self.pids[&rank], signal);
    }

    /// Whether the present process of every rank has said that it is a member of the newest view, and that all are.
    fn is_whole(&self) -> bool {
        let whole = |said: &(u64, usize)| *said == (self.epoch, RANKS);
        self.ranks.len() == RANKS && self.ranks.values().all(whole)
    }

    /// Until these have other processes: what all say before is of before, also that a frozen one has come back.
    fn until_replaced(&mut self, ranks: &[usize], before: &BTreeMap<usize, Pid>) {
        self.until("there were other processes", |w| ranks.iter().all(|rank| w.pids[rank] != before[rank]));
    }

    /// Until all are members again, in a later epoch, and make steps.
    fn until_whole(&mut self, after_epoch: u64) {
        self.until("all were members again", |w| w.epoch > after_epoch && w.is_whole());
    }
}

/// A fault and what follows from it, until all are members again. Says what it was, and how many they were.
fn strike(watch: &mut Watch, rng: &mut Rng) -> (&'static str, u64) {
    let mut ranks: Vec<usize> = (0..RANKS).collect();
    rng.shuffle(&mut ranks);
    let (epoch, before) = (watch.epoch, watch.pids.clone());
    assert!(watch.is_whole(), "a fault strikes a job that is whole:\n{}", watch.tail());
    let struck = match rng.u32(0..10) {
        0..5 => {
            watch.signal(ranks[0], Signal::KILL);
            watch.until_replaced(&ranks[..1], &before);
            watch.until_whole(epoch);
            ("killed", 1)
        }
        5..7 => {
            watch.signal(ranks[0], Signal::KILL);
            pause(rng, 40);
            watch.signal(ranks[1], Signal::KILL);
            watch.until_replaced(&ranks[..2], &before);
            watch.until_whole(epoch);
            ("two killed at once", 2)
        }
        7..9 => {
            let victim = watch.pids[&ranks[0]];
            watch.signal(ranks[0], Signal::KILL);
            let next = ranks[0];
            watch.until("there was another process", |w| w.pids[&next] != victim);
            pause(rng, 60);
            // While it comes in, or just after.
            watch.signal(next, Signal::KILL);
            let victim = watch.pids[&next];
            watch.until("there was a third process", |w| w.pids[&next] != victim);
            watch.until_whole(epoch);
            ("killed, and again while joining", 2)
        }
        _ => {
            watch.signal(ranks[0], Signal::STOP);
            pause(rng, 900);
            watch.signal(ranks[0], Signal::CONT);
            // What they say from now on: whoever was frozen too long is out, and has to come in again.
            watch.ranks.clear();
            watch.until("all were members again", Watch::is_whole);
            ("frozen", 1)
        }
    };
    let killed = match struck.0 {
        "frozen" => 0,
        "two killed at once" => 2,
        _ => 1,
    };
    let is_same = |rank: &usize| before[rank] == watch.pids[rank];
    assert!(ranks[killed..].iter().all(is_same), "a survivor was started again:\n{}", watch.tail());
    struck
}

fn chaos(mode: Mode) {
    let faults = number_from("PACELINE_CHAOS_FAULTS").unwrap_or(38);
    let seed = number_from("PACELINE_CHAOS_SEED").unwrap_or_else(|| Rng::new().u64(..));
    println!("PACELINE_CHAOS_SEED={seed}");
    let (mut rng, started) = (Rng::with_seed(seed), Instant::now());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let passes = 4 + 4 * faults;
    let part = if mode == Mode::Slots { "slots" } else { "shrink" };
    let mut watch = Watch::new(start(part, passes, &pace, "1000000"));
    watch.until("all were members", |w| w.is_whole() && w.step > 2);
    let mut tally = BTreeMap::<&str, u64>::new();
    while tally.values().sum::<u64>() < faults {
        set_pace(&pace, watch.step / STEPS + 2);
        pause(&mut rng, 50);
        let (kind, struck) = strike(&mut watch, &mut rng);
        *tally.entry(kind).or_default() += struck;
    }
    set_pace(&pace, u64::MAX);
    let finished = watch.job.finish();
    finished.assert_success();
    check(&finished.lines_with("complete digest "), mode, passes);
    println!("one launcher of four ranks, {mode:?}, {:.0} s: {tally:?}", started.elapsed().as_secs_f64());
}

fn start(part: &str, passes: u64, pace: &Path, restarts: &str) -> Job {
    let path = pace.to_string_lossy();
    Job::start(RANKS, &["--max-restarts", restarts], part, &[&passes.to_string(), &path])
}

// ---- the launcher's part ----

fn hangs() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let path = pace.to_string_lossy();
    let finished =
        Job::start(RANKS, &["--max-restarts", "1", "--timeout", "3"], "hang", &["4", &path]).finish();
    finished.assert_success();
    let replaced = finished.lines.iter().filter(|line| line.contains("takes its place"));
    assert_eq!(replaced.count(), 1, "{}", finished.lines.join("\n"));
    check(&finished.lines_with("complete digest "), Mode::Slots, 4);
}

fn unreachable_newcomer() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let passes = 40;
    let mut watch = Watch::new(start("unreachable", passes, &pace, "2"));
    watch.until("all were members", Watch::is_whole);
    let epoch = watch.epoch;
    watch.signal(1, Signal::KILL);
    watch.until_whole(epoch);
    set_pace(&pace, u64::MAX);
    let finished = watch.job.finish();
    finished.assert_success();
    // Both were of rank 1: no other worker has failed with it.
    let replaced = finished.lines.iter().filter(|line| line.contains("takes its place"));
    assert!(replaced.clone().all(|line| line.contains("rank 1 ")), "{}", finished.lines.join("\n"));
    assert_eq!(replaced.count(), 2, "{}", finished.lines.join("\n"));
    check(&finished.lines_with("complete digest "), Mode::Slots, passes);
}

fn unreachable_from_the_start() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let passes = 40;
    let mut watch = Watch::new(start("unreachable-first", passes, &pace, "1"));
    watch.until("all were members, one of them another process", |w| w.is_whole() && w.epoch > 1);
    set_pace(&pace, u64::MAX);
    let finished = watch.job.finish();
    finished.assert_success();
    let replaced = finished.lines.iter().filter(|line| line.contains("takes its place"));
    assert_eq!(replaced.clone().count(), 1, "{}", finished.lines.join("\n"));
    assert!(replaced.clone().all(|line| line.contains("rank 1 ")), "{}", finished.lines.join("\n"));
    check(&finished.lines_with("complete digest "), Mode::Slots, passes);
}

fn leaves() {
    let finished = Job::start(RANKS, &[], "leave", &["200"]).finish();
    finished.assert_success();
    assert_eq!(finished.lines_with("ended with Ok(Left)").len(), 1, "{}", finished.lines.join("\n"));
    assert_eq!(finished.lines_with("complete digest ").len(), 3, "{}", finished.lines.join("\n"));
    check(&finished.lines_with("complete digest "), Mode::Slots, 200);
}

fn absent() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("pace").to_string_lossy().into_owned();
    let flags = ["--rdzv-timeout", "2"];
    let finished = Job::start(RANKS, &flags, "absent", &["1", &path]).finish();
    assert_eq!(finished.status.code(), Some(138), "{}", finished.lines.join("\n"));
    assert!(finished.report().starts_with("only 3 of 4 ranks"), "{}", finished.report());
}

fn out_of_restarts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut watch = Watch::new(start("slots", 1_000_000, &folder.path().join("pace"), "1"));
    watch.until("all were members", |w| w.members == RANKS);
    let epoch = watch.epoch;
    watch.signal(1, Signal::KILL);
    watch.until_whole(epoch);
    watch.signal(2, Signal::KILL);
    let finished = watch.job.finish();
    assert_eq!(finished.status.code(), Some(128 + 9), "{}", finished.lines.join("\n"));
    let last = |line: &&String| line.starts_with("paceline: rank 2 ") && line.ends_with("the job has ended");
    assert!(finished.lines.iter().any(|line| last(&line)), "{}", finished.lines.join("\n"));
}

fn one_account() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut watch = Watch::new(start("late", 1_000_000, &folder.path().join("pace"), "2"));
    watch.until("all were members", |w| w.members == RANKS);
    let epoch = watch.epoch;
    watch.signal(1, Signal::KILL);
    watch.until_whole(epoch);
    watch.signal(2, Signal::KILL);
    let finished = watch.job.finish();
    assert_eq!(finished.status.code(), Some(128 + 9), "{}", finished.lines.join("\n"));
    for words in ["the job starts again (1 of 2)", "takes its place", "the job has ended"] {
        let count = finished.lines.iter().filter(|line| line.contains(words)).count();
        assert_eq!(count, 1, "{words}: {}", finished.lines.join("\n"));
    }
}

fn all_lost() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut watch = Watch::new(start("slots", 1_000_000, &folder.path().join("pace"), "10"));
    watch.until("all were members", |w| w.members == RANKS);
    (0..RANKS).for_each(|rank| watch.signal(rank, Signal::KILL));
    let finished = watch.job.finish();
    assert_eq!(finished.status.code(), Some(138), "{}", finished.lines.join("\n"));
    assert!(finished.lines.iter().any(|line| line.contains("all workers of epoch")), "{:?}", finished.lines);
}

fn orphans() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut watch = Watch::new(start("slots", 1_000_000, &folder.path().join("pace"), "10"));
    watch.until("all were members", |w| w.members == RANKS);
    watch.job.launcher.kill().expect("it runs");
    watch.job.launcher.wait().expect("it is our child");
    let gone = |pid: &Pid| test_kill_process(*pid).is_err();
    let deadline = Instant::now() + PATIENCE;
    while !watch.pids.values().all(gone) {
        assert!(Instant::now() < deadline, "ranks outlive their launcher: {:?}", watch.pids);
        std::thread::sleep(Duration::from_millis(5));
        // A process that nobody has waited for still has its number: in a container without an init that is for ever.
        let is_zombie = |pid: &Pid| {
            let status = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap_or_default();
            status.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
        };
        watch.pids.retain(|_, pid| !is_zombie(pid));
    }
}

// ---- measuring ----

/// What one of the ranks has said since a moment, as numbers.
struct Said<'a>(&'a [String], String);

impl<'a> Said<'a> {
    fn new(watch: &'a Watch, since: usize, rank: usize) -> Self {
        Self(&watch.job.seen[since..], format!("[{rank}]: "))
    }

    fn numbers(&self, what: &'a str) -> impl Iterator<Item = Vec<u128>> + '_ {
        let lines = self.0.iter().filter_map(|line| line.strip_prefix(&self.1));
        let of_kind = lines.filter(move |line| line.starts_with(what));
        of_kind.map(|line| line.split_whitespace().filter_map(|word| word.parse().ok()).collect())
    }

    /// The longest time between two steps applied one after the other, the first of them not before `from` and the last the first
    /// one after `until`.
    fn longest_step(&self, from: u128, until: u128) -> f64 {
        let applied: Vec<u128> = self.numbers("applied ").map(|said| said[1]).collect();
        let during = applied.windows(2).filter(|pair| pair[0] >= from && pair[0] <= until);
        let longest = during.map(|pair| pair[1] - pair[0]).max();
        longest.expect("a step was applied meanwhile") as f64 / 1e3
    }

    /// When the first step was applied that was reduced after `epoch`: the first stable step of a later epoch is the one
    /// that its members began from.
    fn first_step_after(&self, epoch: u64) -> u128 {
        let began = self.numbers("stable ").find(|said| said[1] > epoch.into()).expect("a later epoch")[0];
        self.numbers("applied ").find(|said| said[0] == began + 1).expect("it was applied")[1]
    }
}

/// The steps before any fault; from SIGKILL, and from SIGSTOP, of one of four ranks to the next step that all three others have
/// applied; from the start of the next process to its first contribution; and the longest step of a survivor meanwhile, from the
/// first one without the victim on. Shrink mode, so that no lost share is computed again; what is left
/// is detection, the view change, new links and the step itself.
///
/// Once with steps that only communicate, with which no newcomer keeps up, and once with some that compute as well.
fn measure() {
    let kills = number_from("PACELINE_MEASURE_FAULTS").unwrap_or(20);
    measure_part("large", "", kills, kills.div_ceil(3));
    measure_part("computing", &format!(", {} ms of computing", COMPUTING.as_millis()), kills, 0);
}

fn measure_part(part: &str, suffix: &str, kills: u64, stops: u64) {
    let mut watch = Watch::new(Job::start(RANKS, &["--max-restarts", "1000000"], part, &[]));
    watch.until("all were members", |w| w.members == RANKS && w.step > 30);
    let applied: Vec<u128> = Said::new(&watch, 0, 0).numbers("applied ").map(|said| said[1]).collect();
    let steps = applied.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 1e3).collect();
    let mut rng = Rng::with_seed(5);
    let (mut killed, mut frozen, mut joined, mut held_up) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..kills {
        pause(&mut rng, 300);
        let (victim, epoch, before) = (rng.usize(0..RANKS), watch.epoch, watch.job.seen.len());
        killed.push(time(&mut watch, victim, Signal::KILL));
        watch.until_whole(epoch);
        let step = watch.step;
        watch.until("they went on together", |w| w.step > step + 2);
        let said = Said::new(&watch, before, victim);
        let started = said.numbers("process ").next().expect("another process")[1];
        let contributed = said.numbers("stable ").find(|said| said[3] > started).expect("a step")[3];
        joined.push((contributed - started) as f64 / 1e3);
        let survivor = Said::new(&watch, before.saturating_sub(50), (victim + 1) % RANKS);
        held_up.push(survivor.longest_step(survivor.first_step_after(epoch), contributed));
    }
    for _ in 0..stops {
        let (victim, epoch) = (rng.usize(0..RANKS), watch.epoch);
        frozen.push(time(&mut watch, victim, Signal::STOP));
        watch.signal(victim, Signal::CONT);
        watch.until_whole(epoch);
    }
    for (what, times) in [
        ("a step", steps),
        ("SIGKILL", killed),
        ("SIGSTOP", frozen),
        ("start to contribution", joined),
        ("a survivor's longest step meanwhile", held_up),
    ] {
        if !times.is_empty() {
            print_times(&format!("{what}{suffix}"), times);
        }
    }
}

/// Sends the signal, and returns how many milliseconds later the last survivor had applied its first step without the
/// victim.
fn time(watch: &mut Watch, victim: usize, signal: Signal) -> f64 {
    let (epoch, before, at) = (watch.epoch, watch.job.seen.len(), now_us());
    watch.signal(victim, signal);
    watch.until("the others went on", |w| w.epoch > epoch);
    let step = watch.step;
    watch.until("they made steps", |w| w.step > step + 1);
    let before = before.saturating_sub(50);
    let first = (0..RANKS).filter(|&rank| rank != victim);
    let first = first.map(|rank| Said::new(watch, before, rank).first_step_after(epoch)).max();
    (first.expect("three survivors") - at) as f64 / 1e3
}
