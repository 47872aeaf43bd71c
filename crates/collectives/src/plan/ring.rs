//! Rings and chains: every rank talks to two neighbours only.
//!
//! The best use of a link when many ranks share a network, at 2(n-1) latencies. Sums run around the
//! ring, another order for each chunk, so reductions are allowed under `order=any` only. The partial
//! sums travel in the accumulator type: 16-bit floats are still rounded once.

use super::{Local, Place, Plan, Round, Span};

/// Rounds per segment: one to begin the partial, n - 1 to reduce, n - 1 to gather.
pub(super) fn all_reduce_rounds(plan: &Plan) -> usize {
    2 * plan.world_size - 1
}

pub(super) fn all_reduce(plan: &Plan, index: usize, round: &mut Round) {
    let (segment, step) = (index / all_reduce_rounds(plan), index % all_reduce_rounds(plan));
    let span = |chunk: usize| plan.segment(plan.chunk(chunk), segment);
    if step < plan.world_size {
        reduce_step(plan, step, round, span, |own| own);
    } else {
        gather_step(plan, step - plan.world_size, round, span);
    }
}

pub(super) fn reduce_scatter(plan: &Plan, index: usize, round: &mut Round) {
    let (segment, step) = (index / plan.world_size, index % plan.world_size);
    let span = |rank: usize| plan.segment(plan.shares.of_rank(rank), segment);
    reduce_step(plan, step, round, span, |own| own.at(own.start - plan.shares.of_rank(plan.rank).start));
}

pub(super) fn all_gather(plan: &Plan, index: usize, round: &mut Round) {
    let (segment, step) = (index / plan.world_size, index % plan.world_size);
    let span = |rank: usize| plan.segment(plan.shares.of_rank(rank), segment);
    if step == 0 {
        let input = plan.segment(plan.shares.of_rank(plan.rank).at(0), segment);
        return round.locals.push(Local::Copy { input, output_start: span(plan.rank).start });
    }
    gather_step(plan, step - 1, round, span);
}

/// Step 0 begins the partial of the chunk that ends, n - 1 steps later, at its owner on the left.
fn reduce_step(
    plan: &Plan,
    step: usize,
    round: &mut Round,
    span: impl Fn(usize) -> Span,
    output: impl Fn(Span) -> Span,
) {
    let chunk_behind = |distance: usize| (plan.rank + 2 * plan.world_size - distance) % plan.world_size;
    let received = span(chunk_behind(step + 1));
    if step == 0 {
        round.locals.push(Local::StartPartial { input: received });
    } else {
        round.send(right(plan), Place::Partial, span(chunk_behind(step)));
        round.receive(left(plan), Place::Partial, received);
        round.locals.push(Local::AddToPartial { input: received });
    }
    if step == plan.world_size - 1 {
        round.locals.push(Local::FinishPartial { output: output(received) });
    }
}

/// Passes on the chunk that came last, beginning with the own one.
fn gather_step(plan: &Plan, step: usize, round: &mut Round, span: impl Fn(usize) -> Span) {
    let chunk_behind = |distance: usize| (plan.rank + plan.world_size - distance) % plan.world_size;
    round.send(right(plan), Place::Output, span(chunk_behind(step)));
    round.receive(left(plan), Place::Output, span(chunk_behind(step + 1)));
}

/// Segment k comes in while segment k - 1 goes out.
pub(super) fn chain_rounds(plan: &Plan) -> usize {
    match plan.segments(plan.whole().len) {
        0 => 0,
        segments => segments + 1,
    }
}

pub(super) fn broadcast(plan: &Plan, root: usize, index: usize, round: &mut Round) {
    let position = (plan.rank + plan.world_size - root) % plan.world_size;
    if position > 0 {
        round.receive(left(plan), Place::Output, plan.segment(plan.whole(), index));
    }
    if position + 1 < plan.world_size
        && let Some(before) = index.checked_sub(1)
    {
        round.send(right(plan), Place::Output, plan.segment(plan.whole(), before));
    }
}

/// The rank after the root begins the partial, which ends at the root.
pub(super) fn reduce(plan: &Plan, root: usize, index: usize, round: &mut Round) {
    let position = (plan.rank + 2 * plan.world_size - root - 1) % plan.world_size;
    let span = plan.segment(plan.whole(), index);
    if plan.rank != root
        && let Some(before) = index.checked_sub(1)
    {
        round.send(right(plan), Place::Partial, plan.segment(plan.whole(), before));
    }
    if span.is_empty() {
        return;
    }
    if position == 0 {
        round.locals.push(Local::StartPartial { input: span });
    } else {
        round.receive(left(plan), Place::Partial, span);
        round.locals.push(Local::AddToPartial { input: span });
    }
    if plan.rank == root {
        round.locals.push(Local::FinishPartial { output: span });
    }
}

fn right(plan: &Plan) -> usize {
    (plan.rank + 1) % plan.world_size
}

fn left(plan: &Plan) -> usize {
    (plan.rank + plan.world_size - 1) % plan.world_size
}
