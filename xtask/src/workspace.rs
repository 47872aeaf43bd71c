//! Where things are in this workspace.

use crate::process::cargo;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder with the workspace's Cargo.toml.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}

/// Cargo's command that builds these targets of ours as users have them. What cargo compiles dependencies with depends on the
/// packages that it is asked for, and on whether an example is among the targets; asked in these words always, it compiles
/// nearly all of them, and our own libraries, once.
pub fn release(targets: &[&str]) -> Command {
    let mut command = cargo(&["build", "--release", "--locked", "--example", "01_all_reduce"]);
    let packages = ["paceline", "paceline-runtime", "paceline-examples", "paceline-benches"];
    packages.iter().for_each(|package| _ = command.args(["--package", package]));
    command.args(targets);
    command
}

/// The features of such a build with which there are tensors of libtorch.
pub const WITH_TCH: [&str; 2] = ["--features", "paceline-runtime/tch,paceline-examples/tch"];

/// The files below `folders` whose name ends with `.extension`, relative to the root, sorted. Build outputs and hidden
/// folders are left out. A folder that does not exist holds no files.
pub fn files(folders: &[&str], extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in folders {
        collect(&root().join(folder), extension, &mut found);
    }
    found.sort();
    found
}

fn collect(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let is_hidden = name.to_string_lossy().starts_with('.');
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && !is_hidden && name != "target" => collect(&path, extension, found),
            Ok(kind) if kind.is_file() && path.extension().is_some_and(|e| e == extension) => {
                found.push(path.strip_prefix(root()).expect("the walk began at the root").to_owned());
            }
            _ => {}
        }
    }
}
