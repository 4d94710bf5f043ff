//! From a window to media: encrypts the blocks that changed, where they lie.
//!
//! A block is read from the window while the program may store to it. What is read is what some moment held, word by
//! word; a store that comes too late for it marks its page dirty again, because marks are always taken before the page
//! is read.

use std::ops::Range;
use std::sync::PoisonError;

use super::operations::blocks_of;
use super::{PAGE_BYTES, Window, pages_of};
use crate::memory::Target;
use crate::pmem::Granularity;
use crate::volume::area::HeldBlocks;
use crate::volume::{Volume, VolumeError, len};

/// How pages are written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteBack {
    /// They are known to have changed.
    Always,
    /// They may have changed: media are read first and written only where they differ.
    IfDifferent,
}

impl Volume {
    /// Encrypts the touched blocks of the resident pages of `range` to media. Durable after
    /// [`Volume::persist_media`] or [`Volume::flush`]. What is not resident is on media already.
    ///
    /// # Errors
    ///
    /// [`VolumeError::ReadOnly`]; [`VolumeError::Media`] for the first failure, after every other page was tried; the
    /// failed pages count as changed at the next time.
    pub(crate) fn write_back(&self, window: &Window, range: &Range<u64>, how: WriteBack) -> Result<(), VolumeError> {
        if self.read_only() {
            return Err(VolumeError::ReadOnly);
        }
        let mut result = Ok(());
        window.each_batch(range, |batch| {
            let blocks = blocks_of(&batch);
            let held = self.area.exclusive(blocks.clone());
            let mut rest = blocks;
            while let Some(run) = window.next_resident(&rest) {
                rest.start = run.end;
                let written = self.write_back_held(held.blocks(), window, &run, how);
                if result.is_ok() {
                    result = written;
                }
            }
        });
        result
    }

    /// [`Self::write_back`] of a range inside of one page, durable when it returns: the short way for a word or a line.
    ///
    /// # Errors
    ///
    /// As [`Self::write_back`].
    pub(crate) fn persist_within_page(&self, window: &Window, range: &Range<u64>) -> Result<(), VolumeError> {
        let blocks = blocks_of(range);
        if self.backing().granularity() == Granularity::CacheLine {
            // Who waits for the same blocks is served by whoever has them next.
            let Some((held, for_all)) = self.area.exclusive_unless_served(blocks.clone()) else { return Ok(()) };
            if self.write_within_page(held.blocks(), window, &blocks)? {
                for_all.served();
                return Ok(()); // such a write is durable, and one more fence costs as much as the lock
            }
        } else {
            let held = self.area.exclusive(blocks.clone());
            self.write_within_page(held.blocks(), window, &blocks)?;
        }
        // Also for what is absent: it may have been evicted to media since, and not be durable there.
        self.persist_media(blocks)
    }

    /// Writes `blocks` of one page back, which the caller holds exclusively. Whether they were resident.
    #[inline]
    fn write_within_page(
        &self,
        held: HeldBlocks<'_>,
        window: &Window,
        blocks: &Range<u64>,
    ) -> Result<bool, VolumeError> {
        let page = blocks.start / PAGE_BYTES;
        if !window.resident.contains(page) {
            return Ok(false);
        }
        let written = held.write(blocks.start, window.memory.source(blocks));
        if written.is_err() {
            window.unsynced.insert(page);
        }
        written.map(|()| true)
    }

    /// Writes whole blocks back that are resident, under the caller's exclusive hold.
    pub(super) fn write_back_held(
        &self,
        held: HeldBlocks<'_>,
        window: &Window,
        run: &Range<u64>,
        how: WriteBack,
    ) -> Result<(), VolumeError> {
        let run = run.start..run.end.min(self.size());
        if self.read_only() || run.is_empty() {
            return Ok(());
        }
        let written = match how {
            WriteBack::Always => held.write(run.start, window.memory.source(&run)),
            WriteBack::IfDifferent => write_different(held, window, &run),
        };
        match written {
            Ok(()) => self.pages_within(&run).for_each(|page| {
                window.unsynced.remove(page);
            }),
            Err(_) => pages_of(&run).for_each(|page| {
                window.unsynced.insert(page);
            }),
        }
        written
    }

    /// The pages that lie wholly in `run`: only these have nothing left to write after it.
    fn pages_within(&self, run: &Range<u64>) -> Range<u64> {
        let end = if run.end == self.size() { run.end.div_ceil(PAGE_BYTES) } else { run.end / PAGE_BYTES };
        run.start.div_ceil(PAGE_BYTES)..end
    }
}

/// Writes those pages of `run` that media do not have as they are.
fn write_different(held: HeldBlocks<'_>, window: &Window, run: &Range<u64>) -> Result<(), VolumeError> {
    let mut scratch = window.scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let mut start = run.start;
    let mut result = Ok(());
    while start < run.end && result.is_ok() {
        let end = (start / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES).min(run.end);
        let page = start..end;
        let media = &mut scratch[..len(&page)];
        let read = held.read(start, Target::from_slice(media));
        if read.is_err() || !window.memory.source(&page).equals(media) {
            result = held.write(start, window.memory.source(&page));
        }
        start = end;
    }
    scratch.fill(0);
    result
}
