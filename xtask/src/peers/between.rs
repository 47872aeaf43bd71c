//! `cargo xtask peers --between-hosts`: Paceline beside Gloo and OpenMPI over TCP, one rank on each of two hosts.
//!
//! The hosts are network namespaces joined by veth pairs, so "the network" is the kernel's way from one to the other:
//! memory copies, no wire. Everybody runs with an MTU of 1500 and then with 9000. The loops, rounds and checks are those of
//! the comparison on one host. Gloo and OpenMPI do not encrypt; Paceline does, always.

use super::library::{FABRICS, Hosts, Library, Ready};
use super::measurement::{Measurement, Place};
use super::streams::{self, Stream, Streams};
use super::summary::{self, Cell};
use super::workload::{Case, KIB, MIB};
use super::{Options, Run, machine};
use crate::step::{Budget, Report};
use anyhow::Result;
use paceline_testbed::{Bed, Plan};
use std::rc::Rc;
use std::time::Duration;

/// Of an Ethernet as it is, and with jumbo frames.
const MTUS: [u32; 2] = [1500, 9000];

const SIZES: &[u64] = &[4, 4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB];

/// Enough to see that everything works.
const QUICK_SIZES: &[u64] = &[4, 64 * KIB, 4 * MIB, 16 * MIB];

/// What the best of Paceline's fabrics must reach: at most so many times the time of Gloo, and of OpenMPI. From 4 KiB to
/// 64 KiB and from 4 MiB on; in between nothing is asked.
fn musts(case: Case, mtu: u32) -> [(Library, Option<f64>); 2] {
    let (gloo, open_mpi) = match case.bytes {
        0..=65_536 => (Some(0.4), Some(2.0)),
        4_194_304.. if mtu < 9000 => (Some(1.0), None),
        4_194_304.. => (Some(1.0 / 1.5), None),
        _ => (None, None),
    };
    [(Library::Gloo, gloo), (Library::OpenMpi, open_mpi)]
}

/// Sets everything up, measures with each MTU, and gives back the text of the result.
///
/// # Errors
/// There can be no hosts here, a peer cannot be installed, a library fails, or an element is wrong.
pub fn measure(options: &Options, report: &mut Report, result: &mut Option<String>) -> Result<()> {
    if let Some(reason) = paceline_testbed::missing() {
        anyhow::bail!("{reason}");
    }
    let mut libraries = Vec::new();
    report.step("peers: set up", Budget::minutes(5.0), |limit| {
        let asked = [Library::Gloo, Library::OpenMpi].into_iter();
        let asked = asked.chain(FABRICS.iter().map(|&fabric| Library::PacelineOver(fabric)));
        libraries = super::set_up(asked, options, limit)?;
        streams::build(limit)
    })?;
    let sizes = if options.quick { QUICK_SIZES } else { SIZES };
    let cases: Vec<Case> = sizes.iter().map(|&bytes| Case { ranks: 2, bytes }).collect();
    let before = machine::Machine::look();
    let mut tables = String::new();
    let mut outcome = Ok(());
    for mtu in MTUS {
        let hosts = Hosts { bed: Rc::new(Bed::build(&Plan::clean(2, mtu))?) };
        let mut run = Run::new(libraries.iter().map(|ready: &Ready| ready.on(&hosts)).collect());
        let mut streams = Streams::new(&hosts);
        let budget = Budget::minutes(1.5 * f64::from(options.rounds() + 1));
        report.step(&format!("peers: measure, MTU {mtu}"), budget, |limit| {
            run.calibrate(&cases);
            for round in 0..options.rounds() {
                run.round(&cases, round, options.rounds());
                streams.round(round, limit.min(STREAM_LIMIT))?;
            }
            Ok(())
        })?;
        tables += &format!("\n### MTU {mtu}\n");
        tables += &all_reduce_tables(&cases, mtu, &run.libraries_measured(), &run.measurements);
        tables += &stream_table(mtu, &streams.measured);
        outcome = outcome.and_then(|()| run.must_be_in_order());
    }
    let versions: Vec<&str> = libraries.iter().map(|ready| ready.version.as_str()).collect();
    let conditions = machine::conditions(&before, &options.command(), options.rounds(), &versions);
    *result = Some(format!("{conditions}{tables}"));
    outcome
}

/// A stream takes seconds.
const STREAM_LIMIT: Duration = Duration::from_secs(120);

fn all_reduce_tables(cases: &[Case], mtu: u32, libraries: &[Library], measured: &[Measurement]) -> String {
    let mut text = String::new();
    for place in Place::ALL {
        let mut rows = vec![head(libraries)];
        rows.extend(cases.iter().map(|&case| row(case, mtu, place, libraries, measured)));
        text +=
            &format!("\nall_reduce of f32 {}, microseconds:\n\n{}", place.shown(), summary::aligned(&rows));
    }
    let wrong: u64 = measured.iter().map(|measurement| measurement.wrong).sum();
    text + &format!("\nWrong elements: {wrong} in {} measurements.\n", measured.len())
}

fn head(libraries: &[Library]) -> Vec<String> {
    let names = libraries.iter().map(|library| library.name().to_owned());
    let ratios = ["/ Gloo", "must", "/ OpenMPI", "must"].map(str::to_owned);
    ["size".to_owned()].into_iter().chain(names).chain(ratios).collect()
}

fn row(case: Case, mtu: u32, place: Place, libraries: &[Library], measured: &[Measurement]) -> Vec<String> {
    let cell = |library| summary::cell(measured, library, case, place);
    let median = |library| cell(library).map(|cell: Cell| cell.median_us);
    let ours = libraries.iter().filter(|library| !library.is_peer());
    let best = ours.filter_map(|&library| median(library)).reduce(f64::min);
    let shown = |library: &Library| cell(*library).map_or_else(|| "-".to_owned(), summary::shown);
    let mut row = vec![case.size()];
    row.extend(libraries.iter().map(shown));
    for (peer, must) in musts(case, mtu) {
        let ratio = best.zip(median(peer)).map(|(best, peer)| best / peer);
        row.extend(at_most(ratio, must));
    }
    row
}

/// A ratio, and whether it is as it must be.
fn at_most(ratio: Option<f64>, must: Option<f64>) -> [String; 2] {
    let verdict = |must: f64| match ratio {
        Some(ratio) if ratio <= must => format!("≤ {must:.2}: met"),
        Some(_) => format!("≤ {must:.2}: missed"),
        None => format!("≤ {must:.2}"),
    };
    [ratio.map(|ratio| format!("{ratio:.2}")), must.map(verdict)]
        .map(|text| text.unwrap_or_else(|| "-".to_owned()))
}

/// One way, and there and back.
fn stream_table(mtu: u32, measured: &[(Stream, f64, f64)]) -> String {
    let rounds = |stream: Stream| measured.iter().filter(move |one| one.0 == stream);
    let speed = |stream| summary::median(&rounds(stream).map(|one| one.1).collect::<Vec<_>>());
    let round_trip = |stream| summary::median(&rounds(stream).map(|one| one.2).collect::<Vec<_>>());
    let [mut head, mut speeds, mut round_trips] =
        ["stream", "one way, GB/s", "8 B there and back, µs"].map(|text| vec![text.to_owned()]);
    for stream in streams::all() {
        let shown =
            |number: Option<f64>, decimals| number.map_or("-".to_owned(), |n| format!("{n:.decimals$}"));
        head.push(stream.name().to_owned());
        speeds.push(shown(speed(stream), 2));
        round_trips.push(shown(round_trip(stream), 1));
    }
    let mut text = format!("\nStreams and messages:\n\n{}", summary::aligned(&[head, speeds, round_trips]));
    for (what, number, must) in stream_musts(mtu, speed, round_trip) {
        if let Some(number) = number {
            let (least, met) = match must {
                Must::AtLeast(limit) => (format!("≥ {limit}"), number >= limit),
                Must::AtMost(limit) => (format!("≤ {limit}"), number <= limit),
            };
            text += &format!("- {what}: {number:.2}, must {least}: {}\n", if met { "met" } else { "missed" });
        }
    }
    text
}

enum Must {
    AtLeast(f64),
    AtMost(f64),
}

fn stream_musts(
    mtu: u32,
    speed: impl Fn(Stream) -> Option<f64>,
    round_trip: impl Fn(Stream) -> Option<f64>,
) -> Vec<(&'static str, Option<f64>, Must)> {
    let quic = Stream::Paceline(FABRICS[0]);
    let ratio = |of: Stream| Some(speed(quic)? / speed(of)?);
    let throughput = match mtu {
        ..9000 => ("Paceline QUIC / plain quinn", ratio(Stream::Quinn), Must::AtLeast(1.4)),
        _ => ("Paceline QUIC / TCP", ratio(Stream::Tcp), Must::AtLeast(0.7)),
    };
    vec![throughput, ("Paceline QUIC, 8 B there and back, µs", round_trip(quic), Must::AtMost(25.0))]
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Case = Case { ranks: 2, bytes: 4 };
    const LARGE: Case = Case { ranks: 2, bytes: 16 << 20 };

    fn measurement(library: Library, case: Case, mean_us: f64) -> Measurement {
        Measurement { library, case, place: Place::InPlace, mean_us, wrong: 0 }
    }

    #[test]
    fn a_row_has_the_ratios_of_our_best_and_says_what_is_missed() {
        let ours = Library::PacelineOver(FABRICS[0]);
        let libraries = [Library::Gloo, Library::OpenMpi, ours];
        let measured = [
            measurement(Library::Gloo, SMALL, 100.0),
            measurement(Library::OpenMpi, SMALL, 10.0),
            measurement(ours, SMALL, 25.0),
            measurement(Library::Gloo, LARGE, 1000.0),
            measurement(ours, LARGE, 800.0),
        ];
        let row = |case, mtu| row(case, mtu, Place::InPlace, &libraries, &measured);
        let small = [
            "4 B",
            "100 (100)",
            "10.0 (10.0)",
            "25.0 (25.0)",
            "0.25",
            "≤ 0.40: met",
            "2.50",
            "≤ 2.00: missed",
        ];
        assert_eq!(row(SMALL, 1500), small);
        assert_eq!(row(LARGE, 1500)[4..], ["0.80", "≤ 1.00: met", "-", "-"]);
        assert_eq!(row(LARGE, 9000)[4..], ["0.80", "≤ 0.67: missed", "-", "-"]);
    }

    #[test]
    fn streams_are_judged_by_the_ratio_of_their_medians() {
        let quic = Stream::Paceline(FABRICS[0]);
        let measured =
            [(Stream::Tcp, 4.0, 20.0), (Stream::Quinn, 1.0, 60.0), (quic, 1.5, 17.0), (quic, 1.3, 30.0)];
        let text = stream_table(1500, &measured);
        assert!(text.contains("- Paceline QUIC / plain quinn: 1.40, must ≥ 1.4: met\n"), "{text}");
        assert!(text.contains("µs: 23.50, must ≤ 25: met\n"), "{text}");
        assert!(stream_table(9000, &measured).contains("/ TCP: 0.35, must ≥ 0.7: missed\n"));
    }
}
