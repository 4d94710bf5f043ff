//! `daxcrypt relocate`, `import` and `export`: every byte arrives, the old place forgets, and nothing half done opens.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{Bench, CHEAP_KDF, Run, noise, open_when_free};
use daxcrypt::namespace::{Credential, LockedNamespace};
use daxcrypt::pmem::{Access, Backing};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use rustix::process::{Pid, Signal, kill_process};

const KEY: [&str; 2] = ["--key-file", "vault.key"];
const HEADER: usize = 2 << 20;

fn volume(bench: &Bench, name: &str) -> Volume {
    let key = Credential::KeyFile(SecretBytes::copy_of(&fs::read(bench.path("vault.key")).unwrap()));
    let backing = open_when_free(&bench.path(name));
    LockedNamespace::open(Arc::new(backing)).unwrap().unlock(&key).unwrap()
}

fn content(bench: &Bench, name: &str) -> Vec<u8> {
    let volume = volume(bench, name);
    let mut all = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut all, 0).unwrap();
    all
}

fn vault(size: &str, more: &[&str]) -> (Bench, Vec<u8>) {
    let bench = Bench::new();
    bench.format("vault.img", size, more);
    let volume = volume(&bench, "vault.img");
    let bytes = noise(8, usize::try_from(volume.size()).unwrap());
    volume.write_at(&bytes, 0).unwrap();
    drop(volume);
    (bench, bytes)
}

/// Again as long as it is busy: a child that another test has just forked has our descriptors until it executes.
fn run(bench: &Bench, command: &[&str]) -> Run {
    for _ in 0..1000 {
        let run = bench.run(&[command, &KEY[..]].concat());
        if run.status.code() != Some(5) {
            return run;
        }
        thread::sleep(Duration::from_millis(2));
    }
    bench.run(&[command, &KEY[..]].concat())
}

#[test]
fn a_namespace_moves_to_another_file_and_the_old_one_is_erased() {
    let (bench, bytes) = vault("3M", &["--label", "tank", "--cipher", "aes-128-xts", "--unit", "512"]);
    let old = fs::read(bench.path("vault.img")).unwrap();
    let said = run(&bench, &["relocate", "vault.img", "new.img"]).succeeds();
    assert!(said.stdout.contains("verified; the source is erased"), "{}", said.stdout);
    assert!(content(&bench, "new.img") == bytes);
    let info = bench.run(&["info", "new.img"]).succeeds().stdout;
    assert!(info.contains("tank") && info.contains("aes-128-xts") && info.contains("512 bytes"), "{info}");
    run(&bench, &["key", "test", "vault.img"]).fails(3, &["not a daxcrypt namespace"]);
    let new = fs::read(bench.path("new.img")).unwrap();
    let same = old[HEADER..].chunks(16).zip(new[HEADER..].chunks(16)).filter(|(old, new)| old == new).count();
    assert_eq!(same, 0, "blocks of the same ciphertext");
}

#[test]
fn holes_get_blocks_at_the_new_place_unless_it_is_to_be_sparse() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &["--allow-discards", "--sparse"]);
    let image = File::create(bench.path("disk.img")).unwrap();
    image.set_len(8 << 20).unwrap();
    image.write_all_at(&noise(5, 300_000), 3 << 20).unwrap();
    let bytes = fs::read(bench.path("disk.img")).unwrap();
    run(&bench, &["import", "disk.img", "vault.img"]).succeeds();
    for (name, more, range) in [("full.img", &[][..], 10 << 20..11 << 20), ("thin.img", &["--sparse"], 0..5 << 20)] {
        run(&bench, &[&["relocate", "vault.img", name, "--keep-source"], more].concat()).succeeds();
        assert!(content(&bench, name) == bytes, "{name}");
        let allocated = fs::metadata(bench.path(name)).unwrap().blocks() * 512;
        assert!(range.contains(&allocated), "{name}: {allocated} bytes of blocks");
    }
}

#[test]
fn a_copy_leaves_the_source_and_a_destination_in_use_is_refused() {
    let (bench, bytes) = vault("3M", &[]);
    let old = fs::read(bench.path("vault.img")).unwrap();
    run(&bench, &["relocate", "vault.img", "copy.img", "--keep-source"]).succeeds();
    assert!(fs::read(bench.path("vault.img")).unwrap() == old);
    assert!(content(&bench, "copy.img") == bytes);
    run(&bench, &["relocate", "vault.img", "copy.img"]).fails(1, &["already holds data", "--force"]);
    assert!(fs::read(bench.path("vault.img")).unwrap() == old);
    run(&bench, &["relocate", "vault.img", "copy.img", "--force"]).succeeds();
    assert!(content(&bench, "copy.img") == bytes);
    File::create(bench.path("small")).unwrap().set_len(4 << 20).unwrap();
    run(&bench, &["relocate", "copy.img", "small"]).fails(1, &["needs 5242880 bytes, but there are 4194304"]);
    assert!(content(&bench, "copy.img") == bytes);
}

#[test]
fn other_slots_are_named_before_they_are_lost() {
    let (bench, bytes) = vault("1M", &[]);
    fs::write(bench.path("spare.key"), noise(3, 40)).unwrap();
    let added = ["key", "add", "vault.img", "--new-key-file", "spare.key", "--label", "spare"];
    bench.run(&[&added, &KEY[..], &CHEAP_KDF].concat()).succeeds();
    run(&bench, &["relocate", "vault.img", "new.img"]).fails(1, &["(spare)", "--drop-slots"]);
    assert!(!bench.path("new.img").exists());
    run(&bench, &["relocate", "vault.img", "new.img", "--drop-slots"]).succeeds();
    assert!(content(&bench, "new.img") == bytes);
    bench.run(&["key", "test", "new.img", "--key-file", "spare.key"]).fails(2, &["wrong"]);
}

#[test]
fn a_relocation_that_is_stopped_leaves_the_source_and_nothing_that_opens() {
    let (bench, bytes) = vault("6M", &[]);
    for (signal, code) in [(Signal::INT, Some(6)), (Signal::KILL, None)] {
        let args = [&["relocate", "vault.img", "new.img", "--max-rate", "2M", "--json"], &KEY[..]].concat();
        let mut child = bench.under_way(&args);
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), code);
        assert!(content(&bench, "vault.img") == bytes);
        if bench.path("new.img").exists() {
            run(&bench, &["key", "test", "new.img"]).fails(3, &["not a daxcrypt namespace"]);
        }
    }
    run(&bench, &["relocate", "vault.img", "new.img", "--force"]).succeeds();
    assert!(content(&bench, "new.img") == bytes);
}

/// A namespace at `base` of a larger file: what dd or a partition editor leaves, seen through the partition's own device.
fn shifted(bench: &Bench, name: &str, base: u64, tail: u64) -> std::path::PathBuf {
    let image = fs::read(bench.path("vault.img")).unwrap();
    let path = bench.path(name);
    let file = File::create(&path).unwrap();
    file.set_len(base + image.len() as u64 + tail).unwrap();
    file.write_all_at(&image, base).unwrap();
    path
}

#[test]
fn a_namespace_that_was_moved_as_ciphertext_is_refused_and_adopted_in_place() {
    use daxcrypt::namespace::{self, AdoptError, GeometryError, MovedNamespace, RekeyOptions};
    let (bench, bytes) = vault("3M", &[]);
    let key = || Credential::KeyFile(SecretBytes::copy_of(&fs::read(bench.path("vault.key")).unwrap()));
    // By a whole number of huge pages the data stays where it is; otherwise it moves behind its new header.
    for (base, tail, data_start) in [(4 << 20, 0, 6 << 20), (1 << 20, 1 << 20, 4 << 20), (3 << 20, 5 << 20, 6 << 20)] {
        let path = shifted(&bench, "moved.img", base, tail);
        let backing = Arc::new(Backing::open(&path, Access::ReadWrite).unwrap());
        let refused = LockedNamespace::open_at(Arc::clone(&backing), base, u64::MAX).unwrap_err();
        assert!(
            matches!(refused, namespace::OpenError::Relocated { header_base: 0, actual_base } if actual_base == base),
            "{refused}"
        );
        let moved = MovedNamespace::open_at(&backing, base, u64::MAX).unwrap();
        let volume =
            Volume::new(moved.adopt(&key(), &RekeyOptions::default()).unwrap(), daxcrypt::xts::Backend::detect());
        volume.transform_step(512 << 10).unwrap();
        drop(volume);
        // It is at home from the first moment on, and goes on like every re-key.
        let locked = LockedNamespace::open_at(Arc::clone(&backing), base, u64::MAX).unwrap();
        let volume = locked.unlock(&key()).unwrap();
        assert_eq!(volume.geometry().data_start(), data_start);
        let mut found = vec![0; bytes.len()];
        volume.read_at(&mut found, 0).unwrap();
        assert!(found == bytes, "on the way to base {base}");
        while volume.transform_step(512 << 10).unwrap().is_some() {}
        volume.read_at(&mut found, 0).unwrap();
        assert!(found == bytes, "at base {base}");
    }
    let path = shifted(&bench, "tight.img", 1 << 20, 0);
    let backing = Arc::new(Backing::open(&path, Access::ReadWrite).unwrap());
    let refused = MovedNamespace::open_at(&backing, 1 << 20, u64::MAX).unwrap_err();
    assert!(
        matches!(refused, AdoptError::Geometry(GeometryError::DoesNotFit { needed_bytes, available_bytes })
            if needed_bytes == 6 << 20 && available_bytes == 5 << 20),
        "{refused}"
    );
}

#[test]
fn a_moved_namespace_is_refused_by_the_program_with_both_numbers_and_the_way_out() {
    let (bench, bytes) = vault("3M", &[]);
    shifted(&bench, "moved.img", 4 << 20, 0);
    // The partition by itself, as its device shows it, still says where it was written.
    let mut image = fs::read(bench.path("moved.img")).unwrap();
    image.drain(..4 << 20);
    fs::write(bench.path("part.img"), image).unwrap();
    assert!(content(&bench, "part.img") == bytes, "a copy of a whole file is no move");
    run(&bench, &["relocate", "--in-place", "part.img"]).fails(1, &["is where its header says, at byte 0"]);
}

#[test]
fn an_image_is_imported_and_exported_with_its_holes() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &["--allow-discards"]);
    let image = File::create(bench.path("disk.img")).unwrap();
    image.set_len(6 << 20).unwrap();
    image.write_all_at(&noise(5, 300_000), 1 << 20).unwrap();
    image.write_all_at(b"the end", (6 << 20) - 7).unwrap();
    let mut expected = fs::read(bench.path("disk.img")).unwrap();
    let said = run(&bench, &["import", "disk.img", "vault.img"]).succeeds();
    assert!(said.stdout.contains("6 MiB imported") && said.stdout.contains("verified"), "{}", said.stdout);
    assert!(content(&bench, "vault.img")[..6 << 20] == expected);

    run(&bench, &["export", "vault.img", "out.img"]).succeeds();
    expected.resize(8 << 20, 0);
    assert!(fs::read(bench.path("out.img")).unwrap() == expected);
    let metadata = fs::metadata(bench.path("out.img")).unwrap();
    assert!(metadata.blocks() * 512 < 2 << 20, "{} blocks: holes were filled", metadata.blocks());
    assert_eq!(metadata.mode() & 0o777, 0o600);
    run(&bench, &["export", "vault.img", "out.img"]).fails(1, &["out.img", "exists"]);
    let streamed = bench.command(&[&["export", "vault.img", "-"], &KEY[..]].concat()).output().unwrap();
    assert!(streamed.status.success() && streamed.stdout == expected);
}

#[test]
fn a_stream_is_imported_and_what_is_too_long_is_refused() {
    let bench = Bench::new();
    bench.format("vault.img", "1M", &[]);
    let import = |bytes: &[u8]| {
        let args = [&["import", "-", "vault.img"], &KEY[..]].concat();
        let mut child = bench.command(&args).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(bytes); // a refusal closes the pipe
        child.wait_with_output().unwrap()
    };
    let bytes = noise(6, 777_777);
    assert!(import(&bytes).status.success());
    assert!(content(&bench, "vault.img")[..bytes.len()] == bytes);
    let refused = import(&noise(7, (1 << 20) + 1));
    assert_eq!(refused.status.code(), Some(1), "{}", String::from_utf8_lossy(&refused.stderr));
    fs::write(bench.path("large.img"), noise(7, (1 << 20) + 1)).unwrap();
    run(&bench, &["import", "large.img", "vault.img"]).fails(1, &["1048577 bytes", "room for 1048576"]);
}
