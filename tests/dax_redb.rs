//! A storage engine lives in a direct map: redb with its database in the mapping, killed in a loop.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::multiple_unsafe_ops_per_block, unsafe_code)]

mod vault;

use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use daxcrypt::dax::DaxMapping;
use daxcrypt::pmem::Access;
use redb::{Builder, Database, ReadableDatabase, ReadableTableMetadata, StorageBackend, TableDefinition};
use vault::{PAGE, Vault, child_argument, child_command, writable};

const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("numbers");
const SIZE: u64 = 32 << 20;

/// The first page of the map holds the length of the database, which follows it. redb orders its accesses itself.
#[derive(Debug)]
struct MapBackend(DaxMapping);

impl MapBackend {
    fn length(&self) -> &AtomicU64 {
        // SAFETY: the first word of the map, aligned, and only ever used as an atomic.
        unsafe { AtomicU64::from_ptr(self.0.as_ptr().cast()) }
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<u64> {
        let end = offset.checked_add(len as u64).filter(|&end| end <= self.length().load(Ordering::Relaxed));
        end.map(|_| PAGE + offset).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl StorageBackend for MapBackend {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.length().load(Ordering::Relaxed))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let at = self.check(offset, out.len())?;
        // SAFETY: within the map; redb does not write what it reads at the same time.
        out.copy_from_slice(unsafe { self.0.as_slice(at..at + out.len() as u64) });
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        let old = self.length().load(Ordering::Relaxed);
        if PAGE + len > self.0.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if len > old {
            self.0.zero(PAGE + old..PAGE + len).map_err(io::Error::other)?;
            self.0.persist(PAGE + old..PAGE + len).map_err(io::Error::other)?;
        }
        self.length().store(len, Ordering::Relaxed);
        self.0.persist(0..8).map_err(io::Error::other)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.0.sync().map_err(io::Error::other)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let at = self.check(offset, data.len())?;
        // SAFETY: within the map; redb neither reads nor writes these bytes at the same time.
        unsafe { self.0.as_mut_slice(at..at + data.len() as u64) }.copy_from_slice(data);
        Ok(())
    }
}

fn database(path: &Path) -> Database {
    let volume = Vault::open(path, Access::ReadWrite);
    let map = volume.map(0..SIZE, &writable().resident_max(1 << 20)).unwrap();
    Builder::new().set_cache_size(1 << 20).create_with_backend(MapBackend(map)).unwrap()
}

fn value(key: u64) -> Vec<u8> {
    (0..50 + key % 700).map(|index| (key * 31 + index) as u8).collect()
}

/// Commits one key after the other, and tells each when its commit has returned.
fn insert_for_ever(path: &Path) {
    let database = database(path);
    let mut out = io::stdout().lock();
    let mut key = {
        let reading = database.begin_read().unwrap();
        reading.open_table(TABLE).map_or(0, |table| table.len().unwrap())
    };
    loop {
        let writing = database.begin_write().unwrap();
        writing.open_table(TABLE).unwrap().insert(key, &*value(key)).unwrap();
        writing.commit().unwrap();
        writeln!(out, "{key}").unwrap();
        key += 1;
    }
}

#[test]
fn redb_in_a_map_keeps_every_commit_through_kill_9() {
    const NAME: &str = "redb_in_a_map_keeps_every_commit_through_kill_9";
    if let Some(path) = child_argument() {
        insert_for_ever(Path::new(&path));
        return;
    }
    let (vault, volume) = Vault::empty(SIZE);
    volume.write_zeroes(0, SIZE).unwrap();
    drop(volume);
    let mut committed = 0;
    for round in 0..10_u64 {
        let mut child = child_command(NAME, vault.path().to_str().unwrap()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut keys = lines.by_ref().filter_map(|line| line.parse::<u64>().ok());
        let enough = committed + 20 + round * 37 % 60;
        committed = keys.by_ref().find(|key| *key >= enough).expect("the child commits") + 1;
        child.kill().unwrap();
        child.wait().unwrap();
        committed = keys.last().map_or(committed, |key| key + 1);

        let mut database = database(&vault.path());
        assert!(database.check_integrity().unwrap(), "round {round}: nothing to repair after redb's own recovery");
        let reading = database.begin_read().unwrap();
        let table = reading.open_table(TABLE).unwrap();
        let found = table.len().unwrap();
        assert!(
            found == committed || found == committed + 1,
            "round {round}: {found} keys, {committed} were committed"
        );
        for key in 0..found {
            assert_eq!(table.get(key).unwrap().unwrap().value(), value(key), "round {round}, key {key}");
        }
        committed = found;
    }
}
