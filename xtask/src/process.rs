//! Running other programs: shown while they run, bounded in time, and stopped with all their descendants.

use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// A log without a new line for this long makes people wonder, and some CI systems give up on it.
const SILENCE: Duration = Duration::from_secs(60);

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(100);

/// Which of the program's streams we read (and pass on) line by line.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    /// Both, in the order in which they were written.
    Both,
    /// Standard output alone: progress bars on standard error keep their terminal.
    Stdout,
}

/// Cargo, without the variables that `cargo run` set for us: they would reach build scripts and make them run again.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(crate::workspace::root());
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a program with our own output streams. It is stopped, and an error, after `limit`.
///
/// # Errors
/// The program cannot be started, fails, or takes longer than `limit`.
pub fn run(mut command: Command, limit: Duration) -> Result<()> {
    let words = shown(&command);
    command.stdin(Stdio::null());
    let child = command.spawn().with_context(|| format!("cannot start `{words}`"))?;
    let (no_lines, lines) = mpsc::channel();
    let ended = follow(child, &lines, limit, &words, &mut |_| true)?;
    drop(no_lines);
    must_succeed(ended.status()?, &words)
}

/// Runs a program, passes its lines on to our standard output and, without colours, to `on_line`, and returns how it
/// ended.
///
/// # Errors
/// See [`listen`].
pub fn observe(
    command: Command,
    watch: Watch,
    limit: Duration,
    on_line: &mut dyn FnMut(&str),
) -> Result<ExitStatus> {
    listen(command, watch, limit, &mut |line| {
        println!("{line}");
        on_line(&without_colours(line));
    })
}

/// Runs a program, passes its lines to `on_line` and nowhere else, and returns how it ended.
///
/// # Errors
/// The program cannot be started or takes longer than `limit`. A program that fails is not an error here.
pub fn listen(
    command: Command,
    watch: Watch,
    limit: Duration,
    on_line: &mut dyn FnMut(&str),
) -> Result<ExitStatus> {
    let mut on_sign = |line: Option<&str>| {
        line.into_iter().for_each(&mut *on_line);
        true
    };
    listen_while(command, watch, limit, &mut on_sign)?.status()
}

/// How a program that was watched ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself.
    Exited(ExitStatus),
    /// It was stopped, since enough was seen of it.
    Stopped,
}

impl Ended {
    fn status(self) -> Result<ExitStatus> {
        match self {
            Self::Exited(status) => Ok(status),
            Self::Stopped => bail!("stopped, though nobody asked for it"),
        }
    }
}

/// Runs a program and passes its lines to `goes_on`, and nothing several times a second, until that says that enough has
/// been seen: then the program is stopped with all its descendants.
///
/// # Errors
/// See [`listen`].
pub fn listen_while(
    mut command: Command,
    watch: Watch,
    limit: Duration,
    goes_on: &mut dyn FnMut(Option<&str>) -> bool,
) -> Result<Ended> {
    let words = shown(&command);
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    if watch == Watch::Both {
        command.stderr(writer.try_clone().context("cannot share a pipe")?);
    }
    command.stdin(Stdio::null()).stdout(writer);
    let child = command.spawn().with_context(|| format!("cannot start `{words}`"))?;
    // The command holds our copies of the writing end; while they live the reader never sees the end.
    drop(command);
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    follow(child, &lines, limit, &words, goes_on)
}

/// Fails with one line unless the program succeeded.
///
/// # Errors
/// The program failed.
pub fn must_succeed(status: ExitStatus, words: &str) -> Result<()> {
    if !status.success() {
        bail!("`{words}` failed ({status})");
    }
    Ok(())
}

/// The command as a person would type it.
pub fn shown(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Waits for the program while passing its lines on, and stops it at the limit, or when enough was seen.
fn follow(
    mut child: Child,
    lines: &Receiver<String>,
    limit: Duration,
    words: &str,
    goes_on: &mut dyn FnMut(Option<&str>) -> bool,
) -> Result<Ended> {
    let start = Instant::now();
    let mut last_sign = start;
    loop {
        match lines.recv_timeout(POLL) {
            Ok(line) => {
                last_sign = Instant::now();
                if !goes_on(Some(&line)) {
                    stop(&mut child);
                    return Ok(Ended::Stopped);
                }
                // One that never falls silent has a limit too.
                if start.elapsed() <= limit {
                    continue;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            // The program has closed its output; it may still be running.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL),
        }
        if let Some(status) = child.try_wait().with_context(|| format!("cannot wait for `{words}`"))? {
            // What it wrote last. Not until the end of the pipe: a daemon that it left behind may hold that open.
            while let Ok(line) = lines.recv_timeout(POLL) {
                goes_on(Some(&line));
            }
            return Ok(Ended::Exited(status));
        }
        if !goes_on(None) {
            stop(&mut child);
            return Ok(Ended::Stopped);
        }
        if start.elapsed() > limit {
            stop(&mut child);
            bail!("`{words}` was stopped: it ran longer than {} minutes", limit.as_secs().div_ceil(60));
        }
        if last_sign.elapsed() > SILENCE && !io::stderr().is_terminal() {
            last_sign = Instant::now();
            eprintln!("… still running after {:.0} min: {words}", start.elapsed().as_secs_f64() / 60.0);
        }
        let _ = io::stdout().flush();
    }
}

/// Kills the program and whatever it started: a test that hangs is a grandchild of cargo and would outlive it.
fn stop(child: &mut Child) {
    let mut family = vec![child.id()];
    let mut next = 0;
    while next < family.len() {
        family.extend(children_of(family[next]));
        next += 1;
    }
    let ids = family.iter().map(u32::to_string);
    // Failure means that they have ended by themselves, which is as good.
    let _ = Command::new("kill").arg("-KILL").args(ids).stderr(Stdio::null()).status();
    let _ = child.wait();
}

fn children_of(process: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// The text without terminal escape sequences of the colour kind (`ESC [ … letter`).
fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        plain.push_str(before);
        let end = after.find(|c: char| c.is_ascii_alphabetic()).map_or(after.len(), |at| at + 1);
        rest = &after[end..];
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn lines_of_both_streams_arrive_in_order() {
        let mut seen = Vec::new();
        let script = "echo one; echo two >&2; echo three; exit 3";
        let status = observe(shell(script), Watch::Both, Duration::from_secs(20), &mut |line| {
            seen.push(line.to_owned())
        });
        assert_eq!(status.unwrap().code(), Some(3));
        assert_eq!(seen, ["one", "two", "three"]);
    }

    #[test]
    fn a_program_that_hangs_is_stopped_with_its_children() {
        let start = Instant::now();
        let mut grandchild = None;
        let script = "sh -c 'echo $$; sleep 60' & wait";
        let outcome = observe(shell(script), Watch::Both, Duration::from_millis(500), &mut |line| {
            grandchild = line.parse::<u32>().ok();
        });
        assert!(outcome.unwrap_err().to_string().contains("was stopped"));
        assert!(start.elapsed() < Duration::from_secs(30));
        // A killed process is not gone at once, and as an orphan it is somebody else's to reap.
        let stat = format!("/proc/{}/stat", grandchild.unwrap());
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(start.elapsed() < Duration::from_secs(30), "the grandchild lives");
            thread::yield_now();
        }
    }

    #[test]
    fn a_program_is_stopped_when_enough_was_seen_also_while_it_says_nothing() {
        let start = Instant::now();
        for silent in [false, true] {
            let mut seen = false;
            let ended = listen_while(
                shell("echo one; sleep 60"),
                Watch::Both,
                Duration::from_secs(50),
                &mut |line| {
                    let enough = if silent { seen && line.is_none() } else { line.is_some() };
                    seen |= line.is_some();
                    !enough
                },
            );
            assert_eq!(ended.unwrap(), Ended::Stopped);
        }
        assert!(start.elapsed() < Duration::from_secs(40));
    }

    #[test]
    fn a_program_that_never_falls_silent_is_stopped_at_its_limit() {
        let script = "while :; do echo word; done";
        let outcome = listen(shell(script), Watch::Both, Duration::from_millis(200), &mut |_| {});
        assert!(outcome.unwrap_err().to_string().contains("was stopped"));
    }

    #[test]
    fn colours_are_taken_out() {
        assert_eq!(without_colours("\u{1b}[1m\u{1b}[32mok\u{1b}[0m. 3 passed"), "ok. 3 passed");
        assert_eq!(without_colours("plain"), "plain");
    }
}
