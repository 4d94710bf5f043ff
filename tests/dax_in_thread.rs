//! Faults that the touching thread answers itself: nobody is woken for them, everybody else who has a part of a page is
//! waited for, and what cannot be answered is the program's SIGBUS, with its own handler, mask and stack.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::multiple_unsafe_ops_per_block,
    unsafe_code
)]

mod vault;

use std::ffi::{c_int, c_void};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;
use std::{mem, ptr, thread};

use daxcrypt::dax::{DaxMapping, FaultsBy, MapMode, MapOptions};
use daxcrypt::namespace::RekeyOptions;
use daxcrypt::pmem::Access;
use daxcrypt::volume::{Volume, VolumeError};
use vault::{DATA, PAGE, Random, Vault, child_argument, child_command, credential, load, pattern, store, writable};

const SIZE: u64 = 4 << 20;
const PAGES: u64 = SIZE / PAGE;

fn in_thread() -> MapOptions {
    writable().faults(FaultsBy::InThread)
}

fn map(volume: &Arc<Volume>, options: &MapOptions) -> DaxMapping {
    let map = volume.map(0..volume.size(), options).unwrap();
    assert_eq!(map.mode(), MapMode::LazyInThread);
    map
}

/// How often the threads of the library that answer faults have been woken, once they sleep.
fn wakings() -> u64 {
    loop {
        let mut count = 0;
        let mut threads = 0;
        for task in fs::read_dir("/proc/self/task").unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            if field("Name:") == Some("daxcrypt-fault") && field("State:").is_some_and(|state| state.starts_with('S')) {
                count += field("voluntary_ctxt_switches:").unwrap().parse::<u64>().unwrap();
                threads += 1;
            }
        }
        if threads == 2 {
            return count;
        }
        thread::yield_now();
    }
}

/// Runs `body` as test `name` in a process of its own, where handlers and limits harm nobody. `None` in that process.
fn apart(name: &str, argument: &str, body: impl FnOnce(&str)) -> Option<Output> {
    if let Some(argument) = child_argument() {
        // SAFETY: sets a limit of this process: no core files of a test that dies on purpose.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
        // SAFETY: ends this process if it hangs.
        unsafe { libc::alarm(120) };
        body(&argument);
        return None;
    }
    let output = child_command(name, argument).stdin(Stdio::null()).output().unwrap();
    assert_ne!(output.status.signal(), Some(libc::SIGALRM), "{argument} hangs: {output:?}");
    Some(output)
}

#[test]
fn touches_are_answered_and_nobody_is_woken() {
    const NAME: &str = "touches_are_answered_and_nobody_is_woken";
    let output = apart(NAME, "alone", |_| {
        let (vault, volume) = Vault::new(SIZE);
        let map = map(&volume, &in_thread());
        let before = wakings();
        let mut random = Random(11);
        for page in (0..500).map(|_| random.below(PAGES)) {
            let at = page * PAGE + page % PAGE;
            match page % 2 {
                0 => assert_eq!(load(&map, at), pattern(at)),
                _ => store(&map, at, 0xee),
            }
        }
        (0..PAGES)
            .filter(|page| page % 2 == 0)
            .for_each(|page| assert_eq!(load(&map, page * PAGE), pattern(page * PAGE)));
        assert_eq!(wakings(), before, "the touching thread did it all");
        let stored: Vec<u64> = (0..PAGES).filter(|page| load(&map, page * PAGE + page % PAGE) == 0xee).collect();
        map.close().unwrap();
        drop(volume);
        let volume = Vault::open(&vault.path(), Access::ReadOnly);
        let mut byte = [0];
        for page in stored.iter().filter(|&page| page % 2 == 1) {
            volume.read_at(&mut byte, page * PAGE + page % PAGE).unwrap();
            assert_eq!(byte, [0xee], "page {page}");
        }
        assert!(stored.len() > 100);
    });
    assert!(output.is_none_or(|output| output.status.success()));
}

/// Every thread adds one to a word of every page, at the same time as the others.
fn count_together(options: &MapOptions) {
    const THREADS: u64 = 6;
    let (vault, volume) = Vault::empty(SIZE);
    volume.write_zeroes(0, SIZE).unwrap();
    let maps = [map(&volume, options), map(&volume, options)];
    let barrier = Barrier::new(THREADS as usize);
    thread::scope(|scope| {
        for id in 0..THREADS {
            let (map, barrier) = (&maps[(id % 2) as usize], &barrier);
            scope.spawn(move || {
                for page in 0..PAGES {
                    if page % 32 == 0 {
                        barrier.wait();
                    }
                    let page = page * 37 % PAGES;
                    // SAFETY: the word is aligned and within the map; everybody uses atomics.
                    let word = unsafe { AtomicU64::from_ptr(map.as_ptr().add((page * PAGE) as usize).cast()) };
                    word.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    maps.into_iter().for_each(|map| map.close().unwrap());
    drop(volume);
    let volume = Vault::open(&vault.path(), Access::ReadOnly);
    for page in 0..PAGES {
        let mut word = [0; 8];
        volume.read_at(&mut word, page * PAGE).unwrap();
        assert_eq!(u64::from_le_bytes(word), THREADS, "page {page}");
    }
}

#[test]
fn threads_that_touch_the_same_pages_lose_no_store() {
    let bound = 256 << 10;
    for options in [
        in_thread(),
        in_thread().resident_max(bound),
        in_thread().resident_max(bound).write_back_interval(Duration::from_millis(2)),
        in_thread().trap_stores().resident_max(bound),
        in_thread().as_on_kernel(5, 15).resident_max(bound),
        in_thread().as_on_kernel(6, 1),
    ] {
        count_together(&options);
    }
}

#[test]
fn the_bound_holds_whoever_makes_room() {
    const BOUND: u64 = 512 << 10;
    let (_vault, volume) = Vault::new(SIZE);
    let map = map(&volume, &in_thread().resident_max(BOUND));
    let before = wakings();
    let mut random = Random(5);
    for _ in 0..3000 {
        let page = random.below(PAGES);
        assert_eq!(load(&map, page * PAGE + 9), pattern(page * PAGE + 9));
        assert!(volume.resident_bytes() <= BOUND);
    }
    assert!(wakings() > before, "a fault thread evicts");
}

#[test]
fn touches_go_on_while_the_volume_is_re_keyed() {
    let (_vault, volume) = Vault::new(SIZE);
    let map = map(&volume, &in_thread().resident_max(256 << 10));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for id in 0..3 {
            let (map, stop) = (&map, &stop);
            scope.spawn(move || {
                let mut random = Random(id + 3);
                while !stop.load(Ordering::Relaxed) {
                    let at = random.below(SIZE);
                    assert_eq!(load(map, at), pattern(at));
                }
            });
        }
        volume.begin_rekey(&credential(), &RekeyOptions::default()).unwrap();
        while volume.transform_step(256 << 10).unwrap().is_some() {}
        stop.store(true, Ordering::Relaxed);
    });
    (0..PAGES).for_each(|page| assert_eq!(load(&map, page * PAGE), pattern(page * PAGE)));
}

#[test]
fn a_system_call_on_an_absent_page_fails_and_prefetch_is_the_way() {
    let (_vault, volume) = Vault::new(SIZE);
    let map = map(&volume, &in_thread());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0xab; 4096]).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    // SAFETY: nobody else uses the map.
    let bytes = unsafe { map.as_mut_slice(8 * PAGE..9 * PAGE) };
    assert_eq!(file.read(bytes).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    map.prefetch(8 * PAGE..9 * PAGE).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    assert_eq!(file.read(bytes).unwrap(), 4096);
    assert_eq!(load(&map, 8 * PAGE + 5), 0xab);
    map.sync().unwrap();
    let mut byte = [0];
    volume.read_at(&mut byte, 9 * PAGE - 1).unwrap();
    assert_eq!(byte, [0xab]);
    // Calls of the library take a buffer in such a map, as in any other.
    volume.read_at(bytes, 64 * PAGE).unwrap();
    assert_eq!(bytes[7], pattern(64 * PAGE + 7));
}

extern "C" fn touch_without_alternate_stack(map: *mut c_void) -> *mut c_void {
    // SAFETY: the test passes a map that lives until it has joined this thread.
    let map = unsafe { &*map.cast::<DaxMapping>() };
    // SAFETY: all-zero bytes are a valid value, which is overwritten.
    let mut stack: libc::stack_t = unsafe { mem::zeroed() };
    // SAFETY: asks for what this thread has.
    unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) };
    assert!(stack.ss_flags & libc::SS_DISABLE != 0, "a thread of the C library has none");
    (0..PAGES).step_by(7).for_each(|page| assert_eq!(load(map, page * PAGE), pattern(page * PAGE)));
    // SAFETY: as above.
    unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) };
    assert!(stack.ss_flags & libc::SS_DISABLE != 0, "it has been given none");
    ptr::null_mut()
}

#[test]
fn threads_with_and_without_an_alternate_stack_keep_what_they_have() {
    let (_vault, volume) = Vault::new(SIZE);
    let map = map(&volume, &in_thread());
    let mut thread = mem::MaybeUninit::uninit();
    let argument = (&raw const map).cast_mut().cast();
    // SAFETY: the map lives until the thread is joined; the function takes it.
    let made =
        unsafe { libc::pthread_create(thread.as_mut_ptr(), ptr::null(), touch_without_alternate_stack, argument) };
    assert_eq!(made, 0);
    // SAFETY: the thread was made above and is joined once.
    assert_eq!(unsafe { libc::pthread_join(thread.assume_init(), ptr::null_mut()) }, 0);

    let alternate = || {
        // SAFETY: all-zero bytes are a valid value, which is overwritten.
        let mut stack: libc::stack_t = unsafe { mem::zeroed() };
        // SAFETY: asks for what this thread has.
        unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) };
        (stack.ss_sp.addr(), stack.ss_flags, stack.ss_size)
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let before = alternate();
            assert!(before.1 & libc::SS_DISABLE == 0, "the standard library gives its threads one");
            (0..PAGES).for_each(|page| assert_eq!(load(&map, page * PAGE), pattern(page * PAGE)));
            assert_eq!(alternate(), before);
        });
    });
}

static EXIT_CODE: AtomicI32 = AtomicI32::new(0);
static EXPECTED: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(usize::MAX)];
static TOUCHED_BY_HANDLER: AtomicUsize = AtomicUsize::new(0);

/// The program's own handler, which was there before the library's: ends the process when what it is told is right.
extern "C" fn program_handler(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo.
    let address = unsafe { (*info).si_addr() }.addr();
    let right = signal == libc::SIGBUS
        && (EXPECTED[0].load(Ordering::SeqCst)..EXPECTED[1].load(Ordering::SeqCst)).contains(&address);
    // SAFETY: all-zero bytes are a valid set, which is overwritten.
    let mut mask: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: asks for the mask of this thread.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), &raw mut mask) };
    // SAFETY: the set was filled above.
    let blocked = |signal| unsafe { libc::sigismember(&raw const mask, signal) } == 1;
    // What `sigaction` promises: the signal itself and those that the action names.
    let right =
        right && blocked(libc::SIGBUS) && blocked(libc::SIGUSR1) && !blocked(libc::SIGUSR2) && !blocked(libc::SIGTERM);
    let touched = TOUCHED_BY_HANDLER.load(Ordering::SeqCst);
    if touched != 0 {
        // SAFETY: unblocks a signal in this thread, so that a touch in this handler can be answered.
        unsafe {
            libc::sigemptyset(&raw mut mask);
            libc::sigaddset(&raw mut mask, libc::SIGBUS);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const mask, ptr::null_mut());
        }
        // SAFETY: the test names a byte of a map.
        let byte = unsafe { ptr::with_exposed_provenance::<u8>(touched).read_volatile() };
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(if right && byte == pattern(5 * PAGE) { EXIT_CODE.load(Ordering::SeqCst) } else { 101 }) };
    }
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(if right { EXIT_CODE.load(Ordering::SeqCst) } else { 100 }) };
}

fn install_program_handler() {
    // SAFETY: all-zero bytes are a valid action.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = program_handler;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the set is that of a local action, which is valid for the call.
    unsafe {
        libc::sigaddset(&raw mut action.sa_mask, libc::SIGUSR1);
        assert_eq!(libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()), 0);
    }
}

fn expect(code: i32, start: *const u8, len_bytes: u64) {
    EXPECTED[0].store(start.addr(), Ordering::SeqCst);
    EXPECTED[1].store(start.addr() + len_bytes as usize, Ordering::SeqCst);
    EXIT_CODE.store(code, Ordering::SeqCst);
}

/// A mapped page of a file that has lost it.
fn lost_page() -> *const u8 {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGE).unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page =
        unsafe { libc::mmap(ptr::null_mut(), PAGE as usize, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    assert_ne!(page, libc::MAP_FAILED);
    file.set_len(0).unwrap();
    page.cast()
}

/// What ends in the program's handler, with which exit code.
const PASSED_ON: &[(&str, i32)] = &[
    ("foreign", 41),
    ("foreign, and the handler touches the map", 42),
    ("a page that media cannot read", 43),
    ("a page that media cannot read, on an old kernel", 44),
    ("locked during touches", 45),
    ("closed during touches", 46),
    ("locked while a touch waits for room", 47),
    ("locked while a store is trapped", 48),
];

#[test]
fn what_cannot_be_answered_reaches_the_handler_that_was_there_before() {
    const NAME: &str = "what_cannot_be_answered_reaches_the_handler_that_was_there_before";
    for &(case, code) in PASSED_ON {
        let Some(output) = apart(NAME, case, pass_on) else { return };
        assert_eq!(output.status.code(), Some(code), "{case}: {output:?}");
    }
}

fn pass_on(case: &str) {
    let code = PASSED_ON.iter().find(|(name, _)| *name == case).unwrap().1;
    install_program_handler();
    let (vault, volume) = Vault::new(SIZE);
    let options = match case {
        "a page that media cannot read, on an old kernel" => in_thread().as_on_kernel(5, 19),
        "locked while a touch waits for room" => in_thread().resident_max(256 << 10),
        "locked while a store is trapped" => in_thread().trap_stores(),
        _ => in_thread(),
    };
    let map = map(&volume, &options);
    assert_eq!(load(&map, 0), pattern(0));
    expect(code, map.as_ptr(), SIZE);
    let truncate = || OpenOptions::new().write(true).open(vault.path()).unwrap().set_len(DATA + 128 * PAGE).unwrap();
    let start = map.as_ptr().expose_provenance();
    let touch_for_ever = |stores: bool| {
        for id in 0..4 {
            thread::spawn(move || {
                let mut random = Random(id + 1);
                loop {
                    let byte = ptr::with_exposed_provenance_mut::<u8>(start + random.below(SIZE) as usize);
                    // SAFETY: wrong on purpose once the map has ended: it must end in a signal.
                    unsafe {
                        if stores {
                            byte.write_volatile(1);
                        } else {
                            byte.read_volatile();
                        }
                    };
                }
            });
        }
    };
    match case {
        "foreign" | "foreign, and the handler touches the map" => {
            let page = lost_page();
            expect(code, page, PAGE);
            if case != "foreign" {
                TOUCHED_BY_HANDLER.store(start + 5 * PAGE as usize, Ordering::SeqCst);
            }
            // SAFETY: the page is mapped, and the signal is what the test is about.
            unsafe { page.read_volatile() };
        }
        "a page that media cannot read" | "a page that media cannot read, on an old kernel" => {
            truncate();
            assert_eq!(load(&map, 127 * PAGE), pattern(127 * PAGE), "other pages are not harmed");
            // SAFETY: within the map.
            expect(code, unsafe { map.as_ptr().add(200 * PAGE as usize) }, PAGE);
            load(&map, 200 * PAGE);
        }
        "locked during touches" | "locked while a touch waits for room" | "locked while a store is trapped" => {
            touch_for_ever(case != "locked during touches");
            (0..20).for_each(|_| assert!(map.evict(0..SIZE).is_ok()));
            volume.lock().unwrap();
            thread::sleep(Duration::from_secs(100));
        }
        "closed during touches" => {
            touch_for_ever(false);
            (0..20).for_each(|_| assert!(map.evict(0..SIZE).is_ok()));
            // Its pages raise SIGBUS before the memory goes: what comes after that is nobody's.
            expect(code, ptr::null(), u64::MAX);
            install_for_segv();
            map.close().unwrap();
            thread::sleep(Duration::from_secs(100));
        }
        _ => panic!("no such case: {case}"),
    }
}

/// After a close the address is nobody's: a thread that comes so late gets the other signal.
fn install_for_segv() {
    extern "C" fn late(_: c_int) {
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(EXIT_CODE.load(Ordering::SeqCst)) };
    }
    // SAFETY: the handler ends the process.
    unsafe { libc::signal(libc::SIGSEGV, late as extern "C" fn(c_int) as libc::sighandler_t) };
}

static MAP_START: AtomicUsize = AtomicUsize::new(0);
static NEXT_PAGE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn touch_in_a_handler(_: c_int) {
    let page = NEXT_PAGE.fetch_add(37, Ordering::SeqCst) % PAGES as usize;
    let byte = ptr::with_exposed_provenance::<u8>(MAP_START.load(Ordering::SeqCst) + page * PAGE as usize);
    // SAFETY: the byte lies in the map.
    unsafe { byte.read_volatile() };
}

#[test]
fn a_touch_by_a_thread_that_holds_the_page_ends_with_a_message_and_not_in_a_deadlock() {
    const NAME: &str = "a_touch_by_a_thread_that_holds_the_page_ends_with_a_message_and_not_in_a_deadlock";
    let output = apart(NAME, "handler", |_| {
        let (_vault, volume) = Vault::new(SIZE);
        let map = map(&volume, &in_thread());
        MAP_START.store(map.as_ptr().expose_provenance(), Ordering::SeqCst);
        // SAFETY: the handler touches the map, wrongly.
        unsafe {
            libc::signal(libc::SIGUSR1, touch_in_a_handler as extern "C" fn(c_int) as libc::sighandler_t);
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let reader = Arc::clone(&volume);
        thread::spawn(move || {
            // SAFETY: a number.
            sender.send(unsafe { libc::pthread_self() } as usize).unwrap();
            let mut bytes = vec![0; 1 << 20];
            loop {
                reader.read_at(&mut bytes, 0).unwrap();
            }
        });
        let thread = receiver.recv().unwrap();
        loop {
            // SAFETY: the thread runs for ever.
            unsafe { libc::pthread_kill(thread as libc::pthread_t, libc::SIGUSR1) };
            map.evict(0..SIZE).unwrap();
        }
    });
    let Some(output) = output else { return };
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("must not touch a map"), "{told}");
}

#[test]
fn a_forked_child_has_no_map_and_waits_for_nobody() {
    let (_vault, volume) = Vault::new(SIZE);
    let map = map(&volume, &in_thread().resident_max(256 << 10));
    let stop = AtomicBool::new(false);
    let (start, len) = (map.as_ptr().expose_provenance(), SIZE as usize);
    let lost = tempfile::tempfile().unwrap();
    thread::scope(|scope| {
        for id in 0..3 {
            let (map, stop) = (&map, &stop);
            scope.spawn(move || {
                let mut random = Random(id + 9);
                while !stop.load(Ordering::Relaxed) {
                    let at = random.below(SIZE);
                    assert_eq!(load(map, at), pattern(at));
                }
            });
        }
        for round in 0..60 {
            let (expected, touch) = match round % 3 {
                0 => (libc::SIGSEGV, Touch::Map),
                1 => (libc::SIGBUS, Touch::InItsPlace),
                _ => (0, Touch::Call),
            };
            let status = in_a_child(|| touch.act(&volume, &lost, start, len));
            let ended = if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
            assert_eq!(ended, expected, "round {round}: {status:#x}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    map.close().unwrap();
}

/// What a child does.
enum Touch {
    Map,
    /// A file of its own that it maps where its parent has the map, and that has lost its pages.
    InItsPlace,
    Call,
}

impl Touch {
    fn act(&self, volume: &Volume, lost: &File, start: usize, len: usize) -> i32 {
        let byte = ptr::with_exposed_provenance_mut::<u8>(start + 100 * PAGE as usize);
        match self {
            Self::Map => {
                // SAFETY: wrong on purpose.
                unsafe { byte.read_volatile() };
                99
            }
            Self::InItsPlace => {
                let flags = libc::MAP_SHARED | libc::MAP_FIXED;
                // SAFETY: nothing is mapped there in this process, which is about to end.
                unsafe {
                    libc::mmap(
                        ptr::with_exposed_provenance_mut(start),
                        len,
                        libc::PROT_READ,
                        flags,
                        lost.as_raw_fd(),
                        0,
                    );
                    byte.read_volatile();
                }
                99
            }
            Self::Call => {
                let mut byte = [0];
                i32::from(!matches!(volume.read_at(&mut byte, 0), Err(VolumeError::Forked)))
            }
        }
    }
}

fn in_a_child(act: impl FnOnce() -> i32) -> c_int {
    // SAFETY: the child makes system calls, and leaves without running destructors.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: ends this process if it hangs, and leaves no core file.
            unsafe {
                libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
                libc::alarm(60);
            }
            let code = act();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: waits for the child; the status is a local.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
            status
        }
    }
}

#[test]
fn exclusive_and_frozen_maps_have_it_too() {
    let (_vault, volume) = Vault::new(SIZE);
    let mut map = volume.map_exclusive_with(0..SIZE / 2, &in_thread()).unwrap();
    assert_eq!(map.mode(), MapMode::LazyInThread);
    assert_eq!(map[3 * PAGE as usize + 5], pattern(3 * PAGE + 5));
    map[5 * PAGE as usize] = 0x5e;
    map.sync().unwrap();
    let frozen = volume.map_frozen(SIZE / 2..SIZE, &in_thread()).unwrap();
    assert!((SIZE / 2..SIZE).zip(frozen.iter()).all(|(at, &byte)| byte == pattern(at)));
    map.close().unwrap();
    let mut byte = [0];
    volume.read_at(&mut byte, 5 * PAGE).unwrap();
    assert_eq!(byte, [0x5e]);
}

#[test]
fn nobody_needs_a_right_for_it() {
    const NAME: &str = "nobody_needs_a_right_for_it";
    let output = apart(NAME, "nobody", |_| {
        let (_vault, volume) = Vault::new(SIZE);
        // SAFETY: gives up root in this process, which has no other business.
        assert_eq!(unsafe { libc::setuid(65534) }, 0, "the test begins as root");
        let map = map(&volume, &in_thread());
        (0..PAGES).for_each(|page| assert_eq!(load(&map, page * PAGE), pattern(page * PAGE)));
        store(&map, 3, 9);
        map.close().unwrap();
    });
    assert!(output.is_none_or(|output| output.status.success()));
}
