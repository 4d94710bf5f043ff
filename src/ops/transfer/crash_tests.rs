//! Power cuts while a disk image is imported: every block is old or new, all are new once it was acknowledged, and no
//! barrier can be left out.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::super::pace::Unwatched;
use super::*;
use crate::namespace::{self, Credential, FormatOptions, LockedNamespace};
use crate::pmem::sim::{Bounds, CrashImage, SimHandle, SimOptions};
use crate::pmem::{Backing, Granularity};
use crate::secret::SecretBytes;
use crate::xts::Backend;

const SIZE: u64 = 32 << 10;
const IMPORTED: usize = 27_000;
const REACH: usize = 1000;

fn credential() -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[7; 32]))
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (seed..).map(|index| u8::try_from(1 + index * 31 % 251).unwrap()).take(len).collect()
}

fn volume(media: &[u8], options: SimOptions) -> (Volume, SimHandle) {
    let (backing, handle) = Backing::from_media(media, options);
    let locked = LockedNamespace::open(Arc::new(backing)).unwrap();
    (Volume::new(locked.unlock_key(&credential()).unwrap(), Backend::detect()), handle)
}

/// A namespace with old content.
fn media() -> Vec<u8> {
    let len = (2 << 20) + usize::try_from(SIZE).unwrap();
    let backing = Arc::new(Backing::simulated(len, SimOptions::new(Granularity::Page)).0);
    let format = FormatOptions { size_bytes: Some(SIZE), ..FormatOptions::default() };
    let namespace = namespace::format(Arc::clone(&backing), format, &credential()).unwrap();
    let old = pattern(0, usize::try_from(SIZE).unwrap());
    Volume::new(namespace, Backend::detect()).write_at(&old, 0).unwrap();
    let mut media = vec![0; len];
    backing.read(0..len as u64, |source| source.copy_to(&mut media)).unwrap();
    media
}

/// Old and new content, in which all bytes behind the image are old.
fn contents() -> [Vec<u8>; 2] {
    let old = pattern(0, usize::try_from(SIZE).unwrap());
    let mut new = old.clone();
    new[..IMPORTED].copy_from_slice(&pattern(77, IMPORTED));
    [old, new]
}

fn check(image: CrashImage<'_>, options: SimOptions, acknowledged: usize) -> Result<(), String> {
    let (volume, _) = volume(image.media, options);
    let [old, new] = contents();
    let mut found = vec![0; old.len()];
    volume.read_at(&mut found, 0).map_err(|error| error.to_string())?;
    if image.position >= acknowledged && found != new {
        return Err("acknowledged bytes are lost".into());
    }
    let blocks = found.chunks(16).zip(old.chunks(16).zip(new.chunks(16)));
    match blocks.into_iter().position(|(found, (old, new))| found != old && found != new) {
        Some(block) => Err(format!("block {block} is garbled")),
        None => Ok(()),
    }
}

fn survives(name: &str, granularity: Granularity) {
    let began = Instant::now();
    let options = SimOptions::new(granularity);
    let mut plain = tempfile::NamedTempFile::new().unwrap();
    plain.write_all(&pattern(77, IMPORTED)).unwrap();
    let (target, handle) = volume(&media(), options);
    let (mut watch, stop) = (Unwatched, AtomicBool::new(false));
    let mut run = Run::new(&mut watch, &stop, None);
    let mut image = Image::open(plain.path()).unwrap();
    import(&mut image, &target, &Location::new(Path::new("simulated"), None), &mut run).unwrap();
    let acknowledged = handle.position();

    let samples: usize = std::env::var("DAXCRYPT_CRASH_SAMPLES").map_or(4, |samples| samples.parse().unwrap());
    let bounds = Bounds { exhaustive_max: 4 * samples as u64, singles_max: 8 * samples, samples, ..Bounds::default() };
    let trace = handle.trace();
    let explored = trace.explore(&bounds, None, |image| check(image, options, acknowledged));
    let explored = explored.unwrap_or_else(|failure| panic!("{name}: event {}: {}", failure.position, failure.error));
    let mutants = trace.mutants(&bounds, REACH, |image| check(image, options, acknowledged));
    println!("crash {name}: {explored}, {mutants}, {:.1} s", began.elapsed().as_secs_f64());
    assert!(explored.states > 4 && mutants.all > 0, "{explored:?}");
    mutants.assert_only_fences_survive(name);
}

#[test]
fn an_import_survives_at_page_granularity() {
    survives("import, page", Granularity::Page);
}

#[test]
fn an_import_survives_at_cache_line_granularity() {
    survives("import, cache line", Granularity::CacheLine);
}
