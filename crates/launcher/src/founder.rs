//! The launcher that founds the job: on one machine, or as node 0 of several.

use std::ffi::OsString;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use paceline_runtime::rendezvous::Server;
use paceline_transport::Error as TransportError;
use paceline_transport::boot::BootServer;
use paceline_transport::identity::{Identity, JobAuthority};
use paceline_transport::{IoHandle, IoThread};

use crate::cli::RunArgs;
use crate::console::Console;
use crate::credentials::{self, Credentials};
use crate::ending::Ending;
use crate::error::Error;
use crate::job::Cause;
use crate::news::News;
use crate::rendezvous::{Rendezvous, Status, cause, elsewhere, list_nodes, worker_env};
use crate::secret;

/// How long this launcher, after a failure and the end of its own ranks, waits for the others: their ranks may still
/// have something to say about whose failure it was.
const LINGERING: Duration = Duration::from_secs(5);

/// How much later than the ranks of this machine those of others may end without a word about it.
const NOT_TOGETHER: Duration = Duration::from_secs(2);

/// See [`rendezvous::open`](crate::rendezvous::open).
pub fn open(args: &RunArgs, console: &Console) -> Result<Box<dyn Rendezvous>, Error> {
    let news = News::new().map_err(|e| system("cannot make an event descriptor", &e))?;
    let io = IoThread::start().map_err(|e| system("cannot start the I/O thread", &e))?;
    let members = credentials::members(args);
    let (credentials, server, boot) = match &args.identity {
        Some(folder) => {
            let credentials = Arc::new(Credentials::given(folder, &members)?);
            credentials.follow(&io.handle());
            let server = serve(args, &io.handle(), credentials.launcher(), &news)?;
            wait_for_nodes(args, &server, console)?;
            (credentials, server, None)
        }
        None => found(args, &members, &io.handle(), &news, console)?,
    };
    tracing::info!(address = %server.local_addr(), "rendezvous open");
    let ended = Mutex::new(None);
    let (args, status) = (args.clone(), Status::new(console));
    Ok(Box::new(Founder { args, server, _boot: boot, credentials, ended, status, news, _io: io }))
}

/// Founds the job with an authority of its own, which certifies the members of all nodes.
fn found(
    args: &RunArgs,
    members: &[String],
    io: &IoHandle,
    news: &News,
    console: &Console,
) -> Result<(Arc<Credentials>, Server, Option<BootServer>), Error> {
    let secret = args.nodes.as_ref().and_then(|nodes| nodes.secret.as_deref()).map(secret::read);
    let secret = secret.transpose()?;
    let name = format!("job-{:016x}", RandomState::new().hash_one(std::process::id()));
    let authority = Arc::new(JobAuthority::new(&name).map_err(|e| certificates(&e))?);
    let life = args.certificate_life;
    let identities = credentials::issue(&authority, members, life).map_err(|e| certificates(&e))?;
    let server = serve(args, io, &identities[0], news)?;
    let boot = match secret {
        Some(secret) => {
            let (endpoint, registrar) = (server.endpoint(), server.registrar());
            let boot = BootServer::beside(io, endpoint, secret, authority.clone(), life, registrar);
            Some(boot.map_err(|e| refused(args, &e))?)
        }
        None => None,
    };
    wait_for_nodes(args, &server, console)?;
    let credentials = Arc::new(Credentials::store(&identities)?);
    let members = members.to_vec();
    io.spawn(credentials::keep_fresh(Arc::downgrade(&credentials), life, move || {
        let fresh = credentials::issue(&authority, &members, life);
        std::future::ready(fresh.map(|fresh| (fresh, life)).map_err(|e| e.to_string()))
    }));
    Ok((credentials, server, boot))
}

/// The fields are dropped in this order: first nobody is served, then the certificates and the thread go.
struct Founder {
    args: RunArgs,
    server: Server,
    _boot: Option<BootServer>,
    credentials: Arc<Credentials>,
    ended: Mutex<Option<Ended>>,
    status: Status,
    news: News,
    _io: IoThread,
}

/// When the last rank of this machine had ended, and whether it was said that others still run.
struct Ended {
    at: Instant,
    said: bool,
}

impl Rendezvous for Founder {
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)> {
        // The ranks of several nodes dial the address that the others use, so that theirs is one that the others reach.
        let rendezvous = match &self.args.nodes {
            Some(_) => self.args.rendezvous.to_string(),
            None => self.server.local_addr().to_string(),
        };
        worker_env(&self.args, rank, rendezvous, &self.credentials)
    }

    fn announce_exit(&self, rank: u32) {
        self.server.announce_exit(rank as usize);
    }

    fn announce_death(&self, rank: u32, ending: Ending, by_itself: bool) {
        self.server.announce_death(rank as usize, &ending.to_string(), ending.exit_code(), by_itself);
    }

    fn ranks_ended(&self) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.get_or_insert_with(|| Ended { at: Instant::now(), said: false });
    }

    fn failure_elsewhere(&self) -> Option<(String, u8)> {
        elsewhere(&self.args, self.server.failure()?)
    }

    fn is_over(&self) -> bool {
        let at_work = self.server.nodes_at_work();
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Ended { at, said }) = ended.as_mut() else { return at_work.is_empty() };
        let failed = self.server.failure().is_some();
        if at_work.is_empty() || (failed && at.elapsed() >= LINGERING) {
            return true;
        }
        if !failed && at.elapsed() >= NOT_TOGETHER && !std::mem::replace(said, true) {
            self.status.waiting_for(&format!("the ranks of {}; those here have ended", list_nodes(&at_work)));
        }
        false
    }

    fn cause(&self) -> Option<Cause> {
        self.server.cause().map(|failure| cause(&self.args, failure))
    }

    fn news(&self) -> &News {
        &self.news
    }
}

fn serve(args: &RunArgs, io: &IoHandle, identity: &Identity, news: &News) -> Result<Server, Error> {
    let bind = |address| {
        let bell = news.clone();
        let on_change = Arc::new(move || bell.ring());
        Server::bind(io, address, identity, args.layout(), args.rendezvous_timeout, on_change)
    };
    let address = resolve(args)?;
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

fn any(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, address.port())
}

/// Waits until all other nodes have come, if there are any.
fn wait_for_nodes(args: &RunArgs, server: &Server, console: &Console) -> Result<(), Error> {
    if args.nodes.is_none() {
        return Ok(());
    }
    let deadline = Instant::now() + args.rendezvous_timeout;
    let (status, endpoint) = (Status::new(console), args.rendezvous.to_string());
    let waiting =
        move |missing: &[u32]| status.waiting_for(&format!("{} to come to {endpoint}", list_nodes(missing)));
    server.wait_for_nodes(deadline, waiting).map_err(|e| Error::nodes(args, &e))
}

fn resolve(args: &RunArgs) -> Result<SocketAddr, Error> {
    let endpoint = &args.rendezvous;
    let unknown = |why: String| Error::Endpoint { endpoint: endpoint.to_string(), why };
    let mut addresses =
        (endpoint.host.as_str(), endpoint.port).to_socket_addrs().map_err(|e| unknown(e.to_string()))?;
    addresses.next().ok_or_else(|| unknown("the name has no address".to_owned()))
}

fn refused(args: &RunArgs, e: &TransportError) -> Error {
    let TransportError::Bind { reason, kind, .. } = e else { return certificates(e) };
    let why = match kind {
        io::ErrorKind::AddrInUse => "the port is in use; choose another one with --rdzv-endpoint".to_owned(),
        io::ErrorKind::AddrNotAvailable => "this machine does not have that address".to_owned(),
        io::ErrorKind::PermissionDenied => "ports below 1024 need privileges; choose another one".to_owned(),
        _ => reason.clone(),
    };
    Error::Endpoint { endpoint: args.rendezvous.to_string(), why }
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
