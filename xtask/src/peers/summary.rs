//! From measurements to tables in Markdown.

use super::library::Library;
use super::measurement::{Measurement, Place};
use super::workload::{Case, worlds};

/// Around a generated section of docs/benchmarks.md.
pub struct Markers {
    pub begin: &'static str,
    pub end: &'static str,
}

/// The section of one host.
pub const HERE: Markers = Markers { begin: "<!-- peers: begin -->", end: "<!-- peers: end -->" };

/// The section of several hosts.
pub const BETWEEN: Markers =
    Markers { begin: "<!-- peers between hosts: begin -->", end: "<!-- peers between hosts: end -->" };

/// One library's rounds of one case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    pub median_us: f64,
    pub min_us: f64,
    pub wrong: u64,
}

/// All tables: one for each number of ranks and place.
pub fn tables(cases: &[Case], libraries: &[Library], measurements: &[Measurement]) -> String {
    let mut text = String::from(
        "Microseconds per call: the median of the rounds and, in brackets, the fastest round. \"/ best peer\" is Paceline's \
         median divided by the\nsmallest median of a peer in the same run: below 1 Paceline is faster.\n",
    );
    for ranks in worlds(cases) {
        for place in Place::ALL {
            let of_table = cases.iter().filter(|case| case.ranks == ranks);
            let of_table = of_table.filter(|case| case.bytes > 0 || place == Place::OutOfPlace);
            let mut rows = vec![head(libraries)];
            rows.extend(of_table.map(|&case| row(case, place, libraries, measurements)));
            text += &format!("\n{ranks} ranks, all_reduce of f32 {}:\n\n{}", place.shown(), aligned(&rows));
        }
    }
    let wrong: u64 = measurements.iter().map(|measurement| measurement.wrong).sum();
    text += &format!(
        "\nWrong elements: {wrong} in {} measurements, each with every element of every rank compared.\n",
        measurements.len()
    );
    for missing in Library::ALL.iter().filter(|library| !libraries.contains(library)) {
        text += &match missing.is_peer() {
            true => format!("{missing} was not measured: the best peer is the best of the others.\n"),
            false => format!("{missing} was not measured: this build has no such thing.\n"),
        };
    }
    text
}

/// One run of one library in a line, for who waits.
pub fn line(measurements: &[Measurement]) -> String {
    let out_of_place = measurements.iter().filter(|one| one.place == Place::OutOfPlace);
    out_of_place.map(|one| format!("{} {}", one.case.size(), us(one.mean_us))).collect::<Vec<_>>().join(", ")
}

/// What is wrong in one run of one library.
pub fn wrong_elements(measurements: &[Measurement]) -> Option<String> {
    let wrong = measurements.iter().filter(|one| one.wrong > 0);
    let told = wrong.map(|one| format!("{} {}: {} wrong", one.case.size(), one.place.shown(), one.wrong));
    let told = told.collect::<Vec<_>>().join(", ");
    (!told.is_empty()).then_some(told)
}

/// The document with another generated section; `None` if it has no place for one.
pub fn with_section(document: &str, markers: &Markers, section: &str) -> Option<String> {
    let Markers { begin, end } = markers;
    let (before, rest) = document.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{}\n{end}{after}", section.trim_end()))
}

fn head(libraries: &[Library]) -> Vec<String> {
    let mut head = vec!["size".to_owned()];
    for library in libraries {
        head.push(library.name().to_owned());
        if !library.is_peer() {
            head.extend(["/ best peer".to_owned(), "must".to_owned()]);
        }
    }
    head
}

/// One library's rounds of one case; `None` if there was none.
pub fn cell(measurements: &[Measurement], library: Library, case: Case, place: Place) -> Option<Cell> {
    let of_cell = |m: &&Measurement| (m.library, m.case, m.place) == (library, case, place);
    let rounds: Vec<&Measurement> = measurements.iter().filter(of_cell).collect();
    let times: Vec<f64> = rounds.iter().map(|m| m.mean_us).collect();
    Some(Cell {
        median_us: median(&times)?,
        min_us: times.iter().copied().reduce(f64::min)?,
        wrong: rounds.iter().map(|m| m.wrong).sum(),
    })
}

fn row(case: Case, place: Place, libraries: &[Library], measurements: &[Measurement]) -> Vec<String> {
    let cell = |library: Library| cell(measurements, library, case, place);
    let peers = libraries.iter().filter(|library| library.is_peer());
    let best_us = peers.filter_map(|&peer| cell(peer)).map(|cell| cell.median_us).reduce(f64::min);
    let mut row = vec![case.size()];
    for &library in libraries {
        let own = cell(library);
        row.push(own.map_or_else(|| "-".to_owned(), shown));
        if !library.is_peer() {
            let own_us = own.map(|cell| cell.median_us);
            let ratio = own_us.zip(best_us).map(|(own, best)| format!("{:.2}", own / best));
            let must_us = match library {
                Library::PacelineRegistered => case.must_registered_us(),
                _ => case.must_us(),
            };
            let must = must_us.map(|must| match own_us {
                Some(own) => format!("{must}: {}", verdict(own, must, best_us)),
                None => must.to_string(),
            });
            row.extend([ratio, must].map(|text| text.unwrap_or_else(|| "-".to_owned())));
        }
    }
    row
}

/// Whether a figure is met, and if it is not, whether the best peer is beaten at least.
fn verdict(own_us: f64, must_us: f64, best_us: Option<f64>) -> &'static str {
    match best_us {
        _ if own_us <= must_us => "met",
        Some(best_us) if own_us < best_us => "missed, beats peers",
        _ => "missed",
    }
}

/// The median, and in brackets the fastest round.
pub fn shown(cell: Cell) -> String {
    let times = format!("{} ({})", us(cell.median_us), us(cell.min_us));
    if cell.wrong == 0 { times } else { format!("{times}, {} wrong", cell.wrong) }
}

/// Three figures that mean something; below a microsecond the third decimal does.
fn us(micros: f64) -> String {
    match micros {
        m if m < 1.0 => format!("{m:.3}"),
        m if m < 10.0 => format!("{m:.2}"),
        m if m < 100.0 => format!("{m:.1}"),
        m => format!("{m:.0}"),
    }
}

/// The middle one, or the mean of the middle two.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { (sorted[middle - 1] + upper) / 2.0 })
}

/// A table that can be read as text too. The first row is the head.
pub fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:<width$} |"));
        format!("|{}\n", cells.collect::<String>())
    };
    let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
    rows.iter().take(1).chain([&rule]).chain(rows.iter().skip(1)).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARRIER: Case = Case { ranks: 2, bytes: 0 };
    const MIB: Case = Case { ranks: 2, bytes: 1 << 20 };
    const LARGE: Case = Case { ranks: 2, bytes: 16 << 20 };

    fn measurements(library: Library, case: Case, times_us: &[f64]) -> Vec<Measurement> {
        let one = |&mean_us| Measurement { library, case, place: Place::OutOfPlace, mean_us, wrong: 0 };
        times_us.iter().map(one).collect()
    }

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }

    #[test]
    fn a_table_has_medians_minima_ratios_and_verdicts() {
        use Library::{Mpich, OpenMpi, Paceline};
        let all = [
            measurements(OpenMpi, BARRIER, &[0.2, 0.125, 0.5]),
            measurements(Paceline, BARRIER, &[0.1, 0.0625, 7.0]),
            measurements(OpenMpi, MIB, &[120.0, 130.0]),
            measurements(Mpich, MIB, &[100.0]),
            measurements(Paceline, MIB, &[80.0]),
        ]
        .concat();
        let text = tables(&[BARRIER, MIB], &[OpenMpi, Mpich, Paceline], &all);
        let expected = "\
            \n2 ranks, all_reduce of f32 out of place:\n\
            \n\
            | size    | OpenMPI       | MPICH     | Paceline      | / best peer | must                    |\n\
            | ------- | ------------- | --------- | ------------- | ----------- | ----------------------- |\n\
            | barrier | 0.200 (0.125) | -         | 0.100 (0.062) | 0.50        | 0.12: met               |\n\
            | 1 MiB   | 125 (120)     | 100 (100) | 80.0 (80.0)   | 0.80        | 65: missed, beats peers |\n";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("Wrong elements: 0 in 10 measurements"), "{text}");
        assert!(text.contains("Gloo was not measured: the best peer is the best of the others"), "{text}");
        assert!(text.contains("Paceline registered was not measured: this build has"), "{text}");
    }

    #[test]
    fn registered_buffers_have_their_own_figure() {
        use Library::{OpenMpi, PacelineRegistered};
        let all =
            [measurements(OpenMpi, LARGE, &[900.0]), measurements(PacelineRegistered, LARGE, &[1000.0])]
                .concat();
        let row = row(LARGE, Place::OutOfPlace, &[OpenMpi, PacelineRegistered], &all);
        assert_eq!(row, ["16 MiB", "900 (900)", "1000 (1000)", "1.11", "650: missed"]);
        let nothing = super::row(LARGE, Place::InPlace, &[OpenMpi, PacelineRegistered], &all);
        assert_eq!(nothing, ["16 MiB", "-", "-", "-", "650"]);
    }

    #[test]
    fn wrong_elements_cannot_be_overlooked() {
        let mut all = measurements(Library::Gloo, MIB, &[1.0, 1.0]);
        (all[0].wrong, all[1].wrong) = (3, 4);
        let text = tables(&[MIB], &[Library::Gloo], &all);
        assert!(text.contains("1.00 (1.00), 7 wrong") && text.contains("Wrong elements: 7"), "{text}");
        let told = wrong_elements(&all);
        assert_eq!(told.as_deref(), Some("1 MiB out of place: 3 wrong, 1 MiB out of place: 4 wrong"));
        assert_eq!(wrong_elements(&measurements(Library::Gloo, MIB, &[1.0])), None);
    }

    #[test]
    fn the_prose_around_the_generated_section_stays() {
        let Markers { begin, end } = HERE;
        let document = format!("# Title\n{begin}\nold\n{end}\nmore\n");
        let new = with_section(&document, &HERE, "new\n").unwrap();
        assert_eq!(new, format!("# Title\n{begin}\nnew\n{end}\nmore\n"));
        assert_eq!(with_section(&new, &HERE, "new\n"), Some(new));
        assert_eq!(with_section(&document, &BETWEEN, "new"), None);
    }

    #[test]
    fn times_keep_three_figures() {
        assert_eq!([0.0625, 5.204, 65.34, 1310.4].map(us), ["0.062", "5.20", "65.3", "1310"]);
    }
}
