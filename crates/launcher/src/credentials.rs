//! The certificates of this machine's part of the job: made, fetched or given, stored for the workers, renewed.
//!
//! Workers get theirs by path: a file with mode 0600 in a folder with mode 0700. A renewed one takes the place of the
//! old one in one step (rename), so that a worker reads the one or the other and never half of each.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use paceline_runtime::nodes::launcher;
use paceline_runtime::rendezvous::worker;
use paceline_runtime::renewal;
use paceline_transport::identity::{Identity, JobAuthority};
use paceline_transport::quic::IoHandle;
use rustix::process::geteuid;
use tempfile::TempDir;

use crate::cli::RunArgs;
use crate::error::Error;
use crate::rendezvous::Status;
use crate::secret;

/// The pause between two looks for certificates that others make.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// The longest sleep between two looks at the clock, which goes on while a machine is suspended.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// Where keys were stored: a launcher that is stopped while another thread waits for other machines does not run that
/// thread's destructors.
static STORED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes all keys that were stored, before the process ends without their owner.
pub fn remove_stored() {
    for folder in STORED.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        // Gone already, as a rule.
        let _ = fs::remove_dir_all(folder);
    }
}

/// What the names of folders begin with that only this user can read.
const PREFIX: &str = "paceline-";

/// The file in a folder of keys that is locked while they are in use. The lock ends with the process, also by SIGKILL.
const HOLD: &str = "in-use";

/// Says that the folder is in use, for as long as the file is open: another launcher removes it then.
pub fn hold(folder: &Path) -> io::Result<File> {
    let fresh = folder.join("fresh");
    let file = File::create_new(&fresh)?;
    file.lock()?;
    // Nobody sees it before it is locked.
    fs::rename(fresh, folder.join(HOLD))?;
    Ok(file)
}

/// Removes the folders with keys and sockets that launchers of this user have left behind in that place when they were killed.
fn remove_stale(place: &Path) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        // Another user's might have no end: opening a pipe waits for who writes to it.
        let is_own = |found: fs::Metadata| found.is_dir() && found.uid() == geteuid().as_raw();
        let is_ours =
            entry.file_name().to_string_lossy().starts_with(PREFIX) && entry.metadata().is_ok_and(is_own);
        let unused = |hold: File| hold.try_lock().is_ok();
        if is_ours && File::open(entry.path().join(HOLD)).is_ok_and(unused) {
            // It may be gone meanwhile, or another user's.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The identities of the launcher and of the ranks of this machine.
pub struct Credentials {
    launcher: Identity,
    workers: Workers,
}

/// Where the workers' certificates are.
enum Workers {
    /// In files of ours, which are in use for as long as one of them is open.
    Ours { folder: TempDir, _hold: File },
    /// In folders that somebody else fills and renews.
    Given(PathBuf),
}

/// The members of this machine: the launcher and then its workers.
pub fn members(args: &RunArgs) -> Vec<String> {
    let node = args.node() as usize;
    std::iter::once(launcher(node)).chain(args.layout().ranks(node).map(worker)).collect()
}

/// Issues a certificate for each of these members.
///
/// # Errors
/// The transport's, for names that are no member's.
pub fn issue(
    authority: &JobAuthority,
    members: &[String],
    valid_for: Duration,
) -> Result<Vec<Identity>, paceline_transport::Error> {
    members.iter().map(|member| authority.issue(member, valid_for)).collect()
}

/// A folder for this user alone: where temporary files go, or in the memory that containers have whose root is read-only.
///
/// # Errors
/// What the system said of the first.
pub fn private_folder() -> io::Result<TempDir> {
    private_folder_in(&std::env::temp_dir())
        .or_else(|e| private_folder_in("/dev/shm".as_ref()).map_err(|_| e))
}

/// A folder that only this user can read, in that one.
///
/// # Errors
/// What the system said.
pub fn private_folder_in(place: &Path) -> io::Result<TempDir> {
    let mut folder = tempfile::Builder::new();
    folder.prefix(PREFIX).permissions(Permissions::from_mode(0o700)).tempdir_in(place)
}

impl Credentials {
    /// Stores identities of all members of this machine, the launcher's first, which stays in memory.
    ///
    /// # Errors
    /// [`Error::System`] with the operating system's reason.
    pub fn store(identities: &[Identity]) -> Result<Self, Error> {
        let stored = |e: &io::Error| Error::System {
            what: "cannot store the ranks' certificates".to_owned(),
            why: e.to_string(),
        };
        let folder = private_folder().map_err(|e| stored(&e))?;
        folder.path().parent().into_iter().for_each(remove_stale);
        let _hold = hold(folder.path()).map_err(|e| stored(&e))?;
        STORED.lock().unwrap_or_else(PoisonError::into_inner).push(folder.path().to_owned());
        let (launcher, workers) = identities.split_first().expect("a launcher is a member");
        for worker in workers {
            write(&path(folder.path(), worker.member()), worker).map_err(|e| stored(&e))?;
        }
        Ok(Self { launcher: launcher.clone(), workers: Workers::Ours { folder, _hold } })
    }

    /// Waits until there is something for all members of this machine, and takes it as [`given`](Self::given) does. The folder
    /// itself is there from the beginning, where a volume is mounted: another name is a mistake. Blocks.
    ///
    /// # Errors
    /// See there: at the deadline too.
    pub fn awaited(
        folder: &Path,
        members: &[String],
        deadline: Instant,
        status: &Status,
    ) -> Result<Self, Error> {
        while let Some(missing) = missing(folder, members).filter(|_| folder.is_dir()) {
            if Instant::now() + LOOK_PAUSE >= deadline {
                break;
            }
            status.waiting_for(&format!("the identity {}", missing.display()));
            thread::sleep(LOOK_PAUSE);
        }
        Self::given(folder, members)
    }

    /// Takes certificates that others have made: in `folder`, a folder for each member of this machine.
    ///
    /// # Errors
    /// [`Error::Usage`] when one is missing, readable for all, of another member than its folder, or of another job
    /// than the launcher's.
    pub fn given(folder: &Path, members: &[String]) -> Result<Self, Error> {
        let mut job: Option<Identity> = None;
        for member in members {
            let place = folder.join(member);
            let wrong = |why: String| Error::Usage(format!("the identity {}: {why}", place.display()));
            let key = place.join("tls.key");
            secret::open(&key).map_err(|why| wrong(format!("tls.key: {why}")))?;
            let identity = renewal::read(&place).map_err(wrong)?;
            let first = job.get_or_insert_with(|| identity.clone());
            if (identity.member(), identity.job()) != (member, first.job()) {
                let (found, job) = (identity.member(), identity.job());
                return Err(wrong(format!("it names {found} of {job}, not {member} of {}", first.job())));
            }
        }
        let launcher = job.expect("a launcher is a member");
        Ok(Self { launcher, workers: Workers::Given(folder.to_owned()) })
    }

    /// The launcher's own.
    pub fn launcher(&self) -> &Identity {
        &self.launcher
    }

    /// The file or folder of a worker.
    pub fn path(&self, rank: usize) -> PathBuf {
        match &self.workers {
            Workers::Ours { folder, .. } => path(folder.path(), &worker(rank)),
            Workers::Given(folder) => folder.join(worker(rank)),
        }
    }

    /// Keeps the launcher's own identity as it is in its folder, where that was given. Workers do so themselves.
    pub fn follow(&self, io: &IoHandle) {
        if let Workers::Given(folder) = &self.workers {
            let place = folder.join(self.launcher.member());
            io.spawn(renewal::follow(place, self.launcher.clone()));
        }
    }

    /// Takes fresh identities of the same members, in the same order.
    ///
    /// # Errors
    /// In words: the operating system's reason, or that an identity is another member's.
    pub fn renew(&self, fresh: &[Identity]) -> Result<(), String> {
        let Workers::Ours { folder, .. } = &self.workers else { return Err("others renew them".to_owned()) };
        let (launcher, workers) = fresh.split_first().ok_or("no identities")?;
        self.launcher.renew(launcher).map_err(|e| e.to_string())?;
        for worker in workers {
            write(&path(folder.path(), worker.member()), worker).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

/// The first file that is not there yet.
fn missing(folder: &Path, members: &[String]) -> Option<PathBuf> {
    let files = members.iter().flat_map(|member| renewal::FILES.map(|name| folder.join(member).join(name)));
    files.into_iter().find(|file| matches!(file.try_exists(), Ok(false)))
}

/// Renews for as long as it is polled: after two thirds of the life of the identities, and when that fails again and
/// again until it does not; ends with the job. `source` gives fresh ones and how long they are valid.
pub async fn keep_fresh<F>(credentials: Weak<Credentials>, mut valid_for: Duration, source: impl Fn() -> F)
where
    F: Future<Output = Result<(Vec<Identity>, Duration), String>>,
{
    loop {
        sleep_until(SystemTime::now() + valid_for * 2 / 3).await;
        loop {
            let fresh = source().await;
            let Some(credentials) = credentials.upgrade() else { return };
            let renewed = fresh.and_then(|(fresh, life)| credentials.renew(&fresh).map(|()| life));
            drop(credentials);
            match renewed {
                Ok(life) => {
                    tracing::info!(valid_for_s = life.as_secs(), "renewed the certificates");
                    valid_for = life;
                    break;
                }
                Err(reason) => {
                    tracing::warn!(reason, "cannot renew the certificates yet");
                    // Some ten more attempts before they expire.
                    tokio::time::sleep(valid_for / 30).await;
                }
            }
        }
    }
}

async fn sleep_until(at: SystemTime) {
    while let Ok(left) = at.duration_since(SystemTime::now()) {
        // A millisecond more: the error of `duration_since` ends the loop, not zero.
        tokio::time::sleep(left.min(LONGEST_SLEEP) + Duration::from_millis(1)).await;
    }
}

fn path(folder: &Path, member: &str) -> PathBuf {
    folder.join(format!("{member}.pem"))
}

fn write(path: &Path, identity: &Identity) -> io::Result<()> {
    let fresh = path.with_extension("new");
    // What a failed attempt has left.
    let _ = fs::remove_file(&fresh);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
    file.write_all(identity.to_pem().as_bytes())?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_launcher_that_was_killed_are_removed_and_others_are_not() {
        let place = tempfile::tempdir().expect("a folder");
        let [dead, live, foreign] =
            ["paceline-dead", "paceline-live", "paceline-logs"].map(|name| place.path().join(name));
        [&dead, &live, &foreign].into_iter().for_each(|folder| fs::create_dir(folder).expect("made"));
        drop(hold(&dead).expect("held"));
        let held = hold(&live).expect("held");
        remove_stale(place.path());
        assert!(!dead.exists() && live.exists() && foreign.exists());
        drop(held);
        remove_stale(place.path());
        assert!(!live.exists());
    }

    #[test]
    fn renewed_files_replace_the_old_ones_and_nobody_else_can_read_them() {
        let authority = JobAuthority::new("job").expect("a name");
        let members = ["launcher-1", "worker-2", "worker-3"].map(str::to_owned);
        let issue = || issue(&authority, &members, Duration::from_secs(60)).expect("names");
        let credentials = Credentials::store(&issue()).expect("stored");
        let read = || [2, 3].map(|rank| fs::read_to_string(credentials.path(rank)).expect("readable"));
        let before = read();
        credentials.renew(&issue()).expect("renewed");
        let after = read();
        assert!(before.iter().zip(&after).all(|(before, after)| before != after));
        for (rank, text) in [2, 3].into_iter().zip(after) {
            let identity = Identity::from_pem(&text).expect("an identity");
            assert_eq!(identity.member(), worker(rank));
            let mode = fs::metadata(credentials.path(rank)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert_eq!(
            fs::read_dir(credentials.path(2).parent().expect("a folder")).expect("a folder").count(),
            3,
            "the two and what says that they are in use"
        );
        let other = JobAuthority::new("job").expect("a name");
        let foreign = super::issue(&other, &members, Duration::from_secs(60)).expect("names");
        assert!(credentials.renew(&foreign).is_err());
    }
}
