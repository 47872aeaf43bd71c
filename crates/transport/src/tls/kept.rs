//! Encrypted bytes on their way: what is still to be sent, and what was sent and may have to be sent again.
//!
//! A TCP connection that breaks takes with it what it has not delivered. The bytes are therefore kept until
//! the other side's operating system has acknowledged them, which bounds them by the socket's send buffer.

use std::io::{self, IoSlice, Write};

/// Encrypted bytes from the first one that may be needed again.
#[derive(Debug, Default)]
pub(super) struct Kept {
    bytes: Vec<u8>,
    /// Before it stands what is not needed any more.
    start: usize,
    /// From here on nothing has been sent.
    sent: usize,
    /// Where `start` is in all that the connection has ever sent.
    offset: u64,
}

impl Kept {
    /// What is still to be sent.
    pub(super) fn unsent(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Counts `count` more bytes as sent.
    pub(super) fn advance(&mut self, count: usize) {
        self.sent += count;
    }

    /// How many bytes are kept that have been sent.
    pub(super) fn sent_len(&self) -> usize {
        self.sent - self.start
    }

    /// How many bytes of the connection have arrived, when the last `unacknowledged` ones have not.
    pub(super) fn arrived(&self, unacknowledged: usize) -> u64 {
        self.offset + self.sent_len().saturating_sub(unacknowledged) as u64
    }

    /// Forgets what was sent, but for the last `unacknowledged` bytes.
    pub(super) fn forget(&mut self, unacknowledged: usize) {
        let done = self.sent_len().saturating_sub(unacknowledged);
        self.start += done;
        self.offset += done as u64;
        if self.start == self.bytes.len() {
            self.bytes.clear();
            (self.start, self.sent) = (0, 0);
        } else if self.start >= self.bytes.len() / 2 {
            // Each byte is moved at most once for each one that is forgotten.
            self.bytes.drain(..self.start);
            self.sent -= self.start;
            self.start = 0;
        }
    }

    /// Begins to send anew behind the first `arrived` bytes of the connection.
    ///
    /// # Errors
    /// In words, when those from there on are not kept, or have never been sent.
    pub(super) fn rewind(&mut self, arrived: u64) -> Result<(), String> {
        let sent = self.offset + self.sent_len() as u64;
        if !(self.offset..=sent).contains(&arrived) {
            let kept = self.offset;
            return Err(format!("{arrived} bytes have arrived, and it can go on from {kept} to {sent}"));
        }
        let again = usize::try_from(sent - arrived).expect("no longer than what is kept");
        self.sent -= again;
        // What has arrived is not needed any more.
        self.forget(0);
        Ok(())
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        Ok(parts.iter().map(|part| part.len()).sum())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(bytes: &[u8]) -> Kept {
        let mut kept = Kept::default();
        kept.write_all(bytes).expect("it takes everything");
        kept
    }

    #[test]
    fn what_has_not_arrived_is_sent_again() {
        let mut kept = filled(b"abcdefgh");
        kept.advance(6);
        kept.forget(4);
        assert_eq!((kept.unsent(), kept.sent_len()), (&b"gh"[..], 4), "a and b have arrived");
        kept.rewind(3).expect("c is kept");
        assert_eq!((kept.unsent(), kept.sent_len()), (&b"defgh"[..], 0));
        kept.advance(5);
        kept.forget(0);
        assert_eq!(kept.unsent(), b"");
        kept.rewind(8).expect("all has arrived");
        assert!(kept.rewind(7).expect_err("h is forgotten").contains("7 bytes have arrived"));
        assert!(kept.rewind(9).is_err(), "so many have never been sent");
    }

    #[test]
    fn it_stays_as_small_as_what_is_on_its_way() {
        let mut kept = Kept::default();
        for _ in 0..10_000 {
            kept.write_all(&[7; 1000]).expect("it takes everything");
            kept.advance(1000);
            kept.forget(2500);
        }
        assert_eq!(kept.sent_len(), 2500);
        assert!(kept.bytes.capacity() < 20_000, "{} bytes", kept.bytes.capacity());
        kept.rewind(10_000_000 - 2500).expect("that is kept");
        assert_eq!(kept.unsent().len(), 2500);
    }
}
