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
//! one (`tools/soak power-cuts`); `DAXCRYPT_SEED` chooses them. Needs root, and what is missing fails.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::leftovers::{Old, nothing_old_is_left};
use common::mount::Mount;
use common::{Bench, loop_device, noise, open_when_free, tool, tool_command};
use daxcrypt::namespace::{Credential, LockedNamespace, Region};
use daxcrypt::pmem::{Access, Backing};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;

const SYNCS: &str = "msync,fsync,fdatasync";
const MIB: u64 = 1 << 20;
/// A little more than two windows of a re-key.
const SIZE: usize = (1 << 20) + (128 << 10);
/// Where a namespace alone in its region begins when it is compact.
const FIRST_PLACE: u64 = 2 * MIB;

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
}

impl Operation {
    const fn file(self) -> &'static str {
        match self {
            Self::Rekey => "vault.img",
            Self::Compact => "region.img",
        }
    }

    /// Where the namespace is when the operation has ended.
    const fn end_place(self) -> u64 {
        match self {
            Self::Rekey => 0,
            Self::Compact => FIRST_PLACE,
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
            Operation::Rekey => run(&["format", "vault.img", "--size", &size, "--key-file", "../vault.key"]),
            Operation::Compact => {
                run(&["region", "create", "region.img", "--size", "12M"]);
                for name in ["before", "a"] {
                    let path = format!("region.img#{name}");
                    run(&["format", &path, "--size", &size, "--key-file", "../vault.key"]);
                }
                run(&["remove", "region.img#before", "--yes"]);
            }
        }
        let path = scene.path();
        scene.volume(&path).write_at(&scene.content, 0).unwrap();
        scene.old = Old::of(&fs::read(&path).unwrap());
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
        let status = self.traced(&format!("inject={SYNCS}:signal=SIGKILL:when={sync}"), &self.args());
        let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
        assert!(killed || status.success(), "{:?}: {status}", self.args());
        !killed
    }

    /// What somebody types who wants the operation done.
    fn args(&self) -> Vec<String> {
        let args: &[&str] = match self.operation {
            Operation::Rekey if self.is_under_way() => {
                &["rekey", "vault.img", "--key-file", "../vault.key", "--resume"]
            }
            Operation::Rekey => &["rekey", "vault.img", "--key-file", "../vault.key"],
            Operation::Compact => &["region", "compact", "region.img", "--key-file", "../vault.key"],
        };
        args.iter().map(|&arg| arg.to_owned()).collect()
    }

    fn is_under_way(&self) -> bool {
        let backing = Backing::open(&self.path(), Access::ReadOnly).unwrap();
        LockedNamespace::open(Arc::new(backing)).unwrap().header().rekeying
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

    fn volume(&self, path: &Path) -> Volume {
        let backing = Arc::new(open_when_free(path));
        let locked = match self.operation {
            Operation::Rekey => LockedNamespace::open(backing),
            Operation::Compact => {
                let range = Region::open(Arc::clone(&backing)).unwrap().find("a").unwrap().range;
                LockedNamespace::open_at(backing, range.start, range.end - range.start)
            }
        };
        let key = Credential::KeyFile(SecretBytes::copy_of(&fs::read(self.bench.path("vault.key")).unwrap()));
        Volume::new(locked.unwrap().unlock_key(&key).unwrap(), Backend::detect())
    }

    fn assert_content(&self, when: &str) {
        let mut found = vec![0; SIZE];
        self.volume(&self.path()).read_at(&mut found, 0).unwrap_or_else(|error| panic!("{when}: {error}"));
        assert!(found == self.content, "{when}: the content is garbled");
    }

    fn leftovers(&self) -> Result<(), String> {
        nothing_old_is_left(&fs::read(self.path()).unwrap(), &[self.operation.end_place()], &self.old)
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
        self.assert_content(&what);
        if ended {
            self.leftovers().unwrap_or_else(|error| panic!("{what}, which had ended: {error}"));
        }
        let is_old = self.old.found_in(&fs::read(self.path()).unwrap()).is_some();
        if is_old || self.operation == Operation::Compact || self.is_under_way() {
            let args = self.args();
            let args: Vec<_> = args.iter().map(String::as_str).collect();
            let said = self.command(&args).stderr(Stdio::piped()).output().unwrap();
            assert!(said.status.success(), "{what}: {args:?}: {}", String::from_utf8_lossy(&said.stderr));
        }
        self.leftovers().unwrap_or_else(|error| panic!("{what}, brought to its end: {error}"));
        self.assert_content(&what);
        drop(disk);
        ended
    }
}

/// So many of all pairs, evenly, beginning somewhere; and the last, in which nothing is killed any more.
fn chosen(pairs: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    let count = std::env::var("DAXCRYPT_POWER_CUTS").unwrap_or_else(|_| "10".to_owned());
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
    assert!(syncs > 8, "{syncs} syncs");
    // After the last sync nothing is killed: what has ended is cut.
    let pairs = (1..=syncs + 1).flat_map(|kill| (1..=syncs + 4 - kill).map(move |cut| (kill, cut)));
    let all: Vec<_> = pairs.collect();
    let (count, mut ended) = (all.len(), 0);
    let chosen = chosen(all);
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
