//! Every level against the definition of a reduction, element by element.

use half::{bf16, f16};

use super::*;
use crate::dtype::Element;

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
        let expected: Vec<f32> =
            (0..BLOCK + 3).map(|i| tree(&inputs.iter().map(|input| input[i]).collect::<Vec<_>>())).collect();
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

/// A span of bytes at a chosen distance from a cache line, with guards on both sides.
struct Guarded {
    lines: Vec<Line>,
    start: usize,
    len: usize,
}

// Read through pointers.
#[allow(dead_code)]
#[derive(Clone)]
#[repr(align(64))]
struct Line([u8; LINE_BYTES]);

const GUARD: u8 = 0xa5;

impl Guarded {
    fn new(offset: usize, contents: &[u8]) -> Self {
        let lines = vec![Line([GUARD; LINE_BYTES]); contents.len() / LINE_BYTES + 4];
        let mut guarded = Self { lines, start: LINE_BYTES + offset, len: contents.len() };
        guarded.set(contents);
        guarded
    }

    fn set(&mut self, contents: &[u8]) {
        // SAFETY: the span is within the lines, which are borrowed mutably; `contents` is elsewhere.
        unsafe { self.pointer().copy_from_nonoverlapping(contents.as_ptr(), contents.len()) }
    }

    fn pointer(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast::<u8>().wrapping_add(self.start)
    }

    /// The span, once the guards have been seen to stand.
    fn checked(&self) -> &[u8] {
        let len = self.lines.len() * LINE_BYTES;
        // SAFETY: lines are bytes without gaps.
        let all = unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast::<u8>(), len) };
        let (before, rest) = all.split_at(self.start);
        let (span, after) = rest.split_at(self.len);
        assert!(before.iter().chain(after).all(|&byte| byte == GUARD), "a write beside the output");
        span
    }
}

/// The definition of a reduction.
trait Reference: Element {
    fn from_random(bits: u64) -> Self;
    fn reduced(op: ReduceOp, contributions: &[Self]) -> Self;
    fn scaled(self, factor: f64) -> Self;
}

fn tree_of<A: Copy>(values: &[A], combine: &impl Fn(A, A) -> A) -> A {
    match values {
        [one] => *one,
        _ => {
            let (left, right) = values.split_at(values.len().next_power_of_two() / 2);
            combine(tree_of(left, combine), tree_of(right, combine))
        }
    }
}

macro_rules! float_reference {
    ($($ty:ty as $acc:ty, bits $bits:ty, $widen:expr, $narrow:expr;)*) => {$(
        impl Reference for $ty {
            /// One in four is any bit pattern, such as infinities, subnormals and NaNs of all kinds.
            fn from_random(bits: u64) -> Self {
                if bits % 4 == 0 { <$ty>::from_bits((bits >> 8) as $bits) } else {
                    let magnitude = [0.001, 1.0, 1000.0][(bits >> 2) as usize % 3];
                    $narrow(((bits >> 8) as i32 as f64 / 2f64.powi(28) * magnitude) as $acc)
                }
            }

            fn reduced(op: ReduceOp, contributions: &[Self]) -> Self {
                let values: Vec<$acc> = contributions.iter().map(|&x| $widen(x)).collect();
                let total = match op {
                    ReduceOp::Sum => tree_of(&values, &|a, b| a + b),
                    ReduceOp::Prod => tree_of(&values, &|a, b| a * b),
                    ReduceOp::Avg => tree_of(&values, &|a, b| a + b) / values.len() as $acc,
                    _ if values.iter().any(|x| x.is_nan()) => <$acc>::NAN,
                    ReduceOp::Min => tree_of(&values, &|a, b| if a < b { a } else { b }),
                    ReduceOp::Max => tree_of(&values, &|a, b| if a > b { a } else { b }),
                };
                if total.is_nan() { <$ty>::NAN } else { $narrow(total) }
            }

            fn scaled(self, factor: f64) -> Self {
                let product = $widen(self) * factor as $acc;
                if product.is_nan() { <$ty>::NAN } else { $narrow(product) }
            }
        }
    )*};
}

macro_rules! integer_reference {
    ($($ty:ty),*) => {$(
        impl Reference for $ty {
            fn from_random(bits: u64) -> Self {
                if bits % 4 == 0 { (bits >> 8) as $ty } else { ((bits >> 8) % 100) as $ty }
            }

            fn reduced(op: ReduceOp, contributions: &[Self]) -> Self {
                let values = contributions.iter().copied();
                match op {
                    ReduceOp::Sum => values.map(i128::from).sum::<i128>() as $ty,
                    ReduceOp::Prod => values.fold(1, |a: $ty, b| a.wrapping_mul(b)),
                    ReduceOp::Min => values.min().expect("a group has a rank"),
                    ReduceOp::Max => values.max().expect("a group has a rank"),
                    ReduceOp::Avg => {
                        let sum = values.map(i128::from).sum::<i128>() as $ty;
                        (i128::from(sum) / contributions.len() as i128) as $ty
                    }
                }
            }

            fn scaled(self, factor: f64) -> Self {
                self.wrapping_mul(factor as $ty)
            }
        }
    )*};
}

float_reference! {
    f32 as f32, bits u32, |x| x, |x| x;
    f64 as f64, bits u64, |x| x, |x| x;
    f16 as f32, bits u16, f16_to_f32, f32_to_f16;
    bf16 as f32, bits u16, |x: bf16| f32::from_bits(u32::from(x.to_bits()) << 16), bf16::from_f32;
}
integer_reference!(i8, u8, i32, i64, u64);

/// The value of an f16 by its definition. (The crate `half` uses the CPU's conversion if there is one.)
fn f16_to_f32(x: f16) -> f32 {
    let bits = i32::from(x.to_bits());
    let (exponent, fraction) = (bits >> 10 & 0x1f, bits & 0x3ff);
    let magnitude = match (exponent, fraction) {
        (0x1f, 0) => f32::INFINITY,
        (0x1f, _) => f32::NAN,
        (0, _) => fraction as f32 * 2f32.powi(-24),
        _ => (fraction + 0x400) as f32 * 2f32.powi(exponent - 25),
    };
    if bits & 0x8000 == 0 { magnitude } else { -magnitude }
}

/// The nearest f16, ties to even, by its definition.
fn f32_to_f16(x: f32) -> f16 {
    if x.is_nan() {
        return f16::NAN;
    }
    let magnitude = f64::from(x.abs());
    let mut bits = 0x7c00;
    if magnitude < 65520.0 {
        let exponent = (magnitude.log2().floor() as i32).max(-14);
        let rounded = (magnitude * 2f64.powi(10 - exponent)).round_ties_even() as u16;
        // A fraction of 0x400 carries into the exponent; none at all is subnormal.
        bits = ((exponent + 14) as u16 * 0x400).wrapping_add(rounded);
    }
    f16::from_bits(bits | if x.is_sign_negative() { 0x8000 } else { 0 })
}

/// xorshift64*, seeded by what is tested.
fn random<T: Reference>(seed: usize, len: usize) -> Vec<T> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            T::from_random(state.wrapping_mul(0x2545_f491_4f6c_dd1d).rotate_left(32))
        })
        .collect()
}

const LENS: [usize; 11] = [0, 1, 3, 15, 16, 17, 63, 64, 65, 1000, BLOCK + 3];
const WORLDS: [usize; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17];

fn every_level_matches_the_definition<T: Reference>() {
    for op in ReduceOp::ALL {
        for world_size in WORLDS {
            for len in LENS {
                let inputs: Vec<Vec<T>> =
                    (0..world_size).map(|rank| random(world_size * 10_000 + len * 20 + rank, len)).collect();
                let expected: Vec<T> = (0..len)
                    .map(|i| T::reduced(op, &inputs.iter().map(|input| input[i]).collect::<Vec<T>>()))
                    .collect();
                for level in Level::available() {
                    for misaligned in [false, true] {
                        matches_from(level, op, &inputs, misaligned, &expected);
                    }
                }
            }
        }
    }
}

/// All ways of writing the same reduction.
fn matches_from<T: Reference>(
    level: Level,
    op: ReduceOp,
    inputs: &[Vec<T>],
    misaligned: bool,
    expected: &[T],
) {
    let world_size = inputs.len();
    // Each buffer at an element of its own in the cache line.
    let offset = |index: usize| if misaligned { (index * 5 + 1) * size_of::<T>() % LINE_BYTES } else { 0 };
    let expected: &[u8] = bytemuck::cast_slice(expected);
    let mut sources: Vec<Guarded> = inputs
        .iter()
        .enumerate()
        .map(|(rank, input)| Guarded::new(offset(rank), bytemuck::cast_slice(input)))
        .collect();
    let blank = vec![0u8; expected.len()];
    let mut outputs: Vec<Guarded> =
        (0..3).map(|index| Guarded::new(offset(world_size + index), &blank)).collect();
    let mut reducer = Reducer::at(level, T::DTYPE, op, world_size);
    for stores in [Stores::Cached, Stores::Streaming] {
        for in_place in [None, Some(expected.len() % world_size)] {
            for output_count in 1..=3 {
                let pointers: Vec<*const u8> =
                    sources.iter_mut().map(|source| source.pointer().cast_const()).collect();
                let mut targets: Vec<*mut u8> =
                    outputs[..output_count].iter_mut().map(Guarded::pointer).collect();
                if let Some(rank) = in_place {
                    targets[0] = pointers[rank].cast_mut();
                }
                // SAFETY: buffers of that size of their own, aligned for T; the first output may be a
                // source, from its start.
                unsafe { reducer.reduce_raw(&pointers, &targets, expected.len(), stores) };
                let case = format!(
                    "{} {op} of {world_size} on {}, {} bytes, {stores:?}, in place {in_place:?}, \
                     misaligned {misaligned}",
                    T::DTYPE,
                    level.name(),
                    expected.len()
                );
                for (index, output) in outputs[..output_count].iter_mut().enumerate() {
                    match in_place {
                        Some(rank) if index == 0 => {
                            assert!(sources[rank].checked() == expected, "{case}, in place");
                            sources[rank].set(bytemuck::cast_slice(&inputs[rank]));
                        }
                        _ => assert!(output.checked() == expected, "{case}, output {index}"),
                    }
                    output.set(&blank);
                }
                for (source, input) in sources.iter().zip(inputs) {
                    assert!(source.checked() == bytemuck::cast_slice::<T, u8>(input), "{case}: a source");
                }
            }
        }
    }
}

macro_rules! every_level_matches_the_definition {
    ($($name:ident: $ty:ty),*) => {$(
        #[test]
        fn $name() {
            every_level_matches_the_definition::<$ty>();
        }
    )*};
}

every_level_matches_the_definition! {
    every_level_matches_the_definition_in_f32: f32,
    every_level_matches_the_definition_in_f64: f64,
    every_level_matches_the_definition_in_f16: f16,
    every_level_matches_the_definition_in_bf16: bf16,
    every_level_matches_the_definition_in_i8: i8,
    every_level_matches_the_definition_in_u8: u8,
    every_level_matches_the_definition_in_i32: i32,
    every_level_matches_the_definition_in_i64: i64,
    every_level_matches_the_definition_in_u64: u64
}

/// Results of one kernel over whole vectors, on every level.
fn on_every_level<T: Element, R: Element>(
    input: &[T],
    kernel: impl Fn(Kernels) -> loops::Kernel,
) -> Vec<(&'static str, Vec<R>)> {
    let run = |level: Level| {
        let mut output = vec![R::default(); input.len()];
        let kernel =
            kernel(level.kernels(if T::DTYPE == DType::F32 { R::DTYPE } else { T::DTYPE }, ReduceOp::Sum));
        let (source, target) = (input.as_ptr().cast(), output.as_mut_ptr().cast());
        // SAFETY: vectors of the same length, of the types of the kernel.
        unsafe { kernel(&[source], &[target], input.len(), Stores::Cached, 1) };
        (level.name(), output)
    };
    Level::available().into_iter().map(run).collect()
}

#[test]
fn every_sixteen_bit_float_widens_to_its_value() {
    // Twice, the second time one element apart: once in registers and once in what is left over.
    let bits: Vec<u16> = (0..=u16::MAX).collect();
    let halves: Vec<f16> = bits.iter().map(|&bits| f16::from_bits(bits)).collect();
    let brains: Vec<bf16> = bits.iter().map(|&bits| bf16::from_bits(bits)).collect();
    for (level, widened) in on_every_level::<f16, f32>(&halves, |kernels| kernels.partial) {
        for (half, wide) in halves.iter().zip(widened) {
            let expected = f16_to_f32(*half);
            assert!(
                wide.to_bits() == expected.to_bits() || expected.is_nan() && wide.is_nan(),
                "{level} {half}"
            );
        }
    }
    for (level, widened) in on_every_level::<bf16, f32>(&brains, |kernels| kernels.partial) {
        for (brain, wide) in brains.iter().zip(widened) {
            let expected = brain.to_f32();
            assert!(
                wide.to_bits() == expected.to_bits() || expected.is_nan() && wide.is_nan(),
                "{level} {brain}"
            );
        }
    }
}

#[test]
fn f32_is_rounded_to_the_nearest_sixteen_bits_with_ties_to_even() {
    // The upper half of every bit pattern, with lower halves at, beside and between the ties of both types.
    let lows = [0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8000, 0x8001, 0xffff];
    let wide: Vec<f32> =
        (0..=u32::from(u16::MAX)).flat_map(|high| lows.map(|low| f32::from_bits(high << 16 | low))).collect();
    for (level, narrow) in on_every_level::<f32, f16>(&wide, |kernels| kernels.finish) {
        for (wide, half) in wide.iter().zip(narrow) {
            assert_eq!(half.to_bits(), f32_to_f16(*wide).to_bits(), "{level} {wide:e}");
        }
    }
    for (level, narrow) in on_every_level::<f32, bf16>(&wide, |kernels| kernels.finish) {
        for (wide, brain) in wide.iter().zip(narrow) {
            let expected = if wide.is_nan() { bf16::NAN } else { bf16::from_f32(*wide) };
            assert_eq!(brain.to_bits(), expected.to_bits(), "{level} {wide:e}");
        }
    }
}

#[test]
fn a_partial_result_passed_on_is_the_reduction_in_rank_order() {
    fn check<T: Reference>(op: ReduceOp) {
        for len in LENS {
            let inputs: [Vec<T>; 2] = [random(len + 1, len), random(len + 2, len)];
            let reducer = Reducer::new(T::DTYPE, op, 2);
            let mut carry = vec![0; len];
            reducer.start_partial(bytemuck::cast_slice(&inputs[0]), &mut carry);
            reducer.add_to_partial(bytemuck::cast_slice(&inputs[1]), &mut carry);
            let mut out = vec![T::default(); len];
            reducer.finish_partial(&carry, bytemuck::cast_slice_mut(&mut out));
            let expected: Vec<T> =
                inputs[0].iter().zip(&inputs[1]).map(|(&a, &b)| T::reduced(op, &[a, b])).collect();
            assert!(
                bytemuck::cast_slice::<T, u8>(&out) == bytemuck::cast_slice::<T, u8>(&expected),
                "{} {op}, {len} elements",
                T::DTYPE
            );
        }
    }
    for op in ReduceOp::ALL {
        check::<f32>(op);
        check::<f64>(op);
        check::<f16>(op);
        check::<bf16>(op);
        check::<i8>(op);
        check::<u64>(op);
    }
}

#[test]
fn scaling_multiplies_in_the_accumulator_type() {
    fn check<T: Reference>(factor: f64) {
        let input: Vec<T> = random(7, 1003);
        let expected: Vec<T> = input.iter().map(|x| x.scaled(factor)).collect();
        let expected: &[u8] = bytemuck::cast_slice(&expected);
        for level in Level::available() {
            let mut output = vec![T::default(); input.len()];
            let (from, to) = (input.as_ptr().cast(), output.as_mut_ptr().cast());
            // SAFETY: two vectors of that many elements of the dtype.
            unsafe { level.scale_kernel(T::DTYPE)(factor, from, to, input.len()) };
            assert!(bytemuck::cast_slice::<T, u8>(&output) == expected, "{} {}", T::DTYPE, level.name());
        }
        let mut output = vec![T::default(); input.len()];
        scale(T::DTYPE, factor, bytemuck::cast_slice(&input), bytemuck::cast_slice_mut(&mut output));
        assert!(bytemuck::cast_slice::<T, u8>(&output) == expected);
        let mut buffer = input;
        scale_in_place(T::DTYPE, factor, bytemuck::cast_slice_mut(&mut buffer));
        assert!(bytemuck::cast_slice::<T, u8>(&buffer) == expected);
    }
    for factor in [0.5, -3.0, 1.0 / 3.0, 1e300] {
        check::<f32>(factor);
        check::<f64>(factor);
        check::<f16>(factor);
        check::<bf16>(factor);
        check::<i8>(factor);
        check::<u8>(factor);
        check::<i32>(factor);
        check::<i64>(factor);
        check::<u64>(factor);
    }
}

#[test]
fn a_copy_past_the_caches_is_a_copy() {
    for (bytes, from_offset, to_offset) in [(0, 0, 0), (1, 3, 5), (63, 1, 2), (4096, 0, 0), (100_003, 7, 33)]
    {
        let contents: Vec<u8> = random(bytes, bytes);
        let mut from = Guarded::new(from_offset, &contents);
        for stores in [Stores::Cached, Stores::Streaming] {
            let mut to = Guarded::new(to_offset, &vec![0; bytes]);
            // SAFETY: two buffers of that size.
            unsafe { copy(from.pointer(), to.pointer(), bytes, stores) };
            assert!(to.checked() == contents, "{bytes} bytes, {stores:?}");
        }
    }
}

#[test]
#[should_panic(expected = "a contribution is as long as the result")]
fn a_contribution_of_another_length_is_refused() {
    let mut reducer = Reducer::new(DType::U8, ReduceOp::Sum, 2);
    reducer.reduce(0, Own::InPlace, |_| &[1, 2, 3], &mut [0; 4]);
}
