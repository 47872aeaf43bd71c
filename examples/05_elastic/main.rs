//! Training that goes on when workers are killed: a small neural network, without torch, in f64.
//!
//! The program says what its state is, how a gradient is computed and how it is applied; the loop is Paceline's. Kill
//! workers as you like: the weights at the end are those of a run that nobody disturbed, to the last bit. With
//! `--checkpoint FOLDER` also the whole job, if the next one has as many slots.
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use paceline_runtime::digest::Digest;
use paceline_runtime::elastic::{self, Config, End, Program, Stable, Tensor};

#[derive(Parser)]
struct Args {
    /// How often all samples are used
    #[arg(long, default_value = "20")]
    passes: u64,
    /// The number of logical workers; as many as processes if not given
    #[arg(long)]
    slots: Option<u16>,
    /// How many processes only follow the training until one of the others is lost
    #[arg(long, default_value = "0")]
    spares: usize,
    /// Save the state into this folder, which all processes share, and go on from what is there
    #[arg(long, value_name = "FOLDER")]
    checkpoint: Option<PathBuf>,
    /// After how many steps each
    #[arg(long, default_value = "50")]
    every: u64,
    /// A pause in each gradient, in milliseconds, so that there is time to kill somebody
    #[arg(long, default_value = "0")]
    pause_ms: u64,
}

const SAMPLES: usize = 1024;
const BATCH: usize = 16;
const INPUTS: usize = 2;
const HIDDEN: usize = 16;
const RATE: f64 = 0.05;
const MOMENTUM: f64 = 0.9;

/// Weights of the first layer with its biases, then those of the second.
const PARAMETERS: usize = HIDDEN * (INPUTS + 1) + HIDDEN + 1;

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let args = Args::parse();
    let mut config = Config::new(SAMPLES, BATCH);
    config.passes = args.passes;
    config.slots = args.slots;
    config.spares = args.spares;
    config.checkpoint = args.checkpoint;
    config.checkpoint_every = args.every;
    let mut model = Model::new(Duration::from_millis(args.pause_ms));

    let end = elastic::train(&config, &mut model)?;

    if end == End::Complete {
        let digest = Digest::of([&model.weights[..], &model.momentum]);
        println!("trained to the loss {:.4} (digest {digest})", model.loss);
    }
    Ok(())
}

struct Model {
    weights: Vec<f64>,
    momentum: Vec<f64>,
    loss: f64,
    pause: Duration,
}

impl Model {
    fn new(pause: Duration) -> Self {
        let weight = |i: usize| ((i * 37 + 11) % 101) as f64 / 101.0 - 0.5;
        Self {
            weights: (0..PARAMETERS).map(weight).collect(),
            momentum: vec![0.0; PARAMETERS],
            loss: 0.0,
            pause,
        }
    }
}

impl Program for Model {
    type Gradient = f64;

    fn gradient_len(&self) -> usize {
        PARAMETERS
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        vec![Tensor::new("weights", &mut self.weights), Tensor::new("momentum", &mut self.momentum)]
    }

    fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
        std::thread::sleep(self.pause);
        let share = 1.0 / samples.len() as f64;
        samples.iter().map(|&index| share * backward(&self.weights, sample(index), share, gradient)).sum()
    }

    fn apply(&mut self, gradient: &[f64]) {
        for ((weight, momentum), slope) in self.weights.iter_mut().zip(&mut self.momentum).zip(gradient) {
            *momentum = MOMENTUM * *momentum + slope;
            *weight -= RATE * *momentum;
        }
    }

    fn stable(&mut self, stable: &Stable) {
        let Stable { step, epoch, members, loss: Some(loss), .. } = *stable else { return };
        self.loss = loss;
        if step.0.is_multiple_of(50) {
            println!("{step}: loss {loss:.4} ({epoch}, {members} members)");
        }
    }
}

/// A point, and what the network should find there, as a function of its number: there is no file to load.
fn sample(index: usize) -> ([f64; INPUTS], f64) {
    let (x, y) = ((index % 32) as f64 / 16.0 - 1.0, (index / 32) as f64 / 16.0 - 1.0);
    ([x, y], (x * y + 0.5 * x).clamp(-1.0, 1.0))
}

/// Adds the gradient of half the squared error at one sample, times `share`, and returns that error.
fn backward(weights: &[f64], (input, target): ([f64; INPUTS], f64), share: f64, gradient: &mut [f64]) -> f64 {
    let (first, second) = weights.split_at(HIDDEN * (INPUTS + 1));
    let (first_gradient, second_gradient) = gradient.split_at_mut(HIDDEN * (INPUTS + 1));
    let rows = || first.chunks_exact(INPUTS + 1);
    // max(x, 0): tanh and exp may differ between machines in the last bit.
    let hidden: Vec<f64> =
        rows().map(|row| (row[0] * input[0] + row[1] * input[1] + row[2]).max(0.0)).collect();
    let output = second[HIDDEN] + hidden.iter().zip(second).map(|(h, w)| h * w).sum::<f64>();
    let slope = (output - target) * share;
    second_gradient[HIDDEN] += slope;
    for (unit, row) in first_gradient.chunks_exact_mut(INPUTS + 1).enumerate() {
        second_gradient[unit] += slope * hidden[unit];
        if hidden[unit] > 0.0 {
            let through = slope * second[unit];
            row[0] += through * input[0];
            row[1] += through * input[1];
            row[2] += through;
        }
    }
    (output - target) * (output - target) / 2.0
}
