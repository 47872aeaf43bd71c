//! What is simulated, and what must come out.
#![expect(clippy::print_stderr, reason = "how many seeds a defect takes is what one wants to read")]

use std::time::Duration;

use super::super::mutation::Mutation;
use super::super::settings::{CatchUp, Fence, Job, Timing};
use super::super::view::Mode;
use super::ms;
use super::world::World;

/// The last moment of a fault, and how long after it all must be well again: a launcher that gives up takes
/// 3 s, its restart 1 s, and that may happen to one after the other.
const PEACE: Duration = ms(6_000);
const RECOVERY: Duration = ms(15_000);

fn timing() -> Timing {
    Timing { give_up: ms(3_000), ..Timing::default() }
}

fn job_of(seed: u64) -> Job {
    let mut rng = fastrand::Rng::with_seed(seed ^ 0x5eed);
    let seats = rng.u32(1..6);
    let workers_per_launcher = if seats < 4 { rng.u16(1..4) } else { rng.u16(1..3) };
    let workers = seats as u16 * workers_per_launcher;
    let (mode, spares, slots) = match rng.usize(0..4) {
        0..2 => (Mode::Slots, 0, workers + rng.u16(0..3)),
        2 => (Mode::Shrink, 0, workers),
        _ => {
            let spares = rng.u16(0..workers.min(2));
            (Mode::Shrink, spares, workers - spares)
        }
    };
    let fence = if rng.u32(0..5) == 0 { Fence::Lease } else { Fence::Majority };
    let (catch_up, timing) = (CatchUp::Results, timing());
    Job { seats, workers_per_launcher, slots, spares, mode, catch_up, fence, timing }
}

/// The same job with spares, or one that takes states over rather than results, or both. Drawn apart, so that a seed above
/// stays what it was.
fn other_job_of(seed: u64) -> Job {
    let mut rng = fastrand::Rng::with_seed(seed ^ 0x59a2e);
    let job = Job { spares: 0, ..job_of(seed) };
    let workers = job.seats as u16 * job.workers_per_launcher;
    let catch_up = [CatchUp::Results, CatchUp::State, CatchUp::State][rng.usize(0..3)];
    let has_spares = catch_up == CatchUp::Results || rng.bool();
    let spares = if has_spares { rng.u16(workers.min(2) - 1..workers.min(4)) } else { 0 };
    let slots = if job.mode == Mode::Slots { job.slots } else { workers - spares };
    Job { slots, spares, catch_up, ..job }
}

/// How long a state and a result are under way: from much less than a step to many of them.
fn work_of(seed: u64) -> (Duration, Duration) {
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xb17e5);
    let state_ms = if rng.bool() { 20 } else { rng.u64(20..400) };
    (ms(state_ms), ms(if rng.bool() { 2 } else { rng.u64(2..=state_ms) }))
}

/// In how many parts a state comes at most. Drawn apart, as above.
fn stripes_of(seed: u64) -> usize {
    fastrand::Rng::with_seed(seed ^ 0x57e1).usize(1..5)
}

/// How a run ended: the violated invariant, if any.
struct Outcome {
    violation: Option<String>,
    trace: Vec<String>,
    events: u64,
    stable: usize,
    epochs: usize,
    foundings: u32,
    striped: u64,
}

fn simulate(seed: u64, job: Job, mutation: Mutation, traced: bool) -> Outcome {
    let (state_work, result_work) = work_of(seed);
    let world = World::new(seed, job, mutation, traced).with_work(state_work, result_work);
    let mut world = world.with_stripes(stripes_of(seed));
    world.spite = 8;
    world.plan_faults(ms(500), PEACE);
    world.run_until(PEACE);
    let mut end = PEACE;
    while end < PEACE + RECOVERY && world.checks.violation.is_none() && world.whole().is_err() {
        end += ms(250);
        world.run_until(end);
    }
    if let Err(reason) = world.whole() {
        world.checks.fail(|| format!("I14: {} s after the last fault {reason}", RECOVERY.as_secs()));
    }
    Outcome {
        violation: world.checks.violation,
        trace: world.trace.unwrap_or_default(),
        events: world.events,
        stable: world.checks.stable.len(),
        epochs: world.checks.decisions.len(),
        foundings: world.checks.foundings,
        striped: world.striped,
    }
}

/// Runs a seed again with a trace, and says what happened.
fn explain(seed: u64, job: Job, mutation: Mutation) -> String {
    let again = simulate(seed, job, mutation, true);
    let lines: usize = std::env::var("PACELINE_SIM_LINES").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let tail = again.trace.len().saturating_sub(lines);
    let violation = again.violation.unwrap_or_else(|| "nothing, the second time".into());
    format!("{}\nseed {seed}, {job:?}: {violation}", again.trace[tail..].join("\n"))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn no_seed_violates_an_invariant_and_every_job_trains_on() {
    no_seed_fails(500, job_of);
}

#[test]
fn with_spares_and_with_states_for_results_no_seed_violates_an_invariant_either() {
    no_seed_fails(300, other_job_of);
}

fn no_seed_fails(default: u64, job_of: fn(u64) -> Job) {
    let (first, count) = (number("PACELINE_SIM_SEED", 0), number("PACELINE_SIM_SEEDS", default));
    let (mut events, mut stable, mut epochs, mut foundings, mut striped) = (0, 0, 0, 0, 0);
    for seed in first..first + count {
        let outcome = simulate(seed, job_of(seed), Mutation::None, false);
        assert!(outcome.violation.is_none(), "{}", explain(seed, job_of(seed), Mutation::None));
        events += outcome.events;
        stable += outcome.stable;
        epochs += outcome.epochs;
        foundings += outcome.foundings;
        striped += outcome.striped;
    }
    eprintln!(
        "{count} seeds: {events} events, {stable} stable steps, {epochs} epochs, {foundings} foundings, {striped} states in \
         parts"
    );
    assert!(count < 100 || striped > 0, "no state came in parts in {count} seeds");
}

#[test]
fn every_mutant_is_found() {
    let limit = number("PACELINE_SIM_MUTANT_SEEDS", 500);
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        let violation = |seed: &u64| simulate(*seed, job_of(*seed), mutation, false).violation;
        match (0..limit).find_map(|seed| violation(&seed).map(|violation| (seed, violation))) {
            Some((seed, violation)) => eprintln!("{mutation:?}: found by seed {seed}: {violation}"),
            None => missed.push(mutation),
        }
    }
    assert!(missed.is_empty(), "not found in {limit} seeds: {missed:?}");
}

#[test]
fn the_same_seed_is_the_same_run() {
    let trace = || simulate(3, job_of(3), Mutation::None, true).trace;
    assert_eq!(trace(), trace());
}
