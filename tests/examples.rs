//! The examples run, and do what they say.
#![allow(clippy::unwrap_used, clippy::duplicate_mod, unreachable_pub)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

#[path = "../examples/append_log.rs"]
mod append_log;
#[path = "../examples/counter.rs"]
mod counter;
#[path = "../examples/shared_kv.rs"]
mod shared_kv;

/// One at a time: a child that is just beginning has the locks of files that its parent had open.
static ONE: Mutex<()> = Mutex::new(());

#[test]
fn the_counter_counts_on() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    for expected in 1..=5 {
        assert_eq!(counter::count(folder.path()).unwrap(), expected);
    }
}

#[test]
fn the_log_keeps_its_records_in_order() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
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

/// The folder of a log that a child appends to until it is killed.
const LOG: &str = "DAXCRYPT_TEST_LOG";

/// A record of some length, from a few bytes to several pages, that tells its number in every word.
fn record(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(usize::try_from(1 + number * 7 % 41 * (number % 5) * 8).unwrap())
}

#[test]
fn a_log_that_is_killed_has_every_record_that_was_appended() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    const NAME: &str = "a_log_that_is_killed_has_every_record_that_was_appended";
    if let Some(folder) = std::env::var_os(LOG) {
        let mut log = append_log::Log::open(folder.as_ref()).unwrap();
        let first = log.records().unwrap().len() as u64;
        for number in first.. {
            log.append(&record(number)).unwrap();
            println!("\nappended {number}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let mut appended = 0;
    for round in 0..8_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([NAME, "--exact", "--nocapture"])
            .env(LOG, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut numbers = lines.filter_map(|line| line.strip_prefix("appended ")?.parse::<u64>().ok());
        let last = numbers.by_ref().take(usize::try_from(20 + round * 13).unwrap()).last().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        appended = numbers.last().unwrap_or(last) + 1;
        let records = append_log::Log::open(folder.path()).unwrap().records().unwrap();
        let count = records.len() as u64;
        assert!(count == appended || count == appended + 1, "round {round}: {count} records of {appended}");
        for (number, found) in (0..).zip(&records) {
            assert!(*found == record(number), "round {round}: record {number} is torn");
        }
    }
    assert!(appended > 100);
}

#[test]
fn the_map_and_the_client_see_each_other() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        assert_eq!(shared_kv::share(folder.path()).unwrap(), ["blue", "apple", "heron"]);
    }
}
