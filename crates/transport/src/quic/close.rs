//! Why a connection ended: our close codes, and every other cause in words.

use quinn_proto::{ConnectionError, TransportErrorCode, VarInt};

use super::driver;
use super::tls::IDLE_TIMEOUT;

/// The most characters of a peer's own words that reach our errors and logs.
const QUOTE_LIMIT: usize = 300;

/// The application error code with which one side closes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloseCode {
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

impl CloseCode {
    /// Whether `error` is a close by the peer with this code.
    pub(super) fn is_in(self, error: &ConnectionError) -> bool {
        matches!(error, ConnectionError::ApplicationClosed(close) if close.error_code == VarInt::from(self))
    }
}

impl From<CloseCode> for VarInt {
    fn from(code: CloseCode) -> Self {
        VarInt::from_u32(code as u32)
    }
}

/// Closes a connection and tells the other side why.
pub(super) fn close(connection: &driver::Connection, code: CloseCode, reason: &str) {
    connection.close(code.into(), reason.as_bytes());
}

/// The cause of a connection's end in words. "It" is the other side.
pub(super) fn in_words(error: &ConnectionError) -> String {
    match error {
        ConnectionError::TimedOut => format!("no answer for {} s", IDLE_TIMEOUT.as_secs()),
        ConnectionError::Reset => "it does not know this connection any more".to_owned(),
        ConnectionError::LocallyClosed => "this process closed the connection".to_owned(),
        ConnectionError::VersionMismatch => "it speaks no version of QUIC that we do".to_owned(),
        ConnectionError::CidsExhausted => "too many connections".to_owned(),
        ConnectionError::ApplicationClosed(close) if close.reason.is_empty() => {
            format!("connection closed with code {}", close.error_code)
        }
        error if CloseCode::Protocol.is_in(error) => format!("it cut us off: {}", reason_of(error)),
        ConnectionError::ApplicationClosed(_) => format!("connection closed: {}", reason_of(error)),
        ConnectionError::TransportError(error) => our_refusal(error.code, &error.reason),
        ConnectionError::ConnectionClosed(close) => its_refusal(close.error_code, &close.reason),
    }
}

fn reason_of(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) => quote(&close.reason),
        _ => String::new(),
    }
}

/// A peer's own words, made fit for one line of a log.
pub(super) fn quote(reason: &[u8]) -> String {
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
const CERTIFICATE_REQUIRED: u8 = 116;
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// The TLS alert inside a QUIC error code (RFC 9001, 4.8), if it is one.
fn alert(code: TransportErrorCode) -> Option<u8> {
    u64::from(code).checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok())
}

fn our_refusal(code: TransportErrorCode, reason: &str) -> String {
    let cause = match alert(code) {
        Some(CERTIFICATE_REQUIRED) => "the client has no certificate",
        Some(UNKNOWN_CA | DECRYPT_ERROR) => "its certificate is not of this job",
        Some(CERTIFICATE_EXPIRED) => "its certificate has expired or is not valid yet",
        Some(BAD_CERTIFICATE) => "its certificate does not name the member that was dialled",
        Some(NO_APPLICATION_PROTOCOL) => "it does not speak this protocol (ALPN)",
        Some(PROTOCOL_VERSION) => "it does not speak TLS 1.3",
        Some(_) => "the TLS handshake failed",
        None => "protocol violation",
    };
    with_details(cause, reason.as_bytes())
}

fn its_refusal(code: TransportErrorCode, reason: &[u8]) -> String {
    let cause = match alert(code) {
        Some(CERTIFICATE_REQUIRED) => "it asked for a certificate and got none",
        Some(UNKNOWN_CA | DECRYPT_ERROR) => "it says that our certificate is not of its job",
        Some(CERTIFICATE_EXPIRED) => "it says that our certificate has expired or is not valid yet",
        Some(BAD_CERTIFICATE) => "it says that we are not the member it dialled",
        Some(NO_APPLICATION_PROTOCOL) => "it says that we do not speak its protocol (ALPN)",
        Some(PROTOCOL_VERSION) => "it says that we do not speak its version of TLS",
        Some(_) => "it gave up the TLS handshake",
        None if code == TransportErrorCode::CONNECTION_REFUSED => "it refuses connections",
        None => "it closed the connection",
    };
    with_details(cause, reason)
}

fn with_details(cause: &str, details: &[u8]) -> String {
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

    #[test]
    fn alerts_are_read_from_crypto_codes_only() {
        assert_eq!(alert(TransportErrorCode::crypto(48)), Some(48));
        assert_eq!(alert(TransportErrorCode::PROTOCOL_VIOLATION), None);
    }
}
