//! NCCL without our bindings, to see what these cost: a communicator of one rank, called on the thread of the caller.

use std::ffi::{c_int, c_void};
use std::ptr;

use anyhow::{Context, Result, ensure};
use libloading::os::unix::{Library, Symbol};
use paceline_collectives::device::{DeviceBuffer, Stream};
use paceline_nccl::{Origin, Search, UniqueId};

type Init = unsafe extern "C" fn(*mut *mut c_void, c_int, UniqueId, c_int, *const c_void) -> c_int;
type AllReduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;

/// `ncclSuccess` and `ncclInProgress`.
const WELL: [c_int; 2] = [0, 7];

/// `ncclFloat32` and `ncclSum`.
const SUM_OF_F32: (c_int, c_int) = (7, 0);

/// A communicator of NCCL's, of one rank. It stays until the process ends.
pub struct RawNccl {
    communicator: *mut c_void,
    all_reduce: Symbol<AllReduce>,
    _library: Library,
}

impl RawNccl {
    /// Makes one on the device that the thread uses, in the NCCL that our bindings use.
    ///
    /// # Errors
    /// NCCL's.
    pub fn open() -> Result<Self> {
        let found = paceline_nccl::Library::open(&Search::from_environment())?;
        let file = match found.origin() {
            Origin::File(file) => file.clone(),
            _ => "libnccl.so.2".into(),
        };
        let id = found.unique_id()?;
        // SAFETY: it is loaded already, and stays loaded.
        let library = unsafe { Library::new(&file) }.context("NCCL again")?;
        // SAFETY: these are their types in nccl.h.
        let (init, all_reduce) = unsafe {
            (library.get::<Init>(b"ncclCommInitRankConfig\0")?, library.get::<AllReduce>(b"ncclAllReduce\0")?)
        };
        let mut communicator = ptr::null_mut();
        // SAFETY: the out-pointer is to a local; without a configuration NCCL takes its own, which blocks until it is made.
        let code = unsafe { init(&raw mut communicator, 1, id, 0, ptr::null()) };
        ensure!(WELL.contains(&code), "ncclCommInitRankConfig: {code}");
        Ok(Self { communicator, all_reduce, _library: library })
    }

    /// `ncclAllReduce` in place, of f32.
    ///
    /// # Errors
    /// NCCL's.
    pub fn all_reduce(&self, buffer: DeviceBuffer, stream: Stream) -> Result<()> {
        let at = buffer.address() as *mut c_void;
        let (dtype, op) = SUM_OF_F32;
        let stream = stream.handle() as *mut c_void;
        // SAFETY: whoever made the buffer has promised that it is there; the communicator was made above, and this is the
        // only thread that uses it.
        let code = unsafe { (self.all_reduce)(at, at, buffer.len(), dtype, op, self.communicator, stream) };
        ensure!(WELL.contains(&code), "ncclAllReduce: {code}");
        Ok(())
    }
}
