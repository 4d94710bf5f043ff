//! The header as bytes, without `cryptsetup`; with it, see `tests/luks2.rs`.

use std::sync::Arc;

use super::header::{self, HeaderCopy};
use super::metadata::Metadata;
use super::{ExportError, ExportOptions, Locked, OpenError, SlotKdf, UnlockError, export};
use crate::namespace::{Credential, FormatOptions, KdfCost, Site, format};
use crate::pmem::{Backing, Granularity, sim::SimOptions};
use crate::secret::SecretBytes;

fn copy(json: &str) -> HeaderCopy {
    HeaderCopy {
        length_bytes: 16 << 10,
        sequence: 7,
        label: "tank".into(),
        uuid: "12345678-9abc-def0-1234-56789abcdef0".into(),
        subsystem: String::new(),
        json: json.as_bytes().to_vec(),
    }
}

fn media(bytes: Vec<u8>) -> Arc<Backing> {
    Arc::new(Backing::from_media(bytes, SimOptions::new(Granularity::Page)).0)
}

/// A header device with both copies of `{}`, and what reading it gives after `change`.
fn read_after(change: impl FnOnce(&mut Vec<u8>)) -> Result<header::Chosen, OpenError> {
    let mut bytes = header::encode(&copy("{}"), &[[1; 64], [2; 64]]);
    change(&mut bytes);
    header::read(&media(bytes), 0)
}

#[test]
fn both_copies_are_read_and_the_newer_one_counts() {
    let chosen = read_after(|_| ()).unwrap();
    assert_eq!(chosen.copy, copy("{}"));
    let chosen = read_after(|bytes| {
        let newer = HeaderCopy { sequence: 8, label: "newer".into(), ..copy("{}") };
        let newer = header::encode(&newer, &[[3; 64], [4; 64]]);
        bytes[16 << 10..].copy_from_slice(&newer[16 << 10..]);
    });
    assert_eq!(chosen.unwrap().copy.label, "newer");
}

#[test]
fn one_damaged_copy_is_enough_and_two_name_both_causes() {
    for at in [0, 6, 8, 16, 72, 104, 256, 448, 4096, 5000] {
        let chosen = read_after(|bytes| bytes[at] ^= 1).unwrap();
        assert_eq!(chosen.copy.sequence, 7, "byte {at}");
        assert!(matches!(chosen.states[0], crate::namespace::CopyState::Bad { .. }), "byte {at}");
        let second = (16 << 10) + at;
        let chosen = read_after(|bytes| bytes[second] ^= 1).unwrap();
        assert!(matches!(chosen.states[1], crate::namespace::CopyState::Bad { .. }), "byte {at}");
    }
    let error = read_after(|bytes| (bytes[5000], bytes[21000]) = (1, 1)).unwrap_err();
    assert!(matches!(error, OpenError::BothCopiesDamaged { .. }), "{error}");
    assert!(matches!(read_after(|bytes| bytes.fill(0)).unwrap_err(), OpenError::NotLuks));
    let luks1 = |bytes: &mut Vec<u8>| {
        bytes.fill(0);
        bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    };
    assert!(matches!(read_after(luks1).unwrap_err(), OpenError::Luks1));
}

/// A namespace with a detached header in simulated media, and its LUKS2 header.
fn exported(kdf: SlotKdf) -> (Arc<Backing>, Vec<u8>) {
    let data = media(vec![0; 1 << 20]);
    let options =
        FormatOptions { header: Some(media(vec![0; 2 << 20])), label: "tank".into(), ..FormatOptions::default() };
    let namespace = format(Arc::clone(&data), options, &key()).unwrap();
    (data, export(&namespace, &passphrase("let me in"), ExportOptions { kdf }).unwrap())
}

fn key() -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[7; 32]))
}

fn passphrase(text: &str) -> Credential {
    Credential::Passphrase(SecretBytes::copy_of(text.as_bytes()))
}

fn locked(data: &Arc<Backing>, header: &[u8]) -> Result<Locked, OpenError> {
    Locked::open(&Site::whole(Arc::clone(data)).with_header(Some(media(header.to_vec()))))
}

#[test]
fn what_is_exported_opens_with_its_passphrase_only() {
    for kdf in [SlotKdf::Pbkdf2 { iterations: 1000 }, SlotKdf::Argon2id(KdfCost::LEAST)] {
        let (data, header) = exported(kdf);
        let opened = locked(&data, &header).unwrap();
        assert_eq!((opened.info().label.as_str(), opened.info().unit_bytes), ("tank", 4096));
        let wrong = opened.unlock(&passphrase("let me out")).unwrap_err();
        assert!(matches!(wrong, UnlockError::WrongPassphrase { slots_tried: 1 }), "{wrong}");
        let unlocked = locked(&data, &header).unwrap().unlock(&passphrase("let me in")).unwrap();
        assert_eq!(unlocked.slot_id(), 0);
    }
}

#[test]
fn an_export_that_luks2_cannot_describe_is_refused() {
    let options = ExportOptions { kdf: SlotKdf::Pbkdf2 { iterations: 1000 } };
    let attached = format(media(vec![0; 4 << 20]), FormatOptions::default(), &key()).unwrap();
    assert!(matches!(export(&attached, &key(), options), Err(ExportError::NotDetached)));
    let options_detached =
        FormatOptions { header: Some(media(vec![0; 2 << 20])), base: 2 << 20, ..FormatOptions::default() };
    let moved = format(media(vec![0; 4 << 20]), options_detached, &key()).unwrap();
    assert!(matches!(export(&moved, &key(), options), Err(ExportError::FirstTweak { first_tweak: 4096 })));
    let few = ExportOptions { kdf: SlotKdf::Pbkdf2 { iterations: 999 } };
    let detached = FormatOptions { header: Some(media(vec![0; 2 << 20])), ..FormatOptions::default() };
    let namespace = format(media(vec![0; 4 << 20]), detached, &key()).unwrap();
    assert!(matches!(export(&namespace, &key(), few), Err(ExportError::Iterations { iterations: 999, .. })));
}

/// Metadata of the exported header with one text replaced.
fn metadata_with(from: &str, to: &str) -> Result<Metadata, OpenError> {
    let (_, header) = exported(SlotKdf::Pbkdf2 { iterations: 1000 });
    let json = String::from_utf8(header[4096..16 << 10].to_vec()).unwrap();
    let json = json.trim_end_matches('\0');
    assert!(json.contains(from), "no {from} in {json}");
    Metadata::decode(json.replacen(from, to, 1).as_bytes(), 16 << 10)
}

#[test]
fn what_must_not_be_ignored_is_refused() {
    assert!(metadata_with("\"tokens\":{}", "\"tokens\":{ }").is_ok());
    let requirement = "\"config\":{\"requirements\":{\"mandatory\":[\"time-travel\"]},";
    let error = metadata_with("\"config\":{", requirement).unwrap_err();
    assert!(matches!(&error, OpenError::Requirement { name } if name == "time-travel"), "{error}");
    let error = metadata_with("\"config\":{", &requirement.replace("time-travel", "online-reencrypt-v2")).unwrap_err();
    assert!(matches!(error, OpenError::Reencryption), "{error}");
    for (from, to) in [
        ("\"type\":\"luks2\"", "\"type\":\"reencrypt\""),
        ("\"json_size\":\"12288\"", "\"json_size\":\"12287\""),
        ("\"keyslots_size\":\"16744448\"", "\"keyslots_size\":\"16744447\""),
        ("\"keyslots_size\":\"16744448\"", "\"keyslots_size\":\"-1\""),
        ("\"offset\":\"32768\"", "\"offset\":\"28672\""),
        ("\"offset\":\"32768\"", "\"offset\":\"18446744073709551615\""),
        ("\"size\":\"258048\"", "\"size\":\"99999999999999999999\""),
        ("\"keyslots\":[\"0\"]", "\"keyslots\":[\"5\"]"),
        ("\"segments\":[\"0\"]", "\"segments\":[\"5\"]"),
        (",\"tokens\":{}", ""),
        ("\"keyslots\":{\"0\"", "\"keyslots\":{\"32\""),
        ("\"keyslots\":{\"0\"", "\"keyslots\":{\"00\""),
    ] {
        assert!(metadata_with(from, to).is_err(), "{to}");
    }
}
