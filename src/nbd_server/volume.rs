//! A volume as an export: the one place where the server meets what it serves.

use super::export::{Export, ExportError, Extent, ExtentKind, Hole};
use crate::pmem::{BackingKind, Granularity, MediaError};
use crate::volume::{Volume, VolumeError};

impl Export for Volume {
    fn size_bytes(&self) -> u64 {
        self.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        Ok(Self::read_at(self, buf, offset)?)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        Self::write_at(self, data, offset).map_err(of_write)
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, hole: Hole) -> Result<(), ExportError> {
        match hole {
            Hole::Allowed => self.punch_zeroes(offset, len_bytes).map_err(of_write),
            Hole::Forbidden => Self::write_zeroes(self, offset, len_bytes).map_err(of_write),
            Hole::Required if self.punch_only(offset, len_bytes).map_err(of_write)? => Ok(()),
            Hole::Required => Err(ExportError::Unsupported),
        }
    }

    fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        Ok(Self::discard(self, offset, len_bytes)?)
    }

    fn persist(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        Ok(Self::persist(self, offset..offset + len_bytes)?)
    }

    fn flush(&self) -> Result<(), ExportError> {
        Ok(Self::flush(self)?)
    }

    fn durability_waits(&self) -> bool {
        self.granularity() == Granularity::Page
    }

    fn prefetch(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        Ok(Self::prefetch(self, offset, len_bytes).map(drop)?)
    }

    fn prefetches(&self) -> bool {
        // The kernel caches no other kind of backing in a way that it can be asked to fill.
        self.backing().kind() == BackingKind::File && self.granularity() == Granularity::Page
    }

    fn resident_plaintext_bytes(&self) -> u64 {
        self.resident_bytes()
    }

    fn is_poisoned(&self) -> bool {
        self.backing().is_poisoned()
    }

    fn is_locked(&self) -> bool {
        self.locked()
    }

    fn fast_zero(&self) -> bool {
        // Only a file is known to punch at once; elsewhere "fast" would be a promise that may end in encrypting zeroes.
        self.discards() && self.backing().kind() == BackingKind::File
    }

    fn discards(&self) -> bool {
        Self::discards(self)
    }

    fn extents(&self, offset: u64, len_bytes: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        let extents = Self::extents(self, offset, len_bytes, limit)?;
        let kind = |hole| if hole { ExtentKind::Hole } else { ExtentKind::Allocated };
        Ok(extents.iter().map(|extent| Extent { len_bytes: extent.len_bytes, kind: kind(extent.hole) }).collect())
    }
}

/// The protocol has `ENOSPC` for a write past the end, and `EINVAL` for everything else.
fn of_write(error: VolumeError) -> ExportError {
    match error {
        VolumeError::OutOfRange { .. } => ExportError::NoSpace,
        other => other.into(),
    }
}

impl From<VolumeError> for ExportError {
    fn from(error: VolumeError) -> Self {
        match error {
            VolumeError::ReadOnly => Self::ReadOnly,
            VolumeError::OutOfRange { .. } => Self::PastEnd,
            VolumeError::Locked => Self::Locked,
            VolumeError::Media(MediaError::NoSpace) => Self::NoSpace,
            VolumeError::Media(MediaError::Unsupported) => Self::Unsupported,
            other => Self::Volume(other),
        }
    }
}
