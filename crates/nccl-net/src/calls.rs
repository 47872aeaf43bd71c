//! What both versions of the table do with NCCL's arguments.
//!
//! Everything that is `unsafe` about the interface is here and in [`memory`](crate::memory): pointers to results, arrays
//! and handles. NCCL's contract, which its headers tell, is the reason in each case: pointers to results are valid for
//! one write, arrays have as many elements as the call says, a handle is [`HANDLE_BYTES`] bytes that can be read and
//! written.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::abi::{HANDLE_BYTES, INTERNAL_ERROR, MESSAGE_LIMIT, PTR_HOST, ResultCode, SUCCESS};
use crate::comms::{self, Comm, DIAL_LIMIT, Dialling};
use crate::failure::Failure;
use crate::handle::{self, Handle};
use crate::memory::{Sink, Source};
use crate::message::GROUP_LIMIT;
use crate::plugin;
use crate::receiver::{Receiver, Room};
use crate::sender::Sender;
use crate::{log, plugin::Device};

/// What `regMr` gives: there is nothing to register.
const REGISTERED: u32 = 1;

/// Runs a call: its failure in NCCL's log and as a code. A panic ends here.
pub fn call(name: &str, act: impl FnOnce() -> Result<(), Failure>) -> ResultCode {
    match catch_unwind(AssertUnwindSafe(act)) {
        Ok(Ok(())) => SUCCESS,
        Ok(Err(Failure { code, reason })) => {
            if let Some(reason) = reason {
                log::warn(&format!("{name}: {reason}"));
            }
            code
        }
        Err(_) => {
            // Logging could be what panics.
            let _ = catch_unwind(|| log::warn(&format!("{name} has panicked, a defect of Paceline")));
            INTERNAL_ERROR
        }
    }
}

/// Writes a result.
///
/// # Errors
/// That there is no place for it.
///
/// # Safety
/// `place` is null or valid for a write.
pub unsafe fn put<T>(place: *mut T, value: T) -> Result<(), Failure> {
    if place.is_null() {
        return Err(Failure::argument("no place for the result"));
    }
    // SAFETY: not null, and the caller's promise.
    unsafe { place.write(value) };
    Ok(())
}

/// An element of an array of NCCL's.
///
/// # Errors
/// That there is no array.
///
/// # Safety
/// `array` is null or has more than `at` elements.
pub unsafe fn element<T: Copy>(array: *const T, at: usize) -> Result<T, Failure> {
    if array.is_null() {
        return Err(Failure::argument("an array is missing"));
    }
    // SAFETY: not null, and the caller's promise.
    Ok(unsafe { array.add(at).read() })
}

/// Fills in how many devices there are.
///
/// # Safety
/// `count` is null or valid for a write.
pub unsafe extern "C" fn devices(count: *mut c_int) -> ResultCode {
    call("devices", || {
        let devices = plugin::get()?.devices.len();
        // SAFETY: the caller's promise.
        unsafe { put(count, devices as c_int) }
    })
}

/// The device of a number, for its properties. It lives as long as the process.
pub fn device(number: c_int, use_it: impl FnOnce(&Device) -> Result<(), Failure>) -> Result<(), Failure> {
    use_it(plugin::get()?.device(number)?)
}

/// Listens: writes the handle and the object.
///
/// # Safety
/// `handle` is null or a handle to write, `listen_comm` null or valid for a write.
pub unsafe fn listen(
    device: c_int,
    handle: *mut c_void,
    listen_comm: *mut *mut c_void,
) -> Result<(), Failure> {
    let plugin = plugin::get()?;
    let port = &plugin.device(device)?.port;
    let listener = port.listen().map_err(|error| Failure::system(error.to_string()))?;
    let bytes = Handle {
        fabric: plugin.fabric,
        addr: port.local_addr(),
        listener: listener.number(),
        member: plugin.member.clone(),
    };
    // SAFETY: the caller's promise, for both.
    unsafe { put(handle.cast::<[u8; HANDLE_BYTES]>(), bytes.to_bytes())? };
    if listen_comm.is_null() {
        return Err(Failure::argument("no place for the listener"));
    }
    let number = comms::insert(Comm::Listening(listener))?;
    // SAFETY: as above.
    unsafe { put(listen_comm, comms::pointer(number)) }
}

/// Dials the listener of a handle, or looks how that goes: null until there is a connection.
///
/// # Safety
/// `handle` is null or a handle, the other two are null or valid for a write.
pub unsafe fn connect(
    device: c_int,
    handle: *mut c_void,
    send_comm: *mut *mut c_void,
    send_dev_comm: *mut *mut c_void,
) -> Result<(), Failure> {
    let handle = handle.cast::<[u8; HANDLE_BYTES]>();
    // SAFETY: the caller's promise, for each of them.
    let mut bytes = unsafe {
        put(send_comm, std::ptr::null_mut())?;
        no_device_comm(send_dev_comm);
        element(handle, 0)?
    };
    let to =
        Handle::from_bytes(&bytes).map_err(|reason| Failure::argument(format!("a bad handle: {reason}")))?;
    if handle::attempt(&bytes) == 0 {
        handle::set_attempt(&mut bytes, dial(device, &to)?);
        // SAFETY: as above.
        unsafe { put(handle, bytes)? };
    }
    let attempt = handle::attempt(&bytes);
    let link = comms::with(attempt, as_dialling, |dialling| dialling.take(to.listener));
    if let Ok(None) = link {
        return Ok(());
    }
    handle::set_attempt(&mut bytes, 0);
    // SAFETY: as above.
    unsafe { put(handle, bytes)? };
    if let Some(sender) = link? {
        comms::remove(attempt, |comm| matches!(comm, Comm::Dialling(_)))?;
        let number = comms::insert(Comm::Sending(Box::new(sender)))?;
        // SAFETY: as above.
        unsafe { put(send_comm, comms::pointer(number))? };
    }
    Ok(())
}

fn dial(device: c_int, to: &Handle) -> Result<u32, Failure> {
    let plugin = plugin::get()?;
    if to.fabric != plugin.fabric {
        let (theirs, ours) = (to.fabric, plugin.fabric);
        let reason = format!("{} is reached over {theirs} and this rank has {ours}", to.member);
        return Err(Failure::usage(format!("{reason}; PACELINE_FABRIC must be the same on all ranks")));
    }
    let port = &plugin.device(device)?.port;
    let forming = port.dial(to.addr, &to.member, to.listener, Instant::now() + DIAL_LIMIT);
    let peer = format!("{} at {}", to.member, to.addr);
    comms::insert(Comm::Dialling(Dialling::new(forming, to.listener, peer)))
}

/// Takes a connection that was made: null while there is none.
///
/// # Safety
/// All but the first are null or valid for a write.
pub unsafe extern "C" fn accept(
    listen_comm: *mut c_void,
    recv_comm: *mut *mut c_void,
    recv_dev_comm: *mut *mut c_void,
) -> ResultCode {
    call("accept", || {
        // SAFETY: the caller's promise, for both.
        unsafe {
            put(recv_comm, std::ptr::null_mut())?;
            no_device_comm(recv_dev_comm);
        }
        let taken = comms::with(comms::number(listen_comm), as_listening, |listener| Ok(listener.take()))?;
        let Some((member, transport)) = taken else { return Ok(()) };
        let peer = format!("{} at {}", member.name, member.addr);
        let number = comms::insert(Comm::Receiving(Receiver::new(transport, peer)))?;
        // SAFETY: as above.
        unsafe { put(recv_comm, comms::pointer(number)) }
    })
}

/// # Safety
/// `place` is null or valid for a write.
unsafe fn no_device_comm(place: *mut *mut c_void) {
    // NCCL of some versions passes null where it wants no offload.
    // SAFETY: the caller's promise.
    let _ = unsafe { put(place, std::ptr::null_mut()) };
}

/// Takes note that memory will be used: there is nothing to register, but it must be the host's.
///
/// # Safety
/// `handle` is null or valid for a write.
pub unsafe extern "C" fn reg_mr(
    _comm: *mut c_void,
    _data: *mut c_void,
    _size: usize,
    kind: c_int,
    handle: *mut *mut c_void,
) -> ResultCode {
    call("regMr", || {
        if kind != PTR_HOST {
            return Err(Failure::usage(format!(
                "memory of kind {kind}; this network takes the host's alone"
            )));
        }
        // SAFETY: the caller's promise.
        unsafe { put(handle, comms::pointer(REGISTERED)) }
    })
}

/// Refuses: there is no device memory here.
pub extern "C" fn reg_mr_dma_buf(
    _comm: *mut c_void,
    _data: *mut c_void,
    _size: usize,
    _kind: c_int,
    _offset: u64,
    _descriptor: c_int,
    _handle: *mut *mut c_void,
) -> ResultCode {
    call("regMrDmaBuf", || Err(Failure::usage("this network takes the host's memory alone")))
}

/// Nothing was registered.
pub extern "C" fn dereg_mr(_comm: *mut c_void, _handle: *mut c_void) -> ResultCode {
    SUCCESS
}

/// Sends: a request, or null when there is no room for the message now.
///
/// # Safety
/// `data` has `size` bytes that stay as they are until the request is done or the connection closed; `request` is null or
/// valid for a write.
pub unsafe fn isend(
    send_comm: *mut c_void,
    data: *mut c_void,
    size: usize,
    tag: c_int,
    request: *mut *mut c_void,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { put(request, std::ptr::null_mut())? };
    // SAFETY: the caller's promise; the sender drops it before it says that the request is done, and when it is closed.
    let source = unsafe { Source::new(data.cast(), size)? };
    let comm = comms::number(send_comm);
    let sent = comms::with(comm, as_sending, |sender| sender.send(tag, source))?;
    // SAFETY: the caller's promise.
    unsafe { put(request, comms::request_pointer(comm, sent)) }
}

/// Receives into `count` buffers: a request, or null when there are too many now. `size_of` tells the size of each.
///
/// # Safety
/// The arrays have `count` elements; each buffer is as large as its size, and nobody else's until the request is done or
/// the connection closed; `request` is null or valid for a write.
pub unsafe fn irecv(
    recv_comm: *mut c_void,
    count: c_int,
    data: *const *mut c_void,
    size_of: impl Fn(usize) -> Result<usize, Failure>,
    tags: *const c_int,
    request: *mut *mut c_void,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { put(request, std::ptr::null_mut())? };
    let count = usize::try_from(count).ok().filter(|count| (1..=GROUP_LIMIT).contains(count));
    let count = count
        .ok_or_else(|| Failure::argument(format!("a receive of another number than 1 to {GROUP_LIMIT}")))?;
    let room = |at: usize| {
        // SAFETY: the caller's promise; the receiver drops it before it says that the request is done, and when it is
        // closed.
        let (sink, tag) =
            unsafe { (Sink::new(element(data, at)?.cast(), size_of(at)?)?, element(tags, at)?) };
        Ok(Room { tag, sink })
    };
    let rooms = (0..count).map(room).collect::<Result<_, Failure>>()?;
    let comm = comms::number(recv_comm);
    let received = comms::with(comm, as_receiving, |receiver| receiver.receive(rooms))?;
    // SAFETY: the caller's promise.
    unsafe { put(request, comms::request_pointer(comm, received)) }
}

/// Nothing to flush: what is received is in the host's memory.
///
/// # Safety
/// `request` is null or valid for a write.
pub unsafe extern "C" fn iflush(
    _recv_comm: *mut c_void,
    _count: c_int,
    _data: *mut *mut c_void,
    _sizes: *mut c_int,
    _handles: *mut *mut c_void,
    request: *mut *mut c_void,
) -> ResultCode {
    // SAFETY: the caller's promise.
    call("iflush", || unsafe { put(request, std::ptr::null_mut()) })
}

/// Moves bytes, and says whether a request is done, and then how many bytes each of its buffers has.
///
/// # Safety
/// `done` is null or valid for a write, `sizes` is null or has an element for each buffer of the request.
pub unsafe extern "C" fn test(request: *mut c_void, done: *mut c_int, sizes: *mut c_int) -> ResultCode {
    call("test", || {
        // SAFETY: the caller's promise.
        unsafe { put(done, 0)? };
        let (comm, number) = comms::request(request);
        let Some(got) = comms::with(comm, |comm| Some(comm), |comm| progress(comm, number))? else {
            return Ok(());
        };
        for (at, size) in got.into_iter().enumerate().filter(|_| !sizes.is_null()) {
            // SAFETY: not null, and the caller's promise. What is larger than NCCL can be told was refused by it before.
            unsafe { sizes.add(at).write(c_int::try_from(size).unwrap_or(c_int::MAX)) };
        }
        // SAFETY: the caller's promise.
        unsafe { put(done, 1) }
    })
}

fn progress(comm: &mut Comm, request: u32) -> Result<Option<Vec<usize>>, Failure> {
    match comm {
        Comm::Sending(sender) => Ok(sender.test(request)?.map(|size| vec![size])),
        Comm::Receiving(receiver) => receiver.test(request),
        _ => Err(Failure::argument("test of something that is no request")),
    }
}

/// Closes the sending end.
pub extern "C" fn close_send(comm: *mut c_void) -> ResultCode {
    call("closeSend", || close(comm, |comm| matches!(comm, Comm::Sending(_))))
}

/// Closes the receiving end.
pub extern "C" fn close_recv(comm: *mut c_void) -> ResultCode {
    call("closeRecv", || close(comm, |comm| matches!(comm, Comm::Receiving(_))))
}

/// Listens no more.
pub extern "C" fn close_listen(comm: *mut c_void) -> ResultCode {
    call("closeListen", || close(comm, |comm| matches!(comm, Comm::Listening(_))))
}

fn close(comm: *mut c_void, wanted: impl FnOnce(&Comm) -> bool) -> Result<(), Failure> {
    comms::close(comms::remove(comms::number(comm), wanted)?);
    Ok(())
}

/// A size that NCCL says as a signed number.
///
/// # Errors
/// That it is none.
pub fn size(of: c_int) -> Result<usize, Failure> {
    let size = usize::try_from(of).ok().filter(|&size| size <= MESSAGE_LIMIT);
    size.ok_or_else(|| Failure::argument(format!("a message of {of} bytes")))
}

fn as_listening(comm: &mut Comm) -> Option<&mut paceline_transport::pair::Listener> {
    if let Comm::Listening(listener) = comm { Some(listener) } else { None }
}

fn as_dialling(comm: &mut Comm) -> Option<&mut Dialling> {
    if let Comm::Dialling(dialling) = comm { Some(dialling) } else { None }
}

fn as_sending(comm: &mut Comm) -> Option<&mut Box<Sender>> {
    if let Comm::Sending(sender) = comm { Some(sender) } else { None }
}

fn as_receiving(comm: &mut Comm) -> Option<&mut Receiver> {
    if let Comm::Receiving(receiver) = comm { Some(receiver) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::REMOTE_ERROR;

    #[test]
    fn a_panic_becomes_an_internal_error_and_a_failure_its_code() {
        assert_eq!(call("test", || panic!("on purpose")), INTERNAL_ERROR);
        assert_eq!(call("test", || Err(Failure::remote("gone"))), REMOTE_ERROR);
        assert_eq!(call("test", || Ok(())), SUCCESS);
    }

    #[test]
    fn sizes_that_are_none_or_too_large_are_refused() {
        assert_eq!(size(0), Ok(0));
        assert_eq!(size(MESSAGE_LIMIT as c_int), Ok(MESSAGE_LIMIT));
        for bad in [-1, MESSAGE_LIMIT as c_int + 1, c_int::MIN] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
