//! The synchronisation that the range lock and the page sets are made of, named in one place: `tests/dax_states.rs` compiles
//! the same files over a scheduler that tries interleavings.

pub(crate) use crate::barrier;
pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};
pub(crate) use std::{hint, thread};

/// A number of this thread, while it runs. In a handler of signals too, which the standard library's is not for.
pub(crate) use crate::spawn::thread_number;

pub(crate) mod atomic {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
}
