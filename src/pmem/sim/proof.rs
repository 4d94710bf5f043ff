//! One way to prove an operation: it is cut everywhere, killed and gone on with, and every call of it fails once.
//!
//! An operation is a [`Story`]. [`prove`] records it and asks:
//!
//! - **cuts**: the power fails at any point; some of the media are then brought to an end, and the power fails again;
//! - **kills**: the process dies and the power stays. The next process, which finds stores that are visible and not
//!   durable, brings the operation to its end, the power failing at any point of that;
//! - **faults**: a call fails with EIO or ENOSPC. The power fails then; or the next process brings it to its end, while
//!   pages that failed are clean, or have been read again;
//! - **mutants**: each flush, drain and sync is left out once.
//!
//! Whatever was acknowledged must be there each time, what a story says of its content must be true, and when an operation
//! has ended, or has been cut and then brought to its end, nothing old may be left.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Bounds, CrashImage, Explored, Fault, Mutants, PageCache, SimHandle, SimOptions, Trace};
use crate::pmem::Backing;

/// An operation, and what must be true of the media that it leaves.
pub trait Story {
    /// Something that was acknowledged to the user.
    type Note: Clone;
    /// What a process saw that has brought the operation to its end.
    type Seen;

    /// Whether a note stays true while the operation is brought to its end. One that tells of a moment does not.
    fn lasts(_note: &Self::Note) -> bool {
        true
    }

    /// What the media are.
    fn options(&self) -> SimOptions;

    /// The media of all backings before the operation.
    fn beginning(&self) -> Vec<Vec<u8>>;

    /// Runs the operation and tells what it acknowledges.
    ///
    /// # Errors
    ///
    /// What stopped it.
    fn run(&self, backings: &[Arc<Backing>], told: &Told<Self::Note>) -> Result<(), String>;

    /// Checks media that a power cut left when the power is back, which `backings` show to a process that may write.
    /// `told` is what had been acknowledged.
    ///
    /// # Errors
    ///
    /// What is wrong.
    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[Self::Note]) -> Result<(), String>;

    /// Does what a user does who finds the operation interrupted, until it has ended, and makes everything durable.
    ///
    /// # Errors
    ///
    /// What stopped it.
    fn finish(&self, backings: &[Arc<Backing>]) -> Result<Self::Seen, String>;

    /// Checks media on which the operation has been brought to its end: nothing old is left. `seen` is not there when a
    /// flush of the user's data had failed.
    ///
    /// # Errors
    ///
    /// What is wrong.
    fn ended(&self, image: CrashImage<'_>, seen: Option<&Self::Seen>) -> Result<(), String>;
}

/// What was acknowledged, and when.
#[derive(Debug)]
pub struct Told<N> {
    handle: SimHandle,
    notes: Mutex<Vec<(usize, N)>>,
}

impl<N: Clone> Told<N> {
    fn new(handle: SimHandle) -> Self {
        Self { handle, notes: Mutex::default() }
    }

    /// Acknowledges something now.
    pub fn tell(&self, note: N) {
        self.lock().push((self.handle.position(), note));
    }

    /// What was acknowledged before this position.
    fn at(&self, position: usize) -> Vec<N> {
        let reached = |(told, _): &&(usize, N)| *told <= position;
        self.lock().iter().filter(reached).map(|(_, note)| note.clone()).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(usize, N)>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Of a power cut.
    pub bounds: Bounds,
    /// A state of so many is brought to its end, with a second power cut on the way.
    pub seconds_every: usize,
    /// At most so many kills, evenly over the recording.
    pub kills: usize,
    /// At most so many calls that fail, evenly; when that is all of them, each in every way.
    pub faults: usize,
    /// How many barriers after one that was left out its absence must show. 0: no mutants.
    pub reach: usize,
}

impl Effort {
    /// With so many random media at each crash point.
    #[must_use]
    pub fn new(samples: usize) -> Self {
        let exhaustive_max = 4 * samples as u64;
        let bounds = Bounds { exhaustive_max, singles_max: samples.div_ceil(2), samples, ..Bounds::default() };
        Self { bounds, seconds_every: 24, kills: 5 * samples, faults: 6 * samples, reach: usize::MAX }
    }
}

/// What a proof has tried.
#[derive(Clone, Debug, Default)]
pub struct Proof {
    /// Power cuts.
    pub explored: Explored,
    /// Power cuts while media that a power cut had left were brought to their end.
    pub seconds: usize,
    /// Processes that died.
    pub kills: usize,
    /// Power cuts after that.
    pub kill_states: usize,
    /// Calls that failed.
    pub faults: usize,
    /// Power cuts after that.
    pub fault_states: usize,
    /// Barriers that were left out.
    pub mutants: Mutants,
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { explored, seconds, kills, kill_states, faults, fault_states, mutants } = self;
        write!(f, "{explored}, {seconds} second crashes, {kills} kills with {kill_states} cuts after them, ")?;
        write!(f, "{faults} faults with {fault_states} cuts after them, {mutants}")
    }
}

/// Runs a story, and tries everything.
///
/// # Errors
///
/// What was wrong first, and after what.
pub fn prove<S: Story>(story: &S, effort: &Effort) -> Result<Proof, String> {
    let prover = Prover { story, effort, beginning: story.beginning() };
    let mut proof = Proof::default();
    let clean = prover.record(None);
    clean.result.map_err(|error| format!("undisturbed: {error}"))?;
    let (trace, told) = (clean.handle.trace(), &clean.told);
    prover.cuts(&trace, told, &mut proof)?;
    prover.kills(&trace, told, &mut proof)?;
    prover.faults(clean.handle.calls(), &mut proof)?;
    if effort.reach > 0 {
        let check = |image: CrashImage<'_>| prover.check(image, &told.at(image.position));
        proof.mutants = trace.mutants(&effort.bounds, effort.reach, check);
    }
    Ok(proof)
}

struct Prover<'a, S> {
    story: &'a S,
    effort: &'a Effort,
    beginning: Vec<Vec<u8>>,
}

/// A recording, with what was acknowledged and how it ended.
struct Recorded<N> {
    handle: SimHandle,
    told: Told<N>,
    result: Result<(), String>,
}

impl<S: Story> Prover<'_, S> {
    fn record(&self, fault: Option<(usize, Fault)>) -> Recorded<S::Note> {
        let options = self.story.options();
        let (first, others) = self.beginning.split_first().expect("there is a backing");
        let (first, handle) = Backing::from_media(first, options);
        let mut backings = vec![Arc::new(first)];
        backings.extend(others.iter().map(|media| Arc::new(handle.beside(media, options))));
        if let Some((call, fault)) = fault {
            handle.fail_call(call, fault);
        }
        let told = Told::new(handle.clone());
        let result = self.story.run(&backings, &told);
        Recorded { handle, told, result }
    }

    fn check(&self, image: CrashImage<'_>, told: &[S::Note]) -> Result<(), String> {
        let (backings, _) = image.reopen(self.story.options());
        self.story.check(&backings, image, told)
    }

    fn cuts(&self, trace: &Trace, told: &Told<S::Note>, proof: &mut Proof) -> Result<(), String> {
        let (mut states, mut seconds) = (0, 0);
        let explored = trace.explore(&self.effort.bounds, None, |image| {
            let told = told.at(image.position);
            self.check(image, &told)?;
            states += 1;
            if states % self.effort.seconds_every == 0 {
                let (backings, handle) = image.reopen(self.story.options());
                let second = self.finish_and_cut(&backings, &handle, &told, true, states);
                seconds += second.map_err(|error| format!("brought to its end: {error}"))?;
            }
            Ok::<_, String>(())
        });
        proof.explored =
            explored.map_err(|failure| format!("power cut at event {}: {}", failure.position, failure.error))?;
        proof.seconds = seconds;
        Ok(())
    }

    fn kills(&self, trace: &Trace, told: &Told<S::Note>, proof: &mut Proof) -> Result<(), String> {
        let barriers: Vec<_> = trace.barriers().iter().map(|barrier| barrier.position).collect();
        for (number, position) in spread(&barriers, self.effort.kills).into_iter().enumerate() {
            let (backings, handle) = trace.restart(position, PageCache::Kept);
            let cut = self.finish_and_cut(&backings, &handle, &told.at(position), true, number);
            proof.kill_states += cut.map_err(|error| format!("killed at event {position}: {error}"))?;
            proof.kills += 1;
        }
        Ok(())
    }

    fn faults(&self, calls: usize, proof: &mut Proof) -> Result<(), String> {
        let all_ways = self.effort.faults >= calls;
        let calls: Vec<_> = (0..calls).collect();
        let mut ways = Vec::new();
        for (number, call) in spread(&calls, self.effort.faults).into_iter().enumerate() {
            // Out of step with each other, and with an operation that stores and flushes by turns.
            let fault = if number % 3 < 2 { Fault::Io } else { Fault::NoSpace };
            let cache = if number % 5 < 3 { PageCache::Kept } else { PageCache::Evicted };
            let every = [Fault::Io, Fault::NoSpace]
                .map(|fault| [PageCache::Kept, PageCache::Evicted].map(|cache| (fault, cache)));
            let one = [(fault, cache)];
            let tried = if all_ways { every.as_flattened() } else { &one };
            ways.extend(tried.iter().map(|&(fault, cache)| (call, fault, cache)));
        }
        for (number, (call, fault, cache)) in ways.into_iter().enumerate() {
            let tried = self.fault(call, fault, cache, number);
            proof.fault_states +=
                tried.map_err(|error| format!("call {call} fails ({fault:?}, {cache:?}): {error}"))?;
            proof.faults += 1;
        }
        Ok(())
    }

    fn fault(&self, call: usize, fault: Fault, cache: PageCache, seed: usize) -> Result<usize, String> {
        let failed = self.record(Some((call, fault)));
        let trace = failed.handle.trace();
        let bounds = Bounds { positions: (trace.end(), usize::MAX), ..self.effort.bounds };
        let cut = trace.explore(&bounds, None, |image| self.check(image, &failed.told.at(image.position)));
        let ended = |error: String| format!("it ended with {:?}; {error}", failed.result);
        let states = cut.map_err(|failure| ended(format!("then a power cut: {}", failure.error)))?.states;
        let (backings, handle) = trace.restart(trace.end(), cache);
        let told = failed.told.at(trace.end());
        let after = self.finish_and_cut(&backings, &handle, &told, false, seed);
        Ok(states + after.map_err(|error| ended(format!("then another process: {error}")))?)
    }

    /// Brings it to its end in this process, with power cuts on the way; how many.
    fn finish_and_cut(
        &self,
        backings: &[Arc<Backing>],
        handle: &SimHandle,
        told: &[S::Note],
        strict: bool,
        seed: usize,
    ) -> Result<usize, String> {
        let from = handle.position();
        let told: Vec<_> = told.iter().filter(|note| S::lasts(note)).cloned().collect();
        let seen = self.story.finish(backings).map_err(|error| format!("it cannot be ended: {error}"))?;
        let trace = handle.trace();
        let end = trace.end();
        let barriers = trace.barriers().iter().filter(|barrier| barrier.position >= from).count();
        let bounds = Bounds {
            exhaustive_max: 2,
            singles_max: 0,
            samples: 1,
            seed: self.effort.bounds.seed ^ seed as u64,
            positions: (from, usize::MAX),
            every: (barriers / 6).max(1),
        };
        let explored = trace.explore(&bounds, None, |image| {
            self.check(image, &told)?;
            if image.position == end { self.story.ended(image, strict.then_some(&seen)) } else { Ok(()) }
        });
        match explored {
            Ok(explored) => Ok(explored.states),
            Err(failure) if failure.position == end => Err(format!("after its end: {}", failure.error)),
            Err(failure) => Err(format!("power cut at event {} on the way: {}", failure.position, failure.error)),
        }
    }
}

/// At most `count` of `all`, evenly, with the first and the last.
fn spread(all: &[usize], count: usize) -> Vec<usize> {
    if all.len() <= count {
        return all.to_vec();
    }
    let last = count.saturating_sub(1).max(1);
    (0..count).map(|index| all[index * (all.len() - 1) / last]).collect()
}

/// Samples at each crash point without `tools/crash`.
#[cfg(test)]
const GATE_SAMPLES: usize = 2;

#[cfg(test)]
impl Effort {
    /// As much as `DAXCRYPT_CRASH_SAMPLES` says, which `tools/crash` sets; little without it. With `DAXCRYPT_CRASH_FAULTS=all`
    /// every call fails in every way.
    pub(crate) fn of_environment() -> Self {
        let samples = std::env::var("DAXCRYPT_CRASH_SAMPLES").map_or(GATE_SAMPLES, |samples| samples.parse().unwrap());
        let effort = Self::new(samples);
        // Stories that try a part of the faults try all of so many as well.
        let every_call = std::env::var("DAXCRYPT_CRASH_FAULTS").is_ok_and(|faults| faults == "all");
        if every_call { Self { faults: usize::MAX, ..effort } } else { effort }
    }

    /// Whether it is that of the gate.
    pub(crate) const fn is_gate(&self) -> bool {
        self.bounds.samples <= GATE_SAMPLES
    }
}

/// [`prove`], for a test: prints what was tried, and panics with what was wrong.
#[cfg(test)]
#[track_caller]
pub(crate) fn assert_proof<S: Story>(name: &str, story: &S, effort: &Effort) -> Proof {
    let began = std::time::Instant::now();
    let proof = prove(story, effort).unwrap_or_else(|error| panic!("{name}: {error}"));
    println!("crash {name}: {proof}, {:.1} s", began.elapsed().as_secs_f64());
    assert!(
        proof.explored.states > 4 && proof.kill_states > proof.kills && proof.fault_states > proof.faults,
        "{proof}"
    );
    proof
}
