//! Power cuts, kills and failing calls during updates of the header: exactly the old or the new set of keys opens, an
//! acknowledged change stays, and an update that was interrupted is finished.

use std::sync::Arc;

use super::{Credential, FormatOptions, KdfCost, LockedNamespace, Namespace, format};
use crate::leftovers::{Old, nothing_old_is_left};
use crate::pmem::sim::{
    Bounds, CrashImage, Effort, Fault, PageCache, SimHandle, SimOptions, Story, Told, assert_proof, visible_bytes,
};
use crate::pmem::{Backing, Granularity};
use crate::secret::SecretBytes;

const SIZE: u64 = 16 << 10;
const KEYS: [u8; 3] = [1, 2, 3];
const COPIES: [usize; 2] = [0, 256 << 10];
const COPY_BYTES: usize = 64 << 10;

fn key_file(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

/// What a header lets see: which keys open, how large the volume is, and two flags.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    opens: [bool; KEYS.len()],
    size_bytes: u64,
    unclean: bool,
    discards: bool,
}

type Change = fn(&mut Namespace) -> Result<(), String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

const CHANGES: [Change; 6] = [
    |namespace| namespace.set_unclean(true).map_err(text),
    |namespace| namespace.add_slot(None, "second", &key_file(2), KdfCost::LEAST).map(drop).map_err(text),
    |namespace| namespace.change_slot(0, &key_file(3), KdfCost::LEAST).map_err(text),
    |namespace| namespace.resize(2 * SIZE, false).map_err(text),
    |namespace| namespace.remove_slot(1, false).map_err(text),
    |namespace| namespace.allow_discards().map_err(text),
];

/// What is seen after so many changes.
fn after(changes: usize) -> Seen {
    Seen {
        opens: [changes < 3, (2..5).contains(&changes), changes >= 3],
        size_bytes: if changes < 4 { SIZE } else { 2 * SIZE },
        unclean: changes >= 1,
        discards: changes >= 6,
    }
}

fn open(backing: &Arc<Backing>, key: u8) -> Option<Namespace> {
    LockedNamespace::open(Arc::clone(backing)).ok()?.unlock_key(&key_file(key)).ok()
}

/// After how many changes it looks so.
fn changes_in(backing: &Arc<Backing>) -> Result<usize, String> {
    let locked = LockedNamespace::open(Arc::clone(backing)).map_err(text)?;
    let header = locked.header().clone();
    let opens = KEYS.map(|key| open(backing, key).is_some());
    let (size_bytes, unclean, discards) = (header.size_bytes, header.unclean, header.discards);
    let seen = Seen { opens, size_bytes, unclean, discards };
    let changes = (0..=CHANGES.len()).find(|&changes| after(changes) == seen);
    changes.ok_or_else(|| format!("{seen:?} is half a change"))
}

/// All changes, one after the other.
struct Updates {
    options: SimOptions,
    beginning: Vec<u8>,
    old: Old,
}

impl Updates {
    fn new(options: SimOptions) -> Self {
        let backing = Arc::new(Backing::simulated(usize::try_from((2 << 20) + 2 * SIZE).unwrap(), options).0);
        let formatting = FormatOptions { size_bytes: Some(SIZE), ..FormatOptions::default() };
        format(Arc::clone(&backing), formatting, &key_file(1)).unwrap();
        let beginning = visible_bytes(&backing);
        Self { options, old: Old::of(&beginning), beginning }
    }

    fn go_on(&self, backing: &Arc<Backing>, tell: &dyn Fn(usize)) -> Result<(), String> {
        let done = changes_in(backing)?;
        let mut namespace = KEYS.iter().find_map(|&key| open(backing, key)).ok_or("no key opens")?;
        for (number, change) in CHANGES.iter().enumerate().skip(done) {
            change(&mut namespace)?;
            tell(number + 1);
        }
        Ok(())
    }
}

impl Story for Updates {
    type Note = usize;
    type Seen = ();

    fn options(&self) -> SimOptions {
        self.options
    }

    fn beginning(&self) -> Vec<Vec<u8>> {
        vec![self.beginning.clone()]
    }

    fn run(&self, backings: &[Arc<Backing>], told: &Told<usize>) -> Result<(), String> {
        self.go_on(&backings[0], &|changes| told.tell(changes))
    }

    /// No change that was acknowledged is lost, and neither copy by itself is of before it: that is how a removed slot is
    /// destroyed.
    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[usize]) -> Result<(), String> {
        let last = told.last().copied().unwrap_or(0);
        let changes = changes_in(&backings[0])?;
        if changes < last {
            return Err(format!("{changes} changes are left of {last}"));
        }
        for start in COPIES {
            let mut alone = image.media.to_vec();
            alone[start..start + COPY_BYTES].fill(0);
            let (alone, _) = Backing::from_media(alone, self.options);
            let alone = Arc::new(alone);
            if LockedNamespace::open(Arc::clone(&alone)).is_ok() && changes_in(&alone)? < last {
                return Err(format!("without the copy at {start}, changes are left out of {last}"));
            }
        }
        Ok(())
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        self.go_on(&backings[0], &drop)
    }

    fn ended(&self, image: CrashImage<'_>, _seen: Option<&()>) -> Result<(), String> {
        nothing_old_is_left(image.media, &[0], &self.old)?;
        match changes_in(&image.reopen(self.options).0[0])? {
            changes if changes == CHANGES.len() => Ok(()),
            changes => Err(format!("only {changes} changes are left")),
        }
    }
}

fn survives(name: &str, granularity: Granularity) {
    let all = Effort::of_environment();
    let effort = Effort { seconds_every: 40, kills: all.kills / 2, faults: all.faults / 2, reach: 8, ..all };
    let proof = assert_proof(name, &Updates::new(SimOptions::new(granularity)), &effort);
    assert!(proof.explored.crash_points >= 24 && proof.explored.states > 60, "{proof}");
    assert!(proof.mutants.all > 0 && proof.mutants.survivors.is_empty(), "not noticed: {:?}", proof.mutants.survivors);
}

#[test]
fn header_updates_survive_at_cache_line_granularity() {
    survives("header, cache line", Granularity::CacheLine);
}

#[test]
fn header_updates_survive_at_page_granularity() {
    survives("header, page", Granularity::Page);
}

/// Whose key opens what the data begins with must not open what is there in future, also when a power cut comes after the
/// second try.
#[test]
fn a_header_in_front_of_detached_data_goes_although_an_earlier_format_failed_or_was_killed() {
    let options = SimOptions::new(Granularity::Page);
    let data = Arc::new(Backing::simulated(4 << 20, options).0);
    let attached = FormatOptions { size_bytes: Some(SIZE), ..FormatOptions::default() };
    format(Arc::clone(&data), attached, &key_file(1)).unwrap();
    let before = visible_bytes(&data);
    let old = Old::of(&before);
    let record = |fault: Option<usize>| {
        let (data, handle) = Backing::from_media(&before, options);
        let header = Arc::new(handle.beside(&vec![0; 2 << 20], options));
        if let Some(call) = fault {
            handle.fail_call(call, Fault::Io);
        }
        (detached(&Arc::new(data), &header), handle)
    };
    let is_gone = |backings: &[Arc<Backing>], handle: &SimHandle, what: &str| {
        detached(&backings[0], &backings[1]).unwrap_or_else(|error| panic!("{what}: {error}"));
        let trace = handle.trace();
        let bounds = Bounds { positions: (trace.end(), trace.end()), ..Effort::of_environment().bounds };
        let left = trace.explore(&bounds, None, |image| {
            match image.media.starts_with(b"DAXCRYPT") || old.found_in(image.media).is_some() {
                true => Err("the old header is on media"),
                false => Ok(()),
            }
        });
        left.unwrap_or_else(|failure| panic!("{what}: {failure}"));
    };
    let (whole, handle) = record(None);
    whole.unwrap();
    let trace = handle.trace();
    let mut tries = 0;
    for barrier in trace.barriers() {
        let (backings, handle) = trace.restart(barrier.position, PageCache::Kept);
        is_gone(&backings, &handle, &format!("killed at {}", barrier.position));
        tries += 1;
    }
    for (call, cache) in (0..handle.calls()).flat_map(|call| [(call, PageCache::Kept), (call, PageCache::Evicted)]) {
        let trace = record(Some(call)).1.trace();
        let (backings, handle) = trace.restart(trace.end(), cache);
        is_gone(&backings, &handle, &format!("call {call} failed, {cache:?}"));
        tries += 1;
    }
    assert!(tries > 20, "{tries}");
}

/// Formats with the header in a file of its own.
fn detached(data: &Arc<Backing>, header: &Arc<Backing>) -> Result<(), String> {
    let options =
        FormatOptions { size_bytes: Some(SIZE), header: Some(Arc::clone(header)), ..FormatOptions::default() };
    format(Arc::clone(data), options, &key_file(2)).map(drop).map_err(text)
}
