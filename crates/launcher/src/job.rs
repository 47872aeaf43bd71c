//! What is to be done when a rank ends, a signal comes or time passes, as a value: no process, no clock.
//!
//! The first rank that fails is the cause, all that follows are its consequences. The others are told at once and
//! have [`CLOSING`] to end on their own, since they may want to say goodbye, save something or print what they were
//! waiting for. Then they get SIGTERM, and when the grace is over SIGKILL. A signal to the launcher is passed on and
//! starts the grace directly; a second SIGINT or SIGTERM ends it.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::ending::{Ending, code_for_signal, signal_in_words};

/// What the others have, after the first failure, to end on their own: a rank is told of a lost peer within a second
/// (docs: "It does not hang"), and needs about another to print a traceback and unload its libraries.
pub const CLOSING: Duration = Duration::from_secs(2);

/// How long SIGKILL may take. A process that the kernel has not ended by then hangs in a driver or on a dead file
/// server, and the launcher's own end must not wait for that.
const KILLING: Duration = Duration::from_secs(5);

/// Signals that come within this time are one request: GNU `timeout` and terminals send theirs twice, once to the
/// process and once to its group.
const ONE_REQUEST: Duration = Duration::from_millis(300);

/// All ranks of the job on this machine, and how far its end has come. Ranks are counted from 0 here, on whichever
/// machine of several this is.
#[derive(Debug)]
pub struct Job {
    grace: Duration,
    closing: Duration,
    first_rank: u32,
    ranks: Vec<Rank>,
    /// The first failure, if that was before any request to stop.
    failed: Option<Cause>,
    stop: Option<Stop>,
    next: Next,
}

/// What a job fails of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// A rank of this machine.
    Here {
        /// The rank.
        rank: u32,
    },
    /// Something on another machine.
    Elsewhere {
        /// In words: `rank 2 on node 1 exited with code 3`.
        what: String,
        /// The exit code of the job on that account.
        exit_code: u8,
    },
}

/// What is known of one rank.
#[derive(Debug)]
pub struct Rank {
    /// Its process, which is also the number of its process group.
    pub pid: Pid,
    /// How it ended and how long after its start; `None` while it runs.
    pub end: Option<(Ending, Duration)>,
    /// The last signal that the launcher sent to it.
    pub sent: Option<Signal>,
    started: Instant,
}

/// The first signal that asked the launcher to stop.
#[derive(Debug, Clone, Copy)]
struct Stop {
    signal: Signal,
    at: Instant,
}

/// What happens next if the ranks do not end by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Nothing,
    Terminate(Instant),
    Kill(Instant),
    Abandon(Instant),
    /// What still runs has been given up.
    Abandoned,
}

/// What the supervisor has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell the rendezvous that the rank exited with code 0.
    AnnounceExit {
        /// The rank.
        rank: u32,
        /// Whether nobody had told it to end.
        by_itself: bool,
    },
    /// Tell the rendezvous that the rank is dead.
    AnnounceDeath {
        /// The rank.
        rank: u32,
        /// How it died.
        ending: Ending,
        /// The launcher had not told it to end.
        by_itself: bool,
    },
    /// Send a signal to the process group of the rank.
    Send {
        /// The rank.
        rank: u32,
        /// The signal.
        signal: Signal,
    },
}

/// How the job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Every rank exited with code 0.
    Done,
    /// This rank failed first.
    Failed {
        /// The rank.
        rank: u32,
    },
    /// The job failed on another machine.
    FailedElsewhere {
        /// How, in words.
        what: String,
        /// With this exit code.
        exit_code: u8,
    },
    /// The launcher was asked to stop.
    Stopped {
        /// By this signal.
        signal: Signal,
    },
}

impl Job {
    /// A job whose ranks, in order, are the given processes with the time of their start. The first of them has
    /// the number `first_rank` among all ranks of the job.
    pub fn new(
        grace: Duration,
        first_rank: u32,
        processes: impl IntoIterator<Item = (Pid, Instant)>,
    ) -> Self {
        let rank = |(pid, started)| Rank { pid, end: None, sent: None, started };
        Job {
            grace,
            closing: CLOSING,
            first_rank,
            ranks: processes.into_iter().map(rank).collect(),
            failed: None,
            stop: None,
            next: Next::Nothing,
        }
    }

    /// A job whose ranks start again after a failure: the others get SIGTERM at once, since all that they could
    /// still say will be said again.
    pub fn that_starts_again(self) -> Self {
        Job { closing: Duration::ZERO, ..self }
    }

    /// After what comes next its ranks start again.
    pub fn starts_again(&mut self) {
        self.closing = Duration::ZERO;
    }

    /// Its ranks do not start again after all.
    pub fn does_not_start_again(&mut self) {
        self.closing = CLOSING;
    }

    /// Whether the launcher was asked to stop.
    pub fn is_stopped(&self) -> bool {
        self.stop.is_some()
    }

    /// The rank has ended.
    pub fn ended(&mut self, now: Instant, rank: u32, ending: Ending) -> Vec<Action> {
        let entry = &mut self.ranks[rank as usize];
        entry.end = Some((ending, now.saturating_duration_since(entry.started)));
        if ending.is_success() {
            let by_itself = entry.sent.is_none() && self.stop.is_none();
            return vec![Action::AnnounceExit { rank, by_itself }];
        }
        let by_itself = entry.sent.is_none();
        if self.next == Next::Nothing {
            self.failed = Some(Cause::Here { rank });
            self.next = Next::Terminate(now + self.closing);
        }
        vec![Action::AnnounceDeath { rank, ending, by_itself }]
    }

    /// Whether nothing has failed and nobody has asked the job to stop.
    pub fn goes_on(&self) -> bool {
        self.next == Next::Nothing
    }

    /// Another process has taken the place of a rank that has ended.
    pub fn replaced(&mut self, rank: u32, (pid, started): (Pid, Instant)) {
        self.ranks[rank as usize] = Rank { pid, end: None, sent: None, started };
    }

    /// The job has failed on another machine: the ranks here are to end as after a failure of one of them.
    pub fn failed_elsewhere(&mut self, now: Instant, what: String, exit_code: u8) {
        if self.next == Next::Nothing {
            self.failed = Some(Cause::Elsewhere { what, exit_code });
            self.next = Next::Terminate(now + self.closing);
        }
    }

    /// The launcher was told to stop while it had no ranks any more and waited for other machines.
    pub fn stopped_while_waiting(&mut self, now: Instant, signal: Signal) {
        self.stop.get_or_insert(Stop { signal, at: now });
    }

    /// The launcher was sent one of the signals that it passes on.
    pub fn signalled(&mut self, now: Instant, signal: Signal) -> Vec<Action> {
        if self.live().next().is_none() {
            return Vec::new();
        }
        let Some(first) = self.stop else {
            self.stop = Some(Stop { signal, at: now });
            self.next = match self.next {
                Next::Kill(at) => Next::Kill(at.min(now + self.grace)),
                Next::Nothing | Next::Terminate(_) => Next::Kill(now + self.grace),
                over @ (Next::Abandon(_) | Next::Abandoned) => over,
            };
            return self.send_to_all(signal);
        };
        let urgent = matches!(signal, Signal::INT | Signal::TERM);
        if urgent && now.saturating_duration_since(first.at) >= ONE_REQUEST {
            return self.kill(now);
        }
        Vec::new()
    }

    /// Time has passed: what is due now. Call it again whenever [`Job::deadline`] has come.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        match self.next {
            Next::Terminate(at) if at <= now => {
                self.next = Next::Kill(now + self.grace);
                self.send_to_all(Signal::TERM)
            }
            Next::Kill(at) if at <= now => self.kill(now),
            Next::Abandon(at) if at <= now => {
                self.next = Next::Abandoned;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// When [`Job::tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        match self.next {
            Next::Terminate(at) | Next::Kill(at) | Next::Abandon(at) => Some(at),
            Next::Nothing | Next::Abandoned => None,
        }
    }

    /// Whether every rank has ended or has been given up.
    pub fn is_over(&self) -> bool {
        self.next == Next::Abandoned || self.live().next().is_none()
    }

    /// The number of the first rank of this machine.
    pub fn first_rank(&self) -> u32 {
        self.first_rank
    }

    /// The ranks, in order.
    pub fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// Corrects what the job failed of, if it failed. Two ranks that end within a moment may be found in either
    /// order; `cause` is what the rendezvous has found out from what the ranks said about each other.
    pub fn settle(&mut self, cause: Cause) {
        let known = match &cause {
            Cause::Here { rank } => self.ranks.get(*rank as usize).is_some_and(Rank::has_failed),
            Cause::Elsewhere { .. } => true,
        };
        if known && self.failed.is_some() {
            self.failed = Some(cause);
        }
    }

    /// How the job ended, or would if it ended now.
    pub fn verdict(&self) -> Verdict {
        match (&self.failed, self.stop) {
            (Some(Cause::Here { rank }), _) => Verdict::Failed { rank: *rank },
            (Some(Cause::Elsewhere { what, exit_code }), _) => {
                Verdict::FailedElsewhere { what: what.clone(), exit_code: *exit_code }
            }
            (None, Some(stop)) => Verdict::Stopped { signal: stop.signal },
            (None, None) => Verdict::Done,
        }
    }

    /// What the job has failed of, if it has or was asked to stop: `rank 2 exited with code 3`.
    pub fn failure_in_words(&self) -> Option<String> {
        match self.verdict() {
            Verdict::Done => None,
            Verdict::Failed { rank } => {
                let (ending, _) = self.ranks[rank as usize].end.expect("a rank that failed has ended");
                Some(format!("rank {} {ending}", self.first_rank + rank))
            }
            Verdict::FailedElsewhere { what, .. } => Some(what),
            Verdict::Stopped { signal } => Some(format!("stopped by {}", signal_in_words(signal.as_raw()))),
        }
    }

    /// The launcher's exit code for the verdict; the table is in `main.rs`.
    pub fn exit_code(&self) -> u8 {
        match self.verdict() {
            Verdict::Done => 0,
            Verdict::Stopped { signal } => code_for_signal(signal.as_raw()),
            Verdict::FailedElsewhere { exit_code, .. } => exit_code,
            Verdict::Failed { rank } => {
                let (ending, _) = self.ranks[rank as usize].end.expect("a rank that failed has ended");
                ending.exit_code()
            }
        }
    }

    fn kill(&mut self, now: Instant) -> Vec<Action> {
        if !matches!(self.next, Next::Abandon(_) | Next::Abandoned) {
            self.next = Next::Abandon(now + KILLING);
        }
        self.send_to_all(Signal::KILL)
    }

    fn send_to_all(&mut self, signal: Signal) -> Vec<Action> {
        let live: Vec<u32> = self.live().collect();
        for &rank in &live {
            self.ranks[rank as usize].sent = Some(signal);
        }
        live.into_iter().map(|rank| Action::Send { rank, signal }).collect()
    }

    fn live(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.ranks).filter(|(_, rank)| rank.end.is_none()).map(|(number, _)| number)
    }
}

impl Rank {
    fn has_failed(&self) -> bool {
        self.end.is_some_and(|(ending, _)| !ending.is_success())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(20);

    fn job(ranks: i32) -> (Job, Instant) {
        let start = Instant::now();
        let pid = |n| Pid::from_raw(1000 + n).expect("positive");
        (Job::new(GRACE, 0, (0..ranks).map(|n| (pid(n), start))), start)
    }

    fn seconds(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    fn send(signal: Signal, ranks: &[u32]) -> Vec<Action> {
        ranks.iter().map(|&rank| Action::Send { rank, signal }).collect()
    }

    #[test]
    fn when_all_ranks_exit_with_0_the_code_is_0() {
        let (mut job, start) = job(2);
        assert_eq!(
            job.ended(start, 1, Ending::Exited(0)),
            [Action::AnnounceExit { rank: 1, by_itself: true }]
        );
        assert!(!job.is_over());
        assert_eq!(job.deadline(), None, "the others may run as long as they like");
        job.ended(start, 0, Ending::Exited(0));
        assert!(job.is_over());
        assert_eq!((job.verdict(), job.exit_code()), (Verdict::Done, 0));
    }

    fn death(rank: u32, ending: Ending, by_itself: bool) -> Vec<Action> {
        vec![Action::AnnounceDeath { rank, ending, by_itself }]
    }

    #[test]
    fn each_failure_is_announced_at_once_and_the_first_is_the_cause() {
        let (mut job, start) = job(3);
        assert_eq!(job.ended(start, 2, Ending::Killed(9)), death(2, Ending::Killed(9), true));
        assert_eq!(job.ended(seconds(start, 0.1), 0, Ending::Exited(1)), death(0, Ending::Exited(1), true));
        job.tick(seconds(start, 2.0));
        assert_eq!(job.ended(seconds(start, 2.2), 1, Ending::Exited(1)), death(1, Ending::Exited(1), false));
        assert!(job.is_over());
        assert_eq!((job.verdict(), job.exit_code()), (Verdict::Failed { rank: 2 }, 137));
        assert_eq!(job.failure_in_words().as_deref(), Some("rank 2 was killed by signal 9 (SIGKILL)"));
    }

    #[test]
    fn the_cause_that_the_rendezvous_has_found_out_counts() {
        let elsewhere = || Cause::Elsewhere { what: "rank 9 on node 1 exited".to_owned(), exit_code: 7 };
        let (mut job, start) = job(3);
        job.settle(elsewhere());
        assert_eq!(job.verdict(), Verdict::Done, "it has not failed");
        job.ended(start, 1, Ending::Exited(1));
        job.ended(start, 0, Ending::Exited(3));
        job.ended(start, 2, Ending::Exited(0));
        job.settle(Cause::Here { rank: 2 });
        assert_eq!(job.exit_code(), 1, "rank 2 has not failed");
        job.settle(Cause::Here { rank: 0 });
        assert_eq!((job.verdict(), job.exit_code()), (Verdict::Failed { rank: 0 }, 3));
        job.settle(elsewhere());
        let what = "rank 9 on node 1 exited".to_owned();
        assert_eq!((job.verdict(), job.exit_code()), (Verdict::FailedElsewhere { what, exit_code: 7 }, 7));
    }

    #[test]
    fn a_failure_elsewhere_ends_the_ranks_here_like_one_of_their_own() {
        let (mut job, start) = job(2);
        job.failed_elsewhere(start, "rank 2 on node 1 was killed".to_owned(), 137);
        assert_eq!(job.tick(seconds(start, 1.9)), []);
        job.ended(seconds(start, 1.9), 0, Ending::Exited(1));
        assert_eq!(job.tick(seconds(start, 2.0)), send(Signal::TERM, &[1]));
        job.failed_elsewhere(seconds(start, 2.1), "another".to_owned(), 1);
        assert_eq!(job.tick(seconds(start, 22.0)), send(Signal::KILL, &[1]));
        assert_eq!(job.exit_code(), 137, "the first one is the cause");
    }

    #[test]
    fn where_the_job_starts_again_the_others_are_told_to_end_at_once() {
        let (job, start) = job(2);
        let mut job = job.that_starts_again();
        job.ended(start, 0, Ending::Killed(9));
        assert_eq!(job.tick(start), send(Signal::TERM, &[1]));
        assert!(!job.is_stopped());
        job.signalled(start, Signal::INT);
        assert!(job.is_stopped());
    }

    #[test]
    fn where_the_job_does_not_start_again_after_all_the_others_may_end_on_their_own() {
        let (job, start) = job(2);
        let mut job = job.that_starts_again();
        job.does_not_start_again();
        job.ended(start, 0, Ending::Killed(9));
        assert_eq!(job.tick(start), []);
        assert_eq!(job.tick(start + CLOSING), send(Signal::TERM, &[1]));
    }

    #[test]
    fn a_stop_while_other_machines_are_waited_for_is_the_exit_code() {
        let (mut job, start) = job(1);
        job.ended(start, 0, Ending::Exited(0));
        job.stopped_while_waiting(start, Signal::TERM);
        job.stopped_while_waiting(start, Signal::INT);
        assert_eq!(job.exit_code(), 143);
    }

    #[test]
    fn after_a_failure_the_others_get_time_then_sigterm_then_sigkill_then_are_given_up() {
        let (mut job, start) = job(3);
        job.ended(start, 0, Ending::Exited(3));
        assert_eq!(job.tick(seconds(start, 1.9)), []);
        assert_eq!(job.deadline(), Some(seconds(start, 2.0)));
        assert_eq!(job.tick(seconds(start, 2.0)), send(Signal::TERM, &[1, 2]));
        job.ended(seconds(start, 3.0), 1, Ending::Killed(15));
        assert_eq!(job.tick(seconds(start, 21.9)), []);
        assert_eq!(job.tick(seconds(start, 22.0)), send(Signal::KILL, &[2]));
        assert!(!job.is_over());
        assert_eq!(job.tick(seconds(start, 27.0)), []);
        assert!(job.is_over(), "a process that SIGKILL does not end is not waited for");
        assert_eq!(job.exit_code(), 3);
    }

    #[test]
    fn a_signal_is_passed_on_and_the_grace_follows() {
        let (mut job, start) = job(2);
        job.ended(start, 0, Ending::Exited(0));
        assert_eq!(job.signalled(seconds(start, 1.0), Signal::HUP), send(Signal::HUP, &[1]));
        assert_eq!(job.tick(seconds(start, 21.0)), send(Signal::KILL, &[1]));
        job.ended(seconds(start, 21.0), 1, Ending::Killed(9));
        assert_eq!((job.verdict(), job.exit_code()), (Verdict::Stopped { signal: Signal::HUP }, 129));
    }

    #[test]
    fn after_a_signal_a_clean_exit_of_all_ranks_is_still_not_success() {
        let (mut job, start) = job(1);
        job.signalled(start, Signal::TERM);
        job.ended(start, 0, Ending::Exited(0));
        assert_eq!(job.exit_code(), 143);
    }

    #[test]
    fn a_death_after_a_signal_is_announced_but_is_not_a_failure() {
        let (mut job, start) = job(2);
        job.signalled(start, Signal::TERM);
        assert_eq!(job.ended(start, 1, Ending::Killed(15)), death(1, Ending::Killed(15), false));
        assert_eq!(job.verdict(), Verdict::Stopped { signal: Signal::TERM });
    }

    #[test]
    fn a_second_sigint_kills_at_once() {
        let (mut job, start) = job(2);
        job.signalled(start, Signal::INT);
        assert_eq!(job.signalled(seconds(start, 1.0), Signal::INT), send(Signal::KILL, &[0, 1]));
    }

    #[test]
    fn a_signal_sent_twice_within_a_moment_is_one_request() {
        let (mut job, start) = job(2);
        job.signalled(start, Signal::TERM);
        assert_eq!(job.signalled(seconds(start, 0.01), Signal::TERM), []);
        assert_eq!(job.deadline(), Some(seconds(start, 20.0)));
    }

    #[test]
    fn a_signal_during_the_end_does_not_prolong_it() {
        let (mut job, start) = job(2);
        job.ended(start, 0, Ending::Exited(3));
        job.tick(seconds(start, 2.0));
        assert_eq!(job.signalled(seconds(start, 10.0), Signal::TERM), send(Signal::TERM, &[1]));
        assert_eq!(job.deadline(), Some(seconds(start, 22.0)));
        assert_eq!(job.exit_code(), 3, "the failure was first");
    }

    #[test]
    fn a_signal_after_the_last_rank_changes_nothing() {
        let (mut job, start) = job(1);
        job.ended(start, 0, Ending::Exited(0));
        assert_eq!(job.signalled(start, Signal::TERM), []);
        assert_eq!(job.exit_code(), 0);
    }
}
