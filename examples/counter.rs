//! A counter in encrypted persistent memory: one aligned word, stored with an atomic and persisted.
//!
//!     cargo run --example counter -- FOLDER
//!
//! Run it as often as you like, and kill it whenever you like: it never counts back.
#![allow(unsafe_code)]

#[path = "support/mod.rs"]
mod support;

use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use daxcrypt::dax::MapOptions;

/// Adds one to the counter of the namespace in `folder` and gives its new value, which is durable.
pub fn count(folder: &Path) -> Result<u64, Box<dyn Error>> {
    let volume = support::open_or_create(folder)?;
    let map = volume.map(0..4096, &MapOptions::new().writable())?;
    // SAFETY: the first word of a writable map, aligned; nothing else in this program uses it.
    let counter = unsafe { AtomicU64::from_ptr(map.as_ptr().cast()) };
    let count = counter.fetch_add(1, Ordering::Relaxed) + 1;
    map.persist(0..8)?;
    map.close()?;
    Ok(count)
}

#[allow(dead_code, reason = "the test calls `count`")]
fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("usage: counter FOLDER")?;
    println!("{}", count(Path::new(&folder))?);
    Ok(())
}
