//! The built library, opened and driven by two processes as NCCL drives it.
//!
//! What this proves: the tables, the life of connections, data of every byte, faults and refusals. What it does not:
//! anything about NCCL itself, which needs a GPU.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use paceline_transport::identity::JobAuthority;
use tempfile::TempDir;

/// For whatever must happen.
const PATIENCE: Duration = Duration::from_secs(150);

/// Between two looks whether a process has ended.
const POLL: Duration = Duration::from_millis(10);

/// NCCL's codes.
const SYSTEM_ERROR: &str = "failed 2 ";
const REMOTE_ERROR: &str = "failed 6 ";

/// Certificates of one job, in files.
struct Job {
    authority: JobAuthority,
    folder: TempDir,
}

/// One of the two processes.
struct End {
    child: Process,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    log: thread::JoinHandle<String>,
}

/// Does not outlive a test that fails.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Fail when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Job {
    fn new() -> Self {
        let authority = JobAuthority::new("job").expect("a name");
        Self { authority, folder: tempfile::tempdir().expect("a folder") }
    }

    fn identity(&self, member: &str) -> PathBuf {
        let path = self.folder.path().join(member);
        let identity = self.authority.issue(member, Duration::from_secs(3600)).expect("a name");
        std::fs::write(&path, identity.to_pem()).expect("written");
        path
    }
}

/// The library that cargo has built for this test.
fn library() -> PathBuf {
    let deps = std::env::current_exe().expect("a path");
    deps.with_file_name("libnccl_net_paceline.so")
}

fn start(role: &str, identity: Option<&Path>, options: &str, variables: &[(&str, &str)]) -> End {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nccl-net-peer"));
    // The last of two counts.
    command.arg(role).arg("--plugin").arg(library()).args(options.split_whitespace());
    for variable in ["PACELINE_IDENTITY", "PACELINE_INSECURE", "PACELINE_FABRIC"] {
        command.env_remove(variable);
    }
    command.env("PACELINE_INTERFACE", "127.0.0.1").envs(variables.iter().copied());
    if let Some(identity) = identity {
        command.env("PACELINE_IDENTITY", identity);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program was built for this test");
    let (sender, lines) = channel();
    let output = BufReader::new(child.stdout.take().expect("a pipe"));
    thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let mut errors = child.stderr.take().expect("a pipe");
    let log = thread::spawn(move || {
        let mut log = String::new();
        errors.read_to_string(&mut log).expect("text");
        log
    });
    End { input: child.stdin.take(), child: Process(child), lines, log }
}

impl End {
    fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("a line in time")
    }

    fn wait_for(&self, expected: &str) {
        let line = self.line();
        assert!(line.starts_with(expected), "{line:?} is not {expected:?}");
    }

    /// Hands on the handles of so many connections.
    fn connect(&self, sender: &mut End, connections: usize) {
        let mut input = sender.input.take().expect("not used yet");
        for _ in 0..connections {
            writeln!(input, "{}", self.line()).expect("it reads");
        }
    }

    fn kill(mut self) {
        self.child.0.kill().expect("it runs");
        self.child.0.wait().expect("it was killed");
    }

    /// Its end, and all that it logged.
    fn end(mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        // Not on another thread: that would keep a process alive which does not end.
        let status = loop {
            match self.child.0.try_wait().expect("a status") {
                Some(status) => break status,
                None => assert!(start.elapsed() < PATIENCE, "process {} does not end", self.child.0.id()),
            }
            thread::sleep(POLL);
        };
        (status, self.log.join().expect("no panic"))
    }

    fn succeeds(self) {
        let (status, log) = self.end();
        assert!(status.success(), "{status}: {log}");
    }
}

fn moves(options: &str, connections: usize, variables: &[(&str, &str)]) {
    let job = Job::new();
    let receiver = start("receive", Some(&job.identity("worker-0")), options, variables);
    let mut sender = start("send", Some(&job.identity("worker-1")), options, variables);
    receiver.connect(&mut sender, connections);
    for end in [&receiver, &sender] {
        end.wait_for("connected");
        end.wait_for("done");
    }
    receiver.succeeds();
    sender.succeeds();
}

#[test]
fn every_byte_arrives_through_both_tables_over_every_fabric() {
    for through in ["v8", "v11"] {
        for fabric in ["tls", "quic"] {
            let options = format!("--through {through} --bytes 16000000 --connections 2");
            moves(&options, 2, &[("PACELINE_FABRIC", fabric)]);
        }
    }
    let open = [("PACELINE_FABRIC", "tcp"), ("PACELINE_INSECURE", "1")];
    moves("--through v11 --bytes 16000000 --connections 1", 1, &open);
}

#[test]
fn a_program_that_links_the_plugin_is_its_own() {
    for through in ["v8", "v11"] {
        let options = format!("--plugin STATIC_PLUGIN --through {through} --bytes 1000000 --connections 1");
        moves(&options, 1, &[]);
    }
}

#[test]
fn grouped_receives_of_odd_sizes_take_messages_by_their_tags() {
    for through in ["v8", "v11"] {
        let options = format!(
            "--through {through} --bytes 8000000 --message 70001 --group 8 --connections 3 --in-flight 4"
        );
        moves(&options, 3, &[]);
    }
}

#[test]
fn many_small_messages_arrive_in_order() {
    moves("--bytes 400000 --message 8 --in-flight 31 --connections 1", 1, &[]);
    moves("--bytes 80000 --message 8 --in-flight 31 --connections 1", 1, &[("PACELINE_FABRIC", "quic")]);
}

#[test]
fn a_killed_sender_is_a_remote_error_at_the_receiver_and_the_reverse() {
    // Over QUIC a process that was killed is only silent, which takes 10 s to be sure of.
    for (fabric, stalls) in [("tls", "send"), ("tls", "receive"), ("quic", "send")] {
        let job = Job::new();
        let endless = "--bytes 1000000000000 --message 100000 --connections 2";
        let stalling = format!("{endless} --stall-after 20");
        let of = |role| if role == stalls { stalling.as_str() } else { endless };
        let variables = [("PACELINE_FABRIC", fabric)];
        let receiver = start("receive", Some(&job.identity("worker-0")), of("receive"), &variables);
        let mut sender = start("send", Some(&job.identity("worker-1")), of("send"), &variables);
        receiver.connect(&mut sender, 2);
        let (killed, left) = if stalls == "send" { (sender, receiver) } else { (receiver, sender) };
        killed.wait_for("connected");
        killed.wait_for("stalled");
        killed.kill();
        left.wait_for("connected");
        left.wait_for(REMOTE_ERROR);
        let (status, log) = left.end();
        assert!(!status.success());
        let told = log.lines().filter(|line| line.contains("WARN") && line.contains("worker-")).count();
        assert!((1..=2).contains(&told), "a line for a connection, once: {log}");
    }
}

#[test]
fn a_stranger_is_refused_with_the_reason_and_the_listener_goes_on() {
    for fabric in ["tls", "quic"] {
        let (job, other) = (Job::new(), Job::new());
        let options = "--bytes 100000 --message 1000 --connections 1";
        let variables = [("PACELINE_FABRIC", fabric)];
        let receiver = start("receive", Some(&job.identity("worker-0")), options, &variables);
        let handle = receiver.line();
        let mut stranger = start("send", Some(&other.identity("worker-1")), options, &variables);
        writeln!(stranger.input.take().expect("not used yet"), "{handle}").expect("it reads");
        stranger.wait_for(REMOTE_ERROR);
        let (_, log) = stranger.end();
        assert!(log.contains("cannot connect to worker-0") && log.contains("not of"), "{log}");
        let mut sender = start("send", Some(&job.identity("worker-1")), options, &variables);
        writeln!(sender.input.take().expect("not used yet"), "{handle}").expect("it reads");
        for end in [&receiver, &sender] {
            end.wait_for("connected");
            end.wait_for("done");
        }
        receiver.succeeds();
        sender.succeeds();
    }
}

#[test]
fn without_credentials_it_refuses_in_one_line_unless_that_is_allowed() {
    let options = "--bytes 100000 --message 1000 --connections 1";
    let refused = start("receive", None, options, &[]);
    refused.wait_for(SYSTEM_ERROR);
    let (_, log) = refused.end();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.starts_with("WARN NET/Paceline : init: no credentials"), "{log}");
    let allowed = [("PACELINE_INSECURE", "1")];
    let receiver = start("receive", None, options, &allowed);
    let mut sender = start("send", None, options, &allowed);
    receiver.connect(&mut sender, 1);
    for end in [&receiver, &sender] {
        end.wait_for("connected");
        end.wait_for("done");
    }
    receiver.succeeds();
    let (status, log) = sender.end();
    assert!(status.success() && log.contains("anybody who reaches these hosts can take part"), "{log}");
}

#[test]
fn ranks_of_different_fabrics_are_told_so() {
    let job = Job::new();
    let options = "--bytes 100000 --message 1000 --connections 1";
    let receiver = start("receive", Some(&job.identity("worker-0")), options, &[("PACELINE_FABRIC", "quic")]);
    let mut sender = start("send", Some(&job.identity("worker-1")), options, &[("PACELINE_FABRIC", "tls")]);
    receiver.connect(&mut sender, 1);
    sender.wait_for("failed 5 connect");
    let (_, log) = sender.end();
    assert!(log.contains("worker-0 is reached over quic and this rank has tls"), "{log}");
    receiver.kill();
}

#[test]
fn wrong_calls_and_bad_handles_are_refused_and_nothing_crashes() {
    let job = Job::new();
    for through in ["v8", "v11"] {
        let end = start("abuse", Some(&job.identity("worker-0")), &format!("--through {through}"), &[]);
        end.wait_for("refused");
        end.succeeds();
    }
}

#[test]
fn a_c_program_finds_the_interface_of_nccls_headers() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("probe");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/probe/probe.c");
    let mut compiler = Command::new("cc");
    let compiled = compiler.args(["-Wall", "-Werror", "-o"]).arg(&program).arg(source).arg("-ldl").output();
    let compiled = compiled.expect("a C compiler named cc");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let mut probe = Command::new(program);
    probe.arg(library()).env("PACELINE_INTERFACE", "127.0.0.1").env("PACELINE_INSECURE", "1");
    probe.env_remove("PACELINE_IDENTITY").env_remove("PACELINE_FABRIC");
    let output = probe.output().expect("it was compiled just now");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{text}");
    let is_log = |line: &&str| line.starts_with("log ");
    let (logged, told): (Vec<&str>, Vec<&str>) = text.lines().partition(is_log);
    // A warning that it goes without credentials, what it is, and three calls that are refused.
    assert!(logged[0].starts_with("log 2 17 paceline:0 NET/Paceline : PACELINE_INSECURE=1"), "{text}");
    assert!(logged[1].contains("release ") && logged.iter().all(|line| !line.contains("%s")), "{text}");
    let expected = [
        "init8 0",
        "init11 0",
        "devices 0 1",
        "properties8 0 lo 1 1 8 0",
        "properties11 0 lo 1 1 8 0 1 0 1073741824 1073741824 1",
        "iflush 0 1",
        "regMr 0",
        "regMrDmaBuf 5",
        "none 1 1",
        "finalize 0 0",
        "nulls 4 4 4",
        "closed 0",
    ];
    assert_eq!(told, expected, "{text}");
}
