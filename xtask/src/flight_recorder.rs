//! PyTorch's own analyser over traces of failed jobs: whether it reads them, and says what was wrong.

use crate::process::{self, cargo};
use crate::step::Budget;
use crate::torch;
use anyhow::Result;
use std::time::Duration;

/// Without the download, from nothing compiled but the tests.
pub const MINUTES: f64 = 1.0;

/// Runs the test by itself.
///
/// # Errors
/// See [`tests`].
pub fn run() -> Result<()> {
    tests(Budget::minutes(5.0).limit())
}

/// Runs the test on the private torch, of which it needs a folder of plain Python.
///
/// # Errors
/// The test fails, or torch cannot be installed.
pub fn tests(limit: Duration) -> Result<()> {
    let torch = torch::ensure()?;
    let mut command = cargo(&["test", "--locked", "--workspace", "--test", "flight_recorder", "--"]);
    command.args(["--ignored", "analyser"]).env("VIRTUAL_ENV", torch.virtual_environment());
    process::run(command, limit)
}
