//! Workers that die at chosen points of a step, while they join and while they save, as real processes under the launcher.
//!
//! Each job has the bits of a run that nobody disturbed, and exactly the deaths that were ordered: a point that is not
//! passed any more fails its test. Also here: what is said while nothing fails.

#![allow(clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod job;
mod training;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use job::{Finished, Job, PATIENCE, trial};
use paceline_runtime::elastic::{self, Config, End, Program, Stable, Tensor};
use paceline_runtime::membership::Mode;
use rustix::process::{Pid, Signal, kill_process};
use training::{Model, RANKS, STEPS, config, set_pace};

/// How often ranks go through the samples: as long as a job may wait for a newcomer.
const PASSES: u64 = 60;

/// How long a gradient takes while the test waits for something.
const SLOW: Duration = Duration::from_millis(30);

/// Elements of the state besides the model's: a copy has several pieces, and its reduction several rounds.
const BALLAST: usize = 60_000;

/// As many as are under way for longer than a newcomer is waited for at this pace: it enters without the state, which comes
/// from all others at once then.
const WIDE_BALLAST: usize = 6_000_000;
const WIDE_PACE: Duration = Duration::from_millis(5);
const WIDE_PASSES: u64 = 150;

/// Steps and ranks at which a member dies: rank 0 is the one whose state the job began from, and its launcher's first.
const PLACES: [(u64, usize); 3] = [(1, 2), (3, 0), (4, 3)];

/// Links whose segments are small: the reduction has some ten rounds.
const SMALL_SEGMENTS: [(&str, &str); 2] =
    [("PACELINE_SHARED_MEMORY", "off"), ("PACELINE_SEGMENT_BYTES", "64")];

fn main() {
    job::main(rank, || {
        let mut trials = Vec::new();
        for (step, victim) in PLACES {
            for op in ["contribute", "reduced", "applied"] {
                let name = format!("death::rank_{victim}_at_{op}_of_step_{step}");
                trials.push(trial(name, move || {
                    dies(&format!("rank={victim},step={step},op={op},life=0"), &[])
                }));
            }
            for segment in [0, 1, 4] {
                let name = format!("death::rank_{victim}_in_round_{segment}_of_the_sum_of_step_{step}");
                let words = format!("rank={victim},step={step},op=reduce_scatter,segment={segment},life=0");
                trials.push(trial(name, move || dies(&words, &SMALL_SEGMENTS)));
            }
        }
        trials.push(trial("death::two_at_different_points_of_one_step", || {
            dies("rank=1,step=3,op=reduced,life=0;rank=2,step=3,op=applied,life=0", &[]);
        }));
        trials.push(trial("death::in_the_middle_of_a_sum_in_shared_memory", in_shared_memory));
        for (op, segment) in [("pull", Some(0)), ("pull", Some(2)), ("ready", None), ("install", None)] {
            let segment = segment.map_or(String::new(), |segment| format!(",segment={segment}"));
            let name = format!(
                "joining::a_newcomer_that_dies_at_{op}{}_disturbs_nobody",
                segment.replace([',', '='], "_")
            );
            trials.push(trial(name, move || {
                dies(&format!("rank=2,step=2,op=applied,life=0;rank=2,op={op},life=1{segment}"), &[]);
            }));
        }
        trials.push(trial("joining::a_state_comes_from_all_others_and_survives_the_death_of_one", stripes));
        for victim in [0, 3] {
            trials.push(trial(
                format!("saving::rank_{victim}_dies_with_its_share_half_written"),
                move || {
                    saves(victim);
                },
            ));
        }
        trials.push(trial("a_program_that_panics_in_its_gradient_is_replaced_and_changes_no_bit", panics));
        trials.push(trial("a_worker_that_stops_at_a_point_is_removed_and_comes_back", stops));
        trials.push(trial("a_failpoint_that_makes_no_sense_ends_the_job_with_a_line_that_says_so", nonsense));
        trials.push(trial("while_nothing_fails_no_message_is_said_but_heartbeats", silence));
        trials
    });
}

// ---- the program ----

/// The model with some more state, whose gradients take time until the test says otherwise.
struct Paced {
    model: Model,
    ballast: Vec<f64>,
    pace: PathBuf,
    /// How long a gradient takes until then.
    slow: Duration,
    hurries: bool,
    /// Panics where it can make this file, at the third step.
    panics: Option<PathBuf>,
    /// The elements of a gradient that are not the model's.
    padding: usize,
}

impl Paced {
    fn new(pace: PathBuf, padding: usize) -> Self {
        let (model, ballast) = (Model::new(None), vec![0.5; BALLAST]);
        Self { model, ballast, pace, slow: SLOW, hurries: false, panics: None, padding }
    }

    fn wide(self) -> Self {
        Self { ballast: vec![0.5; WIDE_BALLAST], slow: WIDE_PACE, ..self }
    }
}

impl Program for Paced {
    type Gradient = f64;

    fn gradient_len(&self) -> usize {
        self.model.gradient_len() + self.padding
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        let mut state = self.model.state();
        state.push(Tensor::new("ballast", &mut self.ballast));
        state
    }

    fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
        self.hurries = self.hurries || self.pace.exists();
        if !self.hurries {
            std::thread::sleep(self.slow);
        }
        if self.model.steps[0] == 2
            && let Some(file) = &self.panics
        {
            assert!(fs::File::create_new(file).is_err(), "this sample is not to my taste");
        }
        let own = self.model.gradient_len();
        self.model.gradient(samples, &mut gradient[..own])
    }

    fn apply(&mut self, gradient: &[f64]) {
        self.model.apply(&gradient[..self.model.gradient_len()]);
        let steps = self.model.steps[0] as usize;
        let place = steps % self.ballast.len();
        self.ballast[place] += gradient[0];
    }

    fn stable(&mut self, stable: &Stable) {
        let Stable { step, epoch, members, control_messages, .. } = stable;
        println!("stable {} epoch {} members {members} control {control_messages}", step.0, epoch.0);
    }
}

fn rank(part: &str, args: &[String]) {
    println!("process {}", std::process::id());
    let padding = if part == "long" { 400_000 } else { 0 };
    let mut config = config(Mode::Slots, args[0].parse().expect("a number of passes"));
    if part == "saving" {
        (config.checkpoint, config.checkpoint_every) = (Some(Path::new(&args[1]).with_extension("saved")), 4);
    }
    let program = Paced::new(args[1].clone().into(), padding);
    let mut program = if part == "wide" { program.wide() } else { program };
    if part == "panics" {
        program.panics = Some(Path::new(&args[1]).with_extension("panicked"));
    }
    match elastic::train(&config, &mut program).unwrap_or_else(|error| panic!("{error}")) {
        End::Complete => println!("complete digest {}", digest(&program)),
        end => println!("ended with {end:?}"),
    }
}

fn digest(program: &Paced) -> String {
    let ballast = paceline_runtime::digest::Digest::of([&program.ballast[..]]);
    format!("{} {ballast}", program.model.digest())
}

// ---- jobs with faults ----

/// A job as its output tells of it.
struct Watch {
    job: Job,
    pids: BTreeMap<usize, Pid>,
    /// What the present process of each rank has said last: the epoch and the number of members.
    ranks: BTreeMap<usize, (u64, usize)>,
    replaced: usize,
    processes: usize,
}

impl Watch {
    fn start(part: &str, failpoints: &str, variables: &[(&str, &str)], passes: u64, pace: &Path) -> Self {
        let mut all = vec![("PACELINE_FAILPOINT", failpoints)];
        all.extend_from_slice(variables);
        let flags = ["-n", &RANKS.to_string(), "--max-restarts", "100"];
        let job = Job::launch(&flags, &all, part, &[&passes.to_string(), &pace.to_string_lossy()]);
        Self { job, pids: BTreeMap::new(), ranks: BTreeMap::new(), replaced: 0, processes: 0 }
    }

    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "it never came to be that {what}:\n{}", self.tail());
            let Some(line) = self.job.next_line() else {
                panic!("the job ended before {what}:\n{}", self.tail());
            };
            self.read(&line);
        }
    }

    fn read(&mut self, line: &str) {
        if line.contains("takes its place") {
            self.replaced += 1;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let rank = || words[0].trim_matches(['[', ']', ':']).parse::<usize>().ok();
        let number = |at: usize| words[at].parse::<u64>().unwrap_or(0);
        match words[..] {
            [_, "process", pid] => {
                let Some(rank) = rank() else { return };
                self.processes += 1;
                self.pids.extend(pid.parse().ok().and_then(Pid::from_raw).map(|pid| (rank, pid)));
                self.ranks.remove(&rank);
            }
            [_, "stable", ..] => {
                self.ranks.extend(rank().map(|rank| (rank, (number(4), number(6) as usize))));
            }
            _ => {}
        }
    }

    fn is_whole(&self) -> bool {
        let newest = self.ranks.values().map(|&(epoch, _)| epoch).max();
        self.ranks.len() == RANKS && self.ranks.values().all(|&said| Some(said) == newest.map(|e| (e, RANKS)))
    }

    fn tail(&self) -> String {
        self.job.seen[self.job.seen.len().saturating_sub(60)..].join("\n")
    }

    /// Waits for so many deaths and until all are members again, and lets the job end.
    fn complete_after(mut self, deaths: usize, pace: &Path) -> Finished {
        // What a process has said before it died comes before the first word of its successor.
        let died = |w: &Self| w.replaced >= deaths && w.processes >= RANKS + deaths;
        self.until("all had died that were to die", died);
        self.until("all were members again", Self::is_whole);
        set_pace(pace, 1);
        let finished = self.job.finish();
        finished.assert_success();
        let replaced = finished.lines.iter().filter(|line| line.contains("takes its place"));
        assert_eq!(replaced.count(), deaths, "{}", finished.lines.join("\n"));
        finished
    }
}

fn dies(failpoints: &str, variables: &[(&str, &str)]) {
    run("pace", failpoints, variables, 0);
}

/// Runs a job with these failpoints, all of which kill, to its end, and compares its state with that of an undisturbed one.
fn run(part: &str, failpoints: &str, variables: &[(&str, &str)], padding: usize) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let watch = Watch::start(part, failpoints, variables, PASSES, &pace);
    let finished = watch.complete_after(failpoints.split(';').count(), &pace);
    let victims = failpoints.split(';').filter_map(|failpoint| failpoint.split(',').next());
    for victim in victims.filter_map(|rank| rank.strip_prefix("rank=")) {
        let words = format!("paceline: rank {victim} ");
        assert!(finished.lines.iter().any(|line| line.starts_with(&words)), "{}", finished.lines.join("\n"));
    }
    check(&finished, PASSES, Paced::new(pace, padding));
}

/// All that are complete have the bits of a run that nobody disturbed.
fn check(finished: &Finished, passes: u64, mut program: Paced) {
    let mut config: Config = config(Mode::Slots, passes);
    config.slots = Some(RANKS as u16);
    // There is a file of that name then: this one hurries.
    set_pace(&program.pace, 1);
    let mut quiet = Quiet(&mut program);
    assert_eq!(elastic::train(&config, &mut quiet), Ok(End::Complete));
    let complete = finished.lines_with("complete digest ");
    assert!(complete.len() >= RANKS - 1, "{} are complete:\n{}", complete.len(), finished.lines.join("\n"));
    let expected = digest(&program);
    assert!(complete.iter().all(|line| line.ends_with(&expected)), "{complete:?} and not {expected}");
}

/// The same program without a word.
struct Quiet<'a>(&'a mut Paced);

impl Program for Quiet<'_> {
    type Gradient = f64;

    fn gradient_len(&self) -> usize {
        self.0.gradient_len()
    }

    fn state(&mut self) -> Vec<Tensor<'_>> {
        self.0.state()
    }

    fn gradient(&mut self, samples: &[usize], gradient: &mut [f64]) -> f64 {
        self.0.gradient(samples, gradient)
    }

    fn apply(&mut self, gradient: &[f64]) {
        self.0.apply(gradient);
    }
}

/// With 3 MB the sum takes several blocks.
fn in_shared_memory() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (pace, passes) = (folder.path().join("pace"), 40);
    let failpoints = "rank=1,step=2,op=reduce_scatter,segment=2,life=0";
    let finished = Watch::start("long", failpoints, &[], passes, &pace).complete_after(1, &pace);
    check(&finished, passes, Paced::new(pace, 400_000));
}

/// Rank 2 dies, and its successor takes the state over while the others wait; of those rank 1 dies with a part of its stripe
/// sent, and its successor does the same.
fn stripes() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let failpoints = "rank=2,step=2,op=applied,life=0;rank=1,op=stripe,segment=20,life=0";
    let watch = Watch::start("wide", failpoints, &[], WIDE_PASSES, &pace);
    let finished = watch.complete_after(2, &pace);
    check(&finished, WIDE_PASSES, Paced::new(pace, 0).wide());
}

/// One of the ranks panics, and says so.
fn panics() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let finished = Watch::start("panics", "", &[], PASSES, &pace).complete_after(1, &pace);
    let said = finished.lines.iter().filter(|line| line.contains("this sample is not to my taste")).count();
    let reported = finished.lines.iter().any(|line| line.contains("code 101"));
    assert!(said == 1 && reported, "{}", finished.lines.join("\n"));
    check(&finished, PASSES, Paced::new(pace, 0));
}

fn saves(victim: usize) {
    run("saving", &format!("rank={victim},step=4,op=checkpoint,life=0"), &[], 0);
}

fn stops() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let failpoints = "rank=1,step=3,op=applied,life=0,action=stop";
    let mut watch = Watch::start("pace", failpoints, &[], PASSES, &pace);
    let others =
        |w: &Watch| [0, 2, 3].iter().all(|rank| w.ranks.get(rank).is_some_and(|said| said.1 == RANKS - 1));
    watch.until("the others went on without it", others);
    kill_process(watch.pids[&1], Signal::CONT).expect("it is there");
    let finished = watch.complete_after(0, &pace);
    check(&finished, PASSES, Paced::new(pace, 0));
}

fn nonsense() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pace = folder.path().join("pace");
    let flags = ["-n", "2"];
    let variables = [("PACELINE_FAILPOINT", "rank=1,op=lunch")];
    let (passes, path) = (PASSES.to_string(), pace.to_string_lossy());
    let finished = Job::launch(&flags, &variables, "pace", &[&passes, &path]).finish();
    assert!(!finished.status.success());
    let expect = "PACELINE_FAILPOINT: `lunch` is none of contribute, reduce_scatter, reduced, applied, pull, stripe, ready, \
                  install, checkpoint, for op=";
    assert!(finished.lines.iter().any(|line| line.contains(expect)), "{}", finished.lines.join("\n"));
}

// ---- without faults ----

/// A busy machine may take a worker for silent. So what counts are the steps within one epoch, of which there are many.
fn silence() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (pace, steps) = (folder.path().join("pace"), PASSES * STEPS);
    set_pace(&pace, 1);
    let (passes, path) = (PASSES.to_string(), pace.to_string_lossy());
    let finished = Job::launch(&["-n", &RANKS.to_string()], &[], "pace", &[&passes, &path]).finish();
    finished.assert_success();
    for rank in 0..RANKS {
        let start = format!("[{rank}]: stable ");
        let said = finished.lines.iter().filter_map(|line| line.strip_prefix(&start));
        let counts: Vec<u64> = said.filter_map(|line| line.rsplit_once("control ")?.1.parse().ok()).collect();
        assert!(counts[0] > 0, "the counter counts what is said to begin with");
        let quietest = counts.chunk_by(|one, next| one == next).map(<[u64]>::len).max();
        assert!(
            quietest.is_some_and(|quiet| quiet as u64 > steps / 2),
            "rank {rank} is quiet for {quietest:?} of {steps} steps: {counts:?}"
        );
    }
}
