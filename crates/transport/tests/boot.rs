//! Getting certificates with a job secret: who gets them, and everybody who must not.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use common::*;
use paceline_transport::boot::{self, BootServer, Certified, Claim, Failure, Registrar, Verdict};
use paceline_transport::identity::JobAuthority;
use paceline_transport::quic::IoThread;
use paceline_transport::secret::JobSecret;
use paceline_transport::{Error, tls};

const SECRET: &str = "an unlikely sequence of words";

/// Lets node 1 in, and counts how often it was asked to let anybody in.
struct Doorkeeper {
    asked: AtomicUsize,
    verdict: Verdict,
}

impl Registrar for Doorkeeper {
    fn admit(&self, claim: &Claim, _: SocketAddr) -> Verdict {
        self.asked.fetch_add(1, Ordering::Relaxed);
        assert_eq!(claim.node, 1, "nobody else knows the secret");
        self.verdict.clone()
    }

    fn may_certify(&self, _: &Claim, member: &str) -> bool {
        ["launcher-1", "worker-2", "worker-3"].contains(&member)
    }
}

struct Job {
    io: IoThread,
    authority: Arc<JobAuthority>,
    doorkeeper: Arc<Doorkeeper>,
    server: BootServer,
}

impl Job {
    fn start(name: &str, verdict: Verdict) -> Self {
        log();
        let io = IoThread::start().expect("a thread");
        let authority = Arc::new(authority(name));
        let doorkeeper = Arc::new(Doorkeeper { asked: AtomicUsize::new(0), verdict });
        let (registrar, secret) = (doorkeeper.clone(), secret(SECRET));
        let server = BootServer::bind(&io.handle(), loopback(), secret, authority.clone(), DAY, registrar);
        Self { io, authority, doorkeeper, server: server.expect("a free port") }
    }

    fn addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Asks at `addr` with the secret `text`.
    fn ask(&self, addr: SocketAddr, text: &str, members: &[&str]) -> Result<Certified, Failure> {
        let (secret, addr) = (secret(text), addr.to_string());
        let members: Vec<String> = members.iter().map(|&member| member.to_owned()).collect();
        let run_id = "run".to_owned();
        let claim = Claim { node: 1, nodes: 2, least_nodes: 2, ranks_per_node: 2, run_id, incarnation: 77 };
        let ask = async move { boot::certify(&addr, &secret, &claim, &members).await };
        self.io.handle().block_on(ask).expect("io runs")
    }

    fn asked(&self) -> usize {
        self.doorkeeper.asked.load(Ordering::Relaxed)
    }

    fn still_works(&self) {
        self.ask(self.addr(), SECRET, &["worker-2"]).expect("the right secret");
    }
}

fn secret(text: &str) -> JobSecret {
    JobSecret::new(text.as_bytes()).expect("long enough")
}

fn refusal(result: Result<Certified, Failure>) -> String {
    match result.expect_err("refused") {
        Failure::Refused(reason) => reason,
        other => panic!("not final: {other:?}"),
    }
}

#[test]
fn a_node_that_knows_the_secret_gets_certificates_that_members_accept() {
    let job = Job::start("boot", Verdict::Admitted);
    let members = ["launcher-1", "worker-2", "worker-3"];
    let certified = job.ask(job.addr(), SECRET, &members).expect("the right secret");
    assert_eq!(certified.valid_for, DAY);
    let names: Vec<&str> = certified.identities.iter().map(|identity| identity.member()).collect();
    assert_eq!(names, members);
    let server = bind(&job.io, &identity(&job.authority, "launcher-0"));
    let client = bind(&job.io, &certified.identities[1]);
    let addr = server.local_addr();
    let dialled = job.io.handle().block_on(async move { client.connect(addr, "launcher-0").await });
    dialled.expect("io runs").expect("a member of the job");
}

#[test]
fn a_node_with_another_secret_is_told_so_and_never_reaches_the_registrar() {
    let job = Job::start("another-secret", Verdict::Admitted);
    let reason = refusal(job.ask(job.addr(), "an unlikely sequence of worms", &["launcher-1"]));
    assert!(reason.contains("does not have this job secret"), "{reason}");
    assert_eq!(job.asked(), 0);
    job.still_works();
}

#[test]
fn a_node_that_asks_for_anothers_ranks_gets_nothing_and_is_logged() {
    let job = Job::start("another-node", Verdict::Admitted);
    for member in ["launcher-0", "worker-1", "worker-4"] {
        let reason = refusal(job.ask(job.addr(), SECRET, &["launcher-1", member]));
        assert!(reason.contains("node 1 asked for a certificate that is not of that node"), "{reason}");
    }
    log().line_with(&["WARN", "refused a launcher", "not of that node"]);
    job.still_works();
}

#[test]
fn the_registrars_verdict_reaches_the_node() {
    let job = Job::start("verdict", Verdict::Refused("no\nsuch node".to_owned()));
    assert_eq!(refusal(job.ask(job.addr(), SECRET, &["launcher-1"])), "no such node");
    let job = Job::start("verdict-2", Verdict::NotNow("later".to_owned()));
    let later = job.ask(job.addr(), SECRET, &["launcher-1"]).expect_err("not now");
    assert_eq!(later, Failure::NotNow("later".to_owned()));
}

#[test]
fn a_recorded_conversation_is_worth_nothing_when_it_is_replayed() {
    let job = Job::start("replay", Verdict::Admitted);
    let (addr, sent) = relay(job.addr());
    job.ask(addr, SECRET, &["launcher-1", "worker-2"]).expect("a relay can listen and learns nothing");
    assert_eq!(job.asked(), 1);
    let recorded = sent.lock().expect("no panic").clone();
    assert!(recorded.len() > 500, "{} bytes", recorded.len());
    let mut replay = TcpStream::connect(job.addr()).expect("it listens");
    replay.set_read_timeout(Some(PATIENCE)).expect("a valid time");
    // It may hang up in the middle.
    let _ = replay.write_all(&recorded);
    let mut answer = Vec::new();
    let _ = replay.read_to_end(&mut answer);
    assert_eq!(job.asked(), 1, "the replay has got in");
    job.still_works();
}

#[test]
fn somebody_in_between_with_a_key_of_his_own_is_not_talked_to() {
    let job = Job::start("between", Verdict::Admitted);
    // He knows everything but the secret: a server of the same release with another one.
    let other = Job::start("between", Verdict::Admitted);
    let io = other.io.handle();
    let registrar = other.doorkeeper.clone();
    let impostor = BootServer::bind(
        &io,
        loopback(),
        secret("0123456789abcdef"),
        other.authority.clone(),
        DAY,
        registrar,
    )
    .expect("a free port");
    let reason = refusal(job.ask(impostor.local_addr(), SECRET, &["launcher-1"]));
    assert!(reason.contains("does not have this job secret"), "{reason}");
    assert_eq!(other.asked(), 0, "the node has said nothing to him");
}

#[test]
fn what_is_no_launcher_is_dialled_again_later() {
    let job = Job::start("no-launcher", Verdict::Admitted);
    let nobody = TcpListener::bind(loopback()).and_then(|listener| listener.local_addr()).expect("a port");
    let failure = job.ask(nobody, SECRET, &["launcher-1"]).expect_err("nobody listens");
    assert_eq!(failure, Failure::Unreachable("nothing listens there".to_owned()));
    let listener = TcpListener::bind(loopback()).expect("a free port");
    let addr = listener.local_addr().expect("bound");
    let web_server = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("it dials");
        let _ = client.read(&mut [0; 1024]);
        client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").expect("written");
    });
    let failure = job.ask(addr, SECRET, &["launcher-1"]).expect_err("a web server");
    assert!(matches!(&failure, Failure::Unreachable(why) if why.contains("is no launcher")), "{failure:?}");
    web_server.join().expect("no panic");
}

#[test]
fn connections_held_open_and_garbage_keep_no_node_out_and_cost_little_memory() {
    let job = Job::start("flood", Verdict::Admitted);
    job.still_works();
    let before = resident_kib();
    let mut held = Vec::new();
    for round in 0..10_000_u32 {
        let Ok(mut stream) = TcpStream::connect(job.addr()) else { continue };
        if round % 2 == 0 {
            let garbage = pattern(round.into(), 600);
            let _ = stream.write_all(&garbage);
        }
        held.push(stream);
        if held.len() > 500 {
            held.remove(0);
        }
        if round % 1000 == 0 {
            job.still_works();
        }
    }
    job.still_works();
    let grown = resident_kib().saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB more");
    let lines = log().lines_with(&["refused a launcher", "no TLS channel"]);
    assert!((1..500).contains(&lines), "{lines} lines in the log");
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn a_renewed_identity_is_shown_to_new_connections_and_the_old_ones_go_on() {
    let authority = authority("renewal");
    let io = IoThread::start().expect("a thread");
    let issue = |member: &str| authority.issue(member, DAY).expect("a name");
    let expired = |member: &str| {
        let long_ago = SystemTime::now() - 3 * DAY;
        authority.issue_at(member, long_ago, DAY).expect("a name")
    };
    let (server_identity, client_identity) = (issue("server"), issue("client"));
    let (server, client) = (bind(&io, &server_identity), bind(&io, &client_identity));
    let addr = server.local_addr();
    let dial = || {
        let client = client.clone();
        io.handle().block_on(async move { client.connect(addr, "server").await }).expect("io runs")
    };
    let old = dial().expect("both are valid");
    server_identity.renew(&expired("server")).expect("the same member");
    let refused = dial().expect_err("the server's leaf has expired").to_string();
    assert!(refused.contains("its certificate has expired"), "{refused}");
    server_identity.renew(&issue("server")).expect("the same member");
    client_identity.renew(&expired("client")).expect("the same member");
    let refused = dial().expect_err("the client's leaf has expired").to_string();
    assert!(refused.contains("it says that our certificate has expired"), "{refused}");
    client_identity.renew(&issue("client")).expect("the same member");
    dial().expect("both are valid again");
    // The old connection is as good as before.
    let (accepting, opening) = (server.clone(), old.clone());
    let talk = async move {
        let accepted = accepting.accept().await.expect("the first connection");
        let (mut sender, _receiver) = opening.open_messages().await?;
        let (_sender, mut receiver) = accepted.accept_messages().await?;
        sender.send(&7_u32).await?;
        receiver.recv::<u32>().await
    };
    assert_eq!(io.handle().block_on(talk), Ok(Ok(Some(7))));

    let namesake = common::authority("renewal").issue("server", DAY).expect("a name");
    for other in [issue("somebody-else"), namesake] {
        assert!(server_identity.renew(&other).is_err());
    }
    dial().expect("a refused renewal changes nothing");
}

#[test]
fn launchers_and_members_share_a_port() {
    let mut job = Job::start("one-port", Verdict::Admitted);
    let io = job.io.handle();
    let launcher = identity(&job.authority, "launcher-0");
    let endpoint = tls::Endpoint::bind(&io, loopback(), &launcher).expect("a free port");
    let (authority, registrar) = (job.authority.clone(), job.doorkeeper.clone());
    let beside =
        |registrar| BootServer::beside(&io, &endpoint, secret(SECRET), authority.clone(), DAY, registrar);
    job.server = beside(registrar.clone()).expect("nobody else is there");
    assert!(matches!(beside(registrar), Err(Error::Usage { .. })), "one service beside the members");
    let certified = job.ask(endpoint.local_addr(), SECRET, &["worker-2"]).expect("the right secret");
    let member = tls::Dialler::new(&io, &certified.identities[0]).expect("a good identity");
    let addr = endpoint.local_addr();
    let dialled = io.block_on(async move { member.connect(addr, "launcher-0").await.map(drop) });
    assert_eq!(dialled, Ok(Ok(())), "the same port serves the new member");
    let wrong = job.ask(addr, "another secret, as long", &["worker-2"]);
    assert!(wrong.is_err(), "and nobody who does not know the secret");
}
