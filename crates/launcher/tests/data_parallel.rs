//! Data-parallel training is right, not only running: what a number of ranks trains is what one rank
//! trains, and all ranks of a run have the same bits.
//!
//! A build whose all_reduce does nothing must fail here; `cargo xtask test` makes one and looks.

mod job;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use job::{Job, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::Element;
use paceline_runtime::data_parallel::{Config, DataParallel};
use paceline_runtime::digest::Digest;
use paceline_runtime::sampler::Sampler;

const STEPS: usize = 20;
const SAMPLES: usize = 96;
const GLOBAL_BATCH: usize = 16;
const SEED: u64 = 11;
const INPUTS: usize = 6;
const HIDDEN: usize = 9;

fn main() {
    job::main(rank, || {
        vec![
            trial("parameters_after_20_steps_agree_on_1_2_and_4_ranks_in_f32", || agree("f32", 1e-5)),
            trial("parameters_after_20_steps_agree_on_1_2_and_4_ranks_in_f64", || agree("f64", 1e-12)),
        ]
    });
}

/// What one rank has at the end.
struct Outcome {
    parameters: Vec<f64>,
    digest: String,
    /// All sample indices, step by step.
    samples: Vec<Vec<usize>>,
}

fn agree(dtype: &str, tolerance: f64) {
    let alone = train(dtype, 1).remove(0);
    let start = initial::<f64>(0).concat();
    let moved = distance(&alone.parameters, &start);
    assert!(moved > 0.1, "training has moved the parameters by {moved} only");
    for ranks in [2, 4] {
        let outcomes = train(dtype, ranks);
        for step in 0..STEPS {
            let dealt: Vec<usize> =
                outcomes.iter().flat_map(|outcome| outcome.samples[step].clone()).collect();
            let distinct: BTreeSet<usize> = dealt.iter().copied().collect();
            assert_eq!(distinct.len(), dealt.len(), "step {step}: a sample was dealt twice");
            assert_eq!(dealt.len(), GLOBAL_BATCH, "step {step}: the batch is not complete");
            assert_eq!(distinct, alone.samples[step].iter().copied().collect(), "step {step}: other samples");
        }
        for (rank, outcome) in outcomes.iter().enumerate() {
            assert_eq!(outcome.digest, outcomes[0].digest, "ranks disagree: 0 and {rank} of {ranks}");
            let worst = distance(&outcome.parameters, &alone.parameters);
            assert!(
                worst <= tolerance,
                "rank {rank} of {ranks} differs from the single-rank run by {worst:e}"
            );
        }
    }
}

/// The largest difference relative to the largest parameter.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f64::max)
}

/// Runs the training on real processes and reads what each wrote.
fn train(dtype: &str, ranks: usize) -> Vec<Outcome> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().to_str().expect("the path is text");
    Job::start(ranks, &[], dtype, &[path]).finish().assert_success();
    let read = |rank: usize, what: &str| {
        fs::read_to_string(folder.path().join(format!("{rank}.{what}"))).expect("each rank has written it")
    };
    (0..ranks)
        .map(|rank| Outcome {
            parameters: read(rank, "parameters").split(' ').map(|x| x.parse().expect("a number")).collect(),
            digest: read(rank, "digest"),
            samples: read(rank, "samples")
                .lines()
                .map(|line| line.split(' ').map(|x| x.parse().expect("an index")).collect())
                .collect(),
        })
        .collect()
}

fn rank(dtype: &str, args: &[String]) {
    match dtype {
        "f32" => train_rank::<f32>(Path::new(&args[0])),
        "f64" => train_rank::<f64>(Path::new(&args[0])),
        _ => panic!("no such dtype: {dtype}"),
    }
}

/// The numbers of a small network, in either precision.
trait Real: Element + std::ops::AddAssign + std::ops::SubAssign + std::ops::Mul<Output = Self> {
    fn of(x: f64) -> Self;
    fn get(self) -> f64;
}

impl Real for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
    fn get(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
    fn get(self) -> f64 {
        self
    }
}

/// Hidden weights, hidden biases, output weights, output bias. Ranks begin differently on purpose: the
/// broadcast must give all of them rank 0's.
fn initial<T: Real>(rank: usize) -> Vec<Vec<T>> {
    let value = |index: usize| T::of((index as f64 * 0.7 + rank as f64).sin() * 0.5);
    [INPUTS * HIDDEN, HIDDEN, HIDDEN, 1].iter().map(|&len| (0..len).map(value).collect()).collect()
}

fn train_rank<T: Real>(folder: &Path) {
    let mut world = World::join().expect("all ranks are started");
    let (rank, world_size) = (world.rank(), world.world_size());
    let mut parameters = initial::<T>(rank);
    let lens: Vec<usize> = parameters.iter().map(Vec::len).collect();
    // Several buckets, or the order in which they start would not matter.
    let mut config = Config::default();
    (config.first_bucket_bytes, config.bucket_bytes) = (48, 96);
    let mut parallel = DataParallel::<T>::new(&lens, config).expect("the elements are floats");
    assert!(parallel.buckets() > 1);
    parallel
        .broadcast_parameters(world.communicator(), &mut views(&mut parameters), 0)
        .expect("all ranks call it");
    let mut sampler = Sampler::new(SAMPLES, GLOBAL_BATCH, SEED).expect("the batch fits");
    let mut dealt = String::new();
    for step in 0..STEPS {
        let (epoch, step) = (step / sampler.steps_per_epoch(), step % sampler.steps_per_epoch());
        let batch = sampler.batch(epoch as u64, step, rank, world_size).expect("the batch divides");
        dealt += &(batch.iter().map(usize::to_string).collect::<Vec<_>>().join(" ") + "\n");
        let mut gradients = backward(&parameters, &batch);
        parallel
            .average_gradients(world.communicator(), &mut views(&mut gradients))
            .expect("all ranks call it");
        for (parameter, gradient) in parameters.iter_mut().flatten().zip(gradients.iter().flatten()) {
            *parameter -= T::of(0.3) * *gradient;
        }
    }
    let digest = Digest::of(parameters.iter().map(Vec::as_slice));
    let text: Vec<String> = parameters.iter().flatten().map(|x| format!("{:e}", x.get())).collect();
    for (what, text) in [("parameters", text.join(" ")), ("digest", digest.to_string()), ("samples", dealt)] {
        fs::write(folder.join(format!("{rank}.{what}")), text).expect("the folder can be written");
    }
    world.leave().expect("all ranks leave");
}

fn views<T>(tensors: &mut [Vec<T>]) -> Vec<&mut [T]> {
    tensors.iter_mut().map(Vec::as_mut_slice).collect()
}

/// The gradient of the mean squared error of tanh network against a smooth function.
fn backward<T: Real>(parameters: &[Vec<T>], batch: &[usize]) -> Vec<Vec<T>> {
    let [w1, b1, w2, b2] = parameters else { panic!("four tensors") };
    let mut gradients: Vec<Vec<T>> = parameters.iter().map(|tensor| vec![T::of(0.0); tensor.len()]).collect();
    for &index in batch {
        let input: Vec<T> = (0..INPUTS).map(|i| T::of(((index * 5 + i * 3) as f64).sin())).collect();
        let target = T::of((index as f64 * 0.3).cos());
        let hidden: Vec<T> = (0..HIDDEN)
            .map(|h| {
                let mut sum = b1[h];
                (0..INPUTS).for_each(|i| sum += w1[h * INPUTS + i] * input[i]);
                T::of(sum.get().tanh())
            })
            .collect();
        let mut slope = b2[0];
        (0..HIDDEN).for_each(|h| slope += w2[h] * hidden[h]);
        slope -= target;
        slope = slope * T::of(2.0 / batch.len() as f64);
        gradients[3][0] += slope;
        for h in 0..HIDDEN {
            gradients[2][h] += slope * hidden[h];
            let inner = slope * w2[h] * T::of(1.0 - hidden[h].get() * hidden[h].get());
            gradients[1][h] += inner;
            (0..INPUTS).for_each(|i| gradients[0][h * INPUTS + i] += inner * input[i]);
        }
    }
    gradients
}
