//! The libraries: how each is installed and built, and with which words it is started.
//!
//! All of them stay on this host: MPI's own start-up traffic is bound to the loopback interface, the data of both MPIs
//! goes through shared memory, Gloo's through 127.0.0.1 (it has no shared memory). The words are those that were the fastest for
//! the peer when they were chosen (2026-11-24, OpenMPI 4.1.4, MPICH 5.0.2, 2 cores of an AMD EPYC, a busy machine):
//!
//! - One rank per core where there are enough, and where there are not, waiting ranks that yield. OpenMPI does the latter
//!   by itself when it knows. MPICH does not: an all_reduce of 1 MiB takes 1.5 s with 4 ranks on 2 cores. Without its
//!   shared-memory algorithm and with a sleep after 16 polls in vain it takes 5 ms.
//! - Memory that malloc keeps: both MPIs take scratch memory in every call, and OpenMPI needs 165 ms instead of 100 ms for
//!   64 MiB when the kernel has to hand out its pages anew each time.

use super::measurement::{self, Measurement};
use super::workload::{Case, Row, WARM_UP};
use super::{RUN_LIMIT, output_of};
use crate::environment::{self, Recipe};
use crate::{process, system, torch, workspace};
use anyhow::{Context, Result, bail};
use paceline_testbed::{Bed, NETWORK, SWITCH_ADDRESS, host_address};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::thread;
use std::time::Duration;

/// Something that is measured, in the order of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Library {
    OpenMpi,
    Mpich,
    Gloo,
    Paceline,
    /// Paceline with buffers that the ranks can see of each other.
    PacelineRegistered,
    /// Paceline between hosts.
    PacelineOver(Fabric),
}

/// What carries Paceline's data between hosts: the values of PACELINE_FABRIC that are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fabric {
    /// The value.
    variable: &'static str,
    /// In tables.
    title: &'static str,
}

pub const FABRICS: &[Fabric] =
    &[Fabric { variable: "quic", title: "Paceline QUIC" }, Fabric { variable: "tls", title: "Paceline TLS" }];

impl Fabric {
    pub fn title(self) -> &'static str {
        self.title
    }

    pub fn variable(self) -> &'static str {
        self.variable
    }
}

/// Where the ranks run, if it is not on this host: two hosts with one rank each.
#[derive(Clone)]
pub struct Hosts {
    pub bed: Rc<Bed>,
}

/// A library that can be run.
pub struct Ready {
    pub library: Library,
    /// Its name and version, as it says itself.
    pub version: String,
    /// What starts the ranks.
    starter: PathBuf,
    /// The benchmark of a peer.
    program: PathBuf,
    hosts: Option<Hosts>,
}

const MPICH: Recipe = Recipe {
    what: "MPICH",
    name: "mpich-5.0.2",
    packages: &["mpich==5.0.2"],
    cost: "a download of 13 MB, a few seconds",
    needed_bytes: 200_000_000,
    is_whole: |environment| environment.join("bin/mpiexec").is_file(),
    must_work: |environment| {
        let mut mpichversion = Command::new(environment.join("bin/mpichversion"));
        mpichversion.arg("--version");
        version_of(mpichversion).map(drop)
    },
};

const OPEN_MPI: [system::Tool; 2] = [
    system::Tool { what: "OpenMPI", package: "openmpi-bin", probe: &["mpirun.openmpi", "--version"] },
    system::Tool {
        what: "OpenMPI's compiler wrapper",
        package: "libopenmpi-dev",
        // Not --version: that asks gcc.
        probe: &["mpicc.openmpi", "-showme:version"],
    },
];

/// See the module's documentation.
const KEEP_MEMORY: [(&str, &str); 2] = [("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", "4294967296")];

impl Library {
    pub const ALL: [Self; 5] =
        [Self::OpenMpi, Self::Mpich, Self::Gloo, Self::Paceline, Self::PacelineRegistered];

    pub fn name(self) -> &'static str {
        match self {
            Self::OpenMpi => "OpenMPI",
            Self::Mpich => "MPICH",
            Self::Gloo => "Gloo",
            Self::Paceline => "Paceline",
            Self::PacelineRegistered => "Paceline registered",
            Self::PacelineOver(fabric) => fabric.title(),
        }
    }

    pub fn is_peer(self) -> bool {
        !matches!(self, Self::Paceline | Self::PacelineRegistered | Self::PacelineOver(_))
    }

    /// A barrier has no buffers that could be registered.
    pub fn runs(self, case: Case) -> bool {
        self != Self::PacelineRegistered || case.bytes > 0
    }

    /// Installs and builds it, if that has not been done; `None` if this build has no such thing.
    ///
    /// # Errors
    /// It cannot be installed or built.
    pub fn set_up(self, limit: Duration) -> Result<Option<Ready>> {
        let ready = |version, starter: PathBuf, program| Ready {
            library: self,
            version,
            starter,
            program,
            hosts: None,
        };
        match self {
            Self::OpenMpi => {
                system::ensure(&OPEN_MPI)?;
                let starter = PathBuf::from("mpirun.openmpi");
                let mut version = Command::new(&starter);
                version.arg("--version");
                let program = build_mpi(Path::new("mpicc.openmpi"), "openmpi", limit)?;
                Ok(Some(ready(format!("{self} {}", version_of(version)?), starter, program)))
            }
            Self::Mpich => {
                let bin = environment::ensure(&MPICH)?.join("bin");
                let program = build_mpi(&bin.join("mpicc"), "mpich", limit)?;
                let mut version = Command::new(bin.join("mpichversion"));
                version.arg("--version");
                Ok(Some(ready(format!("{self} {}", version_of(version)?), bin.join("mpiexec"), program)))
            }
            Self::Gloo => {
                let program = build_gloo(torch::ensure()?.home(), limit)?;
                let version = format!("Gloo of torch {}", torch::VERSION);
                Ok(Some(ready(version, program.clone(), program)))
            }
            Self::Paceline | Self::PacelineOver(_) => {
                let mut version = Command::new(paceline());
                version.arg("--version");
                let version = format!("{self} {}, commit {}", version_of(version)?, commit());
                Ok(Some(ready(version, paceline(), paceline())))
            }
            Self::PacelineRegistered => {
                let mut help = Command::new(paceline());
                help.args(["bench", "--help"]);
                let (_, help) = output_of(help, RUN_LIMIT)?;
                let version = "Paceline with registered buffers".to_owned();
                Ok(help.contains("--registered").then(|| ready(version, paceline(), paceline())))
            }
        }
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Ready {
    /// The same on other hosts.
    pub fn on(&self, hosts: &Hosts) -> Self {
        let Self { library, version, starter, program, .. } = self;
        Self {
            library: *library,
            version: version.clone(),
            starter: starter.clone(),
            program: program.clone(),
            hosts: Some(hosts.clone()),
        }
    }

    /// Runs the rows, all with this number of ranks.
    ///
    /// # Errors
    /// It fails, hangs, or does not say all that it was asked.
    pub fn measure(&self, ranks: u32, rows: &[Row]) -> Result<Vec<Measurement>> {
        let measured = if self.library.is_peer() {
            let cpus = thread::available_parallelism().map_or(1, usize::from);
            let (status, text) = output_of(self.peer(ranks, rows, cpus), RUN_LIMIT)?;
            process::must_succeed(status, "its benchmark")?;
            measurement::of_peer(self.library, ranks, &text)?
        } else {
            let mut measured = Vec::new();
            for row in rows {
                // With a wrong element it fails, and the document says so; without a document it failed otherwise.
                let command = self.own(row);
                let words = process::shown(&command);
                let (status, text) = output_of(command, RUN_LIMIT)?;
                let parsed = measurement::of_paceline(self.library, row.case, &text);
                if parsed.is_err() {
                    process::must_succeed(status, &words)?;
                }
                measured.extend(parsed.with_context(|| format!("cannot read what `{words}` says"))?);
            }
            measured
        };
        if let Some(row) = rows.iter().find(|row| !measured.iter().any(|one| one.case == row.case)) {
            bail!("{} is missing in its result", row.case);
        }
        Ok(measured)
    }

    /// A peer's job of all rows on a machine with so many CPUs.
    fn peer(&self, ranks: u32, rows: &[Row], cpus: usize) -> Command {
        let mut command = Command::new(&self.starter);
        let count = ranks.to_string();
        let crowded = ranks as usize > cpus;
        match (self.library, &self.hosts) {
            (Library::OpenMpi, Some(hosts)) => command = hosts.open_mpi(&self.starter, ranks, &self.program),
            (_, Some(hosts)) => {
                command.env("PEER_HOSTS", hosts.for_gloo(ranks)).arg(&count);
            }
            (Library::OpenMpi, None) => {
                command.args(["-n", &count, "--host", &format!("localhost:{ranks}")]);
                command.args(["--mca", "pml", "ob1", "--mca", "btl", "self,vader"]);
                command.args(["--mca", "plm", "isolated", "--mca", "oob_tcp_if_include", "lo"]);
                if crowded {
                    command.args(["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]);
                } else {
                    command.args(["--bind-to", "core"]);
                }
                // Containers run as root, and mpirun asks twice.
                command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
                command.envs(KEEP_MEMORY).arg(&self.program);
            }
            (Library::Mpich, None) => {
                command.args(["-launcher", "fork", "-iface", "lo", "-n", &count]);
                command.env("UCX_TLS", "self,sm").envs(KEEP_MEMORY);
                if crowded {
                    command.env("MPIR_CVAR_ALLREDUCE_POSIX_INTRA_ALGORITHM", "mpir");
                    command.env("MPIR_CVAR_POSIX_POLL_FREQUENCY", "1");
                    command.env("MPIR_CVAR_CH4_PROGRESS_THROTTLE", "1");
                    command.env("MPIR_CVAR_CH4_PROGRESS_THROTTLE_NO_PROGRESS_COUNT", "16");
                } else {
                    command.args(["-bind-to", "core"]);
                }
                command.arg(&self.program);
            }
            (_, None) => {
                command.arg(&count);
            }
        }
        command.args(rows.iter().map(|row| row.to_argument()));
        command
    }

    /// A row is a job of its own: `paceline bench` has one number of iterations for all its sizes.
    fn own(&self, row: &Row) -> Command {
        let mut command = match &self.hosts {
            Some(hosts) => hosts.bed.on_switch(&self.starter),
            None => Command::new(&self.starter),
        };
        let Row { case: Case { ranks, bytes }, iterations } = row;
        command.args(["bench", if *bytes == 0 { "barrier" } else { "all_reduce" }]);
        if *bytes > 0 {
            command.args(["-b", &bytes.to_string(), "-e", &bytes.to_string()]);
        }
        if self.library == Library::PacelineRegistered {
            command.arg("--registered");
        }
        if let Some(Hosts { bed }) = &self.hosts {
            command.args([
                "--rdzv-endpoint",
                &format!("{SWITCH_ADDRESS}:0"),
                "--through",
                &bed.rank_script(1),
            ]);
        }
        if let Library::PacelineOver(fabric) = self.library {
            command.env("PACELINE_FABRIC", fabric.variable());
        }
        let (warm_up, iterations) = (WARM_UP.to_string(), iterations.to_string());
        command.args(["--ranks", &ranks.to_string(), "-n", &iterations, "-w", &warm_up, "--json"]);
        command
    }
}

impl Hosts {
    /// mpirun at the switch, with a daemon on each host. Both the daemons and the data use the hosts' network alone.
    fn open_mpi(&self, mpirun: &Path, ranks: u32, program: &Path) -> Command {
        let mut command = self.bed.on_switch(mpirun);
        let hosts: Vec<String> =
            (0..ranks as usize).map(|host| format!("{}:1", host_address(host))).collect();
        command.args(["-n", &ranks.to_string(), "--host", &hosts.join(",")]);
        let prefix = self.bed.host_file(0);
        let prefix = prefix.strip_suffix('0').expect("it ends with the host's number");
        let agent = format!("sh {} {prefix}", sources().join("agent.sh").display());
        command.args(["--mca", "plm_rsh_agent", &agent, "--mca", "oob_tcp_if_include", NETWORK]);
        command.args([
            "--mca",
            "pml",
            "ob1",
            "--mca",
            "btl",
            "self,tcp",
            "--mca",
            "btl_tcp_if_include",
            NETWORK,
        ]);
        // A daemon may use the processors of its host alone, which is one for two hosts on two cores.
        command.args(["--bind-to", "none"]);
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.envs(KEEP_MEMORY).arg(program);
        command
    }

    /// What peers/gloo.cpp reads.
    fn for_gloo(&self, ranks: u32) -> String {
        let host = |host| format!("{}={}", self.bed.host_file(host), host_address(host));
        (0..ranks as usize).map(host).collect::<Vec<_>>().join(",")
    }
}

fn sources() -> PathBuf {
    workspace::root().join("xtask/peers")
}

/// The folder of the benchmark programs, and the path of this one.
fn output(name: &str) -> Result<PathBuf> {
    let folder = workspace::target().join("peers");
    fs::create_dir_all(&folder).context("cannot make the folder of the benchmarks")?;
    Ok(folder.join(name))
}

fn build_mpi(compiler: &Path, name: &str, limit: Duration) -> Result<PathBuf> {
    let program = output(name)?;
    let mut command = Command::new(compiler);
    command.args(["-O3", "-Wall", "-Wextra", "-Werror", "-o"]).arg(&program);
    command.args(["bench.c", "mpi.c"].map(|file| sources().join(file)));
    process::run(command, limit)?;
    Ok(program)
}

fn build_gloo(torch: &Path, limit: Duration) -> Result<PathBuf> {
    system::ensure(&[system::CXX])?;
    eprintln!("Building the benchmark of Gloo (usually 15 s)");
    let (object, program) = (output("bench.o")?, output("gloo")?);
    let mut c = Command::new("cc");
    c.args(["-O3", "-Wall", "-Wextra", "-Werror", "-c", "-o"]).arg(&object).arg(sources().join("bench.c"));
    process::run(c, limit)?;
    let (include, lib) = (torch.join("include"), torch.join("lib"));
    let mut cxx = Command::new("c++");
    cxx.args(["-std=c++17", "-O2", "-DUSE_C10D_GLOO", "-o"]).arg(&program);
    cxx.arg("-I").arg(sources().join("gloo_names"));
    cxx.arg("-isystem").arg(&include).arg("-isystem").arg(include.join("torch/csrc/api/include"));
    cxx.arg(&object).arg(sources().join("gloo.cpp"));
    cxx.arg("-L").arg(&lib).args(["-ltorch_cpu", "-lc10"]).arg(format!("-Wl,-rpath,{}", lib.display()));
    // libtorch finds the CUDA runtime through its own RPATH, which the linker does not follow.
    cxx.arg("-Wl,--unresolved-symbols=ignore-in-shared-libs");
    process::run(cxx, limit)?;
    Ok(program)
}

fn paceline() -> PathBuf {
    workspace::target().join("release/paceline")
}

fn commit() -> String {
    let mut git = Command::new("git");
    git.args(["describe", "--always", "--dirty"]).current_dir(workspace::root());
    version_of(git).unwrap_or_else(|_| "unknown".to_owned())
}

/// The last word of the first line: `mpirun (Open MPI) 4.1.4`, `MPICH Version:      5.0.2`, `paceline 0.1.0`.
fn version_of(command: Command) -> Result<String> {
    let words = process::shown(&command);
    let (status, text) = output_of(command, Duration::from_secs(60))?;
    process::must_succeed(status, &words)?;
    let first = text.lines().next().unwrap_or_default();
    Ok(first.split_whitespace().next_back().unwrap_or("unknown").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: [Row; 2] = [
        Row { case: Case { ranks: 4, bytes: 0 }, iterations: 9 },
        Row { case: Case { ranks: 4, bytes: 4096 }, iterations: 7 },
    ];

    fn ready(library: Library) -> Ready {
        Ready {
            library,
            version: String::new(),
            starter: "start".into(),
            program: "bench".into(),
            hosts: None,
        }
    }

    #[test]
    fn a_job_of_ours_is_one_row_and_only_buffers_are_registered() {
        let words = |library, row: &Row| process::shown(&ready(library).own(row));
        let barrier = "start bench barrier --ranks 4 -n 9 -w 3 --json";
        assert_eq!(words(Library::Paceline, &ROWS[0]), barrier);
        let registered = "start bench all_reduce -b 4096 -e 4096 --registered --ranks 4 -n 7 -w 3 --json";
        assert_eq!(words(Library::PacelineRegistered, &ROWS[1]), registered);
        assert!(!Library::PacelineRegistered.runs(ROWS[0].case));
    }

    #[test]
    fn a_peer_is_bound_to_cores_or_yields_but_not_both() {
        let words = |cpus| process::shown(&ready(Library::OpenMpi).peer(4, &ROWS, cpus));
        let yields = |words: &str| words.contains("--bind-to none --mca mpi_yield_when_idle 1");
        assert!(yields(&words(2)) && !yields(&words(4)));
        assert!(words(4).contains("--bind-to core") && words(4).ends_with(" bench barrier:9 4096:7"));
        let throttled = |cpus| {
            let command = ready(Library::Mpich).peer(4, &ROWS, cpus);
            command.get_envs().any(|(name, _)| name == "MPIR_CVAR_CH4_PROGRESS_THROTTLE")
        };
        assert!(throttled(2) && !throttled(4));
        assert_eq!(process::shown(&ready(Library::Gloo).peer(4, &ROWS, 2)), "start 4 barrier:9 4096:7");
    }
}
