//! A namespace on tmpfs for the tests of direct maps, and how to touch a map as a program does.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::multiple_unsafe_ops_per_block,
    unsafe_code,
    dead_code
)]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use daxcrypt::dax::{DaxMapping, MapOptions};
use daxcrypt::namespace::{self, Credential, FormatOptions, LockedNamespace};
use daxcrypt::pmem::{Access, Allocation, Backing, Granularity, OpenError, OpenOptions};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;

pub(crate) const PAGE: u64 = 4096;
/// Where the data begins in the backing.
pub(crate) const DATA: u64 = 2 << 20;

/// A folder with one namespace.
pub(crate) struct Vault {
    pub(crate) dir: tempfile::TempDir,
}

pub(crate) fn credential() -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[7; 32]))
}

/// What a new vault holds at `offset`.
pub(crate) fn pattern(offset: u64) -> u8 {
    (offset / PAGE * 7 + offset % 251 + 1) as u8
}

impl Vault {
    /// A volume of `size` bytes that holds the pattern.
    pub(crate) fn new(size: u64) -> (Self, Arc<Volume>) {
        let (vault, volume) = Self::empty(size);
        let bytes: Vec<u8> = (0..size).map(pattern).collect();
        volume.write_at(&bytes, 0).unwrap();
        (vault, volume)
    }

    /// A volume of `size` bytes that nobody has written.
    pub(crate) fn empty(size: u64) -> (Self, Arc<Volume>) {
        Self::made(size, false)
    }

    /// The same, with discards allowed on request.
    pub(crate) fn made(size: u64, allow_discards: bool) -> (Self, Arc<Volume>) {
        let vault = Self { dir: tempfile::tempdir_in("/dev/shm").unwrap() };
        let backing = Backing::create(&vault.path(), DATA + size.next_multiple_of(4096), Allocation::Full).unwrap();
        let unit = namespace::DataUnit::Bytes512;
        let options = FormatOptions { size_bytes: Some(size), unit, allow_discards, ..FormatOptions::default() };
        let namespace = namespace::format(Arc::new(backing), options, &credential()).unwrap();
        (vault, Arc::new(Volume::new(namespace, Backend::detect())))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("vault.img")
    }

    /// Opens it again with that granularity.
    pub(crate) fn reopen(&self, granularity: Granularity) -> Arc<Volume> {
        let options = OpenOptions::new(Access::ReadWrite).force_granularity(granularity);
        let backing = options.open(&self.path()).unwrap();
        Arc::new(LockedNamespace::open(Arc::new(backing)).unwrap().unlock(&credential()).unwrap())
    }

    /// A child that another test is just starting has the lock of the last one who had it open, until it is a program of
    /// its own.
    pub(crate) fn open(path: &Path, access: Access) -> Arc<Volume> {
        let deadline = Instant::now() + Duration::from_secs(5);
        let backing = loop {
            match Backing::open(path, access) {
                Err(OpenError::Busy) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                opened => break opened.unwrap(),
            }
        };
        Arc::new(LockedNamespace::open(Arc::new(backing)).unwrap().unlock(&credential()).unwrap())
    }
}

/// Writable, without the background write-back.
pub(crate) fn writable() -> MapOptions {
    MapOptions::new().writable().write_back_interval(Duration::ZERO)
}

/// Loads a byte through the pointer.
pub(crate) fn load(map: &DaxMapping, offset: u64) -> u8 {
    assert!(offset < map.len());
    // SAFETY: the offset is within the map.
    unsafe { map.as_ptr().add(offset as usize).read_volatile() }
}

/// Stores a byte through the pointer.
pub(crate) fn store(map: &DaxMapping, offset: u64, value: u8) {
    assert!(offset < map.len() && map.writable());
    // SAFETY: the offset is within the writable map.
    unsafe { map.as_ptr().add(offset as usize).write_volatile(value) };
}

/// A byte of ciphertext.
pub(crate) fn media_byte(volume: &Volume, offset: u64) -> u8 {
    let read = |source: daxcrypt::memory::Source<'_>| {
        let mut byte = [0];
        source.copy_to(&mut byte);
        byte[0]
    };
    volume.backing().read(DATA + offset..DATA + offset + 1, read).unwrap()
}

/// Numbers from a seed (xorshift64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

const CHILD: &str = "DAXCRYPT_TEST_CHILD";

/// What the parent gave to this process, if it is a child of [`child`].
pub(crate) fn child_argument() -> Option<String> {
    std::env::var(CHILD).ok()
}

/// Runs test `name` of this binary again in a process of its own, where [`child_argument`] is `argument`.
pub(crate) fn child_command(name: &str, argument: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture"]).env(CHILD, argument);
    command
}

/// Runs [`child_command`] to its end, without its output.
pub(crate) fn child(name: &str, argument: &str) -> ExitStatus {
    child_command(name, argument).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}
