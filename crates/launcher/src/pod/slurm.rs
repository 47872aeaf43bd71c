//! A step of Slurm: what `srun` tells each of the processes that it starts.
//!
//! A batch script and the shell of `salloc` have Slurm's variables too, but run on one node alone; a step has SLURM_STEP_ID.

use super::{Count, Kind, Meeting, Peer, Pod, Role, Surroundings, Told, nodelist};

const NODES: [&str; 3] = ["SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"];
const TASKS: [&str; 2] = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"];
const LISTS: [&str; 3] = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];

/// The number that Slurm gives to batch scripts for a step (slurm.h: SLURM_BATCH_SCRIPT), if it gives one.
const BATCH_SCRIPT: &str = "4294967291";

/// Reads Slurm's variables, if this is a step on several nodes.
pub fn read(around: &Surroundings) -> Result<Option<Pod>, String> {
    let step = around.variable("SLURM_STEP_ID").or(around.variable("SLURM_STEPID"));
    if step.is_none_or(|step| step == BATCH_SCRIPT) || around.variable("LOCAL_RANK").is_some() {
        return Ok(None);
    }
    let Some((nodes_from, nodes)) = around.first_number(&NODES)?.filter(|&(_, nodes)| nodes > 1) else {
        return Ok(None);
    };
    if let Some((variable, tasks)) = around.first_number(&TASKS)?
        && tasks != nodes
    {
        return Err(format!(
            "Slurm has started {tasks} launchers ({variable}) on {nodes} nodes ({nodes_from}); start one on each with \
             srun --ntasks-per-node=1, and its ranks with -n"
        ));
    }
    let (index_from, index) = around
        .first_number(&["SLURM_NODEID", "SLURM_PROCID"])?
        .ok_or("SLURM_STEP_ID is set, but SLURM_NODEID is not, so this node does not know which one it is")?;
    let (list_from, list) = LISTS
        .into_iter()
        .find_map(|name| Some((name, around.variable(name)?)))
        .ok_or("SLURM_STEP_ID is set, but SLURM_STEP_NODELIST is not, so the others have no names")?;
    let hosts = nodelist::expand(list).map_err(|why| format!("{list_from}: {why}"))?;
    if hosts.len() != nodes as usize {
        return Err(format!("{list_from} has {} nodes, but {nodes_from} is {nodes}; unset one", hosts.len()));
    }
    let Some(own) = hosts.get(index as usize) else {
        return Err(format!("{index_from} is {index}, but there are {nodes} nodes by {nodes_from}"));
    };
    if let Some(name) = around.variable("SLURMD_NODENAME").filter(|name| name != own) {
        return Err(format!(
            "{index_from} is {index}, which is {own} in {list_from}, but SLURMD_NODENAME is {name}"
        ));
    }
    Ok(Some(pod((index_from, index), (nodes_from, nodes), (list_from, hosts))))
}

fn pod(
    (index_from, index): (&str, u32),
    (nodes_from, nodes): (&str, u32),
    (list_from, hosts): (&str, Vec<String>),
) -> Pod {
    let meeting = hosts.first().map(|host| Told::by(list_from, Meeting { host: host.clone(), port: None }));
    let peer = |(index, host)| Peer { role: Role::Node, index, host: Some(host), port: None };
    Pod {
        kind: Told::by("SLURM_STEP_ID", Kind::Slurm),
        role: Told::by("SLURM_STEP_ID", Role::Node),
        role_index: Told::by(index_from, index),
        index: Some(Told::by(index_from, index)),
        pods: Some(Told::by(nodes_from, Count::exactly(nodes))),
        meeting,
        ranks_per_pod: None,
        peers: (0..).zip(hosts).map(peer).collect(),
        remarks: Vec::new(),
    }
}
