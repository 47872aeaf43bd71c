//! TLS on a socket that never blocks.
//!
//! [`Session`] is rustls with bounded buffers. Nothing in here waits: whoever drives it, the caller's thread
//! or a task, knows how to wait for its socket.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::endpoint::SILENCE_LIMIT;
use crate::close::{self, with_details};

/// Encrypted bytes that may wait for the socket: what one call encrypts before it sends. Eight records, so
/// that a system call moves many and they are still in the cache.
const UNSENT_LIMIT: usize = 128 * 1024;

/// What one read takes from the socket, of messages and of data. rustls by itself reads 4 KiB at a time, which is
/// four system calls for a full record.
const READ_BYTES: [usize; 2] = [4 * 1024, 128 * 1024];

/// A TLS connection without its socket.
pub(super) struct Session {
    tls: rustls::Connection,
    /// Bytes read from the socket; made at the first read after the handshake.
    ahead: Box<[u8]>,
    /// How many at a time.
    read_bytes: usize,
    /// Those of `ahead` that rustls has not got yet.
    unread: Range<usize>,
    /// What broke the receiving direction.
    fault: Option<Fault>,
}

/// What a look for received bytes has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// This many.
    Bytes(usize),
    /// None now.
    Nothing,
    /// The other side has ended its direction in order, and all before it has been read.
    End,
}

/// What breaks a connection.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fault {
    /// The other side's bytes ended without TLS's own end, so anything may be missing.
    Cut,
    /// The socket failed.
    Socket(ErrorKind, String),
    /// What the other side sent is not TLS, not authentic, or not allowed.
    Tls(rustls::Error),
}

/// A socket that does not block, as the caller's thread or a task has it.
pub(super) enum Socket<'a> {
    /// Any file descriptor of a socket in non-blocking mode.
    Plain(BorrowedFd<'a>),
    /// One whose readiness tokio keeps.
    Tokio(&'a TcpStream),
}

impl Session {
    /// The dialling side, which wants to talk to `name`.
    pub(super) fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, Fault> {
        Ok(Self::new(ClientConnection::new(config, name)?.into()))
    }

    /// The accepting side.
    pub(super) fn server(config: Arc<ServerConfig>) -> Result<Self, Fault> {
        Ok(Self::new(ServerConnection::new(config)?.into()))
    }

    fn new(mut tls: rustls::Connection) -> Self {
        tls.set_buffer_limit(Some(UNSENT_LIMIT));
        Self { tls, ahead: Box::default(), read_bytes: READ_BYTES[0], unread: 0..0, fault: None }
    }

    /// Takes more at a time from the socket: what comes is not a message now and then.
    pub(super) fn expect_much(&mut self) {
        self.read_bytes = READ_BYTES[1];
    }

    /// Whether the handshake goes on.
    pub(super) fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// The other side's certificate, which has been verified.
    pub(super) fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.tls.peer_certificates()?.first()
    }

    /// Takes the next bytes of the handshake from the socket; `false` when there are none now.
    pub(super) fn advance(&mut self, socket: &mut Socket<'_>) -> Result<bool, Fault> {
        match self.tls.read_tls(socket) {
            Ok(0) => return Err(Fault::Cut),
            Ok(_) => {}
            Err(error) if is_momentary(&error) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.tls.process_new_packets()?;
        Ok(true)
    }

    /// Encrypts and sends as much of `parts`, in order, as there is room for; returns how much.
    pub(super) fn send(&mut self, socket: &mut Socket<'_>, parts: &[IoSlice<'_>]) -> Result<usize, Fault> {
        /// The parts that are passed to rustls at a time: a header, a payload, and room.
        const AT_A_TIME: usize = 4;
        let mut taken = 0;
        for parts in parts.chunks(AT_A_TIME) {
            let mut copy = [IoSlice::new(&[]); AT_A_TIME];
            copy[..parts.len()].copy_from_slice(parts);
            let mut rest = &mut copy[..parts.len()];
            loop {
                let count = self.tls.writer().write_vectored(rest)?;
                taken += count;
                IoSlice::advance_slices(&mut rest, count);
                let all_sent = self.flush(socket)?;
                if rest.is_empty() {
                    break;
                }
                if count == 0 && !all_sent {
                    return Ok(taken);
                }
            }
        }
        Ok(taken)
    }

    /// Sends what is encrypted already; `false` when the socket has no room for all of it.
    pub(super) fn flush(&mut self, socket: &mut Socket<'_>) -> Result<bool, Fault> {
        while self.tls.wants_write() {
            match self.tls.write_tls(socket) {
                Ok(_) => {}
                Err(error) if is_momentary(&error) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Whether something is encrypted and not sent.
    pub(super) fn has_unsent(&self) -> bool {
        self.tls.wants_write()
    }

    /// Ends this side's direction in order; [`flush`](Self::flush) then sends the end.
    pub(super) fn finish(&mut self) {
        self.tls.send_close_notify();
    }

    /// Decrypts received bytes into `into`, which must not be empty, until it is full or there are no more.
    pub(super) fn receive(&mut self, socket: &mut Socket<'_>, into: &mut [u8]) -> Result<Received, Fault> {
        let mut got = 0;
        let outcome = loop {
            match self.tls.reader().read(&mut into[got..]) {
                Ok(0) => break Ok(Received::End),
                Ok(count) => got += count,
                Err(error) if is_momentary(&error) => match self.read_more(socket) {
                    Ok(true) => {}
                    Ok(false) => break Ok(Received::Nothing),
                    Err(fault) => break Err(fault),
                },
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break Err(Fault::Cut),
                Err(error) => break Err(error.into()),
            }
            if got == into.len() {
                break Ok(Received::Nothing);
            }
        };
        // Whatever ends the bytes is found again by the next call.
        if got > 0 { Ok(Received::Bytes(got)) } else { outcome }
    }

    /// Gives rustls more bytes; `false` when there are none now.
    fn read_more(&mut self, socket: &mut Socket<'_>) -> Result<bool, Fault> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        let more = self.try_read_more(socket);
        if let Err(fault) = &more {
            self.fault = Some(fault.clone());
            // An alert, if rustls has one to say.
            let _ = self.flush(socket);
        }
        more
    }

    fn try_read_more(&mut self, socket: &mut Socket<'_>) -> Result<bool, Fault> {
        if self.unread.is_empty() {
            if self.ahead.len() != self.read_bytes {
                self.ahead = vec![0; self.read_bytes].into_boxed_slice();
            }
            match socket.read(&mut self.ahead) {
                Ok(count) => self.unread = 0..count,
                Err(error) if is_momentary(&error) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        self.feed()?;
        self.tls.process_new_packets()?;
        if self.tls.wants_write() {
            // New keys were asked for.
            self.flush(socket)?;
        }
        Ok(true)
    }
}

impl Session {
    /// Fills rustls's buffer, which takes a little more than a record. As long as a part of the next one is in it, it
    /// takes as much as there is room for; an empty one is made smaller by rustls, and grows by 4 KiB at a time.
    fn feed(&mut self) -> Result<(), Fault> {
        let mut rest = &self.ahead[self.unread.clone()];
        let mut fed = false;
        loop {
            match self.tls.read_tls(&mut rest) {
                // The end of the socket's bytes: rustls knows whether that is in order.
                Ok(0) => break,
                Ok(_) => fed = true,
                Err(error) if fed && error.kind() == ErrorKind::InvalidData => break,
                Err(error) => return Err(error.into()),
            }
            if rest.is_empty() {
                break;
            }
        }
        self.unread.start = self.unread.end - rest.len();
        Ok(())
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("unread", &self.unread)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

fn is_momentary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl Read for Socket<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Plain(socket) => Ok(rustix::io::read(socket, into)?),
            Socket::Tokio(socket) => socket.try_read(into),
        }
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        // Not writev: a program that has not turned SIGPIPE off must not die of a peer that went away.
        let send = |socket: BorrowedFd<'_>| -> io::Result<usize> {
            Ok(sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?)
        };
        match self {
            Socket::Plain(socket) => send(*socket),
            Socket::Tokio(socket) => socket.try_io(Interest::WRITABLE, || send(socket.as_fd())),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Fault {
    /// What happened, in words. "It" is the other side.
    pub(super) fn in_words(&self) -> String {
        match self {
            Fault::Cut => "its connection ended without a goodbye".to_owned(),
            Fault::Socket(ErrorKind::TimedOut, _) => no_answer(),
            Fault::Socket(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe, _) => {
                "its end of the connection is gone".to_owned()
            }
            Fault::Socket(_, reason) => format!("the socket failed: {reason}"),
            Fault::Tls(error) => tls_in_words(error),
        }
    }
}

/// What is said about a peer that has been silent for too long.
pub(super) fn no_answer() -> String {
    format!("no answer for {} s", SILENCE_LIMIT.as_secs())
}

fn tls_in_words(error: &rustls::Error) -> String {
    use rustls::Error::*;
    let cause = match error {
        AlertReceived(alert) => close::its_refusal(u8::from(*alert)),
        NoCertificatesPresented => close::our_refusal(close::CERTIFICATE_REQUIRED),
        InvalidCertificate(reason) => close::our_refusal(AlertDescription::from(reason.clone()).into()),
        NoApplicationProtocol => close::our_refusal(close::NO_APPLICATION_PROTOCOL),
        PeerIncompatible(_) => close::our_refusal(u8::from(AlertDescription::ProtocolVersion)),
        InvalidMessage(_) => "it does not speak TLS",
        DecryptError => "it sent a TLS record that is not authentic",
        _ => "it broke the rules of TLS",
    };
    with_details(cause, error.to_string().as_bytes())
}

impl From<rustls::Error> for Fault {
    fn from(error: rustls::Error) -> Self {
        Fault::Tls(error)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Fault::Socket(error.kind(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::credentials;
    use crate::identity::JobAuthority;

    const ALPN: &[u8] = b"test";

    struct End {
        session: Session,
        socket: UnixStream,
    }

    impl End {
        fn send(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
            self.session.send(&mut Socket::Plain(self.socket.as_fd()), &[IoSlice::new(bytes)])
        }

        fn receive(&mut self, into: &mut [u8]) -> Result<Received, Fault> {
            self.session.receive(&mut Socket::Plain(self.socket.as_fd()), into)
        }

        fn flush(&mut self) -> Result<bool, Fault> {
            self.session.flush(&mut Socket::Plain(self.socket.as_fd()))
        }
    }

    /// A client and a server that have shaken hands.
    fn pair() -> (End, End) {
        let authority = JobAuthority::new("job").expect("a name");
        let identity =
            |member: &str| authority.issue(member, std::time::Duration::from_secs(3600)).expect("a name");
        let (a, b) = (identity("a"), identity("b"));
        let name = a.server_name("b").try_into().expect("a name");
        let client = credentials::client_config(&a, ALPN).expect("a good identity");
        let server = credentials::server_config(&b, ALPN).expect("a good identity");
        let sockets = UnixStream::pair().expect("sockets");
        let end = |session: Result<Session, Fault>, socket: UnixStream| {
            socket.set_nonblocking(true).expect("set");
            End { session: session.expect("good settings"), socket }
        };
        let mut one = end(Session::client(Arc::new(client), name), sockets.0);
        let mut other = end(Session::server(Arc::new(server)), sockets.1);
        while one.session.is_handshaking() || other.session.is_handshaking() {
            for end in [&mut one, &mut other] {
                assert!(end.flush().expect("the socket has room"));
                let mut socket = Socket::Plain(end.socket.as_fd());
                end.session.advance(&mut socket).expect("both are of one job");
                assert!(end.flush().expect("the socket has room"));
            }
        }
        (one, other)
    }

    #[test]
    fn what_is_sent_arrives_and_ends_in_order() {
        let (mut one, mut other) = pair();
        let bytes: Vec<u8> = (0..100_000_u32).map(|at| (at / 7) as u8).collect();
        assert_eq!(other.receive(&mut [0; 8]), Ok(Received::Nothing));
        let (mut sent, mut read, mut buffer) = (0, Vec::new(), vec![0; 1000]);
        while read.len() < bytes.len() {
            sent += one.send(&bytes[sent..]).expect("it is open");
            if let Received::Bytes(count) = other.receive(&mut buffer).expect("it is open") {
                read.extend_from_slice(&buffer[..count]);
            }
        }
        assert!(read == bytes);
        assert_eq!(other.receive(&mut buffer), Ok(Received::Nothing));
        one.session.finish();
        assert_eq!(one.flush(), Ok(true));
        for _ in 0..2 {
            assert_eq!(other.receive(&mut buffer), Ok(Received::End));
        }
    }

    #[test]
    fn bytes_that_end_without_tlss_own_end_are_cut_off() {
        let (mut one, mut other) = pair();
        assert_eq!(one.send(b"the beginning"), Ok(13));
        drop(one);
        let mut buffer = [0; 100];
        assert_eq!(other.receive(&mut buffer), Ok(Received::Bytes(13)));
        for _ in 0..2 {
            assert_eq!(other.receive(&mut buffer), Err(Fault::Cut));
        }
    }

    #[test]
    fn what_waits_for_a_slow_receiver_is_bounded() {
        let (mut one, other) = pair();
        let (block, mut accepted) = (vec![1; 1 << 20], 0);
        loop {
            match one.send(&block).expect("it is open") {
                0 => break,
                count => accepted += count,
            }
            assert!(accepted < 64 << 20, "there is no end of it");
        }
        assert!(one.session.has_unsent());
        // Everything that is in the socket, which is a little longer than what it stands for.
        let mut on_the_way = 0;
        let mut buffer = vec![0; 1 << 20];
        while let Ok(count) = (&other.socket).read(&mut buffer) {
            on_the_way += count;
        }
        assert!(accepted <= on_the_way + UNSENT_LIMIT, "{accepted} accepted, {on_the_way} on the way");
        assert_eq!(one.flush(), Ok(true), "there is room now");
    }
}
