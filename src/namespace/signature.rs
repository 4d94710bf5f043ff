//! Does a place look as if it held data? Asked before formatting, which would destroy it.
//!
//! Only the first two mebibytes from the base are looked at, which is what formatting overwrites at once, and where every
//! format listed here announces itself. A place with no known signature but with any byte set counts as data too.

use std::fmt;
use std::ops::Range;

use super::area::first_nonzero;
use super::geometry::HEADER_AREA_BYTES;
use crate::pmem::{Backing, MediaError};

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Signature {
    /// A known format, by name.
    Known(&'static str),
    /// Bytes of unknown meaning.
    NonZero {
        /// Offset in the backing of the first byte that is not zero.
        offset: u64,
    },
}

impl Signature {
    /// Whether it is that of a LUKS header.
    #[must_use]
    pub fn is_luks(&self) -> bool {
        matches!(self, Self::Known(name) if name.starts_with("a LUKS"))
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(name) => write!(f, "{name}"),
            Self::NonZero { offset } => write!(f, "data of unknown kind at byte {offset}"),
        }
    }
}

const PAGE_BYTES: u64 = 4096;

/// Name, offset from the base, and the bytes there. More telling ones come first: a GPT hides behind an MBR, and many a
/// boot sector ends as an MBR does.
const KNOWN: &[(&str, u64, &[u8])] = &[
    ("a daxcrypt namespace", 0, b"DAXCRYPT"),
    ("a daxcrypt namespace", 256 << 10, b"DAXCRYPT"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("a LUKS2 volume (secondary header)", 0x4000, b"SKUL\xba\xbe"),
    ("a GPT partition table", 512, b"EFI PART"),
    ("a GPT partition table", 4096, b"EFI PART"),
    ("an ext2, ext3 or ext4 filesystem", 0x438, b"\x53\xef"),
    ("an XFS filesystem", 0, b"XFSB"),
    ("a Btrfs filesystem", 0x10040, b"_BHRfS_M"),
    ("an F2FS filesystem", 0x400, b"\x10\x20\xf5\xf2"),
    ("a bcachefs or bcache device", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    ("a NILFS2 filesystem", 0x406, b"\x34\x34"),
    ("an EROFS filesystem", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("a SquashFS filesystem", 0, b"hsqs"),
    ("an ISO 9660 filesystem", 0x8001, b"CD001"),
    ("an NTFS filesystem", 3, b"NTFS    "),
    ("an exFAT filesystem", 3, b"EXFAT   "),
    ("a FAT filesystem", 0x52, b"FAT32   "),
    ("a FAT filesystem", 0x36, b"FAT16   "),
    ("a FAT filesystem", 0x36, b"FAT12   "),
    ("swap space", 4086, b"SWAPSPACE2"),
    ("an LVM physical volume", 512, b"LABELONE"),
    ("an LVM physical volume", 0, b"LABELONE"),
    ("an MD RAID member", 4096, b"\xfc\x4e\x2b\xa9"),
    ("an MD RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    ("a QCOW2 image", 0, b"QFI\xfb"),
    ("a pmem namespace info block", 4096, b"NVDIMM_PFN_INFO"),
    ("a pmem namespace info block", 4096, b"NVDIMM_DAX_INFO"),
    ("an MBR partition table or boot sector", 510, b"\x55\xaa"),
];

/// Whatever looks like data in the header area at `base`; `None` when it is all zero.
///
/// # Errors
///
/// A [`MediaError`] when the media cannot be read.
pub fn signature_found(backing: &Backing, base: u64) -> Result<Option<Signature>, MediaError> {
    if let Some(name) = known_format(backing, base)? {
        return Ok(Some(Signature::Known(name)));
    }
    let head = base..base.saturating_add(HEADER_AREA_BYTES).min(backing.len_bytes());
    let nonzero = first_nonzero(backing, head)?;
    Ok(nonzero.map(|offset| Signature::NonZero { offset }))
}

/// What no ciphertext begins with: the signature of a key holder or of a partition table at the start of detached data, which
/// then is not the data of that header.
pub(super) fn foreign_beginning(backing: &Backing, start: u64) -> Result<Option<&'static str>, MediaError> {
    Ok(foreign_signature(backing, start)?.map(|(name, _)| name))
}

/// The same, and where in the backing the signature is.
pub(super) fn foreign_signature(
    backing: &Backing,
    start: u64,
) -> Result<Option<(&'static str, Range<u64>)>, MediaError> {
    Ok(known_signature(backing, start)?.filter(|(name, _)| is_telling(name)))
}

fn is_telling(name: &str) -> bool {
    ["a daxcrypt", "a LUKS", "a GPT"].iter().any(|telling| name.starts_with(telling))
}

/// The pages in the backing where such signatures are.
pub(super) fn telling_pages(backing: &Backing, start: u64) -> Vec<Range<u64>> {
    let places = KNOWN.iter().filter(|(name, ..)| is_telling(name)).map(|(_, offset, _)| start + offset);
    let mut pages: Vec<_> = places.map(|at| at - at % PAGE_BYTES..at - at % PAGE_BYTES + PAGE_BYTES).collect();
    pages.retain(|page| start <= page.start && page.end <= backing.len_bytes());
    pages.sort_unstable_by_key(|page| page.start);
    pages.dedup();
    pages
}

/// The name of the first known format whose signature is at its place.
pub(super) fn known_format(backing: &Backing, base: u64) -> Result<Option<&'static str>, MediaError> {
    Ok(known_signature(backing, base)?.map(|(name, _)| name))
}

fn known_signature(backing: &Backing, base: u64) -> Result<Option<(&'static str, Range<u64>)>, MediaError> {
    let head_bytes = backing.len_bytes().saturating_sub(base).min(HEADER_AREA_BYTES);
    for &(name, offset, signature) in KNOWN {
        let end = offset + signature.len() as u64;
        if end > head_bytes {
            continue;
        }
        let mut found = [0; 16];
        let found = &mut found[..signature.len()];
        backing.read(base + offset..base + end, |source| source.copy_to(found))?;
        if found == signature {
            return Ok(Some((name, base + offset..base + end)));
        }
    }
    Ok(None)
}
