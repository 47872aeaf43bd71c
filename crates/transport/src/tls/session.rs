//! TLS on a socket that never blocks.
//!
//! [`Session`] is rustls with bounded buffers. Nothing in here waits: whoever drives it, the caller's thread
//! or a task, knows how to wait for its socket.
//!
//! The socket underneath may be exchanged when it breaks ([`mend`](super::mend)): TLS does not notice, since
//! the encrypted bytes go on where they have stopped.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, sendmsg, shutdown};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::channel::Channel;
use super::endpoint::SILENCE_LIMIT;
use super::kept::Kept;
use super::unacknowledged::{unacknowledged, unsent};
use crate::close::{self, with_details};

/// Encrypted bytes that may wait for the socket: what one call encrypts before it sends. Eight records, so
/// that a system call moves many and they are still in the cache.
const UNSENT_LIMIT: usize = 128 * 1024;

/// What one read takes from the socket, of messages and of data. rustls by itself reads 4 KiB at a time, which is
/// four system calls for a full record.
const READ_BYTES: [usize; 2] = [4 * 1024, 128 * 1024];

/// How many sent bytes are kept before the first look at which of them have arrived.
const KEPT_STEP: usize = 256 * 1024;

/// The most bytes that are saved from a broken socket: more than any receive buffer of usual settings holds.
const SAVED_LIMIT: usize = 64 * 1024 * 1024;

/// Names what a session can be resumed by, in the derivation from its keys (RFC 8446, 7.5).
const RESUMPTION_LABEL: &[u8] = b"EXPORTER-paceline-resumption";

/// What both sides of a session know it by, and nobody else.
pub(super) type SessionId = [u8; 16];

/// A TLS connection without its socket.
pub(super) struct Session {
    channel: Channel,
    /// Encrypted bytes to send, and those that may have to be sent again.
    kept: Kept,
    /// Encrypted bytes that have been received.
    received: u64,
    /// Whether the other side has ended its direction in order.
    peer_has_closed: bool,
    line: Line,
    /// Told when the socket breaks, of a session that can go on over another one.
    on_break: Option<Arc<Notify>>,
    /// Bytes read from the socket; made at the first read after the handshake.
    ahead: Box<[u8]>,
    /// How many at a time.
    read_bytes: usize,
    /// Those of `ahead` that rustls has not got yet.
    unread: Range<usize>,
    /// What broke the receiving direction.
    fault: Option<Fault>,
}

/// The state of the socket underneath.
#[derive(Debug)]
enum Line {
    Up,
    /// It broke, and another one may take its place.
    Broken(Fault),
    /// It broke for good.
    Dead(Fault),
}

/// How far what was sent has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// So many encrypted bytes have arrived at the other side's operating system.
    pub(super) arrived: u64,
    /// Whether the network has more. What waits for the other side's room is not with the network.
    pub(super) on_its_way: bool,
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

    fn new(tls: rustls::Connection) -> Self {
        Self {
            channel: Channel::new(tls, UNSENT_LIMIT),
            kept: Kept::default(),
            received: 0,
            peer_has_closed: false,
            line: Line::Up,
            on_break: None,
            ahead: Box::default(),
            read_bytes: READ_BYTES[0],
            unread: 0..0,
            fault: None,
        }
    }

    /// Takes more at a time from the socket: what comes is not a message now and then.
    pub(super) fn expect_much(&mut self) {
        self.read_bytes = READ_BYTES[1];
    }

    /// Goes on without TLS, when all that was said in it has arrived on both sides.
    ///
    /// # Errors
    /// That this is not so, as far as it shows here.
    pub(super) fn leave_tls(&mut self) -> Result<(), Fault> {
        if self.has_unsent() || !self.unread.is_empty() {
            return Err(rustls::Error::General("there is more to say in TLS".to_owned()).into());
        }
        self.channel.leave_tls();
        Ok(())
    }

    /// Whether the handshake goes on.
    pub(super) fn is_handshaking(&self) -> bool {
        self.channel.is_handshaking()
    }

    /// The other side's certificate, which has been verified.
    pub(super) fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.channel.certificate()
    }

    /// Takes the next bytes of the handshake from the socket; `false` when there are none now.
    pub(super) fn advance(&mut self, socket: &mut Socket<'_>) -> Result<bool, Fault> {
        match self.channel.read_from(socket) {
            Ok(0) => return Err(Fault::Cut),
            Ok(count) => self.received += count as u64,
            Err(error) if is_momentary(&error) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.process()?;
        Ok(true)
    }

    /// Encrypts and sends as much of `parts`, in order, as there is room for; returns how much.
    pub(super) fn send(&mut self, socket: &mut Socket<'_>, parts: &[IoSlice<'_>]) -> Result<usize, Fault> {
        /// The parts that are passed to rustls at a time: a header, a payload, and room.
        const AT_A_TIME: usize = 4;
        if !self.flush(socket)? {
            return Ok(0);
        }
        let mut taken = 0;
        for parts in parts.chunks(AT_A_TIME) {
            let mut copy = [IoSlice::new(&[]); AT_A_TIME];
            copy[..parts.len()].copy_from_slice(parts);
            let mut rest = &mut copy[..parts.len()];
            loop {
                let count = self.channel.write_vectored(rest)?;
                taken += count;
                IoSlice::advance_slices(&mut rest, count);
                let all_sent = self.flush(socket)?;
                if !all_sent {
                    return Ok(taken);
                }
                if rest.is_empty() {
                    break;
                }
            }
        }
        Ok(taken)
    }

    /// Sends what is encrypted already; `false` when the socket has no room for all of it, or is broken.
    pub(super) fn flush(&mut self, socket: &mut Socket<'_>) -> Result<bool, Fault> {
        match &self.line {
            Line::Up => {}
            Line::Broken(_) => return Ok(false),
            Line::Dead(fault) => return Err(fault.clone()),
        }
        loop {
            if self.kept.unsent().is_empty() {
                if !self.channel.wants_write() {
                    return Ok(true);
                }
                self.forget_arrived(socket);
                self.channel.write_to(&mut self.kept)?;
            }
            match socket.write(self.kept.unsent()) {
                Ok(count) => self.kept.advance(count),
                Err(error) if is_momentary(&error) => return Ok(false),
                Err(error) => {
                    self.break_off(socket, error.into())?;
                    return Ok(false);
                }
            }
        }
    }

    /// Forgets sent bytes that have arrived, when there are many.
    fn forget_arrived(&mut self, socket: &Socket<'_>) {
        if self.kept.sent_len() >= KEPT_STEP
            && let Ok(count) = unacknowledged(socket.as_fd())
        {
            self.kept.forget(count);
        }
    }

    /// Whether something is encrypted and not sent.
    pub(super) fn has_unsent(&self) -> bool {
        self.channel.wants_write() || !self.kept.unsent().is_empty()
    }

    /// Ends this side's direction in order; [`flush`](Self::flush) then sends the end.
    pub(super) fn finish(&mut self) {
        self.channel.finish();
    }

    /// Decrypts received bytes into `into`, which must not be empty, until it is full or there are no more.
    pub(super) fn receive(&mut self, socket: &mut Socket<'_>, into: &mut [u8]) -> Result<Received, Fault> {
        let mut got = 0;
        let outcome = loop {
            match self.channel.read(&mut into[got..]) {
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
        if self.unread.is_empty() && !self.read(socket)? {
            return Ok(false);
        }
        self.feed()?;
        self.process()?;
        if self.channel.wants_write() {
            // New keys were asked for.
            self.flush(socket)?;
        }
        Ok(true)
    }

    /// Reads from the socket; `false` when there is nothing now. No bytes at all are the socket's end.
    fn read(&mut self, socket: &mut Socket<'_>) -> Result<bool, Fault> {
        match &self.line {
            Line::Up => {}
            Line::Broken(_) => return Ok(false),
            Line::Dead(fault) => return Err(fault.clone()),
        }
        if self.ahead.len() != self.read_bytes {
            (self.unread, self.ahead) = (0..0, vec![0; self.read_bytes].into_boxed_slice());
        }
        let fault = match socket.read(&mut self.ahead) {
            // rustls must not see an end that may be mended.
            Ok(0) if self.on_break.is_some() && !self.peer_has_closed => Fault::Cut,
            Ok(count) => {
                self.unread = 0..count;
                self.received += count as u64;
                return Ok(true);
            }
            Err(error) if is_momentary(&error) => return Ok(false),
            Err(error) => error.into(),
        };
        self.break_off(socket, fault)?;
        Ok(!self.unread.is_empty())
    }

    fn process(&mut self) -> Result<(), Fault> {
        self.peer_has_closed |= self.channel.process()?;
        Ok(())
    }
}

/// Another socket for the same session.
impl Session {
    /// What both sides know this session by.
    pub(super) fn id(&self) -> Result<SessionId, Fault> {
        Ok(self.channel.export(SessionId::default(), RESUMPTION_LABEL)?)
    }

    /// From now on a socket that breaks is not the end: `on_break` is told, and until another socket is there
    /// nothing can be sent or received.
    pub(super) fn outlive_sockets(&mut self, on_break: Arc<Notify>) {
        self.on_break = Some(on_break);
    }

    /// How far what was sent has got; `None` while the socket is broken, or is not of TCP.
    pub(super) fn progress(&self, socket: BorrowedFd<'_>) -> Option<Progress> {
        let Line::Up = self.line else { return None };
        let (unacknowledged, unsent) = (unacknowledged(socket).ok()?, unsent(socket).ok()?);
        Some(Progress { arrived: self.kept.arrived(unacknowledged), on_its_way: unacknowledged > unsent })
    }

    /// How the socket broke, while another one may take its place.
    pub(super) fn broken(&self) -> Option<&Fault> {
        if let Line::Broken(fault) = &self.line { Some(fault) } else { None }
    }

    /// Accepts that the socket is broken, where that can be mended.
    fn break_off(&mut self, socket: &Socket<'_>, fault: Fault) -> Result<(), Fault> {
        if self.on_break.is_none() {
            return Err(fault);
        }
        if !fault.can_be_mended() {
            // The operating system says so once.
            self.line = Line::Dead(fault.clone());
            return Err(fault);
        }
        self.cut(socket.as_fd(), fault);
        Ok(())
    }

    /// Gives the present socket up, unless it is broken already. Afterwards the count of what has arrived is
    /// final: whatever else comes is not acknowledged, so that the other side still has it.
    pub(super) fn cut(&mut self, socket: BorrowedFd<'_>, fault: Fault) {
        if !matches!(self.line, Line::Up) {
            return;
        }
        // Before the rest is read: from then on the operating system acknowledges nothing more. Fails when the
        // connection is gone, and then it does not either.
        let _ = shutdown(socket, Shutdown::Both);
        let mut saved = self.ahead[self.unread.clone()].to_vec();
        let first = saved.len();
        loop {
            let filled = saved.len();
            if filled > SAVED_LIMIT {
                // The other side has forgotten the rest, will say so, and the connection ends.
                break;
            }
            saved.resize(filled + READ_BYTES[1], 0);
            let read = rustix::io::read(socket, &mut saved[filled..]);
            saved.truncate(filled + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(1..) | Err(rustix::io::Errno::INTR) => {}
                Ok(0) | Err(_) => break,
            }
        }
        self.received += (saved.len() - first) as u64;
        (self.unread, self.ahead) = (0..saved.len(), saved.into_boxed_slice());
        self.line = Line::Broken(fault);
        if let Some(on_break) = &self.on_break {
            on_break.notify_one();
        }
    }

    /// How many encrypted bytes of the other side have arrived, over all sockets.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Goes on behind the first `arrived` bytes that this side has sent.
    ///
    /// # Errors
    /// In words, when that cannot be.
    pub(super) fn rewind(&mut self, arrived: u64) -> Result<(), String> {
        self.kept.rewind(arrived)
    }

    /// Goes on over the socket that is passed from now on; `false` when the session has been given up.
    pub(super) fn resume(&mut self) -> bool {
        if let Line::Broken(_) = self.line {
            self.line = Line::Up;
        }
        matches!(self.line, Line::Up)
    }

    /// Has a broken socket be the end, after all.
    pub(super) fn give_up(&mut self) {
        if let Line::Broken(fault) = &self.line {
            self.line = Line::Dead(fault.clone());
        }
    }
}

impl Session {
    /// Fills rustls's buffer, which takes a little more than a record. As long as a part of the next one is in it, it
    /// takes as much as there is room for; an empty one is made smaller by rustls, and grows by 4 KiB at a time.
    fn feed(&mut self) -> Result<(), Fault> {
        let mut rest = &self.ahead[self.unread.clone()];
        let mut fed = false;
        loop {
            match self.channel.read_from(&mut rest) {
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
            .field("line", &self.line)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

fn is_momentary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl AsFd for Socket<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Plain(socket) => *socket,
            Socket::Tokio(socket) => socket.as_fd(),
        }
    }
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
    /// The other side has shown no life for too long.
    pub(super) fn silence() -> Self {
        Fault::Socket(ErrorKind::TimedOut, String::new())
    }

    /// Whether the connection may go on over another socket. Silence is no such fault: another socket would be
    /// silent too.
    fn can_be_mended(&self) -> bool {
        use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
        match self {
            Fault::Cut => true,
            Fault::Socket(kind, _) => {
                matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected)
            }
            Fault::Tls(_) => false,
        }
    }

    /// What happened, in words. "It" is the other side.
    pub(super) fn in_words(&self) -> String {
        match self {
            Fault::Cut => "its connection ended without a goodbye".to_owned(),
            Fault::Socket(ErrorKind::TimedOut, _) => no_answer(),
            Fault::Socket(_, _) if self.can_be_mended() => "its end of the connection is gone".to_owned(),
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

    /// Another socket for both, after what has arrived has been told.
    fn reconnect(one: &mut End, other: &mut End) {
        for end in [&mut *one, &mut *other] {
            end.session.cut(end.socket.as_fd(), Fault::Cut);
        }
        one.session.rewind(other.session.received()).expect("it is kept");
        other.session.rewind(one.session.received()).expect("it is kept");
        let sockets = UnixStream::pair().expect("sockets");
        for (end, socket) in [(one, sockets.0), (other, sockets.1)] {
            socket.set_nonblocking(true).expect("set");
            end.socket = socket;
            assert!(end.session.resume());
        }
    }

    #[test]
    fn bytes_arrive_once_and_in_order_over_a_row_of_broken_sockets() {
        let (mut one, mut other) = pair();
        assert_eq!(one.session.id(), other.session.id());
        let broken = Arc::new(Notify::new());
        for end in [&mut one, &mut other] {
            end.session.outlive_sockets(broken.clone());
        }
        let bytes: Vec<u8> = (0..5_000_000_u32).map(|at| (at % 251) as u8).collect();
        let (mut sent, mut read, mut buffer) = (0, Vec::new(), vec![0; 50_000]);
        let mut turn = 0;
        while read.len() < bytes.len() {
            turn += 1;
            sent += one.send(&bytes[sent..]).expect("it can be mended");
            one.flush().expect("it can be mended");
            match turn % 10 {
                // At any point of a record, with bytes on their way.
                3 => reconnect(&mut one, &mut other),
                // Whoever finds out first, by receiving or by sending.
                6 => shutdown(&other.socket, Shutdown::Both).expect("it is there"),
                8 => {
                    shutdown(&one.socket, Shutdown::Both).expect("it is there");
                    assert_eq!(one.receive(&mut buffer), Ok(Received::Nothing));
                    assert_eq!(one.session.broken(), Some(&Fault::Cut));
                    assert_eq!(one.send(b"x"), Ok(0), "nothing is taken meanwhile");
                }
                _ => {}
            }
            if let Received::Bytes(count) = other.receive(&mut buffer).expect("it can be mended") {
                read.extend_from_slice(&buffer[..count]);
            }
            if one.session.broken().is_some() || other.session.broken().is_some() {
                reconnect(&mut one, &mut other);
            }
        }
        assert!(read == bytes);
        one.session.finish();
        assert_eq!(one.flush(), Ok(true));
        assert_eq!(other.receive(&mut buffer), Ok(Received::End), "an end in order is no break");
    }

    #[test]
    fn a_broken_socket_that_is_given_up_is_the_end() {
        let (mut one, other) = pair();
        one.session.outlive_sockets(Arc::new(Notify::new()));
        drop(other);
        let mut buffer = [0; 10];
        assert_eq!(one.receive(&mut buffer), Ok(Received::Nothing));
        one.session.give_up();
        assert!(!one.session.resume(), "it is too late for another socket");
        for _ in 0..2 {
            assert_eq!(one.receive(&mut buffer), Err(Fault::Cut));
            assert_eq!(one.send(b"x"), Err(Fault::Cut));
        }
    }
}
