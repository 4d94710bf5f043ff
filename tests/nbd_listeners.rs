//! Listeners besides Unix sockets, and systemd's conventions.
#![allow(clippy::unwrap_used)]

#[path = "common/nbd.rs"]
mod common;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use common::{MemoryExport, info};
use daxcrypt::nbd_server::{Exports, Limits, ListenError, Listener, Options, Server, inherited_listeners, notify};

/// Runs in a process of its own that a test below starts; alone it has no sockets and does nothing.
#[test]
fn as_a_service() {
    let listeners = inherited_listeners().unwrap();
    if listeners.is_empty() {
        return;
    }
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(1 << 20)).unwrap();
    let server = Server::new(exports, Limits::default(), Options::default()).unwrap();
    let server = listeners.into_iter().fold(server, Server::listen);
    let handle = server.handle();
    std::thread::spawn(move || {
        common::eventually("a client", || handle.status().exports[0].stats.requests[1] == 1);
        common::eventually("the client's end", || handle.connection_count() == 0);
        handle.stop();
    });
    notify("READY=1").unwrap();
    server.run().unwrap();
    notify("STOPPING=1").unwrap();
}

#[test]
fn socket_activation_by_libnbd_reaches_the_inherited_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let notified = UnixDatagram::bind(&path).unwrap();
    notified.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let program = std::env::current_exe().unwrap();
    let script = format!(
        "import nbd\nh = nbd.NBD()\nh.set_export_name('disk')\n\
         h.connect_systemd_socket_activation(['{}', '--exact', 'as_a_service'])\n\
         h.pwrite(b'x' * 512, 0)\nassert h.pread(512, 0) == b'x' * 512\nh.shutdown()",
        program.display()
    );
    let output = Command::new("/usr/bin/python3").args(["-c", &script]).env("NOTIFY_SOCKET", &path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut state = [0; 64];
    let len = notified.recv(&mut state).unwrap();
    assert_eq!(&state[..len], b"READY=1");
}

#[test]
fn a_descriptor_that_does_not_listen_is_refused() {
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(Listener::inherited(one.into()), Err(ListenError::Inherited(_))));
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(Listener::inherited(file.into()), Err(ListenError::Inherited(_))));
}

#[test]
fn vsock_serves_where_the_kernel_has_it() {
    // The largest port number lets the kernel choose (VMADDR_PORT_ANY).
    let Ok(listener) = Listener::vsock(u32::MAX, Vec::new()) else { return };
    let port = vsock::VsockListener::from(listener.as_fd().try_clone_to_owned().unwrap()).local_addr().unwrap().port();
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(1 << 20)).unwrap();
    let server = Server::new(exports, Limits::default(), Options::default()).unwrap().listen(listener);
    let handle = server.handle();
    let thread = std::thread::spawn(|| server.run());
    // Without the loopback transport nobody on this machine can connect; listening and stopping still work.
    if let Ok(mut stream) = vsock::VsockStream::connect_with_cid_port(vsock::VMADDR_CID_LOCAL, port) {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..8], b"NBDMAGIC");
    }
    handle.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn vsock_is_for_the_machines_that_are_named() {
    // This machine is number 1 to itself.
    for (cids, admitted) in [(vec![1, 99], true), (vec![99], false)] {
        let Ok(listener) = Listener::vsock(u32::MAX, cids) else { return };
        let port = vsock::VsockListener::from(listener.as_fd().try_clone_to_owned().unwrap());
        let port = port.local_addr().unwrap().port();
        let mut exports = Exports::new();
        exports.add(info("disk"), MemoryExport::new(1 << 20)).unwrap();
        let server = Server::new(exports, Limits::default(), Options::default()).unwrap().listen(listener);
        let handle = server.handle();
        let thread = std::thread::spawn(|| server.run());
        if let Ok(mut stream) = vsock::VsockStream::connect_with_cid_port(vsock::VMADDR_CID_LOCAL, port) {
            assert_eq!(stream.read_exact(&mut [0; 18]).is_ok(), admitted);
        }
        handle.stop();
        thread.join().unwrap().unwrap();
    }
}
