//! What workers tell and send each other outside of a view's links: messages of the membership, results of steps and
//! copies of the state. Over TLS with the job's certificates, one connection for each direction between two workers,
//! opened when there is something to say. A connection that breaks takes with it what was on its way; whoever still
//! needs it asks again. Messages do not wait for a transfer to end, and a transfer that is of no use any more ends early.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use paceline_transport::tls::{Connection, Endpoint, MessageReceiver, MessageSender};
use paceline_transport::{Error as TransportError, IoHandle};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use xxhash_rust::xxh3::Xxh3;

use super::book::Book;
use super::pipe::Contact;
use crate::membership::{Incarnation, MAX_SLOTS, PeerMessage, Slot, Stripe, Transfer};

/// A transfer goes in pieces, between which messages may go out: as many bytes as one call of the operating system takes.
const PIECE_BYTES: usize = 128 * 1024;

/// How many transfers may wait to be sent to one worker. A newcomer that does not keep up asks for the state again.
pub(super) const QUEUE_LIMIT: usize = 8;

/// How many messages may. A worker is told a few in a second.
const MESSAGES_LIMIT: usize = 256;

/// How long a worker has to answer when it is dialled, and to say who it is when it dials.
const DIAL_LIMIT: Duration = Duration::from_secs(5);

/// How long it may take until the launcher says whose an incarnation is that has come, and how often that is looked up.
const INTRODUCTION_LIMIT: Duration = Duration::from_secs(2);
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// How long one message may take to go out. A frozen worker takes nothing.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// What is sent: a part of a transfer, or all of it.
pub(super) type Part = (Transfer, Stripe);

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
        stripe: Stripe,
        present: Vec<Slot>,
        bytes: Vec<u8>,
    },
}

/// What is called on the I/O thread; it must not block.
pub(super) struct Hooks {
    /// With what comes.
    pub(super) arrived: Box<dyn Fn(Arrival) + Send + Sync>,
    /// Before another piece of a transfer goes out, also before its announcement.
    pub(super) gave: Box<dyn Fn(Stripe) + Send + Sync>,
}

/// The most bytes that a transfer may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The tensors of a state have exactly so many together, and what stands before them in each copy has at most so many.
    pub(super) tensors: usize,
    pub(super) header: usize,
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
    /// A transfer begins, in place of one that has not ended; `present` are the slots that have contributed to a result.
    Begin {
        transfer: Transfer,
        stripe: Stripe,
        present: Vec<Slot>,
        size: u64,
    },
    /// So many bytes of it come next, as they are.
    Piece {
        size: u32,
    },
    End {
        digest: u128,
    },
}

struct Parcel {
    transfer: Transfer,
    stripe: Stripe,
    present: Vec<Slot>,
    bytes: Bytes,
    cancelled: AtomicBool,
}

impl Parcel {
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// What is to go out on a connection.
struct Queue {
    messages: mpsc::Receiver<PeerMessage>,
    parcels: mpsc::UnboundedReceiver<Arc<Parcel>>,
    hooks: Arc<Hooks>,
}

/// This worker's side.
pub(super) struct Exchange {
    io: IoHandle,
    endpoint: Endpoint,
    book: Arc<Book>,
    me: Arc<Mutex<Incarnation>>,
    hooks: Arc<Hooks>,
    outgoing: HashMap<Incarnation, Outgoing>,
    accept: tokio::task::JoinHandle<()>,
}

struct Outgoing {
    messages: mpsc::Sender<PeerMessage>,
    parcels: mpsc::UnboundedSender<Arc<Parcel>>,
    /// What has not gone out yet.
    waiting: Vec<Weak<Parcel>>,
    /// Ended with the connection: what is still queued for somebody who does not keep up is of no use to it.
    delivery: tokio::task::JoinHandle<()>,
}

impl Outgoing {
    /// The transfers that are on their way.
    fn under_way(&self) -> impl Iterator<Item = Arc<Parcel>> + '_ {
        self.waiting.iter().filter_map(Weak::upgrade).filter(|parcel| !parcel.is_cancelled())
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.delivery.abort();
    }
}

impl Exchange {
    /// Listens at `endpoint`.
    pub(super) fn new(
        io: IoHandle,
        endpoint: Endpoint,
        book: Arc<Book>,
        me: Incarnation,
        limits: Limits,
        hooks: Hooks,
    ) -> Self {
        let (me, hooks) = (Arc::new(Mutex::new(me)), Arc::new(hooks));
        let reception =
            Arc::new(Reception { book: book.clone(), me: me.clone(), limits, hooks: hooks.clone() });
        let accept = io.spawn(accept_all(endpoint.clone(), reception));
        Self { io, endpoint, book, me, hooks, outgoing: HashMap::new(), accept }
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
        if self.connection(to).messages.try_send(message).is_err() {
            self.give_up(to);
        }
    }

    /// May be lost. Does not block.
    pub(super) fn send(
        &mut self,
        to: Incarnation,
        (transfer, stripe): Part,
        present: Vec<Slot>,
        bytes: Bytes,
    ) {
        let parcel = Arc::new(Parcel { transfer, stripe, present, bytes, cancelled: AtomicBool::new(false) });
        let outgoing = self.connection(to);
        outgoing.waiting.retain(|waiting| waiting.strong_count() > 0);
        outgoing.waiting.push(Arc::downgrade(&parcel));
        if outgoing.waiting.len() > QUEUE_LIMIT || outgoing.parcels.send(parcel).is_err() {
            self.give_up(to);
        }
    }

    /// The state of which that part, or all, is on its way to that worker, as far as is known here. Results are nearly always,
    /// and of no use to one that lacks what they follow.
    pub(super) fn state_under_way(&self, to: Incarnation, stripe: Stripe) -> Option<Transfer> {
        let outgoing = self.outgoing.get(&to).filter(|outgoing| !outgoing.parcels.is_closed())?;
        let states = outgoing.under_way().filter(|parcel| {
            matches!(parcel.transfer, Transfer::State { .. })
                && [stripe, Stripe::WHOLE].contains(&parcel.stripe)
        });
        states.map(|parcel| parcel.transfer).last()
    }

    /// Whether anything is on its way to anybody.
    pub(super) fn is_sending(&self) -> bool {
        let open = self.outgoing.values().filter(|outgoing| !outgoing.parcels.is_closed());
        open.flat_map(Outgoing::under_way).next().is_some()
    }

    /// Ends the transfers for which this is so, begun or not.
    pub(super) fn cancel(&self, is_useless: impl Fn(Incarnation, Transfer) -> bool) {
        for (&to, outgoing) in &self.outgoing {
            let useless = outgoing.under_way().filter(|parcel| is_useless(to, parcel.transfer));
            useless.for_each(|parcel| parcel.cancelled.store(true, Ordering::Relaxed));
        }
    }

    fn connection(&mut self, to: Incarnation) -> &mut Outgoing {
        self.outgoing.retain(|_, outgoing| !outgoing.parcels.is_closed());
        self.outgoing.entry(to).or_insert_with(|| {
            let (messages, said) = mpsc::channel(MESSAGES_LIMIT);
            let (parcels, sent) = mpsc::unbounded_channel();
            let from = *self.me.lock().unwrap_or_else(PoisonError::into_inner);
            let (endpoint, book) = (self.endpoint.clone(), self.book.clone());
            let queue = Queue { messages: said, parcels: sent, hooks: self.hooks.clone() };
            let delivery = self.io.spawn(deliver_all(endpoint, book, (from, to), queue));
            Outgoing { messages, parcels, waiting: Vec::new(), delivery }
        })
    }

    /// The worker takes nothing in, or the connection to it has just ended, and with it what was to be said.
    fn give_up(&mut self, to: Incarnation) {
        tracing::debug!(%to, "a worker takes nothing in");
        self.outgoing.remove(&to);
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
    queue: Queue,
) {
    if let Err(error) = deliver(&endpoint, &book, (from, to), queue).await {
        tracing::debug!(%to, %error, "cannot tell a worker");
    }
}

async fn deliver(
    endpoint: &Endpoint,
    book: &Book,
    (from, to): (Incarnation, Incarnation),
    mut queue: Queue,
) -> Result<(), TransportError> {
    let contact = book
        .get(to)
        .ok_or_else(|| TransportError::Usage { reason: format!("nobody has said where {to} is reached") })?;
    let late = |_| timed_out("a worker to answer", DIAL_LIMIT);
    let connection =
        timeout(DIAL_LIMIT, endpoint.connect(contact.exchange, &contact.member)).await.map_err(late)??;
    let (mut sender, _receiver) = connection.open_messages().await?;
    post(&mut sender, &Frame::Hello { from, to }).await?;
    loop {
        tokio::select! {
            biased;
            Some(message) = queue.messages.recv() => post(&mut sender, &Frame::Says(message)).await?,
            Some(parcel) = queue.parcels.recv() => {
                post_transfer(&mut sender, &parcel, &mut queue).await?;
            }
            else => return Ok(()),
        }
    }
}

async fn post(sender: &mut MessageSender, frame: &Frame) -> Result<(), TransportError> {
    post_with(sender, frame, &[]).await
}

async fn post_with(sender: &mut MessageSender, frame: &Frame, bytes: &[u8]) -> Result<(), TransportError> {
    let sent = timeout(SEND_LIMIT, sender.send_with_bytes(frame, bytes)).await;
    sent.map_err(|_| timed_out("a worker to listen", SEND_LIMIT))?
}

async fn post_transfer(
    sender: &mut MessageSender,
    parcel: &Parcel,
    queue: &mut Queue,
) -> Result<(), TransportError> {
    if parcel.is_cancelled() {
        return Ok(());
    }
    let bytes = (*parcel.bytes).as_ref();
    let (transfer, stripe, present) = (parcel.transfer, parcel.stripe, parcel.present.clone());
    (queue.hooks.gave)(stripe);
    post(sender, &Frame::Begin { transfer, stripe, present, size: bytes.len() as u64 }).await?;
    let mut digest = Xxh3::new();
    for piece in bytes.chunks(PIECE_BYTES) {
        while let Ok(message) = queue.messages.try_recv() {
            post(sender, &Frame::Says(message)).await?;
        }
        if parcel.is_cancelled() {
            return Ok(());
        }
        digest.update(piece);
        (queue.hooks.gave)(stripe);
        post_with(sender, &Frame::Piece { size: piece.len() as u32 }, piece).await?;
    }
    post(sender, &Frame::End { digest: digest.digest128() }).await
}

fn timed_out(what: &str, elapsed: Duration) -> TransportError {
    TransportError::TimedOut { what: what.to_owned(), ranks: Vec::new(), elapsed }
}

// ---- receiving ----

struct Reception {
    book: Arc<Book>,
    me: Arc<Mutex<Incarnation>>,
    limits: Limits,
    hooks: Arc<Hooks>,
}

/// A transfer that is coming in.
struct Incoming {
    transfer: Transfer,
    stripe: Stripe,
    present: Vec<Slot>,
    bytes: Vec<u8>,
    /// How many of them have come, and the digest of those.
    filled: usize,
    digest: Xxh3,
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
    if reception.contact(from).await.is_none_or(|contact| contact.member != connection.member()) {
        return Err(refused("the certificate is not that of this incarnation"));
    }
    reception.follow(&mut receiver, from, to).await
}

impl Reception {
    /// Whose that incarnation is. Its launcher says so to this worker's, which may take longer than it takes to come here.
    async fn contact(&self, from: Incarnation) -> Option<Contact> {
        let look = async {
            loop {
                match self.book.get(from) {
                    Some(contact) => return contact,
                    None => sleep(LOOK_INTERVAL).await,
                }
            }
        };
        timeout(INTRODUCTION_LIMIT, look).await.ok()
    }

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
                (Frame::Says(message), begun) => {
                    (self.hooks.arrived)(Arrival::Says { from, message });
                    incoming = begun;
                }
                (Frame::Begin { transfer, stripe, present, size }, _) => {
                    incoming = Some(self.begin((transfer, stripe), present, size)?);
                    (self.hooks.arrived)(Arrival::Receiving(transfer));
                }
                (Frame::Piece { size }, Some(mut begun)) => {
                    let rest = &mut begun.bytes[begun.filled..];
                    let piece = usize::try_from(size).ok().and_then(|size| rest.get_mut(..size));
                    let piece = piece.ok_or_else(|| refused("a transfer longer than announced"))?;
                    receiver.recv_bytes(piece).await?;
                    begun.digest.update(piece);
                    begun.filled += piece.len();
                    (self.hooks.arrived)(Arrival::Receiving(begun.transfer));
                    incoming = Some(begun);
                }
                (Frame::End { digest }, Some(begun)) => {
                    let Incoming { transfer, stripe, present, bytes, filled, digest: own } = begun;
                    if filled != bytes.len() || own.digest128() != digest {
                        return Err(refused("a transfer that is not what was sent"));
                    }
                    (self.hooks.arrived)(Arrival::Received { from, transfer, stripe, present, bytes });
                }
                _ => return Err(refused("a message out of turn")),
            }
        }
        Ok(())
    }

    fn begin(
        &self,
        (transfer, stripe): Part,
        present: Vec<Slot>,
        size: u64,
    ) -> Result<Incoming, TransportError> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let fits = match transfer {
            Transfer::State { .. } if !stripe.is_valid() => false,
            Transfer::State { .. } => size <= self.limits.header + stripe.range(self.limits.tensors).len(),
            Transfer::Result { .. } => size == self.limits.result && stripe == Stripe::WHOLE,
        };
        if !fits || present.len() > MAX_SLOTS {
            return Err(refused("a transfer of another size than this program's"));
        }
        // Of zeros, which need no memory before they are written over.
        Ok(Incoming { transfer, stripe, present, bytes: vec![0; size], filled: 0, digest: Xxh3::new() })
    }
}

fn refused(reason: &str) -> TransportError {
    TransportError::Usage { reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use paceline_transport::identity::JobAuthority;
    use paceline_transport::{IoThread, wire};
    use proptest::prelude::*;

    use super::*;
    use crate::membership::{Progress, Step};

    /// More than sockets and channels hold.
    const LARGE: usize = 32 << 20;
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Two workers, of which the second stops taking anything in at the first bytes of a transfer until it may go on.
    struct Pair {
        one: Exchange,
        arrived: Receiver<Arrival>,
        go_on: Sender<()>,
        _other: Exchange,
        io: [IoThread; 2],
    }

    const ONE: Incarnation = Incarnation(1);
    const OTHER: Incarnation = Incarnation(2);

    fn pair() -> Pair {
        let authority = JobAuthority::new("job").expect("a name");
        let book = Arc::new(Book::default());
        let io = [ONE, OTHER].map(|_| IoThread::start().expect("a thread"));
        let endpoint = |io: &IoThread, incarnation: Incarnation| {
            let member = format!("worker-{}", incarnation.0);
            let identity = authority.issue(&member, Duration::from_secs(3600)).expect("an identity");
            let endpoint = Endpoint::bind(&io.handle(), (Ipv4Addr::LOCALHOST, 0).into(), &identity);
            let endpoint = endpoint.expect("a port");
            let addr = endpoint.local_addr();
            book.insert(Contact { incarnation, member, links: addr, exchange: addr });
            endpoint
        };
        let endpoints = [endpoint(&io[0], ONE), endpoint(&io[1], OTHER)];
        let limits = Limits { tensors: LARGE, header: 0, result: LARGE };
        let (news, arrived) = channel();
        let (go_on, waits) = channel();
        let (news, waits) = (Mutex::new(news), Mutex::new(Some(waits)));
        let arrive = move |arrival| {
            let stops = matches!(arrival, Arrival::Receiving(_));
            let _ = news.lock().expect("nobody panics").send(arrival);
            let gate: Option<Receiver<()>> =
                if stops { waits.lock().expect("nobody panics").take() } else { None };
            let _ = gate.map(|gate| gate.recv_timeout(PATIENCE));
        };
        let [here, there] = endpoints;
        let hooks = |arrived| Hooks { arrived, gave: Box::new(|_| {}) };
        let one = Exchange::new(io[0].handle(), here, book.clone(), ONE, limits, hooks(Box::new(|_| {})));
        let other = Exchange::new(io[1].handle(), there, book, OTHER, limits, hooks(Box::new(arrive)));
        Pair { one, arrived, go_on, _other: other, io }
    }

    fn state(steps: u64) -> Transfer {
        Transfer::State { state: Progress { applied: Step(steps), lineage: steps } }
    }

    impl Pair {
        /// Begins a long transfer.
        fn begin(&mut self) {
            self.one.send(OTHER, (state(1), Stripe::WHOLE), Vec::new(), Arc::new(vec![1; LARGE]));
            assert!(matches!(self.arrived.recv_timeout(PATIENCE), Ok(Arrival::Receiving(_))));
        }

        /// What comes next, but for the news that bytes do.
        fn next(&self) -> Arrival {
            loop {
                match self.arrived.recv_timeout(PATIENCE).expect("something comes") {
                    Arrival::Receiving(_) => {}
                    arrival => return arrival,
                }
            }
        }
    }

    #[test]
    fn a_message_does_not_wait_for_the_end_of_a_transfer() {
        let mut pair = pair();
        pair.begin();
        pair.one.say(OTHER, PeerMessage::Soon);
        pair.go_on.send(()).expect("it waits");
        assert!(matches!(pair.next(), Arrival::Says { message: PeerMessage::Soon, .. }));
        let next = pair.next();
        assert!(
            matches!(next, Arrival::Received { transfer, bytes, .. } if transfer == state(1) && bytes == vec![1; LARGE])
        );
    }

    #[test]
    fn a_transfer_that_is_of_no_use_any_more_ends_for_the_next_one() {
        let mut pair = pair();
        pair.begin();
        pair.one.cancel(|to, transfer| to == OTHER && transfer == state(1));
        assert_eq!(pair.one.state_under_way(OTHER, Stripe::WHOLE), None);
        pair.one.send(OTHER, (state(2), Stripe::WHOLE), Vec::new(), Arc::new(vec![2; 3]));
        assert_eq!(pair.one.state_under_way(OTHER, Stripe::WHOLE), Some(state(2)));
        pair.go_on.send(()).expect("it waits");
        let next = pair.next();
        assert!(
            matches!(next, Arrival::Received { transfer, bytes, .. } if transfer == state(2) && bytes == [2; 3])
        );
    }

    /// A sender that says something else than it ought to.
    async fn liar(
        endpoint: Endpoint,
        book: Arc<Book>,
        frames: Vec<(Frame, Vec<u8>)>,
    ) -> Result<(), TransportError> {
        let contact = book.get(OTHER).expect("it is known");
        let connection = endpoint.connect(contact.exchange, &contact.member).await?;
        let (mut sender, mut receiver) = connection.open_messages().await?;
        post(&mut sender, &Frame::Hello { from: ONE, to: OTHER }).await?;
        for (frame, bytes) in frames {
            post_with(&mut sender, &frame, &bytes).await?;
        }
        // The other one says nothing here: this ends when it ends the connection.
        timeout(PATIENCE, receiver.recv::<Frame>())
            .await
            .map_err(|_| timed_out("the end", PATIENCE))?
            .map(drop)
    }

    #[test]
    fn a_transfer_that_is_not_what_was_sent_ends_the_connection_and_nothing_of_it_arrives() {
        let begin =
            |size| Frame::Begin { transfer: state(1), stripe: Stripe::WHOLE, present: Vec::new(), size };
        let (bytes, digest) = (vec![7; 100], xxhash_rust::xxh3::xxh3_128(&[7; 100]));
        let mut flipped = bytes.clone();
        flipped[99] ^= 1;
        let piece = || Frame::Piece { size: 100 };
        let odd = Frame::Begin {
            transfer: state(1),
            stripe: Stripe { index: 3, of: 3 },
            present: Vec::new(),
            size: 100,
        };
        for (what, frames) in [
            (
                "a flipped bit",
                vec![(begin(100), vec![]), (piece(), flipped), (Frame::End { digest }, vec![])],
            ),
            (
                "a byte less than announced",
                vec![(begin(101), vec![]), (piece(), bytes.clone()), (Frame::End { digest }, vec![])],
            ),
            ("more than announced", vec![(begin(99), vec![]), (piece(), bytes.clone())]),
            ("more than a state has", vec![(begin(LARGE as u64 + 1), vec![])]),
            ("a part that there is not", vec![(odd, vec![])]),
            ("no beginning", vec![(piece(), bytes)]),
        ] {
            let mut pair = pair();
            pair.go_on.send(()).expect("nobody waits yet");
            let (endpoint, book) = (pair.one.endpoint.clone(), pair.one.book.clone());
            let lies = pair.io[0].handle().spawn(liar(endpoint, book, frames));
            let deadline = std::time::Instant::now() + PATIENCE;
            while !lies.is_finished() {
                assert!(std::time::Instant::now() < deadline, "{what}: the connection goes on");
                std::thread::sleep(LOOK_INTERVAL);
            }
            pair.one.say(OTHER, PeerMessage::Soon);
            assert!(matches!(pair.next(), Arrival::Says { .. }), "{what}: it has arrived");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes: Vec<u8>) {
            let _ = wire::decode::<Frame>(&bytes);
        }
    }
}
