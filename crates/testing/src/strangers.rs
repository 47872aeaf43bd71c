//! What strangers send to the ports of a job: handshakes that nobody will go on with, and bytes of no protocol.
//!
//! Everything is made beforehand, so that an attack costs its sender no more than the system calls.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use quinn_proto::crypto::rustls::QuicClientConfig;
use quinn_proto::{ClientConfig, Endpoint, EndpointConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

use crate::reference::Numbers;

/// The protocol of links over QUIC in the TLS handshake, as a member names it.
pub const OVER_QUIC: &[u8] = b"paceline/1";

/// The same over TCP.
pub const OVER_TCP: &[u8] = b"paceline-tcp/1";

/// The same for launchers that are no members yet.
pub const BOOTSTRAP: &[u8] = b"paceline-boot";

/// Whom strangers ask for.
const NAME: &str = "somebody.example";

/// A TLS client that believes every server, with the certificate and key of a PEM bundle or with none.
///
/// # Panics
/// If the bundle does not begin with a key and a certificate that fit together.
pub fn tls_config(bundle: Option<&str>, protocol: &[u8]) -> rustls::ClientConfig {
    // A share for one exchange of keys alone: the first message then fits a datagram, and the server has all it needs to
    // do the expensive part.
    let provider = CryptoProvider { kx_groups: vec![kx_group::X25519], ..default_provider() };
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(provider.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider knows TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
    let mut config = match bundle {
        None => builder.with_no_client_auth(),
        Some(bundle) => {
            let key = PrivateKeyDer::from_pem_slice(bundle.as_bytes()).expect("a key");
            let leaf = CertificateDer::from_pem_slice(bundle.as_bytes()).expect("a certificate");
            builder.with_client_auth_cert(vec![leaf], key).expect("they fit")
        }
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    config
}

/// The first messages of `count` TLS handshakes over TCP, each complete.
///
/// # Panics
/// If TLS cannot be set up.
pub fn client_hellos(count: usize, protocol: &[u8]) -> Vec<Vec<u8>> {
    let config = Arc::new(tls_config(None, protocol));
    let hello = |_| {
        let name = NAME.try_into().expect("a name");
        let mut client = rustls::ClientConnection::new(config.clone(), name).expect("good settings");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("a vector takes everything");
        bytes
    };
    (0..count).map(hello).collect()
}

/// The first datagrams of `count` QUIC handshakes, each with a complete first message of TLS.
///
/// # Panics
/// If QUIC cannot be set up.
pub fn initial_datagrams(count: usize) -> Vec<Vec<u8>> {
    let crypto = QuicClientConfig::try_from(tls_config(None, OVER_QUIC)).expect("a suite of QUIC's");
    let config = ClientConfig::new(Arc::new(crypto));
    let mut endpoint = Endpoint::new(Arc::new(EndpointConfig::default()), None, true, None);
    let (now, nowhere) = (Instant::now(), SocketAddr::from(([127, 0, 0, 1], 1)));
    let datagram = |_| {
        let (_, mut connection) =
            endpoint.connect(now, config.clone(), nowhere, NAME).expect("good settings");
        let mut bytes = Vec::new();
        let transmit = connection.poll_transmit(now, 1, &mut bytes).expect("a client speaks first");
        assert_eq!(transmit.size, bytes.len(), "one datagram");
        assert!(connection.poll_transmit(now, 1, &mut Vec::new()).is_none(), "the first message fits it");
        bytes
    };
    (0..count).map(datagram).collect()
}

/// `len` bytes of no protocol; the same for the same seed.
pub fn garbage(seed: u64, len: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..len.div_ceil(8)).flat_map(|_| numbers.draw().to_le_bytes()).take(len).collect()
}

/// Believes every server: for strangers, and for programs that do not care whom they measure.
pub struct Gullible(CryptoProvider);

impl Gullible {
    /// With this provider's algorithms.
    pub fn new(provider: CryptoProvider) -> Self {
        Self(provider)
    }
}

impl fmt::Debug for Gullible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gullible")
    }
}

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_first_message_is_another_one() {
        for mut messages in [initial_datagrams(20), client_hellos(20, OVER_TCP)] {
            messages.sort();
            messages.dedup();
            assert_eq!(messages.len(), 20);
        }
        assert!(initial_datagrams(3).iter().all(|datagram| datagram.len() == 1200));
    }
}
