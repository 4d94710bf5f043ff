//! Faults that are answered by the thread that touches, in the handler of SIGBUS (`UFFD_FEATURE_SIGBUS`).
//!
//! A touch of an absent page raises SIGBUS; the handler (`pmem::sigbus`) finds the map and calls [`answer`] here. The page is
//! filled by the code that the fault threads use, `Volume::fill_at_once` instead of `fill`: it takes its range only if
//! nobody has it, evicts nothing, allocates nothing and logs nothing. Then the instruction is tried again.
//!
//! Whatever is not to be had at once is handed to a fault thread by a [letter](super::letters), and this thread sleeps until it
//! is answered, as it would without this file:
//!
//! | what the thread finds | what it does |
//! |---|---|
//! | the page is absent, its range is free, there is room | fills it (and, in a sequential run, those behind it) |
//! | the page was filled meanwhile, by another thread or map | maps it |
//! | the range is held: another fill, a request, a write-back, an eviction, a window that a re-key moves | looks again for some microseconds, then a letter: its fault thread stands in line |
//! | no room within the bound | a letter: the fault thread evicts a batch, so that the next touches have room |
//! | a store that is trapped (`Tracking::Trap`) | a letter: the mark is behind a lock |
//! | a transform is under way (re-key, relocation) | a letter: the boundary is behind a lock |
//! | media cannot read the page | a letter: the fault thread reads it once more, poisons the page and logs; the signal is the program's |
//! | the page was poisoned before | the signal is the program's |
//! | the map was revoked (`lock`, `close`, given up), also while its letter waits | the signal is the program's |
//! | the thread holds a range of this volume or waits for one: a handler of signals came upon it in a call of ours | ends the process with a message: it would wait for itself |
//! | the thread answers a touch already | ends the process with a message |
//! | this is a forked child | the signal is the program's: the child has no map |
//! | all stacks are in use | looks again, then a letter |
//!
//! A resize changes nothing here: it happens without maps only. `close` revokes the map, takes it out of the handler's list
//! (which waits for those who are in [`answer`]), and only then ends its fault threads.
//!
//! The handler begins on the thread's alternate stack, if it has one, which may be no larger than a signal frame (8 KiB in the
//! threads of the standard library), and otherwise on its ordinary one. Decrypting takes more, so it is done on a stack of
//! our own. A SIGBUS of a bad page of the backing comes on top of it: so the kernel has to know that stack as the alternate
//! one meanwhile, or would begin at the top of the thread's, where the interrupted handler still is.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::{hint, thread};

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};

use super::ahead::FaultAhead;
use super::core::{Core, scratch};
use super::letters::Letters;
use crate::owner::{Owner, PerProcess};
use crate::pmem::{Answer, AnsweredRange, Touch};
use crate::secret::SecretBytes;
use crate::spawn::thread_number;
use crate::uffd::Fault;
use crate::volume::window::{AtOnce, BATCH_PAGES, Marks, PAGE_BYTES};

/// Stack for a fill in bytes: the kernels of AES-XTS and what overwrites their stack, which is 32 KiB without optimisation.
const STACK_BYTES: usize = 128 << 10;

/// How many threads fill at a time: as many as run, but no fewer and no more than that. Nobody waits with a place.
const PLACES: Range<usize> = 4..32;

/// How often a thread looks whether a page can be had, before it hands the fault over: first it watches, then it lets others
/// run.
const WATCHES: u32 = 4;
const YIELDS: u32 = 8;

/// How long it watches at a time, in turns of a loop: about a microsecond.
const WATCH: u32 = 50;

/// Whether a touch says that it is a store, and that a page is protected. Otherwise it may be both.
pub(super) const TELLS: bool = cfg!(target_arch = "x86_64");

const NESTED: &str = "daxcrypt: a direct map was touched while a touch of one was being answered in the same thread\n";
const HELD: &str = "daxcrypt: a direct map was touched by a thread that is in a call of its volume: a handler of signals \
                    must not touch a map that answers faults in the thread\n";

/// What a map has for it.
#[derive(Debug)]
pub(super) struct InThread {
    places: Arc<Places>,
    letters: Letters,
    /// Taken if it is free: who does not get it brings one page in.
    ahead: Mutex<FaultAhead>,
}

/// The places of a process where threads fill.
#[derive(Debug)]
struct Places(Vec<Place>);

/// A stack and room for plaintext on its way.
struct Place {
    /// Who has it; 0 for nobody.
    thread: AtomicUsize,
    stack: Stack,
    scratch: UnsafeCell<SecretBytes>,
}

// SAFETY: the scratch is reached by whoever has put its number into `thread`, alone.
unsafe impl Sync for Place {}

/// A place that this thread has, until it is dropped.
struct Taken<'a>(&'a Place);

/// What is to be done on the stack of a place, and what came of it.
struct Work<'a> {
    core: &'a Core,
    touch: &'a Touch,
    place: &'a Taken<'a>,
    pages: Range<u64>,
    done: AtOnce,
}

impl InThread {
    pub(super) fn new() -> io::Result<Self> {
        static PLACES_HERE: PerProcess<Mutex<Weak<Places>>> = PerProcess::new();
        Ok(Self { places: PLACES_HERE.shared(Places::new)?, letters: Letters::new()?, ahead: Mutex::default() })
    }

    pub(super) const fn letters(&self) -> &Letters {
        &self.letters
    }

    /// Has the touches of a map answered, until the range is dropped. Its fault threads end after that.
    pub(super) fn begin(core: &Arc<Core>) -> io::Result<AnsweredRange> {
        let range = core.view.addresses(core.view.range());
        let len_bytes = usize::try_from(range.end - range.start).expect("64-bit targets only");
        // SAFETY: `DaxMapping` has the core until it has dropped what is returned; `Core` is `Sync`, and the view its own.
        unsafe { AnsweredRange::new(core.view.start(), len_bytes, answer, Arc::as_ptr(core).cast()) }
    }
}

/// Answers a touch of the map of `core`.
///
/// # Safety
///
/// `core` is a [`Core`] that lives until this returns.
unsafe fn answer(core: *const (), touch: &Touch) -> Answer {
    // SAFETY: the caller's promise.
    let core = unsafe { &*core.cast::<Core>() };
    let Some(in_thread) = core.in_thread() else { return Answer::Fails };
    let ended = || core.view.revoked() || core.broken();
    if touch.poisoned || !core.volume.is_here() || ended() {
        return Answer::Fails;
    }
    if in_thread.places.have_this_thread() {
        return refuse(NESTED);
    }
    let page_address = touch.address as u64 - touch.address as u64 % PAGE_BYTES;
    let start = page_address - core.start_address() + core.view.range().start;
    if fill(core, in_thread, touch, start) {
        return Answer::Again; // returning restores the alternate stack
    }
    restore(&touch.alternate); // the program's handler may come next
    if core.volume.is_entered_here() {
        return refuse(HELD);
    }
    let fault =
        Fault { address: touch.address as u64, write_protected: touch.protected, stores: touch.stores || !TELLS };
    loop {
        match in_thread.letters.hand_over(fault, ended) {
            Some(true) => return Answer::Again,
            Some(false) => return Answer::Fails,
            None if ended() => return Answer::Fails,
            None => thread::yield_now(),
        }
    }
}

/// Whether the page at logical `start` was filled.
fn fill(core: &Core, in_thread: &InThread, touch: &Touch, start: u64) -> bool {
    if matches!(core.view.marks(), Marks::Trapped(_)) && (touch.protected || !TELLS) {
        return false;
    }
    let count_max = BATCH_PAGES.min(core.window.page_count_max() / 4);
    let count = in_thread.ahead.try_lock().map_or(1, |mut ahead| ahead.pages(start / PAGE_BYTES, count_max));
    let mut pages = start..(start + count * PAGE_BYTES).min(core.view.range().end);
    for look in 0..WATCHES + YIELDS {
        let done = match in_thread.places.take() {
            Some(place) => place.fill(core, touch, pages.clone()),
            None => AtOnce::Busy,
        };
        match done {
            AtOnce::Filled => return true,
            AtOnce::Refused if pages.end - pages.start == PAGE_BYTES => return false,
            AtOnce::Busy if look >= WATCHES => thread::yield_now(),
            AtOnce::Busy => (0..WATCH).for_each(|_| hint::spin_loop()),
            AtOnce::Refused => {}
        }
        pages.end = start + PAGE_BYTES; // what comes after it was a wish
    }
    false
}

fn refuse(message: &str) -> Answer {
    // SAFETY: the bytes are there; whether anybody reads them or not.
    unsafe { libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len()) };
    Answer::Refused
}

impl Places {
    fn new() -> io::Result<Self> {
        let running = thread::available_parallelism().map_or(1, usize::from);
        let count = (2 * running).clamp(PLACES.start, PLACES.end);
        let place = |_| {
            let scratch = UnsafeCell::new(scratch()?);
            Ok(Place { thread: AtomicUsize::new(0), stack: Stack::new()?, scratch })
        };
        Ok(Self((0..count).map(place).collect::<io::Result<_>>()?))
    }

    fn take(&self) -> Option<Taken<'_>> {
        let mine = thread_number();
        let take =
            |place: &&Place| place.thread.compare_exchange(0, mine, Ordering::Acquire, Ordering::Relaxed).is_ok();
        self.0.iter().find(take).map(Taken)
    }

    /// Whether this thread has one: then it is in the middle of an answer.
    fn have_this_thread(&self) -> bool {
        let mine = thread_number();
        self.0.iter().any(|place| place.thread.load(Ordering::Relaxed) == mine)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::Release);
    }
}

impl Taken<'_> {
    /// Fills `pages` on the stack of this place.
    fn fill(&self, core: &Core, touch: &Touch, pages: Range<u64>) -> AtOnce {
        let mut work = Work { core, touch, place: self, pages, done: AtOnce::Refused };
        // SAFETY: the stack is this place's, and so this thread's alone; `fill_on_stack` takes what it is given here.
        unsafe { call_on(self.0.stack.top(), fill_on_stack, (&raw mut work).cast()) };
        work.done
    }
}

/// # Safety
///
/// `work` is a [`Work`] that nobody else uses.
unsafe extern "C" fn fill_on_stack(work: *mut c_void) {
    // SAFETY: the caller's promise.
    let work = unsafe { &mut *work.cast::<Work<'_>>() };
    let Taken(place) = work.place;
    // Without an alternate stack signals stay on the one that is in use.
    if work.touch.alternate.ss_flags & libc::SS_DISABLE == 0 {
        restore(&place.stack.as_alternate());
    }
    // SAFETY: this thread has the place, and comes here once while it has it.
    let scratch = unsafe { &mut *place.scratch.get() };
    work.done = work.core.bring_at_once(&work.pages, work.touch.stores, scratch);
}

/// Makes `stack` the alternate one of this thread.
fn restore(stack: &libc::stack_t) {
    // SAFETY: the memory stays while it is the alternate stack: it is that of a place that this thread has, or was it before.
    unsafe { libc::sigaltstack(stack, ptr::null_mut()) };
}

/// Calls `run(argument)` on the stack that ends at `top`.
///
/// # Safety
///
/// Nobody else uses the stack, `top` is aligned to 16 bytes, and `run` takes `argument` and does not unwind.
unsafe fn call_on(top: *mut u8, run: unsafe extern "C" fn(*mut c_void), argument: *mut c_void) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the stack pointer comes back from a register that `run` must preserve; everything else that it may change is
    // named.
    unsafe {
        std::arch::asm!(
            "xchg rsp, r12",
            "call {run}",
            "mov rsp, r12",
            run = in(reg) run,
            inout("r12") top => _,
            inout("rdi") argument => _,
            clobber_abi("C"),
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "mov x20, sp",
            "mov sp, {top}",
            "blr {run}",
            "mov sp, x20",
            top = in(reg) top,
            run = in(reg) run,
            out("x20") _,
            inout("x0") argument => _,
            clobber_abi("C"),
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let _ = top; // the thread's own stack has to do
        // SAFETY: the caller's promise.
        unsafe { run(argument) };
    }
}

/// Pages for a stack, and one below them that nobody can touch.
#[derive(Debug)]
struct Stack {
    start: *mut c_void,
    owner: Owner,
}

// SAFETY: the memory belongs to this value, and is reached by whoever has its place.
unsafe impl Send for Stack {}
// SAFETY: the address allows nothing by itself.
unsafe impl Sync for Stack {}

impl Stack {
    fn new() -> io::Result<Self> {
        let len_bytes = STACK_BYTES + Self::guard_bytes();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len_bytes, protection, MapFlags::PRIVATE) }?;
        let stack = Self { start, owner: Owner::here() };
        // SAFETY: the page is the first one of the new mapping.
        unsafe { mprotect(start, Self::guard_bytes(), MprotectFlags::empty()) }?;
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: the range is the new mapping; neither advice changes a byte of it.
            unsafe { madvise(start, len_bytes, advice) }?;
        }
        Ok(stack)
    }

    fn guard_bytes() -> usize {
        rustix::param::page_size()
    }

    /// Where it begins; it grows downwards.
    fn top(&self) -> *mut u8 {
        self.start.cast::<u8>().wrapping_add(Self::guard_bytes() + STACK_BYTES)
    }

    fn as_alternate(&self) -> libc::stack_t {
        let usable = self.start.cast::<u8>().wrapping_add(Self::guard_bytes());
        libc::stack_t { ss_sp: usable.cast(), ss_flags: 0, ss_size: STACK_BYTES }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if self.owner.is_here() {
            // SAFETY: the mapping is this value's, and nobody has its place any more.
            let unmapped = unsafe { munmap(self.start, STACK_BYTES + Self::guard_bytes()) };
            debug_assert!(unmapped.is_ok(), "munmap of an own mapping: {unmapped:?}");
        }
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("thread", &self.thread).field("stack", &self.stack).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::mem;

    use super::*;
    use crate::dax::{FaultsBy, MapOptions};
    use crate::volume::Volume;

    fn touch(address: usize) -> Touch {
        let alternate = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        Touch { address, poisoned: false, stores: false, protected: false, alternate }
    }

    #[test]
    fn a_touch_is_answered_once_at_a_time_in_a_thread() {
        let volume = Arc::new(Volume::ephemeral(1 << 20).unwrap());
        let map = volume.map(0..1 << 20, &MapOptions::new().faults(FaultsBy::InThread)).unwrap();
        let core = map.core();
        let ask = |page: usize| {
            let touch = touch(map.as_ptr().addr() + page * 4096 + 5);
            // SAFETY: the map lives.
            unsafe { answer(Arc::as_ptr(core).cast(), &touch) }
        };
        assert_eq!(ask(3), Answer::Again);
        assert_eq!(volume.resident_bytes(), 4096);
        assert_eq!(ask(3), Answer::Again, "somebody else was faster");
        let places = &core.in_thread().unwrap().places;
        let taken = places.take().unwrap();
        assert_eq!(ask(4), Answer::Refused, "this thread is in the middle of an answer");
        assert_eq!(thread::scope(|scope| scope.spawn(|| ask(4)).join().unwrap()), Answer::Again);
        // SAFETY: as above.
        let of_a_bad_page = unsafe { answer(Arc::as_ptr(core).cast(), &Touch { poisoned: true, ..touch(0) }) };
        assert_eq!(of_a_bad_page, Answer::Fails);
        drop(taken);
        let all: Vec<_> = std::iter::from_fn(|| places.take()).map(mem::ManuallyDrop::new).collect();
        all.iter().for_each(|place| place.0.thread.store(usize::MAX, Ordering::SeqCst));
        assert_eq!(ask(5), Answer::Again, "without a stack a fault thread does it");
        assert_eq!(volume.resident_bytes(), 3 * 4096);
        all.into_iter().for_each(|place| drop(mem::ManuallyDrop::into_inner(place)));
        volume.lock().unwrap();
        assert_eq!(ask(6), Answer::Fails);
    }
}
