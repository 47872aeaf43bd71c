//! The links of a mesh as a [`Transport`].

use std::future::Future;
use std::io::IoSlice;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::connection::{Connection, MessageReceiver};
use super::data::{Data, Flusher};
use super::endpoint::Endpoint;
use super::session::{Fault, Received};
use super::waiting::{Bell, Spinning};
use crate::close::CloseCode;
use crate::control_lane::{
    self, CONTROL_QUEUE_LIMIT, Control, End, GIVEN_UP_GRACE, LinkConnection, LinkState, collect_until,
    receive_all, send_all,
};
use crate::io::{IoHandle, Task};
use crate::mesh::{self, CloseOnDrop, Gate, LinkEndpoint, Mesh, RawLink, Roster};
use crate::{Error, Forming, Transport};

/// One rank's links over TLS on TCP to all other ranks of one epoch.
///
/// Dropping it without [`leave`](Transport::leave) closes the links as aborted, and the peers see
/// [`Error::Lost`] at once; it never blocks. So do those of a process that is killed. One that is frozen, or
/// whose host is gone, falls silent, and its peers see `Lost` after 10 s at the latest.
#[derive(Debug)]
pub struct TlsTransport {
    roster: Roster,
    io: IoHandle,
    bell: Arc<Bell>,
    spinning: Spinning,
    /// By rank; `None` at this rank.
    links: Vec<Option<Link>>,
    /// The ranks for which encrypted bytes are left behind.
    behind: Vec<usize>,
    flusher: Arc<Flusher>,
    _flushing: Task<()>,
    /// Whether this side has left or aborted.
    over: bool,
    gate: Gate<Endpoint>,
}

/// One peer's connections, as the caller's thread uses them.
#[derive(Debug)]
struct Link {
    // First, and therefore dropped first: the peer reads why before it finds the end of the data.
    connection: CloseOnDrop<Connection>,
    peer: usize,
    data: Arc<Data>,
    /// How receiving data ended, if it did: every later call answers the same.
    data_in_end: Option<Error>,
    /// Whether nothing can come from the data connection any more, though how it ended is not known yet.
    data_in_over: bool,
    /// Whether the last try to receive found nothing, or the last one to send no room.
    awaits: PollFlags,
    control_out: mpsc::Sender<Control>,
    /// Whether the peer counts as lost: it may still be told why, but is hardly waited for.
    given_up: bool,
    /// Ends when everything up to our last message is in the operating system's hands, or the link is gone.
    control_sender: Option<JoinHandle<()>>,
    state: Arc<LinkState>,
}

impl TlsTransport {
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

    /// [`connect`](TlsTransport::connect) that ends early when `give_up` completes, with its output as
    /// the reason: somebody has learnt that a rank will not come.
    ///
    /// # Errors
    /// [`Error::GaveUp`] with the reason, else as [`connect`](TlsTransport::connect).
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

    fn over(mesh: Mesh<Endpoint>, io: IoHandle) -> Result<Self, Error> {
        let Mesh { roster, links, gate } = mesh;
        let bell = Bell::new()?;
        let to_link = |(peer, raw): (usize, Option<RawLink<Connection>>)| {
            Some(Link::new(peer, raw?, &io, bell.waker()))
        };
        let links: Vec<Option<Link>> = links.into_iter().enumerate().map(to_link).collect();
        let flusher = Arc::new(Flusher::default());
        let all_data = links.iter().flatten().map(|link| link.data.clone()).collect();
        let flushing = io.task(flusher.clone().run(all_data));
        let spinning = Spinning::default();
        let behind = Vec::new();
        Ok(Self {
            roster,
            bell,
            spinning,
            links,
            behind,
            flusher,
            _flushing: flushing,
            over: false,
            gate,
            io,
        })
    }

    fn link(&mut self, peer: usize) -> &mut Link {
        self.links[peer].as_mut().expect("a rank has no link to itself")
    }

    /// Sends what is left behind, while the caller has nothing better to do.
    fn flush_behind(&mut self) {
        let links = &self.links;
        // A broken connection is found by receiving, and by the control lane.
        self.behind
            .retain(|&peer| links[peer].as_ref().is_some_and(|link| matches!(link.data.flush(), Ok(false))));
        if !self.behind.is_empty() {
            self.flusher.arm();
        }
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
        self.io.block_on(collect_until(goodbyes, deadline))
    }
}

impl Transport for TlsTransport {
    fn name(&self) -> &'static str {
        "tls"
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
        let (sent, left_behind) = self.link(to).try_send(parts)?;
        if sent > 0 {
            self.spinning.end();
        }
        if left_behind {
            if !self.behind.contains(&to) {
                self.behind.push(to);
            }
            self.flusher.arm();
        }
        Ok(sent)
    }

    fn try_recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Error> {
        let got = self.link(from).try_recv(into)?;
        if got > 0 {
            self.spinning.end();
        }
        Ok(got)
    }

    fn send_control(&mut self, to: usize, message: &[u8]) -> Result<(), Error> {
        control_lane::check_length(message)?;
        self.check_not_over()?;
        let link = self.link(to);
        control_lane::queue_message(&link.control_out, &link.state, link.connection.get(), message)
    }

    fn try_recv_control(&mut self, from: usize) -> Result<Option<Vec<u8>>, Error> {
        self.link(from).state.take_message()
    }

    fn wait(&mut self, until: Instant) {
        self.flush_behind();
        for &peer in &self.behind {
            self.links[peer].as_mut().expect("a rank has no link to itself").awaits.insert(PollFlags::OUT);
        }
        // Only links that have been polled in vain end the wait, and each of them once, until it is polled in
        // vain again.
        let waiting = |link: &&mut Link| !link.awaits.is_empty();
        let mut links: Vec<&mut Link> = self.links.iter_mut().flatten().filter(waiting).collect();
        let mut files: Vec<PollFd<'_>> =
            links.iter().map(|link| PollFd::new(&link.data.socket, link.awaits)).collect();
        self.bell.wait(&mut files, until);
        let ready: Vec<bool> = files.iter().map(|file| !file.revents().is_empty()).collect();
        for (link, _) in links.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            link.awaits = PollFlags::empty();
        }
        self.flush_behind();
        self.spinning.end();
    }

    fn spin(&mut self) -> bool {
        self.flush_behind();
        self.spinning.spin()
    }

    fn wait_is_over(&mut self) {
        self.spinning.end();
    }

    fn waker(&self) -> Waker {
        self.bell.waker()
    }

    fn give_up(&mut self, peer: usize, _reason: &str) {
        if let Some(link) = &mut self.links[peer] {
            link.given_up = true;
        }
    }

    fn split(&mut self, members: &[usize], id: u64, deadline: Instant) -> Result<Forming, Error> {
        let io = self.io.clone();
        let over = |mesh| Ok(Box::new(Self::over(mesh, io)?) as Box<dyn Transport>);
        mesh::split(&self.gate, &self.roster, (members, id), deadline, self.bell.waker(), over)
    }

    fn abort(&mut self, message: &[u8], deadline: Instant) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        // Fails when the I/O thread has stopped, and with it every link.
        let _ = self.say_last(&control_lane::abort(message), deadline);
        for link in self.links.iter().flatten() {
            link.state.cut(link.connection.get(), CloseCode::Aborted, "this rank aborted");
        }
    }

    fn leave(&mut self, deadline: Instant) -> Result<(), Error> {
        if std::mem::replace(&mut self.over, true) {
            return Ok(());
        }
        let started = Instant::now();
        let confirmed = self.say_last(&Control::Goodbye, deadline)?;
        let mut missing = Vec::new();
        for link in self.links.iter_mut().flatten() {
            match confirmed.contains(&link.peer) {
                true => link.connection.close_as(CloseCode::Left),
                false => missing.push(format!("rank {}", link.peer)),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let what = format!("{} to confirm what was sent before leaving", missing.join(", "));
        Err(Error::TimedOut { what, elapsed: started.elapsed() })
    }
}

impl Link {
    fn new(peer: usize, raw: RawLink<Connection>, io: &IoHandle, waker: Waker) -> Self {
        let RawLink { connection, control: (sender, receiver), data } = raw;
        let state = Arc::new(LinkState::new(peer, waker));
        let data = Arc::new(Data::new(data));
        let (control_out, queue) = mpsc::channel(CONTROL_QUEUE_LIMIT);
        let control_sender = Some(io.spawn(send_all(queue, sender)));
        let receiving = Receiving {
            io: io.clone(),
            connection: connection.get().clone(),
            data: data.clone(),
            state: state.clone(),
        };
        io.spawn(receiving.run(receiver));
        Self {
            connection,
            peer,
            data,
            data_in_end: None,
            data_in_over: false,
            awaits: PollFlags::empty(),
            control_out,
            given_up: false,
            control_sender,
            state,
        }
    }

    fn try_send(&mut self, parts: &[IoSlice<'_>]) -> Result<(usize, bool), Error> {
        if let Some(end) = self.state.known_end() {
            return Err(end.error(self.peer));
        }
        let (sent, left_behind) = match self.data.send(parts) {
            Ok(sent) => sent,
            Err(fault) => {
                // How the link ended is for the control lane to say, which wakes us.
                self.connection.get().data_broke(&fault.in_words());
                self.awaits.remove(PollFlags::OUT);
                return Ok((0, false));
            }
        };
        let all = sent == parts.iter().map(|part| part.len()).sum();
        self.awaits.set(PollFlags::OUT, !all);
        Ok((sent, left_behind))
    }

    fn try_recv(&mut self, into: &mut [u8]) -> Result<usize, Error> {
        if let Some(error) = &self.data_in_end {
            return Err(error.clone());
        }
        if into.is_empty() {
            return Ok(0);
        }
        // Before the look at the data: all that the peer sent before such an end is there then.
        let end = self.state.known_end().cloned();
        let received = self.data.receive(into);
        if let Ok(Received::Bytes(count)) = received {
            self.awaits.remove(PollFlags::IN);
            return Ok(count);
        }
        if let Err(fault) = &received {
            self.connection.get().data_broke(&fault.in_words());
        }
        self.data_in_over = received != Ok(Received::Nothing);
        self.awaits.set(PollFlags::IN, !self.data_in_over);
        // While the end is not known, the control lane is still being read; its task will wake us.
        let Some(end) = end.and_then(|end| end_of_data(end, received)) else { return Ok(0) };
        Err(self.data_in_end.insert(end.error(self.peer)).clone())
    }

    /// Says the last thing on the control lane; with a goodbye, ends the data too. The future ends, with
    /// the peer's rank, when the peer has everything or has itself ended.
    fn say_last(&mut self, last: Control) -> impl Future<Output = usize> + Send + 'static {
        let (control_out, control_sender) = (self.control_out.clone(), self.control_sender.take());
        let (peer, state, data) = (self.peer, self.state.clone(), self.data.clone());
        let patience = if self.given_up { GIVEN_UP_GRACE } else { Duration::MAX };
        let connection = self.connection.get().clone();
        async move {
            let leaves = matches!(last, Control::Goodbye);
            let said = async {
                let _ = control_out.send(last).await;
                if leaves {
                    data.finish();
                    if let Err(fault) = data.flush_all().await {
                        connection.data_broke(&fault.in_words());
                    }
                }
                if let Some(control_sender) = control_sender {
                    let _ = control_sender.await;
                }
            };
            let delivered = async {
                said.await;
                match leaves {
                    // Also when the peer has said goodbye itself: it may still need our data.
                    true => connection.peer_has_all().await,
                    // Whoever hears the reason of an abort cuts the link off.
                    false => state.ended().await,
                }
            };
            let lost = async {
                state.ended().await;
                if leaves && state.known_end() == Some(&End::Left) {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = delivered => {}
                () = lost => {}
                () = tokio::time::sleep(patience) => {}
            }
            peer
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The peer reads why it is so before it finds the end of the data.
        self.connection.close();
        self.data.close();
    }
}

/// How a link whose control lane ended with `end` ended as a stream of bytes; `None` while that is open.
///
/// A goodbye alone does not make it `Left`: it overtakes the data, which may be cut off behind it.
fn end_of_data(end: End, received: Result<Received, Fault>) -> Option<End> {
    match (end, received) {
        (End::Left, Ok(Received::End)) => Some(End::Left),
        (End::Left, Err(fault)) => Some(End::Lost(fault.in_words())),
        (End::Left, Ok(_)) => None,
        (lost @ End::Lost(_), _) => Some(lost),
    }
}

/// What the task that reads a control lane has.
struct Receiving {
    io: IoHandle,
    connection: Connection,
    data: Arc<Data>,
    state: Arc<LinkState>,
}

impl Receiving {
    async fn run(self, mut receiver: MessageReceiver) {
        receiver.expect_signs_of_life();
        let thread_ends = async {
            self.io.closing().await;
            self.state.end(End::Lost("this process closed the connection".to_owned()));
            self.connection.close_with(CloseCode::Aborted, "its process ended");
        };
        tokio::select! {
            biased;
            () = thread_ends => {}
            () = self.receive(receiver) => {}
        }
    }

    async fn receive(&self, mut receiver: MessageReceiver) {
        receive_all(&mut receiver, self.connection.clone(), self.state.clone()).await;
        if self.state.known_end() != Some(&End::Left) {
            return;
        }
        receiver.expect_silence();
        let drain = async {
            // The peer waits for this before it leaves, and shall not wait for our caller.
            if self.data.drain(&self.state).await.is_ok() {
                self.connection.say_has_all().await;
            }
            self.state.wake();
        };
        let listen = async {
            // Whatever else it says after its goodbye is of no interest.
            while let Ok(Some(_)) = receiver.recv::<Control>().await {}
            self.connection.lane_over();
        };
        tokio::join!(drain, listen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_goodbye_and_the_end_of_the_data_together_are_an_orderly_leave() {
        let lost = |words: &str| Some(End::Lost(words.to_owned()));
        assert_eq!(end_of_data(End::Left, Ok(Received::End)), Some(End::Left));
        assert_eq!(end_of_data(End::Left, Ok(Received::Nothing)), None, "the rest is on its way");
        assert_eq!(end_of_data(End::Left, Err(Fault::Cut)), lost("its connection ended without a goodbye"));
        let end = || End::Lost("killed".to_owned());
        for received in [Ok(Received::End), Ok(Received::Nothing), Err(Fault::Cut)] {
            assert_eq!(end_of_data(end(), received), lost("killed"));
        }
    }
}
