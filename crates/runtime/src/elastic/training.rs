//! A program with its position in the data: what a member's state is.

use std::collections::BTreeSet;
use std::sync::Arc;

use paceline_transport::wire;
use serde::{Deserialize, Serialize};

use super::Config;
use super::batches::Batches;
use super::pool::Pool;
use super::program::{Gradient, Program};
use super::saver::{Position, Saver, Saving};
use crate::Error;
use crate::checkpoint::{Group, StableStep};
use crate::digest::Digest;
use crate::membership::{Ledger, Progress, Slot, Step, Stripe};

/// A program that is trained, on the thread that calls it.
pub(super) struct Training<'p, P: Program> {
    program: &'p mut P,
    batches: Batches,
    pool: Arc<Pool<P::Gradient>>,
    ledger: Ledger,
    slots: u16,
    /// Whether the closing step has been applied: one without inputs after all batches are done, which makes the last
    /// step stable.
    closed: bool,
    saver: Option<Saver>,
}

/// The inputs of a step for some slots.
pub(super) struct Inputs<G> {
    pub(super) of: Vec<(Slot, Arc<Vec<G>>)>,
    /// All slots of the job for which there is no batch at this step.
    pub(super) idle: Vec<Slot>,
    /// Whether the state before this step is to be saved.
    pub(super) saving: Saving,
}

/// What stands before the tensors in a copy of a state.
#[derive(Serialize, Deserialize)]
struct Header {
    ledger: Ledger,
    closed: bool,
    /// Names, dtypes and sizes of the tensors.
    layout: [u8; 8],
}

/// The most that is in front of the tensors, in bytes.
pub(super) const HEADER_LIMIT: usize = wire::MESSAGE_LIMIT + PREFIX_BYTES;
const PREFIX_BYTES: usize = 4;

impl<'p, P: Program> Training<'p, P> {
    pub(super) fn new(program: &'p mut P, config: &Config, slots: u16) -> Result<Self, Error> {
        let pool = Pool::new(program.gradient_len() + 1);
        let saver = Saver::new(config, program.state())?;
        let (batches, ledger) = (config.batches()?, Ledger::new(slots));
        Ok(Self { program, batches, pool, ledger, slots, closed: false, saver })
    }

    /// Goes on from the newest checkpoint that is whole, if there are any. Where the training is then.
    pub(super) fn resume(&mut self) -> Result<Progress, Error> {
        let Some(saver) = &mut self.saver else { return Ok(Progress::START) };
        let Some((step, position)) = saver.resume(self.program.state())? else { return Ok(Progress::START) };
        let Position { lineage, ledger, data } = position;
        self.batches.check(&data)?;
        let slots = ledger.slots();
        if slots != self.slots {
            tracing::warn!(
                slots,
                now = self.slots,
                "the checkpoint is of a job with another number of slots: each sample is still used once, but the \
                 bits are not those of a job with one number; Config::slots fixes it"
            );
        }
        self.ledger = ledger.for_slots(self.slots);
        tracing::info!(step, "going on from a checkpoint");
        Ok(Progress { applied: Step(step), lineage })
    }

    /// Saves the state, which is the one after this step, with the others of the group.
    pub(super) fn checkpoint(&mut self, stable: StableStep, lineage: u64, group: Group) {
        if let Some(saver) = &mut self.saver {
            let position = Position { lineage, ledger: self.ledger.clone(), data: self.batches.data() };
            saver.save(stable, group, self.program.state(), &position);
        }
    }

    /// Gives up what is being saved, without waiting.
    pub(super) fn stop_saving(&mut self) {
        self.saver.iter().for_each(Saver::stop);
    }

    /// Waits for what is being saved.
    pub(super) fn finish_saving(&mut self) {
        self.saver.take().into_iter().for_each(Saver::finish);
    }

    /// The number of elements of an input: the gradient and the loss.
    pub(super) fn input_len(&self) -> usize {
        self.program.gradient_len() + 1
    }

    /// The number of bytes of all tensors.
    pub(super) fn state_size(&mut self) -> usize {
        self.program.state().iter().map(|tensor| tensor.bytes.len()).sum()
    }

    /// Where inputs come from, and should go back to.
    pub(super) fn pool(&self) -> &Arc<Pool<P::Gradient>> {
        &self.pool
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn program(&mut self) -> &mut P {
        self.program
    }

    /// Computes the inputs of the step after that one for these slots.
    pub(super) fn inputs(&mut self, after: Step, slots: &[Slot]) -> Result<Inputs<P::Gradient>, Error> {
        let mut of = Vec::with_capacity(slots.len());
        for &slot in slots {
            let mut input = self.pool.take_zeroed();
            if let Some(samples) = self.batches.of(&self.ledger, slot)? {
                let (loss, gradient) = input.split_last_mut().expect("there is an element for the loss");
                *loss = P::Gradient::from_f64(self.program.gradient(&samples, gradient));
            }
            of.push((slot, Arc::new(input)));
        }
        let idle = (0..self.slots).filter(|&slot| self.batches.is_idle(&self.ledger, slot)).collect();
        let is_last = self.batches.are_done(&self.ledger);
        let saving = self.saver.as_mut().map_or(Saving::NotDue, |saver| saver.turn(after, is_last));
        Ok(Inputs { of, idle, saving })
    }

    /// Applies the mean of a step to which these slots have contributed.
    pub(super) fn apply(&mut self, mean: &[P::Gradient], present: &BTreeSet<Slot>) {
        if self.batches.are_done(&self.ledger) {
            self.closed = true;
            return;
        }
        if present.iter().any(|&slot| !self.batches.is_idle(&self.ledger, slot)) {
            self.program.apply(&mean[..mean.len() - 1]);
        }
        self.ledger.commit(present);
    }

    /// A copy of a part of the state: of all tensors one after the other so many bytes, and of the rest everything.
    pub(super) fn save(&mut self, stripe: Stripe) -> Result<Vec<u8>, Error> {
        let layout = self.layout();
        let header = Header { ledger: self.ledger.clone(), closed: self.closed, layout };
        let header = wire::encode(&header).map_err(|e| Error::Transport(e.into()))?;
        let wanted = stripe.range(self.state_size());
        let mut copy = Vec::with_capacity(PREFIX_BYTES + header.len() + wanted.len());
        copy.extend_from_slice(&(header.len() as u32).to_le_bytes());
        copy.extend_from_slice(&header);
        let mut before = 0;
        for tensor in self.program.state() {
            let len = tensor.bytes.len();
            let [start, end] = [wanted.start, wanted.end].map(|place| place.saturating_sub(before).min(len));
            copy.extend_from_slice(&tensor.bytes[start..end]);
            before += len;
        }
        Ok(copy)
    }

    /// Takes over a state of which these are the parts, in order. One that does not fit changes nothing.
    pub(super) fn load(&mut self, copies: &[Vec<u8>]) -> Result<(), Error> {
        let wrong = |reason: &str| Error::Usage { reason: format!("the state of another member {reason}") };
        let (size, of) = (self.state_size(), copies.len() as u16);
        let mut headers = BTreeSet::new();
        let mut parts = Vec::with_capacity(copies.len());
        for (index, copy) in (0..of).zip(copies) {
            let (length, rest) = copy.split_at_checked(PREFIX_BYTES).ok_or_else(|| wrong("is cut off"))?;
            let length = u32::from_le_bytes(length.try_into().expect("4 bytes")) as usize;
            let (header, part) = rest.split_at_checked(length).ok_or_else(|| wrong("is cut off"))?;
            if part.len() != (Stripe { index, of }).range(size).len() {
                return Err(wrong("has another size; start the same program on all workers"));
            }
            headers.insert(header);
            parts.push(part);
        }
        let (Some(header), 1) = (headers.first(), headers.len()) else {
            return Err(wrong("is not the same on all members that have sent a part of it"));
        };
        let header: Header = wire::decode(header).map_err(|e| Error::Transport(e.into()))?;
        if header.layout != self.layout() {
            return Err(wrong("has other tensors than this program; start the same program on all workers"));
        }
        if !header.ledger.fits(self.slots) {
            return Err(wrong("has another number of slots"));
        }
        let mut parts = parts.into_iter();
        let mut part: &[u8] = &[];
        for tensor in self.program.state() {
            let mut rest = tensor.bytes;
            while !rest.is_empty() {
                if part.is_empty() {
                    part = parts.next().expect("the parts have as many bytes as the tensors");
                    continue;
                }
                let (now, later) = rest.split_at_mut(rest.len().min(part.len()));
                let (bytes, after) = part.split_at(now.len());
                now.copy_from_slice(bytes);
                (rest, part) = (later, after);
            }
        }
        (self.ledger, self.closed) = (header.ledger, header.closed);
        Ok(())
    }

    fn layout(&mut self) -> [u8; 8] {
        let described: Vec<String> = self
            .program
            .state()
            .iter()
            .map(|tensor| format!("{} {} {}", tensor.name, tensor.dtype, tensor.bytes.len()))
            .collect();
        Digest::of(described.iter().map(String::as_bytes)).0
    }
}

#[cfg(test)]
mod tests {
    use super::super::program::Tensor;
    use super::*;

    /// Tensors of other sizes than the parts in which they come.
    struct Three(Vec<f64>, Vec<f64>, Vec<f64>);

    impl Program for Three {
        type Gradient = f64;

        fn gradient_len(&self) -> usize {
            1
        }

        fn state(&mut self) -> Vec<Tensor<'_>> {
            let Self(one, two, three) = self;
            vec![Tensor::new("one", one), Tensor::new("two", two), Tensor::new("three", three)]
        }

        fn gradient(&mut self, _: &[usize], _: &mut [f64]) -> f64 {
            0.0
        }

        fn apply(&mut self, _: &[f64]) {}
    }

    fn three(salt: f64) -> Three {
        let tensor = |len: u32| (0..len).map(|i| f64::from(i) + salt).collect();
        Three(tensor(3), tensor(0), tensor(11))
    }

    fn training(program: &mut Three) -> Training<'_, Three> {
        Training::new(program, &Config::new(4, 4), 1).expect("a training")
    }

    fn parts(training: &mut Training<'_, Three>, of: u16) -> Vec<Vec<u8>> {
        (0..of).map(|index| training.save(Stripe { index, of }).expect("a copy")).collect()
    }

    #[test]
    fn a_state_is_the_same_in_however_many_parts_it_comes() {
        let mut source = three(0.5);
        for of in [1, 2, 3, 7, 8] {
            let (mut program, copies) = (three(100.0), parts(&mut training(&mut source), of));
            training(&mut program).load(&copies).expect("it fits");
            assert_eq!((&program.0, &program.2), (&source.0, &source.2), "{of} parts");
        }
    }

    #[test]
    fn parts_that_do_not_make_one_state_change_nothing() {
        let (mut source, mut other) = (three(0.5), three(0.5));
        let copies = parts(&mut training(&mut source), 3);
        let mut further = training(&mut other);
        further.apply(&[0.0, 0.0], &BTreeSet::from([0]));
        let of_another_step = parts(&mut further, 3);
        let mut program = three(100.0);
        let mut fails = |copies: &[Vec<u8>], reason: &str| {
            let error = training(&mut program).load(copies).expect_err("it does not fit").to_string();
            assert!(error.contains(reason), "{error}");
        };
        fails(&copies[..2], "another size");
        fails(&[], "not the same");
        fails(&[copies[0][..3].to_vec()], "cut off");
        fails(
            &[copies[0].clone(), of_another_step[1].clone(), copies[2].clone()],
            "not the same on all members",
        );
        assert_eq!(program.0, three(100.0).0);
    }
}
