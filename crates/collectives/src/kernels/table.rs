//! Which kernels there are: one set per (dtype, operator, level).

use super::loops::Kernel;

/// The kernels of one dtype and operator, on one level.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels {
    /// Elements to finished elements.
    pub(super) fused: Kernel,
    /// Elements to accumulators.
    pub(super) partial: Kernel,
    /// Accumulators to accumulators.
    pub(super) merge: Kernel,
    /// Accumulators to finished elements.
    pub(super) finish: Kernel,
}

/// The kernels of a level: `kernels` and `scale_kernel`, by dtype.
///
/// The two inner functions are where the generic loops are compiled for the level's features. Kernels
/// that are the same function for a dtype (all but [`Kernels::fused`] and [`Kernels::finish`] of a mean,
/// where elements are their own accumulators) are compiled once.
macro_rules! kernel_table {
    (
        $(features $features:literal;)?
        f32: $f32:ty, f64: $f64:ty, f16: $f16:ty, bf16: $bf16:ty,
        i8: $i8:ty, u8: $u8:ty, i32: $i32:ty, i64: $i64:ty, u64: $u64:ty
    ) => {
        /// # Safety
        /// As for [`Kernel`](super::super::loops::Kernel).
        $(#[target_feature(enable = $features)])?
        unsafe fn reduce<L, S, O, F>(
            sources: &[*const u8],
            outputs: &[*mut u8],
            count: usize,
            stores: $crate::kernels::Stores,
            world_size: usize,
        ) where
            L: $crate::kernels::vector::Format,
            S: $crate::kernels::vector::Format<Acc = L::Acc>,
            O: $crate::kernels::vector::Operator,
            F: $crate::kernels::vector::Finish,
        {
            // SAFETY: the caller's promise, handed on; the features are enabled here.
            unsafe { $crate::kernels::loops::reduce::<L, S, O, F>(sources, outputs, count, stores, world_size) }
        }

        /// # Safety
        /// As for [`ScaleKernel`](super::super::loops::ScaleKernel).
        $(#[target_feature(enable = $features)])?
        unsafe fn scale<P: $crate::kernels::vector::Format>(
            factor: f64,
            from: *const u8,
            to: *mut u8,
            count: usize,
        ) {
            // SAFETY: the caller's promise, handed on; the features are enabled here.
            unsafe { $crate::kernels::loops::scale::<P>(factor, from, to, count) }
        }

        fn by_operator<P: $crate::kernels::vector::Format>(
            op: $crate::dtype::ReduceOp,
        ) -> $crate::kernels::table::Kernels {
            use $crate::dtype::ReduceOp;
            use $crate::kernels::vector::{Full, Max, Mean, Min, Prod, Sum, Total};
            macro_rules! kernels {
                ($operator:ty, $finish:ty) => {
                    $crate::kernels::table::Kernels {
                        fused: reduce::<P, P, $operator, $finish>,
                        partial: reduce::<P, Full<P::Acc>, $operator, Total>,
                        merge: reduce::<Full<P::Acc>, Full<P::Acc>, $operator, Total>,
                        finish: reduce::<Full<P::Acc>, P, $operator, $finish>,
                    }
                };
            }
            match op {
                ReduceOp::Sum => kernels!(Sum, Total),
                ReduceOp::Prod => kernels!(Prod, Total),
                ReduceOp::Min => kernels!(Min, Total),
                ReduceOp::Max => kernels!(Max, Total),
                ReduceOp::Avg => kernels!(Sum, Mean),
            }
        }

        pub(in $crate::kernels) fn kernels(
            dtype: $crate::dtype::DType,
            op: $crate::dtype::ReduceOp,
        ) -> $crate::kernels::table::Kernels {
            use $crate::dtype::DType;
            match dtype {
                DType::F32 => by_operator::<$f32>(op),
                DType::F64 => by_operator::<$f64>(op),
                DType::F16 => by_operator::<$f16>(op),
                DType::BF16 => by_operator::<$bf16>(op),
                DType::I8 => by_operator::<$i8>(op),
                DType::U8 => by_operator::<$u8>(op),
                DType::I32 => by_operator::<$i32>(op),
                DType::I64 => by_operator::<$i64>(op),
                DType::U64 => by_operator::<$u64>(op),
            }
        }

        pub(in $crate::kernels) fn scale_kernel(
            dtype: $crate::dtype::DType,
        ) -> $crate::kernels::loops::ScaleKernel {
            use $crate::dtype::DType;
            match dtype {
                DType::F32 => scale::<$f32>,
                DType::F64 => scale::<$f64>,
                DType::F16 => scale::<$f16>,
                DType::BF16 => scale::<$bf16>,
                DType::I8 => scale::<$i8>,
                DType::U8 => scale::<$u8>,
                DType::I32 => scale::<$i32>,
                DType::I64 => scale::<$i64>,
                DType::U64 => scale::<$u64>,
            }
        }
    };
}

pub(super) use kernel_table;
