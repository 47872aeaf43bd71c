//! The real TensorFlow, for the tests that run its own training under the launcher.

use crate::environment::{self, Recipe};
use crate::process::{self, cargo};
use crate::step::Budget;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const RECIPE: Recipe = Recipe {
    what: "TensorFlow",
    name: "tensorflow-2.21.0",
    // What `import tensorflow` of 2.21.0 needs; Keras and what it brings are loaded when they are used, and here nobody does.
    packages: &[
        "tensorflow-cpu==2.21.0",
        "absl-py==2.5.1",
        "astunparse==1.6.3",
        "wheel==0.48.0",
        "flatbuffers==25.12.19",
        "gast==0.7.0",
        "google-pasta==0.2.0",
        "grpcio==1.85.3",
        "ml_dtypes==0.6.0",
        "numpy==2.4.6",
        "opt_einsum==3.4.0",
        "packaging==26.4",
        "protobuf==7.36.2",
        "requests==2.34.2",
        "urllib3==2.8.0",
        "idna==3.20",
        "certifi==2026.10.19.post1",
        "charset-normalizer==3.5.3",
        "six==1.17.0",
        "termcolor==3.3.0",
        "typing_extensions==4.16.0",
        "wrapt==2.5.2",
    ],
    cost: "a download of 0.3 GB, usually 1 minute, 3 on a slow line",
    needed_bytes: 2_000_000_000,
    is_whole: |environment| environment.join("bin/python").exists(),
    must_work: must_import,
};

/// Without the download, from nothing compiled but the tests: some thirty imports of TensorFlow, 3 s of a processor each, and
/// what it takes to form a cluster.
pub const MINUTES: f64 = 4.0;

/// Runs the tests by themselves.
///
/// # Errors
/// See [`tests`].
pub fn run() -> Result<()> {
    tests(Budget::minutes(MINUTES).limit())
}

/// Runs the tests on the private TensorFlow.
///
/// # Errors
/// A test fails, or TensorFlow cannot be installed.
pub fn tests(limit: Duration) -> Result<()> {
    let environment = environment::ensure(&RECIPE)?;
    let mut command = cargo(&["test", "--locked", "--workspace", "--test", "tensorflow"]);
    // Four interpreters with TensorFlow at a time are enough.
    command.args(["--", "--test-threads", "1"]).env("PYTHON_EXEC", environment.join("bin/python"));
    process::run(command, limit)
}

/// Imports it: better now than in a test.
fn must_import(environment: &Path) -> Result<()> {
    let mut python = Command::new(environment.join("bin/python"));
    python
        .args(["-c", "import tensorflow as tf; tf.distribute.ParameterServerStrategy; tf.train.Checkpoint"]);
    process::run(python, Duration::from_secs(180))
        .context("TensorFlow was installed, but cannot be imported on this machine (see above)")
}
