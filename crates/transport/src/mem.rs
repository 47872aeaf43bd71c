//! Ranks as threads of one process, over a bounded window.
//!
//! For tests and for programs that run several ranks in one process. The window is small on purpose
//! (64 KiB by default): a schedule that sends a long message before it starts to receive works on a
//! transport with large buffers and deadlocks on a busy network, and this is where tests catch it.

use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Instant;

use crate::forming::place;
use crate::park::Parker;
use crate::{CONTROL_MESSAGE_LIMIT, Error, Forming, Transport};

/// The window of each link direction unless told otherwise, in bytes.
pub const DEFAULT_WINDOW_BYTES: usize = 64 * 1024;

/// Control messages that may wait unread before the link counts as broken.
const CONTROL_QUEUE_LIMIT: usize = 1024;

/// One rank of an in-process group.
///
/// A slow or stuck peer thread stalls its links as a network peer would; a dropped one is `Lost`.
#[derive(Debug)]
pub struct MemTransport {
    rank: usize,
    epoch: u64,
    parker: Parker,
    /// `outgoing[p]` carries bytes from this rank to rank p, `incoming[p]` from p; `None` at `rank`.
    outgoing: Vec<Option<Arc<Pipe>>>,
    incoming: Vec<Option<Arc<Pipe>>>,
    left: bool,
    window_bytes: usize,
    registry: Arc<Mutex<Registry>>,
}

/// The groups that the ranks of a group are forming among themselves.
#[derive(Debug, Default)]
struct Registry {
    /// By id, the places that have not been taken.
    places: HashMap<u64, Places>,
    /// The ranks that have ended: they take no place any more.
    gone: Vec<usize>,
}

/// The rank that each place is for, and its transport.
type Places = Vec<(usize, MemTransport)>;

/// One direction of one link.
#[derive(Debug)]
struct Pipe {
    window_bytes: usize,
    state: Mutex<PipeState>,
    reader: Waker,
    writer: Waker,
}

#[derive(Debug, Default)]
struct PipeState {
    data: VecDeque<u8>,
    control: VecDeque<Vec<u8>>,
    /// How the writing end stopped, if it did.
    writer_end: Option<End>,
    /// How the reading end stopped, if it did.
    reader_end: Option<End>,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Left,
    Dropped,
    ControlOverflow,
}

/// Makes a group of `world_size` connected transports, in rank order, for one epoch.
///
/// Each of the world_size × (world_size - 1) link directions holds at most `window_bytes` of data.
///
/// # Panics
/// If `world_size` or `window_bytes` is 0.
pub fn group(world_size: usize, epoch: u64, window_bytes: usize) -> Vec<MemTransport> {
    assert!(world_size > 0, "a group has at least one rank");
    assert!(window_bytes > 0, "a link needs a window");
    let parkers: Vec<Parker> = (0..world_size).map(|_| Parker::new()).collect();
    let pipe = |from: usize, to: usize| -> Option<Arc<Pipe>> {
        (from != to).then(|| {
            Arc::new(Pipe {
                window_bytes,
                state: Mutex::default(),
                reader: parkers[to].waker(),
                writer: parkers[from].waker(),
            })
        })
    };
    let pipes: Vec<Vec<Option<Arc<Pipe>>>> =
        (0..world_size).map(|from| (0..world_size).map(|to| pipe(from, to)).collect()).collect();
    let incoming = |rank: usize| pipes.iter().map(|row| row[rank].clone()).collect();
    let registry = Arc::<Mutex<Registry>>::default();
    let mut transports = Vec::with_capacity(world_size);
    for (rank, parker) in parkers.into_iter().enumerate() {
        let (outgoing, incoming) = (pipes[rank].clone(), incoming(rank));
        let (left, registry) = (false, registry.clone());
        transports.push(MemTransport {
            rank,
            epoch,
            parker,
            outgoing,
            incoming,
            left,
            window_bytes,
            registry,
        });
    }
    transports
}

impl MemTransport {
    fn outgoing(&self, to: usize) -> &Pipe {
        self.outgoing[to].as_ref().expect("a rank has no link to itself")
    }

    fn incoming(&self, from: usize) -> &Pipe {
        self.incoming[from].as_ref().expect("a rank has no link to itself")
    }

    fn end_all(&self, end: End) {
        self.give_up_places();
        for pipe in self.outgoing.iter().flatten() {
            pipe.lock().writer_end.get_or_insert(end);
            pipe.reader.wake_by_ref();
        }
        for pipe in self.incoming.iter().flatten() {
            pipe.lock().reader_end.get_or_insert(end);
            pipe.writer.wake_by_ref();
        }
    }
}

impl MemTransport {
    /// The place of this rank in the group `id`, which the first of its members makes.
    fn take_place(&self, members: &[usize], id: u64) -> Result<MemTransport, Error> {
        let mut registry = self.registry();
        let made = registry.places.remove(&id);
        let mut places = made.unwrap_or_else(|| {
            let places = members.iter().copied().zip(group(members.len(), self.epoch, self.window_bytes));
            places.filter(|(rank, _)| !registry.gone.contains(rank)).collect()
        });
        let own = places.iter().position(|(rank, _)| *rank == self.rank);
        let own = own.map(|at| places.swap_remove(at).1);
        if !places.is_empty() {
            registry.places.insert(id, places);
        }
        own.ok_or_else(|| Error::Usage { reason: format!("this rank has formed the group {id:x} before") })
    }

    /// Nobody takes the places of a rank that has ended: its peers there lose it.
    fn give_up_places(&self) {
        let mut given_up = Vec::new();
        let mut registry = self.registry();
        registry.gone.push(self.rank);
        for places in registry.places.values_mut() {
            let own = places.iter().position(|(rank, _)| *rank == self.rank);
            given_up.extend(own.map(|at| places.swap_remove(at)));
        }
        // They have registries of their own; still, nothing is dropped under a lock.
        drop(registry);
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        // Places are made and taken whole: no panic leaves one half made.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for MemTransport {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.outgoing.len()
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn try_send(&mut self, to: usize, parts: &[IoSlice<'_>]) -> Result<usize, Error> {
        let pipe = self.outgoing(to);
        let mut state = pipe.lock();
        if let Some(end) = state.reader_end {
            return Err(end.error(to));
        }
        let mut sent = 0;
        for part in parts {
            let room = pipe.window_bytes - state.data.len();
            let taken = room.min(part.len());
            state.data.extend(&part[..taken]);
            sent += taken;
        }
        drop(state);
        if sent > 0 {
            pipe.reader.wake_by_ref();
        }
        Ok(sent)
    }

    fn try_recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Error> {
        let pipe = self.incoming(from);
        let mut state = pipe.lock();
        let got = into.len().min(state.data.len());
        if got == 0 {
            return match state.writer_end {
                Some(end) if state.data.is_empty() => Err(end.error(from)),
                _ => Ok(0),
            };
        }
        let (front, back) = state.data.as_slices();
        let in_front = got.min(front.len());
        into[..in_front].copy_from_slice(&front[..in_front]);
        into[in_front..got].copy_from_slice(&back[..got - in_front]);
        state.data.drain(..got);
        drop(state);
        pipe.writer.wake_by_ref();
        Ok(got)
    }

    fn send_control(&mut self, to: usize, message: &[u8]) -> Result<(), Error> {
        if message.len() > CONTROL_MESSAGE_LIMIT {
            let reason = format!("a control message of {} bytes is over the limit", message.len());
            return Err(Error::Usage { reason });
        }
        let pipe = self.outgoing(to);
        let mut state = pipe.lock();
        if let Some(end) = state.reader_end {
            return Err(end.error(to));
        }
        if state.control.len() == CONTROL_QUEUE_LIMIT {
            state.reader_end = Some(End::ControlOverflow);
            state.writer_end = Some(End::ControlOverflow);
        } else {
            state.control.push_back(message.to_vec());
        }
        drop(state);
        pipe.reader.wake_by_ref();
        Ok(())
    }

    fn try_recv_control(&mut self, from: usize) -> Result<Option<Vec<u8>>, Error> {
        let mut state = self.incoming(from).lock();
        match (state.control.pop_front(), state.writer_end) {
            (Some(message), _) => Ok(Some(message)),
            (None, Some(end)) => Err(end.error(from)),
            (None, None) => Ok(None),
        }
    }

    fn wait(&mut self, until: Instant) {
        self.parker.wait(until);
    }

    fn waker(&self) -> Waker {
        self.parker.waker()
    }

    fn split(&mut self, members: &[usize], id: u64, _deadline: Instant) -> Result<Forming, Error> {
        place(members, self.rank, self.world_size())?;
        let (former, forming) = Forming::new();
        former.finish(Ok(Box::new(self.take_place(members, id)?)));
        self.waker().wake();
        Ok(forming)
    }

    fn abort(&mut self, message: &[u8], _deadline: Instant) {
        let rank = self.rank;
        for peer in (0..self.world_size()).filter(|&peer| peer != rank) {
            // A peer that is gone needs no reason.
            let _ = self.send_control(peer, message);
        }
        self.end_all(End::Dropped);
    }

    fn leave(&mut self, _deadline: Instant) -> Result<(), Error> {
        // What was sent is in the peers' pipes already, which outlive this end.
        self.left = true;
        self.end_all(End::Left);
        Ok(())
    }
}

impl Drop for MemTransport {
    fn drop(&mut self) {
        if !self.left {
            self.end_all(End::Dropped);
        }
    }
}

impl Pipe {
    fn lock(&self) -> MutexGuard<'_, PipeState> {
        // Every critical section leaves the state consistent at each step: a panic elsewhere in the
        // holder's thread does not make it unusable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl End {
    fn error(self, peer: usize) -> Error {
        match self {
            End::Left => Error::Left { peer },
            End::Dropped => Error::Lost { peer, reason: "it ended without leaving".to_owned() },
            End::ControlOverflow => {
                Error::Lost { peer, reason: format!("{CONTROL_QUEUE_LIMIT} control messages unread") }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn send(transport: &mut MemTransport, to: usize, bytes: &[u8]) -> Result<usize, Error> {
        transport.try_send(to, &[IoSlice::new(bytes)])
    }

    #[test]
    fn bytes_arrive_in_order_and_the_window_bounds_them() {
        let mut group = group(2, 1, 4);
        let (left, right) = group.split_at_mut(1);
        assert_eq!(left[0].try_send(1, &[IoSlice::new(b"ab"), IoSlice::new(b"cdef")]), Ok(4));
        assert_eq!(send(&mut left[0], 1, b"ef"), Ok(0), "the window is full");
        let mut buffer = [0; 3];
        assert_eq!(right[0].try_recv(0, &mut buffer), Ok(3));
        assert_eq!(&buffer, b"abc");
        assert_eq!(send(&mut left[0], 1, b"ef"), Ok(2), "there is room again");
        assert_eq!(right[0].try_recv(0, &mut buffer), Ok(3));
        assert_eq!(&buffer, b"def");
        assert_eq!(right[0].try_recv(0, &mut buffer), Ok(0));
    }

    #[test]
    fn control_passes_a_full_data_window() {
        let mut group = group(2, 1, 4);
        assert_eq!(send(&mut group[0], 1, b"full"), Ok(4));
        group[0].send_control(1, b"hello").expect("the control lane is open");
        assert_eq!(group[1].try_recv_control(0), Ok(Some(b"hello".to_vec())));
        assert_eq!(group[1].try_recv_control(0), Ok(None));
    }

    #[test]
    fn what_was_sent_before_an_orderly_leave_is_read_before_left() {
        let mut group = group(2, 1, 16);
        send(&mut group[0], 1, b"last").expect("the link is up");
        group[0].send_control(1, b"bye").expect("the control lane is open");
        group[0].leave(Instant::now()).expect("nothing to wait for");
        drop(group.remove(0));
        let mut right = group.remove(0);
        let mut buffer = [0; 16];
        assert_eq!(right.try_recv(0, &mut buffer), Ok(4));
        assert_eq!(right.try_recv(0, &mut buffer), Err(Error::Left { peer: 0 }));
        assert_eq!(right.try_recv_control(0), Ok(Some(b"bye".to_vec())));
        assert_eq!(right.try_recv_control(0), Err(Error::Left { peer: 0 }));
        assert_eq!(send(&mut right, 0, b"x"), Err(Error::Left { peer: 0 }));
    }

    #[test]
    fn a_dropped_peer_is_lost_and_ends_the_wait() {
        let mut group = group(2, 1, 16);
        let peer = group.remove(0);
        let mut right = group.remove(0);
        assert_eq!(right.try_recv(0, &mut [0]), Ok(0));
        let dropper = std::thread::spawn(move || drop(peer));
        let start = Instant::now();
        let lost = loop {
            match right.try_recv(0, &mut [0]) {
                Ok(_) => right.wait(start + Duration::from_secs(60)),
                Err(error) => break error,
            }
        };
        assert!(matches!(lost, Error::Lost { peer: 0, .. }), "{lost}");
        assert!(start.elapsed() < Duration::from_secs(30));
        dropper.join().expect("dropping does not panic");
    }

    #[test]
    fn a_control_lane_nobody_reads_is_bounded() {
        let mut group = group(2, 1, 16);
        let result =
            (0..=CONTROL_QUEUE_LIMIT + 1).map(|_| group[0].send_control(1, b"x")).find(Result::is_err);
        assert!(matches!(result, Some(Err(Error::Lost { peer: 1, .. }))));
        assert!(group[0].send_control(1, &[0; CONTROL_MESSAGE_LIMIT + 1]).is_err());
    }
}
