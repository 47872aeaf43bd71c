//! Replays every schedule symbolically and proves what it computes.
//!
//! The replayed network has no buffer at all: a message moves only when its sender and its receiver
//! are both in the round that names it, so a plan that passes here cannot deadlock on any window. Every
//! element is an expression over (rank, element) leaves; the final buffers are compared with the
//! expression that the collective promises. In-place calls share one buffer for input and output.

use std::collections::VecDeque;
use std::rc::Rc;

use super::{Local, Place, Plan, Round, Schedule, Span, Transfer};

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
    /// `None` when the call is in place: the output is the input.
    output: Option<Vec<Expr>>,
    staged: Vec<Option<Vec<Expr>>>,
    partial: Vec<Expr>,
    received_partial: Option<Vec<Expr>>,
    reduced: Vec<Expr>,
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
            staged: vec![None; plan.world_size],
            plan,
            partial: Vec::new(),
            received_partial: None,
            reduced: Vec::new(),
        };
        rank.enter_round();
        rank
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
            Place::Input => slice(&self.input, span),
            Place::Output => slice(self.output(), span),
            Place::Partial => {
                assert_eq!(self.partial.len(), span.len, "the whole partial is sent");
                self.partial.clone()
            }
            Place::Reduced => {
                assert_eq!(self.reduced.len(), span.len, "the whole segment is sent");
                self.reduced.clone()
            }
            Place::Staged => panic!("nothing is sent from the staging area"),
        }
    }

    fn put(&mut self, transfer: Transfer, values: Vec<Expr>) {
        let overlaps = |send: &Transfer| {
            let (a, b) = (send.span, transfer.span);
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
                self.output()[range(transfer.span)].clone_from_slice(&values);
            }
            Place::Staged => {
                let slot = &mut self.staged[transfer.peer];
                assert!(slot.replace(values).is_none(), "a staged contribution is overwritten unread");
            }
            Place::Partial => {
                assert!(self.received_partial.replace(values).is_none(), "a partial is overwritten unread");
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
                let values = slice(&self.input, input);
                self.output()[range(input.at(output_start))].clone_from_slice(&values);
            }
            Local::ReduceStaged { input, output_start } => {
                let values = self.reduce_staged(input);
                self.output()[range(input.at(output_start))].clone_from_slice(&values);
            }
            Local::ReduceStagedAside { input } => self.reduced = self.reduce_staged(input),
            Local::StartPartial { input } => self.partial = slice(&self.input, input),
            Local::AddToPartial { input } => {
                let received = self.received_partial.take().unwrap_or_default();
                let own = slice(&self.input, input);
                assert_eq!(received.len(), own.len(), "partial and contribution are the same elements");
                self.partial = received
                    .into_iter()
                    .zip(own)
                    .map(|(left, right)| Rc::new(Value::Op(left, right)))
                    .collect();
            }
            Local::FinishPartial { output } => {
                let values = self.partial.clone();
                self.output()[range(output)].clone_from_slice(&values);
            }
        }
    }
}

impl Rank {
    fn reduce_staged(&mut self, input: Span) -> Vec<Expr> {
        let mut staged = std::mem::replace(&mut self.staged, vec![None; self.plan.world_size]);
        staged[self.plan.rank] = Some(slice(&self.input, input));
        let staged: Vec<Vec<Expr>> =
            staged.into_iter().map(|slot| slot.expect("a contribution from every rank")).collect();
        (0..input.len).map(|i| tree(0, self.plan.world_size, &|rank| staged[rank][i].clone())).collect()
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
                let partial = [send.place, receive.place].map(|place| place == Place::Partial);
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

const WORLDS: std::ops::RangeInclusive<usize> = 1..=17;

fn lengths(world_size: usize) -> Vec<usize> {
    let mut lengths = vec![0, 1, world_size - 1, world_size, world_size + 1, 1000];
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

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

/// Direct: exactly the promised tree. Ring: every rank's element exactly once, in whatever order.
fn assert_reduced(schedule: Schedule, world_size: usize, value: &Expr, element: usize) {
    let ring = matches!(schedule, Schedule::AllReduceRing | Schedule::ReduceScatterRing);
    if ring {
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
            |_| vec![Schedule::AllReduceDirect, Schedule::AllReduceRing],
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
fn all_ranks_of_a_ring_get_the_same_order_of_summation() {
    let ranks: Vec<Rank> = (0..5)
        .map(|rank| {
            let plan = Plan::new(Schedule::AllReduceRing, 5, rank, 12, 2);
            Rank::new(plan, (0..12).map(|element| leaf(rank, element)).collect(), None)
        })
        .collect();
    let mut ranks = ranks;
    replay(&mut ranks);
    for rank in 1..5 {
        assert_eq!(ranks[0].input, ranks[rank].input);
    }
}

#[test]
fn reduce_scatter_gives_each_rank_its_chunk_of_each_contribution_once() {
    exhaustively(
        |_| vec![Schedule::ReduceScatterDirect, Schedule::ReduceScatterRing],
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
    let both = |root| [Schedule::BroadcastDirect { root }, Schedule::BroadcastChain { root }];
    exhaustively(
        |world_size| (0..world_size).flat_map(both).collect(),
        |_, len| len,
        |_, len| len,
        true,
        |schedule, _, _, _, output| {
            let (Schedule::BroadcastDirect { root } | Schedule::BroadcastChain { root }) = schedule else {
                panic!("only broadcasts were replayed")
            };
            for (element, value) in output.iter().enumerate() {
                assert_eq!(*value, leaf(root, element), "{schedule:?}");
            }
        },
    );
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
