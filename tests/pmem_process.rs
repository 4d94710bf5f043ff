//! What needs a process of its own: the lock between processes, the environment override, and SIGBUS that is not ours.
//!
//! Each test starts this very test binary again with the `child` test and a role in the environment.
#![allow(clippy::unwrap_used, unsafe_code)]

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

use daxcrypt::pmem::{Access, Allocation, Backing, FORCE_GRANULARITY_VARIABLE};

const ROLE: &str = "DAXCRYPT_TEST_ROLE";
const PATH: &str = "DAXCRYPT_TEST_PATH";

/// Until the guard is dropped no other test has a backing open: a child that another thread forks holds our descriptors,
/// with their locks, until it executes, and would make the backing busy for ours.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run_child(role: &str, path: &Path, force_granularity: Option<&str>) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"]).env(ROLE, role).env(PATH, path);
    match force_granularity {
        Some(value) => command.env(FORCE_GRANULARITY_VARIABLE, value),
        None => command.env_remove(FORCE_GRANULARITY_VARIABLE),
    };
    command.output().unwrap()
}

fn said(output: &Output, text: &str) -> bool {
    String::from_utf8_lossy(&output.stdout).contains(text)
}

fn backing_file(dir: &tempfile::TempDir) -> Backing {
    Backing::create(&dir.path().join("backing"), 8192, Allocation::Full).unwrap()
}

#[test]
fn another_process_finds_a_served_backing_busy() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let backing = backing_file(&dir);
    let output = run_child("open", backing.path(), None);
    assert!(said(&output, "it is busy: another process"), "{output:?}");
    let path = backing.path().to_path_buf();
    drop(backing);
    let output = run_child("open", &path, None);
    assert!(said(&output, "opened page: not "), "{output:?}");
}

#[test]
fn the_environment_forces_a_granularity_and_the_reason_says_so() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = backing_file(&dir).path().to_path_buf();
    let output = run_child("open", &path, Some("cacheline"));
    assert!(said(&output, "opened cache line: forced by DAXCRYPT_FORCE_GRANULARITY (detected page: "), "{output:?}");
    let output = run_child("open", &path, Some("page"));
    assert!(said(&output, "opened page: forced by DAXCRYPT_FORCE_GRANULARITY"), "{output:?}");
    let output = run_child("open", &path, Some("sector"));
    assert!(said(&output, "must be `page` or `cacheline`"), "{output:?}");
}

#[test]
fn a_bus_error_elsewhere_still_ends_the_process() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = backing_file(&dir).path().to_path_buf();
    for role in ["sent-signal", "foreign-fault"] {
        let output = run_child(role, &path, None);
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{role}: {output:?}");
    }
}

#[test]
fn a_bus_error_elsewhere_goes_to_the_handler_that_was_there_before() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = backing_file(&dir).path().to_path_buf();
    let output = run_child("foreign-fault-with-handler", &path, None);
    assert_eq!(output.status.code(), Some(42), "{output:?}");
}

#[test]
fn a_sent_signal_that_was_ignored_stays_ignored() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = backing_file(&dir).path().to_path_buf();
    let output = run_child("sent-signal-ignored", &path, None);
    assert!(said(&output, "still here"), "{output:?}");
}

#[test]
#[ignore = "the other end of the tests above, started by them"]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let path = std::env::var_os(PATH).unwrap();
    let path = Path::new(&path);
    match role.as_str() {
        "open" => match Backing::open(path, Access::ReadWrite) {
            Ok(backing) => println!("opened {}", backing.granularity_reason()),
            Err(error) => println!("refused: {error}"),
        },
        "foreign-fault" => fault_outside_any_backing(path),
        "foreign-fault-with-handler" => {
            let handler: extern "C" fn(libc::c_int) = leave_with_42;
            set_action(handler as usize);
            fault_outside_any_backing(path);
        }
        "sent-signal" => send_to_self_after(libc::SIG_DFL, path),
        "sent-signal-ignored" => send_to_self_after(libc::SIG_IGN, path),
        other => panic!("no role {other}"),
    }
}

/// Installs the handler by opening a backing, shows that it works, and then touches a truncated mapping of our own.
fn fault_outside_any_backing(path: &Path) {
    let backing = Backing::open(path, Access::ReadWrite).unwrap();
    File::options().write(true).open(path).unwrap().set_len(4096).unwrap();
    assert!(backing.write(4096..4097, |mut target| target.fill(1)).is_err());
    let other = tempfile::tempfile().unwrap();
    other.set_len(4096).unwrap();
    let mapping = memmap2::MmapOptions::new().map_raw(&other).unwrap();
    other.set_len(0).unwrap();
    // SAFETY: the page is mapped; that its file is gone raises SIGBUS, which is what the test wants.
    let byte = unsafe { mapping.as_ptr().read_volatile() };
    println!("still here with {byte}");
}

fn send_to_self_after(previous: usize, path: &Path) {
    set_action(previous);
    let _backing = Backing::open(path, Access::ReadWrite).unwrap();
    // SAFETY: raising a signal has no memory effects.
    unsafe { libc::raise(libc::SIGBUS) };
    println!("still here");
}

fn set_action(handler: usize) {
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    // SAFETY: the action is valid for the call, and its handler is async-signal-safe.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0);
}

extern "C" fn leave_with_42(_: libc::c_int) {
    // SAFETY: _exit is async-signal-safe.
    unsafe { libc::_exit(42) }
}
