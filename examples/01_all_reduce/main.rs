//! Every rank contributes a vector; every rank gets the sum.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;

fn main() -> anyhow::Result<()> {
    let mut world = World::join()?;
    let rank = world.rank();

    let mut vector = vec![(rank + 1) as f32; 4];
    world.communicator().all_reduce(&mut vector, ReduceOp::Sum)?;
    println!("rank {rank} of {} has {vector:?}", world.world_size());

    Ok(world.leave()?)
}
