//! Which samples a batch has: batches are numbered through all passes over the data set.

use crate::Error;
use crate::membership::{Ledger, Slot};
use crate::sampler::{Sampler, SamplerState};

/// The batches of a training.
#[derive(Debug)]
pub(super) struct Batches {
    sampler: Sampler,
    per_pass: u64,
    total: u64,
}

impl Batches {
    /// `passes` over `samples` samples, each batch with `batch` of them. What does not fill one at the end of a pass is
    /// left out of it.
    pub(super) fn new(samples: usize, batch: usize, passes: u64, seed: u64) -> Result<Self, Error> {
        let sampler = Sampler::new(samples, batch, seed)?;
        let per_pass = sampler.steps_per_epoch() as u64;
        let total = per_pass.checked_mul(passes).ok_or_else(|| Error::Usage {
            reason: format!("{passes} passes of {per_pass} batches are more than 2^64"),
        })?;
        Ok(Self { sampler, per_pass, total })
    }

    /// What is dealt, for a checkpoint; where the training is in it is the ledger's affair.
    pub(super) fn data(&self) -> SamplerState {
        self.sampler.state(0, 0)
    }

    /// Whether a checkpoint's batches are these.
    ///
    /// # Errors
    /// [`Error::Usage`] with the difference: counting on would leave samples out and take others twice.
    pub(super) fn check(&self, data: &SamplerState) -> Result<(), Error> {
        self.sampler.resume(data).map(drop)
    }

    /// The samples of a slot's next batch; none when there is no batch left for it.
    pub(super) fn of(&mut self, ledger: &Ledger, slot: Slot) -> Result<Option<Vec<usize>>, Error> {
        let batch = ledger.batch(slot);
        if batch >= self.total {
            return Ok(None);
        }
        let (pass, step) = (batch / self.per_pass, (batch % self.per_pass) as usize);
        self.sampler.batch(pass, step, 0, 1).map(Some)
    }

    /// Whether a slot has no batch left to compute.
    pub(super) fn is_idle(&self, ledger: &Ledger, slot: Slot) -> bool {
        ledger.batch(slot) >= self.total
    }

    /// Whether every batch is in a committed step.
    pub(super) fn are_done(&self, ledger: &Ledger) -> bool {
        ledger.dealt() >= self.total && ledger.redo().all(|batch| batch >= self.total)
    }
}
