//! The QUIC transport beside a plain quinn program and TCP: throughput of one stream, and round trips.
//!
//! Two processes, one stream, one connection each. The contenders take turns for several rounds, so that a
//! busy minute of the machine hits all; the table has medians. Every byte is compared on arrival. Run it on
//! an idle machine with `cargo bench -p paceline-benches --bench quic`; `-- --quick` takes a few seconds and
//! says little, and `-- --only "paceline 1452"` leaves out the others.
//!
//! The plain quinn program is what its documentation shows: default settings (but for the bound of the MTU)
//! on a current-thread runtime, which is its fastest.
#![allow(clippy::print_stdout, reason = "this is its output")]

use std::env;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use paceline_transport::Transport;
use paceline_transport::identity::{Identity, JobAuthority};
use paceline_transport::quic::{Endpoint, IoThread, Member, QuicTransport, Roster, Settings};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// In front of the name of a contender: this process is its other side.
const PEER: &str = "--peer";

/// Bytes per write and read, and the period of the bytes sent: they stay in the cache.
const BLOCK_BYTES: usize = 256 * 1024;

/// No operation of this program takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// UDP payloads: an Ethernet frame's less what a tunnel may take, and a jumbo frame's.
const SMALL_DATAGRAM: u16 = 1452;
const JUMBO_DATAGRAM: u16 = 8972;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    Tcp,
    Quinn(u16),
    Paceline(u16),
}

const CONTENDERS: [Contender; 4] = [
    Contender::Quinn(SMALL_DATAGRAM),
    Contender::Paceline(SMALL_DATAGRAM),
    Contender::Tcp,
    Contender::Paceline(JUMBO_DATAGRAM),
];

/// How much is measured.
struct Effort {
    rounds: usize,
    bytes: usize,
    round_trips: usize,
}

const FULL: Effort = Effort { rounds: 9, bytes: 1 << 30, round_trips: 5000 };
const QUICK: Effort = Effort { rounds: 3, bytes: 1 << 26, round_trips: 500 };

/// What one side can do with its connection.
trait Pipe {
    async fn send(&mut self, bytes: &[u8]);
    async fn receive(&mut self, into: &mut [u8]);
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    match value_of(PEER) {
        Some(name) => runtime.block_on(peer(&name)),
        None => runtime.block_on(measure()),
    }
}

/// What follows `flag` in the arguments.
fn value_of(flag: &str) -> Option<String> {
    env::args().skip_while(|argument| argument != flag).nth(1)
}

// The measurement -------------------------------------------------------------------------------------------

/// A contender, connected to its peer process.
struct Bout {
    contender: Contender,
    // Dropped before the connection, whose end it would complain of.
    _child: Killed,
    side: Side,
    /// GB/s and µs, a value for each round.
    throughput: Vec<f64>,
    round_trip: Vec<f64>,
}

/// A process that does not outlive this value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Fails if it has ended, which is what we want.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn measure() {
    let quick = env::args().any(|argument| argument == "--quick");
    let effort = if quick { QUICK } else { FULL };
    let authority = JobAuthority::new("bench").expect("a valid name");
    let mut bouts = Vec::new();
    let only = value_of("--only");
    for contender in CONTENDERS.into_iter().filter(|it| only.as_ref().is_none_or(|only| *only == it.name())) {
        let mut bout = Bout::begin(contender, &authority).await;
        // Until the MTU is found and windows have grown.
        bout.side.throughput(effort.bytes / 4).await;
        bouts.push(bout);
    }
    for _ in 0..effort.rounds {
        for bout in &mut bouts {
            let seconds = bout.side.throughput(effort.bytes).await;
            bout.throughput.push(effort.bytes as f64 / seconds / 1e9);
            bout.round_trip.push(bout.side.round_trip(effort.round_trips).await * 1e6);
        }
    }
    println!("{:<16} {:>8} {:>20} {:>14} {:>20}", "", "GB/s", "(range)", "8 B, µs", "(range)");
    for bout in &mut bouts {
        let (speed, trip) = (summary(&mut bout.throughput), summary(&mut bout.round_trip));
        println!(
            "{:<16} {:>8.2} {:>20} {:>14.1} {:>20}",
            bout.contender.name(),
            speed.0,
            speed.1,
            trip.0,
            trip.1
        );
    }
    if only.is_some() {
        return;
    }
    let of = |contender| bouts.iter().find(|bout| bout.contender == contender).expect("it took part");
    let median = |values: &[f64]| values[values.len() / 2];
    let speed = |contender| median(&of(contender).throughput);
    let small = speed(Contender::Paceline(SMALL_DATAGRAM)) / speed(Contender::Quinn(SMALL_DATAGRAM));
    let jumbo = speed(Contender::Paceline(JUMBO_DATAGRAM)) / speed(Contender::Tcp);
    println!("paceline/quinn at {SMALL_DATAGRAM}: {small:.2}   (goal: 1.4)");
    println!("paceline/TCP at {JUMBO_DATAGRAM}:   {jumbo:.2}   (goal: 0.7)");
}

/// Sorts values; the median and the range in words.
fn summary(values: &mut [f64]) -> (f64, String) {
    values.sort_by(f64::total_cmp);
    let (first, last) = (values[0], values[values.len() - 1]);
    (values[values.len() / 2], format!("{first:.2} - {last:.2}"))
}

impl Contender {
    fn name(self) -> String {
        match self {
            Contender::Tcp => "tcp".to_owned(),
            Contender::Quinn(datagram) => format!("quinn {datagram}"),
            Contender::Paceline(datagram) => format!("paceline {datagram}"),
        }
    }

    fn of(name: &str) -> Self {
        match name.split_once(' ') {
            None => Contender::Tcp,
            Some(("quinn", datagram)) => Contender::Quinn(datagram.parse().expect("a number")),
            Some((_, datagram)) => Contender::Paceline(datagram.parse().expect("a number")),
        }
    }
}

impl Bout {
    async fn begin(contender: Contender, authority: &JobAuthority) -> Self {
        let day = Duration::from_secs(24 * 3600);
        let [here, there] = ["m1", "m0"].map(|member| authority.issue(member, day).expect("a valid name"));
        let mut child = Command::new(env::current_exe().expect("this program"))
            .args([PEER, &contender.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program starts again");
        let mut input = child.stdin.take().expect("piped");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let pem = there.to_pem();
        write!(input, "{}\n{}", pem.len(), pem.as_str()).expect("the peer reads");
        let mut line = String::new();
        output.read_line(&mut line).expect("the peer writes");
        let addr: SocketAddr = line.trim().parse().expect("an address");
        let side = match contender {
            Contender::Tcp => {
                let stream = TcpStream::connect(addr).expect("the peer listens");
                stream.set_nodelay(true).expect("a TCP socket");
                Side::Tcp(stream)
            }
            Contender::Quinn(datagram) => Side::Quinn(Quinn::dial(&here, datagram, addr).await),
            Contender::Paceline(datagram) => {
                let (io, endpoint) = bind(&here, datagram);
                writeln!(input, "{}", endpoint.local_addr()).expect("the peer reads");
                Side::Paceline(link(io, &endpoint, 1, [addr, endpoint.local_addr()]))
            }
        };
        let _child = Killed(child);
        Self { contender, side, _child, throughput: Vec::new(), round_trip: Vec::new() }
    }
}

// Both sides ------------------------------------------------------------------------------------------------

const THROUGHPUT: u8 = 1;
const ROUND_TRIP: u8 = 2;

/// One side of a contender's connection.
enum Side {
    Tcp(TcpStream),
    Quinn(Quinn),
    Paceline(Paceline),
}

impl Side {
    async fn command(&mut self, command: u8, count: usize) {
        let mut bytes = vec![command];
        bytes.extend((count as u64).to_le_bytes());
        self.send(&bytes).await;
    }

    /// Sends `bytes` bytes and returns the seconds until the peer has checked them all.
    async fn throughput(&mut self, bytes: usize) -> f64 {
        let block = block();
        self.command(THROUGHPUT, bytes).await;
        let start = Instant::now();
        for _ in 0..bytes / BLOCK_BYTES {
            self.send(&block).await;
        }
        let mut answer = [0; 8];
        self.receive(&mut answer).await;
        let seconds = start.elapsed().as_secs_f64();
        assert_eq!(u64::from_le_bytes(answer), bytes as u64, "the peer has found wrong bytes");
        seconds
    }

    /// The median of `count` round trips of 8 bytes, in seconds.
    async fn round_trip(&mut self, count: usize) -> f64 {
        self.command(ROUND_TRIP, count).await;
        let mut seconds = Vec::with_capacity(count);
        for trip in 0..count as u64 {
            let start = Instant::now();
            self.send(&trip.to_le_bytes()).await;
            let mut answer = [0; 8];
            self.receive(&mut answer).await;
            seconds.push(start.elapsed().as_secs_f64());
            assert_eq!(u64::from_le_bytes(answer), trip);
        }
        seconds.sort_by(f64::total_cmp);
        seconds[count / 2]
    }

    /// Does what the other side commands, until it kills this process.
    async fn serve(&mut self) {
        let (expected, mut buffer) = (block(), vec![0; BLOCK_BYTES]);
        loop {
            let mut command = [0; 9];
            self.receive(&mut command).await;
            let count = u64::from_le_bytes(command[1..].try_into().expect("8 bytes"));
            match command[0] {
                THROUGHPUT => {
                    let mut right = 0;
                    for _ in 0..count / BLOCK_BYTES as u64 {
                        self.receive(&mut buffer).await;
                        right += if buffer == expected { BLOCK_BYTES as u64 } else { 0 };
                    }
                    self.send(&right.to_le_bytes()).await;
                }
                _ => {
                    for _ in 0..count {
                        let mut bytes = [0; 8];
                        self.receive(&mut bytes).await;
                        self.send(&bytes).await;
                    }
                }
            }
        }
    }
}

impl Pipe for Side {
    async fn send(&mut self, bytes: &[u8]) {
        match self {
            Side::Tcp(stream) => stream.write_all(bytes).expect("the peer is there"),
            Side::Quinn(quinn) => quinn.send.write_all(bytes).await.expect("the peer is there"),
            Side::Paceline(paceline) => paceline.send(bytes),
        }
    }

    async fn receive(&mut self, into: &mut [u8]) {
        match self {
            Side::Tcp(stream) => stream.read_exact(into).expect("the peer is there"),
            Side::Quinn(quinn) => quinn.receive.read_exact(into).await.expect("the peer is there"),
            Side::Paceline(paceline) => paceline.receive(into),
        }
    }
}

/// Bytes that are different at each place of a block.
fn block() -> Vec<u8> {
    let word = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes();
    (0..BLOCK_BYTES as u64 / 8).flat_map(word).collect()
}

/// The other process.
async fn peer(name: &str) {
    let mut input = BufReader::new(std::io::stdin());
    let mut line = String::new();
    input.read_line(&mut line).expect("the parent writes");
    let mut pem = vec![0; line.trim().parse().expect("a number")];
    input.read_exact(&mut pem).expect("the parent writes");
    let identity = Identity::from_pem(std::str::from_utf8(&pem).expect("PEM is text")).expect("our own PEM");
    let mut side = match Contender::of(name) {
        Contender::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
            println!("{}", listener.local_addr().expect("bound"));
            let stream = listener.accept().expect("the parent dials").0;
            stream.set_nodelay(true).expect("a TCP socket");
            Side::Tcp(stream)
        }
        Contender::Quinn(datagram) => Side::Quinn(Quinn::accept(&identity, datagram).await),
        Contender::Paceline(datagram) => {
            let (io, endpoint) = bind(&identity, datagram);
            println!("{}", endpoint.local_addr());
            let mut line = String::new();
            input.read_line(&mut line).expect("the parent writes");
            let addr = line.trim().parse().expect("an address");
            Side::Paceline(link(io, &endpoint, 0, [endpoint.local_addr(), addr]))
        }
    };
    side.serve().await;
}

// Paceline --------------------------------------------------------------------------------------------------

struct Paceline {
    transport: QuicTransport,
    other: usize,
    _io: IoThread,
}

fn bind(identity: &Identity, datagram: u16) -> (IoThread, Endpoint) {
    let io = IoThread::start().expect("a thread");
    let settings = Settings::default().with_largest_datagram(datagram);
    let any_port = ([127, 0, 0, 1], 0).into();
    let endpoint = Endpoint::bind_with(&io.handle(), any_port, identity, &settings).expect("a free port");
    (io, endpoint)
}

fn link(io: IoThread, endpoint: &Endpoint, rank: usize, addrs: [SocketAddr; 2]) -> Paceline {
    let member = |(rank, addr): (usize, SocketAddr)| Member { name: format!("m{rank}"), addr };
    let members = addrs.into_iter().enumerate().map(member).collect();
    let roster = Roster { job: "bench".to_owned(), epoch: 1, rank, members };
    let transport = QuicTransport::connect(endpoint, roster, Instant::now() + PATIENCE);
    Paceline { transport: transport.expect("the peer is there"), other: 1 - rank, _io: io }
}

impl Paceline {
    fn send(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.transport.try_send(self.other, &[IoSlice::new(bytes)]).expect("the peer is there") {
                0 => self.idle(),
                sent => bytes = &bytes[sent..],
            }
        }
    }

    fn receive(&mut self, into: &mut [u8]) {
        let mut filled = 0;
        while filled < into.len() {
            match self.transport.try_recv(self.other, &mut into[filled..]).expect("the peer is there") {
                0 => self.idle(),
                got => filled += got,
            }
        }
    }

    fn idle(&mut self) {
        if !self.transport.spin() {
            self.transport.wait(Instant::now() + PATIENCE);
        }
    }
}

// quinn -----------------------------------------------------------------------------------------------------

struct Quinn {
    _endpoint: quinn::Endpoint,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
}

impl Quinn {
    async fn dial(identity: &Identity, datagram: u16, addr: SocketAddr) -> Self {
        let mut tls = builder(rustls::ClientConfig::builder_with_provider)
            .with_root_certificates(roots(identity))
            .with_client_auth_cert(vec![leaf(identity)], key(identity))
            .expect("a matching key");
        tls.alpn_protocols = vec![b"bench".to_vec()];
        let crypto = QuicClientConfig::try_from(tls).expect("TLS 1.3");
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(transport(datagram));
        let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port");
        let connecting = endpoint.connect_with(config, addr, &identity.server_name("m0"));
        let connection = connecting.expect("valid settings").await.expect("the peer is there");
        let (send, receive) = connection.open_bi().await.expect("the peer is there");
        Self { _endpoint: endpoint, send, receive }
    }

    async fn accept(identity: &Identity, datagram: u16) -> Self {
        let mut tls = builder(rustls::ServerConfig::builder_with_provider)
            .with_no_client_auth()
            .with_single_cert(vec![leaf(identity)], key(identity))
            .expect("a matching key");
        tls.alpn_protocols = vec![b"bench".to_vec()];
        let crypto = QuicServerConfig::try_from(tls).expect("TLS 1.3");
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(transport(datagram));
        let endpoint = quinn::Endpoint::server(config, ([127, 0, 0, 1], 0).into()).expect("a free port");
        println!("{}", endpoint.local_addr().expect("bound"));
        let connection = endpoint.accept().await.expect("open").await.expect("the parent dials");
        let (send, receive) = connection.accept_bi().await.expect("the parent is there");
        Self { _endpoint: endpoint, send, receive }
    }
}

fn transport(datagram: u16) -> Arc<quinn::TransportConfig> {
    let mut mtu_discovery = quinn::MtuDiscoveryConfig::default();
    mtu_discovery.upper_bound(datagram);
    let mut config = quinn::TransportConfig::default();
    // Nobody polls it while the others have their turn.
    config.mtu_discovery_config(Some(mtu_discovery)).max_idle_timeout(None);
    Arc::new(config)
}

fn builder<S: rustls::ConfigSide>(
    with_provider: fn(Arc<rustls::crypto::CryptoProvider>) -> rustls::ConfigBuilder<S, rustls::WantsVersions>,
) -> rustls::ConfigBuilder<S, rustls::WantsVerifier> {
    // AES-128-GCM as with us: the comparison is one of the loops, not of the ciphers.
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let aes_128 = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != aes_128);
    with_provider(Arc::new(provider)).with_protocol_versions(&[&rustls::version::TLS13]).expect("TLS 1.3")
}

fn certificates(identity: &Identity) -> Vec<CertificateDer<'static>> {
    let pem = identity.to_pem();
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().expect("our own PEM")
}

fn leaf(identity: &Identity) -> CertificateDer<'static> {
    certificates(identity).remove(0)
}

fn roots(identity: &Identity) -> rustls::RootCertStore {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificates(identity).remove(1)).expect("an authority");
    roots
}

fn key(identity: &Identity) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_slice(identity.to_pem().as_bytes()).expect("our own PEM")
}
