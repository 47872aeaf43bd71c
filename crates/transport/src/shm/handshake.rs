//! How ranks find out that they are on one host, and hand each other their memory.
//!
//! Nobody compares host names: two ranks are on one host if one can connect to the other's Unix socket
//! and map the memory that comes through it. The sockets' names and a token each travel over the links
//! that exist already, which are authenticated; whoever connects without the token is turned away.
//!
//! 1. Every rank listens at a name of its own and tells it to all others.
//! 2. The higher rank of each pair connects and says over the link whether it could.
//! 3. Every rank tells all others whom it could reach. Ranks that reach each other and nobody else are a
//!    host, and all ranks know all hosts.
//! 4. The ranks of a host say who they are, with the other's token, and send their segment's descriptor.
//! 5. Every rank tells all others whether it has all segments of its host. Only a host on which everybody
//!    has shares memory: a choice that ranks make differently would deadlock them.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg, sockopt::socket_peercred,
};
use rustix::thread::{CpuSet, sched_getaffinity};

use super::Sharing;
use super::layout::{Layout, RANK_LIMIT};
use super::memory::SharedMemory;
use crate::{Error, Transport, random};

/// Announces the version: a rank of another release answers something else, and memory is not shared.
const MAGIC: [u8; 8] = *b"PACESHM1";

/// How long the other end of a Unix socket may take to say who it is. It is on this host and has
/// connected already; the rest is for a machine that is overloaded.
const INTRODUCTION_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is asked whether to give up.
const GIVE_UP_INTERVAL: Duration = Duration::from_millis(20);

/// What the ranks of one host have of each other.
pub(super) struct Acquaintance {
    /// The ranks of this host, in order. Their places here are the indices below.
    pub(super) members: Vec<usize>,
    /// For each rank of the world, the lowest rank of its host. Equal on all ranks.
    pub(super) hosts: Vec<usize>,
    /// This rank's own included.
    pub(super) memory: Vec<SharedMemory>,
    /// `None` at this rank. Ends when the other process does.
    pub(super) sockets: Vec<Option<UnixStream>>,
    /// How many processors the ranks have together.
    pub(super) processors: usize,
}

/// A rank's own side of the handshake.
struct Door {
    listener: UnixListener,
    hello: Hello,
}

/// The first bytes on each link.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Hello {
    /// In the abstract namespace; all zero when this rank will not share memory.
    name: [u8; 16],
    token: [u8; 16],
    /// The processors that this rank may run on, a bit each.
    processors: [u8; PROCESSOR_BYTES],
}

/// As many processors as the kernel's own type has.
const PROCESSOR_BYTES: usize = CpuSet::MAX_CPU / 8;

const HELLO_BYTES: usize = 40 + PROCESSOR_BYTES;

/// What is said through a Unix socket: magic, rank, the listener's or the caller's token.
const INTRODUCTION_BYTES: usize = 32;

/// Runs the handshake. The reason in words, when no two ranks share a host; every rank gets the same
/// answer. A rank that is alone on its host while others are not is a group of one.
///
/// # Errors
/// Those of the links, [`Error::GaveUp`] with what `give_up` says, [`Error::TimedOut`].
pub(super) fn run(
    links: &mut dyn Transport,
    sharing: Sharing,
    deadline: Instant,
    give_up: &dyn Fn() -> Option<String>,
) -> Result<Result<Acquaintance, String>, Error> {
    let (rank, world_size) = (links.rank(), links.world_size());
    let mut link = Links { links, deadline, give_up };
    let opened = match sharing {
        Sharing::Off => Err("shared memory is turned off".to_owned()),
        Sharing::Auto | Sharing::WithinBlocks(_) => {
            Door::open().map_err(|error| format!("this rank cannot share memory: {error}"))
        }
    };
    let own_hello = opened.as_ref().map_or(Hello::UNWILLING, |door| door.hello);
    let hellos = link.exchange(|_| own_hello.to_bytes().to_vec())?;
    let hellos: Vec<Option<Hello>> = hellos.iter().map(|bytes| Hello::from_bytes(bytes.as_ref()?)).collect();
    let near = |peer: usize| opened.is_ok() && sharing.allows(rank, peer);
    let mut sockets: Vec<Option<UnixStream>> = (0..world_size)
        .map(|peer| hellos[peer].filter(|_| peer < rank && near(peer)).and_then(|hello| hello.connect().ok()))
        .collect();
    let answers = link.exchange(|peer| vec![u8::from(peer < rank && sockets[peer].is_some())])?;
    let reached = |peer: usize| peer == rank || sockets[peer].is_some() || answers[peer] == Some(vec![1]);
    let own_row = to_bits((0..world_size).map(reached));
    let rows = link.exchange(|_| own_row.clone())?;
    let rows: Vec<Vec<u8>> = rows.into_iter().map(|row| row.unwrap_or_else(|| own_row.clone())).collect();
    let groups = groups(&rows);
    let members = groups[rank].clone();
    let outcome = match opened {
        Ok(door) if members.len() > 1 => {
            sockets
                .iter_mut()
                .enumerate()
                .filter(|(peer, _)| !members.contains(peer))
                .for_each(|(_, s)| *s = None);
            door.introduce(rank, sockets, (&members, &hellos), give_up).map(Some)
        }
        Ok(_) => Ok(None),
        Err(reason) => Err(reason),
    };
    let verdicts = link.exchange(|_| vec![u8::from(outcome.is_ok())])?;
    let fine = |peer: usize| if peer == rank { outcome.is_ok() } else { verdicts[peer] == Some(vec![1]) };
    let shared: Vec<bool> =
        groups.iter().map(|group| group.len() > 1 && group.iter().all(|&it| fine(it))).collect();
    if !shared.contains(&true) {
        return Ok(Err(match outcome {
            Err(reason) => reason,
            Ok(_) => match groups.iter().flatten().find(|&&peer| !fine(peer)) {
                Some(peer) => format!("rank {peer} does not share memory"),
                None => "no two ranks are on one host".to_owned(),
            },
        }));
    }
    let hosts = (0..world_size).map(|it| if shared[it] { groups[it][0] } else { it }).collect();
    let met = match outcome {
        Ok(Some(met)) if shared[rank] => met,
        // What others share, this rank does not: it is its own host.
        _ => alone(rank)
            .map_err(|error| Error::Usage { reason: format!("cannot make shared memory: {error}") })?,
    };
    Ok(Ok(Acquaintance { hosts, ..met }))
}

/// What a rank has that is the only one on its host.
fn alone(rank: usize) -> io::Result<Acquaintance> {
    let memory = vec![SharedMemory::create(Layout::new(1).len())?];
    let processors = own_processors().iter().map(|byte| byte.count_ones() as usize).sum();
    Ok(Acquaintance { members: vec![rank], hosts: Vec::new(), memory, sockets: vec![None], processors })
}

/// A bit for each.
fn to_bits(bits: impl Iterator<Item = bool>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, bit) in bits.enumerate() {
        if index % 8 == 0 {
            bytes.push(0);
        }
        *bytes.last_mut().expect("pushed before the first bit") |= u8::from(bit) << (index % 8);
    }
    bytes
}

/// The ranks of each rank's host, from what each could reach: those that reach each other and nobody else.
/// A rank is alone if that is not so, or if there are too many of them.
fn groups(rows: &[Vec<u8>]) -> Vec<Vec<usize>> {
    let reaches = |from: usize, to: usize| rows[from][to / 8] >> (to % 8) & 1 == 1;
    (0..rows.len())
        .map(|rank| {
            let members: Vec<usize> = (0..rows.len()).filter(|&peer| reaches(rank, peer)).collect();
            let closed = members.contains(&rank) && members.iter().all(|&peer| rows[peer] == rows[rank]);
            if closed && members.len() <= RANK_LIMIT { members } else { vec![rank] }
        })
        .collect()
}

/// What a rank would have whose peers all had its own segment, and a processor each.
pub(super) fn mirror_images(world_size: usize) -> io::Result<Acquaintance> {
    let own = SharedMemory::create(Layout::new(world_size).len())?;
    let again = |_| SharedMemory::open(own.file().try_clone_to_owned()?, own.len());
    let memory = (0..world_size).map(again).collect::<io::Result<_>>()?;
    Ok(Acquaintance {
        members: (0..world_size).collect(),
        hosts: vec![0; world_size],
        memory,
        sockets: (0..world_size).map(|_| None).collect(),
        processors: world_size,
    })
}

impl Door {
    fn open() -> io::Result<Self> {
        let random: [u8; 32] = random::bytes()?;
        let (name, token) = random.split_at(16);
        let hello = Hello {
            name: name.try_into().expect("16 bytes"),
            token: token.try_into().expect("16 bytes"),
            processors: own_processors(),
        };
        let listener = UnixListener::bind_addr(&hello.addr()?)?;
        Ok(Self { listener, hello })
    }

    /// Meets the other ranks of this host: those that this one has called, through `sockets`, and those that
    /// call. The result knows nothing of other hosts. A rank that dies meanwhile never says who it was, so `give_up` ends
    /// the wait for it.
    fn introduce(
        self,
        rank: usize,
        mut sockets: Vec<Option<UnixStream>>,
        (members, hellos): (&[usize], &[Option<Hello>]),
        give_up: &dyn Fn() -> Option<String>,
    ) -> Result<Acquaintance, String> {
        let world_size = hellos.len();
        let deadline = Instant::now() + INTRODUCTION_TIMEOUT;
        let own = SharedMemory::create(Layout::new(members.len()).len());
        let own = own.map_err(|error| format!("this rank has no memory to share: {error}"))?;
        let mut memory: Vec<Option<SharedMemory>> = (0..world_size).map(|_| None).collect();
        let failed = |peer: usize, error: io::Error| format!("meeting rank {peer}: {error}");
        let say = |socket: &UnixStream, peer: usize| {
            let token = hellos[peer].map_or([0; 16], |hello| hello.token);
            send_memory(socket.as_fd(), &introduction(rank, &token), own.file())
        };
        let hear = |socket: &UnixStream| -> io::Result<(usize, SharedMemory)> {
            readable_unless(socket.as_fd(), deadline, give_up)?;
            let (bytes, file) = receive_memory(socket.as_fd(), deadline)?;
            let peer = introduced(&bytes, &self.hello.token, world_size)?;
            Ok((peer, SharedMemory::open(file, own.len())?))
        };
        for (peer, socket) in sockets.iter().enumerate() {
            if let Some(socket) = socket {
                say(socket, peer).map_err(|error| failed(peer, error))?;
            }
        }
        let is_missing = |memory: &[Option<SharedMemory>], peer: usize| {
            peer > rank && members.contains(&peer) && memory[peer].is_none()
        };
        while members.iter().any(|&peer| is_missing(&memory, peer)) {
            let socket = readable_unless(self.listener.as_fd(), deadline, give_up)
                .and_then(|()| accept(&self.listener, deadline))
                .map_err(|error| format!("waiting for a rank: {error}"))?;
            // Whoever is turned away here has found a name that is in no list, or is not one of ours.
            match hear(&socket) {
                Ok((peer, theirs)) if is_missing(&memory, peer) => {
                    say(&socket, peer).map_err(|error| failed(peer, error))?;
                    memory[peer] = Some(theirs);
                    sockets[peer] = Some(socket);
                }
                Ok((peer, _)) => tracing::warn!(rank, peer, "refused a second caller on the Unix socket"),
                Err(error) => tracing::warn!(rank, %error, "refused a caller on the Unix socket"),
            }
        }
        for &peer in members.iter().filter(|&&peer| peer < rank) {
            let socket = sockets[peer].as_ref().ok_or_else(|| format!("rank {peer} was not reached"))?;
            let (named, theirs) = hear(socket).map_err(|error| failed(peer, error))?;
            if named != peer {
                return Err(format!("rank {peer} says that it is rank {named}"));
            }
            memory[peer] = Some(theirs);
        }
        let of_members = members.iter().filter_map(|&peer| hellos[peer].as_ref());
        let processors = count_processors(of_members.chain([&self.hello]));
        memory[rank] = Some(own);
        Ok(Acquaintance {
            members: members.to_vec(),
            hosts: Vec::new(),
            memory: members.iter().filter_map(|&peer| memory[peer].take()).collect(),
            sockets: members.iter().map(|&peer| sockets[peer].take()).collect(),
            processors,
        })
    }
}

impl Hello {
    const UNWILLING: Self = Self { name: [0; 16], token: [0; 16], processors: [0; PROCESSOR_BYTES] };

    fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(&self.name);
        bytes[24..40].copy_from_slice(&self.token);
        bytes[40..].copy_from_slice(&self.processors);
        bytes
    }

    /// `None` for a rank that is unwilling, or of a release that shares memory in another way.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HELLO_BYTES] = bytes.try_into().ok()?;
        let hello = Self {
            name: bytes[8..24].try_into().expect("16 bytes"),
            token: bytes[24..40].try_into().expect("16 bytes"),
            processors: bytes[40..].try_into().expect("a bit for each processor"),
        };
        (bytes[..8] == MAGIC && hello != Self::UNWILLING).then_some(hello)
    }

    fn addr(&self) -> io::Result<SocketAddr> {
        let mut name = b"paceline-".to_vec();
        for byte in self.name {
            name.extend_from_slice(format!("{byte:02x}").as_bytes());
        }
        SocketAddr::from_abstract_name(name)
    }

    fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect_addr(&self.addr()?)
    }
}

fn introduction(rank: usize, token: &[u8; 16]) -> [u8; INTRODUCTION_BYTES] {
    let mut bytes = [0; INTRODUCTION_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&(rank as u64).to_le_bytes());
    bytes[16..].copy_from_slice(token);
    bytes
}

/// The rank that an introduction names, if it shows the token that was given to it.
fn introduced(
    bytes: &[u8; INTRODUCTION_BYTES],
    own_token: &[u8; 16],
    world_size: usize,
) -> io::Result<usize> {
    let rank = u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes"));
    // All bytes are compared, whatever the first ones say, so that the time tells nothing.
    let differing = bytes[16..].iter().zip(own_token).fold(0, |sum, (a, b)| sum | (a ^ b));
    if bytes[..8] != MAGIC || differing != 0 || rank >= world_size as u64 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it does not know this job's token"));
    }
    Ok(rank as usize)
}

fn own_processors() -> [u8; PROCESSOR_BYTES] {
    let mut bits = [0; PROCESSOR_BYTES];
    // Fails only for a process that does not exist.
    if let Ok(own) = sched_getaffinity(None) {
        (0..CpuSet::MAX_CPU).filter(|&cpu| own.is_set(cpu)).for_each(|cpu| bits[cpu / 8] |= 1 << (cpu % 8));
    }
    bits
}

/// How many processors some ranks have together.
fn count_processors<'a>(hellos: impl Iterator<Item = &'a Hello>) -> usize {
    let mut all = [0u8; PROCESSOR_BYTES];
    hellos.for_each(|hello| all.iter_mut().zip(hello.processors).for_each(|(all, theirs)| *all |= theirs));
    all.iter().map(|byte| byte.count_ones() as usize).sum()
}

/// Waits for a connection of this user's until `deadline`.
fn accept(listener: &UnixListener, deadline: Instant) -> io::Result<UnixStream> {
    loop {
        readable(listener.as_fd(), deadline)?;
        let (socket, _) = listener.accept()?;
        let uid = socket_peercred(&socket)?.uid;
        if uid == rustix::process::geteuid() {
            return Ok(socket);
        }
        tracing::warn!(uid = uid.as_raw(), "refused another user on the Unix socket");
    }
}

/// Waits until something can be read from `file`, or its other end is closed.
pub(super) fn readable(file: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "nothing came within the deadline"));
        }
        let mut files = [PollFd::from_borrowed_fd(file, PollFlags::IN)];
        match poll(&mut files, left.try_into().ok().as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends `bytes` with a descriptor of `memory`. A few dozen bytes always fit a socket's buffer.
pub(super) fn send_memory(
    socket: BorrowedFd<'_>,
    bytes: &[u8; INTRODUCTION_BYTES],
    memory: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files = [memory];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)), "there is space for one descriptor");
    let sent = sendmsg(socket, &[io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    match sent == bytes.len() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::WriteZero, "the socket took a part of a message")),
    }
}

/// Waits until there is something to read, until `deadline`, or until `give_up` has a reason.
fn readable_unless(
    file: BorrowedFd<'_>,
    deadline: Instant,
    give_up: &dyn Fn() -> Option<String>,
) -> io::Result<()> {
    loop {
        if let Some(reason) = give_up() {
            return Err(io::Error::other(reason));
        }
        match readable(file, deadline.min(Instant::now() + GIVE_UP_INTERVAL)) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut && Instant::now() < deadline => {}
            outcome => return outcome,
        }
    }
}

/// Receives what [`send_memory`] sends, until `deadline`.
pub(super) fn receive_memory(
    socket: BorrowedFd<'_>,
    deadline: Instant,
) -> io::Result<([u8; INTRODUCTION_BYTES], OwnedFd)> {
    let mut bytes = [0; INTRODUCTION_BYTES];
    let (mut filled, mut file) = (0, None);
    while filled < bytes.len() {
        readable(socket, deadline)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [io::IoSliceMut::new(&mut bytes[filled..])];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = match recvmsg(socket, into, &mut ancillary, flags) {
            Ok(got) => got.bytes,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(error) => return Err(error.into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                file = files.last().or(file);
            }
        }
        if got == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end was closed"));
        }
        filled += got;
    }
    let file =
        file.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no memory came with the message"))?;
    Ok((bytes, file))
}

/// The links before memory is shared, for a few bytes at a time.
struct Links<'a> {
    links: &'a mut dyn Transport,
    deadline: Instant,
    give_up: &'a dyn Fn() -> Option<String>,
}

impl Links<'_> {
    /// Sends some bytes to every peer and receives as many from each; `None` at this rank. All ranks send
    /// as many to everybody.
    fn exchange(&mut self, to: impl Fn(usize) -> Vec<u8>) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let (rank, world_size) = (self.links.rank(), self.links.world_size());
        let started = Instant::now();
        let outgoing: Vec<Vec<u8>> = (0..world_size).map(to).collect();
        let len = outgoing[rank].len();
        let mut sent = vec![0; world_size];
        let mut received = vec![(vec![0; len], 0); world_size];
        (sent[rank], received[rank].1) = (len, len);
        loop {
            let mut moved = false;
            for peer in (0..world_size).filter(|&peer| peer != rank) {
                if sent[peer] < len {
                    let count =
                        self.links.try_send(peer, &[io::IoSlice::new(&outgoing[peer][sent[peer]..])])?;
                    (sent[peer], moved) = (sent[peer] + count, moved | (count > 0));
                }
                let (bytes, filled) = &mut received[peer];
                if *filled < len {
                    let count = self.links.try_recv(peer, &mut bytes[*filled..])?;
                    (*filled, moved) = (*filled + count, moved | (count > 0));
                }
            }
            let open = |peer: &usize| sent[*peer] < len || received[*peer].1 < len;
            let Some(peer) = (0..world_size).find(open) else { break };
            let now = Instant::now();
            if let Some(reason) = (self.give_up)() {
                return Err(Error::GaveUp { what: "the ranks of this host".to_owned(), reason });
            }
            if now >= self.deadline {
                let what = format!("rank {peer} to say whether it is on this host");
                return Err(Error::TimedOut { what, ranks: vec![peer], elapsed: started.elapsed() });
            }
            if !moved {
                // The links wake us when something comes.
                self.links.wait(self.deadline.min(now + GIVE_UP_INTERVAL));
            }
        }
        Ok(received
            .into_iter()
            .enumerate()
            .map(|(peer, (bytes, _))| (peer != rank).then_some(bytes))
            .collect())
    }
}

/// What ranks say when they give each other memory of `len` bytes, for the `number`th time.
pub(super) fn offer(number: u64, len: usize) -> [u8; INTRODUCTION_BYTES] {
    let mut bytes = [0; INTRODUCTION_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes[16..24].copy_from_slice(&(len as u64).to_le_bytes());
    bytes
}

/// Takes the memory that another rank gives with the same `offer`, and maps it.
///
/// # Errors
/// It offers something else, or the operating system's.
pub(super) fn take_memory(
    socket: BorrowedFd<'_>,
    offer: &[u8; INTRODUCTION_BYTES],
    len: usize,
    deadline: Instant,
) -> io::Result<SharedMemory> {
    let (theirs, file) = receive_memory(socket, deadline)?;
    if theirs != *offer {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it allocates other memory at this point"));
    }
    SharedMemory::open(file, len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// It has called, or will, and nobody else knows the name.
    #[test]
    fn a_rank_that_dies_before_it_has_said_who_it_is_is_waited_for_until_somebody_knows_better() {
        let (door, other) = (Door::open().expect("a socket"), Door::open().expect("a socket"));
        let called = door.hello.connect().expect("it listens");
        let hellos = [Some(door.hello), Some(other.hello)];
        drop(called);
        let asked = std::cell::Cell::new(0);
        let give_up = || {
            asked.set(asked.get() + 1);
            (asked.get() > 3).then(|| "it has died".to_owned())
        };
        let met = door.introduce(0, vec![None, None], (&[0, 1], &hellos), &give_up);
        assert_eq!(met.err().as_deref(), Some("waiting for a rank: it has died"));
    }

    fn rows(reached: &[&[usize]]) -> Vec<Vec<u8>> {
        reached.iter().map(|row| to_bits((0..reached.len()).map(|peer| row.contains(&peer)))).collect()
    }

    #[test]
    fn a_host_is_ranks_that_reach_each_other_and_nobody_else() {
        let found = groups(&rows(&[&[0, 2], &[1, 3], &[0, 2], &[1, 3]]));
        assert_eq!(found, [vec![0, 2], vec![1, 3], vec![0, 2], vec![1, 3]]);
        // Rank 1 reaches both others, which do not reach each other: nobody shares.
        let found = groups(&rows(&[&[0, 1], &[0, 1, 2], &[1, 2]]));
        assert_eq!(found, [[0], [1], [2]]);
        // Rank 2 says that it reaches rank 0, which knows nothing of it.
        let found = groups(&rows(&[&[0, 1], &[0, 1], &[0, 2]]));
        assert_eq!(found, [vec![0, 1], vec![0, 1], vec![2]]);
        assert_eq!(groups(&rows(&[&[], &[1]])), [[0], [1]], "a rank that does not even name itself");
    }

    #[test]
    fn more_ranks_than_a_host_may_have_share_nothing() {
        let all: Vec<usize> = (0..=RANK_LIMIT).collect();
        let found = groups(&rows(&vec![all.as_slice(); RANK_LIMIT + 1]));
        assert!(found.iter().enumerate().all(|(rank, group)| *group == [rank]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_hello_or_none(
            mut bytes in prop::collection::vec(any::<u8>(), HELLO_BYTES - 1..HELLO_BYTES + 2), ours: bool,
        ) {
            if ours {
                bytes[..8].copy_from_slice(&MAGIC);
            }
            match Hello::from_bytes(&bytes) {
                Some(hello) => prop_assert_eq!(hello.to_bytes().to_vec(), bytes),
                None => prop_assert!(!ours || bytes.len() != HELLO_BYTES),
            }
        }

        #[test]
        fn any_introduction_names_a_rank_of_the_world_and_needs_the_token(
            bytes: [u8; INTRODUCTION_BYTES], rank in 0..2000_usize, token: [u8; 16], world_size in 1..1500_usize,
        ) {
            prop_assert!(introduced(&bytes, &token, world_size).is_err(), "a guess");
            let said = introduction(rank, &token);
            prop_assert_eq!(introduced(&said, &token, world_size).ok(), (rank < world_size).then_some(rank));
            let mut other = token;
            other[rank % 16] ^= 1;
            prop_assert!(introduced(&said, &other, world_size).is_err());
        }

        #[test]
        fn whatever_ranks_say_whom_they_reach_each_is_on_one_host(
            world_size in 1..20_usize, bits in prop::collection::vec(any::<u8>(), 60),
        ) {
            let len = world_size.div_ceil(8);
            let rows: Vec<Vec<u8>> = bits.chunks(len).take(world_size).map(<[u8]>::to_vec).collect();
            for (rank, group) in groups(&rows).iter().enumerate() {
                prop_assert!(group.contains(&rank) && group.iter().all(|&member| member < world_size));
            }
        }
    }
}
