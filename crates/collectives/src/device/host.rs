//! The host's own memory as a device: for ranks without a GPU in a group that has some, and for machines without any.
//!
//! Everything runs in the call, so streams and events have nothing to order. The collectives are cut into the same pieces
//! as on a GPU, and have the same bits.

use super::{CopySpan, Device, DeviceError, Event, Pinned, Seat, Stream, Transfer};

/// What [`Device::alloc_pinned`] promises.
const ALIGNMENT: usize = 64;

/// The host as a device. Its buffers are at the host's own addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Host;

impl Host {
    /// This rank's part of a group: one without a GPU.
    pub fn seat() -> Seat {
        Seat { device: Box::new(Self), gpu: None }
    }
}

impl Device for Host {
    fn share(&self) -> Box<dyn Device> {
        Box::new(*self)
    }

    fn new_stream(&self) -> Result<Stream, DeviceError> {
        Ok(Stream(0))
    }

    fn new_event(&self) -> Result<Event, DeviceError> {
        Ok(Event(0))
    }

    fn record(&self, _event: Event, _stream: Stream) -> Result<(), DeviceError> {
        Ok(())
    }

    fn wait(&self, _stream: Stream, _event: Event) -> Result<(), DeviceError> {
        Ok(())
    }

    fn is_done(&self, _event: Event) -> Result<bool, DeviceError> {
        Ok(true)
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<Box<dyn Pinned>, DeviceError> {
        Ok(Box::new(Aligned::filled(bytes, 0)))
    }

    fn copy_to_host(
        &self,
        spans: Vec<CopySpan>,
        mut buffer: Box<dyn Pinned>,
        _stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        for span in spans {
            let to = &mut buffer.bytes_mut()[span.offset..][..span.bytes];
            // SAFETY: whoever made the device buffer has promised that so many bytes are there and that nobody writes them
            // now; `to` is memory of ours that is borrowed here alone.
            unsafe { std::ptr::copy_nonoverlapping(span.address as *const u8, to.as_mut_ptr(), span.bytes) };
        }
        Ok(Box::new(Done(buffer)))
    }

    fn copy_to_device(
        &self,
        buffer: Box<dyn Pinned>,
        spans: Vec<CopySpan>,
        _stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        for span in spans {
            let from = &buffer.bytes()[span.offset..][..span.bytes];
            // SAFETY: whoever made the device buffer has promised that so many bytes are there and that nobody else uses
            // them now; `from` is memory of ours.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), span.address as *mut u8, span.bytes) };
        }
        Ok(Box::new(Done(buffer)))
    }
}

/// Copies that have run.
struct Done(Box<dyn Pinned>);

impl Transfer for Done {
    fn is_done(&mut self) -> Result<bool, DeviceError> {
        Ok(true)
    }

    fn finish(self: Box<Self>) -> Box<dyn Pinned> {
        self.0
    }
}

/// Memory of the process that begins at a multiple of 64 bytes.
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Aligned {
    pub(super) fn filled(bytes: usize, with: u8) -> Self {
        let memory = vec![with; bytes + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start, bytes }
    }
}

impl Pinned for Aligned {
    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.bytes]
    }
}
