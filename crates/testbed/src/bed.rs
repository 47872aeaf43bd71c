//! The hosts, their switch, and how a program gets to them.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Error;
use crate::command::run;
use crate::janitor::{self, Janitor};
use crate::path::Faults;
use crate::relay::Relay;
use crate::tun::Tun;

/// Where the launcher's rendezvous listens. The address exists in the bed's namespaces only, as all of them do.
pub const SWITCH_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);

/// The same over IPv6, where the kernel has it.
pub const SWITCH_ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 0xfe);

/// All IPv4 addresses of a bed, as `ADDRESS/BITS`.
pub const NETWORK: &str = "10.77.0.0/24";

/// Addresses end with 1 to 64; two cores do not carry more.
const HOSTS_LIMIT: usize = 64;

/// Interfaces of a host.
const INTERFACES_LIMIT: usize = 4;

/// IPv4's least MTU for every link is 68, QUIC's is 1200 and headers; the most is what a packet's length field holds.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 1280..=65_535;

/// What a host may send at once over a link with a rate, in bytes: tbf passes nothing that is longer, and the kernel
/// hands it 64 KiB in one piece.
const BURST_BYTES: u32 = 131_072;

/// Packets that a TUN device holds for the relay. The usual 500 are lost in a time slice of another process.
const QUEUE_PACKETS: u32 = 10_000;

/// What a [`Bed`] is to be like.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// How many hosts; 1 to 64.
    pub hosts: usize,
    /// The longest IP packet of every link, in bytes; 1280 to 65535.
    pub mtu: u32,
    /// How many interfaces each host has, `eth0` and so on, each in a network of its own with all other hosts'; 1 to 4,
    /// and 1 with faults.
    pub interfaces: usize,
    /// What every interface of a host can send, in bits per second; `None` for as much as the machine does. Without faults alone: with
    /// them it is [`Faults::rate`].
    pub rate: Option<u64>,
    /// With them there is a [`Relay`], also if they are none yet.
    pub faults: Option<Faults>,
    /// Where the relay's chance begins.
    pub seed: u64,
}

/// Hosts as network namespaces. They go, with what runs in them, when it is dropped or its process ends.
#[derive(Debug)]
pub struct Bed {
    hosts: usize,
    prefix: String,
    /// Before the janitor: its devices would go with the namespaces.
    relay: Option<Relay>,
    _janitor: Janitor,
}

impl Plan {
    /// Hosts joined by veth pairs of this MTU, without faults.
    pub fn clean(hosts: usize, mtu: u32) -> Self {
        Self { hosts, mtu, interfaces: 1, rate: None, faults: None, seed: 0 }
    }

    /// Hosts joined by a [`Relay`], with an Ethernet's MTU.
    pub fn relayed(hosts: usize, faults: Faults, seed: u64) -> Self {
        Self { hosts, mtu: 1500, interfaces: 1, rate: None, faults: Some(faults), seed }
    }

    fn check(&self) -> Result<(), Error> {
        let wrong = |reason: String| Err(Error::Usage { reason });
        if !(1..=HOSTS_LIMIT).contains(&self.hosts) {
            return wrong(format!("{} hosts cannot be made; choose 1 to {HOSTS_LIMIT}", self.hosts));
        }
        if !MTU_RANGE.contains(&self.mtu) {
            let (least, most) = (MTU_RANGE.start(), MTU_RANGE.end());
            return wrong(format!("an MTU of {} cannot be made; choose {least} to {most}", self.mtu));
        }
        let most = if self.faults.is_some() { 1 } else { INTERFACES_LIMIT };
        if !(1..=most).contains(&self.interfaces) {
            let interfaces = self.interfaces;
            return wrong(format!(
                "hosts with {interfaces} interfaces cannot be made here; choose 1 to {most}"
            ));
        }
        if let Some(faults) = &self.faults {
            for (name, share) in
                [("loss", faults.loss), ("reorder", faults.reorder), ("duplicate", faults.duplicate)]
            {
                if !(0.0..=1.0).contains(&share) {
                    return wrong(format!("{name} is a share of packets from 0 to 1, not {share}"));
                }
            }
        }
        Ok(())
    }
}

impl Bed {
    /// Makes the hosts. Takes some 10 ms for each.
    ///
    /// # Errors
    /// [`Error::Usage`] for a plan that makes no sense; otherwise what the system refused, after which nothing is left.
    /// [`missing`] tells beforehand whether it would.
    pub fn build(plan: &Plan) -> Result<Self, Error> {
        static BEDS: AtomicUsize = AtomicUsize::new(0);
        plan.check()?;
        let number = BEDS.fetch_add(1, Ordering::Relaxed);
        janitor::remove_stale(number == 0)?;
        let prefix = janitor::prefix(number);
        let mut names: Vec<String> = (0..plan.hosts).map(|host| format!("{prefix}-h{host}")).collect();
        names.push(format!("{prefix}-switch"));
        let janitor = Janitor::hire(&names)?;
        for name in &names {
            run(&format!("ip netns add {name}"))?;
            run(&format!("ip -n {name} link set lo up"))?;
        }
        let relay = match plan.faults {
            Some(faults) => Some(wire_by_relay(plan, faults, number, &names)?),
            None => {
                wire_by_bridge(plan, &names)?;
                None
            }
        };
        Ok(Self { hosts: plan.hosts, prefix, relay, _janitor: janitor })
    }

    /// How many hosts there are, the switch not counted.
    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// The links, where the plan has faults.
    pub fn relay(&self) -> Option<&Relay> {
        self.relay.as_ref()
    }

    /// A program that will run on a host: its arguments are to be added.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn on_host(&self, host: usize, program: impl AsRef<OsStr>) -> Command {
        inside(&self.host_file(host), program)
    }

    /// A program that will run at the switch, with [`SWITCH_ADDRESS`].
    pub fn on_switch(&self, program: impl AsRef<OsStr>) -> Command {
        inside(&namespace_file(&format!("{}-switch", self.prefix)), program)
    }

    /// The file of a host's namespace, for programs that enter it themselves.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn host_file(&self, host: usize) -> String {
        assert!(host < self.hosts, "hosts are 0 to {}", self.hosts - 1);
        namespace_file(&format!("{}-h{host}", self.prefix))
    }

    /// Words that go before a rank's program: they run it on the host of its rank, so many ranks on each.
    ///
    /// # Panics
    /// If there are no ranks on a host.
    pub fn rank_words(&self, ranks_per_host: usize) -> Vec<String> {
        ["sh", "-c", &self.rank_script(ranks_per_host), "paceline-host"].map(str::to_owned).to_vec()
    }

    /// The same as a script for a shell that has the rank's program and arguments in `"$@"`.
    ///
    /// # Panics
    /// If there are no ranks on a host.
    pub fn rank_script(&self, ranks_per_host: usize) -> String {
        assert!(ranks_per_host > 0, "every host has a rank");
        let host = namespace_file(&format!("{}-h$((PACELINE_RANK / {ranks_per_host}))", self.prefix));
        format!("exec nsenter \"--net={host}\" -- \"$@\"")
    }
}

/// A host's address.
pub fn host_address(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, host as u8 + 1)
}

/// A host's address over IPv6, where the kernel [has it](has_ipv6).
pub fn host_address_v6(host: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, host as u16 + 1)
}

/// Whether hosts have IPv6 addresses besides their others.
pub fn has_ipv6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

/// Why hosts cannot be made here, in one line; `None` if they can. Tries each thing that a bed is made of, but not by way
/// of a bed: a mistake in here must not look like a machine without the means.
pub fn missing() -> Option<String> {
    let name = format!("{}-probe", janitor::prefix(0));
    let probe = || -> Result<(), String> {
        let run = |line: &str| run(line).map(drop).map_err(|error| error.to_string());
        let janitor = Janitor::hire(std::slice::from_ref(&name)).map_err(|error| error.to_string())?;
        run("nsenter --version")?;
        run(&format!("ip netns add {name}"))?;
        run(&format!("ip -n {name} link add probe type bridge"))?;
        run(&format!("ip -n {name} link add one type veth peer name other"))?;
        run(&format!("tc -n {name} qdisc add dev one root tbf rate 1gbit burst 128kb latency 50ms"))?;
        drop(janitor);
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        tun.map(drop).map_err(|error| format!("/dev/net/tun: {error}"))
    };
    probe().err().map(|reason| format!("network namespaces cannot be made here ({reason}); it takes root"))
}

/// Each host has veth pairs whose other ends are in bridges of the switch.
fn wire_by_bridge(plan: &Plan, names: &[String]) -> Result<(), Error> {
    let (switch, hosts) = names.split_last().expect("the switch is the last of them");
    let mtu = plan.mtu;
    for interface in 0..plan.interfaces {
        let bridge = if interface == 0 { "switch".to_owned() } else { format!("switch{interface}") };
        run(&format!("ip -n {switch} link add {bridge} mtu {mtu} type bridge"))?;
        for (host, name) in hosts.iter().enumerate() {
            let (port, device) = (format!("port{host}x{interface}"), format!("eth{interface}"));
            run(&format!(
                "ip -n {switch} link add {port} mtu {mtu} type veth peer name {device} mtu {mtu} netns {name}"
            ))?;
            run(&format!("ip -n {switch} link set {port} master {bridge} up"))?;
            let first = || host_addresses(host);
            let further = || vec![further_address(interface, host as u8 + 1).into()];
            configure(name, &device, &if interface == 0 { first() } else { further() })?;
            if let Some(rate) = plan.rate {
                run(&format!(
                    "tc -n {name} qdisc add dev {device} root tbf rate {rate}bit burst {BURST_BYTES} latency 50ms"
                ))?;
            }
        }
        let first = switch_addresses;
        let further = || vec![further_address(interface, 254).into()];
        configure(switch, &bridge, &if interface == 0 { first() } else { further() })?;
    }
    Ok(())
}

/// An address in the network of a further interface.
fn further_address(interface: usize, last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, interface as u8, last)
}

/// Every host and the switch have a TUN device whose other end the relay has.
fn wire_by_relay(plan: &Plan, faults: Faults, bed: usize, names: &[String]) -> Result<Relay, Error> {
    let failed = |what: &str, error: &dyn std::fmt::Display| Error::System {
        what: what.to_owned(),
        reason: error.to_string(),
    };
    let mut devices = Vec::new();
    for (port, name) in names.iter().enumerate() {
        // Within 15 bytes: a process id has up to 7 digits. Only until the device is in its namespace, under another name.
        let device = format!("pt{}x{:x}x{port:x}", std::process::id(), bed % 256);
        let tun = Tun::create(&device).map_err(|error| failed("make a TUN device", &error))?;
        run(&format!("ip link set {device} netns {name}"))?;
        run(&format!(
            "ip -n {name} link set {device} name eth0 mtu {} txqueuelen {QUEUE_PACKETS}",
            plan.mtu
        ))?;
        let addresses = if port == plan.hosts { switch_addresses() } else { host_addresses(port) };
        configure(name, "eth0", &addresses)?;
        devices.push((addresses, tun));
    }
    Relay::start(devices, faults, plan.seed).map_err(|error| failed("start the relay", &error))
}

fn host_addresses(host: usize) -> Vec<IpAddr> {
    let v6 = has_ipv6().then(|| host_address_v6(host).into());
    [host_address(host).into()].into_iter().chain(v6).collect()
}

fn switch_addresses() -> Vec<IpAddr> {
    let v6 = has_ipv6().then_some(SWITCH_ADDRESS_V6.into());
    [SWITCH_ADDRESS.into()].into_iter().chain(v6).collect()
}

/// Gives a device its addresses and turns it on.
fn configure(name: &str, device: &str, addresses: &[IpAddr]) -> Result<(), Error> {
    for address in addresses {
        // Without a look whether another host has it, which would take a second and more.
        let (bits, flag) = if address.is_ipv4() { (24, "") } else { (64, "nodad") };
        run(&format!("ip -n {name} addr add {address}/{bits} dev {device} {flag}"))?;
    }
    run(&format!("ip -n {name} link set {device} up")).map(drop)
}

fn namespace_file(name: &str) -> String {
    format!("/run/netns/{name}")
}

fn inside(file: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={file}")).arg("--").arg(program);
    command
}
