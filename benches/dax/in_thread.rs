//! First touches that the touching thread answers, beside a handler of SIGBUS that copies a page which is there already
//! (`UFFDIO_COPY`, no cipher), and beside the threads that answer otherwise.

use std::ffi::{c_int, c_void};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use daxcrypt::dax::{FaultsBy, MapOptions};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::{MIB, PAGE, in_tmpfs, median, random_touches, report, writable};

const LEN: u64 = 256 * MIB;

/// Touches of a round; the sides take turns.
const TOUCHES: u64 = 8000;
const ROUNDS: usize = 5;

static UFFD: AtomicI32 = AtomicI32::new(-1);
static READY: AtomicU64 = AtomicU64::new(0);

/// `struct uffdio_copy`; the arguments of the other requests are shorter.
type Words = [u64; 5];
const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const COPY: libc::c_ulong = 0xc028_aa03;

fn request(uffd: c_int, code: libc::c_ulong, mut words: Words) {
    // SAFETY: each request takes at most five words.
    assert_eq!(unsafe { libc::ioctl(uffd, code, words.as_mut_ptr()) }, 0, "{}", std::io::Error::last_os_error());
}

extern "C" fn copy_a_ready_page(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo.
    let address = unsafe { (*info).si_addr() }.addr() as u64;
    request(UFFD.load(Ordering::Relaxed), COPY, [address - address % PAGE, READY.load(Ordering::Relaxed), PAGE, 0, 0]);
}

/// The median first touch of a mapping whose pages a handler copies from one that is ready.
fn ready_page_touch() -> f64 {
    const MISSING_SHMEM_AND_SIGBUS: u64 = 1 << 5 | 1 << 7;
    let memory = memfd_create("bench", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, LEN).unwrap();
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | 1; // UFFD_USER_MODE_ONLY
    // SAFETY: a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    assert!(fd >= 0, "userfaultfd");
    // SAFETY: the kernel has just given it to us.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd as c_int) };
    request(uffd.as_raw_fd(), API, [0xaa, MISSING_SHMEM_AND_SIGBUS, 0, 0, 0]);
    let (protection, len) = (libc::PROT_READ | libc::PROT_WRITE, LEN as usize);
    // SAFETY: a new mapping.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, memory.as_raw_fd(), 0) };
    assert_ne!(start, libc::MAP_FAILED);
    request(uffd.as_raw_fd(), REGISTER, [start.addr() as u64, LEN, 1, 0, 0]);
    let ready = vec![7_u8; PAGE as usize];
    READY.store(ready.as_ptr().expose_provenance() as u64, Ordering::Relaxed);
    UFFD.store(uffd.as_raw_fd(), Ordering::Relaxed);
    // SAFETY: all-zero bytes are a valid action.
    let (mut ours, mut theirs): (libc::sigaction, libc::sigaction) = unsafe { mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = copy_a_ready_page;
    ours.sa_sigaction = handler as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: valid actions; the library's handler comes back below, and is not needed until then.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, &raw mut theirs) };
    let touched = median(random_touches(start.cast(), LEN / PAGE, TOUCHES));
    // SAFETY: as above.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const theirs, ptr::null_mut()) };
    // SAFETY: the mapping was made above.
    unsafe { libc::munmap(start, len) };
    touched
}

pub(super) fn first_touch(folder: &Path, place: &str) {
    let volume = in_tmpfs(folder, LEN);
    let touch = |options: &MapOptions| {
        let map = volume.map(0..LEN, options).unwrap();
        median(random_touches(map.as_ptr(), LEN / PAGE, TOUCHES))
    };
    let in_thread = writable().faults(FaultsBy::InThread);
    let rounds: Vec<_> = (0..ROUNDS).map(|_| (touch(&in_thread), ready_page_touch(), touch(&writable()))).collect();
    let of = |value: fn(&(f64, f64, f64)) -> f64| median(rounds.iter().map(value).collect());
    report(&format!("first touch in the thread, p50, {place}"), of(|round| round.0), "us", "-");
    report(&format!("the same by a handler that copies a ready page, {place}"), of(|round| round.1), "us", "-");
    report(&format!("in the thread over the ready page, {place}"), of(|round| round.0 / round.1), "x", "<= 1.25");
    let goal = "<= 0.25 where idle CPUs wake slowly, <= 1";
    report(&format!("in the thread over the fault thread, {place}"), of(|round| round.0 / round.2), "x", goal);
}
