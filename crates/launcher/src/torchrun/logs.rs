//! Log files and error files, where torchrun puts them:
//! `<log-dir>/<run-id>_<random>/attempt_<generation>/<local rank>/{stdout.log,stderr.log,error.json}`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::{LogFolder, LogSettings};
use crate::console::{Copied, Route, Stream};
use crate::credentials::private_folder;
use crate::error::Error;

/// The folder of this run.
#[derive(Debug)]
pub struct Logs {
    settings: LogSettings,
    folder: Folder,
}

#[derive(Debug)]
enum Folder {
    Kept(PathBuf),
    /// Goes with this value.
    Own(TempDir),
    Off,
}

impl Logs {
    /// Makes the folder of a run called `run_id`.
    ///
    /// # Errors
    /// [`Error::System`] with the folder and the system's reason.
    pub fn open(settings: &LogSettings, run_id: &str) -> Result<Self, Error> {
        let temporary = std::env::temp_dir();
        let wanted = settings.redirects.any() || settings.tee.any();
        let (below, prefix) = match &settings.folder {
            LogFolder::Off => {
                let settings = LogSettings {
                    redirects: Default::default(),
                    tee: Default::default(),
                    ..settings.clone()
                };
                return Ok(Logs { settings, folder: Folder::Off });
            }
            LogFolder::Temporary if !wanted => {
                // A job runs also where there is no place for error files.
                let folder = private_folder().map_or(Folder::Off, Folder::Own);
                return Ok(Logs { settings: settings.clone(), folder });
            }
            LogFolder::Temporary => (&temporary, "paceline-run-".to_owned()),
            LogFolder::Below(folder) => (folder, format!("{}_", run_id.replace('/', "_"))),
        };
        let made = fs::create_dir_all(below)
            .and_then(|()| tempfile::Builder::new().prefix(&prefix).tempdir_in(below));
        let made = made.map_err(|e| not_made(below, &e))?;
        Ok(Logs { settings: settings.clone(), folder: Folder::Kept(made.keep()) })
    }

    /// Where the files stay, if they do.
    pub fn kept(&self) -> Option<&Path> {
        match &self.folder {
            Folder::Kept(folder) => Some(folder),
            Folder::Own(_) | Folder::Off => None,
        }
    }

    /// Makes the folders of the generation `number` for so many ranks.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn attempt(&self, number: u32, ranks: u32) -> Result<Attempt<'_>, Error> {
        let below = match &self.folder {
            Folder::Kept(folder) => Some(folder.as_path()),
            Folder::Own(folder) => Some(folder.path()),
            Folder::Off => None,
        };
        let folder = below.map(|below| below.join(format!("attempt_{number}")));
        let mut filtered = [None, None];
        if let Some(folder) = &folder {
            for rank in 0..ranks {
                let of_rank = folder.join(rank.to_string());
                fs::create_dir_all(&of_rank).map_err(|e| not_made(&of_rank, &e))?;
            }
            for (name, (words, copied)) in ["filtered_stdout.log", "filtered_stderr.log"]
                .iter()
                .zip(self.settings.filters.iter().zip(&mut filtered))
            {
                if !words.is_empty() {
                    *copied = Some(Arc::new(create(&folder.join(name))?));
                }
            }
        }
        Ok(Attempt { settings: &self.settings, folder, filtered })
    }
}

/// The files of one generation.
#[derive(Debug)]
pub struct Attempt<'a> {
    settings: &'a LogSettings,
    folder: Option<PathBuf>,
    filtered: [Option<Arc<File>>; 2],
}

impl Attempt<'_> {
    /// Where a rank of this machine may write why it failed; an empty path for nowhere.
    pub fn error_file(&self, local_rank: u32) -> PathBuf {
        let file = |folder: &PathBuf| folder.join(local_rank.to_string()).join("error.json");
        self.folder.as_ref().map(file).unwrap_or_default()
    }

    /// Where a stream of a rank goes.
    ///
    /// # Errors
    /// [`Error::System`] if its file cannot be made.
    pub fn route(&self, rank: u32, local_rank: u32, stream: Stream) -> Result<Route, Error> {
        let LogSettings { redirects, tee, shown, prefix, role, filters, .. } = self.settings;
        let (redirected, teed) = (redirects.has(local_rank, stream), tee.has(local_rank, stream));
        let is_shown = shown.as_ref().is_none_or(|shown| shown.contains(&local_rank));
        let index = stream as usize;
        let file = self.folder.as_ref().filter(|_| redirected || teed).map(|folder| {
            let name = ["stdout.log", "stderr.log"][index];
            create(&folder.join(local_rank.to_string()).join(name))
        });
        let templated = prefix.as_ref().map(|template| fill(template, role, rank, local_rank));
        let copied = self.filtered[index]
            .as_ref()
            .filter(|_| teed && is_shown)
            .map(|file| Copied { file: file.clone(), words: filters[index].clone() });
        Ok(Route {
            prefix: templated.or_else(|| teed.then(|| format!("[{role}{local_rank}]:"))),
            to_console: is_shown && (teed || !redirected),
            file: file.transpose()?,
            copied,
        })
    }
}

/// Python's template of a prefix, filled in.
fn fill(template: &str, role: &str, rank: u32, local_rank: u32) -> String {
    let values =
        [("role_name", role.to_owned()), ("local_rank", local_rank.to_string()), ("rank", rank.to_string())];
    let replace = |text: String, (name, value): &(&str, String)| {
        text.replace(&format!("${{{name}}}"), value).replace(&format!("${name}"), value)
    };
    values.iter().fold(template.to_owned(), replace)
}

/// A process that takes another one's place as a rank goes on in its files.
fn create(file: &Path) -> Result<File, Error> {
    File::options().create(true).append(true).open(file).map_err(|e| not_made(file, &e))
}

fn not_made(what: &Path, e: &io::Error) -> Error {
    Error::System { what: format!("cannot make {}", what.display()), why: e.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torchrun::Streams;

    fn settings(folder: LogFolder) -> LogSettings {
        LogSettings { folder, role: "trainer".to_owned(), ..LogSettings::default() }
    }

    #[test]
    fn files_lie_where_torchrun_puts_them() {
        let base = tempfile::tempdir().expect("a temporary directory");
        let below = base.path().join("logs");
        let mut asked = settings(LogFolder::Below(below.clone()));
        asked.redirects = Streams::Of(vec![(1, 1)]);
        asked.tee = Streams::Of(vec![(0, 2)]);
        let logs = Logs::open(&asked, "job/7").expect("opened");
        let run = logs.kept().expect("kept");
        assert!(run.strip_prefix(&below).expect("below").to_str().expect("text").starts_with("job_7_"));
        let attempt = logs.attempt(2, 2).expect("made");
        let route = |local, stream| attempt.route(4 + local, local, stream).expect("made");
        let seen =
            [(0, Stream::Out), (0, Stream::Err), (1, Stream::Out), (1, Stream::Err)].map(|(rank, stream)| {
                let Route { prefix, to_console, file, .. } = route(rank, stream);
                (prefix, to_console, file.is_some())
            });
        assert_eq!(
            seen,
            [
                (None, true, false),
                (Some("[trainer0]:".to_owned()), true, true),
                (None, false, true),
                (None, true, false)
            ]
        );
        let folder = run.join("attempt_2");
        assert!(folder.join("0/stderr.log").is_file() && folder.join("1/stdout.log").is_file());
        assert!(!folder.join("0/stdout.log").exists());
        assert_eq!(attempt.error_file(1), folder.join("1/error.json"));
    }

    #[test]
    fn without_files_all_is_on_the_console() {
        let asked = LogSettings { redirects: Streams::All(3), ..settings(LogFolder::Off) };
        let logs = Logs::open(&asked, "none").expect("opened");
        let attempt = logs.attempt(0, 1).expect("nothing to make");
        let route = attempt.route(0, 0, Stream::Out).expect("nothing to make");
        assert!(route.to_console && route.file.is_none());
        assert_eq!(attempt.error_file(0), Path::new(""));
    }

    #[test]
    fn a_folder_for_error_files_alone_goes_with_the_job() {
        let logs = Logs::open(&settings(LogFolder::Temporary), "none").expect("opened");
        let file = logs.attempt(0, 1).expect("made").error_file(0);
        let folder = file.parent().expect("a folder").to_owned();
        assert!(folder.is_dir() && logs.kept().is_none());
        drop(logs);
        assert!(!folder.exists());
    }

    #[test]
    fn a_filter_hides_ranks_from_the_console_alone() {
        let base = tempfile::tempdir().expect("a temporary directory");
        let mut asked = settings(LogFolder::Below(base.path().to_owned()));
        asked.shown = Some(vec![0]);
        asked.tee = Streams::All(1);
        let logs = Logs::open(&asked, "none").expect("opened");
        let attempt = logs.attempt(0, 2).expect("made");
        let route = attempt.route(1, 1, Stream::Out).expect("made");
        assert!(!route.to_console && route.file.is_some());
        assert!(attempt.route(0, 0, Stream::Out).expect("made").to_console);
    }

    #[test]
    fn a_prefix_can_be_the_users() {
        assert_eq!(fill("${role_name}/$rank/${local_rank}|", "r", 5, 1), "r/5/1|");
    }
}
