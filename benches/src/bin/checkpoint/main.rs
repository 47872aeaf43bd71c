//! What saving costs the training: the ranks of a job make the same steps with and without checkpoints, by turns.
//!
//! `paceline run -n 4 -- checkpoint plain|elastic FOLDER [MEGABYTES [EVERY [STEP_MS]]]`: gradients of so many megabytes
//! (25), with Adam's moments three times that as state, saved every so many steps (20), each of which computes for so many
//! milliseconds on an idle processor (100). `plain` is a program with a communicator and a `Checkpointer`, `elastic` one
//! with `runtime::elastic`. What was saved last is loaded again and compared.
#![allow(clippy::print_stdout, reason = "a command line tool talks to its terminal")]

mod elastic;
mod plain;

use std::error::Error;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use paceline_runtime::digest::Digest;

const USAGE: &str = "usage: checkpoint plain|elastic FOLDER [MEGABYTES [EVERY [STEP_MS]]]";

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| words.get(at).map_or(Ok(default), |word| word.parse());
    let folder = PathBuf::from(words.get(1).ok_or(USAGE)?);
    let (megabytes, every, step_ms) = (number(2, 25)?, number(3, 20)?, number(4, 100)?);
    let measure = match words[0].as_str() {
        "plain" => plain::measure,
        "elastic" => elastic::measure,
        _ => return Err(USAGE.into()),
    };
    measure(&Task { folder, megabytes, every, step_ms })
}

/// What is to be measured.
struct Task {
    folder: PathBuf,
    megabytes: u64,
    every: u64,
    step_ms: u64,
}

impl Task {
    fn folder(&self) -> &Path {
        &self.folder
    }

    /// The number of elements of a gradient.
    fn len(&self) -> usize {
        self.megabytes as usize * 1_000_000 / 4
    }

    /// How many passes over a small buffer take as long as a step is to compute.
    fn passes(&self) -> u64 {
        let start = Instant::now();
        (0..1_000).for_each(|_| pass());
        self.step_ms * 1_000_000 * 1_000 / start.elapsed().as_nanos().max(1) as u64
    }

    fn print(&self, ranks: usize, without: &mut [Duration], with: &mut [Duration]) {
        let (without, with) = (median(without) / self.every as f64, median(with) / self.every as f64);
        let share = 100.0 * (with - without) / without;
        println!("state {} MB over {ranks} ranks, saved every {} steps", 3 * self.megabytes, self.every);
        println!("step without saving {without:.2} ms, with {with:.2} ms: {share:+.2} %");
    }
}

/// In milliseconds.
fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}

/// Adam without a model.
struct Adam {
    weights: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

impl Adam {
    fn new(len: usize) -> Self {
        let zeros = || vec![0.0; len];
        Self { weights: zeros(), first: zeros(), second: zeros() }
    }

    fn apply(&mut self, gradient: &[f32]) {
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((weight, (first, second)), gradient) in self.weights.iter_mut().zip(moments).zip(gradient) {
            *first = 0.9 * *first + 0.1 * gradient;
            *second = 0.999 * *second + 0.001 * gradient * gradient;
            *weight -= 0.001 * *first / (second.sqrt() + 1e-8);
        }
    }

    fn digest(&self) -> Digest {
        Digest::of([&self.weights[..], &self.first, &self.second])
    }
}

/// The gradient of a step, as a function of its number and of how long it takes.
fn compute(step: u64, passes: u64, gradient: &mut [f32]) {
    (0..passes).for_each(|_| pass());
    let slope = (step % 17) as f32;
    gradient.iter_mut().enumerate().for_each(|(index, it)| *it = slope + (index % 13) as f32);
}

/// Some arithmetic in the first-level cache.
fn pass() {
    let mut sums = black_box([1.0f32; 1_024]);
    sums.iter_mut().for_each(|sum| *sum = sum.mul_add(1.000_1, 0.5).sqrt());
    black_box(sums);
}
