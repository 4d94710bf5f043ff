//! The examples run, and do what they say.
#![allow(clippy::unwrap_used, clippy::duplicate_mod, unreachable_pub)]

#[path = "../examples/append_log.rs"]
mod append_log;
#[path = "../examples/counter.rs"]
mod counter;
#[path = "../examples/shared_kv.rs"]
mod shared_kv;

#[test]
fn the_counter_counts_on() {
    let folder = tempfile::tempdir().unwrap();
    for expected in 1..=5 {
        assert_eq!(counter::count(folder.path()).unwrap(), expected);
    }
}

#[test]
fn the_log_keeps_its_records_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    for round in 0..3_u8 {
        let mut log = append_log::Log::open(folder.path()).unwrap();
        assert_eq!(log.records().unwrap(), expected);
        for length in [0, 1, 7, 8, 9, 5000] {
            expected.push(vec![round; length]);
            log.append(&vec![round; length]).unwrap();
        }
        assert_eq!(log.records().unwrap(), expected);
    }
}

#[test]
fn the_map_and_the_client_see_each_other() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        assert_eq!(shared_kv::share(folder.path()).unwrap(), ["blue", "apple", "heron"]);
    }
}
