//! How a volume is mapped, and how it came to be mapped.

use std::time::Duration;

/// Seconds between two background write-backs unless told otherwise.
const WRITE_BACK_SECONDS: u64 = 5;

/// How plaintext comes into a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapMode {
    /// A page is decrypted when it is first touched (userfaultfd).
    Lazy,
    /// As [`Self::Lazy`], where the kernel permits this program no more: a system call that is given a page that is absent
    /// fails with `EFAULT`. [`DaxMapping::prefetch`](super::DaxMapping::prefetch) brings pages in before.
    LazyUserMode,
    /// A page is decrypted by the thread that touches it first ([`FaultsBy::InThread`]). A system call that is given a page that
    /// is absent fails with `EFAULT`, as for [`Self::LazyUserMode`].
    LazyInThread,
    /// Everything was decrypted when the map was made, and stays in memory as long as it.
    Eager,
}

/// How a map knows what to write back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// The kernel notes the pages that were stored to (Linux 6.7).
    Async,
    /// The first store to a page since the last sync is trapped.
    Trap,
    /// A sync compares every resident page with media.
    Compare,
}

/// Who decrypts a page that is touched through the pointer of a lazy map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FaultsBy {
    /// Threads of this library, while the one that touches waits. Nothing is asked of the program.
    #[default]
    Threads,
    /// The thread that touches, in this library's handler of SIGBUS: nobody has to be woken, which costs several times what the
    /// decryption does where idle processors sleep. It takes no right. What it asks of the program stands
    /// [in the module's documentation](super#faults-in-the-thread-that-touches).
    InThread,
}

/// How to map a volume. The default is read-only, lazy where the kernel permits it, and without a bound.
#[derive(Clone, Debug)]
pub struct MapOptions {
    pub(super) writable: bool,
    pub(super) resident_max: Option<u64>,
    pub(super) write_back: Duration,
    pub(super) lazy: bool,
    pub(super) write_async: bool,
    pub(super) faults: FaultsBy,
    pub(super) kernel: Option<(u32, u32)>,
}

impl Default for MapOptions {
    fn default() -> Self {
        Self {
            writable: false,
            resident_max: None,
            write_back: Duration::from_secs(WRITE_BACK_SECONDS),
            lazy: true,
            write_async: true,
            faults: FaultsBy::Threads,
            kernel: None,
        }
    }
}

impl MapOptions {
    /// As the default.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows stores.
    #[must_use]
    pub const fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    /// Takes that back.
    pub(super) const fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// Keeps at most `bytes` of the volume's plaintext in memory (256 KiB when less is asked for), as long as this map lives.
    /// The least bound of all maps of the volume holds.
    #[must_use]
    pub const fn resident_max(mut self, bytes: u64) -> Self {
        self.resident_max = Some(bytes);
        self
    }

    /// Syncs in the background so often, which bounds what a crash of the process loses; zero for never. 5 seconds
    /// unless told otherwise. One thread syncs all maps of a process in turn.
    #[must_use]
    pub const fn write_back_interval(mut self, interval: Duration) -> Self {
        self.write_back = interval;
        self
    }

    /// Decrypts everything at once, also where userfaultfd is permitted.
    #[must_use]
    pub const fn eager(mut self) -> Self {
        self.lazy = false;
        self
    }

    /// Has faults answered by the one or the other.
    #[must_use]
    pub const fn faults(mut self, by: FaultsBy) -> Self {
        self.faults = by;
        self
    }

    /// Uses only what Linux `major.minor` has, to see how a program runs there; see the [table](super#kernels).
    #[must_use]
    pub const fn as_on_kernel(mut self, major: u32, minor: u32) -> Self {
        self.kernel = Some((major, minor));
        self
    }

    /// Traps stores to find what is dirty, also where the kernel could note them by itself.
    #[must_use]
    pub const fn trap_stores(mut self) -> Self {
        self.write_async = false;
        self
    }
}
