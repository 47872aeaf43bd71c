//! When a job's pods are started again, and when the job is over, as a value: no process, no clock.

use crate::ending::Ending;

/// Whether a pod is started again when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// No; its failure is the job's.
    Never,
    /// After a failure.
    OnFailure,
    /// After a failure with a code of 128 or more, which says that trying again may help.
    ExitCode,
}

/// Which pods decide that the job has succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Success {
    /// This one.
    Of(usize),
    /// The first of these, or all of them.
    OfFirstOrAll(Vec<usize>),
    /// All of these.
    OfAll(Vec<usize>),
    /// Any of these.
    OfAny(Vec<usize>),
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The pods that decide have succeeded.
    Succeeded,
    /// This pod failed, and was not to be started again.
    Failed(usize, Ending),
    /// This pod failed once more than pods may.
    TooOften(usize, Ending),
}

/// What is to be done after a pod's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Wait for the others.
    Wait,
    /// Start it again. It is the so-manieth time for this pod, from 1.
    StartAgain(u32),
    /// End all others: the job is over.
    Over(Outcome),
}

/// How far a job is.
#[derive(Debug)]
pub struct Progress {
    success: Success,
    restarts: Vec<(Restart, u32)>,
    backoff_limit: Option<u32>,
    succeeded: Vec<bool>,
}

impl Progress {
    /// A job whose pods have all been started.
    pub fn new(
        success: Success,
        restart: impl IntoIterator<Item = Restart>,
        backoff_limit: Option<u32>,
    ) -> Self {
        let restarts: Vec<_> = restart.into_iter().map(|policy| (policy, 0)).collect();
        let succeeded = vec![false; restarts.len()];
        Self { success, restarts, backoff_limit, succeeded }
    }

    /// The pod has ended by itself.
    pub fn ended(&mut self, pod: usize, ending: Ending) -> Next {
        if ending.is_success() {
            self.succeeded[pod] = true;
            return if self.has_succeeded() { Next::Over(Outcome::Succeeded) } else { Next::Wait };
        }
        let again = match self.restarts[pod].0 {
            Restart::Never => false,
            Restart::OnFailure => true,
            Restart::ExitCode => ending.exit_code() >= 128,
        };
        let all: u32 = self.restarts.iter().map(|(_, count)| count).sum();
        match self.backoff_limit {
            _ if !again => Next::Over(Outcome::Failed(pod, ending)),
            Some(limit) if all >= limit => Next::Over(Outcome::TooOften(pod, ending)),
            _ => {
                self.restarts[pod].1 += 1;
                Next::StartAgain(self.restarts[pod].1)
            }
        }
    }

    fn has_succeeded(&self) -> bool {
        let done = |&pod: &usize| self.succeeded[pod];
        match &self.success {
            Success::Of(pod) => done(pod),
            Success::OfFirstOrAll(pods) => pods.first().is_some_and(done) || pods.iter().all(done),
            Success::OfAll(pods) => pods.iter().all(done),
            Success::OfAny(pods) => pods.iter().any(done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DONE: Ending = Ending::Exited(0);
    const FAILED: Ending = Ending::Exited(1);
    const KILLED: Ending = Ending::Killed(9);

    fn progress(success: Success, restart: Restart, limit: Option<u32>) -> Progress {
        Progress::new(success, [restart; 3], limit)
    }

    #[test]
    fn the_pods_that_decide_end_the_job() {
        let over = Next::Over(Outcome::Succeeded);
        let run = |success: Success, pods: &[usize]| {
            let mut progress = progress(success, Restart::Never, None);
            pods.iter().map(|&pod| progress.ended(pod, DONE)).collect::<Vec<_>>()
        };
        assert_eq!(run(Success::Of(0), &[1, 2, 0]), [Next::Wait, Next::Wait, over]);
        assert_eq!(run(Success::OfFirstOrAll(vec![1, 2]), &[2, 1]), [Next::Wait, over]);
        assert_eq!(run(Success::OfFirstOrAll(vec![0, 1, 2]), &[0]), [over]);
        assert_eq!(run(Success::OfAll(vec![0, 1]), &[2, 0, 1]), [Next::Wait, Next::Wait, over]);
        assert_eq!(run(Success::OfAny(vec![0, 1]), &[2, 1]), [Next::Wait, over]);
    }

    #[test]
    fn a_failure_is_the_jobs_unless_the_pod_is_started_again() {
        let after = |restart, ending| progress(Success::Of(0), restart, None).ended(1, ending);
        for (restart, ending) in
            [(Restart::Never, FAILED), (Restart::Never, KILLED), (Restart::ExitCode, FAILED)]
        {
            assert_eq!(after(restart, ending), Next::Over(Outcome::Failed(1, ending)));
        }
        for (restart, ending) in
            [(Restart::OnFailure, FAILED), (Restart::OnFailure, KILLED), (Restart::ExitCode, KILLED)]
        {
            assert_eq!(after(restart, ending), Next::StartAgain(1));
        }
    }

    #[test]
    fn restarts_of_all_pods_count_towards_the_limit() {
        let mut progress = progress(Success::Of(0), Restart::OnFailure, Some(2));
        assert_eq!(progress.ended(1, FAILED), Next::StartAgain(1));
        assert_eq!(progress.ended(2, FAILED), Next::StartAgain(1));
        assert_eq!(progress.ended(1, KILLED), Next::Over(Outcome::TooOften(1, KILLED)));
        assert_eq!(progress.ended(0, DONE), Next::Over(Outcome::Succeeded));
    }
}
