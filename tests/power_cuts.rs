//! The real program on real file systems: killed at one of its syncs, gone on with by another process, and then the power
//! fails at a sync of that one.
//!
//! The file system, ext4 or XFS, lies on a loop device. A cut is a copy of the image: it holds what the loop device was
//! given, which is what is below the page cache of the mounted file system; what the program stored and nobody synced is
//! not there. The copy is mounted, the journal of the file system replayed, and then what was written must be there under
//! the key, the operation can be brought to its end, and nothing old is left.
//!
//! `strace` kills: it needs nothing in the program. The signal comes instead of the system call.
//!
//! `DAXCRYPT_POWER_CUTS` is how many pairs of a kill and a cut are tried for each operation and file system, `all` for every
//! one (`tools/soak kill-and-cut`); `DAXCRYPT_SEED` chooses them. Needs root, and what is missing fails.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::leftovers::{Old, nothing_old_is_left};
use common::mount::Mount;
use common::{Bench, loop_device, noise, open_when_free, tool, tool_command};
use daxcrypt::namespace::{Credential, LockedNamespace, OpenError, Region};
use daxcrypt::pmem::{Access, Backing};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;

const SYNCS: &str = "msync,fsync,fdatasync";
const MIB: u64 = 1 << 20;
/// A little more than two windows of a re-key.
const SIZE: usize = (1 << 20) + (128 << 10);
/// What it grows to.
const LARGER: usize = SIZE + (512 << 10);
/// Where a namespace alone in its region begins when it is compact.
const FIRST_PLACE: u64 = 2 * MIB;
/// Where a partition was moved to that is adopted there, and its bytes.
const MOVED_PLACE: u64 = 6 * MIB;
const PARTITION_BYTES: u64 = 4 * MIB;
const TYPE: &str = "9D1F6B0E-5C4A-4F1B-8E57-3A2C64F7D0B1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    fn make(self, image: &Path) {
        let file = fs::File::create(image).unwrap();
        let path = image.to_str().unwrap();
        match self {
            Self::Ext4 => {
                file.set_len(48 << 20).unwrap();
                tool("mkfs.ext4", &["-q", "-F", "-b", "4096", "-J", "size=4", path]);
            }
            Self::Xfs => {
                file.set_len(320 << 20).unwrap(); // there are no smaller ones
                tool("mkfs.xfs", &["-q", "-f", path]);
            }
        }
    }
}

/// An operation on one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Rekey,
    Compact,
    /// From file to file; the source is erased.
    Relocate,
    Resize,
    /// Of a partition that was moved.
    Adopt,
    Import,
}

impl Operation {
    const fn file(self) -> &'static str {
        match self {
            Self::Rekey | Self::Relocate | Self::Resize | Self::Import => "vault.img",
            Self::Compact | Self::Adopt => "region.img",
        }
    }

    /// Whether what has ended is not to be asked for again.
    const fn is_once(self) -> bool {
        matches!(self, Self::Relocate | Self::Adopt)
    }

    /// Where the namespace is when the operation has ended.
    const fn end_place(self) -> u64 {
        match self {
            Self::Rekey | Self::Relocate | Self::Resize | Self::Import => 0,
            Self::Compact => FIRST_PLACE,
            Self::Adopt => MOVED_PLACE,
        }
    }
}

/// A mounted image.
struct Disk {
    device: String,
    mount: Option<Mount>,
}

impl Disk {
    fn attach(image: &Path, at: &Path) -> Self {
        let device = loop_device(image, &[]).expect("power cuts need root");
        let mount = Some(Mount::new(&device, at, "noatime"));
        Self { device, mount }
    }

    /// How many writes the device was given, and whether it is at work.
    fn writes(&self) -> (Vec<String>, bool) {
        let name = self.device.rsplit('/').next().unwrap();
        let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
        let fields: Vec<_> = stat.split_whitespace().map(str::to_owned).collect();
        (fields[4..7].to_vec(), fields[8] != "0")
    }

    /// The image as it is now, at one instant: when something was written meanwhile it is copied again.
    fn cut(&self, image: &Path, copy: &Path) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (before, busy) = self.writes();
            if !busy {
                tool("cp", &["--sparse=always", image.to_str().unwrap(), copy.to_str().unwrap()]);
                if self.writes() == (before, false) {
                    return;
                }
            }
            assert!(Instant::now() < deadline, "the device is never idle");
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(self.mount.take());
        let _ = tool_command("losetup", &["--detach", &self.device]).status();
    }
}

/// A file system with a namespace, and the operation on it.
struct Scene {
    bench: Bench,
    operation: Operation,
    content: Vec<u8>,
    old: Old,
}

impl Scene {
    fn new(file_system: FileSystem, operation: Operation) -> Self {
        let bench = Bench::under(Path::new("/dev/shm"));
        let content = noise(11, SIZE);
        let mut scene = Self { bench, operation, content, old: Old::default() };
        let image = scene.image("base");
        file_system.make(&image);
        let disk = Disk::attach(&image, &scene.folder());
        let run = |args: &[&str]| assert!(scene.command(args).status().unwrap().success(), "{args:?}");
        let size = SIZE.to_string();
        match operation {
            Operation::Compact => {
                run(&["region", "create", "region.img", "--size", "12M"]);
                for name in ["before", "a"] {
                    let path = format!("region.img#{name}");
                    run(&["format", &path, "--size", &size, "--key-file", "../vault.key"]);
                }
                run(&["remove", "region.img#before", "--yes"]);
            }
            Operation::Adopt => {
                run(&["region", "create", "region.img", "--size", "12M"]);
                run(&["format", "region.img#a", "--size", &size, "--key-file", "../vault.key"]);
            }
            _ => run(&["format", "vault.img", "--size", &size, "--key-file", "../vault.key"]),
        }
        let path = scene.path();
        scene.volume(&path).unwrap().write_at(&scene.content, 0).unwrap();
        scene.old = Old::of(&fs::read(&path).unwrap());
        match operation {
            Operation::Adopt => move_partition(&path),
            Operation::Import => fs::write(scene.bench.path("new.raw"), scene.imported()).unwrap(),
            _ => {}
        }
        assert!(scene.old.len() >= 2, "a slot is sealed twice");
        drop(disk);
        scene
    }

    fn image(&self, name: &str) -> PathBuf {
        self.bench.path(&format!("{name}.disk"))
    }

    fn folder(&self) -> PathBuf {
        self.bench.path("mounted")
    }

    fn path(&self) -> PathBuf {
        self.folder().join(self.operation.file())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.bench.command(args);
        command.current_dir(self.folder()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs the program under strace, with `option` about its syncs.
    fn traced(&self, option: &str, args: &[String]) -> ExitStatus {
        let log = self.bench.path("syncs");
        let trace = format!("trace={SYNCS}");
        let options = ["-f", "-qq", "-o", log.to_str().unwrap(), "-e", &trace, "-e", option, "--"];
        let mut command = tool_command("strace", &options);
        command.arg(env!("CARGO_BIN_EXE_daxcrypt")).args(args).current_dir(self.folder());
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap_or_else(|error| panic!("strace: {error}"))
    }

    /// Starts the operation or goes on with it, and kills it at its sync with this number; whether it ended before.
    fn killed_at(&self, sync: usize) -> bool {
        if self.operation.is_once() && self.is_done() {
            return false;
        }
        let args = self.args();
        let status = self.traced(&format!("inject={SYNCS}:signal=SIGKILL:when={sync}"), &args);
        let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
        assert!(killed || status.success(), "{args:?}: {status}");
        !killed
    }

    /// What somebody types who wants the operation done. A copy that is not whole is not used.
    fn args(&self) -> Vec<String> {
        let size = LARGER.to_string();
        let args: &[&str] = match self.operation {
            Operation::Rekey if self.is_under_way() => &["rekey", "vault.img", "--resume"],
            Operation::Rekey => &["rekey", "vault.img"],
            Operation::Compact => &["region", "compact", "region.img"],
            Operation::Relocate if self.volume(&self.path()).is_some() => {
                let _ = fs::remove_file(self.folder().join("moved.img"));
                &["relocate", "vault.img", "moved.img"]
            }
            Operation::Relocate => return ["erase", "vault.img", "--force", "--yes"].map(str::to_owned).to_vec(),
            Operation::Resize => &["resize", "vault.img", "--size", &size],
            Operation::Adopt if self.is_under_way() => &["rekey", "region.img#a", "--resume"],
            Operation::Adopt => &["relocate", "--in-place", "region.img#a"],
            Operation::Import => &["import", "../new.raw", "vault.img", "--force"],
        };
        [args, &["--key-file", "../vault.key"]].concat().into_iter().map(str::to_owned).collect()
    }

    /// Whether nobody would ask for the operation any more.
    fn is_done(&self) -> bool {
        let is_old = || self.old.found_in(&fs::read(self.path()).unwrap()).is_some();
        match self.operation {
            Operation::Rekey => !is_old() && !self.is_under_way(),
            Operation::Relocate => self.volume(&self.path()).is_none() && !is_old(),
            Operation::Adopt => self.volume(&self.path()).is_some() && !self.is_under_way(),
            Operation::Compact | Operation::Resize | Operation::Import => false,
        }
    }

    fn is_under_way(&self) -> bool {
        self.locked(&self.path(), Access::ReadOnly).is_ok_and(|locked| locked.header().rekeying)
    }

    /// How many syncs the operation makes undisturbed.
    fn syncs(&self) -> usize {
        let image = self.image("disk");
        tool("cp", &["--sparse=always", self.image("base").to_str().unwrap(), image.to_str().unwrap()]);
        let _disk = Disk::attach(&image, &self.folder());
        assert!(self.traced(&format!("trace={SYNCS}"), &self.args()).success());
        let log = fs::read_to_string(self.bench.path("syncs")).unwrap();
        log.lines().filter(|line| line.contains("sync(")).count()
    }

    fn locked(&self, path: &Path, access: Access) -> Result<LockedNamespace, OpenError> {
        let backing = match access {
            Access::ReadOnly => Backing::open(path, access).unwrap(),
            Access::ReadWrite => open_when_free(path),
        };
        let backing = Arc::new(backing);
        match self.operation {
            Operation::Compact | Operation::Adopt => {
                let range = Region::open(Arc::clone(&backing)).unwrap().find("a").unwrap().range;
                LockedNamespace::open_at(backing, range.start, range.end - range.start)
            }
            _ => LockedNamespace::open(backing),
        }
    }

    /// The volume at `path`, if there is one.
    fn volume(&self, path: &Path) -> Option<Volume> {
        let locked = self.locked(path, Access::ReadWrite).ok()?;
        let key = Credential::KeyFile(SecretBytes::copy_of(&fs::read(self.bench.path("vault.key")).unwrap()));
        Some(Volume::new(locked.unlock_key(&key).unwrap(), Backend::detect()))
    }

    fn imported(&self) -> Vec<u8> {
        self.content.iter().map(|byte| !byte).collect()
    }

    /// Checks the content wherever it is by now; `ended`: the operation was brought to its end.
    fn assert_content(&self, when: &str, ended: bool) {
        let volume = match self.operation {
            Operation::Relocate => self.volume(&self.path()).or_else(|| self.volume(&self.folder().join("moved.img"))),
            _ => self.volume(&self.path()),
        };
        let Some(volume) = volume else {
            assert!(self.operation == Operation::Adopt && !ended, "{when}: it does not open");
            return; // not adopted yet
        };
        let mut found = vec![0; SIZE];
        volume.read_at(&mut found, 0).unwrap_or_else(|error| panic!("{when}: {error}"));
        let is_whole = match self.operation {
            Operation::Import if ended => found == self.imported(),
            Operation::Import => {
                let new = self.imported();
                let blocks = found.chunks(512).zip(self.content.chunks(512)).zip(new.chunks(512));
                blocks.into_iter().all(|((found, old), new)| found == old || found == new)
            }
            _ => found == self.content,
        };
        assert!(is_whole, "{when}: the content is garbled");
        let sizes =
            if self.operation == Operation::Resize { [if ended { LARGER } else { SIZE }, LARGER] } else { [SIZE; 2] };
        assert!(sizes.contains(&usize::try_from(volume.size()).unwrap()), "{when}: {} bytes", volume.size());
    }

    fn leftovers(&self) -> Result<(), String> {
        let media = fs::read(self.path()).unwrap();
        match self.operation {
            Operation::Relocate => {
                nothing_old_is_left(&media, &[], &self.old)?;
                nothing_old_is_left(&fs::read(self.folder().join("moved.img")).unwrap(), &[0], &self.old)
            }
            // It is not for new keys.
            Operation::Import => nothing_old_is_left(&media, &[0], &Old::default()),
            operation => nothing_old_is_left(&media, &[operation.end_place()], &self.old),
        }
    }

    /// One kill and one cut; whether the process that was cut had ended before.
    fn kill_and_cut(&self, kill: usize, cut: usize) -> bool {
        let (image, copy) = (self.image("disk"), self.image("cut"));
        tool("cp", &["--sparse=always", self.image("base").to_str().unwrap(), image.to_str().unwrap()]);
        let disk = Disk::attach(&image, &self.folder());
        let ended = self.killed_at(kill) || self.killed_at(cut);
        disk.cut(&image, &copy);
        drop(disk);

        let what = format!("{:?}, killed at sync {kill}, cut at sync {cut} of the next", self.operation);
        let disk = Disk::attach(&copy, &self.folder());
        if ended {
            self.leftovers().unwrap_or_else(|error| panic!("{what}, which had ended: {error}"));
        }
        self.assert_content(&what, ended);
        if !self.is_done() {
            let args = self.args();
            let args: Vec<_> = args.iter().map(String::as_str).collect();
            let said = self.command(&args).stderr(Stdio::piped()).output().unwrap();
            assert!(said.status.success(), "{what}: {args:?}: {}", String::from_utf8_lossy(&said.stderr));
        }
        self.leftovers().unwrap_or_else(|error| panic!("{what}, brought to its end: {error}"));
        self.assert_content(&what, true);
        drop(disk);
        ended
    }
}

/// Moves the partition `a` and what is in it, as somebody does who knows nothing of tweaks; nothing is left at its place.
fn move_partition(region: &Path) {
    let file = fs::File::options().read(true).write(true).open(region).unwrap();
    let mut bytes = vec![0; usize::try_from(PARTITION_BYTES).unwrap()];
    file.read_exact_at(&mut bytes, FIRST_PLACE).unwrap();
    file.write_all_at(&bytes, MOVED_PLACE).unwrap();
    file.write_all_at(&vec![0; bytes.len()], FIRST_PLACE).unwrap();
    let (first, last) = (MOVED_PLACE / 512, (MOVED_PLACE + PARTITION_BYTES) / 512 - 1);
    let (new, kind) = (format!("1:{first}:{last}"), format!("1:{TYPE}"));
    tool("sgdisk", &["-a", "1", "-d", "1", "-n", &new, "-t", &kind, "-c", "1:a", region.to_str().unwrap()]);
}

/// So many of all pairs, evenly, beginning somewhere; and the last, in which nothing is killed any more.
fn chosen(pairs: Vec<(usize, usize)>, in_gate: &str) -> Vec<(usize, usize)> {
    let count = std::env::var("DAXCRYPT_POWER_CUTS").unwrap_or_else(|_| in_gate.to_owned());
    if count == "all" {
        return pairs;
    }
    let count: usize = count.parse().unwrap();
    let seed = std::env::var("DAXCRYPT_SEED").map_or(1, |seed| seed.parse().unwrap());
    let stride = (pairs.len() / count).max(1);
    let first = usize::from(noise(seed, 1)[0]) % stride;
    let last = pairs.last().copied();
    pairs.into_iter().skip(first).step_by(stride).chain(last).collect()
}

/// One scene at a time: a child that another thread has just forked holds our locks until it executes.
static STAGE: Mutex<()> = Mutex::new(());

fn survives(file_system: FileSystem, operation: Operation) {
    let _stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let began = Instant::now();
    let scene = Scene::new(file_system, operation);
    let syncs = scene.syncs();
    assert!(syncs > 4, "{syncs} syncs");
    // After the last sync nothing is killed: what has ended is cut.
    let pairs = (1..=syncs + 1).flat_map(|kill| (1..=syncs + 4 - kill).map(move |cut| (kill, cut)));
    let all: Vec<_> = pairs.collect();
    let (count, mut ended) = (all.len(), 0);
    let in_gate = if matches!(operation, Operation::Rekey | Operation::Compact) { "10" } else { "4" };
    let chosen = chosen(all, in_gate);
    for &(kill, cut) in &chosen {
        ended += usize::from(scene.kill_and_cut(kill, cut));
    }
    assert!(ended > 0 && ended < chosen.len(), "{ended} of {} had ended", chosen.len());
    println!(
        "power cuts, {file_system:?}, {operation:?}: {} of {count} kills and cuts, {ended} of them after its end, at {syncs} \
         syncs, {:.1} s",
        chosen.len(),
        began.elapsed().as_secs_f64()
    );
}

#[test]
fn a_rekey_on_ext4_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Ext4, Operation::Rekey);
}

#[test]
fn a_rekey_on_xfs_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Xfs, Operation::Rekey);
}

#[test]
fn a_slide_on_ext4_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Ext4, Operation::Compact);
}

#[test]
fn a_slide_on_xfs_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Xfs, Operation::Compact);
}

/// Killed where the table begins to lead to the new place: the next process sees that, and a power cut takes it back unless
/// the table is made durable before the former place is wiped.
#[test]
fn a_slide_whose_table_was_killed_survives_a_power_cut_anywhere() {
    let _stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let scene = Scene::new(FileSystem::Ext4, Operation::Compact);
    let place = |scene: &Scene| {
        let backing = Arc::new(Backing::open(&scene.path(), Access::ReadOnly).unwrap());
        Region::open(backing).unwrap().find("a").unwrap().range.start
    };
    let kill = (1..=scene.syncs()).find(|&kill| {
        let image = scene.image("disk");
        tool("cp", &["--sparse=always", scene.image("base").to_str().unwrap(), image.to_str().unwrap()]);
        let _disk = Disk::attach(&image, &scene.folder());
        scene.killed_at(kill);
        place(&scene) == FIRST_PLACE
    });
    let kill = kill.expect("it arrives");
    for cut in 1..=20 {
        scene.kill_and_cut(kill, cut);
    }
}

#[test]
fn a_relocation_on_ext4_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Ext4, Operation::Relocate);
}

#[test]
fn a_relocation_on_xfs_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Xfs, Operation::Relocate);
}

#[test]
fn a_growth_on_ext4_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Ext4, Operation::Resize);
}

#[test]
fn a_growth_on_xfs_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Xfs, Operation::Resize);
}

#[test]
fn an_adoption_on_ext4_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Ext4, Operation::Adopt);
}

#[test]
fn an_adoption_on_xfs_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Xfs, Operation::Adopt);
}

#[test]
fn an_import_on_ext4_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Ext4, Operation::Import);
}

#[test]
fn an_import_on_xfs_survives_a_kill_and_a_power_cut() {
    survives(FileSystem::Xfs, Operation::Import);
}
