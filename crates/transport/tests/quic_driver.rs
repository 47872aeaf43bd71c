//! The driver under the QUIC transport: plain quinn peers, paths of any MTU, and who drives when.

mod common;

use std::io::IoSlice;
use std::net::UdpSocket;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use paceline_transport::identity::Identity;
use paceline_transport::quic::{Endpoint, IoThread, Member, Profile, QuicTransport, Roster, Settings};
use paceline_transport::{Error, Transport};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;

const ALPN: &[u8] = b"paceline/1";

/// The first messages of the protocol, as another implementation would define them.
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

/// Two ranks on endpoints with the given settings.
fn pair_with(job: &str, settings: &Settings) -> (Vec<IoThread>, QuicTransport, QuicTransport) {
    let authority = authority(job);
    let ios: Vec<_> = (0..2).map(|_| IoThread::start().expect("a thread")).collect();
    let bind = |rank: usize| {
        let identity = identity(&authority, &format!("m{rank}"));
        Endpoint::bind_with(&ios[rank].handle(), loopback(), &identity, settings).expect("a free port")
    };
    let endpoints = [bind(0), bind(1)];
    let member = |endpoint: &Endpoint| Member {
        name: endpoint.identity().member().to_owned(),
        addr: endpoint.local_addr(),
    };
    let members: Vec<_> = endpoints.iter().map(member).collect();
    let connect = |rank: usize| {
        let roster = Roster { job: job.to_owned(), epoch: 1, rank, members: members.clone() };
        QuicTransport::connect(&endpoints[rank], roster, deadline()).expect("both ranks are there")
    };
    let (zero, one) = thread::scope(|scope| {
        let one = scope.spawn(|| connect(1));
        (connect(0), one.join().expect("no panic"))
    });
    (ios, zero, one)
}

/// Sends `bytes` from `from` to `to`, which checks them.
fn carry(from: &mut QuicTransport, to: &mut QuicTransport, bytes: &[u8]) {
    let (sender, receiver) = (from.rank(), to.rank());
    thread::scope(|scope| {
        scope.spawn(|| send_all(from, receiver, bytes).expect("the link is up"));
        let mut received = vec![0; bytes.len()];
        recv_exact(to, sender, &mut received).expect("the link is up");
        assert!(received == bytes, "the bytes differ");
    });
}

#[test]
fn a_jumbo_path_is_found_and_full_batches_pass_it() {
    // 10 datagrams of 8972 bytes, quinn's batch, are more than a send takes, and nothing would arrive.
    for settings in [Settings::default(), Settings::default().with_first_datagram(8972)] {
        let (_ios, mut zero, mut one) = pair_with("jumbo", &settings);
        let bytes = pattern(5, 32 << 20);
        let started = Instant::now();
        carry(&mut zero, &mut one, &bytes);
        carry(&mut one, &mut zero, &bytes);
        assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
        // Within what discovery does not look for any more.
        assert!(zero.datagram_bytes(1) > 8900, "{}", zero.datagram_bytes(1));
    }
}

#[test]
fn the_largest_datagram_is_never_exceeded() {
    let (_ios, mut zero, mut one) = pair_with("small", &Settings::default().with_largest_datagram(1452));
    carry(&mut zero, &mut one, &pattern(6, 8 << 20));
    let found = zero.datagram_bytes(1);
    assert!((1400..=1452).contains(&found), "{found}");
}

#[test]
fn the_profile_for_wide_networks_carries_everything_too() {
    let (_ios, mut zero, mut one) = pair_with("wan", &Settings::default().with_profile(Profile::Wan));
    carry(&mut zero, &mut one, &pattern(7, 32 << 20));
}

#[test]
fn settings_that_quic_cannot_have_are_an_error_and_no_panic() {
    let (io, authority) = (IoThread::start().expect("a thread"), authority("settings"));
    let identity = identity(&authority, "m0");
    let bind = |settings: Settings| Endpoint::bind_with(&io.handle(), loopback(), &identity, &settings);
    let jumbo = Settings::default().with_largest_datagram(65507);
    let error = bind(jumbo.clone().with_first_datagram(16_385)).expect_err("a handshake cannot be that long");
    assert!(matches!(&error, Error::Usage { reason } if reason.contains("16385 bytes")), "{error}");
    let error = bind(jumbo.with_largest_datagram(1000)).expect_err("below QUIC's least");
    assert!(matches!(&error, Error::Usage { reason } if reason.contains("1000 bytes")), "{error}");
    let longest = Settings::default().with_largest_datagram(16_000).with_first_datagram(16_000);
    let (_ios, mut zero, mut one) = pair_with("longest-first", &longest);
    carry(&mut zero, &mut one, b"the longest handshake works");
}

// Who drives ------------------------------------------------------------------------------------------------

#[test]
fn what_a_caller_leaves_unsent_is_sent_without_it() {
    for pause in [true, false] {
        let (_ios, mut zero, mut one) = pair_with("left", &Settings::default());
        // One whole window: more than the network takes at once.
        let bytes = pattern(8, (2 << 20) - 1);
        let mut sent = 0;
        while sent < bytes.len() {
            match zero.try_send(1, &[IoSlice::new(&bytes[sent..])]).expect("the link is up") {
                0 => zero.wait(deadline()),
                count => sent += count,
            }
        }
        if pause {
            zero.pause();
        }
        // From here on nobody calls `zero`.
        let (started, mut received) = (Instant::now(), vec![0; bytes.len()]);
        recv_exact(&mut one, 0, &mut received).expect("the link is up");
        assert!(received == bytes);
        assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    }
}

#[test]
fn control_messages_come_and_go_while_a_caller_spins_waits_or_is_away() {
    let (_ios, mut zero, mut one) = pair_with("control", &Settings::default());
    for round in 0..30_u8 {
        one.send_control(0, &[round]).expect("the link is up");
        let message = match round % 3 {
            0 => recv_control(&mut zero, 1).expect("the link is up"),
            1 => loop {
                // Only spinning.
                if let Some(message) = zero.try_recv_control(1).expect("the link is up") {
                    break message;
                }
                zero.spin();
            },
            _ => loop {
                // Only looking.
                if let Some(message) = zero.try_recv_control(1).expect("the link is up") {
                    break message;
                }
                thread::yield_now();
            },
        };
        assert_eq!(message, [round]);
    }
}

#[test]
fn a_link_that_nobody_drives_is_kept_alive() {
    let (_ios, mut zero, mut one) = pair_with("idle", &Settings::default());
    carry(&mut zero, &mut one, b"before");
    // Longer than the idle timeout of 10 s. Sleeping is what is tested here.
    thread::sleep(Duration::from_secs(12));
    carry(&mut zero, &mut one, b"after");
}

#[test]
fn an_address_where_nobody_listens_harms_no_other_connection() {
    let group = Group::<Quic>::bind("refused-port", 2);
    let gone = UdpSocket::bind(loopback()).expect("a free port").local_addr().expect("bound");
    let endpoint = group.endpoints[0].clone();
    // The kernel answers with ICMP messages.
    let dial = async move { endpoint.connect(gone, "ghost").await };
    let ghost = group.ios[0].handle().spawn(dial);
    let mut transports = group.connect(1);
    let (mut one, mut zero) = (transports.pop().expect("two"), transports.pop().expect("two"));
    carry(&mut zero, &mut one, &pattern(9, 4 << 20));
    let error = group.ios[1].handle().block_on(ghost).expect("io runs").expect("no panic");
    assert!(matches!(error, Err(Error::TimedOut { .. })), "{error:?}");
    carry(&mut zero, &mut one, &pattern(10, 4 << 20));
}

// Plain quinn peers -----------------------------------------------------------------------------------------

fn certificates(identity: &Identity) -> Vec<CertificateDer<'static>> {
    let pem = identity.to_pem();
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().expect("our own PEM")
}

/// The settings of a plain quinn server of a job.
fn quinn_server(identity: &Identity) -> quinn::ServerConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificates(identity).remove(1)).expect("an authority");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let key = PrivateKeyDer::from_pem_slice(identity.to_pem().as_bytes()).expect("our own PEM");
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_client_cert_verifier(verifier.build().expect("an authority"))
        .with_single_cert(vec![certificates(identity).remove(0)], key)
        .expect("a matching key");
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls).expect("a QUIC suite");
    quinn::ServerConfig::with_crypto(Arc::new(crypto))
}

/// Takes as many bytes from a quinn stream as `expected` has and sends them back; both are checked.
async fn mirror(send: &mut quinn::SendStream, recv: &mut quinn::RecvStream, expected: &[u8]) {
    let mut done = 0;
    let mut buffer = vec![0; 100_000];
    while done < expected.len() {
        let got = recv.read(&mut buffer).await.expect("the link is up").expect("more to come");
        assert!(buffer[..got] == expected[done..done + got], "the bytes differ at {done}");
        send.write_all(&buffer[..got]).await.expect("the link is up");
        done += got;
    }
}

/// Sends `bytes` to rank `peer` and receives them back.
fn reflect(transport: &mut QuicTransport, peer: usize, bytes: &[u8]) {
    let (mut sent, mut received, mut got) = (0, vec![0; bytes.len()], 0);
    let until = deadline();
    while got < bytes.len() {
        let now_sent = match sent < bytes.len() {
            true => transport.try_send(peer, &[IoSlice::new(&bytes[sent..])]).expect("the link is up"),
            false => 0,
        };
        let now_got = transport.try_recv(peer, &mut received[got..]).expect("the link is up");
        (sent, got) = (sent + now_sent, got + now_got);
        if now_sent + now_got == 0 && !transport.spin() {
            transport.wait(until);
        }
        assert!(Instant::now() < until, "sent {sent} and got {got}");
    }
    assert!(received == bytes, "the bytes differ");
}

#[test]
fn a_plain_quinn_client_is_a_full_peer() {
    let job = "quinn-client";
    let group = Group::<Quic>::bind(job, 2);
    let io = IoThread::start().expect("a thread");
    let member = group.endpoints[1].identity().clone();
    let config = raw_config(&Disguise { shows: Some(&member), trusts: &member, alpn: ALPN });
    let (client, addr) = (raw_endpoint(&io.handle()), group.endpoints[0].local_addr());
    let name = member.server_name("m0");
    let bytes = pattern(11, 16 << 20);
    let expected = bytes.clone();
    let peer = io.handle().spawn(async move {
        let connecting = client.connect_with(config, addr, &name).expect("valid settings");
        let connection = connecting.await.expect("the certificate is good");
        let (mut hello, mut welcome) = raw_lane(&connection, 1).await;
        hello.write_all(&framed(&Hello { protocol_version: 1, job })).await.expect("open");
        assert_eq!(welcome.read_to_end(64).await.expect("a welcome"), framed(&1_u16));
        let (mut control, mut granted) = raw_lane(&connection, 2).await;
        let (mut data, mut data_in) = raw_lane(&connection, 3).await;
        let ask = LinkHello { job, epoch: 1, group: 0, from: 1, to: 0 };
        control.write_all(&framed(&ask)).await.expect("open");
        let mut answer = vec![0; framed(&1_u64).len()];
        granted.read_exact(&mut answer).await.expect("a grant");
        mirror(&mut data, &mut data_in, &expected).await;
        connection.closed().await
    });
    let mut zero =
        QuicTransport::connect(&group.endpoints[0], group.roster(0, 1), deadline()).expect("a link");
    reflect(&mut zero, 1, &bytes);
    drop(zero);
    let closed = group.ios[0].handle().block_on(peer).expect("io runs").expect("no panic");
    assert!(closed.to_string().contains("it ended without leaving"), "{closed}");
}

#[test]
fn a_plain_quinn_server_is_a_full_peer() {
    let job = "quinn-server";
    let group = Group::<Quic>::bind(job, 2);
    let io = IoThread::start().expect("a thread");
    let server_identity = identity(&group.authority, "m0");
    let config = quinn_server(&server_identity);
    let server = io.handle().block_on(async move { quinn::Endpoint::server(config, loopback()) });
    let server = server.expect("io runs").expect("a free port");
    let mut roster = group.roster(1, 1);
    roster.members[0].addr = server.local_addr().expect("bound");
    let bytes = pattern(12, 16 << 20);
    let expected = bytes.clone();
    let peer = io.handle().spawn(async move {
        let connection = server.accept().await.expect("open").await.expect("the certificate is good");
        let lane = async |kind: u8| {
            let (send, mut recv) = connection.accept_bi().await.expect("a lane");
            let mut first = [0];
            recv.read_exact(&mut first).await.expect("the lane's kind");
            assert_eq!(first, [kind]);
            (send, recv)
        };
        let (mut welcome, mut hello) = lane(1).await;
        let mut said = vec![0; framed(&Hello { protocol_version: 1, job }).len()];
        hello.read_exact(&mut said).await.expect("a hello");
        welcome.write_all(&framed(&1_u16)).await.expect("open");
        let (mut grant, mut control) = lane(2).await;
        let ask = LinkHello { job, epoch: 1, group: 0, from: 1, to: 0 };
        let mut said = vec![0; framed(&ask).len()];
        control.read_exact(&mut said).await.expect("a hello");
        assert_eq!(said, framed(&ask));
        let (mut data, mut data_in) = lane(3).await;
        grant.write_all(&framed(&1_u64)).await.expect("open");
        mirror(&mut data, &mut data_in, &expected).await;
        connection.closed().await
    });
    let mut one = QuicTransport::connect(&group.endpoints[1], roster, deadline()).expect("a link");
    reflect(&mut one, 0, &bytes);
    drop(one);
    let closed = group.ios[1].handle().block_on(peer).expect("io runs").expect("no panic");
    assert!(closed.to_string().contains("it ended without leaving"), "{closed}");
}
