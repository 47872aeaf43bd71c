//! Slow, obvious computations to compare with, and reproducible numbers.

use paceline_collectives::dtype::{bf16, f16};
use paceline_collectives::{Element, ReduceOp};

/// SplitMix64 (Steele, Lea & Flood 2014): reproducible numbers from a seed.
#[derive(Clone, Copy, Debug)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Conversions from and to small whole numbers, which every dtype holds exactly.
pub trait Number: Element {
    /// The element of this value; values are between 0 and 120.
    fn of(value: u32) -> Self;
    /// The reduction of `values` by its definition, in 128-bit or double arithmetic.
    fn reduce(values: &[u32], op: ReduceOp) -> Self;
}

fn exact(values: &[u32], op: ReduceOp) -> f64 {
    let values = values.iter().map(|&value| f64::from(value));
    match op {
        ReduceOp::Sum => values.sum(),
        ReduceOp::Prod => values.product(),
        ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
        ReduceOp::Max => values.fold(0.0, f64::max),
        ReduceOp::Avg => values.clone().sum::<f64>() / values.len() as f64,
        _ => unimplemented_op(op),
    }
}

fn unimplemented_op(op: ReduceOp) -> f64 {
    panic!("the reference does not know {op}")
}

macro_rules! number_float {
    ($($ty:ty: $from:expr),*) => {$(
        impl Number for $ty {
            fn of(value: u32) -> Self { $from(value as f32) }
            fn reduce(values: &[u32], op: ReduceOp) -> Self { $from(exact(values, op) as f32) }
        }
    )*};
}

macro_rules! number_integer {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            fn of(value: u32) -> Self { value as $ty }
            fn reduce(values: &[u32], op: ReduceOp) -> Self {
                // Small integers wrap around: in i128 no sum or product of the tests does.
                let values = values.iter().map(|&value| i128::from(value));
                match op {
                    ReduceOp::Sum => values.sum::<i128>() as $ty,
                    ReduceOp::Prod => values.product::<i128>() as $ty,
                    ReduceOp::Avg => {
                        let count = values.len();
                        (values.sum::<i128>() as $ty as i128 / count as i128) as $ty
                    }
                    ReduceOp::Min => values.min().unwrap_or(0) as $ty,
                    ReduceOp::Max => values.max().unwrap_or(0) as $ty,
                    _ => unimplemented_op(op) as $ty,
                }
            }
        }
    )*};
}

number_float!(f32: |x: f32| x, f16: f16::from_f32, bf16: bf16::from_f32);
number_integer!(i8, u8, i32, i64, u64);

impl Number for f64 {
    fn of(value: u32) -> Self {
        f64::from(value)
    }

    fn reduce(values: &[u32], op: ReduceOp) -> Self {
        exact(values, op)
    }
}

/// The sum of `values` in the fixed order: a balanced binary tree whose left half holds the largest
/// power of two below the count.
pub fn tree_sum(values: &[f32]) -> f32 {
    if let [one] = values {
        return *one;
    }
    let (left, right) = values.split_at(values.len().next_power_of_two() / 2);
    tree_sum(left) + tree_sum(right)
}
