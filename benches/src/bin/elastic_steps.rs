//! What a membership that may change costs while nothing fails: the ranks of a job make the same steps with
//! `runtime::elastic` and with a plain communicator, by turns, in the same processes.
//!
//! `paceline run -n 4 -- elastic_steps [MEGABYTES [STEP_MS [ROUNDS]]]`: gradients of so many megabytes (25), which take so
//! many milliseconds to compute on an idle processor besides (0); a round has a turn of each kind (15). Both have their
//! gradients handed over as zeros, add to them, take the mean with that of the loss and apply the same optimizer. Both end
//! with the same bits, or this fails. The launcher's and the workers' heartbeats go on in the plain turns, so what the
//! membership's thread takes then is printed as well, and so are the messages that are no heartbeats.
#![allow(clippy::print_stdout, reason = "a command line tool talks to its terminal")]

use std::error::Error;
use std::fs;
use std::hint::black_box;
use std::time::{Duration, Instant};

use paceline_runtime::World;
use paceline_runtime::collectives::{Error as CollectivesError, ReduceOp};
use paceline_runtime::digest::Digest;
use paceline_runtime::elastic::{self, Config, End, Program, Stable, Tensor};

/// Steps of a turn: long enough that its ends do not count.
const TURN: u64 = 20;

/// The threads of this name drive the membership; the kernel keeps 15 characters.
const CONTROL: &str = "paceline-contro";

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| words.get(at).map_or(Ok(default), |word| word.parse());
    let (megabytes, step_ms, rounds) = (number(0, 25)?, number(1, 0)?, number(2, 15)?);
    let mut world = World::join()?;
    let mut passes = [passes(step_ms)];
    world.communicator().broadcast(&mut passes, 0)?;
    let (rank, ranks) = (world.rank(), world.world_size());
    let len = megabytes as usize * 1_000_000 / 4;
    let [passes] = passes;
    let plain = Plain { world, model: Model::new(len, passes), gradient: vec![0.0; len + 1] };
    let mut training = Training::new(plain, Model::new(len, passes));
    // The first turn is of steps that do not count, and the last one has no end that is like the others'.
    let mut config = Config::new(ranks * (TURN * (rounds + 3)) as usize, 1);
    config.seed = 1;
    if elastic::train(&config, &mut training)? != End::Complete {
        return Err("the training was not completed here".into());
    }
    if let Some(error) = training.failed.take() {
        return Err(error.into());
    }
    // So that there have been as many plain steps.
    training.plain.turn()?;
    if training.model.digest() != training.plain.model.digest() {
        return Err("the two kinds of steps do not have the same bits".into());
    }
    if training.views != 1 {
        return Err("the membership has changed; that is another measurement".into());
    }
    if rank == 0 {
        training.print(&format!("{ranks} ranks, {megabytes} MB, {step_ms} ms of computing"));
    }
    training.plain.world.leave()?;
    Ok(())
}

/// Momentum without a model.
struct Model {
    weights: Vec<f32>,
    momentum: Vec<f32>,
    passes: u64,
    step: u64,
}

impl Model {
    fn new(len: usize, passes: u64) -> Self {
        Self { weights: vec![0.0; len], momentum: vec![0.0; len], passes, step: 0 }
    }

    /// Adds the gradient of the next step, and returns the loss.
    fn gradient(&self, gradient: &mut [f32]) -> f64 {
        (0..self.passes).for_each(|_| pass());
        let slope = (self.step % 17) as f32;
        gradient.iter_mut().enumerate().for_each(|(index, it)| *it += slope + (index % 13) as f32);
        f64::from(slope)
    }

    fn apply(&mut self, gradient: &[f32]) {
        for ((weight, momentum), slope) in self.weights.iter_mut().zip(&mut self.momentum).zip(gradient) {
            *momentum = 0.9 * *momentum + slope;
            *weight -= 0.001 * *momentum;
        }
        self.step += 1;
    }

    fn digest(&self) -> Digest {
        Digest::of([&self.weights[..], &self.momentum])
    }
}

/// The training as it is written with a communicator.
struct Plain {
    world: World,
    model: Model,
    /// With the loss at its end.
    gradient: Vec<f32>,
}

impl Plain {
    fn step(&mut self) -> Result<(), CollectivesError> {
        self.gradient.fill(0.0);
        let (loss, gradient) = self.gradient.split_last_mut().expect("there is an element for the loss");
        *loss = self.model.gradient(gradient) as f32;
        self.world.communicator().all_reduce(&mut self.gradient, ReduceOp::Avg)?;
        self.model.apply(&self.gradient[..self.gradient.len() - 1]);
        Ok(())
    }

    /// How long a turn takes, and how much of a processor the membership has used meanwhile.
    fn turn(&mut self) -> Result<(Duration, Duration), CollectivesError> {
        self.world.communicator().barrier()?;
        let (start, used) = (Instant::now(), control_time());
        (0..TURN).try_for_each(|_| self.step())?;
        let took = start.elapsed();
        let used = control_time().saturating_sub(used);
        self.world.communicator().barrier()?;
        Ok((took, used))
    }
}

/// The same with `runtime::elastic`, which makes plain turns between its own.
struct Training {
    plain: Plain,
    model: Model,
    began: Instant,
    /// In the order in which they were: plain, elastic, plain, …
    plain_turns: Vec<Duration>,
    elastic_turns: Vec<Duration>,
    heartbeats: Duration,
    failed: Option<CollectivesError>,
    /// Messages at the first step that counted, and at the last.
    messages: Option<(Stable, Stable)>,
    views: u32,
}

impl Training {
    fn new(plain: Plain, model: Model) -> Self {
        Self {
            plain,
            model,
            began: Instant::now(),
            plain_turns: Vec::new(),
            elastic_turns: Vec::new(),
            heartbeats: Duration::ZERO,
            failed: None,
            messages: None,
            views: 1,
        }
    }

    /// Between two turns of its own.
    fn change(&mut self) {
        let took = self.began.elapsed();
        if !self.plain_turns.is_empty() {
            self.elastic_turns.push(took);
        }
        match self.plain.turn() {
            Ok((took, used)) => {
                self.plain_turns.push(took);
                self.heartbeats += used;
            }
            Err(error) => drop(self.failed.get_or_insert(error)),
        }
        self.began = Instant::now();
    }

    fn print(&self, what: &str) {
        // The first turn of each kind is for warming up. An elastic one is compared with the plain ones around it.
        let pairs = self.plain_turns.windows(2).zip(&self.elastic_turns).skip(1);
        let mut shares: Vec<f64> = pairs
            .map(|(plain, elastic)| {
                let plain = (plain[0] + plain[1]).as_secs_f64() / 2.0;
                100.0 * (elastic.as_secs_f64() - plain) / plain
            })
            .collect();
        shares.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| {
            shares
                .get(((shares.len().max(1) - 1) as f64 * share).round() as usize)
                .copied()
                .unwrap_or(f64::NAN)
        };
        let ms = |turns: &[Duration]| {
            let mut turns: Vec<f64> =
                turns[1..].iter().map(|turn| turn.as_secs_f64() * 1e3 / TURN as f64).collect();
            turns.sort_unstable_by(f64::total_cmp);
            turns.get(turns.len() / 2).copied().unwrap_or(f64::NAN)
        };
        println!(
            "{what}: plain {:.2} ms, elastic {:.2} ms: {:+.2} % (quartiles {:+.2} and {:+.2} %) in {} rounds of {TURN} steps",
            ms(&self.plain_turns),
            ms(&self.elastic_turns),
            at(0.5),
            at(0.25),
            at(0.75),
            shares.len()
        );
        let plain: Duration = self.plain_turns.iter().sum();
        let share = 100.0 * self.heartbeats.as_secs_f64() / plain.as_secs_f64();
        let (messages, steps) = self.messages.map_or((0, 0), |(first, last)| {
            (last.control_messages - first.control_messages, last.step.0 - first.step.0)
        });
        println!(
            "{what}: {messages} control messages besides heartbeats in {steps} steps; heartbeats take {share:.3} % of a \
             processor in each worker"
        );
    }
}

impl Program for Training {
    type Gradient = f32;

    fn gradient_len(&self) -> usize {
        self.model.weights.len()
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        vec![
            Tensor::new("weights", &mut self.model.weights),
            Tensor::new("momentum", &mut self.model.momentum),
        ]
    }

    fn gradient(&mut self, _: &[usize], gradient: &mut [f32]) -> f64 {
        // Not before the first step: whoever has not got its state yet waits for this thread, which has it.
        if self.model.step > 0 && self.model.step.is_multiple_of(TURN) && self.failed.is_none() {
            self.change();
        }
        self.model.gradient(gradient)
    }

    fn apply(&mut self, gradient: &[f32]) {
        self.model.apply(gradient);
    }

    fn stable(&mut self, stable: &Stable) {
        let first = self.messages.map_or(*stable, |(first, _)| first);
        if first.epoch != stable.epoch {
            self.views += 1;
        }
        self.messages = Some((first, *stable));
    }
}

/// How long the threads of the membership have run in this process.
fn control_time() -> Duration {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let is_control = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim_end() == CONTROL)
    };
    let of = |task: fs::DirEntry| {
        let ran = fs::read_to_string(task.path().join("schedstat")).ok()?;
        ran.split_whitespace().next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(tasks.filter(is_control).filter_map(of).sum())
}

/// How many passes over a small buffer take so many milliseconds.
fn passes(step_ms: u64) -> u64 {
    let start = Instant::now();
    (0..1_000).for_each(|_| pass());
    step_ms * 1_000_000 * 1_000 / start.elapsed().as_nanos().max(1) as u64
}

/// Some arithmetic in the first-level cache.
fn pass() {
    let mut sums = black_box([1.0f32; 1_024]);
    sums.iter_mut().for_each(|sum| *sum = sum.mul_add(1.000_1, 0.5).sqrt());
    black_box(sums);
}
