//! Finding the newest checkpoint that is whole, and loading it on any number of ranks.
//!
//! Nothing that is read is trusted: sizes are compared with what the program's own tensors and the manifest allow
//! before memory is taken, every byte counts in a digest, and headers are compared with what they must say.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{Context, SHA256};
use paceline_collectives::{Communicator, ReduceOp};

use super::disk::{Disk, LocalDisk};
use super::error::{Damage, Error};
use super::layout::{Layout, Span, Tensor, TensorMut};
use super::manifest::{MAX_MANIFEST_BYTES, Manifest, Notes, Sha256};
use super::names::{self, Committed, Folder};
use super::shard;

/// What is read at a time when nobody wants the bytes.
const PIECE_BYTES: usize = 1024 * 1024;

/// What a program goes on from.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Resumed {
    /// The last step applied to the state that has been loaded.
    pub step: u64,
    /// The notes that were saved with it.
    pub notes: Notes,
    /// How many ranks wrote it.
    pub shards: usize,
}

/// What is in a folder of checkpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listing {
    /// Checkpoints that were whole when they got their names, newest first.
    pub committed: Vec<Committed>,
    /// Those that were found to be damaged.
    pub rejected: Vec<Committed>,
    /// How many are being written or removed, or were when somebody died.
    pub unfinished: usize,
}

impl Listing {
    /// Looks into a folder; one that does not exist is empty.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn of(disk: &dyn Disk, root: &Path) -> Result<Self, Error> {
        let mut listing = Self::default();
        let names = match disk.names(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(listing),
            names => names.map_err(Error::disk("list", root))?,
        };
        for folder in names.iter().filter_map(|name| names::folder(name)) {
            match folder {
                Folder::Committed(name) => listing.committed.push(name),
                Folder::Rejected(name) => listing.rejected.push(name),
                Folder::Writing { .. } | Folder::Removing => listing.unfinished += 1,
            }
        }
        // A name that is seen may be one that a crash takes back; what somebody goes on from is to stay. Where it cannot
        // be made durable it can still be read.
        let _ = disk.sync_folder(root);
        listing.committed.sort_by(|a, b| b.cmp(a));
        listing.rejected.sort_by(|a, b| b.cmp(a));
        Ok(listing)
    }
}

/// A checkpoint whose manifest has been read and is the one that was written.
#[derive(Debug)]
pub struct Checkpoint<'a> {
    disk: &'a dyn Disk,
    path: PathBuf,
    manifest: Manifest,
}

impl<'a> Checkpoint<'a> {
    /// Reads the manifest of a checkpoint in a folder of checkpoints.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Disk`].
    pub fn open(disk: &'a dyn Disk, root: &Path, name: &Committed) -> Result<Self, Error> {
        let path = root.join(name.to_string());
        let damaged = |damage| Error::damaged(&path, damage);
        let bytes = read_manifest(disk, &path)?;
        if Sha256::of(&bytes).short() != name.manifest {
            return Err(damaged(Damage::ManifestDigest));
        }
        let manifest = Manifest::decode(&bytes).map_err(|reason| damaged(Damage::Manifest(reason)))?;
        if manifest.step != name.step {
            return Err(damaged(Damage::Manifest(format!("it is of step {}", manifest.step))));
        }
        Ok(Self { disk, path, manifest })
    }

    /// What the manifest says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Reads all shards and compares them with the manifest.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Disk`].
    pub fn verify(&self) -> Result<(), Error> {
        let mut nowhere = vec![0; PIECE_BYTES];
        (0..self.manifest.shards.len()).try_for_each(|shard| {
            self.read_shard(shard, &mut |reader, span| {
                let mut left = self.manifest.layout.byte_range(span).len();
                while left > 0 {
                    let piece = left.min(PIECE_BYTES);
                    reader.fill(&mut nowhere[..piece])?;
                    left -= piece;
                }
                Ok(())
            })
        })
    }

    /// Loads all shards into the program's tensors, which are those of the checkpoint, in the same order. Takes no
    /// memory but for headers.
    ///
    /// # Errors
    /// [`Error::OtherModel`], with the tensors as they were; [`Error::Damaged`] and [`Error::Disk`], after which they
    /// are unspecified.
    pub fn load(&self, tensors: &mut [TensorMut<'_>]) -> Result<(), Error> {
        let views: Vec<Tensor<'_>> = tensors.iter().map(TensorMut::view).collect();
        if let Some(difference) = Layout::of(&views)?.difference(&self.manifest.layout) {
            return Err(Error::OtherModel { path: self.path.clone(), difference });
        }
        (0..self.manifest.shards.len()).try_for_each(|shard| {
            self.read_shard(shard, &mut |reader, span| {
                let range = self.manifest.layout.byte_range(span);
                let target = &mut tensors[span.tensor].bytes_mut()[range];
                target.chunks_mut(PIECE_BYTES).try_for_each(|piece| reader.fill(piece))
            })
        })
    }

    /// Reads one shard: `take` is given each span in turn and reads all of it.
    fn read_shard(
        &self,
        shard: usize,
        take: &mut dyn FnMut(&mut Hashing, &Span) -> io::Result<()>,
    ) -> Result<(), Error> {
        let (layout, shards) = (&self.manifest.layout, &self.manifest.shards);
        let file = names::shard(shard, shards.len());
        let damaged = |damage| Error::damaged(&self.path, damage);
        let path = self.path.join(&file);
        let (reader, found) = match self.disk.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged(Damage::ShardMissing(file)));
            }
            opened => opened.map_err(Error::disk("open", &path))?,
        };
        let expected = shards[shard].bytes;
        let other_length = |found| Damage::ShardLength { file: file.clone(), expected, found };
        if found != expected {
            return Err(damaged(other_length(found)));
        }
        let ended = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(other_length(0)),
            _ => Error::disk("read", &path)(error),
        };
        let mut reader = Hashing { reader, digest: Context::new(&SHA256) };
        let spans = layout.share(shard, shards.len());
        let header = self.read_header(&mut reader, &spans, expected).map_err(ended)?;
        let wrong = |reason| damaged(Damage::ShardHeader { file: file.clone(), reason });
        shard::check(&header.map_err(wrong)?, layout, &spans).map_err(wrong)?;
        spans.iter().try_for_each(|span| take(&mut reader, span)).map_err(ended)?;
        match Sha256::finish(reader.digest) == shards[shard].sha256 {
            true => Ok(()),
            false => Err(damaged(Damage::ShardDigest(file))),
        }
    }

    /// Reads the header, if it is no longer than it can be and the elements then fill the file.
    fn read_header(
        &self,
        reader: &mut Hashing,
        spans: &[Span],
        size: u64,
    ) -> io::Result<Result<Vec<u8>, String>> {
        let mut length = [0; shard::LENGTH_BYTES];
        reader.fill(&mut length)?;
        let length = u64::from_le_bytes(length);
        let longest = shard::longest_header(&self.manifest.layout, spans, self.manifest.step);
        if length > longest as u64 {
            return Ok(Err(format!(
                "its header claims {length} bytes; these tensors need {longest} at most"
            )));
        }
        let elements = self.manifest.layout.size_of(spans) as u64;
        if size != shard::LENGTH_BYTES as u64 + length + elements {
            return Ok(Err(format!("it has {size} bytes for {elements} bytes of elements")));
        }
        let mut header = vec![0; length as usize];
        reader.fill(&mut header)?;
        Ok(Ok(header))
    }
}

/// A file, with the digest of all that has been read of it.
struct Hashing {
    reader: Box<dyn Read>,
    digest: Context,
}

impl Hashing {
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.reader.read_exact(buffer)?;
        self.digest.update(buffer);
        Ok(())
    }
}

fn read_manifest(disk: &dyn Disk, folder: &Path) -> Result<Vec<u8>, Error> {
    let path = folder.join(names::MANIFEST);
    let (file, size) = match disk.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::damaged(folder, Damage::NoManifest));
        }
        opened => opened.map_err(Error::disk("open", &path))?,
    };
    if size > MAX_MANIFEST_BYTES {
        let reason = format!("{size} bytes; at most {MAX_MANIFEST_BYTES} are read");
        return Err(Error::damaged(folder, Damage::Manifest(reason)));
    }
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST_BYTES).read_to_end(&mut bytes).map_err(Error::disk("read", &path))?;
    Ok(bytes)
}

/// Loads the newest checkpoint that is whole, in a process by itself; `None` where there is none yet, with the tensors
/// as they were.
///
/// A damaged one is named in the log, renamed to `rejected-…`, and the one before it is tried. Blocks for as long as the
/// disk takes to read a state.
///
/// # Errors
/// [`Error::NoneWhole`] when there are checkpoints and none can be used, and [`Error::Disk`] when the folder cannot be
/// listed: the tensors are unspecified then. [`Error::OtherModel`] and [`Error::Usage`], with the tensors as they were.
pub fn resume_alone(root: &Path, tensors: &mut [TensorMut<'_>]) -> Result<Option<Resumed>, Error> {
    resume_alone_from(&LocalDisk, root, tensors)
}

/// [`resume_alone`] on any disk.
///
/// # Errors
/// As there.
pub fn resume_alone_from(
    disk: &dyn Disk,
    root: &Path,
    tensors: &mut [TensorMut<'_>],
) -> Result<Option<Resumed>, Error> {
    let listing = Listing::of(disk, root)?;
    let mut newest = None;
    for name in &listing.committed {
        match load(disk, root, name, tensors) {
            Ok(resumed) => return Ok(Some(resumed)),
            Err(error @ (Error::OtherModel { .. } | Error::Usage { .. })) => return Err(error),
            Err(error) => {
                say_and_reject(disk, root, name, Verdict::of(&Err(error.clone())), &error);
                newest.get_or_insert(error.to_string());
            }
        }
    }
    none_whole(root, &listing, newest)
}

/// Loads the newest checkpoint that is whole for every rank, on all of them; `None` on all where there is none yet,
/// with the tensors as they were. All ranks call it. Any number of ranks loads what any other number has saved.
///
/// As [`resume_alone`]; a checkpoint that one rank cannot read is used by none. Blocks; the exchanges between ranks have
/// the communicator's deadline, which has to cover the difference in how long ranks read.
///
/// # Errors
/// Those of [`resume_alone`], on all ranks alike, and the collectives'.
pub fn resume(
    communicator: &mut Communicator,
    root: &Path,
    tensors: &mut [TensorMut<'_>],
) -> Result<Option<Resumed>, crate::Error> {
    let leads = communicator.rank() == 0;
    // Only rank 0 looks: a network file system may show others another list.
    let listing = if leads { Listing::of(&LocalDisk, root) } else { Ok(Listing::default()) };
    let mut candidates = listing.as_ref().map_or(&[][..], |listing| &listing.committed).iter();
    let mut newest = None;
    while let Some(name) = agree_on_candidate(communicator, candidates.next())? {
        let loaded = load(&LocalDisk, root, &name, tensors);
        let own = Verdict::of(&loaded);
        let verdict = agree_on_verdict(communicator, own)?;
        match (verdict, loaded) {
            (Verdict::Loaded, Ok(resumed)) => return Ok(Some(resumed)),
            (Verdict::Unfit, loaded) => {
                return Err(loaded.err().unwrap_or_else(|| elsewhere(&name)).into());
            }
            (_, loaded) => {
                let error = loaded.err().unwrap_or_else(|| elsewhere(&name));
                say_and_reject(
                    &LocalDisk,
                    root,
                    &name,
                    // What only another host cannot see is not damaged: its folder may not be there.
                    if leads { own } else { Verdict::Unreadable },
                    &error,
                );
                newest.get_or_insert(error.to_string());
            }
        }
    }
    let outcome = listing.and_then(|listing| none_whole(root, &listing, newest.clone()));
    // Rank 0 knows whether there was anything; the others have seen whatever it offered.
    let mut nothing = [u8::from(outcome.is_ok())];
    communicator.broadcast(&mut nothing, 0)?;
    match outcome {
        Err(error) => Err(error.into()),
        Ok(_) if nothing[0] == 1 => Ok(None),
        Ok(_) => {
            let newest = newest.unwrap_or_else(|| "rank 0 says so".to_owned());
            Err(Error::NoneWhole { folder: root.to_owned(), newest }.into())
        }
    }
}

/// What became of a checkpoint on a rank, the worst first: of all ranks the worst counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// Of another model, or called wrongly.
    Unfit,
    Damaged,
    Unreadable,
    Loaded,
}

impl Verdict {
    const ALL: [Self; 4] = [Self::Unfit, Self::Damaged, Self::Unreadable, Self::Loaded];

    fn of(loaded: &Result<Resumed, Error>) -> Self {
        match loaded {
            Ok(_) => Self::Loaded,
            Err(Error::Damaged { .. }) => Self::Damaged,
            Err(Error::OtherModel { .. } | Error::Usage { .. }) => Self::Unfit,
            Err(_) => Self::Unreadable,
        }
    }
}

fn load(
    disk: &dyn Disk,
    root: &Path,
    name: &Committed,
    tensors: &mut [TensorMut<'_>],
) -> Result<Resumed, Error> {
    let checkpoint = Checkpoint::open(disk, root, name)?;
    checkpoint.load(tensors)?;
    let Manifest { step, notes, shards, .. } = checkpoint.manifest;
    Ok(Resumed { step, notes, shards: shards.len() })
}

fn agree_on_candidate(
    communicator: &mut Communicator,
    next: Option<&Committed>,
) -> Result<Option<Committed>, crate::Error> {
    let mut words = next.map_or([0, 0, 0], |name| [1, name.step, name.manifest]);
    communicator.broadcast(&mut words, 0)?;
    let [is_there, step, manifest] = words;
    Ok((is_there == 1).then_some(Committed { step, manifest }))
}

fn agree_on_verdict(communicator: &mut Communicator, mine: Verdict) -> Result<Verdict, crate::Error> {
    let mut worst = [mine as u8];
    communicator.all_reduce(&mut worst, ReduceOp::Min)?;
    Ok(Verdict::ALL.get(usize::from(worst[0])).copied().unwrap_or(Verdict::Unreadable))
}

fn elsewhere(name: &Committed) -> Error {
    Error::GivenUp {
        step: name.step,
        reason: "another rank cannot load it and says why in its log".to_owned(),
    }
}

/// A damaged checkpoint gets a name under which it neither counts nor is in the way. One that could not be read may be
/// readable later.
fn say_and_reject(disk: &dyn Disk, root: &Path, name: &Committed, verdict: Verdict, error: &Error) {
    tracing::error!(checkpoint = %name, %error, "a checkpoint cannot be used; trying the one before it");
    if verdict == Verdict::Damaged {
        let renamed = disk.rename(&root.join(name.to_string()), &root.join(names::rejected(name)));
        if let Err(error) = renamed {
            tracing::warn!(checkpoint = %name, %error, "cannot rename a damaged checkpoint");
        }
    }
}

fn none_whole(root: &Path, listing: &Listing, newest: Option<String>) -> Result<Option<Resumed>, Error> {
    let before = listing.rejected.first().map(|name| format!("{name} was found to be damaged before"));
    match newest.or(before) {
        None => Ok(None),
        Some(newest) => Err(Error::NoneWhole { folder: root.to_owned(), newest }),
    }
}
