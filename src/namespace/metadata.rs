//! The JSON half of a header: what a namespace is, and its key slots.
//!
//! Decoding checks every field by itself. Whether the geometry fits its backing is checked by
//! [`super::geometry::Geometry`], and whether any of it is genuine only by the MAC, after unlocking. Unknown fields are
//! refused; what a future program adds and an older one must not ignore it announces in `requirements`, which is looked
//! at first, so that the error names the requirement.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::geometry::{DataUnit, Placement};
use super::kdf::{CostError, Kdf};
use super::slot::{Purpose, Slot, TAG_BYTES};
use super::transform::{self, Transform};

/// Most key slots of a namespace.
pub const SLOT_COUNT_MAX: u32 = 32;

/// Most bytes of a label (UTF-8), of the namespace or of a slot.
pub const LABEL_BYTES_MAX: usize = 64;

/// What encrypts the data. There is no other cipher, and none that does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Cipher {
    /// AES-128-XTS: a volume key of 32 bytes.
    Aes128Xts,
    /// AES-256-XTS: a volume key of 64 bytes.
    Aes256Xts,
}

impl Cipher {
    /// The name in the header, which is dm-crypt's.
    pub const NAME: &'static str = "aes-xts-plain64";

    /// Bits of the volume key, both halves together as dm-crypt counts: 256 or 512.
    #[must_use]
    pub const fn key_bits(self) -> u32 {
        match self {
            Self::Aes128Xts => 256,
            Self::Aes256Xts => 512,
        }
    }

    /// Bytes of the volume key, both halves: 32 or 64.
    #[must_use]
    pub const fn key_bytes(self) -> usize {
        self.key_bits() as usize / 8
    }

    /// The cipher of a volume key of `len_bytes` bytes.
    #[must_use]
    pub const fn of_key_bytes(len_bytes: usize) -> Option<Self> {
        match len_bytes {
            32 => Some(Self::Aes128Xts),
            64 => Some(Self::Aes256Xts),
            _ => None,
        }
    }
}

impl From<Cipher> for u32 {
    fn from(cipher: Cipher) -> Self {
        cipher.key_bits()
    }
}

impl TryFrom<u32> for Cipher {
    type Error = MetadataError;

    fn try_from(key_bits: u32) -> Result<Self, MetadataError> {
        match key_bits {
            256 => Ok(Self::Aes128Xts),
            512 => Ok(Self::Aes256Xts),
            _ => Err(MetadataError::KeyBits { key_bits }),
        }
    }
}

/// Why the JSON half of a header is not acceptable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// Not the JSON that the format specifies.
    #[error("its metadata is not what the format specifies")]
    Json(#[from] serde_json::Error),
    /// A newer program used a feature that must not be ignored.
    #[error("it requires the feature {name:?}, which this version does not know")]
    Requirement {
        /// The feature.
        name: String,
    },
    /// The key size is neither 256 nor 512 bits.
    #[error("a key of {key_bits} bits is not supported, only 256 and 512")]
    KeyBits {
        /// The key size given.
        key_bits: u32,
    },
    /// A label is too long.
    #[error("a label of {len_bytes} bytes is longer than {max_bytes}")]
    LabelLength {
        /// Bytes of the label.
        len_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// A label has a control character.
    #[error("a label holds the control character U+{code_point:04X}")]
    LabelCharacter {
        /// The character.
        code_point: u32,
    },
    /// There are too many slots.
    #[error("{slot_count} key slots are more than {max_count}")]
    SlotCount {
        /// Slots in the header.
        slot_count: usize,
        /// The limit.
        max_count: u32,
    },
    /// Slot numbers must be below the limit and ascending.
    #[error("key slot {id} is out of order or not below {max_count}")]
    SlotNumber {
        /// The slot.
        id: u32,
        /// The limit.
        max_count: u32,
    },
    /// The wrapped key has another length than the cipher's key.
    #[error("key slot {id} wraps {len_bytes} bytes, but the cipher needs {expected_bytes}")]
    SlotLength {
        /// The slot.
        id: u32,
        /// Bytes of the wrapped key with its tag.
        len_bytes: usize,
        /// Bytes that it must have.
        expected_bytes: usize,
    },
    /// The key derivation of a slot would cost too much or too little.
    #[error("key slot {id} is refused")]
    SlotCost {
        /// The slot.
        id: u32,
        /// The parameter.
        #[source]
        cost: CostError,
    },
    /// A re-key is under way exactly when the requirements say so.
    #[error("its requirements and its re-key do not agree")]
    TransformNotAnnounced,
    /// The tag of the data would be where the data is, or there is none to be had.
    #[error("its data cannot have a tag at byte {tag_offset}")]
    TagPlace {
        /// Bytes from the base to the tag.
        tag_offset: u64,
    },
    /// An ephemeral namespace has a key slot.
    #[error("it is ephemeral and yet has {slot_count} key slots")]
    EphemeralWithSlots {
        /// Slots in the header.
        slot_count: usize,
    },
}

/// The one value of the field `cipher`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum CipherName {
    #[serde(rename = "aes-xts-plain64")]
    AesXtsPlain64,
}

/// The JSON half of a header; the fields are in the order of `format.md`, which is the order of the encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Metadata {
    pub(super) requirements: Vec<String>,
    pub(super) uuid: Uuid,
    pub(super) label: String,
    pub(super) cipher: CipherName,
    pub(super) key_bits: Cipher,
    pub(super) unit_bytes: DataUnit,
    pub(super) base: u64,
    pub(super) data_offset: u64,
    pub(super) size_bytes: u64,
    pub(super) bound_address: Option<u64>,
    pub(super) detached: bool,
    pub(super) ephemeral: bool,
    pub(super) unclean: bool,
    /// Whether holes are punched, and read as zeroes: never taken back, because zeroes may be holes by then.
    pub(super) discards: bool,
    pub(super) slots: Vec<Slot>,
    /// Bytes from the base to the page that holds the tag of detached data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tag_offset: Option<u64>,
    /// Whether the data area was to be filled with noise, and is not full of it yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) wiping: bool,
    /// Where the data came from, while it is being re-keyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) transform: Option<Transform>,
}

/// The part that is looked at before all else; other fields are ignored.
#[derive(Deserialize)]
struct Requirements {
    requirements: Vec<String>,
}

impl Metadata {
    /// Parses and checks every field by itself.
    pub(super) fn decode(json: &[u8]) -> Result<Self, MetadataError> {
        let Requirements { requirements } = serde_json::from_slice(json)?;
        if let Some(name) = requirements.into_iter().find(|name| name != transform::REQUIREMENT) {
            return Err(MetadataError::Requirement { name });
        }
        let metadata: Self = serde_json::from_slice(json)?;
        metadata.check()?;
        Ok(metadata)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        debug_assert!(self.check().is_ok(), "metadata is checked where it is changed: {:?}", self.check());
        serde_json::to_vec(self).expect("every field has a JSON form")
    }

    pub(super) fn check(&self) -> Result<(), MetadataError> {
        check_label(&self.label)?;
        let announced = self.requirements.iter().filter(|name| *name == transform::REQUIREMENT).count();
        if announced != usize::from(self.transform.is_some()) {
            return Err(MetadataError::TransformNotAnnounced);
        }
        let slot_count = self.slots.len();
        if slot_count > SLOT_COUNT_MAX as usize {
            return Err(MetadataError::SlotCount { slot_count, max_count: SLOT_COUNT_MAX });
        }
        if self.ephemeral && slot_count > 0 {
            return Err(MetadataError::EphemeralWithSlots { slot_count });
        }
        if let Some(tag_offset) = self.tag_offset {
            let is_behind = self.data_offset.checked_add(self.size_bytes).is_some_and(|end| end <= tag_offset);
            if self.ephemeral || !self.detached || !is_behind {
                return Err(MetadataError::TagPlace { tag_offset });
            }
        }
        let mut least_id = 0;
        for slot in &self.slots {
            let id = slot.id;
            if id < least_id || id >= SLOT_COUNT_MAX {
                return Err(MetadataError::SlotNumber { id, max_count: SLOT_COUNT_MAX });
            }
            least_id = id + 1;
            check_slot(slot, self.key_bits)?;
        }
        Ok(())
    }

    /// The placement on a backing that begins at byte `origin` of its disk.
    pub(super) fn placement(&self, origin: u64) -> Placement {
        Placement {
            origin,
            base: self.base,
            data_offset: self.data_offset,
            size_bytes: self.size_bytes,
            unit: self.unit_bytes,
            bound_address: self.bound_address,
            detached: self.detached,
        }
    }

    pub(super) fn purpose(&self) -> Purpose {
        Purpose { uuid: self.uuid, cipher: self.key_bits, placement: self.placement(0) }
    }
}

/// Checks a label of a namespace or slot: at most [`LABEL_BYTES_MAX`] bytes, no control characters.
pub(super) fn check_label(label: &str) -> Result<(), MetadataError> {
    if label.len() > LABEL_BYTES_MAX {
        return Err(MetadataError::LabelLength { len_bytes: label.len(), max_bytes: LABEL_BYTES_MAX });
    }
    match label.chars().find(|character| character.is_control()) {
        Some(character) => Err(MetadataError::LabelCharacter { code_point: character.into() }),
        None => Ok(()),
    }
}

fn check_slot(slot: &Slot, cipher: Cipher) -> Result<(), MetadataError> {
    let id = slot.id;
    check_label(&slot.label)?;
    let (len_bytes, expected_bytes) = (slot.wrapped.len(), cipher.key_bytes() + TAG_BYTES);
    if len_bytes != expected_bytes {
        return Err(MetadataError::SlotLength { id, len_bytes, expected_bytes });
    }
    match &slot.kdf {
        Kdf::Argon2id(cost) => cost.check().map_err(|cost| MetadataError::SlotCost { id, cost }),
        Kdf::HkdfSha256 => Ok(()),
    }
}
