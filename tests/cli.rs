//! What the program does with bad input: a clear error, its exit code, and nothing changed on media.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use common::{Bench, CHEAP_KDF, Run, noise, tool, tool_command};

const MIB: usize = 1 << 20;
/// Where the two header copies begin (format.md, layout of a namespace).
const COPIES: [usize; 2] = [0, 256 << 10];
const COPY_BYTES: usize = 64 << 10;
/// Where the metadata begins in a copy, and where its length and the CRC-32 are (format.md, a header copy).
const PREFIX_BYTES: usize = 128;
const METADATA_LEN: usize = 16;
const CRC: usize = 20;

const KEY: [&str; 2] = ["--key-file", "vault.key"];

/// A formatted `vault.img` of 8 MiB.
fn vault() -> Bench {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    bench
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Makes the CRC-32 of a copy right again.
fn fix_crc(copy: &mut [u8]) {
    let metadata_bytes = u32::from_le_bytes(copy[METADATA_LEN..METADATA_LEN + 4].try_into().unwrap()) as usize;
    copy[CRC..CRC + 4].fill(0);
    let crc = crc32fast::hash(&copy[..PREFIX_BYTES + metadata_bytes]);
    copy[CRC..CRC + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Replaces text in the metadata of both copies, with the CRC-32 fixed up, as a forger without the key can.
fn forge(path: &Path, from: &str, to: &str) {
    edit(path, |bytes| {
        for start in COPIES {
            let copy = &mut bytes[start..start + COPY_BYTES];
            let len = u32::from_le_bytes(copy[METADATA_LEN..METADATA_LEN + 4].try_into().unwrap()) as usize;
            let old = String::from_utf8(copy[PREFIX_BYTES..PREFIX_BYTES + len].to_vec()).unwrap();
            assert!(old.contains(from), "no {from} in {old}");
            let new = old.replacen(from, to, 1);
            copy[PREFIX_BYTES..].fill(0);
            copy[PREFIX_BYTES..PREFIX_BYTES + new.len()].copy_from_slice(new.as_bytes());
            copy[METADATA_LEN..METADATA_LEN + 4].copy_from_slice(&u32::try_from(new.len()).unwrap().to_le_bytes());
            fix_crc(copy);
        }
    });
}

fn dmtable(key: [&'static str; 2]) -> Vec<&'static str> {
    vec!["dmtable", "vault.img", key[0], key[1]]
}

#[test]
fn a_wrong_key_file_or_passphrase_is_exit_2() {
    let bench = vault();
    bench.secret("wrong.key", &[9; 64]);
    bench.secret("pass", b"correct horse\n");
    bench.secret("wrong", b"battery staple\n");
    bench.refused(&dmtable(["--key-file", "wrong.key"]), 2, &["cannot unlock vault.img", "none of 1 key slots"]);
    bench.refused(&dmtable(["--passphrase-file", "pass"]), 2, &["no key slot is of that kind", "1 key-file"]);
    let serve = ["serve", "vault.img", "--key-file", "wrong.key", "--socket", "vault.sock"];
    bench.refused(&serve, 2, &["try another passphrase"]);
    assert!(!bench.path("vault.sock").exists(), "nothing listens for a namespace that did not unlock");

    fs::remove_file(bench.path("vault.img")).unwrap();
    let mut args = vec!["format", "vault.img", "--size", "4M", "--passphrase-file", "pass"];
    args.extend(CHEAP_KDF);
    bench.run(&args).succeeds();
    bench.refused(&dmtable(["--passphrase-file", "wrong"]), 2, &["wrong passphrase or key file"]);
    bench.refused(&dmtable(KEY), 2, &["no key slot is of that kind", "1 passphrase"]);
    bench.run(&dmtable(["--passphrase-file", "pass"])).succeeds();
}

#[test]
fn a_key_file_that_is_short_or_missing_is_told_with_the_cure() {
    let bench = vault();
    bench.secret("short.key", &[1; 31]);
    let short = "has 31 bytes, but must have 32 to 8388608";
    bench.refused(&dmtable(["--key-file", "short.key"]), 1, &[short, "key list"]);
    bench.refused(&dmtable(["--key-file", "none.key"]), 1, &["none.key", "No such file", "key list"]);
    bench.refused(&dmtable(["--passphrase-file", "none"]), 1, &["passphrase file none", "No such file"]);
    let make = ["none.key", "head -c 64 /dev/urandom"];
    bench.run(&["format", "new.img", "--size", "4M", "--key-file", "none.key"]).fails(1, &make);
    let make = [short, "head -c 64 /dev/urandom"];
    bench.run(&["format", "new.img", "--size", "4M", "--key-file", "short.key"]).fails(1, &make);
    assert!(!bench.path("new.img").exists(), "a key that is not there leaves no file behind");
}

#[test]
fn a_key_file_that_others_can_read_is_a_warning() {
    let bench = vault();
    assert_eq!(bench.run(&dmtable(KEY)).succeeds().stderr.matches("warning").count(), 0);
    fs::set_permissions(bench.path("vault.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let run = bench.run(&dmtable(KEY)).succeeds();
    assert!(run.stderr.contains("can be read by others (mode 644"), "{}", run.stderr);
}

#[test]
fn what_is_not_a_namespace_is_exit_3() {
    let bench = Bench::new();
    for (content, words) in [
        (noise(1, 4 * MIB), &["this is not a daxcrypt namespace"][..]),
        (vec![0; 4 * MIB], &["this is not a daxcrypt namespace"]),
        (vec![7; 512], &["it has 512 bytes, fewer than the 2097152"]),
        (Vec::new(), &["0 bytes"]),
    ] {
        fs::write(bench.path("vault.img"), content).unwrap();
        bench.refused(&["info", "vault.img"], 3, words);
        bench.refused(&dmtable(KEY), 3, words);
    }
    let mut luks = vec![0; 4 * MIB];
    luks[..6].copy_from_slice(b"LUKS\xba\xbe");
    fs::write(bench.path("vault.img"), luks).unwrap();
    bench.refused(&["info", "vault.img"], 3, &["not a daxcrypt namespace (a LUKS volume was found)"]);
    bench.run(&["info", "none.img"]).fails(1, &["cannot open none.img", "no such file"]);
    bench.run(&["info", "/dev/null"]).fails(1, &["cannot open /dev/null", "can be mapped"]);
}

#[test]
fn a_torn_header_copy_still_opens_and_is_reported() {
    let bench = vault();
    let whole = fs::read(bench.path("vault.img")).unwrap();
    for (name, start) in ["A", "B"].into_iter().zip(COPIES) {
        for torn_at in [0, 1, 8, 20, 24, 31, 32, 63, 64, 127, 128, 129, 400, 700] {
            let mut torn = whole.clone();
            // A store that stopped at this byte: what follows is from an older header.
            torn[start + torn_at..start + COPY_BYTES].fill(0xee);
            fs::write(bench.path("vault.img"), &torn).unwrap();
            let run = bench.run(&dmtable(KEY)).succeeds();
            let warning = format!("header copy {name} is not usable");
            assert!(run.stderr.contains(&warning), "torn at {torn_at}: {}", run.stderr);
        }
    }
}

#[test]
fn two_damaged_header_copies_are_told_apart() {
    let bench = vault();
    edit(&bench.path("vault.img"), |bytes| {
        bytes[COPIES[0]] ^= 1;
        bytes[COPIES[1] + 200] ^= 1;
    });
    let words = ["both copies of the header are damaged", "copy A: it does not begin", "copy B: its CRC-32 is"];
    bench.refused(&["info", "vault.img"], 3, &words);
    bench.refused(&dmtable(KEY), 3, &words);
}

#[test]
fn a_header_from_the_future_is_left_alone() {
    let bench = vault();
    edit(&bench.path("vault.img"), |bytes| {
        // The other copy could be read, but it is older.
        bytes[COPIES[1] + 8] = 2;
        fix_crc(&mut bytes[COPIES[1]..COPIES[1] + COPY_BYTES]);
    });
    bench.refused(&dmtable(KEY), 3, &["format version 2", "knows version 1 only"]);
    let bench = vault();
    forge(&bench.path("vault.img"), "\"requirements\":[]", "\"requirements\":[\"time-travel\"]");
    bench.refused(&dmtable(KEY), 3, &["requires the feature \"time-travel\""]);
}

#[test]
fn geometry_that_does_not_fit_is_exit_3() {
    for (from, to, words) in [
        ("\"size_bytes\":8388608", "\"size_bytes\":8392704", &["needs 10489856 bytes", "10485760"][..]),
        ("\"size_bytes\":8388608", "\"size_bytes\":8388609", &["8388609", "4096"]),
        ("\"size_bytes\":8388608", "\"size_bytes\":0", &["0 bytes"]),
        ("\"size_bytes\":8388608", "\"size_bytes\":18446744073709547520", &["18446744073709547520"]),
        ("\"data_offset\":2097152", "\"data_offset\":1048576", &["1048576", "inside the header area"]),
        ("\"data_offset\":2097152", "\"data_offset\":2097664", &["2097664", "not a multiple of 2097152"]),
        ("\"data_offset\":2097152", "\"data_offset\":18446744073707454464", &["18446744073707454464"]),
        ("\"base\":0", "\"base\":2097152", &["relocated", "base 2097152", "byte 0"]),
        ("\"bound_address\":null", "\"bound_address\":4096", &["relocated", "0x1000"]),
    ] {
        let bench = vault();
        forge(&bench.path("vault.img"), from, to);
        bench.refused(&["info", "vault.img"], 3, words);
        bench.refused(&dmtable(KEY), 3, words);
    }
    let bench = vault();
    fs::File::options().write(true).open(bench.path("vault.img")).unwrap().set_len(9 << 20).unwrap();
    bench.refused(&dmtable(KEY), 3, &["needs 10485760 bytes", "9437184"]);
}

#[test]
fn forged_metadata_is_found_out() {
    for (from, to) in [
        ("\"label\":\"vault\"", "\"label\":\"fault\""),
        ("\"discards\":false", "\"discards\":true"),
        ("\"unclean\":false", "\"unclean\":true"),
    ] {
        let bench = vault();
        forge(&bench.path("vault.img"), from, to);
        bench.run(&["info", "vault.img"]).succeeds();
        bench.refused(&dmtable(KEY), 3, &["forged or damaged", "MAC"]);
    }
    // What the slots are bound to: not even the key unwraps.
    let bench = vault();
    forge(&bench.path("vault.img"), "\"size_bytes\":8388608", "\"size_bytes\":4194304");
    bench.refused(&dmtable(KEY), 2, &["none of 1 key slots"]);
}

#[test]
fn a_costly_argon2_is_refused_before_it_runs() {
    let bench = Bench::new();
    bench.secret("pass", b"correct horse");
    let mut args = vec!["format", "vault.img", "--size", "4M", "--passphrase-file", "pass"];
    args.extend(CHEAP_KDF);
    bench.run(&args).succeeds();
    let good = fs::read(bench.path("vault.img")).unwrap();
    for (from, to, words) in [
        ("\"memory_kib\":8192", "\"memory_kib\":4194305", &["4194305", "4194304"]),
        ("\"time\":1", "\"time\":1025", &["1025", "1024"]),
        ("\"lanes\":1", "\"lanes\":65", &["65", "64"]),
    ] {
        fs::write(bench.path("vault.img"), &good).unwrap();
        forge(&bench.path("vault.img"), from, to);
        bench.refused(&dmtable(["--passphrase-file", "pass"]), 3, words);
    }
    let costs = ["format", "new.img", "--size", "4M", "--passphrase-file", "pass", "--kdf-memory", "8G"];
    bench.run(&costs).fails(1, &["8388608", "4194304"]);
    assert!(!bench.path("new.img").exists());
}

#[test]
fn a_size_that_is_no_multiple_of_the_unit_makes_no_file() {
    let bench = Bench::new();
    let format = |size, unit| {
        bench.run(&["format", "vault.img", "--size", size, "--unit", unit, "--key-file", "vault.key", "--sparse"])
    };
    format("6000", "4096").fails(1, &["size of 6000 bytes", "data unit of 4096 bytes"]);
    format("6000", "512").fails(1, &["6000", "512"]);
    format("0", "4096").fails(1, &["the size is 0 bytes"]);
    assert!(!bench.path("vault.img").exists());
    format("6144", "512").succeeds();
}

#[test]
fn a_served_namespace_is_busy_and_can_be_looked_at() {
    let bench = vault();
    let server = bench.serve("vault.img", &[]);
    bench.run(&dmtable(KEY)).fails(5, &["cannot open vault.img", "busy", "try: stop the process"]);
    let force = ["format", "vault.img", "--key-file", "vault.key", "--force"];
    bench.run(&force).fails(5, &["busy"]);
    bench.run(&["serve", "vault.img", KEY[0], KEY[1], "--socket", "other.sock"]).fails(5, &["busy"]);
    bench.run(&["info", "vault.img"]).succeeds();
    bench.format("other.img", "4M", &[]);
    let same_socket = ["serve", "other.img", KEY[0], KEY[1], "--socket", "vault.img.sock"];
    bench.run(&same_socket).fails(5, &["vault.img.sock"]);
    server.stop();
    bench.run(&dmtable(KEY)).succeeds();
}

#[test]
fn read_only_refuses_writes_and_shares() {
    let bench = vault();
    let before = fs::read(bench.path("vault.img")).unwrap();
    let server = bench.serve("vault.img", &["--read-only"]);
    let info = tool("nbdinfo", &["--json", &server.uri("vault")]);
    let json: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
    assert_eq!(json["exports"][0]["is_read_only"], true);
    bench.run(&dmtable(KEY)).succeeds();
    fs::write(bench.path("in.img"), noise(3, 8 * MIB)).unwrap();
    let copy = tool_command("nbdcopy", &[bench.path("in.img").to_str().unwrap(), &server.uri("vault")]);
    assert!(!Run::of(copy).status.success());
    server.stop();
    assert!(fs::read(bench.path("vault.img")).unwrap() == before);
}

#[test]
fn a_backing_that_shrinks_while_served_is_an_error_of_the_request() {
    let bench = vault();
    let server = bench.serve("vault.img", &[]);
    fs::File::options().write(true).open(bench.path("vault.img")).unwrap().set_len(4 << 20).unwrap();
    let read = Run::of(tool_command("nbdcopy", &[&server.uri("vault"), "null:"]));
    assert!(!read.status.success(), "half of the data is gone");
    assert_eq!(tool("nbdinfo", &["--size", &server.uri("vault")]).stdout.trim(), "8388608", "the server goes on");
    server.kill();
}

#[test]
fn format_overwrites_nothing_that_looks_like_data() {
    let at = |offset: usize, magic: &[u8]| {
        let mut image = vec![0; 8 * MIB];
        image[offset..offset + magic.len()].copy_from_slice(magic);
        image
    };
    let bench = vault();
    let daxcrypt = fs::read(bench.path("vault.img")).unwrap();
    fs::write(bench.path("fs.img"), vec![0; 8 * MIB]).unwrap();
    tool("mkfs.ext4", &["-q", "-F", bench.path("fs.img").to_str().unwrap()]);
    for (image, what) in [
        (fs::read(bench.path("fs.img")).unwrap(), "ext4 filesystem"),
        (at(0, b"LUKS\xba\xbe"), "LUKS volume"),
        (at(512, b"EFI PART"), "GPT partition table"),
        (daxcrypt, "daxcrypt namespace"),
        (at(2 * MIB - 1, b"\x01"), "data of unknown kind at byte 2097151"),
    ] {
        fs::write(bench.path("vault.img"), image).unwrap();
        let format = ["format", "vault.img", KEY[0], KEY[1]];
        bench.refused(&format, 1, &["vault.img already holds data", what, "try: --force"]);
        bench.run(&[&format[..], &["--force"]].concat()).succeeds();
        bench.run(&dmtable(KEY)).succeeds();
    }
    fs::write(bench.path("vault.img"), vec![0; 8 * MIB]).unwrap();
    let too_large = ["format", "vault.img", KEY[0], KEY[1], "--size", "8M"];
    bench.refused(&too_large, 1, &["needs 10485760 bytes", "8388608"]);
    bench.run(&["format", "vault.img", KEY[0], KEY[1]]).succeeds();
    fs::write(bench.path("vault.img"), vec![0; MIB]).unwrap();
    bench.refused(&["format", "vault.img", KEY[0], KEY[1]], 1, &["1048576 bytes are too few"]);
}

#[test]
fn info_prints_json_without_secrets() {
    let bench = vault();
    let run = bench.run(&["info", "vault.img", "--json"]).succeeds();
    let json: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(json["path"], "vault.img");
    assert_eq!(json["label"], "vault");
    assert_eq!(json["size_bytes"], 8 << 20);
    assert_eq!(json["data_offset"], 2 << 20);
    assert_eq!(json["unit_bytes"], 4096);
    assert_eq!(json["cipher"], "aes-xts-plain64");
    assert_eq!(json["slots"][0]["kdf"], "hkdf-sha256");
    assert_eq!(json["copies"][1]["good"]["sequence"], json["sequence"]);
    assert_eq!(json["granularity"], "page");
    for secret in ["salt", "nonce", "wrapped", "mac"] {
        assert!(!run.stdout.contains(secret), "{secret} in {}", run.stdout);
    }
}

#[test]
fn dmtable_hides_the_key_unless_asked() {
    let bench = vault();
    let hidden = bench.run(&dmtable(KEY)).succeeds().stdout;
    assert_eq!(hidden.trim(), "0 16384 crypt aes-xts-plain64 KEY 4096 vault.img 4096 1 sector_size:4096");
    let shown = bench.run(&["dmtable", "vault.img", KEY[0], KEY[1], "--show-key"]).succeeds().stdout;
    let key = shown.split_whitespace().nth(4).unwrap();
    assert!(key.len() == 128 && key.bytes().all(|c| c.is_ascii_hexdigit()), "{shown}");
    assert_eq!(shown.replace(key, "KEY"), hidden);
}

#[test]
fn a_passphrase_comes_from_a_file_or_standard_input_but_not_from_nowhere() {
    let bench = Bench::new();
    bench.secret("pass", b"correct horse\n");
    let mut args = vec!["format", "vault.img", "--size", "4M", "--passphrase-file", "-"];
    args.extend(CHEAP_KDF);
    Run::with_input(bench.command(&args), b"correct horse").succeeds();
    bench.run(&dmtable(["--passphrase-file", "pass"])).succeeds();
    let stdin = dmtable(["--passphrase-file", "-"]);
    Run::with_input(bench.command(&stdin), b"correct horse\n").succeeds();
    Run::with_input(bench.command(&stdin), b"correct horse\n\n").fails(2, &["wrong passphrase"]);
    Run::with_input(bench.command(&stdin), b"\n").fails(1, &["the passphrase is empty"]);
    Run::with_input(bench.command(&["dmtable", "vault.img"]), b"correct horse\n")
        .fails(1, &["cannot ask for a passphrase", "not a terminal", "--passphrase-file"]);
}

#[test]
fn usage_errors_are_exit_1() {
    let bench = vault();
    for (args, word) in [
        (&[][..], "Usage"),
        (&["frobnicate"], "frobnicate"),
        (&["info"], "<PATH>"),
        (&["info", "vault.img", "--jsn"], "--jsn"),
        (&["dmtable", "vault.img", "--key-file", "vault.key", "--passphrase-file", "x"], "cannot be used with"),
        (&["format", "x.img", "--size", "4GB", "--key-file", "vault.key"], "type 4G,"),
        (&["format", "x.img", "--size", "99999999999999999999", "--key-file", "vault.key"], "64 bits"),
        (&["format", "x.img", "--unit", "1024", "--key-file", "vault.key"], "[possible values: 512, 4096]"),
        (&["format", "x.img", "--key-file", "vault.key"], "say how large it is to be"),
        (&["serve", "vault.img", "--key-file", "vault.key"], "--socket"),
        (&["serve", "vault.img", "--key-file", "vault.key", "--listen", "nonsense"], "cannot listen on nonsense"),
    ] {
        bench.run(args).fails(1, &[word]);
    }
    assert!(!bench.path("x.img").exists());
    let long = "x".repeat(65);
    let label = ["format", "x.img", "--size", "4M", "--key-file", "vault.key", "--label", &long];
    bench.run(&label).fails(1, &["label", "64"]);
    assert!(!bench.path("x.img").exists());
}

#[test]
fn help_lists_exit_codes_and_examples() {
    let bench = Bench::new();
    let help = bench.run(&["--help"]).succeeds().stdout;
    for line in ["0  ok", "1  usage", "2  wrong passphrase", "3  not a namespace", "4  I/O error", "5  busy"] {
        assert!(help.contains(line), "no {line:?} in {help}");
    }
    for command in ["format", "info", "serve", "dmtable"] {
        assert!(help.contains(command), "{command}");
        let of_command = bench.run(&[command, "--help"]).succeeds().stdout;
        assert!(of_command.contains(&format!("daxcrypt {command} ")), "no example of {command} in {of_command}");
    }
    assert!(bench.run(&["--version"]).succeeds().stdout.starts_with("daxcrypt "));
}

#[test]
fn the_backend_can_be_named_and_a_wrong_name_is_told() {
    let bench = vault();
    let mut command = bench.command(&["info", "vault.img"]);
    command.env("DAXCRYPT_XTS_BACKEND", "abacus").stderr(Stdio::piped());
    Run::of(command).fails(1, &["AES-XTS backend", "abacus"]);
    let mut command = bench.command(&["info", "vault.img", "--json"]);
    command.env("DAXCRYPT_XTS_BACKEND", "portable");
    assert!(Run::of(command).succeeds().stdout.contains("\"xts_backend\": \"portable\""));
}
