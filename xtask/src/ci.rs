//! `cargo xtask ci`: what must hold before a change lands. Stops at the first step that fails.

use crate::process::{self, cargo};
use crate::step::{Budget, Report};
use crate::{checks, demo, flight_recorder, instructions, nccl, suites, torch, torchrun, workspace};
use anyhow::Result;
use std::time::Duration;

/// Runs everything.
///
/// # Errors
/// The first step that failed.
pub fn run() -> Result<()> {
    let mut report = Report::new("ci");
    let outcome = steps(&mut report);
    let total = report.close(outcome)?;
    println!("\nAll of CI has passed.\n{total}");
    Ok(())
}

fn steps(report: &mut Report) -> Result<suites::Total> {
    report.step("format", Budget::minutes(0.5), |limit| {
        process::run(cargo(&["fmt", "--all", "--check"]), limit)
    })?;
    report.step("source checks", Budget::minutes(0.5), |_| checks::run())?;
    report.step("clippy", Budget::minutes(6.0), clippy)?;
    report.step("documentation", Budget::minutes(5.0), documentation)?;
    let total = suites::steps(report)?;
    instructions::steps(&instructions::Options::default(), report)?;
    demo::steps(&demo::Options::default(), report)?;
    report.step("tests with libtorch", Budget::minutes(3.0), tests_with_libtorch)?;
    let of_traces = Budget::minutes(flight_recorder::MINUTES);
    report.step("PyTorch's analyser of traces", of_traces, flight_recorder::tests)?;
    let total = total.and(torchrun::steps(report)?);
    report.step("tests with NCCL", Budget::minutes(nccl::MINUTES), nccl::tests)?;
    Ok(total.and(suites::root_steps(report)?))
}

fn clippy(limit: Duration) -> Result<()> {
    let clippy = ["clippy", "--locked", "--all-targets"];
    let deny = ["--", "--deny", "warnings"];
    process::run(cargo(&[clippy.as_slice(), &["--workspace"], &deny].concat()), limit)?;
    // Not among all targets, because `cargo test` leaves it out.
    let more = ["hosts", "discovery", "partitions", "dist", "side_by_side", "recovery", "tensorflow"];
    let suites: Vec<&str> = more.into_iter().flat_map(|suite| ["--test", suite]).collect();
    let needs_more = ["clippy", "--locked", "--workspace"];
    process::run(cargo(&[needs_more.as_slice(), suites.as_slice(), &deny].concat()), limit)?;
    for package in ["paceline-runtime", "paceline-examples"] {
        let with_tch = ["--package", package, "--features", "tch-doc-only"];
        process::run(cargo(&[clippy.as_slice(), &with_tch, &deny].concat()), limit)?;
    }
    Ok(())
}

/// The tests of what the demo runs through; type-checking cannot say whether libtorch does what we think.
fn tests_with_libtorch(limit: Duration) -> Result<()> {
    // The packages of the demo's build, as far as they have no libraries whose tests would be compiled too.
    let packages =
        ["--package", "paceline", "--package", "paceline-runtime", "--package", "paceline-examples"];
    let mut command = cargo(&[["test", "--release", "--locked"].as_slice(), &packages].concat());
    command.args(workspace::WITH_TCH).args(["--lib", "tch::"]).envs(torch::ensure()?.environment());
    process::run(command, limit)
}

/// The public documentation, as a user would read it: private items are for readers of the source.
fn documentation(limit: Duration) -> Result<()> {
    let with_tch = ["--package", "paceline-runtime", "--features", "tch-doc-only"];
    for what in [["--workspace"].as_slice(), &with_tch] {
        let mut command = cargo(&[["doc", "--locked", "--no-deps"].as_slice(), what].concat());
        command.env("RUSTDOCFLAGS", "--deny warnings");
        process::run(command, limit)?;
    }
    Ok(())
}
