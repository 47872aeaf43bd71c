//! Probes and numbers of `paceline run --health-addr`, asked over HTTP while jobs run.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").to_string()
}

/// A launcher that is killed at the end of its test.
struct Launcher(Child);

impl Launcher {
    fn start(flags: &[&str], program: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
        command.arg("run").args(flags).args(["--", "sh", "-c", program]).env_remove("PACELINE_HEALTH_ADDR");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().expect("the launcher starts"))
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The answer to a request as it is written; `None` if nobody listens.
fn ask_in_words(address: &str, request: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(LIMIT)).expect("set");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

fn ask(address: &str, path: &str) -> Option<String> {
    ask_in_words(address, &format!("GET {path} HTTP/1.1\r\nHost: pod\r\n\r\n"))
}

/// Asks until the answer begins with the status and contains the words.
fn wait_for(address: &str, path: &str, status: u16, words: &str) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = ask(address, path);
        if let Some(answer) = answer
            .as_ref()
            .filter(|answer| answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(words))
        {
            return answer.clone();
        }
        assert!(Instant::now() < deadline, "{path}: {answer:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_launcher_is_ready_while_its_ranks_run_and_counts_their_failures() {
    let folder = tempfile::tempdir().expect("a folder");
    let (address, fail) = (free_address(), folder.path().join("fail"));
    let program = format!(
        "[ $TORCHELASTIC_RESTART_COUNT = 1 ] && exec sleep 1000; while [ ! -e {} ]; do sleep 0.02; done; exit 3",
        fail.display()
    );
    let flags = ["-n", "2", "--bind", "none", "--max-restarts", "4", "--health-addr", &address];
    let _launcher = Launcher::start(&flags, &program);
    wait_for(&address, "/readyz", 200, "ok");
    wait_for(&address, "/healthz", 200, "ok");
    wait_for(&address, "/startupz", 200, "ok");
    wait_for(&address, "/nonsense", 404, "/metrics");
    wait_for(&address, "/metrics", 200, "\npaceline_launcher_ranks_running 2\n");
    fs::write(fail, "").expect("written");
    let numbers = wait_for(&address, "/metrics", 200, "\npaceline_launcher_generation 1\n");
    assert!(numbers.contains("\npaceline_launcher_restarts_left 3\n"), "{numbers}");
    assert!(!numbers.contains("\npaceline_launcher_rank_failures_total 0\n"), "{numbers}");
}

#[test]
fn a_launcher_that_waits_for_others_is_alive_and_not_ready() {
    let (address, endpoint) = (free_address(), free_address());
    let flags = ["--nnodes", "2", "--node-rank", "0", "--insecure", "--rdzv-endpoint", &endpoint];
    let _launcher = Launcher::start(&[&flags[..], &["--health-addr", &address]].concat(), "true");
    wait_for(&address, "/readyz", 503, "waiting for other machines");
    wait_for(&address, "/healthz", 200, "ok");
}

#[test]
fn those_who_ask_badly_or_hold_connections_keep_nobody_from_an_answer() {
    let address = free_address();
    let _launcher = Launcher::start(&["--health-addr", &address], "exec sleep 1000");
    wait_for(&address, "/readyz", 200, "ok");
    // Of these each would wait for the other side.
    let silent: Vec<TcpStream> =
        (0..100).map(|_| TcpStream::connect(&address).expect("it listens")).collect();
    for request in
        ["\r\n\r\nnonsense", "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n"]
    {
        let _ = ask_in_words(&address, request);
    }
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
    let answer = ask_in_words(&address, &long);
    assert!(answer.is_none_or(|answer| !answer.starts_with("HTTP/1.1 2")), "no such path");
    wait_for(&address, "/healthz", 200, "ok");
    drop(silent);
}

#[test]
fn an_address_that_is_taken_or_none_is_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound").to_string();
    for (address, expected) in [(address.as_str(), "cannot listen on"), ("9400", "invalid value '9400'")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
        let output = command.args(["run", "--health-addr", address, "--", "true"]).output().expect("it ran");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.lines().count() == 1 && said.contains(expected), "{said}");
    }
}
