//! Two levels: the ranks of a host, and the hosts.
//!
//! What ranks of one host sum up beforehand crosses the network once instead of once per rank. For an
//! all_reduce of S bytes among h hosts of m ranks, n = h m in all, each link between hosts carries:
//!
//! | | bytes between hosts, all ranks together | 2 hosts × 2 ranks |
//! |---|---|---|
//! | direct exchange among all ranks | 2 (n - m) S | 4 S |
//! | ring in the order of hosts | 2 h (n - 1)/n S | 3 S |
//! | two levels: reduce_scatter inside, all_reduce of each slice between hosts, all_gather inside | 2 (h - 1) S | 2 S |
//!
//! Each rank drives its own slice between the hosts (HiCCL, Hidayetoglu et al. 2024, calls it striping), so
//! all their links and processors work. Short messages are summed inside the host by everybody, then
//! exchanged in one step.
//!
//! The bits of a sum are those of one level: a host must hold an aligned block of 2^k ranks, which is a
//! subtree of the order of summation wherever it stands. Other layouts have one level.

/// The place of a rank in a job of several hosts with as many ranks each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Levels {
    /// The ranks of this host, in order.
    pub(crate) members: Vec<usize>,
    /// This rank's place among them.
    pub(crate) place: usize,
    /// The ranks of all hosts that have the same place, in order of hosts.
    pub(crate) counterparts: Vec<usize>,
    /// This host's place among the hosts.
    pub(crate) host: usize,
}

impl Levels {
    /// The levels of `rank`, if there are two that keep the order of summation. `hosts` has the lowest rank
    /// of the host of each rank; the answer is `None` on all ranks or on none.
    pub(crate) fn of(rank: usize, hosts: &[usize]) -> Option<Self> {
        let size = hosts.iter().take_while(|&&host| host == hosts[0]).count();
        let aligned = hosts.iter().enumerate().all(|(rank, &host)| host == rank / size.max(1) * size);
        let even =
            size > 1 && size.is_power_of_two() && hosts.len().is_multiple_of(size) && hosts.len() > size;
        if !aligned || !even {
            return None;
        }
        let (host, place) = (rank / size, rank % size);
        Some(Self {
            members: (host * size..(host + 1) * size).collect(),
            place,
            counterparts: (place..hosts.len()).step_by(size).collect(),
            host,
        })
    }
}

/// The ranks that take part in a plan, by the numbers of the world.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Group<'a> {
    /// All ranks, under their own numbers.
    World {
        /// This rank.
        rank: usize,
    },
    /// Some of them.
    Some {
        /// In the order of the plan.
        members: &'a [usize],
        /// This rank's place among them.
        place: usize,
    },
}

impl Group<'_> {
    /// This rank's number in the plan.
    pub(crate) fn rank(self) -> usize {
        match self {
            Self::World { rank } => rank,
            Self::Some { place, .. } => place,
        }
    }

    /// The rank of the world that has a number in the plan.
    pub(crate) fn member(self, number: usize) -> usize {
        match self {
            Self::World { .. } => number,
            Self::Some { members, .. } => members[number],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_blocks_of_a_power_of_two_have_two_levels() {
        let levels = Levels::of(5, &[0, 0, 2, 2, 4, 4]).expect("three hosts of two");
        assert_eq!((levels.members, levels.place), (vec![4, 5], 1));
        assert_eq!((levels.counterparts, levels.host), (vec![1, 3, 5], 2));
        let levels = Levels::of(0, &[0, 0, 0, 0, 4, 4, 4, 4]).expect("two hosts of four");
        assert_eq!((levels.members, levels.counterparts), (vec![0, 1, 2, 3], vec![0, 4]));
    }

    #[test]
    fn all_other_layouts_have_one_level() {
        for hosts in [
            &[0, 0, 0, 0][..],
            &[0, 1, 2],
            &[0, 0, 2, 2, 4],
            &[0, 0, 2, 3],
            &[0, 0, 0, 3, 3, 3],
            &[0, 1, 0, 1],
            &[0, 0, 2, 2, 2, 2],
            &[],
        ] {
            for rank in 0..hosts.len() {
                assert_eq!(Levels::of(rank, hosts), None, "{hosts:?}");
            }
        }
    }
}
