//! What ranks did last, as files: written when a rank fails and when the launcher is asked, and read as PyTorch's
//! analyser does. One test runs that analyser itself, where it is installed (`cargo xtask flight-recorder`).

#![allow(clippy::print_stderr, reason = "ranks talk to the test by their output")]

mod job;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use job::{Job, PATIENCE, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use serde::Deserialize;
use serde_pickle::DeOptions;

/// The ranks of each job here.
const RANKS: usize = 3;

fn main() {
    job::main(rank, || {
        vec![
            trial("when_a_rank_is_late_all_ranks_write_what_they_did_last", late),
            trial("when_ranks_disagree_each_writes_what_it_called", mismatched),
            trial("on_sigusr1_all_ranks_write_what_they_did_last_and_go_on", asked),
            trial("pytorchs_analyser_names_the_late_rank_and_the_mismatch", analysed).with_ignored_flag(true),
        ]
    });
}

/// A trace, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Trace {
    version: String,
    rank: usize,
    pg_config: BTreeMap<String, Group>,
    entries: Vec<Entry>,
    paceline: Paceline,
}

#[derive(Debug, Deserialize)]
struct Group {
    ranks: String,
}

#[derive(Debug, Deserialize)]
struct Entry {
    profiling_name: String,
    collective_seq_id: i64,
    state: String,
    time_created_ns: u64,
    time_discovered_completed_ns: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Paceline {
    failure: Option<String>,
}

impl Trace {
    fn read(folder: &Path, rank: usize) -> Self {
        let bytes = fs::read(folder.join(format!("rank_{rank}"))).expect("the trace was written");
        let trace: Self = serde_pickle::from_slice(&bytes, DeOptions::new()).expect("a trace in the schema");
        assert_eq!((trace.version.as_str(), trace.rank), ("2.10", rank));
        assert_eq!(trace.pg_config["0"].ranks, "[0, 1, 2]");
        trace
    }

    /// Name, number and state of the last call.
    fn last(&self) -> (&str, i64, &str) {
        let last = self.entries.last().expect("there was a call");
        (&last.profiling_name, last.collective_seq_id, &last.state)
    }
}

/// Where a job's traces are, and beside them the ranks' notes that they have failed.
struct Folder {
    root: tempfile::TempDir,
}

impl Folder {
    fn path(&self) -> PathBuf {
        self.root.path().join("traces")
    }
}

/// Runs a job that fails, and returns the folder with its traces.
fn failed_job(part: &str) -> Folder {
    let folder = Folder { root: tempfile::tempdir().expect("a folder") };
    fs::create_dir(folder.path()).expect("the folder can be written");
    let path = folder.path();
    let path = path.to_str().expect("a temporary folder has a plain name");
    let flags = ["--flight-recorder", path, "--timeout", "3"];
    let finished =
        Job::start(RANKS, &flags, part, &[path.to_owned()].each_ref().map(String::as_str)).finish();
    assert_eq!(finished.status.code(), Some(1), "{}", finished.lines.join("\n"));
    folder
}

fn late() {
    let folder = failed_job("late");
    for rank in [0, 2] {
        let trace = Trace::read(&folder.path(), rank);
        assert_eq!(trace.last(), ("nccl:all_reduce", 4, "started"), "rank {rank}");
        let completed = trace.entries.iter().filter(|entry| entry.state == "completed");
        assert!(completed.clone().count() == 3, "rank {rank}: {:?}", trace.entries);
        let ordered = |entry: &Entry| entry.time_discovered_completed_ns >= Some(entry.time_created_ns);
        assert!(completed.clone().all(ordered), "rank {rank}: {:?}", trace.entries);
        let failure = trace.paceline.failure.expect("it has failed");
        assert!(failure.contains("waiting for rank 1"), "rank {rank}: {failure}");
    }
    let trace = Trace::read(&folder.path(), 1);
    assert_eq!(trace.last(), ("nccl:all_reduce", 3, "completed"), "the late rank has noticed nothing");
    assert_eq!(trace.paceline.failure, None);
}

fn mismatched() {
    let folder = failed_job("mismatch");
    for rank in 0..RANKS {
        let trace = Trace::read(&folder.path(), rank);
        let called = if rank == 1 { "nccl:broadcast" } else { "nccl:all_reduce" };
        assert_eq!(trace.last(), (called, 4, "started"), "rank {rank}");
        assert!(trace.paceline.failure.is_some_and(|failure| failure.contains("mismatched calls")));
    }
}

fn asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("a temporary folder has a plain name");
    let mut job = Job::start(RANKS, &["--flight-recorder", path], "loop", &[]);
    job.wait_for("looping", RANKS);
    let signal = |name: &str| {
        let pid = job.launcher.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().expect("kill runs").success());
    };
    signal("-USR1");
    (0..RANKS).for_each(|rank| wait_for_trace(folder.path(), rank));
    signal("-TERM");
    let finished = job.finish();
    assert_eq!(finished.status.code(), Some(128 + 15), "{}", finished.lines.join("\n"));
    for rank in 0..RANKS {
        let trace = Trace::read(folder.path(), rank);
        let numbers: Vec<i64> = trace.entries.iter().map(|entry| entry.collective_seq_id).collect();
        // The one that is written while the trace is taken may be left out.
        assert!(numbers.len() >= 1999 && numbers.is_sorted(), "rank {rank}: {numbers:?}");
        let completed = trace.entries.iter().filter(|entry| entry.state == "completed").count();
        assert!(completed + 1 >= numbers.len(), "rank {rank}: all but the present one");
    }
}

fn analysed() {
    let environment =
        std::env::var("VIRTUAL_ENV").expect("an environment with torch; cargo xtask flight-recorder");
    let said = analyse(&environment, &failed_job("late").path());
    assert!(said.contains("Not all ranks joining collective, sequence number: 4"), "{said}");
    assert!(said.contains("missing ranks: {1}"), "{said}");
    assert_eq!(said.matches("sequence number").count(), 1, "the calls before are in order: {said}");
    let said = analyse(&environment, &failed_job("mismatch").path());
    assert!(said.contains("Collective sequence number: 4 has errors"), "{said}");
    let expected = "Culprit rank 1; Error type: COLLECTIVE_TYPE_MISMATCH, Expected collective type: 'all_reduce' does \
                    not match found collective type: 'broadcast'";
    assert!(said.contains(expected), "{said}");
}

/// What PyTorch's analyser says about the traces in a folder.
fn analyse(environment: &str, folder: &Path) -> String {
    let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/analyse.py");
    let mut python = Command::new(Path::new(environment).join("bin/python"));
    let output =
        python.arg(runner).arg(site_packages(environment)).arg(folder).output().expect("python starts");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    said
}

fn site_packages(environment: &str) -> PathBuf {
    let lib = fs::read_dir(Path::new(environment).join("lib")).expect("the environment has libraries");
    let mut folders = lib.flatten().map(|entry| entry.path().join("site-packages"));
    folders.find(|folder| folder.join("torch").is_dir()).expect("torch is installed")
}

fn rank(part: &str, args: &[String]) {
    let mut world = World::join().expect("all come");
    let mut sum = [1.0f32; 2];
    if part == "loop" {
        return looping(&mut world);
    }
    for _ in 0..3 {
        world.communicator().all_reduce(&mut sum, ReduceOp::Sum).expect("all call it");
    }
    let folder = Path::new(&args[0]);
    // A rank that fails takes the others along that are still in the call before.
    meet(folder, "came_through", world.rank());
    let error = match (part, world.rank()) {
        // It comes when the others have given up.
        ("late", 1) => {
            wait_for_trace(folder, 1);
            std::process::exit(1);
        }
        ("mismatch", 1) => world.communicator().broadcast(&mut sum, 0).expect_err("the others call another"),
        _ => world.communicator().all_reduce(&mut sum, ReduceOp::Sum).expect_err("rank 1 does not call it"),
    };
    eprintln!("rank {} failed with: {error}", world.rank());
    // Or the launcher would end ranks before they have failed, or have been asked.
    if part == "late" {
        fs::write(note(folder, "failed", world.rank()), "").expect("the folder can be written");
        [0, 2].into_iter().for_each(|rank| wait_for(&note(folder, "failed", rank)));
        wait_for_trace(folder, 1);
    } else {
        meet(folder, "failed", world.rank());
    }
    std::process::exit(1);
}

/// Where a rank says how far it is, beside the traces.
fn note(folder: &Path, what: &str, rank: usize) -> PathBuf {
    folder.with_file_name(format!("{what}_{rank}"))
}

/// Waits until all ranks are as far.
fn meet(folder: &Path, what: &str, rank: usize) {
    fs::write(note(folder, what, rank), "").expect("the folder can be written");
    (0..RANKS).for_each(|rank| wait_for(&note(folder, what, rank)));
}

fn looping(world: &mut World) {
    for round in 0.. {
        if let Err(error) = world.communicator().all_reduce(&mut [1.0f32], ReduceOp::Max) {
            return eprintln!("the launcher ends the job: {error}");
        }
        if round == 3000 {
            eprintln!("rank {} looping", world.rank());
        }
    }
}

fn wait_for_trace(folder: &Path, rank: usize) {
    wait_for(&folder.join(format!("rank_{rank}")));
}

fn wait_for(file: &Path) {
    let deadline = Instant::now() + PATIENCE / 2;
    while !file.exists() {
        assert!(Instant::now() < deadline, "nobody writes {}", file.display());
        thread::sleep(Duration::from_millis(5));
    }
}
