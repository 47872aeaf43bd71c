//! One stream from host to host, and messages there and back: benches/src/bin/streams.rs, started on two hosts.

use super::library::{FABRICS, Fabric, Hosts};
use super::output_of;
use crate::process::{self, cargo};
use crate::workspace;
use anyhow::{Context, Result};
use paceline_testbed::{SWITCH_ADDRESS, host_address};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// What carries a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Tcp,
    /// A program as quinn's documentation shows it.
    Quinn,
    Paceline(Fabric),
}

impl Stream {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Quinn => "plain quinn",
            Self::Paceline(fabric) => fabric.title(),
        }
    }
}

/// In the order of the table.
pub fn all() -> impl Iterator<Item = Stream> {
    [Stream::Tcp, Stream::Quinn].into_iter().chain(FABRICS.iter().map(|&fabric| Stream::Paceline(fabric)))
}

/// Streams between two hosts, and what came out so far.
pub struct Streams {
    hosts: Hosts,
    /// Gigabytes per second one way, microseconds there and back.
    pub measured: Vec<(Stream, f64, f64)>,
}

/// Builds the program.
///
/// # Errors
/// It does not compile.
pub fn build(limit: Duration) -> Result<()> {
    let package = ["--package", "paceline-benches", "--bin", "streams"];
    process::run(cargo(&[["build", "--release", "--locked"].as_slice(), &package].concat()), limit)
}

impl Streams {
    pub fn new(hosts: &Hosts) -> Self {
        Self { hosts: hosts.clone(), measured: Vec::new() }
    }

    /// Each stream once, beginning with another one in every round.
    ///
    /// # Errors
    /// One of them fails, takes too long or has wrong bytes.
    pub fn round(&mut self, round: u32, limit: Duration) -> Result<()> {
        let streams: Vec<Stream> = all().collect();
        for index in super::workload::order(round, streams.len()) {
            let stream = streams[index];
            let (speed, round_trip) = self.measure(stream, limit).with_context(|| stream.name())?;
            eprintln!("  {}: {speed:.2} GB/s one way, {round_trip:.1} µs there and back", stream.name());
            self.measured.push((stream, speed, round_trip));
        }
        Ok(())
    }

    fn measure(&self, stream: Stream, limit: Duration) -> Result<(f64, f64)> {
        let (command, _receiver) = match stream {
            Stream::Tcp => self.pair("tcp")?,
            Stream::Quinn => self.pair("quinn")?,
            Stream::Paceline(fabric) => (self.job(fabric), None),
        };
        let words = process::shown(&command);
        let (status, text) = output_of(command, limit)?;
        process::must_succeed(status, &words)?;
        let line =
            text.lines().find_map(|line| Some(&line[line.find('{')?..])).context("it printed no result")?;
        let result: Value = serde_json::from_str(line)?;
        let number = |name: &str| result[name].as_f64().with_context(|| format!("no {name} in {line}"));
        Ok((number("gigabytes_per_second")?, number("round_trip_us")?))
    }

    /// The sender on host 0, and the receiver that waits for it on host 1.
    fn pair(&self, by: &str) -> Result<(Command, Option<Receiver>)> {
        let mut receiver = self.on_host(1);
        receiver.args([by, "receive"]).stdin(Stdio::null());
        let receiver = Receiver(receiver.spawn().context("cannot start the receiver")?);
        let mut sender = self.on_host(0);
        sender.args([by, "send", &host_address(1).to_string()]);
        Ok((sender, Some(receiver)))
    }

    /// On a processor of its own, as `paceline run` does it with ranks.
    fn on_host(&self, host: usize) -> Command {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let mut command = self.hosts.bed.on_host(host, "taskset");
        command.args(["--cpu-list", &(host % processors).to_string()]).arg(program());
        command
    }

    fn job(&self, fabric: Fabric) -> Command {
        let bed = &self.hosts.bed;
        let mut command = bed.on_switch(workspace::target().join("release/paceline"));
        command.args(["run", "-n", "2", "--rdzv-endpoint", &format!("{SWITCH_ADDRESS}:0"), "--"]);
        command.args(bed.rank_words(1)).arg(program()).arg("paceline");
        command.env("PACELINE_FABRIC", fabric.variable());
        command
    }
}

fn program() -> PathBuf {
    workspace::target().join("release/streams")
}

/// Killed if its sender fails; otherwise it has ended by then.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
