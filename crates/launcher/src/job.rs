//! What is to be done when a rank ends, a signal comes or time passes, as a value: no process, no clock.
//!
//! The first rank that fails is the cause, all that follows are its consequences. The others are told at once and
//! have [`CLOSING`] to end on their own, since they may want to say goodbye, save something or print what they were
//! waiting for. Then they get SIGTERM, and when the grace is over SIGKILL. A signal to the launcher is passed on and
//! starts the grace directly; a second SIGINT or SIGTERM ends it.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::ending::{Ending, code_for_signal};

/// What the others have, after the first failure, to end on their own: a rank is told of a lost peer within a second
/// (docs: "It does not hang"), and needs about another to print a traceback and unload its libraries.
pub const CLOSING: Duration = Duration::from_secs(2);

/// How long SIGKILL may take. A process that the kernel has not ended by then hangs in a driver or on a dead file
/// server, and the launcher's own end must not wait for that.
const KILLING: Duration = Duration::from_secs(5);

/// Signals that come within this time are one request: GNU `timeout` and terminals send theirs twice, once to the
/// process and once to its group.
const ONE_REQUEST: Duration = Duration::from_millis(300);

/// All ranks of the job on this machine, and how far its end has come.
#[derive(Debug)]
pub struct Job {
    grace: Duration,
    ranks: Vec<Rank>,
    /// The first rank that failed, if that was before any request to stop.
    failed: Option<u32>,
    stop: Option<Stop>,
    next: Next,
    death_announced: bool,
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
    },
    /// Tell the rendezvous that the rank is dead.
    AnnounceDeath {
        /// The rank.
        rank: u32,
        /// How it died: `exited with code 3`.
        cause: String,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every rank exited with code 0.
    Done,
    /// This rank failed first.
    Failed {
        /// The rank.
        rank: u32,
    },
    /// The launcher was asked to stop.
    Stopped {
        /// By this signal.
        signal: Signal,
    },
}

impl Job {
    /// A job whose ranks, in order, are the given processes with the time of their start.
    pub fn new(grace: Duration, processes: impl IntoIterator<Item = (Pid, Instant)>) -> Self {
        let rank = |(pid, started)| Rank { pid, end: None, sent: None, started };
        Job {
            grace,
            ranks: processes.into_iter().map(rank).collect(),
            failed: None,
            stop: None,
            next: Next::Nothing,
            death_announced: false,
        }
    }

    /// The rank has ended.
    pub fn ended(&mut self, now: Instant, rank: u32, ending: Ending) -> Vec<Action> {
        let entry = &mut self.ranks[rank as usize];
        entry.end = Some((ending, now.saturating_duration_since(entry.started)));
        if ending.is_success() {
            return vec![Action::AnnounceExit { rank }];
        }
        if self.next == Next::Nothing {
            self.failed = Some(rank);
            self.next = Next::Terminate(now + CLOSING);
        }
        // One is enough, and it must be the cause: whoever ended later may have ended because of it.
        if std::mem::replace(&mut self.death_announced, true) {
            return Vec::new();
        }
        vec![Action::AnnounceDeath { rank, cause: ending.to_string() }]
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

    /// The ranks, in order.
    pub fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// Corrects whose failure was first. Two ranks that end within a moment may be found in either order; `blamed_by`
    /// gives the rank that a rank put its own failure down to, and a rank that failed itself takes the blame.
    pub fn settle_cause(&mut self, blamed_by: impl Fn(u32) -> Option<u32>) {
        // Each step leads to another rank, or stops: a circle of blame ends after one round.
        for _ in 0..self.ranks.len() {
            let Some(culprit) = self.failed.and_then(&blamed_by) else { return };
            let ended =
                self.ranks.get(culprit as usize).filter(|rank| rank.sent.is_none()).and_then(|rank| rank.end);
            if ended.is_none_or(|(ending, _)| ending.is_success()) {
                return;
            }
            self.failed = Some(culprit);
        }
    }

    /// How the job ended, or would if it ended now.
    pub fn verdict(&self) -> Verdict {
        match (self.failed, self.stop) {
            (Some(rank), _) => Verdict::Failed { rank },
            (None, Some(stop)) => Verdict::Stopped { signal: stop.signal },
            (None, None) => Verdict::Done,
        }
    }

    /// The launcher's exit code for the verdict; the table is in `main.rs`.
    pub fn exit_code(&self) -> u8 {
        match self.verdict() {
            Verdict::Done => 0,
            Verdict::Stopped { signal } => code_for_signal(signal.as_raw()),
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

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(20);

    fn job(ranks: i32) -> (Job, Instant) {
        let start = Instant::now();
        let pid = |n| Pid::from_raw(1000 + n).expect("positive");
        (Job::new(GRACE, (0..ranks).map(|n| (pid(n), start))), start)
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
        assert_eq!(job.ended(start, 1, Ending::Exited(0)), [Action::AnnounceExit { rank: 1 }]);
        assert!(!job.is_over());
        assert_eq!(job.deadline(), None, "the others may run as long as they like");
        job.ended(start, 0, Ending::Exited(0));
        assert!(job.is_over());
        assert_eq!((job.verdict(), job.exit_code()), (Verdict::Done, 0));
    }

    #[test]
    fn the_first_failure_is_announced_at_once_and_is_the_cause() {
        let (mut job, start) = job(3);
        let cause = "was killed by signal 9 (SIGKILL)".to_owned();
        assert_eq!(job.ended(start, 2, Ending::Killed(9)), [Action::AnnounceDeath { rank: 2, cause }]);
        assert_eq!(job.ended(seconds(start, 0.1), 0, Ending::Exited(1)), []);
        assert_eq!(job.ended(seconds(start, 0.2), 1, Ending::Exited(1)), []);
        assert!(job.is_over());
        assert_eq!((job.verdict(), job.exit_code()), (Verdict::Failed { rank: 2 }, 137));
    }

    #[test]
    fn a_rank_that_blames_another_one_for_its_failure_is_not_the_cause() {
        let (mut job, start) = job(4);
        job.ended(start, 1, Ending::Exited(1));
        job.ended(start, 3, Ending::Exited(1));
        job.ended(start, 0, Ending::Exited(7));
        job.ended(start, 2, Ending::Exited(0));
        job.settle_cause(|_| None);
        assert_eq!(job.verdict(), Verdict::Failed { rank: 1 });
        job.settle_cause(|rank| [None, Some(2), None, None][rank as usize]);
        assert_eq!(job.verdict(), Verdict::Failed { rank: 1 }, "rank 2 has not failed");
        job.settle_cause(|rank| [None, Some(3), None, Some(0)][rank as usize]);
        assert_eq!((job.verdict(), job.exit_code()), (Verdict::Failed { rank: 0 }, 7));
        job.settle_cause(|rank| [Some(1), Some(0), None, None][rank as usize]);
        assert!(matches!(job.verdict(), Verdict::Failed { rank: 0 | 1 }), "a circle ends");
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
        let cause = "was killed by signal 15 (SIGTERM)".to_owned();
        assert_eq!(job.ended(start, 1, Ending::Killed(15)), [Action::AnnounceDeath { rank: 1, cause }]);
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
