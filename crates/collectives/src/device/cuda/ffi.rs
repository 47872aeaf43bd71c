//! The driver's functions, looked up by name, and host memory that it has allocated.
//!
//! Handles are integers as wide as a pointer, which is what they are in the calling convention.

use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::Arc;

use libloading::Library;

use super::{Context, DeviceError};
use crate::device::Pinned;

/// `CUDA_ERROR_NOT_READY`.
pub(super) const NOT_READY: c_int = 600;

/// `CU_MEMHOSTALLOC_PORTABLE`: pinned for all contexts. Not write-combined, which the processor reads very slowly.
const PORTABLE: c_uint = 1;

/// `CU_STREAM_NON_BLOCKING`: does not wait for the legacy default stream by itself.
const NON_BLOCKING: c_uint = 1;

/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: c_uint = 2;

macro_rules! functions {
    ($($name:ident($($argument:ty),*);)*) => {
        /// The functions, and the library that has them. It is never unloaded: the driver has threads of its own.
        #[allow(non_snake_case, reason = "these are CUDA's names")]
        pub(super) struct Driver {
            $($name: unsafe extern "C" fn($($argument),*) -> c_int,)*
            _library: ManuallyDrop<Library>,
        }

        impl Driver {
            fn look_up(library: Library) -> Result<Self, String> {
                Ok(Self {
                    $($name: {
                        let name = stringify!($name);
                        // SAFETY: the types are those of cuda.h; the library lives as long as the pointers.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> c_int>(name) };
                        *found.map_err(|_| format!("it has no {name}"))?
                    },)*
                    _library: ManuallyDrop::new(library),
                })
            }
        }
    };
}

functions! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGetName(*mut c_char, c_int, c_int);
    cuDeviceGetUuid(*mut [u8; 16], c_int);
    cuDevicePrimaryCtxRetain(*mut usize, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuCtxPushCurrent_v2(usize);
    cuCtxPopCurrent_v2(*mut usize);
    cuStreamCreate(*mut usize, c_uint);
    cuStreamSynchronize(usize);
    cuStreamWaitEvent(usize, usize, c_uint);
    cuEventCreate(*mut usize, c_uint);
    cuEventRecord(usize, usize);
    cuEventQuery(usize);
    cuEventSynchronize(usize);
    cuMemHostAlloc(*mut usize, usize, c_uint);
    cuMemFreeHost(usize);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemcpyDtoHAsync_v2(usize, u64, usize, usize);
    cuMemcpyHtoDAsync_v2(u64, usize, usize, usize);
    cuMemcpyDtoH_v2(usize, u64, usize);
    cuMemcpyHtoD_v2(u64, usize, usize);
    cuMemcpyDtoDAsync_v2(u64, u64, usize, usize);
    cuModuleLoadData(*mut usize, *const c_char);
    cuModuleGetFunction(*mut usize, usize, *const c_char);
    cuLaunchKernel(usize, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, usize, *mut *mut c_void, *mut *mut c_void);
    cuGetErrorName(c_int, *mut *const c_char);
}

/// The kernel that holds a stream, as a text that the driver compiles for its GPU, and its name there.
const HOLD: &CStr = match CStr::from_bytes_with_nul(concat!(include_str!("hold.ptx"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => panic!("the text has a zero byte"),
};
const HOLD_NAME: &CStr = c"paceline_hold";

/// The longest name of a device that is asked for, with its end.
const NAME_BYTES: usize = 128;

impl Driver {
    /// Loads the driver from a file, or by a name that the system knows.
    pub(super) fn load(file: &Path) -> Result<Self, String> {
        // SAFETY: what the driver does when it is loaded is what every program that uses CUDA has it do.
        let library = unsafe { Library::new(file) }.map_err(|error| in_words(file, &error))?;
        Self::look_up(library).map_err(|reason| format!("{} is no driver of CUDA: {reason}", file.display()))
    }

    pub(super) fn init(&self) -> Result<(), DeviceError> {
        // SAFETY: it may be called at any time.
        self.check("cuInit", unsafe { (self.cuInit)(0) })
    }

    pub(super) fn version(&self) -> Result<i32, DeviceError> {
        let mut version = 0;
        // SAFETY: the out-pointer is to a local.
        self.check("cuDriverGetVersion", unsafe { (self.cuDriverGetVersion)(&raw mut version) })?;
        Ok(version)
    }

    pub(super) fn device_count(&self) -> Result<i32, DeviceError> {
        let mut count = 0;
        // SAFETY: the out-pointer is to a local.
        self.check("cuDeviceGetCount", unsafe { (self.cuDeviceGetCount)(&raw mut count) })?;
        Ok(count)
    }

    /// The name of a device; in CUDA a device is its number.
    pub(super) fn device_name(&self, ordinal: i32) -> Result<String, DeviceError> {
        let mut name = [0u8; NAME_BYTES];
        // SAFETY: as many bytes may be written as the array has.
        let code = unsafe { (self.cuDeviceGetName)(name.as_mut_ptr().cast(), NAME_BYTES as c_int, ordinal) };
        self.check("cuDeviceGetName", code)?;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(NAME_BYTES);
        Ok(String::from_utf8_lossy(&name[..end]).into_owned())
    }

    /// A number that no two devices have in common: half of the UUID, which is random.
    pub(super) fn device_id(&self, ordinal: i32) -> Result<u64, DeviceError> {
        let mut uuid = [0; 16];
        // SAFETY: the out-pointer is to 16 bytes, which is CUDA's CUuuid.
        self.check("cuDeviceGetUuid", unsafe { (self.cuDeviceGetUuid)(&raw mut uuid, ordinal) })?;
        let [low, high] =
            [&uuid[..8], &uuid[8..]].map(|half| u64::from_le_bytes(half.try_into().expect("8 bytes")));
        // Parts of it are fixed by the format of UUIDs, in different places.
        Ok(low ^ high)
    }

    pub(super) fn alloc_device(&self, bytes: usize) -> Result<u64, DeviceError> {
        let mut address = 0;
        // SAFETY: the out-pointer is to a local.
        self.check("cuMemAlloc", unsafe { (self.cuMemAlloc_v2)(&raw mut address, bytes) })?;
        Ok(address)
    }

    pub(super) fn free_device(&self, address: u64) -> Result<(), DeviceError> {
        // SAFETY: the driver knows its allocations and refuses other addresses.
        self.check("cuMemFree", unsafe { (self.cuMemFree_v2)(address) })
    }

    pub(super) fn synchronize_stream(&self, stream: u64) -> Result<(), DeviceError> {
        // SAFETY: whoever made a stream's handle has promised that it lives.
        self.check("cuStreamSynchronize", unsafe { (self.cuStreamSynchronize)(stream as usize) })
    }

    pub(super) fn retain_primary_context(&self, ordinal: i32) -> Result<usize, DeviceError> {
        // SAFETY: the out-pointer is to a local.
        self.handle("cuDevicePrimaryCtxRetain", |out| unsafe {
            (self.cuDevicePrimaryCtxRetain)(out, ordinal)
        })
    }

    pub(super) fn release_primary_context(&self, ordinal: i32) -> Result<(), DeviceError> {
        // SAFETY: it was retained once for each release.
        let code = unsafe { (self.cuDevicePrimaryCtxRelease_v2)(ordinal) };
        self.check("cuDevicePrimaryCtxRelease", code)
    }

    pub(super) fn push_context(&self, context: usize) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as its owner lives, who calls this.
        self.check("cuCtxPushCurrent", unsafe { (self.cuCtxPushCurrent_v2)(context) })
    }

    pub(super) fn pop_context(&self) -> Result<(), DeviceError> {
        let mut popped = 0;
        // SAFETY: the out-pointer is to a local.
        self.check("cuCtxPopCurrent", unsafe { (self.cuCtxPopCurrent_v2)(&raw mut popped) })
    }

    pub(super) fn new_stream(&self) -> Result<usize, DeviceError> {
        // SAFETY: the out-pointer is to a local.
        self.handle("cuStreamCreate", |out| unsafe { (self.cuStreamCreate)(out, NON_BLOCKING) })
    }

    pub(super) fn new_event(&self) -> Result<usize, DeviceError> {
        // SAFETY: the out-pointer is to a local.
        self.handle("cuEventCreate", |out| unsafe { (self.cuEventCreate)(out, DISABLE_TIMING) })
    }

    pub(super) fn record(&self, event: usize, stream: u64) -> Result<(), DeviceError> {
        // SAFETY: events are never destroyed, and whoever made a stream's handle has promised that it lives.
        self.check("cuEventRecord", unsafe { (self.cuEventRecord)(event, stream as usize) })
    }

    pub(super) fn wait(&self, stream: u64, event: usize) -> Result<(), DeviceError> {
        // SAFETY: as for record.
        self.check("cuStreamWaitEvent", unsafe { (self.cuStreamWaitEvent)(stream as usize, event, 0) })
    }

    /// The result code of the question.
    pub(super) fn query(&self, event: usize) -> c_int {
        // SAFETY: events are never destroyed.
        unsafe { (self.cuEventQuery)(event) }
    }

    pub(super) fn synchronize(&self, event: usize) -> Result<(), DeviceError> {
        // SAFETY: events are never destroyed.
        self.check("cuEventSynchronize", unsafe { (self.cuEventSynchronize)(event) })
    }

    pub(super) fn alloc_host(&self, bytes: usize) -> Result<usize, DeviceError> {
        // SAFETY: the out-pointer is to a local.
        self.handle("cuMemHostAlloc", |out| unsafe { (self.cuMemHostAlloc)(out, bytes, PORTABLE) })
    }

    pub(super) fn copy_down(
        &self,
        to: usize,
        from: u64,
        bytes: usize,
        stream: u64,
    ) -> Result<(), DeviceError> {
        // SAFETY: whoever made the device buffer has promised that it is there; the host buffer belongs to the
        // transfer, which keeps it until the copy is done.
        let code = unsafe { (self.cuMemcpyDtoHAsync_v2)(to, from, bytes, stream as usize) };
        self.check("cuMemcpyDtoHAsync", code)
    }

    pub(super) fn copy_up(&self, to: u64, from: usize, bytes: usize, stream: u64) -> Result<(), DeviceError> {
        // SAFETY: as for copy_down.
        let code = unsafe { (self.cuMemcpyHtoDAsync_v2)(to, from, bytes, stream as usize) };
        self.check("cuMemcpyHtoDAsync", code)
    }

    /// Copies into memory of the caller's, and waits for that. Not ordered with any stream but the default one.
    pub(super) fn read(&self, to: &mut [u8], from: u64) -> Result<(), DeviceError> {
        // SAFETY: as many bytes may be written as the slice has; the driver checks addresses of its device.
        let code = unsafe { (self.cuMemcpyDtoH_v2)(to.as_mut_ptr() as usize, from, to.len()) };
        self.check("cuMemcpyDtoH", code)
    }

    /// Copies from memory of the caller's, and waits until the bytes are on the device.
    pub(super) fn write(&self, to: u64, from: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: the driver has read all of the slice when it returns, and checks addresses of its device.
        let code = unsafe { (self.cuMemcpyHtoD_v2)(to, from.as_ptr() as usize, from.len()) };
        self.check("cuMemcpyHtoD", code)?;
        // Of pageable memory it may return when it has made a copy of its own.
        self.synchronize_stream(0)
    }

    pub(super) fn copy_within(
        &self,
        to: u64,
        from: u64,
        bytes: usize,
        stream: u64,
    ) -> Result<(), DeviceError> {
        // SAFETY: as for copy_down, with both ends on the device.
        let code = unsafe { (self.cuMemcpyDtoDAsync_v2)(to, from, bytes, stream as usize) };
        self.check("cuMemcpyDtoDAsync", code)
    }

    /// Loads the kernel that holds a stream into the current context, which has it until it ends.
    pub(super) fn load_hold(&self) -> Result<usize, DeviceError> {
        // SAFETY: the text has an end; the out-pointer is to a local.
        let module =
            self.handle("cuModuleLoadData", |out| unsafe { (self.cuModuleLoadData)(out, HOLD.as_ptr()) })?;
        // SAFETY: the module has just been loaded and is never unloaded; the name has an end.
        self.handle("cuModuleGetFunction", |out| unsafe {
            (self.cuModuleGetFunction)(out, module, HOLD_NAME.as_ptr())
        })
    }

    /// Enqueues that kernel.
    pub(super) fn hold(&self, kernel: usize, nanoseconds: u64, stream: u64) -> Result<(), DeviceError> {
        let mut parameters = [(&raw const nanoseconds).cast_mut().cast::<c_void>()];
        let (stream, no_more) = (stream as usize, std::ptr::null_mut());
        // SAFETY: the kernel takes one parameter of 8 bytes, which the driver copies in the call; one thread runs it, which
        // touches no memory.
        let code = unsafe {
            (self.cuLaunchKernel)(kernel, 1, 1, 1, 1, 1, 1, 0, stream, parameters.as_mut_ptr(), no_more)
        };
        self.check("cuLaunchKernel", code)
    }

    fn handle(
        &self,
        call: &'static str,
        make: impl FnOnce(*mut usize) -> c_int,
    ) -> Result<usize, DeviceError> {
        let mut handle = 0;
        let code = make(&raw mut handle);
        self.check(call, code)?;
        Ok(handle)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        if code == 0 { Ok(()) } else { Err(self.error(call, code)) }
    }

    /// What a code means, in CUDA's words.
    pub(super) fn error(&self, call: &'static str, code: c_int) -> DeviceError {
        let mut name = std::ptr::null();
        // SAFETY: the out-pointer is to a local; a code that it does not know leaves it null.
        let known = unsafe { (self.cuGetErrorName)(code, &raw mut name) } == 0 && !name.is_null();
        // SAFETY: names are texts that live as long as the driver.
        let name = known.then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
        DeviceError { call, reason: format!("{} ({code})", name.as_deref().unwrap_or("an unknown code")) }
    }
}

/// Why a library cannot be loaded: the loader's words are in the error's source.
fn in_words(file: &Path, error: &libloading::Error) -> String {
    match error.source() {
        Some(source) => source.to_string(),
        None => format!("{}: {error}", file.display()),
    }
}

/// Host memory of the driver's.
pub(super) struct HostMemory {
    address: usize,
    bytes: usize,
    context: Arc<Context>,
}

impl HostMemory {
    /// Memory that `alloc_host` has returned, with this size.
    pub(super) fn new(address: usize, bytes: usize, context: Arc<Context>) -> Self {
        // SAFETY: the driver has just allocated as many bytes, and nobody else knows them. They have no values yet.
        unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes) };
        Self { address, bytes, context }
    }
}

impl Pinned for HostMemory {
    fn bytes(&self) -> &[u8] {
        // SAFETY: the driver has allocated as many bytes, `new` has zeroed them, and our drop alone frees them; copies
        // to and from them own the buffer while they are under way, so nobody has this reference then.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: it was allocated by this driver, and nothing uses it any more.
        let freed = self
            .context
            .current(|driver| driver.check("cuMemFreeHost", unsafe { (driver.cuMemFreeHost)(self.address) }));
        if let Err(error) = freed {
            tracing::debug!(%error, "the driver does not take pinned memory back");
        }
    }
}
