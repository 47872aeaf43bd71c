//! What ranks of former generations wrote of themselves, out of the way of the present one: an analyser reads a folder as one
//! job, and would pair a rank's operations with those that another one issued before the job started again.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cli::RunArgs;

/// Where the ranks of this machine write, if anywhere.
fn folder(args: &RunArgs, variable: Option<OsString>) -> Option<PathBuf> {
    let variable = variable.filter(|folder| !folder.is_empty()).map(PathBuf::from);
    args.flight_recorder.clone().or(variable)
}

/// Moves what the ranks of this machine have written before this generation into a folder beside it, which is called after
/// the generation before; and what ranks have written that the generation of `args` does not have, since it has fewer: nobody
/// else may be left who would. `variable` is PACELINE_FLIGHT_RECORDER. A trace that cannot be moved is left.
pub fn set_aside(args: &RunArgs, generation: u32, variable: Option<OsString>) {
    let Some((before, folder)) = generation.checked_sub(1).zip(folder(args, variable)) else { return };
    let own = args.first_rank()..args.first_rank() + args.ranks;
    for rank in own.chain(beyond(&folder, args.layout().world_size())) {
        if let Err(error) = set_rank_aside(&folder, rank, before) {
            tracing::warn!(rank, folder = %folder.display(), %error, "a trace of a former generation is left");
        }
    }
}

/// The ranks from this number on that have written into the folder.
fn beyond(folder: &Path, world_size: usize) -> Vec<u32> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let ranks = names.filter_map(|name| name.to_str()?.strip_prefix("rank_")?.parse::<u32>().ok());
    ranks.filter(|&rank| rank as usize >= world_size).collect()
}

fn set_rank_aside(folder: &Path, rank: u32, before: u32) -> io::Result<()> {
    let name = format!("rank_{rank}");
    let trace = folder.join(&name);
    if !trace.try_exists()? {
        return Ok(());
    }
    let aside = folder.join(format!("generation_{before}"));
    fs::create_dir_all(&aside)?;
    match fs::rename(trace, aside.join(name)) {
        // On a folder that machines share another launcher was first.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        moved => moved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_lies_in_the_folder_of_its_generation_when_the_next_one_starts() {
        let place = tempfile::tempdir().expect("a folder");
        let trace = place.path().join("rank_3");
        set_rank_aside(place.path(), 3, 0).expect("there is nothing to move");
        assert!(!place.path().join("generation_0").exists());
        for generation in [0, 1] {
            fs::write(&trace, format!("of {generation}")).expect("written");
            set_rank_aside(place.path(), 3, generation).expect("moved");
        }
        assert!(!trace.exists());
        for generation in [0, 1] {
            let aside = place.path().join(format!("generation_{generation}/rank_3"));
            assert_eq!(fs::read_to_string(aside).expect("moved"), format!("of {generation}"));
        }
    }

    #[test]
    fn traces_of_ranks_that_the_generation_does_not_have_are_found() {
        let place = tempfile::tempdir().expect("a folder");
        for name in ["rank_0", "rank_3", "rank_4", "rank_11", "rank_x", "generation_0", "rank_5.py"] {
            fs::write(place.path().join(name), "").expect("written");
        }
        let mut found = beyond(place.path(), 4);
        found.sort_unstable();
        assert_eq!(found, [4, 11]);
        assert!(beyond(&place.path().join("none"), 0).is_empty());
    }
}
