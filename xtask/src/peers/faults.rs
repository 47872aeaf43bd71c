//! `cargo xtask peers --faults`: what a lost rank costs, with Paceline, with torchrun and with torchft, in one run.
//!
//! All train four ranks of this machine with 25 MiB of f32 and no computation besides. Paceline's part is measured by its
//! own tests, which look at the result of every fault as well (`measure` in the launcher's tests `elastic` and
//! `elastic_nodes`). torchrun's ranks run xtask/torchrun/faults.py over Gloo, a job for each fault, since some of them
//! never go on: all attempts of a job meet in one store (PyTorch's issues 135712 and 167288), where ranks that were started
//! again find the addresses of the attempt before, cannot connect and fail, until no restart is left. With
//! `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` each attempt has a store of its own; both are measured.
//!
//! torchft's replicas run xtask/torchrun/replicas.py, a job for each fault too: its survivors go on by themselves, and the time
//! is that until all have applied the same step again. It has torchft's own deadlines.

use super::Options;
use super::machine::{self, Machine};
use crate::environment::{self, Recipe};
use crate::process::{self, Watch, cargo, must_succeed};
use crate::step::{Budget, Report};
use crate::torchrun::Torchrun;
use crate::workspace;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

/// Around the generated section of docs/fault-tolerance.md.
pub const SECTION: super::summary::Markers =
    super::summary::Markers { begin: "<!-- faults: begin -->", end: "<!-- faults: end -->" };

/// The document that has it.
pub const DOCUMENT: &str = "docs/fault-tolerance.md";

const RANKS: usize = 4;

/// How long torchrun's ranks may take to go on after a fault before that counts as never, and how long torchft's, whose own
/// deadline for an operation is 60 s; and how long either may take to come up before it.
const PATIENCE: Duration = Duration::from_secs(30);
const TORCHFT_PATIENCE: Duration = Duration::from_secs(75);
const START: Duration = Duration::from_secs(60);

/// How often a rank of a peer's is killed at most, with each kind of store: those that hang cost their patience.
const KILLS_LIMIT: u32 = 3;

/// Steps of every rank before a fault.
const WARM: u64 = 20;

const TORCHFT: Recipe = Recipe {
    what: "torchft",
    name: "torchft-2026.10.26",
    // With what it imports; torch itself is that of torchrun.
    packages: &[
        "torchft-nightly==2026.10.26",
        "opentelemetry-api==1.45.2",
        "opentelemetry-sdk==1.45.2",
        "opentelemetry-semantic-conventions==0.66b2",
        "opentelemetry-proto==1.45.2",
        "opentelemetry-exporter-otlp-proto-http==1.45.2",
        "opentelemetry-exporter-otlp-proto-common==1.45.2",
        "opentelemetry-exporter-otlp-common==0.66b2",
        "opentelemetry-exporter-http-transport==0.66b2",
        "googleapis-common-protos==1.76.0",
        "protobuf==7.36.2",
        "requests==2.34.2",
        "urllib3==2.8.0",
        "idna==3.20",
        "certifi==2026.10.19.post1",
        "charset-normalizer==3.5.3",
        "typing_extensions==4.16.0",
    ],
    cost: "a download of 5 MB",
    needed_bytes: 100_000_000,
    is_whole: |environment| {
        environment::site_packages(environment).is_some_and(|packages| packages.join("torchft").is_dir())
    },
    must_work: |_| Ok(()),
};

/// Measures both, and returns the section.
///
/// # Errors
/// A test fails, torchrun cannot be set up, or its ranks do not start.
pub fn measure(options: &Options, report: &mut Report, result: &mut Option<String>) -> Result<()> {
    let mut peers = None;
    report.step("peers: set up torchrun and torchft", Budget::minutes(8.0), |_| {
        peers = Some((Torchrun::ensure()?, environment::ensure(&TORCHFT)?));
        Ok(())
    })?;
    let (torchrun, torchft) = peers.context("both are set up")?;
    report.step("peers: build Paceline's tests", Budget::minutes(10.0), |limit| {
        process::run(paceline_tests(&["--no-run"]), limit)
    })?;
    let before = Machine::look();
    let faults = 4 * options.rounds();
    let mut ours = Vec::new();
    report.step("peers: Paceline", Budget::minutes(3.0), |limit| {
        ours = paceline(faults, limit)?;
        Ok(())
    })?;
    let mut steps = Vec::new();
    report.step("peers: a step while nothing fails", Budget::minutes(15.0), |limit| {
        steps = undisturbed(limit)?;
        Ok(())
    })?;
    let mut theirs = [Outcomes::default(), Outcomes::default()];
    report.step("peers: torchrun", Budget::minutes(4.0), |_| {
        for (store, outcomes) in [Store::Shared, Store::PerAttempt].into_iter().zip(&mut theirs) {
            for round in 0..options.rounds().min(KILLS_LIMIT) as usize {
                let words = format!("torchrun, {store:?}");
                let command = torchrun_job(&torchrun, store);
                let mut watched = Watched::torchrun();
                outcomes.killed.push(strike(&words, command, &mut watched, ("-KILL", Some(round % RANKS)))?);
            }
        }
        // Nobody is started again: there is nothing that the store could change.
        let command = torchrun_job(&torchrun, Store::PerAttempt);
        let outcome = strike("torchrun", command, &mut Watched::torchrun(), ("-STOP", Some(1)))?;
        theirs.iter_mut().for_each(|outcomes| outcomes.frozen.push(outcome));
        Ok(())
    })?;
    let mut of_torchft = Outcomes::default();
    report.step("peers: torchft", Budget::minutes(8.0), |_| {
        let packages = environment::site_packages(&torchft).context("the environment of torchft is gone")?;
        let job = |signal, victim| {
            let command = torchft_job(&torchrun, &packages);
            strike("torchft", command, &mut Watched::torchft(victim), (signal, victim))
        };
        for round in 0..options.rounds().min(KILLS_LIMIT) as usize {
            of_torchft.killed.push(job("-KILL", Some(round % RANKS))?);
        }
        of_torchft.frozen.push(job("-STOP", Some(1))?);
        of_torchft.leaderless.push(job("-KILL", None)?);
        Ok(())
    })?;
    let [shared, per_attempt] = theirs;
    let peers = ["torchrun 2.11.0 with Gloo", "torchft nightly 2026.10.26 with Gloo"];
    let conditions = machine::conditions(&before, &options.command(), 1, &peers);
    let table = table(&ours, &[shared, per_attempt, of_torchft]);
    *result = Some(format!("{conditions}\n{table}\n{}", costs(&steps)));
    Ok(())
}

/// Where the ranks of torchrun's attempts meet.
#[derive(Clone, Copy, Debug)]
enum Store {
    /// As torchrun has it unless it is told otherwise.
    Shared,
    PerAttempt,
}

/// What became of a peer's jobs.
#[derive(Default)]
struct Outcomes {
    killed: Vec<Outcome>,
    frozen: Vec<Outcome>,
    /// Whose coordinator was killed, and nothing else.
    leaderless: Vec<Outcome>,
}

/// The lines of Paceline's own measurements: what, and the rest of the line.
fn paceline(faults: u32, limit: Duration) -> Result<Vec<(String, String)>> {
    let mut command = paceline_tests(&["--", "measure"]);
    command.env("PACELINE_MEASURE_FAULTS", faults.to_string());
    let mut found = Vec::new();
    let status = process::observe(command, Watch::Both, limit, &mut |line| {
        found.extend(measured(line));
    })?;
    must_succeed(status, "cargo test -- measure")?;
    Ok(found)
}

/// What a line of a test says that it has measured. The first one stands behind the test's name.
fn measured(line: &str) -> Option<(String, String)> {
    let (what, times) = line.split_once(": ").filter(|(_, times)| times.contains(" times, p50 "))?;
    let what = what.rsplit_once(" ... ").map_or(what, |(_, what)| what);
    Some((what.to_owned(), times.to_owned()))
}

/// What steps cost with a membership that may change and without, as `elastic_steps` says: steps that only communicate, and
/// some that compute as well.
fn undisturbed(limit: Duration) -> Result<Vec<String>> {
    let build =
        ["build", "--release", "--locked", "--workspace", "--bin", "paceline", "--bin", "elastic_steps"];
    process::run(cargo(&build), limit)?;
    let release = workspace::target().join("release");
    let mut said = Vec::new();
    for step_ms in ["0", "20", "100"] {
        let mut command = Command::new(release.join("paceline"));
        command.args(["run", "-n", &RANKS.to_string(), "--"]).arg(release.join("elastic_steps"));
        command.args(["25", step_ms]);
        let status = process::observe(command, Watch::Stdout, limit, &mut |line| {
            said.extend(line.split_once("]: ").map(|(_, said)| said.to_owned()));
        })?;
        must_succeed(status, "paceline run -- elastic_steps")?;
    }
    Ok(said)
}

fn costs(said: &[String]) -> String {
    let lines: String = said.iter().map(|line| format!("- {line}\n")).collect();
    format!(
        "A step while nothing fails, with `runtime::elastic` and with a plain communicator by turns, results compared bit by bit:\n{lines}"
    )
}

fn paceline_tests(arguments: &[&str]) -> Command {
    let words = ["test", "--release", "--locked", "--package", "paceline", "--test", "elastic"];
    cargo(&[&words[..], &["--test", "elastic_nodes"], arguments].concat())
}

/// What became of a job after a fault: the time until all ranks had applied a step again, or nothing.
type Outcome = Option<Duration>;

/// What is known of a peer's job.
struct Watched {
    /// The process and the newest step of each rank, before the fault.
    ranks: BTreeMap<usize, (u32, u64)>,
    coordinator: Option<u32>,
    patience: Duration,
    /// Whether the fault closes connections between ranks.
    breaks: bool,
    /// When the fault was, in microseconds since 1970.
    struck: Option<u128>,
    after: After,
}

/// What counts as going on.
enum After {
    /// Every rank has applied a step as another process: when its first one was.
    Restart(BTreeMap<usize, u128>),
    /// All survivors have applied the same step, which began after the fault.
    SameStep {
        lost: Option<usize>,
        /// When each survivor has applied each step.
        applied: BTreeMap<u64, BTreeMap<usize, u128>>,
    },
}

impl Watched {
    fn new(after: After, patience: Duration) -> Self {
        Self { ranks: BTreeMap::new(), coordinator: None, patience, breaks: true, struck: None, after }
    }

    fn torchrun() -> Self {
        Self::new(After::Restart(BTreeMap::new()), PATIENCE)
    }

    fn torchft(lost: Option<usize>) -> Self {
        Self::new(After::SameStep { lost, applied: BTreeMap::new() }, TORCHFT_PATIENCE)
    }

    /// Takes a line in, and says whether it is time for the fault.
    fn read(&mut self, line: &str) -> bool {
        if let Some((_, pid)) = line.split_once("lighthouse pid ") {
            self.coordinator = pid.trim().parse().ok();
        }
        let said = line.split_once("applied ").map_or("", |(_, said)| said);
        let words: Vec<&str> = said.split_whitespace().collect();
        let [step, _, attempt, _, rank, _, pid, _, at] = words[..] else { return false };
        let (Ok(step), Ok(rank), Ok(pid), Ok(at)) = (step.parse(), rank.parse(), pid.parse(), at.parse())
        else {
            return false;
        };
        match (self.struck, &mut self.after) {
            (None, _) if attempt == "0" => {
                self.ranks.insert(rank, (pid, step));
                return self.ranks.len() == RANKS && self.ranks.values().all(|&(_, step)| step >= WARM);
            }
            (Some(_), After::Restart(again)) if attempt != "0" => {
                again.entry(rank).or_insert(at);
            }
            (Some(_), After::SameStep { lost, applied }) if Some(rank) != *lost => {
                applied.entry(step).or_default().insert(rank, at);
            }
            _ => {}
        }
        false
    }

    fn outcome(&self) -> Outcome {
        let last = match &self.after {
            After::Restart(again) if again.len() == RANKS => again.values().max(),
            After::Restart(_) => None,
            After::SameStep { lost, applied } => {
                let before = self.ranks.values().map(|&(_, step)| step).max()?;
                // The step in flight may be completed with the part of the one that is lost, and where nobody's connections break
                // what has been sent may suffice for one more.
                let first = before + if self.breaks { 2 } else { 3 };
                let survivors = RANKS - usize::from(lost.is_some());
                let by_all = applied.range(first..).filter(|(_, ranks)| ranks.len() == survivors);
                // One that was said after the fault may have been applied before it.
                by_all.filter_map(|(_, ranks)| ranks.values().max()).find(|&&at| Some(at) > self.struck)
            }
        };
        let elapsed_us = last?.checked_sub(self.struck?)?;
        Some(Duration::from_micros(elapsed_us as u64))
    }
}

fn torchrun_job(torchrun: &Torchrun, store: Store) -> Command {
    let mut command = Command::new(torchrun.python());
    command.args(["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]);
    command.args(["--nproc-per-node", &RANKS.to_string()]);
    command.arg(workspace::root().join("xtask/torchrun/faults.py")).envs(torchrun.environment());
    if let Store::PerAttempt = store {
        command.env("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1");
    }
    command
}

fn torchft_job(torchrun: &Torchrun, packages: &Path) -> Command {
    let mut command = Command::new(torchrun.python());
    command.arg(workspace::root().join("xtask/torchrun/replicas.py")).arg(RANKS.to_string());
    for (name, value) in torchrun.environment() {
        if name == "PYTHONPATH" {
            let mut both = OsString::from(packages);
            both.push(":");
            both.push(value);
            command.env(name, both);
        } else {
            command.env(name, value);
        }
    }
    command
}

/// One job, in which a rank, or the coordinator, is sent a signal.
fn strike(
    peer: &str,
    command: Command,
    watched: &mut Watched,
    (signal, victim): (&str, Option<usize>),
) -> Result<Outcome> {
    watched.breaks = signal == "-KILL" && victim.is_some();
    let (started, mut struck, mut failed) = (Instant::now(), None, None);
    let patience = watched.patience;
    let ended = process::listen_while(command, Watch::Both, START + patience, &mut |line| {
        if line.is_some_and(|line| watched.read(line)) {
            let Some(pid) = victim.map_or(watched.coordinator, |rank| Some(watched.ranks[&rank].0)) else {
                failed = Some("the coordinator has not said which process it is");
                return false;
            };
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            watched.struck = Some(now.as_micros());
            struck = Some(Instant::now());
            let kill = Command::new("kill").args([signal, &pid.to_string()]).status();
            if !kill.is_ok_and(|status| status.success()) {
                failed = Some("the process is gone");
                return false;
            }
        }
        watched.outcome().is_none() && struck.is_none_or(|at| at.elapsed() < patience)
    });
    ensure!(failed.is_none(), "{peer} cannot be struck: {}", failed.unwrap_or_default());
    watched.struck.with_context(|| format!("the ranks of {peer} did not get to step {WARM}: {ended:?}"))?;
    let outcome = watched.outcome();
    let words = outcome.map_or("never".to_owned(), |after| format!("{after:?} later"));
    let whom = victim.map_or("the coordinator".to_owned(), |rank| format!("rank {rank}"));
    println!("{peer}, kill {signal} {whom}: all went on {words}; {:?} in all", started.elapsed());
    Ok(outcome)
}

fn table(ours: &[(String, String)], theirs: &[Outcomes; 3]) -> String {
    let mut text = "| event → the next step is applied by all | Paceline | torchrun | with a store for each attempt | torchft |\n\
                    |---|---|---|---|---|\n"
        .to_owned();
    let mut row = |what: &str, times: &str, of: Option<fn(&Outcomes) -> &[Outcome]>| {
        text += &format!("| {what} | {times} |");
        for (outcomes, patience) in theirs.iter().zip([PATIENCE, PATIENCE, TORCHFT_PATIENCE]) {
            text += &format!(" {} |", of.map_or("-".to_owned(), |of| shown(of(outcomes), patience)));
        }
        text += "\n";
    };
    for (what, times) in ours {
        match what.as_str() {
            "SIGKILL" => row(what, times, Some(|outcomes| &outcomes.killed)),
            "SIGSTOP" => row(what, times, Some(|outcomes| &outcomes.frozen)),
            _ => row(what, times, None),
        }
    }
    // Paceline's has no process of its own.
    row("SIGKILL of the coordinator alone", "-", Some(|outcomes| &outcomes.leaderless));
    text + "\ntorchrun starts all ranks again, and the program begins anew: it keeps no step. Paceline's and torchft's survivors go on. \
            Unless it is told otherwise (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`) torchrun's attempts share one store, where ranks \
            find the addresses of those that were stopped. torchft's coordinator is its lighthouse; Paceline's leader is a launcher, \
            and its workers go with it. torchft waits 60 s for an operation, and 5 s for a sign of life.\n"
}

/// A peer's times in words.
fn shown(outcomes: &[Outcome], patience: Duration) -> String {
    let mut times: Vec<Duration> = outcomes.iter().flatten().copied().collect();
    times.sort_unstable();
    if outcomes.is_empty() {
        return "-".to_owned();
    }
    let (never, all) = (outcomes.len() - times.len(), outcomes.len());
    let hung = format!("{never} of {all} times no step within {} s", patience.as_secs());
    match (times.first(), times.last()) {
        (Some(least), Some(most)) => {
            let median = times[times.len() / 2];
            let ms = |time: &Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
            let times = format!("{all} times, {} to {}, median {}", ms(least), ms(most), ms(&median));
            if never == 0 { times } else { format!("{times}; {hung}") }
        }
        _ => hung,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64, attempt: u32, rank: usize, at: u128) -> String {
        format!("[rank]:applied {step} attempt {attempt} rank {rank} pid {} at {at}", 100 + rank)
    }

    #[test]
    fn the_time_is_that_of_the_last_rank_and_of_another_attempt() {
        let mut watched = Watched::torchrun();
        let due: Vec<bool> = (0..RANKS).map(|rank| watched.read(&line(WARM, 0, rank, 1))).collect();
        assert_eq!(due, [false, false, false, true]);
        watched.struck = Some(1_000);
        assert!(!watched.read(&line(WARM + 1, 0, 2, 1_500)), "of the attempt that was struck");
        for (rank, at) in [(0, 3_000), (1, 9_000), (2, 4_000), (3, 5_000), (1, 99_000)] {
            assert_eq!(watched.outcome(), None);
            watched.read(&line(1, 1, rank, at));
            if rank == 3 {
                break;
            }
        }
        assert_eq!(watched.outcome(), Some(Duration::from_micros(8_000)));
    }

    #[test]
    fn a_job_that_never_went_on_is_counted() {
        let ms = Duration::from_millis;
        assert_eq!(shown(&[None], PATIENCE), "1 of 1 times no step within 30 s");
        let text = shown(&[Some(ms(1500)), None, Some(ms(1200)), Some(ms(1900))], PATIENCE);
        assert_eq!(text, "4 times, 1200 ms to 1900 ms, median 1500 ms; 1 of 4 times no step within 30 s");
    }

    #[test]
    fn of_survivors_the_time_is_that_until_all_have_applied_one_step() {
        let mut watched = Watched::torchft(Some(2));
        assert!(!watched.read("lighthouse pid 77"));
        let due = (0..RANKS).filter(|&rank| watched.read(&line(WARM, 0, rank, 1))).count();
        assert_eq!((due, watched.coordinator), (1, Some(77)));
        watched.struck = Some(1_000);
        // One has applied the step in flight, and the others heal from it.
        for (step, rank, at) in
            [(WARM + 1, 0, 1_013), (WARM + 1, 2, 1_001), (WARM + 2, 0, 6_000), (WARM + 2, 1, 6_100)]
        {
            watched.read(&line(step, 0, rank, at));
            assert_eq!(watched.outcome(), None);
        }
        watched.read(&line(WARM + 2, 0, 3, 6_050));
        assert_eq!(watched.outcome(), Some(Duration::from_micros(5_100)));
    }

    #[test]
    fn what_a_test_has_measured_stands_behind_its_name() {
        let times = "20 times, p50 1 ms".to_owned();
        let expected = Some(("a step".to_owned(), times.clone()));
        assert_eq!(measured(&format!("test measure_it ... a step: {times}")), expected);
        assert_eq!(measured(&format!("a step: {times}")), expected);
        assert_eq!(measured("test measure_it ... ok"), None);
    }

    #[test]
    fn a_step_that_a_frozen_rank_had_its_part_in_does_not_count() {
        let mut watched = Watched::torchft(Some(1));
        for rank in 0..RANKS {
            watched.read(&line(WARM, 0, rank, 1));
        }
        (watched.struck, watched.breaks) = (Some(1_000), false);
        for step in WARM + 1..=WARM + 3 {
            assert_eq!(watched.outcome(), None, "{step}");
            let at = 1_000 + 100 * u128::from(step - WARM);
            for rank in [0, 2, 3] {
                watched.read(&line(step, 0, rank, at));
            }
        }
        assert_eq!(watched.outcome(), Some(Duration::from_micros(300)));
    }
}
