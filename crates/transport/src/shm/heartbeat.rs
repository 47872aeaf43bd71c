//! Notices a rank that is alive and does not run: stopped by a signal, a debugger, a frozen container.
//!
//! A thread of each rank counts up a word in its segment and looks whether the others do so too. It
//! runs while the program computes, so a rank that is merely late is not silent. Time is counted in own
//! beats: when the whole machine sleeps, or all ranks are stopped together, nobody is silent afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

use super::segments::Segments;

/// Between two beats. A rank that waits looks at the result only, so this costs nobody any latency.
const INTERVAL: Duration = Duration::from_millis(100);

/// How many own beats a rank may miss. Shorter would take a processor shared by dozens of ranks for a stop.
const MISSED_BEATS: u32 = 20;

/// The thread, as long as it is wanted.
#[derive(Debug)]
pub(super) struct Heartbeat {
    shared: Arc<Shared>,
    thread: Thread,
}

#[derive(Debug)]
struct Shared {
    over: AtomicBool,
    /// By rank.
    silent: Vec<AtomicBool>,
}

/// What is known of one rank's beats.
#[derive(Clone, Debug, Default)]
struct Pulse {
    last: u64,
    missed: u32,
}

impl Pulse {
    /// Takes a look at the rank's word, once per own beat; says whether the rank is silent.
    fn look(&mut self, now: u64) -> bool {
        self.missed = if now == self.last { self.missed.saturating_add(1) } else { 0 };
        self.last = now;
        self.missed >= MISSED_BEATS
    }
}

impl Heartbeat {
    pub(super) fn start(segments: Arc<Segments>) -> std::io::Result<Self> {
        let world_size = segments.world_size();
        let silent = (0..world_size).map(|_| AtomicBool::new(false)).collect();
        let shared = Arc::new(Shared { over: AtomicBool::new(false), silent });
        let theirs = shared.clone();
        let handle = thread::Builder::new().name("paceline-heartbeat".to_owned()).spawn(move || {
            let mut pulses = vec![Pulse::default(); world_size];
            while !theirs.over.load(Ordering::Acquire) {
                segments.beat();
                for (rank, pulse) in pulses.iter_mut().enumerate() {
                    theirs.silent[rank].store(pulse.look(segments.heartbeat(rank)), Ordering::Relaxed);
                }
                thread::park_timeout(INTERVAL);
            }
        })?;
        Ok(Self { shared, thread: handle.thread().clone() })
    }

    /// For how long a rank has been silent at least, if it counts as such.
    pub(super) fn silence(&self, rank: usize) -> Option<Duration> {
        self.shared.silent[rank].load(Ordering::Relaxed).then_some(INTERVAL * MISSED_BEATS)
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_is_silent_after_enough_of_our_own_beats_and_no_longer_once_it_beats() {
        let mut pulse = Pulse::default();
        assert!(!pulse.look(1));
        let silent: Vec<bool> = (0..MISSED_BEATS).map(|_| pulse.look(1)).collect();
        assert_eq!(silent.iter().position(|&silent| silent), Some(MISSED_BEATS as usize - 1));
        assert!(!pulse.look(2));
    }
}
