//! The names of files and folders.

use std::fmt;
use std::str::FromStr;

/// The file that makes a folder a checkpoint.
pub const MANIFEST: &str = "manifest.json";

/// A folder that holds a checkpoint that was whole once. It is named after its manifest, so that two checkpoints of one
/// step do not meet, and a manifest that has changed is noticed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Committed {
    /// Its step.
    pub step: u64,
    /// The first 8 bytes of its manifest's digest.
    pub manifest: u64,
}

/// What a folder among the checkpoints is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Folder {
    /// A checkpoint.
    Committed(Committed),
    /// A checkpoint that was found to be damaged.
    Rejected(Committed),
    /// One that is being written, or was when its writers died.
    Writing {
        /// Its step.
        step: u64,
        /// Who writes it: see [`Group::run`](super::Group::run).
        run: u64,
    },
    /// One that is being removed.
    Removing,
}

const COMMITTED: &str = "step-";
const REJECTED: &str = "rejected-";
const WRITING: &str = ".writing-";
const REMOVING: &str = ".removing-";

impl fmt::Display for Committed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{COMMITTED}{:012}-{:016x}", self.step, self.manifest)
    }
}

impl FromStr for Committed {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let (step, manifest) = name.strip_prefix(COMMITTED).and_then(|rest| rest.split_once('-')).ok_or(())?;
        let found = Self {
            step: step.parse().map_err(|_| ())?,
            manifest: u64::from_str_radix(manifest, 16).map_err(|_| ())?,
        };
        // There is one way to write it: neither a sign nor another number of digits.
        (found.to_string() == name).then_some(found).ok_or(())
    }
}

/// What this name is; `None` for what is none of ours.
pub fn folder(name: &str) -> Option<Folder> {
    if name.starts_with(REMOVING) {
        return Some(Folder::Removing);
    }
    if let Some(rest) = name.strip_prefix(REJECTED) {
        return rest.parse().ok().map(Folder::Rejected);
    }
    match name.strip_prefix(WRITING) {
        None => name.parse().ok().map(Folder::Committed),
        Some(rest) => {
            rest.parse().ok().map(|Committed { step, manifest: run }| Folder::Writing { step, run })
        }
    }
}

/// The folder in which a run writes its checkpoint of a step.
pub fn writing(step: u64, run: u64) -> String {
    format!("{WRITING}{}", Committed { step, manifest: run })
}

/// What a folder is called while it is removed: whoever still writes into it notices, and nobody takes it for whole.
pub fn removing(name: &str) -> String {
    format!("{REMOVING}{}", name.trim_start_matches('.'))
}

/// What a damaged checkpoint is called from then on.
pub fn rejected(checkpoint: &Committed) -> String {
    format!("{REJECTED}{checkpoint}")
}

/// The file of a shard.
pub fn shard(shard: usize, shards: usize) -> String {
    format!("shard-{shard:05}-of-{shards:05}.safetensors")
}

/// The file in which a rank says that its shard is durable.
pub fn receipt(shard: usize, shards: usize) -> String {
    format!("shard-{shard:05}-of-{shards:05}.receipt")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written_and_nothing_else_is() {
        let checkpoint = Committed { step: 1_200, manifest: 0xab };
        let name = checkpoint.to_string();
        assert_eq!(name, "step-000000001200-00000000000000ab");
        assert_eq!(folder(&name), Some(Folder::Committed(checkpoint.clone())));
        assert_eq!(folder(&rejected(&checkpoint)), Some(Folder::Rejected(checkpoint)));
        assert_eq!(folder(&writing(7, 9)), Some(Folder::Writing { step: 7, run: 9 }));
        assert_eq!(folder(&removing(&name)), Some(Folder::Removing));
        assert_eq!(folder(&removing(&writing(7, 9))), Some(Folder::Removing));
        let most = Committed { step: u64::MAX, manifest: u64::MAX };
        assert_eq!(folder(&most.to_string()), Some(Folder::Committed(most)));
        for other in [
            "",
            "step-1-2",
            "step-+00000000120-00000000000000ab",
            "notes.txt",
            "step-000000001200-00000000000000AB",
            "lost+found",
        ] {
            assert_eq!(folder(other), None, "{other}");
        }
    }
}
