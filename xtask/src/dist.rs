//! `cargo xtask dist`: the launcher as one file without any library, for containers that have nothing else.
//!
//! It is linked with musl, whose C library may be linked statically whole: glibc's loads parts of itself when names are
//! resolved. The tests start it in an empty root and in a distribution's, by another user than root, on a file system
//! that is read-only.

use crate::process::{self, cargo};
use crate::step::{Budget, Report};
use crate::system::{self, Tool};
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::fs;
use std::process::Command;
use std::time::Duration;

/// What it is built for.
const TARGET: &str = "x86_64-unknown-linux-musl";

/// aws-lc is C.
const MUSL: Tool =
    Tool { what: "a C compiler for musl", package: "musl-tools", probe: &["musl-gcc", "--version"] };

/// Which build of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// The one that is given to users.
    Whole,
    /// Without optimisation, in a third of the time. What the tests find out is the same: what it is linked with, and what it
    /// does without libraries, files and rights.
    Quick,
}

impl Build {
    fn profile(self) -> &'static str {
        match self {
            Build::Whole => "dist",
            Build::Quick => "dist-quick",
        }
    }

    /// From nothing compiled.
    fn minutes(self) -> f64 {
        match self {
            Build::Whole => 8.0,
            Build::Quick => 3.0,
        }
    }
}

#[derive(clap::Args)]
pub struct Options {
    /// Without optimisation: for the tests alone
    #[arg(long)]
    quick: bool,
}

/// The binary is copied, and started some ten times.
const TEST_MINUTES: f64 = 1.0;

/// A container's image should not grow by much.
const SIZE_MOST_BYTES: u64 = 20 * 1024 * 1024;

/// Builds it, says how large it is, and tests it.
///
/// # Errors
/// It cannot be built, is too large, or does not start.
pub fn run(options: &Options) -> Result<()> {
    let mut report = Report::new("dist");
    let outcome = steps(if options.quick { Build::Quick } else { Build::Whole }, &mut report);
    report.close(outcome)
}

/// The steps, for a report of their own or as part of a longer one.
///
/// # Errors
/// See [`run`].
pub fn steps(build: Build, report: &mut Report) -> Result<()> {
    report.step("dist: build", Budget::minutes(build.minutes()), |limit| make(build, limit))?;
    let binary = workspace::target().join(TARGET).join(build.profile()).join("paceline");
    report.step("dist: start it elsewhere", Budget::minutes(TEST_MINUTES), |limit| {
        let file = fs::metadata(&binary).context("the build has left no binary")?;
        println!("{}: {:.1} MiB", binary.display(), file.len() as f64 / f64::from(1 << 20));
        if build == Build::Whole && file.len() > SIZE_MOST_BYTES {
            bail!("that is more than {} MiB", SIZE_MOST_BYTES >> 20);
        }
        // With the features of the whole workspace, as everywhere in CI, nothing is compiled once more.
        let mut command = cargo(&["test", "--locked", "--workspace", "--test", "dist"]);
        command.env("PACELINE_TEST_DIST", &binary);
        process::run(command, limit)
    })
}

fn make(build: Build, limit: Duration) -> Result<()> {
    system::ensure(&[MUSL])?;
    let mut install = Command::new("rustup");
    install.args(["target", "add", TARGET]);
    process::run(install, limit)?;
    let words = ["build", "--locked", "--target", TARGET, "--package", "paceline", "--bin", "paceline"];
    process::run(cargo(&[words.as_slice(), &["--profile", build.profile()]].concat()), limit)
}
