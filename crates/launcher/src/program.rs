//! Finds the program before anything is started, by the rules of `execvp`, so that a typing error is one line and
//! not one per rank.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use crate::error::Error;

/// Where `execvp` looks if there is no PATH.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// The file that the name `program` stands for: itself if it contains a slash, else the first executable file of
/// that name in the directories of `path` (the value of PATH).
///
/// # Errors
/// [`Error::ProgramMissing`], or [`Error::ProgramNotExecutable`] if there are only files that cannot be executed.
pub fn find(program: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, Error> {
    let shown = || program.to_string_lossy().into_owned();
    let mut why_not = None;
    for candidate in candidates(program, path) {
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Some(why)) => why_not = why_not.or(Some(why)),
            Err(None) => {}
        }
    }
    Err(match why_not {
        Some(why) => Error::ProgramNotExecutable { program: shown(), why },
        None => Error::ProgramMissing { program: shown() },
    })
}

/// Looks for a script before its interpreter does, once for all ranks.
///
/// # Errors
/// [`Error::ScriptMissing`].
pub fn check_script(script: &Path) -> Result<(), Error> {
    if script.exists() {
        return Ok(());
    }
    Err(Error::ScriptMissing { script: script.display().to_string() })
}

fn candidates(program: &OsStr, path: Option<&OsStr>) -> Vec<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return vec![PathBuf::from(program)];
    }
    let path = path.unwrap_or(OsStr::new(DEFAULT_PATH));
    // An empty element means the working directory.
    let in_directory = |dir: PathBuf| {
        if dir.as_os_str().is_empty() { Path::new(".").join(program) } else { dir.join(program) }
    };
    std::env::split_paths(path).map(in_directory).collect()
}

/// Whether the file can be executed; the error is the reason, or `None` if there is no such file.
fn check(file: &Path) -> Result<(), Option<String>> {
    let metadata = file.metadata().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => None,
        _ => Some(e.to_string()),
    })?;
    if metadata.is_dir() {
        return Err(Some("it is a directory".to_owned()));
    }
    access(file, Access::EXEC_OK).map_err(|_| Some(format!("try chmod +x {}", file.display())))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A directory with `tool` (executable), `data` (not) and `folder`.
    fn directory() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, mode) in [("tool", 0o755), ("data", 0o644)] {
            let file = dir.path().join(name);
            fs::write(&file, "").expect("written");
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("set");
        }
        fs::create_dir(dir.path().join("folder")).expect("created");
        dir
    }

    fn find_in(dirs: &[&Path], program: &str) -> Result<PathBuf, Error> {
        let path = std::env::join_paths(dirs).expect("no colons");
        find(OsStr::new(program), Some(&path))
    }

    #[test]
    fn a_name_is_looked_up_along_the_path() {
        let (empty, full) = (tempfile::tempdir().expect("a temporary directory"), directory());
        let found = find_in(&[Path::new("/nonexistent"), empty.path(), full.path()], "tool");
        assert_eq!(found, Ok(full.path().join("tool")));
        assert!(matches!(find_in(&[empty.path()], "tool"), Err(Error::ProgramMissing { .. })));
    }

    #[test]
    fn what_cannot_be_executed_is_skipped_but_remembered() {
        let (first, second) = (directory(), directory());
        for name in ["data", "folder"] {
            let found = find_in(&[first.path(), second.path()], name);
            assert!(matches!(found, Err(Error::ProgramNotExecutable { .. })), "{name}: {found:?}");
        }
        fs::set_permissions(second.path().join("data"), fs::Permissions::from_mode(0o755)).expect("set");
        assert_eq!(find_in(&[first.path(), second.path()], "data"), Ok(second.path().join("data")));
    }

    #[test]
    fn a_name_with_a_slash_is_a_path() {
        let dir = directory();
        let tool = dir.path().join("tool");
        assert_eq!(find(tool.as_os_str(), Some(OsStr::new(""))), Ok(tool.clone()));
        let missing = find(tool.join("below").as_os_str(), None);
        assert!(matches!(missing, Err(Error::ProgramMissing { .. })), "{missing:?}");
    }

    #[test]
    fn without_a_path_the_system_directories_are_searched() {
        assert!(find(OsStr::new("sh"), None).is_ok());
    }
}
