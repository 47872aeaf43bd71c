//! Who wants to know that a round of an operation begins: tests that fail in the middle of one.

use std::fmt;
use std::sync::Arc;

/// Called before each round of an operation with its number. Clones call the same one.
#[derive(Clone)]
pub(crate) struct RoundObserver(Arc<dyn Fn(usize) + Send + Sync>);

impl RoundObserver {
    pub(crate) fn new(observer: impl Fn(usize) + Send + Sync + 'static) -> Self {
        Self(Arc::new(observer))
    }

    #[cold]
    pub(crate) fn call(&self, round: usize) {
        (self.0)(round);
    }
}

impl fmt::Debug for RoundObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RoundObserver")
    }
}
