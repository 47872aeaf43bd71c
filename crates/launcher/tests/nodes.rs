//! Jobs of several nodes: several launchers on this machine, which know each other by a secret alone.

#![allow(clippy::print_stderr, reason = "ranks talk to the test by their output")]

mod job;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use job::{Finished, Job, now_us, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use paceline_transport::identity::JobAuthority;
use tempfile::TempDir;

/// The contract: every other rank knows within this time.
const AT_ONCE_US: u128 = 1_000_000;

/// What the nodes of these jobs share.
const SECRET: &str = "b1946ac92492d2347c6235b4d2611184";

fn main() {
    job::main(rank, || {
        vec![
            trial("two_nodes_of_two_ranks_run_collectives_and_both_launchers_exit_with_0", run_to_the_end),
            trial(
                "a_killed_rank_is_peer_lost_everywhere_within_1_s_and_named_by_both_launchers",
                killed_rank,
            ),
            trial("a_rank_of_node_0_that_fails_is_named_by_both_launchers", failed_rank),
            trial("a_killed_launcher_ends_the_job_on_the_other_nodes", killed_launcher),
            trial("when_launcher_0_is_killed_the_others_end", killed_launcher_0),
            trial("a_node_that_is_told_to_stop_ends_the_others", stopped),
            trial(
                "launcher_0_waits_for_the_ranks_of_other_nodes_says_so_and_can_be_stopped",
                waiting_at_the_end,
            ),
            trial("a_node_with_another_secret_is_refused_in_one_line", wrong_secret),
            trial("a_node_with_other_numbers_is_refused_with_both", wrong_numbers),
            trial("a_node_that_is_taken_is_refused_by_name", taken),
            trial("a_node_that_is_started_again_before_the_others_have_come_takes_its_place", started_again),
            trial("who_waits_for_node_0_says_so_and_goes_on_when_it_comes", late_node_0),
            trial("a_missing_node_is_named_at_the_deadline_on_all_others", missing_node),
            trial("a_missing_node_0_is_named_at_the_deadline", missing_node_0),
            trial("a_launcher_that_waits_for_others_ends_on_sigterm", stopped_while_waiting),
            trial("certificates_are_renewed_on_all_nodes_while_the_job_goes_on_making_connections", renewed),
            trial("nodes_with_certificates_from_files_need_no_secret", given_identities),
            trial("a_certificate_in_the_wrong_folder_is_refused_in_one_line", given_wrong_identities),
            trial("secrets_are_in_no_log_no_environment_and_no_file_that_others_can_read", secrets_kept),
        ]
    });
}

/// What all nodes of a job have in common.
struct Nodes {
    folder: TempDir,
    endpoint: String,
    count: usize,
}

impl Nodes {
    fn new(count: usize) -> Self {
        let nodes = Self { folder: tempfile::tempdir().expect("a folder"), endpoint: free_endpoint(), count };
        nodes.secret("secret", SECRET);
        nodes
    }

    /// A file with a secret.
    fn secret(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("changed");
        path
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("text").to_owned()
    }

    /// Starts a node of two ranks.
    fn start(&self, node: usize, flags: &[&str], part: &str) -> Job {
        self.start_with("secret", node, flags, part)
    }

    fn start_with(&self, secret: &str, node: usize, flags: &[&str], part: &str) -> Job {
        let secret = self.path(secret);
        self.launch(node, &[&["--job-secret", &secret], flags].concat(), &[], part)
    }

    fn launch(&self, node: usize, flags: &[&str], variables: &[(&str, &str)], part: &str) -> Job {
        let (count, node) = (self.count.to_string(), node.to_string());
        let defaults = [
            ["--nnodes", &count],
            ["--node-rank", &node],
            ["--rdzv-endpoint", &self.endpoint],
            ["--nproc-per-node", "2"],
            ["--bind", "none"],
        ];
        let defaults: Vec<&str> =
            defaults.into_iter().filter(|[name, _]| !flags.contains(name)).flatten().collect();
        // Ranks of one machine: they are to use what ranks of several would.
        let variables = [&[("PACELINE_SHARED_MEMORY", "off")], variables].concat();
        Job::launch(&[&defaults[..], flags].concat(), &variables, part, &[&self.path("stop")])
    }
}

/// An address of this machine whose port nobody has.
fn free_endpoint() -> String {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").to_string()
}

fn kill(signal: &str, pid: &str) {
    assert!(Command::new("kill").args([signal, pid]).status().expect("kill runs").success());
}

/// The line of the launcher's report.
fn report(finished: &Finished) -> &str {
    let lines = finished.lines.iter().filter_map(|line| line.strip_prefix("paceline: "));
    let reports: Vec<&str> = lines.filter(|line| !line.starts_with("waiting for ")).collect();
    assert_eq!(reports.len(), 1, "one line says why:\n{}", finished.lines.join("\n"));
    reports[0]
}

fn run_to_the_end() {
    let nodes = Nodes::new(2);
    let [first, second] = [0, 1].map(|node| nodes.start(node, &[], "sum"));
    for (node, finished) in [first.finish(), second.finish()].into_iter().enumerate() {
        finished.assert_success();
        let sums = finished.lines_with("sum 10 of 4 ranks");
        assert_eq!(sums.len(), 2, "{}", finished.lines.join("\n"));
        for rank in [2 * node, 2 * node + 1] {
            assert!(sums.iter().any(|line| line.starts_with(&format!("[{rank}]: rank {rank} "))), "{sums:?}");
        }
    }
}

/// Two nodes whose ranks loop, and the pid of a rank.
fn looping(victim: usize) -> (Nodes, [Job; 2], String) {
    let nodes = Nodes::new(2);
    let mut jobs = [0, 1].map(|node| nodes.start(node, &["--grace", "5"], "loop"));
    let pids: Vec<String> = jobs.iter_mut().flat_map(|job| job.wait_for(" looping as ", 2)).collect();
    let line = pids.iter().find(|line| line.contains(&format!("rank {victim} "))).expect("each rank says so");
    let pid = line.rsplit(' ').next().expect("the line ends with the pid").to_owned();
    (nodes, jobs, pid)
}

/// Each rank but those of `dead` nodes has failed because of one of `culprits`, within the time.
fn assert_failed(finished: &Finished, count: usize, culprits: &[usize], since_us: u128, limit_us: u128) {
    let errors = finished.lines_with("failed at ");
    assert_eq!(errors.len(), count, "{}", finished.lines.join("\n"));
    for line in errors {
        let named = culprits.iter().any(|rank| line.contains(&format!("lost rank {rank} in ")));
        assert!(named, "none of {culprits:?} in: {line}");
        let at = line.split("failed at ").nth(1).and_then(|rest| rest.split(' ').next());
        let at: u128 = at.and_then(|at| at.parse().ok()).expect("the line has the time");
        let elapsed_us = at.saturating_sub(since_us);
        assert!(elapsed_us < limit_us, "after {elapsed_us} us: {line}");
    }
}

fn killed_rank() {
    let (_nodes, [first, second], pid) = looping(3);
    let before = now_us();
    kill("-9", &pid);
    let [first, second] = [first.finish(), second.finish()];
    assert_failed(&first, 2, &[3], before, AT_ONCE_US);
    assert_failed(&second, 1, &[3], before, AT_ONCE_US);
    assert_eq!((first.status.code(), second.status.code()), (Some(137), Some(137)));
    let here = report(&second);
    assert!(here.starts_with(&format!("rank 3 (pid {pid}) was killed by signal 9 (SIGKILL)")), "{here}");
    let there = report(&first);
    assert_eq!(there, "rank 3 on node 1 was killed by signal 9 (SIGKILL); the job has ended");
}

fn failed_rank() {
    let nodes = Nodes::new(2);
    let [first, second] = [0, 1].map(|node| nodes.start(node, &[], "exit-7"));
    let [first, second] = [first.finish(), second.finish()];
    assert_eq!((first.status.code(), second.status.code()), (Some(7), Some(7)));
    assert!(report(&first).starts_with("rank 1 (pid "), "{}", report(&first));
    assert_eq!(report(&second), "rank 1 on node 0 exited with code 7; the job has ended");
    for finished in [&first, &second] {
        assert!(!finished.lines_with("lost rank 1 in barrier").is_empty(), "{}", finished.lines.join("\n"));
    }
}

fn killed_launcher() {
    let (_nodes, [first, mut second], _) = looping(2);
    let before = now_us();
    second.launcher.kill().expect("it runs");
    let first = first.finish();
    assert_failed(&first, 2, &[2, 3], before, 12_000_000);
    assert_eq!(first.status.code(), Some(138));
    let text = report(&first);
    assert!(text.starts_with("the launcher of node 1 was lost: "), "{text}");
}

fn killed_launcher_0() {
    let (_nodes, [mut first, second], _) = looping(2);
    let before = Instant::now();
    first.launcher.kill().expect("it runs");
    let second = second.finish();
    assert!(before.elapsed() < Duration::from_secs(15), "after {:?}", before.elapsed());
    assert_eq!(second.status.code(), Some(138));
    let text = report(&second);
    assert!(text.starts_with("the launcher of node 0 was lost: "), "{text}");
}

fn stopped() {
    let (_nodes, [first, second], _) = looping(2);
    kill("-TERM", &second.launcher.id().to_string());
    let [first, second] = [first.finish(), second.finish()];
    assert_eq!((first.status.code(), second.status.code()), (Some(143), Some(143)));
    assert_eq!(report(&second), "stopped by signal 15 (SIGTERM)");
    let text = report(&first);
    assert!(text.contains(" on node 1 was killed by signal 15 (SIGTERM)"), "{text}");
}

fn waiting_at_the_end() {
    let nodes = Nodes::new(2);
    let [mut first, mut second] = [0, 1].map(|node| nodes.start(node, &[], "node-1-goes-on"));
    second.wait_for(" goes on", 2);
    let line = first.wait_for("those here have ended", 1).remove(0);
    assert_eq!(line, "paceline: waiting for the ranks of node 1; those here have ended");
    kill("-TERM", &first.launcher.id().to_string());
    let [first, second] = [first.finish(), second.finish()];
    assert_eq!((first.status.code(), second.status.code()), (Some(143), Some(138)));
    assert_eq!(report(&first), "stopped by signal 15 (SIGTERM)");
    assert!(report(&second).starts_with("the launcher of node 0 was lost: "), "{}", report(&second));
}

fn wrong_secret() {
    let nodes = Nodes::new(2);
    nodes.secret("other", "00000000000000000000000000000000");
    let mut first = nodes.start(0, &["--rdzv-timeout", "60"], "sum");
    first.wait_for("waiting for node 1 to come to", 1);
    let finished = nodes.start_with("other", 1, &[], "sum").finish();
    assert_eq!(finished.status.code(), Some(1));
    let expected = format!(
        "the nodes have not met at {}: what answers there does not have this job secret; give every node the \
         same secret",
        nodes.endpoint
    );
    assert_eq!(report(&finished), expected);
    // The job goes on: the right one may still come.
    let second = nodes.start(1, &[], "sum");
    first.finish().assert_success();
    second.finish().assert_success();
}

fn wrong_numbers() {
    let nodes = Nodes::new(2);
    let mut first = nodes.start(0, &[], "sum");
    first.wait_for("waiting for node 1", 1);
    let finished = nodes.start(1, &["--nproc-per-node", "3"], "sum").finish();
    let text = report(&finished);
    assert!(text.ends_with("node 0 was started with --nproc-per-node 2 and node 1 with 3"), "{text}");
    let finished = nodes.start(2, &["--nnodes", "3"], "sum").finish();
    let text = report(&finished);
    assert!(text.ends_with("node 0 was started with --nnodes 2 and node 2 with 3"), "{text}");
}

fn taken() {
    let nodes = Nodes::new(3);
    let mut first = nodes.start(0, &[], "sum");
    first.wait_for("waiting for node 1, node 2", 1);
    let mut second = nodes.start(1, &[], "sum");
    second.wait_for("waiting for node 2", 1);
    let another = nodes.start(1, &[], "sum");
    let finished = another.finish();
    let text = report(&finished);
    assert!(text.ends_with("node 1 is taken by a live launcher at 127.0.0.1"), "{text}");
}

fn started_again() {
    let nodes = Nodes::new(3);
    let first = nodes.start(0, &[], "sum");
    let mut lost = nodes.start(1, &[], "sum");
    lost.wait_for("waiting for node 2", 1);
    lost.launcher.kill().expect("it runs");
    let again = nodes.start(1, &[], "sum");
    let third = nodes.start(2, &[], "sum");
    for job in [first, again, third] {
        let finished = job.finish();
        finished.assert_success();
        assert_eq!(finished.lines_with("sum 21 of 6 ranks").len(), 2, "{}", finished.lines.join("\n"));
    }
}

fn late_node_0() {
    let nodes = Nodes::new(2);
    let mut second = nodes.start(1, &[], "sum");
    let line = second.wait_for("waiting for node 0", 1).remove(0);
    assert_eq!(line, format!("paceline: waiting for node 0 at {} (nothing listens there)", nodes.endpoint));
    let first = nodes.start(0, &[], "sum");
    first.finish().assert_success();
    let second = second.finish();
    second.assert_success();
    let lines = second.lines.iter().filter(|line| line.contains("waiting for node 0"));
    assert_eq!(lines.count(), 1, "{}", second.lines.join("\n"));
}

fn missing_node() {
    let nodes = Nodes::new(3);
    let [first, second] = [0, 1].map(|node| nodes.start(node, &["--rdzv-timeout", "4"], "sum"));
    for finished in [first.finish(), second.finish()] {
        assert_eq!(finished.status.code(), Some(1));
        let text = report(&finished);
        assert!(text.ends_with("timed out waiting for node 2"), "{text}");
        assert!(finished.lines_with("sum").is_empty(), "no rank was started");
    }
}

fn missing_node_0() {
    let nodes = Nodes::new(2);
    let finished = nodes.start(1, &["--rdzv-timeout", "2"], "sum").finish();
    assert_eq!(finished.status.code(), Some(1));
    let text = report(&finished);
    assert!(text.contains(&nodes.endpoint) && text.contains("waiting for node 0: nothing listens"), "{text}");
}

fn stopped_while_waiting() {
    let nodes = Nodes::new(2);
    for (node, whom) in [(0, "waiting for node 1"), (1, "waiting for node 0")] {
        let mut job = nodes.start(node, &[], "sum");
        job.wait_for(whom, 1);
        kill("-TERM", &job.launcher.id().to_string());
        let finished = job.finish();
        assert_eq!(finished.status.code(), Some(143));
        assert_eq!(report(&finished), "stopped by signal 15 (SIGTERM)");
    }
}

/// In seconds. Renewed after two thirds; the job goes on until every leaf of its start has expired.
const SHORT_LIFE: &str = "9";

fn renewed() {
    let nodes = Nodes::new(2);
    let secret = nodes.path("secret");
    let jobs = [0, 1].map(|node| {
        let variables = [("PACELINE_CERTIFICATE_LIFE", SHORT_LIFE), ("PACELINE_JOB_SECRET_FILE", &secret)];
        nodes.launch(node, &[], &variables, "split")
    });
    for finished in jobs.map(Job::finish) {
        finished.assert_success();
        let ranks = finished.lines_with("has seen 2 renewals");
        assert_eq!(ranks.len(), 2, "{}", finished.lines.join("\n"));
    }
}

/// Writes certificates for members as cert-manager does, in a folder for each.
fn give_identities(folder: &Path, authority: &JobAuthority, members: &[&str], life: Duration) {
    for member in members {
        let bundle = authority.issue(member, life).expect("a name").to_pem();
        let place = folder.join(member);
        fs::create_dir_all(&place).expect("made");
        let parts: Vec<&str> = bundle.split_inclusive("-----\n").collect();
        for (name, part) in ["tls.key", "tls.crt", "ca.crt"].iter().zip(parts.chunks(2)) {
            // In one step, as the kubelet does.
            fs::write(place.join("new"), part.concat()).expect("written");
            fs::set_permissions(place.join("new"), fs::Permissions::from_mode(0o600)).expect("changed");
            fs::rename(place.join("new"), place.join(name)).expect("renamed");
        }
    }
}

const MEMBERS: [&str; 6] = ["launcher-0", "launcher-1", "worker-0", "worker-1", "worker-2", "worker-3"];

fn given_identities() {
    let nodes = Nodes::new(2);
    let authority = JobAuthority::new("given").expect("a name");
    give_identities(nodes.folder.path(), &authority, &MEMBERS, Duration::from_secs(3600));
    let folder = nodes.path("");
    let second = nodes.launch(1, &["--identity", &folder], &[], "sum");
    let first = nodes.launch(0, &["--identity", &folder], &[], "sum");
    for finished in [first.finish(), second.finish()] {
        finished.assert_success();
        assert_eq!(finished.lines_with("sum 10 of 4 ranks").len(), 2, "{}", finished.lines.join("\n"));
    }
    // Of the same names, but another authority's: nobody lets it in.
    let stranger = Nodes::new(2);
    let other = JobAuthority::new("given").expect("a name");
    give_identities(stranger.folder.path(), &other, &MEMBERS, Duration::from_secs(3600));
    let mut first = nodes.launch(0, &["--identity", &folder], &[], "sum");
    first.wait_for("waiting for node 1 to come to", 1);
    let elsewhere = stranger.path("");
    let finished = nodes.launch(1, &["--identity", &elsewhere], &[], "sum").finish();
    assert_eq!(finished.status.code(), Some(1));
    assert!(report(&finished).contains("its certificate is not of this job"), "{}", report(&finished));
}

fn given_wrong_identities() {
    let nodes = Nodes::new(2);
    let authority = JobAuthority::new("given").expect("a name");
    give_identities(nodes.folder.path(), &authority, &MEMBERS, Duration::from_secs(3600));
    let folder = nodes.path("");
    let refused = |expected: &str| {
        let finished = nodes.launch(1, &["--identity", &folder], &[], "sum").finish();
        assert_eq!(finished.status.code(), Some(2));
        let text = report(&finished);
        assert!(text.starts_with("the identity ") && text.contains(expected), "{text}");
    };
    let key = nodes.folder.path().join("worker-3/tls.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("changed");
    refused("worker-3: tls.key: all users of this machine can read it");
    fs::rename(nodes.folder.path().join("worker-1"), nodes.folder.path().join("aside")).expect("renamed");
    fs::remove_dir_all(nodes.folder.path().join("worker-3")).expect("removed");
    refused("worker-3: tls.key: No such file");
    fs::rename(nodes.folder.path().join("aside"), nodes.folder.path().join("worker-3")).expect("renamed");
    refused("worker-3: it names worker-1 of given, not worker-3 of given");
}

fn secrets_kept() {
    let nodes = Nodes::new(2);
    let secret = nodes.path("secret");
    let mut jobs = [0, 1].map(|node| {
        let variables = [("PACELINE_LOG", "trace"), ("PACELINE_JOB_SECRET_FILE", &secret)];
        nodes.launch(node, &[], &variables, "traced-loop")
    });
    for job in &mut jobs {
        let pids = job.wait_for(" looping as ", 2);
        for line in &pids {
            let pid = line.rsplit(' ').next().expect("the line ends with the pid");
            let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).expect("the rank runs");
            let environment = String::from_utf8_lossy(&read("environ")).into_owned();
            for word in [SECRET, "PRIVATE KEY", "PACELINE_JOB_SECRET_FILE"] {
                assert!(!environment.contains(word), "{word} is in the environment of a rank");
            }
            assert!(!String::from_utf8_lossy(&read("cmdline")).contains(SECRET));
            let identity = environment.split('\0').find_map(|line| line.strip_prefix("PACELINE_IDENTITY="));
            let identity = Path::new(identity.expect("the rank has one"));
            let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
            assert_eq!(mode(identity), 0o600);
            assert_eq!(mode(identity.parent().expect("a folder")), 0o700);
        }
        let arguments = fs::read(format!("/proc/{}/cmdline", job.launcher.id())).expect("the launcher runs");
        assert!(!String::from_utf8_lossy(&arguments).contains(SECRET));
    }
    for job in &jobs {
        kill("-TERM", &job.launcher.id().to_string());
    }
    for finished in jobs.map(Job::finish) {
        assert!(finished.lines.iter().any(|line| line.contains(" TRACE ")), "everything is logged");
        for word in [SECRET, "PRIVATE KEY"] {
            let told = finished.lines.iter().find(|line| line.contains(word));
            assert_eq!(told, None, "a secret is in the log");
        }
    }
}

fn rank(part: &str, _: &[String]) {
    let number: usize = std::env::var("RANK").ok().and_then(|rank| rank.parse().ok()).expect("a rank");
    if part == "traced-loop" {
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
    if let Err(error) = play(part) {
        eprintln!("rank {number} failed at {} with: {error}", now_us());
        std::process::exit(1);
    }
}

/// Counts how often this rank's certificate was replaced.
struct Renewals {
    path: PathBuf,
    seen: Vec<u64>,
}

impl Renewals {
    fn new() -> Self {
        let path = std::env::var_os("PACELINE_IDENTITY").expect("the launcher sets it").into();
        let mut renewals = Self { path, seen: Vec::new() };
        renewals.count();
        renewals
    }

    fn count(&mut self) -> usize {
        let text = fs::read(&self.path).expect("there is always one");
        let version = text.iter().fold(0u64, |hash, &byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        if self.seen.last() != Some(&version) {
            self.seen.push(version);
        }
        self.seen.len() - 1
    }
}

fn play(part: &str) -> Result<(), paceline_runtime::Error> {
    let mut world = World::join()?;
    let (rank, size) = (world.rank(), world.world_size());
    let mut buffer = vec![0.0f32; 1_000_000];
    match part {
        "sum" => {
            buffer.fill(rank as f32 + 1.0);
            world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?;
            assert!(buffer.iter().all(|&sum| sum == buffer[0]), "elements differ");
            eprintln!("rank {rank} has the sum {} of {size} ranks", buffer[0]);
        }
        "loop" | "traced-loop" => {
            for round in 0.. {
                world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?;
                if round == 0 {
                    eprintln!("rank {rank} looping as {}", std::process::id());
                }
            }
        }
        "split" => {
            let mut renewals = Renewals::new();
            let start = Instant::now();
            let life = Duration::from_secs(SHORT_LIFE.parse().expect("a number"));
            let mut going_on = [1u8];
            while going_on == [1] {
                world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?;
                let half = world.communicator().split(Some(rank as u32 % 2), 0)?;
                let mut half = half.expect("every rank has a colour");
                half.all_reduce(&mut [1.0f32; 100], ReduceOp::Sum)?;
                half.leave()?;
                going_on = [u8::from(renewals.count() < 2 || start.elapsed() < life)];
                world.communicator().all_reduce(&mut going_on, ReduceOp::Max)?;
            }
            eprintln!("rank {rank} has seen {} renewals", renewals.count());
        }
        "node-1-goes-on" => {
            world.leave()?;
            if rank >= 2 {
                eprintln!("rank {rank} goes on");
                // The launcher ends it.
                std::thread::sleep(job::PATIENCE);
            }
            return Ok(());
        }
        "exit-7" => {
            world.communicator().barrier()?;
            if rank == 1 {
                std::process::exit(7);
            }
            world.communicator().barrier()?;
        }
        _ => panic!("no such part: {part}"),
    }
    world.leave()
}
