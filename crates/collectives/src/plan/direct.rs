//! Owner-computes direct exchange: element e has one owner, who adds all contributions in tree order.
//!
//! Two latencies instead of a ring's 2(n-1), and the order of summation does not depend on anything.

use super::{Local, Place, Plan, Round, Span};

/// The reduction of segment k and the distribution of segment k - 1 share a round.
pub(super) fn all_reduce_rounds(plan: &Plan) -> usize {
    match plan.segments(plan.chunk(0).len) {
        0 => 0,
        segments => segments + usize::from(plan.world_size > 1),
    }
}

pub(super) fn all_reduce(plan: &Plan, index: usize, round: &mut Round) {
    let contribution = |owner: usize| plan.segment(plan.chunk(owner), index);
    let result = |owner: usize| match index.checked_sub(1) {
        Some(before) => plan.segment(plan.chunk(owner), before),
        None => Span { start: 0, len: 0 },
    };
    for peer in plan.peers() {
        round.send(peer, Place::Input, contribution(peer));
        round.send(peer, Place::Output, result(plan.rank));
        round.receive(peer, Place::Staged, contribution(plan.rank));
        round.receive(peer, Place::Output, result(peer));
    }
    let own = contribution(plan.rank);
    if !own.is_empty() {
        round.locals.push(Local::ReduceStaged { input: own, output_start: own.start });
    }
}

pub(super) fn reduce_scatter(plan: &Plan, index: usize, round: &mut Round) {
    let chunk = |owner: usize| Span { start: owner * plan.len, len: plan.len };
    let own = plan.segment(chunk(plan.rank), index);
    for peer in plan.peers() {
        round.send(peer, Place::Input, plan.segment(chunk(peer), index));
        round.receive(peer, Place::Staged, own);
    }
    round.locals.push(Local::ReduceStaged { input: own, output_start: own.start - chunk(plan.rank).start });
}

pub(super) fn all_gather(plan: &Plan, index: usize, round: &mut Round) {
    let own = plan.segment(Span { start: 0, len: plan.len }, index);
    for peer in plan.peers() {
        round.send(peer, Place::Input, own);
        round.receive(peer, Place::Output, own.at(peer * plan.len + own.start));
    }
    round.locals.push(Local::Copy { input: own, output_start: plan.rank * plan.len + own.start });
}

pub(super) fn broadcast(plan: &Plan, root: usize, index: usize, round: &mut Round) {
    let span = plan.segment(Span { start: 0, len: plan.len }, index);
    if plan.rank != root {
        return round.receive(root, Place::Output, span);
    }
    for peer in plan.peers() {
        round.send(peer, Place::Output, span);
    }
}

/// After round t, this rank knows that the 2^(t+1) ranks up to itself have entered.
pub(super) fn barrier(plan: &Plan, index: usize, round: &mut Round) {
    let (world_size, distance) = (plan.world_size, 1 << index);
    let nothing = Span { start: 0, len: 0 };
    // Not Round::send: the message is that there is one.
    let to = (plan.rank + distance) % world_size;
    let from = (plan.rank + world_size - distance) % world_size;
    round.sends.push(super::Transfer { peer: to, place: Place::Input, span: nothing });
    round.receives.push(super::Transfer { peer: from, place: Place::Output, span: nothing });
}
