//! What needs a look inside of a window.

use std::thread;
use std::time::Duration;

use super::*;
use crate::volume::Volume;

/// Other fills have all of the room, and media need their time for them.
#[test]
fn a_fill_waits_for_room_that_others_are_about_to_use() {
    let volume = Volume::ephemeral(1 << 20).unwrap();
    let window = volume.window().unwrap();
    let view = window.attach(0..1 << 20, true, false, Some(RESIDENT_BYTES_MIN)).unwrap();
    let all = window.page_count_max();
    window.reserved.store(all, Ordering::Release);
    thread::scope(|scope| {
        let fill = scope.spawn(|| volume.fill(window, &(0..2 * PAGE_BYTES), None));
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
        window.attach(pages(range), true, pinned, None).unwrap();
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
