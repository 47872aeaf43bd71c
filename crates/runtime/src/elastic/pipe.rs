//! What a launcher and a worker of its own say to each other, and how: over a Unix socket, whose path the worker
//! finds in its environment. Nothing is lost or reordered on it, and both see the other's end at once.
//!
//! ```text
//! worker                      launcher
//! Attach{version, child, …} ─────▶
//!                           ◀─────  Welcome{job, …} | Refused{reason}
//! Contact, Says(Hello)      ─────▶
//!                           ◀─────  Contact | Forget | Says(…)      from then on
//! Moving                    ─────▶                                  while states or results are under way
//! Finished                  ─────▶
//!                           ◀─────  Finished                        when all are
//! ```

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;

use paceline_transport::wire;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::membership::{CatchUp, FromWorker, Incarnation, Job, Mode, ToWorker};

/// The version of these messages: both sides are of one installation, but a program may have been linked long ago.
pub const VERSION: u16 = 5;

/// Where an admission of a worker is reached by the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contact {
    /// Which admission.
    pub incarnation: Incarnation,
    /// The name in its certificate.
    pub member: String,
    /// Where it is dialled for the links of a view.
    pub links: SocketAddr,
    /// Where it is dialled for messages and state outside of a view.
    pub exchange: SocketAddr,
}

/// What a program asks of its membership; all workers of a job ask the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// What becomes of a lost worker's slots.
    pub mode: Mode,
    /// The number of slots; as many as workers at the start, less the spares, if that is not said.
    pub slots: Option<u16>,
    /// How many workers have no slot while all are there.
    pub spares: u16,
    /// How a worker gets the steps that it has not made.
    pub catch_up: CatchUp,
    /// After how many steps each a checkpoint is made, if any are: members agree on each of them.
    pub checkpoint_every: Option<u64>,
}

/// From a worker to its launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromChild {
    /// The first message.
    Attach {
        /// [`VERSION`].
        version: u16,
        /// Which process of the launcher's it is, by its environment.
        child: u32,
        /// What its program asks for.
        wish: Wish,
    },
    /// Where its next incarnation is reached; before that says hello.
    Contact(Contact),
    /// Of the membership.
    Says(FromWorker),
    /// A state or a result is on its way from or to this worker.
    Moving,
    /// The training is complete here.
    Finished,
}

/// From a launcher to a worker of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToChild {
    /// It is let in.
    Welcome(Welcome),
    /// It is not.
    Refused {
        /// Why, in words.
        reason: String,
    },
    /// Where another worker is reached.
    Contact(Contact),
    /// That admission is over.
    Forget(Incarnation),
    /// Of the membership.
    Says(ToWorker),
    /// The training is complete everywhere: nobody needs this worker any more.
    Finished,
}

/// What a worker must know to take part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The terms of the membership.
    pub job: Job,
    /// The address of this machine at which the others reach its workers.
    pub listen: IpAddr,
    /// Whether the job may begin from the state that this worker has made; the others take it from one that may.
    pub begins: bool,
}

/// Writes one message. Blocks while the other side does not read.
///
/// # Errors
/// The operating system's; `InvalidInput` for a message over the limit of [`wire::MESSAGE_LIMIT`].
pub fn send<T: Serialize>(mut pipe: &UnixStream, message: &T) -> io::Result<()> {
    let bytes = wire::encode(message).map_err(|e| io::Error::new(ErrorKind::InvalidInput, e.to_string()))?;
    let mut framed = Vec::with_capacity(bytes.len() + 4);
    framed.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    framed.extend_from_slice(&bytes);
    pipe.write_all(&framed)
}

/// Reads one message; `None` at the end of the pipe. Blocks.
///
/// # Errors
/// The operating system's; `InvalidData` for what is no message, after which the pipe is of no use.
pub fn receive<T: DeserializeOwned>(mut pipe: &UnixStream) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match pipe.read_exact(&mut length) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let length = u32::from_le_bytes(length) as usize;
    let malformed = |reason: String| io::Error::new(ErrorKind::InvalidData, reason);
    if length > wire::MESSAGE_LIMIT {
        return Err(malformed(format!("a message of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    pipe.read_exact(&mut bytes)?;
    wire::decode(&bytes).map(Some).map_err(|e| malformed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::membership::Epoch;

    #[test]
    fn messages_come_out_as_they_went_in_and_the_end_is_none() {
        let (one, other) = UnixStream::pair().expect("a pair of sockets");
        let (mode, catch_up) = (Mode::Slots, CatchUp::State);
        let wish = Wish { mode, slots: Some(7), spares: 2, catch_up, checkpoint_every: None };
        let said = [FromChild::Attach { version: VERSION, child: 3, wish }, FromChild::Finished];
        said.iter().for_each(|message| send(&one, message).expect("there is room"));
        drop(one);
        for message in said {
            assert_eq!(receive::<FromChild>(&other).expect("a message"), Some(message));
        }
        assert_eq!(receive::<FromChild>(&other).expect("the end"), None);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_allocated() {
        let (one, other) = UnixStream::pair().expect("a pair of sockets");
        (&one).write_all(&u32::MAX.to_le_bytes()).expect("there is room");
        let error = receive::<FromChild>(&other).expect_err("too long");
        assert!(error.to_string().contains("4294967295 bytes"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes: Vec<u8>, epoch: u64) {
            let (one, other) = UnixStream::pair().expect("a pair of sockets");
            send(&one, &ToChild::Says(ToWorker::Wedge { epoch: Epoch(epoch) })).expect("there is room");
            (&one).write_all(&(bytes.len() as u32).to_le_bytes()).expect("there is room");
            (&one).write_all(&bytes).expect("there is room");
            drop(one);
            prop_assert!(receive::<ToChild>(&other).is_ok_and(|message| message.is_some()));
            let _ = receive::<ToChild>(&other);
        }
    }
}
