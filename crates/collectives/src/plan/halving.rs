//! Recursive halving and doubling: the bytes of a ring in 2 log2 n latencies.
//!
//! To reduce, ranks at half of the world's distance exchange halves of what they have, then ranks at a
//! quarter of it quarters, until each has the sums of its own chunk; to gather, the same backwards. Sums
//! come together in an order of their own for each chunk, so reductions are allowed under `order=any`
//! only. Partial sums travel in the accumulator type: 16-bit floats are still rounded once.
//!
//! Where the ranks are no power of two, each of the first even ranks hands its elements to its odd
//! neighbour before, which stands for both, and gets the results after. That costs two more latencies, and
//! the bytes of the whole once or twice more on those ranks.
//!
//! Source: Rabenseifner, *Optimization of Collective Reduction Operations*, ICCS 2004; the folding as in
//! Thakur, Rabenseifner & Gropp, *Optimization of Collective Communication Operations in MPICH*, IJHPCA
//! 19(1), 2005, §4.

use std::ops::Range;

use super::{Local, Place, Plan, Round, Span};

/// The ranks that take part in the halving, and the pairs that one rank stands for.
#[derive(Clone, Copy)]
struct Fold {
    world_size: usize,
    /// A power of two.
    seats: usize,
}

impl Fold {
    fn of(plan: &Plan) -> Self {
        Self { world_size: plan.world_size, seats: 1 << plan.world_size.ilog2() }
    }

    /// The number of pairs: ranks 0 and 1, 2 and 3, ….
    fn pairs(self) -> usize {
        self.world_size - self.seats
    }

    /// The halvings of a segment.
    fn steps(self) -> usize {
        self.seats.trailing_zeros() as usize
    }

    fn role(self, rank: usize) -> Role {
        let pairs = self.pairs();
        match rank {
            _ if rank >= 2 * pairs => Role::Single { seat: rank - pairs },
            _ if rank.is_multiple_of(2) => Role::StoodFor,
            _ => Role::ForTwo { seat: rank / 2 },
        }
    }

    fn rank(self, seat: usize) -> usize {
        if seat < self.pairs() { 2 * seat + 1 } else { seat + self.pairs() }
    }

    /// The chunks of all ranks that these seats stand for.
    fn chunks(self, seats: Range<usize>) -> Range<usize> {
        let first = |seat: usize| seat + seat.min(self.pairs());
        first(seats.start)..first(seats.end)
    }
}

/// A rank's part in the folding.
#[derive(Clone, Copy)]
enum Role {
    /// Takes part for itself.
    Single { seat: usize },
    /// Takes part for itself and the rank before it.
    ForTwo { seat: usize },
    /// The rank after it takes part for it.
    StoodFor,
}

impl Role {
    fn seat(self) -> Option<usize> {
        match self {
            Self::Single { seat } | Self::ForTwo { seat } => Some(seat),
            Self::StoodFor => None,
        }
    }
}

/// What a round of a segment is for.
enum Phase {
    Start,
    FoldIn,
    Halve { step: usize },
    Double { step: usize },
    FoldOut,
}

/// The rounds of a segment of a reduce_scatter.
pub(super) fn reduce_scatter_rounds(plan: &Plan) -> usize {
    let fold = Fold::of(plan);
    1 + fold.steps() + if fold.pairs() > 0 { 2 } else { 0 }
}

/// The rounds of a segment of an all_reduce.
pub(super) fn all_reduce_rounds(plan: &Plan) -> usize {
    reduce_scatter_rounds(plan) + Fold::of(plan).steps()
}

pub(super) fn all_reduce(plan: &Plan, index: usize, round: &mut Round) {
    let fold = Fold::of(plan);
    let (segment, index) = (index / all_reduce_rounds(plan), index % all_reduce_rounds(plan));
    let span = |chunk: usize| plan.segment(plan.chunk(chunk), segment);
    let phase = phase(fold, index, fold.steps());
    reduce(plan, &phase, round, span, span);
    let role = fold.role(plan.rank);
    match (phase, role) {
        (Phase::Double { step }, Role::Single { seat } | Role::ForTwo { seat }) => {
            let distance = 1 << step;
            let (own, theirs) = sides(seat, distance);
            let peer = fold.rank(seat ^ distance);
            fold.chunks(own).for_each(|chunk| round.send(peer, Place::Output, span(chunk)));
            fold.chunks(theirs).for_each(|chunk| round.receive(peer, Place::Output, span(chunk)));
        }
        (Phase::FoldOut, Role::ForTwo { .. }) => {
            (0..plan.world_size).for_each(|chunk| round.send(plan.rank - 1, Place::Output, span(chunk)));
        }
        (Phase::FoldOut, Role::StoodFor) => {
            (0..plan.world_size).for_each(|chunk| round.receive(plan.rank + 1, Place::Output, span(chunk)));
        }
        _ => {}
    }
}

pub(super) fn reduce_scatter(plan: &Plan, index: usize, round: &mut Round) {
    let fold = Fold::of(plan);
    let (segment, index) = (index / reduce_scatter_rounds(plan), index % reduce_scatter_rounds(plan));
    let share = |rank: usize| plan.shares.of_rank(rank);
    let span = |chunk: usize| plan.segment(share(chunk), segment);
    let output = |chunk: usize| span(chunk).at(span(chunk).start - share(chunk).start);
    let phase = phase(fold, index, 0);
    reduce(plan, &phase, round, span, output);
    match (phase, fold.role(plan.rank)) {
        (Phase::FoldOut, Role::ForTwo { .. }) => {
            let chunk = plan.rank - 1;
            round.send(plan.rank - 1, Place::Sum { chunk }, span(chunk));
        }
        (Phase::FoldOut, Role::StoodFor) => {
            let chunk = plan.rank;
            round.receive(plan.rank + 1, Place::Sum { chunk }, span(chunk));
            finish(chunk, output(chunk), round);
        }
        _ => {}
    }
}

fn phase(fold: Fold, index: usize, doublings: usize) -> Phase {
    let folded = usize::from(fold.pairs() > 0);
    match index {
        0 => Phase::Start,
        1 if folded == 1 => Phase::FoldIn,
        _ if index <= folded + fold.steps() => Phase::Halve { step: index - 1 - folded },
        _ if index <= folded + fold.steps() + doublings => {
            Phase::Double { step: index - 1 - folded - fold.steps() }
        }
        _ => Phase::FoldOut,
    }
}

/// The rounds after which every seat has the sums of the chunks it stands for. Those that it needs itself
/// are finished: of an all_reduce all, of a reduce_scatter its own.
fn reduce(
    plan: &Plan,
    phase: &Phase,
    round: &mut Round,
    span: impl Fn(usize) -> Span,
    output: impl Fn(usize) -> Span,
) {
    let fold = Fold::of(plan);
    let role = fold.role(plan.rank);
    let all = 0..plan.world_size;
    match (phase, role) {
        (Phase::Start, _) => {
            for chunk in all.filter(|&chunk| !span(chunk).is_empty()) {
                round.locals.push(Local::StartSum { chunk, input: span(chunk) });
            }
        }
        (Phase::FoldIn, Role::StoodFor) => {
            all.for_each(|chunk| round.send(plan.rank + 1, Place::Sum { chunk }, span(chunk)));
        }
        (Phase::FoldIn, Role::ForTwo { .. }) => add(plan.rank - 1, all, round, &span),
        (Phase::Halve { step }, Role::Single { seat } | Role::ForTwo { seat }) => {
            let distance = fold.seats >> (step + 1);
            let (own, theirs) = sides(seat, distance);
            let peer = fold.rank(seat ^ distance);
            fold.chunks(theirs).for_each(|chunk| round.send(peer, Place::Sum { chunk }, span(chunk)));
            add(peer, fold.chunks(own), round, &span);
        }
        _ => {}
    }
    let last = match phase {
        Phase::Start => fold.seats == 1,
        Phase::Halve { step } => step + 1 == fold.steps(),
        _ => false,
    };
    if let (true, Some(seat)) = (last, role.seat()) {
        let mine = |&chunk: &usize| plan.result(chunk, plan.rank).is_some();
        fold.chunks(seat..seat + 1).filter(mine).for_each(|chunk| finish(chunk, output(chunk), round));
    }
}

/// Adds what `peer` has of some chunks.
fn add(peer: usize, chunks: Range<usize>, round: &mut Round, span: &impl Fn(usize) -> Span) {
    for chunk in chunks.filter(|&chunk| !span(chunk).is_empty()) {
        round.receive(peer, Place::ReceivedSum { chunk }, span(chunk));
        round.locals.push(Local::AddToSum { chunk, len: span(chunk).len });
    }
}

fn finish(chunk: usize, output: Span, round: &mut Round) {
    if !output.is_empty() {
        round.locals.push(Local::FinishSum { chunk, output });
    }
}

/// Of the seats that a seat and the one `distance` away have between them: the own half and the other's.
fn sides(seat: usize, distance: usize) -> (Range<usize>, Range<usize>) {
    let start = |seat: usize| seat / distance * distance;
    let half = |start: usize| start..start + distance;
    (half(start(seat)), half(start(seat ^ distance)))
}
