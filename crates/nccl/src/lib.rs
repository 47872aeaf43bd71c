//! NCCL, loaded at run time.
//!
//! Nothing of CUDA is needed to build this crate or to link it: device memory and streams are opaque values, and the
//! library is looked for when [`Library::open`] is called. It refuses to do four things:
//! - to panic: a library that is missing, too old or broken is an [`Error`] that says what was looked for and where;
//! - to trust a result code: codes are integers, and one that this crate has never heard of is an error like others;
//! - to wait without a deadline: each [`Communicator`] has one thread, the only one that calls NCCL for it, and callers
//!   wait for that thread, not for NCCL. A call that never returns, abort among them, costs that thread and no other;
//! - to start again silently: after a fatal error a communicator answers with that error until it is dropped.
//!
//! The order of the search is in [`Search`]. What each function needs of NCCL's version is in the table of `ffi.rs`;
//! older than [`Version::OLDEST`] is refused.
//!
//! What has been tested where, and what never ran on a GPU, is in docs/gpu.md.

mod communicator;
mod error;
mod ffi;
mod library;
mod operation;
mod result_code;
mod search;
mod unique_id;
mod version;

pub use communicator::{Communicator, Options, Pending, Prepare, Shrink};
pub use error::{Attempt, Error};
pub use library::{Library, Origin};
pub use operation::{DataType, Operation, ReduceOp, Region, Stream};
pub use result_code::ResultCode;
pub use search::Search;
pub use unique_id::UniqueId;
pub use version::Version;

/// Struct layouts, for the test that compares them with a C compiler's reading of `nccl.h`.
#[doc(hidden)]
pub mod layout {
    pub use crate::ffi::layout::*;
}
