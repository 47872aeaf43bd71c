//! Who runs the next operation: the caller, or the progress thread.
//!
//! Operations run in the order in which they were issued, whoever runs them. A blocking call runs on
//! its caller's thread (a hop to a parked thread and back costs tens of µs) once nothing started
//! earlier is left; a started one runs on the progress thread, which exists from the first start on.

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::engine::Engine;

/// The engine, with the queue of started operations before it.
pub(crate) struct Progress {
    shared: Arc<Shared>,
    queue: Option<Sender<Job>>,
}

type Job = Box<dyn FnOnce(&mut Engine) + Send>;

struct Shared {
    engine: Mutex<Engine>,
    /// Operations started and not finished.
    started: Mutex<usize>,
    drained: Condvar,
}

impl Progress {
    pub(crate) fn new(engine: Engine) -> Self {
        let (engine, started) = (Mutex::new(engine), Mutex::new(0));
        Self { shared: Arc::new(Shared { engine, started, drained: Condvar::new() }), queue: None }
    }

    /// Runs `operation` on this thread, after all that was started before. Each of those has a
    /// deadline, so the wait for them has one too.
    pub(crate) fn run<R>(&mut self, operation: impl FnOnce(&mut Engine) -> R) -> R {
        // Nothing was ever started: no need to ask what is left of it.
        if self.queue.is_some() {
            let mut started = lock(&self.shared.started);
            while *started > 0 {
                started = self.shared.drained.wait(started).unwrap_or_else(PoisonError::into_inner);
            }
        }
        operation(&mut lock(&self.shared.engine))
    }

    /// Queues `job` for the progress thread.
    ///
    /// # Errors
    /// The operating system's, when the thread cannot be started; the job has no effect then.
    pub(crate) fn start(&mut self, job: Job) -> std::io::Result<()> {
        let queue = match self.queue.take() {
            Some(queue) => queue,
            None => self.spawn()?,
        };
        *lock(&self.shared.started) += 1;
        queue.send(job).expect("the progress thread ends only when its queue is dropped");
        self.queue = Some(queue);
        Ok(())
    }

    fn spawn(&self) -> std::io::Result<Sender<Job>> {
        let (sender, jobs) = mpsc::channel::<Job>();
        let shared = self.shared.clone();
        thread::Builder::new().name("paceline-progress".to_owned()).spawn(move || {
            for job in jobs {
                job(&mut lock(&shared.engine));
                *lock(&shared.started) -= 1;
                shared.drained.notify_all();
            }
        })?;
        Ok(sender)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // An engine whose operation panicked has failed peers, not unsound memory; its next call says so.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
