//! Where the job's workers are reached, as far as their launchers have said.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::pipe::Contact;
use crate::membership::{Incarnation, MAX_WORKERS, View};

/// The most entries: the members of a view, and those that want to enter. A launcher that says more is not believed.
const ENTRIES_LIMIT: usize = 4 * MAX_WORKERS;

/// How often somebody who waits for an entry asks whether to give up.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// An address book. Shared by all threads of a worker.
#[derive(Debug, Default)]
pub(super) struct Book {
    entries: Mutex<HashMap<Incarnation, Contact>>,
    changed: Condvar,
}

impl Book {
    pub(super) fn insert(&self, contact: Contact) {
        let mut entries = self.lock();
        if entries.len() < ENTRIES_LIMIT {
            entries.insert(contact.incarnation, contact);
        }
        self.changed.notify_all();
    }

    pub(super) fn remove(&self, incarnation: Incarnation) {
        self.lock().remove(&incarnation);
    }

    pub(super) fn get(&self, incarnation: Incarnation) -> Option<Contact> {
        self.lock().get(&incarnation).cloned()
    }

    /// The members of a view in rank order, as soon as all are known. Blocks until then, until `deadline`, or until
    /// `give_up` says so.
    pub(super) fn members(
        &self,
        view: &View,
        deadline: Instant,
        give_up: impl Fn() -> bool,
    ) -> Result<Vec<Contact>, String> {
        let mut entries = self.lock();
        loop {
            let known: Option<Vec<Contact>> =
                view.members.iter().map(|member| entries.get(&member.incarnation).cloned()).collect();
            if let Some(known) = known {
                return Ok(known);
            }
            if give_up() || Instant::now() >= deadline {
                return Err(format!("nobody has said where all members of {} are reached", view.epoch));
            }
            let waited = self.changed.wait_timeout(entries, LOOK_INTERVAL);
            entries = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Incarnation, Contact>> {
        // Entries are put in and taken out whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
