//! The checks. Each is a job of `paceline run`, so that what is checked is what a training program gets.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use paceline_collectives::device::Accelerator;
use paceline_runtime::env;

use crate::{Options, rank};

/// No check takes longer; one that hangs fails. On a GPU that several processes share, NCCL takes some 10 ms a call.
const PATIENCE: &str = "300";

/// One check.
struct Check {
    name: &'static str,
    ranks: u32,
    part: &'static str,
    variables: &'static [(&'static str, &'static str)],
    flags: &'static [&'static str],
    needs: Needs,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    Gpu,
    Plugin,
}

const NCCL: (&str, &str) = ("PACELINE_BACKEND", "nccl");
const OVER_SOCKETS: [(&str, &str); 2] = [NCCL, ("NCCL_NET", "Socket")];
const OVER_OURS: [(&str, &str); 2] = [NCCL, ("NCCL_NET", "Paceline")];
const FALLBACK: (&str, &str) = ("PACELINE_BACKEND", "fallback");
/// A queue of the GPU's for each stream: two in one would run one after the other, waits or not.
const APART: [(&str, &str); 1] = [("CUDA_DEVICE_MAX_CONNECTIONS", "32")];
const QUIC: [(&str, &str); 2] = [("PACELINE_FABRIC", "quic"), ("PACELINE_SHARED_MEMORY", "off")];

#[rustfmt::skip]
const CHECKS: &[Check] = &[
    Check { name: "every collective and dtype, 1 rank, NCCL",            ranks: 1, part: "collectives", variables: &[NCCL],      flags: &[], needs: Needs::Gpu },
    Check { name: "every collective and dtype, 1 rank, fallback",        ranks: 1, part: "collectives", variables: &[FALLBACK],     flags: &[], needs: Needs::Gpu },
    Check { name: "2 ranks on one GPU, NCCL over its sockets",           ranks: 2, part: "collectives", variables: &OVER_SOCKETS, flags: &[], needs: Needs::Gpu },
    Check { name: "3 ranks on one GPU, NCCL over its sockets",           ranks: 3, part: "collectives", variables: &OVER_SOCKETS, flags: &[], needs: Needs::Gpu },
    Check { name: "4 ranks on one GPU, NCCL over its sockets",           ranks: 4, part: "collectives", variables: &OVER_SOCKETS, flags: &[], needs: Needs::Gpu },
    Check { name: "2 ranks on one GPU, NCCL over our plugin",            ranks: 2, part: "collectives", variables: &OVER_OURS,   flags: &[], needs: Needs::Plugin },
    Check { name: "4 ranks on one GPU, NCCL over our plugin",            ranks: 4, part: "collectives", variables: &OVER_OURS,   flags: &[], needs: Needs::Plugin },
    Check { name: "a GPU and a rank without one, fallback over QUIC",    ranks: 2, part: "mixed",       variables: &QUIC,     flags: &[], needs: Needs::Gpu },
    Check { name: "2 hosts of 2 ranks each, NCCL inside, ours between",  ranks: 4, part: "hierarchy",   variables: &[("NCCL_NET", "Socket")], flags: &[], needs: Needs::Gpu },
    Check { name: "a killed rank ends NCCL on the other; a new group",   ranks: 2, part: "killed",      variables: &OVER_SOCKETS, flags: &["--grace", "30", "--max-restarts", "1"], needs: Needs::Gpu },
    Check { name: "each wait of the fallback's streams is needed",       ranks: 2, part: "waits-fallback", variables: &APART,    flags: &[], needs: Needs::Gpu },
    Check { name: "each wait of NCCL's group is needed",                 ranks: 1, part: "waits-nccl",  variables: &APART,       flags: &[], needs: Needs::Gpu },
    Check { name: "the fallback beside its slowest stage",               ranks: 2, part: "pipeline",    variables: &QUIC,     flags: &[], needs: Needs::Gpu },
    Check { name: "what a call costs over raw NCCL",                     ranks: 1, part: "overhead",    variables: &[NCCL],      flags: &[], needs: Needs::Gpu },
];

/// What a check said.
enum Outcome {
    Passed(String),
    Failed(String),
    Skipped(&'static str),
}

/// Runs all checks and prints the table. Whether all have passed or were skipped, and some have run.
///
/// # Errors
/// What is missing for any of them.
pub fn run(options: &Options) -> Result<bool> {
    let own = std::env::current_exe().context("this program's own file")?;
    let beside = |name: &str| own.with_file_name(name);
    let paceline = options.paceline.clone().unwrap_or_else(|| beside("paceline"));
    anyhow::ensure!(
        paceline.is_file(),
        "there is no launcher at {}; name it with --paceline",
        paceline.display()
    );
    let plugin = options.plugin.clone().unwrap_or_else(|| beside("libnccl-net-paceline.so"));
    let plugin = Some(plugin).filter(|file| file.is_file());
    let gpu = match Accelerator::find(0, env::cuda_driver(env::process).as_deref()) {
        (Accelerator::Cuda(gpu), _) => gpu,
        (Accelerator::Host(_), why) => anyhow::bail!("{}", why.unwrap_or_default()),
    };
    let library = paceline_nccl::Library::open(&paceline_nccl::Search::from_environment())?;
    println!(
        "{}, driver for CUDA {}, NCCL {} from {}",
        gpu.name(),
        gpu.driver_version()?,
        library.version(),
        library.origin()
    );
    let start = Instant::now();
    let (mut passed, mut failed, mut skipped) = (0u32, 0u32, 0u32);
    for check in CHECKS.iter().filter(|check| check.name.contains(&options.only)) {
        let start = Instant::now();
        let outcome = match (check.needs, &plugin) {
            (Needs::Plugin, None) => Outcome::Skipped("no plugin beside this program"),
            _ => check.run(&paceline, &own, plugin.as_deref(), options.smoke)?,
        };
        let (number, verdict, note) = match outcome {
            Outcome::Passed(note) => (&mut passed, "passed", note),
            Outcome::Failed(note) => (&mut failed, "FAILED", note),
            Outcome::Skipped(why) => (&mut skipped, "skipped", why.to_owned()),
        };
        *number += 1;
        println!(
            "{verdict:>7} {:>7.1} s  {:<52} {}",
            start.elapsed().as_secs_f64(),
            check.name,
            note.trim_end()
        );
    }
    println!(
        "gpu checks: {passed} passed, {failed} failed, {skipped} skipped in {:.0} s",
        start.elapsed().as_secs_f64()
    );
    Ok(failed == 0 && passed > 0)
}

impl Check {
    fn run(&self, paceline: &Path, own: &Path, plugin: Option<&Path>, smoke: bool) -> Result<Outcome> {
        let mut command = Command::new(paceline);
        command
            .args(["run", "-n", &self.ranks.to_string(), "--timeout", PATIENCE])
            .args(self.flags)
            .arg("--");
        // Each process is a host of its own to NCCL, which refuses two on one GPU otherwise.
        command.args(["sh", "-c", "NCCL_HOSTID=checks-$PACELINE_RANK exec \"$@\"", "sh"]);
        command.arg(own).arg("rank").args(smoke.then_some("--smoke")).arg(self.part);
        command.envs(self.variables.iter().copied());
        if let (Needs::Plugin, Some(plugin)) = (self.needs, plugin) {
            command.env("NCCL_NET_PLUGIN", plugin);
        }
        let (code, lines) = finish(command)?;
        // What ranks have to say in the table is on lines of its own, whichever rank's.
        let notes = lines.iter().filter_map(|line| line.split_once("note: ").map(|(_, note)| note));
        let notes: Vec<&str> = notes.collect();
        // The launcher starts this one again, and the second life says nothing about the first.
        let survived = self.part != "killed" || notes.iter().any(|note| note.contains(rank::SURVIVED));
        Ok(match code == 0 && !notes.is_empty() && survived {
            true => Outcome::Passed(notes.join("; ")),
            false => {
                let tail = &lines[lines.len().saturating_sub(20)..];
                Outcome::Failed(format!("exit code {code}\n{}", tail.join("\n")))
            }
        })
    }
}

/// Runs a command to its end; its exit code, and the lines of both of its streams.
fn finish(mut command: Command) -> Result<(i32, Vec<String>)> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let streams: [Box<dyn Read + Send>; 2] =
        [Box::new(child.stdout.take().context("piped")?), Box::new(child.stderr.take().context("piped")?)];
    let readers = streams.map(|mut stream| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was said before an error counts all the same.
            let _ = stream.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect::<Vec<_>>()
        })
    });
    // The ranks' own deadlines end them; this is for a launcher that does not end.
    let patience = Duration::from_secs(2 * PATIENCE.parse::<u64>()?);
    let start = Instant::now();
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if start.elapsed() > patience => {
                child.kill()?;
                break child.wait()?;
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let lines = readers.into_iter().flat_map(|reader| reader.join().unwrap_or_default()).collect();
    Ok((status.code().unwrap_or(-1), lines))
}
