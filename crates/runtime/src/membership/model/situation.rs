//! What there is at one moment, and what comes of an event: what the drivers of launchers and workers do.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::{Bounds, Missing, NEVER, PATIENCE, launcher_id, worker_id};
use crate::membership::launcher::{Child, Launcher, LauncherAction, LauncherEvent};
use crate::membership::message::{
    Ballot, Decision, Envelope, Evidence, FromWorker, Message, PeerMessage, Stripe, ToWorker, Transfer,
};
use crate::membership::mutation::Mutation;
use crate::membership::progress::{Progress, Step};
use crate::membership::view::{Epoch, Incarnation, Seat, Voter};
use crate::membership::worker::{Worker, WorkerAction, WorkerEvent};

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) launcher: Option<Launcher>,
    pub(super) worker: Option<Worker>,
    /// The number of the worker's process.
    child: u32,
    /// The state that the program has in its memory, whatever the core thinks.
    pub(super) data: Option<Progress>,
    pub(super) down: VecDeque<ToWorker>,
    pub(super) up: VecDeque<LauncherEvent>,
    pub(super) impatience: u8,
    pub(super) seeks: u8,
    pub(super) questions: u8,
    /// The lives of launchers and workers that have begun here; 0 is the first one's.
    launcher_life: u8,
    worker_life: u8,
    launcher_is: Origin,
    worker_is: Origin,
}

/// How a process came to its present incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Origin {
    /// It is of the first view.
    #[default]
    First,
    /// It has been started since.
    Started,
    /// It was removed, or asked to enter in vain, and has drawn another one.
    Drawn,
}

impl Origin {
    fn of_life(life: u8) -> Self {
        if life == 0 { Self::First } else { Self::Started }
    }
}

/// Everything that there is at one moment. Parts that most events leave alone are shared between moments.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Situation {
    pub(super) nodes: Vec<Arc<Node>>,
    pub(super) messages: Arc<BTreeSet<(Seat, Envelope)>>,
    pub(super) packets: Arc<BTreeSet<Packet>>,
    /// Who has contributed, in which epoch, to the step after which state.
    pub(super) contributions: BTreeSet<(Epoch, Progress, Incarnation)>,
    pub(super) crashes: u8,
    pub(super) joins: u8,
    /// Counted only where there is a bound.
    pub(super) suspicions: u8,
    pub(super) decisions: Arc<BTreeMap<Epoch, Decision>>,
    pub(super) accepted: Arc<BTreeSet<(Epoch, Ballot, Incarnation, Decision)>>,
    /// Stable steps, by the history that they ended.
    pub(super) stable: BTreeSet<Progress>,
    pub(super) violation: Option<&'static str>,
}

/// What a worker sends another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Packet {
    to: Incarnation,
    from: Incarnation,
    content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Content {
    Message(PeerMessage),
    Bytes(Transfer),
}

impl Situation {
    /// The members of the first view, with its state; what is missing has been started.
    pub(super) fn first(bounds: &Bounds) -> Self {
        let mut state = Self {
            nodes: (0..bounds.nodes).map(|_| Arc::default()).collect(),
            messages: Arc::default(),
            packets: Arc::default(),
            contributions: BTreeSet::new(),
            crashes: 0,
            joins: 0,
            suspicions: 0,
            decisions: Arc::default(),
            accepted: Arc::default(),
            stable: BTreeSet::new(),
            violation: None,
        };
        for index in 0..state.nodes.len() {
            let (launcher, worker) = bounds.begins_with(index as u32);
            let node = state.node(index);
            (node.launcher_life, node.worker_life) = (u8::from(!launcher), u8::from(!worker));
            if !launcher {
                continue;
            }
            state.begin_launcher(bounds, index);
            state.begin_worker(bounds, index, worker.then_some(Progress::START));
            state.up(bounds, index);
            let from = Voter { seat: Seat(0), incarnation: launcher_id(0, 0) };
            let envelope = Envelope { from, message: Message::Install(bounds.first_view()) };
            state.tell_launcher(bounds, index, LauncherEvent::Message(envelope));
            while !state.nodes[index].down.is_empty() {
                state.down(bounds, index);
            }
        }
        // Nobody seeks a job that has been founded.
        state.messages = Arc::default();
        if bounds.missing == Missing::Node {
            let last = state.nodes.len() - 1;
            state.begin_launcher(bounds, last);
            state.begin_worker(bounds, last, None);
            state.up(bounds, last);
        }
        state
    }

    pub(super) fn node(&mut self, index: usize) -> &mut Node {
        Arc::make_mut(&mut self.nodes[index])
    }

    /// The newest epoch that anybody has known.
    pub(super) fn newest_epoch(&self) -> Epoch {
        self.decisions.last_key_value().map_or(Epoch(0), |(&epoch, _)| epoch)
    }

    /// Whether a worker that came so, under a launcher that came so, has contributed to a step.
    pub(super) fn runs(&self, worker: Origin, launcher: Origin) -> bool {
        let came_so = |node: &&Arc<Node>| (node.worker_is, node.launcher_is) == (worker, launcher);
        let workers = self.nodes.iter().filter(came_so).filter_map(|node| node.worker.as_ref());
        let mut workers = workers.map(Worker::incarnation);
        workers.any(|worker| self.contributions.iter().any(|contribution| contribution.2 == worker))
    }

    // ---- processes ----

    /// A launcher of the node's next life.
    pub(super) fn begin_launcher(&mut self, bounds: &Bounds, index: usize) {
        let now = self.launcher_time(index);
        let node = self.node(index);
        let voter =
            Voter { seat: Seat(index as u32), incarnation: launcher_id(index as u32, node.launcher_life) };
        node.launcher = Some(Launcher::new(bounds.job(), voter, now).with(bounds.mutation));
        node.launcher_is = Origin::of_life(node.launcher_life);
        node.launcher_life += 1;
    }

    /// A worker of the node's next life, which greets its launcher.
    pub(super) fn begin_worker(&mut self, bounds: &Bounds, index: usize, data: Option<Progress>) {
        let now = self.worker_time(index);
        let node = self.node(index);
        let incarnation = worker_id(index as u32, node.worker_life);
        let (worker, actions) = Worker::new(bounds.job(), incarnation, data, now);
        node.worker = Some(worker.with(bounds.mutation));
        node.child = node.worker_life.into();
        (node.worker_is, node.data) = (Origin::of_life(node.worker_life), data);
        node.worker_life += 1;
        self.perform_all(bounds, index, actions);
    }

    pub(super) fn end(&mut self, index: usize) {
        let node = self.node(index);
        (node.launcher, node.worker, node.data) = (None, None, None);
        node.up.clear();
        node.down.clear();
    }

    pub(super) fn crash_worker(&mut self, index: usize) {
        self.crashes += 1;
        self.end_worker(index);
        let node = self.node(index);
        node.down.clear();
        // What it wrote into the pipe is read before its end is.
        node.up.push_back(LauncherEvent::WorkerDied(Child(node.child)));
    }

    fn end_worker(&mut self, index: usize) {
        let node = self.node(index);
        (node.worker, node.data) = (None, None);
    }

    // ---- pipes ----

    pub(super) fn is_quiet(&self) -> bool {
        self.nodes.iter().all(|node| node.down.is_empty() && node.up.is_empty())
    }

    /// What is in the pipes arrives at once.
    pub(super) fn drain_pipes(&mut self, bounds: &Bounds) {
        for index in 0..self.nodes.len() {
            while !self.nodes[index].down.is_empty() {
                self.down(bounds, index);
                self.drain_up(bounds, index);
            }
            self.drain_up(bounds, index);
        }
    }

    fn drain_up(&mut self, bounds: &Bounds, index: usize) {
        while !self.nodes[index].up.is_empty() {
            self.up(bounds, index);
        }
    }

    pub(super) fn down(&mut self, bounds: &Bounds, index: usize) {
        if let Some(message) = self.node(index).down.pop_front() {
            self.tell_worker(bounds, index, WorkerEvent::Launcher(message));
        }
    }

    pub(super) fn up(&mut self, bounds: &Bounds, index: usize) {
        if let Some(event) = self.node(index).up.pop_front() {
            self.tell_launcher(bounds, index, event);
        }
    }

    // ---- launchers ----

    /// A launcher that seeks has rested for as long as one ever does, and for so long that it excuses all silence.
    fn launcher_time(&self, index: usize) -> Duration {
        let node = &self.nodes[index];
        NEVER * 10 * u32::from(node.seeks) + PATIENCE * 4 * u32::from(node.impatience)
    }

    pub(super) fn tell_launcher(&mut self, bounds: &Bounds, index: usize, event: LauncherEvent) {
        let now = self.launcher_time(index);
        let Some(launcher) = &mut self.node(index).launcher else { return };
        let me = launcher.voter();
        let actions = launcher.handle(now, event);
        let accepted = std::mem::take(&mut launcher.accepted_ever);
        let decision = launcher.decision().cloned();
        for (epoch, ballot, decision) in accepted {
            Arc::make_mut(&mut self.accepted).insert((epoch, ballot, me.incarnation, decision));
        }
        decision.into_iter().for_each(|decision| self.on_decision(&decision));
        let mut removed = false;
        for action in actions {
            match action {
                LauncherAction::Send { message: Message::Beat { .. }, .. } => {}
                LauncherAction::Send { message: Message::Seek { .. }, .. } if !bounds.has_joins() => {}
                LauncherAction::Send { to, message } => {
                    Arc::make_mut(&mut self.messages).insert((to, Envelope { from: me, message }));
                }
                LauncherAction::Worker { child, message } => {
                    let node = self.node(index);
                    if node.worker.is_some() && child == Child(node.child) {
                        node.down.push_back(message);
                    }
                }
                LauncherAction::Draw => removed = true,
                _ => {}
            }
        }
        if removed && bounds.admits(self) {
            self.draw_launcher(bounds, index);
        } else if removed {
            self.end(index);
        }
    }

    /// Another incarnation; it is its worker that counts as a join.
    fn draw_launcher(&mut self, bounds: &Bounds, index: usize) {
        let node = self.node(index);
        let incarnation = launcher_id(index as u32, node.launcher_life);
        node.launcher_life += 1;
        node.launcher_is = Origin::Drawn;
        self.tell_launcher(bounds, index, LauncherEvent::Drawn(incarnation));
    }

    /// Takes the one whom its view has at another node's seat for lost. What is certain is said only of the dead.
    pub(super) fn suspect(&mut self, bounds: &Bounds, index: usize, other: usize) -> Option<()> {
        let view = self.nodes[index].launcher.as_ref()?.view()?;
        let seated = view.voters.iter().find(|voter| voter.seat == Seat(other as u32))?;
        let launcher = seated.incarnation;
        let present = self.nodes[other].launcher.as_ref().map(|launcher| launcher.voter().incarnation);
        let evidence = if present == Some(launcher) { Evidence::Closed } else { Evidence::Died };
        self.suspicions += u8::from(bounds.suspicions.is_some());
        self.tell_launcher(bounds, index, LauncherEvent::LinkEnded { launcher, evidence });
        Some(())
    }

    // ---- workers ----

    /// Each question that is asked again comes when the answer to the last one has been missing for long enough.
    fn worker_time(&self, index: usize) -> Duration {
        NEVER * u32::from(self.nodes[index].questions)
    }

    pub(super) fn tell_worker(&mut self, bounds: &Bounds, index: usize, event: WorkerEvent) {
        let now = self.worker_time(index);
        let Some(worker) = &mut self.node(index).worker else { return };
        let actions = worker.handle(now, event);
        self.perform_all(bounds, index, actions);
    }

    fn perform_all(&mut self, bounds: &Bounds, index: usize, actions: Vec<WorkerAction>) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            actions.extend(self.perform(bounds, index, action));
        }
    }

    /// Does it, and says what comes of that.
    fn perform(&mut self, bounds: &Bounds, index: usize, action: WorkerAction) -> Vec<WorkerAction> {
        match action {
            WorkerAction::Launcher(FromWorker::Beat { .. }) => {}
            WorkerAction::Launcher(message) => {
                let node = self.node(index);
                node.up.push_back(LauncherEvent::Worker { child: Child(node.child), message });
            }
            WorkerAction::Compute { from, slots } if from.applied.0 < bounds.steps => {
                return self.handle(index, WorkerEvent::Submitted { from, slots });
            }
            WorkerAction::Run { epoch, .. } => self.on_run(index, epoch),
            WorkerAction::Apply(step) => self.on_apply(index, step),
            WorkerAction::Adopt(transfer) => self.on_adopt(index, transfer),
            WorkerAction::Stable(step) => self.on_stable(index, step),
            // `Action::Fetch` asks that.
            WorkerAction::Peer { message: PeerMessage::Fetch { .. }, .. } => {}
            // It says whom to ask again.
            WorkerAction::Peer { message: PeerMessage::Soon, .. } if bounds.questions == 0 => {}
            WorkerAction::Peer { to, message } => self.send(index, to, Content::Message(message)),
            WorkerAction::Send { to, transfer, .. } => {
                self.on_send(index, transfer);
                self.send(index, to, Content::Bytes(transfer));
            }
            WorkerAction::Draw if bounds.admits(self) => return self.draw_worker(bounds, index),
            WorkerAction::Draw => self.end_worker(index),
            WorkerAction::Broken(_) => self.fail("I6: a member has a history that its view has not"),
            _ => {}
        }
        Vec::new()
    }

    fn handle(&mut self, index: usize, event: WorkerEvent) -> Vec<WorkerAction> {
        let now = self.worker_time(index);
        self.node(index).worker.as_mut().map_or(Vec::new(), |worker| worker.handle(now, event))
    }

    fn draw_worker(&mut self, bounds: &Bounds, index: usize) -> Vec<WorkerAction> {
        self.joins += 1;
        let node = self.node(index);
        let life = match bounds.mutation {
            Mutation::SameIncarnation => node.worker_life - 1,
            _ => node.worker_life,
        };
        node.worker_life = life + 1;
        node.worker_is = Origin::Drawn;
        self.handle(index, WorkerEvent::Drawn(worker_id(index as u32, life)))
    }

    fn send(&mut self, index: usize, to: Incarnation, content: Content) {
        let from = self.nodes[index].worker.as_ref().map(Worker::incarnation);
        let packet = from.map(|from| Packet { to, from, content });
        Arc::make_mut(&mut self.packets).extend(packet);
    }

    /// Whether somebody is there whom a packet could bring to do something. In the last epoch nobody can come in any more.
    pub(super) fn is_heard(&self, bounds: &Bounds, place: usize) -> bool {
        let to = self.packets.iter().nth(place).and_then(|packet| self.holder_of(packet.to));
        let worker = to.and_then(|index| self.nodes[index].worker.as_ref());
        worker.is_some_and(|worker| worker.epoch() < bounds.last_epoch())
    }

    fn holder_of(&self, incarnation: Incarnation) -> Option<usize> {
        let is_it = |node: &Arc<Node>| node.worker.as_ref().is_some_and(|w| w.incarnation() == incarnation);
        self.nodes.iter().position(is_it)
    }

    pub(super) fn hear(&mut self, bounds: &Bounds, place: usize) {
        let Some(&Packet { to, from, content }) = self.packets.iter().nth(place) else { return };
        let Some(index) = self.holder_of(to) else { return };
        let event = match content {
            Content::Message(message) => WorkerEvent::Peer { from, message },
            Content::Bytes(transfer) => WorkerEvent::Received { from, transfer, stripe: Stripe::WHOLE },
        };
        self.tell_worker(bounds, index, event);
    }

    pub(super) fn ask_again(&mut self, bounds: &Bounds, index: usize) {
        self.node(index).questions += 1;
        self.tell_worker(bounds, index, WorkerEvent::Tick);
    }

    pub(super) fn accuse(&mut self, bounds: &Bounds, index: usize, other: usize) -> Option<()> {
        let peer = self.nodes[other].worker.as_ref()?.incarnation();
        self.suspicions += 1;
        self.tell_worker(bounds, index, WorkerEvent::PeerClosed { peer, evidence: Evidence::Closed });
        Some(())
    }

    pub(super) fn fetch(&mut self, bounds: &Bounds, index: usize) {
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

    pub(super) fn complete(&mut self, bounds: &Bounds, index: usize) -> Option<()> {
        let (epoch, step) = self.is_complete(index)?;
        self.tell_worker(bounds, index, WorkerEvent::FirstReduced { epoch, step });
        self.tell_worker(bounds, index, WorkerEvent::Reduced { epoch, step });
        Some(())
    }

    pub(super) fn is_complete(&self, index: usize) -> Option<(Epoch, Step)> {
        let worker = self.nodes[index].worker.as_ref()?;
        let (epoch, from) = (worker.epoch(), worker.progress()?);
        let step = from.applied.next();
        let members = &worker.decision()?.view.members;
        let all = members.iter().all(|m| self.contributions.contains(&(epoch, from, m.incarnation)));
        (worker.runs_now(epoch, step) && all).then_some((epoch, step))
    }
}
