//! A communicator of NCCL behind one thread.
//!
//! NCCL is not safe for several threads, forbids an abort while another thread is inside it, and some of its functions may
//! never return, abort among them. So each communicator has one thread, the owner, and nobody else calls NCCL for it, not
//! even for the abort: then no two threads can be inside it by construction. Callers send the owner jobs through a
//! channel and wait for the answer with a deadline. An owner that does not answer is given up with what it holds; when it
//! comes back after all it finds the channel closed and cleans up.
//!
//! To wake a thread takes tens of microseconds, much longer than NCCL takes to enqueue an operation. So where there are
//! processors to spare ([`awake`]) the owner stays awake for a moment after a job, and so does who waits for an answer.
//!
//! All communicators are non-blocking: what takes long goes on in NCCL's background, and the owner asks for its state,
//! at most every [`LONGEST_PAUSE`], until it is complete, the deadline is over or somebody aborts.

use std::ffi::{CString, c_int};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::library::{Created, Handle, Library, Place, Progress, Settings};
use crate::operation::{Operation, Stream};
use crate::result_code::ResultCode;
use crate::unique_id::UniqueId;

/// Between the first two looks at work in the background: about what a wake-up costs.
const FIRST_PAUSE: Duration = Duration::from_micros(20);

/// Between later looks; they double up to this. An abort interrupts a pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// How long a thread stays awake for what usually comes soon: the next call of a training step, and an answer.
const AWAKE: Duration = Duration::from_micros(50);

/// With fewer processors than this for the process, the thread that one waits for may be waiting for this one's.
const ENOUGH_CPUS: usize = 4;

/// How much longer than the owner a caller waits. The owner's own error says more than that it did not answer; it needs
/// this much to be told, also on a machine that is busy.
const GRACE: Duration = Duration::from_millis(500);

/// Makes a thread ready to call NCCL: selects the communicator's CUDA device. The error is in the caller's words.
pub type Prepare = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// How a communicator is made and how long it may take.
#[derive(Clone)]
pub struct Options {
    /// How long any call may take, from the moment that it is made. The default is 10 minutes, as for other collectives.
    pub timeout: Duration,
    /// Called on the communicator's thread before NCCL, and on the threads of those made from it. `None`: device 0.
    pub prepare: Option<Prepare>,
    /// The network plugin that NCCL must use, by its name; `None`: NCCL chooses.
    pub net_name: Option<String>,
    /// How many thread blocks of the device NCCL may use at most; `None`: NCCL chooses.
    pub max_ctas: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(600), prepare: None, net_name: None, max_ctas: None }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { timeout, prepare, net_name, max_ctas } = self;
        let mut shown = f.debug_struct("Options");
        shown.field("timeout", timeout).field("prepare", &prepare.is_some());
        shown.field("net_name", net_name).field("max_ctas", max_ctas).finish()
    }
}

impl Options {
    fn settings(&self) -> Result<Settings, Error> {
        let name = self.net_name.as_deref().map(CString::new).transpose();
        let net_name = name.map_err(|_| usage("Options::net_name", "a name cannot hold a zero byte"))?;
        Ok(Settings { net_name, max_ctas: self.max_ctas })
    }
}

/// What [`Communicator::shrink`] does with operations of the old communicator that are still running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// There are none: `NCCL_SHRINK_DEFAULT`.
    AtRest,
    /// They are ended first, as after the loss of a rank: `NCCL_SHRINK_ABORT`. Allowed after a fatal error too.
    EndingOperations,
}

/// A member of a group of GPUs. Dropping it aborts it, and waits for nobody; [`Communicator::finish`] leaves in order.
pub struct Communicator {
    owner: OwnerLink,
    library: Arc<Library>,
    options: Options,
    place: Place,
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator").field("place", &self.place).field("library", &self.library).finish()
    }
}

impl Communicator {
    /// `ncclCommInitRankConfig`, or with several ids, which make the start of large groups faster, `ncclCommInitRankScalable`
    /// (2.23). Every rank calls it with the same ids; waits for all of them.
    ///
    /// # Errors
    /// [`Error::Usage`] for a rank that is not in the group; [`Error::Failed`] with NCCL's words, for example that there
    /// is no CUDA driver; [`Error::TimedOut`] if not all ranks come; [`Error::Stuck`] if NCCL does not return.
    pub fn new(
        library: &Arc<Library>,
        rank: usize,
        world_size: usize,
        ids: &[UniqueId],
        options: Options,
    ) -> Result<Self, Error> {
        let operation = "Communicator::new";
        let (rank, world_size) = checked_place(operation, rank, world_size)?;
        let (settings, ids) = (options.settings()?, ids.to_vec());
        Self::form(library, options, "ncclCommInitRankConfig", move |library| {
            library.init(rank, world_size, &ids, &settings)
        })
    }

    /// `ncclCommGrow` (2.29.2) as a newcomer: joins the communicator whose member made `id` with
    /// [`Communicator::growth_id`], while its members call [`Communicator::grow`].
    ///
    /// # Errors
    /// See [`Communicator::new`]; [`Error::Missing`] if this NCCL is older.
    pub fn join(
        library: &Arc<Library>,
        rank: usize,
        world_size: usize,
        id: UniqueId,
        options: Options,
    ) -> Result<Self, Error> {
        let (rank, world_size) = checked_place("Communicator::join", rank, world_size)?;
        let settings = options.settings()?;
        Self::form(library, options, "ncclCommGrow", move |library| {
            library.grow(None, world_size, Some(&id), Some(rank), &settings)
        })
    }

    /// Starts the owner of a communicator that `make` makes on it.
    fn form(
        library: &Arc<Library>,
        options: Options,
        function: &'static str,
        make: impl FnOnce(&Library) -> Result<Created, Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let owner = OwnerLink::start(library, &options)?;
        let started = owner.ask(function, options.timeout, Admission::Healthy, move |owner, deadline| {
            let mut created = make(&owner.library)?;
            // Present while NCCL works on it in the background: that is what can be asked and aborted.
            owner.handle = created.slot.take();
            if created.progress == Progress::Pending {
                owner.settle(created.function, deadline)?;
            }
            owner.place()
        });
        // On an error the link is dropped, and the owner aborts what it may have.
        Ok(Self { place: started?, owner, library: Arc::clone(library), options })
    }

    /// Starts the owner of a communicator that another owner has made.
    fn adopt(&self, child: Handle) -> Result<Self, Error> {
        let (library, options) = (&self.library, self.options.clone());
        let owner = OwnerLink::start(library, &options)?;
        let started =
            owner.ask("ncclCommGetAsyncError", options.timeout, Admission::Healthy, |owner, deadline| {
                owner.handle = Some(child);
                owner.settle("ncclCommGetAsyncError", deadline)?;
                owner.place()
            });
        Ok(Self { place: started?, owner, library: Arc::clone(library), options })
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.place.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.place.world_size
    }

    /// The CUDA device that NCCL uses for it, by its number in this process.
    pub fn device(&self) -> i32 {
        self.place.device
    }

    /// Enqueues operations on a stream and returns at once; several are one group and progress together. All ranks
    /// enqueue the same collectives in the same order. An operation is in the stream when the [`Pending`] has said so, and
    /// has run when the stream has.
    ///
    /// # Errors
    /// [`Error::Usage`] if lengths, types or ranks do not fit, with nothing enqueued; [`Error::Failing`] after a fatal
    /// error. What NCCL says is told by the [`Pending`].
    pub fn enqueue(&self, operations: &[Operation], stream: Stream) -> Result<Pending, Error> {
        let Some(first) = operations.first() else {
            return Err(usage("Communicator::enqueue", "no operation was given"));
        };
        for operation in operations {
            if let Some(reason) = operation.complaint(self.rank(), self.world_size()) {
                return Err(usage(operation.function(), reason));
            }
        }
        if self.owner.shared.revoked.load(Ordering::Acquire) {
            return Err(usage(
                first.function(),
                "the communicator was revoked: shrink or split it, or form a new one",
            ));
        }
        let function = if operations.len() == 1 { first.function() } else { "ncclGroupEnd" };
        let operations = operations.to_vec();
        let timeout = self.options.timeout;
        let answer = self.owner.post(function, timeout, Admission::Healthy, move |owner, deadline| {
            let (function, progress) = owner.library.enqueue(owner.handle()?, &operations, stream)?;
            if progress == Progress::Pending { owner.settle(function, deadline) } else { Ok(()) }
        })?;
        Ok(Pending { answer })
    }

    /// `ncclCommGetAsyncError`: whether NCCL has noticed a failure by now. It does not notice every dead peer: who waits
    /// for an operation needs a deadline besides.
    ///
    /// # Errors
    /// [`Error::Failed`] with what NCCL has noticed, which is fatal; see [`Communicator::enqueue`] for others.
    pub fn check(&self) -> Result<(), Error> {
        let function = "ncclCommGetAsyncError";
        self.owner.ask(function, self.options.timeout, Admission::Healthy, move |owner, _| {
            let handle = owner.handle()?;
            match owner.library.state(handle)? {
                ResultCode::SUCCESS | ResultCode::IN_PROGRESS => Ok(()),
                code => {
                    Err(owner.library.failure("an operation of NCCL in the background", code, Some(handle)))
                }
            }
        })
    }

    /// `ncclCommSplit` (2.18): every rank calls it; those of one color form a communicator, in the order of their keys.
    /// `None`: this rank is in none of them, and gets none. Waits for all ranks.
    ///
    /// # Errors
    /// See [`Communicator::new`] and [`Error::Missing`]. An error of the new communicator leaves this one as it is.
    pub fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Self>, Error> {
        let color = color.map(c_int::try_from).transpose();
        let color = color.map_err(|_| usage("ncclCommSplit", "a color is below 2^31"))?;
        let child = self.breed("ncclCommSplit", Admission::Healthy, move |owner| {
            owner.library.split(owner.handle()?, color, key)
        })?;
        child.map(|child| self.adopt(child)).transpose()
    }

    /// `ncclCommShrink` (2.27): a communicator without some ranks, called by all others. Waits for them.
    ///
    /// # Errors
    /// See [`Communicator::split`]. [`Error::Usage`] if this rank is among those that are left out.
    pub fn shrink(&self, without: &[usize], how: Shrink) -> Result<Self, Error> {
        let function = "ncclCommShrink";
        if without.contains(&self.rank()) {
            return Err(usage(function, "a rank that is left out does not call it"));
        }
        if let Some(rank) = without.iter().find(|rank| **rank >= self.world_size()) {
            return Err(usage(function, format!("there is no rank {rank} among {}", self.world_size())));
        }
        let excluded: Vec<_> = without.iter().filter_map(|rank| c_int::try_from(*rank).ok()).collect();
        let (flags, admission) = match how {
            Shrink::AtRest => (0, Admission::Healthy),
            Shrink::EndingOperations => (1, Admission::AfterFailure),
        };
        let child = self.breed(function, admission, move |owner| {
            owner.library.shrink(owner.handle()?, &excluded, flags)
        })?;
        self.adopt_certainly(function, child)
    }

    /// `ncclCommGetUniqueId` (2.29.2): an id for newcomers, made by one rank, used in one [`Communicator::grow`].
    ///
    /// # Errors
    /// See [`Communicator::enqueue`] and [`Error::Missing`].
    pub fn growth_id(&self) -> Result<UniqueId, Error> {
        let timeout = self.options.timeout;
        self.owner.ask("ncclCommGetUniqueId", timeout, Admission::Healthy, |owner, _| {
            owner.library.growth_id(owner.handle()?)
        })
    }

    /// `ncclCommGrow` (2.29.2) as a member: a communicator of `world_size` ranks, of which the new ones call
    /// [`Communicator::join`]. `id` on the rank that made it, `None` on the other members. Waits for all ranks.
    ///
    /// # Errors
    /// See [`Communicator::split`].
    pub fn grow(&self, world_size: usize, id: Option<UniqueId>) -> Result<Self, Error> {
        let function = "ncclCommGrow";
        let new_size = c_int::try_from(world_size).ok().filter(|_| world_size > self.world_size());
        let Some(new_size) = new_size else {
            let reason = format!("{world_size} ranks are not more than {}", self.world_size());
            return Err(usage(function, reason));
        };
        let settings = self.options.settings()?;
        let child = self.breed(function, Admission::Healthy, move |owner| {
            owner.library.grow(Some(owner.handle()?), new_size, id.as_ref(), None, &settings)
        })?;
        self.adopt_certainly(function, child)
    }

    /// Has the owner make a communicator from this one. NCCL tells its address when this one is at rest again.
    fn breed(
        &self,
        function: &'static str,
        admission: Admission,
        make: impl FnOnce(&Owner) -> Result<Created, Error> + Send + 'static,
    ) -> Result<Option<Handle>, Error> {
        self.owner.ask(function, self.options.timeout, admission, move |owner, deadline| {
            let mut created = make(owner)?;
            if created.progress == Progress::Pending {
                owner.settle(created.function, deadline)?;
            }
            Ok(created.slot.take())
        })
    }

    fn adopt_certainly(&self, function: &'static str, child: Option<Handle>) -> Result<Self, Error> {
        let Some(child) = child else {
            // NCCL said that it had succeeded.
            return Err(self.library.failure(function, ResultCode::INTERNAL_ERROR, None));
        };
        self.adopt(child)
    }

    /// `ncclCommRevoke` (2.28.7): ends all operations in flight, on this rank. After it only [`Communicator::split`],
    /// [`Communicator::shrink`] and the end remain.
    ///
    /// # Errors
    /// See [`Communicator::split`].
    pub fn revoke(&self) -> Result<(), Error> {
        let timeout = self.options.timeout;
        self.owner.ask("ncclCommRevoke", timeout, Admission::AfterFailure, |owner, deadline| {
            let progress = owner.library.revoke(owner.handle()?)?;
            owner.shared.revoked.store(true, Ordering::Release);
            if progress == Progress::Pending { owner.settle("ncclCommRevoke", deadline) } else { Ok(()) }
        })
    }

    /// `ncclCommAbort`: ends this rank's part and all its operations, from whichever thread; calls that wait are answered
    /// with [`Error::Ended`] and the reason. All surviving ranks must do so. May be called again, to no effect.
    ///
    /// # Errors
    /// [`Error::Stuck`] when the owner is inside NCCL and does not come back within `timeout`, whether in an earlier call
    /// or in the abort itself: then nothing but the end of the process frees what it holds. [`Error::Failed`] if NCCL says
    /// that the abort failed.
    pub fn abort(&self, reason: &str, timeout: Duration) -> Result<(), Error> {
        self.owner.interrupt(reason);
        self.owner.ask("ncclCommAbort", timeout, Admission::Always, |owner, _| owner.abort())
    }

    /// `ncclCommFinalize` and `ncclCommDestroy`: waits until all operations of all ranks are complete, and leaves.
    ///
    /// # Errors
    /// See [`Communicator::enqueue`]. After an error it is aborted in the background.
    pub fn finish(self) -> Result<(), Error> {
        let timeout = self.options.timeout;
        self.owner.ask("ncclCommFinalize", timeout, Admission::Healthy, |owner, deadline| {
            // NCCL forbids to finalise what was revoked: it is at rest already.
            let revoked = owner.shared.revoked.load(Ordering::Acquire);
            if !revoked && owner.library.finalize(owner.handle()?)? == Progress::Pending {
                owner.settle("ncclCommFinalize", deadline)?;
            }
            owner.handle.take().map_or(Ok(()), |handle| owner.library.destroy(handle))
        })
    }
}

/// Operations on their way to the stream.
#[must_use = "an error of the operations is told by `wait` alone"]
pub struct Pending {
    answer: Answer<()>,
}

impl Pending {
    /// Waits until the operations are in the stream (not until they have run).
    ///
    /// # Errors
    /// [`Error::Failed`], [`Error::TimedOut`], [`Error::Stuck`], [`Error::Ended`] and [`Error::Failing`]; all are fatal.
    pub fn wait(self) -> Result<(), Error> {
        self.answer.wait()
    }
}

fn usage(operation: &'static str, reason: impl Into<String>) -> Error {
    Error::Usage { operation, reason: reason.into() }
}

fn checked_place(operation: &'static str, rank: usize, world_size: usize) -> Result<(c_int, c_int), Error> {
    let numbers = c_int::try_from(rank).ok().zip(c_int::try_from(world_size).ok());
    numbers
        .filter(|(rank, world_size)| rank < world_size)
        .ok_or_else(|| usage(operation, format!("there is no rank {rank} among {world_size}")))
}

/// Whether a job may run, after what has happened before it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Admission {
    /// Only if nothing has failed.
    Healthy,
    /// Also after a fatal error, if nobody has aborted and the owner answers.
    AfterFailure,
    /// Whatever has happened.
    Always,
}

/// When a call was made, and how long it may take.
#[derive(Clone, Copy)]
struct Deadline {
    start: Instant,
    timeout: Duration,
}

impl Deadline {
    fn remaining(self) -> Duration {
        self.timeout.saturating_sub(self.start.elapsed())
    }
}

type Job = Box<dyn FnOnce(&mut Owner) + Send>;

/// What callers and owner both see.
#[derive(Default)]
struct Shared {
    /// Somebody wants the end; set before `health` says why.
    interrupted: AtomicBool,
    revoked: AtomicBool,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    /// The first fatal error.
    cause: Option<Arc<Error>>,
    /// Why somebody wants the end.
    interruption: Option<String>,
    /// What the owner is at.
    running: Option<&'static str>,
}

impl Shared {
    fn health(&self) -> MutexGuard<'_, Health> {
        // Nothing that panics runs under this lock.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, admission: Admission) -> Result<(), Error> {
        let health = self.health();
        let stuck = health.cause.as_deref().is_some_and(|cause| matches!(cause, Error::Stuck { .. }));
        match (admission, &health.interruption, &health.cause) {
            (Admission::Always, ..) => Ok(()),
            (_, Some(reason), _) => Err(Error::Ended { reason: reason.clone() }),
            (Admission::AfterFailure, None, Some(_)) if !stuck => Ok(()),
            (_, None, Some(cause)) => Err(Error::Failing { cause: Arc::clone(cause) }),
            (_, None, None) => Ok(()),
        }
    }

    /// Keeps the first fatal error.
    fn note(&self, error: &Error) {
        if error.is_fatal() && !matches!(error, Error::Failing { .. } | Error::Ended { .. }) {
            self.health().cause.get_or_insert_with(|| Arc::new(error.clone()));
        }
    }
}

/// The callers' end of an owner.
struct OwnerLink {
    jobs: Sender<Job>,
    thread: Thread,
    shared: Arc<Shared>,
}

impl OwnerLink {
    fn start(library: &Arc<Library>, options: &Options) -> Result<Self, Error> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let shared = Arc::new(Shared::default());
        let mut owner = Owner { library: Arc::clone(library), shared: Arc::clone(&shared), handle: None };
        let thread = thread::Builder::new().name("paceline-nccl".to_owned());
        let thread = thread.spawn(move || {
            while let Some(job) = next(&queue, awake()) {
                job(&mut owner);
            }
            // Nobody can ask any more. It may hang: then it is this thread alone.
            if let Err(error) = owner.abort() {
                tracing::warn!(%error, "a communicator of NCCL was dropped and could not be aborted");
            }
        });
        let thread = thread.map_err(|error| Error::Thread { reason: error.to_string() })?.thread().clone();
        let link = Self { jobs, thread, shared };
        if let Some(prepare) = options.prepare.clone() {
            link.ask("the preparation of the thread", options.timeout, Admission::Healthy, move |_, _| {
                prepare().map_err(|reason| Error::Prepare { reason })
            })?;
        }
        Ok(link)
    }

    /// Has the owner do something, and waits for it.
    fn ask<T: Send + 'static>(
        &self,
        function: &'static str,
        timeout: Duration,
        admission: Admission,
        work: impl FnOnce(&mut Owner, Deadline) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.post(function, timeout, admission, work)?.wait()
    }

    /// Has the owner do something when it has done what was asked before.
    fn post<T: Send + 'static>(
        &self,
        function: &'static str,
        timeout: Duration,
        admission: Admission,
        work: impl FnOnce(&mut Owner, Deadline) -> Result<T, Error> + Send + 'static,
    ) -> Result<Answer<T>, Error> {
        self.shared.admit(admission)?;
        let deadline = Deadline { start: Instant::now(), timeout };
        let (tell, told) = mpsc::sync_channel(1);
        let job = move |owner: &mut Owner| {
            let outcome = owner.shared.admit(admission).and_then(|()| {
                owner.shared.health().running = Some(function);
                let outcome = work(owner, deadline);
                owner.shared.health().running = None;
                outcome
            });
            if let Err(error) = &outcome {
                owner.shared.note(error);
            }
            // Nobody waits for it if the caller has given up or does not care.
            let _ = tell.send(outcome);
        };
        // A closed channel is an owner that has panicked; so says the answer.
        let _ = self.jobs.send(Box::new(job));
        Ok(Answer { told, function, deadline, shared: Arc::clone(&self.shared) })
    }

    fn interrupt(&self, reason: &str) {
        self.shared.health().interruption.get_or_insert_with(|| reason.to_owned());
        self.shared.interrupted.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

impl Drop for OwnerLink {
    fn drop(&mut self) {
        self.interrupt("it was dropped");
    }
}

/// What a job will say.
struct Answer<T> {
    told: Receiver<Result<T, Error>>,
    function: &'static str,
    deadline: Deadline,
    shared: Arc<Shared>,
}

impl<T> Answer<T> {
    fn wait(self) -> Result<T, Error> {
        if let Some(outcome) = soon(&self.told, awake()).ok().flatten() {
            return outcome;
        }
        let patience = self.deadline.remaining().saturating_add(GRACE);
        match self.told.recv_timeout(patience) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => {
                let function = self.shared.health().running.unwrap_or(self.function);
                let error = Error::Stuck { function, elapsed: self.deadline.start.elapsed() };
                self.shared.note(&error);
                Err(error)
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::Ended { reason: format!("its thread ended in {}", self.function) })
            }
        }
    }
}

/// How long threads stay awake in this process.
fn awake() -> Duration {
    static AWAKE_HERE: LazyLock<Duration> = LazyLock::new(|| {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        if cpus >= ENOUGH_CPUS { AWAKE } else { Duration::ZERO }
    });
    *AWAKE_HERE
}

/// The next job; `None` when nobody can send one any more.
fn next(queue: &Receiver<Job>, awake: Duration) -> Option<Job> {
    match soon(queue, awake) {
        Ok(Some(job)) => Some(job),
        Ok(None) => queue.recv().ok(),
        Err(_) => None,
    }
}

/// What comes while the thread stays awake.
fn soon<T>(from: &Receiver<T>, awake: Duration) -> Result<Option<T>, TryRecvError> {
    if awake.is_zero() {
        return Ok(None);
    }
    let start = Instant::now();
    loop {
        match from.try_recv() {
            Err(TryRecvError::Empty) if start.elapsed() < awake => std::hint::spin_loop(),
            Err(TryRecvError::Empty) => return Ok(None),
            other => return other.map(Some),
        }
    }
}

/// The thread that calls NCCL.
struct Owner {
    library: Arc<Library>,
    shared: Arc<Shared>,
    /// None before it is made and after it has ended.
    handle: Option<Handle>,
}

impl Owner {
    fn handle(&self) -> Result<&Handle, Error> {
        self.handle.as_ref().ok_or_else(|| Error::Ended { reason: "it has been left".to_owned() })
    }

    fn place(&self) -> Result<Place, Error> {
        self.library.place(self.handle()?)
    }

    /// Waits until NCCL has nothing to do in the background for this communicator.
    fn settle(&self, function: &'static str, deadline: Deadline) -> Result<(), Error> {
        let handle = self.handle()?;
        let mut pause = FIRST_PAUSE;
        loop {
            match self.library.state(handle)? {
                ResultCode::SUCCESS => return Ok(()),
                ResultCode::IN_PROGRESS => {}
                code => return Err(self.library.failure(function, code, Some(handle))),
            }
            if self.shared.interrupted.load(Ordering::Acquire) {
                let reason = self.shared.health().interruption.clone().unwrap_or_default();
                return Err(Error::Ended { reason });
            }
            let remaining = deadline.remaining();
            if remaining.is_zero() {
                return Err(Error::TimedOut { function, elapsed: deadline.start.elapsed() });
            }
            thread::park_timeout(pause.min(remaining));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn abort(&mut self) -> Result<(), Error> {
        self.handle.take().map_or(Ok(()), |handle| self.library.abort(handle))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_is_received_awake_or_not_and_an_end_is_noticed() {
        for awake in [Duration::ZERO, AWAKE] {
            let (sender, queue) = mpsc::channel::<Job>();
            let (tell, told) = mpsc::channel();
            let owner = thread::spawn(move || std::iter::from_fn(|| next(&queue, awake)).count());
            for number in 0..3 {
                let tell = tell.clone();
                sender
                    .send(Box::new(move |_| tell.send(number).expect("it is awaited")))
                    .expect("it listens");
                // Long enough for it to fall asleep, once.
                thread::sleep(if number == 1 { 10 * AWAKE } else { Duration::ZERO });
            }
            drop((sender, tell));
            assert_eq!(owner.join().expect("it does not panic"), 3);
            assert_eq!(soon::<i32>(&told, AWAKE), Err(TryRecvError::Disconnected), "nobody has run the jobs");
        }
    }
}
