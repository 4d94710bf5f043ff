//! A partition table with any bytes changed and the checksums made right: opened or refused, and what is opened has
//! partitions that lie apart, and free places beside them.
#![no_main]

mod media;

use std::sync::OnceLock;

use daxcrypt::namespace::Region;
use daxcrypt::pmem::Access;
use libfuzzer_sys::fuzz_target;
use media::Media;

const DEVICE_BYTES: u64 = 16 << 20;
const SECTOR: usize = 512;
/// Header and entries of the primary table, which follow each other.
const TABLE_BYTES: usize = SECTOR + 128 * 128;
/// Where the checksums are in a header (UEFI specification, table 5-5), and its length.
const HEADER_CHECKSUM_AT: usize = 16;
const TABLE_CHECKSUM_AT: usize = 88;
const HEADER_BYTES: usize = 92;

static MEDIA: OnceLock<(Media, Vec<u8>)> = OnceLock::new();

/// A region in memory, and its table, which each execution changes.
fn media() -> (Media, Vec<u8>) {
    let media = Media::new("region", DEVICE_BYTES);
    let mut region = Region::create(media.open(Access::ReadWrite), SECTOR as u64).unwrap();
    region.add("a", 2 << 20..4 << 20).unwrap();
    region.add("b", 6 << 20..10 << 20).unwrap();
    drop(region);
    let table = media.bytes(TABLE_BYTES, SECTOR as u64);
    // The backup must not make up for what is refused.
    media.put(&[0; SECTOR], DEVICE_BYTES - SECTOR as u64);
    (media, table)
}

fuzz_target!(|data: &[u8]| {
    let (media, table) = MEDIA.get_or_init(media);
    let mut table = table.clone();
    // Three bytes are an edit: where, and what is added.
    for edit in data.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % (HEADER_BYTES + 512);
        let at = if at < HEADER_BYTES { at } else { SECTOR + at - HEADER_BYTES };
        table[at] = table[at].wrapping_add(edit[2]);
    }
    let checksum = crc32fast::hash(&table[SECTOR..]);
    table[TABLE_CHECKSUM_AT..][..4].copy_from_slice(&checksum.to_le_bytes());
    table[HEADER_CHECKSUM_AT..][..4].fill(0);
    let checksum = crc32fast::hash(&table[..HEADER_BYTES]);
    table[HEADER_CHECKSUM_AT..][..4].copy_from_slice(&checksum.to_le_bytes());
    media.put(&table, SECTOR as u64);
    if let Ok(region) = Region::open(media.open(Access::ReadOnly)) {
        let mut taken: Vec<_> = region.partitions().into_iter().map(|partition| partition.range).collect();
        taken.extend(region.free());
        taken.sort_by_key(|range| range.start);
        assert!(taken.iter().all(|range| range.start < range.end && range.end <= DEVICE_BYTES));
        assert!(taken.iter().zip(taken.iter().skip(1)).all(|(one, other)| one.end <= other.start), "{taken:?}");
    }
});
