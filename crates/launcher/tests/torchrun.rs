//! `paceline run` in torchrun's place: its environment, its files, its restarts, with shell programs as ranks.
//!
//! That torchrun itself does the same is shown by `side_by_side.rs`, which needs PyTorch.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// No test needs a tenth of this, even on two busy cores.
const LIMIT: Duration = Duration::from_secs(60);

/// A launcher that is killed when it takes too long, and with it its ranks.
fn paceline(flags: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", &LIMIT.as_secs().to_string(), "env", "--default-signal=HUP,INT,QUIT"]);
    command.arg(env!("CARGO_BIN_EXE_paceline")).arg("run").args(flags);
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["PACELINE_", "PET_", "TORCH"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command.env_remove("OMP_NUM_THREADS").env_remove("PYTHON_EXEC").env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

fn shell(flags: &[&str], program: &str) -> Command {
    paceline(&[flags, &["--", "sh", "-c", program]].concat())
}

fn output(command: &mut Command) -> Output {
    command.output().expect("the launcher ran")
}

fn started(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the launcher starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

/// What is told when a test finds something else.
fn told(output: &Output) -> String {
    format!("{:?}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr))
}

fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", told(output));
}

/// The lines of stdout, sorted, without the ranks in front.
fn lines(output: &Output) -> Vec<String> {
    let bare = |line: &str| line.split_once("]: ").map_or(line, |(_, rest)| rest).to_owned();
    let mut lines: Vec<String> = text(&output.stdout).lines().map(bare).collect();
    lines.sort();
    lines
}

/// Waits until the file has that many lines.
fn wait_for_lines(file: &Path, count: usize) -> Vec<String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        if lines.len() >= count && text.ends_with('\n') {
            return lines;
        }
        assert!(Instant::now() < deadline, "{} has {lines:?}", file.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().expect("text").to_owned()
    }

    fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).expect("written");
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).expect("changed");
        self.name(name)
    }
}

fn free_endpoint() -> String {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").to_string()
}

/// Flags for one of two launchers on this machine.
fn of_two<'a>(endpoint: &'a str, secret: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let common =
        ["--nnodes", "2", "-n", "1", "--bind", "none", "--rdzv-endpoint", endpoint, "--job-secret", secret];
    [&common[..], more].concat()
}

// What a worker gets

#[test]
fn workers_get_the_environment_that_torchrun_gives() {
    let folder = Folder::new();
    let program = format!("env > {}.$RANK", folder.name("env"));
    let flags = [
        "-n",
        "2",
        "--role",
        "trainer",
        "--rdzv-id",
        "job-7",
        "--max-restarts",
        "3",
        "--master-port",
        "4711",
    ];
    assert_code(&output(&mut shell(&flags, &program)), 0);
    for rank in ["0", "1"] {
        let text = fs::read_to_string(folder.path(&format!("env.{rank}"))).expect("written");
        let found: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
        for (name, value) in [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_RANK", "0"),
            ("GROUP_WORLD_SIZE", "1"),
            ("ROLE_RANK", rank),
            ("ROLE_WORLD_SIZE", "2"),
            ("ROLE_NAME", "trainer"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "4711"),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
            ("TORCHELASTIC_MAX_RESTARTS", "3"),
            ("TORCHELASTIC_RUN_ID", "job-7"),
            ("TORCHELASTIC_USE_AGENT_STORE", "False"),
            ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            ("OMP_NUM_THREADS", "1"),
        ] {
            assert_eq!(found.get(name), Some(&value), "{name} of rank {rank}");
        }
        let file = found["TORCHELASTIC_ERROR_FILE"];
        assert!(file.ends_with(&format!("/attempt_0/{rank}/error.json")), "{file}");
        assert!(!Path::new(file).parent().expect("a folder").exists(), "it goes with the job");
    }
}

#[test]
fn each_rank_sees_one_gpu_if_asked_for() {
    let mut command = shell(&["-n", "2", "--virtual-local-rank"], "echo $LOCAL_RANK $CUDA_VISIBLE_DEVICES");
    let found = output(command.env("CUDA_VISIBLE_DEVICES", "4,6"));
    assert_eq!(lines(&found), ["0 4", "0 6"], "{}", told(&found));
}

// What is run

#[test]
fn a_script_runs_under_python_without_buffering_and_what_follows_dashes_is_executed() {
    let folder = Folder::new();
    let script = folder.write(
        "script.py",
        "import os, sys\nprint(sys.argv[1:], sys.stdout.line_buffering or sys.stdout.write_through)\n",
    );
    let found = output(&mut paceline(&["-n", "2", &script, "-x", "${local_rank}", "--", "y"]));
    let expected = [0, 1].map(|rank| format!("['-x', '{rank}', '--', 'y'] True"));
    assert_eq!(lines(&found), expected, "{}", told(&found));
    let found = output(&mut paceline(&["--", "echo", "${local_rank}"]));
    assert_eq!(lines(&found), ["${local_rank}"]);
    let found = output(&mut paceline(&["--no-python", "echo", "a", "${local_rank}"]));
    assert_eq!(lines(&found), ["a 0"]);
}

#[test]
fn a_module_runs_under_the_interpreter_that_was_chosen() {
    let folder = Folder::new();
    let interpreter = folder.write("python", "#!/bin/sh\necho \"$@\"\n");
    fs::set_permissions(&interpreter, fs::Permissions::from_mode(0o700)).expect("changed");
    let found = output(paceline(&["-m", "pkg.train", "--lr", "1"]).env("PYTHON_EXEC", &interpreter));
    assert_eq!(lines(&found), ["-u -m pkg.train --lr 1"], "{}", told(&found));
}

#[test]
fn a_script_that_is_not_there_is_one_line() {
    let found = output(&mut paceline(&["-n", "2", "no-such-script.py"]));
    assert_code(&found, 127);
    let expected = "paceline: no-such-script.py: no such file for Python to run; write -- in front of what is no script: \
                    paceline run -- no-such-script.py\n";
    assert_eq!(text(&found.stderr), expected);
}

#[test]
fn variables_of_torchrun_count_where_no_flag_is_given() {
    let mut command = shell(&["--role", "flag"], "echo $ROLE_NAME $WORLD_SIZE $TORCHELASTIC_RUN_ID");
    command.env("PET_ROLE", "variable").env("PET_NPROC_PER_NODE", "2").env("PET_RDZV_ID", "id");
    let found = output(&mut command);
    assert_eq!(lines(&found), ["flag 2 id", "flag 2 id"], "{}", told(&found));
}

// Restarts

/// A program that writes down each start as `<generation> <rank> <MASTER_PORT>`, waits until all ranks of the
/// generation have done so, and then does something.
fn noting(file: &str, then: &str) -> String {
    format!(
        "echo $TORCHELASTIC_RESTART_COUNT $RANK $MASTER_PORT >> {file}\n\
         while [ $(grep -c \"^$TORCHELASTIC_RESTART_COUNT \" {file}) -lt $WORLD_SIZE ]; do sleep 0.02; done\n{then}"
    )
}

/// The port of each generation; all ranks of one have the same.
fn ports(notes: &[String]) -> BTreeMap<String, String> {
    let mut ports = BTreeMap::new();
    for note in notes {
        let words: Vec<&str> = note.split(' ').collect();
        let port = ports.entry(words[0].to_owned()).or_insert_with(|| words[2].to_owned());
        assert_eq!(port, words[2], "{notes:?}");
    }
    ports
}

fn assert_new_port_each(notes: &[String], generations: usize) {
    let ports = ports(notes);
    assert_eq!(ports.len(), generations, "{notes:?}");
    let different: std::collections::BTreeSet<&String> = ports.values().collect();
    assert_eq!(different.len(), generations, "{notes:?}");
}

#[test]
fn after_a_failure_all_ranks_start_again_with_another_port() {
    let folder = Folder::new();
    // Rank 1 fails twice; the others would run for ever in those generations.
    let then =
        "if [ $TORCHELASTIC_RESTART_COUNT = 2 ]; then exit 0; fi\n[ $RANK = 1 ] && exit 7\nexec sleep 1000";
    let program = noting(&folder.name("notes"), then);
    let found = output(&mut shell(&["-n", "3", "--max-restarts", "2"], &program));
    assert_code(&found, 0);
    let notes = wait_for_lines(&folder.path("notes"), 9);
    assert_eq!(notes.len(), 9, "{notes:?}");
    assert_new_port_each(&notes, 3);
    let stderr = text(&found.stderr);
    for number in [1, 2] {
        let line = format!("; the job starts again ({number} of 2)");
        assert!(
            stderr.lines().any(|found| found.contains(" exited with code 7 ") && found.ends_with(&line)),
            "{stderr}"
        );
    }
}

#[test]
fn when_the_restarts_are_used_up_the_job_ends_with_the_ranks_code() {
    let folder = Folder::new();
    let program = noting(&folder.name("notes"), "kill -9 $$");
    let found = output(&mut shell(&["--max-restarts", "1"], &program));
    assert_code(&found, 137);
    assert_new_port_each(&wait_for_lines(&folder.path("notes"), 2), 2);
    assert!(text(&found.stderr).contains("; the job has ended"), "{}", told(&found));
    let found = output(&mut shell(&["--exit-code", "torchrun"], "exit 7"));
    assert_code(&found, 1);
}

#[test]
fn a_launcher_that_was_told_to_stop_does_not_start_again() {
    let folder = Folder::new();
    let mut child =
        started(&mut shell(&["--max-restarts", "5"], &noting(&folder.name("notes"), "exec sleep 1000")));
    wait_for_lines(&folder.path("notes"), 1);
    // `timeout` and `env` have become the launcher, or pass it on.
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    child.wait().expect("it ends");
    assert_eq!(wait_for_lines(&folder.path("notes"), 1).len(), 1);
}

#[test]
fn a_failure_on_one_of_two_launchers_starts_the_ranks_of_both_again() {
    let folder = Folder::new();
    let (endpoint, secret) = (free_endpoint(), folder.write("secret", "b1946ac92492d2347c6235b4d2611184"));
    // The first generation ends by SIGKILL on node 1, the second by an exit code on node 0.
    let then = "case $TORCHELASTIC_RESTART_COUNT$RANK in 01) kill -9 $$;; 10) exit 3;; 2?) exit 0;; esac\nexec sleep 1000";
    let program = noting(&folder.name("notes"), then);
    let both = ["0", "1"].map(|node| {
        let flags = of_two(&endpoint, &secret, &["--node-rank", node, "--max-restarts", "3"]);
        started(&mut shell(&flags, &program))
    });
    for (node, child) in both.into_iter().enumerate() {
        let found = child.wait_with_output().expect("it ends");
        assert_code(&found, 0);
        let stderr = text(&found.stderr);
        let [first, second] = match node {
            0 => ["rank 1 on node 1 was killed by signal 9 (SIGKILL); the job", "exited with code 3 after"],
            _ => ["was killed by signal 9 (SIGKILL) after", "rank 0 on node 0 exited with code 3; the job"],
        };
        assert!(stderr.contains(first) && stderr.contains(second), "node {node}: {stderr}");
        assert!(
            stderr.contains("starts again (1 of 3)") && stderr.contains("starts again (2 of 3)"),
            "{stderr}"
        );
    }
    let notes = wait_for_lines(&folder.path("notes"), 6);
    assert_eq!(notes.len(), 6, "{notes:?}");
    assert_new_port_each(&notes, 3);
}

#[test]
fn a_node_whose_ranks_have_finished_takes_part_in_a_restart() {
    let folder = Folder::new();
    let (endpoint, secret) = (free_endpoint(), folder.write("secret", "b1946ac92492d2347c6235b4d2611184"));
    // Rank 0 fails when rank 1 has exited with 0.
    let done = folder.name("done");
    let then = format!(
        "[ $RANK = 1 ] && {{ touch {done}; exit 0; }}\n[ $TORCHELASTIC_RESTART_COUNT = 1 ] && exit 0\n\
         while [ ! -e {done} ]; do sleep 0.02; done\nexit 4"
    );
    let program = noting(&folder.name("notes"), &then);
    let both = ["0", "1"].map(|node| {
        let flags = of_two(&endpoint, &secret, &["--node-rank", node, "--max-restarts", "1"]);
        started(&mut shell(&flags, &program))
    });
    for child in both {
        assert_code(&child.wait_with_output().expect("it ends"), 0);
    }
    assert_new_port_each(&wait_for_lines(&folder.path("notes"), 4), 2);
}

/// One of two launchers gets the signal while the ranks run, and another one comes in its place. Returns what the one that
/// stays said. Node 1 relies on what launcher 0 was told of restarts.
fn with_a_successor(node: usize, signal: Signal) -> String {
    let folder = Folder::new();
    let (endpoint, secret) = (free_endpoint(), folder.write("secret", "b1946ac92492d2347c6235b4d2611184"));
    let then = "[ $TORCHELASTIC_RESTART_COUNT = 0 ] || exit 0\nexec sleep 1000";
    let launcher = format!("echo $PPID > {}.$RANK\n", folder.name("launcher"));
    let program = launcher + &noting(&folder.name("notes"), then);
    let flags = [
        of_two(&endpoint, &secret, &["--node-rank", "0", "--max-restarts", "1"]),
        of_two(&endpoint, &secret, &["--node-rank", "1"]),
    ];
    let [first, second] = flags.each_ref().map(|flags| started(&mut shell(flags, &program)));
    let (leaves, stays) = if node == 0 { (first, second) } else { (second, first) };
    wait_for_lines(&folder.path("notes"), 2);
    let pid = fs::read_to_string(folder.path(&format!("launcher.{node}"))).expect("written");
    let pid = Pid::from_raw(pid.trim().parse().expect("a number")).expect("a pid");
    kill_process(pid, signal).expect("it runs");
    leaves.wait_with_output().expect("it ends");
    // One that comes too early is told to wait and tries again.
    let successor = started(&mut shell(&flags[node], &program));
    let (stays, successor) = (stays.wait_with_output(), successor.wait_with_output());
    let stays = stays.expect("it ends");
    assert_code(&stays, 0);
    assert_code(&successor.expect("it ends"), 0);
    assert_new_port_each(&wait_for_lines(&folder.path("notes"), 4), 2);
    text(&stays.stderr).to_owned()
}

#[test]
fn a_launcher_that_was_killed_is_waited_for_and_the_job_starts_again_with_its_successor() {
    let said = with_a_successor(1, Signal::KILL);
    assert!(said.contains("the launcher of node 1 was lost"), "{said}");
}

#[test]
fn launcher_0_is_waited_for_too_and_its_successor_goes_on_with_the_next_generation() {
    let said = with_a_successor(0, Signal::KILL);
    assert!(said.contains("launcher 0 was lost; waiting for another one at "), "{said}");
    assert!(said.contains("the launcher of node 0 was lost: "), "{said}");
    assert!(said.contains("; the job starts again (1 of 1)"), "{said}");
}

#[test]
fn without_restarts_the_loss_of_launcher_0_ends_the_job() {
    let folder = Folder::new();
    let (endpoint, secret) = (free_endpoint(), folder.write("secret", "b1946ac92492d2347c6235b4d2611184"));
    let launcher = format!("echo $PPID > {}.$RANK\n", folder.name("launcher"));
    let program = launcher + &noting(&folder.name("notes"), "exec sleep 1000");
    // Launcher 0 decides; what another one was told does not make it wait.
    let [first, second] = ["0", "1"].map(|node| {
        let more = ["--node-rank", node, "--max-restarts", node];
        started(&mut shell(&of_two(&endpoint, &secret, &more), &program))
    });
    wait_for_lines(&folder.path("notes"), 2);
    let pid = fs::read_to_string(folder.path("launcher.0")).expect("written");
    kill_process(Pid::from_raw(pid.trim().parse().expect("a number")).expect("a pid"), Signal::KILL)
        .expect("it runs");
    first.wait_with_output().expect("it ends");
    assert_code(&second.wait_with_output().expect("it ends"), 138);
}

#[test]
fn a_launcher_of_a_former_run_is_not_let_into_the_next_one() {
    let folder = Folder::new();
    let (endpoint, secret) = (free_endpoint(), folder.write("secret", "b1946ac92492d2347c6235b4d2611184"));
    let launcher = format!("echo $PPID > {}.$TORCHELASTIC_RUN_ID.$RANK\n", folder.name("launcher"));
    // The next run lasts until the one that is left has come to it.
    let then = format!(
        "[ $TORCHELASTIC_RUN_ID = monday ] && exec sleep 1000\nuntil [ -e {} ]; do sleep 0.02; done",
        folder.name("gone")
    );
    let program = launcher + &noting(&folder.name("notes.$TORCHELASTIC_RUN_ID"), &then);
    let run = |id| {
        ["0", "1"].map(|node| {
            let more = ["--rdzv-id", id, "--node-rank", node, "--max-restarts", "1"];
            started(&mut shell(&of_two(&endpoint, &secret, &more), &program))
        })
    };
    let [first, left] = run("monday");
    wait_for_lines(&folder.path("notes.monday"), 2);
    let pid = fs::read_to_string(folder.path("launcher.monday.0")).expect("written");
    kill_process(Pid::from_raw(pid.trim().parse().expect("a number")).expect("a pid"), Signal::KILL)
        .expect("it runs");
    first.wait_with_output().expect("it ends");
    // The one that is left looks for another launcher 0 where the next run has its own.
    let next = run("tuesday");
    let left = left.wait_with_output().expect("it ends");
    folder.write("gone", "");
    assert_code(&left, 138);
    let line = "node 0 was started with --rdzv-id tuesday and node 1 with monday; it is of another run";
    assert!(text(&left.stderr).lines().any(|found| found.ends_with(line)), "{}", told(&left));
    for child in next {
        assert_code(&child.wait_with_output().expect("it ends"), 0);
    }
}

#[test]
fn launcher_0_that_was_told_to_stop_does_not_wait_for_the_work_of_others() {
    let folder = Folder::new();
    let (endpoint, secret) = (free_endpoint(), folder.write("secret", "b1946ac92492d2347c6235b4d2611184"));
    let launcher = format!("echo $PPID > {}.$RANK\n", folder.name("launcher"));
    // Rank 0 takes SIGTERM for the end of its work, and rank 1 works on.
    let then = "[ $RANK = 1 ] && exec sleep 1000\nwhile :; do sleep 0.05; done";
    let program = launcher + "trap 'exit 0' TERM\n" + &noting(&folder.name("notes"), then);
    let [first, second] = ["0", "1"].map(|node| {
        started(&mut shell(&of_two(&endpoint, &secret, &["--node-rank", node, "--grace", "5"]), &program))
    });
    wait_for_lines(&folder.path("notes"), 2);
    let pid = fs::read_to_string(folder.path("launcher.0")).expect("written");
    kill_process(Pid::from_raw(pid.trim().parse().expect("a number")).expect("a pid"), Signal::TERM)
        .expect("it runs");
    assert_code(&first.wait_with_output().expect("it ends"), 143);
    assert_code(&second.wait_with_output().expect("it ends"), 138);
}

#[test]
fn a_launcher_that_was_told_to_stop_has_a_successor_at_the_cost_of_one_restart() {
    let said = with_a_successor(1, Signal::TERM);
    assert!(
        said.contains("rank 1 on node 1 was killed by signal 15 (SIGTERM); the job starts again (1 of 1)"),
        "{said}"
    );
}

#[test]
fn launchers_that_are_all_started_alike_agree_on_their_numbers() {
    let folder = Folder::new();
    let (endpoint, secret) = (free_endpoint(), folder.write("secret", "b1946ac92492d2347c6235b4d2611184"));
    let common = ["--nnodes", "3", "--rdzv-backend", "c10d", "--bind", "none"];
    let flags = [&common[..], &["--rdzv-endpoint", &endpoint, "--job-secret", &secret]].concat();
    let program = noting(&folder.name("notes"), "exit 0");
    let all = [0; 3].map(|_| started(&mut shell(&flags, &program)));
    for child in all {
        assert_code(&child.wait_with_output().expect("it ends"), 0);
    }
    let notes = wait_for_lines(&folder.path("notes"), 3);
    let mut ranks: Vec<&str> = notes.iter().filter_map(|note| note.split(' ').nth(1)).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, ["0", "1", "2"], "{notes:?}");
    assert_new_port_each(&notes, 1);
}

// Machines that come and go

/// A job of launchers whose number may change, and what its ranks have noted of each generation:
/// `<generation> <node> <RANK> <WORLD_SIZE> <TORCHELASTIC_RESTART_COUNT> <MASTER_PORT>`.
struct Changing {
    folder: Folder,
    endpoint: String,
    secret: String,
    nnodes: &'static str,
    more: &'static [&'static str],
    /// What a rank does when all ranks of its generation are there.
    then: &'static str,
}

impl Changing {
    fn new(nnodes: &'static str, more: &'static [&'static str], then: &'static str) -> Self {
        let folder = Folder::new();
        let secret = folder.write("secret", "b1946ac92492d2347c6235b4d2611184");
        Self { folder, endpoint: free_endpoint(), secret, nnodes, more, then }
    }

    fn start(&self, node: usize) -> Child {
        let notes = self.folder.name("notes");
        let program = format!(
            "echo $PPID > {}.$NODE\n\
             echo $PACELINE_GENERATION $NODE $RANK $WORLD_SIZE $TORCHELASTIC_RESTART_COUNT $MASTER_PORT >> {notes}\n\
             while [ $(grep -c \"^$PACELINE_GENERATION \" {notes}) -lt $WORLD_SIZE ]; do sleep 0.02; done\n{}",
            self.folder.name("launcher"),
            self.then
        );
        let node = node.to_string();
        let common =
            ["--nnodes", self.nnodes, "--node-rank", &node, "--rdzv-backend", "c10d", "--bind", "none"];
        let meeting = ["--rdzv-endpoint", &self.endpoint, "--job-secret", &self.secret];
        let flags = [&common[..], &meeting, self.more].concat();
        started(shell(&flags, &program).env("NODE", &node).env("SEEN", self.folder.name("seen")))
    }

    /// Kills the launcher of a node, as the last rank there has noted it.
    fn kill(&self, node: usize, child: Child) {
        self.signal(node, Signal::KILL);
        child.wait_with_output().expect("it ends");
    }

    fn signal(&self, node: usize, signal: Signal) {
        let pid = fs::read_to_string(self.folder.path(&format!("launcher.{node}"))).expect("written");
        let pid = Pid::from_raw(pid.trim().parse().expect("a number")).expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    fn notes(&self) -> Vec<String> {
        let notes = fs::read_to_string(self.folder.path("notes")).unwrap_or_default();
        notes.lines().map(str::to_owned).collect()
    }

    /// Waits until the generations so far have noted so many ranks. Returns those of the last one as
    /// `<node> <RANK> <WORLD_SIZE> <TORCHELASTIC_RESTART_COUNT>`, sorted.
    fn generation(&self, number: usize, noted: usize) -> Vec<String> {
        let notes = wait_for_lines(&self.folder.path("notes"), noted);
        let of_it = notes.iter().filter_map(|note| note.strip_prefix(&format!("{number} ")));
        let mut found: Vec<String> =
            of_it.filter_map(|note| note.rsplit_once(' ').map(|(rest, _port)| rest.to_owned())).collect();
        found.sort_unstable();
        found
    }
}

#[test]
fn under_a_plain_program_machines_come_and_go_and_all_ranks_start_again_on_those_that_are_there() {
    const MORE: [&str; 4] = ["--max-restarts", "1", "--rdzv-conf", "last_call_timeout=1"];
    let job = Changing::new("2:3", &MORE, "[ $PACELINE_GENERATION = 3 ] && exit 0\nexec sleep 1000");
    let [first, second] = [0, 1].map(|node| job.start(node));
    assert_eq!(job.generation(0, 2), ["0 0 2 0", "1 1 2 0"], "without the third, after the last call");
    let third = job.start(2);
    assert_eq!(job.generation(1, 5), ["0 0 3 0", "1 1 3 0", "2 2 3 0"], "it has cost no restart");
    job.kill(1, second);
    assert_eq!(job.generation(2, 7), ["0 0 2 1", "2 1 2 1"], "the others close ranks");
    let second = job.start(1);
    assert_eq!(job.generation(3, 10), ["0 0 3 1", "1 1 3 1", "2 2 3 1"]);
    let ended = [first, second, third].map(|child| child.wait_with_output().expect("it ends"));
    ended.iter().for_each(|output| assert_code(output, 0));
    let said = text(&ended[0].stderr);
    for line in [
        "the launcher of node 2 has come; the job starts again on 3 nodes",
        "; the job starts again (1 of 1)",
        "the launcher of node 1 has come; the job starts again on 3 nodes",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
}

#[test]
fn a_machine_that_is_told_to_stop_leaves_the_others_to_start_again_without_it() {
    const MORE: [&str; 4] = ["--max-restarts", "1", "--rdzv-conf", "last_call_timeout=0.5"];
    // A rank takes SIGTERM for the end of its work.
    let then = "trap 'exit 0' TERM\necho $RANK >> $SEEN.by.$WORLD_SIZE\n\
                until [ $WORLD_SIZE = 2 ] && [ -e $SEEN ]; do sleep 0.05; done";
    let job = Changing::new("2:3", &MORE, then);
    let all = [0, 1, 2].map(|node| job.start(node));
    // Whichever comes after the last call has all start again.
    wait_for_lines(&job.folder.path("seen.by.3"), 3);
    job.folder.write("seen", "");
    job.signal(1, Signal::TERM);
    let codes = all.map(|child| child.wait_with_output().expect("it ends"));
    for (output, code) in codes.iter().zip([0, 143, 0]) {
        assert_code(output, code);
    }
    let said = text(&codes[0].stderr);
    assert!(
        said.contains("the launcher of node 1 was lost: it was told to stop; the job starts again"),
        "{said}"
    );
    let last = job.notes().pop().expect("there are notes");
    assert!(last.contains(" 2 1 "), "two ranks, after one restart: {last}");
}

#[test]
fn with_fewer_machines_than_may_be_the_job_waits_for_others_and_then_ends_with_its_cause() {
    const MORE: [&str; 6] =
        ["--max-restarts", "1", "--rdzv-conf", "last_call_timeout=0.5", "--rdzv-timeout", "10"];
    let job = Changing::new("2:3", &MORE, "exec sleep 1000");
    let [first, second] = [0, 1].map(|node| job.start(node));
    job.generation(0, 2);
    job.kill(1, second);
    let first = first.wait_with_output().expect("it ends");
    assert_code(&first, 138);
    assert!(text(&first.stderr).contains("node 1, node 2 did not come again"), "{}", told(&first));
}

#[test]
fn a_machine_that_comes_when_ranks_have_finished_does_not_start_them_again() {
    const MORE: [&str; 2] = ["--rdzv-conf", "last_call_timeout=0.5"];
    let job = Changing::new("2:4", &MORE, "[ $RANK = 0 ] && exit 0\nuntil [ -e $SEEN ]; do sleep 0.02; done");
    let [mut first, second] = [0, 1].map(|node| job.start(node));
    read_until(&mut first, "waiting for the ranks of node 1; those here have ended");
    let mut third = job.start(2);
    read_until(&mut third, "waiting for node 3");
    job.folder.write("seen", "");
    for (child, is_late) in [(first, false), (second, false), (third, true)] {
        let output = child.wait_with_output().expect("it ends");
        assert_code(&output, 0);
        let is_left_out = text(&output.stderr).contains("paceline: the job has ended without this node\n");
        assert_eq!(is_left_out, is_late, "{}", told(&output));
    }
    assert_eq!(job.generation(0, 2).len(), 2);
}

#[test]
fn a_machine_that_has_come_too_late_ends_with_the_code_of_a_job_that_fails() {
    const MORE: [&str; 2] = ["--rdzv-conf", "last_call_timeout=0.5"];
    let then = "[ $RANK = 0 ] && exit 0\nuntil [ -e $SEEN ]; do sleep 0.02; done\nexit 7";
    let job = Changing::new("2:4", &MORE, then);
    let [mut first, second] = [0, 1].map(|node| job.start(node));
    read_until(&mut first, "waiting for the ranks of node 1; those here have ended");
    let mut third = job.start(2);
    read_until(&mut third, "waiting for node 3");
    job.folder.write("seen", "");
    for child in [first, second] {
        assert_code(&child.wait_with_output().expect("it ends"), 7);
    }
    let third = third.wait_with_output().expect("it ends");
    assert_code(&third, 7);
    let line = "paceline: the job has ended without this node: rank 1 on node 1 exited with code 7\n";
    assert!(text(&third.stderr).contains(line), "{}", told(&third));
}

#[test]
fn a_machine_that_comes_and_goes_before_the_others_start_again_has_them_do_so_once() {
    const MORE: [&str; 6] = ["--rdzv-conf", "last_call_timeout=0.5", "--max-restarts", "1", "--grace", "60"];
    // The ranks take their time to end when the machine comes, which is gone when they have.
    let then = "trap 'touch $SEEN.told; until [ -e $SEEN.gone ]; do sleep 0.02; done; exit 0' TERM\n\
                until [ -e $SEEN ]; do sleep 0.02; done";
    let job = Changing::new("2:4", &MORE, then);
    let [first, second] = [0, 1].map(|node| job.start(node));
    job.generation(0, 2);
    let third = job.start(2);
    wait_for(&job.folder.path("seen.told"));
    // `timeout` and `env` have become the launcher, or pass it on.
    kill_process(Pid::from_child(&third), Signal::TERM).expect("it runs");
    third.wait_with_output().expect("it ends");
    job.folder.write("seen.gone", "");
    assert_eq!(job.generation(1, 4), ["0 0 2 0", "1 1 2 0"], "again without it");
    // Once more: now it waits, and the others train on.
    let mut third = job.start(2);
    read_until(&mut third, "waiting for node 3");
    job.folder.write("seen", "");
    for child in [first, second, third] {
        assert_code(&child.wait_with_output().expect("it ends"), 0);
    }
    assert_eq!(job.notes().len(), 4, "{:?}", job.notes());
}

/// Waits until the file is there.
fn wait_for(file: &Path) {
    let deadline = Instant::now() + LIMIT;
    while !file.exists() {
        assert!(Instant::now() < deadline, "no {}", file.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reads what the launcher says up to a line with these words.
fn read_until(child: &mut Child, words: &str) {
    let stderr = child.stderr.as_mut().expect("a pipe");
    let (mut line, mut byte) = (Vec::new(), [0]);
    let deadline = Instant::now() + LIMIT;
    // One byte at a time, so that the rest is left to whoever waits for the end.
    while !String::from_utf8_lossy(&line).contains(words) {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).expect("a minute at most");
        let ready = poll(&mut [PollFd::new(&*stderr, PollFlags::IN)], Some(&left)).expect("it can be polled");
        assert_ne!(ready, 0, "it has not said within {} s: {words}", LIMIT.as_secs());
        assert_eq!(stderr.read(&mut byte).expect("it can be read"), 1, "it has ended and not said: {words}");
        if byte[0] == b'\n' { line.clear() } else { line.push(byte[0]) }
    }
}

// Files

/// All files below a folder and what is in them, without the run's own folder.
fn tree(folder: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).expect("a folder").flatten() {
            match entry.file_type().expect("a type").is_dir() {
                true => folders.push(entry.path()),
                false => {
                    let path = entry.path();
                    let mut parts = path.strip_prefix(folder).expect("below").components();
                    let run = parts
                        .next()
                        .expect("the run's folder")
                        .as_os_str()
                        .to_str()
                        .expect("text")
                        .to_owned();
                    assert!(run.starts_with("job_"), "{run}");
                    let name = parts.as_path().to_str().expect("text").to_owned();
                    found.insert(name, fs::read_to_string(&path).expect("text"));
                }
            }
        }
    }
    found
}

#[test]
fn logs_of_each_attempt_and_rank_lie_where_torchrun_puts_them() {
    let folder = Folder::new();
    let logs = folder.name("logs");
    let program = "echo out $RANK; echo err $RANK >&2; [ $TORCHELASTIC_RESTART_COUNT = 1 ] || exit 5";
    let flags =
        ["-n", "2", "--max-restarts", "1", "--log-dir", &logs, "--rdzv-id", "job", "-r", "1", "-t", "1:2"];
    let found = output(&mut shell(&flags, program));
    assert_code(&found, 0);
    let files = tree(&folder.path("logs"));
    // A rank that was told to end may not have come so far; in the last attempt all have.
    for (name, expected) in
        [("0/stdout.log", "out 0\n"), ("1/stdout.log", "out 1\n"), ("1/stderr.log", "err 1\n")]
    {
        assert_eq!(files.get(&format!("attempt_1/{name}")).map(String::as_str), Some(expected), "{files:?}");
    }
    assert!(
        files.contains_key("attempt_0/0/stdout.log") && !files.contains_key("attempt_1/0/stderr.log"),
        "{files:?}"
    );
    assert_eq!(text(&found.stdout), "", "stdout is in files alone");
    let stderr: Vec<&str> = text(&found.stderr).lines().collect();
    assert!(stderr.contains(&"[default1]:err 1") && stderr.contains(&"[0]: err 0"), "{stderr:?}");
}

#[test]
fn a_filter_hides_ranks_and_words_choose_lines_for_one_more_file() {
    let folder = Folder::new();
    let logs = folder.name("logs");
    let program = "echo apple $RANK; echo pear $RANK";
    let flags = ["-n", "2", "--log-dir", &logs, "--rdzv-id", "job", "--tee", "3"];
    let filters = ["--local-ranks-filter", "1", "--duplicate-stdout-filters", "apple,nothing"];
    let found = output(&mut shell(&[&flags[..], &filters].concat(), program));
    assert_code(&found, 0);
    assert_eq!(text(&found.stdout), "[default1]:apple 1\n[default1]:pear 1\n");
    let files = tree(&folder.path("logs"));
    assert_eq!(files["attempt_0/0/stdout.log"], "apple 0\npear 0\n");
    let mut copied: Vec<&str> = files["attempt_0/filtered_stdout.log"].lines().collect();
    copied.sort_unstable();
    assert_eq!(copied, ["[default1]:apple 1"], "of those that are shown");
}

#[test]
fn what_a_rank_recorded_is_shown_and_passed_on() {
    let folder = Folder::new();
    let own = folder.name("own.json");
    let recorded = r#"{"message": {"message": "ValueError: no", "extraInfo": {"py_callstack": "Traceback\n  line 7", "timestamp": "1"}}}"#;
    let program = format!("printf %s '{recorded}' > $TORCHELASTIC_ERROR_FILE; echo noise >&2; exit 1");
    let found = output(shell(&[], &program).env("TORCHELASTIC_ERROR_FILE", &own));
    assert_code(&found, 1);
    let stderr = text(&found.stderr);
    assert!(stderr.contains("  the error that rank 0 recorded:\n    Traceback\n      line 7\n"), "{stderr}");
    let content: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&own).expect("written")).expect("json");
    assert_eq!(content["message"]["message"], "ValueError: no");
    assert_eq!(content["message"]["errorCode"], 1);
}
