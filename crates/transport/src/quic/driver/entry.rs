//! One connection of an endpoint: what happened to it, and who waits for that.

use std::collections::HashMap;
use std::task::Waker;
use std::time::Instant;

use quinn_proto::{ConnectionError, ConnectionHandle, Event, StreamEvent, StreamId};

/// A connection, as long as the endpoint or a handle knows it.
pub(super) struct Entry {
    pub(super) proto: quinn_proto::Connection,
    /// Its name in quinn-proto's endpoint, until it is drained.
    pub(super) handle: Option<ConnectionHandle>,
    /// Whether connections, streams or futures of it exist.
    pub(super) held: bool,
    pub(super) connected: bool,
    /// How it ended, once it has.
    pub(super) error: Option<ConnectionError>,
    /// Whether a stream has taken less than it was given, so that the next piece is copied only as far as it is
    /// taken: what a peer lets pass byte by byte must not hold a buffer for each.
    pub(super) tight: bool,
    /// Whether it is in the queue of those that may have something to send.
    pub(super) queued: bool,
    /// Whether it is in the list of those that got a packet in this turn.
    pub(super) touched: bool,
    /// When it must be looked at, as the endpoint's timers have it.
    pub(super) deadline: Option<Instant>,
    waiting: Waiting,
}

/// Who waits for what. Streams have one reader and one writer each.
#[derive(Default)]
struct Waiting {
    readers: HashMap<StreamId, Waker>,
    writers: HashMap<StreamId, Waker>,
    /// For anything rare: connected, closed, a stream opened, finished or stopped. All look again.
    others: Vec<Waker>,
}

impl Entry {
    pub(super) fn new(proto: quinn_proto::Connection, handle: ConnectionHandle) -> Self {
        Self {
            proto,
            handle: Some(handle),
            held: true,
            connected: false,
            error: None,
            tight: false,
            queued: false,
            touched: false,
            deadline: None,
            waiting: Waiting::default(),
        }
    }

    /// Wakes `waker` when there is something to read on a stream, or nothing will come any more.
    pub(super) fn await_readable(&mut self, stream: StreamId, waker: &Waker) {
        keep(&mut self.waiting.readers, stream, waker);
    }

    /// Wakes `waker` when a stream takes bytes again, or never will.
    pub(super) fn await_writable(&mut self, stream: StreamId, waker: &Waker) {
        keep(&mut self.waiting.writers, stream, waker);
    }

    /// Whether somebody waits for a stream to take bytes again.
    pub(super) fn awaits_writable(&self, stream: StreamId) -> bool {
        self.waiting.writers.contains_key(&stream)
    }

    /// Wakes `waker` when anything but that has happened.
    pub(super) fn await_change(&mut self, waker: &Waker) {
        if !self.waiting.others.iter().any(|known| known.will_wake(waker)) {
            self.waiting.others.push(waker.clone());
        }
    }

    pub(super) fn forget_reader(&mut self, stream: StreamId) -> Option<Waker> {
        self.waiting.readers.remove(&stream)
    }

    pub(super) fn forget_writer(&mut self, stream: StreamId) -> Option<Waker> {
        self.waiting.writers.remove(&stream)
    }

    /// Notes what has happened, and moves those who wait for it to `woken`.
    pub(super) fn take_events(&mut self, woken: &mut Vec<Waker>) {
        while let Some(event) = self.proto.poll() {
            match event {
                Event::Connected => {
                    self.connected = true;
                    woken.append(&mut self.waiting.others);
                }
                Event::ConnectionLost { reason } => self.end(reason, woken),
                Event::Stream(StreamEvent::Readable { id }) => {
                    woken.extend(self.waiting.readers.remove(&id));
                }
                Event::Stream(StreamEvent::Writable { id }) => {
                    woken.extend(self.waiting.writers.remove(&id));
                }
                Event::Stream(StreamEvent::Stopped { id, .. }) => {
                    woken.extend(self.waiting.writers.remove(&id));
                    woken.append(&mut self.waiting.others);
                }
                Event::Stream(
                    StreamEvent::Opened { .. } | StreamEvent::Available { .. } | StreamEvent::Finished { .. },
                ) => woken.append(&mut self.waiting.others),
                // We use no datagrams, and read the handshake's data when it is complete.
                Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => {}
            }
        }
    }

    /// Records how the connection ended, unless that is known, and wakes everybody.
    pub(super) fn end(&mut self, error: ConnectionError, woken: &mut Vec<Waker>) {
        self.error.get_or_insert(error);
        let Waiting { readers, writers, others } = &mut self.waiting;
        woken.extend(readers.drain().map(|(_, waker)| waker));
        woken.extend(writers.drain().map(|(_, waker)| waker));
        woken.append(others);
    }
}

fn keep(wakers: &mut HashMap<StreamId, Waker>, stream: StreamId, waker: &Waker) {
    wakers
        .entry(stream)
        .and_modify(|kept| {
            if !kept.will_wake(waker) {
                *kept = waker.clone();
            }
        })
        .or_insert_with(|| waker.clone());
}
