//! What a server gives up before it answers the first client: whoever takes it over can use what it serves, and no more.
//!
//! - seccomp: no other program, no new process, no connection to anywhere, no listening, no tracing, no mounts, no modules, no
//!   executable memory;
//! - Landlock: no file but the namespaces, what a reload reads, and the folders that were named for more namespaces;
//! - capabilities: none but those for locked memory, large socket buffers and files of other users;
//! - no new privileges.
//!
//! Guards: everything is given up by the thread that starts all others, before it does; what a kernel does not know is said and
//! left out, since a server that serves is worth more than none. What was opened before stays open: descriptors are not asked again.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

use super::Plan;
use crate::cli::error::chain;
use crate::cli::output::warning;

/// The newest rights of Landlock that are known here; an older kernel has fewer.
const KNOWN: ABI = ABI::V5;

/// What may be opened.
#[derive(Debug, Default)]
pub(super) struct Opens {
    /// Files and folders to read and write.
    pub(super) writable: Vec<PathBuf>,
    /// Files and folders to read.
    pub(super) readable: Vec<PathBuf>,
    /// Folders in which sockets are removed at the end.
    pub(super) sockets: Vec<PathBuf>,
}

/// Why the sandbox, or a part of it, is not there.
#[derive(Debug, thiserror::Error)]
enum SandboxError {
    #[error("seccomp")]
    Seccomp(#[from] seccompiler::Error),
    #[error("seccomp")]
    Backend(#[from] seccompiler::BackendError),
    #[error("Landlock")]
    Landlock(#[from] landlock::RulesetError),
    #[error("this kernel has no Landlock")]
    NoLandlock,
    #[error("capabilities")]
    Capabilities(#[source] io::Error),
    #[error("seccomp is not known for this processor")]
    Processor,
}

impl Opens {
    /// What a server of this plan opens later: its namespaces (a partition that is resized), what a reload reads, what the
    /// kernel tells of devices and of this process, and the folders of namespaces that may be added.
    pub(super) fn of(plan: &Plan, config: Option<&Path>, folders: &[PathBuf]) -> Self {
        let mut opens = Self::default();
        for source in &plan.namespaces {
            let path = source.path.to_string_lossy();
            let region = path.rsplit_once('#').map(|(region, _)| PathBuf::from(region));
            opens.writable.extend(region.into_iter().chain([source.path.clone()]).chain(source.header.clone()));
        }
        opens.writable.extend(folders.iter().cloned());
        // A file that is replaced is another one: its folder stays.
        let folder = |path: &Path| match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        opens.readable.extend(config.map(folder));
        if let Some(certificates) = &plan.tls.certificates {
            let files = fs::read_dir(certificates).into_iter().flatten().flatten();
            let real = files.filter_map(|file| fs::canonicalize(file.path()).ok());
            opens.readable.extend(real.map(|path| folder(&path)));
            opens.readable.push(certificates.clone());
        }
        opens.readable.extend(["/proc/self", "/sys", "/etc/passwd", "/etc/group"].map(PathBuf::from));
        let sockets = plan.addresses.iter().filter_map(|address| address.socket_path());
        opens.sockets.extend(sockets.chain(plan.control.as_deref()).map(folder));
        opens
    }
}

/// Gives everything up, and says what could not be.
pub(super) fn enter(opens: &Opens) {
    for given_up in [drop_capabilities(), restrict_files(opens), restrict_calls()] {
        if let Err(error) = given_up {
            warning!("a part of the sandbox is missing: {}", chain(&error));
        }
    }
}

/// Keeps what is for memory that is locked, for socket buffers of the size that was asked for, and for files of other users;
/// which files those are says Landlock.
fn drop_capabilities() -> Result<(), SandboxError> {
    let failed = |errno: rustix::io::Errno| SandboxError::Capabilities(errno.into());
    let now = capabilities(None).map_err(failed)?;
    let kept = now.permitted & (CapabilitySet::IPC_LOCK | CapabilitySet::NET_ADMIN | CapabilitySet::DAC_OVERRIDE);
    let fewer = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, fewer).map_err(failed)
}

/// Sets no_new_privs as well.
fn restrict_files(opens: &Opens) -> Result<(), SandboxError> {
    let (read, write) =
        (AccessFs::from_read(KNOWN) & !AccessFs::Execute, AccessFs::from_all(KNOWN) & !AccessFs::Execute);
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let mut ruleset = ruleset.handle_access(AccessFs::from_all(KNOWN))?.create()?;
    let removes = BitFlags::from(AccessFs::RemoveFile);
    let paths = |paths: &[PathBuf], access| paths.iter().map(move |path| (path.clone(), access)).collect::<Vec<_>>();
    let rules = [paths(&opens.writable, write), paths(&opens.readable, read), paths(&opens.sockets, removes)].concat();
    for (path, access) in rules {
        // What is not there cannot be opened anyway.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        let Ok(beneath) = PathFd::new(&path) else { continue };
        let access = if metadata.is_dir() { access } else { access & AccessFs::from_file(KNOWN) };
        ruleset = ruleset.add_rule(PathBeneath::new(beneath, access))?;
    }
    match ruleset.restrict_self()?.ruleset {
        RulesetStatus::NotEnforced => Err(SandboxError::NoLandlock),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

fn restrict_calls() -> Result<(), SandboxError> {
    let arch = std::env::consts::ARCH.try_into().map_err(|_| SandboxError::Processor)?;
    let install = |rules: BTreeMap<i64, Vec<SeccompRule>>, errno: i32| -> Result<(), SandboxError> {
        let refuse = SeccompAction::Errno(errno.unsigned_abs());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch)?;
        let program: BpfProgram = filter.try_into()?;
        Ok(apply_filter_all_threads(&program)?)
    };
    // Its flags are in memory, where a filter cannot look: the C library then takes clone, whose flags are an argument.
    install(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let mask = |argument: u8, mask: i32, value: i32| -> Result<Vec<SeccompRule>, SandboxError> {
        let (mask, value) = (u64::from(mask.unsigned_abs()), u64::from(value.unsigned_abs()));
        let bits = SeccompCmpOp::MaskedEq(mask);
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, bits, value)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    };
    rules.insert(libc::SYS_clone, mask(0, libc::CLONE_THREAD, 0)?);
    for call in [libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_pkey_mprotect] {
        rules.insert(call, mask(2, libc::PROT_EXEC, libc::PROT_EXEC)?);
    }
    // systemd is told by a datagram to a local socket; no other is made.
    let local = u64::from(libc::AF_UNIX.unsigned_abs());
    let others = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, local)?;
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(vec![others])?]);
    install(rules, libc::EPERM)
}

/// What no server needs when it serves.
const REFUSED: &[i64] = &[
    // Programs, processes, and other processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_kcmp,
    // Ways out.
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_socketpair,
    // Files that no path leads to, and system calls that no filter sees.
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    // The machine.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    // Who it is.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capset,
];

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::Command;
    use std::thread;

    use super::*;

    const ROLE: &str = "DAXCRYPT_TEST_SANDBOX";

    /// What is given up is given up for good, so a child of the test does it: this test again, with a folder named.
    #[test]
    fn what_a_server_does_not_need_is_refused_from_inside() {
        const NAME: &str = "cli::serve::sandbox::tests::what_a_server_does_not_need_is_refused_from_inside";
        if let Some(folder) = std::env::var_os(ROLE) {
            return inside(Path::new(&folder));
        }
        let folder = tempfile::tempdir().unwrap();
        for name in ["open", "closed"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        let args = ["--exact", NAME, "--nocapture", "--test-threads=1"];
        let said = child.args(args).env(ROLE, folder.path()).output().unwrap();
        let text = String::from_utf8_lossy(&said.stdout);
        assert!(
            said.status.success() && text.contains("all is refused"),
            "{text}\n{}",
            String::from_utf8_lossy(&said.stderr)
        );
    }

    fn inside(folder: &Path) {
        let (open, closed) = (folder.join("open"), folder.join("closed"));
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let (tcp_address, local) = (tcp.local_addr().unwrap(), folder.join("socket"));
        let _local = UnixListener::bind(&local).unwrap();
        let before = File::open(&closed).unwrap();
        enter(&Opens { writable: vec![open.clone()], ..Opens::default() });
        let refused = |result: io::Result<()>| {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        };
        // What is served can be used, and what was open stays so.
        assert_eq!(fs::read(&open).unwrap(), b"open");
        File::options().write(true).open(&open).unwrap().set_len(1).unwrap();
        assert_eq!(io::read_to_string(&before).unwrap(), "closed");
        assert_eq!(thread::spawn(|| 7).join().unwrap(), 7);
        let in_a_thread = thread::spawn({
            let closed = closed.clone();
            move || File::open(closed).map(drop)
        });
        refused(in_a_thread.join().unwrap());
        refused(File::open(&closed).map(drop));
        refused(File::open("/etc/hostname").map(drop));
        refused(fs::write(folder.join("new"), "x"));
        refused(fs::remove_file(&closed));
        refused(fs::remove_file(&open));
        refused(Command::new("/bin/true").status().map(drop));
        refused(TcpStream::connect(tcp_address).map(drop));
        refused(TcpListener::bind("127.0.0.1:0").map(drop));
        refused(UnixStream::connect(&local).map(drop));
        refused(
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::CONT).map_err(Into::into),
        );
        let status = fs::read_to_string(format!("/proc/{}/status", std::process::id()));
        refused(status.map(drop));
        assert!(capabilities(None).unwrap().effective.bits().count_ones() <= 3);
        println!("all is refused");
    }
}
