//! Who asks for it hears of each round of a collective.

use std::sync::{Arc, Mutex};
use std::thread;

use paceline_collectives::{Communicator, Config, Error, ReduceOp};
use paceline_transport::mem;

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
