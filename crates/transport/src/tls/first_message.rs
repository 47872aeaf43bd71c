//! Which protocol a client wants, before anybody has answered it.
//!
//! Two services share a port: members of the job, and launchers that are not members yet. They differ in the
//! protocol that the first TLS message names (ALPN, RFC 7301). The message is looked at and left where it is.

use std::time::Duration;

use rustls::server::Acceptor;
use tokio::net::TcpStream;
use tokio::time::sleep;

/// The longest first message that is looked at, in bytes. Ours have some 300.
const LIMIT: usize = 4096;

/// The pause before the next look at a message that has come in part: a peek does not wait for more.
const PAUSE: Duration = Duration::from_millis(5);

/// Whether the client asks for `protocol` and no other. `false` for anything that is no TLS, which whoever
/// serves the port by default finds out and says. The caller limits the time.
pub(super) async fn asks_for(tcp: &TcpStream, protocol: &[u8]) -> bool {
    let mut bytes = vec![0; LIMIT];
    loop {
        let count = match tcp.peek(&mut bytes).await {
            Ok(count @ 1..) => count,
            Ok(0) | Err(_) => return false,
        };
        match asked_for(&bytes[..count]) {
            Some(protocols) => return protocols == [protocol],
            None if count == LIMIT => return false,
            None => sleep(PAUSE).await,
        }
    }
}

/// The protocols that a first message names, none for what is not one; `None` while more of it must come.
fn asked_for(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        if acceptor.read_tls(&mut bytes).is_err() {
            return Some(Vec::new());
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let protocols = accepted.client_hello().alpn();
                return Some(protocols.map_or_else(Vec::new, |all| all.map(<[u8]>::to_vec).collect()));
            }
            Ok(None) => {}
            Err(_) => return Some(Vec::new()),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::credentials;
    use crate::identity::JobAuthority;

    fn first_message(protocol: &[u8]) -> Vec<u8> {
        let authority = JobAuthority::new("job").expect("a valid job name");
        let identity = authority.issue("m", Duration::from_secs(60)).expect("a valid member name");
        let config = credentials::client_config(&identity, protocol).expect("a good identity");
        let name = "m.job.paceline.internal".try_into().expect("a name");
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).expect("good settings");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("a vector takes everything");
        bytes
    }

    #[test]
    fn a_first_message_says_its_protocol_once_it_is_complete() {
        let message = first_message(b"some-protocol");
        assert!(message.len() < LIMIT, "{} bytes", message.len());
        for len in 1..message.len() {
            assert_eq!(asked_for(&message[..len]), None, "{len} of {} bytes", message.len());
        }
        assert_eq!(asked_for(&message), Some(vec![b"some-protocol".to_vec()]));
    }

    #[test]
    fn what_is_no_tls_asks_for_nothing() {
        assert_eq!(asked_for(b"GET / HTTP/1.1\r\n\r\n"), Some(Vec::new()));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_ask_for_nothing_or_for_more(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(asked_for(&bytes).is_none_or(|protocols| protocols.is_empty()));
        }
    }
}
