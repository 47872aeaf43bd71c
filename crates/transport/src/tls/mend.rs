//! Making a connection of a link again when it breaks though both sides live.
//!
//! Something between two hosts may forget a connection, or reset it, while both processes are well. TLS goes
//! on over another TCP connection then, where the old one has stopped:
//!
//! ```text
//!  finds the break              the other side
//!  dials, TLS with certificates ────▶ hears for which session, and how many of its encrypted bytes arrived;
//!                                     gives its own socket up, if it still has one, and counts
//!  ◀──── how many arrived there
//!  GO, and then the session's bytes ─▶ the session's bytes from then on
//! ```
//!
//! The new connection's own TLS ends before GO: nothing of the session is encrypted twice. Whoever dials proves
//! again that it is the member, and names the session by a secret that only its two sides can derive.
//!
//! Either side may dial. When both do, the attempt of the one that made the link wins. A process that
//! is gone refuses the dialler's connection, so that its loss is known after one round trip; what
//! does not answer is lost after [`LINK_GRACE`]. So both sides must be able to dial each other, which only one has
//! to when links are first made; where one cannot and finds the break first, the link is lost.
//!
//! A path that swallows long packets (a tunnel that came into the way and says nothing) breaks no connection:
//! what is on its way does not arrive, though the peer shows that it lives by short packets. Such a connection is
//! exchanged for one with short segments, and is lost when that does not help either.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout, timeout_at};

use super::connection::Stream;
use super::endpoint::{Dialler, SILENCE_LIMIT};
use super::session::{Fault, Progress, SessionId};

/// How long a broken connection may take to be made again: three round trips of 100 ms, and short enough that a pod
/// which was killed with its address is named within a second.
const LINK_GRACE: Duration = Duration::from_millis(400);

/// How long mending may take in all, the other side's attempts included.
const MENDING_LIMIT: Duration = Duration::from_millis(1200);

/// How long a TCP connection may take of it: a lost packet is repeated after a second, and a new attempt is sooner.
const CONNECT_LIMIT: Duration = Duration::from_millis(130);

/// How often somebody looks whether what was sent arrives.
const LOOK: Duration = Duration::from_millis(500);

/// How long nothing of what is on its way may arrive before short segments are tried: longer than TCP repeats for a
/// link that is down for a second. The old connection stays until a new one is there.
const STALLED: Duration = Duration::from_secs(2);

/// Bytes of a short segment: what the shortest path of IPv6 carries (1280 bytes, RFC 8200), less its headers.
const SHORT_SEGMENT: u32 = 1220;

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(10);

/// How long whoever reads the session has for what was saved from a broken socket, where the other side's goodbye may be.
const LAST_WORDS: Duration = Duration::from_millis(1);

/// The limits between which the pauses double while the socket has no room for what is to be sent again.
const SENDING_PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(5));

/// The longest answer to somebody who wants to go on with a session, in bytes: a number, or a reason.
pub(super) const ANSWER_LIMIT: usize = 1024;

/// Ends what the dialler says outside the session.
const GO: u8 = 1;

/// A TLS session that can exchange its socket, as it is shared with those who use it.
pub(super) trait Line: Send + Sync + 'static {
    /// How its socket broke, if it is broken.
    fn broken(&self) -> Option<Fault>;

    /// Whether one of both sides has closed it in words: then a broken socket is nothing to mend.
    fn over(&self) -> bool;

    /// Gives its socket up, and returns how many encrypted bytes have arrived.
    fn cut(&self) -> u64;

    /// Goes on behind the first `arrived` bytes that it has sent.
    ///
    /// # Errors
    /// In words, when it cannot.
    fn rewind(&self, arrived: u64) -> Result<(), String>;

    /// Goes on over this socket.
    ///
    /// # Errors
    /// The operating system's.
    fn attach(&self, tcp: TcpStream) -> io::Result<()>;

    /// Sends what there is to send; `false` when there is no room for all of it.
    fn flush(&self) -> bool;

    /// How far what it has sent has got; `None` while it is broken.
    fn progress(&self) -> Option<Progress>;

    /// Accepts that its socket cannot be mended.
    fn give_up(&self);
}

/// Asks for the other side of a session that has lost its socket.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Resumption {
    session: SessionId,
    /// How many encrypted bytes of the other side have arrived here.
    arrived: u64,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// It goes on, and so many encrypted bytes have arrived there.
    Arrived(u64),
    /// Not now: it is dialling itself.
    Busy,
    /// It does not go on.
    No(String),
}

/// The sessions of an endpoint's links.
#[derive(Debug, Default)]
pub(super) struct Lines(Mutex<HashMap<SessionId, Arc<Mendable>>>);

/// A session that can be resumed.
pub(super) struct Mendable {
    line: Arc<dyn Line>,
    /// Who may resume it.
    member: String,
    /// Whether the attempts of this side win over those of the other one.
    ours_win: bool,
    /// Held by an attempt, of either side.
    turn: tokio::sync::Mutex<()>,
    /// Ends an attempt of this side.
    give_way: Notify,
}

/// Who mends a session, and how.
pub(super) struct Mender {
    pub(super) line: Arc<dyn Line>,
    /// That of the link's control connection, whose goodbye is for both.
    pub(super) control: Arc<dyn Line>,
    pub(super) session: SessionId,
    /// Told when the socket breaks.
    pub(super) broken: Arc<Notify>,
    pub(super) member: String,
    /// Where it listens.
    pub(super) addr: SocketAddr,
    pub(super) ours_win: bool,
    /// Which of the link's connections it is, for the log.
    pub(super) what: &'static str,
}

/// A session's place among those that can be resumed, until it is dropped.
struct Entered {
    lines: Arc<Lines>,
    session: SessionId,
}

/// Since when nothing that was sent has arrived.
struct Stall {
    arrived: u64,
    since: Instant,
}

/// How an attempt to resume ended.
pub(super) enum Failure {
    /// Another one may do better.
    Later(String),
    /// No other one will.
    Final(String),
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Mendable>>> {
        // Entries are put in and taken out whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `member` wants to resume, if it may.
    fn find(&self, session: &SessionId, member: &str) -> Option<Arc<Mendable>> {
        self.lock().get(session).filter(|mendable| mendable.member == member).cloned()
    }

    /// Answers a member that has dialled for a session, and goes on with it over that connection.
    pub(super) async fn answer(&self, stream: Arc<Stream>, member: &str, resumption: Resumption) {
        let Resumption { session, arrived } = resumption;
        let (mut sender, _) = stream.lane(ANSWER_LIMIT);
        let Some(mendable) = self.find(&session, member) else {
            let no = Answer::No("there is no such connection any more".to_owned());
            // Fails when the other side has gone away.
            return drop(sender.send(&no).await);
        };
        let turn = if mendable.ours_win {
            mendable.turn.try_lock().ok()
        } else {
            mendable.give_way.notify_waiters();
            timeout(LINK_GRACE, mendable.turn.lock()).await.ok()
        };
        let Some(_turn) = turn else { return drop(sender.send(&Answer::Busy).await) };
        let here = mendable.line.cut();
        let answer = match mendable.line.rewind(arrived) {
            Ok(()) => Answer::Arrived(here),
            Err(reason) => Answer::No(reason),
        };
        let said = sender.send(&answer).await;
        if !matches!((&answer, said), (Answer::Arrived(_), Ok(()))) {
            return;
        }
        drop(sender);
        let gone_on = async {
            let tcp = stream.into_tcp()?;
            timeout(LINK_GRACE, read_go(&tcp)).await??;
            mendable.line.attach(tcp)
        };
        if let Err(error) = gone_on.await {
            tracing::debug!(member, %error, "a connection was not made again by the one who dialled for it");
        }
    }
}

impl Mender {
    /// Mends the session's socket whenever it breaks, and calls `lost` with how it broke when that fails. The
    /// session can be resumed by the other side for as long as this is polled or kept.
    pub(super) async fn run(self, lines: Arc<Lines>, dialler: Dialler, lost: impl FnOnce(&Fault) + Send) {
        let Mender { line, control, session, broken, member, addr, ours_win, what } = self;
        let mendable = Arc::new(Mendable {
            line: line.clone(),
            member: member.clone(),
            ours_win,
            turn: tokio::sync::Mutex::default(),
            give_way: Notify::new(),
        });
        lines.lock().insert(session, mendable.clone());
        let _entered = Entered { lines, session };
        let mut stall = Stall { arrived: 0, since: Instant::now() };
        let mut looked = Instant::now();
        // The pause until the next try to send what is to be sent again: the caller may not come back for it.
        let mut sending: Option<Duration> = None;
        loop {
            if sending.is_some() && line.broken().is_none() && line.flush() {
                sending = None;
            }
            let told = timeout(sending.unwrap_or(LOOK), broken.notified()).await.is_ok();
            sending = sending.map(|pause| (2 * pause).min(SENDING_PAUSE.1));
            if let Some(fault) = line.broken() {
                let started = Instant::now();
                sleep(LAST_WORDS).await;
                if line.over() || control.over() {
                    line.give_up();
                    return lost(&fault);
                }
                let mended = mendable.mend(&dialler, addr, session).await;
                let (reason, took) = (fault.in_words(), started.elapsed());
                if let Err(why) = mended {
                    tracing::debug!(member, what, reason, why, "a connection cannot be made again");
                    line.give_up();
                    return lost(&fault);
                }
                tracing::info!(member, what, reason, ?took, "a connection was made again");
                sending = Some(SENDING_PAUSE.0);
                continue;
            }
            if told {
                // The other side has made it again.
                sending = Some(SENDING_PAUSE.0);
            }
            if looked.elapsed() < LOOK {
                continue;
            }
            looked = Instant::now();
            let stalled = stall.look(line.progress(), looked);
            if stalled > SILENCE_LIMIT {
                tracing::debug!(member, what, "nothing that was sent arrives");
                line.cut();
                line.give_up();
                return lost(&Fault::silence());
            }
            if stalled > STALLED && mendable.shorten(&dialler, addr, session).await {
                tracing::info!(
                    member,
                    what,
                    "a connection was made again with short segments: nothing arrived"
                );
                sending = Some(SENDING_PAUSE.0);
            }
        }
    }
}

impl Mendable {
    /// Tries until the line has a socket again, by whoever's attempt.
    ///
    /// # Errors
    /// Why it never will, or did not within [`LINK_GRACE`] of this side's own attempts.
    async fn mend(&self, dialler: &Dialler, addr: SocketAddr, session: SessionId) -> Result<(), String> {
        let last = Instant::now() + MENDING_LIMIT;
        let mut deadline = Instant::now() + LINK_GRACE;
        loop {
            let turn = match self.turn.try_lock() {
                Ok(turn) => turn,
                Err(_) => {
                    // The other side's attempt, which may fail: that time is not counted.
                    let turn =
                        timeout_at(last.into(), self.turn.lock()).await.map_err(|_| no_answer_in_time())?;
                    deadline = last.min(Instant::now() + LINK_GRACE);
                    turn
                }
            };
            if self.line.broken().is_none() {
                return Ok(());
            }
            let attempt = self.attempt(dialler, addr, session, (None, CONNECT_LIMIT));
            tokio::select! {
                biased;
                () = self.give_way.notified() => {}
                attempt = timeout_at(deadline.into(), attempt) => match attempt {
                    Ok(Ok(())) => return Ok(()),
                    Ok(Err(Failure::Final(reason))) => return Err(reason),
                    Ok(Err(Failure::Later(reason))) => {
                        tracing::debug!(%addr, reason, "a connection is not made again yet");
                    }
                    Err(_) => return Err(no_answer_in_time()),
                },
            }
            drop(turn);
            sleep(PAUSE).await;
        }
    }

    /// Tries once to exchange a connection that seems to be up for one with short segments. Whether it did.
    async fn shorten(&self, dialler: &Dialler, addr: SocketAddr, session: SessionId) -> bool {
        // Whoever has it exchanges the connection already.
        let Ok(_turn) = self.turn.try_lock() else { return false };
        tokio::select! {
            biased;
            () = self.give_way.notified() => false,
            () = sleep(STALLED) => false,
            attempt = self.attempt(dialler, addr, session, (Some(SHORT_SEGMENT), STALLED)) => attempt.is_ok(),
        }
    }

    /// Dials once, for a connection with segments of at most that many bytes, which must be there within that time. Gives the present socket up when the
    /// other side is there.
    async fn attempt(
        &self,
        dialler: &Dialler,
        addr: SocketAddr,
        session: SessionId,
        (longest_segment, limit): (Option<u32>, Duration),
    ) -> Result<(), Failure> {
        let later = |error: io::Error| Failure::Later(error.to_string());
        let stream = dialler.dial_securely(addr, &self.member, longest_segment, limit).await?;
        let resumption = Resumption { session, arrived: self.line.cut() };
        match dialler.ask(&stream, resumption).await? {
            Answer::Arrived(arrived) => self.line.rewind(arrived).map_err(Failure::Final)?,
            Answer::Busy => return Err(Failure::Later("it is dialling itself".to_owned())),
            Answer::No(reason) => return Err(Failure::Final(reason)),
        }
        let tcp = stream.into_tcp().map_err(later)?;
        while let Err(error) = tcp.try_write(&[GO]) {
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(later(error));
            }
            tcp.writable().await.map_err(later)?;
        }
        self.line.attach(tcp).map_err(later)
    }
}

impl Stall {
    /// How long nothing has arrived of what is on its way.
    fn look(&mut self, progress: Option<Progress>, now: Instant) -> Duration {
        match progress {
            Some(Progress { arrived, on_its_way: true }) if arrived == self.arrived => {}
            Some(Progress { arrived, .. }) => *self = Self { arrived, since: now },
            // It is broken, and others see to that.
            None => self.since = now,
        }
        now.saturating_duration_since(self.since)
    }
}

fn no_answer_in_time() -> String {
    "no answer in time".to_owned()
}

/// Reads the byte behind which the session goes on, and nothing else.
async fn read_go(tcp: &TcpStream) -> io::Result<()> {
    let mut byte = [0];
    loop {
        match tcp.try_read(&mut byte) {
            Ok(1) if byte == [GO] => return Ok(()),
            Ok(_) => return Err(io::Error::other("it did not go on")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tcp.readable().await?,
            Err(error) => return Err(error),
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.lines.lock().remove(&self.session);
    }
}

impl std::fmt::Debug for Mendable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mendable").field("member", &self.member).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_what_is_on_its_way_and_does_not_arrive() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let progress = |arrived, on_its_way| Some(Progress { arrived, on_its_way });
        let mut stall = Stall { arrived: 0, since: start };
        assert_eq!(stall.look(progress(5, true), at(1)), Duration::ZERO);
        assert_eq!(stall.look(progress(5, true), at(4)), Duration::from_secs(3));
        assert_eq!(stall.look(progress(6, true), at(5)), Duration::ZERO, "some has arrived");
        assert_eq!(stall.look(progress(6, false), at(9)), Duration::ZERO, "the peer has no room for more");
        assert_eq!(stall.look(progress(6, true), at(10)), Duration::from_secs(1));
        assert_eq!(stall.look(None, at(11)), Duration::ZERO, "it is broken");
    }
}
