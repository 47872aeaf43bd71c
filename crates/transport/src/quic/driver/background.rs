//! Drives an endpoint while no caller does.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::VarInt;
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::core::Progress;
use super::shared::Shared;

/// How often the task looks whether callers still drive. A caller that goes away without a word is
/// replaced after this and [`LINGER`](super::shared::LINGER), well within the 25 ms for which a peer waits
/// for an acknowledgement. Costs a wake-up of some 5 µs each time.
const LOOK_EVERY: Duration = Duration::from_millis(4);

/// The socket in the I/O thread's event queue, through a descriptor of its own. Each packet wakes that thread
/// as long as this value lives; nothing is sent or received through it.
pub(super) struct Registered(UdpSocket);

impl Registered {
    /// Puts the endpoint's socket into the event queue.
    ///
    /// # Errors
    /// The operating system's or, when the runtime has ended, tokio's.
    pub(super) fn new(shared: &Shared) -> io::Result<Self> {
        UdpSocket::from_std(shared.socket().descriptor().try_clone()?).map(Self)
    }

    /// Waits for a packet, or for room in the socket. It is forgotten before the turn that uses it up, so
    /// that none is missed.
    async fn ready(&self, interest: Interest) {
        // An error means that the runtime is ending, and this task with it.
        if self.0.ready(interest).await.is_ok() {
            let _ = self.0.try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
    }
}

/// Closes what is open when the I/O thread drops its tasks: nobody would drive it any more.
struct CloseOnDrop(Arc<Shared>);

/// Drives until the endpoint and its connections are gone.
pub(super) async fn run(shared: Arc<Shared>, registered: Registered) {
    let end = CloseOnDrop(shared);
    let shared = &end.0;
    let mut registered = Some(registered);
    while !shared.is_over() {
        if shared.is_driven() {
            registered = None;
            if shared.is_neglected(LOOK_EVERY) {
                shared.drive_in_background();
            }
            shared.background_is_awake();
            // Either way: look again.
            let _ = tokio::time::timeout(LOOK_EVERY, shared.call.notified()).await;
            continue;
        }
        let registered = match &registered {
            Some(registered) => registered,
            None => match Registered::new(shared) {
                Ok(new) => registered.insert(new),
                Err(error) => {
                    tracing::warn!(%error, "cannot wait for packets; looking for them now and then");
                    shared.drive_in_background();
                    tokio::time::sleep(LOOK_EVERY).await;
                    continue;
                }
            },
        };
        match shared.drive_in_background() {
            // Other tasks of this thread have their turn.
            (Progress::More, _) => tokio::task::yield_now().await,
            (progress, deadline) => wait(shared, registered, progress == Progress::Blocked, deadline).await,
        }
    }
}

/// Waits for a packet, a timer, room in the socket or a call.
async fn wait(shared: &Shared, registered: &Registered, blocked: bool, deadline: Option<Instant>) {
    let timer = async {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = registered.ready(Interest::READABLE) => {}
        () = registered.ready(Interest::WRITABLE), if blocked => {}
        () = timer => {}
        () = shared.call.notified() => {}
    }
    shared.background_is_awake();
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        let (code, reason) = (VarInt::from_u32(0), Bytes::from_static(b"the I/O thread has stopped"));
        self.0.act(|core, now| {
            core.close_all(now, code, &reason);
            core.send(now)
        });
    }
}
