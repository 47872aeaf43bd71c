//! The pause before a rank that ends again and again is started again alone.

use std::collections::BTreeMap;
use std::time::Duration;

/// A process that has run so long has worked: its end is like a first one.
const WORKED: Duration = Duration::from_secs(60);

/// Pauses after the second end and after the seventh and all further ones, each twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How often each rank has ended without having worked.
#[derive(Debug, Default)]
pub struct Backoff {
    ends: BTreeMap<u32, u32>,
}

impl Backoff {
    /// The pause after an end of a rank whose process had run so long: none after the first, for others wait for it.
    pub fn pause(&mut self, rank: u32, ran: Duration) -> Duration {
        let ends = self.ends.entry(rank).or_default();
        *ends = if ran >= WORKED { 1 } else { *ends + 1 };
        match *ends {
            1 => Duration::ZERO,
            // Six doublings are beyond the longest.
            ends => (PAUSES.0 * 2u32.pow((ends - 2).min(6))).min(PAUSES.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_until_a_process_has_worked() {
        let mut backoff = Backoff::default();
        let quick = Duration::from_millis(100);
        let pauses: Vec<u64> = (0..9).map(|_| backoff.pause(0, quick).as_secs()).collect();
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(backoff.pause(1, quick), Duration::ZERO, "another rank");
        assert_eq!(backoff.pause(0, WORKED), Duration::ZERO);
        assert_eq!(backoff.pause(0, quick), PAUSES.0);
    }
}
