//! AVX2 and AVX-512, behind the features that they enable.
//!
//! Written in intrinsics rather than left to the vectoriser, which gives up on an output that is also a
//! source, does nothing in unoptimised builds (so that tests would not test it) and cannot write past
//! the caches. `avx2` and `avx512` at the end are the only functions with target features; what is
//! above is inlined into them.
//!
//! **Safety.** The types here are named by no other file: they are used by the kernels which
//! `avx2::kernels` and `avx512::kernels` hand out, and `super::level` asks for those only on a CPU that
//! has the features. That is what the `SAFETY` comments below call the promise of [`Vector`] and [`Format`].

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::portable::{self, Number};
use super::vector::{Format, Vector};

/// A [`Vector`] in one register, from an expression per method.
macro_rules! vector {
    (
        $name:ident: [$lane:ty; $lanes:literal] in $register:ty;
        load($from:ident) = $load:expr;
        store($stored:ident, $to:ident) = $store:expr;
        stream($streamed:ident, $past:ident) = $stream:expr;
        splat($x:ident) = $splat:expr;
        sum($sa:ident, $sb:ident) = $sum:expr;
        prod($pa:ident, $pb:ident) = $prod:expr;
        min($na:ident, $nb:ident) = $min:expr;
        max($xa:ident, $xb:ident) = $max:expr;
        divide($d:ident, $by:ident) = $divide:expr;
        settle($v:ident) = $settle:expr;
    ) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name($register);

        impl Vector for $name {
            type Lane = $lane;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn load($from: *const $lane) -> Self {
                // SAFETY: the promise of `Vector`: a readable register, and the features.
                Self(unsafe { $load })
            }

            #[inline(always)]
            unsafe fn store(self, $to: *mut $lane) {
                let $stored = self.0;
                // SAFETY: the promise of `Vector`: a writable register, and the features.
                unsafe { $store }
            }

            #[inline(always)]
            unsafe fn stream(self, $past: *mut $lane) {
                let $streamed = self.0;
                // SAFETY: the promise of `Vector`: a writable and aligned register, and the features.
                unsafe { $stream }
            }

            #[inline(always)]
            unsafe fn splat($x: $lane) -> Self {
                // SAFETY: the promise of `Vector`: the features.
                Self(unsafe { $splat })
            }

            #[inline(always)]
            unsafe fn sum(self, other: Self) -> Self {
                let ($sa, $sb) = (self.0, other.0);
                // SAFETY: the promise of `Vector`: the features.
                Self(unsafe { $sum })
            }

            #[inline(always)]
            unsafe fn prod(self, other: Self) -> Self {
                let ($pa, $pb) = (self.0, other.0);
                // SAFETY: the promise of `Vector`: the features.
                Self(unsafe { $prod })
            }

            #[inline(always)]
            unsafe fn min(self, other: Self) -> Self {
                let ($na, $nb) = (self.0, other.0);
                // SAFETY: the promise of `Vector`: the features.
                Self(unsafe { $min })
            }

            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                let ($xa, $xb) = (self.0, other.0);
                // SAFETY: the promise of `Vector`: the features.
                Self(unsafe { $max })
            }

            #[inline(always)]
            unsafe fn divide(self, $by: usize) -> Self {
                let $d = self.0;
                // SAFETY: the promise of `Vector`: the features.
                Self(unsafe { $divide })
            }

            // Integers have no NaN, so that theirs is safe.
            #[allow(unused_unsafe)]
            #[inline(always)]
            unsafe fn settle(self) -> Self {
                let $v = self.0;
                // SAFETY: the promise of `Vector`: the features.
                Self(unsafe { $settle })
            }
        }
    };
}

/// Integers differ in their operators only.
macro_rules! integer_vector {
    (
        $name:ident: [$lane:ty; $lanes:literal] in $register:ty;
        $load:ident, $store:ident, $stream:ident, $splat:ident as $signed:ty;
        sum: $sum:ident, prod: $prod:ident, min: $min:ident, max: $max:ident
    ) => {
        vector! {
            $name: [$lane; $lanes] in $register;
            load(from) = $load(from.cast());
            store(v, to) = $store(to.cast(), v);
            stream(v, to) = $stream(to.cast(), v);
            splat(x) = $splat(x as $signed);
            sum(a, b) = $sum(a, b);
            prod(a, b) = $prod(a, b);
            min(a, b) = $min(a, b);
            max(a, b) = $max(a, b);
            divide(v, by) = {
                let mut lanes: [$lane; $lanes] = std::mem::transmute(v);
                divide_lanes(&mut lanes, by);
                std::mem::transmute::<[$lane; $lanes], $register>(lanes)
            };
            settle(v) = v;
        }
    };
}

/// No CPU divides integer vectors. Out of line, since the rest of the loop is small.
#[inline(never)]
fn divide_lanes<T: Number>(lanes: &mut [T], by: usize) {
    for lane in lanes {
        *lane = lane.divide(by);
    }
}

/// Powers of two are divided by multiplying, several times as fast and exact: 1 / 2^k is a float, and
/// both round the same number once.
macro_rules! divide_float {
    ($v:ident, $by:ident as $lane:ty, $splat:ident, $mul:ident, $div:ident) => {
        if $by.is_power_of_two() {
            $mul($v, $splat(1.0 / $by as $lane))
        } else {
            $div($v, $splat($by as $lane))
        }
    };
}

// minps and maxps give their second operand when either is a NaN; a NaN on the left must win too.
vector! {
    F32x8: [f32; 8] in __m256;
    load(from) = _mm256_loadu_ps(from);
    store(v, to) = _mm256_storeu_ps(to, v);
    stream(v, to) = _mm256_stream_ps(to, v);
    splat(x) = _mm256_set1_ps(x);
    sum(a, b) = _mm256_add_ps(a, b);
    prod(a, b) = _mm256_mul_ps(a, b);
    min(a, b) = _mm256_blendv_ps(_mm256_min_ps(a, b), a, _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
    max(a, b) = _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
    divide(v, by) = divide_float!(v, by as f32, _mm256_set1_ps, _mm256_mul_ps, _mm256_div_ps);
    settle(v) = _mm256_blendv_ps(v, _mm256_set1_ps(f32::NAN), _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
}

vector! {
    F64x4: [f64; 4] in __m256d;
    load(from) = _mm256_loadu_pd(from);
    store(v, to) = _mm256_storeu_pd(to, v);
    stream(v, to) = _mm256_stream_pd(to, v);
    splat(x) = _mm256_set1_pd(x);
    sum(a, b) = _mm256_add_pd(a, b);
    prod(a, b) = _mm256_mul_pd(a, b);
    min(a, b) = _mm256_blendv_pd(_mm256_min_pd(a, b), a, _mm256_cmp_pd::<_CMP_UNORD_Q>(a, a));
    max(a, b) = _mm256_blendv_pd(_mm256_max_pd(a, b), a, _mm256_cmp_pd::<_CMP_UNORD_Q>(a, a));
    divide(v, by) = divide_float!(v, by as f64, _mm256_set1_pd, _mm256_mul_pd, _mm256_div_pd);
    settle(v) = _mm256_blendv_pd(v, _mm256_set1_pd(f64::NAN), _mm256_cmp_pd::<_CMP_UNORD_Q>(v, v));
}

vector! {
    F32x16: [f32; 16] in __m512;
    load(from) = _mm512_loadu_ps(from);
    store(v, to) = _mm512_storeu_ps(to, v);
    stream(v, to) = _mm512_stream_ps(to, v);
    splat(x) = _mm512_set1_ps(x);
    sum(a, b) = _mm512_add_ps(a, b);
    prod(a, b) = _mm512_mul_ps(a, b);
    min(a, b) = _mm512_mask_mov_ps(_mm512_min_ps(a, b), _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), a);
    max(a, b) = _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), a);
    divide(v, by) = divide_float!(v, by as f32, _mm512_set1_ps, _mm512_mul_ps, _mm512_div_ps);
    settle(v) = _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v), _mm512_set1_ps(f32::NAN));
}

vector! {
    F64x8: [f64; 8] in __m512d;
    load(from) = _mm512_loadu_pd(from);
    store(v, to) = _mm512_storeu_pd(to, v);
    stream(v, to) = _mm512_stream_pd(to, v);
    splat(x) = _mm512_set1_pd(x);
    sum(a, b) = _mm512_add_pd(a, b);
    prod(a, b) = _mm512_mul_pd(a, b);
    min(a, b) = _mm512_mask_mov_pd(_mm512_min_pd(a, b), _mm512_cmp_pd_mask::<_CMP_UNORD_Q>(a, a), a);
    max(a, b) = _mm512_mask_mov_pd(_mm512_max_pd(a, b), _mm512_cmp_pd_mask::<_CMP_UNORD_Q>(a, a), a);
    divide(v, by) = divide_float!(v, by as f64, _mm512_set1_pd, _mm512_mul_pd, _mm512_div_pd);
    settle(v) = _mm512_mask_mov_pd(v, _mm512_cmp_pd_mask::<_CMP_UNORD_Q>(v, v), _mm512_set1_pd(f64::NAN));
}

integer_vector! {
    I8x32: [i8; 32] in __m256i;
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_stream_si256, _mm256_set1_epi8 as i8;
    sum: _mm256_add_epi8, prod: mul_8_avx2, min: _mm256_min_epi8, max: _mm256_max_epi8
}

integer_vector! {
    U8x32: [u8; 32] in __m256i;
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_stream_si256, _mm256_set1_epi8 as i8;
    sum: _mm256_add_epi8, prod: mul_8_avx2, min: _mm256_min_epu8, max: _mm256_max_epu8
}

integer_vector! {
    I32x8: [i32; 8] in __m256i;
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_stream_si256, _mm256_set1_epi32 as i32;
    sum: _mm256_add_epi32, prod: _mm256_mullo_epi32, min: _mm256_min_epi32, max: _mm256_max_epi32
}

integer_vector! {
    I64x4: [i64; 4] in __m256i;
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_stream_si256, _mm256_set1_epi64x as i64;
    sum: _mm256_add_epi64, prod: mul_64_avx2, min: min_i64_avx2, max: max_i64_avx2
}

integer_vector! {
    U64x4: [u64; 4] in __m256i;
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_stream_si256, _mm256_set1_epi64x as i64;
    sum: _mm256_add_epi64, prod: mul_64_avx2, min: min_u64_avx2, max: max_u64_avx2
}

integer_vector! {
    I8x64: [i8; 64] in __m512i;
    _mm512_loadu_si512, _mm512_storeu_si512, _mm512_stream_si512, _mm512_set1_epi8 as i8;
    sum: _mm512_add_epi8, prod: mul_8_avx512, min: _mm512_min_epi8, max: _mm512_max_epi8
}

integer_vector! {
    U8x64: [u8; 64] in __m512i;
    _mm512_loadu_si512, _mm512_storeu_si512, _mm512_stream_si512, _mm512_set1_epi8 as i8;
    sum: _mm512_add_epi8, prod: mul_8_avx512, min: _mm512_min_epu8, max: _mm512_max_epu8
}

integer_vector! {
    I32x16: [i32; 16] in __m512i;
    _mm512_loadu_si512, _mm512_storeu_si512, _mm512_stream_si512, _mm512_set1_epi32 as i32;
    sum: _mm512_add_epi32, prod: _mm512_mullo_epi32, min: _mm512_min_epi32, max: _mm512_max_epi32
}

integer_vector! {
    I64x8: [i64; 8] in __m512i;
    _mm512_loadu_si512, _mm512_storeu_si512, _mm512_stream_si512, _mm512_set1_epi64 as i64;
    sum: _mm512_add_epi64, prod: _mm512_mullo_epi64, min: _mm512_min_epi64, max: _mm512_max_epi64
}

integer_vector! {
    U64x8: [u64; 8] in __m512i;
    _mm512_loadu_si512, _mm512_storeu_si512, _mm512_stream_si512, _mm512_set1_epi64 as i64;
    sum: _mm512_add_epi64, prod: _mm512_mullo_epi64, min: _mm512_min_epu64, max: _mm512_max_epu64
}

/// What the instruction sets lack: expressions as functions of two registers.
macro_rules! operators {
    ($($(#[$doc:meta])* $name:ident($a:ident, $b:ident: $register:ty) = $result:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// The CPU has the features that the name ends with.
        #[inline(always)]
        unsafe fn $name($a: $register, $b: $register) -> $register {
            // SAFETY: the caller promises the features.
            unsafe { $result }
        }
    )*};
}

operators! {
    /// Bytes, multiplied as the halves of 16-bit lanes.
    mul_8_avx2(a, b: __m256i) = {
        let even = _mm256_mullo_epi16(a, b);
        let odd = _mm256_mullo_epi16(_mm256_srli_epi16::<8>(a), _mm256_srli_epi16::<8>(b));
        _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(0xff)), _mm256_slli_epi16::<8>(odd))
    };
    /// Bytes, multiplied as the halves of 16-bit lanes.
    mul_8_avx512(a, b: __m512i) = {
        let even = _mm512_mullo_epi16(a, b);
        let odd = _mm512_mullo_epi16(_mm512_srli_epi16::<8>(a), _mm512_srli_epi16::<8>(b));
        _mm512_or_si512(_mm512_and_si512(even, _mm512_set1_epi16(0xff)), _mm512_slli_epi16::<8>(odd))
    };
    /// The low halves of the products: low × low + (high × low + low × high) × 2^32.
    mul_64_avx2(a, b: __m256i) = {
        let cross = _mm256_add_epi64(
            _mm256_mul_epu32(_mm256_srli_epi64::<32>(a), b),
            _mm256_mul_epu32(a, _mm256_srli_epi64::<32>(b)),
        );
        _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64::<32>(cross))
    };
    /// The smaller.
    min_i64_avx2(a, b: __m256i) = _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(a, b));
    /// The larger.
    max_i64_avx2(a, b: __m256i) = _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b));
    /// The smaller.
    min_u64_avx2(a, b: __m256i) = _mm256_blendv_epi8(a, b, greater_u64_avx2(a, b));
    /// The larger.
    max_u64_avx2(a, b: __m256i) = _mm256_blendv_epi8(b, a, greater_u64_avx2(a, b));
    /// All ones where a > b: the comparison is of signed lanes, so both move down by 2^63.
    greater_u64_avx2(a, b: __m256i) = {
        let sign = _mm256_set1_epi64x(i64::MIN);
        _mm256_cmpgt_epi64(_mm256_xor_si256(a, sign), _mm256_xor_si256(b, sign))
    };
}

/// Rounds f32 to the upper 16 bits, to the nearest and ties to even; the lower 16 are left over.
///
/// Just under half of the last place, plus one if that is odd, carries into it exactly when the rest is over
/// half, or half and odd. The NaN of results stays itself. (vcvtneps2bf16 of AVX512_BF16 flushes subnormals.)
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn round_to_bf16_avx2(bits: __m256i) -> __m256i {
    // SAFETY: the caller promises the features.
    unsafe {
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)))
    }
}

/// [`round_to_bf16_avx2`] in 512 bits.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn round_to_bf16_avx512(bits: __m512i) -> __m512i {
    // SAFETY: the caller promises the features.
    unsafe {
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)))
    }
}

/// Two registers of f32 as one, the lanes at even places in the first and at odd places in the second.
///
/// A register of bf16 falls into them without a shuffle, which is half of the work otherwise; only
/// accumulators in memory, which are in order, have to be sorted.
#[derive(Clone, Copy)]
pub(super) struct Interleaved<V>(V, V);

/// # Safety
/// As for [`Vector`].
pub(super) trait Interleave: Vector<Lane = f32> {
    /// The lanes at even and at odd places of two registers in order.
    unsafe fn split(first: Self, second: Self) -> Interleaved<Self>;
    /// The two registers in order.
    unsafe fn join(pair: Interleaved<Self>) -> (Self, Self);
}

impl Interleave for F32x8 {
    #[inline(always)]
    unsafe fn split(first: Self, second: Self) -> Interleaved<Self> {
        // SAFETY: the promise of `Vector`: the features.
        unsafe {
            let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(first.0, second.0));
            let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(first.0, second.0));
            Interleaved(
                Self(_mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(even))),
                Self(_mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(odd))),
            )
        }
    }

    #[inline(always)]
    unsafe fn join(Interleaved(even, odd): Interleaved<Self>) -> (Self, Self) {
        // SAFETY: the promise of `Vector`: the features.
        unsafe {
            let low = _mm256_unpacklo_ps(even.0, odd.0);
            let high = _mm256_unpackhi_ps(even.0, odd.0);
            (Self(_mm256_permute2f128_ps::<0x20>(low, high)), Self(_mm256_permute2f128_ps::<0x31>(low, high)))
        }
    }
}

impl Interleave for F32x16 {
    #[inline(always)]
    unsafe fn split(first: Self, second: Self) -> Interleaved<Self> {
        // SAFETY: the promise of `Vector`: the features.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            Interleaved(
                Self(_mm512_permutex2var_ps(first.0, even, second.0)),
                Self(_mm512_permutex2var_ps(first.0, odd, second.0)),
            )
        }
    }

    #[inline(always)]
    unsafe fn join(Interleaved(even, odd): Interleaved<Self>) -> (Self, Self) {
        // SAFETY: the promise of `Vector`: the features.
        unsafe {
            let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            (
                Self(_mm512_permutex2var_ps(even.0, first, odd.0)),
                Self(_mm512_permutex2var_ps(even.0, second, odd.0)),
            )
        }
    }
}

/// Combines both registers, one like the other.
macro_rules! combine_both {
    ($($method:ident),*) => {$(
        #[inline(always)]
        unsafe fn $method(self, other: Self) -> Self {
            // SAFETY: the promise of `Vector`: the features.
            unsafe { Self(self.0.$method(other.0), self.1.$method(other.1)) }
        }
    )*};
}

impl<V: Interleave> Vector for Interleaved<V> {
    type Lane = f32;
    const LANES: usize = 2 * V::LANES;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the promise of `Vector`: two readable registers, and the features.
        unsafe { V::split(V::load(from), V::load(from.add(V::LANES))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the promise of `Vector`: two writable registers, and the features.
        unsafe {
            let (first, second) = V::join(self);
            first.store(to);
            second.store(to.add(V::LANES));
        }
    }

    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: the promise of `Vector`: two writable and aligned registers, and the features.
        unsafe {
            let (first, second) = V::join(self);
            first.stream(to);
            second.stream(to.add(V::LANES));
        }
    }

    #[inline(always)]
    unsafe fn splat(lane: f32) -> Self {
        // SAFETY: the promise of `Vector`: the features.
        unsafe { Self(V::splat(lane), V::splat(lane)) }
    }

    combine_both!(sum, prod, min, max);

    #[inline(always)]
    unsafe fn divide(self, by: usize) -> Self {
        // SAFETY: the promise of `Vector`: the features.
        unsafe { Self(self.0.divide(by), self.1.divide(by)) }
    }

    #[inline(always)]
    unsafe fn settle(self) -> Self {
        // SAFETY: the promise of `Vector`: the features.
        unsafe { Self(self.0.settle(), self.1.settle()) }
    }
}

/// A [`Format`] of 16-bit floats.
macro_rules! sixteen_bit_format {
    (
        $name:ident: $element:ty, accumulated in $acc:ty, one by one as $one:ty;
        load($from:ident) = $load:expr;
        pack($v:ident) = $pack:expr;
        in $packed:ty, store: $store:ident, stream: $stream:ident
    ) => {
        pub(super) struct $name;

        impl Format for $name {
            type Element = $element;
            type Acc = $acc;
            type One = $one;
            type Packed = $packed;

            #[inline(always)]
            unsafe fn load($from: *const $element) -> $acc {
                // SAFETY: the promise of `Format`: readable elements, and the features.
                unsafe { $load }
            }

            #[inline(always)]
            unsafe fn pack($v: $acc) -> $packed {
                // SAFETY: the promise of `Format`: the features.
                unsafe { $pack }
            }

            #[inline(always)]
            unsafe fn store(packed: $packed, to: *mut $element) {
                // SAFETY: the promise of `Format`: room for the elements, and the features.
                unsafe { $store(to.cast(), packed) }
            }

            #[inline(always)]
            unsafe fn stream(packed: $packed, to: *mut $element) {
                // SAFETY: the promise of `Format`: aligned room for the elements, and the features.
                unsafe { $stream(to.cast(), packed) }
            }
        }
    };
}

sixteen_bit_format! {
    F16x8: f16, accumulated in F32x8, one by one as portable::F16<1>;
    load(from) = F32x8(_mm256_cvtph_ps(_mm_loadu_si128(from.cast())));
    pack(v) = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0);
    in __m128i, store: _mm_storeu_si128, stream: _mm_stream_si128
}

sixteen_bit_format! {
    F16x16: f16, accumulated in F32x16, one by one as portable::F16<1>;
    load(from) = F32x16(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())));
    pack(v) = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0);
    in __m256i, store: _mm256_storeu_si256, stream: _mm256_stream_si256
}

sixteen_bit_format! {
    Bf16x16: bf16, accumulated in Interleaved<F32x8>, one by one as portable::Bf16<1>;
    load(from) = {
        let pairs = _mm256_loadu_si256(from.cast());
        let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff));
        Interleaved(
            F32x8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs))),
            F32x8(_mm256_castsi256_ps(odd)),
        )
    };
    pack(v) = {
        let even = _mm256_srli_epi32::<16>(round_to_bf16_avx2(_mm256_castps_si256(v.0.0)));
        _mm256_blend_epi16::<0b1010_1010>(even, round_to_bf16_avx2(_mm256_castps_si256(v.1.0)))
    };
    in __m256i, store: _mm256_storeu_si256, stream: _mm256_stream_si256
}

sixteen_bit_format! {
    Bf16x32: bf16, accumulated in Interleaved<F32x16>, one by one as portable::Bf16<1>;
    load(from) = {
        let pairs = _mm512_loadu_si512(from.cast());
        let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff));
        Interleaved(
            F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))),
            F32x16(_mm512_castsi512_ps(odd)),
        )
    };
    pack(v) = {
        let even = _mm512_srli_epi32::<16>(round_to_bf16_avx512(_mm512_castps_si512(v.0.0)));
        let odd = round_to_bf16_avx512(_mm512_castps_si512(v.1.0));
        _mm512_mask_mov_epi16(even, 0xaaaa_aaaa, odd)
    };
    in __m512i, store: _mm512_storeu_si512, stream: _mm512_stream_si512
}

/// Orders stores past the caches before all later stores.
pub(super) fn fence() {
    // SAFETY: an instruction of SSE, which every x86-64 CPU has; it touches no memory.
    unsafe { _mm_sfence() }
}

/// The kernels with 256-bit registers.
pub(super) mod avx2 {
    use super::super::table::kernel_table;
    use super::super::vector::Full;
    use super::*;

    kernel_table! {
        features "avx2,f16c";
        f32: Full<F32x8>, f64: Full<F64x4>, f16: F16x8, bf16: Bf16x16,
        i8: Full<I8x32>, u8: Full<U8x32>, i32: Full<I32x8>, i64: Full<I64x4>, u64: Full<U64x4>
    }
}

/// The kernels with 512-bit registers.
pub(super) mod avx512 {
    use super::super::table::kernel_table;
    use super::super::vector::Full;
    use super::*;

    kernel_table! {
        features "avx512f,avx512bw,avx512dq,avx512vl,f16c";
        f32: Full<F32x16>, f64: Full<F64x8>, f16: F16x16, bf16: Bf16x32,
        i8: Full<I8x64>, u8: Full<U8x64>, i32: Full<I32x16>, i64: Full<I64x8>, u64: Full<U64x8>
    }
}
