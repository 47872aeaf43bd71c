//! An authenticated connection to a member, and the message lanes on it.

use std::fmt;
use std::net::SocketAddr;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::close::{self, CloseCode, in_words};
use super::driver::{self, ReadError, ReadExactError, RecvStream, SendStream, StoppedError, WriteError};
use crate::Error;
use crate::control_lane::{End, LinkConnection, MessageIn, MessageOut};
use crate::wire::{self, WireError};

/// A connection to a member of the job whose certificate was verified, and which has said hello.
///
/// Cheap to clone. When the last clone and the last lane are dropped, the connection is closed.
#[derive(Clone)]
pub struct Connection {
    driver: driver::Connection,
    member: String,
}

/// The sending half of a lane of typed messages.
#[derive(Debug)]
pub struct MessageSender {
    stream: SendStream,
    remote: SocketAddr,
    limit: usize,
    /// What is left of a message whose `send` was cancelled.
    unsent: Vec<u8>,
}

/// The receiving half of a lane of typed messages.
#[derive(Debug)]
pub struct MessageReceiver {
    stream: RecvStream,
    remote: SocketAddr,
    limit: usize,
    /// The message being read, with its length, and how much of it has arrived.
    buffer: Vec<u8>,
    filled: usize,
}

/// What a stream is for: its first byte, which also makes the peer notice it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// The exchange with which every connection begins.
    Hello = 1,
    /// Typed messages.
    Messages = 2,
    /// The bytes of a link.
    Data = 3,
}

/// Size of the length in front of each message: a u32, little-endian.
const PREFIX_BYTES: usize = 4;

impl Connection {
    pub(super) fn new(driver: driver::Connection, member: String) -> Self {
        Self { driver, member }
    }

    /// The other side's name, from its verified certificate.
    pub fn member(&self) -> &str {
        &self.member
    }

    /// The other side's address.
    pub fn remote_address(&self) -> SocketAddr {
        remote_address(&self.driver)
    }

    /// Opens a lane of typed messages in both directions, of at most
    /// [`MESSAGE_LIMIT`](wire::MESSAGE_LIMIT) bytes each. The other side gets it from
    /// [`accept_messages`](Connection::accept_messages), whether or not anything is sent on it.
    ///
    /// # Errors
    /// [`Error::Refused`] when the connection is closed.
    pub async fn open_messages(&self) -> Result<(MessageSender, MessageReceiver), Error> {
        self.open(Lane::Messages, wire::MESSAGE_LIMIT).await
    }

    /// Waits for the other side to open a lane of typed messages.
    ///
    /// # Errors
    /// [`Error::Refused`] when the connection is closed, or when what was opened is no such lane.
    pub async fn accept_messages(&self) -> Result<(MessageSender, MessageReceiver), Error> {
        self.accept(Lane::Messages, wire::MESSAGE_LIMIT).await
    }

    /// Waits until the connection is closed and returns why, in words.
    pub async fn closed(&self) -> String {
        in_words(&self.driver.closed().await)
    }

    /// Closes the connection and tells the other side why. Messages that are still on their way are
    /// lost; [`MessageSender::finish`] waits for them.
    pub fn close(&self, reason: &str) {
        self.close_with(CloseCode::Finished, reason);
    }

    pub(super) fn driver(&self) -> &driver::Connection {
        &self.driver
    }

    pub(super) async fn open(
        &self,
        lane: Lane,
        limit: usize,
    ) -> Result<(MessageSender, MessageReceiver), Error> {
        let (send, recv) = self.open_stream(lane).await?;
        Ok(messages(send, recv, self.remote_address(), limit))
    }

    pub(super) async fn accept(
        &self,
        lane: Lane,
        limit: usize,
    ) -> Result<(MessageSender, MessageReceiver), Error> {
        let (send, recv) = self.accept_stream(lane).await?;
        Ok(messages(send, recv, self.remote_address(), limit))
    }

    pub(super) async fn open_stream(&self, lane: Lane) -> Result<(SendStream, RecvStream), Error> {
        let (mut send, recv) = self.driver.open_bi().await.map_err(|error| self.gone(&in_words(&error)))?;
        send.write_all(&[lane as u8]).await.map_err(|error| self.gone(&write_in_words(&error)))?;
        Ok((send, recv))
    }

    pub(super) async fn accept_stream(&self, lane: Lane) -> Result<(SendStream, RecvStream), Error> {
        let (send, mut recv) = self.driver.accept_bi().await.map_err(|error| self.gone(&in_words(&error)))?;
        let mut kind = [0];
        recv.read_exact(&mut kind).await.map_err(|error| self.gone(&exact_in_words(&error)))?;
        if kind[0] != lane as u8 {
            let reason = format!("it opened a lane of kind {} where {lane:?} was due", kind[0]);
            self.close_with(CloseCode::Protocol, &reason);
            return Err(self.gone(&reason));
        }
        Ok((send, recv))
    }

    fn gone(&self, reason: &str) -> Error {
        gone(self.remote_address(), reason)
    }
}

impl LinkConnection for Connection {
    type Sender = MessageSender;
    type Receiver = MessageReceiver;
    type Data = (SendStream, RecvStream);

    fn member(&self) -> &str {
        self.member()
    }

    fn remote_address(&self) -> SocketAddr {
        self.remote_address()
    }

    fn close_with(&self, code: CloseCode, reason: &str) {
        close::close(&self.driver, code, reason);
    }

    fn close_reason(&self) -> Option<String> {
        self.driver.close_reason().map(|error| in_words(&error))
    }

    async fn ended(&self) -> End {
        match self.driver.closed().await {
            error if CloseCode::Left.is_in(&error) => End::Left,
            error => End::Lost(in_words(&error)),
        }
    }
}

impl MessageOut for MessageSender {
    async fn send<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), Error> {
        self.send(message).await
    }

    async fn finish(self) -> Result<(), Error> {
        self.finish().await
    }
}

impl MessageIn for MessageReceiver {
    async fn recv<T: DeserializeOwned + Send>(&mut self) -> Result<Option<T>, Error> {
        self.recv().await
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
        self.flush().await?;
        self.unsent.extend_from_slice(&len.to_le_bytes());
        self.unsent.extend_from_slice(&body);
        self.flush().await
    }

    /// Ends the lane in order and waits until the other side has all of it; it then receives `None`.
    ///
    /// # Errors
    /// [`Error::Refused`] when the connection is closed before that.
    pub async fn finish(mut self) -> Result<(), Error> {
        self.flush().await?;
        // Finished already or stopped by the peer: `stopped` below knows which.
        let _ = self.stream.finish();
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(gone(self.remote, "it stopped reading messages")),
            Err(StoppedError::ConnectionLost(error)) => Err(gone(self.remote, &in_words(&error))),
        }
    }

    /// Sends this lane's bytes before those of lanes with a lower priority. The default is 0.
    pub(super) fn set_priority(&self, priority: i32) {
        // Fails only for a stream that has ended, where it does not matter.
        let _ = self.stream.set_priority(priority);
    }

    async fn flush(&mut self) -> Result<(), Error> {
        while !self.unsent.is_empty() {
            let written = self.stream.write(&self.unsent).await;
            let written = written.map_err(|error| gone(self.remote, &write_in_words(&error)))?;
            self.unsent.drain(..written);
        }
        Ok(())
    }
}

impl MessageReceiver {
    /// Receives the next message; `None` when the other side has ended the lane in order.
    ///
    /// Cancelling it loses nothing. After an error every later call fails.
    ///
    /// # Errors
    /// [`Error::Wire`] for a message over the limit or malformed, [`Error::Refused`] when the connection
    /// is closed.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        if !self.fill(PREFIX_BYTES).await? {
            return if self.filled == 0 { Ok(None) } else { Err(cut_short()) };
        }
        let mut prefix = [0; PREFIX_BYTES];
        prefix.copy_from_slice(&self.buffer[..PREFIX_BYTES]);
        let len = announced(prefix, self.limit)?;
        if !self.fill(PREFIX_BYTES + len).await? {
            return Err(cut_short());
        }
        let message = wire::decode(&self.buffer[PREFIX_BYTES..])?;
        self.buffer.clear();
        self.filled = 0;
        Ok(Some(message))
    }

    /// Reads until `size` bytes of the message are there; `false` when the lane ends before. Each wait
    /// is one read whose bytes are counted at once, so that cancelling loses none.
    async fn fill(&mut self, size: usize) -> Result<bool, Error> {
        if self.buffer.len() < size {
            self.buffer.resize(size, 0);
        }
        while self.filled < size {
            match self.stream.read(&mut self.buffer[self.filled..size]).await {
                Ok(Some(got)) => self.filled += got,
                Ok(None) => return Ok(false),
                Err(error) => return Err(gone(self.remote, &read_in_words(&error))),
            }
        }
        Ok(true)
    }
}

/// The length that the bytes before a message announce.
///
/// # Errors
/// [`WireError::TooLong`] when it is more than `limit`.
fn announced(prefix: [u8; PREFIX_BYTES], limit: usize) -> Result<usize, WireError> {
    match usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX) {
        len if len > limit => Err(WireError::TooLong { len, limit }),
        len => Ok(len),
    }
}

/// The error of a connection that is not usable any more.
pub(super) fn gone(remote: SocketAddr, reason: &str) -> Error {
    Error::Refused { remote, reason: reason.to_owned() }
}

pub(super) fn remote_address(connection: &driver::Connection) -> SocketAddr {
    // A dual-stack socket reports IPv4 peers as mapped addresses, which nobody recognises in a log.
    let addr = connection.remote_address();
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn messages(
    stream: SendStream,
    recv: RecvStream,
    remote: SocketAddr,
    limit: usize,
) -> (MessageSender, MessageReceiver) {
    let sender = MessageSender { stream, remote, limit, unsent: Vec::new() };
    let receiver = MessageReceiver { stream: recv, remote, limit, buffer: Vec::new(), filled: 0 };
    (sender, receiver)
}

fn cut_short() -> Error {
    let reason = "the lane ended inside a message".to_owned();
    WireError::Malformed { what: "message", reason }.into()
}

fn write_in_words(error: &WriteError) -> String {
    match error {
        WriteError::ConnectionLost(error) => in_words(error),
        WriteError::Stopped(_) => "it stopped reading".to_owned(),
        error => error.to_string(),
    }
}

fn read_in_words(error: &ReadError) -> String {
    match error {
        ReadError::ConnectionLost(error) => in_words(error),
        ReadError::Reset(_) => "it reset the stream".to_owned(),
        error => error.to_string(),
    }
}

fn exact_in_words(error: &ReadExactError) -> String {
    match error {
        ReadExactError::FinishedEarly => "it opened a lane and sent nothing".to_owned(),
        ReadExactError::ReadError(error) => read_in_words(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_prefix_is_a_length_within_the_limit_or_an_error(bytes: [u8; 4], limit in 0..1_usize << 20) {
            match announced(bytes, limit) {
                Ok(len) => prop_assert!(len <= limit),
                Err(error) => {
                    let is_over = matches!(error, WireError::TooLong { len, .. } if len > limit);
                    prop_assert!(is_over);
                }
            }
        }
    }
}
