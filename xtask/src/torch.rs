//! A private libtorch: the PyTorch wheel and the two CUDA libraries that its CPU part needs, in an environment of its own.
//!
//! Without dependencies: 1.3 GB instead of 4.7 GB. The wheel on PyPI is the CUDA 13.0 build, and its `libtorch_cpu.so`
//! cannot be loaded without the CUDA runtime and the profiling interface (cupti), also on a machine without a GPU; it
//! finds them beside itself through its own RPATH. `import torch` in Python needs all the others too.

use crate::environment::{self, Recipe};
use crate::process;
use anyhow::{Context, Result};
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The version, as pip and the reports have it.
pub const VERSION: &str = "2.11.0";

const RECIPE: Recipe = Recipe {
    what: "torch",
    name: "torch-2.11.0",
    // These belong together: tch 0.24.0 is generated for torch 2.11.0, and the other two are what that wheel asks for.
    packages: &["torch==2.11.0", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"],
    cost: "a download of 0.55 GB, usually 1 minute, 5 on a slow line",
    needed_bytes: 3_000_000_000,
    is_whole: |environment| library(environment).is_some_and(|library| library.is_file()),
    must_work: must_load,
};

/// For the compiler of C++, after those of the profile: what tch has in C++ only passes calls on, and takes minutes to be
/// optimised further.
const FLAGS: &str = "-O1 -g0";

/// An installed libtorch.
pub struct Torch {
    environment: PathBuf,
    /// The wheel's folder `torch`.
    home: PathBuf,
}

impl Torch {
    /// The folder with `lib` and `include`.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The Python environment that it is installed in.
    pub fn virtual_environment(&self) -> &Path {
        &self.environment
    }

    /// What a build with tch needs in its environment, and what a program linked with it needs to start.
    pub fn environment(&self) -> [(&'static str, OsString); 3] {
        let mut search = OsString::from(self.home.join("lib"));
        if let Some(inherited) = env::var_os("LD_LIBRARY_PATH").filter(|path| !path.is_empty()) {
            search.push(":");
            search.push(inherited);
        }
        let mut flags = env::var_os("CXXFLAGS").unwrap_or_default();
        if !flags.to_string_lossy().ends_with(FLAGS) {
            flags.push(" ");
            flags.push(FLAGS);
        }
        [("LIBTORCH", self.home.clone().into()), ("LD_LIBRARY_PATH", search), ("CXXFLAGS", flags)]
    }
}

/// The private libtorch, made now if there is none yet.
///
/// # Errors
/// Python is missing, the disk is full, or pip fails; the message says what to do.
pub fn ensure() -> Result<Torch> {
    let environment = environment::ensure(&RECIPE)?;
    let site = environment::site_packages(&environment).context("the environment of torch is gone")?;
    Ok(Torch { environment, home: site.join("torch") })
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

/// The library that tch links.
fn library(environment: &Path) -> Option<PathBuf> {
    Some(environment::site_packages(environment)?.join("torch/lib/libtorch_cpu.so"))
}

/// Loads the library: better now than at the end of a build of three minutes.
fn must_load(environment: &Path) -> Result<()> {
    let library = library(environment).context("pip installed nothing")?;
    let mut python = Command::new(environment.join("bin/python"));
    python.args(["-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])"]).arg(library);
    process::run(python, Duration::from_secs(120))
        .context("torch was installed, but its libraries cannot be loaded on this machine (see above)")
}
