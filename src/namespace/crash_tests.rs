//! Power cuts during updates of the header: exactly the old or the new set of keys opens, and an acknowledged change stays.

use std::sync::Arc;
use std::time::Instant;

use super::header::{COPY_BYTES, HeaderCopy};
use super::metadata::Metadata;
use super::{Credential, FormatOptions, KdfCost, LockedNamespace, Namespace, format};
use crate::memory::Source;
use crate::pmem::sim::{Bounds, CrashImage, SimHandle, SimOptions};
use crate::pmem::{Backing, Granularity};
use crate::secret::SecretBytes;

const SIZE: u64 = 16 << 10;
const KEYS: [u8; 4] = [1, 2, 3, 4];

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

fn open(backing: &Arc<Backing>, key: u8) -> Option<Namespace> {
    LockedNamespace::open(Arc::clone(backing)).ok()?.unlock_key(&key_file(key)).ok()
}

fn see(backing: &Arc<Backing>) -> Result<Seen, String> {
    let locked = LockedNamespace::open(Arc::clone(backing)).map_err(|error| error.to_string())?;
    let header = locked.header().clone();
    let opens = KEYS.map(|key| open(backing, key).is_some());
    Ok(Seen { opens, size_bytes: header.size_bytes, unclean: header.unclean, discards: header.discards })
}

/// The state after an acknowledged change.
struct State {
    acknowledged: usize,
    seen: Seen,
    metadata: Metadata,
}

/// The states after each change; the first is the beginning.
fn story(options: SimOptions) -> (Vec<State>, SimHandle) {
    let len = usize::try_from((2 << 20) + 2 * SIZE).unwrap();
    let backing = Arc::new(Backing::simulated(len, options).0);
    let formatting = FormatOptions { size_bytes: Some(SIZE), ..FormatOptions::default() };
    format(Arc::clone(&backing), formatting, &key_file(1)).unwrap();
    let mut media = vec![0; len];
    backing.read(0..len as u64, |source: Source<'_>| source.copy_to(&mut media)).unwrap();
    let (backing, handle) = Backing::from_media(media, options);
    let backing = Arc::new(backing);
    let mut namespace = open(&backing, 1).unwrap();
    let state = |acknowledged, namespace: &Namespace| State {
        acknowledged,
        seen: see(&backing).unwrap(),
        metadata: namespace.metadata.clone(),
    };
    let mut states = vec![state(0, &namespace)];
    let changes: [fn(&mut Namespace); 6] = [
        |namespace| namespace.set_unclean(true).unwrap(),
        |namespace| assert_eq!(namespace.add_slot(None, "second", &key_file(2), KdfCost::LEAST).unwrap(), 1),
        |namespace| namespace.change_slot(0, &key_file(3), KdfCost::LEAST).unwrap(),
        |namespace| namespace.resize(2 * SIZE, false).unwrap(),
        |namespace| namespace.remove_slot(1, false).unwrap(),
        |namespace| namespace.allow_discards().unwrap(),
    ];
    for change in changes {
        change(&mut namespace);
        states.push(state(handle.position(), &namespace));
    }
    (states, handle)
}

/// The state is that of the last acknowledged change or, while the next one is under way, of the next.
/// Neither copy by itself is of an older state: that is how a removed slot is destroyed.
fn check(image: CrashImage<'_>, options: SimOptions, states: &[State]) -> Result<(), String> {
    let backing = Arc::new(Backing::from_media(image.media, options).0);
    let seen = see(&backing)?;
    let last = states.iter().rposition(|state| state.acknowledged <= image.position).expect("the first is at 0");
    let allowed = &states[last..states.len().min(last + 2)];
    if !allowed.iter().any(|state| state.seen == seen) {
        return Err(format!("{seen:?} after change {last}"));
    }
    for start in [0, 256 << 10] {
        let copy: &[u8; COPY_BYTES] = image.media[start..start + COPY_BYTES].try_into().unwrap();
        let metadata = HeaderCopy::decode(copy).map(|copy| copy.metadata);
        if metadata.is_ok_and(|metadata| !allowed.iter().any(|state| state.metadata == metadata)) {
            return Err(format!("the copy at {start} is older than change {last}"));
        }
    }
    Ok(())
}

fn survives(granularity: Granularity) {
    let began = Instant::now();
    let options = SimOptions::new(granularity);
    let samples: usize = std::env::var("DAXCRYPT_CRASH_SAMPLES").map_or(4, |samples| samples.parse().unwrap());
    let bounds = Bounds { exhaustive_max: 4 * samples as u64, singles_max: samples, samples, ..Bounds::default() };
    let (states, handle) = story(options);
    let trace = handle.trace();
    let explored = trace.explore(&bounds, None, |image| check(image, options, &states));
    let explored = explored.unwrap_or_else(|failure| panic!("event {}: {}", failure.position, failure.error));
    let mutants = trace.mutants(&bounds, 8, |image| check(image, options, &states));
    println!(
        "crash header, {granularity:?}: {} crash points, {} states, {} unique media, {} of {} mutants killed, {:.1} s",
        explored.crash_points,
        explored.states,
        explored.unique_media,
        mutants.killed,
        mutants.all,
        began.elapsed().as_secs_f64()
    );
    assert!(explored.crash_points >= 24 && explored.states > 60, "{explored:?}");
    assert!(mutants.survivors.is_empty(), "not noticed: {:?}", mutants.survivors);
}

#[test]
fn header_updates_survive_a_power_cut_at_cache_line_granularity() {
    survives(Granularity::CacheLine);
}

#[test]
fn header_updates_survive_a_power_cut_at_page_granularity() {
    survives(Granularity::Page);
}
