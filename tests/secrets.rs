//! Secrets are where they should be and nowhere else: the memory of a serving process, a core of it, and the memory of a
//! process that has dropped its volume are searched byte by byte.
#![allow(clippy::unwrap_used)]

#[path = "common/certificates.rs"]
mod certificate_files;
mod common;
#[path = "common/memory.rs"]
mod memory_search;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use certificate_files::certificates;
use common::{Bench, CHEAP_KDF, Server, noise, tool};
use daxcrypt::namespace::{Credential, LockedNamespace};
use daxcrypt::pmem::{Access, Backing};
use daxcrypt::secret::SecretBytes;
use memory_search::{contains, data_needles, describe, in_process, search};

const ROLE: &str = "DAXCRYPT_TEST_ROLE";

/// What must not be found: the passphrase, the key file, and both halves of the volume key in pieces of an AES block.
fn needles() -> Vec<(String, Vec<u8>)> {
    let mut all = vec![("passphrase".to_owned(), passphrase()), ("key file".to_owned(), key_file()[..32].to_vec())];
    for (index, piece) in volume_key().chunks(16).enumerate() {
        all.push((format!("volume key, bytes {} on", 16 * index), piece.to_vec()));
    }
    all
}

/// Made when it is needed, so that no copy is in this very program.
fn passphrase() -> Vec<u8> {
    hex(&noise(79, 20)).into_bytes()
}

fn volume_key() -> Vec<u8> {
    noise(77, 64)
}

fn key_file() -> Vec<u8> {
    noise(78, 64)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `vault.img` with the volume key above, which the passphrase and the key file open.
fn vault() -> Bench {
    let bench = Bench::new();
    bench.secret("pass", &passphrase());
    bench.secret("second.key", &key_file());
    let (key, tweak) = (hex(&volume_key()[..32]), hex(&volume_key()[32..]));
    bench.secret("spec", format!("type=user algorithm=aes-xts-256 key={key} tweak={tweak}").as_bytes());
    let format = ["format", "vault.img", "--size", "4M", "--key-spec", "spec", "--passphrase-file", "pass"];
    bench.run(&[&format[..], &CHEAP_KDF].concat()).succeeds();
    let add = ["key", "add", "vault.img", "--passphrase-file", "pass", "--new-key-file", "second.key"];
    bench.run(&add).succeeds();
    // As cheap as the slot of a recovery phrase: memory of that size comes from the heap, where it would stay.
    let add = ["key", "add", "vault.img", "--passphrase-file", "pass", "--new-passphrase-file", "third", "--slot", "2"];
    bench.secret("third", &third());
    bench.run(&[&add[..], &["--kdf-memory", "8K", "--kdf-time", "1"]].concat()).succeeds();
    bench
}

/// The passphrase of the slot with the cheap key derivation.
fn third() -> Vec<u8> {
    hex(&noise(80, 20)).into_bytes()
}

/// The beginning of every block that Argon2id leaves in its memory when slot 2 opens: the last one gives the key away.
fn arena(bench: &Bench) -> Vec<(String, Vec<u8>)> {
    let image = File::open(bench.path("vault.img")).unwrap();
    let mut copy = vec![0; 65536];
    image.read_exact_at(&mut copy, 0).unwrap();
    let len = u32::from_le_bytes(copy[16..20].try_into().unwrap()) as usize;
    let metadata: serde_json::Value = serde_json::from_slice(&copy[128..128 + len]).unwrap();
    let slot = metadata["slots"].as_array().unwrap().iter().find(|slot| slot["id"] == 2).unwrap();
    let digits = slot["salt"].as_str().unwrap().as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let salt: Vec<u8> = digits.chunks(2).map(byte).collect();
    let params = argon2::Params::new(8, 1, 1, Some(32)).unwrap();
    let argon2 = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
    let mut blocks = vec![argon2::Block::new(); 8];
    argon2.hash_password_into_with_memory(&third(), &salt, &mut [0; 32], &mut blocks).unwrap();
    let start = |block: &argon2::Block| block.as_ref().iter().take(3).flat_map(|word| word.to_le_bytes()).collect();
    blocks.iter().enumerate().map(|(index, block)| (format!("Argon2 block {index}"), start(block))).collect()
}

/// Serves `image` at `vault.sock`.
fn serve(bench: &Bench, image: &str, key: &str) -> Server {
    let socket = bench.path("vault.sock");
    let args = ["serve", image, "--key-file", key, "--socket", socket.to_str().unwrap()];
    Server::start(bench.command(&args), socket.clone())
}

#[test]
fn a_server_keeps_its_key_on_locked_pages_and_out_of_its_core_and_its_logs() {
    let bench = vault();
    let needles = [needles(), arena(&bench)].concat();
    for key in [["--passphrase-file", "pass"], ["--key-file", "second.key"], ["--passphrase-file", "third"]] {
        let socket = bench.path("vault.sock");
        let log = File::create(bench.path("log")).unwrap();
        let args = ["serve", "vault.img", "--log", "trace", "--socket", socket.to_str().unwrap(), key[0], key[1]];
        let mut command = bench.command(&args);
        command.stderr(log);
        let server = Server::start(command, socket.clone());
        fs::write(bench.path("in.img"), noise(1, 4 << 20)).unwrap();
        tool("nbdcopy", &[bench.path("in.img").to_str().unwrap(), &server.uri("vault")]);
        let pid = server.child.id();

        let found = in_process(pid, &needles);
        let described = describe(&found);
        assert!(found.iter().all(|(needle, _)| needle.starts_with("volume key")), "{described:#?}");
        assert!(!found.is_empty(), "the search finds the key schedule, so it works");
        assert!(found.iter().all(|(_, mapping)| mapping.is_not_dumped && mapping.is_locked), "{described:#?}");

        let core = bench.path("core");
        tool("gcore", &["-o", core.to_str().unwrap(), &pid.to_string()]);
        let core = bench.path(&format!("core.{pid}"));
        let file = File::open(&core).unwrap();
        let len = file.metadata().unwrap().len();
        assert!(len > 1 << 20, "a core of {len} bytes");
        let read = |buffer: &mut [u8], at| file.read_exact_at(buffer, at).is_ok();
        assert_eq!(search(&needles, 0, len, read), Vec::<String>::new(), "in the core");
        assert_eq!(
            search(&[("label".into(), b"vault.img".to_vec())], 0, len, read)[..1],
            ["label"],
            "the search works"
        );
        fs::remove_file(core).unwrap();

        for file in ["cmdline", "environ"] {
            let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap();
            assert!(needles.iter().all(|(_, needle)| !contains(&bytes, needle)), "{file}");
        }
        server.stop();
        let log = fs::read(bench.path("log")).unwrap();
        assert!(log.len() > 100, "trace logs something");
        for (name, needle) in &needles {
            assert!(!contains(&log, needle) && !contains(&log, hex(needle).as_bytes()), "{name} in the log");
        }
    }
}

#[test]
fn nothing_is_left_of_data_when_its_client_has_left() {
    let bench = vault();
    nothing_is_left_of_data(&bench, serve(&bench, "vault.img", "second.key"), "");
    let folder = certificates("client");
    let folder = folder.path().to_str().unwrap();
    let socket = bench.path("vault.sock");
    let args = ["serve", "vault.img", "--key-file", "second.key", "--socket", socket.to_str().unwrap()];
    let command = bench.command(&[&args[..], &["--tls-certificates", folder]].concat());
    nothing_is_left_of_data(&bench, Server::start(command, socket.clone()), folder);
}

fn nothing_is_left_of_data(bench: &Bench, server: Server, tls: &str) {
    let plain = server.uri("vault");
    let uri = match tls {
        "" => plain,
        folder => plain.replace("nbd+unix", "nbds+unix") + "&tls-certificates=" + folder,
    };
    // Small and large requests: pieces of 4 KiB and of 1 MiB, written and read.
    let page = noise(4711, 4096);
    let data = page.repeat(1024);
    bench.secret("data", &data);
    let (data_file, back) = (bench.path("data"), bench.path("back"));
    let (data_file, back) = (data_file.to_str().unwrap(), back.to_str().unwrap());
    for size in ["--request-size=4096", "--request-size=1048576"] {
        tool("nbdcopy", &[size, "--connections=2", data_file, &uri]);
        tool("nbdcopy", &[size, "--connections=2", &uri, back]);
        assert!(fs::read(back).unwrap() == data);
    }
    let pid = server.child.id();
    // The clients' sockets are closed before their threads have ended.
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    let start = std::time::Instant::now();
    while fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .any(|task| fs::read_to_string(task.unwrap().path().join("comm")).is_ok_and(|name| name.starts_with("nbd-")))
    {
        assert!(start.elapsed().as_secs() < 10, "{} threads", threads());
        std::thread::yield_now();
    }
    let found = describe(&in_process(pid, &data_needles(&page)));
    assert!(found.is_empty(), "{} places: {:#?}", found.len(), &found[..found.len().min(8)]);
    server.stop();
}

#[test]
fn nothing_is_left_of_a_key_when_its_volume_is_dropped() {
    let bench = vault();
    let needles = [needles(), arena(&bench)].concat();
    for (role, file) in [("passphrase", "pass"), ("key file", "second.key"), ("passphrase", "third")] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"]);
        command
            .env(ROLE, role)
            .env("DAXCRYPT_TEST_KEY", bench.path(file))
            .env("DAXCRYPT_TEST_PATH", bench.path("vault.img"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut wait_for = |mark: &str| assert!(lines.by_ref().any(|line| line.unwrap().contains(mark)), "no {mark}");
        wait_for("unlocked");
        let found = in_process(child.id(), &needles);
        assert!(!found.is_empty(), "while the volume is there, its key is found");
        // One line lets it go on.
        use std::io::Write;
        child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        wait_for("dropped");
        let found = describe(&in_process(child.id(), &needles));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, Vec::<String>::new(), "after the drop, {role}");
    }
}

#[test]
fn a_process_that_handles_keys_is_never_dumped_and_not_read_by_its_user() {
    // Its files in /proc belong to root then, even where its user does not: a server of somebody else's shows it.
    let bench = vault();
    let open_to_all = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    let program = bench.path("program");
    fs::copy(env!("CARGO_BIN_EXE_daxcrypt"), &program).unwrap();
    for name in ["program", "vault.img", "second.key", "."] {
        open_to_all(&bench.path(name));
    }
    let socket = bench.path("vault.sock");
    let mut command = Command::new(program);
    command.current_dir(bench.path(".")).args([
        "serve",
        "vault.img",
        "--key-file",
        "second.key",
        "--socket",
        "vault.sock",
    ]);
    let nobody = 65534;
    if rustix::process::geteuid().is_root() {
        command.uid(nobody).gid(nobody);
    }
    let server = Server::start(command, socket);
    let folder = format!("/proc/{}", server.child.id());
    assert_eq!(fs::metadata(format!("{folder}/mem")).unwrap().uid(), 0, "it is not dumpable");
    let limits = fs::read_to_string(format!("{folder}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    server.stop();
}

/// The process that is searched: it reads the key straight to secret memory, as the program does.
#[test]
#[ignore = "started by another test"]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let path = |name: &str| std::env::var_os(name).unwrap();
    let mut file = File::open(path("DAXCRYPT_TEST_KEY")).unwrap();
    let mut key = SecretBytes::zeroed(usize::try_from(file.metadata().unwrap().len()).unwrap());
    file.read_exact(&mut key).unwrap();
    let credential = if role == "passphrase" { Credential::Passphrase(key) } else { Credential::KeyFile(key) };
    let backing = Backing::open(Path::new(&path("DAXCRYPT_TEST_PATH")), Access::ReadWrite).unwrap();
    let volume = LockedNamespace::open(Arc::new(backing)).unwrap().unlock(&credential).unwrap();
    volume.write_at(&[1; 5000], 100).unwrap();
    volume.flush().unwrap();
    println!("unlocked");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    drop((volume, credential));
    println!("dropped");
    std::io::stdin().read_line(&mut String::new()).unwrap();
}
