//! The variables of torchrun, as PyTorchJobs and TrainJobs set them.
//!
//! MASTER_ADDR, RANK and WORLD_SIZE are also what a training process has. In a pod RANK counts pods, and WORLD_SIZE counts
//! pods or, where the job says how many processes a pod runs, processes; a process has LOCAL_RANK besides, and then
//! these variables say nothing about the pod.
//!
//! An elastic job and one without a master tell a pod neither its number nor the others' names; both are in its own
//! name, which is also that of its service: `job-worker-2`.

use std::net::IpAddr;

use super::{Count, Kind, Meeting, Peer, Pod, Ranks, Role, Surroundings, Told};

/// Reads the variables, if they describe a pod.
pub fn read(around: &Surroundings) -> Result<Option<Pod>, String> {
    if around.variable("LOCAL_RANK").is_some() {
        return Ok(None);
    }
    let ranks = ranks_per_pod(around)?;
    if let Some((variable, number)) = around.first_number(&["PET_NODE_RANK", "RANK"])?
        && let Some((from, address)) = first_of(around, &["PET_MASTER_ADDR", "MASTER_ADDR"])
    {
        return numbered(around, ranks, (variable, number), (from, address)).map(Some);
    }
    by_name(around, ranks)
}

/// A pod that is told its number and its master.
fn numbered(
    around: &Surroundings,
    ranks: Option<Told<Ranks>>,
    (variable, number): (&str, u32),
    (from, address): (&str, &str),
) -> Result<Pod, String> {
    agree(around, "PET_NODE_RANK", "RANK")?;
    agree(around, "PET_MASTER_ADDR", "MASTER_ADDR")?;
    let train_job = trainer_pods(address).filter(|_| around.variable("PET_NODE_RANK").is_some());
    if train_job.is_some() {
        agree(around, "PET_NODE_RANK", "JOB_COMPLETION_INDEX")?;
    }
    let pods = pods(around, ranks.as_ref())?;
    if number >= pods.value.most {
        let Told { value, from } = pods;
        return Err(format!(
            "{variable} is {number}, but there are {} pods by {from}; it counts pods, from 0 to {}",
            value.most,
            value.most - 1
        ));
    }
    let kind = if train_job.is_some() { Kind::TrainJob } else { Kind::PyTorchJob };
    let (host, source) = match address {
        // Operators up to 1.0 say so to the master, which the others reach under its own name.
        "localhost" if number == 0 && around.hostname().ends_with("-master-0") => {
            (around.hostname(), format!("this pod's name, as {from} is {address}"))
        }
        _ => (address, from.to_owned()),
    };
    let remark = (number > 0 && is_loopback(address))
        .then(|| format!("{from} is {address}, which is pod 0 only if both are on one machine"));
    let (role, role_index) = match (kind, number) {
        (Kind::TrainJob, number) => (Role::Node, number),
        (_, 0) => (Role::Master, 0),
        (_, number) => (Role::Worker, number - 1),
    };
    let told = meeting_endpoint(around)?;
    Ok(Pod {
        kind: Told::by(from, kind),
        role: Told::by(variable, role),
        role_index: Told::by(variable, role_index),
        index: Some(Told::by(variable, number)),
        peers: numbered_peers(address, kind, pods.value),
        meeting: Some(
            told.unwrap_or_else(|| Told::by(source, Meeting { host: host.to_owned(), port: None })),
        ),
        pods: Some(pods),
        ranks_per_pod: ranks,
        remarks: remark.into_iter().collect(),
    })
}

fn is_loopback(address: &str) -> bool {
    address == "localhost" || address.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// A pod whose name says which it is.
fn by_name(around: &Surroundings, ranks: Option<Told<Ranks>>) -> Result<Option<Pod>, String> {
    let Some(("PET_NNODES", _)) = around.nnodes()?.filter(|_| around.variable("PET_NNODES").is_some()) else {
        return Ok(None);
    };
    let Some((variable, pods)) = around.nnodes()? else { return Ok(None) };
    let Some((name, number)) = around.ordinal() else { return Ok(None) };
    let Some(job) = name.strip_suffix("-worker") else { return Ok(None) };
    if number >= pods.most {
        return Err(format!(
            "this pod is called {}, but there are {} by {variable}: workers 0 to {}",
            around.hostname(),
            pods.most,
            pods.most - 1
        ));
    }
    let meeting = match meeting_endpoint(around)? {
        Some(meeting) => meeting,
        None => Told::by("the pod's name", Meeting { host: format!("{job}-worker-0"), port: None }),
    };
    let workers = (0..pods.most).map(|index| Peer {
        role: Role::Worker,
        index,
        host: Some(format!("{job}-worker-{index}")),
        port: None,
    });
    Ok(Some(Pod {
        kind: Told::by("PET_NNODES and the pod's name", Kind::PyTorchJob),
        role: Told::by("the pod's name", Role::Worker),
        role_index: Told::by("the pod's name", number),
        index: Some(Told::by("the pod's name", number)),
        pods: Some(Told::by(variable, pods)),
        meeting: Some(meeting),
        ranks_per_pod: ranks,
        peers: workers.collect(),
        remarks: Vec::new(),
    }))
}

fn ranks_per_pod(around: &Surroundings) -> Result<Option<Told<Ranks>>, String> {
    let Some(text) = around.variable("PET_NPROC_PER_NODE") else { return Ok(None) };
    let ranks = match text.parse() {
        Ok(number) if number > 0 => Ranks::Number(number),
        Err(_) if text.starts_with(|c: char| c.is_ascii_alphabetic()) => Ranks::Devices(text.to_owned()),
        _ => {
            return Err(format!(
                "PET_NPROC_PER_NODE is `{text}`; set it to a number of ranks, or auto, cpu or gpu"
            ));
        }
    };
    Ok(Some(Told::by("PET_NPROC_PER_NODE", ranks)))
}

/// How many pods, by whichever variables say so; they must agree.
fn pods(around: &Surroundings, ranks: Option<&Told<Ranks>>) -> Result<Told<Count>, String> {
    let world_size = around.number("WORLD_SIZE")?;
    let per_pod = match ranks {
        Some(Told { value: Ranks::Number(number), .. }) => *number,
        _ => 1,
    };
    match (around.nnodes()?, world_size) {
        (Some((variable, count)), None | Some(0)) => Ok(Told::by(variable, count)),
        (Some((variable, count)), Some(size)) => {
            let counts_processes =
                (count.least..=count.most).any(|pods| pods.checked_mul(per_pod) == Some(size));
            if !counts_processes && !(count.least..=count.most).contains(&size) && variable == "PET_NNODES" {
                return Err(format!(
                    "WORLD_SIZE is {size}, which is neither the {count} pods of {variable} nor {per_pod} processes for each of \
                     them; set it to one of these, or unset it"
                ));
            }
            Ok(Told::by(variable, count))
        }
        (None, Some(size)) if size > 0 && size % per_pod == 0 => {
            let from = if per_pod > 1 { "WORLD_SIZE and PET_NPROC_PER_NODE" } else { "WORLD_SIZE" };
            Ok(Told::by(from, Count::exactly(size / per_pod)))
        }
        (None, Some(size)) => Err(format!(
            "WORLD_SIZE is {size}, which is no multiple of the {per_pod} of PET_NPROC_PER_NODE; set it to one"
        )),
        (None, None) => {
            Err("RANK and MASTER_ADDR are set, but nothing says how many pods there are; set WORLD_SIZE"
                .to_owned())
        }
    }
}

/// PET_RDZV_ENDPOINT, which is where launchers meet, not programs.
fn meeting_endpoint(around: &Surroundings) -> Result<Option<Told<Meeting>>, String> {
    let Some(text) = around.variable("PET_RDZV_ENDPOINT") else { return Ok(None) };
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => {
            let wrong = || format!("PET_RDZV_ENDPOINT is `{text}`; give host:port");
            (host, Some(port.parse().map_err(|_| wrong())?))
        }
        None => (text, None),
    };
    Ok(Some(Told::by("PET_RDZV_ENDPOINT", Meeting { host: host.to_owned(), port })))
}

/// The others' names follow from the master's, where it has one that an operator has made.
fn numbered_peers(address: &str, kind: Kind, pods: Count) -> Vec<Peer> {
    let job = address.strip_suffix("-master-0");
    let peer = |number: u32| {
        let (role, index) = match (kind, number) {
            (Kind::TrainJob, number) => (Role::Node, number),
            (_, 0) => (Role::Master, 0),
            (_, number) => (Role::Worker, number - 1),
        };
        let host = match (trainer_pods(address), job) {
            (Some((job, domain)), _) if kind == Kind::TrainJob => {
                Some(format!("{job}-node-0-{number}.{domain}"))
            }
            (_, Some(job)) => Some(format!("{job}-{role}-{index}")),
            _ => (number == 0 && address != "localhost").then(|| address.to_owned()),
        };
        Peer { role, index, host, port: None }
    };
    (0..pods.most).map(peer).collect()
}

/// The job and the domain in a TrainJob's `job-node-0-0.job`.
fn trainer_pods(address: &str) -> Option<(&str, &str)> {
    let (pod, domain) = address.split_once('.')?;
    Some((pod.strip_suffix("-node-0-0")?, domain))
}

fn first_of<'a>(around: &'a Surroundings, names: &[&'static str]) -> Option<(&'static str, &'a str)> {
    names.iter().find_map(|&name| Some((name, around.variable(name)?)))
}

/// Two variables that mean the same.
fn agree(around: &Surroundings, one: &str, other: &str) -> Result<(), String> {
    match (around.variable(one), around.variable(other)) {
        (Some(first), Some(second)) if first != second => {
            Err(format!("{one} is {first}, but {other} is {second}; they mean the same, so unset one"))
        }
        _ => Ok(()),
    }
}
