//! Who asks for it hears of each round of a collective.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use paceline_collectives::{Communicator, Config, Error, ReduceOp};
use paceline_transport::shm::{self, Sharing};
use paceline_transport::{Transport, mem};

/// Elements of f64 in a segment.
const SEGMENT: usize = 8;

/// The rounds that each of two ranks hears of in an all_reduce of so many elements.
fn heard(len: usize) -> Vec<Vec<usize>> {
    let members = mem::group(2, 1, mem::DEFAULT_WINDOW_BYTES);
    let threads: Vec<_> = members
        .into_iter()
        .map(|transport| {
            thread::spawn(move || {
                let mut config = Config::default();
                config.segment_bytes = 8 * SEGMENT;
                let mut communicator = Communicator::new(Box::new(transport), config)?;
                let heard = Arc::new(Mutex::new(Vec::new()));
                let hears = heard.clone();
                communicator.on_round(move |round| hears.lock().expect("nobody panics").push(round));
                let mut buffer = vec![1.5f64; len];
                communicator.all_reduce(&mut buffer, ReduceOp::Sum)?;
                assert!(buffer.iter().all(|&sum| sum == 3.0));
                let rounds = heard.lock().expect("nobody panics").clone();
                communicator.leave()?;
                Ok::<_, Error>(rounds)
            })
        })
        .collect();
    threads.into_iter().map(|t| t.join().expect("no panic").expect("nobody is lost")).collect()
}

#[test]
fn a_long_sum_has_at_least_a_round_for_each_segment_of_a_share_and_they_come_in_order() {
    // Each of two ranks owns five segments.
    for rounds in heard(2 * 5 * SEGMENT) {
        assert!(rounds.len() >= 5 && rounds.iter().copied().eq(0..rounds.len()), "{rounds:?}");
    }
}

/// How the all_reduce of so many elements ends at two ranks, of which one ends it in its third round, though nobody is
/// waited for, and the last round of which that one hears.
fn interrupted(len: usize, sharing: Sharing) -> (Vec<Result<(), Error>>, usize) {
    let last = Arc::new(Mutex::new(0));
    let threads: Vec<_> = mem::group(2, 1, mem::DEFAULT_WINDOW_BYTES)
        .into_iter()
        .map(|transport| {
            let last = last.clone();
            thread::spawn(move || {
                let deadline = Instant::now() + Duration::from_secs(60);
                let is_first = transport.rank() == 0;
                let transport =
                    shm::upgrade(Box::new(transport), sharing, deadline, &|| None).expect("links");
                let mut config = Config::default();
                config.segment_bytes = 8 * SEGMENT;
                let mut communicator = Communicator::new(transport, config)?;
                let interrupter = communicator.interrupter();
                if is_first {
                    communicator.on_round(move |round| {
                        *last.lock().expect("nobody panics") = round;
                        if round == 2 {
                            interrupter.interrupt("enough");
                        }
                    });
                }
                communicator.all_reduce(&mut vec![1.5f64; len], ReduceOp::Sum)
            })
        })
        .collect();
    let ends = threads.into_iter().map(|t| t.join().expect("no panic")).collect();
    let last = *last.lock().expect("nobody panics");
    (ends, last)
}

#[test]
fn a_long_sum_that_is_interrupted_ends_before_its_next_round_on_all_ranks() {
    // 16 MiB take many blocks of shared memory.
    for (len, sharing) in [(2 * 5 * SEGMENT, Sharing::Off), (2 << 20, Sharing::Auto)] {
        let (ends, last) = interrupted(len, sharing);
        assert!(matches!(&ends[0], Err(Error::Interrupted { reason, .. }) if reason == "enough"), "{ends:?}");
        assert!(matches!(&ends[1], Err(Error::Interrupted { .. })), "{ends:?}");
        assert_eq!(last, 2, "{sharing:?}");
    }
}
