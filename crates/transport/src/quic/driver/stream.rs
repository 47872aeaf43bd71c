//! Streams: futures for the control plane, polling for the data plane.

use std::future::{Future, poll_fn};
use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn_proto::{ClosedStream, ConnectionError, FinishError, ReadableError, StreamId, VarInt};
use thiserror::Error;

use super::connection::Handle;

/// Bytes copied to a stream before a batch of it is sent: as many as one holds, so that batches are full and
/// encryption finds in the cache what was just copied.
const WRITE_BYTES: usize = 64 * 1024;

/// The sending half of a stream. Dropping it ends the stream in order.
#[derive(Debug)]
pub(crate) struct SendStream {
    handle: Arc<Handle>,
    id: StreamId,
}

/// The receiving half of a stream. Dropping it tells the peer to stop.
#[derive(Debug)]
pub(crate) struct RecvStream {
    handle: Arc<Handle>,
    id: StreamId,
    end: Option<End>,
}

/// How a stream's data ended.
#[derive(Clone, Copy, Debug)]
enum End {
    Finished,
    Reset(VarInt),
}

/// Why a stream takes no bytes.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(in crate::quic) enum WriteError {
    /// The peer does not want any.
    #[error("the peer stopped the stream with code {0}")]
    Stopped(VarInt),
    /// The connection has ended.
    #[error("connection lost: {0}")]
    ConnectionLost(ConnectionError),
    /// The stream was ended from this side.
    #[error("the stream has ended")]
    ClosedStream,
}

/// Why nothing can be read from a stream.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(in crate::quic) enum ReadError {
    /// The peer broke it off.
    #[error("the peer reset the stream with code {0}")]
    Reset(VarInt),
    /// The connection has ended.
    #[error("connection lost: {0}")]
    ConnectionLost(ConnectionError),
    /// The stream was stopped from this side.
    #[error("the stream has ended")]
    ClosedStream,
}

/// Why fewer bytes came than were asked for.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(in crate::quic) enum ReadExactError {
    /// The stream ended in order.
    #[error("the stream ended early")]
    FinishedEarly,
    /// It did not.
    #[error(transparent)]
    ReadError(#[from] ReadError),
}

/// Why it is not known whether the peer has got everything.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(in crate::quic) enum StoppedError {
    /// The connection has ended.
    #[error("connection lost: {0}")]
    ConnectionLost(ConnectionError),
}

impl SendStream {
    pub(super) fn new(handle: Arc<Handle>, id: StreamId) -> Self {
        Self { handle, id }
    }

    /// Takes as many bytes of `parts`, in order, as the windows let it, and sends what the network lets it;
    /// returns how many it took. `Pending` when it takes none; the waker fires when it may.
    pub(in crate::quic) fn poll_write_parts(
        &mut self,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<Result<usize, WriteError>> {
        let mut taken = 0;
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                let piece = &rest[..rest.len().min(WRITE_BYTES)];
                match self.write_piece(cx, piece) {
                    Poll::Ready(Ok(count)) => {
                        taken += count;
                        rest = &rest[count..];
                    }
                    // Found again, and then reported, by the next call.
                    _ if taken > 0 => return Poll::Ready(Ok(self.send(taken))),
                    nothing => return nothing,
                }
            }
        }
        Poll::Ready(Ok(self.send(taken)))
    }

    /// Writes a part of `piece`, and sends a batch if that makes a full one: a frame's head waits for its
    /// payload, and the end of a long payload for its caller's last word.
    fn write_piece(&self, cx: &mut Context<'_>, piece: &[u8]) -> Poll<Result<usize, WriteError>> {
        let Handle { shared, id } = &*self.handle;
        shared.act(|core, now| {
            let entry = core.entry(*id);
            if let Some(error) = &entry.error {
                return Poll::Ready(Err(WriteError::ConnectionLost(error.clone())));
            }
            // Whoever waits has found the window full since it last opened.
            let waits = entry.awaits_writable(self.id);
            let count = match waits {
                true => Err(quinn_proto::WriteError::Blocked),
                false => core.write(*id, self.id, piece),
            };
            let count = match count {
                Ok(count) => count,
                Err(quinn_proto::WriteError::Blocked) => {
                    core.entry(*id).await_writable(self.id, cx.waker());
                    return Poll::Pending;
                }
                Err(quinn_proto::WriteError::Stopped(code)) => {
                    return Poll::Ready(Err(WriteError::Stopped(code)));
                }
                Err(quinn_proto::WriteError::ClosedStream) => {
                    return Poll::Ready(Err(WriteError::ClosedStream));
                }
            };
            core.queue(*id);
            if count == WRITE_BYTES {
                core.send_batches(now, 1);
            }
            Poll::Ready(Ok(count))
        })
    }

    fn send(&self, taken: usize) -> usize {
        self.handle.shared.act(|core, now| core.send(now));
        taken
    }

    /// Writes at least one byte of `bytes` and returns how many.
    ///
    /// # Errors
    /// Why the stream takes none.
    pub(in crate::quic) async fn write(&mut self, bytes: &[u8]) -> Result<usize, WriteError> {
        poll_fn(|cx| self.poll_write_parts(cx, &[IoSlice::new(bytes)])).await
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// Why the stream did not take all.
    pub(in crate::quic) async fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), WriteError> {
        while !bytes.is_empty() {
            let written = self.write(bytes).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Ends the stream in order.
    ///
    /// # Errors
    /// When it has ended before.
    pub(in crate::quic) fn finish(&mut self) -> Result<(), ClosedStream> {
        let Handle { shared, id } = &*self.handle;
        shared.act(|core, now| match core.entry(*id).proto.send_stream(self.id).finish() {
            Ok(()) => {
                core.queue(*id);
                core.send(now);
                Ok(())
            }
            Err(FinishError::ClosedStream) => Err(ClosedStream::default()),
            // The peer does not care how it ends.
            Err(FinishError::Stopped(_)) => Ok(()),
        })
    }

    /// Sends this stream's bytes before those of streams with a lower priority. The default is 0.
    ///
    /// # Errors
    /// When the stream has ended.
    pub(in crate::quic) fn set_priority(&self, priority: i32) -> Result<(), ClosedStream> {
        let Handle { shared, id } = &*self.handle;
        shared.act(|core, _| core.entry(*id).proto.send_stream(self.id).set_priority(priority))
    }

    /// Waits until the peer has everything of a finished stream (`None`), or has stopped it with a code. Keeps
    /// the connection open.
    pub(in crate::quic) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<VarInt>, StoppedError>> + Send + 'static {
        let (handle, stream) = (self.handle.clone(), self.id);
        async move {
            let Handle { shared, id } = &*handle;
            poll_fn(|cx| {
                shared.act(|core, _| {
                    let entry = core.entry(*id);
                    match (entry.proto.send_stream(stream).stopped(), &entry.error) {
                        (Err(_), _) => Poll::Ready(Ok(None)),
                        (Ok(Some(code)), _) => Poll::Ready(Ok(Some(code))),
                        (Ok(None), Some(error)) => {
                            Poll::Ready(Err(StoppedError::ConnectionLost(error.clone())))
                        }
                        (Ok(None), None) => {
                            entry.await_change(cx.waker());
                            Poll::Pending
                        }
                    }
                })
            })
            .await
        }
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        let Handle { shared, id } = &*self.handle;
        // Returned, so that it is dropped outside the lock.
        let _waker = shared.act(|core, _| {
            let entry = core.entry(*id);
            let waker = entry.forget_writer(self.id);
            if entry.error.is_none() {
                let mut stream = entry.proto.send_stream(self.id);
                if let Err(FinishError::Stopped(code)) = stream.finish() {
                    // Fails only if it has ended, which is what we want.
                    let _ = stream.reset(code);
                }
                // Not sent here: mostly the connection is about to be closed, whose reason says more.
                core.queue(*id);
            }
            waker
        });
    }
}

impl RecvStream {
    pub(super) fn new(handle: Arc<Handle>, id: StreamId) -> Self {
        Self { handle, id, end: None }
    }

    /// Copies bytes that have come into `into` and returns how many; 0 when the stream has ended in order.
    /// `Pending` when there are none now; the waker fires when there may be.
    pub(in crate::quic) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<Result<usize, ReadError>> {
        match self.end {
            _ if into.is_empty() => return Poll::Ready(Ok(0)),
            Some(End::Finished) => return Poll::Ready(Ok(0)),
            Some(End::Reset(code)) => return Poll::Ready(Err(ReadError::Reset(code))),
            None => {}
        }
        let Handle { shared, id } = &*self.handle;
        let (stream, end) = (self.id, &mut self.end);
        shared.act(|core, _| {
            let entry = core.entry(*id);
            let mut filled = 0;
            let mut streams = entry.proto.recv_stream(stream);
            let mut chunks = match streams.read(true) {
                Ok(chunks) => chunks,
                Err(ReadableError::ClosedStream | ReadableError::IllegalOrderedRead) => {
                    return Poll::Ready(Err(ReadError::ClosedStream));
                }
            };
            while filled < into.len() && end.is_none() {
                match chunks.next(into.len() - filled) {
                    Ok(Some(chunk)) => {
                        into[filled..filled + chunk.bytes.len()].copy_from_slice(&chunk.bytes);
                        filled += chunk.bytes.len();
                    }
                    Ok(None) => *end = Some(End::Finished),
                    Err(quinn_proto::ReadError::Reset(code)) => *end = Some(End::Reset(code)),
                    Err(quinn_proto::ReadError::Blocked) => break,
                }
            }
            let room = chunks.finalize().should_transmit();
            let result = match (filled, &*end, &entry.error) {
                (1.., _, _) | (0, Some(End::Finished), _) => Poll::Ready(Ok(filled)),
                (0, Some(End::Reset(code)), _) => Poll::Ready(Err(ReadError::Reset(*code))),
                (0, None, Some(error)) => Poll::Ready(Err(ReadError::ConnectionLost(error.clone()))),
                (0, None, None) => {
                    entry.await_readable(stream, cx.waker());
                    Poll::Pending
                }
            };
            if room && entry.error.is_none() {
                // The peer may send more; it is told with the next turn, of whoever drives.
                core.queue(*id);
            }
            result
        })
    }

    /// Reads what has come, at least one byte; `None` when the stream has ended in order. Cancelling it loses
    /// nothing.
    ///
    /// # Errors
    /// Why nothing will come.
    pub(in crate::quic) async fn read(&mut self, into: &mut [u8]) -> Result<Option<usize>, ReadError> {
        let wanted = !into.is_empty();
        let got = poll_fn(|cx| self.poll_read(cx, into)).await?;
        Ok((got > 0 || !wanted).then_some(got))
    }

    /// Reads until `into` is full.
    ///
    /// # Errors
    /// Why fewer bytes came.
    pub(in crate::quic) async fn read_exact(&mut self, into: &mut [u8]) -> Result<(), ReadExactError> {
        let mut filled = 0;
        while filled < into.len() {
            filled += self.read(&mut into[filled..]).await?.ok_or(ReadExactError::FinishedEarly)?;
        }
        Ok(())
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let Handle { shared, id } = &*self.handle;
        let _waker = shared.act(|core, _| {
            let entry = core.entry(*id);
            let waker = entry.forget_reader(self.id);
            if entry.error.is_none() && self.end.is_none() {
                // Fails only if it has ended, which is what we want.
                let _ = entry.proto.recv_stream(self.id).stop(VarInt::from_u32(0));
                core.queue(*id);
            }
            waker
        });
    }
}
