//! The I/O thread: a tokio runtime of our own, so that the program need not have one.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinError, JoinHandle};

use crate::Error;
use crate::park::Parker;

/// How many turns of its loop the thread runs per task after it was told to stop. A turn polls one task
/// (`event_interval`), and tasks take turns. To close a connection two are polled one after the
/// other: the one that closes the endpoint, and sends that, and the one that waits for the connection's end;
/// the rest is slack for tasks that were about to do something else.
const CLOSING_TURNS_PER_TASK: usize = 8;

/// How long dropping an [`IoThread`] waits for those turns, should a task hog the thread.
const CLOSING_LIMIT: Duration = Duration::from_secs(1);

/// The thread "paceline-io": the control plane of this process, and its packets and timers while no thread
/// waits in a collective.
///
/// Dropping it closes every endpoint and connection made with its handles, so that peers see the end
/// at once, and stops the thread. That waits for local work only, never for a peer.
#[derive(Debug)]
pub struct IoThread {
    handle: IoHandle,
    /// Dropped to stop the thread.
    stop: Option<oneshot::Sender<()>>,
    ended: Parker,
}

/// A handle to the I/O thread. Cheap to clone; does not keep the thread running.
#[derive(Clone, Debug)]
pub struct IoHandle {
    runtime: Handle,
    thread: ThreadId,
    closing: watch::Receiver<bool>,
}

/// A task on the I/O thread that ends when this value is dropped.
#[derive(Debug)]
pub(crate) struct Task<T>(JoinHandle<T>);

impl IoThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Error::Usage`] with the operating system's reason when there can be no thread or event queue.
    pub fn start() -> Result<Self, Error> {
        // event_interval(1): look for packets after every task. The default of 61 suits servers with
        // many tasks; here each packet waited for adds to the latency of a collective.
        let runtime =
            Builder::new_current_thread().event_interval(1).enable_all().build().map_err(no_start)?;
        let runtime_handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let (close, closing) = watch::channel(false);
        let ended = Parker::new();
        let waker = ended.waker();
        let thread = thread::Builder::new().name("paceline-io".to_owned()).spawn(move || {
            run(runtime, stopped, close);
            waker.wake();
        });
        let thread = thread.map_err(no_start)?.thread().id();
        Ok(Self { handle: IoHandle { runtime: runtime_handle, thread, closing }, stop: Some(stop), ended })
    }

    /// A handle with which endpoints are bound and futures run on this thread.
    pub fn handle(&self) -> IoHandle {
        self.handle.clone()
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop = None;
        if thread::current().id() != self.handle.thread {
            self.ended.wait(Instant::now() + CLOSING_LIMIT);
        }
    }
}

impl IoHandle {
    /// Runs a future on the I/O thread to its end, whether or not the returned handle is kept.
    ///
    /// The future must not block: it would hold up the packets of every connection.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.runtime.spawn(future)
    }

    /// Runs a future on the I/O thread and blocks the calling thread until it is done.
    ///
    /// # Errors
    /// [`Error::Usage`] when called on the I/O thread itself, which would never end, and when the
    /// thread has stopped.
    pub fn block_on<F>(&self, future: F) -> Result<F::Output, Error>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        if thread::current().id() == self.thread {
            let reason = "a blocking call on the I/O thread would wait for itself".to_owned();
            return Err(Error::Usage { reason });
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        // The receiver waits below for as long as the sender exists: sending cannot fail.
        self.spawn(async move { drop(sender.send(future.await)) });
        receiver.recv().map_err(|_| stopped())
    }

    /// Runs a future on the I/O thread for a caller on any executor; it ends when the caller's future
    /// is dropped.
    pub(crate) async fn run<F>(&self, future: F) -> Result<F::Output, Error>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.task(future).await.map_err(|_| stopped())
    }

    /// Runs a future on the I/O thread for as long as the returned value lives.
    pub(crate) fn task<F>(&self, future: F) -> Task<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        Task(self.spawn(future))
    }

    /// Gives `call` the runtime that tokio looks for in a thread-local variable.
    pub(crate) fn inside<T>(&self, call: impl FnOnce() -> T) -> T {
        let _entered = self.runtime.enter();
        call()
    }

    /// Returns when the thread is about to end and everything must be closed.
    pub(crate) async fn closing(&self) {
        // An error means that it has ended, where nothing can be done any more.
        let _ = self.closing.clone().wait_for(|closing| *closing).await;
    }
}

impl<T> Future for Task<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn run(runtime: Runtime, stopped: oneshot::Receiver<()>, close: watch::Sender<bool>) {
    runtime.block_on(async move {
        // Nothing is ever sent: the sender is dropped.
        let _ = stopped.await;
        // From this thread, so that all tasks that wait for it are woken before the first turn.
        close.send_replace(true);
        let tasks = Handle::current().metrics().num_alive_tasks();
        for _ in 0..(tasks + 1) * CLOSING_TURNS_PER_TASK {
            tokio::task::yield_now().await;
        }
    });
    // Blocking tasks are not ours; do not wait for them.
    runtime.shutdown_background();
}

fn no_start(error: std::io::Error) -> Error {
    Error::Usage { reason: format!("cannot start the I/O thread: {error}") }
}

fn stopped() -> Error {
    Error::Usage { reason: "the I/O thread has stopped".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_future_runs_on_the_thread_and_its_result_comes_back() {
        let io = IoThread::start().expect("a thread");
        let name = io.handle().block_on(async { thread::current().name().map(str::to_owned) });
        assert_eq!(name, Ok(Some("paceline-io".to_owned())));
    }

    #[test]
    fn dropping_the_thread_ends_waits_for_it() {
        let io = IoThread::start().expect("a thread");
        let handle = io.handle();
        let waiter = thread::spawn(move || handle.block_on(std::future::pending::<()>()));
        let handle = io.handle();
        drop(io);
        assert!(matches!(waiter.join(), Ok(Err(Error::Usage { .. }))));
        assert!(matches!(handle.block_on(async {}), Err(Error::Usage { .. })), "the handle outlives it");
    }

    #[test]
    fn a_blocking_call_on_the_thread_itself_is_refused() {
        let io = IoThread::start().expect("a thread");
        let handle = io.handle();
        let inner = io.handle().block_on(async move { handle.block_on(async {}) });
        assert!(matches!(inner, Ok(Err(Error::Usage { .. }))), "{inner:?}");
    }

    #[test]
    fn dropping_the_thread_on_itself_does_not_hang() {
        let io = IoThread::start().expect("a thread");
        let handle = io.handle();
        let start = Instant::now();
        let _ = handle.block_on(async move { drop(io) });
        assert!(start.elapsed() < CLOSING_LIMIT);
    }
}
