//! What decides an epoch where launchers do not vote: an object outside of the job that one of them changes at a time.
//!
//! With a vote those who are too few stop, and of two launchers that lose each other that is always the second one. With a
//! lease whoever is first goes on, be it alone; all others find what was decided. A file that all see is one kind of it
//! ([`mod@file`]).
//!
//! An answer may take as long as a file system does, so it is given by a thread of its own, the [`Keeper`]. In a job whose ranks
//! all start again after a change nobody decides about members, and the lease is launcher 0's alone ([`tenure`]).

pub mod file;
pub mod tenure;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use paceline_runtime::membership::{Decision, Epoch};

use self::file::FileLease;
use crate::cli::RunArgs;
use crate::error::Error;

/// The pause before a claim is tried again: the object may be there soon.
const CLAIM_PAUSE: Duration = Duration::from_millis(200);

/// The newest decision of a job, outside of it. Calls block, each for a few seconds at most, and of all calls of all
/// launchers one happens after the other.
pub trait Lease: Send + Sync {
    /// Names the object: launchers with different ones would both go on.
    fn identity(&self) -> &str;

    /// Where it is, for people.
    fn place(&self) -> String;

    /// The newest epoch that was claimed or decided.
    ///
    /// # Errors
    /// See [`Trouble`].
    fn newest(&self) -> Result<Epoch, Trouble>;

    /// Makes the epoch after every one that the job has ever had, and after `floor`, the newest one, without a decision
    /// so far, and returns it.
    ///
    /// # Errors
    /// See [`Trouble`].
    fn claim(&self, floor: Epoch) -> Result<Epoch, Trouble>;

    /// Makes this the newest decision if the newest epoch is the one before, and returns the newest decision then. None
    /// when an epoch has been claimed for which there is none yet.
    ///
    /// # Errors
    /// See [`Trouble`].
    fn swap(&self, decision: &Decision) -> Result<Option<Decision>, Trouble>;
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// The next attempt may have one.
    #[error("{0}")]
    Passing(String),
    /// No attempt will, until somebody has done something about it.
    #[error("{0}")]
    Lasting(String),
}

/// The lease of this job, if it goes by one.
///
/// # Errors
/// [`Error::Usage`] for a file that will not do.
pub fn of_job(args: &RunArgs) -> Result<Option<Arc<dyn Lease>>, Error> {
    let Some(file) = args.nodes.as_ref().and_then(|nodes| nodes.lease.as_deref()) else { return Ok(None) };
    let job = format!("the job at {}", args.rendezvous);
    let lease =
        FileLease::open(file, &job).map_err(|trouble| Error::Usage(format!("the lease: {trouble}")))?;
    Ok(Some(Arc::new(lease)))
}

/// What is wanted of a lease.
enum Request {
    Claim(Epoch),
    Swap(Decision),
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// That epoch is claimed.
    Claimed(Epoch),
    /// That is the newest decision, if there is one.
    Swapped(Option<Decision>),
    /// None so far. What was claimed is claimed again, and what was to be swapped is asked for again by whoever wants it.
    Failed(Trouble),
}

/// Asks a lease on a thread of its own, which ends when this is dropped and what it waits for has been answered.
pub struct Keeper {
    requests: Sender<Request>,
    /// A swap has not been answered yet.
    is_swapping: bool,
}

impl Keeper {
    /// Starts the thread, which calls `tell` with each answer.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn start(lease: Arc<dyn Lease>, tell: impl Fn(Answer) + Send + 'static) -> io::Result<Self> {
        let (requests, asked) = channel();
        let body = move || answer_all(&*lease, &asked, &tell);
        thread::Builder::new().name("lease".to_owned()).spawn(body)?;
        Ok(Self { requests, is_swapping: false })
    }

    /// See [`Lease::claim`]. Repeated until it has been answered.
    pub fn claim(&self, floor: Epoch) {
        // The thread ends after this.
        let _ = self.requests.send(Request::Claim(floor));
    }

    /// See [`Lease::swap`]. Does nothing while one is under way.
    pub fn swap(&mut self, decision: Decision) {
        if !std::mem::replace(&mut self.is_swapping, true) {
            let _ = self.requests.send(Request::Swap(decision));
        }
    }

    /// An answer has been heard.
    pub fn heard(&mut self, answer: &Answer) {
        self.is_swapping &= matches!(answer, Answer::Claimed(_));
    }
}

fn answer_all(lease: &dyn Lease, asked: &Receiver<Request>, tell: &dyn Fn(Answer)) {
    for request in asked {
        match request {
            Request::Swap(decision) => {
                tell(lease.swap(&decision).map_or_else(Answer::Failed, Answer::Swapped));
            }
            Request::Claim(floor) => loop {
                match lease.claim(floor) {
                    Ok(epoch) => break tell(Answer::Claimed(epoch)),
                    Err(trouble) => {
                        let lasts = matches!(trouble, Trouble::Lasting(_));
                        tell(Answer::Failed(trouble));
                        if lasts {
                            return;
                        }
                    }
                }
                thread::sleep(CLAIM_PAUSE);
            },
        }
    }
}
