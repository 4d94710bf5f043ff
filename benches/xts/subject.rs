//! What is measured: memory shapes, and subjects that are measured in turns.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use daxcrypt::memory::{Source, Store, Target};
use daxcrypt::secret::VolumeKey;
use daxcrypt::xts::{Backend, DataUnit, Span, XtsKey};
use memmap2::{Advice, MmapMut};
use rustix::time::{ClockId, clock_gettime};

use super::calm::Calm;

/// Bytes of the buffer that stays in the cache beside a cold area, and of one call.
pub(crate) const HOT_BYTES: usize = 128 << 10;

/// Bytes between two looks at the clock, which is a system call: 5 % of what a run in the cache takes.
const CLOCK_EVERY_BYTES: usize = 4 << 20;

/// A random key of `key_bits` (128 or 256) for `backend`.
pub(crate) fn key(key_bits: usize, backend: Backend) -> XtsKey {
    XtsKey::new(&VolumeKey::generate(key_bits / 4).unwrap(), backend)
}

/// Touched memory on huge pages where the kernel has them.
pub(crate) fn area(len_bytes: usize) -> MmapMut {
    let mut area = MmapMut::map_anon(len_bytes).unwrap();
    let _ = area.advise(Advice::HugePage);
    area.fill(7);
    area
}

/// Memory that no cache holds, and a buffer that one does.
pub(crate) struct Cold {
    pub(crate) area: MmapMut,
    pub(crate) hot: MmapMut,
}

impl Cold {
    pub(crate) fn new(len_bytes: usize) -> Self {
        Self { area: area(len_bytes), hot: area(HOT_BYTES) }
    }

    pub(crate) fn copy_in(&mut self) {
        for part in self.area.chunks_mut(HOT_BYTES) {
            part.copy_from_slice(&self.hot);
        }
    }

    pub(crate) fn copy_out(&mut self) {
        for part in self.area.chunks(HOT_BYTES) {
            self.hot.copy_from_slice(part);
        }
    }

    pub(crate) fn encrypt(&mut self, key: &XtsKey, unit: DataUnit) {
        for (part, span) in self.area.chunks_mut(HOT_BYTES).zip(spans(unit)) {
            key.encrypt(span, Source::from_slice(&self.hot), Target::from_slice(part), Store::NonTemporal);
        }
    }

    pub(crate) fn decrypt(&mut self, key: &XtsKey, unit: DataUnit) {
        for (part, span) in self.area.chunks(HOT_BYTES).zip(spans(unit)) {
            key.decrypt(span, Source::from_slice(part), Target::from_slice(&mut self.hot));
        }
    }
}

/// The spans of calls of [`HOT_BYTES`] that follow on.
pub(crate) fn spans(unit: DataUnit) -> impl Iterator<Item = Span> {
    (0..).map(move |call| Span { unit, tweak: 4096 + call * (HOT_BYTES / 512) as u64, skip_bytes: 0 })
}

/// Something whose speed is compared: `run` does a piece of work and says of how many bytes.
pub(crate) struct Subject<'a> {
    pub(crate) name: &'static str,
    run: Box<dyn FnMut() -> usize + 'a>,
    rates: Vec<f64>,
    disturbed: Vec<f64>,
}

impl<'a> Subject<'a> {
    pub(crate) fn new(name: &'static str, run: impl FnMut() -> usize + 'a) -> Self {
        Self { name, run: Box::new(run), rates: Vec::new(), disturbed: Vec::new() }
    }

    /// Runs for `slice` or a little longer and keeps the rate, unless the CPU was disturbed meanwhile.
    pub(crate) fn measure(&mut self, slice: Duration, calm: &mut Calm) {
        let before = calm.now();
        let start = thread_time();
        let mut len_bytes = 0;
        while thread_time() - start < slice {
            let next_look = len_bytes + CLOCK_EVERY_BYTES;
            while len_bytes < next_look {
                len_bytes += (self.run)();
            }
        }
        let rate = len_bytes as f64 / (thread_time() - start).as_secs_f64() / 1e9;
        self.keep(rate, before && calm.now());
    }

    fn keep(&mut self, rate: f64, calm: bool) {
        let rates = if calm { &mut self.rates } else { &mut self.disturbed };
        rates.push(rate);
    }

    /// A subject that is measured by a program of its own: `rate` in GB/s.
    pub(crate) fn measure_outside(&mut self, calm: &mut Calm, rate: impl FnOnce() -> Option<f64>) {
        let before = calm.now();
        if let Some(rate) = rate() {
            self.keep(rate, before && calm.now());
        }
    }

    /// How many slices were kept and how many were not.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.rates.len(), self.disturbed.len())
    }

    /// The median rate in GB/s (1e9 bytes per second) of the slices that were kept, or of all if none was.
    pub(crate) fn rate(&self) -> f64 {
        median(if self.rates.is_empty() { &self.disturbed } else { &self.rates })
    }
}

/// The CPU time of this thread, which is what `openssl speed` counts as well: others on the machine do not take from it.
fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap(), now.tv_nsec.try_into().unwrap())
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
