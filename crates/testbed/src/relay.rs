//! One thread that carries packets between the hosts' TUN devices, and does to them what the [`Faults`] say.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::io::{self, PipeReader, PipeWriter, pipe};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::path::{Fate, Faults, Path, Reason};
use crate::tun::Tun;

/// Packets of one device before the next gets its turn.
const BATCH: usize = 64;

/// The longest IP packet.
const PACKET_BYTES: usize = 65_536;

/// The links between all pairs of hosts, each direction by itself. The switch is the last host: the launcher is there.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    /// Closed on drop, which the thread sees.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

/// What has happened to packets, on all paths together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Arrived, copies included.
    pub arrived: u64,
    /// Bytes of those.
    pub arrived_bytes: u64,
    /// The longest of those, in bytes.
    pub longest: usize,
    /// Lost by chance.
    pub lost: u64,
    /// Sent on a path that was cut.
    pub cut: u64,
    /// Longer than the path carries.
    pub too_large: u64,
    /// Dropped because too many were on the way.
    pub overflow: u64,
    /// Arrived twice.
    pub duplicated: u64,
    /// Held back so that others overtook them.
    pub late: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { arrived, arrived_bytes, longest, lost, cut, too_large, overflow, duplicated, late } = self;
        write!(f, "{arrived} packets arrived ({arrived_bytes} bytes, {longest} in the longest), ")?;
        write!(f, "{lost} were lost, {late} late, {duplicated} doubled; ")?;
        write!(f, "{cut} met a cut link, {too_large} were too long, {overflow} found the link full")
    }
}

#[derive(Debug)]
struct Shared {
    ports: usize,
    /// By sender and receiver: `from * ports + to`.
    faults: Mutex<Vec<Faults>>,
    counts: Mutex<Counts>,
}

impl Relay {
    /// Carries packets between these devices, which have these addresses, until it is dropped, with the same faults on
    /// all paths. Chance follows from the seed; what it hits follows from the packets' timing too.
    pub(crate) fn start(devices: Vec<(Vec<IpAddr>, Tun)>, faults: Faults, seed: u64) -> io::Result<Self> {
        let ports = devices.len();
        let faults = Mutex::new(vec![faults; ports * ports]);
        let shared = Arc::new(Shared { ports, faults, counts: Mutex::default() });
        let (stopped, stop) = pipe()?;
        let (addresses, devices) = devices.into_iter().unzip();
        let carrier = Carrier {
            shared: shared.clone(),
            addresses,
            devices,
            stopped,
            paths: vec![Path::default(); ports * ports],
            waiting: BinaryHeap::new(),
            sequence: 0,
            random: fastrand::Rng::with_seed(seed),
        };
        let thread = std::thread::Builder::new().name("paceline-relay".to_owned()).spawn(|| carrier.run())?;
        Ok(Self { shared, stop: Some(stop), thread: Some(thread) })
    }

    /// The port of the switch in the calls below, where the launcher runs; hosts have their own numbers.
    pub fn switch(&self) -> usize {
        self.shared.ports - 1
    }

    /// Changes what is wrong with the way from one host to another. Packets on the way are not touched.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn change(&self, from: usize, to: usize, change: impl FnOnce(&mut Faults)) {
        let ports = self.shared.ports;
        assert!(from < ports && to < ports, "hosts are 0 to {}", ports - 1);
        change(&mut locked(&self.shared.faults)[from * ports + to]);
    }

    /// Changes what is wrong with all ways, those to and from the switch included.
    pub fn change_all(&self, mut change: impl FnMut(&mut Faults)) {
        locked(&self.shared.faults).iter_mut().for_each(&mut change);
    }

    /// Cuts the link between two hosts, both ways.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn cut(&self, a: usize, b: usize) {
        self.set_cut(a, b, true);
    }

    /// Mends the link between two hosts, both ways.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn heal(&self, a: usize, b: usize) {
        self.set_cut(a, b, false);
    }

    /// What has happened since the start or the last [`clear_counts`](Self::clear_counts).
    pub fn counts(&self) -> Counts {
        *locked(&self.shared.counts)
    }

    /// Begins to count anew.
    pub fn clear_counts(&self) {
        *locked(&self.shared.counts) = Counts::default();
    }

    fn set_cut(&self, a: usize, b: usize, cut: bool) {
        for (from, to) in [(a, b), (b, a)] {
            self.change(from, to, |faults| faults.cut = cut);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed; a test that needed it has failed by the silence.
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Carrier {
    shared: Arc<Shared>,
    /// Of each device.
    addresses: Vec<Vec<IpAddr>>,
    devices: Vec<Tun>,
    stopped: PipeReader,
    paths: Vec<Path>,
    waiting: BinaryHeap<Reverse<Waiting>>,
    /// Keeps packets of one time in the order of their sending.
    sequence: u64,
    random: fastrand::Rng,
}

/// A packet on its way.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    at: Instant,
    sequence: u64,
    path: usize,
    packet: Vec<u8>,
}

impl Carrier {
    fn run(mut self) {
        let mut buffer = vec![0; PACKET_BYTES];
        while let Some(readable) = self.wait() {
            for port in readable {
                self.take_from(port, &mut buffer);
            }
            self.deliver_due();
        }
    }

    /// Waits for packets or for the time of the next arrival; `None` when the relay is to stop.
    fn wait(&self) -> Option<Vec<usize>> {
        let next = self.waiting.peek().map(|Reverse(waiting)| waiting.at);
        let timeout =
            next.map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1)));
        let timeout = timeout.map(|time| Timespec {
            tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        let mut fds: Vec<PollFd<'_>> =
            self.devices.iter().map(|device| PollFd::new(device, PollFlags::IN)).collect();
        fds.push(PollFd::new(&self.stopped, PollFlags::IN));
        // Interrupted: nothing is readable, and the next call waits on.
        let _ = poll(&mut fds, timeout.as_ref());
        let readable = |port: &usize| fds[*port].revents().contains(PollFlags::IN);
        let (ports, stopped) = (self.devices.len(), !fds[self.devices.len()].revents().is_empty());
        (!stopped).then(|| (0..ports).filter(readable).collect())
    }

    fn take_from(&mut self, port: usize, buffer: &mut [u8]) {
        let ports = self.devices.len();
        let faults: Vec<Faults> = locked(&self.shared.faults)[port * ports..][..ports].to_vec();
        let now = Instant::now();
        for _ in 0..BATCH {
            // Nothing left, or the device has gone with its namespace.
            let Ok(len) = self.devices[port].read(buffer) else { return };
            let packet = &buffer[..len];
            // Broadcasts and what the kernel says to the neighbourhood are for nobody.
            let to =
                destination(packet).and_then(|to| self.addresses.iter().position(|own| own.contains(&to)));
            let Some(to) = to else { continue };
            self.send(port * ports + to, &faults[to], packet, now);
        }
    }

    fn send(&mut self, path: usize, faults: &Faults, packet: &[u8], now: Instant) {
        let was_empty = self.paths[path].is_empty();
        let fate = self.paths[path].send(faults, packet.len(), now, &mut || self.random.f64());
        match fate {
            Fate::Dropped(reason) => {
                let mut counts = locked(&self.shared.counts);
                *match reason {
                    Reason::Cut => &mut counts.cut,
                    Reason::Lost => &mut counts.lost,
                    Reason::TooLarge => &mut counts.too_large,
                    Reason::Overflow => &mut counts.overflow,
                } += 1;
            }
            Fate::Arrives { at, again, late } => {
                if late || again.is_some() {
                    let mut counts = locked(&self.shared.counts);
                    counts.late += u64::from(late);
                    counts.duplicated += u64::from(again.is_some());
                }
                if at <= now && was_empty {
                    self.arrive(path, packet);
                } else {
                    self.keep(at, path, packet);
                }
                if let Some(again) = again {
                    self.keep(again, path, packet);
                }
            }
        }
    }

    fn keep(&mut self, at: Instant, path: usize, packet: &[u8]) {
        self.sequence += 1;
        let waiting = Waiting { at, sequence: self.sequence, path, packet: packet.to_vec() };
        self.waiting.push(Reverse(waiting));
    }

    fn deliver_due(&mut self) {
        let now = Instant::now();
        while self.waiting.peek().is_some_and(|Reverse(waiting)| waiting.at <= now) {
            let Some(Reverse(Waiting { path, packet, .. })) = self.waiting.pop() else { return };
            self.arrive(path, &packet);
        }
    }

    fn arrive(&mut self, path: usize, packet: &[u8]) {
        self.paths[path].arrived(packet.len());
        // A device that is down, or has gone with its namespace, takes nothing.
        if self.devices[path % self.devices.len()].write(packet).is_ok() {
            let mut counts = locked(&self.shared.counts);
            counts.arrived += 1;
            counts.arrived_bytes += packet.len() as u64;
            counts.longest = counts.longest.max(packet.len());
        }
    }
}

/// Where an IP packet is to go (RFC 791, 3.1; RFC 8200, 3); `None` for anything else.
fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?).into()),
        6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?).into()),
        _ => None,
    }
}

/// The values are whole at every moment, so a thread that panicked has left nothing half done.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_goes_where_its_header_says_and_nothing_else_goes_anywhere() {
        let mut packet = [0; 40];
        packet[0] = 0x45;
        packet[16..20].copy_from_slice(&[10, 77, 0, 3]);
        assert_eq!(destination(&packet), Some([10, 77, 0, 3].into()));
        assert_eq!(destination(&packet[..19]), None, "cut off");
        packet[0] = 0x60;
        packet[24] = 0xfd;
        packet[39] = 3;
        assert_eq!(destination(&packet), "fd00::3".parse().ok());
        assert_eq!(destination(&packet[..39]), None, "cut off");
        packet[0] = 0x50;
        assert_eq!(destination(&packet), None, "neither IPv4 nor IPv6");
        assert_eq!(destination(&[]), None);
    }
}
