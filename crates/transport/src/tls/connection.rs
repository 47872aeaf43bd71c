//! An authenticated connection to a member, and the lane of messages on it.
//!
//! Before each message stands its length. Some values are no lengths but what QUIC has by itself and TCP has
//! not: a sign of life, a close with a code and a reason, and that all data has arrived.

use std::fmt;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::data::DataStream;
use super::endpoint::{KEEP_ALIVE, SILENCE_LIMIT};
use super::session::{Fault, Received, Session, Socket, no_answer};
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
    tcp: TcpStream,
    remote: SocketAddr,
    state: Mutex<State>,
    /// How the connection ended, as far as is known.
    end: OnceLock<(Option<CloseCode>, String)>,
    /// What broke the data connection of the same link.
    data_fault: OnceLock<String>,
    /// Whether the other side has all data up to our goodbye.
    peer_has_all: AtomicBool,
    /// Told of all three.
    news: Notify,
}

struct State {
    session: Session,
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
        let state = Mutex::new(State { session, within_message: false, closed: false });
        let (end, data_fault, peer_has_all, news) = Default::default();
        Arc::new(Self { tcp, remote, state, end, data_fault, peer_has_all, news })
    }

    /// Both halves of the lane. There must not be others.
    pub(super) fn lane(self: &Arc<Self>, limit: usize) -> (MessageSender, MessageReceiver) {
        let sender = MessageSender { stream: self.clone(), limit, unsent: Vec::new() };
        let receiver =
            MessageReceiver { stream: self.clone(), limit, silence: None, buffer: Vec::new(), filled: 0 };
        (sender, receiver)
    }

    /// The connection as the data connection of a link.
    ///
    /// # Errors
    /// The operating system's, or that the lane is still in use.
    pub(super) fn into_data(self: Arc<Self>) -> Result<DataStream, Error> {
        let remote = self.remote;
        let Some(stream) = Arc::into_inner(self) else {
            return Err(gone(remote, "the lane of a data connection is in use"));
        };
        let session = stream.state.into_inner().unwrap_or_else(PoisonError::into_inner).session;
        DataStream::new(stream.tcp, session).map_err(|error| gone(remote, &error.to_string()))
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
        let mut socket = Socket::Plain(self.tcp.as_fd());
        if !state.within_message {
            // Fails when the connection is gone already.
            let _ = state.session.send(&mut socket, &[IoSlice::new(&close_frame(code, reason))]);
        }
        state.session.finish();
        let _ = state.session.flush(&mut socket);
        // What is in the socket's buffer is still sent, and then its end.
        let _ = rustix::net::shutdown(&self.tcp, Shutdown::Write);
        drop(state);
        self.end(None, "this process closed the connection".to_owned());
    }

    /// Says something that is no message; `false` when that cannot be now.
    fn say_between_messages(&self, word: u32) -> bool {
        let mut state = self.state();
        if !state.within_message {
            // Fails when the connection is gone.
            let bytes = word.to_le_bytes();
            let _ = state.session.send(&mut Socket::Plain(self.tcp.as_fd()), &[IoSlice::new(&bytes)]);
        }
        !state.within_message
    }

    /// Sends as much of the rest of a message as there is room for, and returns how much.
    fn try_send(&self, rest: &[u8]) -> Result<usize, Fault> {
        let mut state = self.state();
        let sent = state.session.send(&mut Socket::Tokio(&self.tcp), &[IoSlice::new(rest)])?;
        state.within_message = sent < rest.len() && (sent > 0 || state.within_message);
        Ok(sent)
    }

    /// Waits until everything that was sent is in the operating system's hands.
    async fn flush(&self) -> Result<(), Error> {
        loop {
            let flushed = self.state().session.flush(&mut Socket::Tokio(&self.tcp));
            if flushed.map_err(|fault| self.gone(&fault.in_words()))? {
                return Ok(());
            }
            self.writable().await?;
        }
    }

    async fn writable(&self) -> Result<(), Error> {
        tokio::select! {
            ready = self.tcp.writable() => ready.map_err(|error| self.gone(&error.to_string())),
            () = self.ended() => self.check(),
        }
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
        let mut files = [PollFd::new(&self.stream.tcp, PollFlags::RDHUP)];
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
        let body = wire::encode(message)?;
        let len = u32::try_from(body.len()).ok().filter(|_| body.len() <= self.limit);
        let len = len.ok_or(WireError::TooLong { len: body.len(), limit: self.limit })?;
        self.send_bytes(&[&len.to_le_bytes(), &body]).await
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
        let _ = rustix::net::shutdown(&self.stream.tcp, Shutdown::Write);
        Ok(())
    }

    async fn send_bytes(&mut self, parts: &[&[u8]]) -> Result<(), Error> {
        self.send_unsent().await?;
        parts.iter().for_each(|part| self.unsent.extend_from_slice(part));
        self.send_unsent().await
    }

    async fn send_unsent(&mut self) -> Result<(), Error> {
        while !self.unsent.is_empty() {
            self.stream.check()?;
            match self.stream.try_send(&self.unsent).map_err(|fault| self.stream.gone(&fault.in_words()))? {
                0 => self.stream.writable().await?,
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
            match u32::from_le_bytes(prefix) {
                ALIVE => self.filled = 0,
                HAS_ALL => {
                    self.filled = 0;
                    self.stream.peer_has_all.store(true, Ordering::Relaxed);
                    self.stream.news.notify_waiters();
                }
                close if close & !0xff == CLOSE => return Err(self.closed((close & 0xff) as usize).await?),
                len => break usize::try_from(len).unwrap_or(usize::MAX),
            }
        };
        if len > self.limit {
            return Err(WireError::TooLong { len, limit: self.limit }.into());
        }
        if !self.fill(PREFIX_BYTES + len).await? {
            return Err(cut_short());
        }
        let message = wire::decode(&self.buffer[PREFIX_BYTES..PREFIX_BYTES + len])?;
        self.filled = 0;
        Ok(Some(message))
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
            self.stream.check()?;
            let received = {
                let mut state = self.stream.state();
                let into = &mut self.buffer[self.filled..size];
                state.session.receive(&mut Socket::Tokio(&self.stream.tcp), into)
            };
            match received {
                Ok(Received::Bytes(count)) => self.filled += count,
                Ok(Received::End) => return Ok(false),
                Ok(Received::Nothing) => self.readable().await?,
                Err(fault) => {
                    self.stream.end(None, fault.in_words());
                    return Err(self.stream.gone(&fault.in_words()));
                }
            }
        }
        Ok(true)
    }

    async fn readable(&self) -> Result<(), Error> {
        let readable = async {
            tokio::select! {
                ready = self.stream.tcp.readable() => ready.map_err(|error| self.stream.gone(&error.to_string())),
                () = self.stream.ended() => self.stream.check(),
            }
        };
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
