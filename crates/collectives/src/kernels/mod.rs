//! Reduction kernels: one order of summation, chosen once per operation.
//!
//! The contributions of an element are combined in a balanced binary tree over the rank index: the
//! left subtree of m ranks holds the largest power of two below m. So an aligned block of 2^k ranks is
//! a subtree wherever it stands, and the result does not depend on which contributions came first, on
//! segmenting, or (later) on whether a host has reduced its block beforehand. 16-bit floats are
//! widened to f32 first and rounded once at the end.
//!
//! Every CPU computes the same bits. A result that is NaN is the one NaN of its type (`f32::NAN`, …):
//! which payload an addition of two NaNs keeps depends on the order of its operands, which compilers
//! are free to swap, and the sign of `inf - inf` depends on the CPU.
//!
//! Up to four ranks are one pass over memory, in registers. For more, the tree is walked like a binary
//! counter over blocks of [`BLOCK`] elements: a stack of partial results, which begins with subtrees of
//! four (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §4.2, pairwise summation).
//!
//! | file | what |
//! |---|---|
//! | `loops.rs` | the loop, generic over what follows |
//! | `vector.rs` | registers, memory formats, operators: the traits |
//! | `portable.rs`, `x86.rs` | registers and formats of each level |
//! | `level.rs`, `table.rs` | which level this CPU has, and its kernels by dtype and operator |

pub mod for_benches;
mod level;
mod loops;
mod portable;
mod table;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

pub use level::Level;

use crate::dtype::{DType, ReduceOp};
use loops::LINE_BYTES;
use table::Kernels;

/// Elements combined at a time when not all ranks fit one pass: 8 KiB of f32, so that a stack of 3
/// (31 ranks) stays within 24 KiB, in the L1 cache.
const BLOCK: usize = 2048;

/// Sources that one pass combines in registers.
const FAN_IN: usize = 4;

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// Through the caches.
    Cached,
    /// Past the caches, for results that do not fit them anyway: a cached store first reads the line
    /// that it is about to overwrite. Nothing is gained for an output that is a source, whose lines have
    /// been read (2026-11-24, 2 cores of an EPYC 7003, f32 sum of 2 × 16 MiB: 22.7 to 33.8 GB/s apart,
    /// 32.9 to 27.9 GB/s in place). An output is streamed where it is aligned to the level's register
    /// whenever the first output is aligned to a cache line; elsewhere, and on [`Level::PORTABLE`],
    /// stores are cached.
    Streaming,
}

/// The kernels of one (dtype, operator, world size), with their scratch memory.
#[derive(Debug)]
pub(crate) struct Reducer {
    kernels: Kernels,
    dtype: DType,
    /// How many ranks contribute to a reduction.
    contributions: usize,
    /// What a mean is divided by.
    world_size: usize,
    /// The stack of partial results, a block of accumulators each. The words are storage for any
    /// accumulator type: 8 bytes aligned for the largest. Allocated when a block is first needed.
    stack: Vec<u64>,
}

/// The own contribution to a reduction.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Own<'a> {
    /// In a buffer of its own.
    Separate(&'a [u8]),
    /// In the output, where the result goes.
    InPlace,
}

impl Reducer {
    /// The kernels for one operation, of this CPU's widest level. Does not allocate.
    pub(crate) fn new(dtype: DType, op: ReduceOp, world_size: usize) -> Self {
        Self::at(Level::detected(), dtype, op, world_size)
    }

    /// The kernels for the last of two levels: `contributions` partial results are combined, of `world_size`
    /// ranks together.
    pub(crate) fn of_partials(dtype: DType, op: ReduceOp, contributions: usize, world_size: usize) -> Self {
        Self { contributions, ..Self::new(dtype, op, world_size) }
    }

    /// The kernels of a given level.
    pub(crate) fn at(level: Level, dtype: DType, op: ReduceOp, world_size: usize) -> Self {
        let kernels = level.kernels(dtype, op);
        Self { kernels, dtype, contributions: world_size, world_size, stack: Vec::new() }
    }

    /// Combines the contribution of every rank, in the tree order, and writes the result to `out`.
    ///
    /// `staged(r)` is rank r's contribution, as many bytes as `out`; it is not asked for `rank`, whose
    /// contribution is `own`.
    ///
    /// # Panics
    /// If a contribution has another size than `out`, or a buffer is not aligned for the dtype.
    pub(crate) fn reduce<'a>(
        &mut self,
        rank: usize,
        own: Own<'_>,
        staged: impl Fn(usize) -> &'a [u8],
        out: &mut [u8],
    ) {
        self.reduce_with(rank, own, staged, out, Stores::Cached);
    }

    /// [`Self::reduce`] with a choice of how the result is written.
    fn reduce_with<'a>(
        &mut self,
        rank: usize,
        own: Own<'_>,
        staged: impl Fn(usize) -> &'a [u8],
        out: &mut [u8],
        stores: Stores,
    ) {
        let bytes = out.len();
        let output = out.as_mut_ptr();
        let checked = |contribution: &[u8]| {
            assert_eq!(contribution.len(), bytes, "a contribution is as long as the result");
            contribution.as_ptr()
        };
        let sources: Vec<*const u8> = (0..self.contributions)
            .map(|source| match own {
                _ if source != rank => checked(staged(source)),
                Own::Separate(own) => checked(own),
                Own::InPlace => output.cast_const(),
            })
            .collect();
        for &source in sources.iter().chain([&output.cast_const()]) {
            check_alignment(self.dtype, source);
        }
        // SAFETY: sources and output are slices of `bytes` bytes (just checked, as is the alignment) or
        // the output itself. The output is borrowed mutably, so that it overlaps no other source, and
        // the shared borrows keep everybody from writing to the sources.
        unsafe { self.reduce_raw(&sources, &[output], bytes, stores) }
    }

    /// Combines the contributions of all ranks, in the tree order, and writes the result to every one
    /// of `outputs`.
    ///
    /// # Panics
    /// If there are not as many sources as ranks.
    ///
    /// # Safety
    /// Each source is readable and each output writable for `bytes` bytes, a whole number of elements,
    /// and aligned for the dtype. Nobody else writes any of them meanwhile. An output is one of the
    /// sources, from the same start, or overlaps none of them; outputs do not overlap each other.
    pub(crate) unsafe fn reduce_raw(
        &mut self,
        sources: &[*const u8],
        outputs: &[*mut u8],
        bytes: usize,
        stores: Stores,
    ) {
        assert_eq!(sources.len(), self.contributions, "every rank contributes");
        let count = bytes / self.dtype.size();
        if sources.len() <= FAN_IN {
            // SAFETY: the caller's promise. The level has been detected: `Level`.
            unsafe { (self.kernels.fused)(sources, outputs, count, stores, self.world_size) };
        } else {
            // SAFETY: the caller's promise.
            unsafe { self.reduce_blocks(sources, outputs, count, stores) };
        }
        stores.settle();
    }

    /// [`Self::reduce_raw`] for more sources than one pass takes.
    ///
    /// # Safety
    /// As for `reduce_raw`.
    unsafe fn reduce_blocks(
        &mut self,
        sources: &[*const u8],
        outputs: &[*mut u8],
        count: usize,
        stores: Stores,
    ) {
        let size = self.dtype.size();
        let mut block_sources = sources.to_vec();
        let mut block_outputs = outputs.to_vec();
        // The first block ends at a cache line, so that the others can stream from their start.
        let misaligned = outputs.first().map_or(0, |first| first.addr() % LINE_BYTES / size);
        let mut start = 0;
        let mut end = count.min(BLOCK - misaligned);
        while start < count {
            for (block, whole) in block_sources.iter_mut().zip(sources) {
                *block = whole.wrapping_add(start * size);
            }
            for (block, whole) in block_outputs.iter_mut().zip(outputs) {
                *block = whole.wrapping_add(start * size);
            }
            // SAFETY: start..end is within the count that the caller promises, and a block at most.
            unsafe { self.reduce_block(&block_sources, &block_outputs, end - start, stores) };
            start = end;
            end = count.min(end + BLOCK);
        }
    }

    /// [`Self::reduce_blocks`] for `count` elements, a block at most.
    ///
    /// # Safety
    /// As for `reduce_raw`.
    unsafe fn reduce_block(
        &mut self,
        sources: &[*const u8],
        outputs: &[*mut u8],
        count: usize,
        stores: Stores,
    ) {
        debug_assert!(count <= BLOCK && sources.len() > FAN_IN);
        let complete = sources.len().div_ceil(FAN_IN) - 1;
        // A counter up to `complete` has at most so many digits set; the last subtree comes on top.
        let slots = complete.ilog2() as usize + 2;
        let words_per_slot = BLOCK * self.dtype.accumulator().size() / size_of::<u64>();
        self.stack.resize(self.stack.len().max(slots * words_per_slot), 0);
        let stack = self.stack.as_mut_ptr();
        let slot = |index: usize| {
            assert!(index < slots, "the stack holds as many partial results as the counter has digits");
            stack.wrapping_add(index * words_per_slot).cast::<u8>()
        };
        let Kernels { partial, merge, finish, .. } = self.kernels;
        let world_size = self.world_size;
        // SAFETY: the caller's promise for sources and outputs. Slots are within the stack (asserted), a
        // block of accumulators each, apart from each other and from everybody's buffers; each is
        // written as far as `count` before it is read. The level has been detected: `Level`.
        unsafe {
            let merge_top = |depth: usize| {
                let (left, right) = (slot(depth - 2), slot(depth - 1));
                merge(&[left.cast_const(), right.cast_const()], &[left], count, Stores::Cached, world_size);
                depth - 1
            };
            let mut depth = 0;
            for (index, subtree) in sources.chunks(FAN_IN).enumerate() {
                partial(subtree, &[slot(depth)], count, Stores::Cached, world_size);
                depth += 1;
                if index < complete {
                    for _ in 0..(index + 1).trailing_zeros() {
                        depth = merge_top(depth);
                    }
                }
            }
            while depth > 2 {
                depth = merge_top(depth);
            }
            finish(&[slot(0).cast_const(), slot(1).cast_const()], outputs, count, stores, world_size);
        }
    }

    /// `carry = widen(own)`: starts a partial result in the accumulator type.
    pub(crate) fn start_partial(&self, own: &[u8], carry: &mut [u64]) {
        let count = self.check_partial(own, carry);
        let (own, carry) = (own.as_ptr(), carry.as_mut_ptr().cast());
        // SAFETY: `check_partial` has checked sizes and alignment; the borrows keep the buffers apart and
        // everybody else out. The level has been detected: `Level`.
        unsafe { (self.kernels.partial)(&[own], &[carry], count, Stores::Cached, self.world_size) };
    }

    /// `wide = widen(narrow)`: elements as their accumulators, f32 for 16-bit floats.
    ///
    /// # Panics
    /// If there are not as many of both, or they are not aligned.
    pub(crate) fn widen(&self, narrow: &[u8], wide: &mut [u8]) {
        let count = self.check_widths(narrow, wide);
        // SAFETY: `check_widths` has checked sizes and alignment; the borrows keep the buffers apart and
        // everybody else out. The level has been detected: `Level`.
        unsafe { (self.kernels.partial)(&[narrow.as_ptr()], &[wide.as_mut_ptr()], count, Stores::Cached, 1) };
    }

    /// `narrow = round(wide)`, the other way. To be asked of a reducer that does not divide.
    ///
    /// # Panics
    /// If there are not as many of both, or they are not aligned.
    pub(crate) fn narrow(&self, wide: &[u8], narrow: &mut [u8]) {
        let count = self.check_widths(narrow, wide);
        // SAFETY: as above.
        unsafe { (self.kernels.finish)(&[wide.as_ptr()], &[narrow.as_mut_ptr()], count, Stores::Cached, 1) };
    }

    fn check_widths(&self, narrow: &[u8], wide: &[u8]) -> usize {
        check_alignment(self.dtype, narrow.as_ptr());
        check_alignment(self.dtype.accumulator(), wide.as_ptr());
        let count = narrow.len() / self.dtype.size();
        assert_eq!(wide.len(), count * self.dtype.accumulator().size(), "as many elements of both widths");
        count
    }

    /// `carry = carry op widen(own)`.
    pub(crate) fn add_to_partial(&self, own: &[u8], carry: &mut [u64]) {
        let count = self.check_partial(own, carry);
        let (size, acc_size) = (self.dtype.size(), self.dtype.accumulator().size());
        let (own, carry) = (own.as_ptr(), carry.as_mut_ptr().cast::<u8>());
        let Kernels { partial, merge, .. } = self.kernels;
        if size == acc_size {
            // SAFETY: `check_partial` has checked sizes and alignment; the borrows keep the buffers apart
            // and everybody else out. The level has been detected: `Level`.
            unsafe { merge(&[carry, own], &[carry], count, Stores::Cached, self.world_size) };
            return;
        }
        let mut widened = [0f32; BLOCK];
        let widened = widened.as_mut_ptr().cast::<u8>();
        for start in (0..count).step_by(BLOCK) {
            let block = BLOCK.min(count - start);
            let own = own.wrapping_add(start * size);
            let carry = carry.wrapping_add(start * acc_size);
            // SAFETY: as above, with start + block <= count. `widened` has room for a block, and elements
            // that are not their own accumulators are accumulated in f32.
            unsafe {
                partial(&[own], &[widened], block, Stores::Cached, self.world_size);
                merge(&[carry, widened], &[carry], block, Stores::Cached, self.world_size);
            }
        }
    }

    /// `carry = carry op received` of `count` elements, both in the accumulator type.
    ///
    /// # Panics
    /// If either has fewer.
    pub(crate) fn merge_partials(&self, received: &[u64], carry: &mut [u64], count: usize) {
        let bytes = count * self.dtype.accumulator().size();
        assert!(
            bytes <= size_of_val(received) && bytes <= size_of_val(carry),
            "partial results have room for every element"
        );
        let (received, carry) = (received.as_ptr().cast(), carry.as_mut_ptr().cast::<u8>());
        // SAFETY: lengths are checked, words are aligned for every accumulator; the borrows keep the buffers
        // apart and everybody else out. The level has been detected: `Level`.
        unsafe { (self.kernels.merge)(&[carry, received], &[carry], count, Stores::Cached, self.world_size) };
    }

    /// `out = narrow(carry)`, divided by the world size under [`ReduceOp::Avg`].
    pub(crate) fn finish_partial(&self, carry: &[u64], out: &mut [u8]) {
        let count = self.check_partial(out, carry);
        let (carry, out) = (carry.as_ptr().cast(), out.as_mut_ptr());
        // SAFETY: `check_partial` has checked sizes and alignment; the borrows keep the buffers apart and
        // everybody else out. The level has been detected: `Level`.
        unsafe { (self.kernels.finish)(&[carry], &[out], count, Stores::Cached, self.world_size) };
    }

    /// The number of elements, for which the partial result must have room.
    fn check_partial(&self, elements: &[u8], carry: &[u64]) -> usize {
        check_alignment(self.dtype, elements.as_ptr());
        let count = elements.len() / self.dtype.size();
        assert!(
            count * self.dtype.accumulator().size() <= size_of_val(carry),
            "a partial result has room for every element"
        );
        count
    }
}

fn check_alignment(dtype: DType, buffer: *const u8) {
    assert!(buffer.addr().is_multiple_of(dtype.size()), "buffers are aligned for their dtype");
}

impl Stores {
    /// Makes what was stored visible before anything that the caller stores next: stores past the
    /// caches are not ordered with others.
    fn settle(self) {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Streaming {
            x86::fence();
        }
    }
}

/// From here on copies are loops of ours. The C library's turn into `rep movsb` at 4 KiB, in which perf saw
/// 72 % of an all_reduce of 1 MiB (2 cores of an AMD EPYC, Zen 3, in a virtual machine, 2026-11-25: about
/// 400 µs with it, 85 to 105 µs with this, on a noisy machine).
const LONG_COPY_BYTES: usize = 2048;

/// Copies bytes.
///
/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`].
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize, stores: Stores) {
    if stores == Stores::Cached && bytes < LONG_COPY_BYTES {
        // SAFETY: the caller's promise.
        unsafe { to.copy_from_nonoverlapping(from, bytes) };
    } else {
        // The "sum" of one contribution.
        let kernels = Level::detected().kernels(DType::U8, ReduceOp::Sum);
        // SAFETY: the caller's promise; bytes are always aligned. The level has been detected.
        unsafe { (kernels.fused)(&[from], &[to], bytes, stores, 1) };
    }
    stores.settle();
}

/// `output[i] = input[i] * factor`.
///
/// As in NCCL's premultiplied sum (`ncclRedOpCreatePreMulSum`), whose scalar has the type of the elements:
/// for integers the factor is converted to the type (towards zero, saturating) and products wrap. For
/// floats it is converted to the accumulator type, in which the product is taken before it is rounded
/// once; NCCL rounds the scalar of 16-bit floats to 16 bits.
///
/// # Panics
/// If the buffers have different sizes or are not aligned for the dtype.
pub fn scale(dtype: DType, factor: f64, input: &[u8], output: &mut [u8]) {
    assert_eq!(input.len(), output.len(), "what is scaled is as long as the result");
    check_alignment(dtype, input.as_ptr());
    check_alignment(dtype, output.as_ptr());
    let count = input.len() / dtype.size();
    // SAFETY: two slices of that many elements, aligned (just checked), kept apart by their borrows. The
    // level has been detected.
    unsafe { Level::detected().scale_kernel(dtype)(factor, input.as_ptr(), output.as_mut_ptr(), count) }
}

/// [`scale`] where the elements stand.
///
/// # Panics
/// If the buffer is not aligned for the dtype.
pub fn scale_in_place(dtype: DType, factor: f64, buffer: &mut [u8]) {
    check_alignment(dtype, buffer.as_ptr());
    let count = buffer.len() / dtype.size();
    let buffer = buffer.as_mut_ptr();
    // SAFETY: one slice of that many elements, aligned (just checked), that may be input and output. The
    // level has been detected.
    unsafe { Level::detected().scale_kernel(dtype)(factor, buffer, buffer, count) }
}
