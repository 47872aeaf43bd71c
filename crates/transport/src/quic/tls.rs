//! Settings of rustls and quinn.
//!
//! The rustls configurations are built here because quinn's own constructors turn 0-RTT on.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CipherSuite, RootCertStore};

use super::congestion::CubicUntilClose;
use crate::Error;
use crate::identity::Identity;

/// The protocol's name in the TLS handshake. The number is raised when releases cannot talk any more.
pub(super) const ALPN: &[u8] = b"paceline/1";

/// How long a silent peer counts as alive. A dead process is announced by its launcher long before.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often an idle connection is kept alive: several tries within the idle timeout.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// The largest UDP payload we send or take: an Ethernet jumbo frame of 9000 bytes less IPv4 and UDP
/// headers. Larger ones (loopback has 64 KiB) measured no gain (2026-07, facts/transport.md §2.2).
pub(super) const MAX_DATAGRAM: u16 = 8972;

/// What a peer may have in flight on one stream: 2 MiB fills 4 GB/s at 0.5 ms round trip.
const STREAM_WINDOW_BYTES: u32 = 2 * 1024 * 1024;

/// What a peer may have in flight on all streams of a connection; bounds what it can make us hold.
const CONNECTION_WINDOW_BYTES: u32 = 3 * STREAM_WINDOW_BYTES;

/// What we hold for a peer until it is acknowledged: as much again as it may have in flight.
const SEND_WINDOW_BYTES: u64 = 2 * STREAM_WINDOW_BYTES as u64;

/// Congestion window at the start. Cubic's default of 14 KiB makes the first collectives slow, and an
/// MTU above it would never send a full packet; inside one cluster 1 MiB is a modest first burst.
pub(super) const INITIAL_WINDOW_BYTES: u64 = 1024 * 1024;

/// Streams a peer may have open: a hello, one control and one data lane, and room for two more.
const STREAM_LIMIT: u32 = 5;

/// The first guess of the round trip. quinn's 333 ms suits the internet: a lost first packet would
/// delay a group by a second. A wrong guess costs one packet sent twice.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// Handshakes that may wait for us, and the bytes buffered for each and for all of them.
const INCOMING_LIMIT: usize = 1024;
const INCOMING_BUFFER_BYTES: u64 = 32 * 1024;
const INCOMING_BUFFERS_BYTES: u64 = 4 * 1024 * 1024;

/// Settings for dialling as `identity`.
pub(super) fn client_config(
    identity: &Identity,
    congestion: &CubicUntilClose,
) -> Result<quinn::ClientConfig, Error> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_root_certificates(roots(identity)?)
        .with_client_cert_resolver(identity.resolver());
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = Resumption::disabled();
    tls.enable_early_data = false;
    let crypto = QuicClientConfig::try_from(tls).map_err(unusable)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport_config(congestion));
    Ok(config)
}

/// Settings for accepting as `identity`; clients need a certificate of the same authority.
pub(super) fn server_config(
    identity: &Identity,
    congestion: &CubicUntilClose,
) -> Result<quinn::ServerConfig, Error> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(identity)?.into(), provider.clone())
        .build()
        .map_err(unusable)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(identity.resolver());
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;
    let crypto = QuicServerConfig::try_from(tls).map_err(unusable)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(transport_config(congestion))
        .migration(false)
        .max_incoming(INCOMING_LIMIT)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFERS_BYTES);
    Ok(config)
}

/// Settings of the endpoint itself.
pub(super) fn endpoint_config() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(MAX_DATAGRAM).expect("8972 is between QUIC's limits of 1200 and 65527");
    // Version 1 only, and with its fixed bit set: what else arrives is certainly not ours (`socket`).
    config.supported_versions(vec![1]).grease_quic_bit(false);
    config
}

fn transport_config(congestion: &CubicUntilClose) -> Arc<TransportConfig> {
    let mut mtu_discovery = MtuDiscoveryConfig::default();
    mtu_discovery.upper_bound(MAX_DATAGRAM);
    let idle = IdleTimeout::try_from(IDLE_TIMEOUT).expect("10 s is below QUIC's limit of 2^62 ms");
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAM_LIMIT))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu_discovery))
        .congestion_controller_factory(Arc::new(congestion.clone()));
    Arc::new(config)
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

fn unusable(reason: impl ToString) -> Error {
    Error::Identity { reason: reason.to_string() }
}
