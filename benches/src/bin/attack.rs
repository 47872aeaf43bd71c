//! A job that is attacked, and its attackers; `cargo xtask siege` starts them on several hosts.
//!
//! `attack rank BYTES STOP_FILE` is a rank: it sums until the file is there, compares every element, and rank 0 prints
//! `done TIME_US OPERATIONS` some fifty times in a second. `attack send KIND MBIT_PER_S SECONDS ADDRESS…` attacks ports in
//! turn and prints what it has sent. `attack ignore` opens a port that is nobody's over UDP and one over TCP, prints them
//! and takes whatever comes without looking at it.
#![allow(clippy::print_stdout, reason = "a command line tool talks to its terminal")]

use std::collections::VecDeque;
use std::error::Error;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use paceline_testing::strangers;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Headers of Ethernet, IPv4 and UDP, in bytes.
const UDP_HEADERS: usize = 42;

/// Headers of Ethernet, IPv4 and TCP with time stamps, in bytes.
const TCP_HEADERS: usize = 66;

/// The longest UDP payload on an Ethernet, and what TCP carries in a packet there.
const LONGEST_DATAGRAM: usize = 1472;
const TCP_SEGMENT: usize = 1448;

/// What the socket's buffer takes at once, whatever the other side does.
const GARBAGE_PER_CONNECTION: usize = 16 * 1024;

/// Connections that an attacker holds open, and how long it waits for one.
const HELD: usize = 200;
const CONNECT_LIMIT: Duration = Duration::from_millis(200);

/// What may be sent at once after a pause.
const BURST: Duration = Duration::from_millis(2);

/// How often rank 0 says how far it is.
const SAY_EVERY: Duration = Duration::from_millis(20);

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["rank", bytes, stop] => be_a_rank(bytes.parse()?, Path::new(stop)),
        ["send", kind, megabits, seconds, to @ ..] if !to.is_empty() => {
            let to: Vec<SocketAddr> = to.iter().map(|addr| addr.parse()).collect::<Result<_, _>>()?;
            let pace = Pace::new(megabits.parse()?);
            attack(kind, pace, Duration::from_secs_f64(seconds.parse()?), &to)
        }
        ["ignore"] => ignore(),
        _ => {
            Err("usage: attack rank BYTES STOP_FILE | send KIND MBIT_PER_S SECONDS ADDRESS… | ignore".into())
        }
    }
}

fn be_a_rank(bytes: usize, stop: &Path) -> Outcome<()> {
    let mut world = World::join()?;
    let (rank, size) = (world.rank(), world.world_size());
    let expected = (size * (size + 1) / 2) as f32;
    // The last element says that it is the last operation.
    let mut buffer = vec![0.0_f32; bytes / 4 + 1];
    let mut said = Instant::now();
    for operation in 1_u64.. {
        let (end, elements) = buffer.split_last_mut().expect("it has one");
        elements.fill(rank as f32 + 1.0);
        *end = 0.0;
        if rank == 0 && said.elapsed() > SAY_EVERY {
            println!("done {} {}", SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros(), operation - 1);
            said = Instant::now();
            *end = f32::from(u8::from(stop.exists()));
        }
        world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?;
        let (end, elements) = buffer.split_last().expect("it has one");
        // Without a way out in the middle, which would cost the vector instructions.
        let wrong = elements.iter().filter(|&&sum| sum != expected).count();
        if wrong > 0 {
            return Err(format!("{wrong} elements of operation {operation} are wrong").into());
        }
        if *end != 0.0 {
            break;
        }
    }
    Ok(world.leave()?)
}

/// A token bucket.
struct Pace {
    bytes_per_second: f64,
    /// When all that was sent is paid for.
    paid: Instant,
}

impl Pace {
    fn new(megabits_per_second: f64) -> Self {
        Self { bytes_per_second: megabits_per_second * 1e6 / 8.0, paid: Instant::now() }
    }

    /// Waits until so many bytes may be sent.
    fn pay(&mut self, bytes: usize) {
        let now = Instant::now();
        // Whoever could not keep up does not catch up later.
        self.paid = self.paid.max(now.checked_sub(BURST).unwrap_or(now));
        self.paid += Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        if self.paid > now {
            thread::sleep(self.paid - now);
        }
    }
}

/// Sends for some time, and says how much it was.
fn attack(kind: &str, mut pace: Pace, limit: Duration, to: &[SocketAddr]) -> Outcome<()> {
    let messages = match kind {
        "garbage-udp" => pieces(|number| number * 7919 % LONGEST_DATAGRAM + 1),
        "short-udp" => pieces(|_| 64),
        "initials" => strangers::initial_datagrams(20_000),
        "garbage-tcp" => pieces(|_| GARBAGE_PER_CONNECTION),
        "hellos" => strangers::client_hellos(2000, strangers::OVER_TCP),
        _ => return Err(format!("no such attack: {kind}").into()),
    };
    // The time does not count that it takes to make them.
    println!("ready");
    let start = Instant::now();
    let (mut sent, mut count) = (0_usize, 0_u64);
    // Several ports, so that more than one address is seen. A full buffer drops datagrams, which is all right here.
    let sockets: Vec<UdpSocket> = (0..16).map(|_| UdpSocket::bind("0.0.0.0:0")).collect::<Result<_, _>>()?;
    let mut held = VecDeque::new();
    for (number, message) in messages.iter().cycle().enumerate() {
        if start.elapsed() > limit {
            break;
        }
        let addr = to[number % to.len()];
        let bytes = if matches!(kind, "garbage-tcp" | "hellos") {
            let packets = 3 + message.len().div_ceil(TCP_SEGMENT);
            let bytes = message.len() + packets * TCP_HEADERS;
            pace.pay(bytes);
            let Ok(mut stream) = TcpStream::connect_timeout(&addr, CONNECT_LIMIT) else { continue };
            stream.set_nonblocking(true)?;
            // It may have been refused already.
            let _ = stream.write(message);
            held.push_back(stream);
            if held.len() > HELD {
                held.pop_front();
            }
            bytes
        } else {
            pace.pay(message.len() + UDP_HEADERS);
            let _ = sockets[number % sockets.len()].send_to(message, addr);
            message.len() + UDP_HEADERS
        };
        (sent, count) = (sent + bytes, count + 1);
    }
    let megabits = sent as f64 * 8.0 / 1e6 / start.elapsed().as_secs_f64();
    println!("sent {megabits:.1} Mbit/s, {:.0} in a second", count as f64 / start.elapsed().as_secs_f64());
    Ok(())
}

/// Garbage in pieces of lengths that depend on their number.
fn pieces(len: impl Fn(usize) -> usize) -> Vec<Vec<u8>> {
    (0..2000).map(|number| strangers::garbage(number as u64, len(number))).collect()
}

/// Datagrams stay in the socket until it is full, and then with the kernel: nothing costs the host less. Connections are
/// taken, or there would be none before long, and what they bring is dropped.
fn ignore() -> Outcome<()> {
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    println!("ignores {} {}", udp.local_addr()?.port(), tcp.local_addr()?.port());
    let mut buffer = vec![0; GARBAGE_PER_CONNECTION];
    loop {
        let (mut stream, _) = tcp.accept()?;
        stream.set_nonblocking(true)?;
        // What has come by now, if anything; the rest goes with the connection.
        let _ = stream.read(&mut buffer);
    }
}
