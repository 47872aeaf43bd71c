//! The real torchrun, for the tests that run beside it and for the comparison of what a start costs.
//!
//! torch's libraries are those of [`torch`]; the Python packages that torchrun imports have an environment of their own. In place of
//! CUDA's libraries, which `import torch` loads and nobody calls, there are empty ones (`xtask/torchrun/stubs.py`).

use crate::environment::{self, Recipe};
use crate::process::{self, Watch, cargo};
use crate::step::{Budget, Report};
use crate::suites::{self, Total};
use crate::{torch, workspace};
use anyhow::{Context, Result, ensure};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

const RECIPE: Recipe = Recipe {
    what: "torchrun's Python packages",
    name: "torchrun-2.11.0",
    // What `import torch` of 2.11.0 needs; without numpy it says so and goes on.
    packages: &[
        "typing_extensions==4.15.0",
        "filelock==3.20.0",
        "sympy==1.14.0",
        "mpmath==1.3.0",
        "networkx==3.4.2",
        "jinja2==3.1.6",
        "markupsafe==3.0.3",
        "fsspec==2025.10.0",
    ],
    cost: "a download of 10 MB",
    needed_bytes: 300_000_000,
    is_whole: |environment| environment.join("bin/python").exists(),
    must_work: |_| Ok(()),
};

/// Of the compilation, from nothing, of the tests beside torchrun and of the kills.
const MINUTES: [f64; 3] = [8.0, 4.0, 5.0];

#[derive(clap::Args)]
pub struct Options {
    /// Instead of the tests: time from the start to the worker's own start, and memory, of both launchers, so many times
    #[arg(long, value_name = "TIMES", num_args = 0..=1, default_missing_value = "10")]
    measure: Option<u32>,
    /// Instead of the tests: kill a worker, a launcher, and the launcher that leads with SIGKILL, so many times each, under
    /// three launchers, under two with a lease, and under torchrun, and say after how long the training goes on
    #[arg(long, value_name = "TIMES", conflicts_with = "measure")]
    kills: Option<u32>,
    /// With --kills: how often each is killed under torchrun, which takes up to two minutes each [default: as often]
    #[arg(long, value_name = "TIMES", requires = "kills")]
    torchrun_kills: Option<u32>,
}

/// Runs the tests beside torchrun, or measures both.
///
/// # Errors
/// A test fails, or torchrun cannot be set up.
pub fn run(options: &Options) -> Result<()> {
    match (options.measure, options.kills) {
        (Some(times), _) => measure(times),
        (None, Some(times)) => kill(times, options.torchrun_kills.unwrap_or(times)),
        (None, None) => suites::alone("torchrun", steps),
    }
}

/// The tests beside torchrun, for a report of their own or as part of a longer one.
///
/// # Errors
/// See [`run`].
pub fn steps(report: &mut Report) -> Result<Total> {
    let torchrun = Torchrun::ensure()?;
    let of = |suite: &[&str]| {
        let mut command = cargo(&[&["test", "--locked", "--workspace", "--test"], suite].concat());
        command.envs(torchrun.environment());
        command
    };
    let [compile, beside, kills] = MINUTES.map(Budget::minutes);
    report.step("tests beside torchrun: compile", compile, |limit| {
        process::run(of(&["side_by_side", "--test", "recovery", "--no-run"]), limit)
    })?;
    let total = suites::watched(report, "tests beside torchrun", beside, &|| of(&["side_by_side"]))?;
    // Three interpreters with PyTorch at a time are enough.
    let one_by_one = || of(&["recovery", "--", "--test-threads", "1"]);
    Ok(total.and(suites::watched(report, "kills under PyTorch", kills, &one_by_one)?))
}

/// From kill to kill on two busy cores, most of it imports of PyTorch, under three launchers and under two with a lease; under
/// torchrun each needs a job of its own, and is given up after two minutes.
const MINUTES_PER_KILL: [f64; 2] = [0.8, 2.5];

/// Kills each of the three so many times, under both launchers one after the other. The build is that of the tests: what is
/// measured is the programs' start, beside which the launcher's own part is milliseconds.
fn kill(ours: u32, theirs: u32) -> Result<()> {
    let torchrun = Torchrun::ensure()?;
    let suite = ["test", "--locked", "--workspace", "--test", "recovery", "--", "--ignored"];
    let mut command = cargo(&[&suite[..], &["--nocapture", "--test-threads", "1"]].concat());
    command.envs(torchrun.environment());
    command.env("PACELINE_TEST_KILLS", ours.to_string());
    command.env("PACELINE_TEST_TORCHRUN_KILLS", theirs.to_string());
    let per_victim = MINUTES_PER_KILL[0] * f64::from(ours) + MINUTES_PER_KILL[1] * f64::from(theirs);
    process::run(command, Budget::minutes(20.0 + 3.0 * per_victim).limit())
}

/// An interpreter that runs torchrun as `-m torch.distributed.run`.
pub struct Torchrun {
    python: PathBuf,
    packages: PathBuf,
    stubs: PathBuf,
}

impl Torchrun {
    /// Installs what is missing.
    ///
    /// # Errors
    /// See [`run`].
    pub fn ensure() -> Result<Self> {
        let torch = torch::ensure()?;
        let environment = environment::ensure(&RECIPE)?;
        let stubs = environment.join("lib/no-cuda");
        let python = environment.join("bin/python");
        // Beside the environment and not among its files: torch may have been set up anew.
        let mut make = Command::new(&python);
        make.arg(workspace::root().join("xtask/torchrun/stubs.py")).arg(torch.home().join("lib")).arg(&stubs);
        process::run(make, Duration::from_secs(300)).context("cannot make the libraries in CUDA's place")?;
        let packages = torch.home().parent().context("torch is in no folder")?.to_owned();
        Ok(Torchrun { python, packages, stubs })
    }

    /// The interpreter.
    pub fn python(&self) -> &Path {
        &self.python
    }

    /// PYTHON_EXEC is what both launchers run scripts with.
    pub fn environment(&self) -> [(&'static str, OsString); 3] {
        [
            ("PYTHON_EXEC", self.python.clone().into()),
            ("PYTHONPATH", self.packages.clone().into()),
            ("LD_LIBRARY_PATH", self.stubs.clone().into()),
        ]
    }
}

/// What one start cost.
struct Cost {
    seconds: f64,
    resident_bytes: u64,
}

/// Measures both launchers in turn, so that both see the same machine.
fn measure(times: u32) -> Result<()> {
    let torchrun = Torchrun::ensure()?;
    process::run(
        cargo(&["build", "--release", "--locked", "--package", "paceline"]),
        Duration::from_secs(1800),
    )?;
    let paceline = workspace::target().join("release/paceline");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let mut command = Command::new(&paceline);
        command.arg("run");
        ours.push(start(command, &torchrun)?);
        let mut command = Command::new(&torchrun.python);
        command.args(["-m", "torch.distributed.run"]);
        theirs.push(start(command, &torchrun)?);
    }
    println!(
        "from the start of the launcher to that of its worker, and the most memory it had; {times} times, in turn"
    );
    for (name, mut costs) in [("paceline run", ours), ("torchrun 2.11.0", theirs)] {
        costs.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
        let (median, most) = (&costs[costs.len() / 2], &costs[costs.len() - 1]);
        let resident = costs.iter().map(|cost| cost.resident_bytes).max().unwrap_or(0);
        println!(
            "{name:<16} median {:>7.1} ms   most {:>7.1} ms   resident {:>6.1} MB",
            median.seconds * 1e3,
            most.seconds * 1e3,
            resident as f64 / 1e6
        );
    }
    Ok(())
}

/// The worker says when it runs, and how much memory its parent has had. Two shell commands before it has read the clock take 2 ms, of
/// both launchers' time.
fn start(mut command: Command, torchrun: &Torchrun) -> Result<Cost> {
    const WORKER: &str = "date +%s.%N; grep VmHWM: /proc/$PPID/status";
    command.args(["--no-python", "--nproc-per-node", "1", "sh", "-c", WORKER]).envs(torchrun.environment());
    let mut lines = Vec::new();
    let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    let status = process::listen(command, Watch::Stdout, Duration::from_secs(60), &mut |line| {
        lines.push(line.trim_start_matches("[0]: ").to_owned());
    })?;
    process::must_succeed(status, "the launcher")?;
    ensure!(lines.len() == 2, "the worker has said something else: {lines:?}");
    let seconds = lines[0].parse::<f64>().context("no time")? - before;
    let kilobytes: Option<u64> = lines[1].split_whitespace().nth(1).and_then(|number| number.parse().ok());
    Ok(Cost { seconds, resident_bytes: kilobytes.context("no memory")? * 1024 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_that_makes_libraries_is_where_it_is_looked_for() {
        assert!(workspace::root().join("xtask/torchrun/stubs.py").is_file());
    }
}
