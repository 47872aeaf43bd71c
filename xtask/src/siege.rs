//! `cargo xtask siege`: what a job still does while its ports are attacked.
//!
//! Two ranks on two hosts (network namespaces) sum without a pause, a third host attacks. Each round has three times of the
//! same length, in another order each: nobody attacks; the attack goes to sockets that are nobody's, on the hosts of the
//! job; it goes to the job's own ports. What the second and the third have in common is what the load itself costs
//! the machine, attacker included. Every element of every result is compared. benches/src/bin/attack.rs is the ranks, the
//! attacker and the sockets that are nobody's.

use crate::peers::machine::{self, Machine};
use crate::peers::summary;
use crate::process::{self, cargo};
use crate::step::{Budget, Report};
use crate::workspace;
use anyhow::{Context, Result, bail};
use clap::Args;
use paceline_testbed::{Bed, Plan, SWITCH_ADDRESS, host_address};
use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What must be left of the throughput.
const GOAL: f64 = 0.9;

/// The host that attacks; the ranks have the first two.
const ATTACKER: usize = 2;
const RANKS: usize = 2;

/// Where the ranks meet.
const RENDEZVOUS_PORT: u16 = 29_400;

/// Between the beginning of an attack and that of the measurement, for it to reach its full strength; and after its end.
const SETTLE: Duration = Duration::from_millis(500);

/// How long a job, an attacker or a socket may take to come up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Of what the launcher says, kept for the case that it fails.
const LINES_KEPT: usize = 20;

#[derive(Args)]
pub struct Options {
    /// How often each attack is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long each of a round's three measurements takes, in seconds
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// What the attacker may send, headers included, in Mbit/s
    #[arg(long, default_value_t = 100.0)]
    megabits: f64,
    /// What the ranks sum, in bytes of f32
    #[arg(long, default_value_t = 4 << 20)]
    bytes: usize,
    /// Only attacks whose description in the table contains this
    #[arg(long)]
    only: Option<String>,
}

/// What somebody sends, and over what.
struct Attack {
    /// The attacker's word for it.
    kind: &'static str,
    shown: &'static str,
    over: Protocol,
}

impl Attack {
    fn is_asked(&self, options: &Options) -> bool {
        options.only.as_ref().is_none_or(|only| self.shown.contains(only.as_str()))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Udp,
    Tcp,
}

const ATTACKS: [Attack; 5] = [
    Attack { kind: "garbage-udp", shown: "random datagrams of 1 to 1472 bytes", over: Protocol::Udp },
    Attack { kind: "short-udp", shown: "random datagrams of 64 bytes", over: Protocol::Udp },
    Attack { kind: "initials", shown: "first datagrams of QUIC handshakes", over: Protocol::Udp },
    Attack { kind: "garbage-tcp", shown: "connections with 16 KiB of garbage", over: Protocol::Tcp },
    Attack { kind: "hellos", shown: "connections with a TLS client's first message", over: Protocol::Tcp },
];

/// What links carry the data; UDP is open with the first alone.
const FABRICS: [&str; 2] = ["quic", "tls"];

/// Where an attack goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aim {
    Nowhere,
    Elsewhere,
    Job,
}

/// One attack on one kind of links: throughputs in bytes per second, by round, and what the attacker said at last.
struct Measured {
    fabric: &'static str,
    attack: &'static Attack,
    nowhere: Vec<f64>,
    elsewhere: Vec<f64>,
    job: Vec<f64>,
    sent: String,
}

/// Measures and prints the table.
///
/// # Errors
/// There can be no hosts here, something does not compile, a result is wrong, or the job fails. A goal that is missed is
/// no error: the table says it.
pub fn run(options: &Options) -> Result<()> {
    if let Some(reason) = paceline_testbed::missing() {
        bail!("{reason}");
    }
    if !ATTACKS.iter().any(|attack| attack.is_asked(options)) {
        bail!(
            "--only: no attack's description contains that; they are: {}",
            ATTACKS.each_ref().map(|a| a.shown).join(", ")
        );
    }
    let mut report = Report::new("siege");
    let outcome = steps(options, &mut report);
    let text = report.close(outcome)?;
    println!("\n{text}");
    Ok(())
}

fn steps(options: &Options, report: &mut Report) -> Result<String> {
    report.step("siege: build", Budget::minutes(8.0), |limit| {
        let release = ["build", "--release", "--locked", "--package"];
        process::run(cargo(&[release.as_slice(), &["paceline"]].concat()), limit)?;
        process::run(cargo(&[release.as_slice(), &["paceline-benches", "--bin", "attack"]].concat()), limit)
    })?;
    let before = Machine::look();
    let mut measured = Vec::new();
    for fabric in FABRICS {
        report.step(&format!("siege: links over {fabric}"), Budget::minutes(5.0), |_| {
            let bed = Bed::build(&Plan::clean(ATTACKER + 1, 1500))?;
            besiege(options, &bed, fabric, &mut measured)
        })?;
    }
    let command = format!(
        "cargo xtask siege --rounds {} --seconds {} --megabits {} --bytes {}",
        options.rounds, options.seconds, options.megabits, options.bytes
    );
    let conditions = machine::conditions(&before, &command, options.rounds, &[]);
    Ok(format!("{conditions}\n{}", table(&measured)))
}

/// Runs a job and all attacks on it.
fn besiege(options: &Options, bed: &Bed, fabric: &'static str, measured: &mut Vec<Measured>) -> Result<()> {
    // One attacker would run out of ports before the system gives those of ended connections back.
    let range = "echo 1024 65535 > /proc/sys/net/ipv4/ip_local_port_range";
    process::must_succeed(bed.on_host(ATTACKER, "sh").args(["-c", range]).status()?, range)?;
    let job = Job::start(options, bed, fabric)?;
    let ports = |protocol| -> Result<Vec<String>> {
        let mut all = Vec::new();
        for (place, address) in places() {
            all.extend(listening(bed, place, protocol)?.into_iter().map(|port| format!("{address}:{port}")));
        }
        Ok(all)
    };
    let (udp, tcp) = (ports(Protocol::Udp)?, ports(Protocol::Tcp)?);
    let ignorers = places().into_iter().map(|(place, _)| Ignorer::start(bed, place));
    let ignorers = ignorers.collect::<Result<Vec<_>>>()?;
    for attack in ATTACKS.iter().filter(|attack| attack.is_asked(options)) {
        let targets = if attack.over == Protocol::Udp { &udp } else { &tcp };
        if targets.is_empty() {
            continue;
        }
        // As many sockets on the same hosts.
        let nobodys: Vec<String> =
            targets.iter().map(|target| ignorers_of(target, &ignorers, attack.over)).collect();
        let mut rounds = Measured::new(fabric, attack);
        for round in 0..options.rounds {
            for aim in in_turn(round) {
                let to = match aim {
                    Aim::Nowhere => None,
                    Aim::Elsewhere => Some(&nobodys),
                    Aim::Job => Some(targets),
                };
                let speed = job.speed_under(options, bed, attack, to, &mut rounds.sent)?;
                rounds.of(aim).push(speed);
            }
        }
        eprintln!("  {}", rounds.row().join(", "));
        measured.push(rounds);
    }
    job.end()
}

/// The three measurements of a round, beginning with another one each time.
fn in_turn(round: u32) -> [Aim; 3] {
    let mut aims = [Aim::Nowhere, Aim::Elsewhere, Aim::Job];
    aims.rotate_left(round as usize % 3);
    aims
}

/// Where the job's processes are: host or, at the end, switch; with the address.
fn places() -> [(Option<usize>, Ipv4Addr); RANKS + 1] {
    [(Some(0), host_address(0)), (Some(1), host_address(1)), (None, SWITCH_ADDRESS)]
}

fn at(bed: &Bed, place: Option<usize>, program: impl AsRef<std::ffi::OsStr>) -> Command {
    match place {
        Some(host) => bed.on_host(host, program),
        None => bed.on_switch(program),
    }
}

/// The ports that are open in a namespace.
fn listening(bed: &Bed, place: Option<usize>, protocol: Protocol) -> Result<Vec<u16>> {
    let (file, state) = match protocol {
        Protocol::Udp => ("/proc/net/udp", "07"),
        Protocol::Tcp => ("/proc/net/tcp", "0A"),
    };
    let output = at(bed, place, "cat").arg(file).output().context("cannot look for ports")?;
    Ok(ports_in(&String::from_utf8_lossy(&output.stdout), state))
}

/// The ports of the rows in that state: `sl local_address rem_address st …`, the address as `IP:PORT` in hexadecimal digits.
fn ports_in(table: &str, state: &str) -> Vec<u16> {
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let open = rows.filter(|columns| columns.get(3) == Some(&state));
    open.filter_map(|columns| u16::from_str_radix(columns[1].rsplit_once(':')?.1, 16).ok()).collect()
}

/// The socket that is nobody's on the host of `target`.
fn ignorers_of(target: &str, ignorers: &[Ignorer], over: Protocol) -> String {
    let (address, _) = target.rsplit_once(':').expect("address and port");
    let place =
        places().iter().position(|(_, known)| known.to_string() == address).expect("one of the job's");
    let port = if over == Protocol::Udp { ignorers[place].udp } else { ignorers[place].tcp };
    format!("{address}:{port}")
}

/// A program that is killed when it is not needed any more.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program and gives back its standard output line by line.
fn spawn(mut command: Command) -> Result<(Killed, BufReader<ChildStdout>)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let words = process::shown(&command);
    let mut child = command.spawn().with_context(|| format!("cannot start `{words}`"))?;
    let output = child.stdout.take().context("its output is piped")?;
    Ok((Killed(child), BufReader::new(output)))
}

fn next_line(output: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    output.read_line(&mut line).context("cannot read what it says")?;
    Ok(line.trim().to_owned())
}

/// Sockets that are nobody's.
struct Ignorer {
    udp: u16,
    tcp: u16,
    _process: Killed,
}

impl Ignorer {
    fn start(bed: &Bed, place: Option<usize>) -> Result<Self> {
        let mut command = at(bed, place, program());
        command.arg("ignore");
        let (process, mut output) = spawn(command)?;
        let line = next_line(&mut output)?;
        let ports: Vec<u16> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        let &[udp, tcp] = ports.as_slice() else { bail!("no two ports in {line:?}") };
        Ok(Self { udp, tcp, _process: process })
    }
}

/// A job that sums, and how far it was when.
struct Job {
    launcher: Killed,
    said: Arc<Mutex<Said>>,
    stop: PathBuf,
    bytes: usize,
}

/// What the launcher has printed.
#[derive(Default)]
struct Said {
    /// Microseconds since 1970, and operations until then.
    samples: Vec<(u128, u64)>,
    /// The last lines about anything else.
    lines: VecDeque<String>,
}

impl Job {
    fn start(options: &Options, bed: &Bed, fabric: &str) -> Result<Self> {
        let stop = workspace::target().join(format!("siege-{}-{fabric}", std::process::id()));
        let mut command = bed.on_switch(workspace::target().join("release/paceline"));
        command.args(["run", "-n", &RANKS.to_string(), "--fabric", fabric]);
        command.args(["--rdzv-endpoint", &format!("{SWITCH_ADDRESS}:{RENDEZVOUS_PORT}"), "--"]);
        command.args(bed.rank_words(1)).arg(program());
        command.args(["rank", &options.bytes.to_string()]).arg(&stop).stderr(Stdio::piped());
        let (mut launcher, output) = spawn(command)?;
        let said: Arc<Mutex<Said>> = Arc::default();
        let errors = launcher.0.stderr.take().context("its errors are piped")?;
        for stream in [Box::new(output) as Box<dyn Read + Send>, Box::new(errors)] {
            let said = said.clone();
            thread::spawn(move || {
                BufReader::new(stream).lines().map_while(Result::ok).for_each(|l| hear(&said, l))
            });
        }
        let job = Self { launcher, said, stop, bytes: options.bytes };
        let deadline = Instant::now() + PATIENCE;
        while job.said().samples.is_empty() {
            if Instant::now() > deadline {
                bail!("the job makes no operation:\n{}", job.last_lines());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(job)
    }

    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_lines(&self) -> String {
        self.said().lines.iter().cloned().collect::<Vec<_>>().join("\n")
    }

    /// The throughput while `attack` goes to the ports `to`, or to none; in bytes of a result per second. Puts what the
    /// attacker says at its end into `sent`, if it goes to the job.
    fn speed_under(
        &self,
        options: &Options,
        bed: &Bed,
        attack: &Attack,
        to: Option<&Vec<String>>,
        sent: &mut String,
    ) -> Result<f64> {
        let window = Duration::from_secs_f64(options.seconds);
        let attacker = match to {
            None => None,
            Some(to) => {
                let seconds = (SETTLE + window + SETTLE / 5).as_secs_f64();
                let mut command = bed.on_host(ATTACKER, program());
                command
                    .args(["send", attack.kind, &options.megabits.to_string(), &seconds.to_string()])
                    .args(to);
                let (attacker, mut output) = spawn(command)?;
                // It makes its messages first.
                if next_line(&mut output)? != "ready" {
                    bail!("the attacker does not attack");
                }
                Some((attacker, output))
            }
        };
        thread::sleep(SETTLE);
        let start_us = now_us();
        thread::sleep(window);
        let speed = speed(&self.said().samples, start_us, now_us()).map(|rate| rate * self.bytes as f64);
        if let Some((mut attacker, mut output)) = attacker {
            *sent = next_line(&mut output)?;
            process::must_succeed(attacker.0.wait().context("cannot wait for the attacker")?, "attack send")?;
            thread::sleep(SETTLE);
        }
        speed.with_context(|| format!("the job makes no operation:\n{}", self.last_lines()))
    }

    /// Ends the job, whose results must all have been right.
    fn end(mut self) -> Result<()> {
        fs::write(&self.stop, "").context("cannot tell the job to end")?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.launcher.0.try_wait().context("cannot wait for the job")? {
                Some(status) => break status,
                None if Instant::now() > deadline => bail!("the job does not end:\n{}", self.last_lines()),
                None => thread::sleep(Duration::from_millis(20)),
            }
        };
        let _ = fs::remove_file(&self.stop);
        process::must_succeed(status, "paceline run").with_context(|| self.last_lines())
    }
}

/// Takes a line of the launcher: `[0]: done TIME OPERATIONS` from rank 0, or anything else.
fn hear(said: &Mutex<Said>, line: String) {
    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
    match sample_in(&line) {
        Some(sample) => said.samples.push(sample),
        None => {
            said.lines.push_back(line);
            let extra = said.lines.len().saturating_sub(LINES_KEPT);
            said.lines.drain(..extra);
        }
    }
}

fn sample_in(line: &str) -> Option<(u128, u64)> {
    let (_, words) = line.split_once("done ")?;
    let (time, operations) = words.split_once(' ')?;
    Some((time.parse().ok()?, operations.parse().ok()?))
}

/// Operations per second between the first and the last sample of a time.
fn speed(samples: &[(u128, u64)], from_us: u128, to_us: u128) -> Option<f64> {
    let mut within = samples.iter().filter(|(at, _)| (from_us..=to_us).contains(at));
    let first = within.next()?;
    let last = within.next_back()?;
    let (seconds, operations) = ((last.0 - first.0) as f64 / 1e6, last.1.checked_sub(first.1)?);
    (seconds > 0.0).then(|| operations as f64 / seconds)
}

impl Measured {
    fn new(fabric: &'static str, attack: &'static Attack) -> Self {
        let (nowhere, elsewhere, job, sent) = Default::default();
        Self { fabric, attack, nowhere, elsewhere, job, sent }
    }

    fn of(&mut self, aim: Aim) -> &mut Vec<f64> {
        match aim {
            Aim::Nowhere => &mut self.nowhere,
            Aim::Elsewhere => &mut self.elsewhere,
            Aim::Job => &mut self.job,
        }
    }

    /// What is left of the throughput, from the medians of the rounds, and the least and the most of a round.
    fn left(&self) -> Option<[f64; 3]> {
        let ratios = || self.job.iter().zip(&self.elsewhere).map(|(job, elsewhere)| job / elsewhere);
        let median = summary::median(&self.job)? / summary::median(&self.elsewhere)?;
        Some([median, ratios().reduce(f64::min)?, ratios().reduce(f64::max)?])
    }

    fn row(&self) -> Vec<String> {
        let gigabytes =
            |speeds: &[f64]| summary::median(speeds).map_or("-".to_owned(), |s| format!("{:.3}", s / 1e9));
        let mut row = vec![self.fabric.to_owned(), self.attack.shown.to_owned()];
        row.extend([&self.nowhere, &self.elsewhere, &self.job].map(|speeds| gigabytes(speeds)));
        let (left, verdict) = match self.left() {
            Some([median, least, most]) => (
                format!("{:.0} % ({:.0}-{:.0})", median * 100.0, least * 100.0, most * 100.0),
                if median >= GOAL { "met" } else { "missed" },
            ),
            None => ("-".to_owned(), "-"),
        };
        row.extend([left, verdict.to_owned(), self.sent.trim_start_matches("sent ").to_owned()]);
        row
    }
}

fn table(measured: &[Measured]) -> String {
    let goal = format!("≥ {:.0} %", GOAL * 100.0);
    let head = [
        "links",
        "attack",
        "GB/s, no load",
        "load elsewhere",
        "attacked",
        "left (rounds)",
        &goal,
        "what was sent",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(measured.iter().map(Measured::row));
    summary::aligned(&rows)
}

fn program() -> PathBuf {
    workspace::target().join("release/attack")
}

fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_found_by_their_state() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n\
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n\
                     1: 00000000:72D8 00000000:0000 0A 00000000:00000000\n\
                     2: 0100007F:1F90 0100007F:C350 01 00000000:00000000\n";
        assert_eq!(ports_in(table, "0A"), [8080, 29_400]);
        assert_eq!(ports_in(table, "07"), [0; 0]);
    }

    #[test]
    fn a_speed_is_that_between_the_samples_of_its_time() {
        assert_eq!(sample_in("[0]: done 1000000 7"), Some((1_000_000, 7)));
        assert_eq!(sample_in("[1]: done"), None);
        let samples = [(0, 0), (1_000_000, 10), (1_500_000, 20), (3_000_000, 30), (9_000_000, 31)];
        assert_eq!(speed(&samples, 500_000, 4_000_000), Some(10.0));
        assert_eq!(speed(&samples, 500_000, 1_200_000), None, "one sample is none");
    }

    #[test]
    fn what_is_left_is_the_ratio_of_the_medians() {
        let mut rounds = Measured::new("quic", &ATTACKS[0]);
        for (elsewhere, job) in [(1e9, 9.5e8), (2e9, 1.0e9), (1e9, 1.1e9)] {
            rounds.of(Aim::Elsewhere).push(elsewhere);
            rounds.of(Aim::Job).push(job);
        }
        assert_eq!(rounds.row()[5..7], ["100 % (50-110)", "met"]);
        for (round, first) in [Aim::Nowhere, Aim::Elsewhere, Aim::Job, Aim::Nowhere].into_iter().enumerate() {
            assert_eq!(in_turn(round as u32)[0], first);
        }
    }
}
