//! Layer C: NVIDIA's own libnccl, as PyPI has it (`nvidia-nccl-cu13`), on a machine without GPU and driver.
//!
//! What this proves: the production search finds the wheel and the loader loads it; version, unique ids and error texts
//! are what NCCL says; each function is there since the version that our table claims; struct layouts and constants are
//! those of its header, by a C compiler. What it does not: anything that takes a GPU. No communicator is ever formed.
//!
//! Without an NCCL one line says so and every test counts as ignored. `cargo xtask nccl` and CI provide the wheel;
//! `PACELINE_NCCL_PATH=…/nvidia/nccl/lib` runs them on another.

#![allow(clippy::print_stderr, reason = "says why tests are skipped")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use paceline_nccl::{Communicator, Error, Library, Options, Origin, ResultCode, Search, Version, layout};

/// Enough of CUDA's headers for NCCL's to compile: it only passes these types on.
const CUDA_RUNTIME: &str = "#pragma once\n#define CUDART_VERSION 13000\n\
    typedef struct CUstream_st *cudaStream_t;\ntypedef struct CUevent_st *cudaEvent_t;\n";

/// The version whose header has the configuration that we pass; older headers lack its last fields.
const SHAPE: Version = Version::new(2, 28, 0);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let library = match Library::open(&Search::from_environment()) {
        Ok(library) => Some(library),
        Err(error @ Error::NotFound { .. }) => {
            eprintln!("the tests on the real NCCL are skipped (`cargo xtask nccl` installs one): {error}");
            None
        }
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let header = library.as_deref().and_then(header);
    if library.is_some() && header.is_none() {
        eprintln!(
            "the comparison with nccl.h is skipped: there is none beside the library, or it is older than {SHAPE}"
        );
    }
    let has_driver = Path::new("/dev/nvidiactl").exists();
    if has_driver {
        eprintln!("the test of a machine without a driver is skipped: this one has a driver");
    }
    let trial = |name: &str, runs: bool, test: fn(&Arc<Library>)| {
        let library = library.clone();
        let runner = move || {
            let library = library
                .as_ref()
                .ok_or_else(|| Failed::from("there is no NCCL: run without --include-ignored"))?;
            test(library);
            Ok(())
        };
        Trial::test(name, runner).with_ignored_flag(!runs)
    };
    let found = library.is_some();
    let trials = vec![
        trial("it_is_a_version_that_we_know", found, it_is_a_version_that_we_know),
        trial("functions_are_there_since_the_versions_of_our_table", found, functions_are_there_in_time),
        trial("unique_ids_need_no_gpu_and_differ", found, unique_ids_need_no_gpu_and_differ),
        trial("a_rank_outside_of_the_group_is_refused", found, a_wrong_rank_is_refused),
        trial("without_a_driver_a_communicator_fails_in_nccls_own_words", found && !has_driver, no_driver),
        trial(
            "structs_and_constants_are_those_of_the_header",
            header.is_some(),
            layouts_are_those_of_the_header,
        ),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn it_is_a_version_that_we_know(library: &Arc<Library>) {
    assert!(library.version() >= Version::OLDEST, "{library:?}");
    assert_ne!(*library.origin(), Origin::Loaded, "nobody in this process has loaded one before");
}

fn functions_are_there_in_time(library: &Arc<Library>) {
    let missing = library.missing();
    let late: Vec<_> = missing.iter().filter(|(_, since)| *since <= library.version()).collect();
    assert!(late.is_empty(), "NCCL {} lacks {late:?}", library.version());
    // The table must not claim that a function is newer than it is either.
    let grow = missing.iter().any(|(name, _)| *name == "ncclCommGrow");
    assert_eq!(grow, library.version() < Version::new(2, 29, 2), "{missing:?}");
}

fn unique_ids_need_no_gpu_and_differ(library: &Arc<Library>) {
    let [one, two] =
        [library.unique_id(), library.unique_id()].map(|id| id.expect("no GPU is needed for it"));
    assert_ne!(one, two);
}

fn a_wrong_rank_is_refused(library: &Arc<Library>) {
    let id = library.unique_id().unwrap();
    let error = Communicator::new(library, 1, 1, &[id], Options::default()).unwrap_err();
    assert!(matches!(error, Error::Usage { .. }), "{error:?}");
}

fn no_driver(library: &Arc<Library>) {
    let id = library.unique_id().unwrap();
    let options = Options { timeout: Duration::from_secs(60), ..Options::default() };
    let error = Communicator::new(library, 0, 1, &[id], options).unwrap_err();
    let Error::Failed { function, code, words, last } = &error else { panic!("{error:?}") };
    assert_eq!((*function, *code), ("ncclCommInitRankConfig", ResultCode::UNHANDLED_CUDA_ERROR));
    assert!(words.contains("unhandled cuda error"), "{error}");
    assert!(last.contains("CUDA driver version is insufficient for CUDA runtime version"), "{error}");
    assert!(error.is_fatal());
}

fn layouts_are_those_of_the_header(library: &Arc<Library>) {
    let include = header(library).expect("the trial is not run without");
    let expectations = layout::expectations();
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in [
        ("cuda_runtime.h", CUDA_RUNTIME),
        ("cuda_fp16.h", ""),
        ("cuda_bf16.h", ""),
        ("probe.c", &probe(&expectations)),
    ] {
        fs::write(folder.path().join(name), content).unwrap();
    }
    let program = folder.path().join("probe");
    let mut compiler = Command::new("cc");
    compiler.arg("-I").arg(folder.path()).arg("-I").arg(&include).arg("-o").arg(&program);
    let compiled = compiler.arg(folder.path().join("probe.c")).output().expect("a C compiler named cc");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let printed = String::from_utf8(Command::new(&program).output().unwrap().stdout).unwrap();
    let mut values = printed.lines().map(|line| line.parse::<i64>().unwrap());

    let code = i32::try_from(values.next().unwrap()).unwrap();
    assert_eq!(Version::from_code(code), Some(library.version()), "the header belongs to the library");
    let size = usize::try_from(values.next().unwrap()).unwrap();
    if library.version() < Version::new(2, 29, 0) {
        assert_eq!(size, layout::CONFIG_SIZE);
    } else {
        assert!(size >= layout::CONFIG_SIZE, "a configuration only ever grows: {size}");
    }
    let found: Vec<_> = expectations.iter().map(|(name, _)| name.clone()).zip(values).collect();
    assert_eq!(found, expectations);
}

/// A C program that prints the version, the size of the configuration, and each expression's value.
fn probe(expectations: &[(String, i64)]) -> String {
    let print = |expression: &str| format!("    printf(\"%lld\\n\", (long long)({expression}));\n");
    let mut source =
        "#include <stddef.h>\n#include <stdio.h>\n#include <nccl.h>\nint main(void) {\n".to_owned();
    source += "    ncclConfig_t initial = NCCL_CONFIG_INITIALIZER;\n";
    source += &print("NCCL_VERSION_CODE");
    source += &print("sizeof initial");
    source.extend(expectations.iter().map(|(expression, _)| print(expression)));
    source + "    return 0;\n}\n"
}

/// The folder of the header that belongs to the library, if it is not too old to have our configuration.
fn header(library: &Library) -> Option<PathBuf> {
    let Origin::File(file) = library.origin() else { return None };
    let include = file.parent()?.parent()?.join("include");
    (include.join("nccl.h").is_file() && library.version() >= SHAPE).then_some(include)
}
