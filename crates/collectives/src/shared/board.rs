//! What a rank shows the others: two cells with flags, and areas to stage elements in.
//!
//! ```text
//! 0        cell of half 0:  step (8 bytes) | header of the call (32) | short payload (88)
//! 128      cell of half 1
//! 4096     staged elements of half 0, of half 1
//! …        results of half 0, of half 1
//! ```
//! A call's header lies in the same cache line as its flag, so noticing that ranks call different
//! things costs a comparison and no message, and a payload of up to 24 bytes comes with it (of up to 88
//! with the neighbouring line, which processors fetch along).
//!
//! # Why this is sound
//! The boards are mapped as long as `segments` lives. Who may touch which half when is what
//! [`Steps`](super::steps::Steps) says; this file only computes addresses and does the two accesses that
//! synchronise. A rank that breaks the protocol, which only a process of this job can, makes numbers
//! wrong but no access of ours invalid: every address here is a constant plus an offset that this side
//! computed, and every bit pattern is a valid element.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use paceline_transport::frame::Prefix;
use paceline_transport::shm::{BOARD_BYTES, LINE_BYTES, Segments};

use super::steps::{Flags, Half};

/// The longest payload that lies in the cell itself, in bytes.
pub(crate) const INLINE_BYTES: usize = LINE_BYTES - INLINE_AT;

/// What a rank can stage in one half, in bytes. Half of a second-level cache of 1 MiB for both halves.
pub(crate) const STAGED_BYTES: usize = 256 * 1024;

/// The longest result in one half, in bytes: a rank's share of a step.
pub(crate) const RESULT_BYTES: usize = 128 * 1024;

const HEADER_AT: usize = 8;
const INLINE_AT: usize = 40;
const STAGED_AT: usize = 4096;
const RESULTS_AT: usize = STAGED_AT + 2 * STAGED_BYTES;
const _: () = assert!(RESULTS_AT + 2 * RESULT_BYTES <= BOARD_BYTES);

/// The boards of all ranks of a host.
#[derive(Debug)]
pub(crate) struct Boards {
    segments: Arc<Segments>,
    /// By rank.
    bases: Vec<*mut u8>,
    rank: usize,
}

// SAFETY: the pointers are into mappings of the process, which `segments` keeps; who accesses what when
// is ruled by the protocol between ranks, whichever thread runs a rank.
unsafe impl Send for Boards {}

impl Boards {
    pub(crate) fn new(segments: Arc<Segments>) -> Self {
        let bases = (0..segments.world_size()).map(|rank| segments.board(rank)).collect();
        Self { rank: segments.rank(), bases, segments }
    }

    /// Takes back what was published: this rank has failed, and a rank that comes later must not find it
    /// there and go on alone.
    pub(crate) fn retract(&self) {
        for half in [Half(0), Half(1)] {
            self.flag(self.rank, half).store(u64::MAX, Ordering::Release);
        }
    }

    fn cell(&self, rank: usize, half: Half) -> *mut u8 {
        self.bases[rank].wrapping_add(half.0 * LINE_BYTES)
    }

    fn flag(&self, rank: usize, half: Half) -> &AtomicU64 {
        // SAFETY: the first 8 bytes of a cell, aligned to a line; every rank accesses them as an atomic.
        unsafe { AtomicU64::from_ptr(self.cell(rank, half).cast()) }
    }

    /// Writes the header of this rank's call into its cell. Before publishing the step.
    #[inline]
    pub(crate) fn set_header(&mut self, half: Half, header: &Prefix) {
        let to = self.cell(self.rank, half).wrapping_add(HEADER_AT);
        // SAFETY: 32 bytes within our own cell of the step that was entered, which nobody reads now.
        unsafe { ptr::copy_nonoverlapping(header.as_ptr(), to, header.len()) }
    }

    /// The header in a rank's cell, once it has published the step.
    #[inline]
    pub(crate) fn header(&self, rank: usize, half: Half) -> Prefix {
        let from = self.cell(rank, half).wrapping_add(HEADER_AT);
        // SAFETY: 32 bytes within a cell whose step was seen, which its owner does not write now.
        unsafe { ptr::read_unaligned(from.cast()) }
    }

    /// The place of a short payload, [`INLINE_BYTES`] long, aligned to 8 bytes.
    #[inline]
    pub(crate) fn inline(&self, rank: usize, half: Half) -> *mut u8 {
        self.cell(rank, half).wrapping_add(INLINE_AT)
    }

    /// The place of staged elements, [`STAGED_BYTES`] long, aligned to a line.
    #[inline]
    pub(crate) fn staged(&self, rank: usize, half: Half) -> *mut u8 {
        self.bases[rank].wrapping_add(STAGED_AT + half.0 * STAGED_BYTES)
    }

    /// The place of results, [`RESULT_BYTES`] long, aligned to a line.
    #[inline]
    pub(crate) fn results(&self, rank: usize, half: Half) -> *mut u8 {
        self.bases[rank].wrapping_add(RESULTS_AT + half.0 * RESULT_BYTES)
    }
}

impl Flags for Boards {
    #[inline]
    fn publish(&self, step: u64) {
        self.flag(self.rank, Half((step & 1) as usize)).store(step, Ordering::Release);
        self.segments.wake_all();
    }

    #[inline]
    fn has_published(&self, rank: usize, step: u64) -> bool {
        self.flag(rank, Half((step & 1) as usize)).load(Ordering::Acquire) == step
    }
}
