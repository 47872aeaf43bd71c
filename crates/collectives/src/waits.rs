//! Who was waited for, and for how long.
//!
//! A rank that others wait for delays the whole job, and nothing fails: only a number says so. Time counts
//! that a rank was parked; a wait that ends before is nothing to report.

use std::time::{Duration, Instant};

/// From here on one operation's wait for one rank is worth a warning: the pace of a job with such steps.
const LATE: Duration = Duration::from_secs(1);

/// The time between two such warnings: a rank that is always late is said to be once in a while.
const QUIET: Duration = Duration::from_secs(30);

/// The waits of one rank for the others.
#[derive(Debug)]
pub(crate) struct Waits {
    /// By rank, since the start.
    total: Vec<Duration>,
    /// By rank, in this operation.
    now: Vec<Duration>,
    /// Whether there is anything in `now`.
    waited: bool,
    warned_at: Option<Instant>,
}

impl Waits {
    /// Nobody was waited for yet.
    pub(crate) fn new(world_size: usize) -> Self {
        let none = vec![Duration::ZERO; world_size];
        Self { total: none.clone(), now: none, waited: false, warned_at: None }
    }

    /// All of `ranks` were waited for, for so long.
    pub(crate) fn add(&mut self, ranks: &[usize], waited: Duration) {
        self.waited = true;
        for &rank in ranks {
            self.now[rank] += waited;
        }
    }

    /// An operation has ended: who was late in it, if it is time to say so.
    #[inline]
    pub(crate) fn end(&mut self) -> Option<(usize, Duration)> {
        if self.waited { self.sum_up() } else { None }
    }

    #[cold]
    fn sum_up(&mut self) -> Option<(usize, Duration)> {
        self.waited = false;
        let latest = (0..self.now.len()).max_by_key(|&rank| self.now[rank])?;
        let waited = self.now[latest];
        for (total, now) in self.total.iter_mut().zip(&mut self.now) {
            *total += std::mem::take(now);
        }
        let quiet = self.warned_at.is_some_and(|at| at.elapsed() < QUIET);
        if waited < LATE || quiet {
            return None;
        }
        self.warned_at = Some(Instant::now());
        Some((latest, waited))
    }

    /// How long each rank was waited for since the start.
    pub(crate) fn by_rank(&self) -> &[Duration] {
        &self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_that_was_waited_for_longest_is_named_once_in_a_while() {
        let second = Duration::from_secs(1);
        let mut waits = Waits::new(3);
        waits.add(&[1, 2], second / 2);
        assert_eq!(waits.end(), None, "not long enough");
        waits.add(&[1, 2], second);
        waits.add(&[2], second);
        assert_eq!(waits.end(), Some((2, 2 * second)));
        waits.add(&[1], 3 * second);
        assert_eq!(waits.end(), None, "it was said a moment ago");
        assert_eq!(waits.end(), None);
        assert_eq!(waits.by_rank(), [Duration::ZERO, 9 * second / 2, 5 * second / 2]);
    }
}
