//! The behaviour list on QUIC, between real processes that the launcher has started.

mod job;

use job::{Job, trial};
use paceline_runtime::World;
use paceline_testing::{ALL, Behaviour};

fn main() {
    job::main(rank, || {
        let sizes =
            |behaviour: &'static Behaviour| behaviour.world_sizes.iter().map(move |&n| (behaviour, n));
        ALL.iter()
            .flat_map(sizes)
            .map(|(behaviour, ranks)| {
                trial(format!("{}::on_{ranks}_ranks", behaviour.name), move || {
                    Job::start(ranks, &["--grace", "1"], behaviour.name, &[]).finish().assert_success();
                })
            })
            .collect()
    });
}

fn rank(name: &str, _: &[String]) {
    let behaviour = ALL.iter().find(|behaviour| behaviour.name == name).expect("the name is in the list");
    let world = World::join_with((behaviour.config)()).expect("all ranks are started");
    let (communicator, _membership) = world.into_parts();
    (behaviour.run)(communicator);
}
