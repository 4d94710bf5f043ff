//! What an operator sets, with the real program: TLS, configuration file, status, metrics, systemd, discards.
#![allow(clippy::unwrap_used)]

#[path = "common/certificates.rs"]
mod certificate_files;
mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs::{self, DirEntry};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use certificate_files::certificates;
use common::{Bench, Run, Server, tool, tool_command};
use nbd::{Raw, eventually};

const FLUSH: u16 = 3;
/// NBD_REP_ERR_UNKNOWN.
const UNKNOWN: u32 = (1 << 31) + 6;

fn nbdsh(directory: &str, uri: &str, tls: &str, script: &str) -> Output {
    let script = format!(
        "import nbd\nh = nbd.NBD()\nh.set_tls(nbd.TLS_{tls})\nh.set_tls_certificates('{directory}')\n\
         h.set_uri_allow_local_file(True)\nh.connect_uri('{uri}')\n{script}"
    );
    Command::new("/usr/bin/python3").args(["-c", &script]).output().unwrap()
}

/// Starts `daxcrypt ARGS --socket SOCKET` listening on a free TCP port too, and gives the port that it announces.
fn serve_with_port(bench: &Bench, args: &[&str]) -> (Server, u16) {
    let socket = bench.path("nbd.sock");
    let mut command = bench.command(args);
    command.arg("--socket").arg(&socket).args(["--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let tcp = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("127.0.0.1:"))).unwrap().unwrap();
    let port = tcp.rsplit("127.0.0.1:").next().unwrap().split('/').next().unwrap().parse().unwrap();
    (Server { child, socket }, port)
}

#[test]
fn tls_is_required_and_clients_are_verified() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let ours = certificates("client");
    let folder = ours.path().to_str().unwrap();
    let serve = ["serve", "vault.img", "--key-file", "vault.key", "--tls-certificates", folder, "--tls-verify-client"];
    let (server, port) = serve_with_port(&bench, &serve);
    let script = "assert h.get_tls_negotiated()\nh.pwrite(b'x' * 70000, 5)\nassert h.pread(70000, 5) == b'x' * 70000";
    let uri = server.uri("vault");
    let inside = nbdsh(folder, &uri, "REQUIRE", script);
    assert!(inside.status.success(), "{}", String::from_utf8_lossy(&inside.stderr));
    assert!(!nbdsh(folder, &uri, "DISABLE", "h.pread(1, 0)").status.success(), "a client without TLS got in");
    let stranger = certificates("client");
    let outside = nbdsh(stranger.path().to_str().unwrap(), &uri, "REQUIRE", "h.pread(1, 0)");
    assert!(!outside.status.success(), "a client of another authority got in");
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={folder}");
    let image = format!("driver=nbd,host=127.0.0.1,port={port},export=vault,tls-creds=tls0");
    let info = tool("qemu-img", &["info", "--object", &object, "--image-opts", &image]);
    assert!(info.stdout.contains("8388608 bytes"), "{}", info.stdout);
    server.stop();
}

#[test]
fn allowed_tls_leaves_the_choice_to_the_client() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    let ours = certificates("client");
    let folder = ours.path().to_str().unwrap();
    let server = bench.serve("vault.img", &["--tls", "allow", "--tls-certificates", folder]);
    for (tls, negotiated) in [("REQUIRE", "True"), ("DISABLE", "False")] {
        let output =
            nbdsh(folder, &server.uri("vault"), tls, &format!("assert h.get_tls_negotiated() == {negotiated}"));
        assert!(output.status.success(), "{tls}: {}", String::from_utf8_lossy(&output.stderr));
    }
    server.stop();
}

#[test]
fn options_that_contradict_each_other_are_usage_errors() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    let serve = ["serve", "vault.img", "--key-file", "vault.key", "--socket", "s"];
    for (more, words) in [
        (&["--tls", "require"][..], "--tls-certificates"),
        (&["--tls", "off", "--tls-certificates", "."], "TLS is off"),
        (&["--tls-certificates", "nowhere"], "server-cert.pem"),
        (&["--read-only", "--allow-discards"], "--allow-discards"),
        (&["--config", "c.toml"], "--config"),
        (&["--log", "loud"], "loud"),
        (&["--listen", "vsock:x"], "vsock"),
        (&["--max-connections", "0"], "--max-connections"),
        (&["--max-buffer", "much"], "512M"),
    ] {
        bench.run(&[&serve[..], more].concat()).fails(1, &[words]);
    }
    bench.run(&serve[..4]).fails(1, &["nowhere to listen", "--socket"]);
    assert!(!bench.path("s").exists());
}

#[test]
fn status_and_metrics_show_what_was_done() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let control = bench.path("control");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let metrics = format!("127.0.0.1:{port}");
    let server = bench.serve("vault.img", &["--control", control.to_str().unwrap(), "--metrics", &metrics]);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 1M", "-c", "read -P 3 0 64k", &server.uri("vault")]);
    assert_eq!(fs::metadata(&control).unwrap().permissions().mode() & 0o777, 0o600);
    let json = bench.run(&["status", "--control", "control", "--json"]).succeeds().stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["exports"][0]["name"], "vault");
    assert_eq!(json["exports"][0]["size_bytes"], 8 << 20);
    assert_eq!(json["exports"][0]["stats"]["written_bytes"], 1 << 20);
    assert_eq!(json["exports"][0]["stats"]["requests"]["write"], 1, "{json}");
    assert_eq!(json["exports"][0]["stats"]["requests"]["trim"], 0);
    assert!(json["exports"][0]["stats"]["latency_p50_ns"].as_u64().unwrap() > 0);
    let table = bench.run(&["status", "--control", "control"]).succeeds().stdout;
    for word in ["EXPORT", "vault", "8 MiB", "read-write", "1 MiB", "P99.9"] {
        assert!(table.contains(word), "no {word} in\n{table}");
    }
    let mut stream = TcpStream::connect(&metrics).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200 OK"), "{page}");
    assert!(page.contains("daxcrypt_nbd_written_bytes_total{export=\"vault\"} 1048576\n"), "{page}");
    server.stop();
    assert!(!control.exists(), "the control socket is unlinked at exit");
    bench.run(&["status", "--control", "control"]).fails(1, &["control", "--control"]);
}

/// Two namespaces with different keys and a file that serves both.
fn configured(more: &str) -> Bench {
    let bench = Bench::new();
    bench.format("a.img", "4M", &[]);
    fs::write(bench.path("b.pass"), "correct horse\n").unwrap();
    fs::set_permissions(bench.path("b.pass"), fs::Permissions::from_mode(0o600)).unwrap();
    let b = ["format", "b.img", "--size", "8M", "--passphrase-file", "b.pass"];
    bench.run(&[&b[..], &common::CHEAP_KDF].concat()).succeeds();
    let text = "[[namespace]]\npath = 'a.img'\nname = 'first'\nkey_file = 'vault.key'\nread_only = true\n\
                [[namespace]]\npath = 'b.img'\ndescription = 'the second'\npassphrase_file = 'b.pass'\n\
                [[listen]]\nunix = 'nbd.sock'\n[limits]\nconnections = 8\nbuffer = '4M'\n";
    fs::write(bench.path("serve.toml"), format!("{text}{more}")).unwrap();
    bench
}

#[test]
fn a_file_serves_two_namespaces_with_their_own_keys() {
    let bench = configured("");
    let server = Server::start(bench.command(&["serve", "--config", "serve.toml"]), bench.path("nbd.sock"));
    assert_eq!(tool("nbdinfo", &["--size", &server.uri("first")]).stdout.trim(), "4194304");
    assert!(tool_command("nbdinfo", &["--is", "read-only", &server.uri("first")]).status().unwrap().success());
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M", &server.uri("b")]);
    let list = tool("nbdinfo", &["--list", &server.uri("")]).stdout;
    assert!(list.contains("the second"), "{list}");
    server.stop();
}

#[test]
fn only_the_users_of_an_export_see_it() {
    let uid = rustix::process::getuid().as_raw();
    let bench = configured("[[namespace]]\npath = 'c.img'\nkey_file = 'vault.key'\nallowed_uids = [4242]\n");
    bench.format("c.img", "4M", &[]);
    let server = Server::start(bench.command(&["serve", "--config", "serve.toml"]), bench.path("nbd.sock"));
    let list = tool("nbdinfo", &["--list", &server.uri("")]).stdout;
    assert!(list.contains("first") && !list.contains("\"c\""), "{list}");
    Run::of(tool_command("nbdinfo", &["--size", &server.uri("c")])).fails(1, &["c"]);
    server.stop();
    let text = fs::read_to_string(bench.path("serve.toml")).unwrap().replace("[4242]", &format!("[4242, {uid}]"));
    fs::write(bench.path("serve.toml"), text).unwrap();
    let server = Server::start(bench.command(&["serve", "--config", "serve.toml"]), bench.path("nbd.sock"));
    assert_eq!(tool("nbdinfo", &["--size", &server.uri("c")]).stdout.trim(), "4194304");
    server.stop();
}

#[test]
fn only_the_certificates_of_an_export_see_it() {
    for (name, admitted) in [("tenant1", true), ("tenant10", false)] {
        let ours = certificates(name);
        let folder = ours.path().to_str().unwrap();
        let tls = format!("[tls]\ncertificates = '{folder}'\nverify_client = true\n");
        let guarded = "[[namespace]]\npath = 'c.img'\nkey_file = 'vault.key'\nallowed_certificates = ['cn:tenant1']\n";
        let bench = configured(&format!("{tls}{guarded}"));
        bench.format("c.img", "4M", &[]);
        let server = Server::start(bench.command(&["serve", "--config", "serve.toml"]), bench.path("nbd.sock"));
        let read = |export| nbdsh(folder, &server.uri(export), "REQUIRE", "h.pread(1, 0)");
        let guarded = read("c");
        assert_eq!(guarded.status.success(), admitted, "{}", String::from_utf8_lossy(&guarded.stderr));
        assert!(read("first").status.success(), "an export without a list is for every verified client");
        server.stop();
    }
}

#[test]
fn a_file_with_a_key_that_is_not_known_names_it() {
    let bench = configured("conections = 3\n");
    bench.run(&["serve", "--config", "serve.toml"]).fails(1, &["serve.toml", "conections", "line"]);
    let bench = configured("[[namespace]]\npath = 'c.img'\nallowed_certificates = ['dns:x']\n");
    bench.run(&["serve", "--config", "serve.toml"]).fails(1, &["allowed_certificates", "TLS is off"]);
}

#[test]
fn one_bad_namespace_stops_the_start_unless_told_to_keep_going() {
    let bench = configured("");
    fs::write(bench.path("b.pass"), "wrong\n").unwrap();
    bench.run(&["serve", "--config", "serve.toml"]).fails(2, &["b.img"]);
    assert!(!bench.path("nbd.sock").exists());
    let command = bench.command(&["serve", "--config", "serve.toml", "--keep-going"]);
    let server = Server::start(command, bench.path("nbd.sock"));
    assert_eq!(tool("nbdinfo", &["--size", &server.uri("first")]).stdout.trim(), "4194304");
    assert!(!Run::of(tool_command("nbdinfo", &["--size", &server.uri("b")])).status.success());
    server.stop();
    bench.run(&["serve", "missing.img", "--keep-going", "--socket", "s"]).fails(1, &["missing.img"]);
}

#[test]
fn systemd_passes_the_socket_and_is_told_when_reads_work() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    let states = UnixDatagram::bind(bench.path("notify")).unwrap();
    states.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let socket = bench.path("activated.sock");
    let mut command = Command::new("systemd-socket-activate");
    command.current_dir(bench.dir.path()).arg("-l").arg(&socket);
    command.arg("-E").arg(format!("NOTIFY_SOCKET={}", bench.path("notify").display()));
    command.arg(env!("CARGO_BIN_EXE_daxcrypt")).args(["serve", "vault.img", "--key-file", "vault.key"]);
    // A socket of its own beside it makes nothing of systemd's be ignored.
    command.args(["--socket", "own.sock"]);
    // The first connection starts the program, in the launcher's process.
    let mut server = Server::start(command, socket);
    let mut state = [0; 64];
    let len = states.recv(&mut state).unwrap();
    assert_eq!(&state[..len], b"READY=1");
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M", &server.uri("vault")]);
    let own = format!("nbd+unix:///vault?socket={}", bench.path("own.sock").display());
    tool("qemu-io", &["-f", "raw", "-c", "read -P 3 0 1M", &own]);
    rustix::process::kill_process(rustix::process::Pid::from_child(&server.child), rustix::process::Signal::TERM)
        .unwrap();
    let len = states.recv(&mut state).unwrap();
    assert_eq!(&state[..len], b"STOPPING=1");
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn discards_that_are_allowed_once_are_recorded() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let server = bench.serve("vault.img", &["--allow-discards"]);
    assert!(tool_command("nbdinfo", &["--can", "trim", &server.uri("vault")]).status().unwrap().success());
    server.stop();
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(info.contains("allowed: media shows"), "{info}");
    let server = bench.serve("vault.img", &[]);
    assert!(tool_command("nbdinfo", &["--can", "trim", &server.uri("vault")]).status().unwrap().success());
    // "Fast" is for whole units: what would have to be read is refused, with nothing changed.
    let fast = format!(
        "import nbd\nh = nbd.NBD()\nh.connect_uri('{}')\nh.pwrite(b'x' * 65536, 0)\nfast = nbd.CMD_FLAG_FAST_ZERO\n\
         h.zero(8192, 8192, fast)\nassert h.pread(8192, 8192) == bytes(8192)\n\
         for at, size in ((0, 100), (100, 4096), (0, 4097)):\n    try: h.zero(size, at, fast)\n    \
         except nbd.Error as error: assert error.errno in ('ENOTSUP', 'EOPNOTSUPP'), error\n    else: assert False\n\
         assert h.pread(8192, 0) == b'x' * 8192\n",
        server.uri("vault")
    );
    assert!(Command::new("/usr/bin/python3").args(["-c", &fast]).status().unwrap().success());
    server.stop();
}

/// Connects to `address` over TCP, sends `text` and gives the answer.
fn asked(address: &str, text: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A TCP address that nobody listens on. Each has a host number of its own in the loopback network, so that neither another
/// test nor the near end of a connection can take it before the server does.
fn free_address() -> String {
    static LAST: AtomicU8 = AtomicU8::new(1);
    let host = Ipv4Addr::new(127, 77, 0, LAST.fetch_add(1, Ordering::Relaxed));
    TcpListener::bind((host, 0)).unwrap().local_addr().unwrap().to_string()
}

#[test]
fn metrics_are_openmetrics_over_http() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let metrics = free_address();
    let server = bench.serve("vault.img", &["--metrics", &metrics]);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 1M", &server.uri("vault")]);
    let page = asked(&metrics, "GET /metrics?name[]=x HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text"), "{page}");
    for line in [
        "# HELP daxcrypt_nbd_written_bytes Bytes that writes brought",
        "# TYPE daxcrypt_nbd_request_duration_seconds histogram",
        "daxcrypt_nbd_written_bytes_total{export=\"vault\"} 1048576",
    ] {
        assert!(page.lines().any(|found| found == line), "no {line} in\n{page}");
    }
    // What the dashboard and the alerts ask for is there.
    for text in [include_str!("../tools/grafana/dashboard.json"), include_str!("../tools/grafana/alerts.yml")] {
        let asked: Vec<_> = text.split(|byte: char| !(byte.is_ascii_lowercase() || byte == '_')).collect();
        let names: Vec<_> = asked.iter().filter(|name| name.starts_with("daxcrypt_nbd_")).collect();
        assert!(names.len() >= 4);
        for name in names {
            assert!(
                page.lines()
                    .any(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} "))),
                "{name}"
            );
        }
    }
    let bucket =
        |line: &str| line.contains("_seconds_bucket{") && line.contains("le=\"+Inf\"") && line.contains("vault");
    assert!(page.lines().any(bucket), "{page}");
    assert!(!page.contains("latency_p99"), "{page}");
    let head = asked(&metrics, "HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(asked(&metrics, "GET /other HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(asked(&metrics, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    assert!(asked(&metrics, "nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
    server.stop();
}

/// Whether the server has not closed this connection, on which it has nothing to say.
fn is_open(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!((&*stream).read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn silent_and_dribbling_questioners_delay_nobody_and_hold_no_shutdown() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let (control, metrics) = (bench.path("control"), free_address());
    let server = bench.serve("vault.img", &["--control", control.to_str().unwrap(), "--metrics", &metrics]);
    // Whoever waited for the silent ones before would be answered when these are gone.
    eventually("an answer before a silent one is given up", || {
        let silent: Vec<_> = (0..60).map(|_| TcpStream::connect(&metrics).unwrap()).collect();
        let mut dribbling = UnixStream::connect(&control).unwrap();
        dribbling.write_all(b"{").unwrap();
        assert!(asked(&metrics, "GET /metrics HTTP/1.1\r\n\r\n").contains("200 OK"));
        bench.run(&["status", "--control", "control", "--json"]).succeeds();
        silent.iter().all(is_open) && dribbling.write_all(b" ").is_ok()
    });
    // A byte now and then is no reason to wait for more: the server ends before whoever sends them.
    let mut dribbling = UnixStream::connect(&control).unwrap();
    let dribbler = thread::spawn(move || {
        for sent in 0..1000 {
            if dribbling.write_all(b" ").is_err() {
                return sent;
            }
            thread::sleep(Duration::from_millis(100));
        }
        1000
    });
    server.stop();
    assert!(dribbler.join().unwrap() < 1000);
}

/// Whether no thread of a process runs now.
fn all_sleep(pid: u32) -> bool {
    let state = |task: DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    };
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| state(task.unwrap()).is_none_or(|state| state == 'S'))
}

#[test]
fn without_descriptors_for_all_the_silent_ones_make_room() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let (socket, address) = (bench.path("vault.img.sock"), free_address());
    let serve = ["serve", "vault.img", "--key-file", "vault.key", "--socket", socket.to_str().unwrap()];
    let direct = bench.command(&[&serve[..], &["--listen", &address]].concat());
    let mut limited = tool_command("prlimit", &["--nofile=96:96"]);
    limited.arg(direct.get_program()).args(direct.get_args()).current_dir(bench.path(""));
    limited.stderr(fs::File::create(bench.path("said")).unwrap());
    let server = Server::start(limited, socket);
    let said = fs::read_to_string(bench.path("said")).unwrap();
    assert!(said.contains("ulimit -n"), "{said}");
    let silent: Vec<_> = (0..300).map(|_| TcpStream::connect(&address).unwrap()).collect();
    // 24 connections fit 96 descriptors, half of them without an export. Each of those has been greeted.
    let stay = |stream: &&TcpStream| {
        let mut greeting = [0; 64];
        let _ = stream.set_nonblocking(true);
        while (&**stream).read(&mut greeting).is_ok_and(|len| len > 0) {}
        is_open(stream)
    };
    eventually("the others make room", || silent.iter().filter(stay).count() <= 12);
    // Now nobody comes any more in whose place a client of these could have to go.
    for _ in 0..3 {
        tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 64k", "-c", "read -P 3 0 64k", &server.uri("vault")]);
    }
    // Nobody does anything, so nothing runs: look after look.
    eventually("it rests", || (0..50).all(|_| all_sleep(server.child.id())));
    server.stop();
}

#[test]
fn sockets_have_the_rights_that_are_asked_for_and_supplementary_groups_count() {
    let bench = Bench::new();
    bench.format("a.img", "4M", &[]);
    fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let text = "[[namespace]]\npath = 'a.img'\nname = 'a'\nkey_file = 'vault.key'\nallowed_gids = [4321]\n\
                [[listen]]\nunix = 's'\nmode = '0666'\ngroup = 4321\n";
    fs::write(bench.path("serve.toml"), text).unwrap();
    let socket = bench.path("s");
    let server = Server::start(bench.command(&["serve", "--config", "serve.toml"]), socket.clone());
    let metadata = fs::metadata(&socket).unwrap();
    assert_eq!((metadata.permissions().mode() & 0o777, metadata.gid()), (0o666, 4321));
    let size = |groups: &str| {
        let args = ["--reuid=4000", "--regid=4000", groups, "nbdinfo", "--size", &server.uri("a")];
        Command::new("setpriv").args(args).output().unwrap()
    };
    let member = size("--groups=5,4321");
    assert!(member.status.success(), "{}", String::from_utf8_lossy(&member.stderr));
    assert!(!size("--groups=5,43210").status.success(), "a stranger got in");
    server.stop();
    let serve = ["serve", "a.img", "--key-file", "vault.key", "--socket", "s"];
    bench.run(&[&serve[..], &["--socket-mode", "rw"]].concat()).fails(1, &["0660"]);
    let command = bench.command(&[&serve[..], &["--socket-mode", "0660", "--socket-group", "4321"]].concat());
    let server = Server::start(command, socket.clone());
    let metadata = fs::metadata(&socket).unwrap();
    assert_eq!((metadata.permissions().mode() & 0o777, metadata.gid()), (0o660, 4321));
    server.stop();
}

#[test]
fn the_log_says_who_came_what_failed_and_why_and_who_was_refused() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    bench.format("c.img", "4M", &[]);
    let text = "[[namespace]]\npath = 'vault.img'\nname = 'vault'\nkey_file = 'vault.key'\n\
                [[namespace]]\npath = 'c.img'\nname = 'guarded'\nkey_file = 'vault.key'\nallowed_uids = [4999]\n\
                [[listen]]\nunix = 's'\n";
    fs::write(bench.path("serve.toml"), text).unwrap();
    let mut command = bench.command(&["serve", "--config", "serve.toml"]);
    command.stderr(fs::File::create(bench.path("said")).unwrap());
    let server = Server::start(command, bench.path("s"));
    assert!(!tool_command("nbdinfo", &["--size", &server.uri("guarded")]).status().unwrap().success());
    // The second half of the backing is cut off: reads there are media errors.
    fs::File::options().write(true).open(bench.path("vault.img")).unwrap().set_len(4 << 20).unwrap();
    let reads = "import nbd\nh = nbd.NBD()\nh.connect_uri('URI')\nfor i in range(100):\n    try: h.pread(512, 7 << 20)\n    \
                 except nbd.Error: pass\n";
    let script = reads.replace("URI", &server.uri("vault"));
    assert!(Command::new("/usr/bin/python3").args(["-c", &script]).status().unwrap().success());
    server.kill();
    let said = fs::read_to_string(bench.path("said")).unwrap();
    let failed: Vec<_> = said.lines().filter(|line| line.contains("request failed")).collect();
    assert!((1..=20).contains(&failed.len()), "{} lines of 100 failures", failed.len());
    for word in
        ["peer=uid 0", "export=\"vault\"", "command=\"read\"", "offset=7340032", "len_bytes=512", "media error: "]
    {
        assert!(failed[0].contains(word), "no {word} in {}", failed[0]);
    }
    for words in [
        ["client connected", "peer=uid 0"],
        ["client has chosen an export", "vault"],
        ["client left", "peer=uid 0"],
        ["client refused: no rule admits it", "guarded"],
    ] {
        let found = said.lines().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(found, "no {words:?} in\n{said}");
    }
}

/// Sends SIGHUP and waits until the log says `words` once more.
fn hang_up(bench: &Bench, server: &Server, words: &str) {
    let said = || fs::read_to_string(bench.path("said")).unwrap().matches(words).count();
    let before = said();
    let pid = rustix::process::Pid::from_child(&server.child);
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    let start = std::time::Instant::now();
    while said() == before {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "no {words:?} in {}",
            fs::read_to_string(bench.path("said")).unwrap()
        );
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn sighup_reads_the_lists_again_and_a_bad_file_changes_nothing() {
    let bench = Bench::new();
    bench.format("a.img", "4M", &[]);
    let write = |more: &str| {
        let text = format!(
            "[[namespace]]\npath = 'a.img'\nname = 'a'\nkey_file = 'vault.key'\n{more}\n[[listen]]\nunix = 's'\n"
        );
        fs::write(bench.path("serve.toml"), text).unwrap();
    };
    write("allowed_uids = [4999]");
    let mut command = bench.command(&["serve", "--config", "serve.toml"]);
    command.stderr(fs::File::create(bench.path("said")).unwrap());
    let server = Server::start(command, bench.path("s"));
    let size = || tool_command("nbdinfo", &["--size", &server.uri("a")]).output().unwrap().status.success();
    assert!(!size());
    write("");
    hang_up(&bench, &server, "read again");
    assert!(size());
    fs::write(bench.path("serve.toml"), "nonsense = 1\n").unwrap();
    hang_up(&bench, &server, "nothing is changed");
    assert!(size());
    // Whoever may not stay goes, and comes back with the rights that it has now.
    let script = format!(
        "import nbd\nh = nbd.NBD()\nh.connect_uri('{}')\nassert not h.is_read_only()\nprint('ready', flush=True)\ninput()\n\
         try: h.pread(1, 0)\nexcept nbd.Error: print('closed', flush=True)\n",
        server.uri("a")
    );
    let mut client = Command::new("/usr/bin/python3");
    let mut client = client.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    write("write_uids = [4999]");
    hang_up(&bench, &server, "read again");
    client.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "closed");
    assert!(client.wait().unwrap().success());
    assert!(tool_command("nbdinfo", &["--is", "read-only", &server.uri("a")]).status().unwrap().success());
    let refused = tool_command("qemu-io", &["-f", "raw", "-c", "write 0 4k", &server.uri("a")]).output().unwrap();
    assert!(!refused.status.success(), "{}", String::from_utf8_lossy(&refused.stdout));
    server.stop();
}

#[test]
fn one_client_writes_and_another_only_reads() {
    let bench = Bench::new();
    bench.format("a.img", "4M", &[]);
    fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let text = "[[namespace]]\npath = 'a.img'\nname = 'a'\nkey_file = 'vault.key'\nwrite_uids = [4001]\n\
                [[listen]]\nunix = 's'\nmode = '0666'\n";
    fs::write(bench.path("serve.toml"), text).unwrap();
    let server = Server::start(bench.command(&["serve", "--config", "serve.toml"]), bench.path("s"));
    // It goes past what the client library would refuse by itself.
    let script = format!(
        "import nbd\nh = nbd.NBD()\nh.set_strict_mode(0)\nh.connect_uri('{}')\nprint(h.is_read_only())\n\
         for request in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0)):\n    try: request(); print('done')\n    \
         except nbd.Error as error: print(error.errno)\nassert len(h.pread(512, 0)) == 512\n",
        server.uri("a")
    );
    for (uid, said) in [("4001", "False\ndone\ndone\n"), ("4002", "True\nEPERM\nEPERM\n")] {
        let uid = format!("--reuid={uid}");
        let args = [&uid, "--regid=4000", "--clear-groups", "/usr/bin/python3", "-c", &script];
        let output = Command::new("setpriv").args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(text, said, "{}", String::from_utf8_lossy(&output.stderr));
    }
    server.stop();
    fs::write(bench.path("serve.toml"), text.replace("name = 'a'", "read_only = true")).unwrap();
    bench.run(&["serve", "--config", "serve.toml"]).fails(1, &["read_only", "write_"]);
}

#[test]
fn rights_go_by_address_and_by_certificate() {
    const READ_ONLY: u16 = 1 << 1;
    let bench = Bench::new();
    bench.format("a.img", "4M", &[]);
    let address = free_address();
    let file = |rules: &str, more: &str| {
        let namespace = format!("[[namespace]]\npath = 'a.img'\nname = 'a'\nkey_file = 'vault.key'\n{rules}\n");
        let text = format!("{namespace}[[listen]]\ntcp = '{address}'\n[[listen]]\nunix = 's'\n{more}");
        fs::write(bench.path("serve.toml"), text).unwrap();
        Server::start(bench.command(&["serve", "--config", "serve.toml"]), bench.path("s"))
    };
    let server = file("allowed_addresses = ['127.77.1.0/24']\nwrite_addresses = ['127.77.1.7']", "");
    for (host, writes) in [(7, true), (8, false)] {
        let mut raw = Raw::from_address([127, 77, 1, host], address.parse().unwrap());
        let (_, flags) = raw.go("a");
        assert_eq!(flags & READ_ONLY == 0, writes);
        assert_eq!(raw.write(0, 0, &[1; 512]), if writes { 0 } else { 1 }, "EPERM");
        assert!(raw.read(0, 0, 512).is_ok());
    }
    let mut stranger = Raw::from_address([127, 77, 2, 7], address.parse().unwrap());
    assert_eq!(stranger.ask(7, &nbd::info_payload("a", &[])).kind, UNKNOWN);
    drop(stranger);
    server.stop();
    for (name, said) in [("tenant1", "False done"), ("tenant10", "True EPERM")] {
        let folder = certificates(name);
        let path = folder.path().to_str().unwrap();
        let server = file("write_certificates = ['cn:tenant1']", &format!("[tls]\ncertificates = '{path}'\n"));
        let script = "h.set_strict_mode(0)\nsaid = 'done'\ntry: h.pwrite(b'x' * 512, 0)\nexcept nbd.Error as e: said = e.errno\n\
                      h.pread(512, 0)\nprint(h.is_read_only(), said)";
        let output = nbdsh(path, &server.uri("a"), "REQUIRE", script);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(text.trim(), said, "{}", String::from_utf8_lossy(&output.stderr));
        server.stop();
    }
}

/// A namespace on a loop device whose file has no room for all of its data: what is written there is lost at a flush.
struct Narrow {
    device: String,
    at: PathBuf,
}

impl Narrow {
    fn new(bench: &Bench) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: a loop device needs root");
            return None;
        }
        let at = bench.path("narrow");
        fs::create_dir(&at).unwrap();
        tool("mount", &["-t", "tmpfs", "-o", "size=8m", "none", at.to_str().unwrap()]);
        fs::File::create(at.join("image")).unwrap().set_len(64 << 20).unwrap();
        Some(Self { device: common::loop_device(&at.join("image"), &[])?, at })
    }
}

impl Drop for Narrow {
    fn drop(&mut self) {
        let _ = tool_command("losetup", &["--detach", &self.device]).status();
        let _ = tool_command("umount", &["-l", self.at.to_str().unwrap()]).status();
    }
}

#[test]
fn a_poisoned_export_is_told_at_once_and_in_the_exit_code() {
    let bench = Bench::new();
    bench.secret("vault.key", &common::noise(1, 64));
    let Some(narrow) = Narrow::new(&bench) else { return };
    let format = ["format", &narrow.device, "--key-file", "vault.key", "--label", "vault", "--sparse"];
    bench.run(&format).succeeds();
    let (socket, address) = (bench.path("s"), free_address());
    let serve = ["serve", &narrow.device, "--key-file", "vault.key", "--socket", socket.to_str().unwrap()];
    let mut command = bench.command(&[&serve[..], &["--control", "control", "--metrics", &address]].concat());
    command.stderr(fs::File::create(bench.path("said")).unwrap());
    let mut server = Server::start(command, socket);
    let mut raw = Raw::greeted(&server.socket);
    raw.go("vault");
    let poisoned = || {
        let status = bench.run(&["status", "--control", "control", "--json"]).succeeds().stdout;
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let page = asked(&address, "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let told = fs::read_to_string(bench.path("said")).unwrap().contains("a flush failed");
        let metrics = page.contains("poisoned{export=\"vault\"} 1");
        assert_eq!(status["exports"][0]["poisoned"], told);
        assert_eq!(metrics, told, "{page}");
        told
    };
    assert!(!poisoned());
    for at in 0..24_u64 {
        let _ = raw.write(0, at << 20, &vec![7; 1 << 20]);
    }
    raw.request(FLUSH, 0, 1, 0, 0);
    assert_eq!(raw.errno(), 5, "EIO");
    assert!(poisoned());
    raw.request(FLUSH, 0, 1, 0, 0);
    assert_eq!(raw.errno(), 5, "every flush from then on");
    drop(raw);
    rustix::process::kill_process(rustix::process::Pid::from_child(&server.child), rustix::process::Signal::TERM)
        .unwrap();
    assert_eq!(server.child.wait().unwrap().code(), Some(4));
    drop(server);
}

#[test]
fn a_revoked_certificate_is_refused_after_sighup() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    let folder = certificates("client");
    let path = folder.path().to_str().unwrap();
    let socket = bench.path("s");
    let args =
        ["serve", "vault.img", "--key-file", "vault.key", "--socket", socket.to_str().unwrap(), "--tls-verify-client"];
    let mut command = bench.command(&[&args[..], &["--tls-certificates", path]].concat());
    command.stderr(fs::File::create(bench.path("said")).unwrap());
    let server = Server::start(command, socket);
    let client = || nbdsh(path, &server.uri("vault"), "REQUIRE", "h.pread(1, 0)").status.success();
    assert!(client());
    fs::copy(folder.path().join("revoked.pem"), folder.path().join("ca-crl.pem")).unwrap();
    assert!(client(), "nothing has been read again");
    hang_up(&bench, &server, "read again");
    assert!(!client(), "a revoked certificate got in");
    let said = fs::read_to_string(bench.path("said")).unwrap();
    assert!(said.contains("client refused: the TLS handshake failed") && said.contains("Revoked"), "{said}");
    // A list that is none revokes nothing, so it is no list: not even an empty one.
    let list = fs::read(folder.path().join("revoked.pem")).unwrap();
    for bad in
        [&b""[..], b"no list", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", &list[..list.len() / 2]]
    {
        fs::write(folder.path().join("ca-crl.pem"), bad).unwrap();
        hang_up(&bench, &server, "nothing is changed");
        assert!(!client(), "{}", String::from_utf8_lossy(bad));
    }
    fs::write(folder.path().join("server-key.pem"), "no key").unwrap();
    hang_up(&bench, &server, "nothing is changed");
    fs::remove_file(folder.path().join("ca-crl.pem")).unwrap();
    assert!(!client(), "a folder that cannot be used changed something");
    server.stop();
}
