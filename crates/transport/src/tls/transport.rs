//! The links of a mesh as a [`Transport`].

use std::future::Future;
use std::io::IoSlice;
use std::net::TcpStream;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::channel::Protection;
use super::connection::{Connection, MessageReceiver, gone};
use super::data::{Data, Flusher};
use super::endpoint::Endpoint;
use super::mend::{Line, Mender};
use super::session::{Fault, Received};
use super::waiting::{Bell, Spinning};
use crate::close::CloseCode;
use crate::control_lane::{
    self, CONTROL_QUEUE_LIMIT, Control, End, GIVEN_UP_GRACE, LinkConnection, LinkState, collect_until,
    receive_all, send_all,
};
use crate::io::{IoHandle, Task};
use crate::mesh::{self, CloseOnDrop, Gate, LinkEndpoint, Member, Mesh, RawLink, Roster};
use crate::pair::PairEndpoint;
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
    /// Mends both connections.
    _mending: [Task<()>; 2],
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
        Self::connect_with(Bell::new()?, endpoint, roster, deadline, give_up)
    }

    /// Further links to the same ranks, through another endpoint of this rank and to others of theirs, whose addresses
    /// `roster` has. What they are for: [`StripedTransport`](super::StripedTransport).
    ///
    /// # Errors
    /// As [`connect_unless`](TlsTransport::connect_unless).
    pub fn connect_beside(
        &self,
        endpoint: &Endpoint,
        roster: Roster,
        deadline: Instant,
        give_up: impl Future<Output = String> + Send + 'static,
    ) -> Result<Self, Error> {
        Self::connect_with(self.bell.clone(), endpoint, roster, deadline, give_up)
    }

    fn connect_with(
        bell: Arc<Bell>,
        endpoint: &Endpoint,
        roster: Roster,
        deadline: Instant,
        give_up: impl Future<Output = String> + Send + 'static,
    ) -> Result<Self, Error> {
        roster.check(endpoint.identity())?;
        let mesh = mesh::connect(endpoint, roster, deadline, give_up)?;
        Self::over(mesh, endpoint.io().clone(), bell)
    }

    /// Whether a wait for these links is one for the `others` too.
    pub(super) fn waits_with(&self, others: &Self) -> bool {
        Arc::ptr_eq(&self.bell, &others.bell)
    }

    /// The thread on which its links are kept.
    pub(super) fn io(&self) -> &IoHandle {
        &self.io
    }

    /// Behind which door it is, and with whom.
    pub(super) fn place(&self) -> (&Gate<Endpoint>, &Roster) {
        (&self.gate, &self.roster)
    }

    pub(super) fn over(mesh: Mesh<Endpoint>, io: IoHandle, bell: Arc<Bell>) -> Result<Self, Error> {
        let Mesh { roster, links, gate } = mesh;
        let to_link = |(peer, raw): (usize, Option<RawLink<Connection>>)| {
            raw.map(|raw| Link::new(peer, raw, (&roster, gate.endpoint()), bell.waker())).transpose()
        };
        let links: Vec<Option<Link>> =
            links.into_iter().enumerate().map(to_link).collect::<Result<_, Error>>()?;
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

    /// How the link to `peer` was lost, if it is by the end of `patience`. The peer is known to be in trouble: what it
    /// says may be about to be read.
    pub(super) fn loss_within(&self, peer: usize, patience: Duration) -> Option<Error> {
        let state = self.links[peer].as_ref().expect("a rank has no link to itself").state.clone();
        let ended = state.clone();
        if state.known_end().is_none() {
            // Fails when the I/O thread has stopped, and with it every link.
            let _ = self.io.block_on(async move { timeout(patience, ended.ended()).await });
        }
        state.known_end().filter(|end| matches!(end, End::Lost(_))).map(|end| end.error(peer))
    }

    /// Sends what is left behind, while the caller has nothing better to do.
    pub(super) fn flush_behind(&mut self) {
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
}

impl Transport for TlsTransport {
    fn name(&self) -> &'static str {
        match self.gate.endpoint().protection() {
            Protection::Encrypted => "tls",
            Protection::Plain => "tcp",
        }
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
        wait(std::slice::from_mut(self), until);
    }

    fn spin(&mut self) -> bool {
        self.flush_behind();
        self.spinning.spin()
    }

    fn drive(&mut self) -> bool {
        self.flush_behind();
        self.behind.is_empty()
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
        let over = |mut meshes: Vec<_>| {
            let mesh = meshes.pop().expect("one for each place");
            Ok(Box::new(Self::over(mesh, io, Bell::new()?)?) as Box<dyn Transport>)
        };
        mesh::split(&[self.place()], (members, id), deadline, self.bell.waker(), over)
    }

    fn abort(&mut self, message: &[u8], deadline: Instant) {
        abort(std::slice::from_mut(self), message, deadline);
    }

    fn leave(&mut self, deadline: Instant) -> Result<(), Error> {
        leave(std::slice::from_mut(self), deadline)
    }
}

impl PairEndpoint for Endpoint {
    fn transport(mesh: Mesh<Self>) -> Result<Box<dyn Transport>, Error> {
        let io = LinkEndpoint::io(mesh.gate.endpoint()).clone();
        Ok(Box::new(TlsTransport::over(mesh, io, Bell::new()?)?))
    }
}

/// [`Transport::wait`] for the links of all `lanes`, which share a bell.
pub(super) fn wait(lanes: &mut [TlsTransport], until: Instant) {
    for lane in &mut *lanes {
        lane.flush_behind();
        for &peer in &lane.behind {
            lane.links[peer].as_mut().expect("a rank has no link to itself").awaits.insert(PollFlags::OUT);
        }
    }
    let bell = lanes[0].bell.clone();
    // Only links that have been polled in vain end the wait, and each of them once, until it is polled in
    // vain again. Whose socket is broken has none; the bell rings when there is another one.
    fn to_wait_on(link: &mut Link) -> Option<(Arc<TcpStream>, &mut Link)> {
        if link.awaits.is_empty() {
            return None;
        }
        Some((link.data.socket()?, link))
    }
    let all = lanes.iter_mut().flat_map(|lane| lane.links.iter_mut().flatten());
    let mut links: Vec<(Arc<TcpStream>, &mut Link)> = all.filter_map(to_wait_on).collect();
    let mut files: Vec<PollFd<'_>> =
        links.iter().map(|(socket, link)| PollFd::new(socket, link.awaits)).collect();
    bell.wait(&mut files, until);
    let ready: Vec<bool> = files.iter().map(|file| !file.revents().is_empty()).collect();
    for ((_, link), _) in links.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
        link.awaits = PollFlags::empty();
    }
    lanes.iter_mut().for_each(TlsTransport::flush_behind);
    lanes[0].spinning.end();
}

/// Ends the control lanes of all `lanes` with `last`; returns the links (lane times world size plus peer) whose peers
/// have all of it, or have themselves ended, by the deadline.
fn say_last(lanes: &mut [TlsTransport], last: &Control, deadline: Instant) -> Result<Vec<usize>, Error> {
    let io = lanes[0].io.clone();
    let world_size = lanes[0].links.len();
    let of_lane = |(at, lane): (usize, &mut TlsTransport)| -> Vec<_> {
        let said = |link: &mut Link| {
            let said = link.say_last(last.clone());
            async move { at * world_size + said.await }
        };
        lane.links.iter_mut().flatten().map(said).collect()
    };
    let said: Vec<_> = lanes.iter_mut().enumerate().flat_map(of_lane).collect();
    io.block_on(collect_until(said, deadline))
}

/// [`Transport::abort`] for all `lanes` to the same peers. The message goes over the first, where it is read, and before
/// any other ends.
pub(super) fn abort(lanes: &mut [TlsTransport], message: &[u8], deadline: Instant) {
    let over: Vec<bool> = lanes.iter_mut().map(|lane| std::mem::replace(&mut lane.over, true)).collect();
    if over.contains(&true) {
        return;
    }
    // Fails when the I/O thread has stopped, and with it every link.
    let _ = say_last(&mut lanes[..1], &control_lane::abort(message), deadline);
    for link in lanes.iter().flat_map(|lane| lane.links.iter().flatten()) {
        link.state.cut(link.connection.get(), CloseCode::Aborted, "this rank aborted");
    }
}

/// [`Transport::leave`] for all `lanes` to the same peers.
pub(super) fn leave(lanes: &mut [TlsTransport], deadline: Instant) -> Result<(), Error> {
    let over: Vec<bool> = lanes.iter_mut().map(|lane| std::mem::replace(&mut lane.over, true)).collect();
    if over.contains(&true) {
        return Ok(());
    }
    let started = Instant::now();
    let world_size = lanes[0].links.len();
    let confirmed = say_last(lanes, &Control::Goodbye, deadline)?;
    let left = lanes.iter_mut().enumerate().map(|(at, lane)| {
        let confirmed: Vec<usize> =
            confirmed.iter().filter(|&&link| link / world_size == at).map(|link| link % world_size).collect();
        let links = lane.links.iter_mut().flatten().map(|link| (link.peer, &mut link.connection));
        mesh::close_as_left(links, &confirmed, started)
    });
    // All of them, whatever the first says.
    left.collect::<Vec<_>>().into_iter().collect()
}

impl Link {
    fn new(
        peer: usize,
        raw: RawLink<Connection>,
        (roster, endpoint): (&Roster, &Endpoint),
        waker: Waker,
    ) -> Result<Self, Error> {
        let RawLink { connection, control: (sender, receiver), mut data } = raw;
        let io = LinkEndpoint::io(endpoint);
        let state = Arc::new(LinkState::new(peer, waker.clone()));
        let Member { name, addr } = &roster.members[peer];
        let mender = |line: Arc<dyn Line>, session, broken, what| Mender {
            line,
            control: connection.get().line().clone(),
            session,
            broken,
            member: name.clone(),
            addr: *addr,
            ours_win: roster.rank > peer,
            what,
        };
        let failed = |fault: Fault| gone(*addr, &fault.in_words());
        let (control_broken, data_broken) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        data.outlive_sockets(data_broken.clone());
        connection.get().line().outlive_sockets(control_broken.clone());
        let data_id = data.id().map_err(failed)?;
        let control_id = connection.get().line().id().map_err(failed)?;
        let data = Arc::new(Data::new(data, waker));
        let control_mender = mender(connection.get().line().clone(), control_id, control_broken, "control");
        let data_mender = mender(data.clone(), data_id, data_broken, "data");
        let (control, data_of) = (connection.get().clone(), connection.get().clone());
        let woken = state.clone();
        let mending = [
            endpoint.mend(control_mender, move |fault| control.broke(fault.in_words())),
            endpoint.mend(data_mender, move |fault| {
                data_of.data_broke(&fault.in_words());
                woken.wake();
            }),
        ];
        let (control_out, queue) = mpsc::channel(CONTROL_QUEUE_LIMIT);
        let control_sender = Some(io.spawn(send_all(queue, sender)));
        let receiving = Receiving {
            io: io.clone(),
            connection: connection.get().clone(),
            data: data.clone(),
            state: state.clone(),
        };
        io.spawn(receiving.run(receiver));
        Ok(Self {
            connection,
            _mending: mending,
            peer,
            data,
            data_in_end: None,
            data_in_over: false,
            awaits: PollFlags::empty(),
            control_out,
            given_up: false,
            control_sender,
            state,
        })
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
    fn say_last(&mut self, last: Control) -> impl Future<Output = usize> + Send + use<> {
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
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;

    use super::*;
    use crate::IoThread;
    use crate::identity::JobAuthority;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Two ranks, linked up; the thread and the endpoint of each.
    fn pair() -> [(IoThread, Endpoint, TlsTransport); 2] {
        let authority = JobAuthority::new("mend").expect("a valid name");
        let ends = ["a", "b"].map(|member| {
            let io = IoThread::start().expect("a thread");
            let identity = authority.issue(member, Duration::from_secs(3600)).expect("a valid name");
            let endpoint = Endpoint::bind(&io.handle(), ([127, 0, 0, 1], 0).into(), &identity);
            (member, io, endpoint.expect("a free port"))
        });
        let members: Vec<Member> = ends
            .iter()
            .map(|(member, _, endpoint)| Member { name: (*member).to_owned(), addr: endpoint.local_addr() })
            .collect();
        let roster = |rank| Roster { job: "mend".to_owned(), epoch: 1, rank, members: members.clone() };
        let deadline = Instant::now() + PATIENCE;
        let (zero, one) = thread::scope(|scope| {
            let one = scope.spawn(|| TlsTransport::connect(&ends[1].2, roster(1), deadline));
            (TlsTransport::connect(&ends[0].2, roster(0), deadline), one.join().expect("no panic"))
        });
        let [(_, io_0, endpoint_0), (_, io_1, endpoint_1)] = ends;
        [
            (io_0, endpoint_0, zero.expect("the other one is there")),
            (io_1, endpoint_1, one.expect("the other one is there")),
        ]
    }

    /// Sends and receives `len` bytes that count up, and a control message for each 64 KiB that have come.
    fn exchange(transport: &mut TlsTransport, len: usize, salt: u8) {
        let peer = 1 - transport.rank();
        let byte = |at: usize, salt: u8| (at / 3) as u8 ^ (at >> 13) as u8 ^ salt;
        let outgoing: Vec<u8> = (0..len).map(|at| byte(at, salt)).collect();
        let (mut sent, mut got, mut told, mut heard) = (0, 0, 0, 0);
        let mut buffer = vec![0; 100_000];
        let until = Instant::now() + PATIENCE;
        while sent < len || got < len || heard < len >> 16 {
            let end = outgoing.len().min(sent + 300_000);
            let now_sent = transport.try_send(peer, &[IoSlice::new(&outgoing[sent..end])]).expect("it is up");
            let now_got = transport.try_recv(peer, &mut buffer).expect("it is up");
            for (at, &received) in buffer[..now_got].iter().enumerate() {
                assert_eq!(received, byte(got + at, !salt), "at {}", got + at);
            }
            (sent, got) = (sent + now_sent, got + now_got);
            while told < got >> 16 {
                transport.send_control(peer, &told.to_le_bytes()).expect("it is up");
                told += 1;
            }
            while let Some(message) = transport.try_recv_control(peer).expect("it is up") {
                assert_eq!(message, heard.to_le_bytes());
                heard += 1;
            }
            if now_sent + now_got == 0 {
                transport.wait(until);
            }
            assert!(Instant::now() < until, "sent {sent}, got {got}, heard {heard} of {len} bytes");
        }
    }

    #[test]
    fn a_link_goes_on_over_new_connections_when_its_old_ones_break() {
        let [(_io_0, _endpoint_0, mut zero), (_io_1, _endpoint_1, mut one)] = pair();
        let lines = [&zero, &one].map(|transport| {
            let link = transport.links.iter().flatten().next().expect("it has one");
            (link.data.clone(), link.connection.get().line().clone())
        });
        let (over, breaks) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            let ranks = [
                scope.spawn(|| exchange(&mut zero, 64 << 20, 0x0f)),
                scope.spawn(|| exchange(&mut one, 64 << 20, 0xf0)),
            ];
            scope.spawn(|| {
                // Both connections, from both sides, one at a time and together.
                while !over.load(Ordering::Relaxed) {
                    let turn = breaks.fetch_add(1, Ordering::Relaxed);
                    let (data, control) = &lines[turn % 2];
                    if turn % 3 != 0 {
                        data.cut();
                    }
                    if turn % 3 != 1 {
                        control.cut();
                    }
                    if turn % 5 == 0 {
                        lines[1 - turn % 2].0.cut();
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            });
            for rank in ranks {
                rank.join().expect("every byte arrives once and in order");
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(breaks.into_inner() > 3, "it must be broken in the middle");
        thread::scope(|scope| {
            let leaving = scope.spawn(|| one.leave(Instant::now() + PATIENCE));
            zero.leave(Instant::now() + PATIENCE).expect("an orderly leave, as on any link");
            leaving.join().expect("no panic").expect("an orderly leave, as on any link");
        });
    }

    #[test]
    fn what_was_on_its_way_when_a_link_broke_arrives_though_its_sender_does_nothing_more() {
        // The sender's own attempt makes the connection again, or the receiver's.
        for breaks_at in [0, 1] {
            sender_does_nothing_more(breaks_at);
        }
    }

    fn sender_does_nothing_more(breaks_at: usize) {
        let [(_io_0, _endpoint_0, mut zero), (_io_1, _endpoint_1, mut one)] = pair();
        // More than the sockets hold: some of it is left behind when the connection breaks.
        let message = vec![7; 64 << 20];
        let mut sent = 0;
        loop {
            match zero.try_send(1, &[IoSlice::new(&message[sent..])]).expect("it is up") {
                0 => break,
                count => sent += count,
            }
        }
        let broken = if breaks_at == 0 { &zero } else { &one };
        broken.links[1 - breaks_at].as_ref().expect("there is one").data.cut();
        let deadline = Instant::now() + PATIENCE;
        let mut received = vec![0; sent];
        let mut got = 0;
        while got < sent {
            match one.try_recv(0, &mut received[got..]).expect("it is up") {
                0 => one.wait(deadline),
                count => got += count,
            }
            assert!(Instant::now() < deadline, "only {got} of {sent} bytes have come");
        }
        assert!(received == message[..sent]);
    }

    #[test]
    fn a_connection_that_nobody_answers_for_is_lost_with_the_reason_of_its_break() {
        let [(_io_0, _endpoint_0, mut zero), (io_1, endpoint_1, one)] = pair();
        // The process is there, and its port is not: as if it had been killed.
        let line = one.links[0].as_ref().expect("there is one").connection.get().line().clone();
        drop((io_1, endpoint_1));
        line.cut();
        let deadline = Instant::now() + PATIENCE;
        let error = loop {
            match zero.try_recv(1, &mut [0; 8]) {
                Ok(_) => zero.wait(deadline),
                Err(error) => break error,
            }
            assert!(Instant::now() < deadline, "nothing is lost");
        };
        assert!(matches!(error, Error::Lost { peer: 1, .. }), "{error}");
    }

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
