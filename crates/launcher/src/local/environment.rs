//! The variables that the operator of Kubeflow 1.9 gives to a pod.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::manifest::{Job, JobKind, PodPlan};

/// Where a pod's programs are reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// A name, or an address.
    pub host: String,
    /// The program's port.
    pub port: u16,
}

/// The variables of a pod of the job; `addresses` has all pods in order.
pub fn of(job: &Job, pod: usize, addresses: &[Address]) -> Vec<(String, String)> {
    let told = match job.kind {
        JobKind::TfJob => tf(job, pod, addresses),
        JobKind::PyTorchJob => pytorch(job, pod, addresses),
    };
    let own = job.pods[pod].variables.iter().cloned();
    // Those of the operator stand last and win.
    own.chain(told.into_iter().map(|(name, value)| (name.to_owned(), value))).collect()
}

/// A job of one pod is told nothing, as in a cluster.
fn tf(job: &Job, pod: usize, addresses: &[Address]) -> Vec<(&'static str, String)> {
    if job.pods.len() == 1 {
        return Vec::new();
    }
    let PodPlan { role, index, .. } = &job.pods[pod];
    let cluster = if job.dynamic_workers { sparse(job, pod, addresses) } else { whole(job, addresses) };
    let task = json!({ "type": role, "index": index });
    vec![("TF_CONFIG", json!({ "cluster": cluster, "task": task, "environment": "cloud" }).to_string())]
}

fn whole(job: &Job, addresses: &[Address]) -> Value {
    let mut cluster: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (pod, address) in job.pods.iter().zip(addresses) {
        cluster.entry(&pod.role).or_default().push(address.to_string());
    }
    json!(cluster)
}

/// What is told with `enableDynamicWorker`: a worker of itself and the servers, a server of itself.
fn sparse(job: &Job, own: usize, addresses: &[Address]) -> Value {
    let all = || job.pods.iter().zip(addresses).enumerate();
    let told = |role: &str| -> Vec<(u32, String)> {
        let of_role = all().filter(|(number, (pod, _))| {
            pod.role == role && (role == "ps" && job.pods[own].role == "worker" || *number == own)
        });
        of_role.map(|(_, (pod, address))| (pod.index, address.to_string())).collect()
    };
    let workers: BTreeMap<String, String> =
        told("worker").into_iter().map(|(index, address)| (index.to_string(), address)).collect();
    let servers: Vec<String> = told("ps").into_iter().map(|(_, address)| address).collect();
    json!({ "worker": workers, "ps": servers })
}

fn pytorch(job: &Job, pod: usize, addresses: &[Address]) -> Vec<(&'static str, String)> {
    let pods = job.pods.len() as u32;
    let mut variables = vec![("PYTHONUNBUFFERED", "1".to_owned())];
    if job.pods[0].role == "master" {
        let Address { host, port } = &addresses[0];
        let processes: u32 = job.processes.as_deref().and_then(|text| text.parse().ok()).unwrap_or(1);
        for name in ["MASTER_PORT", "PET_MASTER_PORT"] {
            variables.push((name, port.to_string()));
        }
        for name in ["MASTER_ADDR", "PET_MASTER_ADDR"] {
            variables.push((name, host.clone()));
        }
        variables.push(("WORLD_SIZE", (pods * processes).to_string()));
        for name in ["RANK", "PET_NODE_RANK"] {
            variables.push((name, pod.to_string()));
        }
    }
    variables.push(("PET_NPROC_PER_NODE", job.processes.clone().unwrap_or_else(|| "auto".to_owned())));
    match &job.elastic {
        None => variables.push(("PET_NNODES", pods.to_string())),
        Some(elastic) => {
            let first = job.pods.iter().position(|pod| pod.role == "worker").unwrap_or(0);
            let Address { host, port } = &addresses[first];
            let (least, most) = elastic.replicas;
            variables.push(("PET_RDZV_ENDPOINT", format!("{host}:{}", elastic.port.unwrap_or(*port))));
            variables.push(("PET_RDZV_BACKEND", elastic.backend.clone()));
            variables.push(("PET_NNODES", format!("{least}:{most}")));
            variables.extend(elastic.max_restarts.map(|restarts| ("PET_MAX_RESTARTS", restarts.to_string())));
            variables.extend(elastic.id.clone().map(|id| ("PET_RDZV_ID", id)));
        }
    }
    variables
}

/// Replaces `$(NAME)` by the variable's value, as Kubernetes does: `$$` is a `$`, and what is unknown stays.
pub fn expand(text: &str, variables: &[(String, String)]) -> String {
    let (mut expanded, mut rest) = (String::new(), text);
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let name = after.strip_prefix('(').and_then(|after| after.split_once(')'));
        rest = match name {
            _ if after.starts_with('$') => {
                expanded.push('$');
                &after[1..]
            }
            Some((name, rest)) => {
                let value =
                    variables.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.clone());
                expanded.push_str(&value.unwrap_or_else(|| format!("$({name})")));
                rest
            }
            None => {
                expanded.push('$');
                after
            }
        };
    }
    expanded + rest
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::read;
    use super::*;

    fn variables(manifest: &str, pod: usize) -> Vec<String> {
        let job = read(manifest, &[]).expect("a manifest");
        let addresses: Vec<Address> = job
            .pods
            .iter()
            .map(|pod| Address { host: format!("j-{}-{}.ns.svc", pod.role, pod.index), port: pod.port })
            .collect();
        of(&job, pod, &addresses).into_iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    const TF: &str = "
apiVersion: kubeflow.org/v1
kind: TFJob
metadata: {name: j, namespace: ns}
spec:
  tfReplicaSpecs:
    PS: {replicas: 1, template: {spec: {containers: [{name: tensorflow, command: [a]}]}}}
    worker:
      replicas: 2
      template: {spec: {containers: [{name: tensorflow, command: [a], ports: [{name: tfjob-port, containerPort: 7}]}]}}
";

    #[test]
    fn tf_config_is_the_operators() {
        let cluster = r#""cluster":{"ps":["j-ps-0.ns.svc:2222"],"worker":["j-worker-0.ns.svc:7","j-worker-1.ns.svc:7"]}"#;
        let whole =
            format!(r#"TF_CONFIG={{{cluster},"environment":"cloud","task":{{"index":1,"type":"worker"}}}}"#);
        assert_eq!(variables(TF, 1), [whole]);
        let sparse = TF.replace("spec:\n  tf", "spec:\n  enableDynamicWorker: true\n  tf");
        let cluster = r#""cluster":{"ps":["j-ps-0.ns.svc:2222"],"worker":{"1":"j-worker-1.ns.svc:7"}}"#;
        let worker =
            format!(r#"TF_CONFIG={{{cluster},"environment":"cloud","task":{{"index":1,"type":"worker"}}}}"#);
        assert_eq!(variables(&sparse, 1), [worker]);
        assert!(variables(&sparse, 2)[0].contains(r#"{"ps":["j-ps-0.ns.svc:2222"],"worker":{}}"#));
    }

    const PYTORCH: &str = "
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: j}
spec:
  nprocPerNode: '2'
  pytorchReplicaSpecs:
    Master: {template: {spec: {containers: [{name: pytorch, command: [a], env: [{name: RANK, value: mine}]}]}}}
    Worker: {replicas: 2, template: {spec: {containers: [{name: pytorch, command: [a]}]}}}
";

    #[test]
    fn ranks_count_pods_and_the_world_counts_processes() {
        let expected = "PYTHONUNBUFFERED=1 MASTER_PORT=23456 PET_MASTER_PORT=23456 MASTER_ADDR=j-master-0.ns.svc \
                        PET_MASTER_ADDR=j-master-0.ns.svc WORLD_SIZE=6 RANK=2 PET_NODE_RANK=2 PET_NPROC_PER_NODE=2 PET_NNODES=3";
        assert_eq!(variables(PYTORCH, 2).join(" "), expected);
        let master = variables(PYTORCH, 0);
        assert_eq!(
            (master[0].as_str(), master.iter().filter(|it| it.starts_with("RANK=")).count()),
            ("RANK=mine", 2)
        );
        assert!(master.contains(&"RANK=0".to_owned()));
    }

    #[test]
    fn arguments_take_variables_as_in_a_cluster() {
        let variables =
            [("A", "1"), ("A", "2"), ("B", "x")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        for (text, expected) in [
            ("$(A)-$(B)", "2-x"),
            ("$$(A)", "$(A)"),
            ("$(C)", "$(C)"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
            ("100%", "100%"),
        ] {
            assert_eq!(expand(text, &variables), expected);
        }
    }
}
