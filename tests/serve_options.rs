//! What an operator sets, with the real program: TLS, configuration file, status, metrics, systemd, discards.
#![allow(clippy::unwrap_used)]

#[path = "common/certificates.rs"]
mod certificate_files;
mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use certificate_files::certificates;
use common::{Bench, Run, Server, tool, tool_command};

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
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
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
    assert!(page.starts_with("HTTP/1.0 200 OK"), "{page}");
    assert!(page.contains("daxcrypt_nbd_written_bytes_total{export=\"vault\"} 1048576\n"), "{page}");
    server.stop();
    assert!(!control.exists(), "the control socket is unlinked at exit");
    bench.run(&["status", "--control", "control"]).fails(4, &["control", "--control"]);
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
        let guarded = "[[namespace]]\npath = 'c.img'\nkey_file = 'vault.key'\nallowed_certificates = ['tenant1']\n";
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
    let bench = configured("[[namespace]]\npath = 'c.img'\nallowed_certificates = ['x']\n");
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
    // The first connection starts the program, in the launcher's process.
    let mut server = Server::start(command, socket);
    let mut state = [0; 64];
    let len = states.recv(&mut state).unwrap();
    assert_eq!(&state[..len], b"READY=1");
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M", &server.uri("vault")]);
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
    server.stop();
}
