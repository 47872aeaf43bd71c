//! The data connection of a link, shared by the caller's thread, which drives it, and the I/O thread.
//!
//! The I/O thread steps in twice. Bytes that the caller left encrypted because the socket was full are sent
//! by the [`Flusher`] a moment later, for the caller may have gone away to compute. And after the peer's goodbye the rest of
//! its data is taken off the socket, as far as there is room, so that the peer need not wait for this rank's
//! caller before it leaves.
//!
//! A socket that breaks may be exchanged ([`mend`](super::mend)). Until it is, there is no room to send, and nothing
//! to receive but what was saved from it.

use std::io::{self, IoSlice};
use std::net::TcpStream as StdTcpStream;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::channel::Protection;
use super::mend::Line;
use super::session::{Fault, Progress, Received, Session, SessionId, Socket};
use crate::control_lane::LinkState;

/// What is kept of a leaving peer's data until the caller reads it: all that can be on its way, by Linux's
/// default limits of 4 MiB to send and 6 MiB to receive.
const BACKLOG_LIMIT: usize = 10 * 1024 * 1024;

/// What is taken from the socket at a time for the backlog.
const PULL_BYTES: usize = 64 * 1024;

/// The limits between which the pauses of the I/O thread double while it waits for a socket's room or bytes.
/// What a caller leaves behind when it goes away to compute arrives that much later.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(5));

/// A data connection, before it belongs to a link.
#[derive(Debug)]
pub(crate) struct DataStream {
    socket: StdTcpStream,
    session: Session,
}

/// The data connection of a link.
#[derive(Debug)]
pub(super) struct Data {
    half: Mutex<Half>,
    /// Wakes the caller.
    waker: Waker,
}

#[derive(Debug)]
struct Half {
    session: Session,
    socket: Arc<StdTcpStream>,
    /// Received bytes from `taken` on.
    backlog: Vec<u8>,
    taken: usize,
    received_end: bool,
    /// Whether the caller is done with it.
    closed: bool,
    /// Whether the caller has sent since the flusher looked last.
    sent: bool,
}

/// Sends what callers left behind, for all links of a transport.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    armed: AtomicBool,
    wake: Notify,
}

impl DataStream {
    pub(super) fn new(tcp: TcpStream, mut session: Session, protection: Protection) -> io::Result<Self> {
        session.expect_much();
        if protection == Protection::Plain {
            session.leave_tls().map_err(|fault| io::Error::other(fault.in_words()))?;
        }
        Ok(Self { socket: for_data(tcp)?, session })
    }

    /// What both sides know its session by.
    pub(super) fn id(&self) -> Result<SessionId, Fault> {
        self.session.id()
    }

    /// Has it go on over another socket when its own breaks, of which `broken` is told.
    pub(super) fn outlive_sockets(&mut self, broken: Arc<Notify>) {
        self.session.outlive_sockets(broken);
    }
}

/// The socket of a data connection, as the caller's thread uses it.
fn for_data(tcp: TcpStream) -> io::Result<StdTcpStream> {
    let socket = tcp.into_std()?;
    // A peer that computes for long leaves its window full, which this limit takes for its death. The
    // control connection looks after that.
    rustix::net::sockopt::set_tcp_user_timeout(&socket, 0)?;
    Ok(socket)
}

impl Data {
    pub(super) fn new(stream: DataStream, waker: Waker) -> Self {
        let DataStream { socket, session } = stream;
        let half = Half {
            session,
            socket: Arc::new(socket),
            backlog: Vec::new(),
            taken: 0,
            received_end: false,
            closed: false,
            sent: false,
        };
        Self { half: Mutex::new(half), waker }
    }

    fn half(&self) -> MutexGuard<'_, Half> {
        // A session that a panic has left half written fails as a connection, not as memory.
        self.half.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to wait on; `None` while there is nothing, in which case the caller is woken.
    pub(super) fn socket(&self) -> Option<Arc<StdTcpStream>> {
        let half = self.half();
        half.session.broken().is_none().then(|| half.socket.clone())
    }

    /// Encrypts and sends as much of `parts` as there is room for; returns how much, and whether encrypted
    /// bytes were left behind.
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> Result<(usize, bool), Fault> {
        let mut half = self.half();
        half.sent = true;
        let (session, socket) = half.parts();
        let sent = session.send(&mut Socket::Plain(socket.as_fd()), parts)?;
        Ok((sent, half.session.has_unsent()))
    }

    /// Received bytes, into `into`, which must not be empty.
    pub(super) fn receive(&self, into: &mut [u8]) -> Result<Received, Fault> {
        let mut half = self.half();
        let kept = half.take_kept(into);
        if kept > 0 {
            return Ok(Received::Bytes(kept));
        }
        if half.received_end {
            return Ok(Received::End);
        }
        let (session, socket) = half.parts();
        let received = session.receive(&mut Socket::Plain(socket.as_fd()), into)?;
        half.received_end = received == Received::End;
        Ok(received)
    }

    /// Sends what is left behind; `false` when there is no room for all of it.
    pub(super) fn flush(&self) -> Result<bool, Fault> {
        self.half().flush()
    }

    /// Ends this side's data in order, behind what is left to send.
    pub(super) fn finish(&self) {
        self.half().session.finish();
    }

    /// Gives the connection up. Whatever waits for it on the I/O thread ends.
    pub(super) fn close(&self) {
        let mut half = self.half();
        half.closed = true;
        // Fails when it is gone already.
        let _ = rustix::net::shutdown(&half.socket, rustix::net::Shutdown::Both);
    }

    /// Sends all that is left behind, and waits for that as long as it takes.
    pub(super) async fn flush_all(&self) -> Result<(), Fault> {
        let mut pause = PAUSE.0;
        while !self.flush()? {
            sleep(pause).await;
            pause = (2 * pause).min(PAUSE.1);
        }
        Ok(())
    }

    /// Takes the rest of a leaving peer's data off the socket, or waits until the caller does. `Ok` when all
    /// of it is there.
    pub(super) async fn drain(&self, state: &LinkState) -> Result<(), Fault> {
        let mut pause = PAUSE.0;
        loop {
            let pulled = self.half().pull()?;
            if pulled != Received::Nothing {
                state.wake();
            }
            match pulled {
                Received::End => return Ok(()),
                Received::Bytes(_) => pause = PAUSE.0,
                Received::Nothing => pause = (2 * pause).min(PAUSE.1),
            }
            sleep(pause).await;
        }
    }
}

impl Line for Data {
    fn broken(&self) -> Option<Fault> {
        self.half().session.broken().cloned()
    }

    fn over(&self) -> bool {
        self.half().closed
    }

    fn cut(&self) -> u64 {
        let mut half = self.half();
        let (session, socket) = half.parts();
        session.cut(socket.as_fd(), Fault::Cut);
        let received = session.received();
        drop(half);
        // What was saved from the socket can be read.
        self.waker.wake_by_ref();
        received
    }

    fn rewind(&self, arrived: u64) -> Result<(), String> {
        self.half().session.rewind(arrived)
    }

    fn attach(&self, tcp: TcpStream) -> io::Result<()> {
        let mut half = self.half();
        if half.closed {
            return Err(io::Error::other("the link is closed"));
        }
        let socket = Arc::new(for_data(tcp)?);
        if !half.session.resume() {
            return Err(io::Error::other("the link has been given up"));
        }
        half.socket = socket;
        drop(half);
        self.waker.wake_by_ref();
        Ok(())
    }

    fn flush(&self) -> bool {
        // A broken connection is found by the caller and by the control lane.
        Data::flush(self).unwrap_or(true)
    }

    fn progress(&self) -> Option<Progress> {
        let half = self.half();
        half.session.progress(half.socket.as_fd())
    }

    fn give_up(&self) {
        self.half().session.give_up();
    }
}

impl Half {
    fn parts(&mut self) -> (&mut Session, &StdTcpStream) {
        (&mut self.session, &self.socket)
    }

    fn flush(&mut self) -> Result<bool, Fault> {
        self.session.flush(&mut Socket::Plain(self.socket.as_fd()))
    }

    fn take_kept(&mut self, into: &mut [u8]) -> usize {
        let kept = &self.backlog[self.taken..];
        let count = kept.len().min(into.len());
        into[..count].copy_from_slice(&kept[..count]);
        self.taken += count;
        if self.taken == self.backlog.len() && self.taken > 0 {
            (self.backlog, self.taken) = (Vec::new(), 0);
        }
        count
    }

    /// Moves what has arrived into the backlog. `End` when nothing more will come.
    fn pull(&mut self) -> Result<Received, Fault> {
        let mut pulled = 0;
        while !self.received_end && !self.closed && self.backlog.len() < BACKLOG_LIMIT {
            let filled = self.backlog.len();
            self.backlog.resize(filled + PULL_BYTES, 0);
            let mut socket = Socket::Plain(self.socket.as_fd());
            let received = self.session.receive(&mut socket, &mut self.backlog[filled..]);
            let count = if let Ok(Received::Bytes(count)) = received { count } else { 0 };
            self.backlog.truncate(filled + count);
            pulled += count;
            match received? {
                Received::Bytes(_) => {}
                Received::Nothing => break,
                Received::End => self.received_end = true,
            }
        }
        match pulled {
            _ if self.received_end || self.closed => Ok(Received::End),
            0 => Ok(Received::Nothing),
            pulled => Ok(Received::Bytes(pulled)),
        }
    }
}

impl Flusher {
    /// Has the I/O thread look after what a caller has left behind, soon. Cheap while it does so already.
    pub(super) fn arm(&self) {
        if !self.armed.swap(true, Ordering::AcqRel) {
            self.wake.notify_one();
        }
    }

    /// Sends what callers leave behind, as far as the sockets have room, one pause later. Runs on the I/O thread
    /// until it is dropped. Callers that come back send by themselves meanwhile.
    pub(super) async fn run(self: Arc<Self>, links: Vec<Arc<Data>>) {
        loop {
            self.wake.notified().await;
            let mut pause = PAUSE.0;
            loop {
                sleep(pause).await;
                // Before the look: what is left behind from now on arms it again.
                self.armed.store(false, Ordering::Release);
                let mut left = Left::Nothing;
                for data in &links {
                    left = left.max(data.flush_left());
                }
                match left {
                    Left::Nothing => break,
                    Left::ByIdle => pause = (2 * pause).min(PAUSE.1),
                    Left::ByActive => pause = PAUSE.0,
                }
            }
        }
    }
}

/// What there is still to send.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    Nothing,
    /// By a caller that has not sent since the last look; the receiver is slow.
    ByIdle,
    /// By a caller that has.
    ByActive,
}

impl Data {
    /// Sends what is left behind, as far as there is room.
    fn flush_left(&self) -> Left {
        let mut half = self.half();
        let active = std::mem::replace(&mut half.sent, false);
        // A broken connection is found by the caller and by the control lane.
        match half.flush() {
            Ok(false) if !half.closed && active => Left::ByActive,
            Ok(false) if !half.closed => Left::ByIdle,
            _ => Left::Nothing,
        }
    }
}
