//! How far a long command is: a bar on a terminal, lines of JSON for programs, nothing otherwise.
//!
//! The bar goes to standard error and is drawn over itself; the JSON goes to standard output, one object a line. Both come
//! a few times a second, and once at the end.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::output::{ask, outln};
use super::size::ByteSize;

const INTERVAL: Duration = Duration::from_millis(200);
const BAR_CHARACTERS: u64 = 30;

/// The option of every command that may take long.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct ProgressArgs {
    /// Print progress as lines of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Bar,
    Json,
    Silent,
}

/// The progress of one piece of work over a number of bytes.
#[derive(Debug)]
pub(crate) struct Progress {
    doing: &'static str,
    total_bytes: u64,
    done_bytes: u64,
    started: Instant,
    shown: Option<Instant>,
    style: Style,
}

/// A line of `--json`.
#[derive(Debug, PartialEq, Serialize)]
struct Line {
    doing: &'static str,
    done_bytes: u64,
    total_bytes: u64,
    bytes_per_second: u64,
    /// Not known before the first bytes are done.
    seconds_left: Option<u64>,
}

impl Progress {
    pub(crate) fn new(doing: &'static str, total_bytes: u64, args: ProgressArgs) -> Self {
        let style = match args.json {
            true => Style::Json,
            false if io::stderr().is_terminal() => Style::Bar,
            false => Style::Silent,
        };
        Self { doing, total_bytes, done_bytes: 0, started: Instant::now(), shown: None, style }
    }

    /// Takes note of how many bytes are done by now, and shows it when it is time.
    pub(crate) fn report(&mut self, done_bytes: u64) {
        self.done_bytes = done_bytes;
        if self.shown.is_none_or(|shown| shown.elapsed() >= INTERVAL) {
            self.show();
        }
    }

    /// Shows the end.
    pub(crate) fn finish(mut self) {
        self.done_bytes = self.total_bytes;
        self.show();
        if self.style == Style::Bar {
            ask(format_args!("\n"));
        }
    }

    fn show(&mut self) {
        self.shown = Some(Instant::now());
        let line = line(self.doing, self.done_bytes, self.total_bytes, self.started.elapsed());
        match self.style {
            Style::Silent => {}
            Style::Bar => ask(format_args!("\r{}\u{1b}[K", bar(&line))),
            Style::Json => {
                let text = serde_json::to_string(&line).unwrap_or_default();
                let _ = outln!("{text}"); // work goes on without a reader
            }
        }
    }
}

fn line(doing: &'static str, done_bytes: u64, total_bytes: u64, elapsed: Duration) -> Line {
    let milliseconds = elapsed.as_millis().max(1);
    let per_second = u128::from(done_bytes) * 1000 / milliseconds;
    let left = u128::from(total_bytes.saturating_sub(done_bytes));
    let seconds_left = (left == 0 || per_second > 0).then(|| left.checked_div(per_second).unwrap_or(0));
    let narrow = |number: u128| u64::try_from(number).unwrap_or(u64::MAX);
    let (bytes_per_second, seconds_left) = (narrow(per_second), seconds_left.map(narrow));
    Line { doing, done_bytes, total_bytes, bytes_per_second, seconds_left }
}

fn bar(line: &Line) -> String {
    let parts = |of: u64| {
        let part = u128::from(line.done_bytes) * u128::from(of) / u128::from(line.total_bytes.max(1));
        usize::try_from(part).unwrap_or(0)
    };
    let width = usize::try_from(BAR_CHARACTERS).unwrap_or(0);
    let (full, percent) = ("#".repeat(parts(BAR_CHARACTERS)), parts(100));
    let left = line.seconds_left.map_or_else(String::new, |seconds| format!(", {} left", time(seconds)));
    format!(
        "{} [{full:<width$}] {percent} %  {} of {}, {}/s{left}",
        line.doing,
        ByteSize(line.done_bytes),
        ByteSize(line.total_bytes),
        ByteSize(line.bytes_per_second)
    )
}

fn time(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_shows_share_rate_and_rest() {
        let half = line("wiping", 1 << 30, 2 << 30, Duration::from_secs(2));
        assert_eq!((half.bytes_per_second, half.seconds_left), (1 << 29, Some(2)));
        let text = bar(&half);
        assert!(text.contains("[###############               ] 50 %"), "{text}");
        assert!(text.ends_with("1 GiB of 2 GiB, 512 MiB/s, 2 s left"), "{text}");
    }

    #[test]
    fn the_edges_divide_by_nothing() {
        assert_eq!(line("wiping", 0, 100, Duration::ZERO).seconds_left, None);
        assert_eq!(line("wiping", 0, 0, Duration::ZERO).seconds_left, Some(0));
        assert_eq!(line("wiping", u64::MAX, u64::MAX, Duration::from_nanos(1)).seconds_left, Some(0));
        assert!(bar(&line("wiping", 0, 0, Duration::ZERO)).contains(" 0 %"));
        assert_eq!(time(3_661), "1 h 1 min");
    }
}
