//! Where the members of a job meet for the first time.
//!
//! The server runs in rank 0's launcher. Each worker dials it over TLS with the job's certificates, on TCP
//! whatever the links between the ranks will be, so that a network that blocks UDP is no obstacle. It says
//! which rank it is and at which port it listens, and gets the list of all members as soon as the last one
//! has come. The connection stays open: over it the launcher tells the workers when one of them has died.
//!
//! ```text
//! worker                                server
//! Join{rank, world_size, …}     ─────▶
//!                               ◀─────  Waiting{missing}      whenever somebody comes
//!                               ◀─────  Roster{epoch, members}  when all are there
//!                               ◀─────  Died{rank, cause} | Exited{rank}   from then on, or before
//! Failed{because_of}            ─────▶  this worker failed, because of another one or not
//!                               ◀─────  Trace     at the first such word, or when the launcher wants it: write what
//!                                                 you did last
//! ```
//! A member may only join as the rank its certificate was made for. Strangers do not get this far: the
//! endpoint refuses them. In a job of several nodes the other launchers connect here too (see `nodes`),
//! and the ranks start when they are all there.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use paceline_transport::boot::{Claim, Registrar, Verdict};
use paceline_transport::identity::Identity;
use paceline_transport::quic::Knock;
use paceline_transport::tls::{Connection, Dialler, Endpoint, MessageReceiver, MessageSender};
use paceline_transport::{Fabric, IoHandle, Member, Roster};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::Error;
use crate::nodes::{
    self, BEAT, Causes, Failure, Generation, LOST_NODE, OnChange, Order, Report, SILENCE, Seats, Settled,
    Terms,
};

/// The member name of the launcher that serves the rendezvous.
pub const LAUNCHER: &str = "launcher-0";

/// The member name of the worker that starts as `rank`.
pub fn worker(rank: usize) -> String {
    format!("worker-{rank}")
}

/// From a worker to the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Request {
    /// `generation` is the one that the worker was started for.
    Join {
        rank: u32,
        world_size: u32,
        generation: u32,
        door: Door,
    },
    Failed {
        because_of: Option<u32>,
    },
}

/// Where a worker is dialled by the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Door {
    /// The address; `None` for the one from which it dials the server.
    pub(crate) ip: Option<IpAddr>,
    pub(crate) port: u16,
    /// For links of this kind.
    pub(crate) fabric: Fabric,
    /// What its QUIC endpoint wants to hear, where it has one.
    pub(crate) knock: Option<Knock>,
}

/// A worker as the others are told of it: its member name, where it is dialled, and what to say there.
type Listed = (String, SocketAddr, Option<Knock>);

/// From the server to a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Notice {
    Waiting { missing: Vec<u32> },
    Roster { epoch: u64, members: Vec<Listed> },
    Refused { reason: String },
    Died { rank: u32, cause: String },
    Exited { rank: u32 },
    Trace,
}

/// Missing ranks listed to those who wait; the list is for people.
const NAMED_RANKS_LIMIT: usize = 32;

/// The epoch of the first roster.
const FIRST_EPOCH: u64 = 1;

/// How long a launcher whose ranks have all ended may have to wait for its verdict: until the end of the
/// rank that is blamed is known too, which is on its way.
const VERDICT_LIMIT: Duration = Duration::from_secs(1);

/// How long a launcher may take to say which it is.
const ATTEND_LIMIT: Duration = Duration::from_secs(5);

/// The meeting place, served until it is dropped.
pub struct Server {
    io: IoHandle,
    endpoint: Endpoint,
    shared: Arc<Shared>,
    timeout: Duration,
    accept: tokio::task::JoinHandle<()>,
    patience: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// How far the start of a generation has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Not all launchers are there.
    Waiting,
    /// The ranks of this one may run.
    Started(Generation),
    /// These nodes have not come in time.
    Missing(Vec<u32>),
    /// It may not start, for this reason.
    Barred(String),
}

/// Whether the ranks may start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leave {
    /// They may.
    Granted,
    /// Not now, for this reason.
    NotYet(String),
    /// Neither now nor later, for this reason.
    Refused(String),
}

/// Who gives leave when enough nodes are there, each time before the ranks start. May block for a few seconds.
pub type Warden = Arc<dyn Fn() -> Leave + Send + Sync>;

/// The pause before leave is asked for again.
const LEAVE_PAUSE: Duration = Duration::from_millis(200);

struct Shared {
    nodes: usize,
    state: Mutex<State>,
    /// The other launchers have all come, or one has come or gone, or the job is [barred](Server::bar).
    attendance: Notify,
    on_change: OnChange,
    warden: OnceLock<Warden>,
}

struct State {
    joined: BTreeMap<usize, Joined>,
    /// What is to be told to whoever joins later.
    notices: Vec<Notice>,
    seats: Seats,
    start: Start,
    /// How many generations there have been before.
    generation: u32,
    /// To each launcher that attends.
    orders: BTreeMap<u32, UnboundedSender<Order>>,
    causes: Causes,
    /// Whether the workers were asked for traces because one has failed.
    traced: bool,
    /// A rank has finished that decides for all: how the others end is of no consequence.
    completed: bool,
    /// Why no generation may start any more.
    barred: Option<String>,
}

struct Joined {
    member: String,
    addr: SocketAddr,
    fabric: Fabric,
    knock: Option<Knock>,
    notices: UnboundedSender<Notice>,
}

impl Server {
    /// Serves the rendezvous of a job at `addr`, on the I/O thread of `io`. `on_change` is called when there
    /// is news from other nodes. Ranks that have not joined `timeout` after the start are named to those that
    /// have, which ends their wait; a job on one host starts at once, others with
    /// [`wait_for_nodes`](Self::wait_for_nodes).
    ///
    /// # Errors
    /// The transport's: nothing can listen there, or the identity is unusable.
    pub fn bind(
        io: &IoHandle,
        addr: SocketAddr,
        identity: &Identity,
        terms: Terms,
        timeout: Duration,
        on_change: OnChange,
    ) -> Result<Self, paceline_transport::Error> {
        let nodes = terms.layout.nodes;
        let endpoint = Endpoint::bind(io, addr, identity)?;
        let state = State {
            joined: BTreeMap::new(),
            notices: Vec::new(),
            seats: Seats::new(terms),
            start: Start::Waiting,
            generation: 0,
            orders: BTreeMap::new(),
            causes: Causes::default(),
            traced: false,
            completed: false,
            barred: None,
        };
        let (state, attendance) = (Mutex::new(state), Notify::new());
        let shared = Arc::new(Shared { nodes, state, attendance, on_change, warden: OnceLock::new() });
        let accept = io.spawn(accept_all(io.clone(), endpoint.clone(), shared.clone()));
        let server = Self { io: io.clone(), endpoint, shared, timeout, accept, patience: Mutex::new(None) };
        if nodes == 1 {
            server.lose_patience_later();
        }
        Ok(server)
    }

    /// What it listens with, for another service on its port.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Where it listens, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.endpoint.local_addr()
    }

    /// Decides which nodes get certificates.
    pub fn registrar(&self) -> Arc<dyn Registrar> {
        self.shared.clone()
    }

    /// Lets the job start again so often after a failure. The other launchers stay until it is known whether it does:
    /// say [`begin_again`](Self::begin_again), or [`conclude`](Self::conclude).
    pub fn allow_restarts(&self, most: u32) {
        self.shared.lock().seats.allow_restarts(most);
    }

    /// Has a job of several nodes start, and start again, with the leave of this one alone. Said once, before it starts.
    pub fn ask(&self, warden: Warden) {
        // Whoever asks twice has the first one.
        let _ = self.shared.warden.set(warden);
    }

    /// Ends the job as one that this launcher has failed in, and lets no generation start any more. Does not block.
    pub fn bar(&self, reason: &str, exit_code: u8) {
        let mut state = self.shared.lock();
        if state.barred.is_some() {
            return;
        }
        state.barred = Some(reason.to_owned());
        state.seats.allow_no_restarts();
        let cause = format!("may not go on: {reason}");
        self.shared.fail(&mut state, Failure { node: 0, rank: None, cause, exit_code }, reason);
        drop(state);
        self.shared.attendance.notify_one();
        (self.shared.on_change)();
    }

    /// Waits until the launchers of all other nodes have come, or enough of them, and starts the job on them, as its first
    /// generation, or, where some of them have lost another launcher 0 of this job, as the generation after theirs, with what `instead`
    /// says besides its number. `waiting` is called with the nodes that are missing, at the beginning and whenever that
    /// changes. Blocks.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] naming the nodes that have not come by `deadline`, or saying why the job may not start; the others
    /// are told.
    pub fn wait_for_nodes(
        &self,
        (first, instead): (Generation, Generation),
        deadline: Instant,
        waiting: impl Fn(&[u32]) + Send + 'static,
    ) -> Result<(), Error> {
        let shared = self.shared.clone();
        self.io.block_on(async move { shared.start((first, instead), deadline, waiting).await })?;
        match self.start() {
            Start::Missing(missing) => {
                let endpoint = self.local_addr().to_string();
                Err(Error::Rendezvous { endpoint, reason: nodes_missing(&missing) })
            }
            Start::Barred(reason) => {
                Err(Error::Rendezvous { endpoint: self.local_addr().to_string(), reason })
            }
            Start::Waiting | Start::Started(_) => {
                self.lose_patience_later();
                Ok(())
            }
        }
    }

    /// How far the start of the present generation has come. A job on one host starts when it is told to, so for its first
    /// generation this stays [`Start::Waiting`].
    pub fn start(&self) -> Start {
        self.shared.lock().start.clone()
    }

    /// Whether the job starts again because another node has come.
    pub fn changes(&self) -> bool {
        self.shared.lock().seats.changes()
    }

    /// Whether the job may start again.
    pub fn may_restart(&self) -> bool {
        self.shared.lock().seats.may_restart()
    }

    /// Starts the job again as the generation `next`, when no rank runs any more: forgets who had joined and what had failed, and waits, in
    /// the background, for the launchers of nodes that were lost. [`start`](Self::start) says how far that has come. Does not block.
    pub fn begin_again(
        &self,
        next: Generation,
        deadline: Instant,
        waiting: impl Fn(&[u32]) + Send + 'static,
    ) {
        {
            let mut state = self.shared.lock();
            let State { seats, orders, .. } = &mut *state;
            seats.begin_again(&next, |node| orders.contains_key(&node));
            state.joined.clear();
            state.notices.clear();
            state.causes = Causes::default();
            state.traced = false;
            state.completed = false;
            state.start = Start::Waiting;
            state.generation = next.number;
        }
        if self.shared.nodes == 1 {
            self.shared.lock().start = Start::Started(next);
        } else {
            let shared = self.shared.clone();
            self.io.spawn(async move {
                // Whoever comes in a lost one's place has not been part of another job.
                shared.start((next.clone(), next), deadline, waiting).await;
                (shared.on_change)();
            });
        }
        self.lose_patience_later();
    }

    /// Tells the launchers that have stayed what the job has failed of, if it has: it does not start again. Does not block.
    pub fn conclude(&self) {
        self.shared.lock().causes.conclude();
        let cause = self.cause();
        let mut state = self.shared.lock();
        state.seats.allow_restarts(0);
        state.order_all(&Order::Verdict { cause });
    }

    /// Tells everybody that a rank of this host is dead, if that is the first failure of the job; the others
    /// are its consequences. `cause` completes the sentence "rank 2 …"; `by_itself`: its launcher had not told
    /// it to end. Does not block.
    pub fn announce_death(&self, rank: usize, cause: &str, exit_code: u8, by_itself: bool) {
        self.shared.died((0, rank as u32), cause.to_owned(), exit_code, by_itself);
    }

    /// Tells all launchers that the job is over because this rank has exited with code 0 and decides for all: they end
    /// their ranks, and exit with 0 too. Does not block.
    pub fn announce_completion(&self, rank: usize) {
        let mut state = self.shared.lock();
        // A job that has failed stays failed.
        if state.causes.first().is_none() {
            state.completed = true;
            state.order_all(&Order::Completed { rank: rank as u32 });
        }
    }

    /// Tells every worker that a rank has exited with code 0. Those who have its goodbye ignore it.
    /// Does not block.
    pub fn announce_exit(&self, rank: usize) {
        self.shared.exited(rank as u32);
    }

    /// Has all workers that have joined write what they did last, if they were told where. Does not block.
    pub fn ask_for_traces(&self) {
        self.shared.lock().tell_all(&Notice::Trace);
    }

    /// What ends the ranks of all nodes: the first failure of the job that was noticed, on whichever node, or that another
    /// one has come.
    pub fn failure(&self) -> Option<Failure> {
        self.shared.lock().causes.first()
    }

    /// What the job has failed of, or what has ended the generation, by what the workers said about each other before they ended.
    pub fn cause(&self) -> Option<Failure> {
        match self.shared.lock().causes.settled() {
            Settled::Known(cause) => cause,
            Settled::Open(first) => Some(first),
        }
    }

    /// The other nodes whose ranks have not ended.
    pub fn nodes_at_work(&self) -> Vec<u32> {
        self.shared.lock().seats.at_work()
    }

    /// Whether all other launchers have gone.
    pub fn is_alone(&self) -> bool {
        self.shared.lock().orders.is_empty()
    }

    /// The ranks that have not joined yet.
    pub fn missing(&self) -> Vec<usize> {
        self.shared.missing(&self.shared.lock())
    }

    fn lose_patience_later(&self) {
        let patience = self.io.spawn(lose_patience(self.shared.clone(), self.timeout));
        let before = self.patience.lock().unwrap_or_else(PoisonError::into_inner).replace(patience);
        before.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let patience = self.patience.lock().unwrap_or_else(PoisonError::into_inner).take();
        patience.iter().chain([&self.accept]).for_each(tokio::task::JoinHandle::abort);
    }
}

impl Registrar for Shared {
    fn admit(&self, claim: &Claim, remote: SocketAddr) -> Verdict {
        let verdict = self.lock().seats.admit(claim, remote, Instant::now());
        tracing::info!(node = claim.node, %remote, ?verdict, "a launcher asks for certificates");
        verdict
    }

    fn may_certify(&self, claim: &Claim, member: &str) -> bool {
        self.lock().seats.may_certify(claim, member)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves a consistent state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn missing(&self, state: &State) -> Vec<usize> {
        (0..state.seats.world_size()).filter(|rank| !state.joined.contains_key(rank)).collect()
    }

    fn died(&self, (node, rank): (u32, u32), cause: String, exit_code: u8, by_itself: bool) {
        let failure = Failure { node, rank: Some(rank), cause: cause.clone(), exit_code };
        let mut state = self.lock();
        if !state.completed && state.causes.died(rank, failure.clone(), by_itself) {
            state.tell(Notice::Died { rank, cause });
            state.order_all(&Order::Failed(failure));
            state.ask_for_traces_once();
        }
        drop(state);
        (self.on_change)();
    }

    fn exited(&self, rank: u32) {
        let mut state = self.lock();
        state.causes.exited(rank);
        state.tell(Notice::Exited { rank });
    }

    /// A launcher was lost, and its ranks with it.
    fn lost(&self, state: &mut State, node: u32, reason: &str) {
        tracing::warn!(node, reason, "a launcher was lost");
        let cause = format!("was lost: {reason}");
        self.fail(state, Failure { node, rank: None, cause, exit_code: LOST_NODE }, reason);
    }

    /// A launcher and its ranks end, for this reason.
    fn fail(&self, state: &mut State, failure: Failure, reason: &str) {
        let node = failure.node;
        if !state.completed && state.causes.lost(failure.clone()) {
            for rank in state.seats.ranks(node) {
                let cause = format!("was lost with the launcher of node {node}: {reason}");
                state.tell(Notice::Died { rank, cause });
            }
            state.order_all(&Order::Failed(failure));
            state.ask_for_traces_once();
        }
    }

    /// A launcher has come to a job that runs: all ranks start again, with those of its node too. Where they end in any case it
    /// waits for what follows.
    fn take_in(&self, state: &mut State, node: u32) {
        let goes_on = !state.completed && !state.causes.any_exited();
        if !goes_on || state.causes.has_failed() || !state.seats.change(node) {
            return;
        }
        if state.causes.came(node) {
            state.order_all(&Order::Changes { node });
        }
    }

    /// Waits for the launchers and starts them, or tells them which are missing at the deadline.
    async fn start(
        &self,
        (first, instead): (Generation, Generation),
        deadline: Instant,
        waiting: impl Fn(&[u32]),
    ) {
        let (mut told, mut has_leave, mut said) = (None, false, None);
        loop {
            let (ready, missing, last_call_ends) = {
                let mut state = self.lock();
                let now = Instant::now();
                if now >= deadline {
                    state.seats.end_last_call();
                }
                if let Some(reason) = &state.barred {
                    let reason = reason.clone();
                    return state.refuse_all(reason);
                }
                let has_leave = std::mem::take(&mut has_leave) || self.warden.get().is_none();
                if has_leave && state.seats.start(now) {
                    return state.begin(first, instead);
                }
                let ready = !has_leave && state.seats.are_ready(now);
                (ready, state.seats.missing(), state.seats.last_call_ends(now))
            };
            if ready {
                match self.leave().await {
                    Leave::Granted => has_leave = true,
                    Leave::NotYet(reason) if Instant::now() < deadline => {
                        if said.as_ref() != Some(&reason) {
                            tracing::warn!(reason, "the job may not start yet");
                            said = Some(reason);
                        }
                        tokio::time::sleep(LEAVE_PAUSE).await;
                    }
                    Leave::NotYet(reason) | Leave::Refused(reason) => {
                        return self.lock().refuse_all(reason);
                    }
                }
                continue;
            }
            if told.as_ref() != Some(&missing) {
                if !missing.is_empty() {
                    waiting(&missing);
                }
                self.lock().order_all(&Order::Waiting { missing: missing.clone() });
                told = Some(missing.clone());
            }
            let until = match last_call_ends {
                None => deadline,
                Some(end) if end > Instant::now() => end.min(deadline),
                // One that has come and is silent is soon heard or missed.
                Some(_) => Instant::now() + SILENCE,
            };
            // A permit is stored when somebody comes, speaks or goes meanwhile.
            let _ = tokio::time::timeout_at(until.into(), self.attendance.notified()).await;
            let mut state = self.lock();
            if Instant::now() >= deadline && !state.seats.are_enough() {
                let missing = state.seats.missing();
                state.order_all(&Order::Refused { reason: nodes_missing(&missing), for_now: false });
                state.start = Start::Missing(missing);
                return;
            }
        }
    }

    /// Whether the ranks may start now.
    async fn leave(&self) -> Leave {
        let Some(warden) = self.warden.get().cloned() else { return Leave::Granted };
        let asked = tokio::task::spawn_blocking(move || warden()).await;
        asked.unwrap_or_else(|_| Leave::Refused("whoever gives leave to start has panicked".to_owned()))
    }

    /// What the job has failed of, when it is certain, or after a second what is known then.
    async fn verdict(&self) -> Option<Failure> {
        let until = Instant::now() + VERDICT_LIMIT;
        loop {
            match self.lock().causes.settled() {
                Settled::Known(cause) => return cause,
                Settled::Open(first) if Instant::now() >= until => return Some(first),
                Settled::Open(_) => {}
            }
            tokio::time::sleep(VERDICT_LIMIT / 50).await;
        }
    }

    /// Lets a member in, or says why not.
    fn join(&self, request: &Request, connection: &Connection) -> Result<UnboundedReceiver<Notice>, String> {
        let &Request::Join { rank, world_size, generation, door } = request else {
            return Err("the first message must be a join".to_owned());
        };
        let Door { ip, port, fabric, knock } = door;
        let (rank, world_size) = (rank as usize, world_size as usize);
        let ip = ip.unwrap_or_else(|| connection.remote_address().ip()).to_canonical();
        if ip.is_unspecified() || ip.is_multicast() {
            return Err(format!("rank {rank} gives {ip} for its address, which is that of no host"));
        }
        let (sender, notices) = unbounded_channel();
        let mut state = self.lock();
        if generation != state.generation {
            let present = state.generation;
            return Err(format!(
                "rank {rank} was started for generation {generation}, and this is {present}"
            ));
        }
        let ranks = state.seats.world_size();
        if world_size != ranks {
            return Err(format!("the job has {ranks} ranks, not {world_size}"));
        }
        if state.seats.member(rank).is_none_or(|member| member != connection.member()) {
            return Err(format!("{} may not join as rank {rank}", connection.member()));
        }
        if rank >= world_size || state.joined.contains_key(&rank) {
            return Err(format!("rank {rank} has joined before"));
        }
        if let Some((other, joined)) = state.joined.iter().find(|(_, joined)| joined.fabric != fabric) {
            return Err(format!(
                "rank {rank} wants the links `{fabric}` and rank {other} `{}`; give all ranks the same --fabric or \
                 PACELINE_FABRIC",
                joined.fabric
            ));
        }
        // Receivers live as long as their connection; a failed send means that the worker has gone.
        state.notices.iter().for_each(|notice| drop(sender.send(notice.clone())));
        let addr = SocketAddr::new(ip, port);
        let member = connection.member().to_owned();
        state.joined.insert(rank, Joined { member, addr, fabric, knock, notices: sender });
        let missing = self.missing(&state);
        tracing::info!(rank, %addr, missing = missing.len(), "joined");
        if missing.is_empty() {
            let addrs: Vec<SocketAddr> = state.joined.values().map(|joined| joined.addr).collect();
            if let Some(reason) = unreachable(&addrs) {
                tracing::warn!(reason, "the ranks cannot reach each other");
                state.tell(Notice::Refused { reason });
                return Ok(notices);
            }
            let listed = |joined: &Joined| (joined.member.clone(), joined.addr, joined.knock);
            let members = state.joined.values().map(listed).collect();
            let epoch = FIRST_EPOCH + u64::from(state.generation);
            state.tell_all(&Notice::Roster { epoch, members });
        } else {
            let missing = missing.into_iter().take(NAMED_RANKS_LIMIT).map(|rank| rank as u32).collect();
            state.tell_all(&Notice::Waiting { missing });
        }
        Ok(notices)
    }
}

impl State {
    /// Whether a generation other than the first has not started yet.
    fn waits_for_nodes(&self) -> bool {
        self.generation > 0 && matches!(self.start, Start::Waiting)
    }

    /// All launchers are there.
    fn begin(&mut self, first: Generation, instead: Generation) {
        let generation = self.seats.begins_with(first, instead);
        self.generation = generation.number;
        self.order_all(&Order::Start(generation.clone()));
        self.start = Start::Started(generation);
    }

    /// The launchers that attend may go, and nothing starts.
    fn refuse_all(&mut self, reason: String) {
        self.order_all(&Order::Refused { reason: reason.clone(), for_now: false });
        self.start = Start::Barred(reason);
    }

    /// A worker has failed: what the others did meanwhile is of interest, also of those that notice nothing.
    fn ask_for_traces_once(&mut self) {
        if !std::mem::replace(&mut self.traced, true) {
            self.tell_all(&Notice::Trace);
        }
    }

    /// Tells all workers that have joined, and those that will.
    fn tell(&mut self, notice: Notice) {
        self.tell_all(&notice);
        self.notices.push(notice);
    }

    fn tell_all(&self, notice: &Notice) {
        self.joined.values().for_each(|joined| drop(joined.notices.send(notice.clone())));
    }

    /// Tells all launchers that attend.
    fn order_all(&self, order: &Order) {
        // A failed send means that the launcher has gone, which its connection says too.
        self.orders.values().for_each(|orders| drop(orders.send(order.clone())));
    }
}

/// Why some members cannot reach others: those that came over the loopback of launcher 0's host say so, while
/// others came from elsewhere.
fn unreachable(addrs: &[SocketAddr]) -> Option<String> {
    let local = addrs.iter().position(|addr| addr.ip().is_loopback())?;
    addrs.iter().any(|addr| !addr.ip().is_loopback()).then(|| {
        format!(
            "rank {local} has the address {}, which other hosts cannot reach; give an address of node 0 in \
             --rdzv-endpoint, or a name that does not mean the loopback interface there, and none of loopback in \
             --interface",
            addrs[local].ip()
        )
    })
}

fn nodes_missing(nodes: &[u32]) -> String {
    format!("timed out waiting for node {}", list(nodes, ", node "))
}

fn list(numbers: &[u32], between: &str) -> String {
    let names: Vec<String> = numbers.iter().take(NAMED_RANKS_LIMIT).map(u32::to_string).collect();
    names.join(between)
}

/// Ends the wait of those that have come when others have not in time.
async fn lose_patience(shared: Arc<Shared>, timeout: Duration) {
    // Where the job starts again, its ranks do when the nodes have met.
    while shared.lock().waits_for_nodes() {
        tokio::time::sleep(BEAT).await;
    }
    tokio::time::sleep(timeout).await;
    let missing = shared.missing(&shared.lock());
    if !missing.is_empty() {
        let missing: Vec<u32> = missing.into_iter().take(NAMED_RANKS_LIMIT).map(|rank| rank as u32).collect();
        let reason = waited_in_vain(&missing);
        tracing::warn!(reason, "the ranks have not met");
        shared.lock().tell(Notice::Refused { reason });
    }
}

async fn accept_all(io: IoHandle, endpoint: Endpoint, shared: Arc<Shared>) {
    // An error of accept is the end of the I/O thread; bad clients are not among them.
    while let Ok(connection) = endpoint.accept().await {
        io.spawn(serve(connection, shared.clone()));
    }
}

/// Serves one worker until its connection ends.
async fn serve(connection: Connection, shared: Arc<Shared>) {
    let remote = connection.remote_address();
    let served = match nodes::node_of(connection.member()) {
        Some(node) => serve_launcher(&connection, node, &shared).await,
        None => serve_lane(&connection, &shared).await,
    };
    if let Err(error) = served {
        tracing::debug!(%remote, member = connection.member(), %error, "rendezvous connection ended");
    }
}

async fn serve_lane(connection: &Connection, shared: &Shared) -> Result<(), paceline_transport::Error> {
    let (mut sender, mut receiver) = connection.accept_messages().await?;
    let Some(request) = receiver.recv::<Request>().await? else { return Ok(()) };
    let generation = shared.lock().generation;
    let mut notices = match shared.join(&request, connection) {
        Ok(notices) => notices,
        Err(reason) => {
            tracing::warn!(remote = %connection.remote_address(), member = connection.member(), reason, "refused a join");
            sender.send(&Notice::Refused { reason }).await?;
            return sender.finish().await;
        }
    };
    let own_rank = match request {
        Request::Join { rank, .. } => Some(rank),
        Request::Failed { .. } => None,
    };
    loop {
        tokio::select! {
            notice = notices.recv() => match notice {
                Some(notice) => sender.send(&notice).await?,
                None => return Ok(()),
            },
            request = receiver.recv::<Request>() => match request? {
                Some(Request::Failed { because_of }) => {
                    let mut state = shared.lock();
                    // A word of a rank that has ended since is about another generation's failure.
                    if state.generation != generation {
                        continue;
                    }
                    if let (Some(blamer), Some(rank)) = (own_rank, because_of) {
                        state.causes.blames(blamer, rank);
                    }
                    state.ask_for_traces_once();
                }
                Some(Request::Join { .. }) => {}
                None => return Ok(()),
            },
        }
    }
}

/// Serves the launcher of a node until its connection ends, which is a loss unless its ranks had ended.
async fn serve_launcher(
    connection: &Connection,
    node: u32,
    shared: &Arc<Shared>,
) -> Result<(), paceline_transport::Error> {
    let (mut sender, mut receiver) = connection.accept_messages().await?;
    let Ok(first) = tokio::time::timeout(ATTEND_LIMIT, receiver.recv::<Report>()).await else {
        return Ok(());
    };
    let Some(Report::Attend { claim, after }) = first? else { return Ok(()) };
    let (orders, outgoing) = unbounded_channel();
    let attends = {
        let mut state = shared.lock();
        let attends = state.seats.attend(node, &claim, connection.remote_address(), Instant::now());
        if attends == Verdict::Admitted {
            drop(orders.send(Order::Waiting { missing: state.seats.missing() }));
            state.orders.insert(node, orders.clone());
            after.into_iter().for_each(|past| state.seats.comes_after(past));
            if state.seats.is_late(node) {
                shared.take_in(&mut state, node);
            }
        }
        attends
    };
    (shared.on_change)();
    let for_now = matches!(attends, Verdict::NotNow(_));
    if let Verdict::Refused(reason) | Verdict::NotNow(reason) = attends {
        tracing::warn!(remote = %connection.remote_address(), node, reason, "refused a launcher");
        sender.send(&Order::Refused { reason, for_now }).await?;
        return sender.finish().await;
    }
    tracing::info!(node, remote = %connection.remote_address(), "a launcher has come");
    shared.attendance.notify_one();
    let ended = follow_launcher((sender, receiver), node, shared, (orders.clone(), outgoing)).await;
    let reason = match &ended {
        Ok(()) => "it closed the connection".to_owned(),
        Err(error) => nodes::reason_of(error.clone()),
    };
    {
        let mut state = shared.lock();
        // One that has left may have a successor.
        let is_present = state.orders.get(&node).is_some_and(|present| present.same_channel(&orders));
        if is_present {
            state.orders.remove(&node);
        }
        // Together: whoever sees it gone without a failure takes the job for finished.
        if is_present && state.seats.disconnected(node) {
            shared.lost(&mut state, node, &reason);
        }
    }
    (shared.on_change)();
    shared.attendance.notify_one();
    Ok(())
}

/// Passes news on, in both directions.
async fn follow_launcher(
    (mut sender, mut receiver): (MessageSender, MessageReceiver),
    node: u32,
    shared: &Arc<Shared>,
    (orders, mut outgoing): (UnboundedSender<Order>, UnboundedReceiver<Order>),
) -> Result<(), paceline_transport::Error> {
    let mut beat = tokio::time::interval(BEAT);
    let silence = tokio::time::sleep(SILENCE);
    tokio::pin!(silence);
    loop {
        let report = tokio::select! {
            report = receiver.recv::<Report>() => report?,
            // This function holds a sender: there is always another order.
            Some(order) = outgoing.recv() => {
                sender.send(&order).await?;
                continue;
            }
            _ = beat.tick() => {
                sender.send(&Order::Beat).await?;
                continue;
            }
            () = &mut silence => {
                let what = format!("a word of the launcher of node {node}");
                let ranks = Vec::new();
                return Err(paceline_transport::Error::TimedOut { what, ranks, elapsed: SILENCE });
            }
        };
        silence.as_mut().reset((Instant::now() + SILENCE).into());
        if shared.lock().seats.heard(node, Instant::now()) {
            shared.attendance.notify_one();
        }
        let of_node = |rank: u32| shared.lock().seats.ranks(node).contains(&rank);
        match report {
            Some(Report::Died { rank, cause, exit_code, by_itself }) if of_node(rank) => {
                shared.died((node, rank), nodes::quote(&cause), exit_code.max(1), by_itself);
            }
            Some(Report::Exited { rank }) if of_node(rank) => shared.exited(rank),
            Some(Report::Ended) => {
                let may_restart = {
                    // Whoever hears of the end may start the job again at once, and then fewer restarts are left.
                    let mut state = shared.lock();
                    state.seats.ended(node);
                    state.seats.may_restart()
                };
                (shared.on_change)();
                if may_restart {
                    continue;
                }
                let (shared, orders) = (shared.clone(), orders.clone());
                tokio::spawn(async move {
                    let cause = shared.verdict().await;
                    // A launcher that is gone needs no verdict.
                    let _ = orders.send(Order::Verdict { cause });
                });
            }
            Some(Report::Left) => {
                let mut state = shared.lock();
                if state.seats.is_missed(node) {
                    // Its ranks may have taken the signal for the end of their work, but the job's is not done.
                    shared.lost(&mut state, node, "it was told to stop");
                }
                state.seats.ended(node);
                // It is not counted on when the job starts again.
                state.orders.remove(&node);
                drop(state);
                (shared.on_change)();
            }
            Some(Report::Beat) => {}
            Some(Report::AskForTraces) => shared.lock().tell_all(&Notice::Trace),
            Some(Report::Attend { .. } | Report::Died { .. } | Report::Exited { .. }) => {
                let reason = format!("the launcher of node {node} said what it may not");
                return Err(paceline_transport::Error::Usage { reason });
            }
            None => return Ok(()),
        }
    }
}

/// A worker's side of the rendezvous.
pub(crate) struct Client {
    _connection: Connection,
    sender: MessageSender,
    receiver: MessageReceiver,
    /// Deaths and exits that came before the roster was complete, to be told first.
    early: Vec<News>,
}

/// A worker that has met all others.
pub(crate) struct Met {
    pub(crate) client: Client,
    pub(crate) roster: Roster,
    /// What the QUIC endpoints at these addresses want to hear.
    pub(crate) knocks: Vec<(SocketAddr, Knock)>,
}

/// What the launcher says about another rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It is dead; the cause completes "rank 2 …".
    Died { rank: usize, cause: String },
    /// It exited with code 0.
    Exited { rank: usize },
    /// The launcher wants to know what this rank did last.
    Trace,
}

/// Pauses between attempts to reach the server, which may not be up yet.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

impl Client {
    /// Joins over a connection to the server as `rank` of the job, which the others dial at `door`, and waits for all
    /// others, until `deadline`. The server gives up by itself and says who is missing; the deadline is for a
    /// server that says nothing.
    pub(crate) async fn join(
        (connection, server): (Connection, String),
        job: String,
        (rank, world_size, generation): (usize, usize, u32),
        door: Door,
        deadline: Instant,
    ) -> Result<Met, Error> {
        let failed = |reason: String| Error::Rendezvous { endpoint: server.clone(), reason };
        let (mut sender, receiver) = connection.open_messages().await?;
        let (own_rank, ranks) = (rank as u32, world_size as u32);
        sender.send(&Request::Join { rank: own_rank, world_size: ranks, generation, door }).await?;
        let mut client = Self { _connection: connection, sender, receiver, early: Vec::new() };
        let mut missing = Vec::new();
        let timeout = tokio::time::sleep_until(deadline.into());
        tokio::pin!(timeout);
        loop {
            let notice = tokio::select! {
                notice = client.receiver.recv::<Notice>() => notice.map_err(|error| failed(error.to_string()))?,
                () = &mut timeout => return Err(failed(waited_in_vain(&missing))),
            };
            match notice {
                Some(Notice::Waiting { missing: ranks }) => {
                    tracing::info!(rank, ?ranks, "waiting for ranks");
                    missing = ranks;
                }
                Some(Notice::Roster { epoch, members }) => {
                    let knocks =
                        members.iter().filter_map(|(_, addr, knock)| Some((*addr, (*knock)?))).collect();
                    let members = members.into_iter().map(|(name, addr, _)| Member { name, addr }).collect();
                    return Ok(Met { client, roster: Roster { job, epoch, rank, members }, knocks });
                }
                Some(Notice::Refused { reason }) => return Err(failed(reason)),
                Some(Notice::Died { rank, cause }) => {
                    return Err(failed(format!("rank {rank} {cause} before all ranks had met")));
                }
                Some(Notice::Exited { rank }) => client.early.push(News::Exited { rank: rank as usize }),
                // There is nothing yet to be traced.
                Some(Notice::Trace) => {}
                None => return Err(failed("the launcher closed the connection".to_owned())),
            }
        }
    }

    /// The next news of another rank; `None` when the launcher is gone.
    pub(crate) async fn news(&mut self) -> Option<News> {
        if let Some(news) = self.early.pop() {
            return Some(news);
        }
        loop {
            match self.receiver.recv::<Notice>().await {
                Ok(Some(Notice::Died { rank, cause })) => {
                    return Some(News::Died { rank: rank as usize, cause });
                }
                Ok(Some(Notice::Exited { rank })) => return Some(News::Exited { rank: rank as usize }),
                Ok(Some(Notice::Trace)) => return Some(News::Trace),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Puts news back, to be told again.
    pub(crate) fn keep(&mut self, news: News) {
        self.early.push(news);
    }

    /// Tells the launcher that this rank has failed, because of another one or not.
    pub(crate) async fn failed(&mut self, because_of: Option<usize>) {
        let because_of = because_of.map(|rank| rank as u32);
        // A launcher that is gone needs no reasons.
        let _ = self.sender.send(&Request::Failed { because_of }).await;
    }
}

/// Resolves and dials until the server answers, at each of a name's addresses in turn. Being refused is final; no
/// answer is not.
pub(crate) async fn dial(dialler: &Dialler, server: &str, deadline: Instant) -> Result<Connection, String> {
    let (mut pause, mut attempt) = (FIRST_PAUSE, 0);
    loop {
        let reason = match tokio::net::lookup_host(server).await {
            Ok(addrs) => match in_turn(addrs.collect(), attempt) {
                Some(addr) => match dialler.connect(addr, LAUNCHER).await {
                    Ok(connection) => return Ok(connection),
                    Err(error @ paceline_transport::Error::Refused { .. }) => return Err(error.to_string()),
                    Err(error) => error.to_string(),
                },
                None => "the name has no address".to_owned(),
            },
            Err(error) => format!("cannot resolve it: {error}"),
        };
        if Instant::now() + pause >= deadline {
            return Err(reason);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        attempt += 1;
    }
}

/// The address for an attempt, counted from 0.
fn in_turn(addrs: Vec<SocketAddr>, attempt: usize) -> Option<SocketAddr> {
    addrs.get(attempt.checked_rem(addrs.len())?).copied()
}

fn waited_in_vain(missing: &[u32]) -> String {
    match missing {
        [] => "timed out before anybody was heard of".to_owned(),
        missing => format!("timed out waiting for rank {}", list(missing, ", rank ")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn loopback_addresses_are_reachable_from_each_other_alone() {
        let addrs = |ips: &[&str]| -> Vec<SocketAddr> {
            ips.iter().map(|ip| SocketAddr::new(ip.parse().expect("an address"), 1)).collect()
        };
        assert_eq!(unreachable(&addrs(&["127.0.0.1", "127.0.0.1"])), None);
        assert_eq!(unreachable(&addrs(&["10.0.0.1", "fd00::1"])), None);
        let reason = unreachable(&addrs(&["10.0.0.1", "127.0.1.1"])).expect("unreachable");
        assert!(reason.starts_with("rank 1 has the address 127.0.1.1,"), "{reason}");
    }

    #[test]
    fn each_address_of_a_name_has_its_turn() {
        let addrs: Vec<SocketAddr> =
            ["10.0.0.1:1", "[fd00::1]:1"].map(|addr| addr.parse().expect("one")).to_vec();
        let turns: Vec<_> = (0..3).map(|attempt| in_turn(addrs.clone(), attempt)).collect();
        assert_eq!(turns, [Some(addrs[0]), Some(addrs[1]), Some(addrs[0])]);
        assert_eq!(in_turn(Vec::new(), 0), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_messages_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            use paceline_transport::wire;
            let _ = wire::decode::<Request>(&bytes);
            if let Ok(Notice::Roster { members, .. }) = wire::decode::<Notice>(&bytes) {
                // Each takes more bytes than that.
                prop_assert!(members.len() < bytes.len());
            }
        }
    }
}
