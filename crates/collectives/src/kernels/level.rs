//! How wide this CPU computes.

use std::sync::OnceLock;

use super::loops::ScaleKernel;
use super::portable;
use super::table::Kernels;
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::dtype::{DType, ReduceOp};

/// An instruction set that kernels are compiled for. All compute the same bits.
///
/// A value other than `Portable` exists only where the CPU has the features: [`Level::available`] is
/// the only place that makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(Width);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Width {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Any CPU.
    pub const PORTABLE: Self = Self(Width::Portable);

    /// The levels that this CPU has, narrow to wide.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut levels = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                levels.push(Self(Width::Avx2));
            }
            if levels.len() == 2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                levels.push(Self(Width::Avx512));
            }
        }
        levels
    }

    /// The widest level of this CPU, found at the first call.
    pub fn detected() -> Self {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(|| Self::available().into_iter().max().unwrap_or(Self::PORTABLE))
    }

    /// The name as benchmarks print it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Width::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Width::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Width::Avx512 => "avx512",
        }
    }

    pub(super) fn kernels(self, dtype: DType, op: ReduceOp) -> Kernels {
        match self.0 {
            Width::Portable => portable::level::kernels(dtype, op),
            #[cfg(target_arch = "x86_64")]
            Width::Avx2 => x86::avx2::kernels(dtype, op),
            #[cfg(target_arch = "x86_64")]
            Width::Avx512 => x86::avx512::kernels(dtype, op),
        }
    }

    pub(super) fn scale_kernel(self, dtype: DType) -> ScaleKernel {
        match self.0 {
            Width::Portable => portable::level::scale_kernel(dtype),
            #[cfg(target_arch = "x86_64")]
            Width::Avx2 => x86::avx2::scale_kernel(dtype),
            #[cfg(target_arch = "x86_64")]
            Width::Avx512 => x86::avx512::scale_kernel(dtype),
        }
    }
}
