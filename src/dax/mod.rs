//! The direct map: an encrypted volume in the address space of a program, decrypted page by page as it is touched.
//!
//! [`Volume::map`] gives a [`DaxMapping`]. A program loads and stores plaintext through [`DaxMapping::as_ptr`] (or through
//! safe copies) and says [`DaxMapping::persist`] when a store must be on media. All maps of one volume, and everybody who
//! reads and writes it (NBD clients of the same process too), see each other's bytes at once.
//!
//! ```
//! use std::sync::Arc;
//!
//! use daxcrypt::dax::MapOptions;
//! use daxcrypt::volume::Volume;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let volume = Arc::new(Volume::ephemeral(1 << 20)?); // any unlocked volume
//! let map = volume.map(0..volume.size(), &MapOptions::new().writable().resident_max(256 << 10))?;
//! map.write(4096, b"hello")?;
//! map.persist(4096..4101)?;
//! // SAFETY: nobody else uses this volume.
//! assert_eq!(unsafe { map.as_slice(4096..4101) }, b"hello");
//! map.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! What a program must know, compared with a map of unencrypted persistent memory:
//!
//! - **A store reaches media only by persist, sync, eviction or the background write-back.** With real DAX an unflushed
//!   store may survive the end of the process; here it dies with it. The write-back interval bounds the loss. Only
//!   [`DaxMapping::write`] of whole pages that are absent goes to media at once.
//! - **The unit of failure atomicity is an aligned 8-byte store that was persisted.** Ciphertext is made and stored in
//!   aligned blocks of 16 bytes, so after a crash such a word is old or new and the other word of its block is one that
//!   was stored there. This relies on aligned 16-byte loads and stores being atomic, which Intel promises for CPUs with
//!   AVX and AMD for all of them. Persisting a longer range is not atomic as a whole, as on any persistent memory.
//!   Stores of the same 16 bytes that were not persisted may become durable early.
//! - At page granularity (no DAX below) a crash of the machine can tear pages as the disk does.
//! - **A page that cannot be read raises SIGBUS** in the thread that touches it through the pointer; the safe calls return
//!   the error instead. Nothing else is harmed.
//! - With a bound on plaintext, a page comes in when another one has gone. While media refuse to take those that were stored
//!   to (a disk that is full), a touch through the pointer waits, until they do or the map ends; the safe calls return
//!   [`VolumeError::WindowFull`] instead.
//! - **Open after the last fork.** A forked child does not have the map: touching it there is SIGSEGV. It does not have the
//!   keys either, so every call on a volume or map of its parent fails with [`VolumeError::Forked`], and dropping them there
//!   writes nothing. A daemon opens its volumes after it has become one.
//! - System calls may read and write the map, but not pin it. Direct I/O and other pins (`O_DIRECT`, registered buffers,
//!   VFIO) store past all tracking, and a page that is read so after it was evicted (`vmsplice`, `MSG_ZEROCOPY`) reads as
//!   zeroes: do not use them on it.
//! - `msync(2)` on the map returns 0 and makes nothing durable: the memory is that of a memfd. Say [`DaxMapping::sync`].
//! - **SIGBUS has a handler of this library**, one for the process, installed when the first backing is opened: media errors
//!   of backings arrive by it. It passes on to the handler that was there before whatever is not its own. A program that
//!   wants to handle SIGBUS installs its handler before, or calls ours from its own (`sigaction` gives it); with ours replaced,
//!   a media error ends in the program's handler, in one of our threads.
//! - Locking all memory (`mlockall`) brings every page in, as it must; so do not with maps larger than memory. What reads
//!   memory from outside (`/proc/PID/mem`, `process_vm_readv`) gets an error for a page that is absent.
//! - The library's threads block all signals but the synchronous ones, so `sigwait` and `signalfd` work as in a program
//!   without them. All maps of a process share them: two that answer faults, one that writes back. When a fault cannot be
//!   answered all the same (a subscriber of logs that panics), every touch of that map is SIGBUS, `close` still writes back
//!   what was stored, and calls say [`DaxError::FaultThread`]. A map costs a descriptor, an exclusive one two.
//! - Plaintext is left out of core dumps, and locked in memory where `RLIMIT_MEMLOCK` allows
//!   ([`DaxMapping::memory_locked`]). Pages are overwritten before they are given back.
//!
//! # Kernels
//!
//! | Linux | how pages come in | how stores are found |
//! |---|---|---|
//! | before 5.14 | all at once ([`MapMode::Eager`]) | comparing with media ([`Tracking::Compare`]) |
//! | 5.14 (5.15 LTS) | as they are touched | comparing what is resident with media |
//! | 5.19 (6.1 LTS) | as they are touched | the first store to a page is trapped ([`Tracking::Trap`]) |
//! | 6.6 | the same; a page that media cannot read costs no mapping of its own any more | trapped |
//! | 6.7 | as they are touched | the kernel notes them ([`Tracking::Async`]) |
//!
//! [`MapOptions::as_on_kernel`] shows a program how it runs on an older one. All faults need a right: `CAP_SYS_PTRACE`,
//! `vm.unprivileged_userfaultfd=1`, or access to `/dev/userfaultfd` (6.1). Without it maps are [`MapMode::LazyUserMode`]
//! (`UFFD_USER_MODE_ONLY`, 5.11): only system calls on absent pages fail, as in maps of [`FaultsBy::InThread`], which need no
//! right and no newer kernel. Where a filter of system calls (that of
//! containers, as a rule) refuses userfaultfd, maps are eager.

//! # Faults in the thread that touches
//!
//! Waking a thread that answers is most of a first touch where idle processors sleep deeply. With
//! [`MapOptions::faults`]\([`FaultsBy::InThread`]) the thread that touches gets a SIGBUS, decrypts the page in this library's
//! handler, and goes on. It takes no right. The two threads of the process stay, for what must not be done in a handler:
//! evicting, waiting for a range, logging. What it asks of a program:
//!
//! - **System calls on absent pages fail with `EFAULT`** (`read(2)` into the map, `write(2)` from it): bring them in by
//!   [`DaxMapping::prefetch`] before, in a map without a bound, or use a buffer. Calls of this library take such addresses.
//! - No thread that touches the map blocks SIGBUS: the kernel ends a process whose thread blocks a signal that it causes.
//! - A handler of SIGBUS that the program installs after ours passes on to ours what is not its own; without that every first
//!   touch is its own. One that was installed before is called with whatever is not ours, and with the siginfo, mask and
//!   alternate stack that it would have without us.
//! - Nothing is asked of stacks. Our handler begins on the thread's alternate stack where it has one, where a signal frame and
//!   1 KiB must fit, and works on a stack of its own; without one it begins on the thread's own, below what is in use.
//! - A handler of signals of the program may touch the map, unless it came upon the thread in a call of this library. With
//!   threads that answer, such a touch waits for ever if the call holds the page; here it ends the process with a message.
//! - While our handler runs, signals of other kinds wait.

mod access;
mod ahead;
mod core;
mod error;
mod exclusive;
mod in_thread;
mod letters;
mod mapping;
mod options;
mod threads;

use std::io;
use std::sync::Arc;
use std::time::Duration;

pub use self::access::DaxPart;
use self::core::Core;
pub use self::error::DaxError;
pub use self::exclusive::{ExclusiveMap, FrozenMap, Persister};
pub use self::mapping::DaxMapping;
use self::mapping::whole_pages;
pub use self::options::{FaultsBy, MapMode, MapOptions, Tracking};
use crate::uffd::{self, Faults, Features, PageMap, Uffd};
use crate::volume::window::PAGE_BYTES;
use crate::volume::{Volume, VolumeError};

impl Volume {
    /// Maps bytes `range` of the volume into this process. `range.start` is a multiple of 4096; the end may be anywhere.
    ///
    /// Nothing is decrypted yet, unless the kernel does not permit userfaultfd: then everything is, and
    /// [`DaxMapping::mode`] says so.
    ///
    /// # Errors
    ///
    /// [`DaxError::Unaligned`], [`DaxError::OutOfRange`]; [`DaxError::ReadOnly`] for a writable map of a read-only volume;
    /// [`DaxError::Eager`] when the bound of resident plaintext cannot be kept; [`DaxError::Volume`] and
    /// [`DaxError::Os`] when the system refuses memory, threads or a page size of 4096.
    pub fn map(self: &Arc<Self>, range: std::ops::Range<u64>, options: &MapOptions) -> Result<DaxMapping, DaxError> {
        self.check_owner()?;
        let _size = self.keep_size();
        check(self, &range, options.writable)?;
        let core = Core::new(self, whole_pages(&range), options, false)?;
        DaxMapping::new(core, range, options)
    }

    /// Maps bytes `range` of the volume for this program alone, writable, as a slice. Both ends are multiples of 4096, or
    /// the end is that of the volume.
    ///
    /// While the map lives, every other write to the range fails with [`VolumeError::Claimed`],
    /// and other readers see the last persisted bytes. There is no background write-back.
    ///
    /// # Errors
    ///
    /// As [`Self::map`]; [`DaxError::Volume`] with [`VolumeError::Claimed`] when the range
    /// overlaps another map.
    pub fn map_exclusive(self: &Arc<Self>, range: std::ops::Range<u64>) -> Result<ExclusiveMap, DaxError> {
        self.map_exclusive_with(range, &MapOptions::new().write_back_interval(Duration::ZERO))
    }

    /// [`Self::map_exclusive`] with options: a bound, how pages come in, and a background write-back, by which other readers
    /// see bytes that were not persisted. It is writable in any case.
    ///
    /// # Errors
    ///
    /// As [`Self::map_exclusive`].
    pub fn map_exclusive_with(
        self: &Arc<Self>,
        range: std::ops::Range<u64>,
        options: &MapOptions,
    ) -> Result<ExclusiveMap, DaxError> {
        self.check_owner()?;
        let _size = self.keep_size();
        check_exclusive(self, &range, true)?;
        ExclusiveMap::new(self, range, options)
    }

    /// Maps bytes `range` of the volume for reading, as a slice that nobody changes: as for [`Self::map_exclusive`], every
    /// write to the range fails and no other map overlaps it, not even another one of this kind (share the one that there
    /// is). Read-only volumes have it too.
    ///
    /// # Errors
    ///
    /// As [`Self::map_exclusive`], but for [`DaxError::ReadOnly`].
    pub fn map_frozen(
        self: &Arc<Self>,
        range: std::ops::Range<u64>,
        options: &MapOptions,
    ) -> Result<FrozenMap, DaxError> {
        self.check_owner()?;
        let _size = self.keep_size();
        check_exclusive(self, &range, false)?;
        FrozenMap::new(self, range, options)
    }
}

/// Whether `range` can be mapped exclusively.
fn check_exclusive(volume: &Volume, range: &std::ops::Range<u64>, writable: bool) -> Result<(), DaxError> {
    check(volume, range, writable)?;
    if !range.end.is_multiple_of(PAGE_BYTES) && range.end != volume.size() {
        return Err(DaxError::Unaligned { start: range.end });
    }
    Ok(())
}

/// Whether `range` can be mapped.
fn check(volume: &Volume, range: &std::ops::Range<u64>, writable: bool) -> Result<(), DaxError> {
    let len_bytes = volume.size();
    if range.start >= range.end || range.end > len_bytes {
        return Err(DaxError::OutOfRange { start: range.start, end: range.end, len_bytes });
    }
    if !range.start.is_multiple_of(PAGE_BYTES) {
        return Err(DaxError::Unaligned { start: range.start });
    }
    if writable && volume.read_only() {
        return Err(DaxError::ReadOnly);
    }
    if volume.locked() {
        return Err(VolumeError::Locked.into());
    }
    Ok(())
}

/// The faults of a map, and how it tells of stores.
struct Opened {
    uffd: Uffd,
    taken: Faults,
    map: Option<Arc<PageMap>>,
}

/// The faults of a map, if the kernel gives them to us: all of them, or those of the program's own loads and stores.
///
/// # Errors
///
/// What is no refusal: descriptors or memory that are wanting.
fn open_faults(options: &MapOptions) -> io::Result<Option<Opened>> {
    let Some(features) = unless_refused(Features::of_kernel(options.kernel))? else { return Ok(None) };
    let takers: &[Faults] = match options.faults {
        FaultsBy::Threads => &[Faults::All, Faults::UserMode],
        FaultsBy::InThread => &[Faults::Raised],
    };
    for &taken in takers {
        if options.write_async
            && features.notes_stores()
            && let Some(uffd) = unless_refused(Uffd::open(features, taken))?
            && let Some(map) = unless_refused(PageMap::of_process())?
        {
            return Ok(Some(Opened { uffd, taken, map: Some(map) }));
        }
        if let Some(uffd) = unless_refused(Uffd::open(features.trapping(), taken))? {
            return Ok(Some(Opened { uffd, taken, map: None }));
        }
    }
    Ok(None)
}

fn unless_refused<T>(opened: io::Result<T>) -> io::Result<Option<T>> {
    match opened {
        Err(error) if uffd::is_refusal(&error) || error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}
