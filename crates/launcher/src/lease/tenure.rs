//! The lease of a job whose ranks all start again after a change: one launcher 0 holds it at a time.
//!
//! A launcher 0 takes it when all others have come and before the ranks start for the first time, whoever had it. One from
//! which it was taken starts nothing any more, and ends what it runs, within a second or two: so of two that were cut off from
//! each other, or of one that was given up and its successor, the later one goes on alone.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use paceline_runtime::membership::Epoch;
use paceline_runtime::rendezvous::Leave;

use super::{Lease, Trouble};
use crate::news::News;
use crate::rendezvous::Status;

/// How often whoever holds it looks whether it still does.
const LOOK: Duration = Duration::from_secs(1);

/// See the [module](self). Until it is taken nobody looks after it.
pub struct Tenure {
    post: Arc<Post>,
    /// Ends the thread that looks when it is dropped.
    stop: Mutex<Option<Sender<()>>>,
    news: News,
    status: Status,
}

struct Post {
    lease: Arc<dyn Lease>,
    state: Mutex<State>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// As of this epoch.
    Held(Epoch),
    /// For this reason.
    Lost(String),
}

impl Tenure {
    /// Of this launcher, which does not hold it yet. `news` is rung when it is lost.
    pub fn new(lease: Arc<dyn Lease>, news: News, status: Status) -> Self {
        let post = Arc::new(Post { lease, state: Mutex::new(State::Open) });
        Self { post, stop: Mutex::new(None), news, status }
    }

    /// Takes it, or looks whether this launcher still holds it: ranks may start if so. Blocks as long as the lease's calls do.
    pub fn ask(&self) -> Leave {
        match self.post.ask() {
            Leave::Granted => self.watch(),
            leave => leave,
        }
    }

    /// Why this launcher does not hold it any more, if it has.
    pub fn lost(&self) -> Option<String> {
        match &*self.post.state() {
            State::Lost(reason) => Some(reason.clone()),
            State::Open | State::Held(_) => None,
        }
    }

    /// Looks after it on a thread of its own, from the first time on.
    fn watch(&self) -> Leave {
        // Replaced whole.
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        if stop.is_some() {
            return Leave::Granted;
        }
        let (sender, stopped) = channel::<()>();
        let (post, news, status) = (self.post.clone(), self.news.clone(), self.status.clone());
        let body = move || {
            let mut said = None;
            while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                match post.ask() {
                    Leave::Granted => said = None,
                    Leave::NotYet(reason) => {
                        // What runs goes on; nothing starts until it can be read.
                        if said.as_ref() != Some(&reason) {
                            status
                                .say(&format!("{reason}; nothing starts again until the lease can be read"));
                            said = Some(reason);
                        }
                    }
                    Leave::Refused(_) => return news.ring(),
                }
            }
        };
        match thread::Builder::new().name("tenure".to_owned()).spawn(body) {
            Ok(_) => *stop = Some(sender),
            Err(error) => {
                return Leave::NotYet(format!("cannot start the thread that looks after the lease: {error}"));
            }
        }
        Leave::Granted
    }
}

impl Post {
    fn state(&self) -> MutexGuard<'_, State> {
        // Replaced whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self) -> Leave {
        let before = self.state().clone();
        let now = match before {
            State::Open => self.lease.claim(Epoch(0)).map(State::Held),
            State::Held(epoch) => self.lease.newest().map(|newest| match newest == epoch {
                true => State::Held(epoch),
                false => {
                    State::Lost(format!("another launcher 0 has taken the lease ({})", self.lease.place()))
                }
            }),
            State::Lost(reason) => Ok(State::Lost(reason)),
        };
        let now = match now {
            Ok(now) => now,
            Err(Trouble::Passing(reason)) => return Leave::NotYet(format!("the lease: {reason}")),
            Err(Trouble::Lasting(reason)) => State::Lost(format!("the lease: {reason}")),
        };
        let mut state = self.state();
        // It is lost once and for all; two threads may ask at a time.
        if !matches!(*state, State::Lost(_)) {
            *state = now;
        }
        match &*state {
            State::Lost(reason) => Leave::Refused(reason.clone()),
            State::Open | State::Held(_) => Leave::Granted,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use paceline_runtime::membership::Decision;
    use tempfile::TempDir;

    use super::super::file::FileLease;
    use super::*;
    use crate::console::Console;

    /// Those of two launchers, of a lease in a folder.
    fn two_of(folder: &TempDir) -> [Tenure; 2] {
        [(); 2].map(|()| {
            let lease = FileLease::open(&folder.path().join("lease"), "job").expect("it can be opened");
            let news = News::new().expect("a descriptor");
            Tenure::new(Arc::new(lease), news, Status::new(&Console::start()))
        })
    }

    #[test]
    fn the_later_one_has_it_and_the_first_one_never_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lease");
        let [first, second] = two_of(&folder);
        assert_eq!((first.ask(), first.ask(), first.lost()), (Leave::Granted, Leave::Granted, None));
        assert_eq!(second.ask(), Leave::Granted);
        let reason = format!("another launcher 0 has taken the lease ({})", path.display());
        for _ in 0..2 {
            assert_eq!(first.ask(), Leave::Refused(reason.clone()));
            assert_eq!((first.lost(), second.ask()), (Some(reason.clone()), Leave::Granted));
        }
        std::fs::remove_file(&path).expect("it is there");
        let refused = second.ask();
        assert!(matches!(&refused, Leave::Refused(reason) if reason.ends_with("somebody has removed it")));
    }

    #[test]
    fn whoever_has_it_finds_out_that_it_was_taken_and_rings() {
        let folder = tempfile::tempdir().expect("a folder");
        let [first, second] = two_of(&folder);
        assert_eq!((first.ask(), second.ask()), (Leave::Granted, Leave::Granted));
        let mut bell =
            [rustix::event::PollFd::from_borrowed_fd(first.news.fd(), rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut bell, Some(&limit)), Ok(1), "it rings");
        assert!(first.lost().is_some() && second.lost().is_none());
    }

    /// Answers to claims and to the question for the newest epoch, as they come.
    struct Told(Mutex<VecDeque<Result<Epoch, Trouble>>>);

    impl Told {
        fn next(&self) -> Result<Epoch, Trouble> {
            self.0.lock().expect("no panic").pop_front().expect("nobody asks so often")
        }
    }

    impl Lease for Told {
        fn identity(&self) -> &str {
            "told"
        }

        fn place(&self) -> String {
            "told".to_owned()
        }

        fn newest(&self) -> Result<Epoch, Trouble> {
            self.next()
        }

        fn claim(&self, _: Epoch) -> Result<Epoch, Trouble> {
            self.next()
        }

        fn swap(&self, _: &Decision) -> Result<Option<Decision>, Trouble> {
            unreachable!("there are no members")
        }
    }

    #[test]
    fn what_cannot_be_read_now_is_asked_for_again_and_loses_nothing() {
        let passing = || Err(Trouble::Passing("the server is away".to_owned()));
        let answers = [passing(), Ok(Epoch(4)), passing(), Ok(Epoch(4)), Ok(Epoch(5))];
        let post = Post { lease: Arc::new(Told(Mutex::new(answers.into()))), state: Mutex::new(State::Open) };
        let not_yet = || Leave::NotYet("the lease: the server is away".to_owned());
        assert_eq!([post.ask(), post.ask()], [not_yet(), Leave::Granted]);
        assert_eq!([post.ask(), post.ask()], [not_yet(), Leave::Granted]);
        assert!(matches!(post.ask(), Leave::Refused(_)), "somebody has taken it");
        assert!(matches!(post.ask(), Leave::Refused(_)), "and nobody is asked any more");
    }
}
