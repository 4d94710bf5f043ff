//! Turns SIGBUS under a mapping into a mark that the access finds afterwards.
//!
//! A mapped page that the medium cannot supply (file truncated, memory poisoned, file system full) raises SIGBUS in the
//! thread that touches it, which by default ends the process. The handler here, installed once per process, looks the
//! address up among the registered mappings. Inside one it first marks the page in that mapping's bitmap of bad pages,
//! counts the fault, and then maps an anonymous page over the bad one, so that the interrupted instruction can finish on
//! harmless memory. Whoever accessed the page asks [`Registration::faults`] afterwards and finds the mark. Any other
//! SIGBUS goes to the handler that was there before, or ends the process as it would have.
//!
//! A bad page stays bad until its mapping is dropped. That makes racing threads safe: the mark is set before the
//! anonymous page can be seen, and it is never taken back, so a thread whose bytes went to or came from the anonymous
//! page finds the mark after its access, whichever thread took the signal. Were a page ever declared good again, a slow
//! thread could miss the time in which it was bad.
//!
//! The handler does nothing but atomic loads and stores, the `membarrier` and `mmap` system calls and, for foreign signals,
//! `sigaction` and `raise`: all async-signal-safe. It keeps `errno`. It must not be blocked: a synchronous signal that is
//! blocked ends the process.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::bitmap;
use crate::barrier;

/// One mapping as the handler sees it. Slots are never freed, so that the handler can walk the list without a lock; a
/// slot whose mapping is gone is used again.
#[derive(Debug)]
struct Slot {
    /// Odd while the fields below change. The handler skips a slot that changes under it.
    version: AtomicU64,
    start: AtomicUsize,
    end: AtomicUsize,
    page_bytes: AtomicUsize,
    bad_pages: AtomicPtr<AtomicU64>,
    faults: AtomicU64,
    taken: AtomicBool,
    next: Option<&'static Self>,
}

static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());
static REGISTERING: Mutex<()> = Mutex::new(());
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A mapping's entry with the handler. Dropping it takes the mapping out; it must go before the memory does.
#[derive(Debug)]
pub(super) struct Registration {
    slot: &'static Slot,
}

impl Registration {
    /// Tells the handler of `len_bytes` mapped bytes at `start`, replaced `page_bytes` at a time (a power of two), with the
    /// words of a [`bitmap::Bitmap`] that has a bit for each page and one more, which stands for all of them.
    ///
    /// # Safety
    ///
    /// Until the registration is dropped: the range stays mapped, belongs to one mapping whose owner never creates a
    /// reference into it, and `bad_pages` stays valid.
    pub(super) unsafe fn new(
        start: *const u8,
        len_bytes: usize,
        page_bytes: usize,
        bad_pages: *const AtomicU64,
    ) -> io::Result<Self> {
        install_handler()?;
        let _guard = REGISTERING.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = free_slot().unwrap_or_else(new_slot);
        slot.taken.store(true, Ordering::Relaxed);
        slot.change(|slot| {
            slot.start.store(start.addr(), Ordering::Relaxed);
            slot.end.store(start.addr() + len_bytes, Ordering::Relaxed);
            slot.page_bytes.store(page_bytes, Ordering::Relaxed);
            slot.bad_pages.store(bad_pages.cast_mut(), Ordering::Relaxed);
            slot.faults.store(0, Ordering::Relaxed);
        });
        Ok(Self { slot })
    }

    /// How many faults the mapping has had. When it is 0, no page is bad. Acquires the marks.
    #[inline]
    pub(super) fn faults(&self) -> u64 {
        self.slot.faults.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _guard = REGISTERING.lock().unwrap_or_else(PoisonError::into_inner);
        self.slot.change(|slot| {
            slot.start.store(0, Ordering::Relaxed);
            slot.end.store(0, Ordering::Relaxed);
            slot.bad_pages.store(ptr::null_mut(), Ordering::Relaxed);
        });
        self.slot.taken.store(false, Ordering::Relaxed);
    }
}

impl Slot {
    /// Changes the fields so that a handler on another thread sees none or all of the change.
    fn change(&self, change: impl FnOnce(&Self)) {
        self.version.fetch_add(1, Ordering::SeqCst);
        change(self);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// What the slot covers: start, end, page size and bitmap words. `None` when the slot changes meanwhile: then it is
    /// not the slot of a mapping that somebody is accessing.
    fn read(&self) -> Option<(usize, usize, usize, *const AtomicU64)> {
        let before = self.version.load(Ordering::SeqCst);
        let fields = (
            self.start.load(Ordering::SeqCst),
            self.end.load(Ordering::SeqCst),
            self.page_bytes.load(Ordering::SeqCst),
            self.bad_pages.load(Ordering::SeqCst).cast_const(),
        );
        let unchanged = before.is_multiple_of(2) && self.version.load(Ordering::SeqCst) == before;
        unchanged.then_some(fields)
    }
}

fn slots() -> impl Iterator<Item = &'static Slot> {
    // SAFETY: the list holds leaked slots only.
    let first = unsafe { SLOTS.load(Ordering::Acquire).as_ref() };
    std::iter::successors(first, |slot| slot.next)
}

fn free_slot() -> Option<&'static Slot> {
    slots().find(|slot| !slot.taken.load(Ordering::Relaxed))
}

/// Puts a new slot at the head of the list. The caller holds `REGISTERING`.
fn new_slot() -> &'static Slot {
    let slot = Box::leak(Box::new(Slot {
        version: AtomicU64::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page_bytes: AtomicUsize::new(0),
        bad_pages: AtomicPtr::new(ptr::null_mut()),
        faults: AtomicU64::new(0),
        taken: AtomicBool::new(false),
        next: slots().next(),
    }));
    SLOTS.store(slot, Ordering::Release);
    slot
}

fn install_handler() -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    barrier::prepare();
    // The previous handler is stored before ours can run.
    let previous = swap_action(None)?;
    let _ = PREVIOUS.set(previous);
    // SAFETY: all-zero bytes are a valid sigaction: no flags, empty mask, default handler.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    // SA_ONSTACK: a thread may be out of stack, and then has an alternative one from the standard library.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    swap_action(Some(&action))?;
    *installed = true;
    Ok(())
}

/// Reads the action for SIGBUS and, if there is one given, replaces it.
fn swap_action(new: Option<&libc::sigaction>) -> io::Result<libc::sigaction> {
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut old: libc::sigaction = unsafe { mem::zeroed() };
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: both pointers are null or valid for the call; our handler keeps to async-signal-safe calls.
    let result = unsafe { libc::sigaction(libc::SIGBUS, new, &raw mut old) };
    if result == 0 { Ok(old) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the C library gives every thread an errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the pointer is this thread's own errno.
    let saved = unsafe { *errno };
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler, and nobody else changes it.
    let fault = unsafe { &*info };
    let code = fault.si_code;
    // SAFETY: any siginfo has the bytes of the field; they are used only when the code says that they hold an address.
    let address = unsafe { fault.si_addr() }.addr();
    // The two codes of an access that the medium could not serve. Others (a misaligned access, an announcement of bad
    // memory that nobody touched) are not ours.
    let failed_access = matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR);
    if !(failed_access && absorb(address)) {
        pass_on(signal, info, context, code > 0);
    }
    // SAFETY: the pointer is this thread's own errno.
    unsafe { *errno = saved };
}

/// Handles a fault at `address` if it lies in a registered mapping.
fn absorb(address: usize) -> bool {
    for slot in slots() {
        let Some((start, end, page_bytes, bad_pages)) = slot.read() else { continue };
        if !(start..end).contains(&address) {
            continue;
        }
        let page = (address - start) / page_bytes;
        // SAFETY: the fault happened in this mapping, so its owner is in the middle of an access and cannot have dropped
        // the registration: the bitmap is alive, and it has a bit for each page of the mapping.
        unsafe { bitmap::insert_raw(bad_pages, page) };
        slot.faults.fetch_add(1, Ordering::SeqCst);
        barrier::heavy(); // before anybody can find the cover
        if cover(start + page * page_bytes, page_bytes) {
            return true;
        }
        // Each covered page is a mapping of its own, and a process may have so many only (vm.max_map_count). One cover
        // over everything needs fewer than there are now; all of the mapping is then bad.
        let whole = (end - start).div_ceil(page_bytes);
        // SAFETY: as above; the bitmap has one bit more than there are pages.
        unsafe { bitmap::insert_raw(bad_pages, whole) };
        barrier::heavy();
        return cover(start, end - start);
    }
    false
}

/// Maps anonymous memory over a bad page.
fn cover(start: usize, len_bytes: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the page belongs to a registered mapping, into which nobody holds a reference; raw accesses to it find
    // zeroed memory from now on, and the mark says so.
    let covered = unsafe {
        libc::mmap(ptr::without_provenance_mut(start), len_bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    covered != libc::MAP_FAILED
}

/// Gives a signal that is not ours to the previous handler, or lets the default action happen.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void, from_kernel: bool) {
    let previous = PREVIOUS.get().filter(|action| action.sa_sigaction != libc::SIG_DFL);
    match previous {
        Some(action) if action.sa_sigaction == libc::SIG_IGN && !from_kernel => {}
        Some(action) if action.sa_sigaction != libc::SIG_IGN => {
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: an SA_SIGINFO action holds a function of this type.
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    unsafe { mem::transmute(action.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: an action without SA_SIGINFO holds a function of this type.
                let handler: extern "C" fn(c_int) = unsafe { mem::transmute(action.sa_sigaction) };
                handler(signal);
            }
        }
        _ => die_by_default(signal, from_kernel),
    }
}

/// Restores the default action. A fault then happens again when the handler returns; a sent signal is sent once more.
fn die_by_default(signal: c_int, from_kernel: bool) {
    // SAFETY: all-zero bytes are the default action.
    let action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: the action is valid for the call.
    unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    if !from_kernel {
        // SAFETY: raising a signal in this thread has no memory effects; it is delivered when the handler returns.
        unsafe { libc::raise(signal) };
    }
}
