//! LUKS2 with `cryptsetup` on the other side: it formats, encrypts and decrypts plain files without the kernel's help, and
//! every byte must agree in both directions.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use aes::cipher::KeyInit;
use common::{Bench, CHEAP_KDF, Run, Server, noise, open_when_free, tool, tool_command};
use daxcrypt::dax::MapOptions;
use daxcrypt::luks2::Locked;
use daxcrypt::namespace::{Credential, Site};
use daxcrypt::pmem::{Access, Backing};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;
use serde_json::{Value, json};
use sha2::Digest;
use xts_mode::{Xts128, get_tweak_default};

const MIB: usize = 1 << 20;
const PASSPHRASE: &[u8] = b"correct horse";
const PASS: [&str; 2] = ["--passphrase-file", "pass"];
const PBKDF2: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
const ARGON2ID: [&str; 8] =
    ["--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "1"];
/// Both copies of a header as `cryptsetup` makes it, and where the metadata begins in a copy.
const COPIES: [usize; 2] = [0, 16 << 10];
const COPY_BYTES: usize = 16 << 10;
const JSON: usize = 4096;

fn bench() -> Bench {
    let bench = Bench::new();
    bench.secret("pass", PASSPHRASE);
    bench
}

/// `cryptsetup ACTION ... --key-file pass`, without locks in /run and without the kernel.
fn cryptsetup(bench: &Bench, action: &str, more: &[&str]) -> Run {
    let fixed = [action, "-q", "--disable-locks", "--key-file", "pass"];
    let mut command = tool_command("cryptsetup", &[&fixed[..], more].concat());
    command.current_dir(bench.dir.path());
    Run::of(command)
}

/// Makes `data.img` of `mib` MiB with random content and formats it.
fn luks_format(bench: &Bench, mib: usize, more: &[&str]) {
    fs::write(bench.path("data.img"), noise(9, mib * MIB)).unwrap();
    cryptsetup(bench, "luksFormat", &[&["--type", "luks2"][..], more, &["data.img"]].concat()).succeeds();
}

fn serve(bench: &Bench, more: &[&str]) -> Server {
    let socket = bench.path("luks.sock");
    let fixed = ["serve", "data.img", "--luks2", "--socket", socket.to_str().unwrap()];
    Server::start(bench.command(&[&fixed[..], &PASS, more].concat()), socket.clone())
}

fn copy_in(bench: &Bench, server: &Server, plaintext: &[u8]) {
    fs::write(bench.path("in.img"), plaintext).unwrap();
    tool("nbdcopy", &[bench.path("in.img").to_str().unwrap(), &server.uri("data")]);
}

fn copy_out(bench: &Bench, server: &Server) -> Vec<u8> {
    tool("nbdcopy", &[&server.uri("data"), bench.path("out.img").to_str().unwrap()]);
    fs::read(bench.path("out.img")).unwrap()
}

/// Decrypts by `xts-mode` with the volume key that `cryptsetup` dumps.
fn decrypted_by_xts_mode(bench: &Bench, mut data: Vec<u8>, sector: usize) -> Vec<u8> {
    let dump = ["--dump-volume-key", "--volume-key-file", "volume.key", "data.img"];
    cryptsetup(bench, "luksDump", &dump).succeeds();
    let key = fs::read(bench.path("volume.key")).unwrap();
    let (first, second) = key.split_at(key.len() / 2);
    // Tweaks count sectors of 512 bytes, whatever the sector size.
    let tweak = |index: u128| get_tweak_default(index * (sector as u128 / 512));
    if first.len() == 32 {
        let cipher = |half: &[u8]| aes::Aes256::new_from_slice(half).unwrap();
        Xts128::new(cipher(first), cipher(second)).decrypt_area(&mut data, sector, 0, tweak);
    } else {
        let cipher = |half: &[u8]| aes::Aes128::new_from_slice(half).unwrap();
        Xts128::new(cipher(first), cipher(second)).decrypt_area(&mut data, sector, 0, tweak);
    }
    data
}

#[test]
fn what_we_write_into_an_attached_volume_is_what_an_independent_xts_reads() {
    for (pbkdf, sector, bits) in [(&PBKDF2[..], "512", "512"), (&ARGON2ID, "4096", "512"), (&PBKDF2, "4096", "256")] {
        let bench = bench();
        luks_format(&bench, 20, &[pbkdf, &["--sector-size", sector, "--key-size", bits]].concat());
        let plaintext = noise(3, 4 * MIB);
        let server = serve(&bench, &[]);
        copy_in(&bench, &server, &plaintext);
        server.stop();
        let data = fs::read(bench.path("data.img")).unwrap()[16 * MIB..].to_vec();
        assert!(decrypted_by_xts_mode(&bench, data, sector.parse().unwrap()) == plaintext, "{sector} {bits}");
        let server = serve(&bench, &["--read-only"]);
        assert!(copy_out(&bench, &server) == plaintext);
        server.stop();
        cryptsetup(&bench, "open", &["--test-passphrase", "data.img"]).succeeds();
    }
}

#[test]
fn what_cryptsetup_encrypts_we_read_and_what_we_write_it_decrypts() {
    for sector in ["512", "4096"] {
        let bench = bench();
        let plaintext = noise(4, 2 * MIB);
        fs::write(bench.path("data.img"), &plaintext).unwrap();
        let detached = ["--header", "data.luks", "--force-offline-reencrypt"];
        let encrypt = [&["--encrypt"][..], &detached, &PBKDF2, &["--sector-size", sector, "data.img"]].concat();
        cryptsetup(&bench, "reencrypt", &encrypt).succeeds();
        assert!(fs::read(bench.path("data.img")).unwrap() != plaintext);
        let server = serve(&bench, &["--header", "data.luks"]);
        assert!(copy_out(&bench, &server) == plaintext, "we read what it encrypted");
        let other = noise(5, 2 * MIB);
        copy_in(&bench, &server, &other);
        server.stop();
        cryptsetup(&bench, "reencrypt", &[&["--decrypt"][..], &detached, &["data.img"]].concat()).succeeds();
        assert!(fs::read(bench.path("data.img")).unwrap() == other, "it reads what we encrypted");
    }
}

/// Unlocks `data.img`, with a detached header if there is one, maps it as a program does, finds `plaintext` there, and
/// stores over some of it: what the volume is to hold then.
fn changed_through_maps(bench: &Bench, header: Option<&str>, plaintext: &[u8]) -> Vec<u8> {
    let open = |name: &str| Arc::new(open_when_free(&bench.path(name)));
    let site = Site::whole(open("data.img")).with_header(header.map(open));
    let credential = Credential::Passphrase(SecretBytes::copy_of(PASSPHRASE));
    let unlocked = Locked::open(&site).unwrap().unlock(&credential).unwrap();
    let volume = Arc::new(Volume::from_luks2(unlocked, Backend::detect()));
    let mut expected = plaintext.to_vec();
    assert_eq!(volume.size(), expected.len() as u64);

    let mut alone = volume.map_exclusive(4096..64 << 10).unwrap();
    assert!(alone[..] == plaintext[4096..64 << 10]);
    alone[100..5000].fill(0xa5);
    alone.persist(100..5000).unwrap();
    expected[4196..9096].fill(0xa5);
    drop(alone);

    let shared = volume.map(0..volume.size(), &MapOptions::new().writable().resident_max(256 << 10)).unwrap();
    let mut found = vec![0; expected.len()];
    shared.read(0, &mut found).unwrap();
    assert!(found == expected);
    let last = expected.len() - 1000;
    shared.write(last as u64, &[0x3c; 1000]).unwrap();
    shared.persist(last as u64..expected.len() as u64).unwrap();
    expected[last..].fill(0x3c);
    shared.close().unwrap();
    expected
}

#[test]
fn what_a_direct_map_stores_cryptsetup_and_an_independent_xts_read() {
    for sector in ["512", "4096"] {
        let bench = bench();
        let plaintext = noise(7, 2 * MIB);
        fs::write(bench.path("data.img"), &plaintext).unwrap();
        let detached = ["--header", "data.luks", "--force-offline-reencrypt"];
        let encrypt = [&["--encrypt"][..], &detached, &PBKDF2, &["--sector-size", sector, "data.img"]].concat();
        cryptsetup(&bench, "reencrypt", &encrypt).succeeds();
        let expected = changed_through_maps(&bench, Some("data.luks"), &plaintext);
        cryptsetup(&bench, "reencrypt", &[&["--decrypt"][..], &detached, &["data.img"]].concat()).succeeds();
        assert!(fs::read(bench.path("data.img")).unwrap() == expected, "detached, {sector}");

        luks_format(&bench, 18, &[&PBKDF2[..], &["--sector-size", sector]].concat());
        let data = || fs::read(bench.path("data.img")).unwrap()[16 * MIB..].to_vec();
        let sector = sector.parse().unwrap();
        let plaintext = decrypted_by_xts_mode(&bench, data(), sector);
        fs::remove_file(bench.path("volume.key")).unwrap();
        let expected = changed_through_maps(&bench, None, &plaintext);
        assert!(decrypted_by_xts_mode(&bench, data(), sector) == expected, "attached, {sector}");
    }
}

#[test]
fn an_exported_header_lets_cryptsetup_take_over() {
    let argon2id = [&["--pbkdf", "argon2id"][..], &CHEAP_KDF].concat();
    let pbkdf2 = ["--pbkdf", "pbkdf2", "--pbkdf2-iterations", "1000"];
    for (kdf, unit, cipher) in
        [(&argon2id[..], "4096", "aes-256-xts"), (&pbkdf2, "512", "aes-256-xts"), (&pbkdf2, "4096", "aes-128-xts")]
    {
        let bench = bench();
        let place = ["data.img", "--header", "data.header", "--key-file", "vault.key"];
        let format = ["--size", "2M", "--unit", unit, "--cipher", cipher];
        bench.run(&[&["format"][..], &place, &format].concat()).succeeds();
        let plaintext = noise(6, 2 * MIB);
        let socket = bench.path("s");
        let listen = ["--socket", socket.to_str().unwrap()];
        let server = Server::start(bench.command(&[&["serve"][..], &place, &listen].concat()), socket.clone());
        copy_in(&bench, &server, &plaintext);
        server.stop();
        let export = [&["header", "export"][..], &place, &["--luks2", "data.luks"], kdf].concat();
        bench.run(&[&export[..], &["--new-passphrase-file", "pass"]].concat()).succeeds();

        let dump = tool("cryptsetup", &["luksDump", bench.path("data.luks").to_str().unwrap()]).stdout;
        let bits = if cipher == "aes-128-xts" { "256 bits" } else { "512 bits" };
        assert!(dump.contains("cipher: aes-xts-plain64") && dump.contains(bits), "{dump}");
        assert!(dump.contains(&format!("sector: {unit} [bytes]")), "{dump}");
        cryptsetup(&bench, "open", &["--test-passphrase", "--header", "data.luks", "data.img"]).succeeds();
        // We open our own export, too.
        let server = serve(&bench, &["--header", "data.luks", "--read-only"]);
        assert!(copy_out(&bench, &server) == plaintext);
        server.stop();
        let decrypt = ["--decrypt", "--header", "data.luks", "--force-offline-reencrypt", "data.img"];
        cryptsetup(&bench, "reencrypt", &decrypt).succeeds();
        // The page of the tag is behind it.
        assert!(fs::read(bench.path("data.img")).unwrap()[..2 * MIB] == plaintext, "{unit} {cipher}");
    }
}

#[test]
fn an_export_needs_a_detached_header_and_a_right_key() {
    let bench = bench();
    bench.format("vault.img", "4M", &[]);
    let export = ["header", "export", "vault.img", "--luks2", "vault.luks", "--key-file", "vault.key"];
    bench.refused(&export, 1, &["detached header"]);
    let place = ["data.img", "--header", "data.header"];
    bench.run(&[&["format"][..], &place, &["--size", "2M", "--key-file", "vault.key"]].concat()).succeeds();
    let export = [&["header", "export"][..], &place, &["--luks2", "data.luks"]].concat();
    let run = |more: &[&str]| bench.run(&[&export[..], more].concat());
    run(&PASS).fails(2, &["no key slot is of that kind"]);
    let few = ["--key-file", "vault.key", "--pbkdf", "pbkdf2", "--pbkdf2-iterations", "999"];
    run(&few).fails(1, &["999 iterations", "1000"]);
    assert!(!bench.path("data.luks").exists());
    // The key file opens the LUKS2 slot as well, when no other key is named.
    let cheap = [&["--key-file", "vault.key", "--pbkdf", "argon2id"][..], &CHEAP_KDF].concat();
    run(&cheap).succeeds();
    let test = ["open", "--test-passphrase", "--disable-locks", "--header", "data.luks", "--key-file", "vault.key"];
    let mut command = tool_command("cryptsetup", &[&test[..], &["data.img"]].concat());
    command.current_dir(bench.dir.path());
    Run::of(command).succeeds();
    run(&cheap).fails(1, &["data.luks", "exists"]);
}

#[test]
fn wrong_passphrases_and_other_formats_are_told_apart() {
    let bench = bench();
    luks_format(&bench, 20, &PBKDF2);
    bench.secret("wrong", b"battery staple");
    let serve = |key: [&str; 2]| bench.run(&["serve", "data.img", "--luks2", "--socket", "s", key[0], key[1]]);
    serve(["--passphrase-file", "wrong"]).fails(2, &["none of 1 LUKS2 key slots"]);
    bench
        .run(&["serve", "data.img", "--socket", "s", "--passphrase-file", "pass"])
        .fails(3, &["not a daxcrypt namespace", "LUKS", "--luks2"]);
    bench.run(&["info", "vault.key", "--luks2"]).fails(3, &["not a LUKS2 volume"]);
    fs::write(bench.path("data.img"), vec![0; 4 * MIB]).unwrap();
    cryptsetup(&bench, "luksFormat", &["--type", "luks1", "--pbkdf-force-iterations", "1000", "data.img"]).succeeds();
    bench.run(&["info", "data.img", "--luks2"]).fails(3, &["LUKS1", "cryptsetup convert"]);
    for (more, words) in [
        (&["--cipher", "aes-cbc-essiv:sha256"][..], &["aes-cbc-essiv:sha256", "only aes-xts-plain64"][..]),
        (&["--sector-size", "1024"], &["1024", "512 and 4096"]),
    ] {
        luks_format(&bench, 20, &[&PBKDF2, more].concat());
        bench.run(&["info", "data.img", "--luks2"]).fails(3, words);
    }
}

#[test]
fn info_shows_what_luksdump_shows() {
    let bench = bench();
    luks_format(&bench, 20, &[&ARGON2ID[..], &["--label", "tank"]].concat());
    let text = bench.run(&["info", "data.img", "--luks2"]).succeeds().stdout;
    let json: Value =
        serde_json::from_str(&bench.run(&["info", "data.img", "--luks2", "--json"]).succeeds().stdout).unwrap();
    let uuid = tool("cryptsetup", &["luksUUID", bench.path("data.img").to_str().unwrap()]).stdout;
    assert_eq!(json["uuid"], uuid.trim());
    assert_eq!(
        (&json["label"], &json["size_bytes"], &json["data_offset"]),
        (&json!("tank"), &json!(4 << 20), &json!(16 << 20))
    );
    assert!(text.contains("Argon2id with 32 KiB and 4 passes") && text.contains(uuid.trim()), "{text}");
    assert!(!json.to_string().contains("salt"));
}

#[test]
fn a_damaged_primary_header_is_made_up_for_by_the_secondary() {
    let bench = bench();
    luks_format(&bench, 20, &PBKDF2);
    let good = fs::read(bench.path("data.img")).unwrap();
    for at in [0, 100, 4100] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        fs::write(bench.path("data.img"), &bytes).unwrap();
        let server = serve(&bench, &["--read-only"]);
        server.stop();
        let text = bench.run(&["info", "data.img", "--luks2"]).succeeds().stdout;
        assert!(text.contains("1st header     not usable") && text.contains("2nd header     good"), "{text}");
        bytes[COPIES[1] + at] ^= 1;
        fs::write(bench.path("data.img"), &bytes).unwrap();
        let words = if at == 0 { "not a LUKS2 volume" } else { "both copies of the LUKS2 header are damaged" };
        bench.run(&["info", "data.img", "--luks2"]).fails(3, &[words]);
        assert!(fs::read(bench.path("data.img")).unwrap() == bytes, "nothing is repaired");
    }
}

/// As a power cut leaves them between the two copies, and `cryptsetup` finishes it.
#[test]
fn copies_of_which_one_is_older_are_told() {
    let bench = bench();
    luks_format(&bench, 18, &PBKDF2);
    let before = fs::read(bench.path("data.img")).unwrap();
    cryptsetup(&bench, "config", &["--label", "newer", "data.img"]).succeeds();
    let mut image = fs::read(bench.path("data.img")).unwrap();
    image[16 << 10..32 << 10].copy_from_slice(&before[16 << 10..32 << 10]);
    fs::write(bench.path("data.img"), image).unwrap();
    let said = bench.run(&["info", "data.img", "--luks2"]).succeeds().stdout;
    assert!(said.contains("newer") && said.contains("two copies of the header differ"), "{said}");
    let json = bench.run(&["info", "data.img", "--luks2", "--json"]).succeeds().stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(json["warnings"][0].as_str().unwrap().contains("by cryptsetup"), "{json}");
    cryptsetup(&bench, "config", &["--label", "last", "data.img"]).succeeds();
    let said = bench.run(&["info", "data.img", "--luks2"]).succeeds().stdout;
    assert!(!said.contains("warning"), "{said}");
}

#[test]
fn an_unfinished_reencryption_is_refused() {
    let bench = bench();
    fs::write(bench.path("data.img"), noise(4, 2 * MIB)).unwrap();
    let begin = ["--encrypt", "--init-only", "--header", "data.luks", "--force-offline-reencrypt"];
    cryptsetup(&bench, "reencrypt", &[&begin[..], &PBKDF2, &["data.img"]].concat()).succeeds();
    bench.run(&["info", "data.img", "--luks2", "--header", "data.luks"]).fails(3, &["reencryption", "in progress"]);
}

/// Changes the metadata of both copies, with length and checksum made right again.
fn with_metadata(good: &[u8], change: impl Fn(&mut Value)) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for start in COPIES {
        let copy = &mut bytes[start..start + COPY_BYTES];
        let end = copy[JSON..].iter().position(|&byte| byte == 0).unwrap();
        let mut metadata: Value = serde_json::from_slice(&copy[JSON..JSON + end]).unwrap();
        change(&mut metadata);
        let text = serde_json::to_vec(&metadata).unwrap();
        copy[JSON..].fill(0);
        copy[JSON..JSON + text.len()].copy_from_slice(&text);
    }
    fix_checksums(&mut bytes);
    bytes
}

fn fix_checksums(bytes: &mut [u8]) {
    for start in COPIES {
        let copy = &mut bytes[start..start + COPY_BYTES];
        copy[448..512].fill(0);
        let digest = sha2::Sha256::digest(&*copy);
        copy[448..480].copy_from_slice(&digest);
    }
}

#[test]
fn what_cryptsetup_overlooks_and_what_it_does_not_is_refused_by_name() {
    let bench = bench();
    luks_format(&bench, 20, &PBKDF2);
    let path = bench.path("data.img");
    let good = fs::read(&path).unwrap();
    let refused = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let bytes = with_metadata(&good, change);
        fs::write(&path, &bytes).unwrap();
        bench.run(&["info", "data.img", "--luks2"]).fails(3, words);
        bench.run(&[&["serve", "data.img", "--luks2", "--socket", "s"][..], &PASS].concat()).fails(3, words);
        assert!(fs::read(&path).unwrap() == bytes, "{words:?}: a refused volume was changed");
        cryptsetup(&bench, "open", &["--test-passphrase", "data.img"]).status.success()
    };
    // With one segment its tweak is ignored there: such a volume would be read with other tweaks than it says.
    assert!(refused(&|metadata| metadata["segments"]["0"]["iv_tweak"] = json!("8"), &["iv_tweak of 8", "only 0"]));
    let requirement = |metadata: &mut Value| {
        metadata["config"]["requirements"] = json!({"mandatory": ["time-travel"]});
    };
    refused(&requirement, &["time-travel"]);
    refused(
        &|metadata| {
            metadata["segments"]["0"]["integrity"] =
                json!({"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"});
        },
        &["integrity"],
    );
}

#[test]
fn data_never_begins_within_a_header_and_its_key_slots() {
    let bench = bench();
    // A detached header, given as if the data were behind it.
    fs::write(bench.path("data.img"), noise(9, 2 * MIB)).unwrap();
    let format = [&["--type", "luks2", "--header", "data.luks"][..], &PBKDF2, &["data.img"]].concat();
    cryptsetup(&bench, "luksFormat", &format).succeeds();
    let header = fs::read(bench.path("data.luks")).unwrap();
    let hint = ["within the header and its key slots", "--header data.luks"];
    bench.run(&["info", "data.luks", "--luks2"]).fails(3, &hint);
    bench.run(&[&["serve", "data.luks", "--luks2", "--socket", "s"][..], &PASS].concat()).fails(3, &hint);
    assert!(fs::read(bench.path("data.luks")).unwrap() == header);
    serve(&bench, &["--header", "data.luks"]).stop();

    // An attached one whose data reaches into the place of the key slots by one sector.
    luks_format(&bench, 20, &PBKDF2);
    let path = bench.path("data.img");
    let good = fs::read(&path).unwrap();
    for (offset, is_apart) in [("16777216", true), ("16773120", false), ("32768", false), ("0", false)] {
        let bytes = with_metadata(&good, |metadata| metadata["segments"]["0"]["offset"] = json!(offset));
        fs::write(&path, bytes).unwrap();
        assert_eq!(we_open(&path), is_apart, "{offset}");
    }
}

#[test]
fn labels_and_metadata_reach_no_terminal_as_commands() {
    let bench = bench();
    luks_format(&bench, 20, &PBKDF2);
    let path = bench.path("data.img");
    let good = fs::read(&path).unwrap();
    let mut bytes = good.clone();
    let label = b"\x1b[2J\xc2\x9b31m\nsize 1 TiB";
    COPIES.iter().for_each(|start| bytes[start + 24..][..label.len()].copy_from_slice(label));
    fix_checksums(&mut bytes);
    fs::write(&path, &bytes).unwrap();
    let shown = bench.run(&["info", "data.img", "--luks2"]).succeeds().stdout;
    assert!(shown.contains("\\u001b[2J\\u009b31m\n  size 1 TiB"), "{shown}");
    let shown = bench.run(&["info", "data.img", "--luks2", "--json"]).succeeds().stdout;
    assert!(!shown.contains(['\x1b', '\u{9b}']), "{shown}");
    let json: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(json["label"].as_str().unwrap().as_bytes(), label);
    let kind = |metadata: &mut Value| metadata["keyslots"]["0"]["kdf"]["type"] = json!("\x1b[2J");
    fs::write(&path, with_metadata(&good, kind)).unwrap();
    bench.run(&["info", "data.img", "--luks2"]).fails(3, &["variant `\\u001b[2J`"]);
}

#[test]
fn a_key_derivation_that_takes_too_long_is_refused_before_it_begins() {
    let bench = bench();
    luks_format(&bench, 20, &PBKDF2);
    let good = fs::read(bench.path("data.img")).unwrap();
    let salt = |metadata: &Value| metadata["keyslots"]["0"]["kdf"]["salt"].clone();
    let argon2id = |metadata: &mut Value| {
        metadata["keyslots"]["0"]["kdf"] =
            json!({"type": "argon2id", "time": 1024, "memory": 4 << 20, "cpus": 1, "salt": salt(metadata)});
    };
    // Each slot is within its bounds, and the digest of the key that comes out of it costs as much again.
    let pbkdf2 = |metadata: &mut Value| {
        metadata["keyslots"]["0"]["kdf"]["iterations"] = json!(1 << 28);
        metadata["digests"]["0"]["iterations"] = json!(1 << 28);
        for id in 1..4 {
            metadata["keyslots"][id.to_string()] = metadata["keyslots"]["0"].clone();
            metadata["keyslots"][id.to_string()]["area"]["offset"] = json!((32768 + id * 258_048).to_string());
        }
        metadata["digests"]["0"]["keyslots"] = json!(["0", "1", "2", "3"]);
    };
    let argon2id = (with_metadata(&good, argon2id), "4097 GiB x passes");
    for (volume, words) in [argon2id, (with_metadata(&good, pbkdf2), "768 GiB x passes")] {
        fs::write(bench.path("data.img"), volume).unwrap();
        let serve = [&["serve", "data.img", "--luks2", "--socket", "s"][..], &PASS].concat();
        bench.run(&serve).fails(3, &["key slot 0", words, "refused"]);
    }
}

/// Every place in a value, as a JSON pointer.
fn pointers(value: &Value, at: &str, into: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    for (key, child) in children {
        let pointer = format!("{at}/{key}");
        pointers(child, &pointer, into);
        into.push(pointer);
    }
}

/// Whether the library unlocks the volume.
fn we_open(path: &Path) -> bool {
    let backing = Arc::new(Backing::open(path, Access::ReadOnly).unwrap());
    let credential = Credential::Passphrase(SecretBytes::copy_of(PASSPHRASE));
    Locked::open(&Site::whole(backing)).is_ok_and(|locked| locked.unlock(&credential).is_ok())
}

/// `cryptsetup`'s verdict on the header of `data.img`. What keeps it busy for long, or exhausts memory, it refuses.
fn they_open(bench: &Bench) -> bool {
    let limits = "ulimit -v 1000000; exec timeout -s KILL 5 cryptsetup open -q --disable-locks --test-passphrase --key-file pass data.img";
    let mut command = tool_command("sh", &["-c", limits]);
    command.current_dir(bench.dir.path());
    Run::of(command).status.success()
}

/// A change of the metadata, and how to say it.
type Mangling = (String, Box<dyn Fn(&mut Value)>);

/// Every place of the metadata removed, and replaced by a few values, others for the next place.
fn manglings(metadata: &Value) -> Vec<Mangling> {
    let texts = ["", "0", "1", "4096", "18446744073709551616", "sha512"].map(|text| json!(text));
    let numbers = [json!(-1), json!(0), json!(3), json!(4_000_000_000_u64), json!(u64::MAX)];
    let shapes = [Value::Null, json!([]), json!(["1"]), json!({}), json!({"0": {}})];
    let values: Vec<_> = texts.into_iter().chain(numbers).chain(shapes).collect();
    let mut places = Vec::new();
    pointers(metadata, "", &mut places);
    assert!(places.len() > 40, "{places:?}");
    let mut all: Vec<Mangling> = Vec::new();
    for (number, place) in places.into_iter().enumerate() {
        let (parent, key) = place.rsplit_once('/').map(|(parent, key)| (parent.to_owned(), key.to_owned())).unwrap();
        let remove = move |metadata: &mut Value| {
            if let Some(Value::Object(map)) = metadata.pointer_mut(&parent) {
                map.remove(&key);
            }
        };
        all.push((format!("{place} removed"), Box::new(remove)));
        for step in 0..3 {
            let value = values[(5 * number + 7 * step) % values.len()].clone();
            let (what, place) = (format!("{place} = {value}"), place.clone());
            let replace = move |metadata: &mut Value| *metadata.pointer_mut(&place).unwrap() = value.clone();
            all.push((what, Box::new(replace)));
        }
    }
    all
}

#[test]
fn no_mangled_header_opens_here_that_cryptsetup_refuses() {
    let bench = bench();
    luks_format(&bench, 4, &[&PBKDF2[..], &["--luks2-keyslots-size", "512k"]].concat());
    let path = bench.path("data.img");
    let good = fs::read(&path).unwrap()[..2 * COPY_BYTES].to_vec();
    let end = good[JSON..].iter().position(|&byte| byte == 0).unwrap();
    let metadata: Value = serde_json::from_slice(&good[JSON..JSON + end]).unwrap();
    let binary = [("version", 7), ("length", 14), ("sequence", 23), ("algorithm", 72), ("offset", 262), ("uuid", 168)];
    let binary = binary.map(|(field, at)| {
        let mut bytes = good.clone();
        COPIES.iter().for_each(|start| bytes[start + at] ^= 4);
        fix_checksums(&mut bytes);
        (format!("binary {field}"), bytes)
    });
    let of_metadata = manglings(&metadata);
    let of_metadata = of_metadata.into_iter().map(|(what, change)| (what, with_metadata(&good, change)));
    let file = fs::File::options().write(true).open(&path).unwrap();
    let (mut both_open, mut both_refuse, mut we_alone_refuse) = (0, 0, Vec::new());
    for (what, bytes) in of_metadata.chain(binary) {
        // It may have repaired what it found before.
        file.write_all_at(&bytes, 0).unwrap();
        match (we_open(&path), they_open(&bench)) {
            (true, true) => both_open += 1,
            (false, false) => both_refuse += 1,
            (false, true) => we_alone_refuse.push(what),
            (true, false) => panic!("{what}: cryptsetup refuses what opens here"),
        }
    }
    println!("{both_open} open, {both_refuse} are refused by both, and by us alone: {we_alone_refuse:#?}");
    assert!(both_open > 3 && both_refuse > 100, "{both_open} {both_refuse}");
}
