//! The data area under one key: whole 16-byte blocks between ciphertext on media and plaintext in memory.
//!
//! Everything here is aligned to blocks and ordered by nobody: byte granularity and locking are the volume's part.
//! Ciphertext is stored straight to media in pieces of at least 16 bytes, so that a torn store leaves every block old
//! or new; under cache-line granularity it is also flushed there (write-through), so that [`DataArea::sync`] has little
//! left to do.
//!
//! With discards, a block whose ciphertext is all zero bytes stands for a hole and reads as zeroes. Real data looks so
//! with a probability of 2^-128 a block, and no other place can forget which units are holes.

use std::ops::Range;
use std::sync::Arc;

use crate::memory::{Source, Store, Target};
use crate::namespace::Geometry;
use crate::pmem::{Backing, BackingExtent, Granularity, MediaError};
use crate::xts::{BLOCK_BYTES as BLOCK_LEN, DataUnit, Span, XtsKey};

/// Bytes of an AES block as an offset: the smallest piece of ciphertext that can be rewritten alone.
pub(crate) const BLOCK_BYTES: u64 = BLOCK_LEN as u64;

/// Shorter stores than this stay in the cache: a line or two is cheaper to write back than to bypass.
const NON_TEMPORAL_BYTES_MIN: usize = 1024;

/// A pattern of zeroes to encrypt from; a multiple of both data units.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Ciphertext of one key on one backing.
#[derive(Debug)]
pub(crate) struct DataArea {
    backing: Arc<Backing>,
    geometry: Geometry,
    unit: DataUnit,
    key: XtsKey,
    /// Whether all-zero ciphertext blocks are holes.
    holes: bool,
}

impl DataArea {
    /// Joins what is on media with the expanded key.
    pub(crate) const fn new(
        backing: Arc<Backing>,
        geometry: Geometry,
        unit: DataUnit,
        key: XtsKey,
        holes: bool,
    ) -> Self {
        Self { backing, geometry, unit, key, holes }
    }

    pub(crate) fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    pub(crate) const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(crate) const fn key(&self) -> &XtsKey {
        &self.key
    }

    pub(crate) const fn holes(&self) -> bool {
        self.holes
    }

    /// Decrypts the blocks at logical `offset` to `out`; both are multiples of 16 bytes, checked to be in range.
    ///
    /// # Errors
    ///
    /// What the medium says; `out` may then hold anything that was read before, so the caller must not pass it on.
    pub(crate) fn read(&self, offset: u64, mut out: Target<'_>) -> Result<(), MediaError> {
        let span = self.span(offset);
        self.backing.read(self.physical(offset, out.len() as u64), |ciphertext| {
            self.key.decrypt(span, ciphertext, out.reborrow());
            if self.holes {
                zero_holes(ciphertext, out);
            }
        })
    }

    /// Encrypts `plaintext` over the blocks at logical `offset`; both are multiples of 16 bytes, checked to be in range.
    ///
    /// # Errors
    ///
    /// What the medium says; the blocks then hold old or new ciphertext, each.
    pub(crate) fn write(&self, offset: u64, plaintext: Source<'_>) -> Result<(), MediaError> {
        let len_bytes = plaintext.len();
        let range = self.physical(offset, len_bytes as u64);
        let store = if len_bytes >= NON_TEMPORAL_BYTES_MIN { Store::NonTemporal } else { Store::Cached };
        let span = self.span(offset);
        self.backing.write(range.clone(), |ciphertext| self.key.encrypt(span, plaintext, ciphertext, store))?;
        match self.backing.granularity() {
            Granularity::Page => Ok(()),
            // Not every backend has non-temporal stores, and none uses them at ragged ends. Writing back a line that is
            // not in the cache costs little; believing that it is on media when it is not costs the data.
            Granularity::CacheLine => self.backing.persist(range),
        }
    }

    /// Encrypts zeroes over the blocks of logical `range`.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub(crate) fn write_zeroes(&self, range: Range<u64>) -> Result<(), MediaError> {
        let mut offset = range.start;
        while offset < range.end {
            let len_bytes = (range.end - offset).min(ZEROES.len() as u64);
            let len = usize::try_from(len_bytes).expect("at most the pattern's length");
            self.write(offset, Source::from_slice(&ZEROES[..len]))?;
            offset += len_bytes;
        }
        Ok(())
    }

    /// Punches the ciphertext of logical `range`, which is made of whole units.
    ///
    /// # Errors
    ///
    /// What the medium says, [`MediaError::Unsupported`] included.
    pub(crate) fn punch(&self, range: Range<u64>) -> Result<(), MediaError> {
        debug_assert!(self.holes, "without the flag a hole would read as noise");
        self.backing.punch_hole(self.physical(range.start, range.end - range.start))
    }

    /// Where the backing has blocks and where not, in logical `range`: runs in order.
    ///
    /// # Errors
    ///
    /// What the medium says.
    pub(crate) fn extents(&self, range: Range<u64>) -> Result<Vec<BackingExtent>, MediaError> {
        self.backing.extents(self.physical(range.start, range.end - range.start))
    }

    /// Makes what was written to logical `range` durable.
    ///
    /// # Errors
    ///
    /// What the medium says; the backing is then poisoned until it is reopened.
    pub(crate) fn persist(&self, range: Range<u64>) -> Result<(), MediaError> {
        match self.backing.granularity() {
            Granularity::CacheLine => self.backing.drain(),
            Granularity::Page => self.backing.persist(self.physical(range.start, range.end - range.start)),
        }
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    ///
    /// As [`Self::persist`].
    pub(crate) fn sync(&self) -> Result<(), MediaError> {
        self.backing.sync_all()
    }

    fn span(&self, offset: u64) -> Span {
        let skip = offset % self.unit.len_bytes() as u64;
        Span {
            unit: self.unit,
            tweak: self.geometry.tweak_at(offset).value(),
            skip_bytes: usize::try_from(skip).expect("less than a unit"),
        }
    }

    fn physical(&self, offset: u64, len_bytes: u64) -> Range<u64> {
        let end = offset.checked_add(len_bytes).expect("the volume checks the range");
        self.geometry.physical_range(offset..end).expect("the volume checks the range")
    }
}

/// Zeroes the plaintext of every block whose ciphertext is all zero bytes.
fn zero_holes(ciphertext: Source<'_>, plaintext: Target<'_>) {
    let mut rest = plaintext;
    let mut block = [0; BLOCK_LEN];
    for start in (0..ciphertext.len()).step_by(BLOCK_LEN) {
        ciphertext.slice(start..start + BLOCK_LEN).copy_to(&mut block);
        let (mut head, tail) = rest.split_at(BLOCK_LEN);
        if u128::from_le_bytes(block) == 0 {
            head.fill(0);
        }
        rest = tail;
    }
}
