//! `cargo xtask demo`: the digits example on several ranks of this machine, as a user would run it.

use crate::process::{self, Watch};
use crate::step::{Budget, Report};
use crate::{system, torch, workspace};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Below this something is broken; the example reaches 97 to 99 %.
const LEAST_ACCURACY_PERCENT: f64 = 95.0;

/// The example's line that we read.
const ACCURACY_LABEL: &str = "held-out accuracy:";

#[derive(Args)]
pub struct Options {
    /// How many ranks train together
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: u32,
    /// How often each sample is seen; the example's own default if not given
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self { ranks: 2, epochs: None }
    }
}

/// Builds and runs the demo.
///
/// # Errors
/// Set-up, build or run fail, or the model is not good enough.
pub fn run(options: &Options) -> Result<()> {
    let mut report = Report::new("demo");
    let outcome = steps(options, &mut report);
    report.close(outcome)
}

/// The demo's steps, for a report of its own or as part of a longer one.
///
/// # Errors
/// See [`run`].
pub fn steps(options: &Options, report: &mut Report) -> Result<()> {
    let mut torch = None;
    report.step("demo: set up torch", Budget::minutes(5.0), |_| {
        system::ensure(&[system::CXX])?;
        torch = Some(torch::ensure()?);
        Ok(())
    })?;
    let torch = torch.expect("the step succeeded");
    // The target folder of ordinary builds, with which nearly all dependencies are in common.
    let folder = workspace::target();
    report.step("demo: build", Budget::minutes(8.0), |limit| {
        println!("The first build takes 4 to 8 minutes on 2 cores, half of them for libtorch's bindings; later ones take seconds");
        let mut command = workspace::release(&["--bin", "paceline", "--example", "04_digits"]);
        command.args(workspace::WITH_TCH).envs(torch.environment());
        process::run(command, limit)
    })?;
    report.step("demo: train", Budget::minutes(2.0), |limit| train(&folder, options, &torch, limit))
}

fn train(folder: &Path, options: &Options, torch: &torch::Torch, limit: Duration) -> Result<()> {
    let mut command = Command::new(folder.join("release/paceline"));
    command.args(["run", "-n", &options.ranks.to_string(), "--"]);
    command.arg(folder.join("release/examples/04_digits")).envs(torch.environment());
    if let Some(epochs) = options.epochs {
        command.args(["--epochs", &epochs.to_string()]);
    }
    let words = process::shown(&command);
    println!("{words}");
    let mut accuracy = None;
    let status = process::observe(command, Watch::Stdout, limit, &mut |line| {
        accuracy = accuracy_percent(line).or(accuracy);
    })?;
    process::must_succeed(status, &words)?;
    let accuracy = accuracy.context("the example did not print its held-out accuracy")?;
    if accuracy < LEAST_ACCURACY_PERCENT {
        bail!("held-out accuracy is {accuracy} %, which is below {LEAST_ACCURACY_PERCENT} %");
    }
    Ok(())
}

/// Reads `… held-out accuracy: 97.50 % …`; the launcher may have put the rank in front.
fn accuracy_percent(line: &str) -> Option<f64> {
    let (_, after) = line.split_once(ACCURACY_LABEL)?;
    let (number, _) = after.split_once('%')?;
    number.trim().parse().ok().filter(|percent: &f64| percent.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accuracy_is_found_with_and_without_a_prefix() {
        assert_eq!(accuracy_percent("held-out accuracy: 97.50 % (351 of 360 images)"), Some(97.5));
        assert_eq!(accuracy_percent("[rank 0] held-out accuracy: 8 %"), Some(8.0));
        assert_eq!(accuracy_percent("held-out accuracy: NaN %"), None);
        assert_eq!(accuracy_percent("held-out accuracy: soon"), None);
        assert_eq!(accuracy_percent("epoch 3: loss 0.1"), None);
    }
}
