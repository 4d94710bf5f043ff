//! Explores the media that power cuts could leave behind.
//!
//! A crash point lies before every flush, drain and sync of the trace, and at its end. Whatever a power cut between two of
//! them could leave, the next one could leave too, because stores in between can still be lost one by one.

use std::collections::HashSet;
use std::fmt;

use super::Trace;
use super::random::Random;
use super::replay::{Replay, barrier_kind};

/// How much to explore at one crash point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Up to so many combinations, all are explored.
    pub exhaustive_max: u64,
    /// Beyond: nothing and everything, and for so many cells (all, if there are no more) only this one lost, and only this
    /// one kept.
    pub singles_max: usize,
    /// Beyond: so many random combinations.
    pub samples: usize,
    /// What the random combinations depend on.
    pub seed: u64,
    /// Only power cuts at these positions, from the first to the last: a mutation shows near the barrier that it drops.
    pub positions: (usize, usize),
    /// Only at every so many crash points, and at the end.
    pub every: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            exhaustive_max: 4096,
            singles_max: 128,
            samples: 256,
            seed: 0x6461_7863_7279_7074,
            positions: (0, usize::MAX),
            every: 1,
        }
    }
}

/// The media after a simulated power cut.
#[derive(Clone, Copy)]
pub struct CrashImage<'a> {
    /// How many events of the trace came before the power cut; compare with [`SimHandle::position`](super::SimHandle).
    pub position: usize,
    /// The bytes of the first backing.
    pub media: &'a [u8],
    /// The bytes of the backings that were added to the recording.
    pub others: &'a [&'a [u8]],
}

impl fmt::Debug for CrashImage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { position, media, others } = self;
        write!(f, "CrashImage(position {position}, {} bytes, {} others)", media.len(), others.len())
    }
}

/// What an exploration has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Explored {
    /// Crash points.
    pub crash_points: usize,
    /// Media that were checked: different ones at each crash point.
    pub states: usize,
    /// Media that were checked and different over all crash points.
    pub unique_media: usize,
}

impl fmt::Display for Explored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { crash_points, states, unique_media } = self;
        write!(f, "{crash_points} crash points, {states} states, {unique_media} unique media")
    }
}

/// A power cut after which the check failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure<E> {
    /// How many events of the trace came before the power cut.
    pub position: usize,
    /// The media that it left, of the first backing.
    pub media: Vec<u8>,
    /// What the check said.
    pub error: E,
}

impl<E: fmt::Debug> fmt::Display for Failure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "after a power cut at event {}: {:?}", self.position, self.error)
    }
}

impl Trace {
    /// Checks the media that a power cut at any point could leave, within `bounds`, until a check fails. With `dropped`,
    /// the barrier of that number has no effect, as if the program had forgotten it: a check that is any good then fails.
    ///
    /// # Errors
    ///
    /// The first media that `check` refuses.
    pub fn explore<E>(
        &self,
        bounds: &Bounds,
        dropped: Option<usize>,
        mut check: impl FnMut(CrashImage<'_>) -> Result<(), E>,
    ) -> Result<Explored, Failure<E>> {
        let mut replay = Replay::new(self);
        let mut explored = Explored::default();
        let mut all_media = HashSet::new();
        let mut random = Random::new(bounds.seed);
        let mut barrier = 0;
        let mut suspects = Vec::new();
        let mut points = 0;
        for position in 0..=self.events.len() {
            let event = self.events.get(position);
            let is_barrier = event.is_some_and(|event| barrier_kind(event).is_some());
            let is_wanted = (bounds.positions.0..=bounds.positions.1).contains(&position);
            points += usize::from(is_wanted && is_barrier);
            if is_wanted && ((is_barrier && (points - 1) % bounds.every == 0) || event.is_none()) {
                let states = explore_point(&mut replay, bounds, &mut random, &suspects, position, &mut check)?;
                explored.crash_points += 1;
                explored.states += states.len();
                all_media.extend(states);
            }
            if is_barrier && dropped == Some(barrier) {
                suspects = event.map_or_else(Vec::new, |event| replay.cells_of(event));
            } else {
                event.map(|event| replay.apply(event));
            }
            barrier += usize::from(is_barrier);
        }
        explored.unique_media = all_media.len();
        Ok(explored)
    }
}

/// Checks the media of one crash point; the hashes of those that were different. `suspects` are the cells that a dropped
/// barrier was about: whatever the bounds, they alone are lost once, and they alone are kept.
fn explore_point<E>(
    replay: &mut Replay,
    bounds: &Bounds,
    random: &mut Random,
    suspects: &[u64],
    position: usize,
    check: &mut impl FnMut(CrashImage<'_>) -> Result<(), E>,
) -> Result<HashSet<u64>, Failure<E>> {
    let choices = replay.choices();
    let cells = replay.pending_cells();
    let mut seen = HashSet::new();
    let mut visit = |cuts: &[usize]| {
        replay.with_cut(cuts, |hash, media| {
            if !seen.insert(hash) {
                return Ok(());
            }
            let (first, others) = media.split_first().expect("a recording has a backing");
            let image = CrashImage { position, media: first, others };
            check(image).map_err(|error| Failure { position, media: first.to_vec(), error })
        })
    };
    if !suspects.is_empty() {
        for lost in [true, false] {
            visit(&replay_cuts(&cells, &choices, |cell| suspects.contains(&cell) == lost))?;
        }
    }
    let combinations = choices.iter().try_fold(1_u64, |product, cuts| product.checked_mul(cuts.len() as u64));
    match combinations {
        Some(combinations) if combinations <= bounds.exhaustive_max => {
            for number in 0..combinations {
                visit(&combination(&choices, number))?;
            }
        }
        _ => sample(&choices, bounds, random, &mut visit)?,
    }
    Ok(seen)
}

/// Nothing of the cells that are `lost`, and everything of the others.
fn replay_cuts(cells: &[u64], choices: &[Vec<usize>], lost: impl Fn(u64) -> bool) -> Vec<usize> {
    let everything = |cuts: &Vec<usize>| *cuts.last().expect("a cell has stores");
    let cut = |(index, cuts)| if cells.get(index).is_some_and(|&cell| lost(cell)) { 0 } else { everything(cuts) };
    choices.iter().enumerate().map(cut).collect()
}

/// The combination of cuts with this number, counted like digits of different bases.
fn combination(choices: &[Vec<usize>], mut number: u64) -> Vec<usize> {
    let mut digit = |cuts: &Vec<usize>| {
        let base = cuts.len() as u64;
        let digit = usize::try_from(number % base).expect("less than a length");
        number /= base;
        cuts[digit]
    };
    choices.iter().map(&mut digit).collect()
}

fn sample<E>(
    choices: &[Vec<usize>],
    bounds: &Bounds,
    random: &mut Random,
    visit: &mut impl FnMut(&[usize]) -> Result<(), E>,
) -> Result<(), E> {
    let none = vec![0; choices.len()];
    let all: Vec<usize> = choices.iter().map(|cuts| *cuts.last().expect("a cell has stores")).collect();
    visit(&none)?;
    visit(&all)?;
    let singles: Vec<usize> = if choices.len() <= bounds.singles_max {
        (0..choices.len()).collect()
    } else {
        (0..bounds.singles_max).map(|_| random.below(choices.len())).collect()
    };
    for cell in singles {
        let mut one_lost = all.clone();
        one_lost[cell] = 0;
        visit(&one_lost)?;
        let mut one_kept = none.clone();
        one_kept[cell] = all[cell];
        visit(&one_kept)?;
    }
    for _ in 0..bounds.samples {
        let cuts: Vec<usize> = choices.iter().map(|cuts| cuts[random.below(cuts.len())]).collect();
        visit(&cuts)?;
    }
    Ok(())
}
