//! Collective communication among the ranks of a job.
//!
//! A [`Communicator`] runs collectives (`all_reduce`, `broadcast`, …) over a
//! [`paceline_transport::Transport`]. All ranks call the same operations in the same order; a call that
//! disagrees, a rank that dies and a rank that never calls each end in an [`Error`] on every rank, never in a hang.
//!
//! ```
//! use paceline_collectives::{Communicator, Config, ReduceOp};
//!
//! let ranks: Vec<_> = paceline_transport::mem::group(2, 1, 64 * 1024)
//!     .into_iter()
//!     .map(|transport| {
//!         std::thread::spawn(move || {
//!             let mut communicator = Communicator::new(Box::new(transport), Config::default())?;
//!             let mut gradient = [1.0f32, 2.0];
//!             communicator.all_reduce(&mut gradient, ReduceOp::Sum)?;
//!             assert_eq!(gradient, [2.0, 4.0]);
//!             communicator.leave()
//!         })
//!     })
//!     .collect();
//! for rank in ranks {
//!     rank.join().expect("no rank panics")?;
//! }
//! # Ok::<(), paceline_collectives::Error>(())
//! ```
//!
//! This crate reads no environment variable and no file, and knows no launcher.

mod buffer;
mod communicator;
mod control;
pub mod device;
pub mod dtype;
mod engine;
pub mod error;
mod fault;
mod kernels;
mod levels;
mod network;
pub mod operation;
pub mod plan;
mod progress;
pub mod recorder;
mod rounds;
mod shared;
mod waits;
mod work;

pub use communicator::{Algorithm, Communicator, Config, Order, Statistics};
pub use dtype::{DType, Element, ReduceOp};
pub use error::Error;
pub use fault::Interrupter;
#[doc(hidden)]
pub use kernels::for_benches as kernels_for_benches;
pub use operation::{Kind, Operation};
pub use recorder::FlightRecorder;
pub use shared::registered::SharedBuffer;
pub use work::Work;
