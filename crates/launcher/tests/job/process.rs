//! What /proc tells about the processes of a job: their ports, and the memory that they have had.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

/// A process of a job, and where it can be reached on loopback.
pub struct Process {
    pub pid: String,
    pub udp: Vec<SocketAddr>,
    pub tcp: Vec<SocketAddr>,
    /// The most memory it had had when this was looked up.
    peak_kib: u64,
}

impl Process {
    pub fn look(pid: String) -> Self {
        let [udp, tcp] = ["udp", "tcp"].map(|protocol| {
            let ports = ports(&pid, protocol).into_iter();
            ports.map(|port| (Ipv4Addr::LOCALHOST, port).into()).collect()
        });
        Self { peak_kib: peak_kib(&pid), udp, tcp, pid }
    }

    /// The process of a line that ends with its id.
    pub fn of_line(line: &str) -> Self {
        Self::look(line.rsplit(' ').next().expect("a line has a last word").to_owned())
    }

    /// By how much the most memory it has had is more than at the first look.
    pub fn grown_kib(&self) -> u64 {
        peak_kib(&self.pid).saturating_sub(self.peak_kib)
    }
}

/// The most memory that a process has had.
fn peak_kib(pid: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// The ports a process listens on, by the inodes of its sockets.
fn ports(pid: &str, protocol: &str) -> Vec<u16> {
    /// TCP_LISTEN, and for UDP a socket that is not connected.
    const LISTENING: [&str; 2] = ["0A", "07"];
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("the process runs")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/{protocol}")).expect("Linux has it");
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|columns| LISTENING.contains(&columns[3]) && sockets.iter().any(|inode| inode == columns[9]))
        .map(|columns| columns[1].split_once(':').expect("address:port").1)
        .map(|port| u16::from_str_radix(port, 16).expect("a hexadecimal port"))
        .collect()
}
