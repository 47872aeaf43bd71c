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
