//! The runs of holes and data of a volume, asked for as a transfer comes along.

use std::ops::Range;

use crate::volume::{Volume, VolumeError};

/// The most runs of holes and data that are asked for at a time.
const RUNS_MAX: usize = 256;

/// Where a transfer is among the runs.
#[derive(Debug, Default)]
pub(super) struct Holes {
    /// The run that was looked at last, and whether it is a hole.
    run: Range<u64>,
    hole: bool,
}

impl Holes {
    /// How many of the `len` bytes at `offset` are of one kind, and whether that is a hole.
    pub(super) fn at(&mut self, volume: &Volume, offset: u64, len: usize) -> Result<(usize, bool), VolumeError> {
        if !self.run.contains(&offset) {
            let left_bytes = volume.size() - offset;
            let runs = volume.extents(offset, left_bytes, RUNS_MAX)?;
            let first = runs.first().map_or((left_bytes, false), |run| (run.len_bytes, run.hole));
            (self.run, self.hole) = (offset..offset + first.0, first.1);
        }
        let left = usize::try_from(self.run.end - offset).unwrap_or(usize::MAX);
        Ok((len.min(left), self.hole))
    }
}
