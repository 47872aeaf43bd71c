//! Drives a worker's part of the membership: it is the one thread that hears everything and decides, by the core's rules,
//! what the program, the data plane and the exchange do. It also says that this worker is alive, so a process that does
//! not run is silent whatever its program is at.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::book::Book;
use super::exchange::{Arrival, Bytes, Exchange, Part};
use super::failpoint::{Failpoints, Point};
use super::links::{Fence, News, Order};
use super::pipe::{self, Contact, FromChild, ToChild};
use super::pool::Pool;
use super::program::{Gradient, Stable};
use super::saver::{self, Saving};
use super::sum::Shares;
use super::training::Inputs;
use super::{End, draw};
use crate::Error;
use crate::checkpoint::{Group, StableStep};
use crate::membership::{
    Epoch, Evidence, FromWorker, Incarnation, PeerMessage, Progress, Slot, Step, Stripe, ToWorker, Transfer,
    View, Worker, WorkerAction, WorkerEvent,
};

/// How long links that have failed by nobody's fault may wait for a view change: whoever has ended them early is told
/// at the same time.
const BROKEN_LIMIT: Duration = Duration::from_secs(5);

/// How often the launcher is told that a state or a result is under way.
const MOVING_INTERVAL: Duration = Duration::from_secs(1);

/// What the control thread hears.
pub(super) enum Input<G> {
    Launcher(ToChild),
    /// The launcher has closed the pipe, or says what makes no sense.
    LauncherGone(String),
    Peer(Arrival),
    Links(News<G>),
    /// The program has computed the inputs of the step after that state.
    Submitted {
        from: Progress,
        inputs: Inputs<G>,
    },
    /// The program has a copy of a part of its state for others.
    Saved {
        transfer: Transfer,
        stripe: Stripe,
        copy: Vec<u8>,
    },
    /// All is done here, but for others that may still need something.
    Closed,
    /// The program has been asked to leave.
    Leave,
    /// The program has failed, or does not listen any more.
    Abandoned,
}

/// What the program's thread is to do, in this order.
pub(super) enum Command<G> {
    Compute {
        from: Progress,
        slots: Vec<Slot>,
    },
    Apply {
        step: Step,
        mean: Arc<Vec<G>>,
        present: BTreeSet<Slot>,
    },
    /// Take over a state that comes in these parts.
    Load(Vec<Vec<u8>>),
    Save {
        transfer: Transfer,
        stripe: Stripe,
    },
    Stable(Stable),
    /// Save the state, which is the one after that step and has this lineage.
    Checkpoint {
        stable: StableStep,
        lineage: u64,
        group: Group,
    },
    /// The members of whose state something is being saved are not members together any more.
    StopSaving,
    End(Result<End, Error>),
}

/// What is known about the step after a state, besides the inputs.
struct Coming {
    from: Progress,
    /// The slots without a batch.
    idle: Vec<Slot>,
    saving: Saving,
}

/// The result of the step that led to the present state.
struct Kept<G> {
    step: Step,
    mean: Arc<Vec<G>>,
    present: Vec<Slot>,
}

/// A result as bytes.
struct MeanBytes<G>(Arc<Vec<G>>);

impl<G: Gradient> AsRef<[u8]> for MeanBytes<G> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// The ends of the channels to the other threads.
pub(super) struct Wires<G> {
    pub(super) pipe: Arc<UnixStream>,
    pub(super) orders: Sender<Order<G>>,
    pub(super) commands: Sender<Command<G>>,
}

pub(super) struct Control<G> {
    core: Worker,
    start: Instant,
    wires: Wires<G>,
    book: Arc<Book>,
    exchange: Exchange,
    fence: Arc<Fence>,
    contact: Contact,
    pool: Arc<Pool<G>>,
    failpoints: Failpoints,
    /// Messages sent and received, but for heartbeats.
    control_messages: u64,
    view: Option<View>,
    /// The members of the last view in which a step was reduced, and its epoch: they have reached each other.
    linked: (Epoch, BTreeSet<Incarnation>),
    /// Of which states the program is to copy which part, and for whom. One copy serves all who ask for the same.
    copying: BTreeMap<Part, BTreeSet<Incarnation>>,
    /// The last copy, as long as it is on its way to somebody.
    copied: Option<(Part, Weak<Vec<u8>>)>,
    /// The inputs of the next step.
    kept: BTreeMap<Slot, Arc<Vec<G>>>,
    coming: Option<Coming>,
    /// A step that is to run as soon as that is known, which a member without slots has to ask for.
    waiting: Option<(Epoch, Step)>,
    /// Since when the links of an epoch have failed without anybody to accuse.
    broken: Option<(Epoch, Instant, String)>,
    /// What has been reduced and is not applied yet.
    reduced: Option<Arc<Vec<G>>>,
    /// What has been received and is not adopted yet: a result or a state, of which other parts may be missing.
    received: BTreeMap<Stripe, (Vec<Slot>, Vec<u8>)>,
    result: Option<Kept<G>>,
    finished: bool,
    /// The state that the job was founded with, if this worker was there.
    founded_from: Option<Progress>,
    /// When something last came in of a transfer, and when the launcher was last told that something is under way.
    received_at: Option<Instant>,
    moving_said: Option<Instant>,
    todo: VecDeque<WorkerAction>,
    end: Option<Result<End, Error>>,
}

impl<G: Gradient> Control<G> {
    /// Begins with what the core wants to do first.
    pub(super) fn new(
        (core, first): (Worker, Vec<WorkerAction>),
        start: Instant,
        wires: Wires<G>,
        (book, exchange, fence): (Arc<Book>, Exchange, Arc<Fence>),
        contact: Contact,
        pool: Arc<Pool<G>>,
        failpoints: Failpoints,
    ) -> Self {
        Self {
            core,
            start,
            wires,
            book,
            exchange,
            fence,
            contact,
            pool,
            failpoints,
            control_messages: 0,
            view: None,
            linked: (Epoch(0), BTreeSet::new()),
            copying: BTreeMap::new(),
            copied: None,
            kept: BTreeMap::new(),
            coming: None,
            waiting: None,
            broken: None,
            reduced: None,
            received: BTreeMap::new(),
            result: None,
            finished: false,
            founded_from: None,
            received_at: None,
            moving_said: None,
            todo: first.into(),
            end: None,
        }
    }

    /// Runs until the training is over, here or everywhere. The program's thread is told last.
    pub(super) fn run(mut self, inputs: &Receiver<Input<G>>) {
        self.tell_launcher(&FromChild::Contact(self.contact.clone()));
        self.act();
        while self.end.is_none() {
            let due = self.core.deadline().saturating_sub(self.now());
            match inputs.recv_timeout(due) {
                Ok(input) => self.hear(input),
                Err(RecvTimeoutError::Timeout) => self.tell_core(WorkerEvent::Tick),
                Err(RecvTimeoutError::Disconnected) => self.end = Some(Ok(End::Abandoned)),
            }
            self.give_up_if_broken();
            self.say_what_moves();
        }
        self.fence.close(self.core.epoch());
        let end = self.end.take().expect("the loop ends with it");
        // Fails when the program has ended already.
        let _ = self.wires.commands.send(Command::End(end));
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn hear(&mut self, input: Input<G>) {
        match input {
            Input::Launcher(message) => self.on_launcher(message),
            Input::LauncherGone(reason) => self.fail(format!("the launcher has gone: {reason}")),
            // It is on its way; another one would only come later.
            Input::Peer(Arrival::Says { from, message }) if self.is_answered_already(from, message) => {
                self.control_messages += 1;
                self.say(from, PeerMessage::Soon);
            }
            Input::Peer(Arrival::Says { from, message }) => {
                self.control_messages += 1;
                self.tell_core(WorkerEvent::Peer { from, message })
            }
            // Results that do not follow the present state are of no use, and must not put off the question for another.
            Input::Peer(Arrival::Receiving(Transfer::Result { before, .. }))
                if self.core.progress() != Some(before) => {}
            Input::Peer(Arrival::Receiving(_)) => {
                self.received_at = Some(Instant::now());
                self.tell_core(WorkerEvent::Receiving);
            }
            Input::Peer(Arrival::Received { from, transfer, stripe, present, bytes }) => {
                if self.core.wants(transfer, stripe) {
                    self.received.insert(stripe, (present, bytes));
                    self.tell_core(WorkerEvent::Received { from, transfer, stripe });
                }
            }
            Input::Links(News::Reduced { epoch, step, mean, saved }) => {
                if self.core.runs_now(epoch, step) {
                    self.failpoints.pass(Point::Reduced, step);
                    // Before the step is applied: the program's state is still the one that all have.
                    saved.into_iter().for_each(|stable| self.checkpoint(stable));
                    if self.linked.0 != epoch {
                        self.linked = (epoch, self.members().collect());
                    }
                    self.tell_core(WorkerEvent::FirstReduced { epoch, step });
                    self.reduced = Some(Arc::new(mean));
                    self.tell_core(WorkerEvent::Reduced { epoch, step });
                } else {
                    self.pool.give(Arc::new(mean));
                }
            }
            Input::Links(News::Unformed { epoch, missing, reason }) => {
                tracing::warn!(epoch = epoch.0, reason, "the links of a view could not be made");
                if epoch == self.core.epoch() {
                    self.on_unformed(&missing, reason);
                }
            }
            Input::Links(News::Failed { epoch, lost, reason }) => {
                tracing::info!(epoch = epoch.0, ?lost, reason, "links failed");
                if epoch == self.core.epoch() {
                    self.on_failed_links(lost, reason);
                }
            }
            Input::Submitted { from, inputs } => {
                if self.core.progress() == Some(from) {
                    let slots = inputs.of.iter().map(|(slot, _)| *slot).collect();
                    self.kept.extend(inputs.of);
                    self.coming = Some(Coming { from, idle: inputs.idle, saving: inputs.saving });
                    self.tell_core(WorkerEvent::Submitted { from, slots });
                    if let Some((epoch, step)) =
                        self.waiting.take().filter(|&(e, s)| self.core.runs_now(e, s))
                    {
                        self.run_step(epoch, step, &[]);
                    }
                }
            }
            Input::Saved { transfer, stripe, copy } => {
                let copy = Arc::new(copy);
                self.copied = Some(((transfer, stripe), Arc::downgrade(&copy)));
                // Nobody, if it has become useless.
                for to in self.copying.remove(&(transfer, stripe)).unwrap_or_default() {
                    self.exchange.send(to, (transfer, stripe), Vec::new(), copy.clone());
                }
            }
            Input::Closed => {
                if !std::mem::replace(&mut self.finished, true) {
                    self.tell_launcher(&FromChild::Finished);
                }
            }
            Input::Leave => self.tell_core(WorkerEvent::Leave),
            Input::Abandoned => self.end = Some(Ok(End::Abandoned)),
        }
    }

    /// Whether the state that a worker asks for is on its way to it. Of use to a member is what its view begins with.
    fn is_answered_already(&self, from: Incarnation, message: PeerMessage) -> bool {
        let under_way = |stripe| {
            let is_for_it =
                |copy: &(&Part, &BTreeSet<Incarnation>)| copy.0.1 == stripe && copy.1.contains(&from);
            let copying = self.copying.iter().find(is_for_it).map(|((transfer, _), _)| *transfer);
            copying.or_else(|| self.exchange.state_under_way(from, stripe))
        };
        match message {
            PeerMessage::Pull { .. } => under_way(Stripe::WHOLE).is_some(),
            PeerMessage::Fetch { epoch, stripe, .. } if epoch == self.core.epoch() => {
                let begins = self.core.decision().map(|decision| decision.resolution.state());
                under_way(stripe).is_some_and(|transfer| Some(transfer.reaches()) == begins)
            }
            _ => false,
        }
    }

    /// Ends what is on its way to the members of the new view, but for the state that it begins with: nothing else is of
    /// use to them, and they wait.
    fn end_useless_transfers(&mut self) {
        let Some(decision) = self.core.decision() else { return };
        let is_useless = |to: Incarnation, transfer: Transfer| {
            decision.view.member(to).is_some() && transfer.reaches() != decision.resolution.state()
        };
        self.copying.retain(|&(transfer, _), whom| {
            whom.retain(|&to| !is_useless(to, transfer));
            !whom.is_empty()
        });
        self.exchange.cancel(is_useless);
    }

    fn on_launcher(&mut self, message: ToChild) {
        self.control_messages += 1;
        match message {
            ToChild::Contact(contact) => self.book.insert(contact),
            ToChild::Forget(incarnation) => {
                self.book.remove(incarnation);
                self.exchange.forget(incarnation);
            }
            ToChild::Says(message) => {
                if let ToWorker::Install(decision) = &message
                    && decision.view.member(self.core.incarnation()).is_some()
                {
                    self.failpoints.pass(Point::Install, decision.resolution.applied);
                    if self.core.decision().is_none() {
                        self.founded_from = Some(decision.resolution.state());
                    }
                }
                self.tell_core(WorkerEvent::Launcher(message));
            }
            ToChild::Finished => {
                self.end = Some(Ok(if self.finished { End::Complete } else { End::Elsewhere }));
            }
            ToChild::Welcome(_) | ToChild::Refused { .. } => {
                self.fail("the launcher said what it may not".to_owned());
            }
        }
    }

    /// The links are of no use any more. Somebody has died, as a rule, and the launcher says so in a moment.
    fn on_failed_links(&mut self, lost: Vec<(Incarnation, Evidence)>, reason: String) {
        if lost.is_empty() {
            self.broken = Some((self.core.epoch(), Instant::now(), reason));
        }
        for (peer, evidence) in lost {
            self.tell_core(WorkerEvent::PeerClosed { peer, evidence });
        }
    }

    fn members(&self) -> impl Iterator<Item = Incarnation> + '_ {
        self.view.iter().flat_map(|view| &view.members).map(|member| member.incarnation)
    }

    /// Members go on without those who have just come in and cannot be reached. One of those ends: another process may be
    /// reached, and the same one would only hold the others up again.
    ///
    /// Before the first step nobody has reached anybody: whoever most others cannot be reached by is like a newcomer then.
    fn on_unformed(&mut self, missing: &[Incarnation], reason: String) {
        let me = self.core.incarnation();
        let begins = self.core.decision().map(|decision| decision.resolution.state());
        let before_the_first =
            begins == Some(Progress::START) || begins.is_some() && begins == self.founded_from;
        let lost: Vec<Incarnation> = if self.linked.1.contains(&me) {
            self.members().filter(|member| !self.linked.1.contains(member)).collect()
        } else if before_the_first && !self.is_cut_off(missing) {
            missing.to_vec()
        } else {
            return self.fail(reason);
        };
        self.on_failed_links(lost.into_iter().map(|lost| (lost, Evidence::LinkLost)).collect(), reason);
    }

    /// Whether it is this worker that cannot be reached, by the others to whom it has no link; of two it is the one whose
    /// state does not count.
    fn is_cut_off(&self, missing: &[Incarnation]) -> bool {
        let Some(decision) = self.core.decision() else { return true };
        let others = decision.view.members.len() - 1;
        match others {
            1 => !decision.resolution.sources.contains(&self.core.incarnation()),
            _ => missing.is_empty() || 2 * missing.len() > others,
        }
    }

    /// Without anybody to accuse, and without a view change for a while, this worker is of no use; its successor may be.
    fn give_up_if_broken(&mut self) {
        let over = |(epoch, since, _): &mut (Epoch, Instant, String)| {
            *epoch < self.core.epoch() || since.elapsed() >= BROKEN_LIMIT
        };
        if let Some((epoch, _, reason)) = self.broken.take_if(over)
            && epoch == self.core.epoch()
        {
            self.fail(reason);
        }
    }

    /// The launcher ends nobody who still takes over what the others have, or who gives it to them.
    fn say_what_moves(&mut self) {
        let is_recent = |at: Option<Instant>| at.is_some_and(|at| at.elapsed() < MOVING_INTERVAL);
        if is_recent(self.moving_said) {
            return;
        }
        if is_recent(self.received_at) || self.exchange.is_sending() {
            self.moving_said = Some(Instant::now());
            self.tell_launcher(&FromChild::Moving);
        }
    }

    fn fail(&mut self, reason: String) {
        self.end.get_or_insert(Err(Error::Membership { reason }));
    }

    fn tell_launcher(&mut self, message: &FromChild) {
        if !matches!(message, FromChild::Says(FromWorker::Beat { .. })) {
            self.control_messages += 1;
        }
        if let Err(error) = pipe::send(&self.wires.pipe, message) {
            self.fail(format!("the launcher has gone: {error}"));
        }
    }

    fn say(&mut self, to: Incarnation, message: PeerMessage) {
        self.control_messages += 1;
        self.exchange.say(to, message);
    }

    fn tell_core(&mut self, event: WorkerEvent) {
        let actions = self.core.handle(self.now(), event);
        self.todo.extend(actions);
        self.act();
    }

    fn act(&mut self) {
        while let Some(action) = self.todo.pop_front() {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: WorkerAction) {
        match action {
            WorkerAction::Launcher(message) => {
                if let (FromWorker::Ready { .. }, Some(state)) = (&message, self.core.progress()) {
                    self.failpoints.pass(Point::Ready, state.applied);
                }
                self.tell_launcher(&FromChild::Says(message));
            }
            WorkerAction::Peer { to, message } => self.say(to, message),
            WorkerAction::Send { to, transfer, stripe } => self.send(to, transfer, stripe),
            WorkerAction::Open(view) => {
                self.end_useless_transfers();
                self.received.clear();
                self.view = Some(view.clone());
                self.order(Order::Open { view, me: self.core.incarnation() });
            }
            WorkerAction::Close(epoch) => {
                self.fence.close(epoch);
                self.command(Command::StopSaving);
            }
            WorkerAction::Compute { from, slots } => self.command(Command::Compute { from, slots }),
            WorkerAction::Run { epoch, step, slots } => self.run_step(epoch, step, &slots),
            WorkerAction::Apply(step) => {
                let (Some(mean), Some(view)) = (self.reduced.take(), &self.view) else { return };
                let present = view.members.iter().flat_map(|member| member.slots.iter().copied()).collect();
                self.apply(step, mean, present);
            }
            WorkerAction::Adopt(transfer) => self.adopt(transfer),
            WorkerAction::Stable(step) => {
                let loss = self.result.as_ref().filter(|result| result.step == step);
                let loss = loss.and_then(|result| result.mean.last()).map(|loss| loss.to_f64());
                let all = self.view.as_ref().map_or(&[][..], |view| &view.members);
                let contributors = all.iter().filter(|member| !member.slots.is_empty()).count();
                let (epoch, members, control_messages) =
                    (self.core.epoch(), all.len(), self.control_messages);
                let stable = Stable { step, epoch, members, contributors, loss, control_messages };
                self.command(Command::Stable(stable));
            }
            WorkerAction::Release(_) => self.forget_result(),
            WorkerAction::Draw => self.draw(),
            WorkerAction::Left => self.end = Some(Ok(End::Left)),
            WorkerAction::Broken(reason) => self.fail(reason),
        }
    }

    fn run_step(&mut self, epoch: Epoch, step: Step, slots: &[Slot]) {
        let (Some(view), Some(from)) = (&self.view, self.core.progress()) else { return };
        let Some(coming) = self.coming.as_ref().filter(|coming| coming.from == from) else {
            self.waiting = Some((epoch, step));
            return self.command(Command::Compute { from, slots: Vec::new() });
        };
        let (shares, saving) = (Shares::of(view, &coming.idle), coming.saving);
        let inputs = slots.iter().filter_map(|slot| self.kept.get(slot).cloned()).collect();
        self.order(Order::Run { epoch, step, shares, inputs, saving });
    }

    /// Has the program save its state, with the other members of the view if they have the same.
    fn checkpoint(&mut self, stable: StableStep) {
        let (Some(view), Some(state)) = (&self.view, self.core.progress()) else { return };
        let Some(group) = saver::group(view, self.core.incarnation(), self.core.catch_up()) else { return };
        self.command(Command::Checkpoint { stable, lineage: state.lineage, group });
    }

    fn apply(&mut self, step: Step, mean: Arc<Vec<G>>, present: Vec<Slot>) {
        self.forget_inputs();
        self.forget_result();
        let slots = present.iter().copied().collect();
        self.result = Some(Kept { step, mean: mean.clone(), present });
        self.command(Command::Apply { step, mean, present: slots });
    }

    fn forget_inputs(&mut self) {
        std::mem::take(&mut self.kept).into_values().for_each(|input| self.pool.give(input));
    }

    fn forget_result(&mut self) {
        self.result.take().into_iter().for_each(|result| self.pool.give(result.mean));
    }

    fn adopt(&mut self, transfer: Transfer) {
        let mut parts = std::mem::take(&mut self.received);
        // One that comes whole while parts of it do takes their place.
        let whole = parts.remove(&Stripe::WHOLE);
        match transfer {
            Transfer::Result { after, .. } => {
                let Some((present, bytes)) = whole else { return };
                let mut mean = self.pool.take();
                // The exchange takes in no result of another size.
                bytemuck::cast_slice_mut(&mut mean).copy_from_slice(&bytes);
                self.apply(after.applied, Arc::new(mean), present);
            }
            Transfer::State { .. } => {
                self.forget_inputs();
                self.forget_result();
                let parts = whole.map_or_else(|| parts.into_values().collect(), |whole| vec![whole]);
                self.command(Command::Load(parts.into_iter().map(|(_, bytes)| bytes).collect()));
            }
        }
    }

    fn send(&mut self, to: Incarnation, transfer: Transfer, stripe: Stripe) {
        match (transfer, &self.result) {
            (Transfer::Result { after, .. }, Some(kept)) if kept.step == after.applied => {
                let bytes: Bytes = Arc::new(MeanBytes(kept.mean.clone()));
                self.exchange.send(to, (transfer, stripe), kept.present.clone(), bytes);
            }
            // Whoever asked does so again, and gets the state.
            (Transfer::Result { .. }, _) => {}
            (Transfer::State { .. }, _) => self.send_state(to, (transfer, stripe)),
        }
    }

    fn send_state(&mut self, to: Incarnation, what: Part) {
        let copy = self.copied.as_ref().filter(|(of, _)| *of == what).and_then(|(_, copy)| copy.upgrade());
        if let Some(copy) = copy {
            return self.exchange.send(to, what, Vec::new(), copy);
        }
        // A newer state takes the place of one that it has not been sent yet.
        self.copying.retain(|of, whom| {
            if of.1 == what.1 {
                whom.remove(&to);
            }
            !whom.is_empty()
        });
        let whom = self.copying.entry(what).or_default();
        whom.insert(to);
        if whom.len() == 1 {
            self.command(Command::Save { transfer: what.0, stripe: what.1 });
        }
    }

    fn draw(&mut self) {
        let old = self.core.incarnation();
        let me = draw();
        tracing::info!(%old, new = %me, "out of the view; entering again");
        self.contact.incarnation = me;
        self.received.clear();
        self.exchange.become_incarnation(me);
        self.tell_launcher(&FromChild::Contact(self.contact.clone()));
        // Before any other event: what is left to do comes after its answer.
        let answer = self.core.handle(self.now(), WorkerEvent::Drawn(me));
        answer.into_iter().rev().for_each(|action| self.todo.push_front(action));
    }

    fn order(&mut self, order: Order<G>) {
        if self.wires.orders.send(order).is_err() {
            self.fail("the data plane has ended".to_owned());
        }
    }

    fn command(&mut self, command: Command<G>) {
        if self.wires.commands.send(command).is_err() {
            self.end.get_or_insert(Ok(End::Abandoned));
        }
    }
}
