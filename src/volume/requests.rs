//! Requests: bytes at offsets of any alignment, from and to buffers of callers.
//!
//! A long request is done in pieces, each of which holds its range for itself: whoever waits for a part of it (a touch of a
//! direct map, another request) waits for a piece and no longer. Pieces are whole blocks but for the first and the last
//! one; these alone are read, changed and written back, so these alone are held exclusively. No range is held while a
//! system call waits for media, nor while memory is touched that may be a direct map.

use std::ops::Range;

use zeroize::Zeroizing;

use super::area::{BLOCK_BYTES, HeldBlocks, HeldRange};
use super::buffers::in_a_map;
use super::window::{Window, blocks_of};
use super::{Volume, VolumeError, VolumeExtent, block_start, len, within_block};
use crate::memory::{Source, Target};
use crate::pmem::{Granularity, MediaError};
use crate::secret::SecretBytes;
use crate::xts::BLOCK_BYTES as BLOCK_LEN;

/// The most that is held at a time where it is encrypted or decrypted: some 100 us.
const HELD_BYTES_MAX: u64 = 1 << 20;

/// The most that is held at a time where holes are punched, which costs by the call more than by the byte.
const PUNCHED_BYTES_MAX: u64 = 4 << 20;

/// A write of no more than this holds all of its blocks exclusively when its ends are partial: three holds cost more.
const SHORT_BYTES: u64 = 4096;

/// Bytes on their way from or to a buffer in a direct map.
const WAY_BYTES: u64 = 64 << 10;

impl Volume {
    /// Reads `buf.len()` bytes at `offset`. `buf` may lie in a direct map, also in one of this volume: its bytes then go through
    /// a piece of memory beside it. It must not be other memory whose page faults wait for this volume (a file on a filesystem
    /// on this volume, mapped into the process that serves it): the call could wait for ever.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`], or [`VolumeError::Media`] with `buf` zeroed.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let range = self.check(offset, buf.len() as u64)?;
        read_pieces(range, buf, |piece, out| {
            let held = self.area.shared(blocks_of(&piece));
            match self.window.get() {
                Some(window) => Self::read_coherent(held.blocks(), window, piece, out),
                None => read_media(held.blocks(), piece, out),
            }
        })
    }

    /// As [`Self::read_at`], for much that is read once: the pages of a file are then not mapped, which is a good part of
    /// what reading them costs. `scratch` ends as ciphertext.
    ///
    /// # Errors
    ///
    /// As [`Self::read_at`].
    pub fn read_once(&self, buf: &mut [u8], offset: u64, scratch: &mut Vec<u8>) -> Result<(), VolumeError> {
        let range = self.check(offset, buf.len() as u64)?;
        let by_mapping = self.granularity() == Granularity::CacheLine || blocks_of(&range) != range;
        if by_mapping || self.window.get().is_some() {
            return self.read_at(buf, offset);
        }
        read_pieces(range, buf, |piece, out| {
            let held = self.area.shared(piece.clone());
            if let Some(window) = self.window.get() {
                return Self::read_coherent(held.blocks(), window, piece, out);
            }
            scratch.resize(scratch.len().max(out.len()), 0);
            held.blocks().read_unmapped(piece.start, Target::from_slice(out), scratch)
        })
    }

    /// Writes `data` at `offset`. Under cache-line granularity it is durable on return; under page granularity
    /// [`Self::persist`] or [`Self::flush`] makes it so. `data` may lie in a direct map, as for [`Self::read_at`].
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::ReadOnly`], with nothing written; [`VolumeError::Media`], after
    /// which each block holds its old or its new content.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), VolumeError> {
        let range = self.check_write(offset, data.len() as u64)?;
        self.check_claims(&range)?;
        write_pieces(range, data, |piece, data| {
            each_part(&piece, |part| {
                let data = &data[len(&(piece.start..part.start))..len(&(piece.start..part.end))];
                let (held, window) = self.hold_for_write(&part)?;
                match window {
                    Some(window) => self.write_coherent(held.blocks(), window, part, data),
                    None => write_media(held.blocks(), part, data),
                }
            })
        })
    }

    /// As [`Self::write_at`], for much that is written once and by nobody else: the pages of a file are then not mapped,
    /// which is a good part of what writing them costs. `scratch` ends as ciphertext.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn write_once(&self, data: &[u8], offset: u64, scratch: &mut Vec<u8>) -> Result<(), VolumeError> {
        let range = self.check_write(offset, data.len() as u64)?;
        if self.granularity() == Granularity::CacheLine || blocks_of(&range) != range {
            return self.write_at(data, offset);
        }
        self.check_claims(&range)?;
        write_pieces(range, data, |piece, data| {
            let (held, window) = self.hold_for_write(&piece)?;
            if let Some(window) = window {
                return self.write_coherent(held.blocks(), window, piece, data);
            }
            scratch.resize(scratch.len().max(data.len()), 0);
            held.blocks().write_unmapped(piece.start, Source::from_slice(data), scratch)
        })
    }

    /// Holds the blocks of `range` as a write needs them, and tells of the window to keep coherent. A window that comes
    /// later stays empty there until the hold ends.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Claimed`] when a part of the range is mapped exclusively.
    fn hold_for_write(&self, range: &Range<u64>) -> Result<(HeldRange<'_>, Option<&Window>), VolumeError> {
        let blocks = blocks_of(range);
        let shared = self.window.get().is_none() && blocks == *range;
        let mut held = if shared { self.area.shared(blocks.clone()) } else { self.area.exclusive(blocks.clone()) };
        if shared && self.window.get().is_some() {
            drop(held);
            held = self.area.exclusive(blocks);
        }
        self.check_claims(range)?;
        Ok((held, self.window.get().map(AsRef::as_ref)))
    }

    /// Who holds `range` knows the answer for as long as it does; before, it spares half a write.
    fn check_claims(&self, range: &Range<u64>) -> Result<(), VolumeError> {
        if self.claims.refuses(range) {
            return Err(VolumeError::Claimed { start: range.start, end: range.end });
        }
        Ok(())
    }

    /// Writes zeroes over `len_bytes` bytes at `offset`, encrypted like any data.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn write_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let range = self.check_write(offset, len_bytes)?;
        self.check_claims(&range)?;
        cut(range, HELD_BYTES_MAX).try_for_each(|piece| each_part(&piece, |part| self.zero_part(&part)))
    }

    /// Zeroes whole blocks, or a few bytes.
    fn zero_part(&self, part: &Range<u64>) -> Result<(), VolumeError> {
        let (held, window) = self.hold_for_write(part)?;
        let held = held.blocks();
        if blocks_of(part) == *part {
            held.write_zeroes(part.clone())?;
            if let Some(window) = window {
                Self::zero_resident(window, part);
            }
            return Ok(());
        }
        let zeroes = vec![0; len(part)];
        match window {
            Some(window) => self.write_coherent(held, window, part.clone(), &zeroes),
            None => write_media(held, part.clone(), &zeroes),
        }
    }

    /// Makes `len_bytes` bytes at `offset` read as zeroes by giving the blocks of whole units back to the filesystem
    /// under the backing; the ragged ends, and everything where that is not possible, are written as by
    /// [`Self::write_zeroes`].
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn punch_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let range = self.check_write(offset, len_bytes)?;
        let units = self.whole_units(&range);
        if !self.discards() || units.is_empty() || !self.punch(&units)? {
            return self.write_zeroes(offset, len_bytes);
        }
        self.write_zeroes(range.start, units.start - range.start)?;
        self.write_zeroes(units.end, range.end - units.end)
    }

    /// Makes `len_bytes` bytes at `offset` read as zeroes by giving their blocks back, if they are whole units and the
    /// filesystem can: otherwise gives `false`, with nothing changed and nothing read.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn punch_only(&self, offset: u64, len_bytes: u64) -> Result<bool, VolumeError> {
        let range = self.check_write(offset, len_bytes)?;
        Ok(self.discards() && self.whole_units(&range) == range && self.punch(&range)?)
    }

    /// Asks for `len_bytes` bytes of ciphertext at `offset` to be read into the kernel's cache soon. `false` where there is no
    /// such cache.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::Media`].
    pub fn prefetch(&self, offset: u64, len_bytes: u64) -> Result<bool, VolumeError> {
        let range = self.check(offset, len_bytes)?;
        self.area.shared(range.clone()).blocks().prefetch(range)
    }

    /// Says that the content of `len_bytes` bytes at `offset` is needed no more. Without [`Self::discards`] nothing
    /// happens, because holes would show on media which units are unused.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let units = self.whole_units(&self.check_write(offset, len_bytes)?);
        if self.discards() && !units.is_empty() {
            self.punch(&units)?;
        }
        Ok(())
    }

    /// Whether the medium could punch holes.
    fn punch(&self, units: &Range<u64>) -> Result<bool, VolumeError> {
        self.check_claims(units)?;
        for piece in cut(units.clone(), PUNCHED_BYTES_MAX) {
            let (held, window) = self.hold_for_write(&piece)?;
            match held.blocks().punch(piece.clone()) {
                Ok(()) => {
                    if let Some(window) = window {
                        Self::zero_resident(window, &piece);
                    }
                }
                Err(VolumeError::Media(MediaError::Unsupported)) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// The runs of holes and of data from `offset` on, which add up to `len_bytes` or, when there would be more than
    /// `count_max` runs, to less. Without [`Self::discards`], and where a direct map may have stored into a hole,
    /// everything is data.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::Media`].
    pub fn extents(&self, offset: u64, len_bytes: u64, count_max: usize) -> Result<Vec<VolumeExtent>, VolumeError> {
        let range = self.check(offset, len_bytes)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let resident = self.window.get().and_then(|window| window.next_resident(&range)).is_some();
        if !self.discards() || resident {
            return Ok(vec![VolumeExtent { len_bytes, hole: false }]);
        }
        let extents = self.area.extents(range, count_max)?;
        let runs = extents.iter();
        Ok(runs.map(|run| VolumeExtent { len_bytes: run.range.end - run.range.start, hole: !run.allocated }).collect())
    }

    /// Reads `buf.len()` bytes at `offset` as a map of `window` shows them; nothing is brought in.
    ///
    /// # Errors
    ///
    /// As [`Volume::read_at`].
    pub(crate) fn load(&self, window: &Window, buf: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let range = self.check(offset, buf.len() as u64)?;
        read_pieces(range, buf, |piece, out| {
            let held = self.area.shared(blocks_of(&piece));
            Self::read_coherent(held.blocks(), window, piece, out)
        })
    }
}

/// Cuts `range` at multiples of `step`, so that whole blocks and units stay whole.
fn cut(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let mut rest = range;
    std::iter::from_fn(move || {
        let piece = rest.start..rest.end.min((rest.start / step + 1).saturating_mul(step));
        rest.start = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Whether all of `range` may be held at once: the short way of most requests.
const fn is_one_piece(range: &Range<u64>) -> bool {
    range.end <= (range.start / HELD_BYTES_MAX).saturating_add(1).saturating_mul(HELD_BYTES_MAX)
}

/// Calls `with` for the partial first block, the whole blocks and the partial last one of `piece`; for all of it when it is
/// short.
#[inline]
fn each_part(
    piece: &Range<u64>,
    mut with: impl FnMut(Range<u64>) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    if piece.end - piece.start <= SHORT_BYTES || blocks_of(piece) == *piece {
        return with(piece.clone());
    }
    let Pieces { head, whole, tail } = Pieces::of(piece.clone());
    [head, whole, tail].into_iter().filter(|part| !part.is_empty()).try_for_each(with)
}

/// Reads `range` to `buf` by `read`, piece by piece, each of which `read` may hold: what it is given lies in no map. With an
/// error `buf` is zeroed.
#[inline]
fn read_pieces(
    range: Range<u64>,
    buf: &mut [u8],
    mut read: impl FnMut(Range<u64>, &mut [u8]) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    let start = range.start;
    let place = |piece: &Range<u64>| len(&(start..piece.start))..len(&(start..piece.end));
    let result = if is_one_piece(&range) && !in_a_map(buf) {
        read(range, buf)
    } else if in_a_map(buf) {
        way(&range).and_then(|mut way| {
            cut(range, WAY_BYTES).try_for_each(|piece| {
                let bytes = &mut way[..len(&piece)];
                read(piece.clone(), bytes)?;
                buf[place(&piece)].copy_from_slice(bytes);
                Ok(())
            })
        })
    } else {
        cut(range, HELD_BYTES_MAX).try_for_each(|piece| {
            let place = place(&piece);
            read(piece, &mut buf[place])
        })
    };
    if result.is_err() {
        buf.fill(0);
    }
    result
}

/// Writes `data` to `range` by `write`, piece by piece, each of which `write` may hold: what it is given lies in no map.
#[inline]
pub(crate) fn write_pieces<E: From<VolumeError>>(
    range: Range<u64>,
    data: &[u8],
    mut write: impl FnMut(Range<u64>, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let start = range.start;
    let place = |piece: &Range<u64>| len(&(start..piece.start))..len(&(start..piece.end));
    if is_one_piece(&range) && !in_a_map(data) {
        return write(range, data);
    }
    if !in_a_map(data) {
        return cut(range, HELD_BYTES_MAX).try_for_each(|piece| {
            let place = place(&piece);
            write(piece, &data[place])
        });
    }
    let mut way = way(&range)?;
    cut(range, WAY_BYTES).try_for_each(|piece| {
        let bytes = &mut way[..len(&piece)];
        bytes.copy_from_slice(&data[place(&piece)]);
        write(piece, bytes)
    })
}

/// Memory beside the buffer for a piece of `range`.
#[cold]
fn way(range: &Range<u64>) -> Result<SecretBytes, VolumeError> {
    SecretBytes::try_zeroed(len(range).min(len(&(0..WAY_BYTES)))).map_err(VolumeError::Window)
}

/// Reads what the caller holds.
pub(super) fn read_media(held: HeldBlocks<'_>, range: Range<u64>, buf: &mut [u8]) -> Result<(), VolumeError> {
    let pieces = Pieces::of(range);
    let (head, rest) = buf.split_at_mut(len(&pieces.head));
    let (whole, tail) = rest.split_at_mut(len(&pieces.whole));
    read_part(held, &pieces.head, head)?;
    if !whole.is_empty() {
        held.read(pieces.whole.start, Target::from_slice(whole))?;
    }
    read_part(held, &pieces.tail, tail)
}

/// Reads a part of one block.
fn read_part(held: HeldBlocks<'_>, part: &Range<u64>, out: &mut [u8]) -> Result<(), VolumeError> {
    if part.is_empty() {
        return Ok(());
    }
    let mut block = Zeroizing::new([0; BLOCK_LEN]);
    held.read(block_start(part.start), Target::from_slice(&mut *block))?;
    out.copy_from_slice(&block[within_block(part)]);
    Ok(())
}

/// Writes to media what the caller holds.
pub(super) fn write_media(held: HeldBlocks<'_>, range: Range<u64>, data: &[u8]) -> Result<(), VolumeError> {
    let pieces = Pieces::of(range);
    let (head, rest) = data.split_at(len(&pieces.head));
    let (whole, tail) = rest.split_at(len(&pieces.whole));
    write_part(held, &pieces.head, head)?;
    if !whole.is_empty() {
        held.write(pieces.whole.start, Source::from_slice(whole))?;
    }
    write_part(held, &pieces.tail, tail)
}

/// Changes a part of one block, which the caller holds exclusively: the only read-modify-write there is.
fn write_part(held: HeldBlocks<'_>, part: &Range<u64>, data: &[u8]) -> Result<(), VolumeError> {
    if part.is_empty() {
        return Ok(());
    }
    let start = block_start(part.start);
    let mut block = Zeroizing::new([0; BLOCK_LEN]);
    held.read(start, Target::from_slice(&mut *block))?;
    block[within_block(part)].copy_from_slice(data);
    held.write(start, Source::from_slice(&*block))?;
    Ok(())
}

/// A range cut at block boundaries: at most one partial block, whole blocks, at most one partial block.
struct Pieces {
    head: Range<u64>,
    whole: Range<u64>,
    tail: Range<u64>,
}

impl Pieces {
    /// Every piece is in order and empty where there is nothing; together they are `range`.
    fn of(range: Range<u64>) -> Self {
        let whole_end = block_start(range.end);
        let whole_start = range.start.next_multiple_of(BLOCK_BYTES);
        if whole_start > whole_end {
            // Inside of one block.
            return Self { whole: range.end..range.end, tail: range.end..range.end, head: range };
        }
        Self { head: range.start..whole_start, whole: whole_start..whole_end, tail: whole_end..range.end }
    }
}

#[cfg(test)]
mod tests;
