//! The flag protocol: when a rank may write where others read.
//!
//! Ranks go through steps together. In a step every rank writes what it has for the others into one of
//! its two halves, publishes the step, waits until all others have published theirs, and then reads what
//! they have. It does not wait until the others have read: it goes on to the next step, which has the
//! other half. So one wait per step is enough, for this reason: a rank writes half h again in step s + 2
//! only after it has seen all others publish step s + 1, and a rank publishes step s + 1 only after it
//! has done with reading step s.
//!
//! What a rank writes *while reading* step s (results that are read in step s + 1) has two halves too,
//! and the same holds one step later: it is written again while reading step s + 2, after all others
//! have published s + 2, and so have done with reading s + 1.
//!
//! Publishing is a store with release and seeing it a load with acquire; there is no other
//! synchronisation. The loom model at the end of this file checks thousands of interleavings of small groups
//! for a byte that is read and written at once.

/// Where steps are published: shared memory, or loom's atomics in the model.
pub(crate) trait Flags {
    /// Makes everything this rank has written visible to whoever sees `step` of it.
    fn publish(&self, step: u64);

    /// Whether `rank` has published `step`. If so, everything that it wrote before is visible.
    fn has_published(&self, rank: usize, step: u64) -> bool;
}

/// A rank's count of the steps it has entered.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    current: u64,
}

/// One of the two halves, and how a cell or a staging area is told from its twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Half(pub(crate) usize);

impl Half {
    /// The half of the step before, and of the step after.
    pub(crate) fn other(self) -> Self {
        Self(1 - self.0)
    }
}

impl Steps {
    /// Enters the next step. Its half may be written from now on, if all others were seen to have
    /// published the step before.
    #[inline]
    pub(crate) fn enter(&mut self) -> Half {
        self.current += 1;
        Half((self.current & 1) as usize)
    }

    /// Publishes the step that was entered.
    #[inline]
    pub(crate) fn publish(&self, flags: &impl Flags) {
        flags.publish(self.current);
    }

    /// Whether `rank` has published the step that this rank has entered.
    #[inline]
    pub(crate) fn has_come(&self, flags: &impl Flags, rank: usize) -> bool {
        flags.has_published(rank, self.current)
    }

    /// Whether `rank` has published the step after the one that this rank has entered last.
    pub(crate) fn is_ahead(&self, flags: &impl Flags, rank: usize) -> Option<Half> {
        let next = self.current + 1;
        flags.has_published(rank, next).then_some(Half((next & 1) as usize))
    }
}

#[cfg(test)]
mod model {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::sync::atomic::{AtomicU64, Ordering};
    use loom::thread;

    use super::*;

    /// What a rank shares: two flags, two halves to stage in, two halves for results.
    struct Rank {
        flags: [AtomicU64; 2],
        staged: [UnsafeCell<u64>; 2],
        results: [UnsafeCell<u64>; 2],
    }

    struct Group {
        own: usize,
        ranks: Arc<Vec<Rank>>,
    }

    impl Flags for Group {
        fn publish(&self, step: u64) {
            self.ranks[self.own].flags[(step & 1) as usize].store(step, Ordering::Release);
        }

        fn has_published(&self, rank: usize, step: u64) -> bool {
            self.ranks[rank].flags[(step & 1) as usize].load(Ordering::Acquire) == step
        }
    }

    impl Group {
        fn wait(&self, steps: &Steps) {
            for rank in (0..self.ranks.len()).filter(|&rank| rank != self.own) {
                while !steps.has_come(self, rank) {
                    thread::yield_now();
                }
            }
        }

        /// As an all_reduce by owners does it: stages, and reads what the others staged; leaves a result,
        /// which the others read a step later.
        fn run(&self, count: u64, waits: bool) {
            let mut steps = Steps::default();
            for step in 1..=count {
                let half = steps.enter();
                // SAFETY: loom fails the model if anybody else has access now.
                self.ranks[self.own].staged[half.0].with_mut(|staged| unsafe { *staged = step });
                steps.publish(self);
                if waits {
                    self.wait(&steps);
                }
                for rank in &*self.ranks {
                    // SAFETY: as above.
                    rank.staged[half.0].with(|staged| assert_eq!(unsafe { *staged }, step));
                    if step > 1 {
                        // SAFETY: as above.
                        rank.results[half.other().0].with(|result| assert_eq!(unsafe { *result }, step - 1));
                    }
                }
                // SAFETY: as above.
                self.ranks[self.own].results[half.0].with_mut(|result| unsafe { *result = step });
            }
        }
    }

    fn check(world_size: usize, count: u64, preemptions: usize, waits: bool) {
        let mut model = loom::model::Builder::new();
        // More switches than these between ready threads are not tried.
        model.preemption_bound = Some(preemptions);
        // Seconds instead of hours: the model is a sample, bounded here and by the preemptions.
        model.max_permutations = Some(20_000);
        // Waiting counts as branching.
        model.max_branches = 100_000;
        model.check(move || {
            let new = |_| Rank {
                flags: [AtomicU64::new(0), AtomicU64::new(0)],
                staged: [UnsafeCell::new(0), UnsafeCell::new(0)],
                results: [UnsafeCell::new(0), UnsafeCell::new(0)],
            };
            // Not loom's: it panics while it is dropped after a model has failed, which one should.
            #[allow(clippy::arc_with_non_send_sync, reason = "loom runs its threads one at a time")]
            let ranks = Arc::new((0..world_size).map(new).collect::<Vec<_>>());
            let others: Vec<_> = (1..world_size)
                .map(|own| {
                    let group = Group { own, ranks: ranks.clone() };
                    thread::spawn(move || group.run(count, waits))
                })
                .collect();
            Group { own: 0, ranks }.run(count, waits);
            for other in others {
                other.join().expect("no rank panics");
            }
        });
    }

    #[test]
    fn two_ranks_never_read_what_is_being_written() {
        check(2, 4, 3, true);
    }

    #[test]
    fn three_ranks_never_read_what_is_being_written() {
        check(3, 2, 1, true);
    }

    #[test]
    #[should_panic(expected = "")]
    fn the_model_catches_a_rank_that_does_not_wait() {
        check(2, 2, 1, false);
    }
}
