//! Who is turned away, what is logged about it, and that the job goes on.

mod common;

use std::io::IoSlice;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::*;
use paceline_transport::identity::Identity;
use paceline_transport::quic::{Connection, Endpoint, IoThread, QuicTransport, Roster};
use paceline_transport::{CONTROL_MESSAGE_LIMIT, Error, Transport};
use serde::Serialize;

const ALPN: &[u8] = b"paceline/1";

/// The messages of the protocol, as a client of another implementation would define them.
#[derive(Serialize)]
struct Hello<'a> {
    protocol_version: u16,
    job: &'a str,
}

#[derive(Serialize)]
struct LinkHello<'a> {
    job: &'a str,
    epoch: u64,
    group: u64,
    from: usize,
    to: usize,
}

#[derive(Serialize)]
enum Control {
    Message(Vec<u8>),
    Goodbye,
}

/// An endpoint of the member `server`, with an I/O thread for it and one for whoever dials it.
struct Server {
    authority: paceline_transport::identity::JobAuthority,
    endpoint: Endpoint,
    io: IoThread,
    _server_io: IoThread,
}

impl Server {
    fn start(job: &str) -> Self {
        log();
        let authority = authority(job);
        let server_io = IoThread::start().expect("a thread");
        let endpoint = bind(&server_io, &identity(&authority, "server"));
        Self { authority, endpoint, io: IoThread::start().expect("a thread"), _server_io: server_io }
    }

    fn addr(&self) -> SocketAddr {
        self.endpoint.local_addr()
    }

    /// Dials as `client`; the accepting side is not asked.
    fn dial(&self, client: &Endpoint, member: &str) -> Result<Connection, Error> {
        let (client, addr, member) = (client.clone(), self.addr(), member.to_owned());
        self.io.handle().block_on(async move { client.connect(addr, &member).await }).expect("io runs")
    }

    fn accept(&self) -> Connection {
        let endpoint = self.endpoint.clone();
        let accept = async move { tokio::time::timeout(PATIENCE, endpoint.accept()).await };
        self.io
            .handle()
            .block_on(accept)
            .expect("io runs")
            .expect("somebody came")
            .expect("the endpoint is open")
    }

    /// Dials with a hand-made client and waits until the connection has ended.
    fn raw_dial(&self, disguise: &Disguise<'_>) -> (SocketAddr, quinn::ConnectionError) {
        let client = raw_endpoint(&self.io.handle());
        let local = client.local_addr().expect("bound");
        let (config, addr) = (raw_config(disguise), self.addr());
        let name = disguise.trusts.server_name("server");
        let dial = async move {
            match client.connect_with(config, addr, &name).expect("valid settings").await {
                Ok(connection) => connection.closed().await,
                Err(error) => error,
            }
        };
        let dial = async move { tokio::time::timeout(PATIENCE, dial).await };
        (local, self.io.handle().block_on(dial).expect("io runs").expect("an end"))
    }

    /// A member still gets in, after whatever the test did.
    fn still_works(&self) {
        let member = bind(&self.io, &identity(&self.authority, "member"));
        self.dial(&member, "server").expect("a member gets in");
        assert_eq!(self.accept().member(), "member");
    }
}

fn refusal(result: Result<Connection, Error>) -> String {
    match result.expect_err("refused") {
        Error::Refused { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_member_is_accepted_by_name_and_both_sides_know_each_other() {
    let server = Server::start("accepted");
    let client = bind(&server.io, &identity(&server.authority, "client"));
    let dialled = server.dial(&client, "server").expect("a member gets in");
    let accepted = server.accept();
    assert_eq!((dialled.member(), accepted.member()), ("server", "client"));
    assert_eq!(dialled.remote_address(), server.addr());
    assert_eq!(accepted.remote_address(), client.local_addr());
    accepted.close("that was all");
    let closed = server.io.handle().block_on(async move { dialled.closed().await });
    assert!(closed.expect("io runs").contains("that was all"));
}

#[test]
fn a_client_without_a_certificate_is_refused_and_logged() {
    let server = Server::start("no-cert");
    let trusts = server.endpoint.identity();
    let (client, _) = server.raw_dial(&Disguise { shows: None, trusts, alpn: ALPN });
    let line = log().line_with(&["WARN", "refused a connection", &client.to_string()]);
    assert!(line.contains("the client has no certificate"), "{line}");
    server.still_works();
}

#[test]
fn a_client_of_another_job_is_refused_and_logged_and_told() {
    let server = Server::start("our-job");
    // Also when the other job has the same name: the authority counts.
    for job in ["their-job", "our-job"] {
        let stranger = identity(&authority(job), "stranger");
        let disguise = Disguise { shows: Some(&stranger), trusts: server.endpoint.identity(), alpn: ALPN };
        let (client, error) = server.raw_dial(&disguise);
        let line = log().line_with(&["WARN", "refused a connection", &client.to_string()]);
        assert!(line.contains("its certificate is not of this job"), "{line}");
        assert!(matches!(error, quinn::ConnectionError::ConnectionClosed(_)), "{error}");
    }
    server.still_works();
}

#[test]
fn a_server_of_another_job_is_not_talked_to() {
    let server = Server::start("their-server");
    let client = bind(&server.io, &identity(&authority("their-server"), "client"));
    let reason = refusal(server.dial(&client, "server"));
    assert!(reason.contains("its certificate is not of this job"), "{reason}");
    let line = log().line_with(&["WARN", "refused a connection", &client.local_addr().to_string()]);
    assert!(line.contains("our certificate is not of its job"), "{line}");
    server.still_works();
}

#[test]
fn an_expired_certificate_is_refused_on_either_side() {
    let server = Server::start("expired");
    let expired = |member: &str| {
        let issued = SystemTime::now() - 3 * DAY;
        server.authority.issue_at(member, issued, DAY).expect("a valid name")
    };
    let client = bind(&server.io, &expired("client"));
    let reason = refusal(server.dial(&client, "server"));
    assert!(reason.contains("it says that our certificate has expired"), "{reason}");
    let line = log().line_with(&["WARN", "refused a connection", &client.local_addr().to_string()]);
    assert!(line.contains("its certificate has expired"), "{line}");

    let old_server = bind(&server.io, &expired("server"));
    let client = bind(&server.io, &identity(&server.authority, "client"));
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
    for alpn in [&b"h3"[..], b"paceline/999"] {
        let trusts = server.endpoint.identity();
        let (client, _) = server.raw_dial(&Disguise { shows: Some(&member), trusts, alpn });
        let line = log().line_with(&["WARN", "refused a connection", &client.to_string()]);
        assert!(line.contains("does not speak this protocol"), "{line}");
    }
    server.still_works();
}

#[test]
fn the_wrong_member_behind_an_address_is_not_talked_to() {
    let server = Server::start("wrong-member");
    let client = bind(&server.io, &identity(&server.authority, "client"));
    let reason = refusal(server.dial(&client, "somebody-else"));
    assert!(reason.contains("does not name the member that was dialled"), "{reason}");
    assert!(reason.contains("somebody-else.wrong-member.paceline.internal"), "{reason}");
    server.still_works();
}

/// Says `hello` with a valid certificate and returns what the server closes with.
fn say_hello(server: &Server, hello: Vec<u8>) -> String {
    let member = identity(&server.authority, "client");
    let trusts = server.endpoint.identity();
    let config = raw_config(&Disguise { shows: Some(&member), trusts, alpn: ALPN });
    let (client, addr) = (raw_endpoint(&server.io.handle()), server.addr());
    let name = member.server_name("server");
    let talk = async move {
        let connecting = client.connect_with(config, addr, &name).expect("valid settings");
        let connection = connecting.await.expect("the certificate is good");
        let (mut send, _recv) = raw_lane(&connection, 1).await;
        send.write_all(&hello).await.expect("the connection is open");
        connection.closed().await.to_string()
    };
    let talk = async move { tokio::time::timeout(PATIENCE, talk).await };
    server.io.handle().block_on(talk).expect("io runs").expect("an end")
}

#[test]
fn a_hello_that_does_not_fit_is_refused_with_the_reason() {
    let server = Server::start("hello");
    let closed = say_hello(&server, framed(&Hello { protocol_version: 2, job: "hello" }));
    assert!(closed.contains("it speaks version 2 of the protocol and we speak 1"), "{closed}");
    let closed = say_hello(&server, framed(&Hello { protocol_version: 1, job: "goodbye" }));
    assert!(closed.contains(r#"looking for the job "goodbye""#), "{closed}");
    let closed = say_hello(&server, u32::MAX.to_le_bytes().to_vec());
    assert!(closed.contains("over the limit"), "{closed}");
    let closed = say_hello(&server, [&3_u32.to_le_bytes()[..], &[0xff; 3]].concat());
    assert!(closed.contains("malformed"), "{closed}");
    server.still_works();
}

/// First datagrams of `count` handshakes that nobody will continue.
fn first_datagrams(io: &IoThread, trusts: &Identity, count: usize) -> Vec<Vec<u8>> {
    let sink = UdpSocket::bind(loopback()).expect("a free port");
    sink.set_read_timeout(Some(PATIENCE)).expect("a valid time");
    let (client, sink_addr) = (raw_endpoint(&io.handle()), sink.local_addr().expect("bound"));
    let config = raw_config(&Disguise { shows: None, trusts, alpn: ALPN });
    // Clients repeat themselves: only the first datagram of each counts. Bytes 6.. are its name for us.
    let mut datagrams = std::collections::HashMap::new();
    for dialled in 1..=count {
        let (client, config, name) = (client.clone(), config.clone(), trusts.server_name("server"));
        let dial =
            async move { client.connect_with(config, sink_addr, &name).expect("valid settings").await };
        drop(io.handle().spawn(dial));
        while datagrams.len() < dialled {
            let mut buffer = [0; 2048];
            let len = sink.recv(&mut buffer).expect("a first datagram");
            datagrams.entry(buffer[6..14].to_vec()).or_insert_with(|| buffer[..len].to_vec());
        }
    }
    datagrams.into_values().collect()
}

#[test]
fn half_open_handshakes_hold_up_nobody() {
    let server = Server::start("half-open");
    // More than from where on clients must prove their address, which a member then does.
    let datagrams = first_datagrams(&server.io, server.endpoint.identity(), 100);
    let attacker = UdpSocket::bind(loopback()).expect("a free port");
    for datagram in &datagrams {
        attacker.send_to(datagram, server.addr()).expect("sent");
    }
    let started = Instant::now();
    server.still_works();
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    let remote = attacker.local_addr().expect("bound").to_string();
    let line = log().line_with(&["WARN", "refused a connection", &remote]);
    assert!(line.contains("not finished within 5 s"), "{line}");
}

#[test]
fn a_crowd_that_is_refused_is_counted_and_not_logged_one_by_one() {
    let server = Server::start("crowd");
    let started = Instant::now();
    let trusts = server.endpoint.identity();
    let clients: Vec<String> = (0..150)
        .map(|_| server.raw_dial(&Disguise { shows: None, trusts, alpn: ALPN }).0.to_string())
        .collect();
    let seconds = started.elapsed().as_secs() as usize + 1;
    let said =
        clients.iter().filter(|client| log().lines_with(&["refused a connection", client]) > 0).count();
    assert!((1..=20 * (seconds + 1)).contains(&said), "{said} of 150 in {seconds} s");
    server.still_works();
}

/// Passes datagrams between a client and `server`, and keeps what the client has sent.
fn relay_datagrams(server: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<Vec<u8>>>>) {
    let inside = UdpSocket::bind(loopback()).expect("a free port");
    let outside = UdpSocket::bind(loopback()).expect("a free port");
    let (addr, sent) = (inside.local_addr().expect("bound"), Arc::new(Mutex::new(Vec::new())));
    outside.connect(server).expect("an address");
    let kept = sent.clone();
    thread::spawn(move || {
        let (mut buffer, mut back) = ([0; 65536], None);
        while let Ok((count, client)) = inside.recv_from(&mut buffer) {
            kept.lock().expect("no panic").push(buffer[..count].to_vec());
            let (from, to) = (outside.try_clone().expect("a copy"), inside.try_clone().expect("a copy"));
            back.get_or_insert_with(|| {
                thread::spawn(move || {
                    let mut buffer = [0; 65536];
                    while let Ok(count) = from.recv(&mut buffer) {
                        let _ = to.send_to(&buffer[..count], client);
                    }
                })
            });
            let _ = outside.send(&buffer[..count]);
        }
    });
    (addr, sent)
}

#[test]
fn a_recorded_handshake_is_worth_nothing_when_it_is_replayed() {
    let server = Server::start("replay");
    let (addr, sent) = relay_datagrams(server.addr());
    let client = bind(&server.io, &identity(&server.authority, "client"));
    let dial = async move { client.connect(addr, "server").await };
    let dialled = server.io.handle().block_on(dial).expect("io runs").expect("who listens changes nothing");
    let accepted = server.accept();
    assert_eq!(accepted.member(), "client");
    let recorded = sent.lock().expect("no panic").clone();
    assert!(recorded.len() > 2, "{} datagrams", recorded.len());
    // To the endpoint that has had them, and to one of the same member that has not.
    let second = bind(&server.io, server.endpoint.identity());
    let replay = UdpSocket::bind(loopback()).expect("a free port");
    for target in [server.addr(), second.local_addr()] {
        for datagram in &recorded {
            replay.send_to(datagram, target).expect("sent");
        }
    }
    let local = replay.local_addr().expect("bound").to_string();
    log().line_with(&["WARN", "refused a connection", &local, "not finished within 5 s"]);
    // Whom it accepts next is no second client.
    server.still_works();
    let member = bind(&server.io, &identity(&server.authority, "member"));
    let (to, dialling) = (second.local_addr(), member.clone());
    let dial = async move { dialling.connect(to, "server").await };
    server.io.handle().block_on(dial).expect("io runs").expect("a member gets in");
    let next = async move { second.accept().await };
    let next = server.io.handle().block_on(next).expect("io runs").expect("the endpoint is open");
    assert_eq!(next.member(), "member");
    // And the recorded connection goes on.
    let talk = async move {
        let (mut to, _back) = dialled.open_messages().await?;
        to.send(&7_u64).await?;
        let (_, mut from) = accepted.accept_messages().await?;
        from.recv::<u64>().await
    };
    assert_eq!(server.io.handle().block_on(talk), Ok(Ok(Some(7))));
}

#[test]
fn who_offers_another_version_of_quic_hears_a_first_message_and_no_more() {
    let server = Server::start("version");
    let impostor = UdpSocket::bind(loopback()).expect("a free port");
    let addr = impostor.local_addr().expect("bound");
    impostor.set_read_timeout(Some(SOON)).expect("a valid time");
    let client = bind(&server.io, &identity(&server.authority, "client"));
    let dial = async move { client.connect(addr, "server").await };
    let dial = server.io.handle().spawn(dial);
    let mut heard = Vec::new();
    let mut buffer = [0; 2048];
    while let Ok((count, remote)) = impostor.recv_from(&mut buffer) {
        heard.push(buffer[0]);
        // Version negotiation (RFC 9000, 17.2.1): no version, both names the other way round, and what it offers.
        let (theirs, rest) = buffer[6..count].split_at(buffer[5].into());
        let ours = &rest[1..1 + usize::from(rest[0])];
        let sizes = [[ours.len() as u8], [theirs.len() as u8]];
        let offer = [&[0xc0, 0, 0, 0, 0][..], &sizes[0], ours, &sizes[1], theirs, &[0xff, 0, 0, 29]].concat();
        impostor.send_to(&offer, remote).expect("sent");
        if dial.is_finished() {
            break;
        }
    }
    let refused = server.io.handle().block_on(dial).expect("io runs").expect("no panic");
    let reason = refusal(refused);
    assert!(reason.contains("version"), "{reason}");
    // Long headers of the type Initial, the lowest four bits of which are masked.
    assert!(heard.iter().all(|first| first & 0xf0 == 0xc0), "{heard:x?}");
}

#[test]
fn damaged_first_datagrams_are_refused_and_a_member_gets_in() {
    let server = Server::start("damaged");
    let datagrams = first_datagrams(&server.io, server.endpoint.identity(), 50);
    let attacker = UdpSocket::bind(loopback()).expect("a free port");
    for (number, mut datagram) in datagrams.iter().cycle().take(2000).cloned().enumerate() {
        // In the header mostly: what is behind it is authentic or nothing.
        let at = if number % 4 == 0 { number * 31 % datagram.len() } else { number % 64 };
        datagram[at] ^= (number % 255) as u8 + 1;
        attacker.send_to(&datagram, server.addr()).expect("sent");
    }
    server.still_works();
}

#[test]
fn a_client_that_never_says_hello_holds_up_nobody() {
    let server = Server::start("mute");
    let member = identity(&server.authority, "client");
    let config =
        raw_config(&Disguise { shows: Some(&member), trusts: server.endpoint.identity(), alpn: ALPN });
    let (client, addr) = (raw_endpoint(&server.io.handle()), server.addr());
    let local = client.local_addr().expect("bound").to_string();
    let name = member.server_name("server");
    let dial = async move { client.connect_with(config, addr, &name).expect("valid settings").await };
    let _mute = server.io.handle().block_on(dial).expect("io runs").expect("the certificate is good");
    server.still_works();
    let line = log().line_with(&["WARN", "refused a connection", &local]);
    assert!(line.contains("not finished within 5 s"), "{line}");
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
    let client = bind(&server.io, &identity(&server.authority, "client"));
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
    let silent = UdpSocket::bind(loopback()).expect("a free port");
    let (client, addr) = (server.endpoint.clone(), silent.local_addr().expect("bound"));
    let dial = async move { client.connect(addr, "ghost").await };
    let error = server.io.handle().block_on(dial).expect("io runs").expect_err("nobody is there");
    assert!(matches!(&error, Error::TimedOut { what, .. } if what.contains("ghost at")), "{error}");
}

#[test]
fn random_datagrams_are_logged_and_the_job_goes_on() {
    log();
    let (group, mut zero, mut one) = pair::<Quic>("garbage");
    let garbage = UdpSocket::bind(loopback()).expect("a free port");
    let target = group.endpoints[0].local_addr();
    let noise = pattern(99, 10_000 * 64);
    let stop = std::thread::spawn(move || {
        for (n, datagram) in noise.chunks(64).enumerate() {
            // Of all lengths; a send may fail when the buffers are full, and then there are fewer.
            let _ = garbage.send_to(&datagram[..1 + n % 64], target);
        }
        garbage.local_addr().expect("bound")
    });
    let bytes = pattern(7, 8 << 20);
    std::thread::scope(|scope| {
        scope.spawn(|| send_all(&mut one, 0, &bytes).expect("the link is up"));
        let mut read = vec![0; bytes.len()];
        recv_exact(&mut zero, 1, &mut read).expect("the link is up");
        assert!(read == bytes);
    });
    let remote = stop.join().expect("no panic").to_string();
    let line = log().line_with(&["WARN", "refused datagrams that are not QUIC", &remote]);
    assert!(line.contains("datagrams="), "{line}");
    // A line per second at most: the burst takes far less than four seconds on any machine.
    assert!(log().lines_with(&[&remote]) <= 4);
    assert_eq!(log().lines_with(&["refused a connection", &remote]), 0);
    zero.send_control(1, b"still here").expect("the link is up");
    assert_eq!(recv_control(&mut one, 0), Ok(b"still here".to_vec()));
}

/// Tries to join `group` as somebody else would, and returns why it did not work.
fn fails_to_join(
    group: &Group<Quic>,
    identity: &Identity,
    roster: impl FnOnce(Roster) -> Roster,
) -> (String, SocketAddr) {
    let io = IoThread::start().expect("a thread");
    let endpoint = bind(&io, identity);
    let mut own = group.roster(1, 1);
    own.members[1].name = identity.member().to_owned();
    let until = Instant::now() + Duration::from_millis(700);
    let error = QuicTransport::connect(&endpoint, roster(own), until).expect_err("refused");
    (error.to_string(), endpoint.local_addr())
}

#[test]
fn late_and_strange_links_are_refused_and_the_job_goes_on() {
    log();
    let (group, mut zero, mut one) = pair::<Quic>("intruders");
    let refused = |member: &Identity, roster: fn(Roster) -> Roster, says: &str| {
        let (error, addr) = fails_to_join(&group, member, roster);
        assert!(error.contains(says), "{error}");
        log().line_with(&["refused a link", &addr.to_string(), says]);
    };
    let second = identity(&group.authority, "m1");
    refused(&second, |roster| roster, "rank 1 has a link already");
    refused(&second, |roster| Roster { epoch: 2, ..roster }, "it is in epoch 2 and we are in 1");
    refused(&second, |roster| Roster { epoch: 0, ..roster }, "it is in epoch 0 and we are in 1");
    let stranger = identity(&group.authority, "stranger");
    refused(&stranger, |roster| roster, "stranger is not a member of epoch 1");
    send_all(&mut zero, 1, b"undisturbed").expect("the link is up");
    recv_exact(&mut one, 0, &mut [0; 11]).expect("the link is up");
}

/// A member at rank 1 that speaks the protocol by hand, linked to a real rank 0.
struct HandMade {
    zero: QuicTransport,
    connection: quinn::Connection,
    control: Option<quinn::SendStream>,
    data: quinn::SendStream,
    io: IoThread,
    _unread: (quinn::RecvStream, quinn::RecvStream),
    _group: Group<Quic>,
}

impl HandMade {
    fn link(job: &'static str) -> Self {
        log();
        let group = Group::<Quic>::bind(job, 2);
        let io = IoThread::start().expect("a thread");
        let member = group.endpoints[1].identity().clone();
        let config = raw_config(&Disguise { shows: Some(&member), trusts: &member, alpn: ALPN });
        let (client, addr) = (raw_endpoint(&io.handle()), group.endpoints[0].local_addr());
        let name = member.server_name("m0");
        let dial = async move {
            let connecting = client.connect_with(config, addr, &name).expect("valid settings");
            let connection = connecting.await.expect("the certificate is good");
            let (mut hello, mut welcome) = raw_lane(&connection, 1).await;
            hello.write_all(&framed(&Hello { protocol_version: 1, job })).await.expect("open");
            assert_eq!(welcome.read_to_end(64).await.expect("a welcome"), framed(&1_u16));
            let (mut control, mut granted) = raw_lane(&connection, 2).await;
            let (data, data_in) = raw_lane(&connection, 3).await;
            let ask = LinkHello { job, epoch: 1, group: 0, from: 1, to: 0 };
            control.write_all(&framed(&ask)).await.expect("open");
            let mut answer = vec![0; framed(&1_u64).len()];
            granted.read_exact(&mut answer).await.expect("a grant");
            assert_eq!(answer, framed(&1_u64));
            (connection, control, data, (granted, data_in))
        };
        let roster = group.roster(0, 1);
        let (zero, (connection, control, data, unread)) = std::thread::scope(|scope| {
            let zero = scope.spawn(|| QuicTransport::connect(&group.endpoints[0], roster, deadline()));
            let dialled = io.handle().block_on(dial).expect("io runs");
            (zero.join().expect("no panic").expect("a link"), dialled)
        });
        Self { zero, connection, control: Some(control), data, io, _unread: unread, _group: group }
    }

    /// Writes to the control lane.
    fn say(&mut self, bytes: Vec<u8>) {
        let mut control = self.control.take().expect("put back below");
        let write = async move {
            control.write_all(&bytes).await.expect("the connection is open");
            control
        };
        self.control = Some(self.io.handle().block_on(write).expect("io runs"));
    }

    /// How rank 0's link ends.
    fn ends(&mut self) -> Error {
        let (error, _) = drain(&mut self.zero, 1);
        let control = recv_control(&mut self.zero, 1).expect_err("the link has ended");
        assert_eq!(control, error, "both lanes say the same");
        let sent = self.zero.try_send(1, &[IoSlice::new(b"x")]);
        assert_eq!(sent, Err(error.clone()), "and so does sending");
        error
    }
}

#[test]
fn malformed_control_messages_of_a_member_end_its_link_only() {
    let cases: [(&'static str, Vec<u8>, &str); 4] = [
        ("huge-length", u32::MAX.to_le_bytes().to_vec(), "over the limit"),
        ("no-such-kind", [&1_u32.to_le_bytes()[..], &[9]].concat(), "malformed"),
        ("trailing", [&2_u32.to_le_bytes()[..], &[1, 0]].concat(), "left over"),
        ("too-long", framed(&Control::Message(vec![0; CONTROL_MESSAGE_LIMIT + 1])), "4097 bytes"),
    ];
    for (job, bytes, says) in cases {
        let mut member = HandMade::link(job);
        member.say(bytes);
        assert_lost(&member.ends(), 1, says);
    }
}

#[test]
fn ending_the_control_lane_without_a_goodbye_is_a_loss() {
    let mut member = HandMade::link("no-goodbye");
    member.data.finish().expect("open");
    member.control.as_mut().expect("open").finish().expect("open");
    assert_lost(&member.ends(), 1, "without a goodbye");
}

#[test]
fn ending_the_data_is_not_leaving() {
    let mut member = HandMade::link("data-ends");
    member.data.finish().expect("open");
    member.say(framed(&Control::Message(b"alive".to_vec())));
    assert_eq!(recv_control(&mut member.zero, 1), Ok(b"alive".to_vec()));
    assert_eq!(member.zero.try_recv(1, &mut [0]), Ok(0), "it may say goodbye yet");
    member.connection.close(7_u32.into(), b"done");
    assert_lost(&member.ends(), 1, "connection closed: done");
}

#[test]
fn breaking_off_the_data_stream_is_a_loss() {
    let mut member = HandMade::link("reset");
    member.data.reset(3_u32.into()).expect("open");
    assert_lost(&member.ends(), 1, "its data stream broke off");
}

#[test]
fn a_goodbye_and_the_end_of_the_data_make_an_orderly_leave() {
    let mut member = HandMade::link("orderly");
    member.say(framed(&Control::Message(b"first".to_vec())));
    member.say(framed(&Control::Goodbye));
    member.data.finish().expect("open");
    assert_eq!(recv_control(&mut member.zero, 1), Ok(b"first".to_vec()));
    assert_eq!(member.ends(), Error::Left { peer: 1 });
}
