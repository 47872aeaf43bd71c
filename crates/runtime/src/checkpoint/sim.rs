//! The writer and the recovery over a disk that loses and reorders what was not synced, dies at any operation, and is
//! full when a test wants it: after any crash the newest checkpoint that was made is there, whole.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{Disk, Output};
use super::error::Error;
use super::layout::{Layout, Tensor, TensorMut};
use super::manifest::{Notes, Sha256};
use super::names::{self, Committed, Folder};
use super::publication::Receipt;
use super::recovery::{Checkpoint, Listing, Resumed, resume_alone_from};
use super::writer::{self, Part, Publishing, Site};
use super::{Group, ShardRecord};

/// Blocks of a file reach a disk one by one.
const BLOCK_BYTES: usize = 16;

/// A view of one disk; those of one process die together.
#[derive(Clone, Debug)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    life: Arc<Mutex<Life>>,
    defect: Defect,
}

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Defect {
    None,
    /// Files are not synced.
    NoFileSync,
    /// Folders are not.
    NoFolderSync,
    /// Ranks say that their shards are durable before they are; so the manifest comes before them.
    ReceiptBeforeShard,
    /// What is removed keeps its name on the disk until it is gone.
    RemovedUnderItsName,
}

#[derive(Debug, Default)]
struct Life {
    operations: u64,
    ends_at: Option<u64>,
}

#[derive(Debug)]
struct State {
    nodes: Vec<Node>,
    /// Changes of names that are not durable: each happens as a whole or not at all.
    pending: Vec<Vec<(usize, String, Option<usize>)>>,
    /// How many more bytes can be written.
    room: usize,
}

#[derive(Debug)]
enum Node {
    File { now: Vec<u8>, durable: usize },
    Folder { now: BTreeMap<String, usize>, durable: BTreeMap<String, usize> },
}

const TOP: usize = 0;

fn folder() -> Node {
    Node::Folder { now: BTreeMap::new(), durable: BTreeMap::new() }
}

fn error(kind: io::ErrorKind) -> io::Error {
    kind.into()
}

impl State {
    fn entries(&self, node: usize) -> io::Result<&BTreeMap<String, usize>> {
        match &self.nodes[node] {
            Node::Folder { now, .. } => Ok(now),
            Node::File { .. } => Err(error(io::ErrorKind::NotADirectory)),
        }
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let names = path.components().filter_map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        });
        names.into_iter().try_fold(TOP, |node, name| {
            self.entries(node)?.get(name).copied().ok_or_else(|| error(io::ErrorKind::NotFound))
        })
    }

    /// The folder that a path is in, and its name there.
    fn place(&self, path: &Path) -> io::Result<(usize, String)> {
        let name = path.file_name().and_then(|name| name.to_str()).expect("tests use plain names");
        Ok((self.find(path.parent().expect("below the top"))?, name.to_owned()))
    }

    fn change(&mut self, changes: Vec<(usize, String, Option<usize>)>) {
        for (folder, name, node) in &changes {
            let Node::Folder { now, .. } = &mut self.nodes[*folder] else { panic!("{name} is in a folder") };
            set(now, name, *node);
        }
        self.pending.push(changes);
    }

    fn make_durable(&mut self, changes: &[(usize, String, Option<usize>)]) {
        for (folder, name, node) in changes {
            let Node::Folder { durable, .. } = &mut self.nodes[*folder] else {
                panic!("{name} is in a folder")
            };
            set(durable, name, *node);
        }
    }

    /// The power fails.
    fn crash(&mut self, random: &mut fastrand::Rng) {
        let keeps = random.u8(0..=4);
        let pending = std::mem::take(&mut self.pending);
        for changes in pending.iter().filter(|_| random.u8(0..4) < keeps) {
            self.make_durable(changes);
        }
        for node in &mut self.nodes {
            match node {
                Node::Folder { now, durable } => now.clone_from(durable),
                Node::File { now, durable } => {
                    now.truncate(random.usize(*durable..=now.len()));
                    let lost = now[*durable..].chunks_mut(BLOCK_BYTES).filter(|_| random.u8(0..4) >= keeps);
                    lost.for_each(|block| block.fill(0));
                    *durable = now.len();
                }
            }
        }
    }
}

fn set(names: &mut BTreeMap<String, usize>, name: &str, node: Option<usize>) {
    match node {
        Some(node) => drop(names.insert(name.to_owned(), node)),
        None => drop(names.remove(name)),
    }
}

impl SimDisk {
    pub fn new() -> Self {
        let state = State { nodes: vec![folder()], pending: vec![], room: usize::MAX };
        Self { state: Arc::new(Mutex::new(state)), life: Arc::default(), defect: Defect::None }
    }

    /// For another process.
    fn other(&self, ends_at: Option<u64>) -> Self {
        let life = Arc::new(Mutex::new(Life { operations: 0, ends_at }));
        Self { life, ..self.clone() }
    }

    /// How many bytes can still be written.
    pub fn set_room(&self, room: usize) {
        self.lock().room = room;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an operation. The one in which the process dies may have happened.
    fn live(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        life.operations += 1;
        match life.ends_at {
            Some(end) if life.operations > end => Err(error(io::ErrorKind::BrokenPipe)),
            _ => Ok(self.lock()),
        }
    }

    fn is_dead(&self) -> bool {
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        life.ends_at.is_some_and(|end| life.operations > end)
    }

    /// Changes one byte or more of a file, as a bad disk does.
    pub fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.lock();
        let node = state.find(path).expect("the file is there");
        let Node::File { now, durable } = &mut state.nodes[node] else { panic!("not a file") };
        change(now);
        *durable = now.len();
    }
}

impl Disk for SimDisk {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.live()?;
        let mut above: Vec<&Path> = path.ancestors().filter(|path| path.file_name().is_some()).collect();
        above.reverse();
        for path in above {
            let (parent, name) = state.place(path)?;
            if !state.entries(parent)?.contains_key(&name) {
                state.nodes.push(folder());
                let node = state.nodes.len() - 1;
                state.change(vec![(parent, name, Some(node))]);
            }
        }
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        let mut state = self.live()?;
        let (parent, name) = state.place(path)?;
        if state.entries(parent)?.contains_key(&name) {
            return Err(error(io::ErrorKind::AlreadyExists));
        }
        state.nodes.push(Node::File { now: vec![], durable: 0 });
        let node = state.nodes.len() - 1;
        state.change(vec![(parent, name, Some(node))]);
        drop(state);
        Ok(Box::new(SimFile { disk: self.clone(), node }))
    }

    fn open(&self, path: &Path) -> io::Result<(Box<dyn Read>, u64)> {
        let state = self.live()?;
        match &state.nodes[state.find(path)?] {
            Node::File { now, .. } => Ok((Box::new(Cursor::new(now.clone())), now.len() as u64)),
            Node::Folder { .. } => Err(error(io::ErrorKind::IsADirectory)),
        }
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.live()?;
        let node = state.find(path)?;
        if self.defect == Defect::NoFolderSync {
            return Ok(());
        }
        let pending = std::mem::take(&mut state.pending);
        let touches =
            |changes: &Vec<_>| changes.iter().any(|(folder, ..): &(usize, String, _)| *folder == node);
        let (now, later): (Vec<_>, Vec<_>) = pending.into_iter().partition(touches);
        state.pending = later;
        now.iter().for_each(|changes| state.make_durable(changes));
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.live()?;
        let node = state.find(from)?;
        let ((old, old_name), (new, new_name)) = (state.place(from)?, state.place(to)?);
        if state.entries(new)?.contains_key(&new_name) {
            return Err(error(io::ErrorKind::AlreadyExists));
        }
        let is_removal = names::folder(&new_name) == Some(Folder::Removing);
        state.change(vec![(old, old_name, None), (new, new_name, Some(node))]);
        if is_removal && self.defect == Defect::RemovedUnderItsName {
            state.pending.pop();
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.live()?;
        state.find(path)?;
        let (parent, name) = state.place(path)?;
        state.change(vec![(parent, name, None)]);
        Ok(())
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.live()?;
        let node = state.find(path)?;
        if !state.entries(node)?.is_empty() {
            return Err(error(io::ErrorKind::DirectoryNotEmpty));
        }
        let (parent, name) = state.place(path)?;
        state.change(vec![(parent, name, None)]);
        Ok(())
    }

    fn names(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.live()?;
        Ok(state.entries(state.find(path)?)?.keys().cloned().collect())
    }
}

struct SimFile {
    disk: SimDisk,
    node: usize,
}

impl Output for SimFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.disk.live()?;
        let taken = bytes.len().min(state.room);
        state.room -= taken;
        let Node::File { now, .. } = &mut state.nodes[self.node] else { panic!("it was made as a file") };
        now.extend_from_slice(&bytes[..taken]);
        if taken < bytes.len() { Err(error(io::ErrorKind::StorageFull)) } else { Ok(()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.live()?;
        let Node::File { now, durable } = &mut state.nodes[self.node] else {
            panic!("it was made as a file")
        };
        if self.disk.defect != Defect::NoFileSync {
            *durable = now.len();
        }
        Ok(())
    }
}

/// The state after a step: a function of its number.
pub struct Model {
    pub weights: Vec<f32>,
    pub moments: Vec<f64>,
}

impl Model {
    pub fn after(step: u64) -> Self {
        let weights = (0..21).map(|index| (step * 100 + index) as f32).collect();
        Self { weights, moments: (0..7).map(|index| (step * 1_000 + index) as f64 / 3.0).collect() }
    }

    pub fn tensors(&self) -> [Tensor<'_>; 2] {
        [Tensor::new("weights", &[7, 3], &self.weights), Tensor::new("moments", &[7], &self.moments)]
    }

    pub fn tensors_mut(&mut self) -> [TensorMut<'_>; 2] {
        [
            TensorMut::new("weights", &[7, 3], &mut self.weights),
            TensorMut::new("moments", &[7], &mut self.moments),
        ]
    }

    pub fn assert_is_after(&self, step: u64) {
        let expected = Self::after(step);
        assert_eq!((&self.weights, &self.moments), (&expected.weights, &expected.moments), "step {step}");
    }

    pub fn share(&self, rank: usize, world_size: usize) -> Vec<u8> {
        let tensors = self.tensors();
        let layout = Layout::of(&tensors).expect("the shapes fit");
        let spans = layout.share(rank, world_size);
        spans.iter().flat_map(|span| tensors[span.tensor].bytes()[layout.byte_range(span)].to_vec()).collect()
    }
}

pub fn root() -> PathBuf {
    PathBuf::from("/job/checkpoints")
}

pub fn site(disk: &SimDisk, keep: usize) -> Site {
    let layout = Layout::of(&Model::after(0).tensors()).expect("the shapes fit");
    Site { disk: Arc::new(disk.clone()), root: root(), layout: Arc::new(layout), keep }
}

pub fn part(rank: usize, world_size: usize, run: u64, step: u64) -> Part {
    Part { group: Group { rank, world_size, run }, step, cancelled: Arc::default() }
}

/// All ranks save a step, each on its own disk handle, in the order of `order`.
pub fn save(
    disks: &[SimDisk],
    order: &[usize],
    keep: usize,
    run: u64,
    step: u64,
) -> Result<Committed, Error> {
    let (model, world_size) = (Model::after(step), disks.len());
    for &rank in order {
        let (site, part) = (site(&disks[rank], keep), part(rank, world_size, run, step));
        if site.disk.names(&root()).is_ok() {
            let bytes = model.share(rank, world_size);
            match disks[rank].defect {
                Defect::ReceiptBeforeShard if rank > 0 => only_a_receipt(&site, &part, &bytes),
                // What a rank that fails says is in its receipt.
                _ => drop(writer::write_shard(&site, &part, &bytes)),
            }
        }
    }
    let (site, part) = (site(&disks[0], keep), part(0, world_size, run, step));
    let mut notes = Notes::default();
    notes.put("step", &step)?;
    let name = Publishing::new(&site, &part, notes).turn(true)?.expect("the last look decides");
    writer::retire(&site, &part.group, &name);
    Ok(name)
}

/// What a rank leaves that says too early that it is done.
fn only_a_receipt(site: &Site, part: &Part, bytes: &[u8]) {
    let Group { rank, world_size, run } = part.group;
    let start = super::shard::start(&site.layout, &site.layout.share(rank, world_size), part.step);
    let file = [start, bytes.to_vec()].concat();
    let shard = ShardRecord { bytes: file.len() as u64, sha256: Sha256::of(&file) };
    let receipt = Receipt::Durable { shard, layout: site.layout.digest() };
    let folder = root().join(names::writing(part.step, run));
    let _ = site.disk.create_folder(&folder);
    if let Ok(mut file) = site.disk.create(&folder.join(names::receipt(rank, world_size))) {
        let _ = file.write(&serde_json::to_vec(&receipt).expect("text and numbers"));
    }
}

pub fn recover(disk: &SimDisk) -> Result<Option<(Resumed, Model)>, Error> {
    let mut model = Model::after(u64::MAX / 1_000_000);
    let resumed = resume_alone_from(disk, &root(), &mut model.tensors_mut())?;
    Ok(resumed.map(|resumed| (resumed, model)))
}

/// Some lives of a job whose machine crashes again and again. What is violated, if something is.
fn history(seed: u64, defect: Defect) -> Result<(), String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let disk = SimDisk { defect, ..SimDisk::new() };
    disk.create_folder(&root()).map_err(|error| error.to_string())?;
    disk.lock().make_all_durable();
    let keep = random.usize(1..4);
    let (mut made, mut tried, mut rotten) = (None, 0, vec![]);
    for _ in 0..5 {
        made = check_recovery(&disk, made, tried, &rotten)?;
        let mut step = made.unwrap_or(0);
        let run = random.u64(..);
        let world_size = random.usize(1..5);
        // All ranks on the machine that crashes, or one of them alone, or nobody.
        let end = Some(random.u64(0..300));
        let machine = disk.other(if random.bool() { end } else { None });
        let mut disks = vec![machine; world_size];
        if random.bool() {
            let victim = random.usize(0..world_size);
            disks[victim] = disk.other(end);
        }
        writer::sweep(&site(&disks[0], keep), &part(0, world_size, run, 0).group);
        let mut order: Vec<usize> = (0..world_size).collect();
        for _ in 0..6 {
            step += random.u64(1..4);
            random.shuffle(&mut order);
            tried = tried.max(step);
            if save(&disks, &order, keep, run, step).is_ok() {
                made = Some(step);
            }
            if disks.iter().any(SimDisk::is_dead) {
                break;
            }
        }
        // A process that is killed leaves the page cache, a machine does not.
        if random.bool() {
            disk.lock().crash(&mut random);
        }
        if random.u8(0..4) == 0 {
            made = rot(&disk, &mut random, &mut rotten).or(made);
        }
    }
    check_recovery(&disk, made, tried, &rotten).map(drop)
}

/// The newest checkpoint rots, if there is one before it: the step of that one.
fn rot(disk: &SimDisk, random: &mut fastrand::Rng, rotten: &mut Vec<Committed>) -> Option<u64> {
    let committed = Listing::of(disk, &root()).ok()?.committed;
    let [newest, before, ..] = committed.as_slice() else { return None };
    let folder = root().join(newest.to_string());
    let files = disk.names(&folder).ok()?;
    let file = folder.join(&files[random.usize(0..files.len())]);
    match random.u8(0..3) {
        0 => disk.damage(&file, |bytes| bytes.truncate(random.usize(0..bytes.len()))),
        1 => disk.remove_file(&file).ok()?,
        _ => disk.damage(&file, |bytes| {
            let at = random.usize(0..bytes.len());
            bytes[at] ^= 1 << random.u8(0..8);
        }),
    }
    rotten.push(newest.clone());
    Some(before.step)
}

impl State {
    fn make_all_durable(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        pending.iter().for_each(|changes| self.make_durable(changes));
    }
}

/// The property: what is found is a state that was saved, at least as new as the newest that was made, and nothing
/// with the name of a checkpoint is damaged.
fn check_recovery(
    disk: &SimDisk,
    made: Option<u64>,
    tried: u64,
    rotten: &[Committed],
) -> Result<Option<u64>, String> {
    let recovered = recover(disk).map_err(|error| error.to_string())?;
    let listing = Listing::of(disk, &root()).map_err(|error| error.to_string())?;
    let verify = |name| Checkpoint::open(disk, &root(), name).and_then(|checkpoint| checkpoint.verify());
    let damaged = listing.committed.iter().filter(|name| verify(name).is_err());
    if let Some(name) = damaged.chain(&listing.rejected).find(|name| !rotten.contains(name)) {
        return Err(format!("damaged, under the name of a checkpoint: {name}"));
    }
    let found = recovered.as_ref().map(|(resumed, _)| resumed.step);
    if found < made || found.is_some_and(|step| step > tried) {
        return Err(format!("found {found:?}, made was {made:?}, tried {tried}"));
    }
    if let Some((resumed, model)) = recovered {
        model.assert_is_after(resumed.step);
        assert_eq!(resumed.notes.get("step"), Ok(Some(resumed.step)));
    }
    Ok(found)
}

fn seeds() -> u64 {
    std::env::var("PACELINE_CHECKPOINT_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(500)
}

#[test]
fn after_any_crash_the_newest_checkpoint_that_was_made_is_there_and_whole() {
    for seed in 0..seeds() {
        if let Err(violation) = history(seed, Defect::None) {
            panic!("seed {seed}: {violation}");
        }
    }
}

#[test]
fn the_simulated_disk_finds_a_writer_that_does_not_sync_or_commits_too_early() {
    for defect in
        [Defect::NoFileSync, Defect::NoFolderSync, Defect::ReceiptBeforeShard, Defect::RemovedUnderItsName]
    {
        let found = (0..500).find(|&seed| history(seed, defect).is_err());
        assert!(found.is_some(), "{defect:?} is not found in 500 seeds");
    }
}

#[test]
fn of_a_checkpoint_that_was_given_up_nothing_is_left() {
    for room in (0..4_000).step_by(7) {
        let disk = SimDisk::new();
        disk.create_folder(&root()).expect("nothing fails yet");
        save(&vec![disk.clone(); 3], &[0, 1, 2], 2, 1, 5).expect("there is room");
        disk.set_room(room);
        let full = save(&vec![disk.clone(); 3], &[2, 0, 1], 2, 1, 6);
        let names = disk.names(&root()).expect("the folder is there");
        let (resumed, model) = recover(&disk).expect("the disk can be read").expect("one was made");
        model.assert_is_after(resumed.step);
        match full {
            Err(error) => assert_eq!((names.len(), resumed.step), (1, 5), "{room}: {error}; {names:?}"),
            Ok(_) => assert_eq!((names.len(), resumed.step), (2, 6), "{room}: {names:?}"),
        }
        assert!(room < 3_990 || names.len() == 2, "{room} bytes are enough");
    }
}

#[test]
fn what_is_committed_is_what_names_say() {
    let disk = SimDisk::new();
    disk.create_folder(&root()).expect("nothing fails");
    for step in 1..6 {
        save(&vec![disk.clone(); 2], &[1, 0], 2, 1, step).expect("nothing fails");
    }
    let folders = disk.names(&root()).expect("it is there");
    let steps: Vec<u64> = folders
        .iter()
        .filter_map(|name| match names::folder(name) {
            Some(Folder::Committed(name)) => Some(name.step),
            _ => None,
        })
        .collect();
    assert_eq!(steps, [4, 5], "the newest two of {folders:?}");
    let files = disk.names(&root().join(&folders[1])).expect("it is there");
    assert_eq!(
        files,
        ["manifest.json", "shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
    );
}
