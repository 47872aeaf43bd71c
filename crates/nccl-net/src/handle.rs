//! What a listener gives NCCL, which carries it to the dialler over its own, unprotected connections.
//!
//! ```text
//! byte 0      4        5       6   7            8     10  12       28        36       40  44    108
//!      "PNH1" fabric   family  0   name length  port  0   address  listener  attempt  0   name  0
//! ```
//! Nothing in it is a secret, and nothing in it is trusted: whoever answers at the address must prove to be the member
//! that it names. `attempt` is the dialler's own: NCCL calls `connect` with the same memory until there is a
//! connection, and in between the number of the attempt is kept there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use paceline_transport::Fabric;

use crate::abi::HANDLE_BYTES;

const MAGIC: [u8; 4] = *b"PNH1";
const ATTEMPT: std::ops::Range<usize> = 36..40;
const NAME: std::ops::Range<usize> = 44..108;

/// Where a listener is, and who.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handle {
    /// What links it takes. Not [`Fabric::Auto`].
    pub fabric: Fabric,
    /// Where it is dialled.
    pub addr: SocketAddr,
    /// The listener's number.
    pub listener: u64,
    /// Its member's name: 1 to 63 bytes.
    pub member: String,
}

/// The bytes of a handle.
pub type Bytes = [u8; HANDLE_BYTES];

impl Handle {
    /// Its bytes, without an attempt.
    pub fn to_bytes(&self) -> Bytes {
        let mut bytes = [0; HANDLE_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = match self.fabric {
            Fabric::Quic => 1,
            Fabric::Tcp => 3,
            _ => 2,
        };
        let ip = match self.addr.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        bytes[5] = if self.addr.is_ipv4() { 4 } else { 6 };
        bytes[7] = self.member.len() as u8;
        bytes[8..10].copy_from_slice(&self.addr.port().to_le_bytes());
        bytes[12..28].copy_from_slice(&ip.octets());
        bytes[28..36].copy_from_slice(&self.listener.to_le_bytes());
        bytes[NAME][..self.member.len()].copy_from_slice(self.member.as_bytes());
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub fn from_bytes(bytes: &Bytes) -> Result<Self, &'static str> {
        if bytes[..4] != MAGIC {
            return Err("it is no handle of this plugin, or of another release; all ranks need the same one");
        }
        let fabric = match bytes[4] {
            1 => Fabric::Quic,
            2 => Fabric::Tls,
            3 => Fabric::Tcp,
            _ => return Err("it wants an unknown kind of link"),
        };
        let ip = Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[12..28]).expect("16 bytes"));
        let ip = match (bytes[5], ip.to_ipv4_mapped()) {
            (4, Some(ip)) => IpAddr::V4(Ipv4Addr::from(ip.octets())),
            (6, None) => IpAddr::V6(ip),
            _ => return Err("its address is none"),
        };
        let name = bytes[NAME].get(..usize::from(bytes[7])).filter(|name| (1..=63).contains(&name.len()));
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        let member = name.filter(|name| name.bytes().all(|b| b == b'-' || b.is_ascii_alphanumeric()));
        let member = member.ok_or("it names no member")?.to_owned();
        let port = u16::from_le_bytes([bytes[8], bytes[9]]);
        let listener = u64::from_le_bytes(bytes[28..36].try_into().expect("8 bytes"));
        let handle = Self { fabric, addr: SocketAddr::new(ip, port), listener, member };
        let mut same = handle.to_bytes();
        set_attempt(&mut same, attempt(bytes));
        if same == *bytes { Ok(handle) } else { Err("bytes without a meaning are not zero") }
    }
}

/// The attempt that the dialler has noted, 0 for none.
pub fn attempt(bytes: &Bytes) -> u32 {
    u32::from_le_bytes(bytes[ATTEMPT].try_into().expect("4 bytes"))
}

/// Notes an attempt.
pub fn set_attempt(bytes: &mut Bytes, attempt: u32) {
    bytes[ATTEMPT].copy_from_slice(&attempt.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn handle(addr: &str) -> Handle {
        let addr = addr.parse().expect("an address");
        Handle { fabric: Fabric::Tls, addr, listener: 77, member: "worker-3".to_owned() }
    }

    #[test]
    fn a_handle_survives_the_way_and_keeps_an_attempt() {
        for addr in ["10.1.2.3:4567", "[fd00::1]:1", "127.0.0.1:65535"] {
            for fabric in [Fabric::Tls, Fabric::Quic, Fabric::Tcp] {
                let handle = Handle { fabric, ..handle(addr) };
                let mut bytes = handle.to_bytes();
                assert_eq!(attempt(&bytes), 0);
                set_attempt(&mut bytes, 0xfeed_beef);
                assert_eq!(attempt(&bytes), 0xfeed_beef);
                assert_eq!(Handle::from_bytes(&bytes), Ok(handle));
            }
        }
    }

    #[test]
    fn what_cannot_be_a_handle_is_refused_with_the_reason() {
        for (at, value, expected) in [
            (0, 0, "no handle"),
            (4, 9, "kind of link"),
            (5, 6, "address"),
            (7, 0, "no member"),
            (7, 200, "no member"),
            (6, 1, "not zero"),
        ] {
            let mut bytes = handle("10.1.2.3:4567").to_bytes();
            bytes[at] = value;
            let error = Handle::from_bytes(&bytes).expect_err("a wrong byte");
            assert!(error.contains(expected), "byte {at}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_handle_or_refused(head: [u8; 32], middle: [u8; 32], name: [u8; 32], rest: [u8; 32], known: bool) {
            let mut bytes: Bytes = [head, middle, name, rest].concat().try_into().expect("128 bytes");
            if known {
                bytes[..4].copy_from_slice(&MAGIC);
            }
            if let Ok(handle) = Handle::from_bytes(&bytes) {
                prop_assert_eq!(Handle::from_bytes(&handle.to_bytes()), Ok(handle));
            }
        }
    }
}
