//! The links of a mesh as a [`Transport`].

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use quinn_proto::ConnectionError;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout_at;

use super::close::{CloseCode, in_words};
use super::connection::{Connection, MessageReceiver, MessageSender};
use super::driver::{Caller, ReadError, RecvStream, SendStream, WriteError};
use super::endpoint::Endpoint;
use super::io::IoHandle;
use super::mesh::{self, CloseOnDrop, Door, Gate, Mesh, RawLink, Roster};
use crate::forming::place;
use crate::{CONTROL_MESSAGE_LIMIT, Error, Forming, Transport};

/// Control messages that may wait on either side of a link.
///
/// When the receiving side is full the sender's fills up; a link with both full counts as broken.
const CONTROL_QUEUE_LIMIT: usize = 512;

/// How long a last message waits for a peer that counts as lost. One that lives takes it within a
/// millisecond; one that was killed never does, and the error of the operation waits for this long.
const GIVEN_UP_GRACE: Duration = Duration::from_millis(3);

/// One rank's QUIC links to all other ranks of one epoch.
///
/// Dropping it without [`leave`](Transport::leave) closes the links as aborted, and the peers see
/// [`Error::Lost`] at once; it never blocks. A process that is killed falls silent, and its peers see
/// `Lost` after 10 s at the latest.
#[derive(Debug)]
pub struct QuicTransport {
    roster: Roster,
    io: IoHandle,
    caller: Caller,
    /// By rank; `None` at this rank.
    links: Vec<Option<Link>>,
    /// Whether this side has left or aborted.
    over: bool,
    gate: Gate,
}

/// One peer's streams, as the caller's thread uses them.
#[derive(Debug)]
struct Link {
    // First, and therefore dropped first: see `RawLink`.
    connection: CloseOnDrop,
    peer: usize,
    data_out: SendStream,
    data_in: RecvStream,
    /// How receiving data ended, if it did: every later call answers the same.
    data_in_end: Option<Error>,
    control_out: mpsc::Sender<Control>,
    /// Whether the peer counts as lost: it may still be told why, but is hardly waited for.
    given_up: bool,
    /// Ends when the peer has everything up to our goodbye, or the link is gone.
    control_sender: Option<JoinHandle<()>>,
    shared: Arc<LinkState>,
}

/// What the control tasks of a link and the caller's thread share.
#[derive(Debug)]
struct LinkState {
    peer: usize,
    inbox: Mutex<VecDeque<Vec<u8>>>,
    /// Told when the inbox has room again.
    room: Notify,
    end: OnceLock<End>,
    ended: Notify,
    waker: Waker,
}

/// How a link ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Left,
    Lost(String),
}

/// Makes sure that a link whose task is dropped has an end.
#[derive(Debug)]
struct EndOnDrop(Arc<LinkState>);

/// What is said on a control lane after the handshake.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Control {
    /// A message of the layer above.
    Message(Vec<u8>),
    /// The sender leaves in order: no message follows, and data ends with the end of its stream.
    Goodbye,
    /// The sender gives up, and why, in the words of the layer above.
    Abort(Vec<u8>),
}

impl QuicTransport {
    /// Links up with all other ranks of an epoch: dials the lower ranks, is dialled by the higher ones,
    /// and tries again until `deadline`. Blocks; every rank must call it, in any order.
    ///
    /// The endpoint accepts for this transport until it and all that were [split](Transport::split) from it
    /// are dropped, and should have no other consumer.
    /// Peers of another epoch, strangers to the roster and second links are refused and logged.
    ///
    /// # Errors
    /// [`Error::TimedOut`] naming each missing rank with its address and what was seen of it;
    /// [`Error::Usage`] for a roster that does not fit this endpoint, or on the I/O thread itself.
    pub fn connect(endpoint: &Endpoint, roster: Roster, deadline: Instant) -> Result<Self, Error> {
        Self::connect_unless(endpoint, roster, deadline, std::future::pending())
    }

    /// [`connect`](QuicTransport::connect) that ends early when `give_up` completes, with its output as
    /// the reason: somebody has learnt that a rank will not come.
    ///
    /// # Errors
    /// [`Error::GaveUp`] with the reason, else as [`connect`](QuicTransport::connect).
    pub fn connect_unless(
        endpoint: &Endpoint,
        roster: Roster,
        deadline: Instant,
        give_up: impl Future<Output = String> + Send + 'static,
    ) -> Result<Self, Error> {
        roster.check(endpoint)?;
        let io = endpoint.io().clone();
        let epoch = roster.epoch;
        let forming = mesh::form(Door::open(endpoint, &roster), roster, mesh::WORLD, deadline);
        let formed = io.block_on(async move {
            tokio::select! {
                formed = forming => formed,
                reason = give_up => Err(Error::GaveUp { what: format!("links of epoch {epoch}"), reason }),
            }
        });
        Self::over(formed??, io)
    }

    /// The largest UDP payload, in bytes, that is known to get through to `peer` by now. It grows in the first
    /// moments of a link, up to what the path and the endpoint's [`Settings`](super::Settings) allow.
    ///
    /// # Panics
    /// If there is no link to such a rank.
    pub fn datagram_bytes(&self, peer: usize) -> usize {
        let link = self.links[peer].as_ref().expect("a rank has no link to itself");
        link.connection.get().driver().datagram_bytes()
    }

    fn over(mesh: Mesh, io: IoHandle) -> Result<Self, Error> {
        let Mesh { roster, links, gate } = mesh;
        let caller = Caller::new(gate.door().endpoint().driver(), roster.local_ranks())?;
        let waker = caller.waker();
        let to_link = |(peer, raw): (usize, Option<RawLink>)| Some(Link::new(peer, raw?, &io, waker));
        let links = links.into_iter().enumerate().map(to_link).collect();
        Ok(Self { roster, caller, links, over: false, gate, io })
    }

    fn link(&mut self, peer: usize) -> (&mut Link, Context<'_>) {
        let link = self.links[peer].as_mut().expect("a rank has no link to itself");
        (link, Context::from_waker(self.caller.waker()))
    }

    fn check_not_over(&self) -> Result<(), Error> {
        if self.over {
            return Err(Error::Usage { reason: "this rank has left the epoch".to_owned() });
        }
        Ok(())
    }

    /// Ends the control lanes with `last`; returns the peers that have all of it, or have themselves
    /// ended, by the deadline.
    fn say_last(&mut self, last: &Control, deadline: Instant) -> Result<Vec<usize>, Error> {
        let goodbyes: Vec<_> =
            self.links.iter_mut().flatten().map(|link| link.say_last(last.clone())).collect();
        // This thread waits for the I/O thread and cannot drive.
        self.caller.hand_over();
        self.io.block_on(collect_until(goodbyes, deadline))
    }
}

impl Transport for QuicTransport {
    fn name(&self) -> &'static str {
        "quic"
    }

    fn rank(&self) -> usize {
        self.roster.rank
    }

    fn world_size(&self) -> usize {
        self.links.len()
    }

    fn epoch(&self) -> u64 {
        self.roster.epoch
    }

    fn try_send(&mut self, to: usize, parts: &[IoSlice<'_>]) -> Result<usize, Error> {
        self.check_not_over()?;
        let (link, mut cx) = self.link(to);
        let sent = link.try_send(&mut cx, parts)?;
        if sent > 0 {
            self.caller.moved(sent);
        }
        Ok(sent)
    }

    fn try_recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Error> {
        let (link, mut cx) = self.link(from);
        let received = link.try_recv(&mut cx, into)?;
        if received > 0 {
            self.caller.moved(0);
        }
        Ok(received)
    }

    fn send_control(&mut self, to: usize, message: &[u8]) -> Result<(), Error> {
        if message.len() > CONTROL_MESSAGE_LIMIT {
            let reason = format!("a control message of {} bytes is over the limit", message.len());
            return Err(Error::Usage { reason });
        }
        self.check_not_over()?;
        self.link(to).0.send_control(message)
    }

    fn try_recv_control(&mut self, from: usize) -> Result<Option<Vec<u8>>, Error> {
        self.link(from).0.shared.take_message()
    }

    fn wait(&mut self, until: Instant) {
        self.caller.wait(until);
    }

    fn spin(&mut self) -> bool {
        self.caller.spin()
    }

    fn pause(&mut self) {
        self.caller.pause();
    }

    fn waker(&self) -> Waker {
        self.caller.waker().clone()
    }

    fn give_up(&mut self, peer: usize, _reason: &str) {
        if let Some(link) = &mut self.links[peer] {
            link.given_up = true;
        }
    }

    fn split(&mut self, members: &[usize], id: u64, deadline: Instant) -> Result<Forming, Error> {
        let rank = place(members, self.roster.rank, self.links.len())?;
        if id == mesh::WORLD {
            return Err(Error::Usage { reason: "this id is that of all ranks".to_owned() });
        }
        let members = members.iter().map(|&member| self.roster.members[member].clone()).collect();
        let roster = Roster { rank, members, ..self.roster.clone() };
        let (mut former, forming) = Forming::new();
        let (door, io, waker) = (self.gate.door().clone(), self.io.clone(), self.waker());
        self.io.spawn(async move {
            let formed = tokio::select! {
                formed = mesh::form(door, roster, id, deadline) => formed,
                () = former.given_up() => return,
            };
            let over = formed.and_then(|mesh| Self::over(mesh, io));
            former.finish(over.map(|transport| Box::new(transport) as Box<dyn Transport>));
            waker.wake();
        });
        Ok(forming)
    }

    fn abort(&mut self, message: &[u8], deadline: Instant) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        let kept = message.len().min(CONTROL_MESSAGE_LIMIT);
        // Fails when the I/O thread has stopped, and with it every link.
        let _ = self.say_last(&Control::Abort(message[..kept].to_vec()), deadline);
        for link in self.links.iter().flatten() {
            link.shared.cut(link.connection.get(), CloseCode::Aborted, "this rank aborted");
        }
    }

    fn leave(&mut self, deadline: Instant) -> Result<(), Error> {
        if std::mem::replace(&mut self.over, true) {
            return Ok(());
        }
        let started = Instant::now();
        let confirmed = self.say_last(&Control::Goodbye, deadline)?;
        let mut missing = Vec::new();
        for link in self.links.iter_mut().flatten() {
            match confirmed.contains(&link.peer) {
                true => link.connection.close_as(CloseCode::Left),
                false => missing.push(format!("rank {}", link.peer)),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let what = format!("{} to confirm what was sent before leaving", missing.join(", "));
        Err(Error::TimedOut { what, elapsed: started.elapsed() })
    }
}

/// The results of those that end before `deadline`; the others are dropped.
async fn collect_until<F>(futures: Vec<F>, deadline: Instant) -> Vec<usize>
where
    F: Future<Output = usize> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    futures.into_iter().for_each(|future| drop(tasks.spawn(future)));
    let mut results = Vec::new();
    while let Ok(Some(result)) = timeout_at(deadline.into(), tasks.join_next()).await {
        results.extend(result);
    }
    results
}

impl Link {
    fn new(peer: usize, raw: RawLink, io: &IoHandle, waker: &Waker) -> Self {
        let RawLink { connection, control: (sender, receiver), data: (data_out, data_in) } = raw;
        let shared = Arc::new(LinkState::new(peer, waker.clone()));
        let (control_out, queue) = mpsc::channel(CONTROL_QUEUE_LIMIT);
        let control_sender = Some(io.spawn(send_all(queue, sender)));
        io.spawn(receive_all(receiver, connection.get().clone(), shared.clone()));
        let data_in_end = None;
        let given_up = false;
        Self {
            connection,
            peer,
            data_out,
            data_in,
            data_in_end,
            control_out,
            given_up,
            control_sender,
            shared,
        }
    }

    fn try_send(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Result<usize, Error> {
        if let Some(end) = self.shared.end.get() {
            return Err(end.error(self.peer));
        }
        match self.data_out.poll_write_parts(cx, parts) {
            Poll::Ready(Ok(sent)) => Ok(sent),
            // The control lane's task will say how the link ended.
            Poll::Ready(Err(WriteError::ConnectionLost(_))) | Poll::Pending => Ok(0),
            Poll::Ready(Err(error)) => Err(self.cut(&format!("sending failed: {error}"))),
        }
    }

    fn try_recv(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Result<usize, Error> {
        if let Some(error) = &self.data_in_end {
            return Err(error.clone());
        }
        if into.is_empty() {
            return Ok(0);
        }
        let end = match self.data_in.poll_read(cx, into) {
            Poll::Ready(Ok(got)) if got > 0 => return Ok(got),
            Poll::Pending => return Ok(0),
            Poll::Ready(Ok(_)) => self.shared.end.get().cloned(),
            Poll::Ready(Err(ReadError::ConnectionLost(error))) => self.shared.end_of_data(&error),
            Poll::Ready(Err(error)) => return Err(self.cut(&format!("its data stream broke off: {error}"))),
        };
        // While the end is not known, the control lane is still being read; its task will wake us.
        let Some(end) = end else { return Ok(0) };
        Err(self.data_in_end.insert(end.error(self.peer)).clone())
    }

    fn send_control(&mut self, message: &[u8]) -> Result<(), Error> {
        if let Some(end) = self.shared.end.get() {
            return Err(end.error(self.peer));
        }
        match self.control_out.try_send(Control::Message(message.to_vec())) {
            // Closed: the connection has ended, and the next call will know how.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(self.cut(&format!("{CONTROL_QUEUE_LIMIT} control messages are unread")))
            }
        }
    }

    /// Says the last thing on the control lane; with a goodbye, ends the data too. The future ends, with
    /// the peer's rank, when the peer has everything or has itself ended.
    fn say_last(&mut self, last: Control) -> impl Future<Output = usize> + Send + 'static {
        let data_delivered = matches!(last, Control::Goodbye).then(|| {
            // Fails only when there is nobody left to tell.
            let _ = self.data_out.finish();
            self.data_out.stopped()
        });
        let (control_out, control_sender) = (self.control_out.clone(), self.control_sender.take());
        let (peer, shared) = (self.peer, self.shared.clone());
        let patience = if self.given_up { GIVEN_UP_GRACE } else { Duration::MAX };
        async move {
            let delivered = async {
                let _ = control_out.send(last).await;
                if let Some(data_delivered) = data_delivered {
                    let _ = data_delivered.await;
                }
                if let Some(control_sender) = control_sender {
                    let _ = control_sender.await;
                }
            };
            tokio::select! {
                () = delivered => {}
                () = shared.ended() => {}
                () = tokio::time::sleep(patience) => {}
            }
            peer
        }
    }

    /// Ends the link from this side.
    fn cut(&self, reason: &str) -> Error {
        self.shared.cut(self.connection.get(), CloseCode::Protocol, reason)
    }
}

impl LinkState {
    fn new(peer: usize, waker: Waker) -> Self {
        let (inbox, room, end, ended) = Default::default();
        Self { peer, inbox, room, end, ended, waker }
    }

    fn inbox(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        // A queue of whole messages stays one whatever happened to another holder.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_message(&self) -> Result<Option<Vec<u8>>, Error> {
        // Look at the end first: a message that came before it is then in the inbox already.
        let end = self.end.get();
        if let Some(message) = self.inbox().pop_front() {
            self.room.notify_one();
            return Ok(Some(message));
        }
        end.map_or(Ok(None), |end| Err(end.error(self.peer)))
    }

    /// Records how the link ended, unless that is known, and tells everybody who waits.
    fn end(&self, end: End) -> Error {
        let end = self.end.get_or_init(|| end);
        self.ended.notify_waiters();
        self.waker.wake_by_ref();
        end.error(self.peer)
    }

    /// How a data stream ended whose connection ended with `error`; `None` while that is not known.
    ///
    /// A goodbye alone does not make it `Left`: it overtakes the data, which may be cut off behind it.
    fn end_of_data(&self, error: &ConnectionError) -> Option<End> {
        match self.end.get()? {
            End::Left if !CloseCode::Left.is_in(error) => Some(End::Lost(in_words(error))),
            end => Some(end.clone()),
        }
    }

    fn cut(&self, connection: &Connection, code: CloseCode, reason: &str) -> Error {
        let error = self.end(End::Lost(reason.to_owned()));
        connection.close_with(code, reason);
        error
    }

    async fn ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.end.get().is_some() {
                return;
            }
            ended.await;
        }
    }

    /// Puts a message into the inbox when there is room.
    async fn deliver(&self, message: Vec<u8>) {
        loop {
            let room = self.room.notified();
            {
                let mut inbox = self.inbox();
                if inbox.len() < CONTROL_QUEUE_LIMIT {
                    inbox.push_back(message);
                    break;
                }
            }
            room.await;
        }
        self.waker.wake_by_ref();
    }
}

impl End {
    fn error(&self, peer: usize) -> Error {
        match self {
            End::Left => Error::Left { peer },
            End::Lost(reason) => Error::Lost { peer, reason: reason.clone() },
        }
    }
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end(End::Lost("the I/O thread has stopped".to_owned()));
    }
}

/// Sends control messages in order. After the last one, ends when the peer has all of them.
async fn send_all(mut queue: mpsc::Receiver<Control>, mut sender: MessageSender) {
    while let Some(message) = queue.recv().await {
        // An error means that the connection is gone, which `receive_all` reports.
        if sender.send(&message).await.is_err() {
            return;
        }
        if matches!(message, Control::Goodbye | Control::Abort(_)) {
            let _ = sender.finish().await;
            return;
        }
    }
}

/// Receives control messages until the peer leaves or the link is lost, and records which.
///
/// Nothing else decides how a link ends (this side cutting it off excepted). So a message is in the
/// inbox before any call reports the end, even when data and caller are faster than this task.
async fn receive_all(mut receiver: MessageReceiver, connection: Connection, shared: Arc<LinkState>) {
    let _unless_known = EndOnDrop(shared.clone());
    let wrong = |reason: &str| drop(shared.cut(&connection, CloseCode::Protocol, reason));
    loop {
        let message = match receiver.recv::<Control>().await {
            Ok(Some(message)) => message,
            Ok(None) => return wrong("its control lane ended without a goodbye"),
            Err(Error::Wire(error)) => return wrong(&format!("its control lane is broken: {error}")),
            // Any other error is about the connection, which has ended.
            Err(_) => return drop(shared.end(closed(&connection).await)),
        };
        match message {
            Control::Goodbye => return drop(shared.end(End::Left)),
            Control::Message(message) | Control::Abort(message) if message.len() > CONTROL_MESSAGE_LIMIT => {
                return wrong(&format!("it sent a control message of {} bytes", message.len()));
            }
            Control::Abort(message) => {
                // Whatever the inbox holds: it is the last one, and it says why the link is lost.
                shared.inbox().push_back(message);
                return drop(shared.cut(&connection, CloseCode::Aborted, "it gave up"));
            }
            Control::Message(message) => tokio::select! {
                // In this order: what came before the end of the connection is delivered.
                biased;
                () = shared.deliver(message) => {}
                // Nobody reads the inbox; the end must be seen all the same.
                end = closed(&connection) => return drop(shared.end(end)),
            },
        }
    }
}

async fn closed(connection: &Connection) -> End {
    match connection.driver().closed().await {
        error if CloseCode::Left.is_in(&error) => End::Left,
        error => End::Lost(in_words(&error)),
    }
}
