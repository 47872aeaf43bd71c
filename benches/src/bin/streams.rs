//! One stream from one host to another, and a ping-pong: TCP, a plain quinn program, and Paceline's transport.
//!
//! `streams tcp|quinn receive` waits at [`PORT`]; `streams tcp|quinn send ADDRESS` measures against it. `streams paceline`
//! is a rank of a job of two: rank 0 sends. The sender prints one JSON object. The receiver compares every byte, with all
//! of them alike. `cargo xtask peers --between-hosts` runs it; nothing here knows about hosts.
#![allow(clippy::print_stdout, reason = "a command line tool talks to its terminal")]

use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use paceline_runtime::World;
use paceline_testing::strangers::Gullible;
use quinn::{ClientConfig, Endpoint, RecvStream, SendStream, ServerConfig};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Where a receiver waits.
const PORT: u16 = 29_500;

/// How long it has to come up.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is written at a time. It stays in the second-level cache; larger pieces are slower over TCP.
const PIECE: usize = 128 * 1024;

/// Pieces before the clock starts, for windows and MTU discovery to open, and while it runs: 1/8 and 1/2 GiB.
const WARM_UP_PIECES: usize = 1024;
const PIECES: usize = 4096;

/// Paceline sends a message at a time: as many bytes as 64 pieces.
const PIECES_OF_A_MESSAGE: usize = 64;

/// Round trips before the clock starts, and while it runs.
const WARM_UP_ROUNDS: usize = 1000;
const ROUNDS: usize = 10_000;

/// The name in the self-signed certificate of the plain quinn program.
const NAME: &str = "streams";

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tcp", "receive"] => receive_by_tcp(),
        ["tcp", "send", address] => send_by_tcp(SocketAddr::new(address.parse()?, PORT)),
        ["quinn", "receive"] => in_runtime(receive_by_quinn()),
        ["quinn", "send", address] => in_runtime(send_by_quinn(SocketAddr::new(address.parse()?, PORT))),
        ["paceline"] => be_a_rank(),
        _ => Err("usage: streams tcp|quinn receive, streams tcp|quinn send ADDRESS, streams paceline".into()),
    }
}

/// What is sent again and again.
fn piece() -> Vec<u8> {
    (0..PIECE).map(|index| (index * 7 + index / 251) as u8).collect()
}

fn report(name: &str, stream: Duration, ping_pong: Duration) {
    let gigabytes_per_second = (PIECES * PIECE) as f64 / stream.as_secs_f64() / 1e9;
    let round_trip_us = ping_pong.as_secs_f64() * 1e6 / ROUNDS as f64;
    println!(
        "{{\"stream\":\"{name}\",\"gigabytes_per_second\":{gigabytes_per_second:.6},\"round_trip_us\":{round_trip_us:.3}}}"
    );
}

fn must_equal(received: &[u8], expected: &[u8]) -> Outcome<()> {
    if received == expected { Ok(()) } else { Err("wrong bytes".into()) }
}

fn send_by_tcp(address: SocketAddr) -> Outcome<()> {
    let start = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) if start.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    stream.set_nodelay(true)?;
    let piece = piece();
    let mut send = |pieces: usize| -> Outcome<Duration> {
        let start = Instant::now();
        (0..pieces).try_for_each(|_| stream.write_all(&piece))?;
        stream.read_exact(&mut [0])?;
        Ok(start.elapsed())
    };
    send(WARM_UP_PIECES)?;
    let streamed = send(PIECES)?;
    let mut ping_pong = |rounds: usize| -> Outcome<Duration> {
        let start = Instant::now();
        for round in 0..rounds as u64 {
            let mut answer = [0; 8];
            stream.write_all(&round.to_le_bytes())?;
            stream.read_exact(&mut answer)?;
            must_equal(&answer, &round.to_le_bytes())?;
        }
        Ok(start.elapsed())
    };
    ping_pong(WARM_UP_ROUNDS)?;
    report("tcp", streamed, ping_pong(ROUNDS)?);
    Ok(())
}

fn receive_by_tcp() -> Outcome<()> {
    let (mut stream, _) = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?.accept()?;
    stream.set_nodelay(true)?;
    let (expected, mut buffer) = (piece(), vec![0; PIECE]);
    for pieces in [WARM_UP_PIECES, PIECES] {
        for _ in 0..pieces {
            stream.read_exact(&mut buffer)?;
            must_equal(&buffer, &expected)?;
        }
        stream.write_all(&[1])?;
    }
    for _ in 0..WARM_UP_ROUNDS + ROUNDS {
        stream.read_exact(&mut buffer[..8])?;
        stream.write_all(&buffer[..8])?;
    }
    Ok(())
}

/// The fastest of tokio's runtimes for quinn.
fn in_runtime(act: impl Future<Output = Outcome<()>>) -> Outcome<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(act)
}

async fn send_by_quinn(address: SocketAddr) -> Outcome<()> {
    let mut endpoint = Endpoint::client((Ipv4Addr::UNSPECIFIED, 0).into())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    // It encrypts like any other; whom it talks to is not what is measured.
    let anybody = Gullible::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(anybody))
        .with_no_client_auth();
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
    endpoint.set_default_client_config(ClientConfig::new(Arc::new(tls)));
    let start = Instant::now();
    let connection = loop {
        match endpoint.connect(address, NAME)?.await {
            Ok(connection) => break connection,
            Err(error) if start.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let (mut sender, mut receiver) = connection.open_bi().await?;
    send(&mut sender, &mut receiver, WARM_UP_PIECES).await?;
    let streamed = send(&mut sender, &mut receiver, PIECES).await?;
    ping_pong(&mut sender, &mut receiver, WARM_UP_ROUNDS).await?;
    report("quinn", streamed, ping_pong(&mut sender, &mut receiver, ROUNDS).await?);
    connection.close(0u8.into(), b"done");
    endpoint.wait_idle().await;
    Ok(())
}

async fn send(sender: &mut SendStream, receiver: &mut RecvStream, pieces: usize) -> Outcome<Duration> {
    let piece = piece();
    let start = Instant::now();
    for _ in 0..pieces {
        sender.write_all(&piece).await?;
    }
    receiver.read_exact(&mut [0]).await?;
    Ok(start.elapsed())
}

async fn ping_pong(sender: &mut SendStream, receiver: &mut RecvStream, rounds: usize) -> Outcome<Duration> {
    let start = Instant::now();
    for round in 0..rounds as u64 {
        let mut answer = [0; 8];
        sender.write_all(&round.to_le_bytes()).await?;
        receiver.read_exact(&mut answer).await?;
        must_equal(&answer, &round.to_le_bytes())?;
    }
    Ok(start.elapsed())
}

async fn receive_by_quinn() -> Outcome<()> {
    let certified = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let config = ServerConfig::with_single_cert(vec![certified.cert.der().clone()], key.into())?;
    let endpoint = Endpoint::server(config, (IpAddr::from(Ipv4Addr::UNSPECIFIED), PORT).into())?;
    let connection = endpoint.accept().await.ok_or("the endpoint is closed")?.await?;
    let (mut sender, mut receiver) = connection.accept_bi().await?;
    let (expected, mut buffer) = (piece(), vec![0; PIECE]);
    for pieces in [WARM_UP_PIECES, PIECES] {
        for _ in 0..pieces {
            receiver.read_exact(&mut buffer).await?;
            must_equal(&buffer, &expected)?;
        }
        sender.write_all(&[1]).await?;
    }
    for _ in 0..WARM_UP_ROUNDS + ROUNDS {
        receiver.read_exact(&mut buffer[..8]).await?;
        sender.write_all(&buffer[..8]).await?;
    }
    connection.closed().await;
    Ok(())
}

fn be_a_rank() -> Outcome<()> {
    let mut world = World::join()?;
    let is_sender = world.rank() == 0;
    let links = world.communicator();
    let message = piece().repeat(PIECES_OF_A_MESSAGE);
    let mut received = vec![0; message.len()];
    let mut stream = |pieces: usize| -> Outcome<Duration> {
        let start = Instant::now();
        for _ in 0..pieces / PIECES_OF_A_MESSAGE {
            if is_sender {
                links.send(&message, 1)?;
            } else {
                links.recv(&mut received, 0)?;
                must_equal(&received, &message)?;
            }
        }
        if is_sender {
            links.recv(&mut [0u8], 1)?
        } else {
            links.send(&[1u8], 0)?
        };
        Ok(start.elapsed())
    };
    stream(WARM_UP_PIECES)?;
    let streamed = stream(PIECES)?;
    let mut ping_pong = |rounds: usize| -> Outcome<Duration> {
        let start = Instant::now();
        for round in 0..rounds as u64 {
            let mut answer = [0u64];
            if is_sender {
                links.send(&[round], 1)?;
                links.recv(&mut answer, 1)?;
            } else {
                links.recv(&mut answer, 0)?;
                links.send(&answer, 0)?;
            }
            must_equal(&answer[0].to_le_bytes(), &round.to_le_bytes())?;
        }
        Ok(start.elapsed())
    };
    ping_pong(WARM_UP_ROUNDS)?;
    let took = ping_pong(ROUNDS)?;
    if is_sender {
        report("paceline", streamed, took);
    }
    Ok(world.leave()?)
}
