//! Settings of quinn-proto.
//!
//! The rustls configurations come from `credentials`, as quinn-proto's own constructors turn 0-RTT on.

use std::sync::Arc;
use std::time::Duration;

use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    AckFrequencyConfig, ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, VarInt,
};

use super::congestion::CubicUntilClose;
use super::knock::Ids;
use super::settings::Settings;
use crate::Error;
use crate::credentials::{self, unusable};
use crate::identity::Identity;

/// The protocol's name in the TLS handshake. The number is raised when releases cannot talk any more.
pub(super) const ALPN: &[u8] = b"paceline/1";

/// How long a silent peer counts as alive. A dead process is announced by its launcher long before.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often an idle connection is kept alive: several tries within the idle timeout.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// What a peer may have in flight on all streams of a connection, in windows of one stream: data, and control
/// beside it. Bounds what it can make us hold.
const CONNECTION_WINDOWS: u32 = 3;

/// What we hold for a peer until it is acknowledged, in windows of one stream: as much again as it may have
/// in flight.
const SEND_WINDOWS: u64 = 2;

/// Packets that are acknowledged together (draft-ietf-quic-ack-frequency), where the peer knows that. An
/// answer mostly comes sooner and carries the acknowledgement along; QUIC's own 2 would send a datagram more
/// for every other short message. After a loss every packet is acknowledged at once all the same.
const PACKETS_PER_ACK: u32 = 10;

/// Streams a peer may have open: a hello, one control and one data lane, and room for two more.
const STREAM_LIMIT: u32 = 5;

/// Handshakes that may wait for us, and the bytes buffered for each and for all of them.
const INCOMING_LIMIT: usize = 1024;
const INCOMING_BUFFER_BYTES: u64 = 32 * 1024;
const INCOMING_BUFFERS_BYTES: u64 = 4 * 1024 * 1024;

/// Settings for dialling as `identity`.
pub(super) fn client_config(identity: &Identity, settings: &Settings) -> Result<ClientConfig, Error> {
    let tls = credentials::client_config(identity, ALPN)?;
    let crypto = QuicClientConfig::try_from(tls).map_err(unusable)?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport_config(settings));
    Ok(config)
}

/// Settings for accepting as `identity`; clients need a certificate of the same authority.
pub(super) fn server_config(identity: &Identity, settings: &Settings) -> Result<ServerConfig, Error> {
    let tls = credentials::server_config(identity, ALPN)?;
    let crypto = QuicServerConfig::try_from(tls).map_err(unusable)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(transport_config(settings))
        .migration(false)
        .max_incoming(INCOMING_LIMIT)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFERS_BYTES);
    Ok(config)
}

/// Settings of the endpoint itself.
pub(super) fn endpoint_config(settings: &Settings) -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(settings.largest_datagram_bytes).expect("checked settings are in its limits");
    // Version 1 only, and with its fixed bit set: what else arrives is certainly not ours (`socket`).
    config.supported_versions(vec![1]).grease_quic_bit(false);
    if let Some(knock) = settings.knock {
        config.cid_generator(move || Box::new(Ids(knock)));
    }
    config
}

fn transport_config(settings: &Settings) -> Arc<TransportConfig> {
    let mut mtu_discovery = MtuDiscoveryConfig::default();
    mtu_discovery.upper_bound(settings.largest_datagram_bytes);
    let mut ack_frequency = AckFrequencyConfig::default();
    ack_frequency.ack_eliciting_threshold(VarInt::from_u32(PACKETS_PER_ACK));
    let profile = settings.profile;
    let congestion = CubicUntilClose::new(profile.initial_window_bytes(settings.largest_datagram_bytes));
    let idle = IdleTimeout::try_from(IDLE_TIMEOUT).expect("10 s is below QUIC's limit of 2^62 ms");
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAM_LIMIT))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(profile.initial_rtt())
        .initial_mtu(settings.first_datagram_bytes)
        .stream_receive_window(VarInt::from_u32(profile.stream_window_bytes()))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOWS * profile.stream_window_bytes()))
        .send_window(SEND_WINDOWS * u64::from(profile.stream_window_bytes()))
        .ack_frequency_config(Some(ack_frequency))
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu_discovery))
        .congestion_controller_factory(Arc::new(congestion));
    Arc::new(config)
}
