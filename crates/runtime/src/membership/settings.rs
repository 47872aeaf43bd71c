//! What a job and its launchers agree on before they start.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::view::Mode;

/// How a side that was cut off is kept from going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Fence {
    /// The launchers vote, and more than half go on (see [`View::quorum`](super::View::quorum)).
    Majority,
    /// A compare-and-swap on an object outside of the job decides, so that any side may go on, but only one.
    Lease,
}

/// How a worker gets the steps that others have made without it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CatchUp {
    /// By their results, which it applies as the others have: then all have the same bits.
    #[default]
    Results,
    /// By a whole state of a member that has applied them. Nothing is applied twice, and members need not have the same bits.
    State,
}

/// The same for all launchers and workers of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Job {
    /// How many launchers the job is founded with; their seats are 0 to that.
    pub seats: u32,
    /// How many workers each launcher starts.
    pub workers_per_launcher: u16,
    /// The number of logical workers.
    pub slots: u16,
    /// How many workers have no slot while all are there: each adopts those of one that is lost.
    pub spares: u16,
    /// What becomes of a lost worker's slots.
    pub mode: Mode,
    /// How a worker gets the steps that it has not made.
    pub catch_up: CatchUp,
    /// What decides an epoch.
    pub fence: Fence,
    /// How long to wait for what.
    pub timing: Timing,
}

impl Job {
    /// The most workers that have slots at a time; at least one, however many spares there are to be.
    pub fn contributors(&self) -> usize {
        let workers = self.seats as usize * usize::from(self.workers_per_launcher);
        workers.saturating_sub(self.spares.into()).max(1)
    }
}

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Timing {
    /// How often members say that they are alive.
    pub heartbeat: Duration,
    /// How long one may be silent.
    pub suspect: Duration,
    /// How long a lost link may take to come back; less than `suspect`.
    pub link_grace: Duration,
    /// How long a leader with a quorum waits for the others' promises, and a launcher, half as long, for its workers'
    /// reports; more than a heartbeat, so that nobody is left out who lives. Those who are suspected are not waited for.
    pub promise_wait: Duration,
    /// After how long what was not answered is sent again; less than half of `promise_wait`, or one lost message
    /// costs a launcher its place.
    pub resend: Duration,
    /// How long an epoch's end may take before another launcher leads; the one of index i waits i + 1 times.
    pub takeover: Duration,
    /// How long a launcher waits for a quorum, or for a worker that holds the state, before it gives up.
    pub give_up: Duration,
}

impl Default for Timing {
    /// For a network where a round trip takes milliseconds and a busy machine may be late by tens of them.
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            heartbeat: ms(100),
            suspect: ms(500),
            link_grace: ms(400),
            promise_wait: ms(250),
            resend: ms(20),
            takeover: ms(200),
            give_up: ms(10_000),
        }
    }
}
