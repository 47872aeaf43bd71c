//! The flight recorder: what a communicator did last, to be read after a failure or while it hangs.
//!
//! Always on. It remembers the last 2,000 operations of each communicator with kind, size, state and times, and does
//! no I/O: a [`Trace`] is a value, and whoever owns the process decides where it goes. It may be taken at any moment
//! from any thread, also while another hangs in an operation.

mod ring;
mod ticks;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::SystemTime;

pub(crate) use ring::{Ring, Ticket};
use ticks::Moment;

use crate::error::Error;
use crate::operation::{Kind, Operation};

/// Reads what a communicator, and those that were split from it, did last. Cheap to clone; outliving the
/// communicator is harmless.
#[derive(Clone)]
pub struct FlightRecorder {
    family: Arc<Family>,
}

/// The communicators that are split from one.
pub(crate) struct Family {
    since: Moment,
    groups: Mutex<Vec<Weak<Group>>>,
    observer: Mutex<Option<Observer>>,
    /// What the first communicator that failed has failed of.
    failure: OnceLock<String>,
}

type Observer = Arc<dyn Fn(&FlightRecorder) + Send + Sync>;

/// One communicator's part.
pub(crate) struct Group {
    id: u64,
    /// Its ranks, as the communicator that all are split from numbers them.
    members: Vec<usize>,
    rank: usize,
    on_device: bool,
    pub(crate) ring: Ring,
}

/// What the communicators of a rank did last.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Trace {
    /// The rank in the communicator that the others are split from.
    pub rank: usize,
    /// When it was taken.
    pub taken: SystemTime,
    /// The fatal error of the first of the communicators that has failed, if one has.
    pub failure: Option<String>,
    /// Each communicator's operations, in the order in which they were formed.
    pub groups: Vec<GroupTrace>,
}

/// What one communicator did last.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupTrace {
    /// Equal on its ranks; 0 for the communicator that the others are split from.
    pub id: u64,
    /// Its ranks, by their numbers in that communicator.
    pub members: Vec<usize>,
    /// Whether NCCL runs its operations on a device. They count as started when all before them have run, and the end of
    /// one is known a look of the watchdog later, 50 ms at most.
    pub on_device: bool,
    /// In the order in which they were issued, 2,000 at most.
    pub records: Vec<Record>,
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// What was called.
    pub operation: Operation,
    /// For a message, its number among those from its sender to its receiver, from 1; 0 for a collective.
    pub message: u32,
    /// When it was called.
    pub issued: SystemTime,
    /// When it began to run; `None` while it waits for those that were started before.
    pub started: Option<SystemTime>,
    /// When it had ended well; `None` before that, and for good after an error.
    pub ended: Option<SystemTime>,
}

impl FlightRecorder {
    pub(crate) fn new() -> Self {
        let (groups, observer) = (Mutex::default(), Mutex::default());
        Self { family: Arc::new(Family { since: Moment::now(), groups, observer, failure: OnceLock::new() }) }
    }

    /// Adds a communicator; its part is forgotten when it is dropped.
    pub(crate) fn add(&self, id: u64, members: Vec<usize>, rank: usize) -> Arc<Group> {
        self.insert(Group { id, members, rank, on_device: false, ring: Ring::new() })
    }

    /// Adds a group on NCCL, likewise.
    pub(crate) fn add_on_device(&self, id: u64, members: Vec<usize>, rank: usize) -> Arc<Group> {
        self.insert(Group { id, members, rank, on_device: true, ring: Ring::new() })
    }

    fn insert(&self, group: Group) -> Arc<Group> {
        let group = Arc::new(group);
        let mut groups = lock(&self.family.groups);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(&group));
        group
    }

    /// What happened last. Does not block, whatever the communicator is at; takes about a millisecond.
    pub fn trace(&self) -> Trace {
        let (now, since) = (Moment::now(), self.family.since);
        let groups: Vec<Arc<Group>> = lock(&self.family.groups).iter().filter_map(Weak::upgrade).collect();
        let time = |ticks| since.time_at(now, ticks);
        let record = |entry: ring::Entry| Record {
            operation: entry.operation,
            message: entry.message,
            issued: time(entry.issued),
            started: entry.started.map(time),
            ended: entry.ended.map(time),
        };
        let traces = groups.iter().map(|group| GroupTrace {
            id: group.id,
            members: group.members.clone(),
            on_device: group.on_device,
            records: group.ring.entries().into_iter().map(record).collect(),
        });
        let rank = groups.first().map_or(0, |group| group.members[group.rank]);
        let failure = self.family.failure.get().cloned();
        Trace { rank, taken: now.time, failure, groups: traces.collect() }
    }

    /// Has `observer` called with this recorder when one of the communicators fails: on the thread that runs the failing
    /// operation, once the other ranks have been told. It may take a moment, for instance to write a file. Replaces
    /// an earlier observer. One that keeps a recorder of its own keeps it for as long as the process.
    pub fn on_failure(&self, observer: impl Fn(&FlightRecorder) + Send + Sync + 'static) {
        *lock(&self.family.observer) = Some(Arc::new(observer));
    }

    /// A communicator has failed.
    pub(crate) fn failed(&self, error: &Error) {
        self.family.failure.get_or_init(|| error.to_string());
        let observer = lock(&self.family.observer).clone();
        if let Some(observer) = observer {
            observer(self);
        }
    }
}

impl fmt::Debug for FlightRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlightRecorder").finish_non_exhaustive()
    }
}

impl Group {
    /// Its ranks, as the communicator that all are split from numbers them.
    pub(crate) fn members(&self) -> &[usize] {
        &self.members
    }

    /// Another operation that was issued here under the number of `theirs`.
    pub(crate) fn other_call(&self, theirs: &Operation) -> Option<Operation> {
        let calls = self.ring.entries().into_iter().rev().map(|entry| entry.operation);
        calls.into_iter().find(|ours| ours.number == theirs.number && ours != theirs)
    }
}

/// Where a group on NCCL notes its operations, beside those of the communicator that has formed it.
#[derive(Clone)]
pub(crate) struct RecordsOnDevice {
    pub(crate) flight_recorder: FlightRecorder,
    pub(crate) group: Arc<Group>,
}

impl RecordsOnDevice {
    /// Of a group that nothing else is recorded beside.
    pub(crate) fn alone(rank: usize, world_size: usize) -> Self {
        let flight_recorder = FlightRecorder::new();
        let group = flight_recorder.add_on_device(0, (0..world_size).collect(), rank);
        Self { flight_recorder, group }
    }
}

/// Notes the calls of one communicator, in order.
pub(crate) struct Recorder {
    pub(crate) group: Arc<Group>,
    last: Option<Ticket>,
    /// How many messages went to and came from each rank, once there is one.
    messages: Vec<[u32; 2]>,
}

impl Recorder {
    pub(crate) fn new(group: Arc<Group>) -> Self {
        Self { group, last: None, messages: Vec::new() }
    }

    /// Notes a call.
    #[inline]
    pub(crate) fn issue(&mut self, operation: Operation) -> Ticket {
        let message = match operation.kind {
            Kind::Message { from, to } => self.count_message(from, to),
            _ => 0,
        };
        let ticket = self.group.ring.issue(self.last, operation, message);
        self.last = Some(ticket);
        ticket
    }

    /// Takes back the last call, which was refused and has no effect.
    pub(crate) fn withdraw(&mut self, operation: Operation, ticket: Ticket) {
        self.group.ring.withdraw(ticket);
        if let Kind::Message { from, to } = operation.kind {
            let count = self.messages_with(from, to);
            *count = count.wrapping_sub(1);
        }
    }

    fn count_message(&mut self, from: usize, to: usize) -> u32 {
        let count = self.messages_with(from, to);
        *count = count.wrapping_add(1);
        *count
    }

    /// How many there were so far.
    fn messages_with(&mut self, from: usize, to: usize) -> &mut u32 {
        self.messages.resize(self.group.members.len(), [0; 2]);
        let sends = usize::from(from == self.group.rank);
        let peer = if sends == 1 { to } else { from };
        &mut self.messages[peer][sends]
    }

    /// Forgets all calls.
    pub(crate) fn clear(&mut self) {
        self.messages.clear();
        self.group.ring.clear();
        self.last = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section is one read or one write.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
