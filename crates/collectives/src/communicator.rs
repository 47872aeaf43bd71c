//! The group of ranks a program talks to.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use paceline_transport::Transport;
use paceline_transport::frame::PAYLOAD_LIMIT;

use crate::buffer::Buffers;
use crate::dtype::{DType, Element, ReduceOp};
use crate::engine::Engine;
use crate::error::Error;
use crate::fault::{Fault, Interrupter};
use crate::kernels::Reducer;
use crate::operation::{Kind, Operation};
use crate::plan::{Plan, Schedule};
use crate::progress::Progress;
use crate::work::Work;

/// How a communicator works. Equal on all ranks, or the first operation is a mismatch.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// How long one operation may take. 10 minutes by default, as in PyTorch's process groups: long
    /// enough for a rank that loads data or compiles before its first step.
    pub timeout: Duration,
    /// The longest piece of a message that is sent at a time, in bytes. 256 KiB by default: long
    /// enough that the header does not matter, short enough to stay in the L2 cache between arrival
    /// and reduction.
    pub segment_bytes: usize,
    /// Which algorithm runs; chosen by size and world size by default.
    pub algorithm: Algorithm,
    /// Whether sums must be in the fixed order.
    pub order: Order,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(600),
            segment_bytes: 256 * 1024,
            algorithm: Algorithm::Auto,
            order: Order::Fixed,
        }
    }
}

/// The family of schedules that runs an operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Algorithm {
    /// Whatever fits the operation, its size and the world size.
    #[default]
    Auto,
    /// Owner-computes direct exchange: every rank talks to every other.
    Direct,
    /// Rings and chains: every rank talks to its neighbours. Reductions need [`Order::Any`].
    Ring,
}

/// The order in which the contributions to a sum are added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Order {
    /// A balanced binary tree over the ranks, whatever the size and the algorithm: the same bits in
    /// every run.
    #[default]
    Fixed,
    /// Whatever order the algorithm has: still the same on all ranks, and in every run with the same
    /// configuration and world size.
    Any,
}

/// Counters of one communicator since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Operations that have ended well.
    pub operations: u64,
    /// Bytes of elements that were all-reduced on this rank (the size of the buffers, not the traffic).
    pub all_reduced_bytes: u64,
    /// Bytes handed to links, headers included.
    pub sent_bytes: u64,
    /// Bytes of elements taken from links.
    pub received_bytes: u64,
}

/// The ranks of one epoch, as one of them sees them (NCCL: `ncclComm_t`, MPI: a communicator).
///
/// All ranks call the same collectives with the same arguments in the same order; messages between two
/// ranks keep their place in that order on both. Methods take `&mut self`: one thread issues. A
/// blocking call runs on the calling thread; a started one on a progress thread.
///
/// After a [fatal](Error::is_fatal) error every call answers with that error. A communicator never
/// changes membership: drop it and form a new one.
///
/// Dropping a communicator without [`leave`](Self::leave) is a loss to the other ranks, by intent: a
/// rank that panics has not finished. Dropping does not block.
pub struct Communicator {
    rank: usize,
    world_size: usize,
    config: Config,
    progress: Progress,
    fault: Arc<Fault>,
    counters: Arc<Counters>,
    /// The number of collectives issued so far.
    issued: u64,
}

#[derive(Debug, Default)]
struct Counters {
    operations: AtomicU64,
    all_reduced_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

impl Communicator {
    /// Takes over the links of an epoch. All ranks do so with equal `config`.
    ///
    /// # Errors
    /// [`Error::Usage`] for a segment size that is not between 64 bytes and 64 MiB or not a multiple of
    /// 64, or a timeout of zero.
    pub fn new(transport: Box<dyn Transport>, config: Config) -> Result<Self, Error> {
        let usage = |reason| Err(Error::Usage { operation: "Communicator::new", reason });
        if !(64..=PAYLOAD_LIMIT / 2).contains(&config.segment_bytes)
            || !config.segment_bytes.is_multiple_of(64)
        {
            return usage(format!(
                "segment_bytes is {}; choose a multiple of 64 between 64 and {}",
                config.segment_bytes,
                PAYLOAD_LIMIT / 2
            ));
        }
        if config.timeout.is_zero() {
            return usage("the timeout is zero; every operation would fail".to_owned());
        }
        let fault = Arc::new(Fault::new(transport.waker()));
        let (rank, world_size) = (transport.rank(), transport.world_size());
        let progress = Progress::new(Engine::new(transport, fault.clone(), config.timeout));
        Ok(Self { rank, world_size, config, progress, fault, counters: Arc::default(), issued: 0 })
    }

    /// This rank (NCCL: `ncclCommUserRank`).
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks (NCCL: `ncclCommCount`).
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// How this communicator works.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Counters since the start. Does not block; an operation counts when it has ended.
    pub fn statistics(&self) -> Statistics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            operations: read(&self.counters.operations),
            all_reduced_bytes: read(&self.counters.all_reduced_bytes),
            sent_bytes: read(&self.counters.sent_bytes),
            received_bytes: read(&self.counters.received_bytes),
        }
    }

    /// Which schedule a call of `kind` with `count` elements of `dtype` would run, and why that one. `count` is that of
    /// [`Operation::count`]. Calls nothing and changes nothing.
    ///
    /// # Errors
    /// [`Error::Usage`] when the configured algorithm cannot keep the order.
    pub fn explain(&self, kind: Kind, dtype: DType, count: usize) -> Result<(String, String), Error> {
        let ring = self.prefers_ring(kind, count.saturating_mul(dtype.size()))?;
        let (name, why) = match (kind, ring) {
            _ if self.world_size == 1 => ("local", "there is no other rank"),
            (Kind::Barrier, _) => ("dissemination", "it is the only schedule of a barrier"),
            (Kind::Message { .. }, _) => ("message", "two ranks share one link"),
            (_, true) if self.config.algorithm == Algorithm::Ring => ("ring", "the algorithm is set to ring"),
            (_, false) if self.config.algorithm == Algorithm::Direct => {
                ("direct", "the algorithm is set to direct")
            }
            (_, true) => ("chain", "4 segments or more: each link carries the buffer once"),
            (Kind::Broadcast { .. }, false) if self.world_size == 2 => ("direct", "there is one other rank"),
            (Kind::Broadcast { .. }, false) => ("direct", "less than 4 segments: one latency to each rank"),
            (_, false) => ("direct", "a ring's bytes in fewer latencies, and the fixed order"),
        };
        Ok((name.to_owned(), why.to_owned()))
    }

    /// A handle with which another thread ends this communicator's operations.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter { fault: self.fault.clone() }
    }

    /// Has `observer` called with the fatal error when this communicator fails, on the thread that runs
    /// the operation, before the other ranks are told. It must not block. Replaces an earlier observer.
    pub fn on_failure(&mut self, observer: impl FnOnce(&Error) + Send + 'static) {
        self.progress.run(|engine| engine.observer = Some(Box::new(observer)));
    }

    /// Replaces `buffer` on every rank by the reduction of all ranks' buffers (NCCL: `ncclAllReduce`
    /// in place, MPI: `MPI_Allreduce` with `MPI_IN_PLACE`).
    ///
    /// `buffer` has the same length on all ranks. The result has the same bits on all ranks and, under
    /// [`Order::Fixed`], in every run. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when the configured algorithm cannot keep the order; otherwise fatal ones.
    pub fn all_reduce<T: Element>(&mut self, buffer: &mut [T], op: ReduceOp) -> Result<(), Error> {
        let call = self.call::<T>(Kind::AllReduce(op), buffer.len())?;
        self.run(call, Buffers::in_place(buffer))
    }

    /// [`all_reduce`](Self::all_reduce) from one buffer into another of the same length.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); [`Error::Usage`] when the lengths differ.
    pub fn all_reduce_into<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<(), Error> {
        check_len("all_reduce", "output", output.len(), input.len(), "as long as the input")?;
        let call = self.call::<T>(Kind::AllReduce(op), input.len())?;
        self.run(call, Buffers::separate(input, output))
    }

    /// Starts an [`all_reduce`](Self::all_reduce) that owns its buffer meanwhile, and returns at once.
    ///
    /// # Errors
    /// [`Error::Usage`] as for [`all_reduce`](Self::all_reduce), and when the progress thread cannot be
    /// started; all others come from the returned [`Work`].
    pub fn all_reduce_start<T: Element>(&mut self, buffer: Vec<T>, op: ReduceOp) -> Result<Work<T>, Error> {
        let call = self.call::<T>(Kind::AllReduce(op), buffer.len())?;
        self.start(call, buffer)
    }

    /// Reduces all ranks' inputs and gives chunk i to rank i (NCCL: `ncclReduceScatter`, MPI:
    /// `MPI_Reduce_scatter_block`).
    ///
    /// `input` holds world size chunks of `output.len()` elements. The sums have the order, and the
    /// bits, of [`all_reduce`](Self::all_reduce). Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when the lengths do not fit or the configured algorithm cannot keep the order;
    /// otherwise fatal ones.
    pub fn reduce_scatter<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<(), Error> {
        let expected = self.total("reduce_scatter", output.len())?;
        check_len("reduce_scatter", "input", input.len(), expected, "world size times the output")?;
        let call = self.call::<T>(Kind::ReduceScatter(op), output.len())?;
        self.run(call, Buffers::separate(input, output))
    }

    /// Gives every rank the inputs of all ranks, in rank order (NCCL: `ncclAllGather`, MPI:
    /// `MPI_Allgather`).
    ///
    /// `input` has the same length on all ranks; `output` holds world size times as many. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when the lengths do not fit; otherwise fatal ones.
    pub fn all_gather<T: Element>(&mut self, input: &[T], output: &mut [T]) -> Result<(), Error> {
        let expected = self.total("all_gather", input.len())?;
        check_len("all_gather", "output", output.len(), expected, "world size times the input")?;
        let call = self.call::<T>(Kind::AllGather, input.len())?;
        self.run(call, Buffers::separate(input, output))
    }

    /// Replaces `buffer` on every rank by that of `root` (NCCL: `ncclBroadcast`, MPI: `MPI_Bcast`).
    ///
    /// `buffer` has the same length on all ranks. Blocks; on the root until the links have taken the
    /// elements, not until the others have them.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such root; otherwise fatal ones.
    pub fn broadcast<T: Element>(&mut self, buffer: &mut [T], root: usize) -> Result<(), Error> {
        self.check_rank("broadcast", "root", root)?;
        let call = self.call::<T>(Kind::Broadcast { root }, buffer.len())?;
        self.run(call, Buffers::in_place(buffer))
    }

    /// Returns when every rank has called it (MPI: `MPI_Barrier`). Blocks.
    ///
    /// # Errors
    /// Fatal ones only.
    pub fn barrier(&mut self) -> Result<(), Error> {
        let call = self.call::<u8>(Kind::Barrier, 0)?;
        self.run(call, Buffers::in_place::<u8>(&mut []))
    }

    /// Sends `buffer` to rank `to`, which calls [`recv`](Self::recv) with as many elements (NCCL:
    /// `ncclSend`, MPI: `MPI_Send`).
    ///
    /// Messages between two ranks arrive in the order sent, and keep their place among the collectives:
    /// a message sent before a collective is received before it. Blocks until the link has taken the
    /// elements; two ranks that send each other long messages at the same time must not both send first.
    ///
    /// # Errors
    /// [`Error::Usage`] when `to` is this rank or does not exist; otherwise fatal ones.
    pub fn send<T: Element>(&mut self, buffer: &[T], to: usize) -> Result<(), Error> {
        self.check_peer("send", to)?;
        let call = self.call::<T>(Kind::Message { from: self.rank, to }, buffer.len())?;
        self.run(call, Buffers::separate(buffer, &mut []))
    }

    /// Receives into `buffer` what rank `from` sends with [`send`](Self::send), exactly as many elements
    /// (NCCL: `ncclRecv`, MPI: `MPI_Recv`). Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when `from` is this rank or does not exist; otherwise fatal ones.
    pub fn recv<T: Element>(&mut self, buffer: &mut [T], from: usize) -> Result<(), Error> {
        self.check_peer("recv", from)?;
        let call = self.call::<T>(Kind::Message { from, to: self.rank }, buffer.len())?;
        self.run(call, Buffers::separate(&[], buffer))
    }

    /// Leaves the group in order: finishes what was started, says goodbye, and returns when the others
    /// have everything this rank sent. Later operations of theirs that need this rank are a
    /// [`PeerLeft`](Error::PeerLeft) error, not a loss. Blocks, for the configured timeout at most.
    ///
    /// # Errors
    /// The fatal error the communicator had before, or [`Error::Leave`] naming the ranks that did not
    /// confirm in time.
    pub fn leave(mut self) -> Result<(), Error> {
        let deadline = Instant::now() + self.config.timeout;
        self.progress.run(|engine| engine.leave(deadline))
    }

    /// Checks and numbers a call, and chooses its schedule.
    fn call<T: Element>(&mut self, kind: Kind, count: usize) -> Result<Call, Error> {
        let schedule = self.schedule::<T>(kind, count)?;
        // At most 32 MiB / 1, so it fits the header; 16-bit sums travel as f32 in rings.
        let segment_len = self.config.segment_bytes / T::DTYPE.size();
        let message = matches!(kind, Kind::Message { .. });
        let operation = Operation {
            number: self.issued + 1,
            kind,
            dtype: T::DTYPE,
            count,
            segment_len: if message { 0 } else { segment_len as u32 },
            schedule: code(schedule),
        };
        self.issued += u64::from(!message);
        Ok(Call { operation, plan: Plan::new(schedule, self.world_size, self.rank, count, segment_len) })
    }

    fn schedule<T: Element>(&self, kind: Kind, count: usize) -> Result<Schedule, Error> {
        let ring = self.prefers_ring(kind, count.saturating_mul(T::DTYPE.size()))?;
        Ok(match (kind, ring) {
            (Kind::AllReduce(_), false) => Schedule::AllReduceDirect,
            (Kind::AllReduce(_), true) => Schedule::AllReduceRing,
            (Kind::ReduceScatter(_), false) => Schedule::ReduceScatterDirect,
            (Kind::ReduceScatter(_), true) => Schedule::ReduceScatterRing,
            (Kind::AllGather, false) => Schedule::AllGatherDirect,
            (Kind::AllGather, true) => Schedule::AllGatherRing,
            (Kind::Broadcast { root }, false) => Schedule::BroadcastDirect { root },
            (Kind::Broadcast { root }, true) => Schedule::BroadcastChain { root },
            (Kind::Barrier, _) => Schedule::Barrier,
            (Kind::Message { from, to }, _) if from == self.rank => Schedule::SendTo { peer: to },
            (Kind::Message { from, .. }, _) => Schedule::ReceiveFrom { peer: from },
        })
    }

    /// The choice between direct exchange and ring; a function of what all ranks have in common.
    fn prefers_ring(&self, kind: Kind, bytes: usize) -> Result<bool, Error> {
        // A root that sends S bytes to each of n - 1 ranks sends (n - 1)/1 times as much as a chain
        // link does; below about 4 segments the chain's n - 1 latencies cost more than that saves.
        let long = bytes >= 4 * self.config.segment_bytes;
        match (self.config.algorithm, kind) {
            (Algorithm::Direct, _) | (_, Kind::Barrier | Kind::Message { .. }) => Ok(false),
            (Algorithm::Ring, Kind::AllReduce(_) | Kind::ReduceScatter(_))
                if self.config.order == Order::Fixed && self.world_size > 2 =>
            {
                Err(Error::Usage {
                    operation: name(kind),
                    reason: "a ring adds in another order: set order to any, or choose another algorithm"
                        .to_owned(),
                })
            }
            (Algorithm::Ring, _) => Ok(true),
            (Algorithm::Auto, Kind::Broadcast { .. }) => Ok(self.world_size > 2 && long),
            // Direct exchange moves the same bytes with fewer latencies, in the fixed order.
            (Algorithm::Auto, _) => Ok(false),
        }
    }

    fn run(&mut self, call: Call, buffers: Buffers<'_>) -> Result<(), Error> {
        let counters = self.counters.clone();
        let world_size = self.world_size;
        self.progress.run(|engine| call.run(engine, buffers, world_size, &counters))
    }

    fn start<T: Element>(&mut self, call: Call, mut buffer: Vec<T>) -> Result<Work<T>, Error> {
        let (work, slot) = Work::new();
        let (world_size, counters) = (self.world_size, self.counters.clone());
        let name = call.operation.name();
        let job = Box::new(move |engine: &mut Engine| {
            let outcome = call.run(engine, Buffers::in_place(&mut buffer), world_size, &counters);
            slot.complete(outcome.map(|()| buffer));
        });
        match self.progress.start(job) {
            Ok(()) => Ok(work),
            Err(error) => {
                // The number stays used: the other ranks count this call.
                let reason = format!("cannot start the progress thread: {error}");
                Err(Error::Usage { operation: name, reason })
            }
        }
    }

    fn total(&self, operation: &'static str, share: usize) -> Result<usize, Error> {
        share.checked_mul(self.world_size).ok_or_else(|| Error::Usage {
            operation,
            reason: format!(
                "{share} elements on each of {} ranks are more than memory holds",
                self.world_size
            ),
        })
    }

    fn check_rank(&self, operation: &'static str, role: &str, rank: usize) -> Result<(), Error> {
        if rank < self.world_size {
            return Ok(());
        }
        let reason = format!("{role} {rank} does not exist; the ranks are 0 to {}", self.world_size - 1);
        Err(Error::Usage { operation, reason })
    }

    fn check_peer(&self, operation: &'static str, peer: usize) -> Result<(), Error> {
        self.check_rank(operation, "rank", peer)?;
        if peer == self.rank {
            return Err(Error::Usage { operation, reason: format!("rank {peer} is this rank itself") });
        }
        Ok(())
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("issued", &self.issued)
            .finish_non_exhaustive()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Ends what the progress thread is at; the thread then drops the engine and its links.
        self.interrupter().interrupt("the communicator was dropped");
    }
}

/// A checked, numbered call.
struct Call {
    operation: Operation,
    plan: Plan,
}

impl Call {
    fn run(
        &self,
        engine: &mut Engine,
        buffers: Buffers<'_>,
        world_size: usize,
        counters: &Counters,
    ) -> Result<(), Error> {
        // A mutant for the tests of training: they must notice that nothing is reduced.
        if cfg!(paceline_mutant = "skip_all_reduce") && matches!(self.operation.kind, Kind::AllReduce(_)) {
            return Ok(());
        }
        let reducer = match self.operation.kind {
            Kind::AllReduce(op) | Kind::ReduceScatter(op) => {
                Some(Reducer::new(self.operation.dtype, op, world_size))
            }
            _ => None,
        };
        engine.run(self.operation, &self.plan, reducer, buffers)?;
        counters.operations.fetch_add(1, Ordering::Relaxed);
        if let Kind::AllReduce(_) = self.operation.kind {
            let bytes = self.operation.count * self.operation.dtype.size();
            counters.all_reduced_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        counters.sent_bytes.store(engine.sent_bytes, Ordering::Relaxed);
        counters.received_bytes.store(engine.received_bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// The schedule's code in the operation header, so that ranks configured differently notice.
fn code(schedule: Schedule) -> u8 {
    match schedule {
        Schedule::AllReduceDirect
        | Schedule::ReduceDirect { .. }
        | Schedule::ReduceScatterDirect
        | Schedule::AllGatherDirect
        | Schedule::BroadcastDirect { .. }
        | Schedule::Gather { .. }
        | Schedule::Scatter { .. }
        | Schedule::AllToAll => 1,
        Schedule::AllReduceRing
        | Schedule::ReduceChain { .. }
        | Schedule::ReduceScatterRing
        | Schedule::AllGatherRing
        | Schedule::BroadcastChain { .. } => 2,
        Schedule::Barrier | Schedule::SendTo { .. } | Schedule::ReceiveFrom { .. } => 0,
    }
}

fn name(kind: Kind) -> &'static str {
    Operation { number: 0, kind, dtype: DType::U8, count: 0, segment_len: 0, schedule: 0 }.name()
}

fn check_len(
    operation: &'static str,
    buffer: &str,
    len: usize,
    expected: usize,
    rule: &str,
) -> Result<(), Error> {
    if len == expected {
        return Ok(());
    }
    let reason = format!("the {buffer} has {len} elements and needs {expected} ({rule})");
    Err(Error::Usage { operation, reason })
}
