//! The table of version 11, which NCCL uses from 2.28 on.

use std::ffi::{c_int, c_void};
use std::ptr;

use crate::abi::{
    Logger, MESSAGE_LIMIT, NET_DEVICE_HOST, NetV11, PTR_HOST, PropertiesV11, ResultCode, SUCCESS,
    VirtualDevice,
};
use crate::calls::{self, call};
use crate::failure::Failure;
use crate::message::GROUP_LIMIT;
use crate::v8::COMMS_LIMIT;
use crate::{comms, log, plugin};

/// What NCCL looks up.
#[allow(non_upper_case_globals, reason = "NCCL's name")]
// SAFETY: no other library has a reason to use this name; it is NCCL's for exactly this.
#[unsafe(no_mangle)]
pub static ncclNetPlugin_v11: NetV11 = NetV11 {
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
    // Interfaces stay devices of their own, among which NCCL shares its channels out.
    make_v_device: None,
    finalize,
    set_net_attr,
};

/// What NCCL is given for a context: all of them are one, the process's.
const CONTEXT: u32 = 1;

unsafe extern "C" fn init(
    context: *mut *mut c_void,
    _communicator: u64,
    _config: *mut c_void,
    logger: Option<Logger>,
    _profiler: *mut c_void,
) -> ResultCode {
    call("init", || {
        log::set(logger);
        plugin::start()?;
        // SAFETY: NCCL passes a place for a pointer.
        unsafe { calls::put(context, comms::pointer(CONTEXT)) }
    })
}

/// The plugin stays: the next communicator needs it again.
extern "C" fn finalize(_context: *mut c_void) -> ResultCode {
    SUCCESS
}

/// Hints about the operations to come, which change nothing here.
extern "C" fn set_net_attr(_context: *mut c_void, _attributes: *mut c_void) -> ResultCode {
    SUCCESS
}

unsafe extern "C" fn get_properties(number: c_int, place: *mut PropertiesV11) -> ResultCode {
    call("getProperties", || {
        calls::device(number, |device| {
            let properties = PropertiesV11 {
                name: device.name.as_ptr(),
                pci_path: device.pci_path.as_ref().map_or(ptr::null(), |path| path.as_ptr()),
                guid: number as u64,
                ptr_support: PTR_HOST,
                reg_is_global: 0,
                force_flush: 0,
                speed: device.speed,
                port: 0,
                latency: 0.0,
                max_comms: COMMS_LIMIT,
                max_recvs: GROUP_LIMIT as c_int,
                net_device_type: NET_DEVICE_HOST,
                net_device_version: 0,
                v_props: VirtualDevice { ndevs: 1, devs: [number, 0, 0, 0] },
                max_p2p_bytes: MESSAGE_LIMIT,
                max_coll_bytes: MESSAGE_LIMIT,
                max_multi_request_size: 1,
            };
            // SAFETY: NCCL passes a place for its properties.
            unsafe { calls::put(place, properties) }
        })
    })
}

unsafe extern "C" fn listen(
    _context: *mut c_void,
    device: c_int,
    handle: *mut c_void,
    comm: *mut *mut c_void,
) -> ResultCode {
    // SAFETY: NCCL passes a handle and a place for a pointer.
    call("listen", || unsafe { calls::listen(device, handle, comm) })
}

unsafe extern "C" fn connect(
    _context: *mut c_void,
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
    size: usize,
    tag: c_int,
    _handle: *mut c_void,
    _profiled: *mut c_void,
    request: *mut *mut c_void,
) -> ResultCode {
    // SAFETY: NCCL keeps the bytes until the request is done, and passes a place for a pointer.
    call("isend", || unsafe { calls::isend(comm, data, limited(size)?, tag, request) })
}

unsafe extern "C" fn irecv(
    comm: *mut c_void,
    count: c_int,
    data: *mut *mut c_void,
    sizes: *mut usize,
    tags: *mut c_int,
    _handles: *mut *mut c_void,
    _profiled: *mut *mut c_void,
    request: *mut *mut c_void,
) -> ResultCode {
    // SAFETY: NCCL's arrays have `count` elements.
    let size_of = |at| limited(unsafe { calls::element(sizes, at)? });
    // SAFETY: as above; NCCL keeps the buffers until the request is done, and passes a place for a pointer.
    call("irecv", || unsafe { calls::irecv(comm, count, data, size_of, tags, request) })
}

/// A size within what the properties say.
fn limited(size: usize) -> Result<usize, Failure> {
    if size > MESSAGE_LIMIT {
        return Err(Failure::argument(format!("a message of {size} bytes; {MESSAGE_LIMIT} is the most")));
    }
    Ok(size)
}
