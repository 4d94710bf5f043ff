//! Bytes that go through a window: the coherent half of the volume's reads and writes, and what maps store by a call.

use std::ops::Range;

use super::operations::blocks_of;
use super::{PAGE_BYTES, Window, WriteBack, pages_of};
use crate::pmem::Granularity;
use crate::volume::area::HeldBlocks;
use crate::volume::requests::{read_media, write_media, write_pieces};
use crate::volume::{Volume, VolumeError, len};

impl Volume {
    /// Stores the beginning of `data` at `offset`, up to the first page that is absent and would be stored to in part. How
    /// many bytes were stored. Those of resident pages are in the window, and on media after a write-back; those of absent
    /// pages are on media. The caller sees to it that `data` is no more than may be held at once, and lies in no map.
    ///
    /// # Errors
    ///
    /// [`VolumeError::ReadOnly`], [`VolumeError::OutOfRange`], [`VolumeError::Locked`]; [`VolumeError::Media`], after which
    /// each block of an absent page holds its old or its new content.
    pub(crate) fn store(&self, window: &Window, data: &[u8], offset: u64) -> Result<usize, VolumeError> {
        let range = self.check_write(offset, data.len() as u64)?;
        let blocks = blocks_of(&range);
        let held = self.area.exclusive(blocks);
        let mut rest = range.clone();
        while !rest.is_empty() {
            let (piece, resident) = window.piece(&rest);
            let (piece, cut_off) = if resident { (piece, false) } else { self.whole_pages_first(piece) };
            let part = &data[len(&(range.start..piece.start))..len(&(range.start..piece.end))];
            if resident {
                window.memory.target(&piece).copy_from(part);
                pages_of(&piece).for_each(|page| {
                    window.unsynced.insert(page);
                });
            } else if !piece.is_empty() {
                write_media(held.blocks(), piece.clone(), part)?;
            }
            rest.start = piece.end;
            if cut_off {
                break;
            }
        }
        Ok(len(&(range.start..rest.start)))
    }

    /// Stores `data` to the checked `range` and makes it durable: resident pages in the window and on media, absent ones on
    /// media.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Locked`], [`VolumeError::Media`].
    pub(crate) fn write_through(&self, window: &Window, range: Range<u64>, data: &[u8]) -> Result<(), VolumeError> {
        if self.locked() {
            return Err(VolumeError::Locked);
        }
        write_pieces(range.clone(), data, |piece, data| {
            let held = self.area.exclusive(blocks_of(&piece));
            self.write_coherent(held.blocks(), window, piece, data)
        })?;
        match self.backing().granularity() {
            Granularity::CacheLine => Ok(()), // such a write is durable
            Granularity::Page => self.persist_media(range),
        }
    }

    /// The beginning of `piece`, as far as it is whole pages, and whether there is more of it. The last page of the volume is
    /// whole where the volume ends.
    fn whole_pages_first(&self, piece: Range<u64>) -> (Range<u64>, bool) {
        if !piece.start.is_multiple_of(PAGE_BYTES) {
            return (piece.start..piece.start, true);
        }
        if piece.end == self.size() {
            return (piece, false);
        }
        let end = piece.end - piece.end % PAGE_BYTES;
        (piece.start..end, end < piece.end)
    }

    /// Reads what the caller holds: resident pages from the window, absent ones from media, and these stay absent.
    pub(in crate::volume) fn read_coherent(
        held: HeldBlocks<'_>,
        window: &Window,
        range: Range<u64>,
        buf: &mut [u8],
    ) -> Result<(), VolumeError> {
        let mut rest = (range, buf);
        while !rest.0.is_empty() {
            let (piece, resident) = window.piece(&rest.0);
            let (out, after) = rest.1.split_at_mut(len(&piece));
            rest = (piece.end..rest.0.end, after);
            if resident {
                window.memory.source(&piece).copy_to(out);
            } else {
                read_media(held, piece, out)?;
            }
        }
        Ok(())
    }

    /// [`Volume::write_at`] of a checked range that the caller holds exclusively, whole blocks of it: to media, and to the
    /// window where it is resident.
    pub(in crate::volume) fn write_coherent(
        &self,
        held: HeldBlocks<'_>,
        window: &Window,
        range: Range<u64>,
        data: &[u8],
    ) -> Result<(), VolumeError> {
        let mut rest = (range, data);
        while !rest.0.is_empty() {
            let (piece, resident) = window.piece(&rest.0);
            let (part, after) = rest.1.split_at(len(&piece));
            rest = (piece.end..rest.0.end, after);
            if resident {
                window.memory.target(&piece).copy_from(part);
                self.write_back_held(held, window, &blocks_of(&piece), WriteBack::Always)?;
            } else {
                write_media(held, piece, part)?;
            }
        }
        Ok(())
    }

    /// Zeroes what is resident of `range`, which the caller holds exclusively and has just made zero on media.
    pub(in crate::volume) fn zero_resident(window: &Window, range: &Range<u64>) {
        let mut rest = range.clone();
        while let Some(run) = window.next_resident(&rest) {
            window.memory.target(&run).fill(0);
            rest.start = run.end;
        }
    }
}
