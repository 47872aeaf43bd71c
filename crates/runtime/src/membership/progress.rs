//! How far a worker is, and how a view change settles the step that was in flight.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::message::MAX_SOURCES;
use super::mutation::Mutation;
use super::view::{Epoch, Incarnation};

/// The number of a training step; 0 is the state before the first one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Step(pub u64);

impl Step {
    /// The step after this one.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.0)
    }
}

/// A state of the training: the last step applied, and which history led there.
///
/// A step has one result per epoch in which it is reduced, and an epoch one view. So the epochs in which the
/// steps were reduced name the state, and a chain of hashes over them compares two histories in 8 bytes and
/// at no cost per byte of gradient. What the bytes are worth is checked where they are transferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Progress {
    /// The last step applied.
    pub applied: Step,
    /// The chain over all steps up to that one.
    pub lineage: u64,
}

impl Progress {
    /// The state before the first step, which every worker can make by itself.
    pub const START: Self = Self { applied: Step(0), lineage: 0 };

    /// The state after the next step, reduced in `epoch`.
    #[must_use]
    pub fn after(self, epoch: Epoch) -> Self {
        let applied = self.applied.next();
        // SplitMix64's finaliser (Steele, Lea and Flood 2014) over the three numbers.
        let mut hash = self.lineage ^ epoch.0.rotate_left(32) ^ applied.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self { applied, lineage: hash ^ (hash >> 31) }
    }
}

/// What a worker says when it has stopped in an epoch; true until the epoch is over, since it has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Report {
    /// Who says so.
    pub worker: Incarnation,
    /// How far it is; none for a newcomer without any state.
    pub progress: Option<Progress>,
    /// Whether it has the state of the view: false for a member that came in this epoch and still fetches.
    /// Only holders say anything about which steps may be stable.
    pub holds: bool,
}

/// How a view begins: the state that all its members have or fetch before they go on.
///
/// It is a COMMIT of step `state.applied` for members that lack it, and a RETRY of the step after it for those
/// that have it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Resolution {
    /// The last step applied.
    pub applied: Step,
    /// The history that led there.
    pub lineage: u64,
    /// Who has that state; members of the view, never empty.
    pub sources: Vec<Incarnation>,
}

impl Resolution {
    /// The state that all members begin from.
    pub fn state(&self) -> Progress {
        Progress { applied: self.applied, lineage: self.lineage }
    }
}

/// Settles the step in flight from the reports of those who will be members: the longest history counts. None
/// if nobody among them holds a state; `own` are the workers of the launcher that asks.
///
/// One holder's report is enough. A step is stable when every member is known to have applied it, so each
/// holder's report is at or beyond every stable step, and so is the longest. A step that only absent members
/// have applied is not stable, nobody outside has seen it, and it is run again.
pub(crate) fn resolve(
    reports: &[Report],
    own: impl Fn(Incarnation) -> bool,
    mutation: Mutation,
) -> Option<Resolution> {
    let counts = |report: &&Report| report.holds || mutation == Mutation::AnyReport;
    let holders = || {
        let held = |report: &Report| report.progress.map(|progress| (report.worker, progress));
        reports.iter().filter(counts).filter_map(held)
    };
    let mut longest = holders().map(|(_, progress)| progress).max_by_key(|progress| progress.applied)?;
    if mutation == Mutation::ProposersHistory {
        let mine = holders().filter(|&(worker, _)| own(worker)).map(|(_, progress)| progress);
        longest = mine.max_by_key(|progress| progress.applied).unwrap_or(longest);
    }
    let sources = holders().filter(|&(_, progress)| progress == longest).map(|(worker, _)| worker);
    let sources = sources.take(MAX_SOURCES).collect();
    Some(Resolution { applied: longest.applied, lineage: longest.lineage, sources })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(worker: u128, steps: u64, holds: bool) -> Report {
        let progress = (0..steps).fold(Progress::START, |progress, _| progress.after(Epoch(1)));
        Report { worker: Incarnation(worker), progress: Some(progress), holds }
    }

    fn resolved(reports: &[Report]) -> Option<(u64, Vec<u128>)> {
        let resolution = resolve(reports, |_| false, Mutation::None)?;
        Some((resolution.applied.0, resolution.sources.iter().map(|source| source.0).collect()))
    }

    #[test]
    fn a_step_that_one_survivor_applied_is_committed_from_it() {
        assert_eq!(resolved(&[report(1, 4, true), report(2, 5, true)]), Some((5, vec![2])));
    }

    #[test]
    fn a_step_that_no_survivor_applied_is_run_again() {
        assert_eq!(resolved(&[report(1, 4, true), report(2, 4, true)]), Some((4, vec![1, 2])));
    }

    #[test]
    fn a_newcomer_that_still_fetches_says_nothing_about_the_history() {
        assert_eq!(resolved(&[report(1, 4, true), report(2, 9, false)]), Some((4, vec![1])));
        assert_eq!(resolved(&[report(2, 9, false)]), None);
    }

    #[test]
    fn the_same_steps_in_another_epoch_are_another_history() {
        let once = Progress::START.after(Epoch(1));
        assert_ne!(once.after(Epoch(1)), once.after(Epoch(2)));
        assert_ne!(once, Progress::START.after(Epoch(2)));
    }
}
