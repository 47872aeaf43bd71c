//! Where NCCL is looked for.
//!
//! 1. The copy that this process already has: two NCCLs in one process (ours and torch's) would each take memory and
//!    threads on the device, and know nothing of each other's operations.
//! 2. `PACELINE_NCCL_PATH`, a file or the folder that holds it. If it cannot be used, that is an error: somebody who names
//!    a library wants that one.
//! 3. The wheel `nvidia-nccl-cu13` (or `-cu12`) of the active Python: `VIRTUAL_ENV`, `CONDA_PREFIX`, `PYTHONPATH`, then the
//!    prefix of the first `python3` in `PATH`. No Python is started.
//! 4. What the dynamic linker finds under the name `libnccl.so.2`, then `libnccl.so`.
//!
//! The environment is read here although this is far below the runtime: whoever opens NCCL may have no runtime above.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// The name under which NCCL 2 is known to the dynamic linker. The wheels have no other file.
pub(crate) const SONAME: &str = "libnccl.so.2";

/// Where the wheels put it, seen from a folder of Python packages.
const IN_PACKAGES: &str = "nvidia/nccl/lib/libnccl.so.2";

/// Where to look for NCCL, in the order of the module's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    /// Use the copy that this process has already loaded, if there is one.
    pub loaded: bool,
    /// The library or its folder. Nothing after it is tried.
    pub path: Option<PathBuf>,
    /// Files to try next; those that do not exist are passed over.
    pub files: Vec<PathBuf>,
    /// Names to ask the dynamic linker for, at last.
    pub names: Vec<&'static str>,
}

impl Search {
    /// The search that this process's environment asks for.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| env::var_os(name), children)
    }

    /// Only this library, or the one in this folder; not even the copy that the process may already have.
    pub fn only(path: impl Into<PathBuf>) -> Self {
        Self { loaded: false, path: Some(path.into()), files: Vec::new(), names: Vec::new() }
    }

    /// The pure core: `variable` reads the environment, `children` lists the names in a folder.
    fn from_variables(
        variable: impl Fn(&str) -> Option<OsString>,
        children: impl Fn(&Path) -> Vec<OsString>,
    ) -> Self {
        let path = |name| variable(name).filter(|value| !value.is_empty());
        let prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(path).map(PathBuf::from);
        let mut packages: Vec<_> = prefixes.flat_map(|prefix| packages_below(&prefix, &children)).collect();
        packages.extend(path("PYTHONPATH").iter().flat_map(absolute));
        let programs = path("PATH").map(|folders| absolute(&folders)).unwrap_or_default();
        let has_python = |folder: &&PathBuf| children(folder).iter().any(|name| name == "python3");
        let prefix = programs.iter().find(has_python).and_then(|folder| folder.parent());
        packages.extend(prefix.iter().flat_map(|prefix| packages_below(prefix, &children)));
        let mut files: Vec<_> = packages.iter().map(|folder| folder.join(IN_PACKAGES)).collect();
        let mut seen = std::collections::HashSet::new();
        files.retain(|file| seen.insert(file.clone()));
        Self {
            loaded: true,
            path: path("PACELINE_NCCL_PATH").map(PathBuf::from),
            files,
            names: vec![SONAME, "libnccl.so"],
        }
    }
}

/// The folders of packages of every Python below a prefix. Debian calls its own `dist-packages`.
fn packages_below(prefix: &Path, children: impl Fn(&Path) -> Vec<OsString>) -> Vec<PathBuf> {
    let library = prefix.join("lib");
    let mut pythons: Vec<_> = children(&library);
    pythons.retain(|name| name.to_string_lossy().starts_with("python3"));
    pythons.sort();
    let kinds = ["site-packages", "dist-packages"];
    pythons.iter().flat_map(|python| kinds.map(|kind| library.join(python).join(kind))).collect()
}

/// The folders of a list like `PATH`. A relative one means whatever folder the process is in: no place for a library.
fn absolute(folders: &OsString) -> Vec<PathBuf> {
    env::split_paths(folders).filter(|folder| folder.is_absolute()).collect()
}

fn children(folder: &Path) -> Vec<OsString> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(variables: &[(&str, &str)]) -> Search {
        let find =
            |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
        let children = |folder: &Path| {
            let names: &[&str] = match folder.to_str().unwrap() {
                "/v/lib" => &["python3.12", "libx.so"],
                "/usr/lib" => &["python3.11", "python3", "python2.7"],
                "/usr/bin" => &["python3", "ls"],
                _ => &[],
            };
            names.iter().map(OsString::from).collect()
        };
        Search::from_variables(find, children)
    }

    /// The folders of packages, without the wheel's part of the path.
    fn files(search: &Search) -> Vec<String> {
        let folder = |file: &PathBuf| file.to_string_lossy().replace(IN_PACKAGES, "");
        search.files.iter().map(folder).collect()
    }

    #[test]
    fn the_virtual_environment_comes_before_the_python_in_the_path() {
        let found =
            search(&[("VIRTUAL_ENV", "/v"), ("PATH", "relative:/none:/usr/bin"), ("PYTHONPATH", "/p:q")]);
        let expected = [
            "/v/lib/python3.12/site-packages/",
            "/v/lib/python3.12/dist-packages/",
            "/p/",
            "/usr/lib/python3/site-packages/",
            "/usr/lib/python3/dist-packages/",
            "/usr/lib/python3.11/site-packages/",
            "/usr/lib/python3.11/dist-packages/",
        ];
        assert_eq!(files(&found), expected);
    }

    #[test]
    fn a_variable_names_the_library_and_an_empty_one_names_none() {
        assert_eq!(search(&[("PACELINE_NCCL_PATH", "/n")]).path, Some(PathBuf::from("/n")));
        assert_eq!(search(&[("PACELINE_NCCL_PATH", "")]).path, None);
    }

    #[test]
    fn an_empty_environment_leaves_the_loaded_copy_and_the_systems() {
        let names = vec!["libnccl.so.2", "libnccl.so"];
        assert_eq!(search(&[]), Search { loaded: true, path: None, files: Vec::new(), names });
    }
}
