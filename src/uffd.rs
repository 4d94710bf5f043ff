//! The kernel interface of a direct map: userfaultfd and the page-map scan, as safe calls on a registered range.
//!
//! Structures and numbers are those of `linux/userfaultfd.h` and `linux/fs.h` of Linux 6.8, whose ABI is fixed. Addresses
//! go to the kernel as numbers; what it does to the memory there (install, protect, poison pages) changes no byte that Rust
//! knows of. Nothing here knows volumes, pages or policy.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

use crate::memory::Source;
use crate::owner::PerProcess;

const UFFD_API: u64 = 0xaa;
const GROUP: u8 = 0xaa;

const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_SIGBUS: u64 = 1 << 7;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_WP_SHMEM: u64 = 1 << 12;
const FEATURE_POISON: u64 = 1 << 14;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

const MODE_MISSING: u64 = 1 << 0;
const MODE_WP: u64 = 1 << 1;
const MODE_MINOR: u64 = 1 << 2;

const EVENT_PAGEFAULT: u8 = 0x12;
const FAULT_WRITE: u64 = 1 << 0;
const FAULT_WP: u64 = 1 << 1;
const COPY_MODE_DONTWAKE: u64 = 1 << 0;
const COPY_MODE_WP: u64 = 1 << 1;
const CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;
const CONTINUE_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const MESSAGE_BYTES: usize = 32;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const SCAN_WP_MATCHING: u64 = 1 << 0;
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const SCAN_REGIONS: usize = 64;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Span {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    span: Span,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    span: Span,
    mode: u64,
}

#[repr(C)]
struct Copy {
    destination: u64,
    source: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// Also the layout of `uffdio_poison`.
#[repr(C)]
struct Continue {
    span: Span,
    mode: u64,
    done: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `UFFD_USER_MODE_ONLY` (Linux 5.11): granted to everybody, because no system call can be made to wait by it.
const USER_MODE_ONLY: u32 = 1;

/// How pages are put into a range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Install {
    /// Whether the first store to a page that was absent is noted or trapped.
    pub(crate) protect_new: bool,
    /// The same for a page that was in the file already.
    pub(crate) protect_present: bool,
    /// Whether threads that wait for one of the pages go on at once, and not at [`Uffd::wake`].
    pub(crate) wake: bool,
}

/// A fault that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) address: u64,
    /// A store to a write-protected page, rather than a page that is not mapped.
    pub(crate) write_protected: bool,
    /// A store.
    pub(crate) stores: bool,
}

/// What userfaultfd can do on a kernel, or what of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Features(u64);

impl Features {
    /// What a map cannot be lazy without: its pages are in shared memory, and other maps may have brought them in.
    const NEEDED: u64 = FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM;

    /// With which version of Linux each feature of shared memory came.
    const SINCE: [((u32, u32), u64); 4] = [
        ((5, 14), FEATURE_MINOR_SHMEM),
        ((5, 19), FEATURE_WP_SHMEM),
        ((6, 6), FEATURE_POISON),
        ((6, 7), FEATURE_WP_ASYNC),
    ];

    /// What of this kernel's features `version` of Linux, and `max` if there is one, has too.
    ///
    /// # Errors
    ///
    /// What the kernel refuses userfaultfd with.
    pub(crate) fn of_kernel(max: Option<(u32, u32)>) -> io::Result<Self> {
        /// 0 while nobody has asked.
        static KNOWN: AtomicU64 = AtomicU64::new(0);
        let known = match KNOWN.load(Ordering::Relaxed) {
            0 => {
                let probe = Uffd { fd: open_for_user_mode()?, features: Self(0) };
                let known = probe.shake_hands(0)?;
                KNOWN.store(known, Ordering::Relaxed);
                known
            }
            known => known,
        };
        let newer = |since| max.is_some_and(|max| since > max);
        let hidden = Self::SINCE.iter().filter(|(since, _)| newer(*since)).fold(0, |bits, (_, bit)| bits | bit);
        Ok(Self(known & !hidden))
    }

    /// Whether the kernel can note stores to write-protected pages by itself.
    pub(crate) const fn notes_stores(self) -> bool {
        self.0 & FEATURE_WP_ASYNC != 0
    }

    /// The same without that: such stores are trapped.
    pub(crate) const fn trapping(self) -> Self {
        Self(self.0 & !FEATURE_WP_ASYNC)
    }

    /// Whether stores can be noted or trapped at all.
    pub(crate) const fn protects(self) -> bool {
        self.0 & FEATURE_WP_SHMEM != 0
    }
}

/// Whose faults are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    /// Those of system calls too, which takes a right.
    All,
    /// Those of the program's own loads and stores: a system call that is given an absent page fails.
    UserMode,
    /// None: a load or store of an absent page raises SIGBUS, a system call fails.
    Raised,
}

/// A userfaultfd.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
    features: Features,
}

impl Uffd {
    /// Opens one by `/dev/userfaultfd` or by the system call.
    ///
    /// # Errors
    ///
    /// What the kernel refuses with: too old (`InvalidInput`), or not permitted.
    pub(crate) fn open(features: Features, faults: Faults) -> io::Result<Self> {
        if features.0 & Features::NEEDED != Features::NEEDED {
            return Err(Errno::INVAL.into());
        }
        let fd = match faults {
            Faults::All => open_descriptor()?,
            Faults::UserMode | Faults::Raised => open_for_user_mode()?,
        };
        let used = Features::NEEDED | FEATURE_WP_SHMEM | FEATURE_POISON | FEATURE_WP_ASYNC;
        let raised = if faults == Faults::Raised { FEATURE_SIGBUS } else { 0 };
        Self::with_features(fd, features.0 & used | raised)
    }

    pub(crate) const fn features(&self) -> Features {
        self.features
    }

    /// The one of this process that answers nobody: a touch of an absent page in its ranges raises SIGBUS, and a system call
    /// that would make such a page fails.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub(crate) fn guard() -> io::Result<Arc<Self>> {
        static SHARED: PerProcess<Mutex<Weak<Uffd>>> = PerProcess::new();
        SHARED.shared(|| Self::with_features(open_for_user_mode()?, FEATURE_MISSING_SHMEM | FEATURE_SIGBUS))
    }

    fn with_features(fd: OwnedFd, features: u64) -> io::Result<Self> {
        let uffd = Self { fd, features: Features(features) };
        uffd.shake_hands(features)?;
        Ok(uffd)
    }

    /// Asks for features. Those that the kernel has.
    fn shake_hands(&self, features: u64) -> io::Result<u64> {
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        self.call::<{ opcode::read_write::<Api>(GROUP, 0x3f) }, _>(&mut api)?;
        Ok(api.features)
    }

    /// Takes over the touches of absent pages in `range`, and no other faults.
    pub(crate) fn register_absent(&self, range: &Range<u64>) -> io::Result<()> {
        self.register_mode(range, MODE_MISSING)
    }

    /// Takes the faults of `range` from now on: pages that are absent, pages that are there but not mapped and, with
    /// `write_protect` and where the kernel can, stores to protected pages.
    pub(crate) fn register(&self, range: &Range<u64>, write_protect: bool) -> io::Result<()> {
        let write_protect = write_protect && self.features.protects();
        self.register_mode(range, MODE_MISSING | MODE_MINOR | if write_protect { MODE_WP } else { 0 })
    }

    fn register_mode(&self, range: &Range<u64>, mode: u64) -> io::Result<()> {
        let mut register = Register { span: span(range), mode, ioctls: 0 };
        Ok(self.call::<{ opcode::read_write::<Register>(GROUP, 0x00) }, _>(&mut register)?)
    }

    /// The next fault, or `None` when there is none now.
    pub(crate) fn next_fault(&self) -> io::Result<Option<Fault>> {
        let mut message = [0_u8; MESSAGE_BYTES];
        loop {
            match rustix::io::read(&self.fd, &mut message) {
                Ok(MESSAGE_BYTES) if message[0] == EVENT_PAGEFAULT => {
                    let field = |at: usize| {
                        let bytes = message[at..at + 8].try_into().expect("eight bytes");
                        u64::from_le_bytes(bytes)
                    };
                    let (address, flags) = (field(16), field(8));
                    let (write_protected, stores) = (flags & FAULT_WP != 0, flags & FAULT_WRITE != 0);
                    return Ok(Some(Fault { address, write_protected, stores }));
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Maps pages of `range` that are in the file already.
    pub(crate) fn map_present(&self, range: &Range<u64>, how: Install, page_bytes: u64) -> io::Result<()> {
        let mode = if how.wake { 0 } else { CONTINUE_MODE_DONTWAKE };
        let mode = mode | if how.protect_present { CONTINUE_MODE_WP } else { 0 };
        let mut at = range.start;
        while at < range.end {
            let mut argument = Continue { span: span(&(at..range.end)), mode, done: 0 };
            let result = self.call::<{ opcode::read_write::<Continue>(GROUP, 0x07) }, _>(&mut argument);
            let done = u64::try_from(argument.done).unwrap_or(0);
            match result {
                Ok(()) => return Ok(()),
                _ if done > 0 => at += done,
                Err(Errno::AGAIN) => {}
                Err(Errno::EXIST) => {
                    if how.wake {
                        self.wake(&(at..at + page_bytes))?;
                    }
                    at += page_bytes;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Makes pages of `range`, which are absent, from a copy of `bytes`. How many bytes it did, also with an error.
    pub(crate) fn map_absent(&self, range: &Range<u64>, bytes: Source<'_>, how: Install) -> (u64, io::Result<()>) {
        let mode = if how.wake { 0 } else { COPY_MODE_DONTWAKE };
        let mode = mode | if how.protect_new { COPY_MODE_WP } else { 0 };
        let len = range.end - range.start;
        assert_eq!(bytes.len() as u64, len, "a copy needs equal lengths");
        let mut copied = 0;
        while copied < len {
            let mut argument = Copy {
                destination: range.start + copied,
                source: bytes.as_ptr().expose_provenance() as u64 + copied,
                len: len - copied,
                mode,
                done: 0,
            };
            let result = self.call::<{ opcode::read_write::<Copy>(GROUP, 0x03) }, _>(&mut argument);
            copied += u64::try_from(argument.done).unwrap_or(0);
            match result {
                Ok(()) | Err(Errno::AGAIN) => {}
                Err(errno) => return (copied, Err(errno.into())),
            }
        }
        (copied, Ok(()))
    }

    /// Lets the threads that wait for `range` try again.
    pub(crate) fn wake(&self, range: &Range<u64>) -> io::Result<()> {
        Ok(self.call::<{ opcode::read::<Span>(GROUP, 0x02) }, _>(&mut span(range))?)
    }

    /// Write-protects `range`, or takes the protection away and wakes who waits to store.
    pub(crate) fn write_protect(&self, range: &Range<u64>, protect: bool) -> io::Result<()> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        let mut argument = WriteProtect { span: span(range), mode };
        loop {
            match self.call::<{ opcode::read_write::<WriteProtect>(GROUP, 0x06) }, _>(&mut argument) {
                Err(Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Whether [`Self::poison`] can be asked.
    pub(crate) const fn poisons(&self) -> bool {
        self.features.0 & FEATURE_POISON != 0
    }

    /// Makes touches of `range`, which is not mapped, raise SIGBUS.
    pub(crate) fn poison(&self, range: &Range<u64>) -> io::Result<()> {
        let mut argument = Continue { span: span(range), mode: 0, done: 0 };
        Ok(self.call::<{ opcode::read_write::<Continue>(GROUP, 0x08) }, _>(&mut argument)?)
    }

    /// One ioctl of this descriptor, whose argument is `T` of opcode `OPCODE`.
    fn call<const OPCODE: Opcode, T>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: every call above names the structure that the kernel defines for the opcode.
        let updater = unsafe { Updater::<OPCODE, T>::new(argument) };
        // SAFETY: the kernel changes the argument and page tables of mappings that only raw pointers reach.
        unsafe { ioctl(&self.fd, updater) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open_descriptor() -> io::Result<OwnedFd> {
    const IOC_NEW: libc::c_ulong = 0xaa00;
    match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => {
            let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
            // SAFETY: the request takes its flags by value.
            let fd = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) };
            if fd >= 0 {
                // SAFETY: the kernel has just given this descriptor to us alone.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // The system call would say the same, but after a refusal of its own kind.
        Err(error) if is_shortage(&error) => return Err(error),
        Err(_) => {}
    }
    system_call(0)
}

/// One that takes no faults of system calls, which needs no right.
fn open_for_user_mode() -> io::Result<OwnedFd> {
    match system_call(USER_MODE_ONLY) {
        Err(error) if is_refusal(&error) => open_descriptor(), // a kernel that is too old for the flag
        opened => opened,
    }
}

fn system_call(more_flags: u32) -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    let flags = UserfaultfdFlags::from_bits_retain(flags.bits() | more_flags);
    // SAFETY: a new descriptor; it has no effect on memory before something is registered.
    Ok(unsafe { rustix::mm::userfaultfd(flags) }?)
}

/// Whether the kernel does not have what was asked for, or does not permit it. Anything else is a failure: a map that
/// decrypted everything because a descriptor was wanting would be a surprise of gigabytes.
pub(crate) fn is_refusal(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::PERM | Errno::ACCESS | Errno::NOSYS | Errno::INVAL))
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// The stores of this process, as its page tables tell of them.
#[derive(Debug)]
pub(crate) struct PageMap {
    file: File,
}

impl PageMap {
    /// That of this process, which all maps share.
    pub(crate) fn of_process() -> io::Result<Arc<Self>> {
        static SHARED: PerProcess<Mutex<Weak<PageMap>>> = PerProcess::new();
        SHARED.shared(|| Ok(Self { file: File::open("/proc/self/pagemap")? }))
    }

    /// Calls `found` for every run of pages in `range` that was stored to since it was protected, and protects it again
    /// in the same step.
    pub(crate) fn take_written(&self, range: &Range<u64>, found: impl FnMut(Range<u64>)) -> io::Result<()> {
        let flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC;
        self.scan(range, Scan { flags, category_mask: PAGE_IS_WRITTEN, ..Scan::default() }, found)
    }

    /// Calls `found` for every run of pages in `range` that were taken out of the page tables while they were protected: the
    /// kernel leaves a mark in their place, which looks to it like an entry of swap.
    pub(crate) fn each_protected_and_gone(&self, range: &Range<u64>, found: impl FnMut(Range<u64>)) -> io::Result<()> {
        let category_mask = PAGE_IS_WRITTEN | PAGE_IS_SWAPPED;
        self.scan(range, Scan { category_inverted: PAGE_IS_WRITTEN, category_mask, ..Scan::default() }, found)
    }

    /// Calls `found` for every run of pages in `range` that `asked` is about.
    fn scan(&self, range: &Range<u64>, asked: Scan, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        const OPCODE: Opcode = opcode::read_write::<Scan>(b'f', 16);
        let mut at = range.start;
        while at < range.end {
            let mut regions = [PageRegion::default(); SCAN_REGIONS];
            let mut scan = Scan {
                size: size_of::<Scan>() as u64,
                start: at,
                end: range.end,
                vec: regions.as_mut_ptr().cast::<c_void>().expose_provenance() as u64,
                vec_len: SCAN_REGIONS as u64,
                return_mask: asked.category_mask,
                ..asked
            };
            // SAFETY: the request takes the structure named in its opcode, which names the vector and its length.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::c_ulong::from(OPCODE), &raw mut scan) };
            let Ok(count) = usize::try_from(count) else {
                match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                }
            };
            regions[..count].iter().for_each(|region| found(region.start..region.end));
            at = scan.walk_end.max(at);
            if count == 0 {
                break;
            }
        }
        Ok(())
    }
}

const fn span(range: &Range<u64>) -> Span {
    Span { start: range.start, len: range.end - range.start }
}
