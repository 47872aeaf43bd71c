//! `cargo xtask chaos`: many faults in few jobs, more than continuous integration has time for.

use crate::process::{self, cargo};
use crate::step::{Budget, Report};
use anyhow::{Result, bail};
use clap::Args;

/// The suites with tests of that kind: one launcher with four ranks, and four with one each. Each has two of them, with
/// slots and with a shrinking membership.
const SUITES: [&str; 2] = ["elastic", "elastic_nodes"];
const TESTS: u64 = 4;

/// How long a fault may take on average, in minutes: a launcher is started again after a second, and joins within a few.
const MINUTES_PER_FAULT: f64 = 0.2;

/// One partition between hosts for so many other faults: each takes several seconds.
const FAULTS_PER_PARTITION: u64 = 25;

/// How many faults, and which.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// How many faults all tests together have, at least
    #[arg(long, value_name = "N", default_value = "1000")]
    faults: u64,
    /// The random numbers by which they are chosen: those that a run has printed
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Leave out the links that are cut between hosts, which take root
    #[arg(long)]
    without_partitions: bool,
}

/// Runs the tests, one suite after the other, and prints what they say.
///
/// # Errors
/// A test fails, or takes too long.
pub fn run(options: &Options) -> Result<()> {
    if options.faults == 0 {
        bail!("--faults 0: nothing to do");
    }
    let mut report = Report::new("chaos");
    let outcome = steps(options, &mut report);
    report.close(outcome)
}

fn steps(options: &Options, report: &mut Report) -> Result<()> {
    let each = options.faults.div_ceil(TESTS);
    for suite in SUITES {
        let minutes = 5.0 + 2.0 * each as f64 * MINUTES_PER_FAULT;
        test(options, report, (suite, "chaos::", each), minutes)?;
    }
    if !options.without_partitions {
        let partitions = options.faults.div_ceil(FAULTS_PER_PARTITION);
        let minutes = 8.0 + 3.0 * partitions as f64;
        test(options, report, ("partitions", "", partitions), minutes)?;
    }
    Ok(())
}

fn test(
    options: &Options,
    report: &mut Report,
    (suite, filter, faults): (&str, &str, u64),
    minutes: f64,
) -> Result<()> {
    let mut command = cargo(&["test", "--locked", "--workspace", "--test", suite, "--", filter]);
    command.env("PACELINE_CHAOS_FAULTS", faults.to_string());
    command.envs(options.seed.map(|seed| ("PACELINE_CHAOS_SEED", seed.to_string())));
    let name = format!("{suite}: {faults} faults in each test");
    report.step(&name, Budget::minutes(minutes), |limit| process::run(command, limit))
}
