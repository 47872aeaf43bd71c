//! Replays every schedule symbolically and proves what it computes.
//!
//! The replayed network has no buffer at all: a message moves only when its sender and its receiver
//! are both in the round that names it, so a plan that passes here cannot deadlock on any window. Every
//! element is an expression over (rank, element) leaves; the final buffers are compared with the
//! expression that the collective promises. In-place calls share one buffer for input and output.

use std::collections::VecDeque;
use std::rc::Rc;

use super::{Local, Place, Plan, Round, Schedule, Shares, Span, Transfer};

#[derive(Debug, PartialEq, Eq)]
enum Value {
    /// Element of a rank's input.
    Leaf { rank: usize, element: usize },
    /// Left op right.
    Op(Expr, Expr),
    /// A buffer's content before the operation.
    Untouched,
}

type Expr = Rc<Value>;

fn leaf(rank: usize, element: usize) -> Expr {
    Rc::new(Value::Leaf { rank, element })
}

/// A buffer before the operation; its elements may share one value, which is never looked into.
fn untouched(len: usize) -> Vec<Expr> {
    let value = Rc::new(Value::Untouched);
    (0..len).map(|_| value.clone()).collect()
}

/// The tree over ranks `from..to`, by its definition.
fn tree(from: usize, to: usize, contribution: &dyn Fn(usize) -> Expr) -> Expr {
    match to - from {
        1 => contribution(from),
        count => {
            let middle = from + count.next_power_of_two() / 2;
            Rc::new(Value::Op(tree(from, middle, contribution), tree(middle, to, contribution)))
        }
    }
}

/// The contributions to a value, in any order.
fn leaves(value: &Expr, into: &mut Vec<(usize, usize)>) {
    match &**value {
        Value::Leaf { rank, element } => into.push((*rank, *element)),
        Value::Op(left, right) => {
            leaves(left, into);
            leaves(right, into);
        }
        Value::Untouched => panic!("a result is made of something that was never written"),
    }
}

struct Rank {
    plan: Plan,
    index: usize,
    round: Round,
    sends: VecDeque<Transfer>,
    receives: VecDeque<Transfer>,
    input: Vec<Expr>,
    /// `None` when the call is in place: the output is in the input's buffer.
    output: Option<Vec<Expr>>,
    /// Where input and output begin in their buffers.
    starts: (usize, usize),
    staged: Vec<Option<Vec<Expr>>>,
    partial: Vec<Expr>,
    received_partial: Option<Vec<Expr>>,
    reduced: Vec<Expr>,
    /// By chunk; a sum that is sent or finished is gone.
    sums: Vec<Option<Vec<Expr>>>,
    received_sums: Vec<Option<Vec<Expr>>>,
}

impl Rank {
    fn new(plan: Plan, input: Vec<Expr>, output: Option<Vec<Expr>>) -> Self {
        let mut rank = Self {
            index: 0,
            round: Round::default(),
            sends: VecDeque::new(),
            receives: VecDeque::new(),
            input,
            output,
            starts: (0, 0),
            staged: vec![None; plan.world_size],
            sums: vec![None; plan.world_size],
            received_sums: vec![None; plan.world_size],
            plan,
            partial: Vec::new(),
            received_partial: None,
            reduced: Vec::new(),
        };
        rank.enter_round();
        rank
    }

    /// A call in place whose input and output begin at these elements of its buffer.
    fn in_place(plan: Plan, buffer: Vec<Expr>, starts: (usize, usize)) -> Self {
        Self { starts, ..Self::new(plan, buffer, None) }
    }

    fn enter_round(&mut self) {
        if self.index < self.plan.rounds() {
            self.plan.round(self.index, &mut self.round);
            self.sends = self.round.sends.iter().copied().collect();
            self.receives = self.round.receives.iter().copied().collect();
        }
    }

    fn is_done(&self) -> bool {
        self.index == self.plan.rounds()
    }

    fn output(&mut self) -> &mut Vec<Expr> {
        self.output.as_mut().unwrap_or(&mut self.input)
    }

    fn take(&mut self, transfer: Transfer) -> Vec<Expr> {
        let span = transfer.span;
        assert!(span.len <= self.plan.segment_len, "a transfer is longer than a segment");
        match transfer.place {
            Place::Input => slice(&self.input, self.in_buffer(transfer.place, span)),
            Place::Output => {
                let span = self.in_buffer(transfer.place, span);
                slice(self.output(), span)
            }
            Place::Partial => {
                assert_eq!(self.partial.len(), span.len, "the whole partial is sent");
                self.partial.clone()
            }
            Place::Reduced => {
                assert_eq!(self.reduced.len(), span.len, "the whole segment is sent");
                self.reduced.clone()
            }
            Place::Sum { chunk } => {
                let sum = self.sums[chunk].take().expect("a sum is sent once, and there is one");
                assert_eq!(sum.len(), span.len, "the whole sum is sent");
                sum
            }
            Place::Staged | Place::ReceivedSum { .. } => panic!("nothing is sent from there"),
        }
    }

    fn put(&mut self, transfer: Transfer, values: Vec<Expr>) {
        let written = self.in_buffer(Place::Output, transfer.span);
        let overlaps = |send: &Transfer| {
            let (a, b) = (self.in_buffer(send.place, send.span), written);
            matches!(send.place, Place::Input | Place::Output)
                && a.start < b.start + b.len
                && b.start < a.start + a.len
        };
        match transfer.place {
            Place::Output => {
                let aliased = self.output.is_none();
                let sent_from_here = |send: &Transfer| send.place == Place::Output || aliased;
                assert!(
                    !self.round.sends.iter().any(|send| sent_from_here(send) && overlaps(send)),
                    "a round receives into what it sends"
                );
                self.output()[range(written)].clone_from_slice(&values);
            }
            Place::Staged => {
                let slot = &mut self.staged[transfer.peer];
                assert!(slot.replace(values).is_none(), "a staged contribution is overwritten unread");
            }
            Place::Partial => {
                assert!(self.received_partial.replace(values).is_none(), "a partial is overwritten unread");
            }
            Place::Sum { chunk } => {
                assert!(self.sums[chunk].replace(values).is_none(), "a sum is overwritten");
            }
            Place::ReceivedSum { chunk } => {
                let slot = &mut self.received_sums[chunk];
                assert!(slot.replace(values).is_none(), "a received sum is overwritten unread");
            }
            Place::Input | Place::Reduced => panic!("nothing is received to there"),
        }
    }

    /// Runs the local steps when all transfers of the round are done.
    fn finish_round(&mut self) -> bool {
        if self.is_done() || !self.sends.is_empty() || !self.receives.is_empty() {
            return false;
        }
        for step in std::mem::take(&mut self.round.locals) {
            self.run(step);
        }
        self.index += 1;
        self.enter_round();
        true
    }

    fn run(&mut self, step: Local) {
        match step {
            Local::Copy { input, output_start } => {
                let values = slice(&self.input, self.in_buffer(Place::Input, input));
                self.write(input.at(output_start), &values);
            }
            Local::ReduceStaged { input, output_start } => {
                let values = self.reduce_staged(input);
                self.write(input.at(output_start), &values);
            }
            Local::ReduceStagedAside { input } => self.reduced = self.reduce_staged(input),
            Local::StartPartial { input } => {
                self.partial = slice(&self.input, self.in_buffer(Place::Input, input));
            }
            Local::AddToPartial { input } => {
                let received = self.received_partial.take().unwrap_or_default();
                let own = slice(&self.input, self.in_buffer(Place::Input, input));
                assert_eq!(received.len(), own.len(), "partial and contribution are the same elements");
                self.partial = received
                    .into_iter()
                    .zip(own)
                    .map(|(left, right)| Rc::new(Value::Op(left, right)))
                    .collect();
            }
            Local::FinishPartial { output } => {
                let values = self.partial.clone();
                self.write(output, &values);
            }
            Local::StartSum { chunk, input } => {
                self.sums[chunk] = Some(slice(&self.input, self.in_buffer(Place::Input, input)));
            }
            Local::AddToSum { chunk, len } => {
                let sum = self.sums[chunk].take().expect("there is a sum");
                let received = self.received_sums[chunk].take().expect("something has come");
                assert_eq!([sum.len(), received.len()], [len, len], "both are the same elements");
                let added =
                    sum.into_iter().zip(received).map(|(left, right)| Rc::new(Value::Op(left, right)));
                self.sums[chunk] = Some(added.collect());
            }
            Local::FinishSum { chunk, output } => {
                let values = self.sums[chunk].take().expect("there is a sum");
                assert_eq!(values.len(), output.len, "the whole sum is written");
                self.write(output, &values);
            }
        }
    }

    fn reduce_staged(&mut self, input: Span) -> Vec<Expr> {
        let mut staged = std::mem::replace(&mut self.staged, vec![None; self.plan.world_size]);
        staged[self.plan.rank] = Some(slice(&self.input, self.in_buffer(Place::Input, input)));
        let staged: Vec<Vec<Expr>> =
            staged.into_iter().map(|slot| slot.expect("a contribution from every rank")).collect();
        (0..input.len).map(|i| tree(0, self.plan.world_size, &|rank| staged[rank][i].clone())).collect()
    }

    fn write(&mut self, span: Span, values: &[Expr]) {
        let span = self.in_buffer(Place::Output, span);
        self.output()[range(span)].clone_from_slice(values);
    }

    fn in_buffer(&self, place: Place, span: Span) -> Span {
        let (input, output) = self.starts;
        span.at(span.start + if place == Place::Input { input } else { output })
    }
}

fn range(span: Span) -> std::ops::Range<usize> {
    span.start..span.start + span.len
}

fn slice(values: &[Expr], span: Span) -> Vec<Expr> {
    values[range(span)].to_vec()
}

/// Runs all ranks to the end; a message moves when both sides are at it.
fn replay(ranks: &mut [Rank]) {
    while ranks.iter().any(|rank| !rank.is_done()) {
        let mut moved = false;
        for from in 0..ranks.len() {
            moved |= ranks[from].finish_round();
            for at in 0..ranks[from].sends.len() {
                let send = ranks[from].sends[at];
                let first = ranks[from].sends.iter().position(|other| other.peer == send.peer);
                let to = &ranks[send.peer];
                let receive = to.receives.iter().position(|receive| receive.peer == from);
                let (true, Some(receive_at)) = (first == Some(at), receive) else { continue };
                let receive = ranks[send.peer].receives.remove(receive_at).expect("found above");
                ranks[from].sends.remove(at);
                assert_eq!(send.span.len, receive.span.len, "both sides agree on the length");
                let partial = [send.place, receive.place].map(is_wide);
                assert_eq!(partial[0], partial[1], "both sides agree on the wire's type");
                let values = ranks[from].take(send);
                ranks[send.peer].put(receive, values);
                moved = true;
                break;
            }
        }
        assert!(moved, "deadlock: no rank can go on");
    }
}

/// Whether elements of a place are accumulators.
fn is_wide(place: Place) -> bool {
    match place {
        Place::Input | Place::Output | Place::Staged | Place::Reduced => false,
        Place::Partial | Place::Sum { .. } | Place::ReceivedSum { .. } => true,
    }
}

const WORLDS: std::ops::RangeInclusive<usize> = 1..=17;

fn lengths(world_size: usize) -> Vec<usize> {
    let mut lengths = vec![0, 1, world_size - 1, world_size, world_size + 1, 1000];
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

const REDUCE_SCATTERS: [Schedule; 3] =
    [Schedule::ReduceScatterDirect, Schedule::ReduceScatterRing, Schedule::ReduceScatterHalving];

/// Segments that cut a chunk in uneven parts, and one that cuts nothing.
fn segment_lengths(len: usize) -> [usize; 2] {
    [(len / 3 + 1).min(97), len.max(1)]
}

/// For every world, length and segmentation: replays, then calls `check(world, rank, len, output)`.
fn exhaustively(
    schedule: impl Fn(usize) -> Vec<Schedule>,
    input_len: impl Fn(usize, usize) -> usize,
    output_len: impl Fn(usize, usize) -> usize,
    in_place: bool,
    check: impl Fn(Schedule, usize, usize, usize, &[Expr]),
) {
    for world_size in WORLDS {
        for len in lengths(world_size) {
            for segment_len in segment_lengths(len) {
                for schedule in schedule(world_size) {
                    let mut ranks: Vec<Rank> = (0..world_size)
                        .map(|rank| {
                            let plan = Plan::new(schedule, world_size, rank, len, segment_len);
                            let input =
                                (0..input_len(world_size, len)).map(|element| leaf(rank, element)).collect();
                            let output = (!in_place).then(|| untouched(output_len(world_size, len)));
                            Rank::new(plan, input, output)
                        })
                        .collect();
                    replay(&mut ranks);
                    for (rank, state) in ranks.iter_mut().enumerate() {
                        check(schedule, world_size, rank, len, state.output());
                    }
                }
            }
        }
    }
}

/// Direct: exactly the promised tree. Ring, halving: every rank's element exactly once, in whatever order.
fn assert_reduced(schedule: Schedule, world_size: usize, value: &Expr, element: usize) {
    let any_order = matches!(
        schedule,
        Schedule::AllReduceRing
            | Schedule::AllReduceHalving
            | Schedule::ReduceScatterRing
            | Schedule::ReduceScatterHalving
            | Schedule::ReduceChain { .. }
    );
    if any_order {
        let mut found = Vec::new();
        leaves(value, &mut found);
        found.sort_unstable();
        let expected: Vec<_> = (0..world_size).map(|rank| (rank, element)).collect();
        assert_eq!(found, expected, "{schedule:?}: each contribution exactly once");
    } else {
        assert_eq!(*value, tree(0, world_size, &|rank| leaf(rank, element)), "{schedule:?}: the tree order");
    }
}

#[test]
fn all_reduce_combines_each_contribution_exactly_once_on_every_rank() {
    for in_place in [false, true] {
        exhaustively(
            |_| {
                let halving = Schedule::AllReduceHalving;
                vec![Schedule::AllReduceDirect, Schedule::AllReduceOneShot, Schedule::AllReduceRing, halving]
            },
            |_, len| len,
            |_, len| len,
            in_place,
            |schedule, world_size, _, len, output| {
                assert_eq!(output.len(), len);
                for (element, value) in output.iter().enumerate() {
                    assert_reduced(schedule, world_size, value, element);
                }
            },
        );
    }
}

#[test]
fn all_ranks_get_the_same_order_of_summation_whatever_it_is() {
    for schedule in [Schedule::AllReduceRing, Schedule::AllReduceHalving] {
        for world_size in WORLDS {
            let rank = |rank| {
                let plan = Plan::new(schedule, world_size, rank, 40, 2);
                Rank::new(plan, leaves_of(rank, 0..40), None)
            };
            let mut ranks: Vec<Rank> = (0..world_size).map(rank).collect();
            replay(&mut ranks);
            for rank in 1..world_size {
                assert_eq!(ranks[0].input, ranks[rank].input, "{schedule:?} of {world_size}");
            }
        }
    }
}

#[test]
fn halving_sends_no_more_than_a_ring_and_takes_logarithmically_many_rounds() {
    for world_size in [2usize, 4, 8, 16] {
        let (len, steps) = (world_size * 10, world_size.ilog2() as usize);
        for rank in 0..world_size {
            let plan = Plan::new(Schedule::AllReduceHalving, world_size, rank, len, len);
            assert_eq!(plan.rounds(), 2 * steps + 1);
            let mut round = Round::default();
            let mut sent = 0;
            for index in 0..plan.rounds() {
                plan.round(index, &mut round);
                sent += round.sends.iter().map(|send| send.span.len).sum::<usize>();
            }
            assert_eq!(sent, 2 * (world_size - 1) * 10, "2 (n-1)/n of all elements");
        }
    }
}

#[test]
fn reduce_scatter_gives_each_rank_its_chunk_of_each_contribution_once() {
    exhaustively(
        |_| REDUCE_SCATTERS.to_vec(),
        |world_size, len| world_size * len,
        |_, len| len,
        false,
        |schedule, world_size, rank, len, output| {
            for (i, value) in output.iter().enumerate() {
                assert_reduced(schedule, world_size, value, rank * len + i);
            }
        },
    );
}

#[test]
fn all_gather_puts_every_input_in_rank_order() {
    exhaustively(
        |_| vec![Schedule::AllGatherDirect, Schedule::AllGatherRing],
        |_, len| len,
        |world_size, len| world_size * len,
        false,
        |schedule, _, _, len, output| {
            for (i, value) in output.iter().enumerate() {
                assert_eq!(*value, leaf(i / len, i % len), "{schedule:?}");
            }
        },
    );
}

#[test]
fn broadcast_gives_everyone_the_roots_elements() {
    let all = |root| {
        let (direct, tree) = (Schedule::BroadcastDirect { root }, Schedule::BroadcastTree { root });
        [direct, tree, Schedule::BroadcastChain { root }]
    };
    exhaustively(
        |world_size| (0..world_size).flat_map(all).collect(),
        |_, len| len,
        |_, len| len,
        true,
        |schedule, _, _, _, output| {
            let (Schedule::BroadcastDirect { root }
            | Schedule::BroadcastTree { root }
            | Schedule::BroadcastChain { root }) = schedule
            else {
                panic!("only broadcasts were replayed")
            };
            for (element, value) in output.iter().enumerate() {
                assert_eq!(*value, leaf(root, element), "{schedule:?}");
            }
        },
    );
}

/// The first, a middle and the last rank.
fn roots(world_size: usize) -> Vec<usize> {
    let mut roots = vec![0, world_size / 2, world_size - 1];
    roots.dedup();
    roots
}

#[test]
fn reduce_combines_each_contribution_exactly_once_on_the_root_alone() {
    let both = |root| [Schedule::ReduceDirect { root }, Schedule::ReduceChain { root }];
    for in_place in [false, true] {
        exhaustively(
            |world_size| roots(world_size).into_iter().flat_map(both).collect(),
            |_, len| len,
            |_, len| len,
            in_place,
            |schedule, world_size, rank, _, output| {
                let (Schedule::ReduceDirect { root } | Schedule::ReduceChain { root }) = schedule else {
                    panic!("only reductions were replayed")
                };
                for (element, value) in output.iter().enumerate() {
                    match rank == root {
                        true => assert_reduced(schedule, world_size, value, element),
                        false if in_place => assert_eq!(*value, leaf(rank, element), "{schedule:?}"),
                        false => assert_eq!(**value, Value::Untouched, "{schedule:?}"),
                    }
                }
            },
        );
    }
}

#[test]
fn gather_puts_every_input_in_rank_order_on_the_root_alone() {
    exhaustively(
        |world_size| roots(world_size).into_iter().map(|root| Schedule::Gather { root }).collect(),
        |_, len| len,
        |world_size, len| world_size * len,
        false,
        |schedule, _, rank, len, output| {
            for (i, value) in output.iter().enumerate() {
                match schedule {
                    Schedule::Gather { root } if root == rank => {
                        assert_eq!(*value, leaf(i / len, i % len), "{schedule:?}");
                    }
                    _ => assert_eq!(**value, Value::Untouched, "{schedule:?}"),
                }
            }
        },
    );
}

#[test]
fn scatter_gives_each_rank_its_chunk_of_the_root() {
    exhaustively(
        |world_size| roots(world_size).into_iter().map(|root| Schedule::Scatter { root }).collect(),
        |world_size, len| world_size * len,
        |_, len| len,
        false,
        |schedule, _, rank, len, output| {
            let Schedule::Scatter { root } = schedule else { panic!("only scatters were replayed") };
            for (i, value) in output.iter().enumerate() {
                assert_eq!(*value, leaf(root, rank * len + i), "{schedule:?}");
            }
        },
    );
}

#[test]
fn all_to_all_gives_each_rank_its_chunk_of_every_input() {
    exhaustively(
        |_| vec![Schedule::AllToAll],
        |world_size, len| world_size * len,
        |world_size, len| world_size * len,
        false,
        |_, _, rank, len, output| {
            for (i, value) in output.iter().enumerate() {
                assert_eq!(*value, leaf(i / len, rank * len + i % len));
            }
        },
    );
}

/// Shares of 0 to `len` elements, no two neighbours alike unless both are empty.
fn uneven(world_size: usize, len: usize) -> Vec<usize> {
    (0..world_size)
        .map(|rank| if rank % 3 == 1 { 0 } else { (rank * 5 + 7) * len / 11 % (len + 1) })
        .collect()
}

/// Uneven shares, and all elements on one rank.
fn counts_by_rank(world_size: usize, len: usize) -> [Vec<usize>; 2] {
    let on_one = (0..world_size).map(|rank| if rank == world_size / 2 { len } else { 0 }).collect();
    [uneven(world_size, len), on_one]
}

fn start_of(counts: &[usize], rank: usize) -> usize {
    counts[..rank].iter().sum()
}

fn leaves_of(rank: usize, elements: std::ops::Range<usize>) -> Vec<Expr> {
    elements.map(|element| leaf(rank, element)).collect()
}

/// For every world, length, uneven shares and segmentation.
fn for_uneven_shares(check: impl Fn(usize, &[usize], usize)) {
    for world_size in WORLDS {
        for len in lengths(world_size) {
            for counts in counts_by_rank(world_size, len) {
                for segment_len in segment_lengths(len) {
                    check(world_size, &counts, segment_len);
                }
            }
        }
    }
}

#[test]
fn all_gather_takes_shares_of_any_length() {
    for schedule in [Schedule::AllGatherDirect, Schedule::AllGatherRing] {
        for_uneven_shares(|world_size, counts, segment_len| {
            let shares = Shares::by_rank(counts).expect("they fit");
            let total: usize = counts.iter().sum();
            let rank = |rank: usize| {
                let plan = Plan::new(schedule, world_size, rank, shares.clone(), segment_len);
                Rank::new(plan, leaves_of(rank, 0..counts[rank]), Some(untouched(total)))
            };
            let mut ranks: Vec<Rank> = (0..world_size).map(rank).collect();
            replay(&mut ranks);
            let expected: Vec<Expr> =
                (0..world_size).flat_map(|rank| leaves_of(rank, 0..counts[rank])).collect();
            assert!(ranks.iter_mut().all(|rank| *rank.output() == expected), "{schedule:?} of {counts:?}");
        });
    }
}

#[test]
fn reduce_scatter_gives_shares_of_any_length() {
    for schedule in REDUCE_SCATTERS {
        for_uneven_shares(|world_size, counts, segment_len| {
            let shares = Shares::by_rank(counts).expect("they fit");
            let total: usize = counts.iter().sum();
            let rank = |rank: usize| {
                let plan = Plan::new(schedule, world_size, rank, shares.clone(), segment_len);
                Rank::new(plan, leaves_of(rank, 0..total), Some(untouched(counts[rank])))
            };
            let mut ranks: Vec<Rank> = (0..world_size).map(rank).collect();
            replay(&mut ranks);
            for (rank, state) in ranks.iter_mut().enumerate() {
                for (i, value) in state.output().iter().enumerate() {
                    assert_reduced(schedule, world_size, value, start_of(counts, rank) + i);
                }
            }
        });
    }
}

#[test]
fn all_to_all_takes_parts_of_any_length() {
    for_uneven_shares(|world_size, by_rank, segment_len| {
        // Each rank sends what the next rank would, one place further: no row and no column is even.
        let count = |from: usize, to: usize| by_rank[(from + to) % world_size];
        let counts: Vec<usize> =
            (0..world_size * world_size).map(|pair| count(pair / world_size, pair % world_size)).collect();
        let shares = Shares::by_pair(world_size, &counts).expect("they fit");
        let row = |from: usize| &counts[from * world_size..(from + 1) * world_size];
        let rank = |rank: usize| {
            let plan = Plan::new(Schedule::AllToAll, world_size, rank, shares.clone(), segment_len);
            let output_len = (0..world_size).map(|from| count(from, rank)).sum();
            Rank::new(plan, leaves_of(rank, 0..row(rank).iter().sum()), Some(untouched(output_len)))
        };
        let mut ranks: Vec<Rank> = (0..world_size).map(rank).collect();
        replay(&mut ranks);
        for (rank, state) in ranks.iter_mut().enumerate() {
            let part = |from: usize| {
                let start = start_of(row(from), rank);
                leaves_of(from, start..start + count(from, rank))
            };
            let expected: Vec<Expr> = (0..world_size).flat_map(part).collect();
            assert_eq!(*state.output(), expected, "{counts:?}");
        }
    });
}

#[test]
fn all_gather_in_place_keeps_the_own_share_where_it_is() {
    for schedule in [Schedule::AllGatherDirect, Schedule::AllGatherRing] {
        for world_size in WORLDS {
            for len in lengths(world_size) {
                for segment_len in segment_lengths(len) {
                    let rank = |rank: usize| {
                        let mut buffer = untouched(world_size * len);
                        buffer[rank * len..][..len].clone_from_slice(&leaves_of(rank, 0..len));
                        let plan = Plan::new(schedule, world_size, rank, len, segment_len);
                        Rank::in_place(plan, buffer, (rank * len, 0))
                    };
                    let mut ranks: Vec<Rank> = (0..world_size).map(rank).collect();
                    replay(&mut ranks);
                    let expected: Vec<Expr> =
                        (0..world_size).flat_map(|rank| leaves_of(rank, 0..len)).collect();
                    assert!(ranks.iter().all(|rank| rank.input == expected), "{schedule:?}");
                }
            }
        }
    }
}

#[test]
fn reduce_scatter_in_place_writes_its_own_share_alone() {
    for schedule in REDUCE_SCATTERS {
        for world_size in WORLDS {
            for len in lengths(world_size) {
                for segment_len in segment_lengths(len) {
                    let rank = |rank: usize| {
                        let plan = Plan::new(schedule, world_size, rank, len, segment_len);
                        Rank::in_place(plan, leaves_of(rank, 0..world_size * len), (0, rank * len))
                    };
                    let mut ranks: Vec<Rank> = (0..world_size).map(rank).collect();
                    replay(&mut ranks);
                    for (rank, state) in ranks.iter().enumerate() {
                        for (i, value) in state.input.iter().enumerate() {
                            match (rank * len..(rank + 1) * len).contains(&i) {
                                true => assert_reduced(schedule, world_size, value, i),
                                false => assert_eq!(*value, leaf(rank, i), "{schedule:?}"),
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What a back end relies on that moves all pieces and parts by itself.
#[test]
fn pieces_fill_outputs_and_parts_make_up_inputs_exactly() {
    let exactly = |mut spans: Vec<Span>, len: usize| {
        spans.sort_by_key(|span| (span.start, span.len));
        let mut end = 0;
        for span in spans {
            assert_eq!(span.start, end);
            end += span.len;
        }
        assert_eq!(end, len);
    };
    for world_size in WORLDS {
        for len in lengths(world_size) {
            let counts = uneven(world_size, len);
            let shares = Shares::by_rank(&counts).expect("they fit");
            let total: usize = counts.iter().sum();
            let plan = Plan::new(Schedule::AllGatherRing, world_size, 0, shares.clone(), 1);
            for to in 0..world_size {
                let pieces = (0..world_size).map(|from| plan.piece(from, to).expect("from everybody").1);
                exactly(pieces.collect(), total);
            }
            let plan = Plan::new(Schedule::ReduceScatterDirect, world_size, 0, shares, 1);
            exactly((0..world_size).map(|owner| plan.owned(owner)).collect(), total);
            for root in roots(world_size) {
                let plan = Plan::new(Schedule::ReduceChain { root }, world_size, 0, len, 1);
                exactly((0..world_size).map(|owner| plan.owned(owner)).collect(), len);
                exactly((0..world_size).map(|owner| plan.result(owner, root).expect("there")).collect(), len);
                let plan = Plan::new(Schedule::Scatter { root }, world_size, 0, len, 1);
                let pieces = (0..world_size).map(|to| plan.piece(root, to).expect("to everybody").0);
                exactly(pieces.collect(), world_size * len);
            }
        }
    }
}

/// Replays with knowledge instead of elements: a message carries what its sender knows.
#[test]
fn nobody_leaves_a_barrier_before_everybody_has_entered() {
    for world_size in WORLDS {
        let plan = |rank| Plan::new(Schedule::Barrier, world_size, rank, 0, 1);
        let mut known: Vec<Vec<bool>> =
            (0..world_size).map(|rank| (0..world_size).map(|other| other == rank).collect()).collect();
        for index in 0..plan(0).rounds() {
            let before = known.clone();
            for (rank, known) in known.iter_mut().enumerate() {
                let mut round = Round::default();
                plan(rank).round(index, &mut round);
                let [receive] = round.receives[..] else { panic!("one message per round") };
                let mut theirs = Round::default();
                plan(receive.peer).round(index, &mut theirs);
                assert_eq!(theirs.sends[0].peer, rank, "the sender sends to whoever waits for it");
                for (mine, theirs) in known.iter_mut().zip(&before[receive.peer]) {
                    *mine |= theirs;
                }
            }
        }
        assert!(known.iter().flatten().all(|&knows| knows), "world {world_size}");
    }
}

#[test]
fn a_message_between_two_ranks_is_cut_alike_on_both_sides() {
    for len in [0, 1, 7, 1000] {
        for segment_len in [1, 3, 1000] {
            let plans = [
                Plan::new(Schedule::SendTo { peer: 1 }, 2, 0, len, segment_len),
                Plan::new(Schedule::ReceiveFrom { peer: 0 }, 2, 1, len, segment_len),
            ];
            let mut ranks: Vec<Rank> = plans
                .iter()
                .enumerate()
                .map(|(rank, plan)| {
                    Rank::new(
                        plan.clone(),
                        (0..len).map(|element| leaf(rank, element)).collect(),
                        Some(untouched(len)),
                    )
                })
                .collect();
            replay(&mut ranks);
            let sent: Vec<Expr> = (0..len).map(|element| leaf(0, element)).collect();
            assert_eq!(*ranks[1].output(), sent);
        }
    }
}
