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
//! Of other collectives, with S bytes on a rank in the end:
//!
//! | | bytes between hosts, one level | two levels |
//! |---|---|---|
//! | broadcast: to a rank of each host, then inside; or a slice by each rank of the root's host | up to (n - m) S | (h - 1) S |
//! | all_gather: among the ranks with the same place, then block by block inside | (n - m) S | (h - 1) S |
//! | reduce_scatter, S bytes in: summed inside for each host, then among the ranks with the same place | (n - m) S | (h - 1) S |
//! | barrier: inside, then among the ranks with the same place | n log2 n headers | n log2 h headers |
//!
//! Each rank drives its own slice between the hosts (HiCCL, Hidayetoglu et al. 2024, calls it striping), so
//! all their links and processors work. Short messages are summed inside the host by everybody, then
//! exchanged in one step. A rank that has met its host and then its counterparts knows that every rank of
//! every host has come, since the counterparts have met their hosts before: a barrier needs no third step.
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
use crate::network::Broadcast;
use crate::operation::{Kind, Operation, Step};
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

    /// Whether collectives of a kind go by levels where there are two.
    pub(crate) fn serve(kind: Kind) -> bool {
        match kind {
            Kind::AllReduce(_)
            | Kind::Broadcast { .. }
            | Kind::Barrier
            | Kind::AllGather
            | Kind::AllGatherV { .. }
            | Kind::AllToAllCounts
            | Kind::Split
            | Kind::ReduceScatter(_)
            | Kind::ReduceScatterV { .. } => true,
            Kind::Reduce { .. }
            | Kind::Gather { .. }
            | Kind::Scatter { .. }
            | Kind::AllToAll
            | Kind::AllToAllV { .. }
            | Kind::Message { .. } => false,
        }
    }

    /// A plan of the ranks of this host.
    fn inside(&self, schedule: Schedule, shares: impl Into<Shares>, operation: &Operation) -> Plan {
        let segment_len = operation.segment_len as usize;
        Plan::new(schedule, self.members.len(), self.place, shares, segment_len)
    }

    /// A plan of the ranks with this rank's place on all hosts.
    fn between(&self, schedule: Schedule, shares: impl Into<Shares>, operation: &Operation) -> Plan {
        let segment_len = operation.segment_len as usize;
        Plan::new(schedule, self.counterparts.len(), self.host, shares, segment_len)
    }

    fn group(&self) -> Group<'_> {
        Group::Some { members: &self.counterparts, place: self.host }
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
        self.levels.inside(schedule, shares, &self.operation)
    }

    /// A plan of the ranks with this rank's place on all hosts.
    fn between(&self, schedule: Schedule, shares: impl Into<Shares>) -> Plan {
        self.levels.between(schedule, shares, &self.operation)
    }

    /// A step that moves sums.
    fn sums(&self) -> Step {
        Step { operation: self.operation, dtype: self.dtype }
    }

    fn counterparts(&self) -> Group<'a> {
        self.levels.group()
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
    /// Runs a collective that levels [serve](Levels::serve) inside the hosts and between them. `plan` is that
    /// of all ranks.
    pub(crate) fn run_in_levels(
        &mut self,
        host: &mut Host,
        levels: &Levels,
        (operation, plan): (Operation, &Plan),
        mut buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        match operation.kind {
            Kind::AllReduce(op) => self.all_reduce_in_levels(host, levels, (operation, op), buffers),
            Kind::Broadcast { root } => self.broadcast_in_levels(host, levels, (operation, root), buffers),
            Kind::Barrier => {
                let inside = levels.inside(Schedule::Barrier, 0, &operation);
                self.run_on_host(
                    host,
                    operation.into(),
                    &inside,
                    None,
                    buffers.within_output(Starts::default()),
                )?;
                let between = levels.between(Schedule::Barrier, 0, &operation);
                self.run_among(levels.group(), operation.into(), &between, None, buffers)
            }
            Kind::ReduceScatter(op) | Kind::ReduceScatterV { op, .. } => {
                self.reduce_scatter_in_levels(host, levels, (operation, op, plan), buffers)
            }
            _ => self.all_gather_in_levels(host, levels, (operation, plan), buffers),
        }
    }

    fn broadcast_in_levels(
        &mut self,
        host: &mut Host,
        levels: &Levels,
        (operation, root): (Operation, usize),
        mut buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        let (hosts, ranks) = (levels.counterparts.len(), levels.members.len());
        let (root_host, root_place) = (root / ranks, root % ranks);
        let (count, size) = (operation.count, operation.dtype.size());
        let between = |engine: &Self, count: usize| {
            let segment_bytes = operation.segment_len as usize * size;
            let schedule = match engine.network.broadcast(hosts, count * size, segment_bytes) {
                Broadcast::Direct => Schedule::BroadcastDirect { root: root_host },
                Broadcast::Tree => Schedule::BroadcastTree { root: root_host },
                Broadcast::Chain => Schedule::BroadcastChain { root: root_host },
            };
            levels.between(schedule, count, &operation)
        };
        let inside = levels.inside(Schedule::BroadcastDirect { root: root_place }, count, &operation);
        if !self.network.slices_pay(ranks, count * size) {
            if levels.place == root_place {
                let plan = between(self, count);
                let all = buffers.within_output(Starts::default());
                self.run_among(levels.group(), operation.into(), &plan, None, all)?;
            }
            return self.run_on_host(host, operation.into(), &inside, None, buffers);
        }
        if levels.host == root_host {
            let all = buffers.within_output(Starts::default());
            self.run_on_host(host, operation.into(), &inside, None, all)?;
        }
        let slices = levels.inside(Schedule::AllReduceDirect, count, &operation);
        let own = slices.owned(levels.place);
        let plan = between(self, own.len);
        let slice = buffers.within_output(Starts { input: own.start, output: own.start });
        self.run_among(levels.group(), operation.into(), &plan, None, slice)?;
        if levels.host != root_host {
            let gather = levels.inside(Schedule::AllGatherDirect, slices.owned_shares(), &operation);
            let all = buffers.within_output(Starts { input: own.start, output: 0 });
            self.run_on_host(host, operation.into(), &gather, None, all)?;
        }
        Ok(())
    }

    /// First each rank gets the shares of all ranks with its place, then the ranks of a host complete the block
    /// of each host from each other.
    fn all_gather_in_levels(
        &mut self,
        host: &mut Host,
        levels: &Levels,
        (operation, plan): (Operation, &Plan),
        mut buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        let share = |rank: usize| {
            let (_, share) = plan.piece(rank, 0).expect("every rank gathers from every rank");
            share
        };
        let same_place: Vec<Span> = levels.counterparts.iter().map(|&rank| share(rank)).collect();
        let between = levels.between(Schedule::AllGatherDirect, Shares::placed(&same_place), &operation);
        let all = buffers.with_output_from(0, operation.dtype.size());
        self.run_among(levels.group(), operation.into(), &between, None, all)?;
        let ranks = levels.members.len();
        for (block, own) in same_place.into_iter().enumerate() {
            let lens: Vec<usize> = (0..ranks).map(|place| share(block * ranks + place).len).collect();
            let shares = Shares::by_rank(&lens).expect("together they are a part of a buffer");
            let inside = levels.inside(Schedule::AllGatherDirect, shares, &operation);
            let starts = Starts { input: own.start, output: share(block * ranks).start };
            let shares = buffers.within_output(starts);
            self.run_on_host(host, operation.into(), &inside, None, shares)?;
        }
        Ok(())
    }

    /// In blocks of some elements of every share, so that the memory for partial sums is bounded.
    fn reduce_scatter_in_levels(
        &mut self,
        host: &mut Host,
        levels: &Levels,
        (operation, op, plan): (Operation, ReduceOp, &Plan),
        mut buffers: Buffers<'_>,
    ) -> Result<(), Error> {
        let (dtype, world_size) = (operation.dtype.accumulator(), self.world_size());
        let route = Route { levels, operation, op, dtype, world_size };
        let longest = (0..world_size).map(|rank| plan.owned(rank).len).max().unwrap_or(0);
        let block_len = (WIDE_BLOCK_LEN / world_size).clamp(1, longest.max(1));
        // The partial sums for the own place on every host, the widened input for one host, the own result.
        let slots = levels.counterparts.len() + levels.members.len() + 1;
        let mut scratch =
            self.take_wide(slots * (block_len * dtype.size()).next_multiple_of(size_of::<u64>()));
        // One block at least: all ranks must meet, however short the message.
        for start in (0..longest.max(1)).step_by(block_len) {
            let piece = |rank: usize| {
                let share = plan.owned(rank);
                let from = start.min(share.len);
                Span { start: share.start + from, len: block_len.min(share.len - from) }
            };
            let start = start.min(plan.owned(levels.members[levels.place]).len);
            self.reduce_scatter_block(host, &route, (&piece, start), &mut buffers, &mut scratch)?;
        }
        self.give_wide(scratch);
        Ok(())
    }

    /// `piece` says which elements of the input are for a rank, and `start` where they go in its output.
    fn reduce_scatter_block(
        &mut self,
        host: &mut Host,
        route: &Route<'_>,
        (piece, start): (&dyn Fn(usize) -> Span, usize),
        buffers: &mut Buffers<'_>,
        scratch: &mut [u64],
    ) -> Result<(), Error> {
        let Route { levels, operation, dtype, .. } = *route;
        let (narrow, size) = (operation.dtype, dtype.size());
        let ranks = levels.members.len();
        let widths = Reducer::new(narrow, ReduceOp::Sum, 1);
        let same_place: Vec<usize> = levels.counterparts.iter().map(|&rank| piece(rank).len).collect();
        let total: usize = same_place.iter().sum();
        let (sums, rest) = bytemuck::cast_slice_mut::<u64, u8>(scratch)
            .split_at_mut((total * size).next_multiple_of(size_of::<u64>()));
        let mut at = 0;
        for (block, len) in same_place.iter().enumerate() {
            let pieces: Vec<Span> = (0..ranks).map(|place| piece(block * ranks + place)).collect();
            let output = &mut sums[at * size..];
            at += len;
            if dtype == narrow {
                let end = pieces.last().map_or(0, |last| last.start + last.len);
                let inside = route.inside(Schedule::ReduceScatterDirect, Shares::placed(&pieces));
                let input = buffers.input(Span { start: 0, len: end }, size);
                let step = Buffers::Separate { input, output };
                self.run_on_host(host, route.sums(), &inside, route.first_reducer(), step)?;
                continue;
            }
            let lens: Vec<usize> = pieces.iter().map(|piece| piece.len).collect();
            let mut wide = &mut *rest;
            for &piece in &pieces {
                let (into, others) = std::mem::take(&mut wide).split_at_mut(piece.len * size);
                widths.widen(buffers.input(piece, narrow.size()), into);
                wide = others;
            }
            let shares = Shares::by_rank(&lens).expect("together they are a part of a buffer");
            let inside = route.inside(Schedule::ReduceScatterDirect, shares);
            let step = Buffers::Separate { input: rest, output };
            self.run_on_host(host, route.sums(), &inside, route.first_reducer(), step)?;
        }
        let shares = Shares::by_rank(&same_place).expect("together they are a part of a buffer");
        let between = route.between(Schedule::ReduceScatterDirect, shares);
        let own = Span { start, len: same_place[levels.host] };
        if dtype == narrow {
            let step = Buffers::Separate { input: sums, output: buffers.output_mut(own, size) };
            return self.run_among(route.counterparts(), route.sums(), &between, route.last_reducer(), step);
        }
        let output = &mut rest[..own.len * size];
        let step = Buffers::Separate { input: sums, output: &mut *output };
        self.run_among(route.counterparts(), route.sums(), &between, route.last_reducer(), step)?;
        widths.narrow(output, buffers.output_mut(own, narrow.size()));
        Ok(())
    }

    fn all_reduce_in_levels(
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
