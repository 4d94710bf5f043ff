//! The threads of all direct maps of a process: a few answer page faults, one syncs at intervals. They begin with the first
//! map that needs them and end with the last one.
//!
//! A fault thread touches no mapped memory of its own and waits for nothing but a volume's range lock, whose holders wait for
//! no fault: so every fault is answered. It has its memory before it begins. While it serves one map (whose media may be
//! slow), another one serves the others. A map whose answering fails (a panic in a subscriber of logs) is [given
//! up](Core::give_up): nobody waits for an answer that never comes.
//!
//! A thread has a map for as long as it works for it and no longer: who ends a map waits for that, and nothing of the map is
//! left with the threads then.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use super::core::{Core, Run, scratch};
use crate::owner::PerProcess;
use crate::secret::SecretBytes;
use crate::spawn::QuietThread;

/// How many threads answer faults: one may wait for slow media while another one answers.
const FAULT_THREADS: usize = 2;

/// What the event of [`Shared::stop`] carries; maps have other numbers.
const STOP: u64 = 0;

/// How long a thread that has just answered looks for the next fault of the same map before it sleeps, while faults come that
/// fast: waking an idle processor takes about as long.
const SPIN: Duration = Duration::from_micros(50);

/// How long a thread stays with a map whose faults do not end, before it looks at the others.
const STAY: Duration = Duration::from_millis(2);

const FAULT: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ONESHOT);

/// The threads of this process, as long as a map has them.
static ENGINE: PerProcess<Mutex<Weak<Engine>>> = PerProcess::new();

/// The running threads, which end when this is dropped.
#[derive(Debug)]
struct Engine {
    shared: Arc<Shared>,
    threads: Mutex<Vec<QuietThread>>,
}

/// What the threads have, and who registers maps.
#[derive(Debug)]
struct Shared {
    events: OwnedFd,
    stop: OwnedFd,
    /// Whether looking for the next fault takes no processor from who would cause it.
    spins: bool,
    maps: Mutex<Maps>,
    syncs: Mutex<Syncs>,
    /// Something of `syncs` has changed.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Maps {
    by_number: BTreeMap<u64, Arc<Place>>,
    last_number: u64,
}

/// A map whose faults are answered, until it is taken out; locked by who answers.
type Place = Mutex<Option<Served>>;

#[derive(Debug)]
struct Served {
    core: Arc<Core>,
    run: Run,
    /// When the last fault was answered.
    answered: Option<Instant>,
}

/// The maps that are synced in the background.
#[derive(Debug, Default)]
struct Syncs {
    by_number: BTreeMap<u64, Sync>,
    last_number: u64,
    /// The one that is being synced.
    running: Option<u64>,
    /// Whether there is a thread for them.
    started: bool,
    stopped: bool,
}

#[derive(Debug)]
struct Sync {
    core: Arc<Core>,
    interval: Duration,
    due: Instant,
}

/// A map that the threads work for, until [`Self::end`].
#[derive(Debug)]
pub(super) struct Working {
    engine: Arc<Engine>,
    faults: Option<u64>,
    syncs: Option<u64>,
}

impl Working {
    /// Has the faults of a lazy map answered.
    pub(super) fn begin(core: &Arc<Core>) -> io::Result<Self> {
        let engine = ENGINE.shared(Engine::start)?;
        let faults = if core.fault_fd().is_some() { Some(engine.shared.serve_faults(core)?) } else { None };
        Ok(Self { engine, faults, syncs: None })
    }

    /// Syncs the map at intervals too.
    pub(super) fn sync_every(&mut self, core: &Arc<Core>, interval: Duration) -> io::Result<()> {
        self.engine.start_syncs()?;
        let shared = &self.engine.shared;
        let mut syncs = shared.syncs();
        syncs.last_number += 1;
        let number = syncs.last_number;
        let due = Instant::now() + interval;
        syncs.by_number.insert(number, Sync { core: Arc::clone(core), interval, due });
        drop(syncs);
        self.syncs = Some(number);
        shared.changed.notify_all();
        Ok(())
    }

    /// No background sync of it runs or will run.
    pub(super) fn end_syncs(&mut self) {
        let Some(number) = self.syncs.take() else { return };
        let shared = &self.engine.shared;
        let mut syncs = shared.syncs();
        let mut ended = syncs.by_number.remove(&number);
        while syncs.running == Some(number) {
            syncs = shared.changed.wait(syncs).unwrap_or_else(PoisonError::into_inner);
            ended = syncs.by_number.remove(&number).or(ended);
        }
        drop(syncs);
        drop(ended); // perhaps the last one who has the map
    }

    /// Nobody answers its faults any more, or will.
    pub(super) fn end(mut self) {
        self.end_syncs();
        if let Some(number) = self.faults.take() {
            self.engine.shared.forget_faults(number);
        }
    }
}

impl Engine {
    fn start() -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        // Not `poll`, which refuses when `RLIMIT_NOFILE` has come below the number of descriptors that it is asked about.
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&events, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
        let (maps, syncs) = (Mutex::default(), Mutex::default());
        let spins = thread::available_parallelism().is_ok_and(|running| running.get() > 1);
        let shared = Arc::new(Shared { events, stop, spins, maps, syncs, changed: Condvar::new() });
        let engine = Self { shared, threads: Mutex::default() };
        for _ in 0..FAULT_THREADS {
            let (shared, mut scratch) = (Arc::clone(&engine.shared), scratch()?);
            engine.threads().push(QuietThread::spawn(c"daxcrypt-fault", move || shared.answer_faults(&mut scratch))?);
        }
        Ok(engine)
    }

    fn start_syncs(&self) -> io::Result<()> {
        let mut syncs = self.shared.syncs();
        if !syncs.started {
            let shared = Arc::clone(&self.shared);
            self.threads().push(QuietThread::spawn(c"daxcrypt-back", move || shared.sync_maps())?);
            syncs.started = true;
        }
        Ok(())
    }

    fn threads(&self) -> MutexGuard<'_, Vec<QuietThread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // An eventfd takes the first 1 at once.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_le_bytes());
        self.shared.syncs().stopped = true;
        self.shared.changed.notify_all();
        self.threads().drain(..).for_each(QuietThread::join);
    }
}

impl Shared {
    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn syncs(&self) -> MutexGuard<'_, Syncs> {
        self.syncs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the map.
    fn serve_faults(&self, core: &Arc<Core>) -> io::Result<u64> {
        let place = Arc::new(Mutex::new(Some(Served { core: Arc::clone(core), run: Run::default(), answered: None })));
        let number = {
            let mut maps = self.maps();
            maps.last_number += 1;
            let number = maps.last_number;
            maps.by_number.insert(number, place);
            number
        };
        let added = core
            .fault_fd()
            .map_or(Ok(()), |faults| epoll::add(&self.events, faults, epoll::EventData::new_u64(number), FAULT));
        if let Err(errno) = added {
            self.forget_faults(number);
            return Err(errno.into());
        }
        Ok(number)
    }

    /// Waits until nobody answers its faults; nobody will.
    fn forget_faults(&self, number: u64) {
        let Some(place) = self.maps().by_number.remove(&number) else { return };
        let served = locked(&place).take();
        if let Some(Served { core, .. }) = &served
            && let Some(faults) = core.fault_fd()
        {
            let _ = epoll::delete(&self.events, faults); // it goes with its descriptor in any case
        }
    }

    /// Answers faults until it is stopped.
    fn answer_faults(&self, scratch: &mut SecretBytes) {
        loop {
            let mut ready = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(STOP) }];
            match epoll::wait(&self.events, &mut ready, None) {
                Ok(1..) => {}
                Ok(0) | Err(Errno::INTR) => continue,
                Err(errno) => return self.give_up_all(&errno.to_string()),
            }
            let number = ready[0].data.u64();
            if number == STOP {
                return;
            }
            let place = self.maps().by_number.get(&number).cloned();
            if let Some(place) = place {
                self.answer_map(number, &mut locked(&place), scratch);
            }
        }
    }

    /// Answers what waits on one map, and whatever comes soon after.
    fn answer_map(&self, number: u64, place: &mut Option<Served>, scratch: &mut SecretBytes) {
        let Some(Served { core, run, answered }) = place else { return };
        let Some(faults) = core.fault_fd() else { return };
        let comes_fast = self.spins && answered.is_some_and(|last| last.elapsed() < SPIN);
        let answer = || -> io::Result<()> {
            let began = Instant::now();
            let mut last = began;
            loop {
                if began.elapsed() > STAY {
                    break; // others wait, perhaps
                }
                if core.answer(run, scratch)? {
                    last = Instant::now();
                } else if !comes_fast || last.elapsed() > SPIN {
                    break;
                } else {
                    thread::yield_now(); // who touches may need this very processor
                }
            }
            *answered = Some(last);
            Ok(epoll::modify(&self.events, faults, epoll::EventData::new_u64(number), FAULT)?)
        };
        let cause = match catch_unwind(AssertUnwindSafe(answer)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "a panic".to_owned(),
        };
        give_up(core, &cause);
    }

    /// Without events nobody's faults are heard of.
    fn give_up_all(&self, cause: &str) {
        let places: Vec<_> = self.maps().by_number.values().cloned().collect();
        for place in places {
            if let Some(Served { core, .. }) = &*locked(&place) {
                give_up(core, cause);
            }
        }
    }

    /// Syncs the maps as they are due, until it is stopped.
    fn sync_maps(&self) {
        let mut syncs = self.syncs();
        while !syncs.stopped {
            let next =
                syncs.by_number.iter().min_by_key(|(_, sync)| sync.due).map(|(&number, sync)| (number, sync.due));
            let Some((number, due)) = next else {
                syncs = self.changed.wait(syncs).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let wait = due.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                syncs = self.changed.wait_timeout(syncs, wait).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let Some(Sync { core, interval, .. }) = syncs.by_number.remove(&number) else { continue };
            syncs.running = Some(number);
            drop(syncs);
            // What could not be written stays marked, and the next sync of the program or the close reports it. A panic (of a
            // subscriber of logs) must not end what bounds the loss of a crash.
            let _ = catch_unwind(AssertUnwindSafe(|| core.sync(core.view.range())));
            syncs = self.syncs();
            syncs.running = None;
            // Back in its place, from where who ends the map takes it: so this thread is never the last one who has it.
            syncs.by_number.insert(number, Sync { core, interval, due: Instant::now() + interval });
            self.changed.notify_all();
        }
    }
}

fn locked(place: &Place) -> MutexGuard<'_, Option<Served>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

fn give_up(core: &Core, cause: &str) {
    core.give_up();
    // Who logs may panic once more; everybody has been told by then.
    let _ = catch_unwind(|| tracing::error!("a direct map is given up, its faults are not answered any more: {cause}"));
}
