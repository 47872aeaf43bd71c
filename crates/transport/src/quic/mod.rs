//! Ranks as processes, over QUIC with mutual TLS.
//!
//! ```text
//!  caller's thread                          thread "paceline-io" (one per process)
//!  QuicTransport::try_send, try_recv ──┐    two small tasks per link: its control lane
//!  QuicTransport::spin, wait, pause ───┴─▶ driver ◀─── a task that drives while no caller does
//!                                            └─▶ quinn-proto, UDP socket
//! ```
//!
//! Data does not hop between threads on its way through us: the caller's thread encrypts, sends and
//! receives. While it computes, the [`IoThread`] keeps the connections alive.
//!
//! | file | what it does |
//! |---|---|
//! | `settings` | what a user may say about the network |
//! | `tls` | quinn-proto's settings |
//! | `knock` | what datagrams must carry for the kernel to let them in |
//! | `socket` | the UDP socket: batches, and datagrams that are not QUIC |
//! | `driver` | runs quinn-proto over the socket |
//! | `congestion` | Cubic, with a way out for the close frame |
//! | `close` | close codes, and connection errors in words |
//! | `connection` | an authenticated connection and its message lanes |
//! | `endpoint` | dialling and accepting; who is let in |
//! | `transport` | the links as a [`Transport`](crate::Transport) |
//!
//! What this module refuses: TLS below 1.3, peers without a certificate of the job, session
//! resumption, 0-RTT and connection migration (a member that comes back is a new incarnation). It
//! installs no global runtime, subscriber or crypto provider.

mod close;
mod congestion;
mod connection;
mod driver;
mod endpoint;
mod knock;
mod settings;
mod socket;
mod tls;
mod transport;

pub use connection::{Connection, MessageReceiver, MessageSender};
pub use endpoint::Endpoint;
pub(crate) use endpoint::PROTOCOL_VERSION;
pub use knock::Knock;
pub use settings::{Profile, Settings};
pub use transport::QuicTransport;

pub use crate::io::{IoHandle, IoThread};
pub use crate::mesh::{Member, Roster};
