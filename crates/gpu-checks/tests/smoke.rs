//! All checks on a test double of CUDA's driver and of NCCL, in processes under the launcher. What this proves: the checks
//! and all of Paceline that they go through work up to the device, keep the rules of streams, and notice a wait that is
//! left out. What it does not: anything about a GPU, NVIDIA's libraries or any speed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const CHECKS: &str = env!("CARGO_BIN_EXE_paceline-gpu-checks");

/// The launcher, which `cargo test --workspace` builds beside this crate's program.
fn launcher() -> PathBuf {
    let launcher = Path::new(CHECKS).with_file_name("paceline");
    assert!(launcher.is_file(), "no launcher at {}: run cargo test --workspace", launcher.display());
    launcher
}

/// The double, compiled into a folder, which also has what its ranks give each other.
fn double(folder: &Path) -> PathBuf {
    let library = folder.join("libgpus.so");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-w", "-pthread", "-o"]).arg(&library);
    compiler.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../testing/doubles/gpus.c"));
    let output = compiler.output().expect("a C compiler named cc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

fn run(variables: &[(&str, &str)], arguments: &[&str]) -> (Output, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let double = double(folder.path());
    let mut command = Command::new(CHECKS);
    command.arg("--paceline").arg(launcher()).args(["--smoke", "--plugin", "/nonexistent"]).args(arguments);
    command
        .env("PACELINE_CUDA_PATH", &double)
        .env("PACELINE_NCCL_PATH", &double)
        .env("TMPDIR", folder.path());
    let output = command.envs(variables.iter().copied()).output().expect("it starts");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output, text)
}

#[test]
fn every_check_passes_on_the_double_and_the_plugins_are_skipped() {
    let (output, text) = run(&[], &[]);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("12 passed, 0 failed, 2 skipped"), "{text}");
    assert!(text.contains("all ranks have a GPU of their own and NCCL 2.28.9"), "{text}");
    assert!(
        text.contains("rank 1 has no GPU or no driver of CUDA; the bits of the host back end over quic"),
        "{text}"
    );
}

#[test]
fn without_a_driver_one_line_says_what_is_missing() {
    let (output, text) = run(&[("PACELINE_CUDA_PATH", "/nonexistent/libcuda.so.1")], &[]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let expected =
        "paceline-gpu-checks: no GPU can be used: loading CUDA's driver: /nonexistent/libcuda.so.1: ";
    assert!(text.starts_with(expected) && text.lines().count() == 1, "{text}");
}
