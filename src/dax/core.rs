//! What the threads of one direct map share: its view of the window, its userfaultfd and its dirty tracking.
//!
//! A view is registered with userfaultfd for pages that are absent and for pages that are in the window but not in this
//! view's page table, so every first touch comes to [`Core::answer`], which brings the page in under the volume's range
//! lock. A store that is made while a page is written back lands either before the encryption reads the page, or after
//! the page was marked clean and so marks it dirty again: marks are always taken before the page is read.

use std::error::Error;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::ahead::FaultAhead;
use super::error::DaxError;
use super::in_thread::{InThread, TELLS};
use super::options::{MapMode, MapOptions, Tracking};
use super::{Opened, open_faults};
use crate::memory::Source;
use crate::secret::SecretBytes;
use crate::uffd::{self, Fault, Faults, Uffd};
use crate::volume::window::{
    AtOnce, BATCH_PAGES, Install, Marks, PAGE_BYTES, Through, Traps, View, ViewOptions, Window, WriteBack,
};
use crate::volume::{ClaimGuard, Volume, VolumeError};

/// The most pages that one fault of a sequential run brings in: the thread that touches goes on after the first batch,
/// while the others come.
const AHEAD_PAGES_MAX: u64 = 256;

/// How many faults of a map are answered before others are looked at.
const ANSWERED_MAX: u32 = 16;

/// Before a touch that found no room is let go to try again.
const ROOM_RETRY: Duration = Duration::from_millis(5);

/// Plaintext on its way to a map: as much as the nearer caches hold.
const SCRATCH_BYTES: usize = 64 << 10;

/// How many such places are kept for the next caller.
const SPARES_MAX: usize = 2;

/// See the module's head. Offsets are logical offsets of the volume.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) volume: Arc<Volume>,
    pub(super) window: Arc<Window>,
    pub(super) view: Arc<View>,
    pub(super) writable: bool,
    /// Whose faults are answered; nobody's of an eager map.
    taken: Option<Faults>,
    /// With what the threads that touch answer themselves; the fault threads do what may wait then.
    in_thread: Option<InThread>,
    /// For everybody but the fault threads, which have their own: those that nobody uses now.
    scratch: Mutex<Vec<SecretBytes>>,
    /// Whether faults are answered no more: the view is revoked, and page tables tell of no stores any more.
    broken: AtomicBool,
    /// Held for a whole sync: whoever finds that another one has taken the marks must not return before it has written
    /// what they stand for.
    syncing: Mutex<()>,
    _claim: ClaimGuard,
}

/// What is known of the faults of a map between two of them.
#[derive(Debug, Default)]
pub(super) struct Run {
    ahead: FaultAhead,
    /// Whether the last fault found no room: one warning is enough.
    no_room: bool,
}

/// A place for plaintext on its way.
///
/// # Errors
///
/// Without memory: a thread has it before it begins, since it could only end.
pub(super) fn scratch() -> io::Result<SecretBytes> {
    SecretBytes::try_zeroed(SCRATCH_BYTES)
}

/// The way into the page tables of a view.
struct Door<'a> {
    core: &'a Core,
    faults: &'a Uffd,
    how: uffd::Install,
}

impl Install for Door<'_> {
    fn present(&self, pages: &Range<u64>) -> io::Result<()> {
        self.faults.map_present(&self.core.addresses(pages), self.how, PAGE_BYTES)
    }

    fn absent(&self, pages: &Range<u64>, plaintext: Source<'_>) -> (u64, io::Result<()>) {
        self.faults.map_absent(&self.core.addresses(pages), plaintext, self.how)
    }
}

impl Core {
    /// Maps whole pages of the volume: lazily when the kernel permits it, otherwise all at once.
    pub(super) fn new(
        volume: &Arc<Volume>,
        range: Range<u64>,
        options: &MapOptions,
        exclusive: bool,
    ) -> Result<Self, DaxError> {
        let opened = if options.lazy { open_faults(options).map_err(DaxError::Os)? } else { None };
        let taken = opened.as_ref().map(|opened| opened.taken);
        let in_thread = if taken == Some(Faults::Raised) { Some(InThread::new().map_err(DaxError::Os)?) } else { None };
        let (faults, marks) = match opened {
            Some(Opened { uffd, map: Some(map), .. }) => (Some(uffd), Marks::Kernel(map)),
            Some(Opened { uffd, .. }) if uffd.features().protects() => {
                (Some(uffd), Marks::Trapped(Traps::new(&range).map_err(DaxError::Os)?))
            }
            opened => (opened.map(|opened| opened.uffd), Marks::Unknown),
        };
        let window =
            if exclusive { Arc::new(Window::new(&range).map_err(DaxError::Os)?) } else { Arc::clone(volume.window()?) };
        let claim = ClaimGuard::enter(volume, &range, exclusive.then(|| Arc::clone(&window)))?;
        let writable = options.writable;
        let view = window.attach(range, ViewOptions { writable, faults, marks }, options.resident_max)?;
        let volume = Arc::clone(volume);
        let core = Self {
            volume,
            window,
            view,
            writable,
            taken,
            in_thread,
            scratch: Mutex::default(),
            broken: AtomicBool::new(false),
            syncing: Mutex::default(),
            _claim: claim,
        };
        let ready = match core.view.faults() {
            Some(_) => Ok(()),
            None => core.bring(core.view.range()).and_then(|()| core.view.allow().map_err(DaxError::Os)),
        };
        match ready.and_then(|()| Ok(core.volume.evict_to_bound(&core.window)?)) {
            Ok(()) => Ok(core),
            Err(error) => {
                let _ = core.leave(); // the first error is the one to report; nothing was stored yet
                Err(error)
            }
        }
    }

    pub(super) fn tracking(&self) -> Tracking {
        match self.view.marks() {
            Marks::Kernel(_) => Tracking::Async,
            Marks::Trapped(_) => Tracking::Trap,
            Marks::Unknown => Tracking::Compare,
        }
    }

    pub(super) const fn mode(&self) -> MapMode {
        match self.taken {
            Some(Faults::All) => MapMode::Lazy,
            Some(Faults::UserMode) => MapMode::LazyUserMode,
            Some(Faults::Raised) => MapMode::LazyInThread,
            None => MapMode::Eager,
        }
    }

    /// What becomes readable when a fault waits; `None` for an eager map.
    pub(super) fn fault_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.in_thread {
            Some(in_thread) => Some(in_thread.letters().event()),
            None => self.view.faults().map(AsFd::as_fd),
        }
    }

    /// What its threads answer their own touches with.
    pub(super) const fn in_thread(&self) -> Option<&InThread> {
        self.in_thread.as_ref()
    }

    /// Makes the pages of `range` (whole pages of the view) resident and maps them here.
    pub(super) fn bring(&self, range: &Range<u64>) -> Result<(), DaxError> {
        if self.broken() {
            return Err(DaxError::FaultThread);
        }
        let spare = self.scratch().pop();
        let mut scratch = spare.map_or_else(scratch, Ok).map_err(DaxError::Os)?;
        let brought = self.bring_with(range, false, &mut scratch);
        let mut spares = self.scratch();
        if spares.len() < SPARES_MAX {
            spares.push(scratch);
        }
        brought
    }

    fn scratch(&self) -> MutexGuard<'_, Vec<SecretBytes>> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody answers faults any more.
    pub(super) fn broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Nobody answers faults any more. Every touch raises SIGBUS from now on instead of waiting for ever, also of those that
    /// wait already; what was stored is found by comparing with media.
    pub(super) fn give_up(&self) {
        self.broken.store(true, Ordering::Release);
        let _ = self.view.revoke(); // nothing is left that could be done about it
    }

    /// `stores` tells that somebody waits to store there: where the kernel notes stores, the pages then count as stored to at
    /// once, which spares each of them a second fault.
    fn bring_with(&self, range: &Range<u64>, stores: bool, scratch: &mut [u8]) -> Result<(), DaxError> {
        let batch_bytes = BATCH_PAGES.min((self.window.page_count_max() / 2).max(1)) * PAGE_BYTES;
        let mut rest = range.clone();
        while !rest.is_empty() {
            let batch = rest.start..rest.end.min(rest.start + batch_bytes);
            rest.start = batch.end;
            match self.view.faults() {
                None => self.volume.fill(&self.window, &batch, Through { scratch: &mut *scratch, install: None })?,
                Some(faults) => {
                    // Who is woken for a part of a batch would only run into the rest of it.
                    let wake = page_count(&batch) == 1;
                    let install: &dyn Install = &self.door(faults, stores, wake);
                    let through = Through { scratch: &mut *scratch, install: Some(install) };
                    let filled = self.volume.fill(&self.window, &batch, through);
                    if !wake {
                        let _ = faults.wake(&self.addresses(&batch)); // fails when the map is gone, and the waiters with it
                    }
                    filled?;
                }
            }
        }
        Ok(())
    }

    fn door<'a>(&'a self, faults: &'a Uffd, stores: bool, wake: bool) -> Door<'a> {
        let protect_new = match self.view.marks() {
            Marks::Kernel(_) => !stores,
            Marks::Trapped(_) => true,
            Marks::Unknown => false,
        };
        // The kernel drops the entry of a page that it swaps out, and with it the mark that the page was stored to: what comes
        // back counts as stored to. Traps have marks of their own.
        let protect_present = self.writable && matches!(self.view.marks(), Marks::Trapped(_));
        let how = uffd::Install { protect_new: self.writable && protect_new, protect_present, wake };
        Door { core: self, faults, how }
    }

    /// Brings whole pages of the view in, in a handler of signals.
    pub(super) fn bring_at_once(&self, range: &Range<u64>, stores: bool, scratch: &mut [u8]) -> AtOnce {
        let Some(faults) = self.view.faults() else { return AtOnce::Refused };
        let through = Through { scratch, install: Some(&self.door(faults, stores, false)) };
        self.volume.fill_at_once(&self.window, range, through)
    }

    /// Answers some of the waiting faults: whether there were any. A page whose data cannot be had is poisoned: whoever
    /// touches it gets SIGBUS, and nothing else is harmed.
    pub(super) fn answer(&self, run: &mut Run, scratch: &mut [u8]) -> io::Result<bool> {
        let Some(faults) = self.view.faults() else { return Ok(false) };
        if let Some(in_thread) = &self.in_thread {
            return Ok(in_thread.letters().answer(ANSWERED_MAX, |fault| self.resolve(faults, fault, run, scratch)));
        }
        for answered in 0..ANSWERED_MAX {
            match faults.next_fault()? {
                Some(fault) => {
                    self.resolve(faults, fault, run, scratch);
                }
                None => return Ok(answered > 0),
            }
        }
        Ok(true)
    }

    /// Whether the touch is to be tried again; otherwise it ends in SIGBUS.
    fn resolve(&self, faults: &Uffd, fault: Fault, run: &mut Run, scratch: &mut [u8]) -> bool {
        let page_address = fault.address - fault.address % PAGE_BYTES;
        let here = page_address..page_address + PAGE_BYTES;
        let start = page_address - self.start_address() + self.view.range().start;
        if fault.write_protected {
            // It fails when the volume was locked meanwhile, and the waiter must go on to its SIGBUS; or when the map is gone,
            // and the waiter with it.
            let _ = self.view.allow_stores(start).or_else(|_| faults.wake(&here));
            return true;
        }
        let page_count = run.ahead.pages(start / PAGE_BYTES, AHEAD_PAGES_MAX.min(self.window.page_count_max() / 4));
        let end = (start + page_count * PAGE_BYTES).min(self.view.range().end);
        let brought = self
            .bring_with(&(start..end), fault.stores, &mut *scratch)
            .or_else(|_| self.bring_with(&(start..start + PAGE_BYTES), fault.stores, &mut *scratch));
        let no_room = matches!(brought, Err(DaxError::Volume(VolumeError::WindowFull { .. })));
        if let (Err(error), true, false) = (&brought, no_room, run.no_room) {
            tracing::warn!("a touch of a direct map waits for room: {}", chain(error));
        }
        run.no_room = no_room;
        if no_room {
            // Nothing is wrong with this page. Whoever waits for it faults again, behind the others, until there is room or
            // the map ends; an error would be a SIGBUS, and with it the end of what the program could not write yet.
            thread::sleep(ROOM_RETRY);
            let _ = faults.wake(&here); // fails when the map is gone, and the waiter with it
        } else if brought.is_err() {
            // A mark of the dirty tracking may be in the way. What else fails means that the page came meanwhile or the map
            // is gone: trying again is right for both.
            let poisoned = if faults.poisons() {
                faults.poison(&here).or_else(|_| {
                    self.view.allow_stores(start)?;
                    faults.poison(&here)
                })
            } else {
                self.view.revoke_page(start)
            };
            let raises_sigbus = poisoned.is_ok();
            let _ = poisoned.or_else(|_| faults.wake(&here));
            if let (Err(error), true) = (&brought, raises_sigbus) {
                let backing = self.volume.backing().path().display();
                tracing::error!(%backing, offset = start, "a touch of a direct map ends in SIGBUS: {}", chain(error));
            }
            return !raises_sigbus;
        } else if self.in_thread.is_some() && !TELLS && matches!(self.view.marks(), Marks::Trapped(_)) {
            let _ = self.view.allow_stores(start); // it may be what the touch wants; as above
        }
        true
    }

    /// Writes back what may have changed in `range` (whole pages of the view) and makes it durable.
    pub(super) fn sync(&self, range: &Range<u64>) -> Result<(), DaxError> {
        if !self.writable {
            return Ok(());
        }
        if self.volume.locked() {
            return Err(VolumeError::Locked.into());
        }
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let _taken = self.window.marks_are_taken();
        let mut result = Ok(());
        let mut write_back = |pages: Range<u64>, how| {
            let written = self.volume.write_back(&self.window, &pages, how);
            if result.is_ok() {
                result = written.map_err(DaxError::from);
            }
        };
        if self.broken() || self.tracking() == Tracking::Compare {
            write_back(range.clone(), WriteBack::IfDifferent);
        } else {
            let taken = self.view.take_stores(&self.window, range, |pages| write_back(pages, WriteBack::Always));
            taken.map_err(DaxError::Os)?;
        }
        let mut rest = range.clone();
        while let Some(run) = self.window.next_unsynced(&rest) {
            rest.start = run.end;
            write_back(run, WriteBack::Always);
        }
        result?;
        self.volume.flush()?;
        if self.broken() { Err(DaxError::FaultThread) } else { Ok(()) }
    }

    /// Ends every access through the view (the next touch raises SIGBUS, also of a thread that waits for a page), detaches
    /// it, and takes out of memory what no other view shows. With an error what could not be written is lost, unless
    /// another map shows it.
    pub(super) fn leave(&self) -> Result<(), DaxError> {
        self.volume.evict_shown_by(&self.window, &self.view);
        // Marks of what another view shows too end with this one.
        let _taken = self.window.marks_are_taken();
        let revoked = self.view.revoke();
        self.window.detach(&self.view);
        let left = self.volume.leave_window(&self.window, self.view.range());
        revoked.map_err(DaxError::Os)?;
        Ok(left?)
    }

    pub(super) fn start_address(&self) -> u64 {
        self.view.start().addr() as u64
    }

    /// Where logical `range` is mapped.
    fn addresses(&self, range: &Range<u64>) -> Range<u64> {
        self.view.addresses(range)
    }
}

/// The error and its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// How many pages `range`, whole pages, has.
const fn page_count(range: &Range<u64>) -> u64 {
    (range.end - range.start) / PAGE_BYTES
}
