//! Words of classic BPF (linux/bpf_common.h), in which a socket tells the kernel what to drop before anybody is woken.
//!
//! What a program returns is how much is kept of a packet. A load from behind its end drops it.

/// An operation, how many steps to skip if it holds and if not, and a value.
pub(crate) type Step = (u16, u8, u8, u32);

pub(crate) const LOAD_WORD: u16 = 0x20;
pub(crate) const LOAD_BYTE: u16 = 0x30;
pub(crate) const SHIFT_RIGHT: u16 = 0x74;
pub(crate) const SKIP: u16 = 0x05;
pub(crate) const IF_EQUAL: u16 = 0x15;
pub(crate) const IF_AT_LEAST: u16 = 0x35;
pub(crate) const IF_SET: u16 = 0x45;
pub(crate) const RETURN: u16 = 0x06;

/// What [`RETURN`] returns.
pub(crate) const DROP: u32 = 0;
pub(crate) const KEEP: u32 = u32::MAX;
