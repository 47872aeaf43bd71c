//! `cargo xtask peers --faults`: what a lost rank costs, with Paceline and with torchrun, in one run.
//!
//! Both train four ranks of this machine with 25 MiB of f32 and no computation besides. Paceline's part is measured by its
//! own tests, which look at the result of every fault as well (`measure` in the launcher's tests `elastic` and
//! `elastic_nodes`). torchrun's ranks run xtask/torchrun/faults.py over Gloo, a job for each fault, since some of them
//! never go on: all attempts of a job meet in one store (PyTorch's issues 135712 and 167288), where ranks that were started
//! again find the addresses of the attempt before, cannot connect and fail, until no restart is left. With
//! `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` each attempt has a store of its own; both are measured.
//!
//! torchft is not measured here yet.

use super::Options;
use super::machine::{self, Machine};
use crate::process::{self, Watch, cargo, must_succeed};
use crate::step::{Budget, Report};
use crate::torchrun::Torchrun;
use crate::workspace;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

/// Around the generated section of docs/fault-tolerance.md.
pub const SECTION: super::summary::Markers =
    super::summary::Markers { begin: "<!-- faults: begin -->", end: "<!-- faults: end -->" };

/// The document that has it.
pub const DOCUMENT: &str = "docs/fault-tolerance.md";

const RANKS: usize = 4;

/// How long torchrun's ranks may take to go on after a fault before that counts as never, and to come up before it.
const PATIENCE: Duration = Duration::from_secs(30);
const START: Duration = Duration::from_secs(60);

/// How often a rank of torchrun's is killed at most, with each kind of store: those that hang cost [`PATIENCE`].
const KILLS_LIMIT: u32 = 3;

/// Steps of every rank before a fault.
const WARM: u64 = 20;

/// Measures both, and returns the section.
///
/// # Errors
/// A test fails, torchrun cannot be set up, or its ranks do not start.
pub fn measure(options: &Options, report: &mut Report, result: &mut Option<String>) -> Result<()> {
    let mut torchrun = None;
    report.step("peers: set up torchrun", Budget::minutes(8.0), |_| {
        torchrun = Some(Torchrun::ensure()?);
        Ok(())
    })?;
    let torchrun = torchrun.context("torchrun is set up")?;
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
    let mut theirs = [Outcomes::default(), Outcomes::default()];
    report.step("peers: torchrun", Budget::minutes(4.0), |_| {
        for (store, outcomes) in [Store::Shared, Store::PerAttempt].into_iter().zip(&mut theirs) {
            for round in 0..options.rounds().min(KILLS_LIMIT) as usize {
                outcomes.killed.push(torchrun_fault(&torchrun, store, "-KILL", round % RANKS)?);
            }
        }
        // Nobody is started again: there is nothing that the store could change.
        let outcome = torchrun_fault(&torchrun, Store::PerAttempt, "-STOP", 1)?;
        theirs.iter_mut().for_each(|outcomes| outcomes.frozen.push(outcome));
        Ok(())
    })?;
    let conditions = machine::conditions(&before, &options.command(), 1, &["torchrun 2.11.0 with Gloo"]);
    *result = Some(format!("{conditions}\n{}", table(&ours, &theirs)));
    Ok(())
}

/// Where the ranks of torchrun's attempts meet.
#[derive(Clone, Copy, Debug)]
enum Store {
    /// As torchrun has it unless it is told otherwise.
    Shared,
    PerAttempt,
}

/// What became of torchrun's jobs.
#[derive(Default)]
struct Outcomes {
    killed: Vec<Outcome>,
    frozen: Vec<Outcome>,
}

/// The lines of Paceline's own measurements: what, and the rest of the line.
fn paceline(faults: u32, limit: Duration) -> Result<Vec<(String, String)>> {
    let mut command = paceline_tests(&["--", "measure"]);
    command.env("PACELINE_MEASURE_FAULTS", faults.to_string());
    let mut found = Vec::new();
    let status = process::observe(command, Watch::Both, limit, &mut |line| {
        if let Some((what, times)) = line.split_once(": ").filter(|(_, times)| times.contains(" times, p50 "))
        {
            found.push((what.to_owned(), times.to_owned()));
        }
    })?;
    must_succeed(status, "cargo test -- measure")?;
    Ok(found)
}

fn paceline_tests(arguments: &[&str]) -> Command {
    let words = ["test", "--release", "--locked", "--package", "paceline", "--test", "elastic"];
    cargo(&[&words[..], &["--test", "elastic_nodes"], arguments].concat())
}

/// What became of a job of torchrun's after a fault: the time until all ranks had applied a step again, or nothing.
type Outcome = Option<Duration>;

/// What is known of a job of torchrun's.
#[derive(Default)]
struct Watched {
    /// The process and the newest step of each rank, before the fault.
    ranks: BTreeMap<usize, (u32, u64)>,
    /// When the fault was, in microseconds since 1970.
    struck: Option<u128>,
    /// When each rank had applied its first step after it, as another process.
    again: BTreeMap<usize, u128>,
}

impl Watched {
    /// Takes a line in, and says whether it is time for the fault.
    fn read(&mut self, line: &str) -> bool {
        let said = line.split_once("applied ").map_or("", |(_, said)| said);
        let words: Vec<&str> = said.split_whitespace().collect();
        let [step, _, attempt, _, rank, _, pid, _, at] = words[..] else { return false };
        let (Ok(step), Ok(rank), Ok(pid), Ok(at)) = (step.parse(), rank.parse(), pid.parse(), at.parse())
        else {
            return false;
        };
        match (self.struck, attempt) {
            (None, "0") => {
                self.ranks.insert(rank, (pid, step));
                self.ranks.len() == RANKS && self.ranks.values().all(|&(_, step)| step >= WARM)
            }
            (Some(_), "0") | (None, _) => false,
            (Some(_), _) => {
                self.again.entry(rank).or_insert(at);
                false
            }
        }
    }

    fn outcome(&self) -> Outcome {
        let last = *self.again.values().max()?;
        let elapsed_us = last.checked_sub(self.struck?)?;
        (self.again.len() == RANKS).then(|| Duration::from_micros(elapsed_us as u64))
    }
}

/// One job of torchrun's, in which a rank is sent a signal.
fn torchrun_fault(torchrun: &Torchrun, store: Store, signal: &str, victim: usize) -> Result<Outcome> {
    let mut command = Command::new(torchrun.python());
    command.args(["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]);
    command.args(["--nproc-per-node", &RANKS.to_string()]);
    command.arg(workspace::root().join("xtask/torchrun/faults.py")).envs(torchrun.environment());
    if let Store::PerAttempt = store {
        command.env("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1");
    }
    let mut watched = Watched::default();
    let (started, mut struck) = (Instant::now(), None);
    let ended = process::listen_while(command, Watch::Both, START + PATIENCE, &mut |line| {
        if line.is_some_and(|line| watched.read(line)) {
            let (pid, _) = watched.ranks[&victim];
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            watched.struck = Some(now.as_micros());
            struck = Some(Instant::now());
            // A process that has just ended by itself shows as a job without an outcome.
            let _ = Command::new("kill").args([signal, &pid.to_string()]).status();
        }
        watched.outcome().is_none() && struck.is_none_or(|at| at.elapsed() < PATIENCE)
    });
    watched.struck.with_context(|| format!("torchrun's ranks did not get to step {WARM}: {ended:?}"))?;
    let outcome = watched.outcome();
    let words = outcome.map_or("never".to_owned(), |after| format!("{after:?} later"));
    println!(
        "torchrun, {store:?}, kill {signal} {victim}: all went on {words}; {:?} in all",
        started.elapsed()
    );
    Ok(outcome)
}

fn table(ours: &[(String, String)], [shared, per_attempt]: &[Outcomes; 2]) -> String {
    let mut text =
        "| event → the next step is applied by all | Paceline | torchrun | with a store for each attempt |\n\
                    |---|---|---|---|\n"
            .to_owned();
    for (what, times) in ours {
        let [theirs, other] = match what.as_str() {
            "SIGKILL" => [shown(&shared.killed), shown(&per_attempt.killed)],
            "SIGSTOP" => [shown(&shared.frozen), shown(&per_attempt.frozen)],
            _ => ["-".to_owned(), "-".to_owned()],
        };
        text += &format!("| {what} | {times} | {theirs} | {other} |\n");
    }
    text + "\ntorchrun starts all ranks again, and the program begins anew: it keeps no step. Paceline's survivors go on. \
            Unless it is told otherwise (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`) its attempts share one store, where ranks \
            find the addresses of those that were stopped.\n"
}

/// torchrun's times in words.
fn shown(outcomes: &[Outcome]) -> String {
    let mut times: Vec<Duration> = outcomes.iter().flatten().copied().collect();
    times.sort_unstable();
    let (never, all) = (outcomes.len() - times.len(), outcomes.len());
    let hung = format!("{never} of {all} times no step within {} s", PATIENCE.as_secs());
    match (times.first(), times.last()) {
        (Some(least), Some(most)) => {
            let median = times[times.len() / 2];
            let ms = |time: &Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
            format!("{all} times, {} to {}, median {}; {hung}", ms(least), ms(most), ms(&median))
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
        let mut watched = Watched::default();
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
        assert_eq!(shown(&[None]), "1 of 1 times no step within 30 s");
        let text = shown(&[Some(ms(1500)), None, Some(ms(1200)), Some(ms(1900))]);
        assert_eq!(text, "4 times, 1200 ms to 1900 ms, median 1500 ms; 1 of 4 times no step within 30 s");
    }
}
