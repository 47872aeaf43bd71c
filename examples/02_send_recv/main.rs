//! A token goes around the ranks, and each adds its number.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use paceline_runtime::World;

fn main() -> anyhow::Result<()> {
    let mut world = World::join()?;
    let (rank, world_size) = (world.rank(), world.world_size());
    if world_size == 1 {
        println!("a token needs somebody to be passed to: paceline run -n 4 -- 02_send_recv");
        return Ok(world.leave()?);
    }

    let (left, right) = ((rank + world_size - 1) % world_size, (rank + 1) % world_size);
    let communicator = world.communicator();
    let mut token = [0u64];
    if rank == 0 {
        communicator.send(&token, right)?;
        communicator.recv(&mut token, left)?;
        println!("the token is back at rank 0 with {}", token[0]);
    } else {
        communicator.recv(&mut token, left)?;
        token[0] += rank as u64;
        println!("rank {rank} passes the token on with {}", token[0]);
        communicator.send(&token, right)?;
    }
    Ok(world.leave()?)
}
