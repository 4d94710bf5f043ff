//! The blocks of a backing: which bytes have some, and holes.

use std::ops::Range;

use super::{Backing, BackingExtent, Medium};
use crate::pmem::error::MediaError;

/// How many runs are asked for at a time.
const EXTENTS_MAX: usize = 256;

impl Backing {
    /// Whether there may be bytes of it that have no block: a file with holes.
    #[must_use]
    pub fn is_sparse(&self) -> bool {
        match &self.medium {
            Medium::Kernel(medium) => medium.is_sparse(),
            Medium::Simulated(_) | Medium::Volatile => false,
        }
    }

    /// Makes holes, new blocks and a new length durable, those too that a predecessor has left: a system call only when there
    /// may be any that are not. Stores may be made durable along with them.
    ///
    /// # Errors
    ///
    /// As [`sync_all`](Self::sync_all).
    pub fn sync_blocks(&self) -> Result<(), MediaError> {
        let owes = match &self.medium {
            Medium::Kernel(medium) => medium.owes_blocks(),
            Medium::Simulated(medium) => medium.owes_blocks(),
            Medium::Volatile => false,
        };
        if owes { self.sync_all() } else { Ok(()) }
    }

    /// Makes sure that `range` has blocks. Durable after [`sync_all`](Self::sync_all). Devices always have them.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `ReadOnly`, `NoSpace`; `Unsupported` by the file system.
    pub fn allocate(&self, range: Range<u64>) -> Result<(), MediaError> {
        self.span(&range)?;
        self.check_writable()?;
        match &self.medium {
            Medium::Kernel(medium) => medium.allocate(&range),
            Medium::Simulated(medium) => medium.allocate(),
            Medium::Volatile => Ok(()),
        }
    }

    /// Gives the blocks of `range` back: it reads as zero bytes. Durable after [`sync_all`](Self::sync_all). On a block
    /// device the range must be aligned to its sectors.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `ReadOnly`; `Unsupported` by the file system or device.
    pub fn punch_hole(&self, range: Range<u64>) -> Result<(), MediaError> {
        let span = self.span(&range)?;
        self.check_writable()?;
        match &self.medium {
            Medium::Kernel(medium) => medium.punch_hole(&range),
            Medium::Simulated(medium) => medium.punch_hole(&self.mapping, &span),
            Medium::Volatile => {
                self.mapping.target(&span).fill(0);
                Ok(())
            }
        }
    }

    /// Which bytes of `range` hold data, in ascending order without gaps. At most `count_max` extents, and no more are looked
    /// for: when there are more, those given cover the beginning of `range`, and the caller asks again from their end.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `Io`.
    pub fn extents(&self, range: Range<u64>, count_max: usize) -> Result<Vec<BackingExtent>, MediaError> {
        let span = self.span(&range)?;
        match &self.medium {
            Medium::Kernel(medium) => medium.extents(&range, count_max),
            _ if range.is_empty() || count_max == 0 => Ok(Vec::new()),
            Medium::Simulated(medium) => {
                let mut extents = medium.extents(&self.mapping, &span);
                extents.truncate(count_max);
                Ok(extents)
            }
            Medium::Volatile => Ok(vec![BackingExtent { range, allocated: true }]),
        }
    }

    /// Bytes of blocks that it would need besides those that it has, were what is at `from` moved to the byte `to`, with holes
    /// left holes.
    ///
    /// # Errors
    ///
    /// As [`extents`](Self::extents).
    pub fn blocks_to_move(&self, from: Range<u64>, to: u64) -> Result<u64, MediaError> {
        if to == from.start || !self.is_sparse() {
            return Ok(0);
        }
        let mut needed = 0;
        self.for_extents(from.clone(), |data| {
            let place = |offset: u64| to.saturating_add(offset - from.start);
            if data.allocated {
                self.for_extents(place(data.range.start)..place(data.range.end), |there| {
                    needed += if there.allocated { 0 } else { there.range.end - there.range.start };
                    Ok(())
                })?;
            }
            Ok(())
        })?;
        Ok(needed)
    }

    /// Calls `look` with every run of `range`, in order.
    fn for_extents(
        &self,
        range: Range<u64>,
        mut look: impl FnMut(&BackingExtent) -> Result<(), MediaError>,
    ) -> Result<(), MediaError> {
        let mut start = range.start;
        while start < range.end {
            let extents = self.extents(start..range.end, EXTENTS_MAX)?;
            let Some(end) = extents.last().map(|last| last.range.end).filter(|&end| end > start) else { break };
            extents.iter().try_for_each(&mut look)?;
            start = end;
        }
        Ok(())
    }
}
