//! Operations and the states that they meet: what lost data or kept a key between two features that were right alone.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;

use common::{Bench, CHEAP_KDF, Server, loop_device, noise, open_when_free, tool};
use daxcrypt::namespace::{Credential, LockedNamespace, RekeyOptions};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::{Volume, WINDOW_BYTES};
use daxcrypt::xts::Backend;
use rustix::process::{Pid, Signal, kill_process};

const KEY: [&str; 2] = ["--key-file", "vault.key"];

fn credential(bench: &Bench, key: &str) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&fs::read(bench.path(key)).unwrap()))
}

fn open(bench: &Bench, name: &str) -> Volume {
    let locked = LockedNamespace::open(Arc::new(open_when_free(&bench.path(name)))).unwrap();
    Volume::new(locked.unlock_key(&credential(bench, "vault.key")).unwrap(), Backend::detect())
}

fn content(bench: &Bench, name: &str) -> Vec<u8> {
    let volume = open(bench, name);
    let mut all = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut all, 0).unwrap();
    all
}

/// `vault.img` with known content.
fn vault(size: &str, more: &[&str]) -> (Bench, Vec<u8>) {
    let bench = Bench::new();
    bench.format("vault.img", size, more);
    let volume = open(&bench, "vault.img");
    let bytes = noise(8, usize::try_from(volume.size()).unwrap());
    volume.write_at(&bytes, 0).unwrap();
    volume.flush().unwrap();
    drop(volume);
    (bench, bytes)
}

/// Begins to re-key `vault.img`, and stops after two windows.
fn rekeyed_half_way(bench: &Bench) {
    let volume = open(bench, "vault.img");
    volume.begin_rekey(&credential(bench, "vault.key"), &RekeyOptions::default()).unwrap();
    for _ in 0..2 {
        volume.transform_step(WINDOW_BYTES).unwrap().unwrap();
    }
}

fn spare_slot(bench: &Bench, name: &str) {
    bench.secret("spare.key", &noise(3, 40));
    let added = ["key", "add", name, "--new-key-file", "spare.key", "--label", "spare"];
    bench.run(&[&added, &KEY[..], &CHEAP_KDF].concat()).succeeds();
}

fn control(bench: &Bench) -> [String; 2] {
    ["--control".to_owned(), bench.path("control").to_str().unwrap().to_owned()]
}

fn is_rekeying(bench: &Bench, name: &str) -> bool {
    let info = bench.run(&["info", name, "--json"]).succeeds().stdout;
    serde_json::from_str::<serde_json::Value>(&info).unwrap()["rekeying"].as_bool().unwrap()
}

/// Item 1: without the transform both halves would be read under the new key, and the half that has not moved is noise.
#[test]
fn an_escrowed_key_opens_a_namespace_that_is_being_rekeyed() {
    let (bench, mut bytes) = vault("3M", &[]);
    rekeyed_half_way(&bench);
    bench.run(&[&["key", "dump", "vault.img", "--volume-key-file", "escrow"], &KEY[..]].concat()).succeeds();
    let escrow = ["--escrow-file", "escrow"];
    bench.run(&[&["export", "vault.img", "out.img"], &escrow[..]].concat()).succeeds();
    assert!(fs::read(bench.path("out.img")).unwrap() == bytes);

    // What is written by that way lands where the key of a slot finds it.
    bytes[..5000].copy_from_slice(&noise(9, 5000));
    bytes[2 << 20..][..512].fill(7);
    fs::write(bench.path("in.img"), &bytes).unwrap();
    bench.run(&[&["import", "in.img", "vault.img", "--force"], &escrow[..]].concat()).succeeds();
    assert!(content(&bench, "vault.img") == bytes);
    bench.refused(&[&["resize", "vault.img", "--size", "4M"], &escrow[..]].concat(), 1, &["a re-key is under way"]);
    bench.run(&[&["rekey", "vault.img", "--resume"], &KEY[..]].concat()).succeeds();
    assert!(content(&bench, "vault.img") == bytes);
}

/// Item 4.
#[test]
fn no_luks2_header_is_made_of_a_namespace_that_is_being_rekeyed() {
    let bench = Bench::new();
    bench.format("vault.img", "3M", &["--header", "vault.header"]);
    let open = || {
        let header = Arc::new(open_when_free(&bench.path("vault.header")));
        let data = Arc::new(open_when_free(&bench.path("vault.img")));
        let site = daxcrypt::namespace::Site::whole(data).with_header(Some(header));
        let locked = LockedNamespace::open_in(site).unwrap();
        Volume::new(locked.unlock_key(&credential(&bench, "vault.key")).unwrap(), Backend::detect())
    };
    let volume = open();
    volume.begin_rekey(&credential(&bench, "vault.key"), &RekeyOptions::default()).unwrap();
    volume.transform_step(WINDOW_BYTES).unwrap().unwrap();
    drop(volume);
    let export = ["header", "export", "vault.img", "--header", "vault.header", "--luks2", "luks.header"];
    let export = [&export, &KEY[..], &["--pbkdf", "pbkdf2", "--pbkdf2-iterations", "1000"]].concat();
    bench.refused(&export, 1, &["a re-key is under way", "rekey --resume"]);
    assert!(!bench.path("luks.header").exists());
    let resume = ["rekey", "vault.img", "--header", "vault.header", "--resume"];
    bench.run(&[&resume, &KEY[..]].concat()).succeeds();
    bench.run(&export).succeeds();
}

/// Item 11: a copy has the same uuid.
#[test]
fn a_server_is_asked_about_the_namespace_that_was_named_and_never_about_a_copy() {
    let (bench, bytes) = vault("3M", &[]);
    for copy in ["copy.img", "third.img"] {
        fs::copy(bench.path("vault.img"), bench.path(copy)).unwrap();
    }
    fs::hard_link(bench.path("copy.img"), bench.path("same.img")).unwrap();
    let namespace =
        |path: &str| format!("[[namespace]]\npath = \"{path}\"\nname = \"{path}\"\nkey_file = \"vault.key\"\n");
    fs::write(bench.path("two.toml"), ["vault.img", "copy.img"].map(namespace).concat()).unwrap();
    let (socket, control) = (bench.path("two.sock"), control(&bench));
    let control: Vec<&str> = control.iter().map(String::as_str).collect();
    let serve = ["serve", "--config", "two.toml", "--socket", socket.to_str().unwrap()];
    let server = Server::start(bench.command(&[&serve[..], &control].concat()), socket.clone());
    let ask = |args: &[&str]| bench.run(&[args, &control[..]].concat());

    ask(&["rekey", "third.img", KEY[0], KEY[1]]).fails(1, &["but a copy of it", "vault.img"]);
    ask(&["resize", "third.img", "--size", "2M", "--force"]).fails(1, &["but a copy of it"]);
    ask(&["rekey", "same.img", "--drop-slots", KEY[0], KEY[1]]).succeeds();
    ask(&["resize", "copy.img", "--size", "2M", "--force"]).succeeds();
    server.stop();
    assert!(content(&bench, "vault.img") == bytes, "the original is as it was");
    assert!(content(&bench, "copy.img") == bytes[..2 << 20]);
    let image = |name: &str| fs::read(bench.path(name)).unwrap();
    assert!(image("vault.img")[2 << 20..] == image("third.img")[2 << 20..], "only the copy was re-keyed");
    assert!(image("copy.img")[2 << 20..] != image("third.img")[2 << 20..]);
}

/// A loop device that goes when it is dropped.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Item 21: locks do not tell that these are one.
#[test]
fn a_namespace_is_not_relocated_onto_its_own_backing_by_another_name() {
    let (bench, bytes) = vault("3M", &[]);
    fs::hard_link(bench.path("vault.img"), bench.path("link.img")).unwrap();
    fn relocate(to: &str) -> Vec<&str> {
        [&["relocate", "vault.img", to, "--force"], &KEY[..]].concat()
    }
    bench.refused(&relocate("link.img"), 5, &["busy"]);
    let Some(device) = loop_device(&bench.path("vault.img"), &[]).map(Loop) else { return };
    bench.refused(&relocate(&device.0), 1, &["by another name"]);
    bench.refused(&[&relocate(&device.0)[..], &["--keep-source"]].concat(), 1, &["by another name"]);
    std::os::unix::fs::symlink(&device.0, bench.path("node")).unwrap();
    bench.refused(&relocate("node"), 1, &["by another name"]);
    drop(device);
    // A part of it is no better, and neither is a header that would go there.
    let part = Loop(loop_device(&bench.path("vault.img"), &["--offset", "1048576"]).unwrap());
    bench.refused(&relocate(&part.0), 1, &["by another name"]);
    let header = ["--destination-header", &part.0];
    bench.refused(&[&relocate("new.img")[..], &header].concat(), 1, &["by another name"]);
    assert!(!bench.path("new.img").exists());
    drop(part);
    assert!(content(&bench, "vault.img") == bytes);
}

/// Its brother: what is read would be overwritten before it is read, and reading takes no lock.
#[test]
fn a_namespace_is_not_imported_from_its_own_backing() {
    let (bench, bytes) = vault("3M", &[]);
    fs::hard_link(bench.path("vault.img"), bench.path("link.img")).unwrap();
    fn import(image: &str) -> Vec<&str> {
        [&["import", image, "vault.img", "--force"], &KEY[..]].concat()
    }
    bench.refused(&import("vault.img"), 1, &["the image is what vault.img lies in"]);
    bench.refused(&import("link.img"), 1, &["the image is what vault.img lies in"]);
    // A file that begins as it does is another one.
    let copy = fs::read(bench.path("vault.img")).unwrap();
    fs::write(bench.path("copy.img"), &copy[..3 << 20]).unwrap();
    let Some(part) = loop_device(&bench.path("vault.img"), &["--offset", "2097152"]).map(Loop) else { return };
    bench.refused(&import(&part.0), 1, &["the image is what vault.img lies in"]);
    assert!(content(&bench, "vault.img") == bytes);
    drop(part);
    bench.run(&import("copy.img")).succeeds();
    assert!(content(&bench, "vault.img") == copy[..3 << 20]);
}

/// Item 20: a file system without room for the journal's copy of a window stops it.
#[test]
fn a_rekey_that_died_in_a_server_is_told_and_its_follower_ends() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: a full file system needs root");
        return;
    }
    let bench = Bench::new();
    fs::create_dir(bench.path("full")).unwrap();
    let full = bench.path("full");
    tool("mount", &["-t", "tmpfs", "-o", "size=5m", "none", full.to_str().unwrap()]);
    let tried = std::panic::catch_unwind(|| {
        bench.format("full/vault.img", "2M", &[]);
        let volume = open(&bench, "full/vault.img");
        volume.write_at(&noise(8, 2 << 20), 0).unwrap();
        volume.flush().unwrap();
        drop(volume);
        let control = control(&bench);
        let control: Vec<&str> = control.iter().map(String::as_str).collect();
        let server = bench.serve("full/vault.img", &control);
        // Where windows are saved (format.md): the records before it keep their page, so the re-key begins.
        let path = bench.path("full/vault.img");
        tool("fallocate", &["--punch-hole", "--offset", "1114112", "--length", "983040", path.to_str().unwrap()]);
        fs::write(bench.path("full/rest"), vec![1; 5 << 20]).unwrap_err();
        let ask = |more: &[&str]| bench.run(&[&["rekey", "full/vault.img"], &control[..], more].concat());
        ask(&KEY).fails(4, &["could not go on"]);
        ask(&["--status"]).fails(4, &["could not go on"]);
        let status = bench.run(&[&["status"], &control[..]].concat()).succeeds().stdout;
        assert!(status.contains("re-key of full/vault.img") && status.contains("it FAILED"), "{status}");
        server.kill();
    });
    tool("umount", &["--lazy", full.to_str().unwrap()]);
    tried.unwrap();
}

/// Items 25, 26 and 31.
#[test]
fn a_relocation_asks_about_other_slots_carries_them_and_says_what_is_void() {
    let (bench, bytes) = vault("1M", &[]);
    spare_slot(&bench, "vault.img");
    let relocate = |to: &str, more: &[&str]| bench.run(&[&["relocate", "vault.img", to], &KEY[..], more].concat());
    let hints = &["(spare)", "--keep-slots", "--drop-slots"];
    bench.refused(&[&["relocate", "vault.img", "a.img", "--keep-source"], &KEY[..]].concat(), 1, hints);
    assert!(!bench.path("a.img").exists());
    relocate("a.img", &["--keep-source", "--keep-slots"]).succeeds();
    relocate("b.img", &["--keep-source", "--drop-slots"]).succeeds();
    let opens = |image: &str, key: &str| bench.run(&["key", "test", image, "--key-file", key]);
    assert!(opens("a.img", "spare.key").succeeds().stdout.contains("key slot 1"));
    opens("a.img", "vault.key").succeeds();
    opens("b.img", "spare.key").fails(2, &["wrong"]);
    let list = bench.run(&["key", "list", "a.img"]).succeeds().stdout;
    assert!(list.contains("(spare)"), "{list}");
    assert!(content(&bench, "a.img") == bytes && content(&bench, "b.img") == bytes);
    let escrow = |image: &str, file: &str| ["key", "dump", image, "--volume-key-file", file].map(str::to_owned);
    for (image, file) in [("vault.img", "one"), ("a.img", "two")] {
        let args = escrow(image, file);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(KEY).collect();
        bench.run(&args).succeeds();
    }
    assert_ne!(fs::read(bench.path("one")).unwrap(), fs::read(bench.path("two")).unwrap());

    let said = relocate("c.img", &["--keep-slots"]).succeeds().stdout;
    assert!(said.contains("may be deleted") && said.contains("escrow files") && said.contains("void"), "{said}");
    let said = bench.run(&[&["rekey", "c.img", "--keep-slots"], &KEY[..]].concat()).succeeds().stdout;
    assert!(said.contains("header backups, escrow files and LUKS2 headers") && said.contains("void"), "{said}");
    opens("c.img", "spare.key").succeeds();
}

/// Item 31.
#[test]
fn an_import_over_data_wants_force() {
    let (bench, _) = vault("3M", &["--label", "tank"]);
    fn import<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["import", "in.img", "vault.img"], &KEY[..], more].concat()
    }
    let mut image = noise(5, 100 << 10);
    image[50 << 10..][..4096].fill(0x20);
    fs::write(bench.path("in.img"), &image).unwrap();
    bench.run(&import(&[])).succeeds(); // what it held was noise, as what was never written is
    bench.refused(&import(&[]), 1, &["holds data", "--force"]);
    let image = File::options().write(true).open(bench.path("in.img")).unwrap();
    image.write_all_at(b"changed", 9).unwrap();
    bench.run(&import(&["--force"])).succeeds();
    assert_eq!(&content(&bench, "vault.img")[9..16], b"changed");
}

/// Item 31.
#[test]
fn a_wipe_that_was_stopped_ends_with_6_and_is_told() {
    let bench = Bench::new();
    let args = [&["format", "vault.img", "--size", "512M", "--wipe", "--json"], &KEY[..]].concat();
    let mut child = bench.under_way(&args);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(info.contains("wipe") && info.contains("unfinished"), "{info}");
    bench.run(&[&["key", "test", "vault.img"], &KEY[..]].concat()).succeeds();
    fs::remove_file(bench.path("vault.img")).unwrap();
    bench.format("vault.img", "1M", &["--wipe"]);
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(!info.contains("unfinished"), "{info}");
}

/// Item 32.
#[test]
fn the_slots_of_a_served_namespace_change_without_downtime() {
    let (bench, bytes) = vault("2M", &[]);
    let names = control(&bench);
    let control: Vec<&str> = names.iter().map(String::as_str).collect();
    let server = bench.serve("vault.img", &control);
    bench.secret("spare.key", &noise(3, 40));
    bench.secret("other.key", &noise(4, 40));
    let new = ["--new-key-file", "spare.key"];
    let key = |what: &str, more: &[&str]| bench.run(&[&["key", what, "vault.img"], more].concat());
    let online = |what: &str, more: &[&str]| key(what, &[more, &control[..]].concat());
    key("add", &[&KEY[..], &new].concat()).fails(5, &["--control SOCKET"]);
    online("add", &[&["--key-file", "spare.key"], &new[..]].concat()).fails(2, &["no key slot opens"]);
    let added = online("add", &[&KEY[..], &new, &["--label", "spare"]].concat()).succeeds();
    assert!(added.stdout.contains("added key slot 1"), "{}", added.stdout);
    assert!(key("list", &[]).succeeds().stdout.contains("(spare)"));
    online("remove", &[&KEY[..], &["--slot", "0"]].concat()).fails(1, &["key slot 0 is the one"]);
    online("remove", &[&KEY[..], &["--slot", "7"]].concat()).fails(1, &["key slot 7 is empty"]);
    online("change", &["--key-file", "spare.key", "--new-key-file", "other.key"]).succeeds();
    let opens = |key: &str| bench.run(&["key", "test", "vault.img", "--key-file", key]);
    opens("other.key").succeeds();
    opens("spare.key").fails(2, &["wrong"]);
    online("remove", &[&KEY[..], &["--slot", "1"]].concat()).succeeds();
    opens("other.key").fails(2, &["wrong"]);
    server.stop();
    assert!(content(&bench, "vault.img") == bytes);
}

/// Items 18 and 32.
#[test]
fn a_server_tells_what_a_rekey_would_cost_and_lets_one_rest() {
    let (bench, _) = vault("8M", &["--sparse"]);
    let dry_run = |more: &[&str]| bench.run(&[&["rekey", "vault.img", "--dry-run"], more].concat());
    let said = dry_run(&KEY).succeeds().stdout;
    // In place: what is re-keyed has its blocks, and holes stay holes.
    assert!(said.contains("8388608 bytes") && !said.contains("of blocks"), "{said}");
    let names = control(&bench);
    let control: Vec<&str> = names.iter().map(String::as_str).collect();
    let server = bench.serve("vault.img", &control);
    let asked = dry_run(&control).succeeds().stdout;
    assert!(asked.contains("8388608 bytes") && !asked.contains("of blocks"), "{asked}");
    assert!(!is_rekeying(&bench, "vault.img"));
    let ask = |more: &[&str]| bench.run(&[&["rekey", "vault.img"], &control[..], more].concat());
    ask(&["--stop"]).fails(1, &["no re-key is under way"]);
    let begin = [&["rekey", "vault.img", "--max-rate", "1K", "--json"], &control[..], &KEY].concat();
    let mut follower = bench.under_way(&begin);
    let said = ask(&["--stop"]).succeeds().stdout;
    assert!(said.contains("it rests"), "{said}");
    assert_eq!(follower.wait().unwrap().code(), Some(6), "there is nothing to follow");
    ask(&["--resume"]).succeeds();
    assert!(!is_rekeying(&bench, "vault.img"));
    server.stop();
}
