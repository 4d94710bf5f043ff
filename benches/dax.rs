//! The direct map beside its yardsticks, as ratios of one run: plain memory, raw CLWB and SFENCE, and the same touch on a
//! file of `nbdfuse` over our own export. Usage: `cargo bench --bench dax [-- NAME ...]`.
//!
//! The backing is a file in tmpfs with cache-line granularity imposed, but for the one line that names ext4 (in the folder
//! `DAXCRYPT_BENCH_EXT4`, or the working folder). Figures are medians of rounds in which the sides take turns.
//!
//! A touch is handed to the thread that answers faults. On another CPU that thread has to be woken, which takes what the
//! machine takes to leave its idle state (a virtual machine: tens of microseconds). So touches are measured twice: with
//! all threads on one CPU, which shows what the software costs, and as the scheduler places them.
//!
//! Threads that persist the same word wait for each other, and whoever is next does it for all who wait by then. How much
//! that gives depends on how many can wait at a time, so on the CPUs: each persist takes a part of some CPU's time that is no
//! less than the cheaper of doing it and of letting another thread run instead. With 2 CPUs at most two are at it, which is
//! at best 2 times one thread's rate and never 3. Measured on 2 virtual CPUs of an Intel Xeon with VAES-512: one thread 182
//! ns, 2 to 8 threads together one in 705 to 754 ns, 0.25 times: a line that moves between the CPUs, and a change of
//! threads, each cost more than the persist.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::multiple_unsafe_ops_per_block, unsafe_code)]

#[path = "xts/calm.rs"]
mod calm;
#[path = "dax/engine.rs"]
mod engine;
#[path = "dax/in_thread.rs"]
mod in_thread;

use std::arch::asm;
use std::ffi::c_void;
use std::fs::{self, File};
use std::hint::black_box;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use calm::Calm;
use daxcrypt::dax::{DaxMapping, FaultsBy, MapOptions};
use daxcrypt::namespace::{self, Credential, FormatOptions, HEADER_AREA_BYTES};
use daxcrypt::nbd_server::{ExportInfo, Exports, Limits, Listener, Options, Server};
use daxcrypt::pmem::{Access, Allocation, Backing, Granularity, OpenOptions};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// A fresh volume of `size` bytes in `folder`.
fn volume(folder: &Path, size: u64, granularity: Granularity, allocation: Allocation) -> Arc<Volume> {
    let path = folder.join("vault.img");
    let _ = fs::remove_file(&path);
    drop(Backing::create(&path, HEADER_AREA_BYTES + size, allocation).unwrap());
    let backing = OpenOptions::new(Access::ReadWrite).force_granularity(granularity).open(&path).unwrap();
    let credential = Credential::KeyFile(SecretBytes::random(64).unwrap());
    let namespace = namespace::format(Arc::new(backing), FormatOptions::default(), &credential).unwrap();
    Arc::new(Volume::new(namespace, Backend::from_env().unwrap()))
}

fn in_tmpfs(folder: &Path, size: u64) -> Arc<Volume> {
    let volume = volume(folder, size, Granularity::CacheLine, Allocation::Full);
    volume.write_zeroes(0, size).unwrap();
    volume
}

fn writable() -> MapOptions {
    MapOptions::new().writable().write_back_interval(Duration::ZERO)
}

fn touch(start: *const u8, offset: u64) {
    // SAFETY: every caller stays within its mapping.
    black_box(unsafe { start.add(offset as usize).read_volatile() });
}

fn store(map: &DaxMapping, offset: u64) {
    // SAFETY: every caller stays within its writable map.
    unsafe { map.as_ptr().add(offset as usize).write_volatile(1) };
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn seconds(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn report(what: &str, value: f64, unit: &str, goal: &str) {
    println!("{what:<64} {value:>9.2} {unit:<6} goal {goal}");
}

/// Loads all words of the memory and adds them up.
fn touch_sum(start: *const u8, len: u64) {
    let words = start.cast::<u64>();
    // SAFETY: every caller gives a mapping of `len` bytes.
    let sum = (0..len as usize / 8).fold(0_u64, |sum, index| sum.wrapping_add(unsafe { words.add(index).read() }));
    black_box(sum);
}

fn resident_load(folder: &Path) {
    const LEN: u64 = 64 * MIB;
    let volume = in_tmpfs(folder, LEN);
    let map = volume.map(0..LEN, &writable()).unwrap();
    map.prefetch(0..LEN).unwrap();
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new mapping.
    let plain = unsafe { mmap_anonymous(ptr::null_mut(), LEN as usize, protection, flags) }.unwrap();
    // SAFETY: our own new mapping; pages of 4 KiB, as the map's are.
    unsafe { madvise(plain, LEN as usize, Advice::LinuxNoHugepage) }.unwrap();
    // SAFETY: as above.
    unsafe { ptr::write_bytes(plain.cast::<u8>(), 1, LEN as usize) };
    let ratios = (0..15).map(|_| {
        let ours = seconds(|| touch_sum(map.as_ptr(), LEN));
        let theirs = seconds(|| touch_sum(plain.cast(), LEN));
        theirs / ours
    });
    report("load from resident pages, rate over plain memory", median(ratios.collect()), "x", ">= 0.97");
}

/// Microseconds of each first touch of `count` pages in an order that no fault-ahead follows.
fn random_touches(start: *const u8, page_count: u64, count: u64) -> Vec<f64> {
    let touches = (0..count).map(|index| {
        let page = (index * 7919) % page_count;
        seconds(|| touch(start, page * PAGE)) * 1e6
    });
    touches.collect()
}

/// Runs `measure` twice: with all its threads and processes on one CPU, and as the scheduler places them.
fn in_both_places(measure: impl Fn(&Path, &str) + Sync) {
    for (place, one_cpu) in [("one CPU", true), ("as scheduled", false)] {
        thread::scope(|scope| {
            scope.spawn(|| {
                if one_cpu {
                    let mut cpu = CpuSet::new();
                    cpu.set(sched_getcpu());
                    sched_setaffinity(None, &cpu).unwrap();
                }
                measure(tempfile::tempdir_in("/dev/shm").unwrap().path(), place);
            });
        });
    }
}

fn first_touch(folder: &Path, place: &str) {
    const LEN: u64 = 256 * MIB;
    let volume = in_tmpfs(folder, LEN);
    let map = volume.map(0..LEN, &writable()).unwrap();
    let ours = median(random_touches(map.as_ptr(), LEN / PAGE, 20_000));
    report(&format!("first touch of a random page, p50, {place}"), ours, "us", "<= 9");
    let read_only = volume.map(0..LEN, &MapOptions::new()).unwrap();
    drop(map);
    let loads = median(random_touches(read_only.as_ptr(), LEN / PAGE, 20_000));
    report(&format!("the same of a read-only map, p50, {place}"), loads, "us", "-");
    drop(read_only);
    if let Some(theirs) = nbdfuse_touch(folder, volume, LEN) {
        report(&format!("the same on a file of nbdfuse over our export, p50, {place}"), theirs, "us", "-");
        report(&format!("first touch, ours over nbdfuse, {place}"), ours / theirs, "x", "<= 0.25");
    }
}

/// The median touch of a page of a mapped file that `nbdfuse` makes of our export.
fn nbdfuse_touch(folder: &Path, volume: Arc<Volume>, len: u64) -> Option<f64> {
    let socket = folder.join("nbd.sock");
    let mut exports = Exports::new();
    exports.add(ExportInfo { name: "v".into(), ..ExportInfo::default() }, volume).unwrap();
    let server = Server::new(exports, Limits::default(), Options::default()).unwrap();
    let server = server.listen(Listener::unix(&socket).unwrap());
    let handle = server.handle();
    let running = thread::spawn(move || server.run());
    let mount = folder.join("fuse");
    fs::create_dir(&mount).unwrap();
    let uri = format!("nbd+unix:///v?socket={}", socket.display());
    let fuse = Command::new("nbdfuse").arg(&mount).arg(uri).stderr(Stdio::null()).spawn();
    let Ok(mut fuse) = fuse else {
        println!("nbdfuse is not installed: its figure is left out");
        return None;
    };
    let file = (0..200).find_map(|_| {
        thread::sleep(Duration::from_millis(20));
        File::open(mount.join("nbd")).ok()
    });
    let touched = file.map(|file| {
        // SAFETY: a new mapping of a file of that length.
        let start = unsafe { mmap(ptr::null_mut(), len as usize, ProtFlags::READ, MapFlags::PRIVATE, file.as_fd(), 0) };
        let start = start.unwrap();
        // SAFETY: our own new mapping: no read-ahead, since ours has none for random touches either.
        unsafe { madvise(start, len as usize, Advice::Random) }.unwrap();
        let touched = median(random_touches(start.cast(), len / PAGE, 4000));
        // SAFETY: nobody uses the mapping any more.
        unsafe { rustix::mm::munmap(start.cast::<c_void>(), len as usize) }.unwrap();
        touched
    });
    let _ = Command::new("fusermount3").arg("-u").arg(&mount).status();
    let _ = fuse.wait();
    handle.stop();
    running.join().unwrap().unwrap();
    touched
}

fn sequential(folder: &Path, place: &str) {
    const LEN: u64 = 256 * MIB;
    let volume = in_tmpfs(folder, LEN);
    for (by, faults) in [("", FaultsBy::Threads), (" in the thread", FaultsBy::InThread)] {
        let per_page = (0..5).map(|_| {
            let map = volume.map(0..LEN, &MapOptions::new().faults(faults)).unwrap();
            let all = seconds(|| (0..LEN / PAGE).for_each(|page| touch(map.as_ptr(), page * PAGE)));
            all * 1e6 / (LEN / PAGE) as f64
        });
        let per_page = median(per_page.collect());
        report(&format!("sequential first touch{by}, per page, {place}"), per_page, "us", "<= 2.0");
    }
}

fn prefetch(folder: &Path) {
    const LEN: u64 = 1024 * MIB;
    let volume = in_tmpfs(folder, LEN);
    for (name, options) in [("read-only", MapOptions::new()), ("writable", writable())] {
        let rates = (0..3).map(|_| {
            let map = volume.map(0..LEN, &options).unwrap();
            LEN as f64 / seconds(|| map.prefetch(0..LEN).unwrap()) / 1e9
        });
        report(&format!("prefetch of 1 GiB, {name} map"), median(rates.collect()), "GB/s", ">= 2.5");
    }
}

/// Stores 64 bytes, writes the line back and waits.
///
/// # Safety
///
/// The 64 bytes at `line` are writable and aligned to 64; the CPU has CLWB.
unsafe fn raw_persist(line: *mut u64, value: u64) {
    for word in 0..8 {
        // SAFETY: within the line, by the contract.
        unsafe { line.add(word).write_volatile(value) };
    }
    // SAFETY: the line is mapped, and neither instruction changes memory.
    unsafe { asm!("clwb [{line}]", "sfence", line = in(reg) line, options(nostack, preserves_flags)) };
}

fn persist(folder: &Path) {
    const LEN: u64 = 64 * MIB;
    // Rounds are shorter than a time slice, so that the median is one that nobody interrupted.
    const COUNT: u64 = 2_000;
    // A neighbour on the other hardware thread of the core takes half of the reorder buffer from both.
    const CALM_ROUNDS: usize = 401;
    const ROUNDS_MAX: u64 = 10_000;
    let volume = in_tmpfs(folder, LEN);
    let map = volume.map(0..LEN, &writable()).unwrap();
    map.prefetch(0..LEN).unwrap();
    // The same lines of the same file, without the volume: nobody reads what is encrypted there.
    let file = File::options().read(true).write(true).open(folder.join("vault.img")).unwrap();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping of a file of that length.
    let raw =
        unsafe { mmap(ptr::null_mut(), LEN as usize, protection, MapFlags::SHARED, file.as_fd(), HEADER_AREA_BYTES) };
    let raw = raw.unwrap().cast::<u64>();
    for offset in (0..LEN).step_by(PAGE as usize) {
        store(&map, offset);
        map.persist(offset..offset + 64).unwrap();
        // SAFETY: within the mapping.
        unsafe { raw.byte_add(offset as usize).write_volatile(1) };
    }
    // The lines of 256 KiB in turns, as a log does, and lines far apart.
    for (name, step, span) in [("256 KiB in order", 64, 256 << 10), ("64 MiB strided", 4096 + 64, LEN)] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut disturbed = 0;
        let mut calm = Calm::new();
        for round in 0..ROUNDS_MAX {
            let calm_before = calm.now();
            let offsets = move |index| (round * COUNT + index) * step % span / 64 * 64;
            let mut next = (0..COUNT).map(offsets);
            let raw_seconds = seconds(|| {
                // SAFETY: every offset is that of a line of the mapping.
                next.by_ref().for_each(|offset| unsafe { raw_persist(raw.byte_add(offset as usize), offset) });
            });
            let mut next = (0..COUNT).map(offsets);
            let our_seconds = seconds(|| {
                next.by_ref().for_each(|offset| {
                    // SAFETY: within the map, and nobody else stores there.
                    let line = unsafe { map.as_ptr().add(offset as usize).cast::<u64>() };
                    for word in 0..8 {
                        // SAFETY: within the line.
                        unsafe { line.add(word).write_volatile(offset) };
                    }
                    map.persist(offset..offset + 64).unwrap();
                });
            });
            if !(calm_before && calm.now()) {
                disturbed += 1;
                continue;
            }
            ours.push(our_seconds * 1e9 / COUNT as f64);
            theirs.push(raw_seconds * 1e9 / COUNT as f64);
            if ours.len() == CALM_ROUNDS {
                break;
            }
        }
        println!("persist, {name}: {} undisturbed rounds count, {disturbed} do not", ours.len());
        if ours.is_empty() {
            continue;
        }
        let (ours, theirs) = (median(ours), median(theirs));
        report(&format!("persist(64 B), {name}"), ours, "ns", "-");
        report(&format!("raw CLWB + SFENCE of 64 B, {name}"), theirs, "ns", "-");
        report(&format!("persist over raw, {name}"), ours / theirs, "x", "<= 1.2");
    }
}

/// What so many threads together persist in a second, each the same word over and over, as appenders to one log do.
fn persists_per_second(map: &DaxMapping, thread_count: u64) -> f64 {
    const COUNT: u64 = 20_000;
    let took = seconds(|| {
        thread::scope(|scope| {
            for thread in 0..thread_count {
                scope.spawn(move || {
                    for count in 0..COUNT {
                        // SAFETY: the first word of a writable map, aligned; all threads use it as an atomic.
                        let word = unsafe { AtomicU64::from_ptr(map.as_ptr().cast()) };
                        word.store(thread + count, Ordering::Relaxed);
                        map.persist(0..8).unwrap();
                    }
                });
            }
        });
    });
    (thread_count * COUNT) as f64 / took
}

fn shared(folder: &Path) {
    let volume = in_tmpfs(folder, MIB);
    let map = volume.map(0..MIB, &writable()).unwrap();
    map.prefetch(0..MIB).unwrap();
    let rate = |threads| median((0..9).map(|_| persists_per_second(&map, threads)).collect());
    let one = rate(1);
    report("persist of one word by one thread", 1e9 / one, "ns", "-");
    for threads in [2, 4, 8] {
        let all = rate(threads);
        report(&format!("the same by {threads} threads, of all together"), 1e9 / all, "ns", "-");
        report(&format!("persists of {threads} threads over those of one"), all / one, "x", ">= 3 (see the head)");
    }
}

fn bulk(folder: &Path) {
    const LEN: u64 = 64 * MIB;
    let volume = in_tmpfs(folder, LEN);
    let data = vec![0x5a; LEN as usize];
    let rate = |run: &dyn Fn()| LEN as f64 / seconds(run) / 1e9;
    let (mut requests, mut writes, mut prefetches, mut stores) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..7 {
        let map = volume.map(0..LEN, &writable()).unwrap();
        requests.push(rate(&|| volume.write_at(&data, 0).unwrap()));
        writes.push(rate(&|| map.write(0, &data).unwrap()));
        prefetches.push(rate(&|| map.prefetch(0..LEN).unwrap()));
        map.evict(0..LEN).unwrap();
        // SAFETY: within a writable map that nobody else uses.
        stores.push(rate(&|| unsafe { ptr::copy_nonoverlapping(data.as_ptr(), map.as_ptr(), data.len()) }));
    }
    let [requests, writes, prefetches, stores] = [requests, writes, prefetches, stores].map(median);
    report("volume.write_at of 64 MiB beside a map", requests, "GB/s", "-");
    report("map.write of 64 MiB absent", writes, "GB/s", "-");
    report("map.write over volume.write_at", writes / requests, "x", ">= 0.5");
    report("prefetch of 64 MiB", prefetches, "GB/s", "-");
    report("stores through the pointer over 64 MiB absent", stores, "GB/s", "-");
    report("stores through the pointer over prefetch", stores / prefetches, "x", ">= 1");
    let evicted = (0..7).map(|_| {
        let map = volume.map(0..LEN, &writable()).unwrap();
        map.prefetch(0..LEN).unwrap();
        rate(&|| {
            map.evict(0..LEN).unwrap();
        })
    });
    report("eviction of 64 MiB that nobody stored to", median(evicted.collect()), "GB/s", "-");
}

fn stall(folder: &Path) {
    const LEN: u64 = 1024 * MIB;
    let volume = in_tmpfs(folder, LEN);
    let map = volume.map(0..LEN, &MapOptions::new()).unwrap();
    let mut buffer = vec![0; LEN as usize];
    let longest = thread::scope(|scope| {
        let reading = scope.spawn(|| volume.read_at(&mut buffer, 0).unwrap());
        let mut longest = 0.0_f64;
        for page in (0..LEN / PAGE).map(|index| index * 7919 % (LEN / PAGE)) {
            longest = longest.max(seconds(|| touch(map.as_ptr(), page * PAGE)));
            if reading.is_finished() {
                break;
            }
        }
        longest
    });
    report("longest first touch while 1 GiB is read", longest * 1e3, "ms", "<= 5");
}

fn redb(_: &Path) {
    let rounds: Vec<[f64; 2]> = (0..5)
        .map(|_| {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            let plain = engine::inserts_and_reads(Box::new(engine::Plain::new(folder.path())));
            let volume = in_tmpfs(folder.path(), 256 * MIB);
            let ours = engine::inserts_and_reads(Box::new(volume.map(0..256 * MIB, &writable()).unwrap()));
            [plain[0] / ours[0], plain[1] / ours[1]]
        })
        .collect();
    for (index, name) in ["inserts", "reads"].into_iter().enumerate() {
        let ratio = median(rounds.iter().map(|round| round[index]).collect());
        report(&format!("redb in a map over redb in a plain mapped file, {name}"), ratio, "x", ">= 0.9");
    }
}

/// Seconds of a sync after stores to 256 pages far apart in a map of `len` bytes.
fn sync_seconds(map: &DaxMapping, len: u64) -> f64 {
    let step = len / 256;
    (0..256).for_each(|index| store(map, index * step));
    seconds(|| map.sync().unwrap())
}

fn sync(folder: &Path) {
    for (name, resident, goal) in [("256 pages resident", false, "<= 1.5"), ("all pages resident", true, "-")] {
        let large_volume = in_tmpfs(folder, 1024 * MIB);
        let small_folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let small_volume = in_tmpfs(small_folder.path(), 64 * MIB);
        let large = large_volume.map(0..1024 * MIB, &writable()).unwrap();
        let small = small_volume.map(0..64 * MIB, &writable()).unwrap();
        if resident {
            large.prefetch(0..1024 * MIB).unwrap();
            small.prefetch(0..64 * MIB).unwrap();
        }
        sync_seconds(&large, 1024 * MIB);
        sync_seconds(&small, 64 * MIB);
        let pairs: Vec<_> =
            (0..21).map(|_| (sync_seconds(&large, 1024 * MIB), sync_seconds(&small, 64 * MIB))).collect();
        let large = median(pairs.iter().map(|pair| pair.0).collect());
        let small = median(pairs.iter().map(|pair| pair.1).collect());
        report(&format!("sync of 256 dirty pages in 1 GiB, {name}"), large * 1e6, "us", "-");
        report(&format!("the same over 64 MiB, {name}"), large / small, "x", goal);
    }
}

fn lock(folder: &Path) {
    let (mut large_seconds, mut small_seconds) = (Vec::new(), Vec::new());
    for _ in 0..7 {
        let large = volume(folder, 4096 * MIB, Granularity::CacheLine, Allocation::Sparse);
        let small_folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let small = in_tmpfs(small_folder.path(), 4 * MIB);
        (0..256).for_each(|index| large.write_zeroes(index * 16 * MIB, PAGE).unwrap()); // allocates
        let large_map = large.map(0..4096 * MIB, &writable()).unwrap();
        let small_map = small.map(0..4 * MIB, &writable()).unwrap();
        (0..256).for_each(|index| store(&large_map, index * 16 * MIB));
        (0..1024).for_each(|page| store(&small_map, page * PAGE));
        large_seconds.push(seconds(|| large.lock().unwrap()));
        small_seconds.push(seconds(|| small.lock().unwrap()));
    }
    let (large, small) = (median(large_seconds), median(small_seconds));
    report("lock, 1 MiB resident of 4 GiB", large * 1e6, "us", "-");
    report("lock, 4 MiB resident of 4 MiB", small * 1e6, "us", "-");
    report("lock, the former over the latter", large / small, "x", "<= 1.0");
}

fn page_granularity(_: &Path) {
    let parent = std::env::var_os("DAXCRYPT_BENCH_EXT4").map_or_else(|| ".".into(), std::path::PathBuf::from);
    let folder = tempfile::tempdir_in(parent).unwrap();
    let volume = volume(folder.path(), 64 * MIB, Granularity::Page, Allocation::Full);
    let map = volume.map(0..64 * MIB, &writable()).unwrap();
    let persists = (0..50).map(|index| {
        store(&map, index * 16 * PAGE);
        seconds(|| map.persist(index * 16 * PAGE..index * 16 * PAGE + 64).unwrap()) * 1e6
    });
    let persists = median(persists.collect());
    let plain = File::options().read(true).write(true).create_new(true).open(folder.path().join("plain")).unwrap();
    plain.set_len(64 * MIB).unwrap();
    let zeroes = vec![0; MIB as usize];
    (0..64).for_each(|_| std::io::Write::write_all(&mut &plain, &zeroes).unwrap());
    plain.sync_all().unwrap();
    let writes = (0..50).map(|index| {
        seconds(|| {
            std::os::unix::fs::FileExt::write_all_at(&plain, &[1; 64], index * 16 * PAGE).unwrap();
            plain.sync_data().unwrap();
        }) * 1e6
    });
    let writes = median(writes.collect());
    report("persist(64 B) at page granularity (working folder)", persists, "us", "-");
    report("the same over pwrite + fdatasync of a plain file", persists / writes, "x", "-");
}

/// A name on the command line and what it measures.
type Entry = (&'static str, fn(&Path));

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|name| !name.starts_with('-')).collect();
    let all: [Entry; 13] = [
        ("load", resident_load),
        ("touch", |_| in_both_places(first_touch)),
        ("in-thread", |_| in_both_places(in_thread::first_touch)),
        ("sequential", |_| in_both_places(sequential)),
        ("prefetch", prefetch),
        ("persist", persist),
        ("shared", shared),
        ("bulk", bulk),
        ("stall", stall),
        ("redb", redb),
        ("sync", sync),
        ("lock", lock),
        ("page", page_granularity),
    ];
    for (name, run) in all {
        if wanted.is_empty() || wanted.iter().any(|each| each == name) {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            run(folder.path());
        }
    }
}
