//! An export as a mounted filesystem without kernel NBD: nbdfuse shows it as a file, a loop device as a disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{noise, tool, tool_command};

/// `nbdfuse DIR URI` with a loop device over `DIR/nbd`.
pub struct Disk {
    fuse: Child,
    folder: PathBuf,
    pub device: String,
}

impl Disk {
    /// Attaches `uri`; `folder` is made.
    pub fn attach(folder: &Path, uri: &str) -> Self {
        fs::create_dir_all(folder).unwrap();
        let mut command = Command::new("nbdfuse");
        let fuse = command.arg(folder).arg(uri).stdin(Stdio::null()).spawn().unwrap();
        let file = folder.join("nbd");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !file.exists() {
            assert!(Instant::now() < deadline, "nbdfuse shows no file");
            std::thread::sleep(Duration::from_millis(10));
        }
        let shown = tool("losetup", &["-f", "--show", file.to_str().unwrap()]);
        Self { fuse, folder: folder.into(), device: shown.stdout.trim().into() }
    }

    /// Detaches in order; everything that was synced has reached the server.
    pub fn detach(mut self) {
        self.release();
        let status = self.fuse.wait().unwrap();
        assert!(status.success(), "nbdfuse: {status}");
    }

    fn release(&mut self) {
        if self.device.is_empty() {
            return;
        }
        let _ = tool_command("losetup", &["-d", &self.device]).status();
        self.device.clear();
        // The kernel detaches a loop device when its last user is gone, and anything on the machine that scans block
        // devices may be one for a moment.
        let folder = self.folder.to_str().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !tool_command("fusermount3", &["-q", "-u", folder]).status().is_ok_and(|status| status.success()) {
            if Instant::now() > deadline {
                let _ = tool_command("fusermount3", &["-q", "-u", "-z", folder]).status();
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.release();
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
    }
}

/// A mounted filesystem; unmounted when dropped.
pub struct Mount {
    pub at: PathBuf,
    mounted: bool,
}

impl Mount {
    pub fn new(device: &str, at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        tool("mount", &["-o", options, device, at.to_str().unwrap()]);
        Self { at: at.into(), mounted: true }
    }

    pub fn unmount(mut self) {
        self.mounted = false;
        tool("umount", &[self.at.to_str().unwrap()]);
    }

    /// What a power cut leaves behind for the tests' host: detach whatever still hangs on the dead server.
    pub fn abandon(mut self) {
        self.mounted = false;
        let _ = tool_command("umount", &["-l", self.at.to_str().unwrap()]).status();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            let _ = tool_command("umount", &["-l", self.at.to_str().unwrap()]).status();
        }
    }
}

/// Writes a tree of files of many sizes, each with `marker` inside, and returns their paths and content.
pub fn write_tree(root: &Path, seed: u64, marker: &[u8]) -> Vec<(PathBuf, Vec<u8>)> {
    let sizes = [0, 1, 15, 16, 17, 511, 512, 513, 4095, 4096, 4097, 65_536, 1_000_003, 5 << 20];
    let mut files = Vec::new();
    for (index, size) in sizes.into_iter().enumerate() {
        let folder = root.join(format!("d{}", index % 3)).join(format!("e{}", index % 2));
        fs::create_dir_all(&folder).unwrap();
        let mut content = noise(seed + index as u64, size);
        let marked = content.len().min(marker.len());
        content[..marked].copy_from_slice(&marker[..marked]);
        let path = folder.join(format!("file-{index}"));
        fs::write(&path, &content).unwrap();
        files.push((path.strip_prefix(root).unwrap().into(), content));
    }
    files
}

/// Reads the tree back and compares every byte.
#[track_caller]
pub fn check_tree(root: &Path, files: &[(PathBuf, Vec<u8>)]) {
    for (path, content) in files {
        let found = fs::read(root.join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(found == *content, "{} differs ({} bytes, {} expected)", path.display(), found.len(), content.len());
    }
}

/// Whether `needle` occurs in the file at `path`.
pub fn file_contains(path: &Path, needle: &[u8]) -> bool {
    let bytes = fs::read(path).unwrap();
    bytes.windows(needle.len()).any(|window| window == needle)
}
