//! Tests that are their own rank programs: the test runs `paceline run` in front of its own executable.

#![allow(dead_code, reason = "each test uses a part of this")]

pub mod names;
pub mod process;
pub mod sockets;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use sockets::Socket;

/// The first argument of a test executable that runs as a rank; the second says which part it plays.
const AS_RANK: &str = "as-rank";

/// The launcher.
pub const PACELINE: &str = env!("CARGO_BIN_EXE_paceline");

/// No job of these tests takes longer; a hang fails its test instead of the whole run.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The `main` of such a test: plays a rank's part, or runs the tests.
pub fn main(rank: impl FnOnce(&str, &[String]), trials: impl FnOnce() -> Vec<Trial>) {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|first| first == AS_RANK) {
        return rank(&args[2], &args[3..]);
    }
    let mut arguments = Arguments::from_args();
    // Jobs of four ranks on two CPUs: two jobs at a time would only wait for each other.
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, trials()).exit();
}

/// A test of this name.
pub fn trial(name: impl Into<String>, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
        outcome.map_err(|_| Failed::from("see the panic above"))
    })
}

/// A running `paceline run`, and what it prints.
pub struct Job {
    pub launcher: Child,
    lines: Receiver<String>,
    /// Everything printed so far, stdout and stderr as they came.
    pub seen: Vec<String>,
}

impl Job {
    /// Starts `paceline run -n ranks flags -- this executable as the part`.
    pub fn start(ranks: usize, flags: &[&str], part: &str, args: &[&str]) -> Self {
        Self::start_elsewhere(Command::new(PACELINE), ranks, flags, &[], part, args)
    }

    /// The same with another command that runs [`PACELINE`], and words that go before the rank's program.
    pub fn start_elsewhere(
        mut command: Command,
        ranks: usize,
        flags: &[&str],
        rank_words: &[String],
        part: &str,
        args: &[&str],
    ) -> Self {
        command.args(["run", "-n", &ranks.to_string()]).args(flags).arg("--").args(rank_words);
        Self::spawn(command, part, args)
    }

    /// Starts `paceline run flags -- this executable as the part`, with these variables.
    pub fn launch(flags: &[&str], variables: &[(&str, &str)], part: &str, args: &[&str]) -> Self {
        let mut command = Command::new(PACELINE);
        command.arg("run").args(flags).arg("--").envs(variables.iter().copied());
        Self::spawn(command, part, args)
    }

    /// Starts the command with this executable as the program of its ranks.
    fn spawn(mut command: Command, part: &str, args: &[&str]) -> Self {
        command.arg(std::env::current_exe().expect("a test has an executable"));
        command.args([AS_RANK, part]).args(args).env("RUST_BACKTRACE", "0");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut launcher = command.spawn().expect("the launcher starts");
        let (sender, lines) = mpsc::channel();
        let streams: [Box<dyn Read + Send>; 2] = [
            Box::new(launcher.stdout.take().expect("it is piped")),
            Box::new(launcher.stderr.take().expect("it is piped")),
        ];
        for stream in streams {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        Self { launcher, lines, seen: Vec::new() }
    }

    /// Waits for `count` lines that contain `text` and returns them.
    pub fn wait_for(&mut self, text: &str, count: usize) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found: Vec<String> = self.seen.iter().filter(|line| line.contains(text)).cloned().collect();
            if found.len() >= count {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.seen.push(line),
                Err(_) => panic!("no {count} lines with `{text}`; seen:\n{}", self.seen.join("\n")),
            }
        }
    }

    /// The next line, as soon as there is one; `None` at the end of the output.
    pub fn next_line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                self.seen.push(line.clone());
                Some(line)
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                panic!("nothing happens; seen:\n{}", self.seen.join("\n"))
            }
        }
    }

    /// Waits for the end of the launcher and of its output.
    pub fn finish(mut self) -> Finished {
        let deadline = Instant::now() + PATIENCE;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
        }
        if Instant::now() >= deadline {
            let _ = self.launcher.kill();
            panic!("the job hangs; seen:\n{}", self.seen.join("\n"));
        }
        let status = self.launcher.wait().expect("the launcher is our child");
        Finished { status, lines: std::mem::take(&mut self.seen) }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

/// What a job left behind.
pub struct Finished {
    pub status: ExitStatus,
    pub lines: Vec<String>,
}

impl Finished {
    pub fn assert_success(&self) {
        assert!(self.status.success(), "{}:\n{}", self.status, self.lines.join("\n"));
    }

    /// The lines of ranks that contain `text`, without the launcher's own, which repeat some.
    pub fn lines_with(&self, text: &str) -> Vec<&str> {
        let of_a_rank = |line: &&str| line.starts_with('[') && line.contains(text);
        self.lines.iter().map(String::as_str).filter(of_a_rank).collect()
    }

    /// The sockets that each of the ranks says it has, in lines `rank 3 socket tcp 127.0.0.1:1 127.0.0.1:2`.
    pub fn sockets(&self, rank: usize) -> Vec<Socket> {
        let start = format!("rank {rank} socket ");
        let lines = self.lines.iter().filter_map(|line| line.split_once(&start));
        lines.map(|(_, socket)| socket.parse().expect("the form in which it is written")).collect()
    }

    /// The line of the launcher's report, after `paceline: `.
    pub fn report(&self) -> &str {
        let reports: Vec<&str> =
            self.lines.iter().filter_map(|line| line.strip_prefix("paceline: ")).collect();
        assert_eq!(reports.len(), 1, "one line says why:\n{}", self.lines.join("\n"));
        reports[0]
    }
}

/// Microseconds since 1970, to compare moments in different processes.
pub fn now_us() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_micros()
}
