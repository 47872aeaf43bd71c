//! The exhaustive check: every order of events of small jobs, over the same core that runs in production.
//!
//! A node is a launcher and its worker, which fail together or the worker alone. Messages between launchers
//! form a set from which nothing is taken away, so they may be lost (never delivered), duplicated and
//! reordered; the pipe between a launcher and its worker is in order. Anybody may be suspected at any time.
//! A collective completes at a worker once all members of its view have contributed, in one epoch. Time does
//! not pass, but each launcher may lose its patience a bounded number of times: then it leads, or goes on
//! without what it was waiting for. What was removed does not come back; joins are left to the simulator.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use stateright::{Checker, Model, Property};

use super::launcher::{Child, Launcher, LauncherAction, LauncherEvent};
use super::message::{Ballot, Decision, Envelope, Evidence, Message, PeerMessage, Stripe, ToWorker};
use super::mutation::Mutation;
use super::progress::{Progress, Resolution, Step};
use super::settings::{CatchUp, Fence, Job, Timing};
use super::view::{Epoch, Incarnation, Member, Mode, Seat, View, Voter};
use super::worker::{Worker, WorkerAction, WorkerEvent};

const CHILD: Child = Child(0);
const NEVER: Duration = Duration::from_secs(1_000_000);
const PATIENCE: Duration = Duration::from_secs(1_000);

#[derive(Clone, Copy, Debug)]
struct Bounds {
    nodes: u32,
    steps: u64,
    view_changes: u64,
    rounds: u32,
    crashes: u8,
    /// How often each launcher may lose its patience.
    impatience: u8,
    pipes: Pipes,
    mutation: Mutation,
}

/// Whether what a launcher and its worker say to each other may be under way while other things happen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pipes {
    Slow,
    Instant,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    launcher: Option<Launcher>,
    worker: Option<Worker>,
    down: VecDeque<ToWorker>,
    up: VecDeque<LauncherEvent>,
    impatience: u8,
}

/// Everything that there is at one moment. Parts that most events leave alone are shared between moments.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Situation {
    nodes: Vec<Arc<Node>>,
    messages: Arc<BTreeSet<(Seat, Envelope)>>,
    /// Who has contributed, in which epoch, to the step after which state.
    contributions: BTreeSet<(Epoch, Progress, Incarnation)>,
    crashes: u8,
    decisions: Arc<BTreeMap<Epoch, Decision>>,
    accepted: Arc<BTreeSet<(Epoch, Ballot, Incarnation, Decision)>>,
    /// Stable steps, by the history that they ended.
    stable: BTreeSet<Progress>,
    violation: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Deliver(usize),
    Down(usize),
    Up(usize),
    Complete(usize),
    Fetch(usize),
    Suspect(usize, usize),
    LosePatience(usize),
    CrashNode(usize),
    CrashWorker(usize),
}

fn launcher_id(node: u32) -> Incarnation {
    Incarnation(100 + u128::from(node))
}

fn worker_id(node: u32) -> Incarnation {
    Incarnation(200 + u128::from(node))
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
        let (mode, catch_up, fence) = (Mode::Shrink, CatchUp::Results, Fence::Majority);
        let (slots, spares) = (self.nodes as u16, 0);
        Job { seats: self.nodes, workers_per_launcher: 1, slots, spares, mode, catch_up, fence, timing }
    }

    fn first_view(&self) -> Decision {
        let voters = (0..self.nodes).map(|n| Voter { seat: Seat(n), incarnation: launcher_id(n) }).collect();
        let member =
            |n: u32| Member { incarnation: worker_id(n), launcher: launcher_id(n), slots: vec![n as u16] };
        let members = (0..self.nodes).map(member).collect();
        let sources = (0..self.nodes).map(worker_id).collect();
        let resolution = Resolution { applied: Step(0), lineage: 0, sources };
        Decision { view: View { epoch: Epoch(1), voters, members }, resolution }
    }

    fn last_epoch(&self) -> Epoch {
        Epoch(1 + self.view_changes)
    }
}

impl Situation {
    fn node(&mut self, index: usize) -> &mut Node {
        Arc::make_mut(&mut self.nodes[index])
    }

    /// What is in the pipes arrives at once.
    fn drain_pipes(&mut self, bounds: &Bounds) {
        for index in 0..self.nodes.len() {
            while let Some(message) = self.node(index).down.pop_front() {
                self.tell_worker(bounds, index, WorkerEvent::Launcher(message));
                while let Some(event) = self.node(index).up.pop_front() {
                    self.tell_launcher(index, event);
                }
            }
            while let Some(event) = self.node(index).up.pop_front() {
                self.tell_launcher(index, event);
            }
        }
    }

    fn is_quiet(&self) -> bool {
        self.nodes.iter().all(|node| node.down.is_empty() && node.up.is_empty())
    }

    fn fail(&mut self, holds: bool, reason: &'static str) {
        if !holds {
            self.violation.get_or_insert(reason);
        }
    }

    fn tell_launcher(&mut self, index: usize, event: LauncherEvent) {
        let now = PATIENCE * 4 * u32::from(self.nodes[index].impatience);
        let Some(launcher) = &mut Arc::make_mut(&mut self.nodes[index]).launcher else { return };
        let me = launcher.voter();
        let actions = launcher.handle(now, event);
        for (epoch, ballot, decision) in std::mem::take(&mut launcher.accepted_ever) {
            Arc::make_mut(&mut self.accepted).insert((epoch, ballot, me.incarnation, decision));
        }
        let decision = launcher.decision().cloned();
        decision.into_iter().for_each(|decision| self.on_decision(&decision));
        let mut fenced = false;
        for action in actions {
            match action {
                LauncherAction::Send { message: Message::Beat { .. } | Message::Seek { .. }, .. } => {}
                LauncherAction::Send { to, message } => {
                    Arc::make_mut(&mut self.messages).insert((to, Envelope { from: me, message }));
                }
                LauncherAction::Worker { message, .. } => self.node(index).down.push_back(message),
                LauncherAction::Draw => fenced = true,
                _ => {}
            }
        }
        if fenced {
            self.end(index);
        }
    }

    fn on_decision(&mut self, decision: &Decision) {
        let epoch = decision.epoch();
        if let Some(known) = Arc::make_mut(&mut self.decisions).insert(epoch, decision.clone()) {
            self.fail(known == *decision, "I1: two decisions for an epoch");
            return;
        }
        if let Some(before) = self.decisions.get(&Epoch(epoch.0 - 1)).cloned() {
            let by_ballot = |ballot: Ballot| -> usize {
                let of_it = |a: &&(Epoch, Ballot, Incarnation, Decision)| {
                    a.0 == before.epoch() && a.1 == ballot && a.3 == *decision
                };
                self.accepted
                    .iter()
                    .filter(of_it)
                    .map(|a| if before.view.voters[0].incarnation == a.2 { 3 } else { 2 })
                    .sum()
            };
            // The lowest counts half a vote more: more than half of the votes is a majority, or half with it.
            let votes = 2 * before.view.voters.len() + 1;
            let ballots: BTreeSet<Ballot> = self.accepted.iter().map(|accepted| accepted.1).collect();
            let enough = ballots.into_iter().any(|ballot| 2 * by_ballot(ballot) > votes);
            self.fail(enough, "I2: a decision without a quorum");
        }
        self.check_stable(decision);
    }

    /// Each stable step is in the history that each later view begins with.
    fn check_stable(&mut self, decision: &Decision) {
        let lost = self.stable.iter().any(|stable| stable.applied > decision.resolution.applied);
        let another = self.stable.contains(&decision.resolution.state());
        let same_step = self.stable.iter().any(|stable| stable.applied == decision.resolution.applied);
        self.fail(!lost, "I5: a stable step is not in a later view");
        self.fail(!same_step || another, "I4: a later view has another outcome of a stable step");
    }

    fn tell_worker(&mut self, bounds: &Bounds, index: usize, event: WorkerEvent) {
        let Some(worker) = &mut Arc::make_mut(&mut self.nodes[index]).worker else { return };
        let mut actions: VecDeque<WorkerAction> = worker.handle(Duration::ZERO, event).into();
        let mut fenced = false;
        while let Some(action) = actions.pop_front() {
            match action {
                WorkerAction::Launcher(message)
                    if !matches!(message, super::message::FromWorker::Beat { .. }) =>
                {
                    self.node(index).up.push_back(LauncherEvent::Worker { child: CHILD, message });
                }
                WorkerAction::Compute { from, slots } if from.applied.0 < bounds.steps => {
                    let event = WorkerEvent::Submitted { from, slots };
                    let worker = self.node(index).worker.as_mut();
                    actions.extend(worker.map_or(Vec::new(), |worker| worker.handle(Duration::ZERO, event)));
                }
                WorkerAction::Run { epoch, .. } => {
                    let worker = self.nodes[index].worker.as_ref();
                    let from =
                        worker.and_then(|worker| Some((epoch, worker.progress()?, worker.incarnation())));
                    self.contributions.extend(from);
                    let states = self.contributions.iter().filter(|contribution| contribution.0 == epoch);
                    let states: BTreeSet<Progress> = states.map(|contribution| contribution.1).collect();
                    let steps: BTreeSet<Step> = states.iter().map(|state| state.applied).collect();
                    self.fail(states.len() == steps.len(), "I6: two states run the same step in an epoch");
                }
                WorkerAction::Stable(step) => {
                    let worker = self.nodes[index].worker.as_ref();
                    let state = worker.and_then(Worker::progress).filter(|state| state.applied == step);
                    let epoch = worker.map_or(Epoch(0), Worker::epoch);
                    self.stable.extend(state);
                    let one = self.stable.iter().filter(|stable| stable.applied == step).count() == 1;
                    self.fail(one, "I4: two outcomes of a step are stable");
                    let later: Vec<Decision> =
                        self.decisions.range(epoch.next()..).map(|(_, d)| d.clone()).collect();
                    later.iter().for_each(|decision| self.check_stable(decision));
                }
                WorkerAction::Draw => fenced = true,
                WorkerAction::Broken(_) => {
                    self.fail(false, "I6: a member has a history that its view has not")
                }
                _ => {}
            }
        }
        if fenced {
            self.node(index).worker = None;
        }
    }

    fn end(&mut self, index: usize) {
        let node = self.node(index);
        (node.launcher, node.worker) = (None, None);
        node.up.clear();
        node.down.clear();
    }

    fn fetch(&mut self, bounds: &Bounds, index: usize) {
        let Some((epoch, me, have)) =
            self.nodes[index].worker.as_ref().map(|w| (w.epoch(), w.incarnation(), w.progress()))
        else {
            return;
        };
        let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != index);
        let answer = others.into_iter().find_map(|(_, node)| {
            let mut source = node.worker.clone()?;
            let message = PeerMessage::Fetch { epoch, have, stripe: Stripe::WHOLE };
            let actions = source.handle(Duration::ZERO, WorkerEvent::Peer { from: me, message });
            let transfer = actions.into_iter().find_map(|action| match action {
                WorkerAction::Send { transfer, .. } => Some(transfer),
                _ => None,
            })?;
            Some(WorkerEvent::Received { from: source.incarnation(), transfer, stripe: Stripe::WHOLE })
        });
        if let Some(event) = answer {
            self.tell_worker(bounds, index, event);
        }
    }

    fn is_complete(&self, index: usize) -> Option<(Epoch, Step)> {
        let worker = self.nodes[index].worker.as_ref()?;
        let (epoch, from) = (worker.epoch(), worker.progress()?);
        let step = from.applied.next();
        let members = &worker.decision()?.view.members;
        let all = members.iter().all(|m| self.contributions.contains(&(epoch, from, m.incarnation)));
        (worker.runs_now(epoch, step) && all).then_some((epoch, step))
    }
}

impl Model for Bounds {
    type State = Situation;
    type Action = Action;

    fn init_states(&self) -> Vec<Situation> {
        let node = |n: u32| {
            let voter = Voter { seat: Seat(n), incarnation: launcher_id(n) };
            let job = self.job();
            let (worker, _) = Worker::new(job, worker_id(n), Some(Progress::START), Duration::ZERO);
            let launcher = Some(Launcher::new(job, voter, Duration::ZERO).with(self.mutation));
            let worker = Some(worker.with(self.mutation));
            let pipes = (VecDeque::new(), VecDeque::new());
            Arc::new(Node { launcher, worker, down: pipes.0, up: pipes.1, impatience: 0 })
        };
        let mut state = Situation {
            nodes: (0..self.nodes).map(node).collect(),
            messages: Arc::default(),
            contributions: BTreeSet::new(),
            crashes: 0,
            decisions: Arc::default(),
            accepted: Arc::default(),
            stable: BTreeSet::new(),
            violation: None,
        };
        for index in 0..state.nodes.len() {
            let report = super::progress::Report {
                worker: worker_id(index as u32),
                progress: Some(Progress::START),
                holds: true,
            };
            let message = super::message::FromWorker::Hello(report);
            state.tell_launcher(index, LauncherEvent::Worker { child: CHILD, message });
            let from = Voter { seat: Seat(0), incarnation: launcher_id(0) };
            let envelope = Envelope { from, message: Message::Install(self.first_view()) };
            state.tell_launcher(index, LauncherEvent::Message(envelope));
            while let Some(message) = state.node(index).down.pop_front() {
                state.tell_worker(self, index, WorkerEvent::Launcher(message));
            }
        }
        state.messages = Arc::default();
        vec![state]
    }

    fn actions(&self, state: &Situation, actions: &mut Vec<Action>) {
        if state.violation.is_some() {
            return;
        }
        actions.extend((0..state.messages.len()).map(Action::Deliver));
        for (index, node) in state.nodes.iter().enumerate() {
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
            let Some(launcher) = &node.launcher else { continue };
            if !node.up.is_empty() {
                actions.push(Action::Up(index));
            }
            if state.crashes < self.crashes {
                actions.push(Action::CrashNode(index));
            }
            if launcher.epoch() < self.last_epoch() {
                actions.extend(
                    (0..state.nodes.len()).filter(|&o| o != index).map(|o| Action::Suspect(index, o)),
                );
                if node.impatience < self.impatience {
                    actions.push(Action::LosePatience(index));
                }
            }
        }
    }

    fn next_state(&self, before: &Situation, action: Action) -> Option<Situation> {
        let mut state = before.clone();
        match action {
            Action::Deliver(message) => {
                let (to, envelope) = before.messages.iter().nth(message)?.clone();
                state.tell_launcher(to.0 as usize, LauncherEvent::Message(envelope));
            }
            Action::Down(index) => {
                let message = state.node(index).down.pop_front()?;
                state.tell_worker(self, index, WorkerEvent::Launcher(message));
            }
            Action::Up(index) => {
                let event = state.node(index).up.pop_front()?;
                state.tell_launcher(index, event);
            }
            Action::Complete(index) => {
                let (epoch, step) = state.is_complete(index)?;
                state.tell_worker(self, index, WorkerEvent::FirstReduced { epoch, step });
                state.tell_worker(self, index, WorkerEvent::Reduced { epoch, step });
            }
            Action::Fetch(index) => state.fetch(self, index),
            Action::Suspect(index, other) => {
                let (launcher, evidence) = (launcher_id(other as u32), self.evidence(&state, other));
                state.tell_launcher(index, LauncherEvent::LinkEnded { launcher, evidence });
            }
            Action::LosePatience(index) => {
                state.node(index).impatience += 1;
                state.tell_launcher(index, LauncherEvent::Tick);
            }
            Action::CrashNode(index) => {
                state.crashes += 1;
                state.end(index);
            }
            Action::CrashWorker(index) => {
                state.crashes += 1;
                state.node(index).worker = None;
                state.node(index).down.clear();
                // What it wrote into the pipe is read before its end is.
                state.node(index).up.push_back(LauncherEvent::WorkerDied(CHILD));
            }
        }
        while self.pipes == Pipes::Instant && !state.is_quiet() {
            state.drain_pipes(self);
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no invariant is violated", |_, state: &Situation| state.violation.is_none()),
            Property::sometimes("a view follows", |_, state: &Situation| state.decisions.len() > 1),
            Property::sometimes("a step is stable", |_, state: &Situation| !state.stable.is_empty()),
            Property::sometimes("a step is fetched", |_, state: &Situation| {
                let behind = |d: &Decision| d.resolution.sources.len() < d.view.members.len();
                state.decisions.values().any(behind)
            }),
        ]
    }

    fn within_boundary(&self, state: &Situation) -> bool {
        let rounds = |envelope: &Envelope| match envelope.message {
            Message::Wedge { ballot, .. } | Message::Propose { ballot, .. } => ballot.round <= self.rounds,
            _ => true,
        };
        state.messages.iter().all(|(_, envelope)| rounds(envelope))
            && state.decisions.keys().all(|&epoch| epoch <= self.last_epoch())
    }
}

impl Bounds {
    /// What is certain is said only of the dead.
    fn evidence(&self, state: &Situation, other: usize) -> Evidence {
        if state.nodes[other].launcher.is_none() { Evidence::Died } else { Evidence::Closed }
    }

    /// Explores up to that many states; says how many there were and whether that was all of them.
    fn explore(self, limit: usize) -> (usize, bool, Option<String>) {
        let checker = self.checker().threads(2).target_state_count(limit).spawn_bfs().join();
        let states = checker.unique_state_count();
        let path = checker.discovery("no invariant is violated");
        let found = path.map(|path| {
            let last = path.last_state().violation.unwrap_or("nothing");
            format!("{last}, after {:?}", path.into_actions())
        });
        (states, checker.state_count() < limit, found)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::print_stderr, reason = "how many states there were is the result")]

    use super::*;

    const NODES: Bounds = Bounds {
        nodes: 2,
        steps: 2,
        view_changes: 1,
        rounds: 1,
        crashes: 1,
        impatience: 1,
        pipes: Pipes::Slow,
        mutation: Mutation::None,
    };

    fn holds(name: &str, bounds: Bounds, limit: usize) -> bool {
        let (states, whole, found) = bounds.explore(limit);
        let extent = if whole { "all" } else { "not all" };
        eprintln!("{name}: {states} states, {extent}; {found:?}");
        assert_eq!(found, None, "{name}");
        whole
    }

    #[test]
    fn two_nodes_violate_nothing_in_any_order_of_events() {
        assert!(holds("2 nodes, 1 view change, 1 ballot, 1 crash", NODES, usize::MAX));
        let ballots = Bounds { rounds: 2, pipes: Pipes::Instant, ..NODES };
        assert!(holds("2 nodes, 1 view change, 2 ballots, 1 crash, instant pipes", ballots, usize::MAX));
    }

    /// By command, with a higher `PACELINE_MODEL_STATES`, further.
    #[test]
    fn more_nodes_and_view_changes_violate_nothing_as_far_as_explored() {
        let limit = std::env::var("PACELINE_MODEL_STATES").map_or(100_000, |n| n.parse().expect("a number"));
        let instant = Bounds { pipes: Pipes::Instant, ..NODES };
        holds("2 nodes, 2 view changes, 1 crash", Bounds { view_changes: 2, ..instant }, limit);
        holds("3 nodes, 1 view change, 1 ballot", Bounds { nodes: 3, crashes: 0, ..instant }, limit);
        holds("3 nodes, 1 view change, 2 ballots, 1 crash", Bounds { nodes: 3, rounds: 2, ..instant }, limit);
    }

    #[test]
    fn defects_of_the_consensus_are_found() {
        let instant = Bounds { pipes: Pipes::Instant, ..NODES };
        let ballots = Bounds { rounds: 2, impatience: 2, ..instant };
        for (mutation, bounds) in [
            (Mutation::ExternaliseApplied, instant),
            (Mutation::NoTieBreak, instant),
            (Mutation::CertifiedDeathShrinksQuorum, instant),
            (Mutation::IgnoreAccepted, ballots),
        ] {
            let (states, _, found) = Bounds { mutation, ..bounds }.explore(1_000_000);
            eprintln!("{mutation:?}: {states} states; {found:?}");
            assert!(found.is_some(), "{mutation:?} was not found in {states} states");
        }
    }
}
