//! Finding the other pods of a job: they come up in any order, minutes apart; their names appear late, lead to an
//! address that is no longer theirs, or resolve before anybody listens.
//!
//! What is looked for next, and what is said about it, is decided in [`search`], without clock, chance or network.
//! [`Guide`] finds the pod where launchers meet, [`Lookout`] finds out for launcher 0 why those are missing that have not
//! come. It refuses to conclude anything from a name alone: a pod has come when its launcher has, by the rendezvous.

mod guide;
mod lookout;
mod resolver;
pub mod search;

pub use guide::Guide;
pub use lookout::{Lookout, Wanted};
pub use resolver::Resolver;
