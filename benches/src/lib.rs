//! What the suites share: pairs of ranks whose collectives are timed together and checked, and sums with their results.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use paceline_collectives::dtype::{bf16, f16};
use paceline_collectives::{Communicator, Config, DType, Error};
use paceline_transport::identity::JobAuthority;
use paceline_transport::mem;
use paceline_transport::quic::{Endpoint, IoThread, Member, QuicTransport, Roster};
use paceline_transport::shm::{self, Sharing};

/// Two ranks in this process. Rank 0 is timed on the caller's thread; rank 1 does the same as often.
pub struct Pair<S> {
    communicator: Communicator,
    state: S,
    orders: Sender<u64>,
    done: Receiver<Result<(), Error>>,
    peer: Option<JoinHandle<()>>,
    operation: fn(&mut Communicator, &mut S) -> Result<(), Error>,
}

impl<S: Clone + Send + 'static> Pair<S> {
    /// Ranks that repeat `operation`, each on its own copy of `state`.
    pub fn new(
        [first, second]: [Communicator; 2],
        state: S,
        operation: fn(&mut Communicator, &mut S) -> Result<(), Error>,
    ) -> Self {
        let (orders, ordered) = channel::<u64>();
        let (report, done) = channel();
        let mut peer_state = state.clone();
        let mut communicator = second;
        let peer = std::thread::spawn(move || {
            for count in ordered {
                let outcome = (0..count).try_for_each(|_| operation(&mut communicator, &mut peer_state));
                if report.send(outcome).is_err() {
                    return;
                }
            }
        });
        Self { communicator: first, state, orders, done, peer: Some(peer), operation }
    }

    /// Runs the operation `count` times back to back on both ranks and returns rank 0's time.
    ///
    /// # Panics
    /// If an operation fails on either rank: a benchmark of failures means nothing.
    pub fn run(&mut self, count: u64) -> Duration {
        self.orders.send(count).expect("the peer waits for orders");
        let start = Instant::now();
        for _ in 0..count {
            (self.operation)(&mut self.communicator, &mut self.state).expect("rank 0's operation works");
        }
        let elapsed = start.elapsed();
        self.done.recv().expect("the peer reports").expect("rank 1's operation works");
        elapsed
    }

    /// Rank 0's state, to check the result.
    pub fn state(&self) -> &S {
        &self.state
    }
}

impl<S> Drop for Pair<S> {
    fn drop(&mut self) {
        // A closed channel ends the peer's loop.
        self.orders = channel().0;
        if let Some(peer) = self.peer.take() {
            // It panics only when it has reported an error, which has failed the benchmark.
            let _ = peer.join();
        }
    }
}

/// Two communicators over `mem`.
///
/// # Panics
/// Never: the defaults are right.
pub fn over_mem() -> [Communicator; 2] {
    let transports = mem::group(2, 1, 1024 * 1024).into_iter();
    let communicators: Vec<Communicator> = transports
        .map(|transport| {
            Communicator::new(Box::new(transport), Config::default()).expect("the defaults are right")
        })
        .collect();
    communicators.try_into().expect("two ranks")
}

/// Two communicators over shared memory, as two processes of one host have them.
///
/// # Panics
/// If the machine has no shared memory or no Unix sockets.
pub fn over_shm() -> [Communicator; 2] {
    let threads = mem::group(2, 1, 1024 * 1024).into_iter().map(|transport| {
        std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(30);
            let links = shm::upgrade(Box::new(transport), Sharing::Auto, deadline, &|| None)
                .expect("both ranks are here");
            assert!(links.segments().is_some(), "memory is not shared");
            Communicator::new(links, Config::default()).expect("the defaults are right")
        })
    });
    join(threads.collect())
}

/// Two communicators over QUIC on loopback, and the I/O threads that carry them.
///
/// # Panics
/// If loopback cannot be used.
pub fn over_quic() -> ([Communicator; 2], [IoThread; 2]) {
    let authority = JobAuthority::new("bench").expect("the name is right");
    let io = [(); 2].map(|()| IoThread::start().expect("a thread can be started"));
    let endpoint = |rank: usize| {
        let identity =
            authority.issue(&format!("worker-{rank}"), Duration::from_secs(3600)).expect("the name is right");
        Endpoint::bind(&io[rank].handle(), ([127, 0, 0, 1], 0).into(), &identity)
            .expect("loopback has free ports")
    };
    let endpoints = [endpoint(0), endpoint(1)];
    let member = |rank: usize| Member { name: format!("worker-{rank}"), addr: endpoints[rank].local_addr() };
    let members = vec![member(0), member(1)];
    let threads = endpoints.clone().into_iter().enumerate().map(|(rank, endpoint)| {
        let roster = Roster { job: "bench".to_owned(), epoch: 1, rank, members: members.clone() };
        std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(30);
            let transport = QuicTransport::connect(&endpoint, roster, deadline).expect("both ranks are here");
            Communicator::new(Box::new(transport), Config::default()).expect("the defaults are right")
        })
    });
    (join(threads.collect()), io)
}

fn join(threads: Vec<JoinHandle<Communicator>>) -> [Communicator; 2] {
    let communicators: Vec<Communicator> =
        threads.into_iter().map(|thread| thread.join().expect("forming a pair does not panic")).collect();
    communicators.try_into().expect("two ranks")
}

/// One source per rank, `bytes` bytes long, and the exact sum of them all.
pub fn sum_of(dtype: DType, world_size: usize, bytes: usize) -> (Vec<Buffer>, Buffer) {
    let value = |rank: usize, i: usize| ((i * 7 + rank * 3) % 13) as i32 - 6;
    let sources = (0..world_size).map(|rank| Buffer::of_elements(dtype, bytes, |i| value(rank, i))).collect();
    let sum = |i| (0..world_size).map(|rank| value(rank, i)).sum();
    (sources, Buffer::of_elements(dtype, bytes, sum))
}

/// Bytes that start at a cache line, as the buffers of a back end do.
pub struct Buffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// `byte` of each index.
    pub fn new(len: usize, byte: impl Fn(usize) -> u8) -> Self {
        let mut storage = vec![0; len + 64];
        let start = storage.as_ptr().align_offset(64);
        for (i, place) in storage[start..start + len].iter_mut().enumerate() {
            *place = byte(i);
        }
        Self { storage, start, len }
    }

    /// Small integers, which every dtype holds and sums exactly.
    fn of_elements(dtype: DType, len: usize, value: impl Fn(usize) -> i32) -> Self {
        let mut buffer = Self::new(len, |_| 0);
        for (i, element) in buffer.bytes_mut().chunks_exact_mut(dtype.size()).enumerate() {
            let value = value(i);
            match dtype {
                DType::F32 => element.copy_from_slice(&(value as f32).to_ne_bytes()),
                DType::F16 => element.copy_from_slice(&f16::from_f32(value as f32).to_ne_bytes()),
                DType::BF16 => element.copy_from_slice(&bf16::from_f32(value as f32).to_ne_bytes()),
                DType::I8 => element.copy_from_slice(&(value as i8).to_ne_bytes()),
                other => unreachable!("no suite sums {other}"),
            }
        }
        buffer
    }

    /// All of them.
    pub fn bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.len]
    }

    /// All of them, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.len]
    }
}
