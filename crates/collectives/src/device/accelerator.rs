//! What a rank computes on: a GPU, or the host where there is none, with memory on either.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use super::host::Aligned;
use super::{Cuda, Device, DeviceBuffer, DeviceError, Host, Pinned, Seat, Stream};
use crate::dtype::DType;

/// A GPU or the host. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub enum Accelerator {
    /// A GPU.
    Cuda(Cuda),
    /// The host's own memory.
    Host(Host),
}

impl Accelerator {
    /// A GPU for the process with this number on its host, of those that it may see: several processes share one where
    /// there are fewer GPUs. Without any it is the host, and why in one line. `driver` is the file with CUDA's driver;
    /// `None` has the system look for it.
    pub fn find(local_rank: usize, driver: Option<&Path>) -> (Self, Option<String>) {
        let ordinal = local_rank % Cuda::count(driver).max(1);
        let cuda = driver.map_or_else(|| Cuda::new(ordinal), |driver| Cuda::with_driver(driver, ordinal));
        match cuda {
            Ok(cuda) => (Self::Cuda(cuda), None),
            Err(error) => (Self::Host(Host), Some(format!("no GPU can be used: {error}"))),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Cuda(cuda) => cuda.name(),
            Self::Host(_) => "the host's memory",
        }
    }

    /// It as a rank's part of a group.
    ///
    /// # Errors
    /// The device's.
    pub fn seat(&self) -> Result<Seat, DeviceError> {
        match self {
            Self::Cuda(cuda) => cuda.seat(),
            Self::Host(_) => Ok(Host::seat()),
        }
    }

    /// A new stream.
    ///
    /// # Errors
    /// The device's.
    pub fn new_stream(&self) -> Result<Stream, DeviceError> {
        match self {
            Self::Cuda(cuda) => cuda.new_stream(),
            Self::Host(host) => host.new_stream(),
        }
    }

    /// Blocks until all that is on a stream has run.
    ///
    /// # Errors
    /// What the device has failed of.
    pub fn synchronize(&self, stream: Stream) -> Result<(), DeviceError> {
        match self {
            Self::Cuda(cuda) => cuda.synchronize(stream),
            Self::Host(_) => Ok(()),
        }
    }

    /// Keeps a stream busy for so long ([`Cuda::hold`]). The host runs everything in its calls, and has nothing to hold.
    ///
    /// # Errors
    /// The device's.
    pub fn hold(&self, stream: Stream, time: Duration) -> Result<(), DeviceError> {
        match self {
            Self::Cuda(cuda) => cuda.hold(stream, time),
            Self::Host(_) => Ok(()),
        }
    }

    /// Allocates memory for `len` elements, of whatever content.
    ///
    /// # Errors
    /// The device's: there is not as much left, for one.
    pub fn alloc(&self, len: usize, dtype: DType) -> Result<DeviceMemory, DeviceError> {
        let bytes = len.checked_mul(dtype.size()).ok_or_else(|| DeviceError {
            call: "Accelerator::alloc",
            reason: format!("{len} elements of {dtype} are more than can be addressed"),
        })?;
        let mut place = match self {
            Self::Cuda(cuda) => Memory::Device { cuda: cuda.clone(), address: cuda.alloc(bytes)? },
            Self::Host(_) => Memory::Host(Aligned::filled(bytes, 0)),
        };
        Ok(DeviceMemory { address: place.address(), memory: place, len, dtype })
    }
}

/// Elements in the memory of an [`Accelerator`], freed when it is dropped; on a GPU that waits for what the GPU is at.
pub struct DeviceMemory {
    memory: Memory,
    address: u64,
    len: usize,
    dtype: DType,
}

enum Memory {
    Device { cuda: Cuda, address: u64 },
    Host(Aligned),
}

impl DeviceMemory {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Some of the elements, for a collective.
    ///
    /// # Safety
    /// What [`DeviceBuffer::from_raw`] wants: this memory is kept until the operation has run, and neither read nor
    /// written meanwhile.
    ///
    /// # Panics
    /// If there are no such elements.
    pub unsafe fn buffer(&self, span: Range<usize>) -> DeviceBuffer {
        assert!(span.start <= span.end && span.end <= self.len, "{span:?} is not within {}", self.len);
        let address = self.address + (span.start * self.dtype.size()) as u64;
        // SAFETY: the memory is there; the rest is the caller's promise.
        unsafe { DeviceBuffer::from_raw(address, span.len(), self.dtype) }
    }

    /// Writes elements, from the first one on. Blocks until they are there. Whatever uses the memory must have run.
    ///
    /// # Errors
    /// The device's.
    ///
    /// # Panics
    /// If there are more bytes than the memory has.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        assert!(bytes.len() <= self.len * self.dtype.size(), "more than fits");
        match &mut self.memory {
            Memory::Device { cuda, address } => cuda.write(*address, bytes),
            Memory::Host(memory) => {
                memory.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Reads elements, from the first one on. Blocks. Whatever writes the memory must have run.
    ///
    /// # Errors
    /// The device's.
    ///
    /// # Panics
    /// If there are more bytes asked for than the memory has.
    pub fn read(&self, bytes: &mut [u8]) -> Result<(), DeviceError> {
        assert!(bytes.len() <= self.len * self.dtype.size(), "more than there is");
        match &self.memory {
            Memory::Device { cuda, address } => cuda.read(bytes, *address),
            Memory::Host(memory) => {
                bytes.copy_from_slice(&memory.bytes()[..bytes.len()]);
                Ok(())
            }
        }
    }

    /// Enqueues a copy of all elements of `from`, which are as many. Neither may be written until it has run, nor this read;
    /// dropping one waits for it.
    ///
    /// # Errors
    /// The device's.
    ///
    /// # Panics
    /// If both are not on one device, or differ in size.
    pub fn copy_from(&mut self, from: &Self, stream: Stream) -> Result<(), DeviceError> {
        assert_eq!((self.len, self.dtype), (from.len, from.dtype), "they are as long");
        match (&mut self.memory, &from.memory) {
            (Memory::Device { cuda, address }, Memory::Device { address: from, .. }) => {
                cuda.copy_within((*address, *from, self.len * self.dtype.size()), stream)
            }
            (Memory::Host(to), Memory::Host(from)) => {
                to.bytes_mut().copy_from_slice(from.bytes());
                Ok(())
            }
            _ => panic!("one is on a GPU, the other in the host's memory"),
        }
    }
}

impl Memory {
    fn address(&mut self) -> u64 {
        match self {
            Self::Device { address, .. } => *address,
            // The pointer that may be written through: collectives get no other.
            Self::Host(memory) => memory.bytes_mut().as_mut_ptr() as u64,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Self::Device { cuda, address } = self
            && let Err(error) = cuda.free(*address)
        {
            tracing::debug!(%error, "the driver does not take device memory back");
        }
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { len, dtype, .. } = self;
        f.debug_struct("DeviceMemory").field("len", len).field("dtype", dtype).finish_non_exhaustive()
    }
}
