//! A bell: other threads ring it, the supervisor's `poll` hears it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

/// Something has changed that the supervisor should look at. Clones are the same bell.
#[derive(Debug, Clone)]
pub struct News(Arc<OwnedFd>);

impl News {
    /// A bell that has not been rung.
    ///
    /// # Errors
    /// What `eventfd` said.
    pub fn new() -> io::Result<Self> {
        Ok(News(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)))
    }

    /// Rings. Does not block.
    pub fn ring(&self) {
        // It fails when it has been rung 2^64 - 2 times since it was cleared, and then it is heard all the same.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// What to poll for reading.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Forgets what has been rung so far.
    pub fn clear(&self) {
        // It fails when it has not been rung.
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}
