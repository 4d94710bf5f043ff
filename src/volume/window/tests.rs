//! What needs a look inside of a window.

use std::thread;
use std::time::Duration;

use super::*;
use crate::uffd::{Faults, Features, Uffd};
use crate::volume::{Volume, VolumeError};

/// A writable view.
fn options(pinned: bool) -> ViewOptions {
    let open = || Uffd::open(Features::of_kernel(None).unwrap().trapping(), Faults::All).unwrap();
    ViewOptions { writable: true, faults: (!pinned).then(open), marks: Marks::Unknown }
}

fn fill(volume: &Volume, window: &Window, range: &Range<u64>) -> Result<(), VolumeError> {
    volume.fill(window, range, Through { scratch: &mut [0; 16 << 10], install: None })
}

/// What `mlockall`, a huge page or a reader of `/proc/self/mem` may have left in the memfd.
#[test]
fn zero_pages_that_nobody_of_us_made_are_overwritten() {
    let volume = Volume::ephemeral(1 << 20).unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|index| (index % 255) as u8 + 1).collect();
    volume.write_at(&bytes, 0).unwrap();
    let window = volume.window().unwrap();
    for page in [1, 2, 5, 9] {
        window.memory.fill(&(page * PAGE_BYTES..(page + 1) * PAGE_BYTES), &[0; 4096]).unwrap();
    }
    fill(&volume, window, &(0..8 * PAGE_BYTES)).unwrap();
    let mut found = vec![0; 8 * 4096];
    volume.load(window, &mut found, 0).unwrap();
    assert_eq!(found, bytes[..found.len()]);
    assert_eq!(window.resident_bytes(), 8 * PAGE_BYTES);
    volume.leave_window(window, &(0..1 << 20)).unwrap();
}

/// Other fills have all of the room, and media need their time for them.
#[test]
fn a_fill_waits_for_room_that_others_are_about_to_use() {
    let volume = Volume::ephemeral(1 << 20).unwrap();
    let window = volume.window().unwrap();
    let view = window.attach(0..1 << 20, options(false), Some(RESIDENT_BYTES_MIN)).unwrap();
    let all = window.page_count_max();
    window.reserved.store(all, Ordering::Release);
    thread::scope(|scope| {
        let fill = scope.spawn(|| fill(&volume, window, &(0..2 * PAGE_BYTES)));
        thread::sleep(Duration::from_millis(300));
        assert!(!fill.is_finished(), "there is no room yet");
        window.reserved.fetch_sub(all, Ordering::AcqRel);
        fill.join().unwrap().unwrap();
    });
    assert_eq!(window.resident_bytes(), 2 * PAGE_BYTES);
    window.detach(&view);
    volume.leave_window(window, &(0..1 << 20)).unwrap();
    assert_eq!(window.resident_bytes(), 0);
}

#[test]
fn pieces_end_where_what_views_show_does() {
    let volume = Volume::ephemeral(1 << 20).unwrap();
    let window = volume.window().unwrap();
    let pages = |pages: Range<u64>| pages.start * PAGE_BYTES..pages.end * PAGE_BYTES;
    for (range, pinned) in [(4..8, false), (6..12, true), (20..30, true)] {
        window.attach(pages(range), options(pinned), None).unwrap();
    }
    let cut = |from: u64| window.shown(&pages(from..25), |_| true);
    assert_eq!(
        [0, 4, 7, 12, 20].map(cut),
        [
            (pages(0..4), false),
            (pages(4..8), true),
            (pages(7..12), true),
            (pages(12..20), false),
            (pages(20..25), true),
        ]
    );
    assert_eq!(window.shown(&pages(4..10), View::pinned), (pages(4..6), false));
    assert_eq!(union_bytes([4..8, 6..12, 20..30, 21..22].iter()), 18);
}
