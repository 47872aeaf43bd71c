//! The recorder's clock: counts of the processor, made times of day when somebody reads them.
//!
//! A small collective takes less than half a microsecond, and reading the system's clock takes 23 ns (x86-64, measured
//! on a virtual machine on 2026-11-30); the processor's counter takes 10. It is used where the processor says that it
//! runs at one rate whatever the processor does, elsewhere the monotonic clock's nanoseconds are.

use std::sync::OnceLock;
#[cfg(target_arch = "x86_64")]
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// The counter now; never 0.
#[inline]
pub(crate) fn now() -> u64 {
    counter() | 1
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn counter() -> u64 {
    if STEADY.load(Ordering::Relaxed) != YES && !is_steady() {
        return nanoseconds();
    }
    // SAFETY: every x86-64 processor has the instruction, and it touches no memory. Where a kernel forbids it to
    // programs (PR_SET_TSC), the process gets a signal, as it would from the system's own clock.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline]
fn counter() -> u64 {
    nanoseconds()
}

/// What [`is_steady`] found out: [`YES`], [`NO`], or nothing yet.
#[cfg(target_arch = "x86_64")]
static STEADY: AtomicU8 = AtomicU8::new(0);
#[cfg(target_arch = "x86_64")]
const YES: u8 = 1;
#[cfg(target_arch = "x86_64")]
const NO: u8 = 2;

/// Whether the counter's rate never changes, nor does it stop: "invariant TSC", in Intel's manual, volume 3, 19.17.
#[cfg(target_arch = "x86_64")]
#[cold]
fn is_steady() -> bool {
    use std::arch::x86_64::__cpuid;
    if STEADY.load(Ordering::Relaxed) == 0 {
        let steady = __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx >> 8 & 1 == 1;
        STEADY.store(if steady { YES } else { NO }, Ordering::Relaxed);
    }
    STEADY.load(Ordering::Relaxed) == YES
}

#[cold]
fn nanoseconds() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// A count and the time of day at the same moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) ticks: u64,
    pub(crate) time: SystemTime,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { ticks: now(), time: SystemTime::now() }
    }

    /// The time of day at `ticks`, by this moment and a later one; counts outside of the two are taken for the nearer.
    pub(crate) fn time_at(self, later: Self, ticks: u64) -> SystemTime {
        let (all, part) = (later.ticks.saturating_sub(self.ticks), ticks.saturating_sub(self.ticks));
        let elapsed = later.time.duration_since(self.time).unwrap_or_default();
        let share = if all == 0 { 0.0 } else { (part as f64 / all as f64).min(1.0) };
        self.time + Duration::from_nanos((elapsed.as_nanos() as f64 * share) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_between_two_moments_is_a_time_between_them() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let (first, last) = (
            Moment { ticks: 500, time: start },
            Moment { ticks: 2500, time: start + Duration::from_secs(1) },
        );
        let after = |ticks| first.time_at(last, ticks).duration_since(start).expect("not before it");
        assert_eq!(after(500), Duration::ZERO);
        assert_eq!(after(1500), Duration::from_millis(500));
        assert_eq!([after(0), after(9999)], [Duration::ZERO, Duration::from_secs(1)]);
        assert_eq!(first.time_at(first, 500), start, "no time has passed");
    }

    #[test]
    fn the_counter_does_not_go_back() {
        let counts: Vec<u64> = (0..1000).map(|_| now()).collect();
        assert!(counts.is_sorted() && counts[0] > 0);
    }
}
