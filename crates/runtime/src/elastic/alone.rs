//! Training in one process without a launcher: all slots, no membership.

use std::sync::Arc;

use super::program::{Gradient, Program, Stable};
use super::training::Training;
use super::{Config, End, Stop, sum};
use crate::Error;
use crate::membership::{Epoch, Slot, Step};

/// See [`train`](super::train).
pub(super) fn train<P: Program>(config: &Config, program: &mut P, stop: &Stop) -> Result<End, Error> {
    let slots: Vec<Slot> = (0..config.slots.unwrap_or(1)).collect();
    let mut training = Training::new(program, config.batches()?, slots.len() as u16);
    let present = slots.iter().copied().collect();
    for step in 1.. {
        let inputs = training.inputs(&slots)?;
        let contributors = (slots.len() - inputs.idle.len()) as u16;
        let of_slots: Vec<Arc<Vec<P::Gradient>>> = inputs.of.into_iter().map(|(_, input)| input).collect();
        let mean = sum::mean_here(&of_slots, contributors, training.input_len());
        training.apply(&mean, &present);
        if training.is_closed() {
            break;
        }
        if stop.is_requested() {
            return Ok(End::Left);
        }
        let loss = mean.last().map(|loss| loss.to_f64());
        training.program().stable(&Stable { step: Step(step), epoch: Epoch(1), members: 1, loss });
    }
    Ok(End::Complete)
}
