//! What must hold on a machine with a GPU, as one program that is carried there with `paceline` and NCCL's plugin.
//!
//! It starts itself as the ranks of jobs under `paceline run`, and prints a table of checks with their times. Everything
//! in it is production code of Paceline on whatever driver and NCCL the machine has, so it also runs on a test double of
//! both (`--smoke`), which shows that it works up to the device, and on a machine with neither, where it says what is
//! missing. Speeds are printed and never judged: who runs it reads them.
//!
//! | module | what it is |
//! |---|---|
//! | [`list`] | the checks, as jobs |
//! | [`rank`] | what a rank of them does |
//! | [`collectives`] | every collective on every dtype, against the host back end |
//! | [`waits`] | the negative controls: a device that forgets a wait |
//! | [`speed`] | what the fallback's stages take, and what a call of NCCL costs |
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to its terminal")]

mod collectives;
mod list;
mod rank;
mod raw;
mod speed;
mod waits;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "paceline-gpu-checks",
    about = "Checks Paceline's collectives on a GPU",
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    task: Option<Task>,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Args)]
struct Options {
    /// The launcher [default: paceline, beside this program]
    #[arg(long)]
    paceline: Option<PathBuf>,
    /// NCCL's plugin [default: libnccl-net-paceline.so, beside this program; without it its checks are skipped]
    #[arg(long)]
    plugin: Option<PathBuf>,
    /// Short buffers and few repetitions: shows that the checks work, for instance on a double of the driver and NCCL
    #[arg(long)]
    smoke: bool,
    /// Only the checks whose name contains this
    #[arg(long, default_value = "")]
    only: String,
}

#[derive(Subcommand)]
enum Task {
    /// Be a rank of a check
    #[command(hide = true)]
    Rank {
        #[arg(long)]
        smoke: bool,
        part: String,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.task {
        Some(Task::Rank { part, smoke }) => rank::run(&part, smoke).map(|()| true),
        None => list::run(&arguments.options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("paceline-gpu-checks: {error:#}");
            ExitCode::FAILURE
        }
    }
}
