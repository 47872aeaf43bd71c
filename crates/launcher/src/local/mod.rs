//! `paceline local job.yaml`: a TFJob or PyTorchJob on this machine, without a cluster.
//!
//! Each pod is a process group. As root each is also a host of its own (a network namespace), where the pods' names mean
//! what they mean in a cluster; otherwise all share this machine's loopback interface, and the variables name addresses
//! in place of names. Pods get the variables that the operator would give them, are started again as their policy says,
//! and end when the job is over. Images are not looked at: the commands must be on this machine.

mod environment;
mod manifest;
mod network;
mod pods;
mod policy;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::console::{Console, Stream};
use crate::ending::{Ending, code_for_signal, signal_in_words};
use crate::error::Error;
use manifest::{Job, JobKind, PodPlan};
use network::Network;
use pods::Ended;
use policy::Outcome;

/// What is to be run, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalArgs {
    /// The file with the manifest.
    pub manifest: PathBuf,
    /// What runs in containers without a command.
    pub entrypoint: Vec<String>,
    /// What joins the pods.
    pub network: Choice,
    /// From SIGTERM to SIGKILL.
    pub grace: Duration,
}

/// What is asked to join the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// Hosts of their own where this machine can make them.
    Auto,
    /// Hosts of their own, or nothing.
    Hosts,
    /// This machine's loopback interface.
    Loopback,
}

/// Runs the job to its end. Returns the exit code and what is to be told last on stderr.
///
/// # Errors
/// The manifest cannot be read or run, or the operating system refuses what it takes.
pub fn run(args: &LocalArgs, console: &Console) -> Result<(u8, String), Error> {
    let shown = args.manifest.display();
    let wrong = |why: String| Error::Usage(format!("{shown}: {why}"));
    let text = fs::read_to_string(&args.manifest).map_err(|e| wrong(e.to_string()))?;
    let job = manifest::read(&text, &args.entrypoint).map_err(wrong)?;
    let network = Network::join(&job, args.network)?;
    console.print(Stream::Err, introduction(&job, &network).into_bytes());
    let ended = pods::run(&job, &network, args.grace, console)?;
    Ok(verdict(&job, ended))
}

/// Which number stands before whose lines.
fn introduction(job: &Job, network: &Network) -> String {
    let pods: Vec<String> =
        job.pods.iter().enumerate().map(|(number, pod)| format!("[{number}] {}", name(job, pod))).collect();
    format!("paceline: {} {}, {network}: {}\n", job.kind, job.name, pods.join(", "))
}

fn verdict(job: &Job, ended: Ended) -> (u8, String) {
    let what = format!("paceline: {} {}", job.kind, job.name);
    let failed = |pod: usize, ending: Ending, why: &str| {
        (ending.exit_code(), format!("{what} has failed: {} {ending}{why}\n", name(job, &job.pods[pod])))
    };
    match ended {
        Ended::Over(Outcome::Succeeded) => (0, format!("{what} has succeeded\n")),
        Ended::Over(Outcome::Failed(pod, ending)) => failed(pod, ending, ""),
        Ended::Over(Outcome::TooOften(pod, ending)) => {
            failed(pod, ending, ", and pods have been started again as often as backoffLimit allows")
        }
        Ended::Stopped(signal) => (
            code_for_signal(signal.as_raw()),
            format!("{what}: stopped by {}\n", signal_in_words(signal.as_raw())),
        ),
    }
}

/// The pod's name in a cluster.
fn name(job: &Job, pod: &PodPlan) -> String {
    format!("{}-{}-{}", job.name, pod.role, pod.index)
}

impl std::fmt::Display for JobKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            JobKind::TfJob => "TFJob",
            JobKind::PyTorchJob => "PyTorchJob",
        })
    }
}
