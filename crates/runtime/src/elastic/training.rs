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
use crate::membership::{Ledger, Progress, Slot, Step};

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
const HEADER_LIMIT: usize = wire::MESSAGE_LIMIT + PREFIX_BYTES;
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

    /// The most bytes of a copy of the state.
    pub(super) fn state_limit(&mut self) -> usize {
        self.state_size() + HEADER_LIMIT
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

    /// A copy of the state.
    pub(super) fn save(&mut self) -> Result<Vec<u8>, Error> {
        let layout = self.layout();
        let header = Header { ledger: self.ledger.clone(), closed: self.closed, layout };
        let header = wire::encode(&header).map_err(|e| Error::Transport(e.into()))?;
        let mut copy = (header.len() as u32).to_le_bytes().to_vec();
        copy.extend_from_slice(&header);
        self.program.state().iter().for_each(|tensor| copy.extend_from_slice(tensor.bytes));
        Ok(copy)
    }

    /// Takes over a copy of a state. One that does not fit changes nothing.
    pub(super) fn load(&mut self, copy: &[u8]) -> Result<(), Error> {
        let wrong = |reason: &str| Error::Usage { reason: format!("the state of another member {reason}") };
        let (length, rest) = copy.split_at_checked(PREFIX_BYTES).ok_or_else(|| wrong("is cut off"))?;
        let length = u32::from_le_bytes(length.try_into().expect("4 bytes")) as usize;
        let (header, mut rest) = rest.split_at_checked(length).ok_or_else(|| wrong("is cut off"))?;
        let header: Header = wire::decode(header).map_err(|e| Error::Transport(e.into()))?;
        if header.layout != self.layout() {
            return Err(wrong("has other tensors than this program; start the same program on all workers"));
        }
        if rest.len() != self.state_size() || !header.ledger.fits(self.slots) {
            return Err(wrong("has another size, or another number of slots"));
        }
        for tensor in self.program.state() {
            let (bytes, after) = rest.split_at(tensor.bytes.len());
            tensor.bytes.copy_from_slice(bytes);
            rest = after;
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
