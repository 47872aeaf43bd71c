//! Drives the launcher's part of the membership, on a thread of its own.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use paceline_runtime::elastic::draw;
use paceline_runtime::elastic::pipe::{Contact, FromChild, ToChild, Welcome, Wish};
use paceline_runtime::membership::{
    Child, Envelope, Epoch, Evidence, Fence, FromWorker, Incarnation, Job, Launcher, LauncherAction,
    LauncherEvent, Message, Seat, Timing, Voter,
};
use paceline_runtime::rendezvous::worker;

use super::Shared;
use super::mesh::{Contacts, Heard, Mesh, Word};
use crate::cli::{Changes, RunArgs};
use crate::lease::{Answer, Keeper, Trouble};
use crate::rendezvous::Status;

#[cfg(test)]
mod tests;

/// How long the others may take to complete the training, once one has, while no worker here sends or receives a state or a
/// result: they are at the same step, or take what leads there over.
const COMPLETION_LIMIT: Duration = Duration::from_secs(10);

/// How long it is waited at most, whatever moves: it may be a worker that is started and lost again and again.
const COMPLETION_CEILING: Duration = Duration::from_secs(600);

/// How long an idle thread sleeps.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// When it is worth a line that nodes are missing.
const STATUS_AFTER: Duration = Duration::from_secs(2);

/// What the thread hears.
pub enum Input {
    /// A process has come and said what its program wants.
    Attached { child: Child, wish: Wish, to_worker: Sender<ToChild> },
    /// A process that has attached says something.
    Said { child: Child, message: FromChild },
    /// `waitpid` has returned for a process.
    Died(Child),
    /// Of the launcher of another node.
    Launcher { node: u32, heard: Heard },
    /// The lease has an answer.
    Lease(Answer),
}

/// What is settled before the thread starts.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The ranks of each node.
    pub ranks: u32,
    /// This node.
    pub node: u32,
    /// How many nodes there are, and how few may go on.
    pub nodes: (u32, u32),
    /// Why programs that come are refused, where that is settled.
    pub refusal: Option<String>,
    /// How long the first worker waits for the others.
    pub patience: Duration,
    /// The address at which the workers of this machine are reached.
    pub listen: IpAddr,
}

impl Setting {
    /// That of a job, whose workers are reached at `listen`.
    pub fn new(args: &RunArgs, listen: IpAddr) -> Self {
        let nodes = args.nodes.as_ref().map(|nodes| nodes.count);
        Self {
            ranks: args.ranks,
            node: args.node(),
            nodes: nodes.map_or((1, 1), |count| (count.max, count.min)),
            refusal: refusal(args),
            patience: args.rendezvous_timeout,
            listen,
        }
    }

    /// How many workers the job has when all are there.
    fn workers(&self) -> u16 {
        u16::try_from(self.ranks.saturating_mul(self.nodes.0)).unwrap_or(u16::MAX)
    }

    fn has_several_nodes(&self) -> bool {
        self.nodes.0 > 1
    }

    fn is_worker_of(&self, node: u32, member: &str) -> bool {
        let first = node * self.ranks;
        (first..first + self.ranks).any(|rank| member == worker(rank as usize))
    }
}

/// Why this job has no membership that may change, on several nodes.
fn refusal(args: &RunArgs) -> Option<String> {
    let count = args.nodes.as_ref()?.count;
    let advice = match args.changes() {
        Changes::Vote => return None,
        Changes::None => {
            format!("the number of nodes may not; give --nnodes 1:{}, or another least number", count.max)
        }
        Changes::StartAgain { .. } => {
            "with --rdzv-backend c10d all ranks start again instead; give --rdzv-backend \
                                       static, and each node its --node-rank"
                .to_owned()
        }
    };
    Some(format!("this program trains with a membership that may change, and {advice}"))
}

/// The state of the thread.
pub struct Membership {
    setting: Setting,
    shared: Arc<Shared>,
    status: Option<Status>,
    start: Instant,
    /// When the first worker came.
    first_came: Option<Instant>,
    /// What the first worker has asked for, and the protocol's core; none before.
    job: Option<(Wish, Launcher)>,
    workers: BTreeMap<Child, Worker>,
    /// Processes that are known to have ended: what they had said arrives later, and is of no use.
    dead: Vec<Child>,
    /// Who may begin the job with a state of its own.
    beginner: Option<Child>,
    /// The newest epoch that this launcher has heard of; see `claim`.
    stored: Epoch,
    mesh: Option<Mesh>,
    /// What decides in place of a vote, and why it had no answer the last time.
    lease: Option<Keeper>,
    lease_trouble: Option<String>,
    /// What is known of the other nodes.
    elsewhere: BTreeMap<u32, Elsewhere>,
    /// Since when there are fewer nodes than may go on.
    too_few: Option<Instant>,
    /// When the first worker had completed the training.
    completed: Option<Instant>,
    /// When a worker has said last that it sends or receives.
    moved: Option<Instant>,
    /// The other launchers have been told that all members here have completed it.
    announced: bool,
    /// Nobody needs these workers any more, and they have been told so.
    released: bool,
}

struct Worker {
    to_worker: Sender<ToChild>,
    contact: Option<Contact>,
    finished: bool,
}

/// Another node.
#[derive(Default)]
struct Elsewhere {
    contacts: Contacts,
    /// All of its members have completed the training.
    finished: bool,
}

impl Membership {
    /// `mesh` has the other launchers and `lease` what decides in place of their vote, where there are any.
    pub fn new(
        setting: Setting,
        shared: Arc<Shared>,
        status: Option<Status>,
        (mesh, lease): (Option<Mesh>, Option<Keeper>),
    ) -> Self {
        Self {
            setting,
            shared,
            status,
            start: Instant::now(),
            first_came: None,
            job: None,
            workers: BTreeMap::new(),
            dead: Vec::new(),
            beginner: None,
            stored: Epoch(0),
            mesh,
            lease,
            lease_trouble: None,
            elsewhere: BTreeMap::new(),
            too_few: None,
            completed: None,
            moved: None,
            announced: false,
            released: false,
        }
    }

    /// Starts the thread, which ends when nobody can tell it anything any more.
    pub fn start(self, inputs: Receiver<Input>) -> io::Result<()> {
        thread::Builder::new().name("membership".to_owned()).spawn(move || self.run(&inputs)).map(drop)
    }

    fn run(mut self, inputs: &Receiver<Input>) {
        loop {
            match inputs.recv_timeout(self.sleep()) {
                Ok(input) => self.hear(input),
                Err(RecvTimeoutError::Timeout) => self.tell_core(LauncherEvent::Tick),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.lose_patience();
            self.count_nodes();
            self.release_when_complete();
        }
    }

    /// Ends the wait of those that have come when others have not in time.
    fn lose_patience(&self) {
        let Some((_, core)) = self.job.as_ref().filter(|(_, core)| core.decision().is_none()) else { return };
        let Some(waited) = self.first_came.map(|at| at.elapsed()) else { return };
        let missing = self.missing_nodes();
        if waited >= STATUS_AFTER
            && !missing.is_empty()
            && let Some(status) = &self.status
        {
            status.waiting_for(&format!("{missing} to join the training"));
        }
        if waited >= self.setting.patience {
            let (seat, there) = (core.voter().seat.0, self.workers.len());
            let within = self.setting.patience.as_secs_f64();
            let ranks = self.setting.ranks;
            self.give_up(match there == ranks as usize && self.setting.has_several_nodes() {
                true if missing.is_empty() => format!("the job did not begin within {within} s"),
                true => format!("{missing} did not join the training within {within} s"),
                false => {
                    format!("only {there} of {ranks} ranks of node {seat} have joined the training within {within} s")
                }
            });
        }
    }

    /// The nodes whose workers are not all known here, in words.
    fn missing_nodes(&self) -> String {
        let is_there = |node: &u32| {
            let known = self.elsewhere.get(node).map_or(0, |there| there.contacts.all().count());
            *node == self.setting.node || known >= self.setting.ranks as usize
        };
        let missing = (0..self.setting.nodes.0).filter(|node| !is_there(node));
        let missing: Vec<String> = missing.take(16).map(|node| format!("node {node}")).collect();
        missing.join(", ")
    }

    /// Gives up when the job has had too few nodes for as long as others may take to come.
    fn count_nodes(&mut self) {
        let Some(view) = self.job.as_ref().and_then(|(_, core)| core.view()) else { return };
        let (present, least) = (view.voters.len(), self.setting.nodes.1 as usize);
        if present >= least {
            self.too_few = None;
        } else if self.too_few.get_or_insert_with(Instant::now).elapsed() >= self.setting.patience {
            self.give_up(format!("{present} nodes are left and at least {least} are to go on"));
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self) -> Duration {
        let due = self.job.as_ref().map(|(_, core)| core.deadline().saturating_sub(self.now()));
        due.map_or(LONGEST_SLEEP, |due| due.min(LONGEST_SLEEP))
    }

    fn hear(&mut self, input: Input) {
        match input {
            Input::Attached { child, wish, to_worker } => self.on_attached(child, wish, to_worker),
            Input::Said { child, message } if self.workers.contains_key(&child) => {
                self.on_said(child, message)
            }
            Input::Said { .. } => {}
            Input::Died(child) => self.on_died(child),
            Input::Launcher { node, heard } => self.on_launcher(node, heard),
            Input::Lease(answer) => self.on_lease(answer),
        }
    }

    // ---- workers ----

    fn on_attached(&mut self, child: Child, wish: Wish, to_worker: Sender<ToChild>) {
        // A send fails when the worker has gone, which `waitpid` says too.
        let refuse = |reason: String| drop(to_worker.send(ToChild::Refused { reason }));
        if let Some(reason) = &self.setting.refusal {
            return refuse(reason.clone());
        }
        if self.dead.contains(&child) || self.workers.contains_key(&child) {
            return refuse(format!("process {} has attached before, or has ended", child.0));
        }
        let workers = self.setting.workers();
        if wish.spares >= workers {
            let spares = wish.spares;
            return refuse(format!(
                "{spares} spares of {workers} workers leave none to compute; ask for fewer"
            ));
        }
        let fence = if self.lease.is_some() { Fence::Lease } else { Fence::Majority };
        let (start, job) = (self.now(), terms(wish, fence, &self.setting));
        let voter = Voter { seat: Seat(self.setting.node), incarnation: draw() };
        self.first_came.get_or_insert_with(Instant::now);
        let (first, core) = self.job.get_or_insert_with(|| (wish, Launcher::new(job, voter, start)));
        if *first != wish {
            return refuse(format!(
                "this program asks for {wish:?} and others for {first:?}; start the same program on all workers"
            ));
        }
        // With several nodes the state of node 0's worker is the one that counts.
        let begins = core.decision().is_none() && self.beginner.is_none() && self.setting.node == 0;
        if begins {
            self.beginner = Some(child);
        }
        drop(to_worker.send(ToChild::Welcome(Welcome { job, listen: self.setting.listen, begins })));
        let here = self.workers.values().filter_map(|worker| worker.contact.as_ref());
        let elsewhere = self.elsewhere.values().flat_map(|there| there.contacts.all());
        here.chain(elsewhere).for_each(|contact| drop(to_worker.send(ToChild::Contact(contact.clone()))));
        if self.released {
            drop(to_worker.send(ToChild::Finished));
        }
        self.workers.insert(child, Worker { to_worker, contact: None, finished: false });
        self.shared.lock().attached.insert(child, false);
        self.announce(Word::Wish(wish));
        tracing::info!(child = child.0, begins, "a worker has come");
    }

    fn on_said(&mut self, child: Child, message: FromChild) {
        match message {
            FromChild::Contact(contact) => self.on_contact(child, contact),
            FromChild::Says(message) => {
                if !matches!(message, FromWorker::Beat { .. }) {
                    self.shared.pulse.said();
                }
                self.tell_core(LauncherEvent::Worker { child, message });
                if let FromWorker::Suspect { target, evidence: Evidence::NoProgress, .. } = message {
                    self.end_stuck(target);
                }
            }
            FromChild::Moving => self.moved = Some(Instant::now()),
            FromChild::Finished => self.on_finished(child),
            FromChild::Attach { .. } => {}
        }
    }

    /// The others wait for that one, and its program does not come: only another process will.
    fn end_stuck(&mut self, target: Incarnation) {
        let is_target =
            |worker: &Worker| worker.contact.as_ref().is_some_and(|contact| contact.incarnation == target);
        if let Some((&child, _)) = self.workers.iter().find(|(_, worker)| is_target(worker)) {
            self.shared.lock().stuck.push(child);
            self.shared.news.ring();
        }
    }

    fn on_contact(&mut self, child: Child, contact: Contact) {
        let Some(worker) = self.workers.get_mut(&child) else { return };
        let old = worker.contact.replace(contact.clone());
        old.into_iter().for_each(|old| self.forget(old.incarnation));
        self.tell_all(&ToChild::Contact(contact.clone()));
        self.announce(Word::Contact(contact));
    }

    fn forget(&self, incarnation: Incarnation) {
        self.tell_all(&ToChild::Forget(incarnation));
        self.announce(Word::Forget(incarnation));
    }

    fn on_finished(&mut self, child: Child) {
        let Some(worker) = self.workers.get_mut(&child) else { return };
        worker.finished = true;
        self.shared.lock().attached.insert(child, true);
        self.completed.get_or_insert_with(Instant::now);
    }

    fn on_died(&mut self, child: Child) {
        self.dead.push(child);
        if self.beginner == Some(child) {
            self.beginner = None;
        }
        let Some(worker) = self.workers.remove(&child) else { return };
        self.tell_core(LauncherEvent::WorkerDied(child));
        worker.contact.iter().for_each(|contact| self.forget(contact.incarnation));
        self.look_whether_anybody_has_the_state();
    }

    /// Newcomers have none before they are members.
    fn look_whether_anybody_has_the_state(&self) {
        let Some(view) = self.job.as_ref().and_then(|(_, core)| core.view()) else { return };
        let mut contacts = self.workers.values().filter_map(|worker| worker.contact.as_ref());
        let alone = view.voters.len() == 1;
        if alone && !contacts.any(|contact| view.member(contact.incarnation).is_some()) {
            let saves = self.job.as_ref().is_some_and(|(wish, _)| wish.checkpoint_every.is_some());
            self.shared.lock().has_checkpoints = saves;
            self.give_up(format!("all workers of {} were lost, and the state with them", view.epoch));
        }
    }

    // ---- the end ----

    /// Lets the workers go when no member needs what they have. Those that are in no view have nothing to complete.
    fn release_when_complete(&mut self) {
        let finished_elsewhere = self.elsewhere.values().any(|there| there.finished);
        if self.released || self.completed.is_none() && !finished_elsewhere {
            return;
        }
        let here = self.are_members_finished();
        if here && self.completed.is_some() && !std::mem::replace(&mut self.announced, true) {
            self.announce(Word::Finished);
        }
        let since = self.completed.map(|at| self.moved.map_or(at, |moved| at.max(moved)));
        let overdue = since.is_some_and(|at| at.elapsed() >= COMPLETION_LIMIT)
            || self.completed.is_some_and(|at| at.elapsed() >= COMPLETION_CEILING);
        if overdue || here && self.are_others_finished() {
            self.released = true;
            self.tell_all(&ToChild::Finished);
        }
    }

    /// Whether all members of the view that run here have completed the training.
    fn are_members_finished(&self) -> bool {
        let view = self.job.as_ref().and_then(|(_, core)| core.view());
        let is_member = |worker: &&Worker| {
            let contact = worker.contact.as_ref();
            contact.is_some_and(|contact| view.is_some_and(|view| view.member(contact.incarnation).is_some()))
        };
        self.workers.values().filter(is_member).all(|worker| worker.finished)
    }

    fn are_others_finished(&self) -> bool {
        let view = self.job.as_ref().and_then(|(_, core)| core.view());
        let seats = view.iter().flat_map(|view| &view.voters).map(|voter| voter.seat.0);
        let is_finished = |node: u32| self.elsewhere.get(&node).is_some_and(|there| there.finished);
        seats.filter(|&node| node != self.setting.node).all(is_finished)
    }

    /// Once the training is complete nobody needs a membership.
    fn give_up(&self, reason: String) {
        let mut state = self.shared.lock();
        if self.completed.is_none() && !self.released && state.failed.is_none() {
            tracing::warn!(reason, "the membership cannot go on");
            state.failed = Some(reason);
            self.shared.news.ring();
        }
    }

    fn tell_all(&self, message: &ToChild) {
        self.workers.values().for_each(|worker| drop(worker.to_worker.send(message.clone())));
    }

    // ---- other launchers ----

    fn announce(&self, word: Word) {
        self.mesh.iter().for_each(|mesh| mesh.announce(word.clone()));
    }

    fn on_launcher(&mut self, node: u32, heard: Heard) {
        match heard {
            Heard::Came => {
                let before = self.elsewhere.insert(node, Elsewhere::default()).unwrap_or_default();
                let forget = |contact: &Contact| self.tell_all(&ToChild::Forget(contact.incarnation));
                before.contacts.all().for_each(forget);
            }
            Heard::Word(word) => self.on_word(node, word),
            Heard::Lost => self.on_lost(node, Evidence::LinkLost),
            Heard::Gone => self.on_lost(node, Evidence::Closed),
        }
    }

    fn on_lost(&mut self, node: u32, evidence: Evidence) {
        let view = self.job.as_ref().and_then(|(_, core)| core.view());
        let voter = view.and_then(|view| view.voters.iter().find(|voter| voter.seat.0 == node));
        if let Some(launcher) = voter.map(|voter| voter.incarnation) {
            tracing::info!(node, ?evidence, "a launcher's connection ended");
            self.tell_core(LauncherEvent::LinkEnded { launcher, evidence });
        }
    }

    fn on_word(&mut self, node: u32, word: Word) {
        match word {
            Word::Says(envelope) => {
                self.count(&envelope.message);
                self.tell_core(LauncherEvent::Message(envelope));
            }
            Word::Wish(theirs) => {
                if let Some((ours, core)) = self.job.as_ref().filter(|(ours, _)| *ours != theirs) {
                    let reason = format!(
                        "the program here asks for {ours:?} and that of node {node} for {theirs:?}; start the same \
                         program on all nodes"
                    );
                    // Whoever comes to a training that goes on must not end it; he hears our wish, and gives up.
                    match core.decision() {
                        Some(_) => tracing::warn!(node, reason, "another launcher's program does not fit"),
                        None => self.give_up(reason),
                    }
                }
            }
            Word::Contact(contact) => {
                let setting = &self.setting;
                let there = self.elsewhere.entry(node).or_default();
                if there.contacts.insert(&contact, |member| setting.is_worker_of(node, member)) {
                    self.tell_all(&ToChild::Contact(contact));
                }
            }
            Word::Forget(incarnation) => {
                if self.elsewhere.entry(node).or_default().contacts.remove(incarnation) {
                    self.tell_all(&ToChild::Forget(incarnation));
                }
            }
            Word::Workers(workers) => {
                let gone = self.elsewhere.entry(node).or_default().contacts.retain(&workers);
                gone.into_iter().for_each(|incarnation| self.tell_all(&ToChild::Forget(incarnation)));
            }
            Word::Finished => self.elsewhere.entry(node).or_default().finished = true,
            Word::Hello(_) | Word::Known(_) | Word::Alive => {}
        }
    }

    // ---- the lease ----

    fn on_lease(&mut self, answer: Answer) {
        self.lease.iter_mut().for_each(|lease| lease.heard(&answer));
        let trouble = match &answer {
            Answer::Failed(trouble) => Some(trouble.to_string()),
            Answer::Claimed(_) | Answer::Swapped(_) => None,
        };
        if let Some(trouble) = trouble.as_ref().filter(|_| trouble != self.lease_trouble) {
            tracing::warn!(trouble, "the lease has no answer");
        }
        self.lease_trouble = trouble;
        match answer {
            Answer::Claimed(epoch) => {
                self.stored = self.stored.max(epoch);
                self.tell_core(LauncherEvent::Claimed(epoch));
            }
            Answer::Swapped(Some(decision)) => self.tell_core(LauncherEvent::Swapped(decision)),
            // Another job is founded there, which this launcher is not in.
            Answer::Swapped(None) => {}
            Answer::Failed(Trouble::Lasting(reason)) => self.give_up(format!("the lease: {reason}")),
            Answer::Failed(Trouble::Passing(_)) => {}
        }
    }

    // ---- the core ----

    fn tell_core(&mut self, event: LauncherEvent) {
        let now = self.now();
        let Some((_, core)) = &mut self.job else { return };
        let mut todo: VecDeque<_> = core.handle(now, event).into();
        while let Some(action) = todo.pop_front() {
            let Some(answer) = self.perform(action) else { continue };
            // Before any other event: what is left to do comes after its answer.
            let Some((_, core)) = &mut self.job else { return };
            core.handle(now, answer).into_iter().rev().for_each(|action| todo.push_front(action));
        }
    }

    /// Counts a message between launchers; heartbeats do not.
    fn count(&self, message: &Message) {
        if !matches!(message, Message::Beat { .. }) {
            self.shared.pulse.said();
        }
    }

    /// Does what the core wants, and returns what it wants to know.
    fn perform(&mut self, action: LauncherAction) -> Option<LauncherEvent> {
        match action {
            LauncherAction::Worker { child, message } => {
                self.shared.pulse.said();
                if let Some(worker) = self.workers.get(&child) {
                    drop(worker.to_worker.send(ToChild::Says(message)));
                }
                None
            }
            LauncherAction::Send { to, message } => {
                self.count(&message);
                if let (Some(mesh), Some((_, core))) = (&self.mesh, &self.job) {
                    mesh.say(to.0, Envelope { from: core.voter(), message });
                }
                None
            }
            LauncherAction::Persist(epoch) => {
                self.stored = self.stored.max(epoch);
                tracing::info!(epoch = epoch.0, "membership");
                None
            }
            LauncherAction::Claim => {
                let next = claim(self.stored, self.setting.has_several_nodes());
                if let Some(lease) = &self.lease {
                    lease.claim(next);
                    return None;
                }
                self.stored = next;
                Some(LauncherEvent::Claimed(next))
            }
            LauncherAction::Draw => Some(LauncherEvent::Drawn(draw())),
            LauncherAction::GiveUp(reason) => {
                let trouble = self.lease_trouble.iter().map(|trouble| format!("; the lease: {trouble}"));
                self.give_up(reason + &trouble.collect::<String>());
                None
            }
            LauncherAction::Swap(decision) => {
                self.lease.iter_mut().for_each(|lease| lease.swap(decision.clone()));
                None
            }
        }
    }
}

/// The epoch after every one that the job has ever had. The only launcher of a job needs no memory beyond its own: its
/// workers end with it, and another launcher makes another authority, whose members are strangers to those of this job.
/// Of several, one may have been frozen while all others were started again. So a job that is founded counts from the time
/// of that: no job changes its view more than 65,536 times a second.
fn claim(stored: Epoch, several_nodes: bool) -> Epoch {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let floor = if several_nodes { Epoch(seconds << 16) } else { Epoch(0) };
    stored.max(floor).next()
}

fn terms(wish: Wish, fence: Fence, setting: &Setting) -> Job {
    let workers_per_launcher = u16::try_from(setting.ranks).unwrap_or(u16::MAX);
    Job {
        seats: setting.nodes.0,
        workers_per_launcher,
        slots: wish.slots.unwrap_or(setting.workers() - wish.spares),
        spares: wish.spares,
        mode: wish.mode,
        catch_up: wish.catch_up,
        fence,
        timing: Timing::default(),
    }
}
