//! Buffers that are used again. A gradient of 25 MiB from fresh memory costs thousands of page faults, on every worker and
//! several times in each step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::program::Gradient;

/// The most buffers that are kept: a step has an input and a result, and so has the one before.
const KEPT_LIMIT: usize = 6;

/// Buffers of one length. Shared by the threads of a worker.
#[derive(Debug)]
pub(super) struct Pool<G> {
    len: usize,
    kept: Mutex<Vec<Vec<G>>>,
}

impl<G: Gradient> Pool<G> {
    pub(super) fn new(len: usize) -> Arc<Self> {
        Arc::new(Self { len, kept: Mutex::default() })
    }

    /// A buffer with any elements.
    pub(super) fn take(&self) -> Vec<G> {
        let kept = self.lock().pop();
        kept.unwrap_or_else(|| self.fresh())
    }

    /// A buffer of zeros.
    pub(super) fn take_zeroed(&self) -> Vec<G> {
        let kept = self.lock().pop();
        kept.map_or_else(
            || self.fresh(),
            |mut buffer| {
                buffer.fill(G::default());
                buffer
            },
        )
    }

    fn fresh(&self) -> Vec<G> {
        vec![G::default(); self.len]
    }

    /// Takes a buffer back, unless somebody still reads it.
    pub(super) fn give(&self, buffer: Arc<Vec<G>>) {
        let Some(buffer) = Arc::into_inner(buffer).filter(|buffer| buffer.len() == self.len) else { return };
        let mut kept = self.lock();
        if kept.len() < KEPT_LIMIT {
            kept.push(buffer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<G>>> {
        // Buffers are put in and taken out whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_somebody_reads_is_not_used_again() {
        let pool = Pool::<f32>::new(3);
        let read = Arc::new(vec![1.0, 2.0, 3.0]);
        pool.give(read.clone());
        assert_eq!(pool.take_zeroed(), [0.0; 3]);
        pool.give(read);
        assert_eq!(pool.take(), [1.0, 2.0, 3.0]);
        pool.give(Arc::new(vec![1.0; 3]));
        assert_eq!(pool.take_zeroed(), [0.0; 3]);
    }
}
