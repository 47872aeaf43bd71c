//! The endpoint, and handshakes that others begin.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use quinn_proto::{ClientConfig, ConnectError, ConnectionError, EndpointConfig, ServerConfig, VarInt};

use super::background;
use super::connection::Connecting;
use super::core::Core;
use super::shared::Shared;
use crate::io::IoHandle;
use crate::quic::socket::Socket;

/// A socket with its connections. Cheap to clone; connections outlive the last clone.
#[derive(Clone, Debug)]
pub(in crate::quic) struct Endpoint {
    owner: Arc<Owner>,
}

#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
}

/// A handshake that somebody has begun. Dropping it ignores it.
#[derive(Debug)]
pub(in crate::quic) struct Incoming {
    shared: Arc<Shared>,
    /// `None` once it has been decided.
    proto: Option<quinn_proto::Incoming>,
}

impl Endpoint {
    /// An endpoint over `socket`, driven on the I/O thread while no [`Caller`](super::Caller) does.
    ///
    /// # Errors
    /// When the thread has ended or has no event queue for the socket.
    pub(in crate::quic) fn open(
        io: &IoHandle,
        socket: Arc<Socket>,
        config: EndpointConfig,
        server: ServerConfig,
    ) -> io::Result<Self> {
        let core = Core::new(socket.clone(), config, server);
        let shared = Arc::new(Shared::new(socket, core));
        let registered = io.inside(|| background::Registered::new(&shared))?;
        io.spawn(background::run(shared.clone(), registered));
        Ok(Self { owner: Arc::new(Owner { shared }) })
    }

    /// Begins to dial.
    ///
    /// # Errors
    /// When the address or name cannot be dialled from here, or the endpoint is closed.
    pub(in crate::quic) fn connect(
        &self,
        config: ClientConfig,
        addr: SocketAddr,
        server_name: &str,
    ) -> Result<Connecting, ConnectError> {
        let shared = &self.owner.shared;
        let id = shared.act(|core, now| {
            let id = core.connect(now, config, addr, server_name)?;
            core.send(now);
            Ok::<_, ConnectError>(id)
        })?;
        Ok(Connecting::new(shared.clone(), id))
    }

    /// Waits for the next handshake; `None` when the endpoint is closed.
    pub(in crate::quic) async fn accept(&self) -> Option<Incoming> {
        let shared = &self.owner.shared;
        let proto = poll_fn(|cx| shared.act(|core, _| core.poll_incoming(cx.waker()))).await?;
        Some(Incoming { shared: shared.clone(), proto: Some(proto) })
    }

    /// Closes all connections at once, tells the peers why, and takes no new ones.
    pub(in crate::quic) fn close(&self, code: VarInt, reason: &'static [u8]) {
        self.owner.shared.act(|core, now| {
            core.close_all(now, code, &Bytes::from_static(reason));
            core.send(now)
        });
    }

    /// Waits until no connection is left, and nothing of a closed one that could be repeated.
    pub(in crate::quic) async fn wait_idle(&self) {
        let is_idle =
            |cx: &mut std::task::Context<'_>| match self.owner.shared.act(|core, _| core.is_idle(cx.waker()))
            {
                true => Poll::Ready(()),
                false => Poll::Pending,
            };
        poll_fn(is_idle).await;
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.owner.shared
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.release();
    }
}

impl Incoming {
    /// Goes on with the handshake.
    ///
    /// # Errors
    /// Why it cannot go on.
    pub(in crate::quic) fn accept(mut self) -> Result<Connecting, ConnectionError> {
        let proto = self.take();
        let id = self.shared.act(|core, now| {
            let id = core.accept(now, proto)?;
            core.send(now);
            Ok::<_, ConnectionError>(id)
        })?;
        Ok(Connecting::new(self.shared.clone(), id))
    }

    /// Has the client prove that its address is its own before anything is kept for it.
    pub(in crate::quic) fn retry(mut self) {
        let proto = self.take();
        self.shared.act(|core, _| core.retry(proto));
    }

    /// Answers nothing; the client tries again by itself.
    pub(in crate::quic) fn ignore(self) {
        drop(self);
    }

    /// Whether the client may be asked to prove its address.
    pub(in crate::quic) fn may_retry(&self) -> bool {
        self.proto.as_ref().is_some_and(quinn_proto::Incoming::may_retry)
    }

    /// Where the client seems to be.
    pub(in crate::quic) fn remote_address(&self) -> SocketAddr {
        self.proto.as_ref().expect("decided only when it is given away").remote_address()
    }

    fn take(&mut self) -> quinn_proto::Incoming {
        self.proto.take().expect("decided only when it is given away")
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(proto) = self.proto.take() {
            self.shared.act(|core, _| core.ignore(proto));
        }
    }
}
