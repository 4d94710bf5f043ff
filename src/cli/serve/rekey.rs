//! Re-keys that go on while their namespaces are served.
//!
//! Each has a thread. It stops between two windows when the server stops; a later serve goes on from there.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::cli::output;
use crate::cli::progress::Progress;
use crate::cli::size::ByteSize;
use crate::volume::{Volume, WINDOW_BYTES};

/// The threads that re-key; they are stopped when this is dropped.
#[derive(Debug)]
pub(super) struct Rekeys {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    max_rate: Option<ByteSize>,
}

impl Rekeys {
    pub(super) fn new(max_rate: Option<ByteSize>) -> Self {
        Self { stop: Arc::default(), threads: Vec::new(), max_rate }
    }

    /// Goes on with the re-key of `volume`, if one is under way that may go on.
    pub(super) fn go_on(&mut self, path: PathBuf, volume: Arc<Volume>) {
        let Some(progress) = volume.transform() else { return };
        if volume.read_only() || volume.transform_paused() {
            let (done, total) = (ByteSize(progress.done_bytes), ByteSize(progress.total_bytes));
            output::complain(format_args!("{}: a re-key rests at {done} of {total}", path.display()));
            return;
        }
        let (stop, max_rate) = (Arc::clone(&self.stop), self.max_rate);
        self.threads.push(thread::spawn(move || {
            if let Err(error) = run(&volume, max_rate, &stop) {
                tracing::error!(path = %path.display(), %error, "the re-key failed: reopen the namespace");
            }
        }));
    }
}

fn run(volume: &Volume, max_rate: Option<ByteSize>, stop: &AtomicBool) -> Result<(), crate::namespace::TransformError> {
    let Some(first) = volume.transform() else { return Ok(()) };
    let mut progress = Progress::new(first.done_bytes, first.total_bytes, false, max_rate).quiet();
    let mut done_bytes = first.done_bytes;
    tracing::info!(done_bytes, first.total_bytes, "the re-key goes on");
    while !stop.load(Ordering::Relaxed) {
        if progress.must_wait(done_bytes) {
            progress.reach(done_bytes);
            continue;
        }
        match volume.transform_step(WINDOW_BYTES)? {
            Some(reached) => done_bytes = reached.done_bytes,
            None => {
                tracing::info!(first.total_bytes, "every byte is under the new volume key");
                break;
            }
        }
    }
    Ok(())
}

impl Drop for Rekeys {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic has been printed
        }
    }
}
