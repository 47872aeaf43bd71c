//! What is measured: numbers of ranks and sizes, how often each is called, in which order libraries take turns, and what
//! Paceline must reach.

use std::fmt;
use std::time::Duration;

/// One thing that is measured: an all_reduce of f32 with sum, or a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    pub ranks: u32,
    /// Of each rank's buffer; 0 is a barrier.
    pub bytes: u64,
}

/// A case and how often it is called back to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub case: Case,
    pub iterations: u32,
}

/// What the calls of one row may take. Above 10 ms a row's mean no longer depends on one scheduling slice; a second keeps
/// a round of all libraries at two or three minutes.
pub const ROW: Duration = Duration::from_secs(1);

/// Below this there is no mean to speak of, so slower rows take longer.
pub const FEWEST: u32 = 5;

/// Calls of each row before the first is timed; WARM_UP in peers/bench.c is the same.
pub const WARM_UP: u32 = 3;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// With 2 ranks, and with 4: on 2 cores, where waiting ranks take the time of working ones.
const SIZES: [(u32, &[u64]); 2] = [
    (2, &[0, 4, 4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB]),
    (4, &[0, 4, 4 * KIB, MIB, 16 * MIB, 64 * MIB]),
];

/// Enough to see that everything works.
const QUICK_SIZES: [(u32, &[u64]); 2] = [(2, &[0, 4, 64 * KIB, MIB]), (4, &[0, MIB])];

/// The most microseconds a call may take on two cores of a current server: ranks, bytes, with buffers of the caller's,
/// with registered buffers.
const MUST_US: [(u32, u64, f64, Option<f64>); 9] = [
    (2, 0, 0.12, None),
    (2, 4, 0.16, None),
    (2, 4 * KIB, 0.5, None),
    (2, 64 * KIB, 5.0, None),
    (2, MIB, 65.0, None),
    (2, 16 * MIB, 1500.0, Some(650.0)),
    (2, 64 * MIB, 8000.0, Some(3500.0)),
    (4, 0, 10.0, None),
    (4, MIB, 345.0, None),
];

impl Case {
    /// What a call must not exceed, in microseconds.
    pub fn must_us(self) -> Option<f64> {
        MUST_US.iter().find(|must| (must.0, must.1) == (self.ranks, self.bytes)).map(|must| must.2)
    }

    /// The same for registered buffers, where more is asked of them.
    pub fn must_registered_us(self) -> Option<f64> {
        MUST_US.iter().find(|must| (must.0, must.1) == (self.ranks, self.bytes)).and_then(|must| must.3)
    }

    /// `barrier`, `4 B`, `64 KiB`, `1 MiB`.
    pub fn size(self) -> String {
        match self.bytes {
            0 => "barrier".to_owned(),
            bytes if bytes.is_multiple_of(MIB) => format!("{} MiB", bytes / MIB),
            bytes if bytes.is_multiple_of(KIB) => format!("{} KiB", bytes / KIB),
            bytes => format!("{bytes} B"),
        }
    }

    /// The same for every library, unless the row would take too long: enough that a call of a fast one is seen.
    fn iterations_asked(self) -> u32 {
        match self.bytes {
            0..=4 => 100_000,
            5..=4096 => 50_000,
            4097..=65_536 => 5_000,
            65_537..=1_048_576 => 500,
            1_048_577..=16_777_216 => 50,
            _ => 15,
        }
    }
}

impl Row {
    /// As peers/bench.c wants it.
    pub fn to_argument(self) -> String {
        match self.case.bytes {
            0 => format!("barrier:{}", self.iterations),
            bytes => format!("{bytes}:{}", self.iterations),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with {} ranks", self.size(), self.ranks)
    }
}

/// All cases, by ranks and then by size.
pub fn cases(quick: bool) -> Vec<Case> {
    let sizes = if quick { QUICK_SIZES } else { SIZES };
    let of_world =
        |(ranks, sizes): (u32, &'static [u64])| sizes.iter().map(move |&bytes| Case { ranks, bytes });
    sizes.into_iter().flat_map(of_world).collect()
}

/// The numbers of ranks that occur, in order.
pub fn worlds(cases: &[Case]) -> Vec<u32> {
    let mut worlds: Vec<u32> = cases.iter().map(|case| case.ranks).collect();
    worlds.dedup();
    worlds
}

/// How often a case is called, if a call takes about as long as it is said to.
pub fn iterations(case: Case, estimate_us: Option<f64>) -> u32 {
    let asked = case.iterations_asked();
    let Some(estimate_us) = estimate_us.filter(|estimate| *estimate > 0.0) else { return FEWEST };
    // Float to integer saturates.
    let fit = (ROW.as_secs_f64() * 1e6 / estimate_us) as u32;
    fit.clamp(FEWEST, asked)
}

/// Who comes when in a round: everybody once, each round beginning with the next one.
pub fn order(round: u32, libraries: usize) -> Vec<usize> {
    (0..libraries).map(|place| (place + round as usize) % libraries).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn in_as_many_rounds_as_libraries_everybody_is_everywhere_once() {
        for libraries in 1..6 {
            for place in 0..libraries {
                let here: BTreeSet<_> =
                    (0..libraries as u32).map(|round| order(round, libraries)[place]).collect();
                assert_eq!(here.len(), libraries);
            }
        }
        assert_eq!(order(7, 5), [2, 3, 4, 0, 1]);
        assert!(order(3, 0).is_empty());
    }

    #[test]
    fn a_slow_row_gets_fewer_calls_but_never_too_few() {
        let barrier = Case { ranks: 4, bytes: 0 };
        assert_eq!(iterations(barrier, Some(0.1)), 100_000, "what was asked");
        assert_eq!(iterations(barrier, Some(1000.0)), 1000, "what fits");
        assert_eq!(iterations(barrier, Some(3e6)), FEWEST);
        assert_eq!(iterations(barrier, Some(0.0)), FEWEST, "no estimate");
        assert_eq!(iterations(barrier, None), FEWEST);
        assert_eq!(iterations(Case { ranks: 2, bytes: 64 * MIB }, Some(5000.0)), 15);
    }

    #[test]
    fn every_figure_that_must_be_reached_is_of_a_case_that_is_measured() {
        let cases = cases(false);
        for (ranks, bytes, ..) in MUST_US {
            let case = Case { ranks, bytes };
            assert!(cases.contains(&case) && case.must_us().is_some(), "{case}");
        }
        assert_eq!(Case { ranks: 2, bytes: 16 * MIB }.must_registered_us(), Some(650.0));
        assert_eq!(Case { ranks: 4, bytes: 4 }.must_us(), None);
        assert_eq!(worlds(&cases), [2, 4]);
    }

    #[test]
    fn sizes_are_shown_as_people_say_them() {
        let shown = |bytes| Case { ranks: 2, bytes }.size();
        let all = [0, 4, 4096, 65_536, 1 << 20, 64 << 20].map(shown);
        assert_eq!(all, ["barrier", "4 B", "4 KiB", "64 KiB", "1 MiB", "64 MiB"]);
    }
}
