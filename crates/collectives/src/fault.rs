//! Bad news from outside: how the owner of a communicator ends an operation that another thread is in.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;

/// Ends operations of one communicator from any thread.
///
/// The data plane sees a broken link by itself, but not a peer that was killed and fell silent: that is
/// for whoever watches the processes (the launcher, through the runtime) to say. Cheap to clone;
/// outliving the communicator is harmless.
#[derive(Clone, Debug)]
pub struct Interrupter {
    pub(crate) fault: Arc<Fault>,
}

impl Interrupter {
    /// Says that a rank is dead, with the reason in words ("was killed by signal 9 (SIGKILL)").
    ///
    /// The running operation, or the next, ends in [`Error::PeerLost`](crate::Error::PeerLost) naming
    /// the rank, unless it has left in order. The communicators that were split from this one are told too,
    /// where the rank is a member. Does not block.
    pub fn peer_lost(&self, rank: usize, reason: &str) {
        self.fault.peer_lost(rank, reason);
    }

    /// Ends the running operation, or the next, of this communicator alone in
    /// [`Error::Interrupted`](crate::Error::Interrupted), where it waits or between two of its rounds. The first reason is
    /// kept. Does not block.
    pub fn interrupt(&self, reason: &str) {
        self.fault.raise(|news| {
            news.interrupted.get_or_insert_with(|| reason.to_owned());
        });
    }
}

/// The mailbox between an [`Interrupter`] and the engine.
#[derive(Debug)]
pub(crate) struct Fault {
    raised: AtomicBool,
    news: Mutex<News>,
    family: Mutex<Family>,
    listener: Mutex<Listener>,
    waker: Waker,
}

/// Who wants to hear of deaths at once, and not in the next operation.
#[derive(Default)]
struct Listener(Option<Box<OnLoss>>);

type OnLoss = dyn Fn(usize, &str) + Send;

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listener").field(&self.0.is_some()).finish()
    }
}

/// The communicators split from this one, which hear of the same deaths.
#[derive(Debug, Default)]
struct Family {
    children: Vec<Child>,
    /// All deaths so far: a child that comes later hears of them.
    deaths: Vec<(usize, String)>,
}

#[derive(Debug)]
struct Child {
    fault: Weak<Fault>,
    /// Its ranks, as this communicator numbers them.
    members: Vec<usize>,
}

/// What was said and not yet dealt with.
#[derive(Debug, Default)]
pub(crate) struct News {
    pub(crate) lost: Vec<(usize, String)>,
    pub(crate) interrupted: Option<String>,
}

impl Fault {
    pub(crate) fn new(waker: Waker) -> Self {
        let (raised, news) = (AtomicBool::new(false), Mutex::default());
        Self { raised, news, family: Mutex::default(), listener: Mutex::default(), waker }
    }

    /// Passes on deaths to `child`, whose ranks are `members` here, from now on and from before.
    pub(crate) fn adopt(&self, child: &Arc<Fault>, members: Vec<usize>) {
        let mut family = self.family();
        let child = Child { fault: Arc::downgrade(child), members };
        family.deaths.iter().for_each(|(rank, reason)| child.peer_lost(*rank, reason));
        family.children.retain(|child| child.fault.strong_count() > 0);
        family.children.push(child);
    }

    /// Has `listener` told of each death from now on and from before, on the thread of whoever tells it.
    pub(crate) fn on_loss(&self, listener: impl Fn(usize, &str) + Send + 'static) {
        let deaths = self.family();
        deaths.deaths.iter().for_each(|(rank, reason)| listener(*rank, reason));
        *self.listener() = Listener(Some(Box::new(listener)));
    }

    fn peer_lost(&self, rank: usize, reason: &str) {
        let mut family = self.family();
        family.deaths.push((rank, reason.to_owned()));
        // Under the lock, which is taken from the parent down: a child is never adopted in between.
        family.children.iter().for_each(|child| child.peer_lost(rank, reason));
        if let Listener(Some(listener)) = &*self.listener() {
            listener(rank, reason);
        }
        drop(family);
        self.raise(|news| news.lost.push((rank, reason.to_owned())));
    }

    /// Whether there is news; one load of an atomic.
    pub(crate) fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }

    /// Takes the news, if there is any; one load of an atomic if not.
    pub(crate) fn take(&self) -> Option<News> {
        if !self.is_raised() {
            return None;
        }
        let mut news = self.lock();
        self.raised.store(false, Ordering::Release);
        Some(std::mem::take(&mut *news))
    }

    fn raise(&self, change: impl FnOnce(&mut News)) {
        let mut news = self.lock();
        change(&mut news);
        self.raised.store(true, Ordering::Release);
        drop(news);
        self.waker.wake_by_ref();
    }

    fn lock(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listener(&self) -> MutexGuard<'_, Listener> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn family(&self) -> MutexGuard<'_, Family> {
        self.family.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Child {
    fn peer_lost(&self, rank: usize, reason: &str) {
        if let (Some(fault), Some(rank)) =
            (self.fault.upgrade(), self.members.iter().position(|&member| member == rank))
        {
            fault.peer_lost(rank, reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault() -> Arc<Fault> {
        Arc::new(Fault::new(Waker::noop().clone()))
    }

    fn lost(fault: &Fault) -> Vec<usize> {
        fault.take().map_or(Vec::new(), |news| news.lost.into_iter().map(|(rank, _)| rank).collect())
    }

    #[test]
    fn a_death_is_told_to_all_generations_by_their_own_ranks() {
        let [parent, child, grandchild] = [(); 3].map(|()| fault());
        parent.adopt(&child, vec![4, 2, 7]);
        child.adopt(&grandchild, vec![2, 0]);
        parent.peer_lost(7, "died");
        assert_eq!([lost(&parent), lost(&child), lost(&grandchild)], [vec![7], vec![2], vec![0]]);
        parent.peer_lost(2, "died");
        assert_eq!([lost(&parent), lost(&child), lost(&grandchild)], [vec![2], vec![1], vec![]]);
        parent.peer_lost(3, "died");
        assert_eq!([lost(&parent), lost(&child)], [vec![3], vec![]], "no member");
    }

    #[test]
    fn whoever_listens_hears_of_each_death_once_and_at_once() {
        let [parent, child] = [(); 2].map(|()| fault());
        parent.adopt(&child, vec![4, 2]);
        parent.peer_lost(2, "died");
        let (tell, heard) = std::sync::mpsc::channel();
        child.on_loss(move |rank, reason| tell.send((rank, reason.to_owned())).expect("the test listens"));
        parent.peer_lost(4, "was killed");
        parent.peer_lost(3, "is no member");
        let heard: Vec<_> = heard.try_iter().collect();
        assert_eq!(heard, [(1, "died".to_owned()), (0, "was killed".to_owned())]);
    }

    #[test]
    fn a_child_hears_of_earlier_deaths_and_of_no_interruption() {
        let [parent, child] = [(); 2].map(|()| fault());
        parent.peer_lost(1, "died");
        parent.adopt(&child, vec![0, 1]);
        assert_eq!(lost(&child), [1]);
        Interrupter { fault: parent.clone() }.interrupt("enough");
        assert!(child.take().is_none());
        drop(child);
        parent.peer_lost(0, "died");
        parent.adopt(&fault(), vec![]);
        assert_eq!(parent.family().children.len(), 1, "the one that ended is forgotten");
    }
}
