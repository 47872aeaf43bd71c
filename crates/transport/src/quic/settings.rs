//! What an endpoint may be told about its network.

use std::net::IpAddr;
use std::time::Duration;

use super::knock::Knock;
use crate::Error;

/// An Ethernet jumbo frame of 9000 bytes less IPv4 and UDP headers. Larger ones (loopback takes 64 KiB) gain
/// nothing: 1.2 GB/s at 65507 bytes, of which one fits a send, against 3.4 at 8972 (2026-07, 2 cores of an
/// AMD EPYC).
const JUMBO_BYTES: u16 = 8972;

/// The same less IPv6's header, which is 20 bytes longer. A limit that no path of such frames carries would cost
/// three lost probes for each step of the search, which then ends up to 20 bytes below what the path carries.
const JUMBO_BYTES_V6: u16 = 8952;

/// What every path that carries QUIC must carry (RFC 9000, 14).
const SMALLEST_BYTES: u16 = 1200;

/// The largest payload of a UDP datagram over IPv4; over IPv6 it is 20 bytes more.
const LARGEST_BYTES: u16 = 65507;

/// A handshake packet counts its length in 14 bits, and quinn-proto 0.11.19 panics on a longer one. Some
/// bytes less, for its header.
const FIRST_LIMIT_BYTES: u16 = 16_000;

/// How an endpoint uses its network. The default suits hosts of one data centre.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// The largest UDP payload that is sent or taken, in bytes, between 1200 and 65507; 8972 by default, and 8952
    /// over IPv6: a frame of 9000 bytes.
    /// Up to it an endpoint finds out by itself what a path carries.
    pub largest_datagram_bytes: u16,
    /// The UDP payload with which a connection begins, in bytes; 1200 by default, which every path carries.
    /// At most 16000: the packets of a handshake cannot be longer.
    pub first_datagram_bytes: u16,
    /// What kind of network it is.
    pub profile: Profile,
    /// What datagrams to the endpoint must carry, if anything: those of peers that were not told are dropped by the
    /// kernel.
    pub knock: Option<Knock>,
}

/// A kind of network: how much may be on its way, and how carefully a connection begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Round trips below a millisecond, and links that are ours: begins with a window of 1 MiB, and lets
    /// 2 MiB be on their way on a link.
    #[default]
    DataCenter,
    /// Round trips up to some 100 ms, over links that others use too: begins with the window of RFC 9002,
    /// and lets 16 MiB be on their way on a link, which is 160 MB/s at 100 ms.
    Wan,
}

impl Default for Settings {
    fn default() -> Self {
        let profile = Profile::DataCenter;
        Self {
            largest_datagram_bytes: JUMBO_BYTES,
            first_datagram_bytes: SMALLEST_BYTES,
            profile,
            knock: None,
        }
    }
}

impl Settings {
    /// The default for an endpoint at this address.
    pub fn for_address(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::default(),
            IpAddr::V6(_) => Self::default().with_largest_datagram(JUMBO_BYTES_V6),
        }
    }

    /// These settings with another limit to the UDP payload, in bytes.
    pub fn with_largest_datagram(self, bytes: u16) -> Self {
        Self { largest_datagram_bytes: bytes, ..self }
    }

    /// These settings with another UDP payload to begin with, in bytes.
    pub fn with_first_datagram(self, bytes: u16) -> Self {
        Self { first_datagram_bytes: bytes, ..self }
    }

    /// These settings for another kind of network.
    pub fn with_profile(self, profile: Profile) -> Self {
        Self { profile, ..self }
    }

    /// These settings for an endpoint that only peers reach which know its knock.
    pub fn with_knock(self, knock: impl Into<Option<Knock>>) -> Self {
        Self { knock: knock.into(), ..self }
    }

    /// Refuses what the protocol cannot do.
    pub(super) fn check(&self) -> Result<(), Error> {
        let Self { largest_datagram_bytes: largest, first_datagram_bytes: first, .. } = *self;
        let wrong = |reason: String| Err(Error::Usage { reason });
        if !(SMALLEST_BYTES..=LARGEST_BYTES).contains(&largest) {
            return wrong(format!(
                "a largest datagram of {largest} bytes: QUIC can have {SMALLEST_BYTES} to {LARGEST_BYTES}"
            ));
        }
        if !(SMALLEST_BYTES..=FIRST_LIMIT_BYTES.min(largest)).contains(&first) {
            return wrong(format!(
                "a first datagram of {first} bytes: a handshake can have {SMALLEST_BYTES} to \
                 {FIRST_LIMIT_BYTES}, and here at most {largest}; leave it at {SMALLEST_BYTES}, larger ones \
                 are found by themselves"
            ));
        }
        Ok(())
    }
}

impl Profile {
    /// The congestion window at the start. Cubic's default of 14 KiB makes the first collectives slow; inside
    /// one cluster 1 MiB is a modest first burst. Never below two datagrams of the largest size: a window
    /// that holds none sends nothing for ever.
    pub(super) fn initial_window_bytes(self, largest_datagram: u16) -> u64 {
        let bytes = match self {
            Profile::DataCenter => 1024 * 1024,
            Profile::Wan => 14_720,
        };
        bytes.max(2 * u64::from(largest_datagram))
    }

    /// What a peer may have in flight on one stream: bandwidth times delay, as far as the memory for it may
    /// go on every link. 2 MiB fill 4 GB/s at 0.5 ms.
    pub(super) fn stream_window_bytes(self) -> u32 {
        match self {
            Profile::DataCenter => 2 * 1024 * 1024,
            Profile::Wan => 16 * 1024 * 1024,
        }
    }

    /// The first guess of the round trip. QUIC's own 333 ms suits the internet: a lost first packet would
    /// delay a group by a second. A wrong guess costs one packet sent twice.
    pub(super) fn initial_rtt(self) -> Duration {
        match self {
            Profile::DataCenter => Duration::from_millis(100),
            Profile::Wan => Duration::from_millis(333),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_datagram_fills_a_jumbo_frame_of_its_family() {
        for (ip, headers) in [("127.0.0.1", 20 + 8), ("0.0.0.0", 20 + 8), ("::1", 40 + 8), ("::", 40 + 8)] {
            let settings = Settings::for_address(ip.parse().expect("an address"));
            assert_eq!((settings.largest_datagram_bytes + headers, settings.check()), (9000, Ok(())), "{ip}");
        }
    }

    #[test]
    fn settings_that_the_protocol_cannot_have_are_refused() {
        let settings = Settings::default;
        assert_eq!(settings().check(), Ok(()));
        assert_eq!(settings().with_first_datagram(8972).check(), Ok(()));
        assert_eq!(settings().with_largest_datagram(65507).with_first_datagram(16_000).check(), Ok(()));
        for refused in [
            settings().with_largest_datagram(1199),
            settings().with_largest_datagram(65508),
            settings().with_first_datagram(1199),
            settings().with_first_datagram(8973),
            settings().with_largest_datagram(65507).with_first_datagram(16_384),
        ] {
            assert!(matches!(refused.check(), Err(Error::Usage { .. })), "{refused:?}");
        }
    }

    #[test]
    fn a_window_holds_two_datagrams_whatever_the_settings() {
        for profile in [Profile::DataCenter, Profile::Wan] {
            for largest in [SMALLEST_BYTES, JUMBO_BYTES, LARGEST_BYTES] {
                assert!(profile.initial_window_bytes(largest) >= 2 * u64::from(largest));
            }
        }
    }
}
