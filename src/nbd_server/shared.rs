//! What the connections of a server share, and what it knows of each client.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use rayon::ThreadPool;

use super::access::Peer;
use super::buffer::BufferPool;
use super::export::{Export, Exports, Served};
use super::fair::Fair;
use super::limits::Limits;
use super::server::Options;
use super::slow::Workers;
use super::socket::{self, Bell, StopSignal};
use super::stats::{ClientStatus, ExportStatus, RekeyStatus, Stats, Status, Traffic};
use super::threads::SharedOut;
use crate::owner::Owner;

/// What all connections of a server share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) exports: RwLock<Arc<Exports>>,
    pub(super) limits: RwLock<Limits>,
    pub(super) options: Options,
    pub(super) stop: StopSignal,
    /// Set when the time that a stopping server gives is nearly over: long work ends.
    pub(super) hurry: AtomicBool,
    pub(super) workers: Workers,
    pub(super) fair: Arc<Fair>,
    /// The threads that share large requests, if there are any.
    pub(super) large: OnceLock<Arc<ThreadPool>>,
    pub(super) pool: BufferPool,
    pub(super) spinners: Spinners,
    clients: Mutex<BTreeMap<u64, Arc<Client>>>,
    /// A client has left, or has wiped its buffers.
    pub(super) client_changed: Condvar,
    /// What clients that have left did, by the numbers of their exports.
    left: Mutex<BTreeMap<usize, Traffic>>,
    started: Instant,
    /// Tells how re-keys stand, if anybody re-keys beside the server.
    pub(super) rekeys: OnceLock<Rekeys>,
    /// The process that made the server.
    pub(super) owner: Owner,
}

impl Shared {
    pub(super) fn new(exports: Exports, limits: Limits, options: Options) -> io::Result<Self> {
        Ok(Self {
            large: OnceLock::new(),
            exports: RwLock::new(Arc::new(exports)),
            stop: StopSignal::new()?,
            hurry: false.into(),
            workers: Workers::default(),
            fair: Arc::new(Fair::new()),
            pool: BufferPool::new(&limits),
            spinners: Spinners::new(),
            clients: Mutex::default(),
            client_changed: Condvar::new(),
            left: Mutex::default(),
            started: Instant::now(),
            rekeys: OnceLock::new(),
            limits: RwLock::new(limits),
            owner: Owner::here(),
            options,
        })
    }

    pub(super) fn clients(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Client>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client has ended: what it did goes to its export's totals.
    pub(super) fn forget(&self, id: u64) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let client = self.clients().remove(&id);
        if let Some((client, index)) =
            client.and_then(|client| client.chosen.get().map(|chosen| chosen.index).map(|at| (client, at)))
        {
            left.entry(index).or_default().merge(&client.traffic);
        }
        drop(left);
        self.client_changed.notify_all();
    }

    /// The export, with its large requests shared out if there are threads for that.
    pub(super) fn shared_out(&self, export: Arc<dyn Export>) -> Arc<dyn Export> {
        match self.large.get() {
            Some(pool) => Arc::new(SharedOut::new(export, Arc::clone(pool))),
            None => export,
        }
    }

    /// Nothing is told any more of what clients of an export did.
    pub(super) fn forget_export(&self, served: &Served) {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).remove(&served.index);
    }

    /// Wakes the connections of an export.
    pub(super) fn ring(&self, served: &Served) {
        self.clients().values().filter(|client| client.is_at(served)).for_each(|client| client.bell.ring());
    }

    /// A client has wiped its buffers.
    pub(super) fn note_wiped(&self, client: &Client, rounds: u64) {
        // Under the lock of whoever looks, who would otherwise sleep through it.
        let _clients = self.clients();
        client.wiped_rounds.store(rounds, Ordering::Release);
        self.client_changed.notify_all();
    }

    /// The exports as they are presented now.
    pub(super) fn exports(&self) -> Arc<Exports> {
        Arc::clone(&self.exports.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The limits now.
    pub(super) fn limits(&self) -> Limits {
        self.limits.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a client that has chosen an export may go on with it as it does.
    pub(super) fn still_admits(&self, client: &Client) -> bool {
        let Some(chosen) = client.chosen.get() else { return true };
        let exports = self.exports();
        let Some(served) = exports.numbered(chosen.index) else { return false };
        served.info.allowed.admits(&chosen.peer) && (chosen.read_only || !served.is_read_only_for(&chosen.peer))
    }

    /// Says once, and at once, that an export cannot make anything durable any more.
    pub(super) fn note_poison(&self, served: &Served) {
        if served.export.is_poisoned() && !served.poison_told.swap(true, Ordering::Relaxed) {
            tracing::error!(
                export = served.info.name.as_str(),
                "a flush failed: what was written since the last one may be lost, and every flush fails from now on; stop \
                 the server and see to the device, then serve it again"
            );
        }
    }

    /// Whether long work ends now, because the server is about to cut off its clients.
    pub(super) fn hurries(&self) -> bool {
        self.hurry.load(Ordering::Relaxed)
    }

    pub(super) fn status(&self) -> Status {
        let rekeys = self.rekeys.get().map_or_else(Vec::new, |Rekeys(tell)| tell());
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stats: BTreeMap<usize, Stats> = BTreeMap::new();
        left.iter().for_each(|(index, traffic)| stats.entry(*index).or_default().add(traffic));
        let (clients, exports) = (self.clients(), self.exports());
        let mut listed = Vec::new();
        for (id, client) in clients.iter() {
            let Some(chosen) = client.chosen.get() else { continue };
            let index = chosen.index;
            stats.entry(index).or_default().add(&client.traffic);
            let mut own = Stats::default();
            own.add(&client.traffic);
            let name = exports.numbered(index).map_or_else(String::new, |served| served.info.name.clone());
            listed.push(ClientStatus {
                id: *id,
                export: name,
                uid: client.peer.unix.as_ref().map(|unix| unix.uid),
                peer: chosen.peer.to_string(),
                read_only: chosen.read_only,
                stats: own,
            });
        }
        let listed_exports = exports.iter().map(|served| ExportStatus {
            name: served.info.name.clone(),
            size_bytes: served.size_bytes(),
            read_only: served.info.read_only,
            poisoned: served.export.is_poisoned(),
            locked: served.export.is_locked(),
            resident_plaintext_bytes: served.export.resident_plaintext_bytes(),
            stats: stats.remove(&served.index).unwrap_or_default(),
        });
        Status {
            uptime_seconds: self.started.elapsed().as_secs(),
            connections: clients.len(),
            buffer_bytes: self.pool.lent_bytes(),
            exports: listed_exports.collect(),
            clients: listed,
            rekeys,
        }
    }
}

/// Who tells how re-keys stand.
pub(super) struct Rekeys(pub(super) Box<dyn Fn() -> Vec<RekeyStatus> + Send + Sync>);

impl fmt::Debug for Rekeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rekeys").finish_non_exhaustive()
    }
}

/// What a client has chosen, and as whom.
#[derive(Debug)]
pub(super) struct Chosen {
    /// Number of the export.
    pub(super) index: usize,
    /// Who the client is, with the names in its certificate.
    pub(super) peer: Peer,
    /// Whether the export was read-only for it.
    pub(super) read_only: bool,
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Client {
    /// Its number, from 1.
    pub(super) id: u64,
    /// The only owner of the descriptor.
    pub(super) socket: OwnedFd,
    pub(super) peer: Peer,
    pub(super) handshaking: AtomicBool,
    /// Since the handshake has ended.
    pub(super) chosen: OnceLock<Chosen>,
    pub(super) traffic: Traffic,
    /// Wakes its thread.
    pub(super) bell: Arc<Bell>,
    /// How often its export had been locked when it wiped its buffers last.
    pub(super) wiped_rounds: AtomicU64,
}

impl Client {
    /// Whether it has not chosen an export, and was not told to go.
    pub(super) fn is_handshaking(&self) -> bool {
        self.handshaking.load(Ordering::Relaxed)
    }

    /// Whether it has chosen that export.
    pub(super) fn is_at(&self, served: &Served) -> bool {
        self.chosen.get().is_some_and(|chosen| chosen.index == served.index)
    }

    /// Whether nobody will read a reply any more.
    pub(super) fn has_left(&self) -> bool {
        socket::peer_has_left(self.socket.as_fd())
    }

    /// Ends all traffic; the descriptor stays valid until the last user is gone.
    pub(super) fn shut_down(&self) {
        self.handshaking.store(false, Ordering::Relaxed);
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

/// Limits how many connections poll at a time, so that polling never takes the processors from work.
#[derive(Debug)]
pub(super) struct Spinners {
    active: AtomicUsize,
    max: usize,
}

impl Spinners {
    fn new() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self { active: AtomicUsize::new(0), max: processors.div_ceil(2) }
    }

    /// Leave to poll, until the guard is dropped.
    pub(super) fn enter(&self) -> Option<SpinGuard<'_>> {
        if self.active.fetch_add(1, Ordering::Relaxed) < self.max {
            return Some(SpinGuard { active: &self.active });
        }
        self.active.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

/// One connection polls.
#[derive(Debug)]
pub(super) struct SpinGuard<'a> {
    active: &'a AtomicUsize,
}

impl Drop for SpinGuard<'_> {
    fn drop(&mut self) {
        self.active.fetch_sub(1, Ordering::Relaxed);
    }
}
