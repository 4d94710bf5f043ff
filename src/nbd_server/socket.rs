//! A connected socket: receive without waiting, send everything, wait for bytes or for the server to stop.
//!
//! Guards: the descriptor is owned by one [`Client`](super::server::Client) and closed when the last user is gone, so a
//! late reply can never reach a reused descriptor. Nothing here knows the protocol.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, sockopt};

/// What a wait ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waited {
    /// The socket has bytes, an end or an error.
    Readable,
    /// The server stops.
    Stopping,
    /// Neither happened in time.
    TimedOut,
}

/// Sets what the kernel should do with an accepted socket. Everything is a wish: a refusal costs speed only.
pub(super) fn tune(socket: BorrowedFd<'_>, buffer_bytes: usize) {
    if sockopt::set_socket_send_buffer_size_force(socket, buffer_bytes).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, buffer_bytes);
    }
    if sockopt::set_socket_recv_buffer_size_force(socket, buffer_bytes).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, buffer_bytes);
    }
    if matches!(sockopt::socket_domain(socket), Ok(AddressFamily::INET | AddressFamily::INET6)) {
        let _ = sockopt::set_tcp_nodelay(socket, true);
        let _ = sockopt::set_socket_keepalive(socket, true);
    }
}

/// Receives what is there: `Ok(0)` is the end of the stream, `WouldBlock` means nothing yet.
pub(super) fn receive(socket: BorrowedFd<'_>, room: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::net::recv(socket, &mut *room, RecvFlags::DONTWAIT) {
            Ok((len_bytes, _)) => return Ok(len_bytes),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Sends all of `bytes`, waiting as long as the peer does not read.
pub(super) fn send_all(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(len_bytes) => bytes = &bytes[len_bytes..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Waits until the socket is readable, until `stop` is, or until `deadline`.
pub(super) fn wait(
    socket: BorrowedFd<'_>,
    stop: Option<BorrowedFd<'_>>,
    deadline: Option<Instant>,
) -> io::Result<Waited> {
    loop {
        let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        let second = stop.unwrap_or(socket);
        let mut fds =
            [PollFd::from_borrowed_fd(socket, PollFlags::IN), PollFd::from_borrowed_fd(second, PollFlags::IN)];
        let watched = if stop.is_some() { 2 } else { 1 };
        match rustix::event::poll(&mut fds[..watched], timeout.as_ref()) {
            Ok(0) => return Ok(Waited::TimedOut),
            Ok(_) if !fds[0].revents().is_empty() => return Ok(Waited::Readable),
            Ok(_) => return Ok(Waited::Stopping),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The stop signal: once set, every waiter wakes.
#[derive(Debug)]
pub(super) struct StopSignal {
    stopping: std::sync::atomic::AtomicBool,
    event: std::os::fd::OwnedFd,
}

impl StopSignal {
    pub(super) fn new() -> io::Result<Self> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Self { stopping: false.into(), event: rustix::event::eventfd(0, flags)? })
    }

    pub(super) fn set(&self) {
        self.stopping.store(true, std::sync::atomic::Ordering::SeqCst);
        // The counter is never read, so the event stays readable; a full counter is readable too.
        let _ = rustix::io::write(&self.event, &1u64.to_be_bytes());
    }

    pub(super) fn is_set(&self) -> bool {
        self.stopping.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl AsFd for StopSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

fn timespec(duration: Duration) -> Timespec {
    // Rounded up to the next microsecond, so that a wait never ends before its deadline and spins.
    let duration = duration + Duration::from_micros(1);
    Timespec { tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX), tv_nsec: duration.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rule 20 of the protocol's list.
    #[test]
    fn accepted_tcp_sockets_do_not_delay_small_replies() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(!accepted.nodelay().unwrap());
        tune(accepted.as_fd(), 1 << 20);
        assert!(accepted.nodelay().unwrap());
    }
}
