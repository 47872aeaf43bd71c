//! How the members of a job prove who they are, on every kind of link: rustls settings for both sides.
//!
//! TLS 1.3 only, a certificate of the job's authority on both sides, neither resumption nor early data.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CipherSuite, RootCertStore};

use crate::Error;
use crate::identity::Identity;

/// Settings for dialling as `identity`, with the protocol `alpn`.
pub(crate) fn client_config(identity: &Identity, alpn: &[u8]) -> Result<rustls::ClientConfig, Error> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_root_certificates(roots(identity)?)
        .with_client_cert_resolver(identity.resolver());
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.resumption = Resumption::disabled();
    tls.enable_early_data = false;
    Ok(tls)
}

/// Settings for accepting as `identity`; clients need a certificate of the same authority.
pub(crate) fn server_config(identity: &Identity, alpn: &[u8]) -> Result<rustls::ServerConfig, Error> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(identity)?.into(), provider.clone())
        .build()
        .map_err(unusable)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(identity.resolver());
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;
    Ok(tls)
}

/// aws-lc-rs with AES-128-GCM first: as safe here as AES-256 and the fastest with VAES.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

fn roots(identity: &Identity) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.authority()).map_err(unusable)?;
    Ok(roots)
}

pub(crate) fn unusable(reason: impl ToString) -> Error {
    Error::Identity { reason: reason.to_string() }
}
