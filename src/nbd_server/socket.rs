//! A connected socket: receive without waiting, send everything, wait for bytes, for the server to stop or for other work.
//!
//! Guards: the descriptor is owned by one [`Client`](super::shared::Client) and closed when the last user is gone, so a
//! late reply can never reach a reused descriptor. Nothing here knows the protocol.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, sockopt};

use super::fair::Turn;

/// What a wait ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waited {
    /// The socket has bytes, an end or an error.
    Readable,
    /// The server stops.
    Stopping,
    /// The other descriptor has something.
    Other,
    /// Neither happened in time.
    TimedOut,
}

/// Sets what the kernel should do with an accepted socket. Everything is a wish: a refusal costs speed only.
pub(super) fn tune(socket: BorrowedFd<'_>) {
    if is_tcp(socket) {
        let _ = sockopt::set_tcp_nodelay(socket, true);
        let _ = sockopt::set_socket_keepalive(socket, true);
    }
}

fn is_tcp(socket: BorrowedFd<'_>) -> bool {
    matches!(sockopt::socket_domain(socket), Ok(AddressFamily::INET | AddressFamily::INET6))
}

/// The sizes of a socket's buffers in the kernel, in bytes: for sending and for receiving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KernelBuffers {
    send: usize,
    receive: usize,
}

impl KernelBuffers {
    /// As they are now.
    pub(super) fn of(socket: BorrowedFd<'_>) -> Self {
        // The kernel tells twice of what it was asked for (socket(7)).
        let asked = |told: rustix::io::Result<usize>| told.unwrap_or(0) / 2;
        let send = asked(sockopt::socket_send_buffer_size(socket));
        Self { send, receive: asked(sockopt::socket_recv_buffer_size(socket)) }
    }

    /// `bytes` for each that counts: what a Unix socket has received is in its sender's buffer.
    pub(super) fn enlarged(socket: BorrowedFd<'_>, bytes: usize) -> Self {
        Self { send: bytes, receive: if is_tcp(socket) { bytes } else { 0 } }
    }

    /// What the kernel may hold in them, in bytes: twice what it is asked for, which is for its own structures.
    pub(super) fn bytes(self) -> usize {
        2 * (self.send + self.receive)
    }

    /// Asks for these sizes; 0 asks for nothing.
    pub(super) fn set(self, socket: BorrowedFd<'_>) {
        if self.send > 0 && sockopt::set_socket_send_buffer_size_force(socket, self.send).is_err() {
            let _ = sockopt::set_socket_send_buffer_size(socket, self.send);
        }
        if self.receive > 0 && sockopt::set_socket_recv_buffer_size_force(socket, self.receive).is_err() {
            let _ = sockopt::set_socket_recv_buffer_size(socket, self.receive);
        }
    }
}

/// Whether the other end will not read any more. Of a TCP peer it is not known whether it closed both directions or one:
/// both count.
pub(super) fn peer_has_left(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(1) => {
            let gone = if is_tcp(socket) { PollFlags::RDHUP } else { PollFlags::empty() };
            fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | gone)
        }
        _ => false,
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

/// Sends all of `bytes`, waiting as long as the peer does not read, or until `deadline`. Whoever waits gives its turn up.
pub(super) fn send_all(
    socket: BorrowedFd<'_>,
    mut bytes: &[u8],
    deadline: Option<Instant>,
    mut turn: Option<&mut Turn>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = send_some(socket, deadline, turn.as_deref_mut(), |flags| rustix::net::send(socket, bytes, flags))?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Calls `send`, which gives what it sent, until that is something.
pub(super) fn send_some(
    socket: BorrowedFd<'_>,
    deadline: Option<Instant>,
    mut turn: Option<&mut Turn>,
    mut send: impl FnMut(SendFlags) -> rustix::io::Result<usize>,
) -> io::Result<usize> {
    loop {
        let holds_turn = turn.as_ref().is_some_and(|turn| turn.is_held());
        let at_once = if deadline.is_some() || holds_turn { SendFlags::DONTWAIT } else { SendFlags::empty() };
        match send(SendFlags::NOSIGNAL | at_once) {
            Ok(len_bytes) => return Ok(len_bytes),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if holds_turn => turn.iter_mut().for_each(|turn| turn.rest()),
            Err(Errno::AGAIN) if deadline.is_some() => {
                let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
                let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
                match rustix::event::poll(&mut fds, timeout.as_ref()) {
                    Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until the socket is readable, until `stop` or `other` is, or until `deadline`.
pub(super) fn wait(
    socket: BorrowedFd<'_>,
    stop: Option<BorrowedFd<'_>>,
    other: Option<BorrowedFd<'_>>,
    deadline: Option<Instant>,
) -> io::Result<Waited> {
    let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
    let mut fds = [watch(socket), watch(socket), watch(socket)];
    let mut watched = 1;
    for fd in [stop, other].into_iter().flatten() {
        fds[watched] = watch(fd);
        watched += 1;
    }
    loop {
        let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        match rustix::event::poll(&mut fds[..watched], timeout.as_ref()) {
            Ok(0) => return Ok(Waited::TimedOut),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let ready = |index: usize| index < watched && !fds[index].revents().is_empty();
        return Ok(match (ready(0), stop.is_some() && ready(1)) {
            (true, _) => Waited::Readable,
            (false, true) => Waited::Stopping,
            (false, false) => Waited::Other,
        });
    }
}

/// Waits until one of `fds` is ready, or until `deadline`. What interrupts the wait ends it early.
pub(super) fn poll(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<()> {
    let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
    match rustix::event::poll(fds, timeout.as_ref()) {
        Ok(_) => Ok(()),
        Err(Errno::INTR) => {
            fds.iter_mut().for_each(PollFd::clear_revents);
            Ok(())
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Wakes the thread of a connection, whatever it waits for.
#[derive(Debug)]
pub(super) struct Bell(std::os::fd::OwnedFd);

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Self(rustix::event::eventfd(0, flags)?))
    }

    /// Rings until it is silenced. What it tells of was stored before.
    pub(super) fn ring(&self) {
        // Any number but 0 will do: a full counter rings too.
        let _ = rustix::io::write(&self.0, &1u64.to_be_bytes());
    }

    /// What it tells of is looked at after this.
    pub(super) fn silence(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a connection that does not receive has waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    /// The client has left, as [`peer_has_left`] knows it.
    Left,
    Stopping,
    Rang,
    TimedOut,
}

/// Waits until the client at `socket` has left, until `bell` or `stop` is set, or until `deadline`.
pub(super) fn wait_beside(
    socket: impl AsFd,
    bell: &Bell,
    stop: &StopSignal,
    deadline: Option<Instant>,
) -> io::Result<Beside> {
    let socket = socket.as_fd();
    let gone = if is_tcp(socket) { PollFlags::RDHUP } else { PollFlags::empty() };
    let mut fds =
        [PollFd::from_borrowed_fd(socket, gone), PollFd::new(bell, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
    poll(&mut fds, deadline)?;
    let ready = |index: usize| !fds[index].revents().is_empty();
    Ok(match (ready(0), ready(2)) {
        (true, _) => Beside::Left,
        (false, true) => Beside::Stopping,
        _ if deadline.is_some_and(|deadline| deadline <= Instant::now()) => Beside::TimedOut,
        _ => Beside::Rang,
    })
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
        tune(accepted.as_fd());
        assert!(accepted.nodelay().unwrap());
    }
}
