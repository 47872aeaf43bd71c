//! What the machine is, as far as it explains a number: without it a measurement cannot be compared.

use std::fs;
use std::thread;

use serde::Serialize;

/// This machine now.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// CPUs this process may use, by affinity and cgroup.
    pub cpus: usize,
    /// The processor's name.
    pub cpu_model: String,
    /// The kernel's release.
    pub kernel: String,
    /// Whether anonymous and shared memory get huge pages: the kernel's words, with the choice in brackets.
    pub transparent_hugepages: String,
    /// The frequency governor of CPU 0, where there is one.
    pub governor: Option<String>,
    /// Runnable processes, over 1, 5 and 15 minutes: above 0 somebody else was running too.
    pub load_average: Vec<f64>,
    /// The environment variables that may change what is measured, as NAME=value, sorted.
    pub settings: Vec<String>,
}

impl Machine {
    /// Looks now.
    pub fn look() -> Self {
        let first_line = |file: &str| fs::read_to_string(file).ok().map(|text| text.trim().to_owned());
        let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
        Machine {
            cpus: cpus(),
            cpu_model: or_unknown(fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| model_of(&text))),
            kernel: or_unknown(first_line("/proc/sys/kernel/osrelease")),
            transparent_hugepages: or_unknown(first_line("/sys/kernel/mm/transparent_hugepage/enabled")),
            governor: first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            load_average: load_average(),
            settings: settings(),
        }
    }
}

/// Ours by their prefix: the library has more of them every month, and which of them matter is for the reader to say.
fn settings() -> Vec<String> {
    let ours = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let mut settings: Vec<String> = ours
        .filter(|(name, _)| name.starts_with("PACELINE_"))
        .map(|(name, value)| format!("{name}={}", value.to_string_lossy()))
        .collect();
    settings.sort();
    settings
}

/// CPUs this process may use.
pub fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The three load averages, or nothing where the system has none.
pub fn load_average() -> Vec<f64> {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).filter_map(|number| number.parse().ok()).collect()
}

/// Memory that can be had without swapping, in bytes.
pub fn available_bytes() -> Option<u64> {
    available_in(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The name is `model name` on x86 and missing on most others.
fn model_of(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let meminfo = "MemTotal: 9 kB\nMemAvailable:    1000 kB\n";
        assert_eq!(available_in(meminfo), Some(1_024_000));
        assert_eq!(available_in("MemTotal: 9 kB\n"), None);
        let cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC\n\nmodel name\t: other\n";
        assert_eq!(model_of(cpuinfo).as_deref(), Some("AMD EPYC"));
        assert_eq!(model_of("processor : 0"), None);
    }
}
