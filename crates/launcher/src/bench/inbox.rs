//! Where the ranks of a measurement report: a datagram socket in a folder that only this user can enter.
//!
//! A datagram is one result, whole or not at all, from as many senders as there are ranks.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::rank::Message;
use crate::credentials::private_folder;
use crate::error::Error;

/// After this long without a word, people look whether the program still runs.
const SILENCE: Duration = Duration::from_secs(5);

/// The largest datagram: a result is some 300 bytes, a schedule with its reason about as much.
const MESSAGE_BYTES: usize = 16 * 1024;

/// The receiving end.
#[derive(Debug)]
pub struct Inbox {
    socket: UnixDatagram,
    folder: TempDir,
}

/// What the inbox has.
#[derive(Debug)]
pub enum News {
    /// From a rank.
    Message(Message),
    /// Nothing for five seconds.
    Silence,
    /// The job is over.
    End,
}

impl Inbox {
    /// Opens one.
    ///
    /// # Errors
    /// [`Error::System`] if the folder or the socket cannot be made.
    pub fn open() -> Result<Self, Error> {
        let failed = |e: io::Error| system("cannot make the socket for results", &e);
        let folder = private_folder().map_err(failed)?;
        let socket = UnixDatagram::bind(folder.path().join("results")).map_err(failed)?;
        socket.set_read_timeout(Some(SILENCE)).map_err(failed)?;
        Ok(Inbox { socket, folder })
    }

    /// Where the ranks send to.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("results")
    }

    /// Waits for the next thing.
    ///
    /// # Errors
    /// [`Error::System`] if a message cannot be received or read.
    pub fn next(&self) -> Result<News, Error> {
        let mut buffer = [0; MESSAGE_BYTES];
        let since = Instant::now();
        let len = loop {
            match self.socket.recv(&mut buffer) {
                Ok(len) => break len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(News::Silence),
                Err(e) if e.kind() == io::ErrorKind::Interrupted && since.elapsed() < SILENCE => {}
                Err(e) => return Err(system("cannot receive a rank's results", &e)),
            }
        };
        if len == 0 {
            return Ok(News::End);
        }
        let message = serde_json::from_slice(&buffer[..len]);
        message.map(News::Message).map_err(|e| system("cannot read a rank's results", &e))
    }

    /// Has [`next`](Self::next) say, after all that was sent before, that the job is over.
    ///
    /// # Errors
    /// [`Error::System`] if the socket does not work.
    pub fn end(&self) -> Result<(), Error> {
        let socket = UnixDatagram::unbound().and_then(|socket| socket.send_to(&[], self.path()));
        socket.map(drop).map_err(|e| system("cannot end the receiving of results", &e))
    }
}

fn system(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::System { what: what.to_owned(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Schedule;

    #[test]
    fn messages_arrive_in_order_and_the_end_is_last() {
        let inbox = Inbox::open().expect("open");
        let socket = UnixDatagram::unbound().expect("a socket");
        for row in 0..3 {
            let message = Message::Explained { row, schedule: Schedule::default() };
            let text = serde_json::to_vec(&message).expect("JSON");
            socket.send_to(&text, inbox.path()).expect("sent");
        }
        inbox.end().expect("ended");
        for expected in 0..3 {
            let news = inbox.next();
            assert!(
                matches!(news, Ok(News::Message(Message::Explained { row, .. })) if row == expected),
                "{news:?}"
            );
        }
        assert!(matches!(inbox.next(), Ok(News::End)));
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let inbox = Inbox::open().expect("open");
        let socket = UnixDatagram::unbound().expect("a socket");
        socket.send_to(b"nonsense", inbox.path()).expect("sent");
        assert!(inbox.next().is_err());
    }
}
