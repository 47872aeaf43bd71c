//! The list between threads of one process, whatever their links are made into.

use std::thread;

use paceline_collectives::Communicator;
use paceline_transport::Transport;
use paceline_transport::mem::{self, MemTransport};

use crate::Behaviour;

/// Runs a behaviour on `world_size` threads, whose links have windows of `window_bytes`; `links` makes of each
/// what the rank uses.
///
/// # Panics
/// If a rank does, with the numbers of those that did.
pub fn run(
    behaviour: &Behaviour,
    world_size: usize,
    window_bytes: usize,
    links: impl Fn(MemTransport) -> Box<dyn Transport> + Copy + Send + 'static,
) {
    let (config, part) = (behaviour.config, behaviour.run);
    let start = |(rank, transport)| {
        let thread = thread::Builder::new().name(format!("rank {rank} of {world_size}"));
        let run = move || part(Communicator::new(links(transport), config()).expect("the config is right"));
        thread.spawn(run).expect("a thread can be started")
    };
    let ranks: Vec<_> = mem::group(world_size, 1, window_bytes).into_iter().enumerate().map(start).collect();
    let joined = ranks.into_iter().enumerate();
    let failed: Vec<usize> = joined.filter_map(|(rank, it)| it.join().is_err().then_some(rank)).collect();
    assert!(failed.is_empty(), "ranks {failed:?} of {world_size} failed");
}
