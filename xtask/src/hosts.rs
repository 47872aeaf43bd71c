//! `cargo xtask hosts`: a program as the ranks of a job on several hosts of this machine, over links as asked for.
//!
//! The hosts are `paceline_testbed`'s: network namespaces, joined by veth pairs or, where the links are to have faults,
//! by a relay of ours. The launcher runs at their switch and each rank on its host.

use crate::process::{self, cargo};
use crate::workspace;
use anyhow::{Context, Result, bail};
use clap::Args;
use paceline_testbed::{Bed, Faults, Plan, SWITCH_ADDRESS};
use std::ffi::OsString;
use std::process::{Command, ExitStatus};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Building the launcher from nothing.
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

#[derive(Args)]
pub struct Options {
    /// How many hosts
    #[arg(value_name = "N")]
    hosts: usize,
    /// How many ranks each host has
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks_per_host: u32,
    /// The longest IP packet of the links, in bytes
    #[arg(long, default_value_t = 1500)]
    mtu: u32,
    /// How many interfaces each host has: eth0, eth1 and so on, each in a network of its own
    #[arg(long, default_value_t = 1)]
    interfaces: usize,
    /// What a link carries: 1gbit, 100mbit, 512kbit [default: as much as the machine does]
    #[arg(long, value_parser = rate)]
    rate: Option<u64>,
    /// How long a packet takes on its way: 50ms, 200us
    #[arg(long, value_parser = duration)]
    delay: Option<Duration>,
    /// The share of packets that get lost: 1%
    #[arg(long, value_parser = share)]
    loss: Option<f64>,
    /// The share of packets that others overtake: 5%
    #[arg(long, value_parser = share)]
    reorder: Option<f64>,
    /// The share of packets that arrive twice: 1%
    #[arg(long, value_parser = share)]
    duplicate: Option<f64>,
    /// Cut the link between hosts A and B that long after the start, for that long or for good; can be repeated
    #[arg(long, value_name = "A-B@AFTER[+FOR]")]
    cut: Vec<Cut>,
    /// Where the chance of the faults begins [default: another one each time, which is printed]
    #[arg(long)]
    seed: Option<u64>,
    /// The program of each rank and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// A link that is cut for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cut {
    hosts: (usize, usize),
    after: Duration,
    lasts: Option<Duration>,
}

/// Runs the job to its end.
///
/// # Errors
/// There can be no hosts here, the options make no sense, or the job fails.
pub fn run(options: &Options) -> Result<()> {
    if let Some(cut) = options.cut.iter().find(|cut| cut.hosts.0.max(cut.hosts.1) >= options.hosts) {
        bail!(
            "no link between hosts {} and {}: they are 0 to {}",
            cut.hosts.0,
            cut.hosts.1,
            options.hosts - 1
        );
    }
    process::run(cargo(&["build", "--release", "--locked", "--package", "paceline"]), BUILD_LIMIT)?;
    if let Some(reason) = paceline_testbed::missing() {
        bail!("{reason}");
    }
    let bed = Bed::build(&options.plan())?;
    if bed.relay().is_some() {
        eprintln!("The faults' chance begins with --seed {}", options.seed());
    }
    // Whoever waits for a cut's time stops when the sender is dropped.
    let (ended, end) = mpsc::channel::<()>();
    let status = thread::scope(|scope| {
        let bed = &bed;
        scope.spawn(move || break_links(bed, &options.cut, &end));
        let status = supervise(options.launcher(bed));
        drop(ended);
        status
    })?;
    if let Some(relay) = bed.relay() {
        eprintln!("On the links: {}", relay.counts());
    }
    process::must_succeed(status, "paceline run")
}

impl Options {
    fn plan(&self) -> Plan {
        let Self { hosts, mtu, interfaces, rate, delay, loss, reorder, duplicate, cut, .. } = self;
        let has_faults =
            delay.is_some() || !cut.is_empty() || [loss, reorder, duplicate].iter().any(|f| f.is_some());
        let faults = has_faults.then(|| Faults {
            delay: delay.unwrap_or_default(),
            loss: loss.unwrap_or_default(),
            reorder: reorder.unwrap_or_default(),
            duplicate: duplicate.unwrap_or_default(),
            rate: *rate,
            ..Faults::default()
        });
        Plan { hosts: *hosts, mtu: *mtu, interfaces: *interfaces, rate: *rate, faults, seed: self.seed() }
    }

    fn seed(&self) -> u64 {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.seed.unwrap_or_else(now)
    }

    fn launcher(&self, bed: &Bed) -> Command {
        let mut launcher = bed.on_switch(workspace::target().join("release/paceline"));
        let ranks = self.hosts * self.ranks_per_host as usize;
        launcher.args(["run", "-n", &ranks.to_string()]);
        launcher.args(["--rdzv-endpoint", &format!("{SWITCH_ADDRESS}:0"), "--"]);
        launcher.args(bed.rank_words(self.ranks_per_host as usize)).args(&self.command);
        launcher
    }
}

/// Runs the launcher with our streams. Ctrl-C reaches it as it reaches us; we wait until it has ended the ranks in order.
fn supervise(mut launcher: Command) -> Result<ExitStatus> {
    let words = process::shown(&launcher);
    // A handler that does nothing of note; the launcher starts with the system's.
    let interrupted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGINT, interrupted).context("cannot catch signals")?;
    launcher.status().with_context(|| format!("cannot start `{words}`"))
}

/// Cuts and mends links at their times, until all is done or nobody waits for it any more.
fn break_links(bed: &Bed, cuts: &[Cut], end: &mpsc::Receiver<()>) {
    let start = Instant::now();
    let Some(relay) = bed.relay() else { return };
    for (at, (a, b), is_cut) in schedule(cuts) {
        let wait = at.saturating_sub(start.elapsed());
        if end.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        eprintln!("The link between hosts {a} and {b} is {}", if is_cut { "cut" } else { "mended" });
        if is_cut { relay.cut(a, b) } else { relay.heal(a, b) }
    }
}

/// When which link is cut (`true`) or mended, in order.
fn schedule(cuts: &[Cut]) -> Vec<(Duration, (usize, usize), bool)> {
    let begins = cuts.iter().map(|cut| (cut.after, cut.hosts, true));
    let ends = cuts.iter().filter_map(|cut| Some((cut.after + cut.lasts?, cut.hosts, false)));
    let mut schedule: Vec<_> = begins.chain(ends).collect();
    schedule.sort();
    schedule
}

impl FromStr for Cut {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give A-B@AFTER or A-B@AFTER+FOR, such as 0-1@2s+300ms".to_owned();
        let (hosts, times) = text.split_once('@').ok_or_else(wrong)?;
        let (a, b) = hosts.split_once('-').ok_or_else(wrong)?;
        let host = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        let (after, lasts) = match times.split_once('+') {
            Some((after, lasts)) => (after, Some(duration(lasts)?)),
            None => (times, None),
        };
        let cut = Cut { hosts: (host(a)?, host(b)?), after: duration(after)?, lasts };
        if cut.hosts.0 == cut.hosts.1 { Err(wrong()) } else { Ok(cut) }
    }
}

/// In tc's words.
fn rate(text: &str) -> Result<u64, String> {
    let units = [("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)];
    let number = number_with(text, &units).filter(|rate| *rate >= 1e3);
    number.map(|rate| rate as u64).ok_or_else(|| "give a rate, such as 1gbit, 100mbit or 512kbit".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    // "s" last: the others end with it too.
    let number = number_with(text, &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0)]);
    let hour = Duration::from_secs(3600);
    let duration =
        number.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).filter(|d| *d <= hour);
    duration.ok_or_else(|| "give a time, such as 50ms, 200us or 2s".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let share = number_with(text, &[("%", 0.01)]).filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "give a share of packets, such as 1% or 0.1%".to_owned())
}

/// A number with one of these units, in the base unit.
fn number_with(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (digits, factor) =
        units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    Some(digits.parse::<f64>().ok().filter(|number| *number >= 0.0)? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units_as_tc_has_them() {
        assert_eq!(
            (rate("1gbit"), rate("1.5mbit"), rate("64kbit")),
            (Ok(1_000_000_000), Ok(1_500_000), Ok(64_000))
        );
        assert_eq!(duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(
            (duration("200us"), duration("2s")),
            (Ok(Duration::from_micros(200)), Ok(Duration::from_secs(2)))
        );
        assert_eq!((share("1%"), share("100%")), (Ok(0.01), Ok(1.0)));
        for wrong in ["", "5", "ms", "-1ms", "NaNs", "infs", "1e9s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        assert!(
            share("101%").is_err() && share("0.5").is_err() && rate("0gbit").is_err() && rate("1").is_err()
        );
    }

    #[test]
    fn cuts_begin_and_end_in_the_order_of_time() {
        let cut = |text: &str| text.parse::<Cut>();
        let ms = Duration::from_millis;
        let cuts = [cut("0-1@2s+300ms").unwrap(), cut("1-2@100ms").unwrap()];
        let expected = [(ms(100), (1, 2), true), (ms(2000), (0, 1), true), (ms(2300), (0, 1), false)];
        assert_eq!(schedule(&cuts), expected);
        for wrong in ["", "0-1", "0@1s", "0-0@1s", "0-x@1s", "0-1@1", "0-1@1s+"] {
            assert!(cut(wrong).is_err(), "{wrong}");
        }
    }
}
