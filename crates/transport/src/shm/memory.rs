//! Memory that several processes map: an anonymous file (memfd), handed over by descriptor.
//!
//! It has no name, so nothing is left behind after a crash and nobody finds it who was not given it; it
//! needs no /dev/shm, which is 64 MiB in a pod by default. This file is one of the few with unsafe code.
//!
//! # Why this is sound
//! A mapping lives as long as its [`SharedMemory`] and its length never changes: the file is sealed
//! against shrinking before anybody else has it, and a foreign file without the seal is refused, so no
//! access within `len` can fault. The memory is handed out as raw pointers and atomics only, never as
//! references to plain data, because other processes write to it; who may touch which bytes when is
//! the business of the protocols above, which say so at their own unsafe blocks.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// Below this a huge page would waste more than it saves.
const HUGE_PAGE_BYTES: usize = 2 * 1024 * 1024;

/// A mapping of an anonymous file of fixed length, readable and writable.
#[derive(Debug)]
pub struct SharedMemory {
    base: NonNull<u8>,
    len: usize,
    file: OwnedFd,
}

// SAFETY: a mapping belongs to the process, not to a thread, and this type gives no access to its
// plain bytes other than raw pointers, whose users answer for races themselves.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// New memory of `len` bytes, all zero and all present: no page fault is left for the first use.
    ///
    /// # Errors
    /// The operating system's: no memory, no descriptor left, or a kernel that forbids memfd.
    pub fn create(len: usize) -> io::Result<Self> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "shared memory has a length"));
        }
        let file = memfd_create("paceline", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, len as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(file, len)
    }

    /// Maps memory that another process made, of `len` bytes.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] when the file has another length or could still shrink, which
    /// would make our reads fault; else the operating system's.
    pub fn open(file: OwnedFd, len: usize) -> io::Result<Self> {
        let refused = |reason: String| Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        let seals = fcntl_get_seals(&file)?;
        if !seals.contains(SealFlags::SHRINK) {
            return refused("its memory is not sealed against shrinking".to_owned());
        }
        let size = fstat(&file)?.st_size;
        if size != len as i64 || len == 0 {
            return refused(format!("its memory has {size} bytes and {len} were agreed"));
        }
        Self::map(file, len)
    }

    fn map(file: OwnedFd, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        let base = NonNull::new(base.cast()).expect("the kernel maps nothing at address 0 unless told to");
        let memory = Self { base, len, file };
        // Both are wishes: an old kernel, or one set to never, answers with an error and works without.
        if len >= HUGE_PAGE_BYTES {
            let _ = memory.advise(Advice::LinuxHugepage);
        }
        let _ = memory.advise(Advice::LinuxPopulateWrite);
        Ok(memory)
    }

    fn advise(&self, advice: Advice) -> rustix::io::Result<()> {
        // SAFETY: the range is exactly our mapping, and neither piece of advice changes its content.
        unsafe { madvise(self.base.as_ptr().cast(), self.len, advice) }
    }

    /// Its first byte. Aligned to a page; valid for [`len`](Self::len) bytes as long as `self` lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Its length in bytes, never 0.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The descriptor with which another process can map it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The 8 bytes at `offset` as an atomic.
    ///
    /// # Panics
    /// If they are not in the memory or not aligned.
    pub fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        let at = self.checked::<AtomicU64>(offset);
        // SAFETY: in bounds and aligned, as just checked; mapped as long as `self` lives; every process
        // accesses these bytes as an atomic, by the layout that `shm::layout` lays down.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }

    /// The 4 bytes at `offset` as an atomic.
    ///
    /// # Panics
    /// If they are not in the memory or not aligned.
    pub fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        let at = self.checked::<AtomicU32>(offset);
        // SAFETY: as for `atomic_u64`.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    fn checked<T>(&self, offset: usize) -> *mut u8 {
        let fits = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len);
        assert!(fits && offset.is_multiple_of(align_of::<T>()), "offsets come from the layout");
        // SAFETY: in bounds, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: exactly our mapping; whoever holds a pointer into it answers for outliving it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_one_mapping_writes_another_reads() {
        let ours = SharedMemory::create(8192).expect("memory");
        let theirs = SharedMemory::open(ours.file().try_clone_to_owned().expect("a descriptor"), 8192)
            .expect("sealed");
        ours.atomic_u64(4096).store(7, Ordering::Release);
        assert_eq!(theirs.atomic_u64(4096).load(Ordering::Acquire), 7);
        assert_ne!(ours.as_ptr(), theirs.as_ptr());
    }

    #[test]
    fn memory_of_another_length_or_that_may_shrink_is_refused() {
        let ours = SharedMemory::create(8192).expect("memory");
        let wrong = SharedMemory::open(ours.file().try_clone_to_owned().expect("a descriptor"), 4096);
        assert!(wrong.expect_err("too short").to_string().contains("8192 bytes and 4096 were agreed"));
        let file = memfd_create("open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
        ftruncate(&file, 4096).expect("space");
        assert!(SharedMemory::open(file, 4096).expect_err("no seal").to_string().contains("shrinking"));
    }

    #[test]
    #[should_panic(expected = "offsets come from the layout")]
    fn an_atomic_outside_is_a_panic_not_an_access() {
        let _ = SharedMemory::create(4096).expect("memory").atomic_u64(4092);
    }
}
