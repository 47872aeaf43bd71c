//! What is to be measured: nccl-tests' flags, and the rows that follow from them.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{ArgAction, Args};
use paceline_runtime::collectives::device::Wanted;
use paceline_runtime::collectives::{DType, ReduceOp};
use paceline_transport::Fabric;

use super::collective::{Collective, Place, Shape};
use super::reference::OPS;
use crate::cli::fabric;
use crate::endpoint::Endpoint;
use crate::error::Error;

/// The most ranks that are started on one machine; beyond it is a typing error.
const RANKS_LIMIT: u32 = 1024;

/// The most rows of a table. 30 powers of two are usual; a step of 1 byte up to 1 GiB is a typing error.
const ROWS_LIMIT: usize = 10_000;

/// The largest size unless told otherwise: past every cache of today's machines, and still seconds over a network.
const LARGEST: u64 = 16 << 20;

/// The same for `--osu`, as osu_allreduce has it.
const OSU_LARGEST: u64 = 1 << 20;

/// Up to this size OSU's loops make [`OSU_SMALL`] iterations, beyond it [`OSU_LARGE`].
const OSU_SMALL_BYTES: u64 = 8192;
const OSU_SMALL: Iterations = Iterations { timed: 1000, untimed: 100 };
const OSU_LARGE: Iterations = Iterations { timed: 100, untimed: 10 };

/// A measurement on this machine.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchArgs {
    /// What is measured.
    pub collective: Collective,
    /// The numbers of ranks, one job each.
    pub ranks: RangeInclusive<u32>,
    /// The sizes asked for, in bytes, rising; what fits them is in [`BenchArgs::rows`].
    pub sizes: Vec<u64>,
    /// The operator of those that reduce.
    pub op: ReduceOp,
    /// The element type.
    pub dtype: DType,
    /// The root of those that have one.
    pub root: usize,
    /// Whether every element is compared with the reference.
    pub check: bool,
    /// The loop that is timed.
    pub timing: Timing,
    /// What is printed.
    pub output: Output,
    /// Whether the buffers lie in memory that all ranks have mapped.
    pub registered: bool,
    /// The kind of links between the ranks; `None` leaves it to PACELINE_FABRIC.
    pub fabric: Option<Fabric>,
    /// Whose memory the buffers are in, and which way the collectives go.
    pub backend: Backend,
    /// Where a plot goes.
    pub plot: Option<PathBuf>,
    /// Where the ranks meet, unless it is on this machine alone.
    pub rendezvous: Option<Endpoint>,
    /// The shell command that starts each rank, unless the launcher does.
    pub through: Option<String>,
    iterations: Option<u32>,
    warmup: Option<u32>,
    /// The arguments after `bench`, which the ranks get too.
    pub words: Vec<OsString>,
}

/// Whose memory the buffers are in, and which way the collectives go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The host's memory, through the host back end.
    Host,
    /// A device's: a GPU's where there is one, on which the ranks agree.
    Device(Wanted),
}

/// The loop that is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timing {
    /// nccl-tests: calls back to back, one clock reading at each end.
    BackToBack,
    /// OSU: each call timed by itself, and a barrier after it.
    Separated,
}

/// What is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A table, row by row.
    Table,
    /// One JSON document at the end.
    Json,
    /// Which schedules would run; nothing is measured.
    Explain,
}

/// How often a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Iterations {
    /// Timed.
    pub timed: u32,
    /// Before the clock starts.
    pub untimed: u32,
}

/// The buffers of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowShape {
    /// The larger of the two buffers, in bytes: nccl-tests' size.
    pub bytes: u64,
    /// Elements: a rank's share where there are shares, as nccl-tests print it.
    pub count: usize,
    /// Elements of the input.
    pub input_len: usize,
    /// Elements of the output.
    pub output_len: usize,
}

impl BenchArgs {
    /// The rows for this many ranks. Sizes that come to the same buffers are one row.
    pub fn rows(&self, ranks: u32) -> Vec<RowShape> {
        let (shape, ranks, size) = (self.collective.traits().shape, ranks as usize, self.dtype.size() as u64);
        let row = |&bytes: &u64| {
            let count = shape.count((bytes / size) as usize, ranks);
            let (input_len, output_len) = shape.lens(count, ranks);
            let bytes = input_len.max(output_len) as u64 * size;
            RowShape { bytes, count, input_len, output_len }
        };
        let mut rows: Vec<RowShape> = self.sizes.iter().map(row).collect();
        rows.dedup();
        rows
    }

    /// The places that are measured. OSU's tests have separate buffers only.
    pub fn places(&self) -> &'static [Place] {
        let places = self.collective.traits().places;
        match self.timing {
            Timing::BackToBack => places,
            Timing::Separated => &places[..1],
        }
    }

    /// Elements that the output's buffer has room for: in place, it has the input too.
    pub fn output_room(&self, row: &RowShape) -> usize {
        match self.places().contains(&Place::InPlace) {
            true => row.output_len.max(row.input_len),
            false => row.output_len,
        }
    }

    /// How often each call of a row is made. nccl-tests' untimed calls are made for all sizes before the first is timed.
    pub fn iterations(&self, row: &RowShape) -> Iterations {
        let usual = match self.timing {
            Timing::BackToBack => Iterations { timed: 20, untimed: 1 },
            Timing::Separated if row.bytes <= OSU_SMALL_BYTES => OSU_SMALL,
            Timing::Separated => OSU_LARGE,
        };
        Iterations {
            timed: self.iterations.unwrap_or(usual.timed),
            untimed: self.warmup.unwrap_or(usual.untimed),
        }
    }

    /// The bytes that all ranks of the largest job need for their buffers.
    pub fn needed_bytes(&self) -> u64 {
        let ranks = *self.ranks.end();
        let both = |row: RowShape| (row.input_len + self.output_room(&row)) as u64;
        let largest = self.rows(ranks).into_iter().map(both).max();
        // Where the device is the host's memory, they are there twice.
        let copies = if self.backend == Backend::Host { 1 } else { 2 };
        copies * u64::from(ranks) * largest.unwrap_or(0) * self.dtype.size() as u64
    }

    /// The operator as the tables show it.
    pub fn op_name(&self) -> &'static str {
        if self.collective.traits().reduces { self.op.name() } else { "none" }
    }

    /// The root as the tables show it: nccl-tests print -1 where there is none.
    pub fn shown_root(&self) -> i64 {
        if self.collective.traits().has_root { self.root as i64 } else { -1 }
    }
}

/// nccl-tests' flags where they have one, so that a command line can be carried over.
#[derive(Args)]
pub struct Flags {
    /// What to measure: all_reduce, reduce_scatter, all_gather, broadcast, reduce, gather, scatter, all_to_all, sendrecv
    /// or barrier
    collective: Collective,
    /// How many ranks; A..B measures each number of them and compares
    #[arg(long, value_name = "N|A..B", default_value = "2", value_parser = ranks)]
    ranks: RangeInclusive<u32>,
    /// The smallest size in bytes; K, M and G are 2^10, 2^20, 2^30
    #[arg(short = 'b', long = "minbytes", value_name = "SIZE", default_value = "4", value_parser = bytes)]
    min: u64,
    /// The largest size [default: 16M, with --osu 1M]
    #[arg(short = 'e', long = "maxbytes", value_name = "SIZE", value_parser = bytes)]
    max: Option<u64>,
    /// From one size to the next: times this
    #[arg(short = 'f', long = "stepfactor", value_name = "FACTOR", default_value = "2")]
    #[arg(value_parser = clap::value_parser!(u64).range(2..))]
    factor: u64,
    /// From one size to the next: plus this, instead of times the factor
    #[arg(short = 'i', long = "stepbytes", value_name = "SIZE", conflicts_with = "factor", value_parser = bytes)]
    step: Option<u64>,
    /// Timed iterations of each size [default: 20; with --osu 1000 up to 8 KiB, then 100]
    #[arg(short = 'n', long = "iters", value_name = "ITERS", value_parser = clap::value_parser!(u32).range(1..))]
    iterations: Option<u32>,
    /// Iterations of each size before the clock starts [default: 1; with --osu 100 up to 8 KiB, then 10]
    #[arg(short = 'w', long = "warmup_iters", value_name = "ITERS")]
    warmup: Option<u32>,
    /// The operator: sum, prod, min, max or avg
    #[arg(short = 'o', long, value_name = "OP", default_value = "sum", value_parser = op)]
    op: ReduceOp,
    /// The element type: f32, f64, f16, bf16, i8, u8, i32, i64 or u64, or nccl-tests' name for it
    #[arg(short = 'd', long = "datatype", value_name = "DTYPE", default_value = "f32", value_parser = dtype)]
    dtype: DType,
    /// The root of a broadcast, reduce, gather or scatter
    #[arg(short = 'r', long, value_name = "RANK", default_value = "0")]
    root: u32,
    /// Compare every element of every rank with a scalar reference (1) or do not (0)
    #[arg(short = 'c', long, value_name = "0|1", default_value = "1", value_parser = switch)]
    #[arg(action = ArgAction::Set)]
    check: bool,
    /// Take buffers that all ranks of the host have mapped, so that nothing is staged
    #[arg(long)]
    registered: bool,
    /// The links between ranks that share no memory [default: PACELINE_FABRIC, else auto]
    #[arg(long, value_name = "auto|quic|tls", value_parser = fabric)]
    fabric: Option<Fabric>,
    /// Whose memory the buffers are in and which way they go: host; or a GPU's through nccl, through the host (fallback),
    /// through NCCL inside hosts (hierarchy), or as the ranks agree (auto). Without a GPU, fallback takes the host's memory
    #[arg(long, value_name = "host|nccl|fallback|hierarchy|auto", default_value = "host", value_parser = backend)]
    backend: Backend,
    /// OSU's loop and columns: each call timed by itself, with a barrier after it
    #[arg(long)]
    osu: bool,
    /// Print one JSON document, with percentiles and what the machine is, instead of a table
    #[arg(long)]
    json: bool,
    /// Also write a plot of time and bus bandwidth over the sizes
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Where the ranks meet [default: a free port of 127.0.0.1]
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST:PORT")]
    rdzv_endpoint: Option<Endpoint>,
    /// Start each rank through this shell command, which has the rank's own command in "$@" and its number in
    /// $PACELINE_RANK; for ranks in containers or other network namespaces
    #[arg(long, value_name = "COMMAND")]
    through: Option<String>,
    /// Print which schedule would run for each size and why; measure nothing
    #[arg(long, conflicts_with_all = ["osu", "json", "plot"])]
    explain: bool,
}

impl Flags {
    /// The measurement these flags ask for; `words` are the arguments as they were written.
    ///
    /// # Errors
    /// [`Error::Usage`] for flags that do not fit together.
    pub fn into_args(self, words: Vec<OsString>) -> Result<BenchArgs, Error> {
        let traits = self.collective.traits();
        let fewest = *self.ranks.start();
        if fewest < traits.least_ranks {
            return usage(format!("{} needs at least {} ranks", traits.name, traits.least_ranks));
        }
        if traits.has_root && self.root >= fewest {
            return usage(format!("root {} does not exist; the ranks are 0 to {}", self.root, fewest - 1));
        }
        if traits.shape == Shape::Empty && self.plot.is_some() {
            return usage(format!("a {} has no sizes to plot", traits.name));
        }
        if self.backend != Backend::Host {
            let refused = [
                (traits.shape == Shape::Empty, "a barrier has no elements in a device's memory"),
                (self.registered, "--registered is about the host's memory"),
                (self.explain, "--explain is about the host's schedules"),
            ];
            if let Some((_, why)) = refused.into_iter().find(|(refused, _)| *refused) {
                return usage(format!("{why}; leave --backend out"));
            }
        }
        let usual = if self.osu { OSU_LARGEST } else { LARGEST };
        let max = self.max.unwrap_or(usual.max(self.min));
        if self.min > max {
            return usage(format!("the smallest size, {} B, is above the largest, {max} B", self.min));
        }
        let step = self.step.map_or(Step::Times(self.factor), Step::Plus);
        let sizes: Vec<u64> = sizes(self.min, max, step).take(ROWS_LIMIT + 1).collect();
        if sizes.len() > ROWS_LIMIT {
            return usage(format!("more than {ROWS_LIMIT} sizes; take a larger step"));
        }
        Ok(BenchArgs {
            collective: self.collective,
            ranks: self.ranks,
            sizes,
            op: self.op,
            dtype: self.dtype,
            root: self.root as usize,
            check: self.check,
            timing: if self.osu { Timing::Separated } else { Timing::BackToBack },
            output: match (self.json, self.explain) {
                (true, _) => Output::Json,
                (_, true) => Output::Explain,
                _ => Output::Table,
            },
            registered: self.registered,
            fabric: self.fabric,
            backend: self.backend,
            plot: self.plot,
            rendezvous: self.rdzv_endpoint,
            through: self.through,
            iterations: self.iterations,
            warmup: self.warmup,
            words,
        })
    }
}

#[derive(Clone, Copy)]
enum Step {
    Times(u64),
    Plus(u64),
}

fn sizes(min: u64, max: u64, step: Step) -> impl Iterator<Item = u64> {
    let next = move |&size: &u64| match step {
        Step::Times(factor) => size.checked_mul(factor),
        Step::Plus(bytes) => size.checked_add(bytes),
    };
    std::iter::successors(Some(min), next).take_while(move |&size| size <= max)
}

fn ranks(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let number =
        |text: &str| text.trim_start_matches('=').parse().ok().filter(|n| (1..=RANKS_LIMIT).contains(n));
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(format!(
            "give a number of ranks from 1 to {RANKS_LIMIT}, such as 4, or a range, such as 1..8"
        )),
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        _ => None,
    };
    let number = digits.parse::<u64>().ok().filter(|&number| number > 0);
    number
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << shift))
        .ok_or_else(|| "give a number of bytes from 1 on, such as 4, 64K, 16M or 1G".to_owned())
}

fn op(text: &str) -> Result<ReduceOp, String> {
    let names = OPS.map(ReduceOp::name).join(", ");
    OPS.into_iter().find(|op| op.name() == text).ok_or_else(|| format!("choose one of {names}"))
}

fn dtype(text: &str) -> Result<DType, String> {
    let name = match text {
        "float" => "f32",
        "double" => "f64",
        "half" => "f16",
        "bfloat16" => "bf16",
        "int8" | "char" => "i8",
        "uint8" => "u8",
        "int32" | "int" => "i32",
        "int64" => "i64",
        "uint64" => "u64",
        other => other,
    };
    let names = DType::ALL.map(DType::name).join(", ");
    DType::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| format!("choose one of {names}"))
}

fn backend(text: &str) -> Result<Backend, String> {
    let found = Wanted::NAMES.into_iter().find(|(name, _)| *name == text);
    match (text, found) {
        ("host", _) => Ok(Backend::Host),
        (_, Some((_, wanted))) => Ok(Backend::Device(wanted)),
        _ => Err("choose one of host, nccl, fallback, hierarchy, auto".to_owned()),
    }
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err("give 0 or 1".to_owned()),
    }
}

fn usage<T>(reason: String) -> Result<T, Error> {
    Err(Error::Usage(reason))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }

    fn args(line: &str) -> Result<BenchArgs, String> {
        let line = Line::try_parse_from(format!("bench {line}").split_whitespace());
        let flags = line.map_err(|e| e.to_string())?.flags;
        flags.into_args(Vec::new()).map_err(|e| e.to_string())
    }

    fn bytes_of(line: &str, ranks: u32) -> Vec<u64> {
        args(line).expect(line).rows(ranks).iter().map(|row| row.bytes).collect()
    }

    #[test]
    fn sizes_rise_by_a_factor_or_a_step_up_to_the_largest() {
        assert_eq!(bytes_of("all_reduce -b 4 -e 64", 2), [4, 8, 16, 32, 64]);
        assert_eq!(bytes_of("all_reduce -b 4 -e 100 -f 10", 2), [4, 40]);
        assert_eq!(bytes_of("all_reduce -b 1K -e 3K -i 1K", 2), [1024, 2048, 3072]);
        assert_eq!(bytes_of("all_reduce -b 32M", 2), [32 << 20], "the usual largest size is below it");
        assert_eq!(bytes_of("all_reduce -b 1G -e 1G", 2), [1 << 30]);
    }

    #[test]
    fn sizes_that_come_to_the_same_buffers_are_one_row() {
        assert_eq!(bytes_of("all_gather -b 4 -e 64", 4), [16, 32, 64], "the size is the whole array");
        assert_eq!(bytes_of("all_reduce -b 1 -e 16 -d f64", 2), [8, 16]);
        assert_eq!(bytes_of("barrier", 4), [0]);
        let rows = args("reduce_scatter -b 1M -e 1M").expect("right").rows(4);
        assert_eq!((rows[0].count, rows[0].input_len, rows[0].output_len), (65_536, 262_144, 65_536));
    }

    #[test]
    fn ranks_are_a_number_or_a_range() {
        assert_eq!(ranks("4"), Ok(4..=4));
        assert_eq!(ranks("1..8"), Ok(1..=8));
        assert_eq!(ranks("1..=8"), Ok(1..=8));
        for text in ["", "0", "x", "4..2", "1..", "..4", "1..2..3", "99999"] {
            assert!(ranks(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, value) in
            [("4", 4), ("64K", 65_536), ("1m", 1 << 20), ("2G", 2 << 30), ("1KiB", 1024), ("8B", 8)]
        {
            assert_eq!(bytes(text), Ok(value), "{text}");
        }
        for text in ["", "K", "-1", "0", "1.5M", "4X", "4KX", "99999999999G"] {
            assert!(bytes(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn names_are_ours_or_those_of_nccl_tests() {
        assert_eq!((dtype("f32"), dtype("float")), (Ok(DType::F32), Ok(DType::F32)));
        assert_eq!(dtype("bfloat16"), Ok(DType::BF16));
        assert!(dtype("f8").expect_err("there is none").contains("f32, f64"));
        assert_eq!(op("max"), Ok(ReduceOp::Max));
        assert!(op("mean").is_err());
    }

    #[test]
    fn flags_that_do_not_fit_together_are_refused() {
        for (line, reason) in [
            ("sendrecv --ranks 1", "sendrecv needs at least 2 ranks"),
            ("broadcast --ranks 2..4 -r 2", "root 2 does not exist; the ranks are 0 to 1"),
            ("all_reduce -b 2M -e 1M", "the smallest size, 2097152 B, is above the largest, 1048576 B"),
            ("barrier --plot x.svg", "a barrier has no sizes to plot"),
            ("barrier --backend nccl", "a barrier has no elements in a device's memory; leave --backend out"),
            ("all_reduce -b 1 -e 1G -i 1", "more than 10000 sizes; take a larger step"),
        ] {
            assert_eq!(args(line), Err(reason.to_owned()), "{line}");
        }
        assert!(args("all_reduce -c 2").is_err() && !args("all_reduce -c 0").expect("right").check);
        assert!(args("all_reduce --explain --json").is_err());
        assert!(args("all_reduce -f 4 -i 4").is_err());
        assert!(args("all_reduce -f 1").is_err(), "the sizes would never end");
    }

    #[test]
    fn osu_counts_its_iterations_by_size() {
        let iterations = |line: &str| {
            let args = args(line).expect(line);
            args.rows(2).iter().map(|row| args.iterations(row)).collect::<Vec<_>>()
        };
        assert_eq!(iterations("all_reduce --osu -b 8K -e 16K"), [OSU_SMALL, OSU_LARGE]);
        assert_eq!(iterations("all_reduce -b 4 -e 4"), [Iterations { timed: 20, untimed: 1 }]);
        assert_eq!(iterations("all_reduce --osu -b 4 -e 4 -n 7 -w 0"), [Iterations { timed: 7, untimed: 0 }]);
    }

    #[test]
    fn the_memory_is_that_of_the_largest_job() {
        assert_eq!(args("all_reduce --ranks 1..4 -b 4 -e 1M").expect("right").needed_bytes(), 8 << 20);
        assert_eq!(args("all_gather --ranks 4 -b 4 -e 1M").expect("right").needed_bytes(), 5 << 20);
        let scattered = args("reduce_scatter --ranks 4 -b 4 -e 1M").expect("right");
        assert_eq!(scattered.needed_bytes(), 8 << 20, "in place, the output is in the input");
        assert_eq!(args("scatter --ranks 4 -b 4 -e 1M").expect("right").needed_bytes(), 5 << 20);
    }
}
