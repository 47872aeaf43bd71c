//! What becomes of a session's bytes on their way: TLS, or nothing at all.
//!
//! A link over plain TCP begins as one over TLS does: both sides have shown their certificates before its data
//! connection [leaves TLS](Channel::leave_tls), and its control lane never does. From then on anybody on the way
//! can read and change what passes. What is left of TLS is its records, for the end of a TCP connection does not say
//! whether all has come:
//!
//! ```text
//! length (u32, little-endian; 0 ends the direction in order) | so many bytes
//! ```
//! A length is only counted down. No memory is set aside for it.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::ops::Range;

use rustls::pki_types::CertificateDer;

use super::kept::Kept;

/// What a link's data connection does for its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protection {
    /// TLS: nobody on the way can read or change it.
    Encrypted,
    /// None.
    Plain,
}

/// Bytes that wait to be sent, or to be read.
const LIMIT: usize = 128 * 1024;

/// Size of what stands before the bytes of a plain record.
const PREFIX_BYTES: usize = 4;

/// The two directions of a session.
pub(super) struct Channel {
    tls: rustls::Connection,
    plain: Option<Plain>,
}

/// Both directions without TLS.
struct Plain {
    outgoing: Vec<u8>,
    finished: bool,
    incoming: Box<[u8]>,
    unread: Range<usize>,
    /// What is missing of the record that is being read.
    left: usize,
    ended: bool,
    /// Whether the socket has ended.
    cut: bool,
}

impl Channel {
    /// Holds at most `limit` bytes that wait to be sent.
    pub(super) fn new(mut tls: rustls::Connection, limit: usize) -> Self {
        tls.set_buffer_limit(Some(limit));
        Self { tls, plain: None }
    }

    /// Goes on without TLS. Nothing that was sent in TLS may be on its way in either direction.
    pub(super) fn leave_tls(&mut self) {
        self.plain = Some(Plain::new());
    }

    /// Whether the handshake goes on.
    pub(super) fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// The other side's certificate, which has been verified.
    pub(super) fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.tls.peer_certificates()?.first()
    }

    /// Bytes that both sides of this session derive from its keys, and nobody else can.
    pub(super) fn export<T: AsMut<[u8]>>(&self, output: T, label: &[u8]) -> Result<T, rustls::Error> {
        self.tls.export_keying_material(output, label, None)
    }

    /// Takes what there is room for, to be sent.
    pub(super) fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.plain {
            Some(plain) => Ok(plain.take(parts)),
            None => self.tls.writer().write_vectored(parts),
        }
    }

    /// Ends this side's direction in order.
    pub(super) fn finish(&mut self) {
        match &mut self.plain {
            Some(plain) => plain.finish(),
            None => self.tls.send_close_notify(),
        }
    }

    /// Whether there is something to send.
    pub(super) fn wants_write(&self) -> bool {
        self.plain.as_ref().map_or_else(|| self.tls.wants_write(), |plain| !plain.outgoing.is_empty())
    }

    /// Hands out what is to be sent.
    pub(super) fn write_to(&mut self, kept: &mut Kept) -> io::Result<()> {
        match &mut self.plain {
            Some(plain) => {
                kept.write_all(&plain.outgoing)?;
                plain.outgoing.clear();
                Ok(())
            }
            None => self.tls.write_tls(kept).map(drop),
        }
    }

    /// Takes received bytes from `source`, as many as there is room for; none are its end.
    ///
    /// # Errors
    /// `InvalidData` when there is no room; else the source's.
    pub(super) fn read_from(&mut self, source: &mut dyn Read) -> io::Result<usize> {
        match &mut self.plain {
            Some(plain) => plain.read_from(source),
            None => self.tls.read_tls(source),
        }
    }

    /// Looks at what was taken, and says whether the other side has ended its direction in order.
    pub(super) fn process(&mut self) -> Result<bool, rustls::Error> {
        match &self.plain {
            Some(plain) => Ok(plain.is_ended()),
            None => Ok(self.tls.process_new_packets()?.peer_has_closed()),
        }
    }

    /// Copies received bytes into `into`, which must not be empty; none are the end in order.
    ///
    /// # Errors
    /// `WouldBlock` when there are none now, `UnexpectedEof` when the socket has ended out of order.
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.plain {
            Some(plain) => plain.read(into),
            None => self.tls.reader().read(into),
        }
    }
}

impl Plain {
    fn new() -> Self {
        Self {
            outgoing: Vec::new(),
            finished: false,
            incoming: vec![0; LIMIT].into_boxed_slice(),
            unread: 0..0,
            left: 0,
            ended: false,
            cut: false,
        }
    }

    fn take(&mut self, parts: &[IoSlice<'_>]) -> usize {
        let mut room = LIMIT.saturating_sub(self.outgoing.len() + PREFIX_BYTES);
        let len = room.min(parts.iter().map(|part| part.len()).sum());
        if len == 0 || self.finished {
            return 0;
        }
        room = len;
        let prefix = u32::try_from(len).expect("the limit is far below");
        self.outgoing.extend_from_slice(&prefix.to_le_bytes());
        for part in parts {
            let taken = &part[..part.len().min(room)];
            self.outgoing.extend_from_slice(taken);
            room -= taken.len();
        }
        len
    }

    fn finish(&mut self) {
        if !std::mem::replace(&mut self.finished, true) {
            self.outgoing.extend_from_slice(&[0; PREFIX_BYTES]);
        }
    }

    fn read_from(&mut self, source: &mut dyn Read) -> io::Result<usize> {
        if self.unread.start > 0 {
            self.incoming.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        let room = &mut self.incoming[self.unread.end..];
        if room.is_empty() {
            return Err(ErrorKind::InvalidData.into());
        }
        let count = source.read(room)?;
        self.cut |= count == 0;
        self.unread.end += count;
        Ok(count)
    }

    /// The length of the next record, if it has come.
    fn next_len(&self) -> Option<u32> {
        let prefix = self.incoming[self.unread.clone()].first_chunk::<PREFIX_BYTES>()?;
        Some(u32::from_le_bytes(*prefix))
    }

    fn is_ended(&self) -> bool {
        self.ended || (self.left == 0 && self.next_len() == Some(0))
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let nothing = if self.cut { ErrorKind::UnexpectedEof } else { ErrorKind::WouldBlock };
        if self.left == 0 && !self.ended {
            let len = self.next_len().ok_or(nothing)?;
            self.unread.start += PREFIX_BYTES;
            self.left = len as usize;
            self.ended = len == 0;
        }
        if self.ended {
            return Ok(0);
        }
        let count = self.left.min(self.unread.len()).min(into.len());
        if count == 0 {
            return Err(nothing.into());
        }
        into[..count].copy_from_slice(&self.incoming[self.unread.start..][..count]);
        self.unread.start += count;
        self.left -= count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything that can be read, and what ends it.
    fn read_all(plain: &mut Plain, step: usize) -> (Vec<u8>, Option<ErrorKind>) {
        let (mut all, mut buffer) = (Vec::new(), vec![0; step]);
        loop {
            match plain.read(&mut buffer) {
                Ok(0) => return (all, None),
                Ok(count) => all.extend_from_slice(&buffer[..count]),
                Err(error) => return (all, Some(error.kind())),
            }
        }
    }

    fn sent(parts: &[&[u8]]) -> Vec<u8> {
        let mut plain = Plain::new();
        let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        assert_eq!(plain.take(&slices), parts.iter().map(|part| part.len()).sum::<usize>());
        plain.finish();
        plain.outgoing
    }

    #[test]
    fn no_more_is_taken_than_there_is_room_for() {
        let mut plain = Plain::new();
        let long = vec![7; LIMIT];
        assert_eq!(plain.take(&[]), 0);
        assert_eq!(plain.take(&[IoSlice::new(b"head"), IoSlice::new(&long)]), LIMIT - PREFIX_BYTES);
        assert_eq!((plain.take(&[IoSlice::new(&long)]), plain.outgoing.len()), (0, LIMIT));
        plain.finish();
        assert_eq!(plain.take(&[IoSlice::new(b"late")]), 0, "its end has been said");
    }

    #[test]
    fn an_end_that_was_not_said_is_a_cut() {
        let bytes = sent(&[b"some", b"thing"]);
        for len in 0..bytes.len() {
            let mut plain = Plain::new();
            plain.read_from(&mut &bytes[..len]).expect("there is room");
            assert!(!plain.is_ended(), "{len} bytes");
            assert_eq!(
                read_all(&mut plain, 3).1,
                Some(if len == 0 { ErrorKind::UnexpectedEof } else { ErrorKind::WouldBlock })
            );
            plain.read_from(&mut io::empty()).expect("there is room");
            assert_eq!(read_all(&mut plain, 3).1, Some(ErrorKind::UnexpectedEof), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn what_was_sent_is_read_however_it_is_cut(
            records in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 0..20),
            pieces in prop::collection::vec(1_usize..40, 1..20),
            step in 1_usize..60,
        ) {
            let mut sender = Plain::new();
            for record in &records {
                prop_assert_eq!(sender.take(&[IoSlice::new(record)]), record.len());
            }
            sender.finish();
            let (mut rest, mut got, mut end) = (&sender.outgoing[..], Vec::new(), Some(ErrorKind::WouldBlock));
            let mut receiver = Plain::new();
            for piece in pieces.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*piece).min(rest.len()));
                rest = later;
                receiver.read_from(&mut &now[..]).expect("there is room");
                let (more, why) = read_all(&mut receiver, step);
                got.extend(more);
                end = why;
            }
            prop_assert_eq!((got, end, receiver.is_ended()), (records.concat(), None, true));
        }

        #[test]
        fn any_bytes_are_records_or_wait_for_more(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut plain = Plain::new();
            plain.read_from(&mut &bytes[..]).expect("there is room");
            let (got, _) = read_all(&mut plain, 7);
            prop_assert!(got.len() <= bytes.len());
        }
    }
}
