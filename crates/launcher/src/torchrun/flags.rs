//! torchrun's flags beside those that `paceline run` has of its own, and its PET_ variables, which stand for flags.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use signal_hook::consts::{SIGUSR1, SIGUSR2};

use super::{FailureCode, LocalRank, LogFolder, LogSettings, Macros, Settings, Streams, Variables};
use crate::error::Error;

/// Both spellings of each, as torchrun takes them. What is only there to be refused or to have no effect is hidden.
#[derive(Args, Debug)]
#[command(next_help_heading = "torchrun's flags (docs/launcher.md)")]
pub struct Flags {
    /// How the machines find each other: static (--node-rank says which is which) or c10d (they agree on it)
    #[arg(long, alias = "rdzv_backend", value_name = "static|c10d", default_value = "static")]
    pub rdzv_backend: Backend,
    /// A name for the job, which its programs and its log folder get
    #[arg(long, alias = "rdzv_id", value_name = "NAME", default_value = "none")]
    pub rdzv_id: String,
    /// More about the rendezvous: join_timeout, timeout, last_call_timeout and is_host count
    #[arg(
        long,
        alias = "rdzv_conf",
        value_name = "KEY=VALUE,...",
        default_value = "",
        hide_default_value = true
    )]
    pub rdzv_conf: Conf,
    /// A job on this machine alone
    #[arg(long)]
    pub standalone: bool,
    /// What the programs get as MASTER_ADDR, and where machine 0 is reached unless --rdzv-endpoint says so
    #[arg(long, alias = "master_addr", value_name = "HOST")]
    pub master_addr: Option<String>,
    /// What the programs get as MASTER_PORT when they first start [default: a free port]
    #[arg(long, alias = "master_port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub master_port: Option<u16>,
    /// What the programs get as MASTER_ADDR from machine 0, with c10d
    #[arg(long, alias = "local_addr", value_name = "HOST")]
    pub local_addr: Option<String>,
    /// A name for what the ranks do, in front of their lines with --tee
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub role: String,
    /// The program is a Python module
    #[arg(short, long)]
    pub module: bool,
    /// The program is executed as it is, as behind --
    #[arg(long, alias = "no_python")]
    pub no_python: bool,
    /// The program is a Python script
    #[arg(long, alias = "run_path")]
    pub run_path: bool,
    /// Where the folder with this run's log and error files is made; /dev/null for no files
    #[arg(long, alias = "log_dir", value_name = "FOLDER")]
    pub log_dir: Option<PathBuf>,
    /// Output that goes into files alone: 1 for stdout, 2 for stderr, 3 for both, or by local rank: 0:3,1:2
    #[arg(short, long, value_name = "STREAMS", default_value = "0", hide_default_value = true)]
    pub redirects: Streams,
    /// Output that goes into files and to the console
    #[arg(short, long, value_name = "STREAMS", default_value = "0", hide_default_value = true)]
    pub tee: Streams,
    /// The local ranks whose output is seen on the console [default: all]
    #[arg(long, alias = "local_ranks_filter", value_name = "LIST", value_delimiter = ',')]
    pub local_ranks_filter: Option<Vec<u32>>,
    /// Lines of --tee with one of these words are copied to attempt_N/filtered_stdout.log; ,, is a comma
    #[arg(
        long,
        alias = "duplicate_stdout_filters",
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true
    )]
    pub duplicate_stdout_filters: String,
    /// The same of stderr
    #[arg(
        long,
        alias = "duplicate_stderr_filters",
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true
    )]
    pub duplicate_stderr_filters: String,
    /// LOCAL_RANK is 0 for all ranks, and each sees one GPU
    #[arg(long, alias = "virtual_local_rank")]
    pub virtual_local_rank: bool,
    /// Signals that are passed on
    #[arg(long, alias = "signals_to_handle", value_name = "LIST", default_value = DEFAULT_SIGNALS, hide_default_value = true, value_parser = signals)]
    pub signals_to_handle: SignalList,
    /// The exit code of a job that has failed: that of the rank, or 1
    #[arg(long, value_name = "child|torchrun", default_value = "child", hide_possible_values = true)]
    pub exit_code: FailureCode,

    #[arg(long, alias = "monitor_interval", hide = true, value_parser = clap::value_parser!(f64))]
    pub monitor_interval: Option<f64>,
    #[arg(long, alias = "start_method", hide = true, value_parser = ["spawn", "fork", "forkserver"])]
    pub start_method: Option<String>,
    #[arg(long, alias = "event_log_handler", hide = true)]
    pub event_log_handler: Option<String>,
    #[arg(long, alias = "logs_specs", hide = true)]
    pub logs_specs: Option<String>,
    #[arg(long, alias = "numa_binding", hide = true)]
    pub numa_binding: Option<String>,
}

/// Those that torchrun handles, unless told otherwise.
const DEFAULT_SIGNALS: &str = "SIGTERM,SIGINT,SIGHUP,SIGQUIT";

/// How the machines find each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Each is told its number.
    Static,
    /// They agree on it.
    C10d,
}

/// `--nproc-per-node`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processes {
    /// So many; at least one.
    Number(u32),
    /// One for each GPU, or where there is none for each processor.
    Auto,
    /// One for each processor.
    Cpu,
    /// One for each GPU.
    Gpu,
}

/// `--rdzv-conf`, of which these keys mean something here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Conf {
    /// How long the machines wait for each other.
    pub timeout: Option<Duration>,
    /// How long they wait for more when enough have come.
    pub last_call: Option<Duration>,
    /// Whether this machine is the one where the others meet.
    pub is_host: Option<bool>,
}

/// Signals that are passed on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SignalList {
    /// As they were written.
    pub names: String,
    /// Those beside the four that always are.
    pub more: Vec<i32>,
}

/// A program as torchrun's rules or `--` have it.
#[derive(Debug, PartialEq, Eq)]
pub struct Command {
    /// What is executed.
    pub program: OsString,
    /// With these arguments.
    pub args: Vec<OsString>,
}

/// The flags that stand for the variables `pet`, in the order of the table.
///
/// # Errors
/// [`Error::Usage`] for a switch that is no number.
pub fn from_variables(pet: &[(String, OsString)]) -> Result<Vec<(&'static str, OsString)>, Error> {
    let mut flags = Vec::new();
    for (name, flag, kind) in VARIABLES {
        let value = pet.iter().find(|(set, value)| set == name && !value.is_empty()).map(|(_, value)| value);
        match (value, kind) {
            (None, _) => {}
            (Some(value), Kind::Value) => {
                flags.push((name, [OsStr::new(flag), value].join(OsStr::new("="))));
            }
            (Some(value), Kind::Switch) => {
                match value.to_str().and_then(|text| text.trim().parse::<i64>().ok()) {
                    Some(0) => {}
                    Some(_) => flags.push((name, flag.into())),
                    None => return Err(Error::Usage(format!("{name} is {value:?}; set it to 1 or 0"))),
                }
            }
        }
    }
    Ok(flags)
}

#[derive(Clone, Copy)]
enum Kind {
    Value,
    /// 0 or another number.
    Switch,
}

/// torchrun reads PET_ and its own name for the flag in capitals.
const VARIABLES: [(&str, &str, Kind); 27] = [
    ("PET_NNODES", "--nnodes", Kind::Value),
    ("PET_NPROC_PER_NODE", "--nproc-per-node", Kind::Value),
    ("PET_RDZV_BACKEND", "--rdzv-backend", Kind::Value),
    ("PET_RDZV_ENDPOINT", "--rdzv-endpoint", Kind::Value),
    ("PET_RDZV_ID", "--rdzv-id", Kind::Value),
    ("PET_RDZV_CONF", "--rdzv-conf", Kind::Value),
    ("PET_STANDALONE", "--standalone", Kind::Switch),
    ("PET_MAX_RESTARTS", "--max-restarts", Kind::Value),
    ("PET_MONITOR_INTERVAL", "--monitor-interval", Kind::Value),
    ("PET_START_METHOD", "--start-method", Kind::Value),
    ("PET_EVENT_LOG_HANDLER", "--event-log-handler", Kind::Value),
    ("PET_ROLE", "--role", Kind::Value),
    ("PET_MODULE", "--module", Kind::Switch),
    ("PET_NO_PYTHON", "--no-python", Kind::Switch),
    ("PET_RUN_PATH", "--run-path", Kind::Switch),
    ("PET_LOG_DIR", "--log-dir", Kind::Value),
    ("PET_REDIRECTS", "--redirects", Kind::Value),
    ("PET_TEE", "--tee", Kind::Value),
    ("PET_LOCAL_RANKS_FILTER", "--local-ranks-filter", Kind::Value),
    ("PET_DUPLICATE_STDOUT_FILTERS", "--duplicate-stdout-filters", Kind::Value),
    ("PET_DUPLICATE_STDERR_FILTERS", "--duplicate-stderr-filters", Kind::Value),
    ("PET_NODE_RANK", "--node-rank", Kind::Value),
    ("PET_MASTER_ADDR", "--master-addr", Kind::Value),
    ("PET_MASTER_PORT", "--master-port", Kind::Value),
    ("PET_LOCAL_ADDR", "--local-addr", Kind::Value),
    ("PET_SIGNALS_TO_HANDLE", "--signals-to-handle", Kind::Value),
    ("PET_VIRTUAL_LOCAL_RANK", "--virtual-local-rank", Kind::Switch),
];

impl Flags {
    /// Refuses what cannot be done, each with what to do instead.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |text: String| Err(Error::Usage(text));
        if let Some(handler) = self.event_log_handler.as_ref().filter(|handler| *handler != "null") {
            return wrong(format!(
                "--event-log-handler {handler}: it is a plug-in of Python; PACELINE_LOG=info logs events"
            ));
        }
        if let Some(specs) = &self.logs_specs {
            return wrong(format!(
                "--logs-specs {specs}: it is a plug-in of Python; use --log-dir, --redirects and --tee"
            ));
        }
        if let Some(mode) = &self.numa_binding {
            return wrong(format!(
                "--numa-binding {mode} is not supported; --bind auto gives each rank processors of its own"
            ));
        }
        if self.module && self.no_python && !self.run_path {
            return wrong("--module and --no-python exclude each other".to_owned());
        }
        Ok(())
    }

    /// Where the machines meet, if that is where the programs do.
    pub fn meeting_host(&self) -> Option<String> {
        let host = self.master_addr.as_ref().filter(|_| self.rdzv_backend == Backend::Static)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        Some(bare.unwrap_or(host).to_owned())
    }

    /// What is to be executed for `words`, the program and its arguments as they were written: behind `--` the
    /// program itself, else a script of Python unless a flag says otherwise.
    pub fn command(&self, mut words: Vec<OsString>, form: Form, python: Option<OsString>) -> Command {
        if form == Form::Program || (self.no_python && !self.run_path) {
            let args = words.split_off(1);
            return Command { program: words.remove(0), args };
        }
        let options = if self.module && !self.run_path { &["-u", "-m"][..] } else { &["-u"] };
        let args = options.iter().map(OsString::from).chain(words).collect();
        Command { program: python.unwrap_or_else(|| "python3".into()), args }
    }

    /// The script among `words` that must be there.
    fn script(&self, words: &[OsString], form: Form) -> Option<PathBuf> {
        let is_script = form == Form::Script && (self.run_path || (!self.no_python && !self.module));
        words.first().filter(|_| is_script).map(PathBuf::from)
    }

    /// All that these flags say, for a job that has `words` for a program.
    pub fn settings(&self, words: &[OsString], form: Form, variables: &Variables) -> Settings {
        let text =
            |value: &Option<OsString>| value.as_ref().map(|value| value.to_string_lossy().into_owned());
        let folder = match &self.log_dir {
            None => LogFolder::Temporary,
            Some(folder) if folder == Path::new("/dev/null") => LogFolder::Off,
            Some(folder) => LogFolder::Below(folder.clone()),
        };
        let logs = LogSettings {
            folder,
            redirects: self.redirects.clone(),
            tee: self.tee.clone(),
            shown: self.local_ranks_filter.clone(),
            prefix: text(&variables.line_prefix),
            role: self.role.clone(),
            filters: [filters(&self.duplicate_stdout_filters), filters(&self.duplicate_stderr_filters)],
        };
        Settings {
            run_id: if self.standalone { standalone_id() } else { self.rdzv_id.clone() },
            role: self.role.clone(),
            master_addr: match self.rdzv_backend {
                Backend::Static => self.master_addr.clone(),
                Backend::C10d => self.local_addr.clone(),
            },
            master_port: self
                .master_port
                .filter(|_| self.rdzv_backend == Backend::Static && !self.standalone),
            local_rank: if self.virtual_local_rank { LocalRank::Virtual } else { LocalRank::Real },
            logs,
            exit_code: self.exit_code,
            script: self.script(words, form),
            macros: if form == Form::Script { Macros::Replaced } else { Macros::Left },
            error_file: variables.error_file.clone().filter(|file| !file.is_empty()).map(PathBuf::from),
            signals: self.signals_to_handle.clone(),
        }
    }
}

/// How the program was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Behind `--`: it is executed.
    Program,
    /// By torchrun's rules.
    Script,
}

/// A name that no other job has.
fn standalone_id() -> String {
    use std::hash::{BuildHasher, RandomState};
    let draw = || RandomState::new().hash_one(std::process::id());
    format!("{:016x}{:016x}", draw(), draw())
}

/// torchrun's list: a doubled comma is a comma.
fn filters(text: &str) -> Vec<String> {
    const COMMA: &str = "\0";
    let words = text.replace(",,", COMMA);
    words.split(',').filter(|word| !word.is_empty()).map(|word| word.replace(COMMA, ",")).collect()
}

fn signals(text: &str) -> Result<SignalList, String> {
    let mut more = Vec::new();
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        match name {
            "SIGTERM" | "SIGINT" | "SIGHUP" | "SIGQUIT" => {}
            "SIGUSR1" => more.push(SIGUSR1),
            "SIGUSR2" => more.push(SIGUSR2),
            _ => {
                return Err(format!(
                    "{name} cannot be passed on; SIGUSR1 and SIGUSR2 can, beside {DEFAULT_SIGNALS}"
                ));
            }
        }
    }
    Ok(SignalList { names: text.to_owned(), more })
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "static" => Ok(Backend::Static),
            "c10d" => Ok(Backend::C10d),
            _ => Err("there are static and c10d; no other service is needed".to_owned()),
        }
    }
}

impl FromStr for Conf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut conf = Conf::default();
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or("give KEY=VALUE, such as join_timeout=600")?;
            match key.trim() {
                "join_timeout" | "timeout" => conf.timeout = Some(crate::cli::seconds(value.trim())?),
                "last_call_timeout" => conf.last_call = Some(crate::cli::seconds(value.trim())?),
                "is_host" => conf.is_host = Some(yes_or_no(value.trim())?),
                // torchrun leaves keys to the backends too, which leave those that they do not know.
                _ => {}
            }
        }
        Ok(conf)
    }
}

fn yes_or_no(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" => Ok(true),
        "0" | "false" | "f" | "no" | "n" => Ok(false),
        _ => Err("is_host is true or false".to_owned()),
    }
}

impl FromStr for Streams {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give 0, 1, 2 or 3, or that by local rank, such as 0:3,1:1".to_owned();
        let bits = |text: &str| text.parse().ok().filter(|bits| *bits <= 3).ok_or_else(wrong);
        if !text.contains(':') {
            return bits(text).map(Streams::All);
        }
        let of_rank = |pair: &str| {
            let (rank, value) = pair.split_once(':').ok_or_else(wrong)?;
            Ok((rank.parse().map_err(|_| wrong())?, bits(value)?))
        };
        text.split(',').map(of_rank).collect::<Result<_, _>>().map(Streams::Of)
    }
}

impl FromStr for Processes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Processes::Auto),
            "cpu" => Ok(Processes::Cpu),
            "gpu" => Ok(Processes::Gpu),
            _ => {
                text.parse().ok().filter(|&n| n >= 1).map(Processes::Number).ok_or_else(|| {
                    "give a number of ranks from 1 on, such as 4, or auto, cpu or gpu".to_owned()
                })
            }
        }
    }
}

impl Processes {
    /// The number, on a machine with so many processors and GPUs.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no GPU where one is asked for.
    pub fn count(self, machine: impl Fn() -> Machine) -> Result<u32, Error> {
        match self {
            Processes::Number(number) => Ok(number),
            Processes::Cpu => Ok(machine().processors),
            Processes::Gpu => match machine().gpus {
                0 => Err(Error::Usage(
                    "--nproc-per-node gpu: this machine has no GPU; give a number".to_owned(),
                )),
                gpus => Ok(gpus),
            },
            Processes::Auto => match machine() {
                Machine { gpus: 0, processors } => Ok(processors),
                Machine { gpus, .. } => Ok(gpus),
            },
        }
    }
}

/// What ranks can be counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Processors that are switched on, whoever may use them: what Python's `os.cpu_count()` says.
    pub processors: u32,
    /// NVIDIA's, of which CUDA_VISIBLE_DEVICES may leave some out.
    pub gpus: u32,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        let processors = ranges(online.trim()).filter(|&count| count > 0);
        let gpus = std::fs::read_dir("/dev").map(|files| {
            files.flatten().filter(|file| is_gpu(&file.file_name().to_string_lossy())).count() as u32
        });
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        Machine {
            processors: processors
                .or_else(|| std::thread::available_parallelism().ok().map(|count| count.get() as u32))
                .unwrap_or(1),
            gpus: visible_gpus(gpus.unwrap_or(0), visible.as_deref()),
        }
    }
}

fn is_gpu(device: &str) -> bool {
    device
        .strip_prefix("nvidia")
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// CUDA takes the list up to the first entry that names no GPU.
fn visible_gpus(gpus: u32, visible: Option<&str>) -> u32 {
    let Some(visible) = visible else { return gpus };
    let is_one = |entry: &&str| match entry.parse::<u32>() {
        Ok(number) => number < gpus,
        Err(_) => entry.starts_with("GPU-") || entry.starts_with("MIG-"),
    };
    (visible.split(',').map(str::trim).take_while(is_one).count() as u32).min(gpus)
}

/// How many numbers `0-3,8` has.
fn ranges(text: &str) -> Option<u32> {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    text.split(',').map(count).try_fold(0u32, |sum, count| sum.checked_add(count?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_stand_for_flags() {
        let set = |pairs: &[(&str, &str)]| {
            let pet: Vec<_> =
                pairs.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
            from_variables(&pet).map(|flags| flags.into_iter().map(|(_, flag)| flag).collect::<Vec<_>>())
        };
        let flags =
            set(&[("PET_TEE", "3"), ("PET_NNODES", "1:4"), ("PET_STANDALONE", "1"), ("PET_MODULE", "0")]);
        assert_eq!(flags.expect("sense"), ["--nnodes=1:4", "--standalone", "--tee=3"]);
        assert_eq!(
            set(&[("PET_ROLE", ""), ("PET_LOGS_SPECS", "x")]).expect("nothing"),
            Vec::<OsString>::new()
        );
        assert!(
            set(&[("PET_STANDALONE", "yes")]).expect_err("nonsense").to_string().contains("PET_STANDALONE")
        );
    }

    #[test]
    fn streams_are_digits_or_digits_by_rank_with_any_number_of_digits() {
        assert_eq!("3".parse(), Ok(Streams::All(3)));
        assert_eq!("0:3,12:1".parse(), Ok(Streams::Of(vec![(0, 3), (12, 1)])));
        for text in ["", "4", "-1", "0:4", "0:", ":1", "0:1,", "a:1", "1,0:1"] {
            assert!(text.parse::<Streams>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn ranks_are_counted_by_what_the_machine_has() {
        let with = |gpus| move || Machine { processors: 6, gpus };
        let count = |text: &str, gpus| text.parse::<Processes>().expect(text).count(with(gpus));
        assert_eq!(
            [count("4", 0), count("cpu", 2), count("auto", 2), count("gpu", 2), count("auto", 0)],
            [4, 6, 2, 2, 6].map(Ok)
        );
        assert!(count("gpu", 0).expect_err("no GPU").to_string().contains("no GPU"));
        for text in ["0", "-1", "xpu", ""] {
            assert!(text.parse::<Processes>().is_err(), "{text:?}");
        }
        assert!(Machine::here().processors >= 1);
    }

    #[test]
    fn processors_and_gpus_are_counted_in_the_kernels_and_cudas_words() {
        assert_eq!([ranges("0-3,8"), ranges("0"), ranges(""), ranges("3-1")], [Some(5), Some(1), None, None]);
        let visible = |list| visible_gpus(4, Some(list));
        assert_eq!([visible("0,2"), visible(""), visible("0,9,1"), visible("GPU-12,GPU-7")], [2, 0, 1, 2]);
        assert_eq!(visible_gpus(4, None), 4);
        assert!(is_gpu("nvidia0") && is_gpu("nvidia12") && !is_gpu("nvidiactl") && !is_gpu("nvidia-uvm"));
    }

    #[test]
    fn the_rendezvous_configuration_is_read_as_far_as_it_means_something() {
        let conf: Conf =
            "join_timeout=60, last_call_timeout=5,is_host=True,read_timeout=9".parse().expect("conf");
        let [timeout, last_call] = [60, 5].map(|seconds| Some(Duration::from_secs(seconds)));
        assert_eq!(conf, Conf { timeout, last_call, is_host: Some(true) });
        assert_eq!("".parse(), Ok(Conf::default()));
        for text in ["join_timeout", "join_timeout=soon", "is_host=perhaps"] {
            assert!(text.parse::<Conf>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_doubled_comma_is_part_of_a_word() {
        assert_eq!(filters("apple,a,,b"), ["apple", "a,b"]);
        assert_eq!(filters(""), Vec::<String>::new());
    }

    #[test]
    fn two_more_signals_can_be_passed_on() {
        let more = |text| signals(text).map(|list| list.more);
        assert_eq!(more(DEFAULT_SIGNALS), Ok(vec![]));
        assert_eq!(more("SIGTERM, SIGUSR1,SIGUSR2"), Ok(vec![SIGUSR1, SIGUSR2]));
        assert!(signals("SIGKILL").is_err());
    }
}
