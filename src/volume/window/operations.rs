//! What a volume does with its window: fill, store, write back, evict, and the coherent half of its reads and writes.
//!
//! Every function here that takes the range lock lets go of it before it returns; none is called with it held, but those
//! that say so.

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::thread;

use super::{PAGE_BYTES, View, Window, pages_of};
use crate::memory::Target;
use crate::volume::area::BLOCK_BYTES;
use crate::volume::{Volume, VolumeError, block_start, len};

/// Pages that are filled, written back or evicted under one hold of the range lock.
pub(crate) const BATCH_PAGES: u64 = 64;

/// How often room is looked for before a fill gives up; others' fills end within microseconds.
const ROOM_ATTEMPTS_MAX: u32 = 10_000;

/// How pages are written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteBack {
    /// They are known to have changed.
    Always,
    /// They may have changed: media are read first and written only where they differ.
    IfDifferent,
}

impl Volume {
    /// The window, made at the first call. It stays as long as the volume, and is empty without maps.
    pub(crate) fn window(&self) -> Result<&Window, VolumeError> {
        if let Some(window) = self.window.get() {
            return Ok(window);
        }
        let window = Window::new(self.size()).map_err(VolumeError::Window)?;
        Ok(self.window.get_or_init(|| window))
    }

    /// Makes the pages of `range` (whole pages, at most [`BATCH_PAGES`]) resident, and calls `present` while nobody can
    /// evict them.
    ///
    /// # Errors
    ///
    /// [`VolumeError::WindowFull`]; [`VolumeError::Media`] when the data of any page cannot be read: the pages before it
    /// are resident then.
    pub(crate) fn fill(&self, window: &Window, range: &Range<u64>, present: impl FnOnce()) -> Result<(), VolumeError> {
        let page_count = (range.end - range.start) / PAGE_BYTES;
        self.make_room(window, page_count)?;
        let held = self.blocks.exclusive(range.clone());
        let filled = self.fill_held(window, range);
        let (Ok(new_pages) | Err((new_pages, _))) = &filled;
        window.reserved.fetch_sub(page_count - new_pages, Ordering::AcqRel);
        if filled.is_ok() {
            present();
        }
        drop(held);
        filled.map(|_| ()).map_err(|(_, error)| error)
    }

    /// Fills what is absent in `range`, which the caller holds exclusively. The number of pages that are new, also with
    /// an error.
    fn fill_held(&self, window: &Window, range: &Range<u64>) -> Result<u64, (u64, VolumeError)> {
        let mut new_pages = 0;
        let mut rest = range.clone();
        while !rest.is_empty() {
            let (piece, resident) = window.piece(&rest);
            rest.start = piece.end;
            if resident {
                continue;
            }
            let data = piece.start..piece.end.min(self.size());
            if let Err(error) = self.area.read(data.start, window.memory.target(&data)) {
                window.memory.target(&piece).fill(0);
                let _ = window.memory.punch(&piece); // the media error is the one to report
                return Err((new_pages, error.into()));
            }
            for page in pages_of(&piece) {
                window.resident.insert(page);
                new_pages += 1;
            }
        }
        Ok(new_pages)
    }

    /// Reserves `page_count` pages, evicting others where the bound asks for it.
    fn make_room(&self, window: &Window, page_count: u64) -> Result<(), VolumeError> {
        let mut attempts = 0;
        loop {
            let max = window.page_count_max();
            let reserve = |now: u64| now.checked_add(page_count).filter(|&then| then <= max);
            if window.reserved.fetch_update(Ordering::AcqRel, Ordering::Acquire, reserve).is_ok() {
                return Ok(());
            }
            attempts += 1;
            if page_count > max || attempts > ROOM_ATTEMPTS_MAX {
                return Err(VolumeError::WindowFull { resident_max: max.saturating_mul(PAGE_BYTES) });
            }
            if self.evict_next(window)? == 0 {
                thread::yield_now();
            }
        }
    }

    /// Evicts the next run of pages round the volume. How many pages went.
    fn evict_next(&self, window: &Window) -> Result<u64, VolumeError> {
        let hand = window.hand.load(Ordering::Acquire) % window.page_count.max(1);
        let runs = [hand..window.page_count, 0..hand];
        let Some(run) = runs.iter().find_map(|part| window.resident.next_run(part)) else {
            return Ok(0);
        };
        let run = run.start..run.end.min(run.start + BATCH_PAGES / 2);
        window.hand.store(run.end, Ordering::Release);
        self.evict_batch(window, &(run.start * PAGE_BYTES..run.end * PAGE_BYTES))
    }

    /// Puts the resident pages of `range` on media where they differ, overwrites them in memory and gives them back.
    /// Pinned pages stay. How many pages went.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Media`] for the first batch that could not be written; it stays resident, the others go.
    pub(crate) fn evict(&self, window: &Window, range: &Range<u64>) -> Result<u64, VolumeError> {
        let mut evicted = 0;
        let mut result = Ok(());
        each_batch(window, range, |batch| match self.evict_batch(window, &batch) {
            Ok(page_count) => evicted += page_count,
            Err(error) if result.is_ok() => result = Err(error),
            Err(_) => {}
        });
        result.map(|()| evicted)
    }

    /// One batch of whole pages.
    fn evict_batch(&self, window: &Window, batch: &Range<u64>) -> Result<u64, VolumeError> {
        let _held = self.blocks.exclusive(batch.clone());
        let views = window.views();
        let overlaps = |view: &View| view.range().start.max(batch.start) < view.range().end.min(batch.end);
        if views.iter().any(|view| view.pinned() && overlaps(view)) {
            return Ok(0);
        }
        for view in views.iter() {
            view.zap(batch).map_err(VolumeError::Window)?;
        }
        drop(views);
        let mut evicted = 0;
        let mut rest = batch.clone();
        while let Some(run) = window.next_resident(&rest) {
            rest.start = run.end;
            self.write_back_held(window, &run, WriteBack::IfDifferent)?;
            evicted += wipe_held(window, &run)?;
        }
        Ok(evicted)
    }

    /// Takes the pages of `range` out of memory without writing them anywhere, when they could not be and nobody maps
    /// them any more.
    pub(crate) fn discard_window(&self, window: &Window, range: &Range<u64>) -> Result<(), VolumeError> {
        let mut result = Ok(0);
        each_batch(window, range, |batch| {
            let _held = self.blocks.exclusive(batch.clone());
            result = wipe_held(window, &batch);
        });
        result.map(|_| ())
    }

    /// Encrypts the touched blocks of the resident pages of `range` to media. Durable after [`Volume::persist`] or
    /// [`Volume::flush`]. What is not resident is on media already.
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
        each_batch(window, range, |batch| {
            let blocks = blocks_of(&batch);
            let _held = self.blocks.exclusive(blocks.clone());
            let mut rest = blocks;
            while let Some(run) = window.next_resident(&rest) {
                rest.start = run.end;
                let written = self.write_back_held(window, &run, how);
                if result.is_ok() {
                    result = written;
                }
            }
        });
        result
    }

    /// Writes whole blocks back that are resident, under the caller's exclusive hold.
    fn write_back_held(&self, window: &Window, run: &Range<u64>, how: WriteBack) -> Result<(), VolumeError> {
        let run = run.start..run.end.min(self.size());
        if self.read_only() || run.is_empty() {
            return Ok(());
        }
        // Only a page that is written whole has nothing left to write.
        let whole = run.start.next_multiple_of(PAGE_BYTES) / PAGE_BYTES..if run.end == self.size() {
            run.end.div_ceil(PAGE_BYTES)
        } else {
            run.end / PAGE_BYTES
        };
        let written = match how {
            WriteBack::Always => self.area.write(run.start, window.memory.source(&run)).map_err(VolumeError::from),
            WriteBack::IfDifferent => self.write_different(window, &run),
        };
        match written {
            Ok(()) => whole.for_each(|page| {
                window.unsynced.remove(page);
            }),
            Err(_) => pages_of(&run).for_each(|page| {
                window.unsynced.insert(page);
            }),
        }
        written
    }

    /// Writes those pages of `run` that media do not have as they are.
    fn write_different(&self, window: &Window, run: &Range<u64>) -> Result<(), VolumeError> {
        let mut scratch = window.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut start = run.start;
        while start < run.end {
            let end = (start / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES).min(run.end);
            let page = start..end;
            let media = &mut scratch[..len(&page)];
            let read = self.area.read(start, Target::from_slice(media));
            if read.is_err() || !window.memory.source(&page).equals(media) {
                self.area.write(start, window.memory.source(&page))?;
            }
            start = end;
        }
        scratch.fill(0);
        Ok(())
    }

    /// Stores `data` at `offset` in the window, filling pages that are absent. It is on media after a write-back.
    ///
    /// # Errors
    ///
    /// [`VolumeError::ReadOnly`], [`VolumeError::OutOfRange`], and as [`Self::fill`].
    pub(crate) fn store(&self, window: &Window, data: &[u8], offset: u64) -> Result<(), VolumeError> {
        let mut range = self.check_write(offset, data.len() as u64)?;
        let mut rest = data;
        while !rest.is_empty() {
            let page = range.start / PAGE_BYTES;
            let (part, after) = rest.split_at(len(&range).min(len(&(range.start..(page + 1) * PAGE_BYTES))));
            let held = self.blocks.exclusive(page * PAGE_BYTES..(page + 1) * PAGE_BYTES);
            if window.resident.contains(page) {
                window.memory.target(&(range.start..range.start + part.len() as u64)).copy_from(part);
                window.unsynced.insert(page);
                range.start += part.len() as u64;
                rest = after;
                continue;
            }
            drop(held);
            self.fill(window, &(page * PAGE_BYTES..(page + 1) * PAGE_BYTES), || ())?;
        }
        Ok(())
    }

    /// [`Volume::read_at`] of a checked range when there is a window: absent pages are read from media and stay absent.
    pub(in crate::volume) fn read_coherent(
        &self,
        window: &Window,
        range: Range<u64>,
        buf: &mut [u8],
    ) -> Result<(), VolumeError> {
        let _held = self.blocks.shared(blocks_of(&range));
        let mut rest = (range, buf);
        while !rest.0.is_empty() {
            let (piece, resident) = window.piece(&rest.0);
            let (out, after) = rest.1.split_at_mut(len(&piece));
            rest = (piece.end..rest.0.end, after);
            if resident {
                window.memory.source(&piece).copy_to(out);
            } else {
                self.read_media(piece, out)?;
            }
        }
        Ok(())
    }

    /// [`Volume::write_at`] of a checked range that the caller holds exclusively, whole blocks of it: to media, and to the
    /// window where it is resident.
    pub(in crate::volume) fn write_coherent(
        &self,
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
                self.write_back_held(window, &blocks_of(&piece), WriteBack::Always)?;
            } else {
                self.write_media(piece, part)?;
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

/// Overwrites whole resident pages and gives them back, under the caller's exclusive hold. How many there were.
fn wipe_held(window: &Window, run: &Range<u64>) -> Result<u64, VolumeError> {
    window.memory.target(run).fill(0);
    let mut page_count = 0;
    for page in pages_of(run) {
        window.unsynced.remove(page);
        page_count += u64::from(window.resident.remove(page));
    }
    let punched = window.memory.punch(run);
    window.reserved.fetch_sub(page_count, Ordering::AcqRel);
    punched.map_err(VolumeError::Window)?;
    Ok(page_count)
}

/// Calls `with` for the resident runs of `range`, at most [`BATCH_PAGES`] pages each.
fn each_batch(window: &Window, range: &Range<u64>, mut with: impl FnMut(Range<u64>)) {
    let mut rest = range.clone();
    while let Some(run) = window.next_resident(&rest) {
        let end = run.end.min((run.start / PAGE_BYTES + BATCH_PAGES) * PAGE_BYTES);
        with(run.start..end);
        rest.start = end;
    }
}

/// The whole blocks that hold a byte of `range`.
pub(in crate::volume) const fn blocks_of(range: &Range<u64>) -> Range<u64> {
    block_start(range.start)..range.end.next_multiple_of(BLOCK_BYTES)
}
