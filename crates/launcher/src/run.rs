//! Runs one job: checks what can be checked, opens the rendezvous, starts the ranks, watches them, explains the end.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use paceline_transport::boot::CONVERSATIONS_LIMIT;
use rustix::process::{Resource, Signal, getrlimit};
use rustix::thread::CpuSet;

use crate::binding;
use crate::child::{self, Spawned};
use crate::cli::RunArgs;
use crate::console::{Console, Stream};
use crate::ending::{code_for_signal, signal_in_words};
use crate::error::Error;
use crate::job::Job;
use crate::program;
use crate::rendezvous::{self, Rendezvous};
use crate::report::report;
use crate::supervise::{Signals, Worker, supervise};

/// Open files of the launcher besides the ranks' pipes: its own streams, the console, signals and the rendezvous,
/// some 16 in all, and the pipe by which `spawn` learns about `exec`.
const OWN_FILES: u64 = 32;

/// How often a launcher that waits for other nodes looks for signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// Runs the job to its end. Returns the launcher's exit code and what is to be told last on stderr.
///
/// # Errors
/// If the ranks could not be started; then none is left.
pub fn run(args: &RunArgs, console: &Console) -> Result<(u8, String), Error> {
    let program = program::find(&args.program, std::env::var_os("PATH").as_deref())?;
    check_file_limit(args)?;
    // Before the first rank: a signal that comes while the ranks start is found by the supervisor.
    let mut signals = Signals::catch().map_err(|e| system("cannot catch signals", &e))?;
    let rendezvous = match open(args, console, &mut signals)? {
        Meeting::Open(rendezvous) => rendezvous,
        Meeting::Stopped(signal) => {
            let words = format!("paceline: stopped by {}\n", signal_in_words(signal.as_raw()));
            return Ok((code_for_signal(signal.as_raw()), words));
        }
    };

    let start = Instant::now();
    tracing::info!(ranks = args.ranks, program = %program.display(), "starting");
    let processors =
        binding::processors(args.binding, args.ranks, std::env::var_os("OMP_NUM_THREADS").as_deref());
    let mut workers = (0..args.ranks)
        .map(|rank| {
            let processors = processors.as_ref().map(|of_ranks| of_ranks[rank as usize]);
            let spawned = start_rank(rank, args, (&program, processors), &*rendezvous, console)?;
            Ok(Worker::new(args.first_rank() + rank, spawned, console))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    tracing::info!(elapsed_us = start.elapsed().as_micros() as u64, "all ranks started");

    let mut job = Job::new(args.grace, args.first_rank(), workers.iter().map(Worker::process));
    supervise(&mut job, &mut workers, &*rendezvous, &mut signals, console);
    tracing::info!(exit_code = job.exit_code(), elapsed_us = start.elapsed().as_micros() as u64, "job ended");
    let tails: Vec<_> = workers.iter().map(Worker::tail).collect();
    Ok((job.exit_code(), report(&job, &tails)))
}

/// How opening the rendezvous ended.
enum Meeting {
    Open(Box<dyn Rendezvous>),
    /// The launcher was told to stop while it waited for the other nodes.
    Stopped(Signal),
}

/// Opens the rendezvous, on a thread of its own: the wait for other nodes is long, and as PID 1 of a container the
/// launcher would not even be ended by a signal that it does not look for.
fn open(args: &RunArgs, console: &Console, signals: &mut Signals) -> Result<Meeting, Error> {
    if args.nodes.is_none() {
        return rendezvous::open(args, console).map(Meeting::Open);
    }
    let (opened, outcome) = channel();
    let (for_thread, console) = (args.clone(), console.clone());
    thread::spawn(move || drop(opened.send(rendezvous::open(&for_thread, &console))));
    loop {
        match outcome.recv_timeout(SIGNAL_INTERVAL) {
            Ok(outcome) => return outcome.map(Meeting::Open),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let (what, why) = ("cannot wait for the other nodes".to_owned(), "a defect".to_owned());
                return Err(Error::System { what, why });
            }
        }
        if let Some(signal) = signals.take().first() {
            return Ok(Meeting::Stopped(*signal));
        }
    }
}

/// Starts one rank in the launcher's working directory and environment, plus what makes it a rank.
fn start_rank(
    rank: u32,
    args: &RunArgs,
    (program, processors): (&Path, Option<CpuSet>),
    rendezvous: &dyn Rendezvous,
    console: &Console,
) -> Result<Spawned, Error> {
    let mut command = Command::new(program);
    command.arg0(&args.program).args(&args.program_args);
    // Ranks need no secret: they have their certificates.
    command.env_remove("PACELINE_JOB_SECRET_FILE");
    command.envs(rendezvous.worker_env(rank));
    command.envs(threads(args.ranks, std::env::var_os("OMP_NUM_THREADS")));
    // The ranks see pipes; this tells them that a progress bar would reach a person.
    match console.is_terminal(Stream::Err) {
        true => command.env("PACELINE_CONSOLE", "terminal"),
        false => command.env_remove("PACELINE_CONSOLE"),
    };
    child::spawn(&mut command, processors).map_err(|e| not_started(rank, args, &e))
}

/// One OpenMP thread per rank unless the user has chosen: by default each rank would take all CPUs. torchrun does the
/// same.
fn threads(ranks: u32, chosen: Option<OsString>) -> Option<(&'static str, &'static str)> {
    (ranks > 1 && chosen.is_none()).then_some(("OMP_NUM_THREADS", "1"))
}

fn not_started(rank: u32, args: &RunArgs, e: &io::Error) -> Error {
    let program = || args.program.to_string_lossy().into_owned();
    match e.kind() {
        // The file was there a moment ago, so it is the interpreter in its first line that is missing.
        io::ErrorKind::NotFound => Error::ProgramNotExecutable {
            program: program(),
            why: "its interpreter does not exist".to_owned(),
        },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ArgumentListTooLong => {
            Error::ProgramNotExecutable { program: program(), why: e.to_string() }
        }
        _ => system(&format!("cannot start rank {rank}"), e),
    }
}

fn check_file_limit(args: &RunArgs) -> Result<(), Error> {
    let ranks = args.ranks;
    // Node 0 of several also serves launchers.
    let conversations = if args.nodes.is_some() { CONVERSATIONS_LIMIT as u64 } else { 0 };
    let needed = 2 * u64::from(ranks) + OWN_FILES + conversations;
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    if needed <= limit { Ok(()) } else { Err(Error::FileLimit { ranks, needed, limit }) }
}

fn system(what: &str, e: &io::Error) -> Error {
    Error::System { what: what.to_owned(), why: e.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_openmp_thread_per_rank_unless_chosen() {
        assert_eq!(threads(4, None), Some(("OMP_NUM_THREADS", "1")));
        assert_eq!(threads(4, Some("8".into())), None);
        assert_eq!(threads(1, None), None);
    }
}
