//! Processes, their network and their clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use fastrand::Rng;

use super::super::launcher::{Child, Launcher, LauncherAction, LauncherEvent};
use super::super::message::{self, Decision, Envelope, Evidence, FromWorker, Message, Stripe, Transfer};
use super::super::mutation::Mutation;
use super::super::progress::{Progress, Step};
use super::super::settings::{CatchUp, Job};
use super::super::view::{Epoch, Incarnation, Seat, Voter};
use super::super::worker::{Worker, WorkerAction, WorkerEvent};
use super::checks::Checks;
use super::data::{Bytes, Frame, OPS, Program};
use super::faults::Fault;
use super::{Checkpoint, Model, mix, ms};

/// A process, by its place; a later process at the same place has another life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) seat: usize,
    pub(super) life: u32,
    pub(super) child: Child,
}

/// Where bytes come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source {
    seat: usize,
    incarnation: Incarnation,
}

#[derive(Clone, Debug)]
pub(super) enum Happening {
    /// To whoever sits there; with a life, only to that process.
    Launcher {
        seat: usize,
        life: Option<u32>,
        event: LauncherEvent,
    },
    Worker {
        place: Place,
        as_incarnation: Option<Incarnation>,
        event: WorkerEvent,
    },
    /// A control message between workers of two hosts.
    Peer {
        from_seat: usize,
        to: Incarnation,
        event: WorkerEvent,
    },
    /// Bytes have come, unless the link is cut now.
    Transfer {
        from: Source,
        to: Incarnation,
        part: (Transfer, Stripe),
        bytes: Bytes,
    },
    /// A worker that still runs puts a frame on its link.
    Emit {
        place: Place,
        to: Incarnation,
        frame: Frame,
    },
    Frame {
        from: Place,
        to: Incarnation,
        frame: Frame,
    },
    StartLauncher {
        seat: usize,
    },
    StartWorker {
        seat: usize,
        life: u32,
    },
    Fault(Fault),
    End(Fault),
}

pub(super) struct LauncherProcess {
    pub(super) core: Launcher,
    pub(super) frozen: bool,
    held: VecDeque<LauncherEvent>,
    tick_at: Duration,
}

pub(super) struct WorkerProcess {
    pub(super) core: Worker,
    pub(super) program: Program,
    pub(super) frozen: bool,
    held: VecDeque<Happening>,
    tick_at: Duration,
}

#[derive(Default)]
pub(super) struct Site {
    pub(super) life: u32,
    pub(super) launcher: Option<LauncherProcess>,
    pub(super) workers: BTreeMap<Child, WorkerProcess>,
    next_child: u32,
}

/// What outlives processes.
#[derive(Default)]
pub(super) struct Store {
    pub(super) epoch: Epoch,
    pub(super) decision: Option<Decision>,
    pub(super) checkpoint: Option<Checkpoint>,
}

pub(super) struct World {
    pub(super) job: Job,
    pub(super) mutation: Mutation,
    pub(super) rng: Rng,
    pub(super) now: Duration,
    pub(super) sites: Vec<Site>,
    pub(super) store: Store,
    pub(super) checks: Checks,
    /// Directed pairs of seats between which nothing passes.
    pub(super) cuts: BTreeSet<(usize, usize)>,
    /// Per mille of the control messages.
    pub(super) loss: u32,
    /// Per mille of the moments that matter at which a process is killed, frozen or cut off.
    pub(super) spite: u32,
    /// How long a copy of the state takes, and the result of a step; a step takes 20 to 40 ms for each share.
    pub(super) state_work: Duration,
    pub(super) result_work: Duration,
    state_worth: u64,
    stripes: usize,
    /// How many states have come in parts.
    pub(super) striped: u64,
    /// Until when transfers from one worker to another are under way.
    busy: BTreeMap<(Incarnation, Incarnation), Duration>,
    pub(super) trace: Option<Vec<String>>,
    queue: BTreeMap<(Duration, u64), Happening>,
    routes: BTreeMap<Incarnation, Place>,
    count: u64,
    pub(super) events: u64,
}

impl World {
    pub(super) fn new(seed: u64, job: Job, mutation: Mutation, traced: bool) -> Self {
        let mut world = Self {
            job,
            mutation,
            rng: Rng::with_seed(seed),
            now: Duration::ZERO,
            sites: (0..job.seats).map(|_| Site::default()).collect(),
            store: Store::default(),
            checks: Checks::new(job),
            cuts: BTreeSet::new(),
            loss: 0,
            spite: 0,
            state_work: ms(20),
            result_work: ms(2),
            state_worth: 6,
            stripes: 1,
            striped: 0,
            busy: BTreeMap::new(),
            trace: traced.then(Vec::new),
            queue: BTreeMap::new(),
            routes: BTreeMap::new(),
            count: 0,
            events: 0,
        };
        for seat in 0..world.sites.len() {
            let delay = ms(world.rng.u64(0..50));
            world.schedule(delay, Happening::StartLauncher { seat });
        }
        world
    }

    /// With states and results of that size, in how long they take.
    pub(super) fn with_work(mut self, state: Duration, result: Duration) -> Self {
        (self.state_work, self.result_work) = (state, result);
        self.state_worth = (state.as_micros() / result.as_micros()).clamp(1, 6) as u64;
        self
    }

    /// With states that come in so many parts at most.
    pub(super) fn with_stripes(mut self, stripes: usize) -> Self {
        self.stripes = stripes;
        self
    }

    pub(super) fn schedule(&mut self, delay: Duration, happening: Happening) {
        self.count += 1;
        self.queue.insert((self.now + delay, self.count), happening);
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>10.3} ms  {}", self.now.as_secs_f64() * 1e3, line()));
        }
    }

    /// Runs until that time, or until an invariant is violated.
    pub(super) fn run_until(&mut self, end: Duration) {
        while self.checks.violation.is_none() {
            let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= end) else { break };
            let ((at, _), happening) = entry.remove_entry();
            self.now = at;
            self.events += 1;
            self.happen(happening);
        }
        self.now = self.now.max(end);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Launcher { seat, life, event } => self.tell_launcher(seat, life, event),
            Happening::Worker { place, as_incarnation, event } => {
                self.tell_worker(place, as_incarnation, event)
            }
            Happening::Peer { from_seat, to, event } => {
                if let Some(place) = self.route(to)
                    && !self.is_cut(from_seat, place.seat)
                {
                    self.tell_worker(place, Some(to), event);
                }
            }
            Happening::Transfer { from, to, part, bytes } => self.on_transfer(from, to, part, bytes),
            Happening::Emit { place, to, frame } => self.emit(place, to, frame),
            Happening::Frame { from, to, frame } => self.on_frame(from, to, frame),
            Happening::StartLauncher { seat } => self.start_launcher(seat),
            Happening::StartWorker { seat, life } => self.start_worker(seat, life),
            Happening::Fault(fault) => self.begin_fault(fault),
            Happening::End(fault) => self.end_fault(fault),
        }
    }

    // ---- processes ----

    fn draw(&mut self) -> Incarnation {
        Incarnation(u128::from(self.rng.u64(..)))
    }

    fn start_launcher(&mut self, seat: usize) {
        if self.sites[seat].launcher.is_some() {
            return;
        }
        let voter = Voter { seat: Seat(seat as u32), incarnation: self.draw() };
        let core = Launcher::new(self.job, voter, self.now).with(self.mutation);
        let site = &mut self.sites[seat];
        site.life += 1;
        let life = site.life;
        site.launcher =
            Some(LauncherProcess { core, frozen: false, held: VecDeque::new(), tick_at: Duration::MAX });
        self.note(|| format!("launcher {seat} starts as {}", voter.incarnation));
        for _ in 0..self.job.workers_per_launcher {
            self.start_worker(seat, life);
        }
        self.tell_launcher(seat, Some(life), LauncherEvent::Tick);
    }

    fn start_worker(&mut self, seat: usize, life: u32) {
        let incarnation = self.draw();
        let full = usize::from(self.job.workers_per_launcher);
        let site = &mut self.sites[seat];
        if site.life != life || site.launcher.is_none() || site.workers.len() >= full {
            return;
        }
        site.next_child += 1;
        let place = Place { seat, life, child: Child(site.next_child) };
        let (progress, model) = match &self.store.checkpoint {
            Some(checkpoint) => (checkpoint.progress, checkpoint.model.clone()),
            None => (Progress::START, Model::new(self.job.slots)),
        };
        let (core, actions) = Worker::new(self.job, incarnation, Some(progress), self.now);
        let salt = match self.job.catch_up {
            CatchUp::Results => 0,
            CatchUp::State => mix((seat as u64) << 40 ^ u64::from(life) << 20 ^ u64::from(place.child.0)),
        };
        let program = Program::new(model, self.mutation, salt);
        let core = core.with(self.mutation).with_state_worth(self.state_worth).with_stripes(self.stripes);
        let process =
            WorkerProcess { core, program, frozen: false, held: VecDeque::new(), tick_at: Duration::MAX };
        site.workers.insert(place.child, process);
        self.routes.insert(incarnation, place);
        self.note(|| format!("worker {} starts as {incarnation} with {}", name(place), progress.applied));
        self.do_worker(place, actions);
        self.tell_worker(place, None, WorkerEvent::Tick);
    }

    pub(super) fn kill_launcher(&mut self, seat: usize, restart_after: Duration) {
        let Some(process) = self.sites[seat].launcher.take() else { return };
        let gone = process.core.voter().incarnation;
        self.note(|| format!("launcher {seat} ends"));
        let workers: Vec<Child> = self.sites[seat].workers.keys().copied().collect();
        let life = self.sites[seat].life;
        for child in workers {
            self.end_worker(Place { seat, life, child });
        }
        let how = self.rng.u32(0..4);
        let evidence = if how == 0 { Evidence::Died } else { Evidence::LinkLost };
        for other in (0..self.sites.len()).filter(|&other| other != seat && how < 3) {
            let event = LauncherEvent::LinkEnded { launcher: gone, evidence };
            let delay = self.delay();
            self.schedule(delay, Happening::Launcher { seat: other, life: None, event });
        }
        self.schedule(restart_after, Happening::StartLauncher { seat });
    }

    /// A worker ends by itself; its launcher finds out and starts another one.
    pub(super) fn kill_worker(&mut self, place: Place) {
        if self.end_worker(place) {
            let Place { seat, life, child } = place;
            let event = LauncherEvent::WorkerDied(child);
            let reap = ms(self.rng.u64(1..5));
            self.schedule(reap, Happening::Launcher { seat, life: Some(life), event });
            let restart = ms(self.rng.u64(100..600));
            self.schedule(restart, Happening::StartWorker { seat, life });
        }
    }

    fn end_worker(&mut self, place: Place) -> bool {
        if self.sites[place.seat].life != place.life {
            return false;
        }
        let Some(process) = self.sites[place.seat].workers.remove(&place.child) else { return false };
        let gone = process.core.incarnation();
        self.routes.remove(&gone);
        self.note(|| format!("worker {} ends", name(place)));
        if self.rng.bool() {
            let peers: Vec<Incarnation> = self.routes.keys().copied().collect();
            for to in peers {
                let event = WorkerEvent::PeerClosed { peer: gone, evidence: Evidence::LinkLost };
                let delay = self.delay();
                self.schedule(delay, Happening::Peer { from_seat: place.seat, to, event });
            }
        }
        true
    }

    pub(super) fn places(&self) -> Vec<Place> {
        let of_site = |(seat, site): (usize, &Site)| {
            let life = site.life;
            site.workers.keys().map(move |&child| Place { seat, life, child }).collect::<Vec<_>>()
        };
        self.sites.iter().enumerate().flat_map(of_site).collect()
    }

    pub(super) fn worker(&mut self, place: Place) -> Option<&mut WorkerProcess> {
        let site = &mut self.sites[place.seat];
        if site.life == place.life { site.workers.get_mut(&place.child) } else { None }
    }

    pub(super) fn freeze_launcher(&mut self, seat: usize, frozen: bool) {
        let Some(process) = &mut self.sites[seat].launcher else { return };
        process.frozen = frozen;
        if !frozen {
            for event in std::mem::take(&mut process.held) {
                self.tell_launcher(seat, None, event);
            }
            self.tell_launcher(seat, None, LauncherEvent::Tick);
        }
    }

    pub(super) fn freeze_worker(&mut self, place: Place, frozen: bool) {
        let Some(process) = self.worker(place) else { return };
        process.frozen = frozen;
        if !frozen {
            for happening in std::mem::take(&mut process.held) {
                self.happen(happening);
            }
            self.tell_worker(place, None, WorkerEvent::Tick);
        }
    }

    // ---- the network ----

    fn is_cut(&self, from: usize, to: usize) -> bool {
        from != to && self.cuts.contains(&(from, to))
    }

    fn route(&self, to: Incarnation) -> Option<Place> {
        self.routes.get(&to).copied()
    }

    /// Mostly a fraction of a millisecond, sometimes tens: messages overtake each other.
    fn delay(&mut self) -> Duration {
        let micros = match self.rng.u32(0..100) {
            0..4 => self.rng.u64(1_000..40_000),
            _ => self.rng.u64(50..800),
        };
        Duration::from_micros(micros)
    }

    /// The delays of the copies that arrive.
    fn copies(&mut self, from: usize, to: usize) -> Vec<Duration> {
        if self.is_cut(from, to) || self.rng.u32(0..1000) < self.loss {
            return Vec::new();
        }
        let twice = self.rng.u32(0..50) == 0;
        (0..1 + u32::from(twice)).map(|_| self.delay()).collect()
    }

    fn post(&mut self, from: Voter, to: Seat, message: Message) {
        let (from_seat, to_seat) = (from.seat.0 as usize, to.0 as usize);
        self.provoke(from_seat, &message);
        let mut envelope = Envelope { from, message };
        if self.rng.u32(0..64) == 0 {
            let bytes = message::encode(&envelope).expect("what the core says can be sent");
            envelope = message::decode(&bytes).expect("what the core says can be received");
        }
        for delay in self.copies(from_seat, to_seat) {
            let event = LauncherEvent::Message(envelope.clone());
            self.schedule(delay, Happening::Launcher { seat: to_seat, life: None, event });
        }
    }

    /// Now and then strikes at the moments when an epoch is being decided.
    fn provoke(&mut self, seat: usize, message: &Message) {
        let matters = matches!(
            message,
            Message::Wedge { .. }
                | Message::Promise { .. }
                | Message::Propose { .. }
                | Message::Accepted { .. }
        ) || matches!(message, Message::Install(_));
        if matters && self.rng.u32(0..1000) < self.spite {
            let fault = match self.rng.u32(0..3) {
                0 => Fault::KillLauncher(seat),
                1 => Fault::FreezeLauncher(seat, ms(self.rng.u64(50..1500))),
                _ => Fault::Isolate(seat, ms(self.rng.u64(50..2500))),
            };
            let delay = Duration::from_micros(self.rng.u64(0..1500));
            self.schedule(delay, Happening::Fault(fault));
        }
    }

    // ---- launchers ----

    fn tell_launcher(&mut self, seat: usize, life: Option<u32>, event: LauncherEvent) {
        let (now, site) = (self.now, &mut self.sites[seat]);
        let present = site.life;
        let Some(process) = site.launcher.as_mut().filter(|_| life.is_none_or(|life| life == present)) else {
            return;
        };
        if process.frozen {
            process.held.push_back(event);
            return;
        }
        let described = self.trace.is_some().then(|| format!("{event:?}"));
        let actions = process.core.handle(now, event);
        let me = process.core.voter();
        if let Some(described) = described.filter(|d| d != "Tick" || !actions.is_empty()) {
            self.note(|| format!("launcher {seat} <- {described}"));
        }
        let core = &mut self.sites[seat].launcher.as_mut().expect("it has just handled an event").core;
        self.checks.on_launcher(core, &self.store);
        for action in actions {
            self.do_launcher(seat, me, action);
        }
        self.arm_launcher(seat);
    }

    fn arm_launcher(&mut self, seat: usize) {
        let (now, life) = (self.now, self.sites[seat].life);
        let Some(process) = &mut self.sites[seat].launcher else { return };
        let due = process.core.deadline().max(now + Duration::from_micros(100));
        if due < process.tick_at || process.tick_at <= now {
            process.tick_at = due;
            self.schedule(
                due - now,
                Happening::Launcher { seat, life: Some(life), event: LauncherEvent::Tick },
            );
        }
    }

    fn do_launcher(&mut self, seat: usize, me: Voter, action: LauncherAction) {
        let life = self.sites[seat].life;
        if self.trace.is_some()
            && !matches!(action, LauncherAction::Send { message: Message::Beat { .. }, .. })
        {
            self.note(|| format!("launcher {seat}    -> {action:?}"));
        }
        match action {
            LauncherAction::Send { to, message } => self.post(me, to, message),
            LauncherAction::Worker { child, message } => {
                let place = Place { seat, life, child };
                let event = WorkerEvent::Launcher(message);
                self.schedule(PIPE, Happening::Worker { place, as_incarnation: None, event });
            }
            LauncherAction::Persist(epoch) => self.store.epoch = self.store.epoch.max(epoch),
            LauncherAction::Claim => {
                self.store.epoch = self.store.epoch.next();
                let epoch = self.store.epoch;
                self.checks.claimed(epoch);
                let event = LauncherEvent::Claimed(epoch);
                self.schedule(ms(1), Happening::Launcher { seat, life: Some(life), event });
            }
            LauncherAction::Swap(decision) => {
                if decision.epoch() == self.store.epoch.next() {
                    self.store.epoch = decision.epoch();
                    self.store.decision = Some(decision);
                }
                if let Some(newest) = self.store.decision.clone() {
                    let event = LauncherEvent::Swapped(newest);
                    let delay = ms(self.rng.u64(1..6));
                    self.schedule(delay, Happening::Launcher { seat, life: Some(life), event });
                }
            }
            LauncherAction::Draw => {
                let incarnation = self.draw();
                self.tell_launcher(seat, Some(life), LauncherEvent::Drawn(incarnation));
            }
            LauncherAction::GiveUp(_) => self.kill_launcher(seat, ms(1000)),
        }
    }

    // ---- workers ----

    fn tell_worker(&mut self, place: Place, as_incarnation: Option<Incarnation>, event: WorkerEvent) {
        let now = self.now;
        let Some(process) = self.worker(place) else { return };
        if process.frozen {
            process.held.push_back(Happening::Worker { place, as_incarnation, event });
            return;
        }
        if as_incarnation.is_some_and(|incarnation| incarnation != process.core.incarnation()) {
            return;
        }
        if let WorkerEvent::Submitted { from, slots } = &event
            && process.core.progress() == Some(*from)
        {
            for &slot in slots {
                process.program.kept.insert(slot, process.program.model.input(slot));
            }
        }
        let quiet = event == WorkerEvent::Tick;
        let described = format!("{event:?}");
        let actions = process.core.handle(now, event);
        if !quiet {
            self.note(|| format!("worker {} <- {described}", name(place)));
        }
        self.do_worker(place, actions);
        self.try_complete(place);
        if let Some(process) = self.worker(place) {
            let due = process.core.deadline().max(now + Duration::from_micros(100));
            if due < process.tick_at || process.tick_at <= now {
                process.tick_at = due;
                let event = WorkerEvent::Tick;
                self.schedule(due - now, Happening::Worker { place, as_incarnation: None, event });
            }
        }
    }

    fn do_worker(&mut self, place: Place, actions: Vec<WorkerAction>) {
        for action in actions {
            if !matches!(action, WorkerAction::Launcher(FromWorker::Beat { .. })) {
                self.note(|| format!("worker {}    -> {action:?}", name(place)));
            }
            if self.worker(place).is_some() {
                self.do_worker_action(place, action);
            }
        }
    }

    fn do_worker_action(&mut self, place: Place, action: WorkerAction) {
        let Place { seat, life, child } = place;
        match action {
            WorkerAction::Launcher(message) => {
                let event = LauncherEvent::Worker { child, message };
                self.schedule(PIPE, Happening::Launcher { seat, life: Some(life), event });
            }
            WorkerAction::Peer { to, message } => {
                let Some(process) = self.worker(place) else { return };
                let event = WorkerEvent::Peer { from: process.core.incarnation(), message };
                let to_seat = self.route(to).map_or(seat, |to| to.seat);
                for delay in self.copies(seat, to_seat) {
                    self.schedule(delay, Happening::Peer { from_seat: seat, to, event: event.clone() });
                }
            }
            WorkerAction::Send { to, transfer, stripe } => self.send(place, to, transfer, stripe),
            WorkerAction::Open(view) => {
                let Some(process) = self.worker(place) else { return };
                let me = process.core.incarnation();
                let useless =
                    |(from, to): &(Incarnation, Incarnation)| *from == me && view.member(*to).is_some();
                self.busy.retain(|pair, _| !useless(pair));
                let Some(process) = self.worker(place) else { return };
                let frames = process.program.open(view);
                for frame in frames {
                    let to = self.worker(place).map(|process| process.core.incarnation());
                    to.into_iter().for_each(|to| {
                        self.schedule(PIPE, Happening::Frame { from: place, to, frame: frame.clone() })
                    });
                }
            }
            WorkerAction::Close(_) => {
                if let Some(process) = self.worker(place) {
                    process.program.close();
                }
            }
            WorkerAction::Compute { from, slots } => {
                let work = ms(self.rng.u64(20..40)) * slots.len() as u32;
                let event = WorkerEvent::Submitted { from, slots };
                self.schedule(work, Happening::Worker { place, as_incarnation: None, event });
            }
            WorkerAction::Run { epoch, step, slots } => self.run_step(place, epoch, step, &slots),
            WorkerAction::Apply(step) => {
                let Some(process) = self.sites[seat].workers.get_mut(&child) else { return };
                self.checks.applied(&process.core, &process.program.model, step);
            }
            WorkerAction::Adopt(transfer) => {
                let Some(process) = self.sites[seat].workers.get_mut(&child) else { return };
                self.striped += u64::from(process.program.has_parts());
                if !process.program.adopt(transfer) {
                    self.checks.fail(|| format!("I11: worker {} has parts of different states", name(place)));
                }
                self.checks.adopted(&process.core, &process.program.model, transfer);
            }
            WorkerAction::Stable(step) => {
                let Some(process) = self.sites[seat].workers.get_mut(&child) else { return };
                self.checks.stable(&process.core, &process.program.model, step);
                let later = self.store.checkpoint.as_ref().is_none_or(|c| c.progress.applied < step);
                if step.0.is_multiple_of(5) && later {
                    let progress = process.core.progress().expect("a member has a state");
                    let model = process.program.model.clone();
                    self.store.checkpoint = Some(Checkpoint { progress, model });
                }
            }
            WorkerAction::Release(_) => {
                if let Some(process) = self.worker(place) {
                    process.program.result = None;
                }
            }
            WorkerAction::Draw => {
                let incarnation = self.draw();
                let Some(process) = self.worker(place) else { return };
                let old = process.core.incarnation();
                self.routes.remove(&old);
                self.routes.insert(incarnation, place);
                self.tell_worker(place, None, WorkerEvent::Drawn(incarnation));
            }
            WorkerAction::Left => self.kill_worker(place),
            WorkerAction::Broken(_) => {}
        }
    }

    fn run_step(&mut self, place: Place, epoch: Epoch, step: Step, slots: &[u16]) {
        let Some(process) = self.sites[place.seat].workers.get_mut(&place.child) else { return };
        self.checks.runs(&process.core, &process.program, epoch, step, slots);
        let stored = self.store.epoch;
        if stored < epoch {
            self.checks.fail(|| format!("I1: {step} runs in {epoch}, and the store has {stored}"));
        }
        let from = process.core.incarnation();
        let inputs: BTreeMap<_, _> = slots
            .iter()
            .filter_map(|slot| process.program.kept.get(slot).map(|&value| (*slot, value)))
            .collect();
        let members = process.core.decision().map_or(Vec::new(), |d| d.view.members.clone());
        for op in 0..OPS {
            for member in &members {
                let frame = Frame { from, epoch, step, op, inputs: inputs.clone() };
                let pace = Duration::from_micros(u64::from(op) * self.rng.u64(200..2500));
                self.schedule(pace, Happening::Emit { place, to: member.incarnation, frame });
            }
        }
        if self.rng.u32(0..2000) < self.spite {
            let delay = Duration::from_micros(self.rng.u64(0..4000));
            self.schedule(delay, Happening::Fault(Fault::KillWorker(place)));
        }
    }

    fn emit(&mut self, place: Place, to: Incarnation, frame: Frame) {
        let Some(process) = self.worker(place) else { return };
        if process.frozen {
            process.held.push_back(Happening::Emit { place, to, frame });
            return;
        }
        // A worker that has been stopped, or has gone on to another epoch, sends nothing of this one.
        if process.core.epoch() == frame.epoch && process.core.accepts(frame.epoch, frame.from) {
            let own = to == frame.from;
            let delay = if own { Duration::ZERO } else { self.delay() };
            self.schedule(delay, Happening::Frame { from: place, to, frame });
        }
    }

    fn on_frame(&mut self, from: Place, to: Incarnation, frame: Frame) {
        let Some(place) = self.route(to) else { return };
        if self.is_cut(from.seat, place.seat) {
            // The link sends again as long as its sender lives.
            if self.worker(from).is_some() {
                self.schedule(ms(10), Happening::Frame { from, to, frame });
            }
            return;
        }
        let Some(process) = self.worker(place) else { return };
        if process.frozen {
            process.held.push_back(Happening::Frame { from, to, frame });
        } else if process.core.accepts(frame.epoch, frame.from) {
            let own = frame.from == to;
            process.program.arrive(frame, own);
            self.try_complete(place);
        } else if frame.epoch > process.core.epoch() {
            process.program.hold_back(frame);
        }
    }

    fn try_complete(&mut self, place: Place) {
        let now = self.now;
        for op in 0..OPS {
            let Some(process) = self.worker(place) else { return };
            let (epoch, Some(progress)) = (process.core.epoch(), process.core.progress()) else { return };
            let step = progress.applied.next();
            if !process.core.runs_now(epoch, step) {
                return;
            }
            let Some(complete) = process.program.complete(epoch, step, op) else { return };
            if op + 1 < OPS {
                let actions = process.core.handle(now, WorkerEvent::FirstReduced { epoch, step });
                self.do_worker(place, actions);
                continue;
            }
            let Some(process) = self.sites[place.seat].workers.get_mut(&place.child) else { return };
            let result = self.checks.reduced(&process.core, &process.program.model, &complete);
            process.program.apply(result);
            let actions = process.core.handle(now, WorkerEvent::Reduced { epoch, step });
            self.note(|| format!("worker {} <- Reduced {{ {epoch}, {step} }}", name(place)));
            self.do_worker(place, actions);
            let spite = self.rng.u32(0..2000) < self.spite;
            if spite {
                let fault = match self.rng.u32(0..3) {
                    0 => Fault::KillWorker(place),
                    1 => Fault::FreezeWorker(place, ms(self.rng.u64(50..1500))),
                    _ => Fault::Isolate(place.seat, ms(self.rng.u64(50..2500))),
                };
                self.schedule(Duration::ZERO, Happening::Fault(fault));
            }
        }
    }

    fn send(&mut self, place: Place, to: Incarnation, transfer: Transfer, stripe: Stripe) {
        let (state_work, result_work) = (self.state_work, self.result_work);
        let Some(process) = self.worker(place) else { return };
        let from = Source { seat: place.seat, incarnation: process.core.incarnation() };
        let (bytes, work) = match transfer {
            Transfer::Result { .. } => {
                let result = process.program.result.clone();
                (Bytes::Result(result.expect("a result that is sent is kept")), result_work)
            }
            Transfer::State { .. } => {
                let model = Box::new(process.program.model.clone());
                (Bytes::State(model), state_work / u32::from(stripe.of))
            }
        };
        if process.core.progress().map(|progress| progress.applied.0) != Some(process.program.model.applied())
        {
            self.checks
                .fail(|| format!("I6: the core of worker {} is at another step than its state", name(place)));
        }
        // One after the other.
        let now = self.now;
        let free = self.busy.entry((from.incarnation, to)).or_default();
        *free = now.max(*free) + work;
        let wait = *free - now;
        let delay = self.delay() + wait;
        self.schedule(delay, Happening::Transfer { from, to, part: (transfer, stripe), bytes });
    }

    fn on_transfer(&mut self, from: Source, to: Incarnation, part: (Transfer, Stripe), bytes: Bytes) {
        let Some(place) = self.route(to) else { return };
        if self.is_cut(from.seat, place.seat) {
            return;
        }
        let (transfer, stripe) = part;
        let Some(process) = self.worker(place) else { return };
        if process.frozen {
            process.held.push_back(Happening::Transfer { from, to, part, bytes });
        } else if process.core.wants(transfer, stripe) {
            process.program.expect(stripe, bytes);
            let event = WorkerEvent::Received { from: from.incarnation, transfer, stripe };
            self.tell_worker(place, Some(to), event);
        }
    }
}

/// What a message between a launcher and its worker takes; equal for all, so that they stay in order.
const PIPE: Duration = Duration::from_micros(100);

pub(super) fn name(place: Place) -> String {
    format!("{}.{}", place.seat, place.child.0)
}
