//! The behaviour list on shared memory: ranks are threads, whose handshake, segments and sockets are
//! those of processes. Once with all ranks on one host, once as if every two ranks were a host.

use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use paceline_testing::{ALL, Behaviour, threads};
use paceline_transport::shm::{self, Sharing};

const WINDOW_BYTES: usize = 64 * 1024;

fn main() {
    let layouts = [("one_host", Sharing::Auto), ("hosts_of_two", Sharing::WithinBlocks(2))];
    let trials = layouts.into_iter().flat_map(|(layout, sharing)| {
        ALL.iter().map(move |behaviour| {
            Trial::test(format!("{}::{layout}", behaviour.name), move || {
                run(behaviour, sharing);
                Ok(())
            })
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

fn run(behaviour: &Behaviour, sharing: Sharing) {
    for &world_size in behaviour.world_sizes {
        threads::run(behaviour, world_size, WINDOW_BYTES, move |transport| {
            let deadline = Instant::now() + Duration::from_secs(60);
            let links = shm::upgrade(Box::new(transport), sharing, deadline, &|| None);
            let links = links.expect("threads are on one host");
            assert!(world_size == 1 || links.segments().is_some(), "memory is shared");
            links
        });
    }
}
