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
//! | `session` | rustls on a socket that never blocks |
//! | `connection` | an authenticated connection and its message lane |
//! | `endpoint` | dialling and accepting; who is let in; which data connection is whose |
//! | `first_message` | which of two services on a port a client wants |
//! | `data` | the data connection of a link, shared by the caller and the I/O thread |
//! | `waiting` | spinning, parking on sockets, and the waker |
//! | `transport` | the links as a [`Transport`](crate::Transport) |
//!
//! TCP says nothing about a process that is there and does not run, so control lanes carry signs of life.
//! The end of a TCP connection says nothing about why: only a goodbye on the control lane together with
//! TLS's own end of the data is an orderly leave, everything else is a loss.
//!
//! What this module refuses: TLS below 1.3, peers without a certificate of the job, session resumption,
//! early data, and a data connection without the ticket that its control connection was given.

mod connection;
mod data;
mod endpoint;
mod first_message;
mod session;
mod transport;
mod waiting;

pub use connection::{Connection, MessageReceiver, MessageSender};
pub use endpoint::{Dialler, Endpoint};
pub use transport::TlsTransport;
