//! The blocks of a backing: which bytes have some, and holes.

use std::ops::Range;

use super::{Backing, BackingExtent, Medium};
use crate::pmem::error::MediaError;
use crate::pmem::sim::SimMedium;

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
            Medium::Simulated(_) => {
                let mut extents = SimMedium::extents(&self.mapping, &span);
                extents.truncate(count_max);
                Ok(extents)
            }
            Medium::Volatile => Ok(vec![BackingExtent { range, allocated: true }]),
        }
    }
}
