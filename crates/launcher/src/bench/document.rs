//! A measurement as one JSON document: what was run, where, and every number.

use std::time::SystemTime;

use serde::Serialize;

use super::args::{BenchArgs, Timing};
use super::machine::{self, Machine};
use super::report::{Row, Run};

/// The document. Names carry their units; a number that was not measured is null.
#[derive(Serialize)]
pub struct Document<'a> {
    paceline: &'static str,
    /// When it ended.
    unix_time_s: u64,
    command: Vec<String>,
    machine: &'a Machine,
    /// The load average at the end; that at the beginning is the machine's.
    load_average_after: Vec<f64>,
    parameters: Parameters,
    runs: Vec<Job<'a>>,
}

#[derive(Serialize)]
struct Parameters {
    collective: &'static str,
    dtype: &'static str,
    op: &'static str,
    root: i64,
    timing: &'static str,
    check: bool,
}

#[derive(Serialize)]
struct Job<'a> {
    ranks: u32,
    links: &'a str,
    backend: Option<&'a str>,
    ranks_per_cpu: f64,
    /// Wrong elements of all ranks and sizes.
    out_of_bounds: Option<u64>,
    avg_busbw_gb_s: f64,
    rows: &'a [Row],
}

impl<'a> Document<'a> {
    /// All runs of one command; `machine` was looked at before the first.
    pub fn new(args: &BenchArgs, machine: &'a Machine, runs: &'a [Run]) -> Self {
        let words = args.words.iter().map(|word| word.to_string_lossy().into_owned());
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let cpus = machine.cpus as f64;
        let job = |run: &'a Run| Job {
            ranks: run.ranks,
            links: &run.links,
            backend: run.backend.as_deref(),
            ranks_per_cpu: f64::from(run.ranks) / cpus,
            out_of_bounds: run.wrong(),
            avg_busbw_gb_s: run.average_busbw(),
            rows: &run.rows,
        };
        Document {
            paceline: env!("CARGO_PKG_VERSION"),
            unix_time_s: now.as_secs(),
            command: ["paceline", "bench"].map(str::to_owned).into_iter().chain(words).collect(),
            load_average_after: machine::load_average(),
            machine,
            parameters: Parameters {
                collective: args.collective.traits().name,
                dtype: args.dtype.name(),
                op: args.op_name(),
                root: args.shown_root(),
                timing: match args.timing {
                    Timing::BackToBack => "back to back",
                    Timing::Separated => "separated by barriers",
                },
                check: args.check,
            },
            runs: runs.iter().map(job).collect(),
        }
    }

    /// The document as text, with an end of line.
    pub fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers and strings have a JSON form") + "\n"
    }
}
