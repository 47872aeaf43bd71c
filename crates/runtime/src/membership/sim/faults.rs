//! What goes wrong in a simulated job.

use std::time::Duration;

use super::super::message::Evidence;
use super::super::worker::WorkerEvent;
use super::ms;
use super::world::{Happening, Place, World, name};

#[derive(Clone, Debug)]
pub(super) enum Fault {
    KillWorker(Place),
    KillLauncher(usize),
    KillAll,
    FreezeWorker(Place, Duration),
    FreezeLauncher(usize, Duration),
    /// Nothing passes from the first seat to the second.
    OneWay(usize, usize, Duration),
    /// Nothing passes to or from a seat.
    Isolate(usize, Duration),
    /// Nothing passes between those seats and the others.
    Partition(Vec<usize>, Duration),
    /// Per mille of the control messages are lost.
    Loss(u32, Duration),
    Leave(Place),
    /// A worker says of another that it does not move, whether that is so or not.
    Accuse(Place),
    /// The end of all faults.
    Peace,
}

impl World {
    /// Draws the faults of a run, between two moments; at the second one all of them end.
    pub(super) fn plan_faults(&mut self, from: Duration, to: Duration) {
        let count = self.rng.u32(1..7);
        for _ in 0..count {
            let at = from + (to - from).mul_f64(self.rng.f64());
            let seat = self.rng.usize(0..self.sites.len());
            let other = self.rng.usize(0..self.sites.len());
            let lasting = ms(self.rng.u64(20..2500));
            let kind = self.rng.u32(0..21);
            let worker = self.rng.usize(0..64);
            let side = (0..self.sites.len()).filter(|_| self.rng.bool()).collect();
            let loss = self.rng.u32(10..300);
            let fault = match kind {
                0..5 => Draft::Worker(worker, |place, _| Fault::KillWorker(place)),
                5..8 => Draft::Worker(worker, Fault::FreezeWorker),
                8 if worker.is_multiple_of(2) => Draft::Worker(worker, |place, _| Fault::Leave(place)),
                8 => Draft::Worker(worker, |place, _| Fault::Accuse(place)),
                9..12 => Draft::Whole(Fault::KillLauncher(seat)),
                12..14 => Draft::Whole(Fault::FreezeLauncher(seat, lasting)),
                14 => Draft::Whole(Fault::OneWay(seat, other, lasting)),
                15 => Draft::Whole(Fault::Isolate(seat, lasting)),
                16..18 => Draft::Whole(Fault::Partition(side, lasting)),
                18..20 => Draft::Whole(Fault::Loss(loss, lasting)),
                _ => Draft::Whole(Fault::KillAll),
            };
            let fault = match fault {
                Draft::Whole(fault) => fault,
                // Workers are named when the time comes; until then by their rank.
                Draft::Worker(rank, make) => {
                    let seat = rank % self.sites.len();
                    let life = u32::MAX;
                    make(Place { seat, life, child: super::super::launcher::Child(rank as u32) }, lasting)
                }
            };
            self.schedule(at.saturating_sub(self.now), Happening::Fault(fault));
        }
        self.schedule(to - self.now, Happening::Fault(Fault::Peace));
    }

    /// A place that was drawn before the run, as a worker that lives now.
    fn living(&self, place: Place) -> Option<Place> {
        if place.life != u32::MAX {
            return Some(place);
        }
        let places = self.places();
        (!places.is_empty()).then(|| places[place.child.0 as usize % places.len()])
    }

    pub(super) fn begin_fault(&mut self, fault: Fault) {
        if self.checks.peace && !matches!(fault, Fault::Peace) {
            return;
        }
        self.note(|| format!("FAULT {fault:?}"));
        let all = 0..self.sites.len();
        match fault {
            Fault::KillWorker(place) => {
                self.living(place).into_iter().for_each(|place| self.kill_worker(place));
            }
            Fault::KillLauncher(seat) => self.kill_launcher(seat, ms(1000)),
            Fault::KillAll => all.for_each(|seat| self.kill_launcher(seat, ms(1000))),
            Fault::FreezeWorker(place, lasting) => {
                let Some(place) = self.living(place) else { return };
                self.note(|| format!("worker {} is frozen", name(place)));
                self.freeze_worker(place, true);
                self.schedule(lasting, Happening::End(Fault::FreezeWorker(place, lasting)));
            }
            Fault::FreezeLauncher(seat, lasting) => {
                self.freeze_launcher(seat, true);
                self.schedule(lasting, Happening::End(fault));
            }
            Fault::OneWay(from, to, lasting) => {
                self.cuts.insert((from, to));
                self.schedule(lasting, Happening::End(fault));
            }
            Fault::Isolate(seat, lasting) => self.cut_off(&[seat], lasting),
            Fault::Partition(side, lasting) => self.cut_off(&side, lasting),
            Fault::Loss(per_mille, lasting) => {
                self.loss = per_mille;
                self.schedule(lasting, Happening::End(fault));
            }
            Fault::Leave(place) => {
                let Some(place) = self.living(place) else { return };
                self.schedule(
                    ms(0),
                    Happening::Worker { place, as_incarnation: None, event: WorkerEvent::Leave },
                );
            }
            Fault::Accuse(place) => self.accuse_somebody(place),
            Fault::Peace => self.make_peace(),
        }
    }

    fn accuse_somebody(&mut self, place: Place) {
        let Some(place) = self.living(place) else { return };
        let Some(process) = self.worker(place) else { return };
        let me = process.core.incarnation();
        let members = process.core.decision().map_or(Vec::new(), |decision| decision.view.members.clone());
        if let Some(peer) = members.iter().map(|member| member.incarnation).find(|&peer| peer != me) {
            let event = WorkerEvent::PeerClosed { peer, evidence: Evidence::NoProgress };
            self.schedule(ms(0), Happening::Worker { place, as_incarnation: None, event });
        }
    }

    fn cut_off(&mut self, side: &[usize], lasting: Duration) {
        for inside in side {
            for outside in (0..self.sites.len()).filter(|seat| !side.contains(seat)) {
                for (from, to) in [(*inside, outside), (outside, *inside)] {
                    self.cuts.insert((from, to));
                    self.schedule(lasting, Happening::End(Fault::OneWay(from, to, lasting)));
                }
            }
        }
    }

    pub(super) fn end_fault(&mut self, fault: Fault) {
        match fault {
            Fault::FreezeWorker(place, _) => self.freeze_worker(place, false),
            Fault::FreezeLauncher(seat, _) => self.freeze_launcher(seat, false),
            Fault::OneWay(from, to, _) => {
                self.cuts.remove(&(from, to));
            }
            Fault::Loss(..) => self.loss = 0,
            _ => {}
        }
    }

    fn make_peace(&mut self) {
        self.checks.peace = true;
        self.spite = 0;
        self.loss = 0;
        self.cuts.clear();
        for seat in 0..self.sites.len() {
            self.freeze_launcher(seat, false);
        }
        for place in self.places() {
            self.freeze_worker(place, false);
        }
    }
}

enum Draft {
    Whole(Fault),
    Worker(usize, fn(Place, Duration) -> Fault),
}
