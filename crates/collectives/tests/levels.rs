//! Hosts of several ranks: what crosses between them, and that the bits do not depend on the layout.
//!
//! Ranks are threads; blocks of them pretend to be hosts.

use std::thread;
use std::time::{Duration, Instant};

use paceline_collectives::dtype::{Element, bf16};
use paceline_collectives::{Algorithm, Communicator, Config, DType, Kind, Order, ReduceOp, Statistics};
use paceline_transport::mem;
use paceline_transport::shm::{self, Sharing};

/// Runs `part` on every rank of a group and returns what it gives, by rank.
fn on_ranks<R: Send + 'static>(
    world_size: usize,
    sharing: Sharing,
    config: &Config,
    part: impl Fn(&mut Communicator) -> R + Clone + Send + 'static,
) -> Vec<R> {
    let ranks: Vec<_> = mem::group(world_size, 1, 64 * 1024)
        .into_iter()
        .map(|links| {
            let (config, part) = (config.clone(), part.clone());
            thread::spawn(move || {
                let deadline = Instant::now() + Duration::from_secs(60);
                let links = shm::upgrade(Box::new(links), sharing, deadline, &|| None).expect("all come");
                let mut communicator = Communicator::new(links, config).expect("the config is right");
                let result = part(&mut communicator);
                communicator.leave().expect("all leave");
                result
            })
        })
        .collect();
    ranks.into_iter().map(|rank| rank.join().expect("no rank fails")).collect()
}

/// Numbers whose sums depend on the order.
fn element(rank: usize, index: usize) -> f64 {
    let mixed = ((rank * 7919 + index) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed >> 40) as f64 - 8_000_000.0) * 10f64.powi((mixed % 7) as i32 - 3)
}

/// The results of all_reduces of many lengths, in place and not, with every operator, as bytes.
fn all_results<T: Element + From<f32>>(communicator: &mut Communicator) -> Vec<u8> {
    let mut bytes = Vec::new();
    for len in [0usize, 1, 3, 4096, 4097, 5000, 40_001] {
        let input: Vec<T> =
            (0..len).map(|index| T::from(element(communicator.rank(), index) as f32)).collect();
        for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Prod, ReduceOp::Min, ReduceOp::Max] {
            let mut output = vec![T::from(0.0); len];
            communicator.all_reduce_into(&input, &mut output, op).expect("all ranks call");
            let mut in_place = input.clone();
            communicator.all_reduce(&mut in_place, op).expect("all ranks call");
            assert_eq!(bytes_of(&output), bytes_of(&in_place), "{len} {op:?}: in place or not");
            bytes.extend_from_slice(bytes_of(&output));
        }
    }
    bytes
}

fn bytes_of<T: Element>(elements: &[T]) -> &[u8] {
    bytemuck::cast_slice(elements)
}

fn assert_bits_do_not_depend_on_hosts<T: Element + From<f32>>() {
    for (world_size, block) in [(4, 2), (6, 2), (8, 4), (8, 2), (6, 3), (5, 2)] {
        let config = Config::default();
        let flat = on_ranks(world_size, Sharing::Off, &config, all_results::<T>);
        assert!(flat.iter().all(|bits| *bits == flat[0]), "all ranks have the same bits");
        let levels = on_ranks(world_size, Sharing::WithinBlocks(block), &config, all_results::<T>);
        for (rank, bits) in levels.iter().enumerate() {
            assert!(*bits == flat[0], "{world_size} ranks, hosts of {block}: rank {rank} has other bits");
        }
    }
}

#[test]
fn sums_of_f32_have_the_same_bits_whatever_the_hosts() {
    assert_bits_do_not_depend_on_hosts::<f32>();
}

#[test]
fn sums_of_f64_have_the_same_bits_whatever_the_hosts() {
    assert_bits_do_not_depend_on_hosts::<f64>();
}

#[test]
fn integers_and_16_bit_floats_have_the_same_bits_whatever_the_hosts() {
    let part = |communicator: &mut Communicator| {
        let rank = communicator.rank();
        let mut all = Vec::new();
        // The last one is longer than what is in f32 at a time.
        for len in [0usize, 1, 7, 20_000, (1 << 20) + 77] {
            let mut wrapping: Vec<i32> = (0..len).map(|i| (element(rank, i) as i64 * 77) as i32).collect();
            let mut mean = wrapping.clone();
            let halves: Vec<bf16> = (0..len).map(|i| bf16::from_f64(element(rank, i))).collect();
            for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max] {
                let (mut apart, mut in_place) = (vec![bf16::ZERO; len], halves.clone());
                communicator.all_reduce_into(&halves, &mut apart, op).expect("all ranks call");
                communicator.all_reduce(&mut in_place, op).expect("all ranks call");
                assert!(bytes_of(&apart) == bytes_of(&in_place), "{len} {op:?}: in place or not");
                all.extend_from_slice(bytes_of(&apart));
            }
            communicator.all_reduce(&mut wrapping, ReduceOp::Sum).expect("all ranks call");
            communicator.all_reduce(&mut mean, ReduceOp::Avg).expect("all ranks call");
            all.extend([bytes_of(&wrapping), bytes_of(&mean)].concat());
        }
        all
    };
    let config = Config::default();
    let flat = on_ranks(4, Sharing::Off, &config, part);
    let levels = on_ranks(4, Sharing::WithinBlocks(2), &config, part);
    assert!(flat == levels, "the same bits on the same ranks");
    let flat = on_ranks(6, Sharing::Off, &config, part);
    let levels = on_ranks(6, Sharing::WithinBlocks(2), &config, part);
    assert!(flat == levels, "the same bits on three hosts");
}

/// What all ranks together have sent to other hosts in one all_reduce of `len` f32.
fn bytes_between_hosts(sharing: Sharing, algorithm: Algorithm, len: usize) -> u64 {
    let mut config = Config::default();
    config.algorithm = algorithm;
    let sent = on_ranks(4, sharing, &config, move |communicator| {
        let before = communicator.statistics();
        let mut buffer = vec![communicator.rank() as f32; len];
        communicator.all_reduce(&mut buffer, ReduceOp::Sum).expect("all ranks call");
        assert!(buffer.iter().all(|&element| element == 6.0));
        let Statistics { network_sent_bytes, .. } = communicator.statistics();
        network_sent_bytes - before.network_sent_bytes
    });
    sent.iter().sum()
}

#[test]
fn two_hosts_of_two_send_half_of_what_a_direct_exchange_among_all_ranks_sends() {
    const LEN: usize = 1 << 20;
    let whole = (LEN * size_of::<f32>()) as f64;
    // Without shared memory every peer is in the network; two of three are on the other host.
    let flat = bytes_between_hosts(Sharing::Off, Algorithm::Direct, LEN) as f64 * 2.0 / 3.0;
    assert!((flat / whole - 4.0).abs() < 0.01, "the direct exchange sends 4 S: {}", flat / whole);
    let levels = bytes_between_hosts(Sharing::WithinBlocks(2), Algorithm::Auto, LEN) as f64;
    assert!(levels / whole <= 4.0 * (0.5 + 0.02), "{} S between the hosts", levels / whole);
    assert!(levels / whole <= 3.0 * (2.0 / 3.0 + 0.02), "{} S between the hosts", levels / whole);
    assert!(levels / whole >= 2.0, "no way sends less than 2 S: the counter counts too little");
}

/// The results of reduce_scatters of short and long, even and uneven shares, as bytes; the last shares are
/// longer than what is summed at a time.
fn all_scattered<T: Element>(communicator: &mut Communicator, number: fn(f64) -> T) -> Vec<u8> {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let mut all = Vec::new();
    let of_rank = |len: usize| -> Vec<T> { (0..len).map(|i| number(element(rank, i))).collect() };
    for share in [0usize, 1, 5, 3000, (1 << 18) + 3] {
        let input = of_rank(share * world_size);
        for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max] {
            let mut output = vec![number(0.0); share];
            communicator.reduce_scatter(&input, &mut output, op).expect("all ranks call");
            let mut in_place = input.clone();
            communicator.reduce_scatter_in_place(&mut in_place, op).expect("all ranks call");
            let own = rank * share..(rank + 1) * share;
            assert!(bytes_of(&output) == bytes_of(&in_place[own.clone()]), "{share} {op:?}: in place or not");
            assert!(
                bytes_of(&input[..own.start]) == bytes_of(&in_place[..own.start]),
                "others are left alone"
            );
            assert!(bytes_of(&input[own.end..]) == bytes_of(&in_place[own.end..]), "others are left alone");
            all.extend_from_slice(bytes_of(&output));
        }
        let counts: Vec<usize> = (0..world_size).map(|rank| rank * 37 % 5 * share / 2).collect();
        let input = of_rank(counts.iter().sum());
        let mut output = vec![number(0.0); counts[rank]];
        communicator.reduce_scatter_v(&input, &mut output, &counts, ReduceOp::Sum).expect("all ranks call");
        all.extend_from_slice(bytes_of(&output));
    }
    all
}

#[test]
fn scattered_sums_have_the_same_bits_whatever_the_hosts() {
    for (world_size, block) in [(4, 2), (6, 2), (8, 4)] {
        let config = Config::default();
        let layouts = [Sharing::Off, Sharing::WithinBlocks(block)];
        let singles = |communicator: &mut Communicator| all_scattered(communicator, |number| number as f32);
        let [flat, levels] = layouts.map(|sharing| on_ranks(world_size, sharing, &config, singles));
        assert!(flat == levels, "f32, {world_size} ranks by {block}");
        let halves = |communicator: &mut Communicator| all_scattered(communicator, bf16::from_f64);
        let [flat, levels] = layouts.map(|sharing| on_ranks(world_size, sharing, &config, halves));
        assert!(flat == levels, "bf16, {world_size} ranks by {block}");
    }
}

#[test]
fn a_reduce_scatter_sends_partial_sums_of_a_host_once() {
    const LEN: usize = 1 << 18;
    let sent = sent_between_hosts(|communicator| {
        let mut output = vec![0i32; LEN];
        communicator
            .reduce_scatter(&vec![1i32; 4 * LEN], &mut output, ReduceOp::Sum)
            .expect("all ranks call");
        assert!(output.iter().all(|&sum| sum == 4));
    });
    assert!(sent.iter().all(|&sent| is_about(sent, LEN * size_of::<i32>())), "{sent:?}");
}

/// Broadcasts from every root and all_gathers of every kind, of short and long buffers, as bytes.
fn all_copies(communicator: &mut Communicator) -> Vec<u8> {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let mut all = Vec::new();
    for len in [0usize, 1, 5, 1000, 100_003] {
        for root in 0..world_size {
            let mut buffer: Vec<i32> = (0..len).map(|i| (rank * 1_000_000 + i) as i32).collect();
            communicator.broadcast(&mut buffer, root).expect("all ranks call");
            let expected = (0..len).map(|i| (root * 1_000_000 + i) as i32);
            assert!(buffer.into_iter().eq(expected), "{len} elements from {root}");
        }
        let share = len / 4;
        let input: Vec<u16> = (0..share).map(|i| (rank * 7 + i) as u16).collect();
        let input: Vec<bf16> = input.into_iter().map(bf16::from_bits).collect();
        let mut output = vec![bf16::ZERO; share * world_size];
        communicator.all_gather(&input, &mut output).expect("all ranks call");
        let mut in_place = vec![bf16::ZERO; share * world_size];
        in_place[rank * share..][..share].copy_from_slice(&input);
        communicator.all_gather_in_place(&mut in_place).expect("all ranks call");
        assert!(bytes_of(&output) == bytes_of(&in_place), "{share}: in place or not");
        let counts: Vec<usize> = (0..world_size).map(|rank| rank * 37 % 5 * len / 8).collect();
        let input: Vec<u8> = (0..counts[rank]).map(|i| (rank * 31 + i) as u8).collect();
        let mut uneven = vec![0u8; counts.iter().sum()];
        communicator.all_gather_v(&input, &mut uneven, &counts).expect("all ranks call");
        let expected = (0..world_size).flat_map(|rank| (0..counts[rank]).map(move |i| (rank * 31 + i) as u8));
        assert!(uneven.iter().copied().eq(expected), "shares of {counts:?}");
        all.extend([bytes_of(&output), bytes_of(&uneven)].concat());
    }
    all
}

#[test]
fn copies_are_right_whatever_the_hosts() {
    for (world_size, block) in [(4, 2), (6, 2), (8, 4), (6, 3)] {
        let config = Config::default();
        let flat = on_ranks(world_size, Sharing::Off, &config, all_copies);
        let levels = on_ranks(world_size, Sharing::WithinBlocks(block), &config, all_copies);
        assert!(flat.iter().chain(&levels).all(|bits| *bits == flat[0]), "{world_size} ranks by {block}");
    }
}

/// What each rank of two hosts of two sends to the other host in `call`.
fn sent_between_hosts(call: impl Fn(&mut Communicator) + Clone + Send + 'static) -> Vec<u64> {
    on_ranks(4, Sharing::WithinBlocks(2), &Config::default(), move |communicator| {
        let before = communicator.statistics().network_sent_bytes;
        call(communicator);
        communicator.statistics().network_sent_bytes - before
    })
}

/// Frames' heads, in proportion to long messages.
fn is_about(sent: u64, bytes: usize) -> bool {
    (bytes as f64..=bytes as f64 * 1.01).contains(&(sent as f64))
}

#[test]
fn a_broadcast_crosses_to_each_host_once_and_in_slices_when_it_is_long() {
    const LEN: usize = 1 << 20;
    for root in 0..4 {
        let long = sent_between_hosts(move |communicator| {
            communicator.broadcast(&mut vec![1u8; LEN], root).expect("all ranks call");
        });
        let slices = |rank: usize| if rank / 2 == root / 2 { LEN / 2 } else { 0 };
        assert!((0..4).all(|rank| is_about(long[rank], slices(rank))), "{long:?}");
        let short = sent_between_hosts(move |communicator| {
            communicator.broadcast(&mut [1u8; 100], root).expect("all ranks call");
        });
        assert!((0..4).all(|rank| (short[rank] >= 100) == (rank == root)), "{short:?}");
        assert!(short.iter().sum::<u64>() < 200, "{short:?}");
    }
}

#[test]
fn shares_of_an_all_gather_cross_to_each_host_once() {
    const LEN: usize = 1 << 18;
    let sent = sent_between_hosts(|communicator| {
        communicator.all_gather(&vec![1u8; LEN], &mut vec![0; 4 * LEN]).expect("all ranks call");
    });
    assert!(sent.iter().all(|&sent| is_about(sent, LEN)), "{sent:?}");
}

#[test]
fn ranks_of_a_barrier_send_one_message_for_each_doubling_of_the_hosts() {
    let sent = sent_between_hosts(|communicator| communicator.barrier().expect("all ranks call"));
    assert!(sent.iter().all(|&bytes| bytes == sent[0] && (1..=64).contains(&bytes)), "{sent:?}");
}

#[test]
fn nobody_leaves_a_barrier_of_several_hosts_before_everybody_has_entered() {
    let entered = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    on_ranks(6, Sharing::WithinBlocks(2), &Config::default(), move |communicator| {
        use std::sync::atomic::Ordering::SeqCst;
        for turn in 1..=200 {
            entered.fetch_add(1, SeqCst);
            communicator.barrier().expect("all ranks call");
            assert!(entered.load(SeqCst) >= turn * 6, "turn {turn}");
            // So that nobody enters the next while others still look.
            communicator.barrier().expect("all ranks call");
        }
    });
}

#[test]
fn after_a_probe_all_ranks_go_the_same_way() {
    for (world_size, sharing) in [(2, Sharing::Off), (5, Sharing::Off), (4, Sharing::WithinBlocks(2))] {
        let schedules = on_ranks(world_size, sharing, &Config::default(), |communicator| {
            communicator.tune().expect("all ranks call");
            assert_eq!(communicator.statistics(), Statistics::default());
            let explained: Vec<(String, String)> = [8usize, 100_000, 100_000_000]
                .into_iter()
                .flat_map(|count| {
                    [Kind::AllReduce(ReduceOp::Sum), Kind::Broadcast { root: 0 }].map(|kind| (kind, count))
                })
                .map(|(kind, count)| communicator.explain(kind, DType::F32, count).expect("there is a way"))
                .collect();
            let mut buffer = vec![1.0f32; 1000];
            communicator.all_reduce(&mut buffer, ReduceOp::Sum).expect("all ranks call");
            communicator.broadcast(&mut buffer, communicator.world_size() - 1).expect("all ranks call");
            assert_eq!(buffer, vec![communicator.world_size() as f32; 1000]);
            explained
        });
        assert!(schedules.iter().all(|theirs| *theirs == schedules[0]), "{schedules:?}");
        assert!(
            schedules[0].iter().any(|(_, why)| why.contains("measured at the start")),
            "{:?}",
            schedules[0]
        );
    }
}

#[test]
fn a_rank_that_comes_late_is_the_one_that_was_waited_for() {
    let waits = on_ranks(3, Sharing::Off, &Config::default(), |communicator| {
        communicator.barrier().expect("all ranks call");
        if communicator.rank() == 1 {
            thread::sleep(Duration::from_millis(300));
        }
        let mut buffer = vec![1u8; 10];
        communicator.all_reduce(&mut buffer, ReduceOp::Max).expect("all ranks call");
        communicator.waits()
    });
    for rank in [0, 2] {
        let latest = (0..3).max_by_key(|&other| waits[rank][other]);
        assert_eq!(latest, Some(1), "{waits:?}");
        assert!(waits[rank][1] >= Duration::from_millis(200), "{waits:?}");
    }
}

#[test]
fn a_ring_in_the_order_of_measured_links_has_the_same_sums_on_all_ranks() {
    let mut config = Config::default();
    config.algorithm = Algorithm::Ring;
    config.order = Order::Any;
    let sums = on_ranks(5, Sharing::Off, &config, |communicator| {
        communicator.tune().expect("all ranks call");
        let mut buffer: Vec<f32> = (0..10_001).map(|index| (communicator.rank() * index) as f32).collect();
        communicator.all_reduce(&mut buffer, ReduceOp::Sum).expect("all ranks call");
        buffer
    });
    let expected: Vec<f32> = (0..10_001).map(|index| (10 * index) as f32).collect();
    assert!(sums.iter().all(|sum| *sum == expected));
}
