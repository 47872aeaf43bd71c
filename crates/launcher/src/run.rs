//! Runs one job: checks what can be checked, opens the rendezvous, starts the ranks, watches them, explains the end.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use paceline_runtime::env::PLAIN_TCP;
use paceline_runtime::nodes::Generation;
use paceline_transport::Fabric;
use paceline_transport::boot::CONVERSATIONS_LIMIT;
use rustix::process::{Resource, Signal, getrlimit};
use rustix::thread::CpuSet;

use crate::backoff::Backoff;
use crate::binding;
use crate::child::{self, Spawned};
use crate::cli::RunArgs;
use crate::console::{Console, Stream};
use crate::credentials;
use crate::elastic::Elastic;
use crate::ending::{code_for_signal, signal_in_words};
use crate::error::Error;
use crate::health::{Health, Pulse};
use crate::job::{Job, Verdict};
use crate::program;
use crate::rendezvous::{self, Rendezvous};
use crate::report::{Evidence, Outcome, report};
use crate::supervise::{Replacement, Signals, Then, Worker, supervise};
use crate::termination;
use crate::torchrun::logs::{Attempt, Logs};
use crate::torchrun::{environment, errors};
use crate::traces;

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
    args.torchrun.script.as_deref().map_or(Ok(()), program::check_script)?;
    check_file_limit(args)?;
    if let Some(words) = unprotected(args) {
        say(console, &format!("warning: this job is insecure: {words}"));
    }
    if let Some(remark) = &args.pod.remark {
        console.print(Stream::Err, format!("paceline: note: {remark}\n").into_bytes());
    }
    // Before the first rank: a signal that comes while the ranks start is found by the supervisor.
    let mut signals =
        Signals::catch(&args.torchrun.signals.more).map_err(|e| system("cannot catch signals", &e))?;
    let logs = Logs::open(&args.torchrun.logs, &args.torchrun.run_id)?;
    logs.kept()
        .into_iter()
        .for_each(|folder| say(console, &format!("log files are in {}", folder.display())));
    let pulse = Pulse::new(args.ranks);
    let _health = args.health.map(|address| Health::serve(address, pulse.clone())).transpose()?;
    let rendezvous = match open(args, console, &mut signals, &pulse)? {
        Meeting::Open(rendezvous) => rendezvous,
        Meeting::Stopped(signal) => {
            let words = format!("paceline: stopped by {}\n", signal_in_words(signal.as_raw()));
            credentials::remove_stored();
            return Ok((args.torchrun.exit_code.of(code_for_signal(signal.as_raw())), words));
        }
    };
    let args = &args.at(rendezvous.node());
    let launch = Launch {
        args,
        program: &program,
        logs: &logs,
        rendezvous: &*rendezvous,
        console,
        pulse: &pulse,
        replaced: Cell::new(0),
    };
    loop {
        let (job, report, then) = launch.run_generation(&mut signals)?;
        if then == Then::End {
            return Ok((args.torchrun.exit_code.of(job.exit_code()), report));
        }
        console.print(Stream::Err, report.into_bytes());
    }
}

/// What all generations of a job have in common.
struct Launch<'a> {
    args: &'a RunArgs,
    program: &'a Path,
    logs: &'a Logs,
    rendezvous: &'a dyn Rendezvous,
    console: &'a Console,
    pulse: &'a Pulse,
    /// How many ranks have been replaced in earlier generations: they are on the same account as these.
    replaced: Cell<u32>,
}

impl Launch<'_> {
    /// Starts the ranks and watches them until they have ended. Returns how, and what is to be said about it.
    fn run_generation(&self, signals: &mut Signals) -> Result<(Job, String, Then), Error> {
        let generation = self.rendezvous.generation();
        let args = &self.args.within(&generation);
        let attempt = self.logs.attempt(generation.number, args.ranks)?;
        let start = Instant::now();
        tracing::info!(ranks = args.ranks, program = %self.program.display(), generation = generation.number, "starting");
        let processors =
            binding::processors(args.binding, args.ranks, std::env::var_os("OMP_NUM_THREADS").as_deref());
        let start_rank = |rank: u32, variable| {
            let processors = processors.as_ref().map(|of_ranks| of_ranks[rank as usize]);
            self.start_rank(rank, (&generation, &attempt), processors, variable)
        };
        let restarts_left = generation.restarts_left().saturating_sub(self.replaced.get());
        self.pulse.starts(&generation);
        // Those of a launcher that was killed, and whose place this one has.
        traces::set_aside(args, generation.number, std::env::var_os("PACELINE_FLIGHT_RECORDER"));
        let elastic = Elastic::open(self.args, restarts_left, self.rendezvous, self.pulse.clone())?;
        let alone = if args.pod.replaced_alone { restarts_left } else { 0 };
        let (backoff, paused) = (Backoff::default(), Vec::new());
        let mut replacement = Replacement { elastic, alone, backoff, paused, start: &start_rank };
        let mut workers = (0..args.ranks)
            .map(|rank| start_rank(rank, replacement.elastic.next_process(rank)))
            .collect::<Result<Vec<_>, Error>>()?;
        tracing::info!(elapsed_us = start.elapsed().as_micros() as u64, "all ranks started");

        let mut job = Job::new(args.grace, args.first_rank(), workers.iter().map(Worker::process));
        if restarts_left > 0 {
            job = job.that_starts_again();
        }
        let then = supervise(
            &mut job,
            &mut workers,
            self.rendezvous,
            signals,
            self.console,
            &mut replacement,
            self.pulse,
        );
        self.replaced.set(self.replaced.get().saturating_add(replacement.elastic.replaced()));
        let (exit_code, elapsed_us) = (job.exit_code(), start.elapsed().as_micros() as u64);
        match then {
            Then::End => tracing::info!(exit_code, elapsed_us, "job ended"),
            Then::Again => {
                tracing::info!(exit_code, elapsed_us, generation = generation.number, "generation ended")
            }
        }
        let evidence: Vec<Evidence> = (0..)
            .zip(&workers)
            .map(|(rank, worker)| Evidence {
                tail: worker.tail(),
                recorded: errors::read(&attempt.error_file(rank)),
            })
            .collect();
        let outcome = match then {
            Then::End => Outcome::Ended,
            Then::Again => {
                // The ranks here may have other numbers in the next one.
                let following = generation.number.saturating_add(1);
                traces::set_aside(args, following, std::env::var_os("PACELINE_FLIGHT_RECORDER"));
                let next = self.rendezvous.generation();
                match next.changes > generation.changes {
                    true => Outcome::Changes { nodes: next.nodes.len() },
                    false => Outcome::Restarts { number: next.restarts(), most: next.max_restarts },
                }
            }
        };
        let report = report(&job, &evidence, outcome);
        if then == Then::End {
            self.pass_on(&job, &evidence, &attempt, &generation);
        }
        Ok((job, report, then))
    }

    /// Starts one rank of this machine, with another variable in its environment.
    fn start_rank(
        &self,
        rank: u32,
        (generation, attempt): (&Generation, &Attempt<'_>),
        processors: Option<CpuSet>,
        variable: (&'static str, String),
    ) -> Result<Worker, Error> {
        let number = self.args.within(generation).first_rank() + rank;
        let routes = [attempt.route(number, rank, Stream::Out)?, attempt.route(number, rank, Stream::Err)?];
        let error_file = attempt.error_file(rank);
        // What a process before this one has recorded is not its own; there is none before the first.
        let _ = fs::remove_file(&error_file);
        let worker = environment::Worker { local_rank: rank, generation, error_file: &error_file };
        let spawned = self.spawn(&worker, processors, variable)?;
        Ok(Worker::new(number, spawned, routes, self.console))
    }

    /// Starts a process in the launcher's working directory and environment, plus what makes it a rank.
    fn spawn(
        &self,
        worker: &environment::Worker<'_>,
        processors: Option<CpuSet>,
        variable: (&'static str, String),
    ) -> Result<Spawned, Error> {
        let (args, rank) = (self.args, worker.local_rank);
        let mut command = Command::new(self.program);
        let macros = args.torchrun.macros;
        command.arg0(&args.program);
        command.args(args.program_args.iter().map(|word| environment::argument(word, macros, rank)));
        // Ranks need no secret: they have their certificates.
        command.env_remove("PACELINE_JOB_SECRET_FILE");
        command.envs(args.pod.variables.iter().map(|(name, value)| (name, value)));
        command.envs(self.rendezvous.worker_env(rank)).env(variable.0, variable.1);
        command.envs(environment::of_worker(args, worker, |name| std::env::var_os(name)));
        command.envs(threads(args.ranks, std::env::var_os("OMP_NUM_THREADS")));
        // The ranks see pipes; this tells them that a progress bar would reach a person.
        match self.console.is_terminal(Stream::Err) {
            true => command.env("PACELINE_CONSOLE", "terminal"),
            false => command.env_remove("PACELINE_CONSOLE"),
        };
        child::spawn(&mut command, processors).map_err(|e| not_started(rank, args, &e))
    }

    /// Tells those outside why the job has failed: whoever has started the launcher, and who looks at the pod.
    fn pass_on(&self, job: &Job, evidence: &[Evidence<'_>], attempt: &Attempt<'_>, generation: &Generation) {
        let verdict = job.verdict();
        let Some(cause) = job.failure_in_words() else { return };
        let recorded = match verdict {
            Verdict::Failed { rank } => {
                if let Some(own) = &self.args.torchrun.error_file {
                    errors::pass_on(&attempt.error_file(rank), own, job.exit_code().into());
                }
                evidence[rank as usize].recorded.as_ref().map(|recorded| recorded.summary.clone())
            }
            _ => None,
        };
        let exit_code = self.args.torchrun.exit_code.of(job.exit_code());
        let message = termination::Message {
            cause,
            message: recorded,
            exit_code,
            node: self.args.node(),
            restarts: generation.restarts(),
        };
        termination::write(Path::new(termination::FILE), &message);
    }
}

fn say(console: &Console, words: &str) {
    console.print(Stream::Err, format!("paceline: {words}\n").into_bytes());
}

/// What is not protected though it could be, in words.
fn unprotected(args: &RunArgs) -> Option<String> {
    let open_to_all =
        args.nodes.as_ref().is_some_and(|nodes| nodes.secret.is_none()) && args.identity.is_none();
    let open_to_all = open_to_all.then(|| {
        format!("without a job secret anybody who reaches {} can join it, as any machine", args.rendezvous)
    });
    let plain = (args.fabric == Some(Fabric::Tcp)).then(|| PLAIN_TCP.to_owned());
    let words: Vec<String> = open_to_all.into_iter().chain(plain).collect();
    (!words.is_empty()).then(|| words.join("; "))
}

/// How opening the rendezvous ended.
enum Meeting {
    Open(Box<dyn Rendezvous>),
    /// The launcher was told to stop while it waited for the other nodes.
    Stopped(Signal),
}

/// Opens the rendezvous, on a thread of its own: the wait for other nodes, or for certificates that others make, is
/// long, and as PID 1 of a container the launcher would not even be ended by a signal that it does not look for.
fn open(args: &RunArgs, console: &Console, signals: &mut Signals, pulse: &Pulse) -> Result<Meeting, Error> {
    if args.nodes.is_none() && args.identity.is_none() {
        return rendezvous::open(args, console).map(Meeting::Open);
    }
    let (opened, outcome) = channel();
    let (for_thread, console) = (args.clone(), console.clone());
    thread::spawn(move || drop(opened.send(rendezvous::open(&for_thread, &console))));
    loop {
        pulse.waits();
        match outcome.recv_timeout(SIGNAL_INTERVAL) {
            Ok(outcome) => return outcome.map(Meeting::Open),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let (what, why) = ("cannot wait for the other nodes".to_owned(), "a defect".to_owned());
                return Err(Error::System { what, why });
            }
        }
        // There is nothing yet to be traced.
        if let Some(signal) = signals.take().into_iter().find(|signal| !signals.asks_for_traces(*signal)) {
            return Ok(Meeting::Stopped(signal));
        }
    }
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
