//! Who is a member of a job, and what becomes of a step when a member is lost.
//!
//! This is the protocol as a value: [`Launcher`] and [`Worker`] take events in, with the time, and say what
//! to do. There is no socket, no clock and no randomness in here, so the same code runs under real I/O and
//! under the seeded simulator. `elastic` drives it. docs/fault-tolerance.md has the
//! protocol, its invariants and the test that shows each.
//!
//! ```text
//! worker                    its launcher                  the leader, a launcher   the other launchers
//!                           Suspect{who, why}      ─────▶
//!                                                         Wedge{ballot}     ─────▶
//! stops  ◀───── Wedge
//!        ─────▶ Report{how far}
//!                           Promise{reports, …}    ─────▶                   ◀───── Promise
//!                                                         Propose{decision} ─────▶
//!                                                                           ◀───── Accepted
//! Open   ◀───── Install    ◀─────                         Install{decision} ─────▶
//! ```
//! # Why no step is lost
//! The first collective of step s + 1 completes only when every member has contributed to it, and a member
//! contributes only after it has applied step s. So a worker that sees it complete knows that all have applied
//! s: the step is *stable*, and only stable steps are shown outside. No message is spent on it.
//!
//! An epoch ends by consensus among the launchers of its view: one Paxos per epoch, whose value is the next
//! view with the step that it begins after. The leader takes the longest history that any holder among the new
//! members reports. A holder's report is made after it has stopped, and it is at or beyond every stable step;
//! so nothing stable is left out, whoever is missing. Members that lack the last step fetch its result; if
//! nobody left has applied the step in flight, it is run again from the kept inputs. An absent member may have
//! applied it all the same; it cannot have shown it, and it takes its state from the view when it returns.
//!
//! # Why there is one history
//! Two quorums of a view meet ([`View::quorum`]), so an epoch has one successor. A worker takes data of its own
//! epoch only ([`Worker::accepts`]). An incarnation that was removed is not used again: a process that learns
//! that it was, or that cannot know that it was not, draws another.
//!
//! | part | what it is |
//! |---|---|
//! | `view` | views, quorums, who computes which slots |
//! | `progress` | how far a worker is; how a view change settles the step in flight |
//! | `message` | what is said, and its form on the wire |
//! | `launcher` | voting, leading, evidence (`campaign`), founding and entering a job (`outside`) |
//! | `worker` | the step rule, catching up |
//! | `samples` | which batch a slot takes |
//! | `settings` | what a job agrees on |
//! | `mutation` | defects on purpose, for the simulator |
//! | `sim` | the simulator, its faults and its checks (tests only) |
//! | `model` | every order of events of small jobs (tests only) |

mod launcher;
mod message;
#[cfg(test)]
mod model;
mod mutation;
mod progress;
mod samples;
mod settings;
#[cfg(test)]
mod sim;
mod view;
mod worker;

pub use launcher::{Child, Launcher, LauncherAction, LauncherEvent};
pub use message::{
    Ballot, Checked, Decision, Envelope, Evidence, FromWorker, MAX_SOURCES, MAX_STRIPES, Message,
    PeerMessage, Stripe, ToWorker, Transfer, decode, encode,
};
pub use progress::{Progress, Report, Resolution, Step};
pub use samples::Ledger;
pub use settings::{CatchUp, Fence, Job, Timing};
pub use view::{
    Epoch, Incarnation, MAX_LAUNCHERS, MAX_SLOTS, MAX_WORKERS, Member, Mode, Seat, Slot, View, Voter, deal,
};
pub use worker::{Worker, WorkerAction, WorkerEvent};
