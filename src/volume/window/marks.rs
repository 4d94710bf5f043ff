//! How a view knows which of its pages were stored to.
//!
//! A mark of the kernel is the absence of a protection: an entry of the page tables that is write-protected, or the trace that
//! such an entry leaves when the page is [taken out](View::zap), says that nobody has stored through it since. Everything
//! else says nothing: a page without an entry may have been stored to before the kernel took the entry away (swap). So a
//! page counts as clean by what is there, never by what is not.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::memory::View;
use super::pages::PageSet;
use super::{BATCH_PAGES, PAGE_BYTES, Window, pages_of};
use crate::uffd::PageMap;

/// Runs of resident pages that lie so near to each other are asked for their marks by one system call: as many page-table
/// entries cost about as much as one call.
const SCAN_GAP_BYTES: u64 = 32 * PAGE_BYTES;

/// Where stores through a view are noted.
#[derive(Debug)]
pub(crate) enum Marks {
    /// In the page tables, by the kernel.
    Kernel(Arc<PageMap>),
    /// By who answers faults: the first store to a page is trapped.
    Trapped(Traps),
    /// Nowhere.
    Unknown,
}

/// The pages that were stored to, by page of the volume. A page that is not among them is write-protected.
#[derive(Debug)]
pub(crate) struct Traps {
    pages: PageSet,
    /// Held while a page and its protection change together: a sync between the two would leave a page that is neither in
    /// the set nor protected, and a store to it that nobody hears of.
    changing: Mutex<()>,
}

impl Traps {
    /// For the pages of logical `range`.
    ///
    /// # Errors
    ///
    /// Without memory.
    pub(crate) fn new(range: &Range<u64>) -> io::Result<Self> {
        let pages = PageSet::new(&pages_of(range)).map_err(io::Error::other)?;
        Ok(Self { pages, changing: Mutex::default() })
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A few pages, as bits counted from the first one.
pub(super) type PageBits = u64;

/// All of them.
pub(super) const ALL_PAGES: PageBits = PageBits::MAX;

/// The bit of the page at `offset` among pages that begin at `start`.
pub(super) const fn page_bit(start: u64, offset: u64) -> PageBits {
    1 << ((offset - start) / PAGE_BYTES)
}

/// The bits of `pages`, whole pages, among those that begin at `start`.
fn page_bits(start: u64, pages: &Range<u64>) -> PageBits {
    let count = (pages.end - pages.start) / PAGE_BYTES;
    let ones = if count >= u64::from(PageBits::BITS) { ALL_PAGES } else { (1 << count) - 1 };
    ones << ((pages.start - start) / PAGE_BYTES)
}

impl View {
    /// Takes the write protection of the page at logical `start` away, noting that it may be stored to, and wakes who waits.
    pub(crate) fn allow_stores(&self, start: u64) -> io::Result<()> {
        let Some(faults) = self.faults() else { return Ok(()) };
        let here = self.addresses(&(start..start + PAGE_BYTES));
        let Marks::Trapped(traps) = self.marks() else { return faults.write_protect(&here, false) };
        let _changing = traps.change();
        traps.pages.insert(start / PAGE_BYTES);
        faults.write_protect(&here, false)
    }

    /// Calls `found` for the pages of `range` that were stored to through this view since the last time, and takes their
    /// marks. Until what it has found is on media, the pages look clean: the caller says so ([`Window::marks_are_taken`]).
    ///
    /// # Errors
    ///
    /// What the kernel says; the marks of pages that were not found stay.
    pub(crate) fn take_stores(
        &self,
        window: &Window,
        range: &Range<u64>,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        match self.marks() {
            Marks::Kernel(map) => self.take_written(map, window, range, &mut found),
            Marks::Trapped(traps) => self.take_trapped(traps, range, &mut found),
            Marks::Unknown => Ok(()),
        }
    }

    fn take_written(
        &self,
        map: &PageMap,
        window: &Window,
        range: &Range<u64>,
        found: &mut impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut rest = range.clone();
        while let Some(mut piece) = window.next_resident(&rest) {
            let near = |end: u64| end..range.end.min(end + SCAN_GAP_BYTES);
            while let Some(next) = window.next_resident(&near(piece.end)) {
                piece.end = next.end;
            }
            rest.start = piece.end;
            map.take_written(&self.addresses(&piece), |pages| found(self.logical(&pages)))?;
        }
        Ok(())
    }

    fn take_trapped(&self, traps: &Traps, range: &Range<u64>, found: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        let Some(faults) = self.faults() else { return Ok(()) };
        let mut rest = pages_of(range);
        while let Some(run) = traps.pages.next_run(&rest) {
            rest.start = run.end;
            let pages = run.start * PAGE_BYTES..run.end * PAGE_BYTES;
            {
                let _changing = traps.change();
                // The mark goes once the protection is there: what cannot be protected stays marked.
                faults.write_protect(&self.addresses(&pages), true)?;
                run.for_each(|page| {
                    traps.pages.remove(page);
                });
            }
            found(pages);
        }
        Ok(())
    }

    /// Which pages of `part` (at most [`BATCH_PAGES`]), which were taken out of this view, nobody has stored to through it
    /// since their marks were taken.
    pub(super) fn clean_of_zapped(&self, part: &Range<u64>) -> PageBits {
        debug_assert!((part.end - part.start) / PAGE_BYTES <= BATCH_PAGES, "more pages than bits");
        let shown = part.start.max(self.range().start)..part.end.min(self.range().end);
        if !self.writable() || shown.is_empty() {
            return ALL_PAGES;
        }
        let mut clean = !page_bits(part.start, &shown);
        match self.marks() {
            Marks::Unknown => {}
            Marks::Trapped(traps) => {
                for page in pages_of(&shown).filter(|&page| !traps.pages.contains(page)) {
                    clean |= page_bit(part.start, page * PAGE_BYTES);
                }
            }
            Marks::Kernel(map) => {
                // What cannot be asked is not known to be clean.
                let _ = map.each_protected_and_gone(&self.addresses(&shown), |pages| {
                    clean |= page_bits(part.start, &self.logical(&pages));
                });
            }
        }
        clean
    }

    /// The logical offsets that are mapped at `addresses`.
    fn logical(&self, addresses: &Range<u64>) -> Range<u64> {
        let start = self.start().addr() as u64;
        addresses.start - start + self.range().start..addresses.end - start + self.range().start
    }
}
