//! Keeps the log readable while strangers knock.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Warnings about refused connections in a second. The rest are counted: whoever connects ten thousand
/// times must not fill the disk with it.
const WARNINGS_PER_SECOND: u32 = 20;

/// What an endpoint says about connections that it refuses.
#[derive(Debug)]
pub(crate) struct Warnings(Mutex<Budget>);

#[derive(Debug)]
struct Budget {
    second: Instant,
    said: u32,
    unsaid: u32,
}

impl Warnings {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Budget { second: Instant::now(), said: 0, unsaid: 0 }))
    }

    /// Logs that `remote` was refused, or counts it for the next line.
    pub(crate) fn warn(&self, remote: SocketAddr, reason: &str) {
        // Numbers stay numbers whatever happened to another holder.
        let mut budget = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match budget.may_say(Instant::now()) {
            Some(0) => tracing::warn!(%remote, reason, "refused a connection"),
            Some(unsaid) => tracing::warn!(%remote, reason, unsaid, "refused a connection"),
            None => {}
        }
    }
}

impl Budget {
    /// Whether another warning may be said now, and how many were not since the last one.
    fn may_say(&mut self, now: Instant) -> Option<u32> {
        if now.saturating_duration_since(self.second) >= Duration::from_secs(1) {
            (self.second, self.said) = (now, 0);
        }
        if self.said >= WARNINGS_PER_SECOND {
            self.unsaid = self.unsaid.saturating_add(1);
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_is_counted_and_not_logged_one_by_one() {
        let start = Instant::now();
        let mut budget = Budget { second: start, said: 0, unsaid: 0 };
        let said = (0..1000).filter(|_| budget.may_say(start).is_some()).count();
        assert_eq!(said, WARNINGS_PER_SECOND as usize);
        assert_eq!(budget.may_say(start + Duration::from_secs(1)), Some(1000 - WARNINGS_PER_SECOND));
        assert_eq!(budget.may_say(start + Duration::from_secs(1)), Some(0));
    }
}
