//! What may not be held while media are waited for: `msync` stopped in the middle by a filter of system calls.
#![allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks, clippy::cast_possible_truncation, unsafe_code)]

mod vault;

use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use daxcrypt::pmem::Granularity;
use vault::{PAGE, Vault};

/// `_IOWR('!', 0, struct seccomp_notif)` and `_IOWR('!', 1, struct seccomp_notif_resp)` of linux/seccomp.h.
const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;
const CONTINUE: u32 = 1;

/// From now on each `msync` of this thread waits for whoever has the descriptor.
fn ask_before_msync() -> OwnedFd {
    let jump = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        jump(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        jump(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_msync as u32, 0, 1),
        jump(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
        jump(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    let fd = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

#[test]
fn nothing_is_held_while_msync_waits() {
    let (vault, volume) = Vault::new(1 << 20);
    drop(volume);
    let volume = vault.reopen(Granularity::Page);
    volume.write_at(&[1; 100], 5 * PAGE + 3).unwrap();
    let (give, listener) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            give.send(ask_before_msync()).unwrap();
            volume.persist(5 * PAGE..6 * PAGE).unwrap();
        });
        let listener = listener.recv().unwrap();
        let mut question: libc::seccomp_notif = unsafe { mem::zeroed() };
        assert_eq!(unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut question) }, 0);
        // The msync has not begun, and the range is free.
        let (done, is_done) = mpsc::channel();
        let volume = &volume;
        scope.spawn(move || {
            volume.write_at(&[2; 9], 5 * PAGE + 1).unwrap(); // partial blocks: exclusive
            volume.read_at(&mut [0; 16], 5 * PAGE).unwrap();
            done.send(()).unwrap();
        });
        let ended = is_done.recv_timeout(Duration::from_secs(60));
        let mut answer: libc::seccomp_notif_resp = unsafe { mem::zeroed() };
        (answer.id, answer.flags) = (question.id, CONTINUE);
        assert_eq!(unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw mut answer) }, 0);
        ended.expect("a range is held across msync");
    });
}
