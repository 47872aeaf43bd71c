//! Measures the paths to other machines.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use paceline_transport::IoHandle;
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, ip_mtu, ipv6_mtu, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::DoctorArgs;
use super::beacon::{self, Kind, MESSAGE_BYTES, Message, Served, now_us};
use super::finding::Finding;
use super::peers::{Exchange, Measured, Path, judge};
use crate::console::Console;
use crate::discovery::search::{Search, Seen};
use crate::discovery::{Resolver, Wanted};
use crate::error::Error;
use crate::rendezvous::Status;

/// How long a SYN, and then the first answer over the connection, may take.
const CONNECT: Duration = Duration::from_secs(2);

/// How long one datagram's answer may take.
const ANSWER: Duration = Duration::from_millis(500);

/// Small datagrams asked: some may be lost, and the quickest says the most about the clock.
const QUESTIONS: usize = 8;

/// Tries for each length of packet.
const TRIES: usize = 3;

/// The longest that is tried where the interface's own limit is unknown.
const PACKET_MOST: u32 = 1500;

/// The word that all questions have been asked is repeated: nobody answers it.
const WORDS: usize = 3;

/// The paths, and the doctor that answers others meanwhile.
pub struct Examined {
    paths: Vec<(String, Path)>,
    listener: Result<(Served, u16), Finding>,
    deadline: Instant,
}

/// What the tasks share.
struct Shared {
    wanted: Vec<Wanted>,
    port: u16,
    resolver: Resolver,
    search: Mutex<Search>,
    found: Mutex<Vec<Option<Path>>>,
}

/// Looks for all that are wanted until they have answered or the wait is over, and answers them.
pub fn examine(
    io: &IoHandle,
    wanted: Vec<Wanted>,
    args: &DoctorArgs,
    console: &Console,
) -> Result<Examined, Error> {
    let deadline = Instant::now() + args.wait;
    let (port, alone) = (args.port, wanted.is_empty());
    let tasks = io.clone();
    let listener = io.block_on(async move { listen(&tasks, port).await });
    let listener = listener.map_err(|e| super::system("cannot use the I/O thread", &e))?;
    if alone {
        return Ok(Examined { paths: Vec::new(), listener, deadline: Instant::now() });
    }
    let names: Vec<String> = wanted.iter().map(|wanted| wanted.name.clone()).collect();
    let search = Mutex::new(Search::new(Instant::now(), names.clone()));
    let found = Mutex::new(wanted.iter().map(|_| None).collect());
    let shared = Arc::new(Shared { wanted, port, resolver: Resolver::default(), search, found });
    let looking = look_for_all(io.clone(), shared.clone(), Status::new(console), deadline);
    io.block_on(looking).map_err(|e| super::system("cannot use the I/O thread", &e))?;
    let paths = names.into_iter().zip(shared.outcome()).collect();
    Ok(Examined { paths, listener, deadline })
}

impl Examined {
    /// What was found, in lines.
    pub fn findings(&self) -> Vec<Finding> {
        let own = match &self.listener {
            Ok((_, port)) => Finding::ok("port", format!("{port} is free, UDP and TCP")),
            Err(finding) => finding.clone(),
        };
        let paths = self.paths.iter().flat_map(|(name, path)| judge(name, path));
        [own].into_iter().chain(paths).collect()
    }

    /// Stays until the others have asked what they had to ask, or the wait is over.
    pub fn answer_others(&self) {
        let others = self.paths.iter().filter(|(_, path)| matches!(path, Path::Doctor(_))).count();
        let Ok((served, _)) = &self.listener else { return };
        while served.count() < others && Instant::now() < self.deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Shared {
    /// Everything that is known when the wait is over.
    fn outcome(&self) -> Vec<Path> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let search = self.search();
        let missing = |number| {
            Path::Missing(search.seen(number).cloned().unwrap_or(Seen::NoDns("not asked".to_owned())))
        };
        found.into_iter().enumerate().map(|(number, path)| path.unwrap_or_else(|| missing(number))).collect()
    }

    fn search(&self) -> std::sync::MutexGuard<'_, Search> {
        self.search.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look(&self, number: usize) {
        let host = self.wanted[number].host.as_deref();
        let seen = match host {
            None => Seen::Nameless,
            Some(host) => match self.resolver.addresses(host).await {
                Err(why) => why.into(),
                Ok(addresses) => self.look_at(number, &addresses).await,
            },
        };
        self.search().saw(Instant::now(), number, seen, fastrand::f64());
    }

    async fn look_at(&self, number: usize, addresses: &[IpAddr]) -> Seen {
        let mut seen = Seen::NoName;
        for &ip in addresses {
            let address = SocketAddr::new(ip, self.port);
            match greet(address).await {
                Greeted::Not(why) => seen = why,
                Greeted::ByOther => {
                    seen = Seen::Listens;
                    // Somebody else now, and perhaps a doctor later.
                    self.note(number, Path::NoDoctor(ip));
                }
                Greeted::ByDoctor => {
                    self.note(number, Path::Doctor(measure(address).await));
                    return Seen::Listens;
                }
            }
        }
        seen
    }

    fn note(&self, number: usize, path: Path) {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)[number] = Some(path);
    }

    /// The numbers of those that no doctor has answered for.
    fn unanswered(&self) -> Vec<usize> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let answered = |path: &Option<Path>| matches!(path, Some(Path::Doctor(_)));
        found.iter().enumerate().filter(|(_, path)| !answered(path)).map(|(number, _)| number).collect()
    }
}

async fn listen(io: &IoHandle, port: u16) -> Result<(Served, u16), Finding> {
    let refused = |what: &str, e: std::io::Error| {
        let advice =
            "right while a launcher runs here; otherwise choose another port with --port or PACELINE_PORT";
        Finding::warning("port", format!("{what} {port}: {e}"), advice)
    };
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let tcp = TcpListener::bind(any).await.map_err(|e| refused("TCP", e))?;
    let udp = UdpSocket::bind(any).await.map_err(|e| refused("UDP", e))?;
    Ok((beacon::answer(io, tcp, udp), port))
}

async fn look_for_all(io: IoHandle, shared: Arc<Shared>, status: Status, deadline: Instant) {
    loop {
        let now = Instant::now();
        let unanswered = shared.unanswered();
        if unanswered.is_empty() || now >= deadline {
            return;
        }
        let (due, line) = {
            let mut search = shared.search();
            search.missing(now, &unanswered);
            (search.due(now), search.line(now))
        };
        if let Some(line) = line {
            status.say_waiting_for(&line);
        }
        for number in due {
            let shared = shared.clone();
            io.spawn(async move { shared.look(number).await });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What answers at an address over TCP.
enum Greeted {
    ByDoctor,
    ByOther,
    Not(Seen),
}

async fn greet(address: SocketAddr) -> Greeted {
    let mut stream = match timeout(CONNECT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            return Greeted::Not(Seen::Refused);
        }
        Ok(Err(e)) => return Greeted::Not(Seen::Unreachable(format!("{}: {e}", address.ip()))),
        Err(_) => return Greeted::Not(Seen::Unreachable(format!("{} does not answer", address.ip()))),
    };
    let number = fastrand::u64(..);
    let asked = timeout(CONNECT, async move {
        let mut answer = [0; MESSAGE_BYTES];
        stream.write_all(&Message::new(Kind::Question, number).encode()).await.ok()?;
        stream.read_exact(&mut answer).await.ok()?;
        Message::decode(&answer)
    });
    match asked.await {
        Ok(Some(Message { kind: Kind::Answer, number: same, .. })) if same == number => Greeted::ByDoctor,
        _ => Greeted::ByOther,
    }
}

async fn measure(address: SocketAddr) -> Measured {
    let ip = address.ip();
    let nothing = Measured { ip, udp: None, packet_bytes: None, mtu: None };
    let any: IpAddr =
        if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let Ok(socket) = UdpSocket::bind(SocketAddr::new(any, 0)).await else { return nothing };
    if socket.connect(address).await.is_err() {
        return nothing;
    }
    let mtu = mtu_towards(&socket, ip);
    let udp = quickest(&socket).await;
    let packet_bytes = match udp {
        Some(_) if unfragmented(&socket, ip).is_ok() => {
            Some(longest(&socket, mtu.unwrap_or(PACKET_MOST), headers(ip)).await)
        }
        _ => None,
    };
    for _ in 0..WORDS {
        let _ = socket.send(&Message::new(Kind::Done, 0).encode()).await;
    }
    Measured { ip, udp, packet_bytes, mtu }
}

/// The quickest of some exchanges; `None` if the first ones were in vain.
async fn quickest(socket: &UdpSocket) -> Option<Exchange> {
    let mut best: Option<Exchange> = None;
    for question in 0..QUESTIONS {
        let exchange = ask(socket, MESSAGE_BYTES).await;
        best = best.into_iter().chain(exchange).min_by_key(|exchange| exchange.round_trip);
        if best.is_none() && question + 1 >= TRIES {
            return None;
        }
    }
    best
}

/// Asks by a datagram of this many bytes.
async fn ask(socket: &UdpSocket, bytes: usize) -> Option<Exchange> {
    let number = fastrand::u64(..);
    let mut question = vec![0; bytes];
    question[..MESSAGE_BYTES].copy_from_slice(&Message::new(Kind::Question, number).encode());
    let sent_us = now_us();
    socket.send(&question).await.ok()?;
    let mut answer = [0; MESSAGE_BYTES];
    let until = tokio::time::Instant::now() + ANSWER;
    loop {
        let received = tokio::time::timeout_at(until, socket.recv(&mut answer)).await.ok()?.ok()?;
        match Message::decode(&answer[..received]) {
            Some(message) if message.number == number && message.length as usize == bytes => {
                return Some(Exchange::of(sent_us, message.time_us, now_us()));
            }
            // The late answer to another one.
            _ => {}
        }
    }
}

/// The longest packet that arrives, by halving what is left between one that does and one that does not.
async fn longest(socket: &UdpSocket, most: u32, headers: u32) -> u32 {
    let (mut arrives, mut not) = (headers + MESSAGE_BYTES as u32, most + 1);
    // The usual limits are even; 8 bytes more or less are of no consequence.
    let mut next = most;
    while not - arrives > 8 {
        match arrives_whole(socket, (next - headers) as usize).await {
            true => arrives = next,
            false => not = next,
        }
        next = arrives + (not - arrives) / 2;
    }
    arrives
}

async fn arrives_whole(socket: &UdpSocket, bytes: usize) -> bool {
    for _ in 0..TRIES {
        if ask(socket, bytes).await.is_some() {
            return true;
        }
    }
    false
}

/// IP's and UDP's.
fn headers(ip: IpAddr) -> u32 {
    if ip.is_ipv4() { 28 } else { 48 }
}

/// Has packets sent whole or not at all, whatever the system believes about the path.
fn unfragmented(socket: &UdpSocket, ip: IpAddr) -> rustix::io::Result<()> {
    match ip {
        IpAddr::V4(_) => set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::PROBE),
        IpAddr::V6(_) => set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::PROBE),
    }
}

/// The longest packet that the system would send to where this socket is connected: the interface's limit, or the route's.
fn mtu_towards(socket: &UdpSocket, ip: IpAddr) -> Option<u32> {
    let mtu = if ip.is_ipv4() { ip_mtu(socket) } else { ipv6_mtu(socket) };
    // Loopback says more than the length of a packet can.
    mtu.ok().map(|mtu| mtu.min(65_535))
}
