//! The pods' processes: starts them, prints what they write, starts them again, ends them.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Signal, WaitOptions, waitpid};

use super::environment::{self, expand};
use super::manifest::Job;
use super::network::Network;
use super::policy::{Next, Outcome, Progress};
use crate::child::{self, ProcessGroup, Spawned};
use crate::console::{Console, RankOutput, Route, Source, Stream};
use crate::ending::Ending;
use crate::error::Error;
use crate::supervise::Signals;

/// Between two looks for what has happened.
const INTERVAL: Duration = Duration::from_millis(20);

/// Pauses before a pod is started again: doubling, as in a cluster, but shorter than there.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself.
    Over(Outcome),
    /// Because the launcher was told to stop.
    Stopped(Signal),
}

/// One pod.
enum Pod {
    Runs(ProcessGroup),
    /// To be started again then.
    Pauses(Instant),
    Ended,
}

/// Runs all pods until the job is over and none is left.
///
/// # Errors
/// A pod cannot be started. Those that were have been killed.
pub fn run(job: &Job, network: &Network, grace: Duration, console: &Console) -> Result<Ended, Error> {
    let mut signals = Signals::catch(&[])
        .map_err(|e| Error::System { what: "cannot catch signals".to_owned(), why: e.to_string() })?;
    let restarts = job.pods.iter().map(|pod| pod.restart);
    let mut progress = Progress::new(job.success.clone(), restarts, job.backoff_limit);
    let mut pods = (0..job.pods.len())
        .map(|number| start(job, network, number, console).map(Pod::Runs))
        .collect::<Result<Vec<_>, Error>>()?;
    let ended = 'job: loop {
        // Nothing here writes traces.
        if let Some(signal) = signals.take().into_iter().find(|signal| !signals.asks_for_traces(*signal)) {
            break Ended::Stopped(signal);
        }
        for (number, pod) in pods.iter_mut().enumerate() {
            let next = match pod {
                Pod::Runs(group) => ending(group).map(|ending| (progress.ended(number, ending), ending)),
                Pod::Pauses(until) if *until <= Instant::now() => {
                    *pod = Pod::Runs(start(job, network, number, console)?);
                    None
                }
                Pod::Pauses(_) | Pod::Ended => None,
            };
            match next {
                None => {}
                Some((Next::Wait, _)) => *pod = Pod::Ended,
                Some((Next::Over(outcome), _)) => {
                    *pod = Pod::Ended;
                    break 'job Ended::Over(outcome);
                }
                Some((Next::StartAgain(time), ending)) => {
                    let pause = (PAUSES.0 * 2u32.saturating_pow(time - 1)).min(PAUSES.1);
                    *pod = Pod::Pauses(Instant::now() + pause);
                    say(
                        console,
                        &format!("[{number}] {ending}; it is started again in {} s", pause.as_secs()),
                    );
                }
            }
        }
        thread::sleep(INTERVAL);
    };
    let signal = if let Ended::Stopped(signal) = ended { signal } else { Signal::TERM };
    end_all(&mut pods, signal, grace);
    Ok(ended)
}

/// Tells all pods to end, and kills those that have not after the grace.
fn end_all(pods: &mut [Pod], signal: Signal, grace: Duration) {
    let deadline = Instant::now() + grace;
    for pod in pods.iter() {
        if let Pod::Runs(group) = pod {
            group.signal(signal);
        }
    }
    while pods.iter().any(|pod| matches!(pod, Pod::Runs(_))) && Instant::now() < deadline {
        for pod in pods.iter_mut() {
            if matches!(pod, Pod::Runs(group) if ending(group).is_some()) {
                *pod = Pod::Ended;
            }
        }
        thread::sleep(INTERVAL);
    }
    // Dropping a group kills it.
    pods.iter_mut().for_each(|pod| *pod = Pod::Ended);
}

/// How the pod's process has ended, if it has.
fn ending(group: &ProcessGroup) -> Option<Ending> {
    let (_, status) = waitpid(Some(group.pid()), WaitOptions::NOHANG).ok().flatten()?;
    Ending::from_wait(status)
}

fn start(job: &Job, network: &Network, number: usize, console: &Console) -> Result<ProcessGroup, Error> {
    let plan = &job.pods[number];
    let name = super::name(job, plan);
    let mut variables = network.variables(&name);
    variables.extend(environment::of(job, number, network.addresses()));
    let mut words = plan.command.iter().map(|word| expand(word, &variables));
    let program = words.next().expect("a manifest without a command is refused");
    let mut command: Command = network.command(number, &name, &program);
    command.args(words).envs(variables.iter().map(|(name, value)| (name, value)));
    if let Some(folder) = &plan.folder {
        command.current_dir(folder);
    }
    let spawned = child::spawn(&mut command, None).map_err(|e| not_started(&name, &program, &e))?;
    let Spawned { group, stdout, stderr, .. } = spawned;
    for (pipe, stream) in [(stdout, Stream::Out), (stderr, Stream::Err)] {
        // 64 pods at most.
        let output = console.rank_output(
            Source { rank: number as u32, stream },
            Route { to_console: true, ..Route::default() },
        );
        thread::spawn(move || copy(&pipe, output));
    }
    Ok(group)
}

/// Prints what comes through the pipe until its end.
fn copy(pipe: &OwnedFd, mut output: RankOutput) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match rustix::io::read(pipe, &mut buffer) {
            Ok(count @ 1..) => output.push(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {
                // It wakes for more and for the end; an error shows in the next read.
                let _ = poll(&mut [PollFd::new(pipe, PollFlags::IN)], None);
            }
            Ok(0) | Err(_) => return output.finish(),
        }
    }
}

fn say(console: &Console, words: &str) {
    console.print(Stream::Err, format!("paceline: {words}\n").into_bytes());
}

fn not_started(name: &str, program: &str, e: &io::Error) -> Error {
    let why = format!("{e} ({program}); images are not looked at, so the command must be on this machine");
    Error::System { what: format!("cannot start {name}"), why }
}
