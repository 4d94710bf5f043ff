//! Range-checked raw memory: the one way in which code touches a backing, a window or a caller's buffer.
//!
//! A backing and a plaintext window are memory that other threads and other processes change at any time, so no
//! `&[u8]` or `&mut [u8]` may ever point into them: the compiler would assume that the bytes hold still. [`Source`] and
//! [`Target`] are a pointer, a length and a lifetime. Whoever makes one from a raw pointer vouches for the range once;
//! everything after that is safe and bounds-checked.
//!
//! The bytes read through a [`Source`] may be torn between two concurrent values. What is read is never trusted to be
//! the same twice: copy it out first, then look at it.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;

use zeroize::Zeroizing;

/// How ciphertext is stored at a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Ordinary stores of 16 bytes or more: the lines stay in the cache.
    Cached,
    /// 64-byte non-temporal stores where the destination is 64-byte aligned, ordinary stores of 16 bytes or more at the
    /// ragged ends. The kernel that used them ends with a store fence.
    NonTemporal,
}

/// Readable bytes at an address, valid for `'a`, which others may change meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    start: *const u8,
    len_bytes: usize,
    lifetime: PhantomData<&'a [u8]>,
}

// SAFETY: the constructor's contract is that the range stays readable for 'a from every thread.
unsafe impl Send for Source<'_> {}
// SAFETY: reading through a shared `Source` writes nothing.
unsafe impl Sync for Source<'_> {}

impl<'a> Source<'a> {
    /// Wraps `len_bytes` readable bytes at `start`.
    ///
    /// # Safety
    ///
    /// - `start..start + len_bytes` is readable during `'a`, from any thread.
    /// - A concurrent writer, if there is one, writes through raw pointers as well (another mapping or process, or a
    ///   [`Target`]): no `&mut` to these bytes exists during `'a`.
    #[must_use]
    pub const unsafe fn from_raw(start: *const u8, len_bytes: usize) -> Self {
        Self { start, len_bytes, lifetime: PhantomData }
    }

    /// Wraps a slice.
    #[must_use]
    pub const fn from_slice(bytes: &'a [u8]) -> Self {
        Self { start: bytes.as_ptr(), len_bytes: bytes.len(), lifetime: PhantomData }
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether there are no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The address of the first byte.
    #[must_use]
    pub const fn as_ptr(&self) -> *const u8 {
        self.start
    }

    /// The bytes at `range`.
    ///
    /// # Panics
    ///
    /// Panics when `range` is not within the bytes.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        check_range(&range, self.len_bytes);
        // SAFETY: the range was checked, so the address is within (or one past) the bytes.
        let start = unsafe { self.start.add(range.start) };
        Self { start, len_bytes: range.len(), lifetime: PhantomData }
    }

    /// Whether the bytes equal `other`, each byte read once. Nothing of them is left on the stack.
    #[must_use]
    pub(crate) fn equals(self, other: &[u8]) -> bool {
        let mut chunk = Zeroizing::new([0; 64]);
        let same = self.len_bytes == other.len();
        same && other.chunks(chunk.len()).enumerate().all(|(index, expected)| {
            let start = index * chunk.len();
            let found = &mut chunk[..expected.len()];
            self.slice(start..start + expected.len()).copy_to(found);
            found == expected
        })
    }

    /// Copies all bytes to `out`.
    ///
    /// # Panics
    ///
    /// Panics when the lengths differ.
    pub fn copy_to(self, out: &mut [u8]) {
        assert_eq!(self.len_bytes, out.len(), "a copy needs equal lengths");
        // SAFETY: both ranges are valid for the length; `out` is exclusive, so they are disjoint.
        unsafe { ptr::copy_nonoverlapping(self.start, out.as_mut_ptr(), out.len()) };
    }

    /// Copies whole 16-byte blocks to `out`, each by one load: a block at a multiple of 16 that somebody stores meanwhile
    /// comes out old or new. A plain copy chooses its pieces by where `out` lies.
    ///
    /// # Panics
    ///
    /// Panics when the lengths differ or are not a multiple of 16.
    pub(crate) fn copy_blocks_to(self, out: &mut [u8]) {
        assert_eq!(self.len_bytes, out.len(), "a copy needs equal lengths");
        let (blocks, rest) = out.as_chunks_mut::<BLOCK_BYTES>();
        assert!(rest.is_empty(), "{} bytes are not whole blocks", self.len_bytes);
        for (index, block) in blocks.iter_mut().enumerate() {
            // SAFETY: the lengths are equal, so the source has a block for each one of `out`.
            *block = unsafe { load_block(self.start.wrapping_add(index * BLOCK_BYTES)) };
        }
    }
}

/// The size of an AES block, and of the largest load that is atomic on every CPU with fast AES.
const BLOCK_BYTES: usize = 16;

/// Loads a block by one instruction.
///
/// # Safety
///
/// 16 bytes are readable at `from`.
unsafe fn load_block(from: *const u8) -> [u8; BLOCK_BYTES] {
    #[cfg(target_arch = "x86_64")]
    {
        let block: core::arch::x86_64::__m128i;
        // SAFETY: by the contract; every x86-64 has SSE2. Assembly, because the compiler may split a load of its own.
        unsafe {
            core::arch::asm!("movdqu {block}, [{from}]", block = out(xmm_reg) block, from = in(reg) from,
                options(nostack, readonly, preserves_flags));
        }
        // SAFETY: both are 16 bytes without rules.
        unsafe { std::mem::transmute(block) }
    }
    #[cfg(target_arch = "aarch64")]
    {
        let block: core::arch::aarch64::uint8x16_t;
        // SAFETY: by the contract; every AArch64 has these registers. Assembly, because the compiler may split a load of its
        // own.
        unsafe {
            core::arch::asm!("ldr {block:q}, [{from}]", block = out(vreg) block, from = in(reg) from,
                options(nostack, readonly, preserves_flags));
        }
        // SAFETY: both are 16 bytes without rules.
        unsafe { std::mem::transmute(block) }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    // SAFETY: by the contract.
    unsafe {
        from.cast::<[u8; BLOCK_BYTES]>().read_unaligned()
    }
}

/// Stores a block by one instruction.
///
/// # Safety
///
/// 16 bytes are writable at `to`.
unsafe fn store_block(to: *mut u8, block: [u8; BLOCK_BYTES]) {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: both are 16 bytes without rules.
        let block: core::arch::x86_64::__m128i = unsafe { std::mem::transmute(block) };
        // SAFETY: by the contract; every x86-64 has SSE2. Assembly, because the compiler may split a store of its own.
        unsafe {
            core::arch::asm!("movdqu [{to}], {block}", block = in(xmm_reg) block, to = in(reg) to,
                options(nostack, preserves_flags));
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        // SAFETY: both are 16 bytes without rules.
        let block: core::arch::aarch64::uint8x16_t = unsafe { std::mem::transmute(block) };
        // SAFETY: by the contract; every AArch64 has these registers. Assembly, because the compiler may split a store of
        // its own.
        unsafe {
            core::arch::asm!("str {block:q}, [{to}]", block = in(vreg) block, to = in(reg) to,
                options(nostack, preserves_flags));
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    // SAFETY: by the contract.
    unsafe {
        to.cast::<[u8; BLOCK_BYTES]>().write_unaligned(block);
    }
}

/// Writable bytes at an address, valid for `'a`, which others may read and change meanwhile.
#[derive(Debug)]
pub struct Target<'a> {
    start: *mut u8,
    len_bytes: usize,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: the constructor's contract is that the range stays writable for 'a from every thread.
unsafe impl Send for Target<'_> {}

impl<'a> Target<'a> {
    /// Wraps `len_bytes` readable and writable bytes at `start`.
    ///
    /// # Safety
    ///
    /// - `start..start + len_bytes` is readable and writable during `'a`, from any thread.
    /// - Concurrent users, if there are any, use raw pointers as well (see [`Source::from_raw`]): neither `&` nor `&mut`
    ///   to these bytes exists during `'a`.
    #[must_use]
    pub const unsafe fn from_raw(start: *mut u8, len_bytes: usize) -> Self {
        Self { start, len_bytes, lifetime: PhantomData }
    }

    /// Wraps a slice.
    #[must_use]
    pub const fn from_slice(bytes: &'a mut [u8]) -> Self {
        Self { start: bytes.as_mut_ptr(), len_bytes: bytes.len(), lifetime: PhantomData }
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether there are no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The address of the first byte.
    #[must_use]
    pub const fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start
    }

    /// The same bytes for a shorter time, so that a function can be given a `Target` and the caller keeps its own.
    #[must_use]
    pub const fn reborrow(&mut self) -> Target<'_> {
        Target { start: self.start, len_bytes: self.len_bytes, lifetime: PhantomData }
    }

    /// The bytes for reading.
    #[must_use]
    pub const fn as_source(&self) -> Source<'_> {
        Source { start: self.start, len_bytes: self.len_bytes, lifetime: PhantomData }
    }

    /// The bytes for reading and for writing at once, for an operation in place on one thread.
    pub(crate) const fn in_place(&mut self) -> (Source<'_>, Target<'_>) {
        (
            Source { start: self.start, len_bytes: self.len_bytes, lifetime: PhantomData },
            Target { start: self.start, len_bytes: self.len_bytes, lifetime: PhantomData },
        )
    }

    /// The bytes at `range`.
    ///
    /// # Panics
    ///
    /// Panics when `range` is not within the bytes.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        check_range(&range, self.len_bytes);
        // SAFETY: the range was checked, so the address is within (or one past) the bytes.
        let start = unsafe { self.start.add(range.start) };
        Self { start, len_bytes: range.len(), lifetime: PhantomData }
    }

    /// The first `mid` bytes and the rest.
    ///
    /// # Panics
    ///
    /// Panics when there are fewer than `mid` bytes.
    #[must_use]
    pub fn split_at(self, mid: usize) -> (Self, Self) {
        check_range(&(0..mid), self.len_bytes);
        // SAFETY: `mid` was checked against the length.
        let second = unsafe { self.start.add(mid) };
        (
            Self { start: self.start, len_bytes: mid, lifetime: PhantomData },
            Self { start: second, len_bytes: self.len_bytes - mid, lifetime: PhantomData },
        )
    }

    /// Copies whole 16-byte blocks from `bytes`, each by one store: whoever reads a block at a multiple of 16 meanwhile, and
    /// the medium after a crash, has the old one or the new one.
    ///
    /// # Panics
    ///
    /// Panics when the lengths differ or are not a multiple of 16.
    pub(crate) fn copy_blocks_from(&mut self, bytes: &[u8]) {
        assert_eq!(self.len_bytes, bytes.len(), "a copy needs equal lengths");
        let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
        assert!(rest.is_empty(), "{} bytes are not whole blocks", self.len_bytes);
        for (index, block) in blocks.iter().enumerate() {
            // SAFETY: the lengths are equal, so the target has room for each block of `bytes`.
            unsafe { store_block(self.start.wrapping_add(index * BLOCK_BYTES), *block) };
        }
    }

    /// Copies `bytes` over all bytes.
    ///
    /// # Panics
    ///
    /// Panics when the lengths differ.
    pub fn copy_from(&mut self, bytes: &[u8]) {
        assert_eq!(self.len_bytes, bytes.len(), "a copy needs equal lengths");
        // SAFETY: both ranges are valid for the length; no reference to the target's bytes exists, so they are disjoint.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start, bytes.len()) };
    }

    /// Sets all bytes to `value`.
    pub fn fill(&mut self, value: u8) {
        // SAFETY: the range is writable for the length.
        unsafe { ptr::write_bytes(self.start, value, self.len_bytes) };
    }
}

fn check_range(range: &Range<usize>, len_bytes: usize) {
    assert!(
        range.start <= range.end && range.end <= len_bytes,
        "range {}..{} is outside of {len_bytes} bytes",
        range.start,
        range.end
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_reach_exactly_the_range() {
        let mut bytes = [0_u8; 8];
        Target::from_slice(&mut bytes).slice(2..5).copy_from(b"abc");
        assert_eq!(&bytes, b"\0\0abc\0\0\0");
        let mut out = [0_u8; 2];
        Source::from_slice(&bytes).slice(3..5).copy_to(&mut out);
        assert_eq!(&out, b"bc");
    }

    #[test]
    fn blocks_are_copied_whole() {
        let bytes: Vec<u8> = (0..=255).collect();
        for start in [0, 1, 15] {
            let mut out = [0; 64];
            Source::from_slice(&bytes).slice(start..start + 64).copy_blocks_to(&mut out);
            assert_eq!(out, bytes[start..start + 64]);
            let mut back = [0; 96];
            Target::from_slice(&mut back).slice(start..start + 64).copy_blocks_from(&out);
            assert_eq!(back[start..start + 64], out);
            assert!(back[..start].iter().chain(&back[start + 64..]).all(|&byte| byte == 0));
        }
    }

    #[test]
    #[should_panic(expected = "17 bytes are not whole blocks")]
    fn a_copy_of_a_part_of_a_block_panics() {
        Source::from_slice(&[0; 17]).copy_blocks_to(&mut [0; 17]);
    }

    #[test]
    fn split_parts_are_disjoint_and_complete() {
        let mut bytes = [0_u8; 8];
        let (mut head, mut tail) = Target::from_slice(&mut bytes).split_at(3);
        head.fill(1);
        tail.fill(2);
        assert_eq!(bytes, [1, 1, 1, 2, 2, 2, 2, 2]);
    }

    #[test]
    #[should_panic(expected = "range 4..9 is outside of 8 bytes")]
    fn a_range_past_the_end_panics() {
        let _ = Source::from_slice(&[0; 8]).slice(4..9);
    }

    #[test]
    #[should_panic(expected = "equal lengths")]
    fn a_copy_of_another_length_panics() {
        Source::from_slice(&[0; 8]).copy_to(&mut [0; 7]);
    }
}
