//! How a program is asked to leave.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Asks a training to leave, from any thread, for example one that waits for signals; not from a signal handler, since it
/// takes a lock. Clones ask the same one.
///
/// A worker that is asked goes when all others are known to have its state, so that nobody waits for it or loses
/// anything; they go on without it. The last one does not go before the end.
#[derive(Clone, Default)]
pub struct Stop(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    requested: bool,
    tell: Option<Box<dyn Fn() + Send>>,
}

impl Stop {
    /// Nobody has been asked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks. Does not block, and may be said again.
    pub fn request(&self) {
        let mut state = self.lock();
        state.requested = true;
        state.tell.iter().for_each(|tell| tell());
    }

    pub(super) fn is_requested(&self) -> bool {
        self.lock().requested
    }

    /// Calls `tell` when it is asked, at once if it has been.
    pub(super) fn on_request(&self, tell: impl Fn() + Send + 'static) {
        let mut state = self.lock();
        if state.requested {
            tell();
        }
        state.tell = Some(Box::new(tell));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Both fields are replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stop").field("requested", &self.is_requested()).finish()
    }
}
