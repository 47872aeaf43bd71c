//! `paceline run` and PyTorch's torchrun on the same programs: what docs/launcher.md calls the same is the same here.
//!
//! `cargo xtask torchrun` installs torchrun and runs this. It says with PYTHON_EXEC which interpreter has it.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// torchrun needs some seconds to start, and more on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// Writes what it was given to `<out>.<RANK>.<restart count>`.
const DUMP: &str = r#"
import json, os, sys
keys = "RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS TORCH_NCCL_ASYNC_ERROR_HANDLING CUDA_VISIBLE_DEVICES".split()
found = {k: v for k, v in os.environ.items() if k in keys or k.startswith("TORCHELASTIC_")}
found["argv"] = sys.argv[1:]
found["name"] = __name__
found["unbuffered"] = sys.stdout.write_through
with open(f"{os.environ['OUT']}.{found['RANK']}.{found['TORCHELASTIC_RESTART_COUNT']}", "w") as file:
    json.dump(found, file)
"#;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Launcher {
    Paceline,
    Torchrun,
}

const BOTH: [Launcher; 2] = [Launcher::Torchrun, Launcher::Paceline];

impl Launcher {
    /// The launcher with these flags; Paceline gets them with underscores where torchrun has dashes.
    fn command(self, flags: &[&str]) -> Command {
        let python = std::env::var("PYTHON_EXEC").expect("`cargo xtask torchrun` sets PYTHON_EXEC");
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", &LIMIT.as_secs().to_string(), "env", "--default-signal=HUP,INT,QUIT"]);
        match self {
            Launcher::Torchrun => command.args([&python, "-m", "torch.distributed.run"]).args(flags),
            Launcher::Paceline => {
                command.args([env!("CARGO_BIN_EXE_paceline"), "run", "--exit-code", "torchrun"]);
                command.args(flags.iter().map(|flag| underscored(flag)))
            }
        };
        for name in ["OMP_NUM_THREADS", "RUST_LOG"] {
            command.env_remove(name);
        }
        command.env("NO_COLOR", "1").env("PACELINE_INSECURE", "1").stdin(Stdio::null());
        command
    }
}

/// `--a-b=c-d` as `--a_b=c-d`.
fn underscored(flag: &str) -> String {
    let Some(name) = flag.strip_prefix("--") else { return flag.to_owned() };
    let (name, value) = name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value)));
    let name = name.replace('-', "_");
    value.map_or_else(|| format!("--{name}"), |value| format!("--{name}={value}"))
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
        self.name(name)
    }
}

fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("bound").port().to_string()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn told(output: &Output) -> String {
    format!("{:?}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// What the ranks wrote down, by rank and restart count, without what must differ: `*` in place of random parts.
fn dumps(folder: &Folder) -> BTreeMap<String, BTreeMap<String, Value>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder.0.path()).expect("a folder").flatten() {
        let name = entry.file_name().into_string().expect("text");
        let Some(rank) = name.strip_prefix("out.") else { continue };
        let text = fs::read_to_string(entry.path()).expect("read");
        let mut values: BTreeMap<String, Value> = serde_json::from_str(&text).expect("json");
        // Rank 0 serves the store under Paceline; docs/launcher.md says why.
        values.remove("TORCHELASTIC_USE_AGENT_STORE");
        if let Some(Value::String(file)) = values.get_mut("TORCHELASTIC_ERROR_FILE") {
            *file = file.split_once("/attempt_").map_or_else(String::new, |(_, rest)| rest.to_owned());
        }
        found.insert(rank.to_owned(), values);
    }
    found
}

/// Runs the flags and the script's words under a launcher; the script is [`DUMP`].
fn dumped(
    launcher: Launcher,
    flags: &[&str],
    words: &[&str],
    variables: &[(&str, &str)],
) -> BTreeMap<String, BTreeMap<String, Value>> {
    let folder = Folder::new();
    let script = folder.write("dump.py", DUMP);
    let mut command = launcher.command(flags);
    command.arg(script).args(words).env("OUT", folder.name("out")).envs(variables.iter().copied());
    let output = command.output().expect("it ran");
    assert!(output.status.success(), "{launcher:?}: {}", told(&output));
    dumps(&folder)
}

/// Both launchers give their workers the same; returns it.
fn same_dumps(
    flags: &[&str],
    words: &[&str],
    variables: &[(&str, &str)],
) -> BTreeMap<String, BTreeMap<String, Value>> {
    let [theirs, ours] = BOTH.map(|launcher| dumped(launcher, flags, words, variables));
    assert_eq!(theirs, ours, "torchrun's is on the left");
    assert!(!ours.is_empty());
    ours
}

#[test]
fn flags_give_workers_the_same_environment_and_arguments() {
    let flags = [
        "--nnodes=1",
        "--nproc-per-node=2",
        "--role=trainer",
        "--rdzv-id=job-7",
        "--max-restarts=3",
        "--master-addr=localhost",
        "--master-port",
        &free_port(),
        "--monitor-interval=0.05",
        "--start-method=spawn",
        "--event-log-handler=null",
        "--rdzv-conf=timeout=60",
        "--log-dir=/dev/null",
        "--signals-to-handle=SIGTERM,SIGUSR1",
    ];
    let found = same_dumps(&flags, &["-x", "--rank=${local_rank}", "--", "y"], &[]);
    assert_eq!(found.len(), 2);
    assert_eq!(found["1.0"]["argv"][1], "--rank=1");
}

#[test]
fn variables_count_below_flags() {
    let port = free_port();
    let variables = [
        ("PET_NPROC_PER_NODE", "2"),
        ("PET_ROLE", "variable"),
        ("PET_RDZV_ID", "variable"),
        ("PET_MAX_RESTARTS", "2"),
        ("PET_MASTER_PORT", &port),
        ("PET_STANDALONE", "0"),
        ("PET_VIRTUAL_LOCAL_RANK", "1"),
        ("CUDA_VISIBLE_DEVICES", "3,5"),
        ("OMP_NUM_THREADS", "7"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3"),
    ];
    let found = same_dumps(&["--role", "flag"], &[], &variables);
    assert_eq!(
        (&found["1.0"]["ROLE_NAME"], &found["1.0"]["CUDA_VISIBLE_DEVICES"]),
        (&"flag".into(), &"5".into())
    );
    assert_eq!(found["0.0"]["TORCHELASTIC_RUN_ID"], "variable");
}

#[test]
fn a_standalone_job_has_a_name_of_its_own_and_as_many_workers_as_processors() {
    let [theirs, ours] = BOTH.map(|launcher| {
        let mut found = dumped(launcher, &["--standalone", "--nproc-per-node", "cpu"], &[], &[]);
        for values in found.values_mut() {
            let id = values.insert("TORCHELASTIC_RUN_ID".to_owned(), "*".into()).expect("set");
            assert!(id.as_str().is_some_and(|id| id.len() >= 32), "{id}");
            values.insert("MASTER_PORT".to_owned(), "*".into());
            // torchrun says localhost.
            values.insert("MASTER_ADDR".to_owned(), "*".into());
        }
        found
    });
    assert_eq!(theirs, ours);
}

#[test]
fn modules_and_programs_run_alike_and_gpus_are_missing_alike() {
    for (flags, words) in [
        (&["--nproc-per-node", "auto", "--module"][..], &["dump", "a"][..]),
        (&["--no-python"], &["sh", "-c", "exec python3 dump.py a"]),
        (&["--run-path"], &["dump.py", "a"]),
    ] {
        let [theirs, ours] = BOTH.map(|launcher| {
            let folder = Folder::new();
            folder.write("dump.py", DUMP);
            let port = free_port();
            let mut command = launcher.command(&[&["--master-port", &port], flags].concat());
            command.args(words).env("OUT", folder.name("out")).current_dir(folder.0.path());
            // torchrun's workers find a module in the working directory, as `python -m` does.
            let output = command.output().expect("it ran");
            assert!(output.status.success(), "{launcher:?}: {}", told(&output));
            let mut found = dumps(&folder);
            for values in found.values_mut() {
                values.remove("MASTER_PORT");
                if flags.contains(&"--run-path") {
                    // Under torchrun it shares the launcher's interpreter, whose output is buffered.
                    values.remove("unbuffered");
                }
            }
            found
        });
        assert_eq!(theirs, ours, "{flags:?}");
    }
    for launcher in BOTH {
        let output =
            launcher.command(&["--nproc-per-node", "gpu", "--no-python", "true"]).output().expect("it ran");
        let has_gpu = Path::new("/dev/nvidia0").exists();
        assert_eq!(output.status.success(), has_gpu, "{launcher:?}: {}", told(&output));
    }
}

/// The files below the run's own folder, and what is in them.
fn tree(folder: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let below: PathBuf = path.strip_prefix(folder).expect("below").components().skip(1).collect();
            let mut lines: Vec<String> =
                fs::read_to_string(&path).expect("text").lines().map(str::to_owned).collect();
            // Ranks share the filtered files.
            lines.sort();
            found.insert(below.to_str().expect("text").to_owned(), lines.join("\n"));
        }
    }
    found
}

/// A program that writes to both streams, and fails in its first generation if it is asked to.
const SPEAKER: &str = r#"
import os, sys
rank = os.environ["RANK"]
for fruit in ["apple", "pear"]:
    # One write each: ranks share the console, and an unbuffered print() writes a line in pieces.
    sys.stdout.write(f"{fruit} {rank}\n")
    sys.stderr.write(f"{fruit} {rank}\n")
"#;

/// The log tree and the lines on the console that have a prefix, or are the program's own, of one run.
// Two torchruns that run at the same time need ports of their own.
fn logged(
    launcher: Launcher,
    flags: &[&str],
    variables: &[(&str, &str)],
) -> (BTreeMap<String, String>, [Vec<String>; 2]) {
    let folder = Folder::new();
    let script = folder.write("speak.py", SPEAKER);
    let (logs, port) = (folder.name("logs"), free_port());
    let mut command = launcher.command(
        &[&["--nproc-per-node=2", "--log-dir", &logs, "--rdzv-id", "job", "--master-port", &port], flags]
            .concat(),
    );
    let output = command.arg(script).envs(variables.iter().copied()).output().expect("it ran");
    assert!(output.status.success(), "{launcher:?}: {}", told(&output));
    let console = [&output.stdout, &output.stderr].map(|bytes| {
        let is_fruit = |line: &&str| line.contains("apple ") || line.contains("pear ");
        // What is not teed has the rank in front under Paceline.
        let bare = |line: &str| line.split_once("]: ").map_or(line, |(_, rest)| rest).to_owned();
        let mut lines: Vec<String> = text(bytes).lines().filter(is_fruit).map(bare).collect();
        lines.sort();
        lines
    });
    (tree(&folder.path("logs")), console)
}

fn same_logs(flags: &[&str], variables: &[(&str, &str)]) -> (BTreeMap<String, String>, [Vec<String>; 2]) {
    let [theirs, ours] = BOTH.map(|launcher| logged(launcher, flags, variables));
    assert_eq!(theirs, ours, "{flags:?}; torchrun's is on the left");
    ours
}

#[test]
fn output_goes_to_the_same_files_and_to_the_console() {
    let (files, [stdout, stderr]) = same_logs(&["--redirects=1", "--tee=0:2"], &[]);
    assert_eq!(files["attempt_0/1/stdout.log"], "apple 1\npear 1");
    assert_eq!(stdout, Vec::<String>::new());
    assert_eq!(stderr, ["[default0]:apple 0", "[default0]:pear 0", "apple 1", "pear 1"]);
}

#[test]
fn filters_choose_the_same_ranks_and_lines() {
    let flags = [
        "--tee=3",
        "--role=r",
        "--local-ranks-filter=1",
        "--duplicate-stdout-filters=apple,,x,pear",
        "--duplicate-stderr-filters=nothing,apple",
    ];
    let template = ("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "<${role_name} ${rank} ${local_rank}>");
    let (files, [stdout, _]) = same_logs(&flags, &[template]);
    assert_eq!(stdout, ["<r 1 1>apple 1", "<r 1 1>pear 1"]);
    assert_eq!(files["attempt_0/0/stdout.log"], "apple 0\npear 0");
}

/// Fails in its first generations, in each on another rank, as a program under torch's `record` does (which takes seconds to import).
const FAILING: &str = r#"
import json, os, sys, time
count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
name = f"{os.environ['RANK']}.{count}"
with open(f"{os.environ['OUT']}-{name}", "w") as file:
    json.dump({k: os.environ[k] for k in ["WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"]}, file)
# Whole or not at all: it may be ended at any time.
os.replace(f"{os.environ['OUT']}-{name}", f"{os.environ['OUT']}.{name}")
if count < int(os.environ["FAILURES"]):
    if int(os.environ["RANK"]) == count:
        info = {"py_callstack": f"Traceback: no {count}", "timestamp": "1700000000"}
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": {"message": f"ValueError: no {count}", "extraInfo": info}}, file)
        sys.exit(5)
    time.sleep(1000)
"#;

#[test]
fn failures_restart_all_workers_until_the_restarts_are_used_up() {
    for (failures, code) in [("2", 0), ("3", 1)] {
        let [theirs, ours] = BOTH.map(|launcher| {
            let folder = Folder::new();
            let script = folder.write("fail.py", FAILING);
            let mut command =
                launcher.command(&["--nproc-per-node=3", "--max-restarts=2", "--master-port", &free_port()]);
            command.arg(script).env("OUT", folder.name("out")).env("FAILURES", failures);
            let own = folder.path("own.json");
            let output = command.env("TORCHELASTIC_ERROR_FILE", &own).output().expect("it ran");
            assert_eq!(output.status.code(), Some(code), "{launcher:?}: {}", told(&output));
            // A worker may be ended before it has written anything, but the one that failed has.
            let attempts = (0..3).map(|count| dumps(&folder).contains_key(&format!("{count}.{count}")));
            let error = fs::read_to_string(own).ok();
            let error: Option<Value> = error.map(|text| serde_json::from_str(&text).expect("json"));
            (attempts.collect::<Vec<_>>(), error)
        });
        assert_eq!(theirs, ours);
        assert_eq!(ours.1.is_some(), code != 0, "the first failure's error file is passed on");
    }
}

/// Writes down the signal that it got, and ends as that asks.
const SIGNALLED: &str = r#"
import os, signal, sys, time
def note(number, frame):
    with open(os.environ["OUT"], "a") as file:
        file.write(signal.Signals(number).name + "\n")
    sys.exit(0)
for name in ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"]:
    signal.signal(getattr(signal, name), note)
open(os.environ["OUT"], "a").close()
launcher = os.getppid()
# torchrun forgets a worker when a signal finds it starting that.
time.sleep(2)
with open(os.environ["OUT"] + ".launcher", "w") as file:
    file.write(f"{launcher}\n")
time.sleep(100)
"#;

fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "no {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The signals that a worker got when its launcher got `signal`, and the launcher's exit code.
fn signalled(launcher: Launcher, signal: Signal) -> (String, Option<i32>) {
    let folder = Folder::new();
    let script = folder.write("signalled.py", SIGNALLED);
    let flags = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--master-port", &free_port()];
    let mut command = launcher.command(&flags);
    command.arg(script).env("OUT", folder.name("signals")).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("it starts");
    let pid = wait_for("launcher", || {
        let pid = fs::read_to_string(folder.path("signals.launcher")).ok()?;
        pid.strip_suffix('\n')?.parse().ok()
    });
    kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("it runs");
    let status = child.wait().expect("it ends");
    (fs::read_to_string(folder.path("signals")).expect("written"), status.code())
}

#[test]
fn signals_reach_the_workers_and_the_launcher_ends_with_a_failure() {
    for (signal, name) in
        [(Signal::TERM, "SIGTERM\n"), (Signal::INT, "SIGINT\n"), (Signal::USR1, "SIGUSR1\n")]
    {
        let [theirs, ours] = std::thread::scope(|scope| {
            let both = BOTH.map(|launcher| scope.spawn(move || signalled(launcher, signal)));
            both.map(|one| one.join().expect("no panic"))
        });
        assert_eq!(theirs, ours, "{signal:?}; torchrun's is on the left");
        assert_eq!(ours, (name.to_owned(), Some(1)));
    }
}

#[test]
fn several_machines_give_workers_the_same_places() {
    for backend in ["static", "c10d"] {
        let port = free_port();
        let [theirs, ours] = BOTH.map(|launcher| {
            let folder = Folder::new();
            let script = folder.write("dump.py", DUMP);
            let endpoint = format!("127.0.0.1:{port}");
            let children: Vec<Child> = ["0", "1"]
                .map(|node| {
                    let common = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend", backend];
                    let more = match backend {
                        "static" => {
                            vec!["--node-rank", node, "--master-addr=127.0.0.1", "--master-port", &port]
                        }
                        _ => vec!["--rdzv-endpoint", &endpoint, "--rdzv-id=job"],
                    };
                    let mut command = launcher.command(&[&common[..], &more].concat());
                    // Paceline's launchers meet at a port of their own.
                    command.env("PACELINE_PORT", free_port_of(&folder));
                    command.arg(&script).env("OUT", folder.name("out"));
                    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
                })
                .into();
            for child in children {
                let output = child.wait_with_output().expect("it ends");
                assert!(output.status.success(), "{launcher:?}: {}", told(&output));
            }
            let mut found = dumps(&folder);
            for values in found.values_mut().filter(|_| backend == "c10d") {
                values.remove("MASTER_PORT");
                // torchrun has the machine's name.
                values.remove("MASTER_ADDR");
            }
            found
        });
        assert_eq!(theirs, ours, "{backend}; torchrun's is on the left");
        assert_eq!(ours.len(), 4);
    }
}

/// Put in front of [`DUMP`]: counts starts, where torchrun's agents count each for itself.
const COUNTED: &str = r#"
import os
os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(os.path.exists(os.environ["OUT"] + "-failed")))
"#;

/// Put behind [`DUMP`]: in the first start rank 1 fails when all have written, and in the second all end.
const FAILING_ONCE: &str = r#"
import time
out = os.environ["OUT"]
def is_written(rank):
    return os.path.exists(f"{out}.{rank}.0") and open(f"{out}.{rank}.0").read().endswith("}")
if found["TORCHELASTIC_RESTART_COUNT"] == "0":
    while found["RANK"] != "1" or not all(is_written(rank) for rank in range(2)):
        time.sleep(0.02)
    open(out + "-failed", "w").close()
    sys.exit(5)
"#;

#[test]
fn on_one_or_two_machines_a_worker_that_fails_starts_both_again_with_the_same_places() {
    let [theirs, ours] = BOTH.map(|launcher| {
        let folder = Folder::new();
        let script = folder.write("fail.py", &[COUNTED, DUMP, FAILING_ONCE].concat());
        let endpoint = format!("127.0.0.1:{}", free_port());
        // The last call is longer than two starts of torchrun on a busy machine are apart.
        let flags = [
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint",
            &endpoint,
            "--rdzv-id=job",
            "--max-restarts=2",
            "--rdzv-conf=last_call_timeout=120",
        ];
        let children = [0, 1].map(|_| {
            let mut command = launcher.command(&flags);
            command.arg(&script).env("OUT", folder.name("out"));
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
        });
        for child in children {
            let output = child.wait_with_output().expect("it ends");
            // An agent of torchrun may find the other one's store gone when its workers have ended well.
            let is_well = output.status.success() || launcher == Launcher::Torchrun;
            assert!(is_well, "{launcher:?}: {}", told(&output));
        }
        let mut found = dumps(&folder);
        for values in found.values_mut() {
            // torchrun gives the machine's name, and a port of its own.
            for name in ["MASTER_ADDR", "MASTER_PORT"] {
                values.remove(name);
            }
            // Its folder is called after the agent's own count.
            if let Some(Value::String(file)) = values.get_mut("TORCHELASTIC_ERROR_FILE") {
                *file = file.split_once('/').map_or_else(String::new, |(_attempt, rest)| rest.to_owned());
            }
        }
        found
    });
    assert_eq!(theirs, ours, "torchrun's is on the left");
    let starts: Vec<&str> = ours.keys().map(String::as_str).collect();
    assert_eq!(starts, ["0.0", "0.1", "1.0", "1.1"]);
    assert!(ours.values().all(|values| values["WORLD_SIZE"] == "2"), "{ours:?}");
}

/// The same free port for all who ask for this folder.
fn free_port_of(folder: &Folder) -> String {
    let file = folder.path("port");
    fs::read_to_string(&file).unwrap_or_else(|_| {
        let port = free_port();
        fs::write(&file, &port).expect("written");
        port
    })
}

/// Data parallel training with gloo, which saves its state after each step and goes on from there.
const DDP: &str = include_str!("ddp.py");

/// The losses of each rank of two launchers of two ranks; `before_end` may do something to them.
fn trained(launcher: Launcher, restarts: &str, before_end: impl FnOnce(&Folder)) -> Vec<String> {
    let folder = Folder::new();
    let script = folder.write("ddp.py", DDP);
    let endpoint = format!("127.0.0.1:{}", free_port());
    let children = ["0", "1"].map(|_| {
        let flags = [
            "--nnodes=2",
            "--nproc-per-node=2",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint",
            &endpoint,
            "--rdzv-id=job",
            "--max-restarts",
            restarts,
        ];
        let mut command = launcher.command(&flags);
        command.arg(&script).arg(folder.name("state")).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("it starts")
    });
    before_end(&folder);
    let mut losses = Vec::new();
    for child in children {
        let output = child.wait_with_output().expect("it ends");
        // An agent of torchrun may find the other one's store gone when its workers have ended well.
        let is_well = output.status.success() || launcher == Launcher::Torchrun;
        assert!(is_well, "{launcher:?}: {}", told(&output));
        let of_ranks = text(&output.stdout);
        let lines = of_ranks.lines().filter_map(|line| line.find("rank ").map(|at| line[at..].to_owned()));
        losses.extend(lines);
    }
    losses.sort();
    assert_eq!(losses.len(), 4, "{losses:?}");
    losses
}

/// The ranks have the same losses, but for the last bits: gradients travel in other buckets in the first step after a start, and so are
/// added in another order.
fn assert_same_losses(theirs: &[String], ours: &[String]) {
    for (theirs, ours) in theirs.iter().zip(ours) {
        let read = |line: &str| {
            let (rank, loss) = line.split_once(" loss ").expect("a loss");
            (rank.to_owned(), loss.parse::<f64>().expect("a number"))
        };
        let ((their_rank, their_loss), (our_rank, our_loss)) = (read(theirs), read(ours));
        assert_eq!(their_rank, our_rank);
        assert!((their_loss / our_loss - 1.0).abs() < 1e-5, "{theirs} by torchrun, {ours} here");
    }
}

#[test]
fn data_parallel_training_reaches_the_same_loss_also_when_a_worker_is_killed() {
    let theirs = trained(Launcher::Torchrun, "0", |_| {});
    let ours = trained(Launcher::Paceline, "0", |_| {});
    assert_same_losses(&theirs, &ours);
    let with_a_kill = trained(Launcher::Paceline, "2", |folder| {
        // Rank 3 writes its pid down, and stays in a step that it has begun until it is killed.
        let pid = wait_for("victim", || {
            let pid = fs::read_to_string(folder.path("state.victim")).ok()?;
            pid.strip_suffix('\n')?.parse().ok()
        });
        kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("it runs");
    });
    assert_same_losses(&theirs, &with_a_kill);
}

#[test]
fn children_of_a_launcher_that_is_killed_die_with_it() {
    let folder = Folder::new();
    let script = folder.write("signalled.py", SIGNALLED);
    let mut command = Launcher::Paceline.command(&[]);
    command.arg(script).env("OUT", folder.name("signals")).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("it starts");
    let pid: i32 = wait_for("launcher", || {
        let pid = fs::read_to_string(folder.path("signals.launcher")).ok()?;
        pid.strip_suffix('\n')?.parse().ok()
    });
    let children = format!("/proc/{pid}/task/{pid}/children");
    let worker: i32 = fs::read_to_string(children).expect("read").trim().parse().expect("one child");
    kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("it runs");
    child.wait().expect("it ends");
    wait_for("end of the worker", || {
        let state = fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
        (state.is_empty() || state.contains(") Z ")).then_some(())
    });
}
