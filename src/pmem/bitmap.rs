//! A large set of small numbers, one bit each, that costs memory only where bits are set.
//!
//! The bits live in zeroed anonymous memory that the kernel backs page by page at the first store, so that a set over the
//! pages of a terabyte is free until something goes wrong. Every operation is one atomic instruction: the SIGBUS handler
//! may set bits.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

const WORD_BITS: usize = 64;
const WORD_BYTES: usize = size_of::<u64>();

/// A set of numbers below a fixed bound.
#[derive(Debug)]
pub(super) struct Bitmap {
    memory: MmapRaw,
    len_bits: usize,
}

impl Bitmap {
    /// An empty set of numbers below `len_bits`.
    pub(super) fn new(len_bits: usize) -> io::Result<Self> {
        let words = len_bits.div_ceil(WORD_BITS).max(1);
        let memory = MmapOptions::new().len(words * WORD_BYTES).no_reserve_swap().map_anon()?.into();
        Ok(Self { memory, len_bits })
    }

    /// The words, for code that cannot hold a reference to the set (the SIGBUS handler).
    pub(super) fn words(&self) -> *const AtomicU64 {
        self.memory.as_ptr().cast()
    }

    /// Whether `bit` is in the set. Acquires what was done before it was put there.
    pub(super) fn contains(&self, bit: usize) -> bool {
        self.word(bit).load(Ordering::Acquire) & mask(bit) != 0
    }

    /// Puts `bit` into the set.
    pub(super) fn insert(&self, bit: usize) {
        self.word(bit).fetch_or(mask(bit), Ordering::SeqCst);
    }

    /// Takes `bit` out of the set.
    pub(super) fn remove(&self, bit: usize) {
        self.word(bit).fetch_and(!mask(bit), Ordering::SeqCst);
    }

    /// The lowest bit of `range` that is in the set.
    pub(super) fn first_in(&self, range: Range<usize>) -> Option<usize> {
        range.into_iter().find(|&bit| self.contains(bit))
    }

    fn word(&self, bit: usize) -> &AtomicU64 {
        assert!(bit < self.len_bits, "bit {bit} of {}", self.len_bits);
        // SAFETY: the word lies within the memory, because `bit` is below the length it was made for.
        let word = unsafe { self.words().add(bit / WORD_BITS) };
        // SAFETY: the memory is readable, writable, page-aligned, zeroed and only ever used as atomic words.
        unsafe { &*word }
    }
}

/// Puts `bit` into the set whose words begin at `words`.
///
/// # Safety
///
/// `words` comes from [`Bitmap::words`] of a set that is alive and made for more than `bit` bits.
pub(super) unsafe fn insert_raw(words: *const AtomicU64, bit: usize) {
    // SAFETY: the caller vouches that the word exists.
    let word = unsafe { words.add(bit / WORD_BITS) };
    // SAFETY: as above; the words are only ever used as atomics.
    unsafe { &*word }.fetch_or(mask(bit), Ordering::SeqCst);
}

const fn mask(bit: usize) -> u64 {
    1 << (bit % WORD_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_independent_across_word_borders() {
        let set = Bitmap::new(130).unwrap();
        for bit in [0, 63, 64, 129] {
            assert!(!set.contains(bit));
            set.insert(bit);
            assert!(set.contains(bit));
        }
        assert_eq!(set.first_in(1..130), Some(63));
        set.remove(63);
        assert_eq!(set.first_in(1..130), Some(64));
        assert_eq!(set.first_in(65..129), None);
        assert_eq!(set.first_in(0..0), None);
        // SAFETY: bit 65 is below 130 and the set is alive.
        unsafe { insert_raw(set.words(), 65) };
        assert!(set.contains(65));
    }

    #[test]
    fn a_huge_set_costs_nothing() {
        let set = Bitmap::new(1 << 40).unwrap(); // 128 GiB of bits
        set.insert((1 << 40) - 1);
        assert!(set.contains((1 << 40) - 1));
    }

    #[test]
    #[should_panic(expected = "bit 64 of 64")]
    fn a_bit_past_the_end_panics() {
        Bitmap::new(64).unwrap().insert(64);
    }
}
