//! Power cuts, kills and failing calls during updates of the partition table: it is the old one or the new one, and what
//! was acknowledged stays.

use std::ops::Range;
use std::sync::Arc;

use super::Region;
use crate::pmem::sim::{CrashImage, Effort, SimOptions, Story, Told, assert_proof, visible_bytes};
use crate::pmem::{Backing, Granularity};

const MIB: u64 = 1 << 20;
const SECTOR: usize = 512;

type Change = fn(&mut Region) -> Result<(), String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

const CHANGES: [Change; 4] = [
    |region| region.remove("a").map_err(text),
    |region| region.add("c", 10 * MIB..12 * MIB).map_err(text),
    |region| region.resize("b", 2 * MIB).map(drop).map_err(text),
    |region| region.begin_earlier("b", 2 * MIB).map(drop).map_err(text),
];

/// The partitions after so many changes, by where they begin.
fn after(changes: usize) -> Vec<(&'static str, Range<u64>)> {
    let b = match changes {
        0..3 => 6 * MIB..10 * MIB,
        3 => 6 * MIB..8 * MIB,
        _ => 2 * MIB..8 * MIB,
    };
    let [a, c] = [("a", 2 * MIB..4 * MIB), ("c", 10 * MIB..12 * MIB)];
    [(changes == 0).then_some(a), Some(("b", b)), (changes >= 2).then_some(c)].into_iter().flatten().collect()
}

fn changes_in(backing: &Arc<Backing>) -> Result<usize, String> {
    let region = Region::open(Arc::clone(backing)).map_err(|error| format!("no region: {error}"))?;
    let mut found = region.partitions();
    found.sort_by_key(|partition| partition.range.start);
    let found: Vec<_> = found.iter().map(|partition| (partition.name.as_str(), partition.range.clone())).collect();
    let changes = (0..=CHANGES.len()).find(|&changes| after(changes) == found);
    changes.ok_or_else(|| format!("{found:?} is half a change"))
}

struct Updates {
    options: SimOptions,
    beginning: Vec<u8>,
}

impl Updates {
    fn new(granularity: Granularity) -> Self {
        let options = SimOptions::new(granularity);
        let backing = Arc::new(Backing::simulated(16 << 20, options).0);
        let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
        for (name, range) in after(0) {
            region.add(name, range).unwrap();
        }
        Self { options, beginning: visible_bytes(&backing) }
    }

    fn go_on(backing: &Arc<Backing>, tell: &dyn Fn(usize)) -> Result<(), String> {
        let done = changes_in(backing)?;
        let mut region = Region::open(Arc::clone(backing)).map_err(text)?;
        region.confirm().map_err(text)?;
        for (number, change) in CHANGES.iter().enumerate().skip(done) {
            change(&mut region)?;
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
        Self::go_on(&backings[0], &|changes| told.tell(changes))
    }

    /// No change that was acknowledged is lost, also when the primary table is damaged, or the backup.
    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[usize]) -> Result<(), String> {
        let last = told.last().copied().unwrap_or(0);
        let changes = changes_in(&backings[0])?;
        if changes < last {
            return Err(format!("{changes} changes are left of {last}"));
        }
        for start in [SECTOR, image.media.len() - SECTOR] {
            let mut alone = image.media.to_vec();
            alone[start..start + SECTOR].fill(0);
            let alone = Arc::new(Backing::from_media(alone, self.options).0);
            if Region::open(Arc::clone(&alone)).is_ok() && changes_in(&alone)? < last {
                return Err(format!("without the table at {start}, changes are left out of {last}"));
            }
        }
        Ok(())
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        Self::go_on(&backings[0], &drop)
    }

    fn ended(&self, image: CrashImage<'_>, _seen: Option<&()>) -> Result<(), String> {
        match changes_in(&image.reopen(self.options).0[0])? {
            changes if changes == CHANGES.len() => Ok(()),
            changes => Err(format!("only {changes} changes are left")),
        }
    }
}

fn survives(name: &str, granularity: Granularity) {
    let effort = Effort { seconds_every: 8, ..Effort::of_environment() };
    let proof = assert_proof(name, &Updates::new(granularity), &effort);
    assert!(proof.explored.crash_points >= 8 && proof.mutants.all > 0, "{proof}");
    proof.mutants.assert_only_fences_survive(name);
}

#[test]
fn table_updates_survive_at_cache_line_granularity() {
    survives("table, cache line", Granularity::CacheLine);
}

#[test]
fn table_updates_survive_at_page_granularity() {
    survives("table, page", Granularity::Page);
}
