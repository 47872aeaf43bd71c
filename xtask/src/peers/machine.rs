//! The conditions of a measurement: without them its numbers mean nothing.

use super::output_of;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// This machine now.
pub struct Machine {
    cpus: usize,
    cpu_model: String,
    kernel: String,
    /// The kernel's words, with the choice in brackets: huge pages halve the times of large buffers.
    transparent_hugepages: String,
    load_average: String,
}

impl Machine {
    pub fn look() -> Self {
        let file = |path: &str| {
            fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
        };
        Machine {
            cpus: thread::available_parallelism().map_or(1, usize::from),
            cpu_model: model_of(&file("/proc/cpuinfo")).unwrap_or_else(|| "unknown".to_owned()),
            kernel: file("/proc/sys/kernel/osrelease"),
            transparent_hugepages: file("/sys/kernel/mm/transparent_hugepage/enabled"),
            load_average: load_average(),
        }
    }
}

/// Over 1, 5 and 15 minutes.
pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// What a reader needs to know, as a list in Markdown. `before` was looked at before the first measurement; now is after
/// the last.
pub fn conditions(before: &Machine, command: &str, rounds: u32, versions: &[&str]) -> String {
    let Machine { cpus, cpu_model, kernel, transparent_hugepages, load_average: load_before } = before;
    let (date, load_after) = (date(), load_average());
    let versions = versions.join("; ");
    let rounds = if rounds == 1 { "one round".to_owned() } else { format!("medians of {rounds} rounds") };
    format!(
        "- {date}, `{command}`: {rounds}\n\
         - {cpus} CPUs, {cpu_model}; Linux {kernel}; transparent huge pages {transparent_hugepages}\n\
         - load average {load_before} before and {load_after} after (the benchmark itself makes 2 to 4)\n\
         - {versions}\n"
    )
}

fn date() -> String {
    let mut date = Command::new("date");
    date.args(["--utc", "+%Y-%m-%d %H:%M UTC"]);
    let text = output_of(date, Duration::from_secs(10)).map_or_else(|_| String::new(), |(_, text)| text);
    text.trim().to_owned()
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
    fn the_processor_is_named() {
        assert_eq!(model_of("processor\t: 0\nmodel name\t: AMD EPYC\n").as_deref(), Some("AMD EPYC"));
        assert_eq!(model_of("processor : 0"), None);
    }
}
