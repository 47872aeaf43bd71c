//! A byte ring from one process to another: one writer, one reader, two cursors.
//!
//! The cursors count bytes since the start and are each written by one side. `written` is stored with
//! release after the bytes are in the ring, and loaded with acquire before they are read; `read` is
//! stored with release after the bytes were taken, and loaded with acquire before their place is
//! written again. So no byte is read and written at the same time.

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// One side's view of a ring, for one call.
pub(super) struct Ring<'a> {
    /// Advanced by the writer.
    pub(super) written: &'a AtomicU64,
    /// Advanced by the reader.
    pub(super) read: &'a AtomicU64,
    /// `size` bytes.
    pub(super) bytes: *mut u8,
    /// A power of two.
    pub(super) size: usize,
}

impl Ring<'_> {
    /// Puts as much of `from` into the ring as there is room for; returns how much. Only the writer calls it.
    pub(super) fn put(&self, from: &[u8]) -> usize {
        let written = self.written.load(Ordering::Relaxed);
        // A reader that breaks the protocol can claim anything; it gets no access outside the ring by it.
        let used = (written.wrapping_sub(self.read.load(Ordering::Acquire)) as usize).min(self.size);
        let count = from.len().min(self.size - used);
        let (at, until_wrap) = self.place(written);
        let first = count.min(until_wrap);
        // SAFETY: both parts lie within the ring's `size` bytes, which the transport maps. The reader
        // does not touch them: it reads up to `written` only, which is stored below.
        unsafe {
            ptr::copy_nonoverlapping(from.as_ptr(), self.bytes.add(at), first);
            ptr::copy_nonoverlapping(from.as_ptr().add(first), self.bytes, count - first);
        }
        self.written.store(written.wrapping_add(count as u64), Ordering::Release);
        count
    }

    /// Takes what is there, as far as `into` holds it; returns how much. Only the reader calls it.
    pub(super) fn take(&self, into: &mut [u8]) -> usize {
        let read = self.read.load(Ordering::Relaxed);
        let available = (self.written.load(Ordering::Acquire).wrapping_sub(read) as usize).min(self.size);
        let count = into.len().min(available);
        if count == 0 {
            return 0;
        }
        let (at, until_wrap) = self.place(read);
        let first = count.min(until_wrap);
        // SAFETY: both parts lie within the ring's `size` bytes, which the transport maps. The writer
        // does not touch them until `read`, which is stored below, has passed them.
        unsafe {
            ptr::copy_nonoverlapping(self.bytes.add(at), into.as_mut_ptr(), first);
            ptr::copy_nonoverlapping(self.bytes, into.as_mut_ptr().add(first), count - first);
        }
        self.read.store(read.wrapping_add(count as u64), Ordering::Release);
        count
    }

    /// Where a cursor stands in the ring, and how many bytes come before its end.
    fn place(&self, cursor: u64) -> (usize, usize) {
        let at = cursor as usize & (self.size - 1);
        (at, self.size - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream in pieces of awkward lengths, between two threads, over a ring that wraps all the time.
    #[test]
    fn bytes_arrive_in_order_through_a_small_ring() {
        let (written, read) = (AtomicU64::new(u64::MAX - 100), AtomicU64::new(u64::MAX - 100));
        let mut memory = vec![0u8; 64];
        let bytes = memory.as_mut_ptr() as usize;
        let ring = || Ring { written: &written, read: &read, bytes: bytes as *mut u8, size: 64 };
        const TOTAL: usize = 50_000;
        let value = |index: usize| (index * 7 % 251) as u8;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let all: Vec<u8> = (0..TOTAL).map(value).collect();
                let mut sent = 0;
                while sent < TOTAL {
                    let piece = (sent * 31 % 97 + 1).min(TOTAL - sent);
                    sent += ring().put(&all[sent..sent + piece]);
                    std::thread::yield_now();
                }
            });
            let mut got = Vec::new();
            while got.len() < TOTAL {
                let mut piece = vec![0; got.len() * 17 % 89 + 1];
                let count = ring().take(&mut piece);
                got.extend_from_slice(&piece[..count]);
                if count == 0 {
                    std::thread::yield_now();
                }
            }
            assert!(got.iter().enumerate().all(|(index, &byte)| byte == value(index)));
        });
    }

    #[test]
    fn a_peer_that_claims_impossible_cursors_gets_no_access_outside() {
        let (written, read) = (AtomicU64::new(0), AtomicU64::new(12_345_678));
        let mut memory = [1u8; 64];
        let ring = Ring { written: &written, read: &read, bytes: memory.as_mut_ptr(), size: 64 };
        assert_eq!(ring.put(&[9; 100]), 0, "it looks full");
        written.store(99_999_999, Ordering::Relaxed);
        assert_eq!(ring.take(&mut [0; 100]), 64);
    }
}
