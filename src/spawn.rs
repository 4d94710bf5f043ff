//! Threads that a program does not notice: they take no signal that is meant for it, and end in an error where there is no
//! memory for them.
//!
//! A signal to a process goes to any thread that does not block it. A program that blocks SIGTERM in its own threads and waits
//! for it (`sigwait`, `signalfd`) would be ended by it in one of ours. A new thread inherits the mask of its maker, so the
//! signals are blocked around the making; only those that a thread causes itself stay, because blocked they would end the
//! process without its handlers.
//!
//! A thread of the standard library takes memory of its own as it begins, and ends the process where there is none
//! (`RLIMIT_AS`). So a [`QuietThread`] is one of the C library, which has all of its memory before it runs.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::ptr;

/// Signals of a thread's own instructions.
const SYNCHRONOUS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// Stack of a thread in bytes: the kernels of AES-XTS take 10 KiB, whoever formats a log line some more. All of it is
/// resident in a program that locks its memory.
const STACK_BYTES: usize = 512 << 10;

/// Runs `spawn`, whose new threads block every signal but the synchronous ones.
pub(crate) fn without_signals<R>(spawn: impl FnOnce() -> R) -> R {
    let _mask = Mask::block();
    spawn()
}

/// A number that no other thread has while this one runs; not 0. In a handler of signals too.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "a number or a pointer, by the C library, on 64-bit targets only")]
pub(crate) fn thread_number() -> usize {
    // SAFETY: asks a register of this thread.
    (unsafe { libc::pthread_self() }) as usize
}

/// A thread that is to be joined.
#[derive(Debug)]
#[must_use = "a thread that nobody joins keeps its stack"]
pub(crate) struct QuietThread {
    thread: libc::pthread_t,
}

impl QuietThread {
    /// Runs `body`, which catches its panics, in a thread of that name (at most 15 bytes).
    pub(crate) fn spawn<F: FnOnce() + Send + 'static>(name: &CStr, body: F) -> io::Result<Self> {
        let body = Box::into_raw(Box::new(body));
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: initialises what it is given, and fails only without memory, of which it needs none.
        check(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) })?;
        let mut thread = MaybeUninit::uninit();
        // SAFETY: the attributes were initialised above; the size is a multiple of the page size and above the minimum.
        let created =
            check(unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK_BYTES) }).and_then(|()| {
                // SAFETY: `run` takes the type that is passed; the thread is its only user from here on.
                let create = || unsafe {
                    libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), run::<F>, body.cast::<c_void>())
                };
                check(without_signals(create))
            });
        // SAFETY: initialised above, and not used any more.
        unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
        if let Err(error) = created {
            // SAFETY: no thread has it.
            drop(unsafe { Box::from_raw(body) });
            return Err(error);
        }
        // SAFETY: the call that succeeded has filled it.
        let thread = unsafe { thread.assume_init() };
        // SAFETY: the thread is not joined yet; a name that is too long is refused, which harms nobody.
        unsafe { libc::pthread_setname_np(thread, name.as_ptr()) };
        Ok(Self { thread })
    }

    /// Waits until it has ended.
    pub(crate) fn join(self) {
        // SAFETY: the thread is joined once, here, and is not this one.
        let joined = unsafe { libc::pthread_join(self.thread, ptr::null_mut()) };
        debug_assert_eq!(joined, 0, "pthread_join of an own thread");
    }
}

extern "C" fn run<F: FnOnce()>(body: *mut c_void) -> *mut c_void {
    // SAFETY: the pointer is that of a box that `spawn` has given to this thread alone.
    let body = unsafe { Box::from_raw(body.cast::<F>()) };
    body();
    ptr::null_mut()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// The mask that this thread had, which it gets back when this is dropped.
struct Mask {
    before: libc::sigset_t,
}

impl Mask {
    fn block() -> Self {
        let mut blocked = MaybeUninit::uninit();
        // SAFETY: fills the set that it is given.
        unsafe { libc::sigfillset(blocked.as_mut_ptr()) };
        for signal in SYNCHRONOUS {
            // SAFETY: the set was filled above.
            unsafe { libc::sigdelset(blocked.as_mut_ptr(), signal) };
        }
        let mut before = MaybeUninit::uninit();
        // SAFETY: both sets are valid for the call, which cannot fail with this first argument and fills the second one.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, blocked.as_ptr(), before.as_mut_ptr()) };
        // SAFETY: filled by the call above.
        Self { before: unsafe { before.assume_init() } }
    }
}

impl Drop for Mask {
    fn drop(&mut self) {
        // SAFETY: the set is the one that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut()) };
    }
}
