//! TF_CONFIG, in the full form and in the sparse one of a TFJob with `enableDynamicWorker`.
//!
//! The pods of a cluster in our order are the chief, the workers, the parameter servers, the evaluators: those that
//! train come first, so that their ranks are the first ones. In the sparse form a worker is told of itself and the
//! parameter servers alone, and a parameter server of itself; then nobody knows how many there are.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::surroundings::PODS_MOST;
use super::{Count, Kind, Meeting, Peer, Pod, Role, Surroundings, Told, range};

const NAME: &str = "TF_CONFIG";

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    cluster: BTreeMap<String, Value>,
    task: Option<Task>,
}

#[derive(Deserialize)]
struct Task {
    #[serde(rename = "type")]
    role: String,
    index: Value,
}

/// The addresses of one role.
enum Addresses {
    /// Of all.
    All(Vec<String>),
    /// Of some, by their numbers.
    Some(BTreeMap<u32, String>),
}

/// Reads TF_CONFIG, if it is there.
pub fn read(around: &Surroundings) -> Result<Option<Pod>, String> {
    let Some(text) = around.variable(NAME) else { return Ok(None) };
    let document: Document = serde_json::from_str(text)
        .map_err(|e| format!("{NAME} cannot be read: {e}; it should be as TensorFlow's guide has it"))?;
    let Some(task) = document.task else {
        return Err(format!(
            "{NAME} has no `task`, so this pod does not know which one it is; add its type and index"
        ));
    };
    let role = role(&task.role)?;
    let index = index(&task.index)?;
    let cluster = cluster(&document.cluster)?;
    let mut pod = Pod {
        kind: Told::by(NAME, Kind::TfJob),
        role: Told::by("TF_CONFIG task.type", role),
        role_index: Told::by("TF_CONFIG task.index", index),
        index: None,
        pods: None,
        meeting: None,
        ranks_per_pod: None,
        peers: peers(&cluster)?,
        remarks: Vec::new(),
    };
    if is_sparse(&document.cluster, role, index) {
        check_sparse(&cluster, role, index)?;
        pod.remarks.push(
            "TF_CONFIG tells this pod of itself and of parameter servers alone (enableDynamicWorker)"
                .to_owned(),
        );
    } else {
        place(&mut pod, &cluster)?;
    }
    if around.variable("RANK").is_some() && around.variable("MASTER_ADDR").is_some() {
        pod.remarks.push("MASTER_ADDR and RANK are set too; TF_CONFIG counts".to_owned());
    }
    Ok(Some(pod))
}

/// Finds this pod in a whole cluster.
fn place(pod: &mut Pod, cluster: &BTreeMap<Role, Addresses>) -> Result<(), String> {
    let (role, index) = (pod.role.value, pod.role_index.value);
    let position = pod.peers.iter().position(|peer| (peer.role, peer.index) == (role, index));
    match (position, cluster.get(&role)) {
        (Some(position), _) => {
            // At most PODS_MOST.
            pod.index =
                Some(Told::by("TF_CONFIG task, in the order chief, worker, ps, evaluator", position as u32));
        }
        // Operators up to 1.0 leave evaluators out of the cluster.
        (None, None) if role == Role::Evaluator => {
            pod.remarks.push(
                "the cluster of TF_CONFIG has no evaluator, so this pod runs beside the job".to_owned(),
            );
            return Ok(());
        }
        (None, None) => {
            return Err(format!(
                "{NAME} says that this pod is {role} {index}, but its cluster has no {role}"
            ));
        }
        (None, Some(addresses)) => {
            let known = range(addresses.len());
            return Err(format!(
                "{NAME} says that this pod is {role} {index}, but its cluster has {role} {known}"
            ));
        }
    }
    let (first, count) = (pod.peers.first(), pod.peers.len() as u32);
    pod.pods = Some(Told::by("TF_CONFIG cluster", Count::exactly(count)));
    pod.meeting = first.and_then(|peer| peer.host.clone()).map(|host| {
        Told::by(
            "TF_CONFIG cluster, its first pod; its port there is the program's",
            Meeting { host, port: None },
        )
    });
    Ok(())
}

/// The sparse form has workers by number, be they none, or (for a chief, which TensorFlow cannot use) nothing at all.
fn is_sparse(document: &BTreeMap<String, Value>, role: Role, index: u32) -> bool {
    let by_number = document.values().any(Value::is_object);
    let servers = document.get("ps").and_then(Value::as_array).map_or(0, Vec::len);
    let lone_server = role == Role::Ps && index > 0 && servers == 1 && document.len() == 1;
    by_number
        || lone_server
        || document.values().all(|addresses| addresses.as_array().is_none_or(Vec::is_empty))
}

fn check_sparse(cluster: &BTreeMap<Role, Addresses>, role: Role, index: u32) -> Result<(), String> {
    match (role, cluster.get(&role)) {
        (Role::Worker, Some(Addresses::Some(workers))) if !workers.contains_key(&index) => {
            let known: Vec<String> = workers.keys().map(u32::to_string).collect();
            Err(format!(
                "{NAME} says that this pod is worker {index}, but its cluster has worker {}",
                known.join(", ")
            ))
        }
        _ => Ok(()),
    }
}

fn role(name: &str) -> Result<Role, String> {
    Ok(match name {
        "chief" | "master" => Role::Chief,
        "worker" => Role::Worker,
        "ps" => Role::Ps,
        "evaluator" => Role::Evaluator,
        _ => return Err(format!("{NAME} has the role `{name}`; there are chief, worker, ps and evaluator")),
    })
}

/// Some write it as a string.
fn index(value: &Value) -> Result<u32, String> {
    let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
    let index = number.and_then(|number| u32::try_from(number).ok());
    index.ok_or_else(|| format!("{NAME} has the task index {value}, which is no number from 0 on"))
}

fn cluster(document: &BTreeMap<String, Value>) -> Result<BTreeMap<Role, Addresses>, String> {
    let mut cluster = BTreeMap::new();
    for (name, value) in document {
        let role = role(name)?;
        let addresses = addresses(name, value)?;
        // What the operator does not know it writes as an empty list or object.
        if addresses.len() > 0 && cluster.insert(role, addresses).is_some() {
            return Err(format!("{NAME} has a chief and a master, which are the same; leave one"));
        }
    }
    if let Some(chiefs) = cluster.get(&Role::Chief).filter(|chiefs| chiefs.len() > 1) {
        return Err(format!("{NAME} has {} chiefs; there is one at most", chiefs.len()));
    }
    Ok(cluster)
}

fn addresses(role: &str, value: &Value) -> Result<Addresses, String> {
    let text = |value: &Value| {
        value.as_str().map(str::to_owned).ok_or_else(|| format!("{NAME} has {value} as an address of {role}"))
    };
    match value {
        Value::Array(list) if list.len() <= PODS_MOST as usize => {
            list.iter().map(text).collect::<Result<_, _>>().map(Addresses::All)
        }
        Value::Object(by_number) => {
            let entry = |(number, value): (&String, &Value)| {
                let number = number
                    .parse()
                    .map_err(|_| format!("{NAME} has {role} `{number}`, which is no number"))?;
                Ok((number, text(value)?))
            };
            by_number.iter().map(entry).collect::<Result<_, String>>().map(Addresses::Some)
        }
        Value::Null => Ok(Addresses::All(Vec::new())),
        _ => Err(format!("{NAME} has no list of addresses for {role}; give host:port of each")),
    }
}

fn peers(cluster: &BTreeMap<Role, Addresses>) -> Result<Vec<Peer>, String> {
    let mut peers: Vec<Peer> = Vec::new();
    // In the order of the roles.
    for (&role, addresses) in cluster {
        for (index, address) in addresses.numbered() {
            let (host, port) = host_and_port(address)
                .ok_or_else(|| format!("{NAME} has `{address}` for {role} {index}; give host:port"))?;
            peers.push(Peer { role, index, host: Some(host), port: Some(port) });
        }
    }
    let mut seen = BTreeMap::new();
    for peer in &peers {
        if let Some((role, index)) = seen.insert((&peer.host, peer.port), (peer.role, peer.index)) {
            let host = peer.host.as_deref().unwrap_or_default();
            return Err(format!(
                "{NAME} has one address, {host}, for {role} {index} and for {} {}; each needs its own",
                peer.role, peer.index
            ));
        }
    }
    Ok(peers)
}

fn host_and_port(address: &str) -> Option<(String, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().ok()?;
    (!bare.is_empty()).then(|| (bare.to_owned(), port))
}

impl Addresses {
    fn len(&self) -> usize {
        match self {
            Addresses::All(list) => list.len(),
            Addresses::Some(by_number) => by_number.len(),
        }
    }

    fn numbered(&self) -> Vec<(u32, &str)> {
        match self {
            Addresses::All(list) => (0..).zip(list.iter().map(String::as_str)).collect(),
            Addresses::Some(by_number) => {
                by_number.iter().map(|(&n, address)| (n, address.as_str())).collect()
            }
        }
    }
}
