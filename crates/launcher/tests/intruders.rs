//! Strangers at every port of a running job: refused with a line in the log, and the job goes on.

#![allow(clippy::print_stderr, reason = "ranks talk to the test by their output")]

mod job;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use job::{Finished, Job, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use paceline_testing::reference::Numbers;
use paceline_transport::identity::JobAuthority;
use paceline_transport::tls::Dialler;
use paceline_transport::{IoThread, quic};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

const RANKS: usize = 2;

fn main() {
    let attacks: [(&str, Attack); 3] = [
        (
            "a_client_without_a_certificate_is_refused_and_the_job_goes_on",
            Attack {
                over_udp: without_certificate,
                over_tcp: without_certificate_over_tcp,
                says: ["the client has no certificate"; 2],
            },
        ),
        (
            "a_client_with_another_jobs_certificate_is_refused_and_the_job_goes_on",
            Attack {
                over_udp: of_another_job,
                over_tcp: of_another_job_over_tcp,
                says: ["not of this job"; 2],
            },
        ),
        (
            "random_bytes_are_refused_and_the_job_goes_on",
            Attack {
                over_udp: random_bytes,
                over_tcp: random_bytes_over_tcp,
                says: ["not QUIC", "does not speak TLS"],
            },
        ),
    ];
    job::main(rank, || {
        let on = |fabric: &'static str| {
            attacks.map(|(name, attack)| trial(format!("{name}::{fabric}"), move || attack.run(fabric)))
        };
        let flood_over = |fabric: &'static str| {
            let name = "ten_thousand_half_open_handshakes_and_a_flood_cost_little_memory_and_the_job_goes_on";
            trial(format!("{name}::{fabric}"), move || flood(fabric))
        };
        let fabrics = ["quic", "tls"];
        fabrics.into_iter().flat_map(on).chain(fabrics.map(flood_over)).collect()
    });
}

/// What a stranger does at a port, and what the job's log says of it, over UDP and over TCP.
#[derive(Clone, Copy)]
struct Attack {
    over_udp: fn(SocketAddr),
    over_tcp: fn(SocketAddr),
    says: [&'static str; 2],
}

/// A running job, its processes with their ports over UDP and over TCP, and the file that ends it.
struct Victim {
    job: Job,
    processes: Vec<(String, [Vec<SocketAddr>; 2])>,
    folder: tempfile::TempDir,
}

impl Victim {
    fn start(fabric: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let stop = folder.path().join("stop");
        let path = stop.to_str().expect("the path is text");
        let mut job = Job::start(RANKS, &["--fabric", fabric], "loop", &[path]);
        let mut pids: Vec<String> = job
            .wait_for("looping", RANKS)
            .iter()
            .map(|line| line.rsplit(' ').next().expect("the line ends with the pid").to_owned())
            .collect();
        pids.push(job.launcher.id().to_string());
        let with_ports = |pid: String| {
            let addrs = |protocol| -> Vec<SocketAddr> {
                ports(&pid, protocol).into_iter().map(|port| ([127, 0, 0, 1], port).into()).collect()
            };
            let ports = [addrs("udp"), addrs("tcp")];
            assert!(!ports.concat().is_empty(), "process {pid} has no port");
            (pid, ports)
        };
        Self { job, processes: pids.into_iter().map(with_ports).collect(), folder }
    }

    /// All ports over UDP, and all over TCP.
    fn ports(&self) -> [Vec<SocketAddr>; 2] {
        [0, 1].map(|which| self.processes.iter().flat_map(|(_, ports)| ports[which].clone()).collect())
    }

    /// Ends the job, which must have gone on.
    fn end(self) -> Finished {
        fs::write(self.folder.path().join("stop"), "").expect("the folder can be written");
        let finished: Finished = self.job.finish();
        finished.assert_success();
        assert_eq!(finished.lines_with("looped well").len(), RANKS, "{}", finished.lines.join("\n"));
        finished
    }
}

impl Attack {
    /// Runs a job, attacks the rendezvous and every rank's port, and looks at the logs.
    fn run(self, fabric: &str) {
        let mut victim = Victim::start(fabric);
        let ports = victim.ports();
        let expected = if fabric == "quic" { [RANKS, 1] } else { [0, RANKS + 1] };
        assert_eq!(ports.each_ref().map(Vec::len), expected, "ports of {RANKS} ranks and the launcher");
        for (ports, attacker) in ports.into_iter().zip([self.over_udp, self.over_tcp]) {
            ports.into_iter().for_each(attacker);
        }
        // One line from the rendezvous and one from each rank.
        for (text, count) in self.says.into_iter().zip(expected) {
            victim.job.wait_for(text, count);
        }
        victim.end();
    }
}

/// What a process may grow by while it is attacked.
const GROWTH_KIB: u64 = 48 * 1024;

/// Connections at a time that say nothing, to each port over TCP; as many files as a test may have open.
const SILENT_CONNECTIONS: usize = 200;

fn flood(fabric: &str) {
    let victim = Victim::start(fabric);
    let before: Vec<u64> = victim.processes.iter().map(|(pid, _)| peak_kib(pid)).collect();
    let [over_udp, over_tcp] = victim.ports();
    if !over_udp.is_empty() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback has free ports");
        for datagram in &first_datagrams(10_000) {
            for addr in &over_udp {
                // A full socket buffer drops datagrams, which is all right here.
                let _ = socket.send_to(datagram, addr);
            }
        }
    }
    for &addr in &over_tcp {
        for _ in 0..10_000 / SILENT_CONNECTIONS / over_tcp.len() {
            // Refused or not answered: either is all right.
            let silent = (0..SILENT_CONNECTIONS)
                .filter_map(|_| TcpStream::connect_timeout(&addr, Duration::from_millis(20)).ok());
            drop(silent.collect::<Vec<_>>());
        }
    }
    for _ in 0..20 {
        over_udp.iter().copied().for_each(random_bytes);
        over_tcp.iter().copied().for_each(random_bytes_over_tcp);
    }
    for ((pid, _), before) in victim.processes.iter().zip(before) {
        let grown = peak_kib(pid).saturating_sub(before);
        assert!(grown < GROWTH_KIB, "process {pid} has grown by {grown} KiB");
    }
    let finished = victim.end();
    let refused = finished.lines.iter().filter(|line| line.contains("refused")).count();
    assert!(refused < 5000, "{refused} lines in the log");
}

/// The most memory that a process has had.
fn peak_kib(pid: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// The first datagrams of `count` handshakes that nobody will continue.
fn first_datagrams(count: usize) -> Vec<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let sink = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("loopback has free ports");
        let addr = sink.local_addr().expect("it is bound");
        let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
        let mut tls = stranger(None);
        tls.alpn_protocols = vec![b"paceline/1".to_vec()];
        let config = QuicClientConfig::try_from(tls).expect("TLS 1.3 has the initial cipher suite");
        let config = quinn::ClientConfig::new(Arc::new(config));
        // By the name that the client gives the server (RFC 9000, 17.2): clients repeat themselves.
        let mut datagrams = std::collections::HashMap::new();
        let mut buffer = [0; 2048];
        while datagrams.len() < count {
            let connecting = endpoint.connect_with(config.clone(), addr, "somebody.example").expect("a call");
            let before = datagrams.len();
            while datagrams.len() == before {
                let len = sink.recv(&mut buffer).await.expect("a first datagram");
                datagrams.entry(buffer[6..14].to_vec()).or_insert_with(|| buffer[..len].to_vec());
            }
            drop(connecting);
        }
        datagrams.into_values().collect()
    })
}

/// The ports a process listens on, by the inodes of its sockets.
fn ports(pid: &str, protocol: &str) -> Vec<u16> {
    /// TCP_LISTEN, and for UDP a socket that is not connected.
    const LISTENING: [&str; 2] = ["0A", "07"];
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("the process runs")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = fs::read_to_string(format!("/proc/net/{protocol}")).expect("Linux has it");
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|columns| LISTENING.contains(&columns[3]) && sockets.iter().any(|inode| inode == columns[9]))
        .map(|columns| columns[1].split_once(':').expect("address:port").1)
        .map(|port| u16::from_str_radix(port, 16).expect("a hexadecimal port"))
        .collect()
}

fn of_another_job(addr: SocketAddr) {
    let io = IoThread::start().expect("a thread can be started");
    let authority = JobAuthority::new("another-job").expect("the name is right");
    let identity = authority.issue("worker-0", Duration::from_secs(3600)).expect("the name is right");
    let here = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = quic::Endpoint::bind(&io.handle(), here, &identity).expect("loopback has free ports");
    // Another job's client would refuse the server as well; this one talks to anybody.
    let mut config = stranger(Some(&identity.to_pem()));
    config.alpn_protocols = vec![b"paceline/1".to_vec()];
    dial(config, addr);
    let client = endpoint.clone();
    let refused = io.handle().block_on(async move { client.connect(addr, "worker-0").await.is_err() });
    assert_eq!(refused, Ok(true), "a client of another job must not get a connection");
}

fn without_certificate(addr: SocketAddr) {
    let mut config = stranger(None);
    config.alpn_protocols = vec![b"paceline/1".to_vec()];
    dial(config, addr);
}

fn random_bytes(addr: SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback has free ports");
    let mut numbers = Numbers(u64::from(addr.port()));
    for _ in 0..1000 {
        let len = (numbers.draw() % 1400) as usize + 1;
        let bytes: Vec<u8> = (0..len).map(|_| numbers.draw() as u8).collect();
        // A full socket buffer drops datagrams, which is all right here.
        let _ = socket.send_to(&bytes, addr);
    }
}

fn of_another_job_over_tcp(addr: SocketAddr) {
    let io = IoThread::start().expect("a thread can be started");
    let authority = JobAuthority::new("another-job").expect("the name is right");
    let identity = authority.issue("worker-0", Duration::from_secs(3600)).expect("the name is right");
    // Another job's client would refuse the server as well; this one talks to anybody.
    dial_over_tcp(stranger(Some(&identity.to_pem())), addr);
    let dialler = Dialler::new(&io.handle(), &identity).expect("a good identity");
    let refused = io.handle().block_on(async move { dialler.connect(addr, "worker-0").await.is_err() });
    assert_eq!(refused, Ok(true), "a client of another job must not get a connection");
}

fn without_certificate_over_tcp(addr: SocketAddr) {
    dial_over_tcp(stranger(None), addr);
}

fn random_bytes_over_tcp(addr: SocketAddr) {
    let mut socket = TcpStream::connect(addr).expect("it listens");
    let mut numbers = Numbers(u64::from(addr.port()));
    let bytes: Vec<u8> = (0..100_000).map(|_| numbers.draw() as u8).collect();
    // Refused in the middle.
    let _ = socket.write_all(&bytes);
    until_closed(&mut socket);
}

/// Dials and waits until the server has closed the connection.
fn dial_over_tcp(mut config: rustls::ClientConfig, addr: SocketAddr) {
    config.alpn_protocols = vec![b"paceline-tcp/1".to_vec()];
    let name = "somebody.example".try_into().expect("a name");
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).expect("the settings are right");
    let mut socket = TcpStream::connect(addr).expect("it listens");
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a time");
    // In TLS 1.3 a client is done before the server has looked at its certificate.
    let _ = tls.complete_io(&mut socket);
    let error = rustls::Stream::new(&mut tls, &mut socket).read(&mut [0]);
    assert!(!matches!(error, Ok(1..)), "a stranger is refused");
    until_closed(&mut socket);
}

fn until_closed(socket: &mut TcpStream) {
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a time");
    let mut buffer = [0; 1024];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("a stranger's connection stays open: {error}"),
        }
    }
}

/// A TLS client that believes every server, with the certificate and key of a PEM bundle or with none.
fn stranger(bundle: Option<&str>) -> rustls::ClientConfig {
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider knows TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(default_provider())));
    let Some(bundle) = bundle else { return builder.with_no_client_auth() };
    use rustls::pki_types::pem::PemObject;
    let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(bundle.as_bytes()).expect("a key");
    let leaf = CertificateDer::from_pem_slice(bundle.as_bytes()).expect("a certificate");
    builder.with_client_auth_cert(vec![leaf], key).expect("they fit")
}

/// Dials and waits until the server has closed the connection.
fn dial(config: rustls::ClientConfig, addr: SocketAddr) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
        let config = QuicClientConfig::try_from(config).expect("TLS 1.3 has the initial cipher suite");
        let config = quinn::ClientConfig::new(Arc::new(config));
        let connecting = endpoint.connect_with(config, addr, "somebody.example").expect("the call is right");
        let refused = async {
            match connecting.await {
                // A QUIC client may hold a connection that the server has refused: it hears of it later.
                Ok(connection) => connection.closed().await,
                Err(error) => error,
            }
        };
        tokio::time::timeout(Duration::from_secs(10), refused).await.expect("a stranger is refused");
    });
}

#[derive(Debug)]
struct Gullible(CryptoProvider);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Reduces until the file appears; rank 0 looks and tells the other.
fn rank(_: &str, args: &[String]) {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let mut world = World::join().expect("all ranks are started");
    let rank = world.rank();
    eprintln!("rank {rank} looping as {}", std::process::id());
    let mut stop = [0.0f32];
    while stop[0] == 0.0 {
        let mut buffer = vec![1.0f32; 10_000];
        world.communicator().all_reduce(&mut buffer, ReduceOp::Sum).expect("the job goes on");
        assert!(buffer.iter().all(|&sum| sum == RANKS as f32), "a sum is wrong");
        stop[0] = if rank == 0 && fs::exists(&args[0]).expect("the folder can be read") { 1.0 } else { 0.0 };
        world.communicator().broadcast(&mut stop, 0).expect("the job goes on");
    }
    world.leave().expect("all ranks leave");
    eprintln!("rank {rank} looped well");
}
