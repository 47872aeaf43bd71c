//! The one loop of all reductions, and that of scaling.
//!
//! One to four sources are combined in registers and written to every output in a single pass, without
//! memory in between. More sources are the business of [`super::Reducer`], which calls this loop on
//! blocks. The levels instantiate it, each behind its own features.

use std::ops::Range;

use super::Stores;
use super::portable::Number;
use super::vector::{Finish, Format, Operator, Vector};

/// Combines `count` elements of one to four sources, left to right as the tree has it, and writes the
/// result to every output. The last argument is the world size, by which a mean is divided.
///
/// # Safety
/// The CPU has the features of the kernel's level. Sources are readable and outputs writable for `count`
/// elements, each aligned for its element; nobody else writes them meanwhile. An output is one of the
/// sources, from the same start, or overlaps nothing else.
pub(super) type Kernel = unsafe fn(&[*const u8], &[*mut u8], usize, Stores, usize);

/// Writes `count` elements times a factor to the output, which may be the input.
///
/// # Safety
/// As for [`Kernel`].
pub(super) type ScaleKernel = unsafe fn(f64, *const u8, *mut u8, usize);

/// The size of a cache line: what a write past the caches should fill.
pub(super) const LINE_BYTES: usize = 64;

/// Registers computed before any is stored. The loads of four independent results hide the latency of
/// the additions, and choosing how to store costs a branch per group instead of per register.
const GROUP: usize = 4;

/// The body of a [`Kernel`]: loads as L, stores as S.
///
/// # Safety
/// As for [`Kernel`].
#[inline(always)]
pub(super) unsafe fn reduce<L, S, O, F>(
    sources: &[*const u8],
    outputs: &[*mut u8],
    count: usize,
    stores: Stores,
    world_size: usize,
) where
    L: Format,
    S: Format<Acc = L::Acc>,
    O: Operator,
    F: Finish,
{
    // SAFETY: the caller's promise, handed on with the same pointers.
    unsafe {
        match *sources {
            [a] => fused::<L, S, O, F, 1>([a], outputs, count, stores, world_size),
            [a, b] => fused::<L, S, O, F, 2>([a, b], outputs, count, stores, world_size),
            [a, b, c] => fused::<L, S, O, F, 3>([a, b, c], outputs, count, stores, world_size),
            [a, b, c, d] => fused::<L, S, O, F, 4>([a, b, c, d], outputs, count, stores, world_size),
            _ => unreachable!("a kernel combines one to four sources"),
        }
    }
}

/// # Safety
/// As for [`Kernel`].
#[inline(always)]
unsafe fn fused<L, S, O, F, const W: usize>(
    sources: [*const u8; W],
    outputs: &[*mut u8],
    count: usize,
    stores: Stores,
    world_size: usize,
) where
    L: Format,
    S: Format<Acc = L::Acc>,
    O: Operator,
    F: Finish,
{
    let lanes = L::Acc::LANES;
    let mut at = match (stores, outputs) {
        (Stores::Streaming, [first, ..]) => count.min(elements_to_line::<S>(*first)),
        _ => 0,
    };
    // SAFETY: every index below is under `count`, so the caller's promise covers all accesses. All
    // sources are read at an index before any output is written there, and no index is visited twice:
    // a source that is an output is read before it changes.
    unsafe {
        if at > 0 {
            one_by_one::<L::One, S::One, O, F, W>(sources, outputs, 0..at, world_size);
        }
        while count - at >= GROUP * lanes {
            let group = [
                S::pack(combined::<L, O, F, W>(&sources, at, world_size)),
                S::pack(combined::<L, O, F, W>(&sources, at + lanes, world_size)),
                S::pack(combined::<L, O, F, W>(&sources, at + 2 * lanes, world_size)),
                S::pack(combined::<L, O, F, W>(&sources, at + 3 * lanes, world_size)),
            ];
            for output in outputs {
                put::<S, GROUP>(group, output.cast::<S::Element>().add(at), stores);
            }
            at += GROUP * lanes;
        }
        while count - at >= lanes {
            let single = [S::pack(combined::<L, O, F, W>(&sources, at, world_size))];
            for output in outputs {
                put::<S, 1>(single, output.cast::<S::Element>().add(at), stores);
            }
            at += lanes;
        }
        if at < count {
            one_by_one::<L::One, S::One, O, F, W>(sources, outputs, at..count, world_size);
        }
    }
}

/// Elements from `output` to the start of the next cache line.
#[inline(always)]
fn elements_to_line<S: Format>(output: *mut u8) -> usize {
    (output.addr().wrapping_neg() % LINE_BYTES) / size_of::<S::Element>()
}

/// The elements that fill no register. A function of its own, shared by all levels.
///
/// # Safety
/// As for [`Kernel`], for the elements of `range`; no features are needed.
#[inline(never)]
unsafe fn one_by_one<L, S, O, F, const W: usize>(
    sources: [*const u8; W],
    outputs: &[*mut u8],
    range: Range<usize>,
    world_size: usize,
) where
    L: Format,
    S: Format<Acc = L::Acc>,
    O: Operator,
    F: Finish,
{
    for at in range {
        // SAFETY: `at` is in the range that the caller promises; read before it is written.
        unsafe {
            let single = S::pack(combined::<L, O, F, W>(&sources, at, world_size));
            for output in outputs {
                S::store(single, output.cast::<S::Element>().add(at));
            }
        }
    }
}

/// One register of the result.
///
/// # Safety
/// As for [`Kernel`], for the elements of a register from `at`.
#[inline(always)]
unsafe fn combined<L: Format, O: Operator, F: Finish, const W: usize>(
    sources: &[*const u8; W],
    at: usize,
    world_size: usize,
) -> L::Acc {
    // SAFETY: the caller promises that the sources are readable here and that the CPU has the features.
    unsafe {
        let total = match W {
            1 => load::<L>(sources[0], at),
            2 => O::combine(load::<L>(sources[0], at), load::<L>(sources[1], at)),
            3 => {
                let left = O::combine(load::<L>(sources[0], at), load::<L>(sources[1], at));
                O::combine(left, load::<L>(sources[2], at))
            }
            4 => {
                let left = O::combine(load::<L>(sources[0], at), load::<L>(sources[1], at));
                let right = O::combine(load::<L>(sources[2], at), load::<L>(sources[3], at));
                O::combine(left, right)
            }
            _ => unreachable!("a kernel combines one to four sources"),
        };
        F::finish(total, world_size)
    }
}

/// # Safety
/// As for [`Kernel`], for the elements of a register from `at`.
#[inline(always)]
unsafe fn load<L: Format>(source: *const u8, at: usize) -> L::Acc {
    // SAFETY: the caller promises that the source is readable here and aligned for its elements.
    unsafe { L::load(source.cast::<L::Element>().add(at)) }
}

/// Stores registers side by side; past the caches only where the address allows, which for outputs that
/// are aligned differently can be true of one and not of the other.
///
/// # Safety
/// As for [`Kernel`], for the elements of N registers from `to`.
#[inline(always)]
unsafe fn put<S: Format, const N: usize>(registers: [S::Packed; N], to: *mut S::Element, stores: Stores) {
    let stream = stores == Stores::Streaming && to.addr().is_multiple_of(S::BYTES);
    for (i, register) in registers.into_iter().enumerate() {
        // SAFETY: the caller promises room for N registers; the alignment has been looked at.
        unsafe {
            let to = to.add(i * S::Acc::LANES);
            if stream { S::stream(register, to) } else { S::store(register, to) }
        }
    }
}

/// The body of a [`ScaleKernel`].
///
/// # Safety
/// As for [`ScaleKernel`].
#[inline(always)]
pub(super) unsafe fn scale<P: Format>(factor: f64, from: *const u8, to: *mut u8, count: usize) {
    let lanes = P::Acc::LANES;
    let whole = count - count % lanes;
    // SAFETY: every index is under `count`, and an element is read before it is written.
    unsafe {
        scale_registers::<P>(factor, from, to, 0..whole);
        scale_registers::<P::One>(factor, from, to, whole..count);
    }
}

/// # Safety
/// As for [`ScaleKernel`], for the elements of `range`, which are whole registers.
#[inline(always)]
unsafe fn scale_registers<P: Format>(factor: f64, from: *const u8, to: *mut u8, range: Range<usize>) {
    // SAFETY: the caller promises the range and the features.
    unsafe {
        let factor = P::Acc::splat(<P::Acc as Vector>::Lane::from_f64(factor));
        for at in range.step_by(P::Acc::LANES) {
            let scaled = P::load(from.cast::<P::Element>().add(at)).prod(factor).settle();
            P::store(P::pack(scaled), to.cast::<P::Element>().add(at));
        }
    }
}
