//! Which batch of samples a slot takes, whatever happens to the membership: each batch is in one committed
//! step, and a batch that was dealt to a slot nobody computed is dealt again.
//!
//! The ledger is a part of the replicated state: a function of the steps applied and of the slots that each
//! of them had. So members agree on it without talking, an input that was kept for a second attempt at a step
//! is still that of the right batch, and a newcomer gets it with the state.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::view::{MAX_SLOTS, Slot};

/// Deals batches, numbered from 0 in the sampler's order, to the slots of a job. Saved with the state; what is read is
/// checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Written")]
pub struct Ledger {
    slots: u16,
    /// The first batch that was never dealt in a committed step.
    cursor: u64,
    redo: VecDeque<u64>,
    /// Which slot is dealt first. It moves on whenever a slot is vacant, or that slot would be dealt the same
    /// batch for ever.
    first: Slot,
}

/// What somebody says was a ledger.
#[derive(Deserialize)]
#[serde(rename = "Ledger")]
struct Written {
    slots: u16,
    cursor: u64,
    redo: VecDeque<u64>,
    first: Slot,
}

impl TryFrom<Written> for Ledger {
    type Error = &'static str;

    fn try_from(Written { slots, cursor, redo, first }: Written) -> Result<Self, Self::Error> {
        if first >= slots {
            return Err("a ledger's first slot is one of its slots");
        }
        // Counting on must not end in an overflow.
        if cursor > u64::MAX / 2 {
            return Err("no training has dealt that many batches");
        }
        let waiting: BTreeSet<&u64> = redo.iter().collect();
        if waiting.len() != redo.len() || waiting.last().is_some_and(|&&last| last >= cursor) {
            return Err("a batch waits to be done again twice, or was never dealt");
        }
        Ok(Self { slots, cursor, redo, first })
    }
}

impl Ledger {
    /// The ledger before the first step of a job with that many slots.
    pub fn new(slots: u16) -> Self {
        Self { slots, cursor: 0, redo: VecDeque::new(), first: 0 }
    }

    /// Whether it could be that of a job with so many slots, whoever sent it.
    pub(crate) fn fits(&self, slots: u16) -> bool {
        self.slots == slots
            && self.first < slots
            && self.redo.len() <= MAX_SLOTS
            && self.redo.iter().all(|&batch| batch < self.cursor)
    }

    /// The number of slots.
    pub(crate) fn slots(&self) -> u16 {
        self.slots
    }

    /// The same batches for a job with another number of slots, which is at least 1: what was done stays done, and what
    /// must be done again is dealt first.
    #[must_use]
    pub fn for_slots(self, slots: u16) -> Self {
        let first = self.first % slots;
        Self { slots, first, ..self }
    }

    /// The batch that a slot takes at the next step: the oldest that must be done again, then new ones. It
    /// depends on the slot alone and not on who is there. `slot` is less than the number of slots.
    pub fn batch(&self, slot: Slot) -> u64 {
        let slots = usize::from(self.slots);
        let index = (usize::from(slot) + slots - usize::from(self.first)) % slots;
        match self.redo.get(index) {
            Some(&batch) => batch,
            None => self.cursor + (index - self.redo.len()) as u64,
        }
    }

    /// A step is applied to which these slots have contributed. What the others were dealt is dealt again.
    pub fn commit(&mut self, contributors: &BTreeSet<Slot>) {
        let dealt: Vec<u64> = (0..self.slots).map(|slot| self.batch(slot)).collect();
        let from_redo = self.redo.len().min(dealt.len());
        self.redo.drain(..from_redo);
        self.cursor += (dealt.len() - from_redo) as u64;
        let missing: Vec<Slot> = (0..self.slots).filter(|slot| !contributors.contains(slot)).collect();
        if !missing.is_empty() {
            self.first = (self.first + 1) % self.slots;
        }
        self.redo.extend(missing.into_iter().map(|slot| dealt[usize::from(slot)]));
    }

    /// The number of batches dealt so far; those not in [`redo`](Self::redo) are in committed steps.
    pub fn dealt(&self) -> u64 {
        self.cursor
    }

    /// The batches that must be done again, in the order in which they will be.
    pub fn redo(&self) -> impl Iterator<Item = u64> + '_ {
        self.redo.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn each_batch_is_committed_once_or_waits_to_be_done_again(
            slots in 1u16..6, steps in prop::collection::vec(prop::collection::btree_set(0u16..6, 0..6), 0..40),
        ) {
            let mut ledger = Ledger::new(slots);
            let mut committed = BTreeSet::new();
            for contributors in steps {
                let contributors: BTreeSet<Slot> = contributors.into_iter().filter(|&slot| slot < slots).collect();
                for &slot in &contributors {
                    prop_assert!(committed.insert(ledger.batch(slot)), "a batch in two steps");
                }
                ledger.commit(&contributors);
                let waiting: BTreeSet<u64> = ledger.redo().collect();
                prop_assert_eq!(waiting.len(), ledger.redo().count());
                prop_assert!(waiting.is_disjoint(&committed));
                prop_assert_eq!((waiting.len() + committed.len()) as u64, ledger.dealt());
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn another_number_of_slots_leaves_no_batch_out_and_does_none_twice(
            jobs in prop::collection::vec(
                (1u16..6, prop::collection::vec(prop::collection::btree_set(0u16..6, 0..6), 0..10)), 1..5,
            ),
        ) {
            let mut ledger = Ledger::new(1);
            let mut committed = BTreeSet::new();
            for (slots, steps) in jobs {
                ledger = ledger.for_slots(slots);
                prop_assert!(ledger.fits(slots));
                for contributors in steps {
                    let contributors: BTreeSet<Slot> = contributors.into_iter().filter(|&slot| slot < slots).collect();
                    for &slot in &contributors {
                        prop_assert!(committed.insert(ledger.batch(slot)), "a batch in two steps");
                    }
                    ledger.commit(&contributors);
                }
            }
            let waiting: BTreeSet<u64> = ledger.redo().collect();
            prop_assert!(waiting.is_disjoint(&committed));
            prop_assert_eq!((waiting.len() + committed.len()) as u64, ledger.dealt());
        }
    }

    #[test]
    fn a_ledger_is_read_as_it_was_written_and_no_other_is() {
        let mut ledger = Ledger::new(3);
        ledger.commit(&BTreeSet::from([0, 2]));
        let text = serde_json::to_string(&ledger).expect("numbers");
        assert_eq!(text, r#"{"slots":3,"cursor":3,"redo":[1],"first":1}"#);
        assert_eq!(serde_json::from_str::<Ledger>(&text).expect("it was written"), ledger);
        for (from, to) in
            [("[1]", "[1,1]"), ("[1]", "[3]"), ("\"first\":1", "\"first\":3"), ("\"slots\":3", "\"slots\":0")]
        {
            assert!(serde_json::from_str::<Ledger>(&text.replace(from, to)).is_err(), "{to}");
        }
    }

    #[test]
    fn with_all_slots_there_the_batches_come_in_order() {
        let mut ledger = Ledger::new(3);
        for step in 0..4u64 {
            assert_eq!([0, 1, 2].map(|slot| ledger.batch(slot)), [3 * step, 3 * step + 1, 3 * step + 2]);
            ledger.commit(&BTreeSet::from([0, 1, 2]));
        }
    }

    #[test]
    fn a_vacant_slot_does_not_hold_a_batch_back_for_ever() {
        let mut ledger = Ledger::new(2);
        let present = BTreeSet::from([1]);
        let mut done = BTreeSet::new();
        for _ in 0..20 {
            done.insert(ledger.batch(1));
            ledger.commit(&present);
        }
        assert!((0..8).all(|batch| done.contains(&batch)), "{done:?}");
    }
}
