//! What the benchmarks print, as numbers.

use super::library::Library;
use super::workload::Case;
use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Where the result of an all_reduce goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Into a buffer of its own; barriers are counted here.
    OutOfPlace,
    /// Over the input.
    InPlace,
}

/// One row of one run of one library.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    pub library: Library,
    pub case: Case,
    pub place: Place,
    /// Of one call, over the calls of the loop and the ranks.
    pub mean_us: f64,
    /// Elements of all ranks that are not the sum.
    pub wrong: u64,
}

impl Place {
    pub const ALL: [Self; 2] = [Self::OutOfPlace, Self::InPlace];

    /// In both kinds of documents.
    fn key(self) -> &'static str {
        match self {
            Self::OutOfPlace => "out_of_place",
            Self::InPlace => "in_place",
        }
    }

    pub fn shown(self) -> &'static str {
        match self {
            Self::OutOfPlace => "out of place",
            Self::InPlace => "in place",
        }
    }
}

/// Reads the lines of peers/bench.c. A library may print lines of its own between them; they are no objects.
///
/// # Errors
/// An object that is not as bench.c prints it.
pub fn of_peer(library: Library, ranks: u32, text: &str) -> Result<Vec<Measurement>> {
    let row = |line: &str| -> Result<Measurement> {
        let row: Value = serde_json::from_str(line)?;
        let place = Place::ALL.into_iter().find(|place| row["place"] == place.key()).context("no place")?;
        let case = Case { ranks, bytes: row["bytes"].as_u64().context("no bytes")? };
        let (mean_us, wrong) = numbers(&row["mean_us"], &row["wrong"])?;
        Ok(Measurement { library, case, place, mean_us, wrong })
    };
    let objects = text.lines().filter(|line| line.starts_with('{'));
    objects
        .map(|line| {
            row(line).with_context(|| format!("its benchmark has printed an unexpected line: {line}"))
        })
        .collect()
}

/// Reads the document of `paceline bench --json` of one case.
///
/// # Errors
/// It is not such a document.
pub fn of_paceline(library: Library, case: Case, text: &str) -> Result<Vec<Measurement>> {
    let document: Value = serde_json::from_str(text)?;
    let row = &document["runs"][0]["rows"][0];
    if row["size"] != case.bytes {
        bail!("it is about {} bytes and not {}", row["size"], case.bytes);
    }
    let places = Place::ALL.into_iter().filter(|place| !row[place.key()].is_null());
    let measurement = |place: Place| -> Result<Measurement> {
        let (mean_us, wrong) = numbers(&row[place.key()]["time_us"], &row[place.key()]["wrong"])?;
        Ok(Measurement { library, case, place, mean_us, wrong })
    };
    places.map(measurement).collect()
}

/// A row whose elements nobody has looked at has no number of wrong ones, and is not accepted.
fn numbers(mean_us: &Value, wrong: &Value) -> Result<(f64, u64)> {
    let mean_us = mean_us.as_f64().filter(|mean| *mean > 0.0).context("no time")?;
    Ok((mean_us, wrong.as_u64().context("no number of wrong elements")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: Case = Case { ranks: 2, bytes: 4096 };

    #[test]
    fn the_lines_of_a_peer_are_read_among_others() {
        let text = "a warning of the library\n\
            {\"bytes\":0,\"place\":\"out_of_place\",\"iterations\":9,\"mean_us\":0.125,\"wrong\":0}\n\
            {\"bytes\":4096,\"place\":\"in_place\",\"iterations\":9,\"mean_us\":2.5,\"wrong\":7}\n";
        let measurements = of_peer(Library::Mpich, 2, text).unwrap();
        let library = Library::Mpich;
        let barrier = Case { ranks: 2, bytes: 0 };
        let expected = [
            Measurement { library, case: barrier, place: Place::OutOfPlace, mean_us: 0.125, wrong: 0 },
            Measurement { library, case: CASE, place: Place::InPlace, mean_us: 2.5, wrong: 7 },
        ];
        assert_eq!(measurements, expected);
    }

    #[test]
    fn a_line_that_is_cut_off_or_lacks_a_number_is_an_error() {
        for line in [
            "{\"bytes\":4,\"pla",
            "{\"bytes\":4,\"place\":\"in_place\",\"mean_us\":1.5}",
            "{\"bytes\":4,\"place\":\"in_place\",\"mean_us\":0.0,\"wrong\":0}",
            "{\"bytes\":4,\"place\":\"elsewhere\",\"mean_us\":1.5,\"wrong\":0}",
        ] {
            assert!(of_peer(Library::Gloo, 2, line).is_err(), "{line}");
        }
    }

    #[test]
    fn our_own_document_is_read() {
        let text = r#"{"runs": [{"ranks": 2, "rows": [{"size": 4096, "count": 1024,
            "out_of_place": {"time_us": 1.5, "wrong": 0}, "in_place": {"time_us": 2, "wrong": 3}}]}]}"#;
        let read = of_paceline(Library::Paceline, CASE, text).unwrap();
        let told: Vec<_> = read.iter().map(|m| (m.place, m.mean_us, m.wrong)).collect();
        assert_eq!(told, [(Place::OutOfPlace, 1.5, 0), (Place::InPlace, 2.0, 3)]);
        let barrier = text.replace("4096", "0").replace(r#"{"time_us": 2, "wrong": 3}"#, "null");
        assert_eq!(of_paceline(Library::Paceline, Case { bytes: 0, ..CASE }, &barrier).unwrap().len(), 1);
    }

    #[test]
    fn a_document_about_something_else_or_unchecked_is_an_error() {
        let of = |text: &str| of_paceline(Library::Paceline, CASE, text);
        assert!(of("").is_err());
        assert!(of("{}").is_err());
        assert!(
            of(r#"{"runs": [{"rows": [{"size": 8, "in_place": {"time_us": 1, "wrong": 0}}]}]}"#).is_err()
        );
        let unchecked =
            r#"{"runs": [{"rows": [{"size": 4096, "in_place": {"time_us": 1, "wrong": null}}]}]}"#;
        assert!(of(unchecked).is_err());
    }
}
