//! The data connection of a link, shared by the caller's thread, which drives it, and the I/O thread.
//!
//! The I/O thread steps in twice. Bytes that the caller left encrypted because the socket was full are sent
//! by the [`Flusher`] when the caller does not come back soon. And after the peer's goodbye the rest of
//! its data is taken off the socket, as far as there is room, so that the peer need not wait for this rank's
//! caller before it leaves.

use std::io::{self, IoSlice};
use std::net::TcpStream as StdTcpStream;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::session::{Fault, Received, Session, Socket};
use crate::control_lane::LinkState;

/// What is kept of a leaving peer's data until the caller reads it: all that can be on its way, by Linux's
/// default limits of 4 MiB to send and 6 MiB to receive.
const BACKLOG_LIMIT: usize = 10 * 1024 * 1024;

/// What is taken from the socket at a time for the backlog.
const PULL_BYTES: usize = 64 * 1024;

/// The limits between which the pauses of the I/O thread double while it waits for a socket's room or bytes.
/// They are for peers that do not read or send; no caller waits for them.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// A data connection, before it belongs to a link.
#[derive(Debug)]
pub(crate) struct DataStream {
    socket: StdTcpStream,
    session: Session,
}

/// The data connection of a link.
#[derive(Debug)]
pub(super) struct Data {
    pub(super) socket: StdTcpStream,
    half: Mutex<Half>,
}

#[derive(Debug)]
struct Half {
    session: Session,
    /// Received bytes from `taken` on.
    backlog: Vec<u8>,
    taken: usize,
    received_end: bool,
    /// Whether the caller is done with it.
    closed: bool,
    /// How often the caller has sent, for the flusher to see.
    sends: u64,
}

/// Sends what callers left behind, for all links of a transport.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    armed: AtomicBool,
    wake: Notify,
}

impl DataStream {
    pub(super) fn new(tcp: TcpStream, mut session: Session) -> io::Result<Self> {
        session.expect_much();
        let socket = tcp.into_std()?;
        // A peer that computes for long leaves its window full, which this limit takes for its death. The
        // control connection looks after that.
        rustix::net::sockopt::set_tcp_user_timeout(&socket, 0)?;
        Ok(Self { socket, session })
    }
}

impl Data {
    pub(super) fn new(stream: DataStream) -> Self {
        let DataStream { socket, session } = stream;
        let half =
            Half { session, backlog: Vec::new(), taken: 0, received_end: false, closed: false, sends: 0 };
        Self { socket, half: Mutex::new(half) }
    }

    fn half(&self) -> MutexGuard<'_, Half> {
        // A session that a panic has left half written fails as a connection, not as memory.
        self.half.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plain(&self) -> Socket<'_> {
        Socket::Plain(self.socket.as_fd())
    }

    /// Encrypts and sends as much of `parts` as there is room for; returns how much, and whether encrypted
    /// bytes were left behind.
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> Result<(usize, bool), Fault> {
        let mut half = self.half();
        half.sends += 1;
        let sent = half.session.send(&mut self.plain(), parts)?;
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
        let received = half.session.receive(&mut self.plain(), into)?;
        half.received_end = received == Received::End;
        Ok(received)
    }

    /// Sends what is left behind; `false` when there is no room for all of it.
    pub(super) fn flush(&self) -> Result<bool, Fault> {
        self.half().session.flush(&mut self.plain())
    }

    /// Ends this side's data in order, behind what is left to send.
    pub(super) fn finish(&self) {
        self.half().session.finish();
    }

    /// Gives the connection up. Whatever waits for it on the I/O thread ends.
    pub(super) fn close(&self) {
        self.half().closed = true;
        // Fails when it is gone already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
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
            let pulled = self.half().pull(&mut self.plain())?;
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

impl Half {
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
    fn pull(&mut self, socket: &mut Socket<'_>) -> Result<Received, Fault> {
        let mut pulled = 0;
        while !self.received_end && !self.closed && self.backlog.len() < BACKLOG_LIMIT {
            let filled = self.backlog.len();
            self.backlog.resize(filled + PULL_BYTES, 0);
            let received = self.session.receive(socket, &mut self.backlog[filled..]);
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

    /// Sends what callers leave behind. Runs on the I/O thread until it is dropped.
    ///
    /// A caller that comes back within a pause sends by itself, and is not disturbed.
    pub(super) async fn run(self: Arc<Self>, links: Vec<Arc<Data>>) {
        let mut seen = vec![0; links.len()];
        loop {
            self.wake.notified().await;
            let mut pause = PAUSE.0;
            loop {
                sleep(pause).await;
                pause = (2 * pause).min(PAUSE.1);
                // Before the look: what is left behind from now on arms it again.
                self.armed.store(false, Ordering::Release);
                let mut left = false;
                for (data, seen) in links.iter().zip(&mut seen) {
                    left |= data.flush_if_idle(seen);
                }
                if !left {
                    break;
                }
            }
        }
    }
}

impl Data {
    /// Sends what is left behind if the caller has not sent since the last look; says whether there is more.
    fn flush_if_idle(&self, seen: &mut u64) -> bool {
        let mut half = self.half();
        if half.closed || !half.session.has_unsent() {
            return false;
        }
        if std::mem::replace(seen, half.sends) != half.sends {
            return true;
        }
        // A broken connection is found by the caller and by the control lane.
        matches!(half.session.flush(&mut self.plain()), Ok(false))
    }
}
