//! How a node of a job gets its certificates: launchers that share the job secret meet here first.
//!
//! ```text
//! launcher of node 2                                launcher 0, which has the job's authority
//!        TLS 1.3 over TCP; the server's key is derived from the secret and pinned by the dialler
//! Greeting{versions, release}                ─────▶
//!                                            ◀───── Greeting{versions, release}
//! Join{node, nodes, ranks per node, proof}   ─────▶  the proof is an HMAC over this channel's exporter
//!                                            ◀───── Welcome{job, authority, life} | Refused{reason}
//! Certify{member, public key, signature}     ─────▶  for its launcher and each of its workers
//!                                            ◀───── Certified{leaf} | Refused{reason}
//! ```
//! Private keys are made where they are used and never travel. The dialler knows that it talks to a holder of
//! the secret from the handshake on, the server when it has checked the proof: a key derived from the secret
//! over the channel's own exporter (RFC 8446, 7.5) and the request, so that it is worth nothing on another
//! channel (no replay, nobody in between).
//!
//! TCP, since it is needed where UDP is blocked too, and so that a port without a listener is told from a
//! lost packet. It shares the rendezvous's port: the first TLS message says which of both is wanted.
//!
//! | file | what it does |
//! |---|---|
//! | `greeting` | which versions a release speaks; a layout that never changes |
//! | `channel` | the TLS settings, the proof, messages on the stream |
//! | `server` | launcher 0's side; how many strangers it serves at a time |
//! | `client` | the other launchers' side: one attempt |
//!
//! What this module refuses: to know what nodes and ranks are for (a [`Registrar`] decides who is let in), to
//! try again, and to speak to anybody who does not know the secret.

mod channel;
mod client;
mod greeting;
mod server;

use serde::{Deserialize, Serialize};

pub use client::{Certified, Failure, certify};
pub use server::{BootServer, CONVERSATIONS_LIMIT, Registrar, Verdict};

use crate::identity::CertificateRequest;

/// What a node says about itself when it asks for certificates.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Its number among the nodes.
    pub node: u32,
    /// How many nodes it thinks the job has.
    pub nodes: u32,
    /// With how many of them it thinks the job runs too.
    pub least_nodes: u32,
    /// How many ranks it runs.
    pub ranks_per_node: u32,
    /// The name of the run that it was started for: jobs one after the other may have the same secret and endpoint.
    pub run_id: String,
    /// A random number of this launcher process: by it a launcher that asks again is told from another one
    /// that claims the same node.
    pub incarnation: u128,
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the incarnation: whoever knew it could ask in this node's place.
        let Self { node, nodes, ranks_per_node, .. } = self;
        write!(f, "node {node} of {nodes} with {ranks_per_node} ranks")
    }
}

/// From the dialler.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Ask {
    Join { claim: Claim, proof: Vec<u8> },
    Certify(CertificateRequest),
}

/// From the server.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    Welcome {
        job: String,
        authority: Vec<u8>,
        valid_for_ms: u64,
    },
    Certified {
        leaf: Vec<u8>,
    },
    /// `for_now`: asking again in a moment may help.
    Refused {
        reason: String,
        for_now: bool,
    },
}
