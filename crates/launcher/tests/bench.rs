//! `paceline bench` as its users meet it: the real binary, real ranks, the tables and the document that scripts read.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Runs `paceline bench` with these arguments.
fn bench(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PACELINE_")) {
        command.env_remove(name);
    }
    command.arg("bench").args(line.split_whitespace()).stdin(Stdio::null()).output().expect("started")
}

/// What it prints when all is well.
fn stdout(line: &str) -> String {
    let output = bench(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{line}");
    String::from_utf8(output.stdout).expect("text")
}

/// The rows of a table, as fields.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let rows = text.lines().filter(|line| !line.starts_with('#'));
    rows.map(|line| line.split_whitespace().collect()).collect()
}

#[test]
fn all_reduce_prints_the_columns_of_nccl_tests_and_every_element_is_right() {
    let text = stdout("all_reduce --ranks 2 -b 4 -e 64K");
    let rows = rows(&text);
    assert_eq!(rows.len(), 15, "4 B to 64 KiB by factors of two:\n{text}");
    for (row, power) in rows.iter().zip(2..) {
        assert_eq!(row.len(), 13, "{row:?}");
        let (size, count) = ((1 << power).to_string(), (1 << (power - 2)).to_string());
        assert_eq!(row[..5], [size.as_str(), count.as_str(), "f32", "sum", "-1"]);
        for cell in [&row[5..9], &row[9..13]] {
            let number = |at: usize| cell[at].parse::<f64>().expect("a number");
            assert!(number(0) > 0.0, "{row:?}");
            // The columns have two decimals: algbw is size / time, and for two ranks busbw is algbw.
            assert!((number(1) - f64::from(1 << power) / number(0) / 1e3).abs() < 0.01, "{row:?}");
            assert!((number(2) - number(1)).abs() < 0.01, "{row:?}");
            assert_eq!(cell[3], "0", "#wrong of {row:?}");
        }
    }
    let head: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
    assert!(head[0].contains("bench all_reduce: 2 ranks on "), "{text}");
    let names = "# size count type redop root time algbw busbw #wrong time algbw busbw #wrong";
    assert!(head.iter().any(|line| line.split_whitespace().eq(names.split(' '))), "{text}");
    assert!(text.contains("\n# Out of bounds values : 0 OK\n# Avg bus bandwidth : "), "{text}");
}

#[test]
fn ranks_are_started_through_a_shell_command_where_one_is_given() {
    let through = r#"test "$PACELINE_RANK" = 1 && echo "here is rank $PACELINE_RANK" >&2; exec "$@""#;
    let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
    command.args(["bench", "barrier", "-n", "3", "--rdzv-endpoint", "127.0.0.2:0", "--through", through]);
    let output = command.stdin(Stdio::null()).output().expect("started");
    let (table, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && table.contains("# Out of bounds values : 0 OK"), "{table}{log}");
    assert_eq!(log.matches("here is rank 1").count(), 1, "{log}");
}

#[test]
fn several_numbers_of_ranks_are_compared_at_the_end() {
    let text = stdout("all_gather --ranks 1..3 -b 12 -e 12 -n 3 -d int32");
    assert_eq!(text.matches("# Out of bounds values : 0 OK").count(), 3, "{text}");
    let (_, scaling) = text.split_once("# Scaling of all_gather: time(us)").expect("a table");
    assert!(
        scaling.lines().any(|line| line.split_whitespace().eq(["#", "size(B)", "n=1", "n=2", "n=3"])),
        "{text}"
    );
    assert_eq!(rows(scaling)[0].len(), 4, "{text}");
}

#[test]
fn the_document_has_every_number_and_the_conditions() {
    let text = stdout("reduce_scatter --ranks 2 -b 8K -e 16K --json -o max");
    let document: Value = serde_json::from_str(&text).expect("one document");
    assert_eq!(document["parameters"]["op"], "max");
    assert!(document["machine"]["cpus"].as_u64().expect("a number") > 0);
    let run = &document["runs"][0];
    assert_eq!((&run["ranks"], &run["out_of_bounds"]), (&2.into(), &0.into()));
    let rows = run["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2);
    let cell = &rows[0]["out_of_place"];
    let number = |name: &str| cell[name].as_f64().unwrap_or_else(|| panic!("{name} of {cell}"));
    assert!(number("min_us") <= number("p50_us") && number("p50_us") <= number("p99_us"), "{cell}");
    assert!(number("fastest_rank_us") <= number("time_us"), "{cell}");
    assert!((number("busbw_gb_s") / number("algbw_gb_s") - 0.5).abs() < 1e-9, "{cell}");
    assert!(rows[0]["in_place"]["time_us"].as_f64().expect("a number") > 0.0, "{}", rows[0]);
    assert!(!rows[0]["schedule"]["name"].as_str().expect("a name").is_empty());
}

#[test]
fn osu_has_its_own_loop_and_columns() {
    let text = stdout("broadcast --ranks 2 --osu -b 8K -e 16K -r 1");
    let iterations: Vec<&str> = rows(&text).iter().map(|row| row[4]).collect();
    assert_eq!(iterations, ["1000", "100"]);
    assert!(text.contains("# Size          Avg Latency(us)    Min Latency(us)"), "{text}");
}

#[test]
fn what_has_a_root_or_no_call_in_place_says_so() {
    let text = stdout("gather --ranks 3 -b 12 -e 12 -n 2 -r 2");
    let row = &rows(&text)[0];
    assert_eq!(row[..5], ["12", "1", "f32", "none", "2"], "{text}");
    assert_eq!(row[9..], ["N/A"; 4], "{text}");
    let text = stdout("alltoall --ranks 2 --json -b 8 -e 8 -n 2");
    let document: Value = serde_json::from_str(&text).expect("one document");
    let row = &document["runs"][0]["rows"][0];
    assert!(row["in_place"].is_null(), "the communicator has no such call");
    assert_eq!(document["runs"][0]["out_of_bounds"], 0);
}

#[test]
fn the_schedules_are_explained_without_measuring() {
    let text = stdout("broadcast --ranks 3 --explain -b 512K -e 1M");
    let schedules: Vec<&str> = rows(&text).iter().map(|row| row[2]).collect();
    assert_eq!(schedules.len(), 2, "{text}");
    assert!(text.lines().all(|line| line.starts_with('#') || line.split_whitespace().count() > 4), "{text}");
}

#[test]
fn a_plot_is_a_picture_with_a_line_for_each_number_of_ranks() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("plot.svg");
    let output = bench(&format!("all_reduce --ranks 1..2 -b 4 -e 1K -n 2 --plot {}", file.display()));
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(said, format!("paceline: the plot is in {}\n", file.display()));
    let svg = std::fs::read_to_string(&file).expect("written");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("<polyline").count(), 4, "two panels with two lines");
}

#[test]
fn what_cannot_be_measured_is_refused_in_one_line() {
    for (line, reason) in [
        ("", "nothing to measure; say for instance: paceline bench all_reduce --ranks 2"),
        (
            "all_redoce",
            "invalid value 'all_redoce' for '<COLLECTIVE>': choose one of all_reduce, reduce_scatter, all_gather, \
             broadcast, reduce, gather, scatter, all_to_all, sendrecv, barrier",
        ),
        ("all_reduce --size 4", "unknown flag --size; see paceline bench --help"),
        (
            "all_reduce -b 4X",
            "invalid value '4X' for '--minbytes <SIZE>': give a number of bytes from 1 on, such as 4, 64K, 16M or 1G",
        ),
        ("sendrecv --ranks 1..4", "sendrecv needs at least 2 ranks"),
        ("broadcast -r 2", "root 2 does not exist; the ranks are 0 to 1"),
    ] {
        let output = bench(line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), said), (Some(2), format!("paceline: {reason}\n")), "{line}");
        assert!(output.stdout.is_empty(), "{line}");
    }
}

#[test]
fn a_rank_that_fails_ends_the_measurement_with_its_reason() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
    command.args(["bench", "all_reduce", "--ranks", "2"]).env("PACELINE_ALGORITHM", "nonsense");
    let output = command.stdin(Stdio::null()).output().expect("started");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("PACELINE_ALGORITHM"), "{said}");
}
