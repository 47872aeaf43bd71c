//! The first 64 bytes of either side: which versions it speaks. This layout never changes, so that any two
//! releases can at least tell each other why they cannot work together.
//!
//! ```text
//! 0  magic "paceline"     8  oldest, 10 newest version of the bootstrap, u16 little-endian
//! 12 version of the protocol between members, u16     14 release, ASCII, padded with zeros
//! ```

use crate::quic::PROTOCOL_VERSION;

/// The size of a greeting on the wire.
pub(super) const GREETING_SIZE: usize = 64;

/// The versions of the bootstrap that this release speaks, oldest and newest.
const VERSIONS: (u16, u16) = (1, 1);

const MAGIC: &[u8; 8] = b"paceline";
const RELEASE_AT: usize = 14;

/// What a release says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    oldest: u16,
    newest: u16,
    /// Of everything that members say to each other; both sides must have the same.
    protocol: u16,
    release: String,
}

impl Greeting {
    /// This release's.
    pub(super) fn ours() -> Self {
        let release = env!("CARGO_PKG_VERSION").to_owned();
        Self { oldest: VERSIONS.0, newest: VERSIONS.1, protocol: PROTOCOL_VERSION, release }
    }

    pub(super) fn encode(&self) -> [u8; GREETING_SIZE] {
        let mut bytes = [0; GREETING_SIZE];
        bytes[..8].copy_from_slice(MAGIC);
        for (at, number) in [(8, self.oldest), (10, self.newest), (12, self.protocol)] {
            bytes[at..at + 2].copy_from_slice(&number.to_le_bytes());
        }
        let release = self.release.as_bytes();
        let len = release.len().min(GREETING_SIZE - RELEASE_AT);
        bytes[RELEASE_AT..RELEASE_AT + len].copy_from_slice(&release[..len]);
        bytes
    }

    /// Reads any 64 bytes; `None` when they are no greeting.
    pub(super) fn decode(bytes: &[u8; GREETING_SIZE]) -> Option<Self> {
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let release = bytes[RELEASE_AT..].iter().take_while(|byte| **byte != 0);
        let printable = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' };
        bytes.starts_with(MAGIC).then(|| Self {
            oldest: number(8),
            newest: number(10),
            protocol: number(12),
            release: release.map(printable).collect(),
        })
    }

    /// The version of the bootstrap that both speak, or why there is none, naming both.
    pub(super) fn agree(&self, theirs: &Greeting) -> Result<u16, String> {
        let version = self.newest.min(theirs.newest);
        if version >= self.oldest.max(theirs.oldest) && self.protocol == theirs.protocol {
            return Ok(version);
        }
        Err(format!(
            "it runs {} and this side runs {}; run the same release on every node",
            theirs.in_words(),
            self.in_words()
        ))
    }

    fn in_words(&self) -> String {
        let Self { oldest, newest, protocol, release } = self;
        let versions = if oldest == newest { format!("{newest}") } else { format!("{oldest} to {newest}") };
        format!("Paceline {release} (bootstrap {versions}, protocol {protocol})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn greeting(oldest: u16, newest: u16, protocol: u16) -> Greeting {
        Greeting { oldest, newest, protocol, release: format!("{newest}.0.0") }
    }

    #[test]
    fn releases_with_a_version_in_common_agree_on_the_newest() {
        let agree = |ours: &Greeting, theirs: &Greeting| {
            assert_eq!(ours.agree(theirs).ok(), theirs.agree(ours).ok(), "both sides come to the same");
            ours.agree(theirs).ok()
        };
        assert_eq!(agree(&greeting(1, 1, 1), &greeting(1, 1, 1)), Some(1));
        assert_eq!(agree(&greeting(1, 3, 1), &greeting(2, 4, 1)), Some(3));
        assert_eq!(agree(&greeting(1, 2, 1), &greeting(3, 4, 1)), None);
        assert_eq!(
            agree(&greeting(1, 1, 1), &greeting(1, 1, 2)),
            None,
            "members would not understand each other"
        );
    }

    #[test]
    fn a_refusal_names_both_releases_and_versions() {
        assert_eq!(
            greeting(1, 1, 1).agree(&greeting(2, 3, 2)),
            Err("it runs Paceline 3.0.0 (bootstrap 2 to 3, protocol 2) and this side runs Paceline 1.0.0 \
                 (bootstrap 1, protocol 1); run the same release on every node"
                .to_owned())
        );
    }

    #[test]
    fn the_layout_never_changes() {
        let greeting = Greeting { oldest: 1, newest: 2, protocol: 3, release: "0.1.0".to_owned() };
        let mut expected = [0; GREETING_SIZE];
        expected[..19].copy_from_slice(b"paceline\x01\x00\x02\x00\x03\x000.1.0");
        assert_eq!(greeting.encode(), expected);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_greeting_or_none(bytes in any::<[u8; 32]>(), ours in any::<bool>()) {
            let mut whole = [0; GREETING_SIZE];
            whole[32..].copy_from_slice(&bytes);
            whole[8..32].copy_from_slice(&bytes[..24]);
            if ours {
                whole[..8].copy_from_slice(MAGIC);
            }
            let greeting = Greeting::decode(&whole);
            prop_assert_eq!(greeting.is_some(), ours);
            if let Some(greeting) = greeting {
                // What reaches a log is one printable line.
                prop_assert!(greeting.in_words().bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '));
                let again = Greeting::decode(&greeting.encode());
                prop_assert_eq!(again, Some(greeting));
            }
        }
    }
}
