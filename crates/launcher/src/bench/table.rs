//! The tables, as text: nccl-tests' columns, OSU's columns, the schedules, and how times change with the ranks.
//!
//! All functions are pure; a row is printed as soon as it is measured, so columns have fixed widths.

use super::args::{BenchArgs, Output, Timing};
use super::machine::Machine;
use super::report::{Cell, Row, Run};

/// What stands before the rows of one job: the conditions, then the columns.
pub fn head(args: &BenchArgs, ranks: u32, machine: &Machine) -> String {
    let per_cpu = f64::from(ranks) / machine.cpus as f64;
    let load: Vec<String> = machine.load_average.iter().map(|load| format!("{load:.2}")).collect();
    let noun = if ranks == 1 { "rank" } else { "ranks" };
    let mut text = format!(
        "# paceline {} bench {}: {ranks} {noun} on {} CPUs ({per_cpu:.1} per CPU)\n\
         # {}, Linux {}, huge pages {}, load average {}\n",
        env!("CARGO_PKG_VERSION"),
        args.collective,
        machine.cpus,
        machine.cpu_model,
        machine.kernel,
        machine.transparent_hugepages,
        load.join(" "),
    );
    if !machine.settings.is_empty() {
        text += &format!("# {}\n", machine.settings.join(" "));
    }
    text += &match (args.output, args.timing) {
        (Output::Explain, _) => explained_columns(),
        (_, Timing::BackToBack) => nccl_columns(args),
        (_, Timing::Separated) => osu_columns(),
    };
    text
}

/// One row under [`head`].
pub fn row(args: &BenchArgs, row: &Row) -> String {
    match (args.output, args.timing) {
        (Output::Explain, _) => explained_row(row),
        (_, Timing::BackToBack) => nccl_row(args, row),
        (_, Timing::Separated) => osu_row(row),
    }
}

/// nccl-tests' last two lines.
pub fn foot(run: &Run) -> String {
    let verdict = match run.wrong() {
        None => "not checked".to_owned(),
        Some(0) => "0 OK".to_owned(),
        Some(wrong) => format!("{wrong} FAILED"),
    };
    format!("# Out of bounds values : {verdict}\n# Avg bus bandwidth : {:.6}\n#\n", run.average_busbw())
}

/// What the ranks are connected by, as they say when they are, and the way of their devices.
pub fn links(kind: &str, backend: Option<&str>) -> String {
    let backend = backend.map(|backend| format!("# {backend}\n"));
    format!("# links: {kind}\n") + &backend.unwrap_or_default()
}

/// Times and bandwidths of several numbers of ranks, side by side; empty for one.
pub fn scaling(args: &BenchArgs, runs: &[Run]) -> String {
    if runs.len() < 2 {
        return String::new();
    }
    let mut sizes: Vec<u64> = runs.iter().flat_map(|run| &run.rows).map(|row| row.size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let block = |title: &str, number: fn(&Cell) -> String| {
        let heads = runs.iter().map(|run| format!(" {:>9}", format!("n={}", run.ranks)));
        let mut text = format!("# {title}\n#{:>11}{}\n", "size(B)", heads.collect::<String>());
        for size in &sizes {
            let of_size =
                |run: &Run| run.rows.iter().find(|row| row.size == *size).and_then(Row::first).map(number);
            let cells =
                runs.iter().map(|run| format!(" {:>9}", of_size(run).unwrap_or_else(|| "-".to_owned())));
            text += &format!("{size:>12}{}\n", cells.collect::<String>());
        }
        text
    };
    let name = args.collective;
    let mut text =
        block(&format!("Scaling of {name}: time(us) by number of ranks"), |cell| time(cell.time_us));
    // A barrier moves nothing.
    if sizes != [0] {
        let title = format!("Scaling of {name}: busbw(GB/s) by number of ranks");
        text += &block(&title, |cell| format!("{:.2}", cell.busbw_gb_s));
    }
    text
}

fn nccl_columns(args: &BenchArgs) -> String {
    // The ranks' own loops, so that whoever compares knows what was timed.
    let iterations = args.rows(*args.ranks.start()).first().map(|row| args.iterations(row));
    let (timed, untimed) = iterations.map_or((0, 0), |iterations| (iterations.timed, iterations.untimed));
    let columns = |[time, alg, bus, wrong]: [&str; 4]| format!("  {time:>8}  {alg:>6}  {bus:>6}  {wrong:>6}");
    let names = columns(["time", "algbw", "busbw", "#wrong"]);
    let units = columns(["(us)", "(GB/s)", "(GB/s)", ""]);
    let place = |name: &str| format!("{name:^width$}", width = names.len());
    let line = |fields: [&str; 5], rest: String| {
        let [size, count, dtype, op, root] = fields;
        format!("#{size:>11}  {count:>12}  {dtype:>8}  {op:>6}  {root:>6}{rest}").trim_end().to_owned() + "\n"
    };
    [
        format!(
            "# back to back, iterations {timed}, warm-up {untimed}, mean over the ranks, GB = 10^9 B\n#\n"
        ),
        line([""; 5], place("out-of-place") + &place("in-place")),
        line(["size", "count", "type", "redop", "root"], names.repeat(2)),
        line(["(B)", "(elements)", "", "", ""], units.repeat(2)),
    ]
    .concat()
}

fn nccl_row(args: &BenchArgs, row: &Row) -> String {
    format!(
        "{:>12}  {:>12}  {:>8}  {:>6}  {:>6}{}{}\n",
        row.size,
        row.count,
        args.dtype.name(),
        args.op_name(),
        args.shown_root(),
        nccl_cell(row.out_of_place.as_ref()),
        nccl_cell(row.in_place.as_ref()),
    )
}

fn nccl_cell(cell: Option<&Cell>) -> String {
    const NONE: &str = "N/A";
    let Some(cell) = cell else { return format!("  {NONE:>8}  {NONE:>6}  {NONE:>6}  {NONE:>6}") };
    let wrong = cell.wrong.map_or_else(|| NONE.to_owned(), |wrong| wrong.to_string());
    format!("  {:>8}  {:>6.2}  {:>6.2}  {wrong:>6}", time(cell.time_us), cell.algbw_gb_s, cell.busbw_gb_s)
}

fn osu_columns() -> String {
    let columns = ["Avg Latency(us)", "Min Latency(us)", "Max Latency(us)", "Iterations"];
    let columns: String = columns.iter().map(|name| format!(" {name:>18}")).collect();
    format!(
        "# each call by itself and a barrier after it; minimum and maximum over the ranks\n# {:<10}{columns}\n",
        "Size"
    )
}

fn osu_row(row: &Row) -> String {
    let Some(cell) = row.first() else { return String::new() };
    let [average, min, max] = [cell.time_us, cell.fastest_rank_us, cell.slowest_rank_us].map(time);
    format!("{:<12} {average:>18} {min:>18} {max:>18} {:>18}\n", row.size, cell.iterations)
}

fn explained_columns() -> String {
    format!("#{:>11}  {:>12}  {:<16}  reason\n", "size(B)", "count", "schedule")
}

fn explained_row(row: &Row) -> String {
    format!("{:>12}  {:>12}  {:<16}  {}\n", row.size, row.count, row.schedule.name, row.schedule.reason)
}

/// Four digits that count. nccl-tests print two decimals, which for a call of 0.12 µs is one digit in ten.
fn time(us: f64) -> String {
    match us {
        10_000.0.. => format!("{us:.0}"),
        100.0.. => format!("{us:.1}"),
        10.0.. => format!("{us:.2}"),
        _ => format!("{us:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Schedule;
    use crate::bench::report::tests::cell;
    use crate::cli::{Request, Variables, parse};

    fn args(line: &str) -> BenchArgs {
        match parse(format!("paceline bench {line}").split_whitespace().map(Into::into), Variables::default())
        {
            Ok(Request::Bench(args)) => args,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn machine() -> Machine {
        Machine {
            cpus: 2,
            cpu_model: "a CPU".to_owned(),
            kernel: "6.18".to_owned(),
            transparent_hugepages: "always [madvise] never".to_owned(),
            governor: None,
            load_average: vec![0.5, 1.0, 2.0],
            settings: vec!["PACELINE_ORDER=any".to_owned()],
        }
    }

    fn a_row(size: u64, time_us: f64, wrong: Option<u64>) -> Row {
        Row {
            size,
            count: size as usize / 4,
            schedule: Schedule { name: "direct".to_owned(), reason: "why".to_owned() },
            out_of_place: Some(cell(size, time_us, wrong)),
            in_place: None,
        }
    }

    #[test]
    fn the_columns_are_those_of_nccl_tests() {
        let args = args("all_reduce");
        let text = head(&args, 4, &machine()) + &row(&args, &a_row(1 << 20, 524.288, Some(0)));
        let expected = "\
# paceline 0.1.0 bench all_reduce: 4 ranks on 2 CPUs (2.0 per CPU)
# a CPU, Linux 6.18, huge pages always [madvise] never, load average 0.50 1.00 2.00
# PACELINE_ORDER=any
# back to back, iterations 20, warm-up 1, mean over the ranks, GB = 10^9 B
#
#                                                              out-of-place                        in-place
#       size         count      type   redop    root      time   algbw   busbw  #wrong      time   algbw   busbw  #wrong
#        (B)    (elements)                                (us)  (GB/s)  (GB/s)              (us)  (GB/s)  (GB/s)
     1048576        262144       f32     sum      -1     524.3    2.00    2.00       0       N/A     N/A     N/A     N/A
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_root_is_shown_where_there_is_one() {
        let args = args("broadcast --ranks 4 -r 2");
        let text = row(&args, &a_row(4, 1.0, None));
        let fields: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(fields[..5], ["4", "1", "f32", "none", "2"]);
        assert_eq!(fields.len(), 13);
        assert_eq!(fields[8], "N/A", "nobody has looked");
    }

    #[test]
    fn the_foot_says_what_was_wrong() {
        let run = |wrong| Run {
            ranks: 2,
            links: String::new(),
            backend: None,
            rows: vec![a_row(1000, 0.5, wrong)],
        };
        assert_eq!(foot(&run(Some(0))), "# Out of bounds values : 0 OK\n# Avg bus bandwidth : 2.000000\n#\n");
        assert!(foot(&run(Some(3))).starts_with("# Out of bounds values : 3 FAILED\n"));
        assert!(foot(&run(None)).starts_with("# Out of bounds values : not checked\n"));
    }

    #[test]
    fn osu_has_its_columns() {
        let args = args("all_reduce --osu");
        let text = head(&args, 2, &machine()) + &row(&args, &a_row(4, 12.5, Some(0)));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[4],
            "# Size          Avg Latency(us)    Min Latency(us)    Max Latency(us)         Iterations"
        );
        assert_eq!(
            lines[5],
            "4                         12.50              12.50              12.50                 20"
        );
    }

    #[test]
    fn the_scaling_table_has_a_column_for_every_number_of_ranks() {
        let args = args("all_gather --ranks 1..2");
        let run = |ranks, sizes: &[u64]| Run {
            links: String::new(),
            backend: None,
            ranks,
            rows: sizes.iter().map(|&size| a_row(size, size as f64 / f64::from(ranks), None)).collect(),
        };
        let text = scaling(&args, &[run(1, &[4, 8]), run(2, &[8])]);
        let expected = "\
# Scaling of all_gather: time(us) by number of ranks
#    size(B)       n=1       n=2
           4     4.000         -
           8     8.000     4.000
# Scaling of all_gather: busbw(GB/s) by number of ranks
#    size(B)       n=1       n=2
           4      0.00         -
           8      0.00      0.00
";
        assert_eq!(text, expected);
        assert_eq!(scaling(&args, &[run(1, &[4])]), "", "nothing to compare");
    }

    #[test]
    fn times_have_four_digits_that_count() {
        for (us, text) in [(0.1234, "0.123"), (12.345, "12.35"), (123.45, "123.5"), (12_345.6, "12346")] {
            assert_eq!(time(us), text);
        }
    }
}
