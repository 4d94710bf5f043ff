//! AES-XTS (IEEE 1619) over runs of 16-byte blocks, from one place in memory to another.
//!
//! A [`Span`] says where a run lies among data units; [`XtsKey`] encrypts or decrypts the run in one call, whole units
//! and parts of units alike. A unit's tweak is its tweak value as 16 little-endian bytes (dm-crypt's plain64); block `j`
//! of the unit is whitened with E(tweak) * alpha^j.
//!
//! Invariants: source and destination are the same range or disjoint, and whole blocks (asserted); no branch and no
//! table index in any backend depends on a key, a tweak's encryption or data. The [`Backend`] is chosen once, is proof
//! that the CPU can run it, and gives the same bytes whichever it is: the portable one is the specification.
//!
//! There is no ciphertext stealing, since units are whole blocks, and no knowledge of where a tweak value comes from.

mod backend;
pub mod bench;
mod dispatch;
mod portable;
mod tweak;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

use std::fmt;

use crate::memory::{Source, Store, Target};
use crate::secret::VolumeKey;

pub use backend::{Backend, BackendError};
use dispatch::Schedule;

/// Bytes in an AES block: the smallest piece of ciphertext.
pub const BLOCK_BYTES: usize = 16;

/// Bytes of a cache line, which a non-temporal store should fill whole.
const LINE_BYTES: usize = 64;

/// Bytes of physical offset per tweak value (dm-crypt counts in 512-byte sectors, whatever its `sector_size`).
const TWEAK_STEP_BYTES: usize = 512;

/// What one XTS tweak covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DataUnit {
    /// 512 bytes, the classic sector.
    Bytes512,
    /// 4096 bytes.
    #[default]
    Bytes4096,
}

impl DataUnit {
    /// The unit's size in bytes: 512 or 4096.
    #[must_use]
    pub const fn len_bytes(self) -> usize {
        match self {
            Self::Bytes512 => 512,
            Self::Bytes4096 => 4096,
        }
    }

    /// The unit of that many bytes, if there is one.
    #[must_use]
    pub const fn from_len_bytes(len_bytes: u64) -> Option<Self> {
        match len_bytes {
            512 => Some(Self::Bytes512),
            4096 => Some(Self::Bytes4096),
            _ => None,
        }
    }

    /// By how much the tweak value grows from one unit to the next.
    const fn tweak_step(self) -> u64 {
        (self.len_bytes() / TWEAK_STEP_BYTES) as u64
    }
}

/// Where a run of blocks lies among data units. Its length is that of the memory that it is used with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The data unit.
    pub unit: DataUnit,
    /// The tweak value of the unit that holds the run's first byte: its physical offset / 512. Every following unit
    /// adds unit / 512, wrapping at 2^64.
    pub tweak: u64,
    /// Where in that unit the run begins: a multiple of 16 below the unit's size.
    pub skip_bytes: usize,
}

/// Which way data goes through the cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Encrypt,
    Decrypt,
}

/// Blocks on their way through the cipher: from where, to where, which way.
struct Pass<'a> {
    direction: Direction,
    src: Source<'a>,
    dst: Target<'a>,
    store: Store,
}

impl Pass<'_> {
    /// The first `mid` bytes and the rest.
    fn split_at(self, mid: usize) -> (Self, Self) {
        let (head, tail) = self.dst.split_at(mid);
        let (direction, store) = (self.direction, self.store);
        (
            Self { direction, src: self.src.slice(0..mid), dst: head, store },
            Self { direction, src: self.src.slice(mid..self.src.len()), dst: tail, store },
        )
    }
}

/// A volume key expanded for one backend.
pub struct XtsKey {
    backend: Backend,
    schedule: Schedule,
}

impl XtsKey {
    /// Expands `key` for `backend`.
    ///
    /// # Panics
    ///
    /// Panics when memory is exhausted.
    #[must_use]
    pub fn new(key: &VolumeKey, backend: Backend) -> Self {
        Self::from_halves(key.data_half(), key.tweak_half(), backend)
    }

    /// [`Self::new`] without the promise that the halves differ.
    fn from_halves(data: &[u8], tweak: &[u8], backend: Backend) -> Self {
        Self { backend, schedule: Schedule::new(data, tweak, backend) }
    }

    /// The backend that the key was expanded for.
    #[must_use]
    pub const fn backend(&self) -> Backend {
        self.backend
    }

    /// Encrypts the run `span` from `src` to `dst`, storing as `store` says.
    ///
    /// `src` and `dst` are the same range or disjoint. With [`Store::NonTemporal`] units that lie at a multiple of 64 in
    /// `dst` bypass the cache, except with the portable backend, and the call ends with a store fence; parts of units at
    /// the ends may go through the cache.
    ///
    /// # Panics
    ///
    /// Panics when the lengths differ or are not a multiple of 16, when the ranges overlap in part, or when
    /// `span.skip_bytes` is not a multiple of 16 below the unit's size.
    pub fn encrypt(&self, span: Span, src: Source<'_>, dst: Target<'_>, store: Store) {
        self.run(Direction::Encrypt, span, src, dst, store);
    }

    /// Decrypts the run `span` from `src` to `dst`, which are the same range or disjoint.
    ///
    /// # Panics
    ///
    /// As [`Self::encrypt`].
    pub fn decrypt(&self, span: Span, src: Source<'_>, dst: Target<'_>) {
        self.run(Direction::Decrypt, span, src, dst, Store::Cached);
    }

    /// Encrypts the run `span` where it is, with ordinary stores.
    ///
    /// # Panics
    ///
    /// Panics when the length is not a multiple of 16 or `span.skip_bytes` is not a multiple of 16 below the unit's
    /// size.
    pub fn encrypt_in_place(&self, span: Span, mut buf: Target<'_>) {
        let (src, dst) = buf.in_place();
        self.run(Direction::Encrypt, span, src, dst, Store::Cached);
    }

    /// Decrypts the run `span` where it is.
    ///
    /// # Panics
    ///
    /// As [`Self::encrypt_in_place`].
    pub fn decrypt_in_place(&self, span: Span, mut buf: Target<'_>) {
        let (src, dst) = buf.in_place();
        self.run(Direction::Decrypt, span, src, dst, Store::Cached);
    }

    #[inline]
    fn run(&self, direction: Direction, span: Span, src: Source<'_>, dst: Target<'_>, store: Store) {
        let len_bytes = check_run(&span, src, &dst);
        let within_unit = len_bytes <= span.unit.len_bytes() - span.skip_bytes;
        if within_unit && len_bytes <= LINE_BYTES && len_bytes > 0 && store == Store::Cached {
            self.schedule.line(direction, span.tweak, span.skip_bytes / BLOCK_BYTES, src, dst);
        } else {
            self.run_units(span, Pass { direction, src, dst, store });
        }
    }

    /// Splits the run into the rest of a unit that it begins in, whole units, and the beginning of a last unit.
    #[inline(never)] // so that the way to a single line is short
    fn run_units(&self, span: Span, pass: Pass<'_>) {
        let (unit_bytes, len_bytes) = (span.unit.len_bytes(), pass.src.len());
        let head_bytes = if span.skip_bytes == 0 { 0 } else { len_bytes.min(unit_bytes - span.skip_bytes) };
        let body_bytes = (len_bytes - head_bytes) / unit_bytes * unit_bytes;

        let mut tweak = span.tweak;
        let streams = pass.store == Store::NonTemporal;
        let mut rest = pass;
        if head_bytes > 0 {
            let (head, after) = rest.split_at(head_bytes);
            self.schedule.blocks(tweak.into(), span.skip_bytes / BLOCK_BYTES, head);
            tweak = tweak.wrapping_add(span.unit.tweak_step());
            rest = after;
        }
        if body_bytes > 0 {
            let (body, after) = rest.split_at(body_bytes);
            self.schedule.units(span.unit, tweak, body);
            let unit_count = (body_bytes / unit_bytes) as u64;
            tweak = tweak.wrapping_add(unit_count.wrapping_mul(span.unit.tweak_step()));
            rest = after;
        }
        if !rest.src.is_empty() {
            self.schedule.blocks(tweak.into(), 0, rest);
        }
        if streams {
            self.schedule.fence();
        }
    }
}

impl fmt::Debug for XtsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "XtsKey({})", self.backend)
    }
}

/// Asserts what [`XtsKey::encrypt`] demands and returns the length of the run in bytes.
fn check_run(span: &Span, src: Source<'_>, dst: &Target<'_>) -> usize {
    let len_bytes = src.len();
    assert_eq!(len_bytes, dst.len(), "source and destination of a run must have equal lengths");
    assert!(len_bytes.is_multiple_of(BLOCK_BYTES), "a run of {len_bytes} bytes is not whole 16-byte blocks");
    assert!(
        span.skip_bytes < span.unit.len_bytes() && span.skip_bytes.is_multiple_of(BLOCK_BYTES),
        "a run cannot begin {} bytes into a unit of {}",
        span.skip_bytes,
        span.unit.len_bytes()
    );
    let ahead = dst.as_source().as_ptr().addr().wrapping_sub(src.as_ptr().addr());
    let overlap = ahead < len_bytes || ahead.wrapping_neg() < len_bytes;
    assert!(!overlap || ahead == 0, "source and destination overlap in part");
    len_bytes
}
