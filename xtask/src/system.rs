//! Debian packages that a step needs: installed when we are root, named in one line when we are not.

use crate::process;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// What a step needs from the system.
pub struct Tool {
    /// Said to the user.
    pub what: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
    /// Succeeds if the tool is there.
    pub probe: &'static [&'static str],
}

/// libtorch's headers are C++.
pub const CXX: Tool = Tool { what: "a C++ compiler", package: "g++", probe: &["c++", "--version"] };

/// torch comes as Python packages.
pub const PYTHON: Tool = Tool {
    what: "Python 3.10 to 3.14",
    package: "python3",
    probe: &["python3", "-c", "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))"],
};

/// Debian's python3 has no pip; `venv` brings one along, if `ensurepip` is there.
pub const VENV: Tool = Tool {
    what: "Python's venv with pip",
    package: "python3-venv",
    probe: &["python3", "-c", "import ensurepip, venv"],
};

/// Makes sure that the tools are there.
///
/// # Errors
/// One of them is missing and cannot be installed; the message says what the user has to install.
pub fn ensure(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| !is_there(tool)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    let whats = missing.iter().map(|tool| tool.what).collect::<Vec<_>>().join(" and ");
    let by_hand = format!("apt-get install {}", packages.join(" "));
    if !is_root() || !succeeds(&["apt-get", "--version"]) {
        bail!("{whats} must be installed first; on Debian: sudo {by_hand}");
    }
    eprintln!("Installing {whats} with `{by_hand}` (usually under a minute)");
    apt_get(&["update", "--quiet"])?;
    apt_get(&[&["install", "--yes", "--quiet", "--no-install-recommends"], packages.as_slice()].concat())?;
    match missing.iter().find(|tool| !is_there(tool)) {
        Some(tool) => {
            bail!("{} is still missing after `{by_hand}`; another version may come first in PATH", tool.what)
        }
        None => Ok(()),
    }
}

/// The bytes free on the file system of an existing folder; `None` if the system does not say.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let output = Command::new("df").args(["--output=avail", "--block-size=1"]).arg(folder).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().nth(1)?.trim().parse().ok()
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdout(io::stderr());
    process::run(command, Duration::from_secs(600)).context("Debian's packages could not be installed")
}

fn is_there(tool: &Tool) -> bool {
    succeeds(tool.probe)
}

fn succeeds(words: &[&str]) -> bool {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let user_ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    // real, effective, saved, file system: what we may do follows the second
    user_ids.split_whitespace().nth(1) == Some("0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_does_not_exist_is_missing() {
        assert!(is_there(&Tool { what: "true", package: "coreutils", probe: &["true"] }));
        assert!(!is_there(&Tool { what: "false", package: "coreutils", probe: &["false"] }));
        assert!(!is_there(&Tool {
            what: "nothing",
            package: "nothing",
            probe: &["no-such-program-as-this"]
        }));
    }

    #[test]
    fn the_free_space_of_an_existing_folder_is_known() {
        assert!(free_bytes(Path::new("/")).is_some());
        assert_eq!(free_bytes(Path::new("/no/such/folder")), None);
    }
}
