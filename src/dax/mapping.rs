//! A direct map as a program holds it.
//!
//! The safe calls go through the volume's own mapping of the window, under the range lock: they neither fault nor raise
//! SIGBUS, and media errors are their results. Loads and stores through the pointer are the program's own. Offsets are
//! bytes from the start of the map.
#![allow(unsafe_code)]

use std::mem;
use std::ops::Range;
use std::slice;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::core::Core;
use super::error::DaxError;
use super::in_thread::InThread;
use super::options::{MapMode, MapOptions, Tracking};
use super::threads::Working;
use crate::pmem::AnsweredRange;
use crate::volume::window::{PAGE_BYTES, WriteBack, pages_of};
use crate::volume::{VolumeError, write_pieces};

/// What gives a program lazy maps without exceptions.
const GRANT: &str = "all of it takes CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd, and a \
                     filter of system calls that lets userfaultfd pass";

/// Bytes that `copy_within` moves at a time.
const COPY_BYTES: usize = 4096;

/// What `zero` stores: whole pages, when it begins at one.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A part of a volume in the address space of this process. Dropping it syncs it and unmaps it; [`Self::close`] does the
/// same and tells whether it went well.
#[derive(Debug)]
pub struct DaxMapping {
    core: Option<Arc<Core>>,
    working: Option<Working>,
    /// Where its touches are answered by the threads that touch.
    answered: Option<AnsweredRange>,
    range: Range<u64>,
    memory_locked: bool,
}

impl DaxMapping {
    /// The map of `range`, whose pages `core` has mapped.
    pub(super) fn new(core: Core, range: Range<u64>, options: &MapOptions) -> Result<Self, DaxError> {
        let core = Arc::new(core);
        let memory_locked = core.view.lock_memory();
        let mut map = Self { core: Some(core), working: None, answered: None, range, memory_locked };
        let write_back = options.writable && !options.write_back.is_zero();
        if map.mode() != MapMode::Eager || write_back {
            map.working = Some(Working::begin(map.core()).map_err(DaxError::Os)?);
        }
        if map.mode() == MapMode::LazyInThread {
            map.answered = Some(InThread::begin(map.core()).map_err(DaxError::Os)?);
        }
        match map.mode() {
            MapMode::Eager if options.lazy => tracing::warn!(
                "the kernel does not permit userfaultfd, or is too old: all {} bytes of a map were decrypted ({GRANT})",
                map.len()
            ),
            MapMode::LazyUserMode => tracing::warn!(
                "the kernel permits userfaultfd for loads and stores only: system calls on pages of a map that are absent \
                 fail with EFAULT ({GRANT})"
            ),
            MapMode::Lazy | MapMode::LazyInThread | MapMode::Eager => {}
        }
        if !memory_locked {
            tracing::warn!("a direct map is not locked in memory (RLIMIT_MEMLOCK): its plaintext may be swapped out");
        }
        if write_back && let Some(mut working) = map.working.take() {
            let synced = working.sync_every(map.core(), options.write_back);
            map.working = Some(working);
            synced.map_err(DaxError::Os)?;
        }
        Ok(map)
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        self.core.as_ref().expect("a map has its core until it is closed")
    }

    /// The bytes of the volume that it shows.
    #[must_use]
    pub const fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// Its length in bytes, at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a map is never empty")]
    pub const fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether stores are allowed.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.core().writable
    }

    /// How plaintext comes in.
    #[must_use]
    pub fn mode(&self) -> MapMode {
        self.core().mode()
    }

    /// How dirty pages are found.
    #[must_use]
    pub fn tracking(&self) -> Tracking {
        self.core().tracking()
    }

    /// Whether the kernel keeps the plaintext out of swap.
    #[must_use]
    pub const fn memory_locked(&self) -> bool {
        self.memory_locked
    }

    /// The first byte. Valid until the map is dropped, for loads and, when it is writable, for stores.
    ///
    /// Other threads, other maps and NBD clients may change the bytes at any time: use raw reads and writes or atomics,
    /// and make references only where you know that nobody else touches the bytes.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.core().view.start()
    }

    /// The bytes of `range` as a slice. Prefer [`Volume::map_exclusive`], which needs no promise.
    ///
    /// # Safety
    ///
    /// As long as the slice lives:
    ///
    /// - nobody stores to these bytes: no thread through a pointer or a safe call of any map, and no request of the volume
    ///   or of an NBD client;
    /// - the volume is not locked, and media can read the bytes ([`Self::prefetch`] tells): a touch would raise SIGBUS.
    ///
    /// # Panics
    ///
    /// Panics when `range` is outside of the map.
    ///
    /// [`Volume::map_exclusive`]: crate::volume::Volume::map_exclusive
    #[must_use]
    pub unsafe fn as_slice(&self, range: Range<u64>) -> &[u8] {
        let (start, len_bytes) = self.span(&range);
        // SAFETY: the range is mapped while `self` is borrowed; the caller keeps writers away.
        unsafe { slice::from_raw_parts(start, len_bytes) }
    }

    /// The bytes of `range` as a slice to change. What was stored is durable after [`Self::persist`].
    ///
    /// # Safety
    ///
    /// As long as the slice lives, as for [`Self::as_slice`], and nobody else reads or stores these bytes either; the map
    /// is writable.
    ///
    /// # Panics
    ///
    /// Panics when `range` is outside of the map.
    #[must_use]
    #[allow(clippy::mut_from_ref, reason = "the memory is shared by its nature; the contract says who keeps away")]
    pub unsafe fn as_mut_slice(&self, range: Range<u64>) -> &mut [u8] {
        let (start, len_bytes) = self.span(&range);
        // SAFETY: the range is mapped writable while `self` is borrowed; the caller keeps everybody else away.
        unsafe { slice::from_raw_parts_mut(start, len_bytes) }
    }

    /// Where `range` is mapped.
    fn span(&self, range: &Range<u64>) -> (*mut u8, usize) {
        let inside = range.start <= range.end && range.end <= self.len();
        assert!(inside, "bytes {}..{} are outside of a map of {} bytes", range.start, range.end, self.len());
        let position = |offset| usize::try_from(offset).expect("64-bit targets only");
        (self.as_ptr().wrapping_add(position(range.start)), position(range.end - range.start))
    }

    /// Copies bytes at `offset` out, without bringing their pages in. `out` may lie in a map, as for [`Volume::read_at`].
    ///
    /// # Errors
    ///
    /// [`DaxError::OutOfRange`]; [`DaxError::Volume`] for a media error, with `out` zeroed.
    ///
    /// [`Volume::read_at`]: crate::volume::Volume::read_at
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DaxError> {
        let range = self.logical(offset, out.len() as u64)?;
        Ok(self.core().volume.load(&self.core().window, out, range.start)?)
    }

    /// Stores `data` at `offset`; [`Self::persist`] makes it durable. `data` may lie in a map, as for [`Volume::read_at`];
    /// [`Self::copy_within`] copies inside of one map.
    ///
    /// Pages that are absent and overwritten whole are encrypted to media and stay absent: this is the way for much at a
    /// time.
    ///
    /// # Errors
    ///
    /// [`DaxError::ReadOnly`], [`DaxError::OutOfRange`]; [`DaxError::Volume`] for a media error under a page that is absent,
    /// with the bytes before that page stored.
    ///
    /// [`Volume::read_at`]: crate::volume::Volume::read_at
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), DaxError> {
        let range = self.logical_writable(offset, data.len() as u64)?;
        let core = self.core();
        write_pieces(range, data, |piece, data| {
            let (mut at, mut rest) = (piece.start, data);
            loop {
                let stored = core.volume.store(&core.window, rest, at)?;
                rest = &rest[stored..];
                at += stored as u64;
                if rest.is_empty() {
                    return Ok(());
                }
                core.bring(&whole_pages(&(at..at + 1)))?;
            }
        })
    }

    /// Stores zeroes.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub fn zero(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.logical_range_writable(&range)?;
        let mut rest = range;
        while !rest.is_empty() {
            let len_bytes = (rest.end - rest.start).min(ZEROES.len() as u64 - rest.start % PAGE_BYTES);
            self.write(rest.start, &ZEROES[..usize::try_from(len_bytes).expect("at most the pattern's length")])?;
            rest.start += len_bytes;
        }
        Ok(())
    }

    /// Stores the bytes of `source` at `offset`; the two may overlap.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub fn copy_within(&self, source: Range<u64>, offset: u64) -> Result<(), DaxError> {
        self.logical_range(&source)?;
        self.logical_writable(offset, source.end - source.start)?;
        let mut bytes = Zeroizing::new([0; COPY_BYTES]);
        chunks(&source, offset > source.start).try_for_each(|(at, len)| {
            self.read(source.start + at, &mut bytes[..len])?;
            self.write(offset + at, &bytes[..len])
        })
    }

    /// Makes what was stored to `range` durable: flush and drain. Encrypts the 16-byte blocks that hold it, no more.
    ///
    /// # Errors
    ///
    /// [`DaxError::ReadOnly`], [`DaxError::OutOfRange`]; [`DaxError::Volume`] when media fail: after a failed flush every
    /// later one fails too, until the namespace is reopened.
    pub fn persist(&self, range: Range<u64>) -> Result<(), DaxError> {
        let logical = self.logical_range_writable(&range)?;
        if logical.is_empty() {
            return Ok(());
        }
        let core = self.core();
        if logical.start / PAGE_BYTES == (logical.end - 1) / PAGE_BYTES {
            return Ok(core.volume.persist_within_page(&core.window, &logical)?);
        }
        self.flush(range)?;
        self.drain()
    }

    /// Encrypts what was stored to `range` to media and pushes it towards durability. At page granularity it is durable
    /// when this returns, at cache-line granularity after [`Self::drain`] by the same thread.
    ///
    /// # Errors
    ///
    /// As [`Self::persist`].
    pub fn flush(&self, range: Range<u64>) -> Result<(), DaxError> {
        let logical = self.logical_range_writable(&range)?;
        let core = self.core();
        core.volume.write_back(&core.window, &logical, WriteBack::Always)?;
        // Also for what is absent: it may have been evicted to media since, and not be durable there.
        Ok(core.volume.persist(logical)?)
    }

    /// Waits until what this thread has flushed is durable.
    ///
    /// # Errors
    ///
    /// [`DaxError::Volume`] after a failed flush.
    pub fn drain(&self) -> Result<(), DaxError> {
        self.core().volume.check_owner()?;
        Ok(self.core().volume.backing().drain().map_err(VolumeError::from)?)
    }

    /// Makes everything durable that was stored through this map. The cost is that of what is dirty; with
    /// [`Tracking::Compare`], of what is resident.
    ///
    /// # Errors
    ///
    /// [`DaxError::Volume`] when media fail. Pages that could not be written stay dirty.
    pub fn sync(&self) -> Result<(), DaxError> {
        self.core().volume.check_owner()?;
        self.core().sync(self.core().view.range())
    }

    /// Brings the pages of `range` in, so that touching them does not fault while there is room for them.
    ///
    /// # Errors
    ///
    /// [`DaxError::OutOfRange`]; [`DaxError::Volume`] for a media error.
    pub fn prefetch(&self, range: Range<u64>) -> Result<(), DaxError> {
        let logical = self.logical_range(&range)?;
        if logical.is_empty() { Ok(()) } else { self.core().bring(&whole_pages(&logical)) }
    }

    /// Writes the pages of `range` back where they differ from media, overwrites them in memory and gives them back; the
    /// next touch brings them in again. How many bytes went: none of an eager map.
    ///
    /// # Errors
    ///
    /// [`DaxError::OutOfRange`]; [`DaxError::Volume`] when a page could not be written: it stays.
    pub fn evict(&self, range: Range<u64>) -> Result<u64, DaxError> {
        let logical = self.logical_range(&range)?;
        if logical.is_empty() {
            return Ok(0);
        }
        let whole = whole_pages(&logical);
        Ok(self.core().volume.evict(&self.core().window, &whole)? * PAGE_BYTES)
    }

    /// Syncs, unmaps and wipes what no other map shows.
    ///
    /// # Errors
    ///
    /// [`DaxError::Volume`] when something could not be made durable: it is lost, unless another map shows it.
    pub fn close(mut self) -> Result<(), DaxError> {
        self.end()
    }

    /// The write-back ends first, then every access, then the answering of faults: everybody was woken by then. The address
    /// range stays taken until the last of them is gone.
    fn end(&mut self) -> Result<(), DaxError> {
        let Some(core) = self.core.take() else { return Ok(()) };
        if let Err(error) = core.volume.check_owner() {
            // A child: the threads are not there, and what it holds of them is the parent's.
            mem::forget(self.working.take());
            mem::forget(self.answered.take());
            return Err(error.into());
        }
        if let Some(working) = &mut self.working {
            working.end_syncs();
        }
        let synced = if core.volume.locked() { Ok(()) } else { core.sync(core.view.range()) };
        let left = core.leave();
        drop(self.answered.take()); // those who wait for a fault thread see that the map has ended
        if let Some(working) = self.working.take() {
            working.end();
        }
        drop(core);
        synced.and(left)
    }

    /// Refuses once the volume is locked: its memory raises SIGBUS.
    pub(super) fn check_unlocked(&self) -> Result<(), DaxError> {
        if self.core().volume.locked() { Err(VolumeError::Locked.into()) } else { Ok(()) }
    }

    /// Bytes of the volume.
    fn logical(&self, offset: u64, len_bytes: u64) -> Result<Range<u64>, DaxError> {
        self.core().volume.check_owner()?;
        match offset.checked_add(len_bytes) {
            Some(end) if end <= self.len() => Ok(self.range.start + offset..self.range.start + end),
            end => {
                let end = end.unwrap_or(u64::MAX);
                Err(DaxError::OutOfRange { start: offset, end, len_bytes: self.len() })
            }
        }
    }

    /// Bytes of the volume. An empty range within the map is nothing to do; one that ends before it begins is an error.
    fn logical_range(&self, range: &Range<u64>) -> Result<Range<u64>, DaxError> {
        if range.start > range.end {
            return Err(DaxError::OutOfRange { start: range.start, end: range.end, len_bytes: self.len() });
        }
        self.logical(range.start, range.end - range.start)
    }

    fn logical_range_writable(&self, range: &Range<u64>) -> Result<Range<u64>, DaxError> {
        if self.writable() { self.logical_range(range) } else { Err(DaxError::ReadOnly) }
    }

    pub(super) fn logical_writable(&self, offset: u64, len_bytes: u64) -> Result<Range<u64>, DaxError> {
        if self.writable() { self.logical(offset, len_bytes) } else { Err(DaxError::ReadOnly) }
    }
}

impl Drop for DaxMapping {
    fn drop(&mut self) {
        let _ = self.end(); // who wants to know calls `close`
    }
}

/// The whole pages that hold a byte of `range`, which is not empty.
pub(super) const fn whole_pages(range: &Range<u64>) -> Range<u64> {
    let pages = pages_of(range);
    pages.start * PAGE_BYTES..pages.end * PAGE_BYTES
}

/// Positions and lengths of the pieces of `range`, from its start or from its end.
fn chunks(range: &Range<u64>, backwards: bool) -> impl Iterator<Item = (u64, usize)> {
    let len_bytes = range.end.saturating_sub(range.start);
    let step = COPY_BYTES as u64;
    let count = len_bytes.div_ceil(step);
    (0..count).map(move |index| {
        let at = if backwards { count - 1 - index } else { index } * step;
        (at, usize::try_from(step.min(len_bytes - at)).expect("at most a chunk"))
    })
}
