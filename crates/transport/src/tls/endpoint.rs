//! Dialling and accepting members of the job, and turning everybody else away.
//!
//! Whoever connects is nobody before its certificate has been verified and its hello answered. Handshakes
//! are limited in number and time; when there are too many, the oldest gives way: a member's takes a few
//! milliseconds, and those of somebody who never finishes them are the old ones.

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener as StdTcpListener};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::barred::{self, Barred};
use super::channel::Protection;
use super::connection::{Connection, Stream, gone};
use super::data::DataStream;
use super::first_message;
use super::mend::{ANSWER_LIMIT, Answer, Failure, Lines, Mender, Resumption};
use super::session::{Fault, Session, Socket};
use crate::close::CloseCode;
use crate::control_lane::{LinkConnection, MessageIn, MessageOut};
use crate::identity::{Identity, MemberName};
use crate::io::{IoHandle, Task};
use crate::mesh::{CONTROL_LIMIT, DataOf, Lane, LinkEndpoint};
use crate::newcomers::Newcomers;
use crate::warnings::Warnings;
use crate::{Error, credentials, random};

/// The protocol's name in the TLS handshake. Not that of QUIC, so that neither can be taken for the other. The
/// number is raised when releases cannot talk any more.
const ALPN: &[u8] = b"paceline-tcp/1";

/// The same for links whose data leaves TLS, so that neither side can be had to without wanting it.
const PLAIN_ALPN: &[u8] = b"paceline-plain-tcp/1";

/// The version of everything that is said after the TLS handshake. Raised when messages change; the
/// refusal then names both versions.
const PROTOCOL_VERSION: u16 = 1;

/// How long a silent peer counts as alive. A dead process is announced by its launcher long before.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// How often a sign of life is sent: several within the limit.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// How many signs of life may go unanswered before the operating system gives a connection up.
const KEEP_ALIVE_TRIES: u32 = 4;

/// How long a handshake may take, hello and welcome included: ten times a slow one across continents.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// Handshakes in progress at one time.
const HANDSHAKES_LIMIT: usize = 256;

/// Connections that may wait for the accept loop in the operating system. It has a limit of its own as well.
const BACKLOG: i32 = 1024;

/// Accepted connections that may wait for [`Endpoint::accept`].
const ACCEPTED_LIMIT: usize = 1024;

/// The pause after the operating system has refused us a connection, for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long somebody who was refused may take to read why before the connection is gone.
const REFUSAL_GRACE: Duration = Duration::from_millis(500);

/// Bytes of somebody who was refused that are read and dropped meanwhile.
const REFUSAL_BYTES: usize = 64 * 1024;

/// The longest hello, in bytes: a job name, some numbers and a ticket.
const HELLO_LIMIT: usize = 256;

/// Dials members of a job over TCP as a member of it, without being dialled. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Dialler {
    io: IoHandle,
    client: Arc<ClientConfig>,
    identity: Identity,
    /// The address it dials from, where that is not for the system to choose.
    from: Option<IpAddr>,
    /// That of the data of its links.
    protection: Protection,
}

/// A TCP port on which a member of a job is dialled by other members, and with which it dials them.
///
/// From [`bind`](Endpoint::bind) on it completes handshakes by itself and keeps the connections until
/// somebody calls [`accept`](Endpoint::accept). That should be one consumer at a time: in a worker the
/// accept loop of its [`TlsTransport`](super::TlsTransport), in a launcher the rendezvous.
///
/// Cheap to clone. When the last clone is dropped no connection is accepted any more; existing ones live on.
#[derive(Clone, Debug)]
pub struct Endpoint {
    dialler: Dialler,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    local_addr: SocketAddr,
    accepted: tokio::sync::Mutex<mpsc::Receiver<Connection>>,
    expected: Arc<Expected>,
    lines: Arc<Lines>,
    diversion: Arc<OnceLock<Diversion>>,
    _acceptor: Task<()>,
}

/// Links whose data connection has been asked for.
#[derive(Debug, Default)]
struct Expected(Mutex<HashMap<Ticket, Expectation>>);

/// Who may bring a ticket, and where its connection goes.
#[derive(Debug)]
struct Expectation {
    member: String,
    arrived: oneshot::Sender<DataStream>,
}

/// What ties a data connection to the control connection over which the ticket was given. Random, and good
/// once.
type Ticket = [u8; 16];

/// A ticket that has been given out, until it is dropped.
struct GivenOut<'a>(&'a Expected, Ticket);

/// The first message on every connection, from the side that dialled.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    protocol_version: u16,
    job: String,
    wish: Wish,
}

/// What a connection is for.
#[derive(Debug, Serialize, Deserialize)]
enum Wish {
    /// A lane of messages.
    Messages,
    /// The data connection of a link.
    Data(Ticket),
    /// Going on with a session that has lost its socket.
    Resumption(Resumption),
}

/// The answer to [`Hello`]. Without it the dialling side has no connection: in TLS 1.3 a client is done before
/// the server has looked at its certificate.
#[derive(Debug, Serialize, Deserialize)]
struct Welcome {
    protocol_version: u16,
}

/// Has the other side of a link open the data connection, which brings the ticket.
#[derive(Debug, Serialize, Deserialize)]
struct BringData {
    ticket: Ticket,
}

/// The one who was let in with a ticket has left TLS behind: from now on the other side may send data without it.
#[derive(Debug, Serialize, Deserialize)]
struct LeftTls;

/// Another service on the port: the protocol by which it is told apart, and where its clients go.
type Diversion = (&'static [u8], mpsc::Sender<(TcpStream, SocketAddr)>);

/// What the handshakes of an endpoint share.
struct Reception {
    diversion: Arc<OnceLock<Diversion>>,
    server: Arc<ServerConfig>,
    job: String,
    accepted: mpsc::Sender<Connection>,
    expected: Arc<Expected>,
    lines: Arc<Lines>,
    protection: Protection,
    warnings: Warnings,
}

impl Dialler {
    /// Dials as `identity`.
    ///
    /// # Errors
    /// [`Error::Identity`] when TLS cannot use the identity.
    pub fn new(io: &IoHandle, identity: &Identity) -> Result<Self, Error> {
        Self::with_protection(io, identity, Protection::Encrypted)
    }

    fn with_protection(io: &IoHandle, identity: &Identity, protection: Protection) -> Result<Self, Error> {
        let client = Arc::new(credentials::client_config(identity, protection.alpn())?);
        Ok(Self { io: io.clone(), client, identity: identity.clone(), from: None, protection })
    }

    /// Who dials.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Dials `addr` once and returns the connection when `member` of this job has answered there and
    /// has welcomed us. Can be awaited on any executor; gives up after 5 s.
    ///
    /// # Errors
    /// [`Error::Refused`] when the other side is not that member or does not take us,
    /// [`Error::TimedOut`] when nobody answers, [`Error::Usage`] when the I/O thread has stopped.
    pub async fn connect(&self, addr: SocketAddr, member: &str) -> Result<Connection, Error> {
        self.connect_within(addr, member, HANDSHAKE_LIMIT).await
    }

    async fn connect_within(
        &self,
        addr: SocketAddr,
        member: &str,
        limit: Duration,
    ) -> Result<Connection, Error> {
        let stream = self.dial_within(addr, member, Wish::Messages, limit).await?;
        Ok(Connection::new(stream, member))
    }

    async fn dial_within(
        &self,
        addr: SocketAddr,
        member: &str,
        wish: Wish,
        limit: Duration,
    ) -> Result<Arc<Stream>, Error> {
        let (this, member) = (self.clone(), member.to_owned());
        let dial = async move {
            timeout(limit, this.dial(addr, &member, wish)).await.unwrap_or_else(|_| {
                let what = format!("an answer from {member} at {addr}");
                Err(Error::TimedOut { what, ranks: Vec::new(), elapsed: limit })
            })
        };
        self.io.run(dial).await?
    }

    async fn dial(&self, addr: SocketAddr, member: &str, wish: Wish) -> Result<Arc<Stream>, Error> {
        // Nobody there yet, or a network that is not: worth another try, unlike a refusal.
        let tcp = connect(addr, self.from, None)
            .await
            .map_err(|error| Error::Unreachable { remote: addr, reason: error.to_string() })?;
        let session = self.secure(&tcp, member).await.map_err(|fault| gone(addr, &fault.in_words()))?;
        let stream = Stream::new(tcp, addr, session);
        let (mut sender, mut receiver) = stream.lane(HELLO_LIMIT);
        // A refusal is found by receiving, which knows the reason.
        let _ = sender.send(&self.hello(wish)).await;
        match receiver.recv::<Welcome>().await? {
            Some(_) => Ok(stream),
            None => Err(gone(addr, "it ended the conversation without a welcome")),
        }
    }

    /// Dials for a session that has lost its socket, and completes the handshake. Runs on the I/O thread; the caller
    /// limits the time.
    pub(super) async fn dial_securely(
        &self,
        addr: SocketAddr,
        member: &str,
        longest_segment: Option<u32>,
        limit: Duration,
    ) -> Result<Arc<Stream>, Failure> {
        let connecting = timeout(limit, connect(addr, self.from, longest_segment));
        let connected = connecting.await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
        let tcp = connected.map_err(|error| match error.kind() {
            // Its host says that nobody listens there: the process is gone.
            ErrorKind::ConnectionRefused => Failure::Final(error.to_string()),
            _ => Failure::Later(error.to_string()),
        })?;
        let session = self.secure(&tcp, member).await.map_err(|fault| match fault {
            Fault::Tls(_) => Failure::Final(fault.in_words()),
            _ => Failure::Later(fault.in_words()),
        })?;
        Ok(Stream::new(tcp, addr, session))
    }

    /// Asks for the other side of a session. Nothing more may be said in TLS on the connection then.
    pub(super) async fn ask(&self, stream: &Arc<Stream>, resumption: Resumption) -> Result<Answer, Failure> {
        let (mut sender, mut receiver) = stream.lane(ANSWER_LIMIT);
        // A refusal is found by receiving, which knows the reason.
        let _ = sender.send(&self.hello(Wish::Resumption(resumption))).await;
        match receiver.recv::<Answer>().await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(Failure::Later("it ended the conversation without an answer".to_owned())),
            Err(Error::Wire(error)) => Err(Failure::Final(error.to_string())),
            Err(error) => Err(Failure::Later(error.to_string())),
        }
    }

    /// Completes the TLS handshake with `member`, as the one who dialled.
    async fn secure(&self, tcp: &TcpStream, member: &str) -> Result<Session, Fault> {
        let name = self.identity.server_name(member);
        // A name that is none is the only error.
        let name = ServerName::try_from(name).map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut session = Session::client(self.client.clone(), name)?;
        prepare(tcp)?;
        shake_hands(tcp, &mut session).await?;
        Ok(session)
    }

    fn hello(&self, wish: Wish) -> Hello {
        Hello { protocol_version: PROTOCOL_VERSION, job: self.identity.job().to_owned(), wish }
    }
}

impl Endpoint {
    /// Opens a TCP port at `addr` (port 0: any free one) for the member `identity`. If that is the address of one
    /// interface, other members of the same family are dialled from it.
    ///
    /// # Errors
    /// [`Error::Bind`] with the operating system's reason, [`Error::Identity`] when TLS cannot use the identity.
    pub fn bind(io: &IoHandle, addr: SocketAddr, identity: &Identity) -> Result<Self, Error> {
        Self::bind_with(io, addr, identity, Protection::Encrypted)
    }

    /// [`bind`](Endpoint::bind) for links whose **data is not protected**: anybody on the way can read and change
    /// it. Members still show their certificates, and control messages stay in TLS. It forms links with endpoints
    /// of its kind alone.
    ///
    /// # Errors
    /// As [`bind`](Endpoint::bind).
    pub fn bind_plain(io: &IoHandle, addr: SocketAddr, identity: &Identity) -> Result<Self, Error> {
        Self::bind_with(io, addr, identity, Protection::Plain)
    }

    fn bind_with(
        io: &IoHandle,
        addr: SocketAddr,
        identity: &Identity,
        protection: Protection,
    ) -> Result<Self, Error> {
        let server = Arc::new(credentials::server_config(identity, protection.alpn())?);
        let from = Some(addr.ip()).filter(|ip| !ip.is_unspecified());
        let dialler = Dialler { from, ..Dialler::with_protection(io, identity, protection)? };
        let failed =
            |error: std::io::Error| Error::Bind { addr, reason: error.to_string(), kind: error.kind() };
        let (listener, local_addr) = listen(io, addr).map_err(failed)?;
        let (sender, accepted) = mpsc::channel(ACCEPTED_LIMIT);
        let expected = Arc::new(Expected::default());
        let lines = Arc::new(Lines::default());
        let diversion = Arc::default();
        let reception = Arc::new(Reception {
            diversion: Arc::clone(&diversion),
            server,
            job: identity.job().to_owned(),
            accepted: sender,
            expected: expected.clone(),
            lines: lines.clone(),
            protection,
            warnings: Warnings::new(),
        });
        let accepted = tokio::sync::Mutex::new(accepted);
        // Only the task holds the other end of `accepted`: when it ends, so does every wait for a connection.
        let _acceptor = io.task(accept_all(listener, reception));
        let shared = Shared { local_addr, accepted, expected, lines, diversion, _acceptor };
        Ok(Self { dialler, shared: Arc::new(shared) })
    }

    /// Hands clients whose first message asks for `protocol` on as they have come, instead of serving them.
    ///
    /// # Errors
    /// [`Error::Usage`] when this has been done already.
    pub(crate) fn divert(
        &self,
        protocol: &'static [u8],
        to: mpsc::Sender<(TcpStream, SocketAddr)>,
    ) -> Result<(), Error> {
        let diverted = self.shared.diversion.set((protocol, to));
        diverted.map_err(|_| Error::Usage { reason: "another service has this port's diversion".to_owned() })
    }

    /// The address it listens on, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.local_addr
    }

    pub(super) fn protection(&self) -> Protection {
        self.dialler.protection
    }

    /// Who this endpoint is.
    pub fn identity(&self) -> &Identity {
        &self.dialler.identity
    }

    /// What dials for it.
    pub fn dialler(&self) -> &Dialler {
        &self.dialler
    }

    /// As [`Dialler::connect`].
    ///
    /// # Errors
    /// As [`Dialler::connect`].
    pub async fn connect(&self, addr: SocketAddr, member: &str) -> Result<Connection, Error> {
        self.dialler.connect(addr, member).await
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

    /// Mends a session's socket for as long as the returned value lives, whoever of both sides finds it broken;
    /// calls `lost` with how it broke when that fails.
    pub(super) fn mend(&self, mender: Mender, lost: impl FnOnce(&Fault) + Send + 'static) -> Task<()> {
        let (lines, dialler) = (self.shared.lines.clone(), self.dialler.clone());
        self.dialler.io.task(mender.run(lines, dialler, lost))
    }
}

impl LinkEndpoint for Endpoint {
    type Connection = Connection;

    fn io(&self) -> &IoHandle {
        &self.dialler.io
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
        self.dialler.connect_within(addr, member, limit).await
    }

    async fn open_control(connection: &Connection) -> Result<Lane<Self>, Error> {
        connection.lane(CONTROL_LIMIT)
    }

    async fn accept_control(connection: &Connection) -> Result<Lane<Self>, Error> {
        connection.lane(CONTROL_LIMIT)
    }

    async fn open_data(
        &self,
        connection: &Connection,
        addr: SocketAddr,
        control: &mut Lane<Self>,
    ) -> Result<DataOf<Self>, Error> {
        let Some(BringData { ticket }) = MessageIn::recv(&mut control.1).await? else {
            return Err(gone(addr, "it ended the conversation without a ticket"));
        };
        let member = connection.member();
        let protection = self.dialler.protection;
        let stream = self.dialler.dial_within(addr, member, Wish::Data(ticket), HANDSHAKE_LIMIT).await?;
        let data = stream.into_data(protection)?;
        if protection == Protection::Plain {
            MessageOut::send(&mut control.0, &LeftTls).await?;
        }
        Ok(data)
    }

    async fn accept_data(
        &self,
        connection: &Connection,
        control: &mut Lane<Self>,
    ) -> Result<DataOf<Self>, Error> {
        let (given_out, arrived) = self.shared.expected.give_out(connection.member())?;
        MessageOut::send(&mut control.0, &BringData { ticket: given_out.1 }).await?;
        let gave_up = |_| gone(connection.remote_address(), "its data connection was not made");
        let data = tokio::select! {
            stream = arrived => stream.map_err(gave_up)?,
            end = connection.ended() => {
                return Err(gone(connection.remote_address(), &format!("{end:?}")));
            }
        };
        if self.dialler.protection == Protection::Plain
            && MessageIn::recv::<LeftTls>(&mut control.1).await?.is_none()
        {
            return Err(gone(connection.remote_address(), "it ended the conversation before its data began"));
        }
        Ok(data)
    }
}

impl Protection {
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Encrypted => ALPN,
            Self::Plain => PLAIN_ALPN,
        }
    }
}

impl Expected {
    fn lock(&self) -> MutexGuard<'_, HashMap<Ticket, Expectation>> {
        // Entries are put in and taken out whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new ticket for `member`, and where its connection will arrive.
    fn give_out(&self, member: &str) -> Result<(GivenOut<'_>, oneshot::Receiver<DataStream>), Error> {
        let ticket: Ticket = random::bytes()
            .map_err(|error| Error::Usage { reason: format!("no random numbers: {error}") })?;
        let (arrived, arrival) = oneshot::channel();
        self.lock().insert(ticket, Expectation { member: member.to_owned(), arrived });
        Ok((GivenOut(self, ticket), arrival))
    }

    /// Takes a ticket that `member` brings.
    fn take(&self, ticket: &Ticket, member: &str) -> Result<oneshot::Sender<DataStream>, String> {
        let mut expected = self.lock();
        match expected.get(ticket) {
            None => Err("it brings a ticket for a data connection that nobody has given out".to_owned()),
            Some(expectation) if expectation.member != member => {
                Err(format!("{member} brings a ticket that was given to {}", expectation.member))
            }
            Some(_) => Ok(expected.remove(ticket).expect("it was there just now").arrived),
        }
    }
}

impl Drop for GivenOut<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

fn listen(io: &IoHandle, addr: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = StdTcpListener::bind(addr)?;
    rustix::net::listen(&listener, BACKLOG)?;
    listener.set_nonblocking(true)?;
    let local_addr = listener.local_addr()?;
    Ok((io.inside(|| TcpListener::from_std(listener))?, local_addr))
}

/// Settings of every connection: nothing waits to be sent together with more, and a host that is gone is noticed.
fn prepare(tcp: &TcpStream) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, KEEP_ALIVE)?;
    sockopt::set_tcp_keepintvl(tcp, KEEP_ALIVE)?;
    sockopt::set_tcp_keepcnt(tcp, KEEP_ALIVE_TRIES)?;
    sockopt::set_tcp_user_timeout(tcp, u32::try_from(SILENCE_LIMIT.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}

/// Connects from the address `from`, where it is of the same family, and with segments of at most that many bytes in
/// either direction.
async fn connect(
    addr: SocketAddr,
    from: Option<IpAddr>,
    longest_segment: Option<u32>,
) -> std::io::Result<TcpStream> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(longest) = longest_segment {
        SockRef::from(&socket).set_tcp_mss(longest)?;
    }
    if let Some(from) = from.filter(|from| from.is_ipv4() == addr.is_ipv4()) {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    socket.connect(addr).await
}

/// Completes the TLS handshake, on either side.
async fn shake_hands(tcp: &TcpStream, session: &mut Session) -> Result<(), Fault> {
    let mut socket = Socket::Tokio(tcp);
    loop {
        while !session.flush(&mut socket)? {
            tcp.writable().await?;
        }
        if !session.is_handshaking() {
            return Ok(());
        }
        match session.advance(&mut socket) {
            Ok(true) => {}
            Ok(false) => tcp.readable().await?,
            Err(fault) => {
                // An alert, if rustls has one to say.
                let _ = session.flush(&mut socket);
                return Err(fault);
            }
        }
    }
}

/// Completes handshakes side by side, so that a stalled one holds up nobody.
async fn accept_all(listener: TcpListener, reception: Arc<Reception>) {
    let mut handshakes = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    let mut newcomers = Newcomers::new(Instant::now());
    let mut barred = Barred::default();
    loop {
        let incoming = tokio::select! {
            incoming = listener.accept() => incoming,
            Some(_) = handshakes.join_next() => continue,
            () = sleep_until(barred.next()) => {
                if let Err(error) = barred.free(Instant::now(), &listener) {
                    tracing::warn!(%error, "cannot let addresses in that have asked for too many handshakes");
                    sleep(ACCEPT_PAUSE).await;
                }
                continue;
            }
        };
        let (tcp, addr) = match incoming {
            Ok(incoming) => incoming,
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections now");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        barred::release(&tcp);
        // A dual-stack socket reports IPv4 peers as mapped addresses, which nobody recognises in a log.
        let remote = SocketAddr::new(addr.ip().to_canonical(), addr.port());
        if !newcomers.admit(remote.ip(), Instant::now()) {
            reception.warnings.warn(remote, "its address has asked for too many handshakes");
            // Without a filter it is hung up on each time, which does the same at a price.
            let _ = barred.add(remote.ip(), Instant::now(), &listener);
            continue;
        }
        by_age.retain(|handshake| !handshake.is_finished());
        if by_age.len() >= HANDSHAKES_LIMIT
            && let Some(oldest) = by_age.pop_front()
        {
            oldest.abort();
        }
        by_age.push_back(handshakes.spawn(let_in(tcp, remote, reception.clone())));
    }
}

async fn sleep_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

/// Completes one handshake and hands the connection on, or says why not.
async fn let_in(tcp: TcpStream, remote: SocketAddr, reception: Arc<Reception>) {
    let outcome = timeout(HANDSHAKE_LIMIT, welcome(tcp, remote, &reception)).await;
    let reason = match outcome {
        Ok(Ok(())) => return,
        Ok(Err(reason)) => reason,
        Err(_) => format!("its handshake was not finished within {} s", HANDSHAKE_LIMIT.as_secs()),
    };
    reception.warnings.warn(remote, &reason);
}

async fn welcome(tcp: TcpStream, remote: SocketAddr, reception: &Reception) -> Result<(), String> {
    if let Some((protocol, to)) = reception.diversion.get()
        && first_message::asks_for(&tcp, protocol).await
    {
        // Whoever serves them may have ended; the client sees the connection close.
        return to.send((tcp, remote)).await.map_err(|_| "nobody serves its protocol any more".to_owned());
    }
    prepare(&tcp).map_err(|error| error.to_string())?;
    let mut session = Session::server(reception.server.clone()).map_err(|fault| fault.in_words())?;
    if let Err(fault) = shake_hands(&tcp, &mut session).await {
        say_goodbye_to_a_stranger(&tcp).await;
        return Err(fault.in_words());
    }
    let certificate = session.certificate().ok_or("the client has no certificate")?;
    let name = MemberName::of(certificate)?;
    let stream = Stream::new(tcp, remote, session);
    match greet(&stream, &name, reception).await {
        Ok(Greeted::Resumption(resumption)) => {
            reception.lines.answer(stream, &name.member, resumption).await;
            Ok(())
        }
        Ok(Greeted::Data(arrived)) => {
            let data = stream.into_data(reception.protection).map_err(|error| error.to_string())?;
            // Whoever has waited may have given up, and tells the other side over the control connection.
            drop(arrived.send(data));
            Ok(())
        }
        Ok(Greeted::Member) => {
            match reception.accepted.try_send(Connection::new(stream.clone(), &name.member)) {
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
                Err(mpsc::error::TrySendError::Full(_)) => {
                    Err(refuse(&stream, "too many connections wait to be accepted"))
                }
            }
        }
        // In the error of a connection only the reason is news here; the address is logged beside it.
        Err(Error::Refused { reason, .. }) => Err(refuse(&stream, &reason)),
        Err(error) => Err(refuse(&stream, &error.to_string())),
    }
}

fn refuse(stream: &Stream, reason: &str) -> String {
    stream.close(CloseCode::Refused, reason);
    reason.to_owned()
}

/// Ends a connection so that the alert on it arrives: bytes that are unread when a socket is closed make the
/// operating system reset the connection, and the reason is lost.
async fn say_goodbye_to_a_stranger(tcp: &TcpStream) {
    let _ = rustix::net::shutdown(tcp, rustix::net::Shutdown::Write);
    let mut buffer = [0; 4096];
    let read_all = async {
        let mut read = 0;
        while read < REFUSAL_BYTES {
            match tcp.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => read += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if tcp.readable().await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    };
    let _ = timeout(REFUSAL_GRACE, read_all).await;
}

/// What a client that has been let in came for.
enum Greeted {
    Member,
    /// The data connection of a link, and where it goes.
    Data(oneshot::Sender<DataStream>),
    /// Going on with a session that has lost its socket.
    Resumption(Resumption),
}

/// Hears what the client wants and answers its hello; what does not fit is an error.
async fn greet(stream: &Arc<Stream>, name: &MemberName, reception: &Reception) -> Result<Greeted, Error> {
    let refused = |reason: String| stream.gone(&reason);
    let job = &reception.job;
    if name.job != *job {
        return Err(refused(format!("its certificate is of the job {:?}", name.job)));
    }
    let (mut sender, mut receiver) = stream.lane(HELLO_LIMIT);
    let hello = receiver.recv::<Hello>().await?;
    let Hello { protocol_version, job: theirs, wish } =
        hello.ok_or_else(|| refused("it ended the conversation without a hello".to_owned()))?;
    if protocol_version != PROTOCOL_VERSION {
        return Err(refused(format!(
            "it speaks version {protocol_version} of the protocol and we speak {PROTOCOL_VERSION}"
        )));
    }
    if theirs != *job {
        return Err(refused(format!("it is looking for the job {theirs:?} and this is {job:?}")));
    }
    let greeted = match wish {
        Wish::Messages => Greeted::Member,
        Wish::Data(ticket) => Greeted::Data(reception.expected.take(&ticket, &name.member).map_err(refused)?),
        Wish::Resumption(resumption) => return Ok(Greeted::Resumption(resumption)),
    };
    sender.send(&Welcome { protocol_version: PROTOCOL_VERSION }).await?;
    Ok(greeted)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire;

    #[test]
    fn a_ticket_is_good_once_and_for_one_member() {
        let expected = Expected::default();
        let (given_out, _arrival) = expected.give_out("a").expect("random numbers");
        let ticket = given_out.1;
        assert!(expected.take(&[0; 16], "a").expect_err("unknown").contains("nobody has given out"));
        assert!(expected.take(&ticket, "b").expect_err("not its own").contains("was given to a"));
        assert!(expected.take(&ticket, "a").is_ok());
        assert!(expected.take(&ticket, "a").is_err(), "it is used up");
        let (given_out, _arrival) = expected.give_out("a").expect("random numbers");
        let ticket = given_out.1;
        drop(given_out);
        assert!(expected.take(&ticket, "a").is_err(), "nobody waits any more");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_of_the_handshake_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = wire::decode::<Welcome>(&bytes);
            let _ = wire::decode::<BringData>(&bytes);
            if let Ok(Hello { wish: Wish::Data(ticket), .. }) = wire::decode::<Hello>(&bytes) {
                prop_assert!(Expected::default().take(&ticket, "a").is_err());
            }
        }
    }
}
