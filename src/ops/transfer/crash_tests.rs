//! Power cuts, kills and failing calls while a disk image is imported: every block is old or new, all are new once it was
//! acknowledged, and no barrier can be left out.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::super::pace::Unwatched;
use super::super::story_parts::{credential, pattern, text, volume};
use super::*;
use crate::namespace::{self, FormatOptions};
use crate::pmem::sim::{CrashImage, Effort, SimOptions, Story, Told, assert_proof, visible_bytes};
use crate::pmem::{Backing, Granularity};
use crate::xts::Backend;

const SIZE: u64 = 32 << 10;
const IMPORTED: usize = 27_000;

fn content(backing: &Arc<Backing>) -> Result<Vec<u8>, String> {
    let mut found = vec![0; usize::try_from(SIZE).unwrap()];
    volume(backing)?.read_at(&mut found, 0).map_err(text)?;
    Ok(found)
}

/// An import over a namespace with old content.
struct Imported {
    options: SimOptions,
    beginning: Vec<u8>,
    plain: tempfile::NamedTempFile,
}

impl Imported {
    fn new(granularity: Granularity) -> Self {
        let options = SimOptions::new(granularity);
        let backing = Arc::new(Backing::simulated((2 << 20) + usize::try_from(SIZE).unwrap(), options).0);
        let format = FormatOptions { size_bytes: Some(SIZE), ..FormatOptions::default() };
        let namespace = namespace::format(Arc::clone(&backing), format, &credential()).unwrap();
        Volume::new(namespace, Backend::detect()).write_at(&Self::contents()[0], 0).unwrap();
        let mut plain = tempfile::NamedTempFile::new().unwrap();
        plain.write_all(&pattern(77, IMPORTED as u64)).unwrap();
        Self { options, beginning: visible_bytes(&backing), plain }
    }

    /// Old and new content, in which all bytes behind the image are old.
    fn contents() -> [Vec<u8>; 2] {
        let old = pattern(0, SIZE);
        let mut new = old.clone();
        new[..IMPORTED].copy_from_slice(&pattern(77, IMPORTED as u64));
        [old, new]
    }

    fn import(&self, backing: &Arc<Backing>) -> Result<(), String> {
        let (mut watch, stop) = (Unwatched, AtomicBool::new(false));
        let mut run = Run::new(&mut watch, &stop, None);
        let mut image = Image::open(self.plain.path()).map_err(text)?;
        let place = Location::new(Path::new("simulated"), None);
        import(&mut image, &volume(backing)?, &place, &mut run).map(drop).map_err(text)
    }
}

impl Story for Imported {
    type Note = ();
    type Seen = ();

    fn options(&self) -> SimOptions {
        self.options
    }

    fn beginning(&self) -> Vec<Vec<u8>> {
        vec![self.beginning.clone()]
    }

    fn run(&self, backings: &[Arc<Backing>], told: &Told<()>) -> Result<(), String> {
        self.import(&backings[0])?;
        told.tell(());
        Ok(())
    }

    fn check(&self, backings: &[Arc<Backing>], _: CrashImage<'_>, told: &[()]) -> Result<(), String> {
        let [old, new] = Self::contents();
        let found = content(&backings[0])?;
        if !told.is_empty() && found != new {
            return Err("acknowledged bytes are lost".into());
        }
        let blocks = found.chunks(16).zip(old.chunks(16).zip(new.chunks(16)));
        match blocks.into_iter().position(|(found, (old, new))| found != old && found != new) {
            Some(block) => Err(format!("block {block} is garbled")),
            None => Ok(()),
        }
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        self.import(&backings[0])
    }

    fn ended(&self, image: CrashImage<'_>, _seen: Option<&()>) -> Result<(), String> {
        let found = content(&image.reopen(self.options).0[0])?;
        if found == Self::contents()[1] { Ok(()) } else { Err("imported bytes are lost".into()) }
    }
}

fn survives(name: &str, granularity: Granularity) {
    let bounds = Effort::new(4).bounds;
    let effort = Effort::of_environment();
    let samples = effort.bounds.samples.max(bounds.samples);
    let effort = Effort { bounds: Effort::new(samples).bounds, ..effort };
    let proof = assert_proof(name, &Imported::new(granularity), &effort);
    assert!(proof.mutants.all > 0, "{proof}");
    proof.mutants.assert_only_fences_survive(name);
}

#[test]
fn an_import_survives_at_page_granularity() {
    survives("import, page", Granularity::Page);
}

#[test]
fn an_import_survives_at_cache_line_granularity() {
    survives("import, cache line", Granularity::CacheLine);
}
