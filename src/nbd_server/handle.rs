//! What can be done with a server while it runs, from other threads.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::export::{ExportInfo, Served};
use super::gate::WhileLocked;
use super::limits::Limits;
use super::shared::Shared;
use super::stats::Status;
use super::tls::Tls;

/// Steers a server from other threads.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
}

impl Handle {
    /// Makes [`Server::run`] finish: no new clients, `ESHUTDOWN` for new requests or no answer ([`Options::hang_up`]),
    /// then flush and return. May be called any number of times.
    pub fn stop(&self) {
        self.shared.stop.set();
    }

    /// Presents the exports as `change` says, from now on with these limits and, if TLS is on and given, with that
    /// configuration of it. Clients that are not admitted any more, or may not write any more, are closed. Whether TLS is
    /// required stays as it is.
    pub fn reload(&self, change: impl Fn(&ExportInfo) -> ExportInfo, limits: Limits, tls: Option<&Tls>) {
        let shared = &self.shared;
        let presented = Arc::new(shared.exports().presented(change));
        *shared.exports.write().unwrap_or_else(PoisonError::into_inner) = presented;
        shared.pool.set_budget(limits.buffer_bytes_max);
        *shared.limits.write().unwrap_or_else(PoisonError::into_inner) = limits;
        if let (Some(now), Some(new)) = (&shared.options.tls, tls) {
            now.replace_with(new);
        }
        let clients = shared.clients();
        for client in clients.values().filter(|client| !shared.still_admits(client)) {
            tracing::warn!(client = client.id, peer = %client.peer, "client closed: it is not admitted any more");
            client.shut_down();
        }
    }

    /// What the server and its clients have done so far.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// Connections that are open now.
    pub fn connection_count(&self) -> usize {
        self.shared.clients().len()
    }

    /// Bytes of large buffers that connections use now.
    pub fn buffer_bytes(&self) -> usize {
        self.shared.pool.lent_bytes()
    }

    /// Has `lock` lock the export of that name; what its clients ask from then on meets `meanwhile`. Afterwards nothing of what
    /// they read or wrote is left in the server's buffers. A client that does not take its replies for as long as a stopping
    /// server would wait is closed. An export that is locked already only changes what it does meanwhile. `None` without
    /// such an export.
    pub fn lock_export<T>(&self, name: &str, meanwhile: WhileLocked, lock: impl FnOnce() -> T) -> Option<T> {
        let served = self.served(name)?;
        served.gate.close(meanwhile);
        let locked = lock();
        if served.export.is_locked() {
            served.gate.begin_round();
            self.shared.ring(&served);
            self.await_wiped(&served);
        } else {
            self.open_gate(&served);
        }
        Some(locked)
    }

    /// Has `unlock` unlock the export of that name; what waits for it goes on. `None` without such an export.
    pub fn unlock_export<T>(&self, name: &str, unlock: impl FnOnce() -> T) -> Option<T> {
        let served = self.served(name)?;
        let unlocked = unlock();
        if !served.export.is_locked() {
            self.open_gate(&served);
        }
        Some(unlocked)
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopping(&self) -> bool {
        self.shared.stop.is_set()
    }

    fn served(&self, name: &str) -> Option<Arc<Served>> {
        self.shared.exports().iter().find(|served| served.info.name == name).cloned()
    }

    fn open_gate(&self, served: &Served) {
        served.gate.open();
        self.shared.ring(served);
    }

    /// Waits until every connection of the export has wiped its buffers, or has ended.
    fn await_wiped(&self, served: &Served) {
        let shared = &self.shared;
        let deadline = Instant::now() + shared.limits().drain_deadline;
        let round = served.gate.rounds();
        let mut clients = shared.clients();
        let mut cut = false;
        loop {
            let left = clients
                .values()
                .filter(|client| client.is_at(served) && client.wiped_rounds.load(Ordering::Acquire) != round);
            let left: Vec<_> = left.cloned().collect();
            if left.is_empty() {
                return;
            }
            let now = Instant::now();
            if now >= deadline && !cut {
                cut = true;
                for client in &left {
                    tracing::warn!(client = client.id, peer = %client.peer, "client closed: it does not take its replies");
                    client.shut_down();
                }
            }
            // A connection whose socket is shut down ends by itself.
            let until = deadline.saturating_duration_since(now);
            clients = if cut {
                shared.client_changed.wait(clients).unwrap_or_else(PoisonError::into_inner)
            } else {
                shared.client_changed.wait_timeout(clients, until).unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }
}
