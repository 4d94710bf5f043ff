//! A LUKS2 volume found on media, and the way to its key.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use super::error::{OpenError, UnlockError};
use super::header::{self, Chosen};
use super::kdf::Kdf;
use super::metadata::{Id, Metadata, Segment};
use super::slot::{AREA_ENCRYPTION, Slot};
use crate::namespace::{Cipher, CopyState, Credential, DataUnit, Geometry, GeometryError, Header, KdfWork, Site};
use crate::pmem::Backing;
use crate::secret::{self, VolumeKey};

/// A LUKS2 volume whose header is intact, understood in full, and possible where it is.
#[derive(Debug)]
pub struct Locked {
    data: Arc<Backing>,
    header: Arc<Backing>,
    /// Where the header begins in its backing.
    header_base: u64,
    geometry: Geometry,
    slots: Vec<Result<Slot, String>>,
    info: Info,
}

/// What a LUKS2 header says, without key material.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Info {
    /// Always `luks2`.
    pub format: &'static str,
    /// Identity, as text: LUKS2 does not say of which form.
    pub uuid: String,
    /// The user's name for it, may be empty.
    pub label: String,
    /// The user's other name for it, may be empty.
    pub subsystem: String,
    /// Always [`Cipher::NAME`].
    pub cipher: &'static str,
    /// Bits of the volume key, both halves together; of the first slot that can be used.
    pub key_bits: Option<u32>,
    /// Bytes of a sector, which is a data unit: 512 or 4096.
    pub unit_bytes: u32,
    /// Where the data begins, in bytes from the start of the file or partition.
    pub data_offset: u64,
    /// Size of the data in bytes.
    pub size_bytes: u64,
    /// Whether header and data are in different files.
    pub detached: bool,
    /// Number of the update that wrote this header.
    pub sequence: u64,
    /// The key slots.
    pub slots: Vec<SlotInfo>,
    /// State of the primary and the secondary header.
    pub copies: [CopyState; 2],
}

/// A LUKS2 key slot, without key material.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SlotInfo {
    /// Number of the slot.
    pub id: u32,
    /// Kind and cost of the key derivation.
    pub kdf: Option<String>,
    /// Why this program cannot open it, when it cannot.
    pub unusable: Option<String>,
}

impl Locked {
    /// Reads and checks the header at `site`: in front of the data, or in a file of its own.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing on media changes.
    pub fn open(site: &Site) -> Result<Self, OpenError> {
        let (header, header_base) = site.header_place();
        let Chosen { copy, states } = header::read(header, header_base)?;
        let metadata = Metadata::decode(&copy.json, copy.length_bytes)?;
        let segment = only_segment(&metadata)?;
        check_apart(segment, metadata.slots_place(copy.length_bytes).end, site)?;
        let geometry = geometry(segment, site)?;
        let slots: Vec<_> = metadata.keyslots.keys().map(|&id| (id, Slot::from_metadata(&metadata, id))).collect();
        let key_bits = slots.iter().find_map(|(_, slot)| slot.as_ref().ok()).map(|slot| slot.key_bytes * 8);
        let info = Info {
            format: "luks2",
            uuid: copy.uuid,
            label: copy.label,
            subsystem: copy.subsystem,
            cipher: Cipher::NAME,
            key_bits: key_bits.and_then(|bits| u32::try_from(bits).ok()),
            unit_bytes: geometry.unit_bytes(),
            data_offset: segment.offset.0,
            size_bytes: geometry.size_bytes(),
            detached: site.is_detached(),
            sequence: copy.sequence,
            slots: slots.iter().map(|(id, slot)| SlotInfo::of(*id, slot)).collect(),
            copies: states,
        };
        let slots = slots.into_iter().map(|(_, slot)| slot).collect();
        Ok(Self { data: Arc::clone(site.data()), header: Arc::clone(header), header_base, geometry, slots, info })
    }

    /// What the header says.
    #[must_use]
    pub const fn info(&self) -> &Info {
        &self.info
    }

    /// Where the data is.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Unlocks with any slot, those that are preferred first. The bytes of a passphrase and of a key file mean the same.
    ///
    /// # Errors
    ///
    /// [`UnlockError::WrongPassphrase`] when no slot opens, [`UnlockError::Work`] before any is tried.
    pub fn unlock(self, credential: &Credential) -> Result<Unlocked, UnlockError> {
        let (Credential::Passphrase(passphrase) | Credential::KeyFile(passphrase)) = credential;
        let mut slots: Vec<_> = self.slots.iter().filter_map(|slot| slot.as_ref().ok()).collect();
        slots.retain(|slot| slot.priority > 0);
        slots.sort_by_key(|slot| std::cmp::Reverse(slot.priority));
        if slots.is_empty() {
            let reason = self.slots.iter().find_map(|slot| slot.as_ref().err()).cloned();
            return Err(UnlockError::NoSlot { reason });
        }
        KdfWork::check(slots.iter().map(|slot| (slot.id, slot.work())))?;
        for slot in &slots {
            let opened = secret::with_wiped_stack(|| slot.open(passphrase, &self.header, self.header_base));
            if let Some(volume_key) = opened? {
                let slot_id = slot.id;
                let header = self.as_header(&volume_key);
                let Self { data, header: header_backing, geometry, .. } = self;
                return Ok(Unlocked { data, header_backing, geometry, header, volume_key, slot_id });
            }
        }
        Err(UnlockError::WrongPassphrase { slots_tried: slots.len() })
    }

    fn as_header(&self, volume_key: &VolumeKey) -> Header {
        let cipher = Cipher::of_key_bytes(volume_key.bytes().len()).expect("a volume key has a cipher's length");
        let uuid = Uuid::parse_str(&self.info.uuid).unwrap_or(Uuid::nil());
        let Info { label, sequence, copies, .. } = &self.info;
        Header::foreign(uuid, label.clone(), cipher, &self.geometry, *sequence, copies.clone())
    }
}

/// A LUKS2 volume whose key is known.
pub struct Unlocked {
    data: Arc<Backing>,
    header_backing: Arc<Backing>,
    geometry: Geometry,
    header: Header,
    volume_key: VolumeKey,
    slot_id: u32,
}

impl Unlocked {
    /// The slot that it was unlocked with.
    #[must_use]
    pub const fn slot_id(&self) -> u32 {
        self.slot_id
    }

    /// What a volume is made of: the backings of data and of the header, where the data is, what is said about it, and the
    /// key.
    #[must_use]
    pub fn into_parts(self) -> (Arc<Backing>, Arc<Backing>, Geometry, Header, VolumeKey) {
        (self.data, self.header_backing, self.geometry, self.header, self.volume_key)
    }
}

impl fmt::Debug for Unlocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unlocked").field("header", &self.header).finish_non_exhaustive()
    }
}

impl SlotInfo {
    fn of(id: Id, slot: &Result<Slot, String>) -> Self {
        let kdf = |slot: &Slot| match slot.kdf.kdf {
            Kdf::Pbkdf2 { hash, iterations } => format!("PBKDF2 with {hash:?} and {iterations} iterations"),
            Kdf::Argon2 { algorithm, cost } => format!(
                "{} with {} KiB and {} passes in {} lanes",
                if algorithm == argon2::Algorithm::Argon2id { "Argon2id" } else { "Argon2i" },
                cost.memory_kib,
                cost.time,
                cost.lanes
            ),
        };
        Self { id: id.0, kdf: slot.as_ref().ok().map(kdf), unusable: slot.as_ref().err().cloned() }
    }
}

/// The one segment of the data. Others are traces of a reencryption.
fn only_segment(metadata: &Metadata) -> Result<&Segment, OpenError> {
    let unsupported =
        |what, found: &str, supported| Err(OpenError::Unsupported { what, found: found.to_owned(), supported });
    let segment = metadata.segments.get(&Id(0)).ok_or(OpenError::Field { field: "segments" })?;
    if metadata.segments.len() > 1 || !segment.flags.is_empty() {
        return Err(OpenError::Reencryption);
    }
    if segment.kind != "crypt" {
        return unsupported("a segment of type", &segment.kind, "crypt");
    }
    if segment.integrity.is_some() {
        return unsupported("a segment with", "integrity", "one without");
    }
    match segment.encryption.as_deref() {
        Some(AREA_ENCRYPTION) => {}
        other => return unsupported("the encryption", other.unwrap_or(""), AREA_ENCRYPTION),
    }
    match segment.iv_tweak.ok_or(OpenError::Field { field: "segments.0.iv_tweak" })?.0 {
        0 => Ok(segment),
        iv_tweak => Err(OpenError::IvTweak { iv_tweak }),
    }
}

/// What is written as data must not be a header or a key slot: in front of the data, they end where the data begins at the
/// latest.
fn check_apart(segment: &Segment, header_end: u64, site: &Site) -> Result<(), OpenError> {
    let data_offset = segment.offset.0;
    if !site.is_detached() && data_offset < header_end {
        return Err(OpenError::DataInHeader { data_offset, header_end });
    }
    Ok(())
}

fn geometry(segment: &Segment, site: &Site) -> Result<Geometry, OpenError> {
    let unit = match segment.sector_size {
        Some(512) => DataUnit::Bytes512,
        Some(4096) => DataUnit::Bytes4096,
        other => {
            let found = other.map_or_else(String::new, |bytes| bytes.to_string());
            return Err(OpenError::Unsupported { what: "a sector size of", found, supported: "512 and 4096" });
        }
    };
    let data_offset = segment.offset.0;
    let size_bytes = match segment.size_bytes()? {
        Some(size_bytes) => size_bytes,
        None => crate::namespace::size_that_fits(data_offset, site.available_bytes(), unit)?,
    };
    // Its tweaks begin with the volume, wherever that is on a disk.
    let base = site.start();
    let overflow = GeometryError::Overflow { base, data_offset, size_bytes, address: 0 };
    let data_start = base.checked_add(data_offset).ok_or(overflow)?;
    let available_bytes = site.available_bytes().saturating_sub(data_offset);
    Ok(Geometry::foreign(data_start, size_bytes, unit, 0, available_bytes)?)
}
