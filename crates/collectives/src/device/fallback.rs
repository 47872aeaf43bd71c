//! Collectives on device memory through the host, for where NCCL cannot be used.
//!
//! ```text
//! the caller's stream  … ──┬───────────────────────────────────────────────────────────┬── …
//!                          │ ready                                                done │
//! stream down              └─ copy 0 ── copy 1 ── copy 2 ──                            │
//! host                            └ collective 0 ── collective 1 ── collective 2       │
//! stream up                                     └── copy 0 ──── copy 1 ──── copy 2 ────┘
//! ```
//! A collective is cut into pieces that fit a pinned buffer. While the host runs the collective of one piece, the
//! device copies the next one down and the one before up; PCIe carries both directions at a time, and each byte once
//! each way. The sums are the host back end's, on the processor, so their bits are those of a [`Communicator`].
//!
//! A call returns when the last copy up is enqueued, and the caller's stream waits for it: unlike with NCCL the host is
//! busy until then. Five waits keep the order, and each has a test that fails without it (`tests.rs`):
//! both streams wait for what the caller's stream has before the call, the host waits for each copy down, a buffer is
//! used again when its copy up is done, and the caller's stream waits for the last copy up.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use super::checks::{Place, check};
use super::pieces::{Piece, Pieces, shares_of};
use super::{CopySpan, Device, DeviceBuffer, DeviceError, Event, Pinned, Stream, Transfer};
use crate::communicator::Communicator;
use crate::dtype::{DType, Element, ReduceOp, bf16, f16};
use crate::error::Error;

/// Polls of a copy before the thread sleeps in between: some 10 µs, less than a copy of a whole buffer takes.
const QUICK_POLLS: u32 = 200;

/// The sleep between later polls, with what the kernel adds about the time of such a copy.
const POLL_INTERVAL: Duration = Duration::from_micros(20);

/// How the host is gone through. Equal on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FallbackConfig {
    /// The size of a pinned buffer, in bytes; pieces are as long as fits. 2 MiB by default: a copy of it takes 40 µs at
    /// 50 GB/s, beside which starting one counts for little. Not measured on a device yet.
    pub buffer_bytes: usize,
    /// How many there are, at least 2. 4 by default: one on its way down, one in its collective, one on its way up, and
    /// one that evens out.
    pub buffers: usize,
}

impl Default for FallbackConfig {
    fn default() -> Self {
        Self { buffer_bytes: 2 * 1024 * 1024, buffers: 4 }
    }
}

/// Runs collectives on device memory through the host.
///
/// All ranks call the same collectives in the same order, as with the [`Communicator`] within. Each method takes the
/// stream on which the caller produces the input and uses the output. Errors are those of the communicator's method
/// of the same name; a device that fails is fatal like an interrupted operation, and the other ranks are told.
pub struct Fallback {
    communicator: Communicator,
    device: Box<dyn Device>,
    config: FallbackConfig,
    down: Stream,
    up: Stream,
    ready: Event,
    done: Event,
    pool: Pool,
    /// Says whether what has come down may be passed on: what makes it may have failed and left it half made.
    source: Option<Source>,
    mutation: Mutation,
}

pub(super) type Source = Box<dyn Fn() -> Result<(), Error> + Send>;

/// A wait that is left out, to show that a test notices; production has [`Mutation::None`], which nothing else can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    None,
    /// The copies down do not wait for the caller's stream.
    InputNotAwaited,
    /// The copies up do not wait for the caller's stream.
    OutputNotAwaited,
    /// The host does not wait for a copy down.
    CopyDownNotAwaited,
    /// A buffer is used again before its copy up is done.
    CopyUpNotAwaited,
    /// The caller's stream does not wait for the copies up.
    ResultNotAwaited,
}

/// The pinned buffers that are not in use by a collective.
#[derive(Default)]
struct Pool {
    /// The size of each.
    bytes: usize,
    /// How many were allocated.
    allocated: usize,
    free: Vec<Box<dyn Pinned>>,
    /// On their way up, the oldest first.
    ascending: VecDeque<Box<dyn Transfer>>,
}

/// A piece's buffer before its collective.
enum Descent {
    UnderWay(Box<dyn Transfer>),
    /// This rank gives nothing to the collective.
    Nothing(Box<dyn Pinned>),
}

/// What runs on the host for each piece.
#[derive(Clone, Copy, Debug)]
enum Call {
    AllReduce(ReduceOp),
    Reduce { op: ReduceOp, root: usize },
    Broadcast { root: usize },
    ReduceScatter(ReduceOp),
    ReduceScatterV(ReduceOp),
    AllGather,
    AllGatherV,
    Gather { root: usize },
    Scatter { root: usize },
    AllToAll,
    AllToAllV,
    Send { to: usize },
    Recv { from: usize },
}

impl Fallback {
    /// Takes over a communicator, for buffers on `device`. Allocates nothing on it yet but two streams.
    ///
    /// # Errors
    /// [`Error::Usage`] for fewer than 2 buffers or such of less than 256 bytes, and when the device has no stream left.
    pub fn new(
        communicator: Communicator,
        device: Box<dyn Device>,
        config: FallbackConfig,
    ) -> Result<Self, Error> {
        let usage = |reason: String| Error::Usage { operation: "Fallback::new", reason };
        if config.buffers < 2 || config.buffer_bytes < 256 {
            return Err(usage(format!(
                "{} buffers of {} bytes; choose 2 of 256 bytes or more",
                config.buffers, config.buffer_bytes
            )));
        }
        let failed = |error: DeviceError| usage(error.to_string());
        Ok(Self {
            down: device.new_stream().map_err(failed)?,
            up: device.new_stream().map_err(failed)?,
            ready: device.new_event().map_err(failed)?,
            done: device.new_event().map_err(failed)?,
            communicator,
            device,
            config,
            pool: Pool::default(),
            source: None,
            mutation: Mutation::None,
        })
    }

    /// Has `source` asked before anything is passed on; its error is that of the collective, and the other ranks get
    /// one as well.
    pub(super) fn fed_by(self, source: Source) -> Self {
        Self { source: Some(source), ..self }
    }

    /// The same with a defect.
    #[cfg(test)]
    pub(crate) fn with(mut self, mutation: Mutation) -> Self {
        self.mutation = mutation;
        self
    }

    /// The communicator, to look at.
    pub(super) fn on_host(&self) -> &Communicator {
        &self.communicator
    }

    /// The communicator, for collectives on host memory and to leave.
    pub fn communicator(&mut self) -> &mut Communicator {
        &mut self.communicator
    }

    /// Gives the communicator back, to leave the group. Copies that are under way go on.
    pub fn into_communicator(self) -> Communicator {
        self.communicator
    }

    /// [`Communicator::all_reduce_into`] on device memory; `output` may be `input`.
    ///
    /// # Errors
    /// As there.
    pub fn all_reduce(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        check("all_reduce", "output", output, (input.len(), input.dtype()))?;
        let whole = || shares_of(&[input.len()]);
        let pieces = self.cut((whole(), whole()), true, (1, input.len()), input.dtype());
        self.run(Call::AllReduce(op), &pieces, (input, output), stream)
    }

    /// [`Communicator::reduce_into`] on device memory; `output` is used on the root only.
    ///
    /// # Errors
    /// As there.
    pub fn reduce(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        op: ReduceOp,
        root: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        self.place().check_rank("reduce", root)?;
        let is_root = self.communicator.rank() == root;
        if is_root {
            check("reduce", "output", output, (input.len(), input.dtype()))?;
        }
        let (whole, outputs) = (shares_of(&[input.len()]), is_root.then(|| 0..input.len()));
        let pieces = self.cut((whole, outputs.into_iter().collect()), true, (1, input.len()), input.dtype());
        self.run(Call::Reduce { op, root }, &pieces, (input, output), stream)
    }

    /// [`Communicator::broadcast`] on device memory.
    ///
    /// # Errors
    /// As there.
    pub fn broadcast(&mut self, buffer: DeviceBuffer, root: usize, stream: Stream) -> Result<(), Error> {
        self.place().check_rank("broadcast", root)?;
        let whole = shares_of(&[buffer.len()]);
        let shares = if self.communicator.rank() == root { (whole, Vec::new()) } else { (Vec::new(), whole) };
        let pieces = self.cut(shares, true, (1, buffer.len()), buffer.dtype());
        self.run(Call::Broadcast { root }, &pieces, (buffer, buffer), stream)
    }

    /// [`Communicator::reduce_scatter`] on device memory; `output` may be this rank's chunk of `input`.
    ///
    /// # Errors
    /// As there.
    pub fn reduce_scatter(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let share = output.len();
        check("reduce_scatter", "input", input, (self.place().total(share), output.dtype()))?;
        let pieces = self.scattered((self.place().shares(share), shares_of(&[share])), share, input.dtype());
        self.run(Call::ReduceScatter(op), &pieces, (input, output), stream)
    }

    /// [`Communicator::reduce_scatter_v`] on device memory; `output` may be this rank's share of `input`.
    ///
    /// # Errors
    /// As there.
    pub fn reduce_scatter_v(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        counts: &[usize],
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let own = self.place().check_counts("reduce_scatter_v", counts, ("input", input))?;
        check("reduce_scatter_v", "output", output, (own, input.dtype()))?;
        let shares = (shares_of(counts), shares_of(&[own]));
        let pieces = self.scattered(shares, longest(counts), input.dtype());
        self.run(Call::ReduceScatterV(op), &pieces, (input, output), stream)
    }

    /// [`Communicator::all_gather`] on device memory; `input` may be this rank's chunk of `output`.
    ///
    /// # Errors
    /// As there.
    pub fn all_gather(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        stream: Stream,
    ) -> Result<(), Error> {
        let share = input.len();
        check("all_gather", "output", output, (self.place().total(share), input.dtype()))?;
        let pieces = self.scattered((shares_of(&[share]), self.place().shares(share)), share, input.dtype());
        self.run(Call::AllGather, &pieces, (input, output), stream)
    }

    /// [`Communicator::all_gather_v`] on device memory; `input` may be this rank's share of `output`.
    ///
    /// # Errors
    /// As there.
    pub fn all_gather_v(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        counts: &[usize],
        stream: Stream,
    ) -> Result<(), Error> {
        let own = self.place().check_counts("all_gather_v", counts, ("output", output))?;
        check("all_gather_v", "input", input, (own, output.dtype()))?;
        let shares = (shares_of(&[own]), shares_of(counts));
        let pieces = self.scattered(shares, longest(counts), input.dtype());
        self.run(Call::AllGatherV, &pieces, (input, output), stream)
    }

    /// [`Communicator::gather`] on device memory; `output` is used on the root only.
    ///
    /// # Errors
    /// As there.
    pub fn gather(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        root: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        self.place().check_rank("gather", root)?;
        let (share, is_root) = (input.len(), self.communicator.rank() == root);
        if is_root {
            check("gather", "output", output, (self.place().total(share), input.dtype()))?;
        }
        let outputs = if is_root { self.place().shares(share) } else { Vec::new() };
        let pieces = self.scattered((shares_of(&[share]), outputs), share, input.dtype());
        self.run(Call::Gather { root }, &pieces, (input, output), stream)
    }

    /// [`Communicator::scatter`] on device memory; `input` is used on the root only.
    ///
    /// # Errors
    /// As there.
    pub fn scatter(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        root: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        self.place().check_rank("scatter", root)?;
        let (share, is_root) = (output.len(), self.communicator.rank() == root);
        if is_root {
            check("scatter", "input", input, (self.place().total(share), output.dtype()))?;
        }
        let inputs = if is_root { self.place().shares(share) } else { Vec::new() };
        let input = if is_root { input } else { DeviceBuffer::empty(output.dtype()) };
        let pieces = self.scattered((inputs, shares_of(&[share])), share, output.dtype());
        self.run(Call::Scatter { root }, &pieces, (input, output), stream)
    }

    /// [`Communicator::all_to_all`] on device memory; `output` may be `input`.
    ///
    /// # Errors
    /// As there.
    pub fn all_to_all(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        stream: Stream,
    ) -> Result<(), Error> {
        let (place, ranks) = (self.place(), self.place().world_size);
        let share = place.check_exchange(input, output)?;
        let shares = (place.shares(share), place.shares(share));
        let pieces = self.cut(shares, false, (2 * ranks, share), input.dtype());
        self.run(Call::AllToAll, &pieces, (input, output), stream)
    }

    /// [`Communicator::all_to_all_v`] on device memory; input and output are apart.
    ///
    /// Before the first piece the ranks tell each other which part is the longest, which costs one more latency.
    ///
    /// # Errors
    /// As there.
    pub fn all_to_all_v(
        &mut self,
        input: DeviceBuffer,
        send_counts: &[usize],
        output: DeviceBuffer,
        recv_counts: &[usize],
        stream: Stream,
    ) -> Result<(), Error> {
        let name = "all_to_all_v";
        self.place().check_counts(name, send_counts, ("input", input))?;
        self.place().check_counts(name, recv_counts, ("output", output))?;
        check(name, "output", output, (output.len(), input.dtype()))?;
        let mut of_all = [longest(send_counts).max(longest(recv_counts)) as u64];
        self.communicator.all_reduce(&mut of_all, ReduceOp::Max)?;
        let shares = (shares_of(send_counts), shares_of(recv_counts));
        let ranks = self.communicator.world_size();
        let pieces = self.cut(shares, false, (2 * ranks, of_all[0] as usize), input.dtype());
        self.run(Call::AllToAllV, &pieces, (input, output), stream)
    }

    /// [`Communicator::send`] from device memory.
    ///
    /// # Errors
    /// As there.
    pub fn send(&mut self, buffer: DeviceBuffer, to: usize, stream: Stream) -> Result<(), Error> {
        let shares = (shares_of(&[buffer.len()]), Vec::new());
        let pieces = self.cut(shares, false, (1, buffer.len()), buffer.dtype());
        self.run(Call::Send { to }, &pieces, (buffer, DeviceBuffer::empty(buffer.dtype())), stream)
    }

    /// [`Communicator::recv`] into device memory.
    ///
    /// # Errors
    /// As there.
    pub fn recv(&mut self, buffer: DeviceBuffer, from: usize, stream: Stream) -> Result<(), Error> {
        let shares = (Vec::new(), shares_of(&[buffer.len()]));
        let pieces = self.cut(shares, false, (1, buffer.len()), buffer.dtype());
        self.run(Call::Recv { from }, &pieces, (DeviceBuffer::empty(buffer.dtype()), buffer), stream)
    }

    /// Pieces of a collective where one of input and output has a share for each rank and the other has one.
    fn scattered(&self, shares: (Shares, Shares), longest: usize, dtype: DType) -> Pieces {
        self.cut(shares, false, (self.communicator.world_size() + 1, longest), dtype)
    }

    fn cut(&self, shares: (Shares, Shares), in_place: bool, of_all: (usize, usize), dtype: DType) -> Pieces {
        Pieces::new(shares, in_place, of_all, (self.config.buffer_bytes, dtype.size()))
    }

    fn run(
        &mut self,
        call: Call,
        pieces: &Pieces,
        buffers: (DeviceBuffer, DeviceBuffer),
        stream: Stream,
    ) -> Result<(), Error> {
        let outcome = self.run_pieces(call, pieces, buffers, stream);
        let Err(failure) = outcome else { return Ok(()) };
        // Copies are under way all the same, and with them go their buffers. Those down read what the caller may free.
        let _ = self.device.record(self.ready, self.down).and_then(|()| self.device.wait(stream, self.ready));
        let _ = self.end(stream);
        self.pool = Pool::default();
        match failure {
            Failure::Communicator(error) => Err(error),
            Failure::Device(error) => Err(self.fail(&error)),
            Failure::Source(error) => {
                self.give_up(&error.to_string());
                Err(error)
            }
        }
    }

    /// Has this and all later collectives fail, on all ranks.
    pub(super) fn give_up(&mut self, reason: &str) {
        self.communicator.interrupter().interrupt(reason);
        // It fails at once, and that tells the others.
        let _ = self.communicator.barrier();
    }

    /// A device has failed: the other ranks wait for this one and are to be told.
    fn fail(&mut self, error: &DeviceError) -> Error {
        let reason = format!("the device has failed: {error}");
        self.communicator.interrupter().interrupt(&reason);
        match self.communicator.barrier() {
            Err(error) => error,
            Ok(()) => Error::Usage { operation: "device", reason },
        }
    }

    fn run_pieces(
        &mut self,
        call: Call,
        pieces: &Pieces,
        (input, output): (DeviceBuffer, DeviceBuffer),
        stream: Stream,
    ) -> Result<(), Failure> {
        self.begin(stream)?;
        self.pool.make_room(pieces.buffer_bytes(input.dtype().size()));
        let mut descending: VecDeque<(Piece, Descent)> = VecDeque::new();
        let mut next = 0;
        for index in 0..pieces.count {
            // As far ahead as there are buffers; of those on their way up, those that have arrived.
            while next < pieces.count {
                let Some(buffer) = self.buffer(descending.is_empty())? else { break };
                let mut piece = pieces.piece(next, input, output);
                let descent = self.descend(std::mem::take(&mut piece.down), buffer)?;
                descending.push_back((piece, descent));
                next += 1;
            }
            let (piece, descent) = descending.pop_front().expect("one is on its way for each piece left");
            let mut buffer = self.arrive(descent)?;
            self.source.as_ref().map_or(Ok(()), |source| source()).map_err(Failure::Source)?;
            let len = pieces.part(index, pieces.longest);
            let done = on_host(&mut self.communicator, call, &piece, len, buffer.bytes_mut(), input.dtype());
            done.map_err(Failure::Communicator)?;
            self.ascend(buffer, piece.up)?;
        }
        self.end(stream)
    }

    /// Starts a piece's copies down. Where there is nothing to copy, the host need not wait for the caller's stream: a
    /// rank that only receives can do so before its own work is done.
    fn descend(&self, spans: Vec<CopySpan>, buffer: Box<dyn Pinned>) -> Result<Descent, Failure> {
        if spans.is_empty() {
            return Ok(Descent::Nothing(buffer));
        }
        Ok(Descent::UnderWay(self.device.copy_to_host(spans, buffer, self.down)?))
    }

    fn arrive(&self, descent: Descent) -> Result<Box<dyn Pinned>, Failure> {
        match descent {
            Descent::Nothing(buffer) => Ok(buffer),
            Descent::UnderWay(transfer) if self.mutation == Mutation::CopyDownNotAwaited => {
                Ok(transfer.finish())
            }
            Descent::UnderWay(transfer) => self.finish(transfer),
        }
    }

    fn ascend(&mut self, buffer: Box<dyn Pinned>, spans: Vec<CopySpan>) -> Result<(), Failure> {
        match spans.is_empty() {
            true => self.pool.free.push(buffer),
            false => {
                let transfer = self.device.copy_to_device(buffer, spans, self.up)?;
                self.pool.ascending.push_back(transfer);
            }
        }
        Ok(())
    }

    /// Has both streams wait for all that the caller's stream has now.
    fn begin(&self, stream: Stream) -> Result<(), Failure> {
        self.device.record(self.ready, stream)?;
        if self.mutation != Mutation::InputNotAwaited {
            self.device.wait(self.down, self.ready)?;
        }
        if self.mutation != Mutation::OutputNotAwaited {
            self.device.wait(self.up, self.ready)?;
        }
        Ok(())
    }

    /// Has the caller's stream wait for all copies up.
    fn end(&self, stream: Stream) -> Result<(), Failure> {
        self.device.record(self.done, self.up)?;
        if self.mutation != Mutation::ResultNotAwaited {
            self.device.wait(stream, self.done)?;
        }
        Ok(())
    }

    /// A buffer that is not in use; waits for one only if it `must` have one.
    fn buffer(&mut self, must: bool) -> Result<Option<Box<dyn Pinned>>, Failure> {
        if let Some(buffer) = self.pool.free.pop() {
            return Ok(Some(buffer));
        }
        if self.pool.allocated < self.config.buffers {
            self.pool.allocated += 1;
            return Ok(Some(self.device.alloc_pinned(self.pool.bytes)?));
        }
        let Some(mut oldest) = self.pool.ascending.pop_front() else { return Ok(None) };
        if self.mutation == Mutation::CopyUpNotAwaited {
            return Ok(Some(oldest.finish()));
        }
        if must || oldest.is_done()? {
            return self.finish(oldest).map(Some);
        }
        self.pool.ascending.push_front(oldest);
        Ok(None)
    }

    /// Waits for copies, until the communicator's timeout.
    fn finish(&self, mut transfer: Box<dyn Transfer>) -> Result<Box<dyn Pinned>, Failure> {
        let timeout = self.communicator.config().timeout;
        let (start, mut polls) = (Instant::now(), 0);
        while !transfer.is_done()? {
            polls += 1;
            match polls < QUICK_POLLS {
                true => std::hint::spin_loop(),
                false => thread::sleep(POLL_INTERVAL),
            }
            if polls >= QUICK_POLLS && start.elapsed() >= timeout {
                let reason =
                    format!("not done after {} ms; what is the caller's stream at?", timeout.as_millis());
                return Err(Failure::Device(DeviceError { call: "a copy between device and host", reason }));
            }
        }
        Ok(transfer.finish())
    }

    fn place(&self) -> Place {
        Place { rank: self.communicator.rank(), world_size: self.communicator.world_size() }
    }
}

type Shares = Vec<std::ops::Range<usize>>;

/// Whose failure it is.
enum Failure {
    Communicator(Error),
    Device(DeviceError),
    Source(Error),
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

impl Pool {
    /// Makes the buffers at least so long. Shorter ones are given up, those on their way up when they are done.
    fn make_room(&mut self, bytes: usize) {
        if bytes > self.bytes {
            *self = Self { bytes, ..Self::default() };
        }
    }
}

/// Runs the collective of a piece, whose shares have `len` elements at most.
fn on_host(
    communicator: &mut Communicator,
    call: Call,
    piece: &Piece,
    len: usize,
    buffer: &mut [u8],
    dtype: DType,
) -> Result<(), Error> {
    let typed = match dtype {
        DType::F32 => on_host_typed::<f32>,
        DType::F64 => on_host_typed::<f64>,
        DType::F16 => on_host_typed::<f16>,
        DType::BF16 => on_host_typed::<bf16>,
        DType::I8 => on_host_typed::<i8>,
        DType::U8 => on_host_typed::<u8>,
        DType::I32 => on_host_typed::<i32>,
        DType::I64 => on_host_typed::<i64>,
        DType::U64 => on_host_typed::<u64>,
    };
    typed(communicator, call, piece, len, buffer)
}

fn on_host_typed<T: Element>(
    communicator: &mut Communicator,
    call: Call,
    piece: &Piece,
    len: usize,
    buffer: &mut [u8],
) -> Result<(), Error> {
    let size = size_of::<T>();
    let (inputs, outputs) = (&piece.inputs, &piece.outputs);
    if let Call::AllReduce(_) | Call::Reduce { .. } | Call::Broadcast { .. } = call {
        let whole: &mut [T] = bytemuck::cast_slice_mut(&mut buffer[..len * size]);
        return match call {
            Call::AllReduce(op) => communicator.all_reduce(whole, op),
            Call::Reduce { op, root } => communicator.reduce(whole, op, root),
            Call::Broadcast { root } => communicator.broadcast(whole, root),
            _ => unreachable!("the others are below"),
        };
    }
    let (input, output) = buffer.split_at_mut(piece.output_start);
    let input: &[T] = bytemuck::cast_slice(&input[..inputs.iter().sum::<usize>() * size]);
    let output: &mut [T] = bytemuck::cast_slice_mut(&mut output[..outputs.iter().sum::<usize>() * size]);
    match call {
        Call::ReduceScatter(op) => communicator.reduce_scatter(input, output, op),
        Call::ReduceScatterV(op) => communicator.reduce_scatter_v(input, output, inputs, op),
        Call::AllGather => communicator.all_gather(input, output),
        Call::AllGatherV => communicator.all_gather_v(input, output, outputs),
        Call::Gather { root } => communicator.gather(input, output, root),
        Call::Scatter { root } => communicator.scatter(input, output, root),
        Call::AllToAll => communicator.all_to_all(input, output),
        Call::AllToAllV => communicator.all_to_all_v(input, inputs, output, outputs),
        Call::Send { to } => communicator.send(input, to),
        Call::Recv { from } => communicator.recv(output, from),
        Call::AllReduce(_) | Call::Reduce { .. } | Call::Broadcast { .. } => unreachable!("they are above"),
    }
}

fn longest(counts: &[usize]) -> usize {
    counts.iter().copied().max().unwrap_or(0)
}
