//! The UDP socket of an endpoint: batches that the kernel takes, and a stop to what is not QUIC.
//!
//! One call hands the kernel many datagrams of one size (UDP segmentation offload) and takes many from it.
//! That is where QUIC's throughput is decided: with 10 datagrams a call, 1452 bytes each, 1.06 GB/s were
//! measured, with 45 of them 1.76 (2026-07, 2 cores of an AMD EPYC, loopback). Above 65507 bytes in all the
//! kernel answers EMSGSIZE and the batch is lost without a sound, so [`Socket::batch_limit`] counts bytes,
//! not datagrams (quinn issues 2189 and 2201).
//!
//! Datagrams from addresses that never began a handshake are looked at before the protocol sees them. Those
//! that cannot be QUIC are dropped, and a line per address and second says so; this is for the person
//! who pointed the wrong program at our port, as TLS is what keeps strangers out.

use std::collections::{HashMap, HashSet};
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::net::sockopt;
use tokio::sync::Notify;

use super::knock::Knock;

/// The largest payload of one UDP send over IPv4, segments together: 65535 less both headers. Over IPv6 its header is
/// not counted, and 20 bytes more would pass.
const MAX_BATCH_BYTES: usize = 65507;

/// Socket buffers we ask for. The default of 208 KiB overflows when the receiver is descheduled; the
/// kernel grants what net.core.rmem_max and wmem_max allow.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Addresses kept per generation of [`Known`]: more than a group has members.
const KNOWN_LIMIT: usize = 4096;

/// Addresses with a count of their own in one reporting period, and a line in the log.
const SUSPECT_LIMIT: usize = 10;

/// How often an address is reported.
const REPORT_PERIOD: Duration = Duration::from_secs(1);

/// A QUIC client must pad its first datagram to this size (RFC 9000, 14.1).
const SMALLEST_INITIAL: usize = 1200;

/// The shortest packet a peer that follows RFC 9000 sends (10.3: shorter ones cannot be told from
/// a stateless reset).
const SMALLEST_PACKET: usize = 21;

/// Datagrams in one send at most. Linux takes 64 (UDP_MAX_SEGMENTS), newer ones 128.
const MAX_SEGMENTS: usize = 64;

/// The socket of an endpoint. It never blocks.
#[derive(Debug)]
pub(super) struct Socket {
    udp: Arc<UdpSocket>,
    state: UdpSocketState,
    local_addr: SocketAddr,
    gate: Mutex<Gate>,
    refused: Notify,
}

/// Who may send what.
#[derive(Debug, Default)]
struct Gate {
    known: Known,
    /// Refused datagrams per address since the last report, and those of further addresses.
    suspects: HashMap<SocketAddr, Refused>,
    further: u64,
}

/// Datagrams of one address that were refused in a reporting period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Refused {
    not_quic: u64,
    stray: u64,
}

/// A bounded set of addresses: when a generation is full it becomes the old one, and the one before is
/// forgotten. A forgotten peer is not cut off, its packets are looked at again.
#[derive(Debug, Default)]
struct Known {
    last: Option<SocketAddr>,
    young: HashSet<SocketAddr>,
    old: HashSet<SocketAddr>,
}

/// What a datagram from an unknown address can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The first datagram of a handshake.
    Handshake,
    /// QUIC by its looks, of a connection we may have forgotten. The endpoint answers with a stateless reset,
    /// from which the peer learns that we were restarted.
    Stray,
    /// Not QUIC version 1.
    NotQuic,
}

impl Socket {
    /// Opens a socket with large buffers.
    pub(super) fn open(addr: SocketAddr) -> io::Result<Self> {
        let udp = UdpSocket::bind(addr)?;
        sockopt::set_socket_recv_buffer_size(&udp, SOCKET_BUFFER_BYTES)?;
        sockopt::set_socket_send_buffer_size(&udp, SOCKET_BUFFER_BYTES)?;
        tracing::debug!(
            %addr,
            receive_buffer_bytes = sockopt::socket_recv_buffer_size(&udp)?,
            send_buffer_bytes = sockopt::socket_send_buffer_size(&udp)?,
            "opened a UDP socket"
        );
        let state = UdpSocketState::new(UdpSockRef::from(&udp))?;
        let local_addr = udp.local_addr()?;
        Ok(Self { udp: Arc::new(udp), state, local_addr, gate: Mutex::default(), refused: Notify::new() })
    }

    /// Has the kernel drop what does not carry `knock`.
    ///
    /// # Errors
    /// The operating system's; nothing is dropped then.
    pub(super) fn guard(&self, knock: Knock) -> io::Result<()> {
        knock.guard(&self.udp)
    }

    /// The descriptor, to wait on.
    pub(super) fn descriptor(&self) -> &Arc<UdpSocket> {
        &self.udp
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Whether the network may cut datagrams into pieces, so that their size says nothing about the path.
    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// How many datagrams of `size` bytes one [`send`](Self::send) may hold.
    pub(super) fn batch_limit(&self, size: usize) -> usize {
        segments_that_fit(size).min(self.state.max_gso_segments())
    }

    /// Sends a batch.
    ///
    /// # Errors
    /// `WouldBlock` alone: a datagram that cannot be sent for another reason counts as lost on the way.
    pub(super) fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.state.send(UdpSockRef::from(&*self.udp), transmit)
    }

    /// Takes batches from the kernel, one for each buffer at most, and empties those that the protocol must
    /// not see. Returns how many.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing; others are about a datagram of ours or passing trouble of the host.
    pub(super) fn receive(
        &self,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> io::Result<usize> {
        let received = self.state.recv(UdpSockRef::from(&*self.udp), buffers, metas)?;
        self.filter(buffers, &mut metas[..received]);
        Ok(received)
    }

    /// Lets datagrams of an address pass that we are about to dial.
    pub(super) fn expect_from(&self, addr: SocketAddr) {
        self.gate().known.insert(canonical(addr));
    }

    /// Logs refused datagrams, for as long as it is polled.
    pub(super) async fn report_refused(&self) {
        loop {
            self.refused.notified().await;
            tokio::time::sleep(REPORT_PERIOD).await;
            let (suspects, further) = {
                let mut gate = self.gate();
                (std::mem::take(&mut gate.suspects), std::mem::take(&mut gate.further))
            };
            suspects.into_iter().for_each(|(remote, refused)| refused.log(remote));
            if further > 0 {
                tracing::warn!(datagrams = further, "refused datagrams of many more addresses");
            }
        }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        // Counters and sets stay usable whatever happened to another holder.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties the buffers that the protocol must not see.
    fn filter(&self, buffers: &[IoSliceMut<'_>], received: &mut [RecvMeta]) {
        let mut gate = self.gate();
        for (buffer, meta) in buffers.iter().zip(received) {
            let remote = canonical(meta.addr);
            if !gate.known.contains(remote) && !gate.admit(remote, &buffer[..meta.len], meta.stride) {
                meta.len = 0;
            }
        }
        if !gate.suspects.is_empty() {
            self.refused.notify_one();
        }
    }
}

impl Gate {
    /// Judges the datagrams of an unknown address, `stride` bytes each but the last.
    fn admit(&mut self, remote: SocketAddr, received: &[u8], stride: usize) -> bool {
        let mut refused = Refused::default();
        for datagram in received.chunks(stride.max(1)) {
            match Verdict::of(datagram) {
                Verdict::Handshake => {
                    self.known.insert(remote);
                    return true;
                }
                Verdict::Stray => refused.stray += 1,
                Verdict::NotQuic => refused.not_quic += 1,
            }
        }
        if received.is_empty() {
            refused.not_quic = 1;
        }
        self.count(remote, refused);
        refused.stray > 0
    }

    fn count(&mut self, remote: SocketAddr, refused: Refused) {
        if self.suspects.len() < SUSPECT_LIMIT || self.suspects.contains_key(&remote) {
            let total = self.suspects.entry(remote).or_default();
            total.not_quic += refused.not_quic;
            total.stray += refused.stray;
        } else {
            self.further += refused.not_quic + refused.stray;
        }
    }
}

impl Refused {
    fn log(self, remote: SocketAddr) {
        let Self { not_quic, stray } = self;
        if not_quic > 0 {
            let datagrams = not_quic + stray;
            tracing::warn!(%remote, datagrams, "refused datagrams that are not QUIC");
        } else {
            tracing::debug!(%remote, datagrams = stray, "datagrams of a connection that is not known");
        }
    }
}

impl Known {
    fn contains(&mut self, addr: SocketAddr) -> bool {
        if self.last == Some(addr) {
            return true;
        }
        let known = self.young.contains(&addr) || self.old.contains(&addr);
        if known {
            self.last = Some(addr);
        }
        known
    }

    fn insert(&mut self, addr: SocketAddr) {
        if self.young.len() >= KNOWN_LIMIT {
            self.old = std::mem::take(&mut self.young);
            self.last = None;
        }
        self.young.insert(addr);
    }
}

impl Verdict {
    fn of(datagram: &[u8]) -> Self {
        const LONG_HEADER: u8 = 0x80;
        const FIXED_BIT: u8 = 0x40;
        const LONG_TYPE: u8 = 0x30;
        const VERSION_1: &[u8] = &[0, 0, 0, 1];
        match datagram {
            [first, ..] if first & FIXED_BIT == 0 || datagram.len() < SMALLEST_PACKET => Verdict::NotQuic,
            [first, ..] if first & LONG_HEADER == 0 => Verdict::Stray,
            [_, version @ .., _] if !version.starts_with(VERSION_1) => Verdict::NotQuic,
            [first, ..] if first & LONG_TYPE != 0 => Verdict::Stray,
            [_, ..] if datagram.len() >= SMALLEST_INITIAL => Verdict::Handshake,
            _ => Verdict::NotQuic,
        }
    }
}

fn segments_that_fit(segment: usize) -> usize {
    (MAX_BATCH_BYTES / segment.max(1)).clamp(1, MAX_SEGMENTS)
}

/// The same address in the same form, whether or not the socket is dual-stack.
fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REMOTE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4433);

    fn initial(len: usize) -> Vec<u8> {
        let mut datagram = vec![0xc0, 0, 0, 0, 1];
        datagram.resize(len, 7);
        datagram
    }

    #[test]
    fn a_datagram_is_judged_by_its_first_bytes_and_its_length() {
        let with_first = |first: u8| [&[first][..], &initial(1200)[1..]].concat();
        assert_eq!(Verdict::of(&initial(1200)), Verdict::Handshake);
        assert_eq!(Verdict::of(&initial(1199)), Verdict::NotQuic, "an unpadded Initial");
        assert_eq!(Verdict::of(&with_first(0x80)), Verdict::NotQuic, "no fixed bit");
        assert_eq!(Verdict::of(&with_first(0xe0)), Verdict::Stray, "a later handshake packet");
        assert_eq!(Verdict::of(&with_first(0x40)), Verdict::Stray, "a short header");
        assert_eq!(Verdict::of(&with_first(0x40)[..20]), Verdict::NotQuic, "too short for any packet");
        let mut other_version = initial(1200);
        other_version[4] = 2;
        assert_eq!(Verdict::of(&other_version), Verdict::NotQuic);
        for len in 0..64 {
            assert_eq!(Verdict::of(&vec![0x16; len]), Verdict::NotQuic, "TLS over UDP");
            let _ = Verdict::of(&initial(len.max(5))[..len]);
        }
    }

    #[test]
    fn only_a_handshake_makes_an_address_known() {
        let mut gate = Gate::default();
        assert!(!gate.admit(REMOTE, b"GET / HTTP/1.1\r\n", 16));
        assert!(!gate.admit(REMOTE, b"", 0));
        assert!(!gate.known.contains(REMOTE));
        assert_eq!(gate.suspects[&REMOTE], Refused { not_quic: 2, stray: 0 });
        assert!(gate.admit(REMOTE, &[b"garbage".repeat(172), initial(1204)].concat(), 1204));
        assert!(gate.known.contains(REMOTE));
    }

    #[test]
    fn the_known_addresses_and_the_suspects_are_bounded() {
        let addr =
            |n: usize| SocketAddr::new([10, 0, (n >> 8) as u8, n as u8].into(), 1000 + (n >> 16) as u16);
        let mut gate = Gate::default();
        for n in 0..4 * KNOWN_LIMIT {
            gate.known.insert(addr(n));
            gate.count(addr(n), Refused { not_quic: 1, stray: 0 });
        }
        assert!(gate.known.contains(addr(4 * KNOWN_LIMIT - 1)));
        assert!(!gate.known.contains(addr(0)));
        assert!(gate.known.young.len() + gate.known.old.len() <= 2 * KNOWN_LIMIT);
        assert_eq!(gate.suspects.len(), SUSPECT_LIMIT);
        assert_eq!(gate.further as usize, 4 * KNOWN_LIMIT - SUSPECT_LIMIT);
    }

    #[test]
    fn a_batch_is_never_more_than_the_kernel_takes() {
        for size in 1..=u16::MAX.into() {
            let fit = segments_that_fit(size);
            assert!((1..=MAX_SEGMENTS).contains(&fit), "{fit} of {size}");
            assert!(fit == 1 || fit * size <= MAX_BATCH_BYTES, "{fit} of {size}");
        }
        assert_eq!([1200, 1452, 8972, 65507].map(segments_that_fit), [54, 45, 7, 1]);
    }

    #[test]
    fn a_full_batch_arrives_whole_at_every_size() {
        a_full_batch_arrives_whole(([127, 0, 0, 1], 0).into());
    }

    #[test]
    fn a_full_batch_arrives_whole_over_ipv6_too() {
        let local = SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), 0);
        match UdpSocket::bind(local) {
            Ok(_) => a_full_batch_arrives_whole(local),
            // A host that has no IPv6.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable, "{error}"),
        }
    }

    fn a_full_batch_arrives_whole(local: SocketAddr) {
        let [from, to] = [(); 2].map(|()| Socket::open(local).expect("a free port"));
        to.expect_from(from.local_addr());
        for segment in [1200, 1452, 8952, 8972] {
            let contents = vec![7; from.batch_limit(segment) * segment];
            let segment_size = Some(segment);
            let transmit = Transmit {
                destination: to.local_addr(),
                ecn: None,
                contents: &contents,
                segment_size,
                src_ip: None,
            };
            from.send(&transmit).expect("an empty socket takes it");
            let (mut got, mut buffer) = (0, vec![0; 64 * 1024]);
            while got < contents.len() {
                let mut meta = [RecvMeta::default()];
                // Loopback delivers before the send returns: nothing to wait for.
                let result = to.receive(&mut [IoSliceMut::new(&mut buffer)], &mut meta);
                assert_eq!(result.expect("the rest is there"), 1);
                assert_eq!(meta[0].stride, segment);
                got += meta[0].len;
            }
            assert_eq!(got, contents.len());
        }
    }

    proptest! {
        #[test]
        fn any_datagrams_are_judged_and_only_a_padded_initial_of_version_1_begins_a_handshake(
            first: u8, version in prop_oneof![Just([0, 0, 0, 1]), any::<[u8; 4]>()],
            rest in prop::collection::vec(any::<u8>(), 0..1500), stride in 0..2000_usize,
        ) {
            let batch = [&[first][..], &version, &rest].concat();
            if Verdict::of(&batch) == Verdict::Handshake {
                prop_assert!(batch.len() >= SMALLEST_INITIAL && version == [0, 0, 0, 1] && first & 0xf0 == 0xc0);
            }
            let mut gate = Gate::default();
            let passed = gate.admit(REMOTE, &batch, stride);
            let began = batch.chunks(stride.max(1)).any(|datagram| Verdict::of(datagram) == Verdict::Handshake);
            prop_assert_eq!(gate.known.contains(REMOTE), began);
            prop_assert!(passed || !began);
            let counted: u64 = gate.suspects.values().map(|refused| refused.not_quic + refused.stray).sum();
            prop_assert!(counted <= batch.len() as u64, "none is counted twice");
        }
    }
}
