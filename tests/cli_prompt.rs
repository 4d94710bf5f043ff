//! Passphrases typed at a real terminal: python3's `pty` holds the other end of it.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/terminal.rs"]
mod terminal;

use common::{Bench, CHEAP_KDF};
use serde_json::json;
use terminal::{SIGNAL, typed};

const PROMPT: &str = "Passphrase for vault.img: ";

/// A namespace that `passphrase` opens.
fn bench(passphrase: &[u8]) -> Bench {
    let bench = Bench::new();
    bench.secret("pass", passphrase);
    let format = ["format", "vault.img", "--size", "4M", "--passphrase-file", "pass"];
    bench.run(&[&format[..], &CHEAP_KDF].concat()).succeeds();
    bench
}

#[test]
fn ctrl_c_ends_the_program_and_leaves_the_echo_on() {
    let bench = bench(b"secret");
    for (key, signal) in [(b"\x03", 2), (b"\x1c", 3)] {
        let run = typed(&bench, &["key", "test", "vault.img"], &[(PROMPT, &[b"secr", &key[..]].concat())]);
        assert_eq!((&run["signal"], &run["echo"]), (&json!(signal), &json!(true)), "{run}");
        assert!(!run["shown"].as_str().unwrap().contains("secr"), "{run}");
    }
}

#[test]
fn a_signal_from_elsewhere_ends_the_program_and_leaves_the_echo_on() {
    let bench = bench(b"secret");
    for signal in [15, 1] {
        let sent = [SIGNAL, &[signal]].concat();
        let run = typed(&bench, &["key", "test", "vault.img"], &[(PROMPT, &sent)]);
        assert_eq!((&run["signal"], &run["echo"]), (&json!(signal), &json!(true)), "{run}");
    }
}

#[test]
fn what_is_typed_arrives_byte_by_byte_and_can_be_corrected() {
    for passphrase in [&b"tab\there"[..], b"caf\xe9", "schl\u{fc}ssel \u{1f512}".as_bytes(), b"\x01\x1b[A\xff"] {
        let bench = bench(passphrase);
        let corrections: [&[u8]; 5] = [b"", b"wrong\x15", b"wrong \xc3\xa4 x\x17\x17\x17", b"\xe4\x7f", b"stop\x1a"];
        for before in corrections {
            let again = [(PROMPT, before), (PROMPT, &[passphrase, b"\n"].concat())];
            let at_once = [(PROMPT, &[before, passphrase, b"\r"].concat()[..])];
            // After Ctrl-Z the question is asked again; there is nobody here who would stop it.
            let steps = if before.ends_with(b"\x1a") { &again[..] } else { &at_once[..] };
            let run = typed(&bench, &["key", "test", "vault.img"], steps);
            assert_eq!((&run["code"], &run["echo"]), (&json!(0), &json!(true)), "{passphrase:?} {before:?} {run}");
        }
    }
}

#[test]
fn a_new_passphrase_is_typed_twice_and_not_shown() {
    let bench = bench(b"secret");
    let add = ["key", "add", "vault.img", "--kdf-memory", "8M", "--kdf-time", "1"];
    let new = "Passphrase for the key slot of vault.img, new: ";
    let run = typed(&bench, &add, &[(PROMPT, b"secret\n"), (new, b"second\n"), ("The same again: ", b"secund\n")]);
    assert_eq!(run["code"], 1, "{run}");
    assert!(run["shown"].as_str().unwrap().contains("differ"), "{run}");
    let run = typed(&bench, &add, &[(PROMPT, b"secret\n"), (new, b"second\n"), ("The same again: ", b"second\n")]);
    assert_eq!((&run["code"], &run["echo"]), (&json!(0), &json!(true)), "{run}");
    assert!(!run["shown"].as_str().unwrap().contains("sec"), "{run}");
}
