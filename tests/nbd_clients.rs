//! Real NBD clients against the server: libnbd, qemu, fio, nbdkit as a proxy, nbd-client.
#![allow(clippy::unwrap_used)]

#[path = "common/nbd.rs"]
mod common;

use std::process::Command;

use common::{MemoryExport, serve};

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

fn nbdsh(script: &str, uri: &str) {
    run("/usr/bin/python3", &["-c", &format!("import nbd\nuri = '{uri}'\nh = nbd.NBD()\n{script}")]);
}

#[test]
fn nbdinfo_sees_size_flags_and_contexts() {
    let server = serve(MemoryExport::new(1 << 20));
    let json = run("nbdinfo", &["--json", &server.uri("disk")]);
    for fact in [
        "\"export-size\": 1048576",
        "\"base:allocation\"",
        "\"can_multi_conn\": true",
        "\"can_fua\": true",
        "\"can_df\": true",
        "\"can_cache\": true",
        "\"can_zero\": true",
        "\"can_trim\": false",
        "\"is_read_only\": false",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 67108864",
        "\"description\": \"the export disk\"",
    ] {
        assert!(json.contains(fact), "{fact} is not in {json}");
    }
    assert!(run("nbdinfo", &["--list", &server.uri("")]).contains("export=\"disk\""));
    assert!(run("nbdinfo", &["--map", &server.uri("disk")]).contains("1048576    0  data"));
}

#[test]
fn nbdcopy_round_trips_over_many_connections() {
    let export = MemoryExport::new(32 << 20);
    let server = serve(export.clone());
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    let pattern: Vec<u8> = (0..32u32 << 20).map(|i| u8::try_from((i ^ (i >> 9)) & 255).unwrap()).collect();
    std::fs::write(&from, &pattern).unwrap();
    let args = ["--requests=64", "--connections=8", "--flush"];
    run("nbdcopy", &[&args[..], &[from.to_str().unwrap(), &server.uri("disk")]].concat());
    run("nbdcopy", &[&args[..], &[&server.uri("disk"), to.to_str().unwrap()]].concat());
    assert!(std::fs::read(&to).unwrap() == pattern);
}

#[test]
fn qemu_io_patterns_survive_odd_offsets() {
    let server = serve(MemoryExport::new(1 << 20));
    let (uri, mut args) = (server.uri("disk"), vec!["-f", "raw"]);
    for command in [
        "w -P 0x5a 3 700",
        "r -P 0x5a 3 700",
        "w -z 100 50",
        "r -P 0 100 50",
        "w -f -P 7 4096 8192",
        "r -P 7 4096 8192",
        "flush",
    ] {
        args.extend(["-c", command]);
    }
    args.push(&uri);
    let output = run("qemu-io", &args);
    assert!(!output.contains("failed") && !output.contains("error"), "{output}");
}

#[test]
fn qemu_nbd_and_nbd_client_list_the_export() {
    let server = serve(MemoryExport::new(1 << 20));
    let list = run("qemu-nbd", &["-L", "-k", server.path.to_str().unwrap()]);
    assert!(list.contains("disk") && list.contains("1048576") && list.contains("base:allocation"), "{list}");
    assert!(run("nbd-client", &["-l", "-unix", server.path.to_str().unwrap()]).contains("disk"));
}

#[test]
fn fio_verifies_random_writes_of_several_jobs() {
    let server = serve(MemoryExport::new(32 << 20));
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new("fio")
        .current_dir(directory.path())
        .args(["--name=v", "--ioengine=nbd", "--rw=randrw", "--verify=crc32c", "--verify_fatal=1", "--iodepth=32"])
        .args(["--numjobs=4", "--size=4M", "--offset_increment=8M", "--bsrange=512-256k", "--fsync=64"])
        .arg(format!("--uri={}", server.uri("disk")))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn libnbd_without_strictness_gets_the_right_errors() {
    let server = serve(MemoryExport::new(1 << 20));
    nbdsh(
        "
import errno
h.set_strict_mode(0)
h.connect_uri(uri)
def fails(code, f, *a):
    try:
        f(*a)
    except nbd.Error as e:
        assert e.errnum == code, (f, a, e.string)
    else:
        raise AssertionError((f, a))
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.ENOSPC, h.pwrite, b'x' * 512, size - 511)
fails(errno.ENOSPC, h.zero, 512, size)
fails(errno.EINVAL, h.trim, 512, 0)
fails(errno.EINVAL, h.cache, 512, size)
fails(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(512, size - 512) == bytearray(512)
h.pwrite(b'y' * 3, 5, nbd.CMD_FLAG_FUA)
assert h.pread(3, 5) == b'yyy'
h.shutdown()
",
        &server.uri("disk"),
    );
}

#[test]
fn libnbd_as_an_old_client_uses_export_name() {
    let server = serve(MemoryExport::new(1 << 20));
    nbdsh(
        "
h.set_handshake_flags(0)
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert h.get_protocol() == 'newstyle', h.get_protocol()
h.pwrite(b'z' * 4096, 0)
assert h.pread(4096, 0) == b'z' * 4096
h.shutdown()
",
        &server.uri("disk"),
    );
}

#[test]
fn control_socket_and_prometheus_tell_what_happened() {
    use daxcrypt::nbd_server::{Exports, Limits, Listener, Options, Server};
    use std::io::{Read, Write};
    let directory = tempfile::tempdir().unwrap();
    let (path, control) = (directory.path().join("s"), directory.path().join("c"));
    let metrics = Listener::tcp(([127, 0, 0, 1], 0).into()).unwrap();
    let address = metrics.tcp_address().unwrap();
    let mut exports = Exports::new();
    exports.add(common::info("disk"), MemoryExport::new(1 << 20)).unwrap();
    let server = Server::new(exports, Limits::default(), Options::default()).unwrap();
    let server = server.listen(Listener::unix(&path).unwrap());
    let server = server.control(Listener::unix(&control).unwrap()).metrics(metrics);
    let handle = server.handle();
    let thread = std::thread::spawn(|| server.run());
    let mut gone = common::Raw::in_transmission(&path, "simple");
    assert_eq!(gone.write(0, 0, &[1; 1000]), 0);
    drop(gone);
    common::eventually("the client's end", || handle.connection_count() == 0);
    let mut here = common::Raw::in_transmission(&path, "simple");
    assert_eq!(here.run(0, 0, 1 << 20, 1), 22);
    here.read(0, 0, 4096).unwrap();
    let ask = |mut stream: Box<dyn Read>| {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    common::eventually("the read's count", || handle.status().exports[0].stats.read_bytes == 4096);
    let json = ask(Box::new(std::os::unix::net::UnixStream::connect(&control).unwrap()));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let stats = &json["exports"][0]["stats"];
    assert_eq!(
        (&stats["written_bytes"], &stats["read_bytes"], &stats["errors"]),
        (&1000.into(), &4096.into(), &1.into())
    );
    assert_eq!(json["clients"][0]["stats"]["read_bytes"], 4096);
    assert!(stats["latency_p99_ns"].as_u64().unwrap() > 0);
    let get = |request: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        ask(Box::new(stream))
    };
    let text = get("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(text.contains("daxcrypt_nbd_requests_total{export=\"disk\",command=\"read\"} 2\n"), "{text}");
    assert!(text.contains("daxcrypt_nbd_written_bytes_total{export=\"disk\"} 1000\n"), "{text}");
    assert!(get("GET /x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    handle.stop();
    thread.join().unwrap().unwrap();
    assert!(!control.exists());
}
