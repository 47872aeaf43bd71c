//! The behaviour list between real processes that the launcher has started: on QUIC, on TLS, on memory that
//! they share, and on memory and whichever of both rank 0 chooses, as if every two ranks were a host.

mod job;

use job::{Job, trial};
use paceline_runtime::World;
use paceline_runtime::env::{self, JobEnv};
use paceline_testing::{ALL, Behaviour};
use paceline_transport::Fabric;
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

const LINKS: [&str; 4] = ["quic", "tls", "shm", "both"];

fn rank(name: &str, args: &[String]) {
    let behaviour = ALL.iter().find(|behaviour| behaviour.name == name).expect("the name is in the list");
    let env = JobEnv::from_vars(env::process).expect("the launcher knows").expect("there is a launcher");
    let (sharing, fabric) = match args[0].as_str() {
        "quic" => (Sharing::Off, Fabric::Quic),
        "tls" => (Sharing::Off, Fabric::Tls),
        "both" => (Sharing::WithinBlocks(2), Fabric::Auto),
        _ => (Sharing::Auto, Fabric::Auto),
    };
    let world = World::join_job(&env, (behaviour.config)(), sharing, fabric).expect("all ranks are started");
    assert!(args[0] == "both" || world.links() == args[0] || env.world_size == 1, "{}", world.links());
    let (communicator, _membership) = world.into_parts();
    (behaviour.run)(communicator);
}
