//! What makes `paceline run` a stand-in for `torchrun`: its flags and variables ([`flags`]), the environment of its
//! workers ([`environment`]), its log files ([`logs`]) and its error files ([`errors`]).
//!
//! Each flag and variable of torchrun 2.11.0 is taken and does the same, is taken and does something else for a reason,
//! or is refused in one line; docs/launcher.md has the table. It refuses to be torchrun's store: rank 0 of the program serves that
//! itself, at a port that no generation before it has used, so that no key of a former generation is ever seen.

pub mod environment;
pub mod errors;
pub mod flags;
pub mod logs;
pub mod port;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::console::Stream;

/// What torchrun's flags and variables ask for, beyond what every job has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// `--rdzv-id`: names the job in its environment and its log folder.
    pub run_id: String,
    /// `--role`.
    pub role: String,
    /// `--master-addr`, or `--local-addr` of node 0; `None` for where the ranks meet.
    pub master_addr: Option<String>,
    /// `--master-port`: the first generation's; `None` for a free one.
    pub master_port: Option<u16>,
    /// What LOCAL_RANK is.
    pub local_rank: LocalRank,
    /// Where output goes.
    pub logs: LogSettings,
    /// The exit code of a job that has failed.
    pub exit_code: FailureCode,
    /// The script that an interpreter is to run, to be looked for before the first rank starts.
    pub script: Option<PathBuf>,
    /// Whether `${local_rank}` in an argument stands for the number.
    pub macros: Macros,
    /// The launcher's own TORCHELASTIC_ERROR_FILE, for whoever has started it.
    pub error_file: Option<PathBuf>,
    /// `--signals-to-handle`.
    pub signals: flags::SignalList,
}

/// What LOCAL_RANK is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LocalRank {
    /// The rank's number on its machine.
    #[default]
    Real,
    /// 0 for all, and each sees one GPU.
    Virtual,
}

/// Whether arguments are searched for `${local_rank}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Macros {
    /// As they are.
    #[default]
    Left,
    /// As torchrun does.
    Replaced,
}

/// The exit code of a job that has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum FailureCode {
    /// That of the rank that failed, or 128 + the signal that killed it.
    #[default]
    Child,
    /// 1 whatever has happened.
    Torchrun,
}

impl FailureCode {
    /// The launcher's exit code for a job that ends with `code`.
    pub fn of(self, code: u8) -> u8 {
        match self {
            FailureCode::Child => code,
            FailureCode::Torchrun => code.min(1),
        }
    }
}

/// Where the output of the ranks goes, and what lines of it look like.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogSettings {
    /// The folder of `--log-dir`.
    pub folder: LogFolder,
    /// `--redirects`: into a file and nowhere else.
    pub redirects: Streams,
    /// `--tee`: into a file and to the console.
    pub tee: Streams,
    /// `--local-ranks-filter`: only these are seen on the console.
    pub shown: Option<Vec<u32>>,
    /// TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE.
    pub prefix: Option<String>,
    /// `--role`.
    pub role: String,
    /// `--duplicate-stdout-filters` and `--duplicate-stderr-filters`: lines with one of these words are written to one more file.
    pub filters: [Vec<String>; 2],
}

/// Where log files and error files lie.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LogFolder {
    /// In a folder for temporary files; without logs in it, it goes with the job.
    #[default]
    Temporary,
    /// In a new folder below this one, which stays.
    Below(PathBuf),
    /// There are none.
    Off,
}

/// Which streams of which ranks of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Streams {
    /// The same of all ranks: bit 0 for stdout, bit 1 for stderr.
    All(u8),
    /// By local rank; none of those that are not here.
    Of(Vec<(u32, u8)>),
}

impl Default for Streams {
    fn default() -> Self {
        Streams::All(0)
    }
}

impl Streams {
    /// Whether the stream of this rank is one of them.
    pub fn has(&self, local_rank: u32, stream: Stream) -> bool {
        let bits = match self {
            Streams::All(bits) => *bits,
            Streams::Of(ranks) => {
                ranks.iter().rfind(|(rank, _)| *rank == local_rank).map_or(0, |(_, bits)| *bits)
            }
        };
        let bit = match stream {
            Stream::Out => 1,
            Stream::Err => 2,
        };
        bits & bit != 0
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        match self {
            Streams::All(bits) => *bits != 0,
            Streams::Of(ranks) => ranks.iter().any(|(_, bits)| *bits != 0),
        }
    }
}

/// The environment variables of torchrun that the launcher reads.
#[derive(Debug, Default)]
pub struct Variables {
    /// Those that begin with PET_, and their values.
    pub pet: Vec<(String, OsString)>,
    /// PYTHON_EXEC: the interpreter in place of python3.
    pub python: Option<OsString>,
    /// TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE.
    pub line_prefix: Option<OsString>,
    /// TORCHELASTIC_ERROR_FILE.
    pub error_file: Option<OsString>,
}

impl Variables {
    /// Those of this process.
    pub fn of_process() -> Self {
        let pet = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        Variables {
            pet: pet.filter(|(name, _)| name.starts_with("PET_")).collect(),
            python: std::env::var_os("PYTHON_EXEC"),
            line_prefix: std::env::var_os("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
            error_file: std::env::var_os("TORCHELASTIC_ERROR_FILE"),
        }
    }
}
