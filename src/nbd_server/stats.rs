//! Counters of what clients do, and their snapshot.
//!
//! Guards: a connection's thread is the only writer of its [`Traffic`], so counting costs no contended memory; what a
//! client did stays in its export's totals after it left. Numbers of one snapshot are each exact, but not of one
//! instant. No key, no content and no error text is recorded.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};

use super::export::ExportError;
use super::wire::{NBD_CMD_READ, NBD_CMD_WRITE, RequestHeader};
use crate::pmem::MediaError;
use crate::volume::{TransformProgress, VolumeError};

/// Commands that are counted apart, by their number; the last place counts unknown ones.
pub const COMMAND_NAMES: [&str; 9] =
    ["read", "write", "disconnect", "flush", "trim", "cache", "write_zeroes", "block_status", "unknown"];
/// Why requests were answered with an error: what is counted apart.
pub const FAILURE_NAMES: [&str; 9] =
    ["media", "flush", "no_space", "past_end", "read_only", "unsupported", "unavailable", "other", "invalid"];
/// Requests that no export saw, because they break the protocol's rules.
pub(super) const INVALID: usize = FAILURE_NAMES.len() - 1;

/// The place of an export's error in [`FAILURE_NAMES`].
pub(super) const fn failure(error: &ExportError) -> usize {
    match error {
        ExportError::Volume(VolumeError::Media(MediaError::Flush(_) | MediaError::Poisoned)) => 1,
        ExportError::Media | ExportError::Volume(VolumeError::Media(_)) => 0,
        ExportError::NoSpace => 2,
        ExportError::PastEnd => 3,
        ExportError::ReadOnly => 4,
        ExportError::Unsupported => 5,
        ExportError::Locked | ExportError::ShuttingDown => 6,
        ExportError::Volume(_) | ExportError::Io(_) => 7,
    }
}

/// Latency buckets: four for each power of two of nanoseconds.
const BUCKETS: usize = 4 * 40;
/// Ends of the buckets of latency that metrics show, in nanoseconds: powers of 4 from 1 microsecond to 17 seconds. Each is
/// the end of one of those that are counted.
pub(super) const LATENCY_BOUNDS: [u64; 13] = {
    let mut bounds = [0; 13];
    let mut index = 0;
    while index < bounds.len() {
        bounds[index] = 1 << (10 + 2 * index);
        index += 1;
    }
    bounds
};

/// What happened on one connection, or in total on one export.
#[derive(Debug)]
pub(super) struct Traffic {
    requests: [AtomicU64; COMMAND_NAMES.len()],
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
    failures: [AtomicU64; FAILURE_NAMES.len()],
    latency: [AtomicU64; BUCKETS],
    latency_sum_ns: AtomicU64,
}

impl Default for Traffic {
    fn default() -> Self {
        let zero = |_| AtomicU64::new(0);
        Self {
            requests: std::array::from_fn(zero),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            failures: std::array::from_fn(zero),
            latency: std::array::from_fn(zero),
            latency_sum_ns: AtomicU64::new(0),
        }
    }
}

impl Traffic {
    /// Counts an answered request. Only the connection's own thread may call this.
    pub(super) fn record(&self, header: &RequestHeader, took: Duration, failed: bool) {
        let command = usize::from(header.command).min(COMMAND_NAMES.len() - 1);
        add(&self.requests[command], 1);
        add(&self.latency[bucket(took)], 1);
        add(&self.latency_sum_ns, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        match header.command {
            _ if failed => add(&self.errors, 1),
            NBD_CMD_READ => add(&self.read_bytes, header.len_bytes),
            NBD_CMD_WRITE => add(&self.written_bytes, header.len_bytes),
            _ => {}
        }
    }

    /// Counts why a request failed. Only the connection's own thread may call this.
    pub(super) fn record_failure(&self, failure: usize) {
        add(&self.failures[failure], 1);
    }

    /// Adds what a client that has left counted. The caller keeps other writers away.
    pub(super) fn merge(&self, other: &Self) {
        let scalars = [
            (&self.read_bytes, &other.read_bytes),
            (&self.written_bytes, &other.written_bytes),
            (&self.errors, &other.errors),
            (&self.latency_sum_ns, &other.latency_sum_ns),
        ];
        let arrays = self.requests.iter().zip(&other.requests).chain(self.latency.iter().zip(&other.latency));
        let arrays = arrays.chain(self.failures.iter().zip(&other.failures));
        arrays.chain(scalars).for_each(|(sum, counter)| add(sum, counter.load(Ordering::Relaxed)));
    }
}

/// Adds without a locked instruction: there is one writer.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

fn bucket(took: Duration) -> usize {
    let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(4);
    let power = nanoseconds.ilog2();
    let quarter = (nanoseconds >> (power - 2)) & 3;
    let index = u64::from(power - 2) * 4 + quarter;
    usize::try_from(index).map_or(BUCKETS - 1, |index| index.min(BUCKETS - 1))
}

/// The upper end of a bucket, in nanoseconds.
fn bucket_end(index: usize) -> u64 {
    let (power, quarter) = (index / 4, index % 4);
    (5 + quarter as u64) << power
}

/// A sum of traffic, for reading.
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// Requests by command, in the order of [`COMMAND_NAMES`], which are the keys of an object in JSON.
    #[serde(serialize_with = "by_command")]
    pub requests: [u64; COMMAND_NAMES.len()],
    /// Bytes that reads returned.
    pub read_bytes: u64,
    /// Bytes that writes brought.
    pub written_bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// The same by their reason, in the order of [`FAILURE_NAMES`], which are the keys of an object in JSON. A connection that
    /// broke in the middle of a request has no reason here.
    #[serde(serialize_with = "by_failure")]
    pub failures: [u64; FAILURE_NAMES.len()],
    /// Median time from a request's header to its reply being ready to send, in nanoseconds, at most a quarter too high.
    pub latency_p50_ns: u64,
    /// The same for 99 of 100 requests.
    pub latency_p99_ns: u64,
    /// The same for 999 of 1000 requests.
    pub latency_p999_ns: u64,
    #[serde(skip)]
    latency: [u64; BUCKETS],
    #[serde(skip)]
    pub(super) latency_sum_ns: u64,
}

fn by_command<S: Serializer>(requests: &[u64; COMMAND_NAMES.len()], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(COMMAND_NAMES.iter().zip(requests))
}

fn by_failure<S: Serializer>(failures: &[u64; FAILURE_NAMES.len()], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(FAILURE_NAMES.iter().zip(failures))
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            requests: [0; COMMAND_NAMES.len()],
            read_bytes: 0,
            written_bytes: 0,
            errors: 0,
            failures: [0; FAILURE_NAMES.len()],
            latency_p50_ns: 0,
            latency_p99_ns: 0,
            latency_p999_ns: 0,
            latency: [0; BUCKETS],
            latency_sum_ns: 0,
        }
    }
}

impl Stats {
    /// Adds what `traffic` has counted so far.
    pub(super) fn add(&mut self, traffic: &Traffic) {
        let pairs = self.requests.iter_mut().zip(&traffic.requests);
        let pairs = pairs.chain(self.failures.iter_mut().zip(&traffic.failures));
        for (sum, counter) in pairs.chain(self.latency.iter_mut().zip(&traffic.latency)) {
            *sum += counter.load(Ordering::Relaxed);
        }
        self.read_bytes += traffic.read_bytes.load(Ordering::Relaxed);
        self.written_bytes += traffic.written_bytes.load(Ordering::Relaxed);
        self.errors += traffic.errors.load(Ordering::Relaxed);
        self.latency_sum_ns += traffic.latency_sum_ns.load(Ordering::Relaxed);
        self.latency_p50_ns = self.percentile(500);
        self.latency_p99_ns = self.percentile(990);
        self.latency_p999_ns = self.percentile(999);
    }

    /// Requests by latency: up to each of [`LATENCY_BOUNDS`], and more than the last.
    pub(super) fn latency_counts(&self) -> [u64; LATENCY_BOUNDS.len() + 1] {
        let mut counts = [0; LATENCY_BOUNDS.len() + 1];
        for (index, count) in self.latency.iter().enumerate() {
            counts[LATENCY_BOUNDS.partition_point(|bound| *bound < bucket_end(index))] += count;
        }
        counts
    }

    /// The latency that `per_mille` of the requests do not exceed, in nanoseconds; 0 without requests.
    fn percentile(&self, per_mille: u64) -> u64 {
        let wanted = (self.latency.iter().sum::<u64>() * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (index, count) in self.latency.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return bucket_end(index);
            }
        }
        0
    }
}

/// A snapshot of a running server.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Seconds since the server was made.
    pub uptime_seconds: u64,
    /// Open connections, those without an export included.
    pub connections: usize,
    /// Bytes of pooled buffers in use.
    pub buffer_bytes: usize,
    /// Every export, in the order of the registry.
    pub exports: Vec<ExportStatus>,
    /// Every client that has chosen an export.
    pub clients: Vec<ClientStatus>,
    /// The re-keys, slides and adoptions that are under way beside the clients, or could not go on.
    pub rekeys: Vec<RekeyStatus>,
}

/// How the re-key of an export stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RekeyStatus {
    /// Name of the export.
    pub export: String,
    /// Where it lies.
    pub path: String,
    /// How far it has come; nothing when none is under way.
    pub progress: Option<TransformProgress>,
    /// How fast it goes, over the last seconds.
    pub bytes_per_second: u64,
    /// How long it takes at this speed; nothing while it rests.
    pub seconds_left: Option<u64>,
    /// Whether it rests until it is resumed.
    pub paused: bool,
    /// Whether the server is at it.
    pub running: bool,
    /// Why the server could not go on.
    pub failed: Option<String>,
}

/// One export of a [`Status`].
#[derive(Debug, Clone, Serialize)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether a flush has failed, so that nothing is known to become durable any more.
    pub poisoned: bool,
    /// Whether it is locked: its key is not there, and requests wait or fail.
    pub locked: bool,
    /// Plaintext that is resident besides request buffers, in bytes.
    pub resident_plaintext_bytes: u64,
    /// Everything since the start.
    pub stats: Stats,
}

/// One client of a [`Status`].
#[derive(Debug, Clone, Serialize)]
pub struct ClientStatus {
    /// Number of the connection, from 1.
    pub id: u64,
    /// Name of its export.
    pub export: String,
    /// User at the other end of a Unix socket.
    pub uid: Option<u32>,
    /// Who it is: user and process, address or machine, and the names in its certificate.
    pub peer: String,
    /// Whether the export is read-only for it.
    pub read_only: bool,
    /// Everything since it connected.
    pub stats: Stats,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_at_most_a_quarter_wide() {
        for nanoseconds in [4u64, 5, 7, 8, 100, 1000, 12_345, 1 << 30, (1 << 30) + 12_345_678] {
            let end = bucket_end(bucket(Duration::from_nanos(nanoseconds)));
            assert!(end > nanoseconds && end <= nanoseconds + nanoseconds / 4 + 1, "{nanoseconds} in {end}");
        }
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
        assert_eq!(bucket(Duration::ZERO), 0);
    }

    #[test]
    fn every_reason_is_counted_apart_and_stays_after_the_client() {
        let flush = || std::io::Error::other("x");
        let errors = [
            ExportError::Volume(VolumeError::Media(MediaError::Shrunk { now_bytes: 1, len_bytes: 2 })),
            ExportError::Volume(VolumeError::Media(MediaError::Flush(flush()))),
            ExportError::NoSpace,
            ExportError::PastEnd,
            ExportError::ReadOnly,
            ExportError::Unsupported,
            ExportError::Locked,
            ExportError::Io(flush()),
        ];
        let (client, left) = (Traffic::default(), Traffic::default());
        for (place, error) in errors.iter().enumerate() {
            assert_eq!(failure(error), place, "{error:?} is {}", FAILURE_NAMES[place]);
            (0..=place).for_each(|_| client.record_failure(failure(error)));
        }
        client.record_failure(INVALID);
        left.merge(&client);
        let mut stats = Stats::default();
        stats.add(&left);
        stats.add(&client);
        assert_eq!(stats.failures, [2, 4, 6, 8, 10, 12, 14, 16, 2]);
        let poisoned = ExportError::Volume(VolumeError::Media(MediaError::Poisoned));
        assert_eq!(FAILURE_NAMES[failure(&poisoned)], "flush");
    }

    #[test]
    fn percentiles_find_the_slow_requests() {
        let traffic = Traffic::default();
        let header = RequestHeader { flags: 0, command: NBD_CMD_READ, cookie: 0, offset: 0, len_bytes: 10 };
        (0..985).for_each(|_| traffic.record(&header, Duration::from_nanos(1000), false));
        (0..15).for_each(|_| traffic.record(&header, Duration::from_micros(1000), true));
        let mut stats = Stats::default();
        stats.add(&traffic);
        assert_eq!((stats.requests[0], stats.read_bytes, stats.errors), (1000, 9850, 15));
        assert!((1000..1300).contains(&stats.latency_p50_ns), "{stats:?}");
        assert!((1_000_000..1_300_000).contains(&stats.latency_p99_ns));
    }
}
