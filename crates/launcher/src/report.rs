//! What is told at the end of a job that did not succeed: the cause first, then the evidence, then the others.

use std::fmt;

use rustix::process::Signal;

use crate::ending::{Ending, signal_in_words};
use crate::job::{Job, Rank, Verdict};
use crate::lines::Tail;
use crate::torchrun::errors::Recorded;

/// What is known of a rank beside how it ended.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The last lines that it wrote to stderr.
    pub tail: &'a Tail,
    /// What it wrote to its error file.
    pub recorded: Option<Recorded>,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Ended,
    /// All ranks start again.
    Restarts {
        /// Counted from 1.
        number: u32,
        /// So many are allowed.
        most: u32,
    },
    /// All ranks start again, on another number of nodes.
    Changes {
        /// This one.
        nodes: usize,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Ended => write!(f, "the job has ended"),
            Outcome::Restarts { number, most } => write!(f, "the job starts again ({number} of {most})"),
            Outcome::Changes { nodes } => write!(f, "the job starts again on {nodes} nodes"),
        }
    }
}

/// The report for stderr, or an empty text if the job succeeded. `evidence` is in the order of the ranks.
pub fn report(job: &Job, evidence: &[Evidence<'_>], outcome: Outcome) -> String {
    match job.verdict() {
        // Another machine's ranks have failed when those here had ended.
        Verdict::Done if outcome != Outcome::Ended => format!("paceline: {outcome}\n"),
        Verdict::Done => String::new(),
        Verdict::Failed { rank } => failure(job, rank, &evidence[rank as usize], outcome),
        Verdict::FailedElsewhere { what, .. } => failure_elsewhere(job, &what, outcome),
        Verdict::Stopped { signal } => stop(job, signal),
    }
}

fn failure(job: &Job, failed: u32, evidence: &Evidence<'_>, outcome: Outcome) -> String {
    let rank = &job.ranks()[failed as usize];
    let failed = job.first_rank() + failed;
    let (ending, after) = rank.end.expect("a rank that failed has ended");
    let mut text = format!(
        "paceline: rank {failed} (pid {}) {ending} after {:.1} s; {outcome}\n",
        rank.pid,
        after.as_secs_f64()
    );
    // 137 is how a shell that the program runs under passes SIGKILL on.
    if ending.exit_code() == 137 {
        text += "  SIGKILL: if nobody sent it, look for the out-of-memory killer (dmesg, or the state of the pod)\n";
    }
    text += &words_of(failed, evidence);
    let others = fates(job).filter(|(number, ..)| *number != failed);
    text.extend(others.map(|(number, _, fate)| format!("  rank {number} {fate}\n")));
    text
}

/// What the rank itself has said: the error that it recorded, else the end of its stderr, which would say the same.
fn words_of(rank: u32, evidence: &Evidence<'_>) -> String {
    let (heading, lines): (_, Vec<String>) = match &evidence.recorded {
        Some(Recorded { stack, summary }) => {
            let lines = stack.as_ref().unwrap_or(summary).lines().map(str::to_owned);
            (format!("  the error that rank {rank} recorded:\n"), lines.collect())
        }
        None => {
            (format!("  the last lines that rank {rank} wrote to stderr:\n"), evidence.tail.text().collect())
        }
    };
    if lines.is_empty() {
        return String::new();
    }
    heading + &lines.iter().map(|line| format!("    {line}\n")).collect::<String>()
}

fn failure_elsewhere(job: &Job, what: &str, outcome: Outcome) -> String {
    let fates = fates(job).map(|(number, _, fate)| format!("  rank {number} {fate}\n"));
    format!("paceline: {what}; {outcome}\n{}", fates.collect::<String>())
}

/// Only what did not go as asked is worth a line here: whoever presses Ctrl-C knows why the ranks ended.
fn stop(job: &Job, signal: Signal) -> String {
    let signal = signal.as_raw();
    let mut text = format!("paceline: stopped by {}\n", signal_in_words(signal));
    let as_asked = |rank: &Rank| {
        rank.end.is_some_and(|(ending, _)| ending.is_success() || ending == Ending::Killed(signal))
    };
    let others = fates(job).filter(|(_, rank, _)| !as_asked(rank));
    text.extend(others.map(|(number, _, fate)| format!("  rank {number} {fate}\n")));
    text
}

fn fates(job: &Job) -> impl Iterator<Item = (u32, &Rank, String)> {
    (job.first_rank()..).zip(job.ranks()).map(|(number, rank)| (number, rank, fate(rank)))
}

/// How a rank ended and whose doing that was, as the end of a sentence.
fn fate(rank: &Rank) -> String {
    let sent = rank.sent.map(|signal| (signal, signal_name(signal)));
    match (rank.end, sent) {
        (None, _) => format!("(pid {}) could not be killed and may still run", rank.pid),
        (Some((ending, _)), None) => ending.to_string(),
        (Some((Ending::Killed(by), _)), Some((signal, name))) if by == signal.as_raw() => {
            format!("was ended by paceline ({name})")
        }
        (Some((ending, _)), Some((_, name))) => format!("{ending} after {name} from paceline"),
    }
}

fn signal_name(signal: Signal) -> &'static str {
    signal_hook::low_level::signal_name(signal.as_raw()).unwrap_or("a signal")
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::process::Pid;

    use super::*;

    /// The report at the end of a job whose ranks wrote these last lines, and no error files.
    fn told(job: &Job, tails: &[&Tail]) -> String {
        let evidence: Vec<_> = tails.iter().map(|&tail| Evidence { tail, recorded: None }).collect();
        report(job, &evidence, Outcome::Ended)
    }

    fn job(ranks: i32) -> (Job, Instant) {
        let start = Instant::now();
        let pid = |n| Pid::from_raw(100 + n).expect("positive");
        (Job::new(Duration::from_secs(1), 0, (0..ranks).map(|n| (pid(n), start))), start)
    }

    #[test]
    fn a_job_that_succeeded_has_no_report() {
        let (mut job, start) = job(1);
        job.ended(start, 0, Ending::Exited(0));
        assert_eq!(told(&job, &[&Tail::default()]), "");
    }

    #[test]
    fn a_failure_is_told_with_its_evidence_and_the_fate_of_the_others() {
        let (mut job, start) = job(6);
        let mut tail = Tail::default();
        tail.push(b"Traceback");
        tail.push(b"  \xff odd");
        job.ended(start, 5, Ending::Exited(0));
        job.ended(start + Duration::from_millis(1234), 2, Ending::Killed(9));
        job.ended(start + Duration::from_secs(2), 0, Ending::Exited(1));
        job.tick(start + Duration::from_secs(4));
        job.ended(start + Duration::from_secs(4), 1, Ending::Killed(15));
        job.ended(start + Duration::from_secs(4), 3, Ending::Exited(0));
        job.tick(start + Duration::from_secs(5));
        job.tick(start + Duration::from_secs(10));
        let empty = Tail::default();
        assert_eq!(
            told(&job, &[&empty, &empty, &tail, &empty, &empty, &empty]),
            "paceline: rank 2 (pid 102) was killed by signal 9 (SIGKILL) after 1.2 s; the job has ended\n  \
             SIGKILL: if nobody sent it, look for the out-of-memory killer (dmesg, or the state of the pod)\n  \
             the last lines that rank 2 wrote to stderr:\n    \
             Traceback\n      \u{fffd} odd\n  \
             rank 0 exited with code 1\n  \
             rank 1 was ended by paceline (SIGTERM)\n  \
             rank 3 exited with code 0 after SIGTERM from paceline\n  \
             rank 4 (pid 104) could not be killed and may still run\n  \
             rank 5 exited with code 0\n"
        );
    }

    #[test]
    fn on_another_node_ranks_have_their_numbers_in_the_job() {
        let start = Instant::now();
        let pid = |n| Pid::from_raw(n).expect("positive");
        let of_node = || Job::new(Duration::from_secs(1), 2, [100, 101].map(|n| (pid(n), start)));
        let tails = [Tail::default(), Tail::default()];
        let tails = [&tails[0], &tails[1]];
        let mut job = of_node();
        job.ended(start, 1, Ending::Exited(3));
        job.ended(start, 0, Ending::Exited(1));
        let text = "paceline: rank 3 (pid 101) exited with code 3 after 0.0 s; the job has ended\n  \
                    rank 2 exited with code 1\n";
        assert_eq!(told(&job, &tails), text);
        let mut job = of_node();
        job.failed_elsewhere(start, "rank 0 on node 0 exited with code 3".to_owned(), 3);
        job.ended(start, 0, Ending::Exited(1));
        job.tick(start + Duration::from_secs(2));
        job.ended(start + Duration::from_secs(2), 1, Ending::Killed(15));
        let text = "paceline: rank 0 on node 0 exited with code 3; the job has ended\n  \
                    rank 2 exited with code 1\n  rank 3 was ended by paceline (SIGTERM)\n";
        assert_eq!(told(&job, &tails), text);
    }

    #[test]
    fn what_a_rank_recorded_is_told_in_place_of_its_last_lines() {
        let (mut job, start) = job(1);
        job.ended(start, 0, Ending::Exited(1));
        let mut tail = Tail::default();
        tail.push(b"noise");
        let stack = Some("Traceback:\n  line".to_owned());
        let recorded = Some(Recorded { summary: "ValueError: no".to_owned(), stack });
        let text =
            report(&job, &[Evidence { tail: &tail, recorded }], Outcome::Restarts { number: 1, most: 3 });
        let expected = "paceline: rank 0 (pid 100) exited with code 1 after 0.0 s; the job starts again (1 of 3)\n  \
                        the error that rank 0 recorded:\n    Traceback:\n      line\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_rank_that_wrote_nothing_has_no_heading() {
        let (mut job, start) = job(1);
        job.ended(start, 0, Ending::Exited(3));
        let text = "paceline: rank 0 (pid 100) exited with code 3 after 0.0 s; the job has ended\n";
        assert_eq!(told(&job, &[&Tail::default()]), text);
    }

    #[test]
    fn a_stop_tells_only_what_did_not_go_as_asked() {
        let (mut job, start) = job(3);
        job.signalled(start, Signal::TERM);
        job.ended(start, 0, Ending::Exited(0));
        job.ended(start, 1, Ending::Killed(15));
        job.tick(start + Duration::from_secs(1));
        job.ended(start, 2, Ending::Killed(9));
        let empty = Tail::default();
        assert_eq!(
            told(&job, &[&empty, &empty, &empty]),
            "paceline: stopped by signal 15 (SIGTERM)\n  rank 2 was ended by paceline (SIGKILL)\n"
        );
    }
}
