//! Watches the ranks: reads what they write, notices when they end, and does what [`Job`] decides.
//!
//! One thread and one `poll` over everything that can happen, with a timeout of at most a second. Nothing in the loop
//! blocks: pipes are read without waiting, [`Console`] queues, the rendezvous does not wait for its peers. A rank is
//! done when it has ended and both of its pipes are closed, or [`DRAINING`] after its end: a process that it left
//! behind may hold the pipes open for ever. Then its process group is killed. In a job of several machines the loop
//! also hears of failures elsewhere, and goes on when the last rank here has ended until the rendezvous is over.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use paceline_runtime::nodes::LOST_NODE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::backoff::Backoff;
use crate::child::{ProcessGroup, Spawned};
use crate::console::{Console, RankOutput, Route, Source, Stream};
use crate::elastic::{Elastic, Fate};
use crate::ending::Ending;
use crate::error::Error;
use crate::health::Pulse;
use crate::job::{Action, Job};
use crate::lines::Tail;
use crate::rendezvous::{Next, Rendezvous, Told};

/// How long what a rank has left behind may still write: enough for `tee` in a start script to pass on its last lines.
const DRAINING: Duration = Duration::from_millis(500);

/// The longest sleep; what the rendezvous does at a certain time is asked for as often. Every event wakes the loop; this bounds what a lost wake-up could cost.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// The sleep while the console is backed up. Its writer has no descriptor to wait for, and 10 ms is little compared to
/// the time a reader takes for the megabyte that is queued then.
const BACKED_UP_SLEEP: Duration = Duration::from_millis(10);

/// One read. A pipe holds this much unless its owner has changed that.
const READ_BYTES: usize = 64 * 1024;

/// What a pipe can hold at most without privileges (/proc/sys/fs/pipe-max-size), so the most that a dead rank can have
/// left in it.
const PIPE_BYTES: usize = 1024 * 1024;

/// One rank: its process and its output.
#[derive(Debug)]
pub struct Worker {
    started: Instant,
    pid: Pid,
    /// `None` once the rank is done.
    group: Option<ProcessGroup>,
    /// When the process was seen to have ended.
    ended: Option<Instant>,
    stdout: Output,
    stderr: Output,
}

#[derive(Debug)]
struct Output {
    /// `None` at its end.
    pipe: Option<OwnedFd>,
    sink: RankOutput,
}

impl Worker {
    /// A process just started as `rank`, whose stdout and stderr go these ways.
    pub fn new(rank: u32, process: Spawned, [out, err]: [Route; 2], console: &Console) -> Self {
        let output = |pipe, stream, route| Output {
            pipe: Some(pipe),
            sink: console.rank_output(Source { rank, stream }, route),
        };
        Worker {
            started: process.started,
            pid: process.group.pid(),
            group: Some(process.group),
            ended: None,
            stdout: output(process.stdout, Stream::Out, out),
            stderr: output(process.stderr, Stream::Err, err),
        }
    }

    /// The process and when it was started.
    pub fn process(&self) -> (Pid, Instant) {
        (self.pid, self.started)
    }

    /// The last lines that the rank wrote to stderr.
    pub fn tail(&self) -> &Tail {
        self.stderr.sink.tail()
    }

    fn outputs(&self) -> [&Output; 2] {
        [&self.stdout, &self.stderr]
    }

    fn outputs_mut(&mut self) -> [&mut Output; 2] {
        [&mut self.stdout, &mut self.stderr]
    }

    /// When the rank is done whatever its pipes do.
    fn drained_at(&self) -> Option<Instant> {
        self.group.as_ref().and(self.ended).map(|at| at + DRAINING)
    }

    fn is_done(&self, now: Instant) -> bool {
        let closed = self.outputs().iter().all(|output| output.pipe.is_none());
        self.drained_at().is_some_and(|at| closed || at <= now)
    }

    /// Kills what the rank has left behind, and prints what is still in its pipes.
    fn close(&mut self) {
        self.group = None;
        self.outputs_mut().into_iter().for_each(Output::close);
    }
}

impl Output {
    /// Reads once; the end of the pipe is noted.
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        let Some(pipe) = &self.pipe else { return 0 };
        match rustix::io::read(pipe, &mut *buffer) {
            Ok(count @ 1..) => {
                self.sink.push(&buffer[..count]);
                return count;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(0) | Err(_) => {
                self.pipe = None;
                self.sink.finish();
            }
        }
        0
    }

    fn close(&mut self) {
        let mut buffer = vec![0; READ_BYTES];
        let mut total = 0;
        while total < PIPE_BYTES {
            match self.read(&mut buffer) {
                0 => break,
                count => total += count,
            }
        }
        self.pipe = None;
        self.sink.finish();
    }
}

/// The signals that concern the launcher, caught from the moment this is made until the process ends.
pub struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    /// The one that is not passed on.
    traces: Option<Signal>,
}

impl Signals {
    /// Catches the signals that are passed on, `more` among them, SIGCHLD, and SIGUSR1, which asks for traces unless it
    /// is one of `more`.
    ///
    /// SIGHUP, SIGINT and SIGQUIT stay ignored if the launcher was started so: that is what `nohup` and a script's
    /// background jobs ask for.
    ///
    /// # Errors
    /// What `socketpair` or `sigaction` said.
    pub fn catch(more: &[i32]) -> io::Result<Self> {
        let ignored = ignored_signals();
        let wanted = [SIGHUP, SIGINT, SIGQUIT].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
        let (read, write) = UnixStream::pair()?;
        let wanted = wanted.chain([SIGTERM, SIGCHLD]).chain(more.iter().copied());
        let traces = (!more.contains(&SIGUSR1)).then_some(SIGUSR1);
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, wanted.chain(traces))?;
        Ok(Signals { delivery, traces: traces.and_then(Signal::from_named_raw) })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }

    /// The signals that came since the last call and concern the job.
    pub fn take(&mut self) -> Vec<Signal> {
        // SIGCHLD only wakes the loop, which looks for ended children each time.
        let pending = self.delivery.pending().filter(|&signal| signal != SIGCHLD);
        pending.filter_map(Signal::from_named_raw).collect()
    }

    /// Whether the signal asks for traces, and is not for the ranks.
    pub fn asks_for_traces(&self, signal: Signal) -> bool {
        self.traces == Some(signal)
    }
}

/// The set of ignored signals, bit k-1 for signal k; empty if it cannot be told.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

/// What takes the place of ranks that end.
pub struct Replacement<'a> {
    /// Decides which are replaced.
    pub elastic: Elastic,
    /// How many ranks that fail are replaced without being members of anything.
    pub alone: u32,
    /// How long those wait that do so again and again.
    pub backoff: Backoff,
    /// Those that wait.
    pub paused: Vec<Paused>,
    /// Starts a process as a rank, with a variable in its environment. On the main thread, as any.
    pub start: &'a dyn Fn(u32, (&'static str, String)) -> Result<Worker, Error>,
}

/// A rank that has ended and is started again at this time, if the job goes on.
#[derive(Debug)]
pub struct Paused {
    rank: u32,
    ending: Ending,
    at: Instant,
}

impl Replacement<'_> {
    /// Those whose pause is over; all of them when the job does not go on.
    fn take_due(&mut self, now: Instant, goes_on: bool) -> Vec<Paused> {
        self.paused.extract_if(.., |paused| !goes_on || paused.at <= now).collect()
    }
}

/// What follows the ranks of one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The job is over.
    End,
    /// They start again.
    Again,
}

/// Runs one generation of the job to its end: returns when every rank has ended or has been given up, and is done, and no other
/// machine needs this one any more, or all start again.
///
/// A rank that belongs to a membership is replaced by itself; where there is a membership, ranks all start again only when
/// nobody has its state any more, and there are checkpoints.
pub fn supervise(
    job: &mut Job,
    workers: &mut [Worker],
    rendezvous: &dyn Rendezvous,
    signals: &mut Signals,
    console: &Console,
    replacement: &mut Replacement<'_>,
    pulse: &Pulse,
) -> Then {
    let mut ranks: HashMap<Pid, u32> = workers.iter().map(|worker| worker.pid).zip(0..).collect();
    let mut buffer = vec![0; READ_BYTES];
    let mut told_to_stop = false;
    let mut told = Told::Nothing;
    loop {
        let mut actions = Vec::new();
        // Once the job has failed that is settled.
        if job.goes_on() && replacement.elastic.has_members() {
            told = Told::NotToStartAgain;
            job.does_not_start_again();
        }
        for (pid, ending) in reap() {
            let Some(&rank) = ranks.get(&pid) else { continue };
            let now = Instant::now();
            workers[rank as usize].ended = Some(now);
            tracing::info!(rank, pid = pid.as_raw_pid(), %ending, "rank ended");
            if !ending.is_success() {
                pulse.failed();
            }
            let fate = replacement.elastic.ended(rank, ending);
            if fate == Fate::Counts && !ending.is_success() && replacement.alone > 0 && job.goes_on() {
                ranks.remove(&pid);
                replacement.alone -= 1;
                let ran = now.saturating_duration_since(workers[rank as usize].started);
                let pause = replacement.backoff.pause(rank, ran);
                if !pause.is_zero() {
                    let (number, pid) = (job.first_rank() + rank, pid.as_raw_pid());
                    let words = format!(
                        "paceline: rank {number} (pid {pid}) {ending}; it is started again in {} s\n",
                        pause.as_secs()
                    );
                    console.print(Stream::Err, words.into_bytes());
                }
                replacement.paused.push(Paused { rank, ending, at: now + pause });
                continue;
            }
            let replaced = job.goes_on()
                && fate == Fate::Replaced
                && replace(job, workers, (rank, ending), console, replacement);
            if replaced {
                ranks.remove(&pid);
                ranks.insert(workers[rank as usize].pid, rank);
            } else {
                actions.extend(job.ended(now, rank, ending));
            }
        }
        let now = Instant::now();
        for signal in signals.take() {
            tracing::info!(signal = signal.as_raw(), "signal received");
            if signals.asks_for_traces(signal) {
                rendezvous.ask_for_traces();
                continue;
            }
            actions.extend(job.signalled(now, signal));
            if job.is_over() {
                job.stopped_while_waiting(now, signal);
                told_to_stop = true;
            }
        }
        if let Some((what, exit_code)) = rendezvous.failure_elsewhere() {
            if exit_code == 0 {
                job.does_not_start_again();
            }
            job.failed_elsewhere(now, what, exit_code);
        }
        if let Some(what) = replacement.elastic.failure() {
            if job.goes_on() && replacement.elastic.may_begin_again() {
                told = Told::Nothing;
                job.starts_again();
            }
            job.failed_elsewhere(now, what, LOST_NODE);
        }
        for rank in replacement.elastic.take_stuck() {
            tracing::warn!(
                rank = job.first_rank() + rank,
                "the other ranks wait for it in vain; it is killed"
            );
            workers[rank as usize].group.iter().for_each(|group| group.signal(Signal::KILL));
        }
        for Paused { rank, ending, .. } in replacement.take_due(now, job.goes_on()) {
            if job.goes_on() && replace(job, workers, (rank, ending), console, replacement) {
                ranks.insert(workers[rank as usize].pid, rank);
            } else {
                actions.extend(job.ended(now, rank, ending));
            }
        }
        actions.extend(job.tick(now));
        actions.into_iter().for_each(|action| perform(action, workers, rendezvous));

        workers.iter_mut().filter(|worker| worker.is_done(now)).for_each(Worker::close);
        if job.is_over() && workers.iter().all(|worker| worker.group.is_none() || worker.ended.is_none()) {
            // What is left has been given up; its output still counts.
            workers.iter_mut().for_each(Worker::close);
            let told = if job.is_stopped() { Told::ToStop } else { told };
            rendezvous.ranks_ended(told);
            // Asked before the answer, which forgets it.
            let cause = rendezvous.cause();
            let next = if told_to_stop { Next::End } else { rendezvous.next(told) };
            if next != Next::Wait {
                // One that ends knows more than before.
                let cause = if next == Next::End { rendezvous.cause() } else { cause };
                // Without a membership ranks end one by one, and what they say of each other is no cause.
                let known = replacement.elastic.failure().is_some();
                cause.into_iter().filter(|_| !known).for_each(|cause| job.settle(cause));
                return if next == Next::End { Then::End } else { Then::Again };
            }
        }
        let running = workers.iter().filter(|worker| worker.ended.is_none()).count();
        pulse.turns(running as u32, job.goes_on());
        let next = replacement.paused.iter().map(|paused| paused.at).min();
        wait_and_read(job, workers, (signals, rendezvous), (console, next), &mut buffer);
    }
}

/// Starts another process in the place of a rank; whether that worked.
fn replace(
    job: &mut Job,
    workers: &mut [Worker],
    (rank, ending): (u32, Ending),
    console: &Console,
    replacement: &mut Replacement<'_>,
) -> bool {
    let worker = &mut workers[rank as usize];
    worker.close();
    let variable = replacement.elastic.next_process(rank);
    let number = job.first_rank() + rank;
    match (replacement.start)(rank, variable) {
        Ok(next) => {
            let (old, new) = (worker.pid.as_raw_pid(), next.pid.as_raw_pid());
            let words = format!("paceline: rank {number} (pid {old}) {ending}; pid {new} takes its place\n");
            console.print(Stream::Err, words.into_bytes());
            *worker = next;
            job.replaced(rank, worker.process());
            true
        }
        Err(error) => {
            tracing::warn!(rank = number, %error, "rank not replaced");
            false
        }
    }
}

/// Every child that has ended since the last call. As PID 1 of a container the launcher also adopts orphans, which are
/// reaped here and are no rank's.
///
/// Deaths by a signal come first: of two ranks that are found dead together, the one that exited by itself is more
/// likely to have noticed the other one's death than the other way round.
fn reap() -> Vec<(Pid, Ending)> {
    let mut found = Vec::new();
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        found.extend(Ending::from_wait(status).map(|ending| (pid, ending)));
    }
    found.sort_by_key(|(_, ending)| matches!(ending, Ending::Exited(_)));
    found
}

fn perform(action: Action, workers: &[Worker], rendezvous: &dyn Rendezvous) {
    match action {
        Action::AnnounceExit { rank, by_itself } => rendezvous.announce_exit(rank, by_itself),
        Action::AnnounceDeath { rank, ending, by_itself } => {
            rendezvous.announce_death(rank, ending, by_itself);
        }
        Action::Send { rank, signal } => {
            tracing::info!(rank, signal = signal.as_raw(), "signal sent");
            if let Some(group) = &workers[rank as usize].group {
                group.signal(signal);
            }
        }
    }
}

/// Sleeps until something happens or is due, and reads what has come.
fn wait_and_read(
    job: &Job,
    workers: &mut [Worker],
    (signals, rendezvous): (&Signals, &dyn Rendezvous),
    (console, next): (&Console, Option<Instant>),
    buffer: &mut [u8],
) {
    let backed_up = console.is_backed_up();
    let longest = if backed_up { BACKED_UP_SLEEP } else { LONGEST_SLEEP };
    let due = workers.iter().filter_map(Worker::drained_at).chain(job.deadline()).chain(next).min();
    let sleep = due.map_or(longest, |at| at.saturating_duration_since(Instant::now()).min(longest));

    let news = PollFd::from_borrowed_fd(rendezvous.news().fd(), PollFlags::IN);
    let mut fds = vec![PollFd::from_borrowed_fd(signals.fd(), PollFlags::IN), news];
    if !backed_up {
        let pipes = workers.iter().flat_map(Worker::outputs).filter_map(|output| output.pipe.as_ref());
        fds.extend(pipes.map(|pipe| PollFd::new(pipe, PollFlags::IN)));
    }
    let sleep = Timespec::try_from(sleep).expect("at most a second");
    if poll(&mut fds, Some(&sleep)).is_err() {
        return;
    }
    // What has come is asked for in the next turn.
    rendezvous.news().clear();
    let ready: Vec<bool> = fds[2..].iter().map(|fd| !fd.revents().is_empty()).collect();
    let open = workers.iter_mut().flat_map(Worker::outputs_mut).filter(|output| output.pipe.is_some());
    for (output, _) in open.zip(ready).filter(|(_, ready)| *ready) {
        output.read(buffer);
    }
}
