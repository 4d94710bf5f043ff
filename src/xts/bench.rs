//! How fast AES-XTS is on this machine: every backend, key size, unit size and direction, with memcpy beside it.
//!
//! Everything is measured in turns, a slice of time each, and the median of the turns is taken: what else runs on the
//! machine then slows all rows down alike. One thread, wall-clock time, 1 GB = 10^9 bytes.
//!
//! In cache, 128 KiB go to another 128 KiB. Out of cache, encryption goes from such a buffer to a long area with
//! non-temporal stores, and decryption from the area to the buffer, which is what writing to and reading from persistent
//! memory are; ordinary memory stands in for it.

use std::time::{Duration, Instant};

use memmap2::{Advice, MmapMut};
use serde::Serialize;

use super::{Backend, DataUnit, Direction, Span, XtsKey};
use crate::memory::{Source, Store, Target};
use crate::secret::{KeyError, VolumeKey};

/// Bytes of the buffers that stay in the cache, and of one call.
const HOT_BYTES: usize = 128 << 10;
/// Bytes of the area out of the cache: a multiple of what the caches of one core complex hold.
const COLD_BYTES: usize = 256 << 20;
/// Turns. An odd number has a median.
const ROUNDS: u32 = 5;
/// What all turns together take, unless a call is longer than its slice.
const TOTAL: Duration = Duration::from_secs(8);

/// The speed of one variant. All rates are medians in GB/s, 10^9 bytes a second.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The backend's name.
    pub backend: &'static str,
    /// Bits of the AES key: 128 or 256 (the XTS key has twice as many).
    pub key_bits: u16,
    /// Bytes of a data unit: 512 or 4096.
    pub unit_bytes: usize,
    /// `encrypt` or `decrypt`.
    pub direction: &'static str,
    /// From cache to cache.
    pub in_cache_gb_s: f64,
    /// Encryption from cache to memory, decryption from memory to cache.
    pub out_of_cache_gb_s: f64,
    /// memcpy of the same shape as `in_cache_gb_s`.
    pub memcpy_in_cache_gb_s: f64,
    /// memcpy of the same shape as `out_of_cache_gb_s`.
    pub memcpy_out_of_cache_gb_s: f64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// There is no key to measure with.
    #[error("cannot make a key")]
    Key(#[from] KeyError),
    /// There is no memory to measure in.
    #[error("cannot map {COLD_BYTES} bytes of memory")]
    Memory(#[source] std::io::Error),
}

/// Measures `backends` with random keys; takes about 8 seconds and 256 MiB of memory, however many they are.
///
/// # Errors
///
/// [`BenchError`] when keys or memory cannot be had.
pub fn measure(backends: &[Backend]) -> Result<Vec<Row>, BenchError> {
    measure_for(backends, TOTAL, COLD_BYTES)
}

fn measure_for(backends: &[Backend], total: Duration, cold_bytes: usize) -> Result<Vec<Row>, BenchError> {
    let mut buffers = Buffers::new(cold_bytes)?;
    let mut subjects = vec![Subject::new(Work::Copy(Direction::Encrypt)), Subject::new(Work::Copy(Direction::Decrypt))];
    for backend in backends {
        for key_bits in [256, 128] {
            for unit in [DataUnit::Bytes4096, DataUnit::Bytes512] {
                for direction in [Direction::Encrypt, Direction::Decrypt] {
                    let key = XtsKey::new(&VolumeKey::generate(usize::from(key_bits) / 4)?, *backend);
                    subjects.push(Subject::new(Work::Cipher { key, key_bits, unit, direction }));
                }
            }
        }
    }
    let turns = u32::try_from(2 * subjects.len()).expect("a handful of backends") * ROUNDS;
    let slice = total / turns;
    for _ in 0..ROUNDS {
        for subject in &mut subjects {
            let in_cache = rate(slice, || buffers.run_in_cache(&subject.work));
            subject.in_cache.push(in_cache);
            let out_of_cache = rate(slice, || buffers.run_out_of_cache(&subject.work));
            subject.out_of_cache.push(out_of_cache);
        }
    }
    let (copies, ciphers) = subjects.split_at(2);
    Ok(ciphers.iter().filter_map(|subject| subject.row(copies)).collect())
}

/// What one call does.
enum Work {
    Copy(Direction),
    Cipher { key: XtsKey, key_bits: u16, unit: DataUnit, direction: Direction },
}

impl Work {
    const fn direction(&self) -> Direction {
        match self {
            Self::Copy(direction) | Self::Cipher { direction, .. } => *direction,
        }
    }

    fn run(&self, from: &[u8], to: &mut [u8], store: Store) {
        match self {
            Self::Copy(_) => to.copy_from_slice(from),
            Self::Cipher { key, unit, direction, .. } => {
                let span = Span { unit: *unit, tweak: 0, skip_bytes: 0 };
                let (src, dst) = (Source::from_slice(from), Target::from_slice(to));
                match direction {
                    Direction::Encrypt => key.encrypt(span, src, dst, store),
                    Direction::Decrypt => key.decrypt(span, src, dst),
                }
            }
        }
    }
}

struct Subject {
    work: Work,
    in_cache: Vec<f64>,
    out_of_cache: Vec<f64>,
}

impl Subject {
    const fn new(work: Work) -> Self {
        Self { work, in_cache: Vec::new(), out_of_cache: Vec::new() }
    }

    /// The row of a cipher beside the copy of its direction.
    fn row(&self, copies: &[Self]) -> Option<Row> {
        let Work::Cipher { key, key_bits, unit, direction } = &self.work else { return None };
        let copy = copies.iter().find(|copy| copy.work.direction() == *direction)?;
        Some(Row {
            backend: key.backend().name(),
            key_bits: *key_bits,
            unit_bytes: unit.len_bytes(),
            direction: if *direction == Direction::Encrypt { "encrypt" } else { "decrypt" },
            in_cache_gb_s: median(&self.in_cache),
            out_of_cache_gb_s: median(&self.out_of_cache),
            memcpy_in_cache_gb_s: median(&copy.in_cache),
            memcpy_out_of_cache_gb_s: median(&copy.out_of_cache),
        })
    }
}

/// The memory that calls work on.
struct Buffers {
    hot: MmapMut,
    other: MmapMut,
    cold: MmapMut,
    /// Where the next call out of the cache goes: no place is used twice before all others.
    at: usize,
}

impl Buffers {
    fn new(cold_bytes: usize) -> Result<Self, BenchError> {
        Ok(Self { hot: touched(HOT_BYTES)?, other: touched(HOT_BYTES)?, cold: touched(cold_bytes)?, at: 0 })
    }

    fn run_in_cache(&mut self, work: &Work) {
        work.run(&self.hot, &mut self.other, Store::Cached);
    }

    fn run_out_of_cache(&mut self, work: &Work) {
        let place = &mut self.cold[self.at..self.at + HOT_BYTES];
        match work.direction() {
            Direction::Encrypt => work.run(&self.hot, place, Store::NonTemporal),
            Direction::Decrypt => work.run(place, &mut self.hot, Store::Cached),
        }
        self.at = if self.at + 2 * HOT_BYTES <= self.cold.len() { self.at + HOT_BYTES } else { 0 };
    }
}

/// Memory that the kernel has given already, on huge pages if it has them.
fn touched(len_bytes: usize) -> Result<MmapMut, BenchError> {
    let mut map = MmapMut::map_anon(len_bytes).map_err(BenchError::Memory)?;
    // A kernel without huge pages is no error: the rates are then those of small pages.
    let _ = map.advise(Advice::HugePage);
    map.fill(1);
    Ok(map)
}

/// GB/s of calls of [`HOT_BYTES`], made for `slice`.
fn rate(slice: Duration, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut calls = 0_u32;
    loop {
        call();
        calls += 1;
        let elapsed = start.elapsed();
        if elapsed >= slice {
            return f64::from(calls) * HOT_BYTES as f64 / elapsed.as_secs_f64() / 1e9;
        }
    }
}

fn median(rates: &[f64]) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_has_a_row_with_rates() {
        let backends = Backend::available();
        let rows = measure_for(&backends, Duration::from_millis(50), 1 << 20).unwrap();
        assert_eq!(rows.len(), 8 * backends.len());
        for row in &rows {
            for rate in
                [row.in_cache_gb_s, row.out_of_cache_gb_s, row.memcpy_in_cache_gb_s, row.memcpy_out_of_cache_gb_s]
            {
                assert!(rate.is_finite() && rate > 0.0, "{row:?}");
            }
        }
        let json = serde_json::to_value(&rows[0]).unwrap();
        assert_eq!(json["backend"], backends[0].name());
        assert_eq!(json["key_bits"], 256);
        assert_eq!(json["unit_bytes"], 4096);
        assert_eq!(json["direction"], "encrypt");
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(&[3.0, 1.0, 100.0]).to_bits(), 3_f64.to_bits());
    }
}
