//! Mutations: what a check notices when one flush, drain or sync is left out.

use std::fmt;

use super::BarrierKind;
use super::Trace;
use super::explore::{Bounds, CrashImage};
use super::replay::Barrier;

/// What became of the mutations of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mutants {
    /// Barriers that had an effect, each of which was left out once.
    pub all: usize,
    /// How many of those the check noticed.
    pub killed: usize,
    /// Those that it did not notice.
    pub survivors: Vec<Barrier>,
    /// Media that were checked.
    pub states: usize,
}

impl Mutants {
    /// Asserts that only fences were not noticed. A fence that is left out may not matter: the next one of the same thread
    /// does its work before anything relies on it.
    ///
    /// # Panics
    ///
    /// Panics with `name` and the others, when there are any.
    pub fn assert_only_fences_survive(&self, name: &str) {
        let is_fence = |barrier: &Barrier| barrier.kind == BarrierKind::Drain;
        assert!(self.survivors.iter().all(is_fence), "{name}: not noticed: {:?}", self.survivors);
    }
}

impl fmt::Display for Mutants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { all, killed, survivors, .. } = self;
        write!(f, "{killed} of {all} mutants killed ({} fences are made up for)", survivors.len())
    }
}

impl Trace {
    /// Leaves out every barrier that has an effect, one at a time, and runs `check` over power cuts from there up to
    /// `reach` barriers later.
    pub fn mutants<E>(
        &self,
        bounds: &Bounds,
        reach: usize,
        mut check: impl FnMut(CrashImage<'_>) -> Result<(), E>,
    ) -> Mutants {
        let barriers = self.barriers();
        let mut mutants = Mutants::default();
        for barrier in barriers.iter().filter(|barrier| barrier.effective) {
            let last =
                barriers.get(barrier.number.saturating_add(reach)).map_or(usize::MAX, |barrier| barrier.position);
            let bounds = Bounds { positions: (barrier.position, last), ..*bounds };
            let explored = self.explore(&bounds, Some(barrier.number), |image| {
                mutants.states += 1;
                check(image)
            });
            mutants.all += 1;
            match explored {
                Err(_) => mutants.killed += 1,
                Ok(_) => mutants.survivors.push(*barrier),
            }
        }
        mutants
    }
}
