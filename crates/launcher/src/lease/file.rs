//! A lease that is a file which the launchers of all nodes see.
//!
//! Whoever changes it holds a lock on a second file meanwhile, FILE.lock (flock(2)), and replaces it as a whole: a third
//! file, FILE.new, is written, put on the disk, and renamed. A crash at any moment leaves the old content or the new one,
//! and the system releases the lock of a process that is gone. So the file system has to pass on locks and renames between
//! nodes at once, as NFS 4, CephFS and Lustre do; one that gives each node a lock of its own (`nolock`, `local_lock`) lets
//! both sides of a network that has fallen apart go on.
//!
//! It is one line that says what it is, with a digest of the second one, which is JSON.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use paceline_runtime::digest::Digest;
use paceline_runtime::elastic::draw;
use paceline_runtime::membership::{Decision, Epoch};
use serde::{Deserialize, Serialize};

use super::{Lease, Trouble};

/// How long others may hold the lock. They do for as long as it takes to write a few kilobytes.
const LOCK_LIMIT: Duration = Duration::from_secs(3);

/// The pause between two attempts to get it.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// After how long under the lock nothing is renamed any more. A file server takes the lock of a node away that it has not
/// heard for its lease's time, of which 90 s are usual.
const HOLD_LIMIT: Duration = Duration::from_secs(10);

/// The most that is read: a decision of the largest job has some hundred kilobytes here.
const SIZE_LIMIT: u64 = 4 << 20;

/// The first word of the file, and its version.
const KIND: &str = "paceline-lease 1";

/// See the [module](self).
#[derive(Debug)]
pub struct FileLease {
    path: PathBuf,
    job: String,
    identity: String,
}

/// What is in the file.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Whose lease it is.
    job: String,
    /// Drawn when the file was made.
    identity: String,
    /// The newest epoch that was claimed or decided.
    epoch: Epoch,
    /// What was decided, unless it has been claimed alone.
    decision: Option<Decision>,
}

/// A lock on the second file, until it is dropped.
struct Locked {
    _lock: File,
    since: Instant,
}

impl FileLease {
    /// The lease of that job in a file, which is made if there is none. Its folder must be there.
    ///
    /// # Errors
    /// [`Trouble::Lasting`] for a file that is none, is damaged or is that of another job.
    pub fn open(path: &Path, job: &str) -> Result<Self, Trouble> {
        let mut lease = Self { path: path.to_owned(), job: job.to_owned(), identity: String::new() };
        let locked = lease.lock()?;
        lease.identity = match lease.read()? {
            Some(record) => record.identity,
            None => {
                let identity = format!("{}", draw());
                let record = Record {
                    job: job.to_owned(),
                    identity: identity.clone(),
                    epoch: Epoch(0),
                    decision: None,
                };
                lease.write(&locked, &record)?;
                identity
            }
        };
        Ok(lease)
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(suffix);
        name.into()
    }

    fn lock(&self) -> Result<Locked, Trouble> {
        let path = self.beside(".lock");
        let lock = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(|e| cannot("open", &path, &e))?;
        let deadline = Instant::now() + LOCK_LIMIT;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Locked { _lock: lock, since: Instant::now() }),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(LOCK_PAUSE),
                Err(TryLockError::WouldBlock) => {
                    let seconds = LOCK_LIMIT.as_secs();
                    let (what, path) = ("another process has held the lock", path.display());
                    return Err(Trouble::Passing(format!("{path}: {what} for {seconds} s")));
                }
                Err(TryLockError::Error(e)) => return Err(cannot("lock", &path, &e)),
            }
        }
    }

    /// What is in the file; none if there is no file.
    fn read(&self) -> Result<Option<Record>, Trouble> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(cannot("open", &self.path, &e)),
        };
        let mut bytes = Vec::new();
        file.take(SIZE_LIMIT).read_to_end(&mut bytes).map_err(|e| cannot("read", &self.path, &e))?;
        let lasting = |reason: String| Trouble::Lasting(format!("{}: {reason}", self.path.display()));
        let record = decode(&bytes).map_err(lasting)?;
        if record.job != self.job {
            let (theirs, ours) = (record.job.escape_debug(), &self.job);
            let advice = "give each job a file of its own, or remove this one when that job is over";
            return Err(lasting(format!("it is the lease of {theirs} and not of {ours}; {advice}")));
        }
        if !self.identity.is_empty() && record.identity != self.identity {
            return Err(lasting("somebody has put another file in its place".to_owned()));
        }
        Ok(Some(record))
    }

    /// That of a file that was there when this launcher started: without it another launcher may have gone on.
    fn read_known(&self) -> Result<Record, Trouble> {
        let gone = || Trouble::Lasting(format!("{}: somebody has removed it", self.path.display()));
        self.read()?.ok_or_else(gone)
    }

    fn write(&self, locked: &Locked, record: &Record) -> Result<(), Trouble> {
        let (fresh, folder) = (self.beside(".new"), self.path.parent().unwrap_or(Path::new("/")));
        let failed = |e: io::Error| cannot("write", &fresh, &e);
        let mut file = File::create(&fresh).map_err(failed)?;
        file.write_all(&encode(record)).and_then(|()| file.sync_all()).map_err(failed)?;
        if locked.since.elapsed() >= HOLD_LIMIT {
            let (path, seconds) = (fresh.display(), HOLD_LIMIT.as_secs());
            return Err(Trouble::Passing(format!("{path}: writing it took longer than {seconds} s")));
        }
        fs::rename(&fresh, &self.path).map_err(|e| cannot("replace", &self.path, &e))?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| cannot("sync", folder, &e))
    }
}

impl Lease for FileLease {
    fn identity(&self) -> &str {
        &self.identity
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn newest(&self) -> Result<Epoch, Trouble> {
        // Renamed as a whole, so that no lock is needed.
        self.read_known().map(|record| record.epoch)
    }

    fn claim(&self, floor: Epoch) -> Result<Epoch, Trouble> {
        let locked = self.lock()?;
        let record = self.read_known()?;
        let epoch = record.epoch.max(floor).next();
        self.write(&locked, &Record { epoch, decision: None, ..record })?;
        Ok(epoch)
    }

    fn swap(&self, decision: &Decision) -> Result<Option<Decision>, Trouble> {
        let locked = self.lock()?;
        let record = self.read_known()?;
        if record.epoch.next() != decision.epoch() {
            return Ok(record.decision);
        }
        let decision = Some(decision.clone());
        let record = Record { epoch: record.epoch.next(), decision: decision.clone(), ..record };
        self.write(&locked, &record)?;
        Ok(decision)
    }
}

fn encode(record: &Record) -> Vec<u8> {
    let body = serde_json::to_string(record).expect("it has nothing that JSON has not");
    format!("{KIND} {}\n{body}\n", Digest::of([body.as_bytes()])).into_bytes()
}

fn decode(bytes: &[u8]) -> Result<Record, String> {
    let damaged = || "it is damaged; remove it when no launcher of the job runs".to_owned();
    let text = std::str::from_utf8(bytes).map_err(|_| damaged())?;
    let Some(rest) = text.strip_prefix(KIND) else {
        return Err(if text.is_empty() { damaged() } else { "it is not a lease of this version".to_owned() });
    };
    let (digest, body) = rest.split_once('\n').ok_or_else(damaged)?;
    let body = body.strip_suffix('\n').ok_or_else(damaged)?;
    if digest.trim() != Digest::of([body.as_bytes()]).to_string() {
        return Err(damaged());
    }
    let record: Record = serde_json::from_str(body).map_err(|e| format!("it makes no sense: {e}"))?;
    match &record.decision {
        Some(decision) if decision.epoch() != record.epoch => Err("its epochs do not agree".to_owned()),
        Some(decision) => decision.check().map(|()| record),
        None => Ok(record),
    }
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Trouble {
    Trouble::Passing(format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::{Command, Stdio};
    use std::sync::Arc;

    use paceline_runtime::membership::{Incarnation, Member, Resolution, Seat, Step, View, Voter};
    use tempfile::TempDir;

    use super::super::{Answer, Keeper};
    use super::*;

    const JOB: &str = "job at a:1";
    const SECOND: Duration = Duration::from_secs(1);

    /// The decision of an epoch with one launcher and one worker.
    fn decision(epoch: u64, launcher: u128) -> Decision {
        let (voter, worker) = (Incarnation(launcher), Incarnation(u128::MAX - launcher));
        let voters = vec![Voter { seat: Seat(0), incarnation: voter }];
        let members = vec![Member { incarnation: worker, launcher: voter, slots: vec![0] }];
        let view = View { epoch: Epoch(epoch), voters, members };
        let resolution = Resolution { applied: Step(3), lineage: 9, sources: vec![worker] };
        Decision { view, resolution }
    }

    fn lease() -> (TempDir, FileLease) {
        let folder = tempfile::tempdir().expect("a folder");
        let lease = FileLease::open(&folder.path().join("lease"), JOB).expect("it is made");
        (folder, lease)
    }

    #[test]
    fn the_first_decision_of_an_epoch_is_the_only_one_and_all_others_find_it() {
        let (folder, one) = lease();
        let other = FileLease::open(&folder.path().join("lease"), JOB).expect("it is there");
        assert_eq!(one.identity(), other.identity());
        assert_eq!(one.claim(Epoch(6)), Ok(Epoch(7)));
        assert_eq!(one.swap(&decision(8, 1)), Ok(Some(decision(8, 1))));
        assert_eq!(other.swap(&decision(8, 2)), Ok(Some(decision(8, 1))));
        assert_eq!(one.swap(&decision(8, 1)), Ok(Some(decision(8, 1))), "asked again");
        assert_eq!(other.swap(&decision(10, 2)), Ok(Some(decision(8, 1))), "not the next epoch");
        assert_eq!(other.swap(&decision(9, 2)), Ok(Some(decision(9, 2))));
    }

    #[test]
    fn a_job_that_is_founded_again_leaves_the_one_before_no_epoch() {
        let (_folder, lease) = lease();
        assert_eq!(lease.claim(Epoch(0)), Ok(Epoch(1)));
        assert_eq!(lease.swap(&decision(2, 1)), Ok(Some(decision(2, 1))));
        assert_eq!(lease.claim(Epoch(0)), Ok(Epoch(3)), "after every one");
        assert_eq!(lease.swap(&decision(3, 1)), Ok(None), "somebody of before, who was frozen");
        assert_eq!(lease.claim(Epoch(100)), Ok(Epoch(101)));
    }

    #[test]
    fn a_file_that_is_torn_damaged_foreign_or_of_another_job_is_an_error_in_one_line() {
        let (folder, lease) = lease();
        lease.claim(Epoch(0)).and_then(|_| lease.swap(&decision(2, u128::MAX / 3))).expect("decided");
        let path = folder.path().join("lease");
        let whole = fs::read(&path).expect("it is there");
        let open = || FileLease::open(&path, JOB).map(drop);
        assert_eq!(open(), Ok(()));
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).expect("written");
            let error = open().expect_err("it is torn");
            assert!(
                matches!(error, Trouble::Lasting(_)) && error.to_string().lines().count() == 1,
                "{error}"
            );
            assert_eq!(lease.swap(&decision(3, 1)), Err(error));
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).expect("written");
            assert!(matches!(open(), Err(Trouble::Lasting(_))), "byte {at} is another one");
        }
        fs::write(&path, "a letter to mother\n").expect("written");
        assert!(open().is_err_and(|e| e.to_string().contains("not a lease")));
        fs::write(&path, &whole).expect("written");
        let error = FileLease::open(&path, "job at b:2").expect_err("it is another job's");
        assert!(error.to_string().contains("the lease of job at a:1 and not of job at b:2"), "{error}");
        fs::remove_file(&path).expect("removed");
        assert!(lease.swap(&decision(3, 1)).is_err_and(|e| e.to_string().contains("removed")));
        assert!(FileLease::open(&folder.path().join("none/lease"), JOB).is_err());
    }

    #[test]
    fn what_a_crash_leaves_behind_changes_nothing() {
        let (folder, lease) = lease();
        lease.claim(Epoch(0)).expect("claimed");
        fs::write(folder.path().join("lease.new"), "half of a rec").expect("written");
        assert_eq!(lease.swap(&decision(2, 1)), Ok(Some(decision(2, 1))));
    }

    #[test]
    fn a_lock_that_is_not_released_is_waited_for_no_longer_than_was_said() {
        let (_folder, lease) = lease();
        let held = lease.lock().expect("it is free");
        let trouble = lease.claim(Epoch(0)).expect_err("it is held");
        assert!(
            matches!(&trouble, Trouble::Passing(reason) if reason.contains("held the lock for 3 s")),
            "{trouble}"
        );
        drop(held);
        assert_eq!(lease.claim(Epoch(0)), Ok(Epoch(1)));
    }

    #[test]
    fn the_lock_of_a_process_that_is_killed_is_released() {
        let (folder, lease) = lease();
        // Its child has not the lock, and ends with its input.
        let mut holder = Command::new("flock")
            .arg("-o")
            .arg(folder.path().join("lease.lock"))
            .arg("cat")
            .stdin(Stdio::piped())
            .spawn()
            .expect("util-linux is there");
        let deadline = Instant::now() + 60 * SECOND;
        let lock = || File::open(folder.path().join("lease.lock")).expect("it is there");
        while lock().try_lock().is_ok() {
            assert!(Instant::now() < deadline, "nobody holds the lock");
            thread::sleep(LOCK_PAUSE);
        }
        holder.kill().expect("it is our child");
        holder.wait().expect("it is our child");
        assert_eq!(lease.claim(Epoch(0)), Ok(Epoch(1)));
    }

    #[test]
    fn of_many_that_race_one_decides_each_epoch() {
        const RACERS: u64 = 6;
        const EPOCHS: u64 = 20;
        let (folder, lease) = lease();
        lease.claim(Epoch(0)).expect("claimed");
        let path = folder.path().join("lease");
        // Each has a lock of its own, as another process would: flock locks what was opened.
        let race = |racer: u64| {
            let lease = FileLease::open(&path, JOB).expect("it is there");
            let mut found = Vec::new();
            for epoch in 2..2 + EPOCHS {
                let newest = loop {
                    match lease.swap(&decision(epoch, u128::from(racer) + 1)) {
                        Ok(newest) => break newest.expect("an epoch was decided"),
                        // As the core would.
                        Err(Trouble::Passing(_)) => {}
                        Err(trouble) => panic!("{trouble}"),
                    }
                };
                assert!(newest.epoch() >= Epoch(epoch));
                found.push(newest);
            }
            found
        };
        let found: Vec<Decision> = thread::scope(|scope| {
            let racers: Vec<_> = (0..RACERS).map(|racer| scope.spawn(move || race(racer))).collect();
            racers.into_iter().flat_map(|racer| racer.join().expect("nobody panics")).collect()
        });
        for epoch in (2..2 + EPOCHS).map(Epoch) {
            let decided: BTreeSet<&Decision> = found.iter().filter(|found| found.epoch() == epoch).collect();
            assert!(decided.len() <= 1, "{epoch} was decided twice: {decided:?}");
        }
        let last = found.iter().filter(|found| found.epoch() == Epoch(1 + EPOCHS));
        assert!(last.count() > 0, "somebody has decided the last one");
    }

    #[test]
    fn a_keeper_answers_in_order_and_one_swap_at_a_time() {
        let (_folder, lease) = lease();
        let (told, answers) = std::sync::mpsc::channel();
        let mut keeper =
            Keeper::start(Arc::new(lease), move |answer| drop(told.send(answer))).expect("a thread");
        let next = |keeper: &mut Keeper| {
            let answer = answers.recv_timeout(60 * SECOND).expect("it answers");
            keeper.heard(&answer);
            answer
        };
        keeper.claim(Epoch(0));
        keeper.swap(decision(2, 1));
        keeper.swap(decision(2, 2));
        assert_eq!(next(&mut keeper), Answer::Claimed(Epoch(1)));
        assert_eq!(next(&mut keeper), Answer::Swapped(Some(decision(2, 1))));
        keeper.swap(decision(3, 2));
        assert_eq!(next(&mut keeper), Answer::Swapped(Some(decision(3, 2))));
        assert!(answers.try_recv().is_err(), "the second one was under way");
    }
}
