//! The launcher of a node other than 0: gets its certificates from launcher 0 and stays connected to it.

use std::ffi::OsString;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use paceline_runtime::nodes::{Attendance, Comer, Generation, Past, TAKEN};
use paceline_transport::boot::{self, Certified, Claim, Failure};
use paceline_transport::identity::Identity;
use paceline_transport::secret::JobSecret;
use paceline_transport::tls::Dialler;
use paceline_transport::{IoHandle, IoThread};

use crate::cli::{Changes, NodeArgs, RunArgs, Seating};
use crate::console::Console;
use crate::credentials::{self, Credentials};
use crate::discovery::Guide;
use crate::discovery::search::jittered;
use crate::ending::Ending;
use crate::error::Error;
use crate::job::Cause;
use crate::news::News;
use crate::rendezvous::{Next, Rendezvous, Status, Told, cause, elsewhere, list_nodes, worker_env};
use crate::secret;

/// Pauses between attempts to reach launcher 0, which may not be up yet.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// When the first failed attempt is worth a line.
const STATUS_AFTER: Duration = Duration::from_secs(1);

/// How long the verdict may take. Launcher 0 waits for a second itself.
const VERDICT: Duration = Duration::from_secs(3);

/// How long a launcher that leaves takes to say so.
const FAREWELL: Duration = Duration::from_millis(100);

/// See [`rendezvous::open`](crate::rendezvous::open).
pub fn open(args: &RunArgs, console: &Console) -> Result<Box<dyn Rendezvous>, Error> {
    let news = News::new().map_err(|e| system("cannot make an event descriptor", &e))?;
    let io = IoThread::start().map_err(|e| system("cannot start the I/O thread", &e))?;
    let coming = Coming {
        args: args.clone(),
        io: io.handle(),
        status: Status::new(console),
        news: news.clone(),
        deadline: Instant::now() + args.rendezvous_timeout,
    };
    let (args, tie) = coming.come(None)?;
    tracing::info!(node = args.node(), "the nodes have come");
    let progress = Mutex::new(Progress::of(tie.attendance.generation()));
    let status = coming.status;
    Ok(Box::new(Follower { args, tie: Mutex::new(tie), progress, status, news, io }))
}

/// The fields are dropped in this order: first the connection goes, then the certificates and the thread.
struct Follower {
    args: RunArgs,
    /// To the present launcher 0.
    tie: Mutex<Tie>,
    progress: Mutex<Progress>,
    status: Status,
    news: News,
    io: IoThread,
}

/// What joins this launcher to launcher 0, which gives the certificates too.
struct Tie {
    attendance: Attendance,
    credentials: Arc<Credentials>,
}

/// How far the present generation has come here.
struct Progress {
    generation: Generation,
    /// When the last rank of this machine had ended.
    ended: Option<Instant>,
    /// The way to another launcher 0, which takes the place of one that was lost.
    again: Option<Receiver<Result<Tie, Error>>>,
}

impl Progress {
    fn of(generation: Generation) -> Self {
        Self { generation, ended: None, again: None }
    }
}

impl Rendezvous for Follower {
    fn worker_env(&self, rank: u32) -> Vec<(String, OsString)> {
        let (rendezvous, generation) = (self.args.rendezvous.to_string(), self.generation());
        worker_env(&self.args, rank, (rendezvous, &generation), &self.tie().credentials)
    }

    fn announce_exit(&self, rank: u32, _: bool) {
        let rank = self.number(rank);
        self.tie().attendance.announce_exit(rank);
    }

    fn announce_death(&self, rank: u32, ending: Ending, by_itself: bool) {
        let rank = self.number(rank);
        self.tie().attendance.announce_death(rank, &ending.to_string(), ending.exit_code(), by_itself);
    }

    fn ask_for_traces(&self) {
        self.tie().attendance.ask_for_traces();
    }

    fn ranks_ended(&self, told: Told) {
        let mut progress = self.progress();
        if progress.ended.is_none() {
            progress.ended = Some(Instant::now());
            match told {
                Told::ToStop if self.args.may_start_again(&progress.generation) => {
                    self.tie().attendance.announce_leave()
                }
                // Members of a training are on one machine so far.
                Told::ToStop | Told::Nothing | Told::NotToStartAgain => self.tie().attendance.announce_end(),
            }
        }
    }

    fn failure_elsewhere(&self) -> Option<(String, u8)> {
        elsewhere(&self.args, self.tie().attendance.failure()?)
    }

    fn node(&self) -> u32 {
        self.args.node()
    }

    fn generation(&self) -> Generation {
        self.progress().generation.clone()
    }

    fn next(&self, told: Told) -> Next {
        let mut progress = self.progress();
        if let Some(again) = &progress.again {
            return match again.try_recv() {
                Err(TryRecvError::Empty) => Next::Wait,
                Ok(Ok(tie)) => self.go_on(&mut progress, tie),
                Ok(Err(error)) => self.give_up(&error.to_string()),
                Err(TryRecvError::Disconnected) => self.give_up("no thread looks for it any more"),
            };
        }
        if told == Told::Nothing && self.may_have_another_launcher_0(&progress) {
            progress.again = Some(self.look_for_launcher_0(&progress.generation));
            return Next::Wait;
        }
        if self.tie().attendance.verdict().is_some() {
            return Next::End;
        }
        let present = self.tie().attendance.generation();
        if present.number > progress.generation.number && told == Told::Nothing {
            *progress = Progress::of(present);
            return Next::Again;
        }
        let patience = match (self.args.may_start_again(&progress.generation), told) {
            (false, _) => VERDICT,
            // The verdict takes as long as the ranks of all machines.
            (_, Told::Nothing | Told::NotToStartAgain) => return Next::Wait,
            (_, Told::ToStop) => FAREWELL,
        };
        let waited = progress.ended.is_some_and(|at| at.elapsed() >= patience);
        if waited { Next::End } else { Next::Wait }
    }

    fn cause(&self) -> Option<Cause> {
        // Ranks that fail because the job is over before they are told so have not made it fail.
        let generation = self.generation();
        let tie = self.tie();
        let attendance = &tie.attendance;
        let completed = attendance.failure().filter(|failure| failure.exit_code == 0);
        let failure = completed.or_else(|| attendance.verdict().unwrap_or_else(|| attendance.failure()));
        failure.map(|failure| cause(&self.args, &generation, failure))
    }

    fn news(&self) -> &News {
        &self.news
    }
}

impl Follower {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        // Fields are replaced whole.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a rank of this machine among those of the present generation.
    fn number(&self, rank: u32) -> usize {
        (self.args.within(&self.generation()).first_rank() + rank) as usize
    }

    fn tie(&self) -> MutexGuard<'_, Tie> {
        // Replaced whole.
        self.tie.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether launcher 0 was lost from a job that starts again after that.
    fn may_have_another_launcher_0(&self, progress: &Progress) -> bool {
        let tie = self.tie();
        let attendance = &tie.attendance;
        let is_completed = attendance.failure().is_some_and(|failure| failure.exit_code == 0);
        attendance.is_lost() && !is_completed && progress.generation.restarts_left() > 0
    }

    /// Begins to wait for a launcher 0 in the place of the one that was lost, as any that is late is waited for.
    fn look_for_launcher_0(&self, generation: &Generation) -> Receiver<Result<Tie, Error>> {
        let (found, outcome) = channel();
        let (generation, news) = (generation.past(), self.news.clone());
        let coming = Coming {
            args: self.args.seated(),
            io: self.io.handle(),
            status: self.status.clone(),
            news: news.clone(),
            deadline: Instant::now() + self.args.rendezvous_timeout,
        };
        self.status.say(&format!("launcher 0 was lost; waiting for another one at {}", self.args.rendezvous));
        thread::spawn(move || {
            let tie = coming.come(Some(generation)).map(|(_, tie)| tie);
            // Whoever does not wait any more is about to end.
            let _ = found.send(tie);
            news.ring();
        });
        outcome
    }

    fn go_on(&self, progress: &mut Progress, tie: Tie) -> Next {
        *progress = Progress::of(tie.attendance.generation());
        *self.tie() = tie;
        Next::Again
    }

    fn give_up(&self, why: &str) -> Next {
        self.status.say(&format!("no launcher 0 has come again: {why}"));
        Next::End
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // A thread that still waits for launcher 0 does not run its destructors at the end of the process.
        if self.progress().again.is_some() {
            credentials::remove_stored();
        }
    }
}

/// A launcher on its way to launcher 0.
struct Coming {
    args: RunArgs,
    io: IoHandle,
    status: Status,
    news: News,
    deadline: Instant,
}

impl Coming {
    /// Gets certificates, attends, and waits for all others. `after` is the generation that this launcher has been part of.
    /// Blocks.
    fn come(&self, after: Option<Past>) -> Result<(RunArgs, Tie), Error> {
        let Self { args, status, .. } = self;
        let nodes = args.nodes.as_ref().expect("node 0 is the only one of a job on one machine");
        if let Some(folder) = &args.identity {
            let Seat { claim, members } = self.seats(nodes)?.swap_remove(0);
            let credentials = Arc::new(Credentials::awaited(folder, &members, self.deadline, status)?);
            credentials.follow(&self.io);
            status.waiting_for(&format!("node 0 at {}", args.rendezvous));
            let attendance = self.attend(args, credentials.launcher(), (claim, after));
            let attendance = attendance.map_err(|e| Error::nodes(args, &e))?;
            return Ok((args.clone(), Tie { attendance, credentials }));
        }
        let office = Office::of(args, Arc::new(secret::of(nodes.secret.as_deref())?));
        let mut pause = PAUSES.0;
        loop {
            match self.come_with_secret(&office, nodes, after)? {
                Ok(come) => return Ok(come),
                // Launcher 0 was lost while the others came; another one has other certificates.
                Err(reason) if Instant::now() + pause < self.deadline => {
                    status.waiting_for(&format!("{} ({reason})", office.name));
                    thread::sleep(jittered(pause, fastrand::f64()));
                    pause = (pause * 2).min(PAUSES.1);
                }
                Err(reason) => {
                    let endpoint = office.server.clone();
                    return Err(Error::Nodes { endpoint, why: format!("launcher 0 was lost: {reason}") });
                }
            }
        }
    }

    /// The inner error says how launcher 0 was lost meanwhile.
    fn come_with_secret(
        &self,
        office: &Office,
        nodes: &NodeArgs,
        after: Option<Past>,
    ) -> Result<Result<(RunArgs, Tie), String>, Error> {
        let (seat, certified) =
            office.find_seat_on(&self.io, self.seats(nodes)?, self.deadline, &self.status)?;
        let Certified { identities, valid_for } = certified;
        let (args, claim) = (self.args.at(seat.claim.node), seat.claim.clone());
        let credentials = Arc::new(Credentials::store(&identities)?);
        // Before the others come, which may take long.
        let office = office.clone();
        self.io.spawn(credentials::keep_fresh(Arc::downgrade(&credentials), valid_for, move || {
            let (office, seat) = (office.clone(), seat.clone());
            async move {
                let fetched = office.fetch(&seat, 0).await.map_err(|failure| failure.to_string())?;
                Ok((fetched.identities, fetched.valid_for))
            }
        }));
        match self.attend(&args, credentials.launcher(), (claim, after)) {
            Ok(attendance) => Ok(Ok((args, Tie { attendance, credentials }))),
            Err(paceline_runtime::Error::Transport(lost)) => Ok(Err(lost.to_string())),
            Err(e) => Err(Error::nodes(&args, &e)),
        }
    }

    /// The place of this node, or all that there are besides node 0's.
    fn seats(&self, nodes: &NodeArgs) -> Result<Vec<Seat>, Error> {
        let args = &self.args;
        let incarnation = incarnation().map_err(|e| system("cannot draw a random number", &e))?;
        let seat = |node| {
            let claim = Claim {
                node,
                nodes: nodes.count.max,
                least_nodes: nodes.count.min,
                ranks_per_node: args.ranks,
                run_id: args.torchrun.run_id.clone(),
                incarnation,
            };
            Seat { claim, members: credentials::members(&args.at(node)) }
        };
        Ok(match nodes.seating {
            Seating::Given => vec![seat(nodes.rank)],
            Seating::Any { .. } => (1..nodes.count.max).map(seat).collect(),
        })
    }

    fn attend(
        &self,
        args: &RunArgs,
        identity: &Identity,
        (claim, after): (Claim, Option<Past>),
    ) -> Result<Attendance, paceline_runtime::Error> {
        let server = args.rendezvous.to_string();
        let dialler = Dialler::new(&self.io, identity)?;
        let (status, bell, node) = (self.status.clone(), self.news.clone(), args.node());
        let args_of_line = args.clone();
        let waiting = move |missing: &[u32]| {
            // Launcher 0 may not have counted this one when it wrote the list.
            let others: Vec<u32> = missing.iter().copied().filter(|&missing| missing != node).collect();
            if !others.is_empty() {
                status.waiting_for(&list_nodes(&args_of_line, &others));
            }
        };
        let on_change = Arc::new(move || bell.ring());
        let comer = Comer { claim, after, deadline: self.deadline, patience: patience(args) };
        Attendance::begin(&self.io, dialler, &server, comer, waiting, on_change)
    }
}

/// How long this launcher waits for its place to become free. Where the job may start again that takes as long as the
/// ranks of all machines take to end.
fn patience(args: &RunArgs) -> Duration {
    let starts_again = args.max_restarts > 0 || args.changes() != Changes::None;
    if starts_again { args.rendezvous_timeout } else { TAKEN }
}

/// A place in the job that this launcher may take, and whom it then needs certificates for.
#[derive(Clone)]
struct Seat {
    claim: Claim,
    members: Vec<String>,
}

/// Where certificates come from.
#[derive(Clone)]
struct Office {
    server: String,
    guide: Guide,
    /// How the lines call it.
    name: String,
    secret: Arc<JobSecret>,
    /// How long a place that is taken may take to become free.
    patience: Duration,
}

impl Office {
    fn of(args: &RunArgs, secret: Arc<JobSecret>) -> Self {
        let server = args.rendezvous.to_string();
        let name = match args.pod.wanted.first() {
            Some(pod) => format!("1 of {}: {}", args.pod.wanted.len(), pod.name),
            None => format!("node 0 at {server}"),
        };
        Self { server, guide: Guide::to(&args.rendezvous), name, secret, patience: patience(args) }
    }

    async fn fetch(&self, seat: &Seat, attempt: usize) -> Result<Certified, Failure> {
        let server = self.guide.address(attempt).await.map_err(|e| Failure::Unreachable(e.to_string()))?;
        boot::certify(&server, &self.secret, &seat.claim, &seat.members).await
    }

    /// Blocks until there are certificates, or an error says why not.
    fn find_seat_on(
        &self,
        io: &IoHandle,
        seats: Vec<Seat>,
        deadline: Instant,
        status: &Status,
    ) -> Result<(Seat, Certified), Error> {
        let fetching = self.clone().find_seat(seats, deadline, status.clone());
        let fetched = io.block_on(fetching).map_err(|e| system("cannot use the I/O thread", &e))?;
        fetched.map_err(|why| Error::Nodes { endpoint: self.server.clone(), why })
    }

    fn in_vain(&self, waited_s: u64, failure: &Failure) -> String {
        let whom = self.name.strip_suffix(&format!(" at {}", self.server)).unwrap_or(&self.name);
        format!("timed out after {waited_s} s waiting for {whom}: {failure}")
    }

    /// Tries each of the seats in turn until it has certificates for one, is refused, or the deadline has come. The error is the reason.
    async fn find_seat(
        self,
        seats: Vec<Seat>,
        deadline: Instant,
        status: Status,
    ) -> Result<(Seat, Certified), String> {
        let (start, mut pause) = (Instant::now(), PAUSES.0);
        let mut taken: Option<Instant> = None;
        let (mut next, mut attempt) = (0, 0);
        while let Some(seat) = seats.get(next) {
            let failure = match self.fetch(seat, attempt).await {
                Ok(certified) => return Ok((seat.clone(), certified)),
                Err(failure) => failure,
            };
            match &failure {
                Failure::Refused(reason) => return Err(reason.clone()),
                Failure::NotNow(reason) => {
                    if taken.get_or_insert_with(Instant::now).elapsed() >= self.patience {
                        return Err(reason.clone());
                    }
                    // The next one may be free, at the same address.
                    next = (next + 1) % seats.len();
                    if next != 0 {
                        continue;
                    }
                }
                Failure::Unreachable(_) => taken = None,
            }
            if start.elapsed() >= STATUS_AFTER {
                status.waiting_for(&format!("{} ({failure})", self.name));
            }
            if Instant::now() + pause >= deadline {
                let waited = start.elapsed().as_secs();
                return Err(self.in_vain(waited, &failure));
            }
            tokio::time::sleep(jittered(pause, fastrand::f64())).await;
            pause = (pause * 2).min(PAUSES.1);
            attempt += 1;
        }
        Err("the job has no place for another node".to_owned())
    }
}

fn incarnation() -> rustix::io::Result<u128> {
    let mut random = [0; 16];
    let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    // Up to 256 bytes come whole, or not at all (getrandom(2)).
    debug_assert_eq!(got, random.len());
    Ok(u128::from_le_bytes(random))
}

fn system(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::System { what: what.to_owned(), why: why.to_string() }
}
