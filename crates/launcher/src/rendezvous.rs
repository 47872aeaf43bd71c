//! Where the ranks of the job meet, as far as the launcher is concerned.
//!
//! The supervisor needs little of it, which is all the trait has; so it is tested with shell programs. The real one
//! makes the job's certificate authority, hands each rank its certificate in a file that only this user can read, and
//! serves the rendezvous of `paceline_runtime`.

use std::ffi::OsString;
use std::fs::{OpenOptions, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use paceline_runtime::env::{self, JobEnv};
use paceline_runtime::rendezvous::{LAUNCHER, Server, worker};
use paceline_transport::identity::{Identity, JobAuthority};
use paceline_transport::{Error as TransportError, IoThread};
use tempfile::TempDir;

use crate::cli::RunArgs;
use crate::error::Error;

/// How long the certificates of a job are good. Connections outlive them; only a new one needs a fresh certificate.
const VALIDITY: Duration = Duration::from_secs(72 * 3600);

/// The rendezvous of one job. None of the calls blocks.
pub trait Rendezvous {
    /// What the rank must find in its environment to take part.
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)>;

    /// The rank has exited with code 0: who waits for it waits in vain, but nothing is wrong.
    fn announce_exit(&self, rank: u32);

    /// The rank is dead; `cause` completes a sentence that starts with the rank: `exited with code 3`. It is called
    /// for the first death only, which is the cause of what follows.
    fn announce_death(&self, rank: u32, cause: &str);

    /// The rank to which `rank` put down its own failure, if it said so before it ended.
    fn blamed_by(&self, rank: u32) -> Option<u32>;
}

/// Opens the rendezvous of the job at the endpoint of `args`; it lasts until the value is dropped.
///
/// # Errors
/// [`Error::Endpoint`] if nothing can listen there, [`Error::System`] if the certificates cannot be stored.
pub fn open(args: &RunArgs) -> Result<Box<dyn Rendezvous>, Error> {
    let authority =
        JobAuthority::new(&format!("job-{:016x}", RandomState::new().hash_one(std::process::id())));
    let authority = authority.map_err(|e| certificates(&e))?;
    let issue = |member: &str| authority.issue(member, VALIDITY).map_err(|e| certificates(&e));
    let io = IoThread::start().map_err(|e| system("cannot start the I/O thread", &e))?;
    let address = resolve(args)?;
    let identity = issue(LAUNCHER)?;
    let ranks = args.ranks as usize;
    let server = Server::bind(&io.handle(), address, &identity, ranks, args.rendezvous_timeout);
    let server = server.map_err(|e| refused(args, &e))?;

    let stored = |e: &io::Error| system("cannot store the ranks' certificates", e);
    let private = Permissions::from_mode(0o700);
    let folder = tempfile::Builder::new().prefix("paceline-").permissions(private).tempdir();
    let folder = folder.map_err(|e| stored(&e))?;
    for rank in 0..args.ranks {
        let identity = issue(&worker(rank as usize))?;
        store(&identity_path(&folder, rank), &identity).map_err(|e| stored(&e))?;
    }
    tracing::info!(address = %server.local_addr(), "rendezvous open");
    Ok(Box::new(JobRendezvous { args: args.clone(), server, folder, _io: io }))
}

/// The fields are dropped in this order: first nobody is served, then the certificates and the thread go.
struct JobRendezvous {
    args: RunArgs,
    server: Server,
    folder: TempDir,
    _io: IoThread,
}

impl Rendezvous for JobRendezvous {
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)> {
        let job_env = JobEnv {
            rank: rank as usize,
            world_size: self.args.ranks as usize,
            local_rank: rank as usize,
            local_world_size: self.args.ranks as usize,
            rendezvous: self.server.local_addr().to_string(),
            rendezvous_timeout: self.args.rendezvous_timeout,
            identity: identity_path(&self.folder, rank),
        };
        let timeout = self.args.timeout.map(env::timeout_var);
        let fabric = self.args.fabric.map(env::fabric_var);
        job_env
            .to_vars()
            .into_iter()
            .chain(timeout)
            .chain(fabric)
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect()
    }

    fn announce_exit(&self, rank: u32) {
        self.server.announce_exit(rank as usize);
    }

    fn announce_death(&self, rank: u32, cause: &str) {
        self.server.announce_death(rank as usize, cause);
    }

    fn blamed_by(&self, rank: u32) -> Option<u32> {
        self.server.blamed_by(rank as usize).and_then(|rank| u32::try_from(rank).ok())
    }
}

fn identity_path(folder: &TempDir, rank: u32) -> PathBuf {
    folder.path().join(format!("{}.pem", worker(rank as usize)))
}

fn store(path: &Path, identity: &Identity) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(identity.to_pem().as_bytes())
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
