//! Data-parallel training without torch: a linear model, fitted by gradient descent.
//!
//! Each rank takes its share of every batch, computes the gradient of its share, and the ranks average
//! their gradients before the step. All end with the same bits. With `--checkpoint DIR` a job that was
//! killed goes on where it was, on any number of ranks.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use paceline_runtime::World;
use paceline_runtime::checkpoint::{self, Checkpointer, Group, Layout, Notes, Settings, Tensor, TensorMut};
use paceline_runtime::data_parallel::{Config, DataParallel};
use paceline_runtime::digest::Digest;
use paceline_runtime::sampler::{Sampler, SamplerState};

const FEATURES: usize = 3;
/// What the data was made with, and what training should find.
const TRUE_WEIGHTS: [f32; FEATURES] = [2.0, -1.0, 0.5];
const TRUE_BIAS: f32 = 0.25;
/// The note in a checkpoint that says where the data is.
const SAMPLER: &str = "sampler";

#[derive(Parser)]
#[command(about = "Fits a linear model on all ranks of the job")]
struct Options {
    /// How often each sample is seen
    #[arg(long, default_value_t = 20)]
    epochs: u64,
    /// Save the state into this folder, which all ranks share, and go on from what is there
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// After how many steps each
    #[arg(long, default_value_t = 50)]
    every: u64,
}

/// What is trained, and so what is saved.
struct Model {
    weights: [f32; FEATURES],
    bias: [f32; 1],
}

impl Model {
    fn tensors(&self) -> [Tensor<'_>; 2] {
        [Tensor::new("weights", &[FEATURES], &self.weights), Tensor::new("bias", &[1], &self.bias)]
    }

    fn tensors_mut(&mut self) -> [TensorMut<'_>; 2] {
        [
            TensorMut::new("weights", &[FEATURES], &mut self.weights),
            TensorMut::new("bias", &[1], &mut self.bias),
        ]
    }
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN).init();
    let options = Options::parse();
    let mut world = World::join()?;
    let (rank, world_size) = (world.rank(), world.world_size());

    // Ranks may start from anything: the broadcast gives all of them rank 0's parameters.
    let mut model = Model { weights: [rank as f32; FEATURES], bias: [0.0] };
    let mut parallel = DataParallel::<f32>::new(&[FEATURES, 1], Config::default())?;
    let mut sampler = Sampler::new(240, 24, 7)?;
    let (first, mut checkpointer) = match &options.checkpoint {
        Some(folder) => {
            let (first, checkpointer) = go_on(&mut world, folder, &mut model, &sampler)?;
            (first, Some(checkpointer))
        }
        None => (0, None),
    };
    let (weights, bias) = (&mut model.weights, &mut model.bias);
    parallel.broadcast_parameters(world.communicator(), &mut [weights, bias], 0)?;

    let steps_per_epoch = sampler.steps_per_epoch();
    for step in first..options.epochs * steps_per_epoch as u64 {
        let (epoch, step_of_epoch) = (step / steps_per_epoch as u64, step as usize % steps_per_epoch);
        let batch = sampler.batch(epoch, step_of_epoch, rank, world_size)?;
        let (mut weight_gradient, mut bias_gradient) = gradient(&batch, &model.weights, model.bias[0]);
        parallel.average_gradients(world.communicator(), &mut [&mut weight_gradient, &mut bias_gradient])?;
        for (weight, gradient) in model.weights.iter_mut().zip(weight_gradient) {
            *weight -= 0.2 * gradient;
        }
        model.bias[0] -= 0.2 * bias_gradient[0];

        let done = step + 1;
        if done.is_multiple_of(options.every)
            && let Some(checkpointer) = &mut checkpointer
            && let Some(stable) = checkpointer.agree(world.communicator(), done)?
        {
            let mut notes = Notes::default();
            notes.put(SAMPLER, &sampler.state(epoch, step_of_epoch + 1))?;
            checkpointer.save(stable, &model.tensors(), notes)?;
        }
    }
    if let Some(checkpointer) = checkpointer {
        checkpointer.finish()?;
    }

    let Model { weights, bias } = model;
    let digest = Digest::of([&weights[..], &bias]);
    println!("rank {rank} found weights {weights:.3?} and bias {:.3} (digest {digest})", bias[0]);
    let worst =
        weights.iter().zip(TRUE_WEIGHTS).map(|(found, sought)| (found - sought).abs()).fold(0.0, f32::max);
    assert!(worst < 0.01 && (bias[0] - TRUE_BIAS).abs() < 0.01, "training has not converged");
    Ok(world.leave()?)
}

/// Loads what was saved last, and gets ready to save more. The number of steps that the model has had.
fn go_on(
    world: &mut World,
    folder: &Path,
    model: &mut Model,
    sampler: &Sampler,
) -> anyhow::Result<(u64, Checkpointer)> {
    let mut first = 0;
    if let Some(resumed) = checkpoint::resume(world.communicator(), folder, &mut model.tensors_mut())? {
        let state: SamplerState =
            resumed.notes.get(SAMPLER)?.context("the checkpoint is of another program")?;
        let (epoch, step) = sampler.resume(&state)?;
        first = epoch * sampler.steps_per_epoch() as u64 + step as u64;
        println!("rank {} goes on after step {first}, saved by {} ranks", world.rank(), resumed.shards);
    }
    let layout = Layout::of(&model.tensors())?;
    let group = Group::agree(world.communicator(), &layout)?;
    Ok((first, Checkpointer::open(folder, group, layout, Settings::default())?))
}

/// Features and target of a sample, as a function of its number: there is no file to load.
fn sample(index: usize) -> ([f32; FEATURES], f32) {
    let features =
        std::array::from_fn(|feature| ((index * (7 + 5 * feature) + feature) % 19) as f32 / 9.5 - 1.0);
    let product: f32 = features.iter().zip(TRUE_WEIGHTS).map(|(feature, weight)| feature * weight).sum();
    (features, product + TRUE_BIAS)
}

/// The gradient of the mean squared error over a share of a batch.
fn gradient(batch: &[usize], weights: &[f32; FEATURES], bias: f32) -> ([f32; FEATURES], [f32; 1]) {
    let (mut weight_gradient, mut bias_gradient) = ([0.0; FEATURES], [0.0]);
    for &index in batch {
        let (features, target) = sample(index);
        let predicted: f32 = features.iter().zip(weights).map(|(feature, weight)| feature * weight).sum();
        let slope = 2.0 * (predicted + bias - target) / batch.len() as f32;
        for (gradient, feature) in weight_gradient.iter_mut().zip(features) {
            *gradient += slope * feature;
        }
        bias_gradient[0] += slope;
    }
    (weight_gradient, bias_gradient)
}
