//! NCCL's network plugin over Paceline's links between hosts: an unmodified program on NCCL (PyTorch's DDP or FSDP)
//! gets authenticated, encrypted traffic by `NCCL_NET_PLUGIN=…/libnccl-net-paceline.so`.
//!
//! ```text
//! NCCL's proxy threads ─▶ v8, v11 ─▶ comms ─▶ sender, receiver ─▶ paceline_transport::pair ─▶ TLS or QUIC
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`abi`] | NCCL's structs and constants |
//! | [`v8`], [`v11`] | the two function tables that NCCL looks up |
//! | `calls` | what both have in common: pointers in, results out, no panic across |
//! | `comms` | what NCCL's opaque pointers stand for |
//! | `sender`, `receiver` | the two ends of a connection: who may send when, and what is done |
//! | `message` | what they say to each other |
//! | `handle` | what a listener gives NCCL for the dialler |
//! | `plugin`, `settings` | this process: its identity, interfaces and I/O thread |
//! | `memory` | NCCL's buffers as slices |
//! | `log` | NCCL's logger |
//!
//! Data moves on the thread that calls, which is NCCL's proxy thread: encryption and decryption go straight between
//! its buffers and the sockets. So no other thread touches NCCL's memory, and after a close nobody does.
//!
//! What it refuses: device memory (NCCL copies through host memory), and to run without credentials unless
//! `PACELINE_INSECURE=1` says so. The environment is read here: NCCL loads this without a runtime of ours above it.

pub mod abi;
mod calls;
mod comms;
#[cfg(test)]
mod exchange_tests;
mod failure;
mod handle;
mod log;
mod memory;
mod message;
mod plugin;
mod receiver;
mod sender;
mod settings;
pub mod v11;
pub mod v8;
