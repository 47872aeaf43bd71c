//! `paceline env`: what was understood, and by what.

use std::fmt::Display;

use serde_json::{Value, json};

use super::{Pod, Told};

/// How wide the first column is, and the second.
const WIDTHS: (usize, usize) = (12, 34);

/// More peers are counted, not listed.
const PEERS_SHOWN: usize = 64;

/// The pod in lines for a person.
pub fn as_text(pod: Option<&Pod>) -> String {
    let Some(pod) = pod else {
        return "no job: no TF_CONFIG, no variables of torchrun, Slurm or an indexed Job, and no StatefulSet's name; \
                paceline run -n N runs one on this machine\n"
            .to_owned();
    };
    let mut lines: Vec<String> = values(pod)
        .into_iter()
        .map(|(name, value, from)| {
            let (first, second) = WIDTHS;
            match from {
                Some(from) => format!("{name:<first$}{value:<second$}  from {from}"),
                None => format!("{name:<first$}unknown"),
            }
        })
        .collect();
    lines.extend(pod.peers.iter().enumerate().take(PEERS_SHOWN).map(|(number, peer)| {
        let host = peer.host.as_deref().unwrap_or("has no name that others can resolve");
        let port = peer.port.map(|port| format!(", its program's port is {port}")).unwrap_or_default();
        let own = pod.index.as_ref().is_some_and(|index| index.value as usize == number);
        let own = if own { " (this pod)" } else { "" };
        format!("  {number:<4}{:<14}{host}{port}{own}", format!("{} {}", peer.role, peer.index))
    }));
    if pod.peers.len() > PEERS_SHOWN {
        lines.push(format!("  and {} more", pod.peers.len() - PEERS_SHOWN));
    }
    lines.extend(pod.remarks.iter().map(|remark| format!("note: {remark}")));
    lines.join("\n") + "\n"
}

/// The pod as a document: each value with what it is from, null where it is unknown.
pub fn as_json(pod: Option<&Pod>) -> Value {
    let Some(pod) = pod else { return json!({ "kind": null }) };
    let mut document = serde_json::Map::new();
    for (name, value, from) in values(pod) {
        let entry = from.map_or(Value::Null, |from| json!({ "value": value, "from": from }));
        document.insert(name.replace(' ', "_"), entry);
    }
    let peers = pod.peers.iter().map(|peer| {
        json!({ "role": peer.role.to_string(), "index": peer.index, "host": peer.host, "port": peer.port })
    });
    document.insert("peers".to_owned(), peers.collect());
    document.insert("remarks".to_owned(), json!(pod.remarks));
    Value::Object(document)
}

/// Name, value, source.
fn values(pod: &Pod) -> Vec<(&'static str, String, Option<&str>)> {
    fn row<'a, T: Display>(
        name: &'static str,
        told: Option<&'a Told<T>>,
    ) -> (&'static str, String, Option<&'a str>) {
        (
            name,
            told.map(|told| told.value.to_string()).unwrap_or_default(),
            told.map(|told| told.from.as_str()),
        )
    }
    vec![
        row("kind", Some(&pod.kind)),
        row("role", Some(&pod.role)),
        row("role index", Some(&pod.role_index)),
        row("pod", pod.index.as_ref()),
        row("pods", pod.pods.as_ref()),
        row("meet at", pod.meeting.as_ref()),
        row("ranks each", pod.ranks_per_pod.as_ref()),
    ]
}
