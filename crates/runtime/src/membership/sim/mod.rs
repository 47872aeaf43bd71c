//! The seeded simulator: whole jobs of launchers and workers in virtual time, over the same core that runs in
//! production, with faults. After every event the invariants are checked (`checks`), and when the faults
//! have stopped the job must train on.
//!
//! What is simulated around the core is what real I/O will be: a network that delays, loses, duplicates and
//! reorders control messages; links for data that deliver in the end unless one end dies; pipes between a
//! launcher and its workers; processes that are killed, frozen and restarted; a store for the job's epoch and
//! checkpoints. A step has two collectives. The state is a number that every step hashes with all inputs in
//! slot order, so two histories never end in the same state. Where members take states over rather than results, each
//! process also has an optimizer of its own kind.

mod checks;
mod data;
mod faults;
mod scenarios;
mod tests;
mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use super::progress::Progress;
use super::samples::Ledger;
use super::view::Slot;

/// What the inputs of a step are: a number for each slot.
type Inputs = BTreeMap<Slot, u64>;

/// The state of the training, as bytes would be in production.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    /// The state after each step, from the first one on, as far as results determine it.
    history: Vec<u64>,
    /// The rest of the state after each step, by which members differ whose optimizers are not deterministic.
    drift: Vec<u64>,
    ledger: Ledger,
}

impl Model {
    fn new(slots: u16) -> Self {
        Self { history: vec![1], drift: vec![0], ledger: Ledger::new(slots) }
    }

    fn applied(&self) -> u64 {
        self.history.len() as u64 - 1
    }

    fn state(&self) -> u64 {
        *self.history.last().expect("it begins with one")
    }

    /// The gradient of a slot at the next step: of the state, and of the batch that the slot is dealt.
    fn input(&self, slot: Slot) -> u64 {
        let drift = *self.drift.last().expect("it begins with one");
        mix(self.state()
            ^ drift
            ^ mix(self.ledger.batch(slot).wrapping_mul(0x1000_0001)).rotate_left(u32::from(slot)))
    }

    /// `salt` is what the optimizer of this process adds, and 0 if it is deterministic.
    fn apply(&mut self, result: &Inputs, salt: u64) {
        let state = result.iter().fold(mix(self.state()), |state, (&slot, &value)| {
            mix(state.rotate_left(9) ^ value.wrapping_add(u64::from(slot)))
        });
        self.history.push(state);
        let drift = *self.drift.last().expect("it begins with one");
        self.drift.push(if salt == 0 { drift } else { mix(drift ^ salt) });
        self.ledger.commit(&result.keys().copied().collect());
    }
}

fn mix(mut hash: u64) -> u64 {
    hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// A checkpoint as it lies in the store.
#[derive(Clone, Debug)]
struct Checkpoint {
    progress: Progress,
    model: Model,
}

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}
