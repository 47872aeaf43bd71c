//! `cargo xtask gpu`: one folder with all that a machine with a GPU needs to check and measure Paceline, without Rust there,
//! and a tar of it to carry. Runs it when there is a GPU here.

use crate::process::{self, cargo};
use crate::step::{Budget, Report};
use crate::workspace;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What may be carried to such a machine.
const LARGEST_TAR: u64 = 60 << 20;

/// The programs, as cargo names them and as they are carried.
const FILES: [(&str, &str); 3] = [
    ("paceline", "paceline"),
    ("paceline-gpu-checks", "paceline-gpu-checks"),
    ("libnccl_net_paceline.so", "libnccl-net-paceline.so"),
];

const RUN: &str = r##"#!/bin/sh
# Checks Paceline on this machine's GPU and measures it. Needs the driver (libcuda.so.1) and NCCL (libnccl.so.2): that of
# an activated virtual environment with torch is found, or name its folder in PACELINE_NCCL_PATH.
# Arguments go to the checks: ./run.sh --help
set -u
cd "$(dirname "$0")" || exit 1
failed=0
./paceline doctor --wait 1
./paceline-gpu-checks "$@" || failed=1
if command -v compute-sanitizer >/dev/null; then
    PACELINE_BACKEND=nccl compute-sanitizer --error-exitcode 9 ./paceline-gpu-checks rank --smoke collectives || failed=1
    PACELINE_BACKEND=fallback compute-sanitizer --error-exitcode 9 ./paceline-gpu-checks rank --smoke collectives || failed=1
else
    echo "skipped: there is no compute-sanitizer"
fi
for backend in nccl fallback; do
    ./paceline bench all_reduce --backend $backend --ranks 1 -b 4 -e 256M -f 8 || failed=1
done
exit $failed
"##;

/// Builds, packs, and runs where that is possible.
///
/// # Errors
/// The build fails, the tar is too large, or a check fails.
pub fn run() -> Result<()> {
    let mut report = Report::new("gpu");
    let outcome = steps(&mut report);
    report.close(outcome)
}

fn steps(report: &mut Report) -> Result<()> {
    let folder = workspace::target().join("gpu/paceline-gpu");
    report.step("build", Budget::minutes(20.0), |limit| {
        let packages = ["paceline", "paceline-gpu-checks", "paceline-nccl-net"];
        let packages = packages.iter().flat_map(|package| ["--package", package]);
        let arguments: Vec<&str> = ["build", "--release", "--locked"].into_iter().chain(packages).collect();
        process::run(cargo(&arguments), limit)
    })?;
    report.step("pack", Budget::minutes(1.0), |limit| {
        fs::create_dir_all(&folder)?;
        for (from, to) in FILES {
            strip(&workspace::target().join("release").join(from), &folder.join(to))?;
        }
        fs::write(folder.join("run.sh"), RUN)?;
        fs::set_permissions(folder.join("run.sh"), fs::Permissions::from_mode(0o755))?;
        let mut tar = Command::new("tar");
        tar.arg("-czf").arg(tar_of(&folder)).arg("-C").arg(folder.with_file_name("")).arg("paceline-gpu");
        process::run(tar, limit)
    })?;
    let tar = tar_of(&folder);
    let bytes = fs::metadata(&tar)?.len();
    ensure!(bytes <= LARGEST_TAR, "{} has {bytes} bytes, more than {LARGEST_TAR}", tar.display());
    println!("\n{} has {:.1} MB.", tar.display(), bytes as f64 / 1e6);
    if !Path::new("/dev/nvidiactl").exists() {
        println!(
            "There is no GPU here. Carry it to a machine that has one, with its driver and NCCL: tar xzf {}, then \
             paceline-gpu/run.sh",
            tar.file_name().unwrap_or_default().display()
        );
        return Ok(());
    }
    report.step("checks on the GPU", Budget::minutes(20.0), |limit| {
        process::run(Command::new(folder.join("run.sh")), limit)
    })
}

fn tar_of(folder: &Path) -> PathBuf {
    folder.with_extension("tar.gz")
}

/// Copies a program or library without its symbols, which are nine tenths of it.
///
/// # Errors
/// There is no `strip`, which comes with every C compiler, or it fails.
pub fn strip(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip").arg("-o").arg(to).arg(from).status().context("no strip")?;
    ensure!(status.success(), "strip of {} fails", from.display());
    Ok(())
}
