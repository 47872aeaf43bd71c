//! The job secret: what the nodes of a job have in common before they have met.
//!
//! Whoever holds it can be any node of the job, the first one included. It is never sent: each use has a key
//! of its own, derived from it (HKDF-SHA256, RFC 5869), and a key for one use says nothing about another.
//!
//! This module refuses to read files and variables: that is the launcher's work.

use std::fmt;

use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use zeroize::Zeroizing;

use crate::Error;

/// The shortest secret, in bytes: 128 bits, if they are random.
pub const SECRET_LEAST: usize = 16;

/// The longest secret, in bytes. It is text of one line; what is longer is some other file.
pub const SECRET_MOST: usize = 4096;

/// Separates our keys from those that others may derive from the same bytes. Part of the protocol.
const SALT: &[u8] = b"paceline job secret 1";

/// A key derived from a secret, overwritten when it is dropped.
pub(crate) type DerivedKey = Zeroizing<[u8; 32]>;

/// The secret of one job. Overwritten in memory when it is dropped; never shown, logged or sent.
pub struct JobSecret(Zeroizing<Vec<u8>>);

impl JobSecret {
    /// Takes the text of a secret; white space around it does not count, since editors and `echo` add some.
    ///
    /// # Errors
    /// [`Error::Identity`] when it is shorter than 16 bytes or longer than 4096. Nothing of it is quoted.
    pub fn new(text: &[u8]) -> Result<Self, Error> {
        let secret = text.trim_ascii();
        let reason = match secret.len() {
            0 => "it is empty; make one with openssl rand -hex 32".to_owned(),
            short @ ..SECRET_LEAST => format!(
                "it has {short} bytes and needs {SECRET_LEAST} at least; make one with openssl rand -hex 32"
            ),
            SECRET_LEAST..=SECRET_MOST => return Ok(Self(Zeroizing::new(secret.to_vec()))),
            _ => format!("it is longer than {SECRET_MOST} bytes, so that is some other file"),
        };
        Err(Error::Identity { reason })
    }

    /// What stands for a secret in a job that does without: everybody knows it. Whoever reaches the bootstrap of such
    /// a job can be any node of it.
    pub fn known_to_all() -> Self {
        Self(Zeroizing::new(b"paceline: this job has no secret".to_vec()))
    }

    /// The key for one purpose.
    pub(crate) fn derive(&self, purpose: &str) -> DerivedKey {
        let mut key = Zeroizing::new([0; 32]);
        let extracted = Salt::new(HKDF_SHA256, SALT).extract(&self.0);
        let info = [purpose.as_bytes()];
        let expanded = extracted.expand(&info, HKDF_SHA256).and_then(|okm| okm.fill(&mut *key));
        expanded.expect("HKDF-SHA256 gives 32 bytes for any input and a short purpose");
        key
    }
}

impl fmt::Debug for JobSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobSecret(<redacted>)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_around_a_secret_does_not_count() {
        let plain = JobSecret::new(b"0123456789abcdef").expect("16 bytes");
        let padded = JobSecret::new(b" \t0123456789abcdef\r\n").expect("16 bytes");
        assert_eq!(plain.derive("a"), padded.derive("a"));
        assert_ne!(plain.derive("a"), plain.derive("b"), "each purpose has a key of its own");
        let other = JobSecret::new(b"0123456789abcdeg").expect("16 bytes");
        assert_ne!(plain.derive("a"), other.derive("a"));
    }

    #[test]
    fn what_is_too_short_or_too_long_is_refused_without_quoting_it() {
        for (text, expected) in [
            (b" \n".to_vec(), "is empty"),
            (b"  0123456789abcde  ".to_vec(), "has 15 bytes and needs 16"),
            (vec![b'x'; 4097], "longer than 4096"),
        ] {
            let error = JobSecret::new(&text).expect_err("refused").to_string();
            assert!(error.contains(expected) && !error.contains("01234"), "{error}");
        }
    }

    #[test]
    fn derived_keys_are_part_of_the_protocol() {
        // Two releases that derive differently would take each other's launchers for strangers.
        let secret = JobSecret::new(b"0123456789abcdef").expect("16 bytes");
        let hex: String = secret.derive("golden").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "2195f74de2f5f892c8710499813fb439f15a544f32ab422c200286eec4ebac48");
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let secret = JobSecret::new(b"0123456789abcdef").expect("16 bytes");
        assert_eq!(format!("{secret:?}"), "JobSecret(<redacted>)");
    }
}
