//! systemd's two conventions: listening sockets that it passes (`LISTEN_FDS`, sd_listen_fds(3)), and the state that it
//! is told (`NOTIFY_SOCKET`, sd_notify(3)).
//!
//! Outside of systemd both do nothing. Neither reads or changes anything but the environment and the descriptors.

use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use listenfd::ListenFd;

use super::listener::{ListenError, Listener};

/// The listening sockets that systemd passed to this process; none without socket activation. Works once.
///
/// # Errors
///
/// [`ListenError::Inherited`] when a descriptor is not a listening Unix or TCP stream socket.
pub fn inherited_listeners() -> Result<Vec<Listener>, ListenError> {
    let mut passed = ListenFd::from_env();
    let mut listeners = Vec::new();
    for index in 0..passed.len() {
        listeners.extend(take(&mut passed, index).map_err(ListenError::Inherited)?);
    }
    listeners.into_iter().map(Listener::inherited).collect()
}

/// A descriptor that is not of the asked kind stays where it is, so the kinds are tried in turn.
fn take(passed: &mut ListenFd, index: usize) -> io::Result<Option<OwnedFd>> {
    match passed.take_unix_listener(index) {
        Ok(listener) => Ok(listener.map(OwnedFd::from)),
        Err(_) => Ok(passed.take_tcp_listener(index)?.map(OwnedFd::from)),
    }
}

/// Tells systemd a state, for example `READY=1` or `STOPPING=1`. Without `NOTIFY_SOCKET` nothing happens.
///
/// # Errors
///
/// When the socket cannot be reached.
pub fn notify(state: &str) -> io::Result<()> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match name.as_bytes() {
        [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name)?,
        _ => SocketAddr::from_pathname(&name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}
