//! Layer B: the production loader and communicator on a test double of libnccl, compiled here by the C compiler.
//!
//! What this proves: what we call, in which order, with which arguments, from one thread at a time; and that hangs,
//! unknown codes, missing functions and old versions end in errors within their deadlines. What it does not: anything about
//! NVIDIA's library, and nothing about data, since the double moves none.

use std::fmt::Display;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use paceline_nccl::{
    Communicator, DataType, Error, Library, Operation, Options, Origin, ReduceOp, Region, ResultCode, Search,
    Shrink, Stream, UniqueId, Version,
};
use tempfile::TempDir;

/// Long enough for any call that returns; no test waits for it.
const LONG: Duration = Duration::from_secs(60);

/// For what never comes: this long and half a second more.
const SHORT: Duration = Duration::from_millis(50);

/// A compiled double and its folder.
struct Double {
    folder: TempDir,
}

impl Double {
    /// Compiles a double that behaves as `settings` say; text is quoted by the caller's use of [`text`].
    fn new(settings: &[(&str, &dyn Display)]) -> Self {
        let double = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-w", "-o"]).arg(double.library());
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/double/nccl.c");
        compiler.arg(source).arg(format!("-DLOG={:?}", double.path("log")));
        compiler.arg(format!("-DRELEASE={:?}", double.path("release")));
        compiler.args(settings.iter().map(|(name, value)| format!("-D{name}={value}")));
        let output = compiler.output().expect("a C compiler named cc");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        double
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn library(&self) -> PathBuf {
        self.path("libnccl.so.2")
    }

    fn open(&self) -> Arc<Library> {
        Library::open(&Search::only(self.library())).expect("the double can be loaded")
    }

    /// Rank 0 of two, which needs nobody: the double knows no other ranks.
    fn communicator(&self, timeout: Duration) -> Result<Communicator, Error> {
        let library = self.open();
        let ids = [library.unique_id()?];
        Communicator::new(&library, 0, 2, &ids, Options { timeout, ..Options::default() })
    }

    /// The lines of the log, none of which may be a misuse.
    fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        assert!(!log.contains("MISUSE"), "{log}");
        log.lines().map(str::to_owned).collect()
    }

    /// Waits for a line that another thread causes.
    fn wait_for(&self, line: &str) {
        let start = Instant::now();
        while !self.log().iter().any(|logged| logged == line) {
            assert!(start.elapsed() < LONG, "no line {line:?} in {:#?}", self.log());
            std::thread::yield_now();
        }
    }

    /// Lets a function that hangs return.
    fn release(&self) {
        fs::write(self.path("release"), "").expect("the folder can be written to");
    }
}

/// A text for the C compiler.
fn text(value: &str) -> String {
    format!("{value:?}")
}

/// Elements that the double never looks at.
fn elements(len: usize) -> Region {
    // SAFETY: the double takes addresses for numbers.
    unsafe { Region::new(0x1000, len, DataType::F32) }
}

fn all_reduce(len: usize) -> Operation {
    Operation::AllReduce { send: elements(len), receive: elements(len), op: ReduceOp::Max }
}

#[test]
fn a_library_is_opened_by_its_file_or_its_folder() {
    let double = Double::new(&[]);
    for path in [double.library(), double.folder.path().to_owned()] {
        let library = Library::open(&Search::only(path)).unwrap();
        assert_eq!(library.version(), Version::new(2, 28, 9));
        assert_eq!(*library.origin(), Origin::File(double.library()));
    }
}

#[test]
fn what_is_no_nccl_is_refused_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let text_file = folder.path().join("libnccl.so.2");
    fs::write(&text_file, "not a library").unwrap();
    let error = Library::open(&Search::only(&text_file)).unwrap_err().to_string();
    assert!(error.contains(text_file.to_str().unwrap()), "{error}");

    let missing = folder.path().join("missing.so");
    let error = Library::open(&Search::only(&missing)).unwrap_err().to_string();
    assert!(error.contains("missing.so") && error.contains("No such file"), "{error}");

    let double = Double::new(&[("HIDE_VERSION", &1)]);
    let error = Library::open(&Search::only(double.library())).unwrap_err().to_string();
    assert!(error.contains("it has no ncclGetVersion"), "{error}");
}

#[test]
fn versions_that_are_too_old_or_of_another_major_are_refused() {
    for (code, told) in [(21604, "2.16.4"), (2808, "2.8.8"), (30001, "3.0.1")] {
        let double = Double::new(&[("VERSION", &code)]);
        let error = Library::open(&Search::only(double.library())).unwrap_err().to_string();
        assert!(error.contains(&format!("it is NCCL {told}; Paceline needs 2.17.0 or later")), "{error}");
    }
    let double = Double::new(&[("VERSION", &-5)]);
    let error = Library::open(&Search::only(double.library())).unwrap_err().to_string();
    assert!(error.contains("ncclGetVersion told -5"), "{error}");
}

#[test]
fn the_search_goes_on_and_names_every_place_at_the_end() {
    let old = Double::new(&[("VERSION", &21604)]);
    let search =
        |files: Vec<PathBuf>| Search { loaded: false, path: None, files, names: vec!["libno-nccl.so"] };
    let nowhere = PathBuf::from("/nonexistent/libnccl.so.2");
    let error = Library::open(&search(vec![nowhere.clone(), old.library()])).unwrap_err();
    let Error::NotFound { tried } = &error else { panic!("{error:?}") };
    let places: Vec<_> = tried.iter().map(|attempt| attempt.place.clone()).collect();
    assert_eq!(places, [nowhere.clone(), old.library(), PathBuf::from("libno-nccl.so")]);
    let words = error.to_string();
    assert!(words.contains("no such file") && words.contains("2.16.4"), "{words}");
    assert!(words.contains("PACELINE_NCCL_PATH"), "{words}");

    let good = Double::new(&[]);
    let library = Library::open(&search(vec![nowhere, old.library(), good.library()])).unwrap();
    assert_eq!(*library.origin(), Origin::File(good.library()));
}

#[test]
fn a_path_that_was_asked_for_is_not_replaced_by_another() {
    let good = Double::new(&[]);
    let search = Search { files: vec![good.library()], ..Search::only("/nonexistent/asked-for.so") };
    let error = Library::open(&search).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/asked-for.so"), "{error}");
}

#[test]
fn an_old_library_lacks_functions_by_name_and_leaves_the_communicator_usable() {
    let double = Double::new(&[("VERSION", &21705)]);
    let missing: Vec<_> = double.open().missing().into_iter().map(|(name, _)| name).collect();
    let expected = [
        "ncclCommInitRankScalable",
        "ncclCommRevoke",
        "ncclCommSplit",
        "ncclCommShrink",
        "ncclCommGetUniqueId",
        "ncclCommGrow",
    ];
    assert_eq!(missing, expected);
    let communicator = double.communicator(LONG).unwrap();
    let errors = [
        communicator.split(Some(0), 0).unwrap_err(),
        communicator.shrink(&[1], Shrink::AtRest).unwrap_err(),
        communicator.growth_id().unwrap_err(),
        communicator.grow(3, None).unwrap_err(),
        communicator.revoke().unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::Missing { .. }) && !error.is_fatal(), "{error:?}");
    }
    let words = communicator.split(Some(0), 0).unwrap_err().to_string();
    assert!(words.starts_with("NCCL 2.17.5 (/"), "{words}");
    assert!(words.contains("has no ncclCommSplit, which came with 2.18.0"), "{words}");
    communicator.enqueue(&[all_reduce(1)], Stream::DEFAULT).unwrap().wait().unwrap();
    communicator.finish().unwrap();
}

#[test]
fn a_library_of_2_30_has_every_function() {
    assert_eq!(Double::new(&[("VERSION", &23007)]).open().missing(), []);
}

#[test]
fn communicators_are_asked_for_without_blocking_and_in_the_older_shape() {
    for (version, shape) in [(21705, 21705), (22809, 22800), (23203, 22800)] {
        let double = Double::new(&[("VERSION", &version)]);
        let library = double.open();
        let ids = [library.unique_id().unwrap()];
        let net_name = Some("Socket".to_owned());
        let options = Options { timeout: LONG, net_name, max_ctas: Some(4), ..Options::default() };
        let communicator = Communicator::new(&library, 1, 2, &ids, options).unwrap();
        let place = (communicator.rank(), communicator.world_size(), communicator.device());
        assert_eq!(place, (1, 2, 3));
        let expected = [
            "ncclCommInitRankConfig rank=1 size=2".to_owned(),
            "ncclCommInitRankConfig id=90,90".to_owned(),
            format!("ncclCommInitRankConfig config size=80 version={shape}"),
            "ncclCommInitRankConfig config blocking=0 maxCTAs=4".to_owned(),
            "Socket config netName set=1 magic=cafebeef".to_owned(),
        ];
        assert_eq!(double.log(), expected);
    }
}

#[test]
fn work_in_the_background_is_waited_for() {
    let double = Double::new(&[("POLLS", &3)]);
    let communicator = double.communicator(LONG).unwrap();
    communicator.enqueue(&[all_reduce(5)], Stream::DEFAULT).unwrap().wait().unwrap();
    communicator.check().unwrap();
    communicator.finish().unwrap();
    let log = double.log();
    assert_eq!(log[5..], ["ncclAllReduce count=5 argument=702", "ncclCommFinalize", "ncclCommDestroy"]);
}

#[test]
fn every_operation_reaches_its_function_with_the_count_that_nccl_wants() {
    let double = Double::new(&[]);
    let communicator = double.communicator(LONG).unwrap();
    let (three, six, op) = (elements(3), elements(6), ReduceOp::Prod);
    let operations = [
        Operation::Broadcast { send: three, receive: three, root: 1 },
        Operation::Reduce { send: three, receive: Region::empty(DataType::F32), op, root: 1 },
        Operation::AllGather { send: three, receive: six },
        Operation::ReduceScatter { send: six, receive: three, op },
        Operation::Send { send: six, peer: 1 },
        Operation::Receive { receive: three, peer: 1 },
    ];
    communicator.enqueue(&operations, Stream::DEFAULT).unwrap().wait().unwrap();
    let expected = [
        "ncclGroupStart",
        "ncclBroadcast count=3 argument=1",
        "ncclReduce count=3 argument=711",
        "ncclAllGather count=3 argument=7",
        "ncclReduceScatter count=3 argument=701",
        "ncclSend count=6 argument=1",
        "ncclRecv count=3 argument=1",
        "ncclGroupEnd",
    ];
    assert_eq!(double.log()[5..], expected);
}

#[test]
fn a_wrong_call_reaches_nobody_and_leaves_the_communicator_usable() {
    let double = Double::new(&[]);
    let communicator = double.communicator(LONG).unwrap();
    let before = double.log().len();
    let wrong = Operation::AllGather { send: elements(2), receive: elements(3) };
    let error = communicator.enqueue(&[all_reduce(1), wrong], Stream::DEFAULT).err().unwrap();
    let words = "ncclAllGather: 2 elements on one side need 2 × 2 on the other, not 3";
    assert_eq!(error.to_string(), words);
    assert!(!error.is_fatal());
    assert!(communicator.enqueue(&[], Stream::DEFAULT).is_err());
    assert!(communicator.shrink(&[0], Shrink::AtRest).is_err());
    assert!(communicator.shrink(&[2], Shrink::AtRest).is_err());
    assert!(communicator.grow(2, None).is_err());
    assert_eq!(double.log().len(), before);
    communicator.check().unwrap();
}

#[test]
fn a_rank_outside_of_the_group_is_refused() {
    let library = Double::new(&[]).open();
    let id = UniqueId::from_bytes([0; UniqueId::SIZE]);
    let error = Communicator::new(&library, 2, 2, &[id], Options::default()).unwrap_err();
    assert_eq!(error.to_string(), "Communicator::new: there is no rank 2 among 2");
    assert!(matches!(Communicator::new(&library, 0, 2, &[], Options::default()), Err(Error::Usage { .. })));
}

#[test]
fn an_unknown_code_is_an_error_that_stays() {
    let double = Double::new(&[("FAIL", &text("ncclAllReduce")), ("CODE", &42)]);
    let communicator = double.communicator(LONG).unwrap();
    let enqueue =
        || communicator.enqueue(&[all_reduce(1)], Stream::DEFAULT).and_then(|pending| pending.wait());
    let error = enqueue().unwrap_err();
    assert!(matches!(error, Error::Failed { code: ResultCode(42), .. }), "{error:?}");
    let words = "ncclAllReduce failed with result code 42, which is unknown here; NCCL's last error: the last error of the double";
    assert_eq!(error.to_string(), words);
    let calls = double.log().len();
    let again = enqueue().unwrap_err();
    assert!(matches!(again, Error::Failing { .. }), "{again:?}");
    assert!(again.to_string().contains("result code 42"), "{again}");
    assert_eq!(double.log().len(), calls, "nothing is called after a fatal error");
}

#[test]
fn a_failed_call_in_a_group_still_closes_the_group() {
    let double = Double::new(&[("FAIL", &text("ncclSend")), ("CODE", &3)]);
    let communicator = double.communicator(LONG).unwrap();
    let send = Operation::Send { send: elements(1), peer: 1 };
    let receive = Operation::Receive { receive: elements(1), peer: 1 };
    let error = communicator.enqueue(&[send, receive], Stream::DEFAULT).unwrap().wait().unwrap_err();
    assert!(error.to_string().starts_with("ncclSend failed with ncclInternalError (3): words of"), "{error}");
    assert_eq!(double.log()[5..], ["ncclGroupStart", "ncclSend count=1 argument=1", "ncclGroupEnd"]);
}

#[test]
fn an_error_in_the_background_is_found_and_the_communicator_aborted() {
    let double = Double::new(&[("POLLS", &2), ("ENDS", &6)]);
    let error = double.communicator(LONG).unwrap_err();
    assert!(matches!(error, Error::Failed { code: ResultCode::REMOTE_ERROR, .. }), "{error:?}");
    double.wait_for("ncclCommAbort");
}

#[test]
fn ranks_that_do_not_come_are_waited_for_until_the_deadline() {
    let double = Double::new(&[("POLLS", &-1)]);
    let error = double.communicator(SHORT).unwrap_err();
    assert!(matches!(error, Error::TimedOut { function: "ncclCommInitRankConfig", .. }), "{error:?}");
    double.wait_for("ncclCommAbort");
}

#[test]
fn a_call_that_never_returns_costs_its_thread_alone() {
    let double = Double::new(&[("HANG", &text("ncclAllReduce"))]);
    let communicator = double.communicator(SHORT).unwrap();
    let pending = communicator.enqueue(&[all_reduce(1)], Stream::DEFAULT).unwrap();
    let error = pending.wait().unwrap_err();
    assert!(matches!(error, Error::Stuck { function: "ncclAllReduce", .. }), "{error:?}");
    // Not aborted while a thread is inside: that is what NCCL forbids, and the log would say so.
    let error = communicator.abort("a peer is gone", SHORT).unwrap_err();
    assert!(matches!(error, Error::Stuck { function: "ncclAllReduce", .. }), "{error:?}");
    assert!(!double.log().iter().any(|line| line == "ncclCommAbort"));
    let after = communicator.shrink(&[1], Shrink::EndingOperations).unwrap_err();
    assert!(matches!(after, Error::Ended { .. }), "{after:?}");
    double.release();
    double.wait_for("ncclCommAbort");
}

#[test]
fn an_initialisation_that_comes_back_too_late_is_aborted() {
    let double = Double::new(&[("HANG", &text("ncclCommInitRankConfig"))]);
    let error = double.communicator(SHORT).unwrap_err();
    assert!(matches!(error, Error::Stuck { function: "ncclCommInitRankConfig", .. }), "{error:?}");
    double.release();
    double.wait_for("ncclCommAbort");
}

#[test]
fn an_abort_that_hangs_is_given_up() {
    let double = Double::new(&[("HANG", &text("ncclCommAbort"))]);
    let communicator = double.communicator(LONG).unwrap();
    let error = communicator.abort("the epoch has changed", SHORT).unwrap_err();
    assert!(matches!(error, Error::Stuck { function: "ncclCommAbort", .. }), "{error:?}");
    assert!(error.to_string().ends_with("its thread is given up: end this process"), "{error}");
    // Dropping waits for nobody: this test would not end.
    drop(communicator);
    double.release();
}

#[test]
fn an_abort_from_another_thread_ends_a_wait_with_its_reason() {
    let double = Double::new(&[("OPERATION_POLLS", &-1)]);
    let communicator = Arc::new(double.communicator(LONG).unwrap());
    let pending = communicator.enqueue(&[all_reduce(1)], Stream::DEFAULT).unwrap();
    let watchdog = Arc::clone(&communicator);
    let watchdog = std::thread::spawn(move || watchdog.abort("rank 1 is gone", LONG));
    let error = pending.wait().unwrap_err();
    assert_eq!(error.to_string(), "the communicator has ended: rank 1 is gone");
    watchdog.join().unwrap().unwrap();
    let error = communicator.check().unwrap_err();
    assert_eq!(error.to_string(), "the communicator has ended: rank 1 is gone");
    communicator.abort("again", LONG).unwrap();
    assert_eq!(double.log().iter().filter(|line| *line == "ncclCommAbort").count(), 1);
}

#[test]
fn dropping_aborts_and_finishing_destroys() {
    let double = Double::new(&[]);
    drop(double.communicator(LONG).unwrap());
    double.wait_for("ncclCommAbort");
    let double = Double::new(&[]);
    double.communicator(LONG).unwrap().finish().unwrap();
    assert_eq!(double.log()[5..], ["ncclCommFinalize", "ncclCommDestroy"]);
}

#[test]
fn parts_get_communicators_whose_address_nccl_tells_late() {
    let double = Double::new(&[("POLLS", &2)]);
    let communicator = double.communicator(LONG).unwrap();
    let part = communicator.split(Some(7), 1).unwrap().expect("this rank has a color");
    assert_eq!(part.rank(), 1);
    part.enqueue(&[all_reduce(1)], Stream::DEFAULT).unwrap().wait().unwrap();
    assert!(communicator.split(None, 0).unwrap().is_none());
    part.finish().unwrap();
    communicator.finish().unwrap();
    let log = double.log();
    assert!(log.contains(&"ncclCommSplit color=7 key=1".to_owned()), "{log:#?}");
    assert!(log.contains(&"ncclCommSplit color=-1 key=0".to_owned()), "{log:#?}");
}

#[test]
fn survivors_shrink_after_a_failure_that_forbids_all_else() {
    let double = Double::new(&[("FAIL", &text("ncclAllReduce")), ("CODE", &6)]);
    let communicator = double.communicator(LONG).unwrap();
    communicator.enqueue(&[all_reduce(1)], Stream::DEFAULT).unwrap().wait().unwrap_err();
    let error = communicator.shrink(&[1], Shrink::AtRest).unwrap_err();
    assert!(matches!(error, Error::Failing { .. }), "{error:?}");
    let survivors = communicator.shrink(&[1], Shrink::EndingOperations).unwrap();
    assert_eq!(survivors.world_size(), 1);
    assert!(double.log().contains(&"ncclCommShrink without=1 flags=1".to_owned()));
    survivors.finish().unwrap();
}

#[test]
fn members_and_newcomers_grow_a_communicator() {
    let double = Double::new(&[("VERSION", &22902), ("POLLS", &1)]);
    let communicator = double.communicator(LONG).unwrap();
    let id = communicator.growth_id().unwrap();
    let grown = communicator.grow(3, Some(id)).unwrap();
    assert_eq!((grown.rank(), grown.world_size()), (0, 3));
    let options = Options { timeout: LONG, ..Options::default() };
    let newcomer = Communicator::join(&double.open(), 2, 3, id, options).unwrap();
    assert_eq!((newcomer.rank(), newcomer.world_size()), (2, 3));
    let log = double.log();
    assert!(log.contains(&"ncclCommGrow size=3 rank=-1".to_owned()), "{log:#?}");
    assert!(log.contains(&"ncclCommGrow size=3 rank=2".to_owned()), "{log:#?}");
}

#[test]
fn several_ids_start_a_group_by_several_roots() {
    let double = Double::new(&[]);
    let library = double.open();
    let ids = [1, 2].map(|byte| UniqueId::from_bytes([byte; UniqueId::SIZE]));
    let options = Options { timeout: LONG, ..Options::default() };
    Communicator::new(&library, 0, 2, &ids, options).unwrap().finish().unwrap();
    assert_eq!(double.log()[0], "ncclCommInitRankScalable ids=2 last=2");
}

#[test]
fn a_revoked_communicator_is_left_without_a_finalize() {
    let double = Double::new(&[("POLLS", &1)]);
    let communicator = double.communicator(LONG).unwrap();
    communicator.revoke().unwrap();
    let error = communicator.enqueue(&[all_reduce(1)], Stream::DEFAULT).err().unwrap();
    assert!(matches!(error, Error::Usage { .. }), "{error:?}");
    communicator.split(Some(0), 0).unwrap().unwrap().finish().unwrap();
    communicator.finish().unwrap();
    let log = double.log();
    assert_eq!(log[5..7], ["ncclCommRevoke flags=0", "ncclCommSplit color=0 key=0"]);
    assert_eq!(log[log.len() - 1], "ncclCommDestroy");
    assert_eq!(log.iter().filter(|line| *line == "ncclCommFinalize").count(), 1, "the part's alone");
}

#[test]
fn the_thread_is_prepared_before_nccl_is_called_and_again_for_a_part() {
    let double = Double::new(&[]);
    let library = double.open();
    let ids = [library.unique_id().unwrap()];
    let prepared = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&prepared);
    let prepare = Arc::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    let options = Options { timeout: LONG, prepare: Some(prepare), ..Options::default() };
    let communicator = Communicator::new(&library, 0, 2, &ids, options).unwrap();
    let _part = communicator.split(Some(0), 0).unwrap();
    assert_eq!(prepared.load(Ordering::Relaxed), 2);

    let before = double.log().len();
    let refused = Arc::new(|| Err("device 9: no such device".to_owned()));
    let options = Options { timeout: LONG, prepare: Some(refused), ..Options::default() };
    let error = Communicator::new(&library, 0, 2, &ids, options).unwrap_err();
    let words = "cannot prepare the thread of a communicator: device 9: no such device";
    assert_eq!(error.to_string(), words);
    assert_eq!(double.log().len(), before);
}
