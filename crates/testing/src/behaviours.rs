//! The list.

use std::time::{Duration, Instant};

use paceline_collectives::dtype::{bf16, f16};
use paceline_collectives::{Algorithm, Communicator, Config, Error, Kind, Order, ReduceOp};

use crate::reference::{Number, Numbers, tree_sum};

/// What one rank does and asserts.
#[derive(Clone, Copy)]
pub struct Behaviour {
    /// A sentence, as an identifier.
    pub name: &'static str,
    /// Whether it moves megabytes, which takes long over a window of a few bytes.
    pub heavy: bool,
    /// World sizes it makes sense for.
    pub world_sizes: &'static [usize],
    /// How its communicators are configured.
    pub config: fn() -> Config,
    /// One rank's part. Panics when something is not as it should be.
    pub run: fn(Communicator),
}

macro_rules! behaviours {
    ($($name:ident: $worlds:expr, $config:expr, heavy: $heavy:expr;)*) => {
        /// Every behaviour.
        pub const ALL: &[Behaviour] = &[$(
            Behaviour {
                name: stringify!($name),
                heavy: $heavy,
                world_sizes: $worlds,
                config: $config,
                run: $name,
            },
        )*];
    };
}

behaviours! {
    every_collective_is_right_for_every_dtype_and_op: &[1, 2, 3, 4, 5], small_segments, heavy: false;
    rings_are_right_too: &[1, 2, 3, 4, 5], rings, heavy: false;
    halving_is_right_too: &[1, 2, 3, 4, 5], halving, heavy: false;
    sums_have_the_fixed_order_to_the_bit: &[1, 2, 3, 4, 5], small_segments, heavy: false;
    sums_have_the_same_bits_whatever_the_segments: &[2, 4], Config::default, heavy: true;
    long_messages_pass_in_both_directions_at_once: &[2, 4], Config::default, heavy: true;
    messages_arrive_in_order_and_keep_their_place: &[2, 4], small_segments, heavy: false;
    started_operations_run_in_order_and_give_their_buffers_back: &[2, 4], small_segments, heavy: false;
    counts_that_disagree_are_the_same_error_on_every_rank: &[2, 4], patient, heavy: false;
    a_wrong_call_has_no_effect: &[2, 4], Config::default, heavy: false;
    another_collective_is_a_mismatch_on_every_rank: &[2, 4], patient, heavy: false;
    other_arguments_are_a_mismatch_on_every_rank: &[3], patient, heavy: false;
    other_counts_are_a_mismatch_on_every_rank: &[3], patient, heavy: false;
    a_call_too_many_is_a_mismatch_at_the_next_call: &[4], patient, heavy: false;
    a_rank_that_never_calls_is_named: &[2, 4], impatient, heavy: false;
    an_orderly_leave_is_not_a_loss: &[2, 4], patient, heavy: false;
    what_was_sent_before_leaving_arrives: &[2, 4], patient, heavy: false;
    a_rank_that_drops_its_communicator_is_lost: &[2, 4], patient, heavy: false;
    a_split_makes_groups_ordered_by_key: &[1, 2, 4], small_segments, heavy: false;
    groups_split_again_and_all_work_side_by_side: &[4], small_segments, heavy: false;
    a_split_outlives_its_parent: &[2, 4], patient, heavy: false;
    a_group_that_fails_is_alone_with_it: &[4], patient, heavy: false;
    a_split_hears_who_is_dead: &[4], patient, heavy: false;
    an_interrupted_operation_ends_on_every_rank: &[2, 4], patient, heavy: false;
    a_rank_that_is_said_to_be_dead_is_lost: &[2, 4], patient, heavy: false;
}

fn small_segments() -> Config {
    let mut config = Config::default();
    config.segment_bytes = 64;
    config.timeout = Duration::from_secs(60);
    config
}

fn rings() -> Config {
    let mut config = small_segments();
    config.algorithm = Algorithm::Ring;
    config.order = Order::Any;
    config
}

fn halving() -> Config {
    let mut config = rings();
    config.algorithm = Algorithm::Halving;
    config
}

/// Errors must come by themselves long before this.
fn patient() -> Config {
    let mut config = Config::default();
    config.timeout = Duration::from_secs(60);
    config
}

fn impatient() -> Config {
    let mut config = Config::default();
    config.timeout = Duration::from_millis(500);
    config
}

/// The bound for errors that come by themselves: "within 1 s" by contract. The timeout is far beyond.
const AT_ONCE: Duration = Duration::from_secs(1);

fn lengths(world_size: usize) -> [usize; 6] {
    [0, 1, world_size.saturating_sub(1), world_size, world_size + 1, 1000]
}

/// The element `index` that `rank` contributes: 1 to 3, so that products of five ranks fit into i8.
fn value(rank: usize, index: usize) -> u32 {
    ((rank * 7 + index * 5) % 3 + 1) as u32
}

fn input<T: Number>(rank: usize, start: usize, len: usize) -> Vec<T> {
    (start..start + len).map(|index| T::of(value(rank, index))).collect()
}

fn reduced<T: Number>(world_size: usize, start: usize, len: usize, op: ReduceOp) -> Vec<T> {
    (start..start + len)
        .map(|index| T::reduce(&(0..world_size).map(|rank| value(rank, index)).collect::<Vec<_>>(), op))
        .collect()
}

fn every_collective_is_right_for_every_dtype_and_op(mut communicator: Communicator) {
    check_dtype::<f32>(&mut communicator);
    check_dtype::<f64>(&mut communicator);
    check_dtype::<f16>(&mut communicator);
    check_dtype::<bf16>(&mut communicator);
    check_dtype::<i8>(&mut communicator);
    check_dtype::<u8>(&mut communicator);
    check_dtype::<i32>(&mut communicator);
    check_dtype::<i64>(&mut communicator);
    check_dtype::<u64>(&mut communicator);
    communicator.barrier().expect("all ranks call it");
    communicator.leave().expect("all ranks leave");
}

fn rings_are_right_too(communicator: Communicator) {
    every_collective_is_right_for_every_dtype_and_op(communicator);
}

fn halving_is_right_too(communicator: Communicator) {
    every_collective_is_right_for_every_dtype_and_op(communicator);
}

fn check_dtype<T: Number>(communicator: &mut Communicator) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    for len in lengths(world_size) {
        // Several segments, in a tenth of the time over a window of a few bytes.
        let short = len.min(100);
        for op in ReduceOp::ALL {
            let mine = input::<T>(rank, 0, len);
            let expected = reduced::<T>(world_size, 0, len, op);
            let mut in_place = mine.clone();
            communicator.all_reduce(&mut in_place, op).expect("all ranks call it");
            assert_eq!(in_place, expected, "all_reduce {op} {} len {len}", T::DTYPE);
            let mut output = vec![T::default(); len];
            communicator.all_reduce_into(&mine, &mut output, op).expect("all ranks call it");
            assert_eq!(output, expected, "all_reduce_into {op} {} len {len}", T::DTYPE);
            let whole = input::<T>(rank, 0, len * world_size);
            communicator.reduce_scatter(&whole, &mut output, op).expect("all ranks call it");
            let expected = reduced::<T>(world_size, rank * len, len, op);
            assert_eq!(output, expected, "reduce_scatter {op} {} len {len}", T::DTYPE);
            check_reduce_scatter_in_place::<T>(communicator, short, op);
            // Each operator and length with another root.
            check_reduce::<T>(communicator, short, op, (len + op as usize) % world_size);
            check_reduce_scatter_v::<T>(communicator, &uneven(world_size, short), op);
        }
        let mut gathered = vec![T::default(); len * world_size];
        communicator.all_gather(&input::<T>(rank, 0, len), &mut gathered).expect("all ranks call it");
        let expected: Vec<T> = (0..world_size).flat_map(|rank| input::<T>(rank, 0, len)).collect();
        assert_eq!(gathered, expected, "all_gather {} len {len}", T::DTYPE);
        check_all_gather_in_place::<T>(communicator, short);
        check_all_to_all::<T>(communicator, short);
        check_all_gather_v::<T>(communicator, &uneven(world_size, short));
        check_all_to_all_v::<T>(communicator, short);
        for root in 0..world_size {
            let mut buffer = input::<T>(rank, 0, len);
            communicator.broadcast(&mut buffer, root).expect("all ranks call it");
            assert_eq!(buffer, input::<T>(root, 0, len), "broadcast from {root} {} len {len}", T::DTYPE);
            check_gather_and_scatter::<T>(communicator, short, root);
        }
    }
}

/// Shares of 0 to `len` elements, at least one of them empty.
fn uneven(world_size: usize, len: usize) -> Vec<usize> {
    (0..world_size).map(|rank| if rank == 1 { 0 } else { (rank * 5 + 7) * len / 11 % (len + 1) }).collect()
}

fn check_reduce_scatter_in_place<T: Number>(communicator: &mut Communicator, len: usize, op: ReduceOp) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let mut expected = input::<T>(rank, 0, len * world_size);
    let mut buffer = expected.clone();
    communicator.reduce_scatter_in_place(&mut buffer, op).expect("all ranks call it");
    expected[rank * len..][..len].copy_from_slice(&reduced::<T>(world_size, rank * len, len, op));
    assert_eq!(buffer, expected, "reduce_scatter in place {op} {} len {len}", T::DTYPE);
}

fn check_all_gather_in_place<T: Number>(communicator: &mut Communicator, len: usize) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let mut buffer = vec![T::default(); len * world_size];
    buffer[rank * len..][..len].copy_from_slice(&input::<T>(rank, 0, len));
    communicator.all_gather_in_place(&mut buffer).expect("all ranks call it");
    let expected: Vec<T> = (0..world_size).flat_map(|rank| input::<T>(rank, 0, len)).collect();
    assert_eq!(buffer, expected, "all_gather in place {} len {len}", T::DTYPE);
}

fn check_reduce<T: Number>(communicator: &mut Communicator, len: usize, op: ReduceOp, root: usize) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let mine = input::<T>(rank, 0, len);
    let reduced = reduced::<T>(world_size, 0, len, op);
    let mut in_place = mine.clone();
    communicator.reduce(&mut in_place, op, root).expect("all ranks call it");
    let expected = if rank == root { &reduced } else { &mine };
    assert_eq!(in_place, *expected, "reduce {op} to {root} {} len {len}", T::DTYPE);
    // Where there is no result, the output may have any length.
    let mut output = vec![T::default(); if rank == root { len } else { 1 }];
    communicator.reduce_into(&mine, &mut output, op, root).expect("all ranks call it");
    let expected = if rank == root { reduced } else { vec![T::default()] };
    assert_eq!(output, expected, "reduce_into {op} to {root} {} len {len}", T::DTYPE);
}

fn check_gather_and_scatter<T: Number>(communicator: &mut Communicator, len: usize, root: usize) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let is_root = rank == root;
    let mut gathered = vec![T::default(); if is_root { len * world_size } else { 1 }];
    communicator.gather(&input::<T>(rank, 0, len), &mut gathered, root).expect("all ranks call it");
    let expected = match is_root {
        true => (0..world_size).flat_map(|rank| input::<T>(rank, 0, len)).collect(),
        false => vec![T::default()],
    };
    assert_eq!(gathered, expected, "gather to {root} {} len {len}", T::DTYPE);
    let whole = if is_root { input::<T>(root, 0, len * world_size) } else { Vec::new() };
    let mut part = vec![T::default(); len];
    communicator.scatter(&whole, &mut part, root).expect("all ranks call it");
    assert_eq!(part, input::<T>(root, rank * len, len), "scatter from {root} {} len {len}", T::DTYPE);
}

fn check_all_to_all<T: Number>(communicator: &mut Communicator, len: usize) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let mut output = vec![T::default(); len * world_size];
    let mine = input::<T>(rank, 0, len * world_size);
    communicator.all_to_all(&mine, &mut output).expect("all ranks call it");
    let expected: Vec<T> = (0..world_size).flat_map(|from| input::<T>(from, rank * len, len)).collect();
    assert_eq!(output, expected, "all_to_all {} len {len}", T::DTYPE);
}

fn check_all_gather_v<T: Number>(communicator: &mut Communicator, counts: &[usize]) {
    let rank = communicator.rank();
    let mut output = vec![T::default(); counts.iter().sum()];
    communicator
        .all_gather_v(&input::<T>(rank, 0, counts[rank]), &mut output, counts)
        .expect("all ranks call it");
    let expected: Vec<T> =
        counts.iter().enumerate().flat_map(|(from, &count)| input::<T>(from, 0, count)).collect();
    assert_eq!(output, expected, "all_gather_v {} {counts:?}", T::DTYPE);
}

fn check_reduce_scatter_v<T: Number>(communicator: &mut Communicator, counts: &[usize], op: ReduceOp) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let (start, total) = (counts[..rank].iter().sum(), counts.iter().sum());
    let mut output = vec![T::default(); counts[rank]];
    communicator
        .reduce_scatter_v(&input::<T>(rank, 0, total), &mut output, counts, op)
        .expect("all ranks call it");
    let expected = reduced::<T>(world_size, start, counts[rank], op);
    assert_eq!(output, expected, "reduce_scatter_v {op} {} {counts:?}", T::DTYPE);
}

fn check_all_to_all_v<T: Number>(communicator: &mut Communicator, len: usize) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let counts = uneven(world_size, len);
    let count = |from: usize, to: usize| counts[(from + 2 * to) % world_size];
    let send_counts: Vec<usize> = (0..world_size).map(|to| count(rank, to)).collect();
    let recv_counts: Vec<usize> = (0..world_size).map(|from| count(from, rank)).collect();
    let mine = input::<T>(rank, 0, send_counts.iter().sum());
    let mut output = vec![T::default(); recv_counts.iter().sum()];
    communicator.all_to_all_v(&mine, &send_counts, &mut output, &recv_counts).expect("all ranks call it");
    let part = |from: usize| {
        let start = (0..rank).map(|to| count(from, to)).sum();
        input::<T>(from, start, count(from, rank))
    };
    let expected: Vec<T> = (0..world_size).flat_map(part).collect();
    assert_eq!(output, expected, "all_to_all_v {} {counts:?}", T::DTYPE);
}

/// Numbers of very different size, so that another order of summation gives other bits.
fn rough(rank: usize, len: usize) -> Vec<f32> {
    let mut numbers = Numbers(rank as u64 + 1);
    (0..len).map(|_| f32::from_bits((numbers.draw() as u32 & 0x83ff_ffff) | 0x3800_0000)).collect()
}

fn sums_have_the_fixed_order_to_the_bit(mut communicator: Communicator) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    for len in lengths(world_size) {
        let mut buffer = rough(rank, len);
        communicator.all_reduce(&mut buffer, ReduceOp::Sum).expect("all ranks call it");
        let inputs: Vec<Vec<f32>> = (0..world_size).map(|rank| rough(rank, len)).collect();
        for (index, sum) in buffer.iter().enumerate() {
            let contributions: Vec<f32> = inputs.iter().map(|input| input[index]).collect();
            assert_eq!(sum.to_bits(), tree_sum(&contributions).to_bits(), "element {index} of {len}");
        }
    }
    communicator.leave().expect("all ranks leave");
}

fn sums_have_the_same_bits_whatever_the_segments(mut communicator: Communicator) {
    // Longer and shorter calls cut other segments; the prefix they share must not change.
    let (rank, len) = (communicator.rank(), 300_000);
    let mut whole = rough(rank, len);
    communicator.all_reduce(&mut whole, ReduceOp::Sum).expect("all ranks call it");
    for shorter in [1, 1000, 70_000, len - 1] {
        let mut buffer = rough(rank, len)[..shorter].to_vec();
        communicator.all_reduce(&mut buffer, ReduceOp::Sum).expect("all ranks call it");
        let same = buffer.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "the first {shorter} sums differ");
    }
    communicator.leave().expect("all ranks leave");
}

fn long_messages_pass_in_both_directions_at_once(mut communicator: Communicator) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let len = 1_000_003;
    let mut buffer: Vec<u64> = (0..len).map(|i| (i * (rank + 1)) as u64).collect();
    communicator.all_reduce(&mut buffer, ReduceOp::Sum).expect("all ranks call it");
    let factor: usize = (1..=world_size).sum();
    assert!(buffer.iter().enumerate().all(|(i, &sum)| sum == (i * factor) as u64));
    let mut copy = if rank == 1 { buffer.clone() } else { vec![0; len] };
    communicator.broadcast(&mut copy, 1).expect("all ranks call it");
    assert!(copy == buffer);
    communicator.leave().expect("all ranks leave");
}

fn messages_arrive_in_order_and_keep_their_place(mut communicator: Communicator) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let (right, left) = ((rank + 1) % world_size, (rank + world_size - 1) % world_size);
    for len in [0, 1, 100, 5000] {
        let mine: Vec<u64> = (0..len).map(|i| (rank * 1_000_000 + i) as u64).collect();
        let mut theirs = vec![0u64; len];
        // Even ranks send first, odd ones receive first: long messages may not all be sent first.
        if rank % 2 == 0 {
            communicator.send(&mine, right).expect("the right neighbour receives");
            communicator.recv(&mut theirs, left).expect("the left neighbour sends");
        } else {
            communicator.recv(&mut theirs, left).expect("the left neighbour sends");
            communicator.send(&mine, right).expect("the right neighbour receives");
        }
        assert!(theirs.iter().enumerate().all(|(i, &x)| x == (left * 1_000_000 + i) as u64));
        communicator.barrier().expect("all ranks call it");
    }
    // Several messages wait while the receiver is busy with another peer's.
    if rank == 0 {
        for from in (1..world_size).rev() {
            for expected in 0..3u8 {
                let mut message = [9u8];
                communicator.recv(&mut message, from).expect("each rank sends three");
                assert_eq!(message, [expected]);
            }
        }
    } else {
        for message in 0..3u8 {
            communicator.send(&[message], 0).expect("rank 0 receives");
        }
    }
    communicator.leave().expect("all ranks leave");
}

fn started_operations_run_in_order_and_give_their_buffers_back(mut communicator: Communicator) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let start = |communicator: &mut Communicator, len: usize| {
        communicator.all_reduce_start(input::<f64>(rank, 0, len), ReduceOp::Sum).expect("the call is right")
    };
    let works: Vec<_> = (0..20).map(|i| (i * 37, start(&mut communicator, i * 37))).collect();
    // A handle that nobody waits for: the operation goes on, or the others would wait for ever.
    drop(start(&mut communicator, 501));
    communicator.barrier().expect("a blocking call waits for its turn");
    for (len, work) in works {
        assert!(work.is_done(), "the barrier came later");
        assert_eq!(
            work.wait().expect("all ranks started it"),
            reduced::<f64>(world_size, 0, len, ReduceOp::Sum)
        );
    }
    let mine = input::<f64>(rank, 0, 9 * world_size);
    let scattered = communicator.reduce_scatter_start(mine, ReduceOp::Sum).expect("the call is right");
    let mut gathered = vec![0.0; 9 * world_size];
    gathered[rank * 9..][..9].copy_from_slice(&input::<f64>(rank, 0, 9));
    let gathered = communicator.all_gather_start(gathered).expect("the call is right");
    let broadcast = communicator.broadcast_start(input::<f64>(rank, 0, 9), 1).expect("the call is right");
    let scattered = scattered.wait().expect("all ranks started it");
    assert_eq!(scattered[rank * 9..][..9], reduced::<f64>(world_size, rank * 9, 9, ReduceOp::Sum));
    let expected: Vec<f64> = (0..world_size).flat_map(|rank| input::<f64>(rank, 0, 9)).collect();
    assert_eq!(gathered.wait().expect("all ranks started it"), expected);
    assert_eq!(broadcast.wait().expect("all ranks started it"), input::<f64>(1, 0, 9));
    let awaited = block_on(start(&mut communicator, 77));
    assert_eq!(awaited.expect("all ranks started it"), reduced::<f64>(world_size, 0, 77, ReduceOp::Sum));
    communicator.leave().expect("all ranks leave");
}

/// A minimal executor, so that the list depends on none.
fn block_on<F: Future + Unpin>(mut future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    loop {
        match std::pin::Pin::new(&mut future).poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => std::thread::park_timeout(Duration::from_secs(60)),
        }
    }
}

fn counts_that_disagree_are_the_same_error_on_every_rank(mut communicator: Communicator) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let ones = vec![1; world_size];
    let mut expected = ones.clone();
    // Rank 1 expects another count from rank 0 than rank 0 sends.
    expected[0] += if rank == 1 { 2 } else { 0 };
    let mut output = vec![7i32; expected.iter().sum()];
    let error = communicator
        .all_to_all_v(&vec![1i32; world_size], &ones, &mut output, &expected)
        .expect_err("two ranks disagree");
    assert!(!error.is_fatal(), "{error}");
    let text = error.to_string();
    assert!(text.contains("rank 0 sends 1 elements to rank 1, which expects 3"), "{text}");
    assert!(output.iter().all(|&element| element == 7), "nothing was exchanged");
    check_all_to_all_v::<i32>(&mut communicator, 10);
    communicator.leave().expect("all ranks leave");
}

fn a_wrong_call_has_no_effect(mut communicator: Communicator) {
    let world_size = communicator.world_size();
    let me = communicator.rank();
    let one_each = vec![1; world_size];
    let wrong: Vec<Result<(), Error>> = vec![
        communicator.broadcast(&mut [0u8], world_size),
        communicator.send(&[0u8], me),
        communicator.recv(&mut [0u8], world_size + 1),
        communicator.all_gather(&[0u8; 3], &mut [0u8; 1]),
        communicator.all_gather_in_place(&mut vec![0u8; world_size + 1]),
        communicator.reduce_scatter(&[0u8; 1], &mut [0u8; 3], ReduceOp::Sum),
        communicator.reduce_scatter_in_place(&mut vec![0u8; world_size + 1], ReduceOp::Sum),
        communicator.all_reduce_into(&[0u8; 1], &mut [0u8; 3], ReduceOp::Sum),
        communicator.reduce(&mut [0u8], ReduceOp::Sum, world_size),
        communicator.reduce_into(&[0u8; 1], &mut [0u8; 3], ReduceOp::Sum, me),
        communicator.gather(&[0u8; 3], &mut [0u8; 1], me),
        communicator.gather(&[0u8; 3], &mut [0u8; 1], world_size),
        communicator.scatter(&[0u8; 1], &mut [0u8; 3], me),
        communicator.scatter(&[0u8; 1], &mut [0u8; 3], world_size),
        communicator.all_to_all(&vec![0u8; world_size], &mut vec![0u8; 2 * world_size]),
        communicator.all_to_all(&vec![0u8; world_size + 1], &mut vec![0u8; world_size + 1]),
        communicator.all_gather_v(&[0u8], &mut [0u8; 1], &[1]),
        communicator.all_gather_v(&[0u8; 2], &mut vec![0u8; world_size], &one_each),
        communicator.all_gather_v(&[0u8], &mut vec![0u8; world_size + 1], &one_each),
        communicator.all_gather_v(&[0u8], &mut [0u8; 1], &vec![usize::MAX; world_size]),
        communicator.reduce_scatter_v(&[0u8; 1], &mut [0u8], &one_each, ReduceOp::Sum),
        communicator.reduce_scatter_v(&vec![0u8; world_size], &mut [0u8; 2], &one_each, ReduceOp::Sum),
        communicator.all_to_all_v(&[0u8], &one_each, &mut vec![0u8; world_size], &one_each),
        communicator.all_to_all_v(&vec![0u8; world_size], &one_each, &mut [0u8], &one_each),
        communicator.all_to_all_v(&[0u8], &[1], &mut [0u8], &[1]),
    ];
    for result in wrong {
        let error = result.expect_err("the call is wrong");
        assert!(matches!(error, Error::Usage { .. }) && !error.is_fatal(), "{error}");
    }
    let mut buffer = [1u8];
    communicator.all_reduce(&mut buffer, ReduceOp::Sum).expect("the communicator is as good as before");
    assert_eq!(buffer, [world_size as u8]);
    communicator.leave().expect("all ranks leave");
}

/// Runs `call`, which must end in an error, and says how long it took.
fn failing(call: impl FnOnce() -> Result<(), Error>) -> (Error, Duration) {
    let start = Instant::now();
    let error = call().expect_err("the call must fail");
    assert!(error.is_fatal());
    (error, start.elapsed())
}

/// A fatal error stays: the next call gives it again, and at once.
fn assert_stays(communicator: &mut Communicator, error: &Error) {
    let (again, elapsed) = failing(|| communicator.barrier());
    assert_eq!(again, *error);
    assert!(elapsed < AT_ONCE);
}

fn another_collective_is_a_mismatch_on_every_rank(mut communicator: Communicator) {
    let last = communicator.world_size() - 1;
    // The first operation: a failure ends whatever a rank is in, so nothing may be under way before.
    let (error, elapsed) = failing(|| {
        if communicator.rank() == last {
            communicator.all_reduce(&mut [1.0f32; 1000], ReduceOp::Sum)
        } else {
            communicator.all_gather(&[1.0f32; 100], &mut vec![0.0; 100 * (last + 1)])
        }
    });
    let Error::Mismatch { calls, .. } = &error else { panic!("not a mismatch: {error}") };
    let kinds = calls.as_ref().map(|call| (call.rank == last, call.operation.kind));
    assert!(kinds.contains(&(true, Kind::AllReduce(ReduceOp::Sum))), "{error}");
    assert!(kinds.contains(&(false, Kind::AllGather)), "{error}");
    assert!(elapsed < AT_ONCE, "after {elapsed:?}");
    assert_stays(&mut communicator, &error);
}

fn other_arguments_are_a_mismatch_on_every_rank(mut communicator: Communicator) {
    // One disagreement per run of the list would be thirty groups; the first decides, so the ranks
    // disagree in dtype, length and operator at once and any of the three must do.
    let (error, elapsed) = failing(|| match communicator.rank() {
        0 => communicator.all_reduce(&mut [1.0f32; 64], ReduceOp::Sum),
        1 => communicator.all_reduce(&mut [1.0f32; 65], ReduceOp::Sum),
        _ => communicator.all_reduce(&mut [1.0f32; 64], ReduceOp::Max),
    });
    let Error::Mismatch { calls, .. } = &error else { panic!("not a mismatch: {error}") };
    assert_ne!(calls[0].operation, calls[1].operation, "{error}");
    assert!(elapsed < AT_ONCE, "after {elapsed:?}");
    assert_stays(&mut communicator, &error);
}

fn other_counts_are_a_mismatch_on_every_rank(mut communicator: Communicator) {
    // Of the same length in all, so that nothing but the counts disagrees.
    let counts = if communicator.rank() == 1 { [2, 4, 6] } else { [4, 4, 4] };
    let mine = vec![1u8; counts[communicator.rank()]];
    let (error, elapsed) = failing(|| communicator.all_gather_v(&mine, &mut [0; 12], &counts));
    let Error::Mismatch { calls, .. } = &error else { panic!("not a mismatch: {error}") };
    assert_ne!(calls[0].operation.kind, calls[1].operation.kind, "{error}");
    assert!(elapsed < AT_ONCE, "after {elapsed:?}");
    assert_stays(&mut communicator, &error);
}

fn a_call_too_many_is_a_mismatch_at_the_next_call(mut communicator: Communicator) {
    // The root of a small broadcast has sent all and gone on; the others are in a barrier. The root
    // learns at its next call.
    let (error, elapsed) = failing(|| {
        if communicator.rank() == 2 {
            communicator.broadcast(&mut [1u8], 2).and_then(|()| communicator.barrier())
        } else {
            communicator.barrier()
        }
    });
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    assert!(elapsed < AT_ONCE, "after {elapsed:?}");
}

fn a_rank_that_never_calls_is_named(mut communicator: Communicator) {
    let absent = communicator.world_size() - 1;
    communicator.barrier().expect("all ranks call it");
    if communicator.rank() == absent {
        // Long enough to be missed, then it learns what happened.
        std::thread::sleep(communicator.config().timeout * 4);
        let (error, _) = failing(|| communicator.all_reduce(&mut [1.0f32], ReduceOp::Sum));
        assert!(!matches!(error, Error::Mismatch { .. }), "{error}");
        return;
    }
    // One element: only its owner, rank 0, needs the absent rank; the others wait for rank 0 and must
    // not blame it.
    let (error, _) = failing(|| communicator.all_reduce(&mut [1.0f32], ReduceOp::Sum));
    let Error::TimedOut { waiting_for, elapsed, .. } = &error else { panic!("not a time-out: {error}") };
    assert_eq!(*waiting_for, [absent], "{error}");
    assert!(*elapsed >= communicator.config().timeout);
    assert_stays(&mut communicator, &error);
}

fn an_orderly_leave_is_not_a_loss(mut communicator: Communicator) {
    let last = communicator.world_size() - 1;
    if communicator.rank() == last {
        communicator.barrier().expect("who leaves after the barrier has done its part in it");
        communicator.leave().expect("leaving in order needs nobody's consent");
        return;
    }
    // A rank that is ahead fails in the all_reduce, and may end the barrier of one that is behind.
    let (error, _) = failing(|| {
        communicator.barrier()?;
        communicator.all_reduce(&mut [1.0f32; 100], ReduceOp::Sum)
    });
    assert!(matches!(error, Error::PeerLeft { rank, .. } if rank == last), "{error}");
    assert_stays(&mut communicator, &error);
}

fn what_was_sent_before_leaving_arrives(mut communicator: Communicator) {
    let len = 300_000;
    if communicator.rank() == 1 {
        communicator.send(&vec![7u8; len], 0).expect("rank 0 receives");
        communicator.leave().expect("leaving in order");
    } else if communicator.rank() == 0 {
        let mut message = vec![0u8; len];
        communicator.recv(&mut message, 1).expect("what was sent arrives");
        assert!(message.iter().all(|&byte| byte == 7));
        let (error, _) = failing(|| communicator.recv(&mut [0u8], 1));
        assert!(matches!(error, Error::PeerLeft { rank: 1, .. }), "{error}");
    } else {
        communicator.leave().expect("leaving in order");
    }
}

fn a_rank_that_drops_its_communicator_is_lost(mut communicator: Communicator) {
    let last = communicator.world_size() - 1;
    if communicator.rank() == last {
        return;
    }
    let (error, elapsed) = failing(|| communicator.all_reduce(&mut vec![1.0f32; 100_000], ReduceOp::Sum));
    assert!(matches!(error, Error::PeerLost { rank, .. } if rank == last), "{error}");
    assert!(error.to_string().contains("all_reduce #1"), "{error}");
    assert!(elapsed < AT_ONCE, "after {elapsed:?}");
    assert_stays(&mut communicator, &error);
}

/// Even and odd ranks, the highest first.
fn by_parity(communicator: &mut Communicator) -> (Communicator, Vec<usize>) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let color = (rank % 2) as u32;
    let split = communicator.split(Some(color), -(rank as i32)).expect("all ranks call it");
    let members: Vec<usize> = (0..world_size).rev().filter(|member| member % 2 == rank % 2).collect();
    (split.expect("it is a member"), members)
}

/// Sums and a broadcast among `members` of the world, of whom this is one.
fn check_group(group: &mut Communicator, members: &[usize], own: usize) {
    assert_eq!(group.world_size(), members.len());
    assert_eq!(members[group.rank()], own);
    for len in [1, 100] {
        let mut sums = vec![own as u64; len];
        group.all_reduce(&mut sums, ReduceOp::Sum).expect("all members call it");
        assert_eq!(sums, vec![members.iter().sum::<usize>() as u64; len]);
        let root = members.len() - 1;
        let mut buffer = vec![own as u64; len];
        group.broadcast(&mut buffer, root).expect("all members call it");
        assert_eq!(buffer, vec![members[root] as u64; len]);
    }
}

fn a_split_makes_groups_ordered_by_key(mut communicator: Communicator) {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let all: Vec<usize> = (0..world_size).collect();
    let (mut group, members) = by_parity(&mut communicator);
    check_group(&mut group, &members, rank);
    check_group(&mut communicator, &all, rank);
    group.leave().expect("all members leave");
    // The last rank is in no group; without it, the others are still in rank order.
    let color = (rank + 1 < world_size).then_some(7);
    let split = communicator.split(color, 0).expect("all ranks call it");
    assert_eq!(split.is_some(), color.is_some());
    if let Some(mut group) = split {
        check_group(&mut group, &all[..world_size - 1], rank);
        group.leave().expect("all members leave");
    }
    check_group(&mut communicator, &all, rank);
    communicator.leave().expect("all ranks leave");
}

fn groups_split_again_and_all_work_side_by_side(mut communicator: Communicator) {
    let rank = communicator.rank();
    let (mut pair, members) = by_parity(&mut communicator);
    let mut alone = pair.split(Some(pair.rank() as u32), 0).expect("all call it").expect("a member");
    let mut swapped = pair.split(Some(0), -(pair.rank() as i32)).expect("all call it").expect("a member");
    let reversed: Vec<usize> = members.iter().rev().copied().collect();
    for _ in 0..3 {
        check_group(&mut alone, &[rank], rank);
        check_group(&mut swapped, &reversed, rank);
        check_group(&mut pair, &members, rank);
        check_group(&mut communicator, &[0, 1, 2, 3], rank);
    }
    // Operations of several groups at the same time.
    let mine = vec![rank as u64; 1000];
    let of_pair = pair.all_reduce_start(mine.clone(), ReduceOp::Sum).expect("the call is right");
    let of_all = communicator.all_reduce_start(mine, ReduceOp::Sum).expect("the call is right");
    check_group(&mut swapped, &reversed, rank);
    let sum = members.iter().sum::<usize>() as u64;
    assert_eq!(of_pair.wait().expect("all members started it"), vec![sum; 1000]);
    assert_eq!(of_all.wait().expect("all ranks started it"), vec![6; 1000]);
    for group in [alone, swapped, pair, communicator] {
        group.leave().expect("all members leave");
    }
}

fn a_split_outlives_its_parent(mut communicator: Communicator) {
    let rank = communicator.rank();
    let (mut group, members) = by_parity(&mut communicator);
    communicator.leave().expect("all ranks leave");
    check_group(&mut group, &members, rank);
    group.leave().expect("all members leave");
}

fn a_group_that_fails_is_alone_with_it(mut communicator: Communicator) {
    let rank = communicator.rank();
    let (mut group, members) = by_parity(&mut communicator);
    match rank {
        3 => {
            // Both have their links then; the barrier of rank 1 may be cut short.
            group.barrier().expect("rank 1 calls it");
            drop(group);
        }
        1 => {
            let (error, elapsed) = failing(|| {
                group.barrier()?;
                group.all_reduce(&mut [1.0f32; 100], ReduceOp::Sum)
            });
            assert!(matches!(error, Error::PeerLost { rank: 0, .. }), "{error}");
            assert!(elapsed < AT_ONCE, "after {elapsed:?}");
            assert_stays(&mut group, &error);
        }
        _ => {
            check_group(&mut group, &members, rank);
            // Leaving is in order in a group too.
            if rank == 2 {
                group.leave().expect("leaving needs nobody's consent");
            } else {
                let (error, _) = failing(|| group.barrier());
                assert!(matches!(error, Error::PeerLeft { rank: 0, .. }), "{error}");
            }
        }
    }
    check_group(&mut communicator, &[0, 1, 2, 3], rank);
    communicator.leave().expect("all ranks leave");
}

fn a_split_hears_who_is_dead(mut communicator: Communicator) {
    let rank = communicator.rank();
    let (mut group, members) = by_parity(&mut communicator);
    let mut done = [0u8];
    match rank {
        3 => {
            communicator.send(&done, 1).expect("rank 1 receives");
            // Silent, as a killed process is.
            std::thread::sleep(AT_ONCE * 2);
        }
        1 => {
            // A failure ends whatever a rank is in: the others must be done with the split.
            for other in [0, 2, 3] {
                communicator.recv(&mut done, other).expect("they send");
            }
            // Said of the world, where it is rank 3; in the group of the odd ranks it is rank 0.
            communicator.interrupter().peer_lost(3, "was killed by signal 9 (SIGKILL)");
            let (error, elapsed) = failing(|| group.all_reduce(&mut [1.0f32; 100], ReduceOp::Sum));
            assert!(matches!(error, Error::PeerLost { rank: 0, .. }), "{error}");
            assert!(error.to_string().contains("SIGKILL"), "{error}");
            assert!(elapsed < AT_ONCE, "after {elapsed:?}");
        }
        _ => {
            check_group(&mut group, &members, rank);
            communicator.send(&done, 1).expect("rank 1 receives");
        }
    }
    let (error, _) = failing(|| communicator.barrier());
    match rank {
        3 => assert!(error.to_string().contains("gave this rank up"), "{error}"),
        _ => assert!(matches!(error, Error::PeerLost { rank: 3, .. }), "{error}"),
    }
}

fn an_interrupted_operation_ends_on_every_rank(mut communicator: Communicator) {
    if communicator.rank() == 1 {
        communicator.interrupter().interrupt("the owner has had enough");
    }
    let (error, elapsed) = failing(|| communicator.all_reduce(&mut [1.0f32; 100], ReduceOp::Sum));
    assert!(error.to_string().contains("the owner has had enough"), "{error}");
    assert!(elapsed < AT_ONCE, "after {elapsed:?}");
}

fn a_rank_that_is_said_to_be_dead_is_lost(mut communicator: Communicator) {
    let last = communicator.world_size() - 1;
    if communicator.rank() == last {
        // Silent, as a killed process is: it neither calls nor leaves until the others have given up.
        std::thread::sleep(AT_ONCE * 2);
        let (error, _) = failing(|| communicator.barrier());
        assert!(error.to_string().contains("gave this rank up"), "{error}");
        return;
    }
    let interrupter = communicator.interrupter();
    let rank = communicator.rank();
    let witness = std::thread::spawn(move || {
        if rank == 0 {
            interrupter.peer_lost(last, "was killed by signal 9 (SIGKILL)");
        }
    });
    let (error, elapsed) = failing(|| communicator.all_reduce(&mut vec![1.0f32; 100_000], ReduceOp::Sum));
    witness.join().expect("the witness does not panic");
    assert!(matches!(error, Error::PeerLost { rank, .. } if rank == last), "{error}");
    assert!(error.to_string().contains("SIGKILL"), "{error}");
    assert!(elapsed < AT_ONCE, "after {elapsed:?}");
}
