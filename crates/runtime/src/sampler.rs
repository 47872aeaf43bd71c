//! Which samples a rank takes at a step: a pure function, so that ranks agree without talking.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Where in its data a training is: what a checkpoint has to say about a [`Sampler`], besides the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerState {
    samples: usize,
    global_batch: usize,
    seed: u64,
    /// The epoch and step of the next batch.
    epoch: u64,
    step: usize,
}

/// Deals the samples of a data set to the ranks, each sample of an epoch once.
///
/// The order is a permutation drawn from (seed, epoch) by ChaCha8, whose output is fixed by its
/// specification: the same on every machine and in every release. Step s of an epoch takes the next
/// `global_batch` samples of it; a rank's share is a contiguous part of those, so that the union over the
/// ranks, and with it the average gradient, does not depend on the number of ranks. What does not fill a
/// global batch at the end of an epoch is left out (the permutation of the next epoch is another one).
#[derive(Clone, Debug)]
pub struct Sampler {
    samples: usize,
    global_batch: usize,
    seed: u64,
    /// The permutation of the epoch asked for last.
    epoch: u64,
    order: Vec<u32>,
}

impl Sampler {
    /// A sampler over `samples` samples in batches of `global_batch` over all ranks.
    ///
    /// # Errors
    /// [`Error::Usage`] when no batch can be filled, or with more than 2^32 samples.
    pub fn new(samples: usize, global_batch: usize, seed: u64) -> Result<Self, Error> {
        if global_batch == 0 || global_batch > samples {
            let reason = format!("a global batch of {global_batch} cannot be taken from {samples} samples");
            return Err(Error::Usage { reason });
        }
        if u32::try_from(samples).is_err() {
            return Err(Error::Usage { reason: format!("{samples} samples are more than 2^32") });
        }
        let mut sampler = Self { samples, global_batch, seed, epoch: 0, order: Vec::new() };
        sampler.order = sampler.permutation(0);
        Ok(sampler)
    }

    /// The number of full global batches in an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.samples / self.global_batch
    }

    /// The indices of `rank`'s samples at a step of an epoch.
    ///
    /// # Errors
    /// [`Error::Usage`] when the global batch does not divide evenly among the ranks (their gradients
    /// would count differently in the average), or there is no such step or rank.
    pub fn batch(
        &mut self,
        epoch: u64,
        step: usize,
        rank: usize,
        world_size: usize,
    ) -> Result<Vec<usize>, Error> {
        if rank >= world_size || step >= self.steps_per_epoch() {
            let steps = self.steps_per_epoch();
            let reason = format!("no step {step} of {steps} or no rank {rank} of {world_size}");
            return Err(Error::Usage { reason });
        }
        if !self.global_batch.is_multiple_of(world_size) {
            let reason = format!(
                "a global batch of {} does not divide evenly among {world_size} ranks; choose a multiple",
                self.global_batch
            );
            return Err(Error::Usage { reason });
        }
        if self.epoch != epoch {
            self.order = self.permutation(epoch);
            self.epoch = epoch;
        }
        let share = self.global_batch / world_size;
        let start = step * self.global_batch + rank * share;
        Ok(self.order[start..start + share].iter().map(|&index| index as usize).collect())
    }

    /// The state of a training whose next batch is that of this epoch and step. A step at the end of an epoch is the
    /// first of the next one.
    pub fn state(&self, epoch: u64, step: usize) -> SamplerState {
        let steps = self.steps_per_epoch();
        let (epoch, step) = (epoch.saturating_add((step / steps) as u64), step % steps);
        let Self { samples, global_batch, seed, .. } = *self;
        SamplerState { samples, global_batch, seed, epoch, step }
    }

    /// The epoch and step with which a training goes on that was in that state, on any number of ranks.
    ///
    /// # Errors
    /// [`Error::Usage`] when it was dealt other samples, or in other batches: counting on would leave some out and take
    /// others twice.
    pub fn resume(&self, state: &SamplerState) -> Result<(u64, usize), Error> {
        if *state != self.state(state.epoch, state.step) {
            let reason = format!(
                "the training was dealt {} samples in batches of {} with seed {}, this sampler deals {} in batches of {} \
                 with seed {}",
                state.samples, state.global_batch, state.seed, self.samples, self.global_batch, self.seed
            );
            return Err(Error::Usage { reason });
        }
        Ok((state.epoch, state.step))
    }

    /// Fisher and Yates' shuffle, in Durstenfeld's form.
    fn permutation(&self, epoch: u64) -> Vec<u32> {
        let mut numbers = ChaCha8Rng::seed_from_u64(self.seed);
        numbers.set_stream(epoch);
        let mut order: Vec<u32> = (0..self.samples as u32).collect();
        for end in (1..order.len()).rev() {
            // Multiply-shift (Lemire 2019) without its rejection: with 64 random bits for at most 2^32
            // places the bias is below 2^-32.
            let chosen = (u128::from(numbers.next_u64()) * (end as u128 + 1)) >> 64;
            order.swap(end, chosen as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_deals_each_sample_once_whatever_the_world_size() {
        for world_size in [1, 2, 4] {
            let mut sampler = Sampler::new(103, 20, 7).expect("the batch fits");
            let mut seen = vec![0; 103];
            for step in 0..sampler.steps_per_epoch() {
                for rank in 0..world_size {
                    let batch = sampler.batch(3, step, rank, world_size).expect("the batch divides");
                    batch.into_iter().for_each(|index| seen[index] += 1);
                }
            }
            assert!(seen.iter().all(|&count| count <= 1));
            assert_eq!(seen.iter().sum::<i32>(), 100);
        }
    }

    #[test]
    fn the_global_batch_is_the_same_for_every_world_size() {
        let mut sampler = Sampler::new(64, 16, 1).expect("the batch fits");
        let global = sampler.batch(1, 2, 0, 1).expect("one rank takes all");
        let parts: Vec<usize> =
            (0..4).flat_map(|rank| sampler.batch(1, 2, rank, 4).expect("the batch divides")).collect();
        assert_eq!(global, parts);
    }

    #[test]
    fn epochs_and_seeds_differ_and_the_order_is_fixed_for_ever() {
        let mut sampler = Sampler::new(8, 8, 42).expect("the batch fits");
        let first = sampler.batch(0, 0, 0, 1).expect("one rank");
        assert_ne!(first, sampler.batch(1, 0, 0, 1).expect("one rank"));
        assert_eq!(first, sampler.batch(0, 0, 0, 1).expect("one rank"), "going back gives the same");
        assert_ne!(first, Sampler::new(8, 8, 43).expect("fits").batch(0, 0, 0, 1).expect("one rank"));
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn a_training_goes_on_with_the_next_batch_and_with_no_other_sampler() {
        let sampler = Sampler::new(103, 20, 7).expect("the batch fits");
        assert_eq!(sampler.resume(&sampler.state(3, 4)), Ok((3, 4)));
        assert_eq!(sampler.resume(&sampler.state(3, 5)), Ok((4, 0)), "an epoch has 5 steps");
        for other in [Sampler::new(104, 20, 7), Sampler::new(103, 10, 7), Sampler::new(103, 20, 8)] {
            let error =
                sampler.resume(&other.expect("the batch fits").state(3, 4)).expect_err("another sampler");
            assert!(error.to_string().contains("103 in batches of 20 with seed 7"), "{error}");
        }
    }

    #[test]
    fn uneven_shares_and_steps_that_do_not_exist_are_refused() {
        let mut sampler = Sampler::new(100, 10, 0).expect("the batch fits");
        assert!(sampler.batch(0, 0, 0, 3).expect_err("10 / 3").to_string().contains("multiple"));
        assert!(sampler.batch(0, 10, 0, 1).is_err());
        assert!(sampler.batch(0, 0, 1, 1).is_err());
        assert!(Sampler::new(5, 10, 0).is_err());
        assert!(Sampler::new(5, 0, 0).is_err());
    }
}
