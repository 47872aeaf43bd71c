//! What joins the pods, and how a pod's program gets there.

use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use paceline_testbed::{Bed, Plan, host_address};
use tempfile::TempDir;

use super::Choice;
use super::environment::Address;
use super::manifest::{Job, JobKind};
use crate::error::Error;
use crate::torchrun::port;

/// Makes a pod's own /etc/hosts and name, and becomes its program.
const SCRIPT: &str =
    r#"mount --bind "$1" /etc/hosts && echo "$2" > /proc/sys/kernel/hostname && shift 2 && exec "$@""#;

/// The packets of a pod network: Ethernet's.
const MTU: u32 = 1500;

/// The pods' hosts, or their ports.
pub struct Network {
    hosts: Option<Bed>,
    addresses: Vec<Address>,
    /// The port of Paceline's launchers, where all pods share one address.
    launcher_port: Option<u16>,
    folder: TempDir,
}

impl Network {
    /// Joins the pods of a job.
    ///
    /// # Errors
    /// [`Error::Usage`] if hosts were asked for and cannot be made, [`Error::System`] for what the system refused.
    pub fn join(job: &Job, choice: Choice) -> Result<Self, Error> {
        let missing = match choice {
            Choice::Loopback => Some(String::new()),
            Choice::Auto | Choice::Hosts => paceline_testbed::missing(),
        };
        if let (Choice::Hosts, Some(why)) = (choice, &missing) {
            return Err(Error::Usage(format!("--network hosts: {why}")));
        }
        let folder = tempfile::tempdir().map_err(|e| system("cannot make a folder", &e))?;
        write_secret(&folder).map_err(|e| system("cannot write the job's secret", &e))?;
        match missing {
            None => Self::of_hosts(job, folder),
            Some(_) => Self::of_loopback(job, folder),
        }
    }

    fn of_hosts(job: &Job, folder: TempDir) -> Result<Self, Error> {
        let bed = Bed::build(&Plan::clean(job.pods.len(), MTU))
            .map_err(|e| system("cannot make the pods' hosts", &e))?;
        let lines: String = names(job)
            .iter()
            .enumerate()
            .map(|(number, [short, full])| {
                format!("{} {short} {full} {full}.cluster.local\n", host_address(number))
            })
            .collect();
        let hosts = format!("127.0.0.1 localhost\n::1 localhost\n{lines}");
        fs::write(folder.path().join("hosts"), hosts)
            .map_err(|e| system("cannot write the pods' names", &e))?;
        // As the operators write them.
        let host = |[short, full]: [String; 2]| if job.kind == JobKind::TfJob { full } else { short };
        let addresses = names(job).into_iter().zip(&job.pods);
        let addresses = addresses.map(|(names, pod)| Address { host: host(names), port: pod.port }).collect();
        Ok(Self { hosts: Some(bed), addresses, launcher_port: None, folder })
    }

    /// Each pod gets a port of its own in place of the manifest's.
    fn of_loopback(job: &Job, folder: TempDir) -> Result<Self, Error> {
        let mut ports: Vec<u16> = Vec::new();
        while ports.len() <= job.pods.len() {
            // A pod that is started again needs its port once more, which nobody's outgoing connection may have taken meanwhile.
            let port = port::free(|| fastrand::u64(..));
            let port = port.ok_or_else(|| system("cannot find free ports", &"all are in use"))?;
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        let launcher_port = ports.pop();
        let address = |port| Address { host: "127.0.0.1".to_owned(), port };
        Ok(Self { hosts: None, addresses: ports.into_iter().map(address).collect(), launcher_port, folder })
    }

    /// Where each pod's program is reached.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Variables that a pod gets of the network, besides the operator's.
    pub fn variables(&self, name: &str) -> Vec<(String, String)> {
        let secret = self.folder.path().join("secret").to_string_lossy().into_owned();
        let mut variables = vec![("HOSTNAME".to_owned(), name.to_owned())];
        variables.push(("PACELINE_JOB_SECRET_FILE".to_owned(), secret));
        variables.extend(self.launcher_port.map(|port| ("PACELINE_PORT".to_owned(), port.to_string())));
        variables
    }

    /// The program of a pod, to which its arguments are to be added.
    pub fn command(&self, number: usize, name: &str, program: &str) -> Command {
        match &self.hosts {
            None => Command::new(program),
            Some(bed) => {
                let mut command = bed.on_host(number, "unshare");
                command.args(["--mount", "--uts", "--", "sh", "-c", SCRIPT, "sh"]);
                command.arg(self.folder.path().join("hosts")).arg(name).arg(program);
                command
            }
        }
    }
}

/// Each pod's short name, and the one of its service.
fn names(job: &Job) -> Vec<[String; 2]> {
    let name = |pod| {
        let name = super::name(job, pod);
        [name.clone(), format!("{name}.{}.svc", job.namespace)]
    };
    job.pods.iter().map(name).collect()
}

/// A secret of this job alone, in case its programs are started by `paceline run`.
fn write_secret(folder: &TempDir) -> std::io::Result<()> {
    let mut random = [0; 32];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = folder.path().join("secret");
    fs::write(&path, "")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    fs::write(&path, text)
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.hosts.is_some() {
            "each pod on a host of its own"
        } else {
            "all pods on loopback"
        })
    }
}

fn system(what: &str, why: &dyn fmt::Display) -> Error {
    Error::System { what: what.to_owned(), why: why.to_string() }
}
