//! What the log says of requests that failed: one line each, up to so many in a while.
//!
//! Guards: a client cannot fill the log; the cause is told whole, down to the operating system's words, and neither keys nor
//! contents are part of it.

use std::error::Error;
use std::time::{Duration, Instant};

use super::export::ExportError;
use super::shared::Client;
use super::stats::COMMAND_NAMES;
use super::wire::RequestHeader;

/// Lines that one connection may cause in [`WINDOW`].
const LINES_MAX: u32 = 10;
/// See [`LINES_MAX`].
const WINDOW: Duration = Duration::from_secs(10);

/// The lines that one connection has caused lately.
#[derive(Debug, Default)]
pub(super) struct Failures {
    window: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Failures {
    /// Logs a request of `client` that its export could not do.
    pub(super) fn log(&mut self, client: &Client, export: &str, header: &RequestHeader, error: &ExportError) {
        if !self.may_log(Instant::now()) {
            return;
        }
        let left_out = std::mem::take(&mut self.left_out);
        tracing::warn!(
            client = client.id,
            peer = %client.peer,
            export,
            command = command_name(header.command),
            offset = header.offset,
            len_bytes = header.len_bytes,
            left_out,
            "request failed: {}",
            chain(error)
        );
    }

    /// Whether another line may come now; otherwise it is counted.
    fn may_log(&mut self, now: Instant) -> bool {
        if self.window.is_none_or(|since| now.duration_since(since) >= WINDOW) {
            (self.window, self.lines) = (Some(now), 0);
        }
        let may = self.lines < LINES_MAX;
        self.lines += u32::from(may);
        self.left_out += u64::from(!may);
        may
    }
}

/// The name of a command.
pub(super) fn command_name(command: u16) -> &'static str {
    COMMAND_NAMES[usize::from(command).min(COMMAND_NAMES.len() - 1)]
}

/// An error and what caused it, in one line.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_causes_so_many_lines_in_a_while() {
        let (mut failures, start) = (Failures::default(), Instant::now());
        let lines = (0..1000).filter(|_| failures.may_log(start)).count();
        assert_eq!((lines, failures.left_out), (10, 990));
        assert!(!failures.may_log(start + WINDOW / 2));
        assert!(failures.may_log(start + WINDOW));
    }

    #[test]
    fn a_cause_is_told_whole() {
        let error = ExportError::Io(std::io::Error::other("the device is on fire"));
        assert_eq!(chain(&error), "input/output error: the device is on fire");
        assert_eq!(command_name(3), "flush");
        assert_eq!(command_name(999), "unknown");
    }
}
