//! A header that version 1 wrote once must open for ever.
//!
//! `tests/golden/header-v1.bin` holds copy A up to the end of its metadata. It was written by the ignored test below,
//! which is run by hand only when a format version is added.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use daxcrypt::namespace::{Credential, DataUnit, FormatOptions, KdfCost, LockedNamespace, Site, format};
use daxcrypt::pmem::{Access, Allocation, Backing};
use daxcrypt::secret::{SecretBytes, VolumeKey};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/header-v1.bin");
/// A detached header from before data had tags.
const DETACHED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/header-v1-detached.bin");

fn credentials() -> [Credential; 2] {
    [
        Credential::Passphrase(SecretBytes::copy_of(b"golden passphrase")),
        Credential::KeyFile(SecretBytes::copy_of(&[0x47; 48])),
    ]
}

fn volume_key_bytes() -> Vec<u8> {
    (0x40..0x60).collect()
}

#[test]
fn the_golden_header_opens_with_both_of_its_slots_from_either_copy() {
    let golden = fs::read(GOLDEN).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("golden.img");
    for place in [0, 256 << 10] {
        let mut media = vec![0; 4 << 20];
        media[place..place + golden.len()].copy_from_slice(&golden);
        fs::write(&path, media).unwrap();
        for (slot, credential) in (0..).zip(credentials()) {
            let backing = Arc::new(Backing::open(&path, Access::ReadOnly).unwrap());
            let locked = LockedNamespace::open(backing).unwrap();
            assert_eq!(locked.header().label, "golden");
            let namespace = locked.unlock_key(&credential).unwrap();
            assert_eq!(namespace.slot_id(), Some(slot));
            assert_eq!(namespace.volume_key().bytes(), volume_key_bytes());
            assert_eq!((namespace.geometry().size_bytes(), namespace.geometry().unit_bytes()), (1 << 20, 512));
        }
    }
}

#[test]
#[ignore = "writes the golden file anew"]
fn write_the_golden_header() {
    assert!(!Path::new(GOLDEN).exists(), "the golden header is never replaced");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("golden.img");
    let backing = Arc::new(Backing::create(&path, 4 << 20, Allocation::Sparse).unwrap());
    let options = FormatOptions {
        cipher: daxcrypt::namespace::Cipher::Aes128Xts,
        unit: DataUnit::Bytes512,
        label: "golden".to_owned(),
        kdf_cost: KdfCost { memory_kib: 64, time: 2, lanes: 2 },
        size_bytes: Some(1 << 20),
        volume_key: Some(VolumeKey::new(SecretBytes::copy_of(&volume_key_bytes())).unwrap()),
        ..FormatOptions::default()
    };
    let [passphrase, key_file] = credentials();
    let mut namespace = format(backing, options, &passphrase).unwrap();
    namespace.add_slot(None, "file", &key_file, KdfCost::LEAST).unwrap();
    drop(namespace);
    let media = fs::read(&path).unwrap();
    let end = media[..64 << 10].iter().rposition(|&byte| byte != 0).unwrap() + 1;
    fs::write(GOLDEN, &media[..end]).unwrap();
}

/// The golden detached header beside a data file of `data_bytes`, which nobody has written to.
fn detached(folder: &Path, data_bytes: u64) -> impl Fn() -> Site {
    let [data, header] = ["golden.img", "golden.header"].map(|name| folder.join(name));
    let mut media = fs::read(DETACHED).unwrap();
    media.resize(2 << 20, 0);
    fs::write(&header, media).unwrap();
    fs::write(&data, vec![0x5a; usize::try_from(data_bytes).unwrap()]).unwrap();
    move || {
        let [data, header] = [&data, &header].map(|path| Arc::new(Backing::open(path, Access::ReadWrite).unwrap()));
        Site::whole(data).with_header(Some(header))
    }
}

/// It knows of no tag, and opens as ever; who accepts the data binds it where there is room behind it.
#[test]
fn a_golden_detached_header_from_before_tags_opens_and_is_bound_when_asked() {
    const SIZE: u64 = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let open = |site: Site| {
        let locked = LockedNamespace::open_in(site).unwrap();
        assert_eq!((locked.header().label.as_str(), locked.header().size_bytes), ("golden", SIZE));
        locked.unlock_key(&credentials()[0]).unwrap()
    };
    for (data_bytes, bound) in [(SIZE, None), (SIZE + 4095, None), (SIZE + 4096, Some(SIZE))] {
        let site = detached(folder.path(), data_bytes);
        assert_eq!(open(site()).header().tag_offset, None);
        let data = || fs::read(folder.path().join("golden.img")).unwrap();
        assert!(data().iter().all(|&byte| byte == 0x5a));
        assert_eq!(open(site().accepting_data(true)).header().tag_offset, bound);
        let size = usize::try_from(SIZE).unwrap();
        assert!(data()[..size].iter().all(|&byte| byte == 0x5a), "the data is as it was");
        assert_eq!(data()[size..].iter().all(|&byte| byte == 0x5a), bound.is_none());
        assert_eq!(open(site()).header().tag_offset, bound);
    }
}

#[test]
#[ignore = "writes the golden file anew, with a program from before data had tags"]
fn write_the_golden_detached_header() {
    assert!(!Path::new(DETACHED).exists(), "the golden header is never replaced");
    let directory = tempfile::tempdir().unwrap();
    let [data, header] = ["golden.img", "golden.header"].map(|name| directory.path().join(name));
    let create = |path, len| Arc::new(Backing::create(path, len, Allocation::Sparse).unwrap());
    let options = FormatOptions {
        label: "golden".to_owned(),
        kdf_cost: KdfCost { memory_kib: 64, time: 2, lanes: 2 },
        header: Some(create(&header, 2 << 20)),
        ..FormatOptions::default()
    };
    drop(format(create(&data, 1 << 20), options, &credentials()[0]).unwrap());
    let media = fs::read(&header).unwrap();
    let end = media[..64 << 10].iter().rposition(|&byte| byte != 0).unwrap() + 1;
    fs::write(DETACHED, &media[..end]).unwrap();
}
