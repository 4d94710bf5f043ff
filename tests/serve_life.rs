//! What a server does to a namespace as a whole: it marks it as in use while it serves.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};

use common::{Bench, Server, tool};

const IN_ORDER: &str = "closed       in order";
const IN_USE: &str = "closed       not in order, or in use now";
const NOTICE: &str = "it was not closed in order";

/// What `info` says about how it was closed.
#[track_caller]
fn closed(bench: &Bench, args: &[&str]) -> String {
    let info = bench.run(&[&["info"], args].concat()).succeeds().stdout;
    let line = info.lines().find(|line| line.starts_with("closed")).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ").replacen("closed ", "closed       ", 1)
}

/// Serves `vault.img`; what it says on standard error goes to the file `said`.
fn serve(bench: &Bench, more: &[&str]) -> Server {
    let socket = bench.path("vault.img.sock");
    let args = ["serve", "vault.img", "--key-file", "vault.key", "--socket", socket.to_str().unwrap()];
    let mut command = bench.command(&[&args[..], more].concat());
    command.stderr(File::create(bench.path("said")).unwrap());
    Server::start(command, socket)
}

fn said(bench: &Bench) -> String {
    fs::read_to_string(bench.path("said")).unwrap()
}

#[test]
fn a_served_namespace_is_in_use_and_after_sigterm_in_order() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    assert_eq!(closed(&bench, &["vault.img"]), IN_ORDER);
    let server = serve(&bench, &[]);
    assert_eq!(closed(&bench, &["vault.img"]), IN_USE);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 7 0 1M", &server.uri("vault")]);
    server.stop();
    assert_eq!(closed(&bench, &["vault.img"]), IN_ORDER);
    assert!(!said(&bench).contains(NOTICE), "{}", said(&bench));
}

#[test]
fn after_kill_9_it_is_not_in_order_and_the_next_server_says_so_once() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let server = serve(&bench, &[]);
    tool("qemu-io", &["-f", "raw", "-c", "write -f -P 7 0 1M", &server.uri("vault")]);
    server.kill();
    assert_eq!(closed(&bench, &["vault.img"]), IN_USE);

    fs::remove_file(bench.path("vault.img.sock")).unwrap();
    let server = serve(&bench, &[]);
    assert!(said(&bench).contains(NOTICE), "{}", said(&bench));
    assert_eq!(closed(&bench, &["vault.img"]), IN_USE);
    tool("qemu-io", &["-f", "raw", "-c", "read -P 7 0 1M", &server.uri("vault")]);
    server.stop();
    assert_eq!(closed(&bench, &["vault.img"]), IN_ORDER);
    serve(&bench, &[]).stop();
    assert!(!said(&bench).contains(NOTICE), "{}", said(&bench));
}

#[test]
fn the_mark_of_a_detached_header_is_in_its_file() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &["--header", "vault.header"]);
    let detached = ["--header", "vault.header"];
    let info = [&["vault.img"], &detached[..]].concat();
    let server = serve(&bench, &detached);
    assert_eq!(closed(&bench, &info), IN_USE);
    server.stop();
    assert_eq!(closed(&bench, &info), IN_ORDER);
    serve(&bench, &detached).kill();
    assert_eq!(closed(&bench, &info), IN_USE);
}

#[test]
fn a_rekey_under_the_server_keeps_the_mark_and_the_end_clears_it() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let server = serve(&bench, &["--control", "control"]);
    bench.run(&["rekey", "vault.img", "--key-file", "vault.key", "--control", "control"]).succeeds();
    assert_eq!(closed(&bench, &["vault.img"]), IN_USE);
    server.stop();
    assert_eq!(closed(&bench, &["vault.img"]), IN_ORDER);
    // The same in the middle of one, which rests in good order.
    let server = serve(&bench, &["--control", "control", "--rekey-max-rate", "1M"]);
    let args = ["rekey", "vault.img", "--key-file", "vault.key", "--control", "control", "--json"];
    let mut asking = bench.under_way(&args);
    server.stop();
    let _ = asking.kill();
    let _ = asking.wait();
    assert_eq!(closed(&bench, &["vault.img"]), IN_ORDER);
    let info = bench.run(&["info", "vault.img", "--json"]).succeeds().stdout;
    assert!(info.contains("\"rekeying\": true"), "{info}");
}

#[test]
fn a_read_only_server_and_one_that_does_not_start_write_nothing() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let before = fs::read(bench.path("vault.img")).unwrap();
    serve(&bench, &["--read-only"]).kill();
    let args = ["serve", "vault.img", "--key-file", "vault.key", "--socket", "s"];
    bench.run(&[&args[..], &["missing.img"]].concat()).fails(1, &["missing.img"]);
    assert!(fs::read(bench.path("vault.img")).unwrap() == before);
    // A server that has got further leaves it in order.
    bench.run(&[&args[..], &["--metrics", "nowhere:1:2"]].concat()).fails(1, &["cannot listen on nowhere:1:2"]);
    assert_eq!(closed(&bench, &["vault.img"]), IN_ORDER);
}

#[test]
fn a_luks2_volume_has_no_mark_and_keeps_every_byte() {
    let bench = Bench::new();
    let image = bench.path("vault.img");
    File::create(&image).unwrap().set_len(24 << 20).unwrap();
    let (image, key) = (image.to_str().unwrap(), bench.path("vault.key"));
    let cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--batch-mode"];
    tool("cryptsetup", &[&["luksFormat", "--type", "luks2", image, key.to_str().unwrap()], &cheap[..]].concat());
    let before = fs::read(image).unwrap();
    let server = serve(&bench, &["--luks2"]);
    assert!(fs::read(image).unwrap() == before);
    server.stop();
    assert!(fs::read(image).unwrap() == before);
    assert!(!said(&bench).contains(NOTICE), "{}", said(&bench));
}
