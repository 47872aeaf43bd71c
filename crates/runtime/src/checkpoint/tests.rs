//! The public calls: ranks as threads, on this machine's disk where it does what is asked.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::sync::mpsc;
use std::sync::{Condvar, Mutex};

use paceline_transport::mem;

use super::sim::{Model, SimDisk, root};
use super::*;
use crate::membership::Step;

/// Runs `part` on so many ranks, as threads, and returns what each did.
fn on_ranks<T: Send + 'static>(
    world_size: usize,
    part: impl Fn(usize, &mut Communicator) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let ranks: Vec<_> = mem::group(world_size, 1, 1024)
        .into_iter()
        .enumerate()
        .map(|(rank, transport)| {
            let part = part.clone();
            thread::spawn(move || {
                let transport = Box::new(transport);
                let mut communicator =
                    Communicator::new(transport, Default::default()).expect("the defaults are right");
                let result = part(rank, &mut communicator);
                communicator.leave().expect("all leave");
                result
            })
        })
        .collect();
    ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
}

fn layout() -> Layout {
    Layout::of(&Model::after(0).tensors()).expect("the shapes fit")
}

fn settings(keep: usize) -> Settings {
    Settings { keep, ..Settings::default() }
}

/// Ranks save these steps, each once the one before is written.
fn save_on(world_size: usize, folder: &Path, steps: &'static [u64]) {
    let folder = folder.to_owned();
    on_ranks(world_size, move |rank, communicator| {
        let group = Group::agree(communicator, &layout()).expect("all have the same");
        assert_eq!((group.rank, group.world_size), (rank, world_size));
        let mut checkpointer =
            Checkpointer::open(&folder, group, layout(), settings(3)).expect("it can be made");
        for &step in steps {
            checkpointer.wait().expect("the disk works");
            // Rank 0 waits for the others' shards, so that nobody is busy any more.
            communicator.barrier().expect("all are there");
            let stable =
                checkpointer.agree(communicator, step).expect("all are at it").expect("nobody is busy");
            let mut notes = Notes::default();
            notes.put("step", &step).expect("a number");
            checkpointer.save(stable, &Model::after(step).tensors(), notes).expect("nothing is wrong");
        }
        let outcome = checkpointer.finish().expect("the disk works").expect("there was one");
        assert_eq!(outcome.result.expect("nothing fails").is_some(), rank == 0);
    });
}

fn resume_on(world_size: usize, folder: &Path) -> Vec<Result<Option<u64>, crate::Error>> {
    let folder = folder.to_owned();
    on_ranks(world_size, move |_, communicator| {
        let mut model = Model::after(1_000);
        let resumed = resume(communicator, &folder, &mut model.tensors_mut())?;
        let step = resumed.as_ref().map(|resumed| resumed.step);
        model.assert_is_after(step.unwrap_or(1_000));
        assert_eq!(resumed.and_then(|resumed| resumed.notes.get("step").expect("a number")), step);
        Ok(step)
    })
}

#[test]
fn what_one_number_of_ranks_saves_any_other_number_loads() {
    for writers in [1, 3, 4] {
        let folder = tempfile::tempdir().expect("a folder");
        save_on(writers, folder.path(), &[10, 20]);
        for readers in [1, 3, 4] {
            assert_eq!(
                resume_on(readers, folder.path()),
                vec![Ok(Some(20)); readers],
                "{writers} to {readers}"
            );
        }
    }
}

#[test]
fn where_nothing_was_saved_a_training_begins() {
    let folder = tempfile::tempdir().expect("a folder");
    assert_eq!(resume_on(2, &folder.path().join("nothing")), [Ok(None), Ok(None)]);
    // Something that was never whole is nothing.
    fs::create_dir(folder.path().join(names::writing(3, 4))).expect("it can be made");
    assert_eq!(resume_on(2, folder.path()), [Ok(None), Ok(None)]);
}

/// The folders of the checkpoints, newest first.
fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let listing = Listing::of(&LocalDisk, folder).expect("it can be read");
    listing.committed.iter().map(|name| folder.join(name.to_string())).collect()
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("it is there");
    change(&mut bytes);
    fs::write(path, bytes).expect("it can be written");
}

fn flip(bytes: &mut [u8], at: usize) {
    bytes[at] ^= 4;
}

type Break = fn(&Path);

const SHARD: &str = "shard-00001-of-00003.safetensors";

/// Every way to break a checkpoint, and what is said about it.
const BREAKS: [(Break, &str); 9] = [
    (|path| fs::remove_file(path.join(SHARD)).expect("there"), "shard-00001-of-00003.safetensors is missing"),
    (|path| change(&path.join(SHARD), |bytes| bytes.truncate(bytes.len() - 1)), "bytes instead of"),
    (|path| change(&path.join(SHARD), |bytes| bytes.push(0)), "bytes instead of"),
    (
        |path| {
            change(&path.join(SHARD), |bytes| {
                let end = bytes.len();
                flip(bytes, end - 1)
            })
        },
        "its digest is another",
    ),
    (|path| change(&path.join(SHARD), |bytes| flip(bytes, 7)), "its header claims"),
    (|path| change(&path.join(SHARD), |bytes| flip(bytes, 20)), "shard-00001-of-00003.safetensors"),
    (|path| fs::remove_file(path.join(names::MANIFEST)).expect("there"), "manifest.json is missing"),
    (|path| change(&path.join(names::MANIFEST), |bytes| flip(bytes, 40)), "its digest is not that"),
    (|path| change(&path.join(names::MANIFEST), Vec::clear), "its digest is not that"),
];

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_is_used() {
    for (number, (damage, expected)) in BREAKS.into_iter().enumerate() {
        let folder = tempfile::tempdir().expect("a folder");
        save_on(3, folder.path(), &[10, 20]);
        let newest = checkpoints(folder.path()).remove(0);
        damage(&newest);
        let name = newest.file_name().and_then(|name| name.to_str()).expect("text").parse().expect("ours");
        let mut model = Model::after(0);
        let said = Checkpoint::open(&LocalDisk, folder.path(), &name)
            .and_then(|checkpoint| checkpoint.load(&mut model.tensors_mut()))
            .expect_err("it is damaged");
        assert!(matches!(said, Error::Damaged { .. }), "{said}");
        assert!(said.to_string().contains(expected), "break {number}: {said}");
        assert_eq!(resume_on(2, folder.path()), [Ok(Some(10)), Ok(Some(10))], "break {number}");
        assert_eq!(Listing::of(&LocalDisk, folder.path()).expect("readable").rejected, [name]);
    }
}

#[test]
fn a_job_whose_checkpoints_are_all_damaged_does_not_begin_anew_by_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    save_on(2, folder.path(), &[10, 20]);
    for checkpoint in checkpoints(folder.path()) {
        fs::remove_file(checkpoint.join(names::MANIFEST)).expect("it is there");
    }
    // The second time they have been found to be damaged before.
    for _ in 0..2 {
        for result in resume_on(3, folder.path()) {
            let error = result.expect_err("nothing is whole").to_string();
            assert!(error.contains("to begin anew, move them away"), "{error}");
        }
    }
}

#[test]
fn a_checkpoint_of_another_model_is_refused_and_nothing_is_changed() {
    let folder = tempfile::tempdir().expect("a folder");
    save_on(2, folder.path(), &[10]);
    let mut weights = [7f32; 21];
    let error = resume_alone(folder.path(), &mut [TensorMut::new("weights", &[21], &mut weights)]);
    assert!(error.expect_err("another model").to_string().contains("2 tensors instead of 1"));
    let (mut moments, mut others) = ([0f64; 7], [0f64; 21]);
    let mut other =
        [TensorMut::new("weights", &[7, 3], &mut others), TensorMut::new("moments", &[7], &mut moments)];
    let error = resume_alone(folder.path(), &mut other).expect_err("another dtype").to_string();
    assert!(error.contains("weights (f32 [7, 3]) instead of weights (f64 [7, 3])"), "{error}");
    assert_eq!((weights, others), ([7f32; 21], [0f64; 21]));
    assert_eq!(resume_on(1, folder.path()), [Ok(Some(10))], "it is still there");
}

/// Makes a file seem to be of that size, which takes no room.
fn stretch(path: &Path, size: u64) {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(size))
        .expect("it can be stretched");
}

#[test]
fn sizes_that_a_stranger_claims_take_no_memory() {
    const TERABYTE: u64 = 1 << 40;
    let folder = tempfile::tempdir().expect("a folder");
    save_on(3, folder.path(), &[10]);
    let path = checkpoints(folder.path()).remove(0);
    let bytes = fs::read(path.join(names::MANIFEST)).expect("it is there");
    let mut manifest = Manifest::decode(&bytes).expect("it is right");
    // A manifest that vouches for a shard whose header is a terabyte.
    manifest.shards[1].bytes = TERABYTE;
    let bytes = manifest.encode().expect("it is short");
    let name = Committed { step: 10, manifest: Sha256::of(&bytes).short() };
    let hostile = folder.path().join(name.to_string());
    fs::rename(&path, &hostile).expect("it can be renamed");
    fs::write(hostile.join(names::MANIFEST), bytes).expect("it can be written");
    change(&hostile.join(SHARD), |bytes| bytes[..8].copy_from_slice(&(TERABYTE - 8).to_le_bytes()));
    stretch(&hostile.join(SHARD), TERABYTE);
    let refused =
        || resume_alone(folder.path(), &mut Model::after(0).tensors_mut()).expect_err("refused").to_string();
    assert!(refused().contains("its header claims 1099511627768 bytes"));
    // A manifest of a terabyte; the name is that of the rejected one.
    fs::rename(folder.path().join(names::rejected(&name)), &hostile).expect("it was rejected");
    stretch(&hostile.join(names::MANIFEST), TERABYTE);
    assert!(refused().contains("1099511627776 bytes; at most"));
}

#[test]
fn wrong_calls_say_what_is_wrong_and_save_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let group = Group { rank: 0, world_size: 1, run: 1 };
    let open = |group, keep| Checkpointer::open(folder.path(), group, layout(), settings(keep));
    assert!(open(group, 0).is_err());
    assert!(open(Group { rank: 1, ..group }, 1).is_err());
    assert!(open(Group { world_size: 0, ..group }, 1).is_err());
    let mut checkpointer = open(group, 1).expect("this one is right");
    let model = Model::after(3);
    let mut refused = |step, tensors: &[Tensor<'_>], expect: &str| {
        let error =
            checkpointer.save(StableStep(step), tensors, Notes::default()).expect_err(expect).to_string();
        assert!(error.contains(expect), "{error}");
    };
    refused(3, &model.tensors()[..1], "1 tensors instead of 2");
    refused(3, &[model.tensors()[1], model.tensors()[0]], "instead of");
    checkpointer.save(StableStep(3), &model.tensors(), Notes::default()).expect("this one is right");
    let again = checkpointer.save(StableStep(3), &model.tensors(), Notes::default());
    assert!(again.expect_err("twice").to_string().contains("step 3 cannot be saved after step 3"));
    checkpointer.finish().expect("the disk works");
    assert_eq!(checkpoints(folder.path()).len(), 1);
}

#[test]
fn only_what_the_membership_calls_stable_is_a_stable_step() {
    let stable = StableStep::found_by(&WorkerAction::Stable(Step(7))).expect("it says so");
    assert_eq!(stable.step(), 7);
    assert_eq!(StableStep::found_by(&WorkerAction::Apply(Step(7))), None);
}

#[test]
fn ranks_that_differ_in_step_or_model_save_nothing_and_hear_why() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_owned();
    let said = on_ranks(2, move |rank, communicator| {
        let other = Layout::of(&Model::after(0).tensors()[..1 + rank]).expect("the shapes fit");
        let model = Group::agree(communicator, &other).expect_err("they differ").to_string();
        let group = Group::agree(communicator, &layout()).expect("all have the same");
        let mut checkpointer =
            Checkpointer::open(&path, group, layout(), settings(1)).expect("it can be made");
        let step = checkpointer.agree(communicator, 4 + rank as u64).expect_err("they differ").to_string();
        (model, step)
    });
    for (model, step) in said {
        assert!(model.contains("different tensors"), "{model}");
        assert!(step.contains("from 4 to 5"), "{step}");
    }
    assert_eq!(checkpoints(folder.path()), [""; 0].map(PathBuf::from));
}

#[test]
fn a_full_disk_costs_the_checkpoint_and_nothing_else() {
    let disk = SimDisk::new();
    let group = Group { rank: 0, world_size: 1, run: 1 };
    let mut checkpointer =
        Checkpointer::open_on(Arc::new(disk.clone()), &root(), group, layout(), settings(2))
            .expect("it can be made");
    let mut save = |step: u64, room: usize| {
        disk.set_room(room);
        checkpointer
            .save(StableStep(step), &Model::after(step).tensors(), Notes::default())
            .expect("it goes on");
        checkpointer.wait().expect("it ends");
        checkpointer.outcome().expect("there is one").result.clone()
    };
    save(1, usize::MAX).expect("there is room");
    let full = save(2, 200).expect_err("there is none");
    assert!(matches!(full, Error::Disk { kind: io::ErrorKind::StorageFull, .. }), "{full}");
    let listing = Listing::of(&disk, &root()).expect("it can be read");
    assert_eq!((listing.committed.len(), listing.unfinished), (1, 0), "nothing of it is left");
    save(3, usize::MAX).expect("there is room again");
}

/// A disk on which files are made only while a gate is open.
#[derive(Debug)]
struct Gated {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gated {
    fn set(&self, open: bool) {
        *self.is_open.lock().expect("nobody panics with it") = open;
        self.opened.notify_all();
    }
}

impl Disk for Gated {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.create_folder(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        let closed = self.is_open.lock().expect("nobody panics with it");
        drop(self.opened.wait_while(closed, |is_open| !*is_open).expect("nobody panics with it"));
        LocalDisk.create(path)
    }
    fn open(&self, path: &Path) -> io::Result<(Box<dyn Read>, u64)> {
        LocalDisk.open(path)
    }
    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.sync_folder(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        LocalDisk.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove_file(path)
    }
    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove_folder(path)
    }
    fn names(&self, path: &Path) -> io::Result<Vec<String>> {
        LocalDisk.names(path)
    }
}

#[test]
fn while_one_rank_still_writes_all_skip_the_next_checkpoint() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_owned();
    let gate = Arc::new(Gated { is_open: Mutex::new(false), opened: Condvar::new() });
    on_ranks(2, move |rank, communicator| {
        let group = Group::agree(communicator, &layout()).expect("all have the same");
        let disk: Arc<dyn Disk> = if rank == 1 { gate.clone() } else { Arc::new(LocalDisk) };
        let mut checkpointer =
            Checkpointer::open_on(disk, &path, group, layout(), settings(3)).expect("it can be made");
        let mut save = |checkpointer: &mut Checkpointer, step| {
            let stable = checkpointer.agree(communicator, step).expect("all are at it");
            let is_idle = stable.is_some();
            if let Some(stable) = stable {
                checkpointer
                    .save(stable, &Model::after(step).tensors(), Notes::default())
                    .expect("it is right");
            }
            is_idle
        };
        assert!(save(&mut checkpointer, 1));
        assert!(!save(&mut checkpointer, 2), "rank 1 is stuck, so both skip");
        if rank == 1 {
            gate.set(true);
        }
        checkpointer.wait().expect("the gate is open");
        // Whoever is first may still find the other busy; after a collective later it is not.
        while !save(&mut checkpointer, 3) {
            checkpointer.wait().expect("the gate is open");
        }
        checkpointer.finish().expect("the gate is open");
    });
    let steps: Vec<_> = Listing::of(&LocalDisk, folder.path()).expect("readable").committed;
    assert_eq!(steps.iter().map(|name| name.step).collect::<Vec<_>>(), [3, 1]);
}

#[test]
fn after_a_change_of_the_membership_the_others_save_without_the_lost_rank() {
    let folder = tempfile::tempdir().expect("a folder");
    let group = Group { rank: 0, world_size: 2, run: 1 };
    let mut checkpointer =
        Checkpointer::open(folder.path(), group, layout(), settings(3)).expect("it can be made");
    // Rank 1 has died before it wrote its shard.
    checkpointer.save(StableStep(5), &Model::after(5).tensors(), Notes::default()).expect("it is right");
    checkpointer.regroup(Group { rank: 0, world_size: 1, run: 2 }).expect("it stops");
    let outcome = checkpointer.outcome().expect("it was stopped").result.clone();
    assert!(matches!(outcome, Err(Error::GivenUp { step: 5, .. })), "{outcome:?}");
    let mut notes = Notes::default();
    notes.put("step", &5).expect("a number");
    checkpointer.save(StableStep(5), &Model::after(5).tensors(), notes).expect("it is right");
    checkpointer.finish().expect("the disk works");
    let listing = Listing::of(&LocalDisk, folder.path()).expect("readable");
    assert_eq!((listing.committed.len(), listing.unfinished), (1, 0));
    assert_eq!(resume_on(3, folder.path()), vec![Ok(Some(5)); 3]);
}

#[test]
fn what_an_earlier_run_left_unfinished_is_removed_and_never_used() {
    let folder = tempfile::tempdir().expect("a folder");
    save_on(2, folder.path(), &[10]);
    let stale = folder.path().join(names::writing(20, 99));
    fs::create_dir(&stale).expect("it can be made");
    for file in fs::read_dir(checkpoints(folder.path()).remove(0)).expect("readable") {
        let file = file.expect("readable");
        fs::copy(file.path(), stale.join(file.file_name())).expect("it can be copied");
    }
    fs::create_dir(folder.path().join(names::removing("step-1"))).expect("it can be made");
    fs::write(folder.path().join("notes.txt"), "the user's").expect("it can be written");
    assert_eq!(resume_on(2, folder.path()), vec![Ok(Some(10)); 2]);
    save_on(2, folder.path(), &[30]);
    let listing = Listing::of(&LocalDisk, folder.path()).expect("readable");
    assert_eq!((listing.committed.len(), listing.unfinished), (2, 0));
    assert!(folder.path().join("notes.txt").exists(), "what is not ours stays");
}

#[test]
fn dropping_a_checkpointer_waits_for_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let gate = Arc::new(Gated { is_open: Mutex::new(false), opened: Condvar::new() });
    let group = Group { rank: 0, world_size: 1, run: 1 };
    let mut checkpointer = Checkpointer::open_on(gate.clone(), folder.path(), group, layout(), settings(3))
        .expect("it can be made");
    checkpointer.save(StableStep(5), &Model::after(5).tensors(), Notes::default()).expect("it is right");
    let (dropped, done) = mpsc::channel();
    thread::spawn(move || {
        drop(checkpointer);
        dropped.send(()).expect("the test listens");
    });
    done.recv_timeout(Duration::from_secs(60)).expect("it does not wait for the disk");
    gate.set(true);
}
