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
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::error::VolumeError;
use crate::memory::{Source, Store, Target};
use crate::namespace::Geometry;
use crate::pmem::{Backing, BackingExtent, Granularity, MediaError};
use crate::secret;
use crate::xts::{BLOCK_BYTES as BLOCK_LEN, Backend, DataUnit, Span, XtsKey};

/// Bytes of an AES block as an offset: the smallest piece of ciphertext that can be rewritten alone.
pub(crate) const BLOCK_BYTES: u64 = BLOCK_LEN as u64;

/// Shorter stores than this stay in the cache: a line or two is cheaper to write back than to bypass.
const NON_TEMPORAL_BYTES_MIN: usize = 1024;

/// Bytes of a cache line, which have a kernel of their own.
const LINE_BYTES: usize = 64;

/// How much ciphertext is copied out at a time where holes may be: a data unit at most fits, and the stack bears it.
const HOLE_PIECE_BYTES: usize = 4096;

/// A pattern of zeroes to encrypt from; a multiple of both data units.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Ciphertext of one key on one backing.
#[derive(Debug)]
pub(crate) struct DataArea {
    backing: Arc<Backing>,
    geometry: Geometry,
    unit: DataUnit,
    backend: Backend,
    /// `None` when the volume is locked. Whoever reads it holds some range of the volume's range lock, and whoever takes it
    /// holds all of it, so that nobody ever waits here.
    key: RwLock<Option<XtsKey>>,
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
        Self { backing, geometry, unit, backend: key.backend(), key: RwLock::new(Some(key)), holes }
    }

    pub(crate) fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    pub(crate) const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(crate) const fn backend(&self) -> Backend {
        self.backend
    }

    /// Wipes the key. Everything that needs it fails from now on.
    pub(crate) fn forget_key(&self) {
        self.key.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn key(&self) -> RwLockReadGuard<'_, Option<XtsKey>> {
        self.key.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) const fn holes(&self) -> bool {
        self.holes
    }

    /// Decrypts the blocks at logical `offset` to `out`; both are multiples of 16 bytes, checked to be in range.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`]; `out` may then hold anything that was read before, so the caller
    /// must not pass it on.
    pub(crate) fn read(&self, offset: u64, out: Target<'_>) -> Result<(), VolumeError> {
        let len_bytes = out.len();
        let range = self.physical(offset, len_bytes as u64);
        let key = self.key();
        let key = key.as_ref().ok_or(VolumeError::Locked)?;
        let read = self.backing.read(range, |ciphertext| {
            if self.holes {
                self.decrypt_around_holes(key, offset, ciphertext, out);
            } else {
                key.decrypt(self.span(offset), ciphertext, out);
            }
        });
        if scrubs(len_bytes) {
            secret::scrub_stack();
        }
        Ok(read?)
    }

    /// Decrypts from a copy, piece by piece: a block that is written meanwhile must be the same for the decryption and
    /// for the question whether it is a hole.
    fn decrypt_around_holes(&self, key: &XtsKey, offset: u64, ciphertext: Source<'_>, out: Target<'_>) {
        let mut copy = [0; HOLE_PIECE_BYTES];
        let mut rest = out;
        for start in (0..ciphertext.len()).step_by(HOLE_PIECE_BYTES) {
            let end = ciphertext.len().min(start + HOLE_PIECE_BYTES);
            let piece = &mut copy[..end - start];
            ciphertext.slice(start..end).copy_to(piece);
            let (mut plaintext, tail) = rest.split_at(end - start);
            key.decrypt(self.span(offset + start as u64), Source::from_slice(piece), plaintext.reborrow());
            zero_holes(piece, plaintext);
            rest = tail;
        }
    }

    /// Encrypts `plaintext` over the blocks at logical `offset`; both are multiples of 16 bytes, checked to be in range.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`]; the blocks then hold old or new ciphertext, each.
    pub(crate) fn write(&self, offset: u64, plaintext: Source<'_>) -> Result<(), VolumeError> {
        let len_bytes = plaintext.len();
        let range = self.physical(offset, len_bytes as u64);
        let store = if len_bytes >= NON_TEMPORAL_BYTES_MIN { Store::NonTemporal } else { Store::Cached };
        let span = self.span(offset);
        let key = self.key();
        let key = key.as_ref().ok_or(VolumeError::Locked)?;
        let encrypt = |ciphertext: Target<'_>| key.encrypt(span, plaintext, ciphertext, store);
        let written = match self.backing.granularity() {
            Granularity::Page => self.backing.write(range, encrypt),
            // Not every backend has non-temporal stores, and none uses them at ragged ends. Writing back a line that is
            // not in the cache costs little; believing that it is on media when it is not costs the data.
            Granularity::CacheLine => self.backing.write_through(range, encrypt),
        };
        if scrubs(len_bytes) {
            secret::scrub_stack();
        }
        Ok(written?)
    }

    /// Encrypts zeroes over the blocks of logical `range`.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub(crate) fn write_zeroes(&self, range: Range<u64>) -> Result<(), VolumeError> {
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
            // Writes are durable already; holes that were punched are metadata, which only a sync makes so.
            Granularity::CacheLine => self.backing.sync_all(),
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

/// Whether a kernel for so many bytes has a stack frame that is worth overwriting: a cache line stays in registers.
const fn scrubs(len_bytes: usize) -> bool {
    len_bytes > LINE_BYTES
}

/// Zeroes the plaintext of every block whose ciphertext is all zero bytes.
fn zero_holes(ciphertext: &[u8], plaintext: Target<'_>) {
    let mut rest = plaintext;
    for block in ciphertext.chunks_exact(BLOCK_LEN) {
        let (mut head, tail) = rest.split_at(BLOCK_LEN);
        if block.iter().all(|&byte| byte == 0) {
            head.fill(0);
        }
        rest = tail;
    }
}
