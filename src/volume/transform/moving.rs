//! What is done to the window that moves, which nobody else reads or writes meanwhile.
//!
//! Pages without data are not given any. Where discards are allowed a page of zero bytes stands for zeroes under every key,
//! and is a hole afterwards. Where they are not, a page that has no block was never written: whatever it reads as is noise
//! that nobody put there, and it stays without a block, and reads as other noise under the new key. In a file that has all its
//! blocks there is nothing to save, and every byte keeps its content.
//!
//! All that a window needs is allocated before anybody is told that it moves. So a full disk ends the move between two
//! windows, and nothing becomes unreadable.

use std::ops::Range;

use zeroize::Zeroizing;

use super::super::area::MovingWindow;
use super::super::side::zero_holes;
use super::Volume;
use crate::memory::{Source, Target};
use crate::pmem::{Backing, MediaError};
use crate::secret;

/// How much of a window is plaintext at a time: a multiple of both data units that stays in the cache.
const PIECE_BYTES: usize = 64 << 10;

/// What has blocks or has none: the pages of every file system.
const PAGE_BYTES: usize = 4096;

/// A part of a window: whole pages that all have data, or all have none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    /// Within the window.
    range: Range<usize>,
    empty: bool,
}

impl MovingWindow<'_> {
    /// The window's ciphertext on the former side.
    pub(super) fn read_former(&self, ciphertext: &mut [u8]) -> Result<(), MediaError> {
        let former = self.sides().0.side.physical(self.range());
        self.area().backing().read(former, |source| source.copy_to(ciphertext))
    }

    /// How much of the window, from its beginning, is one hole that stays where it is: whole pages, or all that is left.
    pub(super) fn hole_bytes(&self) -> Result<u64, MediaError> {
        if !self.is_in_place() || !self.is_thin() {
            return Ok(0);
        }
        let range = self.sides().1.physical(self.range());
        let extents = self.area().backing().extents(range.clone(), 1)?;
        let hole =
            extents.first().filter(|extent| !extent.allocated).map_or(0, |extent| extent.range.end - range.start);
        let all = range.end - range.start;
        Ok(if hole == all { all } else { hole - hole % PAGE_BYTES as u64 })
    }

    /// Fails every write to the window, and every read of it unless `ciphertext` is known, once it is not held any more; until
    /// it has [arrived](Self::arrive).
    pub(super) fn block(&self, ciphertext: Option<Vec<u8>>) {
        self.sides().0.block(self.range(), ciphertext);
    }

    /// Sees to it that [`Self::store`] finds a block wherever it needs one.
    ///
    /// # Errors
    ///
    /// [`MediaError::NoSpace`], with nothing changed.
    pub(super) fn allocate(&self, ciphertext: &[u8]) -> Result<(), MediaError> {
        if self.is_in_place() || !self.area().backing().is_sparse() {
            return Ok(()); // what has data has blocks
        }
        for run in self.runs(ciphertext)?.into_iter().filter(|run| !run.empty) {
            let range = self.sides().1.physical(self.logical(&run.range));
            match self.area().backing().allocate(range) {
                Ok(()) | Err(MediaError::Unsupported) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Encrypts the window for the new side from its ciphertext on the former one, and makes it durable. The same again
    /// gives the same.
    pub(super) fn store(&self, ciphertext: &[u8]) -> Result<(), MediaError> {
        let result = self.store_runs(ciphertext);
        secret::scrub_stack();
        let backing = self.area().backing();
        let has_holes = result?;
        backing.persist(self.sides().1.physical(self.range()))?;
        // Also one that was there before may be one that nobody has made durable.
        if has_holes { backing.sync_blocks() } else { Ok(()) }
    }

    /// Moves the boundary over the window.
    pub(super) fn arrive(&self, done_bytes: u64) {
        self.sides().0.advance(done_bytes);
    }

    /// Whether there are holes.
    fn store_runs(&self, ciphertext: &[u8]) -> Result<bool, MediaError> {
        let mut has_holes = false;
        for run in self.runs(ciphertext)? {
            if run.empty && self.make_hole(&run.range)? {
                has_holes = true;
            } else {
                self.store_pieces(&ciphertext[run.range.clone()], self.logical(&run.range).start)?;
            }
        }
        Ok(has_holes)
    }

    fn store_pieces(&self, ciphertext: &[u8], start: u64) -> Result<(), MediaError> {
        let (former, current) = self.sides();
        let (backing, holes) = (self.area().backing(), self.area().holes());
        let mut plaintext = Zeroizing::new(vec![0; PIECE_BYTES.min(ciphertext.len())]);
        for (index, piece) in ciphertext.chunks(PIECE_BYTES).enumerate() {
            let offset = start + (index * PIECE_BYTES) as u64;
            let plaintext = &mut plaintext[..piece.len()];
            former.side.decrypt(offset, Source::from_slice(piece), Target::from_slice(plaintext));
            if self.is_thin() {
                current.encrypt_in_place(offset, Target::from_slice(plaintext));
                if holes {
                    zero_holes(piece, Target::from_slice(plaintext));
                }
                let range = current.physical(offset..offset + piece.len() as u64);
                backing.write_allocated(range, |mut target| target.copy_from(plaintext))?;
            } else {
                current.store(backing, offset, Source::from_slice(plaintext))?;
            }
        }
        Ok(())
    }

    /// Makes a part of the new place a hole, also where one is seen; `false` where that is not possible. A hole that is seen
    /// is not always one that stays: the flush of who made it may have failed, and a power cut would bring back what was there.
    fn make_hole(&self, range: &Range<usize>) -> Result<bool, MediaError> {
        let (backing, range) = (self.area().backing(), self.sides().1.physical(self.logical(range)));
        match backing.punch_hole(range.clone()) {
            Ok(()) => Ok(true),
            // What was never written is left as it is, and zeroes are stored again.
            Err(MediaError::Unsupported) => Ok(!self.area().holes() && is_zero_at(backing, range)?),
            Err(error) => Err(error),
        }
    }

    /// Makes the first bytes of the window, which are seen to be a hole, one again, for the same reason. Without discards
    /// nobody has ever made one.
    pub(super) fn make_hole_again(&self, hole_bytes: u64) -> Result<(), MediaError> {
        if !self.area().holes() {
            return Ok(());
        }
        let start = self.range().start;
        match self.area().backing().punch_hole(self.sides().1.physical(start..start + hole_bytes)) {
            Ok(()) | Err(MediaError::Unsupported) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The runs of pages with and without data.
    fn runs(&self, ciphertext: &[u8]) -> Result<Vec<Run>, MediaError> {
        let mut runs: Vec<Run> = Vec::new();
        let thin = self.is_thin();
        for (index, page) in ciphertext.chunks(PAGE_BYTES).enumerate() {
            let start = index * PAGE_BYTES;
            let range = start..start + page.len();
            let empty = thin && page.iter().all(|&byte| byte == 0) && self.is_unused(&range)?;
            match runs.last_mut().filter(|run| run.empty == empty) {
                Some(run) => run.range.end = range.end,
                None => runs.push(Run { range, empty }),
            }
        }
        Ok(runs)
    }

    /// Whether a page whose ciphertext is all zero bytes needs none: zeroes need none where discards are allowed, elsewhere
    /// only what was never written.
    fn is_unused(&self, page: &Range<usize>) -> Result<bool, MediaError> {
        if self.area().holes() {
            return Ok(true);
        }
        let range = self.sides().0.side.physical(self.logical(page));
        Ok(self.area().backing().extents(range, PAGE_BYTES)?.iter().all(|extent| !extent.allocated))
    }

    fn is_thin(&self) -> bool {
        self.area().holes() || self.area().backing().is_sparse()
    }

    fn is_in_place(&self) -> bool {
        let (former, current) = self.sides();
        former.side.data_start() == current.data_start()
    }

    /// The logical range of a part of the window.
    fn logical(&self, part: &Range<usize>) -> Range<u64> {
        let start = self.range().start;
        start + part.start as u64..start + part.end as u64
    }
}

impl Volume {
    /// Bytes of blocks that its data would need besides those that the backing has, were it moved to `data_offset` from the
    /// base: what is to be free on the file system before. A re-key in place needs none, since holes stay holes, unless the file
    /// system writes everything to new blocks.
    ///
    /// # Errors
    ///
    /// [`MediaError::OutOfRange`] when there is no such place in the backing, and what the medium says.
    pub fn blocks_needed(&self, data_offset: u64) -> Result<u64, MediaError> {
        let (backing, geometry) = (self.backing(), self.geometry());
        let from = geometry.data_start();
        let to = (from - geometry.data_offset()).saturating_add(data_offset);
        backing.blocks_to_move(from..from + self.size(), to)
    }
}

fn is_zero_at(backing: &Backing, range: Range<u64>) -> Result<bool, MediaError> {
    let mut page = [0; PAGE_BYTES];
    for start in range.clone().step_by(PAGE_BYTES) {
        let end = range.end.min(start + PAGE_BYTES as u64);
        let page = &mut page[..usize::try_from(end - start).expect("at most a page")];
        backing.read(start..end, |source| source.copy_to(page))?;
        if page.iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}
