//! redb in a direct map, and the same engine in a plain file that is mapped.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use daxcrypt::dax::DaxMapping;
use redb::{Builder, Database, ReadableDatabase, StorageBackend, TableDefinition};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("numbers");
const LEN: u64 = 256 << 20;
const KEYS: u64 = 20_000;
const KEYS_OF_A_COMMIT: u64 = 500;

/// Memory that keeps what is stored to it once it is synced.
pub(crate) trait Kept: std::fmt::Debug + Send + Sync + 'static {
    fn start(&self) -> *mut u8;
    fn sync(&self) -> io::Result<()>;
}

impl Kept for DaxMapping {
    fn start(&self) -> *mut u8 {
        self.as_ptr()
    }

    fn sync(&self) -> io::Result<()> {
        Self::sync(self).map_err(io::Error::other)
    }
}

/// A file in tmpfs that is mapped.
#[derive(Debug)]
pub(crate) struct Plain(usize);

impl Plain {
    pub(crate) fn new(folder: &Path) -> Self {
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(folder.join("plain")).unwrap();
        file.set_len(LEN).unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping of a file of that length.
        let start = unsafe { mmap(ptr::null_mut(), LEN as usize, protection, MapFlags::SHARED, file.as_fd(), 0) };
        Self(start.unwrap().expose_provenance())
    }
}

impl Kept for Plain {
    fn start(&self) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.0)
    }

    fn sync(&self) -> io::Result<()> {
        // SAFETY: the mapping is this value's.
        Ok(unsafe { msync(self.start().cast::<c_void>(), LEN as usize, MsyncFlags::SYNC) }?)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more.
        unsafe { munmap(self.start().cast::<c_void>(), LEN as usize) }.unwrap();
    }
}

#[derive(Debug)]
struct Storage(Box<dyn Kept>, AtomicU64);

impl Storage {
    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        assert!(offset + len as u64 <= LEN);
        self.0.start().wrapping_add(offset as usize)
    }
}

impl StorageBackend for Storage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.1.load(Ordering::Relaxed))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        // SAFETY: within the mapping; redb does not write what it reads at the same time.
        unsafe { ptr::copy_nonoverlapping(self.at(offset, out.len()), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let old = self.1.swap(len, Ordering::Relaxed);
        if len > old {
            // SAFETY: as above.
            unsafe { ptr::write_bytes(self.at(old, (len - old) as usize), 0, (len - old) as usize) };
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), self.at(offset, data.len()), data.len()) };
        Ok(())
    }
}

/// Seconds of so many inserts, and of as many reads in another order.
pub(crate) fn inserts_and_reads(memory: Box<dyn Kept>) -> [f64; 2] {
    let storage = Storage(memory, AtomicU64::new(0));
    let database = Arc::new(Builder::new().set_cache_size(1 << 20).create_with_backend(storage).unwrap());
    [super::seconds(|| insert(&database)), super::seconds(|| read(&database))]
}

fn insert(database: &Database) {
    let value = [0x5a; 200];
    for first in (0..KEYS).step_by(KEYS_OF_A_COMMIT as usize) {
        let writing = database.begin_write().unwrap();
        {
            let mut table = writing.open_table(TABLE).unwrap();
            for key in first..first + KEYS_OF_A_COMMIT {
                table.insert(key * 7919 % KEYS, &value[..]).unwrap();
            }
        }
        writing.commit().unwrap();
    }
}

fn read(database: &Database) {
    let reading = database.begin_read().unwrap();
    let table = reading.open_table(TABLE).unwrap();
    for index in 0..KEYS {
        assert_eq!(table.get(index * 6151 % KEYS).unwrap().unwrap().value().len(), 200);
    }
}
