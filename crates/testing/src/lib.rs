//! One list of behaviours that every transport and back end must pass.
//!
//! A [`Behaviour`] is what one rank does and asserts; whoever runs the list provides the group: threads
//! over `mem` (collectives/tests), processes over QUIC (launcher/tests). A rank that sees something
//! else panics, which fails the test it runs in.
//!
//! [`strangers`] is for those who are not in the group: what attackers send.

mod behaviours;
pub mod reference;
pub mod strangers;
pub mod threads;

pub use behaviours::{ALL, Behaviour};
