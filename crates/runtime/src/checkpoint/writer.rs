//! Putting a checkpoint on the disk: what the writer thread does, step by step, so that a crash after any of them
//! leaves either the whole checkpoint or none.
//!
//! 1. Each rank writes its shard into the folder `.writing-…`, syncs it and the folder, and leaves a receipt.
//! 2. Rank 0 has all receipts: it writes the manifest and syncs it and the folder.
//! 3. It renames the folder to its final name and syncs the folder above. Only now does the checkpoint exist.
//! 4. It removes what is older than the newest few. What is removed is renamed first, so that a checkpoint is never
//!    there in part.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_lc_rs::digest::{Context, SHA256};

use super::disk::Disk;
use super::error::Error;
use super::layout::{Layout, Span};
use super::manifest::{Manifest, Notes, Sha256, ShardRecord};
use super::names::{self, Committed, Folder};
use super::publication::{Publication, Receipt, Turn};
use super::{Group, shard};

/// What is written, and checked for a reason to stop, at a time.
const PIECE_BYTES: usize = 1024 * 1024;

/// The most that is read of a receipt.
const MAX_RECEIPT_BYTES: u64 = 64 * 1024;

/// Where and as whom one process writes.
#[derive(Clone, Debug)]
pub struct Site {
    pub disk: Arc<dyn Disk>,
    /// The folder that holds all checkpoints of the job.
    pub root: PathBuf,
    pub layout: Arc<Layout>,
    /// How many checkpoints are kept.
    pub keep: usize,
}

/// One rank's part of one checkpoint.
#[derive(Clone, Debug)]
pub struct Part {
    pub group: Group,
    pub step: u64,
    /// Set by whoever does not want it any more.
    pub cancelled: Arc<AtomicBool>,
}

impl Part {
    fn folder(&self, site: &Site) -> PathBuf {
        site.root.join(names::writing(self.step, self.group.run))
    }

    fn shard(&self) -> String {
        names::shard(self.group.rank, self.group.world_size)
    }

    fn go_on(&self) -> Result<(), Error> {
        match self.cancelled.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(self.given_up("the program has stopped it".to_owned())),
        }
    }

    fn given_up(&self, reason: String) -> Error {
        Error::GivenUp { step: self.step, reason }
    }
}

/// Makes this rank's shard durable, and says so or that it failed. `bytes` are those of the rank's
/// [share](Layout::share), in order. After an error nothing of the shard is left.
pub fn write_shard(site: &Site, part: &Part, bytes: &[u8]) -> Result<(), Error> {
    let folder = part.folder(site);
    site.disk.create_folder(&folder).map_err(Error::disk("make the folder", &folder))?;
    let spans = site.layout.share(part.group.rank, part.group.world_size);
    let path = folder.join(part.shard());
    let durable = |shard| Receipt::Durable { shard, layout: site.layout.digest() };
    write_file(site, part, &path, &spans, bytes)
        .and_then(|shard| sync_folder(site, &folder).map(|()| durable(shard)))
        .and_then(|receipt| leave_receipt(site, part, &receipt))
        .inspect_err(|error| {
            // The shard first, since that makes the room that the receipt needs.
            let _ = site.disk.remove_file(&path);
            let _ = leave_receipt(site, part, &Receipt::Failed(error.to_string()));
        })
}

fn write_file(
    site: &Site,
    part: &Part,
    path: &Path,
    spans: &[Span],
    bytes: &[u8],
) -> Result<ShardRecord, Error> {
    let mut file = site.disk.create(path).map_err(Error::disk("make the file", path))?;
    let mut digest = Context::new(&SHA256);
    let start = shard::start(&site.layout, spans, part.step);
    for piece in start.chunks(PIECE_BYTES).chain(bytes.chunks(PIECE_BYTES)) {
        part.go_on()?;
        digest.update(piece);
        file.write(piece).map_err(Error::disk("write", path))?;
    }
    file.sync().map_err(Error::disk("sync", path))?;
    Ok(ShardRecord { bytes: (start.len() + bytes.len()) as u64, sha256: Sha256::finish(digest) })
}

/// Nobody reads a receipt after a crash, so it is not synced. Renamed, so that nobody reads half of one.
fn leave_receipt(site: &Site, part: &Part, receipt: &Receipt) -> Result<(), Error> {
    let path = part.folder(site).join(names::receipt(part.group.rank, part.group.world_size));
    let half = path.with_extension("part");
    // What a first try has left.
    let _ = site.disk.remove_file(&half);
    let json = serde_json::to_vec(receipt).expect("text and numbers");
    let mut file = site.disk.create(&half).map_err(Error::disk("make the file", &half))?;
    file.write(&json).map_err(Error::disk("write", &half))?;
    drop(file);
    site.disk.rename(&half, &path).map_err(Error::disk("rename", &half))
}

/// Rank 0's part after its shard: makes one checkpoint of all shards.
#[derive(Debug)]
pub struct Publishing<'a> {
    site: &'a Site,
    part: &'a Part,
    notes: Option<Notes>,
    publication: Publication,
    missing: Vec<usize>,
}

impl<'a> Publishing<'a> {
    pub fn new(site: &'a Site, part: &'a Part, notes: Notes) -> Self {
        let shards = part.group.world_size;
        let publication = Publication::new(part.step, part.group.run, &site.layout, shards);
        Self { site, part, notes: Some(notes), publication, missing: (0..shards).collect() }
    }

    /// Looks for receipts, and makes the checkpoint when all are there; `None` when they are not yet. `late` makes it
    /// the last look. After an error nothing of the checkpoint is left.
    pub fn turn(&mut self, late: bool) -> Result<Option<Committed>, Error> {
        let done = self.part.go_on().and_then(|()| self.look()).and_then(|()| self.decide(late));
        done.inspect_err(|_| discard_or_say(self.site, &self.part.folder(self.site)))
    }

    fn look(&mut self) -> Result<(), Error> {
        let folder = self.part.folder(self.site);
        for &rank in &self.missing {
            let path = folder.join(names::receipt(rank, self.part.group.world_size));
            match read_receipt(self.site, &path) {
                Ok(receipt) => self.publication.hear(rank, receipt),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::disk("read", &path)(error)),
            }
        }
        Ok(())
    }

    fn decide(&mut self, late: bool) -> Result<Option<Committed>, Error> {
        match self.publication.turn(late) {
            Turn::Wait(missing) => {
                self.missing = missing;
                Ok(None)
            }
            Turn::GiveUp(reason) => Err(self.part.given_up(reason)),
            Turn::Commit => {
                let notes = self.notes.take().unwrap_or_default();
                let manifest = self.publication.manifest(&self.site.layout, notes);
                commit(self.site, self.part, &manifest.expect("all shards are durable")).map(Some)
            }
        }
    }
}

fn read_receipt(site: &Site, path: &Path) -> io::Result<Receipt> {
    let (file, size) = site.disk.open(path)?;
    if size > MAX_RECEIPT_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too long for a receipt"));
    }
    serde_json::from_reader(io::Read::take(file, MAX_RECEIPT_BYTES)).map_err(io::Error::from)
}

fn commit(site: &Site, part: &Part, manifest: &Manifest) -> Result<Committed, Error> {
    let folder = part.folder(site);
    let bytes = manifest.encode().map_err(|reason| part.given_up(reason))?;
    let path = folder.join(names::MANIFEST);
    let mut file = site.disk.create(&path).map_err(Error::disk("make the file", &path))?;
    file.write(&bytes).map_err(Error::disk("write", &path))?;
    file.sync().map_err(Error::disk("sync", &path))?;
    for rank in 0..part.group.world_size {
        let receipt = folder.join(names::receipt(rank, part.group.world_size));
        site.disk.remove_file(&receipt).map_err(Error::disk("remove", &receipt))?;
    }
    sync_folder(site, &folder)?;
    let name = Committed { step: part.step, manifest: Sha256::of(&bytes).short() };
    let target = site.root.join(name.to_string());
    site.disk.rename(&folder, &target).map_err(Error::disk("rename", &folder))?;
    sync_folder(site, &site.root)?;
    Ok(name)
}

fn sync_folder(site: &Site, path: &Path) -> Result<(), Error> {
    site.disk.sync_folder(path).map_err(Error::disk("sync the folder", path))
}

/// Removes what is not wanted any more after a checkpoint has been made: all but the newest, the damaged ones that it
/// replaces, and what this run has begun before and given up.
pub fn retire(site: &Site, group: &Group, newest: &Committed) {
    let is_old = |folder: &Folder, kept: &[Committed]| match folder {
        Folder::Committed(name) => !kept.contains(name),
        Folder::Rejected(_) | Folder::Removing => true,
        Folder::Writing { step, run } => *run == group.run && *step <= newest.step,
    };
    let folders = folders_or_say(site);
    let mut kept: Vec<Committed> = folders
        .iter()
        .filter_map(|(_, folder)| match folder {
            Folder::Committed(name) if name != newest => Some(name.clone()),
            _ => None,
        })
        .collect();
    kept.sort_by(|a, b| b.cmp(a));
    kept.truncate(site.keep.max(1) - 1);
    kept.push(newest.clone());
    let old = folders.into_iter().filter(|(_, folder)| is_old(folder, &kept));
    old.for_each(|(name, _)| discard_or_say(site, &site.root.join(name)));
}

/// Removes what runs before this one have left unfinished. For rank 0 of a run that begins.
pub fn sweep(site: &Site, group: &Group) {
    for (name, folder) in folders_or_say(site) {
        let left = match folder {
            Folder::Writing { run, .. } => run != group.run,
            Folder::Removing => true,
            Folder::Committed(_) | Folder::Rejected(_) => false,
        };
        if left {
            tracing::info!(folder = %name, "removing an unfinished checkpoint");
            discard_or_say(site, &site.root.join(name));
        }
    }
}

fn folders_or_say(site: &Site) -> Vec<(String, Folder)> {
    let names = site.disk.names(&site.root).unwrap_or_else(|error| {
        tracing::warn!(folder = %site.root.display(), %error, "cannot see old checkpoints, so they stay");
        Vec::new()
    });
    names.into_iter().filter_map(|name| names::folder(&name).map(|folder| (name, folder))).collect()
}

/// What stays costs room and nothing else, so training need not hear of it.
fn discard_or_say(site: &Site, folder: &Path) {
    match discard(site, folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(folder = %folder.display(), %error, "cannot remove an old checkpoint");
        }
        _ => {}
    }
}

fn discard(site: &Site, folder: &Path) -> io::Result<()> {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let mut doomed = folder.to_owned();
    if names::folder(name) != Some(Folder::Removing) {
        doomed = site.root.join(names::removing(name));
        site.disk.rename(folder, &doomed)?;
        // Or a crash could keep the old name and lose files below it.
        site.disk.sync_folder(&site.root)?;
    }
    for file in site.disk.names(&doomed)? {
        site.disk.remove_file(&doomed.join(file))?;
    }
    site.disk.remove_folder(&doomed)
}
