//! Pods that come up in any order, with names that appear late and addresses that change.
//!
//! Pods are network namespaces (`paceline_testbed`), each with a resolv.conf of its own, and a DNS server beside them;
//! that takes root. Where it is missing one line says so, and every test counts as ignored. `cargo test` leaves this suite
//! out; `cargo xtask root` and CI run it.

#![allow(clippy::print_stderr, clippy::print_stdout, reason = "ranks talk to the test by their output")]

mod job;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use job::names::{self, Names};
use job::{Finished, Job, PACELINE, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use paceline_testbed::{Bed, Faults, Plan, SWITCH_ADDRESS, host_address};
use tempfile::TempDir;

/// A master and three workers.
const PODS: usize = 4;

const SECRET: &str = "b1946ac92492d2347c6235b4d2611184";

/// Over how long pods come, if nobody says so.
const SPREAD_S: u64 = 6;

/// An address of the pods' network that nobody has.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 99);

fn main() {
    let missing = match std::env::args().nth(1).as_deref() {
        Some("as-rank") => None,
        _ => paceline_testbed::missing(),
    };
    if let Some(reason) = &missing {
        println!("skipped, all of it: {reason}");
    }
    let ignored = missing.is_some();
    job::main(part, || {
        [
            trial("each_status_line_says_who_is_missing_and_why", status_lines),
            trial("pods_in_any_order_with_late_names_and_changing_addresses_form_the_job", any_order),
            trial("a_resolv_conf_that_is_written_while_a_launcher_waits_is_read", late_resolv_conf),
            trial("doctors_of_pods_measure_the_paths_between_them_and_name_who_is_missing", doctors),
            trial("pods_that_do_not_come_are_named_with_the_reason_at_the_deadline", deadline),
        ]
        .into_iter()
        .map(|trial| trial.with_ignored_flag(ignored))
        .collect()
    });
}

/// A cluster: pods' machines, and names.
struct Cluster {
    bed: Bed,
    names: Names,
    folder: TempDir,
}

impl Cluster {
    fn new() -> Self {
        Self::on(&Plan::clean(PODS, 1500))
    }

    fn on(plan: &Plan) -> Self {
        let bed = Bed::build(plan).expect("hosts can be made here");
        let folder = tempfile::tempdir().expect("a folder");
        let secret = folder.path().join("secret");
        fs::write(&secret, SECRET).expect("written");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("changed");
        fs::write(folder.path().join("resolv.conf"), names::resolv_conf(SWITCH_ADDRESS)).expect("written");
        let mut server = bed.on_switch(std::env::current_exe().expect("a test has an executable"));
        server.args(["as-rank", "names", &SWITCH_ADDRESS.to_string()]);
        Self { names: Names::start(server), bed, folder }
    }

    /// Starts the launcher of a pod as the operator would: without a flag.
    fn start(&self, pod: usize, flags: &[&str]) -> Job {
        Job::start_elsewhere(self.launcher(pod), 1, flags, &[], "sum", &[])
    }

    /// The launcher in a pod; its arguments are to be added.
    fn launcher(&self, pod: usize) -> Command {
        let mut command = self.bed.on_host(pod, "unshare");
        let resolv_conf = self.folder.path().join("resolv.conf");
        let script = r#"mount --bind "$1" /etc/resolv.conf && shift && exec "$@""#;
        command.args(["--mount", "--", "sh", "-c", script, "sh"]).arg(resolv_conf).arg(PACELINE);
        command.env("PACELINE_JOB_SECRET_FILE", self.folder.path().join("secret"));
        for (name, value) in [
            ("MASTER_ADDR", "job-master-0"),
            ("MASTER_PORT", "23456"),
            ("WORLD_SIZE", "4"),
            ("RANK", &pod.to_string()),
            ("PACELINE_FABRIC", "tls"),
        ] {
            command.env(name, value);
        }
        command
    }

    /// Gives the pod's name the address of a machine.
    fn name(&mut self, pod: usize, address: Ipv4Addr) {
        self.names.set(&called(pod), address);
    }
}

fn called(pod: usize) -> String {
    if pod == 0 { "job-master-0".to_owned() } else { format!("job-worker-{}", pod - 1) }
}

fn assert_summed(finished: &Finished) {
    finished.assert_success();
    assert_eq!(finished.lines_with("sum 4").len(), 1, "{}", finished.lines.join("\n"));
}

fn status_lines() {
    let mut cluster = Cluster::new();
    let mut master = cluster.start(0, &[]);
    let nameless =
        ["job-worker-0", "job-worker-1", "job-worker-2"].map(|name| format!("{name} (no DNS name yet)"));
    master.wait_for(&format!("paceline: waiting for 3 of 4: {}", nameless.join(", ")), 1);
    let mut third = cluster.start(3, &[]);
    third.wait_for("paceline: waiting for 1 of 4: job-master-0 (no DNS name yet)", 1);
    cluster.name(1, host_address(1));
    master
        .wait_for("paceline: waiting for 3 of 4: job-worker-0 (connection refused), job-worker-1 (no DNS", 1);
    cluster.name(2, NOBODY);
    master.wait_for("job-worker-0 (connection refused), job-worker-1 (10.77.0.99", 1);
    cluster.name(0, NOBODY);
    third.wait_for("paceline: waiting for 1 of 4: job-master-0 (no answer within", 1);
    cluster.name(0, host_address(0));
    master.wait_for(
        "paceline: waiting for 2 of 4: job-worker-0 (connection refused), job-worker-1 (10.77.0.99",
        1,
    );
    let others = [1, 2].map(|pod| cluster.start(pod, &[]));
    for job in [master, third].into_iter().chain(others) {
        assert_summed(&job.finish());
    }
}

/// What happens in a cluster, in some order.
#[derive(Clone, Copy)]
enum Event {
    Start(usize),
    /// The name appears, with an address that was another pod's.
    Stale(usize),
    /// The name has the right address.
    Right(usize),
}

fn any_order() {
    let seed = std::env::var("PACELINE_TEST_SEED")
        .map_or_else(|_| job::now_us() as u64, |text| text.parse().expect("PACELINE_TEST_SEED is a number"));
    eprintln!("PACELINE_TEST_SEED={seed} makes the same order");
    let spread_s: u64 = std::env::var("PACELINE_TEST_SPREAD")
        .map_or(SPREAD_S, |text| text.parse().expect("PACELINE_TEST_SPREAD is a number of seconds"));
    let mut chance = fastrand::Rng::with_seed(seed);
    let mut cluster = Cluster::new();
    let mut events: Vec<Event> = (0..PODS).flat_map(|pod| [Event::Start(pod), Event::Stale(pod)]).collect();
    chance.shuffle(&mut events);
    let mut right: Vec<Event> = (0..PODS).map(Event::Right).collect();
    chance.shuffle(&mut right);
    let mut jobs = Vec::new();
    // Twice the mean.
    let pause_ms = 2 * 1000 * spread_s / (events.len() + right.len()) as u64;
    for event in events.into_iter().chain(right) {
        match event {
            Event::Start(pod) => jobs.push(cluster.start(pod, &[])),
            Event::Stale(pod) => cluster.name(pod, host_address((pod + 1) % PODS)),
            Event::Right(pod) => cluster.name(pod, host_address(pod)),
        }
        // Nothing waits for this: pods take their time.
        std::thread::sleep(Duration::from_millis(chance.u64(0..pause_ms)));
    }
    for job in jobs {
        assert_summed(&job.finish());
    }
}

/// As in a pod whose network comes up after its containers.
fn late_resolv_conf() {
    let mut cluster = Cluster::new();
    let resolv_conf = cluster.folder.path().join("resolv.conf");
    let right = fs::read_to_string(&resolv_conf).expect("written before");
    fs::write(&resolv_conf, names::resolv_conf(NOBODY)).expect("written");
    (0..PODS).for_each(|pod| cluster.name(pod, host_address(pod)));
    let mut worker = cluster.start(3, &[]);
    worker.wait_for("paceline: waiting for 1 of 4: job-master-0 (the DNS does not answer", 1);
    // In place, as kubelets and container runtimes do with a file that is mounted.
    fs::write(&resolv_conf, right).expect("written");
    let others = [0, 1, 2].map(|pod| cluster.start(pod, &[]));
    for job in [worker].into_iter().chain(others) {
        assert_summed(&job.finish());
    }
}

fn deadline() {
    let mut cluster = Cluster::new();
    cluster.name(1, host_address(1));
    let finished = cluster.start(0, &["--rdzv-timeout", "4"]).finish();
    assert_eq!(finished.status.code(), Some(1));
    let last = finished.lines.last().expect("it says why");
    let expected = "timed out after 4 s waiting for 3 of 4: job-worker-0 (connection refused), job-worker-1 (no DNS name yet), \
                    job-worker-2 (no DNS name yet)";
    assert!(last.starts_with("paceline: the nodes have not met at job-master-0:29400: "), "{last}");
    assert!(last.contains(expected), "{last}");
    let finished = cluster.start(2, &["--rdzv-timeout", "2"]).finish();
    let last = finished.lines.last().expect("it says why");
    assert!(last.ends_with("waiting for 1 of 4: job-master-0: no DNS name yet"), "{last}");
}

/// Three doctors of a job of four pods, on links that carry less than their interfaces say.
fn doctors() {
    const LARGEST: usize = 1400;
    let faults = Faults { largest: Some(LARGEST), ..Faults::default() };
    let mut cluster = Cluster::on(&Plan::relayed(3, faults, 0));
    for pod in 0..3 {
        cluster.name(pod, host_address(pod));
    }
    let doctor = |pod| {
        let mut command = cluster.launcher(pod);
        command.args(["doctor", "--json", "--wait", "15"]).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().expect("it starts")
    };
    let running = [0, 1, 2].map(doctor);
    for (pod, doctor) in running.into_iter().enumerate() {
        let output = doctor.wait_with_output().expect("it ends");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a document");
        assert_eq!(output.status.code(), Some(1), "a pod is missing:\n{report:#}");
        let said = |what: &str| {
            let findings = report["findings"].as_array().expect("a list");
            let finding = findings.iter().find(|finding| finding["what"] == what);
            let finding = finding.unwrap_or_else(|| panic!("no {what} in\n{report:#}"));
            format!(
                "{}: {}",
                finding["verdict"].as_str().expect("text"),
                finding["said"].as_str().expect("text")
            )
        };
        assert_eq!(said("TCP to worker 2"), "failed: no DNS name yet");
        let pods = ["master 0", "worker 0", "worker 1"];
        for (other, name) in pods.into_iter().enumerate().filter(|&(other, _)| other != pod) {
            assert_eq!(said(&format!("TCP to {name}")), format!("ok: {} answers", host_address(other)));
            assert!(said(&format!("UDP to {name}")).starts_with("ok: answered in "));
            let packets = said(&format!("packets to {name}"));
            let bytes =
                packets.strip_prefix("warning: up to ").and_then(|rest| rest.split(' ').next()?.parse().ok());
            let bytes: usize = bytes.unwrap_or_else(|| panic!("{packets}"));
            assert!((LARGEST - 8..=LARGEST).contains(&bytes), "{packets}");
            assert!(said(&format!("clock of {name}")).starts_with("ok: "));
        }
    }
}

/// A rank, or the server of names.
fn part(part: &str, args: &[String]) {
    if part == "names" {
        return names::serve(&args[0]);
    }
    let mut world = World::join().expect("the world");
    let mut ones = [1.0f32];
    world.communicator().all_reduce(&mut ones, ReduceOp::Sum).expect("all come");
    eprintln!("sum {}", ones[0]);
    world.leave().expect("all have come");
}
