//! Ranks as processes, over QUIC with mutual TLS.
//!
//! ```text
//!  caller's thread                        thread "paceline-io" (one per process)
//!  QuicTransport::try_send ── poll ──┐    quinn's drivers: packets, acknowledgements, timers
//!  QuicTransport::try_recv ── poll ──┴──▶ stream state under the connection's lock
//!  send_control / try_recv_control ◀────▶ two small tasks per link
//! ```
//!
//! Data does not hop between threads on its way through us: the caller's thread polls quinn's streams
//! with the waker of its [`Parker`](crate::park::Parker). Encryption, packets and timers run on the
//! [`IoThread`].
//!
//! | file | what it does |
//! |---|---|
//! | `io` | the I/O thread and the handle to it |
//! | `tls` | rustls and quinn settings |
//! | `socket` | the UDP socket: batch limit, and datagrams that are not QUIC |
//! | `congestion` | Cubic, with a way out for the close frame |
//! | `close` | close codes, and connection errors in words |
//! | `connection` | an authenticated connection and its message lanes |
//! | `endpoint` | dialling and accepting; who is let in |
//! | `mesh` | one link to every other rank of an epoch |
//! | `transport` | the links as a [`Transport`](crate::Transport) |
//!
//! What this module refuses: TLS below 1.3, peers without a certificate of the job, session
//! resumption, 0-RTT and connection migration (a member that comes back is a new incarnation). It
//! installs no global runtime, subscriber or crypto provider.

mod close;
mod congestion;
mod connection;
mod endpoint;
mod io;
mod mesh;
mod socket;
mod tls;
mod transport;

pub use connection::{Connection, MessageReceiver, MessageSender};
pub use endpoint::Endpoint;
pub(crate) use endpoint::PROTOCOL_VERSION;
pub use io::{IoHandle, IoThread};
pub use mesh::{Member, Roster};
pub use transport::QuicTransport;
