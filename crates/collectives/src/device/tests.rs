//! The fallback on the adversarial device: the bits of the host back end, and a test that notices each missing wait.

use std::panic;
use std::thread;

use paceline_transport::mem;

use super::fallback::Mutation;
use super::software::Software;
use super::{Device, DeviceBuffer, Fallback, FallbackConfig, Stream};
use crate::communicator::{Communicator, Config};
use crate::dtype::{DType, Element, ReduceOp, bf16};
use crate::error::Error;

/// Orders of events that are tried for each thing that must always hold.
const SEEDS: u64 = 6;

/// Orders that are tried until a defect shows.
const SEEDS_FOR_A_DEFECT: u64 = 60;

/// Small buffers, so that a few hundred elements are many pieces.
const CONFIG: FallbackConfig = FallbackConfig { buffer_bytes: 256, buffers: 3 };

/// A rank of a group, with its device and the stream of its caller.
struct Rank {
    fallback: Fallback,
    device: Software,
    stream: Stream,
    seed: u64,
    /// Results, to be looked at when all has run, each with what it should be.
    expected: Vec<(DeviceBuffer, Vec<u8>)>,
}

impl Rank {
    fn communicator(&mut self) -> &mut Communicator {
        self.fallback.communicator()
    }

    fn rank(&mut self) -> usize {
        self.communicator().rank()
    }

    /// `len` elements that differ between ranks, places and calls.
    fn numbers<T: Element>(&mut self, len: usize) -> Vec<T> {
        let mut chance = fastrand::Rng::with_seed(self.seed ^ (self.rank() as u64 + 1) << 40);
        self.seed += 1;
        let mut numbers = vec![T::default(); len];
        for bytes in bytemuck::cast_slice_mut::<T, u8>(&mut numbers).chunks_exact_mut(size_of::<T>()) {
            // Floats of moderate size in whichever format: the exponent's lowest bits vary, and the order matters.
            bytes.fill_with(|| chance.u8(0..0x40));
        }
        numbers
    }

    /// A buffer into which the caller's stream writes `numbers`, later.
    fn input<T: Element>(&self, numbers: &[T]) -> DeviceBuffer {
        let buffer = self.device.alloc(numbers.len(), T::DTYPE);
        let bytes = bytemuck::cast_slice(numbers).to_vec();
        self.device.launch(self.stream, move |memory| memory.write(buffer, &bytes));
        buffer
    }

    /// A buffer that the caller's stream still has in use: what is written into it too early is lost.
    fn output(&self, len: usize, dtype: DType) -> DeviceBuffer {
        let buffer = self.device.alloc(len, dtype);
        self.device.launch(self.stream, move |memory| memory.poison(buffer));
        buffer
    }

    /// The caller uses a result, and then the buffers of the call are somebody else's.
    fn expect<T: Element>(&mut self, result: DeviceBuffer, expected: &[T], used: &[DeviceBuffer]) {
        let (kept, used) = (self.device.alloc(result.len(), result.dtype()), used.to_vec());
        self.device.launch(self.stream, move |memory| {
            memory.copy(result, kept);
            used.into_iter().for_each(|buffer| memory.poison(buffer));
        });
        self.expected.push((kept, bytemuck::cast_slice(expected).to_vec()));
    }

    /// Whether all results are what they should be.
    fn is_right(&self) -> bool {
        self.device.synchronize();
        self.expected.iter().all(|(buffer, expected)| self.device.read(*buffer) == *expected)
    }
}

/// Runs `part` on `world_size` ranks; whether all had the right results.
fn run(world_size: usize, seed: u64, mutation: Mutation, part: impl Fn(&mut Rank) + Sync) -> bool {
    let ranks = mem::group(world_size, 1, mem::DEFAULT_WINDOW_BYTES).into_iter();
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .map(|transport| {
                let part = &part;
                scope.spawn(move || {
                    let communicator = Communicator::new(Box::new(transport), Config::default());
                    let communicator = communicator.expect("the configuration is right");
                    let device = Software::new(seed * 64 + communicator.rank() as u64);
                    let stream = device.new_stream().expect("it has streams");
                    let fallback = Fallback::new(communicator, Box::new(device.clone()), CONFIG);
                    let fallback = fallback.expect("the configuration is right").with(mutation);
                    let mut rank = Rank { fallback, device, stream, seed, expected: Vec::new() };
                    part(&mut rank);
                    let right = rank.is_right();
                    rank.fallback.into_communicator().leave().expect("all do");
                    right
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no rank panics"))
            .fold(true, |all, one| all & one)
    })
}

fn must_be_right(part: impl Fn(&mut Rank) + Sync) {
    for world_size in 1..=4 {
        for seed in 0..SEEDS {
            assert!(run(world_size, seed, Mutation::None, &part), "{world_size} ranks, seed {seed}");
        }
    }
}

/// Reductions of one dtype, in place and not, of lengths from nothing to many pieces.
fn reductions<T: Element>(rank: &mut Rank, len: usize, op: ReduceOp) {
    let (world_size, root) = (rank.communicator().world_size(), rank.communicator().world_size() - 1);
    let stream = rank.stream;

    let numbers = rank.numbers::<T>(len);
    let mut expected = numbers.clone();
    rank.communicator().all_reduce(&mut expected, op).expect("all call it");
    let buffer = rank.input(&numbers);
    rank.fallback.all_reduce(buffer, buffer, op, stream).expect("all call it");
    rank.expect(buffer, &expected, &[buffer]);

    let (input, output) = (rank.input(&numbers), rank.output(len, T::DTYPE));
    rank.fallback.all_reduce(input, output, op, stream).expect("all call it");
    rank.expect(output, &expected, &[input, output]);

    let (input, output) = (rank.input(&numbers), rank.output(len, T::DTYPE));
    rank.fallback.reduce(input, output, op, root, stream).expect("all call it");
    if rank.rank() == root {
        rank.expect(output, &expected, &[input, output]);
    }

    let numbers = rank.numbers::<T>(len * world_size);
    let mut expected = vec![T::default(); len];
    rank.communicator().reduce_scatter(&numbers, &mut expected, op).expect("all call it");
    let (input, output) = (rank.input(&numbers), rank.output(len, T::DTYPE));
    rank.fallback.reduce_scatter(input, output, op, stream).expect("all call it");
    rank.expect(output, &expected, &[input, output]);

    let whole = rank.input(&numbers);
    let place = whole.address() + (rank.rank() * len * size_of::<T>()) as u64;
    let own = DeviceBuffer::checked(place, len, T::DTYPE);
    rank.fallback.reduce_scatter(whole, own, op, stream).expect("all call it");
    rank.expect(own, &expected, &[whole]);
}

/// Collectives that move elements as they are.
fn exchanges<T: Element>(rank: &mut Rank, len: usize) {
    let (number, world_size, stream) = (rank.rank(), rank.communicator().world_size(), rank.stream);
    let root = world_size / 2;

    let numbers = rank.numbers::<T>(len);
    let mut expected = numbers.clone();
    rank.communicator().broadcast(&mut expected, root).expect("all call it");
    let buffer = if number == root { rank.input(&numbers) } else { rank.output(len, T::DTYPE) };
    rank.fallback.broadcast(buffer, root, stream).expect("all call it");
    rank.expect(buffer, &expected, &[buffer]);

    let mut expected = vec![T::default(); len * world_size];
    rank.communicator().all_gather(&numbers, &mut expected).expect("all call it");
    let (input, output) = (rank.input(&numbers), rank.output(len * world_size, T::DTYPE));
    rank.fallback.all_gather(input, output, stream).expect("all call it");
    rank.expect(output, &expected, &[input, output]);

    let (input, output) = (rank.input(&numbers), rank.output(len * world_size, T::DTYPE));
    rank.fallback.gather(input, output, root, stream).expect("all call it");
    if number == root {
        rank.expect(output, &expected, &[input, output]);
    }

    let numbers = rank.numbers::<T>(len * world_size);
    let mut expected = vec![T::default(); len];
    rank.communicator().scatter(&numbers, &mut expected, root).expect("all call it");
    let (input, output) = (rank.input(&numbers), rank.output(len, T::DTYPE));
    rank.fallback.scatter(input, output, root, stream).expect("all call it");
    rank.expect(output, &expected, &[input, output]);

    let mut expected = vec![T::default(); len * world_size];
    rank.communicator().all_to_all(&numbers, &mut expected).expect("all call it");
    let (input, output) = (rank.input(&numbers), rank.output(len * world_size, T::DTYPE));
    rank.fallback.all_to_all(input, output, stream).expect("all call it");
    rank.expect(output, &expected, &[input, output]);
    let buffer = rank.input(&numbers);
    rank.fallback.all_to_all(buffer, buffer, stream).expect("all call it");
    rank.expect(buffer, &expected, &[buffer]);
}

/// Collectives whose shares differ in length.
fn uneven<T: Element>(rank: &mut Rank, len: usize) {
    let (number, world_size, stream) = (rank.rank(), rank.communicator().world_size(), rank.stream);
    let counts: Vec<usize> = (0..world_size).map(|other| other * len / 2).collect();
    let total: usize = counts.iter().sum();

    let numbers = rank.numbers::<T>(counts[number]);
    let mut expected = vec![T::default(); total];
    rank.communicator().all_gather_v(&numbers, &mut expected, &counts).expect("all call it");
    let (input, output) = (rank.input(&numbers), rank.output(total, T::DTYPE));
    rank.fallback.all_gather_v(input, output, &counts, stream).expect("all call it");
    rank.expect(output, &expected, &[input, output]);

    let numbers = rank.numbers::<T>(total);
    let mut expected = vec![T::default(); counts[number]];
    rank.communicator()
        .reduce_scatter_v(&numbers, &mut expected, &counts, ReduceOp::Sum)
        .expect("all call it");
    let (input, output) = (rank.input(&numbers), rank.output(counts[number], T::DTYPE));
    rank.fallback.reduce_scatter_v(input, output, &counts, ReduceOp::Sum, stream).expect("all call it");
    rank.expect(output, &expected, &[input, output]);

    let part = |from: usize, to: usize| (from + 2 * to) * len / 3;
    let sent: Vec<usize> = (0..world_size).map(|to| part(number, to)).collect();
    let received: Vec<usize> = (0..world_size).map(|from| part(from, number)).collect();
    let numbers = rank.numbers::<T>(sent.iter().sum());
    let mut expected = vec![T::default(); received.iter().sum()];
    rank.communicator().all_to_all_v(&numbers, &sent, &mut expected, &received).expect("all call it");
    let (input, output) = (rank.input(&numbers), rank.output(expected.len(), T::DTYPE));
    rank.fallback.all_to_all_v(input, &sent, output, &received, stream).expect("all call it");
    rank.expect(output, &expected, &[input, output]);
}

/// Each rank sends to the next, in turn.
fn messages<T: Element>(rank: &mut Rank, len: usize) {
    let (number, world_size, stream) = (rank.rank(), rank.communicator().world_size(), rank.stream);
    for from in 0..world_size.saturating_sub(1) {
        // The same on all ranks.
        let numbers: Vec<T> = vec![T::default(); len];
        if number == from {
            let buffer = rank.input(&numbers);
            rank.fallback.send(buffer, from + 1, stream).expect("it is received");
            rank.expect(buffer, &numbers, &[buffer]);
        } else if number == from + 1 {
            let buffer = rank.output(len, T::DTYPE);
            rank.fallback.recv(buffer, from, stream).expect("it is sent");
            rank.expect(buffer, &numbers, &[buffer]);
        }
    }
}

#[test]
fn reductions_have_the_bits_of_the_host_back_end() {
    must_be_right(|rank| {
        for len in [0, 1, 63, 200] {
            reductions::<f32>(rank, len, ReduceOp::Sum);
        }
        reductions::<bf16>(rank, 300, ReduceOp::Avg);
        reductions::<f64>(rank, 65, ReduceOp::Prod);
        reductions::<u8>(rank, 500, ReduceOp::Max);
    });
}

#[test]
fn exchanges_have_the_bits_of_the_host_back_end() {
    must_be_right(|rank| {
        for len in [0, 1, 100] {
            exchanges::<i32>(rank, len);
            uneven::<f32>(rank, len);
            messages::<u64>(rank, len);
        }
        exchanges::<u8>(rank, 333);
    });
}

/// Calls in which every wait matters: many pieces, and buffers that are only written before the call and only used after.
fn delicate(rank: &mut Rank) {
    reductions::<f32>(rank, 300, ReduceOp::Sum);
    exchanges::<f32>(rank, 150);
}

#[test]
fn each_wait_that_is_left_out_makes_a_result_wrong() {
    for mutation in [
        Mutation::InputNotAwaited,
        Mutation::OutputNotAwaited,
        Mutation::CopyDownNotAwaited,
        Mutation::CopyUpNotAwaited,
        Mutation::ResultNotAwaited,
    ] {
        let noticed = (0..SEEDS_FOR_A_DEFECT).find(|&seed| !run(2, seed, mutation, delicate));
        let seed = noticed.unwrap_or_else(|| panic!("{mutation:?} makes no difference"));
        assert!(run(2, seed, Mutation::None, delicate), "without it the same order is right");
    }
}

#[test]
fn a_wrong_call_moves_nothing_and_the_next_one_is_right() {
    must_be_right(|rank| {
        let (stream, ranks) = (rank.stream, rank.communicator().world_size());
        let (short, long) = (rank.output(3, DType::F32), rank.output(4, DType::F32));
        let other = rank.output(3, DType::I32);
        let wrong = [
            rank.fallback.all_reduce(short, long, ReduceOp::Sum, stream),
            rank.fallback.all_reduce(short, other, ReduceOp::Sum, stream),
            rank.fallback.broadcast(short, ranks, stream),
            rank.fallback.all_gather(long, short, stream),
            rank.fallback.all_gather_v(short, short, &vec![1; ranks + 1], stream),
            rank.fallback.send(short, ranks, stream),
        ];
        for outcome in wrong {
            assert!(matches!(outcome, Err(Error::Usage { .. })), "{outcome:?}");
        }
        reductions::<f32>(rank, 100, ReduceOp::Sum);
    });
}

#[test]
fn a_device_that_fails_ends_the_operation_on_all_ranks() {
    let group = mem::group(2, 1, mem::DEFAULT_WINDOW_BYTES).into_iter();
    thread::scope(|scope| {
        for transport in group {
            scope.spawn(move || {
                let communicator = Communicator::new(Box::new(transport), Config::default());
                let communicator = communicator.expect("the configuration is right");
                let rank = communicator.rank();
                let device = Software::new(rank as u64);
                let stream = device.new_stream().expect("it has streams");
                let mut fallback =
                    Fallback::new(communicator, Box::new(device.clone()), CONFIG).expect("it is right");
                let buffer = device.alloc(100, DType::F32);
                if rank == 1 {
                    device.fail_next_copy("an illegal address");
                }
                let error = fallback
                    .all_reduce(buffer, buffer, ReduceOp::Sum, stream)
                    .expect_err("rank 1 has failed");
                assert!(
                    error.is_fatal() && error.to_string().contains("an illegal address"),
                    "rank {rank}: {error}"
                );
            });
        }
    });
}

#[test]
fn the_adversary_is_legal_and_the_same_for_the_same_seed() {
    let order = |seed| {
        let device = Software::new(seed);
        let [first, second] = [(); 2].map(|()| device.new_stream().expect("it has streams"));
        let event = device.new_event().expect("it has events");
        let log = device.alloc(8, DType::U8);
        let note = |stream, number: u8| {
            device.launch(stream, move |memory| {
                let place = DeviceBuffer::checked(log.address() + u64::from(number), 1, DType::U8);
                let last = DeviceBuffer::checked(log.address() + 7, 1, DType::U8);
                memory.copy(last, place);
                let next = memory.read_byte(last).wrapping_add(1);
                memory.write(last, &[next]);
            });
        };
        device.launch(first, move |memory| memory.write(log, &[0; 8]));
        device.record(event, first).expect("it can");
        device.wait(second, event).expect("it can");
        (0..3).for_each(|number| note(first, number));
        (3..6).for_each(|number| note(second, number));
        device.synchronize();
        device.read(log)[..6].to_vec()
    };
    let orders: Vec<Vec<u8>> = (0..20).map(order).collect();
    for places in &orders {
        assert!(places[..3].is_sorted() && places[3..].is_sorted(), "a stream is in order: {places:?}");
    }
    assert!(orders.iter().any(|places| places != &orders[0]), "there are several orders");
    assert_eq!(order(7), orders[7]);
    assert!(panic::catch_unwind(|| Software::new(0).read(DeviceBuffer::checked(5, 1, DType::U8))).is_err());
}
