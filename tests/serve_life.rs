//! What a server does to a namespace as a whole: it marks it as in use while it serves, and gives it another size.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use common::{Bench, Server, loop_device, tool, tool_command};
use serde_json::Value;

const MIB: u64 = 1 << 20;

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

/// A client that stays connected: a python prompt of libnbd, which checks no range by itself.
struct Client {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Client {
    fn new(uri: &str) -> Self {
        let mut command = tool_command("/usr/bin/python3", &["-c", SHELL]);
        command.env("URI", uri).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut client = Self { child, to, from };
        assert_eq!(client.line(), "connected");
        client
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// What `expression` is, or the name of the errno that it raises.
    fn ask(&mut self, expression: &str) -> String {
        writeln!(self.to, "{expression}").unwrap();
        self.line()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SHELL: &str = "
import os, sys, errno, nbd
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(os.environ['URI'])
print('connected', flush=True)
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except nbd.Error as error:
        print(errno.errorcode[error.errnum], flush=True)
";

fn size(server: &Server, name: &str) -> u64 {
    tool("nbdinfo", &["--size", &server.uri(name)]).stdout.trim().parse().unwrap()
}

#[test]
fn a_served_namespace_grows_and_shrinks_and_who_is_connected_keeps_its_size() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let server = serve(&bench, &["--control", "control"]);
    let mut before = Client::new(&server.uri("vault"));
    let resize = ["resize", "vault.img", "--control", "control", "--size"];
    let said = bench.run(&[&resize[..], &["12M"]].concat()).succeeds().stdout;
    assert_eq!(said, "vault.img: 12 MiB (was 8 MiB)\n");
    assert_eq!(size(&server, "vault"), 12 * MIB);
    assert_eq!(before.ask("h.get_size()"), (8 * MIB).to_string());
    assert_eq!(before.ask("h.pread(512, 8 << 20)"), "EINVAL");
    assert_eq!(before.ask("h.pwrite(b'a' * 512, 8 << 20)"), "ENOSPC");
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 12M", "-c", "read -P 3 0 12M", &server.uri("vault")]);
    assert_eq!(before.ask("h.pread(4, 4 << 20) == b'\\3' * 4"), "True");
    let status = bench.run(&["status", "--control", "control", "--json"]).succeeds().stdout;
    assert_eq!(serde_json::from_str::<Value>(&status).unwrap()["exports"][0]["size_bytes"], 12 * MIB);

    // Smaller only when that was said; what lies behind is then out of reach, also for who connected before.
    let mut at_12 = Client::new(&server.uri("vault"));
    bench.run(&[&resize[..], &["4M"]].concat()).fails(1, &["4194304", "--force"]);
    assert_eq!(size(&server, "vault"), 12 * MIB);
    bench.run(&[&resize[..], &["4M", "--force"]].concat()).succeeds();
    assert_eq!(size(&server, "vault"), 4 * MIB);
    let behind = |bench: &Bench| {
        let mut bytes = vec![0; 8 << 20];
        File::open(bench.path("vault.img")).unwrap().read_exact_at(&mut bytes, 6 * MIB).unwrap();
        bytes
    };
    let ciphertext = behind(&bench);
    assert_eq!(at_12.ask("h.pread(512, 10 << 20)"), "EINVAL");
    assert_eq!(at_12.ask("h.pread(1024, (4 << 20) - 512)"), "EINVAL");
    assert_eq!(at_12.ask("h.pwrite(b'a' * 4096, 10 << 20)"), "ENOSPC");
    assert_eq!(at_12.ask("h.pwrite(b'a' * 512, 4 << 20, nbd.CMD_FLAG_FUA)"), "ENOSPC");
    assert_eq!(at_12.ask("h.zero(1 << 20, 11 << 20)"), "ENOSPC");
    assert_eq!(at_12.ask("h.pwrite(b'b' * 512, (4 << 20) - 512)"), "None");
    assert_eq!(at_12.ask("h.flush()"), "None");
    assert!(behind(&bench) == ciphertext, "something was written behind the end");
    server.stop();
    let info: Value = serde_json::from_str(&bench.run(&["info", "vault.img", "--json"]).succeeds().stdout).unwrap();
    assert_eq!((&info["size_bytes"], &info["unclean"]), (&(4 * MIB).into(), &false.into()));
    let server = serve(&bench, &[]);
    tool("qemu-io", &["-f", "raw", "-c", "read -P 98 4193792 512", &server.uri("vault")]);
    server.stop();
}

#[test]
fn a_served_partition_grows_into_free_space_and_gives_space_back() {
    let bench = Bench::new();
    bench.run(&["region", "create", "region.img", "--size", "32M"]).succeeds();
    let key = ["--key-file", "vault.key"];
    for name in ["region.img#a", "region.img#b"] {
        bench.run(&[&["format", name, "--size", "4M"], &key[..]].concat()).succeeds();
    }
    let start = |name: &str| {
        let socket = bench.path(&format!("{name}.sock"));
        let path = format!("region.img#{name}");
        let control = format!("{name}.control");
        let args = ["serve", &path, key[0], key[1], "--socket", socket.to_str().unwrap(), "--control", &control];
        Server::start(bench.command(&args), socket.clone())
    };
    let (a, b) = (start("a"), start("b"));
    let resize = |name: &str, size: &str, more: &[&str]| {
        let (path, control) = (format!("region.img#{name}"), format!("{name}.control"));
        bench.run(&[&["resize", &path, "--control", &control, "--size", size], more].concat())
    };
    resize("a", "8M", &[]).fails(1, &["10485760 bytes do not fit"]);
    resize("b", "10M", &[]).succeeds();
    assert_eq!((size(&a, "a"), size(&b, "b")), (4 * MIB, 10 * MIB));
    tool("qemu-io", &["-f", "raw", "-c", "write -P 5 0 10M", &b.uri("b")]);
    let mut large = Client::new(&b.uri("b"));
    bench.run(&["remove", "region.img#b", "--yes"]).fails(5, &["busy"]);

    // What b gives back is another namespace's at once, and b's old client can neither read nor write it.
    resize("b", "2M", &["--force"]).succeeds();
    bench.run(&[&["format", "region.img#c", "--size", "4M"], &key[..]].concat()).succeeds();
    let table: Value =
        serde_json::from_str(&bench.run(&["region", "list", "region.img", "--json"]).succeeds().stdout).unwrap();
    assert_eq!(table["namespaces"][2]["start"], 12 * MIB);
    let image = || fs::read(bench.path("region.img")).unwrap()[12 << 20..].to_vec();
    let of_c = image();
    assert_eq!(large.ask("h.pread(4096, 4 << 20)"), "EINVAL");
    assert_eq!(large.ask("h.pwrite(b'a' * 4096, 4 << 20)"), "ENOSPC");
    assert!(image() == of_c);
    let c = start("c");
    assert_eq!(size(&c, "c"), 4 * MIB);
    for server in [a, b, c] {
        server.stop();
    }
}

#[test]
fn without_a_size_it_becomes_all_that_the_file_has_now_also_with_a_detached_header() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &["--header", "vault.header"]);
    let server = serve(&bench, &["--header", "vault.header", "--control", "control"]);
    let resize = ["resize", "vault.img", "--header", "vault.header", "--control", "control"];
    let file = File::options().write(true).open(bench.path("vault.img")).unwrap();
    file.set_len(10 * MIB + 5000).unwrap();
    let said = bench.run(&resize).succeeds().stdout;
    assert!(said.contains("(was 4 MiB)"), "{said}");
    assert_eq!(size(&server, "vault"), 10 * MIB, "behind it is a page for its tag, and what is no page");
    bench.run(&[&resize[..], &["--size", "16M", "--sparse"]].concat()).succeeds();
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 15M 1M", "-c", "read -P 3 15M 1M", &server.uri("vault")]);
    server.stop();
    let info = bench.run(&["info", "vault.img", "--header", "vault.header", "--json"]).succeeds().stdout;
    assert_eq!(serde_json::from_str::<Value>(&info).unwrap()["size_bytes"], 16 * MIB);
}

/// Detaches a loop device.
struct Detach(String);

impl Drop for Detach {
    fn drop(&mut self) {
        let _ = tool_command("losetup", &["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_that_has_become_longer_is_used_while_it_is_served() {
    let bench = Bench::new();
    let disk = File::create(bench.path("disk.img")).unwrap();
    disk.set_len(8 * MIB).unwrap();
    let Some(device) = loop_device(&bench.path("disk.img"), &[]).map(Detach) else { return };
    std::os::unix::fs::symlink(&device.0, bench.path("vault.img")).unwrap();
    bench.run(&["format", "vault.img", "--key-file", "vault.key"]).succeeds();
    let server = serve(&bench, &["--control", "control"]);
    assert_eq!(size(&server, "vault"), 6 * MIB);
    let resize = ["resize", "vault.img", "--control", "control"];
    bench.run(&[&resize[..], &["--size", "10M"]].concat()).fails(1, &["needs 12582912 bytes", "8388608 bytes"]);
    disk.set_len(12 * MIB).unwrap();
    tool("losetup", &["--set-capacity", &device.0]);
    bench.run(&resize).succeeds();
    assert_eq!(size(&server, "vault"), 10 * MIB);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 10M", "-c", "read -P 3 0 10M", &server.uri("vault")]);
    server.stop();
}

#[test]
fn a_server_refuses_a_size_that_it_cannot_give() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    bench.format("other.img", "4M", &[]);
    let resize = ["resize", "vault.img", "--control", "control", "--size"];
    bench.run(&[&resize[..], &["8M"]].concat()).fails(1, &["control", "--control SOCKET"]);
    let server = serve(&bench, &["--control", "control"]);
    bench.run(&[&resize[..], &["5000"]].concat()).fails(1, &["4194304", "--force"]);
    bench.run(&[&resize[..], &["5000", "--force"]].concat()).fails(1, &["refuses", "5000", "4096"]);
    bench.run(&["resize", "other.img", "--control", "control", "--size", "8M"]).fails(1, &["does not serve"]);
    bench.run(&[&resize[..], &["8M", "--key-file", "vault.key"]].concat()).fails(1, &["cannot be used with"]);
    let rekey = ["rekey", "vault.img", "--key-file", "vault.key", "--control", "control", "--max-rate", "1M", "--json"];
    let mut asking = bench.under_way(&rekey);
    bench.run(&[&resize[..], &["8M"]].concat()).fails(1, &["a re-key is under way"]);
    let _ = asking.kill();
    let _ = asking.wait();
    server.stop();
    let server = serve(&bench, &["--control", "control", "--read-only"]);
    bench.run(&[&resize[..], &["8M"]].concat()).fails(1, &["reading only"]);
    server.stop();
    assert_eq!(fs::metadata(bench.path("vault.img")).unwrap().len(), 6 * MIB);
}
