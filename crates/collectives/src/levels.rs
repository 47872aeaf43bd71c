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
//! subtree of the order of summation wherever it stands. Other layouts have one level. Partial sums of
//! 16-bit floats stay in f32 until the last one is rounded, so they make 3 S out of these 2 S, block by
//! block, so that the memory for it is bounded.

use crate::buffer::{Buffers, Starts};
use crate::dtype::{DType, ReduceOp};
use crate::engine::Engine;
use crate::error::Error;
use crate::kernels::Reducer;
use crate::operation::{Operation, Step};
use crate::plan::{Plan, Schedule, Shares, Span};
use crate::shared::Host;

/// 16-bit elements that are in f32 at a time: 4 MiB, whatever the message.
const WIDE_BLOCK_LEN: usize = 1 << 20;

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

/// One all_reduce in levels: what its steps have in common.
struct Route<'a> {
    levels: &'a Levels,
    operation: Operation,
    op: ReduceOp,
    /// The type in which sums are taken, and between hosts.
    dtype: DType,
    world_size: usize,
}

impl<'a> Route<'a> {
    /// A plan of the ranks of this host.
    fn inside(&self, schedule: Schedule, shares: impl Into<Shares>) -> Plan {
        let Levels { members, place, .. } = self.levels;
        Plan::new(schedule, members.len(), *place, shares, self.operation.segment_len as usize)
    }

    /// A plan of the ranks with this rank's place on all hosts.
    fn between(&self, schedule: Schedule, shares: impl Into<Shares>) -> Plan {
        let Levels { counterparts, host, .. } = self.levels;
        Plan::new(schedule, counterparts.len(), *host, shares, self.operation.segment_len as usize)
    }

    /// A step that moves sums.
    fn sums(&self) -> Step {
        Step { operation: self.operation, dtype: self.dtype }
    }

    fn counterparts(&self) -> Group<'a> {
        Group::Some { members: &self.levels.counterparts, place: self.levels.host }
    }

    /// Sums the ranks of a host. A mean is one division, at the end.
    fn first_reducer(&self) -> Option<Reducer> {
        let op = if self.op == ReduceOp::Avg { ReduceOp::Sum } else { self.op };
        Some(Reducer::new(self.dtype, op, self.levels.members.len()))
    }

    /// Sums the sums of the hosts.
    fn last_reducer(&self) -> Option<Reducer> {
        let hosts = self.levels.counterparts.len();
        Some(Reducer::of_partials(self.dtype, self.op, hosts, self.world_size))
    }
}

impl Engine {
    /// Runs an all_reduce inside the hosts and between them.
    pub(crate) fn run_in_levels(
        &mut self,
        host: &mut Host,
        levels: &Levels,
        (operation, op): (Operation, ReduceOp),
        mut buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        let Operation { dtype, count, .. } = operation;
        let route =
            Route { levels, operation, op, dtype: dtype.accumulator(), world_size: self.world_size() };
        if route.dtype != dtype {
            return self.run_wide(host, &route, buffers);
        }
        let inside = route.inside(Schedule::AllReduceDirect, count);
        if self.goes_in_one_step(levels, count * dtype.size()) {
            self.run_on_host(
                host,
                route.sums(),
                &inside,
                route.first_reducer(),
                buffers.with_output_from(0, dtype.size()),
            )?;
            return self.one_step(&route, count, buffers.within_output(Starts::default()));
        }
        let own = inside.owned(levels.place);
        let scatter = route.inside(Schedule::ReduceScatterDirect, inside.owned_shares());
        let slice = buffers.with_output_from(own.start, dtype.size());
        self.run_on_host(host, route.sums(), &scatter, route.first_reducer(), slice)?;
        let between = route.between(Schedule::AllReduceDirect, own.len);
        let slice = buffers.within_output(Starts { input: own.start, output: own.start });
        self.run_among(route.counterparts(), route.sums(), &between, route.last_reducer(), slice)?;
        self.gather_inside(host, &route, &inside, buffers.within_output(Starts::default()))
    }

    /// The exchange of short sums between hosts, in place.
    fn one_step(&mut self, route: &Route<'_>, count: usize, sums: Buffers<'_>) -> Result<(), Error> {
        let plan = route.between(Schedule::AllReduceOneShot, count);
        self.run_among(route.counterparts(), route.sums(), &plan, route.last_reducer(), sums)
    }

    /// Gives all ranks of the host the slices that each of them has, in place.
    fn gather_inside(
        &mut self,
        host: &mut Host,
        route: &Route<'_>,
        inside: &Plan,
        mut all: Buffers<'_>,
    ) -> Result<(), Error> {
        let gather = route.inside(Schedule::AllGatherDirect, inside.owned_shares());
        let own = inside.owned(route.levels.place);
        let buffers = all.within_output(Starts { input: own.start, output: 0 });
        self.run_on_host(host, route.operation.into(), &gather, None, buffers)
    }

    /// The same for elements whose sums are wider than they are, in blocks.
    fn run_wide(
        &mut self,
        host: &mut Host,
        route: &Route<'_>,
        mut buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        let count = route.operation.count;
        let mut wide = self.take_wide(count.min(WIDE_BLOCK_LEN) * size_of::<f32>());
        let mut start = 0;
        // One block at least: all ranks must meet, however short the message.
        loop {
            let block = Span { start, len: WIDE_BLOCK_LEN.min(count - start) };
            let words = bytemuck::cast_slice_mut(&mut wide);
            self.run_wide_block(host, route, block, &mut buffers, &mut words[..block.len])?;
            start += block.len;
            if start >= count {
                break;
            }
        }
        self.give_wide(wide);
        Ok(())
    }

    fn run_wide_block(
        &mut self,
        host: &mut Host,
        route: &Route<'_>,
        block: Span,
        buffers: &mut Buffers<'_>,
        wide: &mut [f32],
    ) -> Result<(), Error> {
        let narrow = route.operation.dtype;
        let size = narrow.size();
        let widths = Reducer::new(narrow, ReduceOp::Sum, 1);
        widths.widen(buffers.input(block, size), bytemuck::cast_slice_mut(wide));
        let inside = route.inside(Schedule::AllReduceDirect, block.len);
        if self.goes_in_one_step(route.levels, block.len * size_of::<f32>()) {
            self.run_on_host(host, route.sums(), &inside, route.first_reducer(), Buffers::in_place(wide))?;
            self.one_step(route, block.len, Buffers::in_place(wide))?;
            widths.narrow(bytemuck::cast_slice(wide), buffers.output_mut(block, size));
            return Ok(());
        }
        let own = inside.owned(route.levels.place);
        let scatter = route.inside(Schedule::ReduceScatterDirect, inside.owned_shares());
        let slice = Buffers::within(wide, Starts { input: 0, output: own.start });
        self.run_on_host(host, route.sums(), &scatter, route.first_reducer(), slice)?;
        // Each host rounds its piece of the slice once, and only then gives it to the others.
        let between = route.between(Schedule::AllReduceDirect, own.len);
        let piece = between.owned(route.levels.host);
        let scatter = route.between(Schedule::ReduceScatterDirect, between.owned_shares());
        let starts = Starts { input: own.start, output: own.start + piece.start };
        let slice = Buffers::within(wide, starts);
        self.run_among(route.counterparts(), route.sums(), &scatter, route.last_reducer(), slice)?;
        let rounded = Span { start: block.start + own.start + piece.start, len: piece.len };
        let sums = &wide[own.start + piece.start..][..piece.len];
        widths.narrow(bytemuck::cast_slice(sums), buffers.output_mut(rounded, size));
        let gather = route.between(Schedule::AllGatherDirect, between.owned_shares());
        let starts = Starts { input: rounded.start, output: block.start + own.start };
        self.run_among(
            route.counterparts(),
            route.operation.into(),
            &gather,
            None,
            buffers.within_output(starts),
        )?;
        let starts = Starts { input: block.start, output: block.start };
        self.gather_inside(host, route, &inside, buffers.within_output(starts))
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
