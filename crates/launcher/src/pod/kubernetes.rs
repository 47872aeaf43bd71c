//! Pods that no training operator has made: of an indexed Job, and of a StatefulSet.
//!
//! Both are told which one they are, and by a headless service what the others are called. How many there are is nowhere
//! in a pod; `--nnodes` or PET_NNODES says it.

use super::{Count, Kind, Meeting, Peer, Pod, Role, Surroundings, Told};

const INDEX: &str = "JOB_COMPLETION_INDEX";

/// Reads the index and the names, if the pod has them.
pub fn read(around: &Surroundings) -> Result<Option<Pod>, String> {
    if around.variable("LOCAL_RANK").is_some() {
        return Ok(None);
    }
    let name = around.ordinal();
    let (kind, source, index) = match around.number(INDEX)? {
        Some(index) => {
            check_name(around, index, name)?;
            (Kind::IndexedJob, INDEX, index)
        }
        None => match name {
            // A name with a number alone says little: machines have such names. The service makes it a StatefulSet's.
            Some((_, ordinal)) if around.service().is_some() => {
                (Kind::StatefulSet, "the pod's name", ordinal)
            }
            _ => return Ok(None),
        },
    };
    let pods = around.nnodes()?;
    if let Some((variable, Count { most, .. })) = pods.filter(|(_, count)| index >= count.most) {
        let last = most - 1;
        return Err(format!(
            "this is pod {index} by {source}, but there are {most} by {variable}: pods 0 to {last}"
        ));
    }
    let full_name = |index: u32| {
        let ((name, _), service) = (name?, around.service()?);
        Some(format!("{name}-{index}.{service}"))
    };
    let meeting =
        full_name(0).map(|host| Told::by("/etc/hosts, this pod's full name", Meeting { host, port: None }));
    let remark = match (&meeting, pods) {
        (None, _) => Some(
            "the pod has no full name in /etc/hosts, so others cannot find it: it needs a headless service, and `subdomain` in its template",
        ),
        (_, None) => Some("nothing says how many pods there are; --nnodes N or PET_NNODES does"),
        _ => None,
    };
    let peer = |index| Peer { role: Role::Node, index, host: full_name(index), port: None };
    Ok(Some(Pod {
        kind: Told::by(source, kind),
        role: Told::by(source, Role::Node),
        role_index: Told::by(source, index),
        index: Some(Told::by(source, index)),
        pods: pods.map(|(variable, count)| Told::by(variable, count)),
        meeting,
        ranks_per_pod: None,
        peers: (0..pods.map_or(0, |(_, count)| count.most)).map(peer).collect(),
        remarks: remark.into_iter().map(str::to_owned).collect(),
    }))
}

/// The pods of an indexed Job are called `job-INDEX`, unless their template gives them another hostname.
fn check_name(around: &Surroundings, index: u32, name: Option<(&str, u32)>) -> Result<(), String> {
    match name {
        Some((_, ordinal)) if ordinal != index && around.service().is_some() => {
            Err(format!("{INDEX} is {index}, but this pod is called {}", around.hostname()))
        }
        _ => Ok(()),
    }
}
