//! torchrun's flags and variables on the command line of `paceline run`.

use std::ffi::OsString;
use std::time::Duration;

use crate::cli::{Changes, Request, RunArgs, Seating, Variables, parse};
use crate::console::Stream;
use crate::error::Error;
use crate::pod::Surroundings;
use crate::torchrun::{self, FailureCode, Streams};

fn parse_line(line: &str) -> Result<Request, Error> {
    parse(line.split_whitespace().map(OsString::from), Variables::default())
}

fn run_args(line: &str) -> RunArgs {
    match parse_line(line) {
        Ok(Request::Run(args)) => *args,
        other => panic!("{line}: {other:?}"),
    }
}

/// The program and its arguments, in one line.
fn command(line: &str) -> String {
    let args = run_args(line);
    let words = std::iter::once(&args.program).chain(&args.program_args);
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[test]
fn what_follows_the_program_is_its_own() {
    let line = "paceline run -n 4 -- train -n 9 --help -- x";
    assert_eq!((run_args(line).ranks, command(line).as_str()), (4, "train -n 9 --help -- x"));
    let line = "paceline run --nproc_per_node=4 train.py -n 9 --help -- x";
    assert_eq!((run_args(line).ranks, command(line).as_str()), (4, "python3 -u train.py -n 9 --help -- x"));
}

#[test]
fn without_dashes_python_runs_a_script() {
    for (line, expected) in [
        ("run train.py --lr 1", "python3 -u train.py --lr 1"),
        ("run -m pkg.train --lr 1", "python3 -u -m pkg.train --lr 1"),
        ("run --no_python train --lr 1", "train --lr 1"),
        ("run --run-path --no-python train.py", "python3 -u train.py"),
        ("run -m -- train x", "train x"),
    ] {
        assert_eq!(command(&format!("paceline {line}")), expected, "{line}");
    }
    let script = |line: &str| run_args(&format!("paceline {line}")).torchrun.script;
    assert_eq!(script("run train.py"), Some("train.py".into()));
    for line in ["run -m train", "run --no-python train", "run -- train"] {
        assert_eq!(script(line), None, "{line}");
    }
    let error = parse_line("paceline run -m --no-python train").expect_err("both").to_string();
    assert!(error.contains("exclude each other"), "{error}");
}

#[test]
fn a_flag_wins_over_its_variable_and_that_over_the_default() {
    let asked = |flags: &str, pet: &[(&str, &str)]| {
        let line = format!("paceline run {flags} train.py");
        let pet = pet.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
        let torchrun = torchrun::Variables { pet, ..torchrun::Variables::default() };
        let variables = Variables { torchrun, ..Variables::default() };
        match parse(line.split_whitespace().map(OsString::from), variables) {
            Ok(Request::Run(args)) => Ok((args.ranks, args.torchrun.role)),
            Err(error) => Err(error.to_string()),
            Ok(other) => panic!("{other:?}"),
        }
    };
    let got = |ranks, role: &str| Ok((ranks, role.to_owned()));
    assert_eq!(asked("", &[]), got(1, "default"));
    let pet = [("PET_NPROC_PER_NODE", "3"), ("PET_ROLE", "trainer")];
    assert_eq!(asked("", &pet), got(3, "trainer"));
    assert_eq!(asked("-n 2", &pet), got(2, "trainer"));
    assert_eq!(asked("-n 2 -n 5", &[]), got(5, "default"), "the last one counts, as for torchrun");
    let error = asked("-n 2", &[("PET_NPROC_PER_NODE", "many")]).expect_err("nonsense");
    assert!(error.starts_with("PET_NPROC_PER_NODE: invalid value 'many'"), "{error}");
}

#[test]
fn a_flag_wins_over_its_variable_and_that_over_the_pods_own() {
    let rdzv = |flags: &str, pet: &[(&str, &str)]| {
        let config =
            r#"{"cluster":{"chief":["chief:1"],"worker":["worker:1"]},"task":{"type":"worker","index":0}}"#;
        let around = format!(
            "TF_CONFIG={config}\n{}",
            pet.iter().map(|(name, value)| format!("{name}={value}\n")).collect::<String>()
        );
        let surroundings = Surroundings::of("h", &around);
        let pet = pet.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
        let torchrun = torchrun::Variables { pet, ..torchrun::Variables::default() };
        let variables = Variables { torchrun, surroundings, ..Variables::default() };
        let line = format!("paceline run --job-secret s {flags} train.py");
        match parse(line.split_whitespace().map(OsString::from), variables) {
            Ok(Request::Run(args)) => {
                let nodes = args.nodes.as_ref().map(|nodes| nodes.count.max);
                (args.node(), nodes, args.rendezvous.host.clone())
            }
            other => panic!("{other:?}"),
        }
    };
    let got = |node, nodes, host: &str| (node, nodes, host.to_owned());
    assert_eq!(rdzv("", &[]), got(1, Some(2), "chief"));
    let pet = [("PET_NNODES", "3"), ("PET_MASTER_ADDR", "m")];
    assert_eq!(rdzv("", &pet), got(1, Some(3), "m"));
    assert_eq!(rdzv("--nnodes 4 --node-rank 2", &pet), got(2, Some(4), "m"));
    assert_eq!(rdzv("--master-addr other", &[]), got(1, Some(2), "other"));
    assert_eq!(rdzv("--rdzv-endpoint other", &pet), got(1, Some(3), "other"));
    for (flags, pet) in [("--standalone", &[][..]), ("", &[("PET_STANDALONE", "1")])] {
        assert_eq!(rdzv(flags, pet), got(0, None, "127.0.0.1"));
    }
}

#[test]
fn machines_that_agree_on_their_numbers_need_none() {
    let several = "--nnodes 2 --rdzv-endpoint h:1 --job-secret s";
    let nodes = |flags: &str| run_args(&format!("paceline run {several} {flags} x.py")).nodes.expect("two");
    let any = |is_host| Seating::Any { is_host };
    assert_eq!(nodes("--rdzv-backend c10d").seating, any(None));
    assert_eq!(nodes("--rdzv_backend=c10d --rdzv_conf is_host=0").seating, any(Some(false)));
    let given = nodes("--rdzv-backend c10d --node-rank 1");
    assert_eq!((given.rank, given.seating), (1, Seating::Given));
    assert_eq!(given.changes, Changes::None);
    let error = parse_line("paceline run --rdzv-backend etcd x.py").expect_err("refused").to_string();
    assert!(error.contains("there are static and c10d"), "{error}");
}

#[test]
fn a_number_of_machines_that_may_change_is_voted_on_or_starts_all_ranks_again() {
    let changes = |flags: &str| {
        let line = format!("paceline run --nnodes 2:4 --rdzv-endpoint h:1 --job-secret s {flags} x.py");
        run_args(&line).nodes.expect("several").changes
    };
    let start_again = |seconds| Changes::StartAgain { last_call: Duration::from_secs(seconds) };
    assert_eq!(changes("--node-rank 1"), Changes::Vote);
    assert_eq!(changes("--rdzv-backend c10d"), start_again(30));
    assert_eq!(changes("--rdzv-backend c10d --node-rank 1 --rdzv-conf last_call_timeout=2"), start_again(2));
}

#[test]
fn torchruns_static_nodes_meet_at_the_programs_address() {
    let args = run_args(
        "paceline run --nnodes 2 --node-rank 1 --master-addr [fd00::1] --master-port 5 --job-secret s x.py",
    );
    assert_eq!(
        (args.rendezvous.to_string().as_str(), args.torchrun.master_port),
        ("[fd00::1]:29400", Some(5))
    );
    let args = run_args("paceline run --standalone --rdzv-endpoint h:1 --rdzv-id x --master-port 5 x.py");
    assert_eq!((args.nodes, args.rendezvous_given, args.torchrun.master_port), (None, false, None));
    assert_ne!(args.torchrun.run_id, "x");
}

#[test]
fn plug_ins_of_python_are_refused_with_what_there_is_instead() {
    for (flags, expected) in [
        ("--logs-specs x", "--log-dir"),
        ("--event-log-handler console", "PACELINE_LOG=info"),
        ("--numa-binding node", "--bind auto"),
        ("--start-method x", "'x'"),
        ("--standalone --nnodes 2", "--standalone is a job on this machine"),
    ] {
        let error = parse_line(&format!("paceline run {flags} x.py")).expect_err(flags).to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
    }
    run_args("paceline run --event-log-handler null --start-method fork --monitor-interval 5 x.py");
}

#[test]
fn streams_are_chosen_for_all_ranks_or_for_each() {
    let out = Streams::All(1);
    assert_eq!([Stream::Out, Stream::Err].map(|stream| out.has(7, stream)), [true, false]);
    let each = Streams::Of(vec![(0, 2), (12, 3)]);
    let has = |rank| [Stream::Out, Stream::Err].map(|stream| each.has(rank, stream));
    assert_eq!([0, 1, 12].map(has), [[false, true], [false, false], [true, true]]);
    assert!(each.any() && !Streams::default().any() && !Streams::Of(vec![(0, 0)]).any());
}

#[test]
fn torchruns_exit_code_is_one_for_every_failure() {
    let codes = |code: FailureCode| [0, 3, 137].map(|ended| code.of(ended));
    assert_eq!((codes(FailureCode::Child), codes(FailureCode::Torchrun)), ([0, 3, 137], [0, 1, 1]));
}
