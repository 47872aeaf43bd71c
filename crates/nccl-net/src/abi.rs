//! NCCL's interface for network plugins, versions 8 and 11, as NCCL 2.20 to 2.32 look it up.
//!
//! Names and layouts are NCCL's (`net_v8.h`, `net_v11.h`); what each function must do is told there. Only what a plugin
//! without device memory needs has a type of its own, all else is an untyped pointer.

use std::ffi::{c_char, c_float, c_int, c_ulong, c_void};

/// `ncclResult_t`.
pub type ResultCode = c_int;
/// `ncclSuccess`.
pub const SUCCESS: ResultCode = 0;
/// `ncclSystemError`.
pub const SYSTEM_ERROR: ResultCode = 2;
/// `ncclInternalError`.
pub const INTERNAL_ERROR: ResultCode = 3;
/// `ncclInvalidArgument`.
pub const INVALID_ARGUMENT: ResultCode = 4;
/// `ncclInvalidUsage`.
pub const INVALID_USAGE: ResultCode = 5;
/// `ncclRemoteError`.
pub const REMOTE_ERROR: ResultCode = 6;

/// `NCCL_NET_HANDLE_MAXSIZE`, in bytes.
pub const HANDLE_BYTES: usize = 128;
/// `NCCL_PTR_HOST`: memory that the processor can reach.
pub const PTR_HOST: c_int = 1;
/// `NCCL_PTR_CUDA`: memory of a device.
pub const PTR_CUDA: c_int = 2;
/// `NCCL_LOG_WARN`.
pub const LOG_WARN: c_int = 2;
/// `NCCL_LOG_INFO`.
pub const LOG_INFO: c_int = 3;
/// `NCCL_INIT | NCCL_NET`: which of NCCL's subsystems a line belongs to.
pub const SUBSYSTEMS: c_ulong = 0x1 | 0x10;
/// `NCCL_NET_DEVICE_HOST`: nothing is offloaded to a device.
pub const NET_DEVICE_HOST: c_int = 0;
/// `MAX_NET_SIZE`: the longest message, in bytes, that NCCL has plugins of version 8 carry.
pub const MESSAGE_LIMIT: usize = 1024 * 1024 * 1024;

/// `ncclDebugLogger_t`: level, subsystems, file, line, a format of printf and what belongs to it.
pub type Logger = unsafe extern "C" fn(c_int, c_ulong, *const c_char, c_int, *const c_char, ...);

/// `ncclNetProperties_v8_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "NCCL's names, told in its header")]
pub struct PropertiesV8 {
    pub name: *const c_char,
    pub pci_path: *const c_char,
    pub guid: u64,
    pub ptr_support: c_int,
    pub reg_is_global: c_int,
    /// In Mbit/s.
    pub speed: c_int,
    pub port: c_int,
    /// In µs.
    pub latency: c_float,
    pub max_comms: c_int,
    pub max_recvs: c_int,
    pub net_device_type: c_int,
    pub net_device_version: c_int,
}

/// `ncclNetProperties_v11_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "NCCL's names, told in its header")]
pub struct PropertiesV11 {
    pub name: *const c_char,
    pub pci_path: *const c_char,
    pub guid: u64,
    pub ptr_support: c_int,
    pub reg_is_global: c_int,
    pub force_flush: c_int,
    /// In Mbit/s.
    pub speed: c_int,
    pub port: c_int,
    /// In µs.
    pub latency: c_float,
    pub max_comms: c_int,
    pub max_recvs: c_int,
    pub net_device_type: c_int,
    pub net_device_version: c_int,
    pub v_props: VirtualDevice,
    pub max_p2p_bytes: usize,
    pub max_coll_bytes: usize,
    pub max_multi_request_size: c_int,
}

/// `ncclNetVDeviceProps_v11_t`: of which devices one consists.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "NCCL's names, told in its header")]
pub struct VirtualDevice {
    pub ndevs: c_int,
    pub devs: [c_int; 4],
}

type Pointers = *mut *mut c_void;

/// `ncclNet_v8_t`.
#[repr(C)]
#[derive(Debug)]
#[allow(missing_docs, reason = "NCCL's names, told in its header")]
pub struct NetV8 {
    pub name: *const c_char,
    pub init: unsafe extern "C" fn(Option<Logger>) -> ResultCode,
    pub devices: unsafe extern "C" fn(*mut c_int) -> ResultCode,
    pub get_properties: unsafe extern "C" fn(c_int, *mut PropertiesV8) -> ResultCode,
    pub listen: unsafe extern "C" fn(c_int, *mut c_void, Pointers) -> ResultCode,
    pub connect: unsafe extern "C" fn(c_int, *mut c_void, Pointers, Pointers) -> ResultCode,
    pub accept: unsafe extern "C" fn(*mut c_void, Pointers, Pointers) -> ResultCode,
    pub reg_mr: unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, Pointers) -> ResultCode,
    pub reg_mr_dma_buf:
        unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, u64, c_int, Pointers) -> ResultCode,
    pub dereg_mr: unsafe extern "C" fn(*mut c_void, *mut c_void) -> ResultCode,
    pub isend:
        unsafe extern "C" fn(*mut c_void, *mut c_void, c_int, c_int, *mut c_void, Pointers) -> ResultCode,
    pub irecv: unsafe extern "C" fn(
        *mut c_void,
        c_int,
        Pointers,
        *mut c_int,
        *mut c_int,
        Pointers,
        Pointers,
    ) -> ResultCode,
    pub iflush:
        unsafe extern "C" fn(*mut c_void, c_int, Pointers, *mut c_int, Pointers, Pointers) -> ResultCode,
    pub test: unsafe extern "C" fn(*mut c_void, *mut c_int, *mut c_int) -> ResultCode,
    pub close_send: unsafe extern "C" fn(*mut c_void) -> ResultCode,
    pub close_recv: unsafe extern "C" fn(*mut c_void) -> ResultCode,
    pub close_listen: unsafe extern "C" fn(*mut c_void) -> ResultCode,
    /// For offload to a device; there is none.
    pub get_device_mr: Option<unsafe extern "C" fn(*mut c_void, *mut c_void, Pointers) -> ResultCode>,
    /// For offload to a device; there is none.
    pub irecv_consumed: Option<unsafe extern "C" fn(*mut c_void, c_int, *mut c_void) -> ResultCode>,
}

/// `ncclNet_v11_t`.
#[repr(C)]
#[derive(Debug)]
#[allow(missing_docs, reason = "NCCL's names, told in its header")]
pub struct NetV11 {
    pub name: *const c_char,
    /// The context, the communicator's number, its configuration, the logger, the profiler's callback.
    pub init: unsafe extern "C" fn(Pointers, u64, *mut c_void, Option<Logger>, *mut c_void) -> ResultCode,
    pub devices: unsafe extern "C" fn(*mut c_int) -> ResultCode,
    pub get_properties: unsafe extern "C" fn(c_int, *mut PropertiesV11) -> ResultCode,
    pub listen: unsafe extern "C" fn(*mut c_void, c_int, *mut c_void, Pointers) -> ResultCode,
    pub connect: unsafe extern "C" fn(*mut c_void, c_int, *mut c_void, Pointers, Pointers) -> ResultCode,
    pub accept: unsafe extern "C" fn(*mut c_void, Pointers, Pointers) -> ResultCode,
    pub reg_mr: unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, Pointers) -> ResultCode,
    pub reg_mr_dma_buf:
        unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, u64, c_int, Pointers) -> ResultCode,
    pub dereg_mr: unsafe extern "C" fn(*mut c_void, *mut c_void) -> ResultCode,
    pub isend: unsafe extern "C" fn(
        *mut c_void,
        *mut c_void,
        usize,
        c_int,
        *mut c_void,
        *mut c_void,
        Pointers,
    ) -> ResultCode,
    pub irecv: unsafe extern "C" fn(
        *mut c_void,
        c_int,
        Pointers,
        *mut usize,
        *mut c_int,
        Pointers,
        Pointers,
        Pointers,
    ) -> ResultCode,
    pub iflush:
        unsafe extern "C" fn(*mut c_void, c_int, Pointers, *mut c_int, Pointers, Pointers) -> ResultCode,
    pub test: unsafe extern "C" fn(*mut c_void, *mut c_int, *mut c_int) -> ResultCode,
    pub close_send: unsafe extern "C" fn(*mut c_void) -> ResultCode,
    pub close_recv: unsafe extern "C" fn(*mut c_void) -> ResultCode,
    pub close_listen: unsafe extern "C" fn(*mut c_void) -> ResultCode,
    /// For offload to a device; there is none.
    pub get_device_mr: Option<unsafe extern "C" fn(*mut c_void, *mut c_void, Pointers) -> ResultCode>,
    /// For offload to a device; there is none.
    pub irecv_consumed: Option<unsafe extern "C" fn(*mut c_void, c_int, *mut c_void) -> ResultCode>,
    /// Makes one device of several. NCCL does without where there is none, as in version 8.
    pub make_v_device: Option<unsafe extern "C" fn(*mut c_int, *mut VirtualDevice) -> ResultCode>,
    pub finalize: unsafe extern "C" fn(*mut c_void) -> ResultCode,
    pub set_net_attr: unsafe extern "C" fn(*mut c_void, *mut c_void) -> ResultCode,
}

// SAFETY: the tables are constants: addresses of functions and of a text that live as long as the library.
unsafe impl Sync for NetV8 {}
// SAFETY: as above.
unsafe impl Sync for NetV11 {}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn layouts_are_those_of_nccls_headers() {
        // Computed from net_v8.h and net_v11.h by the rules of C on 64 bits.
        assert_eq!((size_of::<NetV8>(), size_of::<NetV11>()), (19 * 8, 22 * 8));
        assert_eq!((offset_of!(NetV8, test), offset_of!(NetV8, irecv_consumed)), (13 * 8, 18 * 8));
        assert_eq!((offset_of!(NetV11, test), offset_of!(NetV11, set_net_attr)), (13 * 8, 21 * 8));
        assert_eq!((size_of::<PropertiesV8>(), size_of::<PropertiesV11>()), (64, 112));
        assert_eq!(offset_of!(PropertiesV8, latency), 40);
        assert_eq!((offset_of!(PropertiesV11, latency), offset_of!(PropertiesV11, v_props)), (44, 64));
        assert_eq!(offset_of!(PropertiesV11, max_p2p_bytes), 88);
        assert_eq!(offset_of!(PropertiesV11, max_multi_request_size), 104);
    }
}
