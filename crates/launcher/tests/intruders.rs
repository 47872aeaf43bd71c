//! Strangers at every port of a running job: refused with a line in the log, and the job goes on.

#![allow(clippy::print_stderr, reason = "ranks talk to the test by their output")]

mod job;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use job::process::Process;
use job::{Finished, Job, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use paceline_testing::reference::Numbers;
use paceline_testing::strangers;
use paceline_transport::IoThread;
use paceline_transport::identity::JobAuthority;
use paceline_transport::tls::Dialler;
use quinn::crypto::rustls::QuicClientConfig;

const RANKS: usize = 2;

fn main() {
    let attacks: [(&str, Attack); 3] = [
        (
            "a_client_without_a_certificate_is_refused_and_the_job_goes_on",
            Attack {
                over_udp: without_certificate,
                over_tcp: without_certificate_over_tcp,
                says: "the client has no certificate",
            },
        ),
        (
            "a_client_with_another_jobs_certificate_is_refused_and_the_job_goes_on",
            Attack { over_udp: of_another_job, over_tcp: of_another_job_over_tcp, says: "not of this job" },
        ),
        (
            "random_bytes_are_refused_and_the_job_goes_on",
            Attack { over_udp: random_bytes, over_tcp: random_bytes_over_tcp, says: "does not speak TLS" },
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

/// What a stranger does at a port over UDP, where the kernel drops it without a word, and over TCP, and what the job's
/// log says of that.
#[derive(Clone, Copy)]
struct Attack {
    over_udp: fn(SocketAddr),
    over_tcp: fn(SocketAddr),
    says: &'static str,
}

/// A running job, its processes, and the file that ends it.
struct Victim {
    job: Job,
    processes: Vec<Process>,
    folder: tempfile::TempDir,
}

impl Victim {
    fn start(fabric: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let stop = folder.path().join("stop");
        let path = stop.to_str().expect("the path is text");
        let mut job = Job::start(RANKS, &["--fabric", fabric], "loop", &[path]);
        let mut processes: Vec<Process> =
            job.wait_for("looping", RANKS).iter().map(|line| Process::of_line(line)).collect();
        processes.push(Process::look(job.launcher.id().to_string()));
        for Process { pid, udp, tcp, .. } in &processes {
            assert!(udp.len() + tcp.len() > 0, "process {pid} has no port");
        }
        Self { job, processes, folder }
    }

    /// All ports over UDP, and all over TCP.
    fn ports(&self) -> [Vec<SocketAddr>; 2] {
        let over_udp = self.processes.iter().flat_map(|process| process.udp.clone()).collect();
        let over_tcp = self.processes.iter().flat_map(|process| process.tcp.clone()).collect();
        [over_udp, over_tcp]
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
        // One line from the rendezvous and one from each rank that listens over TCP.
        let [_, expected] = expected;
        victim.job.wait_for(self.says, expected);
        let finished = victim.end();
        let refused = finished.lines.iter().filter(|line| line.contains("refused a connection")).count();
        // A stranger may dial twice; one more line would be of a port over UDP.
        assert!(refused <= 2 * expected, "{}", finished.lines.join("\n"));
    }
}

/// What a process may grow by while it is attacked.
const GROWTH_KIB: u64 = 48 * 1024;

/// Connections at a time that say nothing, to each port over TCP; as many files as a test may have open.
const SILENT_CONNECTIONS: usize = 200;

fn flood(fabric: &str) {
    let victim = Victim::start(fabric);
    let [over_udp, over_tcp] = victim.ports();
    if !over_udp.is_empty() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback has free ports");
        for datagram in &strangers::initial_datagrams(10_000) {
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
    for process in &victim.processes {
        let grown = process.grown_kib();
        assert!(grown < GROWTH_KIB, "process {} has grown by {grown} KiB", process.pid);
    }
    let finished = victim.end();
    let refused = finished.lines.iter().filter(|line| line.contains("refused")).count();
    assert!(refused < 5000, "{refused} lines in the log");
}

fn of_another_job(addr: SocketAddr) {
    let authority = JobAuthority::new("another-job").expect("the name is right");
    let identity = authority.issue("worker-0", Duration::from_secs(3600)).expect("the name is right");
    dial(strangers::tls_config(Some(&identity.to_pem()), strangers::OVER_QUIC), addr);
}

fn without_certificate(addr: SocketAddr) {
    dial(strangers::tls_config(None, strangers::OVER_QUIC), addr);
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
    dial_over_tcp(strangers::tls_config(Some(&identity.to_pem()), strangers::OVER_TCP), addr);
    let dialler = Dialler::new(&io.handle(), &identity).expect("a good identity");
    let refused = io.handle().block_on(async move { dialler.connect(addr, "worker-0").await.is_err() });
    assert_eq!(refused, Ok(true), "a client of another job must not get a connection");
}

fn without_certificate_over_tcp(addr: SocketAddr) {
    dial_over_tcp(strangers::tls_config(None, strangers::OVER_TCP), addr);
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
fn dial_over_tcp(config: rustls::ClientConfig, addr: SocketAddr) {
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

/// Dials for a second, which nobody answers: no refusal either.
fn dial(config: rustls::ClientConfig, addr: SocketAddr) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
        let config = QuicClientConfig::try_from(config).expect("TLS 1.3 has the initial cipher suite");
        let config = quinn::ClientConfig::new(Arc::new(config));
        let connecting = endpoint.connect_with(config, addr, "somebody.example").expect("the call is right");
        let answer = tokio::time::timeout(Duration::from_secs(1), connecting).await;
        assert!(answer.is_err(), "a stranger without the knock was answered: {answer:?}");
    });
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
