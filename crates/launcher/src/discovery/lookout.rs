//! Finds out why pods are missing, while launcher 0 waits for them.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use paceline_transport::IoHandle;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::resolver::Resolver;
use super::search::{Search, Seen};
use crate::rendezvous::Status;

/// How long a pod's machine may take to answer a SYN.
const CONNECT: Duration = Duration::from_secs(2);

/// How often there may be something to say even if no look has ended.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// A pod that is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What it is called in lines.
    pub name: String,
    /// Where its launcher would be dialled, if it has a name that resolves.
    pub host: Option<String>,
}

/// Looks for pods until it is dropped.
#[derive(Debug)]
pub struct Lookout(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    search: Mutex<Search>,
    wanted: Vec<Wanted>,
    port: u16,
    resolver: Resolver,
    changed: Notify,
}

impl Lookout {
    /// Begins to look for the pods on the I/O thread, at this port of each; all of them are missing.
    pub fn begin(io: &IoHandle, wanted: Vec<Wanted>, port: u16, status: Status) -> Self {
        let names = wanted.iter().map(|pod| pod.name.clone());
        let search = Mutex::new(Search::new(Instant::now(), names));
        let (resolver, changed) = (Resolver::default(), Notify::new());
        let shared = Arc::new(Shared { search, wanted, port, resolver, changed });
        io.spawn(watch(Arc::downgrade(&shared), io.clone(), status));
        Self(shared)
    }

    /// Only these are missing now.
    pub fn missing(&self, missing: &[u32]) {
        let missing: Vec<usize> = missing.iter().map(|&number| number as usize).collect();
        self.0.lock().missing(Instant::now(), &missing);
        self.0.changed.notify_one();
    }

    /// Who is missing and why, if somebody is.
    pub fn status(&self) -> Option<String> {
        self.0.lock().status()
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.0.changed.notify_one();
    }
}

impl Shared {
    /// Poisoned only by a panic between two complete states.
    fn lock(&self) -> MutexGuard<'_, Search> {
        self.search.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look(&self, number: usize) {
        let seen = match &self.wanted[number].host {
            Some(host) => look(&self.resolver, host, self.port).await,
            None => Seen::Nameless,
        };
        self.lock().saw(Instant::now(), number, seen, fastrand::f64());
        self.changed.notify_one();
    }
}

/// Has all looks done that are due and says what is to be said, until the lookout is gone.
async fn watch(shared: std::sync::Weak<Shared>, io: IoHandle, status: Status) {
    while let Some(shared) = shared.upgrade() {
        let now = Instant::now();
        let (due, line, next) = {
            let mut search = shared.lock();
            (search.due(now), search.line(now), search.next())
        };
        if let Some(line) = line {
            status.say_waiting_for(&line);
        }
        for number in due {
            let shared = shared.clone();
            io.spawn(async move { shared.look(number).await });
        }
        let latest = now + LINE_INTERVAL;
        let until = next.map_or(latest, |next| next.min(latest));
        // A permit is stored when something changes meanwhile.
        let _ = tokio::time::timeout_at(until.into(), shared.changed.notified()).await;
    }
}

/// Looks once.
async fn look(resolver: &Resolver, host: &str, port: u16) -> Seen {
    let addresses = match resolver.addresses(host).await {
        Ok(addresses) => addresses,
        Err(why) => return why.into(),
    };
    let mut seen = Seen::NoName;
    for ip in addresses {
        seen = connect(SocketAddr::new(ip, port)).await;
        if seen == Seen::Listens {
            break;
        }
    }
    seen
}

async fn connect(address: SocketAddr) -> Seen {
    match tokio::time::timeout(CONNECT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Seen::Listens,
        Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => Seen::Refused,
        Ok(Err(e)) => Seen::Unreachable(format!("{}: {e}", address.ip())),
        Err(_) => Seen::Unreachable(format!("{} does not answer", address.ip())),
    }
}
