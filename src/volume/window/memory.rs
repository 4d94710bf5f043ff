//! The memory of a window: one memfd, mapped whole for the volume itself and in part by every direct map.
//!
//! A hole of a memfd is dangerous: whoever touches it through a mapping without userfaultfd allocates a zero page that
//! everybody then takes for plaintext. The volume touches only pages that it holds the range lock of and that are resident,
//! but others touch what they please: `mlockall`, whoever reads `/proc/PID/mem`, a huge page that is made of its neighbours.
//! So every mapping begins without access, comes under userfaultfd, and can be accessed only then: a [`View`] brings its
//! pages in, and the volume's own mapping has a guard that refuses. Where the kernel gives no userfaultfd, zero pages can
//! appear, and are overwritten when the page is filled: whether a page is there is known by its bit, never by the memfd.
//!
//! All mappings are left out of core dumps and of forked children, which get SIGSEGV.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, MlockFlags, MprotectFlags, ProtFlags, madvise, mlock_with, mmap, mprotect, munmap};

use super::PAGE_BYTES;
use super::marks::Marks;
use crate::memory::{Source, Target};
use crate::owner::{Owner, PerProcess};
use crate::pmem;
use crate::uffd::{self, Uffd};
use crate::volume::buffers::ListedMap;

/// `MADV_DONTNEED_LOCKED` (Linux 5.18, uapi/asm-generic/mman-common.h): `MADV_DONTNEED` for locked memory too.
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

/// An empty memfd, which all windows share.
static NOTHING: PerProcess<Mutex<Weak<OwnedFd>>> = PerProcess::new();

/// The memfd and the volume's own mapping of it. Ranges are logical offsets within [`Self::new`]'s.
#[derive(Debug)]
pub(crate) struct WindowMemory {
    range: Range<u64>,
    file: OwnedFd,
    /// An empty memfd, made while there are descriptors to be had.
    nothing: Arc<OwnedFd>,
    own: Mapped,
    /// Keeps holes of `own` from being filled by anybody else.
    guard: Option<Arc<Uffd>>,
}

impl WindowMemory {
    /// Holes for logical `range`, whole pages: they take address space, no memory.
    pub(crate) fn new(range: Range<u64>) -> io::Result<Self> {
        let len_bytes = range.end - range.start;
        pmem::check_file_size_limit(len_bytes)?;
        let file = memfd_create("daxcrypt-window", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, len_bytes)?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        let own = Mapped::new(&file, &(0..len_bytes))?;
        let guard = match Uffd::guard() {
            Err(error) if uffd::is_refusal(&error) => None,
            guard => Some(guard?),
        };
        if let Some(guard) = &guard {
            guard.register_absent(&own.addresses(&(0..len_bytes)))?;
        }
        own.allow(ProtFlags::READ | ProtFlags::WRITE)?;
        let nothing = NOTHING.shared(|| Ok(memfd_create("daxcrypt-gone", MemfdFlags::CLOEXEC)?))?;
        Ok(Self { range, file, nothing, own, guard })
    }

    const fn within(&self, range: &Range<u64>) -> Range<u64> {
        range.start - self.range.start..range.end - self.range.start
    }

    /// Fills pages that are held and not resident. With an error some of them may be in the memfd.
    pub(crate) fn fill(&self, range: &Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let Some(guard) = &self.guard else {
            self.target(range).copy_from(bytes);
            return Ok(());
        };
        let how = uffd::Install { protect_new: false, protect_present: false, wake: false };
        guard.map_absent(&self.own.addresses(&self.within(range)), Source::from_slice(bytes), how).1
    }

    /// The bytes at `range`, whose pages are resident and held.
    pub(crate) fn source(&self, range: &Range<u64>) -> Source<'_> {
        let (start, len_bytes) = self.own.address(&self.within(range));
        // SAFETY: the range is mapped as long as `self` is borrowed, and everyone uses raw pointers.
        unsafe { Source::from_raw(start, len_bytes) }
    }

    /// The bytes at `range`, whose pages are resident, or becoming so, and held.
    pub(crate) fn target(&self, range: &Range<u64>) -> Target<'_> {
        let (start, len_bytes) = self.own.address(&self.within(range));
        // SAFETY: the range is mapped writable as long as `self` is borrowed, and everyone uses raw pointers.
        unsafe { Target::from_raw(start, len_bytes) }
    }

    /// Takes whole pages away from every mapping and gives their memory back. The next touch finds a hole.
    pub(crate) fn punch(&self, range: &Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let within = self.within(range);
        Ok(fallocate(&self.file, flags, within.start, within.end - within.start)?)
    }
}

/// The mapping of one direct map.
#[derive(Debug)]
pub(crate) struct View {
    range: Range<u64>,
    pinned: bool,
    /// The most pages that may be resident while it is attached.
    page_count_max: u64,
    writable: bool,
    /// What is mapped in its place in the end.
    nothing: Arc<OwnedFd>,
    /// Ends before the mapping does.
    _listed: ListedMap,
    mapped: Mapped,
    /// Who takes its faults; none for a pinned view.
    faults: Option<Uffd>,
    marks: Marks,
    /// Whether it was [revoked](Self::revoke), or is about to be.
    revoked: AtomicBool,
}

/// What a view is made with.
#[derive(Debug)]
pub(crate) struct ViewOptions {
    pub(crate) writable: bool,
    /// Who takes its faults; without it the view is pinned: its pages are never evicted while it is attached, and it can be
    /// accessed only after [`View::allow`].
    pub(crate) faults: Option<Uffd>,
    pub(crate) marks: Marks,
}

impl View {
    /// Maps the whole pages of logical `range`. At most `page_count_max` pages of the window are resident while it is
    /// attached.
    pub(crate) fn new(
        memory: &WindowMemory,
        range: Range<u64>,
        options: ViewOptions,
        page_count_max: u64,
    ) -> io::Result<Self> {
        let ViewOptions { writable, faults, marks } = options;
        let mapped = Mapped::new(&memory.file, &memory.within(&range))?;
        let nothing = Arc::clone(&memory.nothing);
        let listed = ListedMap::new(mapped.start, mapped.len_bytes);
        let pinned = faults.is_none();
        let revoked = AtomicBool::new(false);
        let view =
            Self { range, pinned, page_count_max, writable, nothing, _listed: listed, mapped, faults, marks, revoked };
        if let Some(faults) = &view.faults {
            faults.register(&view.addresses(&view.range), writable)?;
            view.allow()?;
        }
        Ok(view)
    }

    /// Lets the program access it.
    pub(crate) fn allow(&self) -> io::Result<()> {
        self.mapped.allow(if self.writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ })
    }

    /// Who takes its faults; none for a pinned view.
    pub(crate) const fn faults(&self) -> Option<&Uffd> {
        self.faults.as_ref()
    }

    /// How it knows of stores.
    pub(crate) const fn marks(&self) -> &Marks {
        &self.marks
    }

    pub(crate) const fn writable(&self) -> bool {
        self.writable
    }

    /// Where logical `range`, which it shows, is mapped.
    pub(crate) fn addresses(&self, range: &Range<u64>) -> Range<u64> {
        self.mapped.addresses(&(range.start - self.range.start..range.end - self.range.start))
    }

    /// The logical offsets that it shows: whole pages.
    pub(crate) const fn range(&self) -> &Range<u64> {
        &self.range
    }

    pub(crate) const fn page_count_max(&self) -> u64 {
        self.page_count_max
    }

    pub(crate) const fn pinned(&self) -> bool {
        self.pinned
    }

    /// Its first byte.
    pub(crate) const fn start(&self) -> *mut u8 {
        self.mapped.start
    }

    /// Asks the kernel to keep pages out of swap: those that are here, or, for a view that is not pinned, each once it is
    /// here. Whether it agreed (see `ulimit -l`).
    pub(crate) fn lock_memory(&self) -> bool {
        let flags = if self.pinned { MlockFlags::empty() } else { MlockFlags::ONFAULT };
        // SAFETY: the range is this view's; locking changes no byte of it. All pages of a pinned view are here already.
        unsafe { mlock_with(self.mapped.start.cast::<c_void>(), self.mapped.len_bytes, flags) }.is_ok()
    }

    /// Ends every access through this view for good, also of those that wait for a page: the next touch raises SIGBUS, because
    /// there is no file behind it any more. It takes no new descriptor, of which a process may have no more.
    pub(crate) fn revoke(&self) -> io::Result<()> {
        self.revoked.store(true, Ordering::SeqCst);
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE; // a store raises SIGBUS too, and not SIGSEGV
        let start = self.mapped.start.cast::<c_void>();
        // SAFETY: the range is this view's own; whoever holds its address was told that the memory may end.
        unsafe { mmap(start, self.mapped.len_bytes, protection, flags, &*self.nothing, 0) }?;
        if let Some(faults) = &self.faults {
            faults.wake(&self.addresses(&self.range))?;
        }
        Ok(())
    }

    /// Whether touches raise SIGBUS for good, or will in a moment.
    pub(crate) fn revoked(&self) -> bool {
        self.revoked.load(Ordering::SeqCst)
    }

    /// [`Self::revoke`] of the one page at logical `start`, where the kernel has no other way to let a touch fail.
    pub(crate) fn revoke_page(&self, start: u64) -> io::Result<()> {
        let page = start..start + PAGE_BYTES;
        let (address, len_bytes) = self.mapped.address(&(page.start - self.range.start..page.end - self.range.start));
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the page lies in this view; whoever holds its address was told that a touch may fail.
        unsafe { mmap(address.cast::<c_void>(), len_bytes, protection, flags, &*self.nothing, 0) }?;
        self.faults.as_ref().map_or(Ok(()), |faults| faults.wake(&self.addresses(&page)))
    }

    /// Takes logical `range` out of this view's page tables: nobody can store through it any more, and the next touch
    /// faults. What the view does not show is ignored.
    pub(crate) fn zap(&self, range: &Range<u64>) -> io::Result<()> {
        let part = range.start.max(self.range.start)..range.end.min(self.range.end);
        if part.is_empty() {
            return Ok(());
        }
        let (start, len_bytes) = self.mapped.address(&(part.start - self.range.start..part.end - self.range.start));
        // SAFETY: the range lies in this shared mapping; its bytes stay in the memfd.
        let result = unsafe { libc::madvise(start.cast::<c_void>(), len_bytes, MADV_DONTNEED_LOCKED) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// A shared mapping, ended when dropped. Nobody can access it at first.
#[derive(Debug)]
struct Mapped {
    start: *mut u8,
    len_bytes: usize,
    /// A child does not have it, and perhaps something else in its place.
    owner: Owner,
}

// SAFETY: the memory belongs to this value, and is reached through raw pointers only.
unsafe impl Send for Mapped {}
// SAFETY: sharing the address allows nothing that sending it does not.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(file: &OwnedFd, range: &Range<u64>) -> io::Result<Self> {
        let len_bytes = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { mmap(ptr::null_mut(), len_bytes, ProtFlags::empty(), flags, file, range.start) }?;
        let mapped = Self { start: start.cast(), len_bytes, owner: Owner::here() };
        for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
            // SAFETY: the range is the new mapping; neither advice changes a byte of it.
            unsafe { madvise(start, len_bytes, advice) }?;
        }
        // A huge page would fill holes with zeroes. A kernel that does not know huge pages refuses the advice.
        // SAFETY: as above.
        let _ = unsafe { madvise(start, len_bytes, Advice::LinuxNoHugepage) };
        Ok(mapped)
    }

    fn allow(&self, protection: ProtFlags) -> io::Result<()> {
        let flags = MprotectFlags::from_bits_retain(protection.bits());
        // SAFETY: the range is this mapping, which only raw pointers reach.
        Ok(unsafe { mprotect(self.start.cast::<c_void>(), self.len_bytes, flags) }?)
    }

    fn addresses(&self, range: &Range<u64>) -> Range<u64> {
        let (start, len_bytes) = self.address(range);
        start.addr() as u64..(start.addr() + len_bytes) as u64
    }

    fn address(&self, range: &Range<u64>) -> (*mut u8, usize) {
        let inside = range.start <= range.end && range.end <= self.len_bytes as u64;
        assert!(inside, "{range:?} is outside of {} mapped bytes", self.len_bytes);
        let position = |offset| usize::try_from(offset).expect("64-bit targets only");
        // SAFETY: the range was checked, so the address is within (or one past) the mapping.
        let start = unsafe { self.start.add(position(range.start)) };
        (start, position(range.end - range.start))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            return;
        }
        // SAFETY: the range was mapped by `new`; whoever was given its address was told how long it lives.
        let unmapped = unsafe { munmap(self.start.cast::<c_void>(), self.len_bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping: {unmapped:?}");
    }
}
