//! How a rank waits for another: spin, yield, sleep.
//!
//! A parked thread takes some 45 µs to wake on a virtual machine and a flag crosses a cache in 0.05 µs,
//! so short waits must not park. But spinning while more ranks than processors can run keeps the very
//! rank off its processor that is waited for: MPICH's barrier takes 18 ms with 4 ranks on 2 processors
//! that way and OpenMPI's, which yields, 5 µs.

use std::thread;
use std::time::{Duration, Instant};

use super::segments::Segments;

/// Pauses before the first yield when every rank has a processor: some 2 µs, which most answers take less
/// than. A yield costs little when nobody else wants to run, and everything when a busy machine has put
/// two ranks on one processor.
const SPINS: u32 = 100;

/// Yields before sleeping. A yield takes 0.3 µs when nobody else wants to run, and as long as the others
/// like when they do.
const YIELDS: u32 = 300;

/// How long yields may take together. On a processor that others want, each takes a slice of theirs, some
/// 4 ms: all [`YIELDS`] of them took 1.2 s beside a compiler, in which a rank heard no news.
const LONGEST_YIELDING: Duration = Duration::from_millis(1);

/// The first and the longest sleep. What rings no bell is noticed after one of them: a missed wake-up,
/// news on the network. Long enough to cost a waiting rank about 1 % of a processor.
const SLEEPS: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(2));

/// Where a rank is in its present wait.
#[derive(Debug)]
pub(super) struct Waiting {
    /// How many pauses come before the yields; none when ranks must share processors.
    spins: u32,
    calls: u32,
    yielding_since: Option<Instant>,
    announced: Option<u32>,
    sleep: Duration,
}

impl Waiting {
    pub(super) fn new(segments: &Segments) -> Self {
        let spins = if segments.ranks_fit() { SPINS } else { 0 };
        Self { spins, calls: 0, yielding_since: None, announced: None, sleep: SLEEPS.0 }
    }

    /// Whether it is too early to look for anything but what is waited for; passes a moment.
    #[inline]
    pub(super) fn spin(&mut self) -> bool {
        if self.calls < self.spins {
            self.calls += 1;
            std::hint::spin_loop();
            return true;
        }
        if self.calls < self.spins + YIELDS {
            self.calls += 1;
            let since = *self.yielding_since.get_or_insert_with(Instant::now);
            thread::yield_now();
            if since.elapsed() > LONGEST_YIELDING {
                self.calls = self.spins + YIELDS;
            }
            return true;
        }
        false
    }

    /// Passes the next moment, `longest` at most. The caller looks at everything between two calls: the
    /// first only announces the sleep that the second enters.
    pub(super) fn pass(&mut self, segments: &Segments, longest: Duration) {
        match self.announced.take() {
            None => self.announced = Some(segments.announce_sleep()),
            Some(bell) => {
                segments.sleep(bell, self.sleep.min(longest));
                segments.end_sleep();
                self.sleep = (self.sleep * 2).min(SLEEPS.1);
            }
        }
    }

    /// What was waited for has come.
    #[inline]
    pub(super) fn end(&mut self, segments: &Segments) {
        if self.calls > 0 {
            self.calls = 0;
            self.yielding_since = None;
            if self.announced.take().is_some() {
                segments.end_sleep();
            }
            self.sleep = SLEEPS.0;
        }
    }
}
