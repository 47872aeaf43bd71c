//! The worker's part: which step runs in which epoch, what is kept, and what may be shown outside.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::message::{Decision, Evidence, FromWorker, MAX_STRIPES, PeerMessage, Stripe, ToWorker, Transfer};
use super::mutation::Mutation;
use super::progress::{Progress, Report, Step};
use super::settings::{CatchUp, Job};
use super::view::{Epoch, Incarnation, Member, Slot, View};

mod catching_up;
mod newcomers;
#[cfg(test)]
mod tests;

use catching_up::Part;
use newcomers::Follower;

/// What a worker hears.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WorkerEvent {
    /// Time has passed, at the latest at [`Worker::deadline`].
    Tick,
    /// From its launcher.
    Launcher(ToWorker),
    /// From another worker, whose incarnation the link has authenticated.
    Peer {
        /// Who says so.
        from: Incarnation,
        /// What.
        message: PeerMessage,
    },
    /// All bytes of a transfer have come and their digests are right.
    Received {
        /// Whose bytes.
        from: Incarnation,
        /// What they are.
        transfer: Transfer,
        /// Which part of it.
        stripe: Stripe,
    },
    /// The link to a worker of the view has ended.
    PeerClosed {
        /// Which worker.
        peer: Incarnation,
        /// [`Evidence::Closed`] and [`Evidence::NoProgress`] count at once, anything else after the grace.
        evidence: Evidence,
    },
    /// Bytes of a transfer are coming in: no need to ask somebody else yet.
    Receiving,
    /// The program has the gradients of these slots; they are kept from now on.
    Submitted {
        /// The state that they were computed from.
        from: Progress,
        /// Whose gradients.
        slots: Vec<Slot>,
    },
    /// The first collective of a step has completed here.
    FirstReduced {
        /// In which epoch it ran.
        epoch: Epoch,
        /// Of which step.
        step: Step,
    },
    /// All collectives of a step have completed here, and the whole result is there.
    Reduced {
        /// In which epoch they ran.
        epoch: Epoch,
        /// Of which step.
        step: Step,
    },
    /// The incarnation asked for.
    Drawn(Incarnation),
    /// The program has been asked to end. It goes on until it has [`Left`](WorkerAction::Left), which the last
    /// member never does.
    Leave,
}

/// What a worker does; in this order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WorkerAction {
    /// Tell the launcher.
    Launcher(FromWorker),
    /// Tell another worker; may be lost.
    Peer {
        /// Whom.
        to: Incarnation,
        /// What.
        message: PeerMessage,
    },
    /// Send bytes to another worker: a kept result, or a copy of the state as it is now.
    Send {
        /// Whom.
        to: Incarnation,
        /// Which bytes.
        transfer: Transfer,
        /// Which part of them.
        stripe: Stripe,
    },
    /// Form the communicator of a new view; the program's collectives go on there.
    Open(View),
    /// End the operations of that epoch's communicator at once; nothing of it may arrive any more.
    Close(Epoch),
    /// The inputs of these slots are needed; they are `Submitted` then.
    Compute {
        /// For the step after this state.
        from: Progress,
        /// The slots that are missing.
        slots: Vec<Slot>,
    },
    /// Run the collectives of a step from the kept inputs.
    Run {
        /// In which epoch's communicator.
        epoch: Epoch,
        /// Which step.
        step: Step,
        /// The slots whose inputs this worker contributes.
        slots: Vec<Slot>,
    },
    /// Keep the whole result of a step and let the optimizer apply it. Its inputs are not needed any more: if
    /// the step is run again, then only in a view that this worker is not in.
    Apply(Step),
    /// Apply or load what was received, all parts of it.
    Adopt(Transfer),
    /// Every member has applied this step: it may be shown outside.
    Stable(Step),
    /// Results up to this step are not needed any more.
    Release(Step),
    /// A new incarnation is needed, before any other event.
    Draw,
    /// The worker has left in order.
    Left,
    /// The protocol is broken: this member has a history that its view does not have. It must not go on.
    Broken(String),
}

/// The worker's part of the membership.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Worker {
    job: Job,
    me: Incarnation,
    now: Duration,
    /// The newest view that it knows, whether it is in it or not.
    decision: Option<Decision>,
    standing: Standing,
    /// Whether it has had the state of a view since it entered. From then on it has every stable step, also
    /// when it lacks the one that the newest view began with.
    holder: bool,
    current: Option<Progress>,
    /// The state that it has made or loaded by itself, until it knows a view: the job may have begun from another one.
    own: Option<Progress>,
    /// The state before `current`, as long as the result between them is kept.
    previous: Option<Progress>,
    stable: Step,
    /// When the present step began, and how long the one before took.
    step_began: Duration,
    step_took: Duration,
    /// The slots whose inputs of the next step are kept, and those that are being computed.
    submitted: BTreeSet<Slot>,
    computing: BTreeSet<Slot>,
    running: bool,
    leaving: bool,
    /// Whether it has said so in this epoch.
    asked_to_leave: bool,
    /// The epoch in which it asked to enter. An incarnation asks in one epoch only: it may have been in the
    /// next view and removed before it knew.
    asked_to_enter: Option<Epoch>,
    /// Whom it has asked last for what it lacks, as an index that goes up, and when it asks again.
    source: usize,
    ask_at: Option<Duration>,
    /// What it asks for, each part of another source: of a whole state, a transfer has as many stripes. Empty before it asks.
    parts: Vec<Part>,
    /// The most stripes that a state comes in.
    stripes_limit: usize,
    /// Whom it has asked last from outside: there is a connection between them.
    asked: Option<Incarnation>,
    beat_at: Duration,
    lost_links: BTreeMap<Incarnation, Duration>,
    /// Members that asked before this worker knew the view that they are in.
    early: BTreeMap<Incarnation, (Epoch, Option<Progress>, Stripe)>,
    /// Newcomers that asked between two views, with what they have: each would wait before it asks somebody else.
    pulls: BTreeMap<Incarnation, Option<Progress>>,
    /// Newcomers that are sent stable steps.
    followers: BTreeMap<Incarnation, Follower>,
    /// How many results of steps are as many bytes as a whole state.
    state_worth: u64,
    mutation: Mutation,
    actions: Vec<WorkerAction>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Standing {
    /// In no view, or not in the newest one that it knows.
    Outside,
    /// In the view; the state of its resolution is still on its way.
    Behind,
    /// In the view, with its state.
    Going,
    /// In the view and stopped, for good in this epoch.
    Stopped,
    /// It found the protocol broken.
    Broken,
}

impl Worker {
    /// A worker with the state that it has loaded or made; `None` for a newcomer without one.
    pub fn new(
        job: Job,
        me: Incarnation,
        state: Option<Progress>,
        now: Duration,
    ) -> (Self, Vec<WorkerAction>) {
        let mut worker = Self {
            job,
            me,
            now,
            decision: None,
            standing: Standing::Outside,
            holder: false,
            current: state,
            own: state,
            previous: None,
            stable: state.map_or(Step(0), |progress| progress.applied),
            step_began: now,
            step_took: Duration::ZERO,
            submitted: BTreeSet::new(),
            computing: BTreeSet::new(),
            running: false,
            leaving: false,
            asked_to_leave: false,
            asked_to_enter: None,
            source: me.0 as usize,
            ask_at: None,
            parts: Vec::new(),
            stripes_limit: 1,
            asked: None,
            beat_at: now,
            lost_links: BTreeMap::new(),
            early: BTreeMap::new(),
            pulls: BTreeMap::new(),
            followers: BTreeMap::new(),
            state_worth: 1,
            mutation: Mutation::None,
            actions: Vec::new(),
        };
        worker.greet();
        let actions = std::mem::take(&mut worker.actions);
        (worker, actions)
    }

    /// With a whole state that has as many bytes as so many results of steps; one unless said otherwise. A newcomer that
    /// is further behind is better served with the state that its first view begins with.
    #[must_use]
    pub fn with_state_worth(mut self, results: u64) -> Self {
        self.state_worth = results;
        self
    }

    /// With whole states that come in so many stripes at most, each from another member; one unless said otherwise. A state
    /// that is a small part of a second's bytes comes no sooner for it.
    #[must_use]
    pub fn with_stripes(mut self, limit: usize) -> Self {
        self.stripes_limit = limit.clamp(1, MAX_STRIPES);
        self
    }

    /// With a defect.
    #[cfg(test)]
    pub(crate) fn with(mut self, mutation: Mutation) -> Self {
        self.mutation = mutation;
        self
    }

    /// Its present incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.me
    }

    /// How it gets the steps that others have made without it.
    pub fn catch_up(&self) -> CatchUp {
        self.job.catch_up
    }

    /// The newest epoch that it knows.
    pub fn epoch(&self) -> Epoch {
        self.decision.as_ref().map_or(Epoch(0), Decision::epoch)
    }

    /// The newest decision that it knows, whether it is in the view or not.
    pub fn decision(&self) -> Option<&Decision> {
        self.decision.as_ref()
    }

    /// The state that it has.
    pub fn progress(&self) -> Option<Progress> {
        self.current
    }

    /// Whether a frame of the data plane may be used: it is of this worker's epoch, the worker has not been
    /// stopped in it, and the sender is in the view.
    pub fn accepts(&self, epoch: Epoch, from: Incarnation) -> bool {
        let fresh = epoch == self.epoch() || self.mutation == Mutation::SharedNamespace;
        let running = matches!(self.standing, Standing::Behind | Standing::Going);
        fresh && running && self.decision.as_ref().is_some_and(|d| d.view.member(from).is_some())
    }

    /// Whether the collectives of that step run here, in that epoch: only then does their end count.
    pub fn runs_now(&self, epoch: Epoch, step: Step) -> bool {
        self.runs(epoch, step).is_some()
    }

    /// When a [`WorkerEvent::Tick`] is due.
    pub fn deadline(&self) -> Duration {
        let grace = self.job.timing.link_grace;
        let links = self.lost_links.values().map(|&since| since + grace);
        self.ask_at.into_iter().chain(links).fold(self.beat_at, Duration::min)
    }

    /// Takes an event in, and says what to do. `now` is the time since any fixed moment and never goes back.
    pub fn handle(&mut self, now: Duration, event: WorkerEvent) -> Vec<WorkerAction> {
        self.now = self.now.max(now);
        match event {
            WorkerEvent::Tick => {}
            WorkerEvent::Launcher(ToWorker::Wedge { epoch }) => self.wedge(epoch),
            WorkerEvent::Launcher(ToWorker::Install(decision)) => self.install(decision),
            WorkerEvent::Launcher(ToWorker::Retire) if self.standing == Standing::Outside => self.fenced(),
            WorkerEvent::Launcher(ToWorker::Retire) => {}
            WorkerEvent::Peer { from, message } => self.on_peer(from, message),
            WorkerEvent::Received { from, transfer, stripe } => self.on_received(from, transfer, stripe),
            WorkerEvent::PeerClosed { peer, evidence } => self.on_closed(peer, evidence),
            WorkerEvent::Receiving => self.ask_at = self.ask_at.map(|_| self.now + self.job.timing.suspect),
            WorkerEvent::Submitted { from, slots } => self.on_submitted(from, &slots),
            WorkerEvent::FirstReduced { epoch, step } => self.on_first_reduced(epoch, step),
            WorkerEvent::Reduced { epoch, step } => self.on_reduced(epoch, step),
            WorkerEvent::Drawn(incarnation) => {
                self.me = incarnation;
                self.greet();
                self.ask();
            }
            WorkerEvent::Leave => {
                self.leaving = true;
                let outside = self.standing == Standing::Outside;
                self.act(if outside {
                    WorkerAction::Left
                } else {
                    WorkerAction::Launcher(FromWorker::Leave)
                });
            }
        }
        self.on_time();
        std::mem::take(&mut self.actions)
    }

    fn act(&mut self, action: WorkerAction) {
        self.actions.push(action);
    }

    fn greet(&mut self) {
        let report = Report { worker: self.me, progress: self.current, holds: self.current.is_some() };
        self.act(WorkerAction::Launcher(FromWorker::Hello(report)));
    }

    fn on_time(&mut self) {
        if self.now >= self.beat_at {
            self.beat_at = self.now + self.job.timing.heartbeat;
            // Of this job only: what it has loaded by itself may be of another one.
            let stable = if self.own.is_some() { Step(0) } else { self.stable };
            self.act(WorkerAction::Launcher(FromWorker::Beat { stable }));
        }
        if self.ask_at.is_some_and(|at| self.now >= at) {
            self.ask();
        }
        let grace = self.job.timing.link_grace;
        let due: Vec<_> = self
            .lost_links
            .iter()
            .filter(|&(_, &since)| self.now >= since + grace)
            .map(|(&p, _)| p)
            .collect();
        for peer in due {
            self.lost_links.remove(&peer);
            self.accuse(peer, Evidence::LinkLost);
        }
    }

    // ---- the end of an epoch ----

    fn wedge(&mut self, epoch: Epoch) {
        if epoch != self.epoch() || matches!(self.standing, Standing::Outside | Standing::Broken) {
            return;
        }
        if self.standing != Standing::Stopped {
            self.standing = Standing::Stopped;
            self.running = false;
            self.ask_at = None;
            self.act(WorkerAction::Close(epoch));
        }
        let report = Report { worker: self.me, progress: self.current, holds: self.holder };
        self.act(WorkerAction::Launcher(FromWorker::Report { epoch, report }));
    }

    // ---- the beginning of an epoch ----

    fn install(&mut self, decision: Decision) {
        if decision.epoch() <= self.epoch() || self.standing == Standing::Broken {
            return;
        }
        let ended = self.epoch();
        if matches!(self.standing, Standing::Behind | Standing::Going) {
            self.act(WorkerAction::Close(ended));
        }
        self.running = false;
        self.asked_to_leave = false;
        self.ask_at = None;
        self.parts.clear();
        self.lost_links.clear();
        self.followers.clear();
        let view = decision.view.clone();
        self.decision = Some(decision);
        let own = self.own.take();
        if view.member(self.me).is_some() {
            self.asked_to_enter = None;
            self.standing = Standing::Behind;
            self.prefer_whom_it_has_asked();
            self.act(WorkerAction::Open(view));
            self.settle();
            self.serve_early();
        } else if self.standing != Standing::Outside || self.asked_to_enter.is_some() {
            self.fenced();
        } else {
            // What it has made or loaded by itself need not be what the job began with.
            if own.is_some() {
                (self.current, self.stable) = (None, Step(0));
            }
            self.ask();
        }
    }

    /// Removed, or asked to enter an epoch that went by: not to be seen under this incarnation again.
    fn fenced(&mut self) {
        self.standing = Standing::Outside;
        self.holder = false;
        self.previous = None;
        self.asked_to_enter = None;
        self.parts.clear();
        self.early.clear();
        self.pulls.clear();
        self.act(if self.leaving { WorkerAction::Left } else { WorkerAction::Draw });
    }

    /// Goes on from the state that the view begins with, if it is there.
    fn settle(&mut self) {
        let Some(target) = self.decision.as_ref().map(|decision| decision.resolution.state()) else { return };
        if self.holder && self.mutation == Mutation::UnilateralCommit {
            self.current = Some(target);
        }
        let skips = self.holder && self.mutation == Mutation::SkipSync;
        if self.current == Some(target) || skips {
            self.standing = Standing::Going;
            self.step_began = self.now;
            self.holder = true;
            for (from, have) in std::mem::take(&mut self.pulls) {
                self.on_pull(from, have);
            }
            self.proceed();
        } else if self.holder && self.current.is_some_and(|mine| mine.applied >= target.applied) {
            self.standing = Standing::Broken;
            let mine = self.current.map_or(Step(0), |progress| progress.applied);
            let (epoch, applied) = (self.epoch(), target.applied);
            let reason =
                format!("{epoch} begins after {applied}; this member has another history up to {mine}");
            self.act(WorkerAction::Broken(reason));
        } else {
            self.ask();
        }
    }

    // ---- a step ----

    /// Computes what is missing of the next step's inputs, and runs it when nothing is.
    fn proceed(&mut self) {
        let (Standing::Going, false, Some(from)) = (self.standing, self.running, self.current) else {
            return;
        };
        let slots = self.member().map_or(Vec::new(), |member| member.slots.clone());
        let missing = |slot: &&Slot| !self.submitted.contains(slot) && !self.computing.contains(slot);
        let missing: Vec<Slot> = slots.iter().filter(missing).copied().collect();
        if !missing.is_empty() {
            self.computing.extend(&missing);
            self.act(WorkerAction::Compute { from, slots: missing });
        }
        if slots.iter().all(|slot| self.submitted.contains(slot)) {
            self.running = true;
            self.act(WorkerAction::Run { epoch: self.epoch(), step: from.applied.next(), slots });
        }
    }

    fn member(&self) -> Option<&Member> {
        self.decision.as_ref()?.view.member(self.me)
    }

    fn on_submitted(&mut self, from: Progress, slots: &[Slot]) {
        if self.current == Some(from) {
            self.submitted.extend(slots);
            self.proceed();
        }
    }

    /// The step that runs, if it is that one.
    fn runs(&self, epoch: Epoch, step: Step) -> Option<Progress> {
        let current = self.current.filter(|current| current.applied.next() == step)?;
        (self.running && epoch == self.epoch()).then_some(current)
    }

    /// Every member contributes to the first collective of a step, and only after it has applied the one
    /// before.
    fn on_first_reduced(&mut self, epoch: Epoch, step: Step) {
        if let Some(current) = self.runs(epoch, step) {
            self.mark_stable(current);
            self.ask_to_leave();
        }
    }

    /// Now every member has the state, so that this one is not needed for it.
    fn ask_to_leave(&mut self) {
        let alone = self.decision.as_ref().is_none_or(|decision| decision.view.members.len() < 2);
        if self.leaving && !self.asked_to_leave && !alone {
            self.asked_to_leave = true;
            self.act(WorkerAction::Launcher(FromWorker::Leave));
        }
    }

    fn mark_stable(&mut self, state: Progress) {
        if state.applied <= self.stable {
            return;
        }
        self.stable = state.applied;
        self.act(WorkerAction::Stable(state.applied));
        self.serve_followers(state);
        self.act(WorkerAction::Release(state.applied));
    }

    fn on_reduced(&mut self, epoch: Epoch, step: Step) {
        let Some(before) = self.runs(epoch, step) else { return };
        self.running = false;
        (self.step_took, self.step_began) = (self.now - self.step_began, self.now);
        self.move_to(Some(before), before.after(epoch));
        self.act(WorkerAction::Apply(step));
        if self.mutation == Mutation::ExternaliseApplied {
            self.mark_stable(before.after(epoch));
        }
        self.proceed();
    }

    fn move_to(&mut self, previous: Option<Progress>, current: Progress) {
        self.previous = previous;
        self.current = Some(current);
        self.submitted.clear();
        self.computing.clear();
    }

    // ---- evidence ----

    fn on_closed(&mut self, peer: Incarnation, evidence: Evidence) {
        if self.standing == Standing::Outside
            || self.decision.as_ref().is_none_or(|d| d.view.member(peer).is_none())
        {
            return;
        }
        match evidence {
            Evidence::Closed | Evidence::NoProgress => self.accuse(peer, evidence),
            _ => {
                self.lost_links.entry(peer).or_insert(self.now);
            }
        }
    }

    fn accuse(&mut self, target: Incarnation, evidence: Evidence) {
        let epoch = self.epoch();
        self.act(WorkerAction::Launcher(FromWorker::Suspect { epoch, target, evidence }));
    }
}
