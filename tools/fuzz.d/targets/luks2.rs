//! Any bytes as the metadata of a LUKS2 header, with the checksums made right: opened or refused, and nothing that a header
//! says leads outside of its device.
#![no_main]

mod media;

use std::sync::OnceLock;

use daxcrypt::luks2::Locked;
use daxcrypt::namespace::Site;
use daxcrypt::pmem::Access;
use libfuzzer_sys::fuzz_target;
use media::Media;
use sha2::{Digest, Sha256};

const DEVICE_BYTES: u64 = 4 << 20;
/// Bytes of a copy of the header, and where the metadata and the checksum are in it (specification, section 2.1).
const COPY_BYTES: usize = 16 << 10;
const METADATA_AT: usize = 4096;
const CHECKSUM_AT: usize = 448;

static MEDIA: OnceLock<Media> = OnceLock::new();

fn media() -> Media {
    Media::new("luks2", DEVICE_BYTES)
}

fn copy(metadata: &[u8], magic: &[u8; 6], offset: u64) -> Vec<u8> {
    let mut copy = vec![0; COPY_BYTES];
    copy[..6].copy_from_slice(magic);
    copy[7] = 2;
    copy[8..16].copy_from_slice(&(COPY_BYTES as u64).to_be_bytes());
    copy[72..78].copy_from_slice(b"sha256");
    copy[256..264].copy_from_slice(&offset.to_be_bytes());
    copy[METADATA_AT..][..metadata.len()].copy_from_slice(metadata);
    let checksum = Sha256::digest(&copy);
    copy[CHECKSUM_AT..][..32].copy_from_slice(&checksum);
    copy
}

fuzz_target!(|data: &[u8]| {
    if data.len() >= COPY_BYTES - METADATA_AT {
        return;
    }
    let media = MEDIA.get_or_init(media);
    media.put(&copy(data, b"LUKS\xba\xbe", 0), 0);
    media.put(&copy(data, b"SKUL\xba\xbe", COPY_BYTES as u64), COPY_BYTES as u64);
    if let Ok(locked) = Locked::open(&Site::whole(media.open(Access::ReadOnly))) {
        let geometry = locked.geometry();
        let data = geometry.physical_range(0..geometry.size_bytes()).unwrap();
        assert!(data.end <= DEVICE_BYTES, "data behind the end of the device");
    }
});
