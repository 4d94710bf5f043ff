//! Which process something belongs to: a forked child has copies of everything, and may use none of it.
//!
//! Keys lie on pages that a fork empties, while mappings of the medium are inherited: a child that went on would encrypt under
//! a schedule that everybody can compute, over what the parent has written. So whatever was opened carries an [`Owner`], and
//! every entry asks it. The answer costs a load and a comparison: a word that the kernel clears in the child as it forks
//! (`MADV_WIPEONFORK`, also for a raw `clone`), and that each process fills with a number of its own.
#![allow(unsafe_code)]

use std::io;
use std::mem::align_of;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

/// The numbers given out so far, counted on by every child: so a child never has the number of a parent.
static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// The word where the kernel has no `MADV_WIPEONFORK` (before Linux 4.14): the C library's `fork` clears it.
static WORD: AtomicU64 = AtomicU64::new(0);

/// The process that was here when something was opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    word: &'static AtomicU64,
    number: u64,
}

impl Owner {
    /// This process.
    pub(crate) fn here() -> Self {
        let word = Self::word();
        loop {
            let number = word.load(Ordering::Acquire);
            if number != 0 {
                return Self { word, number };
            }
            let mine = NUMBERS.fetch_add(1, Ordering::Relaxed) + 1;
            let _ = word.compare_exchange(0, mine, Ordering::AcqRel, Ordering::Acquire); // who came first has named us
        }
    }

    /// The word of this process and its children. Nobody waits for who makes it: a child may have been forked meanwhile.
    fn word() -> &'static AtomicU64 {
        static PLACE: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());
        if PLACE.load(Ordering::Acquire).is_null() {
            let made = ptr::from_ref(wiped_page().unwrap_or_else(cleared_word)).cast_mut();
            // Who comes second has made a page too many.
            let _ = PLACE.compare_exchange(ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire);
        }
        // SAFETY: it points to a word that is there for good, or is null.
        unsafe { PLACE.load(Ordering::Acquire).as_ref() }.expect("somebody has made it")
    }

    /// No process at all.
    pub(crate) fn nobody() -> Self {
        Self { number: 0, ..Self::here() }
    }

    /// Whether this process is the owner, and not a child of it.
    #[inline]
    pub(crate) fn is_here(&self) -> bool {
        self.word.load(Ordering::Relaxed) == self.number
    }
}

/// A value that each process has for itself: a child gets a fresh one, and never waits for a lock that was held in its parent,
/// nor for who was making the value. For statics only: what is made is there for good.
#[derive(Debug)]
pub(crate) struct PerProcess<T> {
    first: AtomicPtr<Generation<T>>,
}

#[derive(Debug)]
struct Generation<T> {
    owner: Owner,
    value: T,
    next: AtomicPtr<Self>,
}

impl<T: Default> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self { first: AtomicPtr::new(ptr::null_mut()) }
    }

    /// That of this process.
    pub(crate) fn here(&'static self) -> &'static T {
        let mut place = &self.first;
        loop {
            // SAFETY: what a place points to is never freed, and changes by atomics only.
            match unsafe { place.load(Ordering::Acquire).as_ref() } {
                Some(generation) if generation.owner.is_here() => return &generation.value,
                Some(generation) => place = &generation.next,
                None => {
                    let made = Generation { owner: Owner::here(), value: T::default(), next: AtomicPtr::default() };
                    let made = Box::into_raw(Box::new(made));
                    let placed = place.compare_exchange(ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire);
                    if placed.is_err() {
                        // SAFETY: it was made above, and nobody has it.
                        drop(unsafe { Box::from_raw(made) });
                    }
                }
            }
        }
    }
}

impl<T> PerProcess<Mutex<Weak<T>>> {
    /// What this process shares, made when nobody has it.
    ///
    /// # Errors
    ///
    /// Those of `make`.
    pub(crate) fn shared(&'static self, make: impl FnOnce() -> io::Result<T>) -> io::Result<Arc<T>> {
        let mut place = self.here().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = place.upgrade() {
            return Ok(shared);
        }
        let made = Arc::new(make()?);
        *place = Arc::downgrade(&made);
        Ok(made)
    }
}

/// A word on a page that is empty in a child.
fn wiped_page() -> Option<&'static AtomicU64> {
    let len_bytes = rustix::param::page_size();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
    let page = unsafe { mmap_anonymous(ptr::null_mut(), len_bytes, protection, MapFlags::PRIVATE) }.ok()?;
    // SAFETY: the page is the new mapping; the advice does not change what this process sees.
    unsafe { madvise(page, len_bytes, Advice::LinuxWipeOnFork) }.ok()?;
    debug_assert!(page.addr().is_multiple_of(align_of::<AtomicU64>()), "a page is aligned");
    // SAFETY: the page is mapped for good, aligned and zeroed, which is a valid value; nobody else has its address.
    Some(unsafe { &*page.cast::<AtomicU64>() })
}

fn cleared_word() -> &'static AtomicU64 {
    unsafe extern "C" fn clear() {
        WORD.store(0, Ordering::SeqCst);
    }
    // SAFETY: the function stores to an atomic, which it may do in a child that has just been forked.
    unsafe { libc::pthread_atfork(None, None, Some(clear)) };
    &WORD
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a forked child says of `question`.
    fn in_a_child(question: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child reads and writes atomics, and leaves without running destructors.
        match unsafe { libc::fork() } {
            0 => {
                let answer = i32::from(question());
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(answer) }
            }
            pid => {
                let mut status = 0;
                // SAFETY: waits for the child; the status is a local.
                assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
                assert!(libc::WIFEXITED(status), "{status:#x}");
                libc::WEXITSTATUS(status) == 1
            }
        }
    }

    #[test]
    fn a_child_is_not_the_owner_and_owns_what_it_opens() {
        let owner = Owner::here();
        assert!(owner.is_here() && Owner::here().is_here());
        assert!(in_a_child(|| !owner.is_here()));
        assert!(in_a_child(|| {
            let own = Owner::here();
            own.is_here() && !owner.is_here() && in_a_child(|| !own.is_here() && !owner.is_here())
        }));
        assert!(in_a_child(|| {
            // A grandchild whose parent never asked must not take the number of its grandparent.
            in_a_child(|| Owner::here().is_here() && !owner.is_here())
        }));
        assert!(owner.is_here());
    }

    #[test]
    fn a_child_has_shared_things_of_its_own_and_waits_for_no_lock_of_its_parent() {
        static SHARED: PerProcess<Mutex<Weak<u32>>> = PerProcess::new();
        let first = SHARED.shared(|| Ok(1)).unwrap();
        assert!(Arc::ptr_eq(&first, &SHARED.shared(|| Ok(2)).unwrap()));
        let held = SHARED.here().lock().unwrap();
        assert!(in_a_child(|| *SHARED.shared(|| Ok(3)).unwrap() == 3));
        drop((held, first));
        assert_eq!(*SHARED.shared(|| Ok(4)).unwrap(), 4);
        assert!(SHARED.shared(|| Err(io::ErrorKind::Other.into())).is_err());
    }
}
