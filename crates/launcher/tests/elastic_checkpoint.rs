//! Checkpoints of jobs whose membership may change: whole jobs and single workers are killed while they save, disks take
//! no more, and what is started again goes on from a whole checkpoint, on another number of ranks.
//!
//! What counts is the result: with a fixed number of slots the final state is that of a run that nobody disturbed, bit by
//! bit. `PACELINE_CHECKPOINT_KILLS=50` kills more often, `PACELINE_CHAOS_SEED` repeats a run's choices.

#![allow(clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod job;
mod training;

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use job::{Finished, Job, PATIENCE, trial};
use paceline_runtime::checkpoint::{Checkpoint, Listing, LocalDisk};
use paceline_runtime::digest::Digest;
use paceline_runtime::elastic::{self, Config, End, Program, Tensor};
use paceline_runtime::membership::Mode;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit, test_kill_process};
use training::{Model, RANKS, STEPS, number_from, pause};

fn main() {
    job::main(rank, || {
        vec![
            trial(
                "a_job_that_is_killed_while_it_saves_goes_on_from_a_whole_checkpoint_on_other_ranks",
                killed_while_saving,
            ),
            trial("a_worker_that_is_killed_while_it_saves_costs_one_checkpoint", worker_killed_while_saving),
            trial("a_job_that_has_lost_all_workers_begins_again_from_its_newest_checkpoint", all_lost),
            trial("a_disk_that_takes_no_more_costs_checkpoints_and_no_step", a_full_disk),
            trial("with_as_many_slots_as_ranks_another_number_of_them_uses_each_sample_once", other_slots),
            trial("launchers_that_found_a_job_anew_go_on_from_one_checkpoint", launchers),
        ]
    });
}

// ---- the program ----

/// So many elements that a kill often hits a shard that is being written.
const BALLAST: usize = 60_000;

/// After how many steps each a state is saved.
const EVERY: u64 = 2;

/// More passes than any job makes before it is killed.
const FOR_EVER: u64 = 1_000_000_000;

/// What a rank of the file size limit may write, below its shard.
const LIMITED_BYTES: u64 = 50_000;

/// Until which step.
const LIMITED_STEPS: u64 = 16;

/// Whether this process has said that the limit was in its way.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

/// What the limit is called in a log.
const TOO_LARGE: &str = "File too large";

/// Where a rank's log goes: to its output, and some of it is noticed.
struct Log;

impl io::Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let is_of_the_limit = String::from_utf8_lossy(line).contains(TOO_LARGE);
        HAS_FAILED.fetch_or(is_of_the_limit, Ordering::Relaxed);
        io::stdout().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

/// A model with a large state, each element of which depends on all steps.
struct Heavy {
    model: Model,
    ballast: Vec<f64>,
    has_said: bool,
    /// Whether this process may not write large files yet.
    is_limited: bool,
}

impl Heavy {
    fn new() -> Self {
        Self { model: Model::new(None), ballast: vec![1.0; BALLAST], has_said: true, is_limited: false }
    }

    fn digest(&self) -> String {
        format!("{}-{}", self.model.digest(), Digest::of([&self.ballast[..]]))
    }
}

impl Program for Heavy {
    type Gradient = f64;

    fn gradient_len(&self) -> usize {
        self.model.gradient_len()
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        let ballast = Tensor::new("ballast", &mut self.ballast);
        std::iter::once(ballast).chain(self.model.state()).collect()
    }

    fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
        if !std::mem::replace(&mut self.has_said, true) {
            println!("goes on after step {}", self.model.steps[0]);
        }
        if self.is_limited && self.model.steps[0] >= LIMITED_STEPS {
            until("a shard could not be written", || HAS_FAILED.load(Ordering::Relaxed));
            limit_files(None);
            self.is_limited = false;
        }
        self.model.gradient(samples, gradient)
    }

    fn apply(&mut self, gradient: &[f64]) {
        self.model.apply(gradient);
        let step = gradient[0];
        self.ballast.iter_mut().for_each(|element| *element = 0.75 * *element + step);
    }
}

fn config(passes: u64, folder: Option<&Path>, slots: Option<u16>) -> Config {
    let mut config = training::config(Mode::Slots, passes);
    (config.slots, config.checkpoint_every) = (slots, EVERY);
    config.checkpoint = folder.map(Path::to_owned);
    config
}

/// Arguments: passes, the folder, and the number of slots or nothing.
fn rank(part: &str, args: &[String]) {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_ansi(false)
        .with_writer(|| Log)
        .init();
    println!("process {}", std::process::id());
    let passes = args[0].parse().expect("a number of passes");
    let config = config(passes, Some(args[1].as_ref()), args.get(2).and_then(|slots| slots.parse().ok()));
    let mut program = Heavy { has_said: false, ..Heavy::new() };
    if part == "full" && std::env::var("RANK").is_ok_and(|rank| rank == "1") {
        program.is_limited = true;
        limit_files(Some(LIMITED_BYTES));
    }
    let end = elastic::train(&config, &mut program).unwrap_or_else(|error| panic!("{error}"));
    if end == End::Complete {
        println!("complete {}", said(&program));
    }
}

fn said(program: &Heavy) -> String {
    let (least, most) = program.model.used();
    format!("digest {} least {least} most {most}", program.digest())
}

/// Files of this process may have so many bytes, or as many as they like.
fn limit_files(bytes: Option<u64>) {
    /// Of a file's size; Linux's number on all processors that Rust knows but MIPS.
    const SIGXFSZ: i32 = 25;
    // Otherwise the kernel ends whoever writes more.
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).expect("the signal can be caught");
    let maximum = getrlimit(Resource::Fsize).maximum;
    setrlimit(Resource::Fsize, Rlimit { current: bytes.or(maximum), maximum })
        .expect("a soft limit can be moved");
}

// ---- what is expected ----

/// What all say who complete a run that nobody has disturbed.
fn undisturbed(passes: u64, slots: u16) -> String {
    let mut program = Heavy::new();
    assert_eq!(elastic::train(&config(passes, None, Some(slots)), &mut program), Ok(End::Complete));
    said(&program)
}

fn check_ends(finished: &Finished, expected: &str, count: usize) {
    finished.assert_success();
    let ends = finished.lines_with("complete ");
    let is_right = |line: &&str| line.ends_with(&format!("complete {expected}"));
    assert!(ends.len() == count && ends.iter().all(is_right), "{ends:?}, not {count} times {expected}");
}

fn listing(folder: &Path) -> Listing {
    Listing::of(&LocalDisk, folder).expect("it can be read")
}

fn newest(folder: &Path) -> u64 {
    listing(folder).committed.first().map_or(0, |newest| newest.step)
}

/// Every checkpoint is whole, and none was ever found to be damaged.
fn check_folder(folder: &Path) -> Listing {
    let listing = listing(folder);
    for name in &listing.committed {
        let whole = Checkpoint::open(&LocalDisk, folder, name).and_then(|checkpoint| checkpoint.verify());
        whole.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert!(listing.rejected.is_empty(), "a resume has found a damaged one: {listing:?}");
    listing
}

/// Passes that are not complete with the newest checkpoint, and are soon after it.
fn passes_beyond(folder: &Path) -> u64 {
    newest(folder) / STEPS + 2
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the path is text")
}

fn start(ranks: usize, part: &str, passes: u64, folder: &Path, slots: Option<u16>) -> Job {
    let slots = slots.map_or(String::new(), |slots| slots.to_string());
    let args = [&passes.to_string(), text(folder), &slots];
    Job::start(ranks, &["--max-restarts", "1000"], part, &args)
}

/// The step after which a job goes on, once all of its ranks do. One that the machine has kept from running for long may
/// come in later.
fn first_step(job: &mut Job, ranks: usize) -> u64 {
    let lines = job.wait_for("goes on after step ", ranks);
    lines.iter().map(|line| last_number(line)).min().expect("so many lines")
}

fn last_number(line: &str) -> u64 {
    line.rsplit(' ').next().and_then(|number| number.parse().ok()).expect("it ends with a number")
}

/// The present process of a rank.
fn process_of(job: &Job, rank: usize) -> Pid {
    let start = format!("[{rank}]: process ");
    let line = job.seen.iter().rev().find(|line| line.starts_with(&start)).expect("it has said so");
    Pid::from_raw(last_number(line) as i32).expect("a process")
}

fn kill(job: &Job, rank: usize) {
    // Fails when it has just ended by itself.
    let _ = kill_process(process_of(job, rank), Signal::KILL);
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it never came to be that {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Kills a launcher, and waits for its ranks to be gone.
fn kill_all(mut job: Job, ranks: usize) {
    let processes: Vec<Pid> = (0..ranks).map(|rank| process_of(&job, rank)).collect();
    job.launcher.kill().expect("it runs");
    job.launcher.wait().expect("it is our child");
    until("the ranks were gone", || processes.iter().all(|&process| is_gone(process)));
}

/// In a container without an init a process that nobody has waited for keeps its number.
fn is_gone(process: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_pid())).unwrap_or_default();
    let is_zombie = status.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'));
    test_kill_process(process).is_err() || is_zombie
}

fn seeded() -> Rng {
    let seed = number_from("PACELINE_CHAOS_SEED").unwrap_or_else(|| Rng::new().u64(..));
    println!("PACELINE_CHAOS_SEED={seed}");
    Rng::with_seed(seed)
}

// ---- whole jobs ----

fn killed_while_saving() {
    let kills = number_from("PACELINE_CHECKPOINT_KILLS").unwrap_or(4);
    let (mut rng, folder) = (seeded(), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    let mut in_the_middle = 0;
    for kill in 0..kills {
        let ranks = if kill.is_multiple_of(2) { RANKS } else { RANKS - 1 };
        let before = newest(folder);
        let mut job = start(ranks, "saves", FOR_EVER, folder, Some(RANKS as u16));
        let from = first_step(&mut job, ranks);
        assert_eq!(from, before, "the newest checkpoint is the one to go on from");
        let made = from + EVERY * rng.u64(0..4);
        until("another checkpoint was made", || newest(folder) >= made);
        pause(&mut rng, 30);
        kill_all(job, ranks);
        let listing = check_folder(folder);
        in_the_middle += u64::from(listing.unfinished > 0);
        assert!(newest(folder) >= made, "{listing:?} after {made}");
    }
    println!("{in_the_middle} of {kills} kills came while a checkpoint was being written or removed");
    let passes = passes_beyond(folder);
    let ranks = RANKS - 1;
    let job = start(ranks, "saves", passes, folder, Some(RANKS as u16)).finish();
    check_ends(&job, &undisturbed(passes, RANKS as u16), ranks);
    let listing = check_folder(folder);
    assert_eq!((listing.committed[0].step, listing.unfinished), (STEPS * passes, 0), "{listing:?}");
}

fn other_slots() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    for ranks in [RANKS, RANKS - 1] {
        let before = newest(folder);
        let mut job = start(ranks, "saves", FOR_EVER, folder, None);
        assert!(first_step(&mut job, ranks) >= before);
        until("another checkpoint was made", || newest(folder) > before);
        kill_all(job, ranks);
    }
    let passes = passes_beyond(folder);
    let job = start(RANKS, "saves", passes, folder, None).finish();
    job.assert_success();
    let ends = job.lines_with("complete ");
    let used = format!("least {passes} most {passes}");
    assert!(ends.len() == RANKS && ends.iter().all(|line| line.ends_with(&used)), "{ends:?}, not {used}");
}

// ---- single workers ----

fn worker_killed_while_saving() {
    let kills = number_from("PACELINE_CHECKPOINT_KILLS").unwrap_or(3);
    let (mut rng, folder) = (seeded(), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    let mut job = start(RANKS, "saves", FOR_EVER, folder, Some(RANKS as u16));
    let mut entered = RANKS;
    for _ in 0..kills {
        job.wait_for("goes on after step ", entered);
        let before = newest(folder);
        // Those who are left save again.
        until("another checkpoint was made", || newest(folder) > before);
        until("one was being written", || listing(folder).unfinished > 0);
        let victim = rng.usize(0..RANKS);
        kill(&job, victim);
        entered += 1;
        check_folder_while_it_changes(folder);
    }
    job.wait_for("goes on after step ", entered);
    kill_all(job, RANKS);
    check_folder(folder);
    let passes = passes_beyond(folder);
    let job = start(RANKS, "saves", passes, folder, Some(RANKS as u16)).finish();
    check_ends(&job, &undisturbed(passes, RANKS as u16), RANKS);
    assert_eq!(check_folder(folder).unfinished, 0);
}

fn all_lost() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let mut job = start(RANKS, "saves", FOR_EVER, folder, Some(RANKS as u16));
    first_step(&mut job, RANKS);
    until("a checkpoint was made", || newest(folder) > 0);
    let made = newest(folder);
    (0..RANKS).for_each(|rank| kill(&job, rank));
    job.wait_for("were lost, and the state with them; the job starts again (1 of 1000)", 1);
    let before = job.seen.len();
    job.wait_for("goes on after step ", 2 * RANKS);
    let next = job.seen[before..].iter().filter(|line| line.contains("goes on after step "));
    let next = next.map(|line| last_number(line)).min().expect("they go on");
    assert!(next >= made, "after step {next}, though that of step {made} was made");
    kill_all(job, RANKS);
    let passes = passes_beyond(folder);
    let job = start(RANKS, "saves", passes, folder, Some(RANKS as u16)).finish();
    check_ends(&job, &undisturbed(passes, RANKS as u16), RANKS);
}

/// The newest checkpoint is whole, unless it has just been removed for newer ones.
fn check_folder_while_it_changes(folder: &Path) {
    let Some(name) = listing(folder).committed.first().cloned() else { return };
    let whole = Checkpoint::open(&LocalDisk, folder, &name).and_then(|checkpoint| checkpoint.verify());
    assert!(whole.is_ok() || !listing(folder).committed.contains(&name), "{name}: {whole:?}");
}

fn a_full_disk() {
    let folder = tempfile::tempdir().expect("a folder");
    let passes = 2 * LIMITED_STEPS / STEPS;
    let args = [&passes.to_string(), text(folder.path()), &RANKS.to_string()];
    // Memory that ranks share counts as files.
    let variables = [("PACELINE_SHARED_MEMORY", "off")];
    let job = Job::launch(&["-n", "4", "--max-restarts", "1000"], &variables, "full", &args).finish();
    check_ends(&job, &undisturbed(passes, RANKS as u16), RANKS);
    assert!(!job.lines_with("no checkpoint; training goes on without it").is_empty(), "{:?}", job.lines);
    assert!(!job.lines_with(TOO_LARGE).is_empty(), "{:?}", job.lines);
    assert!(!job.lines.iter().any(|line| line.contains("takes its place")), "{:?}", job.lines);
    let listing = check_folder(folder.path());
    assert_eq!(listing.unfinished, 0, "nothing of those is left");
    assert_eq!(listing.committed[0].step, STEPS * passes, "room was made again");
}

// ---- several launchers ----

/// A port that stays free while nobody has it: below those from which connections are made.
fn free_endpoint() -> SocketAddr {
    let mut ports = std::iter::repeat_with(|| fastrand::u16(20_000..32_000));
    let free = ports.find_map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok());
    free.and_then(|listener| listener.local_addr().ok()).expect("one of them is free")
}

fn launchers() {
    const NODES: usize = 2;
    let folder = tempfile::tempdir().expect("a folder");
    let secret = folder.path().join("secret");
    fs::write(&secret, "b1946ac92492d2347c6235b4d2611184").expect("written");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("changed");
    let endpoint = free_endpoint().to_string();
    let saved = folder.path().join("saved");
    let launch = |passes: u64| -> Vec<Job> {
        let of_node = |node: usize| {
            let (node, passes) = (node.to_string(), passes.to_string());
            let flags = ["--nnodes", "1:2", "--node-rank", &node, "-n", "1", "--bind", "none"];
            let more = ["--rdzv-endpoint", &endpoint, "--job-secret", text(&secret), "--max-restarts", "9"];
            Job::launch(&[&flags[..], &more].concat(), &[], "saves", &[&passes, text(&saved), "2"])
        };
        (0..NODES).map(of_node).collect()
    };
    let first_step = |jobs: &mut [Job]| jobs.iter_mut().map(|job| first_step(job, 1)).min();
    let mut jobs = launch(FOR_EVER);
    assert_eq!(first_step(&mut jobs), Some(0));
    until("a checkpoint was made", || newest(&saved) > 0);
    // Both at once: if one outlives the other for long, it goes on alone.
    jobs.iter_mut().for_each(|job| job.launcher.kill().expect("it runs"));
    for (node, job) in jobs.iter_mut().enumerate() {
        job.launcher.wait().expect("it is our child");
        let process = process_of(job, node);
        until("its rank was gone", || is_gone(process));
    }
    check_folder(&saved);
    let (before, passes) = (newest(&saved), passes_beyond(&saved));
    let mut jobs = launch(passes);
    assert_eq!(first_step(&mut jobs), Some(before));
    let expected = undisturbed(passes, NODES as u16);
    jobs.into_iter().for_each(|job| check_ends(&job.finish(), &expected, 1));
    assert_eq!(check_folder(&saved).unfinished, 0);
}
