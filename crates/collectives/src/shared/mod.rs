//! Collectives of ranks that share memory: the host back end's fast part.
//!
//! Every collective is a few [steps](steps): stage, publish, meet the others, read. There is no message,
//! no queue and no lock, and a wait that is short never leaves user space. Elements are reduced by their
//! owner, in the fixed order, so the bits are those of every other back end.
//!
//! | what | when | bytes read and written per rank, S bytes, n ranks |
//! |---|---|---|
//! | inline: the payload lies beside the flag | up to [`INLINE_BYTES`] | (n + 1) S |
//! | flat: everybody stages all and reduces all | below the crossing | (n + 1) S read, 2 S written |
//! | by owners, in blocks that stay in the cache | above | (3 - 2/n) S read, 2 S written |
//! | direct: owners read inputs and write outputs | [registered](registered) memory | S read, S written |
//! | exchange: pieces are staged and taken | collectives that only copy | 2 S, or S if registered |
//!
//! Owner-computes is the scheme of DeepSpeed's and YHCCL's collectives (Peng et al., *Optimizing MPI
//! Collectives on Shared Memory Multi-Cores*, SC'23), from which the stores past the caches come too.
//!
//! Every rank meets every other in every collective, also where the data alone would not ask for it (the
//! root of a broadcast waits for all to come). In exchange two halves are enough, and ranks that call
//! different things notice at their first step.

mod board;
pub(crate) mod registered;
mod steps;
mod tuning;

use std::sync::Arc;

use paceline_transport::frame::Prefix;
use paceline_transport::shm::Segments;

use self::board::{Boards, INLINE_BYTES, RESULT_BYTES, STAGED_BYTES};
use self::registered::{Handles, Table};
use self::steps::{Half, Steps};
pub(crate) use self::tuning::{Costs, PROBES, Tuning};
use crate::buffer::{Buffers, RawBuffers};
use crate::dtype::DType;
use crate::error::Error;
use crate::kernels::{self, Reducer, Stores};
use crate::operation::{Kind, Operation};
use crate::plan::{Plan, Schedule};
use crate::rounds::RoundObserver;

/// Slices of a block begin at cache lines, so that two ranks never write one.
const SLICE_UNIT: usize = 64;

/// Looks at a flag before a wait begins to cost more than looking: about a microsecond.
const HOT_LOOKS: u32 = 32;

/// Who is asked what to do while a rank waits.
pub(crate) trait Waiter {
    /// Passes a moment; `false` when it is time to be [idle](Self::idle).
    fn spin(&mut self) -> bool;

    /// Looks for bad news and passes a longer moment.
    fn idle(&mut self, waiting_for: &[usize]) -> Result<(), Error>;

    /// Looks whether somebody has ended this call; one load of an atomic if not.
    fn look(&mut self) -> Result<(), Error>;

    /// The wait is over.
    fn end(&mut self);

    /// The error of a call that `peer` answered with the header of another.
    fn mismatch(&mut self, peer: usize, theirs: &Prefix) -> Error;
}

/// One rank's part in the collectives of its host.
#[derive(Debug)]
pub(crate) struct Host {
    rank: usize,
    world_size: usize,
    boards: Boards,
    steps: Steps,
    hot_looks: u32,
    /// Whether every rank has a processor. If not, times say little about the ways.
    pub(crate) can_probe: bool,
    pub(crate) tuning: Tuning,
    pub(crate) table: Table,
    /// Called before each block of what takes several.
    pub(crate) rounds: Option<RoundObserver>,
    /// The sources and outputs of the reduction at hand; kept for their memory.
    sources: Vec<*const u8>,
    outputs: Vec<*mut u8>,
    /// Bytes of elements staged, and taken from others, since the start.
    pub(crate) staged_bytes: u64,
    pub(crate) taken_bytes: u64,
}

// SAFETY: `sources` and `outputs` are scratch: they are written before they are read, in one call.
unsafe impl Send for Host {}

/// One call on its way.
struct Call<'a> {
    header: Prefix,
    size: usize,
    plan: &'a Plan,
    reducer: Option<&'a mut Reducer>,
    buffers: RawBuffers<'a>,
    waiter: &'a mut dyn Waiter,
}

/// Who needs the result of a reduction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    ByAll,
    By(usize),
}

impl Wanted {
    fn by(self, rank: usize) -> bool {
        matches!(self, Self::ByAll) || self == Self::By(rank)
    }
}

impl Host {
    pub(crate) fn new(segments: Arc<Segments>) -> Self {
        let (rank, world_size) = (segments.rank(), segments.world_size());
        let fits = segments.ranks_fit();
        Self {
            rank,
            world_size,
            hot_looks: if fits { HOT_LOOKS } else { 0 },
            can_probe: fits,
            tuning: Tuning::new(world_size, segments.cache_bytes()),
            boards: Boards::new(segments),
            steps: Steps::default(),
            table: Table::default(),
            rounds: None,
            sources: Vec::with_capacity(world_size),
            outputs: Vec::with_capacity(world_size),
            staged_bytes: 0,
            taken_bytes: 0,
        }
    }

    /// Runs a collective to its end, well or not; its elements may be of another type than those of the operation
    /// that it is a part of. After an error this rank is out of step with the others.
    pub(crate) fn run(
        &mut self,
        (operation, dtype): (&Operation, DType),
        plan: &Plan,
        reducer: Option<&mut Reducer>,
        buffers: &mut Buffers<'_>,
        waiter: &mut dyn Waiter,
    ) -> Result<(), Error> {
        let (header, size) = (operation.to_prefix(0), dtype.size());
        let call = &mut Call { header, size, plan, reducer, buffers: buffers.raw(size), waiter };
        match plan.schedule() {
            Schedule::Barrier => {
                let half = self.enter(call);
                self.meet(half, call)
            }
            Schedule::AllReduceDirect
            | Schedule::AllReduceOneShot
            | Schedule::AllReduceRing
            | Schedule::AllReduceHalving => self.reduce(Wanted::ByAll, call),
            Schedule::ReduceDirect { root } | Schedule::ReduceChain { root } => {
                self.reduce(Wanted::By(root), call)
            }
            Schedule::ReduceScatterDirect | Schedule::ReduceScatterRing | Schedule::ReduceScatterHalving => {
                self.reduce_scatter(call)
            }
            Schedule::AllGatherDirect
            | Schedule::AllGatherRing
            | Schedule::BroadcastDirect { .. }
            | Schedule::BroadcastTree { .. }
            | Schedule::BroadcastChain { .. } => self.exchange(Pieces::SameForAll, call),
            Schedule::Gather { .. } | Schedule::Scatter { .. } | Schedule::AllToAll => {
                self.exchange(Pieces::PerReceiver, call)
            }
            Schedule::SendTo { .. } | Schedule::ReceiveFrom { .. } => {
                unreachable!("messages go through the rings")
            }
        }
    }

    /// Ends this rank's part for good, so that nobody takes it for present.
    pub(crate) fn retract(&self) {
        self.boards.retract();
    }

    /// The header of the call that `peer` has entered after all that this rank has entered, if it has.
    pub(crate) fn ahead(&self, peer: usize) -> Option<Prefix> {
        let half = self.steps.is_ahead(&self.boards, peer)?;
        Some(self.boards.header(peer, half))
    }

    /// Which way a collective goes whose operation counts `bytes` bytes, and why; `None` for messages.
    pub(crate) fn explain(&self, kind: Kind, bytes: usize) -> Option<(&'static str, String)> {
        let Tuning { flat_bytes, slice_bytes, streaming_bytes, costs } = self.tuning;
        let inline = || Some(("inline", format!("up to {INLINE_BYTES} B fit beside the flag")));
        let probed = |micros: f64| format!("; about {micros:.2} us by the probe of rank 0");
        let unprobed = || "; not probed".to_owned();
        match kind {
            Kind::Message { .. } => None,
            Kind::Barrier => Some(("flags", "there is nothing but the flags".to_owned())),
            Kind::AllReduce(_) | Kind::Reduce { .. } if bytes <= INLINE_BYTES => inline(),
            Kind::AllReduce(_) | Kind::Reduce { .. } if bytes <= flat_bytes => {
                let cost = costs.map_or_else(unprobed, |costs| probed(costs.flat.micros(bytes)));
                Some(("flat", format!("one meeting instead of two pays up to {flat_bytes} B{cost}")))
            }
            Kind::AllReduce(_) | Kind::Reduce { .. } => {
                let cost = costs.map_or_else(unprobed, |costs| probed(costs.owners.micros(bytes)));
                let stores = match bytes < streaming_bytes {
                    true => "",
                    false => ", results apart from the input go past the caches",
                };
                Some(("owners", format!("slices of up to {slice_bytes} B stay in the cache{stores}{cost}")))
            }
            Kind::ReduceScatter(_) | Kind::ReduceScatterV { .. } => {
                Some(("owners", format!("each rank reduces its share, {STAGED_BYTES} B staged at a time")))
            }
            _ if bytes * self.world_size <= INLINE_BYTES => inline(),
            _ => Some(("exchange", format!("pieces are staged, {STAGED_BYTES} B at a time"))),
        }
    }

    fn enter(&mut self, call: &Call<'_>) -> Half {
        let half = self.steps.enter();
        self.boards.set_header(half, &call.header);
        half
    }

    /// Where the call may end although nothing is waited for.
    fn begin_round(&self, index: usize, waiter: &mut dyn Waiter) -> Result<(), Error> {
        if let Some(observer) = &self.rounds {
            observer.call(index);
        }
        waiter.look()
    }

    /// Publishes the step and waits until all others have published theirs, for the same call.
    #[inline]
    fn meet(&mut self, half: Half, call: &mut Call<'_>) -> Result<(), Error> {
        self.steps.publish(&self.boards);
        for distance in 1..self.world_size {
            let next = self.rank + distance;
            let peer = if next < self.world_size { next } else { next - self.world_size };
            if !self.steps.has_come(&self.boards, peer) {
                self.wait_for(peer, call.waiter)?;
            }
            let theirs = self.boards.header(peer, half);
            if theirs != call.header {
                return Err(call.waiter.mismatch(peer, &theirs));
            }
        }
        Ok(())
    }

    fn wait_for(&mut self, peer: usize, waiter: &mut dyn Waiter) -> Result<(), Error> {
        for _ in 0..self.hot_looks {
            std::hint::spin_loop();
            if self.steps.has_come(&self.boards, peer) {
                return Ok(());
            }
        }
        while !self.steps.has_come(&self.boards, peer) {
            if !waiter.spin() {
                let missing = |&rank: &usize| rank != self.rank && !self.steps.has_come(&self.boards, rank);
                let waiting_for: Vec<usize> = (0..self.world_size).filter(missing).collect();
                waiter.idle(&waiting_for)?;
            }
        }
        waiter.end();
        Ok(())
    }

    /// all_reduce, or reduce for one rank.
    fn reduce(&mut self, wanted: Wanted, call: &mut Call<'_>) -> Result<(), Error> {
        let bytes = call.plan.input_len(self.rank) * call.size;
        if bytes > INLINE_BYTES && !self.table.is_empty() {
            let handles = self.show_memory(call)?;
            let lens = |_| (bytes, if matches!(wanted, Wanted::ByAll) { bytes } else { 0 });
            if wanted == Wanted::ByAll && self.table.has_all(&handles, call.size, lens) {
                return self.reduce_direct(bytes, &handles, call);
            }
        }
        if bytes <= self.tuning.flat_bytes.max(INLINE_BYTES) {
            self.reduce_flat(wanted, bytes, call)
        } else {
            self.reduce_by_owners(wanted, bytes, call)
        }
    }

    /// Everybody shows everything to everybody, in one step.
    fn reduce_flat(&mut self, wanted: Wanted, bytes: usize, call: &mut Call<'_>) -> Result<(), Error> {
        let half = self.enter(call);
        let inline = bytes <= INLINE_BYTES;
        let place = |boards: &Boards, rank| {
            if inline { boards.inline(rank, half) } else { boards.staged(rank, half) }
        };
        let own = call.buffers.input(0, bytes);
        // SAFETY: `bytes` fit the place (flat_bytes <= STAGED_BYTES), which is ours until published.
        unsafe { kernels::copy(own, place(&self.boards, self.rank), bytes, Stores::Cached) };
        self.staged_bytes += bytes as u64;
        self.meet(half, call)?;
        if !wanted.by(self.rank) || bytes == 0 {
            return Ok(());
        }
        self.sources.clear();
        self.sources.extend(
            (0..self.world_size)
                .map(|rank| if rank == self.rank { own } else { place(&self.boards, rank).cast_const() }),
        );
        self.taken_bytes += (bytes * (self.world_size - 1)) as u64;
        let output = call.buffers.output(0, bytes);
        let reducer = call.reducer.as_mut().expect("an operation that reduces has its kernels");
        // SAFETY: the others' places hold `bytes` bytes that they have published and do not touch before
        // the step after next; input and output are the caller's, the same memory or apart; all are
        // aligned for the dtype (cells to 8 bytes).
        unsafe { reducer.reduce_raw(&self.sources, &[output], bytes, Stores::Cached) };
        Ok(())
    }

    /// Block by block, each rank reduces its slice and leaves the result for the others, who take it while
    /// they reduce their slice of the next block.
    fn reduce_by_owners(&mut self, wanted: Wanted, bytes: usize, call: &mut Call<'_>) -> Result<(), Error> {
        let (rank, world_size) = (self.rank, self.world_size);
        let largest = self.tuning.slice_bytes.min(RESULT_BYTES).min(STAGED_BYTES / world_size) / SLICE_UNIT
            * SLICE_UNIT;
        let blocks = bytes.div_ceil(world_size * largest);
        let slice_bytes = bytes.div_ceil(blocks * world_size).next_multiple_of(SLICE_UNIT);
        // The start of a rank's slice of a block, and its length, which is less at the end.
        let slice = |block: usize, owner: usize| {
            let start = ((block * world_size + owner) * slice_bytes).min(bytes);
            (start, slice_bytes.min(bytes - start))
        };
        let stores = self.tuning.stores(bytes, call.buffers.are_one());
        for block in 0..=blocks {
            self.begin_round(block, call.waiter)?;
            let half = self.enter(call);
            if block < blocks {
                for owner in (0..world_size).filter(|&owner| owner != rank) {
                    let (start, len) = slice(block, owner);
                    let to = self.boards.staged(rank, half).wrapping_add(owner * slice_bytes);
                    // SAFETY: slice number `owner` of the staging area, which holds one for each rank, is
                    // ours to write until published.
                    unsafe { kernels::copy(call.buffers.input(start, len), to, len, Stores::Cached) };
                    self.staged_bytes += len as u64;
                }
            }
            self.meet(half, call)?;
            if block < blocks {
                let (start, len) = slice(block, rank);
                self.reduce_slice(wanted, (start, len, slice_bytes), half, stores, call);
            }
            if block > 0 && wanted.by(rank) {
                for owner in (0..world_size).filter(|&owner| owner != rank) {
                    let (start, len) = slice(block - 1, owner);
                    let from = self.boards.results(owner, half.other());
                    // SAFETY: the owner wrote `len` bytes of results before it published this step, and
                    // does not write them again before it has seen us publish the next.
                    unsafe { kernels::copy(from, call.buffers.output(start, len), len, stores) };
                    self.taken_bytes += len as u64;
                }
            }
        }
        Ok(())
    }

    /// Reduces this rank's slice of a block: into the caller's output, and to where the others take it.
    fn reduce_slice(
        &mut self,
        wanted: Wanted,
        (start, len, slice_bytes): (usize, usize, usize),
        half: Half,
        stores: Stores,
        call: &mut Call<'_>,
    ) {
        if len == 0 {
            return;
        }
        let rank = self.rank;
        self.sources.clear();
        self.sources.extend((0..self.world_size).map(|source| match source == rank {
            true => call.buffers.input(start, len),
            false => self.boards.staged(source, half).wrapping_add(rank * slice_bytes).cast_const(),
        }));
        self.taken_bytes += (len * (self.world_size - 1)) as u64;
        let results = self.boards.results(rank, half);
        let reducer = call.reducer.as_mut().expect("an operation that reduces has its kernels");
        let sources = &self.sources;
        let mut reduce_into = |outputs: &[*mut u8], stores| {
            // SAFETY: the others have published their slices and do not touch them before the step after
            // next. `results` of this half were taken by the others before they published this step. The
            // caller's slice of the output is that of the input or apart from it.
            unsafe { reducer.reduce_raw(sources, outputs, len, stores) }
        };
        let output = wanted.by(rank).then(|| call.buffers.output(start, len));
        match (wanted, output) {
            (_, None) => reduce_into(&[results], Stores::Cached),
            (Wanted::By(_), Some(output)) => reduce_into(&[output], stores),
            (Wanted::ByAll, Some(output)) if stores == Stores::Cached => {
                reduce_into(&[results, output], stores);
            }
            // The results must stay in the cache for the others, the output must not come into it.
            (Wanted::ByAll, Some(output)) => {
                reduce_into(&[results], Stores::Cached);
                // SAFETY: what was just written, into the caller's output.
                unsafe { kernels::copy(results, output, len, stores) };
            }
        }
    }

    /// Shows the others where in registered memory this rank's buffers are, and looks where theirs are.
    fn show_memory(&mut self, call: &mut Call<'_>) -> Result<Vec<Handles>, Error> {
        let half = self.enter(call);
        let (input, output) = call.buffers.places();
        let own = self.table.find(input, output);
        own.write(self.boards.inline(self.rank, half));
        self.meet(half, call)?;
        Ok((0..self.world_size).map(|rank| Handles::read(self.boards.inline(rank, half))).collect())
    }

    /// Each rank reduces its share of the inputs where they are, and writes the result to all outputs.
    fn reduce_direct(&mut self, bytes: usize, handles: &[Handles], call: &mut Call<'_>) -> Result<(), Error> {
        let share = bytes.div_ceil(self.world_size).next_multiple_of(SLICE_UNIT);
        let start = (self.rank * share).min(bytes);
        let len = share.min(bytes - start);
        if len > 0 {
            self.sources.clear();
            self.outputs.clear();
            for (rank, handles) in handles.iter().enumerate() {
                self.sources.push(self.table.input(rank, handles).wrapping_add(start));
                self.outputs.push(self.table.output(rank, handles).wrapping_add(start));
            }
            self.taken_bytes += (len * (self.world_size - 1)) as u64;
            let in_place = handles.iter().all(Handles::are_one);
            let stores = self.tuning.stores(bytes, in_place);
            let reducer = call.reducer.as_mut().expect("an operation that reduces has its kernels");
            // SAFETY: `Table::has_all` has found every buffer, whole and aligned, in memory that this
            // process maps. All ranks are in this call and keep their hands off until they meet below, and
            // each rank touches its own share only.
            unsafe { reducer.reduce_raw(&self.sources, &self.outputs, len, stores) };
        }
        let half = self.enter(call);
        self.meet(half, call)
    }

    fn reduce_scatter(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let (rank, world_size) = (self.rank, self.world_size);
        let size = call.size;
        let owned = |plan: &Plan, owner| {
            let span = plan.owned(owner);
            (span.start * size, span.len * size)
        };
        let direct = if self.table.is_empty() {
            None
        } else {
            let handles = self.show_memory(call)?;
            let lens = |_| (call.plan.input_len(rank) * call.size, 0);
            self.table.has_all(&handles, call.size, lens).then_some(handles)
        };
        let stores = self.tuning.stores(call.plan.input_len(rank) * call.size, call.buffers.are_one());
        if let Some(handles) = direct {
            let (start, len) = owned(call.plan, rank);
            if len > 0 {
                self.sources.clear();
                for (source, handles) in handles.iter().enumerate() {
                    self.sources.push(self.table.input(source, handles).wrapping_add(start));
                }
                let output = call.buffers.output(0, len);
                let reducer = call.reducer.as_mut().expect("an operation that reduces has its kernels");
                // SAFETY: as in `reduce_direct`; the output is the caller's.
                unsafe { reducer.reduce_raw(&self.sources, &[output], len, stores) };
                self.taken_bytes += (len * (world_size - 1)) as u64;
            }
            let half = self.enter(call);
            return self.meet(half, call);
        }
        let slot = STAGED_BYTES / world_size / SLICE_UNIT * SLICE_UNIT;
        let longest = (0..world_size).map(|owner| owned(call.plan, owner).1).max().unwrap_or(0);
        for step in 0..longest.div_ceil(slot).max(1) {
            if step > 0 {
                self.begin_round(step, call.waiter)?;
            }
            let half = self.enter(call);
            for owner in (0..world_size).filter(|&owner| owner != rank) {
                let (start, len) = owned(call.plan, owner);
                let (at, len) = cut(len, step, slot);
                let to = self.boards.staged(rank, half).wrapping_add(owner * slot);
                // SAFETY: slot number `owner` of the staging area is ours to write until published.
                unsafe { kernels::copy(call.buffers.input(start + at, len), to, len, Stores::Cached) };
                self.staged_bytes += len as u64;
            }
            self.meet(half, call)?;
            let (start, len) = owned(call.plan, rank);
            let (at, len) = cut(len, step, slot);
            if len == 0 {
                continue;
            }
            self.sources.clear();
            self.sources.extend((0..world_size).map(|source| match source == rank {
                true => call.buffers.input(start + at, len),
                false => self.boards.staged(source, half).wrapping_add(rank * slot).cast_const(),
            }));
            self.taken_bytes += (len * (world_size - 1)) as u64;
            let output = call.buffers.output(at, len);
            let reducer = call.reducer.as_mut().expect("an operation that reduces has its kernels");
            // SAFETY: the others have published their slots and do not touch them before the step after
            // next; input and output are the caller's.
            unsafe { reducer.reduce_raw(&self.sources, &[output], len, stores) };
        }
        Ok(())
    }

    /// Collectives that copy: everybody stages its pieces, and takes what is for it.
    fn exchange(&mut self, pieces: Pieces, call: &mut Call<'_>) -> Result<(), Error> {
        let (rank, world_size, size) = (self.rank, self.world_size, call.size);
        if let Some((input, output)) = call.plan.piece(rank, rank) {
            let from = call.buffers.input(input.start * size, input.len * size);
            let to = call.buffers.output(output.start * size, output.len * size);
            // SAFETY: both are the caller's buffers; in place they may overlap, which `ptr::copy` allows.
            unsafe { std::ptr::copy(from, to, input.len * size) };
        }
        let longest = call.plan.longest_piece() * size;
        let slots = match pieces {
            Pieces::SameForAll => 1,
            Pieces::PerReceiver => world_size,
        };
        if longest * slots > INLINE_BYTES && !self.table.is_empty() {
            let handles = self.show_memory(call)?;
            let lens = |from| {
                let sends = (0..world_size).any(|to| to != from && call.plan.piece(from, to).is_some());
                (if sends { call.plan.input_len(from) * size } else { 0 }, 0)
            };
            if self.table.has_all(&handles, size, lens) {
                return self.exchange_direct(&handles, call);
            }
        }
        let inline = longest * slots <= INLINE_BYTES;
        let slot = match inline {
            true => longest.max(1),
            false => STAGED_BYTES / slots / SLICE_UNIT * SLICE_UNIT,
        };
        // Where the piece from one rank to another lies, in a step's half.
        let place = |boards: &Boards, half, from, to| {
            let base = if inline { boards.inline(from, half) } else { boards.staged(from, half) };
            match pieces {
                Pieces::SameForAll => base,
                Pieces::PerReceiver => base.wrapping_add(to * slot),
            }
        };
        for step in 0..longest.div_ceil(slot).max(1) {
            if step > 0 {
                self.begin_round(step, call.waiter)?;
            }
            let half = self.enter(call);
            for to in (0..world_size).filter(|&to| to != rank) {
                if let Some((input, _)) = call.plan.piece(rank, to) {
                    let (at, len) = cut(input.len * size, step, slot);
                    let from = call.buffers.input(input.start * size + at, len);
                    // SAFETY: the slot is within our own place of this half, ours until published.
                    unsafe { kernels::copy(from, place(&self.boards, half, rank, to), len, Stores::Cached) };
                    self.staged_bytes += len as u64;
                    if pieces == Pieces::SameForAll {
                        break;
                    }
                }
            }
            self.meet(half, call)?;
            for distance in 1..world_size {
                let from = (rank + distance) % world_size;
                if let Some((_, output)) = call.plan.piece(from, rank) {
                    let (at, len) = cut(output.len * size, step, slot);
                    let to = call.buffers.output(output.start * size + at, len);
                    // SAFETY: the sender has published these bytes and does not touch them before the step
                    // after next.
                    unsafe {
                        kernels::copy(
                            place(&self.boards, half, from, rank),
                            to,
                            len,
                            self.tuning.stores(longest, false),
                        );
                    }
                    self.taken_bytes += len as u64;
                }
            }
        }
        Ok(())
    }

    /// Everybody takes its pieces out of the others' registered inputs.
    fn exchange_direct(&mut self, handles: &[Handles], call: &mut Call<'_>) -> Result<(), Error> {
        let (rank, size) = (self.rank, call.size);
        for distance in 1..self.world_size {
            let from = (rank + distance) % self.world_size;
            if let Some((input, output)) = call.plan.piece(from, rank) {
                let (start, len) = (input.start * size, input.len * size);
                let theirs = self.table.input(from, &handles[from]).wrapping_add(start);
                let to = call.buffers.output(output.start * size, len);
                // SAFETY: as in `reduce_direct`: the whole input is in memory that we map, and its owner keeps
                // it as it is until we meet below.
                unsafe { kernels::copy(theirs, to, len, self.tuning.stores(len, false)) };
                self.taken_bytes += len as u64;
            }
        }
        let half = self.enter(call);
        self.meet(half, call)
    }
}

/// Whether a rank sends the same piece to everybody.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pieces {
    SameForAll,
    PerReceiver,
}

/// Where part number `step` of `len` bytes begins, and its length: `slot`, less at the end, 0 after it.
fn cut(len: usize, step: usize, slot: usize) -> (usize, usize) {
    let start = (step * slot).min(len);
    (start, slot.min(len - start))
}
