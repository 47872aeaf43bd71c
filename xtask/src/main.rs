//! `cargo xtask`: everything a fresh machine needs in order to show, test and check Paceline.
//!
//! Needed beforehand: Rust, Python 3.10 or later and gcc. What else is missing is installed when we are root, and named
//! in one line when we are not. Nothing here is linked into the product.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to its terminal")]

mod checks;
mod ci;
mod demo;
mod dist;
mod environment;
mod flight_recorder;
mod gpu;
mod hosts;
mod instructions;
mod mutant;
mod nccl;
mod peers;
mod plugin;
mod process;
mod siege;
mod step;
mod suites;
mod system;
mod tensorflow;
mod torch;
mod torchrun;
mod workspace;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set-up, tests and checks of Paceline", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Train a digit classifier on several ranks of this machine and say how well it did
    Demo(demo::Options),
    /// Every test that needs no root, no GPU and no cluster
    Test,
    /// The tests of the tests alone: builds that are broken on purpose must fail
    Mutants,
    /// The tests that need root: between hosts, over links that are slow, lossy and broken
    Root,
    /// The tests on NVIDIA's NCCL that need no GPU; installs it
    Nccl,
    /// Build NCCL's network plugin, move 1 GB through it with every byte compared, and measure it
    Plugin(plugin::Options),
    /// Build the checks and measurements for a machine with a GPU as one tar, and run them when there is one here
    Gpu,
    /// PyTorch's analyser over traces of failed jobs; installs it
    FlightRecorder,
    /// The tests that run the launcher beside PyTorch's torchrun; installs it
    Torchrun(torchrun::Options),
    /// The tests that run TensorFlow's own training under the launcher; installs it
    Tensorflow,
    /// Build the launcher as one file without any library, and start it where there is nothing else
    Dist(dist::Options),
    /// Run a program as the ranks of a job on N hosts of this machine, over links as asked for; needs root
    Hosts(hosts::Options),
    /// What continuous integration runs: style, documentation, every test, instruction counts, the demo
    Ci,
    /// The checks of the source tree alone: unsafe code, links, configuration variables
    Check,
    /// Measure Paceline beside OpenMPI, MPICH and Gloo on this machine
    Peers(peers::Options),
    /// Measure what a job between hosts still does while its ports are attacked; needs root
    Siege(siege::Options),
    /// Count the instructions of the hot path and compare them with benches/instructions.json
    Instructions(instructions::Options),
    /// Print the environment that a build with the feature `tch` needs, in the shell's words
    TorchEnv,
}

fn main() -> ExitCode {
    if let Some(mutant) = mutant::requested_by_cargo() {
        return mutant::act_as_rustc_wrapper(mutant);
    }
    let arguments = Arguments::parse();
    let outcome = match arguments.task {
        Task::Demo(options) => demo::run(&options),
        Task::Test => suites::run(),
        Task::Mutants => mutant::run(),
        Task::Root => suites::run_root(),
        Task::Nccl => nccl::run(),
        Task::Plugin(options) => plugin::run(&options),
        Task::Gpu => gpu::run(),
        Task::FlightRecorder => flight_recorder::run(),
        Task::Torchrun(options) => torchrun::run(&options),
        Task::Tensorflow => tensorflow::run(),
        Task::Dist(options) => dist::run(&options),
        Task::Hosts(options) => hosts::run(&options),
        Task::Ci => ci::run(),
        Task::Check => checks::run(),
        Task::Peers(options) => peers::run(&options),
        Task::Siege(options) => siege::run(&options),
        Task::Instructions(options) => instructions::run(&options),
        Task::TorchEnv => torch::print_environment(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
