//! The journal of a transform: how far it has come, and the ciphertext of the window that is being moved.
//!
//! ```text
//! offset  bytes  in the journal room, which begins 1 MiB behind the base
//!      0     96  record of even steps
//!   4096     96  record of odd steps
//!  65536         saved ciphertext, up to 960 KiB
//!
//! offset  bytes  a record, all numbers little-endian
//!      0      8  magic "DAXJRNL1"
//!      8     16  id of the transform
//!     24      8  step, counted from 0
//!     32      8  bytes of the data area that are done
//!     40      8  bytes of the window that is being moved, 0 between windows
//!     48      4  CRC-32 of the saved ciphertext, 0 between windows
//!     52     12  zero
//!     64     32  HMAC-SHA256 over the 64 bytes before
//! ```
//!
//! A record is overwritten only when the other one is newer and durable, so a crash at any store leaves the old state or
//! the new one. A record without a window goes to both places, one after the other, before anybody relies on it: were the
//! older one to be the record of the window, the loss of one sector would move that window once more, over what was written
//! to it since. The MAC key is derived from the new volume key: nothing that its holder did not write is acted on. This
//! layer orders nothing: the sequence of save, record and move is the engine's (`volume`).

use std::ops::Range;
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use uuid::Uuid;

use super::area::HeaderArea;
use super::error::UpdateError;
use super::kdf::{self, Key256};
use super::transform::{ID_BYTES, TransformError};
use crate::memory::Source;
use crate::pmem::{Backing, MediaError};
use crate::secret::VolumeKey;

/// Where the journal room begins, from the base of the namespace.
const ROOM_OFFSET: u64 = 1 << 20;
const ROOM_BYTES: u64 = 1 << 20;
/// Distance of the two records: no page and no sector holds both.
const RECORD_DISTANCE_BYTES: u64 = 4096;
/// The pages of both records.
const RECORDS_BYTES: u64 = 2 * RECORD_DISTANCE_BYTES;
const SAVED_OFFSET: u64 = 64 << 10;

/// Most bytes of ciphertext that a window may have.
pub const WINDOW_BYTES_MAX: u64 = ROOM_BYTES - SAVED_OFFSET;

const MAGIC: [u8; 8] = *b"DAXJRNL1";
const ID_OFFSET: usize = size_of_val(&MAGIC);
const STEP_OFFSET: usize = ID_OFFSET + ID_BYTES;
const DONE_OFFSET: usize = STEP_OFFSET + size_of::<u64>();
const WINDOW_OFFSET: usize = DONE_OFFSET + size_of::<u64>();
const CRC_OFFSET: usize = WINDOW_OFFSET + size_of::<u64>();
const MAC_OFFSET: usize = CRC_OFFSET + size_of::<u32>() + 12;
const RECORD_BYTES: usize = MAC_OFFSET + 32;

const _: () = assert!(MAC_OFFSET == 64 && RECORD_BYTES == 96);

/// How far a transform has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Grows with every record.
    pub step: u64,
    /// Bytes of the data area that are at their new place under the new key, counted from the end where it began.
    pub done_bytes: u64,
    /// Bytes of the window that is being moved, 0 between windows.
    pub window_bytes: u64,
    /// CRC-32 of the saved ciphertext of that window.
    pub saved_crc: u32,
}

impl Record {
    /// The state when the ciphertext `saved` of the next window is in the journal.
    #[must_use]
    pub fn moving(&self, saved: &[u8]) -> Self {
        let window_bytes = saved.len() as u64;
        Self { step: self.step + 1, done_bytes: self.done_bytes, window_bytes, saved_crc: crc32fast::hash(saved) }
    }

    /// The state when the next `bytes` bytes had no data to move.
    #[must_use]
    pub(super) const fn skipped(&self, bytes: u64) -> Self {
        Self { step: self.step + 1, done_bytes: self.done_bytes + bytes, ..*self }
    }

    /// The same state, for the place of the other record.
    #[must_use]
    const fn again(&self) -> Self {
        Self { step: self.step.saturating_add(1), ..*self }
    }

    /// Whether no window has begun to move.
    #[must_use]
    pub const fn is_untouched(&self) -> bool {
        self.done_bytes == 0 && self.window_bytes == 0
    }

    /// The state when the window has arrived.
    #[must_use]
    pub const fn moved(&self) -> Self {
        let done_bytes = self.done_bytes + self.window_bytes;
        Self { step: self.step + 1, done_bytes, window_bytes: 0, saved_crc: 0 }
    }
}

/// The journal room of one transform.
#[derive(Debug)]
pub struct Journal {
    backing: Arc<Backing>,
    start: u64,
    mac_key: Key256,
    id: [u8; ID_BYTES],
}

impl Journal {
    pub(super) fn new(area: &HeaderArea, new_key: &VolumeKey, uuid: Uuid, id: [u8; ID_BYTES]) -> Self {
        let mac_key = kdf::derive_key(uuid.as_bytes(), new_key.bytes(), b"daxcrypt v1 journal mac");
        Self { backing: Arc::clone(area.backing()), start: area.base() + ROOM_OFFSET, mac_key, id }
    }

    /// The newer of the genuine records.
    pub(super) fn read(&self, size_bytes: u64) -> Result<Record, TransformError> {
        let records = [self.read_record(0)?, self.read_record(1)?];
        let newest = records.into_iter().flatten().max_by_key(|record| record.step);
        newest.filter(|record| is_possible(record, size_bytes)).ok_or(TransformError::JournalLost)
    }

    fn read_record(&self, slot: u64) -> Result<Option<Record>, MediaError> {
        let start = self.record_start(slot);
        let mut bytes = [0; RECORD_BYTES];
        self.backing.read(start..start + RECORD_BYTES as u64, |source| source.copy_to(&mut bytes))?;
        Ok(self.decode(&bytes).filter(|record| record.step % 2 == slot))
    }

    /// The first state, in both places: nothing has moved.
    pub(super) fn begin(&self) -> Result<Record, MediaError> {
        self.write_twice(&Record::default())
    }

    /// Makes `record` the state: durable when this returns.
    ///
    /// # Errors
    ///
    /// What the medium says; which of the two states a crash would leave is then unknown.
    pub(super) fn write(&self, record: &Record) -> Result<(), MediaError> {
        self.store(self.record_start(record.step % 2), &self.encode(record))
    }

    /// Makes `record`, which has no window, the state in both places, and gives the newer of the two.
    pub(super) fn write_twice(&self, record: &Record) -> Result<Record, MediaError> {
        self.write(record)?;
        let again = record.again();
        self.write(&again)?;
        Ok(again)
    }

    /// Refuses when the state on media is another one than `record`, which was read or written here last.
    pub(super) fn check(&self, record: &Record, size_bytes: u64) -> Result<(), TransformError> {
        if self.read(size_bytes)? == *record { Ok(()) } else { Err(UpdateError::Changed.into()) }
    }

    /// Makes durable what [`Self::read`] has found, and gives the state from then on. Everything is stored again, since a
    /// store whose flush failed is seen without being on media.
    pub(super) fn confirm(&self, record: &Record) -> Result<Record, TransformError> {
        if record.window_bytes == 0 {
            return Ok(self.confirm_between_windows(record)?);
        }
        match self.saved(record) {
            Ok(saved) => self.save(&saved)?,
            // The window is lost; who opens the volume says so, and reads the rest.
            Err(TransformError::SavedWindow { .. }) => {}
            Err(error) => return Err(error),
        }
        self.write(record)?;
        Ok(*record)
    }

    /// Writes both records again, or the second one for the first time.
    fn confirm_between_windows(&self, record: &Record) -> Result<Record, MediaError> {
        let other = self.read_record((record.step + 1) % 2)?;
        match other.filter(|other| other.again() == *record) {
            Some(other) => {
                self.write(record)?;
                self.write(&other)?;
                Ok(*record)
            }
            None => self.write_twice(record),
        }
    }

    /// Saves the ciphertext of a window: durable when this returns, and of no account before a record tells of it.
    ///
    /// # Errors
    ///
    /// What the medium says.
    ///
    /// # Panics
    ///
    /// Panics for more than [`WINDOW_BYTES_MAX`] bytes.
    pub fn save(&self, ciphertext: &[u8]) -> Result<(), MediaError> {
        assert!(ciphertext.len() as u64 <= WINDOW_BYTES_MAX, "a window of {} bytes", ciphertext.len());
        self.store(self.start + SAVED_OFFSET, ciphertext)
    }

    /// The saved ciphertext of the window of `record`.
    ///
    /// # Errors
    ///
    /// [`TransformError::SavedWindow`] when it is not what was saved, and what the medium says.
    pub fn saved(&self, record: &Record) -> Result<Vec<u8>, TransformError> {
        let start = self.start + SAVED_OFFSET;
        let read = self.backing.read(start..start + record.window_bytes, |source: Source<'_>| {
            let mut saved = vec![0; source.len()];
            source.copy_to(&mut saved);
            saved
        });
        let saved = read?;
        let (stored, computed) = (record.saved_crc, crc32fast::hash(&saved));
        if stored == computed { Ok(saved) } else { Err(TransformError::SavedWindow { stored, computed }) }
    }

    /// Overwrites the saved ciphertext of windows, which is under the old key, with zeros, durably. It is of no account
    /// between windows. Comes before the header forgets the transform: who finds one does this again, however it failed.
    pub(super) fn clear_saved(&self) -> Result<(), MediaError> {
        self.backing.check_flushes()?;
        clear(&self.backing, self.start + SAVED_OFFSET..self.start + ROOM_BYTES)
    }

    /// Overwrites the records with zeros, durably. The header does not tell of the transform any more.
    pub(super) fn clear_records(&self) -> Result<(), MediaError> {
        clear(&self.backing, self.start..self.start + RECORDS_BYTES)
    }

    fn store(&self, start: u64, bytes: &[u8]) -> Result<(), MediaError> {
        self.backing.check_flushes()?;
        let range = start..start + bytes.len() as u64;
        self.backing.write(range.clone(), |mut target| target.copy_from(bytes))?;
        self.backing.persist(range)
    }

    const fn record_start(&self, slot: u64) -> u64 {
        self.start + slot * RECORD_DISTANCE_BYTES
    }

    fn encode(&self, record: &Record) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(ID_OFFSET, &self.id);
        put(STEP_OFFSET, &record.step.to_le_bytes());
        put(DONE_OFFSET, &record.done_bytes.to_le_bytes());
        put(WINDOW_OFFSET, &record.window_bytes.to_le_bytes());
        put(CRC_OFFSET, &record.saved_crc.to_le_bytes());
        let mac: [u8; 32] = self.mac(&bytes[..MAC_OFFSET]).finalize().into_bytes().into();
        bytes[MAC_OFFSET..].copy_from_slice(&mac);
        bytes
    }

    /// The record, when it is of this transform and genuine. Compared in constant time.
    fn decode(&self, bytes: &[u8; RECORD_BYTES]) -> Option<Record> {
        let (covered, mac) = bytes.split_at(MAC_OFFSET);
        let is_ours = covered.starts_with(&MAGIC) && covered[ID_OFFSET..STEP_OFFSET] == self.id;
        if !is_ours || self.mac(covered).verify_slice(mac).is_err() {
            return None;
        }
        let number = |offset: usize| {
            u64::from_le_bytes(covered[offset..offset + 8].try_into().expect("the slice has eight bytes"))
        };
        let crc = covered[CRC_OFFSET..CRC_OFFSET + 4].try_into().expect("the slice has four bytes");
        Some(Record {
            step: number(STEP_OFFSET),
            done_bytes: number(DONE_OFFSET),
            window_bytes: number(WINDOW_OFFSET),
            saved_crc: u32::from_le_bytes(crc),
        })
    }

    fn mac(&self, covered: &[u8]) -> Hmac<Sha256> {
        Hmac::<Sha256>::new_from_slice(&self.mac_key[..]).expect("HMAC takes keys of any length").chain_update(covered)
    }
}

/// Overwrites the journal room of a header area without a transform with zeros, durably: nothing of an earlier one is left,
/// also where its end was cut or failed. The records are overwritten even if they are zeros, which may be on no media: the
/// flush of whoever stored them may have failed. The rest is zeros on media before a header forgets its transform, and
/// stays as it is where it has no blocks.
pub(super) fn clear_unused(area: &HeaderArea) -> Result<(), MediaError> {
    let (backing, start) = (area.backing(), area.base() + ROOM_OFFSET);
    backing.check_flushes()?;
    clear(backing, start..start + RECORDS_BYTES)?;
    let rest = start + RECORDS_BYTES..start + ROOM_BYTES;
    let extents = backing.extents(rest.clone(), 2)?;
    if extents.iter().any(|extent| extent.allocated) { clear(backing, rest) } else { Ok(()) }
}

fn clear(backing: &Backing, range: Range<u64>) -> Result<(), MediaError> {
    backing.write(range.clone(), |mut target| target.fill(0))?;
    backing.persist(range)
}

/// Only a bug of the writer could make a genuine record impossible; arithmetic does not rely on that.
fn is_possible(record: &Record, size_bytes: u64) -> bool {
    let end = record.done_bytes.checked_add(record.window_bytes);
    record.step < u64::MAX - 1 && record.window_bytes <= WINDOW_BYTES_MAX && end.is_some_and(|end| end <= size_bytes)
}
