//! A GPU through CUDA's driver, which is loaded at run time: without a driver it is an error and nothing else.
//!
//! Some thirty functions, with result codes as integers: a binding whose codes are an enum cannot hold those of a newer
//! driver. The device's primary context is used, which PyTorch has too, and is current only within a call, so
//! that whatever the caller's thread has chosen stays. Streams and events stay until the context ends, since destroying
//! them may wait for the device.
//!
//! It has never run on a GPU: the tests have a driver of their own, in C, whose memory is the host's.

mod ffi;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ffi::{Driver, NOT_READY};
use paceline_nccl as nccl;

use super::{CopySpan, Device, DeviceError, Event, Gpu, Pinned, Seat, Stream, Transfer};

/// Where the driver is found; it belongs to the system and not to CUDA's toolkit.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// A GPU. Cheap to clone; all clones are one device.
#[derive(Clone)]
pub struct Cuda {
    context: Arc<Context>,
}

struct Context {
    driver: Driver,
    handle: usize,
    ordinal: i32,
    name: String,
    /// Events of copies that are done.
    events: Mutex<Vec<usize>>,
    /// The kernel that holds a stream, once somebody has wanted it.
    hold: Mutex<Option<usize>>,
    /// Transfers that were dropped before they were done: each has the event that ends it, and its buffer.
    abandoned: Mutex<Vec<(usize, Box<dyn Pinned>)>>,
}

impl Cuda {
    /// The GPU of this number, among those that the process may see (`CUDA_VISIBLE_DEVICES`).
    ///
    /// # Errors
    /// [`DeviceError`] that says in one line what is missing: the driver, the device, or whatever the driver says.
    pub fn new(ordinal: usize) -> Result<Self, DeviceError> {
        let mut reasons = Vec::new();
        for name in NAMES {
            match Driver::load(name.as_ref()) {
                Ok(driver) => return Self::with(driver, ordinal),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(DeviceError { call: "loading CUDA's driver", reason: reasons.join("; ") })
    }

    /// The same with the driver in this file.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_driver(file: &Path, ordinal: usize) -> Result<Self, DeviceError> {
        let driver = Driver::load(file);
        Self::with(driver.map_err(|reason| DeviceError { call: "loading CUDA's driver", reason })?, ordinal)
    }

    fn with(driver: Driver, ordinal: usize) -> Result<Self, DeviceError> {
        driver.init()?;
        let count = driver.device_count()?;
        let Some(ordinal) = i32::try_from(ordinal).ok().filter(|&ordinal| ordinal < count) else {
            let reason = format!("there is no GPU {ordinal}; this process sees {count}");
            return Err(DeviceError { call: "choosing a GPU", reason });
        };
        let (name, handle) = (driver.device_name(ordinal)?, driver.retain_primary_context(ordinal)?);
        let (events, hold, abandoned) = Default::default();
        let context = Context { driver, handle, ordinal, name, events, hold, abandoned };
        Ok(Self { context: Arc::new(context) })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.context.name
    }

    /// The newest version of CUDA that the driver supports, as 12080 for 12.8.
    ///
    /// # Errors
    /// The driver's.
    pub fn driver_version(&self) -> Result<i32, DeviceError> {
        self.context.driver.version()
    }

    /// How many GPUs this process sees; 0 without a driver.
    pub fn count(driver: Option<&Path>) -> usize {
        let names = driver.map_or_else(|| NAMES.map(Path::new).to_vec(), |driver| vec![driver]);
        let found = names.into_iter().find_map(|name| Driver::load(name).ok());
        let count = found.and_then(|driver| driver.init().and_then(|()| driver.device_count()).ok());
        count.and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
    }

    /// This GPU as a rank's part of a group.
    ///
    /// # Errors
    /// The driver's.
    pub fn seat(&self) -> Result<Seat, DeviceError> {
        let context = self.context.clone();
        let prepare: nccl::Prepare =
            Arc::new(move || context.driver.push_context(context.handle).map_err(|error| error.to_string()));
        let driver = u32::try_from(self.driver_version()?).unwrap_or(0);
        let gpu = Gpu { id: self.context.driver.device_id(self.context.ordinal)?, driver, prepare };
        Ok(Seat { device: Box::new(self.clone()), gpu: Some(gpu) })
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<u64, DeviceError> {
        // CUDA allocates no nothing.
        self.context.current(|driver| driver.alloc_device(bytes.max(1)))
    }

    pub(super) fn free(&self, address: u64) -> Result<(), DeviceError> {
        self.context.current(|driver| driver.free_device(address))
    }

    pub(super) fn read(&self, to: &mut [u8], from: u64) -> Result<(), DeviceError> {
        self.context.current(|driver| driver.read(to, from))
    }

    pub(super) fn write(&self, to: u64, from: &[u8]) -> Result<(), DeviceError> {
        self.context.current(|driver| driver.write(to, from))
    }

    pub(super) fn copy_within(&self, span: (u64, u64, usize), stream: Stream) -> Result<(), DeviceError> {
        let (to, from, bytes) = span;
        self.context.current(|driver| driver.copy_within(to, from, bytes, stream.0))
    }

    /// Blocks until all that is on a stream has run.
    ///
    /// # Errors
    /// What the device has failed of.
    pub fn synchronize(&self, stream: Stream) -> Result<(), DeviceError> {
        self.context.current(|driver| driver.synchronize_stream(stream.0))
    }

    /// Keeps a stream busy for so long, with a kernel of one thread (`cuda/hold.ptx`), so that whatever is enqueued on it
    /// afterwards is late. For tests: what must wait for this stream, and does not, is then wrong. Does not block.
    ///
    /// # Errors
    /// The driver's.
    pub fn hold(&self, stream: Stream, time: Duration) -> Result<(), DeviceError> {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.context.current(|driver| {
            let mut loaded = lock(&self.context.hold);
            let kernel = match *loaded {
                Some(kernel) => kernel,
                None => *loaded.insert(driver.load_hold()?),
            };
            driver.hold(kernel, nanoseconds, stream.0)
        })
    }

    /// Enqueues a copy for each span, and a mark after them.
    fn copy(
        &self,
        spans: &[CopySpan],
        mut buffer: Box<dyn Pinned>,
        stream: Stream,
        direction: Direction,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        self.context.bury();
        let bytes = buffer.bytes_mut();
        let fits =
            |span: &CopySpan| span.offset.checked_add(span.bytes).is_some_and(|end| end <= bytes.len());
        assert!(spans.iter().all(fits), "spans are within the buffer");
        let start = bytes.as_mut_ptr() as usize;
        let enqueued = self.context.current(|driver| {
            for span in spans {
                let host = start + span.offset;
                match direction {
                    Direction::Down => driver.copy_down(host, span.address, span.bytes, stream.0)?,
                    Direction::Up => driver.copy_up(span.address, host, span.bytes, stream.0)?,
                }
            }
            let free = lock(&self.context.events).pop();
            let event = free.map_or_else(|| driver.new_event(), Ok)?;
            driver.record(event, stream.0)?;
            Ok(event)
        });
        match enqueued {
            Ok(event) => {
                let context = self.context.clone();
                Ok(Box::new(CudaTransfer { context, event, buffer: Some(buffer) }))
            }
            Err(error) => {
                // Some of the copies may be under way.
                std::mem::forget(buffer);
                Err(error)
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Down,
    Up,
}

impl Context {
    /// Makes the context current while `calls` run.
    fn current<T>(&self, calls: impl FnOnce(&Driver) -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        self.driver.push_context(self.handle)?;
        let outcome = calls(&self.driver);
        self.driver.pop_context()?;
        outcome
    }

    /// Frees the buffers of abandoned transfers that are done by now.
    fn bury(&self) {
        let mut abandoned = std::mem::take(&mut *lock(&self.abandoned));
        let done: Vec<_> =
            abandoned.extract_if(.., |(event, _)| matches!(self.event_is_done(*event), Ok(true))).collect();
        lock(&self.abandoned).append(&mut abandoned);
        lock(&self.events).extend(done.iter().map(|(event, _)| *event));
    }

    fn event_is_done(&self, event: usize) -> Result<bool, DeviceError> {
        self.current(|driver| match driver.query(event) {
            0 => Ok(true),
            NOT_READY => Ok(false),
            code => Err(driver.error("cuEventQuery", code)),
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // A driver that is shutting down refuses, and there is nothing else to do.
        let _ = self.driver.release_primary_context(self.ordinal);
    }
}

impl Device for Cuda {
    fn share(&self) -> Box<dyn Device> {
        Box::new(self.clone())
    }

    fn new_stream(&self) -> Result<Stream, DeviceError> {
        self.context.current(|driver| driver.new_stream()).map(|handle| Stream(handle as u64))
    }

    fn new_event(&self) -> Result<Event, DeviceError> {
        self.context.current(|driver| driver.new_event()).map(|handle| Event(handle as u64))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError> {
        self.context.current(|driver| driver.record(event.0 as usize, stream.0))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        self.context.current(|driver| driver.wait(stream.0, event.0 as usize))
    }

    fn is_done(&self, event: Event) -> Result<bool, DeviceError> {
        self.context.event_is_done(event.0 as usize)
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<Box<dyn Pinned>, DeviceError> {
        self.context.bury();
        let address = self.context.current(|driver| driver.alloc_host(bytes))?;
        Ok(Box::new(ffi::HostMemory::new(address, bytes, self.context.clone())))
    }

    fn copy_to_host(
        &self,
        spans: Vec<CopySpan>,
        buffer: Box<dyn Pinned>,
        stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        self.copy(&spans, buffer, stream, Direction::Down)
    }

    fn copy_to_device(
        &self,
        buffer: Box<dyn Pinned>,
        spans: Vec<CopySpan>,
        stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        self.copy(&spans, buffer, stream, Direction::Up)
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Context { ordinal, name, .. } = &*self.context;
        f.debug_struct("Cuda").field("ordinal", ordinal).field("name", name).finish_non_exhaustive()
    }
}

struct CudaTransfer {
    context: Arc<Context>,
    event: usize,
    /// `None` once it is given back.
    buffer: Option<Box<dyn Pinned>>,
}

impl Transfer for CudaTransfer {
    fn is_done(&mut self) -> Result<bool, DeviceError> {
        self.context.event_is_done(self.event)
    }

    fn finish(mut self: Box<Self>) -> Box<dyn Pinned> {
        let buffer = self.buffer.take().expect("it is given back once");
        // A device that has failed runs nothing any more, and its events are of no use.
        if self.context.current(|driver| driver.synchronize(self.event)).is_ok() {
            lock(&self.context.events).push(self.event);
        }
        buffer
    }
}

impl Drop for CudaTransfer {
    /// Waiting is not for a drop: who needs memory next frees the buffer, once the device is done with it. Until then it
    /// keeps the context alive, for as long as the process if nobody ever does.
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        lock(&self.context.abandoned).push((self.event, buffer));
        self.context.bury();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves a consistent state.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
