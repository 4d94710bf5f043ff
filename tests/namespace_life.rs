//! The life of a namespace on real files: made, opened, unlocked, changed, moved, damaged.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use daxcrypt::namespace::{
    Cipher, CopyFault, Credential, DataUnit, FormatError, FormatOptions, GeometryError, KdfCost, LockedNamespace,
    Namespace, OpenError, RestoreError, Signature, Site, SlotError, UnlockError, UpdateError, format, format_ephemeral,
    open_backup, signature_found,
};
use daxcrypt::pmem::{Access, Allocation, Backing};
use daxcrypt::secret::SecretBytes;

const MIB: u64 = 1 << 20;
const COPY_B: usize = 256 << 10;

struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vault.img");
    Place { _directory: directory, path }
}

fn key_file(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

fn passphrase(text: &str) -> Credential {
    Credential::Passphrase(SecretBytes::copy_of(text.as_bytes()))
}

fn options() -> FormatOptions {
    FormatOptions { kdf_cost: KdfCost::LEAST, ..FormatOptions::default() }
}

fn made(path: &Path, credential: &Credential) -> Namespace {
    let backing = Backing::create(path, 4 * MIB, Allocation::Sparse).unwrap();
    format(Arc::new(backing), options(), credential).unwrap()
}

fn opened(path: &Path) -> Result<LockedNamespace, OpenError> {
    LockedNamespace::open(Arc::new(Backing::open(path, Access::ReadWrite).unwrap()))
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_was_formatted_unlocks_with_its_key_only() {
    for (credential, wrong) in [(key_file(1), key_file(2)), (passphrase("one"), passphrase("two"))] {
        let place = place();
        let namespace = made(&place.path, &credential);
        let key = namespace.volume_key().bytes().to_vec();
        drop(namespace);
        let refused = opened(&place.path).unwrap().unlock_key(&wrong).unwrap_err();
        assert!(matches!(refused, UnlockError::WrongCredential { slots_tried: 1 }), "{refused}");
        let namespace = opened(&place.path).unwrap().unlock_key(&credential).unwrap();
        assert_eq!(namespace.volume_key().bytes(), key);
        assert_eq!(namespace.geometry().size_bytes(), 2 * MIB);
        assert_eq!(namespace.cipher(), Cipher::Aes256Xts);
        let media = fs::read(&place.path).unwrap();
        assert!(!media.windows(32).any(|window| window == &key[..32] || window == &key[32..]));
    }
}

#[test]
fn a_credential_of_the_other_kind_is_told_so() {
    let place = place();
    drop(made(&place.path, &key_file(1)));
    let refused = opened(&place.path).unwrap().unlock_key(&passphrase("one")).unwrap_err();
    assert!(matches!(refused, UnlockError::NoSlotOfKind { passphrase_slots: 0, key_file_slots: 1 }), "{refused}");
}

#[test]
fn slots_come_change_and_go() {
    let place = place();
    let mut namespace = made(&place.path, &key_file(1));
    assert_eq!(namespace.add_slot(None, "desk", &passphrase("one"), KdfCost::LEAST).unwrap(), 1);
    assert_eq!(namespace.add_slot(Some(31), "", &key_file(3), KdfCost::LEAST).unwrap(), 31);
    let taken = namespace.add_slot(Some(1), "", &key_file(4), KdfCost::LEAST).unwrap_err();
    assert!(matches!(taken, UpdateError::SlotInUse { id: 1 }), "{taken}");
    let number = namespace.add_slot(Some(32), "", &key_file(4), KdfCost::LEAST).unwrap_err();
    assert!(matches!(number, UpdateError::SlotNumber { id: 32 }), "{number}");
    namespace.change_slot(1, &passphrase("two"), KdfCost::LEAST).unwrap();
    assert_eq!(namespace.header().slots[1].label, "desk");
    let before = fs::read(&place.path).unwrap();
    namespace.remove_slot(0, false).unwrap();
    let empty = namespace.remove_slot(0, false).unwrap_err();
    assert!(matches!(empty, UpdateError::SlotEmpty { id: 0 }), "{empty}");
    drop(namespace);
    assert!(opened(&place.path).unwrap().unlock_key(&key_file(1)).is_err());
    assert!(opened(&place.path).unwrap().unlock_key(&passphrase("one")).is_err());
    assert!(opened(&place.path).unwrap().unlock_slot(&passphrase("two"), 1).is_ok());
    assert!(opened(&place.path).unwrap().unlock_key(&key_file(3)).is_ok());

    // Nothing of the removed slot is left: its salt, the first hexadecimal value of the first slot, is gone.
    let salt_at = before.windows(8).position(|window| window == b"\"salt\":\"").unwrap() + 8;
    let salt = &before[salt_at..salt_at + 64];
    let media = fs::read(&place.path).unwrap();
    assert!(!media.windows(64).any(|window| window == salt));
}

#[test]
fn the_last_slot_goes_only_by_force() {
    let place = place();
    let mut namespace = made(&place.path, &key_file(1));
    let refused = namespace.remove_slot(0, false).unwrap_err();
    assert!(matches!(refused, UpdateError::LastSlot { id: 0 }), "{refused}");
    namespace.remove_slot(0, true).unwrap();
    drop(namespace);
    let erased = opened(&place.path).unwrap().unlock_key(&key_file(1)).unwrap_err();
    assert!(matches!(erased, UnlockError::Erased), "{erased}");
}

#[test]
fn thirty_two_slots_fit_and_no_more() {
    let place = place();
    let mut namespace = made(&place.path, &key_file(0));
    for id in 1..32 {
        let label = "\"".repeat(64);
        assert_eq!(namespace.add_slot(None, &label, &key_file(id), KdfCost::LEAST).unwrap(), u32::from(id));
    }
    let full = namespace.add_slot(None, "", &key_file(99), KdfCost::LEAST).unwrap_err();
    assert!(matches!(full, UpdateError::SlotsFull), "{full}");
    drop(namespace);
    assert_eq!(opened(&place.path).unwrap().unlock_key(&key_file(31)).unwrap().slot_id(), Some(31));
}

#[test]
fn a_new_size_keeps_every_slot() {
    let place = place();
    let mut namespace = made(&place.path, &key_file(1));
    namespace.add_slot(None, "", &passphrase("one"), KdfCost::LEAST).unwrap();
    let refused = namespace.resize(MIB, false).unwrap_err();
    assert!(
        matches!(refused, UpdateError::Shrinks { old_bytes, new_bytes } if old_bytes == 2 * MIB && new_bytes == MIB)
    );
    let refused = namespace.resize(2 * MIB + 4096, false).unwrap_err();
    assert!(matches!(refused, UpdateError::Geometry(GeometryError::DoesNotFit { .. })), "{refused}");
    namespace.resize(MIB, true).unwrap();
    assert_eq!(namespace.geometry().size_bytes(), MIB);
    drop(namespace);
    for credential in [key_file(1), passphrase("one")] {
        let namespace = opened(&place.path).unwrap().unlock_key(&credential).unwrap();
        assert_eq!(namespace.geometry().size_bytes(), MIB);
    }
}

#[test]
fn one_damaged_copy_is_survived_and_repaired_by_the_next_opening_for_writing() {
    for (damaged, name) in [(200, 0), (COPY_B + 200, 1)] {
        let place = place();
        drop(made(&place.path, &key_file(1)));
        edit(&place.path, |bytes| bytes[damaged] ^= 1);
        let locked = opened(&place.path).unwrap();
        let json = serde_json::to_value(locked.header()).unwrap();
        assert!(json["copies"][name]["bad"]["reason"].as_str().unwrap().contains("CRC-32"), "{json}");
        let mut namespace = locked.unlock_key(&key_file(1)).unwrap();
        let json = serde_json::to_value(namespace.header()).unwrap();
        assert_eq!([&json["copies"][0]["good"]["sequence"], &json["copies"][1]["good"]["sequence"]], [1, 1]);
        namespace.set_unclean(true).unwrap();
        drop(namespace);
        let locked = opened(&place.path).unwrap();
        assert!(locked.header().unclean);
        let json = serde_json::to_value(locked.header()).unwrap();
        assert_eq!([&json["copies"][0]["good"]["sequence"], &json["copies"][1]["good"]["sequence"]], [2, 2]);
    }
}

#[test]
fn both_copies_damaged_names_both_causes() {
    let place = place();
    drop(made(&place.path, &key_file(1)));
    edit(&place.path, |bytes| {
        bytes[0] = b'X';
        bytes[COPY_B + 300] ^= 0x10;
    });
    let refused = opened(&place.path).unwrap_err();
    assert!(
        matches!(&refused, OpenError::BothCopiesDamaged { a: CopyFault::Magic, b: CopyFault::Checksum { .. } }),
        "{refused}"
    );
    assert!(refused.to_string().contains("copy A: it does not begin with the daxcrypt magic; copy B: its CRC-32"));
}

#[test]
fn an_update_torn_at_any_byte_of_its_header_opens_as_old_or_new() {
    let place = place();
    let mut namespace = made(&place.path, &key_file(1));
    let old = fs::read(&place.path).unwrap();
    namespace.add_slot(None, "new", &key_file(2), KdfCost::LEAST).unwrap();
    drop(namespace);
    let new = fs::read(&place.path).unwrap();
    // The update wrote copy B, then copy A.
    let used = new[..COPY_B].iter().rposition(|&byte| byte != 0).unwrap() + 1;
    let mut seen = [0; 2];
    for (first, second) in [(COPY_B, None), (0, Some(COPY_B))] {
        let mut media = old.clone();
        if let Some(done) = second {
            media[done..done + used].copy_from_slice(&new[done..done + used]);
        }
        fs::write(&place.path, &media).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&place.path).unwrap();
        for torn in 0..=used {
            if let Some(last) = torn.checked_sub(1) {
                file.write_all_at(&new[first + last..=first + last], (first + last) as u64).unwrap();
            }
            // For reading only: whoever opens for writing finishes the update.
            let backing = Arc::new(Backing::open(&place.path, Access::ReadOnly).unwrap());
            let locked = LockedNamespace::open(backing).unwrap();
            let slots = locked.header().slots.len();
            locked.unlock_key(&key_file(u8::try_from(slots).unwrap())).unwrap();
            seen[slots - 1] += 1;
        }
    }
    assert_eq!(seen, [used, used + 2]);
}

#[test]
fn another_base_is_reported_as_relocated() {
    let place = place();
    drop(made(&place.path, &key_file(1)));
    edit(&place.path, |bytes| {
        let copy = bytes.clone();
        bytes.extend_from_slice(&copy);
    });
    let backing = Arc::new(Backing::open(&place.path, Access::ReadOnly).unwrap());
    assert!(LockedNamespace::open_at(Arc::clone(&backing), 0, 4 * MIB).is_ok());
    let refused = LockedNamespace::open_at(backing, 4 * MIB, 4 * MIB).unwrap_err();
    assert!(
        matches!(refused, OpenError::Relocated { header_base: 0, actual_base } if actual_base == 4 * MIB),
        "{refused}"
    );
}

#[test]
fn two_namespaces_share_a_backing() {
    let place = place();
    let backing = Arc::new(Backing::create(&place.path, 12 * MIB, Allocation::Sparse).unwrap());
    for (base, available_bytes) in [(MIB, 4 * MIB), (5 * MIB, 6 * MIB)] {
        let options = FormatOptions { base, available_bytes: Some(available_bytes), ..options() };
        let namespace = format(Arc::clone(&backing), options, &key_file(1)).unwrap();
        assert!(namespace.geometry().data_start().is_multiple_of(2 * MIB));
    }
    for (base, available_bytes) in [(MIB, 4 * MIB), (5 * MIB, 6 * MIB)] {
        let locked = LockedNamespace::open_at(Arc::clone(&backing), base, available_bytes).unwrap();
        assert_eq!(locked.unlock_key(&key_file(1)).unwrap().geometry().base(), base);
    }
}

#[test]
fn a_backing_that_shrank_or_holds_no_namespace_is_refused() {
    let place = place();
    drop(made(&place.path, &key_file(1)));
    edit(&place.path, |bytes| bytes.truncate(3 << 20));
    let refused = opened(&place.path).unwrap_err();
    assert!(matches!(refused, OpenError::Geometry(GeometryError::DoesNotFit { .. })), "{refused}");
    edit(&place.path, |bytes| bytes.truncate(1 << 20));
    assert!(matches!(opened(&place.path).unwrap_err(), OpenError::TooSmall { .. }));
    fs::write(&place.path, vec![0; 4 << 20]).unwrap();
    assert!(matches!(opened(&place.path).unwrap_err(), OpenError::NotANamespace { found: None }));
    edit(&place.path, |bytes| bytes[512..520].copy_from_slice(b"EFI PART"));
    let refused = opened(&place.path).unwrap_err();
    assert!(matches!(refused, OpenError::NotANamespace { found: Some(Signature::Known("a GPT partition table")) }));
}

#[test]
fn what_looks_like_data_is_found_before_formatting() {
    let place = place();
    let backing = || Arc::new(Backing::open(&place.path, Access::ReadOnly).unwrap());
    fs::write(&place.path, vec![0; 4 << 20]).unwrap();
    assert_eq!(signature_found(&backing(), 0).unwrap(), None);
    edit(&place.path, |bytes| bytes[(2 << 20) - 1] = 1);
    assert_eq!(signature_found(&backing(), 0).unwrap(), Some(Signature::NonZero { offset: 2 * MIB - 1 }));
    edit(&place.path, |bytes| bytes[..6].copy_from_slice(b"LUKS\xba\xbe"));
    assert_eq!(signature_found(&backing(), 0).unwrap(), Some(Signature::Known("a LUKS volume")));
    fs::write(&place.path, b"tiny").unwrap();
    assert_eq!(signature_found(&backing(), 0).unwrap(), Some(Signature::NonZero { offset: 0 }));
    fs::remove_file(&place.path).unwrap();
    drop(made(&place.path, &key_file(1)));
    assert_eq!(signature_found(&backing(), 0).unwrap(), Some(Signature::Known("a daxcrypt namespace")));
}

#[test]
fn impossible_options_change_nothing() {
    let place = place();
    let backing = Arc::new(Backing::create(&place.path, 4 * MIB, Allocation::Sparse).unwrap());
    let refused = |options, credential: &Credential| format(Arc::clone(&backing), options, credential).unwrap_err();
    let odd = FormatOptions { size_bytes: Some(4096 + 512), ..options() };
    assert!(matches!(refused(odd, &key_file(1)), FormatError::Geometry(GeometryError::SizeNotInUnits { .. })));
    let large = FormatOptions { size_bytes: Some(3 * MIB), unit: DataUnit::Bytes512, ..options() };
    assert!(matches!(refused(large, &key_file(1)), FormatError::Geometry(GeometryError::DoesNotFit { .. })));
    let bound = FormatOptions { bind_address: true, ..options() };
    assert!(matches!(refused(bound, &key_file(1)), FormatError::NoPhysicalAddress));
    let label = FormatOptions { label: "\n".to_owned(), ..options() };
    assert!(matches!(refused(label, &key_file(1)), FormatError::Slot(SlotError::Label(_))));
    let cost = KdfCost { memory_kib: u32::MAX, ..KdfCost::LEAST };
    assert!(matches!(
        refused(FormatOptions { kdf_cost: cost, ..options() }, &key_file(1)),
        FormatError::Slot(SlotError::Cost(_))
    ));
    let short = Credential::KeyFile(SecretBytes::copy_of(&[1; 31]));
    assert!(matches!(refused(options(), &short), FormatError::Slot(_)));
    assert!(fs::read(&place.path).unwrap().iter().all(|&byte| byte == 0));
}

/// Restores `backup` at `site` with key file `key`; the outer error is the backup's, the inner one the key's.
fn restored(
    site: Site,
    backup: &[u8],
    even_other: bool,
    key: u8,
) -> Result<Result<Namespace, UnlockError>, RestoreError> {
    Ok(open_backup(site, backup, even_other)?.unlock_key(&key_file(key)).map(|mut namespace| {
        namespace.write_header(true).unwrap();
        namespace
    }))
}

#[test]
fn an_erased_namespace_is_zero_and_its_backup_brings_it_back() {
    let place = place();
    let mut namespace = made(&place.path, &key_file(1));
    namespace.set_unclean(true).unwrap();
    drop(namespace);
    let locked = opened(&place.path).unwrap();
    let backup = locked.backup().unwrap();
    locked.erase().unwrap();
    assert!(fs::read(&place.path).unwrap().iter().all(|&byte| byte == 0));
    assert!(matches!(opened(&place.path).unwrap_err(), OpenError::NotANamespace { found: None }));

    let backing = || Arc::new(Backing::open(&place.path, Access::ReadWrite).unwrap());
    let refused = restored(Site::whole(backing()), &backup, false, 2).unwrap().unwrap_err();
    assert!(matches!(refused, UnlockError::WrongCredential { .. }), "{refused}");
    let refused = restored(Site::whole(backing()), &backup[1..], false, 1).unwrap_err();
    assert!(matches!(refused, RestoreError::Length { len_bytes: 65535, .. }), "{refused}");
    let refused = restored(Site::part(backing(), 0, 3 * MIB), &backup, false, 1).unwrap_err();
    assert!(matches!(refused, RestoreError::Place(OpenError::Geometry(_))), "{refused}");
    assert!(fs::read(&place.path).unwrap().iter().all(|&byte| byte == 0));

    assert_eq!(restored(Site::whole(backing()), &backup, false, 1).unwrap().unwrap().header().sequence, 3);
    assert!(opened(&place.path).unwrap().unlock_key(&key_file(1)).is_ok());
}

#[test]
fn a_backup_of_another_namespace_needs_force_and_wins_over_newer_copies() {
    let (place, other) = (place(), place());
    drop(made(&place.path, &key_file(1)));
    let backup = opened(&place.path).unwrap().backup().unwrap();
    let mut namespace = made(&other.path, &key_file(2));
    for unclean in [true, false, true] {
        namespace.set_unclean(unclean).unwrap();
    }
    drop(namespace);
    let before = fs::read(&other.path).unwrap();
    let backing = || Arc::new(Backing::open(&other.path, Access::ReadWrite).unwrap());
    let refused = restored(Site::whole(backing()), &backup, false, 1).unwrap_err();
    assert!(matches!(refused, RestoreError::OtherNamespace { .. }), "{refused}");
    assert_eq!(fs::read(&other.path).unwrap(), before);
    assert_eq!(restored(Site::whole(backing()), &backup, true, 1).unwrap().unwrap().header().sequence, 5);
    assert!(opened(&other.path).unwrap().unlock_key(&key_file(1)).is_ok());
}

#[test]
fn an_ephemeral_namespace_has_another_key_each_time_and_no_slots() {
    let place = place();
    let backing = Backing::create(&place.path, 4 * MIB, Allocation::Sparse).unwrap();
    let first = format_ephemeral(Arc::new(backing), options()).unwrap().volume_key().bytes().to_vec();
    let refused = opened(&place.path).unwrap().unlock_key(&key_file(1)).unwrap_err();
    assert!(matches!(refused, UnlockError::Ephemeral), "{refused}");
    let before = fs::read(&place.path).unwrap();
    let mut namespace = opened(&place.path).unwrap().unlock_ephemeral().unwrap();
    assert_ne!(namespace.volume_key().bytes(), first);
    let refused = namespace.add_slot(None, "", &key_file(1), KdfCost::LEAST).unwrap_err();
    assert!(matches!(refused, UpdateError::Ephemeral), "{refused}");
    assert!(matches!(namespace.resize(MIB, true).unwrap_err(), UpdateError::Ephemeral));
    namespace.set_unclean(true).unwrap();
    drop(namespace);
    assert_eq!(fs::read(&place.path).unwrap(), before);
}

#[test]
fn a_namespace_with_a_key_is_not_opened_without_it() {
    let place = place();
    drop(made(&place.path, &key_file(1)));
    let refused = opened(&place.path).unwrap().unlock_ephemeral().unwrap_err();
    assert!(matches!(refused, UnlockError::NotEphemeral), "{refused}");
}
