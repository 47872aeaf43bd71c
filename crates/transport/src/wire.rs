//! Control messages on the wire: the one file that knows bincode.
//!
//! Control messages are rare and small (a roster, a notice that a rank died), so their format may be
//! convenient; what matters is that no sequence of bytes a peer can send makes us panic or allocate
//! more than [`DECODE_MEMORY_LIMIT`]. bincode without a limit fails that: a message of 20 bytes that
//! announces a vector of 2^40 elements aborts the process, hence the limit and the check that every
//! byte was used. The data plane's header is in [`crate::frame`] and has nothing to do with this.
//!
//! bincode is pinned because its upstream has stopped; `wincode` writes the same bytes (the tests
//! compare them), so replacing it touches this file only.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest encoded control message, in bytes. A roster of 1,024 members takes about 48 KiB.
pub const MESSAGE_LIMIT: usize = 64 * 1024;

/// The most memory, in bytes, that decoding one message may claim.
///
/// bincode counts the size of the decoded values, which is larger than their encoding (a short string
/// is 1 + n bytes on the wire and 24 + n in memory), hence the factor against [`MESSAGE_LIMIT`].
pub const DECODE_MEMORY_LIMIT: usize = 1024 * 1024;

/// Bytes that are not a message or a frame of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Longer than the limit.
    #[error("a message of {len} bytes is over the limit of {limit}")]
    TooLong {
        /// The length found or announced, in bytes.
        len: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// Not decodable as the expected message.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// What was expected.
        what: &'static str,
        /// What was found, in words.
        reason: String,
    },
    /// A frame of another release's format.
    #[error("version {theirs} of the frame format; this side speaks {ours}")]
    Version {
        /// The version found.
        theirs: u8,
        /// The version this release speaks.
        ours: u8,
    },
    /// A frame of another epoch: the sender is fenced.
    #[error("a frame of epoch {theirs} on a link of epoch {ours}")]
    Epoch {
        /// The epoch found.
        theirs: u64,
        /// The link's epoch.
        ours: u64,
    },
}

// Variable-length integers keep rosters small; the choice is part of the format (golden test below).
fn config() -> Configuration<LittleEndian, Varint, Limit<DECODE_MEMORY_LIMIT>> {
    bincode::config::standard().with_limit::<DECODE_MEMORY_LIMIT>()
}

/// Encodes a control message.
///
/// # Errors
/// [`WireError::TooLong`] when the encoding exceeds [`MESSAGE_LIMIT`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let bytes = bincode::serde::encode_to_vec(message, config())
        .map_err(|error| WireError::Malformed { what: "message to send", reason: error.to_string() })?;
    if bytes.len() > MESSAGE_LIMIT {
        return Err(WireError::TooLong { len: bytes.len(), limit: MESSAGE_LIMIT });
    }
    Ok(bytes)
}

/// Decodes a control message that fills `bytes` exactly.
///
/// # Errors
/// [`WireError`] for anything else; arbitrary bytes neither panic nor allocate more than
/// [`DECODE_MEMORY_LIMIT`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > MESSAGE_LIMIT {
        return Err(WireError::TooLong { len: bytes.len(), limit: MESSAGE_LIMIT });
    }
    let malformed = |reason: String| WireError::Malformed { what: "message", reason };
    let (message, used) =
        bincode::serde::decode_from_slice(bytes, config()).map_err(|error| malformed(error.to_string()))?;
    if used != bytes.len() {
        return Err(malformed(format!("{} bytes left over after {used}", bytes.len() - used)));
    }
    Ok(message)
}
