//! What the kernel tells of a device in sysfs.
//!
//! Every answer is `None` or `false` when sysfs does not say: callers then choose the conservative way. The attributes are
//! those of Linux's block layer (Documentation/ABI/stable/sysfs-block), libnvdimm and dax drivers.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Dev, major, minor};

/// Bytes of a sector, the unit of a partition's `start`.
const SECTOR_BYTES: u64 = 512;
/// The page size of a device-DAX device that does not tell its alignment.
const DAX_ALIGN_DEFAULT_BYTES: u64 = 2 << 20;

/// The sysfs tree, usually at `/sys`.
#[derive(Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self { root: PathBuf::from("/sys") }
    }
}

impl Sysfs {
    /// Whether file systems on this block device (or on the disk of this partition) can use DAX.
    pub(super) fn block_is_dax_capable(&self, device: Dev) -> bool {
        self.disk(device).and_then(|(disk, _)| read_number(&disk.join("queue/dax"))) == Some(1)
    }

    /// Where on its disk a block device begins, in bytes: not 0 for a partition.
    pub(super) fn block_start_bytes(&self, device: Dev) -> Option<u64> {
        self.disk(device).map(|(_, start_bytes)| start_bytes)
    }

    /// The device node of the disk that a block device is, or is a partition of.
    pub(super) fn disk_node(&self, device: Dev) -> Option<PathBuf> {
        let (disk, _) = self.disk(device)?;
        let name = disk.file_name()?.to_str()?.replace('!', "/"); // as sysfs spells a slash
        Some(Path::new("/dev").join(name))
    }

    /// The node that the kernel gives a block device, wherever other nodes of it are.
    pub(super) fn block_node(&self, device: Dev) -> Option<PathBuf> {
        Self::node(&self.root.join(format!("dev/block/{}:{}", major(device), minor(device))))
    }

    /// The node that the kernel gives a character device.
    pub(super) fn char_node(&self, device: Dev) -> Option<PathBuf> {
        Self::node(&self.char_dir(device))
    }

    fn node(dir: &Path) -> Option<PathBuf> {
        let events = fs::read_to_string(dir.join("uevent")).ok()?;
        let name = events.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
        Some(Path::new("/dev").join(name))
    }

    /// Bytes of the sectors that a block device is addressed by.
    pub(super) fn block_sector_bytes(&self, device: Dev) -> Option<u64> {
        self.disk(device).and_then(|(disk, _)| read_number(&disk.join("queue/logical_block_size")))
    }

    /// The physical address of the first byte of a pmem block device or of a partition of one. Only root may read it.
    pub(super) fn block_physical_address(&self, device: Dev) -> Option<u64> {
        let (disk, start_bytes) = self.disk(device)?;
        read_number(&disk.join("device/resource"))?.checked_add(start_bytes)
    }

    /// Whether a character device is a device-DAX device.
    pub(super) fn char_is_dax(&self, device: Dev) -> bool {
        fs::canonicalize(self.char_dir(device).join("subsystem")).is_ok_and(|subsystem| subsystem.ends_with("dax"))
    }

    /// Bytes of a device-DAX device.
    pub(super) fn dax_len_bytes(&self, device: Dev) -> Option<u64> {
        read_number(&self.char_dir(device).join("size"))
    }

    /// The mapping alignment of a device-DAX device, a power of two.
    pub(super) fn dax_align_bytes(&self, device: Dev) -> u64 {
        let dir = self.char_dir(device);
        read_number(&dir.join("align"))
            .or_else(|| read_number(&dir.join("device/align")))
            .filter(|align| align.is_power_of_two())
            .unwrap_or(DAX_ALIGN_DEFAULT_BYTES)
    }

    /// The physical address of the first byte of a device-DAX device. Only root may read it.
    pub(super) fn dax_physical_address(&self, device: Dev) -> Option<u64> {
        read_number(&self.char_dir(device).join("resource"))
    }

    /// The directory of the whole disk, and where in it the device begins, in bytes.
    fn disk(&self, device: Dev) -> Option<(PathBuf, u64)> {
        let link = self.root.join(format!("dev/block/{}:{}", major(device), minor(device)));
        let dir = fs::canonicalize(link).ok()?;
        if !dir.join("partition").exists() {
            return Some((dir, 0));
        }
        let start_bytes = read_number(&dir.join("start"))?.checked_mul(SECTOR_BYTES)?;
        Some((dir.parent()?.to_path_buf(), start_bytes))
    }

    fn char_dir(&self, device: Dev) -> PathBuf {
        self.root.join(format!("dev/char/{}:{}", major(device), minor(device)))
    }
}

/// Reads a decimal number, or a hexadecimal one after `0x`.
fn read_number(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::makedev;

    use super::*;

    /// A sysfs tree with a pmem disk (259:0), its first partition (259:1), a disk (8:0) and a device-DAX device (252:5).
    fn tree() -> (tempfile::TempDir, Sysfs) {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("devices/ndbus0/pmem0/queue/dax", "1\n");
        put("devices/ndbus0/pmem0/device/resource", "0x140000000\n");
        put("devices/ndbus0/pmem0/pmem0p1/partition", "1\n");
        put("devices/ndbus0/pmem0/pmem0p1/start", "4096\n");
        put("devices/ndbus0/pmem0/pmem0p1/uevent", "MAJOR=259\nMINOR=1\nDEVNAME=pmem0p1\nDEVTYPE=partition\n");
        put("devices/dax0.0/uevent", "DEVNAME=dax0.0\n");
        put("devices/sda/queue/dax", "0\n");
        put("devices/sda/queue/logical_block_size", "4096\n");
        put("devices/dax0.0/size", "1073741824\n");
        put("devices/dax0.0/align", "4096\n");
        put("devices/dax0.0/resource", "0x240000000\n");
        put("bus/dax/uevent", "");
        put("class/tty/uevent", "");
        put("devices/ttyS0/uevent", "");
        symlink("../../bus/dax", root.path().join("devices/dax0.0/subsystem")).unwrap();
        symlink("../../class/tty", root.path().join("devices/ttyS0/subsystem")).unwrap();
        for kind in ["block", "char"] {
            fs::create_dir_all(root.path().join("dev").join(kind)).unwrap();
        }
        let links = [
            ("block/259:0", "ndbus0/pmem0"),
            ("block/259:1", "ndbus0/pmem0/pmem0p1"),
            ("block/8:0", "sda"),
            ("char/252:5", "dax0.0"),
            ("char/4:64", "ttyS0"),
        ];
        for (link, to) in links {
            symlink(root.path().join("devices").join(to), root.path().join("dev").join(link)).unwrap();
        }
        let sysfs = Sysfs { root: root.path().to_path_buf() };
        (root, sysfs)
    }

    #[test]
    fn a_pmem_partition_begins_where_its_disk_does_plus_its_start() {
        let (_root, sysfs) = tree();
        assert_eq!(sysfs.block_physical_address(makedev(259, 0)), Some(0x1_4000_0000));
        assert_eq!(sysfs.block_physical_address(makedev(259, 1)), Some(0x1_4000_0000 + 4096 * 512));
        assert_eq!([0, 1].map(|minor| sysfs.block_start_bytes(makedev(259, minor))), [Some(0), Some(4096 * 512)]);
        assert_eq!(sysfs.block_node(makedev(259, 1)), Some("/dev/pmem0p1".into()));
        assert_eq!(sysfs.block_node(makedev(8, 0)), None);
        assert_eq!(sysfs.char_node(makedev(252, 5)), Some("/dev/dax0.0".into()));
        assert_eq!([0, 1].map(|minor| sysfs.disk_node(makedev(259, minor))), [0, 1].map(|_| Some("/dev/pmem0".into())));
        assert_eq!(sysfs.block_start_bytes(makedev(7, 7)), None);
        assert_eq!(sysfs.block_physical_address(makedev(8, 0)), None);
        assert_eq!(sysfs.block_sector_bytes(makedev(8, 0)), Some(4096));
        assert_eq!(sysfs.block_sector_bytes(makedev(259, 1)), None);
        assert_eq!(sysfs.block_physical_address(makedev(1, 1)), None);
    }

    #[test]
    fn only_a_dax_queue_is_dax_capable() {
        let (_root, sysfs) = tree();
        assert!(sysfs.block_is_dax_capable(makedev(259, 0)));
        assert!(sysfs.block_is_dax_capable(makedev(259, 1)));
        assert!(!sysfs.block_is_dax_capable(makedev(8, 0)));
        assert!(!sysfs.block_is_dax_capable(makedev(1, 1)));
    }

    #[test]
    fn device_dax_is_told_from_other_character_devices() {
        let (_root, sysfs) = tree();
        let dax = makedev(252, 5);
        assert!(sysfs.char_is_dax(dax));
        assert!(!sysfs.char_is_dax(makedev(4, 64)));
        assert!(!sysfs.char_is_dax(makedev(1, 3)));
        assert_eq!(sysfs.dax_len_bytes(dax), Some(1 << 30));
        assert_eq!(sysfs.dax_align_bytes(dax), 4096);
        assert_eq!(sysfs.dax_physical_address(dax), Some(0x2_4000_0000));
        assert_eq!(sysfs.dax_align_bytes(makedev(4, 64)), DAX_ALIGN_DEFAULT_BYTES);
    }
}
