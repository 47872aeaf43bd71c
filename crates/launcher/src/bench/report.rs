//! What the ranks measured, and what the launcher makes of it: means over the ranks, bandwidths, sums of wrong elements.
//!
//! Every rank reports to the launcher and not to rank 0, so that no number depends on the collectives under test.

use serde::{Deserialize, Serialize};

use super::args::{BenchArgs, RowShape};
use super::collective::Place;

/// One rank's result of one row in one place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Whose.
    pub rank: usize,
    /// The index of the row.
    pub row: usize,
    /// Where the result went.
    pub place: Place,
    /// The mean of one call.
    pub mean_us: f64,
    /// Timed calls.
    pub iterations: u32,
    /// Elements that are not as the reference says; `None` if nobody looked.
    pub wrong: Option<u64>,
    /// The distribution of single calls, where it was taken.
    pub samples: Option<Samples>,
}

/// A distribution of single calls.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Samples {
    /// The median.
    pub p50_us: f64,
    /// The 99th percentile, nearest rank, as nccl-tests have it.
    pub p99_us: f64,
    /// The shortest.
    pub min_us: f64,
    /// The longest.
    pub max_us: f64,
}

/// Which schedule runs a row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// Its name.
    pub name: String,
    /// Why it is that one.
    pub reason: String,
}

/// One row of one place, over all ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// The mean over the ranks of their means.
    pub time_us: f64,
    /// The mean of the fastest rank.
    pub fastest_rank_us: f64,
    /// The mean of the slowest rank.
    pub slowest_rank_us: f64,
    /// size / time, in 10^9 bytes per second.
    pub algbw_gb_s: f64,
    /// algbw times the collective's factor.
    pub busbw_gb_s: f64,
    /// Wrong elements of all ranks.
    pub wrong: Option<u64>,
    /// Timed calls.
    pub iterations: u32,
    /// Single calls: the mean of the ranks' medians, and the extremes of all ranks.
    #[serde(flatten)]
    pub samples: Option<Samples>,
}

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The larger buffer, in bytes.
    pub size: u64,
    /// Elements, of one share where there are shares.
    pub count: usize,
    /// What ran.
    pub schedule: Schedule,
    /// `None` where the communicator has no such call.
    pub out_of_place: Option<Cell>,
    /// The same.
    pub in_place: Option<Cell>,
}

/// All rows of one number of ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// The number of ranks.
    pub ranks: u32,
    /// The kind of links between them.
    pub links: String,
    /// The way of collectives on device memory and why, if they were measured.
    pub backend: Option<String>,
    /// The rows, by size.
    pub rows: Vec<Row>,
}

impl Samples {
    /// The distribution of these, or `None` of nothing.
    pub fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let nearest = |percent: usize| (samples.len() * percent).div_ceil(100).max(1) - 1;
        let (&min_us, &max_us) = (samples.first()?, samples.last()?);
        Some(Samples { p50_us: samples[nearest(50)], p99_us: samples[nearest(99)], min_us, max_us })
    }

    fn over_ranks(all: &[Self]) -> Option<Self> {
        let extreme =
            |pick: fn(&Self) -> f64, choose: fn(f64, f64) -> f64| all.iter().map(pick).reduce(choose);
        Some(Samples {
            p50_us: mean(all.iter().map(|samples| samples.p50_us))?,
            p99_us: extreme(|samples| samples.p99_us, f64::max)?,
            min_us: extreme(|samples| samples.min_us, f64::min)?,
            max_us: extreme(|samples| samples.max_us, f64::max)?,
        })
    }
}

impl Cell {
    /// The result of all ranks; `None` if there is none.
    pub fn over_ranks(bytes: u64, bus_factor: f64, ranks: &[Measured]) -> Option<Self> {
        let means = || ranks.iter().map(|measured| measured.mean_us);
        let time_us = mean(means())?;
        let algbw_gb_s = gigabytes_per_second(bytes, time_us);
        let samples: Vec<Samples> = ranks.iter().filter_map(|measured| measured.samples).collect();
        Some(Cell {
            time_us,
            fastest_rank_us: means().reduce(f64::min)?,
            slowest_rank_us: means().reduce(f64::max)?,
            algbw_gb_s,
            busbw_gb_s: algbw_gb_s * bus_factor,
            wrong: ranks.iter().map(|measured| measured.wrong).sum(),
            iterations: ranks.first()?.iterations,
            samples: Samples::over_ranks(&samples),
        })
    }
}

impl Row {
    /// The cells that there are.
    pub fn cells(&self) -> impl Iterator<Item = &Cell> {
        self.out_of_place.iter().chain(&self.in_place)
    }

    /// The cell for tables and plots that have room for one: out of place, where there is that.
    pub fn first(&self) -> Option<&Cell> {
        self.cells().next()
    }
}

impl Run {
    /// nccl-tests' last line: the mean over all cells.
    pub fn average_busbw(&self) -> f64 {
        mean(self.rows.iter().flat_map(Row::cells).map(|cell| cell.busbw_gb_s)).unwrap_or(0.0)
    }

    /// Wrong elements of all rows; `None` if nobody looked.
    pub fn wrong(&self) -> Option<u64> {
        self.rows.iter().flat_map(Row::cells).map(|cell| cell.wrong).sum()
    }
}

/// The results of one job as they come in, in whatever order.
#[derive(Debug)]
pub struct Collector {
    shapes: Vec<RowShape>,
    ranks: u32,
    places: &'static [Place],
    bus_factor: f64,
    measured: Vec<Vec<Measured>>,
    schedules: Vec<Schedule>,
}

impl Collector {
    /// For a job of this many ranks.
    pub fn new(args: &BenchArgs, ranks: u32) -> Self {
        let shapes = args.rows(ranks);
        Collector {
            ranks,
            places: args.places(),
            bus_factor: (args.collective.traits().bus_factor)(f64::from(ranks)),
            measured: vec![Vec::new(); shapes.len()],
            schedules: vec![Schedule::default(); shapes.len()],
            shapes,
        }
    }

    /// How many rows there are to be.
    pub fn len(&self) -> usize {
        self.shapes.len()
    }

    /// The size of a row in bytes.
    pub fn bytes(&self, row: usize) -> Option<u64> {
        self.shapes.get(row).map(|shape| shape.bytes)
    }

    /// Notes which schedule runs a row.
    pub fn explain(&mut self, row: usize, schedule: Schedule) {
        if let Some(place) = self.schedules.get_mut(row) {
            *place = schedule;
        }
    }

    /// Takes one result; the row, if it was the last one of it.
    pub fn add(&mut self, measured: Measured) -> Option<Row> {
        let index = measured.row;
        let so_far = self.measured.get_mut(index)?;
        so_far.push(measured);
        (so_far.len() == self.ranks as usize * self.places.len()).then(|| self.row(index))
    }

    /// A row, with the cells for which there are results.
    pub fn row(&self, index: usize) -> Row {
        let shape = self.shapes[index];
        let cell = |place| {
            let of_place: Vec<Measured> =
                self.measured[index].iter().filter(|measured| measured.place == place).cloned().collect();
            Cell::over_ranks(shape.bytes, self.bus_factor, &of_place)
        };
        Row {
            size: shape.bytes,
            count: shape.count,
            schedule: self.schedules[index].clone(),
            out_of_place: cell(Place::OutOfPlace),
            in_place: cell(Place::InPlace),
        }
    }
}

/// GB = 10^9 bytes, as in nccl-tests. No time is no bandwidth: a barrier of 0 bytes has none either.
fn gigabytes_per_second(bytes: u64, time_us: f64) -> f64 {
    if time_us > 0.0 { bytes as f64 / time_us / 1e3 } else { 0.0 }
}

fn mean(numbers: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = numbers.fold((0.0, 0u32), |(sum, count), number| (sum + number, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A cell of that time, for tests of tables.
    pub fn cell(bytes: u64, time_us: f64, wrong: Option<u64>) -> Cell {
        Cell::over_ranks(bytes, 1.0, &[measured(0, time_us, wrong)]).expect("there is a rank")
    }

    fn measured(rank: usize, mean_us: f64, wrong: Option<u64>) -> Measured {
        let place = Place::OutOfPlace;
        Measured { rank, row: 0, place, mean_us, iterations: 20, wrong, samples: None }
    }

    #[test]
    fn a_cell_is_the_mean_over_the_ranks_and_the_sum_of_their_errors() {
        let ranks = [measured(0, 100.0, Some(1)), measured(1, 300.0, Some(2))];
        let cell = Cell::over_ranks(1_000_000, 1.5, &ranks).expect("there are ranks");
        assert_eq!((cell.time_us, cell.fastest_rank_us, cell.slowest_rank_us), (200.0, 100.0, 300.0));
        assert_eq!((cell.algbw_gb_s, cell.busbw_gb_s), (5.0, 7.5), "1 MB in 200 µs");
        assert_eq!(cell.wrong, Some(3));
        let unchecked = [measured(0, 100.0, Some(1)), measured(1, 300.0, None)];
        assert_eq!(Cell::over_ranks(1, 1.0, &unchecked).expect("there are ranks").wrong, None);
        assert_eq!(Cell::over_ranks(1, 1.0, &[]), None);
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let samples = Samples::of((1..=200).rev().map(f64::from).collect()).expect("there are some");
        assert_eq!(samples, Samples { p50_us: 100.0, p99_us: 198.0, min_us: 1.0, max_us: 200.0 });
        let one = Samples::of(vec![7.0]).expect("there is one");
        assert_eq!((one.p50_us, one.p99_us), (7.0, 7.0));
        assert_eq!(Samples::of(Vec::new()), None);
    }

    #[test]
    fn over_the_ranks_the_extremes_stay_extremes() {
        let a = Samples { p50_us: 2.0, p99_us: 5.0, min_us: 1.0, max_us: 9.0 };
        let b = Samples { p50_us: 4.0, p99_us: 4.0, min_us: 3.0, max_us: 4.0 };
        let both = Samples { p50_us: 3.0, p99_us: 5.0, min_us: 1.0, max_us: 9.0 };
        assert_eq!(Samples::over_ranks(&[a, b]), Some(both));
    }

    #[test]
    fn nothing_moved_has_no_bandwidth() {
        assert_eq!(gigabytes_per_second(0, 3.0), 0.0);
        assert_eq!(gigabytes_per_second(8, 0.0), 0.0);
    }

    #[test]
    fn the_average_and_the_errors_are_those_of_all_cells() {
        let row = |out: Option<Cell>, inside: Option<Cell>| Row {
            size: 1000,
            count: 250,
            schedule: Schedule::default(),
            out_of_place: out,
            in_place: inside,
        };
        let rows = vec![
            row(Some(cell(1000, 1.0, Some(0))), Some(cell(1000, 0.5, Some(4)))),
            row(None, Some(cell(1000, 0.25, Some(1)))),
        ];
        let run = Run { ranks: 2, links: "shm".to_owned(), backend: None, rows };
        assert_eq!(run.average_busbw(), (1.0 + 2.0 + 4.0) / 3.0);
        assert_eq!(run.wrong(), Some(5));
        assert_eq!(
            Run { ranks: 2, links: String::new(), backend: None, rows: Vec::new() }.average_busbw(),
            0.0
        );
    }
}
