//! The table of version 8, which NCCL 2.20 to 2.27 use.

use std::ffi::{c_int, c_void};
use std::ptr;

use crate::abi::{Logger, NET_DEVICE_HOST, NetV8, PTR_HOST, PropertiesV8, ResultCode};
use crate::calls::{self, call};
use crate::message::GROUP_LIMIT;
use crate::{log, plugin};

/// More connections than a process can have descriptors for.
pub(crate) const COMMS_LIMIT: c_int = 65_536;

/// What NCCL looks up.
#[allow(non_upper_case_globals, reason = "NCCL's name")]
// SAFETY: no other library has a reason to use this name; it is NCCL's for exactly this.
#[unsafe(no_mangle)]
pub static ncclNetPlugin_v8: NetV8 = NetV8 {
    name: c"Paceline".as_ptr(),
    init,
    devices: calls::devices,
    get_properties,
    listen,
    connect,
    accept: calls::accept,
    reg_mr: calls::reg_mr,
    reg_mr_dma_buf: calls::reg_mr_dma_buf,
    dereg_mr: calls::dereg_mr,
    isend,
    irecv,
    iflush: calls::iflush,
    test: calls::test,
    close_send: calls::close_send,
    close_recv: calls::close_recv,
    close_listen: calls::close_listen,
    get_device_mr: None,
    irecv_consumed: None,
};

extern "C" fn init(logger: Option<Logger>) -> ResultCode {
    call("init", || {
        log::set(logger);
        plugin::start().map(drop)
    })
}

unsafe extern "C" fn get_properties(number: c_int, place: *mut PropertiesV8) -> ResultCode {
    call("getProperties", || {
        calls::device(number, |device| {
            let properties = PropertiesV8 {
                name: device.name.as_ptr(),
                pci_path: device.pci_path.as_ref().map_or(ptr::null(), |path| path.as_ptr()),
                guid: number as u64,
                ptr_support: PTR_HOST,
                reg_is_global: 0,
                speed: device.speed,
                port: 0,
                latency: 0.0,
                max_comms: COMMS_LIMIT,
                max_recvs: GROUP_LIMIT as c_int,
                net_device_type: NET_DEVICE_HOST,
                net_device_version: 0,
            };
            // SAFETY: NCCL passes a place for its properties.
            unsafe { calls::put(place, properties) }
        })
    })
}

unsafe extern "C" fn listen(device: c_int, handle: *mut c_void, comm: *mut *mut c_void) -> ResultCode {
    // SAFETY: NCCL passes a handle and a place for a pointer.
    call("listen", || unsafe { calls::listen(device, handle, comm) })
}

unsafe extern "C" fn connect(
    device: c_int,
    handle: *mut c_void,
    comm: *mut *mut c_void,
    device_comm: *mut *mut c_void,
) -> ResultCode {
    // SAFETY: NCCL passes a handle and places for pointers.
    call("connect", || unsafe { calls::connect(device, handle, comm, device_comm) })
}

unsafe extern "C" fn isend(
    comm: *mut c_void,
    data: *mut c_void,
    size: c_int,
    tag: c_int,
    _handle: *mut c_void,
    request: *mut *mut c_void,
) -> ResultCode {
    // SAFETY: NCCL keeps the bytes until the request is done, and passes a place for a pointer.
    call("isend", || unsafe { calls::isend(comm, data, calls::size(size)?, tag, request) })
}

unsafe extern "C" fn irecv(
    comm: *mut c_void,
    count: c_int,
    data: *mut *mut c_void,
    sizes: *mut c_int,
    tags: *mut c_int,
    _handles: *mut *mut c_void,
    request: *mut *mut c_void,
) -> ResultCode {
    // SAFETY: NCCL's arrays have `count` elements.
    let size_of = |at| calls::size(unsafe { calls::element(sizes, at)? });
    // SAFETY: as above; NCCL keeps the buffers until the request is done, and passes a place for a pointer.
    call("irecv", || unsafe { calls::irecv(comm, count, data, size_of, tags, request) })
}
