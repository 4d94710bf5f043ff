//! `daxcrypt status`: what a running server says on its control socket.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Deserialize;

use super::error::Error;
use super::live;
use super::output::{out, outln};
use super::size::ByteSize;
use crate::nbd_server::RekeyStatus;

/// How long the server may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest answer that is read, in bytes: some hundred thousand clients.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    /// Control socket of the server (its --control)
    #[arg(long, visible_alias = "socket", value_name = "SOCKET")]
    control: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Show it again every so many seconds [default: 2], with what happens in a second, until Ctrl-C; with --json one line each
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = interval)]
    watch: Option<Duration>,
}

/// Seconds between two looks.
fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=86_400.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "seconds from 0.1 to 86400, such as 2 or 0.5".into())
}

/// What the table shows of a server's answer.
#[derive(Debug, Deserialize)]
struct Status {
    uptime_seconds: u64,
    connections: u64,
    buffer_bytes: u64,
    exports: Vec<Export>,
    clients: Vec<Client>,
    #[serde(default)]
    rekeys: Vec<RekeyStatus>,
}

#[derive(Debug, Deserialize)]
struct Export {
    name: String,
    size_bytes: u64,
    read_only: bool,
    poisoned: bool,
    #[serde(default)]
    locked: bool,
    resident_plaintext_bytes: u64,
    stats: Stats,
}

#[derive(Debug, Deserialize)]
struct Client {
    id: u64,
    export: String,
    uid: Option<u32>,
    stats: Stats,
}

#[derive(Debug, Deserialize)]
struct Stats {
    requests: BTreeMap<String, u64>,
    read_bytes: u64,
    written_bytes: u64,
    errors: u64,
    #[serde(default)]
    failures: BTreeMap<String, u64>,
    latency_p50_ns: u64,
    latency_p99_ns: u64,
    latency_p999_ns: u64,
}

pub(crate) fn run(args: &StatusArgs) -> Result<(), Error> {
    if let Some(interval) = args.watch {
        return watch(&args.control, args.json, interval);
    }
    let failed = |source| Error::Control { path: args.control.clone(), source };
    let answer = ask(&args.control).map_err(failed)?;
    if args.json {
        return outln!("{}", answer.trim_end());
    }
    let status: Status = serde_json::from_str(&answer).map_err(|error| failed(error.into()))?;
    out!("{}", table(&status, None))
}

/// Shows the status again and again.
fn watch(control: &Path, json: bool, interval: Duration) -> Result<(), Error> {
    let control = control.to_path_buf();
    let mut before: Option<(Instant, Status)> = None;
    let mut answered = false;
    live::show(interval, !json, move || {
        let failed = |source| match answered {
            false => Error::Control { path: control.clone(), source },
            true => Error::ServerGone { path: control.clone(), source },
        };
        let asked = ask(&control).map_err(failed)?;
        let status: Status = serde_json::from_str(&asked).map_err(|error| failed(error.into()))?;
        answered = true;
        if json {
            return Ok(asked.trim_end().to_owned());
        }
        let now = Instant::now();
        let since = before.as_ref().map(|(then, status)| Since { elapsed: now.duration_since(*then), status });
        let text = format!("{}\n{}", control.display(), table(&status, Some(since.as_ref())));
        before = Some((now, status));
        Ok(text)
    })
}

/// What was so a while ago.
struct Since<'a> {
    elapsed: Duration,
    status: &'a Status,
}

impl Since<'_> {
    fn export(&self, name: &str) -> Option<(Duration, &Stats)> {
        let export = self.status.exports.iter().find(|export| export.name == name)?;
        Some((self.elapsed, &export.stats))
    }

    fn client(&self, id: u64) -> Option<(Duration, &Stats)> {
        let client = self.status.clients.iter().find(|client| client.id == id)?;
        Some((self.elapsed, &client.stats))
    }
}

/// How many a second; nothing where a counter has begun anew.
fn per_second(before: u64, now: u64, elapsed: Duration) -> Option<u64> {
    let nanoseconds = elapsed.as_nanos().max(1);
    let more = u128::from(now.checked_sub(before)?);
    u64::try_from((more * 1_000_000_000 + nanoseconds / 2) / nanoseconds).ok()
}

/// `client list`: the clients alone.
pub(crate) fn clients(control: &Path, json: bool) -> Result<(), Error> {
    let failed = |source| Error::Control { path: control.into(), source };
    let answer = ask(control).map_err(failed)?;
    if json {
        let status: serde_json::Value = serde_json::from_str(&answer).map_err(|error| failed(error.into()))?;
        return outln!("{}", status["clients"]);
    }
    let status: Status = serde_json::from_str(&answer).map_err(|error| failed(error.into()))?;
    let mut text = String::new();
    client_rows(&mut text, &status.clients, None);
    out!("{text}")
}

fn ask(path: &Path) -> io::Result<String> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Nothing comes: the server need not wait for a command.
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

/// The whole status; with `live` the traffic of a second instead of all of it, since then if that is known.
fn table(status: &Status, live: Option<Option<&Since<'_>>>) -> String {
    let mut text = format!(
        "up {}, {} connections, {} of buffers in use\n\n",
        uptime(status.uptime_seconds),
        status.connections,
        ByteSize(status.buffer_bytes)
    );
    let mut rows = vec![head(&["EXPORT", "SIZE", "ACCESS", "PLAINTEXT"], live.is_some())];
    for export in &status.exports {
        let access = match (export.poisoned, export.locked, export.read_only) {
            (true, ..) => "POISONED",
            (_, true, _) => "locked",
            (_, _, true) => "read-only",
            _ => "read-write",
        };
        let size = ByteSize(export.size_bytes).to_string();
        let plaintext = ByteSize(export.resident_plaintext_bytes).to_string();
        let first = [printable(&export.name), size, access.into(), plaintext];
        rows.push(row(first, &export.stats, live.map(|since| since.and_then(|since| since.export(&export.name)))));
    }
    align(&mut text, &rows);
    for export in &status.exports {
        let reasons = export.stats.failures.iter().filter(|(_, count)| **count > 0);
        let reasons: Vec<_> = reasons.map(|(reason, count)| format!("{count} {}", reason.replace('_', " "))).collect();
        if !reasons.is_empty() {
            let _ = writeln!(text, "\nerrors of {}: {}", printable(&export.name), reasons.join(", "));
        }
    }
    for rekey in &status.rekeys {
        let _ = writeln!(text, "\nre-key of {}: {}", printable(&rekey.path), rekey_text(rekey));
    }
    if !status.clients.is_empty() {
        text.push('\n');
        client_rows(&mut text, &status.clients, live);
    }
    text
}

fn client_rows(text: &mut String, clients: &[Client], live: Option<Option<&Since<'_>>>) {
    let mut rows = vec![head(&["CLIENT", "EXPORT", "UID"], live.is_some())];
    for client in clients {
        let uid = client.uid.map_or_else(|| "-".to_owned(), |uid| uid.to_string());
        let first = [client.id.to_string(), printable(&client.export), uid];
        rows.push(row(first, &client.stats, live.map(|since| since.and_then(|since| since.client(client.id)))));
    }
    align(text, &rows);
}

fn rekey_text(state: &RekeyStatus) -> String {
    let done = state.progress.map_or_else(String::new, |progress| {
        format!("{} of {} done", ByteSize(progress.done_bytes), ByteSize(progress.total_bytes))
    });
    match &state.failed {
        Some(reason) => format!("{done}; it FAILED: {}", printable(reason)),
        None if state.paused => format!("{done}; paused"),
        None if state.running => {
            let left = state.seconds_left.map_or_else(String::new, |seconds| format!(", {} left", uptime(seconds)));
            format!("{done}, {}/s{left}", ByteSize(state.bytes_per_second))
        }
        None => format!("{done}; it rests"),
    }
}

fn head(first: &[&str], live: bool) -> Vec<String> {
    let traffic = if live { ["READ/s", "WRITTEN/s", "REQUESTS/s"] } else { ["READ", "WRITTEN", "REQUESTS"] };
    first.iter().chain(&traffic).chain(&["ERRORS", "P50", "P99", "P99.9"]).map(|&title| title.to_owned()).collect()
}

fn row<const N: usize>(first: [String; N], stats: &Stats, live: Option<Option<(Duration, &Stats)>>) -> Vec<String> {
    let mut cells = Vec::from(first);
    let counted = |stats: &Stats| [stats.read_bytes, stats.written_bytes, stats.requests.values().sum()];
    let now = counted(stats);
    let told: [Option<u64>; 3] = match live {
        None => now.map(Some),
        Some(None) => [None; 3],
        Some(Some((elapsed, before))) => {
            let before = counted(before);
            std::array::from_fn(|index| per_second(before[index], now[index], elapsed))
        }
    };
    for (index, value) in told.into_iter().enumerate() {
        let bytes = index < 2;
        cells.push(match value {
            Some(value) if bytes => ByteSize(value).to_string(),
            Some(value) => value.to_string(),
            None => "-".into(),
        });
    }
    cells.push(stats.errors.to_string());
    cells.extend([stats.latency_p50_ns, stats.latency_p99_ns, stats.latency_p999_ns].map(latency));
    cells
}

/// Columns as wide as their widest cell, two spaces apart.
fn align(text: &mut String, rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

/// A name comes from a header or from whoever made it, and must not steer the terminal.
fn printable(name: &str) -> String {
    name.escape_debug().to_string()
}

fn uptime(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

fn latency(nanoseconds: u64) -> String {
    match nanoseconds {
        0 => "-".into(),
        1..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{}.{} us", nanoseconds / 1_000, nanoseconds / 100 % 10),
        1_000_000..1_000_000_000 => format!("{}.{} ms", nanoseconds / 1_000_000, nanoseconds / 100_000 % 10),
        _ => format!("{}.{} s", nanoseconds / 1_000_000_000, nanoseconds / 100_000_000 % 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_unit_that_fits() {
        for (nanoseconds, text) in
            [(0, "-"), (999, "999 ns"), (1_250, "1.2 us"), (3_400_000, "3.4 ms"), (12_900_000_000, "12.9 s")]
        {
            assert_eq!(latency(nanoseconds), text);
        }
        for (seconds, text) in [(59, "59 s"), (61, "1 min 1 s"), (7_260, "2 h 1 min"), (90_000, "1 d 1 h")] {
            assert_eq!(uptime(seconds), text);
        }
    }

    #[test]
    fn a_rate_is_the_difference_in_its_time() {
        assert_eq!(per_second(100, 300, Duration::from_secs(2)), Some(100));
        assert_eq!(per_second(0, 10, Duration::from_millis(500)), Some(20));
        assert_eq!(per_second(5, 4, Duration::from_secs(1)), None, "a server that has begun anew");
        assert_eq!((interval("2"), interval("0.5")), (Ok(Duration::from_secs(2)), Ok(Duration::from_millis(500))));
        for text in ["0", "-1", "NaN", "inf", "1e9", "", "2s"] {
            assert!(interval(text).is_err(), "{text}");
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut text = String::new();
        align(&mut text, &[vec!["A".into(), "B".into()], vec!["long".into(), "x".into()]]);
        assert_eq!(text, "A     B\nlong  x\n");
        assert_eq!(printable("a\u{1b}[31mb"), "a\\u{1b}[31mb");
    }
}
