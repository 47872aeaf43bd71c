//! Schedules as data: who sends which span to whom, and what is done with what arrives.
//!
//! A [`Plan`] is computed from (schedule, world size, rank, length, segment length) alone: this module
//! does no I/O, reads no clock and knows no buffer. Two ranks with equal parameters get plans whose
//! transfers match pair by pair in order, which one exhaustive test replays for small worlds.
//!
//! A plan is a sequence of [`Round`]s. Within a round all sends and receives progress together, in any
//! interleaving but in order per peer; when all are done, the round's local steps run, then the next
//! round begins. Rounds are local: ranks need not be in the same one at the same time. A round
//! therefore must not receive into what it sends, and local steps see all of its receives.
//!
//! | schedule | rounds | bytes sent per rank, S bytes in all, n ranks | order of summation |
//! |---|---|---|---|
//! | direct all_reduce: every chunk goes to its owner, who reduces and sends it to all | segments + 1 | 2(n-1)/n S | tree over ranks |
//! | one-shot all_reduce: everything to everybody, and everybody reduces | segments | (n-1) S | tree over ranks |
//! | ring all_reduce (Patarasuk & Yuan, JPDC 69(2), 2009) | (2n-1) per segment | 2(n-1)/n S | around the ring |
//! | halving all_reduce (Rabenseifner, ICCS 2004), n a power of two | 2 log2 n + 1 per segment | 2(n-1)/n S | by halves of the world |
//! | direct, ring, halving reduce_scatter; direct, ring all_gather | the halves of the above | (n-1)/n S | as above |
//! | direct reduce: as all_reduce, but results go to the root only | segments + 1 | root: (n-1)/n S, others: S | tree over ranks |
//! | chain reduce, pipelined | segments + 1 | S | along the chain |
//! | direct broadcast | segments | root: (n-1) S | |
//! | tree broadcast (binomial), pipelined | segments + 1 | root: log2 n S | |
//! | chain broadcast, pipelined | segments + 1 | S | |
//! | gather, scatter, all_to_all: every part goes straight to where it belongs | segments | (n-1)/n S at the root, or everywhere | |
//! | barrier by dissemination (Hensgen, Finkel & Manber 1988) | log2 n | 0 | |

mod direct;
mod halving;
#[cfg(test)]
mod replay;
mod ring;
mod shares;
mod tree;

pub use shares::Shares;

/// A range of elements of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// The first element.
    pub start: usize,
    /// The number of elements.
    pub len: usize,
}

impl Span {
    /// Whether there is nothing in it.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The same length at another start.
    fn at(self, start: usize) -> Self {
        Self { start, len: self.len }
    }
}

/// Where a transfer takes its elements from or puts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The caller's input buffer; the span is in its coordinates.
    Input,
    /// The caller's output buffer; the span is in its coordinates.
    Output,
    /// Scratch for one segment per peer, in the dtype: unreduced contributions on their way to the tree.
    Staged,
    /// The partial result of a ring, one segment in the accumulator type: sent from here, received
    /// beside it.
    Partial,
    /// The reduction of one segment, in the dtype, on a rank that only passes it on.
    Reduced,
    /// A partial sum of one segment of a rank's chunk, in the accumulator type: one for each rank.
    Sum {
        /// Whose chunk.
        chunk: usize,
    },
    /// Beside it, what is to be added.
    ReceivedSum {
        /// Whose chunk.
        chunk: usize,
    },
}

/// One message of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The rank on the other side.
    pub peer: usize,
    /// Which buffer of this rank.
    pub place: Place,
    /// Which elements of it. For [`Place::Input`] and [`Place::Output`] only; of all others
    /// the length counts.
    pub span: Span,
}

/// What is done locally at the end of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Local {
    /// `output[output_start..] = input[input]`
    Copy {
        /// Elements of the input.
        input: Span,
        /// Where they go in the output.
        output_start: usize,
    },
    /// `output[output_start..]` = the tree over the ranks of the staged contributions and `input[input]`
    ReduceStaged {
        /// This rank's own contribution.
        input: Span,
        /// Where the result goes in the output.
        output_start: usize,
    },
    /// `reduced` = the tree over the ranks of the staged contributions and `input[input]`
    ReduceStagedAside {
        /// This rank's own contribution.
        input: Span,
    },
    /// `partial = input[input]`, widened
    StartPartial {
        /// This rank's own contribution.
        input: Span,
    },
    /// `partial = received partial op input[input]`
    AddToPartial {
        /// This rank's own contribution.
        input: Span,
    },
    /// `output[output] = partial`, rounded to the dtype
    FinishPartial {
        /// Elements of the output.
        output: Span,
    },
    /// `sums[chunk] = input[input]`, widened
    StartSum {
        /// Whose chunk.
        chunk: usize,
        /// This rank's own contribution.
        input: Span,
    },
    /// `sums[chunk] = sums[chunk] op received sums[chunk]`
    AddToSum {
        /// Whose chunk.
        chunk: usize,
        /// The number of elements.
        len: usize,
    },
    /// `output[output] = sums[chunk]`, rounded to the dtype
    FinishSum {
        /// Whose chunk.
        chunk: usize,
        /// Elements of the output.
        output: Span,
    },
}

/// Transfers that progress together, then local steps in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Messages to peers; in order per peer.
    pub sends: Vec<Transfer>,
    /// Messages from peers; in order per peer.
    pub receives: Vec<Transfer>,
    /// Steps after all transfers.
    pub locals: Vec<Local>,
}

impl Round {
    fn clear(&mut self) {
        self.sends.clear();
        self.receives.clear();
        self.locals.clear();
    }

    /// Adds a send unless it is empty: chunks of short buffers are, on both sides alike.
    fn send(&mut self, peer: usize, place: Place, span: Span) {
        if !span.is_empty() {
            self.sends.push(Transfer { peer, place, span });
        }
    }

    fn receive(&mut self, peer: usize, place: Place, span: Span) {
        if !span.is_empty() {
            self.receives.push(Transfer { peer, place, span });
        }
    }
}

/// What is to be done, by which algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// len elements in and out on every rank; rank i reduces chunk i.
    AllReduceDirect,
    /// The same in one step: every rank reduces everything.
    AllReduceOneShot,
    /// The same around a ring.
    AllReduceRing,
    /// The same by recursive halving and doubling.
    AllReduceHalving,
    /// len elements in on every rank, len out on the root; rank i reduces chunk i for it.
    ReduceDirect {
        /// The rank that gets the reduction.
        root: usize,
    },
    /// The same along the chain root + 1, root + 2, …, root.
    ReduceChain {
        /// The rank that gets the reduction.
        root: usize,
    },
    /// The shares of all ranks in, the own share out: rank i gets the reduction of share i.
    ReduceScatterDirect,
    /// The same around a ring.
    ReduceScatterRing,
    /// The same by recursive halving.
    ReduceScatterHalving,
    /// The own share in, the shares of all ranks out.
    AllGatherDirect,
    /// The same around a ring.
    AllGatherRing,
    /// len elements of the root's output to every output; the root sends to each.
    BroadcastDirect {
        /// The rank that has the elements.
        root: usize,
    },
    /// The same down a binomial tree, from segment to segment.
    BroadcastTree {
        /// The rank that has the elements.
        root: usize,
    },
    /// The same along the chain root, root + 1, ….
    BroadcastChain {
        /// The rank that has the elements.
        root: usize,
    },
    /// The own share in, the shares of all ranks out on the root.
    Gather {
        /// The rank that gets the elements.
        root: usize,
    },
    /// The shares of all ranks in on the root, the own share out.
    Scatter {
        /// The rank that has the elements.
        root: usize,
    },
    /// One part for each rank in, one part from each rank out.
    AllToAll,
    /// No elements; nobody leaves before everybody has entered.
    Barrier,
    /// len elements of the input to one peer.
    SendTo {
        /// The receiving rank.
        peer: usize,
    },
    /// len elements from one peer to the output.
    ReceiveFrom {
        /// The sending rank.
        peer: usize,
    },
}

/// One rank's part in a collective.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    schedule: Schedule,
    world_size: usize,
    rank: usize,
    shares: Shares,
    segment_len: usize,
}

impl Plan {
    /// The plan of `rank` of `world_size`. `shares` are lengths in elements as [`Schedule`] says; a plain
    /// number is the length, or that of each share. No transfer is longer than `segment_len` elements.
    ///
    /// # Panics
    /// If `rank` or a root or peer is not below `world_size`, `segment_len` is 0, or `shares` are not of the
    /// kind that the schedule has: the communicator has checked them.
    pub fn new(
        schedule: Schedule,
        world_size: usize,
        rank: usize,
        shares: impl Into<Shares>,
        segment_len: usize,
    ) -> Self {
        let shares = shares.into();
        let right_shares = match schedule {
            Schedule::AllGatherDirect
            | Schedule::AllGatherRing
            | Schedule::ReduceScatterDirect
            | Schedule::ReduceScatterRing
            | Schedule::ReduceScatterHalving
            | Schedule::Gather { .. }
            | Schedule::Scatter { .. } => shares.are_by_rank(world_size),
            Schedule::AllToAll => shares.are_by_pair(world_size),
            _ => shares.even().is_some(),
        };
        let other = match schedule {
            Schedule::BroadcastDirect { root }
            | Schedule::BroadcastTree { root }
            | Schedule::BroadcastChain { root }
            | Schedule::ReduceDirect { root }
            | Schedule::ReduceChain { root }
            | Schedule::Gather { root }
            | Schedule::Scatter { root } => root,
            Schedule::SendTo { peer } | Schedule::ReceiveFrom { peer } => peer,
            _ => rank,
        };
        assert!(
            rank < world_size && other < world_size && segment_len > 0 && right_shares,
            "the communicator checks its arguments"
        );
        Self { schedule, world_size, rank, shares, segment_len }
    }

    /// The number of rounds of this rank.
    pub fn rounds(&self) -> usize {
        match self.schedule {
            Schedule::AllReduceDirect | Schedule::ReduceDirect { .. } | Schedule::ReduceScatterDirect => {
                direct::reduce_rounds(self)
            }
            Schedule::AllGatherDirect
            | Schedule::BroadcastDirect { .. }
            | Schedule::Gather { .. }
            | Schedule::Scatter { .. }
            | Schedule::AllToAll => direct::copy_rounds(self),
            Schedule::AllReduceOneShot => self.segments(self.whole().len),
            Schedule::AllReduceRing => self.segments(self.chunk(0).len) * ring::all_reduce_rounds(self),
            Schedule::ReduceScatterRing | Schedule::AllGatherRing => {
                self.segments(self.shares.longest()) * self.world_size
            }
            Schedule::AllReduceHalving => self.segments(self.chunk(0).len) * halving::all_reduce_rounds(self),
            Schedule::ReduceScatterHalving => {
                self.segments(self.shares.longest()) * halving::reduce_scatter_rounds(self)
            }
            Schedule::ReduceChain { .. }
            | Schedule::BroadcastTree { .. }
            | Schedule::BroadcastChain { .. } => ring::chain_rounds(self),
            Schedule::Barrier => self.world_size.next_power_of_two().trailing_zeros() as usize,
            Schedule::SendTo { .. } | Schedule::ReceiveFrom { .. } => self.segments(self.whole().len).max(1),
        }
    }

    /// Writes round number `index`, below [`rounds`](Self::rounds), to `round`, which is reused.
    pub fn round(&self, index: usize, round: &mut Round) {
        round.clear();
        match self.schedule {
            Schedule::AllReduceDirect | Schedule::ReduceDirect { .. } | Schedule::ReduceScatterDirect => {
                direct::reduce(self, index, round);
            }
            Schedule::AllReduceOneShot => direct::one_shot(self, index, round),
            Schedule::AllReduceRing => ring::all_reduce(self, index, round),
            Schedule::ReduceChain { root } => ring::reduce(self, root, index, round),
            Schedule::ReduceScatterRing => ring::reduce_scatter(self, index, round),
            Schedule::AllReduceHalving => halving::all_reduce(self, index, round),
            Schedule::ReduceScatterHalving => halving::reduce_scatter(self, index, round),
            Schedule::AllGatherDirect
            | Schedule::BroadcastDirect { .. }
            | Schedule::Gather { .. }
            | Schedule::Scatter { .. }
            | Schedule::AllToAll => direct::copy(self, index, round),
            Schedule::AllGatherRing => ring::all_gather(self, index, round),
            Schedule::BroadcastTree { root } => tree::broadcast(self, root, index, round),
            Schedule::BroadcastChain { root } => ring::broadcast(self, root, index, round),
            Schedule::Barrier => direct::barrier(self, index, round),
            // Not Round::send: an empty message is still a message.
            Schedule::SendTo { peer } => {
                let span = self.segment(self.whole(), index);
                round.sends.push(Transfer { peer, place: Place::Input, span });
            }
            Schedule::ReceiveFrom { peer } => {
                let span = self.segment(self.whole(), index);
                round.receives.push(Transfer { peer, place: Place::Output, span });
            }
        }
    }

    /// The part that another rank has in the same collective.
    pub(crate) fn of_rank(&self, rank: usize) -> Self {
        Self::new(self.schedule, self.world_size, rank, self.shares.clone(), self.segment_len)
    }

    /// What is to be done.
    pub(crate) fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// The number of elements that `rank` gives to a collective. Equal on whichever rank's plan it is asked.
    pub(crate) fn input_len(&self, rank: usize) -> usize {
        match self.schedule {
            Schedule::AllGatherDirect | Schedule::AllGatherRing | Schedule::Gather { .. } => {
                self.shares.of_rank(rank).len
            }
            Schedule::ReduceScatterDirect | Schedule::ReduceScatterRing | Schedule::ReduceScatterHalving => {
                let last = self.shares.of_rank(self.world_size - 1);
                last.start + last.len
            }
            Schedule::Scatter { root } => match rank == root {
                true => {
                    let last = self.shares.of_rank(self.world_size - 1);
                    last.start + last.len
                }
                false => 0,
            },
            Schedule::AllToAll => {
                let (last, _) = self.shares.of_pair(self.world_size, rank, self.world_size - 1);
                last.start + last.len
            }
            Schedule::BroadcastDirect { root }
            | Schedule::BroadcastTree { root }
            | Schedule::BroadcastChain { root } => {
                if rank == root {
                    self.whole().len
                } else {
                    0
                }
            }
            Schedule::AllReduceDirect
            | Schedule::AllReduceOneShot
            | Schedule::AllReduceRing
            | Schedule::AllReduceHalving
            | Schedule::ReduceDirect { .. }
            | Schedule::ReduceChain { .. }
            | Schedule::Barrier
            | Schedule::SendTo { .. }
            | Schedule::ReceiveFrom { .. } => self.whole().len,
        }
    }

    /// The length of the longest [`piece`](Self::piece) between two ranks.
    pub(crate) fn longest_piece(&self) -> usize {
        match self.shares.even() {
            Some(len) => len,
            None => {
                let ranks = 0..self.world_size;
                let pairs = ranks.clone().flat_map(|from| ranks.clone().map(move |to| (from, to)));
                pairs.filter_map(|(from, to)| Some(self.piece(from, to)?.0.len)).max().unwrap_or(0)
            }
        }
    }

    /// Which elements of the input of rank `from` a collective that copies puts into the output of rank
    /// `to`, and where; `None` when there are none by the nature of the collective, and for all others.
    /// Both spans have the same length, which may be 0. Equal on whichever rank's plan it is asked.
    ///
    /// In a broadcast, input and output are the same buffer.
    pub(crate) fn piece(&self, from: usize, to: usize) -> Option<(Span, Span)> {
        match self.schedule {
            Schedule::AllGatherDirect | Schedule::AllGatherRing => {
                let share = self.shares.of_rank(from);
                Some((share.at(0), share))
            }
            Schedule::BroadcastDirect { root }
            | Schedule::BroadcastTree { root }
            | Schedule::BroadcastChain { root } => (from == root).then(|| (self.whole(), self.whole())),
            Schedule::Gather { root } => {
                let share = self.shares.of_rank(from);
                (to == root).then(|| (share.at(0), share))
            }
            Schedule::Scatter { root } => {
                let share = self.shares.of_rank(to);
                (from == root).then(|| (share, share.at(0)))
            }
            Schedule::AllToAll => Some(self.shares.of_pair(self.world_size, from, to)),
            Schedule::AllReduceDirect
            | Schedule::AllReduceOneShot
            | Schedule::AllReduceRing
            | Schedule::AllReduceHalving
            | Schedule::ReduceDirect { .. }
            | Schedule::ReduceChain { .. }
            | Schedule::ReduceScatterDirect
            | Schedule::ReduceScatterRing
            | Schedule::ReduceScatterHalving
            | Schedule::Barrier
            | Schedule::SendTo { .. }
            | Schedule::ReceiveFrom { .. } => None,
        }
    }

    /// The elements of the inputs of a collective that reduces whose reduction is the work of rank `owner`,
    /// when each rank has its part of it; nothing in all others. Equal on whichever rank's plan it is asked.
    /// The parts of all ranks are disjoint and make up the input.
    pub(crate) fn owned(&self, owner: usize) -> Span {
        match self.schedule {
            Schedule::AllReduceDirect
            | Schedule::AllReduceOneShot
            | Schedule::AllReduceRing
            | Schedule::AllReduceHalving
            | Schedule::ReduceDirect { .. }
            | Schedule::ReduceChain { .. } => self.chunk(owner),
            Schedule::ReduceScatterDirect | Schedule::ReduceScatterRing | Schedule::ReduceScatterHalving => {
                self.shares.of_rank(owner)
            }
            _ => Span { start: 0, len: 0 },
        }
    }

    /// Where the reduction of what rank `owner` [owns](Self::owned) goes in the output of rank `to`; `None`
    /// when it does not go there. As long as what is owned, and equal on whichever rank's plan it is asked.
    pub(crate) fn result(&self, owner: usize, to: usize) -> Option<Span> {
        let owned = self.owned(owner);
        match self.schedule {
            Schedule::AllReduceDirect
            | Schedule::AllReduceOneShot
            | Schedule::AllReduceRing
            | Schedule::AllReduceHalving => Some(owned),
            Schedule::ReduceDirect { root } | Schedule::ReduceChain { root } => (to == root).then_some(owned),
            Schedule::ReduceScatterDirect | Schedule::ReduceScatterRing | Schedule::ReduceScatterHalving => {
                (to == owner).then(|| owned.at(0))
            }
            _ => None,
        }
    }

    /// The parts that the ranks own, one after the other.
    pub(crate) fn owned_shares(&self) -> Shares {
        let lens: Vec<usize> = (0..self.world_size).map(|owner| self.owned(owner).len).collect();
        Shares::by_rank(&lens).expect("together they are as long as a buffer")
    }

    /// All elements, where there is one length.
    fn whole(&self) -> Span {
        let len = self.shares.even().expect("checked when the plan was made");
        Span { start: 0, len }
    }

    /// The part of rank `index` in all elements: as even as can be, the longer ones first.
    fn chunk(&self, index: usize) -> Span {
        let len = self.whole().len;
        let (base, longer) = (len / self.world_size, len % self.world_size);
        Span { start: index * base + index.min(longer), len: base + usize::from(index < longer) }
    }

    /// The number of segments of `len` elements.
    fn segments(&self, len: usize) -> usize {
        len.div_ceil(self.segment_len)
    }

    /// Segment number `index` of a span; empty past its end.
    fn segment(&self, span: Span, index: usize) -> Span {
        let from = (index * self.segment_len).min(span.len);
        let to = (from + self.segment_len).min(span.len);
        Span { start: span.start + from, len: to - from }
    }

    /// All other ranks, beginning after this one, so that not all ranks send to the same peer first.
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world_size) = (self.rank, self.world_size);
        (1..world_size).map(move |step| (rank + step) % world_size)
    }
}
