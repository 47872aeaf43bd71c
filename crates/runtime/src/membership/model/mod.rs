//! The exhaustive check: every order of events of small jobs, over the same core that runs in production.
//!
//! A node is a launcher and its worker, which fail together or the worker alone. Anybody may be suspected at any time, as
//! often as [`Bounds`] say. A collective completes at a worker once all members of its view have contributed, in one epoch.
//! Time does not pass, but each launcher may lose its patience a bounded number of times: then it leads, or goes on
//! without what it was waiting for.
//!
//! # What comes in
//! - A worker that has died is replaced by a process without a state, under the same launcher.
//! - A worker, or a launcher with its worker, that was removed draws another incarnation and comes back, the worker with
//!   the state that it has.
//! - A launcher that has crashed is started again, with a worker without a state; it seeks the others.
//! - A node, or its worker, may be missing in the first view, which makes the way to a join short: see [`Missing`].
//!
//! All of them pull a stable state and enter by a view change. `joins` bounds how many of them there are; whoever is removed
//! after that, or in the last epoch, stays away.
//!
//! # What may happen to messages
//! - Those between launchers form a set from which nothing is taken away: they may be lost (never delivered), repeated,
//!   late and out of order, and may reach whoever has the seat by then.
//! - So do messages between workers and the states and results that newcomers are sent, which go to one incarnation.
//!   Connections repeat nothing, so there is more here than in reality.
//! - The pipe between a launcher and its worker is in order. With [`Pipes::Instant`] it is empty between events.
//!
//! # What is atomic
//! - The first and the last collective of a step, at one worker; at another one they may complete later, or never. The
//!   gradients are there as soon as they are asked for.
//! - A member that lacks the state of its view asks and has it at once and whole, from any member that answers; or never.
//! - A new incarnation is there as soon as it is asked for. A launcher that seeks has its worker.
//! - The copy of a state is made when the core says that it is to be sent, and is under way from then on.
//!
//! # What is not in here
//! Founding a job, leases, spares, requests to leave, and whatever depends on how long something takes: resting before
//! one enters again ends at any time, a newcomer always comes at the beginning of a step. Heartbeats are not sent, so no
//! launcher knows how far others are. In the last epoch nobody enters any more, so that what workers say to newcomers is not
//! heard there; and `Soon` is said only where a newcomer may ask again. The simulator has all of that.

mod checks;
mod situation;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use stateright::{Checker, HasDiscoveries, Model, Property};

use self::situation::{Origin, Situation};
use super::launcher::LauncherEvent;
use super::message::{Decision, Envelope, Message};
use super::mutation::Mutation;
use super::progress::{Resolution, Step};
use super::settings::{CatchUp, Fence, Job, Timing};
use super::view::{Epoch, Incarnation, Member, Mode, Seat, View, Voter};
use super::worker::Worker;

/// Longer than all that is waited for in a view, and shorter than any silence.
const PATIENCE: Duration = Duration::from_secs(1_000);
const NEVER: Duration = Duration::from_secs(1_000_000);

#[derive(Clone, Copy, Debug)]
struct Bounds {
    nodes: u32,
    missing: Missing,
    steps: u64,
    view_changes: u64,
    rounds: u32,
    crashes: u8,
    /// How often anybody may be suspected, dead or not, a worker by another one too; if that is not said any launcher by any
    /// other one, as often as there is a view to end.
    suspicions: Option<u8>,
    /// How many processes are started in the place of others, or come back after they were removed.
    joins: u8,
    /// How often each launcher may lose its patience.
    impatience: u8,
    /// How often each worker that wants to come in asks again.
    questions: u8,
    catch_up: CatchUp,
    pipes: Pipes,
    mutation: Mutation,
}

/// What of the last node is not in the first view, and is about to come in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Missing {
    Nothing,
    Worker,
    Node,
}

/// Whether what a launcher and its worker say to each other may be under way while other things happen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pipes {
    Slow,
    Instant,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// A message to a launcher, or to a worker, by its place among those there are.
    Deliver(usize),
    Hear(usize),
    Down(usize),
    Up(usize),
    Complete(usize),
    Fetch(usize),
    Suspect(usize, usize),
    /// A worker says that the link to another one is lost for good.
    Accuse(usize, usize),
    LosePatience(usize),
    /// A launcher in no view seeks the job and asks to enter, however short its rest was.
    Seek(usize),
    /// A worker that wants to come in does not wait for an answer any longer.
    AskAgain(usize),
    CrashNode(usize),
    CrashWorker(usize),
    ReplaceWorker(usize),
    RestartNode(usize),
}

/// Those of the first view are of life 0; each admission is another life.
fn launcher_id(node: u32, life: u8) -> Incarnation {
    Incarnation(1000 * u128::from(life) + 100 + u128::from(node))
}

fn worker_id(node: u32, life: u8) -> Incarnation {
    Incarnation(1000 * u128::from(life) + 200 + u128::from(node))
}

fn came_later(incarnation: Incarnation) -> bool {
    incarnation.0 >= 1000
}

impl Bounds {
    fn job(&self) -> Job {
        let timing = Timing {
            heartbeat: NEVER,
            suspect: NEVER,
            link_grace: NEVER,
            promise_wait: PATIENCE,
            resend: NEVER,
            takeover: PATIENCE,
            give_up: NEVER,
        };
        let (mode, catch_up, fence) = (Mode::Shrink, self.catch_up, Fence::Majority);
        let (slots, spares) = (self.nodes as u16, 0);
        Job { seats: self.nodes, workers_per_launcher: 1, slots, spares, mode, catch_up, fence, timing }
    }

    /// Whether the launcher and the worker of a node are in the first view.
    fn begins_with(&self, node: u32) -> (bool, bool) {
        let last = node + 1 == self.nodes;
        (!last || self.missing != Missing::Node, !last || self.missing == Missing::Nothing)
    }

    fn first_view(&self) -> Decision {
        let voter = |n: u32| Voter { seat: Seat(n), incarnation: launcher_id(n, 0) };
        let member = |n: u32| Member {
            incarnation: worker_id(n, 0),
            launcher: launcher_id(n, 0),
            slots: vec![n as u16],
        };
        let voters = (0..self.nodes).filter(|&n| self.begins_with(n).0).map(voter).collect();
        let members: Vec<Member> = (0..self.nodes).filter(|&n| self.begins_with(n).1).map(member).collect();
        let sources = members.iter().map(|member| member.incarnation).collect();
        let resolution = Resolution { applied: Step(0), lineage: 0, sources };
        Decision { view: View { epoch: Epoch(1), voters, members }, resolution }
    }

    fn last_epoch(&self) -> Epoch {
        Epoch(1 + self.view_changes)
    }

    /// Whether there is ever anybody who is not in the first view.
    fn has_joins(&self) -> bool {
        self.joins > 0 || self.missing != Missing::Nothing
    }

    /// Whether another one may come in: not in the last epoch, which no other one follows.
    fn admits(&self, state: &Situation) -> bool {
        state.joins < self.joins && state.newest_epoch() < self.last_epoch()
    }

    fn wants_to_enter(&self, worker: &Worker) -> bool {
        let is_outside = |known: &Decision| known.view.member(worker.incarnation()).is_none();
        worker.epoch() < self.last_epoch() && worker.decision().is_some_and(is_outside)
    }

    fn actions_of_node(&self, state: &Situation, index: usize, actions: &mut Vec<Action>) {
        let node = &state.nodes[index];
        if node.worker.is_some() && !node.down.is_empty() {
            actions.push(Action::Down(index));
        }
        if state.is_complete(index).is_some() {
            actions.push(Action::Complete(index));
        }
        actions.push(Action::Fetch(index));
        if node.worker.is_some() && state.crashes < self.crashes {
            actions.push(Action::CrashWorker(index));
        }
        if node.questions < self.questions && node.worker.as_ref().is_some_and(|w| self.wants_to_enter(w)) {
            actions.push(Action::AskAgain(index));
        }
        let Some(launcher) = &node.launcher else {
            if self.admits(state) {
                actions.push(Action::RestartNode(index));
            }
            return;
        };
        if !node.up.is_empty() {
            actions.push(Action::Up(index));
        } else if node.worker.is_none() && self.admits(state) {
            actions.push(Action::ReplaceWorker(index));
        }
        if state.crashes < self.crashes {
            actions.push(Action::CrashNode(index));
        }
        if launcher.epoch() < self.last_epoch() {
            let others = (0..state.nodes.len()).filter(|&other| other != index);
            if self.suspicions.is_none_or(|most| state.suspicions < most) {
                actions.extend(others.clone().map(|other| Action::Suspect(index, other)));
            }
            if self.suspicions.is_some_and(|most| state.suspicions < most) {
                actions.extend(others.map(|other| Action::Accuse(index, other)));
            }
            if launcher.view().is_none() && node.seeks < self.joins {
                actions.push(Action::Seek(index));
            }
            if launcher.view().is_some() && node.impatience < self.impatience {
                actions.push(Action::LosePatience(index));
            }
        }
    }
}

impl Model for Bounds {
    type State = Situation;
    type Action = Action;

    fn init_states(&self) -> Vec<Situation> {
        vec![Situation::first(self)]
    }

    fn actions(&self, state: &Situation, actions: &mut Vec<Action>) {
        if state.violation.is_some() {
            return;
        }
        actions.extend((0..state.messages.len()).map(Action::Deliver));
        let is_heard = |place: &usize| state.is_heard(self, *place);
        actions.extend((0..state.packets.len()).filter(is_heard).map(Action::Hear));
        (0..state.nodes.len()).for_each(|index| self.actions_of_node(state, index, actions));
    }

    fn next_state(&self, before: &Situation, action: Action) -> Option<Situation> {
        let mut state = before.clone();
        match action {
            Action::Deliver(place) => {
                let (to, envelope) = before.messages.iter().nth(place)?.clone();
                state.tell_launcher(self, to.0 as usize, LauncherEvent::Message(envelope));
            }
            Action::Hear(place) => state.hear(self, place),
            Action::Down(index) => state.down(self, index),
            Action::Up(index) => state.up(self, index),
            Action::Complete(index) => state.complete(self, index)?,
            Action::Fetch(index) => state.fetch(self, index),
            Action::Suspect(index, other) => state.suspect(self, index, other)?,
            Action::Accuse(index, other) => state.accuse(self, index, other)?,
            Action::LosePatience(index) => {
                state.node(index).impatience += 1;
                state.tell_launcher(self, index, LauncherEvent::Tick);
            }
            Action::Seek(index) => {
                state.node(index).seeks += 1;
                state.tell_launcher(self, index, LauncherEvent::Tick);
            }
            Action::AskAgain(index) => state.ask_again(self, index),
            Action::CrashNode(index) => {
                state.crashes += 1;
                state.end(index);
            }
            Action::CrashWorker(index) => state.crash_worker(index),
            Action::ReplaceWorker(index) => {
                state.joins += 1;
                state.begin_worker(self, index, None);
            }
            Action::RestartNode(index) => {
                state.joins += 1;
                state.begin_launcher(self, index);
                state.begin_worker(self, index, None);
            }
        }
        while self.pipes == Pipes::Instant && !state.is_quiet() {
            state.drain_pipes(self);
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(NO_VIOLATION, |_, state: &Situation| state.violation.is_none()),
            Property::sometimes(A_VIEW_FOLLOWS, |_, state: &Situation| state.decisions.len() > 1),
            Property::sometimes(A_STEP_IS_STABLE, |_, state: &Situation| !state.stable.is_empty()),
            Property::sometimes(A_STEP_IS_FETCHED, |_, state: &Situation| {
                let behind = |d: &Decision| d.resolution.sources.len() < d.view.members.len();
                state.decisions.values().any(behind)
            }),
            Property::sometimes(A_NEW_WORKER_RUNS, |_, state: &Situation| {
                state.runs(Origin::Started, Origin::First)
            }),
            Property::sometimes(A_NEW_NODE_RUNS, |_, state: &Situation| {
                state.runs(Origin::Started, Origin::Started)
            }),
            Property::sometimes(A_REMOVED_WORKER_RUNS, |_, state: &Situation| {
                state.runs(Origin::Drawn, Origin::First)
            }),
            Property::sometimes(A_REMOVED_NODE_RUNS, |_, state: &Situation| {
                state.runs(Origin::Drawn, Origin::Drawn)
            }),
            Property::sometimes(A_NEW_LAUNCHER_VOTES, |_, state: &Situation| {
                state.accepted.iter().any(|(_, _, launcher, _)| came_later(*launcher))
            }),
        ]
    }

    fn within_boundary(&self, state: &Situation) -> bool {
        let rounds = |envelope: &Envelope| match envelope.message {
            Message::Wedge { ballot, .. } | Message::Propose { ballot, .. } => ballot.round <= self.rounds,
            _ => true,
        };
        state.messages.iter().all(|(_, envelope)| rounds(envelope))
            && state.newest_epoch() <= self.last_epoch()
    }
}

const NO_VIOLATION: &str = "no invariant is violated";
const A_VIEW_FOLLOWS: &str = "a view follows";
const A_STEP_IS_STABLE: &str = "a step is stable";
const A_STEP_IS_FETCHED: &str = "a step is fetched";
const A_NEW_WORKER_RUNS: &str = "a worker that was started later runs a step";
const A_NEW_NODE_RUNS: &str = "a node that was started later runs a step";
const A_REMOVED_WORKER_RUNS: &str = "a worker that was removed alone runs a step again";
const A_REMOVED_NODE_RUNS: &str = "a node that was removed runs a step again";
const A_NEW_LAUNCHER_VOTES: &str = "a launcher that came in votes";

/// What came of exploring.
struct Explored {
    states: usize,
    /// Whether that was all of them.
    whole: bool,
    violation: Option<String>,
    /// Which of the situations were seen that there should be.
    reached: BTreeSet<&'static str>,
}

impl Bounds {
    /// Explores until that many states have been generated, or an invariant is violated.
    fn explore(self, limit: usize) -> Explored {
        let checker = self.checker().threads(2).finish_when(HasDiscoveries::AnyFailures);
        let checker = checker.target_state_count(limit).spawn_bfs().join();
        let mut found = checker.discoveries();
        let violation = found.remove(NO_VIOLATION).map(|path| {
            let last = path.last_state().violation.unwrap_or("nothing");
            format!("{last}, after {:?}", path.into_actions())
        });
        Explored {
            states: checker.unique_state_count(),
            whole: checker.state_count() < limit,
            violation,
            reached: found.into_keys().collect(),
        }
    }
}
