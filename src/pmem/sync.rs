//! Whole-backing syncs that concurrent callers share, and the memory of a failed one.
//!
//! `fdatasync` covers everything stored before it began. A caller is therefore served by any sync that begins after its
//! call: while one runs, all who come wait for the next one, which one of them runs for all.
//!
//! A flush that failed may have dropped the dirty pages, and a later one would report success for lost bytes. So the first
//! failure is kept, and every later flush fails until the backing is reopened.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::error::MediaError;

/// How often blocks or the length of a file changed, which only a system call makes durable, and how many of those changes
/// are.
///
/// It begins with one that is not: whoever had the file before may have died with holes that he never made durable, and what
/// this process reads from them it would acknowledge.
#[derive(Debug)]
pub(super) struct Changes {
    made: AtomicU64,
    durable: AtomicU64,
}

impl Default for Changes {
    fn default() -> Self {
        Self { made: AtomicU64::new(1), durable: AtomicU64::new(0) }
    }
}

impl Changes {
    pub(super) fn count(&self) {
        self.made.fetch_add(1, Ordering::SeqCst);
    }

    /// How many changes were made, when not all of them are durable.
    pub(super) fn owed(&self) -> Option<u64> {
        let made = self.made.load(Ordering::SeqCst);
        (self.durable.load(Ordering::SeqCst) < made).then_some(made)
    }

    /// A system call that began when `count` changes were made has succeeded.
    pub(super) fn are_durable(&self, count: u64) {
        self.durable.fetch_max(count, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
pub(super) struct SharedSync {
    state: Mutex<State>,
    finished: Condvar,
    poisoned: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// How many syncs have begun.
    begun: u64,
    /// How many syncs have ended.
    ended: u64,
    /// The first failure: the number of the sync, and what the kernel said.
    failure: Option<(u64, Errno)>,
}

impl SharedSync {
    /// Returns when a sync that began after this call has ended. `sync` is run by one of the callers that wait together.
    pub(super) fn run(&self, sync: impl FnOnce() -> Result<(), Errno>) -> Result<(), MediaError> {
        self.check()?;
        let mut state = self.lock();
        let wanted = state.begun + 1;
        while state.ended < wanted {
            if state.begun > state.ended {
                state = self.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.begun += 1;
            let number = state.begun;
            drop(state);
            let result = sync();
            state = self.lock();
            state.ended = number;
            if let Err(errno) = result {
                self.poisoned.store(true, Ordering::Release);
                state.failure.get_or_insert((number, errno));
            }
            self.finished.notify_all();
            break;
        }
        match state.failure {
            Some((number, errno)) if number >= wanted => Err(MediaError::Flush(errno.into())),
            Some(_) => Err(MediaError::Poisoned),
            None => Ok(()),
        }
    }

    /// Makes every later flush fail.
    pub(super) fn poison(&self, errno: Errno) {
        self.poisoned.store(true, Ordering::Release);
        self.lock().failure.get_or_insert((0, errno));
    }

    /// Refuses when an earlier flush failed.
    pub(super) fn check(&self) -> Result<(), MediaError> {
        if self.poisoned.load(Ordering::Acquire) { Err(MediaError::Poisoned) } else { Ok(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn a_caller_is_never_served_by_a_sync_that_began_before_it() {
        let shared = Arc::new(SharedSync::default());
        let syncs = Arc::new(AtomicU64::new(0));
        let (started, is_started) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let first = {
            let (shared, syncs) = (Arc::clone(&shared), Arc::clone(&syncs));
            thread::spawn(move || {
                shared.run(|| {
                    started.send(()).unwrap();
                    released.recv().unwrap();
                    syncs.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
            })
        };
        is_started.recv().unwrap();
        let waiters: Vec<_> = (0..8)
            .map(|_| {
                let (shared, syncs) = (Arc::clone(&shared), Arc::clone(&syncs));
                thread::spawn(move || {
                    shared.run(|| {
                        syncs.fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    })
                })
            })
            .collect();
        thread::sleep(std::time::Duration::from_millis(50));
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()), "they wait for a sync of their own");
        release.send(()).unwrap();
        first.join().unwrap().unwrap();
        for waiter in waiters {
            waiter.join().unwrap().unwrap();
        }
        assert!((2..=9).contains(&syncs.load(Ordering::SeqCst)));
    }

    #[test]
    fn a_failure_is_reported_once_as_such_and_poisons() {
        let shared = SharedSync::default();
        shared.run(|| Ok(())).unwrap();
        assert!(matches!(shared.run(|| Err(Errno::IO)), Err(MediaError::Flush(_))));
        assert!(matches!(shared.run(|| panic!("must not run")), Err(MediaError::Poisoned)));
        assert!(matches!(shared.check(), Err(MediaError::Poisoned)));
    }

    #[test]
    fn poison_from_outside_stops_syncs() {
        let shared = SharedSync::default();
        shared.poison(Errno::IO);
        assert!(matches!(shared.run(|| Ok(())), Err(MediaError::Poisoned)));
    }
}
