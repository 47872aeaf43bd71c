//! Data-parallel training without torch: a linear model, fitted by gradient descent.
//!
//! Each rank takes its share of every batch, computes the gradient of its share, and the ranks average
//! their gradients before the step. All end with the same bits.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use paceline_runtime::World;
use paceline_runtime::data_parallel::{Config, DataParallel};
use paceline_runtime::digest::Digest;
use paceline_runtime::sampler::Sampler;

const FEATURES: usize = 3;
/// What the data was made with, and what training should find.
const TRUE_WEIGHTS: [f32; FEATURES] = [2.0, -1.0, 0.5];
const TRUE_BIAS: f32 = 0.25;

fn main() -> anyhow::Result<()> {
    let mut world = World::join()?;
    let (rank, world_size) = (world.rank(), world.world_size());

    // Ranks may start from anything: the broadcast gives all of them rank 0's parameters.
    let (mut weights, mut bias) = ([rank as f32; FEATURES], [0.0f32]);
    let mut parallel = DataParallel::<f32>::new(&[FEATURES, 1], Config::default())?;
    parallel.broadcast_parameters(world.communicator(), &mut [&mut weights, &mut bias], 0)?;

    let mut sampler = Sampler::new(240, 24, 7)?;
    for epoch in 0..20 {
        for step in 0..sampler.steps_per_epoch() {
            let batch = sampler.batch(epoch, step, rank, world_size)?;
            let (mut weight_gradient, mut bias_gradient) = gradient(&batch, &weights, bias[0]);
            parallel
                .average_gradients(world.communicator(), &mut [&mut weight_gradient, &mut bias_gradient])?;
            for (weight, gradient) in weights.iter_mut().zip(weight_gradient) {
                *weight -= 0.2 * gradient;
            }
            bias[0] -= 0.2 * bias_gradient[0];
        }
    }

    let digest = Digest::of([&weights[..], &bias]);
    println!("rank {rank} found weights {weights:.3?} and bias {:.3} (digest {digest})", bias[0]);
    let worst =
        weights.iter().zip(TRUE_WEIGHTS).map(|(found, sought)| (found - sought).abs()).fold(0.0, f32::max);
    assert!(worst < 0.01 && (bias[0] - TRUE_BIAS).abs() < 0.01, "training has not converged");
    Ok(world.leave()?)
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
