//! NCCL's side of the plugin, for tests and for measuring: opens the library and calls its table as NCCL's proxy threads
//! do.
//!
//! `nccl-net-peer receive|send …` is one end: the receiver prints a line for each handle, the sender reads these lines.
//! Every byte is compared. `nccl-net-peer abuse …` makes wrong calls. `nccl-net-peer measure …` starts both ends itself, over the plugin and over the links without
//! it in turn, and prints the medians.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to its terminal")]

mod abuse;
mod bare;
mod ends;
mod measure;
mod options;
mod table;

use std::process::ExitCode;

/// Why a run failed, and NCCL's code if the plugin gave one.
#[derive(Debug)]
struct Failed {
    reason: String,
    code: Option<i32>,
}

impl<E: std::fmt::Display> From<E> for Failed {
    fn from(error: E) -> Self {
        Self { reason: error.to_string(), code: None }
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let run = || match words.first().map(String::as_str) {
        Some("receive") => ends::receive(&options::Options::parse(&words[1..])?),
        Some("send") => ends::send(&options::Options::parse(&words[1..])?),
        Some("abuse") => abuse::run(&options::Options::parse(&words[1..])?),
        Some("measure") => measure::run(&options::Options::parse(&words[1..])?),
        _ => Err(Failed::from(options::USAGE)),
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed { reason, code }) => {
            println!("failed {} {reason}", code.unwrap_or(-1));
            ExitCode::FAILURE
        }
    }
}
