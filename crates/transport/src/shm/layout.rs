//! What lies where in a rank's segment.
//!
//! ```text
//! 0       identity of the segment        written once, before anybody else has it
//! 128     heartbeat                      counts up while the process is scheduled
//! 256     asleep, bell                   this rank sleeps on its bell; peers ring it
//! 1024    cursors                        per peer: bytes written to it, bytes read from it; a line each
//! …       board                          for the collectives above, which lay it out themselves
//! …       rings                          per peer: bytes on their way to it
//! ```
//! Every word has one writer, its segment's owner, but for `bell`. Lines are 128 bytes: processors
//! fetch pairs of 64-byte lines, and two writers in one pair would slow each other down.

/// The distance at which two writers do not disturb each other, in bytes.
pub const LINE_BYTES: usize = 128;

/// The memory that a segment gives to the collectives above, in bytes: their flags, and the staging
/// areas that stay in the second-level cache.
pub const BOARD_BYTES: usize = 928 * 1024;

/// Rings of one segment together, in bytes, as long as each has at least [`SMALLEST_RING_BYTES`].
const RINGS_BYTES: usize = 1024 * 1024;

/// Below this a ring's reader and writer meet too often.
const SMALLEST_RING_BYTES: usize = 4096;

/// The most ranks of one host that share memory. Each maps the segments of all others, 2 MiB each.
pub const RANK_LIMIT: usize = 256;

pub(super) const HEARTBEAT: usize = 128;
pub(super) const ASLEEP: usize = 256;
pub(super) const BELL: usize = 260;
const CURSORS: usize = 1024;
const PAGE_BYTES: usize = 4096;

/// The offsets of a segment; equal on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    world_size: usize,
    pub(super) ring_bytes: usize,
}

impl Layout {
    pub(super) fn new(world_size: usize) -> Self {
        let share = RINGS_BYTES / world_size;
        // A power of two, so that a cursor becomes an offset without a division.
        let ring_bytes = (share + 1).next_power_of_two() / 2;
        Self { world_size, ring_bytes: ring_bytes.max(SMALLEST_RING_BYTES) }
    }

    /// How many bytes the owner has put into its ring to `peer` since the start.
    pub(super) fn written(self, peer: usize) -> usize {
        CURSORS + 2 * peer * LINE_BYTES
    }

    /// How many bytes the owner has taken from the ring of `peer` to it since the start.
    pub(super) fn read(self, peer: usize) -> usize {
        CURSORS + (2 * peer + 1) * LINE_BYTES
    }

    pub(super) fn board(self) -> usize {
        (CURSORS + 2 * self.world_size * LINE_BYTES).next_multiple_of(PAGE_BYTES)
    }

    /// The owner's ring to `peer`.
    pub(super) fn ring(self, peer: usize) -> usize {
        self.board() + BOARD_BYTES + peer * self.ring_bytes
    }

    pub(super) fn len(self) -> usize {
        self.ring(self.world_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_a_segment_is_bounded_whatever_the_world_size() {
        for world_size in 1..=RANK_LIMIT {
            let layout = Layout::new(world_size);
            assert!(layout.ring_bytes.is_power_of_two() && layout.ring_bytes >= SMALLEST_RING_BYTES);
            assert!(BELL + 4 <= CURSORS && layout.read(world_size - 1) + LINE_BYTES <= layout.board());
            assert_eq!(layout.ring(0), layout.board() + BOARD_BYTES);
            assert!(layout.len() <= 2 * 1024 * 1024 + 64 * 1024, "{world_size}: {}", layout.len());
            if world_size <= 32 {
                assert!(layout.len() <= 2 * 1024 * 1024, "one huge page: {world_size}: {}", layout.len());
            }
        }
    }
}
