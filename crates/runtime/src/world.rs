//! This process's place in the job.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use paceline_collectives::{Communicator, Config, Error as CollectivesError, Interrupter};
use paceline_transport::identity::Identity;
use paceline_transport::quic::QuicTransport;
use paceline_transport::shm::{self, Sharing};
use paceline_transport::tls::{Dialler, TlsTransport};
use paceline_transport::{Error as TransportError, Fabric, IoThread, Roster, Transport, fabric, mem};
use paceline_transport::{quic, tls};
use tokio::sync::oneshot;

use crate::env::{self, JobEnv};
use crate::rendezvous::{Client, News};
use crate::{Error, renewal};

/// How much longer than the server a worker waits: the server's answer names who is missing.
const SERVER_GRACE: Duration = Duration::from_secs(2);

/// How long after a rank's exit with code 0 its goodbye may still be on its way. It was acknowledged
/// before the rank exited; what is left is our own I/O thread's work.
const GOODBYE_GRACE: Duration = Duration::from_millis(500);

/// This process's place in the job, and the communicator of all its ranks.
#[derive(Debug)]
pub struct World {
    rank: usize,
    world_size: usize,
    local_rank: usize,
    local_world_size: usize,
    links: &'static str,
    communicator: Communicator,
    /// Dropped last: it carries the communicator's links.
    membership: Membership,
}

/// What keeps this process in the job: the thread that carries its links, and the connection over which
/// its launcher says who has died. To be kept as long as the communicator and all that are split from it.
#[derive(Debug)]
pub struct Membership {
    /// Held for its drop; `None` in a world of one without a launcher.
    _job: Option<Job>,
}

#[derive(Debug)]
struct Job {
    watcher: tokio::task::JoinHandle<()>,
    renewal: tokio::task::JoinHandle<()>,
    _doors: Doors,
    _io: IoThread,
}

/// Where the other ranks dial this one: the same port number over UDP and TCP, if both are there.
#[derive(Debug)]
struct Doors {
    quic: Option<quic::Endpoint>,
    tls: Option<tls::Endpoint>,
    /// Whether the ranks are to choose between both.
    choose: bool,
    port: u16,
}

/// Ports that were free for TCP and taken for UDP before that is an error.
const PORT_TRIES: u32 = 32;

impl World {
    /// Takes this process's place in the job that its launcher describes in the environment, with the
    /// collectives configured there; without a launcher, makes a world of one.
    ///
    /// Blocks until all ranks have come and are connected, for the rendezvous timeout at most.
    ///
    /// # Errors
    /// [`Error::Environment`] for variables that make no sense, [`Error::Rendezvous`] when somebody did
    /// not come or this process was refused, [`Error::Transport`] when links could not be made.
    pub fn join() -> Result<Self, Error> {
        Self::join_with(env::collectives_config(env::process)?)
    }

    /// [`join`](Self::join) with the collectives configured by the program, whatever the environment says.
    ///
    /// # Errors
    /// As [`join`](Self::join).
    pub fn join_with(config: Config) -> Result<Self, Error> {
        match JobEnv::from_vars(env::process)? {
            Some(env) => {
                Self::join_job(&env, config, env::sharing(env::process)?, env::fabric(env::process)?)
            }
            None => Self::alone(config),
        }
    }

    fn alone(config: Config) -> Result<Self, Error> {
        let transport = mem::group(1, 1, mem::DEFAULT_WINDOW_BYTES).remove(0);
        let communicator = Communicator::new(Box::new(transport), config)?;
        Ok(Self {
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            links: "none",
            communicator,
            membership: Membership { _job: None },
        })
    }

    /// Takes the place that `env` describes, sharing memory with ranks of this host or not, with links of this
    /// kind to the others; [`join`](Self::join) reads all three from the environment.
    ///
    /// # Errors
    /// As [`join`](Self::join).
    pub fn join_job(env: &JobEnv, config: Config, sharing: Sharing, fabric: Fabric) -> Result<Self, Error> {
        let deadline = Instant::now() + env.rendezvous_timeout + SERVER_GRACE;
        let io = IoThread::start()?;
        let identity = read_identity(&env.identity)?;
        let mut doors = Doors::open(&io, listen_address(&env.rendezvous), &identity, fabric)?;
        let dialler = Dialler::new(&io.handle(), &identity)?;
        let (server, port) = (env.rendezvous.clone(), doors.port);
        let joining = Client::join(dialler, server, env.rank, env.world_size, (fabric, port), deadline);
        let (client, roster) = io.handle().block_on(joining)??;
        // Taken back below: whoever hears of a death meanwhile never gives it back.
        let client = Arc::new(tokio::sync::Mutex::new(client));
        let one_host = env.local_world_size == env.world_size && sharing == Sharing::Auto;
        let transport = doors.link(&io, &client, roster, one_host, deadline)?;
        let transport =
            unless_a_rank_dies(&io, &client, |death| shm::upgrade(transport, sharing, deadline, death))?;
        let links = transport.name();
        let mut communicator = Communicator::new(transport, config)?;
        tracing::info!(rank = env.rank, world_size = env.world_size, links, "all ranks are connected");
        let (culprit, culprits) = oneshot::channel();
        communicator.on_failure(move |error| {
            // Nobody listens any more: the launcher has gone, or this rank is leaving.
            let _ = culprit.send(culprit_of(error));
        });
        let interrupter = communicator.interrupter();
        let watcher = io.handle().spawn(watch(client, interrupter, culprits));
        let renewal = io.handle().spawn(renewal::follow(env.identity.clone(), identity));
        if let Err(error) = communicator.tune() {
            // A rank that is ready may have failed already, or left. Whoever is not finds that in its first
            // operation, like everybody else.
            tracing::debug!(rank = env.rank, %error, "the probe was cut short");
        }
        Ok(Self {
            rank: env.rank,
            world_size: env.world_size,
            local_rank: env.local_rank,
            local_world_size: env.local_world_size,
            links,
            communicator,
            membership: Membership { _job: Some(Job { watcher, renewal, _doors: doors, _io: io }) },
        })
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// The number of this process among those on its host, for choosing a device.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// The number of ranks on this host.
    pub fn local_world_size(&self) -> usize {
        self.local_world_size
    }

    /// The kind of links between the ranks: `shm` where all share memory, `quic` or `tls` where none do,
    /// `shm+quic` or `shm+tls` between several hosts, `none` in a world of one without a launcher.
    pub fn links(&self) -> &'static str {
        self.links
    }

    /// The communicator of all ranks.
    pub fn communicator(&mut self) -> &mut Communicator {
        &mut self.communicator
    }

    /// Leaves the job in order. To be called at the end of every successful run: a process that ends
    /// without it is a loss to the others if they still need it. Blocks until the other ranks have all
    /// this one sent, for the collectives' timeout at most.
    ///
    /// # Errors
    /// [`Error::Collectives`] naming the ranks that did not confirm in time.
    pub fn leave(self) -> Result<(), Error> {
        Ok(self.communicator.leave()?)
    }

    /// Takes the world apart, for a program that moves the communicator to another thread. It ends with
    /// [`Communicator::leave`], and keeps the membership until then.
    pub fn into_parts(self) -> (Communicator, Membership) {
        (self.communicator, self.membership)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.watcher.abort();
        self.renewal.abort();
    }
}

impl Doors {
    fn open(io: &IoThread, addr: SocketAddr, identity: &Identity, fabric: Fabric) -> Result<Self, Error> {
        let io = io.handle();
        if fabric == Fabric::Quic {
            let quic = quic::Endpoint::bind(&io, addr, identity)?;
            let port = quic.local_addr().port();
            return Ok(Self { quic: Some(quic), tls: None, choose: false, port });
        }
        let mut tries = PORT_TRIES;
        loop {
            let tls = tls::Endpoint::bind(&io, addr, identity)?;
            let port = tls.local_addr().port();
            if fabric == Fabric::Tls {
                return Ok(Self { quic: None, tls: Some(tls), choose: false, port });
            }
            match quic::Endpoint::bind(&io, SocketAddr::new(addr.ip(), port), identity) {
                Ok(quic) => return Ok(Self { quic: Some(quic), tls: Some(tls), choose: true, port }),
                Err(TransportError::Bind { kind: ErrorKind::AddrInUse, .. }) if tries > 0 => tries -= 1,
                Err(error) => {
                    // A sandbox without UDP: the links will be TLS, on all ranks.
                    tracing::info!(%error, "no UDP socket");
                    return Ok(Self { quic: None, tls: Some(tls), choose: true, port });
                }
            }
        }
    }

    /// Links up with the other ranks, and closes the door that is not needed any more.
    fn link(
        &mut self,
        io: &IoThread,
        client: &Arc<tokio::sync::Mutex<Client>>,
        roster: Roster,
        one_host: bool,
        deadline: Instant,
    ) -> Result<Box<dyn Transport>, Error> {
        let death = first_death(client.clone());
        let (Some(door), quic_door) = (&self.tls, &self.quic) else {
            let door = self.quic.as_ref().expect("there is one of both");
            return Ok(Box::new(QuicTransport::connect_unless(door, roster, deadline, death)?));
        };
        let tls = Box::new(TlsTransport::connect_unless(door, roster.clone(), deadline, death)?);
        if !self.choose {
            return Ok(tls);
        }
        let other_host = |rank: &usize| roster.members[*rank].addr.ip() != roster.members[0].addr.ip();
        let probe = (1..roster.members.len()).find(other_host).unwrap_or(1);
        let form_quic = |deadline| -> Result<Box<dyn Transport>, TransportError> {
            match quic_door {
                Some(door) => Ok(Box::new(QuicTransport::connect(door, roster, deadline)?)),
                None => Err(TransportError::Usage { reason: "this rank has no UDP socket".to_owned() }),
            }
        };
        let chosen = unless_a_rank_dies(io, client, |death| {
            fabric::choose(tls, form_quic, (one_host, probe), deadline, death)
        })?;
        match chosen.name() {
            "quic" => self.tls = None,
            _ => self.quic = None,
        }
        Ok(chosen)
    }
}

/// Runs `forming` with a question that it asks now and then: whether a rank has died meanwhile, so that it is
/// to give up.
fn unless_a_rank_dies<T>(
    io: &IoThread,
    client: &Arc<tokio::sync::Mutex<Client>>,
    forming: impl FnOnce(&dyn Fn() -> Option<String>) -> Result<T, TransportError>,
) -> Result<T, Error> {
    let death = Arc::new(OnceLock::new());
    let (heard, client) = (death.clone(), client.clone());
    let listener = io.handle().spawn(async move {
        let _ = heard.set(first_death(client).await);
    });
    let formed = forming(&|| death.get().cloned());
    listener.abort();
    Ok(formed?)
}

/// Completes when a rank has ended before all links were made, with the reason.
async fn first_death(client: Arc<tokio::sync::Mutex<Client>>) -> String {
    let mut client = client.lock().await;
    match client.news().await {
        Some(News::Died { rank, cause }) => format!("rank {rank} {cause}"),
        Some(News::Exited { rank }) => {
            // It may have finished its part and left in order, and its link is about to be made here.
            client.keep(News::Exited { rank });
            tokio::time::sleep(GOODBYE_GRACE).await;
            format!("rank {rank} exited with code 0")
        }
        None => "the launcher has gone".to_owned(),
    }
}

/// Passes the launcher's news on to the communicator, and tells the launcher whom this rank's failure is
/// due to, so that it can name the cause even when this process ends first.
async fn watch(
    client: Arc<tokio::sync::Mutex<Client>>,
    interrupter: Interrupter,
    mut culprit: oneshot::Receiver<Option<usize>>,
) {
    let mut client = client.lock().await;
    let mut failed = false;
    loop {
        let news = tokio::select! {
            news = client.news() => news,
            culprit = &mut culprit, if !failed => {
                failed = true;
                if let Ok(Some(rank)) = culprit {
                    client.blame(rank).await;
                }
                continue;
            }
        };
        match news {
            Some(News::Died { rank, cause }) => interrupter.peer_lost(rank, &cause),
            Some(News::Exited { rank }) => {
                let interrupter = interrupter.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(GOODBYE_GRACE).await;
                    interrupter.peer_lost(rank, "exited with code 0 without leaving");
                });
            }
            None => return tracing::debug!("the launcher has gone"),
        }
    }
}

/// The rank that an error is due to, when it is one other rank.
fn culprit_of(error: &CollectivesError) -> Option<usize> {
    match error {
        CollectivesError::PeerLost { rank, .. } | CollectivesError::PeerLeft { rank, .. } => Some(*rank),
        CollectivesError::TimedOut { waiting_for, .. } => waiting_for.first().copied(),
        _ => None,
    }
}

fn read_identity(path: &Path) -> Result<Identity, Error> {
    let unusable = |reason: String| Error::Environment {
        variable: "PACELINE_IDENTITY",
        reason: format!("{}: {reason}", path.display()),
    };
    renewal::read(path).map_err(unusable)
}

/// The address on which a member of a job listens: loopback when the rendezvous is there, so that a job on one machine is not
/// reachable from outside; otherwise all interfaces of the rendezvous's address family.
pub fn listen_address(rendezvous: &str) -> SocketAddr {
    let host = rendezvous.rsplit_once(':').map_or(rendezvous, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let ip = match host.parse::<IpAddr>() {
        // Whichever it is: a rank that dials it is seen at this one, which is where the others then dial the rank.
        Ok(IpAddr::V4(ip)) if ip.is_loopback() => Ipv4Addr::LOCALHOST.into(),
        Ok(ip) if ip.is_loopback() => ip,
        Ok(IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        Err(_) if host == "localhost" => Ipv4Addr::LOCALHOST.into(),
        Ok(IpAddr::V4(_)) | Err(_) => Ipv4Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_collectives::ReduceOp;

    #[test]
    fn without_a_launcher_there_is_a_world_of_one() {
        let mut world = World::alone(Config::default()).expect("the defaults are right");
        let mut buffer = [3.0f32];
        world.communicator().all_reduce(&mut buffer, ReduceOp::Avg).expect("nobody else is needed");
        assert_eq!((world.rank(), world.world_size(), buffer), (0, 1, [3.0]));
        world.leave().expect("nobody else is needed");
    }

    #[test]
    fn a_local_rendezvous_means_local_sockets() {
        for (rendezvous, expected) in [
            ("127.0.0.1:29400", "127.0.0.1:0"),
            ("127.0.0.2:29400", "127.0.0.1:0"),
            ("localhost:29400", "127.0.0.1:0"),
            ("[::1]:29400", "[::1]:0"),
            ("10.1.2.3:29400", "0.0.0.0:0"),
            ("[fd00::1]:29400", "[::]:0"),
            ("job-launcher-0.job:29400", "0.0.0.0:0"),
        ] {
            assert_eq!(listen_address(rendezvous).to_string(), expected);
        }
    }
}
