//! Accelerators, as far as collectives need them: streams, events, device memory and pinned host memory.
//!
//! [`Device`] is what CUDA's driver API has of these, and no more; [`NcclGroup`] runs collectives on it through NCCL,
//! [`Fallback`] through the host, `hierarchy` through NCCL inside hosts and the host between them, and a
//! [`DeviceGroup`] through that of them on which its ranks agree. [`Cuda`] is a GPU, [`Host`] the host's memory. No CUDA is needed to build or to
//! test: the tests' device is software that does everything as late and in as odd an order as the rules of streams
//! allow, and so finds a wait that is missing.
//!
//! Memory that a copy is under way to or from belongs to the copy: a [`Transfer`] owns the pinned buffer until it is
//! done. So the host cannot look too early, and no buffer is freed under the device.

mod accelerator;
mod agreement;
mod checks;
mod cuda;
mod fallback;
mod group;
mod hierarchy;
mod host;
mod nccl;
mod pieces;
#[cfg(test)]
mod software;
#[cfg(test)]
mod tests;

use std::fmt;

pub use accelerator::{Accelerator, DeviceMemory};
pub use agreement::{Agreement, Backend, Offer, Wanted, agree};
pub use cuda::Cuda;
pub use fallback::{Fallback, FallbackConfig};
pub use group::{DeviceGroup, Setup};
pub use host::Host;
pub use nccl::{Aborter, NcclGroup};

use crate::dtype::DType;

/// An accelerator. A handle belongs to the device that made it, and lasts as long; no call waits for the device.
pub trait Device: Send {
    /// Another handle of the same device.
    fn share(&self) -> Box<dyn Device>;

    /// A new stream: what is enqueued on it runs in order, beside other streams.
    ///
    /// # Errors
    /// The device's.
    fn new_stream(&self) -> Result<Stream, DeviceError>;

    /// A new event.
    ///
    /// # Errors
    /// The device's.
    fn new_event(&self) -> Result<Event, DeviceError>;

    /// Enqueues a mark: the event is done when all that is on the stream now has run (CUDA: `cuEventRecord`).
    ///
    /// # Errors
    /// The device's.
    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError>;

    /// Has the stream wait, before what is enqueued from now on, for the event's last mark; the host does not wait
    /// (CUDA: `cuStreamWaitEvent`).
    ///
    /// # Errors
    /// The device's.
    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError>;

    /// Whether the event's last mark has run; also before it was ever recorded (CUDA: `cuEventQuery`).
    ///
    /// # Errors
    /// What the device has failed of; it fails for good.
    fn is_done(&self, event: Event) -> Result<bool, DeviceError>;

    /// Allocates host memory that the device copies to and from by itself: readable at full speed by the processor,
    /// so not write-combined. Its content is arbitrary, and it begins at a multiple of 64 bytes.
    ///
    /// # Errors
    /// The device's.
    fn alloc_pinned(&self, bytes: usize) -> Result<Box<dyn Pinned>, DeviceError>;

    /// Enqueues copies from device memory into a buffer.
    ///
    /// # Errors
    /// The device's; the buffer is gone then.
    fn copy_to_host(
        &self,
        spans: Vec<CopySpan>,
        buffer: Box<dyn Pinned>,
        stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError>;

    /// Enqueues copies from a buffer into device memory.
    ///
    /// # Errors
    /// The device's; the buffer is gone then.
    fn copy_to_device(
        &self,
        buffer: Box<dyn Pinned>,
        spans: Vec<CopySpan>,
        stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError>;
}

/// A rank's device, as a group needs it.
pub struct Seat {
    /// Where its buffers are.
    pub device: Box<dyn Device>,
    /// What NCCL needs to know of it; `None` where it cannot be used.
    pub gpu: Option<Gpu>,
}

/// A GPU, as NCCL and the other ranks need it.
#[derive(Clone)]
pub struct Gpu {
    /// A number that no two GPUs of a host have in common.
    pub id: u64,
    /// The newest version of CUDA that its driver supports, as 12080 for 12.8.
    pub driver: u32,
    /// Makes it the one that the calling thread uses.
    pub prepare: paceline_nccl::Prepare,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("gpu", &self.gpu.as_ref().map(|gpu| gpu.id)).finish_non_exhaustive()
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("id", &self.id).field("driver", &self.driver).finish_non_exhaustive()
    }
}

/// Host memory that a device copies to and from.
pub trait Pinned: Send {
    /// The memory.
    fn bytes(&self) -> &[u8];

    /// The memory, to write.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Copies that are under way, and the buffer that they use. One that is dropped before it is done keeps its buffer
/// alive until it is, and does not wait for that.
pub trait Transfer: Send {
    /// Whether all copies have run. Does not block.
    ///
    /// # Errors
    /// What the device has failed of; it fails for good.
    fn is_done(&mut self) -> Result<bool, DeviceError>;

    /// Gives the buffer back. To be called when the copies are done; before that it blocks until they are.
    fn finish(self: Box<Self>) -> Box<dyn Pinned>;
}

/// A piece of device memory and its place in a pinned buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopySpan {
    pub(crate) address: u64,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

impl CopySpan {
    /// A buffer, with its bytes from `offset` on in the pinned one.
    pub fn of(buffer: DeviceBuffer, offset: usize) -> Self {
        Self { address: buffer.address(), offset, bytes: buffer.len() * buffer.dtype().size() }
    }

    /// The address of the device memory.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Where its bytes are in the buffer.
    pub fn offset(self) -> usize {
        self.offset
    }

    /// How many they are.
    pub fn bytes(self) -> usize {
        self.bytes
    }
}

/// A stream of a device (CUDA: `CUstream`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stream(pub(crate) u64);

impl Stream {
    /// A stream that somebody else has made, by its handle.
    ///
    /// # Safety
    /// It is one of the device that it is used with, and lives until all that is enqueued on it has run.
    pub const unsafe fn from_handle(handle: u64) -> Self {
        Self(handle)
    }

    /// The handle.
    pub fn handle(self) -> u64 {
        self.0
    }
}

/// An event of a device (CUDA: `CUevent`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Event(pub(crate) u64);

/// Elements in device memory, owned by somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBuffer {
    address: u64,
    len: usize,
    dtype: DType,
}

impl DeviceBuffer {
    /// `len` elements of `dtype` from `address` on.
    ///
    /// # Safety
    /// They are in memory of the device that they are used with, and stay there until the stream that an operation on
    /// them was called with has run to where it was called. Nothing else uses them meanwhile, but for what is before
    /// that place in the stream.
    pub const unsafe fn from_raw(address: u64, len: usize, dtype: DType) -> Self {
        Self { address, len, dtype }
    }

    /// Memory that checks its addresses.
    #[cfg(test)]
    pub(crate) fn checked(address: u64, len: usize, dtype: DType) -> Self {
        Self { address, len, dtype }
    }

    /// Some of the elements.
    pub(crate) fn part(self, span: std::ops::Range<usize>) -> Self {
        assert!(span.start <= span.end && span.end <= self.len, "spans are checked against the buffer");
        let address = self.address + (span.start * self.dtype.size()) as u64;
        Self { address, len: span.len(), ..self }
    }

    /// None.
    pub(crate) fn empty(dtype: DType) -> Self {
        Self { address: 0, len: 0, dtype }
    }

    /// Where it begins.
    pub fn address(self) -> u64 {
        self.address
    }

    /// The number of elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The type of the elements.
    pub fn dtype(self) -> DType {
        self.dtype
    }
}

/// What a device has failed of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {reason}")]
pub struct DeviceError {
    /// What was called.
    pub call: &'static str,
    /// What the device said.
    pub reason: String,
}

impl fmt::Debug for dyn Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").finish_non_exhaustive()
    }
}
