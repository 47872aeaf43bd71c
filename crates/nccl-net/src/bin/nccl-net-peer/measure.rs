//! Both ends on this machine, over the links alone and over the plugin in turn.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use paceline_transport::identity::JobAuthority;

use crate::Failed;
use crate::options::{Options, Through};

/// How long the certificates of a measurement are valid.
const LIFE: Duration = Duration::from_secs(24 * 3600);

/// Measures, and prints a line for each round and one for each way at the end.
pub fn run(options: &Options) -> Result<(), Failed> {
    let folder = std::env::temp_dir().join(format!("nccl-net-peer-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let measured = rounds(options, &folder);
    std::fs::remove_dir_all(&folder)?;
    measured
}

fn rounds(options: &Options, folder: &std::path::Path) -> Result<(), Failed> {
    let authority = JobAuthority::new("measure")?;
    let mut identities = Vec::new();
    for member in ["receiver", "sender"] {
        let path = folder.join(member);
        std::fs::write(&path, authority.issue(member, LIFE)?.to_pem())?;
        identities.push(path);
    }
    let mut runs: Vec<Vec<Run>> = Through::ALL.map(|_| Vec::new()).into();
    for round in 0..options.rounds {
        for at in 0..runs.len() {
            // Who comes first changes from round to round.
            let at = (at + round) % runs.len();
            let through = Through::ALL[at];
            let run = once(&Options { through, ..options.clone() }, &identities)?;
            println!("round {round}: {}", run.in_words(through));
            runs[at].push(run);
        }
    }
    let medians: Vec<Run> = runs.iter().map(|runs| Run::median(runs)).collect();
    for (through, run) in Through::ALL.into_iter().zip(&medians) {
        let share = run.rate / medians[0].rate * 100.0;
        println!("median : {}; {share:.0} % of the links alone", run.in_words(through));
    }
    Ok(())
}

/// What a run, or the median of some, has given.
#[derive(Clone, Copy)]
struct Run {
    /// GB/s, as the receiver sees it.
    rate: f64,
    /// Seconds of a processor for a GB, of the threads that send and receive. They do not sleep while they wait.
    sending: f64,
    receiving: f64,
}

impl Run {
    fn median(of: &[Self]) -> Self {
        let of = |value: fn(&Self) -> f64| median(of.iter().map(value).collect());
        Self { rate: of(|run| run.rate), sending: of(|run| run.sending), receiving: of(|run| run.receiving) }
    }

    fn in_words(self, through: Through) -> String {
        let Self { rate, sending, receiving } = self;
        let name = through.name();
        format!("{name:<5} {rate:.3} GB/s, CPU s/GB: {sending:.3} to send, {receiving:.3} to receive")
    }
}

/// One run in two processes.
fn once(options: &Options, identities: &[std::path::PathBuf]) -> Result<Run, Failed> {
    let start = |role: &str, identity: &std::path::Path| {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(role).args(options.to_words()).env("PACELINE_IDENTITY", identity);
        if std::env::var_os("PACELINE_INTERFACE").is_none() {
            command.env("PACELINE_INTERFACE", "127.0.0.1");
        }
        Ok::<Child, Failed>(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
    };
    let mut receiver = start("receive", &identities[0])?;
    let mut sender = start("send", &identities[1])?;
    let mut from_receiver = BufReader::new(receiver.stdout.take().ok_or("no pipe")?);
    let mut to_sender = sender.stdin.take().ok_or("no pipe")?;
    for _ in 0..options.connections {
        to_sender.write_all(line(&mut from_receiver)?.as_bytes())?;
    }
    drop(to_sender);
    let mut from_sender = BufReader::new(sender.stdout.take().ok_or("no pipe")?);
    let received = done(&mut from_receiver)?;
    let sent = done(&mut from_sender)?;
    if ![receiver.wait()?, sender.wait()?].iter().all(std::process::ExitStatus::success) {
        return Err("an end has failed".into());
    }
    let [bytes, seconds, receiving] = received;
    let gigabytes = bytes / 1e9;
    Ok(Run { rate: gigabytes / seconds, sending: sent[2] / gigabytes, receiving: receiving / gigabytes })
}

/// What an end says when it is done: bytes, seconds, seconds of a processor.
fn done(from: &mut BufReader<ChildStdout>) -> Result<[f64; 3], Failed> {
    let (connected, done) = (line(from)?, line(from)?);
    let words: Vec<&str> = done.split_whitespace().collect();
    match words[..] {
        ["done", bytes, seconds, processor] => Ok([bytes.parse()?, seconds.parse()?, processor.parse()?]),
        _ => Err(format!("{connected}{done}").into()),
    }
}

fn line(from: &mut BufReader<ChildStdout>) -> Result<String, Failed> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    if line.is_empty() { Err("an end has ended early".into()) } else { Ok(line) }
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    let middle = rates.len() / 2;
    if rates.len() % 2 == 1 { rates[middle] } else { (rates[middle - 1] + rates[middle]) / 2.0 }
}
