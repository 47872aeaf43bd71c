//! A program with a communicator: turns of steps without and with saving.

use std::error::Error;
use std::time::{Duration, Instant};

use paceline_runtime::World;
use paceline_runtime::checkpoint::{self, Checkpointer, Group, Layout, Notes, Settings, Tensor, TensorMut};
use paceline_runtime::collectives::ReduceOp;

use super::{Adam, Task, compute, median};

/// How often the ranks change between saving and not saving.
const TURNS: usize = 6;

/// Checkpoints in one turn.
const CHECKPOINTS: u64 = 3;

/// Measures, and prints on rank 0.
pub fn measure(task: &Task) -> Result<(), Box<dyn Error>> {
    let every = task.every;
    let mut world = World::join()?;
    let mut training = Training::new(&mut world, task)?;
    let layout = Layout::of(&training.tensors())?;
    let group = Group::agree(world.communicator(), &layout)?;
    let mut checkpointer = Checkpointer::open(task.folder(), group, layout, Settings::default())?;
    let (mut without, mut with, mut stalls, mut took) = (vec![], vec![], vec![], vec![]);
    (0..every).try_for_each(|_| training.step(&mut world))?;
    for _ in 0..TURNS {
        let start = Instant::now();
        (0..CHECKPOINTS * every).try_for_each(|_| training.step(&mut world))?;
        without.push(start.elapsed() / CHECKPOINTS as u32);
        let start = Instant::now();
        for step in 0..CHECKPOINTS * every {
            training.step(&mut world)?;
            if step % every == 0 {
                stalls.extend(training.save(&mut world, &mut checkpointer)?);
            }
        }
        with.push(start.elapsed() / CHECKPOINTS as u32);
        checkpointer.wait()?;
        world.communicator().barrier()?;
        took.extend(
            checkpointer.outcome().filter(|outcome| outcome.result.is_ok()).map(|outcome| outcome.took),
        );
    }
    let (saved_step, saved) = (training.step, training.adam.digest());
    let stable = checkpointer.agree(world.communicator(), saved_step)?.ok_or("nobody writes any more")?;
    checkpointer.save(stable, &training.tensors(), Notes::default())?;
    checkpointer.finish()?;
    world.communicator().barrier()?;
    training.adam.weights.fill(f32::NAN);
    let resumed = checkpoint::resume(world.communicator(), task.folder(), &mut training.tensors_mut())?;
    if world.rank() == 0 {
        task.print(world.world_size(), &mut without, &mut with);
        println!(
            "{} of {} checkpoints; a save holds the training up for {:.2} ms and is done after {:.0} ms",
            stalls.len(),
            TURNS as u64 * CHECKPOINTS,
            median(&mut stalls),
            median(&mut took)
        );
    }
    if (resumed.map(|it| it.step), training.adam.digest()) != (Some(saved_step), saved) {
        return Err("what was loaded is not what was saved".into());
    }
    world.leave()?;
    Ok(())
}

struct Training {
    step: u64,
    adam: Adam,
    gradient: Vec<f32>,
    shape: [usize; 1],
    passes: u64,
}

impl Training {
    fn new(world: &mut World, task: &Task) -> Result<Self, Box<dyn Error>> {
        let mut passes = [task.passes()];
        world.communicator().broadcast(&mut passes, 0)?;
        let (len, [passes]) = (task.len(), passes);
        Ok(Self { step: 0, adam: Adam::new(len), gradient: vec![0.0; len], shape: [len], passes })
    }

    fn step(&mut self, world: &mut World) -> Result<(), Box<dyn Error>> {
        self.step += 1;
        compute(self.step, self.passes, &mut self.gradient);
        world.communicator().all_reduce(&mut self.gradient, ReduceOp::Avg)?;
        self.adam.apply(&self.gradient);
        Ok(())
    }

    /// How long it took, if it was not skipped.
    fn save(
        &mut self,
        world: &mut World,
        checkpointer: &mut Checkpointer,
    ) -> Result<Option<Duration>, Box<dyn Error>> {
        let start = Instant::now();
        let Some(stable) = checkpointer.agree(world.communicator(), self.step)? else { return Ok(None) };
        checkpointer.save(stable, &self.tensors(), Notes::default())?;
        Ok(Some(start.elapsed()))
    }

    fn tensors(&self) -> [Tensor<'_>; 3] {
        [
            Tensor::new("weights", &self.shape, &self.adam.weights),
            Tensor::new("first", &self.shape, &self.adam.first),
            Tensor::new("second", &self.shape, &self.adam.second),
        ]
    }

    fn tensors_mut(&mut self) -> [TensorMut<'_>; 3] {
        [
            TensorMut::new("weights", &self.shape, &mut self.adam.weights),
            TensorMut::new("first", &self.shape, &mut self.adam.first),
            TensorMut::new("second", &self.shape, &mut self.adam.second),
        ]
    }
}
