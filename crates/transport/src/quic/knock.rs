//! What a datagram must carry to be let in by the kernel.
//!
//! TLS keeps strangers out, but each of their datagrams has to be taken from the socket before it is found to be
//! theirs, by the thread that sums: random datagrams of 64 bytes, 100 Mbit/s of them, left a job with 60 % of its
//! throughput. A [`Knock`] is four random bytes that an endpoint's peers are told with its address. All
//! connection IDs that it is addressed with begin with them, and a filter of its socket drops what does not.
//!
//! It is no secret to those who see the job's packets, in which it is readable: they meet TLS, as before. Whoever
//! does not, guesses once in four billion datagrams.
//!
//! The filter also drops stateless resets (RFC 9000, 10.3), which begin with random bytes. A process that has
//! ended could not send one anyway, and for one that has forgotten a connection its close comes first.

use std::net::UdpSocket;
use std::time::Duration;

use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use serde::{Deserialize, Serialize};
use socket2::{SockFilter, SockRef};

use crate::bpf::{self, Step};
use crate::random;

/// Four bytes with which the connection IDs of an endpoint begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Knock([u8; LEN]);

const LEN: usize = 4;

/// The random bytes behind it in an endpoint's own connection IDs. quinn-proto makes another one where an
/// ID is in use.
const OWN_RANDOM: usize = 4;

/// Those in the first connection ID of a connection, which its dialler chooses: RFC 9000 (7.2) asks for 8 bytes that
/// nobody can foresee.
const FIRST_RANDOM: usize = 12;

impl Knock {
    /// Draws one.
    ///
    /// # Errors
    /// The operating system's, when it has no random numbers.
    pub fn random() -> std::io::Result<Self> {
        Ok(Self(random::bytes()?))
    }

    /// A connection ID for the first datagram to the endpoint that this belongs to.
    pub(super) fn first_id(self) -> ConnectionId {
        self.id::<FIRST_RANDOM>()
    }

    fn id<const RANDOM: usize>(self) -> ConnectionId {
        // Without random numbers no connection is made, for TLS has no keys then.
        let random: [u8; RANDOM] = random::bytes().unwrap_or([0; RANDOM]);
        ConnectionId::new(&[&self.0[..], &random].concat())
    }

    /// Has the kernel drop all datagrams for `socket` that are not addressed with this.
    ///
    /// # Errors
    /// The operating system's; nothing is dropped then.
    pub(super) fn guard(self, socket: &UdpSocket) -> std::io::Result<()> {
        let program =
            self.program().map(|(op, then, or_else, value)| SockFilter::new(op, then, or_else, value));
        SockRef::from(socket).attach_filter(&program)
    }

    /// The filter. Offsets begin at the UDP header.
    fn program(self) -> [Step; 10] {
        const FIRST_BYTE: u32 = 8;
        const LONG_HEADER: u32 = 0x80;
        const SHORT_ID: u32 = FIRST_BYTE + 1;
        // In a long header the version comes before the ID, and the ID's length.
        const LONG_ID_LEN: u32 = FIRST_BYTE + 5;
        const LONG_ID: u32 = LONG_ID_LEN + 1;
        [
            (bpf::LOAD_BYTE, 0, 0, FIRST_BYTE),
            (bpf::IF_SET, 2, 0, LONG_HEADER),
            (bpf::LOAD_WORD, 0, 0, SHORT_ID),
            (bpf::SKIP, 0, 0, 3),
            (bpf::LOAD_BYTE, 0, 0, LONG_ID_LEN),
            (bpf::IF_AT_LEAST, 0, 2, LEN as u32),
            (bpf::LOAD_WORD, 0, 0, LONG_ID),
            (bpf::IF_EQUAL, 1, 0, u32::from_be_bytes(self.0)),
            (bpf::RETURN, 0, 0, bpf::DROP),
            (bpf::RETURN, 0, 0, bpf::KEEP),
        ]
    }
}

/// Makes the connection IDs of an endpoint with a knock.
pub(super) struct Ids(pub(super) Knock);

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        self.0.id::<OWN_RANDOM>()
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        if id.starts_with(&self.0.0) { Ok(()) } else { Err(InvalidCid) }
    }

    fn cid_len(&self) -> usize {
        LEN + OWN_RANDOM
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A datagram with a long header that is addressed with `id`.
    fn long(id: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0xc0, 0, 0, 0, 1, u8::try_from(id.len()).expect("short")];
        datagram.extend(id);
        datagram.resize(1200, 0);
        datagram
    }

    fn short(id: &[u8]) -> Vec<u8> {
        [&[0x40][..], id, &[0; 20]].concat()
    }

    #[test]
    fn the_kernel_lets_in_what_is_addressed_with_the_knock_and_nothing_else() {
        let knock = Knock(*b"knoc");
        for ip in ["127.0.0.1:0", "[::1]:0"] {
            let socket = UdpSocket::bind(ip).expect("loopback");
            socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a time");
            knock.guard(&socket).expect("a valid program");
            let sender = UdpSocket::bind(ip).expect("loopback");
            let right = [
                long(b"knock----"),
                short(b"knock"),
                long(&knock.first_id()),
                short(&Ids(knock).generate_cid()),
            ];
            let wrong = [
                long(b"kno"),
                long(b""),
                long(b"Knock----"),
                short(b"knoC----"),
                vec![],
                vec![0x40],
                b"\x40kno".to_vec(),
                vec![0xc0; 64],
                vec![0x40; 64],
                b"GET / HTTP/1.1".to_vec(),
                long(b"knoc")[..9].to_vec(),
            ];
            for datagram in wrong.iter().chain(&right) {
                sender.send_to(datagram, socket.local_addr().expect("bound")).expect("sent");
            }
            // They arrive in order: had a wrong one come in, it would be the first.
            for datagram in &right {
                let mut buffer = [0; 2000];
                let len = socket.recv(&mut buffer).expect("let in");
                assert_eq!(&buffer[..len], &datagram[..]);
            }
        }
    }
}
