//! Driving an endpoint from the thread of a collective.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::core::Progress;
use super::endpoint::Endpoint;
use super::shared::Shared;
use crate::Error;

/// How long a caller looks for packets before it parks, when there is a processor for each rank. A parked
/// thread takes some 45 µs to wake on a virtual machine (2026-07): a wait of a millisecond gets 5 % longer.
const SPIN: Duration = Duration::from_millis(1);

/// The same when ranks share processors: each look is followed by a yield, and the others want the time.
const SPIN_IN_A_CROWD: Duration = Duration::from_micros(50);

/// An operation that has sent more than this may leave behind what the network does not take yet, so the
/// background task takes over at its end. Less fits any congestion window, and its acknowledgements can
/// wait for the next operation.
const SMALL_BYTES: usize = 64 * 1024;

/// A place from which one thread at a time drives an endpoint.
#[derive(Debug)]
pub(in crate::quic) struct Caller {
    shared: Arc<Shared>,
    bell: Arc<Bell>,
    waker: Waker,
    spin_limit: Duration,
    /// Since when nothing has moved.
    idle_since: Option<Instant>,
    /// Bytes sent since the last pause.
    sent_bytes: usize,
}

/// What ends a wait from outside: remembered once, like that of a [`Parker`](crate::park::Parker).
#[derive(Debug)]
struct Bell {
    rung: AtomicBool,
    /// Whether somebody is parked, or about to be, and must be woken through the descriptor.
    parked: AtomicBool,
    descriptor: OwnedFd,
}

impl Caller {
    /// A caller for an endpoint. `local_ranks` is how many ranks of the group run on this host.
    ///
    /// # Errors
    /// [`Error::Usage`] when the process has no descriptor left.
    pub(in crate::quic) fn new(endpoint: &Endpoint, local_ranks: usize) -> Result<Self, Error> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::Usage { reason: format!("cannot make an event descriptor: {error}") })?;
        let bell = Arc::new(Bell { rung: false.into(), parked: false.into(), descriptor });
        let spin_limit = if ranks_fit(local_ranks) { SPIN } else { SPIN_IN_A_CROWD };
        let (shared, waker) = (endpoint.shared().clone(), Waker::from(bell.clone()));
        Ok(Self { shared, bell, waker, spin_limit, idle_since: None, sent_bytes: 0 })
    }

    /// A waker that ends a [`wait`](Self::wait).
    pub(in crate::quic) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Notes that bytes came, or went if there are any `sent`.
    pub(in crate::quic) fn moved(&mut self, sent: usize) {
        self.idle_since = None;
        self.sent_bytes += sent;
    }

    /// Drives once and lets others run; `false` when nothing has moved for so long that parking is due.
    pub(in crate::quic) fn spin(&mut self) -> bool {
        let now = Instant::now();
        let idle_since = *self.idle_since.get_or_insert(now);
        if now - idle_since > self.spin_limit {
            return false;
        }
        self.shared.drive(now);
        thread::yield_now();
        true
    }

    /// Drives once.
    pub(in crate::quic) fn drive(&self) {
        self.shared.drive(Instant::now());
    }

    /// Drives and parks until the waker is used or `until` has passed.
    pub(in crate::quic) fn wait(&mut self, until: Instant) {
        loop {
            let now = Instant::now();
            let progress = self.shared.drive(now);
            if self.bell.take() {
                // Something has happened: more of it may follow at once.
                self.idle_since = None;
                return;
            }
            if now >= until {
                return;
            }
            if progress != Progress::More {
                self.park(until);
            }
        }
    }

    /// The operation is over. What it left behind is sent, here or by the background task.
    pub(in crate::quic) fn pause(&mut self) {
        self.idle_since = None;
        let large = std::mem::take(&mut self.sent_bytes) > SMALL_BYTES;
        let progress = self.shared.act(|core, now| core.send(now));
        if large || progress != Progress::Done {
            self.shared.hand_over();
        }
    }

    /// From now on the background task drives, until the next call that does.
    pub(in crate::quic) fn hand_over(&self) {
        self.shared.hand_over();
    }

    /// Sends what there is, and parks until a packet or a timer or the bell.
    fn park(&self, until: Instant) {
        let (progress, deadline) = self.shared.act(|core, now| (core.send(now), core.deadline()));
        let blocked = match progress {
            Progress::More => return,
            Progress::Blocked => PollFlags::OUT,
            Progress::Done => PollFlags::empty(),
        };
        let until = deadline.map_or(until, |deadline| deadline.min(until));
        if !self.bell.prepare() {
            return;
        }
        self.shared.while_parked(|| {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let socket = &**self.shared.socket().descriptor();
            let mut events = [
                PollFd::new(socket, PollFlags::IN | blocked),
                PollFd::new(&self.bell.descriptor, PollFlags::IN),
            ];
            // An error (a signal came) is a wake-up without a reason, which the loop can take.
            let _ = poll(&mut events, Some(&left));
        });
        self.bell.leave();
    }
}

impl Bell {
    /// Whether it was rung since the last call.
    fn take(&self) -> bool {
        self.rung.swap(false, Ordering::SeqCst)
    }

    /// Before parking; `false` when it has been rung meanwhile.
    fn prepare(&self) -> bool {
        self.parked.store(true, Ordering::SeqCst);
        // Whoever rings after this look sees that somebody is parked.
        let quiet = !self.rung.load(Ordering::SeqCst);
        if !quiet {
            self.leave();
        }
        quiet
    }

    fn leave(&self) {
        self.parked.store(false, Ordering::SeqCst);
        // Empty when nobody has written; an old ring would end the next wait too early.
        let _ = rustix::io::read(&self.descriptor, &mut [0; 8]);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::SeqCst) && self.parked.load(Ordering::SeqCst) {
            // Fails only if the counter is full: then it is readable already.
            let _ = rustix::io::write(&self.descriptor, &1_u64.to_ne_bytes());
        }
    }
}

/// Whether each of the ranks of this host can have a processor.
fn ranks_fit(local_ranks: usize) -> bool {
    let allowed = thread::available_parallelism().map_or(1, usize::from);
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok();
    let online = online.as_deref().and_then(count_of).unwrap_or(allowed);
    // A launcher that binds ranks to equal shares of the processors does so only if there are enough.
    local_ranks <= allowed || (allowed < online && local_ranks * allowed <= online)
}

/// How many processors a list like `0-3,8` has.
fn count_of(list: &str) -> Option<usize> {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        (last + 1).checked_sub(first)
    };
    list.trim().split(',').map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_from_a_list_of_ranges() {
        assert_eq!(count_of("0-1\n"), Some(2));
        assert_eq!(count_of("0"), Some(1));
        assert_eq!(count_of("0-3,8,10-11"), Some(7));
        assert_eq!(count_of("3-0"), None);
        assert_eq!(count_of(""), None);
    }
}
