//! A binomial tree: log2 n latencies where a chain has n - 1, and log2 n sends at the root where a direct
//! broadcast has n - 1.
//!
//! Positions are counted from the root. Position p has the parent p without its lowest bit, and the children
//! p + 2^k for all 2^k below that bit (below n, for the root). Source: Thakur, Rabenseifner & Gropp,
//! *Optimization of Collective Communication Operations in MPICH*, IJHPCA 19(1), 2005, §3.

use super::{Place, Plan, Round};

/// Segment k comes in while segment k - 1 goes out to all children.
pub(super) fn broadcast(plan: &Plan, root: usize, index: usize, round: &mut Round) {
    let position = (plan.rank + plan.world_size - root) % plan.world_size;
    let rank = |position: usize| (position + root) % plan.world_size;
    if position > 0 {
        let parent = position & (position - 1);
        round.receive(rank(parent), Place::Output, plan.segment(plan.whole(), index));
    }
    let Some(before) = index.checked_sub(1) else { return };
    let lowest_bit =
        if position == 0 { plan.world_size.next_power_of_two() } else { position & position.wrapping_neg() };
    // The largest subtree first: it has the longest way.
    let mut distance = lowest_bit / 2;
    while distance > 0 {
        if position + distance < plan.world_size {
            round.send(rank(position + distance), Place::Output, plan.segment(plan.whole(), before));
        }
        distance /= 2;
    }
}
