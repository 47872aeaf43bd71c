//! The last operations of one communicator, written by the threads that run them and read by any.
//!
//! One thread issues, in order, and whoever runs an operation notes its start and its end. A reader must not wait for
//! either, since it wants to know what they hang in: so the cells are atomics, and a cell that changes while it is read
//! is left out. On x86-64 all of this compiles to plain loads and stores.
//!
//! ```text
//! cell    place   operation (4 words)   issued   started   ended
//!         0 while it is written         ticks; 0: not yet
//! ```

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::ticks;
use crate::operation::Operation;

/// How many operations are remembered, as by PyTorch's recorder.
pub(crate) const CAPACITY: usize = 2000;

/// The next power of two, so that a place is found without a division or a comparison.
const CELLS: usize = CAPACITY.next_power_of_two();

/// One operation; a cache line, so that an operation touches one.
#[derive(Default)]
#[repr(align(64))]
struct Cell {
    place: AtomicU64,
    operation: [AtomicU64; 4],
    issued: AtomicU64,
    started: AtomicU64,
    ended: AtomicU64,
}

/// The memory of the last [`CAPACITY`] operations.
pub(crate) struct Ring {
    /// Place n is in cell n modulo [`CELLS`].
    cells: Box<[Cell; CELLS]>,
}

/// Where an operation is noted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    /// The number of the operation among all of the ring, from 1.
    place: u64,
    issued: u64,
}

/// What a cell says, times in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) place: u64,
    pub(crate) operation: Operation,
    /// The number of a message among those from its sender to its receiver.
    pub(crate) message: u32,
    pub(crate) issued: u64,
    pub(crate) started: Option<u64>,
    pub(crate) ended: Option<u64>,
}

impl Ring {
    pub(crate) fn new() -> Self {
        let cells: Box<[Cell]> = (0..CELLS).map(|_| Cell::default()).collect();
        Self { cells: cells.try_into().unwrap_or_else(|_| unreachable!("there are as many")) }
    }

    /// Notes that an operation was issued, after `last`. Called by one thread at a time.
    #[inline]
    pub(crate) fn issue(&self, last: Option<Ticket>, operation: Operation, message: u32) -> Ticket {
        let ticket = Ticket { place: last.map_or(1, |last| last.place + 1), issued: ticks::now() };
        let cell = self.at(ticket);
        cell.place.store(0, Ordering::Relaxed);
        // Whoever reads a word that is written below reads this 0, or what follows it, afterwards.
        fence(Ordering::Release);
        for (cell, word) in cell.operation.iter().zip(operation.to_words(message)) {
            cell.store(word, Ordering::Relaxed);
        }
        cell.issued.store(ticket.issued, Ordering::Relaxed);
        cell.started.store(0, Ordering::Relaxed);
        cell.ended.store(0, Ordering::Relaxed);
        cell.place.store(ticket.place, Ordering::Release);
        ticket
    }

    /// Notes that the thread which has issued the operation runs it at once.
    #[inline]
    pub(crate) fn start_at_once(&self, ticket: Ticket) {
        self.at(ticket).started.store(ticket.issued, Ordering::Relaxed);
    }

    /// Notes that an operation begins to run, now.
    pub(crate) fn start(&self, ticket: Ticket) {
        if let Some(cell) = self.cell(ticket) {
            cell.started.store(ticks::now(), Ordering::Relaxed);
        }
    }

    /// Notes that an operation has ended well.
    #[inline]
    pub(crate) fn end(&self, ticket: Ticket) {
        if let Some(cell) = self.cell(ticket) {
            cell.ended.store(ticks::now(), Ordering::Relaxed);
        }
    }

    /// Forgets an operation that was refused.
    pub(crate) fn withdraw(&self, ticket: Ticket) {
        if let Some(cell) = self.cell(ticket) {
            cell.place.store(0, Ordering::Relaxed);
        }
    }

    #[inline]
    fn at(&self, ticket: Ticket) -> &Cell {
        &self.cells[ticket.place as usize % CELLS]
    }

    /// The cell, if nobody else has it by now. The answer may be out of date when [`CELLS`] operations wait to
    /// be run; then one of them has a wrong time.
    #[inline]
    fn cell(&self, ticket: Ticket) -> Option<&Cell> {
        Some(self.at(ticket)).filter(|cell| cell.place.load(Ordering::Relaxed) == ticket.place)
    }

    /// Forgets all operations.
    pub(crate) fn clear(&self) {
        self.cells.iter().for_each(|cell| cell.place.store(0, Ordering::Relaxed));
    }

    /// What is remembered, in the order in which it was issued.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self.cells.iter().filter_map(Cell::read).collect();
        entries.sort_unstable_by_key(|entry| entry.place);
        entries.drain(..entries.len().saturating_sub(CAPACITY));
        entries
    }
}

impl Cell {
    /// What it says, unless nothing or unless it changes meanwhile.
    fn read(&self) -> Option<Entry> {
        let place = self.place.load(Ordering::Acquire);
        let words = self.operation.each_ref().map(|word| word.load(Ordering::Relaxed));
        let time = |word: &AtomicU64| Some(word.load(Ordering::Relaxed)).filter(|&ticks| ticks > 0);
        let (issued, started, ended) = (time(&self.issued), time(&self.started), time(&self.ended));
        fence(Ordering::Acquire);
        if place == 0 || self.place.load(Ordering::Relaxed) != place {
            return None;
        }
        let (operation, message) = Operation::from_words(words)?;
        Some(Entry { place, operation, message, issued: issued?, started, ended })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;
    use crate::dtype::{DType, ReduceOp};
    use crate::operation::Kind;

    fn operation(number: u64) -> Operation {
        let (kind, dtype) = (Kind::AllReduce(ReduceOp::Sum), DType::F32);
        Operation { number, kind, dtype, count: number as usize, segment_len: 7, schedule: 1 }
    }

    #[test]
    fn the_last_two_thousand_operations_are_kept_in_order() {
        let ring = Ring::new();
        assert_eq!(ring.entries(), []);
        let mut last = None;
        for number in 1..=5000 {
            last = Some(ring.issue(last, operation(number), 0));
        }
        let numbers: Vec<u64> = ring.entries().iter().map(|entry| entry.operation.number).collect();
        assert_eq!(numbers, (3001..=5000).collect::<Vec<u64>>());
        ring.clear();
        assert_eq!(ring.entries(), []);
    }

    #[test]
    fn an_operation_is_issued_then_started_then_ended() {
        let ring = Ring::new();
        let first = ring.issue(None, operation(1), 0);
        let second = ring.issue(Some(first), operation(2), 9);
        ring.start_at_once(first);
        ring.start(second);
        ring.end(second);
        let [first, second] = ring.entries().try_into().expect("two");
        assert_eq!((first.started, first.ended), (Some(first.issued), None));
        assert!(
            second.started.is_some_and(|started| started >= second.issued) && second.ended >= second.started
        );
        assert_eq!((second.operation, second.message), (operation(2), 9));
    }

    #[test]
    fn the_end_of_an_operation_whose_cell_was_taken_changes_nothing() {
        let ring = Ring::new();
        let old = ring.issue(None, operation(1), 0);
        let mut last = old;
        (2..=CELLS as u64 + 1).for_each(|number| last = ring.issue(Some(last), operation(number), 0));
        ring.end(old);
        assert!(ring.entries().iter().all(|entry| entry.ended.is_none()));
    }

    #[test]
    fn an_operation_that_was_refused_is_forgotten() {
        let ring = Ring::new();
        let first = ring.issue(None, operation(1), 0);
        let refused = ring.issue(Some(first), operation(2), 0);
        ring.withdraw(refused);
        ring.issue(Some(refused), operation(2), 1);
        let messages: Vec<u32> = ring.entries().iter().map(|entry| entry.message).collect();
        assert_eq!(messages, [0, 1]);
    }

    #[test]
    fn a_reader_never_sees_half_of_an_operation() {
        let (ring, stop) = (Ring::new(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut last, mut number) = (None, 0);
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    last = Some(ring.issue(last, operation(number), 0));
                }
            });
            for _ in 0..200 {
                for entry in ring.entries() {
                    assert_eq!(entry.operation, operation(entry.place), "number and count are written apart");
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
