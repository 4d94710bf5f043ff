//! One key over one layout: whole 16-byte blocks between ciphertext on media and plaintext in memory.
//!
//! A volume has one side, and two while it is being re-keyed. Ciphertext is stored straight to media in pieces of at least
//! 16 bytes, so that a torn store leaves every block old or new. Nothing here is ordered or made durable.

use std::ops::Range;

use crate::memory::{Source, Store, Target};
use crate::namespace::Layout;
use crate::pmem::{Backing, MediaError};
use crate::secret::{self, VolumeKey};
use crate::xts::{BLOCK_BYTES as BLOCK_LEN, Backend, DataUnit, Span, XtsKey};

/// Shorter stores than this stay in the cache: a line or two is cheaper to write back than to bypass.
const NON_TEMPORAL_BYTES_MIN: usize = 1024;

/// How much ciphertext is copied out at a time where holes may be: a data unit at most fits, and the stack bears it.
const HOLE_PIECE_BYTES: usize = 4096;

/// Where data lies and under which key.
#[derive(Debug)]
pub(crate) struct Side {
    layout: Layout,
    unit: DataUnit,
    key: XtsKey,
}

impl Side {
    /// Expands the key.
    pub(crate) fn new(layout: Layout, key: &VolumeKey, backend: Backend) -> Self {
        let unit = DataUnit::from_len_bytes(u64::from(layout.unit().bytes())).expect("both layers know the same units");
        Self { layout, unit, key: secret::with_wiped_stack(|| XtsKey::new(key, backend)) }
    }

    pub(crate) const fn key(&self) -> &XtsKey {
        &self.key
    }

    pub(crate) const fn data_start(&self) -> u64 {
        self.layout.data_start()
    }

    /// The bytes of the backing that hold logical `range`, which is checked to be in range.
    pub(crate) fn physical(&self, range: Range<u64>) -> Range<u64> {
        self.layout.physical_range(range).expect("the volume checks the range")
    }

    /// Decrypts what the backing holds for the blocks at logical `offset`. With `holes`, all-zero blocks give zeroes.
    pub(crate) fn read(&self, backing: &Backing, holes: bool, offset: u64, out: Target<'_>) -> Result<(), MediaError> {
        let range = self.physical(offset..offset + out.len() as u64);
        backing.read(range, |ciphertext| {
            if holes {
                self.decrypt_around_holes(offset, ciphertext, out);
            } else {
                self.decrypt(offset, ciphertext, out);
            }
        })
    }

    /// [`Self::read`] by way of `scratch`, which is as long and ends as ciphertext: for pages that are not mapped yet.
    pub(crate) fn read_unmapped(
        &self,
        backing: &Backing,
        holes: bool,
        offset: u64,
        out: Target<'_>,
        scratch: &mut [u8],
    ) -> Result<(), MediaError> {
        let mut out = out;
        let range = self.physical(offset..offset + out.len() as u64);
        backing.read_bytes(range.start, scratch)?;
        self.decrypt(offset, Source::from_slice(scratch), out.reborrow());
        if holes {
            zero_holes(scratch, out);
        }
        Ok(())
    }

    /// Encrypts `plaintext` over the blocks at logical `offset`. Stores only: the caller makes them durable.
    pub(crate) fn store(&self, backing: &Backing, offset: u64, plaintext: Source<'_>) -> Result<(), MediaError> {
        let range = self.physical(offset..offset + plaintext.len() as u64);
        backing.write(range, |ciphertext| self.encrypt(offset, plaintext, ciphertext))
    }

    /// [`Self::store`] by way of `scratch`, which is as long and ends as ciphertext: for pages that are not mapped yet.
    pub(crate) fn store_unmapped(
        &self,
        backing: &Backing,
        offset: u64,
        plaintext: Source<'_>,
        scratch: &mut [u8],
    ) -> Result<(), MediaError> {
        let range = self.physical(offset..offset + plaintext.len() as u64);
        self.key.encrypt(self.span(offset), plaintext, Target::from_slice(scratch), Store::Cached);
        backing.write_bytes(range.start, scratch)
    }

    /// [`Self::store`], and makes it durable.
    #[inline]
    pub(crate) fn store_through(
        &self,
        backing: &Backing,
        offset: u64,
        plaintext: Source<'_>,
    ) -> Result<(), MediaError> {
        let range = self.physical(offset..offset + plaintext.len() as u64);
        backing.write_through(range, |ciphertext| self.encrypt(offset, plaintext, ciphertext))
    }

    #[inline]
    fn encrypt(&self, offset: u64, plaintext: Source<'_>, ciphertext: Target<'_>) {
        let store = if plaintext.len() >= NON_TEMPORAL_BYTES_MIN { Store::NonTemporal } else { Store::Cached };
        self.key.encrypt(self.span(offset), plaintext, ciphertext, store);
    }

    /// Decrypts the blocks of logical `offset` from memory to memory.
    pub(crate) fn decrypt(&self, offset: u64, ciphertext: Source<'_>, out: Target<'_>) {
        self.key.decrypt(self.span(offset), ciphertext, out);
    }

    /// Encrypts the blocks of logical `offset` where they are.
    pub(crate) fn encrypt_in_place(&self, offset: u64, blocks: Target<'_>) {
        self.key.encrypt_in_place(self.span(offset), blocks);
    }

    /// Decrypts from a copy, piece by piece: a block that is written meanwhile must be the same for the decryption and
    /// for the question whether it is a hole, and no mixture, which would decrypt to noise.
    fn decrypt_around_holes(&self, offset: u64, ciphertext: Source<'_>, out: Target<'_>) {
        let mut copy = [0; HOLE_PIECE_BYTES];
        let mut rest = out;
        for start in (0..ciphertext.len()).step_by(HOLE_PIECE_BYTES) {
            let end = ciphertext.len().min(start + HOLE_PIECE_BYTES);
            let piece = &mut copy[..end - start];
            ciphertext.slice(start..end).copy_blocks_to(piece);
            let (mut plaintext, tail) = rest.split_at(end - start);
            self.decrypt(offset + start as u64, Source::from_slice(piece), plaintext.reborrow());
            zero_holes(piece, plaintext);
            rest = tail;
        }
    }

    fn span(&self, offset: u64) -> Span {
        let skip = offset % self.unit.len_bytes() as u64;
        Span {
            unit: self.unit,
            tweak: self.layout.tweak_at(offset).value(),
            skip_bytes: usize::try_from(skip).expect("less than a unit"),
        }
    }
}

/// Zeroes every block of `blocks` whose ciphertext is all zero bytes: a hole.
pub(crate) fn zero_holes(ciphertext: &[u8], blocks: Target<'_>) {
    let mut rest = blocks;
    for block in ciphertext.chunks_exact(BLOCK_LEN) {
        let (mut head, tail) = rest.split_at(BLOCK_LEN);
        if block.iter().all(|&byte| byte == 0) {
            head.fill(0);
        }
        rest = tail;
    }
}
