//! Direct maps on older kernels (features hidden) and without rights (user `nobody`): what is different, and that the bytes
//! are not.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::undocumented_unsafe_blocks, unsafe_code)]

mod vault;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;

use daxcrypt::dax::{MapMode, Tracking};
use daxcrypt::pmem::Access;
use vault::{DATA, PAGE, Vault, child, child_argument, child_command, load, pattern, store, writable};

const SIZE: u64 = 1 << 20;

const KERNELS: [((u32, u32), MapMode, Tracking); 5] = [
    ((5, 10), MapMode::Eager, Tracking::Compare),
    ((5, 15), MapMode::Lazy, Tracking::Compare),
    ((6, 1), MapMode::Lazy, Tracking::Trap),
    ((6, 6), MapMode::Lazy, Tracking::Trap),
    ((6, 7), MapMode::Lazy, Tracking::Async),
];

/// Loads, stores, syncs, evicts and ends a map, beside another one.
fn use_it(kernel: (u32, u32), mode: MapMode, tracking: Tracking) {
    let options = || writable().as_on_kernel(kernel.0, kernel.1);
    let (vault, volume) = Vault::new(SIZE);
    let map = volume.map(0..SIZE, &options()).unwrap();
    let other = volume.map(0..SIZE / 2, &options()).unwrap();
    assert_eq!((map.mode(), map.tracking()), (mode, tracking), "{kernel:?}");
    for page in 0..SIZE / PAGE {
        assert_eq!(load(&map, page * PAGE + 7), pattern(page * PAGE + 7), "{kernel:?}");
    }
    store(&map, 3 * PAGE, 0x31);
    store(&other, 4 * PAGE, 0x41);
    map.sync().unwrap();
    store(&map, 3 * PAGE + 1, 0x32); // after a sync has taken its mark
    other.sync().unwrap();
    map.sync().unwrap();
    let gone = map.evict(0..SIZE).unwrap();
    assert_eq!(gone > 0, mode != MapMode::Eager);
    assert_eq!((load(&other, 3 * PAGE + 1), load(&map, 4 * PAGE)), (0x32, 0x41));
    store(&map, 5 * PAGE, 0x51);
    drop((map, other));
    drop(volume);
    let volume = Vault::open(&vault.path(), Access::ReadOnly);
    for (offset, expected) in [(3 * PAGE, 0x31), (3 * PAGE + 1, 0x32), (4 * PAGE, 0x41), (5 * PAGE, 0x51)] {
        let mut byte = [0];
        volume.read_at(&mut byte, offset).unwrap();
        assert_eq!(byte, [expected], "{kernel:?}, offset {offset}");
    }
}

#[test]
fn older_kernels_give_other_modes_and_the_same_bytes() {
    for (kernel, mode, tracking) in KERNELS {
        use_it(kernel, mode, tracking);
    }
}

#[test]
fn a_page_that_media_cannot_read_raises_sigbus_on_every_kernel_and_harms_no_other() {
    const NAME: &str = "a_page_that_media_cannot_read_raises_sigbus_on_every_kernel_and_harms_no_other";
    let Some(case) = child_argument() else {
        for (index, (kernel, _, _)) in KERNELS.iter().enumerate().skip(1) {
            let status = child(NAME, &index.to_string());
            assert_eq!(status.signal(), Some(libc::SIGBUS), "{kernel:?}: {status}");
        }
        return;
    };
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
    let (kernel, _, _) = KERNELS[case.parse::<usize>().unwrap()];
    let (vault, volume) = Vault::new(SIZE);
    let map = volume.map(0..SIZE, &writable().as_on_kernel(kernel.0, kernel.1)).unwrap();
    store(&map, 5, 0x55);
    File::options().write(true).open(vault.path()).unwrap().set_len(DATA + SIZE / 2).unwrap();
    assert_eq!(load(&map, 100 * PAGE), pattern(100 * PAGE));
    load(&map, 200 * PAGE);
}

/// Gives up root in this process, which has no other business.
fn become_nobody() {
    assert_eq!(unsafe { libc::setgid(65534) }, 0, "the test begins as root");
    assert_eq!(unsafe { libc::setuid(65534) }, 0);
    // Who changes its user may not look at its own page tables until it says so.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }, 0);
}

#[test]
fn nobody_has_lazy_maps_and_is_told_what_they_cannot_do() {
    const NAME: &str = "nobody_has_lazy_maps_and_is_told_what_they_cannot_do";
    if child_argument().is_none() {
        let output = child_command(NAME, "nobody").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let (_vault, volume) = Vault::new(SIZE);
    become_nobody();
    if std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|set| set.trim() == "1") {
        return use_it((6, 7), MapMode::Lazy, Tracking::Async);
    }
    for (options, tracking) in [(writable(), Tracking::Async), (writable().trap_stores(), Tracking::Trap)] {
        let map = volume.map(0..SIZE, &options).unwrap();
        assert_eq!((map.mode(), map.tracking()), (MapMode::LazyUserMode, tracking));
        assert_eq!(volume.resident_bytes(), 0, "nothing is decrypted before it is touched");
        assert_eq!(load(&map, 9 * PAGE), pattern(9 * PAGE));
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        // SAFETY: nobody stores to the map.
        let bytes = unsafe { map.as_slice(20 * PAGE..20 * PAGE + 100) };
        let failed = writer.write(bytes).unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(libc::EFAULT), "a system call on an absent page");
        map.prefetch(20 * PAGE..21 * PAGE).unwrap();
        writer.write_all(bytes).unwrap();
        let mut found = [0; 100];
        reader.read_exact(&mut found).unwrap();
        assert!(found.iter().zip(20 * PAGE..).all(|(&byte, offset)| byte == pattern(offset)));
        store(&map, 9 * PAGE, 0x99);
        store(&map, 10 * PAGE, 0x99);
        map.sync().unwrap();
        map.close().unwrap();
        let mut byte = [0];
        volume.read_at(&mut byte, 10 * PAGE).unwrap();
        assert_eq!(byte, [0x99]);
        volume.write_at(&[pattern(9 * PAGE)], 9 * PAGE).unwrap();
    }
}
