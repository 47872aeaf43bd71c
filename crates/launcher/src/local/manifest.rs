//! A TFJob or PyTorchJob as it is written, and the pods that it asks for.
//!
//! Of a pod's template only what a process has is read: command, arguments, variables, working directory. Images, volumes
//! and resources are for a cluster. Both spellings of Kubeflow, that of 1.0 and that of 1.9, are read.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::policy::{Restart, Success};

/// The most pods that one machine is asked to run.
const PODS_MOST: u32 = 64;

/// A job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its kind.
    pub kind: JobKind,
    /// Its name, with which its pods' names begin.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its pods, the one that decides first.
    pub pods: Vec<PodPlan>,
    /// When it has succeeded.
    pub success: Success,
    /// How often pods may be started again, all together; `None` for any number of times.
    pub backoff_limit: Option<u32>,
    /// What an elastic PyTorchJob says.
    pub elastic: Option<Elastic>,
    /// How many processes each pod of a PyTorchJob runs: a number, auto, cpu or gpu.
    pub processes: Option<String>,
    /// Whether pods of a TFJob are told of themselves and of servers alone.
    pub dynamic_workers: bool,
}

/// What can be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// Of TensorFlow.
    TfJob,
    /// Of PyTorch.
    PyTorchJob,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPlan {
    /// In lower case: master, chief, worker, ps, evaluator.
    pub role: String,
    /// Its number among those of its role.
    pub index: u32,
    /// The program and its arguments, `$(NAME)` not yet replaced.
    pub command: Vec<String>,
    /// What the manifest sets, in order.
    pub variables: Vec<(String, String)>,
    /// Where it runs, if the manifest says so.
    pub folder: Option<String>,
    /// The port of its program.
    pub port: u16,
    /// Whether it is started again.
    pub restart: Restart,
}

/// What an elastic job says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elastic {
    /// Fewest and most pods.
    pub replicas: (u32, u32),
    /// The port of the rendezvous.
    pub port: Option<u16>,
    /// c10d, unless it says otherwise.
    pub backend: String,
    /// How often workers are started again.
    pub max_restarts: Option<u32>,
    /// The name of the rendezvous.
    pub id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    namespace: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct Spec {
    tf_replica_specs: Option<BTreeMap<String, Replicas>>,
    pytorch_replica_specs: Option<BTreeMap<String, Replicas>>,
    run_policy: Option<RunPolicy>,
    backoff_limit: Option<u32>,
    success_policy: Option<String>,
    elastic_policy: Option<ElasticPolicy>,
    nproc_per_node: Option<String>,
    #[serde(default)]
    enable_dynamic_worker: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RunPolicy {
    backoff_limit: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ElasticPolicy {
    min_replicas: Option<u32>,
    max_replicas: Option<u32>,
    rdzv_backend: Option<String>,
    rdzv_port: Option<u16>,
    rdzv_id: Option<String>,
    max_restarts: Option<u32>,
    #[serde(alias = "nProcPerNode")]
    n_proc_per_node: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Replicas {
    replicas: Option<u32>,
    restart_policy: Option<String>,
    template: Template,
}

#[derive(Deserialize)]
struct Template {
    spec: PodSpec,
}

#[derive(Deserialize)]
struct PodSpec {
    containers: Vec<Container>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    name: String,
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    #[serde(default)]
    ports: Vec<Port>,
    working_dir: Option<String>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    value: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Port {
    name: Option<String>,
    container_port: u16,
}

/// What a kind calls its things.
struct Words {
    container: &'static str,
    port_name: &'static str,
    port: u16,
    /// The roles in the order of their pods.
    roles: &'static [&'static str],
    restart: Restart,
}

impl JobKind {
    fn words(self) -> Words {
        match self {
            JobKind::TfJob => Words {
                container: "tensorflow",
                port_name: "tfjob-port",
                port: 2222,
                roles: &["chief", "master", "worker", "ps", "evaluator"],
                restart: Restart::Never,
            },
            JobKind::PyTorchJob => Words {
                container: "pytorch",
                port_name: "pytorchjob-port",
                port: 23_456,
                roles: &["master", "worker"],
                restart: Restart::OnFailure,
            },
        }
    }
}

/// Reads a manifest. `entrypoint` is run in containers without a command, whose image would have one.
///
/// # Errors
/// One line that says what is wrong, where, and what to do.
pub fn read(text: &str, entrypoint: &[String]) -> Result<Job, String> {
    let document: Document = serde_saphyr::from_str(text).map_err(|e| {
        format!("it cannot be read as a TFJob or PyTorchJob: {}", in_one_line(&e.to_string()))
    })?;
    let Document { api_version, kind, metadata, spec } = document;
    if !api_version.starts_with("kubeflow.org/") {
        return Err(format!(
            "its apiVersion is {api_version}; there are TFJobs and PyTorchJobs of kubeflow.org/v1"
        ));
    }
    let (kind, replicas) = match (kind.as_str(), spec.tf_replica_specs, spec.pytorch_replica_specs) {
        ("TFJob", Some(replicas), None) => (JobKind::TfJob, replicas),
        ("PyTorchJob", None, Some(replicas)) => (JobKind::PyTorchJob, replicas),
        ("TFJob", ..) => return Err("a TFJob needs spec.tfReplicaSpecs".to_owned()),
        ("PyTorchJob", ..) => return Err("a PyTorchJob needs spec.pytorchReplicaSpecs".to_owned()),
        (kind, ..) => return Err(format!("its kind is {kind}; there are TFJob and PyTorchJob")),
    };
    let pods = pods(kind, replicas, entrypoint)?;
    let workers = pods.iter().filter(|pod| pod.role == "worker").count() as u32;
    let run_policy = spec.run_policy.and_then(|policy| policy.backoff_limit);
    let processes = spec.nproc_per_node.or_else(|| {
        spec.elastic_policy
            .as_ref()
            .and_then(|policy| policy.n_proc_per_node)
            .map(|number| number.to_string())
    });
    Ok(Job {
        success: success(kind, &pods, spec.success_policy.as_deref(), spec.elastic_policy.is_some())?,
        kind,
        name: metadata.name,
        namespace: metadata.namespace.unwrap_or_else(|| "default".to_owned()),
        pods,
        backoff_limit: run_policy.or(spec.backoff_limit),
        elastic: spec.elastic_policy.map(|policy| elastic(policy, workers)),
        processes,
        dynamic_workers: spec.enable_dynamic_worker,
    })
}

fn pods(
    kind: JobKind,
    replicas: BTreeMap<String, Replicas>,
    entrypoint: &[String],
) -> Result<Vec<PodPlan>, String> {
    let words = kind.words();
    let mut by_role: BTreeMap<usize, (String, Replicas)> = BTreeMap::new();
    for (name, replicas) in replicas {
        let role = name.to_lowercase();
        let place = words.roles.iter().position(|known| *known == role);
        let place =
            place.ok_or_else(|| format!("there is no role {name}; there are {}", words.roles.join(", ")))?;
        if by_role.insert(place, (role, replicas)).is_some() {
            return Err(format!("it has the role {name} twice, in different cases"));
        }
    }
    let mut pods = Vec::new();
    for (role, replicas) in by_role.into_values() {
        let count = replicas.replicas.unwrap_or(1);
        if matches!(role.as_str(), "chief" | "master") && count != 1 {
            return Err(format!("it has {count} of the role {role}; there is one at most"));
        }
        if count > PODS_MOST || pods.len() as u32 + count > PODS_MOST {
            return Err(format!("it has more than {PODS_MOST} pods, the most that run on one machine"));
        }
        let plan = plan(&words, &role, replicas, entrypoint)?;
        pods.extend((0..count).map(|index| PodPlan { index, ..plan.clone() }));
    }
    if pods.is_empty() { Err("it has no pod".to_owned()) } else { Ok(pods) }
}

fn plan(words: &Words, role: &str, replicas: Replicas, entrypoint: &[String]) -> Result<PodPlan, String> {
    let restart = match replicas.restart_policy.as_deref() {
        None => words.restart,
        Some("Never") => Restart::Never,
        Some("OnFailure" | "Always") => Restart::OnFailure,
        Some("ExitCode") => Restart::ExitCode,
        Some(other) => {
            return Err(format!(
                "{role} has the restartPolicy {other}; there are Never, OnFailure, Always and ExitCode"
            ));
        }
    };
    let mut containers = replicas.template.spec.containers.into_iter();
    let container = containers
        .find(|container| container.name == words.container)
        .ok_or_else(|| format!("{role} has no container called {}", words.container))?;
    let command = if container.command.is_empty() { entrypoint.to_vec() } else { container.command };
    if command.is_empty() {
        return Err(format!(
            "the container {} of {role} has no command, and its image's entrypoint is not known here; give it with --entrypoint",
            words.container
        ));
    }
    let variable = |variable: Variable| match variable.value {
        Some(value) => Ok((variable.name, value)),
        None => Err(format!("{role} takes {} from somewhere in a cluster; write its value", variable.name)),
    };
    let port = container.ports.iter().find(|port| port.name.as_deref() == Some(words.port_name));
    Ok(PodPlan {
        role: role.to_owned(),
        index: 0,
        command: command.into_iter().chain(container.args).collect(),
        variables: container.env.into_iter().map(variable).collect::<Result<_, _>>()?,
        folder: container.working_dir,
        port: port.map_or(words.port, |port| port.container_port),
        restart,
    })
}

/// Which pods decide that the job has succeeded, as the operator has it.
fn success(kind: JobKind, pods: &[PodPlan], policy: Option<&str>, elastic: bool) -> Result<Success, String> {
    let leads = |pod: &PodPlan| matches!(pod.role.as_str(), "chief" | "master");
    let decider = pods.iter().position(leads);
    let workers = || (0..pods.len()).filter(|&number| pods[number].role == "worker").collect::<Vec<_>>();
    Ok(match (kind, decider, policy) {
        (_, Some(decider), _) => Success::Of(decider),
        (JobKind::TfJob, None, None | Some("")) => Success::OfFirstOrAll(workers()),
        (JobKind::TfJob, None, Some("AllWorkers")) => Success::OfAll(workers()),
        (JobKind::TfJob, None, Some(other)) => {
            return Err(format!("its successPolicy is {other}; there is AllWorkers"));
        }
        (JobKind::PyTorchJob, None, _) if elastic => Success::OfAny(workers()),
        (JobKind::PyTorchJob, None, _) => Success::OfAll(workers()),
    })
}

/// One of the two bounds stands for both; without any it is the number of workers.
fn elastic(policy: ElasticPolicy, workers: u32) -> Elastic {
    let least = policy.min_replicas.or(policy.max_replicas).unwrap_or(workers);
    let most = policy.max_replicas.or(policy.min_replicas).unwrap_or(workers);
    Elastic {
        replicas: (least, most),
        port: policy.rdzv_port,
        backend: policy.rdzv_backend.unwrap_or_else(|| "c10d".to_owned()),
        max_restarts: policy.max_restarts,
        id: policy.rdzv_id,
    }
}

fn in_one_line(text: &str) -> String {
    let first: Vec<&str> = text.lines().next().unwrap_or_default().split_whitespace().collect();
    first.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PyTorchJob with this in place of parts of it.
    fn job(replace: &[(&str, &str)]) -> Result<Job, String> {
        let mut text = "
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: j}
spec:
  pytorchReplicaSpecs:
    Master: {replicas: 1, restartPolicy: Never, template: {spec: {containers: [{name: pytorch, command: [a, b], args: [c]}]}}}
    Worker: {replicas: 2, template: {spec: {containers: [{name: sidecar}, {name: pytorch, image: i, args: [d]}]}}}
"
        .to_owned();
        for (from, to) in replace {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        read(&text, &["entry".to_owned()])
    }

    #[test]
    fn pods_have_the_command_or_the_entrypoint_and_the_arguments() {
        let job = job(&[]).expect("a manifest");
        let words: Vec<String> = job.pods.iter().map(|pod| pod.command.join(" ")).collect();
        assert_eq!(words, ["a b c", "entry d", "entry d"]);
        let restarts: Vec<Restart> = job.pods.iter().map(|pod| pod.restart).collect();
        assert_eq!(
            restarts,
            [Restart::Never, Restart::OnFailure, Restart::OnFailure],
            "PyTorchJob's default is OnFailure"
        );
        assert_eq!(
            (job.namespace.as_str(), job.success, job.backoff_limit),
            ("default", Success::Of(0), None)
        );
    }

    #[test]
    fn both_spellings_of_the_run_policy_count() {
        let limit = |policy: &str| {
            job(&[("spec:\n  pytorch", &format!("spec:\n  {policy}\n  pytorch"))])
                .map(|job| job.backoff_limit)
        };
        assert_eq!(limit("backoffLimit: 3"), Ok(Some(3)));
        assert_eq!(limit("runPolicy: {backoffLimit: 4, cleanPodPolicy: None}"), Ok(Some(4)));
    }

    #[test]
    fn each_manifest_that_cannot_be_run_is_refused_in_one_line() {
        for (replace, expected) in [
            (("kubeflow.org/v1", "batch/v1"), "its apiVersion is batch/v1"),
            (("kind: PyTorchJob", "kind: MPIJob"), "its kind is MPIJob"),
            (("kind: PyTorchJob", "kind: TFJob"), "a TFJob needs spec.tfReplicaSpecs"),
            (("Master:", "Boss:"), "there is no role Boss; there are master, worker"),
            (("replicas: 1", "replicas: 2"), "it has 2 of the role master"),
            (("replicas: 2", "replicas: 4000000000"), "more than 64 pods"),
            (("Never", "Sometimes"), "the restartPolicy Sometimes"),
            (("{name: pytorch, command", "{name: torch, command"), "master has no container called pytorch"),
            (("args: [c]", "env: [{name: A, valueFrom: {}}]"), "takes A from somewhere in a cluster"),
            (("spec:\n  pytorch", "spec: [\n  pytorch"), "it cannot be read as a TFJob or PyTorchJob: "),
        ] {
            let error = job(&[replace]).expect_err(expected);
            assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        }
        let error = read(
            "{apiVersion: kubeflow.org/v1, kind: TFJob, metadata: {name: j}, spec: {tfReplicaSpecs: {Worker: {template: {spec: {containers: [{name: tensorflow}]}}}}}}",
            &[],
        );
        assert!(error.expect_err("nothing to run").contains("--entrypoint"));
    }
}
