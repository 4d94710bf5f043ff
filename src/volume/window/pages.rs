//! A set of page numbers that many threads change at once: one bit a page.
//!
//! Each call is atomic for its page; what a bit promises about a page is ruled by the volume's range lock, not here.

use crate::sync::atomic::{AtomicU64, Ordering};
use std::ops::Range;

const BITS: u64 = u64::BITS as u64;

/// Pages `0..page_count`.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Box<[AtomicU64]>,
}

impl PageSet {
    /// An empty set.
    pub(crate) fn new(page_count: u64) -> Self {
        Self { words: (0..page_count.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect() }
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        self.word(page).load(Ordering::Acquire) & bit(page) != 0
    }

    /// Whether the page is new in the set.
    pub(crate) fn insert(&self, page: u64) -> bool {
        self.word(page).fetch_or(bit(page), Ordering::AcqRel) & bit(page) == 0
    }

    /// Whether the page was in the set.
    pub(crate) fn remove(&self, page: u64) -> bool {
        self.word(page).fetch_and(!bit(page), Ordering::AcqRel) & bit(page) != 0
    }

    /// The first run of pages in the set that begins in `within`, cut at the end of `within`.
    pub(crate) fn next_run(&self, within: &Range<u64>) -> Option<Range<u64>> {
        let start = self.first(within, 0)?;
        let end = self.first(&(start..within.end), u64::MAX).unwrap_or(within.end);
        Some(start..end)
    }

    /// The first page of `within` whose bit, combined with `flip` by exclusive or, is 1.
    fn first(&self, within: &Range<u64>, flip: u64) -> Option<u64> {
        let mut page = within.start;
        while page < within.end {
            let word = (self.word(page).load(Ordering::Acquire) ^ flip) >> (page % BITS);
            if word != 0 {
                let found = page + u64::from(word.trailing_zeros());
                return (found < within.end).then_some(found);
            }
            page = (page / BITS + 1) * BITS;
        }
        None
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        &self.words[usize::try_from(page / BITS).expect("64-bit targets only")]
    }
}

const fn bit(page: u64) -> u64 {
    1 << (page % BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_across_words_and_cut_at_the_end() {
        let set = PageSet::new(300);
        for page in (60..130).chain([200, 299]) {
            assert!(set.insert(page));
            assert!(!set.insert(page));
        }
        assert_eq!(set.next_run(&(0..300)), Some(60..130));
        assert_eq!(set.next_run(&(64..100)), Some(64..100));
        assert_eq!(set.next_run(&(130..300)), Some(200..201));
        assert_eq!(set.next_run(&(201..300)), Some(299..300));
        assert_eq!(set.next_run(&(201..299)), None);
        assert_eq!(set.next_run(&(5..5)), None);
        assert!(set.remove(200));
        assert!(!set.remove(200));
        assert!(!set.contains(200) && set.contains(129) && !set.contains(130));
    }
}
