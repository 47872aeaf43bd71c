//! How a rank waits for its sockets: look again for a moment, then park on all of them.
//!
//! A parked thread takes some 45 µs to wake on a virtual machine; a peer on the same network answers in
//! less. Between two looks the processor is offered to whoever wants it, so that ranks which share one do not
//! keep each other from running: a yield costs 0.3 µs when nobody does.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::Error;

/// How long a rank looks again before it parks: twice what parking and waking costs, so that neither choice is
/// ever more than three times as long as the better one.
const SPINNING: Duration = Duration::from_micros(100);

/// A waker for one thread that parks in `poll`, with memory for one wake-up.
#[derive(Debug)]
pub(super) struct Bell {
    woken: AtomicBool,
    event: OwnedFd,
}

/// Where a rank is in its present wait.
#[derive(Debug, Default)]
pub(super) struct Spinning {
    since: Option<Instant>,
}

impl Bell {
    /// # Errors
    /// [`Error::Usage`] with the operating system's reason when there can be no descriptor.
    pub(super) fn new() -> Result<Arc<Self>, Error> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = eventfd(0, flags)
            .map_err(|error| Error::Usage { reason: format!("cannot make an event descriptor: {error}") })?;
        Ok(Arc::new(Self { woken: AtomicBool::new(false), event }))
    }

    pub(super) fn waker(self: &Arc<Self>) -> Waker {
        Waker::from(self.clone())
    }

    /// Parks until the bell rings, a file is ready for what stands beside it, or `until`. Leaves in each what it
    /// is ready for.
    pub(super) fn wait<'a>(&'a self, files: &mut Vec<PollFd<'a>>, until: Instant) {
        files.insert(0, PollFd::from_borrowed_fd(self.event.as_fd(), PollFlags::IN));
        let rung = self.woken.swap(false, Ordering::AcqRel);
        let left = if rung { Duration::ZERO } else { until.saturating_duration_since(Instant::now()) };
        // The conversion fails for times that no wait has.
        let timeout = Timespec::try_from(left).ok();
        // Interrupted by a signal: a spurious wake-up.
        if poll(files, timeout.as_ref()).is_err() {
            files.iter_mut().for_each(PollFd::clear_revents);
        }
        if !files.remove(0).revents().is_empty() {
            // Before the mark is taken back: who rings after that writes again.
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        }
        self.woken.store(false, Ordering::Release);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            // Fails only when the event has been rung 2^64 times.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }
}

impl Spinning {
    /// Passes a moment, if it is too early to park.
    pub(super) fn spin(&mut self) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        thread::yield_now();
        since.elapsed() < SPINNING
    }

    /// Something has moved.
    pub(super) fn end(&mut self) {
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_before_the_wait_is_remembered_once() {
        let bell = Bell::new().expect("a descriptor");
        bell.waker().wake();
        bell.waker().wake();
        let start = Instant::now();
        bell.wait(&mut Vec::new(), start + Duration::from_secs(60));
        assert!(start.elapsed() < Duration::from_secs(30));
        let until = Instant::now() + Duration::from_millis(20);
        bell.wait(&mut Vec::new(), until);
        assert!(Instant::now() >= until, "the second ring must not be left over");
    }

    #[test]
    fn a_ring_from_another_thread_ends_the_wait() {
        let bell = Bell::new().expect("a descriptor");
        for _ in 0..1000 {
            let waker = bell.waker();
            let helper = thread::spawn(move || waker.wake());
            let start = Instant::now();
            bell.wait(&mut Vec::new(), start + Duration::from_secs(60));
            assert!(start.elapsed() < Duration::from_secs(30));
            helper.join().expect("the waking thread does not panic");
        }
    }

    #[test]
    fn spinning_ends_soon_and_begins_anew_when_something_moves() {
        let mut spinning = Spinning::default();
        let start = Instant::now();
        while spinning.spin() {
            assert!(start.elapsed() < Duration::from_secs(30));
        }
        assert!(start.elapsed() >= SPINNING);
        spinning.end();
        assert!(spinning.since.is_none());
    }
}
