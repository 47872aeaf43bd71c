//! The scalar reference: what every rank puts in, and what must come out, element by element.
//!
//! Contributions are small whole numbers, so that sums and products are exact in the accumulator of every dtype in any
//! order, and the result is rounded once at most, as [`ReduceOp`] promises. So the comparison is `==` for every
//! schedule, and a wrong element is a defect and never rounding.

use paceline_runtime::collectives::dtype::{bf16, f16};
use paceline_runtime::collectives::{Element, ReduceOp};

use super::collective::{Expected, Member};

/// Contributions to sums, averages and copies are below this. 100 of 8-bit integers wrap around, as they should.
const CONTRIBUTION_LIMIT: u64 = 100;

/// Factors of two in a product at most: 2^6 fits an i8 and every float.
const LARGEST_EXPONENT: u64 = 6;

/// The operators that have a reference.
pub const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Min, ReduceOp::Max, ReduceOp::Avg];

/// The inputs of one check. Another seed gives other inputs, so that what an earlier check left behind is wrong.
#[derive(Debug, Clone, Copy)]
pub struct Reference {
    /// The operator, of [`OPS`].
    pub op: ReduceOp,
    /// The number of ranks.
    pub ranks: usize,
    /// Which inputs.
    pub seed: u64,
}

impl Reference {
    /// Element `index` of the input of `rank`.
    pub fn contribution<T: Value>(&self, rank: usize, index: usize) -> T {
        T::wrapped(self.number(rank, index))
    }

    /// What an output element must be.
    pub fn value<T: Value>(&self, expected: Expected) -> T {
        let (element, numbers) = match expected {
            Expected::Copied { rank, element } => return self.contribution(rank, element),
            Expected::Reduced { element } => (element, 0..self.ranks),
        };
        let numbers = numbers.map(|rank| self.number(rank, element));
        match self.op {
            ReduceOp::Prod => T::wrapped(numbers.product()),
            ReduceOp::Min => T::wrapped(numbers.min().expect("there is a rank")),
            ReduceOp::Max => T::wrapped(numbers.max().expect("there is a rank")),
            ReduceOp::Avg => T::average(numbers.sum(), self.ranks),
            ReduceOp::Sum => T::wrapped(numbers.sum()),
            other => unreachable!("{other} is not one of OPS"),
        }
    }

    fn number(&self, rank: usize, index: usize) -> i64 {
        let number = match self.op {
            // Of the ranks, as many as the element's exponent says contribute a 2.
            ReduceOp::Prod => {
                let of_element = mix(self.seed ^ index as u64);
                let turn = (of_element >> 32).wrapping_add(rank as u64) % self.ranks as u64;
                1 + u64::from(turn < of_element % (LARGEST_EXPONENT + 1))
            }
            _ => mix(self.seed ^ ((rank as u64) << 48) ^ index as u64) % CONTRIBUTION_LIMIT,
        };
        number as i64
    }
}

/// How many elements of an output are not what they must be.
pub fn count_wrong<T: Value>(output: &[T], expected: impl Fn(usize) -> T) -> u64 {
    output.iter().enumerate().filter(|&(index, value)| *value != expected(index)).count() as u64
}

/// Which of the ranks of a barrier left before all had entered: for each rank, when it entered and when it left.
pub fn left_early(member: Member, entered: &[u64], left: u64) -> bool {
    debug_assert_eq!(entered.len(), member.ranks);
    entered.iter().any(|&entered| left < entered)
}

/// SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014): neighbours get unrelated numbers.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// An element type and its exact arithmetic on small whole numbers.
pub trait Value: Element {
    /// The number in this type: integers wrap around, floats round once.
    fn wrapped(number: i64) -> Self;

    /// `sum / ranks` as [`ReduceOp::Avg`] defines it for this type.
    fn average(sum: i64, ranks: usize) -> Self;
}

macro_rules! integers {
    ($($ty:ty),*) => {$(
        impl Value for $ty {
            fn wrapped(number: i64) -> Self { number as $ty }
            fn average(sum: i64, ranks: usize) -> Self { (Self::wrapped(sum) as i128 / ranks as i128) as $ty }
        }
    )*};
}

macro_rules! floats {
    ($($ty:ty as $acc:ty: $narrow:expr);* $(;)?) => {$(
        impl Value for $ty {
            fn wrapped(number: i64) -> Self { $narrow(number as $acc) }
            fn average(sum: i64, ranks: usize) -> Self { $narrow(sum as $acc / ranks as $acc) }
        }
    )*};
}

integers!(i8, u8, i32, i64, u64);
floats! {
    f32 as f32: |x| x;
    f64 as f64: |x| x;
    f16 as f32: f16::from_f32;
    bf16 as f32: bf16::from_f32;
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Expected = Expected::Reduced { element: 5 };

    fn reference(op: ReduceOp) -> Reference {
        Reference { op, ranks: 3, seed: 1 }
    }

    #[test]
    fn the_reference_reduces_what_the_ranks_contribute() {
        for op in OPS {
            let reference = reference(op);
            let inputs: Vec<f64> = (0..3).map(|rank| reference.contribution(rank, 5)).collect();
            let expected = match op {
                ReduceOp::Sum => inputs.iter().sum(),
                ReduceOp::Prod => inputs.iter().product(),
                ReduceOp::Min => inputs.iter().copied().fold(f64::INFINITY, f64::min),
                ReduceOp::Max => inputs.iter().copied().fold(0.0, f64::max),
                ReduceOp::Avg => inputs.iter().sum::<f64>() / 3.0,
                other => unreachable!("{other} has no reference"),
            };
            assert_eq!(reference.value::<f64>(ALL), expected, "{op}");
        }
    }

    #[test]
    fn copies_come_from_their_rank() {
        let reference = reference(ReduceOp::Sum);
        let copied: i32 = reference.value(Expected::Copied { rank: 2, element: 9 });
        assert_eq!(copied, reference.contribution::<i32>(2, 9));
    }

    #[test]
    fn integers_wrap_and_divide_towards_zero() {
        assert_eq!(i8::wrapped(200), -56);
        assert_eq!(i8::average(200, 3), -18, "the sum wraps before it is divided");
        assert_eq!(u8::average(200, 3), 66);
    }

    #[test]
    fn products_stay_within_the_smallest_type_and_are_not_all_equal() {
        let reference = Reference { op: ReduceOp::Prod, ranks: 16, seed: 3 };
        let products: Vec<i64> =
            (0..100).map(|element| reference.value(Expected::Reduced { element })).collect();
        assert!(products.iter().all(|product| (1..=64).contains(product)), "{products:?}");
        assert!(products.contains(&1) && products.contains(&64), "{products:?}");
    }

    #[test]
    fn a_single_wrong_element_is_counted() {
        let reference = reference(ReduceOp::Sum);
        let expected = |element| reference.value::<f32>(Expected::Reduced { element });
        let mut output: Vec<f32> = (0..1000).map(expected).collect();
        assert_eq!(count_wrong(&output, expected), 0);
        output[999] += 1.0;
        assert_eq!(count_wrong(&output, expected), 1);
    }

    #[test]
    fn another_seed_makes_most_elements_wrong() {
        let (old, new) = (reference(ReduceOp::Sum), Reference { seed: 2, ..reference(ReduceOp::Sum) });
        let output: Vec<f32> = (0..1000).map(|element| old.value(Expected::Reduced { element })).collect();
        let wrong = count_wrong(&output, |element| new.value(Expected::Reduced { element }));
        assert!(wrong > 900, "{wrong}");
    }

    #[test]
    fn a_rank_that_leaves_before_the_last_has_entered_is_early() {
        let member = Member { rank: 0, ranks: 2 };
        assert!(!left_early(member, &[5, 9], 9));
        assert!(left_early(member, &[5, 9], 8));
    }
}
