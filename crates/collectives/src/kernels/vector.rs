//! What the loops are generic over: registers, how elements lie in memory, operators, finishing touches.
//!
//! Everything is `#[inline(always)]`: the bodies must end up inside a function that enables the features
//! of the level, or each intrinsic becomes a call.

use super::portable::{Array, Number};

/// A register full of accumulators.
///
/// # Safety
/// Every method may be called only on a CPU that has the features of the level which the type belongs
/// to; pointers are valid for a whole register and aligned for a lane.
pub(super) trait Vector: Copy {
    /// One accumulator.
    type Lane: Number;
    const LANES: usize;

    unsafe fn load(from: *const Self::Lane) -> Self;
    unsafe fn store(self, to: *mut Self::Lane);
    /// Writes past the caches. `to` is aligned for the whole register.
    unsafe fn stream(self, to: *mut Self::Lane);
    unsafe fn splat(lane: Self::Lane) -> Self;

    unsafe fn sum(self, other: Self) -> Self;
    unsafe fn prod(self, other: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn divide(self, by: usize) -> Self;
    /// Replaces every NaN by the one NaN that results have. See [`super`].
    unsafe fn settle(self) -> Self;
}

/// How elements lie in memory, and what they are accumulated in.
///
/// # Safety
/// As for [`Vector`]; pointers are aligned for an element.
pub(super) trait Format {
    type Element;
    type Acc: Vector;
    /// The same one element at a time, for what does not fill a register.
    type One: Format<Element = Self::Element, Acc = Array<<Self::Acc as Vector>::Lane, 1>>;
    /// Size of a register's elements in memory, and the alignment that [`Self::stream`] needs.
    const BYTES: usize = <Self::Acc as Vector>::LANES * size_of::<Self::Element>();

    /// A register's elements, rounded and ready to be stored.
    type Packed: Copy;

    unsafe fn load(from: *const Self::Element) -> Self::Acc;
    unsafe fn pack(acc: Self::Acc) -> Self::Packed;
    unsafe fn store(packed: Self::Packed, to: *mut Self::Element);
    /// Writes past the caches. `to` is aligned to [`Self::BYTES`].
    unsafe fn stream(packed: Self::Packed, to: *mut Self::Element);
}

/// Elements that are their own accumulators.
pub(super) struct Full<V>(std::marker::PhantomData<V>);

impl<V: Vector> Format for Full<V> {
    type Element = V::Lane;
    type Acc = V;
    type One = Full<Array<V::Lane, 1>>;
    type Packed = V;

    #[inline(always)]
    unsafe fn load(from: *const V::Lane) -> V {
        // SAFETY: the caller's promise is the one that `V::load` asks for.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn pack(acc: V) -> V {
        acc
    }

    #[inline(always)]
    unsafe fn store(packed: V, to: *mut V::Lane) {
        // SAFETY: the caller's promise is the one that `V::store` asks for.
        unsafe { packed.store(to) }
    }

    #[inline(always)]
    unsafe fn stream(packed: V, to: *mut V::Lane) {
        // SAFETY: the caller's promise is the one that `V::stream` asks for.
        unsafe { packed.stream(to) }
    }
}

/// How two partial results are combined.
pub(super) trait Operator {
    /// # Safety
    /// The CPU has the features of `V`'s level.
    unsafe fn combine<V: Vector>(left: V, right: V) -> V;
}

macro_rules! operators {
    ($($name:ident: $method:ident),*) => {$(
        pub(super) struct $name;

        impl Operator for $name {
            #[inline(always)]
            unsafe fn combine<V: Vector>(left: V, right: V) -> V {
                // SAFETY: the caller promises the features of V's level.
                unsafe { left.$method(right) }
            }
        }
    )*};
}

operators!(Sum: sum, Prod: prod, Min: min, Max: max);

/// What is done once all contributions are combined.
pub(super) trait Finish {
    /// # Safety
    /// The CPU has the features of `V`'s level.
    unsafe fn finish<V: Vector>(total: V, world_size: usize) -> V;
}

/// The total itself.
pub(super) struct Total;

impl Finish for Total {
    #[inline(always)]
    unsafe fn finish<V: Vector>(total: V, _world_size: usize) -> V {
        // SAFETY: the caller promises the features of V's level.
        unsafe { total.settle() }
    }
}

/// The total divided by the world size.
pub(super) struct Mean;

impl Finish for Mean {
    #[inline(always)]
    unsafe fn finish<V: Vector>(total: V, world_size: usize) -> V {
        // SAFETY: the caller promises the features of V's level.
        unsafe { total.divide(world_size).settle() }
    }
}
