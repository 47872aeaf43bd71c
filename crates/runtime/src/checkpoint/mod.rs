//! Checkpoints: the state of the training on disk, so that a job that is lost as a whole goes on where it was.
//!
//! Every rank writes its share of the state on a thread of its own, and rank 0 makes one checkpoint of them when all are
//! durable. So what is found after a crash is whole, and of a step that every rank had applied. It is read on any number
//! of ranks. docs/checkpoints.md has the format, and which test shows which promise.
//!
//! What is saved is a *replicated* state, equal on all ranks, as data-parallel training has it; ranks share the work of
//! writing it. Tensors that differ between ranks have no place here. The folder is one that all ranks share, and belongs
//! to one job at a time.
//!
//! ```
//! use paceline_runtime::checkpoint::{self, Checkpointer, Group, Layout, Notes, Settings, Tensor, TensorMut};
//!
//! # let folder = std::env::temp_dir().join(format!("paceline-doc-{}", std::process::id()));
//! let mut world = paceline_runtime::World::join()?;
//! let mut weights = [0f32; 4];
//! let resumed =
//!     checkpoint::resume(world.communicator(), &folder, &mut [TensorMut::new("weights", &[2, 2], &mut weights)])?;
//! let first = resumed.map_or(0, |resumed| resumed.step) + 1;
//!
//! let layout = Layout::of(&[Tensor::new("weights", &[2, 2], &weights)])?;
//! let group = Group::agree(world.communicator(), &layout)?;
//! let mut checkpointer = Checkpointer::open(&folder, group, layout, Settings::default())?;
//! for step in first..=100 {
//!     weights[0] += 1.0; // A step of the training.
//!     if step % 10 == 0 && let Some(stable) = checkpointer.agree(world.communicator(), step)? {
//!         checkpointer.save(stable, &[Tensor::new("weights", &[2, 2], &weights)], Notes::default())?;
//!     }
//! }
//! checkpointer.finish()?;
//! world.leave()?;
//! # std::fs::remove_dir_all(&folder)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod disk;
mod error;
mod layout;
mod manifest;
mod names;
mod publication;
mod recovery;
mod shard;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use aws_lc_rs::rand;
use paceline_collectives::{Communicator, ReduceOp};

use crate::membership::WorkerAction;

pub use disk::{Disk, LocalDisk, Output};
pub use error::{Damage, Error};
pub use layout::{Layout, Span, Tensor, TensorMut, TensorSpec};
pub use manifest::{MAX_MANIFEST_BYTES, MAX_SHARDS, Manifest, Notes, Sha256, ShardRecord};
pub use names::Committed;
pub use recovery::{Checkpoint, Listing, Resumed, resume, resume_alone, resume_alone_from};
use writer::{Part, Publishing, Site};

/// How long rank 0 sleeps between two looks for receipts, at first and at most: a checkpoint of a small state is made in
/// milliseconds, and a folder on a network is not asked hundreds of times in a second.
const FIRST_SLEEP: Duration = Duration::from_millis(1);
const LONGEST_SLEEP: Duration = Duration::from_millis(50);

/// How checkpoints are written. Equal on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// How many checkpoints are kept: 3 by default, at least 1. With one, a single damaged file leaves nothing.
    pub keep: usize,
    /// How long rank 0 waits for the other ranks' shards, and a caller for the checkpoint before: 5 minutes.
    pub timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { keep: 3, timeout: Duration::from_secs(300) }
    }
}

/// The ranks that write checkpoints together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// This process's rank, and with that its shard.
    pub rank: usize,
    /// The number of ranks, and with that of shards.
    pub world_size: usize,
    /// A number that these ranks have in common and no others ever had in this folder: an epoch of the membership, or
    /// one drawn at random. It keeps what a lost group has left apart from what this one writes.
    pub run: u64,
}

impl Group {
    /// The ranks of a communicator, with a run that rank 0 draws. All ranks call it. Blocks, as its collectives do.
    ///
    /// # Errors
    /// [`Error::Usage`] on all ranks when they have different tensors; the collectives' errors.
    ///
    /// # Panics
    /// When the operating system gives no random numbers, without which there is no TLS either.
    pub fn agree(communicator: &mut Communicator, layout: &Layout) -> Result<Self, crate::Error> {
        let digest = layout.digest();
        let mut both = [digest, !digest];
        communicator.all_reduce(&mut both, ReduceOp::Max)?;
        if both[0] != !both[1] {
            let reason = "ranks have different tensors to save: names, types, shapes and order must be equal";
            return Err(Error::Usage { reason: reason.to_owned() }.into());
        }
        let mut bytes = [0; 8];
        rand::fill(&mut bytes).expect("the system has random numbers");
        let mut run = [u64::from_le_bytes(bytes)];
        communicator.broadcast(&mut run, 0)?;
        Ok(Self { rank: communicator.rank(), world_size: communicator.world_size(), run: run[0] })
    }
}

/// A step that every rank is known to have applied: what may be shown outside, and so what may be saved.
///
/// There is no way to make one from a number alone: either the ranks have agreed on it, or the membership has found it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "it is there to be saved"]
pub struct StableStep(u64);

impl StableStep {
    /// The step that the membership has found stable, if that is what the action says. The state that is saved with it
    /// is the one after that step: a worker hears of it before it applies the next one.
    pub fn found_by(action: &WorkerAction) -> Option<Self> {
        match action {
            WorkerAction::Stable(step) => Some(Self(step.0)),
            _ => None,
        }
    }

    /// The last step of a process that has nobody to agree with.
    pub(crate) fn of_one(step: u64) -> Self {
        Self(step)
    }

    /// Its number.
    pub fn step(&self) -> u64 {
        self.0
    }
}

/// Asks all ranks whether they are at this step and each is ready to save it. All ranks call it, at the same place among
/// their collectives. `None` on all ranks when one is not ready. Costs one small all-reduce, and blocks as long as that.
///
/// # Errors
/// [`Error::Usage`] on all ranks when they are at different steps, the collective's.
pub(crate) fn agree(
    communicator: &mut Communicator,
    step: u64,
    ready: bool,
) -> Result<Option<StableStep>, crate::Error> {
    let mut most = [u64::from(!ready), step, !step];
    communicator.all_reduce(&mut most, ReduceOp::Max)?;
    let [unready, highest, lowest] = [most[0], most[1], !most[2]];
    if highest != lowest {
        let reason = format!("ranks want to save different steps, from {lowest} to {highest}");
        return Err(Error::Usage { reason }.into());
    }
    Ok((unready == 0).then_some(StableStep(step)))
}

/// Makes the folder for checkpoints, if it is not there.
///
/// # Errors
/// [`Error::Disk`].
pub(crate) fn make_folder(folder: &Path) -> Result<(), Error> {
    make_durable_folder(&LocalDisk, folder)
}

/// What became of this rank's part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// The step.
    pub step: u64,
    /// On rank 0 the folder of the checkpoint; `None` on the others, whose shards are durable.
    pub result: Result<Option<PathBuf>, Error>,
    /// From the copy on.
    pub took: Duration,
}

/// Writes checkpoints in the background.
///
/// One is written at a time, from one copy of this rank's share of the state, which is made once and used again. When
/// another one is due meanwhile, it is skipped by all ranks ([`agree`](Self::agree)), or waits
/// ([`save`](Self::save) without it). What fails is an error in the log and in the [`outcome`](Self::outcome); its files
/// are removed, and the next checkpoint is tried as if nothing had been.
///
/// Dropping it stops what is being written, without waiting; [`finish`](Self::finish) waits.
#[derive(Debug)]
pub struct Checkpointer {
    site: Site,
    group: Group,
    timeout: Duration,
    /// The copy; `None` while the writer has it.
    buffer: Option<Vec<u8>>,
    /// The last step that was given to the writer.
    last_step: Option<u64>,
    /// How many were skipped since.
    skipped: u64,
    outcome: Option<Outcome>,
    cancelled: Arc<AtomicBool>,
    orders: Sender<Order>,
    done: Receiver<(Vec<u8>, Outcome)>,
}

#[derive(Debug)]
enum Order {
    Write { part: Part, notes: Notes, buffer: Vec<u8> },
    Sweep(Group),
}

impl Checkpointer {
    /// Gets ready to write checkpoints of states of this layout into a folder, which is made. Rank 0 removes in the
    /// background what was left unfinished there: [resume](resume()) first.
    ///
    /// # Errors
    /// [`Error::Disk`] when the folder or a thread cannot be made, [`Error::Usage`] for settings that make no sense.
    pub fn open(folder: &Path, group: Group, layout: Layout, settings: Settings) -> Result<Self, Error> {
        Self::open_on(Arc::new(LocalDisk), folder, group, layout, settings)
    }

    /// [`open`](Self::open) on any disk.
    ///
    /// # Errors
    /// As there.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        folder: &Path,
        group: Group,
        layout: Layout,
        settings: Settings,
    ) -> Result<Self, Error> {
        if settings.keep == 0
            || !(1..=MAX_SHARDS).contains(&group.world_size)
            || group.rank >= group.world_size
        {
            let Group { rank, world_size, .. } = group;
            let reason = format!("keep {} checkpoints, as rank {rank} of {world_size}?", settings.keep);
            return Err(Error::Usage { reason });
        }
        make_durable_folder(disk.as_ref(), folder)?;
        let site = Site { disk, root: folder.to_owned(), layout: Arc::new(layout), keep: settings.keep };
        let ((orders, inbox), (report, done)) = (mpsc::channel(), mpsc::channel());
        let (for_writer, timeout) = (site.clone(), settings.timeout);
        thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || write_all(&for_writer, timeout, &inbox, &report))
            .map_err(Error::disk("start a thread to write to", folder))?;
        let cancelled = Arc::default();
        let (buffer, last_step, skipped, outcome) = (Some(Vec::new()), None, 0, None);
        let checkpointer =
            Self { site, group, timeout, buffer, last_step, skipped, outcome, cancelled, orders, done };
        checkpointer.sweep();
        Ok(checkpointer)
    }

    /// Asks all ranks whether this step's state can be saved now: whether all have applied it, and none is still
    /// writing the one before. All ranks call it, between this step and the next. `None` on all ranks when one is still
    /// writing: this checkpoint is skipped. Costs one small all-reduce, and blocks as long as that.
    ///
    /// # Errors
    /// [`Error::Usage`] on all ranks when they are at different steps, the collective's.
    pub fn agree(
        &mut self,
        communicator: &mut Communicator,
        step: u64,
    ) -> Result<Option<StableStep>, crate::Error> {
        let ready = !self.is_busy();
        let stable = agree(communicator, step, ready)?;
        if stable.is_none() {
            self.skip(step);
        }
        Ok(stable)
    }

    /// Saves the state after a stable step. Copies this rank's share of the tensors and returns; the rest happens in
    /// the background. While the checkpoint before is still being written, it waits for that first.
    ///
    /// All ranks save the same steps, with equal notes. The tensors are those of the layout, in its order, as they are
    /// after that step and before the next.
    ///
    /// # Errors
    /// [`Error::Usage`] for other tensors, or a step that is not after the one saved last; [`Error::Busy`] when the one
    /// before is not written at the deadline. Nothing is saved then.
    pub fn save(&mut self, stable: StableStep, tensors: &[Tensor<'_>], notes: Notes) -> Result<(), Error> {
        let step = stable.0;
        self.check(step, tensors)?;
        let mut buffer = self.wait_for_buffer()?;
        buffer.clear();
        for span in self.site.layout.share(self.group.rank, self.group.world_size) {
            buffer.extend_from_slice(&tensors[span.tensor].bytes()[self.site.layout.byte_range(&span)]);
        }
        self.cancelled = Arc::default();
        let part = Part { group: self.group, step, cancelled: self.cancelled.clone() };
        (self.last_step, self.skipped) = (Some(step), 0);
        self.orders.send(Order::Write { part, notes, buffer }).map_err(|_| self.writer_is_gone())
    }

    /// Goes on with another group, after a change of the membership. What the one before was writing is stopped: its
    /// ranks may not all be there any more.
    ///
    /// # Errors
    /// [`Error::Busy`] when it has not stopped at the deadline.
    pub fn regroup(&mut self, group: Group) -> Result<(), Error> {
        self.cancel();
        self.wait()?;
        self.group = group;
        // A step that was given up in one group may be saved in the next.
        self.last_step = None;
        self.sweep();
        Ok(())
    }

    /// Stops what is being written, without waiting: it is [busy](Self::is_busy) until that has come to its end. Of a
    /// checkpoint that all ranks had written their shards of, rank 0 may make it all the same.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// The ranks that it writes with.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Whether a checkpoint is being written.
    pub fn is_busy(&mut self) -> bool {
        self.collect();
        self.buffer.is_none()
    }

    /// What became of the last checkpoint that is not being written any more.
    pub fn outcome(&mut self) -> Option<&Outcome> {
        self.collect();
        self.outcome.as_ref()
    }

    /// Waits until this rank's part of the last checkpoint is done, and on rank 0 the whole of it.
    ///
    /// # Errors
    /// [`Error::Busy`] at the deadline. That the checkpoint failed is not an error here, but in the outcome.
    pub fn wait(&mut self) -> Result<(), Error> {
        let buffer = self.wait_for_buffer()?;
        self.buffer = Some(buffer);
        Ok(())
    }

    /// [Waits](Self::wait) and ends. What became of the last checkpoint; `None` if there was none.
    ///
    /// # Errors
    /// [`Error::Busy`] at the deadline.
    pub fn finish(mut self) -> Result<Option<Outcome>, Error> {
        self.wait()?;
        Ok(self.outcome.take())
    }

    fn wait_for_buffer(&mut self) -> Result<Vec<u8>, Error> {
        self.collect();
        if let Some(buffer) = self.buffer.take() {
            return Ok(buffer);
        }
        // The writer has that long for the other ranks; let it be the one that says who is late.
        let limit = self.timeout + self.timeout / 8;
        match self.done.recv_timeout(limit) {
            Ok((buffer, outcome)) => {
                self.outcome = Some(outcome);
                Ok(buffer)
            }
            Err(RecvTimeoutError::Timeout) => Err(Error::Busy { waited_s: limit.as_secs() }),
            Err(RecvTimeoutError::Disconnected) => Err(self.writer_is_gone()),
        }
    }

    fn check(&self, step: u64, tensors: &[Tensor<'_>]) -> Result<(), Error> {
        if let Some(difference) = self.site.layout.difference(&Layout::of(tensors)?) {
            return Err(Error::Usage { reason: format!("tensors to save: {difference}") });
        }
        match self.last_step {
            Some(last) if step <= last => {
                Err(Error::Usage { reason: format!("step {step} cannot be saved after step {last}") })
            }
            _ => Ok(()),
        }
    }

    /// Says so once, on one rank: a disk that is too slow is so for every step.
    pub(crate) fn skip(&mut self, step: u64) {
        self.skipped += 1;
        if self.group.rank == 0 && self.skipped == 1 {
            tracing::warn!(step, "the checkpoint before is still being written, so this one is skipped");
        } else {
            tracing::debug!(step, skipped = self.skipped, "skipped");
        }
    }

    fn sweep(&self) {
        if self.group.rank == 0 {
            // A writer that has gone is noticed when something is saved.
            let _ = self.orders.send(Order::Sweep(self.group));
        }
    }

    fn collect(&mut self) {
        if let Ok((buffer, outcome)) = self.done.try_recv() {
            self.buffer = Some(buffer);
            self.outcome = Some(outcome);
        }
    }

    fn writer_is_gone(&self) -> Error {
        let reason = "the thread that writes has ended".to_owned();
        Error::GivenUp { step: self.last_step.unwrap_or(0), reason }
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// The life of the writer thread, which ends with the checkpointer.
fn write_all(site: &Site, timeout: Duration, inbox: &Receiver<Order>, report: &Sender<(Vec<u8>, Outcome)>) {
    for order in inbox {
        match order {
            Order::Sweep(group) => writer::sweep(site, &group),
            Order::Write { part, notes, buffer } => {
                let start = Instant::now();
                let result = write_part(site, &part, &buffer, notes, start + timeout);
                let outcome = Outcome { step: part.step, result, took: start.elapsed() };
                say(&part, buffer.len(), &outcome);
                let made = outcome.result.as_ref().ok().and_then(Option::as_ref);
                if let Some(newest) = made.and_then(|path| path.file_name()?.to_str()?.parse().ok()) {
                    writer::retire(site, &part.group, &newest);
                }
                // Whoever has dropped the checkpointer does not want to know.
                let _ = report.send((buffer, outcome));
            }
        }
    }
}

fn write_part(
    site: &Site,
    part: &Part,
    bytes: &[u8],
    notes: Notes,
    deadline: Instant,
) -> Result<Option<PathBuf>, Error> {
    let written = writer::write_shard(site, part, bytes);
    if part.group.rank != 0 {
        return written.map(|()| None);
    }
    // After a failure of its own rank 0 reads its own receipt, or none: either way it removes what the others wrote.
    let mut publishing = Publishing::new(site, part, notes);
    let mut sleep = FIRST_SLEEP;
    loop {
        let late = written.is_err() || Instant::now() >= deadline;
        let turn = publishing.turn(late);
        match (turn, &written) {
            (Err(_), Err(own)) => return Err(own.clone()),
            (turn, _) => {
                if let Some(name) = turn? {
                    return Ok(Some(site.root.join(name.to_string())));
                }
            }
        }
        thread::sleep(sleep);
        sleep = (sleep * 2).min(LONGEST_SLEEP);
    }
}

fn say(part: &Part, bytes: usize, outcome: &Outcome) {
    let (rank, step, elapsed_ms) = (part.group.rank, part.step, outcome.took.as_millis() as u64);
    match &outcome.result {
        Ok(Some(path)) => {
            tracing::info!(rank, step, bytes, elapsed_ms, checkpoint = %path.display(), "checkpoint");
        }
        Ok(None) => tracing::debug!(rank, step, bytes, elapsed_ms, "shard of a checkpoint"),
        // Whoever regroups or ends knows that.
        Err(error) if part.cancelled.load(Ordering::Relaxed) => {
            tracing::info!(rank, step, %error, "no checkpoint")
        }
        Err(error) => tracing::error!(rank, step, %error, "no checkpoint; training goes on without it"),
    }
}

/// Makes a folder that is still there after a crash, with those above it.
fn make_durable_folder(disk: &dyn Disk, folder: &Path) -> Result<(), Error> {
    disk.create_folder(folder).map_err(Error::disk("make the folder", folder))?;
    for above in folder.ancestors().skip(1) {
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        // Folders of others may forbid it; they were there before.
        let _ = disk.sync_folder(above);
    }
    Ok(())
}
