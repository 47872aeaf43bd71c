//! Layer B, in a process of its own: the copy of NCCL that a process already has is the one that is used.

use std::process::Command;

use paceline_nccl::{Library, Origin, Search, Version};

/// One test, because what is loaded is loaded for the whole process.
#[test]
fn a_copy_that_is_loaded_already_comes_before_all_others() {
    let folder = tempfile::tempdir().unwrap();
    let build = |name: &str, version: i32| {
        let file = folder.path().join(name);
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-w", "-Wl,-soname,libnccl.so.2", "-o"]).arg(&file);
        compiler.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/double/nccl.c"));
        compiler.arg(format!("-DLOG={:?}", folder.path().join("log"))).arg(format!("-DVERSION={version}"));
        assert!(compiler.status().expect("a C compiler named cc").success());
        file
    };
    let (first, second) = (build("torchs.so", 22705), build("ours.so", 22809));

    let search = Search { loaded: true, ..Search::only(&second) };
    // As torch does it: by a path, of a library that says that it is libnccl.so.2.
    let alone = Library::open(&Search::only(&first)).unwrap();
    assert_eq!(alone.version(), Version::new(2, 27, 5));
    let shared = Library::open(&search).unwrap();
    assert_eq!((shared.origin(), shared.version()), (&Origin::Loaded, Version::new(2, 27, 5)));
    let separate = Library::open(&Search { loaded: false, ..search }).unwrap();
    assert_eq!((separate.origin(), separate.version()), (&Origin::File(second), Version::new(2, 28, 9)));
}
