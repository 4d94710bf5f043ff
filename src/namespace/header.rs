//! One copy of the header as bytes: a fixed prefix, then the JSON metadata, then zeros.
//!
//! ```text
//! offset  bytes  prefix, all numbers little-endian
//!      0      8  magic "DAXCRYPT"                                             ) these five keep their place
//!      8      4  version, 1                                                   ) and meaning in every version
//!     12      4  length of the prefix in bytes, 128                           )
//!     16      4  length of the metadata in bytes, 2..=65408                   )
//!     20      4  CRC-32 over prefix and metadata, taken with these four bytes zero )
//!     24      8  sequence number; the valid copy with the greater one is the header
//!     32     32  MAC: HMAC-SHA256 over prefix and metadata, taken with MAC and CRC-32 zero
//!     64     64  reserved, zero
//!    128         metadata; the rest of the 64 KiB is zero
//! ```
//!
//! Decoding checks each field before any arithmetic uses it. What it gives is well-formed, not genuine: see
//! [`HeaderCopy::is_genuine`].

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use uuid::Uuid;

use super::kdf::{self, Key256};
use super::metadata::{Metadata, MetadataError};
use crate::pmem::MediaError;
use crate::secret::VolumeKey;

pub(super) const MAGIC: [u8; 8] = *b"DAXCRYPT";
const MAGIC_OFFSET: usize = 0;
const VERSION_OFFSET: usize = MAGIC_OFFSET + size_of_val(&MAGIC);
const PREFIX_LEN_OFFSET: usize = VERSION_OFFSET + size_of::<u32>();
const METADATA_LEN_OFFSET: usize = PREFIX_LEN_OFFSET + size_of::<u32>();
const CRC_OFFSET: usize = METADATA_LEN_OFFSET + size_of::<u32>();
const SEQUENCE_OFFSET: usize = CRC_OFFSET + size_of::<u32>();
const MAC_OFFSET: usize = SEQUENCE_OFFSET + size_of::<u64>();
const RESERVED_OFFSET: usize = MAC_OFFSET + MAC_BYTES;
const PREFIX_BYTES: usize = RESERVED_OFFSET + 64;

const MAC_BYTES: usize = 32;

/// The format version that this program reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes of one header copy, always written whole.
pub(super) const COPY_BYTES: usize = 64 << 10;

/// Most bytes that any version's prefix may have.
const PREFIX_BYTES_MAX: u32 = 4096;

const _: () = assert!(PREFIX_BYTES == 128 && PREFIX_BYTES < COPY_BYTES && PREFIX_BYTES_MAX < 64 << 10);

/// Why one of the two header copies cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyFault {
    /// The media does not give the bytes.
    #[error("it cannot be read")]
    Unreadable(#[source] MediaError),
    /// The first eight bytes are not the magic.
    #[error("it does not begin with the daxcrypt magic")]
    Magic,
    /// The lengths do not fit into a copy.
    #[error(
        "it claims {prefix_bytes} bytes of prefix and {metadata_bytes} of metadata, in a copy of {max_bytes} bytes"
    )]
    Lengths {
        /// Length of the prefix as given.
        prefix_bytes: u32,
        /// Length of the metadata as given.
        metadata_bytes: u32,
        /// Bytes of a copy.
        max_bytes: usize,
    },
    /// The checksum is wrong: torn or corrupt.
    #[error("its CRC-32 is {computed:#010x}, but it says {stored:#010x}")]
    Checksum {
        /// The checksum in the prefix.
        stored: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// The copy is intact and of another format version.
    #[error("it has format version {found}, but this program knows version {supported} only")]
    Version {
        /// Its version.
        found: u32,
        /// The supported version.
        supported: u32,
    },
    /// Reserved bytes are in use.
    #[error("byte {offset} of its prefix is reserved and not zero")]
    Reserved {
        /// Offset of the byte.
        offset: usize,
    },
    /// The metadata is unacceptable.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}

impl CopyFault {
    /// Whether the copy is intact, but a newer program is needed to understand it. The other copy must then not be used
    /// in its place.
    #[must_use]
    pub const fn is_from_the_future(&self) -> bool {
        matches!(self, Self::Version { .. } | Self::Metadata(MetadataError::Requirement { .. }))
    }
}

/// A well-formed header copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeaderCopy {
    pub(super) sequence: u64,
    pub(super) metadata: Metadata,
    mac: [u8; MAC_BYTES],
    /// The HMAC input: prefix and metadata with MAC and CRC zero.
    covered: Vec<u8>,
}

impl HeaderCopy {
    /// Parses a copy.
    pub(super) fn decode(bytes: &[u8; COPY_BYTES]) -> Result<Self, CopyFault> {
        if bytes[MAGIC_OFFSET..VERSION_OFFSET] != MAGIC {
            return Err(CopyFault::Magic);
        }
        let covered = intact_part(bytes)?;
        let found = u32_at(bytes, VERSION_OFFSET);
        if found != FORMAT_VERSION {
            return Err(CopyFault::Version { found, supported: FORMAT_VERSION });
        }
        if u32_at(bytes, PREFIX_LEN_OFFSET) as usize != PREFIX_BYTES {
            return Err(lengths_fault(bytes));
        }
        if let Some(index) = covered[RESERVED_OFFSET..PREFIX_BYTES].iter().position(|&byte| byte != 0) {
            return Err(CopyFault::Reserved { offset: RESERVED_OFFSET + index });
        }
        let metadata = Metadata::decode(&covered[PREFIX_BYTES..])?;
        let mut covered = covered.to_vec();
        let mac = array_at(&covered, MAC_OFFSET);
        covered[CRC_OFFSET..SEQUENCE_OFFSET].fill(0);
        covered[MAC_OFFSET..RESERVED_OFFSET].fill(0);
        let sequence = u64::from_le_bytes(array_at(&covered, SEQUENCE_OFFSET));
        Ok(Self { sequence, metadata, mac, covered })
    }

    /// Whether the other copy holds the same bytes.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.mac == other.mac && self.covered == other.covered
    }

    /// Whether the MAC is that of the holder of the volume key. Compared in constant time.
    pub(super) fn is_genuine(&self, key: &MacKey) -> bool {
        key.mac(&self.covered).verify_slice(&self.mac).is_ok()
    }
}

/// The bytes of a copy with this content.
pub(super) fn encode(sequence: u64, metadata: &Metadata, key: &MacKey) -> Result<Box<[u8; COPY_BYTES]>, TooLong> {
    let json = metadata.encode();
    let len_bytes = PREFIX_BYTES + json.len();
    let metadata_len = u32::try_from(json.len()).ok().filter(|_| len_bytes <= COPY_BYTES);
    let metadata_len = metadata_len.ok_or(TooLong { len_bytes, max_bytes: COPY_BYTES })?;
    let mut bytes: Box<[u8; COPY_BYTES]> =
        vec![0; COPY_BYTES].into_boxed_slice().try_into().expect("the length is COPY_BYTES");
    let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
    put(MAGIC_OFFSET, &MAGIC);
    put(VERSION_OFFSET, &FORMAT_VERSION.to_le_bytes());
    put(PREFIX_LEN_OFFSET, &128_u32.to_le_bytes());
    put(METADATA_LEN_OFFSET, &metadata_len.to_le_bytes());
    put(SEQUENCE_OFFSET, &sequence.to_le_bytes());
    put(PREFIX_BYTES, &json);
    let mac: [u8; MAC_BYTES] = key.mac(&bytes[..len_bytes]).finalize().into_bytes().into();
    bytes[MAC_OFFSET..RESERVED_OFFSET].copy_from_slice(&mac);
    let crc = checksum(&bytes[..len_bytes]);
    bytes[CRC_OFFSET..SEQUENCE_OFFSET].copy_from_slice(&crc.to_le_bytes());
    Ok(bytes)
}

/// The metadata outgrows a header copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the header would have {len_bytes} bytes, more than {max_bytes}")]
pub struct TooLong {
    /// Bytes needed.
    pub len_bytes: usize,
    /// Bytes of a copy.
    pub max_bytes: usize,
}

/// The key of the header MAC, derived from the volume key.
#[derive(Debug)]
pub(super) struct MacKey(Key256);

impl MacKey {
    pub(super) fn new(volume_key: &VolumeKey, uuid: Uuid) -> Self {
        Self(kdf::derive_key(uuid.as_bytes(), volume_key.bytes(), b"daxcrypt v1 header mac"))
    }

    fn mac(&self, covered: &[u8]) -> Hmac<Sha256> {
        Hmac::<Sha256>::new_from_slice(&self.0[..]).expect("HMAC takes keys of any length").chain_update(covered)
    }
}

/// Prefix and metadata by the lengths and the checksum that every version has at the same place.
fn intact_part(bytes: &[u8; COPY_BYTES]) -> Result<&[u8], CopyFault> {
    let (prefix_bytes, metadata_bytes) = (u32_at(bytes, PREFIX_LEN_OFFSET), u32_at(bytes, METADATA_LEN_OFFSET));
    if !(64..=PREFIX_BYTES_MAX).contains(&prefix_bytes) {
        return Err(lengths_fault(bytes));
    }
    let covered = (prefix_bytes as usize)
        .checked_add(metadata_bytes as usize)
        .and_then(|len_bytes| bytes.get(..len_bytes))
        .ok_or_else(|| lengths_fault(bytes))?;
    let (stored, computed) = (u32_at(bytes, CRC_OFFSET), checksum(covered));
    if stored != computed {
        return Err(CopyFault::Checksum { stored, computed });
    }
    Ok(covered)
}

fn lengths_fault(bytes: &[u8]) -> CopyFault {
    CopyFault::Lengths {
        prefix_bytes: u32_at(bytes, PREFIX_LEN_OFFSET),
        metadata_bytes: u32_at(bytes, METADATA_LEN_OFFSET),
        max_bytes: COPY_BYTES,
    }
}

/// CRC-32 (IEEE 802.3) with the four bytes of the checksum itself taken as zero.
fn checksum(covered: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&covered[..CRC_OFFSET]);
    hasher.update(&[0; 4]);
    hasher.update(&covered[SEQUENCE_OFFSET..]);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, offset))
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes[offset..offset + N].try_into().expect("the slice has N bytes")
}
