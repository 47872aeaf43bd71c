//! The mean over slots, in the order of the slots whoever has computed them, so that its bits depend neither on who the
//! members are nor on how the slots are spread.
//!
//! The order is that of every sum of Paceline's: a balanced binary tree whose left half has the largest power of two
//! below the count, here over the slots of the view. While every member has one slot and they are in order, that is
//! what an all-reduce computes. Otherwise each member owns a part of the gradient, gets that part of every slot
//! (all-to-all), adds, and gives the result to all (all-gather): as many bytes as an all-reduce, if nobody has two slots.
//!
//! Each element of the result depends on every member, also on one without a slot: it owns a part. So when a reduction
//! has completed here, every member has contributed, and with that applied the step before.

use std::sync::Arc;

use paceline_collectives::{Communicator, Error, ReduceOp};

use super::program::Gradient;
use crate::membership::{Slot, View};

/// What is reduced in a step: who has which slots, and how many of them have a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shares {
    /// The slots of each member, in rank order.
    pub(super) slots: Vec<Vec<Slot>>,
    /// The number of slots whose gradients are not just zeros; the sum is divided by it.
    pub(super) contributors: u16,
}

impl Shares {
    pub(super) fn of(view: &View, idle: &[Slot]) -> Self {
        let slots: Vec<Vec<Slot>> = view.members.iter().map(|member| member.slots.clone()).collect();
        let counts = |slot: &&Slot| !idle.contains(slot);
        let contributors = slots.iter().flatten().filter(counts).count() as u16;
        Self { slots, contributors }
    }

    /// Whether an all-reduce sums in the order of the slots.
    fn are_in_rank_order(&self) -> bool {
        self.slots.iter().all(|slots| slots.len() == 1) && self.slots.is_sorted()
    }

    /// All slots in order, each with the rank of who has it and its place there.
    fn in_order(&self) -> Vec<(Slot, usize, usize)> {
        let of = |(rank, slots): (usize, &Vec<Slot>)| {
            slots.iter().enumerate().map(|(place, &slot)| (slot, rank, place)).collect::<Vec<_>>()
        };
        let mut all: Vec<_> = self.slots.iter().enumerate().flat_map(of).collect();
        all.sort_unstable();
        all
    }
}

/// Reduces this member's inputs, in the order of its slots, with those of the others. All inputs have one length, the
/// same on all members, and so has `result`, which is written whole; after an error it may have any elements. Blocks. The
/// inputs stay as they are.
pub(super) fn mean<G: Gradient>(
    communicator: &mut Communicator,
    shares: &Shares,
    inputs: &[Arc<Vec<G>>],
    result: &mut Vec<G>,
) -> Result<(), Error> {
    let (world_size, len) = (communicator.world_size(), result.len());
    if shares.are_in_rank_order()
        && let [input] = inputs
    {
        let all_count = usize::from(shares.contributors) == world_size;
        let op = if all_count { ReduceOp::Avg } else { ReduceOp::Sum };
        communicator.all_reduce_into(input, result, op)?;
        if !all_count {
            divide(result, shares.contributors);
        }
        return Ok(());
    }
    // Everybody owns a part, also of a gradient with fewer elements than members: see the module's comment.
    let part = len.div_ceil(world_size).max(1);
    let received = exchange(communicator, shares, inputs, part)?;
    let offsets = offsets(&shares.slots, part);
    let sources: Vec<&[G]> = shares
        .in_order()
        .into_iter()
        .map(|(_, rank, place)| &received[offsets[rank] + place * part..][..part])
        .collect();
    let mut own = vec![G::default(); part];
    add(&sources, &mut own);
    divide(&mut own, shares.contributors);
    result.resize(part * world_size, G::default());
    let gathered = communicator.all_gather(&own, result);
    result.truncate(len);
    gathered
}

/// Gives each member its part of this one's inputs, and returns what all have of this one's part, by rank and slot.
fn exchange<G: Gradient>(
    communicator: &mut Communicator,
    shares: &Shares,
    inputs: &[Arc<Vec<G>>],
    part: usize,
) -> Result<Vec<G>, Error> {
    let world_size = communicator.world_size();
    let mut packed = Vec::with_capacity(inputs.len() * part * world_size);
    for owner in 0..world_size {
        for input in inputs {
            let start = (owner * part).min(input.len());
            let end = (start + part).min(input.len());
            packed.extend_from_slice(&input[start..end]);
            packed.resize(packed.len() + part - (end - start), G::default());
        }
    }
    let recv_counts: Vec<usize> = shares.slots.iter().map(|slots| slots.len() * part).collect();
    let mut received = vec![G::default(); recv_counts.iter().sum()];
    if recv_counts.iter().all(|&count| count == recv_counts[0]) {
        communicator.all_to_all(&packed, &mut received)?;
    } else {
        let send_counts = vec![inputs.len() * part; world_size];
        communicator.all_to_all_v(&packed, &send_counts, &mut received, &recv_counts)?;
    }
    Ok(received)
}

fn offsets(slots: &[Vec<Slot>], part: usize) -> Vec<usize> {
    let before = |rank: usize| slots[..rank].iter().map(|slots| slots.len() * part).sum();
    (0..slots.len()).map(before).collect()
}

/// The mean of gradients that are all here, in slot order.
pub(super) fn mean_here<G: Gradient>(inputs: &[Arc<Vec<G>>], contributors: u16, len: usize) -> Vec<G> {
    let sources: Vec<&[G]> = inputs.iter().map(|input| &input[..]).collect();
    let mut result = vec![G::default(); len];
    add(&sources, &mut result);
    divide(&mut result, contributors);
    result
}

/// As many elements as stay in the first-level cache with the partial sums of a deep tree.
const BLOCK: usize = 512;

/// The sum of all sources, block by block.
fn add<G: Gradient>(sources: &[&[G]], into: &mut [G]) {
    let mut start = 0;
    for block in into.chunks_mut(BLOCK) {
        let parts: Vec<&[G]> = sources.iter().map(|source| &source[start..start + block.len()]).collect();
        tree(&parts, block);
        start += block.len();
    }
}

fn tree<G: Gradient>(sources: &[&[G]], into: &mut [G]) {
    match sources {
        [] => {}
        [one] => into.copy_from_slice(one),
        [one, other] => {
            for ((sum, &a), &b) in into.iter_mut().zip(*one).zip(*other) {
                *sum = a.plus(b);
            }
        }
        _ => {
            let (left, right) = sources.split_at(sources.len().next_power_of_two() / 2);
            tree(left, into);
            let mut of_right = [G::default(); BLOCK];
            let of_right = &mut of_right[..into.len()];
            tree(right, of_right);
            into.iter_mut().zip(of_right).for_each(|(sum, &mut other)| *sum = sum.plus(other));
        }
    }
}

fn divide<G: Gradient>(sum: &mut [G], count: u16) {
    if count > 1 {
        sum.iter_mut().for_each(|element| *element = element.over(count));
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use paceline_collectives::Config;
    use paceline_transport::mem;

    use super::*;

    fn gradient<G: Gradient>(slot: Slot, len: usize) -> Arc<Vec<G>> {
        let element = |i: usize| {
            let bits = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(slot) << 40;
            G::from_f64((bits >> 20) as f64 / 1e9 - 7.3e3)
        };
        Arc::new((0..len).map(element).collect())
    }

    /// The mean on every member, each with the slots given.
    fn reduced<G: Gradient>(slots: &[Vec<Slot>], contributors: u16, len: usize) -> Vec<Vec<G>> {
        let shares = Shares { slots: slots.to_vec(), contributors };
        let members = mem::group(slots.len(), 1, mem::DEFAULT_WINDOW_BYTES).into_iter().zip(slots.to_vec());
        let threads: Vec<_> = members
            .map(|(transport, own)| {
                let shares = shares.clone();
                thread::spawn(move || {
                    let mut communicator = Communicator::new(Box::new(transport), Config::default())?;
                    let inputs: Vec<_> = own.into_iter().map(|slot| gradient(slot, len)).collect();
                    let mut result = vec![G::default(); len];
                    mean(&mut communicator, &shares, &inputs, &mut result)?;
                    communicator.leave()?;
                    Ok::<_, Error>(result)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().expect("no panic").expect("nobody is lost")).collect()
    }

    fn bits_do_not_depend_on_who_has_which_slots<G: Gradient>() {
        for len in [1, 3, 1000, 1537] {
            for (slots, spreads) in [
                (3u16, vec![vec![vec![0, 1, 2]], vec![vec![0], vec![1], vec![2]], vec![vec![0, 2], vec![1]]]),
                (4, vec![vec![vec![3], vec![0], vec![2], vec![1]], vec![vec![0], vec![1], vec![2], vec![3]]]),
                (
                    7,
                    vec![
                        vec![vec![6], vec![0, 1, 2, 3], vec![4, 5], vec![]],
                        vec![vec![0, 1, 2], vec![3, 4, 5, 6]],
                    ],
                ),
            ] {
                for contributors in [slots, slots - 1] {
                    let all: Vec<Arc<Vec<G>>> = (0..slots).map(|slot| gradient(slot, len)).collect();
                    let expected = mean_here(&all, contributors, len);
                    for spread in &spreads {
                        for mean in reduced::<G>(spread, contributors, len) {
                            assert_eq!(
                                mean, expected,
                                "{spread:?}, {len} elements, {contributors} contribute"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_bits_of_a_mean_do_not_depend_on_who_has_which_slots() {
        bits_do_not_depend_on_who_has_which_slots::<f64>();
        bits_do_not_depend_on_who_has_which_slots::<f32>();
    }

    #[test]
    fn the_order_of_the_sum_matters_for_these_numbers() {
        let all: Vec<_> = (0..7).map(|slot| gradient::<f32>(slot, 1000)).collect();
        let mut other = all.clone();
        other.swap(0, 5);
        assert_ne!(mean_here(&all, 7, 1000), mean_here(&other, 7, 1000), "or the test above shows nothing");
    }
}
