//! Why a connection was closed: codes that both sides know, and TLS alerts in words.

/// The most characters of a peer's own words that reach our errors and logs.
const QUOTE_LIMIT: usize = 300;

/// The code with which one side closes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CloseCode {
    /// The member left the epoch in order; everything it sent had been delivered.
    Left = 1,
    /// The member ended without leaving.
    Aborted = 2,
    /// The other side is not let in; the reason says why.
    Refused = 3,
    /// The other side broke the protocol.
    Protocol = 4,
    /// The conversation on a connection (not a link of the mesh) is over.
    Finished = 5,
}

/// A peer's own words, made fit for one line of a log.
pub(crate) fn quote(reason: &[u8]) -> String {
    let reason = String::from_utf8_lossy(reason);
    reason.chars().take(QUOTE_LIMIT).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

// The TLS alerts (RFC 8446, 6.2) that a wrong peer causes. rustls maps certificate errors to them in
// its `impl From<CertificateError> for AlertDescription`.
const BAD_CERTIFICATE: u8 = 42;
const CERTIFICATE_EXPIRED: u8 = 45;
const UNKNOWN_CA: u8 = 48;
const DECRYPT_ERROR: u8 = 51;
const PROTOCOL_VERSION: u8 = 70;
pub(crate) const CERTIFICATE_REQUIRED: u8 = 116;
pub(crate) const NO_APPLICATION_PROTOCOL: u8 = 120;

/// What we hold against the other side when we send this alert.
pub(crate) fn our_refusal(alert: u8) -> &'static str {
    match alert {
        CERTIFICATE_REQUIRED => "the client has no certificate",
        UNKNOWN_CA | DECRYPT_ERROR => "its certificate is not of this job",
        CERTIFICATE_EXPIRED => "its certificate has expired or is not valid yet",
        BAD_CERTIFICATE => "its certificate does not name the member that was dialled",
        NO_APPLICATION_PROTOCOL => "it does not speak this protocol (ALPN)",
        PROTOCOL_VERSION => "it does not speak TLS 1.3",
        _ => "the TLS handshake failed",
    }
}

/// What the other side holds against us when it sends this alert.
pub(crate) fn its_refusal(alert: u8) -> &'static str {
    match alert {
        CERTIFICATE_REQUIRED => "it asked for a certificate and got none",
        UNKNOWN_CA | DECRYPT_ERROR => "it says that our certificate is not of its job",
        CERTIFICATE_EXPIRED => "it says that our certificate has expired or is not valid yet",
        BAD_CERTIFICATE => "it says that we are not the member it dialled",
        NO_APPLICATION_PROTOCOL => "it says that we do not speak its protocol (ALPN)",
        PROTOCOL_VERSION => "it says that we do not speak its version of TLS",
        _ => "it gave up the TLS handshake",
    }
}

/// A cause with what a library or a peer says about it.
pub(crate) fn with_details(cause: &str, details: &[u8]) -> String {
    if details.is_empty() { cause.to_owned() } else { format!("{cause} ({})", quote(details)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_words_are_one_short_line() {
        assert_eq!(quote(b"two\nlines\x1b[31m"), "two lines [31m");
        assert_eq!(quote(&[b'x'; 5000]).len(), QUOTE_LIMIT);
        assert_eq!(quote(b"\xff"), "\u{fffd}");
    }
}
