//! Power cuts, kills and failing calls while detached data becomes larger or smaller, is re-keyed, or is accepted: at every
//! instant it has the tag of the header that is in force, or it would not open; and none of another key is left.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::rekey::{self, Wish};
use super::resize::{self, Wanted};
use super::story_parts::{credential, pattern, text};
use super::{Location, Run, Unwatched};
use crate::leftovers::{Old, nothing_old_is_left};
use crate::namespace::{
    self, AdoptError, FormatOptions, LockedNamespace, MovedNamespace, Namespace, OpenError, RekeyOptions, Site,
};
use crate::pmem::sim::{BarrierKind, Bounds, CrashImage, Effort, SimOptions, Story, Told, assert_proof, visible_bytes};
use crate::pmem::{Backing, Granularity};
use crate::volume::Volume;
use crate::xts::Backend;

const SMALL: u64 = 16 << 10;
const LARGE: u64 = 48 << 10;
const FILE_BYTES: usize = 64 << 10;
const TAG_BYTES: usize = 32;

/// The header comes first, and the data beside it.
fn site(backings: &[Arc<Backing>]) -> Site {
    Site::whole(Arc::clone(&backings[1])).with_header(Some(Arc::clone(&backings[0])))
}

fn content(namespace: Namespace) -> Result<Vec<u8>, String> {
    let volume = Volume::new(namespace, Backend::detect());
    let mut found = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut found, 0).map_err(text)?;
    Ok(found)
}

/// Moves everything there is to move, if there is a transform.
fn end_transform(namespace: Namespace) -> Result<(), String> {
    let (mut watch, stop) = (Unwatched, AtomicBool::new(false));
    let volume = Volume::new(namespace, Backend::detect());
    Run::new(&mut watch, &stop, None).end_transform(&volume).map(drop).map_err(text)
}

fn unlock(site: Site) -> Result<Namespace, String> {
    LockedNamespace::open_in(site).map_err(text)?.unlock_key(&credential()).map_err(text)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Resize {
        from: u64,
        to: u64,
    },
    Rekey,
    /// Of data whose tag was overwritten.
    Accept,
}

impl Change {
    const fn sizes(self) -> [u64; 2] {
        match self {
            Self::Resize { from, to } => [from, to],
            Self::Rekey | Self::Accept => [SMALL, SMALL],
        }
    }

    /// Flushes that may be missing, because there are two of what they flush and this story loses none: the header copies that
    /// tell of a smaller size before the tag follows; of a re-key the copies and the records of the journal. Of the tag there is one.
    const fn made_up_for(self) -> usize {
        match self {
            Self::Resize { from, to } if to < from => 2,
            Self::Resize { .. } | Self::Accept => 0,
            Self::Rekey => 5,
        }
    }
}

struct Detached {
    options: SimOptions,
    change: Change,
    beginning: Vec<Vec<u8>>,
    old: Old,
    old_tag: Vec<u8>,
}

impl Detached {
    fn new(granularity: Granularity, change: Change) -> Self {
        let options = SimOptions::new(granularity);
        let [size, _] = change.sizes();
        let memory = |len| Arc::new(Backing::simulated(len, options).0);
        let backings = [memory(2 << 20), memory(FILE_BYTES)];
        let header = Some(Arc::clone(&backings[0]));
        let format = FormatOptions { size_bytes: Some(size), header, ..FormatOptions::default() };
        let namespace = namespace::format(Arc::clone(&backings[1]), format, &credential()).unwrap();
        Volume::new(namespace, Backend::detect()).write_at(&pattern(0, size), 0).unwrap();
        let mut beginning = backings.map(|backing| visible_bytes(&backing)).to_vec();
        let tag = usize::try_from(size).unwrap();
        let old_tag = beginning[1][tag..tag + TAG_BYTES].to_vec();
        if change == Change::Accept {
            beginning[1][tag..].fill(0x5a);
        }
        Self { options, change, old: Old::of(&beginning[0]), old_tag, beginning }
    }

    fn open(&self, backings: &[Arc<Backing>]) -> Result<Namespace, String> {
        match self.change {
            Change::Accept => unlock(site(backings).accepting_data(true)),
            _ => unlock(site(backings)),
        }
    }

    fn go_on(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        let mut namespace = self.open(backings)?;
        match self.change {
            Change::Accept => Ok(()),
            Change::Resize { to, .. } if namespace.geometry().size_bytes() == to => Ok(()),
            Change::Resize { to, .. } => {
                let wanted = Wanted { size_bytes: Some(to), even_smaller: true, sparse: false };
                let volume = Volume::new(namespace, Backend::detect());
                resize::apply(&Location::new(Path::new("simulated"), None), &volume, wanted).map(drop).map_err(text)
            }
            Change::Rekey => {
                if namespace.pending_transform().is_none() && self.is_under_old_key(backings) {
                    rekey::begin(&mut namespace, &credential(), Wish::default()).map_err(text)?;
                }
                end_transform(namespace)
            }
        }
    }

    fn is_under_old_key(&self, backings: &[Arc<Backing>]) -> bool {
        self.old.found_in(&visible_bytes(&backings[0])).is_some()
    }

    /// Where the tag of the beginning is.
    fn old_tags(&self, data: &[u8]) -> Vec<usize> {
        (0..data.len() - TAG_BYTES).step_by(16).filter(|&at| data[at..].starts_with(&self.old_tag)).collect()
    }
}

impl Story for Detached {
    type Note = ();
    type Seen = ();

    fn options(&self) -> SimOptions {
        self.options
    }

    fn beginning(&self) -> Vec<Vec<u8>> {
        self.beginning.clone()
    }

    fn run(&self, backings: &[Arc<Backing>], told: &Told<()>) -> Result<(), String> {
        self.go_on(backings)?;
        told.tell(());
        Ok(())
    }

    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[()]) -> Result<(), String> {
        // Who has not acknowledged it may have to be accepted again.
        let namespace = if told.is_empty() { self.open(backings)? } else { unlock(site(backings))? };
        let [from, to] = self.change.sizes();
        if ![from, to].contains(&namespace.geometry().size_bytes()) || namespace.header().tag_offset.is_none() {
            return Err(format!("it has become {:?}", namespace.header()));
        }
        if !content(namespace)?.starts_with(&pattern(0, from.min(to))) {
            return Err("the content is garbled".into());
        }
        if told.is_empty() {
            return Ok(());
        }
        // Nobody has to look for what it has overwritten.
        if matches!(self.change, Change::Resize { .. }) && self.old_tags(image.others[0]).len() != 1 {
            return Err("the former place of the tag was acknowledged as overwritten".into());
        }
        if self.change == Change::Rekey {
            nothing_old_is_left(image.media, &[0], &self.old)?;
        }
        self.ended(image, None)
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        self.go_on(backings)
    }

    fn ended(&self, image: CrashImage<'_>, _seen: Option<&()>) -> Result<(), String> {
        let nothing = Old::default();
        let old = if self.change == Change::Accept { &nothing } else { &self.old };
        nothing_old_is_left(image.media, &[0], old)?;
        if self.change == Change::Rekey && !self.old_tags(image.others[0]).is_empty() {
            return Err("the tag of the old volume key is left".into());
        }
        let (header, [_, to]) = (unlock(site(&image.reopen(self.options).0))?.header(), self.change.sizes());
        match (header.size_bytes, header.tag_offset) {
            (size, Some(tag)) if size == to && tag == to => Ok(()),
            other => Err(format!("size and place of the tag are {other:?}")),
        }
    }
}

fn survives(name: &str, change: Change) {
    for (kind, granularity) in [("page", Granularity::Page), ("cache line", Granularity::CacheLine)] {
        let name = format!("detached {name}, {kind}");
        let effort = Effort { seconds_every: 6, ..Effort::of_environment() };
        let proof = assert_proof(&name, &Detached::new(granularity, change), &effort);
        assert!(proof.explored.crash_points >= 2 && proof.mutants.all > 0, "{proof}");
        let flushes = proof.mutants.survivors.iter().filter(|barrier| barrier.kind == BarrierKind::Flush).count();
        assert!(flushes <= change.made_up_for(), "{name}: {:?}", proof.mutants.survivors);
    }
}

#[test]
fn growth_of_detached_data_survives() {
    survives("growth", Change::Resize { from: SMALL, to: LARGE });
}

#[test]
fn shrinking_of_detached_data_survives() {
    survives("shrinking", Change::Resize { from: LARGE, to: SMALL });
}

#[test]
fn a_rekey_of_detached_data_survives() {
    survives("re-key", Change::Rekey);
}

#[test]
fn accepting_detached_data_survives() {
    survives("acceptance", Change::Accept);
}

/// The negative: a tag that is written after the header would be missed, and the check sees.
#[test]
fn a_header_before_its_tag_would_be_noticed() {
    let story = Detached::new(Granularity::Page, Change::Rekey);
    let mut media = story.beginning.clone();
    let tag = usize::try_from(SMALL).unwrap();
    media[1][tag..tag + TAG_BYTES].fill(0);
    let handle = Backing::from_media(&media[0], story.options).1;
    let failure = handle.trace().explore(&Bounds::default(), None, |image| {
        let data = Arc::new(Backing::from_media(&media[1], story.options).0);
        let header = Arc::new(Backing::from_media(image.media, story.options).0);
        story.check(&[header, data], image, &[])
    });
    assert!(failure.unwrap_err().error.contains("the tag of this header"));
}

/// Ciphertext that was moved to where its data begins later or earlier than it lies, so that the tag has to go elsewhere.
struct Adoption {
    options: SimOptions,
    /// Where it is now.
    base: u64,
    beginning: Vec<Vec<u8>>,
    old: Old,
}

const MIB: u64 = 1 << 20;

impl Adoption {
    fn new(granularity: Granularity, from: u64, to: u64) -> Self {
        let options = SimOptions::new(granularity);
        let [header, data] = [2 * MIB, 6 * MIB].map(|len| {
            let len = usize::try_from(len).unwrap();
            Arc::new(Backing::simulated(len, options).0)
        });
        let format = FormatOptions {
            base: from,
            size_bytes: Some(SMALL),
            header: Some(Arc::clone(&header)),
            ..FormatOptions::default()
        };
        let namespace = namespace::format(Arc::clone(&data), format, &credential()).unwrap();
        Volume::new(namespace, Backend::detect()).write_at(&pattern(0, SMALL), 0).unwrap();
        let mut moved = visible_bytes(&data);
        let [from, new] = [from, to].map(|start| usize::try_from(start).unwrap());
        let end = moved.len() - from.max(new);
        moved.copy_within(from..from + end, new);
        moved[..new].fill(0);
        let beginning = vec![visible_bytes(&header), moved];
        Self { options, base: to, old: Old::of(&beginning[0]), beginning }
    }

    fn site(&self, backings: &[Arc<Backing>]) -> Site {
        Site::part(Arc::clone(&backings[1]), self.base, u64::MAX).with_header(Some(Arc::clone(&backings[0])))
    }

    fn go_on(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        let namespace = match MovedNamespace::open_in(self.site(backings)) {
            Ok(moved) => moved.adopt(&credential(), &RekeyOptions::default()).map_err(text)?,
            Err(AdoptError::NotMoved { .. }) => unlock(self.site(backings))?,
            Err(error) => return Err(text(error)),
        };
        end_transform(namespace)
    }
}

impl Story for Adoption {
    type Note = ();
    type Seen = ();

    fn options(&self) -> SimOptions {
        self.options
    }

    fn beginning(&self) -> Vec<Vec<u8>> {
        self.beginning.clone()
    }

    fn run(&self, backings: &[Arc<Backing>], told: &Told<()>) -> Result<(), String> {
        self.go_on(backings)?;
        told.tell(());
        Ok(())
    }

    /// It opens, or can be adopted still, and then opens.
    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[()]) -> Result<(), String> {
        if let Err(OpenError::Relocated { .. }) = LockedNamespace::open_in(self.site(backings)) {
            self.go_on(backings)?;
        }
        let namespace = unlock(self.site(backings))?;
        if namespace.header().tag_offset.is_none() {
            return Err("it has lost its tag".into());
        }
        if content(namespace)? != pattern(0, SMALL) {
            return Err("the content is garbled".into());
        }
        if told.is_empty() { Ok(()) } else { self.ended(image, None) }
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        self.go_on(backings)
    }

    fn ended(&self, image: CrashImage<'_>, _seen: Option<&()>) -> Result<(), String> {
        if self.old.found_in(image.media).is_some() {
            return Err("an old sealed key is left".into());
        }
        let namespace = unlock(self.site(&image.reopen(self.options).0))?;
        let end = namespace.geometry().data_offset() + SMALL;
        match (namespace.pending_transform().is_none(), namespace.header().tag_offset) {
            (true, Some(tag)) if tag == end => Ok(()),
            other => Err(format!("whether it is adopted, and the place of its tag, are {other:?}")),
        }
    }
}

#[test]
fn an_adoption_of_detached_data_survives() {
    for (name, granularity, from, to) in [
        ("up, page", Granularity::Page, 0, MIB),
        ("up, cache line", Granularity::CacheLine, 0, MIB),
        ("down, page", Granularity::Page, MIB, 2 * MIB),
        ("down, cache line", Granularity::CacheLine, MIB, 2 * MIB),
    ] {
        let effort = Effort { seconds_every: 24, reach: 0, ..Effort::of_environment() };
        let proof = assert_proof(&format!("detached adoption {name}"), &Adoption::new(granularity, from, to), &effort);
        assert!(proof.explored.crash_points > 20, "{proof}");
    }
}
