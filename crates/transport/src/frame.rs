//! Frames on a link's byte stream: a header written by hand, an opaque prefix, a payload.
//!
//! ```text
//! byte  0      2         3      4         8       16      20        24            56
//!       magic  version   kind   channel   epoch   len     reserved  prefix        payload (len bytes)
//!       u16    u8        u8     u32       u64     u32     u32 = 0   32 bytes
//! ```
//! All integers are little-endian. `len` is the payload's size in bytes. The prefix belongs to the
//! layer above (the collectives put their operation header there); this layer carries it unread.
//!
//! Both directions are partial by nature: [`OutFrame`] remembers how much of a frame the link has
//! taken, [`InFrame`] how much of a header has come. Payloads go straight between the link and the
//! caller's buffer; nothing here allocates, so no length a peer announces costs memory.

use std::io::IoSlice;

use crate::wire::WireError;
use crate::{Error, Transport};

/// `PC`, as the first two bytes on the wire.
pub const MAGIC: u16 = u16::from_le_bytes(*b"PC");
/// The version of the frame format this release speaks.
pub const VERSION: u8 = 1;
/// Size of the transport's header, in bytes.
pub const HEADER_BYTES: usize = 24;
/// Size of the prefix that belongs to the layer above, in bytes.
pub const PREFIX_BYTES: usize = 32;
/// Size of everything before the payload, in bytes.
pub const HEAD_BYTES: usize = HEADER_BYTES + PREFIX_BYTES;
/// The longest payload of one frame, in bytes. Longer messages are cut by the layer above.
pub const PAYLOAD_LIMIT: usize = 64 * 1024 * 1024;

const KIND_DATA: u8 = 1;

/// The transport's header of a data frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Which communicator of the link the frame belongs to.
    pub channel: u32,
    /// The epoch of the sender.
    pub epoch: u64,
    /// Size of the payload in bytes.
    pub len: u32,
}

impl FrameHeader {
    /// The header's bytes on the wire.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[2] = VERSION;
        bytes[3] = KIND_DATA;
        bytes[4..8].copy_from_slice(&self.channel.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError`] when the bytes are not a data frame of this version, announce more than
    /// [`PAYLOAD_LIMIT`], or have a reserved bit set.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let malformed = |reason: String| WireError::Malformed { what: "frame", reason };
        let magic = u16::from_le_bytes([bytes[0], bytes[1]]);
        if magic != MAGIC {
            return Err(malformed(format!("magic {magic:#06x} is not {MAGIC:#06x}")));
        }
        if bytes[2] != VERSION {
            return Err(WireError::Version { theirs: bytes[2], ours: VERSION });
        }
        if bytes[3] != KIND_DATA {
            return Err(malformed(format!("unknown kind {}", bytes[3])));
        }
        if bytes[20..24] != [0; 4] {
            return Err(malformed("reserved bytes are not zero".to_owned()));
        }
        let len = u32::from_le_bytes(array(&bytes[16..20]));
        if len as usize > PAYLOAD_LIMIT {
            return Err(WireError::TooLong { len: len as usize, limit: PAYLOAD_LIMIT });
        }
        Ok(Self {
            channel: u32::from_le_bytes(array(&bytes[4..8])),
            epoch: u64::from_le_bytes(array(&bytes[8..16])),
            len,
        })
    }
}

/// The prefix of a frame, for the layer above.
pub type Prefix = [u8; PREFIX_BYTES];

/// A frame on its way out.
#[derive(Debug)]
pub struct OutFrame {
    head: [u8; HEAD_BYTES],
    payload_len: usize,
    sent: usize,
}

impl OutFrame {
    /// A frame of which nothing has been sent.
    ///
    /// # Panics
    /// If `payload_len` exceeds [`PAYLOAD_LIMIT`], a defect of the caller.
    pub fn new(channel: u32, epoch: u64, prefix: &Prefix, payload_len: usize) -> Self {
        assert!(payload_len <= PAYLOAD_LIMIT, "the caller cuts messages into frames");
        let header = FrameHeader { channel, epoch, len: payload_len as u32 };
        let mut head = [0; HEAD_BYTES];
        head[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
        head[HEADER_BYTES..].copy_from_slice(prefix);
        Self { head, payload_len, sent: 0 }
    }

    /// Sends as much as the link takes now and returns how many bytes that was; 0 means that the
    /// window is full. `payload` must be the same bytes in every call.
    ///
    /// # Errors
    /// Those of [`Transport::try_send`].
    ///
    /// # Panics
    /// If `payload` has another length than announced, a defect of the caller.
    pub fn try_send(
        &mut self,
        transport: &mut dyn Transport,
        to: usize,
        payload: &[u8],
    ) -> Result<usize, Error> {
        assert_eq!(payload.len(), self.payload_len, "one frame, one payload");
        let sent = if self.sent < HEAD_BYTES {
            let parts = [IoSlice::new(&self.head[self.sent..]), IoSlice::new(payload)];
            transport.try_send(to, &parts)?
        } else {
            transport.try_send(to, &[IoSlice::new(&payload[self.sent - HEAD_BYTES..])])?
        };
        self.sent += sent;
        Ok(sent)
    }

    /// Whether the link has taken the whole frame.
    pub fn is_done(&self) -> bool {
        self.sent == HEAD_BYTES + self.payload_len
    }
}

/// The head of the next frame of one peer, as far as it has come.
#[derive(Debug, Default)]
pub struct InFrame {
    header: [u8; HEADER_BYTES],
    prefix: Prefix,
    /// Bytes of the two that have come.
    have: usize,
}

impl InFrame {
    /// The head of the frame at the front of the peer's stream, or `None` until all of it has come.
    ///
    /// The head stays at the front (further calls give it again) until [`consume`](Self::consume);
    /// then the payload is next on the stream.
    ///
    /// # Errors
    /// Those of [`Transport::try_recv`]; [`Error::Lost`] when the bytes are not a frame of this epoch:
    /// the stream cannot be read on after that.
    pub fn peek(
        &mut self,
        transport: &mut dyn Transport,
        from: usize,
    ) -> Result<Option<(FrameHeader, &Prefix)>, Error> {
        while self.have < HEAD_BYTES {
            let rest = match self.have.checked_sub(HEADER_BYTES) {
                None => &mut self.header[self.have..],
                Some(of_prefix) => &mut self.prefix[of_prefix..],
            };
            let got = transport.try_recv(from, rest)?;
            if got == 0 {
                return Ok(None);
            }
            self.have += got;
        }
        let lost = |error: WireError| Error::Lost { peer: from, reason: error.to_string() };
        let header = FrameHeader::from_bytes(&self.header).map_err(lost)?;
        if header.epoch != transport.epoch() {
            return Err(lost(WireError::Epoch { theirs: header.epoch, ours: transport.epoch() }));
        }
        Ok(Some((header, &self.prefix)))
    }

    /// Takes the head off the stream: the bytes that follow are the payload.
    pub fn consume(&mut self) {
        self.have = 0;
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller slices N bytes of a fixed header")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_header_has_the_documented_bytes() {
        let header = FrameHeader { channel: 0x0102_0304, epoch: 5, len: 6 };
        let mut golden = [0; HEADER_BYTES];
        golden[..20].copy_from_slice(&[b'P', b'C', 1, 1, 4, 3, 2, 1, 5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0]);
        assert_eq!(header.to_bytes(), golden);
    }

    #[test]
    fn a_header_with_one_wrong_byte_is_refused_with_the_reason() {
        let good = FrameHeader { channel: 1, epoch: 2, len: 3 }.to_bytes();
        for (at, value, expect) in [
            (0, 0, "magic"),
            (2, 9, "version 9"),
            (3, 9, "unknown kind 9"),
            (19, 0xff, "over the limit"),
            (23, 1, "reserved"),
        ] {
            let mut bad = good;
            bad[at] = value;
            let error = FrameHeader::from_bytes(&bad).expect_err("a wrong byte").to_string();
            assert!(error.contains(expect), "byte {at}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_header_survives_the_wire(channel: u32, epoch: u64, len in 0..=PAYLOAD_LIMIT as u32) {
            let header = FrameHeader { channel, epoch, len };
            prop_assert_eq!(FrameHeader::from_bytes(&header.to_bytes()), Ok(header));
        }

        #[test]
        fn arbitrary_bytes_are_a_valid_header_or_an_error(bytes: [u8; HEADER_BYTES]) {
            if let Ok(header) = FrameHeader::from_bytes(&bytes) {
                prop_assert!(header.len as usize <= PAYLOAD_LIMIT);
                prop_assert_eq!(header.to_bytes(), bytes);
            }
        }
    }
}
