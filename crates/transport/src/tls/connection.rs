//! An authenticated connection to a member, and the lane of messages on it.
//!
//! Before each message stands its length. Some values are no lengths but what QUIC has by itself and TCP has
//! not: a sign of life, a close with a code and a reason, and that all data has arrived.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::channel::Protection;
use super::data::DataStream;
use super::endpoint::{KEEP_ALIVE, SILENCE_LIMIT};
use super::mend::Line;
use super::session::{Fault, Progress, Received, Session, SessionId, Socket, no_answer};
use crate::Error;
use crate::close::{CloseCode, quote};
use crate::control_lane::{End, LinkConnection, MessageIn, MessageOut};
use crate::wire::{self, WireError};

/// Size of what stands before each message: a u32, little-endian.
const PREFIX_BYTES: usize = 4;

/// Instead of a length: nothing, but the sender lives.
const ALIVE: u32 = 0x8000_0000;

/// Instead of a length: the sender closes the connection. A code of one byte follows, and a reason whose
/// length is the low byte of the prefix.
const CLOSE: u32 = 0x8000_0100;

/// Instead of a length: the sender has all data up to the other side's goodbye.
const HAS_ALL: u32 = 0x8000_0200;

/// How long to wait for the end of a message, before something else can be said.
const BETWEEN_MESSAGES: Duration = Duration::from_millis(1);

/// The longest reason of a close.
const REASON_LIMIT: usize = 255;

/// How long after the end of its data connection the control lane of a link may still say why.
const REASON_GRACE: Duration = Duration::from_millis(100);

/// A connection to a member of the job whose certificate was verified, and which has said hello.
///
/// Cheap to clone. When the last clone and the last half of its lane are dropped, the connection is closed.
#[derive(Clone)]
pub struct Connection {
    stream: Arc<Stream>,
    member: Arc<str>,
    lane_taken: Arc<AtomicBool>,
}

/// A connection whose ends are shared.
pub(super) struct Stream {
    remote: SocketAddr,
    state: Mutex<State>,
    /// How the connection ended, as far as is known.
    end: OnceLock<(Option<CloseCode>, String)>,
    /// What broke the data connection of the same link.
    data_fault: OnceLock<String>,
    /// Whether the other side has all data up to our goodbye.
    peer_has_all: AtomicBool,
    /// Told of all three, and of another socket.
    news: Notify,
}

struct State {
    session: Session,
    tcp: Arc<TcpStream>,
    /// Whether a message has been sent in part: nothing else may be said before its end.
    within_message: bool,
    closed: bool,
}

/// The sending half of a lane of typed messages.
pub struct MessageSender {
    stream: Arc<Stream>,
    limit: usize,
    /// What is left of a message whose `send` was cancelled.
    unsent: Vec<u8>,
    /// Whether bytes of the caller's are on their way, of which there is no copy here.
    lends: bool,
}

/// The receiving half of a lane of typed messages.
pub struct MessageReceiver {
    stream: Arc<Stream>,
    limit: usize,
    /// How long the other side may say nothing at all, if that is limited.
    silence: Option<Duration>,
    /// The message being read, with its length, and how much of it has arrived.
    buffer: Vec<u8>,
    filled: usize,
}

impl Stream {
    pub(super) fn new(tcp: TcpStream, remote: SocketAddr, session: Session) -> Arc<Self> {
        let state = Mutex::new(State { session, tcp: Arc::new(tcp), within_message: false, closed: false });
        let (end, data_fault, peer_has_all, news) = Default::default();
        Arc::new(Self { remote, state, end, data_fault, peer_has_all, news })
    }

    /// Both halves of the lane. There must not be others.
    pub(super) fn lane(self: &Arc<Self>, limit: usize) -> (MessageSender, MessageReceiver) {
        let sender = MessageSender { stream: self.clone(), limit, unsent: Vec::new(), lends: false };
        let receiver =
            MessageReceiver { stream: self.clone(), limit, silence: None, buffer: Vec::new(), filled: 0 };
        (sender, receiver)
    }

    /// The connection as the data connection of a link.
    ///
    /// # Errors
    /// The operating system's, or that the lane is still in use.
    pub(super) fn into_data(self: Arc<Self>, protection: Protection) -> Result<DataStream, Error> {
        let remote = self.remote;
        let parts = self.into_parts().and_then(|(tcp, session)| DataStream::new(tcp, session, protection));
        parts.map_err(|error| gone(remote, &error.to_string()))
    }

    /// The socket alone, for what is not of this session.
    pub(super) fn into_tcp(self: Arc<Self>) -> io::Result<TcpStream> {
        Ok(self.into_parts()?.0)
    }

    fn into_parts(self: Arc<Self>) -> io::Result<(TcpStream, Session)> {
        let in_use = || io::Error::other("the lane of its connection is in use");
        let stream = Arc::into_inner(self).ok_or_else(in_use)?;
        let State { tcp, session, .. } = stream.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok((Arc::into_inner(tcp).ok_or_else(in_use)?, session))
    }

    pub(super) fn gone(&self, reason: &str) -> Error {
        gone(self.remote, reason)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A session that a panic has left half written fails as a connection, not as memory.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records how the connection ended, unless that is known, and tells everybody who waits.
    fn end(&self, code: Option<CloseCode>, reason: String) {
        self.end.get_or_init(|| (code, reason));
        self.news.notify_waiters();
    }

    /// Why nothing can be sent or received any more, when that is so.
    fn check(&self) -> Result<(), Error> {
        self.end.get().map_or(Ok(()), |(_, reason)| Err(self.gone(reason)))
    }

    /// Completes when the connection has ended.
    async fn ended(&self) {
        self.reached(|| self.end.get().is_some()).await;
    }

    async fn reached(&self, is_so: impl Fn() -> bool) {
        loop {
            let news = self.news.notified();
            if is_so() {
                return;
            }
            news.await;
        }
    }

    /// Closes the connection and tells the other side why, if that can be done without waiting.
    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        let mut state = self.state();
        if std::mem::replace(&mut state.closed, true) {
            return;
        }
        let State { session, tcp, within_message, .. } = &mut *state;
        let mut socket = Socket::Plain(tcp.as_fd());
        if !*within_message {
            // Fails when the connection is gone already.
            let _ = session.send(&mut socket, &[IoSlice::new(&close_frame(code, reason))]);
        }
        session.finish();
        let _ = session.flush(&mut socket);
        // What is in the socket's buffer is still sent, and then its end.
        let _ = rustix::net::shutdown(tcp, Shutdown::Write);
        drop(state);
        self.end(None, "this process closed the connection".to_owned());
    }

    /// Says something that is no message; `false` when that cannot be now.
    fn say_between_messages(&self, word: u32) -> bool {
        let mut state = self.state();
        let State { session, tcp, within_message, .. } = &mut *state;
        if *within_message || session.broken().is_some() {
            return false;
        }
        let word = word.to_le_bytes();
        match session.send(&mut Socket::Plain(tcp.as_fd()), &[IoSlice::new(&word)]) {
            Ok(sent) => sent == word.len(),
            // The connection is gone.
            Err(_) => true,
        }
    }

    /// Sends as much of the rest of a message as there is room for, and returns how much.
    fn try_send(&self, rest: &[IoSlice<'_>]) -> Result<usize, Fault> {
        let mut state = self.state();
        let State { session, tcp, .. } = &mut *state;
        let sent = session.send(&mut Socket::Tokio(tcp), rest)?;
        let all = rest.iter().map(|part| part.len()).sum();
        state.within_message = sent < all && (sent > 0 || state.within_message);
        Ok(sent)
    }

    /// Waits until everything that was sent is in the operating system's hands.
    async fn flush(&self) -> Result<(), Error> {
        loop {
            if self.try_flush().map_err(|fault| self.gone(&fault.in_words()))? {
                return Ok(());
            }
            self.ready(Interest::WRITABLE).await?;
        }
    }

    fn try_flush(&self) -> Result<bool, Fault> {
        let mut state = self.state();
        let State { session, tcp, .. } = &mut *state;
        session.flush(&mut Socket::Tokio(tcp))
    }

    /// Receives what there is. That the connection fails is its end, of which everybody is told.
    fn receive(&self, into: &mut [u8]) -> Result<Received, Error> {
        self.check()?;
        let received = {
            let State { session, tcp, .. } = &mut *self.state();
            session.receive(&mut Socket::Tokio(tcp), into)
        };
        received.map_err(|fault| {
            self.end(None, fault.in_words());
            self.gone(&fault.in_words())
        })
    }

    /// Waits until the socket is ready, or there is another one, or perhaps for nothing.
    async fn ready(&self, interest: Interest) -> Result<(), Error> {
        let news = self.news.notified();
        tokio::pin!(news);
        // Before the look: what changes after it is noticed.
        news.as_mut().enable();
        self.check()?;
        let tcp = {
            let state = self.state();
            state.session.broken().is_none().then(|| state.tcp.clone())
        };
        let ready = async {
            match &tcp {
                Some(tcp) => tcp.ready(interest).await.map(drop),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ready = ready => ready.map_err(|error| self.gone(&error.to_string())),
            () = news => self.check(),
        }
    }

    /// What both sides know the session by.
    pub(super) fn id(&self) -> Result<SessionId, Fault> {
        self.state().session.id()
    }

    /// Has the session go on over another socket when its own breaks, of which `broken` is told.
    pub(super) fn outlive_sockets(&self, broken: Arc<Notify>) {
        self.state().session.outlive_sockets(broken);
    }
}

impl Line for Stream {
    fn broken(&self) -> Option<Fault> {
        self.state().session.broken().cloned()
    }

    fn over(&self) -> bool {
        self.end.get().is_some()
    }

    fn cut(&self) -> u64 {
        let mut state = self.state();
        let State { session, tcp, .. } = &mut *state;
        session.cut(tcp.as_fd(), Fault::Cut);
        session.received()
    }

    fn rewind(&self, arrived: u64) -> Result<(), String> {
        self.state().session.rewind(arrived)
    }

    fn attach(&self, tcp: TcpStream) -> io::Result<()> {
        let mut state = self.state();
        if state.closed {
            return Err(io::Error::other("the connection is closed"));
        }
        if !state.session.resume() {
            return Err(io::Error::other("the connection has been given up"));
        }
        state.tcp = Arc::new(tcp);
        drop(state);
        self.news.notify_waiters();
        Ok(())
    }

    fn flush(&self) -> bool {
        // A broken connection is found by whoever receives on it.
        self.try_flush().unwrap_or(true)
    }

    fn progress(&self) -> Option<Progress> {
        let state = self.state();
        state.session.progress(state.tcp.as_fd())
    }

    fn give_up(&self) {
        self.state().session.give_up();
    }
}

fn close_frame(code: CloseCode, reason: &str) -> Vec<u8> {
    let reason = &reason.as_bytes()[..reason.len().min(REASON_LIMIT)];
    // The conversion cannot fail: the limit is that of a byte.
    let len = u32::try_from(reason.len()).unwrap_or(0);
    [&(CLOSE + len).to_le_bytes()[..], &[code as u8], reason].concat()
}

impl Connection {
    pub(super) fn new(stream: Arc<Stream>, member: &str) -> Self {
        Self { stream, member: member.into(), lane_taken: Arc::default() }
    }

    /// The other side's name, from its verified certificate.
    pub fn member(&self) -> &str {
        &self.member
    }

    /// The other side's address.
    pub fn remote_address(&self) -> SocketAddr {
        self.stream.remote
    }

    /// Opens the lane of typed messages in both directions, of at most [`MESSAGE_LIMIT`](wire::MESSAGE_LIMIT)
    /// bytes each. There is one on a connection; the other side gets it from
    /// [`accept_messages`](Connection::accept_messages).
    ///
    /// # Errors
    /// [`Error::Usage`] when it has been taken before.
    pub async fn open_messages(&self) -> Result<(MessageSender, MessageReceiver), Error> {
        self.lane(wire::MESSAGE_LIMIT)
    }

    /// The lane that the other side [opens](Connection::open_messages).
    ///
    /// # Errors
    /// [`Error::Usage`] when it has been taken before.
    pub async fn accept_messages(&self) -> Result<(MessageSender, MessageReceiver), Error> {
        self.lane(wire::MESSAGE_LIMIT)
    }

    pub(super) fn lane(&self, limit: usize) -> Result<(MessageSender, MessageReceiver), Error> {
        if self.lane_taken.swap(true, Ordering::Relaxed) {
            return Err(Error::Usage { reason: "a connection has one lane of messages".to_owned() });
        }
        Ok(self.stream.lane(limit))
    }

    /// Closes the connection and tells the other side why. Messages that are still on their way are
    /// lost; [`MessageSender::finish`] waits for them.
    pub fn close(&self, reason: &str) {
        self.close_with(CloseCode::Finished, reason);
    }

    /// What is mended when its socket breaks.
    pub(super) fn line(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// The connection has broken for good.
    pub(super) fn broke(&self, reason: String) {
        self.stream.end(None, reason);
    }

    /// Says what broke the data connection of this one's link. The control lane has a moment to say why.
    pub(super) fn data_broke(&self, reason: &str) {
        self.stream.data_fault.get_or_init(|| reason.to_owned());
        self.stream.news.notify_waiters();
    }

    /// The end of the data connection, after the moment in which a better reason may come.
    async fn data_broken(&self) -> Option<String> {
        self.stream.reached(|| self.stream.data_fault.get().is_some()).await;
        sleep(REASON_GRACE).await;
        self.stream.data_fault.get().cloned()
    }

    /// Tells the other side that all its data up to its goodbye is here.
    pub(super) async fn say_has_all(&self) {
        while !self.stream.say_between_messages(HAS_ALL) {
            sleep(BETWEEN_MESSAGES).await;
        }
        // Fails when the connection is gone, and with it whoever wants to know.
        let _ = self.stream.flush().await;
    }

    /// Completes when the other side has said that it has all our data, or the connection has ended.
    pub(super) async fn peer_has_all(&self) {
        let stream = &self.stream;
        stream.reached(|| stream.peer_has_all.load(Ordering::Relaxed) || stream.end.get().is_some()).await;
    }

    /// The other side has ended its lane and will say nothing more.
    pub(super) fn lane_over(&self) {
        self.stream.end(None, "its connection ended".to_owned());
    }
}

impl LinkConnection for Connection {
    type Sender = MessageSender;
    type Receiver = MessageReceiver;
    type Data = DataStream;

    fn member(&self) -> &str {
        self.member()
    }

    fn remote_address(&self) -> SocketAddr {
        self.remote_address()
    }

    fn close_with(&self, code: CloseCode, reason: &str) {
        self.stream.close(code, reason);
    }

    fn close_reason(&self) -> Option<String> {
        if let Some((_, reason)) = self.stream.end.get() {
            return Some(reason.clone());
        }
        // Nobody may be reading, so that the end is not known yet.
        let hung_up = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let tcp = self.stream.state().tcp.clone();
        let mut files = [PollFd::new(&tcp, PollFlags::RDHUP)];
        let found = poll(&mut files, Some(&Timespec::default())).is_ok_and(|count| count > 0);
        (found && files[0].revents().intersects(hung_up)).then(|| "it has hung up".to_owned())
    }

    async fn ended(&self) -> End {
        let reason = tokio::select! {
            biased;
            () = self.stream.ended() => None,
            reason = self.data_broken() => reason,
        };
        match (self.stream.end.get(), reason) {
            (Some((Some(CloseCode::Left), _)), _) => End::Left,
            (Some((_, reason)), _) => End::Lost(reason.clone()),
            (None, reason) => End::Lost(reason.unwrap_or_else(no_answer)),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("member", &self.member)
            .field("remote", &self.remote_address())
            .finish_non_exhaustive()
    }
}

impl MessageSender {
    /// Sends one message. Waits only while the other side does not read.
    ///
    /// Cancelling it leaves the lane intact: a message begun is completed by the next `send` or
    /// [`finish`](MessageSender::finish), one not begun is not sent.
    ///
    /// # Errors
    /// [`Error::Wire`] when the message is over the limit, [`Error::Refused`] when the connection is closed.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), Error> {
        let [len, body] = self.encoded(message)?;
        self.send_bytes(&[&len, &body]).await
    }

    /// Sends one message and, behind it, bytes as they are: without a copy, and of any number. The other side takes the message
    /// with [`recv`](MessageReceiver::recv), which has to say how many bytes there are, and the bytes with
    /// [`recv_bytes`](MessageReceiver::recv_bytes).
    ///
    /// Waits while the other side does not read. Cancelling it breaks the lane: whatever is sent afterwards fails.
    ///
    /// # Errors
    /// As [`send`](MessageSender::send).
    pub async fn send_with_bytes<T: Serialize>(&mut self, message: &T, bytes: &[u8]) -> Result<(), Error> {
        let [len, body] = self.encoded(message)?;
        self.send_unsent().await?;
        let mut parts = [IoSlice::new(&len), IoSlice::new(&body), IoSlice::new(bytes)];
        let mut rest = &mut parts[..];
        self.lends = true;
        while !rest.is_empty() {
            self.stream.check()?;
            match self.stream.try_send(rest).map_err(|fault| self.stream.gone(&fault.in_words()))? {
                0 => self.stream.ready(Interest::WRITABLE).await?,
                sent => IoSlice::advance_slices(&mut rest, sent),
            }
        }
        self.stream.flush().await?;
        self.lends = false;
        Ok(())
    }

    /// The message's length as it is sent, and the message.
    fn encoded<T: Serialize>(&self, message: &T) -> Result<[Vec<u8>; 2], Error> {
        let body = wire::encode(message)?;
        let len = u32::try_from(body.len()).ok().filter(|_| body.len() <= self.limit);
        let len = len.ok_or(WireError::TooLong { len: body.len(), limit: self.limit })?;
        Ok([len.to_le_bytes().to_vec(), body])
    }

    /// Ends the lane in order, and returns when the operating system has all of it; the other side then
    /// receives `None`.
    ///
    /// # Errors
    /// [`Error::Refused`] when the connection is closed before that.
    pub async fn finish(mut self) -> Result<(), Error> {
        self.send_unsent().await?;
        self.stream.state().session.finish();
        self.stream.flush().await?;
        // Fails when the connection is gone, which the flush would have found.
        let _ = rustix::net::shutdown(&self.stream.state().tcp, Shutdown::Write);
        Ok(())
    }

    async fn send_bytes(&mut self, parts: &[&[u8]]) -> Result<(), Error> {
        self.send_unsent().await?;
        parts.iter().for_each(|part| self.unsent.extend_from_slice(part));
        self.send_unsent().await
    }

    async fn send_unsent(&mut self) -> Result<(), Error> {
        if self.lends {
            return Err(self.stream.gone("a message to it was cut off"));
        }
        while !self.unsent.is_empty() {
            self.stream.check()?;
            let rest = [IoSlice::new(&self.unsent)];
            match self.stream.try_send(&rest).map_err(|fault| self.stream.gone(&fault.in_words()))? {
                0 => self.stream.ready(Interest::WRITABLE).await?,
                sent => drop(self.unsent.drain(..sent)),
            }
        }
        self.stream.flush().await
    }
}

impl MessageOut for MessageSender {
    async fn send<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), Error> {
        self.send(message).await
    }

    async fn finish(mut self) -> Result<(), Error> {
        // The lane goes on with what is no message, until the connection is closed.
        self.send_unsent().await
    }

    async fn keep_alive(&mut self) {
        loop {
            sleep(KEEP_ALIVE).await;
            // An error means that the connection is gone, which the receiving half finds out.
            if self.send_bytes(&[&ALIVE.to_le_bytes()]).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl fmt::Debug for MessageSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageSender").field("remote", &self.stream.remote).finish_non_exhaustive()
    }
}

/// What the bytes before a message say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prefix {
    Alive,
    HasAll,
    Close { reason_len: usize },
    Message { len: usize },
}

impl Prefix {
    /// Reads any bytes.
    ///
    /// # Errors
    /// [`WireError::TooLong`] when they announce a message of more than `limit` bytes.
    fn of(bytes: [u8; PREFIX_BYTES], limit: usize) -> Result<Self, WireError> {
        match u32::from_le_bytes(bytes) {
            ALIVE => Ok(Self::Alive),
            HAS_ALL => Ok(Self::HasAll),
            close if close & !0xff == CLOSE => Ok(Self::Close { reason_len: (close & 0xff) as usize }),
            len => match usize::try_from(len).unwrap_or(usize::MAX) {
                len if len > limit => Err(WireError::TooLong { len, limit }),
                len => Ok(Self::Message { len }),
            },
        }
    }
}

impl MessageReceiver {
    /// Counts the other side as lost when it says nothing for a while, not even that it lives.
    pub(super) fn expect_signs_of_life(&mut self) {
        self.silence = Some(SILENCE_LIMIT);
    }

    /// The other side has said its last message: it shows no life until it closes the connection.
    pub(super) fn expect_silence(&mut self) {
        self.silence = None;
    }

    /// Receives the next message; `None` when the other side has ended the lane in order.
    ///
    /// Cancelling it loses nothing. After an error every later call fails.
    ///
    /// # Errors
    /// [`Error::Wire`] for a message over the limit or malformed, [`Error::Refused`] when the connection
    /// is closed.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let len = loop {
            if !self.fill(PREFIX_BYTES).await? {
                return if self.filled == 0 { Ok(None) } else { Err(cut_short()) };
            }
            let mut prefix = [0; PREFIX_BYTES];
            prefix.copy_from_slice(&self.buffer[..PREFIX_BYTES]);
            match Prefix::of(prefix, self.limit)? {
                Prefix::Alive => self.filled = 0,
                Prefix::HasAll => {
                    self.filled = 0;
                    self.stream.peer_has_all.store(true, Ordering::Relaxed);
                    self.stream.news.notify_waiters();
                }
                Prefix::Close { reason_len } => return Err(self.closed(reason_len).await?),
                Prefix::Message { len } => break len,
            }
        };
        if !self.fill(PREFIX_BYTES + len).await? {
            return Err(cut_short());
        }
        let message = wire::decode(&self.buffer[PREFIX_BYTES..PREFIX_BYTES + len])?;
        self.filled = 0;
        Ok(Some(message))
    }

    /// Receives the bytes behind a message that was sent with [`send_with_bytes`](MessageSender::send_with_bytes). They go
    /// straight to `into`, which has as many as the message has said. Waits until all are there.
    ///
    /// Cancelling it loses bytes: the receiver is of no use then.
    ///
    /// # Errors
    /// [`Error::Refused`] when the connection is closed before the last one, [`Error::Wire`] when the other side has ended the
    /// lane.
    pub async fn recv_bytes(&mut self, into: &mut [u8]) -> Result<(), Error> {
        self.stream.state().session.expect_much();
        let mut filled = 0;
        while filled < into.len() {
            match self.stream.receive(&mut into[filled..])? {
                Received::Bytes(count) => filled += count,
                Received::End => return Err(cut_short()),
                Received::Nothing => self.readable().await?,
            }
        }
        Ok(())
    }

    /// Reads why the other side closes the connection, and returns that as the connection's error.
    async fn closed(&mut self, reason_len: usize) -> Result<Error, Error> {
        let all = PREFIX_BYTES + 1 + reason_len;
        if !self.fill(all).await? {
            return Err(cut_short());
        }
        let (code, reason) = (self.buffer[PREFIX_BYTES], quote(&self.buffer[PREFIX_BYTES + 1..all]));
        let left = (code == CloseCode::Left as u8).then_some(CloseCode::Left);
        let words = if code == CloseCode::Protocol as u8 { "it cut us off" } else { "connection closed" };
        self.stream.end(left, format!("{words}: {reason}"));
        Ok(self.stream.gone(&format!("{words}: {reason}")))
    }

    /// Reads until `size` bytes of the message are there; `false` when the lane ends before. What has been
    /// read is counted at once, so that cancelling loses nothing.
    async fn fill(&mut self, size: usize) -> Result<bool, Error> {
        if self.buffer.len() < size {
            self.buffer.resize(size, 0);
        }
        while self.filled < size {
            match self.stream.receive(&mut self.buffer[self.filled..size])? {
                Received::Bytes(count) => self.filled += count,
                Received::End => return Ok(false),
                Received::Nothing => self.readable().await?,
            }
        }
        Ok(true)
    }

    async fn readable(&self) -> Result<(), Error> {
        let readable = self.stream.ready(Interest::READABLE);
        let Some(silence) = self.silence else { return readable.await };
        match timeout(silence, readable).await {
            Ok(readable) => readable,
            Err(_) => {
                self.stream.end(None, no_answer());
                Err(self.stream.gone(&no_answer()))
            }
        }
    }
}

impl MessageIn for MessageReceiver {
    async fn recv<T: DeserializeOwned + Send>(&mut self) -> Result<Option<T>, Error> {
        self.recv().await
    }
}

impl fmt::Debug for MessageReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageReceiver").field("remote", &self.stream.remote).finish_non_exhaustive()
    }
}

/// The error of a connection that is not usable any more.
pub(super) fn gone(remote: SocketAddr, reason: &str) -> Error {
    Error::Refused { remote, reason: reason.to_owned() }
}

fn cut_short() -> Error {
    let reason = "the lane ended inside a message".to_owned();
    WireError::Malformed { what: "message", reason }.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_prefix_is_one_of_ours_or_a_length_within_the_limit(bytes: [u8; 4], limit in 0..1_usize << 20) {
            match Prefix::of(bytes, limit) {
                Ok(Prefix::Alive) => prop_assert_eq!(bytes, ALIVE.to_le_bytes()),
                Ok(Prefix::HasAll) => prop_assert_eq!(bytes, HAS_ALL.to_le_bytes()),
                Ok(Prefix::Close { reason_len }) => {
                    prop_assert!(reason_len <= REASON_LIMIT);
                    prop_assert_eq!(bytes, (CLOSE + reason_len as u32).to_le_bytes());
                }
                Ok(Prefix::Message { len }) => prop_assert!(len <= limit),
                Err(WireError::TooLong { len, .. }) => prop_assert!(len > limit),
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
    }

    #[test]
    fn what_stands_instead_of_a_length_is_no_length_of_any_message() {
        for special in [ALIVE, HAS_ALL, CLOSE, CLOSE + 255] {
            assert!(special as usize > wire::MESSAGE_LIMIT);
            assert!(!matches!(Prefix::of(special.to_le_bytes(), usize::MAX), Ok(Prefix::Message { .. })));
        }
    }
}
