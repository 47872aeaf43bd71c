//! A link between two members of a job, made whenever they want one: no epoch, no roster, no ranks.
//!
//! One member [listens](Port::listen) and gives the other, by whatever way, its address, its name and the listener's
//! number; the other one [dials](Port::dial). Both get a [`Transport`] of two: the listener is rank 0, the dialler
//! rank 1. Who may dial is decided by certificates alone: any member of the job that knows the number.
//!
//! All listeners of a [`Port`] share one port of the network. What it refuses: groups ([`Transport::split`]).

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout, timeout_at};

use crate::close::CloseCode;
use crate::control_lane::{LinkConnection, MessageIn, MessageOut};
use crate::identity::Identity;
use crate::io::{IoHandle, Task};
use crate::mesh::{CloseOnDrop, Gate, Lane, LinkEndpoint, Mesh, RawLink};
use crate::{Error, Fabric, Forming, Member, Roster, Transport, quic, tls};

/// How long a dialler that has been let in may take to say which listener it wants, and to open its data stream.
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// The limits between which the time for one attempt to dial doubles.
const ATTEMPT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// The limits between which the pause after a failed attempt doubles.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// For how long in a row the other side refuses before that is its last word. Not the first time, because a handshake that
/// was crowded out by others looks like a refusal, and a crowd lasts for seconds. Tests need not wait as long.
const LAST_WORD: Duration = if cfg!(test) { Duration::from_millis(100) } else { Duration::from_secs(5) };

/// Links of one listener that nobody has taken yet. Further diallers are refused; no member needs as many.
const WAITING_LIMIT: usize = 64;

/// The number of the epoch that no pair has.
const NO_EPOCH: u64 = 0;

/// Where a member meets others, two by two. Cheap to clone; closed when the last clone and all its listeners are gone.
#[derive(Clone, Debug)]
pub struct Port(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Quic(Arc<Desk<quic::Endpoint>>),
    Tls(Arc<Desk<tls::Endpoint>>),
}

/// Takes the members that dial it and asks for a number.
#[derive(Debug)]
pub struct Listener {
    number: u64,
    arrivals: mpsc::Receiver<Arrival>,
    /// Keeps the port open, and takes the number back when it is dropped.
    _entry: Box<dyn fmt::Debug + Send + Sync>,
}

/// A link and the member at its other end, with the address at which that is dialled.
type Arrival = (Member, Box<dyn Transport>);

/// An endpoint whose links are those of pairs.
pub(crate) trait PairEndpoint: LinkEndpoint {
    /// The one link of `mesh` as a transport.
    fn transport(mesh: Mesh<Self>) -> Result<Box<dyn Transport>, Error>;
}

/// One endpoint and those who listen at it.
#[derive(Debug)]
struct Desk<E: PairEndpoint> {
    endpoint: E,
    /// This member, with the address it is dialled at.
    me: Member,
    job: String,
    listeners: Arc<Listeners>,
    _accepting: Task<()>,
}

/// Where links go, by the number of their listener.
#[derive(Debug, Default)]
struct Listeners(Mutex<HashMap<u64, mpsc::Sender<Arrival>>>);

/// A listener's number, until it is dropped.
#[derive(Debug)]
struct Entry<E: PairEndpoint> {
    desk: Arc<Desk<E>>,
    number: u64,
}

/// Asks for a link. The first message on the control lane.
#[derive(Debug, Serialize, Deserialize)]
struct PairHello {
    listener: u64,
    /// Where the dialler itself is dialled, should the link break.
    addr: SocketAddr,
}

/// Grants it.
#[derive(Debug, Serialize, Deserialize)]
struct PairWelcome {
    listener: u64,
}

impl Port {
    /// Opens a port at `addr`, which must be an address that other members reach (its port may be 0: any free one).
    /// [`Fabric::Tcp`] leaves data **unprotected**, as [`tls::Endpoint::bind_plain`] says; [`Fabric::Auto`] is TLS, the
    /// fastest encrypted one.
    ///
    /// # Errors
    /// [`Error::Bind`] with the operating system's reason, [`Error::Identity`] when TLS cannot use the identity.
    pub fn open(io: &IoHandle, addr: SocketAddr, identity: &Identity, fabric: Fabric) -> Result<Self, Error> {
        let kind = match fabric {
            Fabric::Quic => {
                let endpoint = quic::Endpoint::bind(io, addr, identity)?;
                let local_addr = endpoint.local_addr();
                Kind::Quic(Desk::open(endpoint, local_addr, identity))
            }
            Fabric::Tcp => {
                let endpoint = tls::Endpoint::bind_plain(io, addr, identity)?;
                let local_addr = endpoint.local_addr();
                Kind::Tls(Desk::open(endpoint, local_addr, identity))
            }
            Fabric::Tls | Fabric::Auto => {
                let endpoint = tls::Endpoint::bind(io, addr, identity)?;
                let local_addr = endpoint.local_addr();
                Kind::Tls(Desk::open(endpoint, local_addr, identity))
            }
        };
        Ok(Self(kind))
    }

    /// The address it is dialled at, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        match &self.0 {
            Kind::Quic(desk) => desk.me.addr,
            Kind::Tls(desk) => desk.me.addr,
        }
    }

    /// Listens under a new random number. Does not block.
    ///
    /// # Errors
    /// [`Error::Usage`] when the system has no random numbers.
    pub fn listen(&self) -> Result<Listener, Error> {
        match &self.0 {
            Kind::Quic(desk) => desk.listen(),
            Kind::Tls(desk) => desk.listen(),
        }
    }

    /// Dials `member` at `addr` for a link to its listener `number`, again and again until `deadline`. Does not block:
    /// the link, or why there is none, comes from what is returned. Dropping that gives up.
    ///
    /// # Errors
    /// From what is returned: [`Error::Refused`] when the other side is not that member, does not take us or has no such
    /// listener; [`Error::TimedOut`] or [`Error::Unreachable`] when nobody has answered.
    pub fn dial(&self, addr: SocketAddr, member: &str, number: u64, deadline: Instant) -> Forming {
        let peer = Member { name: member.to_owned(), addr };
        match &self.0 {
            Kind::Quic(desk) => desk.clone().dial(peer, number, deadline),
            Kind::Tls(desk) => desk.clone().dial(peer, number, deadline),
        }
    }
}

impl Listener {
    /// What the dialler must know beside name and address. Not a secret: certificates decide who is let in.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Takes the next link that was made, with the member at its other end and where that is dialled; `None` while
    /// there is none. Does not block. The listener is rank 0 of it.
    pub fn take(&mut self) -> Option<(Member, Box<dyn Transport>)> {
        self.arrivals.try_recv().ok()
    }
}

impl<E: PairEndpoint> Desk<E> {
    fn open(endpoint: E, addr: SocketAddr, identity: &Identity) -> Arc<Self> {
        let me = Member { name: identity.member().to_owned(), addr };
        let job = identity.job().to_owned();
        let listeners = Arc::new(Listeners::default());
        let taking = Taking {
            endpoint: endpoint.clone(),
            me: me.clone(),
            job: job.clone(),
            listeners: listeners.clone(),
        };
        let accepting = endpoint.io().task(taking.run());
        Arc::new(Self { endpoint, me, job, listeners, _accepting: accepting })
    }

    fn listen(self: &Arc<Self>) -> Result<Listener, Error> {
        let (sender, arrivals) = mpsc::channel(WAITING_LIMIT);
        let number = random()?;
        // A number that is taken already comes once in 2^64 times, and then its first listener hears nothing more.
        self.listeners.lock().insert(number, sender);
        Ok(Listener { number, arrivals, _entry: Box::new(Entry { desk: self.clone(), number }) })
    }

    fn dial(self: Arc<Self>, peer: Member, number: u64, deadline: Instant) -> Forming {
        let (mut former, forming) = Forming::new();
        self.endpoint.io().clone().spawn(async move {
            let formed = tokio::select! {
                formed = self.dial_until(peer, number, deadline) => formed,
                () = former.given_up() => return,
            };
            former.finish(formed);
        });
        forming
    }

    async fn dial_until(
        &self,
        peer: Member,
        number: u64,
        deadline: Instant,
    ) -> Result<Box<dyn Transport>, Error> {
        let started = Instant::now();
        let (mut limit, mut pause, mut refused_since) = (ATTEMPT.0, PAUSE.0, None);
        loop {
            let attempt = timeout_at(deadline.into(), self.dial_once(&peer, number, limit));
            let late = |_| {
                let (what, elapsed) = (format!("a link to {}", peer.name), started.elapsed());
                Err(Error::TimedOut { what, ranks: Vec::new(), elapsed })
            };
            let error = match attempt.await.unwrap_or_else(late) {
                Ok(transport) => return Ok(transport),
                Err(error) => error,
            };
            let now = Instant::now();
            let refused = matches!(error, Error::Refused { .. });
            refused_since = refused.then(|| refused_since.unwrap_or(now));
            let is_last_word = refused_since.is_some_and(|since| now.duration_since(since) >= LAST_WORD);
            if is_last_word || now + pause >= deadline {
                return Err(error);
            }
            tracing::debug!(member = peer.name, addr = %peer.addr, %error, "no link yet");
            sleep(pause).await;
            limit = (2 * limit).min(ATTEMPT.1);
            pause = (2 * pause).min(PAUSE.1);
        }
    }

    async fn dial_once(
        &self,
        peer: &Member,
        number: u64,
        limit: Duration,
    ) -> Result<Box<dyn Transport>, Error> {
        let connected = self.endpoint.connect_within(peer.addr, &peer.name, limit).await?;
        let connection = CloseOnDrop::new(connected);
        let mut control = E::open_control(connection.get()).await?;
        control.0.send(&PairHello { listener: number, addr: self.me.addr }).await?;
        let data = self.endpoint.open_data(connection.get(), peer.addr, &mut control).await?;
        match control.1.recv::<PairWelcome>().await? {
            Some(welcome) if welcome.listener == number => {}
            _ => {
                let (remote, reason) = (peer.addr, "it answered for another listener".to_owned());
                return Err(Error::Refused { remote, reason });
            }
        }
        let link = RawLink { connection, control, data };
        let members = vec![peer.clone(), self.me.clone()];
        let roster = Roster { job: self.job.clone(), epoch: NO_EPOCH, rank: 1, members };
        E::transport(Mesh {
            roster,
            links: vec![Some(link), None],
            gate: Gate::of_a_pair(self.endpoint.clone()),
        })
    }
}

/// Answers everybody who dials, for as long as it is polled.
struct Taking<E> {
    endpoint: E,
    me: Member,
    job: String,
    listeners: Arc<Listeners>,
}

impl<E: PairEndpoint> Taking<E> {
    async fn run(self) {
        let this = Arc::new(self);
        let mut answers = JoinSet::new();
        loop {
            tokio::select! {
                connection = this.endpoint.accept() => match connection {
                    Ok(connection) => { answers.spawn(this.clone().answer(connection)); }
                    Err(_) => return,
                },
                Some(_) = answers.join_next() => {}
            }
        }
    }

    async fn answer(self: Arc<Self>, connection: E::Connection) {
        // Kept until the refusal is told: dropping a lane ends it in order, which says nothing.
        let mut control = None;
        let granted = timeout(HELLO_LIMIT, self.grant(connection.clone(), &mut control)).await;
        let reason = match granted {
            Ok(Ok(())) => return,
            Ok(Err(Error::Refused { reason, .. })) => reason,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("it asked for no link within {} s", HELLO_LIMIT.as_secs()),
        };
        let (remote, member) = (connection.remote_address(), connection.member());
        if let Some(reason) = connection.close_reason() {
            tracing::debug!(%remote, member, reason, "a dialler went away");
            return;
        }
        tracing::warn!(%remote, member, reason, "refused a link");
        connection.close_with(CloseCode::Refused, &reason);
    }

    /// Hears which listener is wanted and gives it the link. `control` is the place of the control lane, which is taken
    /// out when the link is granted.
    async fn grant(&self, connection: E::Connection, control: &mut Option<Lane<E>>) -> Result<(), Error> {
        let remote = connection.remote_address();
        let refused = |reason: &str| Error::Refused { remote, reason: reason.to_owned() };
        let lane = control.insert(E::accept_control(&connection).await?);
        let hello = lane.1.recv::<PairHello>().await?.ok_or_else(|| refused("it asked for no link"))?;
        let listener = self.listeners.lock().get(&hello.listener).cloned();
        let listener = listener.ok_or_else(|| refused("nobody listens under that number (any more)"))?;
        let data = self.endpoint.accept_data(&connection, lane).await?;
        let place = listener.try_reserve().map_err(|_| refused("its listener is gone, or takes no more"))?;
        lane.0.send(&PairWelcome { listener: hello.listener }).await?;
        let control = control.take().expect("put in above");
        let peer = Member { name: connection.member().to_owned(), addr: hello.addr };
        let link = RawLink { connection: CloseOnDrop::new(connection), control, data };
        let members = vec![self.me.clone(), peer.clone()];
        let roster = Roster { job: self.job.clone(), epoch: NO_EPOCH, rank: 0, members };
        let gate = Gate::of_a_pair(self.endpoint.clone());
        place.send((peer, E::transport(Mesh { roster, links: vec![None, Some(link)], gate })?));
        Ok(())
    }
}

impl Listeners {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Arrival>>> {
        // Entries are put in and taken out whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E: PairEndpoint> Drop for Entry<E> {
    fn drop(&mut self) {
        self.desk.listeners.lock().remove(&self.number);
    }
}

fn random() -> Result<u64, Error> {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::Usage { reason: "the system has no random numbers".to_owned() })?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use proptest::prelude::*;

    use super::*;
    use crate::IoThread;
    use crate::identity::JobAuthority;
    use crate::secret::JobSecret;
    use crate::wire;

    const PATIENCE: Duration = Duration::from_secs(60);
    const FABRICS: [Fabric; 3] = [Fabric::Tls, Fabric::Quic, Fabric::Tcp];

    fn port(io: &IoThread, authority: &JobAuthority, member: &str, fabric: Fabric) -> Port {
        let identity = authority.issue(member, Duration::from_secs(3600)).expect("a valid name");
        Port::open(&io.handle(), ([127, 0, 0, 1], 0).into(), &identity, fabric).expect("a free port")
    }

    /// Polls until there is something.
    fn poll<T>(mut look: impl FnMut() -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < until, "nothing has come");
            std::thread::yield_now();
        }
    }

    fn dial(from: &Port, to: &Port, member: &str, number: u64) -> Result<Box<dyn Transport>, Error> {
        let mut forming = from.dial(to.local_addr(), member, number, Instant::now() + PATIENCE);
        poll(|| forming.take())
    }

    fn receive(transport: &mut dyn Transport, from: usize) -> u8 {
        let mut byte = [0];
        poll(|| {
            transport.drive();
            (transport.try_recv(from, &mut byte).expect("the link is up") == 1).then_some(byte[0])
        })
    }

    fn send(transport: &mut dyn Transport, to: usize, byte: u8) {
        poll(|| (transport.try_send(to, &[IoSlice::new(&[byte])]).expect("it is up") == 1).then_some(()));
        transport.drive();
        transport.pause();
    }

    #[test]
    fn whoever_has_the_number_gets_a_link_and_each_its_own() {
        for fabric in FABRICS {
            let io = IoThread::start().expect("a thread");
            let authority = JobAuthority::new("job").expect("a name");
            let [a, b] = ["a", "b"].map(|member| port(&io, &authority, member, fabric));
            let mut listeners = [(); 2].map(|()| a.listen().expect("random numbers"));
            for (byte, listener) in (1..).zip(&mut listeners) {
                let mut dialled = dial(&b, &a, "a", listener.number()).expect("it is welcome");
                let (member, mut taken) = poll(|| listener.take());
                assert_eq!((member.name.as_str(), member.addr), ("b", b.local_addr()));
                assert_eq!((taken.rank(), dialled.rank(), taken.world_size()), (0, 1, 2));
                send(&mut *dialled, 0, byte);
                assert_eq!(receive(&mut *taken, 1), byte, "{fabric}");
                send(&mut *taken, 1, byte + 10);
                assert_eq!(receive(&mut *dialled, 0), byte + 10, "{fabric}");
                let split = taken.split(&[0, 1], 7, Instant::now() + PATIENCE);
                assert!(matches!(split, Err(Error::Usage { .. })), "{split:?}");
            }
        }
    }

    #[test]
    fn a_number_that_nobody_listens_under_any_more_is_refused() {
        for fabric in FABRICS {
            let io = IoThread::start().expect("a thread");
            let authority = JobAuthority::new("job").expect("a name");
            let [a, b] = ["a", "b"].map(|member| port(&io, &authority, member, fabric));
            let number = a.listen().expect("random numbers").number();
            let error = dial(&b, &a, "a", number).map(drop).expect_err("its listener is gone");
            assert!(error.to_string().contains("nobody listens"), "{fabric}: {error}");
        }
    }

    #[test]
    fn members_of_other_jobs_and_those_of_another_name_are_refused() {
        for fabric in FABRICS {
            let io = IoThread::start().expect("a thread");
            let [ours, other] = [(); 2].map(|()| JobAuthority::new("job").expect("a name"));
            let a = port(&io, &ours, "a", fabric);
            let listener = a.listen().expect("random numbers");
            let stranger = port(&io, &other, "b", fabric);
            let error = dial(&stranger, &a, "a", listener.number()).map(drop).expect_err("not of the job");
            assert!(matches!(error, Error::Refused { .. }), "{fabric}: {error}");
            let b = port(&io, &ours, "b", fabric);
            let error = dial(&b, &a, "c", listener.number()).map(drop).expect_err("that is not c");
            assert!(matches!(error, Error::Refused { .. }), "{fabric}: {error}");
        }
    }

    #[test]
    fn holders_of_one_secret_make_authorities_that_trust_each_other_and_no_other() {
        let authority = |secret: &[u8]| {
            let secret = JobSecret::new(secret).expect("long enough");
            JobAuthority::of_secret("job", &secret).expect("a name")
        };
        let io = IoThread::start().expect("a thread");
        let a = port(&io, &authority(b"one secret of a job"), "a", Fabric::Tls);
        let b = port(&io, &authority(b"one secret of a job"), "b", Fabric::Tls);
        let c = port(&io, &authority(b"another secret of a job"), "c", Fabric::Tls);
        let listener = a.listen().expect("random numbers");
        dial(&b, &a, "a", listener.number()).expect("the same secret");
        let error = dial(&c, &a, "a", listener.number()).map(drop).expect_err("another secret");
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    }

    #[test]
    fn a_listener_can_be_dialled_from_its_own_port() {
        for fabric in FABRICS {
            let io = IoThread::start().expect("a thread");
            let authority = JobAuthority::new("job").expect("a name");
            let a = port(&io, &authority, "a", fabric);
            let mut listener = a.listen().expect("random numbers");
            let mut dialled = dial(&a, &a, "a", listener.number()).expect("it is a member");
            let (_, mut taken) = poll(|| listener.take());
            send(&mut *dialled, 0, 5);
            assert_eq!(receive(&mut *taken, 1), 5, "{fabric}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_of_the_handshake_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = wire::decode::<PairHello>(&bytes);
            let _ = wire::decode::<PairWelcome>(&bytes);
        }
    }
}
