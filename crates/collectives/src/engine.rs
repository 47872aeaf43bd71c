//! Runs plans over a transport: the one place where schedules meet the network.
//!
//! The engine belongs to whichever thread runs an operation: the caller's for blocking calls, the
//! progress thread's for started ones. It sends and receives together, looks for bad news only when
//! nothing moves, and parks with a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use paceline_transport::frame::{InFrame, OutFrame, Prefix};
use paceline_transport::shm::{self, SharedMemory, Sharing};
use paceline_transport::{self as transport, Transport};

use crate::buffer::Buffers;
use crate::control::{Cause, Control};
use crate::dtype::DType;
use crate::error::{Call, Error};
use crate::fault::Fault;
use crate::kernels::{Own, Reducer};
use crate::levels::{Group, Levels};
use crate::network::Network;
use crate::operation::{Kind, Operation, Step};
use crate::plan::{Local, Place, Plan, Round, Schedule, Transfer};
use crate::recorder::{FlightRecorder, Group as Recorded};
use crate::rounds::RoundObserver;
use crate::shared::{Host, Waiter};
use crate::waits::Waits;

/// Control messages of a peer that are heard before the next look at the clock; more than a peer in order has to say.
const HEARD_AT_A_TIME: usize = 512;

/// How long a rank whose deadline has passed waits to hear who else is waiting, so that the rank
/// everybody waits for is named and not a rank that waits itself. A live peer answers within its
/// longest park below; the rest is for a busy machine.
const LATE_GRACE: Duration = Duration::from_millis(300);

/// The longest park in an operation. Every event wakes the engine; this only bounds the damage of a
/// wake-up that a transport misses, at no measurable cost.
const LONGEST_PARK: Duration = Duration::from_millis(50);

/// How long a failing rank waits for its last message, saying why, to be delivered.
const ABORT_GRACE: Duration = Duration::from_millis(200);

/// The longest all_reduce that every rank of a host takes to the other hosts whole, in bytes; the slices of
/// longer ones save more than their two additional steps inside the host cost.
const ONE_STEP_BYTES: usize = 16 * 1024;

/// Runs one operation at a time on the links of one epoch.
pub(crate) struct Engine {
    transport: Box<dyn Transport>,
    /// The head of each peer's next frame, as far as it has come; kept between operations.
    heads: Vec<InFrame>,
    fault: Arc<Fault>,
    /// What runs collectives, or their part within this host, on memory that its ranks share.
    host: Option<Box<Host>>,
    /// The ranks of this host, when there is such memory.
    members: Vec<usize>,
    /// Whether those are all ranks.
    whole: bool,
    /// When there are several hosts that collectives can go by.
    levels: Option<Levels>,
    timeout: Duration,
    /// When an operation began that goes in steps, each of which waits: their deadline is one.
    begun: Option<Instant>,
    /// Past calls; also to say in a mismatch what this rank called under an older number.
    pub(crate) recorded: Arc<Recorded>,
    flight_recorder: FlightRecorder,
    /// The fatal error, once there is one.
    failed: Option<Error>,
    /// Told about the fatal error.
    pub(crate) observer: Option<Observer>,
    /// Called before each round over links; the host has one of its own.
    rounds: Option<RoundObserver>,
    scratch: Scratch,
    round: Round,
    /// Payload bytes handed to and taken from the links since the start.
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    /// Those sent to ranks that do not share memory with this one.
    pub(crate) network_sent_bytes: u64,
    /// What messages between hosts cost. Equal on all ranks.
    pub(crate) network: Arc<Network>,
    /// How long others were waited for.
    pub(crate) waits: Waits,
}

/// Whoever wants to know that the communicator has failed, and why.
pub(crate) type Observer = Box<dyn FnOnce(&Error) + Send>;

/// Memory of the engine, reused between operations; bounded by the segment size, not by the message.
#[derive(Default)]
struct Scratch {
    /// One segment per peer, each `staged_stride` words after the one before. Words, so that every
    /// dtype is aligned.
    staged: Vec<u64>,
    staged_stride: usize,
    /// A ring's partial result, and the one that comes in.
    partial: Vec<u64>,
    received_partial: Vec<u64>,
    /// A reduced segment on its way to a root.
    reduced: Vec<u64>,
    /// Partial sums by chunk, and those that come in, each `sums_stride` words after the one before.
    sums: Vec<u64>,
    received_sums: Vec<u64>,
    sums_stride: usize,
    /// A block of 16-bit floats in f32, between hosts.
    wide: Vec<u64>,
}

/// One operation on its way through the engine.
struct Running<'a> {
    watch: Watch,
    operation: Operation,
    /// Of the elements that move.
    dtype: DType,
    group: Group<'a>,
    buffers: Buffers<'a>,
    reducer: Option<Reducer>,
    /// Frames exchanged with each peer so far in this operation.
    frames_sent: Vec<u32>,
    frames_received: Vec<u32>,
}

/// An operation as those see it who wait for its end.
struct Watch {
    operation: Operation,
    started: Instant,
    deadline: Instant,
    late: Late,
}

/// The engine, while a collective of ranks that share memory asks it what to do.
struct HostWaiter<'a> {
    engine: &'a mut Engine,
    operation: Operation,
    /// Made at the first idle moment: reading a clock takes longer than a small collective can afford.
    watch: Option<Watch>,
}

/// What is known about who waits for whom, once a deadline has passed.
#[derive(Default)]
struct Late {
    asked_at: Option<Instant>,
    answers: Vec<(usize, Vec<usize>)>,
}

struct Outgoing {
    transfer: Transfer,
    frame: OutFrame,
}

struct Incoming {
    transfer: Transfer,
    /// Payload bytes so far, or `None` until the head has been read.
    received: Option<usize>,
    done: bool,
}

impl Engine {
    /// Collectives run through shared memory when there is some and nothing else is `forced`.
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        fault: Arc<Fault>,
        timeout: Duration,
        forced: bool,
        network: Arc<Network>,
        (flight_recorder, recorded): (FlightRecorder, Arc<Recorded>),
    ) -> Self {
        let world_size = transport.world_size();
        let heads = (0..transport.world_size()).map(|_| InFrame::default()).collect();
        let segments = transport.segments().filter(|_| !forced);
        let levels = segments.as_ref().and_then(|segments| Levels::of(transport.rank(), segments.hosts()));
        let members = segments.as_ref().map_or_else(Vec::new, |segments| segments.members().to_vec());
        let host = segments.map(|segments| Box::new(Host::new(segments)));
        Self {
            transport,
            heads,
            fault,
            host,
            whole: members.len() == world_size,
            members,
            levels,
            timeout,
            begun: None,
            recorded,
            flight_recorder,
            failed: None,
            observer: None,
            rounds: None,
            scratch: Scratch::default(),
            round: Round::default(),
            sent_bytes: 0,
            received_bytes: 0,
            network_sent_bytes: 0,
            network,
            waits: Waits::new(world_size),
        }
    }

    /// Runs one operation to its end, well or not. Blocks the calling thread until the deadline at most
    /// (and a short grace, in which the culprit of a time-out is found).
    pub(crate) fn run(
        &mut self,
        operation: Operation,
        plan: &Plan,
        reducer: Option<Reducer>,
        buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        if let Some(error) = &self.failed {
            // What failed in the probe is the first operation's to report, in its name.
            let error = error.clone().of_probe_in(operation);
            return Err(self.failed.insert(error).clone());
        }
        let outcome = match self.host.take() {
            // First what must be quick: collectives of ranks that all share memory take less than a microsecond.
            Some(mut host) if self.whole && operation.is_collective() => {
                let outcome = self.run_on_host(&mut host, operation.into(), plan, reducer, buffers);
                self.host = Some(host);
                outcome
            }
            host => {
                self.host = host;
                self.run_between_hosts(operation, plan, reducer, buffers)
            }
        };
        outcome.map_err(|error| self.fail(error))?;
        if let Some((late, waited)) = self.waits.end() {
            let (rank, waited_ms) = (self.transport.rank(), waited.as_millis() as u64);
            tracing::warn!(rank, %operation, late, waited_ms, "waited for a rank that was late");
        }
        Ok(())
    }

    /// Runs an operation that goes over links, if only in part.
    #[inline(never)]
    fn run_between_hosts(
        &mut self,
        operation: Operation,
        plan: &Plan,
        reducer: Option<Reducer>,
        buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        if !Levels::serve(operation.kind) {
            return self.run_over_links(operation, plan, reducer, buffers);
        }
        match (self.levels.take(), self.host.take()) {
            (Some(levels), Some(mut host)) => {
                self.begun = Some(Instant::now());
                let outcome = self.run_in_levels(&mut host, &levels, (operation, plan), buffers);
                self.begun = None;
                (self.levels, self.host) = (Some(levels), Some(host));
                outcome
            }
            one_level => {
                (self.levels, self.host) = one_level;
                self.run_over_links(operation, plan, reducer, buffers)
            }
        }
    }

    /// Runs a collective through shared memory.
    #[inline(always)]
    pub(crate) fn run_on_host(
        &mut self,
        host: &mut Host,
        Step { operation, dtype }: Step,
        plan: &Plan,
        mut reducer: Option<Reducer>,
        mut buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        let mut waiter = HostWaiter { engine: self, operation, watch: None };
        if waiter.engine.fault.is_raised() {
            waiter.hear_bad_news()?;
        }
        host.run((&operation, dtype), plan, reducer.as_mut(), &mut buffers, &mut waiter)?;
        self.sent_bytes += std::mem::take(&mut host.staged_bytes);
        self.received_bytes += std::mem::take(&mut host.taken_bytes);
        Ok(())
    }

    /// Runs an operation as its plan says, message by message.
    fn run_over_links(
        &mut self,
        operation: Operation,
        plan: &Plan,
        reducer: Option<Reducer>,
        buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        let rank = self.transport.rank();
        if plan.schedule() == Schedule::AllReduceRing {
            // Which rank has which chunk is the ring's own business: it can go from neighbour to neighbour.
            let network = self.network.clone();
            let place = network.ring.iter().position(|&member| member == rank);
            let place = place.expect("a ring goes through all ranks");
            let group = Group::Some { members: &network.ring, place };
            return self.run_among(group, operation.into(), &plan.of_rank(place), reducer, buffers);
        }
        self.run_among(Group::World { rank }, operation.into(), plan, reducer, buffers)
    }

    fn watch(&self, operation: Operation) -> Watch {
        let started = self.begun.unwrap_or_else(Instant::now);
        Watch { operation, started, deadline: started + self.timeout, late: Late::default() }
    }

    /// Runs a plan of a group of ranks.
    pub(crate) fn run_among(
        &mut self,
        group: Group<'_>,
        Step { operation, dtype }: Step,
        plan: &Plan,
        reducer: Option<Reducer>,
        buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        let world_size = self.transport.world_size();
        let watch = self.watch(operation);
        let (frames_sent, frames_received) = (vec![0; world_size], vec![0; world_size]);
        let mut running =
            Running { watch, operation, dtype, group, buffers, reducer, frames_sent, frames_received };
        let outcome = self.run_rounds(plan, &mut running);
        self.transport.pause();
        outcome
    }

    /// Which way a collective with `bytes` bytes goes when ranks share memory, and why; `None` when they do
    /// not, and for what goes over links.
    pub(crate) fn explain(&self, kind: Kind, bytes: usize) -> Option<(&'static str, String)> {
        if self.whole {
            return self.host.as_ref()?.explain(kind, bytes);
        }
        let levels = self.levels.as_ref().filter(|_| Levels::serve(kind))?;
        let (hosts, ranks) = (levels.counterparts.len(), levels.members.len());
        let how = match kind {
            Kind::Barrier => "meets in each, then every rank with its counterparts",
            Kind::Broadcast { .. } if self.network.slices_pay(ranks, bytes) => "a slice for each rank",
            Kind::Broadcast { .. } => "from the root to one rank of each, then in each",
            Kind::AllReduce(_) if self.goes_in_one_step(levels, bytes) => "summed in each, then one step",
            Kind::AllReduce(_) => "a slice for each rank",
            Kind::ReduceScatter(_) | Kind::ReduceScatterV { .. } => "summed in each, then among counterparts",
            _ => "among counterparts, then in each",
        };
        Some(("levels", format!("{hosts} hosts of {ranks}: {how}; {}", self.network.describe())))
    }

    /// Whether every rank of a host takes a whole all_reduce of `bytes` bytes to the other hosts, rather than
    /// its slice. The two steps within the host that this saves count little beside the network's.
    pub(crate) fn goes_in_one_step(&self, levels: &Levels, bytes: usize) -> bool {
        bytes <= ONE_STEP_BYTES && self.network.one_shot_pays(levels.counterparts.len(), bytes)
    }

    /// The collectives of this host's shared memory, when it has some.
    pub(crate) fn host(&mut self) -> Option<&mut Host> {
        self.host.as_deref_mut()
    }

    /// The same, when all ranks are on this host.
    pub(crate) fn host_of_all(&mut self) -> Option<&mut Host> {
        self.host.as_deref_mut().filter(|_| self.whole)
    }

    /// Registers memory of `bytes` bytes on every rank; returns this rank's. Every rank calls it.
    ///
    /// # Errors
    /// Fatal: the others may have the memory.
    pub(crate) fn register(
        &mut self,
        operation: Operation,
        memory: SharedMemory,
    ) -> Result<Arc<SharedMemory>, Error> {
        let deadline = Instant::now() + self.timeout;
        let rank = self.transport.rank();
        let place = self.members.iter().position(|&member| member == rank);
        let shared = match (&mut self.host, place) {
            (Some(host), Some(place)) => {
                self.transport.share(memory, deadline).map(|all| host.table.add(place, all))
            }
            _ => return Ok(Arc::new(memory)),
        };
        shared.map_err(|error| {
            let mut watch = self.watch(operation);
            let error = self.link_error(error, &mut watch);
            self.fail(error)
        })
    }

    /// Forms the links of a new group of `members` for an operation whose exchange has run. Blocks like
    /// [`run`](Self::run), and notices the same things meanwhile.
    pub(crate) fn split(
        &mut self,
        operation: Operation,
        members: &[usize],
        id: u64,
    ) -> Result<Box<dyn Transport>, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let mut watch = self.watch(operation);
        self.form(members, id, &mut watch).map_err(|error| self.fail(error))
    }

    fn form(&mut self, members: &[usize], id: u64, watch: &mut Watch) -> Result<Box<dyn Transport>, Error> {
        // The engine's own deadline comes first: it finds out who is late.
        let deadline = watch.deadline + 2 * LATE_GRACE;
        let others: Vec<usize> =
            members.iter().copied().filter(|&member| member != self.transport.rank()).collect();
        let forming = self.transport.split(members, id, deadline);
        let mut forming = forming.map_err(|error| self.link_error(error, watch))?;
        let formed = loop {
            match forming.take() {
                Some(formed) => break formed.map_err(|error| self.link_error(error, watch))?,
                None => self.idle(&others, |_| false, watch)?,
            }
        };
        if self.transport.segments().is_none() {
            return Ok(formed);
        }
        // Whatever the news is about, it is heard below.
        let news = || self.fault.is_raised().then(|| "a rank was lost".to_owned());
        shm::upgrade(formed, Sharing::Auto, deadline, &news).map_err(|error| {
            let of_this_group = match error {
                transport::Error::Lost { peer, reason } => {
                    transport::Error::Lost { peer: members[peer], reason }
                }
                transport::Error::Left { peer } => transport::Error::Left { peer: members[peer] },
                other => other,
            };
            self.link_error(of_this_group, watch)
        })
    }

    /// Has `observer` called before each round.
    pub(crate) fn on_round(&mut self, observer: RoundObserver) {
        if let Some(host) = &mut self.host {
            host.rounds = Some(observer.clone());
        }
        self.rounds = Some(observer);
    }

    /// Forgets what has been called and moved so far.
    pub(crate) fn forget(&mut self) {
        (self.sent_bytes, self.received_bytes, self.network_sent_bytes) = (0, 0, 0);
        self.waits = Waits::new(self.transport.world_size());
    }

    /// Leaves in order; the engine is of no use afterwards.
    pub(crate) fn leave(&mut self, deadline: Instant) -> Result<(), Error> {
        self.transport.leave(deadline).map_err(|error| Error::Leave { reason: error.to_string() })
    }

    fn run_rounds(&mut self, plan: &Plan, running: &mut Running<'_>) -> Result<(), Error> {
        self.hear_bad_news(&mut running.watch, &[])?;
        let mut round = std::mem::take(&mut self.round);
        for index in 0..plan.rounds() {
            if let Some(observer) = &self.rounds {
                observer.call(index);
            }
            if self.fault.is_raised() {
                self.hear_bad_news(&mut running.watch, &[])?;
            }
            plan.round(index, &mut round);
            for transfer in round.sends.iter_mut().chain(&mut round.receives) {
                transfer.peer = running.group.member(transfer.peer);
            }
            self.exchange(&round, running)?;
            for &local in &round.locals {
                self.run_local(local, running);
            }
        }
        self.round = round;
        Ok(())
    }

    /// Moves all transfers of a round, in any interleaving, in order per peer.
    fn exchange(&mut self, round: &Round, running: &mut Running<'_>) -> Result<(), Error> {
        self.scratch.make_room(round, running.dtype, self.transport.world_size());
        let mut sends: Vec<Outgoing> =
            round.sends.iter().map(|&transfer| self.outgoing(transfer, running)).collect();
        let mut receives: Vec<Incoming> = round
            .receives
            .iter()
            .map(|&transfer| Incoming { transfer, received: None, done: false })
            .collect();
        loop {
            let moved = self
                .send_some(&mut sends, running)
                .map_err(|error| self.link_error(error, &mut running.watch))?
                | self.receive_some(&mut receives, running)?;
            sends.retain(|send| !send.frame.is_done());
            receives.retain(|receive| !receive.done);
            if sends.is_empty() && receives.is_empty() {
                return Ok(());
            }
            if !moved && !self.transport.spin() {
                self.idle_between(&sends, &receives, &mut running.watch)?;
            }
        }
    }

    fn outgoing(&self, transfer: Transfer, running: &mut Running<'_>) -> Outgoing {
        let index = &mut running.frames_sent[transfer.peer];
        let prefix = running.operation.to_prefix(*index);
        *index += 1;
        let bytes = transfer.span.len * wire_size(transfer.place, running.dtype);
        Outgoing { transfer, frame: OutFrame::new(0, self.transport.epoch(), &prefix, bytes) }
    }

    /// Sends what the windows take; at most one frame per peer is under way.
    fn send_some(&mut self, sends: &mut [Outgoing], running: &Running<'_>) -> Result<bool, transport::Error> {
        let (mut moved, mut full) = (false, PeerSet::default());
        for send in sends {
            let Transfer { peer, place, span } = send.transfer;
            if full.contains(peer) {
                continue;
            }
            let size = running.dtype.size();
            let payload = match place {
                Place::Input => running.buffers.input(span, size),
                Place::Output => running.buffers.output(span, size),
                Place::Partial => {
                    let bytes = span.len * running.dtype.accumulator().size();
                    &bytemuck::cast_slice(&self.scratch.partial)[..bytes]
                }
                Place::Reduced => &bytemuck::cast_slice(&self.scratch.reduced)[..span.len * size],
                Place::Sum { chunk } => {
                    let bytes = span.len * running.dtype.accumulator().size();
                    &bytemuck::cast_slice(&self.scratch.sums[chunk * self.scratch.sums_stride..])[..bytes]
                }
                Place::Staged | Place::ReceivedSum { .. } => {
                    unreachable!("schedules send nothing that they have received only")
                }
            };
            while !send.frame.is_done() {
                let sent = send.frame.try_send(&mut *self.transport, peer, payload)?;
                if sent == 0 {
                    full.insert(peer);
                    break;
                }
                moved = true;
                self.sent_bytes += sent as u64;
                if !self.whole && !self.members.contains(&peer) {
                    self.network_sent_bytes += sent as u64;
                }
            }
        }
        Ok(moved)
    }

    /// Receives what has come, straight to its place; in order per peer.
    fn receive_some(&mut self, receives: &mut [Incoming], running: &mut Running<'_>) -> Result<bool, Error> {
        let (mut moved, mut empty) = (false, PeerSet::default());
        for receive in receives {
            let peer = receive.transfer.peer;
            if empty.contains(peer) {
                continue;
            }
            moved |= self.receive(receive, running)?;
            if !receive.done {
                empty.insert(peer);
            }
        }
        Ok(moved)
    }

    fn receive(&mut self, receive: &mut Incoming, running: &mut Running<'_>) -> Result<bool, Error> {
        let Transfer { peer, place, span } = receive.transfer;
        let size = wire_size(place, running.dtype);
        let mut moved = false;
        let mut received = match receive.received {
            Some(received) => received,
            None if self.take_head(peer, span.len * size, running)? => {
                moved = true;
                0
            }
            None => return Ok(false),
        };
        let into = match place {
            Place::Output => running.buffers.output_mut(span, size),
            Place::Staged => self.scratch.staged_mut(peer, span.len * size),
            Place::Partial => {
                &mut bytemuck::cast_slice_mut(&mut self.scratch.received_partial)[..span.len * size]
            }
            Place::Sum { chunk } => self.scratch.sum_mut(chunk, span.len * size),
            Place::ReceivedSum { chunk } => self.scratch.received_sum_mut(chunk, span.len * size),
            Place::Input | Place::Reduced => unreachable!("schedules never receive to there"),
        };
        let result = loop {
            if received == into.len() {
                break Ok(());
            }
            match self.transport.try_recv(peer, &mut into[received..]) {
                Ok(0) => break Ok(()),
                Ok(count) => {
                    moved = true;
                    received += count;
                    self.received_bytes += count as u64;
                }
                Err(error) => break Err(error),
            }
        };
        receive.received = Some(received);
        receive.done = received == into.len();
        result.map_err(|error| self.link_error(error, &mut running.watch))?;
        Ok(moved)
    }

    /// Takes the head of the peer's next frame off its stream, if it has come. It must be the next
    /// frame of this operation, with a payload of `expected` bytes.
    fn take_head(&mut self, peer: usize, expected: usize, running: &mut Running<'_>) -> Result<bool, Error> {
        let (header, prefix) = match self.heads[peer].peek(&mut *self.transport, peer) {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(false),
            Err(error) => return Err(self.link_error(error, &mut running.watch)),
        };
        let lost = |reason: String| Error::PeerLost { operation: running.operation, rank: peer, reason };
        let Some((theirs, index)) = Operation::from_prefix(prefix) else {
            return Err(lost("it sent a frame of an unknown operation".to_owned()));
        };
        if theirs != running.operation {
            return Err(self.mismatch(peer, theirs, running.operation));
        }
        if index != running.frames_received[peer] || header.len as usize != expected {
            let frames = running.frames_received[peer];
            return Err(lost(format!(
                "it sent frame {index} with {} bytes where frame {frames} with {expected} bytes was due",
                header.len
            )));
        }
        running.frames_received[peer] += 1;
        self.heads[peer].consume();
        Ok(true)
    }

    /// Nothing moved: looks for bad news and for calls that disagree, then parks.
    fn idle_between(
        &mut self,
        sends: &[Outgoing],
        receives: &[Incoming],
        watch: &mut Watch,
    ) -> Result<(), Error> {
        let mut waiting_for: Vec<usize> = receives.iter().map(|receive| receive.transfer.peer).collect();
        waiting_for.extend(sends.iter().map(|send| send.transfer.peer));
        waiting_for.sort_unstable();
        waiting_for.dedup();
        let due = |peer| receives.iter().any(|receive| receive.transfer.peer == peer);
        self.look_for_missed_message(&between_frames(&waiting_for, receives), watch)?;
        self.idle(&waiting_for, due, watch)
    }

    /// Looks for bad news and for calls that disagree, then parks. A frame is `due` from some ranks.
    fn idle(
        &mut self,
        waiting_for: &[usize],
        due: impl Fn(usize) -> bool,
        watch: &mut Watch,
    ) -> Result<(), Error> {
        self.hear_bad_news(watch, waiting_for)?;
        self.look_for_mismatch(due, watch)?;
        let now = Instant::now();
        let until = match watch.late.asked_at {
            None if now < watch.deadline => watch.deadline,
            None => {
                watch.late.asked_at = Some(now);
                self.tell_all(&Control::WhoIsLate);
                now + LATE_GRACE
            }
            Some(asked_at) if now < asked_at + LATE_GRACE => asked_at + LATE_GRACE,
            Some(_) => {
                let culprits = watch.late.culprits(self.transport.rank(), waiting_for);
                return Err(Error::TimedOut {
                    operation: watch.operation,
                    waiting_for: culprits,
                    elapsed: watch.started.elapsed(),
                });
            }
        };
        self.transport.wait_for(waiting_for, until.min(now + LONGEST_PARK));
        self.waits.add(waiting_for, now.elapsed());
        Ok(())
    }

    /// Looks whether a rank of this host has gone on to a collective instead of taking its part in the
    /// message that is waited for. Over links its next frame says so; here there is no frame.
    fn look_for_missed_message(&mut self, waiting_for: &[usize], watch: &mut Watch) -> Result<(), Error> {
        for &peer in waiting_for {
            let place = self.members.iter().position(|&member| member == peer);
            let ahead = self.host.as_ref().zip(place).and_then(|(host, place)| host.ahead(place));
            let Some((theirs, _)) = ahead.and_then(|prefix| Operation::from_prefix(&prefix)) else {
                continue;
            };
            // What it sent before is in the ring: it may have come between the last look and that flag.
            let pending = self.heads[peer].peek(&mut *self.transport, peer).is_ok_and(|head| head.is_some());
            if !pending && !theirs.is_before(&watch.operation) {
                return Err(self.mismatch(peer, theirs, watch.operation));
            }
        }
        Ok(())
    }

    /// Reads what peers and the owner of the communicator have to say.
    fn hear_bad_news(&mut self, watch: &mut Watch, waiting_for: &[usize]) -> Result<(), Error> {
        for peer in self.peers() {
            // The end of the lane is no news in itself: the data lane knows whether the peer is needed.
            for _ in 0..HEARD_AT_A_TIME {
                let Ok(Some(message)) = self.transport.try_recv_control(peer) else { break };
                self.hear(peer, &message, watch, waiting_for)?;
            }
        }
        let Some(news) = self.fault.take() else { return Ok(()) };
        let operation = watch.operation;
        for (rank, reason) in news.lost {
            let left = rank < self.transport.world_size()
                && rank != self.transport.rank()
                && self.transport.try_recv_control(rank) == Err(transport::Error::Left { peer: rank });
            if !left {
                return Err(Error::PeerLost { operation, rank, reason });
            }
        }
        news.interrupted.map_or(Ok(()), |reason| Err(Error::Interrupted { operation, reason }))
    }

    fn hear(
        &mut self,
        peer: usize,
        message: &[u8],
        watch: &mut Watch,
        waiting_for: &[usize],
    ) -> Result<(), Error> {
        match Control::from_bytes(message) {
            Ok(Control::Abort(cause)) => {
                return Err(cause.into_error(watch.operation, self.transport.rank()));
            }
            Ok(Control::WhoIsLate) if !waiting_for.is_empty() => {
                // A peer that cannot be told is lost, which its data lane says better.
                let _ = self.transport.send_control(peer, &Control::waiting_for(waiting_for).to_bytes());
            }
            Ok(Control::WhoIsLate) => {}
            Ok(Control::WaitingFor(ranks)) => {
                let world_size = self.transport.world_size();
                let ranks = ranks.into_iter().map(|rank| rank as usize).filter(|&rank| rank < world_size);
                // One for each peer, and only when it was asked for.
                watch.late.answers.retain(|(from, _)| *from != peer);
                if watch.late.asked_at.is_some() {
                    watch.late.answers.push((peer, ranks.collect()));
                }
            }
            Err(reason) => {
                return Err(Error::PeerLost { operation: watch.operation, rank: peer, reason });
            }
        }
        Ok(())
    }

    /// Looks at the next frame of peers from which nothing is due now: a frame that cannot belong to
    /// the future says that the peer called something else.
    fn look_for_mismatch(&mut self, due: impl Fn(usize) -> bool, watch: &mut Watch) -> Result<(), Error> {
        for peer in self.peers() {
            if due(peer) {
                continue;
            }
            let theirs = match self.heads[peer].peek(&mut *self.transport, peer) {
                Ok(Some((_, prefix))) => Operation::from_prefix(prefix).map(|(operation, _)| operation),
                Ok(None) | Err(transport::Error::Left { .. }) => continue,
                Err(error) => return Err(self.link_error(error, watch)),
            };
            if let Some(theirs) = theirs
                && watch.operation.rules_out(&theirs)
            {
                return Err(self.mismatch(peer, theirs, watch.operation));
            }
        }
        Ok(())
    }

    fn mismatch(&self, peer: usize, theirs: Operation, operation: Operation) -> Error {
        let ours = self.recorded.other_call(&theirs).unwrap_or(operation);
        let calls =
            [Call { rank: self.transport.rank(), operation: ours }, Call { rank: peer, operation: theirs }];
        Error::Mismatch { operation, calls: Box::new(calls) }
    }

    /// The error of an operation whose link failed. A peer that gave up says why before its link ends,
    /// and so do others: their reason is better than "connection closed".
    fn link_error(&mut self, error: transport::Error, watch: &mut Watch) -> Error {
        if let Err(told) = self.hear_bad_news(watch, &[]) {
            return told;
        }
        let operation = watch.operation;
        match error {
            transport::Error::Left { peer } => Error::PeerLeft { operation, rank: peer },
            transport::Error::Lost { peer, reason } => Error::PeerLost { operation, rank: peer, reason },
            other => Error::Interrupted { operation, reason: other.to_string() },
        }
    }

    /// Notes a fatal error and tells the others, so that nobody waits for this rank.
    fn fail(&mut self, error: Error) -> Error {
        if let Some(host) = &self.host {
            host.retract();
        }
        if let Some(observer) = self.observer.take() {
            observer(&error);
        }
        if let Error::PeerLost { rank, reason, .. } = &error
            && *rank != self.transport.rank()
            && *rank < self.transport.world_size()
        {
            // It answers no more; the last message must not wait for it.
            self.transport.give_up(*rank, reason);
        }
        if let Some(cause) = Cause::of(&error, self.transport.rank()) {
            tracing::debug!(rank = self.transport.rank(), %error, "operation failed");
            self.transport.abort(&Control::Abort(cause).to_bytes(), Instant::now() + ABORT_GRACE);
        }
        self.failed = Some(error.clone());
        self.flight_recorder.failed(&error);
        error
    }

    fn tell_all(&mut self, message: &Control) {
        let bytes = message.to_bytes();
        for peer in self.peers() {
            // A peer that cannot be told is lost, which its data lane says better.
            let _ = self.transport.send_control(peer, &bytes);
        }
    }

    /// Room for `bytes` bytes of a block in its accumulators, to be given back.
    pub(crate) fn take_wide(&mut self, bytes: usize) -> Vec<u64> {
        let mut wide = std::mem::take(&mut self.scratch.wide);
        grow(&mut wide, words(bytes));
        wide
    }

    /// Keeps the room for the next block.
    pub(crate) fn give_wide(&mut self, wide: Vec<u64>) {
        self.scratch.wide = wide;
    }

    /// The number of ranks.
    pub(crate) fn world_size(&self) -> usize {
        self.transport.world_size()
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.transport.rank();
        (0..self.transport.world_size()).filter(move |&peer| peer != rank)
    }

    fn run_local(&mut self, local: Local, running: &mut Running<'_>) {
        let Running { dtype, group, buffers, reducer, .. } = running;
        let size = dtype.size();
        let scratch = &mut self.scratch;
        let kernels = |reducer| Option::as_mut(reducer).expect("an operation that reduces has its kernels");
        match local {
            Local::Copy { input, output_start } => {
                if let (Some(input), output) = buffers.input_and_output(input, output_start, size) {
                    output.copy_from_slice(input);
                }
            }
            Local::ReduceStaged { input, output_start } => {
                let (own, output) = buffers.input_and_output(input, output_start, size);
                let own = own.map_or(Own::InPlace, Own::Separate);
                let staged = |number| scratch.staged(group.member(number), input.len * size);
                kernels(reducer).reduce(group.rank(), own, staged, output);
            }
            Local::ReduceStagedAside { input } => {
                let mut reduced = std::mem::take(&mut scratch.reduced);
                let own = Own::Separate(buffers.input(input, size));
                let staged = |number| scratch.staged(group.member(number), input.len * size);
                let output = &mut bytemuck::cast_slice_mut(&mut reduced)[..input.len * size];
                kernels(reducer).reduce(group.rank(), own, staged, output);
                scratch.reduced = reduced;
            }
            Local::StartPartial { input } => {
                kernels(reducer).start_partial(buffers.input(input, size), &mut scratch.partial);
            }
            Local::AddToPartial { input } => {
                std::mem::swap(&mut scratch.partial, &mut scratch.received_partial);
                kernels(reducer).add_to_partial(buffers.input(input, size), &mut scratch.partial);
            }
            Local::FinishPartial { output } => {
                kernels(reducer).finish_partial(&scratch.partial, buffers.output_mut(output, size));
            }
            Local::StartSum { chunk, input } => {
                let sum = &mut scratch.sums[chunk * scratch.sums_stride..];
                kernels(reducer).start_partial(buffers.input(input, size), sum);
            }
            Local::AddToSum { chunk, len } => {
                let start = chunk * scratch.sums_stride;
                let (received, sum) = (&scratch.received_sums[start..], &mut scratch.sums[start..]);
                kernels(reducer).merge_partials(received, sum, len);
            }
            Local::FinishSum { chunk, output } => {
                let sum = &scratch.sums[chunk * scratch.sums_stride..];
                kernels(reducer).finish_partial(sum, buffers.output_mut(output, size));
            }
        }
    }
}

/// Those of `waiting_for` whose stream stands at the head of a frame, not within a payload that would be
/// taken for one. Whoever is within a frame takes part in the message anyhow.
fn between_frames(waiting_for: &[usize], receives: &[Incoming]) -> Vec<usize> {
    let within = |peer| receives.iter().any(|it| it.transfer.peer == peer && it.received.is_some());
    waiting_for.iter().copied().filter(|&peer| !within(peer)).collect()
}

impl HostWaiter<'_> {
    fn watch(&mut self) -> (&mut Engine, &mut Watch) {
        let (engine, operation) = (&mut *self.engine, self.operation);
        let watch = self.watch.get_or_insert_with(|| engine.watch(operation));
        (engine, watch)
    }

    fn hear_bad_news(&mut self) -> Result<(), Error> {
        let (engine, watch) = self.watch();
        engine.hear_bad_news(watch, &[])
    }
}

impl Waiter for HostWaiter<'_> {
    fn spin(&mut self) -> bool {
        self.engine.transport.spin()
    }

    fn idle(&mut self, waiting_for: &[usize]) -> Result<(), Error> {
        let (engine, watch) = self.watch();
        let waiting_for: Vec<usize> = waiting_for.iter().map(|&place| engine.members[place]).collect();
        for &peer in &waiting_for {
            if let Err(error) = engine.transport.check(peer) {
                return Err(engine.link_error(error, watch));
            }
        }
        // Messages come over the links, and this step of a collective does not: a frame is due from nobody.
        engine.idle(&waiting_for, |_| false, watch)
    }

    fn look(&mut self) -> Result<(), Error> {
        if self.engine.fault.is_raised() { self.hear_bad_news() } else { Ok(()) }
    }

    fn end(&mut self) {
        self.engine.transport.wait_is_over();
    }

    fn mismatch(&mut self, place: usize, theirs: &Prefix) -> Error {
        let peer = self.engine.members[place];
        match Operation::from_prefix(theirs) {
            Some((theirs, _)) => self.engine.mismatch(peer, theirs, self.operation),
            None => {
                let reason = "it called an operation that this release does not know".to_owned();
                Error::PeerLost { operation: self.operation, rank: peer, reason }
            }
        }
    }
}

impl Scratch {
    /// Grows to what the transfers and local steps of a round need. A segment bounds each part.
    fn make_room(&mut self, round: &Round, dtype: DType, world_size: usize) {
        let staged = round.receives.iter().filter(|receive| receive.place == Place::Staged);
        let longest = staged.map(|receive| receive.span.len).max().unwrap_or(0);
        self.staged_stride = self.staged_stride.max(words(longest * dtype.size()));
        if longest > 0 && self.staged.len() < self.staged_stride * world_size {
            self.staged.resize(self.staged_stride * world_size, 0);
        }
        let partial = round.locals.iter().map(|local| match *local {
            Local::StartPartial { input } | Local::AddToPartial { input } => input.len,
            Local::FinishPartial { output } => output.len,
            Local::Copy { .. }
            | Local::ReduceStaged { .. }
            | Local::ReduceStagedAside { .. }
            | Local::StartSum { .. }
            | Local::AddToSum { .. }
            | Local::FinishSum { .. } => 0,
        });
        let needed = words(partial.max().unwrap_or(0) * dtype.accumulator().size());
        for buffer in [&mut self.partial, &mut self.received_partial] {
            grow(buffer, needed);
        }
        let aside = round.locals.iter().map(|local| match *local {
            Local::ReduceStagedAside { input } => input.len,
            _ => 0,
        });
        grow(&mut self.reduced, words(aside.max().unwrap_or(0) * dtype.size()));
        // All sums of a segment begin in one round, so none is in the way of a longer stride.
        let begun = round.locals.iter().map(|local| match *local {
            Local::StartSum { input, .. } => input.len,
            _ => 0,
        });
        let longest = words(begun.max().unwrap_or(0) * dtype.accumulator().size());
        if longest > 0 {
            self.sums_stride = self.sums_stride.max(longest);
            grow(&mut self.sums, self.sums_stride * world_size);
            grow(&mut self.received_sums, self.sums_stride * world_size);
        }
    }

    fn staged(&self, peer: usize, bytes: usize) -> &[u8] {
        &bytemuck::cast_slice(&self.staged[peer * self.staged_stride..])[..bytes]
    }

    fn sum_mut(&mut self, chunk: usize, bytes: usize) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.sums[chunk * self.sums_stride..])[..bytes]
    }

    fn received_sum_mut(&mut self, chunk: usize, bytes: usize) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.received_sums[chunk * self.sums_stride..])[..bytes]
    }

    fn staged_mut(&mut self, peer: usize, bytes: usize) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.staged[peer * self.staged_stride..])[..bytes]
    }
}

/// Size of one element of a place, on the wire and in memory, in bytes.
fn wire_size(place: Place, dtype: DType) -> usize {
    match place {
        Place::Input | Place::Output | Place::Staged | Place::Reduced => dtype.size(),
        Place::Partial | Place::Sum { .. } | Place::ReceivedSum { .. } => dtype.accumulator().size(),
    }
}

fn grow(buffer: &mut Vec<u64>, needed: usize) {
    if buffer.len() < needed {
        buffer.resize(needed, 0);
    }
}

fn words(bytes: usize) -> usize {
    bytes.div_ceil(size_of::<u64>())
}

impl Late {
    /// The ranks at the end of the chains of waiting: waited for, and not waiting for anybody.
    fn culprits(&self, own_rank: usize, waiting_for: &[usize]) -> Vec<usize> {
        let mut seen = vec![own_rank];
        let mut open = waiting_for.to_vec();
        let mut culprits = Vec::new();
        while let Some(rank) = open.pop() {
            if seen.contains(&rank) {
                continue;
            }
            seen.push(rank);
            match self.answers.iter().rev().find(|(from, _)| *from == rank) {
                Some((_, theirs)) => open.extend(theirs),
                None => culprits.push(rank),
            }
        }
        culprits.sort_unstable();
        // Everybody says to wait for somebody who waits: the network is at fault, or a schedule.
        if culprits.is_empty() { waiting_for.to_vec() } else { culprits }
    }
}

/// A set of ranks, for one pass over the transfers.
#[derive(Default)]
struct PeerSet {
    words: Vec<u64>,
}

impl PeerSet {
    fn contains(&self, rank: usize) -> bool {
        self.words.get(rank / 64).is_some_and(|word| word & (1 << (rank % 64)) != 0)
    }

    fn insert(&mut self, rank: usize) {
        if self.words.len() <= rank / 64 {
            self.words.resize(rank / 64 + 1, 0);
        }
        self.words[rank / 64] |= 1 << (rank % 64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Span;

    #[test]
    fn the_culprit_is_whoever_is_waited_for_and_does_not_wait() {
        let answers = |list: &[(usize, &[usize])]| Late {
            asked_at: None,
            answers: list.iter().map(|(rank, ranks)| (*rank, ranks.to_vec())).collect(),
        };
        // 0 waits for 1, 1 waits for 2, 2 says nothing.
        assert_eq!(answers(&[(1, &[2])]).culprits(0, &[1]), [2]);
        assert_eq!(answers(&[(1, &[2, 0]), (3, &[1])]).culprits(0, &[1, 3]), [2]);
        assert_eq!(answers(&[]).culprits(0, &[1, 3]), [1, 3]);
        assert_eq!(answers(&[(1, &[0])]).culprits(0, &[1]), [1], "a circle names whom we wait for");
        assert_eq!(answers(&[(1, &[0]), (1, &[3])]).culprits(0, &[1]), [3], "the last answer counts");
    }

    #[test]
    fn a_peer_in_the_middle_of_a_frame_is_not_looked_at_for_the_head_of_another() {
        let incoming = |peer, received| Incoming {
            transfer: Transfer { peer, place: Place::Output, span: Span { start: 0, len: 10 } },
            received,
            done: false,
        };
        let receives = [incoming(1, Some(4)), incoming(1, None), incoming(2, None)];
        assert_eq!(between_frames(&[1, 2, 3], &receives), [2, 3]);
    }

    #[test]
    fn a_peer_set_holds_what_was_put_in() {
        let mut set = PeerSet::default();
        for rank in [0, 63, 64, 1000] {
            assert!(!set.contains(rank));
            set.insert(rank);
            assert!(set.contains(rank));
        }
        assert!(!set.contains(1));
    }
}
