//! The kernels as safe calls on a level of choice, for the criterion suite: no part of the API.

pub use super::{Level, Stores, scale, scale_in_place};

use super::{Own, Reducer};
use crate::dtype::{DType, ReduceOp};

/// The kernels of one operation.
#[derive(Debug)]
pub struct Reduction(Reducer);

impl Reduction {
    /// As for any operation, but for the choice of level.
    pub fn new(level: Level, dtype: DType, op: ReduceOp, world_size: usize) -> Self {
        Self(Reducer::at(level, dtype, op, world_size))
    }

    /// Combines one source per rank and writes the result to `output`.
    ///
    /// # Panics
    /// If a source is missing, the buffers have different sizes or one is not aligned for the dtype.
    pub fn reduce(&mut self, sources: &[&[u8]], output: &mut [u8], stores: Stores) {
        self.0.reduce_with(0, Own::Separate(sources[0]), |rank| sources[rank], output, stores);
    }

    /// Combines the buffer of rank 0 with those of the others, in place.
    ///
    /// # Panics
    /// If a buffer is missing, they have different sizes or one is not aligned for the dtype.
    pub fn reduce_in_place(&mut self, buffer: &mut [u8], others: &[&[u8]], stores: Stores) {
        self.0.reduce_with(0, Own::InPlace, |rank| others[rank - 1], buffer, stores);
    }
}

/// Copies bytes.
///
/// # Panics
/// If the buffers have different sizes.
pub fn copy(from: &[u8], to: &mut [u8], stores: Stores) {
    assert_eq!(from.len(), to.len(), "a copy is as long as its original");
    // SAFETY: two slices of that length, kept apart by their borrows.
    unsafe { super::copy(from.as_ptr(), to.as_mut_ptr(), from.len(), stores) }
}
