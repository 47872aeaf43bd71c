//! The behaviour list between real processes that the launcher has started: on QUIC, on memory that they
//! share, and on both, as if every two ranks were a host.

mod job;

use job::{Job, trial};
use paceline_runtime::World;
use paceline_runtime::env::{self, JobEnv};
use paceline_testing::{ALL, Behaviour};
use paceline_transport::shm::Sharing;

fn main() {
    job::main(rank, || {
        let sizes =
            |behaviour: &'static Behaviour| behaviour.world_sizes.iter().map(move |&n| (behaviour, n));
        ALL.iter()
            .flat_map(sizes)
            .flat_map(|(behaviour, ranks)| LINKS.map(|links| (behaviour, ranks, links)))
            .filter(|&(_, ranks, links)| links != "both" || ranks > 2)
            .map(|(behaviour, ranks, links)| {
                trial(format!("{}::on_{ranks}_ranks_over_{links}", behaviour.name), move || {
                    Job::start(ranks, &["--grace", "1"], behaviour.name, &[links]).finish().assert_success();
                })
            })
            .collect()
    });
}

const LINKS: [&str; 3] = ["quic", "shm", "both"];

fn rank(name: &str, args: &[String]) {
    let behaviour = ALL.iter().find(|behaviour| behaviour.name == name).expect("the name is in the list");
    let env = JobEnv::from_vars(env::process).expect("the launcher knows").expect("there is a launcher");
    let sharing = match args[0].as_str() {
        "quic" => Sharing::Off,
        "both" => Sharing::WithinBlocks(2),
        _ => Sharing::Auto,
    };
    let world = World::join_job(&env, (behaviour.config)(), sharing).expect("all ranks are started");
    let (communicator, _membership) = world.into_parts();
    (behaviour.run)(communicator);
}
