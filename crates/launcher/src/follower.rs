//! The launcher of a node other than 0: gets its certificates from launcher 0 and stays connected to it.

use std::ffi::OsString;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use paceline_runtime::nodes::Attendance;
use paceline_transport::boot::{self, Certified, Claim, Failure};
use paceline_transport::identity::Identity;
use paceline_transport::secret::JobSecret;
use paceline_transport::tls::Dialler;
use paceline_transport::{IoHandle, IoThread};

use crate::cli::{NodeArgs, RunArgs};
use crate::console::Console;
use crate::credentials::{self, Credentials};
use crate::ending::Ending;
use crate::error::Error;
use crate::job::Cause;
use crate::news::News;
use crate::rendezvous::{Rendezvous, Status, cause, elsewhere, list_nodes, worker_env};
use crate::secret;

/// Pauses between attempts to reach launcher 0, which may not be up yet.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// How long a place that is taken may take to become free: a launcher that was killed is missed after 5 s.
const TAKEN: Duration = Duration::from_secs(15);

/// When the first failed attempt is worth a line.
const STATUS_AFTER: Duration = Duration::from_secs(1);

/// How long the verdict may take. Launcher 0 waits for a second itself.
const VERDICT: Duration = Duration::from_secs(3);

/// See [`rendezvous::open`](crate::rendezvous::open).
pub fn open(args: &RunArgs, console: &Console) -> Result<Box<dyn Rendezvous>, Error> {
    let nodes = args.nodes.as_ref().expect("node 0 is the only one of a job on one machine");
    let deadline = Instant::now() + args.rendezvous_timeout;
    let news = News::new().map_err(|e| system("cannot make an event descriptor", &e))?;
    let io = IoThread::start().map_err(|e| system("cannot start the I/O thread", &e))?;
    let claim = claim(nodes, args.ranks).map_err(|e| system("cannot draw a random number", &e))?;
    let (members, status) = (credentials::members(args), Status::new(console));
    let attend =
        |identity: &Identity| attend(args, &io.handle(), identity, claim.clone(), deadline, (&status, &news));
    let (credentials, attendance) = match (&args.identity, &nodes.secret) {
        (Some(folder), _) => {
            let credentials = Arc::new(Credentials::given(folder, &members)?);
            credentials.follow(&io.handle());
            status.waiting_for(&format!("node 0 at {}", args.rendezvous));
            let attendance = attend(credentials.launcher())?;
            (credentials, attendance)
        }
        (None, Some(secret)) => {
            let secret = Arc::new(secret::read(secret)?);
            let office = Office { server: args.rendezvous.to_string(), secret, claim: claim.clone() };
            let Certified { identities, valid_for } = office.fetch_on(&io, &members, deadline, &status)?;
            let attendance = attend(&identities[0])?;
            let credentials = Arc::new(Credentials::store(&identities)?);
            let renewed = credentials::keep_fresh(Arc::downgrade(&credentials), valid_for, move || {
                let (office, members) = (office.clone(), members.clone());
                async move {
                    let fetched = office.fetch(&members).await.map_err(|failure| failure.to_string())?;
                    Ok((fetched.identities, fetched.valid_for))
                }
            });
            io.handle().spawn(renewed);
            (credentials, attendance)
        }
        (None, None) => unreachable!("the command line gives one of the two"),
    };
    tracing::info!(node = args.node(), "all nodes have come");
    let ended = Mutex::new(None);
    Ok(Box::new(Follower { args: args.clone(), attendance, credentials, ended, news, _io: io }))
}

/// The fields are dropped in this order: first the connection goes, then the certificates and the thread.
struct Follower {
    args: RunArgs,
    attendance: Attendance,
    credentials: Arc<Credentials>,
    /// When the last rank of this machine had ended.
    ended: Mutex<Option<Instant>>,
    news: News,
    _io: IoThread,
}

impl Rendezvous for Follower {
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)> {
        worker_env(&self.args, rank, self.args.rendezvous.to_string(), &self.credentials)
    }

    fn announce_exit(&self, rank: u32) {
        self.attendance.announce_exit((self.args.first_rank() + rank) as usize);
    }

    fn announce_death(&self, rank: u32, ending: Ending, by_itself: bool) {
        let rank = (self.args.first_rank() + rank) as usize;
        self.attendance.announce_death(rank, &ending.to_string(), ending.exit_code(), by_itself);
    }

    fn ranks_ended(&self) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.is_none() {
            *ended = Some(Instant::now());
            self.attendance.announce_end();
        }
    }

    fn failure_elsewhere(&self) -> Option<(String, u8)> {
        elsewhere(&self.args, self.attendance.failure()?)
    }

    fn is_over(&self) -> bool {
        let ended = *self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        self.attendance.verdict().is_some() || ended.is_some_and(|at| at.elapsed() >= VERDICT)
    }

    fn cause(&self) -> Option<Cause> {
        let failure = self.attendance.verdict().unwrap_or_else(|| self.attendance.failure());
        failure.map(|failure| cause(&self.args, failure))
    }

    fn news(&self) -> &News {
        &self.news
    }
}

/// Where certificates come from.
#[derive(Clone)]
struct Office {
    server: String,
    secret: Arc<JobSecret>,
    claim: Claim,
}

impl Office {
    async fn fetch(&self, members: &[String]) -> Result<Certified, Failure> {
        boot::certify(&self.server, &self.secret, &self.claim, members).await
    }

    /// Blocks until there are certificates, or an error says why not.
    fn fetch_on(
        &self,
        io: &IoThread,
        members: &[String],
        deadline: Instant,
        status: &Status,
    ) -> Result<Certified, Error> {
        let fetching = self.clone().fetch_until(members.to_vec(), deadline, status.clone());
        let fetched = io.handle().block_on(fetching).map_err(|e| system("cannot use the I/O thread", &e))?;
        fetched.map_err(|why| Error::Nodes { endpoint: self.server.clone(), why })
    }

    /// Tries until it has certificates, is refused, or the deadline has come. The error is the reason.
    async fn fetch_until(
        self,
        members: Vec<String>,
        deadline: Instant,
        status: Status,
    ) -> Result<Certified, String> {
        let (start, mut pause) = (Instant::now(), PAUSES.0);
        let mut taken: Option<Instant> = None;
        loop {
            let failure = match self.fetch(&members).await {
                Ok(certified) => return Ok(certified),
                Err(failure) => failure,
            };
            match &failure {
                Failure::Refused(reason) => return Err(reason.clone()),
                Failure::NotNow(reason) => {
                    if taken.get_or_insert_with(Instant::now).elapsed() >= TAKEN {
                        return Err(reason.clone());
                    }
                }
                Failure::Unreachable(_) => taken = None,
            }
            if start.elapsed() >= STATUS_AFTER {
                status.waiting_for(&format!("node 0 at {} ({failure})", self.server));
            }
            if Instant::now() + pause >= deadline {
                let waited = start.elapsed().as_secs();
                return Err(format!("timed out after {waited} s waiting for node 0: {failure}"));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}

fn claim(nodes: &NodeArgs, ranks_per_node: u32) -> rustix::io::Result<Claim> {
    let mut random = [0; 16];
    let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    // Up to 256 bytes come whole, or not at all (getrandom(2)).
    debug_assert_eq!(got, random.len());
    let incarnation = u128::from_le_bytes(random);
    Ok(Claim { node: nodes.rank, nodes: nodes.count, ranks_per_node, incarnation })
}

fn attend(
    args: &RunArgs,
    io: &IoHandle,
    identity: &Identity,
    claim: Claim,
    deadline: Instant,
    (status, news): (&Status, &News),
) -> Result<Attendance, Error> {
    let server = args.rendezvous.to_string();
    let dialler = Dialler::new(io, identity).map_err(|e| system("cannot use this node's certificate", &e))?;
    let (status, bell, node) = (status.clone(), news.clone(), args.node());
    let waiting = move |missing: &[u32]| {
        // Launcher 0 may not have counted this one when it wrote the list.
        let others: Vec<u32> = missing.iter().copied().filter(|&missing| missing != node).collect();
        if !others.is_empty() {
            status.waiting_for(&list_nodes(&others));
        }
    };
    let on_change = Arc::new(move || bell.ring());
    let attendance = Attendance::begin(io, dialler, &server, claim, deadline, waiting, on_change);
    attendance.map_err(|e| Error::nodes(args, &e))
}

fn system(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::System { what: what.to_owned(), why: why.to_string() }
}
