//! Simulated backings: what a [`Backing`] does on recorded memory in place of a file, and how one is made.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use super::recorder::Recorder;
use super::replay::{PAGE_BYTES, Replay};
use super::sparse::{SparseMedia, is_zero};
use super::{Beginning, CrashImage, Event, Fault, PageCache, SimHandle, SimOptions, Thread, Trace, first_address};
use crate::memory::{Source, Target};
use crate::pmem::backing::{Backing, BackingExtent, Medium};
use crate::pmem::error::MediaError;
use crate::pmem::granularity::{Finding, Granularity};
use crate::pmem::mapping::Mapping;
use crate::pmem::sync::Changes;

/// Room behind the end of a simulated backing, beyond as much again as it has.
const GROWTH_ROOM_BYTES: usize = 64 << 20;

/// One backing of a recording, as one process has it open.
#[derive(Debug)]
pub(in crate::pmem) struct SimMedium {
    recorder: Arc<Recorder>,
    index: usize,
    granularity: Granularity,
    poisoned: AtomicBool,
    changes: Changes,
}

impl SimMedium {
    fn new(recorder: Arc<Recorder>, index: usize, granularity: Granularity) -> Self {
        let (poisoned, changes) = (AtomicBool::new(false), Changes::default());
        Self { recorder, index, granularity, poisoned, changes }
    }

    fn addresses(&self, range: &Range<u64>) -> Range<u64> {
        first_address(self.index) + range.start..first_address(self.index) + range.end
    }

    pub(in crate::pmem) fn owes_blocks(&self) -> bool {
        self.changes.owed().is_some()
    }

    pub(in crate::pmem) fn check(&self) -> Result<(), MediaError> {
        if self.poisoned.load(Ordering::Acquire) { Err(MediaError::Poisoned) } else { Ok(()) }
    }

    /// Records a system call that makes `range` durable, or its failure.
    fn make_durable(&self, range: &Range<u64>, event: Event) -> Result<(), MediaError> {
        let mut log = self.recorder.log();
        let Some(fault) = log.next_call() else {
            log.push(event);
            return Ok(());
        };
        log.push(Event::Failed(self.addresses(range)));
        self.poisoned.store(true, Ordering::Release);
        Err(MediaError::Flush(errno_of(fault).into()))
    }

    pub(in crate::pmem) fn write<R>(
        &self,
        mapping: &Mapping,
        span: &Range<usize>,
        f: impl FnOnce(Target<'_>) -> R,
    ) -> Result<R, MediaError> {
        let stored = self.recorder.record_store(self.index, mapping, span, false, f);
        stored.map_err(|fault| match fault {
            Fault::Io => MediaError::Fault { offset: span.start as u64 },
            Fault::NoSpace => MediaError::NoSpace,
        })
    }

    /// Whole lines of `range` were stored past the cache.
    pub(in crate::pmem) fn streamed(&self, range: &Range<u64>) {
        self.recorder.record(Event::Streamed(self.addresses(range), Thread::current()));
    }

    pub(in crate::pmem) fn flush(&self, range: &Range<u64>) -> Result<(), MediaError> {
        self.check()?;
        let event = Event::Flush(self.addresses(range), Thread::current());
        if self.granularity == Granularity::CacheLine || range.is_empty() {
            self.recorder.record(event);
            return Ok(());
        }
        self.make_durable(range, event)
    }

    pub(in crate::pmem) fn drain(&self) -> Result<(), MediaError> {
        self.check()?;
        self.recorder.record(Event::Drain(Thread::current()));
        Ok(())
    }

    pub(in crate::pmem) fn sync_all(&self, len_bytes: u64) -> Result<(), MediaError> {
        self.check()?;
        let owed = self.changes.owed();
        if self.granularity == Granularity::CacheLine && owed.is_none() {
            return self.drain();
        }
        self.make_durable(&(0..len_bytes), Event::Sync(self.index, Thread::current()))?;
        owed.into_iter().for_each(|count| self.changes.are_durable(count));
        Ok(())
    }

    pub(in crate::pmem) fn allocate(&self) -> Result<(), MediaError> {
        let fault = self.recorder.log().next_call();
        self.changes.count();
        fault.map_or(Ok(()), |fault| Err(MediaError::from_errno(errno_of(fault))))
    }

    pub(in crate::pmem) fn punch_hole(&self, mapping: &Mapping, span: &Range<usize>) -> Result<(), MediaError> {
        let zero = |mut target: Target<'_>| target.fill(0);
        let punched = self.recorder.record_store(self.index, mapping, span, true, zero);
        self.changes.count();
        punched.map_err(|fault| MediaError::from_errno(errno_of(fault)))
    }

    pub(in crate::pmem) fn grow(&self, len_bytes: u64) -> Result<(), MediaError> {
        let mut log = self.recorder.log();
        match log.next_call() {
            Some(fault) => Err(MediaError::from_errno(errno_of(fault))),
            None => {
                log.push(Event::Length(self.index, len_bytes));
                self.changes.count();
                Ok(())
            }
        }
    }

    /// Whole pages of zero bytes are holes, unless somebody has stored there.
    pub(in crate::pmem) fn extents(&self, mapping: &Mapping, span: &Range<usize>) -> Vec<BackingExtent> {
        let log = self.recorder.log();
        let mut extents: Vec<BackingExtent> = Vec::new();
        let mut start = span.start;
        while start < span.end {
            let page_end = (start + 1).next_multiple_of(usize::try_from(PAGE_BYTES).expect("it is small"));
            let end = page_end.min(span.end);
            let mut bytes = vec![0; end - start];
            mapping.source(&(start..end)).copy_to(&mut bytes);
            let allocated = !is_zero(&bytes) || log.has_block(first_address(self.index) + start as u64);
            match extents.last_mut().filter(|last| last.allocated == allocated) {
                Some(last) => last.range.end = end as u64,
                None => extents.push(BackingExtent { range: start as u64..end as u64, allocated }),
            }
            start = end;
        }
        extents
    }
}

fn errno_of(fault: Fault) -> Errno {
    match fault {
        Fault::Io => Errno::IO,
        Fault::NoSpace => Errno::NOSPC,
    }
}

/// Backing number `index` of a recording, in which the next process sees `visible`.
fn open(recorder: &Arc<Recorder>, index: usize, visible: &SparseMedia, options: SimOptions) -> Backing {
    assert!(visible.len() > 0, "a backing has at least one byte");
    let mapping = Mapping::anonymous(2 * visible.len() + GROWTH_ROOM_BYTES).expect("memory for a simulation");
    for (start, page) in visible.pages() {
        mapping.target(&(start..start + page.len())).copy_from(page);
    }
    let granularity = options.granularity();
    let medium = Medium::Simulated(SimMedium::new(Arc::clone(recorder), index, granularity));
    let len_bytes = visible.len() as u64;
    Backing::of_memory(PathBuf::from("simulated"), Finding::Simulated(granularity), len_bytes, mapping, medium)
}

impl Backing {
    /// A simulated backing of `len_bytes` zero bytes that records what happens to it; see [`sim`](super).
    ///
    /// # Panics
    ///
    /// Panics for 0 bytes and without memory: it is for tests.
    #[must_use]
    pub fn simulated(len_bytes: usize, options: SimOptions) -> (Self, SimHandle) {
        Self::from_media(vec![0; len_bytes], options)
    }

    /// A simulated backing that begins with these bytes.
    ///
    /// # Panics
    ///
    /// As [`simulated`](Self::simulated).
    #[must_use]
    pub fn from_media(media: impl AsRef<[u8]>, options: SimOptions) -> (Self, SimHandle) {
        let handle = SimHandle(Arc::new(Recorder::new()));
        (handle.beside(media.as_ref(), options), handle)
    }
}

impl SimHandle {
    /// Another backing of the same recording: the next one in [`CrashImage::others`].
    ///
    /// # Panics
    ///
    /// As [`Backing::simulated`].
    #[must_use]
    pub fn beside(&self, media: &[u8], options: SimOptions) -> Backing {
        let media = Arc::new(SparseMedia::of(media));
        let index = self.0.add(options, Arc::clone(&media));
        open(&self.0, index, &media, options)
    }
}

impl CrashImage<'_> {
    /// The media as a process finds them when power is back: all backings, in a new recording.
    ///
    /// # Panics
    ///
    /// Without memory.
    #[must_use]
    pub fn reopen(&self, options: SimOptions) -> (Vec<Arc<Backing>>, SimHandle) {
        let handle = SimHandle(Arc::new(Recorder::new()));
        let all = [self.media].into_iter().chain(self.others.iter().copied());
        (all.map(|media| Arc::new(handle.beside(media, options))).collect(), handle)
    }
}

impl Trace {
    /// What the next process finds when the one of the recording dies after `position` events and the power stays: the
    /// same backings, in which every store is visible, and in a recording that goes on. What was not durable still is not.
    ///
    /// # Panics
    ///
    /// Without memory.
    #[must_use]
    pub fn restart(&self, position: usize, cache: PageCache) -> (Vec<Arc<Backing>>, SimHandle) {
        let killed = Event::Killed(cache == PageCache::Evicted);
        let mut replay = Replay::new(self);
        let events = &self.events[..position];
        for event in events.iter().chain([&killed]) {
            replay.apply(event);
        }
        let recorder = Recorder::after(self, events);
        recorder.record(killed);
        let recorder = Arc::new(recorder);
        let visible = |media: &[&[u8]]| {
            let backings = media.iter().zip(self.beginnings.iter()).enumerate();
            let reopen = |(index, (media, beginning)): (usize, (&&[u8], &Beginning))| {
                Arc::new(open(&recorder, index, &SparseMedia::of(media), beginning.options))
            };
            backings.map(reopen).collect()
        };
        let everything: Vec<_> = replay.choices().iter().map(|cuts| *cuts.last().expect("a cell has stores")).collect();
        let backings = replay.with_cut(&everything, |_, media| visible(media));
        (backings, SimHandle(recorder))
    }

    /// How many events were recorded.
    #[must_use]
    pub fn end(&self) -> usize {
        self.events.len()
    }
}

/// The bytes of a backing as a process sees them.
///
/// # Panics
///
/// When it cannot be read.
#[must_use]
pub fn visible_bytes(backing: &Backing) -> Vec<u8> {
    let mut media = vec![0; usize::try_from(backing.len_bytes()).expect("it is mapped")];
    backing.read(0..backing.len_bytes(), |source: Source<'_>| source.copy_to(&mut media)).expect("memory can be read");
    media
}
