//! Training that goes on when workers die, freeze, leave and come: a program is written once and runs alone, with a
//! fixed membership and with a changing one.
//!
//! The program hands over its [state](Program::state), the [gradient](Program::gradient) of some samples and its
//! [optimizer](Program::apply), and [`train`] calls them. Steps, batches, who computes what, and what becomes of a step
//! when somebody is lost in the middle of it are Paceline's: the protocol is in docs/fault-tolerance.md.
//!
//! ```no_run
//! use paceline_runtime::elastic::{self, Config, Program, Tensor};
//!
//! struct Model {
//!     weights: Vec<f64>,
//! }
//!
//! impl Program for Model {
//!     type Gradient = f64;
//!     fn gradient_len(&self) -> usize {
//!         self.weights.len()
//!     }
//!     fn state(&mut self) -> Vec<Tensor<'_>> {
//!         vec![Tensor::new("weights", &mut self.weights)]
//!     }
//!     fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
//!         // … the loss and its gradient
//! #       let _ = (samples, gradient); 0.0
//!     }
//!     fn apply(&mut self, gradient: &[f64]) {
//!         self.weights.iter_mut().zip(gradient).for_each(|(weight, slope)| *weight -= 0.1 * slope);
//!     }
//! }
//!
//! let mut model = Model { weights: vec![0.0; 10] };
//! elastic::train(&Config::new(60_000, 32), &mut model)?;
//! # Ok::<(), paceline_runtime::Error>(())
//! ```
//! Under `paceline run -n 4 --max-restarts 3 -- program` a worker that dies is started again, takes the state from the
//! others while they go on, and enters between two steps.
//!
//! For the case that all are lost there are [checkpoints](Config::checkpoint): with a folder for them the members save the
//! state there now and then, and a job that begins with one goes on from it.
//!
//! # Threads
//! | thread | what |
//! |---|---|
//! | the caller's | the program: gradients, optimizer, copies of the state |
//! | `control` | the membership: hears the launcher, the other workers and both other threads, and decides |
//! | `links` | the communicator of the present view |
//!
//! A collective never waits for a copy of the state that another member needs to take part in it, since they are on
//! different threads.

mod alone;
mod batches;
mod book;
mod control;
mod exchange;
pub(crate) mod failpoint;
mod links;
mod member;
pub mod pipe;
mod pool;
mod program;
mod saver;
mod stop;
mod sum;
mod training;

pub use program::{Gradient, Program, Stable, Tensor};
pub use stop::Stop;

use std::path::PathBuf;

use batches::Batches;

use crate::checkpoint::Settings;
use crate::env::{self, ElasticEnv};
use crate::membership::{CatchUp, Incarnation, MAX_SLOTS, MAX_WORKERS, Mode};
use crate::{Error, membership};

/// What is trained on, and how the work is shared. Equal on all workers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// The number of samples of the data set.
    pub samples: usize,
    /// The number of samples that one slot takes in one step.
    pub batch: usize,
    /// How often every sample is used; one pass by default. Samples that do not fill a batch are left out of a pass.
    pub passes: u64,
    /// Of the order of the samples, which is another one in each pass.
    pub seed: u64,
    /// What becomes of a lost worker's share: [`Mode::Slots`] by default, so that the weights are those of an undisturbed
    /// run, bit by bit. With [`Mode::Shrink`] steps are means over those who are there, and the lost share is done later.
    pub mode: Mode,
    /// The number of slots, the logical workers of the job; as many as workers at the start, less the spares, by default. The
    /// gradient of a step is the mean over slots, so a job with as many slots has the same weights on any number of workers.
    pub slots: Option<u16>,
    /// How many workers are spares while all are there; none by default, and fewer than workers. A spare applies every step
    /// and contributes to none. When a worker with slots is lost, the oldest spare has them in the next view, so the number
    /// of [contributors](Stable::contributors) stays, and whoever replaces the lost one is a spare. `mode` is for losses
    /// beyond that.
    pub spares: usize,
    /// How a worker gets the steps that others have made without it: [`CatchUp::Results`] by default. With
    /// [`CatchUp::State`] [`Program::apply`] need not be deterministic: a newcomer, and a survivor that lacks the last step,
    /// takes over the state of a member that has made it, and nothing is applied twice. Then the others wait for each
    /// newcomer for as long as its state is under way, states differ from member to member as much as `apply` does, and
    /// checkpoints are of rank 0's alone.
    pub catch_up: CatchUp,
    /// The folder for checkpoints, which all workers see on whatever machine they are, and which belongs to one job; none by
    /// default. A training that begins goes on from the newest one that is whole. The members share the work of writing
    /// them, in the background, and only stable steps are saved. What cannot be saved is an error in the log, and training
    /// goes on.
    pub checkpoint: Option<PathBuf>,
    /// After how many steps each the state is saved, if there is a folder for it: 100 by default. It is also saved when the
    /// training is complete. While one is still being written, the next is left out.
    pub checkpoint_every: u64,
    /// How many checkpoints are kept, and how long members wait for each other's part of one.
    pub checkpoint_settings: Settings,
}

impl Config {
    /// One pass over `samples` samples, with `batch` of them for each slot in each step.
    pub fn new(samples: usize, batch: usize) -> Self {
        Self {
            samples,
            batch,
            passes: 1,
            seed: 0,
            mode: Mode::Slots,
            slots: None,
            spares: 0,
            catch_up: CatchUp::Results,
            checkpoint: None,
            checkpoint_every: 100,
            checkpoint_settings: Settings::default(),
        }
    }

    fn check(&self) -> Result<(), Error> {
        let usage = |reason: String| Err(Error::Usage { reason });
        match self.slots {
            Some(0) => usage("a job without slots computes nothing; choose at least one".to_owned()),
            Some(slots) if usize::from(slots) > MAX_SLOTS => {
                usage(format!("{slots} slots are more than {MAX_SLOTS}"))
            }
            _ if self.checkpoint_every == 0 => {
                usage("a checkpoint after each 0 steps is never made; choose at least 1".to_owned())
            }
            _ if self.spares >= MAX_WORKERS => {
                usage(format!("{} spares are not fewer than {MAX_WORKERS} workers", self.spares))
            }
            _ => Ok(()),
        }
    }

    fn batches(&self) -> Result<Batches, Error> {
        Batches::new(self.samples, self.batch, self.passes, self.seed)
    }
}

/// How a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// All batches are in committed steps, and the program has the final state.
    Complete,
    /// The training was completed by others before this worker had taken their state over. There is nothing to do.
    Elsewhere,
    /// This worker was asked to leave.
    Left,
    /// The program did not listen any more.
    Abandoned,
}

/// Trains `program` to the end of its data: alone, or as a worker of the job that its launcher describes in the
/// environment (docs/configuration.md). Blocks until the training is complete.
///
/// All workers call it with the same program and configuration. The training begins from the state of one of them.
///
/// # Errors
/// [`Error::Usage`] for a configuration that makes no sense, [`Error::Environment`] for variables that do not,
/// [`Error::Membership`] when this worker cannot go on: its launcher starts another one.
pub fn train<P: Program>(config: &Config, program: &mut P) -> Result<End, Error> {
    train_until(config, program, &Stop::new())
}

/// [`train`] that ends early, with [`End::Left`], when `stop` [asks](Stop::request) this worker to leave.
///
/// # Errors
/// As [`train`].
pub fn train_until<P: Program>(config: &Config, program: &mut P, stop: &Stop) -> Result<End, Error> {
    config.check()?;
    match ElasticEnv::from_vars(env::process)? {
        Some(env) => member::train(&env, config, program, stop),
        None => alone::train(config, program, stop),
    }
}

/// A new incarnation.
///
/// # Panics
/// When the operating system gives no random numbers, without which there is no TLS either.
pub fn draw() -> membership::Incarnation {
    let mut random = [0; 16];
    aws_lc_rs::rand::fill(&mut random).expect("the operating system has random numbers");
    Incarnation(u128::from_le_bytes(random))
}
