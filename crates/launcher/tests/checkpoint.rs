//! Checkpoints of real jobs: killed with SIGKILL at random moments while they write, and with a limit on the size of
//! files. What is under the name of a checkpoint is whole, and the job goes on from there on another number of ranks.
//!
//! `PACELINE_CHECKPOINT_KILLS=50` kills more often.

#![allow(clippy::print_stdout, reason = "ranks tell the test how far they are")]

mod job;

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use job::{Job, trial};
use paceline_runtime::World;
use paceline_runtime::checkpoint::{
    self, Checkpoint, Checkpointer, Disk, Error, Group, Layout, Listing, LocalDisk, Notes, Output, Settings,
    Tensor, TensorMut,
};
use paceline_runtime::collectives::ReduceOp;
use paceline_runtime::digest::Digest;
use paceline_runtime::sampler::{Sampler, SamplerState};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Of a file's size; Linux's number on all processors that Rust knows but MIPS.
const SIGXFSZ: i32 = 25;

/// Shards of half a megabyte and more, so that a kill mostly hits one that is being written.
const ROWS: usize = 500;
const COLUMNS: usize = 1_000;

/// More steps than any job makes before it is killed.
const FOR_EVER: &str = "1000000000";

fn main() {
    job::main(rank, || {
        vec![
            trial("a_job_that_is_killed_while_it_saves_goes_on_from_a_whole_checkpoint", killed_while_saving),
            trial(
                "a_writer_without_a_final_rename_is_found_by_the_same_test",
                a_writer_without_a_final_rename,
            ),
            trial("a_disk_that_takes_no_more_costs_checkpoints_and_nothing_else", a_full_disk),
        ]
    });
}

fn killed_while_saving() {
    let kills =
        std::env::var("PACELINE_CHECKPOINT_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let folder = tempfile::tempdir().expect("a folder");
    let mut made = 0;
    for kill in 0..kills {
        made = train_and_kill(folder.path(), "renamed", kill, made);
        check(folder.path(), made).expect("what is under the name of a checkpoint is whole");
    }
    // The newest may be newer than what the last job still said.
    let listing = Listing::of(&LocalDisk, folder.path()).expect("it can be read");
    let last = listing.committed.first().map_or(0, |newest| newest.step) + 5;
    let job = Job::start(2, &[], "renamed", &[text(folder.path()), &last.to_string()]).finish();
    job.assert_success();
    let ends = job.lines_with("digest");
    let expected = format!("digest {}", Model::after(last).digest());
    assert!(ends.len() == 2 && ends.iter().all(|line| line.contains(&expected)), "{ends:?}, not {expected}");
}

/// The negative control: checkpoints that get their names first and their contents later.
fn a_writer_without_a_final_rename() {
    let folder = tempfile::tempdir().expect("a folder");
    let found = (0..40).find_map(|kill| {
        train_and_kill(folder.path(), "in-place", kill, 0);
        check(folder.path(), 0).err()
    });
    assert!(matches!(found, Some(Error::Damaged { .. })), "{found:?}");
}

/// Trains on 4 and 3 ranks by turns, from a checkpoint of at least step `made`, and kills the job or one of its ranks
/// at a random moment. The newest step that it said was saved.
fn train_and_kill(folder: &Path, part: &str, kill: u64, made: u64) -> u64 {
    let mut random = fastrand::Rng::with_seed(kill);
    let ranks = if kill.is_multiple_of(2) { 4 } else { 3 };
    let mut job = Job::start(ranks, &[], part, &[text(folder), FOR_EVER]);
    let started = job.wait_for("goes on after step", ranks);
    let number = |line: &str, before: &str| -> u64 {
        let (_, number) = line.split_once(before).expect("the line has it");
        number.split(' ').next().and_then(|number| number.parse().ok()).expect("a number")
    };
    let from: Vec<u64> = started.iter().map(|line| number(line, "goes on after step ")).collect();
    assert!(from.iter().all(|&step| step == from[0] && step >= made), "{from:?} after {made}");
    job.wait_for("made step", random.usize(0..3));
    // A random moment, not a wait for something.
    std::thread::sleep(Duration::from_micros(random.u64(0..30_000)));
    match random.usize(0..=ranks) {
        rank if rank < ranks => {
            let pid = number(&started[rank], "pid ").to_string();
            assert!(Command::new("kill").args(["-9", &pid]).status().expect("kill runs").success());
        }
        _ => job.launcher.kill().expect("it runs"),
    }
    let ended = job.finish();
    ended.lines_with("made step").iter().map(|line| number(line, "made step ")).fold(from[0], u64::max)
}

/// Whether every checkpoint is whole, and the newest at least that of step `made`.
fn check(folder: &Path, made: u64) -> Result<(), Error> {
    let listing = Listing::of(&LocalDisk, folder)?;
    for name in &listing.committed {
        Checkpoint::open(&LocalDisk, folder, name)?.verify()?;
    }
    assert!(listing.rejected.is_empty(), "a resume has found a damaged one: {listing:?}");
    assert!(listing.committed.first().map_or(0, |newest| newest.step) >= made, "{listing:?} after {made}");
    Ok(())
}

fn a_full_disk() {
    let folder = tempfile::tempdir().expect("a folder");
    let job = Job::start(2, &[], "full", &[text(folder.path()), "12"]).finish();
    job.assert_success();
    assert!(!job.lines_with("no checkpoint; training goes on without it").is_empty(), "{:?}", job.lines);
    assert!(!job.lines_with("File too large").is_empty(), "{:?}", job.lines);
    let listing = Listing::of(&LocalDisk, folder.path()).expect("it can be read");
    assert_eq!(listing.unfinished, 0, "nothing of those is left");
    assert_eq!(listing.committed.first().map(|newest| newest.step), Some(12), "room was made again");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the path is text")
}

struct Model {
    weights: Vec<f32>,
    moments: Vec<f64>,
}

impl Model {
    fn new() -> Self {
        Self { weights: vec![0.0; ROWS * COLUMNS], moments: vec![0.0; ROWS] }
    }

    /// The state that an undisturbed training has after that step.
    fn after(step: u64) -> Self {
        let (mut model, mut sampler) = (Self::new(), sampler());
        for step in 0..step as usize {
            let (epoch, step) = (step / sampler.steps_per_epoch(), step % sampler.steps_per_epoch());
            model.apply(&gradient(&sampler.batch(epoch as u64, step, 0, 1).expect("one rank takes all")));
        }
        model
    }

    fn apply(&mut self, gradient: &[f32]) {
        for (row, weights) in self.weights.chunks_mut(COLUMNS).enumerate() {
            self.moments[row] = 0.9 * self.moments[row] + f64::from(gradient[row]);
            weights.iter_mut().enumerate().for_each(|(column, weight)| {
                *weight = 0.99 * *weight + self.moments[row] as f32 / (1 + column) as f32;
            });
        }
    }

    fn tensors(&self) -> [Tensor<'_>; 2] {
        [
            Tensor::new("weights", &[ROWS, COLUMNS], &self.weights),
            Tensor::new("moments", &[ROWS], &self.moments),
        ]
    }

    fn tensors_mut(&mut self) -> [TensorMut<'_>; 2] {
        [
            TensorMut::new("weights", &[ROWS, COLUMNS], &mut self.weights),
            TensorMut::new("moments", &[ROWS], &mut self.moments),
        ]
    }

    fn digest(&self) -> String {
        let moments: Vec<f32> = self.moments.iter().map(|&moment| moment as f32).collect();
        Digest::of([self.weights.as_slice(), &moments]).to_string()
    }
}

/// Batches that 1, 2, 3 and 4 ranks can share.
fn sampler() -> Sampler {
    Sampler::new(100, 12, 5).expect("the batch fits")
}

/// Whole numbers, whose sum over any number of ranks is exact: each sample counts.
fn gradient(batch: &[usize]) -> Vec<f32> {
    let of_row = |row| batch.iter().map(|sample| ((sample * 7 + row * 3) % 101) as f32).sum();
    (0..ROWS).map(of_row).collect()
}

fn rank(part: &str, args: &[String]) {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_ansi(false)
        .init();
    let (folder, last) = (Path::new(&args[0]), args[1].parse::<u64>().expect("a number"));
    let mut world = World::join().expect("all ranks are started");
    let mut training = Training::resume(&mut world, folder);
    println!("rank {} goes on after step {} pid {}", world.rank(), training.step, std::process::id());
    let layout = Layout::of(&training.model.tensors()).expect("the shapes fit");
    let group = Group::agree(world.communicator(), &layout).expect("all have the same");
    let disk: Arc<dyn Disk> = if part == "in-place" { Arc::new(InPlace) } else { Arc::new(LocalDisk) };
    let mut checkpointer = Checkpointer::open_on(disk, folder, group, layout, Settings::default())
        .expect("the folder can be made");
    let mut said = 0;
    while training.step < last {
        training.make_a_step(&mut world);
        if part == "full" {
            // Each checkpoint is written, or not, before the next.
            checkpointer.wait().expect("the disk answers");
            world.communicator().barrier().expect("all ranks call it");
            limit_files(world.rank() == 1 && training.step < last);
        }
        training.save(&mut world, &mut checkpointer);
        said = say(world.rank(), &mut checkpointer, said);
    }
    checkpointer.finish().expect("the disk answers");
    println!("rank {} ends with digest {}", world.rank(), training.model.digest());
    world.leave().expect("all ranks leave");
}

struct Training {
    model: Model,
    step: u64,
    sampler: Sampler,
    /// Of the next batch.
    epoch: u64,
    batch: usize,
}

impl Training {
    fn resume(world: &mut World, folder: &Path) -> Self {
        let (mut model, sampler) = (Model::new(), sampler());
        let resumed = checkpoint::resume(world.communicator(), folder, &mut model.tensors_mut())
            .expect("what there is can be used");
        let Some(resumed) = resumed else { return Self { model, step: 0, sampler, epoch: 0, batch: 0 } };
        let state: SamplerState = resumed.notes.get("sampler").expect("it is one").expect("it was saved");
        let (epoch, batch) = sampler.resume(&state).expect("it is the same");
        Self { model, step: resumed.step, sampler, epoch, batch }
    }

    fn make_a_step(&mut self, world: &mut World) {
        let samples = self.sampler.batch(self.epoch, self.batch, world.rank(), world.world_size());
        let mut gradient = gradient(&samples.expect("it can be shared"));
        world.communicator().all_reduce(&mut gradient, ReduceOp::Sum).expect("all ranks call it");
        self.model.apply(&gradient);
        self.step += 1;
        self.batch += 1;
        if self.batch == self.sampler.steps_per_epoch() {
            (self.epoch, self.batch) = (self.epoch + 1, 0);
        }
    }

    fn save(&self, world: &mut World, checkpointer: &mut Checkpointer) {
        let stable = checkpointer.agree(world.communicator(), self.step).expect("all are at it");
        if let Some(stable) = stable {
            let mut notes = Notes::default();
            notes.put("sampler", &self.sampler.state(self.epoch, self.batch)).expect("numbers");
            checkpointer.save(stable, &self.model.tensors(), notes).expect("nothing is wrong");
        }
    }
}

/// Says which checkpoint has been made, once.
fn say(rank: usize, checkpointer: &mut Checkpointer, said: u64) -> u64 {
    match checkpointer.outcome() {
        Some(outcome) if outcome.step > said && matches!(outcome.result, Ok(Some(_))) => {
            println!("rank {rank} made step {}", outcome.step);
            outcome.step
        }
        _ => said,
    }
}

/// Files of this process may have 100 kB, or as much as they like.
fn limit_files(limited: bool) {
    // Otherwise the kernel ends whoever writes more.
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).expect("the signal can be caught");
    let maximum = getrlimit(Resource::Fsize).maximum;
    let current = if limited { Some(100_000) } else { maximum };
    setrlimit(Resource::Fsize, Rlimit { current, maximum }).expect("a soft limit can be moved");
}

/// A disk for writers who do not know of the rename at the end: a checkpoint has a checkpoint's name from the start.
#[derive(Debug)]
struct InPlace;

impl InPlace {
    fn place(path: &Path) -> PathBuf {
        PathBuf::from(text(path).replace(".writing-", ""))
    }
}

impl Disk for InPlace {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.create_folder(&Self::place(path))
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        LocalDisk.create(&Self::place(path))
    }
    fn open(&self, path: &Path) -> io::Result<(Box<dyn Read>, u64)> {
        LocalDisk.open(&Self::place(path))
    }
    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.sync_folder(&Self::place(path))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        LocalDisk.rename(&Self::place(from), &Self::place(to))
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove_file(&Self::place(path))
    }
    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove_folder(&Self::place(path))
    }
    fn names(&self, path: &Path) -> io::Result<Vec<String>> {
        LocalDisk.names(path)
    }
}
