//! How far a long command has come: a bar on a terminal, JSON lines for programs.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::output::outln;
use super::size::ByteSize;
use crate::ops::{Ended, Watch};

/// The bar is drawn again, and a JSON line printed, at most so often.
const INTERVAL: Duration = Duration::from_millis(200);
const BAR_CELLS: u64 = 24;

/// The option of commands that may take long.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct ProgressArgs {
    /// Print progress as lines of JSON
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

/// The progress of one command, which may have several parts.
#[derive(Debug)]
pub(crate) struct Progress {
    style: Style,
    total_bytes: u64,
    /// Bytes that were done before this part began.
    first_bytes: u64,
    started: Instant,
    shown: Option<Instant>,
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
    /// As lines of JSON, or as a bar where there is a terminal.
    pub(crate) fn new(json: bool) -> Self {
        let style = match (json, io::stderr().is_terminal()) {
            (true, _) => Style::JsonLines,
            (false, true) => Style::Bar,
            (false, false) => Style::Quiet,
        };
        Self { style, total_bytes: 0, first_bytes: 0, started: Instant::now(), shown: None }
    }

    /// The last word about a part: `event` is what became of it.
    pub(crate) fn end_as(&mut self, event: &'static str, done_bytes: u64) {
        self.tell(event, done_bytes);
        if self.style == Style::Bar {
            let _ = writeln!(io::stderr());
        }
    }

    /// Bytes a second since the beginning.
    fn rate(&self, done_bytes: u64) -> u64 {
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
                let _ = serde_json::to_string(&line).map(|line| outln!("{line}"));
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

impl Watch for Progress {
    fn begin(&mut self, done_bytes: u64, total_bytes: u64) {
        (self.first_bytes, self.total_bytes) = (done_bytes, total_bytes);
        (self.started, self.shown) = (Instant::now(), None);
    }

    fn reach(&mut self, done_bytes: u64) {
        if self.shown.is_none_or(|shown| shown.elapsed() >= INTERVAL) {
            self.shown = Some(Instant::now());
            self.tell("progress", done_bytes);
        }
    }

    fn end(&mut self, ended: Ended, done_bytes: u64) {
        let event = match ended {
            Ended::Copied => "copied",
            Ended::Verified => "verified",
            Ended::Done => "done",
            Ended::Stopped => "stopped",
        };
        self.end_as(event, done_bytes);
    }
}
