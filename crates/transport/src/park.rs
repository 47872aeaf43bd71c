//! Parking a thread until a waker fires, with memory for one wake-up.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

/// A place where one thread at a time waits and any thread wakes it.
///
/// A wake-up that comes while nobody waits is kept and ends the next [`wait`](Parker::wait) at once;
/// several of them count as one. The waiting thread may change between waits (a communicator is used
/// by its caller and by its progress thread in turn), which is why this is not just `thread::park`.
#[derive(Debug, Default)]
pub struct Parker {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    woken: AtomicBool,
    sleeper: Mutex<Option<Thread>>,
}

impl Parker {
    /// A parker nobody has woken yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A waker for this parker. Waking is cheap when nobody waits.
    pub fn waker(&self) -> Waker {
        Waker::from(self.shared.clone())
    }

    /// Waits until a waker fires or `until` has passed. May return early.
    pub fn wait(&self, until: Instant) {
        if self.shared.woken.swap(false, Ordering::AcqRel) {
            return;
        }
        *self.shared.lock() = Some(thread::current());
        // A wake-up between the check above and the registration found no sleeper to unpark: look again.
        while !self.shared.woken.swap(false, Ordering::AcqRel) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::park_timeout(left);
        }
        *self.shared.lock() = None;
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Thread>> {
        // The guarded value is a handle that is replaced whole: a panic cannot leave it half written.
        self.sleeper.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::AcqRel)
            && let Some(thread) = self.lock().as_ref()
        {
            thread.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_wake_up_before_the_wait_is_remembered_once() {
        let parker = Parker::new();
        parker.waker().wake();
        parker.waker().wake();
        let start = Instant::now();
        parker.wait(start + Duration::from_secs(60));
        assert!(start.elapsed() < Duration::from_secs(30));
        let until = Instant::now() + Duration::from_millis(20);
        parker.wait(until);
        assert!(Instant::now() >= until, "the second wake-up must not be left over");
    }

    #[test]
    fn a_wake_up_from_another_thread_ends_the_wait() {
        let parker = Parker::new();
        for _ in 0..1000 {
            let waker = parker.waker();
            let helper = thread::spawn(move || waker.wake());
            let start = Instant::now();
            parker.wait(start + Duration::from_secs(60));
            assert!(start.elapsed() < Duration::from_secs(30));
            helper.join().expect("the waking thread does not panic");
        }
    }
}
