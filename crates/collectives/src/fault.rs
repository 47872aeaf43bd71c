//! Bad news from outside: how the owner of a communicator ends an operation that another thread is in.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// Ends operations of one communicator from any thread.
///
/// The data plane sees a broken link by itself, but not a peer that was killed and fell silent: that is
/// for whoever watches the processes (the launcher, through the runtime) to say. Cheap to clone;
/// outliving the communicator is harmless.
#[derive(Clone, Debug)]
pub struct Interrupter {
    pub(crate) fault: Arc<Fault>,
}

impl Interrupter {
    /// Says that a rank is dead, with the reason in words ("was killed by signal 9 (SIGKILL)").
    ///
    /// The running operation, or the next, ends in [`Error::PeerLost`](crate::Error::PeerLost) naming
    /// the rank, unless it has left in order. Does not block.
    pub fn peer_lost(&self, rank: usize, reason: &str) {
        self.fault.raise(|news| news.lost.push((rank, reason.to_owned())));
    }

    /// Ends the running operation, or the next, in
    /// [`Error::Interrupted`](crate::Error::Interrupted). The first reason is kept. Does not block.
    pub fn interrupt(&self, reason: &str) {
        self.fault.raise(|news| {
            news.interrupted.get_or_insert_with(|| reason.to_owned());
        });
    }
}

/// The mailbox between an [`Interrupter`] and the engine.
#[derive(Debug)]
pub(crate) struct Fault {
    raised: AtomicBool,
    news: Mutex<News>,
    waker: Waker,
}

/// What was said and not yet dealt with.
#[derive(Debug, Default)]
pub(crate) struct News {
    pub(crate) lost: Vec<(usize, String)>,
    pub(crate) interrupted: Option<String>,
}

impl Fault {
    pub(crate) fn new(waker: Waker) -> Self {
        Self { raised: AtomicBool::new(false), news: Mutex::default(), waker }
    }

    /// Takes the news, if there is any; one load of an atomic if not.
    pub(crate) fn take(&self) -> Option<News> {
        if !self.raised.load(Ordering::Acquire) {
            return None;
        }
        let mut news = self.lock();
        self.raised.store(false, Ordering::Release);
        Some(std::mem::take(&mut *news))
    }

    fn raise(&self, change: impl FnOnce(&mut News)) {
        let mut news = self.lock();
        change(&mut news);
        self.raised.store(true, Ordering::Release);
        drop(news);
        self.waker.wake_by_ref();
    }

    fn lock(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
