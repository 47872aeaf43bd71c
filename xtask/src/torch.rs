//! A private libtorch: the PyTorch wheel and the two CUDA libraries that its CPU part needs, in a Python environment of
//! our own below the cache folder.
//!
//! The environment is built under a temporary name and renamed when it is complete and its libraries load, so a half-made
//! one is never used. A file lock keeps two builders apart. We install without dependencies: 1.3 GB instead of 4.7 GB.
//! The wheel on PyPI is the CUDA 13.0 build, and its `libtorch_cpu.so` cannot be loaded without the CUDA runtime and the
//! profiling interface (cupti), also on a machine without a GPU; it finds them beside itself through its own RPATH.
//!
//! Progress goes to standard error: standard output belongs to [`print_environment`].

use crate::{process, system, workspace};
use anyhow::{Context, Result, bail};
use std::env;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The versions that belong together: tch 0.24.0 is generated for torch 2.11.0, and the other two are what that wheel asks
/// for.
const PACKAGES: [&str; 3] = ["torch==2.11.0", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"];

/// The environment's folder below the cache folder.
const NAME: &str = "torch-2.11.0";

/// Written last; an environment without it, or with another content, is not ours to use.
const STAMP: &str = "paceline-stamp";

/// Installed 1.3 GB, downloaded 0.55 GB, and pip may keep the download.
const NEEDED_BYTES: u64 = 3_000_000_000;

/// A slow line (2 MB/s) needs 5 minutes; pip gives up by itself when the connection is dead.
const PIP_LIMIT: Duration = Duration::from_secs(40 * 60);

/// An installed libtorch.
pub struct Torch {
    /// The wheel's folder `torch`.
    home: PathBuf,
}

impl Torch {
    /// What a build with tch needs in its environment, and what a program linked with it needs to start.
    pub fn environment(&self) -> [(&'static str, OsString); 2] {
        let mut search = OsString::from(self.home.join("lib"));
        if let Some(inherited) = env::var_os("LD_LIBRARY_PATH").filter(|path| !path.is_empty()) {
            search.push(":");
            search.push(inherited);
        }
        [("LIBTORCH", self.home.clone().into()), ("LD_LIBRARY_PATH", search)]
    }
}

/// The private libtorch, made now if there is none yet.
///
/// # Errors
/// Python is missing, the disk is full, or pip fails; the message says what to do.
pub fn ensure() -> Result<Torch> {
    let cache = cache_folder()?;
    let lock =
        File::create(cache.join(format!("{NAME}.lock"))).context("cannot write to the cache folder")?;
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => {
            eprintln!("Another process is setting up torch in {}; waiting for it", cache.display());
            lock.lock().context("cannot lock the cache folder")?;
        }
        // A file system without locks: the rename below still keeps a half-made environment from being used.
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    let environment = cache.join(NAME);
    if let Some(torch) = valid(&environment) {
        eprintln!("Using torch in {}", environment.display());
        return Ok(torch);
    }
    let partial = cache.join(format!("{NAME}.partial"));
    let made = make(&partial, &cache).and_then(|()| replace(&partial, &environment));
    // Kept on success it would not exist; kept on failure it would only fill the disk.
    let _ = fs::remove_dir_all(&partial);
    made?;
    valid(&environment).context("the new torch environment is not valid; this is a bug in xtask")
}

/// Prints the environment in the shell's words, for `eval "$(cargo xtask torch-env)"`.
///
/// # Errors
/// See [`ensure`].
pub fn print_environment() -> Result<()> {
    for (name, value) in ensure()?.environment() {
        println!("export {name}='{}'", value.to_string_lossy());
    }
    Ok(())
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
    bail!(
        "no folder for the torch environment can be written ({}); set PACELINE_CACHE_DIR",
        reasons.join("; ")
    )
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

/// The libtorch in an environment that was completed by this version of xtask.
fn valid(environment: &Path) -> Option<Torch> {
    let stamp = fs::read_to_string(environment.join(STAMP)).ok()?;
    if stamp != stamp_text() {
        return None;
    }
    let home = site_packages(environment)?.join("torch");
    home.join("lib/libtorch_cpu.so").is_file().then_some(Torch { home })
}

fn stamp_text() -> String {
    PACKAGES.join("\n") + "\n"
}

fn site_packages(environment: &Path) -> Option<PathBuf> {
    let pythons = fs::read_dir(environment.join("lib")).ok()?.flatten();
    let is_python = |name: &str| name.starts_with("python3");
    let python = pythons.into_iter().find(|entry| is_python(&entry.file_name().to_string_lossy()))?;
    Some(python.path().join("site-packages"))
}

/// Makes a complete environment in `partial`, stamp included.
fn make(partial: &Path, cache: &Path) -> Result<()> {
    system::ensure(&[system::PYTHON, system::VENV])?;
    if let Some(free) = system::free_bytes(cache).filter(|free| *free < NEEDED_BYTES) {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        bail!(
            "torch needs {:.1} GB in {}, and {:.1} GB are free; make room or set PACELINE_CACHE_DIR to another disk",
            gigabytes(NEEDED_BYTES),
            cache.display(),
            gigabytes(free)
        );
    }
    let start = Instant::now();
    eprintln!(
        "Setting up torch in {} (once; a download of 0.55 GB, usually 1 minute, 5 on a slow line)",
        cache.join(NAME).display()
    );
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
    pip.args(PACKAGES).env("TMPDIR", &scratch).stdout(io::stderr());
    process::run(pip, PIP_LIMIT).context(
        "torch could not be installed; pip says why above (is the Python package index reachable?)",
    )?;
    fs::remove_dir_all(&scratch).context("cannot remove pip's temporary folder")?;
    eprintln!("[2/3] {} ({:.0} s)", PACKAGES.join(", "), start.elapsed().as_secs_f64());

    must_load(partial)?;
    eprintln!("[3/3] its libraries load ({:.0} s)", start.elapsed().as_secs_f64());
    fs::write(partial.join(STAMP), stamp_text()).context("cannot write the stamp")
}

/// Loads the library that tch links: better now than at the end of a build of three minutes.
fn must_load(environment: &Path) -> Result<()> {
    let library =
        site_packages(environment).context("pip installed nothing")?.join("torch/lib/libtorch_cpu.so");
    let mut python = Command::new(environment.join("bin/python"));
    python.args(["-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])"]).arg(library);
    process::run(python, Duration::from_secs(120))
        .context("torch was installed, but its libraries cannot be loaded on this machine (see above)")
}

/// Puts the complete environment in its place.
fn replace(partial: &Path, environment: &Path) -> Result<()> {
    if environment.exists() {
        fs::remove_dir_all(environment).context("cannot remove the environment of another version")?;
    }
    fs::rename(partial, environment).context("cannot put the torch environment in its place")
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let library = environment.join("lib/python3.11/site-packages/torch/lib/libtorch_cpu.so");
        fs::create_dir_all(library.parent().unwrap()).unwrap();
        fs::write(&library, "").unwrap();
        assert!(valid(&environment).is_none(), "no stamp: the set-up was interrupted");
        fs::write(environment.join(STAMP), "torch==1.0\n").unwrap();
        assert!(valid(&environment).is_none(), "another version");
        fs::write(environment.join(STAMP), stamp_text()).unwrap();
        assert_eq!(valid(&environment).unwrap().home, library.parent().unwrap().parent().unwrap());
        fs::remove_file(&library).unwrap();
        assert!(valid(&environment).is_none(), "somebody has removed the library");
        fs::remove_dir_all(environment).unwrap();
    }
}
