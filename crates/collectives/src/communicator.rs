//! The group of ranks a program talks to.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use paceline_transport::Transport;
use paceline_transport::frame::PAYLOAD_LIMIT;
use paceline_transport::shm::SharedMemory;

use crate::buffer::{Buffers, Starts};
use crate::dtype::{DType, Element, ReduceOp};
use crate::engine::Engine;
use crate::error::Error;
use crate::fault::{Fault, Interrupter};
use crate::kernels::{self, Reducer};
use crate::network::{self, Broadcast, Link, Links, Network};
use crate::operation::{self, Kind, Operation};
use crate::plan::{Plan, Schedule, Shares};
use crate::progress::Progress;
use crate::recorder::{FlightRecorder, Recorder, RecordsOnDevice, Ticket};
use crate::rounds::RoundObserver;
use crate::shared::registered::SharedBuffer;
use crate::shared::{Costs, PROBES, Tuning};
use crate::work::Work;

/// How often the probe of [`Communicator::tune`] measures each point, and how many calls it takes each time: 4 ms in
/// all with 2 ranks.
const PROBE_ROUNDS: u32 = 6;
const PROBE_CALLS: u32 = 4;

/// How often the probe of a link goes there and back, and how much it then carries each way. Enough to tell a
/// rate of 10 GB/s from one of 1; on a link of 50 ms it is the latency that takes the time, 0.3 s for each.
const LINK_ROUND_TRIPS: u32 = 3;
const LINK_PROBE_BYTES: usize = 256 * 1024;

/// Where the numbers of a probe begin, far enough below 1.
const PROBE_NUMBERS: u64 = (1u64 << 32).wrapping_neg();

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
    /// Recursive halving and doubling of Rabenseifner, for all_reduce and reduce_scatter, which need
    /// [`Order::Any`] then: every rank talks to log2 n others. Everything else is direct.
    Halving,
}

/// The family of schedules that runs a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Direct,
    Ring,
    Halving,
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
    /// Those of `sent_bytes` that went to ranks which do not share memory with this one.
    pub network_sent_bytes: u64,
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
    /// Tells it from other communicators of the same epoch; 0 for the one that the others are split from.
    group: u64,
    /// What messages cost. Equal on all ranks.
    network: Arc<Network>,
    recorder: Recorder,
    flight_recorder: FlightRecorder,
}

#[derive(Debug, Default)]
struct Counters {
    operations: AtomicU64,
    all_reduced_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    network_sent_bytes: AtomicU64,
}

impl Communicator {
    /// Takes over the links of an epoch. All ranks do so with equal `config`.
    ///
    /// # Errors
    /// [`Error::Usage`] for a segment size that is not between 64 bytes and 64 MiB or not a multiple of
    /// 64, or a timeout of zero.
    pub fn new(transport: Box<dyn Transport>, config: Config) -> Result<Self, Error> {
        let members = (0..transport.world_size()).collect();
        Self::form(transport, config, (0, members), FlightRecorder::new())
    }

    /// Makes the communicator of a group, which is noted in a recorder.
    fn form(
        transport: Box<dyn Transport>,
        config: Config,
        (group, members): (u64, Vec<usize>),
        flight_recorder: FlightRecorder,
    ) -> Result<Self, Error> {
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
        let forced = config.algorithm != Algorithm::Auto;
        let network = Arc::new(Network::unmeasured(world_size));
        let recorded = flight_recorder.add(group, members, rank);
        let records = (flight_recorder.clone(), recorded.clone());
        let engine = Engine::new(transport, fault.clone(), config.timeout, forced, network.clone(), records);
        let (progress, counters) = (Progress::new(engine), Arc::default());
        let recorder = Recorder::new(recorded);
        Ok(Self {
            rank,
            world_size,
            config,
            progress,
            fault,
            counters,
            issued: 0,
            group,
            network,
            recorder,
            flight_recorder,
        })
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
            network_sent_bytes: read(&self.counters.network_sent_bytes),
        }
    }

    /// How long this rank has waited for each rank since the start, in operations that found it late, by rank.
    /// Moments too short to park for do not count. Waits for all that was started before to end.
    pub fn waits(&mut self) -> Vec<Duration> {
        self.progress.run(|engine| engine.waits.by_rank().to_vec())
    }

    /// Which schedule a call of `kind` with `count` elements of `dtype` would run, and why that one. `count` is that of
    /// [`Operation::count`]. Calls nothing and changes nothing.
    ///
    /// # Errors
    /// [`Error::Usage`] when the configured algorithm cannot keep the order.
    pub fn explain(&mut self, kind: Kind, dtype: DType, count: usize) -> Result<(String, String), Error> {
        let bytes = count.saturating_mul(dtype.size());
        if let Some((name, why)) = self.progress.run(|engine| engine.explain(kind, bytes)) {
            return Ok((name.to_owned(), why));
        }
        let family = self.family(kind)?;
        let (name, why) = match (kind, family) {
            _ if self.world_size == 1 => ("local", "there is no other rank"),
            (Kind::Barrier, _) => ("dissemination", "it is the only schedule of a barrier"),
            (Kind::Message { .. }, _) => ("message", "two ranks share one link"),
            (kind, _) if has_one_schedule(kind) => ("direct", "every part goes straight to where it belongs"),
            (_, Family::Ring) => ("ring", "the algorithm is set to ring"),
            (Kind::AllReduce(_), Family::Halving) => {
                let micros = self.network.halving_micros(self.world_size, bytes);
                let network = self.network.describe();
                let why = format!("the algorithm is set to halving; {micros:.0} us at {network}");
                return Ok(("halving".to_owned(), why));
            }
            (_, Family::Halving) => ("halving", "the algorithm is set to halving"),
            (_, Family::Direct) if self.config.algorithm == Algorithm::Direct => {
                ("direct", "the algorithm is set to direct")
            }
            (_, Family::Direct) if self.config.algorithm == Algorithm::Halving => {
                ("direct", "there is no halving of this collective")
            }
            (Kind::Broadcast { .. }, _) if self.config.algorithm == Algorithm::Auto => {
                return Ok(self.explain_broadcast(bytes));
            }
            (Kind::AllReduce(_), Family::Direct) if self.config.algorithm == Algorithm::Auto => {
                return Ok(self.explain_all_reduce(bytes));
            }
            (Kind::Reduce { .. }, Family::Direct) => {
                ("direct", "every rank reduces its part, in the fixed order")
            }
            (_, _) => ("direct", "a ring's bytes in fewer latencies, and the fixed order"),
        };
        Ok((name.to_owned(), why.to_owned()))
    }

    fn explain_all_reduce(&self, bytes: usize) -> (String, String) {
        let [one_shot, direct] = self.network.all_reduce_micros(self.world_size, bytes);
        let name = if self.goes_in_one_shot(bytes) { "one-shot" } else { "direct" };
        let halving = self.network.halving_micros(self.world_size, bytes);
        let network = self.network.describe();
        let costs = match self.config.order {
            Order::Fixed => format!("one-shot {one_shot:.0} us, direct {direct:.0} us at {network}"),
            Order::Any => format!(
                "one-shot {one_shot:.0} us, direct {direct:.0} us, halving {halving:.0} us at {network}"
            ),
        };
        (name.to_owned(), costs)
    }

    fn explain_broadcast(&self, bytes: usize) -> (String, String) {
        let name = match self.network.broadcast(self.world_size, bytes, self.config.segment_bytes) {
            Broadcast::Direct => "direct",
            Broadcast::Tree => "tree",
            Broadcast::Chain => "chain",
        };
        (name.to_owned(), format!("the shortest at {}", self.network.describe()))
    }

    /// Measures which way is the fastest for which size, and goes that way from now on. Every rank calls it
    /// before any collective; rank 0 decides for all. Numbers and [`statistics`](Self::statistics) begin anew.
    /// Blocks.
    ///
    /// Where all ranks share memory, all-reduces are tried for a few milliseconds, unless ranks have to share
    /// processors. Otherwise each rank measures its links to up to 15 others, one after the other: a few round
    /// trips and half a megabyte for each. Links much slower than most are reported by rank 0, as a warning.
    ///
    /// # Errors
    /// [`Error::Usage`] after the first collective; otherwise fatal ones, which the next operation reports as
    /// its own. So they may be ignored here.
    pub fn tune(&mut self) -> Result<(), Error> {
        if self.issued > 0 {
            let reason = "collectives have been called already; tune before the first".to_owned();
            return Err(Error::Usage { operation: "tune", reason });
        }
        let probed =
            self.progress.run(|engine| engine.host_of_all().map(|host| (host.can_probe, host.tuning)));
        // Numbers below the first one's: a rank may get there while others are still here.
        self.issued = PROBE_NUMBERS;
        let probed = match probed {
            Some((true, untuned)) => self.tune_host(untuned),
            None if self.world_size > 1 => self.tune_network(),
            Some((false, _)) | None => Ok(()),
        };
        self.issued = 0;
        probed?;
        self.counters = Arc::default();
        self.recorder.clear();
        self.progress.run(Engine::forget);
        Ok(())
    }

    /// Tries the ways through shared memory.
    fn tune_host(&mut self, untuned: Tuning) -> Result<(), Error> {
        let mut times = [Duration::MAX; PROBES.len()];
        let longest = PROBES.iter().map(|&(_, bytes)| bytes).max().unwrap_or(0) / size_of::<f32>();
        let (input, mut output) = (vec![1.0f32; longest], vec![0.0f32; longest]);
        for ((way, bytes), time) in PROBES.into_iter().zip(&mut times) {
            self.set_tuning(untuned.forced(way));
            let count = bytes / size_of::<f32>();
            for _ in 0..PROBE_ROUNDS {
                let start = Instant::now();
                for _ in 0..PROBE_CALLS {
                    self.all_reduce_into(&input[..count], &mut output[..count], ReduceOp::Sum)?;
                }
                // The shortest: whatever else ran on the machine only made the others longer.
                *time = (*time).min(start.elapsed() / PROBE_CALLS);
            }
        }
        let mut costs = Costs::fit(times).to_words();
        self.broadcast(&mut costs, 0)?;
        self.set_tuning(untuned.fitted(Costs::from_words(costs)));
        Ok(())
    }

    /// Measures links, pair by pair, and has rank 0 make a model of them.
    fn tune_network(&mut self) -> Result<(), Error> {
        let mut own: Links = vec![None; self.world_size];
        let mut buffer = vec![0u8; LINK_PROBE_BYTES];
        for round in 0..network::rounds(self.world_size) {
            if let Some(peer) = network::partner(self.rank, self.world_size, round) {
                own[peer] = Some(self.measure_link(peer, &mut buffer)?);
            }
        }
        let words: Vec<u64> = own.iter().flat_map(|link| Link::to_words(*link)).collect();
        let mut all = vec![0; words.len() * self.world_size];
        self.all_gather(&words, &mut all)?;
        let rows: Vec<Links> = all
            .chunks_exact(words.len())
            .map(|row| row.chunks_exact(2).map(|link| Link::from_words([link[0], link[1]])).collect())
            .collect();
        let mut model = Network::of(&rows).to_words();
        self.broadcast(&mut model, 0)?;
        // All ranks get the same words, and refuse the same ones.
        if let Some(network) = Network::from_words(&model, self.world_size) {
            self.network = Arc::new(network);
        }
        if self.rank == 0 {
            tracing::info!(world_size = self.world_size, links = self.network.describe(), "links measured");
            for (from, to, link) in network::slow_links(&rows) {
                let (latency_us, gb_per_s) = (link.latency.as_micros() as u64, 1.0 / link.per_byte.max(1e-3));
                tracing::warn!(from, to, latency_us, gb_per_s, "a link is much slower than most");
            }
        }
        let network = self.network.clone();
        self.progress.run(|engine| engine.network = network);
        // Whoever leaves first must not take anything that others still wait for.
        self.barrier()
    }

    /// Some round trips with a peer, and as many bytes as `buffer` has in each direction.
    fn measure_link(&mut self, peer: usize, buffer: &mut [u8]) -> Result<Link, Error> {
        let first = self.rank < peer;
        let mut turn = |communicator: &mut Self, bytes: usize| {
            let start = Instant::now();
            if first {
                communicator.send(&buffer[..bytes], peer)?;
                communicator.recv(&mut buffer[..bytes], peer)?;
            } else {
                communicator.recv(&mut buffer[..bytes], peer)?;
                communicator.send(&buffer[..bytes], peer)?;
            }
            Ok(start.elapsed())
        };
        // The first finds the peer at whatever it does, and its side of the link cold.
        turn(self, 1)?;
        let mut shortest = Duration::MAX;
        for _ in 0..LINK_ROUND_TRIPS {
            shortest = shortest.min(turn(self, 1)?);
        }
        let long = turn(self, LINK_PROBE_BYTES)?.min(turn(self, LINK_PROBE_BYTES)?);
        let per_byte = long.saturating_sub(shortest).as_nanos() as f64 / (2 * LINK_PROBE_BYTES) as f64;
        Ok(Link { latency: shortest / 2, per_byte })
    }

    fn set_tuning(&mut self, tuning: Tuning) {
        self.progress.run(|engine| engine.host().map(|host| host.tuning = tuning));
    }

    /// What this communicator and those split from it did last, for any thread to read at any time.
    pub fn flight_recorder(&self) -> FlightRecorder {
        self.flight_recorder.clone()
    }

    /// A handle with which another thread ends this communicator's operations.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter { fault: self.fault.clone() }
    }

    /// Has `listener` called with each rank that an [`Interrupter`] says is dead and with the reason, also those of
    /// before, at once and on the interrupter's thread. It must not block. Replaces an earlier listener.
    pub(crate) fn on_loss(&self, listener: impl Fn(usize, &str) + Send + 'static) {
        self.fault.on_loss(listener);
    }

    /// Has `observer` called with the fatal error when this communicator fails, on the thread that runs
    /// the operation, before the other ranks are told. It must not block. Replaces an earlier observer.
    pub fn on_failure(&mut self, observer: impl FnOnce(&Error) + Send + 'static) {
        self.progress.run(|engine| engine.observer = Some(Box::new(observer)));
    }

    /// Has `observer` called before each round of an operation with the round's number in it, on the thread that runs the
    /// operation: a round has a segment of a long operation. Collectives that fit into one step of shared memory have no
    /// rounds. For faults in the middle of an operation; it must not block. Replaces an earlier observer.
    pub fn on_round(&mut self, observer: impl Fn(usize) + Send + Sync + 'static) {
        self.progress.run(|engine| engine.on_round(RoundObserver::new(observer)));
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

    /// Replaces `buffer` on every rank by the sum of all ranks' buffers, each multiplied by that rank's
    /// `factor` first (NCCL: `ncclAllReduce` with an operator of `ncclRedOpCreatePreMulSum`).
    ///
    /// Factors may differ. The product is taken in the type in which sums are accumulated (f32 for the
    /// 16-bit floats) and rounded to the element type, then the elements are summed as by
    /// [`all_reduce`](Self::all_reduce). For integers the factor is converted to their type, towards zero,
    /// and products wrap. Blocks.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_reduce_pre_mul_sum<T: Element>(&mut self, buffer: &mut [T], factor: f64) -> Result<(), Error> {
        let call = self.call::<T>(Kind::AllReduce(ReduceOp::Sum), buffer.len())?;
        kernels::scale_in_place(T::DTYPE, factor, bytemuck::cast_slice_mut(buffer));
        self.run(call, Buffers::in_place(buffer))
    }

    /// [`all_reduce_pre_mul_sum`](Self::all_reduce_pre_mul_sum) from one buffer into another of the same length.
    ///
    /// # Errors
    /// As [`all_reduce_into`](Self::all_reduce_into).
    pub fn all_reduce_pre_mul_sum_into<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        factor: f64,
    ) -> Result<(), Error> {
        check_len("all_reduce", "output", output.len(), input.len(), "as long as the input")?;
        let call = self.call::<T>(Kind::AllReduce(ReduceOp::Sum), input.len())?;
        kernels::scale(T::DTYPE, factor, bytemuck::cast_slice(input), bytemuck::cast_slice_mut(output));
        self.run(call, Buffers::in_place(output))
    }

    /// Starts an [`all_reduce`](Self::all_reduce) that owns its buffer meanwhile, and returns at once.
    ///
    /// # Errors
    /// [`Error::Usage`] as for [`all_reduce`](Self::all_reduce), and when the progress thread cannot be
    /// started; all others come from the returned [`Work`].
    pub fn all_reduce_start<T: Element>(&mut self, buffer: Vec<T>, op: ReduceOp) -> Result<Work<T>, Error> {
        let call = self.call::<T>(Kind::AllReduce(op), buffer.len())?;
        self.start(call, buffer, Starts::default())
    }

    /// Reduces all ranks' buffers and replaces the root's by the result (NCCL: `ncclReduce` in place, MPI:
    /// `MPI_Reduce` with `MPI_IN_PLACE`).
    ///
    /// `buffer` has the same length on all ranks; those of other ranks than `root` are only read. The result
    /// has the order, and the bits, of [`all_reduce`](Self::all_reduce). Blocks; on other ranks than the root
    /// until they have done their part of the work.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such root or the configured algorithm cannot keep the order;
    /// otherwise fatal ones.
    pub fn reduce<T: Element>(&mut self, buffer: &mut [T], op: ReduceOp, root: usize) -> Result<(), Error> {
        self.check_rank("reduce", "root", root)?;
        let call = self.call::<T>(Kind::Reduce { op, root }, buffer.len())?;
        self.run(call, Buffers::in_place(buffer))
    }

    /// [`reduce`](Self::reduce) from one buffer into another of the same length. `output` is used on the
    /// root only; on other ranks it may have any length, and is left as it is.
    ///
    /// # Errors
    /// As [`reduce`](Self::reduce); [`Error::Usage`] when the lengths differ on the root.
    pub fn reduce_into<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
        root: usize,
    ) -> Result<(), Error> {
        self.check_rank("reduce", "root", root)?;
        if self.rank == root {
            check_len("reduce", "output", output.len(), input.len(), "as long as the input")?;
        }
        let call = self.call::<T>(Kind::Reduce { op, root }, input.len())?;
        self.run(call, Buffers::separate(input, output))
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

    /// [`reduce_scatter`](Self::reduce_scatter) that puts this rank's chunk of the reduction where this
    /// rank's chunk of the input is (NCCL: in place). The other chunks of `buffer` stay as they are.
    ///
    /// `buffer` holds world size chunks of the same length. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when the length is no multiple of the world size or the configured algorithm cannot
    /// keep the order; otherwise fatal ones.
    pub fn reduce_scatter_in_place<T: Element>(
        &mut self,
        buffer: &mut [T],
        op: ReduceOp,
    ) -> Result<(), Error> {
        let share = self.share("reduce_scatter", "buffer", buffer.len())?;
        let call = self.call::<T>(Kind::ReduceScatter(op), share)?;
        self.run(call, Buffers::within(buffer, self.output_share(share)))
    }

    /// Starts a [`reduce_scatter_in_place`](Self::reduce_scatter_in_place) that owns its buffer meanwhile,
    /// and returns at once.
    ///
    /// # Errors
    /// [`Error::Usage`] as there, and when the progress thread cannot be started; all others come from the
    /// returned [`Work`].
    pub fn reduce_scatter_start<T: Element>(
        &mut self,
        buffer: Vec<T>,
        op: ReduceOp,
    ) -> Result<Work<T>, Error> {
        let share = self.share("reduce_scatter", "buffer", buffer.len())?;
        let call = self.call::<T>(Kind::ReduceScatter(op), share)?;
        self.start(call, buffer, self.output_share(share))
    }

    /// Reduces all ranks' inputs and gives rank i its share, which has its own length (MPI:
    /// `MPI_Reduce_scatter`).
    ///
    /// `counts[i]` is the length of rank i's share, in elements; 0 is allowed, and all ranks have the same
    /// `counts`. `input` holds all shares in rank order, `output` this rank's. The sums have the order, and
    /// the bits, of [`all_reduce`](Self::all_reduce). Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when lengths and counts do not fit or the configured algorithm cannot keep the order;
    /// otherwise fatal ones, among them [`Error::Mismatch`] when ranks have different counts.
    pub fn reduce_scatter_v<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<(), Error> {
        self.check_counts("reduce_scatter_v", ("counts", counts), ("input", input.len()))?;
        let share = counts[self.rank];
        check_len("reduce_scatter_v", "output", output.len(), share, "this rank's count")?;
        let kind = Kind::ReduceScatterV { op, counts: operation::digest(counts) };
        let shares = shares_of(counts);
        let call = self.call_shared::<T>(kind, input.len(), shares)?;
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

    /// [`all_gather`](Self::all_gather) whose input is this rank's chunk of the output (NCCL: in place, MPI:
    /// `MPI_IN_PLACE`).
    ///
    /// `buffer` holds world size chunks of the same length. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when the length is no multiple of the world size; otherwise fatal ones.
    pub fn all_gather_in_place<T: Element>(&mut self, buffer: &mut [T]) -> Result<(), Error> {
        let share = self.share("all_gather", "buffer", buffer.len())?;
        let call = self.call::<T>(Kind::AllGather, share)?;
        self.run(call, Buffers::within(buffer, self.input_share(share)))
    }

    /// Starts an [`all_gather_in_place`](Self::all_gather_in_place) that owns its buffer meanwhile, and
    /// returns at once.
    ///
    /// # Errors
    /// [`Error::Usage`] as there, and when the progress thread cannot be started; all others come from the
    /// returned [`Work`].
    pub fn all_gather_start<T: Element>(&mut self, buffer: Vec<T>) -> Result<Work<T>, Error> {
        let share = self.share("all_gather", "buffer", buffer.len())?;
        let call = self.call::<T>(Kind::AllGather, share)?;
        self.start(call, buffer, self.input_share(share))
    }

    /// Gives every rank the inputs of all ranks, in rank order, when they differ in length (MPI:
    /// `MPI_Allgatherv`).
    ///
    /// `counts[i]` is the length of rank i's input, in elements; 0 is allowed, and all ranks have the same
    /// `counts`. `output` holds their sum. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when lengths and counts do not fit; otherwise fatal ones, among them
    /// [`Error::Mismatch`] when ranks have different counts.
    pub fn all_gather_v<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
    ) -> Result<(), Error> {
        self.check_counts("all_gather_v", ("counts", counts), ("output", output.len()))?;
        check_len("all_gather_v", "input", input.len(), counts[self.rank], "this rank's count")?;
        let kind = Kind::AllGatherV { counts: operation::digest(counts) };
        let shares = shares_of(counts);
        let call = self.call_shared::<T>(kind, output.len(), shares)?;
        self.run(call, Buffers::separate(input, output))
    }

    /// Gives the root the inputs of all ranks, in rank order (NCCL: `ncclGather`, MPI: `MPI_Gather`).
    ///
    /// `input` has the same length on all ranks. `output` holds world size times as many on the root; on
    /// other ranks it may have any length, and is left as it is. Blocks; on other ranks than the root until
    /// the link has taken the elements, not until the root has them.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such root or the lengths do not fit; otherwise fatal ones.
    pub fn gather<T: Element>(&mut self, input: &[T], output: &mut [T], root: usize) -> Result<(), Error> {
        self.check_rank("gather", "root", root)?;
        let expected = self.total("gather", input.len())?;
        if self.rank == root {
            check_len("gather", "output", output.len(), expected, "world size times the input")?;
        }
        let call = self.call::<T>(Kind::Gather { root }, input.len())?;
        self.run(call, Buffers::separate(input, output))
    }

    /// Gives chunk i of the root's input to rank i (NCCL: `ncclScatter`, MPI: `MPI_Scatter`).
    ///
    /// `output` has the same length on all ranks. `input` holds world size times as many on the root; on
    /// other ranks it may have any length, and is not read. Blocks; on the root until the links have taken
    /// the elements, not until the others have them.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such root or the lengths do not fit; otherwise fatal ones.
    pub fn scatter<T: Element>(&mut self, input: &[T], output: &mut [T], root: usize) -> Result<(), Error> {
        self.check_rank("scatter", "root", root)?;
        let expected = self.total("scatter", output.len())?;
        if self.rank == root {
            check_len("scatter", "input", input.len(), expected, "world size times the output")?;
        }
        let call = self.call::<T>(Kind::Scatter { root }, output.len())?;
        self.run(call, Buffers::separate(input, output))
    }

    /// Gives chunk i of this rank's input to rank i, and takes one from each (NCCL: `ncclAlltoAll`, MPI:
    /// `MPI_Alltoall`).
    ///
    /// `input` and `output` hold world size chunks of the same length, equal on all ranks. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when the lengths differ or are no multiple of the world size; otherwise fatal ones.
    pub fn all_to_all<T: Element>(&mut self, input: &[T], output: &mut [T]) -> Result<(), Error> {
        let share = self.share("all_to_all", "input", input.len())?;
        check_len("all_to_all", "output", output.len(), input.len(), "as long as the input")?;
        let call = self.call::<T>(Kind::AllToAll, share)?;
        self.run(call, Buffers::separate(input, output))
    }

    /// [`all_to_all`](Self::all_to_all) of parts that differ in length (MPI: `MPI_Alltoallv` with parts that
    /// follow each other).
    ///
    /// `send_counts[i]` elements go to rank i, `recv_counts[i]` come from it; 0 is allowed. `input` holds the
    /// parts to all ranks in rank order, `output` those from all ranks. Blocks.
    ///
    /// First all ranks tell each other their counts, which costs one more latency and makes it two operations
    /// in the numbering; so they all notice when two of them disagree.
    ///
    /// # Errors
    /// [`Error::Usage`] when lengths and counts do not fit; the same on all ranks, with nothing exchanged and
    /// the communicator as good as before, when one rank sends another more or less than that one expects.
    /// Otherwise fatal ones.
    pub fn all_to_all_v<T: Element>(
        &mut self,
        input: &[T],
        send_counts: &[usize],
        output: &mut [T],
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        let name = "all_to_all_v";
        self.check_counts(name, ("send_counts", send_counts), ("input", input.len()))?;
        self.check_counts(name, ("recv_counts", recv_counts), ("output", output.len()))?;
        let told = self.tell_counts(send_counts, recv_counts)?;
        let usage = |reason| Error::Usage { operation: name, reason };
        let counts = counts_of_pairs(self.world_size, &told).map_err(usage)?;
        let shares = Shares::by_pair(self.world_size, &counts)
            .ok_or_else(|| usage("the counts of a rank are more than memory holds".to_owned()))?;
        let total = counts.iter().fold(0usize, |total, &count| total.saturating_add(count));
        let kind = Kind::AllToAllV { counts: operation::digest(&counts) };
        let call = self.call_shared::<T>(kind, total, shares)?;
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

    /// Starts a [`broadcast`](Self::broadcast) that owns its buffer meanwhile, and returns at once.
    ///
    /// # Errors
    /// [`Error::Usage`] as there, and when the progress thread cannot be started; all others come from the
    /// returned [`Work`].
    pub fn broadcast_start<T: Element>(&mut self, buffer: Vec<T>, root: usize) -> Result<Work<T>, Error> {
        self.check_rank("broadcast", "root", root)?;
        let call = self.call::<T>(Kind::Broadcast { root }, buffer.len())?;
        self.start(call, buffer, Starts::default())
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

    /// Allocates `len` elements, all zero, in memory that every rank of this host has mapped (NCCL:
    /// `ncclMemAlloc` and `ncclCommRegister`).
    ///
    /// Every rank calls it with the same `len` and element type. Collectives whose buffers lie in such
    /// memory on all ranks read and write them where they are; all others work on it as on any. Where
    /// ranks do not share memory it is ordinary memory. Memory that all ranks have dropped is given back
    /// at the next call. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] on every rank when lengths differ or a rank has no memory left; otherwise fatal ones.
    pub fn alloc<T: Element>(&mut self, len: usize) -> Result<SharedBuffer<T>, Error> {
        let usage = |reason: String| Error::Usage { operation: "alloc", reason };
        let bytes = len.checked_mul(T::DTYPE.size());
        let memory = bytes.and_then(|bytes| SharedMemory::create(bytes.max(1)).ok());
        // A rank without memory says so, or the others would wait for it.
        let own = memory.as_ref().map_or(u64::MAX, |_| len as u64);
        let mut lens = vec![[0u64; 2]; self.world_size];
        self.all_gather(&[own, T::DTYPE as u64], bytemuck::cast_slice_mut::<[u64; 2], u64>(&mut lens))?;
        let without = lens.iter().position(|&[len, _]| len == u64::MAX);
        let (Some(memory), None) = (memory, without) else {
            let rank = without.unwrap_or(self.rank);
            return Err(usage(format!("rank {rank} has no memory for {len} elements of {}", T::DTYPE)));
        };
        if let Some(rank) = lens.iter().position(|&theirs| theirs != [own, T::DTYPE as u64]) {
            let [theirs, dtype] = lens[rank];
            let dtype = DType::from_wire(dtype as u8).map_or("?", DType::name);
            return Err(usage(format!(
                "rank {rank} allocates {theirs} elements of {dtype} and this rank {len} of {}; all ranks allocate alike",
                T::DTYPE
            )));
        }
        let mut dropped = self.progress.run(|engine| engine.host().map(|host| host.table.dropped()));
        if let Some(dropped) = dropped.as_mut().filter(|dropped| !dropped.is_empty()) {
            self.all_reduce(dropped, ReduceOp::Min)?;
            self.progress.run(|engine| engine.host().map(|host| host.table.forget(dropped)));
        }
        let operation = Operation {
            number: self.issued,
            kind: Kind::AllGather,
            dtype: T::DTYPE,
            count: len,
            segment_len: 0,
            schedule: 0,
        };
        let memory = self.progress.run(|engine| engine.register(operation, memory))?;
        Ok(SharedBuffer::new(memory, len))
    }

    /// Forms a new communicator of the ranks that pass the same `color`, ordered by `key` and then by rank here
    /// (NCCL: `ncclCommSplit`, MPI: `MPI_Comm_split`). `None` joins no new group, and gets none.
    ///
    /// All ranks call it, as they call a collective. The new communicator has this one's configuration, links
    /// and operation numbers of its own, and outlives this one; it is left or dropped by itself. What an
    /// [`Interrupter`] of this one says about dead ranks, it hears too. Blocks until the links are made.
    ///
    /// # Errors
    /// Fatal ones only, to this communicator.
    pub fn split(&mut self, color: Option<u32>, key: i32) -> Result<Option<Self>, Error> {
        let mine = Choice { color, key }.to_words();
        let mut choices = vec![0; mine.len() * self.world_size];
        let call = self.call::<u64>(Kind::Split, mine.len())?;
        let operation = call.operation;
        self.run(call, Buffers::separate(&mine, &mut choices))?;
        let Some(color) = color else { return Ok(None) };
        let members = members_of(color, &choices);
        let group = group_id(self.group, operation.number, color);
        let transport = self.progress.run(|engine| engine.split(operation, &members, group))?;
        let of_all = members.iter().map(|&member| self.recorder.group.members()[member]).collect();
        let recorder = self.flight_recorder.clone();
        let split = Self::form(transport, self.config.clone(), (group, of_all), recorder)?;
        self.fault.adopt(&split.fault, members);
        Ok(Some(split))
    }

    /// Where a group on NCCL of the same ranks notes its operations.
    pub(crate) fn records_on_device(&self) -> RecordsOnDevice {
        // No split has the number 0.
        let (id, members) = (group_id(self.group, 0, 0), self.recorder.group.members().to_vec());
        let group = self.flight_recorder.add_on_device(id, members, self.rank);
        RecordsOnDevice { flight_recorder: self.flight_recorder.clone(), group }
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
        self.call_shared::<T>(kind, count, count.into())
    }

    /// [`call`](Self::call) for shares that may differ in length.
    fn call_shared<T: Element>(&mut self, kind: Kind, count: usize, shares: Shares) -> Result<Call, Error> {
        let schedule = self.schedule::<T>(kind, count)?;
        // At most 32 MiB / 1, so it fits the header; 16-bit sums travel as f32 in rings.
        let segment_len = self.config.segment_bytes / T::DTYPE.size();
        let message = matches!(kind, Kind::Message { .. });
        let operation = Operation {
            number: self.issued.wrapping_add(1),
            kind,
            dtype: T::DTYPE,
            count,
            segment_len: if message { 0 } else { segment_len as u32 },
            schedule: code(schedule),
        };
        self.issued = self.issued.wrapping_add(u64::from(!message));
        let ticket = self.recorder.issue(operation);
        let plan = Plan::new(schedule, self.world_size, self.rank, shares, segment_len);
        Ok(Call { operation, ticket, plan })
    }

    fn schedule<T: Element>(&self, kind: Kind, count: usize) -> Result<Schedule, Error> {
        let family = self.family(kind)?;
        Ok(match (kind, family) {
            (Kind::AllReduce(_), Family::Direct)
                if self.goes_in_one_shot(count.saturating_mul(T::DTYPE.size())) =>
            {
                Schedule::AllReduceOneShot
            }
            (Kind::AllReduce(_), Family::Direct) => Schedule::AllReduceDirect,
            (Kind::AllReduce(_), Family::Ring) => Schedule::AllReduceRing,
            (Kind::AllReduce(_), Family::Halving) => Schedule::AllReduceHalving,
            (Kind::Reduce { root, .. }, Family::Ring) => Schedule::ReduceChain { root },
            (Kind::Reduce { root, .. }, _) => Schedule::ReduceDirect { root },
            (Kind::ReduceScatter(_) | Kind::ReduceScatterV { .. }, family) => match family {
                Family::Direct => Schedule::ReduceScatterDirect,
                Family::Ring => Schedule::ReduceScatterRing,
                Family::Halving => Schedule::ReduceScatterHalving,
            },
            (Kind::AllGather | Kind::AllGatherV { .. }, Family::Ring) => Schedule::AllGatherRing,
            (Kind::AllGather | Kind::AllGatherV { .. } | Kind::AllToAllCounts | Kind::Split, _) => {
                Schedule::AllGatherDirect
            }
            (Kind::Gather { root }, _) => Schedule::Gather { root },
            (Kind::Scatter { root }, _) => Schedule::Scatter { root },
            (Kind::AllToAll | Kind::AllToAllV { .. }, _) => Schedule::AllToAll,
            (Kind::Broadcast { root }, _) if self.config.algorithm == Algorithm::Auto => {
                let bytes = count.saturating_mul(T::DTYPE.size());
                match self.network.broadcast(self.world_size, bytes, self.config.segment_bytes) {
                    Broadcast::Direct => Schedule::BroadcastDirect { root },
                    Broadcast::Tree => Schedule::BroadcastTree { root },
                    Broadcast::Chain => Schedule::BroadcastChain { root },
                }
            }
            (Kind::Broadcast { root }, Family::Ring) => Schedule::BroadcastChain { root },
            (Kind::Broadcast { root }, _) => Schedule::BroadcastDirect { root },
            (Kind::Barrier, _) => Schedule::Barrier,
            (Kind::Message { from, to }, _) if from == self.rank => Schedule::SendTo { peer: to },
            (Kind::Message { from, .. }, _) => Schedule::ReceiveFrom { peer: from },
        })
    }

    /// The choice of a family of schedules; a function of what all ranks have in common.
    #[inline(always)]
    fn family(&self, kind: Kind) -> Result<Family, Error> {
        // First what nearly everybody has. Direct exchange moves the same bytes as the others with fewer
        // latencies, in the fixed order.
        match self.config.algorithm {
            Algorithm::Auto | Algorithm::Direct => Ok(Family::Direct),
            Algorithm::Ring | Algorithm::Halving => self.family_asked_for(kind),
        }
    }

    #[inline(never)]
    fn family_asked_for(&self, kind: Kind) -> Result<Family, Error> {
        let scatters_or_all_reduces =
            matches!(kind, Kind::AllReduce(_) | Kind::ReduceScatter(_) | Kind::ReduceScatterV { .. });
        let (family, what) = match self.config.algorithm {
            _ if has_one_schedule(kind) => return Ok(Family::Direct),
            Algorithm::Ring => (Family::Ring, "a ring"),
            Algorithm::Halving if scatters_or_all_reduces => (Family::Halving, "recursive halving"),
            Algorithm::Auto | Algorithm::Direct | Algorithm::Halving => return Ok(Family::Direct),
        };
        if kind.op().is_some() && self.config.order == Order::Fixed && self.world_size > 2 {
            let reason =
                format!("{what} adds in another order: set order to any, or choose another algorithm");
            return Err(Error::Usage { operation: name(kind), reason });
        }
        Ok(family)
    }

    /// Whether an all_reduce is so short that one latency counts for more than its bytes.
    fn goes_in_one_shot(&self, bytes: usize) -> bool {
        // A longer one would come in segments, whose sums a direct exchange overlaps with the next.
        let short = bytes <= self.config.segment_bytes;
        self.config.algorithm == Algorithm::Auto
            && short
            && self.network.one_shot_pays(self.world_size, bytes)
    }

    fn run(&mut self, call: Call, buffers: Buffers<'_>) -> Result<(), Error> {
        let Self { progress, counters, world_size, recorder, .. } = self;
        progress.run(|engine| {
            recorder.group.ring.start_at_once(call.ticket);
            call.run(engine, buffers, *world_size, counters)
        })
    }

    fn start<T: Element>(
        &mut self,
        call: Call,
        mut buffer: Vec<T>,
        starts: Starts,
    ) -> Result<Work<T>, Error> {
        let (work, slot) = Work::new();
        let (world_size, counters) = (self.world_size, self.counters.clone());
        let name = call.operation.name();
        let group = self.recorder.group.clone();
        let job = Box::new(move |engine: &mut Engine| {
            group.ring.start(call.ticket);
            let outcome = call.run(engine, Buffers::within(&mut buffer, starts), world_size, &counters);
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

    /// The length of each share of a buffer that has one for each rank.
    fn share(&self, operation: &'static str, buffer: &str, len: usize) -> Result<usize, Error> {
        if len.is_multiple_of(self.world_size) {
            return Ok(len / self.world_size);
        }
        let reason = format!(
            "the {buffer} has {len} elements and needs the same for each of {} ranks",
            self.world_size
        );
        Err(Error::Usage { operation, reason })
    }

    /// For a buffer that is the output, with the input at this rank's share of it.
    fn input_share(&self, share: usize) -> Starts {
        Starts { input: self.rank * share, output: 0 }
    }

    /// For a buffer that is the input, with the output at this rank's share of it.
    fn output_share(&self, share: usize) -> Starts {
        Starts { input: 0, output: self.rank * share }
    }

    /// Checks that there is a count for each rank and that together they are as long as a buffer.
    fn check_counts(
        &self,
        operation: &'static str,
        (name, counts): (&str, &[usize]),
        (buffer, len): (&str, usize),
    ) -> Result<(), Error> {
        let usage = |reason| Err(Error::Usage { operation, reason });
        if counts.len() != self.world_size {
            return usage(format!("{name} has {} counts for {} ranks", counts.len(), self.world_size));
        }
        match counts.iter().try_fold(0usize, |total, &count| total.checked_add(count)) {
            Some(total) => check_len(operation, buffer, len, total, &format!("the sum of {name}")),
            None => usage(format!("{name} add up to more than memory holds")),
        }
    }

    /// Tells all ranks what this rank sends to and expects from each; the result has the same of all ranks,
    /// in rank order: the counts sent, then those expected.
    fn tell_counts(&mut self, send_counts: &[usize], recv_counts: &[usize]) -> Result<Vec<u64>, Error> {
        let mine: Vec<u64> = send_counts.iter().chain(recv_counts).map(|&count| count as u64).collect();
        let mut told = vec![0; mine.len() * self.world_size];
        let call = self.call::<u64>(Kind::AllToAllCounts, mine.len())?;
        self.run(call, Buffers::separate(&mine, &mut told))?;
        Ok(told)
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
    /// Where it is recorded.
    ticket: Ticket,
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
        let reducer = self.operation.kind.op().map(|op| Reducer::new(self.operation.dtype, op, world_size));
        engine.run(self.operation, &self.plan, reducer, buffers)?;
        engine.recorded.ring.end(self.ticket);
        // Not fetch_add: whoever holds the engine is the only one to count, and a locked instruction takes
        // as long as a small collective's other bookkeeping.
        let add = |counter: &AtomicU64, more: u64| {
            counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        };
        // The first half of an all_to_all_v is none by itself.
        add(&counters.operations, u64::from(self.operation.kind != Kind::AllToAllCounts));
        if let Kind::AllReduce(_) = self.operation.kind {
            let bytes = self.operation.count * self.operation.dtype.size();
            add(&counters.all_reduced_bytes, bytes as u64);
        }
        counters.sent_bytes.store(engine.sent_bytes, Ordering::Relaxed);
        counters.received_bytes.store(engine.received_bytes, Ordering::Relaxed);
        counters.network_sent_bytes.store(engine.network_sent_bytes, Ordering::Relaxed);
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
        Schedule::AllReduceOneShot | Schedule::BroadcastTree { .. } => 3,
        Schedule::AllReduceHalving | Schedule::ReduceScatterHalving => 4,
        Schedule::Barrier | Schedule::SendTo { .. } | Schedule::ReceiveFrom { .. } => 0,
    }
}

/// Whether there is nothing to choose for a kind.
fn has_one_schedule(kind: Kind) -> bool {
    match kind {
        Kind::Barrier
        | Kind::Message { .. }
        | Kind::Gather { .. }
        | Kind::Scatter { .. }
        | Kind::AllToAll
        | Kind::AllToAllCounts
        | Kind::AllToAllV { .. }
        | Kind::Split => true,
        Kind::AllReduce(_)
        | Kind::Reduce { .. }
        | Kind::ReduceScatter(_)
        | Kind::ReduceScatterV { .. }
        | Kind::AllGather
        | Kind::AllGatherV { .. }
        | Kind::Broadcast { .. } => false,
    }
}

/// What a rank asks for in a split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    color: Option<u32>,
    key: i32,
}

impl Choice {
    /// The color, or a number that is none, and the key in two's complement.
    fn to_words(self) -> [u64; 2] {
        [self.color.map_or(u64::MAX, u64::from), self.key as u64]
    }

    fn from_words([color, key]: [u64; 2]) -> Self {
        Self { color: u32::try_from(color).ok(), key: key as i32 }
    }
}

/// The ranks that chose `color`, in the order of their new ranks.
fn members_of(color: u32, choices: &[u64]) -> Vec<usize> {
    let choices = choices.chunks_exact(2).map(|words| Choice::from_words([words[0], words[1]]));
    let mut members: Vec<(i32, usize)> = choices
        .enumerate()
        .filter(|(_, choice)| choice.color == Some(color))
        .map(|(rank, choice)| (choice.key, rank))
        .collect();
    members.sort_unstable();
    members.into_iter().map(|(_, rank)| rank).collect()
}

/// The id of a group: equal on its members, and different for another parent, split or color but by a chance
/// of 1 in 2^64. The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) for each of the three.
fn group_id(parent: u64, number: u64, color: u32) -> u64 {
    let mixed = [parent, number, u64::from(color)].into_iter().fold(0, |id: u64, word| {
        let mut x = (id ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    });
    // 0 is the group that is split from none.
    mixed.max(1)
}

/// The shares that counts which add up to the length of a buffer make.
fn shares_of(counts: &[usize]) -> Shares {
    Shares::by_rank(counts).expect("a buffer is in memory")
}

/// What goes from each rank to each, by what all ranks have told: the counts that each sends, then those
/// that it expects. In words, the first two ranks that disagree.
fn counts_of_pairs(world_size: usize, told: &[u64]) -> Result<Vec<usize>, String> {
    let sent = |from: usize, to: usize| told[from * 2 * world_size + to];
    let expected = |from: usize, to: usize| told[to * 2 * world_size + world_size + from];
    let pairs = (0..world_size).flat_map(|from| (0..world_size).map(move |to| (from, to)));
    pairs
        .map(|(from, to)| match (sent(from, to), expected(from, to)) {
            (sent, expected) if sent == expected => Ok(usize::try_from(sent).unwrap_or(usize::MAX)),
            (sent, expected) => Err(format!(
                "rank {from} sends {sent} elements to rank {to}, which expects {expected}; nothing was exchanged"
            )),
        })
        .collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_ordered_by_key_and_then_by_rank() {
        let choices =
            [(Some(1), 5), (None, 0), (Some(1), -5), (Some(0), 9), (Some(1), 5), (Some(u32::MAX), 0)];
        let words: Vec<u64> =
            choices.iter().flat_map(|&(color, key)| Choice { color, key }.to_words()).collect();
        assert_eq!(members_of(1, &words), [2, 0, 4]);
        assert_eq!(members_of(0, &words), [3]);
        assert_eq!(members_of(u32::MAX, &words), [5], "no color is none of the colors");
    }

    #[test]
    fn groups_have_different_ids() {
        let mut ids: Vec<u64> = Vec::new();
        for parent in [0, 1, group_id(0, 1, 0)] {
            ids.extend((1..50).flat_map(|number| [0, 1, 2].map(|color| group_id(parent, number, color))));
        }
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count);
        assert!(!ids.contains(&0));
    }

    #[test]
    fn ranks_that_disagree_on_a_count_are_named() {
        // Rank 0 sends 1 and 2, and expects 1 and 3; rank 1 sends 3 and 0, and expects 2 and 0.
        let told = [1, 2, 1, 3, 3, 0, 2, 0];
        assert_eq!(counts_of_pairs(2, &told), Ok(vec![1, 2, 3, 0]));
        let wrong = [1, 2, 1, 3, 3, 0, 5, 0];
        let reason = counts_of_pairs(2, &wrong).expect_err("they disagree");
        assert!(reason.starts_with("rank 0 sends 2 elements to rank 1, which expects 5"), "{reason}");
    }
}
