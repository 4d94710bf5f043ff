//! The backing: a file or device that holds ciphertext, opened, locked and mapped whole.
//!
//! All offsets are bytes from the start of the backing. Every range is checked here, once, before an address is made from
//! it. A backing is shared between threads behind an `Arc`; it does not keep overlapping accesses apart.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::{MediaError, OpenError};
use super::granularity::{Finding, Granularity, GranularityReason};
use super::mapping::Mapping;
use super::medium::KernelMedium;
use super::open::{OpenedFile, create_locked, map};
use super::options::{Access, Allocation, OpenOptions};
use super::persist::LINE_BYTES;
use super::sim::SimMedium;
use super::users::Users;
use crate::memory::{Source, Target};
use crate::owner::Owner;

/// What a backing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingKind {
    /// A regular file, on an ordinary or a DAX file system.
    File,
    /// A block device such as `/dev/pmem0` or a partition of one.
    BlockDevice,
    /// A device-DAX character device such as `/dev/dax0.0`.
    DevDax,
}

/// A run of bytes of a backing that has blocks, or has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingExtent {
    /// Bytes from the start of the backing.
    pub range: Range<u64>,
    /// Whether the bytes hold data. Those that do not read as zero bytes; blocks that were allocated but never written
    /// may count among them.
    pub allocated: bool,
}

/// A file or device that is open, locked and mapped whole.
#[derive(Debug)]
pub struct Backing {
    path: PathBuf,
    kind: BackingKind,
    access: Access,
    reason: GranularityReason,
    disk_offset: u64,
    /// Another node of the same device, which is locked alike.
    node: Option<std::fs::File>,
    /// Holds the lock on the disk of a partition.
    disk: Option<std::fs::File>,
    sector_bytes: Option<u64>,
    physical_address: Option<u64>,
    len_bytes: AtomicU64,
    growing: Mutex<()>,
    /// The process that opened it.
    owner: Owner,
    users: Users,
    mapping: Mapping,
    medium: Medium,
}

/// Who makes stores durable.
#[derive(Debug)]
pub(super) enum Medium {
    Kernel(KernelMedium),
    Simulated(SimMedium),
    /// Memory that dies with the process: there is nothing to make durable.
    Volatile,
}

impl Backing {
    /// Opens, locks and maps what is at `path`.
    ///
    /// # Errors
    ///
    /// [`OpenError::Busy`] when another process (or another `Backing`) has it open for writing, or when this one is for
    /// writing and another has it open at all; every other variant but `AlreadyExists` and `NoSpace`.
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        OpenOptions::new(access).open(path)
    }

    /// Creates a file of `len_bytes` zero bytes with mode 0600, durable by name, and opens it for writing.
    ///
    /// # Errors
    ///
    /// [`OpenError::AlreadyExists`]; [`OpenError::NoSpace`] with [`Allocation::Full`] on a full disk; [`OpenError::Empty`]
    /// for 0 bytes; others as for [`open`](Self::open). On an error no file is left behind.
    pub fn create(path: &Path, len_bytes: u64, allocation: Allocation) -> Result<Self, OpenError> {
        let access = Access::ReadWrite;
        let forced = OpenOptions::new(access).forced_granularity()?;
        let backing = Self::assemble(path, create_locked(path, len_bytes, allocation)?, access, forced);
        if backing.is_err() {
            let _ = std::fs::remove_file(path); // the first error is the one to report
        }
        backing
    }

    pub(super) fn assemble(
        path: &Path,
        opened: OpenedFile,
        access: Access,
        forced: Option<Granularity>,
    ) -> Result<Self, OpenError> {
        let (mapping, finding) = map(&opened, access)?;
        let reason = GranularityReason::new(finding, forced);
        let OpenedFile { file, node, disk, kind, len_bytes, disk_offset, sector_bytes, physical_address } = opened;
        let medium = KernelMedium::new(file, kind, reason.granularity(), mapping.len_bytes() as u64);
        Ok(Self {
            path: path.to_path_buf(),
            kind,
            access,
            reason,
            disk_offset,
            node,
            disk,
            sector_bytes,
            physical_address,
            len_bytes: AtomicU64::new(len_bytes),
            growing: Mutex::new(()),
            owner: Owner::here(),
            users: Users::default(),
            mapping,
            medium: Medium::Kernel(medium.map_err(OpenError::Io)?),
        })
    }

    /// Anonymous memory of `len_bytes` zero bytes, which ends with the process (or with this value). Every flush succeeds at
    /// once. The kernel may swap it out.
    ///
    /// # Errors
    ///
    /// [`OpenError::Empty`] for 0 bytes; [`OpenError::TooLarge`] and [`OpenError::Map`] without address space.
    pub fn anonymous(len_bytes: u64) -> Result<Self, OpenError> {
        if len_bytes == 0 {
            return Err(OpenError::Empty);
        }
        let mapped_bytes = usize::try_from(len_bytes).map_err(|_| OpenError::TooLarge { len_bytes })?;
        let mapping = Mapping::anonymous(mapped_bytes).map_err(|source| OpenError::Map { len_bytes, source })?;
        let path = PathBuf::from("anonymous memory");
        Ok(Self::of_memory(path, Finding::Volatile, len_bytes, mapping, Medium::Volatile))
    }

    /// A backing in memory, for writing.
    pub(super) fn of_memory(path: PathBuf, finding: Finding, len_bytes: u64, mapping: Mapping, medium: Medium) -> Self {
        Self {
            path,
            kind: BackingKind::File,
            access: Access::ReadWrite,
            reason: GranularityReason::new(finding, None),
            disk_offset: 0,
            node: None,
            disk: None,
            sector_bytes: None,
            physical_address: None,
            len_bytes: AtomicU64::new(len_bytes),
            growing: Mutex::new(()),
            owner: Owner::here(),
            users: Users::default(),
            mapping,
            medium,
        }
    }

    /// The open file, which memory has none of.
    pub(super) fn file(&self) -> Option<&std::fs::File> {
        match &self.medium {
            Medium::Kernel(medium) => Some(medium.file()),
            Medium::Simulated(_) | Medium::Volatile => None,
        }
    }

    /// The disk of a partition, when this user may open that.
    pub(super) const fn disk_file(&self) -> Option<&std::fs::File> {
        self.disk.as_ref()
    }

    /// The path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes.load(Ordering::Acquire)
    }

    /// What it is.
    #[must_use]
    pub const fn kind(&self) -> BackingKind {
        self.kind
    }

    /// What it was opened for.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.access
    }

    /// What makes a store durable on it.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        self.reason.granularity()
    }

    /// Why it has that granularity.
    #[must_use]
    pub const fn granularity_reason(&self) -> GranularityReason {
        self.reason
    }

    /// The granularity imposed by `DAXCRYPT_FORCE_GRANULARITY` (or by [`OpenOptions`]): a program reports it loudly.
    #[must_use]
    pub const fn granularity_forced(&self) -> Option<Granularity> {
        self.reason.forced()
    }

    /// The physical address of the first byte, for a pmem block device, a partition of one, or device-DAX. `None` for
    /// anything else, and without the permission to see it.
    #[must_use]
    pub const fn physical_address(&self) -> Option<u64> {
        self.physical_address
    }

    /// Where on its disk the first byte is: 0, but for a partition that the kernel has made of a block device its start.
    /// Every range of a backing counts from its own first byte all the same.
    #[must_use]
    pub const fn disk_offset(&self) -> u64 {
        self.disk_offset
    }

    /// Bytes of the sectors that a block device is addressed by, 512 or 4096 as a rule; `None` for anything else, which has
    /// none, and when the kernel does not say.
    #[must_use]
    pub const fn sector_bytes(&self) -> Option<u64> {
        self.sector_bytes
    }

    /// Runs `f` on the bytes at `range`.
    ///
    /// The bytes must be touched by the CPU: a system call that is given their address fails with `EFAULT` on a media
    /// error, which nobody here sees.
    ///
    /// # Errors
    ///
    /// `OutOfRange`; `Fault` when the medium cannot supply the bytes: what `f` returned is then dropped, because it may
    /// have seen zero bytes in their place.
    pub fn read<R>(&self, range: Range<u64>, f: impl FnOnce(Source<'_>) -> R) -> Result<R, MediaError> {
        let span = self.span(&range)?;
        self.check_faults(&span)?;
        let result = f(self.mapping.source(&span));
        self.check_faults(&span)?;
        Ok(result)
    }

    /// Runs `f` on the bytes at `range`, which it may change. Stores are durable after a `persist` or `sync_all`.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `ReadOnly` and `NoSpace` before `f` runs; `Fault` when the medium could not take the bytes: some of
    /// what `f` stored may then be lost.
    pub fn write<R>(&self, range: Range<u64>, f: impl FnOnce(Target<'_>) -> R) -> Result<R, MediaError> {
        let span = self.span(&range)?;
        self.check_writable()?;
        if let Medium::Kernel(medium) = &self.medium {
            medium.prepare_store(&range, self.len_bytes())?;
        }
        self.store(&span, f)
    }

    #[inline]
    fn store<R>(&self, span: &Range<usize>, f: impl FnOnce(Target<'_>) -> R) -> Result<R, MediaError> {
        self.check_faults(span)?;
        let result = match &self.medium {
            Medium::Kernel(_) | Medium::Volatile => f(self.mapping.target(span)),
            Medium::Simulated(medium) => medium.write(&self.mapping, span, f)?,
        };
        self.check_faults(span)?;
        Ok(result)
    }

    /// As [`write`](Self::write), for bytes that have blocks already: none are added, neither here nor around them.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write); a missing block on a full disk is a `Fault`.
    pub fn write_allocated<R>(&self, range: Range<u64>, f: impl FnOnce(Target<'_>) -> R) -> Result<R, MediaError> {
        let span = self.span(&range)?;
        self.check_writable()?;
        self.store(&span, f)
    }

    /// Copies the bytes from `start` on to `bytes`, as [`read`](Self::read) does. For much that is read once: pages of a file
    /// that are not mapped yet stay so.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and `Io`.
    pub fn read_bytes(&self, start: u64, bytes: &mut [u8]) -> Result<(), MediaError> {
        let range = start..start.saturating_add(bytes.len() as u64);
        let span = self.span(&range)?;
        if let Medium::Kernel(medium) = &self.medium
            && medium.read_file(start, bytes)?
        {
            return self.check_faults(&span);
        }
        self.read(range, |source| source.copy_to(bytes))
    }

    /// Stores `bytes` at `start`, as [`write`](Self::write) does. For much that nobody reads soon: pages of a file that are
    /// not mapped yet are filled by a system call, which costs a fraction of mapping them.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_bytes(&self, start: u64, bytes: &[u8]) -> Result<(), MediaError> {
        let range = start..start.saturating_add(bytes.len() as u64);
        let span = self.span(&range)?;
        self.check_writable()?;
        if let Medium::Kernel(medium) = &self.medium
            && medium.write_file(start, bytes, self.len_bytes())?
        {
            return self.check_faults(&span);
        }
        self.write(range, |mut target| target.copy_from(bytes))
    }

    /// [`write`](Self::write), then [`persist`](Self::persist), with one look for media errors at the end: nothing is
    /// reported durable that is not, and a cache line costs little more than its write-back.
    ///
    /// # Errors
    ///
    /// As of both.
    #[inline]
    pub fn write_through<R>(&self, range: Range<u64>, f: impl FnOnce(Target<'_>) -> R) -> Result<R, MediaError> {
        let span = self.span(&range)?;
        match &self.medium {
            Medium::Kernel(medium) if self.granularity() == Granularity::CacheLine => {
                self.check_writable()?;
                medium.prepare_store(&range, self.len_bytes())?;
                let result = f(self.mapping.target(&span));
                medium.flush_lines(&self.mapping, &span)?;
                self.check_faults(&span)?;
                medium.drain()?; // last: what follows a fence waits for it
                Ok(result)
            }
            _ => {
                let result = self.write(range.clone(), f)?;
                self.persist(range)?;
                Ok(result)
            }
        }
    }

    /// As [`write`](Self::write), for an `f` that fills every whole 64-byte line of `range` with non-temporal stores: what
    /// it stored needs no flush, only a [`drain`](Self::drain). Lines that `range` covers in part are flushed here.
    ///
    /// An `f` that keeps to ordinary stores (an encryption backend without non-temporal ones) must use `write` and flush:
    /// its stores would still be in the cache at a power cut.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and `Poisoned`.
    pub fn write_streaming<R>(&self, range: Range<u64>, f: impl FnOnce(Target<'_>) -> R) -> Result<R, MediaError> {
        let result = self.write(range.clone(), f)?;
        if self.granularity() == Granularity::CacheLine {
            let line_bytes = LINE_BYTES as u64;
            if let Medium::Simulated(medium) = &self.medium {
                medium.streamed(&(range.start.next_multiple_of(line_bytes)..range.end - range.end % line_bytes));
            }
            if !range.start.is_multiple_of(line_bytes) {
                self.flush(range.start..range.end.min(range.start.next_multiple_of(line_bytes)))?;
            }
            if !range.end.is_multiple_of(line_bytes) {
                self.flush(range.start.max(range.end - range.end % line_bytes)..range.end)?;
            }
        }
        Ok(result)
    }

    /// Pushes earlier stores to `range` towards the medium: CLWB of its cache lines, or `msync` of its pages. At page
    /// granularity they are durable when this returns; at cache-line granularity after a [`drain`](Self::drain) by the
    /// same thread.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `Fault`; `Flush` or `Shrunk` when stores may be lost, after which every flush is `Poisoned`.
    pub fn flush(&self, range: Range<u64>) -> Result<(), MediaError> {
        let span = self.span(&range)?;
        self.check_faults(&span)?;
        match &self.medium {
            Medium::Kernel(medium) => medium.flush(&self.mapping, &span, self.len_bytes())?,
            Medium::Simulated(medium) => medium.flush(&range)?,
            Medium::Volatile => {}
        }
        self.check_faults(&span)
    }

    /// Waits until what this thread has flushed, and its non-temporal stores, are durable (SFENCE). At page granularity
    /// there is nothing to wait for.
    ///
    /// # Errors
    ///
    /// `Poisoned`.
    pub fn drain(&self) -> Result<(), MediaError> {
        self.check_owner()?;
        match &self.medium {
            Medium::Kernel(medium) => medium.drain(),
            Medium::Simulated(medium) => medium.drain(),
            Medium::Volatile => Ok(()),
        }
    }

    /// Makes earlier stores to `range` durable: flush, then drain.
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush).
    pub fn persist(&self, range: Range<u64>) -> Result<(), MediaError> {
        self.flush(range)?;
        self.drain()
    }

    /// Makes all earlier stores durable.
    ///
    /// At page granularity this is `fdatasync` and covers the stores of all threads that happened before the call;
    /// callers at the same time may share one. At cache-line granularity it is a fence of the calling thread: whoever
    /// stores flushes (or stores non-temporally) and drains before it tells another thread.
    ///
    /// # Errors
    ///
    /// `Flush` or `Shrunk` when stores may be lost, `Poisoned` after that.
    pub fn sync_all(&self) -> Result<(), MediaError> {
        self.check_owner()?;
        match &self.medium {
            Medium::Kernel(medium) => medium.sync_all(self.len_bytes()),
            Medium::Simulated(medium) => medium.sync_all(self.len_bytes()),
            Medium::Volatile => Ok(()),
        }
    }

    /// Whether what is stored from now on can be made durable at all. Who writes what others act upon asks first: a store
    /// that no flush follows is seen all the same.
    ///
    /// # Errors
    ///
    /// `Poisoned` when an earlier flush failed.
    pub fn check_flushes(&self) -> Result<(), MediaError> {
        self.check_owner()?;
        match &self.medium {
            Medium::Kernel(medium) => medium.check_flushes(),
            Medium::Simulated(medium) => medium.check(),
            Medium::Volatile => Ok(()),
        }
    }

    /// Whether a flush has failed, so that every later one does until the backing is reopened.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        match &self.medium {
            Medium::Kernel(medium) => medium.is_poisoned(),
            Medium::Simulated(_) | Medium::Volatile => false,
        }
    }

    /// Asks the kernel to read `range` of a file into its cache soon. `false` where there is no such cache.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `Io`.
    pub fn prefetch(&self, range: &Range<u64>) -> Result<bool, MediaError> {
        self.span(range)?;
        match &self.medium {
            Medium::Kernel(medium) => medium.prefetch(range),
            Medium::Simulated(_) | Medium::Volatile => Ok(false),
        }
    }

    /// The process that opened it: only there may it be used, because the keys of what is on it stayed there.
    pub(crate) const fn owner(&self) -> Owner {
        self.owner
    }

    pub(super) const fn users(&self) -> &Users {
        &self.users
    }

    #[inline]
    fn check_owner(&self) -> Result<(), MediaError> {
        if self.owner.is_here() { Ok(()) } else { Err(MediaError::Forked) }
    }

    fn check_writable(&self) -> Result<(), MediaError> {
        match self.access {
            Access::ReadOnly => Err(MediaError::ReadOnly),
            Access::ReadWrite => Ok(()),
        }
    }

    /// The one check that turns offsets into positions in the mapping.
    #[inline]
    fn span(&self, range: &Range<u64>) -> Result<Range<usize>, MediaError> {
        self.check_owner()?;
        let len_bytes = self.len_bytes();
        let out_of_range = || MediaError::OutOfRange { start: range.start, end: range.end, len_bytes };
        if range.start > range.end || range.end > len_bytes {
            return Err(out_of_range());
        }
        let start = usize::try_from(range.start).map_err(|_| out_of_range())?;
        let end = usize::try_from(range.end).map_err(|_| out_of_range())?;
        Ok(start..end)
    }

    #[inline]
    fn check_faults(&self, span: &Range<usize>) -> Result<(), MediaError> {
        match self.mapping.first_bad(span) {
            None => Ok(()),
            Some(offset) => Err(MediaError::Fault { offset: offset as u64 }),
        }
    }
}

mod blocks;
mod room;
#[cfg(test)]
mod tests;
