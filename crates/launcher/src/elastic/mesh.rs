//! What the launchers of a job whose membership may change say to each other: messages of the membership, where their
//! workers are reached, and who else there is.
//!
//! Each launcher dials each other one, over TLS with the job's certificates, and speaks on the connections that it has
//! dialled; on those that it has accepted it listens. Node 0 listens at the endpoint that all know. Whoever comes says
//! where it is reached itself, and everybody tells everybody else whom they know. So a launcher that takes the place of
//! one that died finds the others through node 0, and a node 0 that does is found by the others.
//!
//! A message may be lost with its connection; the membership sees to that. What else must be known is said again on
//! every new connection.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use paceline_runtime::elastic::pipe::{Contact, Wish};
use paceline_runtime::membership::{Checked, Envelope, Incarnation, MAX_WORKERS};
use paceline_runtime::nodes::launcher;
use paceline_transport::tls::{Connection, Endpoint, MessageReceiver};
use paceline_transport::{Error as TransportError, IoHandle};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::membership::Input;

/// Pauses between attempts to reach another launcher. The longest is short enough for one that comes again to be a
/// member within a second or two.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(800));

/// How long whoever has dialled may take to say which launcher it is, and how long one message may take to go out: a
/// launcher that is frozen takes nothing.
const WORD_LIMIT: Duration = Duration::from_secs(5);

/// How long another launcher may take to answer when it is dialled. The system asks again after a second, so two are two
/// attempts; with more of them the pauses would grow, and a network that has healed would not be noticed for long.
const DIAL_LIMIT: Duration = Duration::from_secs(2);

/// How often a launcher is told that this one is there, and how many times of that one may be silent before it is dialled
/// anew: TCP waits twice as long after each attempt, so a connection over which a network was cut for a few seconds takes
/// as many again to go on once it is whole.
const ALIVE_INTERVAL: Duration = Duration::from_millis(500);
const SILENT_INTERVALS: u32 = 4;

/// How long a host may take to say whether anybody listens at an address of its own.
const KNOCK_LIMIT: Duration = Duration::from_millis(300);

/// After which pauses it is asked: a process that was killed closes its connections and its port one after the other, so that
/// somebody may still seem to listen.
const KNOCKS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(10), Duration::from_millis(50)];

/// Told to somebody who is no launcher.
const NOT_A_LAUNCHER: &str = "the job's number of nodes may change, and its programs are to train with \
                              paceline_runtime::elastic; give --nnodes one number for others, or \
                              --rdzv-backend c10d, which starts them all again";

/// A launcher, as others know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its place.
    pub node: u32,
    /// When the process was started, in microseconds since 1970: of two at a place the later one counts.
    pub birth: u64,
    /// Where it is dialled.
    pub addr: SocketAddr,
    /// The most nodes, and the ranks of each, that it was started for: the same for all.
    pub nodes: u32,
    pub ranks: u32,
    /// The name of the run, the same too.
    pub run_id: String,
    /// What names the lease that decides, if one does; the same too.
    pub lease: Option<String>,
}

impl Entry {
    /// Why a launcher that says that it is this one cannot take part, for one that is `me` and knows somebody at its place.
    fn unfit(&self, me: &Self, known: Option<&Self>) -> Option<String> {
        if self.run_id != me.run_id {
            return Some(format!(
                "it was started with --rdzv-id {} and this one with {}: it is of another run",
                self.run_id.escape_debug(),
                me.run_id
            ));
        }
        if (self.nodes, self.ranks) != (me.nodes, me.ranks) {
            return Some(format!(
                "it was started for up to {} nodes of {} ranks and this one for {} of {}; start all with the same \
                 --nnodes and --nproc-per-node",
                self.nodes, self.ranks, me.nodes, me.ranks
            ));
        }
        if self.lease != me.lease {
            let reason = match (&self.lease, &me.lease) {
                (Some(_), Some(_)) => {
                    "its lease is another file than that of this one; give all the same --lease"
                }
                (Some(_), None) => {
                    "it goes by a lease and this one by a majority; start all with the same --fence"
                }
                _ => "it goes by a majority and this one by a lease; start all with the same --fence",
            };
            return Some(reason.to_owned());
        }
        let later = known.is_some_and(|known| known.birth > self.birth);
        later.then(|| {
            "by their clocks another launcher of its node was started after it; if that was the one before, set the \
             clock of its machine and start it again"
                .to_owned()
        })
    }
}

/// What one launcher says to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Word {
    /// The first on a connection: who dials.
    Hello(Entry),
    /// All launchers that are known.
    Known(Vec<Entry>),
    /// Of the membership.
    Says(Envelope),
    /// What the programs here ask for.
    Wish(Wish),
    /// All workers here: what was said of others is over. Where these are reached is said next.
    Workers(Vec<Incarnation>),
    /// Where a worker here is reached.
    Contact(Contact),
    /// That admission of a worker here is over.
    Forget(Incarnation),
    /// All members here have completed the training.
    Finished,
    /// This launcher is there. Said all the time: connections on which nothing comes are of no use.
    Alive,
}

/// What there is before the mesh: where this launcher listens, and whom it looks for.
#[derive(Clone)]
pub struct Door {
    /// Runs the connections.
    pub io: IoHandle,
    /// Where this launcher is dialled.
    pub endpoint: Endpoint,
    /// Who it is.
    pub me: Entry,
    /// The number of places.
    pub nodes: u32,
    /// Where node 0 is dialled.
    pub meeting: String,
}

/// The connections to all other launchers, until it is dropped.
pub struct Mesh {
    shared: Arc<Shared>,
    accept: JoinHandle<()>,
}

struct Shared {
    door: Door,
    inputs: Sender<Input>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: BTreeMap<u32, Entry>,
    /// By node, the birth of the process that was refused last, of which the log speaks once.
    refused: BTreeMap<u32, u64>,
    lanes: BTreeMap<u32, Lane>,
    /// Who has said something since its lane has looked.
    heard: BTreeSet<u32>,
    // What is said again on every new connection:
    wish: Option<Wish>,
    contacts: BTreeMap<Incarnation, Contact>,
    finished: bool,
}

/// What goes to one launcher.
struct Lane {
    words: UnboundedSender<Word>,
    task: JoinHandle<()>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Mesh {
    /// Looks for the others, and tells `inputs` what they say.
    pub fn new(door: Door, inputs: Sender<Input>) -> Self {
        let shared = Arc::new(Shared { door, inputs, state: Mutex::default() });
        let accept = shared.door.io.spawn(accept_all(shared.clone()));
        if shared.door.me.node != 0 {
            // Node 0 is dialled where it was said to be, whatever it says itself.
            let addr = SocketAddr::from(([0, 0, 0, 0], 0));
            shared.learn(vec![Entry { node: 0, birth: 0, addr, ..shared.door.me.clone() }]);
        }
        Self { shared, accept }
    }

    /// Tells the launcher of a node. May be lost. Does not block.
    pub fn say(&self, node: u32, envelope: Envelope) {
        if let Some(lane) = self.shared.lock().lanes.get(&node) {
            lane.say(Word::Says(envelope));
        }
    }

    /// Tells all, also those that come later.
    pub fn announce(&self, word: Word) {
        let mut state = self.shared.lock();
        match &word {
            Word::Wish(wish) => state.wish = Some(*wish),
            Word::Contact(contact) => {
                state.contacts.insert(contact.incarnation, contact.clone());
            }
            Word::Forget(incarnation) => {
                state.contacts.remove(incarnation);
            }
            Word::Finished => state.finished = true,
            Word::Hello(_) | Word::Known(_) | Word::Workers(_) | Word::Says(_) | Word::Alive => {}
        }
        state.tell_all(&word);
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.accept.abort();
        self.shared.lock().lanes.clear();
    }
}

impl Lane {
    fn say(&self, word: Word) {
        // Fails when the task has been ended for a successor.
        let _ = self.words.send(word);
    }
}

impl State {
    fn tell_all(&self, word: &Word) {
        self.lanes.values().for_each(|lane| lane.say(word.clone()));
    }

    /// What a launcher has to know that has just been reached.
    fn introduction(&self, me: &Entry) -> Vec<Word> {
        let known = self.known.values().chain([me]).cloned().collect();
        let wish = self.wish.map(Word::Wish);
        // Somebody may have been told of workers that went while there was no connection.
        let workers = Word::Workers(self.contacts.keys().copied().collect());
        let contacts = self.contacts.values().cloned().map(Word::Contact);
        let finished = self.finished.then_some(Word::Finished);
        [Word::Hello(me.clone()), Word::Known(known)]
            .into_iter()
            .chain(wish)
            .chain([workers])
            .chain(contacts)
            .chain(finished)
            .collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves a consistent state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, node: u32, heard: Heard) {
        // Fails when the membership's thread has ended.
        let _ = self.inputs.send(Input::Launcher { node, heard });
    }

    /// Takes in whom somebody knows; news is passed on, and whoever is new is dialled.
    fn learn(self: &Arc<Self>, entries: Vec<Entry>) {
        let mut state = self.lock();
        let mut is_news = false;
        for entry in entries {
            let known = state.known.get(&entry.node);
            let is_other = entry.node < self.door.nodes && entry.node != self.door.me.node;
            if !is_other || known.is_some_and(|known| known.birth >= entry.birth) {
                continue;
            }
            is_news = true;
            // Under the lock, so that the membership hears of one that comes before it hears what it says.
            self.tell(entry.node, Heard::Came);
            let (words, queue) = unbounded_channel();
            let task = self.door.io.spawn(reach(self.clone(), entry.clone(), queue));
            state.lanes.insert(entry.node, Lane { words, task });
            state.known.insert(entry.node, entry);
        }
        if is_news {
            let known = state.known.values().chain([&self.door.me]).cloned().collect();
            state.tell_all(&Word::Known(known));
        }
    }

    /// Whether that launcher has said something since this was asked last.
    fn was_heard(&self, node: u32) -> bool {
        self.lock().heard.remove(&node)
    }

    fn unfit(&self, entry: &Entry) -> Option<String> {
        entry.unfit(&self.door.me, self.lock().known.get(&entry.node))
    }

    fn warn_once(&self, entry: &Entry, reason: &str) {
        if self.lock().refused.insert(entry.node, entry.birth) != Some(entry.birth) {
            tracing::warn!(node = entry.node, reason, "a launcher is not let in");
        }
    }

    async fn address(&self, entry: &Entry) -> io::Result<SocketAddr> {
        if entry.node != 0 {
            return Ok(entry.addr);
        }
        let mut found = lookup_host(&self.door.meeting).await?;
        found.next().ok_or_else(|| io::Error::other("the name has no address"))
    }
}

/// What is heard of another launcher.
pub enum Heard {
    /// Another process has its place.
    Came,
    /// It says something.
    Word(Word),
    /// A connection to it has ended.
    Lost,
    /// Its host says that nobody listens where it did: the process is no more.
    Gone,
}

// ---- speaking ----

/// Keeps a connection to a launcher, and says there what is to be said, until the task is ended.
async fn reach(shared: Arc<Shared>, entry: Entry, mut queue: UnboundedReceiver<Word>) {
    let mut pause = PAUSES.0;
    loop {
        match reach_once(&shared, &entry, &mut queue, &mut pause).await {
            Ok(()) => return,
            Err(error) => tracing::debug!(node = entry.node, %error, "cannot tell a launcher"),
        }
        sleep(pause.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
        pause = (pause * 2).min(PAUSES.1);
        // What was to be said meanwhile is said again by whoever needs it.
        while queue.try_recv().is_ok() {}
    }
}

async fn reach_once(
    shared: &Shared,
    entry: &Entry,
    queue: &mut UnboundedReceiver<Word>,
    pause: &mut Duration,
) -> Result<(), TransportError> {
    let node = entry.node;
    let unknown = |error: io::Error| TransportError::Usage { reason: error.to_string() };
    let addr = shared.address(entry).await.map_err(unknown)?;
    let dialled = timeout(DIAL_LIMIT, shared.door.endpoint.connect(addr, &launcher(node as usize))).await;
    let connection = dialled.map_err(|_| silent(node, DIAL_LIMIT))??;
    let (mut sender, mut receiver) = connection.open_messages().await?;
    *pause = PAUSES.0;
    // What is announced from here on is in the queue too, and saying it twice does no harm.
    let mut words = shared.lock().introduction(&shared.door.me).into_iter();
    // One that did not run for a while has missed its own intervals too.
    let mut alive = interval(ALIVE_INTERVAL);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut silence = 0;
    let ended = loop {
        let word = match words.next() {
            Some(word) => word,
            None => tokio::select! {
                word = queue.recv() => match word {
                    Some(word) => word,
                    None => return Ok(()),
                },
                // The other side says nothing here: this is the end.
                said = receiver.recv::<Word>() => break said.map(drop),
                _ = alive.tick() => {
                    silence = if shared.was_heard(node) { 0 } else { silence + 1 };
                    if silence > SILENT_INTERVALS {
                        break Err(silent(node, ALIVE_INTERVAL * SILENT_INTERVALS));
                    }
                    Word::Alive
                }
            },
        };
        match timeout(WORD_LIMIT, sender.send(&word)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => break Err(error),
            Err(_) => break Err(silent(node, WORD_LIMIT)),
        }
    };
    drop(connection);
    shared.tell(node, if is_gone(addr).await { Heard::Gone } else { Heard::Lost });
    ended.and(Err(TransportError::Usage { reason: "it closed the connection".to_owned() }))
}

/// Whether nobody listens there any more, as far as the host says.
async fn is_gone(addr: SocketAddr) -> bool {
    for pause in KNOCKS {
        sleep(pause).await;
        match timeout(KNOCK_LIMIT, TcpStream::connect(addr)).await {
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return true,
            Ok(Ok(_)) => {}
            // The host says nothing.
            _ => return false,
        }
    }
    false
}

fn silent(node: u32, elapsed: Duration) -> TransportError {
    let what = format!("the launcher of node {node}");
    TransportError::TimedOut { what, ranks: Vec::new(), elapsed }
}

// ---- listening ----

async fn accept_all(shared: Arc<Shared>) {
    let mut served = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            connection = shared.door.endpoint.accept() => match connection {
                Ok(connection) => drop(served.spawn(serve(connection, shared.clone()))),
                Err(_) => return,
            },
            Some(_) = served.join_next() => {}
        }
    }
}

async fn serve(connection: Connection, shared: Arc<Shared>) {
    if let Err(error) = listen(&connection, &shared).await {
        let (remote, member) = (connection.remote_address(), connection.member());
        tracing::debug!(%remote, member, %error, "a launcher's connection ended");
        connection.close(&error.to_string());
    }
}

async fn listen(connection: &Connection, shared: &Arc<Shared>) -> Result<(), TransportError> {
    let node = (0..shared.door.nodes).find(|&node| connection.member() == launcher(node as usize));
    let node = node.ok_or_else(|| refused(NOT_A_LAUNCHER))?;
    let (_sender, mut receiver) = connection.accept_messages().await?;
    let first = timeout(WORD_LIMIT, receiver.recv::<Word>()).await;
    let Ok(Some(Word::Hello(entry))) = first.unwrap_or(Ok(None)) else {
        return Err(refused("the first message must be a hello"));
    };
    if entry.node != node {
        return Err(refused("the certificate is not that of this node"));
    }
    let birth = entry.birth;
    if let Some(reason) = shared.unfit(&entry) {
        shared.warn_once(&entry, &reason);
        return Err(refused(&reason));
    }
    shared.learn(vec![entry]);
    let ended = follow(&mut receiver, node, birth, shared).await;
    shared.tell(node, Heard::Lost);
    ended
}

async fn follow(
    receiver: &mut MessageReceiver,
    node: u32,
    birth: u64,
    shared: &Arc<Shared>,
) -> Result<(), TransportError> {
    while let Some(word) = receiver.recv::<Word>().await? {
        // Its successor has come: what is left on this connection is of the one before.
        {
            let mut state = shared.lock();
            if state.known.get(&node).is_some_and(|known| known.birth != birth) {
                return Err(refused("another launcher has this place"));
            }
            state.heard.insert(node);
        }
        match word {
            Word::Known(entries) => shared.learn(entries),
            Word::Alive => {}
            Word::Hello(_) => return Err(refused("a second hello")),
            Word::Says(envelope) if envelope.from.seat.0 != node => {
                return Err(refused("a message in the name of another node"));
            }
            word => {
                check(&word)?;
                shared.tell(node, Heard::Word(word));
            }
        }
    }
    Ok(())
}

fn check(word: &Word) -> Result<(), TransportError> {
    match word {
        Word::Says(envelope) => envelope.check().map_err(|reason| refused(&reason)),
        Word::Workers(workers) if workers.len() > MAX_WORKERS => Err(refused("too many workers")),
        _ => Ok(()),
    }
}

fn refused(reason: &str) -> TransportError {
    TransportError::Usage { reason: reason.to_owned() }
}

/// Where the workers of another node are reached, as far as that has said.
#[derive(Default)]
pub struct Contacts(BTreeMap<Incarnation, Contact>);

impl Contacts {
    /// Takes one in, if it is of one of these members and there are not too many.
    pub fn insert(&mut self, contact: &Contact, is_member: impl Fn(&str) -> bool) -> bool {
        let fits = is_member(&contact.member) && self.0.len() < 2 * MAX_WORKERS;
        if fits {
            self.0.insert(contact.incarnation, contact.clone());
        }
        fits
    }

    /// Leaves these, and returns those that were there besides.
    pub fn retain(&mut self, workers: &[Incarnation]) -> Vec<Incarnation> {
        let gone: Vec<_> = self.0.keys().filter(|known| !workers.contains(known)).copied().collect();
        gone.iter().for_each(|incarnation| drop(self.0.remove(incarnation)));
        gone
    }

    /// Whether it was there.
    pub fn remove(&mut self, incarnation: Incarnation) -> bool {
        self.0.remove(&incarnation).is_some()
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Contact> {
        self.0.values()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::mpsc::channel;

    use paceline_transport::IoThread;
    use paceline_transport::identity::JobAuthority;

    use super::*;

    /// Its end of the network is fine, so nothing below would ever end the connection.
    #[test]
    fn a_launcher_of_which_nothing_comes_is_dialled_anew() {
        let io = IoThread::start().expect("a thread");
        let authority = JobAuthority::new("job").expect("a name");
        let endpoint = |node| {
            let identity = authority.issue(&launcher(node), Duration::from_secs(3600)).expect("an identity");
            Endpoint::bind(&io.handle(), (Ipv4Addr::LOCALHOST, 0).into(), &identity).expect("a port")
        };
        let (here, there) = (endpoint(1), endpoint(0));
        let (addr, meeting) = (here.local_addr(), there.local_addr().to_string());
        let me = Entry { node: 1, birth: 1, addr, nodes: 2, ranks: 1, run_id: String::new(), lease: None };
        let (inputs, _heard) = channel();
        let _mesh = Mesh::new(Door { io: io.handle(), endpoint: here, me, nodes: 2, meeting }, inputs);
        let mut silent = Vec::new();
        for time in ["first", "second"] {
            let there = there.clone();
            let greeted = async move {
                let connection = there.accept().await?;
                let (sender, mut receiver) = connection.accept_messages().await?;
                let first = receiver.recv::<Word>().await?;
                Ok::<_, TransportError>((connection, sender, receiver, first))
            };
            let greeted = io.handle().block_on(async { timeout(Duration::from_secs(60), greeted).await });
            let (connection, sender, receiver, first) =
                greeted.expect("the thread runs").expect("it comes").expect("it is a launcher");
            assert!(matches!(first, Some(Word::Hello(Entry { node: 1, .. }))), "the {time} time");
            silent.push((connection, sender, receiver));
        }
    }

    #[test]
    fn a_launcher_that_was_started_with_other_numbers_or_before_the_present_one_does_not_fit() {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let run_id = "tuesday".to_owned();
        let me = Entry { node: 0, birth: 5, addr, nodes: 4, ranks: 2, run_id, lease: None };
        let other = Entry { node: 1, birth: 7, ..me.clone() };
        assert_eq!(other.unfit(&me, None), None);
        let ranks = Entry { ranks: 1, ..other.clone() }.unfit(&me, None).expect("other ranks");
        assert!(ranks.contains("4 nodes of 1 ranks and this one for 4 of 2"), "{ranks}");
        assert!(Entry { nodes: 3, ..other.clone() }.unfit(&me, None).is_some());
        let run = Entry { run_id: "monday".to_owned(), nodes: 3, ..other.clone() }.unfit(&me, None);
        assert!(run.is_some_and(|reason| reason.contains("--rdzv-id monday and this one with tuesday")));
        let leased = |name: &str| Entry { lease: Some(name.to_owned()), ..me.clone() };
        assert!(leased("a").unfit(&me, None).is_some_and(|reason| reason.contains("this one by a majority")));
        assert!(me.unfit(&leased("a"), None).is_some_and(|reason| reason.contains("this one by a lease")));
        assert!(leased("a").unfit(&leased("b"), None).is_some_and(|reason| reason.contains("another file")));
        assert_eq!(leased("a").unfit(&leased("a"), None), None);
        let known = |birth| Entry { birth, ..other.clone() };
        assert_eq!(other.unfit(&me, Some(&known(7))), None, "it says hello again");
        assert_eq!(other.unfit(&me, Some(&known(6))), None, "it is the successor");
        assert!(other.unfit(&me, Some(&known(8))).is_some_and(|reason| reason.contains("clock")));
    }
}
