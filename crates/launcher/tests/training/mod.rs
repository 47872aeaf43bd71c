//! What is trained in tests of elastic jobs: a model whose state shows how often each sample was used.

#![allow(dead_code, reason = "each test uses a part of this")]
#![allow(clippy::print_stdout, reason = "ranks talk to the test by their output")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fastrand::Rng;
use paceline_runtime::digest::Digest;
use paceline_runtime::elastic::{self, Config, End, Program, Stable, Tensor};
use paceline_runtime::membership::Mode;
use rustix::time::{ClockId, clock_gettime};

use crate::job::now_us;

pub const RANKS: usize = 4;
pub const SAMPLES: usize = 256;
pub const BATCH: usize = 8;
pub const WEIGHTS: usize = 64;
/// Steps of a pass when all slots are there.
pub const STEPS: u64 = (SAMPLES / BATCH / RANKS) as u64;

/// How long a gradient takes while the test wants steps, and while it waits for something else.
pub const QUICK: Duration = Duration::from_millis(2);
pub const SLOW: Duration = Duration::from_millis(60);

/// A linear model that also counts how often each sample was used: `gradient` marks those of its batch.
pub struct Model {
    weights: Vec<f64>,
    momentum: Vec<f64>,
    counts: Vec<f64>,
    /// The number of steps applied.
    pub steps: Vec<u64>,
    /// A file with the number of passes that may be quick.
    pace: Option<PathBuf>,
}

impl Model {
    pub fn new(pace: Option<PathBuf>) -> Self {
        let weights = (0..WEIGHTS).map(|i| i as f64 / 7.0 - 3.0).collect();
        Self { weights, momentum: vec![0.0; WEIGHTS], counts: vec![0.0; SAMPLES], steps: vec![0], pace }
    }

    pub fn digest(&self) -> Digest {
        Digest::of([&self.weights[..], &self.momentum, &self.counts])
    }

    /// How often the least used sample was used, and the most used one.
    pub fn used(&self) -> (f64, f64) {
        let of = |choose: fn(f64, f64) -> f64| self.counts.iter().copied().reduce(choose).unwrap_or(-1.0);
        (of(f64::min), of(f64::max))
    }

    pub fn take_time(&self) {
        let Some(pace) = &self.pace else { return };
        let quick = fs::read_to_string(pace).ok().and_then(|passes| passes.parse().ok()).unwrap_or(0);
        std::thread::sleep(if self.steps[0] / STEPS < quick { QUICK } else { SLOW });
    }
}

impl Program for Model {
    type Gradient = f64;

    fn gradient_len(&self) -> usize {
        WEIGHTS + SAMPLES
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        vec![
            Tensor::new("weights", &mut self.weights),
            Tensor::new("momentum", &mut self.momentum),
            Tensor::new("counts", &mut self.counts),
            Tensor::new("steps", &mut self.steps),
        ]
    }

    fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
        self.take_time();
        let mut loss = 0.0;
        for &sample in samples {
            let features = |i: usize| ((sample * (2 * i + 3) + i) % 17) as f64 / 8.0 - 1.0;
            let error: f64 = self.weights.iter().enumerate().map(|(i, w)| w * features(i)).sum::<f64>() - 1.0;
            (0..WEIGHTS).for_each(|i| gradient[i] += error * features(i) / 1e3);
            gradient[WEIGHTS + sample] += 1.0;
            loss += error * error;
        }
        loss
    }

    fn apply(&mut self, gradient: &[f64]) {
        let (slopes, marks) = gradient.split_at(WEIGHTS);
        for ((weight, momentum), slope) in self.weights.iter_mut().zip(&mut self.momentum).zip(slopes) {
            *momentum = 0.9 * *momentum + slope;
            *weight -= 0.01 * *momentum;
        }
        // One over the number of slots that contribute. A step may have a sample of two passes.
        let mark = marks.iter().copied().filter(|&mark| mark > 0.0).fold(1.0, f64::min);
        self.counts.iter_mut().zip(marks).for_each(|(count, marked)| *count += (marked / mark).round());
        self.steps[0] += 1;
    }

    fn stable(&mut self, stable: &Stable) {
        if std::env::var_os("RANK").is_none() {
            // The run that nobody disturbs, in the test itself.
            return;
        }
        println!("stable {} epoch {} members {}", stable.step.0, stable.epoch.0, stable.members);
    }
}

pub fn config(mode: Mode, passes: u64) -> Config {
    let mut config = Config::new(SAMPLES, BATCH);
    (config.mode, config.passes, config.seed) = (mode, passes, 7);
    config
}

pub fn train(mode: Mode, args: &[String]) {
    let mut model = Model::new(Some(args[1].clone().into()));
    let passes = args[0].parse().expect("a number of passes");
    let end = elastic::train(&config(mode, passes), &mut model).unwrap_or_else(|error| panic!("{error}"));
    if end == End::Complete {
        let (least, most) = model.used();
        println!("complete digest {} least {least} most {most}", model.digest());
    }
}

/// Replaces the file in one step: nobody reads half of it.
pub fn set_pace(pace: &Path, passes: u64) {
    let fresh = pace.with_extension("fresh");
    fs::write(&fresh, passes.to_string()).and_then(|()| fs::rename(&fresh, pace)).expect("it can be written");
}

pub fn pause(rng: &mut Rng, most_ms: u64) {
    std::thread::sleep(Duration::from_millis(rng.u64(0..most_ms)));
}

pub fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// All have the same state, each sample was used once in each pass, and with slots nobody can see that there were faults.
pub fn check(complete: &[&str], mode: Mode, passes: u64) {
    check_of(RANKS, complete, mode, passes);
}

/// The same for a job of so many ranks.
pub fn check_of(ranks: usize, complete: &[&str], mode: Mode, passes: u64) {
    assert!(complete.len() >= ranks.min(2), "{} of {ranks} are complete", complete.len());
    let of = |line: &str| line.split_once("complete ").map(|(_, said)| said.to_owned());
    assert!(complete.iter().all(|line| of(line) == of(complete[0])), "{complete:?}");
    assert!(complete[0].contains(&format!("least {passes} most {passes}")), "{}", complete[0]);
    if mode == Mode::Slots {
        let (mut config, mut model) = (config(mode, passes), Model::new(None));
        config.slots = Some(ranks as u16);
        assert_eq!(elastic::train(&config, &mut model), Ok(End::Complete));
        assert!(complete[0].contains(&model.digest().to_string()), "not the bits of an undisturbed run");
    }
}

// ---- measuring ----

/// What a step of the part `computing` computes on each rank.
pub const COMPUTING: Duration = Duration::from_millis(100);

/// 25 MiB of f32.
const LARGE: usize = 25 * 1024 * 1024 / 4;

struct Large {
    weights: Vec<f32>,
    computing: Duration,
}

impl Program for Large {
    type Gradient = f32;

    fn gradient_len(&self) -> usize {
        LARGE
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        vec![Tensor::new("weights", &mut self.weights)]
    }

    fn gradient(&mut self, samples: &[usize], gradient: &mut [f32]) -> f64 {
        let until = time_on_processor() + self.computing;
        while time_on_processor() < until {
            std::hint::spin_loop();
        }
        gradient[0] = samples[0] as f32;
        0.0
    }

    fn apply(&mut self, gradient: &[f32]) {
        self.weights[0] += gradient[0];
        self.weights[1] += 1.0;
        println!("applied {} at {}", self.weights[1], now_us());
    }

    fn stable(&mut self, stable: &Stable) {
        let Stable { step, epoch, members, .. } = stable;
        println!("stable {} epoch {} members {members} at {}", step.0, epoch.0, now_us());
    }
}

/// How long this thread has run, which is less than the time that passes where processors are few.
fn time_on_processor() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Trains until it is killed, with so much computing in each step, and says when it has applied each step.
pub fn large(computing: Duration) {
    let mut config = Config::new(1_000_000, 1);
    config.mode = Mode::Shrink;
    let end = elastic::train(&config, &mut Large { weights: vec![0.0; LARGE], computing });
    println!("{end:?}");
}

pub fn print_times(what: &str, mut times_ms: Vec<f64>) {
    times_ms.sort_by(f64::total_cmp);
    let at = |share: f64| times_ms[((times_ms.len() - 1) as f64 * share).round() as usize];
    println!(
        "{what}: {} times, p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms",
        times_ms.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}
