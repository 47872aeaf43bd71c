//! Hot spares, and optimizers that are not deterministic, as real processes under the launcher: what a job of them promises
//! when workers are killed at chosen points.

#![allow(clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod job;
mod training;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fastrand::Rng;
use job::{Finished, Job, trial};
use paceline_runtime::elastic::{self, End, Program, Stable, Tensor};
use paceline_runtime::membership::{CatchUp, Mode};
use training::{Model, RANKS, check, check_of, config, set_pace};

/// How often ranks go through the samples: as long as a job may wait for a newcomer.
const PASSES: u64 = 60;

/// How long a gradient takes while the test waits for something.
const SLOW: Duration = Duration::from_millis(30);

fn main() {
    job::main(rank, || {
        vec![
            trial("a_spare_takes_the_place_of_a_killed_worker_and_no_bit_of_the_result_changes", || {
                with_a_spare(Mode::Slots, 1);
            }),
            trial("a_killed_spare_changes_nothing_for_those_who_contribute", || {
                with_a_spare(Mode::Slots, SPARE);
            }),
            trial("with_a_spare_no_step_has_fewer_contributors_and_every_sample_is_used_once", || {
                with_a_spare(Mode::Shrink, 0);
            }),
            trial(
                "a_newcomer_takes_over_a_state_that_a_member_has_made_and_nothing_is_applied_twice",
                states,
            ),
            trial("where_states_differ_a_checkpoint_is_of_one_of_them", saved),
            trial("a_program_that_asks_for_another_way_to_catch_up_is_refused_in_a_line", mixed),
        ]
    });
}

/// The rank that has no slot at first: the newest worker.
const SPARE: usize = RANKS - 1;

// ---- the program ----

/// The model, whose gradients take time until the test says otherwise, with an optimizer that leaves something of chance
/// in the state if it is to.
struct Subject {
    model: Model,
    /// What the optimizer has left.
    chance: Vec<u64>,
    rng: Option<Rng>,
    /// What this process has left there last.
    left: Option<u64>,
    /// Whether this process has computed something for the step.
    has_computed: bool,
    gradients: u64,
    pace: PathBuf,
    hurries: bool,
}

impl Subject {
    fn new(pace: PathBuf, rng: Option<Rng>) -> Self {
        let (model, chance, left) = (Model::new(None), vec![1], None);
        Self { model, chance, rng, left, has_computed: false, gradients: 0, pace, hurries: false }
    }

    /// An optimizer that cannot be replayed: it needs what its own process has computed for the step.
    fn add_chance(&mut self) {
        let Some(rng) = &mut self.rng else { return };
        let steps = self.model.steps[0];
        assert!(std::mem::take(&mut self.has_computed), "step {} is replayed", steps + 1);
        if self.left != Some(self.chance[0]) {
            println!("took {steps} {}", self.chance[0]);
        }
        self.chance[0] ^= rng.u64(..);
        self.left = Some(self.chance[0]);
        println!("made {} {}", steps + 1, self.chance[0]);
    }
}

impl Program for Subject {
    type Gradient = f64;

    fn gradient_len(&self) -> usize {
        self.model.gradient_len()
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        let mut state = self.model.state();
        state.push(Tensor::new("chance", &mut self.chance));
        state
    }

    fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
        (self.has_computed, self.gradients) = (true, self.gradients + 1);
        self.hurries = self.hurries || self.pace.exists();
        if !self.hurries {
            std::thread::sleep(SLOW);
        }
        self.model.gradient(samples, gradient)
    }

    fn apply(&mut self, gradient: &[f64]) {
        self.add_chance();
        self.model.apply(gradient);
    }

    fn stable(&mut self, stable: &Stable) {
        let Stable { step, epoch, members, contributors, .. } = stable;
        println!("stable {} epoch {} members {members} contributors {contributors}", step.0, epoch.0);
    }
}

fn rank(part: &str, args: &[String]) {
    println!("process {}", std::process::id());
    let mode = if part == "shrink" { Mode::Shrink } else { Mode::Slots };
    let mut config = config(mode, args[0].parse().expect("a number of passes"));
    let takes_states = match part {
        "states" | "saved" => true,
        "mixed" => std::env::var("RANK").is_ok_and(|rank| rank == "1"),
        _ => false,
    };
    match takes_states {
        true => config.catch_up = CatchUp::State,
        false => config.spares = usize::from(part != "mixed"),
    }
    if part == "saved" {
        (config.checkpoint, config.checkpoint_every) = (Some(folder_of(args[1].as_ref())), 4);
    }
    let mut subject = Subject::new(args[1].clone().into(), takes_states.then(Rng::new));
    match elastic::train(&config, &mut subject).unwrap_or_else(|error| panic!("{error}")) {
        End::Complete => {
            let (least, most) = subject.model.used();
            println!("complete digest {} least {least} most {most}", subject.model.digest());
            println!("chance {} gradients {}", subject.chance[0], subject.gradients);
        }
        end => println!("ended with {end:?}"),
    }
}

/// The folder for checkpoints.
fn folder_of(pace: &Path) -> PathBuf {
    pace.with_extension("saved")
}

// ---- jobs ----

fn start(part: &str, variables: &[(&str, &str)], pace: &Path) -> Job {
    let flags = ["-n", &RANKS.to_string(), "--max-restarts", "100"];
    Job::launch(&flags, variables, part, &[&PASSES.to_string(), &pace.to_string_lossy()])
}

/// The job, in which ranks kill themselves at these points.
fn start_with_deaths(part: &str, failpoints: &str, pace: &Path) -> Job {
    start(part, &[("PACELINE_FAILPOINT", failpoints)], pace)
}

/// Lets the job end when the processes that took the place of the first ones of these ranks are members.
fn finish_when_back(mut job: Job, ranks: &[usize], pace: &Path) -> Finished {
    let mut missing: BTreeSet<usize> = ranks.iter().copied().collect();
    let mut processes = BTreeMap::<usize, u32>::new();
    while !missing.is_empty() {
        let line = job.next_line().unwrap_or_else(|| panic!("the job ended:\n{}", job.seen.join("\n")));
        let Some((rank, said)) = of_rank(&line) else { continue };
        if said.starts_with("process ") {
            *processes.entry(rank).or_default() += 1;
        } else if said.starts_with("stable ") && processes.get(&rank).is_some_and(|&count| count > 1) {
            missing.remove(&rank);
        }
    }
    set_pace(pace, 1);
    let finished = job.finish();
    finished.assert_success();
    finished
}

/// Which rank has said this, and what.
fn of_rank(line: &str) -> Option<(usize, &str)> {
    let (rank, said) = line.strip_prefix('[')?.split_once("]: ")?;
    Some((rank.parse().ok()?, said))
}

/// What ranks have said that begins with this word: a number and another one.
fn numbers(finished: &Finished, word: &str) -> Vec<(usize, u64, u64)> {
    let said = finished.lines.iter().filter_map(|line| of_rank(line));
    let of_word = said.filter_map(|(rank, said)| {
        let numbers: Vec<u64> =
            said.strip_prefix(word)?.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        Some((rank, *numbers.first()?, *numbers.get(1)?))
    });
    of_word.collect()
}

fn with_a_spare(mode: Mode, victim: usize) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let part = if mode == Mode::Slots { "slots" } else { "shrink" };
    let job = start_with_deaths(part, &format!("rank={victim},step=5,op=reduced,life=0"), &pace);
    let finished = finish_when_back(job, &[victim], &pace);
    let all = finished.lines.join("\n");
    let stable = finished.lines_with("stable ");
    assert!(stable.iter().all(|line| line.ends_with("contributors 3")), "{all}");
    assert!(stable.iter().any(|line| line.contains("members 3 ")), "its loss was seen:\n{all}");
    check_of(RANKS - 1, &finished.lines_with("complete digest "), mode, PASSES);
    let computed = numbers(&finished, "chance ").into_iter().find(|&(rank, ..)| rank == SPARE);
    assert_eq!(computed.is_some_and(|(.., gradients)| gradients > 0), victim != SPARE, "{all}");
}

fn states() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let deaths = "rank=1,step=3,op=reduced,life=0;rank=0,step=8,op=applied,life=0";
    let finished = finish_when_back(start_with_deaths("states", deaths, &pace), &[0, 1], &pace);
    let all = finished.lines.join("\n");
    let made = numbers(&finished, "made ");
    let taken: Vec<_> = numbers(&finished, "took ").into_iter().filter(|&(_, step, _)| step > 0).collect();
    for &(rank, step, chance) in &taken {
        let is_source =
            |&(other, of, made): &(usize, u64, u64)| other != rank && (of, made) == (step, chance);
        assert!(made.iter().any(is_source), "nobody has made what rank {rank} took after {step}:\n{all}");
    }
    assert!([0, 1].iter().all(|rank| taken.iter().any(|(by, ..)| by == rank)), "{all}");
    let ends: BTreeSet<u64> =
        numbers(&finished, "chance ").into_iter().map(|(_, chance, _)| chance).collect();
    assert!(ends.len() > 1, "or this test shows nothing:\n{all}");
    // What is not of chance is as if nobody had been lost.
    check(&finished.lines_with("complete digest "), Mode::Slots, PASSES);
}

fn saved() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let job = start_with_deaths("saved", "rank=0,step=6,op=applied,life=0", &pace);
    let first = finish_when_back(job, &[0], &pace);
    let made: BTreeSet<u64> = numbers(&first, "made ").into_iter().map(|(.., chance)| chance).collect();
    let checkpoints = fs::read_dir(folder_of(&pace)).expect("there is one").map(|entry| {
        let path = entry.expect("it can be read").path();
        let files = fs::read_dir(&path).expect("a checkpoint").filter_map(Result::ok);
        let names = files.filter_map(|file| file.file_name().into_string().ok());
        names.filter(|name| name.starts_with("shard-")).collect::<Vec<_>>()
    });
    let checkpoints: Vec<_> = checkpoints.collect();
    assert!(!checkpoints.is_empty(), "{}", first.lines.join("\n"));
    assert!(
        checkpoints.iter().all(|shards| shards == &["shard-00000-of-00001.safetensors"]),
        "{checkpoints:?}"
    );
    // All is done, so each rank ends with what was saved.
    let second = start("saved", &[], &pace).finish();
    second.assert_success();
    let ends: BTreeSet<u64> = numbers(&second, "chance ").into_iter().map(|(_, chance, _)| chance).collect();
    assert_eq!(ends.len(), 1, "{}", second.lines.join("\n"));
    assert!(ends.is_subset(&made), "a state that nobody has had:\n{}", second.lines.join("\n"));
}

fn mixed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("pace").to_string_lossy().into_owned();
    let finished = Job::launch(&["-n", "2"], &[], "mixed", &["1", &path]).finish();
    assert!(!finished.status.success());
    let is_refusal = |line: &&String| {
        line.contains("catch_up: State") && line.contains("start the same program on all workers")
    };
    assert!(finished.lines.iter().any(|line| is_refusal(&line)), "{}", finished.lines.join("\n"));
}
