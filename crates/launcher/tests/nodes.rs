//! Jobs of several nodes: several launchers on this machine, which know each other by a secret alone.

#![allow(clippy::print_stderr, reason = "ranks talk to the test by their output")]

mod job;

use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use job::sockets::Socket;
use job::{Finished, Job, now_us, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use paceline_transport::IoThread;
use paceline_transport::identity::JobAuthority;
use paceline_transport::tls::Dialler;
use tempfile::TempDir;

/// The contract: every other rank knows within this time.
const AT_ONCE_US: u128 = 1_000_000;

/// What the nodes of these jobs share.
const SECRET: &str = "b1946ac92492d2347c6235b4d2611184";

fn main() {
    let no_ipv6 = TcpListener::bind("[::1]:0").is_err();
    job::main(rank, || {
        vec![
            trial("two_nodes_of_two_ranks_run_collectives_and_both_launchers_exit_with_0", run_to_the_end),
            trial("two_of_three_nodes_are_all_ranks_when_no_other_one_comes", two_of_three),
            trial(
                "a_killed_rank_is_peer_lost_everywhere_within_1_s_and_named_by_both_launchers",
                killed_rank,
            ),
            trial("a_rank_of_node_0_that_fails_is_named_by_both_launchers", failed_rank),
            trial("a_killed_launcher_ends_the_job_on_the_other_nodes", killed_launcher),
            trial("when_launcher_0_is_killed_the_others_end", killed_launcher_0),
            trial("a_node_that_is_told_to_stop_ends_the_others", stopped),
            trial("a_job_whose_lease_is_damaged_ends_on_all_nodes_and_says_so", damaged_lease),
            trial("a_job_whose_lease_is_another_jobs_does_not_start", foreign_lease),
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
            trial("certificates_from_files_that_others_replace_outlive_their_expiry", given_and_renewed),
            trial("certificates_from_files_that_nobody_replaces_make_no_connection_later", given_and_expired),
            trial("a_certificate_in_the_wrong_folder_is_refused_in_one_line", given_wrong_identities),
            trial("ranks_listen_on_and_dial_from_the_interface_that_is_chosen_over_quic", || {
                interfaces("quic")
            }),
            trial("ranks_listen_on_and_dial_from_the_interface_that_is_chosen_over_tls", || {
                interfaces("tls")
            }),
            trial("an_interface_chosen_for_one_machine_has_the_rendezvous_too", interface_of_one_machine),
            trial("nodes_meet_and_link_up_over_ipv6_and_quic", || over_ipv6("quic"))
                .with_ignored_flag(no_ipv6),
            trial("nodes_meet_and_link_up_over_ipv6_and_tls", || over_ipv6("tls")).with_ignored_flag(no_ipv6),
            trial("an_insecure_job_needs_no_secret_and_warns_of_what_is_not_protected", insecure),
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
        Self::meeting_at(free_endpoint("127.0.0.1:0"), count)
    }

    fn meeting_at(endpoint: String, count: usize) -> Self {
        let nodes = Self { folder: tempfile::tempdir().expect("a folder"), endpoint, count };
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

/// This address of this machine with a port that nobody has.
fn free_endpoint(address: &str) -> String {
    TcpListener::bind(address).and_then(|listener| listener.local_addr()).expect("a port").to_string()
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

/// Node 2 has the ranks after those of node 0, with the certificates of its own place.
fn two_of_three() {
    let nodes = Nodes::new(3);
    let flags = ["--nnodes", "2:3", "--rdzv-backend", "c10d", "--rdzv-conf", "last_call_timeout=0.5"];
    let [first, third] = [0, 2].map(|node| nodes.start(node, &flags, "sum"));
    for (finished, ranks) in [(first.finish(), [0, 1]), (third.finish(), [2, 3])] {
        finished.assert_success();
        let sums = finished.lines_with("sum 10 of 4 ranks");
        assert_eq!(sums.len(), 2, "{}", finished.lines.join("\n"));
        for rank in ranks {
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

fn damaged_lease() {
    let nodes = Nodes::new(2);
    let lease = nodes.path("lease");
    let [mut first, mut second] = [0, 1].map(|node| nodes.start(node, &["--lease", &lease], "loop"));
    first.wait_for("looping", 2);
    second.wait_for("looping", 2);
    fs::write(&lease, "paceline-lease 1 nonsense").expect("written");
    let [first, second] = [first.finish(), second.finish()];
    for finished in [&first, &second] {
        let text = report(finished);
        let expected = format!("the launcher of node 0 may not go on: the lease: {lease}: it is damaged; ");
        assert!(text.starts_with(&expected), "{text}");
        assert_eq!(finished.status.code(), Some(1), "nobody is asked to start it again");
    }
}

fn foreign_lease() {
    let nodes = Nodes::new(2);
    let lease = nodes.path("lease");
    let jobs = [0, 1].map(|node| nodes.start(node, &["--lease", &lease], "sum"));
    jobs.map(Job::finish).iter().for_each(Finished::assert_success);
    let again = [0, 1].map(|node| nodes.start(node, &["--lease", &lease], "sum"));
    again.map(Job::finish).iter().for_each(Finished::assert_success);
    let other = Nodes::new(2).start(0, &["--lease", &lease], "sum").finish();
    let text = other.report();
    assert!(text.starts_with(&format!("the lease: {lease}: it is the lease of the job at ")), "{text}");
    assert_eq!(other.status.code(), Some(2));
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
        let place = tempfile::tempdir().expect("a temporary folder");
        let (secret, folder) = (nodes.path("secret"), place.path().to_str().expect("a plain name"));
        let mut job = nodes.launch(node, &["--job-secret", &secret], &[("TMPDIR", folder)], "sum");
        job.wait_for(whom, 1);
        kill("-TERM", &job.launcher.id().to_string());
        let finished = job.finish();
        assert_eq!(finished.status.code(), Some(143));
        assert_eq!(report(&finished), "stopped by signal 15 (SIGTERM)");
        let left: Vec<_> = fs::read_dir(folder).expect("it can be read").collect();
        assert!(left.is_empty(), "private keys are left behind: {left:?}");
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
    let folder = nodes.path("");
    let mut second = nodes.launch(1, &["--identity", &folder], &[], "sum");
    second.wait_for("waiting for the identity ", 1);
    give_identities(nodes.folder.path(), &authority, &MEMBERS, Duration::from_secs(3600));
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

/// A volume of certificates as the kubelet mounts it: each version in a folder of its own, behind a link that is turned
/// in one step when there is a new one.
struct Volume {
    folder: TempDir,
    authority: JobAuthority,
    versions: usize,
}

impl Volume {
    fn mount(life: Duration) -> Self {
        let authority = JobAuthority::new("given").expect("a name");
        let mut volume = Self { folder: tempfile::tempdir().expect("a folder"), authority, versions: 0 };
        volume.renew(life);
        for member in MEMBERS {
            symlink(format!("..data/{member}"), volume.folder.path().join(member)).expect("linked");
        }
        volume
    }

    fn path(&self) -> &str {
        self.folder.path().to_str().expect("text")
    }

    /// Replaces all certificates and keys.
    fn renew(&mut self, life: Duration) {
        let folder = self.folder.path();
        let version = |number: usize| format!("..version-{number}");
        give_identities(&folder.join(version(self.versions)), &self.authority, &MEMBERS, life);
        symlink(version(self.versions), folder.join("..data_tmp")).expect("linked");
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).expect("renamed");
        if let Some(old) = self.versions.checked_sub(2) {
            fs::remove_dir_all(folder.join(version(old))).expect("removed");
        }
        self.versions += 1;
    }

    /// Whether launcher 0 lets a member in, whose own certificate is good.
    fn is_served_at(&self, endpoint: &str) -> bool {
        let io = IoThread::start().expect("a thread");
        let member = self.authority.issue("worker-0", Duration::from_secs(60)).expect("a name");
        let dialler = Dialler::new(&io.handle(), &member).expect("a good identity");
        let addr = endpoint.parse().expect("an address");
        let dial = async move { dialler.connect(addr, "launcher-0").await.map(drop) };
        io.handle().block_on(dial).expect("io runs").inspect_err(|error| eprintln!("{error}")).is_ok()
    }
}

fn given_and_renewed() {
    let nodes = Nodes::new(2);
    let life = Duration::from_secs(SHORT_LIFE.parse().expect("a number"));
    let mut volume = Volume::mount(life);
    let start = |node| nodes.launch(node, &["--identity", volume.path()], &[], "split-until-told");
    let mut jobs = [0, 1].map(start);
    let mounted = Instant::now();
    for job in &mut jobs {
        job.wait_for(" has made groups", 2);
    }
    while mounted.elapsed() < life + Duration::from_secs(1) {
        std::thread::sleep(life / 3);
        volume.renew(life);
    }
    // Half a second until all have seen the last one; but its predecessor is good for a while.
    assert!(volume.is_served_at(&nodes.endpoint), "launcher 0 shows a certificate that nobody takes");
    fs::write(nodes.path("stop"), "").expect("written");
    for finished in jobs.map(Job::finish) {
        finished.assert_success();
        assert_eq!(finished.lines_with("has seen ").len(), 2, "{}", finished.lines.join("\n"));
    }
}

fn given_and_expired() {
    let nodes = Nodes::new(2);
    let volume = Volume::mount(Duration::from_secs(7));
    let flags = ["--identity", volume.path(), "--timeout", "3"];
    for finished in [0, 1].map(|node| nodes.launch(node, &flags, &[], "split-until-told")).map(Job::finish) {
        assert_ne!(finished.status.code(), Some(0));
        let made = finished.lines_with(" has made groups").len();
        assert_eq!(made, 2, "they could before:\n{}", finished.lines.join("\n"));
        let failed = finished.lines_with(": split #");
        let in_vain = failed.iter().filter(|line| line.contains("timed out")).count();
        assert!(in_vain > 0, "{}", finished.lines.join("\n"));
    }
}

fn given_wrong_identities() {
    let nodes = Nodes::new(2);
    let authority = JobAuthority::new("given").expect("a name");
    give_identities(nodes.folder.path(), &authority, &MEMBERS, Duration::from_secs(3600));
    let folder = nodes.path("");
    let refused = |expected: &str| {
        let flags = ["--identity", &folder, "--rdzv-timeout", "0.5"];
        let finished = nodes.launch(1, &flags, &[], "sum").finish();
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

/// Node 0 has one address and node 1 another; they meet at a third.
fn interfaces(links: &str) {
    const ADDRESSES: [&str; 2] = ["127.0.0.2", "127.0.0.3"];
    let nodes = Nodes::new(2);
    let secret = nodes.path("secret");
    let jobs = [0, 1].map(|node| {
        let flags = ["--job-secret", &secret, "--interface", ADDRESSES[node]];
        nodes.launch(node, &flags, &[("PACELINE_FABRIC", links)], "sockets")
    });
    let meeting: SocketAddr = nodes.endpoint.parse().expect("an address");
    for (node, finished) in jobs.map(Job::finish).into_iter().enumerate() {
        finished.assert_success();
        let [own, other] =
            [ADDRESSES[node], ADDRESSES[1 - node]].map(|ip| ip.parse::<IpAddr>().expect("one"));
        for rank in [2 * node, 2 * node + 1] {
            let (to_launcher, links_of): (Vec<Socket>, Vec<Socket>) =
                finished.sockets(rank).into_iter().partition(|socket| socket.remote == meeting);
            assert_eq!(to_launcher.len(), 1, "{to_launcher:?}");
            assert!(links_of.iter().all(|socket| socket.local.ip() == own), "rank {rank}: {links_of:?}");
            // Over QUIC one socket has all links. Two ranks of the other node are two links, of two connections each.
            let far = links_of.iter().filter(|socket| socket.remote.ip() == other).count();
            let doors = links_of.iter().filter(|socket| socket.remote.port() == 0).count();
            let expected = if links == "tls" { (4, 1) } else { (0, 1) };
            assert_eq!((far, doors), expected, "rank {rank}: {links_of:?}");
        }
    }
}

fn interface_of_one_machine() {
    let flags = ["--interface", "127.0.0.4"];
    let variables = [("PACELINE_FABRIC", "tls"), ("PACELINE_INTERFACE", "127.0.0.5")];
    let finished = Job::launch(&[&flags[..], &["-n", "2"]].concat(), &variables, "sockets", &[]).finish();
    finished.assert_success();
    let address: IpAddr = [127, 0, 0, 4].into();
    for rank in [0, 1] {
        let (own, others): (Vec<Socket>, Vec<Socket>) =
            finished.sockets(rank).into_iter().partition(|socket| socket.local.ip() == address);
        // The door, and a link of two connections.
        assert_eq!(own.len(), 3, "{own:?}");
        // The rendezvous: the system chooses the near end.
        assert_eq!(others.len(), 1, "{others:?}");
        assert_eq!(others[0].remote.ip(), address);
    }
}

fn over_ipv6(links: &str) {
    let nodes = Nodes::meeting_at(free_endpoint("[::1]:0"), 2);
    assert!(nodes.endpoint.starts_with("[::1]:"), "{}", nodes.endpoint);
    let secret = nodes.path("secret");
    let start =
        |node| nodes.launch(node, &["--job-secret", &secret], &[("PACELINE_FABRIC", links)], "sockets");
    let mut first = start(0);
    let line = first.wait_for("waiting for node 1", 1).remove(0);
    assert_eq!(line, format!("paceline: waiting for node 1 to come to {}", nodes.endpoint));
    let second = start(1);
    for (node, finished) in [first.finish(), second.finish()].into_iter().enumerate() {
        finished.assert_success();
        for rank in [2 * node, 2 * node + 1] {
            let sockets = finished.sockets(rank);
            assert!(sockets.iter().all(|socket| socket.local.ip() == Ipv6Addr::LOCALHOST), "{sockets:?}");
            assert_eq!(sockets.iter().any(|socket| !socket.is_tcp), links == "quic", "{sockets:?}");
        }
    }
}

fn insecure() {
    let nodes = Nodes::new(2);
    let flags = [&["--insecure"][..], &["--insecure", "--fabric", "tcp"]];
    for (flags, links) in flags.into_iter().zip(["tls", "tcp"]) {
        let jobs = [0, 1].map(|node| nodes.launch(node, flags, &[("PACELINE_FABRIC", "tls")], "links"));
        for finished in jobs.map(Job::finish) {
            finished.assert_success();
            assert_eq!(finished.lines_with(&format!(" is linked over {links}")).len(), 2, "{links}");
            let open = format!(
                "without a job secret anybody who reaches {} can join it, as any machine",
                nodes.endpoint
            );
            let plain = "; over tcp anybody on the way can read and change what ranks send each other";
            let plain = if links == "tcp" { plain } else { "" };
            assert_eq!(report(&finished), format!("warning: this job is insecure: {open}{plain}"));
        }
    }
    // Who has a secret lets nobody in that has none.
    let mut first = nodes.start(0, &[], "sum");
    first.wait_for("waiting for node 1", 1);
    let finished = nodes.launch(1, &["--insecure"], &[], "sum").finish();
    let refused = "what answers there does not have this job secret; give every node the same secret";
    assert!(finished.lines.iter().any(|line| line.ends_with(refused)), "{}", finished.lines.join("\n"));
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

fn rank(part: &str, args: &[String]) {
    let number: usize = std::env::var("RANK").ok().and_then(|rank| rank.parse().ok()).expect("a rank");
    if part == "traced-loop" {
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
    let stop = args.first().map_or(Path::new(""), Path::new);
    if let Err(error) = play(part, stop) {
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
        let mut path = PathBuf::from(std::env::var_os("PACELINE_IDENTITY").expect("the launcher sets it"));
        if path.is_dir() {
            path.push("tls.crt");
        }
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

fn play(part: &str, stop: &Path) -> Result<(), paceline_runtime::Error> {
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
        "links" => eprintln!("rank {rank} is linked over {}", world.links()),
        "sockets" => {
            world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?;
            for socket in Socket::own() {
                eprintln!("rank {rank} socket {socket}");
            }
        }
        "loop" | "traced-loop" => {
            for round in 0.. {
                world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?;
                if round == 0 {
                    eprintln!("rank {rank} looping as {}", std::process::id());
                }
            }
        }
        "split" | "split-until-told" => {
            let mut renewals = Renewals::new();
            let start = Instant::now();
            let life = Duration::from_secs(SHORT_LIFE.parse().expect("a number"));
            let (mut going_on, mut said) = ([1u8], false);
            while going_on == [1] {
                world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?;
                let half = world.communicator().split(Some(rank as u32 % 2), 0)?;
                let mut half = half.expect("every rank has a colour");
                half.all_reduce(&mut [1.0f32; 100], ReduceOp::Sum)?;
                half.leave()?;
                if !std::mem::replace(&mut said, true) {
                    eprintln!("rank {rank} has made groups");
                }
                let is_told = part == "split" || stop.exists();
                going_on = [u8::from(renewals.count() < 2 || start.elapsed() < life || !is_told)];
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
