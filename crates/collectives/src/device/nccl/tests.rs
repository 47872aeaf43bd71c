//! Layer B with data: the test double of libnccl, through the production loader, runs what it is given on the
//! adversarial device. What this proves: each collective is the right call of NCCL on the right memory, streams wait
//! for each other as they must, held memory is freed when it may be, and failures end everything once. What it does
//! not: anything about NVIDIA's library.

use std::collections::{HashMap, VecDeque};
use std::env;
use std::ffi::c_int;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use paceline_nccl as nccl;
use paceline_transport::mem;

use super::watchdog::lock;
use super::{Mutation, NcclGroup};
use crate::communicator::{Communicator, Config};
use crate::device::group::Formed;
use crate::device::hierarchy::Hierarchy;
use crate::device::software::{Memory, Software};
use crate::device::{Device, DeviceBuffer, FallbackConfig, Stream};
use crate::dtype::{DType, ReduceOp};
use crate::error::Error;

/// Orders of events that are tried for each thing that must always hold.
const SEEDS: u64 = 4;

/// Orders that are tried until a defect shows.
const SEEDS_FOR_A_DEFECT: u64 = 60;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// Where the double's streams lead to.
static PLACES: Mutex<Option<HashMap<usize, Arc<Place>>>> = Mutex::new(None);

/// A rank of a group on the double.
struct Place {
    rank: usize,
    device: Software,
    collectives: AtomicU64,
    meeting: Arc<Meeting>,
}

/// What the ranks of a group give each other.
struct Meeting {
    world_size: usize,
    given: Mutex<Given>,
    news: Condvar,
}

#[derive(Default)]
struct Given {
    /// By number of the collective and by rank.
    collectives: HashMap<u64, Vec<Option<Vec<u8>>>>,
    /// By sender and receiver.
    messages: HashMap<(usize, usize), VecDeque<Vec<u8>>>,
}

/// What the double was asked for; the order is that of its enum.
#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    AllReduce,
    Broadcast,
    Reduce,
    AllGather,
    ReduceScatter,
    Send,
    Receive,
}

#[derive(Clone, Copy)]
struct Asked {
    what: What,
    send: u64,
    receive: u64,
    bytes: usize,
    other: usize,
}

/// The double's runner: enqueues on the device what the double was asked for.
extern "C" fn run_on_device(
    stream: usize,
    what: c_int,
    send: usize,
    receive: usize,
    bytes: usize,
    other: c_int,
) {
    let all = [
        What::AllReduce,
        What::Broadcast,
        What::Reduce,
        What::AllGather,
        What::ReduceScatter,
        What::Send,
        What::Receive,
    ];
    let what = all[what as usize];
    let asked = Asked { what, send: send as u64, receive: receive as u64, bytes, other: other as usize };
    let place =
        lock(&PLACES).as_ref().and_then(|places| places.get(&stream)).cloned().expect("a known stream");
    let device = place.device.clone();
    device.launch(Stream(stream as u64), move |memory| place.run(memory, asked));
}

impl Place {
    fn run(&self, memory: &mut Memory, asked: Asked) {
        let Asked { what, send, receive, bytes, other } = asked;
        let world_size = self.meeting.world_size;
        match what {
            What::Send => return self.meeting.post((self.rank, other), memory.read(send, bytes)),
            What::Receive => return memory.write_at(receive, &self.meeting.take((other, self.rank))),
            _ => {}
        }
        let input = match what {
            What::Broadcast if self.rank != other => Vec::new(),
            What::ReduceScatter => memory.read(send, bytes * world_size),
            _ => memory.read(send, bytes),
        };
        let number = self.collectives.fetch_add(1, Ordering::Relaxed);
        let inputs = self.meeting.meet(number, self.rank, input);
        match what {
            What::AllReduce => memory.write_at(receive, &sum(&inputs)),
            What::Reduce if self.rank == other => memory.write_at(receive, &sum(&inputs)),
            What::Broadcast => memory.write_at(receive, &inputs[other]),
            What::AllGather => memory.write_at(receive, &inputs.concat()),
            What::ReduceScatter => memory.write_at(receive, &sum(&inputs)[self.rank * bytes..][..bytes]),
            _ => {}
        }
    }
}

impl Meeting {
    fn post(&self, between: (usize, usize), message: Vec<u8>) {
        lock(&self.given).messages.entry(between).or_default().push_back(message);
        self.news.notify_all();
    }

    fn take(&self, between: (usize, usize)) -> Vec<u8> {
        self.wait(|given| given.messages.get_mut(&between)?.pop_front())
    }

    fn meet(&self, number: u64, rank: usize, input: Vec<u8>) -> Vec<Vec<u8>> {
        let world_size = self.world_size;
        let nobody = || vec![None; world_size];
        lock(&self.given).collectives.entry(number).or_insert_with(nobody)[rank] = Some(input);
        self.news.notify_all();
        self.wait(|given| given.collectives[&number].iter().cloned().collect())
    }

    fn wait<T>(&self, ready: impl Fn(&mut Given) -> Option<T>) -> T {
        let (start, mut given) = (Instant::now(), lock(&self.given));
        loop {
            if let Some(found) = ready(&mut given) {
                return found;
            }
            assert!(start.elapsed() < LONG, "a rank does not come");
            given = self.news.wait_timeout(given, LONG).expect("nobody panics").0;
        }
    }
}

/// The sums of i32, which have no order.
fn sum(inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut total: Vec<i32> = vec![0; inputs[0].len() / 4];
    for input in inputs {
        let numbers = input.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
        total.iter_mut().zip(numbers).for_each(|(total, number)| *total = total.wrapping_add(number));
    }
    total.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// The double with `settings`, in a folder of its own until the process ends.
fn double(settings: &[&str]) -> Arc<nccl::Library> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let folder = env::temp_dir().join(format!("paceline-nccl-double-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the double");
    let library: PathBuf = folder.join("libnccl.so.2");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-w", "-DLOG=\"/dev/null\"", "-o"]).arg(&library);
    compiler.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../nccl/tests/double/nccl.c")).args(settings);
    let output = compiler.output().expect("a C compiler named cc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let opened = nccl::Library::open(&nccl::Search::only(&library)).expect("the double can be loaded");
    // SAFETY: the double has nothing that runs when it is loaded, and it is the one that was loaded above.
    let same = unsafe { libloading::Library::new(&library) }.expect("it is loaded already");
    type Runner = extern "C" fn(usize, c_int, usize, usize, usize, c_int);
    // SAFETY: that is its type in nccl.c. The double is never unloaded, so the runner stays where it is.
    unsafe {
        let run_with = same.get::<unsafe extern "C" fn(Runner)>(b"double_run_with").expect("nccl.c has it");
        run_with(run_on_device);
    }
    std::mem::forget(same);
    let _ = std::fs::remove_dir_all(folder);
    opened
}

static DOUBLE: LazyLock<Arc<nccl::Library>> = LazyLock::new(|| double(&[]));

/// A rank of a group, with its device and the stream of its caller.
struct Rank {
    group: NcclGroup,
    device: Software,
    stream: Stream,
    seed: u64,
    expected: Vec<(DeviceBuffer, Vec<u8>)>,
}

impl Rank {
    fn new(
        library: &Arc<nccl::Library>,
        (rank, meeting): (usize, Arc<Meeting>),
        seed: u64,
        (mutation, timeout): (Mutation, Duration),
    ) -> Self {
        let ids = [library.unique_id().expect("it needs nobody")];
        let options = nccl::Options::default();
        let communicator = nccl::Communicator::new(library, rank, meeting.world_size, &ids, options);
        let communicator = communicator.expect("the double forms any group");
        let device = Software::new(seed * 64 + rank as u64);
        let stream = device.new_stream().expect("it has streams");
        let group = NcclGroup::new(communicator, Box::new(device.clone()), timeout).expect("it has streams");
        let group = group.with(mutation);
        let place = Arc::new(Place { rank, device: device.clone(), collectives: AtomicU64::new(0), meeting });
        lock(&PLACES).get_or_insert_default().insert(group.stream.handle() as usize, place);
        Self { group, device, stream, seed, expected: Vec::new() }
    }

    /// The input of a rank for the present call.
    fn numbers_of(&self, rank: usize, len: usize) -> Vec<i32> {
        let mut chance = fastrand::Rng::with_seed(self.seed ^ (rank as u64 + 1) << 40);
        (0..len).map(|_| chance.i32(..)).collect()
    }

    /// A buffer into which the caller's stream writes `numbers`, later.
    fn input(&self, numbers: &[i32]) -> DeviceBuffer {
        let buffer = self.device.alloc(numbers.len(), DType::I32);
        let bytes = to_bytes(numbers);
        self.device.launch(self.stream, move |memory| memory.write(buffer, &bytes));
        buffer
    }

    fn output(&self, len: usize) -> DeviceBuffer {
        let buffer = self.device.alloc(len, DType::I32);
        self.device.launch(self.stream, move |memory| memory.poison(buffer));
        buffer
    }

    /// The caller uses a result, and lets the input go as soon as the group does not need it.
    fn expect(&mut self, result: DeviceBuffer, expected: &[i32], input: DeviceBuffer) {
        let kept = self.device.alloc(result.len(), DType::I32);
        self.device.launch(self.stream, move |memory| memory.copy(result, kept));
        self.expected.push((kept, to_bytes(expected)));
        if input != result {
            self.group.hold(FreedWhenDropped { device: self.device.clone(), buffer: input });
        }
        self.seed += 1;
    }

    fn is_right(&self) -> bool {
        self.device.synchronize();
        self.expected.iter().all(|(buffer, expected)| self.device.read(*buffer) == *expected)
    }
}

struct FreedWhenDropped {
    device: Software,
    buffer: DeviceBuffer,
}

impl Drop for FreedWhenDropped {
    fn drop(&mut self) {
        self.device.free(self.buffer);
    }
}

fn to_bytes(numbers: &[i32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// Runs `part` on `world_size` ranks; whether all had the right results.
fn run(world_size: usize, seed: u64, mutation: Mutation, part: impl Fn(&mut Rank) + Sync) -> bool {
    let meeting = Arc::new(Meeting { world_size, given: Mutex::default(), news: Condvar::new() });
    thread::scope(|scope| {
        let rank = |rank| {
            let (meeting, part) = (meeting.clone(), &part);
            scope.spawn(move || {
                let mut rank = Rank::new(&DOUBLE, (rank, meeting), seed, (mutation, LONG));
                part(&mut rank);
                let right = rank.is_right();
                rank.group.leave().expect("everything has run");
                right
            })
        };
        let threads: Vec<_> = (0..world_size).map(rank).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no rank panics"))
            .fold(true, |all, one| all & one)
    })
}

fn every_collective(rank: &mut Rank) {
    let (number, ranks, stream) = (rank.group.rank(), rank.group.world_size(), rank.stream);
    let (len, root, op) = (5, ranks - 1, ReduceOp::Sum);
    let sum_of = |rank: &Rank, len| -> Vec<i32> {
        let inputs: Vec<Vec<i32>> = (0..ranks).map(|other| rank.numbers_of(other, len)).collect();
        (0..len).map(|at| inputs.iter().fold(0, |sum: i32, input| sum.wrapping_add(input[at]))).collect()
    };
    let all_of =
        |rank: &Rank, len| (0..ranks).flat_map(|other| rank.numbers_of(other, len)).collect::<Vec<_>>();

    let (input, output) = (rank.input(&rank.numbers_of(number, len)), rank.output(len));
    rank.group.all_reduce(input, output, op, stream).expect("it is enqueued");
    rank.expect(output, &sum_of(rank, len), input);

    let input = rank.input(&rank.numbers_of(number, len));
    rank.group.all_reduce(input, input, op, stream).expect("it is enqueued");
    rank.expect(input, &sum_of(rank, len), input);

    let (input, output) = (rank.input(&rank.numbers_of(number, len)), rank.output(len));
    rank.group.reduce(input, output, op, root, stream).expect("it is enqueued");
    let expected = sum_of(rank, len);
    match number == root {
        true => rank.expect(output, &expected, input),
        false => rank.seed += 1,
    }

    let input = rank.input(&rank.numbers_of(number, len));
    rank.group.broadcast(input, root, stream).expect("it is enqueued");
    rank.expect(input, &rank.numbers_of(root, len), input);

    let (input, output) = (rank.input(&rank.numbers_of(number, len * ranks)), rank.output(len));
    rank.group.reduce_scatter(input, output, op, stream).expect("it is enqueued");
    rank.expect(output, &sum_of(rank, len * ranks)[number * len..][..len], input);

    let (input, output) = (rank.input(&rank.numbers_of(number, len)), rank.output(len * ranks));
    rank.group.all_gather(input, output, stream).expect("it is enqueued");
    rank.expect(output, &all_of(rank, len), input);

    let (input, output) = (rank.input(&rank.numbers_of(number, len)), rank.output(len * ranks));
    rank.group.gather(input, output, root, stream).expect("it is enqueued");
    let expected = all_of(rank, len);
    match number == root {
        true => rank.expect(output, &expected, input),
        false => rank.seed += 1,
    }

    let (input, output) = (rank.input(&rank.numbers_of(number, len * ranks)), rank.output(len));
    rank.group.scatter(input, output, root, stream).expect("it is enqueued");
    rank.expect(output, &rank.numbers_of(root, len * ranks)[number * len..][..len], input);

    let (input, output) = (rank.input(&rank.numbers_of(number, len * ranks)), rank.output(len * ranks));
    rank.group.all_to_all(input, output, stream).expect("it is enqueued");
    let part = |other| rank.numbers_of(other, len * ranks)[number * len..][..len].to_vec();
    rank.expect(output, &(0..ranks).flat_map(part).collect::<Vec<_>>(), input);
}

fn uneven_collectives(rank: &mut Rank) {
    let (number, ranks, stream) = (rank.group.rank(), rank.group.world_size(), rank.stream);
    let counts: Vec<usize> = (0..ranks).map(|other| other * 3).collect();
    let (total, before) = (counts.iter().sum::<usize>(), counts[..number].iter().sum::<usize>());

    let (input, output) = (rank.input(&rank.numbers_of(number, counts[number])), rank.output(total));
    rank.group.all_gather_v(input, output, &counts, stream).expect("it is enqueued");
    let expected = (0..ranks).flat_map(|other| rank.numbers_of(other, counts[other])).collect::<Vec<_>>();
    rank.expect(output, &expected, input);

    let (input, output) = (rank.input(&rank.numbers_of(number, total)), rank.output(counts[number]));
    rank.group.reduce_scatter_v(input, output, &counts, ReduceOp::Sum, stream).expect("it is enqueued");
    let inputs: Vec<Vec<i32>> = (0..ranks).map(|other| rank.numbers_of(other, total)).collect();
    let sum = |at: usize| inputs.iter().fold(0, |sum: i32, input| sum.wrapping_add(input[before + at]));
    rank.expect(output, &(0..counts[number]).map(sum).collect::<Vec<_>>(), input);

    let part = |from: usize, to: usize| from + 2 * to;
    let sent: Vec<usize> = (0..ranks).map(|to| part(number, to)).collect();
    let received: Vec<usize> = (0..ranks).map(|from| part(from, number)).collect();
    let len_of = |from| (0..ranks).map(|to| part(from, to)).sum::<usize>();
    let (input, output) =
        (rank.input(&rank.numbers_of(number, len_of(number))), rank.output(received.iter().sum()));
    rank.group.all_to_all_v(input, &sent, output, &received, stream).expect("it is enqueued");
    let from = |other: usize| {
        let start = (0..number).map(|to| part(other, to)).sum::<usize>();
        rank.numbers_of(other, len_of(other))[start..][..part(other, number)].to_vec()
    };
    rank.expect(output, &(0..ranks).flat_map(from).collect::<Vec<_>>(), input);

    for from in 0..ranks - 1 {
        let numbers = rank.numbers_of(from, 9);
        if number == from {
            let input = rank.input(&numbers);
            rank.group.send(input, from + 1, stream).expect("it is enqueued");
            rank.expect(input, &numbers, input);
        } else if number == from + 1 {
            let output = rank.output(9);
            rank.group.recv(output, from, stream).expect("it is enqueued");
            rank.expect(output, &numbers, output);
        } else {
            rank.seed += 1;
        }
    }
}

#[test]
fn every_collective_is_the_right_call_on_the_right_memory() {
    for world_size in 1..=3 {
        for seed in 0..SEEDS {
            assert!(
                run(world_size, seed, Mutation::None, every_collective),
                "{world_size} ranks, seed {seed}"
            );
            assert!(
                run(world_size, seed, Mutation::None, uneven_collectives),
                "{world_size} ranks, seed {seed}"
            );
        }
    }
}

#[test]
fn each_wait_that_is_left_out_makes_a_result_wrong() {
    for mutation in [Mutation::InputNotAwaited, Mutation::ResultNotAwaited, Mutation::FreedAtOnce] {
        let noticed = (0..SEEDS_FOR_A_DEFECT).find(|&seed| !run(2, seed, mutation, every_collective));
        assert!(noticed.is_some(), "{mutation:?} makes no difference");
    }
}

/// Rank 0 of two, of which the other never comes.
fn alone(library: &Arc<nccl::Library>, timeout: Duration) -> Rank {
    let meeting = Arc::new(Meeting { world_size: 2, given: Mutex::default(), news: Condvar::new() });
    Rank::new(library, (0, meeting), 1, (Mutation::None, timeout))
}

fn wait_for_failure(rank: &Rank) -> Error {
    let start = Instant::now();
    loop {
        match rank.group.check() {
            Err(error) => return error,
            Ok(()) => assert!(start.elapsed() < LONG, "the watchdog sees nothing"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn wrong_calls_are_refused_before_nccl_is_called() {
    let mut rank = alone(&DOUBLE, LONG);
    let stream = rank.stream;
    let (three, four, bytes) = (rank.output(3), rank.output(4), rank.device.alloc(3, DType::U8));
    let wrong = [
        rank.group.all_reduce(three, four, ReduceOp::Sum, stream),
        rank.group.all_reduce(three, bytes, ReduceOp::Sum, stream),
        rank.group.broadcast(three, 2, stream),
        rank.group.all_gather(three, four, stream),
        rank.group.reduce_scatter(three, four, ReduceOp::Sum, stream),
        rank.group.all_to_all(three, three, stream),
        rank.group.all_to_all(four, four, stream),
        rank.group.all_to_all_v(four, &[4], four, &[2, 2], stream),
        rank.group.all_gather_v(three, four, &[2, 2], stream),
        rank.group.send(three, 0, stream),
        rank.group.recv(three, 2, stream),
    ];
    for (number, outcome) in wrong.into_iter().enumerate() {
        assert!(matches!(outcome, Err(Error::Usage { .. })), "call {number}: {outcome:?}");
    }
    assert_eq!(rank.group.check(), Ok(()));
}

#[test]
fn an_operation_that_does_not_run_in_time_ends_the_group_and_frees_what_it_held() {
    let mut rank = alone(&DOUBLE, Duration::from_millis(200));
    // What is before it on the caller's stream never runs: it waits for a mark that nobody makes.
    let stream = rank.device.stalled_stream();
    let input = rank.device.alloc(4, DType::I32);
    rank.group.all_reduce(input, input, ReduceOp::Sum, stream).expect("it is enqueued");
    let (held, observed) = (Arc::new(()), Arc::new(()));
    let weak = Arc::downgrade(&held);
    rank.group.hold(held);
    drop(observed);
    let error = wait_for_failure(&rank);
    assert!(error.to_string().contains("it has not run after 200 ms"), "{error}");
    assert_eq!(rank.group.all_reduce(input, input, ReduceOp::Sum, stream), Err(error), "it is final");
    let start = Instant::now();
    while weak.strong_count() > 0 {
        assert!(start.elapsed() < LONG, "the abort has ended, and nothing uses it any more");
        thread::yield_now();
    }
}

#[test]
fn the_flight_recorder_has_what_has_run_and_what_a_failed_group_hangs_in() {
    let mut rank = alone(&DOUBLE, Duration::from_millis(200));
    let recorder = rank.group.flight_recorder();
    let traces = Arc::new(Mutex::new(Vec::new()));
    let taken = traces.clone();
    recorder.on_failure(move |recorder| lock(&taken).push(recorder.trace()));
    let empty = rank.output(0);
    let refused = rank.output(1);
    // It gives nobody anything, so it needs nobody.
    rank.group.all_to_all_v(empty, &[0, 0], empty, &[0, 0], rank.stream).expect("it is enqueued");
    rank.device.synchronize();
    let (stalled, one) = (rank.device.stalled_stream(), rank.output(1));
    assert!(rank.group.all_reduce(refused, empty, ReduceOp::Sum, stalled).is_err(), "a wrong length");
    rank.group.broadcast(one, 0, stalled).expect("it is enqueued");
    rank.group.send(one, 1, stalled).expect("it is enqueued");
    rank.group.all_gather(empty, empty, stalled).expect("it is enqueued");
    wait_for_failure(&rank);
    let start = Instant::now();
    while lock(&traces).is_empty() {
        assert!(start.elapsed() < LONG, "the failure is told when the abort has ended");
        thread::yield_now();
    }
    let traces = lock(&traces);
    let [trace] = &traces[..] else { panic!("one failure is told once, not {}", traces.len()) };
    assert!(trace.failure.as_ref().is_some_and(|text| text.contains("it has not run")), "{trace:?}");
    let [group] = &trace.groups[..] else { panic!("{trace:?}") };
    assert!(group.on_device && group.members == [0, 1], "{group:?}");
    let seen = group.records.iter().map(|record| {
        (record.operation.name(), record.operation.number, record.started.is_some(), record.ended.is_some())
    });
    let expected = [
        ("all_to_all_v", 1, true, true),
        ("broadcast", 2, true, false),
        ("send/recv", 3, false, false),
        ("all_gather", 3, false, false),
    ];
    assert_eq!(seen.collect::<Vec<_>>(), expected);
    assert_eq!(group.records[2].message, 1, "the first of its pair");
}

#[test]
fn what_nccl_notices_in_the_background_ends_the_group() {
    // ncclRemoteError, once an operation was enqueued.
    let library = double(&["-DENDS=6"]);
    let meeting = Arc::new(Meeting { world_size: 2, given: Mutex::default(), news: Condvar::new() });
    let mut rank = Rank::new(&library, (0, meeting), 1, (Mutation::None, LONG));
    let stream = rank.device.stalled_stream();
    let input = rank.device.alloc(4, DType::I32);
    rank.group.all_reduce(input, input, ReduceOp::Sum, stream).expect("it is enqueued");
    let error = wait_for_failure(&rank);
    assert!(error.to_string().contains("ncclRemoteError"), "{error}");
}

#[test]
fn an_abort_from_outside_is_the_error_of_every_later_call() {
    let mut rank = alone(&DOUBLE, LONG);
    let stream = rank.stream;
    let input = rank.output(4);
    rank.group.aborter().abort("rank 1 was killed");
    let error = rank.group.all_reduce(input, input, ReduceOp::Sum, stream).expect_err("it was aborted");
    assert!(error.is_fatal() && error.to_string().contains("rank 1 was killed"), "{error}");
}

#[test]
fn what_a_failed_group_of_a_host_has_made_goes_to_no_other_host() {
    let (meetings, formed) = (meetings_of_two_hosts(), Barrier::new(4));
    let ends = two_hosts(|rank, communicator| {
        let device = Software::new(rank as u64);
        let mut hierarchy = hierarchy(rank, communicator, &device, &meetings);
        // Whoever fails before leaves those alone that still form it.
        formed.wait();
        let stream = device.new_stream().expect("it has streams");
        let buffer = device.alloc(8, DType::I32);
        if rank < 2 {
            hierarchy.inside.aborter().abort("its GPU fell off the bus");
        }
        hierarchy.all_reduce(buffer, buffer, ReduceOp::Sum, stream)
    });
    assert!(ends.iter().all(Result::is_err), "{ends:?}");
    let says_why =
        |end: &Result<(), Error>| end.as_ref().is_err_and(|e| e.to_string().contains("off the bus"));
    assert!(ends[..2].iter().all(says_why), "{ends:?}");
}

fn meetings_of_two_hosts() -> [Arc<Meeting>; 2] {
    [(); 2].map(|()| Arc::new(Meeting { world_size: 2, given: Mutex::default(), news: Condvar::new() }))
}

/// What each of four ranks on two hosts comes to.
fn two_hosts<T: Send>(rank: impl Fn(usize, Communicator) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let run = |transport: mem::MemTransport| {
            let rank = &rank;
            scope.spawn(move || {
                let communicator = Communicator::new(Box::new(transport), Config::default());
                let communicator = communicator.expect("it is right");
                rank(communicator.rank(), communicator)
            })
        };
        let ranks: Vec<_> = mem::group(4, 1, mem::DEFAULT_WINDOW_BYTES).into_iter().map(run).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}

fn hierarchy(
    rank: usize,
    communicator: Communicator,
    device: &Software,
    meetings: &[Arc<Meeting>; 2],
) -> Hierarchy {
    let ids = [DOUBLE.unique_id().expect("it needs nobody")];
    let inside = nccl::Communicator::new(&DOUBLE, rank % 2, 2, &ids, nccl::Options::default());
    let config = FallbackConfig { buffer_bytes: 256, buffers: 3 };
    let records = communicator.records_on_device();
    let formed = Formed { nccl: inside.expect("it forms any"), records };
    let hierarchy = Hierarchy::form(communicator, formed, Box::new(device.clone()), config);
    let hierarchy = hierarchy.expect("all form it");
    let (collectives, meeting) = (AtomicU64::new(0), meetings[rank / 2].clone());
    let place = Arc::new(Place { rank: rank % 2, device: device.clone(), collectives, meeting });
    lock(&PLACES).get_or_insert_default().insert(hierarchy.inside.stream.handle() as usize, place);
    hierarchy
}

/// All-reduces on two hosts of two ranks each, whose input the caller's stream makes late and whose result it uses at once;
/// whether all ranks had what the host back end has.
fn two_hosts_are_right(seed: u64, len: usize) -> bool {
    let meetings = meetings_of_two_hosts();
    let right = two_hosts(|rank, mut communicator| {
        let device = Software::new(seed * 64 + rank as u64);
        let mut chance = fastrand::Rng::with_seed(seed ^ (rank as u64 + 1) << 40);
        let numbers: Vec<i32> = (0..len).map(|_| chance.i32(..)).collect();
        let mut expected = numbers.clone();
        communicator.all_reduce(&mut expected, ReduceOp::Sum).expect("all call it");
        let mut hierarchy = hierarchy(rank, communicator, &device, &meetings);
        let stream = device.new_stream().expect("it has streams");
        let [input, output, kept] = [(); 3].map(|()| device.alloc(len, DType::I32));
        device.launch(stream, move |memory| memory.write(input, &to_bytes(&numbers)));
        hierarchy.all_reduce(input, output, ReduceOp::Sum, stream).expect("all call it");
        device.launch(stream, move |memory| {
            memory.copy(output, kept);
            memory.poison(output);
        });
        device.synchronize();
        let right = device.read(kept) == to_bytes(&expected);
        hierarchy.leave().expect("all do");
        right
    });
    right.into_iter().all(|right| right)
}

#[test]
fn hosts_sum_through_nccl_inside_and_the_host_between_as_the_host_back_end_does() {
    for seed in 0..SEEDS {
        for len in [0, 1, 7, 500] {
            assert!(two_hosts_are_right(seed, len), "{len} elements, seed {seed}");
        }
    }
}
