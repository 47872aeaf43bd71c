//! Why a connection ended: our close codes, and every other cause in words.

use quinn_proto::{ConnectionError, TransportErrorCode, VarInt};

use super::driver;
use super::tls::IDLE_TIMEOUT;
pub(super) use crate::close::CloseCode;
use crate::close::{self, quote, with_details};

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

/// The TLS alert inside a QUIC error code (RFC 9001, 4.8), if it is one.
fn alert(code: TransportErrorCode) -> Option<u8> {
    u64::from(code).checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok())
}

fn our_refusal(code: TransportErrorCode, reason: &str) -> String {
    let cause = alert(code).map_or("protocol violation", close::our_refusal);
    with_details(cause, reason.as_bytes())
}

fn its_refusal(code: TransportErrorCode, reason: &[u8]) -> String {
    let cause = match alert(code) {
        Some(alert) => close::its_refusal(alert),
        None if code == TransportErrorCode::CONNECTION_REFUSED => "it refuses connections",
        None => "it closed the connection",
    };
    with_details(cause, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_are_read_from_crypto_codes_only() {
        assert_eq!(alert(TransportErrorCode::crypto(48)), Some(48));
        assert_eq!(alert(TransportErrorCode::PROTOCOL_VIOLATION), None);
    }
}
