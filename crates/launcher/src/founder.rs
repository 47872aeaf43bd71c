//! The launcher that founds the job: on one machine, or as node 0 of several.

use std::ffi::OsString;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use paceline_runtime::nodes::{Failure, Generation, LOST_NODE};
use paceline_runtime::rendezvous::{Server, Start};
use paceline_transport::Error as TransportError;
use paceline_transport::boot::BootServer;
use paceline_transport::identity::{Identity, JobAuthority};
use paceline_transport::{IoHandle, IoThread};

use crate::cli::RunArgs;
use crate::console::Console;
use crate::credentials::{self, Credentials};
use crate::discovery::Lookout;
use crate::ending::Ending;
use crate::error::Error;
use crate::job::Cause;
use crate::lease::{self, tenure::Tenure};
use crate::news::News;
use crate::rendezvous::{
    Next, Rendezvous, Status, Told, cause, elsewhere, interface, list_nodes, worker_env,
};
use crate::secret;
use crate::torchrun::port;

/// How long this launcher, after a failure and the end of its own ranks, waits for the others: their ranks may still
/// have something to say about whose failure it was.
const LINGERING: Duration = Duration::from_secs(5);

/// How much later than the ranks of this machine those of others may end without a word about it.
const NOT_TOGETHER: Duration = Duration::from_secs(2);

/// The exit code of a job that another launcher 0 has taken over: whoever starts again what asks for it would have the two take it
/// from each other for ever.
const DEPOSED: u8 = 1;

/// See [`rendezvous::open`](crate::rendezvous::open).
pub fn open(args: &RunArgs, console: &Console) -> Result<Box<dyn Rendezvous>, Error> {
    let news = News::new().map_err(|e| system("cannot make an event descriptor", &e))?;
    let io = IoThread::start().map_err(|e| system("cannot start the I/O thread", &e))?;
    let tenure = lease::of_job(args)?.map(|lease| Tenure::new(lease, news.clone(), Status::new(console)));
    let tenure = tenure.map(Arc::new);
    let members = credentials::members(args);
    let begins = Beginning { first: generation(args, 0)?, instead: generation(args, 1)? };
    let (credentials, server, boot) = match &args.identity {
        Some(folder) => {
            let (deadline, status) = (Instant::now() + args.rendezvous_timeout, Status::new(console));
            let credentials = Arc::new(Credentials::awaited(folder, &members, deadline, &status)?);
            credentials.follow(&io.handle());
            let server = serve(args, &io.handle(), credentials.launcher(), (&news, tenure.as_ref()))?;
            wait_for_nodes(args, &io.handle(), &server, &begins, console)?;
            (credentials, server, None)
        }
        None => found(args, &begins, (&members, &io.handle(), &news, tenure.as_ref()), console)?,
    };
    tracing::info!(address = %server.local_addr(), "rendezvous open");
    let progress = Mutex::new(Progress::of(match server.start() {
        Start::Started(generation) => generation,
        Start::Waiting | Start::Missing(_) | Start::Barred(_) => begins.first,
    }));
    let (args, status) = (args.clone(), Status::new(console));
    let at_work = AtomicU32::new(args.ranks);
    Ok(Box::new(Founder {
        args,
        at_work,
        server,
        _boot: boot,
        tenure,
        credentials,
        progress,
        status,
        news,
        io,
    }))
}

/// With which generation a job begins.
struct Beginning {
    first: Generation,
    /// Where the others have lost another launcher 0: what it has but for its number.
    instead: Generation,
}

/// Founds the job with an authority of its own, which certifies the members of all nodes.
fn found(
    args: &RunArgs,
    begins: &Beginning,
    (members, io, news, tenure): (&[String], &IoHandle, &News, Option<&Arc<Tenure>>),
    console: &Console,
) -> Result<(Arc<Credentials>, Server, Option<BootServer>), Error> {
    let secret = args.nodes.as_ref().map(|nodes| secret::of(nodes.secret.as_deref())).transpose()?;
    let name = format!("job-{:016x}", RandomState::new().hash_one(std::process::id()));
    let authority = Arc::new(JobAuthority::new(&name).map_err(|e| certificates(&e))?);
    let life = args.certificate_life;
    let identities = credentials::issue(&authority, members, life).map_err(|e| certificates(&e))?;
    let server = serve(args, io, &identities[0], (news, tenure))?;
    let boot = match secret {
        Some(secret) => {
            let (endpoint, registrar) = (server.endpoint(), server.registrar());
            let boot = BootServer::beside(io, endpoint, secret, authority.clone(), life, registrar);
            Some(boot.map_err(|e| refused(args, &e))?)
        }
        None => None,
    };
    let credentials = Arc::new(Credentials::store(&identities)?);
    let members = members.to_vec();
    io.spawn(credentials::keep_fresh(Arc::downgrade(&credentials), life, move || {
        let fresh = credentials::issue(&authority, &members, life);
        std::future::ready(fresh.map(|fresh| (fresh, life)).map_err(|e| e.to_string()))
    }));
    // The certificates' time runs while others come.
    wait_for_nodes(args, io, &server, begins, console)?;
    Ok((credentials, server, boot))
}

/// The fields are dropped in this order: first nobody is served, then the certificates and the thread go.
struct Founder {
    args: RunArgs,
    /// The ranks of this machine that have not exited with code 0.
    at_work: AtomicU32,
    server: Server,
    _boot: Option<BootServer>,
    /// Where a lease says which launcher 0 goes on.
    tenure: Option<Arc<Tenure>>,
    credentials: Arc<Credentials>,
    progress: Mutex<Progress>,
    status: Status,
    news: News,
    io: IoThread,
}

/// How far the present generation has come.
struct Progress {
    generation: Generation,
    /// When the last rank of this machine had ended.
    ended: Option<Instant>,
    /// It was said that others still run.
    said: bool,
    after: After,
}

/// What follows a generation whose ranks have all ended.
enum After {
    Undecided,
    /// Another one, for this reason, as soon as all nodes are there. That a node has come is not what the job fails of, should
    /// too few be left.
    Again {
        reason: Option<Failure>,
        has_come: bool,
    },
    /// That was to be, but not enough nodes are there, or another launcher 0 has taken the job over.
    InVain(Failure),
    /// Nothing. The others were told at this time.
    Nothing(Instant),
}

impl Progress {
    fn of(generation: Generation) -> Self {
        Progress { generation, ended: None, said: false, after: After::Undecided }
    }
}

impl Rendezvous for Founder {
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)> {
        // The ranks of several nodes dial the address that the others use, so that theirs is one that the others reach.
        let rendezvous = match &self.args.nodes {
            Some(_) => self.args.rendezvous.to_string(),
            None => self.server.local_addr().to_string(),
        };
        let generation = self.generation();
        worker_env(&self.args, rank, (rendezvous, &generation), &self.credentials)
    }

    fn announce_exit(&self, rank: u32, by_itself: bool) {
        self.server.announce_exit(rank as usize);
        let was_last = self.at_work.fetch_sub(1, Ordering::Relaxed) == 1;
        if was_last && by_itself && self.args.pod.first_decides {
            self.server.announce_completion(rank as usize);
        }
    }

    fn announce_death(&self, rank: u32, ending: Ending, by_itself: bool) {
        self.server.announce_death(rank as usize, &ending.to_string(), ending.exit_code(), by_itself);
    }

    fn ask_for_traces(&self) {
        self.server.ask_for_traces();
    }

    fn ranks_ended(&self, _: Told) {
        self.progress().ended.get_or_insert_with(Instant::now);
    }

    fn failure_elsewhere(&self) -> Option<(String, u8)> {
        if let Some(reason) = self.tenure.as_ref().and_then(|tenure| tenure.lost()) {
            self.server.bar(&reason, DEPOSED);
        }
        elsewhere(&self.args, self.server.failure()?)
    }

    fn node(&self) -> u32 {
        self.args.node()
    }

    fn generation(&self) -> Generation {
        self.progress().generation.clone()
    }

    fn next(&self, told: Told) -> Next {
        let mut progress = self.progress();
        match progress.after {
            After::Again { .. } => return self.start(&mut progress),
            After::InVain(_) => return Next::End,
            After::Undecided | After::Nothing(_) => {}
        }
        let at_work = self.server.nodes_at_work();
        let failed = self.server.failure().is_some();
        let may_restart = failed && self.server.may_restart() && told == Told::Nothing;
        let waited = progress.ended.map_or(Duration::ZERO, |at| at.elapsed());
        // Where the job starts again, each machine's ranks have to end first, however long their grace is. Whoever was told
        // to stop does not wait for the end of others' work.
        let in_order = !failed && told != Told::ToStop;
        if !at_work.is_empty() && (may_restart || in_order || waited < LINGERING) {
            if in_order && waited >= NOT_TOGETHER && !std::mem::replace(&mut progress.said, true) {
                self.status.waiting_for(&format!(
                    "the ranks of {}; those here have ended",
                    list_nodes(&self.args, &at_work)
                ));
            }
            return Next::Wait;
        }
        match may_restart {
            true => self.begin_again(&mut progress),
            false => self.conclude(&mut progress),
        }
    }

    fn cause(&self) -> Option<Cause> {
        let progress = self.progress();
        let failure = match &progress.after {
            After::Again { reason, .. } => reason.clone(),
            After::InVain(failure) => Some(failure.clone()),
            After::Undecided | After::Nothing(_) => self.server.cause(),
        };
        failure.map(|failure| cause(&self.args, &progress.generation, failure))
    }

    fn news(&self) -> &News {
        &self.news
    }
}

impl Founder {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        // Fields are replaced whole.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_again(&self, progress: &mut Progress) -> Next {
        let has_come = self.server.changes();
        let next = match generation(&self.args, progress.generation.number + 1) {
            Ok(next) => {
                let changes = progress.generation.changes + u32::from(has_come);
                Generation { changes, ..next }
            }
            Err(error) => {
                tracing::error!(%error, "the job cannot start again");
                return self.conclude(progress);
            }
        };
        progress.after = After::Again { reason: self.server.cause(), has_come };
        let Wait { deadline, say, .. } = Wait::of(&self.args, &self.io.handle(), self.status.clone());
        self.server.begin_again(next, deadline, say);
        self.start(progress)
    }

    fn start(&self, progress: &mut Progress) -> Next {
        match self.server.start() {
            Start::Waiting => Next::Wait,
            Start::Started(generation) => {
                *progress = Progress::of(generation);
                self.at_work.store(self.args.ranks, Ordering::Relaxed);
                Next::Again
            }
            Start::Missing(nodes) => {
                tracing::error!(?nodes, "the nodes have not met again");
                self.status.say(&format!("{} did not come again", list_nodes(&self.args, &nodes)));
                if let (After::Again { has_come: true, .. }, Some(&node)) = (&progress.after, nodes.first()) {
                    let cause = "did not come again".to_owned();
                    progress.after = After::InVain(Failure { node, rank: None, cause, exit_code: LOST_NODE });
                }
                Next::End
            }
            Start::Barred(reason) => {
                self.status.say(&format!("the job does not start again: {reason}"));
                let cause = format!("may not go on: {reason}");
                progress.after = After::InVain(Failure { node: 0, rank: None, cause, exit_code: DEPOSED });
                Next::End
            }
        }
    }

    /// Tells the others how the job has ended, and gives them a moment to hear it.
    fn conclude(&self, progress: &mut Progress) -> Next {
        if !self.args.may_start_again(&progress.generation) {
            return Next::End;
        }
        let told = match progress.after {
            After::Nothing(at) => at,
            After::Undecided | After::Again { .. } | After::InVain(_) => {
                self.server.conclude();
                Instant::now()
            }
        };
        progress.after = After::Nothing(told);
        if self.server.is_alone() || told.elapsed() >= LINGERING { Next::End } else { Next::Wait }
    }
}

/// The generation `number` of the job, on all nodes: where its programs meet is up to this launcher.
///
/// # Errors
/// [`Error::System`] if no port is free.
pub fn generation(args: &RunArgs, number: u32) -> Result<Generation, Error> {
    let host = if args.nodes.is_some() { args.rendezvous.host.as_str() } else { "127.0.0.1" };
    let master_addr = args.torchrun.master_addr.clone().unwrap_or_else(|| host.to_owned());
    let random = RandomState::new();
    let mut draws = 0u64..;
    // An explicit port is the first generation's: later ones must not meet where keys of the first one may be.
    let given = args.torchrun.master_port.filter(|_| number == 0);
    let port = given.or_else(|| port::free(|| random.hash_one(draws.next())));
    let master_port =
        port.ok_or_else(|| system("cannot find a free port for MASTER_PORT", &"all are in use"))?;
    let (nodes, max_restarts) = ((0..args.layout().nodes as u32).collect(), args.max_restarts);
    Ok(Generation { number, changes: 0, max_restarts, nodes, master_addr, master_port })
}

fn serve(
    args: &RunArgs,
    io: &IoHandle,
    identity: &Identity,
    (news, tenure): (&News, Option<&Arc<Tenure>>),
) -> Result<Server, Error> {
    let server = bind(args, |address| {
        let bell = news.clone();
        let on_change = Arc::new(move || bell.ring());
        Server::bind(io, address, identity, args.terms(), args.rendezvous_timeout, on_change)
    })?;
    if let Some(tenure) = tenure.cloned() {
        server.ask(Arc::new(move || tenure.ask()));
    }
    Ok(server)
}

/// Listens where node 0 is reached, with what `bind` makes there.
///
/// # Errors
/// [`Error::Endpoint`] if nothing can listen there, [`Error::Usage`] for an interface that will not do.
pub fn bind<T>(args: &RunArgs, bind: impl Fn(SocketAddr) -> Result<T, TransportError>) -> Result<T, Error> {
    let address = match interface(args)? {
        // Who has chosen an interface and nothing else means all that is of this job.
        Some(ip) if !args.rendezvous_given => SocketAddr::new(ip, args.rendezvous.port),
        chosen => resolve(args, chosen)?,
    };
    let listen = listen_address(&args.rendezvous.host, args.nodes.is_some(), address);
    let bound = match bind(listen) {
        // It may be that of a service in front of this machine; what is sent to it arrives at any address.
        Err(TransportError::Bind { kind: io::ErrorKind::AddrNotAvailable, .. }) if args.nodes.is_some() => {
            bind(any(address))
        }
        bound => bound,
    };
    bound.map_err(|e| refused(args, &e))
}

/// Where to listen for a host that means `address` on this machine: there, if that was written. A name may mean
/// something else on other machines (Debian gives a machine's own name 127.0.1.1), so it stands for all addresses.
fn listen_address(host: &str, several_nodes: bool, address: SocketAddr) -> SocketAddr {
    let exact = !several_nodes || host == "localhost" || host.parse::<IpAddr>().is_ok();
    if exact { address } else { any(address) }
}

/// All addresses of that family.
pub fn any(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, address.port())
}

/// Waits until all other nodes have come, if there are any.
fn wait_for_nodes(
    args: &RunArgs,
    io: &IoHandle,
    server: &Server,
    Beginning { first, instead }: &Beginning,
    console: &Console,
) -> Result<(), Error> {
    server.allow_restarts(args.max_restarts);
    if args.nodes.is_none() {
        return Ok(());
    }
    let start = Instant::now();
    let Wait { deadline, say, lookout } = Wait::of(args, io, Status::new(console));
    let outcome = server.wait_for_nodes((first.clone(), instead.clone()), deadline, say);
    outcome.map_err(|e| match lookout.get().and_then(Lookout::status) {
        Some(missing) => {
            let why = format!("timed out after {} s waiting for {missing}", start.elapsed().as_secs());
            Error::Nodes { endpoint: args.rendezvous.to_string(), why }
        }
        None => Error::nodes(args, &e),
    })
}

/// What is called with the nodes that are missing.
type Say = Box<dyn Fn(&[u32]) + Send>;

/// A wait for nodes.
struct Wait {
    deadline: Instant,
    /// Says who is missing.
    say: Say,
    /// Finds out why, from the moment that some are, where their names are known.
    lookout: Arc<OnceLock<Lookout>>,
}

impl Wait {
    fn of(args: &RunArgs, io: &IoHandle, status: Status) -> Self {
        let deadline = Instant::now() + args.rendezvous_timeout;
        let lookout = Arc::new(OnceLock::new());
        let (args, io, of_wait) = (args.clone(), io.clone(), lookout.clone());
        let say = move |missing: &[u32]| {
            if args.pod.wanted.is_empty() {
                let nodes = list_nodes(&args, missing);
                return status.waiting_for(&format!("{nodes} to come to {}", args.rendezvous));
            }
            let (wanted, port) = (args.pod.wanted.clone(), args.rendezvous.port);
            of_wait.get_or_init(|| Lookout::begin(&io, wanted, port, status.clone())).missing(missing);
        };
        Self { deadline, say: Box::new(say), lookout }
    }
}

/// Whether the endpoint is an address of this machine.
pub fn is_here(args: &RunArgs) -> bool {
    let is_ours = |address: SocketAddr| UdpSocket::bind(SocketAddr::new(address.ip(), 0)).is_ok();
    resolve(args, None).is_ok_and(is_ours)
}

/// An address of the endpoint: of the family of `chosen`, where a name has both.
fn resolve(args: &RunArgs, chosen: Option<IpAddr>) -> Result<SocketAddr, Error> {
    let endpoint = &args.rendezvous;
    let unknown = |why: String| Error::Endpoint { endpoint: endpoint.to_string(), why };
    let addresses = match (endpoint.host.as_str(), endpoint.port).to_socket_addrs() {
        Ok(addresses) => addresses,
        // A pod may be up before its name is; and a name stands for all addresses in any case.
        Err(_) if args.nodes.is_some() => return Ok(unnamed(chosen, endpoint.port)),
        Err(e) => return Err(unknown(e.to_string())),
    };
    preferred(&addresses.collect::<Vec<_>>(), chosen)
        .ok_or_else(|| unknown("the name has no address".to_owned()))
}

/// Where to listen for a name that has no address yet.
fn unnamed(chosen: Option<IpAddr>, port: u16) -> SocketAddr {
    any(SocketAddr::new(chosen.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), port))
}

fn preferred(addresses: &[SocketAddr], chosen: Option<IpAddr>) -> Option<SocketAddr> {
    let alike = |address: &&SocketAddr| chosen.is_some_and(|chosen| chosen.is_ipv4() == address.is_ipv4());
    addresses.iter().find(alike).or(addresses.first()).copied()
}

/// Why nothing listens there.
pub fn refused(args: &RunArgs, e: &TransportError) -> Error {
    let TransportError::Bind { addr, reason, kind } = e else { return certificates(e) };
    let why = match kind {
        io::ErrorKind::AddrInUse => "the port is in use; choose another one with --rdzv-endpoint".to_owned(),
        io::ErrorKind::AddrNotAvailable => "this machine does not have that address".to_owned(),
        io::ErrorKind::PermissionDenied => "ports below 1024 need privileges; choose another one".to_owned(),
        _ => reason.clone(),
    };
    let endpoint = if args.rendezvous_given { args.rendezvous.to_string() } else { addr.to_string() };
    Error::Endpoint { endpoint, why }
}

fn certificates(e: &TransportError) -> Error {
    system("cannot make the job's certificates", e)
}

fn system(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::System { what: what.to_owned(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_name_with_both_families_that_of_the_interface_counts() {
        let addresses: Vec<SocketAddr> =
            ["10.0.0.1:1", "[fd00::1]:1"].map(|address| address.parse().expect("an address")).to_vec();
        let chosen = |ip: &str| preferred(&addresses, Some(ip.parse().expect("an address")));
        assert_eq!(preferred(&addresses, None), Some(addresses[0]));
        assert_eq!((chosen("fd00::9"), chosen("10.9.9.9")), (Some(addresses[1]), Some(addresses[0])));
        let v4_only = preferred(&addresses[..1], Some("::1".parse().expect("an address")));
        assert_eq!(v4_only, Some(addresses[0]), "whoever gave the name knows best");
    }

    #[test]
    fn a_name_that_other_machines_use_stands_for_all_addresses() {
        let at = |host, several, address: &str| {
            listen_address(host, several, address.parse().expect("an address")).to_string()
        };
        assert_eq!(at("node-0", true, "127.0.1.1:1"), "0.0.0.0:1");
        assert_eq!(at("node-0", true, "[fd00::1]:1"), "[::]:1");
        assert_eq!(at("node-0", false, "127.0.1.1:1"), "127.0.1.1:1");
        assert_eq!(at("localhost", true, "127.0.0.1:1"), "127.0.0.1:1");
        assert_eq!(at("10.0.0.1", true, "10.0.0.1:1"), "10.0.0.1:1");
    }
}
