//! Traces of the flight recorder as files, in the schema that PyTorch's analyser (`torchfrtrace`) reads.
//!
//! One file per rank, `rank_3`, in a folder that all share or that are put together afterwards. The analyser pairs
//! the calls of all ranks and says where the first one differs, or which ranks have not come. Its schema is
//! PyTorch's own, version 2.10, a Python pickle; what in it differs from PyTorch's traces:
//!
//! - Only calls are in it, no stack frames.
//! - Shares that differ in length have the length of all together, in and out, since a rank knows no more.
//! - Messages from one rank to another are in a group of these two, one for each direction, because the analyser
//!   expects all ranks of a group in each call.
//! - Our own names and errors are in additional fields, which it ignores.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use paceline_collectives::recorder::{GroupTrace, Record, Trace};
use paceline_collectives::{DType, Kind, Operation};
use serde::Serialize;

/// The schema of PyTorch 2.11.
const VERSION: &str = "2.10";

/// The name of a rank's file; the analyser takes the number at the end for the rank.
pub fn file_name(rank: usize) -> String {
    format!("rank_{rank}")
}

/// Writes a trace into `folder`, which is made if it is not there, in place of an earlier one of the same rank.
/// `timeout` is how long a collective may take. Blocks for some milliseconds.
///
/// # Errors
/// The operating system's; there is no half of a file then. A process that exits meanwhile leaves `RANK.partial`.
pub fn write(folder: &Path, trace: &Trace, timeout: Duration) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    // Its name has nothing of a trace's in it, so that an analyser which comes too early does not take it for one.
    let partial = folder.join(format!("{}.partial", trace.rank));
    let written = write_to(&partial, trace, timeout)
        .and_then(|()| fs::rename(&partial, folder.join(file_name(trace.rank))));
    if written.is_err() {
        // Fails when it could not even be made.
        let _ = fs::remove_file(partial);
    }
    written
}

fn write_to(path: &Path, trace: &Trace, timeout: Duration) -> io::Result<()> {
    let mut file = BufWriter::new(fs::File::create(path)?);
    let pickled = serde_pickle::to_writer(&mut file, &dump(trace, timeout), serde_pickle::SerOptions::new());
    pickled.map_err(io::Error::other)?;
    file.flush()
}

/// What is in a file.
#[derive(Serialize)]
struct Dump {
    version: &'static str,
    rank: usize,
    /// By name.
    pg_config: BTreeMap<String, Group>,
    pg_status: BTreeMap<String, Status>,
    entries: Vec<Entry>,
    paceline: Paceline,
}

/// A "process group".
#[derive(Serialize)]
struct Group {
    name: String,
    desc: &'static str,
    /// A list in Python's words.
    ranks: String,
}

/// The numbers of a group's last collectives.
#[derive(Default, Serialize)]
struct Status {
    last_enqueued_collective: i64,
    last_started_collective: i64,
    last_completed_collective: i64,
}

/// What PyTorch has no field for.
#[derive(Serialize)]
struct Paceline {
    release: &'static str,
    taken_ns: u64,
    failure: Option<String>,
}

/// A call.
#[derive(Serialize)]
struct Entry {
    frames: [(); 0],
    record_id: u64,
    pg_id: usize,
    process_group: (String, &'static str),
    collective_seq_id: i64,
    p2p_seq_id: i64,
    op_id: i64,
    profiling_name: String,
    time_created_ns: u64,
    duration_ms: Option<f64>,
    input_sizes: [[usize; 1]; 1],
    input_dtypes: [&'static str; 1],
    output_sizes: [[usize; 1]; 1],
    output_dtypes: [&'static str; 1],
    state: &'static str,
    time_discovered_started_ns: Option<u64>,
    time_discovered_completed_ns: Option<u64>,
    retired: bool,
    timeout_ms: u64,
    is_p2p: bool,
    thread_id: &'static str,
    thread_name: &'static str,
    /// The call in our own words, as errors have it.
    paceline_operation: String,
}

fn dump(trace: &Trace, timeout: Duration) -> Dump {
    let (mut pg_config, mut pg_status, mut entries) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for (index, group) in trace.groups.iter().enumerate() {
        pg_config.insert(name(group), whole(group));
        pg_status.insert(name(group), status(&group.records));
        for record in &group.records {
            if let Kind::Message { from, to } = record.operation.kind {
                let pair = pair(group, from, to);
                pg_config.entry(pair.name.clone()).or_insert(pair);
            }
            entries.push((record.issued, entry((index, group), record, (trace.rank, timeout))));
        }
    }
    // The analyser takes them in the order of the calls.
    entries.sort_by_key(|(issued, _)| *issued);
    let (release, taken_ns) = (env!("CARGO_PKG_VERSION"), nanoseconds(trace.taken));
    Dump {
        version: VERSION,
        rank: trace.rank,
        pg_config,
        pg_status,
        entries: entries.into_iter().map(|(_, entry)| entry).collect(),
        paceline: Paceline { release, taken_ns, failure: trace.failure.clone() },
    }
}

fn name(group: &GroupTrace) -> String {
    if group.id == 0 { "0".to_owned() } else { format!("{:016x}", group.id) }
}

fn whole(group: &GroupTrace) -> Group {
    let desc = match group.id {
        _ if group.on_device => "nccl",
        0 => "default_pg",
        _ => "split",
    };
    Group { name: name(group), desc, ranks: format!("{:?}", group.members) }
}

/// The group in which messages from one rank to another are listed.
fn pair(group: &GroupTrace, from: usize, to: usize) -> Group {
    let (from, to) = (group.members[from], group.members[to]);
    Group {
        name: format!("{} {from}->{to}", name(group)),
        desc: "messages",
        ranks: format!("{:?}", [from, to]),
    }
}

fn status(records: &[Record]) -> Status {
    let collective = |record: &&Record| !matches!(record.operation.kind, Kind::Message { .. });
    let last = |wanted: fn(&Record) -> bool| {
        let mut found = records.iter().rev().filter(collective).filter(|record| wanted(record));
        found.next().map_or(-1, |record| record.operation.number.cast_signed())
    };
    Status {
        last_enqueued_collective: last(|_| true),
        last_started_collective: last(|record| record.started.is_some()),
        last_completed_collective: last(|record| record.ended.is_some()),
    }
}

fn entry((index, group): (usize, &GroupTrace), record: &Record, (rank, timeout): (usize, Duration)) -> Entry {
    let Record { operation, message, issued, started, ended, .. } = *record;
    let number = operation.number.cast_signed();
    let world_size = group.members.len();
    let (input, output) = sizes(operation, world_size);
    let (process_group, sequence, is_p2p) = match operation.kind {
        Kind::Message { from, to } => {
            let Group { name, desc, .. } = pair(group, from, to);
            ((name, desc), i64::from(message), true)
        }
        _ => ((name(group), whole(group).desc), number, false),
    };
    let took = started.zip(ended).map(|(started, ended)| ended.duration_since(started).unwrap_or_default());
    let dtype = [scalar_type(operation.dtype)];
    Entry {
        frames: [],
        record_id: operation.number,
        pg_id: index,
        process_group,
        collective_seq_id: sequence,
        p2p_seq_id: if is_p2p { sequence } else { 0 },
        op_id: number,
        profiling_name: profiling_name(operation, group, rank),
        time_created_ns: nanoseconds(issued),
        duration_ms: took.map(|took| took.as_secs_f64() * 1e3),
        input_sizes: [[input]],
        input_dtypes: dtype,
        output_sizes: [[output]],
        output_dtypes: dtype,
        state: match (started, ended) {
            (_, Some(_)) => "completed",
            (Some(_), None) => "started",
            (None, None) => "scheduled",
        },
        time_discovered_started_ns: started.map(nanoseconds),
        time_discovered_completed_ns: ended.map(nanoseconds),
        retired: ended.is_some(),
        timeout_ms: timeout.as_millis() as u64,
        is_p2p,
        thread_id: "0",
        thread_name: "",
        paceline_operation: operation.to_string(),
    }
}

/// PyTorch's name of a call. Where shares differ in length, it is one whose lengths the analyser does not multiply.
fn profiling_name(operation: Operation, group: &GroupTrace, rank: usize) -> String {
    let name = match operation.kind {
        Kind::AllReduce(_) => "all_reduce",
        Kind::ReduceScatter(_) => "_reduce_scatter_base",
        Kind::ReduceScatterV { .. } => "REDUCE_SCATTER_coalesced",
        Kind::AllGather | Kind::AllToAllCounts | Kind::Split => "_all_gather_base",
        Kind::AllGatherV { .. } => "ALLGATHER_coalesced",
        Kind::Broadcast { .. } => "broadcast",
        Kind::Reduce { .. } => "reduce",
        Kind::Gather { .. } => "gather",
        Kind::Scatter { .. } => "scatter",
        Kind::AllToAll | Kind::AllToAllV { .. } => "all_to_all",
        Kind::Barrier => "all_reduce_barrier",
        Kind::Message { from, to } => {
            // By their places in the group of the two.
            let (from, to) = (group.members[from], group.members[to]);
            let (source, target) = (usize::from(from > to), usize::from(to > from));
            return match rank == from {
                true => format!("nccl:send {source}->{target}"),
                false => format!("nccl:recv {target}<-{source}"),
            };
        }
        // A release of the collectives that has another one; the analyser would refuse an unknown name.
        _ => "coalesced",
    };
    format!("nccl:{name}")
}

/// The lengths of input and output of a call, in elements.
fn sizes(operation: Operation, world_size: usize) -> (usize, usize) {
    let (count, all) = (operation.count, operation.count.saturating_mul(world_size));
    match operation.kind {
        Kind::ReduceScatter(_) | Kind::Scatter { .. } => (all, count),
        Kind::AllGather | Kind::AllToAllCounts | Kind::Split | Kind::Gather { .. } => (count, all),
        Kind::AllToAll => (all, all),
        _ => (count, count),
    }
}

/// The name of a dtype as PyTorch's recorder spells it.
fn scalar_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "Float",
        DType::F64 => "Double",
        DType::F16 => "Half",
        DType::BF16 => "BFloat16",
        DType::I8 => "Char",
        DType::U8 => "Byte",
        DType::I32 => "Int",
        DType::I64 => "Long",
        DType::U64 => "UInt64",
        _ => "Undefined",
    }
}

fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}
