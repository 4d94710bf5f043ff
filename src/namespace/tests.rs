//! The header codec and the slots, attacked field by field.

use proptest::prelude::*;
use serde_json::{Value, json};
use uuid::Uuid;

use super::area::{CopyName, choose};
use super::geometry::DataUnit;
use super::header::{COPY_BYTES, HeaderCopy, MacKey, encode};
use super::metadata::{CipherName, Metadata};
use super::slot::{Purpose, Slot};
use super::{Cipher, CopyFault, Credential, Kdf, KdfCost, MetadataError, OpenError};
use crate::secret::{SecretBytes, VolumeKey};

type Image = Box<[u8; COPY_BYTES]>;

const PREFIX_BYTES: usize = 128;

fn volume_key() -> VolumeKey {
    VolumeKey::new(SecretBytes::copy_of(&(0..64).collect::<Vec<u8>>())).unwrap()
}

fn credential(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

fn passphrase() -> Credential {
    Credential::Passphrase(SecretBytes::copy_of(b"correct horse"))
}

/// A header with one slot of each kind.
fn metadata() -> Metadata {
    let mut metadata = Metadata {
        requirements: Vec::new(),
        uuid: Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef),
        label: "vault".to_owned(),
        cipher: CipherName::AesXtsPlain64,
        key_bits: Cipher::Aes256Xts,
        unit_bytes: DataUnit::Bytes4096,
        base: 0,
        data_offset: 2 << 20,
        size_bytes: 2 << 20,
        bound_address: None,
        detached: false,
        ephemeral: false,
        unclean: false,
        discards: false,
        slots: Vec::new(),
        tag_offset: None,
        wiping: false,
        transform: None,
    };
    let purpose = metadata.purpose();
    let kdf = Kdf::Argon2id(KdfCost::LEAST);
    metadata.slots = vec![
        Slot::create(0, "", kdf, &passphrase(), &purpose, &volume_key()).unwrap(),
        Slot::create(3, "", Kdf::HkdfSha256, &credential(1), &purpose, &volume_key()).unwrap(),
    ];
    metadata
}

fn mac_key(metadata: &Metadata) -> MacKey {
    MacKey::new(&volume_key(), metadata.uuid)
}

fn image_of(metadata: &Metadata, sequence: u64) -> Image {
    encode(sequence, metadata, &mac_key(metadata)).unwrap()
}

fn number_at(image: &Image, offset: usize) -> usize {
    u32::from_le_bytes(image[offset..offset + 4].try_into().unwrap()) as usize
}

/// Makes the checksum right again, as a forger would; written from `format.md`, not from the codec.
fn fix_crc(image: &mut Image) {
    let len_bytes = number_at(image, 12) + number_at(image, 16);
    image[20..24].fill(0);
    let crc = crc32fast::hash(&image[..len_bytes]);
    image[20..24].copy_from_slice(&crc.to_le_bytes());
}

/// The image with the metadata edited, lengths and checksum right, and the MAC as it was.
fn forged(image: &Image, edit: impl FnOnce(&mut Value)) -> Image {
    let mut image = image.clone();
    let len_bytes = number_at(&image, 16);
    let mut value: Value = serde_json::from_slice(&image[PREFIX_BYTES..PREFIX_BYTES + len_bytes]).unwrap();
    edit(&mut value);
    let json = serde_json::to_vec(&value).unwrap();
    image[PREFIX_BYTES..].fill(0);
    image[PREFIX_BYTES..PREFIX_BYTES + json.len()].copy_from_slice(&json);
    image[16..20].copy_from_slice(&u32::try_from(json.len()).unwrap().to_le_bytes());
    fix_crc(&mut image);
    image
}

fn fault(edit: impl FnOnce(&mut Value)) -> MetadataError {
    match HeaderCopy::decode(&forged(&image_of(&metadata(), 1), edit)) {
        Err(CopyFault::Metadata(error)) => error,
        other => panic!("not a fault of the metadata: {other:?}"),
    }
}

#[test]
fn decoding_gives_what_was_encoded_and_it_is_genuine() {
    let metadata = metadata();
    let copy = HeaderCopy::decode(&image_of(&metadata, 7)).unwrap();
    assert_eq!((copy.sequence, &copy.metadata), (7, &metadata));
    assert!(copy.is_genuine(&mac_key(&metadata)));
    let other = VolumeKey::generate(64).unwrap();
    assert!(!copy.is_genuine(&MacKey::new(&other, metadata.uuid)));
}

#[test]
fn every_field_that_is_edited_with_its_checksum_fixed_fails_the_mac() {
    let image = image_of(&metadata(), 7);
    let edits = [
        ("/uuid", json!("00000000-0000-4000-8000-000000000000")),
        ("/label", json!("valut")),
        ("/key_bits", json!(256)),
        ("/unit_bytes", json!(512)),
        ("/base", json!(2 << 20)),
        ("/data_offset", json!(4 << 20)),
        ("/size_bytes", json!(1 << 20)),
        ("/bound_address", json!(4096)),
        ("/detached", json!(true)),
        ("/unclean", json!(true)),
        ("/discards", json!(true)),
        ("/slots", json!([])),
        ("/slots/0/id", json!(1)),
        ("/slots/0/label", json!("x")),
        ("/slots/0/kdf/argon2id/memory_kib", json!(16)),
        ("/slots/0/kdf/argon2id/time", json!(2)),
        ("/slots/1/salt", json!("00".repeat(32))),
        ("/slots/1/nonce", json!("00".repeat(12))),
        ("/slots/1/wrapped", json!("00".repeat(80))),
        ("/slots/1/rewrap_nonce", json!("00".repeat(12))),
        ("/slots/1/rewrap", json!("00".repeat(48))),
    ];
    for (pointer, value) in edits {
        let edited = forged(&image, |metadata| *metadata.pointer_mut(pointer).unwrap() = value);
        match HeaderCopy::decode(&edited) {
            Ok(copy) => assert!(!copy.is_genuine(&mac_key(&metadata())), "{pointer}"),
            Err(fault) => assert_eq!(pointer, "/key_bits", "{fault}"),
        }
    }
    let mut edited = image.clone();
    edited[24] ^= 1;
    fix_crc(&mut edited);
    let copy = HeaderCopy::decode(&edited).unwrap();
    assert_eq!(copy.sequence, 6);
    assert!(!copy.is_genuine(&mac_key(&metadata())));
}

#[test]
fn a_tag_is_behind_detached_data_that_keeps_its_key_or_the_header_is_refused() {
    let end = 4 << 20;
    let detached = Metadata { detached: true, tag_offset: Some(end), ..metadata() };
    assert!(detached.check().is_ok());
    let refused = [
        Metadata { tag_offset: Some(end - 1), ..detached.clone() },
        Metadata { detached: false, ..detached.clone() },
        Metadata { ephemeral: true, slots: Vec::new(), ..detached.clone() },
        Metadata { size_bytes: u64::MAX, ..detached },
    ];
    for metadata in refused {
        assert!(matches!(metadata.check(), Err(MetadataError::TagPlace { .. })), "{metadata:?}");
    }
}

#[test]
fn any_flipped_bit_of_prefix_and_metadata_is_noticed() {
    let image = image_of(&metadata(), 7);
    let len_bytes = PREFIX_BYTES + number_at(&image, 16);
    for offset in 0..len_bytes {
        for bit in [0, 7] {
            let mut flipped = image.clone();
            flipped[offset] ^= 1 << bit;
            assert!(HeaderCopy::decode(&flipped).is_err(), "byte {offset}, bit {bit}");
        }
    }
}

#[test]
fn a_newer_copy_is_not_passed_over_for_an_older_one_but_a_corrupt_one_is() {
    let image = image_of(&metadata(), 7);
    let mut future = image.clone();
    future[8] = 2;
    let corrupt = future.clone();
    fix_crc(&mut future);
    let refused = choose(HeaderCopy::decode(&image), HeaderCopy::decode(&future)).unwrap_err();
    assert!(matches!(refused, OpenError::FutureVersion { found: 2, supported: 1 }), "{refused}");
    let chosen = choose(HeaderCopy::decode(&image), HeaderCopy::decode(&corrupt)).unwrap();
    assert_eq!(chosen.name, CopyName::A);

    let requires = forged(&image, |metadata| {
        metadata["requirements"] = json!(["time-travel"]);
        metadata["flux"] = json!(1.21);
    });
    let refused = choose(HeaderCopy::decode(&requires), HeaderCopy::decode(&image)).unwrap_err();
    assert!(matches!(&refused, OpenError::Requirement { name } if name == "time-travel"), "{refused}");
}

#[test]
fn the_greater_sequence_number_wins() {
    let (older, newer) = (image_of(&metadata(), 7), image_of(&metadata(), 8));
    let winner = |a, b| choose(HeaderCopy::decode(a), HeaderCopy::decode(b)).unwrap().name;
    assert_eq!(winner(&older, &newer), CopyName::B);
    assert_eq!(winner(&newer, &older), CopyName::A);
    assert_eq!(winner(&newer, &newer), CopyName::A);
}

#[test]
fn each_impossible_prefix_has_its_fault() {
    let image = image_of(&metadata(), 7);
    let decoded = |offset: usize, bytes: &[u8], fix: bool| {
        let mut edited = image.clone();
        edited[offset..offset + bytes.len()].copy_from_slice(bytes);
        if fix {
            fix_crc(&mut edited);
        }
        HeaderCopy::decode(&edited).unwrap_err()
    };
    assert!(matches!(decoded(0, b"d", true), CopyFault::Magic));
    assert!(matches!(decoded(20, &[0; 4], false), CopyFault::Checksum { stored: 0, .. }));
    assert!(matches!(decoded(8, &[0; 4], true), CopyFault::Version { found: 0, supported: 1 }));
    assert!(matches!(decoded(100, &[1], true), CopyFault::Reserved { offset: 100 }));
    assert!(matches!(decoded(12, &[132, 0], true), CopyFault::Lengths { prefix_bytes: 132, .. }));
    for (offset, length) in [(12, 0_u32), (12, 63), (12, 4097), (12, u32::MAX), (16, 65409), (16, u32::MAX)] {
        assert!(matches!(decoded(offset, &length.to_le_bytes(), false), CopyFault::Lengths { .. }), "{length}");
    }
}

#[test]
fn each_impossible_metadata_has_its_fault() {
    assert!(matches!(fault(|m| m["cipher"] = json!("null")), MetadataError::Json(_)));
    assert!(matches!(fault(|m| m["extra"] = json!(0)), MetadataError::Json(_)));
    assert!(matches!(fault(|m| m["size_bytes"] = json!(-1)), MetadataError::Json(_)));
    assert!(matches!(fault(|m| m["unit_bytes"] = json!(1024)), MetadataError::Json(_)));
    assert!(matches!(fault(|m| m["slots"][0]["salt"] = json!("00")), MetadataError::Json(_)));
    assert!(matches!(fault(|m| m["label"] = json!("x".repeat(65))), MetadataError::LabelLength { len_bytes: 65, .. }));
    assert!(matches!(fault(|m| m["label"] = json!("\u{1b}[2J")), MetadataError::LabelCharacter { code_point: 27 }));
    assert!(matches!(fault(|m| m["slots"][1]["id"] = json!(0)), MetadataError::SlotNumber { id: 0, .. }));
    assert!(matches!(fault(|m| m["slots"][1]["id"] = json!(32)), MetadataError::SlotNumber { id: 32, .. }));
    assert!(matches!(fault(|m| m["ephemeral"] = json!(true)), MetadataError::EphemeralWithSlots { slot_count: 2 }));
    let short = fault(|m| m["slots"][1]["wrapped"] = json!("00".repeat(79)));
    assert!(matches!(short, MetadataError::SlotLength { id: 3, len_bytes: 79, expected_bytes: 80 }));
    let many = fault(|m| m["slots"] = Value::Array(vec![m["slots"][1].clone(); 33]));
    assert!(matches!(many, MetadataError::SlotCount { slot_count: 33, .. }));
    for (name, value) in [("memory_kib", (4 << 20) + 1), ("memory_kib", 7), ("time", 1025), ("lanes", 65)] {
        let cost = fault(|m| m["slots"][0]["kdf"]["argon2id"][name] = json!(value));
        assert!(matches!(cost, MetadataError::SlotCost { id: 0, .. }), "{name}: {cost}");
    }
}

#[test]
fn a_slot_opens_for_exactly_its_purpose() {
    let metadata = metadata();
    let purpose = metadata.purpose();
    let slot = &metadata.slots[1];
    assert_eq!(&*slot.open(&credential(1), &purpose).unwrap().unwrap(), volume_key().bytes());
    assert!(slot.open(&credential(2), &purpose).unwrap().is_none());
    let changes: [&dyn Fn(&mut Purpose); 8] = [
        &|p| p.uuid = Uuid::nil(),
        &|p| p.cipher = Cipher::Aes128Xts,
        &|p| p.placement.base = 2 << 20,
        &|p| p.placement.data_offset = 4 << 20,
        &|p| p.placement.size_bytes = 4096,
        &|p| p.placement.unit = DataUnit::Bytes512,
        &|p| p.placement.bound_address = Some(0),
        &|p| p.placement.detached = true,
    ];
    for (index, change) in changes.into_iter().enumerate() {
        let mut other = purpose;
        change(&mut other);
        assert!(slot.open(&credential(1), &other).unwrap().is_none(), "change {index}");
    }
    let renumbered = Slot { id: 4, ..slot.clone() };
    assert!(renumbered.open(&credential(1), &purpose).unwrap().is_none());
}

#[test]
fn a_slot_follows_to_a_new_purpose_and_key_without_its_credential() {
    let metadata = metadata();
    let old = metadata.purpose();
    let mut new = old;
    new.placement.base = 2 << 20;
    let new_key = VolumeKey::generate(64).unwrap();
    let slot = &metadata.slots[0];
    let moved = slot.rewrapped(&volume_key(), &old, &new_key, &new).unwrap().unwrap();
    assert_eq!(&*moved.open(&passphrase(), &new).unwrap().unwrap(), new_key.bytes());
    assert!(moved.open(&passphrase(), &old).unwrap().is_none());
    assert!(slot.rewrapped(&new_key, &old, &new_key, &new).unwrap().is_none());
}

proptest! {
    #[test]
    fn no_bytes_make_decoding_panic(head in prop::collection::vec(any::<u8>(), 0..400), magic: bool, fix: bool) {
        let mut image: Image = vec![0; COPY_BYTES].into_boxed_slice().try_into().unwrap();
        image[..head.len()].copy_from_slice(&head);
        if magic {
            image[..8].copy_from_slice(b"DAXCRYPT");
            image[8..20].copy_from_slice(&[1, 0, 0, 0, 128, 0, 0, 0, 200, 0, 0, 0]);
            if fix {
                fix_crc(&mut image);
            }
        }
        let _ = HeaderCopy::decode(&image);
    }

    #[test]
    fn no_mutation_makes_decoding_panic_or_passes_the_mac(
        changes in prop::collection::vec((0..1200_usize, any::<u8>()), 1..8),
    ) {
        let original = metadata();
        let image = image_of(&original, 7);
        let mut mutated = image.clone();
        for (offset, byte) in changes {
            mutated[offset] = byte;
        }
        let lengths_kept = mutated[12..20] == image[12..20];
        if lengths_kept {
            fix_crc(&mut mutated);
        }
        if let Ok(copy) = HeaderCopy::decode(&mutated) {
            let covered = PREFIX_BYTES + number_at(&image, 16);
            let same = mutated[..covered] == image[..covered];
            prop_assert_eq!(copy.is_genuine(&mac_key(&original)), same);
        }
    }

    #[test]
    fn every_valid_metadata_survives_encoding(
        label in "[^\\p{Cc}]{0,16}", base: u64, data_offset: u64, size_bytes: u64, bound_address: Option<u64>,
        flags in any::<[bool; 3]>(), sequence: u64,
    ) {
        let [detached, unclean, large] = flags;
        let unit_bytes = if large { DataUnit::Bytes4096 } else { DataUnit::Bytes512 };
        let original = Metadata {
            label, base, data_offset, size_bytes, bound_address, detached, unclean, unit_bytes, ..metadata()
        };
        let copy = HeaderCopy::decode(&image_of(&original, sequence)).unwrap();
        prop_assert_eq!((copy.sequence, copy.metadata), (sequence, original));
    }
}
