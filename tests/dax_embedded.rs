//! Direct maps in programs that were not written around them: they fork, become daemons, lock all memory, swap, run out of
//! descriptors, address space and file size, wait for signals with `sigwait`, log into something that panics, and read
//! memory that is not theirs to touch. Each case is a process of its own.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::multiple_unsafe_ops_per_block,
    clippy::undocumented_unsafe_blocks,
    unsafe_code
)]

mod vault;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use daxcrypt::dax::{DaxError, DaxMapping, MapMode, MapOptions, Tracking};
use daxcrypt::namespace::{KdfCost, UpdateError};
use daxcrypt::pmem::{Access, Allocation, Backing, MediaError, OpenError};
use daxcrypt::volume::{Volume, VolumeError};
use vault::{DATA, PAGE, Vault, child_argument, child_command, credential, load, pattern, store, writable};

const SIZE: u64 = 1 << 20;

/// Runs `case` in a process of its own, which must end well and soon.
fn in_a_process(name: &str, case: impl FnOnce()) {
    if child_argument().is_some() {
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
        return case();
    }
    let mut child = child_command(name, "case").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{name} hangs: {:?}", child.wait_with_output().unwrap());
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{name}: {output:?}");
}

/// Runs `body` in a fork of this process, which must end by itself: 0 for well, a signal's number otherwise.
fn fork(body: impl FnOnce()) -> i32 {
    match unsafe { libc::fork() } {
        0 => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
        pid => {
            let (mut status, deadline) = (0, Instant::now() + Duration::from_secs(60));
            while unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } == 0 {
                assert!(Instant::now() < deadline, "the fork hangs {}", unsafe { libc::kill(pid, libc::SIGKILL) });
                thread::sleep(Duration::from_millis(1));
            }
            if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
        }
    }
}

fn is_forked<T>(result: &Result<T, VolumeError>) -> bool {
    matches!(result, Err(VolumeError::Forked))
}

fn is_forked_map<T>(result: &Result<T, DaxError>) -> bool {
    matches!(result, Err(DaxError::Volume(VolumeError::Forked)))
}

#[test]
fn a_forked_child_is_refused_everywhere_and_changes_nothing() {
    in_a_process("a_forked_child_is_refused_everywhere_and_changes_nothing", || {
        let (vault, volume) = Vault::new(SIZE);
        volume.mark_in_use().unwrap();
        let map = volume.map(0..SIZE, &MapOptions::new().writable()).unwrap();
        let exclusive = Arc::new(Volume::ephemeral(SIZE).unwrap());
        let slice = exclusive.map_exclusive(0..SIZE).unwrap();
        store(&map, 5, 0x55);
        let before = fs::read(vault.path()).unwrap();
        let ended = fork(|| {
            let mut bytes = [0xaa; 32];
            assert!(is_forked(&volume.read_at(&mut bytes, 0)) && bytes == [0xaa; 32]);
            assert!(is_forked(&volume.write_at(&[1; 32], 0)));
            assert!(is_forked(&volume.write_once(&[1; 4096], 0, &mut Vec::new())));
            assert!(is_forked(&volume.read_once(&mut bytes, 0, &mut Vec::new())));
            assert!(is_forked(&volume.write_zeroes(0, 4096)));
            assert!(is_forked(&volume.punch_zeroes(0, 4096)));
            assert!(is_forked(&volume.discard(0, 4096)));
            assert!(is_forked(&volume.extents(0, 4096, 1)));
            assert!(is_forked(&volume.persist(0..32)));
            assert!(is_forked(&volume.flush()));
            assert!(is_forked(&volume.mark_in_use()));
            assert!(is_forked(&volume.mark_closed()));
            assert!(is_forked(&volume.resize(SIZE / 2, true)));
            assert!(is_forked(&volume.lock()));
            assert!(volume.transform_step(1 << 20).is_err());
            assert!(is_forked_map(&volume.map(0..SIZE, &writable())));
            assert!(is_forked_map(&exclusive.map_exclusive(0..SIZE)));
            assert!(is_forked_map(&map.read(0, &mut bytes)));
            assert!(is_forked_map(&map.write(0, &[1])));
            assert!(is_forked_map(&map.zero(0..9)));
            assert!(is_forked_map(&map.copy_within(0..9, 100)));
            assert!(is_forked_map(&map.persist(0..9)));
            assert!(is_forked_map(&map.flush(0..9)));
            assert!(is_forked_map(&map.drain()));
            assert!(is_forked_map(&map.sync()), "it would take the parent's marks");
            assert!(is_forked_map(&map.prefetch(0..SIZE)));
            assert!(is_forked_map(&map.evict(0..SIZE)));
            assert!(is_forked_map(&slice.persist(0..9)));
            assert!(is_forked_map(&slice.flush(0..9)) && is_forked_map(&slice.evict(0..9)));
            assert!(is_forked_map(&map.write_persist(0, &[1])));
            assert!(is_forked_map(&map.persist_at(map.as_ptr(), 9)));
            assert!(is_forked_map(&map.atomic_u64(0)) && is_forked_map(&map.atomic_u32(0)));
            let part = map.part(PAGE..SIZE).unwrap();
            assert!(is_forked_map(&part.write_persist(0, &[1])) && is_forked_map(&part.atomic_u64(0)));
            assert!(is_forked_map(&exclusive.map_exclusive_with(0..SIZE, &writable())));
            assert!(is_forked_map(&exclusive.map_frozen(0..SIZE, &writable())));
            assert!(Volume::open(vault.path(), &credential()).is_err(), "the parent has it");
            let text = volume.flush().unwrap_err().to_string();
            assert!(text.contains("open it again in this process"), "{text}");
            let backing = volume.backing();
            assert!(matches!(backing.write(0..9, |_| ()), Err(MediaError::Forked)));
            assert!(matches!(backing.sync_all(), Err(MediaError::Forked)));
            // What was opened after the fork is the child's own.
            let own = Volume::ephemeral(SIZE).unwrap();
            own.write_at(&[7; 9], 100).unwrap();
            own.read_at(&mut bytes[..9], 100).unwrap();
            assert_eq!(bytes[..9], [7; 9]);
            // Ends of what was inherited neither write nor abort, nor stop the parent's threads.
            drop(of_the_child(&slice));
            assert!(is_forked_map(&of_the_child(&map).close()));
            drop((of_the_child(&volume), of_the_child(&exclusive)));
        });
        assert_eq!(ended, 0);
        assert!(fs::read(vault.path()).unwrap() == before, "the child has written");
        assert_eq!((load(&map, 5), load(&map, 200 * PAGE)), (0x55, pattern(200 * PAGE)), "faults are still answered");
        map.close().unwrap();
        drop(slice);
    });
}

/// What the child has of a value of the parent, to be dropped in the child; the parent keeps its own.
fn of_the_child<T>(value: &T) -> T {
    unsafe { std::ptr::read(value) }
}

#[test]
fn a_parent_keeps_its_marks_and_threads_after_a_fork() {
    in_a_process("a_parent_keeps_its_marks_and_threads_after_a_fork", || {
        for options in [MapOptions::new().writable(), writable().trap_stores()] {
            let (vault, volume) = Vault::new(SIZE);
            let map = volume.map(0..SIZE, &options).unwrap();
            for page in 0..64 {
                store(&map, page * PAGE, 0x99);
            }
            let ended = fork(|| {
                assert!(is_forked_map(&map.sync()));
                drop(of_the_child(&map));
            });
            assert_eq!(ended, 0);
            for page in 64..128 {
                assert_eq!(load(&map, page * PAGE), pattern(page * PAGE), "faults are still answered");
                store(&map, page * PAGE, 0x99);
            }
            map.sync().unwrap();
            let reopened = read_back(&vault, volume, map);
            assert!((0..128).all(|page| reopened[(page * PAGE) as usize] == 0x99));
        }
    });
}

/// Leaves the map without a sync and reads what is on media.
fn read_back(vault: &Vault, volume: Arc<Volume>, map: DaxMapping) -> Vec<u8> {
    let copy = vault.dir.path().join("copy.img");
    fs::copy(vault.path(), &copy).unwrap();
    let on_media = Vault::open(&copy, Access::ReadOnly);
    let mut bytes = vec![0; volume.size() as usize];
    on_media.read_at(&mut bytes, 0).unwrap();
    drop((on_media, map, volume));
    fs::remove_file(copy).unwrap();
    bytes
}

#[test]
fn a_child_cannot_change_the_header_with_a_key_it_does_not_have() {
    in_a_process("a_child_cannot_change_the_header_with_a_key_it_does_not_have", || {
        let (vault, volume) = Vault::new(SIZE);
        let mut namespace = Arc::try_unwrap(volume).unwrap().into_namespace().unwrap();
        let before = fs::read(vault.path()).unwrap();
        let ended = fork(|| {
            assert!(namespace.set_unclean(true).is_err());
            let added = namespace.add_slot(None, "child", &credential(), KdfCost::default());
            assert!(matches!(added, Err(UpdateError::Write(_))), "{added:?}");
            let volume = Volume::new(namespace, daxcrypt::xts::Backend::detect());
            assert!(is_forked(&volume.write_at(&[1; 16], 0)));
        });
        assert_eq!(ended, 0);
        assert!(fs::read(vault.path()).unwrap() == before);
        drop(vault);
    });
}

#[test]
fn a_daemon_opens_after_its_fork_and_is_told_so_when_it_did_not() {
    in_a_process("a_daemon_opens_after_its_fork_and_is_told_so_when_it_did_not", || {
        let (vault, volume) = Vault::new(SIZE);
        let (reader, writer) = io::pipe().unwrap();
        // The first child ends at once, as the parent of a daemon does; the daemon goes on as a grandchild.
        assert_eq!(
            fork(|| {
                unsafe { libc::setsid() };
                if unsafe { libc::fork() } == 0 {
                    let refused = is_forked(&volume.write_at(&[1; 16], 0));
                    drop(volume);
                    let path = vault.dir.path().join("own.img");
                    let backing = Backing::create(&path, 8 << 20, Allocation::Full).unwrap();
                    let options = daxcrypt::namespace::FormatOptions::default();
                    drop(daxcrypt::namespace::format(Arc::new(backing), options, &credential()).unwrap());
                    let own = Vault::open(&path, Access::ReadWrite);
                    let map = own.map(0..SIZE, &writable()).unwrap();
                    store(&map, 0, 1);
                    map.close().unwrap();
                    io::Write::write_all(&mut &writer, &[u8::from(refused)]).unwrap();
                    unsafe { libc::_exit(0) };
                }
            }),
            0
        );
        let mut told = [9];
        io::Read::read_exact(&mut &reader, &mut told).unwrap();
        assert_eq!(told, [1]);
        drop(reader);
    });
}

const MADV_PAGEOUT: libc::c_int = 21;

/// A file to swap to, in use as long as this lives.
struct Swap {
    path: PathBuf,
}

impl Swap {
    fn on() -> Self {
        let path = std::env::temp_dir().join(format!("daxcrypt-swap-{}", std::process::id()));
        fs::write(&path, vec![0; 64 << 20]).unwrap();
        Command::new("chmod").arg("600").arg(&path).status().unwrap();
        assert!(Command::new("mkswap").arg(&path).stdout(Stdio::null()).status().unwrap().success());
        assert!(Command::new("swapon").arg(&path).status().unwrap().success(), "the test runs as root");
        Self { path }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(&self.path).status();
        let _ = fs::remove_file(&self.path);
    }
}

/// Has the kernel swap the map out. How many pages are in the page table no more.
fn swap_out(map: &DaxMapping) -> usize {
    let (start, len) = (map.as_ptr().cast(), map.len() as usize);
    unsafe { libc::munlock(start, len) };
    assert_eq!(unsafe { libc::madvise(start, len, MADV_PAGEOUT) }, 0, "{}", io::Error::last_os_error());
    let mut entries = vec![0_u8; len / PAGE as usize * 8];
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, start.addr() as u64 / PAGE * 8).unwrap();
    entries.chunks(8).filter(|entry| entry[7] & 0x80 == 0).count()
}

#[test]
fn stores_survive_being_swapped_out() {
    let _swap = child_argument().is_none().then(Swap::on);
    in_a_process("stores_survive_being_swapped_out", || {
        const PAGES: u64 = 1024;
        let comes_back = |map: &DaxMapping| (0..PAGES).for_each(|page| assert_eq!(load(map, page * PAGE + 8), 0x77));
        let neighbours_go = |map: &DaxMapping| {
            assert!(map.evict(PAGES * PAGE..2 * PAGES * PAGE).unwrap() > 0);
        };
        type Then<'a> = &'a dyn Fn(&DaxMapping);
        let cases: [(&str, Then<'_>); 3] =
            [("comes back by loads", &comes_back), ("stays out", &|_| {}), ("neighbours are evicted", &neighbours_go)];
        for (name, then) in cases {
            for options in [writable(), writable().trap_stores()] {
                let (vault, volume) = Vault::new(2 * PAGES * PAGE);
                let map = volume.map(0..2 * PAGES * PAGE, &options).unwrap();
                // Clean pages among them, so that marks of both kinds are there.
                assert!((0..2 * PAGES).all(|page| load(&map, page * PAGE) == pattern(page * PAGE)));
                map.sync().unwrap();
                (0..PAGES).for_each(|page| store(&map, page * PAGE + 8, 0x77));
                let out = swap_out(&map);
                assert!(out > PAGES as usize / 2, "{name}: only {out} pages were swapped out");
                then(&map);
                map.sync().unwrap();
                let bytes = read_back(&vault, volume, map);
                let lost = (0..PAGES).filter(|page| bytes[(page * PAGE + 8) as usize] != 0x77).count();
                assert_eq!(lost, 0, "{name}, {options:?}: stores that sync did not find");
            }
        }
    });
}

/// What a program sees and stores through a map, and what is on media then.
fn is_right(vault: &Vault, volume: Arc<Volume>, map: DaxMapping) {
    for page in 0..SIZE / PAGE {
        assert_eq!(load(&map, page * PAGE + 3), pattern(page * PAGE + 3), "page {page}");
    }
    store(&map, 9 * PAGE, 0xe1);
    map.persist(9 * PAGE..9 * PAGE + 1).unwrap();
    store(&map, 11 * PAGE, 0xe2);
    map.close().unwrap();
    drop(volume);
    let volume = Vault::open(&vault.path(), Access::ReadOnly);
    for (offset, expected) in [(9 * PAGE, 0xe1), (11 * PAGE, 0xe2), (12 * PAGE, pattern(12 * PAGE))] {
        let mut byte = [0];
        volume.read_at(&mut byte, offset).unwrap();
        assert_eq!(byte, [expected]);
    }
}

#[test]
fn locking_all_memory_before_a_map_shows_no_zeroes() {
    in_a_process("locking_all_memory_before_a_map_shows_no_zeroes", || {
        assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) }, 0);
        for options in [writable(), writable().trap_stores(), writable().eager()] {
            let (vault, volume) = Vault::new(SIZE);
            let map = volume.map(0..SIZE, &options).unwrap();
            is_right(&vault, volume, map);
        }
    });
}

#[test]
fn locking_all_memory_after_a_map_shows_no_zeroes() {
    in_a_process("locking_all_memory_after_a_map_shows_no_zeroes", || {
        for options in [writable(), writable().trap_stores(), writable().eager()] {
            let (vault, volume) = Vault::new(SIZE);
            let map = volume.map(0..SIZE, &options).unwrap();
            let part = volume.map(0..4 * PAGE, &options).unwrap();
            assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT) }, 0);
            drop(part);
            map.evict(0..SIZE).unwrap();
            assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT) }, 0);
            is_right(&vault, volume, map);
            unsafe { libc::munlockall() };
        }
    });
}

/// Where memory of windows is mapped.
fn window_mappings() -> Vec<(u64, u64)> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let windows = maps.lines().filter(|line| line.contains("memfd:daxcrypt-window"));
    let parse = |line: &str| {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap())
    };
    windows.map(parse).collect()
}

#[test]
fn readers_of_a_process_leave_no_zeroes_in_its_maps() {
    in_a_process("readers_of_a_process_leave_no_zeroes_in_its_maps", || {
        for with_process_vm in [false, true] {
            let (vault, volume) = Vault::new(SIZE);
            let map = volume.map(0..SIZE, &writable()).unwrap();
            let memory = File::open("/proc/self/mem").unwrap();
            assert_eq!(window_mappings().len(), 2);
            for (start, end) in window_mappings() {
                for at in (start..end).step_by(PAGE as usize) {
                    let mut page = [0_u8; PAGE as usize];
                    if with_process_vm {
                        let local = libc::iovec { iov_base: page.as_mut_ptr().cast(), iov_len: page.len() };
                        let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: page.len() };
                        unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
                    } else {
                        let _ = memory.read_at(&mut page, at);
                    }
                }
            }
            is_right(&vault, volume, map);
        }
    });
}

#[test]
fn huge_pages_of_shared_memory_bring_no_zeroes() {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    struct Restore(String);
    impl Drop for Restore {
        fn drop(&mut self) {
            let _ = fs::write(SETTING, &self.0);
        }
    }
    let _restore = child_argument().is_none().then(|| {
        let all = fs::read_to_string(SETTING).unwrap();
        let now = all.split(['[', ']']).nth(1).unwrap().to_owned();
        fs::write(SETTING, "always").unwrap();
        Restore(now)
    });
    in_a_process("huge_pages_of_shared_memory_bring_no_zeroes", || {
        for options in [writable(), writable().eager(), writable().trap_stores()] {
            let (vault, volume) = Vault::new(8 << 20);
            let part = volume.map(2 << 20..3 << 20, &writable().eager()).unwrap();
            let map = volume.map(0..8 << 20, &options).unwrap();
            for page in (0..8 << 20).step_by(PAGE as usize) {
                assert_eq!(load(&map, page + 3), pattern(page + 3), "{options:?}");
            }
            map.close().unwrap();
            drop((part, vault));
        }
    });
}

#[test]
fn a_log_that_panics_ends_in_sigbus_and_an_error_and_not_in_a_wait_for_ever() {
    in_a_process("a_log_that_panics_ends_in_sigbus_and_an_error_and_not_in_a_wait_for_ever", || {
        // Before the library has its own, which passes on what is not its own.
        unsafe { libc::signal(libc::SIGBUS, end_this_thread as extern "C" fn(libc::c_int) as libc::sighandler_t) };
        tracing_subscriber::fmt().with_writer(|| -> io::Stderr { panic!("the log is full") }).init();
        let (vault, volume) = Vault::new(SIZE);
        drop(volume);
        let volume = Vault::open(&vault.path(), Access::ReadWrite);
        let map = volume.map(0..SIZE, &writable()).unwrap();
        store(&map, 5, 0x55);
        let (_other_vault, other_volume) = Vault::new(SIZE);
        let other = other_volume.map(0..SIZE, &writable()).unwrap();
        File::options().write(true).open(vault.path()).unwrap().set_len(DATA + SIZE / 2).unwrap();
        // A page that media cannot read is logged, by the thread that every other touch needs.
        for offset in [200 * PAGE, 20 * PAGE, 21 * PAGE] {
            assert_eq!(touch_in_a_thread(&map, offset), libc::SIGBUS, "offset {offset}");
        }
        assert!(matches!(map.prefetch(0..PAGE), Err(DaxError::FaultThread)));
        assert!((0..SIZE).step_by(PAGE as usize).all(|at| load(&other, at) == pattern(at)), "other maps go on");
        let told = map.close();
        assert!(told.is_err());
        let mut byte = [0];
        volume.read_at(&mut byte, 5).unwrap();
        assert_eq!(byte, [0x55], "what was stored before is on media");
    });
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn end_this_thread(signal: libc::c_int) {
    CAUGHT.store(signal as u64, Ordering::SeqCst);
    loop {
        unsafe { libc::pause() };
    }
}

/// Loads a byte in a thread of its own: the signal that it got, which stops that thread for good.
fn touch_in_a_thread(map: &DaxMapping, offset: u64) -> i32 {
    CAUGHT.store(0, Ordering::SeqCst);
    let at = map.as_ptr().expose_provenance() + offset as usize;
    thread::spawn(move || unsafe { std::ptr::with_exposed_provenance::<u8>(at).read_volatile() });
    while CAUGHT.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    CAUGHT.load(Ordering::SeqCst) as i32
}

#[test]
fn a_map_without_address_space_is_an_error() {
    in_a_process("a_map_without_address_space_is_an_error", || {
        let (_vault, volume) = Vault::new(SIZE);
        let limit = |bytes| {
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
        };
        drop(volume.map(0..SIZE, &writable()).unwrap()); // what is made once is there
        let (mut refused, mut made) = (0, 0);
        for step in 0..120 {
            let pages = fs::read_to_string("/proc/self/statm").unwrap();
            let used = pages.split(' ').next().unwrap().parse::<u64>().unwrap() * PAGE;
            limit(used + step * (64 << 10));
            let map = volume.map(0..SIZE, &MapOptions::new().writable());
            limit(libc::RLIM_INFINITY);
            match map {
                Ok(map) => {
                    assert_eq!((map.mode(), load(&map, 3)), (MapMode::Lazy, pattern(3)));
                    made += 1;
                }
                Err(DaxError::Os(_) | DaxError::Volume(VolumeError::Window(_))) => refused += 1,
                Err(error) => panic!("{error:?}"),
            }
        }
        assert!(refused > 3 && made > 3, "{refused} refused, {made} made");
    });
}

#[test]
fn a_map_without_descriptors_is_an_error_and_never_eager() {
    in_a_process("a_map_without_descriptors_is_an_error_and_never_eager", || {
        let (_vault, volume) = Vault::new(SIZE);
        let (mut refused, mut made) = (0, 0);
        for more in 0..16 {
            let first_free = File::open("/dev/null").unwrap().as_raw_fd() as u64;
            let limit = libc::rlimit { rlim_cur: first_free + more, rlim_max: 4096 };
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
            match volume.map(0..SIZE, &writable()) {
                Ok(map) => {
                    assert_eq!((map.mode(), map.tracking()), (MapMode::Lazy, Tracking::Async));
                    made += 1;
                }
                Err(DaxError::Os(error) | DaxError::Volume(VolumeError::Window(error))) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
                    assert_eq!(volume.resident_bytes(), 0);
                    refused += 1;
                }
                Err(error) => panic!("{error:?}"),
            }
            let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 4096 };
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
        }
        assert!(refused >= 4 && made >= 4, "{refused} refused, {made} made");
    });
}

#[test]
fn a_program_that_waits_for_its_signals_gets_them() {
    in_a_process("a_program_that_waits_for_its_signals_gets_them", || {
        let (_vault, volume) = Vault::new(SIZE);
        let map = volume.map(0..SIZE, &MapOptions::new().writable()).unwrap();
        let is_ours = |(name, _): &(String, u64)| name.starts_with("daxcrypt-");
        assert_eq!(thread_masks().into_iter().filter(is_ours).count(), 3);
        for (name, blocked) in thread_masks().into_iter().filter(is_ours) {
            for signal in [libc::SIGTERM, libc::SIGUSR1, libc::SIGALRM, libc::SIGINT, libc::SIGHUP] {
                assert!(blocked & (1 << (signal - 1)) != 0, "{name} takes signal {signal}");
            }
        }
        // A thread that has just begun blocks everything until it is set up.
        let deadline = Instant::now() + Duration::from_secs(60);
        let own_faults = [libc::SIGSEGV, libc::SIGBUS].iter().fold(0, |mask, signal| mask | 1 << (signal - 1));
        while thread_masks().into_iter().filter(is_ours).any(|(_, blocked)| blocked & own_faults != 0) {
            assert!(Instant::now() < deadline, "SIGSEGV and SIGBUS stay blocked");
            thread::yield_now();
        }
        let before = own_mask();
        drop(volume.map(0..SIZE, &MapOptions::new().writable()).unwrap());
        assert_eq!(own_mask(), before, "the program's own mask is as it was");
        drop(map);
    });
}

/// Names and blocked signals of the threads of this process.
fn thread_masks() -> Vec<(String, u64)> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let mask = |task: PathBuf| {
        let status = fs::read_to_string(task.join("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        (field("Name:"), u64::from_str_radix(&field("SigBlk:"), 16).unwrap())
    };
    tasks.map(|task| mask(task.unwrap().path())).collect()
}

fn own_mask() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap()
}

#[test]
fn two_volumes_that_read_into_each_others_maps_never_wait_for_ever() {
    in_a_process("two_volumes_that_read_into_each_others_maps_never_wait_for_ever", || {
        let volumes = [0, 1].map(|_| Vault::new(SIZE));
        for _ in 0..20 {
            let mut maps = volumes.each_ref().map(|(_, volume)| volume.map_exclusive(0..SIZE).unwrap());
            let [map_a, map_b] = &mut maps;
            thread::scope(|scope| {
                scope.spawn(|| volumes[0].1.read_at(map_b, 0).unwrap());
                scope.spawn(|| volumes[1].1.read_at(map_a, 0).unwrap());
            });
            assert!(maps.iter().all(|map| map.iter().zip(0..).all(|(&byte, offset)| byte == pattern(offset))));
        }
        // Disjoint halves of one volume, and writes.
        let (_vault, volume) = Vault::new(2 * SIZE);
        for round in 0..20 {
            let mut low = volume.map_exclusive(0..SIZE).unwrap();
            let mut high = volume.map_exclusive(SIZE..2 * SIZE).unwrap();
            thread::scope(|scope| {
                scope.spawn(|| volume.read_at(&mut high, 0).unwrap());
                scope.spawn(|| volume.read_at(&mut low, SIZE).unwrap());
            });
            drop((low, high));
            let shared = volume.map(0..2 * SIZE, &writable()).unwrap();
            let other = Volume::ephemeral(2 * SIZE).map(Arc::new).unwrap();
            let others = other.map(0..2 * SIZE, &writable()).unwrap();
            // SAFETY: whatever the bytes are, they are only moved.
            let [into_shared, into_others] =
                unsafe { [shared.as_mut_slice(0..2 * SIZE), others.as_mut_slice(0..2 * SIZE)] };
            thread::scope(|scope| {
                scope.spawn(|| volume.write_at(&into_others[..SIZE as usize], 0).unwrap());
                scope.spawn(|| other.write_at(&into_shared[..SIZE as usize], 0).unwrap());
                scope.spawn(|| shared.write(round, &into_others[..SIZE as usize]).unwrap());
                scope.spawn(|| shared.evict(0..2 * SIZE).unwrap());
                scope.spawn(|| others.evict(0..2 * SIZE).unwrap());
            });
        }
    });
}

#[test]
fn a_small_limit_of_file_sizes_is_an_error_and_no_signal() {
    in_a_process("a_small_limit_of_file_sizes_is_an_error_and_no_signal", || {
        let (vault, volume) = Vault::new(SIZE);
        let limit = libc::rlimit { rlim_cur: SIZE / 2, rlim_max: libc::RLIM_INFINITY };
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
        let map = volume.map(0..SIZE, &writable());
        assert!(
            matches!(&map, Err(DaxError::Volume(VolumeError::Window(error))) if error.to_string().contains("ulimit -f"))
        );
        let created = Backing::create(&vault.dir.path().join("large"), 8 << 20, Allocation::Sparse);
        assert!(matches!(created, Err(OpenError::Io(error)) if error.to_string().contains("ulimit -f")));
        assert!(matches!(volume.backing().grow(16 << 20, Allocation::Sparse), Err(MediaError::Io(_))));
        volume.write_once(&[3; 8192], SIZE - 8192, &mut Vec::new()).unwrap();
        volume.write_at(&[4; 9], SIZE - 9).unwrap();
        volume.flush().unwrap();
        let part = volume.map_exclusive(SIZE / 2..SIZE / 2 + 4 * PAGE).unwrap();
        assert_eq!(part[0], pattern(SIZE / 2), "an exclusive map needs memory for its own bytes only");
    });
}

#[test]
fn an_exclusive_map_takes_address_space_of_its_own_size() {
    in_a_process("an_exclusive_map_takes_address_space_of_its_own_size", || {
        const LARGE: u64 = 1 << 40;
        let volume = Arc::new(Volume::ephemeral(LARGE).unwrap());
        let used = || {
            let pages = fs::read_to_string("/proc/self/statm").unwrap();
            pages.split(' ').next().unwrap().parse::<u64>().unwrap() * PAGE
        };
        let before = used();
        let mut map = volume.map_exclusive(LARGE - 16 * PAGE..LARGE).unwrap();
        assert!(used() - before < 1 << 30, "{} bytes of address space", used() - before);
        map[5] = 5;
        map.close().unwrap();
        let mut byte = [0];
        volume.read_at(&mut byte, LARGE - 16 * PAGE + 5).unwrap();
        assert_eq!(byte, [5]);
    });
}

#[test]
fn empty_ranges_do_nothing_and_reversed_ones_are_errors() {
    let (_vault, volume) = Vault::new(SIZE);
    let map = volume.map(0..SIZE, &writable()).unwrap();
    assert!((0..64).all(|page| load(&map, page * PAGE) == pattern(page * PAGE)));
    type Call<'a> = &'a dyn Fn(std::ops::Range<u64>) -> bool;
    let part = map.part(0..SIZE).unwrap();
    let calls: [(&str, Call<'_>); 10] = [
        ("persist", &|range| map.persist(range).is_ok()),
        ("flush", &|range| map.flush(range).is_ok()),
        ("prefetch", &|range| map.prefetch(range).is_ok()),
        ("zero", &|range| map.zero(range).is_ok()),
        ("copy_within", &|range| map.copy_within(range, 7).is_ok()),
        ("evict", &|range| map.evict(range).is_ok_and(|bytes| bytes == 0)),
        ("part.persist", &|range| part.persist(range).is_ok()),
        ("part.zero", &|range| part.zero(range).is_ok()),
        ("part.prefetch", &|range| part.prefetch(range).is_ok()),
        ("Volume::persist", &|range| volume.persist(range).is_ok()),
    ];
    let resident = volume.resident_bytes();
    for (name, call) in calls {
        for at in [0, 1, PAGE, PAGE + 5, SIZE] {
            assert!(call(at..at), "{name}: an empty range at {at}");
        }
        #[allow(clippy::reversed_empty_ranges)]
        for reversed in [1..0, PAGE..PAGE - 1, SIZE..0, u64::MAX..0] {
            assert!(!call(reversed.clone()), "{name}: {reversed:?}");
        }
        assert!(!call(SIZE + 1..SIZE + 1), "{name}: an empty range outside");
    }
    assert_eq!(volume.resident_bytes(), resident);
}

#[test]
fn two_volumes_over_one_open_backing_are_refused() {
    use daxcrypt::namespace::{FormatOptions, HEADER_AREA_BYTES, LockedNamespace, format};
    use daxcrypt::volume::OpenError as Refused;
    let backing = Arc::new(Backing::anonymous(HEADER_AREA_BYTES + SIZE).unwrap());
    drop(format(Arc::clone(&backing), FormatOptions::default(), &credential()).unwrap());
    let open = || LockedNamespace::open(Arc::clone(&backing)).unwrap();
    let first = open().unlock(&credential()).unwrap();
    first.write_at(&[1; 99], 5).unwrap();
    let second = open().unlock(&credential());
    assert!(matches!(second, Err(Refused::Volume(VolumeError::InUse))), "{second:?}");
    let third = Volume::new(open().unlock_key(&credential()).unwrap(), daxcrypt::xts::Backend::detect());
    assert!(matches!(third.write_at(&[2; 99], 5), Err(VolumeError::InUse)));
    assert!(matches!(third.read_at(&mut [2; 99], 5), Err(VolumeError::InUse)));
    assert!(matches!(third.mark_in_use(), Err(VolumeError::InUse)));
    drop((first, third));
    let fourth = open().unlock(&credential()).unwrap();
    let mut bytes = [0; 99];
    fourth.read_at(&mut bytes, 5).unwrap();
    assert_eq!(bytes, [1; 99]);
}

#[test]
fn a_server_that_was_made_before_a_fork_does_not_run_after_it() {
    use daxcrypt::nbd_server::{ExportInfo, Exports, Limits, Listener, Options, Server, ServerError};
    in_a_process("a_server_that_was_made_before_a_fork_does_not_run_after_it", || {
        let (vault, volume) = Vault::new(SIZE);
        let mut exports = Exports::new();
        exports.add(ExportInfo { name: "disk".into(), ..ExportInfo::default() }, volume).unwrap();
        let listener = Listener::unix(&vault.dir.path().join("socket")).unwrap();
        let server = Server::new(exports, Limits::default(), Options::default()).unwrap().listen(listener);
        assert_eq!(fork(|| assert!(matches!(of_the_child(&server).run(), Err(ServerError::Forked)))), 0);
        server.handle().stop();
        server.run().unwrap();
    });
}
