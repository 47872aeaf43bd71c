//! Owner-computes direct exchange: element e has one owner, who adds all contributions in tree order.
//!
//! Two latencies instead of a ring's 2(n-1), and the order of summation does not depend on anything.

use super::{Local, Place, Plan, Round, Span};

/// As many as the longest part has segments; one more where results are passed on.
pub(super) fn reduce_rounds(plan: &Plan) -> usize {
    let longest = (0..plan.world_size).map(|owner| plan.owned(owner).len).max().unwrap_or(0);
    let passes_on = |peer| plan.result(plan.rank, peer).is_some() || plan.result(peer, plan.rank).is_some();
    match plan.segments(longest) {
        0 => 0,
        segments => segments + usize::from(plan.peers().any(passes_on)),
    }
}

/// Every collective that reduces. The reduction of segment k and the passing on of segment k - 1 share a
/// round.
pub(super) fn reduce(plan: &Plan, index: usize, round: &mut Round) {
    let contribution = |owner: usize| plan.segment(plan.owned(owner), index);
    let before = |span: Span| match index.checked_sub(1) {
        Some(before) => plan.segment(span, before),
        None => Span { start: span.start, len: 0 },
    };
    let own_result = plan.result(plan.rank, plan.rank);
    for peer in plan.peers() {
        round.send(peer, Place::Input, contribution(peer));
        match (plan.result(plan.rank, peer), own_result) {
            (Some(_), Some(own)) => round.send(peer, Place::Output, before(own)),
            (Some(theirs), None) => round.send(peer, Place::Reduced, before(theirs)),
            (None, _) => {}
        }
        round.receive(peer, Place::Staged, contribution(plan.rank));
        if let Some(result) = plan.result(peer, plan.rank) {
            round.receive(peer, Place::Output, before(result));
        }
    }
    let input = contribution(plan.rank);
    if input.is_empty() {
        return;
    }
    round.locals.push(match own_result {
        Some(result) => Local::ReduceStaged { input, output_start: plan.segment(result, index).start },
        None => Local::ReduceStagedAside { input },
    });
}

/// One latency, for what is so short that reducing it everywhere costs less than a second one.
pub(super) fn one_shot(plan: &Plan, index: usize, round: &mut Round) {
    let segment = plan.segment(plan.whole(), index);
    for peer in plan.peers() {
        round.send(peer, Place::Input, segment);
        round.receive(peer, Place::Staged, segment);
    }
    round.locals.push(Local::ReduceStaged { input: segment, output_start: segment.start });
}

/// As many as the longest piece to or from this rank has segments.
pub(super) fn copy_rounds(plan: &Plan) -> usize {
    let pieces = (0..plan.world_size)
        .flat_map(|other| [plan.piece(plan.rank, other), plan.piece(other, plan.rank)])
        .flatten();
    plan.segments(pieces.map(|(input, _)| input.len).max().unwrap_or(0))
}

/// Every collective that only copies: each piece goes straight to where it belongs.
pub(super) fn copy(plan: &Plan, index: usize, round: &mut Round) {
    for peer in plan.peers() {
        if let Some((input, _)) = plan.piece(plan.rank, peer) {
            round.send(peer, Place::Input, plan.segment(input, index));
        }
        if let Some((_, output)) = plan.piece(peer, plan.rank) {
            round.receive(peer, Place::Output, plan.segment(output, index));
        }
    }
    if let Some((input, output)) = plan.piece(plan.rank, plan.rank) {
        let (input, output) = (plan.segment(input, index), plan.segment(output, index));
        if !input.is_empty() {
            round.locals.push(Local::Copy { input, output_start: output.start });
        }
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
