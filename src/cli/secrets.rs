//! Reading secrets: from files, standard input, the terminal, the kernel's keyring, systemd and the output of a program.
//!
//! What is read goes straight to locked memory and is bounded before it is believed. One newline at the end of a
//! passphrase that comes from a file, a keyring, systemd or a program is not a part of it: editors and `echo` put it there.
//! A key file is taken as it is.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use linux_keyutils::{Key, KeyError, KeyRing, KeyRingIdentifier};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::credentials::Prompt;
use super::error::Error;
use super::output::{ask, harmless, warning};
use super::prompt::Silent;
use crate::namespace::{
    Cipher, KEY_FILE_BYTES_MAX, KEY_FILE_BYTES_MIN, KEY_SPEC_BYTES_MAX, PASSPHRASE_BYTES_MAX, volume_key_from_spec,
};
use crate::secret::{SecretBytes, VolumeKey};

/// Where systemd puts the credentials of a service (systemd.exec(5), `LoadCredential=`).
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

/// Bytes of the largest volume key.
const VOLUME_KEY_BYTES_MAX: usize = 64;

/// Where the kernel lists the keys that this process may see (proc_keys(5)); not every kernel does.
const KEY_LIST: &str = "/proc/keys";

/// What a key file is called that opens what is there, and one that what is made will open with.
pub(super) const KEY_FILE: &str = "key file";
pub(super) const NEW_KEY_FILE: &str = "new key file";

/// The bytes of a key file of at least `min_bytes` bytes; `what` is what it is called.
pub(super) fn key_file(what: &'static str, path: &Path, min_bytes: usize) -> Result<SecretBytes, Error> {
    let key = file(what, path, KEY_FILE_BYTES_MAX)?;
    let len_bytes = key.len();
    if (min_bytes..=KEY_FILE_BYTES_MAX).contains(&len_bytes) {
        return Ok(key);
    }
    Err(Error::KeyFileLength { what, path: path.into(), len_bytes, min_bytes, max_bytes: KEY_FILE_BYTES_MAX })
}

/// The fewest bytes that make a key file.
pub(super) const fn key_file_bytes_min() -> usize {
    KEY_FILE_BYTES_MIN
}

/// The bytes of a secret file, at most one more than `limit_bytes` of them.
pub(super) fn file(what: &'static str, path: &Path, limit_bytes: usize) -> Result<SecretBytes, Error> {
    let failed = |source| Error::SecretFile { what, path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    warn_if_others_can_read(&file, path);
    read_at_most(file, limit_bytes).map_err(failed)
}

/// The volume key that `key dump` wrote to the file at `path`.
pub(super) fn escrow_file(path: &Path) -> Result<VolumeKey, Error> {
    let bytes = file("escrow file", path, VOLUME_KEY_BYTES_MAX)?;
    VolumeKey::new(bytes).map_err(|source| Error::EscrowFile { path: path.into(), source })
}

/// The cipher and the volume key that the option string in the file at `path` describes.
pub(super) fn key_spec(path: &Path) -> Result<(Cipher, VolumeKey), Error> {
    let spec = file("key specification", path, KEY_SPEC_BYTES_MAX)?;
    volume_key_from_spec(&spec).map_err(|source| Error::KeySpec { path: path.into(), source })
}

/// The passphrase in the file at `path`, where `-` is standard input.
pub(super) fn passphrase_file(path: &Path) -> Result<SecretBytes, Error> {
    let failed = |source| Error::SecretFile { what: "passphrase file", path: path.into(), source };
    let passphrase = if path == Path::new("-") {
        // Not through the standard library's buffer, which would keep a copy.
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
        read_at_most(File::from(stdin), PASSPHRASE_BYTES_MAX).map_err(failed)?
    } else {
        file("passphrase file", path, PASSPHRASE_BYTES_MAX)?
    };
    within_limit(passphrase).map_err(failed)
}

/// The passphrase that systemd keeps under `name` for this service.
pub(super) fn credential(name: &str) -> Result<SecretBytes, Error> {
    let Some(folder) = std::env::var_os(CREDENTIALS_VARIABLE) else {
        return Err(Error::NoCredentials { name: name.into() });
    };
    let is_name = matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
    if !is_name {
        return Err(Error::Usage(format!("--credential {name}: the name of a credential has no folder in it")));
    }
    let path = PathBuf::from(folder).join(name);
    let failed = |source| Error::SecretFile { what: "credential", path: path.clone(), source };
    let file = File::open(&path).map_err(failed)?;
    within_limit(read_at_most(file, PASSPHRASE_BYTES_MAX).map_err(failed)?).map_err(failed)
}

/// The passphrase in the key that `text` names as TYPE:DESCRIPTION.
pub(super) fn keyring(text: &str) -> Result<SecretBytes, Error> {
    let description = match text.split_once(':') {
        Some(("user", description)) if !description.is_empty() => description,
        Some(("logon", _)) => return Err(Error::LogonKey { description: text.into() }),
        _ => return Err(Error::Usage(format!("--keyring {text}: say which key, such as user:vault"))),
    };
    let failed = |source| Error::Keyring { description: text.into(), source };
    let key = find_key(description).map_err(|error| match error {
        KeyError::KeyDoesNotExist if logon_key_exists(description) => {
            Error::LogonKey { description: format!("logon:{description}") }
        }
        error => failed(error),
    })?;
    let mut passphrase = SecretBytes::zeroed(PASSPHRASE_BYTES_MAX);
    let len_bytes = key.read(&mut SecretBuffer(&mut passphrase)).map_err(failed)?;
    passphrase.truncate(len_bytes);
    without_newline(&mut passphrase);
    Ok(passphrase)
}

/// The keyrings that a login or a service has, nearest first.
fn keyrings() -> impl Iterator<Item = KeyRing> {
    let rings = [KeyRingIdentifier::Session, KeyRingIdentifier::User, KeyRingIdentifier::UserSession];
    rings.into_iter().filter_map(|ring| KeyRing::from_special_id(ring, false).ok())
}

/// The nearest `user` key with that description, or why the last keyring has none.
fn find_key(description: &str) -> Result<Key, KeyError> {
    let mut found = Err(KeyError::KeyDoesNotExist);
    for ring in keyrings() {
        found = ring.search(description);
        if !matches!(found, Err(KeyError::KeyDoesNotExist)) {
            break;
        }
    }
    found
}

/// Whether the kernel's list has a `logon` key of that description.
fn logon_key_exists(description: &str) -> bool {
    const TYPE_COLUMN: usize = 7;
    let list = std::fs::read_to_string(KEY_LIST).unwrap_or_default();
    list.lines().any(|line| {
        let mut columns = line.split_whitespace().skip(TYPE_COLUMN);
        let is_logon = columns.next() == Some("logon");
        let shown = columns.next().and_then(|shown| shown.strip_suffix(':'));
        is_logon && shown == Some(description)
    })
}

/// Secret memory for a reader that wants `AsMut`.
struct SecretBuffer<'a>(&'a mut SecretBytes);

impl AsMut<[u8]> for SecretBuffer<'_> {
    fn as_mut(&mut self) -> &mut [u8] {
        self.0
    }
}

/// How long a program may take to print a passphrase: it may ask somebody.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// The passphrase that a program prints. It is run without a shell, with our standard input and standard error, so that it
/// may ask.
pub(super) fn command(line: &str) -> Result<SecretBytes, Error> {
    command_within(line, COMMAND_LIMIT)
}

fn command_within(line: &str, limit: Duration) -> Result<SecretBytes, Error> {
    let words = shlex::split(line).filter(|words| !words.is_empty());
    let Some(words) = words else {
        return Err(Error::Usage("--passphrase-command: no command, or a quote that is not closed".into()));
    };
    let program = words[0].clone();
    let failed = |source| Error::PassphraseCommand { program: program.clone(), source };
    let deadline = Deadline::after(limit);
    let mut child = Command::new(&program).args(&words[1..]).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let output = child.stdout.take().expect("the child's standard output is a pipe");
    let printed = read_at_most(Timely { from: output, deadline }, PASSPHRASE_BYTES_MAX).and_then(within_limit);
    // Who has printed may still have to end, and who has closed its output may still run.
    let printed = printed.and_then(|passphrase| deadline.wait_for_end(&child).map(|()| passphrase));
    if printed.is_err() {
        let _ = child.kill(); // it may be waiting for a reader
    }
    let status = child.wait().map_err(failed)?;
    let passphrase = printed.map_err(failed)?;
    if !status.success() {
        return Err(failed(io::Error::other(format!("it ended with {status}"))));
    }
    if passphrase.is_empty() {
        return Err(failed(io::Error::other("it printed nothing")));
    }
    Ok(passphrase)
}

/// When a program must have ended.
#[derive(Clone, Copy)]
struct Deadline {
    limit: Duration,
    at: Instant,
}

impl Deadline {
    fn after(limit: Duration) -> Self {
        Self { limit, at: Instant::now() + limit }
    }

    /// Waits until something can be read from `descriptor`.
    fn wait_for(&self, descriptor: &impl AsFd) -> io::Result<()> {
        loop {
            let left = self.at.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            match poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => {
                    let limit = self.limit.as_secs_f32();
                    return Err(io::Error::other(format!("it did not end within {limit} seconds and was killed")));
                }
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait_for_end(&self, child: &Child) -> io::Result<()> {
        match pidfd_open(Pid::from_child(child), PidfdFlags::empty()) {
            Ok(ended) => self.wait_for(&ended),
            Err(Errno::NOSYS) => Ok(()), // before Linux 5.3
            Err(error) => Err(error.into()),
        }
    }
}

/// Reads until the deadline only.
struct Timely {
    from: ChildStdout,
    deadline: Deadline,
}

impl Read for Timely {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.deadline.wait_for(&self.from)?;
        self.from.read(buffer)
    }
}

/// Asks at the terminal.
pub(super) fn terminal(prompt: Prompt, what: &str) -> Result<SecretBytes, Error> {
    if !io::stdin().is_terminal() {
        return Err(Error::Prompt(io::Error::other("standard input is not a terminal")));
    }
    let mut terminal = Silent::new().map_err(Error::Prompt)?;
    let first = terminal.ask(&harmless(&format!("Passphrase for {what}: "))).map_err(Error::Prompt)?;
    if prompt == Prompt::Twice {
        let second = terminal.ask("The same again: ").map_err(Error::Prompt)?;
        if *first != *second {
            return Err(Error::PassphrasesDiffer);
        }
    }
    Ok(first)
}

/// Asks for a line that is no secret.
pub(super) fn ask_line(question: &str) -> Result<String, Error> {
    ask(format_args!("{question}"));
    let mut typed = String::new();
    io::stdin().read_line(&mut typed).map_err(|source| Error::Io { doing: "cannot read the confirmation", source })?;
    typed.truncate(typed.trim_end_matches('\n').len());
    Ok(typed)
}

fn within_limit(mut passphrase: SecretBytes) -> io::Result<SecretBytes> {
    if passphrase.len() > PASSPHRASE_BYTES_MAX {
        return Err(io::Error::other("it is longer than 64 KiB, which no passphrase is"));
    }
    without_newline(&mut passphrase);
    Ok(passphrase)
}

fn without_newline(passphrase: &mut SecretBytes) {
    if passphrase.last() == Some(&b'\n') {
        passphrase.truncate(passphrase.len() - 1);
    }
}

/// Reads up to one byte more than `limit_bytes`, so that the caller sees what is too long.
fn read_at_most(mut from: impl Read, limit_bytes: usize) -> io::Result<SecretBytes> {
    let mut secret = SecretBytes::zeroed(4096.min(limit_bytes + 1));
    let mut filled = 0;
    loop {
        if filled == secret.len() {
            if filled > limit_bytes {
                break;
            }
            let mut larger = SecretBytes::zeroed((2 * filled).min(limit_bytes + 1));
            larger[..filled].copy_from_slice(&secret);
            secret = larger;
        }
        match from.read(&mut secret[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    secret.truncate(filled);
    Ok(secret)
}

fn warn_if_others_can_read(file: &File, path: &Path) {
    let Ok(metadata) = file.metadata() else { return };
    let mode = metadata.permissions().mode();
    if metadata.is_file() && mode & 0o077 != 0 {
        warning!(
            "{} can be read by others (mode {:03o}, owner {}): chmod 600 it",
            path.display(),
            mode & 0o777,
            metadata.uid()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_with(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn a_passphrase_file_loses_one_newline_only() {
        for (content, passphrase) in [
            (&b"secret"[..], &b"secret"[..]),
            (b"secret\n", b"secret"),
            (b"secret\n\n", b"secret\n"),
            (b"a\nb", b"a\nb"),
        ] {
            assert_eq!(&*passphrase_file(file_with(content).path()).unwrap(), passphrase);
        }
    }

    #[test]
    fn a_passphrase_file_that_is_too_long_is_refused() {
        let limit = PASSPHRASE_BYTES_MAX;
        assert!(passphrase_file(file_with(&vec![b'x'; limit]).path()).is_ok());
        let error = passphrase_file(file_with(&vec![b'x'; limit + 1]).path()).unwrap_err();
        assert!(matches!(error, Error::SecretFile { .. }), "{error}");
    }

    #[test]
    fn key_files_keep_every_byte_and_have_bounds() {
        let read = |bytes: &[u8]| key_file(KEY_FILE, file_with(bytes).path(), KEY_FILE_BYTES_MIN);
        let mut bytes = vec![7; 63];
        bytes.push(b'\n');
        assert_eq!(*read(&bytes).unwrap(), bytes[..]);
        let shortest = KEY_FILE_BYTES_MIN;
        assert!(read(&vec![1; shortest]).is_ok());
        let error = read(&vec![1; shortest - 1]).unwrap_err();
        assert!(matches!(error, Error::KeyFileLength { len_bytes: 31, .. }), "{error}");
        let longest = KEY_FILE_BYTES_MAX;
        let error = read(&vec![1; longest + 1]).unwrap_err();
        assert!(matches!(error, Error::KeyFileLength { .. }), "{error}");
    }

    #[test]
    fn a_missing_key_file_says_how_to_make_one() {
        let error = key_file(NEW_KEY_FILE, Path::new("/nonexistent.key"), KEY_FILE_BYTES_MIN).unwrap_err();
        assert!(error.chain().contains("/nonexistent.key"), "{}", error.chain());
        assert!(error.hint().unwrap().contains("head -c 64 /dev/urandom"));
    }

    #[test]
    fn a_command_is_split_like_a_shell_but_not_run_by_one() {
        assert_eq!(&*command("printf '%s' 'two words; $HOME'").unwrap(), b"two words; $HOME");
        for (line, words) in [
            ("", "no command"),
            ("echo 'open", "quote"),
            ("/nonexistent/program", "/nonexistent/program"),
            ("false", "exit status: 1"),
            ("true", "printed nothing"),
            ("yes", "longer than 64 KiB"),
        ] {
            let error = command(line).unwrap_err();
            assert!(error.chain().contains(words), "{line}: {}", error.chain());
        }
    }

    #[test]
    fn a_command_that_does_not_end_is_killed() {
        // One says nothing, one has said it and closed its output, and one leaves its output to a child of its own.
        for line in ["sleep 1000", "sh -c 'echo secret; exec >&-; exec sleep 1000'", "sh -c 'exec 2>&-; sleep 5; true'"]
        {
            let limit = Duration::from_millis(50);
            let begun = Instant::now();
            let error = command_within(line, limit).unwrap_err();
            assert!(error.chain().contains("did not end within 0.05 seconds"), "{line}: {}", error.chain());
            assert!(begun.elapsed() >= limit, "it was given its time");
        }
    }
}
