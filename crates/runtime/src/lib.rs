//! What a training program links.
//!
//! [`World::join`] takes this process's place in the job that the launcher started, or makes a world of
//! one when there is no launcher. [`DataParallel`](data_parallel::DataParallel) averages gradients,
//! [`Sampler`](sampler::Sampler) hands out samples.
//!
//! ```
//! use paceline_runtime::collectives::ReduceOp;
//!
//! let mut world = paceline_runtime::World::join()?;
//! let mut sum = [world.rank() as f32];
//! world.communicator().all_reduce(&mut sum, ReduceOp::Sum)?;
//! world.leave()?;
//! # Ok::<(), paceline_runtime::Error>(())
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`env`](mod@env) | the job's environment variables, read here and nowhere below |
//! | [`interface`] | which of this host's addresses a rank is reached at |
//! | [`rendezvous`] | where the members of a job meet: server (launcher) and client (worker) |
//! | [`membership`] | who is a member, and what becomes of a step when one is lost: the protocol, without I/O |
//! | [`elastic`] | training with a membership that may change: drives it in a worker |
//! | [`nodes`] | what the launchers of a job of several nodes tell each other |
//! | [`renewal`] | a member's identity in files, read again when it is renewed |
//! | [`world`] | this process's place in the job |
//! | [`flight_recorder`] | what a rank did last, as a file that PyTorch's analyser reads |
//! | [`data_parallel`] | gradient buckets, averaging, broadcast of the initial parameters |
//! | [`checkpoint`] | the state on disk: written by all ranks, whole or not at all, read by any number of ranks |
//! | [`sampler`] | which samples a rank takes, as a pure function |
//! | [`digest`] | short digests of parameters, to compare ranks |
//!
//! The library installs no global subscriber, signal handler or async runtime.

pub mod checkpoint;
pub mod data_parallel;
pub mod digest;
pub mod elastic;
pub mod env;
pub mod error;
pub mod flight_recorder;
pub mod interface;
pub mod membership;
pub mod nodes;
pub mod rendezvous;
pub mod renewal;
pub mod sampler;
#[cfg(feature = "tch")]
pub mod tch;
pub mod world;

pub use error::Error;
/// The collectives, so that a program needs one dependency.
pub use paceline_collectives as collectives;
pub use world::World;
