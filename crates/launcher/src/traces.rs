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
/// the generation before. `variable` is PACELINE_FLIGHT_RECORDER. A trace that cannot be moved is left.
pub fn set_aside(args: &RunArgs, generation: u32, variable: Option<OsString>) {
    let Some((before, folder)) = generation.checked_sub(1).zip(folder(args, variable)) else { return };
    for rank in args.first_rank()..args.first_rank() + args.ranks {
        if let Err(error) = set_rank_aside(&folder, rank, before) {
            tracing::warn!(rank, folder = %folder.display(), %error, "a trace of a former generation is left");
        }
    }
}

fn set_rank_aside(folder: &Path, rank: u32, before: u32) -> io::Result<()> {
    let name = format!("rank_{rank}");
    let trace = folder.join(&name);
    if !trace.try_exists()? {
        return Ok(());
    }
    let aside = folder.join(format!("generation_{before}"));
    fs::create_dir_all(&aside)?;
    fs::rename(trace, aside.join(name))
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
}
