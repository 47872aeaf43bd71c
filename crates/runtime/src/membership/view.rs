//! Views: who is a member in an epoch, who votes, and when votes are enough.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::mutation::Mutation;

/// The number of a membership. Strictly increasing for the whole job; nothing has epoch 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// One admission of a process: a random number drawn anew for each. What was removed never returns under
/// the same one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation(pub u128);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A place for a launcher in the job (the node rank), at which one process at a time can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Seat(pub u32);

/// A logical worker of the job, from 0 to [`Job::slots`](super::Job::slots), fixed for the job's life.
pub type Slot = u16;

/// The most launchers of a view. The message that carries a view must fit into 64 KiB.
pub const MAX_LAUNCHERS: usize = 512;
/// The most workers of a view.
pub const MAX_WORKERS: usize = 1024;
/// The most slots of a job.
pub const MAX_SLOTS: usize = 4096;

/// A launcher: a voter of its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Voter {
    /// Where it is reached.
    pub seat: Seat,
    /// Which process is meant.
    pub incarnation: Incarnation,
}

/// A worker of a view; its rank is its index there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Which admission is meant.
    pub incarnation: Incarnation,
    /// The launcher that is its parent.
    pub launcher: Incarnation,
    /// The slots whose inputs it contributes, ascending. None: a spare, which applies and contributes nothing.
    pub slots: Vec<Slot>,
}

/// One membership: immutable, decided once for its epoch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct View {
    /// Its number.
    pub epoch: Epoch,
    /// The voters by seat; the first is the lowest, which breaks ties.
    pub voters: Vec<Voter>,
    /// The workers in rank order.
    pub members: Vec<Member>,
}

impl View {
    /// The voter of that incarnation, with its index.
    pub fn voter(&self, incarnation: Incarnation) -> Option<(usize, &Voter)> {
        self.voters.iter().enumerate().find(|(_, voter)| voter.incarnation == incarnation)
    }

    /// The worker of that incarnation.
    pub fn member(&self, incarnation: Incarnation) -> Option<&Member> {
        self.members.iter().find(|member| member.incarnation == incarnation)
    }

    /// Whether a launcher or a worker of the view has that incarnation.
    pub fn has(&self, incarnation: Incarnation) -> bool {
        self.voter(incarnation).is_some() || self.member(incarnation).is_some()
    }

    /// Whether these voters are a quorum: more than half of the view's, or exactly half with the lowest among
    /// them (linear dynamic voting, Jajodia and Mutchler 1990). Voters of other views do not count.
    ///
    /// A certified death must not shrink the view here: the dead may have accepted another value before.
    pub fn quorum(&self, voters: &BTreeSet<Incarnation>) -> bool {
        self.quorum_with(voters, &BTreeSet::new(), Mutation::None)
    }

    /// [`quorum`](Self::quorum), or one of the rules that were refuted.
    pub(crate) fn quorum_with(
        &self,
        voters: &BTreeSet<Incarnation>,
        certified_dead: &BTreeSet<Incarnation>,
        mutation: Mutation,
    ) -> bool {
        let shrinks = mutation == Mutation::CertifiedDeathShrinksQuorum;
        let counts = |voter: &&Voter| !(shrinks && certified_dead.contains(&voter.incarnation));
        let size = self.voters.iter().filter(counts).count();
        let present = self.voters.iter().filter(counts).filter(|v| voters.contains(&v.incarnation)).count();
        let has_lowest = self.voters.first().is_some_and(|lowest| voters.contains(&lowest.incarnation));
        let ties = has_lowest || mutation == Mutation::NoTieBreak;
        2 * present > size || (size > 0 && 2 * present == size && ties)
    }

    /// Whether it is a view at all, whoever sent it.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        if self.epoch == Epoch(0) {
            return Err("a view of epoch 0".into());
        }
        if self.voters.is_empty() || self.voters.len() > MAX_LAUNCHERS || self.members.len() > MAX_WORKERS {
            return Err(format!("a view of {} voters and {} workers", self.voters.len(), self.members.len()));
        }
        if !self.voters.is_sorted_by(|a, b| a.seat < b.seat) {
            return Err("voters that are not in the order of their seats".into());
        }
        let mut incarnations = BTreeSet::new();
        let all = self.voters.iter().map(|v| v.incarnation).chain(self.members.iter().map(|m| m.incarnation));
        if let Some(twice) = all.into_iter().find(|&incarnation| !incarnations.insert(incarnation)) {
            return Err(format!("{twice} twice in a view"));
        }
        let mut slots = BTreeSet::new();
        for member in &self.members {
            if self.voter(member.launcher).is_none() {
                return Err(format!("worker {} without a launcher", member.incarnation));
            }
            let taken = member.slots.iter().any(|&s| usize::from(s) >= MAX_SLOTS || !slots.insert(s));
            if taken || !member.slots.is_sorted() {
                return Err(format!("worker {} has slots that others have too", member.incarnation));
            }
        }
        Ok(())
    }
}

/// What becomes of a lost worker's slots when no spare adopts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// They are vacant until a newcomer takes them; steps are means over those present.
    Shrink,
    /// The survivors compute them too, so that every step has all slots.
    Slots,
}

/// Who computes which slots when the workers are these, in rank order, with the slots that they had: a pure
/// function, so that what a leader proposes can be checked.
///
/// At most `contributors` of them have any: those that had, and then the first ones without. The others are spares.
/// Whoever had slots keeps them, but for those that others need in mode `Slots`. Vacant ones go, lowest
/// first, to the worker with the fewest.
pub fn deal(mode: Mode, slots: u16, contributors: usize, had: &[Vec<Slot>]) -> Vec<Vec<Slot>> {
    let mut dealt = had.to_vec();
    let mut ranks: Vec<usize> = (0..had.len()).collect();
    ranks.sort_by_key(|&rank| had[rank].is_empty());
    let spares: BTreeSet<usize> = ranks.into_iter().skip(contributors).collect();
    spares.iter().for_each(|&rank| dealt[rank].clear());
    let taken: BTreeSet<Slot> = dealt.iter().flatten().copied().collect();
    let mut vacant: Vec<Slot> = (0..slots).filter(|slot| !taken.contains(slot)).collect();
    let contributes = |(rank, slots)| (!spares.contains(&rank)).then_some(slots);
    let mut dealing: Vec<&mut Vec<Slot>> = dealt.iter_mut().enumerate().filter_map(contributes).collect();
    if dealing.is_empty() {
        return dealt;
    }
    if mode == Mode::Slots {
        // Newcomers relieve the others of their highest slots: some may keep one more than the rest.
        let (fair, mut extra) = (usize::from(slots) / dealing.len(), usize::from(slots) % dealing.len());
        for slots in &mut dealing {
            let keeps_extra = slots.len() > fair && extra > 0;
            extra -= usize::from(keeps_extra);
            vacant.extend(slots.drain((fair + usize::from(keeps_extra)).min(slots.len())..));
        }
        vacant.sort_unstable();
    }
    for slot in vacant {
        let fewest = dealing.iter_mut().min_by_key(|slots| slots.len());
        if let Some(slots) = fewest.filter(|slots| mode == Mode::Slots || slots.is_empty()) {
            slots.push(slot);
        }
    }
    dealt.iter_mut().for_each(|slots| slots.sort_unstable());
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(voters: u128) -> View {
        let voters =
            (0..voters).map(|i| Voter { seat: Seat(i as u32), incarnation: Incarnation(i) }).collect();
        View { epoch: Epoch(1), voters, members: Vec::new() }
    }

    fn all_sets(size: u32) -> impl Iterator<Item = BTreeSet<Incarnation>> {
        (0u32..1 << size).map(move |bits| {
            (0..size).filter(|i| bits >> i & 1 == 1).map(|i| Incarnation(i.into())).collect()
        })
    }

    #[test]
    fn two_disjoint_sets_are_never_both_a_quorum() {
        for size in 1..=7 {
            let view = view(size.into());
            let quorums: Vec<_> = all_sets(size).filter(|set| view.quorum(set)).collect();
            assert!(!quorums.is_empty());
            for a in &quorums {
                assert!(quorums.iter().all(|b| !a.is_disjoint(b)), "{size} voters");
            }
        }
    }

    #[test]
    fn half_is_enough_only_with_the_lowest_voter_and_strangers_do_not_count() {
        let view = view(4);
        let set = |members: &[u128]| members.iter().map(|&m| Incarnation(m)).collect::<BTreeSet<_>>();
        assert!(view.quorum(&set(&[0, 3])));
        assert!(!view.quorum(&set(&[2, 3])));
        assert!(!view.quorum(&set(&[2, 3, 77, 78])));
        assert!(view.quorum(&set(&[1, 2, 3])));
    }

    #[test]
    fn the_refuted_rules_do_have_disjoint_quorums() {
        let view = view(2);
        let alone = |i| BTreeSet::from([Incarnation(i)]);
        assert!(view.quorum_with(&alone(1), &BTreeSet::new(), Mutation::NoTieBreak));
        assert!(view.quorum_with(&alone(1), &alone(0), Mutation::CertifiedDeathShrinksQuorum));
    }

    #[test]
    fn every_slot_is_computed_in_slots_mode_whoever_is_there_and_evenly() {
        for slots in 1..=9u16 {
            let mut had: Vec<Vec<Slot>> = vec![Vec::new(); 3];
            for (lost, joined) in [(0, 0), (1, 0), (0, 1), (2, 3), (1, 1), (1, 0)] {
                had.drain(..lost);
                had.extend(vec![Vec::new(); joined]);
                had = deal(Mode::Slots, slots, 5, &had);
                let mut all: Vec<Slot> = had.iter().flatten().copied().collect();
                all.sort_unstable();
                assert_eq!(all, (0..slots).collect::<Vec<_>>());
                let sizes = || had.iter().map(Vec::len);
                assert!(sizes().max() <= sizes().min().map(|least| least + 1), "{had:?}");
            }
        }
    }

    #[test]
    fn a_lost_slot_stays_vacant_until_somebody_without_one_comes() {
        let after_loss = deal(Mode::Shrink, 3, 3, &[vec![0], vec![2]]);
        assert_eq!(after_loss, [vec![0], vec![2]]);
        assert_eq!(deal(Mode::Shrink, 3, 3, &[vec![0], vec![2], vec![]]), [vec![0], vec![2], vec![1]]);
        assert_eq!(deal(Mode::Shrink, 2, 2, &[vec![0], vec![1], vec![]]), [vec![0], vec![1], vec![]]);
    }

    #[test]
    fn the_oldest_spare_adopts_the_slots_of_a_lost_worker_and_a_newcomer_becomes_one() {
        for mode in [Mode::Slots, Mode::Shrink] {
            let founded = deal(mode, 3, 3, &vec![Vec::new(); 5]);
            assert_eq!(founded, [vec![0], vec![1], vec![2], vec![], vec![]], "{mode:?}");
            let lost = deal(mode, 3, 3, &[vec![0], vec![2], vec![], vec![]]);
            assert_eq!(lost, [vec![0], vec![2], vec![1], vec![]], "{mode:?}");
            let joined = deal(mode, 3, 3, &[vec![0], vec![1], vec![2], vec![], vec![]]);
            assert_eq!(joined, [vec![0], vec![1], vec![2], vec![], vec![]], "{mode:?}");
        }
        let founded = deal(Mode::Slots, 7, 3, &vec![Vec::new(); 4]);
        assert_eq!(founded, [vec![0, 3, 6], vec![1, 4], vec![2, 5], vec![]], "however many slots there are");
        let uneven = deal(Mode::Slots, 7, 3, &[vec![0, 1, 2], vec![3, 4], vec![]]);
        assert_eq!(uneven, [vec![0, 1, 2], vec![3, 4], vec![5, 6]], "as many as the lost one had");
    }

    #[test]
    fn without_a_spare_left_the_survivors_are_those_who_contribute() {
        assert_eq!(deal(Mode::Slots, 3, 3, &[vec![0], vec![2]]), [vec![0, 1], vec![2]]);
        assert_eq!(deal(Mode::Slots, 3, 3, &[vec![0, 1], vec![2], vec![]]), [vec![0], vec![2], vec![1]]);
        assert_eq!(deal(Mode::Shrink, 3, 3, &[vec![0], vec![2]]), [vec![0], vec![2]]);
    }
}
