//! The real NCCL and CUDA's assembler, for the tests that need no GPU: NVIDIA's wheels, in an environment of their own.

use crate::environment::{self, Recipe};
use crate::process::{self, cargo};
use crate::step::Budget;
use anyhow::Result;
use std::path::Path;
use std::time::Duration;

const RECIPE: Recipe = Recipe {
    what: "NCCL and ptxas",
    name: "nccl-2.28.9-ptxas-12.8.93",
    packages: &[
        // The one that torch 2.11.0 asks for, so the one that most processes with torch have.
        "nvidia-nccl-cu13==2.28.9",
        // Of CUDA 12, which knows GPUs from Volta on; that of CUDA 13 has dropped it.
        "nvidia-cuda-nvcc-cu12==12.8.93",
    ],
    cost: "a download of 0.25 GB, usually less than a minute",
    needed_bytes: 900_000_000,
    is_whole,
    // The tests load it, and say more than a trial here could.
    must_work: |_| Ok(()),
};

/// Without the download, from nothing compiled.
pub const MINUTES: f64 = 2.0;

/// Runs the tests on it by themselves.
///
/// # Errors
/// See [`tests`].
pub fn run() -> Result<()> {
    tests(Budget::minutes(MINUTES).limit())
}

/// Runs the tests on it. It is found as in a user's virtual environment, which is tested so too.
///
/// # Errors
/// A test fails, or NCCL cannot be installed.
pub fn tests(limit: Duration) -> Result<()> {
    let environment = environment::ensure(&RECIPE)?;
    let mut command = cargo(&["test", "--locked", "--workspace", "--test", "real", "--test", "ptx", "--"]);
    // It is there, so nothing may be skipped but what a driver forbids.
    command.arg("--include-ignored");
    if Path::new("/dev/nvidiactl").exists() {
        command.args(["--skip", "without_a_driver"]);
    }
    command.env("VIRTUAL_ENV", environment).env_remove("PACELINE_NCCL_PATH");
    process::run(command, limit)
}

fn is_whole(environment: &Path) -> bool {
    let packages = environment::site_packages(environment);
    let file = |packages: &Path, name: &str| packages.join("nvidia/nccl").join(name).is_file();
    packages.is_some_and(|packages| {
        let ptxas = packages.join("nvidia/cuda_nvcc/bin/ptxas");
        file(&packages, "lib/libnccl.so.2") && file(&packages, "include/nccl.h") && ptxas.is_file()
    })
}
