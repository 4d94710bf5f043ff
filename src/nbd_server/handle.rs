//! What can be done with a server while it runs, from other threads.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::export::{Export, ExportError, ExportInfo, Exports, RegistryError, Served};
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
    /// Makes [`Server::run`](super::Server::run) finish: no new clients, `ESHUTDOWN` for new requests or no answer ([`hang_up`](super::Options::hang_up)),
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
        let clients: Vec<_> = shared.clients().values().cloned().collect();
        for client in &clients {
            client.bell.ring();
        }
        for client in clients.iter().filter(|client| !shared.still_admits(client)) {
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

    /// Serves one export more.
    ///
    /// # Errors
    ///
    /// As [`Exports::add`].
    pub fn add_export(&self, info: ExportInfo, export: Arc<dyn Export>) -> Result<(), RegistryError> {
        let shared = &self.shared;
        let mut exports = shared.exports.write().unwrap_or_else(PoisonError::into_inner);
        let mut more = Exports::clone(&exports);
        more.add(info, shared.shared_out(export))?;
        *exports = Arc::new(more);
        Ok(())
    }

    /// Serves the export of that name no more: closes its clients, waits for what they have under way, and flushes it. `None`
    /// without such an export.
    pub fn remove_export(&self, name: &str) -> Option<Result<(), ExportError>> {
        let (shared, served) = (&self.shared, self.served(name)?);
        let mut exports = shared.exports.write().unwrap_or_else(PoisonError::into_inner);
        *exports = Arc::new(exports.without(served.index));
        drop(exports);
        let mut clients = shared.clients();
        while clients.values().any(|client| client.is_at(&served)) {
            clients.values().filter(|client| client.is_at(&served)).for_each(|client| client.shut_down());
            clients = shared.client_changed.wait(clients).unwrap_or_else(PoisonError::into_inner);
        }
        drop(clients);
        shared.forget_export(&served);
        match served.export.flush() {
            _ if served.info.read_only => Some(Ok(())),
            // Whoever locked it has flushed it.
            Err(ExportError::Locked) => Some(Ok(())),
            flushed => Some(flushed),
        }
    }

    /// Closes the client of that number; `false` without one.
    pub fn kick(&self, client: u64) -> bool {
        let clients = self.shared.clients();
        let Some(client) = clients.get(&client) else { return false };
        tracing::warn!(client = client.id, peer = %client.peer, "client closed: somebody asked for it");
        client.shut_down();
        true
    }

    /// Whether new clients are asked for a TLS certificate; `None` without TLS.
    pub fn asks_for_certificates(&self) -> Option<bool> {
        self.shared.options.tls.as_ref().map(Tls::asks_for_certificates)
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
