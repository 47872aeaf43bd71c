//! Memory that is registered: allocated so that all ranks of the host have it mapped.
//!
//! An owner then reads the inputs where they are and writes the results where they belong, and nothing is
//! staged. Whether a call can do so is decided in the call: every rank shows where its buffers are, all
//! see the same, and if one of them is elsewhere the call goes the ordinary way on all.
//!
//! # Why this is sound
//! A [`SharedBuffer`] is one rank's memory; Rust's borrows rule its own threads. Other ranks access it only
//! inside a collective into which this rank has passed (a part of) it, for the duration of the call, which
//! holds the borrow. After a fatal error a late rank may still be in that call: what the memory holds is
//! unspecified from then on, though always valid elements, and the memory itself stays mapped.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr;
use std::sync::Arc;

use paceline_transport::shm::SharedMemory;

use crate::dtype::Element;

/// A buffer in memory that all ranks of a host have mapped (NCCL: `ncclMemAlloc` and `ncclCommRegister`).
///
/// Made by [`Communicator::alloc`](crate::Communicator::alloc); used as a slice. Collectives on it, or on
/// parts of it, need no staging. Dropping it frees this rank's part of the memory once all ranks have
/// dropped theirs and allocate again, or with the communicator.
pub struct SharedBuffer<T> {
    memory: Arc<SharedMemory>,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Element> SharedBuffer<T> {
    /// The first `len` elements of `memory`, which nobody else on this rank uses.
    ///
    /// # Panics
    /// If the memory is too short.
    pub(crate) fn new(memory: Arc<SharedMemory>, len: usize) -> Self {
        assert!(len * size_of::<T>() <= memory.len(), "the memory was made for this buffer");
        Self { memory, len, elements: PhantomData }
    }
}

impl<T: Element> Deref for SharedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: mapped as long as `memory` lives, page-aligned, long enough (see `new`), and every bit
        // pattern is an element. This rank's accesses are ruled by the borrow of `self`; other ranks write
        // only inside a call that holds a mutable borrow (see the module's comment).
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast::<T>(), self.len) }
    }
}

impl<T: Element> DerefMut for SharedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; this is the only buffer on this rank with this memory.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr().cast::<T>(), self.len) }
    }
}

impl<T: Element> fmt::Debug for SharedBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedBuffer")
            .field("dtype", &T::DTYPE)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// The registered memory of all ranks, in the order of its allocation, which is the same on all ranks.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    /// Shared with this rank's buffer, as long as that lives.
    own: Arc<SharedMemory>,
    /// The others' memory by rank; `None` at this rank.
    others: Vec<Option<SharedMemory>>,
}

/// Where a rank's buffers are in registered memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Handles {
    input: Handle,
    output: Handle,
}

/// Which entry of the table from 1, or 0 for memory that is not registered, and the offset in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Handle {
    entry: u64,
    offset: u64,
}

impl Handles {
    /// Whether input and output are the same buffer.
    pub(crate) fn are_one(&self) -> bool {
        self.input == self.output
    }

    /// Writes them to 32 bytes that nobody reads yet.
    pub(crate) fn write(self, to: *mut u8) {
        let words = [self.input.entry, self.input.offset, self.output.entry, self.output.offset];
        // SAFETY: `to` is the inline place of a cell: 88 bytes, aligned to 8, ours until published.
        unsafe { ptr::write(to.cast::<[u64; 4]>(), words) }
    }

    /// Reads what a rank has published.
    pub(crate) fn read(from: *const u8) -> Self {
        // SAFETY: `from` is the inline place of a cell whose step was seen.
        let [a, b, c, d] = unsafe { ptr::read(from.cast::<[u64; 4]>()) };
        Self { input: Handle { entry: a, offset: b }, output: Handle { entry: c, offset: d } }
    }
}

impl Table {
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds the memory of all ranks, this one's at `rank`, and returns this one's.
    pub(crate) fn add(&mut self, rank: usize, memory: Vec<SharedMemory>) -> Arc<SharedMemory> {
        let mut others: Vec<_> = memory.into_iter().map(Some).collect();
        let own = Arc::new(others[rank].take().expect("every rank has memory"));
        self.entries.push(Entry { own: own.clone(), others });
        own
    }

    /// For each entry, 1 if this rank's buffer has been dropped.
    pub(crate) fn dropped(&self) -> Vec<u8> {
        self.entries.iter().map(|entry| u8::from(Arc::strong_count(&entry.own) == 1)).collect()
    }

    /// Forgets the entries marked with 1, which all ranks have dropped.
    pub(crate) fn forget(&mut self, dropped: &[u8]) {
        let mut marks = dropped.iter();
        self.entries.retain(|_| marks.next() != Some(&1));
    }

    /// Where two ranges of addresses are in this rank's registered memory.
    pub(crate) fn find(&self, input: (usize, usize), output: (usize, usize)) -> Handles {
        let find = |(start, len): (usize, usize)| {
            let inside = |entry: &Entry| {
                let base = entry.own.as_ptr().addr();
                start >= base && start + len <= base + entry.own.len()
            };
            match self.entries.iter().position(inside) {
                Some(at) => Handle {
                    entry: at as u64 + 1,
                    offset: (start - self.entries[at].own.as_ptr().addr()) as u64,
                },
                None => Handle::default(),
            }
        };
        Handles { input: find(input), output: find(output) }
    }

    /// Whether all ranks' buffers are registered, as far as they are needed: `lens(rank)` says how many
    /// bytes of its input and of its output. Everything a peer says is checked here.
    pub(crate) fn has_all(
        &self,
        handles: &[Handles],
        alignment: usize,
        lens: impl Fn(usize) -> (usize, usize),
    ) -> bool {
        let is_good = |handle: Handle, len: usize| {
            let entry = (handle.entry as usize).checked_sub(1).and_then(|at| self.entries.get(at));
            let fits = |entry: &Entry| {
                let end = handle.offset.checked_add(len as u64);
                end.is_some_and(|end| end <= entry.own.len() as u64)
                    && handle.offset.is_multiple_of(alignment as u64)
            };
            len == 0 || entry.is_some_and(fits)
        };
        handles.iter().enumerate().all(|(rank, handles)| {
            let (input, output) = lens(rank);
            is_good(handles.input, input) && is_good(handles.output, output)
        })
    }

    /// The input of `rank`, which [`has_all`](Self::has_all) has found to be there.
    pub(crate) fn input(&self, rank: usize, handles: &Handles) -> *const u8 {
        self.at(rank, handles.input)
    }

    /// The output of `rank`.
    pub(crate) fn output(&self, rank: usize, handles: &Handles) -> *mut u8 {
        self.at(rank, handles.output)
    }

    fn at(&self, rank: usize, handle: Handle) -> *mut u8 {
        let Some(entry) = (handle.entry as usize).checked_sub(1).map(|at| &self.entries[at]) else {
            return ptr::null_mut();
        };
        let memory = entry.others[rank].as_ref().unwrap_or(&entry.own);
        memory.as_ptr().wrapping_add(handle.offset as usize)
    }
}
