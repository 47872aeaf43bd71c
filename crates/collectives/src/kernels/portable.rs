//! The arithmetic by its definition, in arrays that the compiler may put into registers of any target.
//!
//! Every other level computes the same bits. The last elements of a span, which fill no register, are
//! computed here on every level.

use half::{bf16, f16};

use super::vector::{Format, Vector};

/// An accumulator.
pub(super) trait Number: bytemuck::Pod {
    fn sum(self, other: Self) -> Self;
    fn prod(self, other: Self) -> Self;
    fn min(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    fn divide(self, by: usize) -> Self;
    fn settle(self) -> Self;
    /// The nearest float, or the integer towards zero, saturating.
    fn from_f64(factor: f64) -> Self;
}

macro_rules! float_number {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            #[inline(always)]
            fn sum(self, other: Self) -> Self { self + other }
            #[inline(always)]
            fn prod(self, other: Self) -> Self { self * other }
            // Not f32::min: a NaN must win, or a diverged rank goes unnoticed.
            #[inline(always)]
            fn min(self, other: Self) -> Self { if self < other || self.is_nan() { self } else { other } }
            #[inline(always)]
            fn max(self, other: Self) -> Self { if self > other || self.is_nan() { self } else { other } }
            #[inline(always)]
            fn divide(self, by: usize) -> Self { self / by as $ty }
            #[inline(always)]
            fn settle(self) -> Self { if self.is_nan() { <$ty>::NAN } else { self } }
            #[inline(always)]
            fn from_f64(factor: f64) -> Self { factor as $ty }
        }
    )*};
}

macro_rules! integer_number {
    // A world size fits an i64, and 64 bits hold any quotient: the 128 bits of the definition are not
    // needed to get its result.
    ($($ty:ty => $wide:ty),*) => {$(
        impl Number for $ty {
            #[inline(always)]
            fn sum(self, other: Self) -> Self { self.wrapping_add(other) }
            #[inline(always)]
            fn prod(self, other: Self) -> Self { self.wrapping_mul(other) }
            #[inline(always)]
            fn min(self, other: Self) -> Self { Ord::min(self, other) }
            #[inline(always)]
            fn max(self, other: Self) -> Self { Ord::max(self, other) }
            #[inline(always)]
            fn divide(self, by: usize) -> Self { (self as $wide / by as $wide) as $ty }
            #[inline(always)]
            fn settle(self) -> Self { self }
            #[inline(always)]
            fn from_f64(factor: f64) -> Self { factor as $ty }
        }
    )*};
}

float_number!(f32, f64);
integer_number!(i8 => i64, u8 => u64, i32 => i64, i64 => i64, u64 => u64);

/// Several accumulators side by side.
#[derive(Clone, Copy)]
pub(super) struct Array<T, const N: usize>([T; N]);

impl<T: Number, const N: usize> Array<T, N> {
    #[inline(always)]
    fn zip(self, other: Self, combine: impl Fn(T, T) -> T) -> Self {
        Self(std::array::from_fn(|i| combine(self.0[i], other.0[i])))
    }
}

impl<T: Number, const N: usize> Vector for Array<T, N> {
    type Lane = T;
    const LANES: usize = N;

    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: the caller promises N readable lanes, aligned for T, which is an array's alignment.
        Self(unsafe { from.cast::<[T; N]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        // SAFETY: the caller promises N writable lanes, aligned for T, which is an array's alignment.
        unsafe { to.cast::<[T; N]>().write(self.0) }
    }

    /// There is no portable way past the caches.
    #[inline(always)]
    unsafe fn stream(self, to: *mut T) {
        // SAFETY: the caller promises N writable lanes, aligned for more than T.
        unsafe { self.store(to) }
    }

    #[inline(always)]
    unsafe fn splat(lane: T) -> Self {
        Self([lane; N])
    }

    #[inline(always)]
    unsafe fn sum(self, other: Self) -> Self {
        self.zip(other, T::sum)
    }

    #[inline(always)]
    unsafe fn prod(self, other: Self) -> Self {
        self.zip(other, T::prod)
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, T::min)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, T::max)
    }

    #[inline(always)]
    unsafe fn divide(self, by: usize) -> Self {
        Self(self.0.map(|lane| lane.divide(by)))
    }

    #[inline(always)]
    unsafe fn settle(self) -> Self {
        Self(self.0.map(T::settle))
    }
}

macro_rules! sixteen_bit_format {
    ($($name:ident: $element:ty),*) => {$(
        /// 16-bit floats, accumulated in f32.
        pub(super) struct $name<const N: usize>;

        impl<const N: usize> Format for $name<N> {
            type Element = $element;
            type Acc = Array<f32, N>;
            type One = $name<1>;
            type Packed = [$element; N];

            #[inline(always)]
            unsafe fn load(from: *const $element) -> Self::Acc {
                // SAFETY: the caller promises N readable elements, aligned for their type.
                Array(unsafe { from.cast::<[$element; N]>().read() }.map(<$element>::to_f32))
            }

            #[inline(always)]
            unsafe fn pack(acc: Self::Acc) -> Self::Packed {
                acc.0.map(<$element>::from_f32)
            }

            #[inline(always)]
            unsafe fn store(packed: Self::Packed, to: *mut $element) {
                // SAFETY: the caller promises N writable elements, aligned for their type.
                unsafe { to.cast::<[$element; N]>().write(packed) }
            }

            /// There is no portable way past the caches.
            #[inline(always)]
            unsafe fn stream(packed: Self::Packed, to: *mut $element) {
                // SAFETY: the caller promises N writable elements, aligned for more than their type.
                unsafe { Self::store(packed, to) }
            }
        }
    )*};
}

sixteen_bit_format!(F16: f16, Bf16: bf16);

/// The kernels for any CPU: arrays as large as the registers of the baselines (SSE2, NEON).
pub(super) mod level {
    use super::super::table::kernel_table;
    use super::super::vector::Full;
    use super::{Array, Bf16, F16};

    kernel_table! {
        f32: Full<Array<f32, 4>>, f64: Full<Array<f64, 2>>, f16: F16<4>, bf16: Bf16<4>,
        i8: Full<Array<i8, 16>>, u8: Full<Array<u8, 16>>, i32: Full<Array<i32, 4>>,
        i64: Full<Array<i64, 2>>, u64: Full<Array<u64, 2>>
    }
}
