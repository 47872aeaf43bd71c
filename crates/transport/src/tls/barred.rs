//! Addresses whose connections the kernel drops for a while.
//!
//! Who asks for more handshakes than his [budget](crate::newcomers) could simply be hung up on. But a connection that
//! is accepted to be closed has cost two wake-ups of the thread that also carries the job's data: 700 of them in a
//! second, with 16 KiB of garbage each, left a job with 80 % of its throughput. So a filter of the listening socket
//! drops whatever comes from such an address, for [`TERM`]. A member that shares the address comes in when its
//! system asks again, after a second.
//!
//! Sockets that are accepted inherit the filter, which is [taken away](release) then.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use socket2::{SockFilter, SockRef};
use tokio::net::{TcpListener, TcpStream};

use crate::bpf::{self, Step};

/// How long an address is barred: as long as it takes to earn a second's handshakes again.
const TERM: Duration = Duration::from_secs(1);

/// Addresses that are barred at the same time; others beside them are hung up on. Keeps the filter short, which every
/// packet of a handshake runs through.
const LIMIT: usize = 16;

/// The addresses that are barred from a listening socket.
#[derive(Debug, Default)]
pub(super) struct Barred {
    /// In the order in which they are free again.
    terms: Vec<(IpAddr, Instant)>,
}

impl Barred {
    /// Bars an address from now on.
    ///
    /// # Errors
    /// The operating system's; nothing has changed then.
    pub(super) fn add(&mut self, address: IpAddr, now: Instant, listener: &TcpListener) -> io::Result<()> {
        if self.terms.len() >= LIMIT || self.terms.iter().any(|(barred, _)| *barred == address) {
            return Ok(());
        }
        let more = self.terms.iter().copied().chain([(address, now + TERM)]);
        self.become_these(more.collect(), listener)
    }

    /// When [`free`](Self::free) has something to do.
    pub(super) fn next(&self) -> Option<Instant> {
        self.terms.first().map(|(_, until)| *until)
    }

    /// Lets those in again whose time is over.
    ///
    /// # Errors
    /// The operating system's; the next call tries again.
    pub(super) fn free(&mut self, now: Instant, listener: &TcpListener) -> io::Result<()> {
        let left: Vec<_> = self.terms.iter().copied().filter(|(_, until)| *until > now).collect();
        if left.len() == self.terms.len() { Ok(()) } else { self.become_these(left, listener) }
    }

    fn become_these(&mut self, terms: Vec<(IpAddr, Instant)>, listener: &TcpListener) -> io::Result<()> {
        let socket = SockRef::from(listener);
        if terms.is_empty() {
            socket.detach_filter()?;
        } else {
            let steps = program(&terms.iter().map(|(address, _)| *address).collect::<Vec<_>>());
            let filters = steps
                .into_iter()
                .map(|(operation, then, or_else, value)| SockFilter::new(operation, then, or_else, value));
            socket.attach_filter(&filters.collect::<Vec<_>>())?;
        }
        self.terms = terms;
        Ok(())
    }
}

/// Takes the filter away that a connection has inherited from its listening socket, if it has.
pub(super) fn release(accepted: &TcpStream) {
    // There is none but during an attack.
    let _ = SockRef::from(accepted).detach_filter();
}

/// Drops packets from these addresses and keeps all others. Each address is asked for in turn, with steps that do
/// not hold skipping to the next one.
fn program(addresses: &[IpAddr]) -> Vec<Step> {
    /// What begins at the header of the network layer is addressed from here (linux/filter.h, SKF_NET_OFF).
    const NETWORK: u32 = -0x10_0000_i32 as u32;
    const IPV4_SOURCE: u32 = NETWORK + 12;
    const IPV6_SOURCE: u32 = NETWORK + 8;
    let mut steps = Vec::new();
    for address in addresses {
        let (version, source, words) = match address {
            IpAddr::V4(v4) => (4, IPV4_SOURCE, vec![v4.to_bits()]),
            IpAddr::V6(v6) => (6, IPV6_SOURCE, words(*v6).to_vec()),
        };
        // Behind each question: the load and the question of each further word, and the verdict.
        let mut to_next = 2 * words.len() as u8 + 1;
        steps.extend([(bpf::LOAD_BYTE, 0, 0, NETWORK), (bpf::SHIFT_RIGHT, 0, 0, 4)]);
        steps.push((bpf::IF_EQUAL, 0, to_next, version));
        for (index, word) in words.into_iter().enumerate() {
            to_next -= 2;
            steps.push((bpf::LOAD_WORD, 0, 0, source + 4 * index as u32));
            steps.push((bpf::IF_EQUAL, 0, to_next, word));
        }
        steps.push((bpf::RETURN, 0, 0, bpf::DROP));
    }
    steps.push((bpf::RETURN, 0, 0, bpf::KEEP));
    steps
}

fn words(address: Ipv6Addr) -> [u32; 4] {
    let bits = address.to_bits();
    [96, 64, 32, 0].map(|shift| (bits >> shift) as u32)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::Interest;

    use super::*;

    /// For what is heard, and for what is not.
    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(200);

    fn dial(from: &str, to: SocketAddr, patience: Duration) -> io::Result<std::net::TcpStream> {
        let from: IpAddr = from.parse().expect("an address");
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(to),
            socket2::Type::STREAM,
            Some(socket2::Protocol::TCP),
        )?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
        socket.connect_timeout(&to.into(), patience)?;
        Ok(socket.into())
    }

    #[tokio::test]
    async fn a_barred_address_is_not_heard_until_its_time_is_over_and_others_are() {
        for bound in ["127.0.0.1:0", "[::]:0"] {
            let listener = TcpListener::bind(bound).await.expect("loopback");
            let to = SocketAddr::from(([127, 0, 0, 1], listener.local_addr().expect("bound").port()));
            let (mut barred, now) = (Barred::default(), Instant::now());
            for address in ["127.0.0.5", "2001:db8::5", "127.0.0.7"] {
                barred.add(address.parse().expect("an address"), now, &listener).expect("a valid program");
            }
            for stranger in ["127.0.0.5", "127.0.0.7"] {
                assert!(dial(stranger, to, SHORT).is_err(), "{stranger} is dropped at {bound}");
            }
            assert!(dial("127.0.0.6", to, LONG).is_ok(), "another one is heard at {bound}");
            barred.free(now, &listener).expect("nothing to do");
            assert!(dial("127.0.0.5", to, SHORT).is_err(), "its time is not over");
            assert_eq!(barred.next(), Some(now + TERM));
            barred.free(now + TERM, &listener).expect("no filter");
            assert!(dial("127.0.0.5", to, LONG).is_ok() && barred.next().is_none());
        }
    }

    #[tokio::test]
    async fn an_address_of_ipv6_is_barred_by_all_of_its_bits() {
        let listener = TcpListener::bind("[::1]:0").await.expect("loopback");
        let to = listener.local_addr().expect("bound");
        let (mut barred, now) = (Barred::default(), Instant::now());
        for similar in ["::2", "1::1", "0:0:1::1"] {
            barred.add(similar.parse().expect("an address"), now, &listener).expect("a valid program");
        }
        assert!(dial("::1", to, LONG).is_ok());
        barred.add("::1".parse().expect("an address"), now, &listener).expect("a valid program");
        assert!(dial("::1", to, SHORT).is_err());
    }

    #[tokio::test]
    async fn a_connection_that_was_accepted_before_goes_on() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let to = listener.local_addr().expect("bound");
        let mut client = dial("127.0.0.5", to, LONG).expect("not barred yet");
        let (server, from) = listener.accept().await.expect("it is there");
        Barred::default().add(from.ip(), Instant::now(), &listener).expect("a valid program");
        release(&server);
        io::Write::write_all(&mut client, b"x").expect("sent");
        server.ready(Interest::READABLE).await.expect("it arrives");
        assert_eq!(server.try_read(&mut [0; 2]).expect("read"), 1);
    }

    #[tokio::test]
    async fn no_more_are_barred_than_fit() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let (mut barred, now) = (Barred::default(), Instant::now());
        for number in 0..100 {
            let address = Ipv6Addr::from_bits(number).into();
            barred.add(address, now, &listener).expect("a valid program");
            barred.add(address, now, &listener).expect("twice is once");
        }
        assert_eq!(barred.terms.len(), LIMIT);
    }
}
