//! What the integration tests share: a temporary folder, the program under test, a server process, foreign tools.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use daxcrypt::pmem::{Access, Backing, OpenError};
use rustix::process::{Pid, Signal, kill_process};

pub mod leftovers;
pub mod mount;

/// The cheapest Argon2id that a header may ask for: tests are about everything else.
pub const CHEAP_KDF: [&str; 4] = ["--kdf-memory", "8M", "--kdf-time", "1"];

/// A temporary folder with a key file, and the program run in it.
pub struct Bench {
    pub dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self::under(Path::new("/tmp"))
    }

    pub fn under(parent: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("daxcrypt-test-").tempdir_in(parent).unwrap();
        let key: Vec<u8> = (0..64_u8).map(|i| i.wrapping_mul(37) ^ 0x5a).collect();
        fs::write(dir.path().join("vault.key"), key).unwrap();
        fs::set_permissions(dir.path().join("vault.key"), fs::Permissions::from_mode(0o600)).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `daxcrypt` with `args` in the folder.
    pub fn run(&self, args: &[&str]) -> Run {
        Run::of(self.command(args))
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_daxcrypt"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// `daxcrypt format NAME --size SIZE --key-file vault.key MORE`.
    pub fn format(&self, name: &str, size: &str, more: &[&str]) {
        let mut args = vec!["format", name, "--size", size, "--key-file", "vault.key"];
        args.extend(more);
        self.run(&args).succeeds();
    }

    /// Starts a long command with `--json` among its `args`, and waits until it tells of progress.
    pub fn under_way(&self, args: &[&str]) -> Child {
        let mut child = self.command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("\"progress\"") {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0, "{args:?} ended without a word of progress");
        }
        child.stdout = Some(lines.into_inner());
        child
    }

    /// Writes a file with mode 0600.
    pub fn secret(&self, name: &str, content: &[u8]) {
        fs::write(self.path(name), content).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Runs `args`, which must fail so and leave `vault.img` as it is.
    #[track_caller]
    pub fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        let before = fs::read(self.path("vault.img")).unwrap();
        self.run(args).fails(code, words);
        assert!(fs::read(self.path("vault.img")).unwrap() == before, "{args:?} changed the namespace");
    }

    /// `daxcrypt serve NAME --key-file vault.key --socket NAME.sock MORE`, ready to be connected to.
    pub fn serve(&self, name: &str, more: &[&str]) -> Server {
        let socket = self.path(&format!("{name}.sock"));
        let mut args = vec!["serve", name, "--key-file", "vault.key", "--socket", socket.to_str().unwrap()];
        args.extend(more);
        Server::start(self.command(&args), socket)
    }
}

/// Opens a backing to write, as soon as nobody has it: a child that another thread has just forked holds our descriptors,
/// with their locks, until it executes.
pub fn open_when_free(path: &Path) -> Backing {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Backing::open(path, Access::ReadWrite) {
            Err(OpenError::Busy) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            opened => return opened.unwrap(),
        }
    }
}

/// A finished command.
pub struct Run {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    what: String,
}

impl Run {
    pub fn of(mut command: Command) -> Self {
        let what = format!("{command:?}");
        let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| panic!("{what}: {error}"));
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { status, stdout: text(&stdout), stderr: text(&stderr), what }
    }

    /// As [`Run::of`], with `input` on standard input.
    pub fn with_input(mut command: Command, input: &[u8]) -> Self {
        let (reader, mut writer) = std::io::pipe().unwrap();
        command.stdin(reader);
        writer.write_all(input).unwrap();
        drop(writer);
        Self::of(command)
    }

    #[track_caller]
    pub fn succeeds(self) -> Self {
        assert!(self.status.success(), "{}: {}\n{}\n{}", self.what, self.status, self.stdout, self.stderr);
        self
    }

    /// Asserts the exit code and that the error text contains every one of `words`.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.status.code(), Some(code), "{}: {}\n{}\n{}", self.what, self.status, self.stdout, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "{}: no {word:?} in\n{}", self.what, self.stderr);
        }
        self
    }
}

/// Runs a foreign tool, which must be there and succeed.
#[track_caller]
pub fn tool<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Run {
    Run::of(tool_command(program, args)).succeeds()
}

pub fn tool_command<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(args).env("PATH", format!("{path}:/usr/sbin:/sbin")).stdin(Stdio::null());
    command
}

/// A loop device of `image`, to be detached by the caller. `None`, with a word about it, without root; root has them.
#[track_caller]
pub fn loop_device(image: &Path, more: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: a loop device needs root");
        return None;
    }
    let made = tool("losetup", &[&["--find", "--show"], more, &[image.to_str().unwrap()]].concat());
    Some(made.stdout.trim().to_owned())
}

/// A served namespace; killed when dropped, so that a failing test leaves nothing behind.
pub struct Server {
    pub child: Child,
    pub socket: PathBuf,
}

impl Server {
    pub fn start(mut command: Command, socket: PathBuf) -> Self {
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while UnixStream::connect(&socket).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("{command:?} ended: {status}");
            }
            assert!(Instant::now() < deadline, "{command:?} does not serve");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child, socket }
    }

    /// The NBD URI of export `name`.
    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }

    /// SIGTERM, which must drain and exit 0.
    #[track_caller]
    pub fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "after SIGTERM: {status}");
        assert!(!self.socket.exists(), "the socket is unlinked at exit");
    }

    /// SIGKILL: nothing is flushed by the server.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes that repeat nowhere near and can be made again: splitmix64 of `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend((word ^ (word >> 31)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
