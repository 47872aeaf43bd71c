//! What saving costs the training: the ranks of a job make the same steps with and without checkpoints, by turns.
//!
//! `paceline run -n 4 -- checkpoint FOLDER [MEGABYTES [EVERY [STEP_MS]]]`: gradients of so many megabytes (25), with
//! Adam's moments three times that as state, saved every so many steps (20), each of which computes for so many
//! milliseconds on an idle processor (100). What was saved last is loaded again and compared.
#![allow(clippy::print_stdout, reason = "a command line tool talks to its terminal")]

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use paceline_runtime::World;
use paceline_runtime::checkpoint::{self, Checkpointer, Group, Layout, Notes, Settings, Tensor, TensorMut};
use paceline_runtime::collectives::ReduceOp;
use paceline_runtime::digest::Digest;

/// How often the ranks change between saving and not saving.
const TURNS: usize = 6;

/// Checkpoints in one turn.
const CHECKPOINTS: u64 = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| words.get(at).map_or(Ok(default), |word| word.parse());
    let folder = Path::new(words.first().ok_or("usage: checkpoint FOLDER [MEGABYTES [EVERY [STEP_MS]]]")?);
    let (megabytes, every, step_ms) = (number(1, 25)?, number(2, 20)?, number(3, 100)?);
    let mut world = World::join()?;
    let mut training = Training::new(&mut world, megabytes as usize * 1_000_000 / 4, step_ms)?;
    let layout = Layout::of(&training.tensors())?;
    let group = Group::agree(world.communicator(), &layout)?;
    let mut checkpointer = Checkpointer::open(folder, group, layout, Settings::default())?;
    let (mut without, mut with, mut stalls, mut took) = (vec![], vec![], vec![], vec![]);
    (0..every).try_for_each(|_| training.step(&mut world))?;
    for _ in 0..TURNS {
        let start = Instant::now();
        (0..CHECKPOINTS * every).try_for_each(|_| training.step(&mut world))?;
        without.push(start.elapsed());
        let start = Instant::now();
        for step in 0..CHECKPOINTS * every {
            training.step(&mut world)?;
            if step % every == 0 {
                stalls.extend(training.save(&mut world, &mut checkpointer)?);
            }
        }
        with.push(start.elapsed());
        checkpointer.wait()?;
        world.communicator().barrier()?;
        took.extend(
            checkpointer.outcome().filter(|outcome| outcome.result.is_ok()).map(|outcome| outcome.took),
        );
    }
    let (saved_step, saved) = (training.step, training.digest());
    let stable = checkpointer.agree(world.communicator(), saved_step)?.ok_or("nobody writes any more")?;
    checkpointer.save(stable, &training.tensors(), Notes::default())?;
    checkpointer.finish()?;
    world.communicator().barrier()?;
    training.weights.fill(f32::NAN);
    let step =
        checkpoint::resume(world.communicator(), folder, &mut training.tensors_mut())?.map(|it| it.step);
    if world.rank() == 0 {
        let steps = (CHECKPOINTS * every) as f64;
        let (without, with) = (median(&mut without) / steps, median(&mut with) / steps);
        let share = 100.0 * (with - without) / without;
        println!("state {} MB over {} ranks, saved every {every} steps", 3 * megabytes, world.world_size());
        println!("step without saving {without:.2} ms, with {with:.2} ms: {share:+.2} %");
        println!(
            "{} of {} checkpoints; a save holds the training up for {:.2} ms and is done after {:.0} ms",
            stalls.len(),
            TURNS as u64 * CHECKPOINTS,
            median(&mut stalls),
            median(&mut took)
        );
    }
    if (step, training.digest()) != (Some(saved_step), saved) {
        return Err("what was loaded is not what was saved".into());
    }
    world.leave()?;
    Ok(())
}

/// In milliseconds.
fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}

/// Adam without a model.
struct Training {
    step: u64,
    weights: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    gradient: Vec<f32>,
    shape: [usize; 1],
    /// How many passes over a small buffer take as long as a step is to compute.
    passes: u64,
}

impl Training {
    fn new(world: &mut World, len: usize, step_ms: u64) -> Result<Self, Box<dyn Error>> {
        let start = Instant::now();
        (0..1_000).for_each(|_| pass());
        let mut passes = [step_ms * 1_000_000 * 1_000 / start.elapsed().as_nanos().max(1) as u64];
        world.communicator().broadcast(&mut passes, 0)?;
        let zeros = || vec![0.0; len];
        Ok(Self {
            step: 0,
            weights: zeros(),
            first: zeros(),
            second: zeros(),
            gradient: zeros(),
            shape: [len],
            passes: passes[0],
        })
    }

    fn step(&mut self, world: &mut World) -> Result<(), Box<dyn Error>> {
        self.step += 1;
        (0..self.passes).for_each(|_| pass());
        let slope = (self.step % 17) as f32;
        self.gradient.iter_mut().enumerate().for_each(|(index, it)| *it = slope + (index % 13) as f32);
        world.communicator().all_reduce(&mut self.gradient, ReduceOp::Avg)?;
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((weight, (first, second)), gradient) in self.weights.iter_mut().zip(moments).zip(&self.gradient)
        {
            *first = 0.9 * *first + 0.1 * gradient;
            *second = 0.999 * *second + 0.001 * gradient * gradient;
            *weight -= 0.001 * *first / (second.sqrt() + 1e-8);
        }
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
            Tensor::new("weights", &self.shape, &self.weights),
            Tensor::new("first", &self.shape, &self.first),
            Tensor::new("second", &self.shape, &self.second),
        ]
    }

    fn tensors_mut(&mut self) -> [TensorMut<'_>; 3] {
        [
            TensorMut::new("weights", &self.shape, &mut self.weights),
            TensorMut::new("first", &self.shape, &mut self.first),
            TensorMut::new("second", &self.shape, &mut self.second),
        ]
    }

    fn digest(&self) -> Digest {
        Digest::of([&self.weights[..], &self.first, &self.second])
    }
}

/// Some arithmetic in the first-level cache.
fn pass() {
    let mut sums = black_box([1.0f32; 1_024]);
    sums.iter_mut().for_each(|sum| *sum = sum.mul_add(1.000_1, 0.5).sqrt());
    black_box(sums);
}
