//! The state of an endpoint, and one turn of its loop.
//!
//! Nothing here reads a clock, waits or wakes: the time is an argument, the socket never blocks, and
//! wakers are collected for [`Shared`](super::shared::Shared) to call outside its lock.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use bytes::Bytes;
use quinn_proto::{
    ClientConfig, ConnectError, ConnectionError, ConnectionEvent, ConnectionHandle, DatagramEvent,
    EndpointConfig, Incoming, ServerConfig, StreamId, Transmit, VarInt,
};
use quinn_udp::RecvMeta;
use slab::Slab;

use super::entry::Entry;
use super::pool::Pool;
use crate::quic::congestion;
use crate::quic::socket::Socket;

/// Batches taken from the kernel by one call. Each may be 64 KiB: more of them would be copied through a
/// cache that does not hold them.
const RECEIVE_BATCHES: usize = 8;

/// The size of the buffer for one batch: what the kernel joins at most.
const RECEIVE_BATCH_BYTES: usize = 64 * 1024;

/// Calls for packets in one turn. The rest waits until what came has been answered and read; a flood cannot
/// hold up timers and senders.
const RECEIVE_CALLS: usize = 4;

/// Batches sent in one turn: half a millisecond's work or so, after which packets are looked for again.
const SEND_BATCHES: usize = 16;

/// What identifies an [`Entry`]. Not used again before the last handle to the connection is gone.
pub(super) type Id = usize;

/// The state of an endpoint.
pub(super) struct Core {
    socket: Arc<Socket>,
    endpoint: quinn_proto::Endpoint,
    entries: Slab<Entry>,
    /// By quinn-proto's handle: which entry it is.
    by_handle: Vec<Option<Id>>,
    /// Connections that may have something to send, in turn.
    sending: VecDeque<Id>,
    /// A batch that the socket did not take. Nothing else is sent before it.
    unsent: Option<Transmit>,
    send_buffer: Vec<u8>,
    receive_buffer: Box<[u8]>,
    received: Pool,
    written: Pool,
    timers: BTreeSet<(Instant, Id)>,
    incoming: VecDeque<Incoming>,
    /// How all connections are to be closed, once the endpoint is.
    closed: Option<(VarInt, Bytes)>,
    /// Who waits for a handshake to begin, or for the end of the last connection.
    waiting: Vec<Waker>,
    /// To be woken outside the lock.
    pub(super) woken: Vec<Waker>,
}

/// How far a turn got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing is left to do before the next packet or deadline.
    Done,
    /// There is more to do at once.
    More,
    /// The socket takes nothing now.
    Blocked,
}

impl Core {
    pub(super) fn new(socket: Arc<Socket>, config: EndpointConfig, server: ServerConfig) -> Self {
        // Discovery of the MTU needs datagrams that are never cut into pieces.
        let allow_mtud = !socket.may_fragment();
        let endpoint = quinn_proto::Endpoint::new(Arc::new(config), Some(Arc::new(server)), allow_mtud, None);
        Self {
            socket,
            endpoint,
            entries: Slab::new(),
            by_handle: Vec::new(),
            sending: VecDeque::new(),
            unsent: None,
            send_buffer: Vec::new(),
            receive_buffer: vec![0; RECEIVE_BATCHES * RECEIVE_BATCH_BYTES].into(),
            received: Pool::default(),
            written: Pool::default(),
            timers: BTreeSet::new(),
            incoming: VecDeque::new(),
            closed: None,
            waiting: Vec::new(),
            woken: Vec::new(),
        }
    }

    /// One turn: sends what the last one left, receives, fires timers. What the packets call for
    /// (acknowledgements, above all) is sent by the next turn, so that the answer of a caller who reads
    /// them now travels in the same datagram.
    pub(super) fn turn(&mut self, now: Instant) -> Progress {
        let sent = self.send(now);
        let received = self.receive(now);
        self.fire_timers(now);
        if received == Progress::More { Progress::More } else { sent }
    }

    /// When the next timer must fire.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.timers.first().map(|(deadline, _)| *deadline)
    }

    /// Whether the socket did not take a batch.
    pub(super) fn is_blocked(&self) -> bool {
        self.unsent.is_some()
    }

    /// Whether there is no connection, not even an ended one.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether a connection may have something to send.
    pub(super) fn has_unsent(&self) -> bool {
        !self.sending.is_empty()
    }

    pub(super) fn entry(&mut self, id: Id) -> &mut Entry {
        &mut self.entries[id]
    }

    /// Writes as much of `piece` to a stream as its windows let it.
    pub(super) fn write(
        &mut self,
        id: Id,
        stream: StreamId,
        piece: &[u8],
    ) -> Result<usize, quinn_proto::WriteError> {
        let entry = &mut self.entries[id];
        let mut stream = entry.proto.send_stream(stream);
        let written = if entry.tight {
            stream.write(piece)?
        } else {
            stream.write_chunks(&mut [self.written.copy(piece).freeze()])?.bytes
        };
        entry.tight = written < piece.len();
        Ok(written)
    }

    /// Has the next turn ask a connection for packets.
    pub(super) fn queue(&mut self, id: Id) {
        let entry = &mut self.entries[id];
        if !entry.queued {
            entry.queued = true;
            self.sending.push_back(id);
        }
    }

    // Connections ----------------------------------------------------------------------------------------

    pub(super) fn connect(
        &mut self,
        now: Instant,
        config: ClientConfig,
        remote: SocketAddr,
        server_name: &str,
    ) -> Result<Id, ConnectError> {
        if self.closed.is_some() {
            return Err(ConnectError::EndpointStopping);
        }
        // A dual-stack socket takes addresses in IPv6 form only.
        let remote = match (self.socket.local_addr(), remote) {
            (SocketAddr::V6(_), SocketAddr::V4(v4)) => {
                SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port())
            }
            (SocketAddr::V4(_), SocketAddr::V6(_)) => return Err(ConnectError::InvalidRemoteAddress(remote)),
            _ => remote,
        };
        let (handle, proto) = self.endpoint.connect(now, config, remote, server_name)?;
        Ok(self.insert(handle, proto))
    }

    /// The next handshake that somebody has begun, or `waker` is kept; `None` once the endpoint is closed.
    pub(super) fn poll_incoming(&mut self, waker: &Waker) -> std::task::Poll<Option<Incoming>> {
        match self.incoming.pop_front() {
            _ if self.closed.is_some() => std::task::Poll::Ready(None),
            Some(incoming) => std::task::Poll::Ready(Some(incoming)),
            None => {
                self.keep(waker);
                std::task::Poll::Pending
            }
        }
    }

    pub(super) fn accept(&mut self, now: Instant, incoming: Incoming) -> Result<Id, ConnectionError> {
        let mut response = Vec::new();
        match self.endpoint.accept(incoming, now, &mut response, None) {
            Ok((handle, proto)) => Ok(self.insert(handle, proto)),
            Err(error) => {
                if let Some(transmit) = error.response {
                    self.respond(&transmit, &response);
                }
                Err(error.cause)
            }
        }
    }

    pub(super) fn retry(&mut self, incoming: Incoming) {
        let mut response = Vec::new();
        match self.endpoint.retry(incoming, &mut response) {
            Ok(transmit) => self.respond(&transmit, &response),
            // It has been asked before, and asking twice is not allowed.
            Err(error) => self.endpoint.ignore(error.into_incoming()),
        }
    }

    pub(super) fn ignore(&mut self, incoming: Incoming) {
        self.endpoint.ignore(incoming);
    }

    /// Closes a connection from this side, unless it has ended.
    pub(super) fn close(&mut self, now: Instant, id: Id, code: VarInt, reason: Bytes) {
        let (entry, woken) = (&mut self.entries[id], &mut self.woken);
        if entry.error.is_none() {
            congestion::open(&entry.proto);
            entry.proto.close(now, code, reason);
            entry.end(ConnectionError::LocallyClosed, woken);
            self.queue(id);
        }
    }

    /// Closes all connections, now and in future.
    pub(super) fn close_all(&mut self, now: Instant, code: VarInt, reason: &Bytes) {
        self.closed.get_or_insert((code, reason.clone()));
        let ids: Vec<Id> = self.entries.iter().map(|(id, _)| id).collect();
        ids.into_iter().for_each(|id| self.close(now, id, code, reason.clone()));
        while let Some(incoming) = self.incoming.pop_front() {
            self.refuse(incoming);
        }
        self.woken.append(&mut self.waiting);
    }

    /// The last handle to a connection is gone.
    pub(super) fn release(&mut self, now: Instant, id: Id) {
        self.close(now, id, VarInt::from_u32(0), Bytes::new());
        self.entries[id].held = false;
        self.settle(id);
    }

    /// Whether no connection is left that the network knows; else `waker` is kept.
    pub(super) fn is_idle(&mut self, waker: &Waker) -> bool {
        let idle = self.entries.iter().all(|(_, entry)| entry.handle.is_none());
        if !idle {
            self.keep(waker);
        }
        idle
    }

    fn insert(&mut self, handle: ConnectionHandle, proto: quinn_proto::Connection) -> Id {
        let id = self.entries.insert(Entry::new(proto, handle));
        if self.by_handle.len() <= handle.0 {
            self.by_handle.resize(handle.0 + 1, None);
        }
        self.by_handle[handle.0] = Some(id);
        self.settle(id);
        self.queue(id);
        id
    }

    fn refuse(&mut self, incoming: Incoming) {
        let mut response = Vec::new();
        let transmit = self.endpoint.refuse(incoming, &mut response);
        self.respond(&transmit, &response);
    }

    fn keep(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|known| known.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }

    // Packets --------------------------------------------------------------------------------------------

    fn receive(&mut self, now: Instant) -> Progress {
        let mut touched = Vec::new();
        let mut progress = Progress::More;
        for _ in 0..RECEIVE_CALLS {
            if self.receive_once(now, &mut touched) == Progress::Done {
                progress = Progress::Done;
                break;
            }
        }
        for id in touched {
            self.entries[id].touched = false;
            self.settle(id);
            if self.entries.contains(id) {
                self.queue(id);
            }
        }
        progress
    }

    /// One call for packets; `More` if it may have left some.
    fn receive_once(&mut self, now: Instant, touched: &mut Vec<Id>) -> Progress {
        let mut metas = [RecvMeta::default(); RECEIVE_BATCHES];
        let mut buffer = std::mem::take(&mut self.receive_buffer);
        let received = {
            let mut chunks = buffer.chunks_exact_mut(RECEIVE_BATCH_BYTES).map(IoSliceMut::new);
            let mut slices: [IoSliceMut<'_>; RECEIVE_BATCHES] =
                std::array::from_fn(|_| chunks.next().expect("the buffer has as many parts"));
            self.socket.receive(&mut slices, &mut metas)
        };
        let progress = match received {
            Ok(count) => {
                for (meta, batch) in metas.iter().zip(buffer.chunks_exact(RECEIVE_BATCH_BYTES)).take(count) {
                    self.take_batch(now, meta, &batch[..meta.len], touched);
                }
                if count == RECEIVE_BATCHES { Progress::More } else { Progress::Done }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Progress::Done,
            // About a datagram of ours that did not arrive, or the host is short of memory: the next call
            // finds out. The endpoint lives on, whose connections have time-outs.
            Err(error) => {
                tracing::debug!(%error, "receiving failed");
                Progress::Done
            }
        };
        self.receive_buffer = buffer;
        progress
    }

    fn take_batch(&mut self, now: Instant, meta: &RecvMeta, batch: &[u8], touched: &mut Vec<Id>) {
        let mut rest = self.received.copy(batch);
        let mut response = Vec::new();
        while !rest.is_empty() {
            let datagram = rest.split_to(meta.stride.clamp(1, rest.len()));
            let ecn = meta.ecn.map(to_proto);
            match self.endpoint.handle(now, meta.addr, meta.dst_ip, ecn, datagram, &mut response) {
                Some(DatagramEvent::ConnectionEvent(handle, event)) => self.hand_on(handle, event, touched),
                Some(DatagramEvent::NewConnection(incoming)) if self.closed.is_some() => {
                    self.refuse(incoming)
                }
                Some(DatagramEvent::NewConnection(incoming)) => {
                    self.incoming.push_back(incoming);
                    self.woken.append(&mut self.waiting);
                }
                Some(DatagramEvent::Response(transmit)) => self.respond(&transmit, &response),
                None => {}
            }
            response.clear();
        }
    }

    fn hand_on(&mut self, handle: ConnectionHandle, event: ConnectionEvent, touched: &mut Vec<Id>) {
        let Some(id) = self.by_handle.get(handle.0).copied().flatten() else { return };
        let entry = &mut self.entries[id];
        entry.proto.handle_event(event);
        if !std::mem::replace(&mut entry.touched, true) {
            touched.push(id);
        }
    }

    fn fire_timers(&mut self, now: Instant) {
        while let Some(&(deadline, id)) = self.timers.first() {
            if deadline > now {
                return;
            }
            self.entries[id].proto.handle_timeout(now);
            self.settle(id);
            if self.entries.contains(id) {
                self.queue(id);
                // Should a timer not move on, the next turn sees it again; this one goes on.
                if self.entries[id].deadline == Some(deadline) {
                    return;
                }
            }
        }
    }

    /// After anything happened to a connection: lets the endpoint and those who wait know, renews its timer,
    /// and forgets it when nobody knows it any more.
    pub(super) fn settle(&mut self, id: Id) {
        let entry = &mut self.entries[id];
        while let Some(event) = entry.proto.poll_endpoint_events() {
            let Some(handle) = entry.handle else { break };
            if event.is_drained() {
                entry.handle = None;
                self.by_handle[handle.0] = None;
                self.woken.append(&mut self.waiting);
            }
            if let Some(answer) = self.endpoint.handle_event(handle, event) {
                entry.proto.handle_event(answer);
            }
        }
        entry.take_events(&mut self.woken);
        let deadline = if entry.handle.is_some() { entry.proto.poll_timeout() } else { None };
        let old = std::mem::replace(&mut entry.deadline, deadline);
        let forgotten = entry.handle.is_none() && !entry.held;
        if old != deadline {
            if let Some(old) = old {
                self.timers.remove(&(old, id));
            }
            if let Some(deadline) = deadline {
                self.timers.insert((deadline, id));
            }
        }
        if forgotten {
            self.entries.remove(id);
            self.sending.retain(|queued| *queued != id);
        }
    }

    /// Sends what connections have, in turn, and as much as a turn may.
    pub(super) fn send(&mut self, now: Instant) -> Progress {
        self.send_batches(now, SEND_BATCHES)
    }

    /// Sends at most `limit` batches.
    pub(super) fn send_batches(&mut self, now: Instant, limit: usize) -> Progress {
        if let Some(transmit) = self.unsent.take()
            && self.hand_out(transmit) == Progress::Blocked
        {
            return Progress::Blocked;
        }
        for _ in 0..limit {
            let Some(&id) = self.sending.front() else { return Progress::Done };
            let entry = &mut self.entries[id];
            self.send_buffer.clear();
            let limit = self.socket.batch_limit(entry.proto.current_mtu().into());
            match entry.proto.poll_transmit(now, limit, &mut self.send_buffer) {
                Some(transmit) => {
                    self.sending.rotate_left(1);
                    if self.hand_out(transmit) == Progress::Blocked {
                        return Progress::Blocked;
                    }
                }
                None => {
                    entry.queued = false;
                    self.sending.pop_front();
                    self.settle(id);
                }
            }
        }
        if self.sending.is_empty() { Progress::Done } else { Progress::More }
    }

    /// Hands the batch in the send buffer to the socket, or keeps it.
    fn hand_out(&mut self, transmit: Transmit) -> Progress {
        match self.socket.send(&to_udp(&transmit, &self.send_buffer)) {
            Ok(()) => Progress::Done,
            Err(_) => {
                self.unsent = Some(transmit);
                Progress::Blocked
            }
        }
    }

    /// Sends an answer of the endpoint itself. One that the socket does not take is lost, as on the way.
    fn respond(&self, transmit: &Transmit, response: &[u8]) {
        let _ = self.socket.send(&to_udp(transmit, response));
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.incoming.drain(..).for_each(|incoming| self.endpoint.ignore(incoming));
    }
}

fn to_udp<'a>(transmit: &Transmit, contents: &'a [u8]) -> quinn_udp::Transmit<'a> {
    quinn_udp::Transmit {
        destination: transmit.destination,
        ecn: transmit.ecn.and_then(|ecn| quinn_udp::EcnCodepoint::from_bits(ecn as u8)),
        contents: &contents[..transmit.size],
        segment_size: transmit.segment_size,
        src_ip: transmit.src_ip,
    }
}

fn to_proto(ecn: quinn_udp::EcnCodepoint) -> quinn_proto::EcnCodepoint {
    match ecn {
        quinn_udp::EcnCodepoint::Ect0 => quinn_proto::EcnCodepoint::Ect0,
        quinn_udp::EcnCodepoint::Ect1 => quinn_proto::EcnCodepoint::Ect1,
        quinn_udp::EcnCodepoint::Ce => quinn_proto::EcnCodepoint::Ce,
    }
}
