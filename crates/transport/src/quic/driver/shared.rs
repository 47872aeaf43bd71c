//! The lock around an endpoint's state, and who acts after it is released.

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::core::{Core, Progress};
use crate::quic::socket::Socket;

/// How long the background task stays away after a caller has driven. Between two collectives of a
/// training step less time passes mostly, and then no packet wakes two threads.
pub(super) const LINGER: Duration = Duration::from_millis(2);

/// A caller that has never driven, or does not want to count as one that has.
const NEVER: u64 = 0;

/// An endpoint's state, for all who use it.
pub(super) struct Shared {
    state: Mutex<State>,
    socket: Arc<Socket>,
    /// Callers that are parked and wake up for packets and timers.
    parked: AtomicUsize,
    /// When a caller last drove, in ns after `start`.
    driven_at: AtomicU64,
    start: Instant,
    /// Has the background task look what there is to do.
    pub(super) call: Notify,
}

struct State {
    core: Core,
    /// Whether a handle to the endpoint exists; connections may outlive it.
    held: bool,
    background: Background,
    /// The last time that the protocol was given. It must not go back, as it would when a thread reads the
    /// clock and then waits for the lock.
    latest: Instant,
}

/// What the background task is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Background {
    /// It will look by itself before long.
    Awake,
    /// It waits for a packet or until a timer is due, if there is one.
    AsleepUntil(Option<Instant>),
}

impl Shared {
    pub(super) fn new(socket: Arc<Socket>, core: Core) -> Self {
        let start = Instant::now();
        Self {
            state: Mutex::new(State { core, held: true, background: Background::Awake, latest: start }),
            socket,
            parked: AtomicUsize::new(0),
            driven_at: AtomicU64::new(NEVER),
            start,
            call: Notify::new(),
        }
    }

    pub(super) fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    /// Does something under the lock; then wakes those whom it concerns, the background task included
    /// when it sleeps and there is something that it must not sleep through.
    pub(super) fn act<T>(&self, action: impl FnOnce(&mut Core, Instant) -> T) -> T {
        let now = Instant::now();
        let mut state = self.lock();
        let now = state.advance(now);
        let result = action(&mut state.core, now);
        self.finish(state);
        result
    }

    /// One turn by a caller, who has what it calls for sent by the next one.
    pub(super) fn drive(&self, now: Instant) -> Progress {
        self.stamp(now);
        let mut state = self.lock();
        let now = state.advance(now);
        let progress = state.core.turn(now);
        self.finish(state);
        progress
    }

    /// A turn by the background task, and what it sends. With `Done` and `Blocked` the task counts as
    /// asleep, until the time that is returned.
    pub(super) fn drive_in_background(&self) -> (Progress, Option<Instant>) {
        let now = Instant::now();
        let mut state = self.lock();
        let now = state.advance(now);
        let received = state.core.turn(now);
        let sent = state.core.send(now);
        let progress = if received == Progress::More { received } else { sent };
        let deadline = state.core.deadline();
        state.background = match progress {
            Progress::More => Background::Awake,
            Progress::Done | Progress::Blocked => Background::AsleepUntil(deadline),
        };
        let woken = std::mem::take(&mut state.core.woken);
        drop(state);
        woken.into_iter().for_each(std::task::Waker::wake);
        (progress, deadline)
    }

    /// The background task looks for itself from now on.
    pub(super) fn background_is_awake(&self) {
        self.lock().background = Background::Awake;
    }

    /// Whether there is something that those who drive do not see: a timer that should have fired `grace` ago,
    /// or what others have left to be sent while the callers are parked and wait for packets alone.
    pub(super) fn is_neglected(&self, grace: Duration) -> bool {
        let parked = self.parked.load(Ordering::Acquire) > 0;
        let core = &self.lock().core;
        let overdue = core.deadline().is_some_and(|deadline| deadline + grace < Instant::now());
        overdue || (parked && (core.has_unsent() || core.is_blocked()))
    }

    /// Whether a caller drives, so that the background task need not.
    pub(super) fn is_driven(&self) -> bool {
        if self.parked.load(Ordering::Acquire) > 0 {
            return true;
        }
        let driven_at = self.driven_at.load(Ordering::Relaxed);
        driven_at != NEVER && self.start.elapsed() < Duration::from_nanos(driven_at) + LINGER
    }

    /// Notes that a caller drives.
    pub(super) fn stamp(&self, now: Instant) {
        let nanoseconds = now.saturating_duration_since(self.start).as_nanos();
        self.driven_at.store(u64::try_from(nanoseconds).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    /// Runs `park`, in which a caller waits for packets and timers.
    pub(super) fn while_parked(&self, park: impl FnOnce()) {
        self.parked.fetch_add(1, Ordering::AcqRel);
        park();
        self.parked.fetch_sub(1, Ordering::AcqRel);
    }

    /// A caller goes, and will not drive for a while.
    pub(super) fn hand_over(&self) {
        self.driven_at.store(NEVER, Ordering::Relaxed);
        self.call.notify_one();
    }

    /// The last handle to the endpoint is gone.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        state.held = false;
        self.finish(state);
        self.call.notify_one();
    }

    /// Whether nobody can want anything from this endpoint any more.
    pub(super) fn is_over(&self) -> bool {
        let state = self.lock();
        !state.held && state.core.is_empty()
    }

    fn finish(&self, mut state: MutexGuard<'_, State>) {
        let core = &mut state.core;
        let woken = std::mem::take(&mut core.woken);
        let is_over = core.is_empty();
        let (busy, deadline) = (core.has_unsent() || core.is_blocked(), core.deadline());
        let missed = match state.background {
            Background::Awake => false,
            Background::AsleepUntil(until) => busy || is_earlier(deadline, until) || (is_over && !state.held),
        };
        if missed {
            state.background = Background::Awake;
        }
        drop(state);
        woken.into_iter().for_each(std::task::Waker::wake);
        if missed {
            self.call.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of quinn-proto may leave its state broken, but the close of the process' other
        // connections must not become a second panic in somebody's `Drop`.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn advance(&mut self, now: Instant) -> Instant {
        self.latest = self.latest.max(now);
        self.latest
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("local_addr", &self.socket.local_addr()).finish_non_exhaustive()
    }
}

fn is_earlier(deadline: Option<Instant>, than: Option<Instant>) -> bool {
    match (deadline, than) {
        (Some(deadline), Some(than)) => deadline < than,
        (deadline, None) => deadline.is_some(),
        (None, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_deadline_is_later_than_any() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        assert!(is_earlier(Some(now), Some(later)) && is_earlier(Some(now), None));
        assert!(
            !is_earlier(Some(later), Some(now)) && !is_earlier(None, Some(now)) && !is_earlier(None, None)
        );
    }
}
