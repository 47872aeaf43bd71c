//! What workers tell and send each other outside of a view's links: messages of the membership, results of steps and
//! copies of the state. Over TLS with the job's certificates, one connection for each direction between two workers,
//! opened when there is something to say. A connection that breaks takes with it what was on its way; whoever still
//! needs it asks again.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use paceline_transport::tls::{Connection, Endpoint, MessageReceiver, MessageSender};
use paceline_transport::{Error as TransportError, IoHandle};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

use super::book::Book;
use crate::membership::{Incarnation, MAX_SLOTS, PeerMessage, Slot, Transfer};

/// As many bytes of a transfer as fit into one message.
const CHUNK_BYTES: usize = 60 * 1024;

/// What may wait to be sent to one worker. A newcomer that does not keep up asks for the state again.
const QUEUE_LIMIT: usize = 8;

/// How long a worker has to answer when it is dialled, and to say who it is when it dials.
const DIAL_LIMIT: Duration = Duration::from_secs(5);

/// How long one message may take to go out. A frozen worker takes nothing.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// Bytes that belong to a transfer, whoever owns them.
pub(super) type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// What has come from another worker.
pub(super) enum Arrival {
    Says {
        from: Incarnation,
        message: PeerMessage,
    },
    /// Bytes of a transfer are coming in.
    Receiving(Transfer),
    Received {
        from: Incarnation,
        transfer: Transfer,
        present: Vec<Slot>,
        bytes: Vec<u8>,
    },
}

/// The most bytes that a transfer may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// A copy of the state has at most so many.
    pub(super) state: usize,
    /// The result of a step has exactly so many.
    pub(super) result: usize,
}

#[derive(Serialize, Deserialize)]
enum Frame {
    Hello {
        from: Incarnation,
        to: Incarnation,
    },
    Says(PeerMessage),
    /// A transfer begins; `present` are the slots that have contributed to a result.
    Begin {
        transfer: Transfer,
        present: Vec<Slot>,
        size: u64,
    },
    Chunk(Chunk),
    End {
        digest: [u8; 32],
    },
}

struct Chunk(Vec<u8>);

enum Parcel {
    Says(PeerMessage),
    Transfer { transfer: Transfer, present: Vec<Slot>, bytes: Bytes },
}

/// This worker's side.
pub(super) struct Exchange {
    io: IoHandle,
    endpoint: Endpoint,
    book: Arc<Book>,
    me: Arc<Mutex<Incarnation>>,
    outgoing: HashMap<Incarnation, Outgoing>,
    accept: tokio::task::JoinHandle<()>,
}

struct Outgoing {
    parcels: UnboundedSender<Parcel>,
    waiting: Arc<AtomicUsize>,
    /// Those of `waiting` that are copies of the state.
    states: Arc<AtomicUsize>,
    /// Ended with the connection: what is still queued for somebody who does not keep up is of no use to it.
    delivery: tokio::task::JoinHandle<()>,
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.delivery.abort();
    }
}

impl Exchange {
    /// Listens at `endpoint`, and calls `arrived` with what comes, on the I/O thread; it must not block.
    pub(super) fn new(
        io: IoHandle,
        endpoint: Endpoint,
        book: Arc<Book>,
        me: Incarnation,
        limits: Limits,
        arrived: impl Fn(Arrival) + Send + Sync + 'static,
    ) -> Self {
        let me = Arc::new(Mutex::new(me));
        let reception =
            Arc::new(Reception { book: book.clone(), me: me.clone(), limits, arrived: Box::new(arrived) });
        let accept = io.spawn(accept_all(endpoint.clone(), reception));
        Self { io, endpoint, book, me, outgoing: HashMap::new(), accept }
    }

    /// This worker has another incarnation from now on: what others send to the former one does not arrive.
    pub(super) fn become_incarnation(&mut self, me: Incarnation) {
        *self.me.lock().unwrap_or_else(PoisonError::into_inner) = me;
        self.outgoing.clear();
    }

    /// Gives up the connection to a worker that is no more.
    pub(super) fn forget(&mut self, other: Incarnation) {
        self.outgoing.remove(&other);
    }

    /// May be lost. Does not block.
    pub(super) fn say(&mut self, to: Incarnation, message: PeerMessage) {
        self.post(to, Parcel::Says(message));
    }

    /// May be lost. Does not block.
    pub(super) fn send(&mut self, to: Incarnation, transfer: Transfer, present: Vec<Slot>, bytes: Bytes) {
        self.post(to, Parcel::Transfer { transfer, present, bytes });
    }

    /// Whether a copy of the state is on its way to that worker, as far as is known here. Results are nearly always, and
    /// of no use to one that lacks what they follow.
    pub(super) fn is_sending_state(&self, to: Incarnation) -> bool {
        let outgoing = self.outgoing.get(&to).filter(|outgoing| !outgoing.parcels.is_closed());
        outgoing.is_some_and(|outgoing| outgoing.states.load(Ordering::Relaxed) > 0)
    }

    fn post(&mut self, to: Incarnation, parcel: Parcel) {
        self.outgoing.retain(|_, outgoing| !outgoing.parcels.is_closed());
        let outgoing = self.outgoing.entry(to).or_insert_with(|| {
            let (parcels, queue) = unbounded_channel();
            let (waiting, states) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
            let from = *self.me.lock().unwrap_or_else(PoisonError::into_inner);
            let (endpoint, book) = (self.endpoint.clone(), self.book.clone());
            let counts = (waiting.clone(), states.clone());
            let delivery = self.io.spawn(deliver_all(endpoint, book, (from, to), queue, counts));
            Outgoing { parcels, waiting, states, delivery }
        });
        if matches!(parcel, Parcel::Transfer { transfer: Transfer::State { .. }, .. }) {
            outgoing.states.fetch_add(1, Ordering::Relaxed);
        }
        if outgoing.waiting.fetch_add(1, Ordering::Relaxed) >= QUEUE_LIMIT {
            tracing::debug!(%to, "a worker takes nothing in");
            self.outgoing.remove(&to);
        } else {
            // Fails when the connection has just ended, and with it what was to be said.
            let _ = outgoing.parcels.send(parcel);
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

// ---- sending ----

async fn deliver_all(
    endpoint: Endpoint,
    book: Arc<Book>,
    (from, to): (Incarnation, Incarnation),
    queue: UnboundedReceiver<Parcel>,
    counts: (Arc<AtomicUsize>, Arc<AtomicUsize>),
) {
    if let Err(error) = deliver(&endpoint, &book, (from, to), queue, &counts).await {
        tracing::debug!(%to, %error, "cannot tell a worker");
    }
}

async fn deliver(
    endpoint: &Endpoint,
    book: &Book,
    (from, to): (Incarnation, Incarnation),
    mut queue: UnboundedReceiver<Parcel>,
    (waiting, states): &(Arc<AtomicUsize>, Arc<AtomicUsize>),
) -> Result<(), TransportError> {
    let contact = book
        .get(to)
        .ok_or_else(|| TransportError::Usage { reason: format!("nobody has said where {to} is reached") })?;
    let late = |_| timed_out("a worker to answer", DIAL_LIMIT);
    let connection =
        timeout(DIAL_LIMIT, endpoint.connect(contact.exchange, &contact.member)).await.map_err(late)??;
    let (mut sender, _receiver) = connection.open_messages().await?;
    post(&mut sender, &Frame::Hello { from, to }).await?;
    while let Some(parcel) = queue.recv().await {
        match parcel {
            Parcel::Says(message) => post(&mut sender, &Frame::Says(message)).await?,
            Parcel::Transfer { transfer, present, bytes } => {
                post_transfer(&mut sender, transfer, present, (*bytes).as_ref()).await?;
                if matches!(transfer, Transfer::State { .. }) {
                    states.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
        waiting.fetch_sub(1, Ordering::Relaxed);
    }
    Ok(())
}

async fn post(sender: &mut MessageSender, frame: &Frame) -> Result<(), TransportError> {
    timeout(SEND_LIMIT, sender.send(frame)).await.map_err(|_| timed_out("a worker to listen", SEND_LIMIT))?
}

async fn post_transfer(
    sender: &mut MessageSender,
    transfer: Transfer,
    present: Vec<Slot>,
    bytes: &[u8],
) -> Result<(), TransportError> {
    post(sender, &Frame::Begin { transfer, present, size: bytes.len() as u64 }).await?;
    let mut digest = Context::new(&SHA256);
    for chunk in bytes.chunks(CHUNK_BYTES) {
        digest.update(chunk);
        post(sender, &Frame::Chunk(Chunk(chunk.to_vec()))).await?;
    }
    post(sender, &Frame::End { digest: finish(digest) }).await
}

fn finish(digest: Context) -> [u8; 32] {
    digest.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn timed_out(what: &str, elapsed: Duration) -> TransportError {
    TransportError::TimedOut { what: what.to_owned(), elapsed }
}

// ---- receiving ----

struct Reception {
    book: Arc<Book>,
    me: Arc<Mutex<Incarnation>>,
    limits: Limits,
    arrived: Box<dyn Fn(Arrival) + Send + Sync>,
}

/// A transfer that is coming in.
struct Incoming {
    transfer: Transfer,
    present: Vec<Slot>,
    size: usize,
    bytes: Vec<u8>,
    digest: Context,
}

async fn accept_all(endpoint: Endpoint, reception: Arc<Reception>) {
    let mut served = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            connection = endpoint.accept() => match connection {
                Ok(connection) => {
                    let reception = reception.clone();
                    served.spawn(async move {
                        let remote: SocketAddr = connection.remote_address();
                        if let Err(error) = serve(&connection, &reception).await {
                            tracing::debug!(%remote, member = connection.member(), %error, "a worker's connection ended");
                        }
                    });
                }
                Err(_) => return,
            },
            Some(_) = served.join_next() => {}
        }
    }
}

async fn serve(connection: &Connection, reception: &Reception) -> Result<(), TransportError> {
    let (_sender, mut receiver) = connection.accept_messages().await?;
    let first = timeout(DIAL_LIMIT, receiver.recv::<Frame>()).await;
    let Some(Frame::Hello { from, to }) = first.map_err(|_| timed_out("a hello", DIAL_LIMIT))?? else {
        return Err(refused("the first message must be a hello"));
    };
    if reception.book.get(from).is_none_or(|contact| contact.member != connection.member()) {
        return Err(refused("the certificate is not that of this incarnation"));
    }
    reception.follow(&mut receiver, from, to).await
}

impl Reception {
    async fn follow(
        &self,
        receiver: &mut MessageReceiver,
        from: Incarnation,
        to: Incarnation,
    ) -> Result<(), TransportError> {
        let mut incoming: Option<Incoming> = None;
        while let Some(frame) = receiver.recv::<Frame>().await? {
            if *self.me.lock().unwrap_or_else(PoisonError::into_inner) != to {
                return Err(refused("that incarnation is over"));
            }
            match (frame, incoming.take()) {
                (Frame::Says(message), None) => (self.arrived)(Arrival::Says { from, message }),
                (Frame::Begin { transfer, present, size }, None) => {
                    incoming = Some(self.begin(transfer, present, size)?);
                    (self.arrived)(Arrival::Receiving(transfer));
                }
                (Frame::Chunk(Chunk(chunk)), Some(mut begun)) => {
                    if chunk.len() > begun.size - begun.bytes.len() {
                        return Err(refused("a transfer longer than announced"));
                    }
                    begun.digest.update(&chunk);
                    begun.bytes.extend_from_slice(&chunk);
                    (self.arrived)(Arrival::Receiving(begun.transfer));
                    incoming = Some(begun);
                }
                (Frame::End { digest }, Some(Incoming { transfer, present, size, bytes, digest: own })) => {
                    if bytes.len() != size || finish(own) != digest {
                        return Err(refused("a transfer that is not what was sent"));
                    }
                    (self.arrived)(Arrival::Received { from, transfer, present, bytes });
                }
                _ => return Err(refused("a message out of turn")),
            }
        }
        Ok(())
    }

    fn begin(&self, transfer: Transfer, present: Vec<Slot>, size: u64) -> Result<Incoming, TransportError> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let fits = match transfer {
            Transfer::State { .. } => size <= self.limits.state,
            Transfer::Result { .. } => size == self.limits.result,
        };
        if !fits || present.len() > MAX_SLOTS {
            return Err(refused("a transfer of another size than this program's"));
        }
        let (bytes, digest) = (Vec::with_capacity(size), Context::new(&SHA256));
        Ok(Incoming { transfer, present, size, bytes, digest })
    }
}

fn refused(reason: &str) -> TransportError {
    TransportError::Usage { reason: reason.to_owned() }
}

// serde's own encoding of bytes goes one by one.
impl Serialize for Chunk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Chunk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_byte_buf(ChunkVisitor)
    }
}

struct ChunkVisitor;

impl<'de> Visitor<'de> for ChunkVisitor {
    type Value = Chunk;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Chunk, E> {
        Ok(Chunk(bytes.to_vec()))
    }

    fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<Chunk, E> {
        Ok(Chunk(bytes))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Chunk, A::Error> {
        Err(A::Error::custom("bytes are not a sequence"))
    }
}

#[cfg(test)]
mod tests {
    use paceline_transport::wire;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_chunk_of_the_largest_size_fits_a_message() {
        let bytes = wire::encode(&Frame::Chunk(Chunk(vec![7; CHUNK_BYTES]))).expect("it fits");
        assert!(matches!(wire::decode(&bytes), Ok(Frame::Chunk(Chunk(chunk))) if chunk == [7; CHUNK_BYTES]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes: Vec<u8>) {
            let _ = wire::decode::<Frame>(&bytes);
        }
    }
}
