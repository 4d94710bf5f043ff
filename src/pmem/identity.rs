//! Which bytes of which file or disk a backing is, whatever path it was opened by: a hard link, a symbolic link, a loop
//! device over a file, a partition or its disk.
//!
//! One `ioctl` asks a loop device what is behind it, by device and inode: the path that sysfs tells may be another file's by
//! now, or in another mount namespace.
#![expect(unsafe_code, reason = "rustix has no wrapper for LOOP_GET_STATUS64")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::backing::{Backing, BackingKind};

/// `LOOP_MAJOR` of linux/major.h.
const LOOP_MAJOR: u32 = 7;
/// `LOOP_GET_STATUS64` of linux/loop.h.
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;

/// A file or disk, as long as the machine runs and it is not deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackingId {
    /// A file, by its file system and its inode.
    File {
        /// Device number of the file system.
        device: u64,
        /// Inode number.
        inode: u64,
    },
    /// A device, by its number.
    Device {
        /// Device number.
        device: u64,
    },
}

/// Bytes of a file or disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The file or disk.
    pub id: BackingId,
    /// The bytes.
    pub range: Range<u64>,
}

impl Extent {
    /// Whether some bytes are of both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.id == other.id && self.range.start < other.range.end && other.range.start < self.range.end
    }

    /// The bytes at `range`, counted from the start of this.
    #[must_use]
    pub fn part(&self, range: &Range<u64>) -> Self {
        let at = |offset: u64| self.range.start.saturating_add(offset).min(self.range.end);
        Self { id: self.id, range: at(range.start)..at(range.end) }
    }
}

impl Backing {
    /// Which bytes of which file or disk it is; `None` for memory.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn extent(&self) -> io::Result<Option<Extent>> {
        let Some(file) = self.file() else { return Ok(None) };
        let metadata = file.metadata()?;
        let len_bytes = self.len_bytes();
        let id = match self.kind() {
            BackingKind::File => BackingId::File { device: metadata.dev(), inode: metadata.ino() },
            BackingKind::DevDax => BackingId::Device { device: metadata.rdev() },
            BackingKind::BlockDevice => return self.block_extent(file, metadata.rdev(), len_bytes).map(Some),
        };
        Ok(Some(Extent { id, range: 0..len_bytes }))
    }

    /// Of a partition, that of its disk; of a loop device, what is behind it.
    fn block_extent(&self, file: &File, device: u64, len_bytes: u64) -> io::Result<Extent> {
        let start = self.disk_offset();
        let (disk, device) = match self.disk_file().filter(|_| start > 0) {
            Some(disk) => (disk, disk.metadata()?.rdev()),
            None => (file, device),
        };
        let range = start..start.saturating_add(len_bytes);
        if rustix::fs::major(device) != LOOP_MAJOR {
            return Ok(Extent { id: BackingId::Device { device }, range });
        }
        let status = loop_status(disk)?;
        let id = match decode_device(status.rdevice) {
            0 => BackingId::File { device: decode_device(status.device), inode: status.inode },
            device => BackingId::Device { device },
        };
        let at = |offset: u64| offset.saturating_add(status.offset);
        Ok(Extent { id, range: at(range.start)..at(range.end) })
    }
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    numbers: [u32; 4],
    names: [u8; 64 + 64 + 32],
    init: [u64; 2],
}

fn loop_status(disk: &File) -> io::Result<LoopInfo64> {
    let mut status = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        numbers: [0; 4],
        names: [0; 160],
        init: [0; 2],
    };
    // SAFETY: the descriptor is open, and the kernel writes no more than one `struct loop_info64`, which `status` has the
    // layout of.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), LOOP_GET_STATUS64, &raw mut status) };
    if result == 0 { Ok(status) } else { Err(io::Error::last_os_error()) }
}

/// A device number as the kernel packs it for `struct loop_info64`, as stat(2) gives it.
fn decode_device(packed: u64) -> u64 {
    let packed = u32::try_from(packed).unwrap_or(u32::MAX);
    rustix::fs::makedev((packed >> 8) & 0xfff, (packed & 0xff) | ((packed >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pmem::{Access, Allocation};

    #[test]
    fn the_status_has_the_length_that_the_kernel_writes() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(decode_device(0x1234_5678), rustix::fs::makedev(0x456, 0x1_2378));
    }

    #[test]
    fn a_hard_link_is_the_same_and_a_copy_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| folder.path().join(name));
        drop(Backing::create(&a, 8192, Allocation::Sparse).unwrap());
        std::fs::hard_link(&a, &b).unwrap();
        std::fs::copy(&a, &c).unwrap();
        let extent = |path| Backing::open(path, Access::ReadOnly).unwrap().extent().unwrap().unwrap();
        assert_eq!(extent(&a), extent(&b));
        assert!(extent(&a).overlaps(&extent(&b)) && !extent(&a).overlaps(&extent(&c)));
        let [front, back] = [0..4096, 4096..8192].map(|range| extent(&a).part(&range));
        assert!(!front.overlaps(&back) && front.overlaps(&extent(&b)));
        assert_eq!(Backing::anonymous(4096).unwrap().extent().unwrap(), None);
    }
}
