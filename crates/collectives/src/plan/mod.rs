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
//! | ring all_reduce (Patarasuk & Yuan, JPDC 69(2), 2009) | (2n-1) per segment | 2(n-1)/n S | around the ring |
//! | direct, ring reduce_scatter; direct, ring all_gather | the halves of the above | (n-1)/n S | as above |
//! | direct broadcast | segments | root: (n-1) S | |
//! | chain broadcast, pipelined | segments + 1 | S | |
//! | barrier by dissemination (Hensgen, Finkel & Manber 1988) | log2 n | 0 | |

mod direct;
#[cfg(test)]
mod replay;
mod ring;

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
}

/// One message of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The rank on the other side.
    pub peer: usize,
    /// Which buffer of this rank.
    pub place: Place,
    /// Which elements of it. For [`Place::Staged`] and [`Place::Partial`] only the length counts.
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
    /// The same around a ring.
    AllReduceRing,
    /// world × len elements in, len out: rank i gets the reduction of chunk i.
    ReduceScatterDirect,
    /// The same around a ring.
    ReduceScatterRing,
    /// len elements in, world × len out.
    AllGatherDirect,
    /// The same around a ring.
    AllGatherRing,
    /// len elements of the root's output to every output; the root sends to each.
    BroadcastDirect {
        /// The rank that has the elements.
        root: usize,
    },
    /// The same along the chain root, root + 1, ….
    BroadcastChain {
        /// The rank that has the elements.
        root: usize,
    },
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    schedule: Schedule,
    world_size: usize,
    rank: usize,
    len: usize,
    segment_len: usize,
}

impl Plan {
    /// The plan of `rank` of `world_size`. `len` counts elements as [`Schedule`] says; no transfer is
    /// longer than `segment_len` elements.
    ///
    /// # Panics
    /// If `rank` or a root or peer is not below `world_size`, or `segment_len` is 0: the communicator
    /// has checked them.
    pub fn new(schedule: Schedule, world_size: usize, rank: usize, len: usize, segment_len: usize) -> Self {
        assert!(rank < world_size && segment_len > 0, "the communicator checks its arguments");
        if let Schedule::BroadcastDirect { root: other }
        | Schedule::BroadcastChain { root: other }
        | Schedule::SendTo { peer: other }
        | Schedule::ReceiveFrom { peer: other } = schedule
        {
            assert!(other < world_size, "the communicator checks its arguments");
        }
        Self { schedule, world_size, rank, len, segment_len }
    }

    /// The number of rounds of this rank.
    pub fn rounds(&self) -> usize {
        match self.schedule {
            Schedule::AllReduceDirect => direct::all_reduce_rounds(self),
            Schedule::ReduceScatterDirect | Schedule::AllGatherDirect | Schedule::BroadcastDirect { .. } => {
                self.segments(self.len)
            }
            Schedule::AllReduceRing => self.segments(self.chunk(0).len) * ring::all_reduce_rounds(self),
            Schedule::ReduceScatterRing | Schedule::AllGatherRing => {
                self.segments(self.len) * self.world_size
            }
            Schedule::BroadcastChain { .. } => ring::broadcast_rounds(self),
            Schedule::Barrier => self.world_size.next_power_of_two().trailing_zeros() as usize,
            Schedule::SendTo { .. } | Schedule::ReceiveFrom { .. } => self.segments(self.len).max(1),
        }
    }

    /// Writes round number `index`, below [`rounds`](Self::rounds), to `round`, which is reused.
    pub fn round(&self, index: usize, round: &mut Round) {
        round.clear();
        match self.schedule {
            Schedule::AllReduceDirect => direct::all_reduce(self, index, round),
            Schedule::AllReduceRing => ring::all_reduce(self, index, round),
            Schedule::ReduceScatterDirect => direct::reduce_scatter(self, index, round),
            Schedule::ReduceScatterRing => ring::reduce_scatter(self, index, round),
            Schedule::AllGatherDirect => direct::all_gather(self, index, round),
            Schedule::AllGatherRing => ring::all_gather(self, index, round),
            Schedule::BroadcastDirect { root } => direct::broadcast(self, root, index, round),
            Schedule::BroadcastChain { root } => ring::broadcast(self, root, index, round),
            Schedule::Barrier => direct::barrier(self, index, round),
            // Not Round::send: an empty message is still a message.
            Schedule::SendTo { peer } => {
                let span = self.segment(Span { start: 0, len: self.len }, index);
                round.sends.push(Transfer { peer, place: Place::Input, span });
            }
            Schedule::ReceiveFrom { peer } => {
                let span = self.segment(Span { start: 0, len: self.len }, index);
                round.receives.push(Transfer { peer, place: Place::Output, span });
            }
        }
    }

    /// The share of rank `index` in `len` elements: as even as can be, the longer ones first.
    fn chunk(&self, index: usize) -> Span {
        let (base, longer) = (self.len / self.world_size, self.len % self.world_size);
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
