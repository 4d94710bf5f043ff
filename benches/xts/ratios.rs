//! The ratios that the backends are held to, every pair measured in turns in one run: medians of the undisturbed slices of
//! [`ROUNDS_MIN`] rounds or more.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::process::Command;
use std::time::Duration;

use aes::Aes256;
use aes::cipher::consts::U16;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use daxcrypt::memory::{Source, Store, Target};
use daxcrypt::xts::{Backend, DataUnit, Span, XtsKey};
use memmap2::MmapMut;
use xts_mode::Xts128;

use super::calm::Calm;
use super::subject::{Cold, HOT_BYTES, Subject, area, key, spans};

/// Rounds go on until every subject has this many slices in which nobody disturbed the CPU,
const ROUNDS_MIN: usize = 15;
/// or until there were so many.
const ROUNDS_MAX: usize = 90;
/// `openssl speed` measures for a second at a time, so it has fewer turns.
const OPENSSL_EVERY: usize = 5;
const SLICE: Duration = Duration::from_millis(10);
const IN_CACHE_BYTES: usize = 256 << 10;
const COLD_BYTES: usize = 1 << 30;
const LINE_BYTES: usize = 64;
const UNIT_BYTES: usize = 4096;

/// A promise: the first subject is at least `factor` times as fast as the second.
type Row = (&'static str, &'static str, &'static str, f64);

const ROWS: [Row; 14] = [
    ("AES-256, 4096-byte units, in cache, against openssl speed", "xts 256/4096", "openssl", 4.0),
    ("the same against xts-mode + aes", "xts 256/4096", "xts-mode", 20.0),
    ("AES-128 against AES-256, 4096-byte units, in cache", "xts 128/4096", "xts 256/4096", 1.3),
    ("512-byte units against 4096-byte units, AES-256", "xts 256/512", "xts 256/4096", 0.78),
    ("512-byte units against 4096-byte units, AES-128", "xts 128/512", "xts 128/4096", 0.78),
    ("aesni against openssl speed", "aesni", "openssl", 0.95),
    ("vaes256 against aesni", "vaes256", "aesni", 1.9),
    ("encrypt hot to 1 GiB cold, non-temporal, against memcpy", "write", "memcpy write", 0.95),
    ("decrypt 1 GiB cold to hot, against memcpy", "read", "memcpy read", 0.80),
    ("1 GiB cold to cold, non-temporal, against memcpy", "cold to cold", "memcpy cold to cold", 1.15),
    ("the same in calls of 128 KiB on both sides", "cold to cold in parts", "memcpy in parts", 1.05),
    ("one 64-byte line inside a unit against 4096-byte units", "line", "xts 256/4096", 0.14),
    ("one call over many units against one call a unit, 512", "xts 256/512", "a call a unit", 2.0),
    ("decryption against encryption, 4096-byte units, in cache", "decrypt 256/4096", "xts 256/4096", 0.95),
];

const SOFT_ROWS: [Row; 1] = [("portable against xts-mode, both on software AES", "portable 256/4096", "xts-mode", 3.0)];

/// Two buffers that fit in the cache together. They begin at a page, as mapped memory does: where every access crosses a
/// cache line the wider backends lose most. (`openssl speed` aligns its buffer, too.)
struct InCache {
    source: MmapMut,
    target: MmapMut,
}

impl InCache {
    fn new() -> Self {
        Self { source: area(IN_CACHE_BYTES), target: area(IN_CACHE_BYTES) }
    }

    fn encrypt(&mut self, key: &XtsKey, unit: DataUnit) -> usize {
        let span = Span { unit, tweak: 4096, skip_bytes: 0 };
        let (src, dst) = (Source::from_slice(black_box(&self.source)), Target::from_slice(&mut self.target));
        key.encrypt(span, src, dst, Store::Cached);
        IN_CACHE_BYTES
    }

    fn decrypt(&mut self, key: &XtsKey, unit: DataUnit) -> usize {
        let span = Span { unit, tweak: 4096, skip_bytes: 0 };
        key.decrypt(span, Source::from_slice(black_box(&self.source)), Target::from_slice(&mut self.target));
        IN_CACHE_BYTES
    }

    /// One call for every piece of `piece_bytes` bytes, a part of a unit or a whole one.
    fn encrypt_pieces(&mut self, key: &XtsKey, unit: DataUnit, piece_bytes: usize) -> usize {
        let unit_bytes = unit.len_bytes();
        let units = self.source.chunks_exact(unit_bytes).zip(self.target.chunks_exact_mut(unit_bytes));
        for ((from, to), tweak) in units.zip((0..).step_by(unit_bytes / 512)) {
            let pieces = from.chunks_exact(piece_bytes).zip(to.chunks_exact_mut(piece_bytes));
            for ((from, to), skip_bytes) in pieces.zip((0..).step_by(piece_bytes)) {
                let span = Span { unit, tweak, skip_bytes };
                key.encrypt(span, Source::from_slice(black_box(from)), Target::from_slice(to), Store::Cached);
            }
        }
        IN_CACHE_BYTES
    }
}

fn xts_mode_subject<'a>() -> Subject<'a> {
    fn cipher<C: KeyInit + BlockCipherEncrypt<BlockSize = U16>>(byte: u8) -> C {
        C::new_from_slice(&[byte; 32]).unwrap()
    }
    let xts = Xts128::new(cipher::<Aes256>(1), cipher::<Aes256>(2));
    let mut text = area(IN_CACHE_BYTES);
    Subject::new("xts-mode", move || {
        for (tweak, unit) in (0_u128..).zip(text.chunks_mut(UNIT_BYTES)) {
            xts.encrypt_sector(black_box(unit), Array(tweak.to_le_bytes()));
        }
        IN_CACHE_BYTES
    })
}

fn in_cache_subjects<'a>() -> Vec<Subject<'a>> {
    let mut subjects = vec![xts_mode_subject()];
    for (name, key_bits, backend, unit) in [
        ("xts 256/4096", 256, "best", DataUnit::Bytes4096),
        ("xts 128/4096", 128, "best", DataUnit::Bytes4096),
        ("xts 256/512", 256, "best", DataUnit::Bytes512),
        ("xts 128/512", 128, "best", DataUnit::Bytes512),
        ("aesni", 256, "aesni", DataUnit::Bytes4096),
        ("vaes256", 256, "vaes256", DataUnit::Bytes4096),
    ] {
        let backend = if backend == "best" { Ok(Backend::detect()) } else { Backend::from_name(backend) };
        let Ok(backend) = backend else { continue };
        let (key, mut memory) = (key(key_bits, backend), InCache::new());
        subjects.push(Subject::new(name, move || memory.encrypt(&key, unit)));
    }
    let best = |bits| (key(bits, Backend::detect()), InCache::new());
    let (key, mut memory) = best(256);
    subjects.push(Subject::new("decrypt 256/4096", move || memory.decrypt(&key, DataUnit::Bytes4096)));
    let (key, mut memory) = best(256);
    subjects.push(Subject::new("line", move || memory.encrypt_pieces(&key, DataUnit::Bytes4096, LINE_BYTES)));
    let (key, mut memory) = best(256);
    subjects.push(Subject::new("a call a unit", move || memory.encrypt_pieces(&key, DataUnit::Bytes512, 512)));
    subjects
}

/// Measures `openssl speed` in a process of its own; `None` where there is none.
fn openssl() -> Option<f64> {
    let arguments = ["speed", "-evp", "aes-256-xts", "-bytes", "4096", "-seconds", "1", "-mr"];
    let output = Command::new("openssl").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let rate = text.lines().find_map(|line| line.strip_prefix("+F:"))?.rsplit(':').next()?;
    rate.trim().parse::<f64>().ok().map(|bytes_per_second| bytes_per_second / 1e9)
}

/// Prints every row but that of the software cipher.
pub(crate) fn print() {
    let best = || key(256, Backend::detect());
    let cold = std::cell::RefCell::new(Cold::new(COLD_BYTES));
    let other = std::cell::RefCell::new(area(COLD_BYTES));
    let unit = DataUnit::Bytes4096;
    let (writer, reader, mover, part_mover) = (best(), best(), best(), best());
    let mut subjects = in_cache_subjects();
    subjects.push(Subject::new("memcpy write", || {
        cold.borrow_mut().copy_in();
        COLD_BYTES
    }));
    subjects.push(Subject::new("write", || {
        cold.borrow_mut().encrypt(&writer, unit);
        COLD_BYTES
    }));
    subjects.push(Subject::new("memcpy read", || {
        cold.borrow_mut().copy_out();
        COLD_BYTES
    }));
    subjects.push(Subject::new("read", || {
        cold.borrow_mut().decrypt(&reader, unit);
        COLD_BYTES
    }));
    subjects.push(Subject::new("memcpy cold to cold", || {
        other.borrow_mut().copy_from_slice(&cold.borrow().area);
        COLD_BYTES
    }));
    subjects.push(Subject::new("cold to cold", || {
        let span = Span { unit, tweak: 4096, skip_bytes: 0 };
        let (mut other, cold) = (other.borrow_mut(), cold.borrow());
        mover.encrypt(span, Source::from_slice(&cold.area), Target::from_slice(&mut other), Store::NonTemporal);
        COLD_BYTES
    }));
    subjects.push(Subject::new("memcpy in parts", || {
        for (to, from) in other.borrow_mut().chunks_mut(HOT_BYTES).zip(cold.borrow().area.chunks(HOT_BYTES)) {
            to.copy_from_slice(from);
        }
        COLD_BYTES
    }));
    subjects.push(Subject::new("cold to cold in parts", || {
        let (mut other, cold) = (other.borrow_mut(), cold.borrow());
        let parts = other.chunks_mut(HOT_BYTES).zip(cold.area.chunks(HOT_BYTES));
        for ((to, from), span) in parts.zip(spans(unit)) {
            part_mover.encrypt(span, Source::from_slice(from), Target::from_slice(to), Store::NonTemporal);
        }
        COLD_BYTES
    }));
    let mut openssl_subject = Subject::new("openssl", || 0);
    let mut calm = Calm::new();
    let enough = |subject: &Subject<'_>| subject.counts().0 >= ROUNDS_MIN;
    for round in 0..ROUNDS_MAX {
        if round % OPENSSL_EVERY == 0 {
            openssl_subject.measure_outside(&mut calm, openssl);
        }
        for subject in &mut subjects {
            subject.measure(SLICE, &mut calm);
        }
        if subjects.iter().all(enough) && openssl_subject.counts().0 > 2 {
            break;
        }
    }
    subjects.push(openssl_subject);
    println!("backend {}, GB/s = 1e9 bytes per second, medians", Backend::detect());
    print_counts(&subjects);
    let find = |name: &str| subjects.iter().find(|subject| subject.name == name);
    let rate = |name: &str| find(name).filter(|subject| subject.counts() != (0, 0)).map(Subject::rate);
    print_rows(&ROWS, rate);
}

/// Prints the row of the software cipher, for a build with `--cfg aes_backend="soft"`.
pub(crate) fn print_soft() {
    let portable = Backend::from_name("portable").unwrap();
    let (key, mut memory) = (key(256, portable), InCache::new());
    let mut subjects =
        [xts_mode_subject(), Subject::new("portable 256/4096", move || memory.encrypt(&key, DataUnit::Bytes4096))];
    let mut calm = Calm::new();
    for _ in 0..ROUNDS_MIN {
        for subject in &mut subjects {
            subject.measure(SLICE, &mut calm);
        }
    }
    print_counts(&subjects);
    print_rows(&SOFT_ROWS, |name| subjects.iter().find(|subject| subject.name == name).map(Subject::rate));
}

/// Says how much of what was measured counts.
fn print_counts(subjects: &[Subject<'_>]) {
    let kept = subjects.iter().map(|subject| subject.counts().0).min().unwrap_or(0);
    let disturbed: usize = subjects.iter().map(|subject| subject.counts().1).sum();
    println!("at least {kept} undisturbed slices of each; {disturbed} in all were disturbed and do not count");
    if kept == 0 {
        println!("the CPU was never undisturbed for some of them: these medians are of disturbed slices");
    }
}

fn print_rows(rows: &[Row], rate: impl Fn(&str) -> Option<f64>) {
    println!("{:<57} {:>7} {:>7} {:>7} {:>9}", "", "GB/s", "against", "ratio", "at least");
    for (what, fast, slow, at_least) in rows {
        let (Some(fast), Some(slow)) = (rate(fast), rate(slow)) else {
            println!("{what:<57} not measured here: a backend or openssl is missing");
            continue;
        };
        let ratio = fast / slow;
        let verdict = if ratio >= *at_least { "" } else { "  MISSED" };
        println!("{what:<57} {fast:>7.2} {slow:>7.2} {ratio:>7.3} {at_least:>9.2}{verdict}");
    }
}
