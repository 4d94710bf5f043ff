//! The program against tools that it has never met: libnbd, qemu, fio, nbdkit, and the `nbd` crate.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use common::{Bench, Run, Server, noise, tool, tool_command};

const MIB: usize = 1 << 20;

fn served(size: &str, more: &[&str]) -> (Bench, Server) {
    let bench = Bench::new();
    bench.format("vault.img", size, &[]);
    let server = bench.serve("vault.img", more);
    (bench, server)
}

#[test]
fn nbdinfo_sees_name_size_and_abilities() {
    let (_bench, server) = served("8M", &[]);
    let info = tool("nbdinfo", &["--json", &server.uri("vault")]);
    let json: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
    let export = &json["exports"][0];
    assert_eq!(export["export-size"], 8 << 20);
    assert_eq!(export["export-name"], "vault");
    assert_eq!(export["is_read_only"], false);
    for able in ["can_fua", "can_multi_conn", "can_flush", "can_zero", "can_cache", "can_df"] {
        assert_eq!(export[able], true, "{able}");
    }
    assert_eq!(export["can_trim"], false, "discards are off by default");
    let list = tool("nbdinfo", &["--list", &server.uri("")]);
    assert!(list.stdout.contains("export=\"vault\""), "{}", list.stdout);
    assert_eq!(tool("nbdinfo", &["--size", &server.uri("")]).stdout.trim(), "8388608", "the default export");
    server.stop();
}

#[test]
fn nbdinfo_asks_for_every_ability() {
    // The exit code is nbdinfo's answer: 0 is yes, 2 is no.
    fn asked(server: &Server, yes: &[&str], no: &[&str]) {
        for (answer, questions) in [(0, yes), (2, no)] {
            for question in questions {
                let kind = if matches!(*question, "read-only" | "rotational" | "tls") { "--is" } else { "--can" };
                let run = Run::of(tool_command("nbdinfo", &[kind, question, &server.uri("vault")]));
                assert_eq!(run.status.code(), Some(answer), "{kind} {question}: {}", run.stderr);
            }
        }
    }
    let (bench, server) = served("8M", &[]);
    let always = ["connect", "read", "cache", "df", "flush", "fua", "multi-conn", "structured"];
    asked(&server, &always, &["trim", "read-only", "rotational", "tls"]);
    asked(&server, &["write", "zero"], &[]);
    server.stop();
    let server = bench.serve("vault.img", &["--read-only"]);
    asked(&server, &["connect", "read", "read-only", "df"], &["write", "trim", "zero", "tls"]);
    server.stop();
    let server = bench.serve("vault.img", &["--allow-discards"]);
    asked(&server, &["write", "trim", "zero", "fast-zero"], &["read-only", "rotational"]);
    server.stop();
}

#[test]
fn several_threads_for_large_requests_change_no_byte() {
    let (bench, server) = served("24M", &["--threads", "3"]);
    fs::write(bench.path("in.img"), noise(8, 24 * MIB)).unwrap();
    let (input, output) = (bench.path("in.img"), bench.path("out.img"));
    let large = ["--connections=1", "--requests=4", "--request-size=33554432"];
    tool("nbdcopy", &[large[0], large[1], large[2], "--flush", input.to_str().unwrap(), &server.uri("vault")]);
    tool("nbdcopy", &[large[0], large[1], large[2], &server.uri("vault"), output.to_str().unwrap()]);
    tool("cmp", &[&input, &output]);
    let uneven = ["-f", "raw", "-c", "write -P 0x42 4099 1500001", "-c", "read -P 0x42 4099 1500001"];
    tool("qemu-io", &[&uneven[..], &[&server.uri("vault")]].concat());
    server.stop();
    // One thread decrypts what three have encrypted.
    let server = bench.serve("vault.img", &["--read-only"]);
    tool("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x42 4099 1500001", &server.uri("vault")]);
    tool("nbdcopy", &[&server.uri("vault"), output.to_str().unwrap()]);
    server.stop();
    let (read, mut wanted) = (fs::read(&output).unwrap(), fs::read(&input).unwrap());
    wanted[4099..4099 + 1_500_001].fill(0x42);
    assert!(read == wanted);
}

#[test]
fn nbdcopy_takes_an_image_in_and_out_over_many_connections() {
    let (bench, server) = served("24M", &[]);
    fs::write(bench.path("in.img"), noise(5, 24 * MIB)).unwrap();
    let (input, output) = (bench.path("in.img"), bench.path("out.img"));
    let many = ["--connections=4", "--requests=64"];
    tool("nbdcopy", &[many[0], many[1], "--flush", input.to_str().unwrap(), &server.uri("vault")]);
    tool("nbdcopy", &[many[0], many[1], &server.uri("vault"), output.to_str().unwrap()]);
    tool("cmp", &[&input, &output]);
    server.stop();
    let server = bench.serve("vault.img", &["--read-only"]);
    tool("nbdcopy", &["--request-size=65536", &server.uri("vault"), output.to_str().unwrap()]);
    tool("cmp", &[&input, &output]);
    server.stop();
}

#[test]
fn qemu_io_patterns_hold_at_any_alignment() {
    let (_bench, server) = served("8M", &[]);
    let commands = [
        "write -P 0x11 0 1M",
        "write -P 0x5a 3 700",
        "read -P 0x11 0 3",
        "read -P 0x5a 3 700",
        "read -P 0x11 703 1000",
        "write -P 0x77 4095 2",
        "read -P 0x77 4095 2",
        "write -z 100 5000",
        "read -P 0 100 5000",
        "read -P 0x11 5100 400",
        "write -z -u 64k 64k",
        "read -P 0 64k 64k",
        "write -f -P 0x33 8388607 1",
        "flush",
        "read -P 0x33 8388607 1",
    ];
    let mut args = vec!["-f".to_owned(), "raw".to_owned()];
    for command in commands {
        args.extend(["-c".to_owned(), command.to_owned()]);
    }
    args.push(server.uri("vault"));
    let run = tool("qemu-io", &args);
    assert!(!run.stdout.contains("verification failed"), "{}", run.stdout);
    server.stop();
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let (bench, server) = served("16M", &[]);
    fs::write(bench.path("in.img"), noise(6, 16 * MIB)).unwrap();
    let input = bench.path("in.img");
    let (input, uri) = (input.to_str().unwrap(), server.uri("vault"));
    tool("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", input, &uri]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", input, &uri]);
    let map = tool("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    let json: serde_json::Value = serde_json::from_str(&map.stdout).unwrap();
    assert_eq!(json[0]["length"], 16 << 20);
    assert_eq!(json[0]["data"], true, "no unit looks unused");
    let load = ["bench", "-f", "raw", "-d", "32", "-s", "4k", "-S", "12k", "-c", "4000"];
    let written = tool("qemu-img", &[&load[..], &["-w", "--flush-interval=500", &uri]].concat());
    assert!(written.stdout.contains("Run completed"), "{}", written.stdout);
    assert!(tool("qemu-img", &[&load[..], &[&uri]].concat()).stdout.contains("Run completed"));
    server.stop();
}

#[test]
fn fio_verifies_random_writes_from_several_jobs() {
    let (bench, server) = served("32M", &[]);
    let job = [
        "--name=verify".to_owned(),
        "--ioengine=nbd".into(),
        format!("--uri={}", server.uri("vault")),
        "--rw=randrw".into(),
        "--bsrange=512-64k".into(),
        "--blockalign=512".into(),
        "--size=4M".into(),
        "--offset_increment=4M".into(),
        "--numjobs=8".into(),
        "--iodepth=16".into(),
        "--verify=crc32c".into(),
        "--verify_fatal=1".into(),
        "--fsync=32".into(),
        "--loops=2".into(),
    ];
    let mut command = tool_command("fio", &job);
    command.current_dir(bench.dir.path());
    let run = Run::of(command).succeeds();
    assert!(!run.stdout.contains("verify: bad"), "{}", run.stdout);
    server.stop();
}

#[test]
fn nbdkit_as_a_second_strict_client_passes_our_export_on() {
    let (bench, server) = served("8M", &[]);
    let proxy = bench.path("proxy.sock");
    let args = ["-f", "-U", proxy.to_str().unwrap(), "--filter=checkwrite", "--filter=blocksize", "nbd"];
    let mut command = tool_command("nbdkit", &args);
    command.arg(format!("uri={}", server.uri("vault"))).arg("minblock=512");
    // The image goes in directly; checkwrite then compares every write through the proxy with it.
    fs::write(bench.path("in.img"), noise(7, 8 * MIB)).unwrap();
    let input = bench.path("in.img");
    tool("nbdcopy", &["--flush", input.to_str().unwrap(), &server.uri("vault")]);
    let proxy_server = Server::start(command, proxy);
    tool("nbdcopy", &[input.to_str().unwrap(), &proxy_server.uri("")]);
    drop(proxy_server);
    server.stop();
}

#[test]
fn nbdkit_logs_every_request_of_a_proxied_client_without_an_error() {
    let (bench, server) = served("8M", &[]);
    let (proxy, log) = (bench.path("proxy.sock"), bench.path("requests.log"));
    let args = ["-f", "-U", proxy.to_str().unwrap(), "--filter=log", "--filter=blocksize", "nbd"];
    let mut command = tool_command("nbdkit", &args);
    command.arg(format!("uri={}", server.uri("vault"))).arg("minblock=4096").arg("maxdata=64k");
    command.arg(format!("logfile={}", log.display()));
    let proxy_server = Server::start(command, proxy);
    let commands = ["write -P 9 100 300k", "read -P 9 100 300k", "write -z 1M 64k", "read -P 0 1M 64k", "flush"];
    let mut args = vec!["-f".to_owned(), "raw".to_owned()];
    args.extend(commands.iter().flat_map(|command| ["-c".to_owned(), (*command).to_owned()]));
    args.push(proxy_server.uri(""));
    tool("qemu-io", &args);
    drop(proxy_server);
    let log = fs::read_to_string(log).unwrap();
    for call in ["Read id=", "Write id=", "Zero id=", "Flush id="] {
        assert!(log.contains(call), "no {call} in\n{log}");
    }
    assert!(!log.contains("error="), "{log}");
    server.stop();
}

#[test]
fn the_nbd_crate_is_served_by_the_old_handshake() {
    let (bench, server) = served("4M", &[]);
    let mut stream = UnixStream::connect(&server.socket).unwrap();
    let export = nbd::client::handshake(&mut stream, b"vault").unwrap();
    assert_eq!(export.size, 4 << 20);
    let mut client = nbd::client::NbdClient::new(stream, &export);
    let data = noise(8, 70_000);
    client.seek(SeekFrom::Start(12_345)).unwrap();
    client.write_all(&data).unwrap();
    client.flush().unwrap();
    let mut found = vec![0; data.len()];
    client.seek(SeekFrom::Start(12_345)).unwrap();
    client.read_exact(&mut found).unwrap();
    assert!(found == data);
    drop(client);
    let mut on_media = vec![0; data.len()];
    let file = fs::File::open(bench.path("vault.img")).unwrap();
    file.read_exact_at(&mut on_media, (2 << 20) + 12_345).unwrap();
    let equal = on_media.iter().zip(&data).filter(|(a, b)| a == b).count();
    assert!(equal < data.len() / 100, "{equal} of {} bytes on media are plaintext", data.len());
    server.stop();
}

#[test]
fn discards_punch_and_holes_read_as_zeroes() {
    let bench = Bench::new();
    bench.format("vault.img", "16M", &["--allow-discards"]);
    let server = bench.serve("vault.img", &[]);
    let uri = server.uri("vault");
    assert!(tool_command("nbdinfo", &["--can", "trim", &uri]).status().unwrap().success());
    let before = blocks(&bench);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 9 0 16M", "-c", "discard 4M 8M", "-c", "read -P 0 4M 8M", &uri]);
    tool("qemu-io", &["-f", "raw", "-c", "read -P 9 0 4M", "-c", "read -P 9 12M 4M", &uri]);
    assert!(before - blocks(&bench) >= (8 << 20) / 512, "blocks went back to the filesystem");
    let map = tool("nbdinfo", &["--map", "--json", &uri]);
    let json: serde_json::Value = serde_json::from_str(&map.stdout).unwrap();
    let types: Vec<_> = json.as_array().unwrap().iter().map(|run| run["type"].as_u64().unwrap()).collect();
    assert_eq!(types, [0, 3, 0]);
    server.stop();
    let server = bench.serve("vault.img", &[]);
    tool("qemu-io", &["-f", "raw", "-c", "read -P 0 4M 8M", "-c", "read -P 9 0 4M", &server.uri("vault")]);
    server.stop();
}

fn blocks(bench: &Bench) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(bench.path("vault.img")).unwrap().blocks()
}

#[test]
fn a_backing_that_shrinks_costs_only_the_requests_that_need_it() {
    let (bench, server) = served("8M", &[]);
    let uri = server.uri("vault");
    tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 8M", "-c", "flush", &uri]);
    fs::OpenOptions::new().write(true).open(bench.path("vault.img")).unwrap().set_len((2 << 20) + (4 << 20)).unwrap();
    let run = Run::of(tool_command("qemu-io", &["-f", "raw", "-c", "read 6M 4k", &uri]));
    assert!(run.stdout.contains("Input/output error"), "{}{}", run.stdout, run.stderr);
    tool("qemu-io", &["-f", "raw", "-c", "read -P 1 0 4M", &uri]);
    // What was written cannot be flushed any more, and the server says so at its end.
    let mut server = server;
    rustix::process::kill_process(rustix::process::Pid::from_child(&server.child), rustix::process::Signal::TERM)
        .unwrap();
    assert_eq!(server.child.wait().unwrap().code(), Some(4), "the last flush failed");
}

#[test]
fn two_servers_cannot_write_one_namespace() {
    let (bench, server) = served("4M", &[]);
    let serve = ["serve", "vault.img", "--key-file", "vault.key", "--socket", "second.sock"];
    bench.run(&serve).fails(5, &["vault.img", "busy"]);
    bench.run(&["info", "vault.img"]).succeeds();
    server.stop();
}

#[test]
fn several_namespaces_and_listeners_in_one_server() {
    let bench = Bench::new();
    bench.format("a.img", "4M", &[]);
    bench.format("b.img", "8M", &["--label", "second"]);
    let socket = bench.path("one.sock");
    let mut command = bench.command(&["serve", "a.img", "b.img", "--key-file", "vault.key", "--listen", "127.0.0.1:0"]);
    command.arg("--socket").arg(&socket).arg("--socket").arg(bench.path("two.sock")).stdout(Stdio::null());
    let server = Server::start(command, socket);
    assert_eq!(tool("nbdinfo", &["--size", &server.uri("a")]).stdout.trim(), "4194304");
    assert_eq!(tool("nbdinfo", &["--size", &server.uri("second")]).stdout.trim(), "8388608");
    let missing = Run::of(tool_command("nbdinfo", &["--size", &server.uri("third")]));
    assert!(!missing.status.success());
    server.stop();
    assert!(!bench.path("two.sock").exists());
}

#[test]
fn the_demo_runs_without_anything() {
    let bench = Bench::new();
    let run = bench.run(&["demo"]).succeeds();
    for word in ["formatted", "serving", "attack at dawn", "reads as noise", "still there", "cleaned up"] {
        assert!(run.stdout.contains(word), "no {word:?} in\n{}", run.stdout);
    }
}

/// The dm-crypt line describes the bytes: `xts-mode`, given nothing but the line, reads what was written over NBD.
#[test]
fn the_dm_crypt_line_is_enough_to_decrypt_the_file() {
    use aes::Aes256;
    use aes::cipher::KeyInit;

    let (bench, server) = served("4M", &[]);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 0x5a 8192 4096", "-c", "flush", &server.uri("vault")]);
    server.stop();
    let run = bench.run(&["dmtable", "vault.img", "--key-file", "vault.key", "--show-key"]).succeeds();
    let fields: Vec<_> = run.stdout.split_whitespace().collect();
    assert_eq!(fields[..4], ["0", "8192", "crypt", "aes-xts-plain64"]);
    assert_eq!(fields[6..], ["vault.img", "4096", "1", "sector_size:4096"]);
    let key: Vec<u8> = (0..128).step_by(2).map(|at| u8::from_str_radix(&fields[4][at..at + 2], 16).unwrap()).collect();
    let (iv_offset, start): (u64, u64) = (fields[5].parse().unwrap(), fields[7].parse().unwrap());
    let mut unit = vec![0; 4096];
    let file = fs::File::open(bench.path("vault.img")).unwrap();
    file.read_exact_at(&mut unit, start * 512 + 8192).unwrap();
    let half = |range: std::ops::Range<usize>| Aes256::new_from_slice(&key[range]).unwrap();
    let xts = xts_mode::Xts128::new(half(0..32), half(32..64));
    xts.decrypt_sector(&mut unit, u128::from(iv_offset + 8192 / 512).to_le_bytes().into());
    assert_eq!(unit, [0x5a; 4096]);
    let hidden = bench.run(&["dmtable", "vault.img", "--key-file", "vault.key"]).succeeds();
    assert_eq!(hidden.stdout.split_whitespace().nth(4), Some("KEY"));
}
