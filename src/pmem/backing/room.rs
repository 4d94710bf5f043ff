//! How long a backing is, how it grows, and how much of it is locked.

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Backing, BackingKind, Medium};
use crate::pmem::error::{MediaError, OpenError};
use crate::pmem::lock::{self, LockRange};
use crate::pmem::options::Allocation;

impl Backing {
    /// How many bytes the file system under a file can still give to this user; `None` for what is not a file.
    #[must_use]
    pub fn free_bytes(&self) -> Option<u64> {
        let file = self.file().filter(|_| self.kind == BackingKind::File)?;
        let status = rustix::fs::fstatvfs(file).ok()?;
        Some(status.f_bavail.saturating_mul(status.f_frsize))
    }

    /// How long the file or device is now: more than [`len_bytes`](Self::len_bytes) when somebody else has enlarged it since
    /// it was opened, which [`grow`](Self::grow) then takes note of.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn present_len_bytes(&self) -> Result<u64, MediaError> {
        match &self.medium {
            Medium::Kernel(medium) => Ok(medium.present_len_bytes()?.unwrap_or_else(|| self.len_bytes())),
            Medium::Simulated(_) | Medium::Volatile => Ok(self.len_bytes()),
        }
    }

    /// Makes a file `len_bytes` long, or takes note that a block device has become so long, while it is in use. Durable
    /// after [`sync_all`](Self::sync_all). Does nothing when it has that length already.
    ///
    /// # Errors
    ///
    /// `OutOfRange` when `len_bytes` is less than the length or more than the address space that was kept for growth
    /// (64 GiB, or as much again as the backing had when it was opened): reopening makes new room. `NoSpace`, `ReadOnly`,
    /// `Unsupported` (device-DAX).
    pub fn grow(&self, len_bytes: u64, allocation: Allocation) -> Result<(), MediaError> {
        self.check_owner()?;
        self.check_writable()?;
        let _guard = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let now_bytes = self.len_bytes();
        if len_bytes < now_bytes || len_bytes > self.mapping.len_bytes() as u64 {
            return Err(MediaError::OutOfRange { start: now_bytes, end: len_bytes, len_bytes: now_bytes });
        }
        if len_bytes > now_bytes {
            match &self.medium {
                Medium::Kernel(medium) => medium.grow(now_bytes, len_bytes, allocation)?,
                Medium::Simulated(medium) => medium.grow(len_bytes)?,
                Medium::Volatile => return Err(MediaError::Unsupported),
            }
            self.len_bytes.store(len_bytes, Ordering::Release);
        }
        Ok(())
    }

    /// Locks exactly `range` (not empty) from now on, instead of the bytes that were given to
    /// [`OpenOptions::lock_range`](crate::pmem::OpenOptions::lock_range): the partition there has become longer or shorter.
    ///
    /// # Errors
    ///
    /// [`OpenError::Busy`] when another user has a part of it: the lock is then as before.
    pub fn lock_range(&self, range: Range<u64>) -> Result<(), OpenError> {
        self.check_owner().map_err(|error| OpenError::Io(std::io::Error::other(error)))?;
        let Medium::Kernel(medium) = &self.medium else { return Ok(()) };
        // The node where all meet first: what it grants, the other one has nobody to refuse to.
        let nodes = || self.node.iter().chain([medium.file()]);
        for node in nodes() {
            if !lock::try_lock(node, self.access, &LockRange::Bytes(range.clone())).map_err(OpenError::Io)? {
                return Err(OpenError::Busy);
            }
        }
        for node in nodes() {
            lock::unlock_outside(node, &range).map_err(OpenError::Io)?;
        }
        Ok(())
    }
}
