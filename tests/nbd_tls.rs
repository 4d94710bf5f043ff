//! TLS: modes, certificates and allow lists, by libnbd, qemu and a raw client over rustls.
#![allow(clippy::unwrap_used)]

#[path = "common/certificates.rs"]
mod certificate_files;
#[path = "common/nbd.rs"]
mod common;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use certificate_files::certificates;
use common::{MemoryExport, Raw, info, info_payload, meta_payload, option_bytes, serve_with};
use daxcrypt::nbd_server::{Allowed, ClientCertificates, ExportInfo, Exports, Limits, Listener, Options, Server, Tls};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};

const TLS_REQD: u32 = 0x8000_0005;
const ERR_INVALID: u32 = 0x8000_0003;

fn options(directory: &Path, clients: ClientCertificates, required: bool) -> Options {
    Options { tls: Some(Tls::from_directory(directory, clients, required).unwrap()), ..Options::default() }
}

fn disk(info: ExportInfo) -> Exports {
    let mut exports = Exports::new();
    exports.add(info, MemoryExport::new(4 << 20)).unwrap();
    exports
}

fn nbdsh(directory: &Path, uri: &str, tls: &str, script: &str) -> Output {
    let script = format!(
        "import nbd\nh = nbd.NBD()\nh.set_tls(nbd.TLS_{tls})\nh.set_tls_certificates('{}')\nh.set_tls_verify_peer(True)\n\
         h.set_uri_allow_local_file(True)\nh.connect_uri('{uri}')\n{script}",
        directory.display()
    );
    Command::new("/usr/bin/python3").args(["-c", &script]).output().unwrap()
}

fn assert_success(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn libnbd_reads_and_writes_through_tls() {
    let certificates = certificates("client");
    let options = options(certificates.path(), ClientCertificates::Required, true);
    let server = serve_with(disk(info("disk")), Limits::default(), options);
    let script = "
assert h.get_tls_negotiated() and h.get_structured_replies_negotiated()
data = bytes(i % 251 for i in range(3 << 20))
h.pwrite(data, 77)
assert h.pread(len(data), 77) == data
h.shutdown()";
    assert_success(&nbdsh(certificates.path(), &server.uri("disk"), "REQUIRE", script));
    let plain = nbdsh(certificates.path(), &server.uri("disk"), "DISABLE", "");
    assert!(!plain.status.success(), "a client without TLS got in");
    let stranger = self::certificates("client");
    let wrong = nbdsh(stranger.path(), &server.uri("disk"), "REQUIRE", "h.pread(1, 0)");
    assert!(!wrong.status.success(), "a client of another authority got in");
}

#[test]
fn only_named_certificates_see_a_guarded_export() {
    for (name, rule, admitted) in [
        ("tenant1", "cn:tenant1", true),
        ("tenant10", "cn:tenant1", false),
        // A name of another kind opens nothing, though it says the same.
        ("tenant1", "dns:tenant1", false),
        ("tenant1", "email:tenant1", false),
        ("tenant1", "dns:localhost", true),
        ("tenant1", "cn:localhost", false),
    ] {
        let certificates = certificates(name);
        let allowed = Allowed { certificate_names: vec![rule.parse().unwrap()], ..Allowed::default() };
        let mut exports = disk(ExportInfo { allowed, ..info("guarded") });
        exports.add(info("open"), MemoryExport::new(4096)).unwrap();
        let options = options(certificates.path(), ClientCertificates::Optional, false);
        let server = serve_with(exports, Limits::default(), options);
        let output = nbdsh(certificates.path(), &server.uri("guarded"), "REQUIRE", "h.pread(1, 0)");
        assert_eq!(output.status.success(), admitted, "{}", String::from_utf8_lossy(&output.stderr));
        let mut plain = Raw::greeted(&server.path);
        assert_eq!(plain.ask(7, &info_payload("guarded", &[])).kind, TLS_REQD);
        plain.go("open");
    }
}

#[test]
fn qemu_img_uses_tls_over_tcp() {
    let certificates = certificates("client");
    let options = options(certificates.path(), ClientCertificates::Required, true);
    let listener = Listener::tcp(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let port = listener.tcp_address().unwrap().port();
    let server = Server::new(disk(info("disk")), Limits::default(), options).unwrap().listen(listener);
    let handle = server.handle();
    let thread = std::thread::spawn(|| server.run());
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", certificates.path().display());
    let image = format!("driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=tls0");
    let output = Command::new("qemu-io")
        .args(["--object", &object, "--image-opts", &image, "-c", "w -P 9 5 70000", "-c", "r -P 9 5 70000"])
        .output()
        .unwrap();
    assert_success(&output);
    assert!(!String::from_utf8_lossy(&output.stdout).contains("failed"));
    handle.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn before_required_tls_everything_else_is_refused_in_sync() {
    let certificates = certificates("client");
    let options = options(certificates.path(), ClientCertificates::Ignored, true);
    let server = serve_with(disk(info("disk")), Limits::default(), options);
    let mut raw = Raw::greeted(&server.path);
    for option in [3, 6, 7, 8, 9, 10, 11, 0x7777] {
        assert_eq!(raw.ask(option, &info_payload("disk", &[])).kind, TLS_REQD);
    }
    assert_eq!(raw.ask(5, b"payload").kind, ERR_INVALID);
    raw.option(1, b"disk");
    assert!(raw.is_closed());
    let mut raw = Raw::greeted(&server.path);
    assert_eq!(raw.ask(2, &[]).kind, 1);
    assert!(raw.is_closed());
}

#[test]
fn plaintext_behind_starttls_ends_the_connection() {
    let certificates = certificates("client");
    let options = options(certificates.path(), ClientCertificates::Ignored, false);
    let server = serve_with(disk(info("disk")), Limits::default(), options);
    let mut raw = Raw::greeted(&server.path);
    raw.send(&[option_bytes(5, &[]), option_bytes(8, &[])].concat());
    assert_eq!(raw.option_reply().kind, 1);
    assert!(raw.is_closed());
}

#[test]
fn what_was_negotiated_before_tls_is_forgotten() {
    let certificates = certificates("client");
    let options = options(certificates.path(), ClientCertificates::Ignored, false);
    let server = serve_with(disk(info("disk")), Limits::default(), options);
    let mut raw = Raw::greeted(&server.path);
    assert_eq!(raw.ask(8, &[]).kind, 1);
    assert_eq!(raw.ask(5, &[]).kind, 1);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificates.path().join("ca-cert.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = rustls::StreamOwned::new(client, raw.stream);
    let mut ask = |option: u32, payload: &[u8]| {
        stream.write_all(&option_bytes(option, payload)).unwrap();
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        let len = u32::from_be_bytes(head[16..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize]).unwrap();
        u32::from_be_bytes(head[12..16].try_into().unwrap())
    };
    assert_eq!(ask(10, &meta_payload("disk", &["base:allocation"])), ERR_INVALID, "structured replies are kept");
    assert_eq!(ask(5, &[]), ERR_INVALID, "TLS twice");
    assert_eq!(ask(6, &info_payload("disk", &[])), 3);
}
