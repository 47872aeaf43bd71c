//! Forming one link to every other rank of an epoch.
//!
//! The higher rank dials the lower one. A link has connections of its own: a control lane and a data
//! stream, both in both directions. The dialler opens the lane, says [`LinkHello`] and opens the data
//! stream; the link counts, on both sides, with [`LinkWelcome`].
//!
//! How connections are made is the business of a [`LinkEndpoint`]; who may have which link is decided here.
//!
//! One [`Door`] accepts for all groups of an epoch on an endpoint: that of the epoch itself and those that
//! were split from it. It lives as long as one of them, to turn away what comes late: a member of another
//! epoch, a stranger to the roster, a second link for a pair that has one.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout, timeout_at};

use crate::close::{CloseCode, quote};
use crate::control_lane::{LinkConnection, MessageIn, MessageOut};
use crate::forming::place;
use crate::identity::Identity;
use crate::io::{IoHandle, Task};
use crate::{CONTROL_MESSAGE_LIMIT, Error, Forming, Transport};

/// How long a dialler that has been let in may take to say [`LinkHello`].
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// How long somebody who asks for a link of a group may wait until this rank begins to form it. Members
/// begin at the same time, but for their own delays; who comes later dials again.
const GROUP_LIMIT: Duration = Duration::from_secs(2);

/// The group of all ranks of an epoch.
const WORLD: u64 = 0;

/// The limits between which the time for one attempt to dial doubles. The first ones are short, since
/// QUIC repeats an unanswered first packet ever more slowly and a peer that is just starting should be
/// found soon.
const ATTEMPT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// The limits between which the pause after a failed attempt doubles.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// The longest message on a control lane: encoding adds which one it is, and its length.
pub(crate) const CONTROL_LIMIT: usize = CONTROL_MESSAGE_LIMIT + 8;

/// Who is in an epoch: the list all its members agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    /// The job's name, as in the certificates.
    pub job: String,
    /// The epoch's number. Links of another epoch are refused.
    pub epoch: u64,
    /// This process's rank: its index in `members`.
    pub rank: usize,
    /// The members in rank order, this one included.
    pub members: Vec<Member>,
}

/// One member of an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The name in the member's certificate.
    pub name: String,
    /// Where its endpoint listens.
    pub addr: SocketAddr,
}

/// Where a member dials others and is dialled: what links of one kind are made with.
pub(crate) trait LinkEndpoint: Clone + fmt::Debug + Send + Sync + 'static {
    /// An authenticated connection between two members.
    type Connection: LinkConnection;

    /// The thread on which its links are made.
    fn io(&self) -> &IoHandle;

    /// The next member that has dialled.
    fn accept(&self) -> impl Future<Output = Result<Self::Connection, Error>> + Send;

    /// Dials `member` at `addr`, for at most `limit`.
    fn connect_within(
        &self,
        addr: SocketAddr,
        member: &str,
        limit: Duration,
    ) -> impl Future<Output = Result<Self::Connection, Error>> + Send;

    /// Opens the control lane of a link, as the one who dialled.
    fn open_control(connection: &Self::Connection) -> impl Future<Output = Result<Lane<Self>, Error>> + Send;

    /// Takes the control lane of a link, as the one who was dialled.
    fn accept_control(
        connection: &Self::Connection,
    ) -> impl Future<Output = Result<Lane<Self>, Error>> + Send;

    /// Opens the data stream of a link whose [`LinkHello`] has been said, as the one who dialled.
    fn open_data(
        &self,
        connection: &Self::Connection,
        addr: SocketAddr,
        control: &mut Lane<Self>,
    ) -> impl Future<Output = Result<DataOf<Self>, Error>> + Send;

    /// Takes the data stream of a link that may exist, as the one who was dialled.
    fn accept_data(
        &self,
        connection: &Self::Connection,
        control: &mut Lane<Self>,
    ) -> impl Future<Output = Result<DataOf<Self>, Error>> + Send;
}

/// Both halves of a control lane.
pub(crate) type Lane<E> = (
    <<E as LinkEndpoint>::Connection as LinkConnection>::Sender,
    <<E as LinkEndpoint>::Connection as LinkConnection>::Receiver,
);

/// The data stream of a link.
pub(crate) type DataOf<E> = <<E as LinkEndpoint>::Connection as LinkConnection>::Data;

/// The streams of one link. Its connection is closed as aborted when it is dropped, unless told otherwise.
#[derive(Debug)]
pub(crate) struct RawLink<C: LinkConnection> {
    // The order matters: the connection must be closed before the streams are dropped, as dropping a
    // sending stream ends it in order.
    pub(crate) connection: CloseOnDrop<C>,
    pub(crate) control: (C::Sender, C::Receiver),
    pub(crate) data: C::Data,
}

/// A connection that is closed when this value is dropped.
#[derive(Debug)]
pub(crate) struct CloseOnDrop<C: LinkConnection> {
    connection: C,
    code: CloseCode,
}

/// All links of a new transport, and what refuses further ones while it lives.
#[derive(Debug)]
pub(crate) struct Mesh<E: LinkEndpoint> {
    pub(crate) roster: Roster,
    /// By rank; `None` at this rank.
    pub(crate) links: Vec<Option<RawLink<E::Connection>>>,
    pub(crate) gate: Gate<E>,
}

/// Accepts everybody who dials an endpoint in one epoch, and sends them to the gatekeeper of the group that
/// they ask for.
#[derive(Debug)]
pub(crate) struct Door<E: LinkEndpoint> {
    endpoint: E,
    gates: Arc<Gates<E>>,
    _accept_loop: Task<()>,
}

/// The gatekeepers behind a door.
#[derive(Debug)]
struct Gates<E: LinkEndpoint> {
    job: String,
    epoch: u64,
    by_group: Mutex<HashMap<u64, Arc<Gatekeeper<E>>>>,
    opened: Notify,
}

/// What keeps an endpoint open for a set of links: a group's place behind the door, until it is dropped, or the
/// endpoint alone for [links of a pair](crate::pair).
#[derive(Debug)]
pub(crate) struct Gate<E: LinkEndpoint> {
    endpoint: E,
    place: Option<(Arc<Door<E>>, u64)>,
}

/// Asks for a link.
#[derive(Debug, Serialize, Deserialize)]
struct LinkHello {
    job: String,
    epoch: u64,
    /// Which of the epoch's groups; the ranks are those of the group.
    group: u64,
    from: usize,
    to: usize,
}

/// Grants it.
#[derive(Debug, Serialize, Deserialize)]
struct LinkWelcome {
    epoch: u64,
}

/// Decides about links that others ask for.
#[derive(Debug)]
struct Gatekeeper<E: LinkEndpoint> {
    roster: Roster,
    group: u64,
    state: Mutex<GateState<E>>,
    arrivals: mpsc::UnboundedSender<(usize, RawLink<E::Connection>)>,
}

#[derive(Debug)]
struct GateState<E: LinkEndpoint> {
    /// The connections of accepted links, by rank.
    taken: Vec<Option<E::Connection>>,
    /// Whether all links were there once; from then on none is replaced.
    formed: bool,
}

/// Why a link is refused, and who is surprised by it.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// The other side is ahead of us, which is normal while the membership changes.
    Ahead(String),
    /// Anything else.
    Wrong(String),
}

impl Roster {
    /// Checks what the caller passed against itself and against who the endpoint is.
    pub(crate) fn check(&self, identity: &Identity) -> Result<(), Error> {
        let wrong = |reason: String| Err(Error::Usage { reason });
        let Some(me) = self.members.get(self.rank) else {
            return wrong(format!("rank {} is not in a roster of {}", self.rank, self.members.len()));
        };
        if (me.name.as_str(), self.job.as_str()) != (identity.member(), identity.job()) {
            let (member, job) = (identity.member(), identity.job());
            return wrong(format!(
                "the roster has {} of job {} at rank {}, and this endpoint is {member} of {job}",
                me.name, self.job, self.rank
            ));
        }
        let mut names = HashSet::new();
        match self.members.iter().find(|member| !names.insert(&member.name)) {
            Some(twice) => wrong(format!("{} is twice in the roster", twice.name)),
            None => Ok(()),
        }
    }
}

impl Roster {
    /// How many members share this one's address, and with it a host and its processors.
    pub(crate) fn local_ranks(&self) -> usize {
        let here = self.members[self.rank].addr.ip();
        self.members.iter().filter(|member| member.addr.ip() == here).count()
    }
}

impl<C: LinkConnection> CloseOnDrop<C> {
    pub(crate) fn new(connection: C) -> Self {
        Self { connection, code: CloseCode::Aborted }
    }

    /// Closes the connection with `code` when dropped.
    pub(crate) fn close_as(&mut self, code: CloseCode) {
        self.code = code;
    }

    pub(crate) fn get(&self) -> &C {
        &self.connection
    }

    /// Closes the connection now, as it would be when dropped.
    pub(crate) fn close(&self) {
        let reason = match self.code {
            CloseCode::Left => "it left",
            _ => "it ended without leaving",
        };
        self.connection.close_with(self.code, reason);
    }
}

/// Has the links to peers that have `confirmed` a goodbye closed as left in order.
///
/// # Errors
/// [`Error::TimedOut`] naming the others, who were asked at `started`.
pub(crate) fn close_as_left<'a, C: LinkConnection>(
    links: impl Iterator<Item = (usize, &'a mut CloseOnDrop<C>)>,
    confirmed: &[usize],
    started: Instant,
) -> Result<(), Error> {
    let mut missing = Vec::new();
    for (peer, connection) in links {
        match confirmed.contains(&peer) {
            true => connection.close_as(CloseCode::Left),
            false => missing.push(peer),
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = missing.iter().map(|peer| format!("rank {peer}")).collect();
    let what = format!("{} to confirm what was sent before leaving", names.join(", "));
    Err(Error::TimedOut { what, ranks: missing, elapsed: started.elapsed() })
}

impl<C: LinkConnection> Drop for CloseOnDrop<C> {
    fn drop(&mut self) {
        self.close();
    }
}

impl<E: LinkEndpoint> Door<E> {
    /// Opens the door of an epoch. The endpoint should have no other.
    pub(crate) fn open(endpoint: &E, roster: &Roster) -> Arc<Self> {
        let gates = Arc::new(Gates {
            job: roster.job.clone(),
            epoch: roster.epoch,
            by_group: Mutex::default(),
            opened: Notify::new(),
        });
        let accept_loop = endpoint.io().task(accept_links(endpoint.clone(), gates.clone()));
        Arc::new(Self { endpoint: endpoint.clone(), gates, _accept_loop: accept_loop })
    }

    /// Lets in those who ask for `gatekeeper`'s group.
    fn admit(self: &Arc<Self>, gatekeeper: &Arc<Gatekeeper<E>>) -> Result<Gate<E>, Error> {
        let group = gatekeeper.group;
        let mut by_group = self.gates.by_group();
        if by_group.contains_key(&group) {
            let reason = format!("group {group:016x} of epoch {} is formed already", self.gates.epoch);
            return Err(Error::Usage { reason });
        }
        by_group.insert(group, gatekeeper.clone());
        drop(by_group);
        self.gates.opened.notify_waiters();
        Ok(Gate { endpoint: self.endpoint.clone(), place: Some((self.clone(), group)) })
    }
}

impl<E: LinkEndpoint> Gate<E> {
    /// Links without a group.
    pub(crate) fn of_a_pair(endpoint: E) -> Self {
        Self { endpoint, place: None }
    }

    /// The endpoint that the links are made with.
    pub(crate) fn endpoint(&self) -> &E {
        &self.endpoint
    }

    /// The door behind which groups can be split from this one.
    fn door(&self) -> Result<Arc<Door<E>>, Error> {
        let pair = || Error::Usage { reason: "a link between two members has no groups".to_owned() };
        self.place.as_ref().map(|(door, _)| door.clone()).ok_or_else(pair)
    }
}

impl<E: LinkEndpoint> Drop for Gate<E> {
    fn drop(&mut self) {
        if let Some((door, group)) = &self.place {
            door.gates.by_group().remove(group);
        }
    }
}

impl<E: LinkEndpoint> Gates<E> {
    fn by_group(&self) -> MutexGuard<'_, HashMap<u64, Arc<Gatekeeper<E>>>> {
        // Entries are put in and taken out whole.
        self.by_group.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gatekeeper of a group, as soon as this rank forms it.
    async fn find(&self, group: u64) -> Arc<Gatekeeper<E>> {
        loop {
            let opened = self.opened.notified();
            tokio::pin!(opened);
            // Before the look: a gate that opens after it is noticed.
            opened.as_mut().enable();
            if let Some(gatekeeper) = self.by_group().get(&group) {
                return gatekeeper.clone();
            }
            opened.await;
        }
    }
}

/// Links up with all other ranks of an epoch. Blocks until it is done, until `deadline`, or until `give_up`
/// has a reason: somebody has learnt that a rank will not come.
pub(crate) fn connect<E: LinkEndpoint>(
    endpoint: &E,
    roster: Roster,
    deadline: Instant,
    give_up: impl Future<Output = String> + Send + 'static,
) -> Result<Mesh<E>, Error> {
    let epoch = roster.epoch;
    let forming = form(Door::open(endpoint, &roster), roster, WORLD, deadline);
    endpoint.io().block_on(async move {
        tokio::select! {
            formed = forming => formed,
            reason = give_up => Err(Error::GaveUp { what: format!("links of epoch {epoch}"), reason }),
        }
    })?
}

/// Begins to form links among `members` of a group, once for each of its places behind doors; `over` makes a
/// transport of them. `waker` is woken when they are there.
pub(crate) fn split<E: LinkEndpoint>(
    places: &[(&Gate<E>, &Roster)],
    (members, id): (&[usize], u64),
    deadline: Instant,
    waker: Waker,
    over: impl FnOnce(Vec<Mesh<E>>) -> Result<Box<dyn Transport>, Error> + Send + 'static,
) -> Result<Forming, Error> {
    let (first_gate, first_roster) = places[0];
    let rank = place(members, first_roster.rank, first_roster.members.len())?;
    if id == WORLD {
        return Err(Error::Usage { reason: "this id is that of all ranks".to_owned() });
    }
    let of_group = |&(gate, roster): &(&Gate<E>, &Roster)| {
        let members = members.iter().map(|&member| roster.members[member].clone()).collect();
        Ok((gate.door()?, Roster { rank, members, ..roster.clone() }))
    };
    let groups: Vec<_> = places.iter().map(of_group).collect::<Result<_, Error>>()?;
    let (mut former, forming) = Forming::new();
    first_gate.endpoint.io().spawn(async move {
        let form_all = async {
            let mut meshes = Vec::new();
            for (door, roster) in groups {
                meshes.push(form(door, roster, id, deadline).await?);
            }
            Ok(meshes)
        };
        let formed = tokio::select! {
            formed = form_all => formed,
            () = former.given_up() => return,
        };
        former.finish(formed.and_then(over));
        waker.wake();
    });
    Ok(forming)
}

/// Links up with all other ranks of a group. Runs on the I/O thread.
async fn form<E: LinkEndpoint>(
    door: Arc<Door<E>>,
    roster: Roster,
    group: u64,
    deadline: Instant,
) -> Result<Mesh<E>, Error> {
    let started = Instant::now();
    let world_size = roster.members.len();
    let (arrivals, mut arrived) = mpsc::unbounded_channel();
    let state = GateState { taken: vec![None; world_size], formed: false };
    let gatekeeper =
        Arc::new(Gatekeeper { roster: roster.clone(), group, state: Mutex::new(state), arrivals });
    let gate = door.admit(&gatekeeper)?;
    let attempts = Attempts::new(world_size);
    let mut diallers = JoinSet::new();
    for peer in 0..roster.rank {
        diallers.spawn(dial(door.endpoint.clone(), gatekeeper.clone(), peer, attempts.clone()));
    }
    let mut links: Vec<Option<RawLink<E::Connection>>> = (0..world_size).map(|_| None).collect();
    while links.iter().flatten().count() + 1 < world_size {
        match timeout_at(deadline.into(), arrived.recv()).await {
            Ok(Some((peer, link))) => links[peer] = Some(link),
            // The gatekeeper holds a sender: the channel cannot end before.
            Ok(None) | Err(_) => {
                let absent = |peer: &usize| *peer != roster.rank && links[*peer].is_none();
                let ranks: Vec<usize> = (0..world_size).filter(absent).collect();
                let what = missing(&roster, &ranks, &attempts);
                return Err(Error::TimedOut { what, ranks, elapsed: started.elapsed() });
            }
        }
    }
    gatekeeper.state().formed = true;
    Ok(Mesh { roster, links, gate })
}

/// What each dialler saw last, for the error at the deadline.
#[derive(Clone, Debug)]
struct Attempts(Arc<Mutex<Vec<Option<String>>>>);

impl Attempts {
    fn new(world_size: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![None; world_size])))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names the ranks without a link, where they should be and what was seen of them.
fn missing(roster: &Roster, absent: &[usize], attempts: &Attempts) -> String {
    let seen = attempts.lock();
    let describe = |peer: usize| {
        let Member { name, addr } = &roster.members[peer];
        let seen = match &seen[peer] {
            _ if peer > roster.rank => "has not dialled us",
            Some(last) => last,
            None => "no answer",
        };
        format!("rank {peer} ({name} at {addr}: {seen})")
    };
    let names: Vec<String> = absent.iter().copied().map(describe).collect();
    format!("links of epoch {} to {}", roster.epoch, names.join(", "))
}

/// Dials one lower rank until it grants a link.
async fn dial<E: LinkEndpoint>(endpoint: E, gatekeeper: Arc<Gatekeeper<E>>, peer: usize, attempts: Attempts) {
    let (mut limit, mut pause) = (ATTEMPT.0, PAUSE.0);
    loop {
        let reason = match dial_once(&endpoint, &gatekeeper, peer, limit).await {
            Ok(link) => {
                // The receiver goes when the group is given up, and then the link must be closed.
                return drop(gatekeeper.arrivals.send((peer, link)));
            }
            Err(Error::Refused { reason, .. } | Error::Unreachable { reason, .. }) => reason,
            Err(error) => error.to_string(),
        };
        tracing::debug!(peer, reason, "no link yet");
        attempts.lock()[peer] = Some(reason);
        sleep(pause).await;
        limit = (2 * limit).min(ATTEMPT.1);
        pause = (2 * pause).min(PAUSE.1);
    }
}

/// One attempt. Once the peer's endpoint has let us in, the wait for its transport is as long as the
/// caller's: it may not have learnt of the epoch yet.
async fn dial_once<E: LinkEndpoint>(
    endpoint: &E,
    gatekeeper: &Gatekeeper<E>,
    peer: usize,
    limit: Duration,
) -> Result<RawLink<E::Connection>, Error> {
    let Gatekeeper { roster, group, .. } = gatekeeper;
    let Member { name, addr } = &roster.members[peer];
    let connection = CloseOnDrop::new(endpoint.connect_within(*addr, name, limit).await?);
    let mut control = E::open_control(connection.get()).await?;
    let (job, epoch, group) = (roster.job.clone(), roster.epoch, *group);
    let hello = LinkHello { job, epoch, group, from: roster.rank, to: peer };
    control.0.send(&hello).await?;
    let data = endpoint.open_data(connection.get(), *addr, &mut control).await?;
    match control.1.recv::<LinkWelcome>().await? {
        Some(welcome) if welcome.epoch == roster.epoch => Ok(RawLink { connection, control, data }),
        _ => {
            let (remote, reason) = (*addr, "it answered for another epoch".to_owned());
            Err(Error::Refused { remote, reason })
        }
    }
}

/// Answers everyone who asks for a link, side by side, for as long as it is polled.
async fn accept_links<E: LinkEndpoint>(endpoint: E, gates: Arc<Gates<E>>) {
    let mut answers = JoinSet::new();
    loop {
        tokio::select! {
            connection = endpoint.accept() => match connection {
                Ok(connection) => { answers.spawn(answer(endpoint.clone(), gates.clone(), connection)); }
                Err(_) => return,
            },
            Some(_) = answers.join_next() => {}
        }
    }
}

async fn answer<E: LinkEndpoint>(endpoint: E, gates: Arc<Gates<E>>, connection: E::Connection) {
    // Kept until the refusal is told: dropping a lane ends it in order, which says nothing.
    let mut control = None;
    let granted = timeout(HELLO_LIMIT, gates.grant(&endpoint, connection.clone(), &mut control)).await;
    let refusal = match granted {
        Ok(Ok(())) => return,
        Ok(Err(refusal)) => refusal,
        Err(_) => Refusal::Wrong(format!("it asked for no link within {} s", HELLO_LIMIT.as_secs())),
    };
    let (remote, member) = (connection.remote_address(), connection.member());
    let epoch = gates.epoch;
    if let Some(reason) = connection.close_reason() {
        tracing::debug!(%remote, member, epoch, reason, "a dialler went away");
        return;
    }
    let reason = match refusal {
        Refusal::Ahead(reason) => {
            tracing::info!(%remote, member, epoch, reason, "refused a link");
            reason
        }
        Refusal::Wrong(reason) => {
            tracing::warn!(%remote, member, epoch, reason, "refused a link");
            reason
        }
    };
    connection.close_with(CloseCode::Refused, &reason);
}

impl<E: LinkEndpoint> Gates<E> {
    /// Hears who asks, has the group's gatekeeper decide, and grants the link. `control` is the place of its
    /// control lane, which is taken out when the link is granted.
    async fn grant(
        &self,
        endpoint: &E,
        connection: E::Connection,
        control: &mut Option<Lane<E>>,
    ) -> Result<(), Refusal> {
        let failed = |error: Error| match error {
            Error::Refused { reason, .. } => Refusal::Wrong(reason),
            error => Refusal::Wrong(error.to_string()),
        };
        let lane = control.insert(E::accept_control(&connection).await.map_err(failed)?);
        let hello = lane.1.recv::<LinkHello>().await.map_err(failed)?;
        let hello = hello.ok_or_else(|| Refusal::Wrong("it asked for no link".to_owned()))?;
        judge_epoch(&self.job, self.epoch, &hello)?;
        let gatekeeper = timeout(GROUP_LIMIT, self.find(hello.group)).await;
        let gatekeeper = gatekeeper.map_err(|_| {
            Refusal::Ahead(format!("it asks for group {:016x}, which is not formed here now", hello.group))
        })?;
        judge(&gatekeeper.roster, connection.member(), &hello)?;
        let data = endpoint.accept_data(&connection, lane).await.map_err(failed)?;
        gatekeeper.claim(hello.from, &connection)?;
        lane.0.send(&LinkWelcome { epoch: self.epoch }).await.map_err(failed)?;
        let control = control.take().expect("put in above");
        let link = RawLink { connection: CloseOnDrop::new(connection), control, data };
        // The receiver goes when the group is given up, and then the link must be closed.
        drop(gatekeeper.arrivals.send((hello.from, link)));
        Ok(())
    }
}

impl<E: LinkEndpoint> Gatekeeper<E> {
    fn state(&self) -> MutexGuard<'_, GateState<E>> {
        // Both fields are replaced whole: no panic leaves them half written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place of a link to `peer`, unless a live one has it.
    fn claim(&self, peer: usize, connection: &E::Connection) -> Result<(), Refusal> {
        let mut state = self.state();
        let alive = state.taken[peer].as_ref().is_some_and(|taken| taken.close_reason().is_none());
        if state.formed || alive {
            return Err(Refusal::Wrong(format!("rank {peer} has a link already")));
        }
        state.taken[peer] = Some(connection.clone());
        Ok(())
    }
}

/// Whether `hello` asks for a link of this epoch.
fn judge_epoch(job: &str, epoch: u64, hello: &LinkHello) -> Result<(), Refusal> {
    if hello.job != job {
        return Err(Refusal::Wrong(format!("it asks for the job \"{}\"", quote(hello.job.as_bytes()))));
    }
    if hello.epoch != epoch {
        let reason = format!("it is in epoch {} and we are in {epoch}", hello.epoch);
        return Err(if hello.epoch > epoch { Refusal::Ahead(reason) } else { Refusal::Wrong(reason) });
    }
    Ok(())
}

/// Whether `member`, by its certificate, may have the link of a group that `hello` asks for.
fn judge(roster: &Roster, member: &str, hello: &LinkHello) -> Result<(), Refusal> {
    let LinkHello { from, to, .. } = hello;
    let epoch = roster.epoch;
    if !roster.members.iter().any(|known| known.name == member) {
        return Err(Refusal::Wrong(format!("{member} is not a member of epoch {epoch}")));
    }
    if roster.members.get(*from).is_none_or(|claimed| claimed.name != member) {
        return Err(Refusal::Wrong(format!("{member} is not rank {from} of epoch {epoch}")));
    }
    if *to != roster.rank {
        return Err(Refusal::Wrong(format!("it asks for rank {to} and this is rank {}", roster.rank)));
    }
    if *from <= roster.rank {
        return Err(Refusal::Wrong(format!(
            "rank {from} is dialled by rank {}, not the other way",
            roster.rank
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire;

    fn roster() -> Roster {
        let member = |name: &str| Member { name: name.to_owned(), addr: ([127, 0, 0, 1], 1).into() };
        let members = ["a", "b", "c"].map(member).to_vec();
        Roster { job: "job".to_owned(), epoch: 7, rank: 1, members }
    }

    fn hello() -> LinkHello {
        LinkHello { job: "job".to_owned(), epoch: 7, group: WORLD, from: 2, to: 1 }
    }

    #[test]
    fn the_dialler_must_be_who_and_when_it_says() {
        let roster = roster();
        assert_eq!(judge(&roster, "c", &hello()), Ok(()));
        let refused = |member: &str, hello: LinkHello| match judge(&roster, member, &hello) {
            Err(Refusal::Wrong(reason)) => reason,
            other => panic!("{other:?}"),
        };
        assert!(refused("x", hello()).contains("not a member"));
        assert!(refused("a", hello()).contains("a is not rank 2"));
        assert!(refused("c", LinkHello { from: 9, ..hello() }).contains("not rank 9"));
        assert!(refused("c", LinkHello { to: 0, ..hello() }).contains("asks for rank 0"));
        assert!(refused("a", LinkHello { from: 0, ..hello() }).contains("the other way"));
        let judge_epoch = |hello: LinkHello| judge_epoch("job", 7, &hello);
        assert_eq!(judge_epoch(hello()), Ok(()));
        let wrong = |hello: LinkHello, reason: &str| match judge_epoch(hello) {
            Err(Refusal::Wrong(text)) => text.contains(reason),
            _ => false,
        };
        assert!(wrong(LinkHello { job: "other".to_owned(), ..hello() }, "other"));
        assert!(wrong(LinkHello { epoch: 6, ..hello() }, "epoch 6"));
        let ahead = judge_epoch(LinkHello { epoch: 8, ..hello() });
        assert!(matches!(ahead, Err(Refusal::Ahead(_))), "{ahead:?}");
    }

    #[test]
    fn missing_ranks_are_named_with_address_and_cause() {
        let attempts = Attempts::new(3);
        attempts.lock()[0] = Some("its certificate is not of this job".to_owned());
        let text = missing(&roster(), &[0, 2], &attempts);
        assert_eq!(
            text,
            "links of epoch 7 to rank 0 (a at 127.0.0.1:1: its certificate is not of this job), \
             rank 2 (c at 127.0.0.1:1: has not dialled us)"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_ask_for_a_link_that_is_judged_or_are_an_error(
            bytes: Vec<u8>, member in "[a-d]", from in 0..5_usize, to in 0..5_usize, epoch in 6..9_u64,
        ) {
            let roster = roster();
            let _ = wire::decode::<LinkWelcome>(&bytes);
            if let Ok(hello) = wire::decode::<LinkHello>(&bytes) {
                let _ = judge_epoch("job", 7, &hello);
                prop_assert!(judge(&roster, "d", &hello).is_err(), "d is no member");
            }
            let hello = LinkHello { from, to, epoch, ..hello() };
            let granted = judge_epoch("job", 7, &hello).and_then(|()| judge(&roster, &member, &hello)).is_ok();
            prop_assert_eq!(granted, member == "c" && from == 2 && to == 1 && epoch == 7);
        }
    }
}
