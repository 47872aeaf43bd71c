//! Who is turned away from TLS links, what is logged about it, and that the job goes on. And members that
//! break the rules once they are in.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::*;
use paceline_transport::identity::{Identity, JobAuthority};
use paceline_transport::tls::{Connection, Endpoint, TlsTransport};
use paceline_transport::{Error, IoThread, Member, Roster};
use serde::{Deserialize, Serialize};

const ALPN: &[u8] = b"paceline-tcp/1";

/// The messages of the protocol, as a client of another implementation would define them.
#[derive(Serialize)]
struct Hello<'a> {
    protocol_version: u16,
    job: &'a str,
    ticket: Option<[u8; 16]>,
}

#[derive(Deserialize)]
struct Welcome {
    #[expect(dead_code, reason = "that it comes is what counts")]
    protocol_version: u16,
}

#[derive(Serialize)]
struct LinkHello<'a> {
    job: &'a str,
    epoch: u64,
    group: u64,
    from: usize,
    to: usize,
}

#[derive(Deserialize)]
struct BringData {
    ticket: [u8; 16],
}

#[derive(Deserialize)]
struct LinkWelcome {
    epoch: u64,
}

#[derive(Serialize)]
#[expect(dead_code, reason = "the order of the variants is the protocol's")]
enum Control {
    Message(Vec<u8>),
    Goodbye,
}

/// A hand-made connection.
type Raw = rustls::StreamOwned<rustls::ClientConnection, TcpStream>;

/// Connects by hand; the TLS handshake happens at the first write.
fn raw_dial(addr: SocketAddr, disguise: &Disguise<'_>, member: &str) -> Raw {
    let name = disguise.trusts.server_name(member).try_into().expect("a name");
    let tls = rustls::ClientConnection::new(Arc::new(raw_tls_config(disguise)), name);
    let socket = TcpStream::connect(addr).expect("it listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a valid time");
    rustls::StreamOwned::new(tls.expect("valid settings"), socket)
}

/// Reads until the other side has closed the connection; returns what came, or the error that came.
fn read_to_end(raw: &mut impl Read) -> Result<Vec<u8>, std::io::Error> {
    let mut all = Vec::new();
    match raw.read_to_end(&mut all) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("it stays open"),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(all),
        Err(error) => Err(error),
        Ok(_) => Ok(all),
    }
}

fn read_framed<T: serde::de::DeserializeOwned>(raw: &mut Raw) -> T {
    let mut len = [0; 4];
    raw.read_exact(&mut len).expect("a message");
    let mut body = vec![0; u32::from_le_bytes(len) as usize];
    raw.read_exact(&mut body).expect("a message");
    paceline_transport::wire::decode(&body).expect("a message of this kind")
}

/// An endpoint of the member `server`, with an I/O thread for it and one for whoever dials it.
struct Server {
    authority: JobAuthority,
    endpoint: Endpoint,
    io: IoThread,
    _server_io: IoThread,
}

impl Server {
    fn start(job: &str) -> Self {
        log();
        let authority = authority(job);
        let server_io = IoThread::start().expect("a thread");
        let endpoint = bind_tls(&server_io, &identity(&authority, "server"));
        Self { authority, endpoint, io: IoThread::start().expect("a thread"), _server_io: server_io }
    }

    fn addr(&self) -> SocketAddr {
        self.endpoint.local_addr()
    }

    fn dial(&self, client: &Endpoint, member: &str) -> Result<Connection, Error> {
        let (client, addr, member) = (client.clone(), self.addr(), member.to_owned());
        self.io.handle().block_on(async move { client.connect(addr, &member).await }).expect("io runs")
    }

    fn accept(&self) -> Connection {
        let endpoint = self.endpoint.clone();
        let accept = async move { tokio::time::timeout(PATIENCE, endpoint.accept()).await };
        let accepted = self.io.handle().block_on(accept).expect("io runs");
        accepted.expect("somebody came").expect("the endpoint is open")
    }

    /// Dials by hand, says `first`, and waits until the connection has ended. Returns the client's address and what
    /// it got.
    fn raw_talk(&self, disguise: &Disguise<'_>, first: &[u8]) -> (String, Result<Vec<u8>, std::io::Error>) {
        let mut raw = raw_dial(self.addr(), disguise, "server");
        let local = raw.sock.local_addr().expect("connected").to_string();
        let talk = raw.write_all(first).and_then(|()| raw.flush());
        (local, talk.and_then(|()| read_to_end(&mut raw)))
    }

    /// A member still gets in, after whatever the test did.
    fn still_works(&self) {
        let member = bind_tls(&self.io, &identity(&self.authority, "member"));
        self.dial(&member, "server").expect("a member gets in");
        assert_eq!(self.accept().member(), "member");
    }
}

fn bind_tls(io: &IoThread, identity: &Identity) -> Endpoint {
    Endpoint::bind(&io.handle(), loopback(), identity).expect("a free port on loopback")
}

fn refusal(result: Result<Connection, Error>) -> String {
    match result.expect_err("refused") {
        Error::Refused { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

fn refused_line(client: &str) -> String {
    log().line_with(&["WARN", "refused a connection", client])
}

#[test]
fn a_member_is_accepted_by_name_and_both_sides_know_each_other() {
    let server = Server::start("accepted");
    let client = bind_tls(&server.io, &identity(&server.authority, "client"));
    let dialled = server.dial(&client, "server").expect("a member gets in");
    let accepted = server.accept();
    assert_eq!((dialled.member(), accepted.member()), ("server", "client"));
    assert_eq!(dialled.remote_address(), server.addr());
    let talk = async move {
        let (mut to, _) = accepted.open_messages().await?;
        let (_, mut from) = dialled.accept_messages().await?;
        to.send(&7_u64).await?;
        let number = from.recv::<u64>().await?;
        accepted.close("that was all");
        let end = from.recv::<u64>().await.expect_err("it is closed");
        assert!(dialled.open_messages().await.is_err(), "there is one lane");
        Ok::<_, Error>((number, end.to_string()))
    };
    let (number, end) = server.io.handle().block_on(talk).expect("io runs").expect("both are there");
    assert_eq!(number, Some(7));
    assert!(end.contains("that was all"), "{end}");
}

#[test]
fn a_lane_that_is_finished_ends_behind_its_last_message() {
    let server = Server::start("finished");
    let client = bind_tls(&server.io, &identity(&server.authority, "client"));
    let dialled = server.dial(&client, "server").expect("a member gets in");
    let accepted = server.accept();
    let talk = async move {
        let (mut to, _back) = accepted.open_messages().await?;
        let (_, mut from) = dialled.accept_messages().await?;
        for number in 0..1000_u64 {
            to.send(&number).await?;
        }
        to.finish().await?;
        drop((accepted, _back));
        for number in 0..1000_u64 {
            assert_eq!(from.recv().await?, Some(number));
        }
        from.recv::<u64>().await
    };
    assert_eq!(server.io.handle().block_on(talk).expect("io runs"), Ok(None));
}

#[test]
fn bytes_behind_a_message_arrive_whole_and_between_messages() {
    let server = Server::start("bytes");
    let client = bind_tls(&server.io, &identity(&server.authority, "client"));
    let dialled = server.dial(&client, "server").expect("a member gets in");
    let accepted = server.accept();
    // None, one, a record and one more, and more than sockets and buffers hold.
    let sizes = [0, 1, 16_385, 9_000_000];
    let talk = async move {
        let (mut to, _back) = accepted.open_messages().await?;
        let (_, mut from) = dialled.accept_messages().await?;
        let send = async {
            for size in sizes {
                to.send_with_bytes(&size, &pattern(size as u64, size)).await?;
                to.send(&(size + 1)).await?;
            }
            to.finish().await
        };
        let receive = async {
            for size in sizes {
                assert_eq!(from.recv().await?, Some(size));
                let mut bytes = vec![0; size];
                from.recv_bytes(&mut bytes).await?;
                assert!(bytes == pattern(size as u64, size), "{size} bytes");
                assert_eq!(from.recv().await?, Some(size + 1));
            }
            from.recv_bytes(&mut [0]).await
        };
        let (sent, received) = tokio::join!(send, receive);
        sent.map(|()| received)
    };
    let after_the_end = server.io.handle().block_on(talk).expect("io runs").expect("all is sent");
    assert!(matches!(after_the_end, Err(Error::Wire(_))), "{after_the_end:?}");
}

#[test]
fn a_lane_is_of_no_use_after_bytes_that_were_cut_off() {
    let server = Server::start("cut-off");
    let client = bind_tls(&server.io, &identity(&server.authority, "client"));
    let dialled = server.dial(&client, "server").expect("a member gets in");
    let accepted = server.accept();
    let talk = async move {
        let (mut to, _back) = accepted.open_messages().await?;
        let (_forth, mut from) = dialled.accept_messages().await?;
        let bytes = vec![7; 64 << 20];
        let sent = tokio::time::timeout(Duration::from_millis(50), to.send_with_bytes(&1_u64, &bytes)).await;
        assert!(sent.is_err(), "nobody reads");
        let again = to.send(&2_u64).await.expect_err("the other side would take it for the rest");
        drop((to, _back, accepted));
        assert_eq!(from.recv::<u64>().await?, Some(1));
        let rest = from.recv_bytes(&mut vec![0; bytes.len()]).await;
        Ok::<_, Error>((again, rest))
    };
    let (again, rest) = server.io.handle().block_on(talk).expect("io runs").expect("both are there");
    assert!(again.to_string().contains("was cut off"), "{again}");
    assert!(rest.is_err(), "the rest is missing");
}

#[test]
fn a_client_without_a_certificate_is_refused_and_told_and_logged() {
    let server = Server::start("no-cert");
    let trusts = server.endpoint.identity();
    let (client, got) = server.raw_talk(&Disguise { shows: None, trusts, alpn: ALPN }, b"hello");
    let error = got.expect_err("an alert").to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
    assert!(refused_line(&client).contains("the client has no certificate"));
    server.still_works();
}

#[test]
fn a_client_of_another_job_is_refused_and_logged() {
    let server = Server::start("our-job");
    // Also when the other job has the same name: the authority counts.
    for job in ["their-job", "our-job"] {
        let stranger = identity(&authority(job), "stranger");
        let disguise = Disguise { shows: Some(&stranger), trusts: server.endpoint.identity(), alpn: ALPN };
        let (client, got) = server.raw_talk(&disguise, b"hello");
        assert!(got.is_err(), "an alert");
        let line = refused_line(&client);
        assert!(line.contains("its certificate is not of this job"), "{line}");
    }
    server.still_works();
}

#[test]
fn a_server_of_another_job_is_not_talked_to() {
    let server = Server::start("their-server");
    let client = bind_tls(&server.io, &identity(&authority("their-server"), "client"));
    let reason = refusal(server.dial(&client, "server"));
    assert!(reason.contains("its certificate is not of this job"), "{reason}");
    let line = log().line_with(&["WARN", "refused a connection", "our certificate is not of its job"]);
    assert!(line.contains("it says that"), "{line}");
    server.still_works();
}

#[test]
fn an_expired_certificate_is_refused_on_either_side() {
    let server = Server::start("expired");
    let expired = |member: &str| {
        let issued = SystemTime::now() - 3 * DAY;
        server.authority.issue_at(member, issued, DAY).expect("a valid name")
    };
    let client = bind_tls(&server.io, &expired("client"));
    let reason = refusal(server.dial(&client, "server"));
    assert!(reason.contains("it says that our certificate has expired"), "{reason}");
    log().line_with(&["WARN", "refused a connection", "its certificate has expired"]);

    let old_server = bind_tls(&server.io, &expired("server"));
    let client = bind_tls(&server.io, &identity(&server.authority, "client"));
    let addr = old_server.local_addr();
    let dial = async move { client.connect(addr, "server").await };
    let reason = refusal(server.io.handle().block_on(dial).expect("io runs"));
    assert!(reason.contains("its certificate has expired"), "{reason}");
    server.still_works();
}

#[test]
fn a_client_of_another_protocol_is_refused() {
    let server = Server::start("alpn");
    let member = identity(&server.authority, "client");
    // QUIC's name as well: neither can be taken for the other.
    for alpn in [&b"h2"[..], b"paceline/1", b"paceline-tcp/999"] {
        let trusts = server.endpoint.identity();
        let (client, got) = server.raw_talk(&Disguise { shows: Some(&member), trusts, alpn }, b"hello");
        assert!(got.is_err(), "an alert");
        let line = refused_line(&client);
        assert!(line.contains("does not speak this protocol"), "{line}");
    }
    server.still_works();
}

#[test]
fn the_wrong_member_behind_an_address_is_not_talked_to() {
    let server = Server::start("wrong-member");
    let client = bind_tls(&server.io, &identity(&server.authority, "client"));
    let reason = refusal(server.dial(&client, "somebody-else"));
    assert!(reason.contains("does not name the member that was dialled"), "{reason}");
    server.still_works();
}

#[test]
fn a_hello_that_does_not_fit_is_refused_with_the_reason() {
    let server = Server::start("hello");
    let member = identity(&server.authority, "client");
    let say = |hello: Vec<u8>| {
        let disguise = Disguise { shows: Some(&member), trusts: server.endpoint.identity(), alpn: ALPN };
        let (_, got) = server.raw_talk(&disguise, &hello);
        String::from_utf8_lossy(&got.expect("the certificate is good")).into_owned()
    };
    let closed = say(framed(&Hello { protocol_version: 2, job: "hello", ticket: None }));
    assert!(closed.contains("it speaks version 2 of the protocol and we speak 1"), "{closed}");
    let closed = say(framed(&Hello { protocol_version: 1, job: "goodbye", ticket: None }));
    assert!(closed.contains(r#"looking for the job "goodbye""#), "{closed}");
    let closed = say(framed(&Hello { protocol_version: 1, job: "hello", ticket: Some([7; 16]) }));
    assert!(closed.contains("a ticket for a data connection that nobody has given out"), "{closed}");
    let closed = say(0x7fff_ffff_u32.to_le_bytes().to_vec());
    assert!(closed.contains("over the limit"), "{closed}");
    let closed = say([&3_u32.to_le_bytes()[..], &[0xff; 3]].concat());
    assert!(closed.contains("malformed"), "{closed}");
    server.still_works();
}

#[test]
fn a_recorded_handshake_is_worth_nothing_when_it_is_replayed() {
    let server = Server::start("replay");
    let (addr, sent) = relay(server.addr());
    let client = bind_tls(&server.io, &identity(&server.authority, "client"));
    let dial = async move { client.connect(addr, "server").await };
    let dialled = server.io.handle().block_on(dial).expect("io runs").expect("who listens changes nothing");
    assert_eq!(server.accept().member(), "client");
    let recorded = sent.lock().expect("no panic").clone();
    assert!(recorded.len() > 500, "{} bytes: a hello, a certificate, a message", recorded.len());
    let mut replay = TcpStream::connect(server.addr()).expect("it listens");
    replay.set_read_timeout(Some(PATIENCE)).expect("a valid time");
    let local = replay.local_addr().expect("connected").to_string();
    // Refused in the middle.
    let _ = replay.write_all(&recorded);
    let _ = read_to_end(&mut replay);
    refused_line(&local);
    // Whom it accepts next is no second client.
    server.still_works();
    drop(dialled);
}

#[test]
fn a_client_that_offers_no_more_than_tls_1_2_is_refused() {
    let server = Server::start("old-client");
    let member = identity(&server.authority, "client");
    let disguise = Disguise { shows: Some(&member), trusts: &member, alpn: ALPN };
    let config = tls_config_of(&disguise, &rustls::version::TLS12);
    let name = member.server_name("server").try_into().expect("a name");
    let tls = rustls::ClientConnection::new(Arc::new(config), name).expect("valid settings");
    let socket = TcpStream::connect(server.addr()).expect("it listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a valid time");
    let local = socket.local_addr().expect("connected").to_string();
    let mut raw = rustls::StreamOwned::new(tls, socket);
    let error = raw.write_all(b"hello").expect_err("an alert").to_string();
    assert!(error.contains("ProtocolVersion"), "{error}");
    let line = refused_line(&local);
    assert!(line.contains("it does not speak TLS 1.3"), "{line}");
    server.still_works();
}

/// A server that says `answer` to whoever dials it, and hears what it is told until the end.
fn answers_all_with(answer: &'static [u8]) -> (SocketAddr, thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind(loopback()).expect("a free port");
    let addr = listener.local_addr().expect("bound");
    let server = thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("it dials");
        client.set_read_timeout(Some(PATIENCE)).expect("a valid time");
        client.write_all(answer).expect("written");
        let mut heard = Vec::new();
        let _ = client.read_to_end(&mut heard);
        heard
    });
    (addr, server)
}

#[test]
fn a_server_that_answers_in_plain_bytes_or_an_old_version_hears_a_first_message_and_no_more() {
    let server = Server::start("downgrade");
    let plain = framed(&1_u16).leak();
    // A ServerHello of TLS 1.2: its version, a random number, no session, a suite, no compression.
    let old = [&[22, 3, 3, 0, 42, 2, 0, 0, 38, 3, 3][..], &[7; 32], &[0, 0xc0, 0x2b, 0]].concat().leak();
    for (answer, says) in [(&*plain, "does not speak TLS"), (old, "does not speak TLS 1.3")] {
        let (addr, answers) = answers_all_with(answer);
        let client = bind_tls(&server.io, &identity(&server.authority, "client"));
        let dial = async move { client.connect(addr, "server").await };
        let reason = refusal(server.io.handle().block_on(dial).expect("io runs"));
        assert!(reason.contains(says), "{reason}");
        let heard = answers.join().expect("no panic");
        let mut rest = heard.as_slice();
        let mut kinds = Vec::new();
        while let Some((&[kind, _, _, high, low], after)) = rest.split_first_chunk::<5>() {
            kinds.push(kind);
            rest = &after[usize::from(high) << 8 | usize::from(low)..];
        }
        // The first message of a handshake (22), and maybe an alert (21); nothing for anybody to read.
        assert!(matches!(kinds[..], [22] | [22, 21]) && rest.is_empty(), "{kinds:?}, {rest:?}");
    }
}

#[test]
fn bytes_that_are_not_tls_are_refused_and_logged() {
    let server = Server::start("garbage");
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &pattern(5, 1 << 20)] {
        let mut socket = TcpStream::connect(server.addr()).expect("it listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("a valid time");
        let local = socket.local_addr().expect("connected").to_string();
        // Refused in the middle.
        let _ = socket.write_all(garbage);
        let _ = read_to_end(&mut socket);
        let line = refused_line(&local);
        assert!(line.contains("it does not speak TLS"), "{line}");
    }
    server.still_works();
}

#[test]
fn half_open_handshakes_hold_up_nobody_and_the_oldest_give_way() {
    let server = Server::start("half-open");
    // More than may be in progress at a time.
    let mut sockets: Vec<TcpStream> =
        (0..600).map(|_| TcpStream::connect(server.addr()).expect("it listens")).collect();
    let started = Instant::now();
    server.still_works();
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    for socket in &mut sockets[..300] {
        socket.set_read_timeout(Some(SOON)).expect("a valid time");
        assert!(matches!(socket.read(&mut [0]), Ok(0)), "the oldest are closed before their time");
    }
}

#[test]
fn a_client_that_never_says_hello_holds_up_nobody() {
    let server = Server::start("mute");
    let member = identity(&server.authority, "client");
    let disguise = Disguise { shows: Some(&member), trusts: server.endpoint.identity(), alpn: ALPN };
    let mut raw = raw_dial(server.addr(), &disguise, "server");
    let local = raw.sock.local_addr().expect("connected").to_string();
    raw.conn.complete_io(&mut raw.sock).expect("the certificate is good");
    server.still_works();
    assert!(refused_line(&local).contains("not finished within 5 s"));
}

#[test]
fn an_address_in_use_is_named() {
    let server = Server::start("in-use");
    let again = Endpoint::bind(&server.io.handle(), server.addr(), &identity(&server.authority, "again"));
    let error = again.expect_err("the port is taken").to_string();
    assert!(error.contains(&server.addr().to_string()) && error.contains("in use"), "{error}");
}

#[test]
fn a_stopped_io_thread_is_an_error_and_no_panic() {
    let server = Server::start("stopped");
    let (handle, addr) = (server.io.handle(), server.addr());
    let client = bind_tls(&server.io, &identity(&server.authority, "client"));
    let member = identity(&server.authority, "late");
    drop(server);
    let late = Endpoint::bind(&handle, loopback(), &member);
    assert!(matches!(late, Err(Error::Bind { .. })), "{late:?}");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let dialled = runtime.block_on(client.connect(addr, "server"));
    assert!(matches!(dialled, Err(Error::Usage { .. })), "{dialled:?}");
    let accepted = runtime.block_on(client.accept());
    assert!(matches!(accepted, Err(Error::Usage { .. })), "{accepted:?}");
}

#[test]
fn nobody_at_the_address_is_an_error_in_time() {
    let server = Server::start("nobody");
    let silent = TcpListener::bind(loopback()).expect("a free port");
    let addr = silent.local_addr().expect("bound");
    let dial = |client: Endpoint| {
        let dial = async move { client.connect(addr, "ghost").await };
        server.io.handle().block_on(dial).expect("io runs").expect_err("nobody is there")
    };
    let error = dial(server.endpoint.clone());
    assert!(matches!(&error, Error::TimedOut { what, .. } if what.contains("ghost at")), "{error}");
    drop(silent);
    let error = dial(server.endpoint.clone());
    assert!(matches!(error, Error::Unreachable { remote, .. } if remote == addr), "{error}");
}

/// A rank 0 of ours, and a rank 1 made by hand, which is linked to it.
struct HandMade {
    zero: TlsTransport,
    control: Raw,
    data: Raw,
    _job: HandMadeJob,
}

/// Rank 0's endpoint, and who else is in the job.
struct HandMadeJob {
    authority: JobAuthority,
    endpoint: Endpoint,
    _io: IoThread,
}

impl HandMadeJob {
    fn new(job: &str) -> Self {
        log();
        let authority = authority(job);
        let io = IoThread::start().expect("a thread");
        let endpoint = bind_tls(&io, &identity(&authority, "m0"));
        Self { authority, endpoint, _io: io }
    }

    fn roster(&self) -> Roster {
        let member = |name: &str| Member { name: name.to_owned(), addr: self.endpoint.local_addr() };
        let members = ["m0", "m1"].map(member).to_vec();
        Roster { job: self.authority.job().to_owned(), epoch: 1, rank: 0, members }
    }

    /// Dials rank 0 as `member` and says hello.
    fn dial(&self, member: &str, ticket: Option<[u8; 16]>) -> Raw {
        let member = identity(&self.authority, member);
        let disguise = Disguise { shows: Some(&member), trusts: &member, alpn: ALPN };
        let mut raw = raw_dial(self.endpoint.local_addr(), &disguise, "m0");
        let hello = Hello { protocol_version: 1, job: self.authority.job(), ticket };
        raw.write_all(&framed(&hello)).expect("the certificate is good");
        raw
    }

    /// Asks for a link as rank 1, and returns the connection with the ticket for its data.
    fn ask_for_link(&self) -> (Raw, [u8; 16]) {
        let mut control = self.dial("m1", None);
        let _: Welcome = read_framed(&mut control);
        let hello = LinkHello { job: self.authority.job(), epoch: 1, group: 0, from: 1, to: 0 };
        control.write_all(&framed(&hello)).expect("the connection is open");
        let BringData { ticket } = read_framed(&mut control);
        (control, ticket)
    }
}

impl HandMade {
    fn link(job: &str) -> Self {
        let job = HandMadeJob::new(job);
        let (zero, (control, data)) = thread::scope(|scope| {
            let zero = scope.spawn(|| TlsTransport::connect(&job.endpoint, job.roster(), deadline()));
            let (mut control, ticket) = job.ask_for_link();
            let mut data = job.dial("m1", Some(ticket));
            let _: Welcome = read_framed(&mut data);
            assert_eq!(read_framed::<LinkWelcome>(&mut control).epoch, 1);
            (zero.join().expect("no panic").expect("rank 1 has come"), (control, data))
        });
        Self { zero, control, data, _job: job }
    }

    /// The error with which rank 0's link ends, which must be a loss.
    fn lost(mut self, reason: &str) {
        assert_lost(&drain(&mut self.zero, 1).0, 1, reason);
        assert_lost(&recv_control(&mut self.zero, 1).expect_err("lost"), 1, reason);
    }
}

#[test]
fn a_hand_made_member_that_keeps_the_rules_is_served() {
    let mut link = HandMade::link("fair");
    send_all(&mut link.zero, 1, b"to you").expect("the link is up");
    let mut bytes = [0; 6];
    link.data.read_exact(&mut bytes).expect("the link is up");
    assert_eq!(&bytes, b"to you");
    link.data.write_all(b"and back").expect("the link is up");
    link.control.write_all(&framed(&Control::Goodbye)).expect("the link is up");
    link.data.conn.send_close_notify();
    link.data.flush().expect("the link is up");
    let mut bytes = [0; 8];
    recv_exact(&mut link.zero, 1, &mut bytes).expect("it was sent before the goodbye");
    assert_eq!(drain(&mut link.zero, 1), (Error::Left { peer: 1 }, 0));
}

#[test]
fn new_keys_in_the_middle_of_the_data_change_nothing() {
    let mut link = HandMade::link("new-keys");
    let bytes = pattern(8, 100_000);
    link.data.write_all(&bytes[..50_000]).expect("the link is up");
    // rustls asks for it in TLS 1.3 when a key has protected enough.
    link.data.conn.refresh_traffic_keys().expect("the handshake is over");
    link.data.write_all(&bytes[50_000..]).expect("the link is up");
    let mut read = vec![0; bytes.len()];
    recv_exact(&mut link.zero, 1, &mut read).expect("the link is up");
    assert!(read == bytes);
    send_all(&mut link.zero, 1, &bytes).expect("the link is up");
    link.data.read_exact(&mut read).expect("under the new keys");
    assert!(read == bytes);
}

#[test]
fn a_goodbye_whose_data_is_cut_off_is_a_loss() {
    let mut link = HandMade::link("truncated");
    link.data.write_all(b"the beginning").expect("the link is up");
    link.control.write_all(&framed(&Control::Goodbye)).expect("the link is up");
    // The end of TCP's bytes, which anybody on the way can make.
    link.data.sock.shutdown(std::net::Shutdown::Write).expect("it is open");
    let (error, total) = drain(&mut link.zero, 1);
    assert_lost(&error, 1, "ended without a goodbye");
    assert_eq!(total, 13);
}

#[test]
fn data_that_ends_without_a_goodbye_is_a_loss() {
    let mut link = HandMade::link("no-goodbye");
    link.data.conn.send_close_notify();
    link.data.flush().expect("the link is up");
    link.control.conn.send_close_notify();
    link.control.flush().expect("the link is up");
    link.lost("its control lane ended without a goodbye");
}

#[test]
fn records_that_are_not_authentic_end_the_link_and_nothing_else() {
    // A record of application data with the right head and the wrong contents, and bytes that are no record.
    let forged = [&[23, 3, 3, 0, 64][..], &[0xaa; 64]].concat();
    for (round, garbage) in [forged, pattern(3, 100_000)].into_iter().enumerate() {
        let mut link = HandMade::link(&format!("forged-data-{round}"));
        link.data.sock.write_all(&garbage).expect("the socket is open");
        let (error, total) = drain(&mut link.zero, 1);
        assert!(matches!(error, Error::Lost { peer: 1, .. }), "{error}");
        assert_eq!(total, 0, "nothing of it is taken for data");

        let mut link = HandMade::link(&format!("forged-control-{round}"));
        link.control.sock.write_all(&garbage).expect("the socket is open");
        let error = recv_control(&mut link.zero, 1).expect_err("lost");
        assert!(matches!(error, Error::Lost { peer: 1, .. }), "{error}");
    }
}

#[test]
fn control_messages_that_break_the_protocol_end_the_link() {
    for (job, bytes, reason) in [
        ("endless", vec![0xff, 0xff, 0xff, 0x7f], "over the limit"),
        ("malformed", [&2_u32.to_le_bytes()[..], &[0xff; 2]].concat(), "its control lane is broken"),
    ] {
        let mut link = HandMade::link(job);
        link.control.write_all(&bytes).expect("the link is up");
        link.lost(reason);
    }
}

#[test]
fn a_ticket_in_the_hands_of_another_member_is_worth_nothing() {
    let job = HandMadeJob::new("mixed-up");
    thread::scope(|scope| {
        let zero = scope.spawn(|| TlsTransport::connect(&job.endpoint, job.roster(), deadline()));
        let (mut control, ticket) = job.ask_for_link();
        // A member of the job, and not the one that the ticket was given to.
        let mut thief = job.dial("m2", Some(ticket));
        let local = thief.sock.local_addr().expect("connected").to_string();
        let told = String::from_utf8_lossy(&read_to_end(&mut thief).expect("told why")).into_owned();
        assert!(told.contains("m2 brings a ticket that was given to m1"), "{told}");
        assert!(refused_line(&local).contains("m2 brings a ticket that was given to m1"));
        // It is still good for whom it was given to, once.
        let mut data = job.dial("m1", Some(ticket));
        let _: Welcome = read_framed(&mut data);
        assert_eq!(read_framed::<LinkWelcome>(&mut control).epoch, 1);
        let mut again = job.dial("m1", Some(ticket));
        let told = String::from_utf8_lossy(&read_to_end(&mut again).expect("told why")).into_owned();
        assert!(told.contains("nobody has given out"), "{told}");
        let mut zero = zero.join().expect("no panic").expect("rank 1 has come");
        data.write_all(b"mine").expect("the link is up");
        let mut bytes = [0; 4];
        recv_exact(&mut zero, 1, &mut bytes).expect("the link is up");
        assert_eq!(&bytes, b"mine");
    });
}

#[test]
fn a_peer_that_shows_no_life_is_lost_after_ten_seconds() {
    let mut link = HandMade::link("silent");
    // Its host answers: TCP is well, and data is taken.
    let started = Instant::now();
    assert_lost(&drain(&mut link.zero, 1).0, 1, "no answer for 10 s");
    let elapsed = started.elapsed();
    assert!((Duration::from_secs(8)..Duration::from_secs(20)).contains(&elapsed), "{elapsed:?}");
}
