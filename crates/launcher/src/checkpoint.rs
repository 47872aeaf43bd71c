//! `paceline checkpoint`: what is in a folder of checkpoints, and whether it is whole. It changes nothing.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use paceline_runtime::checkpoint::{Checkpoint, Committed, Error, Listing, LocalDisk};

/// What is asked about a folder.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Question {
    /// List the checkpoints in a folder, newest first
    Ls {
        /// The folder that was given to the program
        dir: PathBuf,
    },
    /// Read every checkpoint in a folder and compare it with its digests; the exit code is 1 if one is damaged
    Verify {
        /// The folder that was given to the program
        dir: PathBuf,
    },
}

/// What is read of a checkpoint besides its manifest.
type Look = fn(&Checkpoint<'_>) -> Result<(), Error>;

/// What to print, the exit code, and the last words on standard error.
pub fn answer(question: &Question) -> (String, u8, String) {
    let (dir, look): (_, Look) = match question {
        Question::Ls { dir } => (dir, |_| Ok(())),
        Question::Verify { dir } => (dir, |checkpoint| checkpoint.verify()),
    };
    let listing = match Listing::of(&LocalDisk, dir) {
        Err(error) => return (String::new(), 1, format!("paceline: {error}\n")),
        Ok(listing) => listing,
    };
    let lines: Vec<Result<String, String>> =
        listing.committed.iter().map(|name| line(dir, name, look)).collect();
    let damaged = lines.iter().filter(|line| line.is_err()).count();
    let rejected =
        listing.rejected.iter().map(|name| format!("rejected-{name}  found to be damaged before\n"));
    let text: String =
        lines.iter().map(|line| line.as_ref().unwrap_or_else(|line| line).clone()).chain(rejected).collect();
    match (damaged, listing.committed.len()) {
        (0, 0) => (text, 1, format!("paceline: no checkpoint in {}\n", dir.display())),
        (0, _) => (text, 0, String::new()),
        (_, all) => (text, 1, format!("paceline: {damaged} of {all} checkpoints cannot be used\n")),
    }
}

fn line(dir: &Path, name: &Committed, look: Look) -> Result<String, String> {
    let told = Checkpoint::open(&LocalDisk, dir, name).and_then(|checkpoint| {
        look(&checkpoint)?;
        let manifest = checkpoint.manifest();
        let (tensors, shards) = (manifest.layout.tensors().len(), manifest.shards.len());
        Ok(format!("{name}  {} bytes in {tensors} tensors and {shards} shards\n", manifest.layout.size()))
    });
    told.map_err(|error| format!("{name}  {error}\n"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use paceline_runtime::World;
    use paceline_runtime::checkpoint::{Checkpointer, Group, Layout, Notes, Settings, Tensor};

    use super::*;

    #[test]
    fn whole_and_damaged_checkpoints_are_told_apart() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().to_owned();
        let verify = || answer(&Question::Verify { dir: dir.clone() });
        assert_eq!(verify(), (String::new(), 1, format!("paceline: no checkpoint in {}\n", dir.display())));
        let mut world = World::join().expect("a world of one");
        let tensors = [Tensor::new("w", &[2], &[1f32, 2.0])];
        let layout = Layout::of(&tensors).expect("two elements");
        let group = Group::agree(world.communicator(), &layout).expect("there is no other");
        let mut checkpointer =
            Checkpointer::open(&dir, group, layout, Settings::default()).expect("the folder is there");
        let stable = checkpointer.agree(world.communicator(), 7).expect("nobody differs").expect("idle");
        checkpointer.save(stable, &tensors, Notes::default()).expect("nothing is wrong");
        let outcome = checkpointer.finish().expect("the disk works").expect("there was one");
        let path = outcome.result.expect("the disk works").expect("this is rank 0");
        let (text, code, words) = verify();
        assert!(text.contains("8 bytes in 1 tensors and 1 shards"), "{text}");
        assert_eq!((code, words.as_str()), (0, ""));
        let shard = path.join("shard-00000-of-00001.safetensors");
        let mut bytes = fs::read(&shard).expect("it is there");
        *bytes.last_mut().expect("it has elements") ^= 1;
        fs::write(&shard, bytes).expect("it can be written");
        assert_eq!(answer(&Question::Ls { dir: dir.clone() }).1, 0, "a list reads no elements");
        let (text, code, words) = verify();
        assert!(text.contains("its digest is another one"), "{text}");
        assert_eq!((code, words.as_str()), (1, "paceline: 1 of 1 checkpoints cannot be used\n"));
    }
}
