//! The window: the plaintext pages that are resident for direct maps, coherent with everybody else who uses the volume.
//!
//! A page is *Absent* (a hole; the data is on media only), *Filling*, *Resident* or *Evicting*. The bit in `resident`
//! tells the first from the third; a page is in one of the transient states while somebody holds its bytes exclusively in
//! the volume's range lock, and only such a holder changes the bit. Whoever holds any byte of a page, shared or
//! exclusively, may rely on its bit. So a page is decrypted once, never under a reader, and never evicted under a store
//! of this process that goes through the volume. Stores through a map are stopped by taking the page out of every view's
//! page tables first: they then fault, and the fault waits for the range lock.
//!
//! Because a fault waits for the range lock, nobody who holds it may touch the memory of a map (a buffer given to
//! [`Volume::read_at`] must not lie in a map of the same volume).
//!
//! With a bound, pages leave in turn, by their addresses: nothing is known of their use. Finding out would cost nearly what
//! it saves: a page that comes back costs 8.1 us, and a page that is only taken out of the page tables, to see whether it is
//! touched again, costs 6.5 us when it is.
//!
//! What a map stores through its pointer is on media only after [`Volume::write_back`] or eviction. What the volume writes goes
//! to both. What a call of a map stores to pages that are absent goes to media alone, if it overwrites them whole: bringing
//! them in would cost more than encrypting them.
//!
//! A page that leaves is written back only if it may have been stored to: `marks` tells, once it is out of all page tables.
//!
//! The maps of a volume share one window; an exclusive map has one of its own, which nobody else reads.
//!
//! [`Volume::read_at`]: super::Volume::read_at
//! [`Volume::write_back`]: super::Volume::write_back

mod marks;
mod memory;
mod operations;
mod pages;
mod stores;
mod write_back;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::marks::{ALL_PAGES, PageBits, page_bit};
pub(crate) use self::marks::{Marks, Traps};
use self::memory::WindowMemory;
pub(crate) use self::memory::{View, ViewOptions};
pub(super) use self::operations::blocks_of;
pub(crate) use self::operations::{AtOnce, Install, Through};
pub(crate) use self::pages::PageSet;
pub(crate) use self::write_back::WriteBack;
use crate::secret::SecretBytes;

/// Bytes of a page of the window.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// The least bound of resident plaintext: an instruction may need several pages at once.
pub(crate) const RESIDENT_BYTES_MIN: u64 = 256 << 10;

/// Pages that are filled, written back or evicted under one hold of the range lock.
pub(crate) const BATCH_PAGES: u64 = 64;

/// See the module's head. Offsets are logical offsets.
#[derive(Debug)]
pub(crate) struct Window {
    memory: WindowMemory,
    resident: PageSet,
    /// Resident pages whose stores no view's page table tells of: what a write through a map stored (`stores.rs`), or whose
    /// write-back failed.
    unsynced: PageSet,
    /// What it shows, in pages.
    pages: Range<u64>,
    views: Mutex<Vec<Arc<View>>>,
    /// Pages that are resident or that somebody is about to make so.
    reserved: AtomicU64,
    reserved_max: AtomicU64,
    /// Where the next victim is looked for.
    hand: AtomicU64,
    /// Who has taken marks of stores, or the page tables that hold them, and has not written all of it back yet.
    takers: AtomicUsize,
    /// A page of plaintext from media, to compare with.
    scratch: Mutex<SecretBytes>,
}

/// Why a view was not attached.
#[derive(Debug)]
pub(crate) enum AttachError {
    /// No memory.
    Os(io::Error),
    /// All pages of eager maps stay resident: so many bytes, and the bound is too small for them and for lazy maps.
    Pinned { pinned_bytes: u64, resident_max: u64 },
}

impl Window {
    /// A window over logical `range`, which begins at a page.
    pub(crate) fn new(range: &Range<u64>) -> io::Result<Self> {
        if rustix::param::page_size() as u64 != PAGE_BYTES {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        let pages = pages_of(range);
        let set = || PageSet::new(&pages).map_err(io::Error::other);
        let page_len = usize::try_from(PAGE_BYTES).expect("a page is small");
        Ok(Self {
            memory: WindowMemory::new(pages.start * PAGE_BYTES..pages.end * PAGE_BYTES)?,
            resident: set()?,
            unsynced: set()?,
            views: Mutex::default(),
            reserved: AtomicU64::new(0),
            reserved_max: AtomicU64::new(u64::MAX),
            hand: AtomicU64::new(pages.start),
            takers: AtomicUsize::new(0),
            scratch: Mutex::new(SecretBytes::try_zeroed(page_len)?),
            pages,
        })
    }

    /// Maps `range` of whole pages, and keeps at most `resident_max` bytes of the window resident while this view is attached.
    /// The least bound of all views counts.
    ///
    /// # Errors
    ///
    /// [`AttachError::Pinned`] when the pages that are never evicted would leave no room for the others within the bound.
    pub(crate) fn attach(
        &self,
        range: Range<u64>,
        options: ViewOptions,
        resident_max: Option<u64>,
    ) -> Result<Arc<View>, AttachError> {
        let asked = resident_max.map_or(u64::MAX, |bytes| bytes.max(RESIDENT_BYTES_MIN) / PAGE_BYTES);
        let view = View::new(&self.memory, range, options, asked).map_err(AttachError::Os)?;
        let view = Arc::new(view);
        let mut views = self.views();
        let bound = asked.min(self.page_count_max());
        let all = || views.iter().chain([&view]);
        let pinned_bytes = union_bytes(all().filter(|view| view.pinned()).map(|view| view.range()));
        let lazy_bytes = if all().all(|view| view.pinned()) { 0 } else { RESIDENT_BYTES_MIN };
        if (pinned_bytes + lazy_bytes) / PAGE_BYTES > bound {
            return Err(AttachError::Pinned { pinned_bytes, resident_max: bound * PAGE_BYTES });
        }
        views.push(Arc::clone(&view));
        self.reserved_max.store(bound, Ordering::Release);
        Ok(view)
    }

    /// Forgets a view: eviction touches it no more.
    pub(crate) fn detach(&self, view: &Arc<View>) {
        let mut views = self.views();
        views.retain(|each| !Arc::ptr_eq(each, view));
        let bound = views.iter().map(|view| view.page_count_max()).min().unwrap_or(u64::MAX);
        self.reserved_max.store(bound, Ordering::Release);
    }

    /// Until it is dropped, no page counts as clean: marks of stores are taken before the pages are written back.
    pub(crate) fn marks_are_taken(&self) -> MarksAreTaken<'_> {
        self.takers.fetch_add(1, Ordering::SeqCst);
        MarksAreTaken { window: self }
    }

    /// Which pages of `part`, at most [`BATCH_PAGES`], are as media have them for certain. The caller holds `part`
    /// exclusively, and has taken it out of all views before.
    fn clean_of_zapped(&self, part: &Range<u64>) -> PageBits {
        let clean = self.views().iter().fold(ALL_PAGES, |clean, view| clean & view.clean_of_zapped(part));
        if clean == 0 || self.takers.load(Ordering::SeqCst) > 0 {
            return 0; // who takes marks now cannot end before the hold does, so it is seen here
        }
        let mut unsynced = 0;
        let mut rest = part.clone();
        while let Some(run) = self.next_unsynced(&rest) {
            rest.start = run.end;
            pages_of(&run).for_each(|page| unsynced |= page_bit(part.start, page * PAGE_BYTES));
        }
        clean & !unsynced
    }

    /// Bytes of plaintext in memory now.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.reserved.load(Ordering::Acquire) * PAGE_BYTES
    }

    /// The most pages that may be resident.
    pub(crate) fn page_count_max(&self) -> u64 {
        self.reserved_max.load(Ordering::Acquire)
    }

    /// The first run of resident pages in logical `range`, cut at its ends. It may change unless the caller holds the
    /// range.
    pub(crate) fn next_resident(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if range.is_empty() {
            return None;
        }
        let run = self.resident.next_run(&pages_of(range))?;
        Some((run.start * PAGE_BYTES).max(range.start)..(run.end * PAGE_BYTES).min(range.end))
    }

    /// The first run of pages in logical `range` that hold stores which page tables do not tell of.
    pub(crate) fn next_unsynced(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if range.is_empty() {
            return None;
        }
        let run = self.unsynced.next_run(&pages_of(range))?;
        Some(run.start * PAGE_BYTES..run.end * PAGE_BYTES)
    }

    /// Cuts `range`, which the caller holds, where residency changes: the first piece, and whether it is resident.
    fn piece(&self, range: &Range<u64>) -> (Range<u64>, bool) {
        match self.next_resident(range) {
            None => (range.clone(), false),
            Some(run) if run.start > range.start => (range.start..run.start, false),
            Some(run) => (run, true),
        }
    }

    /// Cuts `range`, which is not empty, where views of this `kind` begin or end: the first piece, and whether one shows it.
    fn shown(&self, range: &Range<u64>, kind: impl Fn(&View) -> bool) -> (Range<u64>, bool) {
        let views = self.views();
        let shown = || views.iter().filter(|view| kind(view)).map(|view| view.range());
        if let Some(end) = shown().filter(|view| view.contains(&range.start)).map(|view| view.end).max() {
            return (range.start..end.min(range.end), true);
        }
        let end = shown().map(|view| view.start).filter(|&start| start > range.start).min();
        (range.start..end.map_or(range.end, |end| end.min(range.end)), false)
    }

    /// How many pages of `range`, whole pages, are absent. It may change unless the caller holds the range.
    fn absent_count(&self, range: &Range<u64>) -> u64 {
        pages_of(range).map(|page| u64::from(!self.resident.contains(page))).sum()
    }

    /// Calls `with` for the resident runs of `range`, at most [`BATCH_PAGES`] pages each.
    fn each_batch(&self, range: &Range<u64>, mut with: impl FnMut(Range<u64>)) {
        let mut rest = range.clone();
        while let Some(run) = self.next_resident(&rest) {
            let end = run.end.min((run.start / PAGE_BYTES + BATCH_PAGES) * PAGE_BYTES);
            with(run.start..end);
            rest.start = end;
        }
    }

    /// Overwrites whole resident pages and gives them back, under the caller's exclusive hold. How many there were.
    fn wipe_held(&self, run: &Range<u64>) -> io::Result<u64> {
        self.memory.target(run).fill(0);
        let mut page_count = 0;
        for page in pages_of(run) {
            self.unsynced.remove(page);
            page_count += u64::from(self.resident.remove(page));
        }
        let punched = self.memory.punch(run);
        self.reserved.fetch_sub(page_count, Ordering::AcqRel);
        punched.map(|()| page_count)
    }

    fn whole(&self) -> Range<u64> {
        self.pages.start * PAGE_BYTES..self.pages.end * PAGE_BYTES
    }

    fn views(&self) -> MutexGuard<'_, Vec<Arc<View>>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Window::marks_are_taken`].
#[derive(Debug)]
#[must_use]
pub(crate) struct MarksAreTaken<'a> {
    window: &'a Window,
}

impl Drop for MarksAreTaken<'_> {
    fn drop(&mut self) {
        self.window.takers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How many bytes lie in any of `ranges`.
fn union_bytes<'a>(ranges: impl Iterator<Item = &'a Range<u64>>) -> u64 {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_by_key(|range| range.start);
    let mut counted = 0;
    let mut bytes = 0;
    for range in ranges {
        bytes += range.end.saturating_sub(range.start.max(counted));
        counted = range.end.max(counted);
    }
    bytes
}

/// The pages that hold a byte of `range`, which is not empty.
pub(crate) const fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}

#[cfg(test)]
mod tests;
