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
//! A mapping may also bring its pages in by SIGBUS (userfaultfd without a thread that answers): an [`AnsweredRange`] names a
//! function that does, in the thread that touches. The function decides whether the access is tried again or fails.
//!
//! The handler does nothing but atomic loads and stores, the `membarrier` and `mmap` system calls and, for foreign signals,
//! `sigaction`, `sigprocmask` and `raise`: all async-signal-safe, and so must be what an [`AnsweredRange`] names. It keeps
//! `errno`. It must not be blocked: a synchronous signal that is blocked ends the process. It may be entered again for memory
//! that it touches itself (a backing whose page is bad), but by no signal that comes from outside: those are masked while it
//! runs, so that no handler of the program finds this thread with a lock of ours. A handler that a SIGBUS is passed on to
//! has the mask that it would have had without us.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::bitmap;
use crate::barrier;
use crate::owner::PerProcess;

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
    /// An [`Answer`]; null for a mapping whose bad pages are replaced.
    answer: AtomicPtr<()>,
    /// What it is called with.
    argument: AtomicPtr<()>,
    /// How many handlers are about to call it, or do. Who takes the mapping out waits for them.
    answering: AtomicUsize,
    taken: AtomicBool,
    next: Option<&'static Self>,
}

/// What a slot covers.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Covered {
    version: u64,
    start: usize,
    end: usize,
    page_bytes: usize,
    bad_pages: *const AtomicU64,
    answer: *mut (),
    argument: *mut (),
}

static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());
static REGISTERING: PerProcess<Mutex<()>> = PerProcess::new();

/// The action that was there before ours; null before ours is.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

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
        let slot = take_slot(|slot| {
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
        self.slot.clear();
        self.slot.taken.store(false, Ordering::Release);
    }
}

/// Where and how a thread touched memory that was not there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touch {
    pub(crate) address: usize,
    /// The kernel says that the page itself is bad, rather than that nobody supplied it.
    pub(crate) poisoned: bool,
    /// A store, where the processor tells.
    pub(crate) stores: bool,
    /// The page is there and does not allow for what was done, where the processor tells.
    pub(crate) protected: bool,
    /// The alternate stack of the thread as it was interrupted.
    pub(crate) alternate: libc::stack_t,
}

/// What becomes of a touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is tried again.
    Again,
    /// It fails: the signal is the program's.
    Fails,
    /// It must not be, and ends the process.
    Refused,
}

/// Who answers the touches of a mapping, in a handler of signals. The argument is that of [`AnsweredRange::new`].
pub(crate) type Answerer = unsafe fn(*const (), &Touch) -> Answer;

/// A mapping whose touches are answered. Dropping it waits for the answers that are being given; it must go before the
/// memory does.
#[derive(Debug)]
pub(crate) struct AnsweredRange {
    slot: &'static Slot,
}

impl AnsweredRange {
    /// Has SIGBUS at `len_bytes` mapped bytes from `start` answered.
    ///
    /// # Errors
    ///
    /// When the handler cannot be installed.
    ///
    /// # Safety
    ///
    /// Until this is dropped: `argument` is valid for `answerer`, in every thread, and the range belongs to one mapping.
    pub(crate) unsafe fn new(
        start: *const u8,
        len_bytes: usize,
        answerer: Answerer,
        argument: *const (),
    ) -> io::Result<Self> {
        install_handler()?;
        let slot = take_slot(|slot| {
            slot.start.store(start.addr(), Ordering::Relaxed);
            slot.end.store(start.addr() + len_bytes, Ordering::Relaxed);
            slot.answer.store(answerer as *mut (), Ordering::Relaxed);
            slot.argument.store(argument.cast_mut(), Ordering::Relaxed);
        });
        Ok(Self { slot })
    }
}

impl Drop for AnsweredRange {
    fn drop(&mut self) {
        self.slot.clear();
        // A handler counts itself before it looks at the slot once more: it is seen here, or sees that the slot is clear.
        while self.slot.answering.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
        self.slot.taken.store(false, Ordering::Release);
    }
}

impl Slot {
    /// Changes the fields so that a handler on another thread sees none or all of the change.
    fn change(&self, change: impl FnOnce(&Self)) {
        self.version.fetch_add(1, Ordering::SeqCst);
        change(self);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes the mapping out: handlers that come later do not find it.
    fn clear(&self) {
        let _guard = REGISTERING.here().lock().unwrap_or_else(PoisonError::into_inner);
        self.change(|slot| {
            slot.start.store(0, Ordering::Relaxed);
            slot.end.store(0, Ordering::Relaxed);
            slot.bad_pages.store(ptr::null_mut(), Ordering::Relaxed);
            slot.answer.store(ptr::null_mut(), Ordering::Relaxed);
            slot.argument.store(ptr::null_mut(), Ordering::Relaxed);
        });
    }

    /// What the slot covers. `None` when the slot changes meanwhile: then it is not the slot of a mapping that somebody is
    /// accessing.
    fn read(&self) -> Option<Covered> {
        let version = self.version.load(Ordering::SeqCst);
        let covered = Covered {
            version,
            start: self.start.load(Ordering::SeqCst),
            end: self.end.load(Ordering::SeqCst),
            page_bytes: self.page_bytes.load(Ordering::SeqCst),
            bad_pages: self.bad_pages.load(Ordering::SeqCst).cast_const(),
            answer: self.answer.load(Ordering::SeqCst),
            argument: self.argument.load(Ordering::SeqCst),
        };
        let unchanged = version.is_multiple_of(2) && self.version.load(Ordering::SeqCst) == version;
        unchanged.then_some(covered)
    }
}

fn slots() -> impl Iterator<Item = &'static Slot> {
    // SAFETY: the list holds leaked slots only.
    let first = unsafe { SLOTS.load(Ordering::Acquire).as_ref() };
    std::iter::successors(first, |slot| slot.next)
}

/// A slot for a new mapping, which `fill` describes.
fn take_slot(fill: impl FnOnce(&Slot)) -> &'static Slot {
    let _guard = REGISTERING.here().lock().unwrap_or_else(PoisonError::into_inner);
    let slot = slots().find(|slot| !slot.taken.load(Ordering::Acquire)).unwrap_or_else(new_slot);
    slot.taken.store(true, Ordering::Relaxed);
    slot.change(fill);
    slot
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
        answer: AtomicPtr::new(ptr::null_mut()),
        argument: AtomicPtr::new(ptr::null_mut()),
        answering: AtomicUsize::new(0),
        taken: AtomicBool::new(false),
        next: slots().next(),
    }));
    SLOTS.store(slot, Ordering::Release);
    slot
}

fn install_handler() -> io::Result<()> {
    /// A child has the handler from its parent, and with it this.
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    let _guard = REGISTERING.here().lock().unwrap_or_else(PoisonError::into_inner);
    if INSTALLED.load(Ordering::Acquire) {
        return Ok(());
    }
    barrier::prepare();
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    let previous = swap_action(None)?;
    if previous.sa_sigaction == handler as usize {
        INSTALLED.store(true, Ordering::Release); // the parent had not said so yet
        return Ok(());
    }
    // The previous handler is stored before ours can run.
    PREVIOUS.store(Box::into_raw(Box::new(previous)), Ordering::Release);
    // SAFETY: all-zero bytes are a valid sigaction: no flags, empty mask, default handler.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // SA_ONSTACK: a thread may be out of stack, or have a small one (of a coroutine), and then has an alternative one.
    // SA_NODEFER: what answers a touch reads a backing, whose pages may be bad.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART | libc::SA_NODEFER;
    // SAFETY: the set is that of the action.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    for synchronous in [libc::SIGBUS, libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS] {
        // SAFETY: as above.
        unsafe { libc::sigdelset(&raw mut action.sa_mask, synchronous) };
    }
    swap_action(Some(&action))?;
    INSTALLED.store(true, Ordering::Release);
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
    let answer = match code {
        libc::BUS_ADRERR | libc::BUS_MCEERR_AR => answer(address, code == libc::BUS_MCEERR_AR, context),
        _ => Answer::Fails,
    };
    match answer {
        Answer::Again => {}
        Answer::Fails => pass_on(signal, info, context, code > 0),
        Answer::Refused => die_by_default(signal, true),
    }
    // SAFETY: the pointer is this thread's own errno.
    unsafe { *errno = saved };
}

/// Handles a fault at `address` if it lies in a registered mapping.
fn answer(address: usize, poisoned: bool, context: *mut c_void) -> Answer {
    for slot in slots() {
        let Some(covered) = slot.read() else { continue };
        if !(covered.start..covered.end).contains(&address) {
            continue;
        }
        if covered.answer.is_null() {
            return if absorb(slot, &covered, address) { Answer::Again } else { Answer::Fails };
        }
        slot.answering.fetch_add(1, Ordering::SeqCst);
        let answer = if slot.read() == Some(covered) {
            // SAFETY: only `AnsweredRange::new` stores to the field, and what it stores has this type.
            let answerer: Answerer = unsafe { mem::transmute(covered.answer) };
            // SAFETY: the kernel passes a valid context to an SA_SIGINFO handler, and nobody else changes it.
            let touch = touch(address, poisoned, unsafe { &*context.cast::<libc::ucontext_t>() });
            // SAFETY: the slot was not cleared when this handler was counted, so its owner waits until it is counted out.
            unsafe { answerer(covered.argument, &touch) }
        } else {
            Answer::Fails // the mapping has ended meanwhile
        };
        slot.answering.fetch_sub(1, Ordering::SeqCst);
        return answer;
    }
    Answer::Fails
}

/// What the processor and the kernel tell of a touch.
fn touch(address: usize, poisoned: bool, context: &libc::ucontext_t) -> Touch {
    #[cfg(target_arch = "x86_64")]
    let (stores, protected) = {
        let code = context.uc_mcontext.gregs[libc::REG_ERR as usize];
        (code & 2 != 0, code & 1 != 0)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (stores, protected) = (false, false);
    Touch { address, poisoned, stores, protected, alternate: context.uc_stack }
}

/// Marks and replaces the page at `address` of a backing.
fn absorb(slot: &Slot, covered: &Covered, address: usize) -> bool {
    let &Covered { start, end, page_bytes, bad_pages, .. } = covered;
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
    cover(start, end - start)
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
    // SAFETY: what it points to was there before the handler, and is never freed.
    let previous = unsafe { PREVIOUS.load(Ordering::Acquire).as_ref() };
    let previous = previous.filter(|action| action.sa_sigaction != libc::SIG_DFL);
    match previous {
        Some(action) if action.sa_sigaction == libc::SIG_IGN && !from_kernel => {}
        Some(action) if action.sa_sigaction != libc::SIG_IGN => {
            // SAFETY: the kernel passes a valid context to an SA_SIGINFO handler.
            let interrupted = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_sigmask };
            mask_as_for(action, signal, interrupted);
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

/// Masks what would be masked if the kernel had called the handler of `action` itself.
fn mask_as_for(action: &libc::sigaction, signal: c_int, interrupted: &libc::sigset_t) {
    /// The signals that Linux has; its sets are shorter than those of the C library.
    const SIGNAL_MAX: c_int = 64;
    // SAFETY: all-zero bytes are a valid, empty set.
    let mut masked: libc::sigset_t = unsafe { mem::zeroed() };
    for number in 1..=SIGNAL_MAX {
        let own = number == signal && action.sa_flags & libc::SA_NODEFER == 0;
        let in_set = |set: &libc::sigset_t| {
            // SAFETY: the set is valid for the call.
            unsafe { libc::sigismember(set, number) == 1 }
        };
        if own || in_set(interrupted) || in_set(&action.sa_mask) {
            // SAFETY: the set is a local one.
            unsafe { libc::sigaddset(&raw mut masked, number) };
        }
    }
    // SAFETY: the set is valid; returning from the signal restores the mask of the interrupted code.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const masked, ptr::null_mut()) };
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
