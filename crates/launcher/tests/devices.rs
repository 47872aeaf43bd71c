//! `paceline bench --backend` on a test double of CUDA's driver and of NCCL, and on a machine that has neither. What this
//! proves: ranks in processes agree on a way, take it, and every element is right; what is missing is one line. What it does
//! not: anything about a GPU.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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

fn bench(line: &str, variables: &[(&str, &Path)]) -> (Output, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
    command.arg("bench").args(line.split_whitespace()).envs(variables.iter().copied());
    let output = command.output().expect("the launcher starts");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output, text)
}

fn bench_on_double(line: &str, gpus: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let library = double(folder.path());
    let (output, text) = bench(
        line,
        &[
            ("PACELINE_CUDA_PATH", &library),
            ("PACELINE_NCCL_PATH", &library),
            ("TMPDIR", folder.path()),
            ("DOUBLE_GPUS", Path::new(gpus)),
        ],
    );
    assert!(output.status.success(), "{line}\n{text}");
    text
}

#[test]
fn every_collective_on_gpus_is_measured_and_every_element_is_right() {
    let reason = "go through NCCL: all ranks have a GPU of their own and NCCL 2.28.9";
    for collective in [
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "broadcast",
        "reduce",
        "gather",
        "scatter",
        "alltoall",
        "sendrecv",
    ] {
        let text =
            bench_on_double(&format!("{collective} --backend nccl --ranks 2 -b 4 -e 4K -f 32 -n 2"), "2");
        assert!(
            text.contains(reason) && text.contains("# Out of bounds values : 0 OK"),
            "{collective}\n{text}"
        );
    }
}

#[test]
fn ranks_that_share_a_gpu_agree_on_the_way_through_the_host() {
    let text = bench_on_double("all_reduce --backend auto --ranks 2 -b 64K -e 5M -f 80 -d bf16 -n 2", "1");
    assert!(text.contains("go through the host: ranks 0 and 1 share one GPU"), "{text}");
    assert!(text.contains("# Out of bounds values : 0 OK"), "{text}");
}

const NO_DRIVER: (&str, &str) = ("PACELINE_CUDA_PATH", "/nonexistent/libcuda.so.1");

#[test]
fn what_nccl_lacks_here_is_one_line_and_exit_code_2() {
    let (output, text) = bench("all_reduce --backend nccl", &[(NO_DRIVER.0, Path::new(NO_DRIVER.1))]);
    assert_eq!(output.status.code(), Some(2), "{text}");
    let expected =
        "paceline: NCCL cannot be used here: no GPU can be used: loading CUDA's driver: /nonexistent/";
    assert!(text.starts_with(expected) && text.lines().count() == 1, "{text}");

    let folder = tempfile::tempdir().expect("a folder");
    let (driver, missing) = (double(folder.path()), folder.path().join("libnccl.so.2"));
    let (output, text) = bench(
        "all_reduce --backend nccl",
        &[("PACELINE_CUDA_PATH", &driver), ("PACELINE_NCCL_PATH", &missing)],
    );
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.starts_with("paceline: NCCL cannot be used here: ") && text.contains("libnccl.so.2"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn without_a_gpu_the_way_through_the_host_is_measured_in_its_memory() {
    let line = "all_gather --backend fallback --ranks 3 -b 4 -e 8M -f 1024 -n 2";
    let (output, text) = bench(line, &[(NO_DRIVER.0, Path::new(NO_DRIVER.1))]);
    assert!(output.status.success() && text.contains("# Out of bounds values : 0 OK"), "{text}");
    assert!(text.contains("go through the host: PACELINE_BACKEND wants it"), "{text}");
}
