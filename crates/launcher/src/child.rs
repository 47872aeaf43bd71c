//! Starts one process of the job so that it cannot outlive the launcher. The only file here with `unsafe`.
//!
//! Each child leads a process group of its own. Ended in order, the launcher kills the group, and with it whatever
//! the child has started and left in it. Ended by SIGKILL, the launcher can do nothing, and the kernel kills the
//! child (PR_SET_PDEATHSIG). That reaches the child alone, not what the child has started.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpid, getppid, kill_process_group, set_parent_process_death_signal};
use rustix::thread::{CpuSet, sched_setaffinity};

/// A process that has been started.
#[derive(Debug)]
pub struct Spawned {
    /// The process and its group.
    pub group: ProcessGroup,
    /// The time of its start.
    pub started: Instant,
    /// What it writes to stdout; reading does not block.
    pub stdout: OwnedFd,
    /// What it writes to stderr; reading does not block.
    pub stderr: OwnedFd,
}

/// A process group, which is killed when this value is dropped.
///
/// The number of a group may be given to another process once the group is empty and its leader has been waited for.
/// So drop this soon after that: the kernel gives out all other numbers first, 32,768 at the least, which takes more
/// than the half second that the supervisor allows itself.
#[derive(Debug)]
pub struct ProcessGroup(Pid);

impl ProcessGroup {
    /// The number of the group and of the process that leads it.
    pub fn pid(&self) -> Pid {
        self.0
    }

    /// Sends the signal to every process of the group.
    pub fn signal(&self, signal: Signal) {
        // It fails if the group is empty, which is what the signal was to achieve, or if all of its processes have
        // changed their user, against which nothing can be done.
        let _ = kill_process_group(self.0, signal);
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Starts `command` with no standard input and with pipes for its outputs, bound to `processors` if there are any.
///
/// Call it on the main thread: the kernel kills the child when the *thread* that started it ends.
///
/// # Errors
/// What `fork`, `pipe` or `exec` said.
pub fn spawn(command: &mut Command, processors: Option<CpuSet>) -> io::Result<Spawned> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let launcher = getpid();
    let die_with_launcher = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if let Some(processors) = &processors {
            sched_setaffinity(None, processors)?;
        }
        // The launcher may have died before the line above, and then nothing will kill this process.
        if getppid() == Some(launcher) { Ok(()) } else { Err(Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed, since another thread may have held any
    // lock at the fork. The closure makes a few system calls through rustix, which wraps them without locks or memory
    // allocation, and `Errno` becomes an `io::Error` without allocating. It captures a number and a set of bits by value.
    unsafe { command.pre_exec(die_with_launcher) };
    let started = Instant::now();
    let mut child = command.spawn()?;
    let group = ProcessGroup(Pid::from_child(&child));
    let stdout: OwnedFd = child.stdout.take().expect("stdout was set to a pipe").into();
    let stderr: OwnedFd = child.stderr.take().expect("stderr was set to a pipe").into();
    for pipe in [&stdout, &stderr] {
        rustix::io::ioctl_fionbio(pipe, true)?;
    }
    Ok(Spawned { group, started, stdout, stderr })
}
