//! Mapping, persistence and probing of a backing.
//!
//! A [`Backing`] is a file or device that is opened, locked and mapped whole. Its bytes are reached through range-checked
//! [`Source`](crate::memory::Source) and [`Target`](crate::memory::Target) only, and a media error under an access
//! (SIGBUS) becomes a [`MediaError`] of that access. What makes a store durable is fixed when the backing is mapped: its
//! [`Granularity`]. The durability words are those of PMDK: *store*, *flush*, *drain*, *persist* = flush + drain.
//!
//! This layer knows neither headers nor keys, and it orders nothing between threads: whoever shares a backing keeps
//! overlapping accesses apart (the volume's range lock does).

mod backing;
mod bitmap;
mod error;
mod file_limit;
mod granularity;
mod identity;
mod lock;
mod mapping;
mod medium;
mod open;
mod options;
mod persist;
mod probe;
mod sigbus;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
#[cfg(not(any(test, feature = "sim")))]
#[path = "no_sim.rs"]
mod sim;
mod sync;
mod users;

pub use backing::{Backing, BackingExtent, BackingKind};
pub use error::{MediaError, OpenError};
pub(crate) use file_limit::check_file_size_limit;
pub use granularity::{FORCE_GRANULARITY_VARIABLE, Granularity, GranularityReason};
pub use identity::{BackingId, Extent};
pub use options::{Access, Allocation, OpenOptions};
pub(crate) use sigbus::{Answer, AnsweredRange, Touch};
pub(crate) use users::RangeUse;
