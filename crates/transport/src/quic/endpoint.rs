//! Dialling and accepting members of the job, and turning everybody else away.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use super::close::{self, CloseCode, in_words};
use super::connection::{Connection, Lane, gone, remote_address};
use super::driver::{self, Incoming};
use super::knock::Knock;
use super::settings::Settings;
use super::socket::Socket;
use super::tls;
use crate::Error;
use crate::control_lane::LinkConnection;
use crate::identity::{Identity, MemberName};
use crate::io::{IoHandle, Task};
use crate::mesh::{self, CONTROL_LIMIT, DataOf, LinkEndpoint};
use crate::newcomers::Newcomers;
use crate::warnings::Warnings;

/// The version of everything that is said after the TLS handshake. Raised when messages change; the
/// refusal then names both versions.
pub(crate) const PROTOCOL_VERSION: u16 = 1;

/// How long a handshake may take, hello and welcome included: ten times a slow one across continents.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// Handshakes in progress at one time. Further ones are not answered; the client tries again by itself.
const HANDSHAKES_LIMIT: usize = 256;

/// From this many handshakes on, clients must first prove that their address is theirs (RFC 9000, 8.1.2).
const RETRY_FROM: usize = 64;

/// Accepted connections that may wait for [`Endpoint::accept`].
const ACCEPTED_LIMIT: usize = 1024;

/// The priority of control lanes; data has 0.
const CONTROL_PRIORITY: i32 = 1;

/// The longest hello, in bytes: a job name and a number.
const HELLO_LIMIT: usize = 256;

/// A UDP socket on which a member of a job dials other members and accepts them.
///
/// From [`bind`](Endpoint::bind) on it completes handshakes by itself and keeps the connections until
/// somebody calls [`accept`](Endpoint::accept). That should be one consumer at a time: in a worker the
/// accept loop of its [`QuicTransport`](super::QuicTransport), in a launcher the rendezvous.
///
/// Cheap to clone. When the last clone is dropped no connection is accepted any more; existing ones live on.
#[derive(Clone, Debug)]
pub struct Endpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    io: IoHandle,
    driver: driver::Endpoint,
    client: quinn_proto::ClientConfig,
    identity: Identity,
    socket: Arc<Socket>,
    local_addr: SocketAddr,
    /// What other endpoints want to hear, by their addresses.
    knocks: StdMutex<HashMap<SocketAddr, Knock>>,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    _acceptor: Task<()>,
    _reporter: Task<()>,
    /// Dropped with the last clone, which tells the task that watches over the end.
    _alive: mpsc::Sender<()>,
}

/// The first message on every connection, from the side that dialled.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    protocol_version: u16,
    job: String,
}

/// The answer to [`Hello`]. Without it the dialling side has no connection: QUIC reports success to a
/// client before the server has looked at its certificate.
#[derive(Debug, Serialize, Deserialize)]
struct Welcome {
    protocol_version: u16,
}

/// What the handshakes of an endpoint share.
struct Reception {
    job: String,
    accepted: mpsc::Sender<Connection>,
    warnings: Warnings,
}

impl Endpoint {
    /// Opens a UDP socket at `addr` (port 0: any free one) for the member `identity`.
    ///
    /// # Errors
    /// [`Error::Bind`] with the operating system's reason, [`Error::Identity`] when TLS cannot use the identity.
    pub fn bind(io: &IoHandle, addr: SocketAddr, identity: &Identity) -> Result<Self, Error> {
        Self::bind_with(io, addr, identity, &Settings::for_address(addr.ip()))
    }

    /// [`bind`](Endpoint::bind) for another network than the usual one.
    ///
    /// # Errors
    /// As [`bind`](Endpoint::bind), and [`Error::Usage`] for settings that QUIC cannot have.
    pub fn bind_with(
        io: &IoHandle,
        addr: SocketAddr,
        identity: &Identity,
        settings: &Settings,
    ) -> Result<Self, Error> {
        settings.check()?;
        let client = tls::client_config(identity, settings)?;
        let server = tls::server_config(identity, settings)?;
        let cannot_bind =
            |error: std::io::Error| Error::Bind { addr, reason: error.to_string(), kind: error.kind() };
        let socket = Arc::new(Socket::open(addr).map_err(cannot_bind)?);
        if let Some(knock) = settings.knock
            && let Err(error) = socket.guard(knock)
        {
            // A sandbox without filters. Strangers cost more then, and get no further.
            tracing::info!(%addr, %error, "datagrams of strangers are not dropped by the kernel");
        }
        let driver = driver::Endpoint::open(io, socket.clone(), tls::endpoint_config(settings), server);
        let driver = driver.map_err(cannot_bind)?;
        let (sender, accepted) = mpsc::channel(ACCEPTED_LIMIT);
        let (alive, released) = mpsc::channel(1);
        io.spawn(close_in_the_end(io.clone(), driver.clone(), released));
        let reporter = socket.clone();
        let shared = Shared {
            local_addr: socket.local_addr(),
            knocks: StdMutex::default(),
            accepted: Mutex::new(accepted),
            _acceptor: io.task(accept_all(driver.clone(), identity.job().to_owned(), sender)),
            _reporter: io.task(async move { reporter.report_refused().await }),
            _alive: alive,
            identity: identity.clone(),
            io: io.clone(),
            driver,
            client,
            socket,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The address of the socket, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.local_addr
    }

    /// Who this endpoint is.
    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// Has dialling `addr` begin with `knock`, with which the endpoint there was bound. To be called before that.
    pub fn knock_at(&self, addr: SocketAddr, knock: Knock) {
        self.knocks().insert(addr, knock);
    }

    fn knocks(&self) -> MutexGuard<'_, HashMap<SocketAddr, Knock>> {
        // Entries are put in whole.
        self.shared.knocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dials `addr` once and returns the connection when `member` of this job has answered there and
    /// has welcomed us. Can be awaited on any executor; gives up after 5 s.
    ///
    /// # Errors
    /// [`Error::Refused`] when the other side is not that member or does not take us,
    /// [`Error::TimedOut`] when nobody answers, [`Error::Usage`] when the I/O thread has stopped.
    pub async fn connect(&self, addr: SocketAddr, member: &str) -> Result<Connection, Error> {
        LinkEndpoint::connect_within(self, addr, member, HANDSHAKE_LIMIT).await
    }

    /// Waits for the next member to dial us. Clients that are refused are logged and skipped.
    /// Can be awaited on any executor; cancelling it loses nothing.
    ///
    /// # Errors
    /// [`Error::Usage`] when the I/O thread has stopped.
    pub async fn accept(&self) -> Result<Connection, Error> {
        let closed = || Error::Usage { reason: "the endpoint is closed".to_owned() };
        self.shared.accepted.lock().await.recv().await.ok_or_else(closed)
    }

    pub(super) fn driver(&self) -> &driver::Endpoint {
        &self.shared.driver
    }

    async fn dial(&self, addr: SocketAddr, member: &str) -> Result<Connection, Error> {
        let Shared { driver, client, identity, socket, .. } = &*self.shared;
        socket.expect_from(addr);
        let name = identity.server_name(member);
        let mut client = client.clone();
        if let Some(&knock) = self.knocks().get(&addr) {
            client.initial_dst_cid_provider(Arc::new(move || knock.first_id()));
        }
        let connecting = driver
            .connect(client, addr, &name)
            .map_err(|error| gone(addr, &format!("cannot dial: {error}")))?;
        let connection = connecting.connected().await.map_err(|error| gone(addr, &in_words(&error)))?;
        let connection = Connection::new(connection, member.to_owned());
        let (mut sender, mut receiver) = connection.open(Lane::Hello, HELLO_LIMIT).await?;
        let hello = Hello { protocol_version: PROTOCOL_VERSION, job: identity.job().to_owned() };
        sender.send(&hello).await?;
        match receiver.recv::<Welcome>().await? {
            Some(_) => Ok(connection),
            None => Err(gone(addr, "it ended the conversation without a welcome")),
        }
    }
}

impl LinkEndpoint for Endpoint {
    type Connection = Connection;

    fn io(&self) -> &IoHandle {
        &self.shared.io
    }

    async fn accept(&self) -> Result<Connection, Error> {
        self.accept().await
    }

    async fn connect_within(
        &self,
        addr: SocketAddr,
        member: &str,
        limit: Duration,
    ) -> Result<Connection, Error> {
        let (this, member) = (self.clone(), member.to_owned());
        let dial = async move {
            timeout(limit, this.dial(addr, &member)).await.unwrap_or_else(|_| {
                let what = format!("an answer from {member} at {addr}");
                Err(Error::TimedOut { what, ranks: Vec::new(), elapsed: limit })
            })
        };
        self.shared.io.run(dial).await?
    }

    async fn open_control(connection: &Connection) -> Result<mesh::Lane<Self>, Error> {
        let (sender, receiver) = connection.open(Lane::Messages, CONTROL_LIMIT).await?;
        sender.set_priority(CONTROL_PRIORITY);
        Ok((sender, receiver))
    }

    async fn accept_control(connection: &Connection) -> Result<mesh::Lane<Self>, Error> {
        let (sender, receiver) = connection.accept(Lane::Messages, CONTROL_LIMIT).await?;
        sender.set_priority(CONTROL_PRIORITY);
        Ok((sender, receiver))
    }

    async fn open_data(
        &self,
        connection: &Connection,
        _addr: SocketAddr,
        _control: &mut mesh::Lane<Self>,
    ) -> Result<DataOf<Self>, Error> {
        connection.open_stream(Lane::Data).await
    }

    async fn accept_data(
        &self,
        connection: &Connection,
        _control: &mut mesh::Lane<Self>,
    ) -> Result<DataOf<Self>, Error> {
        connection.accept_stream(Lane::Data).await
    }
}

/// Closes what is open when the I/O thread stops. Ends before that when the endpoint has been dropped
/// and its last connection is closed.
async fn close_in_the_end(io: IoHandle, endpoint: driver::Endpoint, mut released: mpsc::Receiver<()>) {
    let idle = async {
        // Nothing is ever sent: `None` says that the endpoint is gone.
        let _ = released.recv().await;
        endpoint.wait_idle().await;
    };
    tokio::select! {
        () = io.closing() => endpoint.close(CloseCode::Aborted.into(), b"its process ended"),
        () = idle => {}
    }
}

/// Completes handshakes side by side, so that a stalled one holds up nobody.
async fn accept_all(endpoint: driver::Endpoint, job: String, accepted: mpsc::Sender<Connection>) {
    let reception = Arc::new(Reception { job, accepted, warnings: Warnings::new() });
    let mut handshakes = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    let mut newcomers = Newcomers::new(Instant::now());
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            Some(_) = handshakes.join_next() => continue,
        };
        let Some(incoming) = incoming else { return };
        if incoming.may_retry() {
            // It may be anybody who says that this is its address.
            if handshakes.len() >= RETRY_FROM {
                incoming.retry();
                continue;
            }
        } else {
            let remote = incoming.remote_address();
            let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
            if !newcomers.admit(remote.ip(), Instant::now()) {
                reception.warnings.warn(remote, "its address has asked for too many handshakes");
                incoming.ignore();
                continue;
            }
        }
        by_age.retain(|handshake| !handshake.is_finished());
        if by_age.len() >= HANDSHAKES_LIMIT
            && let Some(oldest) = by_age.pop_front()
        {
            oldest.abort();
        }
        by_age.push_back(handshakes.spawn(let_in(incoming, reception.clone())));
    }
}

/// Completes one handshake and hands the connection on, or says why not.
async fn let_in(incoming: Incoming, reception: Arc<Reception>) {
    let addr = incoming.remote_address();
    let remote = SocketAddr::new(addr.ip().to_canonical(), addr.port());
    let outcome = timeout(HANDSHAKE_LIMIT, welcome(incoming, &reception.job)).await;
    let reason = match outcome {
        Ok(Ok(connection)) => match reception.accepted.try_send(connection) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Closed(_)) => return,
            Err(mpsc::error::TrySendError::Full(connection)) => {
                let reason = "too many connections wait to be accepted".to_owned();
                connection.close_with(CloseCode::Refused, &reason);
                reason
            }
        },
        Ok(Err(reason)) => reason,
        Err(_) => format!("its handshake was not finished within {} s", HANDSHAKE_LIMIT.as_secs()),
    };
    reception.warnings.warn(remote, &reason);
}

async fn welcome(incoming: Incoming, job: &str) -> Result<Connection, String> {
    let connecting = incoming.accept().map_err(|error| in_words(&error))?;
    let driver = connecting.connected().await.map_err(|error| in_words(&error))?;
    let remote = remote_address(&driver);
    let greeted = greet(&driver, job).await;
    greeted.map_err(|error| {
        // In the error of a connection only the reason is news here; the address is logged beside it.
        let reason = match error {
            Error::Refused { reason, .. } => reason,
            error => error.to_string(),
        };
        tracing::debug!(%remote, reason, "closing after the TLS handshake");
        close::close(&driver, CloseCode::Refused, &reason);
        reason
    })
}

/// Reads who the client is, answers its hello, and refuses what does not fit.
async fn greet(driver: &driver::Connection, job: &str) -> Result<Connection, Error> {
    let remote = remote_address(driver);
    let refused = |reason: String| gone(remote, &reason);
    let name = certified_name(driver).map_err(refused)?;
    if name.job != job {
        return Err(refused(format!("its certificate is of the job {:?}", name.job)));
    }
    let connection = Connection::new(driver.clone(), name.member);
    let (mut sender, mut receiver) = connection.accept(Lane::Hello, HELLO_LIMIT).await?;
    let hello = receiver.recv::<Hello>().await?;
    let Hello { protocol_version, job: theirs } =
        hello.ok_or_else(|| refused("it ended the conversation without a hello".to_owned()))?;
    if protocol_version != PROTOCOL_VERSION {
        return Err(refused(format!(
            "it speaks version {protocol_version} of the protocol and we speak {PROTOCOL_VERSION}"
        )));
    }
    if theirs != job {
        return Err(refused(format!("it is looking for the job {theirs:?} and this is {job:?}")));
    }
    sender.send(&Welcome { protocol_version: PROTOCOL_VERSION }).await?;
    Ok(connection)
}

fn certified_name(connection: &driver::Connection) -> Result<MemberName, String> {
    let identity = connection.peer_identity().ok_or("the client has no certificate")?;
    let chain = identity
        .downcast::<Vec<CertificateDer<'static>>>()
        .map_err(|_| "the client's certificate is of an unknown kind")?;
    MemberName::of(chain.first().ok_or("the client has no certificate")?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire;

    proptest! {
        #[test]
        fn any_bytes_are_a_message_of_the_handshake_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = wire::decode::<Welcome>(&bytes);
            if let Ok(Hello { job, .. }) = wire::decode::<Hello>(&bytes) {
                prop_assert!(job.len() < bytes.len());
            }
        }
    }
}
