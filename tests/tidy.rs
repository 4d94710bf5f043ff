//! The structure is a test: layer arrows run downwards, and unsafe code lives in the named files only.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// Each layer with the layers that it may import (design: main -> cli -> {nbd_server, ops, dax} -> volume -> {namespace,
/// xts, pmem} -> {secret, memory}).
const LAYERS: &[(&str, &[&str])] = &[
    ("memory", &[]),
    ("barrier", &[]),
    ("owner", &[]),
    ("spawn", &[]),
    ("uffd", &["memory", "owner"]),
    ("sync", &["barrier", "spawn"]),
    ("secret", &[]),
    ("peer_groups", &[]),
    ("xts", &["memory", "secret"]),
    ("pmem", &["memory", "barrier", "owner"]),
    ("namespace", &["pmem", "secret", "memory"]),
    ("luks2", &["namespace", "xts", "pmem", "secret", "memory"]),
    ("volume", &["luks2", "namespace", "xts", "pmem", "secret", "memory", "sync", "owner", "uffd"]),
    ("dax", &["volume", "pmem", "secret", "memory", "owner", "spawn", "uffd"]),
    ("nbd_server", &["volume", "pmem", "secret", "peer_groups", "owner", "spawn"]),
    ("ops", &["volume", "luks2", "namespace", "xts", "pmem", "secret", "memory"]),
    ("cli", &["nbd_server", "ops", "volume", "luks2", "namespace", "xts", "pmem", "secret", "memory"]),
    ("main", &["cli"]),
];

/// Files that may hold `unsafe`; each begins with the reason in its head.
const UNSAFE: &[&str] = &[
    "src/dax/access.rs",
    "src/dax/exclusive.rs",
    "src/dax/in_thread.rs",
    "src/dax/mapping.rs",
    "src/memory.rs",
    "src/owner.rs",
    "src/peer_groups.rs",
    "src/secret.rs",
    "src/pmem/bitmap.rs",
    "src/pmem/identity.rs",
    "src/pmem/lock.rs",
    "src/pmem/mapping.rs",
    "src/pmem/persist.rs",
    "src/pmem/sigbus.rs",
    "src/spawn.rs",
    "src/uffd.rs",
    "src/volume/range_locked.rs",
    "src/volume/window/memory.rs",
    "src/xts/dispatch.rs",
    "src/xts/tests/guard.rs",
    "src/xts/x86/aesni.rs",
    "src/xts/x86/firsts.rs",
    "src/xts/x86/mod.rs",
    "src/xts/x86/vaes256.rs",
    "src/xts/x86/vaes512.rs",
];

/// The longest file that has not yet become two ideas, in lines, tests apart.
const LINES_MAX: usize = 600;

fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    assert!(found.len() > 30, "run from the package's folder");
    found
}

fn layer(path: &Path) -> String {
    let first = path.iter().nth(1).unwrap().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Every `crate::NAME` in code; comments may refer upwards.
fn imports(text: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let after = code.flat_map(|line| line.split("crate::").skip(1));
    let name = |rest: &str| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    // What tests of any layer look for on media is not a layer.
    after.map(name).filter(|name| !name.is_empty() && name != "leftovers").collect()
}

#[test]
fn layer_arrows_run_downwards() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let layer = layer(&path);
        assert!(!text.contains("crate::{"), "{}: name the layer in each import", path.display());
        if layer == "lib" {
            continue;
        }
        let (_, allowed) =
            LAYERS.iter().find(|(name, _)| *name == layer).unwrap_or_else(|| panic!("{layer}: which layer?"));
        for import in imports(&text) {
            if import != layer && !allowed.contains(&import.as_str()) {
                wrong.push(format!("{} imports {import}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_code_lives_in_the_named_files() {
    let mut found: Vec<_> = sources()
        .into_iter()
        .filter(|(_, text)| {
            text.lines().any(|line| line.starts_with("#") && line.contains("unsafe_code") && !line.contains("forbid"))
        })
        .map(|(path, _)| path.to_str().unwrap().to_owned())
        .collect();
    found.sort();
    let mut named: Vec<_> = UNSAFE.iter().map(|&path| path.to_owned()).collect();
    named.sort();
    assert_eq!(found, named);
}

#[test]
fn every_file_says_what_it_is_for_and_is_one_idea() {
    for (path, text) in sources() {
        let is_test = path.to_str().unwrap().contains("tests");
        assert!(is_test || text.starts_with("//!"), "{} has no head", path.display());
        let code = text.find("#[cfg(test)]\nmod tests {").map_or(text.as_str(), |tests| &text[..tests]);
        let lines = code.lines().count();
        assert!(is_test || lines <= LINES_MAX, "{} has {lines} lines without tests", path.display());
    }
}

#[test]
fn nothing_panics_when_nobody_reads_what_is_printed() {
    // `sim/proof` is compiled for crash tests only, and prints their numbers.
    let is_test = |path: &Path| ["tests", "sim/proof"].iter().any(|part| path.to_str().unwrap().contains(part));
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        let code = text.find("#[cfg(test)]\nmod tests {").map_or(text.as_str(), |tests| &text[..tests]);
        for mark in ["println!(", "print!("] {
            let found =
                code.lines().find(|line| line.trim_start().starts_with(mark) || line.contains(&format!(" {mark}")));
            assert!(found.is_none(), "{}: {mark} instead of cli::output", path.display());
        }
    }
}

/// Files of the command line that write by themselves: the one that makes text harmless, a bar of numbers, a live table of
/// lines that were made harmless, logs (whose library escapes), and the plaintext of `export -`.
const WRITERS: &[&str] =
    &["src/cli/output.rs", "src/cli/progress.rs", "src/cli/live.rs", "src/cli/log.rs", "src/cli/plain.rs"];

#[test]
fn text_reaches_the_terminal_by_one_way() {
    for (path, text) in sources() {
        let code = text.find("#[cfg(test)]\nmod tests {").map_or(text.as_str(), |tests| &text[..tests]);
        if WRITERS.contains(&path.to_str().unwrap()) || !path.starts_with("src/cli") {
            continue;
        }
        for mark in ["stdout()", "stderr()", "eprint"] {
            let found = code.lines().find(|line| !line.trim_start().starts_with("//") && line.contains(mark));
            assert!(found.is_none(), "{}: {mark} instead of cli::output", path.display());
        }
    }
}

#[test]
fn nothing_is_left_to_do_in_the_code() {
    let marks = ["todo!(", "unimplemented!(", "#[ignore", "FIXME", "XXX"];
    for (path, text) in sources() {
        for mark in marks {
            assert!(!text.contains(mark), "{}: {mark}", path.display());
        }
    }
}
