//! Any bytes as a namespace header, with length and checksum made right: opened or refused, and never taken for genuine.
#![no_main]

mod media;

use std::sync::OnceLock;

use daxcrypt::namespace::{Credential, LockedNamespace};
use daxcrypt::pmem::Access;
use daxcrypt::secret::SecretBytes;
use libfuzzer_sys::fuzz_target;
use media::Media;

/// Bytes before the JSON text, where its length and the checksum lie (format.md, "Header copy").
const PREFIX_BYTES: usize = 128;
const JSON_LENGTH_AT: usize = 16;
const CHECKSUM_AT: usize = 20;
/// Where the second copy lies.
const SECOND_COPY_AT: u64 = 256 << 10;

static MEDIA: OnceLock<Media> = OnceLock::new();

fn media() -> Media {
    Media::new("header", 4 << 20)
}

fuzz_target!(|data: &[u8]| {
    if data.len() < PREFIX_BYTES || data.len() > 60 << 10 {
        return;
    }
    let mut copy = data.to_vec();
    let json_bytes = u32::try_from(data.len() - PREFIX_BYTES).unwrap();
    copy[JSON_LENGTH_AT..][..4].copy_from_slice(&json_bytes.to_le_bytes());
    copy[CHECKSUM_AT..][..4].fill(0);
    let checksum = crc32fast::hash(&copy);
    copy[CHECKSUM_AT..][..4].copy_from_slice(&checksum.to_le_bytes());
    let media = MEDIA.get_or_init(media);
    media.put(&copy, 0);
    media.put(&copy, SECOND_COPY_AT);
    if let Ok(locked) = LockedNamespace::open(media.open(Access::ReadOnly)) {
        let stranger = Credential::KeyFile(SecretBytes::copy_of(&[9; 32]));
        assert!(locked.unlock_key(&stranger).is_err(), "a key that was never added opens a slot");
    }
});
