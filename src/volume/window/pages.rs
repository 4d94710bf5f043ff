//! A set of page numbers that many threads change at once: one bit a page.
//!
//! Each call is atomic for its page; what a bit promises about a page is ruled by the volume's range lock, not here.

use std::collections::TryReserveError;
use std::ops::Range;

use crate::sync::atomic::{AtomicU64, Ordering};

const BITS: u64 = u64::BITS as u64;

/// Pages of a range.
#[derive(Debug)]
pub(crate) struct PageSet {
    /// The number of the first word's first page.
    first: u64,
    words: Vec<AtomicU64>,
}

impl PageSet {
    /// An empty set, which may come to hold `pages`.
    ///
    /// # Errors
    ///
    /// Without memory for it.
    pub(crate) fn new(pages: &Range<u64>) -> Result<Self, TryReserveError> {
        let first = pages.start - pages.start % BITS;
        let count = usize::try_from((pages.end - first).div_ceil(BITS)).unwrap_or(usize::MAX);
        let mut words = Vec::new();
        words.try_reserve_exact(count)?;
        words.resize_with(count, || AtomicU64::new(0));
        Ok(Self { first, words })
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
        &self.words[usize::try_from((page - self.first) / BITS).expect("64-bit targets only")]
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
        let set = PageSet::new(&(0..300)).unwrap();
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

    #[test]
    fn a_set_of_pages_far_away_is_as_small_as_one_of_the_first() {
        const FAR: u64 = (1 << 40) + 77;
        let set = PageSet::new(&(FAR..FAR + 3)).unwrap();
        assert!(set.insert(FAR) && set.insert(FAR + 2) && !set.contains(FAR + 1));
        assert_eq!(set.next_run(&(FAR..FAR + 3)), Some(FAR..FAR + 1));
        assert_eq!(set.next_run(&(FAR + 1..FAR + 3)), Some(FAR + 2..FAR + 3));
        assert!(set.words.len() <= 2);
    }

    #[test]
    fn a_set_that_memory_has_no_room_for_is_an_error() {
        assert!(PageSet::new(&(0..1 << 62)).is_err());
    }
}
