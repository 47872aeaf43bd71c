//! Memory for batches of bytes, used again when the protocol has let go of it.
//!
//! Fresh memory of 64 KiB a batch would come from the kernel and go back to it all the time: faults and
//! clearing pages took 6 % of the time of a transfer (2026-11, AMD EPYC, 8972-byte datagrams, glibc's malloc).

use bytes::BytesMut;

/// The size of a buffer: the largest batch that a socket gives.
const BUFFER_BYTES: usize = 64 * 1024;

/// From this size on a batch gets a buffer of the pool. What somebody keeps of it keeps all 64 KiB, so for small
/// packets that would be a way to make us hold much memory with few bytes.
const LARGE_BYTES: usize = 16 * 1024;

/// Buffers that are kept: 4 MiB, as much as is under way on one link.
const BUFFERS: usize = 64;

/// Buffers, each of them free or in use by copies that were made.
#[derive(Default)]
pub(super) struct Pool {
    buffers: Vec<BytesMut>,
}

impl Pool {
    /// A copy of `bytes`, whose memory is used again once all parts of it have been dropped.
    pub(super) fn copy(&mut self, bytes: &[u8]) -> BytesMut {
        if bytes.len() < LARGE_BYTES || bytes.len() > BUFFER_BYTES {
            return BytesMut::from(bytes);
        }
        // The first one that is free: few buffers are used all the time, and stay in the cache.
        if let Some(buffer) =
            self.buffers.iter_mut().find_map(|it| it.try_reclaim(BUFFER_BYTES).then_some(it))
        {
            buffer.extend_from_slice(bytes);
            return buffer.split();
        }
        let mut buffer = BytesMut::with_capacity(BUFFER_BYTES);
        buffer.extend_from_slice(bytes);
        let copy = buffer.split();
        if self.buffers.len() < BUFFERS {
            self.buffers.push(buffer);
        }
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_never_while_it_is_in_use() {
        let mut pool = Pool::default();
        let first = pool.copy(&[1; BUFFER_BYTES]);
        let place = first.as_ptr();
        let second = pool.copy(&[2; BUFFER_BYTES]);
        assert!(first.iter().all(|byte| *byte == 1) && second.iter().all(|byte| *byte == 2));
        assert_ne!(place, second.as_ptr());
        drop(first);
        let places: Vec<_> = (0..4).map(|_| pool.copy(&[3; LARGE_BYTES]).as_ptr()).collect();
        assert!(places.contains(&place), "it is free again");
        assert!(second.iter().all(|byte| *byte == 2));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut pool = Pool::default();
        let held: Vec<_> = (0..3 * BUFFERS).map(|_| pool.copy(&[7; BUFFER_BYTES])).collect();
        assert!(pool.buffers.len() <= BUFFERS, "{}", pool.buffers.len());
        assert!(held.iter().all(|copy| copy.len() == BUFFER_BYTES));
        let small = pool.copy(&[7; 100]);
        assert!(small.capacity() < LARGE_BYTES, "a small packet holds little memory");
    }
}
