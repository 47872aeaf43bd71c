//! A program with `runtime::elastic`. Every second turn of so many steps begins with a save, the others have none.

use std::error::Error;
use std::time::{Duration, Instant};

use paceline_runtime::checkpoint::{Listing, LocalDisk, TensorMut, resume_alone};
use paceline_runtime::elastic::{self, Config, End, Program, Tensor};

use super::{Adam, Task, compute};

/// Turns with a save, and as many without.
const TURNS: u64 = 12;

/// Measures, and prints on rank 0.
pub fn measure(task: &Task) -> Result<(), Box<dyn Error>> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<usize>().ok());
    let (rank, ranks) = (number("RANK").unwrap_or(0), number("WORLD_SIZE").unwrap_or(1));
    if !Listing::of(&LocalDisk, task.folder())?.committed.is_empty() {
        return Err(
            "there are checkpoints in the folder already, and the training would go on from them".into()
        );
    }
    // One turn before the first that counts.
    let steps = (2 * TURNS + 2) * task.every;
    let mut config = Config::new(ranks * steps as usize, 1);
    (config.checkpoint, config.checkpoint_every) = (Some(task.folder().to_owned()), 2 * task.every);
    let mut training = Training {
        step: 0,
        adam: Adam::new(task.len()),
        passes: task.passes(),
        turn: task.every,
        began: Instant::now(),
        with: Vec::new(),
        without: Vec::new(),
        late: 0,
        looks_at: (rank == 0).then_some(task),
    };
    if elastic::train(&config, &mut training)? != End::Complete {
        return Err("the training was not completed here".into());
    }
    if rank > 0 {
        return Ok(());
    }
    task.print(ranks, &mut training.without, &mut training.with);
    println!("{} of {TURNS} checkpoints were not done at the end of their turn", training.late);
    let (shape, mut loaded) = ([task.len()], Adam::new(task.len()));
    let mut tensors = [
        TensorMut::new("weights", &shape, &mut loaded.weights),
        TensorMut::new("first", &shape, &mut loaded.first),
        TensorMut::new("second", &shape, &mut loaded.second),
    ];
    let step = resume_alone(task.folder(), &mut tensors)?.map(|resumed| resumed.step);
    if (step, loaded.digest()) != (Some(steps), training.adam.digest()) {
        return Err("what was loaded is not what was saved".into());
    }
    Ok(())
}

struct Training<'a> {
    step: u64,
    adam: Adam,
    passes: u64,
    /// The steps of a turn.
    turn: u64,
    began: Instant,
    with: Vec<Duration>,
    without: Vec<Duration>,
    /// How many checkpoints were still being written when their turn ended.
    late: u64,
    looks_at: Option<&'a Task>,
}

impl Training<'_> {
    /// A turn has ended; the first two are for warming up.
    fn take_time(&mut self) {
        let took = self.began.elapsed();
        let turn = self.step / self.turn;
        match (turn, turn.is_multiple_of(2)) {
            (..=2, _) => {}
            // The state after an even turn is saved with the first step of the next one.
            (_, false) => {
                self.with.push(took);
                let unfinished = self
                    .looks_at
                    .and_then(|task| Listing::of(&LocalDisk, task.folder()).ok())
                    .map(|it| it.unfinished);
                self.late += u64::from(unfinished.is_some_and(|count| count > 0));
            }
            (_, true) => self.without.push(took),
        }
        self.began = Instant::now();
    }
}

impl Program for Training<'_> {
    type Gradient = f32;

    fn gradient_len(&self) -> usize {
        self.adam.weights.len()
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        vec![
            Tensor::new("weights", &mut self.adam.weights),
            Tensor::new("first", &mut self.adam.first),
            Tensor::new("second", &mut self.adam.second),
        ]
    }

    fn gradient(&mut self, _: &[usize], gradient: &mut [f32]) -> f64 {
        compute(self.step + 1, self.passes, gradient);
        0.0
    }

    fn apply(&mut self, gradient: &[f32]) {
        self.adam.apply(gradient);
        self.step += 1;
        if self.step.is_multiple_of(self.turn) {
            self.take_time();
        }
    }
}
