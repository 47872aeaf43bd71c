//! `paceline`: starts the ranks of a job on this machine and looks after them until the last one is gone.
//!
//! The parts, in the order a run meets them: [`cli`] says what was asked, [`program`] finds the program,
//! [`rendezvous`] is where the ranks meet (and, in a job of several nodes, the launchers: [`founder`] on node 0,
//! [`follower`] on the others, with [`credentials`] to show; [`voter`] where their number may change), [`child`] starts one rank, [`supervise`] watches all of them and does
//! what [`job`] decides, [`console`] prints what they write, [`report`] explains how it ended. [`run`] joins them.
//! [`mod@bench`] runs this program itself as a job, to measure the collectives. [`mod@checkpoint`] looks at files.
//!
//! It refuses to be a daemon or a scheduler: one job, in the foreground, and no rank outlives it.
//!
//! # Exit codes
//! | code | meaning |
//! |---|---|
//! | 0 | every rank exited with code 0 and nobody asked the launcher to stop |
//! | n | the first rank that failed, on whichever node, exited with code n |
//! | 128 + k | the first rank that failed was killed by signal k, or the launcher was asked to stop by signal k |
//! | 138 | the launcher of another node was lost |
//! | 1 | the launcher itself could not go on, for instance because no more processes could be started or a node did not come; `bench`: an element of a result was wrong; `checkpoint`: there is none, or one is damaged |
//! | 2 | wrong flags, or an endpoint that cannot be used |
//! | 126, 127 | the program cannot be executed; there is no such program |
//!
//! After a signal the code is 128 + k even if every rank then exits with 0: a rank that saves its state and exits
//! cleanly on SIGTERM has not finished its training, and a controller that reads 0 would never start it again.

mod backoff;
mod bench;
mod binding;
mod checkpoint;
mod child;
mod cli;
mod console;
mod credentials;
mod discovery;
mod doctor;
mod elastic;
mod ending;
mod endpoint;
mod error;
mod follower;
mod founder;
mod health;
mod job;
mod lease;
mod lines;
mod local;
mod news;
mod pod;
mod program;
mod rendezvous;
mod report;
mod run;
mod secret;
mod supervise;
mod termination;
mod torchrun;
mod traces;
mod voter;

use std::process::ExitCode;

use console::{Console, Stream};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let console = Console::start();
    log_to(&console);
    let variables = cli::Variables {
        port: std::env::var_os("PACELINE_PORT"),
        job_secret_file: std::env::var_os("PACELINE_JOB_SECRET_FILE"),
        certificate_life: std::env::var_os("PACELINE_CERTIFICATE_LIFE"),
        interface: std::env::var_os("PACELINE_INTERFACE"),
        health_addr: std::env::var_os("PACELINE_HEALTH_ADDR"),
        insecure: std::env::var_os("PACELINE_INSECURE"),
        fabric: std::env::var_os("PACELINE_FABRIC"),
        fence: std::env::var_os("PACELINE_FENCE"),
        lease: std::env::var_os("PACELINE_LEASE"),
        surroundings: pod::Surroundings::here(),
        torchrun: torchrun::Variables::of_process(),
    };
    let around = variables.surroundings.clone();
    let outcome = match cli::parse(std::env::args_os(), variables) {
        Ok(cli::Request::Print(text)) => {
            console.print(Stream::Out, text.into_bytes());
            Ok((0, String::new()))
        }
        Ok(cli::Request::Env(format)) => pod::print(&around, format, &console),
        Ok(cli::Request::Local(args)) => local::run(&args, &console),
        Ok(cli::Request::Doctor(args)) => doctor::run(&args, &around, &console),
        Ok(cli::Request::Run(args)) => run::run(&args, &console),
        Ok(cli::Request::Bench(args)) => bench::run(&args, &console),
        Ok(cli::Request::BenchRank { args, report }) => {
            bench::rank::run(&args, &report).map(|()| (0, String::new()))
        }
        Ok(cli::Request::Checkpoint(question)) => {
            let (text, code, last_words) = checkpoint::answer(&question);
            console.print(Stream::Out, text.into_bytes());
            Ok((code, last_words))
        }
        Err(error) => Err(error),
    };
    let (code, last_words) = outcome.unwrap_or_else(|e| (e.exit_code(), format!("paceline: {e}\n")));
    console.finish(&last_words);
    ExitCode::from(code)
}

/// Sends what the launcher itself logs through the console, so that a log line never lands inside a rank's line.
fn log_to(console: &Console) {
    let filter = EnvFilter::try_from_env("PACELINE_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let log = console.clone();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(console.is_coloured(Stream::Err))
        .with_writer(move || log.log_writer())
        .init();
}
