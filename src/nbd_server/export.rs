//! What the server serves: the [`Export`] trait, its errors, and the registry of served exports.
//!
//! The server relies on two promises of an export: a flush covers every write that returned before it, whatever
//! connection wrote (so `MULTI_CONN` is honest), and what lies past its end is refused by the export itself: its size may
//! change, and a connection keeps the one that it was told. In return every range that reaches an export is inside the
//! size that the client was told, and no write reaches a read-only one. Nothing here knows about the wire.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::access::{Allowed, Peer};
use super::gate::Gate;
use super::throttle::{ExportLimits, Throttle};
use super::wire::STRING_BYTES_MAX;
use crate::volume::VolumeError;

/// What a request that changes data has to reach before it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Visible to later reads; durable at the next flush.
    Cached,
    /// Durable on media ("force unit access"): [`Export::persist`] comes before the answer.
    Fua,
}

/// Whether zeroes may be written by punching a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hole {
    /// The range may be deallocated.
    Allowed,
    /// The range has to stay allocated.
    Forbidden,
    /// The whole range becomes a hole at once, or nothing is changed and the answer is [`ExportError::Unsupported`].
    Required,
}

/// What an extent of an export is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated data: status 0 of `base:allocation`.
    Allocated,
    /// A hole that reads as zeroes.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len_bytes: u64,
    /// What the bytes are.
    pub kind: ExtentKind,
}

/// Why an export could not do what it was asked. Texts reach clients: they say nothing about keys or contents.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The media cannot be read or written there.
    #[error("media error")]
    Media,
    /// A volume cannot be read or written there; why is for the log.
    #[error("media error")]
    Volume(#[source] VolumeError),
    /// The backing has no space left.
    #[error("no space left on the backing")]
    NoSpace,
    /// The export is being closed.
    #[error("the export is shutting down")]
    ShuttingDown,
    /// The export is locked: its key is not there.
    #[error("the export is locked")]
    Locked,
    /// The export has become smaller than it was when the client connected.
    #[error("beyond the end: the export has become smaller")]
    PastEnd,
    /// The export cannot be written.
    #[error("the export is read-only")]
    ReadOnly,
    /// The export does not do this.
    #[error("operation not supported by this export")]
    Unsupported,
    /// Any other failure of the operating system.
    #[error("input/output error")]
    Io(#[source] std::io::Error),
}

/// A byte-addressed device that can be served.
///
/// All offsets and lengths are in bytes; `offset + len` never exceeds what [`size_bytes`](Self::size_bytes) was when the
/// client connected. Methods are called from many threads at once.
pub trait Export: Send + Sync {
    /// Size in bytes now, at most 2^63 - 1. Clients that connect later see another size; those that are connected do not.
    fn size_bytes(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    ///
    /// Any [`ExportError`]; the contents of `buf` are then unspecified and are not sent.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError>;

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    ///
    /// Any [`ExportError`]; an unspecified part of the range may then have been written.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), ExportError>;

    /// Makes the range, of at most [`SLICE_BYTES`](super::limits::SLICE_BYTES), read as zeroes. [`Hole::Required`] comes only if [`fast_zero`](Self::fast_zero).
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    fn write_zeroes(&self, offset: u64, len_bytes: u64, hole: Hole) -> Result<(), ExportError>;

    /// Says that the range, of at most [`SLICE_BYTES`](super::limits::SLICE_BYTES), is not needed any more; the export may ignore it. Called only if
    /// [`discards`](Self::discards).
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError>;

    /// Makes what was written to the range durable.
    ///
    /// # Errors
    ///
    /// Any [`ExportError`]; nothing is then known to be durable.
    fn persist(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        let _ = (offset, len_bytes);
        self.flush()
    }

    /// Makes every write that returned before this call durable, from whatever thread it was made.
    ///
    /// # Errors
    ///
    /// Any [`ExportError`]; nothing is then known to be durable.
    fn flush(&self) -> Result<(), ExportError>;

    /// Whether [`persist`](Self::persist) and [`flush`](Self::flush) may wait for a device. They then run beside the
    /// connection that asks, which goes on with other requests.
    fn durability_waits(&self) -> bool {
        true
    }

    /// Says that the range, of at most [`SLICE_BYTES`](super::limits::SLICE_BYTES), will be read soon. Called only if [`prefetches`](Self::prefetches).
    ///
    /// # Errors
    ///
    /// Any [`ExportError`].
    fn prefetch(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        let _ = (offset, len_bytes);
        Ok(())
    }

    /// Whether [`prefetch`](Self::prefetch) does anything.
    fn prefetches(&self) -> bool {
        false
    }

    /// Whether `write_zeroes` with [`Hole::Required`] may succeed.
    fn fast_zero(&self) -> bool {
        false
    }

    /// Whether `discard` does anything. Holes then read as zeroes.
    fn discards(&self) -> bool {
        false
    }

    /// Whether a flush has failed, so that nothing is known to become durable any more.
    fn is_poisoned(&self) -> bool {
        false
    }

    /// Whether its key was wiped, so that everything fails with [`ExportError::Locked`] until it is unlocked.
    fn is_locked(&self) -> bool {
        false
    }

    /// Plaintext that is kept outside of requests' buffers, in bytes; for the status only.
    fn resident_plaintext_bytes(&self) -> u64 {
        0
    }

    /// Describes the range from `offset` in at most `limit` extents (at least one is wanted), and looks for no more than
    /// these. The extents begin at `offset`; together they may cover less or more than `len_bytes`.
    ///
    /// # Errors
    ///
    /// Any [`ExportError`].
    fn extents(&self, offset: u64, len_bytes: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        let _ = (offset, limit);
        Ok(vec![Extent { len_bytes, kind: ExtentKind::Allocated }])
    }
}

/// How an export is presented to clients.
#[derive(Debug, Clone, Default)]
pub struct ExportInfo {
    /// The name that clients ask for: at most 4096 bytes, no NUL. May be empty.
    pub name: String,
    /// A line for people, or empty; at most 4096 bytes.
    pub description: String,
    /// Refuse every write.
    pub read_only: bool,
    /// Who may write, if not everybody who may use the export; it is read-only for others.
    pub writers: Allowed,
    /// Serve this export only through TLS when the server offers TLS but does not require it.
    pub tls_required: bool,
    /// Who may use the export.
    pub allowed: Allowed,
    /// How much may be asked of it.
    pub limits: ExportLimits,
}

/// One served export.
#[derive(Clone)]
pub struct Served {
    /// How it is presented.
    pub info: ExportInfo,
    /// The device.
    pub export: Arc<dyn Export>,
    /// Its number, which no other one gets.
    pub(super) index: usize,
    /// What becomes of requests while it is locked.
    pub(super) gate: Arc<Gate>,
    /// Its limits, and what its clients have asked.
    pub(super) throttle: Arc<Throttle>,
    /// Whether the log has told that it is poisoned.
    pub(super) poison_told: Arc<AtomicBool>,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served")
            .field("info", &self.info)
            .field("size_bytes", &self.size_bytes())
            .finish_non_exhaustive()
    }
}

impl Served {
    /// Whether it is read-only for `peer`.
    pub fn is_read_only_for(&self, peer: &Peer) -> bool {
        self.info.read_only || !self.info.writers.admits(peer)
    }

    /// Size in bytes now.
    pub fn size_bytes(&self) -> u64 {
        self.export.size_bytes()
    }
}

/// Why an export cannot be registered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistryError {
    /// The name or the description is longer than the protocol allows.
    #[error("export name or description of {len_bytes} bytes exceeds the protocol's limit of {STRING_BYTES_MAX}")]
    StringTooLong {
        /// Length in bytes.
        len_bytes: usize,
    },
    /// The name or the description has a NUL byte.
    #[error("export name or description contains a NUL byte")]
    StringHasNul,
    /// Two exports have one name.
    #[error("export {index} has the name of an earlier one")]
    Duplicate {
        /// Position of the second one, from 0.
        index: usize,
    },
    /// The size does not fit a signed 64-bit offset, which clients use.
    #[error("export size of {size_bytes} bytes exceeds the protocol's limit of 2^63 - 1")]
    TooLarge {
        /// Size in bytes.
        size_bytes: u64,
    },
}

/// The served exports in the order in which they were added. The first one is the default export.
#[derive(Debug, Clone, Default)]
pub struct Exports {
    list: Vec<Arc<Served>>,
    next_index: usize,
}

impl Exports {
    /// No exports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an export.
    ///
    /// # Errors
    ///
    /// [`RegistryError`] when a string, the size or the name's uniqueness breaks the protocol's rules.
    pub fn add(&mut self, info: ExportInfo, export: Arc<dyn Export>) -> Result<(), RegistryError> {
        for text in [&info.name, &info.description] {
            if text.len() > STRING_BYTES_MAX {
                return Err(RegistryError::StringTooLong { len_bytes: text.len() });
            }
            if text.contains('\0') {
                return Err(RegistryError::StringHasNul);
            }
        }
        if self.list.iter().any(|served| served.info.name == info.name) {
            return Err(RegistryError::Duplicate { index: self.list.len() });
        }
        let size_bytes = export.size_bytes();
        if i64::try_from(size_bytes).is_err() {
            return Err(RegistryError::TooLarge { size_bytes });
        }
        let (index, gate, throttle) = (self.next_index, Arc::default(), Arc::<Throttle>::default());
        throttle.set(info.limits);
        self.list.push(Arc::new(Served { info, export, index, gate, throttle, poison_told: Arc::default() }));
        self.next_index += 1;
        Ok(())
    }

    /// The export of that name; the empty name also means the first export.
    pub fn find(&self, name: &str) -> Option<&Arc<Served>> {
        let exact = self.list.iter().find(|served| served.info.name == name);
        exact.or_else(|| if name.is_empty() { self.list.first() } else { None })
    }

    /// The export of that number.
    pub(super) fn numbered(&self, index: usize) -> Option<&Arc<Served>> {
        self.list.iter().find(|served| served.index == index)
    }

    /// All exports in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Arc<Served>> {
        self.list.iter()
    }

    /// Puts every export behind another one of the same size.
    pub(super) fn wrap(&mut self, wrap: impl Fn(Arc<dyn Export>) -> Arc<dyn Export>) {
        for served in &mut self.list {
            let export = wrap(served.export.clone());
            *served = Arc::new(Served { export, ..Served::clone(served) });
        }
    }

    /// The same exports, presented as `change` says; names stay.
    #[must_use]
    pub fn presented(&self, change: impl Fn(&ExportInfo) -> ExportInfo) -> Self {
        let present = |served: &Arc<Served>| {
            let info = ExportInfo { name: served.info.name.clone(), ..change(&served.info) };
            served.throttle.set(info.limits);
            Arc::new(Served { info, ..Served::clone(served) })
        };
        Self { list: self.list.iter().map(present).collect(), ..*self }
    }

    /// All but the one of that number.
    pub(super) fn without(&self, index: usize) -> Self {
        let list = self.list.iter().filter(|served| served.index != index).cloned().collect();
        Self { list, ..*self }
    }

    /// How many exports there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}
