//! Collectives on device memory through NCCL.
//!
//! ```text
//! the caller's stream  … ──┬── whatever the caller does ──┬── …
//!                          │ ready                    end │
//! our stream               └── NCCL's kernel ─────────────┘
//! ```
//! A call orders streams and does not wait for the device: NCCL's work waits for what the caller's stream has at the
//! call, and what comes after the call on the caller's stream waits for it. The host waits until NCCL has enqueued
//! the work, which takes a message to the communicator's thread and back; what that costs has not been measured.
//!
//! NCCL cannot know how long a buffer is, and takes anything for a rank: lengths, dtypes and ranks are checked before
//! it is called. It does not notice every dead peer either, so a watchdog asks it for errors and has a deadline for each
//! operation. Whatever fails is final: the communicator of NCCL is aborted, every later call has the same error, and
//! a new group is formed by whoever owns this one. The abort runs on the communicator's own thread and may itself hang;
//! then it is given up, and what the operations use is never freed.
//!
//! Sums of floats are in whatever order NCCL has, so their bits are not those of the host back end.

mod watchdog;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use paceline_nccl as nccl;

use watchdog::{Running, Shared};

use super::checks::{Place, check};
use super::group::Formed;
use super::pieces::shares_of;
use super::{Device, DeviceBuffer, DeviceError, Event, Stream};
use crate::dtype::{DType, ReduceOp};
use crate::error::Error;
use crate::operation::{Kind, Operation};
use crate::recorder::{FlightRecorder, Recorder, RecordsOnDevice, Ticket};

pub use watchdog::Aborter;

/// Runs collectives on device memory through NCCL.
///
/// All ranks call the same collectives in the same order. Each method takes the stream on which the caller produces
/// the input and uses the output; it returns when NCCL has the work, not when it has run. A wrong call is
/// [`Error::Usage`] and has no effect; every other error is fatal.
pub struct NcclGroup {
    shared: Arc<Shared>,
    stream: Stream,
    ready: Event,
    /// The number of collectives so far.
    issued: u64,
    recorder: Recorder,
    watchdog: Option<JoinHandle<()>>,
    mutation: Mutation,
}

/// What is left out, to show that a test notices; production has [`Mutation::None`], which nothing else can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    None,
    /// NCCL's work does not wait for the caller's stream.
    InputNotAwaited,
    /// The caller's stream does not wait for NCCL's work.
    ResultNotAwaited,
    /// What is to be held is freed at once.
    FreedAtOnce,
}

impl NcclGroup {
    /// Takes over a communicator of NCCL, of the same device. An operation may take `timeout` from its call to its end
    /// on the device, what is before it on the caller's stream included.
    ///
    /// # Errors
    /// [`Error::Usage`] when the device has no stream or the system no thread left.
    pub fn new(group: nccl::Communicator, device: Box<dyn Device>, timeout: Duration) -> Result<Self, Error> {
        let records = RecordsOnDevice::alone(group.rank(), group.world_size());
        Self::recorded(Formed { nccl: group, records }, device, timeout)
    }

    /// [`new`](Self::new), with operations noted beside those of the communicator that has formed it.
    pub(super) fn recorded(
        Formed { nccl: group, records }: Formed,
        device: Box<dyn Device>,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let usage = |reason: String| Error::Usage { operation: "NcclGroup::new", reason };
        let failed = |error: DeviceError| usage(error.to_string());
        let (stream, ready) = (device.new_stream().map_err(failed)?, device.new_event().map_err(failed)?);
        let (device, flight) = (Mutex::new(device), Mutex::default());
        let recorder = Recorder::new(records.group.clone());
        let shared = Arc::new(Shared { group, device, flight, news: Condvar::new(), timeout, records });
        let watched = shared.clone();
        let watchdog = thread::Builder::new().name("paceline-nccl-watchdog".to_owned());
        let watchdog = watchdog.spawn(move || watched.watch()).map_err(|error| usage(error.to_string()))?;
        let mutation = Mutation::None;
        Ok(Self { shared, stream, ready, issued: 0, recorder, watchdog: Some(watchdog), mutation })
    }

    /// The same with a defect.
    #[cfg(test)]
    fn with(mut self, mutation: Mutation) -> Self {
        self.mutation = mutation;
        self
    }

    /// Waits until all that was enqueued has run, and leaves the group in order; all ranks do. Blocks, for the timeout
    /// of an operation at most, and that of NCCL's own end.
    ///
    /// # Errors
    /// The failure, if there was one, or what NCCL says.
    pub fn leave(mut self) -> Result<(), Error> {
        self.shared.end();
        // It ends when all has run, or has failed.
        self.watchdog.take().map(JoinHandle::join);
        self.check()?;
        let shared = self.shared.clone();
        drop(self);
        // Nobody else has it but an aborter that aborts right now.
        let Some(shared) = Arc::into_inner(shared) else { return Ok(()) };
        shared.group.finish().map_err(|error| Error::Leave { reason: error.to_string() })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.shared.group.rank()
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.shared.group.world_size()
    }

    /// Reads what this group did last, and what the communicator did that has formed it.
    pub fn flight_recorder(&self) -> FlightRecorder {
        self.shared.records.flight_recorder.clone()
    }

    /// A handle with which another thread ends this group's operations.
    pub fn aborter(&self) -> Aborter {
        Aborter { shared: Arc::downgrade(&self.shared) }
    }

    /// Keeps `what` alive until all that has been enqueued so far has run: the owner of a buffer that the caller lets
    /// go. After a failure it is never freed, since what runs may not have ended.
    pub fn hold(&mut self, what: impl Any + Send) {
        let mut flight = self.shared.flight();
        if flight.failed.is_some() {
            // The abort may not be over, and its kernels still run.
            std::mem::forget(what);
            return;
        }
        if let Some(last) = flight.running.back_mut().filter(|_| self.mutation != Mutation::FreedAtOnce) {
            last.held.push(Box::new(what));
            return;
        }
        // Nothing runs any more. Not under the lock: what is freed may do anything.
        drop(flight);
        drop(what);
    }

    /// Every rank gets the reduction of all inputs; `output` may be `input` (`ncclAllReduce`).
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn all_reduce(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        check("all_reduce", "output", output, (input.len(), input.dtype()))?;
        let call = nccl::Operation::AllReduce { send: region(input), receive: region(output), op: op_of(op) };
        self.enqueue(Kind::AllReduce(op), input, &[call], stream)
    }

    /// The root gets the reduction of all inputs (`ncclReduce`); `output` is used on the root only.
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn reduce(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        op: ReduceOp,
        root: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        self.place().check_rank("reduce", root)?;
        let receive = if self.rank() == root {
            check("reduce", "output", output, (input.len(), input.dtype()))?;
            region(output)
        } else {
            nccl::Region::empty(dtype_of(input.dtype()))
        };
        let call = nccl::Operation::Reduce { send: region(input), receive, op: op_of(op), root };
        self.enqueue(Kind::Reduce { op, root }, input, &[call], stream)
    }

    /// Every rank gets the root's buffer (`ncclBroadcast`).
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn broadcast(&mut self, buffer: DeviceBuffer, root: usize, stream: Stream) -> Result<(), Error> {
        self.place().check_rank("broadcast", root)?;
        let call = nccl::Operation::Broadcast { send: region(buffer), receive: region(buffer), root };
        self.enqueue(Kind::Broadcast { root }, buffer, &[call], stream)
    }

    /// Rank i gets chunk i of the reduction; `output` may be this rank's chunk of `input` (`ncclReduceScatter`).
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn reduce_scatter(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        check("reduce_scatter", "input", input, (self.place().total(output.len()), output.dtype()))?;
        let (send, receive) = (region(input), region(output));
        let call = nccl::Operation::ReduceScatter { send, receive, op: op_of(op) };
        self.enqueue(Kind::ReduceScatter(op), output, &[call], stream)
    }

    /// [`reduce_scatter`](Self::reduce_scatter) of shares that differ in length: a group of `ncclReduce`, one for each.
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn reduce_scatter_v(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        counts: &[usize],
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let name = "reduce_scatter_v";
        let own = self.place().check_counts(name, counts, ("input", input))?;
        check(name, "output", output, (own, input.dtype()))?;
        let nothing = nccl::Region::empty(dtype_of(input.dtype()));
        let reduce = |(root, share): (usize, Range<usize>)| {
            let receive = if root == self.rank() { region(output) } else { nothing };
            nccl::Operation::Reduce { send: region(input.part(share)), receive, op: op_of(op), root }
        };
        let calls: Vec<_> = shares_of(counts).into_iter().enumerate().map(reduce).collect();
        let kind = Kind::ReduceScatterV { op, counts: crate::operation::digest(counts) };
        self.enqueue(kind, input, &calls, stream)
    }

    /// Every rank gets all inputs; `input` may be this rank's chunk of `output` (`ncclAllGather`).
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn all_gather(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        stream: Stream,
    ) -> Result<(), Error> {
        check("all_gather", "output", output, (self.place().total(input.len()), input.dtype()))?;
        let call = nccl::Operation::AllGather { send: region(input), receive: region(output) };
        self.enqueue(Kind::AllGather, input, &[call], stream)
    }

    /// [`all_gather`](Self::all_gather) of shares that differ in length: a group of `ncclBroadcast`, one from each.
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn all_gather_v(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        counts: &[usize],
        stream: Stream,
    ) -> Result<(), Error> {
        let name = "all_gather_v";
        let own = self.place().check_counts(name, counts, ("output", output))?;
        check(name, "input", input, (own, output.dtype()))?;
        let broadcast = |(root, share): (usize, Range<usize>)| {
            let receive = region(output.part(share));
            // Read on the root only.
            let send = if root == self.rank() { region(input) } else { receive };
            nccl::Operation::Broadcast { send, receive, root }
        };
        let calls: Vec<_> = shares_of(counts).into_iter().enumerate().map(broadcast).collect();
        let kind = Kind::AllGatherV { counts: crate::operation::digest(counts) };
        self.enqueue(kind, output, &calls, stream)
    }

    /// The root gets all inputs: a group of `ncclSend` and `ncclRecv`. `output` is used on the root only.
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn gather(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        root: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        self.place().check_rank("gather", root)?;
        let mut calls = vec![nccl::Operation::Send { send: region(input), peer: root }];
        if self.rank() == root {
            check("gather", "output", output, (self.place().total(input.len()), input.dtype()))?;
            check_apart("gather", input, output)?;
            let shares = self.place().shares(input.len()).into_iter().enumerate();
            calls.extend(shares.map(|(peer, share)| receive(output.part(share), peer)));
        }
        self.enqueue(Kind::Gather { root }, input, &calls, stream)
    }

    /// Rank i gets chunk i of the root's input: a group of `ncclSend` and `ncclRecv`. `input` is used on the root only.
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn scatter(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        root: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        self.place().check_rank("scatter", root)?;
        let mut calls = Vec::new();
        if self.rank() == root {
            check("scatter", "input", input, (self.place().total(output.len()), output.dtype()))?;
            check_apart("scatter", input, output)?;
            let shares = self.place().shares(output.len()).into_iter().enumerate();
            calls.extend(shares.map(|(peer, share)| send(input.part(share), peer)));
        }
        calls.push(receive(output, root));
        self.enqueue(Kind::Scatter { root }, output, &calls, stream)
    }

    /// Rank i gets chunk i of every input: a group of `ncclSend` and `ncclRecv`. The buffers are apart.
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn all_to_all(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        stream: Stream,
    ) -> Result<(), Error> {
        let counts = vec![self.place().check_exchange(input, output)?; self.world_size()];
        self.exchange(Kind::AllToAll, (input, &counts), (output, &counts), stream)
    }

    /// [`all_to_all`](Self::all_to_all) of parts that differ in length. Unlike the host back end it does not compare
    /// what ranks send with what others expect; where they disagree NCCL waits until the deadline, or worse.
    ///
    /// # Errors
    /// See [`NcclGroup`].
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
        let kind = Kind::AllToAllV { counts: crate::operation::digest(send_counts) };
        self.exchange(kind, (input, send_counts), (output, recv_counts), stream)
    }

    /// Sends to a rank, which receives as many elements (`ncclSend`).
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn send(&mut self, buffer: DeviceBuffer, to: usize, stream: Stream) -> Result<(), Error> {
        self.place().check_peer("send", to)?;
        self.enqueue(Kind::Message { from: self.rank(), to }, buffer, &[send(buffer, to)], stream)
    }

    /// Receives what a rank sends (`ncclRecv`).
    ///
    /// # Errors
    /// See [`NcclGroup`].
    pub fn recv(&mut self, buffer: DeviceBuffer, from: usize, stream: Stream) -> Result<(), Error> {
        self.place().check_peer("recv", from)?;
        self.enqueue(Kind::Message { from, to: self.rank() }, buffer, &[receive(buffer, from)], stream)
    }

    /// Whether anything has failed by now, also of what has been enqueued before.
    ///
    /// # Errors
    /// The first failure.
    pub fn check(&self) -> Result<(), Error> {
        self.shared.flight().failed.clone().map_or(Ok(()), Err)
    }

    /// [`check`](Self::check) for somebody else, to be asked before what the group has made is passed on: the failure is
    /// known before the abort that ends a kernel early.
    pub(super) fn checker(&self) -> impl Fn() -> Result<(), Error> + Send + use<> {
        let shared = Arc::downgrade(&self.shared);
        move || shared.upgrade().and_then(|shared| shared.flight().failed.clone()).map_or(Ok(()), Err)
    }

    fn exchange(
        &mut self,
        kind: Kind,
        (input, send_counts): (DeviceBuffer, &[usize]),
        (output, recv_counts): (DeviceBuffer, &[usize]),
        stream: Stream,
    ) -> Result<(), Error> {
        check_apart("all_to_all", input, output)?;
        let sends = shares_of(send_counts).into_iter().enumerate();
        let receives = shares_of(recv_counts).into_iter().enumerate();
        let sends = sends.filter(|(_, share)| !share.is_empty());
        let receives = receives.filter(|(_, share)| !share.is_empty());
        let calls: Vec<_> = sends
            .map(|(peer, share)| send(input.part(share), peer))
            .chain(receives.map(|(peer, share)| receive(output.part(share), peer)))
            .collect();
        self.enqueue(kind, input, &calls, stream)
    }

    /// Has NCCL run `calls` as one group, between what the caller's stream has now and what it gets later.
    fn enqueue(
        &mut self,
        kind: Kind,
        buffer: DeviceBuffer,
        calls: &[nccl::Operation],
        stream: Stream,
    ) -> Result<(), Error> {
        self.check()?;
        let operation = Operation {
            number: self.issued + 1,
            kind,
            dtype: buffer.dtype(),
            count: buffer.len(),
            segment_len: 0,
            schedule: 0,
        };
        let ticket = self.recorder.issue(operation);
        let outcome = self.enqueue_between((operation, ticket), calls, stream);
        match outcome {
            Ok(()) => {
                // Messages are not: their numbers would differ between ranks.
                self.issued += u64::from(!matches!(kind, Kind::Message { .. }));
                Ok(())
            }
            Err(Failure::Nccl(nccl::Error::Usage { reason, .. })) => {
                self.recorder.withdraw(operation, ticket);
                Err(Error::Usage { operation: operation.name(), reason })
            }
            Err(Failure::Earlier(error)) => Err(error),
            Err(Failure::Nccl(error)) => Err(self.shared.fail(operation, &error.to_string())),
            Err(Failure::Device(error)) => Err(self.shared.fail(operation, &error.to_string())),
        }
    }

    fn enqueue_between(
        &mut self,
        (operation, ticket): (Operation, Ticket),
        calls: &[nccl::Operation],
        stream: Stream,
    ) -> Result<(), Failure> {
        let started = Instant::now();
        {
            let device = self.shared.device();
            device.record(self.ready, stream)?;
            if self.mutation != Mutation::InputNotAwaited {
                device.wait(self.stream, self.ready)?;
            }
        }
        if !calls.is_empty() {
            // SAFETY: it is the device's own, which lives as long as it.
            let own = unsafe { nccl::Stream::from_handle(self.stream.handle() as usize) };
            self.shared.group.enqueue(calls, own)?.wait()?;
        }
        let end = self.shared.event()?;
        let device = self.shared.device();
        device.record(end, self.stream)?;
        if self.mutation != Mutation::ResultNotAwaited {
            device.wait(stream, end)?;
        }
        drop(device);
        let (held, mut flight) = (Vec::new(), self.shared.flight());
        if let Some(error) = &flight.failed {
            // Noticed since the call: nobody looks any more at what runs.
            return Err(Failure::Earlier(error.clone()));
        }
        flight.running.push_back(Running { operation, ticket, started, end, held });
        if flight.running.len() == 1 {
            self.recorder.group.ring.start(ticket);
            self.shared.news.notify_all();
        }
        Ok(())
    }

    fn place(&self) -> Place {
        Place { rank: self.rank(), world_size: self.world_size() }
    }
}

impl Drop for NcclGroup {
    /// Waits for nobody: the watchdog stays until all has run or has failed, and NCCL's communicator is aborted then.
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl fmt::Debug for NcclGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclGroup").field("group", &self.shared.group).finish_non_exhaustive()
    }
}

enum Failure {
    /// The group has failed already.
    Earlier(Error),
    Nccl(nccl::Error),
    Device(DeviceError),
}

impl From<nccl::Error> for Failure {
    fn from(error: nccl::Error) -> Self {
        Self::Nccl(error)
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

fn region(buffer: DeviceBuffer) -> nccl::Region {
    // SAFETY: whoever made the buffer has promised the same; the caller's stream is joined after the operation, and
    // what the caller has us hold is kept until then or until the communicator has been aborted.
    unsafe { nccl::Region::new(buffer.address() as usize, buffer.len(), dtype_of(buffer.dtype())) }
}

fn send(buffer: DeviceBuffer, peer: usize) -> nccl::Operation {
    nccl::Operation::Send { send: region(buffer), peer }
}

fn receive(buffer: DeviceBuffer, peer: usize) -> nccl::Operation {
    nccl::Operation::Receive { receive: region(buffer), peer }
}

fn dtype_of(dtype: DType) -> nccl::DataType {
    match dtype {
        DType::F32 => nccl::DataType::F32,
        DType::F64 => nccl::DataType::F64,
        DType::F16 => nccl::DataType::F16,
        DType::BF16 => nccl::DataType::Bf16,
        DType::I8 => nccl::DataType::I8,
        DType::U8 => nccl::DataType::U8,
        DType::I32 => nccl::DataType::I32,
        DType::I64 => nccl::DataType::I64,
        DType::U64 => nccl::DataType::U64,
    }
}

fn op_of(op: ReduceOp) -> nccl::ReduceOp {
    match op {
        ReduceOp::Sum => nccl::ReduceOp::Sum,
        ReduceOp::Prod => nccl::ReduceOp::Prod,
        ReduceOp::Min => nccl::ReduceOp::Min,
        ReduceOp::Max => nccl::ReduceOp::Max,
        ReduceOp::Avg => nccl::ReduceOp::Avg,
    }
}

/// Sends and receives of one group run at the same time, so what is sent must not be where something is received.
fn check_apart(operation: &'static str, input: DeviceBuffer, output: DeviceBuffer) -> Result<(), Error> {
    let end = |buffer: DeviceBuffer| buffer.address() + (buffer.len() * buffer.dtype().size()) as u64;
    if input.address() < end(output) && output.address() < end(input) {
        let reason = "input and output overlap, which NCCL's sends and receives do not allow".to_owned();
        return Err(Error::Usage { operation, reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
