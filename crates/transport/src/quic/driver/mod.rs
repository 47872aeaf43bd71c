//! Runs quinn-proto's protocol machine over a UDP socket, on whichever thread needs it.
//!
//! quinn's own shell gives each connection a task and hands packets from task to task; that costs a hop
//! between threads per packet for a caller outside its runtime, and it sends at most 10 datagrams per system
//! call. Here the whole state of an endpoint is one value behind one lock ([`core::Core`]), and whoever wants
//! something *drives* it: takes packets from the socket, hands them to their connections, fires timers, sends,
//! and wakes who waits. The wire is the same; a plain quinn peer notices no difference.
//!
//! ```text
//!  caller of a collective: Caller::spin, wait, pause ─┐
//!  control plane: futures of the streams ─────────────┼─▶ Shared::act ─▶ Core: receive, timers, send
//!  background task, when nobody else drives ──────────┘        └─ then, outside the lock: wakers
//! ```
//!
//! Who drives is settled by one rule: the background task keeps its hands (and the socket out of its event
//! queue) off while a caller has driven within [`shared::LINGER`], and looks again after that. A caller that
//! leaves work behind says so ([`Caller::pause`]) and the task takes over at once.
//!
//! | file | what it does |
//! |---|---|
//! | `core` | the state of an endpoint and one turn of its loop; takes the time as an argument |
//! | `entry` | one connection: what happened to it, and who waits for that |
//! | `pool` | memory for large batches, used again |
//! | `shared` | the lock, who is woken after it, and when the background task must look |
//! | `background` | the task on the I/O thread |
//! | `caller` | driving from the thread of a collective: spin, park |
//! | `endpoint`, `connection`, `stream` | the handles, with quinn's names and meanings |

mod background;
mod caller;
mod connection;
mod core;
mod endpoint;
mod entry;
mod pool;
mod shared;
mod stream;

pub(super) use caller::Caller;
pub(super) use connection::Connection;
pub(super) use endpoint::{Endpoint, Incoming};
pub(super) use stream::{ReadError, ReadExactError, RecvStream, SendStream, StoppedError, WriteError};
