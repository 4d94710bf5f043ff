use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::thread;

use super::*;

const PAGE: u64 = 4096;

fn new_backing(len_bytes: u64, allocation: Allocation) -> (tempfile::TempDir, Backing) {
    let dir = tempfile::tempdir().unwrap();
    let backing = Backing::create(&dir.path().join("backing"), len_bytes, allocation).unwrap();
    (dir, backing)
}

fn put(backing: &Backing, offset: u64, bytes: &[u8]) -> Result<(), MediaError> {
    backing.write(offset..offset + bytes.len() as u64, |mut target| target.copy_from(bytes))
}

fn get(backing: &Backing, range: Range<u64>) -> Result<Vec<u8>, MediaError> {
    let mut out = vec![0; usize::try_from(range.end - range.start).unwrap()];
    backing.read(range, |source| source.copy_to(&mut out))?;
    Ok(out)
}

fn truncate(backing: &Backing, len_bytes: u64) {
    File::options().write(true).open(backing.path()).unwrap().set_len(len_bytes).unwrap();
}

fn held_bytes(backing: &Backing) -> u64 {
    fs::metadata(backing.path()).unwrap().blocks() * 512
}

#[test]
fn stores_reach_the_file_at_either_granularity() {
    for granularity in [Granularity::Page, Granularity::CacheLine] {
        let (_dir, backing) = new_backing(3 * PAGE + 5, Allocation::Full);
        let path = backing.path().to_path_buf();
        drop(backing);
        let backing = OpenOptions::new(Access::ReadWrite).force_granularity(granularity).open(&path).unwrap();
        assert_eq!(backing.granularity(), granularity);
        assert_eq!(backing.granularity_forced(), Some(granularity));
        put(&backing, 4090, b"across pages").unwrap();
        backing.persist(4090..4102).unwrap();
        put(&backing, 3 * PAGE, b"tail!").unwrap();
        backing.sync_all().unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 3 * 4096 + 5);
        assert_eq!(&bytes[4090..4102], b"across pages");
        assert_eq!(&bytes[3 * 4096..], b"tail!");
        assert_eq!(get(&backing, 4090..4102).unwrap(), b"across pages");
    }
}

#[test]
fn a_backing_on_tmpfs_works_as_one_on_a_disk() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let backing = Backing::create(&dir.path().join("backing"), 2 * PAGE, Allocation::Sparse).unwrap();
    assert_eq!(backing.granularity(), Granularity::Page);
    put(&backing, PAGE - 1, b"ab").unwrap();
    backing.persist(PAGE - 1..PAGE + 1).unwrap();
    backing.sync_all().unwrap();
    assert_eq!(&fs::read(backing.path()).unwrap()[4095..4097], b"ab");
}

#[test]
fn an_ordinary_file_explains_its_page_granularity() {
    let (_dir, backing) = new_backing(PAGE, Allocation::Full);
    assert_eq!(backing.kind(), BackingKind::File);
    assert_eq!(backing.granularity_forced(), None);
    assert_eq!(backing.physical_address(), None);
    let reason = backing.granularity_reason().to_string();
    assert!(reason.starts_with("page: not ") && reason.contains("because"), "{reason}");
}

#[test]
fn ranges_outside_are_refused_without_running_the_closure() {
    let (_dir, backing) = new_backing(PAGE, Allocation::Full);
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let outside =
        [0..PAGE + 1, PAGE..PAGE + 1, PAGE + 1..PAGE + 1, 9..8, u64::MAX - 1..u64::MAX, u64::MAX..0, 1..u64::MAX];
    for range in outside {
        let is_refused = |result: Result<(), MediaError>| {
            assert!(matches!(result, Err(MediaError::OutOfRange { len_bytes: PAGE, .. })), "{range:?}: {result:?}");
        };
        is_refused(backing.read(range.clone(), |_| panic!("ran")));
        is_refused(backing.write(range.clone(), |_| panic!("ran")));
        is_refused(backing.flush(range.clone()));
        is_refused(backing.persist(range.clone()));
        is_refused(backing.allocate(range.clone()));
        is_refused(backing.punch_hole(range.clone()));
        is_refused(backing.extents(range.clone(), 9).map(drop));
    }
}

#[test]
fn an_empty_range_is_served_anywhere_up_to_the_end() {
    let (_dir, backing) = new_backing(PAGE, Allocation::Full);
    for offset in [0, 1, PAGE] {
        assert_eq!(backing.read(offset..offset, |source| source.len()).unwrap(), 0);
        assert_eq!(backing.write(offset..offset, |target| target.len()).unwrap(), 0);
        backing.persist(offset..offset).unwrap();
        backing.allocate(offset..offset).unwrap();
        backing.punch_hole(offset..offset).unwrap();
        assert!(backing.extents(offset..offset, 9).unwrap().is_empty());
    }
}

#[test]
fn a_backing_opened_for_reading_takes_no_writes() {
    let (_dir, backing) = new_backing(PAGE, Allocation::Full);
    put(&backing, 0, b"kept").unwrap();
    let path = backing.path().to_path_buf();
    drop(backing);
    let backing = Backing::open(&path, Access::ReadOnly).unwrap();
    assert_eq!(get(&backing, 0..4).unwrap(), b"kept");
    assert!(matches!(put(&backing, 0, b"lost"), Err(MediaError::ReadOnly)));
    assert!(matches!(backing.allocate(0..4), Err(MediaError::ReadOnly)));
    assert!(matches!(backing.punch_hole(0..4), Err(MediaError::ReadOnly)));
    assert!(matches!(backing.grow(2 * PAGE, Allocation::Full), Err(MediaError::ReadOnly)));
    backing.persist(0..4).unwrap();
    backing.sync_all().unwrap();
}

#[test]
fn one_writer_or_many_readers() {
    let (_dir, writer) = new_backing(PAGE, Allocation::Full);
    let path = writer.path().to_path_buf();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert!(matches!(Backing::open(&path, access), Err(OpenError::Busy)));
    }
    drop(writer);
    let _first = Backing::open(&path, Access::ReadOnly).unwrap();
    let _second = Backing::open(&path, Access::ReadOnly).unwrap();
    assert!(matches!(Backing::open(&path, Access::ReadWrite), Err(OpenError::Busy)));
}

#[test]
fn disjoint_ranges_of_one_file_are_opened_side_by_side() {
    let (_dir, backing) = new_backing(2 * PAGE, Allocation::Full);
    let path = backing.path().to_path_buf();
    drop(backing);
    let open = |range| OpenOptions::new(Access::ReadWrite).lock_range(range).open(&path);
    let first = open(0..PAGE).unwrap();
    let second = open(PAGE..2 * PAGE).unwrap();
    assert!(matches!(open(PAGE - 1..PAGE), Err(OpenError::Busy)));
    put(&first, 0, b"one").unwrap();
    put(&second, PAGE, b"two").unwrap();
    assert_eq!(get(&second, 0..3).unwrap(), b"one");
}

#[test]
fn what_cannot_be_mapped_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str| Backing::open(&dir.path().join(name), Access::ReadWrite).map(drop);
    assert!(matches!(open("absent"), Err(OpenError::NotFound)));
    assert!(matches!(open("."), Err(OpenError::NotMappable)));
    File::create(dir.path().join("empty")).unwrap();
    assert!(matches!(open("empty"), Err(OpenError::Empty)));
    assert!(matches!(Backing::open(Path::new("/dev/null"), Access::ReadOnly), Err(OpenError::NotMappable)));
    rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(open("fifo"), Err(OpenError::NotMappable)));
}

#[test]
fn creating_never_overwrites_and_leaves_nothing_behind_on_failure() {
    let (_dir, backing) = new_backing(PAGE, Allocation::Full);
    let path = backing.path().to_path_buf();
    assert!(matches!(Backing::create(&path, PAGE, Allocation::Full), Err(OpenError::AlreadyExists)));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let other = path.with_file_name("other");
    assert!(matches!(Backing::create(&other, 0, Allocation::Full), Err(OpenError::Empty)));
    assert!(matches!(Backing::create(&other, u64::MAX, Allocation::Sparse), Err(OpenError::TooLarge { .. })));
    assert!(matches!(
        Backing::create(&other, 1 << 55, Allocation::Full),
        Err(OpenError::TooLarge { .. } | OpenError::NoSpace { .. })
    ));
    assert!(!other.exists());
}

#[test]
fn allocation_is_full_or_comes_with_the_first_store() {
    let (_dir, full) = new_backing(4 << 20, Allocation::Full);
    assert!(held_bytes(&full) >= 4 << 20);
    let (_dir, sparse) = new_backing(4 << 20, Allocation::Sparse);
    assert_eq!(held_bytes(&sparse), 0);
    put(&sparse, (2 << 20) - 1, b"ab").unwrap();
    assert!((2 << 20..4 << 20).contains(&held_bytes(&sparse)));
    sparse.allocate(0..4 << 20).unwrap();
    assert!(held_bytes(&sparse) >= 4 << 20);
}

#[test]
fn a_hole_reads_as_zeros_shows_in_the_extents_and_takes_stores_again() {
    let (_dir, backing) = new_backing(4 << 20, Allocation::Full);
    put(&backing, 0, &vec![7; 4 << 20]).unwrap();
    backing.sync_all().unwrap();
    backing.punch_hole(1 << 20..2 << 20).unwrap();
    assert_eq!(get(&backing, (1 << 20) - 1..(1 << 20) + 1).unwrap(), [7, 0]);
    let expected = [(0..1 << 20, true), (1 << 20..2 << 20, false), (2 << 20..4 << 20, true)];
    let expected = expected.map(|(range, allocated)| BackingExtent { range, allocated });
    assert_eq!(backing.extents(0..4 << 20, 9).unwrap(), expected);
    for count in 0..=expected.len() {
        assert_eq!(backing.extents(0..4 << 20, count).unwrap(), expected[..count], "no more than was asked for");
    }
    let inner = [BackingExtent { range: (1 << 20) + 5..(1 << 20) + 9, allocated: false }];
    assert_eq!(backing.extents((1 << 20) + 5..(1 << 20) + 9, 9).unwrap(), inner);
    put(&backing, 1 << 20, b"again").unwrap();
    backing.sync_all().unwrap();
    assert_eq!(&fs::read(backing.path()).unwrap()[1 << 20..(1 << 20) + 5], b"again");
    assert!(held_bytes(&backing) >= 4 << 20, "the step was allocated before the store");
}

#[test]
fn a_grown_backing_keeps_its_bytes_and_its_address() {
    let (_dir, backing) = new_backing(PAGE, Allocation::Full);
    put(&backing, 0, b"old").unwrap();
    backing.grow(3 * PAGE, Allocation::Full).unwrap();
    backing.grow(1 << 30, Allocation::Sparse).unwrap();
    assert_eq!(backing.len_bytes(), 1 << 30);
    put(&backing, (1 << 30) - 3, b"new").unwrap();
    backing.sync_all().unwrap();
    assert_eq!(get(&backing, 0..3).unwrap(), b"old");
    assert_eq!(get(&backing, (1 << 30) - 3..1 << 30).unwrap(), b"new");
    assert_eq!(fs::metadata(backing.path()).unwrap().len(), 1 << 30);
    backing.grow(1 << 30, Allocation::Full).unwrap();
    assert!(matches!(backing.grow(PAGE, Allocation::Full), Err(MediaError::OutOfRange { .. })));
    assert!(matches!(backing.grow(u64::MAX, Allocation::Sparse), Err(MediaError::OutOfRange { .. })));
    assert_eq!(backing.len_bytes(), 1 << 30);
}

#[test]
fn a_file_truncated_under_us_fails_the_accesses_behind_its_end_and_no_others() {
    let (_dir, backing) = new_backing(16 * PAGE, Allocation::Full);
    let (_other_dir, other) = new_backing(16 * PAGE, Allocation::Full);
    put(&backing, 0, &[1; 16 * 4096]).unwrap();
    truncate(&backing, 8 * PAGE);
    assert!(matches!(get(&backing, 0..9 * PAGE), Err(MediaError::Fault { offset }) if offset == 8 * PAGE));
    assert!(matches!(put(&backing, 10 * PAGE + 7, b"lost"), Err(MediaError::Fault { offset }) if offset == 10 * PAGE));
    assert_eq!(get(&backing, 0..8 * PAGE).unwrap(), [1; 8 * 4096]);
    put(&backing, 8 * PAGE - 4, b"kept").unwrap();
    put(&other, 10 * PAGE, b"fine").unwrap();
    assert_eq!(get(&other, 10 * PAGE..10 * PAGE + 4).unwrap(), b"fine");
    assert_eq!(&fs::read(backing.path()).unwrap()[8 * 4096 - 4..], b"kept");
}

#[test]
fn a_bad_page_stays_bad_until_the_backing_is_reopened() {
    let (_dir, backing) = new_backing(2 * PAGE, Allocation::Full);
    truncate(&backing, PAGE);
    assert!(get(&backing, PAGE..PAGE + 1).is_err());
    truncate(&backing, 2 * PAGE);
    assert!(matches!(get(&backing, PAGE..PAGE + 1), Err(MediaError::Fault { offset: PAGE })));
    assert!(matches!(backing.write(PAGE - 1..PAGE + 1, |_| panic!("ran")), Err(MediaError::Fault { offset: PAGE })));
    assert!(matches!(backing.flush(PAGE..PAGE + 1), Err(MediaError::Fault { offset: PAGE })));
    let path = backing.path().to_path_buf();
    drop(backing);
    let backing = Backing::open(&path, Access::ReadWrite).unwrap();
    assert_eq!(get(&backing, PAGE..PAGE + 1).unwrap(), [0]);
}

#[test]
fn many_threads_fault_at_once_and_each_sees_its_own_error() {
    const THREADS: u64 = 8;
    let (_dir, backing) = new_backing(64 * PAGE, Allocation::Full);
    let (_other_dir, other) = new_backing(64 * PAGE, Allocation::Full);
    put(&other, 0, &[5; 64 * 4096]).unwrap();
    truncate(&backing, 32 * PAGE);
    let start = Barrier::new(usize::try_from(THREADS).unwrap());
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (backing, other, start) = (&backing, &other, &start);
            scope.spawn(move || {
                start.wait();
                for step in 0..64 {
                    let page = (step + number) % 64; // some pages are met by several threads at the same time
                    let range = page * PAGE..(page + 1) * PAGE;
                    let result = if step % 2 == 0 {
                        get(backing, range.clone()).map(drop)
                    } else {
                        put(backing, range.start, &[9; 4096])
                    };
                    assert_eq!(result.is_err(), page >= 32, "page {page}: {result:?}");
                    assert_eq!(get(other, range).unwrap(), [5; 4096]);
                }
            });
        }
    });
}

#[test]
fn once_an_access_has_failed_no_later_store_to_the_page_passes_as_stored() {
    for _ in 0..50 {
        let (_dir, backing) = new_backing(PAGE, Allocation::Full);
        let failed = AtomicBool::new(false);
        let start = Barrier::new(3);
        thread::scope(|scope| {
            for number in 0..2 {
                let (backing, start, failed) = (&backing, &start, &failed);
                scope.spawn(move || {
                    start.wait();
                    for value in 0..200 {
                        let had_failed = failed.load(Ordering::SeqCst);
                        let result = put(backing, number * 64, &[value; 64]);
                        assert!(result.is_err() || !had_failed, "a store went to the covering page unnoticed");
                        failed.fetch_or(result.is_err(), Ordering::SeqCst);
                    }
                });
            }
            start.wait();
            truncate(&backing, 0);
        });
        assert!(put(&backing, 0, b"x").is_err());
    }
}

#[test]
fn mappings_that_come_and_go_do_not_confuse_the_handler() {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let (_dir, backing) = new_backing(2 * PAGE, Allocation::Full);
                    truncate(&backing, PAGE);
                    assert!(get(&backing, 0..PAGE).is_ok());
                    assert!(get(&backing, PAGE..2 * PAGE).is_err());
                }
            });
        }
    });
}

#[test]
fn a_flush_that_finds_the_file_shorter_poisons_the_backing() {
    for flush in [|backing: &Backing| backing.sync_all(), |backing: &Backing| backing.persist(0..16)] {
        let (_dir, backing) = new_backing(2 * PAGE, Allocation::Full);
        put(&backing, PAGE, b"lost without a signal").unwrap();
        truncate(&backing, PAGE);
        let result = flush(&backing);
        assert!(matches!(result, Err(MediaError::Shrunk { now_bytes: PAGE, .. })), "{result:?}");
        truncate(&backing, 2 * PAGE);
        assert!(matches!(backing.flush(0..1), Err(MediaError::Poisoned)));
        assert!(matches!(backing.drain(), Err(MediaError::Poisoned)));
        assert!(matches!(backing.persist(0..1), Err(MediaError::Poisoned)));
        assert!(matches!(backing.sync_all(), Err(MediaError::Poisoned)));
    }
}

#[test]
fn concurrent_syncs_all_succeed() {
    let (_dir, backing) = new_backing(64 * PAGE, Allocation::Full);
    thread::scope(|scope| {
        for number in 0..8 {
            let backing = &backing;
            scope.spawn(move || {
                for round in 0..5 {
                    put(backing, number * PAGE + round, b"x").unwrap();
                    backing.sync_all().unwrap();
                }
            });
        }
    });
}

#[test]
fn bytes_that_are_written_by_system_calls_do_not_make_a_shortened_file_long_again() {
    let (_dir, backing) = new_backing(4 * PAGE, Allocation::Full);
    backing.write_bytes(0, &[1; 5000]).unwrap();
    truncate(&backing, PAGE);
    let result = backing.write_bytes(3 * PAGE, &[2; 100]);
    assert!(matches!(result, Err(MediaError::Shrunk { now_bytes: PAGE, .. })), "{result:?}");
    assert_eq!(fs::metadata(backing.path()).unwrap().len(), PAGE);
    assert!(matches!(backing.sync_all(), Err(MediaError::Poisoned)));
}
