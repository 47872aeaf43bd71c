//! Links through memory that the ranks of one host share.
//!
//! [`upgrade`] takes links that exist (QUIC between processes, channels between threads) and finds out
//! which of their ranks are on one host. Between those bytes no longer travel over the links but through
//! rings in shared memory, and the collectives get a [board](Segments::board) each for what is faster
//! than a stream of bytes. The links stay: control messages, the goodbye and the reason of a failure go
//! over them, and all bytes to ranks of other hosts.
//!
//! Nobody has to poll for the death of a peer: its Unix socket ends with its process, and a
//! heartbeat notices one that lives and does not run. Both are looked at only when nothing
//! has come for a while.
//!
//! A rank makes 2 MiB of shared memory, however long its messages are (a little more beyond 32 ranks),
//! and maps that of the others.

mod handshake;
mod heartbeat;
pub mod layout;
mod memory;
mod ring;
mod segments;
mod waiting;

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use layout::{BOARD_BYTES, LINE_BYTES, RANK_LIMIT};
pub use memory::SharedMemory;
pub use segments::Segments;

use self::handshake::Acquaintance;
use self::heartbeat::Heartbeat;
use self::waiting::Waiting;
use crate::{Error, Forming, Transport};

/// How long after the end of a peer's process somebody may still say why it ended (its launcher, which
/// knows the signal), or that it had left in order.
const REASON_GRACE: Duration = Duration::from_millis(10);

/// How often a waiting rank looks at the links below and at its peers' sockets.
const LOOK_INTERVAL: Duration = Duration::from_micros(500);

/// Between two looks at a peer whose memory is waited for. Its answer, or its death, ends the wait anyhow.
const SOCKET_WAIT: Duration = Duration::from_millis(20);

/// The longest sleep of a rank that waits for ranks of this host and of others: the former's bell does not
/// end a wait for the network.
const MIXED_WAIT: Duration = Duration::from_micros(500);

/// Whether ranks of one host share memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sharing {
    /// Those that are on one host and do not object.
    #[default]
    Auto,
    /// Only within each block of so many ranks, as if every block were a host; for tests and comparisons.
    WithinBlocks(usize),
    /// Never; for comparison, or where the memory cannot be spared.
    Off,
}

impl Sharing {
    /// Whether two ranks may try.
    fn allows(self, one: usize, other: usize) -> bool {
        match self {
            Self::Off => false,
            Self::Auto => true,
            Self::WithinBlocks(len) => one / len.max(1) == other / len.max(1),
        }
    }
}

/// Finds out which ranks of `links` are on one host, and returns links that go through shared memory
/// between those; the links as they were, ready for use, when no two are.
///
/// Every rank calls it, before anything else is sent. Blocks until all ranks have, until `deadline` at
/// most, or until `give_up` has a reason: somebody has learnt that a rank will not come.
///
/// A link that is lost meanwhile is for the first operation to report; memory is not shared then.
///
/// # Errors
/// [`Error::GaveUp`] with the reason, [`Error::TimedOut`]; the links are then gone.
pub fn upgrade(
    mut links: Box<dyn Transport>,
    sharing: Sharing,
    deadline: Instant,
    give_up: &dyn Fn() -> Option<String>,
) -> Result<Box<dyn Transport>, Error> {
    if links.world_size() == 1 {
        return Ok(links);
    }
    let rank = links.rank();
    let outcome = match handshake::run(&mut *links, sharing, deadline, give_up) {
        Ok(outcome) => outcome,
        // A rank that is done here may have failed or left already. Whoever is not done finds that out at its
        // first operation, which names it, and hears why.
        Err(error @ (Error::Lost { .. } | Error::Left { .. })) => Err(error.to_string()),
        Err(error) => return Err(error),
    };
    // What is sound on one rank and fails on another would deadlock, so a thread that cannot be
    // started is fatal here: the other ranks have been told that memory is shared.
    match outcome {
        Ok(acquaintance) => Ok(Box::new(ShmTransport::new(links, acquaintance)?)),
        Err(reason) => {
            tracing::info!(rank, links = links.name(), reason, "memory is not shared");
            Ok(links)
        }
    }
}

/// Links to mirror images: all ranks have this rank's segment, so whatever it does the others have done already.
///
/// For counting instructions: a collective of several ranks takes the same path every time when nobody has to
/// be waited for. No part of the API.
///
/// # Errors
/// [`Error::Usage`] when memory cannot be had.
#[doc(hidden)]
pub fn mirrored(links: Box<dyn Transport>) -> Result<Box<dyn Transport>, Error> {
    let acquaintance = handshake::mirror_images(links.world_size())
        .map_err(|error| Error::Usage { reason: format!("cannot map a segment: {error}") })?;
    Ok(Box::new(ShmTransport::new(links, acquaintance)?))
}

/// One rank's links to all other ranks, those of its host through shared memory.
#[derive(Debug)]
struct ShmTransport {
    links: Box<dyn Transport>,
    segments: Arc<Segments>,
    /// For each rank of the world, its place in the segments; `None` on another host.
    places: Vec<Option<usize>>,
    /// By place; `None` at this rank.
    sockets: Vec<Option<UnixStream>>,
    heartbeat: Heartbeat,
    waiting: Waiting,
    /// By rank of the world: how each link through memory ended, as far as was seen when last looked.
    ends: Vec<Option<Error>>,
    /// By place: since when each peer's process is known to have ended.
    gone_since: Vec<Option<Instant>>,
    looked_at: Option<Instant>,
    /// Memory handed out so far by `share`.
    shared: u64,
    waker: Waker,
}

impl ShmTransport {
    fn new(links: Box<dyn Transport>, acquaintance: Acquaintance) -> Result<Self, Error> {
        let world_size = links.world_size();
        let Acquaintance { members, hosts, memory, sockets, processors } = acquaintance;
        let places = (0..world_size).map(|rank| members.iter().position(|&member| member == rank)).collect();
        let gone_since = vec![None; members.len()];
        let segments = Arc::new(Segments::new(links.rank(), members, hosts, memory, processors));
        let heartbeat = Heartbeat::start(segments.clone()).map_err(|error| Error::Usage {
            reason: format!("cannot start the heartbeat's thread: {error}"),
        })?;
        let waker = Waker::from(Arc::new(Bell { segments: segments.clone(), links: links.waker() }));
        Ok(Self {
            waiting: Waiting::new(&segments),
            links,
            segments,
            places,
            sockets,
            heartbeat,
            ends: vec![None; world_size],
            gone_since,
            looked_at: None,
            shared: 0,
            waker,
        })
    }

    /// Looks at all that may have happened to the peers, if the last look is old enough.
    fn look(&mut self, now: Instant) {
        if self.looked_at.is_some_and(|before| now < before + LOOK_INTERVAL) {
            return;
        }
        self.looked_at = Some(now);
        self.look_at_sockets(now);
        for place in 0..self.sockets.len() {
            let peer = self.segments.members()[place];
            if place != self.segments.rank() && self.ends[peer].is_none() {
                self.ends[peer] = self.end_of(peer, place, now);
            }
        }
    }

    fn end_of(&mut self, peer: usize, place: usize, now: Instant) -> Option<Error> {
        let lost = |reason: String| Some(Error::Lost { peer, reason });
        match self.links.try_recv(peer, &mut [0]) {
            Ok(0) => {}
            Ok(_) => return lost("it sent bytes beside the shared memory".to_owned()),
            Err(end) => return Some(end),
        }
        if self.gone_since[place].is_some_and(|since| now >= since + REASON_GRACE) {
            return lost("its process has ended".to_owned());
        }
        let silence = self.heartbeat.silence(place)?;
        lost(format!("its process has not run for {} s", silence.as_secs_f64()))
    }

    /// Notes whose socket has ended.
    fn look_at_sockets(&mut self, now: Instant) {
        // `IN` is not asked for: only the hang-up counts, and it is always reported.
        let open: Vec<usize> = (0..self.sockets.len())
            .filter(|&place| self.sockets[place].is_some() && self.gone_since[place].is_none())
            .collect();
        let of = |&place: &usize| self.sockets[place].as_ref().expect("only open sockets are listed").as_fd();
        let mut files: Vec<PollFd<'_>> =
            open.iter().map(|place| PollFd::from_borrowed_fd(of(place), PollFlags::empty())).collect();
        if poll(&mut files, Some(&Timespec::default())).is_ok_and(|count| count > 0) {
            let gone: Vec<bool> = files.iter().map(|file| !file.revents().is_empty()).collect();
            for (&place, _) in open.iter().zip(gone).filter(|(_, gone)| *gone) {
                self.gone_since[place] = Some(now);
            }
        }
    }

    fn socket(&self, place: usize) -> BorrowedFd<'_> {
        self.sockets[place].as_ref().expect("a rank has no socket to itself").as_fd()
    }

    /// Waits until the rank at `place` has said something through its socket, or will not any more: it was
    /// frozen, or gave up and lives on.
    fn wait_for_socket(&mut self, place: usize, deadline: Instant) -> Result<(), Error> {
        let peer = self.segments.members()[place];
        loop {
            // Seen before the look at the socket: what was said before the end is there then.
            self.look(Instant::now());
            let end = self.end(peer);
            let next_look = deadline.min(Instant::now() + SOCKET_WAIT);
            match (handshake::readable(self.socket(place), next_look), end) {
                (Ok(()), _) => return Ok(()),
                (Err(_), Err(end)) => return Err(end),
                (Err(error), Ok(_)) if Instant::now() >= deadline => {
                    return Err(Error::Lost { peer, reason: error.to_string() });
                }
                (Err(_), Ok(_)) => {}
            }
        }
    }

    /// Whether all ranks are on this host.
    fn is_whole(&self) -> bool {
        self.sockets.len() == self.places.len()
    }

    fn end(&self, peer: usize) -> Result<usize, Error> {
        self.ends[peer].clone().map_or(Ok(0), Err)
    }
}

impl Transport for ShmTransport {
    fn name(&self) -> &'static str {
        match self.links.name() {
            _ if self.is_whole() => "shm",
            "quic" => "shm+quic",
            "tls" => "shm+tls",
            "tcp" => "shm+tcp",
            "mem" => "shm+mem",
            _ => "shm+links",
        }
    }

    fn rank(&self) -> usize {
        self.links.rank()
    }

    fn world_size(&self) -> usize {
        self.places.len()
    }

    fn epoch(&self) -> u64 {
        self.links.epoch()
    }

    fn try_send(&mut self, to: usize, parts: &[IoSlice<'_>]) -> Result<usize, Error> {
        let Some(place) = self.places[to] else { return self.links.try_send(to, parts) };
        self.end(to)?;
        let ring = self.segments.ring_to(place);
        let mut sent = 0;
        for part in parts {
            let count = ring.put(part);
            sent += count;
            if count < part.len() {
                break;
            }
        }
        if sent > 0 {
            self.segments.wake(place);
            self.waiting.end(&self.segments);
        }
        Ok(sent)
    }

    fn try_recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Error> {
        let Some(place) = self.places[from] else {
            let count = self.links.try_recv(from, into)?;
            if count > 0 {
                self.waiting.end(&self.segments);
            }
            return Ok(count);
        };
        // First what is in the ring: it was put there before the link ended.
        match self.segments.ring_from(place).take(into) {
            0 if into.is_empty() => Ok(0),
            0 => self.end(from),
            count => {
                self.segments.wake(place);
                self.waiting.end(&self.segments);
                Ok(count)
            }
        }
    }

    fn send_control(&mut self, to: usize, message: &[u8]) -> Result<(), Error> {
        self.links.send_control(to, message)
    }

    fn try_recv_control(&mut self, from: usize) -> Result<Option<Vec<u8>>, Error> {
        self.links.try_recv_control(from)
    }

    fn spin(&mut self) -> bool {
        // Both: whoever waits for other hosts may have to move their bytes itself.
        let links = !self.is_whole() && self.links.spin();
        self.waiting.spin() || links
    }

    fn pause(&mut self) {
        if !self.is_whole() {
            self.links.pause();
        }
    }

    fn wait_is_over(&mut self) {
        self.waiting.end(&self.segments);
        if !self.is_whole() {
            self.links.wait_is_over();
        }
    }

    fn wait(&mut self, until: Instant) {
        let now = Instant::now();
        self.look(now);
        match self.is_whole() {
            true => self.waiting.pass(&self.segments, until.saturating_duration_since(now)),
            false => self.links.wait(until.min(now + MIXED_WAIT)),
        }
    }

    fn wait_for(&mut self, peers: &[usize], until: Instant) {
        let here = |&peer: &usize| self.places[peer].is_some();
        if self.is_whole() || (!peers.is_empty() && peers.iter().all(here)) {
            let now = Instant::now();
            self.look(now);
            self.waiting.pass(&self.segments, until.saturating_duration_since(now));
        } else if peers.iter().any(here) {
            self.wait(until);
        } else {
            self.look(Instant::now());
            self.links.wait_for(peers, until);
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn check(&mut self, peer: usize) -> Result<(), Error> {
        if self.places[peer].is_none() {
            return self.links.check(peer);
        }
        self.end(peer).map(|_| ())
    }

    fn give_up(&mut self, peer: usize, reason: &str) {
        let lost = || Error::Lost { peer, reason: reason.to_owned() };
        self.ends[peer].get_or_insert_with(lost);
        self.links.give_up(peer, reason);
    }

    /// The new links are those below; whoever takes them has them upgraded.
    fn split(&mut self, members: &[usize], id: u64, deadline: Instant) -> Result<Forming, Error> {
        self.links.split(members, id, deadline)
    }

    fn segments(&self) -> Option<Arc<Segments>> {
        Some(self.segments.clone())
    }

    fn share(&mut self, memory: SharedMemory, deadline: Instant) -> Result<Vec<SharedMemory>, Error> {
        self.shared += 1;
        let (own_place, len) = (self.segments.rank(), memory.len());
        let offer = handshake::offer(self.shared, len);
        let members = self.segments.members().to_vec();
        let lost =
            |place: usize, error: io::Error| Error::Lost { peer: members[place], reason: error.to_string() };
        for (place, socket) in self.sockets.iter().enumerate() {
            if let Some(socket) = socket {
                handshake::send_memory(socket.as_fd(), &offer, memory.file())
                    .map_err(|error| lost(place, error))?;
            }
        }
        let mut own = Some(memory);
        (0..members.len())
            .map(|place| {
                if place == own_place {
                    return Ok(own.take().expect("this rank comes once"));
                }
                self.wait_for_socket(place, deadline)?;
                handshake::take_memory(self.socket(place), &offer, len, deadline)
                    .map_err(|error| lost(place, error))
            })
            .collect()
    }

    fn abort(&mut self, message: &[u8], deadline: Instant) {
        self.links.abort(message, deadline);
    }

    fn leave(&mut self, deadline: Instant) -> Result<(), Error> {
        self.links.leave(deadline)
    }
}

/// Wakes a rank from wherever it sleeps: on its bell, or on the links below.
struct Bell {
    segments: Arc<Segments>,
    links: Waker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.segments.ring_bell(self.segments.rank());
        self.links.wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Two ranks that share memory.
    fn pair() -> (Box<dyn Transport>, Box<dyn Transport>) {
        let upgraded = |links| {
            let upgraded = upgrade(links, Sharing::Auto, Instant::now() + PATIENCE, &|| None);
            upgraded.expect("threads are on one host")
        };
        let mut links = mem::group(2, 1, 4096).into_iter();
        let mut next = || Box::new(links.next().expect("a link for each rank"));
        let (one, other) = (next(), next());
        let other = std::thread::spawn(move || upgraded(other));
        (upgraded(one), other.join().expect("no panic"))
    }

    fn share(transport: &mut dyn Transport) -> Result<Vec<SharedMemory>, Error> {
        transport.share(SharedMemory::create(4096).expect("memory"), Instant::now() + PATIENCE)
    }

    #[test]
    fn the_memory_of_a_peer_that_gave_up_and_lives_on_is_not_waited_for() {
        let (mut one, mut other) = pair();
        other.abort(b"why", Instant::now() + PATIENCE);
        let started = Instant::now();
        let error = share(&mut *one).expect_err("no memory comes");
        assert!(matches!(error, Error::Lost { peer: 1, .. }), "{error}");
        assert!(started.elapsed() < PATIENCE / 6, "after {:?}", started.elapsed());
    }

    #[test]
    fn the_memory_that_a_peer_gave_before_it_gave_up_is_taken() {
        let (mut one, mut other) = pair();
        let giving = std::thread::spawn(move || {
            let shared = share(&mut *other).expect("both share");
            other.abort(b"why", Instant::now() + PATIENCE);
            (other, shared)
        });
        assert_eq!(share(&mut *one).expect("it came").len(), 2);
        drop(giving.join().expect("no panic"));
    }
}
