//! Power cuts on simulated media: what was acknowledged as durable is there, and every block is old or new.

use std::sync::Arc;

use super::*;
use crate::namespace::{self, Credential, FormatOptions};
use crate::pmem::sim::{Bounds, CrashImage, SimHandle, SimOptions};
use crate::secret::SecretBytes;

const SIZE: u64 = 64 << 10;
const DATA: usize = 2 << 20;

/// A write that was acknowledged: from this event on, the bytes must be there.
struct Acknowledged {
    position: usize,
    offset: u64,
    bytes: Vec<u8>,
}

fn credential() -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[7; 32]))
}

fn open(backing: Backing) -> Volume {
    LockedNamespace::open(Arc::new(backing)).unwrap().unlock(&credential()).unwrap()
}

/// A formatted namespace on media whose recording begins now.
fn volume(granularity: Granularity) -> (Volume, SimHandle) {
    let size = DATA + usize::try_from(SIZE).unwrap();
    let options = SimOptions::new(granularity);
    let (backing, _) = Backing::simulated(size, options);
    let backing = Arc::new(backing);
    let format = FormatOptions { size_bytes: Some(SIZE), ..FormatOptions::default() };
    let namespace = namespace::format(Arc::clone(&backing), format, &credential()).unwrap();
    Volume::new(namespace, Backend::detect()).write_zeroes(0, SIZE).unwrap();
    let mut media = vec![0; size];
    backing.read(0..size as u64, |source| source.copy_to(&mut media)).unwrap();
    let (backing, handle) = Backing::from_media(media, options);
    (open(backing), handle)
}

/// Writes of every kind, each made durable in its own way, at places of their own.
fn work(volume: &Volume, handle: &SimHandle) -> Vec<Acknowledged> {
    let mut acknowledged = Vec::new();
    let lengths = [1_usize, 8, 16, 64, 100, 512, 1500, 4096, 5000];
    let mut offset = 3;
    for (index, len) in lengths.into_iter().enumerate() {
        let seed = u8::try_from(index).unwrap() + 1;
        let bytes: Vec<u8> = (1..=251).cycle().map(|byte: u8| byte ^ seed).take(len).collect();
        let range = offset..offset + len as u64;
        volume.write_at(&bytes, offset).unwrap();
        match index % 3 {
            0 => volume.flush().unwrap(),
            1 => volume.persist(range.clone()).unwrap(),
            _ if volume.granularity() == Granularity::Page => volume.flush().unwrap(),
            // At cache-line granularity a write is durable when it returns.
            _ => {}
        }
        acknowledged.push(Acknowledged { position: handle.position(), offset, bytes });
        offset = range.end + 37;
    }
    acknowledged
}

fn check(image: CrashImage<'_>, granularity: Granularity, acknowledged: &[Acknowledged]) -> Result<(), String> {
    let volume = open(Backing::from_media(image.media, SimOptions::new(granularity)).0);
    for write in acknowledged {
        let mut found = vec![0; write.bytes.len()];
        volume.read_at(&mut found, write.offset).unwrap();
        let durable = write.position <= image.position;
        if durable && found != write.bytes {
            return Err(format!("{} acknowledged bytes at {} are lost", found.len(), write.offset));
        }
        // Old plaintext is zero and no new byte is, so a byte that is neither comes from a torn block.
        if found.iter().zip(&write.bytes).any(|(&found, &new)| found != 0 && found != new) {
            return Err(format!("a block at {} is garbled", write.offset));
        }
    }
    Ok(())
}

fn bounds() -> Bounds {
    Bounds { exhaustive_max: 8, singles_max: 3, samples: 4, ..Bounds::default() }
}

fn survives(granularity: Granularity) {
    let (volume, handle) = volume(granularity);
    let acknowledged = work(&volume, &handle);
    let trace = handle.trace();
    let explored = trace.explore(&bounds(), None, |image| check(image, granularity, &acknowledged));
    let explored = explored.unwrap_or_else(|failure| panic!("event {}: {}", failure.position, failure.error));
    assert!(explored.crash_points > 9 && explored.states > 30, "{explored:?}");

    // A flush can be spared where the rest of the same write flushes the same line again; each write needs one at least.
    let effective = trace.barriers().into_iter().filter(|barrier| barrier.effective);
    let missed = effective.filter(|barrier| {
        let dropped = trace.explore(&bounds(), Some(barrier.number), |image| check(image, granularity, &acknowledged));
        dropped.is_err()
    });
    let missed = missed.count();
    assert!(missed + 1 >= acknowledged.len(), "only {missed} flushes and fences are missed when they are dropped");
}

#[test]
fn acknowledged_writes_survive_a_power_cut_at_cache_line_granularity() {
    survives(Granularity::CacheLine);
}

#[test]
fn acknowledged_writes_survive_a_power_cut_at_page_granularity() {
    survives(Granularity::Page);
}

/// The negative: were media torn at 8 bytes, half-written blocks would garble their neighbours, and the check would see.
#[test]
fn a_torn_unit_below_the_block_garbles_and_is_seen() {
    let (volume, handle) = volume(Granularity::CacheLine);
    drop(volume);
    let mut media = Vec::new();
    let taken = handle.trace().explore(&bounds(), None, |image| {
        media = image.media.to_vec();
        Ok::<_, ()>(())
    });
    assert!(taken.is_ok());
    let torn = SimOptions::new(Granularity::CacheLine).torn_bytes(8);
    let (backing, handle) = Backing::from_media(media, torn);
    let volume = open(backing);
    let acknowledged = work(&volume, &handle);
    let explored = handle.trace().explore(&bounds(), None, |image| check(image, Granularity::CacheLine, &acknowledged));
    assert!(explored.unwrap_err().error.contains("garbled"));
}
