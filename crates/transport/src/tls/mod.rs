//! Ranks as processes, over TLS 1.3 on TCP, with the same certificates as QUIC.
//!
//! The fastest encrypted links, and those for networks that block or throttle UDP.
//!
//! ```text
//!  caller's thread                        thread "paceline-io" (one per process)
//!  TlsTransport::try_send ── encrypt ──▶ socket         two connections per link:
//!  TlsTransport::try_recv ◀─ decrypt ─── socket         data, driven by the caller, and
//!  send_control / try_recv_control ◀────▶ two tasks     control, driven by tasks
//!                                         flusher       sends what the caller left behind
//! ```
//!
//! | file | what it does |
//! |---|---|
//! | `session` | rustls on a socket that never blocks, and that may be exchanged |
//! | `channel` | TLS, or for links over plain TCP nothing, between a session and its socket |
//! | `kept` | encrypted bytes on their way, which may have to be sent again |
//! | `unacknowledged` | how many of them have not arrived |
//! | `mend` | making a connection again that broke though both sides live |
//! | `connection` | an authenticated connection and its message lane |
//! | `endpoint` | dialling and accepting; who is let in; which data connection is whose |
//! | `first_message` | which of two services on a port a client wants |
//! | `data` | the data connection of a link, shared by the caller and the I/O thread |
//! | `waiting` | spinning, parking on sockets, and the waker |
//! | `transport` | the links as a [`Transport`](crate::Transport) |
//! | `striped` | the links over several interfaces as one |
//!
//! TCP says nothing about a process that is there and does not run, so control lanes carry signs of life.
//! The end of a TCP connection says nothing about why: only a goodbye on the control lane together with
//! TLS's own end of the data is an orderly leave, everything else is a loss.
//!
//! What this module refuses: TLS below 1.3, peers without a certificate of the job, session resumption,
//! early data, and a data connection without the ticket that its control connection was given. Data leaves TLS only
//! where both endpoints were [bound for that](Endpoint::bind_plain), by somebody who was told what it means.

mod barred;
mod channel;
mod connection;
mod data;
mod endpoint;
mod first_message;
mod kept;
mod mend;
mod session;
mod striped;
mod transport;
mod unacknowledged;
mod waiting;

pub use connection::{Connection, MessageReceiver, MessageSender};
pub use endpoint::{Dialler, Endpoint};
pub use striped::StripedTransport;
pub use transport::TlsTransport;
