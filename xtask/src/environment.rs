//! Private Python environments below the cache folder, for what is only to be had as Python packages.
//!
//! An environment is built under a temporary name and renamed when it is complete and works, so a half-made one is never
//! used. A file lock keeps two builders apart. Packages are installed without their dependencies: the recipe names all.
//!
//! Progress goes to standard error: standard output belongs to those who print what they found.

use crate::{process, system, workspace};
use anyhow::{Context, Result, bail};
use std::env;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Written last; an environment without it, or with another content, is not ours to use.
const STAMP: &str = "paceline-stamp";

/// A slow line (2 MB/s) needs 5 minutes for torch; pip gives up by itself when the connection is dead.
const PIP_LIMIT: Duration = Duration::from_secs(40 * 60);

/// What an environment has in it.
pub struct Recipe {
    /// Said to the user.
    pub what: &'static str,
    /// The environment's folder below the cache folder.
    pub name: &'static str,
    /// pip's words, with versions.
    pub packages: &'static [&'static str],
    /// Said before the download: how large it is and how long it takes.
    pub cost: &'static str,
    /// On disk: installed, and downloaded too, which pip may keep.
    pub needed_bytes: u64,
    /// Whether the files are still there; asked at every use.
    pub is_whole: fn(&Path) -> bool,
    /// Whether it works on this machine; asked once, when it is new.
    pub must_work: fn(&Path) -> Result<()>,
}

/// The folder of the recipe's environment, made now if there is none yet.
///
/// # Errors
/// Python is missing, the disk is full, or pip fails; the message says what to do.
pub fn ensure(recipe: &Recipe) -> Result<PathBuf> {
    let Recipe { what, name, .. } = recipe;
    let cache = cache_folder()?;
    let lock =
        File::create(cache.join(format!("{name}.lock"))).context("cannot write to the cache folder")?;
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => {
            eprintln!("Another process is setting up {what} in {}; waiting for it", cache.display());
            lock.lock().context("cannot lock the cache folder")?;
        }
        // A file system without locks: the rename below still keeps a half-made environment from being used.
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    let environment = cache.join(name);
    if is_valid(recipe, &environment) {
        eprintln!("Using {what} in {}", environment.display());
        return Ok(environment);
    }
    let partial = cache.join(format!("{name}.partial"));
    let made = make(recipe, &partial, &cache).and_then(|()| replace(&partial, &environment));
    // Kept on success it would not exist; kept on failure it would only fill the disk.
    let _ = fs::remove_dir_all(&partial);
    made.with_context(|| format!("cannot set up {what}"))?;
    if !is_valid(recipe, &environment) {
        bail!("the new environment of {what} is not valid; this is a bug in xtask");
    }
    Ok(environment)
}

/// Where pip puts packages.
pub fn site_packages(environment: &Path) -> Option<PathBuf> {
    let pythons = fs::read_dir(environment.join("lib")).ok()?.flatten();
    let is_python = |name: &str| name.starts_with("python3");
    let python = pythons.into_iter().find(|entry| is_python(&entry.file_name().to_string_lossy()))?;
    Some(python.path().join("site-packages"))
}

/// `$PACELINE_CACHE_DIR`, else the user's cache folder, else cargo's target folder: the first that can be made.
fn cache_folder() -> Result<PathBuf> {
    let candidates = cache_candidates(|name| env::var_os(name), workspace::target());
    let mut reasons = Vec::new();
    for folder in candidates {
        match fs::create_dir_all(&folder).and_then(|()| try_to_write(&folder)) {
            Ok(()) => return Ok(folder),
            Err(error) => reasons.push(format!("{}: {error}", folder.display())),
        }
    }
    bail!("no cache folder can be written ({}); set PACELINE_CACHE_DIR", reasons.join("; "))
}

fn cache_candidates(variable: impl Fn(&str) -> Option<OsString>, target: PathBuf) -> Vec<PathBuf> {
    let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(asked_for) = path("PACELINE_CACHE_DIR") {
        // Somebody who names a folder wants that one or an error.
        return vec![asked_for];
    }
    let user = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
    user.map(|cache| cache.join("paceline")).into_iter().chain([target]).collect()
}

/// Folders that exist are not always writable.
fn try_to_write(folder: &Path) -> io::Result<()> {
    let probe = folder.join(format!(".probe-{}", std::process::id()));
    File::create(&probe)?;
    fs::remove_file(probe)
}

/// Whether this version of xtask has completed the environment and nobody has removed its files.
fn is_valid(recipe: &Recipe, environment: &Path) -> bool {
    let stamp = fs::read_to_string(environment.join(STAMP));
    stamp.is_ok_and(|stamp| stamp == stamp_text(recipe)) && (recipe.is_whole)(environment)
}

fn stamp_text(recipe: &Recipe) -> String {
    recipe.packages.join("\n") + "\n"
}

/// Makes a complete environment in `partial`, stamp included.
fn make(recipe: &Recipe, partial: &Path, cache: &Path) -> Result<()> {
    let Recipe { what, name, packages, cost, needed_bytes, .. } = recipe;
    system::ensure(&[system::PYTHON, system::VENV])?;
    if let Some(free) = system::free_bytes(cache).filter(|free| free < needed_bytes) {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        bail!(
            "{what} needs {:.1} GB in {}, and {:.1} GB are free; make room or set PACELINE_CACHE_DIR to another disk",
            gigabytes(*needed_bytes),
            cache.display(),
            gigabytes(free)
        );
    }
    let start = Instant::now();
    eprintln!("Setting up {what} in {} (once; {cost})", cache.join(name).display());
    // Left by a builder that was killed; nobody else is in here, we hold the lock.
    if partial.exists() {
        fs::remove_dir_all(partial).context("cannot remove what an interrupted set-up left")?;
    }
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv"]).arg(partial);
    process::run(venv, Duration::from_secs(300)).context("cannot make a Python environment")?;
    eprintln!("[1/3] an empty Python environment ({:.0} s)", start.elapsed().as_secs_f64());

    // pip unpacks in the temporary folder, which on many systems is a small memory disk.
    let scratch = partial.join("tmp");
    fs::create_dir(&scratch).context("cannot make a temporary folder")?;
    let mut pip = Command::new(partial.join("bin/python"));
    pip.args(["-m", "pip", "install", "--no-deps", "--no-input", "--disable-pip-version-check"]);
    pip.args(*packages).env("TMPDIR", &scratch).stdout(io::stderr());
    process::run(pip, PIP_LIMIT).context("pip says why above (is the Python package index reachable?)")?;
    fs::remove_dir_all(&scratch).context("cannot remove pip's temporary folder")?;
    eprintln!("[2/3] {} ({:.0} s)", packages.join(", "), start.elapsed().as_secs_f64());

    (recipe.must_work)(partial)?;
    eprintln!("[3/3] it works on this machine ({:.0} s)", start.elapsed().as_secs_f64());
    fs::write(partial.join(STAMP), stamp_text(recipe)).context("cannot write the stamp")
}

/// Puts the complete environment in its place.
fn replace(partial: &Path, environment: &Path) -> Result<()> {
    if environment.exists() {
        fs::remove_dir_all(environment).context("cannot remove the environment of another version")?;
    }
    fs::rename(partial, environment).context("cannot put the environment in its place")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: Recipe = Recipe {
        what: "a thing",
        name: "thing-2.0",
        packages: &["thing==2.0", "part==1.0"],
        cost: "nothing",
        needed_bytes: 0,
        is_whole: |environment| environment.join("thing").is_file(),
        must_work: |_| Ok(()),
    };

    fn candidates(variables: &[(&str, &str)]) -> Vec<PathBuf> {
        let find =
            |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
        cache_candidates(find, PathBuf::from("/repository/target"))
    }

    #[test]
    fn the_cache_folder_is_the_users_unless_one_is_asked_for() {
        let path = PathBuf::from;
        assert_eq!(candidates(&[]), [path("/repository/target")]);
        assert_eq!(candidates(&[("HOME", "/h")]), [path("/h/.cache/paceline"), path("/repository/target")]);
        let both = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x")];
        assert_eq!(candidates(&both), [path("/x/paceline"), path("/repository/target")]);
        assert_eq!(candidates(&[("HOME", "/h"), ("PACELINE_CACHE_DIR", "/asked")]), [path("/asked")]);
        assert_eq!(candidates(&[("PACELINE_CACHE_DIR", ""), ("HOME", "")]), [path("/repository/target")]);
    }

    #[test]
    fn only_a_complete_environment_of_this_version_is_valid() {
        let environment = env::temp_dir().join(format!("paceline-xtask-{}", std::process::id()));
        let thing = environment.join("thing");
        fs::create_dir_all(&environment).unwrap();
        fs::write(&thing, "").unwrap();
        assert!(!is_valid(&RECIPE, &environment), "no stamp: the set-up was interrupted");
        fs::write(environment.join(STAMP), "thing==1.0\n").unwrap();
        assert!(!is_valid(&RECIPE, &environment), "another version");
        fs::write(environment.join(STAMP), stamp_text(&RECIPE)).unwrap();
        assert!(is_valid(&RECIPE, &environment));
        fs::remove_file(&thing).unwrap();
        assert!(!is_valid(&RECIPE, &environment), "somebody has removed a file");
        fs::remove_dir_all(environment).unwrap();
    }
}
