//! An adversary: a device in software that does nothing until it is looked at, and then in any legal order.
//!
//! Streams are queues. Somebody who asks whether something is done has a few steps made, each at the head of a stream
//! that chance picks; everything else stays undone. So whatever no wait enforces happens in an odd order sooner or
//! later, and with the same seed again. Memory that nobody has written, and memory that was freed, is poison; an
//! access outside of what is allocated panics. It proves that our waits are enough for the rules of streams as CUDA's
//! documentation has them, and nothing about a real device.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::host::Aligned;
use super::{CopySpan, Device, DeviceBuffer, DeviceError, Event, Pinned, Stream, Transfer};
use crate::dtype::DType;

/// What nobody has written. As a float of any size it is a small number, so that sums with it are wrong and not NaN.
const POISON: u8 = 0xA5;

/// The most steps that are made each time that somebody looks.
const STEPS: usize = 3;

/// Cheap to clone; all clones are one device.
#[derive(Clone)]
pub(crate) struct Software {
    state: Arc<Mutex<State>>,
}

struct State {
    chance: fastrand::Rng,
    memory: Memory,
    streams: BTreeMap<Stream, VecDeque<Step>>,
    /// How often each event was recorded, and how many of these marks have run.
    events: Vec<(u64, u64)>,
    /// What the next call fails with.
    failure: Option<&'static str>,
}

/// Device memory, by the address of each allocation.
#[derive(Default)]
pub(crate) struct Memory {
    blocks: BTreeMap<u64, Vec<u8>>,
    /// Those that are somebody else's by now: poison, whatever is written into them.
    freed: BTreeSet<u64>,
    next: u64,
}

type Kernel = Box<dyn FnOnce(&mut Memory) + Send>;

enum Step {
    Mark { event: Event, mark: u64 },
    Wait { event: Event, mark: u64 },
    Down { spans: Vec<CopySpan>, buffer: Shared },
    Up { spans: Vec<CopySpan>, buffer: Shared },
    Kernel(Kernel),
}

/// A buffer that a copy has; `None` once somebody has taken it back.
type Shared = Arc<Mutex<Lent>>;

struct Lent {
    buffer: Option<Box<dyn Pinned>>,
    done: bool,
}

impl Software {
    pub(crate) fn new(seed: u64) -> Self {
        let state = State {
            chance: fastrand::Rng::with_seed(seed),
            memory: Memory::default(),
            streams: BTreeMap::new(),
            events: Vec::new(),
            failure: None,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Allocates elements.
    pub(crate) fn alloc(&self, len: usize, dtype: DType) -> DeviceBuffer {
        let address = self.lock().memory.alloc(len * dtype.size());
        DeviceBuffer::checked(address, len, dtype)
    }

    /// Enqueues work of the test's own.
    pub(crate) fn launch(&self, stream: Stream, kernel: impl FnOnce(&mut Memory) + Send + 'static) {
        self.lock().queue(stream).push_back(Step::Kernel(Box::new(kernel)));
    }

    /// Runs everything, in some order.
    pub(crate) fn synchronize(&self) {
        let mut state = self.lock();
        while state.step() {}
        assert!(state.streams.values().all(VecDeque::is_empty), "streams wait for each other");
    }

    /// The content of a buffer, as it is now.
    pub(crate) fn read(&self, buffer: DeviceBuffer) -> Vec<u8> {
        self.lock().memory.bytes(buffer.address(), buffer.len() * buffer.dtype().size()).to_vec()
    }

    /// Frees an allocation at once, whatever still uses it or is going to.
    pub(crate) fn free(&self, buffer: DeviceBuffer) {
        self.lock().memory.freed.insert(buffer.address());
    }

    /// A stream that waits for what never happens.
    pub(crate) fn stalled_stream(&self) -> Stream {
        let stream = self.new_stream().expect("it has streams");
        let event = self.new_event().expect("it has events");
        self.lock().queue(stream).push_back(Step::Wait { event, mark: 1 });
        stream
    }

    /// Has the next copy fail.
    pub(crate) fn fail_next_copy(&self, reason: &'static str) {
        self.lock().failure = Some(reason);
    }

    fn enqueue_copy(
        &self,
        stream: Stream,
        buffer: Box<dyn Pinned>,
        step: impl FnOnce(Shared) -> Step,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        let mut state = self.lock();
        if let Some(reason) = state.failure.take() {
            return Err(DeviceError { call: "copy", reason: reason.to_owned() });
        }
        let lent = Arc::new(Mutex::new(Lent { buffer: Some(buffer), done: false }));
        state.queue(stream).push_back(step(lent.clone()));
        Ok(Box::new(SoftwareTransfer { device: self.clone(), lent }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Software {
    fn share(&self) -> Box<dyn Device> {
        Box::new(self.clone())
    }

    fn new_stream(&self) -> Result<Stream, DeviceError> {
        // Other devices have none of the same number.
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let stream = Stream(NUMBER.fetch_add(1, Ordering::Relaxed));
        self.lock().streams.insert(stream, VecDeque::new());
        Ok(stream)
    }

    fn new_event(&self) -> Result<Event, DeviceError> {
        let mut state = self.lock();
        state.events.push((0, 0));
        Ok(Event(state.events.len() as u64 - 1))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let (marks, _) = &mut state.events[event.0 as usize];
        *marks += 1;
        let mark = *marks;
        state.queue(stream).push_back(Step::Mark { event, mark });
        Ok(())
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        let mut state = self.lock();
        // The last mark at this moment: a later one does not count, and without any there is nothing to wait for.
        let (mark, _) = state.events[event.0 as usize];
        state.queue(stream).push_back(Step::Wait { event, mark });
        Ok(())
    }

    fn is_done(&self, event: Event) -> Result<bool, DeviceError> {
        let mut state = self.lock();
        state.some_steps();
        let (marks, run) = state.events[event.0 as usize];
        Ok(marks == run)
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<Box<dyn Pinned>, DeviceError> {
        Ok(Box::new(Aligned::filled(bytes, POISON)))
    }

    fn copy_to_host(
        &self,
        spans: Vec<CopySpan>,
        buffer: Box<dyn Pinned>,
        stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        self.enqueue_copy(stream, buffer, |buffer| Step::Down { spans, buffer })
    }

    fn copy_to_device(
        &self,
        buffer: Box<dyn Pinned>,
        spans: Vec<CopySpan>,
        stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        self.enqueue_copy(stream, buffer, |buffer| Step::Up { spans, buffer })
    }
}

impl State {
    fn queue(&mut self, stream: Stream) -> &mut VecDeque<Step> {
        self.streams.get_mut(&stream).expect("a stream of this device")
    }

    /// What happens when somebody looks.
    fn some_steps(&mut self) {
        for _ in 0..self.chance.usize(0..=STEPS) {
            self.step();
        }
    }

    /// Runs the head of a stream that may run; `false` if there is none.
    fn step(&mut self) -> bool {
        let may_run = |(stream, steps): (&Stream, &VecDeque<Step>)| match steps.front()? {
            Step::Wait { event, mark } if self.events[event.0 as usize].1 < *mark => None,
            _ => Some(*stream),
        };
        let ready: Vec<Stream> = self.streams.iter().filter_map(may_run).collect();
        let Some(&stream) = self.chance.choice(&ready) else { return false };
        match self.queue(stream).pop_front().expect("it has a head") {
            Step::Mark { event, mark } => self.events[event.0 as usize].1 = mark,
            Step::Wait { .. } => {}
            Step::Kernel(kernel) => kernel(&mut self.memory),
            Step::Down { spans, buffer } => self.copy_down(&spans, &buffer),
            Step::Up { spans, buffer } => self.copy_up(&spans, &buffer),
        }
        true
    }

    fn copy_down(&mut self, spans: &[CopySpan], lent: &Shared) {
        let mut lent = lock(lent);
        lent.done = true;
        // Taken back already: the host has seen what was in it before.
        let Some(buffer) = &mut lent.buffer else { return };
        for span in spans {
            let bytes = self.memory.bytes(span.address, span.bytes);
            buffer.bytes_mut()[span.offset..][..span.bytes].copy_from_slice(bytes);
        }
    }

    fn copy_up(&mut self, spans: &[CopySpan], lent: &Shared) {
        let mut lent = lock(lent);
        lent.done = true;
        for span in spans {
            let bytes = self.memory.bytes(span.address, span.bytes);
            match &lent.buffer {
                Some(buffer) => bytes.copy_from_slice(&buffer.bytes()[span.offset..][..span.bytes]),
                // Taken back already: whatever the host has done with it by now.
                None => bytes.fill(POISON),
            }
        }
    }
}

impl Memory {
    fn alloc(&mut self, bytes: usize) -> u64 {
        // Far apart, so that a range never reaches into another allocation.
        let address = 0xD000_0000_0000 + self.next * (1 << 32);
        self.next += 1;
        self.blocks.insert(address, vec![POISON; bytes]);
        address
    }

    /// Writes the elements of a buffer.
    pub(crate) fn write(&mut self, buffer: DeviceBuffer, bytes: &[u8]) {
        self.bytes(buffer.address(), bytes.len()).copy_from_slice(bytes);
    }

    /// Makes a buffer what memory is that somebody else may have by now.
    pub(crate) fn poison(&mut self, buffer: DeviceBuffer) {
        self.bytes(buffer.address(), buffer.len() * buffer.dtype().size()).fill(POISON);
    }

    /// Copies a buffer to another one of the same size.
    pub(crate) fn copy(&mut self, from: DeviceBuffer, to: DeviceBuffer) {
        let bytes = self.bytes(from.address(), from.len() * from.dtype().size()).to_vec();
        self.write(to, &bytes);
    }

    pub(crate) fn read_byte(&mut self, buffer: DeviceBuffer) -> u8 {
        self.bytes(buffer.address(), 1)[0]
    }

    pub(crate) fn read(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        if bytes == 0 { Vec::new() } else { self.bytes(address, bytes).to_vec() }
    }

    pub(crate) fn write_at(&mut self, address: u64, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.bytes(address, bytes.len()).copy_from_slice(bytes);
        }
    }

    fn bytes(&mut self, address: u64, bytes: usize) -> &mut [u8] {
        let (start, block) = self.blocks.range_mut(..=address).next_back().expect("an allocated address");
        if self.freed.contains(start) {
            block.fill(POISON);
        }
        let offset = (address - start) as usize;
        &mut block[offset..offset + bytes]
    }
}

struct SoftwareTransfer {
    device: Software,
    lent: Shared,
}

impl Transfer for SoftwareTransfer {
    fn is_done(&mut self) -> Result<bool, DeviceError> {
        self.device.lock().some_steps();
        Ok(lock(&self.lent).done)
    }

    /// Unlike a real one, gives the buffer back at once: somebody who has not waited gets what is in it.
    fn finish(self: Box<Self>) -> Box<dyn Pinned> {
        let mut lent = lock(&self.lent);
        let mut buffer = lent.buffer.take().expect("it is given back once");
        if !lent.done {
            buffer.bytes_mut().fill(POISON);
        }
        buffer
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
