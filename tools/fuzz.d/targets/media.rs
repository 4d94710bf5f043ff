//! A backing in memory that every execution rewrites: what the header, LUKS2 and region targets have in common.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use daxcrypt::pmem::{Access, Backing};

/// Anonymous memory with a path.
pub struct Media {
    file: File,
    path: PathBuf,
}

impl Media {
    /// `len_bytes` zero bytes.
    pub fn new(name: &str, len_bytes: u64) -> Self {
        let memory = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd()).into();
        let file = File::from(memory);
        file.set_len(len_bytes).unwrap();
        Self { file, path }
    }

    /// Overwrites the bytes at `offset`.
    pub fn put(&self, bytes: &[u8], offset: u64) {
        self.file.write_all_at(bytes, offset).unwrap();
    }

    /// The bytes at `offset`.
    #[allow(dead_code, reason = "one target begins with what is there")]
    pub fn bytes(&self, len_bytes: usize, offset: u64) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// The same memory as a backing.
    pub fn open(&self, access: Access) -> Arc<Backing> {
        Arc::new(Backing::open(&self.path, access).unwrap())
    }
}
