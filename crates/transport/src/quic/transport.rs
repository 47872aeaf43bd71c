//! The links of a mesh as a [`Transport`].

use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use quinn_proto::ConnectionError;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::close::{CloseCode, in_words};
use super::connection::Connection;
use super::driver::{Caller, ReadError, RecvStream, SendStream, WriteError};
use super::endpoint::Endpoint;
use crate::control_lane::{
    self, CONTROL_QUEUE_LIMIT, Control, End, GIVEN_UP_GRACE, LinkState, collect_until, receive_all, send_all,
};
use crate::io::IoHandle;
use crate::mesh::{self, CloseOnDrop, Gate, LinkEndpoint, Mesh, RawLink, Roster};
use crate::pair::PairEndpoint;
use crate::{Error, Forming, Transport};

/// One rank's QUIC links to all other ranks of one epoch.
///
/// Dropping it without [`leave`](Transport::leave) closes the links as aborted, and the peers see
/// [`Error::Lost`] at once; it never blocks. A process that is killed falls silent, and its peers see
/// `Lost` after 10 s at the latest.
#[derive(Debug)]
pub struct QuicTransport {
    roster: Roster,
    io: IoHandle,
    caller: Caller,
    /// By rank; `None` at this rank.
    links: Vec<Option<Link>>,
    /// Whether this side has left or aborted.
    over: bool,
    gate: Gate<Endpoint>,
}

/// One peer's streams, as the caller's thread uses them.
#[derive(Debug)]
struct Link {
    // First, and therefore dropped first: see `RawLink`.
    connection: CloseOnDrop<Connection>,
    peer: usize,
    data_out: SendStream,
    data_in: RecvStream,
    /// How receiving data ended, if it did: every later call answers the same.
    data_in_end: Option<Error>,
    control_out: mpsc::Sender<Control>,
    /// Whether the peer counts as lost: it may still be told why, but is hardly waited for.
    given_up: bool,
    /// Ends when the peer has everything up to our goodbye, or the link is gone.
    control_sender: Option<JoinHandle<()>>,
    shared: Arc<LinkState>,
}

impl QuicTransport {
    /// Links up with all other ranks of an epoch: dials the lower ranks, is dialled by the higher ones,
    /// and tries again until `deadline`. Blocks; every rank must call it, in any order.
    ///
    /// The endpoint accepts for this transport until it and all that were [split](Transport::split) from it
    /// are dropped, and should have no other consumer.
    /// Peers of another epoch, strangers to the roster and second links are refused and logged.
    ///
    /// # Errors
    /// [`Error::TimedOut`] naming each missing rank with its address and what was seen of it;
    /// [`Error::Usage`] for a roster that does not fit this endpoint, or on the I/O thread itself.
    pub fn connect(endpoint: &Endpoint, roster: Roster, deadline: Instant) -> Result<Self, Error> {
        Self::connect_unless(endpoint, roster, deadline, std::future::pending())
    }

    /// [`connect`](QuicTransport::connect) that ends early when `give_up` completes, with its output as
    /// the reason: somebody has learnt that a rank will not come.
    ///
    /// # Errors
    /// [`Error::GaveUp`] with the reason, else as [`connect`](QuicTransport::connect).
    pub fn connect_unless(
        endpoint: &Endpoint,
        roster: Roster,
        deadline: Instant,
        give_up: impl Future<Output = String> + Send + 'static,
    ) -> Result<Self, Error> {
        roster.check(endpoint.identity())?;
        let mesh = mesh::connect(endpoint, roster, deadline, give_up)?;
        Self::over(mesh, endpoint.io().clone())
    }

    /// The largest UDP payload, in bytes, that is known to get through to `peer` by now. It grows in the first
    /// moments of a link, up to what the path and the endpoint's [`Settings`](super::Settings) allow.
    ///
    /// # Panics
    /// If there is no link to such a rank.
    pub fn datagram_bytes(&self, peer: usize) -> usize {
        let link = self.links[peer].as_ref().expect("a rank has no link to itself");
        link.connection.get().driver().datagram_bytes()
    }

    fn over(mesh: Mesh<Endpoint>, io: IoHandle) -> Result<Self, Error> {
        let Mesh { roster, links, gate } = mesh;
        let caller = Caller::new(gate.endpoint().driver(), roster.local_ranks())?;
        let waker = caller.waker();
        let to_link =
            |(peer, raw): (usize, Option<RawLink<Connection>>)| Some(Link::new(peer, raw?, &io, waker));
        let links = links.into_iter().enumerate().map(to_link).collect();
        Ok(Self { roster, caller, links, over: false, gate, io })
    }

    fn link(&mut self, peer: usize) -> (&mut Link, Context<'_>) {
        let link = self.links[peer].as_mut().expect("a rank has no link to itself");
        (link, Context::from_waker(self.caller.waker()))
    }

    fn check_not_over(&self) -> Result<(), Error> {
        if self.over {
            return Err(Error::Usage { reason: "this rank has left the epoch".to_owned() });
        }
        Ok(())
    }

    /// Ends the control lanes with `last`; returns the peers that have all of it, or have themselves
    /// ended, by the deadline.
    fn say_last(&mut self, last: &Control, deadline: Instant) -> Result<Vec<usize>, Error> {
        let goodbyes: Vec<_> =
            self.links.iter_mut().flatten().map(|link| link.say_last(last.clone())).collect();
        // This thread waits for the I/O thread and cannot drive.
        self.caller.hand_over();
        self.io.block_on(collect_until(goodbyes, deadline))
    }
}

impl Transport for QuicTransport {
    fn name(&self) -> &'static str {
        "quic"
    }

    fn rank(&self) -> usize {
        self.roster.rank
    }

    fn world_size(&self) -> usize {
        self.links.len()
    }

    fn epoch(&self) -> u64 {
        self.roster.epoch
    }

    fn try_send(&mut self, to: usize, parts: &[IoSlice<'_>]) -> Result<usize, Error> {
        self.check_not_over()?;
        let (link, mut cx) = self.link(to);
        let sent = link.try_send(&mut cx, parts)?;
        if sent > 0 {
            self.caller.moved(sent);
        }
        Ok(sent)
    }

    fn try_recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Error> {
        let (link, mut cx) = self.link(from);
        let received = link.try_recv(&mut cx, into)?;
        if received > 0 {
            self.caller.moved(0);
        }
        Ok(received)
    }

    fn send_control(&mut self, to: usize, message: &[u8]) -> Result<(), Error> {
        control_lane::check_length(message)?;
        self.check_not_over()?;
        let link = self.link(to).0;
        control_lane::queue_message(&link.control_out, &link.shared, link.connection.get(), message)
    }

    fn try_recv_control(&mut self, from: usize) -> Result<Option<Vec<u8>>, Error> {
        self.link(from).0.shared.take_message()
    }

    fn wait(&mut self, until: Instant) {
        self.caller.wait(until);
    }

    fn spin(&mut self) -> bool {
        self.caller.spin()
    }

    fn pause(&mut self) {
        self.caller.pause();
    }

    fn drive(&mut self) -> bool {
        self.caller.drive();
        true
    }

    fn waker(&self) -> Waker {
        self.caller.waker().clone()
    }

    fn give_up(&mut self, peer: usize, _reason: &str) {
        if let Some(link) = &mut self.links[peer] {
            link.given_up = true;
        }
    }

    fn split(&mut self, members: &[usize], id: u64, deadline: Instant) -> Result<Forming, Error> {
        let io = self.io.clone();
        let over = |mut meshes: Vec<_>| {
            let mesh = meshes.pop().expect("one for each place");
            Ok(Box::new(Self::over(mesh, io)?) as Box<dyn Transport>)
        };
        mesh::split(&[(&self.gate, &self.roster)], (members, id), deadline, self.waker(), over)
    }

    fn abort(&mut self, message: &[u8], deadline: Instant) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        // Fails when the I/O thread has stopped, and with it every link.
        let _ = self.say_last(&control_lane::abort(message), deadline);
        for link in self.links.iter().flatten() {
            link.shared.cut(link.connection.get(), CloseCode::Aborted, "this rank aborted");
        }
    }

    fn leave(&mut self, deadline: Instant) -> Result<(), Error> {
        if std::mem::replace(&mut self.over, true) {
            return Ok(());
        }
        let started = Instant::now();
        let confirmed = self.say_last(&Control::Goodbye, deadline)?;
        let links = self.links.iter_mut().flatten().map(|link| (link.peer, &mut link.connection));
        mesh::close_as_left(links, &confirmed, started)
    }
}

impl PairEndpoint for Endpoint {
    fn transport(mesh: Mesh<Self>) -> Result<Box<dyn Transport>, Error> {
        let io = LinkEndpoint::io(mesh.gate.endpoint()).clone();
        Ok(Box::new(QuicTransport::over(mesh, io)?))
    }
}

impl Link {
    fn new(peer: usize, raw: RawLink<Connection>, io: &IoHandle, waker: &Waker) -> Self {
        let RawLink { connection, control: (sender, mut receiver), data: (data_out, data_in) } = raw;
        let shared = Arc::new(LinkState::new(peer, waker.clone()));
        let (control_out, queue) = mpsc::channel(CONTROL_QUEUE_LIMIT);
        let control_sender = Some(io.spawn(send_all(queue, sender)));
        let (received_on, state) = (connection.get().clone(), shared.clone());
        io.spawn(async move { receive_all(&mut receiver, received_on, state).await });
        let data_in_end = None;
        let given_up = false;
        Self {
            connection,
            peer,
            data_out,
            data_in,
            data_in_end,
            control_out,
            given_up,
            control_sender,
            shared,
        }
    }

    fn try_send(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Result<usize, Error> {
        if let Some(end) = self.shared.known_end() {
            return Err(end.error(self.peer));
        }
        match self.data_out.poll_write_parts(cx, parts) {
            Poll::Ready(Ok(sent)) => Ok(sent),
            // The control lane's task will say how the link ended.
            Poll::Ready(Err(WriteError::ConnectionLost(_))) | Poll::Pending => Ok(0),
            Poll::Ready(Err(error)) => Err(self.cut(&format!("sending failed: {error}"))),
        }
    }

    fn try_recv(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Result<usize, Error> {
        if let Some(error) = &self.data_in_end {
            return Err(error.clone());
        }
        if into.is_empty() {
            return Ok(0);
        }
        let end = match self.data_in.poll_read(cx, into) {
            Poll::Ready(Ok(got)) if got > 0 => return Ok(got),
            Poll::Pending => return Ok(0),
            Poll::Ready(Ok(_)) => self.shared.known_end().cloned(),
            Poll::Ready(Err(ReadError::ConnectionLost(error))) => end_of_data(&self.shared, &error),
            Poll::Ready(Err(error)) => return Err(self.cut(&format!("its data stream broke off: {error}"))),
        };
        // While the end is not known, the control lane is still being read; its task will wake us.
        let Some(end) = end else { return Ok(0) };
        Err(self.data_in_end.insert(end.error(self.peer)).clone())
    }

    /// Says the last thing on the control lane; with a goodbye, ends the data too. The future ends, with
    /// the peer's rank, when the peer has everything or has itself ended.
    fn say_last(&mut self, last: Control) -> impl Future<Output = usize> + Send + 'static {
        let data_delivered = matches!(last, Control::Goodbye).then(|| {
            // Fails only when there is nobody left to tell.
            let _ = self.data_out.finish();
            self.data_out.stopped()
        });
        let (control_out, control_sender) = (self.control_out.clone(), self.control_sender.take());
        let (peer, shared) = (self.peer, self.shared.clone());
        let patience = if self.given_up { GIVEN_UP_GRACE } else { Duration::MAX };
        async move {
            let delivered = async {
                let _ = control_out.send(last).await;
                if let Some(data_delivered) = data_delivered {
                    let _ = data_delivered.await;
                }
                if let Some(control_sender) = control_sender {
                    let _ = control_sender.await;
                }
            };
            tokio::select! {
                () = delivered => {}
                () = shared.ended() => {}
                () = tokio::time::sleep(patience) => {}
            }
            peer
        }
    }

    /// Ends the link from this side.
    fn cut(&self, reason: &str) -> Error {
        self.shared.cut(self.connection.get(), CloseCode::Protocol, reason)
    }
}

/// How a data stream ended whose connection ended with `error`; `None` while that is not known.
///
/// A goodbye alone does not make it `Left`: it overtakes the data, which may be cut off behind it.
fn end_of_data(state: &LinkState, error: &ConnectionError) -> Option<End> {
    match state.known_end()? {
        End::Left if !CloseCode::Left.is_in(error) => Some(End::Lost(in_words(error))),
        end => Some(end.clone()),
    }
}
