//! What a volume does with a window: fill, evict, lock.
//!
//! Every function here that takes the range lock lets go of it before it returns; none is called with it held, but those
//! that say so.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::{BATCH_PAGES, PAGE_BYTES, PageBits, View, Window, WriteBack, page_bit, pages_of};
use crate::memory::{Source, Target};
use crate::volume::area::{BLOCK_BYTES, HeldBlocks, HeldRange};
use crate::volume::{Volume, VolumeError, block_start, len};

/// How long a fill waits for room while nothing can be evicted, because others' fills have all of it. They end as fast as
/// media answer, so this is longer than any stall of media that is not a failure of theirs.
const ROOM_PATIENCE: Duration = Duration::from_secs(10);

/// How long it looks again at once; most fills end within microseconds.
const ROOM_SPIN: Duration = Duration::from_millis(1);

/// Between two looks after that.
const ROOM_PAUSE: Duration = Duration::from_micros(200);

/// Puts pages where a map can reach them. It is called by a holder of the pages in the range lock, so it must not touch
/// the memory of a map.
pub(crate) trait Install {
    /// Maps pages that are resident already.
    fn present(&self, pages: &Range<u64>) -> io::Result<()>;

    /// Makes absent pages resident with these bytes, and maps them. How many bytes it did, also with an error.
    fn absent(&self, pages: &Range<u64>, plaintext: Source<'_>) -> (u64, io::Result<()>);
}

/// A map's way of filling: where to decrypt to (whole pages; it holds no plaintext afterwards), and who installs; without
/// one pages become resident, and are mapped nowhere.
pub(crate) struct Through<'a> {
    pub(crate) scratch: &'a mut [u8],
    pub(crate) install: Option<&'a dyn Install>,
}

/// What became of a [`Volume::fill_at_once`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtOnce {
    Filled,
    /// Somebody has a part of it: perhaps only for a moment.
    Busy,
    /// It takes what may wait.
    Refused,
}

/// How often pages that nobody of us has made are taken out of the memfd before a fill gives up.
const STRANGERS_MAX: u32 = 8;

impl Volume {
    /// The window of all maps that are not exclusive, made at the first call. It stays as long as the volume, and is
    /// empty without maps.
    pub(crate) fn window(&self) -> Result<&Arc<Window>, VolumeError> {
        if let Some(window) = self.window.get() {
            return Ok(window);
        }
        let window = Arc::new(Window::new(&(0..self.size())).map_err(VolumeError::Window)?);
        Ok(self.window.get_or_init(|| window))
    }

    /// Makes the pages of `range` (whole pages, at most [`BATCH_PAGES`]) resident and maps them.
    ///
    /// # Errors
    ///
    /// [`VolumeError::WindowFull`], [`VolumeError::Window`]; [`VolumeError::Media`] when the data of any page cannot be
    /// read: the pages before it are resident then.
    pub(crate) fn fill(&self, window: &Window, range: &Range<u64>, through: Through<'_>) -> Result<(), VolumeError> {
        let (held, room) = self.hold_with_room(window, range)?;
        let mut new_pages = 0;
        let filled = self.fill_through(held.blocks(), window, range, through, &mut new_pages);
        window.reserved.fetch_sub(room - new_pages, Ordering::AcqRel);
        filled
    }

    /// [`Self::fill`] in a handler of signals. It waits for nothing and allocates nothing, so it does nothing where a range is
    /// held by somebody else, where pages would have to leave first, while a transform moves data, and where media fail;
    /// [`Self::fill`] does, or tells.
    pub(crate) fn fill_at_once(&self, window: &Window, range: &Range<u64>, through: Through<'_>) -> AtOnce {
        let room = window.absent_count(range);
        let reserve = |now: u64| now.checked_add(room).filter(|&then| then <= window.page_count_max());
        if window.reserved.fetch_update(Ordering::AcqRel, Ordering::Acquire, reserve).is_err() {
            return AtOnce::Refused;
        }
        let mut new_pages = 0;
        let done = match self.area.try_exclusive(range.clone()) {
            None => AtOnce::Busy,
            Some(_) if window.absent_count(range) > room => AtOnce::Busy, // some of it was evicted before it was held
            Some(held) => match self.fill_through(held.blocks(), window, range, through, &mut new_pages) {
                Ok(()) => AtOnce::Filled,
                Err(_) => AtOnce::Refused,
            },
        };
        window.reserved.fetch_sub(room - new_pages, Ordering::AcqRel);
        done
    }

    /// Whether a handler of signals has come upon this thread while it holds a range of the volume or waits for one.
    pub(crate) fn is_entered_here(&self) -> bool {
        self.area.is_entered_here()
    }

    /// Holds `range` exclusively, with room for what is absent of it: how many pages were reserved. What is resident takes
    /// no room, so that touching it through another map evicts nothing.
    fn hold_with_room(&self, window: &Window, range: &Range<u64>) -> Result<(HeldRange<'_>, u64), VolumeError> {
        let mut room = window.absent_count(range);
        loop {
            if room > 0 {
                self.make_room(window, room)?;
            }
            let held = self.area.exclusive(range.clone());
            let absent = window.absent_count(range);
            if absent <= room {
                return Ok((held, room));
            }
            // Some of it was evicted before it was held. Who waits for room must hold neither pages nor room.
            drop(held);
            window.reserved.fetch_sub(room, Ordering::AcqRel);
            room = absent;
        }
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
                install.map_or(Ok(()), |install| install.present(&piece)).map_err(VolumeError::Window)?;
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
                let (done_bytes, result) = window.install_absent(&piece, pages, install);
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

    /// Evicts pages until no more are resident than the bound allows, when it came after them.
    ///
    /// # Errors
    ///
    /// [`VolumeError::WindowFull`] when that is not possible.
    pub(crate) fn evict_to_bound(&self, window: &Window) -> Result<(), VolumeError> {
        self.make_room(window, 0)
    }

    /// Reserves `page_count` pages, evicting others where the bound asks for it.
    fn make_room(&self, window: &Window, page_count: u64) -> Result<(), VolumeError> {
        let mut waiting_since = None;
        loop {
            let max = window.page_count_max();
            let reserve = |now: u64| now.checked_add(page_count).filter(|&then| then <= max);
            if window.reserved.fetch_update(Ordering::AcqRel, Ordering::Acquire, reserve).is_ok() {
                return Ok(());
            }
            let full = |cause| VolumeError::WindowFull { resident_max: max.saturating_mul(PAGE_BYTES), cause };
            if page_count > max {
                return Err(full(None));
            }
            match self.evict_next(window) {
                Ok(0) => {
                    let waited = waiting_since.get_or_insert_with(Instant::now).elapsed();
                    if waited > ROOM_PATIENCE {
                        return Err(full(None));
                    }
                    if waited < ROOM_SPIN { thread::yield_now() } else { thread::sleep(ROOM_PAUSE) }
                }
                Ok(_) => waiting_since = None,
                Err(error) => return Err(full(Some(Box::new(error)))),
            }
        }
    }

    /// Evicts the next pages round the volume that can be: what is pinned, or cannot be written, is passed over. How many
    /// pages went.
    ///
    /// # Errors
    ///
    /// The first one, when no page went on a whole round because of it.
    fn evict_next(&self, window: &Window) -> Result<u64, VolumeError> {
        let hand = window.hand.load(Ordering::Acquire).clamp(window.pages.start, window.pages.end);
        let mut result = Ok(());
        for mut rest in [hand..window.pages.end, window.pages.start..hand] {
            while let Some(run) = window.resident.next_run(&rest) {
                let run = run.start..run.end.min(run.start + BATCH_PAGES / 2);
                rest.start = run.end;
                window.hand.store(run.end, Ordering::Release);
                let (evicted, done) = self.evict_batch(window, &(run.start * PAGE_BYTES..run.end * PAGE_BYTES));
                if evicted > 0 {
                    return Ok(evicted);
                }
                result = result.and(done);
            }
        }
        result.map(|()| 0)
    }

    /// Puts the resident pages of `range` on media where they differ, overwrites them in memory and gives them back.
    /// Pinned pages stay. How many pages went.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Media`] for the first page that could not be written; such pages stay resident, the others go.
    pub(crate) fn evict(&self, window: &Window, range: &Range<u64>) -> Result<u64, VolumeError> {
        let mut evicted = 0;
        let mut result = Ok(());
        window.each_batch(range, |batch| {
            let (page_count, done) = self.evict_batch(window, &batch);
            evicted += page_count;
            note(&mut result, done);
        });
        result.map(|()| evicted)
    }

    /// One batch of whole pages. How many went, also with an error.
    fn evict_batch(&self, window: &Window, batch: &Range<u64>) -> (u64, Result<(), VolumeError>) {
        let held = self.area.exclusive(batch.clone());
        let mut evicted = 0;
        let mut result = Ok(());
        let mut rest = batch.clone();
        while !rest.is_empty() {
            let (part, pinned) = window.shown(&rest, View::pinned);
            rest.start = part.end;
            if pinned {
                continue;
            }
            if let Err(error) = window.views().iter().try_for_each(|view| view.zap(&part)) {
                note(&mut result, Err(VolumeError::Window(error)));
                continue;
            }
            let clean = window.clean_of_zapped(&part);
            self.write_back_each(held.blocks(), window, &part, clean, |pages, written| {
                let wiped = written.and_then(|()| window.wipe_held(pages).map_err(VolumeError::Window));
                note(&mut result, wiped.map(|page_count| evicted += page_count));
            });
        }
        (evicted, result)
    }

    /// Writes back the resident pages of `part` where they differ, but for those that are `clean` (at most [`BATCH_PAGES`]
    /// pages, or none clean), and tells what became of them: in runs, or one by one where a run could not be written, so
    /// that one bad page harms no other. The caller holds `part` exclusively.
    fn write_back_each(
        &self,
        held: HeldBlocks<'_>,
        window: &Window,
        part: &Range<u64>,
        clean: PageBits,
        mut done: impl FnMut(&Range<u64>, Result<(), VolumeError>),
    ) {
        let is_clean = |page: u64| clean != 0 && clean & page_bit(part.start, page * PAGE_BYTES) != 0;
        let mut rest = part.clone();
        while let Some(mut pages) = window.next_resident(&rest) {
            let skip = is_clean(pages.start / PAGE_BYTES);
            let end = pages_of(&pages).find(|&page| is_clean(page) != skip).map_or(pages.end, |page| page * PAGE_BYTES);
            pages.end = end;
            let mut written =
                if skip { Ok(()) } else { self.write_back_held(held, window, &pages, WriteBack::IfDifferent) };
            if written.is_err() && pages.end - pages.start > PAGE_BYTES {
                pages.end = pages.start + PAGE_BYTES;
                written = self.write_back_held(held, window, &pages, WriteBack::IfDifferent);
            }
            rest.start = pages.end;
            done(&pages, written);
        }
    }

    /// Evicts what `view`, which is about to end, shows alone, so that nothing of it has to be looked at that nobody stored to.
    /// What cannot go is left to [`Self::leave_window`].
    pub(crate) fn evict_shown_by(&self, window: &Window, view: &View) {
        window.each_batch(view.range(), |batch| {
            let mut rest = batch;
            while !rest.is_empty() {
                let (part, is_shown) = window.shown(&rest, |other| !std::ptr::eq(other, view));
                rest.start = part.end;
                if !is_shown {
                    let _ = self.evict_batch(window, &part); // who is left is tried again, and tells
                }
            }
        });
    }

    /// What the end of a map of `range`, which is detached, does with its pages: those that no other view shows are written
    /// back where they differ and leave memory, also when they cannot be written, because nobody could reach them any more
    /// and they would hide what is written there later. The others are only written back: that they were stored to may be
    /// known to the map that ends alone.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Media`] for the first page that could not be written.
    pub(crate) fn leave_window(&self, window: &Window, range: &Range<u64>) -> Result<(), VolumeError> {
        let mut result = Ok(());
        window.each_batch(range, |batch| {
            let held = self.area.exclusive(batch.clone());
            let mut rest = batch;
            while !rest.is_empty() {
                // A view that is attached from here on has nothing of the batch before it is given back.
                let (part, is_shown) = window.shown(&rest, |_| true);
                rest.start = part.end;
                self.write_back_each(held.blocks(), window, &part, 0, |pages, written| {
                    note(&mut result, written);
                    if !is_shown {
                        note(&mut result, window.wipe_held(pages).map(|_| ()).map_err(VolumeError::Window));
                    }
                });
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
        self.lock_as(false)
    }

    /// [`Self::lock`]; with `closed` the header also tells that the namespace was closed in order, if everything is durable
    /// and it may be written.
    pub(crate) fn lock_as(&self, closed: bool) -> Result<(), VolumeError> {
        self.check_owner()?;
        // First nobody waits for a page of a map any more: who does may hold what is waited for below.
        let mut result = Ok(());
        self.windows().iter().for_each(|window| note(&mut result, window.revoke()));
        let mut engine = self.engine();
        let mut all = self.area.alone();
        if self.locked() {
            return Ok(());
        }
        let windows = self.windows();
        for window in &windows {
            note(&mut result, window.revoke()); // views that were attached meanwhile
            window.each_batch(&window.whole(), |batch| {
                self.write_back_each(all.blocks(), window, &batch, 0, |_, written| note(&mut result, written));
            });
        }
        note(&mut result, self.area.sync().map_err(VolumeError::from));
        for window in &windows {
            window.each_batch(&window.whole(), |batch| {
                note(&mut result, window.wipe_held(&batch).map(|_| ()).map_err(VolumeError::Window));
            });
        }
        if let (true, true, Some(engine)) = (closed && !self.read_only(), result.is_ok(), engine.as_mut()) {
            note(&mut result, engine.mark(false).map_err(VolumeError::from));
        }
        all.forget_keys();
        engine.take();
        self.locked.store(true, Ordering::SeqCst);
        result
    }

    /// All windows that there are.
    fn windows(&self) -> Vec<Arc<Window>> {
        let mut windows = self.claims.windows();
        windows.extend(self.window.get().cloned());
        windows
    }
}

impl Window {
    /// Ends every access through views for good.
    fn revoke(&self) -> Result<(), VolumeError> {
        let mut result = Ok(());
        for view in self.views().iter() {
            note(&mut result, view.revoke().map_err(VolumeError::Window));
        }
        result
    }

    /// Makes absent pages resident with these bytes, under the caller's exclusive hold. How many bytes it did, also with an
    /// error. A page that is in the memfd already is nobody's: whoever made it (`mlockall` before userfaultfd could be had,
    /// a huge page) made zeroes, and they go first.
    fn install_absent(&self, pages: &Range<u64>, bytes: &[u8], install: Option<&dyn Install>) -> (u64, io::Result<()>) {
        let mut done_bytes = 0;
        for _ in 0..=STRANGERS_MAX {
            let rest = pages.start + done_bytes..pages.end;
            let bytes = &bytes[len(&(pages.start..rest.start))..];
            let (more, result) = match install {
                Some(install) => install.absent(&rest, Source::from_slice(bytes)),
                None => match self.memory.fill(&rest, bytes) {
                    Ok(()) => (rest.end - rest.start, Ok(())),
                    Err(error) => (0, Err(error)),
                },
            };
            done_bytes += more;
            match result {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if let Err(error) = self.memory.punch(&(pages.start + done_bytes..pages.end)) {
                        return (done_bytes, Err(error));
                    }
                }
                result => return (done_bytes, result),
            }
        }
        (done_bytes, Err(io::ErrorKind::AlreadyExists.into()))
    }
}

/// Keeps the first error.
fn note(result: &mut Result<(), VolumeError>, done: Result<(), VolumeError>) {
    if result.is_ok() {
        *result = done;
    }
}

/// The whole blocks that hold a byte of `range`.
pub(in crate::volume) const fn blocks_of(range: &Range<u64>) -> Range<u64> {
    block_start(range.start)..range.end.next_multiple_of(BLOCK_BYTES)
}
