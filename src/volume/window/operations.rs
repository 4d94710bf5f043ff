//! What a volume does with a window: fill, store, evict, lock, and the coherent half of its reads and writes.
//!
//! Every function here that takes the range lock lets go of it before it returns; none is called with it held, but those
//! that say so.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use super::{BATCH_PAGES, PAGE_BYTES, View, Window, WriteBack, pages_of};
use crate::memory::{Source, Target};
use crate::volume::area::{BLOCK_BYTES, HeldBlocks};
use crate::volume::{Volume, VolumeError, block_start, len, read_media, write_media};

/// How often room is looked for before a fill gives up; others' fills end within microseconds.
const ROOM_ATTEMPTS_MAX: u32 = 10_000;

/// Puts pages where a map can reach them. It is called by a holder of the pages in the range lock, so it must not touch
/// the memory of a map.
pub(crate) trait Install {
    /// Maps pages that are resident already.
    fn present(&self, pages: &Range<u64>) -> io::Result<()>;

    /// Makes absent pages resident with these bytes, and maps them. How many bytes it did, also with an error.
    fn absent(&self, pages: &Range<u64>, plaintext: Source<'_>) -> (u64, io::Result<()>);
}

/// A map's way of filling: where to decrypt to (whole pages; it holds no plaintext afterwards), and who installs.
pub(crate) struct Through<'a> {
    pub(crate) scratch: &'a mut [u8],
    pub(crate) install: &'a dyn Install,
}

impl Volume {
    /// The window of all maps that are not exclusive, made at the first call. It stays as long as the volume, and is
    /// empty without maps.
    pub(crate) fn window(&self) -> Result<&Arc<Window>, VolumeError> {
        if let Some(window) = self.window.get() {
            return Ok(window);
        }
        let window = Arc::new(Window::new(self.size()).map_err(VolumeError::Window)?);
        Ok(self.window.get_or_init(|| window))
    }

    /// Makes the pages of `range` (whole pages, at most [`BATCH_PAGES`]) resident and maps them, or, without `through`,
    /// makes them resident only.
    ///
    /// # Errors
    ///
    /// [`VolumeError::WindowFull`], [`VolumeError::Window`]; [`VolumeError::Media`] when the data of any page cannot be
    /// read: the pages before it are resident then.
    pub(crate) fn fill(
        &self,
        window: &Window,
        range: &Range<u64>,
        through: Option<Through<'_>>,
    ) -> Result<(), VolumeError> {
        let page_count = (range.end - range.start) / PAGE_BYTES;
        self.make_room(window, page_count)?;
        let held = self.area.exclusive(range.clone());
        let mut new_pages = 0;
        let filled = match through {
            Some(through) => self.fill_through(held.blocks(), window, range, through, &mut new_pages),
            None => self.fill_in_place(held.blocks(), window, range, &mut new_pages),
        };
        window.reserved.fetch_sub(page_count - new_pages, Ordering::AcqRel);
        filled
    }

    /// Fills and maps, under the caller's exclusive hold. `new_pages` counts those that became resident.
    fn fill_through(
        &self,
        held: HeldBlocks<'_>,
        window: &Window,
        range: &Range<u64>,
        through: Through<'_>,
        new_pages: &mut u64,
    ) -> Result<(), VolumeError> {
        let Through { scratch, install } = through;
        let mut rest = range.clone();
        while !rest.is_empty() {
            let (piece, resident) = window.piece(&rest);
            if resident {
                rest.start = piece.end;
                install.present(&piece).map_err(VolumeError::Window)?;
                continue;
            }
            let piece = piece.start..piece.end.min(piece.start + scratch.len() as u64);
            rest.start = piece.end;
            let data = piece.start..piece.end.min(self.size());
            let pages = &mut scratch[..len(&piece)];
            let read = held.read(data.start, Target::from_slice(&mut pages[..len(&data)]));
            let installed = read.and_then(|()| {
                // Whoever touches a page goes on as soon as it is there, and may then sync or evict: the bit comes first.
                let mut absent = pages_of(&piece);
                absent.clone().for_each(|page| {
                    window.resident.insert(page);
                });
                let (done_bytes, result) = install.absent(&piece, Source::from_slice(pages));
                absent.start += done_bytes / PAGE_BYTES;
                *new_pages += done_bytes / PAGE_BYTES;
                absent.for_each(|page| {
                    window.resident.remove(page);
                });
                result.map_err(VolumeError::Window)
            });
            pages.fill(0);
            installed?;
        }
        Ok(())
    }

    /// Fills what is absent in `range` through the window's own mapping, under the caller's exclusive hold.
    fn fill_in_place(
        &self,
        held: HeldBlocks<'_>,
        window: &Window,
        range: &Range<u64>,
        new_pages: &mut u64,
    ) -> Result<(), VolumeError> {
        let mut rest = range.clone();
        while !rest.is_empty() {
            let (piece, resident) = window.piece(&rest);
            rest.start = piece.end;
            if resident {
                continue;
            }
            let data = piece.start..piece.end.min(self.size());
            if let Err(error) = held.read(data.start, window.memory.target(&data)) {
                window.memory.target(&piece).fill(0);
                let _ = window.memory.punch(&piece); // the media error is the one to report
                return Err(error);
            }
            for page in pages_of(&piece) {
                window.resident.insert(page);
                *new_pages += 1;
            }
        }
        Ok(())
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
        window.each_batch(range, |batch| match self.evict_batch(window, &batch) {
            Ok(page_count) => evicted += page_count,
            Err(error) if result.is_ok() => result = Err(error),
            Err(_) => {}
        });
        result.map(|()| evicted)
    }

    /// One batch of whole pages.
    fn evict_batch(&self, window: &Window, batch: &Range<u64>) -> Result<u64, VolumeError> {
        let held = self.area.exclusive(batch.clone());
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
            self.write_back_held(held.blocks(), window, &run, WriteBack::IfDifferent)?;
            evicted += window.wipe_held(&run).map_err(VolumeError::Window)?;
        }
        Ok(evicted)
    }

    /// Takes the pages of `range` out of memory without writing them anywhere, when they could not be and nobody maps
    /// them any more.
    pub(crate) fn discard_window(&self, window: &Window, range: &Range<u64>) -> Result<(), VolumeError> {
        let mut result = Ok(());
        window.each_batch(range, |batch| {
            let _held = self.area.exclusive(batch.clone());
            if let Err(error) = window.wipe_held(&batch) {
                result = Err(VolumeError::Window(error));
            }
        });
        result
    }

    /// Locks the volume: makes everything durable that maps have stored, takes the pages away from them, and wipes
    /// plaintext and key. Touching a map raises SIGBUS from then on, and every request fails with
    /// [`VolumeError::Locked`]. The cost is that of what is resident. A second call does nothing.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Media`] when something could not be made durable: it is lost, and the volume is locked all the
    /// same.
    pub fn lock(&self) -> Result<(), VolumeError> {
        let mut engine = self.engine();
        let mut all = self.area.alone();
        if self.locked() {
            return Ok(());
        }
        let mut windows = self.claims.windows();
        windows.extend(self.window.get().cloned());
        let mut result = Ok(());
        let mut note = |done: Result<(), VolumeError>| {
            if result.is_ok() {
                result = done;
            }
        };
        for window in &windows {
            window.views().iter().for_each(|view| note(view.revoke().map_err(VolumeError::Window)));
            window.each_batch(&window.whole(), |batch| {
                note(self.write_back_held(all.blocks(), window, &batch, WriteBack::IfDifferent));
            });
        }
        note(self.area.sync().map_err(VolumeError::from));
        for window in &windows {
            window.each_batch(&window.whole(), |batch| {
                note(window.wipe_held(&batch).map(|_| ()).map_err(VolumeError::Window));
            });
        }
        all.forget_keys();
        engine.take();
        self.locked.store(true, Ordering::SeqCst);
        result
    }

    /// Stores the beginning of `data` at `offset` in the window, up to the first page that is absent. How many bytes were
    /// stored. They are on media after a write-back.
    ///
    /// # Errors
    ///
    /// [`VolumeError::ReadOnly`], [`VolumeError::OutOfRange`].
    pub(crate) fn store_resident(&self, window: &Window, data: &[u8], offset: u64) -> Result<usize, VolumeError> {
        let range = self.check_write(offset, data.len() as u64)?;
        let mut start = range.start;
        while start < range.end {
            let page = start / PAGE_BYTES;
            let part = start..range.end.min((page + 1) * PAGE_BYTES);
            let _held = self.area.exclusive(blocks_of(&part));
            if !window.resident.contains(page) {
                break;
            }
            let from = len(&(range.start..start));
            window.memory.target(&part).copy_from(&data[from..from + len(&part)]);
            window.unsynced.insert(page);
            start = part.end;
        }
        Ok(len(&(range.start..start)))
    }

    /// Reads `buf.len()` bytes at `offset` as a map of `window` shows them; nothing is brought in.
    ///
    /// # Errors
    ///
    /// As [`Volume::read_at`].
    pub(crate) fn load(&self, window: &Window, buf: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let range = self.check(offset, buf.len() as u64)?;
        let held = self.area.shared(blocks_of(&range));
        let result = Self::read_coherent(held.blocks(), window, range, buf);
        if result.is_err() {
            buf.fill(0);
        }
        result
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

/// The whole blocks that hold a byte of `range`.
pub(in crate::volume) const fn blocks_of(range: &Range<u64>) -> Range<u64> {
    block_start(range.start)..range.end.next_multiple_of(BLOCK_BYTES)
}
