//! Layer C: our kernels, assembled by NVIDIA's `ptxas` (`nvidia-cuda-nvcc-cu12` on PyPI) for each generation of GPUs.
//!
//! What this proves: the text that a driver gets is one that its compiler takes, for every architecture that this ptxas
//! knows since the one that the text names. What it does not: that a kernel does what it should on a GPU.
//!
//! `cargo xtask nccl` and CI provide ptxas; without one the tests are ignored.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const KERNELS: [(&str, &str); 1] = [("hold", include_str!("../src/device/cuda/hold.ptx"))];

/// From Volta, which the text names, to the consumer Blackwell.
const ARCHITECTURES: [&str; 8] = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

/// In the virtual environment.
fn ptxas() -> PathBuf {
    let environment = std::env::var_os("VIRTUAL_ENV").expect("a virtual environment: run cargo xtask nccl");
    let found = std::fs::read_dir(Path::new(&environment).join("lib")).expect("it has libraries").find_map(
        |python| {
            let ptxas = python.ok()?.path().join("site-packages/nvidia/cuda_nvcc/bin/ptxas");
            ptxas.is_file().then_some(ptxas)
        },
    );
    found.expect("nvidia-cuda-nvcc-cu12 in the virtual environment: run cargo xtask nccl")
}

/// What ptxas says of a text, unless it assembles it.
fn assemble(text: &str, architecture: &str) -> Result<(), String> {
    let mut command = Command::new(ptxas());
    command.args(["--warning-as-error", "-arch", architecture, "-o", "/dev/null", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut assembler = command.spawn().expect("ptxas starts");
    let mut stdin = assembler.stdin.take().expect("it is piped");
    // One that ends before it has read all says why.
    let _ = stdin.write_all(text.as_bytes());
    drop(stdin);
    let output = assembler.wait_with_output().expect("it was started");
    let said =
        || [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    if output.status.success() { Ok(()) } else { Err(said()) }
}

#[test]
#[ignore = "needs ptxas: cargo xtask nccl"]
fn every_kernel_is_assembled_for_every_generation() {
    for (name, text) in KERNELS {
        for architecture in ARCHITECTURES {
            assert_eq!(assemble(text, architecture), Ok(()), "{name} for {architecture}");
        }
    }
}

#[test]
#[ignore = "needs ptxas: cargo xtask nccl"]
fn a_kernel_with_a_mistake_is_refused() {
    for (name, text) in KERNELS {
        let broken = text.replacen(".u64 ", ".u46 ", 1);
        assert_ne!(broken, text, "{name}");
        let said = assemble(&broken, "sm_90").expect_err("there is no such type");
        assert!(said.contains("syntax error") || said.contains("fatal"), "{name}: {said}");
    }
}
