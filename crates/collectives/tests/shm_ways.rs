//! Every way through shared memory: worlds of 1 to 8, every collective, dtype and operator, lengths around
//! every limit at which another way is taken, in place or not, registered or not.

use std::thread;
use std::time::{Duration, Instant};

use paceline_collectives::dtype::{bf16, f16};
use paceline_collectives::{Communicator, Config, ReduceOp};
use paceline_testing::reference::{Number, tree_sum};
use paceline_transport::mem;
use paceline_transport::shm::{self, Sharing};

/// Runs `part` as every rank of a group that shares memory.
fn on_ranks(world_size: usize, part: impl Fn(&mut Communicator) + Copy + Send + 'static) {
    let ranks: Vec<_> = mem::group(world_size, 1, 64 * 1024)
        .into_iter()
        .map(|links| {
            thread::spawn(move || {
                let deadline = Instant::now() + Duration::from_secs(60);
                let links = shm::upgrade(Box::new(links), Sharing::Auto, deadline, &|| None);
                let links = links.expect("threads are on one host");
                let mut config = Config::default();
                config.timeout = Duration::from_secs(60);
                let mut communicator = Communicator::new(links, config).expect("the configuration is right");
                part(&mut communicator);
                communicator.leave().expect("all ranks leave");
            })
        })
        .collect();
    for rank in ranks {
        rank.join().expect("no rank panics");
    }
}

/// The element `index` that `rank` contributes. Repeats after three elements, which makes references cheap.
fn value(rank: usize, index: usize) -> u32 {
    ((rank * 7 + index * 5) % 3 + 1) as u32
}

fn input<T: Number>(rank: usize, start: usize, len: usize) -> Vec<T> {
    let period: Vec<T> = (0..3).map(|index| T::of(value(rank, index))).collect();
    (start..start + len).map(|index| period[index % 3]).collect()
}

fn reduced<T: Number>(world_size: usize, start: usize, len: usize, op: ReduceOp) -> Vec<T> {
    let contributions = |index| (0..world_size).map(|rank| value(rank, index)).collect::<Vec<_>>();
    let period: Vec<T> = (0..3).map(|index| T::reduce(&contributions(index), op)).collect();
    (start..start + len).map(|index| period[index % 3]).collect()
}

/// Elements around the end of a cell, of what is reduced by all, and of a block of slices; in bytes 88,
/// 4096, 16 KiB and 256 KiB.
fn lengths(world_size: usize, size: usize) -> Vec<usize> {
    let mut lens = vec![0, 1, world_size - 1, world_size, world_size + 1];
    for bytes in [88, 4096, 16 * 1024, 256 * 1024] {
        lens.extend([bytes / size, bytes / size + 1]);
    }
    lens.push(300 * 1024 / size + 7);
    lens
}

fn check<T: Number>(communicator: &mut Communicator) {
    let lens = lengths(communicator.world_size(), size_of::<T>());
    let longest = lens.iter().max().copied().unwrap_or(0);
    for &len in &lens {
        for op in ReduceOp::ALL {
            check_reductions::<T>(communicator, len, op);
        }
        check_copies::<T>(communicator, len);
    }
    let mut first = communicator.alloc::<T>(longest + 1).expect("there is memory");
    let mut second = communicator.alloc::<T>(longest + 1).expect("there is memory");
    for &len in &lens {
        // From the second element on: aligned for the dtype and for nothing else.
        check_registered(communicator, &mut first[1..=len], &mut second[1..=len]);
    }
}

fn check_reductions<T: Number>(communicator: &mut Communicator, len: usize, op: ReduceOp) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let case = format!("{op} of {len} {} in a world of {world_size}", T::DTYPE);
    let mine = input::<T>(rank, 0, len);
    let expected = reduced::<T>(world_size, 0, len, op);
    let mut output = vec![T::of(77); len];
    communicator.all_reduce_into(&mine, &mut output, op).expect("all ranks call it");
    assert!(output == expected, "all_reduce_into, {case}");
    output.copy_from_slice(&mine);
    communicator.all_reduce(&mut output, op).expect("all ranks call it");
    assert!(output == expected, "all_reduce, {case}");
    let root = len % world_size;
    output.copy_from_slice(&mine);
    communicator.reduce(&mut output, op, root).expect("all ranks call it");
    assert!(output == if rank == root { expected } else { mine }, "reduce, {case}");
    // One share each, so that the whole is as long as above.
    let share = len / world_size;
    let mut whole = input::<T>(rank, 0, share * world_size);
    let mut chunk = vec![T::of(77); share];
    let expected = reduced::<T>(world_size, rank * share, share, op);
    communicator.reduce_scatter(&whole, &mut chunk, op).expect("all ranks call it");
    assert!(chunk == expected, "reduce_scatter, {case}");
    communicator.reduce_scatter_in_place(&mut whole, op).expect("all ranks call it");
    assert!(whole[rank * share..][..share] == expected, "reduce_scatter_in_place, {case}");
    let counts: Vec<usize> = (0..world_size).map(|rank| share / 2 + rank % 3).collect();
    let start: usize = counts[..rank].iter().sum();
    let whole = input::<T>(rank, 0, counts.iter().sum());
    let mut chunk = vec![T::of(77); counts[rank]];
    communicator.reduce_scatter_v(&whole, &mut chunk, &counts, op).expect("all ranks call it");
    assert!(chunk == reduced::<T>(world_size, start, counts[rank], op), "reduce_scatter_v, {case}");
}

fn check_copies<T: Number>(communicator: &mut Communicator, len: usize) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let case = format!("{len} {} in a world of {world_size}", T::DTYPE);
    let root = len % world_size;
    let mut buffer = input::<T>(rank, 0, len);
    communicator.broadcast(&mut buffer, root).expect("all ranks call it");
    assert!(buffer == input::<T>(root, 0, len), "broadcast, {case}");
    let share = len / world_size;
    let mine = input::<T>(rank, 0, share);
    let all: Vec<T> = (0..world_size).flat_map(|rank| input::<T>(rank, 0, share)).collect();
    let mut output = vec![T::of(77); share * world_size];
    communicator.all_gather(&mine, &mut output).expect("all ranks call it");
    assert!(output == all, "all_gather, {case}");
    output.fill(T::of(77));
    output[rank * share..][..share].copy_from_slice(&mine);
    communicator.all_gather_in_place(&mut output).expect("all ranks call it");
    assert!(output == all, "all_gather_in_place, {case}");
    output.fill(T::of(77));
    let at_root = if rank == root { &mut output[..] } else { &mut [] };
    communicator.gather(&mine, at_root, root).expect("all ranks call it");
    assert!(rank != root || output == all, "gather, {case}");
    let whole = input::<T>(rank, 0, share * world_size);
    let mut chunk = vec![T::of(77); share];
    let from_root = if rank == root { &whole[..] } else { &[] };
    communicator.scatter(from_root, &mut chunk, root).expect("all ranks call it");
    assert!(chunk == input::<T>(root, rank * share, share), "scatter, {case}");
    communicator.all_to_all(&whole, &mut output).expect("all ranks call it");
    let expected: Vec<T> = (0..world_size).flat_map(|from| input::<T>(from, rank * share, share)).collect();
    assert!(output == expected, "all_to_all, {case}");
    let counts: Vec<usize> = (0..world_size).map(|rank| share / 2 + rank % 3).collect();
    let mut output = vec![T::of(77); counts.iter().sum()];
    communicator
        .all_gather_v(&input::<T>(rank, 0, counts[rank]), &mut output, &counts)
        .expect("all ranks call it");
    let expected: Vec<T> = (0..world_size).flat_map(|from| input::<T>(from, 0, counts[from])).collect();
    assert!(output == expected, "all_gather_v, {case}");
    // Rank i sends count(i, j) elements to rank j.
    let count = |from: usize, to: usize| share / 2 + (from * 2 + to) % 3;
    let send: Vec<usize> = (0..world_size).map(|to| count(rank, to)).collect();
    let receive: Vec<usize> = (0..world_size).map(|from| count(from, rank)).collect();
    let whole = input::<T>(rank, 0, send.iter().sum());
    let mut output = vec![T::of(77); receive.iter().sum()];
    communicator.all_to_all_v(&whole, &send, &mut output, &receive).expect("all ranks call it");
    let expected: Vec<T> = (0..world_size)
        .flat_map(|from| {
            let start = (0..rank).map(|to| count(from, to)).sum();
            input::<T>(from, start, count(from, rank))
        })
        .collect();
    assert!(output == expected, "all_to_all_v, {case}");
}

fn check_registered<T: Number>(communicator: &mut Communicator, input_buffer: &mut [T], output: &mut [T]) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let len = input_buffer.len();
    let case = format!("{len} registered {} in a world of {world_size}", T::DTYPE);
    let mine = input::<T>(rank, 0, len);
    let expected = reduced::<T>(world_size, 0, len, ReduceOp::Sum);
    input_buffer.copy_from_slice(&mine);
    output.fill(T::of(77));
    communicator.all_reduce_into(input_buffer, output, ReduceOp::Sum).expect("all ranks call it");
    assert!(output == expected, "all_reduce_into, {case}");
    communicator.all_reduce(input_buffer, ReduceOp::Sum).expect("all ranks call it");
    assert!(input_buffer == expected, "all_reduce, {case}");
    // One rank's buffer is elsewhere: all go the ordinary way.
    input_buffer.copy_from_slice(&mine);
    let mut elsewhere = mine.clone();
    let buffer = if rank == 0 { &mut elsewhere[..] } else { &mut *input_buffer };
    communicator.all_reduce(buffer, ReduceOp::Max).expect("all ranks call it");
    assert!(buffer == reduced::<T>(world_size, 0, len, ReduceOp::Max), "all_reduce, partly, {case}");
    input_buffer.copy_from_slice(&mine);
    communicator.broadcast(input_buffer, 0).expect("all ranks call it");
    assert!(input_buffer == input::<T>(0, 0, len), "broadcast, {case}");
    let share = len / world_size;
    input_buffer[..share].copy_from_slice(&input::<T>(rank, 0, share));
    let (gathered, _) = output.split_at_mut(share * world_size);
    communicator.all_gather(&input_buffer[..share], gathered).expect("all ranks call it");
    let all: Vec<T> = (0..world_size).flat_map(|rank| input::<T>(rank, 0, share)).collect();
    assert!(gathered == all, "all_gather, {case}");
    input_buffer.copy_from_slice(&mine);
    let mut chunk = vec![T::of(77); share];
    let whole = &input_buffer[..share * world_size];
    communicator.reduce_scatter(whole, &mut chunk, ReduceOp::Sum).expect("all ranks call it");
    assert!(chunk == reduced::<T>(world_size, rank * share, share, ReduceOp::Sum), "reduce_scatter, {case}");
    communicator.all_to_all(whole, gathered).expect("all ranks call it");
    let expected: Vec<T> = (0..world_size).flat_map(|from| input::<T>(from, rank * share, share)).collect();
    assert!(gathered == expected, "all_to_all, {case}");
}

fn check_all(communicator: &mut Communicator) {
    check::<f32>(communicator);
    check::<f64>(communicator);
    check::<f16>(communicator);
    check::<bf16>(communicator);
    check::<i8>(communicator);
    check::<u8>(communicator);
    check::<i32>(communicator);
    check::<i64>(communicator);
    check::<u64>(communicator);
}

#[test]
fn every_way_is_right_in_worlds_of_1_to_4() {
    (1..=4).for_each(|world_size| on_ranks(world_size, check_all));
}

#[test]
fn every_way_is_right_in_worlds_of_5_to_8() {
    (5..=8).for_each(|world_size| on_ranks(world_size, check_all));
}

/// Values of which another order of summation has other bits.
fn rough(rank: usize, index: usize) -> f32 {
    ((rank * 7 + index * 3) % 11) as f32 * 10f32.powi((rank % 9) as i32 - 4) + 0.1
}

#[test]
fn sums_have_the_bits_of_the_tree_whichever_way_they_go() {
    for world_size in 2..=8 {
        on_ranks(world_size, |communicator| {
            let (rank, world_size) = (communicator.rank(), communicator.world_size());
            let longest = 100_003;
            // Repeats after eleven elements.
            let period: Vec<f32> = (0..11)
                .map(|index| tree_sum(&(0..world_size).map(|rank| rough(rank, index)).collect::<Vec<_>>()))
                .collect();
            let mut registered = communicator.alloc::<f32>(longest).expect("there is memory");
            for len in [1, 22, 23, 1024, 1025, 20_000, longest] {
                let mine: Vec<f32> = (0..len).map(|index| rough(rank, index)).collect();
                let expected: Vec<u32> = (0..len).map(|index| period[index % 11].to_bits()).collect();
                let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
                let mut output = mine.clone();
                communicator.all_reduce(&mut output, ReduceOp::Sum).expect("all ranks call it");
                assert!(bits(&output) == expected, "{len} elements, world {world_size}");
                registered[..len].copy_from_slice(&mine);
                communicator.all_reduce(&mut registered[..len], ReduceOp::Sum).expect("all ranks call it");
                assert!(bits(&registered[..len]) == expected, "{len} registered, world {world_size}");
                let whole: Vec<f32> = (0..len * world_size).map(|index| rough(rank, index % len)).collect();
                communicator.reduce_scatter(&whole, &mut output, ReduceOp::Sum).expect("all ranks call it");
                assert!(bits(&output) == expected, "{len} scattered, world {world_size}");
            }
        });
    }
}

#[test]
fn memory_that_all_have_dropped_is_given_back_and_wrong_allocations_change_nothing() {
    on_ranks(3, |communicator| {
        let rank = communicator.rank();
        // Other tests share the process: only mappings of this odd length count.
        let len = 301 * 1024;
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux has it");
            let bytes = |line: &str| {
                let (from, to) = line.split(' ').next()?.split_once('-')?;
                Some(u64::from_str_radix(to, 16).ok()? - u64::from_str_radix(from, 16).ok()?)
            };
            let ours = |line: &&str| line.contains("memfd:paceline") && bytes(line) == Some(4 * len as u64);
            maps.lines().filter(ours).count()
        };
        communicator.barrier().expect("all ranks call it");
        for _ in 0..20 {
            let mut buffer = communicator.alloc::<f32>(len).expect("there is memory");
            buffer.fill(rank as f32);
            communicator.all_reduce(&mut buffer, ReduceOp::Sum).expect("all ranks call it");
            assert!(buffer.iter().all(|&sum| sum == 3.0));
        }
        // Three ranks that map the memory of three; no rank is more than a call ahead of another.
        assert!((9..=18).contains(&mapped()), "{} mappings", mapped());
        communicator.barrier().expect("all ranks call it");
        let error = communicator.alloc::<f32>(1 + rank).expect_err("lengths differ");
        assert!(!error.is_fatal() && error.to_string().contains("all ranks allocate alike"), "{error}");
        let error = communicator.alloc::<f64>(usize::MAX / 4).expect_err("too much");
        assert!(!error.is_fatal() && error.to_string().contains("has no memory"), "{error}");
        communicator.barrier().expect("the communicator is as good as before");
    });
}

#[test]
fn premultiplied_sums_scale_each_contribution() {
    on_ranks(4, |communicator| {
        let rank = communicator.rank();
        for len in [1, 1000, 100_000] {
            let factor = [0.5, 2.0, 0.25, 1.0][rank];
            let mine = vec![(rank + 1) as f32 * 4.0; len];
            let mut output = vec![0.0f32; len];
            communicator.all_reduce_pre_mul_sum_into(&mine, &mut output, factor).expect("all ranks call it");
            // 4 · (1 · 0.5 + 2 · 2 + 3 · 0.25 + 4 · 1)
            assert!(output.iter().all(|&sum| sum == 37.0), "{:?}", output[0]);
            let mut buffer = mine.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
            communicator.all_reduce_pre_mul_sum(&mut buffer, factor).expect("all ranks call it");
            assert!(buffer.iter().all(|&sum| sum == bf16::from_f32(37.0)));
            let mut integers = vec![3i32; len];
            communicator.all_reduce_pre_mul_sum(&mut integers, 2.9).expect("all ranks call it");
            assert!(integers.iter().all(|&sum| sum == 4 * 3 * 2), "factors of integers are integers");
        }
    });
}
