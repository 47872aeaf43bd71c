//! What doctors say to each other, over UDP and TCP on one port: a question of any length, and an answer that is never
//! longer, so that nobody can be flooded by way of a doctor.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use paceline_transport::IoHandle;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

/// The first bytes of everything, with the version of what follows.
const MAGIC: [u8; 5] = *b"PLDR\x01";

/// Magic, kind, number, length, time.
pub const MESSAGE_BYTES: usize = 26;

/// Conversations over TCP at the same time.
const CONVERSATIONS: usize = 64;

/// How long a conversation may take.
const CONVERSATION: Duration = Duration::from_secs(2);

/// The longest datagram there is.
const DATAGRAM_BYTES: usize = 65_535;

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: Kind,
    /// Which question this is, or is the answer to.
    pub number: u64,
    /// Of an answer: how long the question was, in bytes.
    pub length: u32,
    /// Of an answer: microseconds since 1970 where it was given.
    pub time_us: u64,
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Are you there?
    Question,
    /// Yes.
    Answer,
    /// I have asked all that I had to ask.
    Done,
}

impl Message {
    /// A question or a word without content.
    pub fn new(kind: Kind, number: u64) -> Self {
        Self { kind, number, length: 0, time_us: 0 }
    }

    /// The bytes, without anything to make them longer.
    pub fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..5].copy_from_slice(&MAGIC);
        bytes[5] = match self.kind {
            Kind::Question => 0,
            Kind::Answer => 1,
            Kind::Done => 2,
        };
        bytes[6..14].copy_from_slice(&self.number.to_le_bytes());
        bytes[14..18].copy_from_slice(&self.length.to_le_bytes());
        bytes[18..].copy_from_slice(&self.time_us.to_le_bytes());
        bytes
    }

    /// The message at the beginning of these bytes; `None` if they are something else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; MESSAGE_BYTES] = bytes.first_chunk()?;
        let kind = match bytes[5] {
            0 => Kind::Question,
            1 => Kind::Answer,
            2 => Kind::Done,
            _ => return None,
        };
        let number = |from: usize| u64::from_le_bytes(bytes[from..from + 8].try_into().expect("eight bytes"));
        let length = u32::from_le_bytes(bytes[14..18].try_into().expect("four bytes"));
        let message = Self { kind, number: number(6), length, time_us: number(18) };
        (bytes[..5] == MAGIC).then_some(message)
    }

    fn answer(&self, length: usize) -> Option<[u8; MESSAGE_BYTES]> {
        // Datagrams and conversations are shorter than 4 GiB.
        let answer =
            Self { kind: Kind::Answer, number: self.number, length: length as u32, time_us: now_us() };
        (self.kind == Kind::Question).then(|| answer.encode())
    }
}

/// Microseconds since 1970.
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// Who has asked all they had to ask; clones are the same list.
#[derive(Debug, Clone, Default)]
pub struct Served(Arc<Mutex<Vec<IpAddr>>>);

impl Served {
    /// How many machines have.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn note(&self, ip: IpAddr) {
        let mut served = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A bound for those who lie about their addresses.
        if served.len() < CONVERSATIONS * CONVERSATIONS && !served.contains(&ip) {
            served.push(ip);
        }
    }
}

/// Answers on these sockets until the I/O thread ends.
pub fn answer(io: &IoHandle, tcp: TcpListener, udp: UdpSocket) -> Served {
    let served = Served::default();
    io.spawn(answer_datagrams(udp, served.clone()));
    let tasks = io.clone();
    io.spawn(async move {
        let places = Arc::new(Semaphore::new(CONVERSATIONS));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match tcp.accept().await {
                Ok((stream, _)) => {
                    tasks.spawn(async move {
                        // Who says nothing, or nonsense, is hung up on.
                        let _ = tokio::time::timeout(CONVERSATION, converse(stream)).await;
                        drop(place);
                    });
                }
                // Out of descriptors, most likely: not for ever.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    served
}

async fn answer_datagrams(socket: UdpSocket, served: Served) {
    let mut buffer = vec![0; DATAGRAM_BYTES];
    loop {
        // An error tells of an earlier answer that did not arrive.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        match Message::decode(&buffer[..length]) {
            Some(Message { kind: Kind::Done, .. }) => served.note(from.ip()),
            Some(question) => {
                if let Some(answer) = question.answer(length) {
                    let _ = socket.send_to(&answer, from).await;
                }
            }
            None => {}
        }
    }
}

async fn converse(mut stream: TcpStream) -> std::io::Result<()> {
    let mut question = [0; MESSAGE_BYTES];
    stream.read_exact(&mut question).await?;
    match Message::decode(&question).and_then(|question| question.answer(MESSAGE_BYTES)) {
        Some(answer) => stream.write_all(&answer).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_back_and_strangers_are_not_understood() {
        for kind in [Kind::Question, Kind::Answer, Kind::Done] {
            let message = Message { kind, number: u64::MAX - 1, length: 1500, time_us: 7 };
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        let good = Message::new(Kind::Question, 1).encode();
        assert_eq!(Message::decode(&good[..MESSAGE_BYTES - 1]), None);
        for at in [0, 4, 5] {
            let mut bad = good;
            bad[at] = 9;
            assert_eq!(Message::decode(&bad), None);
        }
        let answer = Message { kind: Kind::Answer, number: 1, length: 0, time_us: 0 };
        assert_eq!(answer.answer(26), None, "or two doctors would talk for ever");
    }

    proptest::proptest! {
        #[test]
        fn whatever_comes_is_understood_as_it_was_meant_or_not_at_all(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64),
            begins_well in proptest::bool::ANY,
        ) {
            let mut bytes = bytes;
            if begins_well && bytes.len() > MAGIC.len() {
                bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
                bytes[MAGIC.len()] %= 4;
            }
            if let Some(message) = Message::decode(&bytes) {
                assert_eq!(message.encode(), bytes[..MESSAGE_BYTES]);
            }
        }
    }
}
