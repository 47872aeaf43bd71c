//! Reduction kernels: one order of summation, chosen once per operation.
//!
//! The contributions of an element are combined in a balanced binary tree over the rank index: the
//! left subtree of m ranks holds the largest power of two below m. So an aligned block of 2^k ranks is
//! a subtree wherever it stands, and the result does not depend on which contributions came first, on
//! segmenting, or (later) on whether a host has reduced its block beforehand. 16-bit floats are
//! widened to f32 first and rounded once at the end.
//!
//! The tree is walked like a binary counter: a stack of partial results, one per set bit of the number
//! of contributions so far (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §4.2,
//! pairwise summation). Blocks of [`BLOCK`] elements keep the stack in the L1/L2 cache.
//!
//! The loops are written so that the compiler vectorises them for the baseline target.

use half::{bf16, f16};

use crate::dtype::{DType, Element, ReduceOp};

/// Elements combined at a time: 8 KiB of f32, so that a stack of 5 (31 ranks) stays within 40 KiB.
const BLOCK: usize = 2048;

/// The kernels of one (dtype, operator, world size), with their scratch memory.
#[derive(Debug)]
pub(crate) struct Reducer {
    kernels: Kernels,
    element_size: usize,
    world_size: usize,
    /// The stack of partial results, log2(world size) + 1 blocks of accumulators at most. The words
    /// are storage for any accumulator type: 8 bytes aligned for the largest.
    stack: Vec<Vec<u64>>,
}

/// The own contribution to a reduction.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Own<'a> {
    /// In a buffer of its own.
    Separate(&'a [u8]),
    /// In the output, where the result goes.
    InPlace,
}

/// One function per job; accumulators lie in words, elements in bytes, both aligned for their type.
#[derive(Clone, Copy, Debug)]
struct Kernels {
    /// acc = widen(elements)
    widen: fn(&mut [u64], &[u8]),
    /// left = left op right, over the first `count` accumulators
    combine: Combine,
    /// acc = acc op widen(elements)
    combine_element: CombineElement,
    /// elements = narrow(acc), divided by `world_size` under avg
    narrow: fn(&mut [u8], &[u64], usize),
}

type Combine = fn(&mut [u64], &[u64], usize);
type CombineElement = fn(&mut [u64], &[u8]);

impl Reducer {
    /// The kernels for one operation.
    pub(crate) fn new(dtype: DType, op: ReduceOp, world_size: usize) -> Self {
        Self { kernels: Kernels::of(dtype, op), element_size: dtype.size(), world_size, stack: Vec::new() }
    }

    /// Combines the contribution of every rank, in the tree order, and writes the result to `out`.
    ///
    /// `staged(r)` is rank r's contribution, as many bytes as `out`; it is not asked for `rank`, whose
    /// contribution is `own`.
    pub(crate) fn reduce<'a>(
        &mut self,
        rank: usize,
        own: Own<'_>,
        staged: impl Fn(usize) -> &'a [u8],
        out: &mut [u8],
    ) {
        let block_bytes = BLOCK * self.element_size;
        for start in (0..out.len()).step_by(block_bytes) {
            let block = start..out.len().min(start + block_bytes);
            let mut depth = 0;
            for source in 0..self.world_size {
                let contribution = match own {
                    _ if source != rank => &staged(source)[block.clone()],
                    Own::Separate(own) => &own[block.clone()],
                    Own::InPlace => &out[block.clone()],
                };
                depth = self.push(depth, source, contribution);
            }
            while depth > 1 {
                depth = self.merge(depth, block.len());
            }
            (self.kernels.narrow)(&mut out[block], &self.stack[0], self.world_size);
        }
    }

    /// Puts the contribution number `source` on a stack of `depth` partial results and merges what
    /// is complete, as a carry runs through a counter. Returns the new depth.
    fn push(&mut self, mut depth: usize, source: usize, contribution: &[u8]) -> usize {
        // An odd-numbered contribution is the right neighbour of the single one on top.
        if source % 2 == 1 {
            (self.kernels.combine_element)(&mut self.stack[depth - 1], contribution);
        } else {
            if self.stack.len() == depth {
                self.stack.push(vec![0; BLOCK]);
            }
            (self.kernels.widen)(&mut self.stack[depth], contribution);
            depth += 1;
        }
        for _ in 1..(source + 1).trailing_zeros() {
            depth = self.merge(depth, contribution.len());
        }
        depth
    }

    /// Combines the two topmost partial results of `block_bytes` of elements.
    fn merge(&mut self, depth: usize, block_bytes: usize) -> usize {
        let (below, top) = self.stack.split_at_mut(depth - 1);
        (self.kernels.combine)(&mut below[depth - 2], &top[0], block_bytes / self.element_size);
        depth - 1
    }

    /// `carry = widen(own)`: starts a partial result in the accumulator type.
    pub(crate) fn start_partial(&self, own: &[u8], carry: &mut [u64]) {
        (self.kernels.widen)(carry, own);
    }

    /// `carry = carry op widen(own)`.
    pub(crate) fn add_to_partial(&self, own: &[u8], carry: &mut [u64]) {
        (self.kernels.combine_element)(carry, own);
    }

    /// `out = narrow(carry)`, divided by the world size under [`ReduceOp::Avg`].
    pub(crate) fn finish_partial(&self, carry: &[u64], out: &mut [u8]) {
        (self.kernels.narrow)(out, carry, self.world_size);
    }
}

/// How an element type is accumulated.
trait Accumulate: Element {
    type Acc: bytemuck::Pod;
    fn widen(self) -> Self::Acc;
    fn narrow(acc: Self::Acc) -> Self;
    fn sum(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn prod(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn min(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn max(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn divide(acc: Self::Acc, by: usize) -> Self::Acc;
}

macro_rules! accumulate_float {
    ($($ty:ty as $acc:ty: $widen:expr, $narrow:expr);* $(;)?) => {$(
        impl Accumulate for $ty {
            type Acc = $acc;
            fn widen(self) -> $acc { $widen(self) }
            fn narrow(acc: $acc) -> Self { $narrow(acc) }
            fn sum(a: $acc, b: $acc) -> $acc { a + b }
            fn prod(a: $acc, b: $acc) -> $acc { a * b }
            // Not f32::min: a NaN must win, or a diverged rank goes unnoticed.
            fn min(a: $acc, b: $acc) -> $acc { if a < b || a.is_nan() { a } else { b } }
            fn max(a: $acc, b: $acc) -> $acc { if a > b || a.is_nan() { a } else { b } }
            fn divide(acc: $acc, by: usize) -> $acc { acc / by as $acc }
        }
    )*};
}

macro_rules! accumulate_integer {
    ($($ty:ty),*) => {$(
        impl Accumulate for $ty {
            type Acc = $ty;
            fn widen(self) -> $ty { self }
            fn narrow(acc: $ty) -> Self { acc }
            fn sum(a: $ty, b: $ty) -> $ty { a.wrapping_add(b) }
            fn prod(a: $ty, b: $ty) -> $ty { a.wrapping_mul(b) }
            fn min(a: $ty, b: $ty) -> $ty { a.min(b) }
            fn max(a: $ty, b: $ty) -> $ty { a.max(b) }
            // In 128 bits, since the world size need not fit the element type.
            fn divide(acc: $ty, by: usize) -> $ty { (acc as i128 / by as i128) as $ty }
        }
    )*};
}

accumulate_float! {
    f32 as f32: |x| x, |x| x;
    f64 as f64: |x| x, |x| x;
    f16 as f32: f16::to_f32, f16::from_f32;
    bf16 as f32: bf16::to_f32, bf16::from_f32;
}
accumulate_integer!(i8, u8, i32, i64, u64);

impl Kernels {
    fn of(dtype: DType, op: ReduceOp) -> Self {
        match dtype {
            DType::F32 => Self::typed::<f32>(op),
            DType::F64 => Self::typed::<f64>(op),
            DType::F16 => Self::typed::<f16>(op),
            DType::BF16 => Self::typed::<bf16>(op),
            DType::I8 => Self::typed::<i8>(op),
            DType::U8 => Self::typed::<u8>(op),
            DType::I32 => Self::typed::<i32>(op),
            DType::I64 => Self::typed::<i64>(op),
            DType::U64 => Self::typed::<u64>(op),
        }
    }

    fn typed<T: Accumulate>(op: ReduceOp) -> Self {
        let [sum, prod, min, max] = [
            (|l, r, n| combine::<T>(l, r, n, T::sum)) as Combine,
            |l, r, n| combine::<T>(l, r, n, T::prod),
            |l, r, n| combine::<T>(l, r, n, T::min),
            |l, r, n| combine::<T>(l, r, n, T::max),
        ];
        let (combine, combine_element): (Combine, CombineElement) = match op {
            ReduceOp::Sum | ReduceOp::Avg => (sum, |l, r| combine_element::<T>(l, r, T::sum)),
            ReduceOp::Prod => (prod, |l, r| combine_element::<T>(l, r, T::prod)),
            ReduceOp::Min => (min, |l, r| combine_element::<T>(l, r, T::min)),
            ReduceOp::Max => (max, |l, r| combine_element::<T>(l, r, T::max)),
        };
        let narrow = if op == ReduceOp::Avg { narrow_avg::<T> } else { narrow::<T> };
        Self { widen: widen::<T>, combine, combine_element, narrow }
    }
}

fn accumulators<T: Accumulate>(words: &mut [u64]) -> &mut [T::Acc] {
    bytemuck::cast_slice_mut(words)
}

fn widen<T: Accumulate>(acc: &mut [u64], elements: &[u8]) {
    for (acc, &element) in accumulators::<T>(acc).iter_mut().zip(bytemuck::cast_slice::<u8, T>(elements)) {
        *acc = element.widen();
    }
}

fn combine<T: Accumulate>(
    left: &mut [u64],
    right: &[u64],
    count: usize,
    op: impl Fn(T::Acc, T::Acc) -> T::Acc,
) {
    let right: &[T::Acc] = bytemuck::cast_slice(right);
    for (left, &right) in accumulators::<T>(left)[..count].iter_mut().zip(&right[..count]) {
        *left = op(*left, right);
    }
}

fn combine_element<T: Accumulate>(acc: &mut [u64], elements: &[u8], op: impl Fn(T::Acc, T::Acc) -> T::Acc) {
    for (acc, &element) in accumulators::<T>(acc).iter_mut().zip(bytemuck::cast_slice::<u8, T>(elements)) {
        *acc = op(*acc, element.widen());
    }
}

fn narrow<T: Accumulate>(elements: &mut [u8], acc: &[u64], _world_size: usize) {
    let acc: &[T::Acc] = bytemuck::cast_slice(acc);
    for (element, &acc) in bytemuck::cast_slice_mut::<u8, T>(elements).iter_mut().zip(acc) {
        *element = T::narrow(acc);
    }
}

fn narrow_avg<T: Accumulate>(elements: &mut [u8], acc: &[u64], world_size: usize) {
    let acc: &[T::Acc] = bytemuck::cast_slice(acc);
    for (element, &acc) in bytemuck::cast_slice_mut::<u8, T>(elements).iter_mut().zip(acc) {
        *element = T::narrow(T::divide(acc, world_size));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree by its definition: the left subtree holds the largest power of two below the count.
    fn tree(values: &[f32]) -> f32 {
        match values {
            [] => unreachable!("a group has a rank"),
            [one] => *one,
            _ => {
                let left = values.len().next_power_of_two() / 2;
                tree(&values[..left]) + tree(&values[left..])
            }
        }
    }

    fn reduce<T: Element>(op: ReduceOp, rank: usize, inputs: &[Vec<T>]) -> Vec<T> {
        let mut out = inputs[rank].clone();
        let staged = |source: usize| bytemuck::cast_slice(&inputs[source]);
        let mut in_place = Reducer::new(T::DTYPE, op, inputs.len());
        in_place.reduce(rank, Own::InPlace, staged, bytemuck::cast_slice_mut(&mut out));
        let mut separate = vec![T::default(); out.len()];
        let own = Own::Separate(bytemuck::cast_slice(&inputs[rank]));
        in_place.reduce(rank, own, staged, bytemuck::cast_slice_mut(&mut separate));
        assert_eq!(bytemuck::cast_slice::<T, u8>(&out), bytemuck::cast_slice::<T, u8>(&separate));
        out
    }

    #[test]
    fn sums_follow_the_tree_to_the_bit_for_every_world_and_owner() {
        for world_size in 1..=17 {
            // Powers of ten apart, so that another order gives other bits.
            let value = |rank: usize, i: usize| {
                ((rank * 7 + i * 3) % 11) as f32 * 10f32.powi((rank % 9) as i32 - 4) + 0.1
            };
            let inputs: Vec<Vec<f32>> =
                (0..world_size).map(|rank| (0..BLOCK + 3).map(|i| value(rank, i)).collect()).collect();
            let expected: Vec<f32> = (0..BLOCK + 3)
                .map(|i| tree(&inputs.iter().map(|input| input[i]).collect::<Vec<_>>()))
                .collect();
            for rank in 0..world_size {
                assert_eq!(reduce(ReduceOp::Sum, rank, &inputs), expected, "world {world_size}, rank {rank}");
            }
        }
    }

    #[test]
    fn sixteen_bit_floats_are_rounded_once() {
        // 2048 + 1 + 1 + 1: each 1 alone is lost in f16, together they are not.
        let inputs: Vec<Vec<f16>> = [2048.0, 1.0, 1.0, 1.0].map(|x| vec![f16::from_f32(x)]).to_vec();
        assert_eq!(reduce(ReduceOp::Sum, 0, &inputs), [f16::from_f32(2052.0)]);
        let inputs: Vec<Vec<bf16>> = [256.0, 1.0, 1.0].map(|x| vec![bf16::from_f32(x)]).to_vec();
        assert_eq!(reduce(ReduceOp::Sum, 2, &inputs), [bf16::from_f32(258.0)]);
    }

    #[test]
    fn integers_wrap_and_average_towards_zero() {
        assert_eq!(reduce(ReduceOp::Sum, 0, &[vec![250u8], vec![10]]), [4]);
        assert_eq!(reduce(ReduceOp::Prod, 1, &[vec![16i8], vec![17]]), [16]);
        assert_eq!(reduce(ReduceOp::Avg, 0, &[vec![-5i32], vec![2], vec![-2]]), [-1]);
        assert_eq!(reduce(ReduceOp::Avg, 0, &[vec![u64::MAX - 1], vec![1]]), [u64::MAX / 2]);
    }

    #[test]
    fn a_nan_wins_min_and_max_wherever_it_stands() {
        for nan_at in 0..3 {
            let inputs: Vec<Vec<f64>> =
                (0..3).map(|rank| vec![if rank == nan_at { f64::NAN } else { rank as f64 }]).collect();
            assert!(reduce(ReduceOp::Min, 0, &inputs)[0].is_nan());
            assert!(reduce(ReduceOp::Max, 0, &inputs)[0].is_nan());
        }
        assert_eq!(reduce(ReduceOp::Max, 0, &[vec![1.5f32], vec![-3.0], vec![2.5]]), [2.5]);
        assert_eq!(reduce(ReduceOp::Min, 0, &[vec![1.5f32], vec![-3.0], vec![2.5]]), [-3.0]);
    }
}
