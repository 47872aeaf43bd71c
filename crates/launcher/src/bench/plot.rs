//! A measurement as a picture: time and bus bandwidth over the sizes, one line for each number of ranks.
//!
//! The SVG stands alone and follows the reader's light or dark scheme. Everything here is a pure function of the rows.

use std::fmt::Write;

use super::args::BenchArgs;
use super::machine::Machine;
use super::report::{Cell, Row, Run};

const WIDTH: f64 = 880.0;
const LEFT: f64 = 84.0;
/// Room for the labels at the lines' ends.
const RIGHT: f64 = WIDTH - 72.0;
const PANEL_HEIGHT: f64 = 270.0;
const FIRST_PANEL: f64 = 96.0;
const SECOND_PANEL: f64 = FIRST_PANEL + PANEL_HEIGHT + 66.0;
const HEIGHT: f64 = SECOND_PANEL + PANEL_HEIGHT + 62.0;

/// The least distance between two labels.
const LABEL_PITCH: f64 = 15.0;

/// Okabe & Ito's colours, which colour-blind readers can tell apart, without the black and the yellow that vanish on
/// one of the two backgrounds. After six lines they begin again, dashed.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"];

const STYLE: &str = "\
svg { font: 13px system-ui, sans-serif; --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --grid: #d9dee3 }
@media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --ink: #f0f6fc; --faint: #9198a1; --grid: #2b323b } }
.paper { fill: var(--paper) } text { fill: var(--ink) } .faint { fill: var(--faint) }
.title { font-size: 17px; font-weight: 600 } .label { font-weight: 600 }
.grid { stroke: var(--grid); stroke-width: 1 } .axis { stroke: var(--faint); stroke-width: 1 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round } .point { stroke: var(--paper); stroke-width: 1 }
";

/// The picture.
pub fn svg(args: &BenchArgs, runs: &[Run], machine: &Machine) -> String {
    let title = title(args, runs);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"{title}\">\n<style>\n{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"30\">{title}</text>\n\
         <text class=\"faint\" x=\"{LEFT}\" y=\"51\">{}</text>\n",
        escape(&conditions(machine)),
        title = escape(&title),
    );
    let times = lines(runs, |cell| cell.time_us);
    let widths = lines(runs, |cell| cell.busbw_gb_s);
    let sizes = Sizes::of(&times);
    panel(
        &mut text,
        FIRST_PANEL,
        "time of one call (log scale)",
        &sizes,
        &Scale::logarithmic(&times),
        &times,
    );
    let title = "bus bandwidth, GB/s (10⁹ B/s)";
    panel(&mut text, SECOND_PANEL, title, &sizes, &Scale::linear(&widths), &widths);
    text + "</svg>\n"
}

fn title(args: &BenchArgs, runs: &[Run]) -> String {
    let op = if args.collective.traits().reduces { format!(" {}", args.op) } else { String::new() };
    let ranks: Vec<String> = runs.iter().map(|run| run.ranks.to_string()).collect();
    let noun = if ranks == ["1"] { "rank" } else { "ranks" };
    let ranks = match ranks.as_slice() {
        [first, .., last] => format!("{first} to {last}"),
        few => few.concat(),
    };
    format!("{} {}{op}, {ranks} {noun}", args.collective, args.dtype)
}

fn conditions(machine: &Machine) -> String {
    let load = machine.load_average.first().copied().unwrap_or(0.0);
    format!(
        "{}, {} CPUs, Linux {}, load {load:.1} at the start; paceline {}",
        machine.cpu_model,
        machine.cpus,
        machine.kernel,
        env!("CARGO_PKG_VERSION")
    )
}

/// One number of ranks: its points, by size.
struct Line {
    ranks: u32,
    points: Vec<(u64, f64)>,
}

fn lines(runs: &[Run], value: fn(&Cell) -> f64) -> Vec<Line> {
    let point = |row: &Row| row.first().map(|cell| (row.size, value(cell)));
    let line = |run: &Run| Line { ranks: run.ranks, points: run.rows.iter().filter_map(point).collect() };
    runs.iter().map(line).collect()
}

fn values(lines: &[Line]) -> impl Iterator<Item = f64> + '_ {
    lines.iter().flat_map(|line| &line.points).map(|point| point.1)
}

/// The horizontal axis: powers of two.
struct Sizes {
    first: f64,
    last: f64,
}

impl Sizes {
    fn of(lines: &[Line]) -> Self {
        let logs = || lines.iter().flat_map(|line| &line.points).map(|point| log2(point.0));
        let (first, last) = (logs().fold(f64::MAX, f64::min), logs().fold(f64::MIN, f64::max));
        // A single size, or none, stands in the middle.
        if first < last {
            Sizes { first, last }
        } else {
            Sizes { first: first.min(64.0) - 1.0, last: first.min(64.0) + 1.0 }
        }
    }

    fn x(&self, size: u64) -> f64 {
        LEFT + (log2(size) - self.first) / (self.last - self.first) * (RIGHT - LEFT)
    }

    /// At most ten labels, at powers of two.
    fn ticks(&self) -> Vec<u64> {
        let (first, last) = (self.first.max(0.0).ceil() as u32, self.last.floor() as u32);
        let step = (last.saturating_sub(first) / 10 + 1) as usize;
        (first..=last.min(63)).step_by(step).map(|power| 1 << power).collect()
    }
}

fn log2(size: u64) -> f64 {
    (size.max(1) as f64).log2()
}

/// A vertical axis.
enum Scale {
    /// From one power of ten to another, of microseconds.
    Logarithmic { first: i32, last: i32 },
    /// From 0 on, in steps.
    Linear { step: f64, steps: u32 },
}

impl Scale {
    fn logarithmic(lines: &[Line]) -> Self {
        let logs = || values(lines).filter(|value| *value > 0.0).map(f64::log10);
        let first = logs().reduce(f64::min).unwrap_or(0.0).floor() as i32;
        let last = logs().reduce(f64::max).unwrap_or(0.0).ceil() as i32;
        Scale::Logarithmic { first, last: last.max(first + 1) }
    }

    /// Four to eight steps of 1, 2 or 5 times a power of ten.
    fn linear(lines: &[Line]) -> Self {
        let largest = values(lines).fold(0.0, f64::max);
        if largest <= 0.0 {
            return Scale::Linear { step: 0.25, steps: 4 };
        }
        let decade = 10f64.powf((largest / 4.0).log10().floor());
        let fits = |step: &f64| largest / step <= 8.0;
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * decade).into_iter().find(fits);
        let step = step.expect("largest / (10 decade) is below 4");
        Scale::Linear { step, steps: (largest / step).ceil() as u32 }
    }

    /// How high a value stands, from 0 to 1.
    fn height(&self, value: f64) -> f64 {
        match *self {
            Scale::Logarithmic { first, last } => {
                (value.max(f64::MIN_POSITIVE).log10() - f64::from(first)) / f64::from(last - first)
            }
            Scale::Linear { step, steps } => value / (step * f64::from(steps)),
        }
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        match *self {
            Scale::Logarithmic { first, last } => {
                (first..=last).map(|power| 10f64.powi(power)).map(|us| (us, micros(us))).collect()
            }
            Scale::Linear { step, steps } => {
                let decimals = (-step.log10()).ceil().max(0.0) as usize;
                let tick = |index| step * f64::from(index);
                (0..=steps).map(|index| (tick(index), format!("{:.decimals$}", tick(index)))).collect()
            }
        }
    }
}

/// One panel with its axes, lines and labels; `top` is its upper edge.
fn panel(text: &mut String, top: f64, title: &str, sizes: &Sizes, scale: &Scale, lines: &[Line]) {
    let bottom = top + PANEL_HEIGHT;
    let y = |value: f64| bottom - scale.height(value).clamp(0.0, 1.0) * PANEL_HEIGHT;
    add(text, format_args!("<text class=\"label\" x=\"{LEFT}\" y=\"{:.1}\">{title}</text>", top - 12.0));
    for (value, label) in scale.ticks() {
        let (at, class) = (y(value), if y(value) >= bottom { "axis" } else { "grid" });
        add(text, format_args!("<path class=\"{class}\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/>"));
        let x = LEFT - 8.0;
        add(
            text,
            format_args!(
                "<text class=\"faint\" x=\"{x}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                at + 4.0
            ),
        );
    }
    for size in sizes.ticks() {
        let (x, label) = (sizes.x(size), bytes(size));
        add(text, format_args!("<path class=\"grid\" d=\"M{x:.1} {top:.1}V{bottom:.1}\"/>"));
        let below = bottom + 19.0;
        add(
            text,
            format_args!(
                "<text class=\"faint\" x=\"{x:.1}\" y=\"{below:.1}\" text-anchor=\"middle\">{label}</text>"
            ),
        );
    }
    let (middle, below) = (f64::midpoint(LEFT, RIGHT), bottom + 39.0);
    add(
        text,
        format_args!(
            "<text class=\"faint\" x=\"{middle}\" y=\"{below:.1}\" text-anchor=\"middle\">size (bytes, log scale)</text>"
        ),
    );
    for (index, line) in lines.iter().enumerate() {
        draw(text, index, line, sizes, scale, y);
    }
    let ends = lines
        .iter()
        .enumerate()
        .filter_map(|(index, line)| Some((index, line.ranks, y(line.points.last()?.1))));
    for (index, ranks, at) in apart(ends.collect(), bottom) {
        let (x, colour) = (RIGHT + 10.0, colour(index));
        add(
            text,
            format_args!(
                "<text class=\"label\" x=\"{x}\" y=\"{:.1}\" style=\"fill:{colour}\">n={ranks}</text>",
                at + 4.0
            ),
        );
    }
}

fn draw(text: &mut String, index: usize, line: &Line, sizes: &Sizes, scale: &Scale, y: impl Fn(f64) -> f64) {
    let colour = colour(index);
    let dashes = if index < COLOURS.len() { "" } else { " stroke-dasharray=\"5 4\"" };
    let points: Vec<String> =
        line.points.iter().map(|&(size, value)| format!("{:.1},{:.1}", sizes.x(size), y(value))).collect();
    add(
        text,
        format_args!(
            "<polyline class=\"line\" stroke=\"{colour}\"{dashes} points=\"{}\"/>",
            points.join(" ")
        ),
    );
    for &(size, value) in &line.points {
        let shown = match scale {
            Scale::Logarithmic { .. } => micros(value),
            Scale::Linear { .. } => format!("{value:.2} GB/s"),
        };
        let (x, y) = (sizes.x(size), y(value));
        add(
            text,
            format_args!(
                "<circle class=\"point\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.2\" fill=\"{colour}\"><title>n={}, {}: {shown}</title></circle>",
                line.ranks,
                bytes(size)
            ),
        );
    }
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// Moves labels (number, ranks, height) up until none lies on another and none below `bottom`.
fn apart(mut labels: Vec<(usize, u32, f64)>, bottom: f64) -> Vec<(usize, u32, f64)> {
    labels.sort_by(|a, b| b.2.total_cmp(&a.2));
    let mut lowest = bottom;
    for (_, _, at) in &mut labels {
        *at = at.min(lowest);
        lowest = *at - LABEL_PITCH;
    }
    labels
}

fn bytes(size: u64) -> String {
    match size {
        0x4000_0000.. if size.is_multiple_of(0x4000_0000) => format!("{} GiB", size >> 30),
        0x10_0000.. if size.is_multiple_of(0x10_0000) => format!("{} MiB", size >> 20),
        0x400.. if size.is_multiple_of(0x400) => format!("{} KiB", size >> 10),
        _ => format!("{size} B"),
    }
}

/// A time in the unit that fits it.
fn micros(us: f64) -> String {
    let (number, unit) = match us {
        1e6.. => (us / 1e6, "s"),
        1e3.. => (us / 1e3, "ms"),
        1.0.. => (us, "µs"),
        _ => (us * 1e3, "ns"),
    };
    let digits = if number >= 100.0 {
        0
    } else if number >= 10.0 {
        1
    } else {
        2
    };
    let text = format!("{number:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {unit}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

fn add(text: &mut String, element: std::fmt::Arguments<'_>) {
    writeln!(text, "{element}").expect("a String takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(ranks: u32, points: &[(u64, f64)]) -> Line {
        Line { ranks, points: points.to_vec() }
    }

    #[test]
    fn times_and_sizes_are_shown_in_the_unit_that_fits() {
        for (us, text) in [
            (0.07, "70 ns"),
            (1.0, "1 µs"),
            (12.34, "12.3 µs"),
            (100.0, "100 µs"),
            (2_500.0, "2.5 ms"),
            (3e6, "3 s"),
        ] {
            assert_eq!(micros(us), text);
        }
        for (size, text) in
            [(4, "4 B"), (1024, "1 KiB"), (1500, "1500 B"), (64 << 20, "64 MiB"), (1 << 30, "1 GiB")]
        {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn a_linear_axis_has_round_steps_and_reaches_the_largest_value() {
        for (largest, top) in [(0.41, "0.5"), (7.3, "8"), (52.0, "60"), (100.0, "100")] {
            let scale = Scale::linear(&[line(2, &[(4, largest)])]);
            let ticks = scale.ticks();
            assert!((4..=9).contains(&ticks.len()), "{largest}: {ticks:?}");
            assert_eq!(ticks.last().expect("ticks").1.parse::<f64>(), top.parse::<f64>(), "{ticks:?}");
        }
        assert_eq!(Scale::linear(&[line(1, &[(4, 0.0)])]).ticks().len(), 5, "one rank has no bus");
    }

    #[test]
    fn a_logarithmic_axis_spans_whole_decades() {
        let scale = Scale::logarithmic(&[line(2, &[(4, 0.3), (8, 120.0)])]);
        let labels: Vec<String> = scale.ticks().into_iter().map(|tick| tick.1).collect();
        assert_eq!(labels, ["100 ns", "1 µs", "10 µs", "100 µs", "1 ms"]);
        assert!((scale.height(1.0) - 0.25).abs() < 1e-9);
    }

    #[test]
    fn there_are_at_most_about_ten_sizes_on_the_axis() {
        let sizes = Sizes { first: 2.0, last: 26.0 };
        assert!((8..=11).contains(&sizes.ticks().len()), "{:?}", sizes.ticks());
        let one = Sizes::of(&[line(2, &[(1024, 1.0)])]);
        assert!((one.x(1024) - f64::midpoint(LEFT, RIGHT)).abs() < 1e-9);
        let none = Sizes::of(&[]);
        assert!(none.first < none.last && none.ticks().len() < 12);
    }

    #[test]
    fn labels_do_not_cover_each_other() {
        let moved = apart(vec![(0, 1, 100.0), (1, 2, 101.0), (2, 3, 300.0)], 200.0);
        let mut heights: Vec<f64> = moved.iter().map(|label| label.2).collect();
        heights.sort_by(f64::total_cmp);
        assert!(heights.windows(2).all(|pair| pair[1] - pair[0] >= LABEL_PITCH), "{heights:?}");
        assert!(heights.iter().all(|at| *at <= 200.0));
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(escape("a<b & \"c\""), "a&lt;b &amp; &quot;c&quot;");
    }
}
