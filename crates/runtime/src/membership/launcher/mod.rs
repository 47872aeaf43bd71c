//! The launcher's part: a voter of its epoch, the parent of its workers, and now and then the leader.

mod campaign;
mod outside;

use std::collections::BTreeMap;
use std::time::Duration;

use self::campaign::{Campaign, Promise};
use self::outside::Outside;
use super::message::{Ballot, Decision, Envelope, Evidence, FromWorker, Message, ToWorker};
use super::mutation::Mutation;
use super::progress::{Report, Step};
use super::settings::{Fence, Job};
use super::view::{Epoch, Incarnation, MAX_LAUNCHERS, Seat, View, Voter};

/// A process that a launcher has started, by a number that is not used again while the launcher lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Child(pub u32);

/// What a launcher hears.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LauncherEvent {
    /// Time has passed, at the latest at [`Launcher::deadline`].
    Tick,
    /// From another launcher, or an answer to one's own.
    Message(Envelope),
    /// From a worker of this launcher.
    Worker {
        /// Which process.
        child: Child,
        /// What it says.
        message: FromWorker,
    },
    /// `waitpid` has returned for a worker: only then is its death certain.
    WorkerDied(Child),
    /// The link to a launcher of the view has ended, or somebody outside of the job knows that it is dead.
    LinkEnded {
        /// Which launcher.
        launcher: Incarnation,
        /// [`Evidence::LinkLost`] counts after the grace, anything else at once.
        evidence: Evidence,
    },
    /// The incarnation asked for.
    Drawn(Incarnation),
    /// The epoch asked for by [`LauncherAction::Claim`].
    Claimed(Epoch),
    /// What the lease says has been decided, in answer to [`LauncherAction::Swap`].
    Swapped(Decision),
}

/// What a launcher does; in this order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LauncherAction {
    /// Tell the launcher at a seat; may be lost.
    Send {
        /// Where.
        to: Seat,
        /// What.
        message: Message,
    },
    /// Tell a worker.
    Worker {
        /// Which process.
        child: Child,
        /// What.
        message: ToWorker,
    },
    /// Store the epoch as the job's, unless a later one is stored already, before what follows is done.
    Persist(Epoch),
    /// Store the epoch after every one that the job has ever had, and say which.
    Claim,
    /// Make this the job's newest decision if the newest one is that of the epoch before; say which is the
    /// newest then. Only with [`Fence::Lease`].
    Swap(Decision),
    /// A new incarnation is needed, before any other event.
    Draw,
    /// End with an exit code that says: start again. The state is lost with the workers.
    GiveUp(String),
}

/// The launcher's part of the membership.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Launcher {
    job: Job,
    me: Voter,
    now: Duration,
    mutation: Mutation,
    member: bool,
    /// The newest decision that it knows, whether it is in the view or not.
    decision: Option<Decision>,
    children: BTreeMap<Child, ChildState>,
    outside: Outside,
    beat_at: Duration,
    /// When the voters of the view were last heard.
    heard: BTreeMap<Incarnation, Duration>,
    lost_links: BTreeMap<Incarnation, Duration>,
    suspects: BTreeMap<Incarnation, Evidence>,
    accuse_at: Duration,
    /// Launchers whose workers are ready to enter, which need not be in the view themselves.
    newcomers: BTreeMap<Incarnation, (Voter, Vec<Incarnation>)>,
    /// The acceptor's memory of this epoch. It needs no disk: whoever forgets it has another incarnation.
    promised: Ballot,
    accepted: Option<(Ballot, Decision)>,
    /// Since when the workers have been told to stop.
    wedged: Option<Duration>,
    /// The ballot that was promised last, with the number of reports that were sent along, and whether that was all.
    promise_sent: Option<(Ballot, usize, bool)>,
    campaign: Option<Campaign>,
    /// The highest round that anybody was seen to use.
    highest_round: u32,
    /// Since when nothing has happened though the epoch should end.
    stuck: Option<Duration>,
    /// Since when this launcher has had no view to go on with.
    trouble: Option<Duration>,
    newest_stable: Step,
    /// Messages of this launcher to itself.
    loopback: Vec<Message>,
    actions: Vec<LauncherAction>,
    /// Everything that this process has ever accepted, for the checkers.
    #[cfg(test)]
    pub(crate) accepted_ever: Vec<(Epoch, Ballot, Decision)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ChildState {
    /// Its last greeting.
    hello: Report,
    heard: Duration,
    /// What it said after it stopped in this epoch.
    report: Option<Report>,
    /// Whether it is ready to enter from the newest view.
    ready: bool,
    /// Whether it was named to a founder, so that it may be in a view that nobody here knows.
    named: bool,
}

impl Launcher {
    /// A launcher that has just been started.
    pub fn new(job: Job, me: Voter, now: Duration) -> Self {
        Self {
            job,
            me,
            now,
            mutation: Mutation::None,
            member: false,
            decision: None,
            children: BTreeMap::new(),
            outside: Outside::new(now),
            beat_at: now,
            heard: BTreeMap::new(),
            lost_links: BTreeMap::new(),
            suspects: BTreeMap::new(),
            accuse_at: now,
            newcomers: BTreeMap::new(),
            promised: Ballot::default(),
            accepted: None,
            wedged: None,
            promise_sent: None,
            campaign: None,
            highest_round: 0,
            stuck: None,
            trouble: None,
            newest_stable: Step(0),
            loopback: Vec::new(),
            actions: Vec::new(),
            #[cfg(test)]
            accepted_ever: Vec::new(),
        }
    }

    /// With a defect.
    #[cfg(test)]
    pub(crate) fn with(mut self, mutation: Mutation) -> Self {
        self.mutation = mutation;
        self
    }

    /// Who it is at present.
    pub fn voter(&self) -> Voter {
        self.me
    }

    /// The view that it is in.
    pub fn view(&self) -> Option<&View> {
        self.decision.as_ref().filter(|_| self.member).map(|decision| &decision.view)
    }

    /// The newest epoch that it knows.
    pub fn epoch(&self) -> Epoch {
        self.decision.as_ref().map_or(Epoch(0), Decision::epoch)
    }

    /// The newest stable step that its workers know of.
    pub fn newest_stable(&self) -> Step {
        self.newest_stable
    }

    /// The newest decision that it knows, whether it is in the view or not.
    pub fn decision(&self) -> Option<&Decision> {
        self.decision.as_ref()
    }

    /// Takes an event in, and says what to do. `now` is the time since any fixed moment and never goes back.
    pub fn handle(&mut self, now: Duration, event: LauncherEvent) -> Vec<LauncherAction> {
        self.excuse_others(now);
        self.now = self.now.max(now);
        match event {
            LauncherEvent::Tick => {}
            LauncherEvent::Message(Envelope { from, message }) => self.on_message(from, message),
            LauncherEvent::Worker { child, message } => self.on_worker(child, message),
            LauncherEvent::WorkerDied(child) => self.on_worker_died(child),
            LauncherEvent::LinkEnded { launcher, evidence } => self.on_link_ended(launcher, evidence),
            LauncherEvent::Drawn(incarnation) => self.me.incarnation = incarnation,
            LauncherEvent::Claimed(epoch) => self.on_claimed(epoch),
            LauncherEvent::Swapped(decision) => self.on_swapped(decision),
        }
        self.settle_loopback();
        self.on_time();
        self.settle_loopback();
        std::mem::take(&mut self.actions)
    }

    /// When a [`LauncherEvent::Tick`] is due.
    pub fn deadline(&self) -> Duration {
        let timing = &self.job.timing;
        let silences = self.heard.values().map(|&at| at + timing.suspect);
        let children = self.children.values().map(|child| child.heard + timing.suspect);
        let links = self.lost_links.values().map(|&at| at + timing.link_grace);
        let campaign = self.campaign.iter().flat_map(|c| [c.resend_at, c.started + timing.promise_wait]);
        let reports = self.wedged.map(|at| at + timing.promise_wait / 2);
        let takeover = self.stuck.map(|at| at + self.patience());
        let give_up = self.trouble.map(|at| at + timing.give_up);
        let regular = if self.member { self.beat_at } else { self.outside.seek_at };
        let due = silences.chain(children).chain(links).chain(campaign).chain(reports);
        due.chain(takeover).chain(give_up).filter(|&at| at > self.now).fold(regular, Duration::min)
    }

    /// While this launcher did not run it has heard nobody, and what they said meanwhile comes after this event.
    fn excuse_others(&mut self, now: Duration) {
        let pause = now.saturating_sub(self.now);
        if pause > self.job.timing.heartbeat * 2 {
            let children = self.children.values_mut().map(|child| &mut child.heard);
            let links = self.lost_links.values_mut();
            self.heard.values_mut().chain(children).chain(links).for_each(|at| *at += pause);
        }
    }

    fn act(&mut self, action: LauncherAction) {
        self.actions.push(action);
    }

    fn send(&mut self, to: Seat, message: Message) {
        if to == self.me.seat {
            self.loopback.push(message);
        } else {
            self.act(LauncherAction::Send { to, message });
        }
    }

    fn send_to_all(&mut self, voters: &[Voter], message: &Message) {
        voters.iter().for_each(|voter| self.send(voter.seat, message.clone()));
    }

    fn settle_loopback(&mut self) {
        while !self.loopback.is_empty() {
            for message in std::mem::take(&mut self.loopback) {
                self.on_message(self.me, message);
            }
        }
    }

    fn on_message(&mut self, from: Voter, message: Message) {
        if let Some(decision) = &self.decision
            && decision.view.voter(from.incarnation).is_some()
        {
            self.on_heard(from.incarnation);
        }
        match message {
            Message::Install(decision) => self.learn(decision),
            Message::Seek { complete } => self.on_seek(from, complete),
            Message::Invite { epoch } => self.on_invite(from, epoch),
            Message::Attend { epoch, workers } => self.on_attend(from, epoch, workers),
            Message::Beat { epoch } => {
                self.is_present(from, epoch);
            }
            Message::Ready { epoch, workers } => {
                if self.is_present(from, epoch) {
                    self.on_ready(from, workers);
                }
            }
            message => self.on_vote(from, message),
        }
    }

    /// What only voters of this epoch may say.
    fn on_vote(&mut self, from: Voter, message: Message) {
        let (Message::Suspect { epoch, .. }
        | Message::Wedge { epoch, .. }
        | Message::Promise { epoch, .. }
        | Message::Reject { epoch, .. }
        | Message::Propose { epoch, .. }
        | Message::Accepted { epoch, .. }) = message
        else {
            return;
        };
        let known =
            self.view().and_then(|view| view.voter(from.incarnation)).is_some_and(|(_, v)| *v == from);
        if !self.is_present(from, epoch) || !known {
            return;
        }
        match message {
            Message::Suspect { target, evidence, .. } => self.suspect(target, evidence),
            Message::Wedge { ballot, .. } => self.on_wedge(from, ballot),
            Message::Promise { ballot, reports, complete, accepted, stable, .. } => {
                self.on_promise(from, ballot, Promise { reports, complete, accepted, stable });
            }
            Message::Reject { promised, .. } => self.on_reject(promised),
            Message::Propose { ballot, decision, .. } => self.on_propose(from, ballot, decision),
            Message::Accepted { ballot, .. } => self.on_accepted(from, ballot),
            _ => {}
        }
    }

    /// Whether a message is of this member's epoch. The sender of an earlier one is fenced, and told so; that of
    /// a later one is told who lacks it.
    fn is_present(&mut self, from: Voter, epoch: Epoch) -> bool {
        if self.member
            && epoch < self.epoch()
            && let Some(decision) = self.decision.clone()
        {
            self.send(from.seat, Message::Install(decision));
        } else if self.member && epoch > self.epoch() {
            let epoch = self.epoch();
            self.send(from.seat, Message::Beat { epoch });
        }
        self.member && epoch == self.epoch()
    }

    // ---- the present view ----

    /// A decision: becomes a member of its view, or learns that it is not in it.
    fn learn(&mut self, decision: Decision) {
        if decision.epoch() <= self.epoch() || decision.epoch() < self.outside.floor {
            return;
        }
        let was_member = self.member;
        let view = decision.view.clone();
        self.decision = Some(decision.clone());
        // Only a job that is founded again goes back, and then those steps are no longer its own.
        self.newest_stable = self.newest_stable.min(decision.resolution.applied);
        self.member = view.voter(self.me.incarnation).is_some_and(|(_, voter)| *voter == self.me);
        self.forget_epoch();
        match (was_member, self.member) {
            (false, true) => self.outside.entered(self.now),
            (true, false) => self.outside.removed(self.now, self.job.timing.suspect),
            _ => {}
        }
        if self.member {
            self.act(LauncherAction::Persist(view.epoch));
            self.heard = view.voters.iter().map(|voter| (voter.incarnation, self.now)).collect();
            self.heard.remove(&self.me.incarnation);
            self.trouble = None;
        } else {
            self.heard.clear();
            self.trouble = Some(self.now);
            if was_member || self.outside.asked_to_enter.is_some() || self.outside.attended {
                self.act(LauncherAction::Draw);
            }
        }
        self.outside.reset();
        for (&child, state) in &mut self.children {
            let is_member = decision.view.member(state.hello.worker).is_some();
            let retired = (state.named && !is_member).then_some(ToWorker::Retire);
            let messages = retired.into_iter().chain([ToWorker::Install(decision.clone())]);
            self.actions.extend(messages.map(|message| LauncherAction::Worker { child, message }));
            (state.report, state.ready, state.named) = (None, false, false);
        }
        self.suspect_lost_children();
    }

    fn forget_epoch(&mut self) {
        self.lost_links.clear();
        self.suspects.clear();
        self.newcomers.clear();
        self.promised = Ballot::default();
        self.accepted = None;
        self.wedged = None;
        self.promise_sent = None;
        self.campaign = None;
        self.highest_round = 0;
        self.stuck = None;
    }

    /// Workers that died, or drew another incarnation, while the view was being decided.
    fn suspect_lost_children(&mut self) {
        let Some(view) = self.view() else { return };
        let has = |worker| self.children.values().any(|child| child.hello.worker == worker);
        let mine = view.members.iter().filter(|member| member.launcher == self.me.incarnation);
        let missing: Vec<_> = mine.map(|member| member.incarnation).filter(|&worker| !has(worker)).collect();
        missing.into_iter().for_each(|worker| self.suspect(worker, Evidence::Died));
    }

    // ---- workers ----

    fn on_worker(&mut self, child: Child, message: FromWorker) {
        if let FromWorker::Hello(hello) = message {
            let state = ChildState { hello, heard: self.now, report: None, ready: false, named: false };
            self.children.insert(child, state);
            self.suspect_lost_children();
            if let Some(decision) = self.decision.clone() {
                self.act(LauncherAction::Worker { child, message: ToWorker::Install(decision) });
            }
            return;
        }
        let (now, present) = (self.now, self.epoch());
        let Some(state) = self.children.get_mut(&child) else { return };
        state.heard = now;
        match message {
            FromWorker::Hello(_) => {}
            FromWorker::Beat { stable } => {
                let worker = state.hello.worker;
                self.newest_stable = self.newest_stable.max(stable);
                if self.suspects.get(&worker) == Some(&Evidence::Silent) && self.wedged.is_none() {
                    self.suspects.remove(&worker);
                }
            }
            FromWorker::Report { epoch, report }
                if epoch == present && report.worker == state.hello.worker =>
            {
                state.report = Some(report);
                self.try_promise();
            }
            FromWorker::Ready { epoch } if epoch == present => {
                state.ready = true;
                self.announce_ready();
            }
            FromWorker::Suspect { epoch, target, evidence } if epoch == present => {
                self.suspect(target, evidence)
            }
            FromWorker::Leave => {
                let worker = state.hello.worker;
                self.suspect(worker, Evidence::Leaving);
            }
            FromWorker::Report { .. } | FromWorker::Ready { .. } | FromWorker::Suspect { .. } => {}
        }
    }

    fn on_worker_died(&mut self, child: Child) {
        if let Some(state) = self.children.remove(&child) {
            self.suspect(state.hello.worker, Evidence::Died);
            self.try_promise();
        }
    }

    /// Says which workers want to enter, to all who may lead.
    fn announce_ready(&mut self) {
        let ready = self.children.values().filter(|child| child.ready).map(|child| child.hello.worker);
        let workers: Vec<Incarnation> = ready.collect();
        let Some(decision) = &self.decision else { return };
        let is_resting = !self.member && self.outside.is_resting(self.now);
        if is_resting || workers.is_empty() && (self.member || self.job.workers_per_launcher > 0) {
            return;
        }
        if !self.member {
            self.outside.asked_to_enter = Some(decision.epoch());
        }
        let (voters, message) =
            (decision.view.voters.clone(), Message::Ready { epoch: decision.epoch(), workers });
        self.send_to_all(&voters, &message);
    }

    fn on_ready(&mut self, from: Voter, workers: Vec<Incarnation>) {
        let Some(view) = self.view() else { return };
        let replaced = view.voters.iter().find(|voter| voter.seat == from.seat && **voter != from).copied();
        if let Some(old) = replaced {
            self.suspect(old.incarnation, Evidence::Replaced);
        }
        if self.newcomers.len() < MAX_LAUNCHERS || self.newcomers.contains_key(&from.incarnation) {
            self.newcomers.insert(from.incarnation, (from, workers));
        }
    }

    // ---- evidence ----

    fn suspect(&mut self, target: Incarnation, evidence: Evidence) {
        if target != self.me.incarnation && self.view().is_some_and(|view| view.has(target)) {
            let known = self.suspects.entry(target).or_insert(evidence);
            *known = evidence.min(*known);
        }
    }

    fn on_link_ended(&mut self, launcher: Incarnation, evidence: Evidence) {
        if evidence != Evidence::LinkLost {
            self.suspect(launcher, evidence);
        } else if self.heard.contains_key(&launcher) {
            self.lost_links.entry(launcher).or_insert(self.now);
        }
    }

    fn on_heard(&mut self, launcher: Incarnation) {
        if let Some(at) = self.heard.get_mut(&launcher) {
            *at = self.now;
        }
        self.lost_links.remove(&launcher);
        if !self.member {
            self.trouble = Some(self.now);
        }
        // A suspicion that nobody has acted on yet was a pause.
        let guessed = matches!(self.suspects.get(&launcher), Some(Evidence::Silent | Evidence::LinkLost));
        if guessed && self.wedged.is_none() {
            self.suspects.remove(&launcher);
        }
    }

    fn find_silent(&mut self) {
        let timing = self.job.timing;
        let overdue = |at: Duration, limit: Duration| self.now >= at + limit;
        let silent = self.heard.iter().filter(|&(_, &at)| overdue(at, timing.suspect)).map(|(&who, _)| who);
        let lost =
            self.lost_links.iter().filter(|&(_, &at)| overdue(at, timing.link_grace)).map(|(&who, _)| who);
        let children = self.children.values().filter(|child| overdue(child.heard, timing.suspect));
        let silent: Vec<_> = silent.chain(children.map(|child| child.hello.worker)).collect();
        let lost: Vec<_> = lost.collect();
        silent.into_iter().for_each(|who| self.suspect(who, Evidence::Silent));
        lost.into_iter().for_each(|who| self.suspect(who, Evidence::LinkLost));
    }

    // ---- time ----

    fn on_time(&mut self) {
        if self.member {
            self.on_time_as_member();
        } else {
            self.on_time_outside();
        }
        if self.trouble.is_some_and(|since| self.now >= since + self.job.timing.give_up) {
            let (epoch, waited) = (self.epoch(), self.job.timing.give_up.as_millis());
            let reason =
                format!("no membership after {epoch} within {waited} ms: too few launchers are reachable");
            self.act(LauncherAction::GiveUp(reason));
        }
    }

    fn on_time_as_member(&mut self) {
        let epoch = self.epoch();
        if self.now >= self.beat_at {
            self.beat_at = self.now + self.job.timing.heartbeat;
            let others = self.others();
            self.send_to_all(&others, &Message::Beat { epoch });
            if self.children.values().any(|child| child.ready) {
                self.announce_ready();
            }
        }
        self.find_silent();
        self.try_promise();
        self.drive();
    }

    fn others(&self) -> Vec<Voter> {
        let voters = self.view().map_or(&[][..], |view| &view.voters);
        voters.iter().filter(|voter| **voter != self.me).copied().collect()
    }

    /// How long this launcher waits before it leads an election that others have begun.
    fn patience(&self) -> Duration {
        let index =
            self.view().and_then(|view| view.voter(self.me.incarnation)).map_or(0, |(index, _)| index);
        self.job.timing.takeover * (index as u32 + 1)
    }

    fn hears_quorum(&self) -> bool {
        let heard = self.heard.iter().filter(|&(_, &at)| self.now < at + self.job.timing.suspect);
        let mut present: std::collections::BTreeSet<_> = heard.map(|(&who, _)| who).collect();
        present.insert(self.me.incarnation);
        self.job.fence == Fence::Lease || self.has_quorum(&present)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::progress::Progress;
    use crate::membership::settings::{CatchUp, Timing};
    use crate::membership::view::Mode;

    const MS: Duration = Duration::from_millis(1);

    /// The progress after so many steps in epoch 1.
    fn after(steps: u64) -> Progress {
        (0..steps).fold(Progress::START, |progress, _| progress.after(Epoch(1)))
    }

    /// The only launcher of a job of two workers, which it has founded.
    fn founded() -> Launcher {
        founded_with(2)
    }

    fn founded_with(workers: u16) -> Launcher {
        let (mode, fence, timing) = (Mode::Slots, Fence::Majority, Timing::default());
        let (slots, spares, catch_up) = (workers, 0, CatchUp::Results);
        let job =
            Job { seats: 1, workers_per_launcher: workers, slots, spares, mode, catch_up, fence, timing };
        let voter = Voter { seat: Seat(0), incarnation: Incarnation(99) };
        let mut launcher = Launcher::new(job, voter, Duration::ZERO);
        for worker in 1..=u128::from(workers) {
            let hello = Report { worker: Incarnation(worker), progress: Some(Progress::START), holds: true };
            say(&mut launcher, worker as u32, FromWorker::Hello(hello));
        }
        launcher.handle(400 * MS, LauncherEvent::Tick);
        launcher.handle(400 * MS, LauncherEvent::Claimed(Epoch(1)));
        assert_eq!(launcher.view().map(|view| view.members.len()), Some(workers.into()));
        launcher
    }

    fn say(launcher: &mut Launcher, child: u32, message: FromWorker) {
        say_at(launcher, 200 * MS, child, message);
    }

    fn say_at(launcher: &mut Launcher, now: Duration, child: u32, message: FromWorker) {
        launcher.handle(now, LauncherEvent::Worker { child: Child(child), message });
    }

    /// The epoch after the death of worker 2, when worker 1 reports that it has so many steps.
    fn epoch_when_the_survivor_reports(steps: u64) -> Epoch {
        let mut launcher = founded();
        say(&mut launcher, 1, FromWorker::Beat { stable: Step(4) });
        launcher.handle(401 * MS, LauncherEvent::WorkerDied(Child(2)));
        let report = Report { worker: Incarnation(1), progress: Some(after(steps)), holds: true };
        say(&mut launcher, 1, FromWorker::Report { epoch: Epoch(1), report });
        launcher.handle(500 * MS, LauncherEvent::Tick);
        launcher.epoch()
    }

    #[test]
    fn a_launcher_that_did_not_run_takes_nobody_else_for_silent() {
        let mut launcher = founded();
        launcher.handle(1500 * MS, LauncherEvent::Tick);
        assert_eq!(launcher.epoch(), Epoch(1));
        assert!(launcher.suspects.is_empty(), "{:?}", launcher.suspects);
        for at in (1550..2100).step_by(50) {
            say_at(&mut launcher, at * MS, 1, FromWorker::Beat { stable: Step(0) });
        }
        let silent = launcher.suspects.contains_key(&Incarnation(2)) || launcher.wedged.is_some();
        assert!(silent, "a worker that says nothing while the launcher runs is missed");
    }

    #[test]
    fn a_worker_that_is_slow_to_report_is_in_the_next_view_all_the_same() {
        let mut launcher = founded_with(3);
        launcher.handle(401 * MS, LauncherEvent::WorkerDied(Child(3)));
        for (at, worker) in [(402, 1), (540, 2)] {
            launcher.handle((at - 10) * MS, LauncherEvent::Tick);
            let report = Report { worker: Incarnation(worker), progress: Some(after(4)), holds: true };
            let message = FromWorker::Report { epoch: Epoch(1), report };
            say_at(&mut launcher, at * MS, worker as u32, message);
        }
        assert_eq!(launcher.epoch(), Epoch(2));
        assert_eq!(launcher.view().map(|view| view.members.len()), Some(2));
    }

    #[test]
    fn nobody_waits_for_the_report_of_a_worker_that_is_silent() {
        let mut launcher = founded();
        for at in (450..710).step_by(50) {
            say_at(&mut launcher, at * MS, 1, FromWorker::Beat { stable: Step(0) });
        }
        let report = Report { worker: Incarnation(1), progress: Some(after(4)), holds: true };
        say_at(&mut launcher, 710 * MS, 1, FromWorker::Report { epoch: Epoch(1), report });
        assert_eq!(launcher.view().map(|view| (view.epoch, view.members.len())), Some((Epoch(2), 1)));
    }

    #[test]
    fn no_view_begins_before_a_step_that_was_stable() {
        assert_eq!(epoch_when_the_survivor_reports(4), Epoch(2));
        assert_eq!(epoch_when_the_survivor_reports(5), Epoch(2));
        assert_eq!(epoch_when_the_survivor_reports(3), Epoch(1), "a step that was shown would be undone");
    }
}
