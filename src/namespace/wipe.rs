//! Overwriting a range of a backing for good.

use std::ops::Range;

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
