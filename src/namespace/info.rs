//! A header as people and programs may see it: everything but key material.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::area::CopyState;
use super::geometry::Geometry;
use super::kdf::Kdf;
use super::metadata::{Cipher, Metadata};

/// The content of a header, without key material. Before unlocking it is what the media says, not what is true.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Header {
    /// Identity of the namespace.
    pub uuid: Uuid,
    /// The user's name for it, may be empty.
    pub label: String,
    /// Always [`Cipher::NAME`].
    pub cipher: &'static str,
    /// Bits of the volume key, both halves together: 256 or 512.
    pub key_bits: Cipher,
    /// Bytes of a data unit: 512 or 4096.
    pub unit_bytes: u32,
    /// Byte offset in the backing where the namespace begins.
    pub base: u64,
    /// Bytes from the base to the data.
    pub data_offset: u64,
    /// Size of the data area in bytes.
    pub size_bytes: u64,
    /// Physical address that the tweaks are bound to.
    pub bound_address: Option<u64>,
    /// Whether header and data are in different files.
    pub detached: bool,
    /// Bytes from the base to the tag that tells detached data from any other; without it nothing does.
    pub tag_offset: Option<u64>,
    /// Whether the volume key is never stored.
    pub ephemeral: bool,
    /// Whether the namespace was in use and not closed in order.
    pub unclean: bool,
    /// Whether discards punch holes, which read as zeroes.
    pub discards: bool,
    /// Whether the data area was to be filled with noise, and is not full of it yet.
    pub wiping: bool,
    /// Number of the update that wrote this header.
    pub sequence: u64,
    /// Whether a re-key is under way.
    pub rekeying: bool,
    /// The key slots.
    pub slots: Vec<SlotInfo>,
    /// State of header copies A and B.
    pub copies: [CopyState; 2],
}

/// A key slot, without key material.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SlotInfo {
    /// Number of the slot.
    pub id: u32,
    /// The user's name for it, may be empty.
    pub label: String,
    /// Kind and cost: Argon2id is a passphrase slot, HKDF a key-file slot.
    pub kdf: Kdf,
}

impl Header {
    /// What stands for a header where the format is not ours: no slots, no binding, no discards.
    #[must_use]
    pub fn foreign(
        uuid: Uuid,
        label: String,
        cipher: Cipher,
        geometry: &Geometry,
        sequence: u64,
        copies: [CopyState; 2],
    ) -> Self {
        Self {
            uuid,
            label,
            cipher: Cipher::NAME,
            key_bits: cipher,
            unit_bytes: geometry.unit_bytes(),
            base: geometry.base(),
            data_offset: geometry.data_offset(),
            size_bytes: geometry.size_bytes(),
            bound_address: None,
            detached: geometry.placement().detached,
            tag_offset: None,
            ephemeral: false,
            unclean: false,
            discards: false,
            rekeying: false,
            wiping: false,
            sequence,
            slots: Vec::new(),
            copies,
        }
    }

    pub(super) fn of(metadata: &Metadata, sequence: u64, copies: &[CopyState; 2]) -> Self {
        let slots = metadata.slots.iter();
        Self {
            uuid: metadata.uuid,
            label: metadata.label.clone(),
            cipher: Cipher::NAME,
            key_bits: metadata.key_bits,
            unit_bytes: metadata.unit_bytes.bytes(),
            base: metadata.base,
            data_offset: metadata.data_offset,
            size_bytes: metadata.size_bytes,
            bound_address: metadata.bound_address,
            detached: metadata.detached,
            tag_offset: metadata.tag_offset,
            ephemeral: metadata.ephemeral,
            unclean: metadata.unclean,
            discards: metadata.discards,
            wiping: metadata.wiping,
            sequence,
            rekeying: metadata.transform.is_some(),
            slots: slots.map(|slot| SlotInfo { id: slot.id, label: slot.label.clone(), kdf: slot.kdf }).collect(),
            copies: copies.clone(),
        }
    }
}
