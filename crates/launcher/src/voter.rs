//! The launcher of a job whose number of nodes may change: one of several equals, which outlives the loss of any other,
//! also that of node 0.
//!
//! Nobody certifies anybody here. All launchers make the same authority from the job secret
//! ([`JobAuthority::of_secret`]), so that one which is started again is a member at once, whoever else is there. They
//! meet at the endpoint, where node 0 listens (`elastic::mesh`), and it is their membership that decides who is in the
//! job. There are no generations: what is lost is replaced while the rest goes on.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use paceline_runtime::digest::Digest;
use paceline_runtime::nodes::Generation;
use paceline_transport::identity::JobAuthority;
use paceline_transport::tls::Endpoint;
use paceline_transport::{IoHandle, IoThread};

use crate::cli::{NodeArgs, RunArgs};
use crate::console::Console;
use crate::credentials::{self, Credentials};
use crate::elastic::{Companions, Door, Entry};
use crate::ending::Ending;
use crate::error::Error;
use crate::founder;
use crate::job::Cause;
use crate::lease;
use crate::news::News;
use crate::rendezvous::{Next, Rendezvous, Status, Told, interface, worker_env};
use crate::secret;

/// The pause between two questions for the endpoint's address: a pod may be up before its name is.
const NAME_PAUSE: Duration = Duration::from_millis(200);

/// See [`rendezvous::open`](crate::rendezvous::open).
pub fn open(args: &RunArgs, console: &Console) -> Result<Box<dyn Rendezvous>, Error> {
    let nodes = args.nodes.as_ref().expect("a number of nodes that may change is one of several");
    let lease = lease::of_job(args)?;
    let news = News::new().map_err(|e| system("cannot make an event descriptor", &e))?;
    let io = IoThread::start().map_err(|e| system("cannot start the I/O thread", &e))?;
    let status = Status::new(console);
    let credentials = credentials(args, nodes, &io.handle(), &status)?;
    let listen = own_address(args)?;
    let bind = |address| Endpoint::bind(&io.handle(), address, credentials.launcher());
    let endpoint = match args.node() {
        0 => founder::bind(args, bind)?,
        _ => bind(SocketAddr::new(listen, 0)).map_err(|e| founder::refused(args, &e))?,
    };
    let birth = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
    let addr = SocketAddr::new(listen, endpoint.local_addr().port());
    let (most, run_id) = (nodes.count.max, args.torchrun.run_id.clone());
    let identity = lease.as_ref().map(|lease| lease.identity().to_owned());
    let me =
        Entry { node: args.node(), birth, addr, nodes: most, ranks: args.ranks, run_id, lease: identity };
    tracing::info!(address = %endpoint.local_addr(), "listening for other launchers");
    let meeting = args.rendezvous.to_string();
    let door = Door { io: io.handle(), endpoint, me, nodes: nodes.count.max, meeting };
    let companions = Companions { door, listen, status, lease };
    let generation = founder::generation(args, 0)?;
    Ok(Box::new(Voter { args: args.clone(), companions, credentials, generation, news, _io: io }))
}

/// The fields are dropped in this order: first nobody is heard, then the certificates and the thread go.
struct Voter {
    args: RunArgs,
    companions: Companions,
    credentials: Arc<Credentials>,
    generation: Generation,
    news: News,
    _io: IoThread,
}

impl Rendezvous for Voter {
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)> {
        worker_env(&self.args, rank, (self.args.rendezvous.to_string(), &self.generation), &self.credentials)
    }

    // What becomes of a rank is told by the membership.
    fn announce_exit(&self, _: u32, _: bool) {}

    fn announce_death(&self, _: u32, _: Ending, _: bool) {}

    fn ask_for_traces(&self) {}

    fn ranks_ended(&self, _: Told) {}

    fn failure_elsewhere(&self) -> Option<(String, u8)> {
        None
    }

    fn node(&self) -> u32 {
        self.args.node()
    }

    fn generation(&self) -> Generation {
        self.generation.clone()
    }

    fn next(&self, _: Told) -> Next {
        Next::End
    }

    fn cause(&self) -> Option<Cause> {
        None
    }

    fn news(&self) -> &News {
        &self.news
    }

    fn companions(&self) -> Option<Companions> {
        Some(self.companions.clone())
    }
}

/// The certificates of this machine's members: given, or made from the secret.
fn credentials(
    args: &RunArgs,
    nodes: &NodeArgs,
    io: &IoHandle,
    status: &Status,
) -> Result<Arc<Credentials>, Error> {
    let members = credentials::members(args);
    if let Some(folder) = &args.identity {
        let deadline = Instant::now() + args.rendezvous_timeout;
        let credentials = Arc::new(Credentials::awaited(folder, &members, deadline, status)?);
        credentials.follow(io);
        return Ok(credentials);
    }
    let secret = secret::of(nodes.secret.as_deref())?;
    let unusable = |e: paceline_transport::Error| system("cannot make the job's certificates", &e);
    let authority = JobAuthority::of_secret(&job_name(args), &secret).map_err(unusable)?;
    let life = args.certificate_life;
    let identities = credentials::issue(&authority, &members, life).map_err(unusable)?;
    let credentials = Arc::new(Credentials::store(&identities)?);
    io.spawn(credentials::keep_fresh(Arc::downgrade(&credentials), life, move || {
        let fresh = credentials::issue(&authority, &members, life);
        std::future::ready(fresh.map(|fresh| (fresh, life)).map_err(|e| e.to_string()))
    }));
    Ok(credentials)
}

/// The same on all nodes, and another one for each endpoint: jobs that share a secret are strangers all the same.
fn job_name(args: &RunArgs) -> String {
    format!("job-{}", Digest::of([args.rendezvous.to_string().as_bytes()]))
}

/// The address at which other nodes reach the workers of this one: what was chosen; or the endpoint's, where that is of
/// this machine; or the one from which this machine would send there.
fn own_address(args: &RunArgs) -> Result<IpAddr, Error> {
    if let Some(chosen) = interface(args)? {
        return Ok(chosen);
    }
    let endpoint = endpoint(args)?;
    check_reachable(&args.rendezvous.host, endpoint.ip())?;
    let unknown = |e: std::io::Error| {
        system("cannot tell at which address other nodes reach this one; give --interface", &e)
    };
    let is_ours =
        !endpoint.ip().is_unspecified() && UdpSocket::bind(SocketAddr::new(endpoint.ip(), 0)).is_ok();
    if is_ours {
        return Ok(endpoint.ip());
    }
    // Sends nothing (udp(7)).
    let socket = UdpSocket::bind(founder::any(SocketAddr::new(endpoint.ip(), 0))).map_err(unknown)?;
    socket.connect(endpoint).and_then(|()| socket.local_addr()).map(|own| own.ip()).map_err(unknown)
}

/// A name may be one of this machine's loopback addresses here alone: Debian gives a machine's own name 127.0.1.1.
fn check_reachable(host: &str, address: IpAddr) -> Result<(), Error> {
    if !address.is_loopback() || host == "localhost" || host.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    let reason = format!(
        "{host} is {address} on this machine, where other nodes do not reach it: name the interface whose address they \
         reach with --interface"
    );
    Err(Error::Usage(reason))
}

/// The endpoint's address, as soon as its name has one.
fn endpoint(args: &RunArgs) -> Result<SocketAddr, Error> {
    let deadline = Instant::now() + args.rendezvous_timeout;
    loop {
        let found = (args.rendezvous.host.as_str(), args.rendezvous.port).to_socket_addrs();
        let why = match found.map(|mut found| found.next()) {
            Ok(Some(address)) => return Ok(address),
            Ok(None) => "the name has no address".to_owned(),
            Err(e) => e.to_string(),
        };
        if Instant::now() + NAME_PAUSE >= deadline {
            return Err(Error::Nodes { endpoint: args.rendezvous.to_string(), why });
        }
        thread::sleep(NAME_PAUSE);
    }
}

fn system(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::System { what: what.to_owned(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_a_loopback_address_here_is_no_address_for_others() {
        let check = |host, address: &str| check_reachable(host, address.parse().expect("an address"));
        assert!(check("node-0", "127.0.1.1").is_err_and(|e| e.to_string().contains("--interface")));
        assert!(check("node-0", "10.0.0.1").is_ok());
        assert!(check("localhost", "127.0.0.1").is_ok() && check("127.0.0.1", "127.0.0.1").is_ok());
    }
}
