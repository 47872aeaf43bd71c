//! The sockets of this process, as the kernel lists them: what a rank listens on and dials from.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// A UDP or TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    pub is_tcp: bool,
    pub local: SocketAddr,
    /// Port 0 for one that is not connected.
    pub remote: SocketAddr,
}

impl Socket {
    /// All that this process has open.
    pub fn own() -> Vec<Self> {
        let own = own_inodes();
        let tables = [("udp", false), ("udp6", false), ("tcp", true), ("tcp6", true)];
        // A kernel without IPv6 has no tables of it.
        let table = |name: &str| fs::read_to_string(format!("/proc/self/net/{name}")).unwrap_or_default();
        let mut sockets = Vec::new();
        for (name, is_tcp) in tables {
            let lines: Vec<String> = table(name).lines().skip(1).map(str::to_owned).collect();
            for line in lines {
                let words: Vec<&str> = line.split_whitespace().collect();
                if own.contains(words[9]) {
                    let (local, remote) = (address(words[1]), address(words[2]));
                    sockets.push(Self { is_tcp, local, remote });
                }
            }
        }
        sockets
    }
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { is_tcp, local, remote } = self;
        write!(f, "{} {local} {remote}", if *is_tcp { "tcp" } else { "udp" })
    }
}

impl FromStr for Socket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split(' ').collect();
        let &[protocol, local, remote] = words.as_slice() else { return Err(format!("no socket: {text:?}")) };
        let address = |text: &str| text.parse().map_err(|error| format!("{text}: {error}"));
        Ok(Self { is_tcp: protocol == "tcp", local: address(local)?, remote: address(remote)? })
    }
}

fn own_inodes() -> HashSet<String> {
    let files = fs::read_dir("/proc/self/fd").expect("Linux has it");
    let target = |file: fs::DirEntry| fs::read_link(file.path()).ok()?.to_str().map(str::to_owned);
    let inode = |target: String| Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned());
    files.flatten().filter_map(target).filter_map(inode).collect()
}

/// `0100007F:1F90`: words of four bytes as this machine has them in memory, and the port.
fn address(text: &str) -> SocketAddr {
    let (ip, port) = text.split_once(':').expect("an address and a port");
    let number = |text: &str| u32::from_str_radix(text, 16).expect("hexadecimal");
    let words: Vec<[u8; 4]> =
        (0..ip.len() / 8).map(|word| number(&ip[8 * word..][..8]).to_ne_bytes()).collect();
    let ip: IpAddr = match words.as_slice() {
        &[word] => Ipv4Addr::from(word).into(),
        words => Ipv6Addr::from(<[u8; 16]>::try_from(words.concat()).expect("four words")).to_canonical(),
    };
    SocketAddr::new(ip, number(port) as u16)
}
