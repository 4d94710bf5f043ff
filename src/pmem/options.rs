//! What a caller chooses when a backing is opened or created.

use std::ops::Range;
use std::path::Path;

use super::backing::Backing;
use super::error::OpenError;
use super::granularity::{FORCE_GRANULARITY_VARIABLE, Granularity, parse_override};
use super::lock::LockRange;
use super::open::open_locked;

/// What a backing is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading, beside other readers.
    ReadOnly,
    /// Reading and writing, excluding everyone else.
    ReadWrite,
}

/// Whether a new file gets its blocks at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// All blocks now: a full disk is an error now.
    Full,
    /// Holes, filled as they are written: a full disk is an error of a later write.
    Sparse,
}

/// How to open a backing, for callers that need more than [`Backing::open`].
#[derive(Clone, Debug)]
pub struct OpenOptions {
    access: Access,
    lock: LockRange,
    forced: Option<Granularity>,
}

impl OpenOptions {
    /// Opens for `access`, locks everything, and detects the granularity.
    #[must_use]
    pub const fn new(access: Access) -> Self {
        Self { access, lock: LockRange::Whole, forced: None }
    }

    /// Locks only these bytes, so that other users of the same backing can have the rest. A block device is then not
    /// claimed from the kernel.
    #[must_use]
    pub fn lock_range(mut self, range: Range<u64>) -> Self {
        self.lock = LockRange::Bytes(range);
        self
    }

    /// Imposes a granularity, as `DAXCRYPT_FORCE_GRANULARITY` does; the environment variable has precedence. For tests
    /// and measurements: durability is then not what the media give.
    #[must_use]
    pub const fn force_granularity(mut self, granularity: Granularity) -> Self {
        self.forced = Some(granularity);
        self
    }

    /// Opens, locks and maps what is at `path`.
    ///
    /// # Errors
    ///
    /// Every variant of [`OpenError`] but `AlreadyExists` and `NoSpace`.
    pub fn open(&self, path: &Path) -> Result<Backing, OpenError> {
        let forced = self.forced_granularity()?;
        Backing::assemble(path, open_locked(path, self.access, &self.lock)?, self.access, forced)
    }

    pub(super) fn forced_granularity(&self) -> Result<Option<Granularity>, OpenError> {
        let variable = std::env::var_os(FORCE_GRANULARITY_VARIABLE);
        Ok(parse_override(variable.as_deref())?.or(self.forced))
    }
}
