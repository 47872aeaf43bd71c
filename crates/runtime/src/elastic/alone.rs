//! Training in one process without a launcher: all slots, no membership.

use std::sync::Arc;

use super::program::{Gradient, Program, Stable};
use super::saver::Saving;
use super::training::Training;
use super::{Config, End, Stop, draw, sum};
use crate::Error;
use crate::checkpoint::{Group, StableStep};
use crate::membership::{Epoch, Slot};

/// There is one view.
const EPOCH: Epoch = Epoch(1);

/// See [`train`](super::train).
pub(super) fn train<P: Program>(config: &Config, program: &mut P, stop: &Stop) -> Result<End, Error> {
    let slots: Vec<Slot> = (0..config.slots.unwrap_or(1)).collect();
    let mut training = Training::new(program, config, slots.len() as u16)?;
    let group = Group { rank: 0, world_size: 1, run: draw().0 as u64 };
    let present = slots.iter().copied().collect();
    let mut state = training.resume()?;
    loop {
        let inputs = training.inputs(state.applied, &slots)?;
        if inputs.saving == Saving::Ready {
            training.checkpoint(StableStep::of_one(state.applied.0), state.lineage, group);
        }
        let contributors = (slots.len() - inputs.idle.len()) as u16;
        let of_slots: Vec<Arc<Vec<P::Gradient>>> = inputs.of.into_iter().map(|(_, input)| input).collect();
        let mean = sum::mean_here(&of_slots, contributors, training.input_len());
        training.apply(&mean, &present);
        state = state.after(EPOCH);
        let end = match training.is_closed() {
            true => Some(End::Complete),
            false => stop.is_requested().then_some(End::Left),
        };
        if let Some(end) = end {
            training.finish_saving();
            return Ok(end);
        }
        let loss = mean.last().map(|loss| loss.to_f64());
        let (members, contributors) = (1, 1);
        let step = state.applied;
        let stable = Stable { step, epoch: EPOCH, members, contributors, loss, control_messages: 0 };
        training.program().stable(&stable);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::super::program::Tensor;
    use super::*;
    use crate::checkpoint::{self, Listing, LocalDisk};

    /// Its state depends on the order and the number of all samples; leaves when it has made so many steps.
    struct Sum {
        state: Vec<f64>,
        steps: Vec<u64>,
        leaves_after: u64,
        stop: Stop,
    }

    impl Program for Sum {
        type Gradient = f64;

        fn gradient_len(&self) -> usize {
            2
        }

        fn state(&mut self) -> Vec<Tensor<'_>> {
            vec![Tensor::new("state", &mut self.state), Tensor::new("steps", &mut self.steps)]
        }

        fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
            gradient[0] = samples.iter().map(|&sample| (sample as f64).sqrt() * self.state[0]).sum();
            gradient[1] = samples.len() as f64;
            gradient[0]
        }

        fn apply(&mut self, gradient: &[f64]) {
            self.state[0] = 0.9 * self.state[0] + 1e-3 * gradient[0];
            self.state[1] += gradient[1];
            self.steps[0] += 1;
            if self.steps[0] == self.leaves_after {
                self.stop.request();
            }
        }
    }

    fn config(folder: Option<&Path>, slots: u16) -> Config {
        let mut config = Config::new(240, 8);
        (config.slots, config.passes, config.seed) = (Some(slots), 2, 3);
        (config.checkpoint, config.checkpoint_every) = (folder.map(Path::to_owned), 4);
        config
    }

    /// The state at the end of a training that leaves after so many steps, or does not.
    fn end(config: &Config, leaves_after: u64) -> Result<(End, Vec<f64>, u64), Error> {
        let (state, stop) = (vec![1.0, 0.0], Stop::new());
        let mut program = Sum { state, steps: vec![0], leaves_after, stop: stop.clone() };
        let end = train(config, &mut program, &stop)?;
        Ok((end, program.state, program.steps[0]))
    }

    const STAYS: u64 = 0;

    #[test]
    fn a_training_goes_on_from_its_newest_checkpoint_and_ends_with_the_bits_of_an_undisturbed_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let undisturbed = end(&config(None, 3), STAYS).expect("nothing is wrong");
        let with_folder = config(Some(folder.path()), 3);
        // The checkpoint of step 4 is being written, and is waited for.
        assert_eq!(end(&with_folder, 6).expect("nothing is wrong").0, End::Left);
        assert_eq!(end(&with_folder, STAYS), Ok(undisturbed.clone()));
        let listing = Listing::of(&LocalDisk, folder.path()).expect("it can be read");
        let steps: Vec<u64> = listing.committed.iter().map(|checkpoint| checkpoint.step).collect();
        assert_eq!((steps[0], listing.unfinished), (undisturbed.2, 0), "the last state is there too");
        assert_eq!(end(&with_folder, STAYS), Ok(undisturbed), "and a training from it is complete");
    }

    #[test]
    fn a_damaged_checkpoint_is_named_and_a_training_goes_on_from_the_one_before_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let with_folder = config(Some(folder.path()), 3);
        let first = end(&with_folder, STAYS).expect("nothing is wrong");
        let newest = Listing::of(&LocalDisk, folder.path()).expect("it can be read").committed[0].clone();
        let shard = folder.path().join(newest.to_string()).join("shard-00000-of-00001.safetensors");
        let mut bytes = fs::read(&shard).expect("it is there");
        *bytes.last_mut().expect("it has elements") ^= 1;
        fs::write(&shard, bytes).expect("it can be written");
        // Without a checkpoint of its own, by which the damaged one would be removed.
        let saves_nothing = Config { checkpoint_every: 1_000, ..with_folder.clone() };
        let left = end(&saves_nothing, first.2 - 2).expect("nothing is wrong");
        assert_eq!((left.0, left.2), (End::Left, first.2 - 2), "it went on from an earlier step");
        assert!(folder.path().join(format!("rejected-{newest}")).exists());
        assert_eq!(end(&with_folder, STAYS), Ok(first));
        let listing = Listing::of(&LocalDisk, folder.path()).expect("it can be read");
        assert!(listing.rejected.is_empty() && listing.committed[0].step == newest.step, "{listing:?}");
    }

    #[test]
    fn a_checkpoint_of_other_data_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        end(&config(Some(folder.path()), 3), 5).expect("nothing is wrong");
        let other = Config { seed: 4, ..config(Some(folder.path()), 3) };
        let refused = end(&other, STAYS);
        assert!(
            matches!(&refused, Err(Error::Usage { reason }) if reason.contains("with seed 3")),
            "{refused:?}"
        );
        let foreign = Config { samples: 120, ..config(Some(folder.path()), 3) };
        assert!(matches!(end(&foreign, STAYS), Err(Error::Usage { .. })));
    }

    #[test]
    fn a_checkpoint_of_another_model_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        end(&config(Some(folder.path()), 3), 5).expect("nothing is wrong");
        let (state, stop) = (vec![1.0; 3], Stop::new());
        let mut program = Sum { state, steps: vec![0], leaves_after: STAYS, stop: stop.clone() };
        let refused = train(&config(Some(folder.path()), 3), &mut program, &stop);
        let is_other = matches!(refused, Err(Error::Checkpoint(checkpoint::Error::OtherModel { .. })));
        assert!(is_other, "{refused:?}");
    }
}
