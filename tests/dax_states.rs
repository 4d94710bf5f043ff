//! The page-state machine of the window under a scheduler that tries interleavings (shuttle).
//!
//! The range lock and the page set are the library's own files, compiled over shuttle's primitives. The kernel (page
//! cache and page tables) and media are simulated; the steps of fill, eviction, write-back and request are those of
//! `src/volume/window`, in the same order, each step a point where another thread may come. A page has two cipher blocks:
//! programs count up the first through two maps, one of which two of them share, and a request writes the second.
//!
//! What must hold: no store is lost, whatever evicts or writes back meanwhile; a touch never finds a hole or wiped bytes;
//! what was persisted is on media. Deliberate mistakes in the order of the steps must be found, or the test fails.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::needless_pass_by_value,
    dead_code,
    unreachable_pub,
    unused_imports
)]

#[path = "../src/volume/window/pages.rs"]
mod pages;
#[path = "../src/volume/range_lock.rs"]
mod range_lock;

mod sync {
    pub(crate) use shuttle::sync::{Mutex, MutexGuard};
    pub(crate) use shuttle::{hint, thread};
    pub(crate) use std::sync::PoisonError;
    /// Nobody asks here whether it holds a range.
    pub(crate) const fn thread_number() -> usize {
        1
    }
    pub(crate) mod atomic {
        pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    }
    /// The scheduler has no store buffers to drain.
    pub(crate) mod barrier {
        pub(crate) const fn prepare() {}
        pub(crate) const fn light() {}
        pub(crate) const fn heavy() {}
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind};

use pages::PageSet;
use range_lock::RangeLock;
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::sync::{Arc, Mutex};
use shuttle::{rand::Rng, thread};

const PAGES: u64 = 2;
const PAGE: u64 = 4096;
const VIEWS: usize = 2;
const ROUNDS: u64 = 3;

/// An order of steps that must not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// Eviction leaves the page in the page tables until it is punched out.
    NoZap,
    /// The bit of residence is set after the page is there and who waits was woken.
    BitAfterInstall,
    /// A mark is taken after the page was read.
    MarkAfterRead,
    /// A persist does not hold its block.
    PersistWithoutLock,
    /// Two syncs of one map do not wait for each other.
    SyncsTogether,
    /// A trapped store is noted and let through in two steps that a sync can come between.
    TrapInTwoSteps,
}

/// How the maps know what was stored to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tracking {
    /// The kernel marks the entry.
    Async,
    /// The store waits until the page is noted and its protection taken away.
    Trap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    None,
    /// Write-protected: a store marks it, or is trapped.
    Clean,
    /// Marked, or free to be stored to.
    Written,
}

/// What the kernel knows of a page. Its lock is that of the hardware: one access is one step.
#[derive(Debug)]
struct KernelPage {
    /// Count and request word; `None` is a hole.
    content: Option<[u64; 2]>,
    entries: [Entry; VIEWS],
}

struct World {
    mistake: Mistake,
    tracking: Tracking,
    blocks: RangeLock,
    resident: PageSet,
    /// One for each map.
    syncing: [Mutex<()>; VIEWS],
    /// `Traps` of each map.
    trapped: [(PageSet, Mutex<()>); VIEWS],
    kernel: Vec<Mutex<KernelPage>>,
    media: Vec<[AtomicU64; 2]>,
}

const START: [u64; 2] = [1000, 1];

fn whole(page: u64) -> std::ops::Range<u64> {
    page * PAGE..(page + 1) * PAGE
}

impl World {
    fn new(mistake: Mistake, tracking: Tracking) -> Self {
        Self {
            mistake,
            tracking,
            blocks: RangeLock::default(),
            resident: PageSet::new(&(0..PAGES)).unwrap(),
            syncing: std::array::from_fn(|_| Mutex::default()),
            trapped: std::array::from_fn(|_| (PageSet::new(&(0..PAGES)).unwrap(), Mutex::default())),
            kernel: (0..PAGES)
                .map(|_| Mutex::new(KernelPage { content: None, entries: [Entry::None; VIEWS] }))
                .collect(),
            media: (0..PAGES).map(|_| START.map(AtomicU64::new)).collect(),
        }
    }

    fn kernel<R>(&self, page: u64, step: impl FnOnce(&mut KernelPage) -> R) -> R {
        step(&mut self.kernel[page as usize].lock().unwrap())
    }

    fn read_media(&self, page: u64) -> [u64; 2] {
        [0, 1].map(|block| self.media[page as usize][block].load(Ordering::SeqCst))
    }

    fn write_media(&self, page: u64, content: [u64; 2]) {
        (0..2).for_each(|block| self.media[page as usize][block].store(content[block], Ordering::SeqCst));
    }

    /// What the window's own mapping shows of a page that is resident.
    fn own(&self, page: u64) -> [u64; 2] {
        self.kernel(page, |page| page.content.expect("a resident page is no hole"))
    }

    /// A program adds one to the count, and faults as long as the page is not mapped or its stores are trapped. The new
    /// count.
    fn count_up(&self, view: usize, page: u64) -> u64 {
        loop {
            let counted = self.kernel(page, |page| match page.entries[view] {
                Entry::None => Err(Entry::None),
                Entry::Clean if self.tracking == Tracking::Trap => Err(Entry::Clean),
                _ => {
                    let content = page.content.as_mut().expect("a mapped page is no hole");
                    assert!(content[0] >= START[0], "a program sees wiped bytes");
                    content[0] += 1;
                    page.entries[view] = Entry::Written;
                    Ok(content[0])
                }
            });
            match counted {
                Ok(count) => return count,
                Err(Entry::None) => self.fault(view, page),
                Err(_) => self.allow_stores(view, page),
            }
        }
    }

    /// `Core::allow_stores`.
    fn allow_stores(&self, view: usize, page: u64) {
        let (trapped, changing) = &self.trapped[view];
        let _changing = (self.mistake != Mistake::TrapInTwoSteps).then(|| changing.lock().unwrap());
        trapped.insert(page);
        self.kernel(page, |page| {
            if page.entries[view] == Entry::Clean {
                page.entries[view] = Entry::Written;
            }
        });
    }

    /// `Core::take_trapped` of one page: whether it is to be written back.
    fn take_trapped(&self, view: usize, page: u64) -> bool {
        let (trapped, changing) = &self.trapped[view];
        if !trapped.contains(page) {
            return false;
        }
        let _changing = changing.lock().unwrap();
        self.kernel(page, |page| {
            if page.entries[view] == Entry::Written {
                page.entries[view] = Entry::Clean;
            }
        });
        trapped.remove(page);
        true
    }

    /// `Volume::fill` through a map.
    fn fault(&self, view: usize, page: u64) {
        // The thread that touches takes the range if nobody has it (`fill_at_once`), and hands the fault over otherwise.
        let at_once =
            if shuttle::rand::thread_rng().gen_bool(0.5) { self.blocks.try_exclusive(whole(page)) } else { None };
        let _held = at_once.unwrap_or_else(|| self.blocks.exclusive(whole(page)));
        if self.resident.contains(page) {
            self.kernel(page, |page| {
                assert!(page.content.is_some(), "UFFDIO_CONTINUE finds the page");
                if page.entries[view] == Entry::None {
                    page.entries[view] = Entry::Clean;
                }
            });
            return;
        }
        let plaintext = self.read_media(page);
        if self.mistake != Mistake::BitAfterInstall {
            self.resident.insert(page);
        }
        self.kernel(page, |page| {
            assert!(page.content.is_none(), "UFFDIO_COPY finds a hole");
            page.content = Some(plaintext);
            page.entries[view] = Entry::Clean;
        });
        if self.mistake == Mistake::BitAfterInstall {
            self.resident.insert(page);
        }
    }

    /// `Volume::evict` of one page.
    fn evict(&self, page: u64) {
        if !self.resident.contains(page) {
            return;
        }
        let _held = self.blocks.exclusive(whole(page));
        if self.mistake != Mistake::NoZap {
            (0..VIEWS).for_each(|view| self.kernel(page, |page| page.entries[view] = Entry::None));
        }
        if !self.resident.contains(page) {
            return;
        }
        if self.read_media(page) != self.own(page) {
            self.write_media(page, self.own(page));
        }
        self.kernel(page, |page| page.content = Some([0; 2]));
        self.resident.remove(page);
        self.kernel(page, |page| *page = KernelPage { content: None, entries: [Entry::None; VIEWS] });
    }

    /// `Core::sync` of one map.
    fn sync(&self, view: usize) {
        let take = |page| {
            self.kernel(page, |page| {
                let written = page.entries[view] == Entry::Written;
                if written {
                    page.entries[view] = Entry::Clean;
                }
                // What is resident and not mapped here may have been: it counts as written.
                written || page.entries[view] == Entry::None
            })
        };
        let _syncing = (self.mistake != Mistake::SyncsTogether).then(|| self.syncing[view].lock().unwrap());
        if self.tracking == Tracking::Trap {
            (0..PAGES).filter(|&page| self.take_trapped(view, page)).for_each(|page| self.write_back(page));
            return;
        }
        for page in (0..PAGES).filter(|&page| self.resident.contains(page)) {
            if self.mistake == Mistake::MarkAfterRead {
                let written = self.kernel(page, |page| page.entries[view] != Entry::Clean);
                if written {
                    self.write_back(page);
                    take(page);
                }
            } else if take(page) {
                self.write_back(page);
            }
        }
    }

    fn write_back(&self, page: u64) {
        let _held = self.blocks.exclusive(whole(page));
        if self.resident.contains(page) {
            self.write_media(page, self.own(page));
        }
    }

    /// `Volume::persist_within_page` of the first block.
    fn persist(&self, page: u64) {
        let block = page * PAGE..page * PAGE + 16;
        let _held = (self.mistake != Mistake::PersistWithoutLock).then(|| self.blocks.exclusive(block));
        if self.resident.contains(page) {
            let count = self.kernel(page, |page| page.content.map(|content| content[0]));
            let Some(count) = count else { return };
            self.media[page as usize][0].store(count, Ordering::SeqCst);
        }
    }

    /// `Volume::write_at` of the second block.
    fn request(&self, page: u64, value: u64) {
        let _held = self.blocks.exclusive(page * PAGE + 16..page * PAGE + 32);
        let value = if self.resident.contains(page) {
            self.kernel(page, |page| {
                let content = page.content.as_mut().expect("a resident page is no hole");
                content[1] = value;
                value
            })
        } else {
            value
        };
        self.media[page as usize][1].store(value, Ordering::SeqCst);
    }

    fn read_request(&self, page: u64) -> u64 {
        let _held = self.blocks.shared(page * PAGE + 16..page * PAGE + 32);
        if self.resident.contains(page) { self.own(page)[1] } else { self.read_media(page)[1] }
    }
}

fn random_page() -> u64 {
    shuttle::rand::thread_rng().gen_range(0..PAGES)
}

/// Three programs, an evictor, and requests; then everything is looked at on media.
fn run(mistake: Mistake, tracking: Tracking) {
    let world = Arc::new(World::new(mistake, tracking));
    let mut threads = Vec::new();
    let counts = Arc::new((0..PAGES).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
    for view in [0, 1, 0] {
        let (world, counts) = (Arc::clone(&world), Arc::clone(&counts));
        threads.push(thread::spawn(move || {
            for round in 0..ROUNDS {
                let page = random_page();
                let count = world.count_up(view, page);
                counts[page as usize].fetch_add(1, Ordering::SeqCst);
                if round % 2 == 0 {
                    world.persist(page);
                } else {
                    world.sync(view);
                }
                assert!(world.read_media(page)[0] >= count, "what was persisted is not on media");
            }
        }));
    }
    let evictor = Arc::clone(&world);
    threads.push(thread::spawn(move || (0..ROUNDS).for_each(|_| evictor.evict(random_page()))));
    let client = Arc::clone(&world);
    threads.push(thread::spawn(move || {
        for value in 2..2 + ROUNDS {
            client.request(0, value);
            assert_eq!(client.read_request(0), value, "a request reads what it has written");
        }
    }));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    (0..PAGES).for_each(|page| world.evict(page));
    for page in 0..PAGES {
        let expected = START[0] + counts[page as usize].load(Ordering::SeqCst);
        assert_eq!(world.read_media(page)[0], expected, "a store was lost");
    }
    assert_eq!(world.read_media(0)[1], 1 + ROUNDS, "a request was lost");
}

fn main() {
    const ITERATIONS: usize = 3000;
    for tracking in [Tracking::Async, Tracking::Trap] {
        shuttle::check_random(move || run(Mistake::None, tracking), ITERATIONS);
        shuttle::check_pct(move || run(Mistake::None, tracking), ITERATIONS, 3);
        println!("{tracking:?}: {} interleavings are right", 2 * ITERATIONS);
    }
    let mistakes = [
        (Mistake::NoZap, Tracking::Async),
        (Mistake::BitAfterInstall, Tracking::Async),
        (Mistake::MarkAfterRead, Tracking::Async),
        (Mistake::PersistWithoutLock, Tracking::Async),
        (Mistake::SyncsTogether, Tracking::Async),
        (Mistake::SyncsTogether, Tracking::Trap),
        (Mistake::TrapInTwoSteps, Tracking::Trap),
    ];
    for (mistake, tracking) in mistakes {
        std::panic::set_hook(Box::new(|_| {})); // what is expected needs no report
        // The search ends with the first hit; the rarest has one in about ten thousand interleavings.
        let search = || shuttle::check_random(move || run(mistake, tracking), 200 * ITERATIONS);
        let found = catch_unwind(AssertUnwindSafe(search));
        let _ = std::panic::take_hook();
        assert!(found.is_err(), "{mistake:?} was not found");
        println!("{mistake:?} is found");
    }
}
