//! The handle of a started operation.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::error::Error;

/// An operation that runs on the progress thread, and the buffer it owns meanwhile.
///
/// [`wait`](Work::wait) blocks, or the handle is awaited as a future on any executor; both give the
/// buffer back with the result in it. Dropping the handle is safe and does not block: the operation
/// goes on, since the other ranks need this rank's part, and its buffer is freed when it is done.
#[must_use = "the result, and any error, comes from waiting"]
pub struct Work<T> {
    slot: Arc<Slot<T>>,
}

/// Where the progress thread leaves the outcome.
pub(crate) struct Slot<T> {
    state: Mutex<State<T>>,
    done: Condvar,
}

enum State<T> {
    Running(Option<Waker>),
    Done(Result<Vec<T>, Error>),
    Taken,
}

impl<T> Work<T> {
    pub(crate) fn new() -> (Self, Arc<Slot<T>>) {
        let slot = Arc::new(Slot { state: Mutex::new(State::Running(None)), done: Condvar::new() });
        (Self { slot: slot.clone() }, slot)
    }

    /// Whether [`wait`](Work::wait) would return at once.
    pub fn is_done(&self) -> bool {
        !matches!(*self.slot.lock(), State::Running(_))
    }

    /// Blocks until the operation has ended and gives back its buffer, with the result in it.
    ///
    /// The wait is bounded by the communicator's timeout for each operation queued before this one and
    /// for this one.
    ///
    /// # Errors
    /// The operation's [`Error`]; the buffer is gone then.
    ///
    /// # Panics
    /// If the handle was polled to completion as a future before.
    pub fn wait(self) -> Result<Vec<T>, Error> {
        let mut state = self.slot.lock();
        loop {
            match std::mem::replace(&mut *state, State::Taken) {
                State::Done(outcome) => return outcome,
                State::Taken => panic!("a Work was waited for after it had given its buffer back"),
                running @ State::Running(_) => *state = running,
            }
            state = self.slot.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Future for Work<T> {
    type Output = Result<Vec<T>, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.slot.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Done(outcome) => Poll::Ready(outcome),
            State::Taken => panic!("a Work was polled after it had given its buffer back"),
            State::Running(_) => {
                *state = State::Running(Some(context.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl<T> fmt::Debug for Work<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("done", &self.is_done()).finish_non_exhaustive()
    }
}

impl<T> Slot<T> {
    /// Leaves the outcome and wakes whoever waits for it.
    pub(crate) fn complete(&self, outcome: Result<Vec<T>, Error>) {
        let before = std::mem::replace(&mut *self.lock(), State::Done(outcome));
        self.done.notify_all();
        if let State::Running(Some(waker)) = before {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
