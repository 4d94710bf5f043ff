//! A log in encrypted persistent memory that a crash cannot tear: records first, then the one word that makes them count.
//!
//!     cargo run --example append_log -- FOLDER 'a line' 'another'      # appends
//!     cargo run --example append_log -- FOLDER                         # prints
//!
//! The first word of the map is the end of the log. A record is its length (8 bytes, little-endian) and its bytes, filled
//! up to 8. A crash between the two persists leaves the old end, and the record behind it is garbage that nobody reads.
#![allow(unsafe_code)]

#[path = "support/mod.rs"]
mod support;

use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use daxcrypt::dax::{DaxMapping, MapOptions};

/// Where the first record begins.
const START: u64 = 64;

/// A log in a map. One thread appends at a time (`&mut`).
#[derive(Debug)]
pub struct Log {
    map: DaxMapping,
}

impl Log {
    /// Opens the log of the namespace in `folder`.
    pub fn open(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let volume = support::open_or_create(folder)?;
        Ok(Self { map: volume.map(0..volume.size(), &MapOptions::new().writable())? })
    }

    fn end(&self) -> &AtomicU64 {
        // SAFETY: the first word of a writable map, aligned, and used as an atomic only.
        unsafe { AtomicU64::from_ptr(self.map.as_ptr().cast()) }
    }

    /// Appends a record, which is durable when this returns.
    pub fn append(&mut self, record: &[u8]) -> Result<(), Box<dyn Error>> {
        let start = self.end().load(Ordering::Relaxed).max(START);
        let end = start + 8 + (record.len() as u64).next_multiple_of(8);
        if end > self.map.len() {
            return Err("the log is full".into());
        }
        self.map.write(start, &(record.len() as u64).to_le_bytes())?;
        self.map.write(start + 8, record)?;
        self.map.persist(start..end)?;
        self.end().store(end, Ordering::Release);
        Ok(self.map.persist(0..8)?)
    }

    /// All records in order.
    pub fn records(&self) -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
        let end = self.end().load(Ordering::Acquire);
        let (mut at, mut records) = (START, Vec::new());
        while at < end {
            let mut length = [0; 8];
            self.map.read(at, &mut length)?;
            let length = u64::from_le_bytes(length);
            let mut record = vec![0; usize::try_from(length)?];
            self.map.read(at + 8, &mut record)?;
            records.push(record);
            at += 8 + length.next_multiple_of(8);
        }
        Ok(records)
    }
}

#[allow(dead_code, reason = "the test uses `Log`")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut log = Log::open(Path::new(&arguments.next().ok_or("usage: append_log FOLDER [LINE ...]")?))?;
    let lines: Vec<_> = arguments.collect();
    for line in &lines {
        log.append(line.as_bytes())?;
    }
    if lines.is_empty() {
        log.records()?.iter().for_each(|record| println!("{}", String::from_utf8_lossy(record)));
    }
    Ok(())
}
