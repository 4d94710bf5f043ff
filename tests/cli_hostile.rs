//! Headers that an enemy has made: nothing in them is authenticated before a key slot opens, and yet they are read, and
//! quoted.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use common::{Bench, CHEAP_KDF, tool, tool_command};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const COPIES: [u64; 2] = [0, 256 << 10];
const COPY_BYTES: usize = 64 << 10;
const PREFIX_BYTES: usize = 128;
const OBEYED: &str = "\x1b[2J\u{9b}31m";
const SHOWN: &str = "\\u001b[2J\\u009b31m";

/// `vault.img` with a passphrase slot; both header copies changed, with a CRC that is right.
fn forged(change: impl Fn(&mut Value)) -> Bench {
    let bench = Bench::new();
    bench.secret("pass", b"secret");
    let format = ["format", "vault.img", "--size", "4M", "--passphrase-file", "pass"];
    bench.run(&[&format[..], &CHEAP_KDF].concat()).succeeds();
    let image = fs::File::options().read(true).write(true).open(bench.path("vault.img")).unwrap();
    for start in COPIES {
        let mut copy = vec![0; COPY_BYTES];
        image.read_exact_at(&mut copy, start).unwrap();
        let len = u32::from_le_bytes(copy[16..20].try_into().unwrap()) as usize;
        let mut metadata = serde_json::from_slice(&copy[PREFIX_BYTES..PREFIX_BYTES + len]).unwrap();
        change(&mut metadata);
        let text = serde_json::to_vec(&metadata).unwrap();
        copy[PREFIX_BYTES..].fill(0);
        copy[PREFIX_BYTES..PREFIX_BYTES + text.len()].copy_from_slice(&text);
        copy[16..20].copy_from_slice(&u32::try_from(text.len()).unwrap().to_le_bytes());
        copy[20..24].fill(0);
        let crc = crc32fast::hash(&copy[..PREFIX_BYTES + text.len()]);
        copy[20..24].copy_from_slice(&crc.to_le_bytes());
        image.write_all_at(&copy, start).unwrap();
    }
    bench
}

fn with_cost(memory_kib: u32, time: u32) -> Bench {
    forged(|metadata| {
        metadata["slots"][0]["kdf"]["argon2id"] = json!({"memory_kib": memory_kib, "time": time, "lanes": 1});
    })
}

#[test]
fn nothing_in_a_header_reaches_the_terminal_as_a_command() {
    let unknown = forged(|metadata| metadata["requirements"] = json!([OBEYED]));
    unknown.run(&["info", "vault.img"]).fails(3, &["\\u{1b}[2J"]); // quoted by Debug
    let label = forged(|metadata| metadata["label"] = json!(OBEYED));
    label.run(&["info", "vault.img"]).fails(3, &["control"]);
    let cipher = forged(|metadata| metadata["slots"][0]["kdf"] = json!(OBEYED));
    cipher.run(&["info", "vault.img"]).fails(3, &[SHOWN]);
    for bench in [unknown, label, cipher] {
        let run = bench.run(&["serve", "vault.img", "--socket", "s", "--passphrase-file", "pass"]);
        assert!(!run.status.success() && !run.stderr.contains(['\x1b', '\u{9b}']), "{}", run.stderr);
    }
}

#[test]
fn nothing_in_a_partition_table_or_a_path_reaches_the_terminal_as_a_command() {
    let bench = Bench::new();
    let name = format!("fake{OBEYED}");
    bench.run(&["region", "create", "region.img", "--size", "16M"]).succeeds();
    let region = bench.path("region.img");
    let part = ["-n", "1:8192:16383", "-t", "1:9D1F6B0E-5C4A-4F1B-8E57-3A2C64F7D0B1", "-c", &format!("1:{name}")];
    tool("sgdisk", &[&part[..], &[region.to_str().unwrap()]].concat());
    for args in [&["region", "list", "region.img"][..], &["info", &format!("region.img#{name}")]] {
        let run = bench.run(args);
        let all = run.stdout + &run.stderr;
        assert!(all.contains("[2J") && !all.contains(['\x1b', '\u{9b}']), "{args:?}: {all:?}");
    }
    bench.run(&["info", &name]).fails(1, &[SHOWN]);
    fs::write(bench.path(&name), b"none of ours").unwrap();
    bench.run(&["info", &name]).fails(3, &[SHOWN]);
}

#[test]
fn a_key_derivation_that_would_take_an_hour_is_refused_before_it_begins() {
    let bench = with_cost(4 << 20, 1024);
    let words = ["key slot 0 asks for a key derivation of 4096 GiB x passes", "more than 256 GiB x passes is refused"];
    bench.run(&["info", "vault.img"]).succeeds();
    bench.run(&["key", "test", "vault.img", "--passphrase-file", "pass"]).fails(3, &words);
    bench.run(&["key", "test", "vault.img", "--passphrase-file", "pass", "--slot", "0"]).fails(3, &words);
    bench.run(&["serve", "vault.img", "--socket", "s", "--passphrase-file", "pass"]).fails(3, &words);
    // What nobody could open, nobody can make.
    let dear = ["--kdf-memory", "4G", "--kdf-time", "65"];
    let format = ["format", "new.img", "--size", "4M", "--passphrase-file", "pass"];
    bench.run(&[&format[..], &dear].concat()).fails(1, &["260 GiB x passes"]);
    assert!(!bench.path("new.img").exists());
    bench.format("vault.img", "4M", &["--force"]);
    let add = ["key", "add", "vault.img", "--key-file", "vault.key", "--new-passphrase-file", "pass"];
    bench.run(&[&add[..], &dear].concat()).fails(1, &["key slot 1", "260 GiB x passes"]);
}

#[test]
fn a_signal_ends_a_server_that_is_still_unlocking() {
    let memory_kib = 128 << 10;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        // Two minutes of work, within what is permitted.
        let bench = with_cost(memory_kib, 1024);
        let socket = bench.path("s");
        let serve = bench.command(&["serve", "vault.img", "--passphrase-file", "pass", "--socket"]);
        // Whoever runs the tests in the background, or under nohup, has these ignored.
        let mut command = tool_command("env", &["--default-signal=INT,HUP"]);
        command.arg(serve.get_program()).args(serve.get_args()).current_dir(bench.path(""));
        let mut child = command.arg(&socket).stderr(Stdio::null()).spawn().unwrap();
        let status = format!("/proc/{}/status", child.id());
        let resident_kib = || -> u64 {
            let text = fs::read_to_string(&status).unwrap();
            let line = text.lines().find(|line| line.starts_with("VmRSS")).unwrap_or("VmRSS 0");
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        while resident_kib() < u64::from(memory_kib) {
            assert_eq!(child.try_wait().unwrap(), None, "it works until it is ended");
            std::thread::yield_now();
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal.as_raw()));
        assert!(!socket.exists());
    }
}
