//! Moves bytes between the ranks of one epoch, reliably and in order.
//!
//! A [`Transport`] is one rank's set of links to its peers. Each link carries two independent
//! things: a *byte stream* for data, flow-controlled, and a *control lane* of short messages that
//! never wait behind data. Frames on the byte stream are cut and joined by [`frame`]; what a frame's
//! payload means is the business of the layer above.
//!
//! This crate refuses to know a dtype, a collective or an environment variable.
//!
//! | module | what it is |
//! |---|---|
//! | [`mem`] | ranks as threads of one process, over a bounded window |
//! | [`quic`] | ranks as processes, over QUIC with mutual TLS |
//! | [`tls`] | ranks as processes, over TCP with mutual TLS |
//! | [`fabric`] | which of both the ranks of several hosts use |
//! | [`shm`] | ranks of one host, through memory that they share |
//! | [`pair`] | a link between two members, made whenever they want one; no epoch, no ranks |
//! | [`boot`] | how the nodes of a job that share a secret get their certificates |
//! | [`secret`] | that secret, and the keys derived from it |
//! | [`identity`] | the job's certificate authority and its members' identities |
//! | [`frame`] | the data-plane header, written by hand, and partial sends and receives of frames |
//! | [`wire`] | control messages: the only file that knows bincode |

pub mod boot;
mod bpf;
mod close;
mod control_lane;
mod credentials;
pub mod error;
pub mod fabric;
mod forming;
pub mod frame;
pub mod identity;
mod io;
pub mod mem;
mod mesh;
mod newcomers;
pub mod pair;
pub mod park;
pub mod quic;
mod random;
pub mod secret;
pub mod shm;
pub mod tls;
mod warnings;
pub mod wire;

use std::fmt;
use std::io::IoSlice;
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

pub use error::Error;
pub use fabric::Fabric;
pub use forming::{Former, Forming};
pub use io::{IoHandle, IoThread};
pub use mesh::{Member, Roster};
use shm::{Segments, SharedMemory};

/// The longest control message a transport accepts, in bytes.
///
/// Control messages say "this operation failed" or "I am leaving"; 4 KiB leaves room for a reason in
/// words and bounds what a peer can make us hold.
pub const CONTROL_MESSAGE_LIMIT: usize = 4096;

/// One rank's links to all other ranks of one epoch.
///
/// All calls are non-blocking except [`wait`](Transport::wait) and [`leave`](Transport::leave), which
/// have deadlines. The caller drives sends and receives together: a rank that sends a long message
/// before it starts to receive deadlocks as soon as the windows are full, on every transport.
///
/// Bytes arrive in the order they were sent, per ordered pair of ranks; nothing orders different
/// pairs, nor data against control. Indexing a peer that is this rank or not below
/// [`world_size`](Transport::world_size) is a defect of the caller and panics.
pub trait Transport: Send + fmt::Debug {
    /// A short name for logs and errors: `mem`, `quic`, `tls`.
    fn name(&self) -> &'static str;

    /// This process's rank in the epoch.
    fn rank(&self) -> usize;

    /// The number of ranks in the epoch.
    fn world_size(&self) -> usize;

    /// The epoch the links belong to.
    fn epoch(&self) -> u64;

    /// Hands as many bytes of `parts`, in order, to the link as its window takes, and returns how
    /// many. `Ok(0)` means the window is full; a later [`wait`](Transport::wait) ends when there is room.
    ///
    /// The bytes are copied; the caller keeps its buffers.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::Left`] when the link is gone. Every later call answers the same.
    fn try_send(&mut self, to: usize, parts: &[IoSlice<'_>]) -> Result<usize, Error>;

    /// Copies bytes that have arrived into `into` and returns how many. `Ok(0)` means that none are
    /// there now (or `into` is empty); a later [`wait`](Transport::wait) ends when some arrive.
    ///
    /// # Errors
    /// [`Error::Left`] when the peer left in order and all its bytes have been read, [`Error::Lost`]
    /// when the link is gone. Every later call answers the same.
    fn try_recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Error>;

    /// Sends one short message on the control lane. Never waits for the peer.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::Left`] when the link is gone, [`Error::Usage`] when the message is
    /// longer than [`CONTROL_MESSAGE_LIMIT`].
    fn send_control(&mut self, to: usize, message: &[u8]) -> Result<(), Error>;

    /// Takes the next control message of a peer, if one has arrived.
    ///
    /// # Errors
    /// [`Error::Left`] or [`Error::Lost`] when the link is gone and no message is left.
    fn try_recv_control(&mut self, from: usize) -> Result<Option<Vec<u8>>, Error>;

    /// Parks the caller until a link that answered `Ok(0)` or `Ok(None)` may answer otherwise, until
    /// the [`waker`](Transport::waker) is used, or until `until`, whichever is first.
    ///
    /// A wake-up since the last `wait` is remembered and ends the next one at once, so polling all
    /// links and then waiting never sleeps through an event. Wake-ups may be spurious.
    fn wait(&mut self, until: Instant);

    /// [`wait`](Transport::wait) for nothing but links to `peers`. Which ones makes a difference where links
    /// are of two kinds. For no peer at all, as `wait`.
    fn wait_for(&mut self, _peers: &[usize], until: Instant) {
        self.wait(until);
    }

    /// Passes a moment that is too short to park for, and says whether it did. A few µs after something
    /// last moved it answers `false`: then look for bad news and [`wait`](Transport::wait). Transports
    /// whose peers never answer within less time than a wake-up takes always answer `false`.
    fn spin(&mut self) -> bool {
        false
    }

    /// An operation is over, and none may follow for a while: what it left to be done for the peers
    /// (acknowledgements, bytes that the network has not taken yet) must go on without the caller. A hint,
    /// which costs little where another operation follows at once; without it peers are served some ms late.
    fn pause(&mut self) {}

    /// Does once what [`wait`](Transport::wait) does before it parks, for a caller that never parks here. `false`
    /// while bytes that [`try_send`](Transport::try_send) has taken are still on this side and need more such calls
    /// to go on without delay.
    fn drive(&mut self) -> bool {
        true
    }

    /// What was waited for has come, other than through this transport's byte streams.
    fn wait_is_over(&mut self) {}

    /// Whether the link to `peer` was up when [`wait`](Transport::wait) last looked.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::Left`] if it was not. Transports on which that shows by receiving
    /// alone answer `Ok`.
    fn check(&mut self, _peer: usize) -> Result<(), Error> {
        Ok(())
    }

    /// Counts `peer` as lost from now on, because somebody else has learnt that it is: nothing waits for
    /// its answer any more, but for the moment that [`abort`](Transport::abort) takes to tell it.
    fn give_up(&mut self, _peer: usize, _reason: &str) {}

    /// The memory that this rank shares with others of its host, when there are some.
    fn segments(&self) -> Option<Arc<Segments>> {
        None
    }

    /// Gives `memory` to all other ranks of this host and returns that of each, in their order. Every one of
    /// them calls it with as many bytes. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when ranks do not share memory; [`Error::Lost`] with the rank that did not give
    /// its own by the deadline.
    fn share(&mut self, _memory: SharedMemory, _deadline: Instant) -> Result<Vec<SharedMemory>, Error> {
        Err(Error::Usage { reason: format!("{} does not share memory", self.name()) })
    }

    /// A waker with which another thread ends a [`wait`](Transport::wait).
    fn waker(&self) -> Waker;

    /// Begins to form links among some of the ranks: `members`, this rank among them, in the order of their
    /// new ranks. Every member calls it with the same list and the same `id`, by which simultaneous groups
    /// are told apart; no two groups of an epoch have the same. Does not block: the result comes from what is
    /// returned, and the [`waker`](Transport::waker) fires when it is there.
    ///
    /// The new links are independent of these, which may leave or fail while those go on. A result may be
    /// there before all members have called, where links need nothing from the other side.
    ///
    /// # Errors
    /// [`Error::Usage`] when this rank is not among the members or a member does not exist. From what is
    /// returned: [`Error::TimedOut`] naming the members without a link at `deadline`.
    fn split(&mut self, members: &[usize], id: u64, deadline: Instant) -> Result<Forming, Error>;

    /// Gives up: sends `message` as this side's last control message to every peer that can still be
    /// reached, and returns when it has been delivered or `deadline` has passed.
    ///
    /// Peers read the message before they get [`Error::Lost`], so they learn why. Every later call but
    /// dropping is pointless.
    fn abort(&mut self, message: &[u8], deadline: Instant);

    /// Leaves in order: tells every peer that no more data will come, and returns when all that was
    /// sent has been delivered (not necessarily read) or `deadline` has passed.
    ///
    /// After it, peers read what is left on their link and then get [`Error::Left`]. Dropping a
    /// transport without `leave` is a loss for the peers, by intent: a rank that panics has not finished.
    ///
    /// # Errors
    /// [`Error::TimedOut`] naming the peers that had not confirmed by the deadline. Peers that are
    /// lost or have left themselves are not waited for.
    fn leave(&mut self, deadline: Instant) -> Result<(), Error>;
}
