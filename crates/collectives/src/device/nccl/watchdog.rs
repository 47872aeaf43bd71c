//! What is between its call and its end on the device, and the watchdog that looks at it.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use paceline_nccl as nccl;

use crate::device::{Device, DeviceError, Event};
use crate::dtype::DType;
use crate::error::Error;
use crate::operation::{Kind, Operation};
use crate::recorder::{RecordsOnDevice, Ticket};

/// How often the watchdog looks while something runs: often enough that a failure is known within the tenth of a
/// second that a person does not notice, seldom enough to cost nothing.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The same while somebody waits for the end.
const LAST_LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// How long an abort may take before its thread is given up.
const ABORT_LIMIT: Duration = Duration::from_secs(10);

/// Ends a group's operations from any thread, for whoever hears that a rank is dead. Cheap to clone.
#[derive(Clone)]
pub struct Aborter {
    pub(super) shared: Weak<Shared>,
}

pub(super) struct Shared {
    pub(super) group: nccl::Communicator,
    pub(super) device: Mutex<Box<dyn Device>>,
    pub(super) flight: Mutex<Flight>,
    /// Something was enqueued, or the group ends.
    pub(super) news: Condvar,
    pub(super) timeout: Duration,
    pub(super) records: RecordsOnDevice,
}

/// What is between its call and its end on the device.
#[derive(Default)]
pub(super) struct Flight {
    pub(super) running: VecDeque<Running>,
    /// Events that are not in use.
    events: Vec<Event>,
    pub(super) failed: Option<Error>,
    /// Whether the watchdog is to end.
    ending: bool,
}

impl Flight {
    fn is_over(&self) -> bool {
        self.failed.is_some() || (self.ending && self.running.is_empty())
    }
}

pub(super) struct Running {
    pub(super) operation: Operation,
    pub(super) ticket: Ticket,
    pub(super) started: Instant,
    pub(super) end: Event,
    /// Freed when the operation has run.
    pub(super) held: Vec<Box<dyn Any + Send>>,
}

impl Aborter {
    /// Ends the operations that run, and every later call, with this reason. Blocks until NCCL has given them up, for 10
    /// seconds at most.
    pub fn abort(&self, reason: &str) {
        let Some(shared) = self.shared.upgrade() else { return };
        // What has run by now has nothing to do with it; a device that fails here is found by the watchdog too.
        let _ = shared.let_go();
        let operation = shared.flight().running.front().map(|running| running.operation);
        let operation = operation.unwrap_or(Operation {
            number: 0,
            kind: Kind::Barrier,
            dtype: DType::U8,
            count: 0,
            segment_len: 0,
            schedule: 0,
        });
        shared.fail(operation, reason);
    }
}

impl fmt::Debug for Aborter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aborter").finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn device(&self) -> MutexGuard<'_, Box<dyn Device>> {
        lock(&self.device)
    }

    pub(super) fn flight(&self) -> MutexGuard<'_, Flight> {
        lock(&self.flight)
    }

    pub(super) fn event(&self) -> Result<Event, DeviceError> {
        let free = self.flight().events.pop();
        free.map_or_else(|| self.device().new_event(), Ok)
    }

    /// The watchdog: lets go what has run, and ends everything when something has failed or takes too long.
    pub(super) fn watch(&self) {
        while let Some(oldest) = self.next_look() {
            if let Err((operation, reason)) = self.look(oldest) {
                self.fail(operation, &reason);
                return;
            }
        }
    }

    /// Has the watchdog end when all has run.
    pub(super) fn end(&self) {
        self.flight().ending = true;
        self.news.notify_all();
    }

    /// Waits until it is time to look at what runs, and returns the oldest; `None` at the end.
    fn next_look(&self) -> Option<(Operation, Instant)> {
        let idle = |flight: &mut Flight| flight.running.is_empty() && !flight.is_over();
        let flight = self.news.wait_while(self.flight(), idle).unwrap_or_else(PoisonError::into_inner);
        let interval = if flight.ending { LAST_LOOK_INTERVAL } else { LOOK_INTERVAL };
        // What has just been enqueued need not be looked at.
        let ending = flight.ending;
        let runs = move |flight: &mut Flight| !flight.is_over() && flight.ending == ending;
        let waited = self.news.wait_timeout_while(flight, interval, runs);
        let flight = waited.unwrap_or_else(PoisonError::into_inner).0;
        if flight.failed.is_some() {
            return None;
        }
        flight.running.front().map(|oldest| (oldest.operation, oldest.started))
    }

    fn look(&self, (operation, started): (Operation, Instant)) -> Result<(), (Operation, String)> {
        self.let_go().map_err(|error| (operation, error.to_string()))?;
        self.group.check().map_err(|error| (operation, error.to_string()))?;
        let still_running = self.flight().running.front().is_some_and(|oldest| oldest.started == started);
        if still_running && started.elapsed() >= self.timeout {
            let reason = format!("it has not run after {} ms", self.timeout.as_millis());
            return Err((operation, reason));
        }
        Ok(())
    }

    /// Frees what operations held that have run, in their order.
    fn let_go(&self) -> Result<(), DeviceError> {
        loop {
            let Some(end) = self.flight().running.front().map(|oldest| oldest.end) else { return Ok(()) };
            if !self.device().is_done(end)? {
                return Ok(());
            }
            let mut flight = self.flight();
            let done = flight.running.pop_front();
            let ring = &self.records.group.ring;
            done.iter().for_each(|done| ring.end(done.ticket));
            flight.running.front().into_iter().for_each(|next| ring.start(next.ticket));
            flight.events.push(end);
            drop(flight);
            // Not under the lock: what is freed may do anything.
            drop(done);
        }
    }

    /// Notes the first failure, and aborts. Returns the error that every call has from now on.
    pub(super) fn fail(&self, operation: Operation, reason: &str) -> Error {
        let error = Error::Interrupted { operation, reason: reason.to_owned() };
        let running = {
            let mut flight = self.flight();
            if let Some(first) = &flight.failed {
                return first.clone();
            }
            flight.failed = Some(error.clone());
            std::mem::take(&mut flight.running)
        };
        tracing::warn!(rank = self.group.rank(), %operation, reason, "a group on NCCL has failed");
        if let Err(stuck) = self.group.abort(reason, ABORT_LIMIT) {
            tracing::error!(rank = self.group.rank(), %stuck, "NCCL does not give up what runs: end this process");
            // The device may still use it.
            std::mem::forget(running);
        }
        // Last, since it may write a file.
        self.records.flight_recorder.failed(&error);
        error
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves a consistent state.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
