//! What is explored, and what must be found there.
#![expect(clippy::print_stderr, reason = "how many states there were is the result")]

use std::collections::BTreeSet;
use std::time::Instant;

use super::*;

const NODES: Bounds = Bounds {
    nodes: 2,
    missing: Missing::Nothing,
    steps: 2,
    view_changes: 1,
    rounds: 1,
    crashes: 1,
    suspicions: None,
    joins: 0,
    impatience: 1,
    questions: 0,
    catch_up: CatchUp::Results,
    pipes: Pipes::Slow,
    mutation: Mutation::None,
};

const INSTANT: Bounds = Bounds { pipes: Pipes::Instant, ..NODES };

/// Explores, says how far, and whether that was everything. All of `reached` must have been seen: what cannot happen in
/// a model is not checked there.
fn holds(name: &str, bounds: Bounds, limit: usize, reached: &[&'static str]) -> bool {
    let began = Instant::now();
    let explored = bounds.explore(limit);
    let (states, extent) = (explored.states, if explored.whole { "all" } else { "not all" });
    let seconds = began.elapsed().as_secs_f32();
    eprintln!("{name}: {states} states, {extent}; {seconds:.1} s; {:?}", explored.reached);
    assert_eq!(explored.violation, None, "{name}");
    let reached = BTreeSet::from_iter(reached.iter().copied());
    let missed: Vec<_> = reached.difference(&explored.reached).collect();
    assert!(missed.is_empty(), "{name}: {missed:?} in {states} states");
    explored.whole
}

/// How many states are generated of what is not explored as a whole; by command, with a higher one, further.
fn limit() -> usize {
    std::env::var("PACELINE_MODEL_STATES").map_or(100_000, |n| n.parse().expect("a number"))
}

const STABLE: [&str; 2] = [A_VIEW_FOLLOWS, A_STEP_IS_STABLE];
const FETCHED: [&str; 2] = [A_VIEW_FOLLOWS, A_STEP_IS_FETCHED];

#[test]
fn two_nodes_violate_nothing_in_any_order_of_events() {
    assert!(holds("2 nodes, 1 view change, 1 ballot, 1 crash", NODES, usize::MAX, &STABLE));
    let ballots = Bounds { rounds: 2, ..INSTANT };
    let name = "2 nodes, 1 view change, 2 ballots, 1 crash, instant pipes";
    assert!(holds(name, ballots, usize::MAX, &STABLE));
}

#[test]
fn more_nodes_and_view_changes_violate_nothing_as_far_as_explored() {
    let limit = limit();
    holds("2 nodes, 2 view changes, 1 crash", Bounds { view_changes: 2, ..INSTANT }, limit, &STABLE);
    holds("3 nodes, 1 view change, 1 ballot", Bounds { nodes: 3, crashes: 0, ..INSTANT }, limit, &STABLE);
    let three = Bounds { nodes: 3, rounds: 2, suspicions: Some(0), ..INSTANT };
    holds("3 nodes, 1 view change, 2 ballots, 1 crash", three, limit, &FETCHED);
    let suspicion = Bounds { crashes: 0, suspicions: Some(1), ..three };
    holds("3 nodes, 1 view change, 2 ballots, 1 suspicion", suspicion, limit, &FETCHED);
    let four = Bounds { nodes: 4, steps: 1, impatience: 0, ..INSTANT };
    let suspicion = Bounds { crashes: 0, suspicions: Some(1), ..four };
    holds("4 nodes, 1 view change, 1 suspicion", suspicion, limit, &FETCHED);
    let crash = Bounds { suspicions: Some(0), ..four };
    holds("4 nodes, 1 view change, 1 crash", crash, limit, &FETCHED);
}

/// A worker is to come in, under a launcher that is a member.
const WORKER: Bounds = Bounds { missing: Missing::Worker, steps: 3, crashes: 0, impatience: 0, ..INSTANT };
/// A launcher with its worker is.
const NODE: Bounds = Bounds { missing: Missing::Node, ..WORKER };
/// Processes that crash or are removed come in again.
const AGAIN: Bounds = Bounds { joins: 1, view_changes: 2, impatience: 0, ..INSTANT };

#[test]
fn a_newcomer_violates_nothing_in_any_order_of_events_of_two_nodes() {
    let all = |name, bounds, reached: &[_]| assert!(holds(name, bounds, usize::MAX, reached), "{name}");
    let worker = [A_STEP_IS_STABLE, A_STEP_IS_FETCHED, A_NEW_WORKER_RUNS];
    all("1 worker and a new one, 1 view change, 1 crash", Bounds { crashes: 1, ..WORKER }, &worker);
    all("1 worker and a new one that asks twice, 1 view change", Bounds { questions: 1, ..WORKER }, &worker);
    let changes = Bounds { view_changes: 2, crashes: 1, ..WORKER };
    all("1 worker and a new one, 2 view changes, 1 crash", changes, &worker);
    let state = Bounds { catch_up: CatchUp::State, steps: 2, crashes: 1, impatience: 1, ..WORKER };
    all("1 worker and a new one, state mode, 1 view change, 1 crash", state, &worker);
    let node = Bounds { view_changes: 2, crashes: 1, impatience: 1, ..NODE };
    all("1 node and a new one, 2 view changes, 1 crash", node, &[A_NEW_NODE_RUNS, A_NEW_LAUNCHER_VOTES]);
}

#[test]
fn whoever_is_lost_and_comes_again_violates_nothing_in_any_order_of_events_of_two_nodes() {
    let all = |name, bounds, reached: &[_]| assert!(holds(name, bounds, usize::MAX, reached), "{name}");
    let crash = Bounds { suspicions: Some(0), steps: 3, ..AGAIN };
    all("2 nodes, 1 crash, 1 join", crash, &[A_NEW_WORKER_RUNS, A_NEW_NODE_RUNS]);
    let state = Bounds { catch_up: CatchUp::State, steps: 2, ..crash };
    all("2 nodes, 1 crash, 1 join, state mode", state, &[A_NEW_WORKER_RUNS, A_NEW_NODE_RUNS]);
    let removed = Bounds { suspicions: Some(1), crashes: 0, ..AGAIN };
    all("2 nodes, 1 suspicion, 1 join", removed, &[A_REMOVED_WORKER_RUNS, A_REMOVED_NODE_RUNS]);
}

#[test]
fn a_newcomer_violates_nothing_in_any_order_of_events_of_three_nodes() {
    let all = |name, bounds, reached: &[_]| assert!(holds(name, bounds, usize::MAX, reached), "{name}");
    let three = |bounds| Bounds { nodes: 3, suspicions: Some(0), ..bounds };
    all("2 workers and a new one, no losses", three(WORKER), &[A_STEP_IS_FETCHED, A_NEW_WORKER_RUNS]);
    all("2 nodes and a new one, no losses", three(NODE), &[A_STEP_IS_FETCHED, A_NEW_NODE_RUNS]);
    let suspicions = Bounds { catch_up: CatchUp::State, steps: 2, suspicions: None, ..three(NODE) };
    let name = "2 nodes and a new one, any suspicions, state mode";
    all(name, suspicions, &[A_STEP_IS_FETCHED, A_NEW_NODE_RUNS]);
}

#[test]
fn more_joins_violate_nothing_as_far_as_explored() {
    let limit = limit();
    let slow = |bounds| Bounds { pipes: Pipes::Slow, suspicions: Some(0), ..bounds };
    holds("1 worker and a new one, slow pipes", slow(WORKER), limit, &[A_NEW_WORKER_RUNS]);
    holds("1 node and a new one, slow pipes", slow(NODE), limit, &[A_NEW_NODE_RUNS]);
    let crashes = Bounds { catch_up: CatchUp::State, view_changes: 3, crashes: 2, joins: 2, ..AGAIN };
    let crashes = Bounds { suspicions: Some(0), ..crashes };
    let both = [A_NEW_WORKER_RUNS, A_NEW_NODE_RUNS];
    holds("2 nodes, 2 crashes, 2 joins, state mode", crashes, limit, &both);
    let three = Bounds { nodes: 3, crashes: 1, joins: 1, view_changes: 2, ..crashes };
    holds("3 nodes, 1 crash, 1 join, state mode", three, limit, &[A_NEW_WORKER_RUNS]);
    let crash = Bounds { nodes: 3, suspicions: Some(0), crashes: 1, ..WORKER };
    holds("2 workers and a new one, 1 crash", crash, limit, &[A_NEW_WORKER_RUNS]);
    let four =
        Bounds { nodes: 4, catch_up: CatchUp::State, steps: 1, crashes: 0, missing: Missing::Node, ..crash };
    holds("3 nodes and a new one, no losses, state mode", four, limit, &[A_NEW_NODE_RUNS]);
}

#[test]
fn defects_of_the_consensus_are_found() {
    let ballots = Bounds { rounds: 2, ..INSTANT };
    for (mutation, bounds) in [
        (Mutation::UnilateralCommit, ballots),
        (Mutation::SkipSync, ballots),
        (Mutation::ExternaliseApplied, INSTANT),
        (Mutation::NoTieBreak, INSTANT),
        (Mutation::IgnoreAccepted, Bounds { impatience: 2, ..ballots }),
        (Mutation::CertifiedDeathShrinksQuorum, INSTANT),
        (Mutation::ProposersHistory, ballots),
    ] {
        is_found(Bounds { mutation, ..bounds });
    }
}

/// Without joins nobody fetches who has never had the state of a view, and nobody returns.
#[test]
fn defects_of_joins_are_found() {
    let worker = Bounds { view_changes: 2, crashes: 1, ..WORKER };
    is_found(Bounds { mutation: Mutation::AnyReport, ..worker });
    is_found(Bounds { mutation: Mutation::SameIncarnation, crashes: 0, ..AGAIN });
}

fn is_found(bounds: Bounds) {
    let Explored { states, violation, .. } = bounds.explore(1_000_000);
    eprintln!("{:?}: {states} states; {violation:?}", bounds.mutation);
    assert!(violation.is_some(), "{:?} was not found in {states} states", bounds.mutation);
}
