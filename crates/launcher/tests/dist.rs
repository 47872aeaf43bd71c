//! The statically linked launcher where there is little else: in an empty root, in a container's root without a
//! distribution, and in that of this machine's distribution; always as another user than root, on a file system that is
//! read-only.
//!
//! `cargo xtask dist` builds the launcher and says with PACELINE_TEST_DIST where it is. Without it, or without root,
//! which chroot and mount need, one line says so and every test counts as ignored.

#![allow(clippy::print_stdout, reason = "says why it is skipped")]

use std::fs;
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use tempfile::TempDir;

/// No start takes a tenth of this.
const LIMIT: Duration = Duration::from_secs(60);

/// Nobody's number on Debian and most others.
const NOBODY: &str = "65534:65534";

const SECRET: &str = "b1946ac92492d2347c6235b4d2611184";

fn main() {
    let missing = missing();
    if let Some(reason) = &missing {
        println!("skipped, all of it: {reason}");
    }
    let trials: [(&str, fn()); 6] = [
        ("the_file_needs_no_library", is_static),
        ("in_an_empty_root_it_starts_and_says_what_it_needs_to_run_ranks", in_an_empty_root),
        ("in_a_container_without_a_distribution_it_runs_ranks", in_a_container),
        ("launchers_of_two_nodes_meet_by_a_name_of_etc_hosts", by_name),
        ("in_a_root_of_a_distribution_it_runs_shell_programs_and_passes_on_their_codes", in_a_distribution),
        ("doctor_examines_a_container_without_a_distribution", doctor),
    ];
    let trial = |(name, test): (&str, fn())| {
        let outcome =
            move || catch_unwind(AssertUnwindSafe(test)).map_err(|_| Failed::from("see the panic above"));
        Trial::test(name, outcome).with_ignored_flag(missing.is_some())
    };
    libtest_mimic::run(&Arguments::from_args(), trials.into_iter().map(trial).collect()).exit();
}

fn missing() -> Option<String> {
    let Some(dist) = std::env::var_os("PACELINE_TEST_DIST") else {
        return Some(
            "PACELINE_TEST_DIST does not say where the launcher is; use cargo xtask dist".to_owned(),
        );
    };
    assert!(fs::exists(&dist).is_ok_and(|there| there), "{dist:?} is missing");
    let mounts = Command::new("unshare").args(["--mount", "true"]).output();
    (!mounts.is_ok_and(|output| output.status.success()))
        .then(|| "root is needed for file systems of the tests' own".to_owned())
}

fn dist() -> String {
    std::env::var("PACELINE_TEST_DIST").expect("the tests run with it alone")
}

/// What the launcher finds.
#[derive(Clone, Copy)]
enum Root {
    /// Itself.
    Empty,
    /// What container runtimes add to an image: /proc, /dev with shared memory, /etc/hosts, a mounted secret.
    Container,
    /// The distribution of this machine, and the same.
    Distribution,
}

/// Makes the root at $1 with the launcher $2, in a namespace of its own, and leaves the rest of the words to be run in it.
const EMPTY: &str = r#"
set -e
root=$1; launcher=$2; shift 2
mount -t tmpfs -o mode=755 tmpfs "$root"
cp "$launcher" "$root/paceline"; chmod 755 "$root/paceline"
mount -o remount,ro "$root"
"#;

const CONTAINER: &str = r#"
set -e
root=$1; launcher=$2; shift 2
mount -t tmpfs -o mode=755 tmpfs "$root"
cp "$launcher" "$root/paceline"; chmod 755 "$root/paceline"
mkdir -p "$root/proc" "$root/dev/shm" "$root/etc"
mount --bind /proc "$root/proc"
touch "$root/dev/null"; mount --bind /dev/null "$root/dev/null"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
echo "127.0.0.1 localhost node-0" > "$root/etc/hosts"
echo "$SECRET" > "$root/secret"; chown 65534 "$root/secret"; chmod 400 "$root/secret"
mount -o remount,ro "$root"
"#;

const DISTRIBUTION: &str = r#"
set -e
root=$1; launcher=$2; shift 2
mount --bind / "$root"
mount -t tmpfs -o mode=755 tmpfs "$root/mnt"
cp "$launcher" "$root/mnt/paceline"; chmod 755 "$root/mnt/paceline"
mount --bind /proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
touch "$root/dev/null"; mount --bind /dev/null "$root/dev/null"
mkdir "$root/dev/shm"; mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -o remount,ro "$root/mnt"
mount -o remount,ro,bind "$root"
"#;

/// A launcher in a root of its own. Removing the folder would detach the file systems over it.
struct Launcher {
    child: Child,
    _root: TempDir,
}

impl Launcher {
    fn finish(self) -> Output {
        self.child.wait_with_output().expect("it ends")
    }
}

/// The launcher with these words in such a root, as nobody; with no variable of ours.
fn launcher(root: Root, words: &[&str]) -> Launcher {
    let (make, path) = match root {
        Root::Empty => (EMPTY, "/paceline"),
        Root::Container => (CONTAINER, "/paceline"),
        Root::Distribution => (DISTRIBUTION, "/mnt/paceline"),
    };
    let place = tempfile::tempdir().expect("a folder");
    let enter = format!("{make}\nexec chroot --userspec={NOBODY} --groups= \"$root\" {path} \"$@\"");
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", &LIMIT.as_secs().to_string()]);
    command.args(["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", &enter, "sh"]);
    command.arg(place.path()).arg(dist()).args(words);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("SECRET", SECRET);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Launcher { child: command.spawn().expect("unshare starts"), _root: place }
}

fn run(root: Root, words: &[&str]) -> Output {
    launcher(root, words).finish()
}

fn text(output: &Output) -> String {
    let [out, err] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    format!("{}\n{out}{err}", output.status)
}

fn is_static() {
    let output = Command::new("ldd").arg(dist()).output().expect("ldd runs");
    let said = text(&output);
    assert!(said.contains("statically linked") || said.contains("not a dynamic executable"), "{said}");
}

fn in_an_empty_root() {
    let version = run(Root::Empty, &["--version"]);
    assert!(version.status.success() && text(&version).contains("paceline "), "{}", text(&version));
    let env = run(Root::Empty, &["env"]);
    assert!(env.status.success(), "{}", text(&env));
    // Keys need a place, and there is none.
    let job = run(Root::Empty, &["run", "--", "/paceline", "--version"]);
    let said = text(&job);
    assert_eq!(job.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot store the ranks' certificates"), "{said}");
    assert_eq!(String::from_utf8_lossy(&job.stderr).lines().count(), 1, "{said}");
}

fn in_a_container() {
    let output = run(Root::Container, &["bench", "all_reduce", "--ranks", "2", "-b", "4", "-e", "1K"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1024"), "{said}");
}

fn by_name() {
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let endpoint = format!("node-0:{port}");
    let nodes = ["1", "0"].map(|node| {
        let job = ["run", "--nnodes", "2", "--node-rank", node, "--rdzv-endpoint", &endpoint];
        launcher(
            Root::Container,
            &[&job[..], &["--job-secret", "/secret", "--", "/paceline", "--version"]].concat(),
        )
    });
    for node in nodes {
        let output = node.finish();
        assert!(output.status.success(), "{}", text(&output));
        assert!(text(&output).contains("]: paceline "), "{}", text(&output));
    }
}

fn in_a_distribution() {
    let script = "id -u; touch /somewhere 2> /dev/null || echo read-only; exit 7";
    let output = run(Root::Distribution, &["run", "-n", "2", "--", "sh", "-c", script]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(said.contains("]: 65534") && said.contains("]: read-only"), "{said}");
}

fn doctor() {
    let output = run(Root::Container, &["doctor", "--wait", "1"]);
    let said = text(&output);
    assert!(output.status.code().is_some_and(|code| code <= 1), "{said}");
    assert!(said.contains("memfd_create works"), "{said}");
}
