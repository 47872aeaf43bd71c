//! Who takes the namespaces away: a small process that waits for the end of ours, in whatever way it ends.
//!
//! Its standard input is a pipe whose other end is here. It closes when the [`Janitor`] is dropped, and also when this
//! process gets SIGKILL; then the janitor kills what still runs in the namespaces and deletes them. It ignores Ctrl-C.
//! If it is killed too, the names stay, and the next bed removes them: they carry the id of the process that made them.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::Error;
use crate::command::run;

/// Before the process id in the name of every namespace.
const PREFIX: &str = "paceline-";

/// Kills what runs in the namespaces whose names are its arguments, and deletes them.
const SWEEP: &str = r#"
for name; do
    for pid in $(ip netns pids "$name"); do kill -KILL "$pid"; done
    ip netns del "$name"
done 2>/dev/null
"#;

/// Namespaces that go when this value does.
#[derive(Debug)]
pub(crate) struct Janitor {
    process: Child,
}

impl Janitor {
    /// Has the namespaces of these names removed in the end, whether they exist yet or not.
    ///
    /// # Errors
    /// [`Error::System`] if no process can be started.
    pub(crate) fn hire(names: &[String]) -> Result<Self, Error> {
        let script = format!("trap '' HUP INT QUIT TERM\ncat >/dev/null{SWEEP}");
        let mut command = shell(&script, names);
        command.stdin(Stdio::piped()).process_group(0);
        let process = command.spawn().map_err(|error| Error::System {
            what: "start the process that removes the namespaces".to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self { process })
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// The prefix of all names of the bed that has this number in this process.
pub(crate) fn prefix(bed: usize) -> String {
    format!("{PREFIX}{}-{bed}", std::process::id())
}

/// Removes the namespaces of processes that are no more, and those that an earlier process of our number has left if
/// this is our first bed.
///
/// # Errors
/// [`Error::Command`] if namespaces cannot be listed.
pub(crate) fn remove_stale(first: bool) -> Result<(), Error> {
    let list = run("ip netns list")?;
    let is_alive = |pid: u32| match pid == std::process::id() {
        true => !first,
        false => Path::new(&format!("/proc/{pid}")).exists(),
    };
    let stale = stale(&list, is_alive);
    if stale.is_empty() {
        return Ok(());
    }
    // Somebody else may remove them at the same time: what counts is that they are gone.
    let _ = shell(SWEEP, &stale).status();
    match stale.iter().find(|name| fs::metadata(format!("/run/netns/{name}")).is_ok()) {
        Some(name) => Err(Error::System {
            what: format!("remove the namespace {name} of a process that has ended"),
            reason: format!("it is still there; try `ip netns del {name}`"),
        }),
        None => Ok(()),
    }
}

/// Of what `ip netns list` prints, the names of processes that do not live.
fn stale(list: &str, is_alive: impl Fn(u32) -> bool) -> Vec<String> {
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    let is_stale = |name: &&str| {
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        owner.and_then(|pid| pid.parse().ok()).is_some_and(|pid| !is_alive(pid))
    };
    names.filter(is_stale).map(str::to_owned).collect()
}

fn shell(script: &str, arguments: &[String]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "paceline-janitor"]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_of_ours_whose_process_is_dead_are_stale() {
        let list = "paceline-11-0-h0 (id: 3)\npaceline-12-0-switch\npaceline-x-h0\nother-11-0-h0\n";
        assert_eq!(stale(list, |pid| pid == 12), ["paceline-11-0-h0"]);
        assert!(stale("", |_| false).is_empty());
    }
}
