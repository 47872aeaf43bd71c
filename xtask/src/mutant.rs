//! Tests of the tests: builds in which one thing is broken on purpose, and the test that must notice.
//!
//! Broken places are marked `#[cfg(paceline_mutant = "…")]` in the sources. Only our own packages are compiled with that:
//! cargo calls its RUSTC_WORKSPACE_WRAPPER for them and not for their dependencies, which are therefore compiled once.
//! The wrapper is this program under another name; the name says which mutant is wanted, and cargo tells builds with
//! differently named wrappers apart, so that both stand in the one target folder. Programs have one place there whoever has
//! built them: a mutant's stands in it until the next build of what is not broken, which the last step here is.

use crate::process::{self, Watch, cargo};
use crate::step::{Budget, Report};
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// A build that is broken on purpose.
struct Mutant {
    /// The value of the cfg `paceline_mutant`.
    name: &'static str,
    /// The test target that must fail; no other package has one of that name.
    test: &'static str,
    /// The failure must say one of these; anything else failed for another reason.
    complaints: &'static [&'static str],
}

/// All mutants. A new one needs its value in `check-cfg` of the workspace's Cargo.toml too.
const MUTANTS: &[Mutant] = &[Mutant {
    name: "skip_all_reduce",
    test: "data_parallel",
    complaints: &["ranks disagree", "differs from the single-rank run"],
}];

/// Our own packages once more where the tests of the workspace are compiled, and twice that from nothing.
const MINUTES: f64 = 6.0;

/// The wrapper's file name before the mutant's name.
const WRAPPER_PREFIX: &str = "rustc-with-mutant-";

/// Runs the mutants alone.
///
/// # Errors
/// See [`steps`].
pub fn run() -> Result<()> {
    let mut report = Report::new("mutants");
    let outcome = steps(&mut report);
    report.close(outcome)
}

/// The mutants' steps, for a report of their own or as part of a longer one.
///
/// # Errors
/// A mutant does not compile, its test passes, or the test fails without the expected complaint.
pub fn steps(report: &mut Report) -> Result<()> {
    MUTANTS.iter().try_for_each(|mutant| {
        let name = format!("mutant: {}", mutant.name);
        report.step(&name, Budget::minutes(MINUTES), |limit| {
            let noticed = mutant.must_be_noticed(limit);
            let mut whole = mutant.build();
            whole.arg("--no-run");
            process::run(whole, limit).context("cannot build what is not broken")?;
            noticed
        })
    })
}

impl Mutant {
    /// Builds the mutant and requires that its test fails for the right reason.
    ///
    /// # Errors
    /// The mutant does not compile, its test passes, or the test fails without the expected complaint.
    fn must_be_noticed(&self, limit: Duration) -> Result<()> {
        let wrapper = self.wrapper(&workspace::target().join("mutant"))?;
        let command = |more: &[&str]| {
            let mut command = self.build();
            command.args(more).env("RUSTC_WORKSPACE_WRAPPER", &wrapper);
            command
        };
        process::run(command(&["--no-run"]), limit).context("the mutant does not compile")?;
        // Its failures are what we want; among the other tests' output they would be taken for failures of ours.
        let mut output = Vec::new();
        let status =
            process::listen(command(&[]), Watch::Both, limit, &mut |line| output.push(line.to_owned()))?;
        let complained =
            output.iter().any(|line| self.complaints.iter().any(|complaint| line.contains(complaint)));
        let Self { name, test, .. } = self;
        if !status.success() && complained {
            println!("As it must, the test {test} fails with {name}");
            return Ok(());
        }
        println!("{}", output.join("\n"));
        match status.success() {
            true => bail!("the test {test} passes with {name}: it does not test what it says"),
            false => bail!("the test {test} fails with {name}, but says none of {:?}", self.complaints),
        }
    }

    /// Cargo's command for its test, broken or not. Of the whole workspace: with the features of one package alone nearly all
    /// dependencies would be compiled once more.
    fn build(&self) -> Command {
        cargo(&["test", "--locked", "--workspace", "--test", self.test])
    }

    /// Makes this program callable under the wrapper's name.
    fn wrapper(&self, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let wrapper = folder.join(format!("{WRAPPER_PREFIX}{}", self.name));
        let _ = fs::remove_file(&wrapper);
        let ourselves = env::current_exe().context("cannot find xtask's own program file")?;
        // A copy: a link would break when an ordinary build replaces xtask while the mutant is compiled.
        fs::copy(ourselves, &wrapper).context("cannot copy xtask")?;
        Ok(wrapper)
    }
}

/// The mutant for which cargo has called us as its wrapper, from our own name.
pub fn requested_by_cargo() -> Option<String> {
    let ourselves = env::args_os().next()?;
    mutant_in_name(Path::new(&ourselves))
}

fn mutant_in_name(program: &Path) -> Option<String> {
    program.file_name()?.to_str()?.strip_prefix(WRAPPER_PREFIX).map(str::to_owned)
}

/// Becomes the compiler: our arguments are its path and its arguments.
pub fn act_as_rustc_wrapper(mutant: String) -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let Some(compiler) = arguments.next() else {
        eprintln!("xtask: cargo named no compiler");
        return ExitCode::FAILURE;
    };
    let mut command = Command::new(compiler);
    command.args(arguments).arg("--cfg").arg(format!("paceline_mutant=\"{mutant}\""));
    let error = command.exec();
    eprintln!("xtask: cannot start the compiler: {error}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrappers_name_says_which_mutant_is_wanted() {
        let wrapper = "/target/mutant/rustc-with-mutant-skip_all_reduce";
        assert_eq!(mutant_in_name(Path::new(wrapper)).as_deref(), Some("skip_all_reduce"));
        assert_eq!(mutant_in_name(Path::new("/target/debug/xtask")), None);
    }
}
