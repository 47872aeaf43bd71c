//! Several hosts on one machine: network namespaces that are joined to one switch.
//!
//! ```text
//!  host 0 ── 10.77.0.1 ──┐                     namespace paceline-PID-N-h0
//!  host 1 ── 10.77.0.2 ──┼── switch 10.77.0.254   paceline-PID-N-switch; the launcher runs here
//!  host 2 ── 10.77.0.3 ──┘
//! ```
//!
//! Where the kernel has IPv6, hosts have addresses of that too: fd00:77::1 and following, the switch fd00:77::fe.
//!
//! Without faults the links are veth pairs on a bridge, as fast as the kernel is. With faults every host has a TUN
//! device instead, and a [`Relay`] of ours carries the packets between them: the kernels that we meet have a qdisc for
//! rates (tbf) and none for delay, loss and order (netem).
//!
//! Processes get into a namespace by `nsenter`, so that no thread of ours ever changes its own. A [`Bed`] takes its
//! namespaces away when it is dropped, and when its process ends in any other way: see `janitor`.
//!
//! Needs root (`CAP_SYS_ADMIN` and `CAP_NET_ADMIN`), iproute2 and `/dev/net/tun`; [`missing`] says in one line what is
//! not there. Used by `paceline local`, `cargo xtask hosts`, `cargo xtask peers --between-hosts` and the tests of the launcher.

mod bed;
mod command;
mod janitor;
mod path;
mod relay;
mod tun;

pub use bed::{
    Bed, NETWORK, Plan, SWITCH_ADDRESS, SWITCH_ADDRESS_V6, has_ipv6, host_address, host_address_v6, missing,
};
pub use path::Faults;
pub use relay::{Counts, Relay};

/// Why there is no test bed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The plan makes no sense.
    #[error("{reason}")]
    Usage {
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// A command of the system failed.
    #[error("`{words}`: {reason}")]
    Command {
        /// The command as a person would type it.
        words: String,
        /// Its first line on standard error.
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {what}: {reason}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        reason: String,
    },
}
