//! How far a long command has come: a bar on a terminal, JSON lines for programs; and the pace that it keeps to.

use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::output::ask;
use super::size::ByteSize;

/// The bar is drawn again, and a JSON line printed, at most so often.
const INTERVAL: Duration = Duration::from_millis(200);
const BAR_CELLS: u64 = 24;

/// The option of a command that may take long.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct ProgressArgs {
    /// Progress as JSON, one object a line
    #[arg(long)]
    pub(crate) json: bool,
}

/// How progress is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// One line on standard error, drawn again and again.
    Bar,
    /// One object a line on standard output.
    JsonLines,
    /// Only the end.
    Quiet,
}

/// The progress of one command.
#[derive(Debug)]
pub(crate) struct Progress {
    style: Style,
    total_bytes: u64,
    /// Bytes that were done before this command began.
    first_bytes: u64,
    started: Instant,
    shown: Option<Instant>,
    max_rate: Option<u64>,
}

#[derive(Serialize)]
struct Line {
    event: &'static str,
    done_bytes: u64,
    total_bytes: u64,
    bytes_per_second: u64,
    seconds_left: Option<u64>,
}

impl Progress {
    /// Progress from `first_bytes` to `total_bytes`, no faster than `max_rate` bytes a second.
    pub(crate) fn new(first_bytes: u64, total_bytes: u64, json: bool, max_rate: Option<ByteSize>) -> Self {
        let style = match (json, io::stderr().is_terminal()) {
            (true, _) => Style::JsonLines,
            (false, true) => Style::Bar,
            (false, false) => Style::Quiet,
        };
        let max_rate = max_rate.map(|rate| rate.0.max(1));
        Self { style, total_bytes, first_bytes, started: Instant::now(), shown: None, max_rate }
    }

    /// The same without a word: only the pace.
    pub(crate) const fn quiet(mut self) -> Self {
        self.style = Style::Quiet;
        self
    }

    /// Takes note of `done_bytes` and waits as long as the rate demands, but not longer than a moment: the caller looks
    /// for signals in between.
    pub(crate) fn reach(&mut self, done_bytes: u64) {
        if self.shown.is_none_or(|shown| shown.elapsed() >= INTERVAL) {
            self.shown = Some(Instant::now());
            self.tell("progress", done_bytes);
        }
        if let Some(ahead) = self.ahead(done_bytes) {
            thread::sleep(ahead.min(INTERVAL));
        }
    }

    /// Whether the rate demands to wait still.
    pub(crate) fn must_wait(&self, done_bytes: u64) -> bool {
        self.ahead(done_bytes).is_some()
    }

    /// How much earlier than the rate allows `done_bytes` were reached.
    fn ahead(&self, done_bytes: u64) -> Option<Duration> {
        let moved = done_bytes.saturating_sub(self.first_bytes);
        let due = Duration::from_secs_f64(moved as f64 / self.max_rate? as f64);
        due.checked_sub(self.started.elapsed()).filter(|ahead| !ahead.is_zero())
    }

    /// The last word: `event` is `done` or `stopped`.
    pub(crate) fn end(&mut self, event: &'static str, done_bytes: u64) {
        self.tell(event, done_bytes);
        if self.style == Style::Bar {
            ask(format_args!("\n"));
        }
    }

    /// Bytes a second since the beginning.
    pub(crate) fn rate(&self, done_bytes: u64) -> u64 {
        let moved = done_bytes.saturating_sub(self.first_bytes);
        let nanoseconds = self.started.elapsed().as_nanos().max(1);
        u64::try_from(u128::from(moved) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
    }

    fn tell(&self, event: &'static str, done_bytes: u64) {
        let rate = self.rate(done_bytes);
        let left_bytes = self.total_bytes.saturating_sub(done_bytes);
        let seconds_left = (rate > 0).then(|| left_bytes.div_ceil(rate.max(1)));
        match self.style {
            Style::Quiet => {}
            Style::JsonLines => {
                let total_bytes = self.total_bytes;
                let line = Line { event, done_bytes, total_bytes, bytes_per_second: rate, seconds_left };
                // A reader that went away is no reason to stop.
                let _ = serde_json::to_string(&line).map(|line| writeln!(io::stdout(), "{line}"));
            }
            Style::Bar => {
                let cells = (done_bytes * BAR_CELLS).checked_div(self.total_bytes).unwrap_or(BAR_CELLS);
                let left = seconds_left.map_or_else(String::new, |seconds| format!(", {seconds} s left"));
                let _ = write!(
                    io::stderr(),
                    "\r[{:.<width$}] {} of {}, {}/s{left}      ",
                    "#".repeat(usize::try_from(cells.min(BAR_CELLS)).unwrap_or(0)),
                    ByteSize(done_bytes),
                    ByteSize(self.total_bytes),
                    ByteSize(rate),
                    width = usize::try_from(BAR_CELLS).unwrap_or(0),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_and_what_was_done_before_does_not_count() {
        let mut progress = Progress::new(1 << 20, 2 << 20, false, Some(ByteSize(1 << 20)));
        progress.reach(1 << 20);
        assert!(!progress.must_wait(1 << 20));
        assert!(progress.must_wait(2 << 20), "a MiB a second, and no second has passed");
        assert!(!Progress::new(0, 2 << 20, false, None).must_wait(2 << 20));
    }
}
