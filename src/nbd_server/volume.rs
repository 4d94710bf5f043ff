//! A volume as an export: the one place where the server meets what it serves.

use super::export::{Durability, Export, ExportError, Extent, ExtentKind, Hole};
use crate::pmem::{BackingKind, MediaError};
use crate::volume::{Volume, VolumeError};

impl Export for Volume {
    fn size_bytes(&self) -> u64 {
        self.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        Ok(Self::read_at(self, buf, offset)?)
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), ExportError> {
        Self::write_at(self, data, offset).map_err(of_write)?;
        persist(self, offset, data.len() as u64, durability)
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, hole: Hole, durability: Durability) -> Result<(), ExportError> {
        match hole {
            Hole::Allowed => self.punch_zeroes(offset, len_bytes).map_err(of_write)?,
            Hole::Forbidden => Self::write_zeroes(self, offset, len_bytes).map_err(of_write)?,
        }
        persist(self, offset, len_bytes, durability)
    }

    fn discard(&self, offset: u64, len_bytes: u64, durability: Durability) -> Result<(), ExportError> {
        Self::discard(self, offset, len_bytes)?;
        persist(self, offset, len_bytes, durability)
    }

    fn flush(&self) -> Result<(), ExportError> {
        Ok(Self::flush(self)?)
    }

    fn resident_plaintext_bytes(&self) -> u64 {
        self.resident_bytes()
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

fn persist(volume: &Volume, offset: u64, len_bytes: u64, durability: Durability) -> Result<(), ExportError> {
    match durability {
        Durability::Cached => Ok(()),
        Durability::Fua => Ok(volume.persist(offset..offset + len_bytes)?),
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
            VolumeError::Locked => Self::ShuttingDown,
            VolumeError::Media(MediaError::NoSpace) => Self::NoSpace,
            VolumeError::Media(MediaError::Unsupported) => Self::Unsupported,
            _ => Self::Media,
        }
    }
}
