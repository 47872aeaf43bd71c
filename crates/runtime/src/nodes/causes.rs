//! Whose failure it was.

use std::collections::BTreeMap;

use super::{Failure, LOST_NODE, arrival};

/// Who has failed, and because of whom.
#[derive(Debug, Default)]
pub(crate) struct Causes {
    first: Option<Failure>,
    /// The node that has come before anything had failed: all ranks are told to end, and how they do is nobody's failure.
    came: Option<u32>,
    /// By rank; those that exited with 0 have no failure.
    ends: BTreeMap<u32, Option<End>>,
    /// The first rank that a worker blamed for its own failure, by the worker's rank.
    blamed: BTreeMap<u32, u32>,
}

#[derive(Debug)]
struct End {
    failure: Failure,
    /// Not on a signal from its launcher.
    by_itself: bool,
}

/// What a job has failed of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    Known(Option<Failure>),
    /// The best that is known before the end of the rank that is blamed.
    Open(Failure),
}

impl Causes {
    /// A failure without a rank. Says whether it is what ends the generation.
    pub(crate) fn lost(&mut self, failure: Failure) -> bool {
        let first = self.first.is_none() && self.came.is_none();
        self.first.get_or_insert(failure);
        first
    }

    /// A rank is dead. Says whether that is what ends the generation.
    pub(crate) fn died(&mut self, rank: u32, failure: Failure, by_itself: bool) -> bool {
        self.ends.entry(rank).or_insert(Some(End { failure: failure.clone(), by_itself }));
        self.came.is_none() && self.lost(failure)
    }

    /// A node has come, with which all ranks start again. Says whether that is what ends the generation.
    pub(crate) fn came(&mut self, node: u32) -> bool {
        let first = self.first.is_none() && self.came.is_none();
        if first {
            self.came = Some(node);
        }
        first
    }

    /// The ranks do not start again: that a node has come is not what the job fails of.
    pub(crate) fn conclude(&mut self) {
        if self.came.take().is_some() {
            let cause = "ended before the job had started again".to_owned();
            self.first.get_or_insert(Failure { node: 0, rank: None, cause, exit_code: LOST_NODE });
        }
    }

    /// A rank has exited with code 0.
    pub(crate) fn exited(&mut self, rank: u32) {
        self.ends.entry(rank).or_insert(None);
    }

    /// Whether any rank has exited with code 0.
    pub(crate) fn any_exited(&self) -> bool {
        self.ends.values().any(Option::is_none)
    }

    pub(crate) fn blames(&mut self, blamer: u32, culprit: u32) {
        self.blamed.entry(blamer).or_insert(culprit);
    }

    /// Whether anything has.
    pub(crate) fn has_failed(&self) -> bool {
        self.first.is_some()
    }

    /// What has ended the generation: the first failure that was noticed, or a node that has come.
    pub(crate) fn first(&self) -> Option<Failure> {
        self.came.map(arrival).or_else(|| self.first.clone())
    }

    /// Whose failure it was. Two ranks that end within a moment may be found in either order: the blame is
    /// followed from the first one to a rank that failed by itself.
    pub(crate) fn settled(&self) -> Settled {
        if let Some(node) = self.came {
            return Settled::Known(Some(arrival(node)));
        }
        let Some(mut cause) = self.first.as_ref() else { return Settled::Known(None) };
        // Each step leads to another rank, or stops: a circle of blame ends after one round.
        for _ in 0..=self.ends.len() {
            let Some(culprit) = cause.rank.and_then(|rank| self.blamed.get(&rank)) else { break };
            match self.ends.get(culprit) {
                Some(Some(end)) if end.by_itself => cause = &end.failure,
                Some(_) => break,
                None => return Settled::Open(cause.clone()),
            }
        }
        Settled::Known(Some(cause.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(rank: u32) -> Failure {
        let cause = "exited with code 1".to_owned();
        Failure { node: rank / 2, rank: Some(rank), cause, exit_code: 1 }
    }

    #[test]
    fn the_blame_is_followed_across_nodes_to_a_rank_that_failed_by_itself() {
        let mut causes = Causes::default();
        assert_eq!(causes.settled(), Settled::Known(None));
        assert!(causes.died(0, failure(0), true), "the first");
        causes.blames(0, 3);
        assert_eq!(causes.settled(), Settled::Open(failure(0)), "rank 3 has not ended");
        assert!(!causes.died(3, failure(3), true));
        causes.blames(3, 2);
        causes.blames(3, 0);
        causes.died(2, failure(2), false);
        assert_eq!(causes.settled(), Settled::Known(Some(failure(3))), "rank 2 was told to end");
        assert_eq!(causes.first(), Some(failure(0)));
    }

    #[test]
    fn a_circle_of_blame_ends_and_a_rank_that_exited_with_0_has_none() {
        let mut causes = Causes::default();
        causes.died(0, failure(0), true);
        causes.died(1, failure(1), true);
        causes.blames(0, 1);
        causes.blames(1, 0);
        assert!(matches!(causes.settled(), Settled::Known(Some(_))));
        let mut causes = Causes::default();
        causes.died(0, failure(0), true);
        causes.exited(1);
        causes.blames(0, 1);
        assert_eq!(causes.settled(), Settled::Known(Some(failure(0))));
    }

    #[test]
    fn a_lost_launcher_is_a_cause_of_its_own() {
        let mut causes = Causes::default();
        let cause = "was lost: it closed the connection".to_owned();
        let failure = Failure { node: 1, rank: None, cause, exit_code: LOST_NODE };
        assert!(causes.lost(failure.clone()));
        causes.died(0, super::tests::failure(0), true);
        assert_eq!(causes.settled(), Settled::Known(Some(failure.clone())));
        assert_eq!(failure.to_string(), "the launcher of node 1 was lost: it closed the connection");
        assert_eq!(super::tests::failure(3).to_string(), "rank 3 on node 1 exited with code 1");
    }

    #[test]
    fn a_node_that_has_come_ends_a_generation_and_is_not_what_the_job_fails_of() {
        let mut causes = Causes::default();
        assert!(causes.came(2) && !causes.came(1), "the first");
        assert!(!causes.died(0, failure(0), true), "a consequence");
        assert_eq!(causes.settled(), Settled::Known(Some(arrival(2))));
        let words = |causes: &Causes| causes.first().expect("it has ended").to_string();
        assert_eq!(words(&causes), "the launcher of node 2 has come");
        causes.conclude();
        assert_eq!(words(&causes), "the launcher of node 0 ended before the job had started again");
        let mut causes = Causes::default();
        causes.came(2);
        let lost = Failure { node: 1, rank: None, cause: "was lost".to_owned(), exit_code: LOST_NODE };
        assert!(!causes.lost(lost.clone()));
        causes.conclude();
        assert_eq!(causes.settled(), Settled::Known(Some(lost)));
        let mut causes = Causes::default();
        causes.died(0, failure(0), true);
        assert!(!causes.came(2));
        causes.conclude();
        assert_eq!(causes.first(), Some(failure(0)));
    }
}
