//! `cargo xtask plugin`: builds NCCL's network plugin under the name that NCCL looks for, moves 1 GB through it with every
//! byte compared, and measures it against the links that it uses.

use crate::gpu;
use crate::process::{self, cargo};
use crate::step::{Budget, Report};
use crate::workspace;
use anyhow::Result;
use clap::Args;
use std::process::Command;

#[derive(Args)]
pub struct Options {
    /// How often each way is measured; 0 only builds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    rounds: u32,
    /// What is moved in each round and way, in bytes
    #[arg(long, default_value_t = 1 << 30)]
    bytes: u64,
}

/// Builds, moves, measures.
///
/// # Errors
/// The build fails, a byte is wrong, or an end does not come to its end.
pub fn run(options: &Options) -> Result<()> {
    let mut report = Report::new("plugin");
    let outcome = steps(options, &mut report);
    report.close(outcome)
}

fn steps(options: &Options, report: &mut Report) -> Result<()> {
    let release = workspace::target().join("release");
    let library = release.join("libnccl-net-paceline.so");
    report.step("build", Budget::minutes(20.0), |limit| {
        process::run(cargo(&["build", "--release", "--locked", "--package", "paceline-nccl-net"]), limit)?;
        gpu::strip(&release.join("libnccl_net_paceline.so"), &library)
    })?;
    println!("NCCL_NET_PLUGIN={}", library.display());
    if options.rounds == 0 {
        return Ok(());
    }
    for fabric in ["tls", "quic"] {
        let name = format!("{} bytes {} times over {fabric}, each compared", options.bytes, options.rounds);
        report.step(&name, Budget::minutes(10.0), |limit| {
            let mut command = Command::new(release.join("nccl-net-peer"));
            command.arg("measure").arg("--plugin").arg(&library).env("PACELINE_FABRIC", fabric);
            command.args(["--rounds", &options.rounds.to_string(), "--bytes", &options.bytes.to_string()]);
            process::run(command, limit)
        })?;
    }
    Ok(())
}
