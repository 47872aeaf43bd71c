//! The control lane of a link between processes, and how the link ended: the same on every kind of link.
//!
//! Two tasks per link run on the I/O thread: [`send_all`] and [`receive_all`]. The caller's thread leaves
//! messages in a queue and finds those of the peer in an inbox. What is received decides how the link
//! ended, so that a reason is in the inbox before any call reports the end.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout_at;

use crate::close::CloseCode;
use crate::{CONTROL_MESSAGE_LIMIT, Error};

/// Control messages that may wait on either side of a link.
///
/// When the receiving side is full the sender's fills up; a link with both full counts as broken.
pub(crate) const CONTROL_QUEUE_LIMIT: usize = 512;

/// How long a last message waits for a peer that counts as lost. One that lives takes it within a
/// millisecond; one that was killed never does, and the error of the operation waits for this long.
pub(crate) const GIVEN_UP_GRACE: Duration = Duration::from_millis(3);

/// An authenticated connection to a member, that carries a link.
pub(crate) trait LinkConnection: Clone + fmt::Debug + Send + Sync + 'static {
    /// The sending half of the control lane.
    type Sender: MessageOut;
    /// The receiving half of the control lane.
    type Receiver: MessageIn;
    /// Both directions of the data stream.
    type Data: fmt::Debug + Send;

    /// The other side's name, from its verified certificate.
    fn member(&self) -> &str;

    /// The other side's address.
    fn remote_address(&self) -> SocketAddr;

    /// Closes the connection and tells the other side why. Does not block.
    fn close_with(&self, code: CloseCode, reason: &str);

    /// Why the connection is closed, in words, if it is.
    fn close_reason(&self) -> Option<String>;

    /// Waits until the connection has ended and says how.
    fn ended(&self) -> impl Future<Output = End> + Send;
}

/// The sending half of a lane of typed messages.
pub(crate) trait MessageOut: fmt::Debug + Send + 'static {
    /// Sends one message. Waits only while the other side does not read; cancelling it leaves the lane intact.
    fn send<T: Serialize + Sync>(&mut self, message: &T) -> impl Future<Output = Result<(), Error>> + Send;

    /// Has nothing more to say, and waits until the other side has all of it, as far as this kind of lane can
    /// tell.
    fn finish(self) -> impl Future<Output = Result<(), Error>> + Send;

    /// Shows the other side now and then that this one lives, where the connection does not do that by itself.
    /// Never completes; is cancelled when there is something to send.
    fn keep_alive(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// The receiving half of a lane of typed messages.
pub(crate) trait MessageIn: fmt::Debug + Send + 'static {
    /// Receives the next message; `None` when the other side has ended the lane in order. Cancelling it loses
    /// nothing.
    fn recv<T: DeserializeOwned + Send>(&mut self) -> impl Future<Output = Result<Option<T>, Error>> + Send;
}

/// What the control tasks of a link and the caller's thread share.
#[derive(Debug)]
pub(crate) struct LinkState {
    pub(crate) peer: usize,
    inbox: Mutex<VecDeque<Vec<u8>>>,
    /// Told when the inbox has room again.
    room: Notify,
    end: OnceLock<End>,
    ended: Notify,
    waker: Waker,
}

/// How a link ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Left,
    Lost(String),
}

/// Makes sure that a link whose task is dropped has an end.
#[derive(Debug)]
struct EndOnDrop(Arc<LinkState>);

/// What is said on a control lane after the handshake.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Control {
    /// A message of the layer above.
    Message(Vec<u8>),
    /// The sender leaves in order: no message follows, and data ends with the end of its stream.
    Goodbye,
    /// The sender gives up, and why, in the words of the layer above.
    Abort(Vec<u8>),
}

impl LinkState {
    pub(crate) fn new(peer: usize, waker: Waker) -> Self {
        let (inbox, room, end, ended) = Default::default();
        Self { peer, inbox, room, end, ended, waker }
    }

    fn inbox(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        // A queue of whole messages stays one whatever happened to another holder.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take_message(&self) -> Result<Option<Vec<u8>>, Error> {
        // Look at the end first: a message that came before it is then in the inbox already.
        let end = self.end.get();
        if let Some(message) = self.inbox().pop_front() {
            self.room.notify_one();
            return Ok(Some(message));
        }
        end.map_or(Ok(None), |end| Err(end.error(self.peer)))
    }

    /// How the link ended, if it has.
    pub(crate) fn known_end(&self) -> Option<&End> {
        self.end.get()
    }

    /// Records how the link ended, unless that is known, and tells everybody who waits.
    pub(crate) fn end(&self, end: End) -> Error {
        let end = self.end.get_or_init(|| end);
        self.ended.notify_waiters();
        self.waker.wake_by_ref();
        end.error(self.peer)
    }

    /// Ends the link from this side.
    pub(crate) fn cut(&self, connection: &impl LinkConnection, code: CloseCode, reason: &str) -> Error {
        let error = self.end(End::Lost(reason.to_owned()));
        connection.close_with(code, reason);
        error
    }

    /// Completes when the link has ended.
    pub(crate) async fn ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.end.get().is_some() {
                return;
            }
            ended.await;
        }
    }

    /// Wakes the caller's thread: something has come.
    pub(crate) fn wake(&self) {
        self.waker.wake_by_ref();
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
    pub(crate) fn error(&self, peer: usize) -> Error {
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

/// Hands a message of the layer above to [`send_all`].
///
/// # Errors
/// How the link ended. It ends here when too many messages are unread.
pub(crate) fn queue_message(
    queue: &mpsc::Sender<Control>,
    state: &LinkState,
    connection: &impl LinkConnection,
    message: &[u8],
) -> Result<(), Error> {
    if let Some(end) = state.known_end() {
        return Err(end.error(state.peer));
    }
    match queue.try_send(Control::Message(message.to_vec())) {
        // Closed: the connection has ended, and the next call will know how.
        Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        Err(mpsc::error::TrySendError::Full(_)) => {
            let reason = format!("{CONTROL_QUEUE_LIMIT} control messages are unread");
            Err(state.cut(connection, CloseCode::Protocol, &reason))
        }
    }
}

/// Refuses a message of the layer above that is too long.
pub(crate) fn check_length(message: &[u8]) -> Result<(), Error> {
    if message.len() > CONTROL_MESSAGE_LIMIT {
        let reason = format!("a control message of {} bytes is over the limit", message.len());
        return Err(Error::Usage { reason });
    }
    Ok(())
}

/// The reason that the layer above gives for giving up, cut to what a lane takes.
pub(crate) fn abort(message: &[u8]) -> Control {
    Control::Abort(message[..message.len().min(CONTROL_MESSAGE_LIMIT)].to_vec())
}

/// Sends control messages in order. After the last one, ends when the peer has all of them.
pub(crate) async fn send_all(mut queue: mpsc::Receiver<Control>, mut sender: impl MessageOut) {
    loop {
        let message = tokio::select! {
            message = queue.recv() => message,
            () = sender.keep_alive() => continue,
        };
        let Some(message) = message else { return };
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
pub(crate) async fn receive_all(
    receiver: &mut impl MessageIn,
    connection: impl LinkConnection,
    shared: Arc<LinkState>,
) {
    let _unless_known = EndOnDrop(shared.clone());
    let wrong = |reason: &str| drop(shared.cut(&connection, CloseCode::Protocol, reason));
    loop {
        let message = tokio::select! {
            // In this order: what came before the end of the connection is heard.
            biased;
            message = receiver.recv::<Control>() => message,
            end = connection.ended() => return drop(shared.end(end)),
        };
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return wrong("its control lane ended without a goodbye"),
            Err(Error::Wire(error)) => return wrong(&format!("its control lane is broken: {error}")),
            // Any other error is about the connection, which has ended.
            Err(_) => return drop(shared.end(connection.ended().await)),
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
                end = connection.ended() => return drop(shared.end(end)),
            },
        }
    }
}

/// The results of those that end before `deadline`; the others are dropped.
pub(crate) async fn collect_until<F>(futures: Vec<F>, deadline: Instant) -> Vec<usize>
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::close::quote;
    use crate::wire;

    proptest! {
        #[test]
        fn any_bytes_are_a_control_message_or_an_error(bytes: Vec<u8>) {
            if let Ok(Control::Message(message)) = wire::decode::<Control>(&bytes) {
                prop_assert!(message.len() < bytes.len());
            }
        }

        #[test]
        fn whatever_a_peer_says_at_the_end_is_one_line(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let words = quote(&bytes);
            prop_assert!(words.chars().all(|c| !c.is_control()) && words.chars().count() <= 300);
        }
    }
}
