//! The behaviour list on shared memory: ranks are threads, whose handshake, segments and sockets are
//! those of processes. Once with all ranks on one host, once as if every two ranks were a host.

use std::thread;
use std::time::{Duration, Instant};

use paceline_collectives::Communicator;
use paceline_testing::ALL;
use paceline_transport::mem;
use paceline_transport::shm::{self, Sharing};

fn run(name: &str, sharing: Sharing) {
    let behaviour = ALL.iter().find(|behaviour| behaviour.name == name).expect("the name is in the list");
    for &world_size in behaviour.world_sizes {
        let ranks: Vec<_> = mem::group(world_size, 1, 64 * 1024)
            .into_iter()
            .enumerate()
            .map(|(rank, transport)| {
                let thread = thread::Builder::new().name(format!("rank {rank} of {world_size}"));
                let part = move || {
                    let deadline = Instant::now() + Duration::from_secs(60);
                    let links = shm::upgrade(Box::new(transport), sharing, deadline, &|| None);
                    let links = links.expect("threads are on one host");
                    assert!(world_size == 1 || links.segments().is_some(), "memory is shared");
                    let config = (behaviour.config)();
                    (behaviour.run)(Communicator::new(links, config).expect("the config is right"));
                };
                thread.spawn(part).expect("a thread can be started")
            })
            .collect();
        let failed: Vec<usize> = ranks
            .into_iter()
            .enumerate()
            .filter_map(|(rank, thread)| thread.join().is_err().then_some(rank))
            .collect();
        assert!(failed.is_empty(), "world {world_size}: ranks {failed:?} failed");
    }
}

macro_rules! on_shm {
    ($($name:ident)*) => {
        mod one_host {
            $(
                #[test]
                fn $name() {
                    super::run(stringify!($name), super::Sharing::Auto);
                }
            )*
        }

        mod hosts_of_two {
            $(
                #[test]
                fn $name() {
                    super::run(stringify!($name), super::Sharing::WithinBlocks(2));
                }
            )*
        }

        #[test]
        fn the_whole_list_runs_here() {
            let here = [$(stringify!($name)),*];
            let missing: Vec<_> = ALL.iter().map(|b| b.name).filter(|name| !here.contains(name)).collect();
            assert!(missing.is_empty(), "not run on shared memory: {missing:?}");
        }
    };
}

on_shm! {
    every_collective_is_right_for_every_dtype_and_op
    rings_are_right_too
    sums_have_the_fixed_order_to_the_bit
    sums_have_the_same_bits_whatever_the_segments
    long_messages_pass_in_both_directions_at_once
    messages_arrive_in_order_and_keep_their_place
    started_operations_run_in_order_and_give_their_buffers_back
    counts_that_disagree_are_the_same_error_on_every_rank
    a_wrong_call_has_no_effect
    another_collective_is_a_mismatch_on_every_rank
    other_arguments_are_a_mismatch_on_every_rank
    other_counts_are_a_mismatch_on_every_rank
    a_call_too_many_is_a_mismatch_at_the_next_call
    a_rank_that_never_calls_is_named
    an_orderly_leave_is_not_a_loss
    what_was_sent_before_leaving_arrives
    a_rank_that_drops_its_communicator_is_lost
    a_split_makes_groups_ordered_by_key
    groups_split_again_and_all_work_side_by_side
    a_split_outlives_its_parent
    a_group_that_fails_is_alone_with_it
    a_split_hears_who_is_dead
    an_interrupted_operation_ends_on_every_rank
    a_rank_that_is_said_to_be_dead_is_lost
}
