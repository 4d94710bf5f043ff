//! How long work goes: in pieces, with a stop flag that is looked at between two of them, a limit of its rate, and somebody
//! who watches.
//!
//! The limit is a token bucket. It holds at most what a fifth of a second is worth, so after a pause nothing is caught up:
//! the rate is a limit in every second, and not an average since the beginning.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::error::Cause;
use crate::namespace::TransformError;
use crate::volume::{Volume, VolumeError, WINDOW_BYTES};

/// How much time's worth of bytes the bucket holds.
const BURST: Duration = Duration::from_millis(200);
/// The longest sleep before the stop flag is looked at again.
const NAP: Duration = Duration::from_millis(100);

/// Bytes at a time: enough that the calls do not show, and few enough that a piece stays in a core's cache in all four
/// shapes that it has on its way (plaintext, ciphertext, the page cache's copy of it, and what is read back).
const PIECE_BYTES: usize = 128 << 10;

/// Bytes a second at most, whatever happened before.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    rate: u64,
    /// Bytes that may go now; what went too early is missing.
    tokens: f64,
    filled: Instant,
}

impl TokenBucket {
    /// A full one, at `now`. A rate of 0 counts as 1.
    #[must_use]
    pub fn new(bytes_per_second: u64, now: Instant) -> Self {
        let rate = bytes_per_second.max(1);
        Self { rate, tokens: Self::room(rate), filled: now }
    }

    /// Takes note that `bytes` went.
    pub fn take(&mut self, bytes: u64, now: Instant) {
        self.fill(now);
        self.tokens -= bytes as f64;
    }

    /// How long the next bytes must wait.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.fill(now);
        let missing = -self.tokens / self.rate as f64;
        // A rate of a byte a second and much that went at once make a number that no clock has.
        (missing > 0.0).then(|| Duration::try_from_secs_f64(missing).unwrap_or(Duration::MAX))
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate as f64).min(Self::room(self.rate));
        self.filled = now;
    }

    fn room(rate: u64) -> f64 {
        rate as f64 * BURST.as_secs_f64()
    }
}

/// How a part of long work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All is copied.
    Copied,
    /// All is compared.
    Verified,
    /// All is done.
    Done,
    /// The stop flag was set.
    Stopped,
}

/// Who watches long work. Each part begins and ends, unless it fails.
pub trait Watch {
    /// A part begins, with `done_bytes` of `total_bytes` done before.
    fn begin(&mut self, done_bytes: u64, total_bytes: u64);
    /// It has come so far.
    fn reach(&mut self, done_bytes: u64);
    /// It ended.
    fn end(&mut self, ended: Ended, done_bytes: u64);
}

/// Nobody watches.
#[derive(Clone, Copy, Debug)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn begin(&mut self, _done_bytes: u64, _total_bytes: u64) {}
    fn reach(&mut self, _done_bytes: u64) {}
    fn end(&mut self, _ended: Ended, _done_bytes: u64) {}
}

/// What was done.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    /// Bytes.
    pub bytes: u64,
    /// CRC-32 of all of them, where they passed by.
    pub checksum: u32,
    /// How fast it went.
    pub bytes_per_second: u64,
}

/// One run of long work, which may have several parts.
pub struct Run<'a> {
    watch: &'a mut dyn Watch,
    stop: &'a AtomicBool,
    limit: Option<TokenBucket>,
}

impl std::fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("stop", &self.stop).field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// A part of it.
struct Part {
    first_bytes: u64,
    total_bytes: u64,
    started: Instant,
}

impl Part {
    fn moved(&self, done_bytes: u64, checksum: u32) -> Moved {
        let bytes = done_bytes.saturating_sub(self.first_bytes);
        let nanoseconds = self.started.elapsed().as_nanos().max(1);
        let rate = u128::from(bytes) * 1_000_000_000 / nanoseconds;
        Moved { bytes: done_bytes, checksum, bytes_per_second: u64::try_from(rate).unwrap_or(u64::MAX) }
    }
}

impl<'a> Run<'a> {
    /// Work that `watch` sees, that ends between two pieces when `stop` is set, and that does no more than `max_rate` bytes
    /// in a second.
    pub fn new(watch: &'a mut dyn Watch, stop: &'a AtomicBool, max_rate: Option<u64>) -> Self {
        let limit = max_rate.map(|rate| TokenBucket::new(rate, Instant::now()));
        Self { watch, stop, limit }
    }

    fn begin(&mut self, first_bytes: u64, total_bytes: u64) -> Part {
        self.watch.begin(first_bytes, total_bytes);
        Part { first_bytes, total_bytes, started: Instant::now() }
    }

    /// Waits until the next piece may go.
    fn pace(&mut self, part: &Part, done_bytes: u64) -> Result<(), Cause> {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                self.watch.end(Ended::Stopped, done_bytes);
                return Err(Cause::Stopped { done_bytes, total_bytes: part.total_bytes });
            }
            let Some(wait) = self.limit.as_mut().and_then(|limit| limit.wait(Instant::now())) else { return Ok(()) };
            thread::sleep(wait.min(NAP));
            self.watch.reach(done_bytes);
        }
    }

    fn reach(&mut self, done_bytes: u64, bytes: u64) {
        if let Some(limit) = &mut self.limit {
            limit.take(bytes, Instant::now());
        }
        self.watch.reach(done_bytes);
    }

    /// Brings the data of `volume` to where its transform says, to the end; the rate is that of this run.
    ///
    /// # Errors
    ///
    /// [`Cause::Stopped`], [`Cause::Transform`].
    pub fn end_transform(&mut self, volume: &Volume) -> Result<Moved, Cause> {
        let Some(first) = volume.transform() else {
            return Ok(Moved { bytes: 0, checksum: 0, bytes_per_second: 0 });
        };
        let part = self.begin(first.done_bytes, first.total_bytes);
        let mut done_bytes = first.done_bytes;
        loop {
            self.pace(&part, done_bytes)?;
            match volume.transform_step(WINDOW_BYTES).map_err(|error: TransformError| Cause::from(error))? {
                Some(reached) => {
                    let bytes = reached.done_bytes.saturating_sub(done_bytes);
                    done_bytes = reached.done_bytes;
                    self.reach(done_bytes, bytes);
                }
                None => {
                    self.watch.end(Ended::Done, first.total_bytes);
                    return Ok(part.moved(first.total_bytes, 0));
                }
            }
        }
    }

    /// Runs `step` on pieces of `0..total_bytes`, each with a buffer of its length. `step` may return fewer bytes than it
    /// was offered, of which 0 ends the part; what it left in that part of the buffer goes into the checksum.
    ///
    /// # Errors
    ///
    /// [`Cause::Stopped`], and what `step` says.
    pub fn pieces<E: From<Cause>>(
        &mut self,
        ended: Ended,
        total_bytes: u64,
        mut step: impl FnMut(u64, &mut [u8]) -> Result<usize, E>,
    ) -> Result<Moved, E> {
        let mut buffer = Zeroizing::new(vec![0; PIECE_BYTES]);
        let mut checksum = crc32fast::Hasher::new();
        let moved = self.chunks::<E>(ended, total_bytes, PIECE_BYTES, |offset, len| {
            let len = step(offset, &mut buffer[..len])?;
            checksum.update(&buffer[..len]);
            Ok(len)
        })?;
        Ok(Moved { checksum: checksum.finalize(), ..moved })
    }

    /// Runs `step` on chunks of `0..total_bytes`, of `chunk_bytes` or what is left. `step` may do fewer bytes than it was
    /// offered, of which 0 ends the part.
    ///
    /// # Errors
    ///
    /// As [`Self::pieces`].
    pub fn chunks<E: From<Cause>>(
        &mut self,
        ended: Ended,
        total_bytes: u64,
        chunk_bytes: usize,
        mut step: impl FnMut(u64, usize) -> Result<usize, E>,
    ) -> Result<Moved, E> {
        let part = self.begin(0, total_bytes);
        let mut done_bytes = 0;
        while done_bytes < total_bytes {
            self.pace(&part, done_bytes)?;
            let len = usize::try_from(total_bytes - done_bytes).unwrap_or(usize::MAX).min(chunk_bytes);
            let len = step(done_bytes, len)?;
            if len == 0 {
                break;
            }
            done_bytes += len as u64;
            self.reach(done_bytes, len as u64);
        }
        self.watch.end(ended, done_bytes);
        Ok(part.moved(done_bytes, 0))
    }

    /// Reads the first `moved.bytes` bytes of `volume` again and compares their checksum.
    ///
    /// # Errors
    ///
    /// [`Cause::NotVerified`], [`Cause::Volume`], [`Cause::Stopped`].
    pub fn verify(&mut self, volume: &Volume, moved: &Moved) -> Result<(), Cause> {
        let mut scratch = Vec::new();
        let found = self.pieces(Ended::Verified, moved.bytes, |offset, piece| {
            volume.read_once(piece, offset, &mut scratch).map_err(|error: VolumeError| Cause::from(error))?;
            Ok::<_, Cause>(piece.len())
        })?;
        moved.compare(&found)
    }
}

impl Moved {
    /// Whether `found` is the same.
    ///
    /// # Errors
    ///
    /// [`Cause::NotVerified`].
    pub fn compare(&self, found: &Self) -> Result<(), Cause> {
        if (self.bytes, self.checksum) == (found.bytes, found.checksum) {
            return Ok(());
        }
        Err(Cause::NotVerified { written: self.checksum, found: found.checksum })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Bytes that go in each second of a clock that `sleeps` for so long before the seconds that it names.
    fn bytes_in_each_second(rate: u64, piece: u64, sleeps: &[(u64, u64)]) -> Vec<u64> {
        let start = Instant::now();
        let mut now = start;
        let mut bucket = TokenBucket::new(rate, now);
        let (mut went, mut slept) = (Vec::new(), 0);
        while now < start + Duration::from_secs(20) {
            let second = usize::try_from(now.duration_since(start).as_secs()).unwrap();
            went.resize(second + 1, 0);
            if let Some(&(at, long)) = sleeps.get(slept)
                && second as u64 >= at
            {
                slept += 1;
                now += Duration::from_secs(long);
                continue;
            }
            match bucket.wait(now) {
                Some(wait) => now += wait,
                None => {
                    bucket.take(piece, now);
                    went[second] += piece;
                }
            }
        }
        went
    }

    #[test]
    fn no_second_has_more_than_the_rate_and_a_fifth_also_after_a_pause() {
        let pauses: [&[(u64, u64)]; 3] = [&[], &[(3, 5)], &[(2, 1), (5, 10)]];
        for pauses in pauses {
            let went = bytes_in_each_second(MIB, 4096, pauses);
            let most = *went.iter().max().unwrap();
            assert!(most <= MIB + MIB / 5 + 4096, "{pauses:?}: {went:?}");
            let working = went.iter().filter(|&&bytes| bytes > 0).count() as u64;
            assert!(went.iter().sum::<u64>() >= (working - 1) * MIB, "it keeps up when it works: {went:?}");
        }
    }

    #[test]
    fn a_piece_larger_than_the_rate_is_paid_for_afterwards() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(MIB, start);
        assert_eq!(bucket.wait(start), None);
        bucket.take(10 * MIB, start);
        let wait = bucket.wait(start).unwrap();
        assert!(wait > Duration::from_secs(9) && wait < Duration::from_secs(10), "{wait:?}");
        assert_eq!(bucket.wait(start + Duration::from_secs(10)), None);
    }

    #[test]
    fn a_stop_is_heard_while_it_waits_and_between_two_pieces() {
        let stop = AtomicBool::new(false);
        let mut watch = Unwatched;
        let mut run = Run::new(&mut watch, &stop, Some(1));
        let stopped = run.pieces(Ended::Done, MIB, |offset, piece| {
            assert_eq!(offset, 0, "the second piece would come in a day");
            stop.store(true, Ordering::Relaxed);
            Ok::<_, Cause>(piece.len())
        });
        assert!(matches!(stopped, Err(Cause::Stopped { total_bytes: MIB, .. })), "{stopped:?}");
    }
}
