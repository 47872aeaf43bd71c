//! What can go wrong with checkpoints.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of checkpoints. Training can go on after each of them, without a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A call with arguments that do not fit. It had no effect.
    #[error("{reason}")]
    Usage {
        /// What was wrong and what to do.
        reason: String,
    },
    /// The disk does not do what it is asked to.
    #[error("cannot {doing} {}: {reason}", path.display())]
    Disk {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// The kind of error; [`io::ErrorKind::StorageFull`] for a full disk.
        kind: io::ErrorKind,
        /// The system's words.
        reason: String,
    },
    /// A checkpoint is not what was written: it must not be used.
    #[error("{} is damaged: {damage}", path.display())]
    Damaged {
        /// The checkpoint's folder.
        path: PathBuf,
        /// In which way.
        damage: Damage,
    },
    /// A checkpoint is of another model.
    #[error("{} does not fit this program: it has {difference}; resume with the model that wrote it", path.display())]
    OtherModel {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The first difference.
        difference: String,
    },
    /// There are checkpoints, and none can be used. Beginning anew would be a loss that nobody has decided on.
    #[error("no checkpoint in {} can be used, the newest because {newest}; to begin anew, move them away", folder.display())]
    NoneWhole {
        /// The folder with the checkpoints.
        folder: PathBuf,
        /// What is wrong with the newest.
        newest: String,
    },
    /// A checkpoint was given up, and what was written of it removed.
    #[error("the checkpoint of step {step} was given up: {reason}")]
    GivenUp {
        /// The step.
        step: u64,
        /// Why, and which rank it was.
        reason: String,
    },
    /// The checkpoint before is still being written at the deadline.
    #[error("a checkpoint is still being written after {waited_s} s; is the disk stuck?")]
    Busy {
        /// How long was waited, in seconds.
        waited_s: u64,
    },
}

/// In which way a checkpoint is damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// It has no manifest.
    #[error("manifest.json is missing")]
    NoManifest,
    /// The manifest is not the one that the folder is named after.
    #[error("manifest.json is not what was written; its digest is not that in the folder's name")]
    ManifestDigest,
    /// The manifest cannot be understood.
    #[error("manifest.json: {0}")]
    Manifest(String),
    /// A shard is not there.
    #[error("{0} is missing")]
    ShardMissing(String),
    /// A shard has another length.
    #[error("{file} has {found} bytes instead of {expected}")]
    ShardLength {
        /// The shard's file.
        file: String,
        /// Its size when it was written, in bytes.
        expected: u64,
        /// Its size now.
        found: u64,
    },
    /// A shard has other bytes.
    #[error("{0} is not what was written; its digest is another one")]
    ShardDigest(String),
    /// A shard's header does not say what the manifest does.
    #[error("{file}: {reason}")]
    ShardHeader {
        /// The shard's file.
        file: String,
        /// What is wrong with the header.
        reason: String,
    },
}

impl Error {
    pub(super) fn disk(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Disk { doing, path, kind: error.kind(), reason: error.to_string() }
    }

    pub(super) fn damaged(path: &Path, damage: Damage) -> Self {
        Self::Damaged { path: path.to_owned(), damage }
    }
}
