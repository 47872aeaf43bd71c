//! The launcher's part of a membership that may change: where its workers come to, the thread that drives the protocol,
//! and what becomes of a worker that ends.
//!
//! A program that uses `paceline_runtime::elastic` attaches to the socket that it finds in its environment. As long as
//! none has, nothing here has any effect, and the job ends with its first failure as any other.

mod membership;
mod mesh;
mod socket;

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use paceline_runtime::env::ElasticEnv;
use paceline_runtime::membership::Child;
use tempfile::TempDir;

use self::membership::{Input, Membership, Setting};
use self::mesh::Mesh;
pub use self::mesh::{Door, Entry};
use self::socket::Listener;
use crate::cli::RunArgs;
use crate::credentials::{hold, private_folder, private_folder_in};
use crate::ending::Ending;
use crate::error::Error;
use crate::health::Pulse;
use crate::lease::{Keeper, Lease};
use crate::news::News;
use crate::rendezvous::{Rendezvous, Status};

/// The membership of a job, as the supervisor sees it.
pub struct Elastic {
    shared: Arc<Shared>,
    inputs: Sender<Input>,
    socket: PathBuf,
    /// The present process of each rank of this machine, and how many it has had.
    children: Vec<(Child, u32)>,
    next_child: u32,
    restarts_left: u32,
    /// How many processes have been replaced.
    replaced: u32,
    /// Whether ranks are replaced from the beginning: there is no other way to start them again.
    always: bool,
    _listener: Listener,
    _folder: TempDir,
    /// Keeps other launchers from removing the folder.
    _hold: File,
}

/// The other launchers of a job that has several and may lose them.
#[derive(Clone)]
pub struct Companions {
    /// Where this one is dialled, and the others are found.
    pub door: Door,
    /// The address at which other nodes reach the workers of this one.
    pub listen: IpAddr,
    /// Says who is missing.
    pub status: Status,
    /// What decides in place of a vote, if anything does.
    pub lease: Option<Arc<dyn Lease>>,
}

/// What is to become of a rank that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is a rank's end like that of any program.
    Counts,
    /// Another process takes its place, and the others go on meanwhile.
    Replaced,
}

/// What the threads of the membership and the supervisor have in common.
struct Shared {
    state: Mutex<State>,
    news: News,
    pulse: Pulse,
}

#[derive(Default)]
struct State {
    /// Which processes have attached, and whether their training is complete.
    attached: BTreeMap<Child, bool>,
    /// Processes that the others wait for in vain.
    stuck: Vec<Child>,
    /// Why the membership cannot go on.
    failed: Option<String>,
    /// Whether another membership may begin from a checkpoint then.
    has_checkpoints: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves a consistent state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The socket's name in its folder.
const SOCKET: &str = "elastic";

/// The longest path of a socket in bytes (unix(7)), less the zero at its end.
const LONGEST_SOCKET: usize = 107;

impl Elastic {
    /// Listens for workers, of which so many may be replaced. The news of `rendezvous` are rung when
    /// [`failure`](Self::failure) has something to say; `pulse` counts what is said.
    ///
    /// # Errors
    /// [`Error::System`] when there can be no folder, socket or thread.
    pub fn open(
        args: &RunArgs,
        restarts_left: u32,
        rendezvous: &dyn Rendezvous,
        pulse: Pulse,
    ) -> Result<Self, Error> {
        let system = |what: &str| {
            let what = what.to_owned();
            move |e: std::io::Error| Error::System { what: what.clone(), why: e.to_string() }
        };
        let folder = private_folder().and_then(|folder| match folder.path().join(SOCKET) {
            socket if socket.as_os_str().len() > LONGEST_SOCKET => private_folder_in("/dev/shm".as_ref()),
            _ => Ok(folder),
        });
        let folder = folder.map_err(system("cannot make a folder for the membership's socket"))?;
        let _hold =
            hold(folder.path()).map_err(system("cannot hold the folder of the membership's socket"))?;
        let socket = folder.path().join(SOCKET);
        let shared = Arc::new(Shared { state: Mutex::default(), news: rendezvous.news().clone(), pulse });
        let (inputs, heard) = channel();
        let companions = rendezvous.companions();
        let listen = companions.as_ref().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |others| others.listen);
        let lease = companions.as_ref().and_then(|others| others.lease.clone());
        let answers = inputs.clone();
        let lease =
            lease.map(|lease| Keeper::start(lease, move |said| drop(answers.send(Input::Lease(said)))));
        let lease = lease.transpose().map_err(system("cannot start the lease's thread"))?;
        let (mesh, status) =
            companions.map(|others| (Mesh::new(others.door, inputs.clone()), others.status)).unzip();
        let always = mesh.is_some();
        let membership = Membership::new(Setting::new(args, listen), shared.clone(), status, (mesh, lease));
        membership.start(heard).map_err(system("cannot start the membership's thread"))?;
        let listener = socket::listen(&socket, inputs.clone())
            .map_err(system(&format!("cannot listen for workers at {}", socket.display())))?;
        let (children, next_child) = (vec![(Child(0), 0); args.ranks as usize], 0);
        let (_listener, _folder) = (listener, folder);
        Ok(Self {
            shared,
            inputs,
            socket,
            children,
            next_child,
            restarts_left,
            replaced: 0,
            always,
            _listener,
            _folder,
            _hold,
        })
    }

    /// Whether a process has attached: then the job lives as the membership does.
    pub fn has_members(&self) -> bool {
        !self.shared.lock().attached.is_empty()
    }

    /// What the next process of a rank must find in its environment. Ranks are counted from 0 on this machine.
    pub fn next_process(&mut self, rank: u32) -> (&'static str, String) {
        self.next_child += 1;
        let (child, started) = &mut self.children[rank as usize];
        let life = *started;
        (*child, *started) = (Child(self.next_child), life + 1);
        ElasticEnv::to_var(self.next_child, life, &self.socket)
    }

    /// `waitpid` has returned for the process of a rank. Tells the membership at once.
    pub fn ended(&mut self, rank: u32, ending: Ending) -> Fate {
        let (child, _) = self.children[rank as usize];
        // Before the membership can say what this death means: that is no reason for the death itself to count.
        let state = self.shared.lock();
        // Fails when the thread has ended, and then there is no membership.
        let _ = self.inputs.send(Input::Died(child));
        // What fails when the training is complete is the program's own affair, which no other process makes good.
        let had_finished = state.attached.get(&child).is_some_and(|finished| *finished);
        if state.attached.is_empty() && !self.always
            || had_finished
            || ending.is_success()
            || self.restarts_left == 0
            || state.failed.is_some()
        {
            return Fate::Counts;
        }
        self.restarts_left -= 1;
        self.replaced += 1;
        Fate::Replaced
    }

    /// How many processes have been replaced.
    pub fn replaced(&self) -> u32 {
        self.replaced
    }

    /// Whether all ranks may start again after the membership's [`failure`](Self::failure), since there are checkpoints to
    /// go on from. Of several launchers each ends, and whoever starts it again has the job founded anew.
    pub fn may_begin_again(&self) -> bool {
        self.restarts_left > 0 && !self.always && self.shared.lock().has_checkpoints
    }

    /// The ranks whose processes do not run on though the others wait for them. Each is named once.
    pub fn take_stuck(&self) -> Vec<u32> {
        let stuck = std::mem::take(&mut self.shared.lock().stuck);
        let rank_of = |child: &Child| self.children.iter().position(|(present, _)| present == child);
        stuck.iter().filter_map(rank_of).map(|rank| rank as u32).collect()
    }

    /// Why the membership cannot go on, once that is so.
    pub fn failure(&self) -> Option<String> {
        self.shared.lock().failed.clone()
    }
}
