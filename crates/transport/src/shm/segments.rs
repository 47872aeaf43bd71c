//! The segments of all ranks of a host, as one of them maps them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::thread::futex;

use super::layout::{ASLEEP, BELL, BOARD_BYTES, HEARTBEAT, Layout};
use super::memory::SharedMemory;
use super::ring::Ring;

/// How many processors the control group lets run at a time, as far as whole ones go.
fn quota_processors() -> usize {
    let limit = std::fs::read_to_string("/sys/fs/cgroup/cpu.max").unwrap_or_default();
    let mut numbers = limit.split_whitespace().map(str::parse::<usize>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(quota)), Some(Ok(period))) if period > 0 => (quota / period).max(1),
        // No limit, or none that is to be seen.
        _ => usize::MAX,
    }
}

/// What is assumed where the system does not say it (some containers hide it).
const DEFAULT_CACHE_BYTES: usize = 16 * 1024 * 1024;

/// One segment per rank, in the layout that all ranks agree on.
#[derive(Debug)]
pub struct Segments {
    /// This rank's place among the members.
    rank: usize,
    members: Vec<usize>,
    hosts: Vec<usize>,
    /// How many processors the ranks have together.
    processors: usize,
    layout: Layout,
    /// By place.
    memory: Vec<SharedMemory>,
}

impl Segments {
    /// The segments of `members`, ranks of the world in order, `rank` among them; `hosts` has the lowest rank
    /// of the host of each rank of the world.
    pub(super) fn new(
        rank: usize,
        members: Vec<usize>,
        hosts: Vec<usize>,
        memory: Vec<SharedMemory>,
        processors: usize,
    ) -> Self {
        let layout = Layout::new(memory.len());
        let rank = members.iter().position(|&member| member == rank).expect("a rank is of its own host");
        assert!(
            memory.iter().all(|memory| memory.len() == layout.len()),
            "the handshake agrees on the length"
        );
        Self { rank, members, hosts, processors, layout, memory }
    }

    /// This process's place among the ranks of its host, by which everything here is told apart.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks of this host.
    pub fn world_size(&self) -> usize {
        self.memory.len()
    }

    /// The ranks of this host by their numbers in the world, in order.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// For each rank of the world, the lowest rank of its host. Equal on all ranks.
    pub fn hosts(&self) -> &[usize] {
        &self.hosts
    }

    /// Whether every rank can have a processor of its own. A rank that waits may then spin.
    pub fn ranks_fit(&self) -> bool {
        self.memory.len() <= self.processors.min(quota_processors())
    }

    /// The size of the last-level cache that the ranks share, in bytes, as far as the system says.
    pub fn cache_bytes(&self) -> usize {
        let path = "/sys/devices/system/cpu/cpu0/cache/index3/size";
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let kibibytes = text.trim().strip_suffix('K').and_then(|number| number.parse::<usize>().ok());
        kibibytes.map_or(DEFAULT_CACHE_BYTES, |kibibytes| kibibytes * 1024)
    }

    /// Bytes of shared memory that this rank has made, whatever is sent through it.
    pub fn own_bytes(&self) -> usize {
        self.layout.len()
    }

    /// The [`BOARD_BYTES`] bytes that a rank's segment gives to the collectives. Aligned to a page; all
    /// zero at the start; valid as long as `self` lives.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn board(&self, rank: usize) -> *mut u8 {
        let memory = &self.memory[rank];
        assert!(self.layout.board() + BOARD_BYTES <= memory.len(), "the layout fits its segment");
        memory.as_ptr().wrapping_add(self.layout.board())
    }

    /// Wakes the ranks that sleep, after something was published to all.
    ///
    /// There is no fence between what was published and the look at who sleeps: a rank that falls asleep
    /// in the same few nanoseconds is missed, and finds out when its sleep, of milliseconds, ends. A
    /// fence costs a small collective time at every call, a missed rank 2 ms at most.
    #[inline]
    pub fn wake_all(&self) {
        for peer in 0..self.memory.len() {
            if peer != self.rank {
                self.wake(peer);
            }
        }
    }

    /// Wakes one rank if it sleeps. As [`wake_all`](Self::wake_all).
    #[inline]
    pub fn wake(&self, rank: usize) {
        if self.memory[rank].atomic_u32(ASLEEP).load(Ordering::Relaxed) != 0 {
            self.ring_bell(rank);
        }
    }

    #[cold]
    pub(super) fn ring_bell(&self, rank: usize) {
        let bell = self.memory[rank].atomic_u32(BELL);
        bell.fetch_add(1, Ordering::Release);
        // Fails only for an address that is not mapped.
        let _ = futex::wake(bell, futex::Flags::empty(), 1);
    }

    /// Says that this rank is about to sleep. Everything is to be looked at once more before it does.
    pub(super) fn announce_sleep(&self) -> u32 {
        let memory = &self.memory[self.rank];
        memory.atomic_u32(ASLEEP).store(1, Ordering::SeqCst);
        memory.atomic_u32(BELL).load(Ordering::SeqCst)
    }

    /// Sleeps until the bell is no longer as it was when the sleep was announced, or for `longest`.
    pub(super) fn sleep(&self, bell: u32, longest: Duration) {
        let longest = longest.try_into().ok();
        // Woken, timed out, interrupted, or the bell has rung already: the caller looks in each case.
        let _ = futex::wait(
            self.memory[self.rank].atomic_u32(BELL),
            futex::Flags::empty(),
            bell,
            longest.as_ref(),
        );
    }

    pub(super) fn end_sleep(&self) {
        self.memory[self.rank].atomic_u32(ASLEEP).store(0, Ordering::Relaxed);
    }

    pub(super) fn beat(&self) {
        self.memory[self.rank].atomic_u64(HEARTBEAT).fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn heartbeat(&self, rank: usize) -> u64 {
        self.memory[rank].atomic_u64(HEARTBEAT).load(Ordering::Relaxed)
    }

    /// The ring with which this rank sends to `peer`.
    pub(super) fn ring_to(&self, peer: usize) -> Ring<'_> {
        self.ring(self.rank, peer)
    }

    /// The ring from which this rank receives what `peer` sends.
    pub(super) fn ring_from(&self, peer: usize) -> Ring<'_> {
        self.ring(peer, self.rank)
    }

    fn ring(&self, writer: usize, reader: usize) -> Ring<'_> {
        let (ours, theirs) = (&self.memory[writer], &self.memory[reader]);
        assert!(
            self.layout.ring(reader) + self.layout.ring_bytes <= ours.len(),
            "the layout fits its segment"
        );
        Ring {
            written: ours.atomic_u64(self.layout.written(reader)),
            read: theirs.atomic_u64(self.layout.read(writer)),
            bytes: ours.as_ptr().wrapping_add(self.layout.ring(reader)),
            size: self.layout.ring_bytes,
        }
    }
}
