//! The behaviour list on `mem`: ranks are threads, windows are tiny so that a schedule that sends
//! before it receives deadlocks here.

use libtest_mimic::{Arguments, Trial};
use paceline_testing::{ALL, Behaviour, threads};

/// Smaller than a frame's head, so that every partial send and receive happens.
const WINDOWS_BYTES: [usize; 2] = [13, 64 * 1024];

fn main() {
    let trials = ALL.iter().map(|behaviour| {
        Trial::test(behaviour.name, || {
            run(behaviour);
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

fn run(behaviour: &Behaviour) {
    for &world_size in behaviour.world_sizes {
        for &window_bytes in if behaviour.heavy { &WINDOWS_BYTES[1..] } else { &WINDOWS_BYTES[..] } {
            threads::run(behaviour, world_size, window_bytes, |transport| Box::new(transport));
        }
    }
}
