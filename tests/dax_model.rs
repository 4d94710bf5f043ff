//! Random use of direct maps from several threads against a model, with restarts; and a stress test that `tools/soak` runs
//! for longer (`DAXCRYPT_SOAK_SECONDS`).
//!
//! The volume is an array of 8-byte words, and neighbours in one cipher block belong to different threads. A word holds its
//! own index and a count that only grows, so every word that is found anywhere tells when it was stored, and a word that
//! was never stored there is seen at once.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::multiple_unsafe_ops_per_block, unsafe_code)]

mod vault;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use daxcrypt::dax::{DaxMapping, FaultsBy, MapOptions};
use daxcrypt::nbd_server::{Export, Hole};
use daxcrypt::pmem::{Access, Granularity};
use daxcrypt::volume::Volume;
use vault::{PAGE, Random, Vault, writable};

const SIZE: u64 = 1 << 20;
const WORDS: u64 = SIZE / 8;
const THREADS: u64 = 4;
const STEPS: u32 = 1500;

fn word(index: u64, count: u64) -> u64 {
    count << 32 | index
}

/// The count of a word that must be one of `index`.
fn count_of(index: u64, found: u64) -> u64 {
    assert_eq!(found & u64::from(u32::MAX), index, "{found:#x} was never stored in word {index}");
    found >> 32
}

/// A thread with the words that are its own: every [`THREADS`]th one.
struct Worker {
    id: u64,
    random: Random,
    /// The last count stored, by index / THREADS.
    stored: Vec<u64>,
    /// The last count that was made durable.
    durable: Vec<u64>,
}

impl Worker {
    fn new(id: u64, seed: u64) -> Self {
        let zeroes = vec![0; (WORDS / THREADS) as usize];
        Self { id, random: Random(seed * 1000 + id + 1), stored: zeroes.clone(), durable: zeroes }
    }

    /// A word of its own, near the others of a few hot pages half of the time.
    fn pick(&mut self) -> u64 {
        let hot = self.random.below(2) == 0;
        let end = if hot { 4 * PAGE / 8 } else { WORDS };
        self.random.below(end / THREADS) * THREADS + self.id
    }

    /// Gives back the map that it has in the end, with what was stored through it and is nowhere else.
    fn run(&mut self, volume: &Arc<Volume>, options: &MapOptions) -> DaxMapping {
        let mut map = self.map(volume, options);
        for _ in 0..STEPS {
            let index = self.pick();
            if self.random.below(500) == 0 {
                // Closing makes durable what was stored through this map; the next one begins somewhere else.
                map.close().unwrap();
                map = self.map(volume, options);
            }
            match map.range().contains(&(index * 8)) {
                true => self.use_map(&map, index),
                false => self.use_volume(volume, index),
            }
        }
        map
    }

    /// A map of the whole volume, or of a part of it.
    fn map(&mut self, volume: &Arc<Volume>, options: &MapOptions) -> DaxMapping {
        let start = if self.random.below(2) == 0 { 0 } else { self.random.below(SIZE / PAGE - 8) * PAGE };
        volume.map(start..SIZE, options).unwrap()
    }

    fn use_map(&mut self, map: &DaxMapping, index: u64) {
        let (slot, offset) = ((index / THREADS) as usize, index * 8 - map.range().start);
        // SAFETY: the word is aligned and within the map; everybody stores whole words.
        let memory = unsafe { AtomicU64::from_ptr(map.as_ptr().add(offset as usize).cast()) };
        let pages = offset / PAGE * PAGE..map.len().min((offset / PAGE + self.random.below(16) + 1) * PAGE);
        match self.random.below(20) {
            0..8 => {
                assert_eq!(memory.load(Ordering::Relaxed), word(index, self.stored[slot]), "word {index}");
                self.stored[slot] += 1;
                memory.store(word(index, self.stored[slot]), Ordering::Relaxed);
            }
            8..10 => {
                self.stored[slot] += 1;
                map.write(offset, &word(index, self.stored[slot]).to_le_bytes()).unwrap();
            }
            10..14 => {
                map.persist(offset..offset + 8).unwrap();
                self.durable[slot] = self.stored[slot];
            }
            14 => {
                let mut bytes = [0; 8];
                map.read(offset, &mut bytes).unwrap();
                assert_eq!(u64::from_le_bytes(bytes), word(index, self.stored[slot]), "word {index}");
            }
            15 => {
                map.evict(pages).unwrap();
            }
            16 => map.prefetch(pages).unwrap(),
            17 if self.random.below(10) == 0 => {
                map.sync().unwrap();
                self.all_durable(map.range().start / 8);
            }
            _ => {
                // Somebody else's word: any count, but of that word.
                let other = index ^ 1;
                // SAFETY: as above.
                let memory = unsafe { AtomicU64::from_ptr(map.as_ptr().add((offset ^ 8) as usize).cast()) };
                count_of(other, memory.load(Ordering::Relaxed));
            }
        }
    }

    /// What was stored from word `first` on through maps has become durable.
    fn all_durable(&mut self, first: u64) {
        let slots = self.stored.iter().zip(&mut self.durable).enumerate();
        for (_, (stored, durable)) in slots.filter(|(slot, _)| *slot as u64 * THREADS + self.id >= first) {
            *durable = *stored;
        }
    }

    /// As an NBD client does it.
    fn use_volume(&mut self, volume: &Arc<Volume>, index: u64) {
        let slot = (index / THREADS) as usize;
        let export: &dyn Export = &**volume;
        if self.random.below(3) == 0 {
            self.stored[slot] += 1;
            export.write_at(index * 8, &word(index, self.stored[slot]).to_le_bytes()).unwrap();
            export.persist(index * 8, 8).unwrap();
            self.durable[slot] = self.stored[slot];
        } else {
            let mut bytes = [0; 8];
            export.read_at(index * 8, &mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), word(index, self.stored[slot]), "word {index}");
        }
    }

    /// Compares a volume that was opened after a crash (`exactly` false) or after an orderly end with the model.
    fn check(&mut self, bytes: &[u8], exactly: bool) {
        for slot in 0..self.stored.len() {
            let index = slot as u64 * THREADS + self.id;
            let at = index as usize * 8;
            let count = count_of(index, u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()));
            let (durable, stored) = (self.durable[slot], self.stored[slot]);
            assert!(count >= durable && count <= stored, "word {index}: {count} is not in {durable}..={stored}");
            assert!(!exactly || count == stored, "word {index}: {count} is not {stored}");
        }
    }
}

fn contents(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    volume.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn play(granularity: Granularity, options: &MapOptions, seed: u64) {
    let (vault, volume) = Vault::empty(SIZE);
    let first: Vec<u8> = (0..WORDS).flat_map(|index| word(index, 0).to_le_bytes()).collect();
    volume.write_at(&first, 0).unwrap();
    drop(volume);
    let mut workers: Vec<_> = (0..THREADS).map(|id| Worker::new(id, seed)).collect();
    let crash = vault.dir.path().join("crash.img");
    for _ in 0..3 {
        let volume = vault.reopen(granularity);
        let maps: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> =
                workers.iter_mut().map(|worker| scope.spawn(|| worker.run(&volume, options))).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        // What a process leaves that is killed now: the maps are there, and nobody has synced or evicted them.
        fs::copy(vault.path(), &crash).unwrap();
        let survived = contents(&Vault::open(&crash, Access::ReadOnly));
        workers.iter_mut().for_each(|worker| worker.check(&survived, false));
        drop(maps);
        drop(volume);
        let bytes = contents(&Vault::open(&vault.path(), Access::ReadOnly));
        workers.iter_mut().for_each(|worker| {
            worker.check(&bytes, true);
            worker.all_durable(0);
        });
    }
}

#[test]
fn every_persisted_word_survives_and_every_word_is_one_that_was_stored() {
    let every = Duration::from_millis(3);
    let variants = [
        writable(),
        writable().resident_max(256 << 10),
        writable().resident_max(256 << 10).write_back_interval(every),
        writable().trap_stores().resident_max(256 << 10),
        writable().eager(),
        writable().faults(FaultsBy::InThread),
        writable().faults(FaultsBy::InThread).resident_max(256 << 10).write_back_interval(every),
        writable().faults(FaultsBy::InThread).trap_stores().resident_max(256 << 10),
    ];
    for (seed, options) in (1..).zip(&variants) {
        play(Granularity::CacheLine, options, seed);
    }
    play(Granularity::Page, &variants[2], 99);
    play(Granularity::Page, &variants[6], 100);
}

/// Threads count up words of pages all over a large volume through maps with little room, while requests write other words
/// of the same pages, and check that no count ever goes back.
fn stress(run_for: Duration, faults: FaultsBy) -> u64 {
    const LEN: u64 = 256 << 20;
    const WORKERS: u64 = 8;
    let (_vault, volume) = Vault::empty(LEN);
    volume.write_zeroes(0, LEN).unwrap();
    let stop = AtomicBool::new(false);
    let maps: Vec<_> =
        (0..2).map(|_| volume.map(0..LEN, &writable().resident_max(1 << 20).faults(faults)).unwrap()).collect();
    let touches = thread::scope(|scope| {
        let (volume, maps, stop) = (&volume, &maps, &stop);
        let worker = |id: u64| move || count_up(&maps[(id % 2) as usize], id, stop);
        let workers: Vec<_> = (0..WORKERS).map(|id| scope.spawn(worker(id))).collect();
        let writer = scope.spawn(move || {
            let mut random = Random(4711);
            let export: &dyn Export = &**volume;
            let mut bytes = [0; 512];
            while !stop.load(Ordering::Relaxed) {
                let page = random.below(LEN / PAGE) * PAGE;
                bytes.fill(random.below(256) as u8);
                export.write_at(page + 2048, &bytes).unwrap();
                let mut back = [0; 512];
                export.read_at(page + 2048, &mut back).unwrap();
                assert_eq!(bytes, back);
                if random.below(50) == 0 {
                    export.write_zeroes(page + 3072, 1024, Hole::Allowed).unwrap();
                }
                assert!(volume.resident_bytes() <= 1 << 20);
            }
        });
        thread::sleep(run_for);
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    maps.into_iter().for_each(|map| map.close().unwrap());
    assert_eq!(volume.resident_bytes(), 0);
    touches
}

/// Adds one to the thread's word of a random page, again and again. How often.
fn count_up(map: &DaxMapping, id: u64, stop: &AtomicBool) -> u64 {
    let pages = map.len() / PAGE;
    let mut counts = vec![0_u64; pages as usize];
    let mut random = Random(id + 17);
    let mut touches = 0;
    while !stop.load(Ordering::Relaxed) {
        let near = random.below(4) != 0;
        let page = if near { random.below(64) } else { random.below(pages) };
        // SAFETY: the word is aligned and within the map, and this thread's alone.
        let word = unsafe { AtomicU64::from_ptr(map.as_ptr().add((page * PAGE + id * 8) as usize).cast()) };
        let count = &mut counts[page as usize];
        assert_eq!(word.load(Ordering::Relaxed), *count, "thread {id}, page {page}");
        *count += 1;
        word.store(*count, Ordering::Relaxed);
        touches += 1;
        if touches % 64 == 0 {
            map.persist(page * PAGE + id * 8..page * PAGE + id * 8 + 8).unwrap();
        }
        if touches % 4096 == 0 {
            map.sync().unwrap();
        }
    }
    touches
}

#[test]
fn eight_threads_and_requests_share_a_volume_that_does_not_fit() {
    let seconds = std::env::var("DAXCRYPT_SOAK_SECONDS").map_or(3, |text| text.parse().unwrap());
    for faults in [FaultsBy::Threads, FaultsBy::InThread] {
        let started = Instant::now();
        let touches = stress(Duration::from_secs(seconds), faults);
        println!("{faults:?}: {touches} stores in {:?}", started.elapsed());
        assert!(touches > 1000);
    }
}
