//! A DNS server as a cluster's: a few names with one IPv4 address each, which change while it runs.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};

/// What it serves: `job-worker-0` is `job-worker-0.ns.svc.cluster.local` in full.
pub const DOMAIN: &str = "ns.svc.cluster.local";

/// The resolv.conf of a pod in the namespace `ns` whose cluster's DNS is at this address.
pub fn resolv_conf(server: Ipv4Addr) -> String {
    format!("nameserver {server}\nsearch {DOMAIN} svc.cluster.local cluster.local\noptions ndots:5\n")
}

/// A running server, another process.
pub struct Names {
    server: Child,
    changes: ChildStdin,
}

impl Names {
    /// Starts `command`, which has [`serve`] for a part, and waits until it serves.
    pub fn start(mut command: Command) -> Self {
        let mut server = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let mut ready = String::new();
        let stdout = server.stdout.take().expect("it is piped");
        std::io::BufReader::new(stdout).read_line(&mut ready).expect("it says so");
        assert_eq!(ready, "ready\n");
        let changes = server.stdin.take().expect("it is piped");
        Self { server, changes }
    }

    /// From now on the name has this address.
    pub fn set(&mut self, name: &str, address: Ipv4Addr) {
        writeln!(self.changes, "{name}.{DOMAIN} {address}").expect("it listens");
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Serves at this address until standard input ends; each of its lines is a name and its address.
#[allow(clippy::print_stdout, reason = "whoever has started it waits for that line")]
pub fn serve(address: &str) {
    let socket = UdpSocket::bind((address, 53)).expect("the port of DNS is free in this namespace");
    let records: Arc<Mutex<HashMap<String, Ipv4Addr>>> = Arc::default();
    let answers = records.clone();
    std::thread::spawn(move || {
        let mut query = [0; 1500];
        loop {
            let Ok((length, client)) = socket.recv_from(&mut query) else { continue };
            if let Some(answer) = answer(&query[..length], &answers.lock().expect("nobody panics")) {
                let _ = socket.send_to(&answer, client);
            }
        }
    });
    writeln!(std::io::stdout(), "ready").expect("the test reads it");
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let (name, address) = line.split_once(' ').expect("a name and an address");
        let address = address.parse().expect("an address");
        records.lock().expect("nobody panics").insert(name.to_owned(), address);
    }
}

/// The answer to a question about one name (RFC 1035, section 4.1); `None` for what is no question.
fn answer(query: &[u8], records: &HashMap<String, Ipv4Addr>) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    const A: [u8; 2] = [0, 1];
    let (mut labels, mut at) = (Vec::new(), HEADER);
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).to_lowercase());
        at += length;
    }
    let kind: [u8; 2] = query.get(at..at + 2)?.try_into().ok()?;
    let question = query.get(HEADER..at + 4)?;
    let record = records.get(&labels.join("."));
    let address = record.filter(|_| kind == A);
    let no_such_name = u8::from(record.is_none()) * 3;
    let mut answer = query.get(..2)?.to_vec();
    answer.extend([0x85, 0x80 | no_such_name, 0, 1, 0, u8::from(address.is_some()), 0, 0, 0, 0]);
    answer.extend(question);
    if let Some(address) = address {
        // The name of the question, A, IN, for no second at all, four bytes.
        answer.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}
