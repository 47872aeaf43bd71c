//! Handles to connections.

use std::any::Any;
use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use quinn_proto::{ConnectionError, Dir, StreamId, VarInt};

use super::core::Id;
use super::shared::Shared;
use super::stream::{RecvStream, SendStream};

/// A connection. Cheap to clone; closed when the last clone and the last stream are dropped.
#[derive(Clone)]
pub(in crate::quic) struct Connection {
    handle: Arc<Handle>,
}

/// A connection whose handshake is going on. Dropping it gives up.
#[derive(Debug)]
pub(in crate::quic) struct Connecting(Connection);

/// What keeps a connection open.
pub(super) struct Handle {
    pub(super) shared: Arc<Shared>,
    pub(super) id: Id,
}

impl Connecting {
    pub(super) fn new(shared: Arc<Shared>, id: Id) -> Self {
        Self(Connection { handle: Arc::new(Handle { shared, id }) })
    }

    /// Waits for the end of the handshake.
    ///
    /// # Errors
    /// Why there is no connection.
    pub(in crate::quic) async fn connected(self) -> Result<Connection, ConnectionError> {
        let Handle { shared, id } = &*self.0.handle;
        poll_fn(|cx| {
            shared.act(|core, _| {
                let entry = core.entry(*id);
                match &entry.error {
                    _ if entry.connected => Poll::Ready(Ok(())),
                    Some(error) => Poll::Ready(Err(error.clone())),
                    None => {
                        entry.await_change(cx.waker());
                        Poll::Pending
                    }
                }
            })
        })
        .await?;
        Ok(self.0)
    }
}

impl Connection {
    /// Opens a stream in both directions, as soon as the peer allows one. The peer notices it with the first
    /// byte on it.
    ///
    /// # Errors
    /// How the connection ended.
    pub(in crate::quic) async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        self.next_stream(|proto| proto.streams().open(Dir::Bi)).await
    }

    /// Waits for the peer to open a stream in both directions.
    ///
    /// # Errors
    /// How the connection ended.
    pub(in crate::quic) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        self.next_stream(|proto| proto.streams().accept(Dir::Bi)).await
    }

    /// Closes the connection at once and tells the peer why; what is on its way is lost.
    pub(in crate::quic) fn close(&self, code: VarInt, reason: &[u8]) {
        let reason = Bytes::copy_from_slice(reason);
        self.handle.shared.act(|core, now| {
            core.close(now, self.handle.id, code, reason);
            core.send(now)
        });
    }

    /// Waits until the connection has ended and returns how.
    pub(in crate::quic) async fn closed(&self) -> ConnectionError {
        poll_fn(|cx| {
            self.handle.shared.act(|core, _| {
                let entry = core.entry(self.handle.id);
                match &entry.error {
                    Some(error) => Poll::Ready(error.clone()),
                    None => {
                        entry.await_change(cx.waker());
                        Poll::Pending
                    }
                }
            })
        })
        .await
    }

    /// How the connection ended, if it has.
    pub(in crate::quic) fn close_reason(&self) -> Option<ConnectionError> {
        self.with(|entry| entry.error.clone())
    }

    /// The peer's address as the socket has it.
    pub(in crate::quic) fn remote_address(&self) -> SocketAddr {
        self.with(|entry| entry.proto.remote_address())
    }

    /// The peer's verified certificates: a `Vec<CertificateDer>`.
    pub(in crate::quic) fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.with(|entry| entry.proto.crypto_session().peer_identity())
    }

    /// The largest datagram that is known to get through to the peer.
    pub(in crate::quic) fn datagram_bytes(&self) -> usize {
        self.with(|entry| entry.proto.current_mtu().into())
    }

    fn with<T>(&self, look: impl FnOnce(&mut super::entry::Entry) -> T) -> T {
        self.handle.shared.act(|core, _| look(core.entry(self.handle.id)))
    }

    async fn next_stream(
        &self,
        take: impl Fn(&mut quinn_proto::Connection) -> Option<StreamId>,
    ) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = poll_fn(|cx| {
            self.with(|entry| {
                // Also if a stream is there: nobody would answer on it.
                if let Some(error) = &entry.error {
                    return Poll::Ready(Err(error.clone()));
                }
                match take(&mut entry.proto) {
                    Some(id) => Poll::Ready(Ok(id)),
                    None => {
                        entry.await_change(cx.waker());
                        Poll::Pending
                    }
                }
            })
        })
        .await?;
        Ok((SendStream::new(self.handle.clone(), id), RecvStream::new(self.handle.clone(), id)))
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.handle.fmt(f)
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.act(|core, now| {
            core.release(now, self.id);
            core.send(now)
        });
    }
}
