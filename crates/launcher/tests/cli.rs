//! The launcher as its users meet it: the real binary, shell programs as ranks, real signals.
//!
//! Nothing here sleeps to wait for something: a test waits for a line or for an end, each with a limit.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// No test needs a tenth of this, even on two busy cores.
const LIMIT: Duration = Duration::from_secs(60);

/// How a launcher ended, and what it wrote.
struct Outcome {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: String,
    elapsed: Duration,
}

impl Outcome {
    fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("ended by a signal: {:?}", self.status))
    }

    fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text")
    }
}

/// A launcher that is running. Killed when dropped, so that a failed test leaves nothing behind.
struct Launcher {
    child: Child,
    started: Instant,
    stdout: Receiver<Vec<u8>>,
    stderr: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Launcher {
    fn start(command: &mut Command) -> Self {
        let started = Instant::now();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
        let stdout = lines_of(child.stdout.take().expect("piped"));
        let stderr = lines_of(child.stderr.take().expect("piped"));
        Launcher { child, started, stdout, stderr, seen: Vec::new() }
    }

    /// Waits for a line of stdout that contains `text` and returns it.
    fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.stdout.recv_timeout(left).unwrap_or_else(|e| {
                let seen = String::from_utf8_lossy(&self.seen);
                panic!("no {text:?} on stdout: {e}; so far: {seen:?}\n{}", processes())
            });
            self.seen.extend_from_slice(&line);
            let line = String::from_utf8_lossy(&line).into_owned();
            if line.contains(text) {
                return line.trim_end().to_owned();
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the launcher runs");
    }

    /// Waits for the launcher's end.
    fn finish(mut self) -> Outcome {
        let stderr = collect(&self.stderr);
        let mut stdout = std::mem::take(&mut self.seen);
        stdout.extend(collect(&self.stdout));
        let status = self.child.wait().expect("waited");
        let elapsed = self.started.elapsed();
        Outcome { status, stdout, stderr: String::from_utf8(stderr).expect("text"), elapsed }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(stream: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if sender.send(std::mem::take(&mut line)).is_err() {
                return;
            }
        }
    });
    lines
}

fn collect(lines: &Receiver<Vec<u8>>) -> Vec<u8> {
    let deadline = Instant::now() + LIMIT;
    let mut all = Vec::new();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => all.extend(line),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return all,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                let text = String::from_utf8_lossy(&all);
                panic!("the launcher did not end in time; so far: {text:?}\n{}", processes())
            }
        }
    }
}

/// What runs on this machine, for the message of a test that has waited in vain.
fn processes() -> String {
    let listed = Command::new("ps").args(["-eo", "pid,ppid,pgid,stat,etimes,wchan:20,args"]).output();
    listed.map_or_else(|e| format!("ps: {e}"), |out| String::from_utf8_lossy(&out.stdout).into_owned())
}

fn paceline(args: &[&str]) -> Command {
    // Who runs the tests in the background, as shells and CI do, has SIGINT and SIGQUIT ignored; so would the
    // launcher, which leaves ignored signals as they are.
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP,INT,QUIT", env!("CARGO_BIN_EXE_paceline")]);
    for name in [
        "PACELINE_PORT",
        "PACELINE_INTERFACE",
        "PACELINE_INSECURE",
        "PACELINE_FABRIC",
        "PACELINE_JOB_SECRET_FILE",
        "PACELINE_LOG",
        "OMP_NUM_THREADS",
        "NO_COLOR",
        "PACELINE_CONSOLE",
    ] {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// `paceline run` with these flags and a shell program as ranks.
fn run_shell(flags: &[&str], program: &str) -> Command {
    let mut command = paceline(&["run"]);
    command.args(flags).args(["--", "sh", "-c", program]);
    command
}

fn outcome(command: &mut Command) -> Outcome {
    Launcher::start(command).finish()
}

/// The lines, sorted: which rank comes first is not defined.
fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

/// Waits until there is no such process; a zombie counts as none.
fn wait_until_gone(pid: i32) {
    let deadline = Instant::now() + LIMIT;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        thread::yield_now();
    }
}

fn is_alive(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = status.rsplit(") ").next().and_then(|rest| rest.chars().next());
    test_kill_process(Pid::from_raw(pid).expect("a pid")).is_ok() && !matches!(state, None | Some('Z' | 'X'))
}

fn assert_refused(command: &mut Command, code: i32, line: &str) {
    let found = outcome(command);
    assert_eq!((found.code(), found.stderr.as_str()), (code, format!("paceline: {line}\n").as_str()));
    assert_eq!(found.stdout(), "");
}

// What is refused

#[test]
fn bad_flags_are_refused_in_one_line() {
    let help = "see paceline run --help";
    let ranks = "for '--nproc-per-node <N|auto|cpu|gpu>': give a number of ranks from 1 on, such as 4, or auto, cpu or gpu";
    let endpoint =
        "for '--rdzv-endpoint <HOST:PORT>': give HOST:PORT, such as 127.0.0.1:29400 or [::1]:29400";
    let no_program = "no program to run; put it after the flags: paceline run -n 4 -- program args";
    for (args, line) in [
        (&[][..], "nothing to do; say for instance: paceline run -n 4 -- program args"),
        (&["ruin"], "unrecognized subcommand 'ruin'"),
        (&["run"], no_program),
        (&["run", "-n", "4", "--"], no_program),
        (&["run", "--", ""], no_program),
        (&["run", "-n", "0", "--", "true"], &format!("invalid value '0' {ranks}")),
        (&["run", "-n", "abc", "--", "true"], &format!("invalid value 'abc' {ranks}")),
        (&["run", "-n", "-1", "--", "true"], &format!("unknown flag -1; {help}")),
        (&["run", "-n"], "a value is required for '--nproc-per-node <N|auto|cpu|gpu>' but none was supplied"),
        (&["run", "--hosts", "4", "--", "true"], &format!("unknown flag --hosts; {help}")),
        (&["run", "--grade", "4", "--", "true"], "unknown flag --grade; did you mean --grace?"),
        (
            &["run", "--secret-file", "f", "--", "true"],
            "unknown flag --secret-file; did you mean --job-secret?",
        ),
        (
            &["run", "--rdzv-endpoint", "nonsense:", "--", "true"],
            &format!("invalid value 'nonsense:' {endpoint}"),
        ),
        (
            &["run", "--rdzv-endpoint", "host:99999", "true"],
            &format!("invalid value 'host:99999' {endpoint}"),
        ),
        (
            &["run", "--grace", "soon", "true"],
            "invalid value 'soon' for '--grace <SECONDS>': give a number of seconds, such as 20 or 0.5",
        ),
    ] {
        assert_refused(&mut paceline(args), 2, line);
    }
}

#[test]
fn a_job_of_several_nodes_needs_a_secret_that_others_cannot_read() {
    let several = ["run", "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "127.0.0.1:1", "--"];
    let refused = |variable: &str, line: &str| {
        let mut command = paceline(&several);
        assert_refused(command.arg("true").env("PACELINE_JOB_SECRET_FILE", variable), 2, line);
    };
    refused(
        "",
        "a job of several nodes needs a job secret: openssl rand -hex 32 > FILE; chmod 600 FILE; and on every node \
         --job-secret FILE or PACELINE_JOB_SECRET_FILE",
    );
    refused("/no/such/file", "the job secret /no/such/file: No such file or directory (os error 2)");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("secret");
    let path = path.to_str().expect("text");
    std::fs::write(path, "0123456789abcdef").expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o604)).expect("set");
    let line = format!(
        "the job secret {path}: all users of this machine can read it; chmod 600 {path}, or defaultMode: 0440 of \
         the volume"
    );
    refused(path, &line);
    std::fs::write(path, "0123456789abcde\n").expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("set");
    let why = "it has 15 bytes and needs 16 at least; make one with openssl rand -hex 32";
    refused(path, &format!("the job secret {path}: {why}"));
}

#[test]
fn an_interface_that_this_machine_does_not_have_is_refused_with_those_that_it_has() {
    let refused = |command: &mut Command| {
        let found = outcome(command);
        assert_eq!((found.code(), found.stdout()), (2, ""), "{}", found.stderr);
        let line = found.stderr.strip_prefix("paceline: the interface ").expect("the launcher says it");
        assert!(
            line.starts_with("`none7,203.0.113.0/24` fits none of this host's addresses, which are "),
            "{line}"
        );
        assert!(line.contains("127.0.0.1 (lo)") && line.lines().count() == 1, "{line}");
    };
    refused(&mut paceline(&["run", "-n", "2", "--interface", "none7,203.0.113.0/24", "--", "true"]));
    refused(paceline(&["run", "--", "true"]).env("PACELINE_INTERFACE", "none7,203.0.113.0/24"));
    let line = "PACELINE_INTERFACE: it names no interface, network or address; leave it unset for none";
    assert_refused(paceline(&["run", "--", "true"]).env("PACELINE_INTERFACE", ""), 2, line);
}

#[test]
fn a_bad_port_in_the_environment_is_refused() {
    let line = "PACELINE_PORT is \"many\"; set it to a port, such as 29400, or unset it";
    assert_refused(paceline(&["run", "--", "true"]).env("PACELINE_PORT", "many"), 2, line);
}

#[test]
fn an_endpoint_that_cannot_be_used_is_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("bound").to_string();
    let in_use = "the port is in use; choose another one with --rdzv-endpoint";
    let line = format!("the rendezvous cannot listen on {address}: {in_use}");
    assert_refused(&mut paceline(&["run", "--rdzv-endpoint", &address, "--", "true"]), 2, &line);
    let port = address.rsplit(':').next().expect("a port");
    assert_refused(paceline(&["run", "--", "true"]).env("PACELINE_PORT", port), 2, &line);

    // TEST-NET-1: nobody has it.
    let line = "the rendezvous cannot listen on 192.0.2.1:29400: this machine does not have that address";
    assert_refused(&mut paceline(&["run", "--rdzv-endpoint", "192.0.2.1:29400", "--", "true"]), 2, line);
}

#[test]
fn a_program_that_does_not_exist_is_127() {
    for name in ["no-such-program", "./no/such/program"] {
        let line = format!("{name}: no such program; give a path, or a name that PATH leads to");
        assert_refused(&mut paceline(&["run", "-n", "2", "--", name]), 127, &line);
    }
}

#[test]
fn a_program_that_cannot_be_executed_is_126() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = |name: &str, text: &str, mode| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("set");
        path.to_str().expect("text").to_owned()
    };
    let (data, lost) = (file("data", "", 0o644), file("lost", "#!/no/such/interpreter\n", 0o755));
    let directory = dir.path().to_str().expect("text");
    for (program, why) in [
        (data.as_str(), format!("try chmod +x {data}")),
        (directory, "it is a directory".to_owned()),
        (&lost, "its interpreter does not exist".to_owned()),
    ] {
        let line = format!("{program} cannot be executed: {why}");
        assert_refused(&mut paceline(&["run", "-n", "2", "--", program]), 126, &line);
    }
}

#[test]
fn more_ranks_than_open_files_allow_are_refused_before_the_first_starts() {
    let binary = env!("CARGO_BIN_EXE_paceline");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -n 64; exec {binary} run -n 100 -- echo started")]);
    let line = "100 ranks need 232 open files and the limit is 64; raise it with ulimit -n 232";
    assert_refused(&mut command, 2, line);
}

#[test]
fn help_and_version_go_to_stdout() {
    let version = outcome(&mut paceline(&["--version"]));
    assert_eq!(
        (version.code(), version.stdout()),
        (0, concat!("paceline ", env!("CARGO_PKG_VERSION"), "\n"))
    );
    let help = outcome(&mut paceline(&["run", "--help"]));
    assert_eq!((help.code(), help.stderr.as_str()), (0, ""));
    assert!(help.stdout().contains("--rdzv-endpoint <HOST:PORT>"), "{}", help.stdout());
}

// What a rank finds

#[test]
fn a_rank_finds_its_place_in_the_environment() {
    let program = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $PACELINE_RANK $PACELINE_WORLD_SIZE \
                   $OMP_NUM_THREADS ${PACELINE_CONSOLE-none}";
    let found = outcome(&mut run_shell(&["-n", "2"], program));
    assert_eq!((found.code(), found.stderr.as_str()), (0, ""));
    assert_eq!(sorted(found.stdout()), ["[0]: 0 2 0 2 0 2 1 none", "[1]: 1 2 1 2 1 2 1 none"]);
}

#[test]
fn a_rank_has_no_standard_input_and_the_rest_of_the_environment() {
    let mut command = run_shell(&["-n", "1"], "cat; echo $0 $OMP_NUM_THREADS $OTHER; pwd");
    let found = outcome(command.arg("argument").env("OTHER", "kept").current_dir("/"));
    assert_eq!(found.stdout(), "[0]: argument kept\n[0]: /\n");
}

// What a rank writes

#[test]
fn each_line_goes_to_its_own_stream_with_its_rank() {
    let found = outcome(&mut run_shell(&["-n", "2"], "echo out; echo err >&2; printf 'no end'"));
    assert_eq!(sorted(found.stdout()), ["[0]: no end", "[0]: out", "[1]: no end", "[1]: out"]);
    assert_eq!(sorted(&found.stderr), ["[0]: err", "[1]: err"]);
}

#[test]
fn lines_of_many_ranks_are_never_mixed() {
    const LINES: usize = 5000;
    // Both streams into one pipe, which is where two writers would be seen.
    let (read, write) = std::io::pipe().expect("a pipe");
    let program = format!(
        "i=0; while [ $i -lt {LINES} ]; do echo \"$RANK-$i-$RANK-$i-$RANK-$i\"; \
         [ $((i % 7)) = 0 ] && echo \"e$RANK-$i\" >&2; i=$((i+1)); done; true"
    );
    let mut command = run_shell(&["-n", "4"], &program);
    command.stdout(write.try_clone().expect("cloned")).stderr(write);
    let mut child = command.spawn().expect("started");
    drop(command);
    let all = collect(&lines_of(read));
    assert!(child.wait().expect("waited").success());
    let all = String::from_utf8(all).expect("text");
    let (mut next_out, mut next_err) = ([0; 4], [0; 4]);
    for line in all.lines() {
        let rank: usize = line[1..2].parse().expect(line);
        let text = &line["[0]: ".len()..];
        if text.starts_with('e') {
            assert_eq!(text, format!("e{rank}-{}", next_err[rank]));
            next_err[rank] += 7;
        } else {
            let once = format!("{rank}-{}", next_out[rank]);
            assert_eq!(text, format!("{once}-{once}-{once}"));
            next_out[rank] += 1;
        }
    }
    assert_eq!(next_out, [LINES; 4]);
}

#[test]
fn bytes_that_are_not_text_pass_through() {
    let found = outcome(&mut run_shell(&[], r"printf '\377\000\376\n\200'"));
    assert_eq!(found.stdout, b"[0]: \xff\x00\xfe\n[0]: \x80\n");
}

#[test]
fn a_progress_bar_leaves_one_line_where_there_is_no_terminal() {
    let found = outcome(&mut run_shell(&[], r"printf ' 1%%\r 2%%\r 3%%\n' >&2; printf 'dos\r\n' >&2"));
    assert_eq!(found.stderr, "[0]:  3%\n[0]: dos\n");
}

/// Prints the most memory that the launcher has had, on stderr.
const PRINT_PEAK_KIB: &str = r"sed -n 's/^VmHWM:[^0-9]*\([0-9]*\) kB/peak \1 KiB/p' /proc/$PPID/status >&2";

fn assert_took_little_memory(stderr: &str) {
    let number = stderr.split_once("peak ").and_then(|(_, rest)| rest.split_once(" KiB"));
    let (peak_kib, _) = number.unwrap_or_else(|| panic!("no peak in {stderr}"));
    assert!(peak_kib.parse::<u64>().expect("a number") < 32 * 1024, "the launcher took {peak_kib} KiB");
}

#[test]
fn a_line_without_end_costs_no_memory() {
    let program = format!("head -c 200000000 /dev/zero | tr '\\0' x; {PRINT_PEAK_KIB}");
    let found = outcome(&mut run_shell(&[], &program));
    let letters = found.stdout.iter().filter(|&&byte| byte == b'x').count();
    assert_eq!(letters, 200_000_000);
    assert_took_little_memory(&found.stderr);
}

#[test]
fn a_reader_that_goes_away_does_not_end_the_job() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("done");
    let program = format!("seq 100000; touch {}", file.display());
    let mut command = run_shell(&[], &program);
    let (read, write) = std::io::pipe().expect("a pipe");
    drop(read);
    let mut child = command.stdout(write).stderr(Stdio::null()).spawn().expect("started");
    assert!(child.wait().expect("waited").success());
    assert!(file.exists());
}

#[test]
fn a_reader_that_stops_reading_does_not_stop_the_supervision() {
    let (read, write) = std::io::pipe().expect("a pipe");
    // Rank 1 writes as fast as it can for the second that rank 0 takes to fail.
    let program = format!("[ $RANK = 0 ] && {{ sleep 1; {PRINT_PEAK_KIB}; exit 3; }}; exec yes $(seq 1000)");
    let mut command = run_shell(&["-n", "2", "--grace", "1"], &program);
    let mut child = command.stdout(write).stderr(Stdio::piped()).spawn().expect("started");
    drop(command);
    let stderr = collect(&lines_of(child.stderr.take().expect("piped")));
    assert_eq!(child.wait().expect("waited").code(), Some(3));
    let stderr = String::from_utf8(stderr).expect("text");
    assert!(stderr.starts_with("paceline: rank 0 "), "{stderr}");
    assert!(stderr.contains("paceline: nobody reads the output; its last "), "{stderr}");
    assert_took_little_memory(&stderr);
    drop(read);
}

#[test]
fn a_process_left_behind_with_the_pipe_does_not_hang_the_launcher() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("pid");
    // setsid: out of reach of the launcher's signals.
    let program = format!("setsid sleep 1000 & echo $! > {}; echo done", file.display());
    let found = outcome(&mut run_shell(&[], &program));
    let pid: i32 = std::fs::read_to_string(&file).expect("written").trim().parse().expect("a pid");
    assert_eq!((found.code(), found.stdout()), (0, "[0]: done\n"));
    assert!(found.elapsed < Duration::from_secs(20), "took {:?}", found.elapsed);
    let _ = kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL);
}

#[test]
fn what_a_rank_leaves_in_its_group_is_killed() {
    let mut launcher = Launcher::start(&mut run_shell(&[], "sleep 1000 & echo left $!"));
    let line = launcher.wait_for("left");
    let pid: i32 = line.rsplit(' ').next().expect("a pid").parse().expect("a pid");
    assert_eq!(launcher.finish().code(), 0);
    wait_until_gone(pid);
}

#[test]
fn the_last_lines_of_a_start_script_with_tee_are_not_lost() {
    let program = "(sleep 0.2; echo late) & echo early";
    assert_eq!(outcome(&mut run_shell(&[], program)).stdout(), "[0]: early\n[0]: late\n");
}

// How a job ends

#[test]
fn the_first_failure_is_the_exit_code_and_the_report() {
    let program = "echo evidence $RANK >&2; [ $RANK = 1 ] && exit 3; sleep 1000";
    let found = outcome(&mut run_shell(&["-n", "3"], program));
    assert_eq!(found.code(), 3);
    let report = found.stderr.split_once("paceline: ").expect("a report").1;
    let (first, rest) = report.split_once('\n').expect("lines");
    assert!(first.starts_with("rank 1 (pid "), "{first}");
    assert!(
        first.contains(") exited with code 3 after ") && first.ends_with(" s; the job has ended"),
        "{first}"
    );
    assert_eq!(
        rest,
        "  the last lines that rank 1 wrote to stderr:\n    evidence 1\n  \
         rank 0 was ended by paceline (SIGTERM)\n  rank 2 was ended by paceline (SIGTERM)\n"
    );
    assert!(found.elapsed >= Duration::from_secs(2), "the others had {:?}", found.elapsed);
}

#[test]
fn a_rank_that_is_killed_is_128_plus_the_signal() {
    let found = outcome(&mut run_shell(&["-n", "2"], "[ $RANK = 0 ] && kill -9 $$; exit 0"));
    assert_eq!(found.code(), 137);
    assert!(found.stderr.contains("was killed by signal 9 (SIGKILL) after"), "{}", found.stderr);
    assert!(found.stderr.contains("look for the out-of-memory killer"), "{}", found.stderr);
    assert!(found.stderr.ends_with("  rank 1 exited with code 0\n"), "{}", found.stderr);
}

#[test]
fn others_that_end_by_themselves_are_not_waited_for() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // Rank 1 notices that rank 0 is dead once the launcher has reaped it.
    let program = format!(
        "cd {} && [ $RANK = 0 ] && echo $$ >new && mv new pid && exit 7; \
         until [ -f pid ]; do :; done; while kill -0 $(cat pid) 2>/dev/null; do :; done; exit 1",
        dir.path().display()
    );
    let found = outcome(&mut run_shell(&["-n", "2"], &program));
    assert_eq!(found.code(), 7, "{}", found.stderr);
    assert!(found.stderr.contains("\n  rank 1 exited with code 1\n"), "{}", found.stderr);
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed_after_the_grace() {
    let program = "trap '' TERM; [ $RANK = 0 ] && exit 3; while :; do sleep 1000; done";
    let found = outcome(&mut run_shell(&["-n", "2", "--grace", "1"], program));
    assert_eq!(found.code(), 3);
    assert!(found.stderr.contains("rank 1 was ended by paceline (SIGKILL)"), "{}", found.stderr);
    assert!(found.elapsed >= Duration::from_secs(3), "the other one had {:?}", found.elapsed);
}

/// A program that says when it is ready, and exits with 0 when it gets the signal. `wait` lets the trap run at once.
fn traps(signal: &str) -> String {
    format!("trap 'echo got {signal}; exit 0' {signal}; echo ready; sleep 1000 & wait")
}

#[test]
fn signals_are_passed_on_and_are_the_exit_code() {
    let cases = [
        ("TERM", Signal::TERM, 143),
        ("INT", Signal::INT, 130),
        ("HUP", Signal::HUP, 129),
        ("QUIT", Signal::QUIT, 131),
    ];
    for (name, signal, code) in cases {
        let mut launcher = Launcher::start(&mut run_shell(&["-n", "2"], &traps(name)));
        launcher.wait_for("ready");
        launcher.wait_for("ready");
        launcher.signal(signal);
        let found = launcher.finish();
        assert_eq!(found.code(), code, "{name}");
        let got = format!("got {name}");
        assert_eq!(found.stdout().matches(&got).count(), 2, "{}", found.stdout());
        assert_eq!(found.stderr, format!("paceline: stopped by signal {} (SIG{name})\n", signal.as_raw()));
    }
}

#[test]
fn a_signal_that_is_ignored_is_followed_by_sigkill() {
    let program = "trap '' TERM; echo ready; while :; do sleep 1000; done";
    let mut launcher = Launcher::start(&mut run_shell(&["--grace", "0.5"], program));
    launcher.wait_for("ready");
    launcher.signal(Signal::TERM);
    let found = launcher.finish();
    assert_eq!(found.code(), 143);
    assert!(found.stderr.ends_with("  rank 0 was ended by paceline (SIGKILL)\n"), "{}", found.stderr);
}

#[test]
fn a_second_sigint_kills_at_once() {
    // `wait` lets the trap run at once. A `sleep` in the foreground holds it back if the signal finds the shell's
    // child before it has become `sleep`.
    let program = "trap 'echo got INT' INT; trap '' TERM; echo ready; while :; do sleep 1000 & wait; done";
    let mut launcher = Launcher::start(&mut run_shell(&["--grace", "1000"], program));
    launcher.wait_for("ready");
    launcher.signal(Signal::INT);
    launcher.wait_for("got INT");
    // The launcher takes two signals within 300 ms for one request.
    thread::sleep(Duration::from_millis(400));
    launcher.signal(Signal::INT);
    assert_eq!(launcher.finish().code(), 130);
}

#[test]
fn nohup_is_respected() {
    let mut command = Command::new("nohup");
    command.args([env!("CARGO_BIN_EXE_paceline"), "run", "--", "sh", "-c", &traps("TERM")]);
    let mut launcher = Launcher::start(command.stdin(Stdio::null()));
    launcher.wait_for("ready");
    launcher.signal(Signal::HUP);
    launcher.signal(Signal::TERM);
    let found = launcher.finish();
    assert_eq!(found.code(), 143, "the hang-up was ignored");
}

#[test]
fn no_rank_survives_a_launcher_that_is_killed() {
    let mut launcher = Launcher::start(&mut run_shell(&["-n", "3"], "echo pid $$; exec sleep 1000"));
    let pids: Vec<i32> = (0..3)
        .map(|_| launcher.wait_for("pid").rsplit(' ').next().expect("a pid").parse().expect("a pid"))
        .collect();
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    launcher.signal(Signal::KILL);
    let status = launcher.child.wait().expect("waited");
    assert_eq!(status.signal(), Some(9));
    pids.into_iter().for_each(wait_until_gone);
}

#[test]
fn as_pid_1_the_launcher_reaps_orphans() {
    let unshare = |program: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--"]).args(program);
        command
    };
    if !unshare(&["true"]).output().is_ok_and(|output| output.status.success()) {
        #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
        {
            eprintln!("skipped: needs the right to make a PID namespace");
        }
        return;
    }
    // Orphans that end at once; the rank then waits until no zombie is left, for 10 s at most.
    let program = "echo launcher $PPID; for i in 1 2 3 4; do (setsid sh -c 'exit 0' &); done; i=0; \
                   while grep -qs '^State:.Z' /proc/[0-9]*/status; do \
                   i=$((i+1)); [ $i = 100 ] && exit 9; sleep 0.1; done";
    let found = outcome(&mut unshare(&[env!("CARGO_BIN_EXE_paceline"), "run", "--", "sh", "-c", program]));
    assert_eq!((found.code(), found.stdout()), (0, "[0]: launcher 1\n"));
}

#[test]
fn the_launcher_logs_its_phases_when_asked() {
    let found = outcome(run_shell(&["-n", "2"], "true").env("PACELINE_LOG", "info"));
    for phase in ["starting ranks=2", "all ranks started", "rank ended", "job ended exit_code=0"] {
        assert!(found.stderr.contains(phase), "no {phase:?} in {}", found.stderr);
    }
}

// On a terminal

/// Everything a launcher writes to a terminal of its own.
fn on_a_terminal(command: &mut Command) -> String {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&master).expect("granted");
    unlockpt(&master).expect("unlocked");
    let name = ptsname(&master, Vec::new()).expect("named");
    let terminal =
        File::options().read(true).write(true).open(Path::new(name.to_str().expect("text"))).expect("open");
    let terminal: OwnedFd = terminal.into();
    let child = command.stdout(terminal.try_clone().expect("cloned")).stderr(terminal);
    let mut child = child.spawn().expect("started");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut all = Vec::new();
    // The read fails with EIO when the last one has closed the terminal.
    let lines = lines_of(File::from(master));
    while let Ok(line) = lines.recv_timeout(LIMIT) {
        all.extend(line);
    }
    assert!(child.wait().expect("waited").success());
    // The terminal itself turns every end of line into two characters.
    String::from_utf8(all).expect("text").replace("\r\n", "\n")
}

#[test]
fn on_a_terminal_ranks_have_colours_and_know_it() {
    let text = on_a_terminal(&mut run_shell(&[], "echo $PACELINE_CONSOLE"));
    assert_eq!(text, "\x1b[36m[0]: \x1b[0mterminal\n");
    let text = on_a_terminal(run_shell(&[], "echo $PACELINE_CONSOLE").env("NO_COLOR", "1"));
    assert_eq!(text, "[0]: terminal\n");
}

#[test]
fn on_a_terminal_a_progress_bar_is_redrawn_in_place() {
    let program = r"printf ' 10%%\r'; sleep 0.3; printf ' 20%%\r'; sleep 0.3; printf 'end\n'; echo next";
    let text = on_a_terminal(run_shell(&[], program).env("NO_COLOR", "1"));
    let draw = |text| format!("\r\x1b[K\x1b[?7l[0]: {text}\x1b[0m\x1b[?7h");
    let expected = [&draw(" 10%"), &draw(" 20%"), "\r\x1b[K[0]: end\n", "[0]: next\n"].concat();
    assert_eq!(text, expected);
}
