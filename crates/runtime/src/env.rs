//! The job's environment variables: the contract between the launcher and the workers.
//!
//! Parsing is a pure function of a lookup, so that it is tested without touching the process; nothing
//! below this module reads the environment. docs/configuration.md lists every variable.

use std::path::{Path, PathBuf};
use std::time::Duration;

use paceline_collectives::device::{Setup, Wanted};
use paceline_collectives::{Algorithm, Config, Order};
use paceline_transport::Fabric;
use paceline_transport::shm::Sharing;

use crate::Error;
use crate::elastic::failpoint::{self, Failpoint};
use crate::interface::Selection;

/// A worker's place in a job, as its launcher says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobEnv {
    /// This process's rank in the first epoch.
    pub rank: usize,
    /// The number of ranks in the first epoch.
    pub world_size: usize,
    /// The number of this process on its host, from 0.
    pub local_rank: usize,
    /// The number of ranks on this host.
    pub local_world_size: usize,
    /// How often all ranks of the job were started before.
    pub generation: u32,
    /// Where the ranks meet, `host:port`.
    pub rendezvous: String,
    /// How long to wait there for the others.
    pub rendezvous_timeout: Duration,
    /// The file with this member's certificate and key.
    pub identity: PathBuf,
    /// Which of this host's addresses this process listens on, tells the other ranks, and dials them from; `None`
    /// leaves it to the system.
    pub interface: Option<Selection>,
    /// The folder for traces of the flight recorder; `None` for none.
    pub flight_recorder: Option<PathBuf>,
}

/// Where a worker that can lose others finds its launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElasticEnv {
    /// The launcher's socket.
    pub socket: PathBuf,
    /// Which of the launcher's processes this is.
    pub child: u32,
    /// How many processes its rank has had before, since all ranks were started.
    pub life: u32,
    /// The rank.
    pub rank: usize,
    /// The file or folder with this worker's certificate and key.
    pub identity: PathBuf,
}

/// How long ranks wait for each other at the start unless told otherwise.
pub const DEFAULT_RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(600);

const FAILPOINT: &str = "PACELINE_FAILPOINT";
const ELASTIC: &str = "PACELINE_ELASTIC";
const RANK: &str = "PACELINE_RANK";
const WORLD_SIZE: &str = "PACELINE_WORLD_SIZE";
const LOCAL_RANK: &str = "PACELINE_LOCAL_RANK";
const LOCAL_WORLD_SIZE: &str = "PACELINE_LOCAL_WORLD_SIZE";
const GENERATION: &str = "PACELINE_GENERATION";
const RENDEZVOUS: &str = "PACELINE_RENDEZVOUS";
const RENDEZVOUS_TIMEOUT: &str = "PACELINE_RENDEZVOUS_TIMEOUT";
const IDENTITY: &str = "PACELINE_IDENTITY";
const FLIGHT_RECORDER: &str = "PACELINE_FLIGHT_RECORDER";
pub(crate) const INTERFACE: &str = "PACELINE_INTERFACE";
const TIMEOUT: &str = "PACELINE_TIMEOUT";
const SEGMENT_BYTES: &str = "PACELINE_SEGMENT_BYTES";
const ALGORITHM: &str = "PACELINE_ALGORITHM";
const ORDER: &str = "PACELINE_ORDER";
const SHARED_MEMORY: &str = "PACELINE_SHARED_MEMORY";
const FABRIC: &str = "PACELINE_FABRIC";
const INSECURE: &str = "PACELINE_INSECURE";
const BACKEND: &str = "PACELINE_BACKEND";
const CUDA_PATH: &str = "PACELINE_CUDA_PATH";
/// NCCL's own: what takes the place of the host's name where it looks which ranks share a host.
const NCCL_HOSTID: &str = "NCCL_HOSTID";
/// What Linux draws at each start.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The largest world a launcher may announce; a typing error should not allocate links for millions.
const WORLD_SIZE_LIMIT: usize = 65_536;

/// The variables of this process, for the functions below.
pub fn process(variable: &str) -> Option<String> {
    std::env::var_os(variable).map(|value| value.to_string_lossy().into_owned())
}

impl JobEnv {
    /// Reads the variables; `None` when there is no launcher, so that the process is a world of one.
    ///
    /// # Errors
    /// [`Error::Environment`] when there is a launcher but a variable is missing or makes no sense, and
    /// when another launcher (torchrun, a training operator) says that there are several ranks, since a
    /// world of one each would train several models and look well.
    pub fn from_vars(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Error> {
        if lookup(RENDEZVOUS).is_none() {
            return match lookup("WORLD_SIZE").and_then(|size| size.trim().parse::<usize>().ok()) {
                Some(2..) => Err(Error::Environment {
                    variable: "WORLD_SIZE",
                    reason: "there are several ranks but Paceline's launcher did not start this one; \
                             put `paceline run` in front of the program"
                        .to_owned(),
                }),
                _ => Ok(None),
            };
        }
        let world_size = number(&lookup, WORLD_SIZE, 1, WORLD_SIZE_LIMIT)?;
        let local_world_size = number(&lookup, LOCAL_WORLD_SIZE, 1, world_size)?;
        Ok(Some(Self {
            rank: number(&lookup, RANK, 0, world_size - 1)?,
            world_size,
            local_rank: number(&lookup, LOCAL_RANK, 0, local_world_size - 1)?,
            local_world_size,
            generation: lookup(GENERATION)
                .map_or(Ok(0), |_| number(&lookup, GENERATION, 0, u32::MAX as usize))?
                as u32,
            rendezvous: required(&lookup, RENDEZVOUS)?,
            rendezvous_timeout: seconds(&lookup, RENDEZVOUS_TIMEOUT)?.unwrap_or(DEFAULT_RENDEZVOUS_TIMEOUT),
            identity: required(&lookup, IDENTITY)?.into(),
            interface: interface(&lookup)?,
            flight_recorder: lookup(FLIGHT_RECORDER).filter(|folder| !folder.is_empty()).map(PathBuf::from),
        }))
    }

    /// The variables that [`from_vars`](Self::from_vars) reads back, and torchrun's names for the four numbers.
    pub fn to_vars(&self) -> Vec<(&'static str, String)> {
        let identity = self.identity.to_string_lossy().into_owned();
        let timeout = self.rendezvous_timeout.as_secs_f64().to_string();
        let mut vars =
            vec![(RENDEZVOUS, self.rendezvous.clone()), (RENDEZVOUS_TIMEOUT, timeout), (IDENTITY, identity)];
        for (ours, torchrun, value) in [
            (RANK, "RANK", self.rank),
            (WORLD_SIZE, "WORLD_SIZE", self.world_size),
            (LOCAL_RANK, "LOCAL_RANK", self.local_rank),
            (LOCAL_WORLD_SIZE, "LOCAL_WORLD_SIZE", self.local_world_size),
        ] {
            vars.extend([(ours, value.to_string()), (torchrun, value.to_string())]);
        }
        vars.push((GENERATION, self.generation.to_string()));
        let folder = self.flight_recorder.as_ref().map(|folder| folder.to_string_lossy().into_owned());
        vars.extend(folder.map(|folder| (FLIGHT_RECORDER, folder)));
        vars.extend(self.interface.as_ref().map(|interface| (INTERFACE, interface.to_string())));
        vars
    }
}

impl ElasticEnv {
    /// Reads the variables; `None` without a launcher that can replace workers.
    ///
    /// # Errors
    /// [`Error::Environment`] for a variable that is missing or makes no sense.
    pub fn from_vars(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Error> {
        let Some(value) = lookup(ELASTIC) else { return Ok(None) };
        let place = value.split_once('@').and_then(|(numbers, socket)| {
            let (child, life) = numbers.split_once('.')?;
            Some((child.parse().ok()?, life.parse().ok()?, socket))
        });
        let (child, life, socket) = place.ok_or_else(|| Error::Environment {
            variable: ELASTIC,
            reason: format!("`{value}` is not of the form NUMBER.LIFE@PATH; `paceline run` sets it"),
        })?;
        let identity = required(&lookup, IDENTITY)?.into();
        let rank = number(&lookup, RANK, 0, WORLD_SIZE_LIMIT)?;
        Ok(Some(Self { socket: socket.into(), child, life, rank, identity }))
    }

    /// The variable that [`from_vars`](Self::from_vars) reads back, beside those of the identity and the rank.
    pub fn to_var(child: u32, life: u32, socket: &Path) -> (&'static str, String) {
        (ELASTIC, format!("{child}.{life}@{}", socket.display()))
    }
}

/// The collectives' configuration: defaults, changed by `PACELINE_TIMEOUT`, `PACELINE_SEGMENT_BYTES`,
/// `PACELINE_ALGORITHM` and `PACELINE_ORDER`.
///
/// # Errors
/// [`Error::Environment`] for a value that makes no sense.
pub fn collectives_config(lookup: impl Fn(&str) -> Option<String>) -> Result<Config, Error> {
    let mut config = Config::default();
    if let Some(timeout) = seconds(&lookup, TIMEOUT)? {
        config.timeout = timeout;
    }
    if lookup(SEGMENT_BYTES).is_some() {
        config.segment_bytes = number(&lookup, SEGMENT_BYTES, 64, 32 * 1024 * 1024)?;
    }
    let algorithms = [
        ("auto", Algorithm::Auto),
        ("direct", Algorithm::Direct),
        ("ring", Algorithm::Ring),
        ("halving", Algorithm::Halving),
    ];
    if let Some(algorithm) = choice(&lookup, ALGORITHM, &algorithms)? {
        config.algorithm = algorithm;
    }
    if let Some(order) = choice(&lookup, ORDER, &[("fixed", Order::Fixed), ("any", Order::Any)])? {
        config.order = order;
    }
    Ok(config)
}

/// Where workers of an elastic training are to fail, for tests: `PACELINE_FAILPOINT`.
///
/// # Errors
/// [`Error::Environment`] for a value that makes no sense.
pub(crate) fn failpoints(lookup: impl Fn(&str) -> Option<String>) -> Result<Vec<Failpoint>, Error> {
    let unusable = |reason: String| Error::Environment { variable: FAILPOINT, reason };
    lookup(FAILPOINT).map_or(Ok(Vec::new()), |list| failpoint::parse(&list).map_err(unusable))
}

/// Whether ranks of one host share memory: `PACELINE_SHARED_MEMORY`.
///
/// # Errors
/// [`Error::Environment`] for a value that makes no sense.
pub fn sharing(lookup: impl Fn(&str) -> Option<String>) -> Result<Sharing, Error> {
    let Some(value) = lookup(SHARED_MEMORY) else { return Ok(Sharing::default()) };
    let block = || value.trim().strip_prefix("blocks:")?.parse().ok().filter(|&len: &usize| len > 0);
    match value.trim() {
        "auto" => Ok(Sharing::Auto),
        "off" => Ok(Sharing::Off),
        _ => block().map(Sharing::WithinBlocks).ok_or_else(|| Error::Environment {
            variable: SHARED_MEMORY,
            reason: format!("`{value}` is none of auto, off, blocks:N"),
        }),
    }
}

/// Which links the ranks use that share no memory: `PACELINE_FABRIC`.
///
/// # Errors
/// [`Error::Environment`] for a value that makes no sense, and for links without protection that `PACELINE_INSECURE`
/// does not allow.
pub fn fabric(lookup: impl Fn(&str) -> Option<String>) -> Result<Fabric, Error> {
    let fabric = choice(&lookup, FABRIC, &Fabric::NAMES)?.unwrap_or_default();
    if fabric == Fabric::Tcp && !insecure(&lookup)? {
        let reason =
            format!("{PLAIN_TCP}; where that is meant, paceline run --insecure or {INSECURE}=1 allows it");
        return Err(Error::Environment { variable: FABRIC, reason });
    }
    Ok(fabric)
}

/// What is wrong with links over plain TCP, as the beginning of a sentence.
pub const PLAIN_TCP: &str = "over tcp anybody on the way can read and change what ranks send each other";

/// Whether the job may go without protection where it is told to: `PACELINE_INSECURE`.
///
/// # Errors
/// [`Error::Environment`] for a value other than 1 and 0.
pub fn insecure(lookup: impl Fn(&str) -> Option<String>) -> Result<bool, Error> {
    Ok(choice(&lookup, INSECURE, &[("1", true), ("0", false)])?.unwrap_or(false))
}

/// Which way collectives on device memory are to go, for [`agree`](paceline_collectives::device::agree):
/// `PACELINE_BACKEND`.
///
/// # Errors
/// [`Error::Environment`] for a value that makes no sense.
pub fn backend(lookup: impl Fn(&str) -> Option<String>) -> Result<Wanted, Error> {
    Ok(choice(&lookup, BACKEND, &Wanted::NAMES)?.unwrap_or_default())
}

/// How a group of devices is formed: by `PACELINE_BACKEND`, and on the host that NCCL would take it for.
///
/// # Errors
/// [`Error::Environment`] for a value that makes no sense.
pub fn device_setup(lookup: impl Fn(&str) -> Option<String>) -> Result<Setup, Error> {
    let wanted = backend(&lookup)?;
    let host = lookup(NCCL_HOSTID).or_else(|| std::fs::read_to_string(BOOT_ID).ok());
    Ok(Setup::new(wanted, host_number(host.as_deref().unwrap_or_default().trim())))
}

/// The first eight bytes of the digest of a host's name.
fn host_number(name: &str) -> u64 {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
    digest.as_ref().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The file with CUDA's driver, where the system does not know it: `PACELINE_CUDA_PATH`.
pub fn cuda_driver(lookup: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    lookup(CUDA_PATH).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// The variable that says how collectives on device memory go.
pub fn backend_var(name: &str) -> (&'static str, String) {
    (BACKEND, name.to_owned())
}

/// The variable that carries the launcher's `--insecure` to the ranks.
pub fn insecure_var() -> (&'static str, String) {
    (INSECURE, "1".to_owned())
}

/// The file or folder with this member's certificate and key: `PACELINE_IDENTITY`.
pub fn identity(lookup: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    lookup(IDENTITY).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Which of this host's addresses are meant: `PACELINE_INTERFACE`.
///
/// # Errors
/// [`Error::Environment`] for a value that makes no sense.
pub fn interface(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Selection>, Error> {
    let unusable = |reason: String| Error::Environment { variable: INTERFACE, reason };
    lookup(INTERFACE).map(|list| list.parse().map_err(unusable)).transpose()
}

/// The variable that carries the launcher's `--fabric` to the ranks.
pub fn fabric_var(fabric: Fabric) -> (&'static str, String) {
    (FABRIC, fabric.name().to_owned())
}

/// The variable that carries the launcher's `--timeout` to the ranks.
pub fn timeout_var(timeout: Duration) -> (&'static str, String) {
    (TIMEOUT, timeout.as_secs_f64().to_string())
}

fn required(lookup: &impl Fn(&str) -> Option<String>, variable: &'static str) -> Result<String, Error> {
    lookup(variable).filter(|value| !value.is_empty()).ok_or_else(|| Error::Environment {
        variable,
        reason: "not set, though PACELINE_RENDEZVOUS is; `paceline run` sets both".to_owned(),
    })
}

fn number(
    lookup: &impl Fn(&str) -> Option<String>,
    variable: &'static str,
    least: usize,
    most: usize,
) -> Result<usize, Error> {
    let value = required(lookup, variable)?;
    value.trim().parse().ok().filter(|number| (least..=most).contains(number)).ok_or_else(|| {
        Error::Environment { variable, reason: format!("`{value}` is not a number from {least} to {most}") }
    })
}

fn seconds(
    lookup: &impl Fn(&str) -> Option<String>,
    variable: &'static str,
) -> Result<Option<Duration>, Error> {
    let Some(value) = lookup(variable) else { return Ok(None) };
    let seconds = value.trim().parse().ok().filter(|&seconds: &f64| seconds > 0.0);
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // A thousand years: beyond that, adding it to a clock overflows.
    let duration = duration.filter(|duration| duration.as_secs() < 31_557_600_000);
    duration.map(Some).ok_or_else(|| Error::Environment {
        variable,
        reason: format!("`{value}` is not a positive number of seconds"),
    })
}

fn choice<T: Copy>(
    lookup: &impl Fn(&str) -> Option<String>,
    variable: &'static str,
    choices: &[(&str, T)],
) -> Result<Option<T>, Error> {
    let Some(value) = lookup(variable) else { return Ok(None) };
    let found = choices.iter().find(|(name, _)| *name == value.trim());
    found.map(|&(_, choice)| Some(choice)).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        Error::Environment { variable, reason: format!("`{value}` is none of {}", names.join(", ")) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env() -> JobEnv {
        JobEnv {
            rank: 3,
            world_size: 8,
            local_rank: 1,
            local_world_size: 2,
            generation: 3,
            rendezvous: "127.0.0.1:29400".to_owned(),
            rendezvous_timeout: Duration::from_millis(1500),
            identity: "/run/job/worker-3.pem".into(),
            interface: Some("10.0.0.0/8".parse().expect("a network")),
            flight_recorder: Some("/traces".into()),
        }
    }

    fn lookup(vars: Vec<(&'static str, String)>) -> impl Fn(&str) -> Option<String> {
        move |variable| vars.iter().find(|(name, _)| *name == variable).map(|(_, value)| value.clone())
    }

    /// The variables of `env()`, with one of them changed or, for `None`, missing.
    fn vars_but(variable: &'static str, value: Option<&str>) -> Vec<(&'static str, String)> {
        let mut vars = env().to_vars();
        vars.retain(|(name, _)| *name != variable);
        vars.extend(value.map(|value| (variable, value.to_owned())));
        vars
    }

    #[test]
    fn a_worker_reads_what_its_launcher_wrote() {
        assert_eq!(JobEnv::from_vars(lookup(env().to_vars())), Ok(Some(env())));
        let anywhere = JobEnv { interface: None, flight_recorder: None, ..env() };
        assert_eq!(JobEnv::from_vars(lookup(anywhere.to_vars())), Ok(Some(anywhere)));
    }

    #[test]
    fn a_worker_that_can_lose_others_finds_its_launcher() {
        let mut vars = env().to_vars();
        vars.push(ElasticEnv::to_var(7, 2, Path::new("/run/a.b@c/elastic")));
        let (identity, socket) = (env().identity, PathBuf::from("/run/a.b@c/elastic"));
        let expected = ElasticEnv { socket, child: 7, life: 2, rank: 3, identity };
        assert_eq!(ElasticEnv::from_vars(lookup(vars)), Ok(Some(expected)));
        for value in ["7@/run/elastic", "7.x@/run/elastic", "7.2"] {
            let error = ElasticEnv::from_vars(lookup(vars_but(ELASTIC, Some(value)))).expect_err(value);
            assert!(error.to_string().contains("NUMBER.LIFE@PATH"), "{error}");
        }
    }

    #[test]
    fn a_failpoint_that_makes_no_sense_is_refused_under_the_name_of_its_variable() {
        let set = |value: &str| failpoints(lookup(vec![(FAILPOINT, value.to_owned())]));
        assert_eq!(failpoints(|_| None), Ok(Vec::new()));
        assert_eq!(set("rank=1,op=ready").map(|read| read.len()), Ok(1));
        let error = set("rank=1").expect_err("where?").to_string();
        assert!(error.contains(FAILPOINT) && error.contains("op="), "{error}");
    }

    #[test]
    fn without_a_launcher_the_process_is_alone() {
        assert_eq!(JobEnv::from_vars(|_| None), Ok(None));
        assert_eq!(JobEnv::from_vars(lookup(vec![("WORLD_SIZE", "1".to_owned())])), Ok(None));
    }

    #[test]
    fn several_ranks_of_another_launcher_are_not_silently_alone() {
        let error = JobEnv::from_vars(lookup(vec![("WORLD_SIZE", "4".to_owned())])).expect_err("4 ranks");
        assert!(error.to_string().contains("paceline run"), "{error}");
    }

    #[test]
    fn each_bad_value_is_named_with_what_would_be_right() {
        for (variable, value, expect) in [
            (RANK, Some("8"), "from 0 to 7"),
            (RANK, Some("-1"), "from 0 to 7"),
            (RANK, None, "not set"),
            (WORLD_SIZE, Some("0"), "from 1 to"),
            (WORLD_SIZE, Some("99999999"), "from 1 to 65536"),
            (LOCAL_RANK, Some("2"), "from 0 to 1"),
            (LOCAL_WORLD_SIZE, Some("9"), "from 1 to 8"),
            (IDENTITY, Some(""), "not set"),
            (RENDEZVOUS_TIMEOUT, Some("soon"), "positive number of seconds"),
            (RENDEZVOUS_TIMEOUT, Some("1e300"), "positive number of seconds"),
            (INTERFACE, Some("10.0.0.0/99"), "a number from 0 to 32"),
            (INTERFACE, Some(""), "names no interface"),
        ] {
            let error =
                JobEnv::from_vars(lookup(vars_but(variable, value))).expect_err("a bad value").to_string();
            assert!(error.contains(variable) && error.contains(expect), "{error}");
        }
    }

    #[test]
    fn the_collectives_take_their_settings_and_refuse_nonsense() {
        let set = |variable, value: &str| collectives_config(lookup(vec![(variable, value.to_owned())]));
        assert_eq!(collectives_config(|_| None), Ok(Config::default()));
        assert_eq!(set(TIMEOUT, "2.5").map(|config| config.timeout), Ok(Duration::from_millis(2500)));
        assert_eq!(set(ALGORITHM, "ring").map(|config| config.algorithm), Ok(Algorithm::Ring));
        assert_eq!(set(ALGORITHM, "halving").map(|config| config.algorithm), Ok(Algorithm::Halving));
        assert_eq!(set(ORDER, "any").map(|config| config.order), Ok(Order::Any));
        assert_eq!(set(SEGMENT_BYTES, "1024").map(|config| config.segment_bytes), Ok(1024));
        let shared = |value: &str| sharing(lookup(vec![(SHARED_MEMORY, value.to_owned())]));
        assert_eq!((sharing(|_| None), shared("off")), (Ok(Sharing::Auto), Ok(Sharing::Off)));
        assert_eq!(shared("blocks:2"), Ok(Sharing::WithinBlocks(2)));
        for nonsense in ["yes", "blocks:0", "blocks:", ""] {
            let error = shared(nonsense).expect_err("nonsense").to_string();
            assert!(error.contains("none of auto, off, blocks:N"), "{error}");
        }
        let links = |value: &str| fabric(lookup(vec![(FABRIC, value.to_owned())]));
        assert_eq!((fabric(|_| None), links("quic")), (Ok(Fabric::Auto), Ok(Fabric::Quic)));
        assert_eq!(fabric(lookup(vec![fabric_var(Fabric::Tls)])), Ok(Fabric::Tls));
        assert!(links("udp").expect_err("nonsense").to_string().contains("none of auto, quic, tls, tcp"));
        let plain =
            |insecure: &str| fabric(lookup(vec![fabric_var(Fabric::Tcp), (INSECURE, insecure.to_owned())]));
        assert_eq!((plain("1"), fabric(lookup(vec![insecure_var()]))), (Ok(Fabric::Tcp), Ok(Fabric::Auto)));
        for refused in [links("tcp"), plain("0")] {
            assert!(refused.expect_err("it was not allowed").to_string().contains("--insecure"));
        }
        let device = |value: &str| backend(lookup(vec![(BACKEND, value.to_owned())]));
        assert_eq!((backend(|_| None), device("nccl")), (Ok(Wanted::Auto), Ok(Wanted::Nccl)));
        let host =
            |name: &str| device_setup(lookup(vec![(NCCL_HOSTID, name.to_owned())])).expect("right").host;
        assert_eq!((host("a") == host("b"), host("a") == host("a")), (false, true));
        assert!(device("gpu").expect_err("nonsense").to_string().contains("none of auto, nccl, fallback"));
        assert!(plain("yes").expect_err("nonsense").to_string().contains("none of 1, 0"));
        for (variable, value) in
            [(TIMEOUT, "0"), (TIMEOUT, "nan"), (ALGORITHM, "tree"), (ORDER, ""), (SEGMENT_BYTES, "1")]
        {
            let error = set(variable, value).expect_err("nonsense").to_string();
            assert!(error.contains(variable), "{error}");
        }
    }
}
