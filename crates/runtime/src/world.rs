//! This process's place in the job.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use paceline_collectives::device::{Accelerator, Agreement, DeviceGroup, Setup};
use paceline_collectives::{Communicator, Config, Error as CollectivesError, FlightRecorder, Interrupter};
use paceline_transport::identity::Identity;
use paceline_transport::quic::{Knock, QuicTransport, Settings};
use paceline_transport::shm::{self, Sharing};
use paceline_transport::tls::{Dialler, StripedTransport, TlsTransport};
use paceline_transport::{
    Error as TransportError, Fabric, IoHandle, IoThread, Roster, Transport, fabric, mem,
};
use paceline_transport::{quic, tls};
use tokio::sync::oneshot;

use crate::env::{self, JobEnv};
use crate::interface::Selection;
use crate::rendezvous::{self, Client, Door, Met, News};
use crate::{Error, flight_recorder, renewal};

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
    /// The way of collectives on device memory, once ranks have agreed on one.
    backend: Option<Agreement>,
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
    /// On further interfaces.
    beside: Vec<tls::Endpoint>,
    /// Whether the ranks are to choose between both.
    choose: bool,
    port: u16,
    /// What the QUIC endpoint wants to hear.
    knock: Option<Knock>,
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
            backend: None,
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
        let wrong = |reason| Error::Environment { variable: env::INTERFACE, reason };
        let chosen = env.interface.as_ref().map(Selection::choose_all_here).transpose().map_err(wrong)?;
        let ips = chosen.unwrap_or_default();
        if ips.len() > 1 && fabric == Fabric::Quic {
            let reason =
                "links over several interfaces are TLS's; leave PACELINE_FABRIC unset or make it tls";
            return Err(wrong(reason.to_owned()));
        }
        let ip = ips.first().copied();
        let dialler = Dialler::new(&io.handle(), &identity)?;
        let server = env.rendezvous.clone();
        let dialled = io.handle().block_on(async move {
            let connection = rendezvous::dial(&dialler, &server, deadline).await;
            connection.map_err(|reason| Error::Rendezvous { endpoint: server, reason })
        })??;
        let listen = match ip {
            Some(ip) => SocketAddr::new(ip, 0),
            None => listen_address(&env.rendezvous, dialled.remote_address().ip()),
        };
        tracing::debug!(rank = env.rank, address = %listen.ip(), told = ip.is_some(), "listening for other ranks");
        let mut doors = Doors::open(&io, listen, &identity, fabric)?;
        doors.open_beside(&io, ips.get(1..).unwrap_or_default(), &identity, fabric)?;
        let door = Door { ip, port: doors.port, fabric, knock: doors.knock };
        let server = (dialled, env.rendezvous.clone());
        let job = identity.job().to_owned();
        let joining = Client::join(server, job, (env.rank, env.world_size, env.generation), door, deadline);
        let Met { client, roster, knocks } = io.handle().block_on(joining)??;
        doors.knock_at(knocks);
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
        let traces = Traces::new(env, &communicator);
        let watcher = io.handle().spawn(watch(client, interrupter, culprits, traces));
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
            backend: None,
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

    /// The kind of links between the ranks: `shm` where all share memory, `quic`, `tls` or `tcp` where none do,
    /// `shm+quic`, `shm+tls` or `shm+tcp` between several hosts, `none` in a world of one without a launcher.
    pub fn links(&self) -> &'static str {
        self.links
    }

    /// The communicator of all ranks.
    pub fn communicator(&mut self) -> &mut Communicator {
        &mut self.communicator
    }

    /// What this process computes on: the GPU of its number on the host, or the host's memory where there is none, which
    /// the first rank of each host logs in one line. `PACELINE_CUDA_PATH` names CUDA's driver where the system does not.
    pub fn accelerator(&self) -> Accelerator {
        let (found, reason) = Accelerator::find(self.local_rank, env::cuda_driver(env::process).as_deref());
        match reason {
            Some(reason) if self.local_rank == 0 => tracing::info!(rank = self.rank, reason, "no GPU"),
            Some(_) => {}
            None => tracing::debug!(rank = self.rank, device = found.name(), "a GPU"),
        }
        found
    }

    /// Forms the group of all ranks' devices, with its own links: collectives on device memory, through NCCL where all
    /// ranks can use it and through the host otherwise, or as `PACELINE_BACKEND` says. All ranks call it. Rank 0 logs the
    /// way and why; [`backend`](Self::backend) has them. Blocks.
    ///
    /// The group is left before this world is.
    ///
    /// # Errors
    /// [`Error::Environment`] for a `PACELINE_BACKEND` that makes no sense; [`Error::Collectives`] when ranks want
    /// different things, or one cannot have what they want.
    pub fn device_group(&mut self, accelerator: &Accelerator) -> Result<DeviceGroup, Error> {
        self.device_group_with(accelerator, &env::device_setup(env::process)?)
    }

    /// [`device_group`](Self::device_group), formed as the program says, whatever the environment does.
    ///
    /// # Errors
    /// As there.
    pub fn device_group_with(
        &mut self,
        accelerator: &Accelerator,
        setup: &Setup,
    ) -> Result<DeviceGroup, Error> {
        let seat = accelerator.seat().map_err(|error| Error::Usage { reason: error.to_string() })?;
        let Some(communicator) = self.communicator.split(Some(0), 0)? else {
            unreachable!("a color was given");
        };
        let group = DeviceGroup::form(communicator, seat, setup)?;
        self.backend = Some(group.agreement().clone());
        Ok(group)
    }

    /// The way of collectives on device memory, and why; `None` before [`device_group`](Self::device_group).
    pub fn backend(&self) -> Option<&Agreement> {
        self.backend.as_ref()
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
        // Without random numbers there will be no TLS either.
        let knock = Knock::random().ok();
        let settings = |addr: SocketAddr| Settings::for_address(addr.ip()).with_knock(knock);
        if fabric == Fabric::Quic {
            let quic = quic::Endpoint::bind_with(&io, addr, identity, &settings(addr))?;
            let port = quic.local_addr().port();
            return Ok(Self { quic: Some(quic), tls: None, beside: Vec::new(), choose: false, port, knock });
        }
        let mut tries = PORT_TRIES;
        loop {
            let tls = bind_tls(&io, addr, identity, fabric)?;
            let port = tls.local_addr().port();
            if matches!(fabric, Fabric::Tls | Fabric::Tcp) {
                let (quic, tls) = (None, Some(tls));
                return Ok(Self { quic, tls, beside: Vec::new(), choose: false, port, knock: None });
            }
            let addr = SocketAddr::new(addr.ip(), port);
            match quic::Endpoint::bind_with(&io, addr, identity, &settings(addr)) {
                Ok(quic) => {
                    let (quic, tls) = (Some(quic), Some(tls));
                    return Ok(Self { quic, tls, beside: Vec::new(), choose: true, port, knock });
                }
                Err(TransportError::Bind { kind: ErrorKind::AddrInUse, .. }) if tries > 0 => tries -= 1,
                Err(error) => {
                    // A sandbox without UDP: the links will be TLS, on all ranks.
                    tracing::info!(%error, "no UDP socket");
                    let (quic, tls) = (None, Some(tls));
                    return Ok(Self { quic, tls, beside: Vec::new(), choose: true, port, knock: None });
                }
            }
        }
    }

    /// Has the others be dialled as their endpoints want.
    fn knock_at(&self, knocks: Vec<(SocketAddr, Knock)>) {
        if let Some(quic) = &self.quic {
            knocks.into_iter().for_each(|(addr, knock)| quic.knock_at(addr, knock));
        }
    }

    /// Opens further doors, for links over several interfaces at the same time.
    fn open_beside(
        &mut self,
        io: &IoThread,
        ips: &[IpAddr],
        identity: &Identity,
        fabric: Fabric,
    ) -> Result<(), Error> {
        for &ip in ips {
            self.beside.push(bind_tls(&io.handle(), SocketAddr::new(ip, 0), identity, fabric)?);
        }
        Ok(())
    }

    /// Links up over further interfaces too, where all ranks have some.
    fn link_beside(
        &self,
        io: &IoThread,
        client: &Arc<tokio::sync::Mutex<Client>>,
        mut first: TlsTransport,
        roster: &Roster,
        deadline: Instant,
    ) -> Result<Box<dyn Transport>, Error> {
        let rosters = unless_a_rank_dies(io, client, |death| {
            fabric::rosters_beside(&mut first, &self.beside, roster, deadline, death)
        })?;
        let beside =
            self.beside.iter().zip(rosters).map(|(door, roster)| {
                first.connect_beside(door, roster, deadline, first_death(client.clone()))
            });
        let mut lanes = beside.collect::<Result<Vec<_>, _>>()?;
        if lanes.is_empty() {
            return Ok(Box::new(first));
        }
        lanes.insert(0, first);
        tracing::info!(rank = roster.rank, interfaces = lanes.len(), "links over several interfaces");
        Ok(Box::new(StripedTransport::new(lanes)?))
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
        let first = TlsTransport::connect_unless(door, roster.clone(), deadline, death)?;
        let tls = self.link_beside(io, client, first, &roster, deadline)?;
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
            "quic" => {
                self.tls = None;
                self.beside.clear();
            }
            _ => self.quic = None,
        }
        Ok(chosen)
    }
}

/// A port for links over TCP, encrypted unless it is otherwise wanted.
fn bind_tls(
    io: &IoHandle,
    addr: SocketAddr,
    identity: &Identity,
    fabric: Fabric,
) -> Result<tls::Endpoint, TransportError> {
    match fabric {
        Fabric::Tcp => tls::Endpoint::bind_plain(io, addr, identity),
        _ => tls::Endpoint::bind(io, addr, identity),
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
    let news = loop {
        match client.news().await {
            // There is nothing yet to be traced.
            Some(News::Trace) => {}
            news => break news,
        }
    };
    match news {
        Some(News::Died { rank, cause }) => {
            let reason = format!("rank {rank} {cause}");
            // The links may be there before anybody looks at this.
            client.keep(News::Died { rank, cause });
            reason
        }
        Some(News::Exited { rank }) => {
            // It may have finished its part and left in order, and its link is about to be made here.
            client.keep(News::Exited { rank });
            tokio::time::sleep(GOODBYE_GRACE).await;
            format!("rank {rank} exited with code 0")
        }
        Some(News::Trace) | None => "the launcher has gone".to_owned(),
    }
}

/// Where a rank's traces come from, and where they go, if anywhere.
#[derive(Clone)]
struct Traces {
    recorder: FlightRecorder,
    writer: Option<TraceWriter>,
}

#[derive(Clone)]
struct TraceWriter {
    folder: PathBuf,
    timeout: Duration,
    /// Held from before a trace is taken until it is written, so that an older one never takes the place of a newer.
    writing: Arc<Mutex<()>>,
}

impl Traces {
    /// Also has one written when the communicator fails.
    fn new(env: &JobEnv, communicator: &Communicator) -> Self {
        let (recorder, timeout) = (communicator.flight_recorder(), communicator.config().timeout);
        let writer = |folder| TraceWriter { folder, timeout, writing: Arc::default() };
        let writer = env.flight_recorder.clone().map(writer);
        if let Some(writer) = writer.clone() {
            // The recorder keeps this, so this must not keep the recorder.
            recorder.on_failure(move |recorder| writer.write(recorder));
        }
        Self { recorder, writer }
    }

    /// On a thread of its own, since it writes a file; does not wait for it.
    fn write_in_background(&self) {
        if let Self { recorder, writer: Some(writer) } = self.clone() {
            drop(tokio::task::spawn_blocking(move || writer.write(&recorder)));
        }
    }
}

impl TraceWriter {
    fn write(&self, recorder: &FlightRecorder) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let trace = &recorder.trace();
        if trace.groups.is_empty() {
            // The communicators are gone, and whose they were: that of a failure was written before.
            return;
        }
        let folder = self.folder.display();
        match flight_recorder::write(&self.folder, trace, self.timeout) {
            Ok(()) => {
                tracing::info!(rank = trace.rank, %folder, "wrote what this rank did last")
            }
            Err(error) => {
                tracing::warn!(rank = trace.rank, %folder, %error, "cannot write what this rank did last");
            }
        }
    }
}

/// Passes the launcher's news on to the communicator, and tells the launcher whom this rank's failure is
/// due to, so that it can name the cause even when this process ends first.
async fn watch(
    client: Arc<tokio::sync::Mutex<Client>>,
    interrupter: Interrupter,
    mut culprit: oneshot::Receiver<Option<usize>>,
    traces: Traces,
) {
    let mut client = client.lock().await;
    let mut failed = false;
    loop {
        let news = tokio::select! {
            news = client.news() => news,
            culprit = &mut culprit, if !failed => {
                failed = true;
                // An error of the channel is the end of a communicator that has not failed.
                if let Ok(because_of) = culprit {
                    client.failed(because_of).await;
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
            Some(News::Trace) => traces.write_in_background(),
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

/// The address on which a member of a job listens that has dialled the rendezvous at `dialled`: loopback when the
/// rendezvous was named as being there, so that a job on one machine is not reachable from outside; otherwise all
/// interfaces of the address family by which the rendezvous was reached, as that is where the others then dial.
pub fn listen_address(rendezvous: &str, dialled: IpAddr) -> SocketAddr {
    let host = rendezvous.rsplit_once(':').map_or(rendezvous, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let means_loopback = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    let ip: IpAddr = match (dialled, means_loopback) {
        // Whichever it is: a rank that dials it is seen at this one, which is where the others then dial the rank.
        (IpAddr::V4(_), true) => Ipv4Addr::LOCALHOST.into(),
        (IpAddr::V6(_), true) => Ipv6Addr::LOCALHOST.into(),
        (IpAddr::V4(_), false) => Ipv4Addr::UNSPECIFIED.into(),
        (IpAddr::V6(_), false) => Ipv6Addr::UNSPECIFIED.into(),
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
    fn a_world_on_the_host_sums_device_memory_and_says_why() {
        let mut world = World::alone(Config::default()).expect("the defaults are right");
        assert_eq!(world.backend(), None);
        let host = Accelerator::Host(Default::default());
        let group = world.device_group(&host).expect("nobody else is needed");
        let agreement = world.backend().expect("they have agreed").to_string();
        assert_eq!(
            agreement,
            "collectives on device memory go through the host: rank 0 has no GPU or no driver of CUDA"
        );
        assert_eq!((group.rank(), group.world_size()), (0, 1));
        group.leave().expect("nobody else is needed");
        world.leave().expect("nobody else is needed");
    }

    #[test]
    fn what_is_told_of_a_failure_does_not_keep_the_recorder() {
        let mut world = World::alone(Config::default()).expect("the defaults are right");
        let folder = tempfile::tempdir().expect("a folder");
        let env = JobEnv {
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            generation: 0,
            rendezvous: "127.0.0.1:1".to_owned(),
            rendezvous_timeout: Duration::ZERO,
            identity: PathBuf::new(),
            interface: None,
            flight_recorder: Some(folder.path().to_owned()),
        };
        let traces = Traces::new(&env, world.communicator());
        let writing = Arc::downgrade(&traces.writer.as_ref().expect("there is a folder").writing);
        drop(traces);
        assert!(writing.upgrade().is_some(), "the recorder has it");
        drop(world);
        assert!(writing.upgrade().is_none(), "it went with the world");
    }

    #[test]
    fn a_local_rendezvous_means_local_sockets() {
        for (rendezvous, dialled, expected) in [
            ("127.0.0.1:29400", "127.0.0.1", "127.0.0.1:0"),
            ("127.0.0.2:29400", "127.0.0.2", "127.0.0.1:0"),
            ("localhost:29400", "127.0.0.1", "127.0.0.1:0"),
            ("localhost:29400", "::1", "[::1]:0"),
            ("[::1]:29400", "::1", "[::1]:0"),
            ("10.1.2.3:29400", "10.1.2.3", "0.0.0.0:0"),
            ("[fd00::1]:29400", "fd00::1", "[::]:0"),
            ("[fe80::1%eth0]:29400", "fe80::1", "[::]:0"),
            ("job-launcher-0.job:29400", "10.1.2.3", "0.0.0.0:0"),
            ("job-launcher-0.job:29400", "fd00::1", "[::]:0"),
            ("job-launcher-0.job:29400", "127.0.1.1", "0.0.0.0:0"),
        ] {
            let dialled = dialled.parse().expect("an address");
            assert_eq!(listen_address(rendezvous, dialled).to_string(), expected);
        }
    }
}
