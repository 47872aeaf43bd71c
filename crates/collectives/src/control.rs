//! What ranks tell each other outside of the data: why an operation failed, and who waits for whom.

use std::time::Duration;

use paceline_transport::frame::Prefix;
use paceline_transport::wire;
use serde::{Deserialize, Serialize};

use crate::error::{Call, Error};
use crate::operation::Operation;

/// A control message between the engines of two ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Control {
    /// The sender has failed and will take no further part.
    Abort(Cause),
    /// The sender's deadline has passed: whoever is in an operation says whom it waits for.
    WhoIsLate,
    /// The sender is in an operation and waits for these ranks.
    WaitingFor(Vec<u32>),
}

/// Why a rank failed, without its own view of the operation: the receiver has its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Cause {
    Lost { rank: u32, reason: String },
    Left { rank: u32 },
    Mismatch { calls: [(u32, Prefix); 2] },
    TimedOut { waiting_for: Vec<u32>, elapsed_ms: u64 },
    Interrupted { rank: u32, reason: String },
}

/// Reasons are for people; more than this is cut, so that a message stays within its limit.
const REASON_LIMIT_BYTES: usize = 1024;

/// Culprits named in a message; a longer list helps nobody and must stay within the limit.
const NAMED_RANKS_LIMIT: usize = 256;

impl Control {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self).expect("reasons and lists are cut to fit")
    }

    /// A peer's message, or in words what is wrong with it.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        wire::decode(bytes).map_err(|error| error.to_string())
    }

    pub(crate) fn waiting_for(ranks: &[usize]) -> Self {
        Self::WaitingFor(ranks.iter().take(NAMED_RANKS_LIMIT).map(|&rank| rank as u32).collect())
    }
}

impl Cause {
    /// What to tell the others about an error of `rank`; `None` for errors that concern nobody else.
    pub(crate) fn of(error: &Error, rank: usize) -> Option<Self> {
        match error {
            Error::PeerLost { rank, reason, .. } => {
                Some(Self::Lost { rank: *rank as u32, reason: cut(reason) })
            }
            Error::PeerLeft { rank, .. } => Some(Self::Left { rank: *rank as u32 }),
            Error::Mismatch { calls, .. } => Some(Self::Mismatch {
                calls: calls.map(|call| (call.rank as u32, call.operation.to_prefix(0))),
            }),
            Error::TimedOut { waiting_for, elapsed, .. } => Some(Self::TimedOut {
                waiting_for: waiting_for.iter().take(NAMED_RANKS_LIMIT).map(|&rank| rank as u32).collect(),
                elapsed_ms: elapsed.as_millis() as u64,
            }),
            Error::Interrupted { reason, .. } => {
                Some(Self::Interrupted { rank: rank as u32, reason: cut(reason) })
            }
            Error::Usage { .. } | Error::Leave { .. } => None,
        }
    }

    /// The error of this rank, in `operation`, when a peer failed for this cause.
    pub(crate) fn into_error(self, operation: Operation, own_rank: usize) -> Error {
        match self {
            Self::Lost { rank, reason } if rank as usize == own_rank => {
                let reason = format!("the other ranks gave this rank up: {}", quote(&reason));
                Error::Interrupted { operation, reason }
            }
            Self::Lost { rank, reason } => {
                Error::PeerLost { operation, rank: rank as usize, reason: quote(&reason) }
            }
            Self::Left { rank } => Error::PeerLeft { operation, rank: rank as usize },
            Self::Mismatch { calls: [first, second] } => match (call(first), call(second)) {
                (Some(first), Some(second)) => {
                    Error::Mismatch { operation, calls: Box::new([first, second]) }
                }
                _ => {
                    let reason = "a peer saw mismatched calls that this release does not know".to_owned();
                    Error::Interrupted { operation, reason }
                }
            },
            Self::TimedOut { waiting_for, elapsed_ms } => Error::TimedOut {
                operation,
                waiting_for: waiting_for.into_iter().map(|rank| rank as usize).collect(),
                elapsed: Duration::from_millis(elapsed_ms),
            },
            Self::Interrupted { rank, reason } => Error::Interrupted {
                operation,
                reason: format!("rank {rank} was interrupted: {}", quote(&reason)),
            },
        }
    }
}

/// The most characters of a peer's own words in our errors.
const QUOTE_LIMIT: usize = 1000;

/// A peer's own words, made fit for one line.
fn quote(words: &str) -> String {
    words.chars().take(QUOTE_LIMIT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn call((rank, prefix): (u32, Prefix)) -> Option<Call> {
    let (operation, _) = Operation::from_prefix(&prefix)?;
    Some(Call { rank: rank as usize, operation })
}

fn cut(reason: &str) -> String {
    let mut end = reason.len().min(REASON_LIMIT_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_longest_message_fits_the_control_lane() {
        let operation = Operation {
            number: u64::MAX,
            kind: crate::Kind::Barrier,
            dtype: crate::DType::U8,
            count: usize::MAX,
            segment_len: u32::MAX,
            schedule: 255,
        };
        let lost = Error::PeerLost { operation, rank: 1, reason: "é".repeat(10_000) };
        let late = Error::TimedOut {
            operation,
            waiting_for: (0..10_000).map(|i| u32::MAX as usize - i).collect(),
            elapsed: Duration::MAX,
        };
        for error in [lost, late] {
            let message = Control::Abort(Cause::of(&error, 0).expect("fatal errors have a cause"));
            assert!(message.to_bytes().len() <= paceline_transport::CONTROL_MESSAGE_LIMIT);
        }
        assert!(
            Control::waiting_for(&[usize::MAX; 5000]).to_bytes().len()
                <= paceline_transport::CONTROL_MESSAGE_LIMIT
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_a_message_or_an_error(bytes: Vec<u8>) {
            if let Ok(Control::Abort(cause)) = Control::from_bytes(&bytes) {
                let operation = Operation::from_prefix(&[0; 32]).map(|(operation, _)| operation);
                prop_assert!(operation.is_none());
                drop(cause);
            }
        }
    }
}
