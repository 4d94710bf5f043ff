//! A backing that the kernel provides: which system calls and instructions make its stores durable, and its blocks.
//!
//! At page granularity the stores are in the page cache. The first store to a clean page faults and marks the page dirty in
//! the file, and write-back protects it again first, so `fdatasync` and `msync` find every store that was made before they
//! began, with the file metadata that is needed to read it back. At cache-line granularity only changes of blocks and
//! length need a system call.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, fdatasync, fstat, ftruncate, seek};
use rustix::io::{Errno, pread, pwrite};

use super::backing::{BackingExtent, BackingKind};
use super::bitmap::Bitmap;
use super::error::MediaError;
use super::file_limit::check_file_size_limit;
use super::granularity::Granularity;
use super::mapping::Mapping;
use super::options::Allocation;
use super::persist;
use super::sync::{Changes, SharedSync};

/// Blocks of a sparse file are allocated in aligned steps of this many bytes, before the first store to a step.
const ALLOCATION_STEP_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct KernelMedium {
    file: File,
    kind: BackingKind,
    granularity: Granularity,
    syncs: SharedSync,
    /// The file may have holes, so a store needs its blocks allocated first.
    sparse: AtomicBool,
    /// Steps that are known to have no holes.
    allocated_steps: Bitmap,
    /// Held while blocks come and go, so that `allocated_steps` never claims a step that has just got a hole.
    block_changes: Mutex<()>,
    /// Changes of blocks or the length.
    changes: Changes,
}

impl KernelMedium {
    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn new(
        file: File,
        kind: BackingKind,
        granularity: Granularity,
        mapped_bytes: u64,
    ) -> std::io::Result<Self> {
        let stat = fstat(&file)?;
        // st_blocks counts 512 bytes whatever the block size is (stat(2)).
        let held_bytes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        let sparse = kind == BackingKind::File && held_bytes < u64::try_from(stat.st_size).unwrap_or(0);
        let steps = usize::try_from(mapped_bytes.div_ceil(ALLOCATION_STEP_BYTES)).unwrap_or(usize::MAX);
        Ok(Self {
            file,
            kind,
            granularity,
            syncs: SharedSync::default(),
            sparse: AtomicBool::new(sparse),
            allocated_steps: Bitmap::new(steps)?,
            block_changes: Mutex::new(()),
            changes: Changes::default(),
        })
    }

    /// Makes sure that a store to `range` finds its blocks.
    ///
    /// On a file system without `fallocate` nothing can be promised, and a full disk shows as a media error.
    #[inline]
    pub(super) fn prepare_store(&self, range: &Range<u64>, len_bytes: u64) -> Result<(), MediaError> {
        if self.sparse.load(Ordering::Acquire) { self.allocate_steps(range, len_bytes) } else { Ok(()) }
    }

    fn allocate_steps(&self, range: &Range<u64>, len_bytes: u64) -> Result<(), MediaError> {
        if range.is_empty() {
            return Ok(());
        }
        for step in range.start / ALLOCATION_STEP_BYTES..range.end.div_ceil(ALLOCATION_STEP_BYTES) {
            let bit = usize::try_from(step).map_err(|_| MediaError::Unsupported)?;
            if self.allocated_steps.contains(bit) {
                continue;
            }
            let start = step * ALLOCATION_STEP_BYTES;
            let end = (start + ALLOCATION_STEP_BYTES).min(len_bytes);
            let _guard = self.block_changes.lock().unwrap_or_else(PoisonError::into_inner);
            match self.fallocate(FallocateFlags::KEEP_SIZE, &(start..end)) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(MediaError::from_errno(errno)),
            }
            self.allocated_steps.insert(bit);
        }
        Ok(())
    }

    /// [`Self::flush`] at cache-line granularity.
    #[inline]
    pub(super) fn flush_lines(&self, mapping: &Mapping, range: &Range<usize>) -> Result<(), MediaError> {
        self.syncs.check()?;
        mapping.write_back(range);
        Ok(())
    }

    pub(super) fn flush(&self, mapping: &Mapping, range: &Range<usize>, len_bytes: u64) -> Result<(), MediaError> {
        match self.granularity {
            Granularity::CacheLine => self.flush_lines(mapping, range),
            Granularity::Page if range.is_empty() => self.syncs.check(),
            Granularity::Page => {
                self.syncs.check()?;
                mapping.write_pages(range).map_err(|errno| {
                    self.syncs.poison(errno);
                    MediaError::Flush(errno.into())
                })?;
                self.check_length(len_bytes)
            }
        }
    }

    #[inline]
    pub(super) fn drain(&self) -> Result<(), MediaError> {
        self.syncs.check()?;
        if self.granularity == Granularity::CacheLine {
            persist::fence();
        }
        Ok(())
    }

    /// Whether blocks or the length may have changed without being durable.
    pub(super) fn owes_blocks(&self) -> bool {
        self.changes.owed().is_some()
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.sparse.load(Ordering::Acquire)
    }

    /// Refuses when an earlier flush failed.
    pub(super) fn check_flushes(&self) -> Result<(), MediaError> {
        self.syncs.check()
    }

    pub(super) fn sync_all(&self, len_bytes: u64) -> Result<(), MediaError> {
        self.drain()?;
        let owed = self.changes.owed();
        if self.kind == BackingKind::DevDax || (self.granularity == Granularity::CacheLine && owed.is_none()) {
            return Ok(());
        }
        self.syncs.run(|| fdatasync(&self.file))?;
        owed.into_iter().for_each(|count| self.changes.are_durable(count));
        self.check_length(len_bytes)
    }

    /// Notices a file that was truncated under us: the kernel drops the dirty pages behind its end without an error.
    fn check_length(&self, len_bytes: u64) -> Result<(), MediaError> {
        if self.kind != BackingKind::File {
            return Ok(());
        }
        let stat = fstat(&self.file).map_err(MediaError::from_errno)?;
        let now_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if now_bytes < len_bytes {
            self.syncs.poison(Errno::IO);
            return Err(MediaError::Shrunk { now_bytes, len_bytes });
        }
        Ok(())
    }

    /// Writes `bytes` at `offset` by system calls. `false` where a mapping is the only way, or the better one. A file that
    /// has become shorter than `len_bytes` is not made long again: what it has lost would read as a hole.
    pub(super) fn write_file(&self, offset: u64, bytes: &[u8], len_bytes: u64) -> Result<bool, MediaError> {
        if self.kind != BackingKind::File || self.granularity == Granularity::CacheLine {
            return Ok(false);
        }
        self.check_length(len_bytes)?;
        if check_file_size_limit(offset.saturating_add(bytes.len() as u64)).is_err() {
            return Ok(false); // stores to a mapping are not limited
        }
        let mut done = 0;
        while done < bytes.len() {
            let written = retry_interrupted(|| pwrite(&self.file, &bytes[done..], offset + done as u64));
            done += written.map_err(MediaError::from_errno)?;
        }
        Ok(true)
    }

    /// Reads `bytes` from `offset` by system calls. `false` where a mapping is the only way, or the better one.
    pub(super) fn read_file(&self, offset: u64, bytes: &mut [u8]) -> Result<bool, MediaError> {
        if self.kind != BackingKind::File || self.granularity == Granularity::CacheLine {
            return Ok(false);
        }
        let mut done = 0;
        while done < bytes.len() {
            match retry_interrupted(|| pread(&self.file, &mut bytes[done..], offset + done as u64)) {
                Ok(0) => return Ok(false), // the file is shorter now: the mapping tells of it as it always does
                Ok(count) => done += count,
                Err(errno) => return Err(MediaError::from_errno(errno)),
            }
        }
        Ok(true)
    }

    pub(super) fn allocate(&self, range: &Range<u64>) -> Result<(), MediaError> {
        if self.kind != BackingKind::File || range.is_empty() {
            return Ok(());
        }
        let _guard = self.block_changes.lock().unwrap_or_else(PoisonError::into_inner);
        let allocated = self.fallocate(FallocateFlags::KEEP_SIZE, range);
        self.changes.count();
        allocated.map_err(MediaError::from_errno)
    }

    pub(super) fn punch_hole(&self, range: &Range<u64>) -> Result<(), MediaError> {
        if self.kind == BackingKind::DevDax {
            return Err(MediaError::Unsupported);
        }
        if range.is_empty() {
            return Ok(());
        }
        let _guard = self.block_changes.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the hole exists, so that no store can come between the hole and the knowledge of it.
        if self.kind == BackingKind::File {
            self.sparse.store(true, Ordering::Release);
        }
        let punched = self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range);
        self.changes.count();
        for step in range.start / ALLOCATION_STEP_BYTES..range.end.div_ceil(ALLOCATION_STEP_BYTES) {
            self.allocated_steps.remove(usize::try_from(step).map_err(|_| MediaError::Unsupported)?);
        }
        match punched {
            // A device whose sectors are larger than the range's alignment.
            Err(Errno::INVAL) => Err(MediaError::Unsupported),
            other => other.map_err(MediaError::from_errno),
        }
    }

    pub(super) fn extents(&self, range: &Range<u64>, count_max: usize) -> Result<Vec<BackingExtent>, MediaError> {
        if range.is_empty() || count_max == 0 {
            return Ok(Vec::new());
        }
        if self.kind != BackingKind::File {
            return Ok(vec![BackingExtent { range: range.clone(), allocated: true }]);
        }
        let mut extents = Vec::new();
        let mut position = range.start;
        while position < range.end && extents.len() < count_max {
            let data = self.seek_or(SeekFrom::Data(position), range.end)?.min(range.end);
            let (end, allocated) = if data > position {
                (data, false)
            } else {
                (self.seek_or(SeekFrom::Hole(position), range.end)?.min(range.end), true)
            };
            if end <= position {
                return Err(MediaError::Io(Errno::IO.into())); // a file system that reports an empty extent
            }
            extents.push(BackingExtent { range: position..end, allocated });
            position = end;
        }
        Ok(extents)
    }

    /// Whether a flush has failed, so that every later one does.
    pub(super) fn is_poisoned(&self) -> bool {
        self.syncs.check().is_err()
    }

    /// Whether the range was asked for: a cache is under files that are not on persistent memory.
    pub(super) fn prefetch(&self, range: &Range<u64>) -> Result<bool, MediaError> {
        if self.kind != BackingKind::File || self.granularity == Granularity::CacheLine {
            return Ok(false);
        }
        if let Some(len_bytes) = NonZeroU64::new(range.end - range.start) {
            fadvise(&self.file, range.start, Some(len_bytes), Advice::WillNeed).map_err(MediaError::from_errno)?;
        }
        Ok(true)
    }

    /// How long the file or device is now.
    pub(super) fn present_len_bytes(&self) -> Result<Option<u64>, MediaError> {
        match self.kind {
            BackingKind::DevDax => Ok(None),
            _ => seek(&self.file, SeekFrom::End(0)).map(Some).map_err(MediaError::from_errno),
        }
    }

    /// Makes a file longer, or finds out how long a device has become.
    pub(super) fn grow(&self, now_bytes: u64, len_bytes: u64, allocation: Allocation) -> Result<(), MediaError> {
        match self.kind {
            BackingKind::DevDax => return Err(MediaError::Unsupported),
            BackingKind::BlockDevice => {
                let device_bytes = seek(&self.file, SeekFrom::End(0)).map_err(MediaError::from_errno)?;
                return if len_bytes <= device_bytes { Ok(()) } else { Err(MediaError::NoSpace) };
            }
            BackingKind::File => {}
        }
        check_file_size_limit(len_bytes).map_err(MediaError::Io)?;
        let _guard = self.block_changes.lock().unwrap_or_else(PoisonError::into_inner);
        let grown = match allocation {
            Allocation::Sparse => {
                self.sparse.store(true, Ordering::Release);
                ftruncate(&self.file, len_bytes)
            }
            Allocation::Full => self.fallocate(FallocateFlags::empty(), &(now_bytes..len_bytes)),
        };
        self.changes.count();
        grown.map_err(|errno| {
            // What a full disk left half grown is taken back; the mapping never reached there.
            let _ = ftruncate(&self.file, now_bytes);
            MediaError::from_errno(errno)
        })
    }

    fn fallocate(&self, flags: FallocateFlags, range: &Range<u64>) -> Result<(), Errno> {
        retry_interrupted(|| fallocate(&self.file, flags, range.start, range.end - range.start))
    }

    /// Seeks for data or a hole; `otherwise` when there is none up to the end of the file.
    fn seek_or(&self, position: SeekFrom, otherwise: u64) -> Result<u64, MediaError> {
        match seek(&self.file, position) {
            Ok(found) => Ok(found),
            Err(Errno::NXIO) => Ok(otherwise),
            Err(errno) => Err(MediaError::from_errno(errno)),
        }
    }
}

/// Repeats a system call that a signal interrupted.
pub(super) fn retry_interrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}
