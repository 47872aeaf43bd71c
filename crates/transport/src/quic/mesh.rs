//! Forming one link to every other rank of an epoch.
//!
//! The higher rank dials the lower one. A link is a connection of its own, with a control lane of
//! higher priority and a data stream, both in both directions. The dialler opens both and says
//! [`LinkHello`]; the link counts, on both sides, with [`LinkWelcome`].
//!
//! One [`Door`] accepts for all groups of an epoch on an endpoint: that of the epoch itself and those that
//! were split from it. It lives as long as one of them, to turn away what comes late: a member of another
//! epoch, a stranger to the roster, a second link for a pair that has one.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout, timeout_at};

use super::close::{CloseCode, in_words, quote};
use super::connection::{Connection, Lane, MessageReceiver, MessageSender};
use super::driver::{self, RecvStream, SendStream};
use super::endpoint::Endpoint;
use super::io::Task;
use crate::{CONTROL_MESSAGE_LIMIT, Error};

/// How long a dialler that has been let in may take to say [`LinkHello`].
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// How long somebody who asks for a link of a group may wait until this rank begins to form it. Members
/// begin at the same time, but for their own delays; who comes later dials again.
const GROUP_LIMIT: Duration = Duration::from_secs(2);

/// The group of all ranks of an epoch.
pub(super) const WORLD: u64 = 0;

/// The limits between which the time for one attempt to dial doubles. The first ones are short, since
/// QUIC repeats an unanswered first packet ever more slowly and a peer that is just starting should be
/// found soon.
const ATTEMPT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// The limits between which the pause after a failed attempt doubles.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// What encoding adds to a control message: which one it is, and its length.
const CONTROL_OVERHEAD: usize = 8;

/// The priority of control lanes; data has 0.
const CONTROL_PRIORITY: i32 = 1;

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

/// The streams of one link. Its connection is closed as aborted when it is dropped, unless told otherwise.
#[derive(Debug)]
pub(super) struct RawLink {
    // The order matters: the connection must be closed before the streams are dropped, as dropping a
    // sending stream ends it in order.
    pub(super) connection: CloseOnDrop,
    pub(super) control: (MessageSender, MessageReceiver),
    pub(super) data: (SendStream, RecvStream),
}

/// A connection that is closed when this value is dropped.
#[derive(Debug)]
pub(super) struct CloseOnDrop {
    connection: Connection,
    code: CloseCode,
}

/// All links of a new transport, and what refuses further ones while it lives.
#[derive(Debug)]
pub(super) struct Mesh {
    pub(super) roster: Roster,
    /// By rank; `None` at this rank.
    pub(super) links: Vec<Option<RawLink>>,
    pub(super) gate: Gate,
}

/// Accepts everybody who dials an endpoint in one epoch, and sends them to the gatekeeper of the group that
/// they ask for.
#[derive(Debug)]
pub(super) struct Door {
    endpoint: Endpoint,
    gates: Arc<Gates>,
    _accept_loop: Task<()>,
}

/// The gatekeepers behind a door.
#[derive(Debug)]
struct Gates {
    job: String,
    epoch: u64,
    by_group: Mutex<HashMap<u64, Arc<Gatekeeper>>>,
    opened: Notify,
}

/// A group's place behind the door, until it is dropped.
#[derive(Debug)]
pub(super) struct Gate {
    door: Arc<Door>,
    group: u64,
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
struct Gatekeeper {
    roster: Roster,
    group: u64,
    state: Mutex<GateState>,
    arrivals: mpsc::UnboundedSender<(usize, RawLink)>,
}

#[derive(Debug)]
struct GateState {
    /// The connections of accepted links, by rank.
    taken: Vec<Option<driver::Connection>>,
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
    /// Checks what the caller passed against itself and against who `endpoint` is.
    pub(super) fn check(&self, endpoint: &Endpoint) -> Result<(), Error> {
        let wrong = |reason: String| Err(Error::Usage { reason });
        let identity = endpoint.identity();
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
    pub(super) fn local_ranks(&self) -> usize {
        let here = self.members[self.rank].addr.ip();
        self.members.iter().filter(|member| member.addr.ip() == here).count()
    }
}

impl CloseOnDrop {
    fn new(connection: Connection) -> Self {
        Self { connection, code: CloseCode::Aborted }
    }

    /// Closes the connection with `code` when dropped.
    pub(super) fn close_as(&mut self, code: CloseCode) {
        self.code = code;
    }

    pub(super) fn get(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        let reason = match self.code {
            CloseCode::Left => "it left",
            _ => "it ended without leaving",
        };
        self.connection.close_with(self.code, reason);
    }
}

impl Door {
    /// Opens the door of an epoch. The endpoint should have no other.
    pub(super) fn open(endpoint: &Endpoint, roster: &Roster) -> Arc<Self> {
        let gates = Arc::new(Gates {
            job: roster.job.clone(),
            epoch: roster.epoch,
            by_group: Mutex::default(),
            opened: Notify::new(),
        });
        let accept_loop = endpoint.io().task(accept_links(endpoint.clone(), gates.clone()));
        Arc::new(Self { endpoint: endpoint.clone(), gates, _accept_loop: accept_loop })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Lets in those who ask for `gatekeeper`'s group.
    fn admit(self: &Arc<Self>, gatekeeper: &Arc<Gatekeeper>) -> Result<Gate, Error> {
        let group = gatekeeper.group;
        let mut by_group = self.gates.by_group();
        if by_group.contains_key(&group) {
            let reason = format!("group {group:016x} of epoch {} is formed already", self.gates.epoch);
            return Err(Error::Usage { reason });
        }
        by_group.insert(group, gatekeeper.clone());
        drop(by_group);
        self.gates.opened.notify_waiters();
        Ok(Gate { door: self.clone(), group })
    }
}

impl Gate {
    pub(super) fn door(&self) -> &Arc<Door> {
        &self.door
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.door.gates.by_group().remove(&self.group);
    }
}

impl Gates {
    fn by_group(&self) -> MutexGuard<'_, HashMap<u64, Arc<Gatekeeper>>> {
        // Entries are put in and taken out whole.
        self.by_group.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gatekeeper of a group, as soon as this rank forms it.
    async fn find(&self, group: u64) -> Arc<Gatekeeper> {
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

/// Links up with all other ranks of a group. Runs on the I/O thread.
pub(super) async fn form(
    door: Arc<Door>,
    roster: Roster,
    group: u64,
    deadline: Instant,
) -> Result<Mesh, Error> {
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
    let mut links: Vec<Option<RawLink>> = (0..world_size).map(|_| None).collect();
    while links.iter().flatten().count() + 1 < world_size {
        match timeout_at(deadline.into(), arrived.recv()).await {
            Ok(Some((peer, link))) => links[peer] = Some(link),
            // The gatekeeper holds a sender: the channel cannot end before.
            Ok(None) | Err(_) => {
                let what = missing(&roster, &links, &attempts);
                return Err(Error::TimedOut { what, elapsed: started.elapsed() });
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
fn missing(roster: &Roster, links: &[Option<RawLink>], attempts: &Attempts) -> String {
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
    let absent = |peer: &usize| *peer != roster.rank && links[*peer].is_none();
    let names: Vec<String> = (0..links.len()).filter(absent).map(describe).collect();
    format!("links of epoch {} to {}", roster.epoch, names.join(", "))
}

/// Dials one lower rank until it grants a link.
async fn dial(endpoint: Endpoint, gatekeeper: Arc<Gatekeeper>, peer: usize, attempts: Attempts) {
    let (mut limit, mut pause) = (ATTEMPT.0, PAUSE.0);
    loop {
        let reason = match dial_once(&endpoint, &gatekeeper, peer, limit).await {
            Ok(link) => {
                // The receiver goes when the group is given up, and then the link must be closed.
                return drop(gatekeeper.arrivals.send((peer, link)));
            }
            Err(Error::Refused { reason, .. }) => reason,
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
async fn dial_once(
    endpoint: &Endpoint,
    gatekeeper: &Gatekeeper,
    peer: usize,
    limit: Duration,
) -> Result<RawLink, Error> {
    let Gatekeeper { roster, group, .. } = gatekeeper;
    let Member { name, addr } = &roster.members[peer];
    let connection = CloseOnDrop::new(endpoint.connect_within(*addr, name, limit).await?);
    let control = connection.get().open(Lane::Messages, CONTROL_MESSAGE_LIMIT + CONTROL_OVERHEAD).await?;
    let data = connection.get().open_stream(Lane::Data).await?;
    let mut link = RawLink { connection, control, data };
    link.control.0.set_priority(CONTROL_PRIORITY);
    let (job, epoch, group) = (roster.job.clone(), roster.epoch, *group);
    let hello = LinkHello { job, epoch, group, from: roster.rank, to: peer };
    link.control.0.send(&hello).await?;
    match link.control.1.recv::<LinkWelcome>().await? {
        Some(welcome) if welcome.epoch == roster.epoch => Ok(link),
        _ => {
            let (remote, reason) = (*addr, "it answered for another epoch".to_owned());
            Err(Error::Refused { remote, reason })
        }
    }
}

/// Answers everyone who asks for a link, side by side, for as long as it is polled.
async fn accept_links(endpoint: Endpoint, gates: Arc<Gates>) {
    let mut answers = JoinSet::new();
    loop {
        tokio::select! {
            connection = endpoint.accept() => match connection {
                Ok(connection) => { answers.spawn(answer(gates.clone(), connection)); }
                Err(_) => return,
            },
            Some(_) = answers.join_next() => {}
        }
    }
}

async fn answer(gates: Arc<Gates>, connection: Connection) {
    // Kept until the refusal is told: dropping a lane ends it in order, which says nothing.
    let mut control = None;
    let granted = timeout(HELLO_LIMIT, gates.grant(connection.clone(), &mut control)).await;
    let refusal = match granted {
        Ok(Ok(())) => return,
        Ok(Err(refusal)) => refusal,
        Err(_) => Refusal::Wrong(format!("it asked for no link within {} s", HELLO_LIMIT.as_secs())),
    };
    let (remote, member) = (connection.remote_address(), connection.member());
    let epoch = gates.epoch;
    if let Some(error) = connection.driver().close_reason() {
        tracing::debug!(%remote, member, epoch, reason = in_words(&error), "a dialler went away");
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

impl Gates {
    /// Hears who asks, has the group's gatekeeper decide, and grants the link. `control` is the place of its
    /// control lane, which is taken out when the link is granted.
    async fn grant(
        &self,
        connection: Connection,
        control: &mut Option<(MessageSender, MessageReceiver)>,
    ) -> Result<(), Refusal> {
        let failed = |error: Error| match error {
            Error::Refused { reason, .. } => Refusal::Wrong(reason),
            error => Refusal::Wrong(error.to_string()),
        };
        let limit = CONTROL_MESSAGE_LIMIT + CONTROL_OVERHEAD;
        let lane = control.insert(connection.accept(Lane::Messages, limit).await.map_err(failed)?);
        let hello = lane.1.recv::<LinkHello>().await.map_err(failed)?;
        let hello = hello.ok_or_else(|| Refusal::Wrong("it asked for no link".to_owned()))?;
        judge_epoch(&self.job, self.epoch, &hello)?;
        let gatekeeper = timeout(GROUP_LIMIT, self.find(hello.group)).await;
        let gatekeeper = gatekeeper.map_err(|_| {
            Refusal::Ahead(format!("it asks for group {:016x}, which is not formed here now", hello.group))
        })?;
        judge(&gatekeeper.roster, connection.member(), &hello)?;
        let data = connection.accept_stream(Lane::Data).await.map_err(failed)?;
        gatekeeper.claim(hello.from, connection.driver())?;
        lane.0.set_priority(CONTROL_PRIORITY);
        lane.0.send(&LinkWelcome { epoch: self.epoch }).await.map_err(failed)?;
        let control = control.take().expect("put in above");
        let link = RawLink { connection: CloseOnDrop::new(connection), control, data };
        // The receiver goes when the group is given up, and then the link must be closed.
        drop(gatekeeper.arrivals.send((hello.from, link)));
        Ok(())
    }
}

impl Gatekeeper {
    fn state(&self) -> MutexGuard<'_, GateState> {
        // Both fields are replaced whole: no panic leaves them half written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place of a link to `peer`, unless a live one has it.
    fn claim(&self, peer: usize, connection: &driver::Connection) -> Result<(), Refusal> {
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
    use super::*;

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
        let text = missing(&roster(), &[None, None, None], &attempts);
        assert_eq!(
            text,
            "links of epoch 7 to rank 0 (a at 127.0.0.1:1: its certificate is not of this job), \
             rank 2 (c at 127.0.0.1:1: has not dialled us)"
        );
    }
}
