//! Which processors each rank runs on.
//!
//! Ranks that wait for each other by looking at memory must not share a processor while another is idle,
//! and the kernel, which sees only that both are busy, may leave them together. So each rank
//! gets an equal share of the processors where there are enough, as `mpirun` and torchrun's NUMA binding
//! do it.

use std::ffi::OsStr;

use rustix::thread::{CpuSet, sched_getaffinity};

/// How the processors are dealt out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Binding {
    /// An equal share for each rank, if there are as many processors as ranks.
    Auto,
    /// All processors for all ranks.
    None,
}

/// The processors of each rank, or `None` where all run on all.
pub fn processors(binding: Binding, ranks: u32, omp_threads: Option<&OsStr>) -> Option<Vec<CpuSet>> {
    // Fails only for a process that does not exist.
    let own = sched_getaffinity(None).ok()?;
    let available: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| own.is_set(cpu)).collect();
    let omp_threads = omp_threads.and_then(|text| text.to_str()?.parse().ok());
    let shares = shares(binding, &available, ranks as usize, omp_threads.unwrap_or(1))?;
    let set = |share: &&[usize]| {
        let mut set = CpuSet::new();
        share.iter().for_each(|&cpu| set.set(cpu));
        set
    };
    Some(shares.iter().map(set).collect())
}

/// Neighbouring processors share caches, so each rank gets neighbours; the first ranks get one more where
/// the number does not divide. A rank that was told to use more threads than its share has is not bound:
/// whoever did so knows why.
fn shares(
    binding: Binding,
    available: &[usize],
    ranks: usize,
    threads_per_rank: usize,
) -> Option<Vec<&[usize]>> {
    let (least, more) = (available.len() / ranks, available.len() % ranks);
    if binding == Binding::None || ranks == 1 || least == 0 || threads_per_rank > least {
        return None;
    }
    let start = |rank: usize| rank * least + rank.min(more);
    Some((0..ranks).map(|rank| &available[start(rank)..start(rank + 1)]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_get_neighbouring_processors_in_equal_shares() {
        let auto = |available: &[usize], ranks| {
            let shares = shares(Binding::Auto, available, ranks, 1)?;
            Some(shares.into_iter().map(<[usize]>::to_vec).collect::<Vec<_>>())
        };
        assert_eq!(auto(&[0, 1], 2), Some(vec![vec![0], vec![1]]));
        assert_eq!(auto(&[1, 2, 5, 6, 9], 2), Some(vec![vec![1, 2, 5], vec![6, 9]]));
        assert_eq!(auto(&[0, 1], 3), None, "not enough for all");
        assert_eq!(auto(&[0, 1], 1), None, "one rank has them all anyway");
    }

    #[test]
    fn nobody_is_bound_who_does_not_want_it_or_has_more_threads() {
        assert_eq!(shares(Binding::None, &[0, 1], 2, 1), None);
        assert_eq!(shares(Binding::Auto, &[0, 1], 2, 2), None);
        assert!(shares(Binding::Auto, &[0, 1, 2, 3], 2, 2).is_some());
    }
}
