//! The binary header, 4096 bytes in front of the metadata, and the choice between its two copies.
//!
//! ```text
//! offset  bytes  field (specification, section 2.1), all numbers big-endian
//!      0      6  magic: "LUKS\xba\xbe", of the secondary copy "SKUL\xba\xbe"
//!      6      2  version, 2
//!      8      8  length of binary header and metadata together
//!     16      8  sequence number; the valid copy with the greater one is the header
//!     24     48  label
//!     72     32  name of the checksum
//!    104     64  salt, to make each copy different
//!    168     40  uuid as text
//!    208     48  subsystem
//!    256      8  offset of this copy from the start of the header device
//!    264    184  reserved
//!    448     64  checksum over the length above, taken with this field zero
//!    512   3584  reserved
//!   4096         metadata: JSON, then zeros up to the length
//! ```

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{HeaderFault, OpenError};
use crate::namespace::CopyState;
use crate::pmem::{Backing, MediaError};

const MAGIC_PRIMARY: &[u8; 6] = b"LUKS\xba\xbe";
const MAGIC_SECONDARY: &[u8; 6] = b"SKUL\xba\xbe";
const VERSION: u16 = 2;

const VERSION_OFFSET: usize = 6;
const LENGTH_OFFSET: usize = 8;
const SEQUENCE_OFFSET: usize = 16;
const LABEL_OFFSET: usize = 24;
const LABEL_BYTES: usize = 48;
const ALGORITHM_OFFSET: usize = 72;
const ALGORITHM_BYTES: usize = 32;
const SALT_OFFSET: usize = 104;
const UUID_OFFSET: usize = 168;
const UUID_BYTES: usize = 40;
const SUBSYSTEM_OFFSET: usize = 208;
const SUBSYSTEM_BYTES: usize = 48;
const OFFSET_OFFSET: usize = 256;
const CHECKSUM_OFFSET: usize = 448;
const CHECKSUM_FIELD_BYTES: usize = 64;

/// Bytes of the binary header.
pub(super) const BINARY_BYTES: usize = 4096;

/// The lengths that a header may have (specification, section 2.1.1).
const LENGTHS: [u64; 9] = [16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];

/// The length of a header that this program writes.
pub(super) const LENGTH_WRITTEN: usize = 16 << 10;

/// A copy of the header whose checksum is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeaderCopy {
    pub(super) length_bytes: u64,
    pub(super) sequence: u64,
    pub(super) label: String,
    pub(super) uuid: String,
    pub(super) subsystem: String,
    /// The metadata, without the zeros behind it.
    pub(super) json: Vec<u8>,
}

/// The header that counts, and what became of the primary and the secondary copy.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) copy: HeaderCopy,
    pub(super) states: [CopyState; 2],
}

/// Reads both copies of the header that begins at byte `base` of `backing`.
pub(super) fn read(backing: &Backing, base: u64) -> Result<Chosen, OpenError> {
    let primary = read_copy(backing, base, 0, MAGIC_PRIMARY);
    let secondary = match &primary {
        Ok(copy) => read_copy(backing, base, copy.length_bytes, MAGIC_SECONDARY),
        // Without the primary copy nobody knows where the secondary one is.
        Err(_) => find_secondary(backing, base),
    };
    let states = [state(&primary), state(&secondary)];
    match (primary, secondary) {
        (Ok(primary), Ok(secondary)) if secondary.sequence > primary.sequence => Ok(Chosen { copy: secondary, states }),
        (Ok(copy), _) | (Err(_), Ok(copy)) => Ok(Chosen { copy, states }),
        (Err(HeaderFault::Version { found: 1 }), _) => Err(OpenError::Luks1),
        (Err(primary), Err(secondary)) if is_nothing(&primary) && is_nothing(&secondary) => Err(OpenError::NotLuks),
        (Err(primary), Err(secondary)) => Err(OpenError::BothCopiesDamaged { primary, secondary }),
    }
}

/// Whether there is no sign of a header: other bytes, or the end of the device.
const fn is_nothing(fault: &HeaderFault) -> bool {
    matches!(fault, HeaderFault::Magic | HeaderFault::Unreadable(MediaError::OutOfRange { .. }))
}

fn find_secondary(backing: &Backing, base: u64) -> Result<HeaderCopy, HeaderFault> {
    let mut fault = HeaderFault::Magic;
    for offset in LENGTHS {
        match read_copy(backing, base, offset, MAGIC_SECONDARY) {
            Ok(copy) => return Ok(copy),
            Err(HeaderFault::Magic | HeaderFault::Unreadable(_)) => {}
            Err(other) => fault = other,
        }
    }
    Err(fault)
}

fn state(copy: &Result<HeaderCopy, HeaderFault>) -> CopyState {
    match copy {
        Ok(copy) => CopyState::Good { sequence: copy.sequence },
        Err(fault) => CopyState::Bad { reason: crate::namespace::Chain(fault).to_string() },
    }
}

fn read_copy(backing: &Backing, base: u64, offset: u64, magic: &[u8; 6]) -> Result<HeaderCopy, HeaderFault> {
    let bytes = |from: u64, len: usize| -> Result<Vec<u8>, HeaderFault> {
        let mut bytes = vec![0; len];
        let start = base.saturating_add(from);
        backing.read(start..start.saturating_add(len as u64), |source| source.copy_to(&mut bytes))?;
        Ok(bytes)
    };
    let binary = bytes(offset, BINARY_BYTES)?;
    let length_bytes = check_binary(&binary, offset, magic)?;
    let length = usize::try_from(length_bytes).expect("one of the lengths above");
    parse(&bytes(offset, length)?, length_bytes)
}

/// Checks what must be right before the length is believed.
fn check_binary(binary: &[u8], offset: u64, magic: &[u8; 6]) -> Result<u64, HeaderFault> {
    if binary[..VERSION_OFFSET] != *magic {
        return Err(HeaderFault::Magic);
    }
    let found = u16::from_be_bytes(array_at(binary, VERSION_OFFSET));
    if found != VERSION {
        return Err(HeaderFault::Version { found });
    }
    let header_bytes = u64::from_be_bytes(array_at(binary, LENGTH_OFFSET));
    if !LENGTHS.contains(&header_bytes) {
        return Err(HeaderFault::Length { header_bytes });
    }
    let stored = u64::from_be_bytes(array_at(binary, OFFSET_OFFSET));
    if stored != offset || (offset != 0 && offset != header_bytes) {
        return Err(HeaderFault::Offset { stored, actual: offset });
    }
    Ok(header_bytes)
}

fn parse(bytes: &[u8], length_bytes: u64) -> Result<HeaderCopy, HeaderFault> {
    let algorithm = text_at(bytes, ALGORITHM_OFFSET, ALGORITHM_BYTES);
    if algorithm != "sha256" {
        return Err(HeaderFault::ChecksumAlgorithm);
    }
    let expected = checksum(bytes);
    let stored = &bytes[CHECKSUM_OFFSET..CHECKSUM_OFFSET + expected.len()];
    if !bool::from(stored.ct_eq(&expected)) {
        return Err(HeaderFault::Checksum);
    }
    let metadata = &bytes[BINARY_BYTES..];
    let json_bytes = metadata.iter().position(|&byte| byte == 0).unwrap_or(metadata.len());
    if json_bytes == metadata.len() || metadata[json_bytes..].iter().any(|&byte| byte != 0) {
        return Err(HeaderFault::Garbage);
    }
    Ok(HeaderCopy {
        length_bytes,
        sequence: u64::from_be_bytes(array_at(bytes, SEQUENCE_OFFSET)),
        label: text_at(bytes, LABEL_OFFSET, LABEL_BYTES),
        uuid: text_at(bytes, UUID_OFFSET, UUID_BYTES),
        subsystem: text_at(bytes, SUBSYSTEM_OFFSET, SUBSYSTEM_BYTES),
        json: metadata[..json_bytes].to_vec(),
    })
}

/// Both copies of a header with this content, one behind the other; `salts` make them different.
pub(super) fn encode(copy: &HeaderCopy, salts: &[[u8; 64]; 2]) -> Vec<u8> {
    let length = LENGTH_WRITTEN;
    assert!(BINARY_BYTES + copy.json.len() < length, "our metadata is short");
    let mut bytes = vec![0; 2 * length];
    let copies = bytes.chunks_exact_mut(length).zip([(0, MAGIC_PRIMARY), (length as u64, MAGIC_SECONDARY)]).zip(salts);
    for ((bytes, (offset, magic)), salt) in copies {
        let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
        put(0, magic);
        put(VERSION_OFFSET, &VERSION.to_be_bytes());
        put(LENGTH_OFFSET, &(length as u64).to_be_bytes());
        put(SEQUENCE_OFFSET, &copy.sequence.to_be_bytes());
        put(LABEL_OFFSET, &copy.label.as_bytes()[..copy.label.len().min(LABEL_BYTES - 1)]);
        put(ALGORITHM_OFFSET, b"sha256");
        put(SALT_OFFSET, salt);
        put(UUID_OFFSET, &copy.uuid.as_bytes()[..copy.uuid.len().min(UUID_BYTES - 1)]);
        put(OFFSET_OFFSET, &offset.to_be_bytes());
        put(BINARY_BYTES, &copy.json);
        let digest = checksum(bytes);
        bytes[CHECKSUM_OFFSET..CHECKSUM_OFFSET + digest.len()].copy_from_slice(&digest);
    }
    bytes
}

/// SHA-256 over a copy with the checksum's field zero.
pub(super) fn checksum(bytes: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(&bytes[..CHECKSUM_OFFSET]);
    hasher.update([0; CHECKSUM_FIELD_BYTES]);
    hasher.update(&bytes[CHECKSUM_OFFSET + CHECKSUM_FIELD_BYTES..]);
    hasher.finalize().into()
}

/// The text in a field that ends at a zero byte or at its end. What is not UTF-8 is replaced.
fn text_at(bytes: &[u8], offset: usize, len_bytes: usize) -> String {
    let field = &bytes[offset..offset + len_bytes];
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(len_bytes);
    String::from_utf8_lossy(&field[..end]).into_owned()
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes[offset..offset + N].try_into().expect("the slice has N bytes")
}
