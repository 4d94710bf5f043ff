//! Faults that a thread hands over in a handler of signals, because answering them may take what it must not do there: wait
//! for a range, make room, log.
//!
//! A letter is written by the thread that touches, read by one of the fault threads, and its answer is read by the first one
//! again, which sleeps meanwhile. All of it is atomics and two system calls (a write to an eventfd, a futex), on memory that
//! was there before. Who waits also looks, at intervals, whether the map has ended, and then takes its letter back: whoever
//! ends a map, or locks its volume, waits for none of those who touch it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::futex;
use rustix::time::Timespec;

use crate::uffd::Fault;

/// How many threads have a letter under way at a time; more try again.
const LETTERS: usize = 64;

/// Between two looks of who waits whether the map has ended.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

const FREE: u32 = 0;
const WRITTEN_TO: u32 = 1;
const SENT: u32 = 2;
const BEING_READ: u32 = 3;
/// Being read, and nobody waits for the answer any more.
const DROPPED: u32 = 4;
const TRY_AGAIN: u32 = 5;
const FAILS: u32 = 6;

const STORES: u32 = 1;
const PROTECTED: u32 = 2;

#[derive(Debug, Default)]
struct Letter {
    state: AtomicU32,
    /// The kinds of the touch, as bits.
    touch: AtomicU32,
    address: AtomicU64,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Letters {
    event: OwnedFd,
    letters: [Letter; LETTERS],
}

impl Letters {
    pub(super) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, letters: std::array::from_fn(|_| Letter::default()) })
    }

    /// What becomes readable when a letter has come.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Hands a fault over and waits, in a handler of signals: whether the touch is to be tried again. `None` when there is no
    /// letter to be had now.
    pub(super) fn hand_over(&self, fault: Fault, ended: impl Fn() -> bool) -> Option<bool> {
        let claim = |letter: &&Letter| {
            letter.state.compare_exchange(FREE, WRITTEN_TO, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let letter = self.letters.iter().find(claim)?;
        let bit = |is: bool, bit| if is { bit } else { 0 };
        let kinds = bit(fault.stores, STORES) | bit(fault.write_protected, PROTECTED);
        letter.touch.store(kinds, Ordering::Relaxed);
        letter.address.store(fault.address, Ordering::Relaxed);
        letter.state.store(SENT, Ordering::Release);
        // It is refused only when the count is at its end, and then the event is there already.
        let _ = rustix::io::write(&self.event, &1_u64.to_le_bytes());
        Some(letter.wait(ended))
    }

    /// Has `resolve` answer at most `count_max` letters: whether the touch is to be tried again. Whether there were any.
    pub(super) fn answer(&self, count_max: u32, mut resolve: impl FnMut(Fault) -> bool) -> bool {
        // Before the look: what comes after it makes an event of its own.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        let mut count = 0;
        for letter in &self.letters {
            if letter.state.compare_exchange(SENT, BEING_READ, Ordering::Acquire, Ordering::Relaxed).is_err() {
                continue;
            }
            let kinds = letter.touch.load(Ordering::Relaxed);
            let address = letter.address.load(Ordering::Relaxed);
            let again =
                resolve(Fault { address, write_protected: kinds & PROTECTED != 0, stores: kinds & STORES != 0 });
            letter.answer(if again { TRY_AGAIN } else { FAILS });
            count += 1;
            if count == count_max {
                // Others may wait; so that they are not forgotten.
                let _ = rustix::io::write(&self.event, &1_u64.to_le_bytes());
                break;
            }
        }
        count > 0
    }
}

impl Letter {
    fn answer(&self, answer: u32) {
        if self.state.compare_exchange(BEING_READ, answer, Ordering::Release, Ordering::Relaxed).is_err() {
            self.state.store(FREE, Ordering::Release); // dropped meanwhile
            return;
        }
        // It fails for nobody: the word is here.
        let _ = futex::wake(&self.state, futex::Flags::PRIVATE, 1);
    }

    fn wait(&self, ended: impl Fn() -> bool) -> bool {
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state == TRY_AGAIN || state == FAILS {
                self.state.store(FREE, Ordering::Release);
                return state == TRY_AGAIN;
            }
            if ended() {
                let left = if state == SENT { FREE } else { DROPPED };
                if self.state.compare_exchange(state, left, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    return true; // the touch finds the end by itself
                }
                continue;
            }
            // Whatever it says: the state tells.
            let _ = futex::wait(&self.state, futex::Flags::PRIVATE, state, Some(&LOOK));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    fn fault(address: u64) -> Fault {
        Fault { address, write_protected: address.is_multiple_of(3), stores: address.is_multiple_of(2) }
    }

    #[test]
    fn every_letter_is_answered_once_and_with_what_it_asked() {
        const THREADS: u64 = 8;
        const ROUNDS: u64 = 500;
        let letters = Letters::new().unwrap();
        let answered = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let letters = &letters;
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let address = thread * ROUNDS + round;
                        let again = letters.hand_over(fault(address), || false);
                        assert_eq!(again, Some(!address.is_multiple_of(5)));
                    }
                });
            }
            while answered.load(Ordering::Relaxed) < THREADS * ROUNDS {
                letters.answer(3, |asked| {
                    assert_eq!(asked, fault(asked.address));
                    answered.fetch_add(1, Ordering::Relaxed);
                    !asked.address.is_multiple_of(5)
                });
            }
        });
        assert!(!letters.answer(1, |_| true), "none is left");
    }

    #[test]
    fn who_waits_for_a_map_that_ends_goes_on_and_its_letter_can_be_had_again() {
        let letters = Letters::new().unwrap();
        let (ended, reading) = (AtomicBool::new(true), AtomicBool::new(false));
        for _ in 0..2 * LETTERS {
            assert_eq!(letters.hand_over(fault(1), || ended.load(Ordering::SeqCst)), Some(true), "sent only");
        }
        thread::scope(|scope| {
            // The end comes while the letter is being read; the answer comes after that.
            ended.store(false, Ordering::SeqCst);
            let waiter = scope.spawn(|| letters.hand_over(fault(2), || reading.load(Ordering::SeqCst)));
            let mut waiter = Some(waiter);
            while waiter.is_some() {
                letters.answer(1, |_| {
                    reading.store(true, Ordering::SeqCst);
                    assert_eq!(waiter.take().unwrap().join().unwrap(), Some(true));
                    false
                });
            }
        });
        assert!(letters.letters.iter().all(|letter| letter.state.load(Ordering::SeqCst) == FREE));
    }
}
