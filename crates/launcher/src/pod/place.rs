//! What `paceline run` makes of its pod: the flags that a person would have given, and what its program is told.

use std::net::IpAddr;

use super::{Kind, Peer, Pod, Ranks, Role, Surroundings, read};
use crate::discovery::Wanted;

/// Which flags of `paceline run` the command line has. What torchrun's variables say besides counts above what the pod
/// says, and below these: `paceline run` puts them between the two.
#[derive(Debug, Clone, Default)]
pub struct Given {
    /// The value of `--nnodes`.
    pub nnodes: Option<String>,
    /// `--node-rank`.
    pub node_rank: Option<()>,
    /// `--rdzv-endpoint`.
    pub rdzv_endpoint: Option<()>,
    /// `--nproc-per-node`.
    pub nproc_per_node: Option<()>,
    /// `--standalone`, or another flag by which this pod is a job of its own.
    pub standalone: Option<()>,
}

/// What a pod adds to a command line of `paceline run`, and to its program's environment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// Flags with their values.
    pub flags: Vec<String>,
    /// Variables for the program.
    pub variables: Vec<(&'static str, String)>,
    /// All pods of the job, by their numbers; empty where they are not known.
    pub wanted: Vec<Wanted>,
    /// Whether the job is over when the ranks of node 0 have exited with 0: in a TFJob the others may be servers.
    pub first_decides: bool,
    /// Whether a rank that fails here is started again alone, while those of other pods go on: TensorFlow's workers that
    /// have parameter servers.
    pub replaced_alone: bool,
    /// Why the pod does not form a job with others though it looks as if it should.
    pub remark: Option<String>,
}

impl Place {
    /// What node `number` is called: its pod's name, where that is known.
    pub fn name(&self, number: u32) -> String {
        self.wanted.get(number as usize).map_or_else(|| format!("node {number}"), |pod| pod.name.clone())
    }

    /// The place that the surroundings give to a command line with these flags. A flag that is given stays.
    ///
    /// # Errors
    /// The line of [`read`], or why the pods cannot meet.
    pub fn of(around: &Surroundings, given: &Given) -> Result<Self, String> {
        if given.standalone.is_some() || is_standalone(around) || given.nnodes.as_deref() == Some("1") {
            return Ok(Self::default());
        }
        let nnodes = given.nnodes.as_deref().and_then(|text| text.parse().ok());
        let Some(pod) = read(&around.clone().with_nnodes(nnodes))? else { return Ok(Self::default()) };
        let given = &given.clone().or_overruled(&pod, around);
        if given.nnodes.as_deref() == Some("1") {
            return Ok(Self::default());
        }
        let mut place = Self { variables: variables(&pod), ..Self::default() };
        if let (Some(Ranks::Number(number)), None) =
            (pod.ranks_per_pod.as_ref().map(|told| &told.value), given.nproc_per_node)
        {
            place.flags.push(format!("--nproc-per-node={number}"));
        }
        match alone(&pod) {
            Some(why) => place.remark = Some(why),
            None => {
                place.flags.extend(flags(&pod, given, around)?);
                place.wanted = wanted(&pod, given);
                place.first_decides = first_decides(&pod);
                place.replaced_alone = is_replaced_alone(&pod);
            }
        }
        Ok(place)
    }
}

impl Given {
    /// With what variables of torchrun say in place of such a pod's own.
    fn or_overruled(self, pod: &Pod, around: &Surroundings) -> Self {
        let overruled = overruled(pod, around);
        let by = |names: &[&str]| overruled.iter().any(|name| names.contains(name)).then_some(());
        let nnodes = by(&["PET_NNODES"]).and_then(|()| around.variable("PET_NNODES")).map(str::to_owned);
        Self {
            nnodes: self.nnodes.or(nnodes),
            node_rank: self.node_rank.or(by(&["PET_NODE_RANK"])),
            rdzv_endpoint: self.rdzv_endpoint.or(by(&["PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"])),
            nproc_per_node: self.nproc_per_node.or(by(&["PET_NPROC_PER_NODE"])),
            standalone: self.standalone,
        }
    }
}

/// PET_STANDALONE is torchrun's switch: any number but 0.
pub fn is_standalone(around: &Surroundings) -> bool {
    around.variable("PET_STANDALONE").is_some_and(|text| text.parse() != Ok(0i64))
}

/// The variables of torchrun that `paceline run` takes in place of what this pod's own say.
pub fn overruled(pod: &Pod, around: &Surroundings) -> Vec<&'static str> {
    let own: &[&str] = match pod.kind.value {
        // They are its own.
        Kind::PyTorchJob | Kind::TrainJob => return Vec::new(),
        Kind::IndexedJob | Kind::StatefulSet => &["PET_NNODES"],
        Kind::TfJob | Kind::Slurm => &[],
    };
    let all = ["PET_NNODES", "PET_NODE_RANK", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR", "PET_NPROC_PER_NODE"];
    all.into_iter().filter(|name| !own.contains(name) && around.variable(name).is_some()).collect()
}

/// TensorFlow's servers never end by themselves: parameter servers, and the workers of a chief. Workers alone do.
fn first_decides(pod: &Pod) -> bool {
    pod.kind.value == Kind::TfJob && pod.peers.iter().any(|peer| peer.role != Role::Worker)
}

/// A coordinator gives the work of such a worker to others, and waits until another one is there with its address.
/// Workers without parameter servers all fail together, and a lost parameter server takes what it knew with it.
fn is_replaced_alone(pod: &Pod) -> bool {
    let has = |role| pod.peers.iter().any(|peer| peer.role == role);
    pod.kind.value == Kind::TfJob && pod.role.value == Role::Worker && has(Role::Ps) && has(Role::Chief)
}

/// The pods, where the job is made of those and no others.
fn wanted(pod: &Pod, given: &Given) -> Vec<Wanted> {
    let others = given.node_rank.is_some() || given.rdzv_endpoint.is_some();
    let peers = if others { &[] } else { pod.peers.as_slice() };
    let is_name = |host: &&str| host.parse::<IpAddr>().is_err();
    let first_label = |host: &str| host.split('.').next().unwrap_or(host).to_owned();
    let name = |peer: &Peer| {
        let host = peer.host.as_deref().filter(is_name).map(first_label);
        host.unwrap_or_else(|| format!("{} {}", peer.role, peer.index))
    };
    peers.iter().map(|peer| Wanted { name: name(peer), host: peer.host.clone() }).collect()
}

/// Why this pod runs by itself, if it does.
fn alone(pod: &Pod) -> Option<String> {
    let what = pod.in_words();
    match (pod.kind.value, &pod.index, &pod.pods) {
        (Kind::TfJob, None, None) if pod.role.value == Role::Evaluator => {
            Some(format!("{what} is in no cluster, so it runs beside the job"))
        }
        (Kind::TfJob, ..) if pod.pods.is_none() => Some(format!(
            "{what} is not told of all others (enableDynamicWorker), so it runs by itself; --nnodes, --node-rank and \
             --rdzv-endpoint form a job"
        )),
        (_, _, None) => Some(format!(
            "this looks like {what}, but nothing says how many there are, so it runs by itself; --nnodes N forms a job of N pods"
        )),
        _ => None,
    }
}

fn flags(pod: &Pod, given: &Given, around: &Surroundings) -> Result<Vec<String>, String> {
    let (Some(pods), Some(index)) = (&pod.pods, &pod.index) else { return Ok(Vec::new()) };
    if pods.value.most == 1 {
        return Ok(Vec::new());
    }
    let mut flags = Vec::new();
    if given.nnodes.is_none() {
        flags.push(format!("--nnodes={}", pods.value));
    }
    if given.node_rank.is_none() {
        flags.push(format!("--node-rank={}", index.value));
    }
    if given.rdzv_endpoint.is_none() {
        let meeting = pod.meeting.as_ref().ok_or_else(|| {
            let remark = pod.remarks.first().map_or("nothing says where pod 0 is", String::as_str);
            format!("{}: {remark}; or give --rdzv-endpoint", pod.in_words())
        })?;
        flags.push(format!("--rdzv-endpoint={}", meeting.value));
        // Which others may be let through to, where they are let through to some ports alone.
        if let (Kind::PyTorchJob, Some(port)) = (pod.kind.value, around.number("MASTER_PORT")?) {
            flags.push(format!("--master-port={port}"));
        }
    }
    Ok(flags)
}

fn variables(pod: &Pod) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("PACELINE_ROLE", pod.role.value.to_string()),
        ("PACELINE_ROLE_INDEX", pod.role_index.value.to_string()),
    ];
    if pod.index.is_some() && !pod.peers.is_empty() {
        variables.push(("PACELINE_ROLES", roles(pod)));
    }
    variables
}

/// `chief:1,worker:4,ps:2`: how many pods of each role, in the order of their numbers.
fn roles(pod: &Pod) -> String {
    let mut counts: Vec<(Role, u32)> = Vec::new();
    for peer in &pod.peers {
        match counts.last_mut() {
            Some((role, count)) if *role == peer.role => *count += 1,
            _ => counts.push((peer.role, 1)),
        }
    }
    counts.iter().map(|(role, count)| format!("{role}:{count}")).collect::<Vec<_>>().join(",")
}
