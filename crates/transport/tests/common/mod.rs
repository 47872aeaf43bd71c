//! What the tests of links between processes share: groups of ranks in one process, bounded waits, and a
//! client that follows QUIC's protocol by hand and can therefore break it.
#![allow(dead_code, unused_macros, unused_imports, reason = "each test binary uses a part of it")]

use std::io::{IoSlice, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use paceline_transport::identity::{Identity, JobAuthority};
use paceline_transport::quic::{self, QuicTransport};
use paceline_transport::tls::{self, StripedTransport, TlsTransport};
use paceline_transport::{Error, IoHandle, IoThread, Member, Roster, Transport, wire};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;

/// No test waits longer for anything that should happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Well below the idle timeout of 10 s: what happens within it was told, not found out by silence.
pub const SOON: Duration = Duration::from_secs(4);

pub const DAY: Duration = Duration::from_secs(24 * 3600);

pub fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

pub fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

pub fn authority(job: &str) -> JobAuthority {
    JobAuthority::new(job).expect("a valid job name")
}

pub fn identity(authority: &JobAuthority, member: &str) -> Identity {
    authority.issue(member, DAY).expect("a valid member name")
}

pub fn bind(io: &IoThread, identity: &Identity) -> quic::Endpoint {
    Quic::bind(&io.handle(), loopback(), identity).expect("a free port on loopback")
}

/// One kind of links between processes.
pub trait Kind: 'static {
    const NAME: &'static str;
    /// What a peer takes that reads nothing, in bytes.
    const WINDOW: std::ops::RangeInclusive<usize>;
    /// What is said of data that ended in the middle.
    const CUT: &'static str;
    type Endpoint: Clone + Send + Sync + 'static;
    type Transport: Transport + 'static;
    /// A socket at which nobody answers.
    type Silence;

    fn bind(io: &IoHandle, addr: SocketAddr, identity: &Identity) -> Result<Self::Endpoint, Error>;
    fn local_addr(endpoint: &Self::Endpoint) -> SocketAddr;
    fn connect(endpoint: &Self::Endpoint, roster: Roster, until: Instant) -> Result<Self::Transport, Error>;
    /// Waits for whoever dials, says who it was, and hangs up.
    fn accept_and_drop(io: &IoHandle, endpoint: &Self::Endpoint) -> String;
    fn silence() -> (Self::Silence, SocketAddr);
    /// Waits until somebody has dialled the silent socket.
    fn dialled(silence: &Self::Silence);
}

pub enum Quic {}
pub enum Tls {}
/// TLS over two addresses of each rank: that it is bound to, and 127.0.0.2 with the same port.
pub enum Striped {}
/// TLS whose data connections leave it.
pub enum Tcp {}

macro_rules! kind {
    ($kind:ty, $module:ident, $transport:ty, $bind:ident) => {
        type Endpoint = $module::Endpoint;
        type Transport = $transport;

        fn bind(io: &IoHandle, addr: SocketAddr, identity: &Identity) -> Result<$module::Endpoint, Error> {
            $module::Endpoint::$bind(io, addr, identity)
        }

        fn local_addr(endpoint: &$module::Endpoint) -> SocketAddr {
            endpoint.local_addr()
        }

        fn connect(
            endpoint: &$module::Endpoint,
            roster: Roster,
            until: Instant,
        ) -> Result<$transport, Error> {
            <$transport>::connect(endpoint, roster, until)
        }

        fn accept_and_drop(io: &IoHandle, endpoint: &$module::Endpoint) -> String {
            let endpoint = endpoint.clone();
            let accepted = io.block_on(async move { endpoint.accept().await });
            accepted.expect("io runs").expect("somebody dials").member().to_owned()
        }
    };
}

impl Kind for Quic {
    const NAME: &'static str = "quic";
    /// `STREAM_WINDOW_BYTES` in `quic/tls.rs`, the first of which is not ours.
    const WINDOW: std::ops::RangeInclusive<usize> = (2 << 20) - 1..=2 << 20;
    const CUT: &'static str = "it ended without leaving";
    type Silence = UdpSocket;
    kind!(Quic, quic, QuicTransport, bind);

    fn silence() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind(loopback()).expect("a free port");
        let addr = socket.local_addr().expect("bound");
        (socket, addr)
    }

    fn dialled(silence: &UdpSocket) {
        silence.recv(&mut [0; 2048]).expect("somebody dials");
    }
}

impl Kind for Tls {
    const NAME: &'static str = "tls";
    /// Linux decides how much its buffers hold; ours is 128 KiB more.
    const WINDOW: std::ops::RangeInclusive<usize> = 64 << 10..=16 << 20;
    const CUT: &'static str = "ended without a goodbye";
    type Silence = TcpListener;
    kind!(Tls, tls, TlsTransport, bind);

    fn silence() -> (TcpListener, SocketAddr) {
        let socket = TcpListener::bind(loopback()).expect("a free port");
        let addr = socket.local_addr().expect("bound");
        (socket, addr)
    }

    fn dialled(silence: &TcpListener) {
        silence.accept().expect("somebody dials");
    }
}

impl Kind for Striped {
    const NAME: &'static str = "tls";
    /// What two sockets hold.
    const WINDOW: std::ops::RangeInclusive<usize> = 128 << 10..=32 << 20;
    const CUT: &'static str = Tls::CUT;
    type Endpoint = [tls::Endpoint; 2];
    type Transport = StripedTransport;
    type Silence = TcpListener;

    fn bind(io: &IoHandle, addr: SocketAddr, identity: &Identity) -> Result<Self::Endpoint, Error> {
        let first = tls::Endpoint::bind(io, addr, identity)?;
        let second = tls::Endpoint::bind(io, second_address(first.local_addr()), identity)?;
        Ok([first, second])
    }

    fn local_addr(endpoint: &Self::Endpoint) -> SocketAddr {
        endpoint[0].local_addr()
    }

    fn connect(endpoint: &Self::Endpoint, roster: Roster, until: Instant) -> Result<StripedTransport, Error> {
        let mut second = roster.clone();
        second.members.iter_mut().for_each(|member| member.addr = second_address(member.addr));
        let first = TlsTransport::connect(&endpoint[0], roster, until)?;
        let second = first.connect_beside(&endpoint[1], second, until, std::future::pending())?;
        StripedTransport::new(vec![first, second])
    }

    fn accept_and_drop(io: &IoHandle, endpoint: &Self::Endpoint) -> String {
        Tls::accept_and_drop(io, &endpoint[0])
    }

    fn silence() -> (TcpListener, SocketAddr) {
        Tls::silence()
    }

    fn dialled(silence: &TcpListener) {
        Tls::dialled(silence);
    }
}

impl Kind for Tcp {
    const NAME: &'static str = "tcp";
    const WINDOW: std::ops::RangeInclusive<usize> = Tls::WINDOW;
    const CUT: &'static str = Tls::CUT;
    type Silence = TcpListener;
    kind!(Tcp, tls, TlsTransport, bind_plain);

    fn silence() -> (TcpListener, SocketAddr) {
        Tls::silence()
    }

    fn dialled(silence: &TcpListener) {
        Tls::dialled(silence);
    }
}

fn second_address(first: SocketAddr) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(127, 0, 0, 2).into(), first.port())
}

/// Each of these behaviours as a test on every kind of links.
macro_rules! on_every_kind {
    ($($name:ident),* $(,)?) => {
        mod quic { $(#[test] fn $name() { super::$name::<crate::common::Quic>(); })* }
        mod tls { $(#[test] fn $name() { super::$name::<crate::common::Tls>(); })* }
        mod striped { $(#[test] fn $name() { super::$name::<crate::common::Striped>(); })* }
        mod tcp { $(#[test] fn $name() { super::$name::<crate::common::Tcp>(); })* }
    };
}
pub(crate) use on_every_kind;

/// The ranks of a job in one process, each with its I/O thread and endpoint.
pub struct Group<K: Kind> {
    pub authority: JobAuthority,
    pub ios: Vec<IoThread>,
    pub endpoints: Vec<K::Endpoint>,
}

impl<K: Kind> Group<K> {
    /// Binds endpoints for members m0, m1, …
    pub fn bind(job: &str, world_size: usize) -> Self {
        let authority = authority(job);
        let ios: Vec<_> = (0..world_size).map(|_| IoThread::start().expect("a thread")).collect();
        let bind = |(rank, io): (usize, &IoThread)| {
            let identity = identity(&authority, &format!("m{rank}"));
            // A kind with two addresses wants the same port at both, and another process may have the second one.
            let tries = (0..20).map(|_| K::bind(&io.handle(), loopback(), &identity));
            tries.flatten().next().expect("a free port on loopback")
        };
        let endpoints = ios.iter().enumerate().map(bind).collect();
        Self { authority, ios, endpoints }
    }

    pub fn roster(&self, rank: usize, epoch: u64) -> Roster {
        let member = |(rank, endpoint): (usize, &K::Endpoint)| Member {
            name: format!("m{rank}"),
            addr: K::local_addr(endpoint),
        };
        let members = self.endpoints.iter().enumerate().map(member).collect();
        Roster { job: self.authority.job().to_owned(), epoch, rank, members }
    }

    /// Links everybody up, each rank from a thread of its own.
    pub fn connect(&self, epoch: u64) -> Vec<K::Transport> {
        std::thread::scope(|scope| {
            let connect = |(rank, endpoint)| {
                let roster = self.roster(rank, epoch);
                scope.spawn(move || K::connect(endpoint, roster, deadline()))
            };
            let ranks: Vec<_> = self.endpoints.iter().enumerate().map(connect).collect();
            let joined = ranks.into_iter().map(|rank| rank.join().expect("no panic"));
            joined.map(|transport| transport.expect("all ranks are there")).collect()
        })
    }
}

/// Keeps a rank's I/O thread from doing anything until it is dropped.
pub struct Freeze(#[expect(dead_code, reason = "dropping it thaws")] std::sync::mpsc::Sender<()>);

impl<K: Kind> Group<K> {
    /// Freezes a rank: its process is there and answers nothing. Returns when it does.
    pub fn freeze(&self, rank: usize) -> Freeze {
        let (thaw, thawed) = std::sync::mpsc::channel();
        let (now_frozen, frozen) = std::sync::mpsc::channel();
        self.ios[rank].handle().spawn(async move {
            now_frozen.send(()).expect("awaited below");
            // An error is how it ends: nothing is ever sent.
            let _ = thawed.recv();
        });
        frozen.recv().expect("the I/O thread runs");
        Freeze(thaw)
    }
}

/// A group of two, linked up.
pub fn pair<K: Kind>(job: &str) -> (Group<K>, K::Transport, K::Transport) {
    let group = Group::bind(job, 2);
    let mut transports = group.connect(1);
    let second = transports.pop().expect("two ranks");
    (group, transports.pop().expect("two ranks"), second)
}

/// Sends all of `bytes`.
pub fn send_all(transport: &mut impl Transport, to: usize, mut bytes: &[u8]) -> Result<(), Error> {
    let until = deadline();
    while !bytes.is_empty() {
        match transport.try_send(to, &[IoSlice::new(bytes)])? {
            0 => transport.wait(until),
            sent => bytes = &bytes[sent..],
        }
        assert!(Instant::now() < until, "{} bytes are not sent", bytes.len());
    }
    Ok(())
}

/// Receives until `into` is full.
pub fn recv_exact(transport: &mut impl Transport, from: usize, into: &mut [u8]) -> Result<(), Error> {
    let (until, mut filled) = (deadline(), 0);
    while filled < into.len() {
        match transport.try_recv(from, &mut into[filled..])? {
            0 => transport.wait(until),
            got => filled += got,
        }
        assert!(Instant::now() < until, "only {filled} bytes came");
    }
    Ok(())
}

pub fn recv_control(transport: &mut impl Transport, from: usize) -> Result<Vec<u8>, Error> {
    until(transport, |transport| transport.try_recv_control(from).transpose())
}

/// Reads what comes, drops it, and returns the error with which data ends, and how much came.
pub fn drain(transport: &mut impl Transport, from: usize) -> (Error, usize) {
    let (mut buffer, mut total) = (vec![0; 64 * 1024], 0);
    let end = until(transport, |transport| match transport.try_recv(from, &mut buffer) {
        Ok(0) => None,
        Ok(got) => {
            total += got;
            Some(Ok(None))
        }
        Err(error) => Some(Ok(Some(error))),
    });
    match end {
        Ok(Some(error)) => (error, total),
        _ => {
            let (error, more) = drain(transport, from);
            (error, total + more)
        }
    }
}

/// Polls until there is an answer.
pub fn until<T, L: Transport>(
    transport: &mut L,
    mut poll: impl FnMut(&mut L) -> Option<Result<T, Error>>,
) -> Result<T, Error> {
    let until = deadline();
    loop {
        if let Some(answer) = poll(transport) {
            return answer;
        }
        assert!(Instant::now() < until, "no answer");
        transport.wait(until);
    }
}

pub fn assert_lost(error: &Error, peer: usize, reason: &str) {
    match error {
        Error::Lost { peer: lost, reason: found } if *lost == peer => {
            assert!(found.contains(reason), "{found:?} does not say {reason:?}");
        }
        other => panic!("expected the loss of rank {peer} ({reason}), got {other:?}"),
    }
}

/// Bytes that are different at each place and for each `seed`.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let word = |at: u64| (at ^ seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes();
    (0..len.div_ceil(8) as u64).flat_map(word).take(len).collect()
}

/// How a hand-made client presents itself.
pub struct Disguise<'a> {
    /// Whose certificate it shows, if any.
    pub shows: Option<&'a Identity>,
    /// Whose authority it trusts.
    pub trusts: &'a Identity,
    pub alpn: &'a [u8],
}

/// The settings of a quinn client that is not ours.
pub fn raw_config(disguise: &Disguise<'_>) -> quinn::ClientConfig {
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(raw_tls_config(disguise));
    quinn::ClientConfig::new(Arc::new(crypto.expect("a QUIC suite")))
}

/// The settings of a TLS client that is not ours.
pub fn raw_tls_config(disguise: &Disguise<'_>) -> rustls::ClientConfig {
    tls_config_of(disguise, &rustls::version::TLS13)
}

/// The same for one version of TLS, whichever.
pub fn tls_config_of(
    disguise: &Disguise<'_>,
    version: &'static rustls::SupportedProtocolVersion,
) -> rustls::ClientConfig {
    let certificates = |identity: &Identity| -> Vec<CertificateDer<'static>> {
        let pem = identity.to_pem();
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().expect("our own PEM")
    };
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificates(disguise.trusts).remove(1)).expect("an authority");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .expect("a version that the provider has")
        .with_root_certificates(roots);
    let mut tls = match disguise.shows {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let key = PrivateKeyDer::from_pem_slice(identity.to_pem().as_bytes()).expect("our own PEM");
            let leaf = vec![certificates(identity).remove(0)];
            builder.with_client_auth_cert(leaf, key).expect("a matching key")
        }
    };
    tls.alpn_protocols = vec![disguise.alpn.to_vec()];
    tls
}

/// A quinn endpoint that only dials, on the I/O thread `io`.
pub fn raw_endpoint(io: &IoHandle) -> quinn::Endpoint {
    io.block_on(async { quinn::Endpoint::client(loopback()).expect("a free port") }).expect("io is running")
}

/// A stream of `kind` with nothing but the byte that says so.
pub async fn raw_lane(connection: &quinn::Connection, kind: u8) -> (quinn::SendStream, quinn::RecvStream) {
    let (mut send, recv) = connection.open_bi().await.expect("the connection is open");
    send.write_all(&[kind]).await.expect("the connection is open");
    (send, recv)
}

/// Passes bytes between whoever dials it and `server`, and keeps what the dialling side has sent.
pub fn relay(server: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind(loopback()).expect("a free port");
    let (addr, sent) = (listener.local_addr().expect("bound"), Arc::new(Mutex::new(Vec::new())));
    let kept = sent.clone();
    std::thread::spawn(move || {
        let (client, _) = listener.accept().expect("somebody dials");
        let upstream = TcpStream::connect(server).expect("the server listens");
        let (mut from, mut to) = (upstream.try_clone().expect("a copy"), client.try_clone().expect("a copy"));
        std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        let (mut from, mut to, mut buffer) = (client, upstream, [0; 4096]);
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            kept.lock().expect("no panic").extend_from_slice(&buffer[..count]);
            if to.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    });
    (addr, sent)
}

/// A message as it is on a lane.
pub fn framed<T: Serialize>(message: &T) -> Vec<u8> {
    let body = wire::encode(message).expect("a short message");
    [&u32::try_from(body.len()).expect("short").to_le_bytes()[..], &body].concat()
}

/// Everything the process logs, as lines. Installed once for the test binary, since the I/O threads
/// are not the tests' own; tests look for lines that name their own addresses.
pub fn log() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::INFO)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .init();
        log
    })
}

#[derive(Clone, Default)]
pub struct Log(Arc<(Mutex<Vec<u8>>, std::sync::Condvar)>);

impl Log {
    /// Waits for lines with all of `words`, and returns the first.
    pub fn line_with(&self, words: &[&str]) -> String {
        let (text, changed) = &*self.0;
        let until = deadline();
        let mut guard = text.lock().expect("no writer panics");
        loop {
            let all = String::from_utf8_lossy(&guard);
            let found = all.lines().find(|line| words.iter().all(|word| line.contains(word)));
            if let Some(line) = found {
                return line.to_owned();
            }
            assert!(Instant::now() < until, "no line with {words:?} in:\n{all}");
            guard = changed.wait_timeout(guard, Duration::from_secs(1)).expect("no writer panics").0;
        }
    }

    pub fn lines_with(&self, words: &[&str]) -> usize {
        let guard = self.0.0.lock().expect("no writer panics");
        let all = String::from_utf8_lossy(&guard);
        all.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.0.lock().expect("no writer panics").extend_from_slice(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
