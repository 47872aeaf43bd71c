//! What can go wrong below the collectives.

use std::net::SocketAddr;
use std::time::Duration;

use crate::wire::WireError;

/// Errors of this crate. An error of a link is final for that link; the links to other peers live on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The peer left in order; there is nothing more to read from it and nobody to send to.
    #[error("rank {peer} has left in order")]
    Left {
        /// The peer's rank.
        peer: usize,
    },
    /// The link to the peer is gone, or the peer broke the protocol and was cut off.
    #[error("the link to rank {peer} was lost: {reason}")]
    Lost {
        /// The peer's rank.
        peer: usize,
        /// What was seen, in words.
        reason: String,
    },
    /// A wait ended at its deadline.
    #[error("timed out after {} ms waiting for {what}", elapsed.as_millis())]
    TimedOut {
        /// What was waited for and from whom.
        what: String,
        /// The ranks that did not come; empty where it was not for ranks.
        ranks: Vec<usize>,
        /// How long the wait was.
        elapsed: Duration,
    },
    /// A wait was given up because its end had become impossible.
    #[error("gave up waiting for {what}: {reason}")]
    GaveUp {
        /// What was waited for.
        what: String,
        /// What has happened, in words.
        reason: String,
    },
    /// The other side was refused, or refused us: no certificate of this job, the wrong member, or
    /// another protocol version.
    #[error("refused {remote}: {reason}")]
    Refused {
        /// The address of the other side.
        remote: SocketAddr,
        /// Why, in words.
        reason: String,
    },
    /// Nobody answers at an address: no such host, or nothing listens there yet.
    #[error("nobody answers at {remote}: {reason}")]
    Unreachable {
        /// The address that was dialled.
        remote: SocketAddr,
        /// The operating system's reason.
        reason: String,
    },
    /// A local socket could not be opened.
    #[error("cannot listen on {addr}: {reason}")]
    Bind {
        /// The address asked for.
        addr: SocketAddr,
        /// The operating system's reason.
        reason: String,
        /// The reason as a kind, to choose an advice by.
        kind: std::io::ErrorKind,
    },
    /// A certificate, key or identity file cannot be used.
    #[error("unusable identity: {reason}")]
    Identity {
        /// What is wrong with it.
        reason: String,
    },
    /// Bytes that are not a message of ours.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A call that this side may not make.
    #[error("{reason}")]
    Usage {
        /// What was wrong and what to do.
        reason: String,
    },
}
