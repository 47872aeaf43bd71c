//! What tch has no functions for: libtorch's CUDA, which has to be loaded, and its current stream.
//!
//! A program that links libtorch does not get its CUDA part: the linker drops a library of which no symbol is used. So it is
//! loaded here, before anything is asked about CUDA: the first question settles for the whole process that there is none.
//! The stream comes from a C function of that library, which is stable between versions of torch; where it is missing the
//! stream is CUDA's legacy default one, which tch never changes.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
use paceline_collectives::device::Stream;

use crate::Error;

/// libtorch's CUDA part.
const LIBRARY: &str = "libtorch_cuda.so";

type CurrentStream = unsafe extern "C" fn(i32, *mut *mut c_void) -> c_int;

/// libtorch's CUDA part, loaded into this process for good.
pub(super) struct TorchCuda {
    current_stream: Option<CurrentStream>,
}

/// Loads it once. `None`, with the reason in the log, where this libtorch has none.
pub(super) fn load() -> Option<&'static TorchCuda> {
    static LOADED: OnceLock<Option<TorchCuda>> = OnceLock::new();
    LOADED.get_or_init(look).as_ref()
}

fn look() -> Option<TorchCuda> {
    // SAFETY: its initialisers register it with the libtorch of this process, as in every program that links it.
    let library = match unsafe { Library::open(Some(LIBRARY), RTLD_LAZY | RTLD_GLOBAL) } {
        Ok(library) => library,
        Err(error) => {
            tracing::debug!(%error, "this libtorch has no CUDA");
            return None;
        }
    };
    // SAFETY: that is its type in torch's header of this name for C; the library is never unloaded.
    let found = unsafe { library.get::<CurrentStream>(b"aoti_torch_get_current_cuda_stream\0") };
    let current_stream = found.ok().map(|function| *function);
    std::mem::forget(library);
    Some(TorchCuda { current_stream })
}

impl TorchCuda {
    /// The stream on which torch enqueues work for a device now, on this thread.
    ///
    /// # Errors
    /// [`Error::Usage`] when torch does not tell it.
    pub(super) fn current_stream(&self, device: usize) -> Result<Stream, Error> {
        let (mut stream, device) = (std::ptr::null_mut(), i32::try_from(device).unwrap_or(i32::MAX));
        if let Some(current_stream) = self.current_stream {
            // SAFETY: the out-pointer is to a local.
            let code = unsafe { current_stream(device, &raw mut stream) };
            if code != 0 {
                let reason =
                    format!("torch does not tell the current stream of device {device}: code {code}");
                return Err(Error::Usage { reason });
            }
        }
        // SAFETY: torch's streams are never destroyed, nor is the default one.
        Ok(unsafe { Stream::from_handle(stream as u64) })
    }
}
