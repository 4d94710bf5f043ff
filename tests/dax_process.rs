//! What only a process of its own can show: signals, forks, two processes, and the end of a process without warning.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::multiple_unsafe_ops_per_block, unsafe_code)]

mod vault;

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use daxcrypt::dax::{DaxError, DaxMapping, FaultsBy, MapMode, MapOptions, Tracking};
use daxcrypt::pmem::{Access, Backing, OpenError};
use daxcrypt::volume::{Volume, VolumeError};
use vault::{DATA, PAGE, Random, Vault, child_argument, child_command, load, pattern, store, writable};

/// What the child does wrong, and the signals that may end it: after `close` the address is nobody's, so a thread that
/// comes late finds no mapping at all.
const CASES: &[(&str, &[i32])] = &[
    ("load a page that media cannot read", &[libc::SIGBUS]),
    ("load a page that media cannot read, after a sync", &[libc::SIGBUS]),
    ("load after lock", &[libc::SIGBUS]),
    ("load an eager map after lock", &[libc::SIGBUS]),
    ("load an eager map after lock without descriptors", &[libc::SIGBUS]),
    ("load in a thread while the map is dropped", &[libc::SIGBUS, libc::SIGSEGV]),
    ("wait for a page while the volume is locked", &[libc::SIGBUS]),
    ("wait to store while the volume is locked", &[libc::SIGBUS]),
    ("store to a read-only map", &[libc::SIGSEGV]),
    ("load from an exclusive map after lock", &[libc::SIGBUS]),
];

#[test]
fn wrong_touches_end_in_a_signal_and_not_in_wrong_bytes() {
    if let Some(case) = child_argument() {
        commit(&case);
        return;
    }
    for &(case, signals) in CASES {
        let mut child = child_command("wrong_touches_end_in_a_signal_and_not_in_wrong_bytes", case)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("{case}: the child hangs");
            }
            thread::sleep(Duration::from_millis(5));
        };
        assert!(status.signal().is_some_and(|signal| signals.contains(&signal)), "{case}: {status}");
    }
}

fn commit(case: &str) {
    // SAFETY: sets a limit of this process: no core files of a test that dies on purpose.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
    let (vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &writable()).unwrap();
    let truncate = || {
        let file = std::fs::OpenOptions::new().write(true).open(vault.path()).unwrap();
        file.set_len(DATA + 128 * PAGE).unwrap();
    };
    match case {
        "load a page that media cannot read" => {
            truncate();
            assert_eq!(load(&map, 127 * PAGE), pattern(127 * PAGE), "other pages are not harmed");
            load(&map, 200 * PAGE);
        }
        "load a page that media cannot read, after a sync" => {
            store(&map, 127 * PAGE, 1);
            map.sync().unwrap();
            truncate();
            load(&map, 200 * PAGE);
        }
        "load after lock" => {
            load(&map, 0);
            volume.lock().unwrap();
            load(&map, 0);
        }
        "load an eager map after lock" | "load an eager map after lock without descriptors" => {
            let eager = volume.map(0..1 << 20, &writable().eager()).unwrap();
            load(&eager, 0);
            if case.ends_with("without descriptors") {
                no_more_descriptors();
            }
            volume.lock().unwrap();
            load(&eager, 0);
        }
        "load in a thread while the map is dropped" => {
            load_for_ever(map.as_ptr().expose_provenance());
            for _ in 0..20 {
                map.evict(0..1 << 20).unwrap();
            }
            map.close().unwrap();
            thread::sleep(Duration::from_secs(30));
        }
        "wait for a page while the volume is locked" => load_while_locking(&map, &volume),
        "wait to store while the volume is locked" => {
            drop(map);
            store_in_many_threads();
        }
        "store to a read-only map" => {
            let map = volume.map(0..1 << 20, &MapOptions::new()).unwrap();
            load(&map, 0);
            // SAFETY: wrong on purpose: the map is not writable, and the kernel says so.
            unsafe { map.as_ptr().write_volatile(1) };
        }
        "load from an exclusive map after lock" => {
            drop(map);
            let map = volume.map_exclusive(0..1 << 20).unwrap();
            assert_eq!(map[0], pattern(0));
            volume.lock().unwrap();
            std::hint::black_box(map[0]);
        }
        _ => panic!("no such case: {case}"),
    }
}

fn no_more_descriptors() {
    // SAFETY: sets a limit of this process: it can open nothing from now on.
    let limited = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
    assert_eq!((limited, std::fs::File::open("/dev/null").is_err()), (0, true));
}

/// Loads from pages that come and go, in another thread, while the volume is locked.
fn load_while_locking(map: &DaxMapping, volume: &Volume) {
    thread::scope(|scope| {
        scope.spawn(|| {
            for page in 0..u64::MAX {
                load(map, page * 37 % 256 * PAGE);
            }
        });
        for _ in 0..20 {
            map.evict(0..1 << 20).unwrap();
        }
        volume.lock().unwrap();
    });
}

static STOPPED: AtomicU64 = AtomicU64::new(0);

extern "C" fn stop_this_thread(_: libc::c_int) {
    STOPPED.fetch_add(1, Ordering::SeqCst);
    loop {
        // SAFETY: waits for a signal; it may be called in a handler.
        unsafe { libc::pause() };
    }
}

/// Threads store to page after page, each of which is absent at first and write-protected then, while the volume is locked.
/// Every one of them must get its SIGBUS. The last one is that of this thread, which ends the process.
fn store_in_many_threads() {
    const THREADS: u64 = 12;
    const SIZE: u64 = 64 << 20;
    let (_vault, volume) = Vault::empty(SIZE);
    let map = volume.map(0..SIZE, &writable().trap_stores()).unwrap();
    // SAFETY: the handler touches an atomic and waits.
    unsafe { libc::signal(libc::SIGBUS, stop_this_thread as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    thread::scope(|scope| {
        for id in 0..THREADS {
            let map = &map;
            scope.spawn(move || {
                for page in (0..u64::MAX).map(|index| (index * THREADS + id) * 37 % (SIZE / PAGE)) {
                    store(map, page * PAGE, 1);
                }
            });
        }
        thread::sleep(Duration::from_millis(20));
        volume.lock().unwrap();
        while STOPPED.load(Ordering::SeqCst) < THREADS {
            thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: the default action again.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        load(&map, 0);
    });
}

#[test]
fn a_map_ends_in_order_without_descriptors() {
    const NAME: &str = "a_map_ends_in_order_without_descriptors";
    if child_argument().is_none() {
        let output = child_command(NAME, "limited").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let (_vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &writable()).unwrap();
    store(&map, 77, 0x77);
    no_more_descriptors();
    map.close().unwrap();
    assert_eq!(volume.resident_bytes(), 0);
    let mut byte = [0];
    volume.read_at(&mut byte, 77).unwrap();
    assert_eq!(byte, [0x77]);
}

/// Loads from random pages of 1 MiB at `start` in a thread that knows nothing of the map's end.
fn load_for_ever(start: usize) {
    thread::spawn(move || {
        let mut random = Random(7);
        loop {
            let at = start + random.below(1 << 20) as usize;
            // SAFETY: wrong on purpose once the map is gone: it must end in a signal.
            unsafe { std::ptr::with_exposed_provenance::<u8>(at).read_volatile() };
        }
    });
}

#[test]
fn system_calls_store_into_a_map_and_the_stores_are_found() {
    for options in [writable(), writable().trap_stores()] {
        let (vault, volume) = Vault::new(1 << 20);
        let map = volume.map(0..1 << 20, &options).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0xab; 3 * 4096]).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        load(&map, 21 * PAGE);
        // SAFETY: nobody else uses the map.
        let bytes = unsafe { map.as_mut_slice(20 * PAGE + 100..23 * PAGE + 100) };
        file.read_exact(bytes).unwrap();
        map.sync().unwrap();
        drop(map);
        drop(volume);
        let volume = Vault::open(&vault.path(), Access::ReadOnly);
        let mut back = vec![0; 3 * PAGE as usize + 2];
        volume.read_at(&mut back, 20 * PAGE + 99).unwrap();
        assert_eq!((back[0], back[back.len() - 1]), (pattern(20 * PAGE + 99), pattern(23 * PAGE + 100)));
        assert!(back[1..back.len() - 1].iter().all(|&byte| byte == 0xab));
    }
}

#[test]
fn a_second_process_is_refused_while_a_map_lives() {
    if let Some(path) = child_argument() {
        assert!(matches!(Backing::open(Path::new(&path), Access::ReadWrite), Err(OpenError::Busy)));
        assert!(matches!(Backing::open(Path::new(&path), Access::ReadOnly), Err(OpenError::Busy)));
        println!("refused");
        return;
    }
    let (vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &writable()).unwrap();
    drop(volume);
    let path = vault.path();
    let output =
        child_command("a_second_process_is_refused_while_a_map_lives", path.to_str().unwrap()).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("refused"), "{output:?}");
    store(&map, 0, 1);
    map.close().unwrap();
    drop(Vault::open(&vault.path(), Access::ReadWrite));
}

#[test]
fn without_userfaultfd_a_map_is_eager_and_says_so() {
    const NAME: &str = "without_userfaultfd_a_map_is_eager_and_says_so";
    if child_argument().is_none() {
        let output = child_command(NAME, "nobody").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let (vault, volume) = Vault::new(16 << 20);
    // SAFETY: gives up root in this process, which has no other business.
    assert_eq!(unsafe { libc::setuid(65534) }, 0, "the test begins as root");
    let old = || writable().as_on_kernel(5, 10);
    let map = volume.map(0..1 << 20, &old()).unwrap();
    assert_eq!((map.mode(), map.tracking()), (MapMode::Eager, Tracking::Compare));
    assert_eq!(volume.resident_bytes(), 1 << 20);
    assert!(map.memory_locked(), "1 MiB is within RLIMIT_MEMLOCK");
    let large = volume.map(0..16 << 20, &MapOptions::new().as_on_kernel(5, 10)).unwrap();
    assert!(!large.memory_locked(), "16 MiB are not");
    drop(large);
    assert!(matches!(volume.map(0..1 << 20, &old().resident_max(4096)), Err(DaxError::Eager { .. })));
    assert_eq!(load(&map, 4097), pattern(4097));
    store(&map, 4097, 0xcc);
    volume.write_at(&[0xdd], 4098).unwrap();
    assert_eq!(load(&map, 4098), 0xdd);
    map.close().unwrap();
    let mut bytes = [0; 2];
    volume.read_at(&mut bytes, 4097).unwrap();
    assert_eq!(bytes, [0xcc, 0xdd]);
    drop(vault);
}

const WORDS: u64 = 64;

/// Counts in words of different pages: each count is persisted before it is told.
fn count(path: &Path) {
    let volume = Vault::open(path, Access::ReadWrite);
    // In turns: the number of the process is one as good as another.
    let by = if std::process::id().is_multiple_of(2) { FaultsBy::InThread } else { FaultsBy::Threads };
    let map = volume.map(0..volume.size(), &writable().resident_max(256 << 10).faults(by)).unwrap();
    let mut out = std::io::stdout().lock();
    let mut random = Random(std::process::id().into());
    loop {
        let index = random.below(WORDS);
        let offset = index * 7 * PAGE + 8 * (index % 500);
        // SAFETY: the word is aligned and within the map.
        let word = unsafe { AtomicU64::from_ptr(map.as_ptr().add(offset as usize).cast()) };
        let value = word.fetch_add(1, Ordering::Relaxed) + 1;
        map.persist(offset..offset + 8).unwrap();
        writeln!(out, "{index} {value}").unwrap();
    }
}

#[test]
fn what_was_persisted_survives_kill_9() {
    const NAME: &str = "what_was_persisted_survives_kill_9";
    if let Some(path) = child_argument() {
        count(Path::new(&path));
        return;
    }
    let (vault, volume) = Vault::empty(WORDS * 7 * PAGE);
    volume.write_zeroes(0, volume.size()).unwrap();
    drop(volume);
    let mut told = [0; WORDS as usize];
    for round in 0..12_u64 {
        let mut child = child_command(NAME, vault.path().to_str().unwrap()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut line_count = 0;
        let mut take = |line: &str| {
            let Some((index, value)) = line.split_once(' ') else { return };
            let (Ok(index), Ok(value)) = (index.parse::<usize>(), value.parse::<u64>()) else { return };
            told[index] = value;
        };
        for line in lines.by_ref() {
            take(&line);
            line_count += 1;
            if line_count > 300 * (round + 1) {
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // A line goes into the pipe by one write, so the last one is whole too.
        lines.for_each(|line| take(&line));
        let volume = Vault::open(&vault.path(), Access::ReadOnly);
        for (index, &expected) in told.iter().enumerate() {
            let offset = index as u64 * 7 * PAGE + 8 * (index as u64 % 500);
            let mut word = [0; 8];
            volume.read_at(&mut word, offset).unwrap();
            let found = u64::from_le_bytes(word);
            assert!(
                found == expected || found == expected + 1,
                "round {round}, word {index}: {found} after {expected}"
            );
        }
    }
}

/// A child is forked while threads of its parent make and end volumes and maps, and then does the same: whatever was held in
/// the parent at that moment, the child waits for none of it.
#[test]
fn a_child_that_is_forked_while_maps_come_and_go_has_maps_of_its_own() {
    const NAME: &str = "a_child_that_is_forked_while_maps_come_and_go_has_maps_of_its_own";
    if child_argument().is_none() {
        let output = child_command(NAME, "apart").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let (_vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &writable()).unwrap();
    let stop = AtomicBool::new(false);
    let mut failed = None;
    thread::scope(|scope| {
        for _ in 0..3 {
            let (volume, stop) = (&volume, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let map = volume.map(0..PAGE, &writable().faults(FaultsBy::InThread)).unwrap();
                    volume.read_at(&mut [0; 8], 0).unwrap();
                    map.close().unwrap();
                }
            });
        }
        for round in 0..200 {
            // SAFETY: the child has memory, descriptors and this thread, which is all that it uses.
            match unsafe { libc::fork() } {
                0 => {
                    // SAFETY: ends this process if it hangs.
                    unsafe { libc::alarm(20) };
                    let refused = matches!(volume.read_at(&mut [0], 0), Err(VolumeError::Forked))
                        && matches!(map.persist(0..8), Err(DaxError::Volume(VolumeError::Forked)));
                    // SAFETY: ends the child without the destructors of its parent's threads.
                    unsafe { libc::_exit(i32::from(!(refused && map_of_its_own()))) }
                }
                pid => {
                    let mut status = 0;
                    // SAFETY: waits for the child; the status is a local.
                    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
                    if status != 0 {
                        failed = Some((round, status));
                        break;
                    }
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(failed, None, "the round and the status of the child; 14 is one that hung");
    map.close().unwrap();
}

fn map_of_its_own() -> bool {
    let own = std::sync::Arc::new(Volume::ephemeral(1 << 20).unwrap());
    let map = own.map(0..1 << 20, &writable().faults(FaultsBy::InThread)).unwrap();
    store(&map, 5 * PAGE, 0x55);
    let mut byte = [0];
    own.read_at(&mut byte, 5 * PAGE).unwrap();
    // SAFETY: nobody else uses the map.
    own.read_at(unsafe { map.as_mut_slice(6 * PAGE..6 * PAGE + 1) }, 5 * PAGE).unwrap();
    byte == [0x55] && load(&map, 6 * PAGE) == 0x55 && map.close().is_ok()
}
