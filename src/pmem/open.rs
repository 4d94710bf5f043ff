//! Opening and creating: from a path to a locked, mapped file descriptor.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, FallocateFlags, SeekFrom, StatxAttributes, StatxFlags, fallocate, seek, statx};
use rustix::io::Errno;

use super::backing::BackingKind;
use super::error::OpenError;
use super::file_limit::check_file_size_limit;
use super::granularity::Finding;
use super::lock::{self, LockRange};
use super::mapping::Mapping;
use super::medium::retry_interrupted;
use super::options::{Access, Allocation};
use super::probe::Sysfs;

/// Address space kept free behind the end of a growable backing, at least.
const GROWTH_ROOM_BYTES: u64 = 64 << 30;

/// A file or device that is open and locked.
#[derive(Debug)]
pub(super) struct OpenedFile {
    pub(super) file: File,
    /// The kernel's own node of the device, locked as `file` is, when `file` is another one.
    pub(super) node: Option<File>,
    /// The disk of a partition, locked where the partition lies on it.
    pub(super) disk: Option<File>,
    pub(super) kind: BackingKind,
    pub(super) len_bytes: u64,
    pub(super) disk_offset: u64,
    pub(super) sector_bytes: Option<u64>,
    pub(super) physical_address: Option<u64>,
}

/// Opens and locks what is at `path`.
pub(super) fn open_locked(path: &Path, access: Access, range: &LockRange) -> Result<OpenedFile, OpenError> {
    let sysfs = Sysfs::default();
    // Asked before opening, because opening a FIFO waits and opening some devices has effects.
    let kind = kind_of(&fs::metadata(path).map_err(OpenError::from_io)?, &sysfs)?;
    let mut options = fs::OpenOptions::new();
    options.read(true).write(access == Access::ReadWrite);
    if kind == BackingKind::BlockDevice && access == Access::ReadWrite && *range == LockRange::Whole {
        // On a block device O_EXCL excludes mounts and other claims of the kernel (open(2)).
        options.custom_flags(libc::O_EXCL);
    }
    let file = options.open(path).map_err(OpenError::from_io)?;
    let metadata = file.metadata().map_err(OpenError::from_io)?;
    if kind_of(&metadata, &sysfs)? != kind {
        return Err(OpenError::Busy); // it was replaced between the two looks
    }
    take_lock(&file, access, range)?;
    let device = metadata.rdev();
    let node = match kind {
        BackingKind::File => None,
        BackingKind::BlockDevice => sysfs.block_node(device),
        BackingKind::DevDax => sysfs.char_node(device),
    };
    let node = node.map(|path| lock_on_node(&path, &metadata, access, range)).transpose()?.flatten();
    let (len_bytes, physical_address) = match kind {
        BackingKind::File => (metadata.len(), None),
        BackingKind::BlockDevice => {
            let len_bytes = seek(&file, SeekFrom::End(0)).map_err(|errno| OpenError::from_io(errno.into()))?;
            (len_bytes, sysfs.block_physical_address(device))
        }
        BackingKind::DevDax => {
            (sysfs.dax_len_bytes(device).ok_or(OpenError::UnknownSize)?, sysfs.dax_physical_address(device))
        }
    };
    if len_bytes == 0 {
        return Err(OpenError::Empty);
    }
    let (disk_offset, sector_bytes) = match kind {
        BackingKind::BlockDevice => {
            (sysfs.block_start_bytes(device).ok_or(OpenError::UnknownStart)?, sysfs.block_sector_bytes(device))
        }
        _ => (0, None),
    };
    let disk = sysfs.disk_node(device).filter(|_| disk_offset > 0);
    let disk = disk.map(|path| lock_on_disk(&path, access, disk_offset, len_bytes, range)).transpose()?.flatten();
    Ok(OpenedFile { file, node, disk, kind, len_bytes, disk_offset, sector_bytes, physical_address })
}

/// Creates, locks and sizes a new file. On failure no file is left.
pub(super) fn create_locked(path: &Path, len_bytes: u64, allocation: Allocation) -> Result<OpenedFile, OpenError> {
    if len_bytes == 0 {
        return Err(OpenError::Empty);
    }
    check_file_size_limit(len_bytes).map_err(OpenError::Io)?;
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(path).map_err(OpenError::from_io)?;
    let prepared = take_lock(&file, Access::ReadWrite, &LockRange::Whole)
        .and_then(|()| set_length(&file, len_bytes, allocation))
        .and_then(|()| make_name_durable(&file, path));
    if let Err(error) = prepared {
        let _ = fs::remove_file(path); // the first error is the one to report
        return Err(error);
    }
    Ok(OpenedFile {
        file,
        node: None,
        disk: None,
        kind: BackingKind::File,
        len_bytes,
        disk_offset: 0,
        sector_bytes: None,
        physical_address: None,
    })
}

/// Maps the file, and says what kind of mapping that is.
pub(super) fn map(opened: &OpenedFile, access: Access) -> Result<(Mapping, Finding), OpenError> {
    let len_bytes = opened.len_bytes;
    let len = usize::try_from(len_bytes).ok().filter(|&len| isize::try_from(len).is_ok());
    let len = len.ok_or(OpenError::TooLarge { len_bytes })?;
    let map_error = |error: std::io::Error| match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EOVERFLOW) => OpenError::TooLarge { len_bytes },
        _ => OpenError::Map { len_bytes, source: error },
    };
    let page_bytes = rustix::param::page_size();
    let finding = match opened.kind {
        BackingKind::DevDax => {
            let device = opened.file.metadata().map_err(OpenError::Io)?.rdev();
            let page_bytes = usize::try_from(Sysfs::default().dax_align_bytes(device)).unwrap_or(page_bytes);
            let mapping = Mapping::direct(&opened.file, access, len, page_bytes).map_err(map_error)?;
            return Ok((mapping, Finding::DeviceDax));
        }
        BackingKind::BlockDevice => {
            let device = opened.file.metadata().map_err(OpenError::Io)?.rdev();
            Finding::BlockDevice { dax_capable: Sysfs::default().block_is_dax_capable(device) }
        }
        BackingKind::File => file_finding(&opened.file),
    };
    let lengths = [with_growth_room(len, access), len];
    if finding == Finding::DaxFile {
        for len in lengths {
            if let Ok(mapping) = Mapping::direct(&opened.file, access, len, page_bytes) {
                return Ok((mapping, finding));
            }
        }
    }
    let finding = if finding == Finding::DaxFile { Finding::MapSyncRefused } else { finding };
    let mapping = Mapping::ordinary(&opened.file, access, lengths[0])
        .or_else(|_| Mapping::ordinary(&opened.file, access, lengths[1]))
        .map_err(map_error)?;
    Ok((mapping, finding))
}

/// How many bytes to map, so that the backing can grow in place. More than there is address space for is not an error:
/// the caller falls back to the bare length.
fn with_growth_room(len: usize, access: Access) -> usize {
    let room = usize::try_from(GROWTH_ROOM_BYTES).unwrap_or(0).max(len);
    match access {
        Access::ReadOnly => len,
        Access::ReadWrite => len.saturating_add(room).next_multiple_of(rustix::param::page_size()),
    }
}

fn kind_of(metadata: &fs::Metadata, sysfs: &Sysfs) -> Result<BackingKind, OpenError> {
    let file_type = metadata.file_type();
    if file_type.is_file() {
        Ok(BackingKind::File)
    } else if file_type.is_block_device() {
        Ok(BackingKind::BlockDevice)
    } else if file_type.is_char_device() && sysfs.char_is_dax(metadata.rdev()) {
        Ok(BackingKind::DevDax)
    } else {
        Err(OpenError::NotMappable)
    }
}

fn file_finding(file: &File) -> Finding {
    let Ok(status) = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::empty()) else { return Finding::DaxUnknown };
    if status.stx_attributes.contains(StatxAttributes::DAX) {
        Finding::DaxFile
    } else if status.stx_attributes_mask.contains(StatxAttributes::DAX) {
        Finding::NotDaxFile
    } else {
        Finding::DaxUnknown
    }
}

/// Locks the node at `path` too, where it is not the one that was opened: locks are those of a node, and a device may have
/// several (mknod(1), containers). Whoever sees this one meets there. `None` when it is the same, is missing or another
/// device's, or may not be opened.
fn lock_on_node(
    path: &Path,
    opened: &fs::Metadata,
    access: Access,
    range: &LockRange,
) -> Result<Option<File>, OpenError> {
    let Ok(found) = fs::metadata(path) else { return Ok(None) };
    let is_same_device = found.file_type() == opened.file_type() && found.rdev() == opened.rdev();
    let is_same_node = (found.dev(), found.ino()) == (opened.dev(), opened.ino());
    if !is_same_device || is_same_node {
        return Ok(None);
    }
    let node = fs::OpenOptions::new().read(true).write(access == Access::ReadWrite).open(path);
    let node = match node.map_err(OpenError::from_io) {
        Err(OpenError::NotFound | OpenError::PermissionDenied(_)) => return Ok(None),
        node => node?,
    };
    take_lock(&node, access, range)?;
    Ok(Some(node))
}

/// Locks what a partition (or `range` of it) is on its disk: the namespaces of a region are opened by way of the disk, and
/// neither way may find free what the other one has. `None` for a disk that this user may not open.
fn lock_on_disk(
    path: &Path,
    access: Access,
    disk_offset: u64,
    len_bytes: u64,
    range: &LockRange,
) -> Result<Option<File>, OpenError> {
    let disk = fs::OpenOptions::new().read(true).write(access == Access::ReadWrite).open(path);
    let disk = match disk.map_err(OpenError::from_io) {
        Err(OpenError::NotFound | OpenError::PermissionDenied(_)) => return Ok(None),
        disk => disk?,
    };
    let part = match range {
        LockRange::Whole => 0..len_bytes,
        LockRange::Bytes(range) => range.clone(),
    };
    let on_disk = |offset: u64| disk_offset.saturating_add(offset);
    take_lock(&disk, access, &LockRange::Bytes(on_disk(part.start)..on_disk(part.end)))?;
    Ok(Some(disk))
}

fn take_lock(file: &File, access: Access, range: &LockRange) -> Result<(), OpenError> {
    match lock::try_lock(file, access, range) {
        Ok(true) => Ok(()),
        Ok(false) => Err(OpenError::Busy),
        Err(error) => Err(OpenError::Io(error)),
    }
}

fn set_length(file: &File, len_bytes: u64, allocation: Allocation) -> Result<(), OpenError> {
    if i64::try_from(len_bytes).is_err() {
        return Err(OpenError::TooLarge { len_bytes });
    }
    let result = match allocation {
        Allocation::Sparse => file.set_len(len_bytes),
        Allocation::Full => match retry_interrupted(|| fallocate(file, FallocateFlags::empty(), 0, len_bytes)) {
            Err(Errno::OPNOTSUPP) => write_zeros(file, len_bytes),
            result => result.map_err(Into::into),
        },
    };
    result.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => OpenError::NoSpace { len_bytes },
        Some(libc::EFBIG) => OpenError::TooLarge { len_bytes },
        _ => OpenError::from_io(error),
    })
}

/// Allocates by writing, for file systems without `fallocate`.
fn write_zeros(mut file: &File, len_bytes: u64) -> std::io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut left = len_bytes;
    while left > 0 {
        let piece = usize::try_from(left).map_or(zeros.len(), |left| left.min(zeros.len()));
        file.write_all(&zeros[..piece])?;
        left -= piece as u64;
    }
    Ok(())
}

/// Makes the file and its directory entry survive a power cut.
fn make_name_durable(file: &File, path: &Path) -> Result<(), OpenError> {
    file.sync_all().map_err(OpenError::Io)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(OpenError::Io)
}
