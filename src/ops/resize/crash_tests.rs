//! Power cuts, kills and failing calls while a namespace in a file becomes larger or smaller: it has the old size or the
//! new one and its content, and the slots of the old size are gone.

use std::path::Path;
use std::sync::Arc;

use super::super::story_parts::{credential, pattern, text, volume};
use super::*;
use crate::leftovers::{Old, nothing_old_is_left};
use crate::namespace::{self, FormatOptions};
use crate::pmem::sim::{CrashImage, Effort, SimOptions, Story, Told, assert_proof, visible_bytes};
use crate::pmem::{Backing, Granularity};
use crate::xts::Backend;

const SMALL: u64 = 16 << 10;
const LARGE: u64 = 48 << 10;

struct Resize {
    options: SimOptions,
    from: u64,
    to: u64,
    beginning: Vec<u8>,
    old: Old,
}

impl Resize {
    fn new(granularity: Granularity, from: u64, to: u64) -> Self {
        let options = SimOptions::new(granularity);
        let backing = Arc::new(Backing::simulated(usize::try_from((2 << 20) + from).unwrap(), options).0);
        let format = FormatOptions { size_bytes: Some(from), ..FormatOptions::default() };
        let namespace = namespace::format(Arc::clone(&backing), format, &credential()).unwrap();
        Volume::new(namespace, Backend::detect()).write_at(&pattern(0, from), 0).unwrap();
        let beginning = visible_bytes(&backing);
        Self { options, from, to, old: Old::of(&beginning), beginning }
    }

    fn resize(&self, backing: &Arc<Backing>) -> Result<(), String> {
        let volume = volume(backing)?;
        let wanted = Wanted { size_bytes: Some(self.to), even_smaller: true, sparse: false };
        apply(&Location::new(Path::new("simulated"), None), &volume, wanted).map(drop).map_err(text)
    }
}

impl Story for Resize {
    type Note = ();
    type Seen = ();

    fn options(&self) -> SimOptions {
        self.options
    }

    fn beginning(&self) -> Vec<Vec<u8>> {
        vec![self.beginning.clone()]
    }

    fn run(&self, backings: &[Arc<Backing>], told: &Told<()>) -> Result<(), String> {
        self.resize(&backings[0])?;
        told.tell(());
        Ok(())
    }

    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[()]) -> Result<(), String> {
        let volume = volume(&backings[0])?;
        if ![self.from, self.to].contains(&volume.size()) {
            return Err(format!("it has {} bytes", volume.size()));
        }
        let mut found = vec![0; usize::try_from(self.from.min(self.to)).unwrap()];
        volume.read_at(&mut found, 0).map_err(text)?;
        if found != pattern(0, self.from.min(self.to)) {
            return Err("the content is garbled".into());
        }
        if told.is_empty() { Ok(()) } else { self.ended(image, None) }
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        if volume(&backings[0])?.size() == self.to { Ok(()) } else { self.resize(&backings[0]) }
    }

    fn ended(&self, image: CrashImage<'_>, _seen: Option<&()>) -> Result<(), String> {
        nothing_old_is_left(image.media, &[0], &self.old)?;
        match volume(&image.reopen(self.options).0[0])?.size() {
            size if size == self.to => Ok(()),
            size => Err(format!("it has {size} bytes")),
        }
    }
}

fn survives(name: &str, granularity: Granularity, from: u64, to: u64) {
    let effort = Effort { seconds_every: 6, ..Effort::of_environment() };
    let proof = assert_proof(name, &Resize::new(granularity, from, to), &effort);
    assert!(proof.explored.crash_points >= 2 && proof.mutants.all > 0, "{proof}");
    proof.mutants.assert_only_fences_survive(name);
}

#[test]
fn growth_survives() {
    survives("resize larger, page", Granularity::Page, SMALL, LARGE);
    survives("resize larger, cache line", Granularity::CacheLine, SMALL, LARGE);
}

#[test]
fn shrinking_survives() {
    survives("resize smaller, page", Granularity::Page, LARGE, SMALL);
    survives("resize smaller, cache line", Granularity::CacheLine, LARGE, SMALL);
}
