//! The server: accepts clients, gives each a thread, and stops in order.
//!
//! Guards: connections and handshakes in progress are limited; one client's end, even a panic of ours, leaves the
//! others alone; [`Server::run`] returns only after every connection has ended and every export is flushed.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, sockopt};
use vsock::VsockStream;

use super::access::{Identity, Peer, UnixPeer};
use super::connection::{self, End};
use super::export::{ExportError, Exports};
use super::failures::chain;
use super::handle::Handle;
use super::limits::Limits;
use super::listener::Listener;
use super::shared::{Client, Rekeys, Shared};
use super::socket::{self, Bell};
use super::stats::{RekeyStatus, Traffic};
use super::status::{self, Commands, Kind};
use super::threads::{self, SharedOut};
use super::tls::Tls;
use crate::peer_groups;
use crate::spawn::without_signals;

/// Stack of a connection's thread, in bytes.
const STACK_BYTES: usize = 256 << 10;
/// Pause after an accept that failed for lack of resources.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections above the limit that may exist for a moment, because others that make room for them are about to end.
const EVICTED_MAX: usize = 8;

/// How the server behaves, apart from its limits.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a connection polls for the next request before it sleeps; zero turns polling off.
    pub poll: Duration,
    /// Bytes of the kernel's send and receive buffers to ask for, for each connection.
    pub socket_buffer_bytes: usize,
    /// TLS, if it is offered or required.
    pub tls: Option<Tls>,
    /// Threads that share the work of requests of 256 KiB and more, for all connections together; up to 1, each
    /// connection's own thread does it.
    pub threads: usize,
    /// How a stopping server treats requests that come after the stop. `false`: it answers them with `ESHUTDOWN`, which
    /// a client reports as an error. `true`: it answers what it has received and closes the connection, so that a
    /// client which connects again (to the next server) repeats the others and sees no error.
    pub hang_up: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { poll: Duration::from_micros(50), socket_buffer_bytes: 2 << 20, tls: None, threads: 1, hang_up: false }
    }
}

/// Why a server ended badly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The operating system refuses something that the server cannot do without.
    #[error("the server cannot wait for clients")]
    Io(#[from] io::Error),
    /// This process is a fork of the one that made the server.
    #[error(
        "the server was made by another process, of which this one is a fork: open and make everything after the last fork"
    )]
    Forked,
    /// An export could not be flushed at the end.
    #[error("export {index} could not be flushed")]
    Flush {
        /// Position of the export, from 0.
        index: usize,
        /// The reason.
        #[source]
        source: ExportError,
    },
}

/// An NBD server.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<Listener>,
    reporters: Vec<(Kind, Listener)>,
    commands: Option<Commands>,
    shared: Arc<Shared>,
}

impl Server {
    /// A server of these exports, without listeners.
    ///
    /// # Errors
    ///
    /// When the operating system gives no event descriptor.
    pub fn new(exports: Exports, limits: Limits, options: Options) -> Result<Self, ServerError> {
        let shared = Arc::new(Shared::new(exports, limits, options)?);
        Ok(Self { listeners: Vec::new(), reporters: Vec::new(), commands: None, shared })
    }

    /// Adds a listener.
    #[must_use]
    pub fn listen(mut self, listener: Listener) -> Self {
        self.listeners.push(listener);
        self
    }

    /// Adds a control socket: whoever connects gets [`Status`](super::Status) as one line of JSON.
    #[must_use]
    pub fn control(mut self, listener: Listener) -> Self {
        self.reporters.push((Kind::Control, listener));
        self
    }

    /// Lets the control socket take commands besides questions.
    #[must_use]
    pub fn commands(mut self, commands: Commands) -> Self {
        self.commands = Some(commands);
        self
    }

    /// Has the status and the metrics tell how re-keys stand, which somebody does beside the server: `tell` is asked for each.
    #[must_use]
    pub fn rekeys(self, tell: impl Fn() -> Vec<RekeyStatus> + Send + Sync + 'static) -> Self {
        // Whoever came first stays.
        let _ = self.shared.rekeys.set(Rekeys(Box::new(tell)));
        self
    }

    /// Adds an endpoint for Prometheus: HTTP, path `/metrics`, the text format of OpenMetrics.
    #[must_use]
    pub fn metrics(mut self, listener: Listener) -> Self {
        self.reporters.push((Kind::Metrics, listener));
        self
    }

    /// A handle that stops the server.
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared) }
    }

    /// Serves until [`Handle::stop`] is called; then drains, flushes every export, and removes the socket files.
    ///
    /// # Errors
    ///
    /// [`ServerError`]. All clients are gone in any case.
    pub fn run(self) -> Result<(), ServerError> {
        if !self.shared.owner.is_here() {
            return Err(ServerError::Forked);
        }
        let Self { listeners, reporters, commands, shared } = self;
        share_out(&shared)?;
        let accepted = std::thread::scope(|scope| {
            for (kind, listener) in &reporters {
                let (shared, commands) = (&shared, commands.as_ref());
                let answer = move || status::answer_all((*kind, listener), shared, commands, scope);
                without_signals(|| scope.spawn(answer));
            }
            let result = accept_all(&listeners, &shared, scope);
            shared.stop.set();
            drop(listeners);
            drain(&shared);
            result
        });
        let mut flushed = Ok(());
        for (index, served) in shared.exports().iter().enumerate().filter(|(_, served)| !served.info.read_only) {
            match served.export.flush() {
                // Whoever locked it has flushed it, and been told how that ended.
                Ok(()) | Err(ExportError::Locked) => {}
                Err(source) => flushed = flushed.and(Err(ServerError::Flush { index, source })),
            }
        }
        accepted.map_err(ServerError::from).and(flushed)
    }
}

/// Makes the threads that share large requests. Not before, so that they have what whoever runs the server has given up.
fn share_out(shared: &Shared) -> io::Result<()> {
    if shared.options.threads > 1 {
        let pool = threads::pool(shared.options.threads).map_err(io::Error::other)?;
        let mut exports = shared.exports.write().unwrap_or_else(PoisonError::into_inner);
        let mut wrapped = Exports::clone(&exports);
        wrapped.wrap(|export| Arc::new(SharedOut::new(export, Arc::clone(&pool))));
        *exports = Arc::new(wrapped);
        let _ = shared.large.set(pool); // a server runs once
    }
    Ok(())
}

fn accept_all<'scope>(
    listeners: &[Listener],
    shared: &'scope Arc<Shared>,
    scope: &'scope Scope<'scope, '_>,
) -> io::Result<()> {
    let mut next_id = 0u64;
    while !shared.stop.is_set() {
        let stop = std::iter::once(shared.stop.as_fd());
        let watched = stop.chain(listeners.iter().map(AsFd::as_fd));
        let mut fds: Vec<_> = watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for (listener, fd) in listeners.iter().zip(&fds[1..]) {
            if fd.revents().is_empty() {
                continue;
            }
            match listener.accept() {
                Ok(socket) => {
                    next_id += 1;
                    let (peer, socket) = peer_of(socket);
                    if listener.admits(peer.cid) {
                        admit(next_id, (socket, peer), shared, scope);
                    } else {
                        tracing::warn!(%peer, "client refused: its machine is not one that may connect");
                    }
                }
                Err(error) if is_shortage(&error) => {
                    // Whoever has not chosen an export makes room for whoever may. Nothing is accepted meanwhile, because
                    // the listener stays ready.
                    tracing::warn!(%error, "no client can be accepted for now");
                    first_to_go(&shared.clients()).inspect(|client| client.shut_down());
                    let mut stop = [PollFd::new(&shared.stop, PollFlags::IN)];
                    socket::poll(&mut stop, Some(Instant::now() + ACCEPT_PAUSE))?;
                }
                // The client is gone already, or another process took it.
                Err(_) => {}
            }
        }
    }
    Ok(())
}

/// Gives a new client its thread, if the limits allow it. A client that is not admitted is closed.
fn admit<'scope>(
    id: u64,
    (socket, peer): (OwnedFd, Peer),
    shared: &'scope Arc<Shared>,
    scope: &'scope Scope<'scope, '_>,
) {
    socket::tune(socket.as_fd());
    let bell = match Bell::new() {
        Ok(bell) => Arc::new(bell),
        Err(error) => {
            tracing::warn!(%error, "client refused");
            return;
        }
    };
    let client = Arc::new(Client {
        id,
        socket,
        peer,
        handshaking: true.into(),
        chosen: OnceLock::new(),
        traffic: Traffic::default(),
        bell,
        wiped_rounds: 0.into(),
    });
    let limits = shared.limits();
    let mut clients = shared.clients();
    let is_full = clients.len() >= limits.connections_max;
    let handshaking = clients.values().filter(|client| client.is_handshaking()).count();
    let most = limits.connections_max.saturating_add(EVICTED_MAX);
    if is_full && (handshaking == 0 || clients.len() >= most) {
        tracing::warn!(limit = limits.connections_max, "client refused, too many connections");
        return;
    }
    if is_full || handshaking >= limits.handshaking_max {
        // Its thread ends in a moment, which is what the few connections above the limit are for.
        first_to_go(&clients).inspect(|client| client.shut_down());
    }
    tracing::info!(client = id, peer = %client.peer, "client connected");
    clients.insert(id, Arc::clone(&client));
    drop(clients);
    let thread = std::thread::Builder::new().name(format!("nbd-{id}")).stack_size(STACK_BYTES);
    let serve = move || {
        // A panic is a bug of ours or of the export; it must not take the other clients with it.
        match std::panic::catch_unwind(AssertUnwindSafe(|| connection::serve(&client, shared))) {
            Ok(end @ End::Tls(_)) => {
                tracing::warn!(client = id, peer = %client.peer, "client refused: {}", chain(&end));
            }
            Ok(end) => tracing::info!(client = id, peer = %client.peer, "client left: {}", chain(&end)),
            Err(_) => tracing::error!(client = id, "connection thread panicked"),
        }
        client.shut_down();
        shared.forget(id);
    };
    if without_signals(|| thread.spawn_scoped(scope, serve)).is_err() {
        shared.clients().remove(&id);
    }
}

/// The connection that makes room for another one: of the client that has most without an export, the oldest of these. So nobody
/// who connects often pushes out who connects once.
fn first_to_go(clients: &BTreeMap<u64, Arc<Client>>) -> Option<&Arc<Client>> {
    let mut all: BTreeMap<Identity, (usize, &Arc<Client>)> = BTreeMap::new();
    for client in clients.values().filter(|client| client.is_handshaking()) {
        all.entry(client.peer.identity()).or_insert((0, client)).0 += 1;
    }
    let (_, oldest) = all.into_values().max_by_key(|(count, oldest)| (*count, Reverse(oldest.id)))?;
    Some(oldest)
}

/// Who is at the other end, as far as the socket's family tells.
fn peer_of(socket: OwnedFd) -> (Peer, OwnedFd) {
    let mut peer = Peer::default();
    match sockopt::socket_domain(&socket) {
        Ok(AddressFamily::UNIX) => {
            peer.unix = sockopt::socket_peercred(&socket).ok().map(|who| UnixPeer {
                uid: who.uid.as_raw(),
                gid: who.gid.as_raw(),
                groups: peer_groups::of(&socket).unwrap_or_default(),
                pid: who.pid.as_raw_nonzero().get(),
            });
        }
        Ok(AddressFamily::VSOCK) => {
            let stream = VsockStream::from(socket);
            peer.cid = stream.peer_addr().ok().map(|address| address.cid());
            return (peer, stream.into());
        }
        _ => {
            let address = rustix::net::getpeername(&socket).ok().flatten();
            peer.address = address.and_then(|address| address.try_into().ok());
        }
    }
    (peer, socket)
}

/// Waits for the clients to end by themselves, then has long work end, then cuts the rest off.
fn drain(shared: &Shared) {
    let start = Instant::now();
    let drain_deadline = shared.limits().drain_deadline;
    let deadline = start + drain_deadline;
    // Early enough that the last replies still leave.
    let hurry_at = start + drain_deadline * 3 / 4;
    let mut clients = shared.clients();
    while !clients.is_empty() {
        let now = Instant::now();
        if now >= hurry_at {
            shared.hurry.store(true, Ordering::Relaxed);
        }
        if now >= deadline {
            clients.values().for_each(|client| client.shut_down());
            return;
        }
        let next = if now < hurry_at { hurry_at } else { deadline };
        clients = shared.client_changed.wait_timeout(clients, next - now).unwrap_or_else(PoisonError::into_inner).0;
    }
}

pub(super) fn is_shortage(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}
