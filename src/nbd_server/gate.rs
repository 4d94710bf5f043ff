//! What becomes of requests while their export is locked: they wait, or fail.
//!
//! ```text
//!  lock:    gate closes -> the export wipes its key -> a round begins -> every connection wipes its buffers
//!  unlock:  the export has its key again -> gate opens -> whoever waits tries again
//! ```
//!
//! Guards: a request looks at nothing here before its export says that it is locked, so an open gate costs nothing; a connection
//! that waits still sees that its client leaves and that the server stops.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::connection::{End, Session};
use super::export::ExportError;
use super::slow::Finished;
use super::socket::{self, Beside};

/// What requests meet while their export is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhileLocked {
    /// They wait until it is unlocked, as long as that takes.
    Wait,
    /// They fail with `ESHUTDOWN`.
    Fail,
}

const OPEN: u8 = 0;
const WAIT: u8 = 1;
const FAIL: u8 = 2;

/// The gate of one export.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: AtomicU8,
    rounds: AtomicU64,
}

impl Gate {
    pub(super) fn close(&self, meanwhile: WhileLocked) {
        let state = match meanwhile {
            WhileLocked::Wait => WAIT,
            WhileLocked::Fail => FAIL,
        };
        self.state.store(state, Ordering::SeqCst);
    }

    pub(super) fn open(&self) {
        self.state.store(OPEN, Ordering::SeqCst);
    }

    /// The export is locked: what connections have of it goes.
    pub(super) fn begin_round(&self) {
        self.rounds.fetch_add(1, Ordering::SeqCst);
    }

    /// How often that was so.
    pub(super) fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Whether requests wait.
    pub(super) fn waits(&self) -> bool {
        self.state.load(Ordering::SeqCst) == WAIT
    }
}

impl Session<'_> {
    /// Wipes what is left of requests that were answered, once for each time that the export is locked.
    #[inline]
    pub(super) fn tidy(&mut self) {
        let rounds = self.machine.negotiated().served.gate.rounds();
        if self.tidy_rounds != rounds {
            self.wipe(rounds);
        }
    }

    #[cold]
    fn wipe(&mut self, rounds: u64) {
        self.tidy_rounds = rounds;
        self.link.wipe_spent();
        crate::secret::scrub_stack();
        self.link.shared.note_wiped(self.link.client, rounds);
    }

    /// The export has said that it is locked: waits until it is not, as long as requests are to wait. `false` if the request
    /// is to fail. What is in the reply buffer is sent before.
    pub(super) fn wait_at_gate(&mut self) -> Result<bool, End> {
        loop {
            self.link.send_replies()?;
            self.tidy();
            let served = &self.machine.negotiated().served;
            if !served.export.is_locked() {
                return Ok(true);
            }
            if !served.gate.waits() || self.link.refuses() {
                return Ok(false);
            }
            if self.link.hangs_up() {
                return Err(End::Stopped);
            }
            self.link.turn.rest();
            let (client, stop) = (self.link.client, &self.link.shared.stop);
            if socket::wait_beside(&client.socket, &client.bell, stop, None)? == Beside::Left {
                return Err(End::Closed);
            }
            client.bell.silence();
        }
    }

    /// What has ended beside the connection and is not to be answered yet, because its export was locked meanwhile.
    pub(super) fn is_to_wait(&self, finished: &Finished) -> bool {
        matches!(finished.result, Err(ExportError::Locked)) && self.machine.negotiated().served.gate.waits()
    }

    /// Does again what was interrupted by a lock, once it is unlocked.
    pub(super) fn do_again(&mut self) -> Result<(), End> {
        while let Some(finished) = self.interrupted.pop() {
            if self.wait_at_gate()? {
                self.run_again(&finished)?;
            } else {
                self.answer_finished(finished)?;
            }
        }
        Ok(())
    }
}
