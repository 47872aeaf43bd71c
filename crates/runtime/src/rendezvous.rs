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
//! Blames{rank}                  ─────▶  this worker failed because of that one
//! ```
//! A member may only join as the rank its certificate was made for. Strangers do not get this far: the
//! endpoint refuses them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use paceline_transport::identity::Identity;
use paceline_transport::tls::{Connection, Dialler, Endpoint, MessageReceiver, MessageSender};
use paceline_transport::{Fabric, IoHandle, Member, Roster};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::Error;

/// The member name of the launcher that serves the rendezvous.
pub const LAUNCHER: &str = "launcher-0";

/// The member name of the worker that starts as `rank`.
pub fn worker(rank: usize) -> String {
    format!("worker-{rank}")
}

fn rank_of(member: &str) -> Option<usize> {
    member.strip_prefix("worker-")?.parse().ok()
}

/// From a worker to the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Request {
    /// `port` is where the worker is dialled by the others, on the address that it dials from, for links of
    /// this kind.
    Join {
        rank: u32,
        world_size: u32,
        port: u16,
        fabric: Fabric,
    },
    Blames {
        rank: u32,
    },
}

/// From the server to a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Notice {
    Waiting { missing: Vec<u32> },
    Roster { epoch: u64, members: Vec<(String, SocketAddr)> },
    Refused { reason: String },
    Died { rank: u32, cause: String },
    Exited { rank: u32 },
}

/// Missing ranks listed to those who wait; the list is for people.
const NAMED_RANKS_LIMIT: usize = 32;

/// The epoch of the first roster.
const FIRST_EPOCH: u64 = 1;

/// The meeting place, served until it is dropped.
pub struct Server {
    endpoint: Endpoint,
    shared: Arc<Shared>,
    tasks: [tokio::task::JoinHandle<()>; 2],
}

struct Shared {
    world_size: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    joined: BTreeMap<usize, Joined>,
    /// What is to be told to whoever joins later.
    notices: Vec<Notice>,
    /// The first rank that a worker blamed for its own failure, by the worker's rank.
    blamed: BTreeMap<usize, usize>,
}

struct Joined {
    member: String,
    addr: SocketAddr,
    fabric: Fabric,
    notices: UnboundedSender<Notice>,
}

impl Server {
    /// Serves the rendezvous of a job of `world_size` ranks at `addr`, on the I/O thread of `io`. Ranks
    /// that have not joined after `timeout` are named to those that have, which ends their wait.
    ///
    /// # Errors
    /// The transport's: nothing can listen there, or the identity is unusable.
    pub fn bind(
        io: &IoHandle,
        addr: SocketAddr,
        identity: &Identity,
        world_size: usize,
        timeout: Duration,
    ) -> Result<Self, paceline_transport::Error> {
        let endpoint = Endpoint::bind(io, addr, identity)?;
        let shared = Arc::new(Shared { world_size, state: Mutex::default() });
        let accept = io.spawn(accept_all(io.clone(), endpoint.clone(), shared.clone()));
        let patience = io.spawn(lose_patience(shared.clone(), timeout));
        Ok(Self { endpoint, shared, tasks: [accept, patience] })
    }

    /// Where it listens, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.endpoint.local_addr()
    }

    /// Tells every worker that a rank is dead; `cause` completes the sentence "rank 2 …". Does not block.
    pub fn announce_death(&self, rank: usize, cause: &str) {
        self.shared.tell_all(Notice::Died { rank: rank as u32, cause: cause.to_owned() });
    }

    /// Tells every worker that a rank has exited with code 0. Those who have its goodbye ignore it.
    /// Does not block.
    pub fn announce_exit(&self, rank: usize) {
        self.shared.tell_all(Notice::Exited { rank: rank as u32 });
    }

    /// The rank that the worker `rank` has blamed for its own failure, if it has.
    pub fn blamed_by(&self, rank: usize) -> Option<usize> {
        self.shared.lock().blamed.get(&rank).copied()
    }

    /// The ranks that have not joined yet.
    pub fn missing(&self) -> Vec<usize> {
        self.shared.missing(&self.shared.lock())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves a consistent state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn missing(&self, state: &State) -> Vec<usize> {
        (0..self.world_size).filter(|rank| !state.joined.contains_key(rank)).collect()
    }

    fn tell_all(&self, notice: Notice) {
        let mut state = self.lock();
        state.tell_all(&notice);
        state.notices.push(notice);
    }

    /// Lets a member in, or says why not.
    fn join(&self, request: &Request, connection: &Connection) -> Result<UnboundedReceiver<Notice>, String> {
        let &Request::Join { rank, world_size, port, fabric } = request else {
            return Err("the first message must be a join".to_owned());
        };
        let (rank, world_size) = (rank as usize, world_size as usize);
        if world_size != self.world_size {
            return Err(format!("the job has {} ranks, not {world_size}", self.world_size));
        }
        if connection.member() != worker(rank) {
            return Err(format!("{} may not join as rank {rank}", connection.member()));
        }
        let (sender, notices) = unbounded_channel();
        let mut state = self.lock();
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
        let addr = SocketAddr::new(connection.remote_address().ip(), port);
        let member = connection.member().to_owned();
        state.joined.insert(rank, Joined { member, addr, fabric, notices: sender });
        let missing = self.missing(&state);
        tracing::info!(rank, %addr, missing = missing.len(), "joined");
        if missing.is_empty() {
            let members = state.joined.values().map(|joined| (joined.member.clone(), joined.addr)).collect();
            state.tell_all(&Notice::Roster { epoch: FIRST_EPOCH, members });
        } else {
            let missing = missing.into_iter().take(NAMED_RANKS_LIMIT).map(|rank| rank as u32).collect();
            state.tell_all(&Notice::Waiting { missing });
        }
        Ok(notices)
    }
}

impl State {
    fn tell_all(&self, notice: &Notice) {
        self.joined.values().for_each(|joined| drop(joined.notices.send(notice.clone())));
    }
}

/// Ends the wait of those that have come when others have not in time.
async fn lose_patience(shared: Arc<Shared>, timeout: Duration) {
    tokio::time::sleep(timeout).await;
    let missing = shared.missing(&shared.lock());
    if !missing.is_empty() {
        let missing: Vec<u32> = missing.into_iter().take(NAMED_RANKS_LIMIT).map(|rank| rank as u32).collect();
        let reason = waited_in_vain(&missing);
        tracing::warn!(reason, "the ranks have not met");
        shared.tell_all(Notice::Refused { reason });
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
    if let Err(error) = serve_lane(&connection, &shared).await {
        tracing::debug!(%remote, member = connection.member(), %error, "rendezvous connection ended");
    }
}

async fn serve_lane(connection: &Connection, shared: &Shared) -> Result<(), paceline_transport::Error> {
    let (mut sender, mut receiver) = connection.accept_messages().await?;
    let Some(request) = receiver.recv::<Request>().await? else { return Ok(()) };
    let mut notices = match shared.join(&request, connection) {
        Ok(notices) => notices,
        Err(reason) => {
            tracing::warn!(remote = %connection.remote_address(), member = connection.member(), reason, "refused a join");
            sender.send(&Notice::Refused { reason }).await?;
            return sender.finish().await;
        }
    };
    loop {
        tokio::select! {
            notice = notices.recv() => match notice {
                Some(notice) => sender.send(&notice).await?,
                None => return Ok(()),
            },
            request = receiver.recv::<Request>() => match request? {
                Some(Request::Blames { rank }) => {
                    if let Some(blamer) = rank_of(connection.member()) {
                        shared.lock().blamed.entry(blamer).or_insert(rank as usize);
                    }
                }
                Some(Request::Join { .. }) => {}
                None => return Ok(()),
            },
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

/// What the launcher says about another rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It is dead; the cause completes "rank 2 …".
    Died { rank: usize, cause: String },
    /// It exited with code 0.
    Exited { rank: usize },
}

/// Pauses between attempts to reach the server, which may not be up yet.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

impl Client {
    /// Joins as `rank`, which the others dial at `port` for links of kind `fabric`, and waits for all others, until `deadline`. The server
    /// gives up by itself and says who is missing; the deadline is for a server that says nothing.
    pub(crate) async fn join(
        dialler: Dialler,
        server: String,
        rank: usize,
        world_size: usize,
        (fabric, port): (Fabric, u16),
        deadline: Instant,
    ) -> Result<(Self, Roster), Error> {
        let failed = |reason: String| Error::Rendezvous { endpoint: server.clone(), reason };
        let connection = dial(&dialler, &server, deadline).await.map_err(&failed)?;
        let (mut sender, receiver) = connection.open_messages().await?;
        let (own_rank, ranks) = (rank as u32, world_size as u32);
        sender.send(&Request::Join { rank: own_rank, world_size: ranks, port, fabric }).await?;
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
                    let job = dialler.identity().job().to_owned();
                    let members = members.into_iter().map(|(name, addr)| Member { name, addr }).collect();
                    return Ok((client, Roster { job, epoch, rank, members }));
                }
                Some(Notice::Refused { reason }) => return Err(failed(reason)),
                Some(Notice::Died { rank, cause }) => {
                    return Err(failed(format!("rank {rank} {cause} before all ranks had met")));
                }
                Some(Notice::Exited { rank }) => client.early.push(News::Exited { rank: rank as usize }),
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
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Puts news back, to be told again.
    pub(crate) fn keep(&mut self, news: News) {
        self.early.push(news);
    }

    /// Tells the launcher that this rank fails because of another one.
    pub(crate) async fn blame(&mut self, rank: usize) {
        // A launcher that is gone needs no reasons.
        let _ = self.sender.send(&Request::Blames { rank: rank as u32 }).await;
    }
}

/// Resolves and dials until the server answers. Being refused is final; no answer is not.
async fn dial(dialler: &Dialler, server: &str, deadline: Instant) -> Result<Connection, String> {
    let mut pause = FIRST_PAUSE;
    loop {
        let reason = match tokio::net::lookup_host(server).await {
            Ok(mut addrs) => match addrs.next() {
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
    }
}

fn waited_in_vain(missing: &[u32]) -> String {
    let names: Vec<String> = missing.iter().map(u32::to_string).collect();
    match names.as_slice() {
        [] => "timed out before anybody was heard of".to_owned(),
        names => format!("timed out waiting for rank {}", names.join(", rank ")),
    }
}
