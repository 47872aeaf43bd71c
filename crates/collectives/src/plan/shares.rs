//! How many elements a collective has, and whose they are.

use std::sync::Arc;

use super::Span;

/// The lengths of a collective's parts. Equal on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares(Lens);

/// Prefix sums where lengths differ, so that a plan finds a part without adding up those before it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Lens {
    Even(usize),
    ByRank {
        /// Where the share of each rank starts, and the total.
        starts: Arc<[usize]>,
    },
    /// Where the share of each rank is, in the buffer that has all of them.
    Placed(Arc<[Span]>),
    ByPair {
        /// For each sender, where its part for each receiver starts in its input, and the input's length.
        in_input: Arc<[usize]>,
        /// For each receiver, where the part from each sender starts in its output, and the output's length.
        in_output: Arc<[usize]>,
    },
}

impl From<usize> for Shares {
    /// So many elements in all, or per rank or pair of ranks, as the schedule says.
    fn from(len: usize) -> Self {
        Self(Lens::Even(len))
    }
}

impl Shares {
    /// `counts[i]` elements are the share of rank i; `None` when that is more in all than memory holds.
    pub fn by_rank(counts: &[usize]) -> Option<Self> {
        Some(Self(Lens::ByRank { starts: starts(counts.iter().copied())?.into() }))
    }

    /// Shares of ranks that do not follow each other, in order: that of rank i is at `spans[i]` in the output of
    /// an all_gather or the input of a reduce_scatter.
    pub(crate) fn placed(spans: &[Span]) -> Self {
        Self(Lens::Placed(spans.into()))
    }

    /// `counts[from * world_size + to]` elements go from one rank to another; `None` when that is more on
    /// one rank than memory holds.
    ///
    /// # Panics
    /// If there is not a count for each pair.
    pub fn by_pair(world_size: usize, counts: &[usize]) -> Option<Self> {
        assert_eq!(counts.len(), world_size * world_size, "there is a count for each pair of ranks");
        let (mut in_input, mut in_output) = (Vec::new(), Vec::new());
        for rank in 0..world_size {
            let (row, column) = (&counts[rank * world_size..], &counts[rank..]);
            in_input.extend(starts(row.iter().take(world_size).copied())?);
            in_output.extend(starts(column.iter().step_by(world_size).copied())?);
        }
        Some(Self(Lens::ByPair { in_input: in_input.into(), in_output: in_output.into() }))
    }

    /// Whether these lengths are those of ranks, of which there are `world_size`.
    pub(super) fn are_by_rank(&self, world_size: usize) -> bool {
        match &self.0 {
            Lens::Even(_) => true,
            Lens::ByRank { starts } => starts.len() == world_size + 1,
            Lens::Placed(spans) => spans.len() == world_size,
            Lens::ByPair { .. } => false,
        }
    }

    /// The same for pairs of ranks.
    pub(super) fn are_by_pair(&self, world_size: usize) -> bool {
        match &self.0 {
            Lens::Even(_) => true,
            Lens::ByRank { .. } | Lens::Placed(_) => false,
            Lens::ByPair { in_input, .. } => in_input.len() == world_size * (world_size + 1),
        }
    }

    /// The one length that there is, if there is one.
    pub(super) fn even(&self) -> Option<usize> {
        match self.0 {
            Lens::Even(len) => Some(len),
            Lens::ByRank { .. } | Lens::Placed(_) | Lens::ByPair { .. } => None,
        }
    }

    /// The share of a rank in a buffer that holds all shares in rank order.
    pub(super) fn of_rank(&self, rank: usize) -> Span {
        match &self.0 {
            Lens::Even(len) => Span { start: rank * len, len: *len },
            Lens::ByRank { starts } => between(starts, rank),
            Lens::Placed(spans) => spans[rank],
            Lens::ByPair { .. } => unreachable!("a plan checks that its shares are those of ranks"),
        }
    }

    /// The longest share of a rank.
    pub(super) fn longest(&self) -> usize {
        match &self.0 {
            Lens::Even(len) => *len,
            Lens::ByRank { starts } => starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0),
            Lens::Placed(spans) => spans.iter().map(|span| span.len).max().unwrap_or(0),
            Lens::ByPair { .. } => unreachable!("a plan checks that its shares are those of ranks"),
        }
    }

    /// What goes from one rank to another: in the sender's input and in the receiver's output.
    pub(super) fn of_pair(&self, world_size: usize, from: usize, to: usize) -> (Span, Span) {
        match &self.0 {
            Lens::Even(len) => (Span { start: to * len, len: *len }, Span { start: from * len, len: *len }),
            Lens::ByPair { in_input, in_output } => (
                between(&in_input[from * (world_size + 1)..], to),
                between(&in_output[to * (world_size + 1)..], from),
            ),
            Lens::ByRank { .. } | Lens::Placed(_) => {
                unreachable!("a plan checks that its shares are those of pairs")
            }
        }
    }
}

/// Where each part starts in a buffer that holds them in order, and the total.
fn starts(counts: impl Iterator<Item = usize>) -> Option<Vec<usize>> {
    let mut starts = vec![0usize];
    let mut end = 0usize;
    for count in counts {
        end = end.checked_add(count)?;
        starts.push(end);
    }
    Some(starts)
}

fn between(starts: &[usize], index: usize) -> Span {
    Span { start: starts[index], len: starts[index + 1] - starts[index] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_each_other_in_rank_order() {
        let shares = Shares::by_rank(&[3, 0, 2]).expect("they fit");
        let spans = [0, 1, 2].map(|rank| shares.of_rank(rank));
        assert_eq!(spans.map(|span| (span.start, span.len)), [(0, 3), (3, 0), (3, 2)]);
        assert_eq!(shares.longest(), 3);
        assert!(shares.are_by_rank(3) && !shares.are_by_rank(2) && !shares.are_by_pair(3));
    }

    #[test]
    fn a_part_has_a_place_in_the_input_and_one_in_the_output() {
        // Rank 0 sends 1 to itself and 2 to rank 1; rank 1 sends 3 to rank 0 and 4 to itself.
        let shares = Shares::by_pair(2, &[1, 2, 3, 4]).expect("they fit");
        let places = |from, to| {
            let (input, output) = shares.of_pair(2, from, to);
            assert_eq!(input.len, output.len);
            (input.start, output.start, input.len)
        };
        assert_eq!([places(0, 0), places(0, 1)], [(0, 0, 1), (1, 0, 2)]);
        assert_eq!([places(1, 0), places(1, 1)], [(0, 1, 3), (3, 2, 4)]);
    }

    #[test]
    fn totals_beyond_memory_are_refused() {
        assert_eq!(Shares::by_rank(&[usize::MAX, 1]), None);
        assert_eq!(Shares::by_pair(2, &[0, usize::MAX, 0, 1]), None, "a column overflows");
    }
}
