//! This machine, or as much of it as a container shows.

use std::fs;
use std::path::Path;

use paceline_runtime::interface::{self, Address};
use rustix::process::{Resource, getrlimit};

use super::finding::Finding;
#[cfg(not(target_feature = "crt-static"))]
use crate::bench::missing_for_nccl;

/// What NCCL between processes and the loaders of PyTorch want of /dev/shm; Docker and Kubernetes give 64 MiB.
const SHARED_MEMORY_BYTES: u64 = 1 << 30;

/// What is said of collectives on device memory.
const ON_GPUS: &str = "collectives on GPUs";

/// Open files of a launcher with some tens of ranks, which have sockets to each other.
const OPEN_FILES: u64 = 1024;

/// Examines everything that needs nobody else.
pub fn examine() -> Vec<Finding> {
    let open_files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let shared_memory = rustix::fs::statvfs("/dev/shm").map(|size| size.f_blocks * size.f_frsize).ok();
    let memfd = rustix::fs::memfd_create("paceline-doctor", rustix::fs::MemfdFlags::CLOEXEC);
    let gpus = Gpus::here();
    vec![
        interfaces(interface::of_this_host().map_err(|e| e.to_string())),
        anonymous_memory(memfd.map(drop).map_err(|e| e.to_string())),
        shared_memory_file_system(shared_memory),
        files(open_files),
        gpus.judge(),
        nccl(&gpus),
        collectives_on_gpus(&gpus),
    ]
}

fn interfaces(addresses: Result<Vec<Address>, String>) -> Finding {
    const WHAT: &str = "interfaces";
    let addresses = match addresses {
        Ok(addresses) => addresses,
        Err(why) => return Finding::failed(WHAT, why, "allow getifaddrs (netlink sockets)"),
    };
    let outward: Vec<&Address> =
        addresses.iter().filter(|address| address.up && !address.ip.is_loopback()).collect();
    if outward.is_empty() {
        let said = "none but loopback is up".to_owned();
        return Finding::warning(WHAT, said, "right for a job on this machine alone");
    }
    let word = |address: &&Address| {
        let mtu = mtu(&address.interface).map(|mtu| format!(" (MTU {mtu})")).unwrap_or_default();
        format!("{} {}{mtu}", address.interface, address.ip)
    };
    Finding::ok(WHAT, outward.iter().map(word).collect::<Vec<_>>().join(", "))
}

/// The longest packet of an interface, in bytes.
fn mtu(interface: &str) -> Option<u32> {
    fs::read_to_string(Path::new("/sys/class/net").join(interface).join("mtu")).ok()?.trim().parse().ok()
}

/// What ranks of one host share.
fn anonymous_memory(memfd: Result<(), String>) -> Finding {
    const WHAT: &str = "memory to share";
    match memfd {
        Ok(()) => Finding::ok(WHAT, "memfd_create works; ranks need no /dev/shm".to_owned()),
        Err(why) => Finding::warning(
            WHAT,
            format!("memfd_create: {why}"),
            "allow it in the seccomp profile; until then ranks of this machine talk over its network",
        ),
    }
}

fn shared_memory_file_system(bytes: Option<u64>) -> Finding {
    const WHAT: &str = "/dev/shm";
    let advice = "NCCL and PyTorch's data loaders use it: mount an emptyDir with medium: Memory there, or docker run --shm-size";
    match bytes {
        None => Finding::warning(WHAT, "there is none".to_owned(), advice),
        Some(bytes) if bytes < SHARED_MEMORY_BYTES => {
            Finding::warning(WHAT, format!("{} MiB", bytes >> 20), advice)
        }
        Some(bytes) => Finding::ok(WHAT, format!("{} MiB", bytes >> 20)),
    }
}

fn files(limit: u64) -> Finding {
    const WHAT: &str = "open files";
    match limit {
        u64::MAX => Finding::ok(WHAT, "no limit".to_owned()),
        limit if limit < OPEN_FILES => Finding::warning(
            WHAT,
            format!("{limit} at most"),
            "raise it with ulimit -n, or LimitNOFILE of the container runtime",
        ),
        limit => Finding::ok(WHAT, format!("{limit} at most")),
    }
}

/// NVIDIA's GPUs, as far as /dev and /proc show them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Gpus {
    /// Device files.
    devices: usize,
    /// The kernel module's version.
    driver: Option<String>,
    /// What they are called, each once.
    models: Vec<String>,
}

impl Gpus {
    fn here() -> Self {
        let names = |folder: &str| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        let is_gpu =
            |name: &&String| name.strip_prefix("nvidia").is_some_and(|number| number.parse::<u32>().is_ok());
        let devices = names("/dev").iter().filter(is_gpu).count();
        let driver = fs::read_to_string("/proc/driver/nvidia/version").ok();
        let driver = driver.and_then(|text| driver_version(&text));
        let information =
            |gpu: String| fs::read_to_string(format!("/proc/driver/nvidia/gpus/{gpu}/information")).ok();
        let mut models: Vec<String> = names("/proc/driver/nvidia/gpus")
            .into_iter()
            .filter_map(information)
            .filter_map(|text| model(&text))
            .collect();
        models.sort();
        models.dedup();
        Self { devices, driver, models }
    }

    fn judge(&self) -> Finding {
        const WHAT: &str = "GPUs";
        let Self { devices, driver, models } = self;
        let models = if models.is_empty() { String::new() } else { format!(" ({})", models.join(", ")) };
        match (devices, driver) {
            (0, None) => Finding::ok(WHAT, "none".to_owned()),
            (0, Some(driver)) => Finding::warning(
                WHAT,
                format!("driver {driver} is loaded, but there is no /dev/nvidia0"),
                "ask for nvidia.com/gpu in the container's limits, or docker run --gpus all",
            ),
            (devices, None) => Finding::warning(
                WHAT,
                format!("{devices} device files, but no driver in /proc/driver/nvidia"),
                "load the kernel module on the node",
            ),
            (devices, Some(driver)) => Finding::ok(WHAT, format!("{devices}{models}, driver {driver}")),
        }
    }
}

/// The first word with a dot that begins with a digit: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  …`.
fn driver_version(text: &str) -> Option<String> {
    let is_version = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

fn model(information: &str) -> Option<String> {
    information.lines().find_map(|line| line.strip_prefix("Model:")).map(|model| model.trim().to_owned())
}

/// A static program cannot load libraries.
#[cfg(target_feature = "crt-static")]
fn nccl(_gpus: &Gpus) -> Finding {
    Finding::ok("NCCL", "not looked for: this build of paceline is linked statically".to_owned())
}

#[cfg(not(target_feature = "crt-static"))]
fn nccl(gpus: &Gpus) -> Finding {
    let found = paceline_nccl::Library::open(&paceline_nccl::Search::from_environment());
    judge_nccl(found.map(|library| format!("{} from {}", library.version(), library.origin())).ok(), gpus)
}

/// A static program cannot load libraries.
#[cfg(target_feature = "crt-static")]
fn collectives_on_gpus(_gpus: &Gpus) -> Finding {
    Finding::ok(ON_GPUS, "not tried: this build of paceline is linked statically".to_owned())
}

/// Whether `paceline bench --backend nccl` could run, in its own words if not.
#[cfg(not(target_feature = "crt-static"))]
fn collectives_on_gpus(gpus: &Gpus) -> Finding {
    judge_collectives(missing_for_nccl(), gpus)
}

#[cfg(not(target_feature = "crt-static"))]
fn judge_collectives(missing: Option<String>, gpus: &Gpus) -> Finding {
    match missing {
        None => Finding::ok(ON_GPUS, "driver, device and NCCL are there".to_owned()),
        Some(why) if gpus.devices == 0 => Finding::ok(ON_GPUS, format!("through the host: {why}")),
        Some(why) => Finding::warning(
            ON_GPUS,
            format!("through the host: {why}"),
            "mount the driver's libraries (the NVIDIA container toolkit does), or name them in PACELINE_CUDA_PATH and PACELINE_NCCL_PATH",
        ),
    }
}

#[cfg(not(target_feature = "crt-static"))]
fn judge_nccl(found: Option<String>, gpus: &Gpus) -> Finding {
    const WHAT: &str = "NCCL";
    match found {
        Some(found) => Finding::ok(WHAT, found),
        None if gpus.devices == 0 => Finding::ok(WHAT, "none, and no GPU that needs it".to_owned()),
        None => Finding::warning(
            WHAT,
            "none was found".to_owned(),
            "install nvidia-nccl-cu13 beside torch, or name it in PACELINE_NCCL_PATH",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn gpus_are_told_by_devices_and_driver() {
        let driver = || Some("580.65.06".to_owned());
        let gpus = |devices, driver| Gpus { devices, driver, models: vec!["NVIDIA H200".to_owned()] }.judge();
        assert_eq!(gpus(8, driver()).said, "8 (NVIDIA H200), driver 580.65.06");
        assert_eq!(gpus(0, None).verdict, Verdict::Ok);
        assert_eq!(gpus(0, driver()).verdict, Verdict::Warning);
        assert_eq!(gpus(1, None).verdict, Verdict::Warning);
        let version =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC version: 12.2.0";
        assert_eq!(driver_version(version), driver());
        assert_eq!(model("Model: \t\t NVIDIA H200\nIRQ: 1").as_deref(), Some("NVIDIA H200"));
    }

    #[cfg(not(target_feature = "crt-static"))]
    #[test]
    fn a_gpu_without_a_driver_library_is_a_warning_and_its_absence_is_none() {
        let gpus = |devices| Gpus { devices, ..Gpus::default() };
        let missing = || Some("no GPU can be used".to_owned());
        assert_eq!(judge_collectives(missing(), &gpus(0)).verdict, Verdict::Ok);
        assert_eq!(judge_collectives(missing(), &gpus(1)).verdict, Verdict::Warning);
        assert_eq!(judge_collectives(None, &gpus(1)).verdict, Verdict::Ok);
    }

    #[test]
    fn what_is_scarce_is_a_warning_with_what_to_do() {
        assert_eq!(shared_memory_file_system(Some(8 << 30)).verdict, Verdict::Ok);
        for finding in [
            shared_memory_file_system(Some(64 << 20)),
            shared_memory_file_system(None),
            files(256),
            anonymous_memory(Err("Operation not permitted".to_owned())),
            interfaces(Ok(Vec::new())),
        ] {
            assert!(finding.verdict == Verdict::Warning && finding.advice.is_some(), "{finding:?}");
        }
        assert_eq!((files(4096).verdict, files(u64::MAX).verdict), (Verdict::Ok, Verdict::Ok));
    }
}
