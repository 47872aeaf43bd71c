//! Data parallel training: a small convolutional network learns to read digits, on as many ranks as the launcher starts.
//!
//! `paceline run -n 2 -- 04_digits`. The arithmetic is libtorch's; README.md says what to look at.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example talks to its user")]

mod digits;
mod progress;

use anyhow::{Result, ensure};
use clap::Parser;
use digits::Images;
use paceline_collectives::{Communicator, ReduceOp};
use paceline_runtime::World;
use paceline_runtime::data_parallel::Config;
use paceline_runtime::digest::Digest;
use paceline_runtime::sampler::Sampler;
use paceline_runtime::tch::TchDataParallel;
use std::time::Instant;
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
#[command(about = "Trains a digit classifier on all ranks of the job")]
struct Options {
    /// How often each image is seen
    #[arg(long, default_value_t = 12)]
    epochs: usize,
    /// Images per step, over all ranks together; by default 64, or what comes next below and divides among the ranks
    #[arg(long)]
    batch: Option<usize>,
    /// Adam's learning rate
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Of the first parameters and of the order of the images; a run with the same seed and ranks has the same result
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<()> {
    tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN).init();
    let options = Options::parse();
    let mut world = World::join()?;
    train(&mut world, &options)?;
    world.leave()?;
    Ok(())
}

fn train(world: &mut World, options: &Options) -> Result<()> {
    let (rank, world_size) = (world.rank(), world.world_size());
    let (training, held_out) = digits::load()?;
    let batch = options.batch.unwrap_or(world_size * (64 / world_size).max(1));
    let mut sampler = Sampler::new(training.len(), batch, options.seed)?;

    tch::manual_seed(options.seed as i64);
    let store = nn::VarStore::new(Device::Cpu);
    let network = network(&store.root());
    let mut optimizer = nn::Adam::default().build(&store, options.lr)?;
    let mut parallel = TchDataParallel::from_var_store(&store, Config::default())?;
    parallel.broadcast_parameters(world.communicator(), 0)?;

    let start = Instant::now();
    for epoch in 0..options.epochs {
        let steps = sampler.steps_per_epoch();
        let what = format!("epoch {} of {}", epoch + 1, options.epochs);
        let bar = (rank == 0).then(|| progress::bar(steps as u64, what.clone()));
        let mut loss_sum = [0.0];
        for step in 0..steps {
            let batch = training.select(&sampler.batch(epoch as u64, step, rank, world_size)?);
            let loss = network.forward(&batch.pixels).cross_entropy_for_logits(&batch.labels);
            optimizer.zero_grad();
            loss.backward();
            parallel.average_gradients(world.communicator())?;
            optimizer.step();
            loss_sum[0] += loss.double_value(&[]) / steps as f64;
            bar.iter().for_each(|bar| bar.inc(1));
        }
        world.communicator().all_reduce(&mut loss_sum, ReduceOp::Avg)?;
        if let Some(bar) = bar {
            bar.finish_and_clear();
            eprintln!("{what}: mean loss {:.4}", loss_sum[0]);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let all_reduced_bytes = world.communicator().statistics().all_reduced_bytes;

    let digests = all_digests(world.communicator(), &parallel)?;
    let equal = digests.iter().all(|digest| *digest == digests[0]);
    if rank == 0 {
        let steps = options.epochs * sampler.steps_per_epoch();
        let elements: usize = store.trainable_variables().iter().map(Tensor::numel).sum();
        let (right, all) = (right_answers(&network, &held_out), held_out.len());
        println!("{elements} parameters on each of {world_size} ranks");
        println!("{steps} steps in {seconds:.1} s: {:.0} steps/s", steps as f64 / seconds);
        println!("all-reduced: {:.1} MB on each rank", all_reduced_bytes as f64 / 1e6);
        println!("held-out accuracy: {:.2} % ({right} of {all} images)", 100.0 * right as f64 / all as f64);
        for (rank, digest) in digests.iter().enumerate() {
            println!("parameters of rank {rank}: {digest}");
        }
        println!(
            "{}",
            if equal { "All ranks have the same parameters." } else { "The ranks' parameters differ." }
        );
    }
    ensure!(equal, "the ranks' parameters differ");
    Ok(())
}

/// Two layers that see 3 × 3 pixels, then two that see everything: 38,282 parameters.
fn network(variables: &nn::Path) -> nn::Sequential {
    let same_size = nn::ConvConfig { padding: 1, ..Default::default() };
    nn::seq()
        .add(nn::conv2d(variables / "edges", 1, 16, 3, same_size))
        .add_fn(Tensor::relu)
        .add(nn::conv2d(variables / "strokes", 16, 32, 3, same_size))
        .add_fn(|images| images.relu().max_pool2d_default(2).flat_view())
        .add(nn::linear(variables / "shapes", 32 * 4 * 4, 64, Default::default()))
        .add_fn(Tensor::relu)
        .add(nn::linear(variables / "digits", 64, 10, Default::default()))
}

/// How many images the network reads right.
fn right_answers(network: &impl Module, images: &Images) -> i64 {
    let guesses = tch::no_grad(|| network.forward(&images.pixels).argmax(1, false));
    guesses.eq_tensor(&images.labels).sum(Kind::Int64).int64_value(&[])
}

/// Every rank's digest of its parameters, by rank.
fn all_digests(communicator: &mut Communicator, parallel: &TchDataParallel) -> Result<Vec<Digest>> {
    let own = parallel.parameter_digest()?.0;
    let mut all = vec![0; own.len() * communicator.world_size()];
    communicator.all_gather(&own, &mut all)?;
    Ok(all.as_chunks().0.iter().map(|bytes| Digest(*bytes)).collect())
}
