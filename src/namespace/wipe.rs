//! Overwriting a range of a backing for good.

use std::ops::Range;

use super::area::first_nonzero;
use crate::pmem::{Backing, MediaError};

/// Bytes that are written between two reports.
const CHUNK_BYTES: u64 = 4 << 20;

/// Overwrites `range` with zeros, durably when this returns. `report` is told how many bytes are done.
///
/// # Errors
///
/// A [`MediaError`]; what was not reached is as it was.
pub fn overwrite_with_zeros(
    backing: &Backing,
    range: Range<u64>,
    mut report: impl FnMut(u64),
) -> Result<(), MediaError> {
    let mut start = range.start;
    while start < range.end {
        let end = range.end.min(start.saturating_add(CHUNK_BYTES));
        backing.write(start..end, |mut target| target.fill(0))?;
        // Chunk by chunk, so that the rate is that of the medium and not that of the page cache.
        backing.persist(start..end)?;
        start = end;
        report(start - range.start);
    }
    backing.sync_all()
}

/// Makes the zeros in `range` durable, if there is nothing else: the flush of whoever has overwritten it may have failed, or he
/// may have been killed before it, and what was there before is on media then. What has no blocks stays so.
pub(super) fn confirm_zeros(backing: &Backing, range: Range<u64>) -> Result<(), MediaError> {
    let has_blocks = backing.extents(range.clone(), 2)?.iter().any(|extent| extent.allocated);
    if has_blocks && first_nonzero(backing, range.clone())?.is_none() {
        backing.write(range.clone(), |mut target| target.fill(0))?;
        backing.persist(range)?;
    }
    Ok(())
}
