//! Where a key comes from: a key file, a passphrase file, or the terminal.
//!
//! No secret is ever an argument: arguments show in `ps`. What is read goes straight to locked memory.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clap::Args;
use zeroize::Zeroize;

use super::error::Error;
use super::size::ByteSize;
use crate::namespace::{Credential, KEY_FILE_BYTES_MAX, KEY_FILE_BYTES_MIN, KdfCost, PASSPHRASE_BYTES_MAX};
use crate::secret::SecretBytes;

/// The options that say where the key comes from; without one, the terminal is asked.
#[derive(Args, Clone, Debug, Default)]
#[group(multiple = false)]
pub(crate) struct KeyArgs {
    /// File whose exact bytes are the key (32 bytes at least, random)
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// File that holds the passphrase (one newline at its end is not part of it; "-" is standard input)
    #[arg(long, value_name = "FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
}

/// The options that say where a key for a key slot comes from; without one, the terminal is asked twice.
#[derive(Args, Debug)]
#[group(multiple = false)]
pub(crate) struct NewKeyArgs {
    /// File whose exact bytes are the new key (32 bytes at least, random)
    #[arg(long, value_name = "FILE")]
    new_key_file: Option<PathBuf>,
    /// File that holds the new passphrase (one newline at its end is not part of it; "-" is standard input)
    #[arg(long, value_name = "FILE")]
    new_passphrase_file: Option<PathBuf>,
}

impl NewKeyArgs {
    /// Standard input can hold one passphrase only.
    pub(crate) fn check_stdin(&self, present: &KeyArgs) -> Result<(), Error> {
        let is_stdin = |path: &Option<PathBuf>| path.as_deref() == Some(Path::new("-"));
        if is_stdin(&self.new_passphrase_file) && is_stdin(&present.passphrase_file) {
            return Err(Error::Usage("only one passphrase can come from standard input".into()));
        }
        Ok(())
    }

    /// Reads the new key of the namespace at `path`.
    pub(crate) fn read(&self, path: &Path) -> Result<Credential, Error> {
        let new = KeyArgs { key_file: self.new_key_file.clone(), passphrase_file: self.new_passphrase_file.clone() };
        new.read(Prompt::Twice, &format!("the key slot of {}, new", path.display()))
    }
}

/// What guessing a new passphrase is to cost.
#[derive(Args, Debug)]
pub(crate) struct KdfArgs {
    /// Memory that Argon2id needs for a passphrase
    #[arg(long, value_name = "SIZE")]
    kdf_memory: Option<ByteSize>,
    /// Passes of Argon2id over that memory
    #[arg(long, value_name = "PASSES")]
    kdf_time: Option<u32>,
}

impl KdfArgs {
    pub(crate) fn cost(&self) -> Result<KdfCost, Error> {
        let mut cost = KdfCost::default();
        if let Some(ByteSize(bytes)) = self.kdf_memory {
            cost.memory_kib = u32::try_from(bytes >> 10)
                .map_err(|_| Error::Usage(format!("--kdf-memory {} is too much", ByteSize(bytes))))?;
        }
        if let Some(passes) = self.kdf_time {
            cost.time = passes;
        }
        Ok(cost)
    }
}

/// Whether a passphrase typed at the terminal is asked for once or twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    Once,
    Twice,
}

impl KeyArgs {
    /// Reads the key; `what` names the namespace in the prompt.
    pub(crate) fn read(&self, prompt: Prompt, what: &str) -> Result<Credential, Error> {
        if let Some(path) = &self.key_file {
            return read_key_file(path).map(Credential::KeyFile);
        }
        let passphrase = match &self.passphrase_file {
            Some(path) => read_passphrase_file(path)?,
            None => ask(prompt, what)?,
        };
        if passphrase.is_empty() {
            return Err(Error::EmptyPassphrase);
        }
        Ok(Credential::Passphrase(passphrase))
    }
}

fn read_key_file(path: &Path) -> Result<SecretBytes, Error> {
    let failed = |source| Error::SecretFile { what: "key file", path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    warn_if_others_can_read(&file, path);
    let key = read_at_most(file, KEY_FILE_BYTES_MAX).map_err(failed)?;
    let len_bytes = key.len();
    if (KEY_FILE_BYTES_MIN..=KEY_FILE_BYTES_MAX).contains(&len_bytes) {
        return Ok(key);
    }
    Err(Error::KeyFileLength {
        path: path.into(),
        len_bytes,
        min_bytes: KEY_FILE_BYTES_MIN,
        max_bytes: KEY_FILE_BYTES_MAX,
    })
}

fn read_passphrase_file(path: &Path) -> Result<SecretBytes, Error> {
    let failed = |source| Error::SecretFile { what: "passphrase file", path: path.into(), source };
    let mut passphrase = if path == Path::new("-") {
        // Not through the standard library's buffer, which would keep a copy.
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
        read_at_most(File::from(stdin), PASSPHRASE_BYTES_MAX).map_err(failed)?
    } else {
        let file = File::open(path).map_err(failed)?;
        warn_if_others_can_read(&file, path);
        read_at_most(file, PASSPHRASE_BYTES_MAX).map_err(failed)?
    };
    if passphrase.len() > PASSPHRASE_BYTES_MAX {
        return Err(failed(io::Error::other("it is longer than 64 KiB, which no passphrase is")));
    }
    if passphrase.last() == Some(&b'\n') {
        passphrase.truncate(passphrase.len() - 1);
    }
    Ok(passphrase)
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
        eprintln!(
            "daxcrypt: warning: {} can be read by others (mode {:03o}, owner {}): chmod 600 it",
            path.display(),
            mode & 0o777,
            metadata.uid()
        );
    }
}

fn ask(prompt: Prompt, what: &str) -> Result<SecretBytes, Error> {
    if !io::stdin().is_terminal() {
        return Err(Error::Prompt(io::Error::other("standard input is not a terminal")));
    }
    let first = ask_once(&format!("Passphrase for {what}: "))?;
    if prompt == Prompt::Twice {
        let second = ask_once("The same again: ")?;
        if *first != *second {
            return Err(Error::PassphrasesDiffer);
        }
    }
    Ok(first)
}

fn ask_once(text: &str) -> Result<SecretBytes, Error> {
    let mut typed = rpassword::prompt_password(text).map_err(Error::Prompt)?;
    let secret = SecretBytes::copy_of(typed.as_bytes());
    typed.zeroize();
    Ok(secret)
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
            assert_eq!(&*read_passphrase_file(file_with(content).path()).unwrap(), passphrase);
        }
    }

    #[test]
    fn a_passphrase_file_that_is_too_long_is_refused() {
        let limit = PASSPHRASE_BYTES_MAX;
        assert!(read_passphrase_file(file_with(&vec![b'x'; limit]).path()).is_ok());
        let error = read_passphrase_file(file_with(&vec![b'x'; limit + 1]).path()).unwrap_err();
        assert!(matches!(error, Error::SecretFile { .. }), "{error}");
    }

    #[test]
    fn an_empty_passphrase_is_refused() {
        let file = file_with(b"\n");
        let args = KeyArgs { key_file: None, passphrase_file: Some(file.path().into()) };
        assert!(matches!(args.read(Prompt::Once, "x"), Err(Error::EmptyPassphrase)));
    }

    #[test]
    fn key_files_keep_every_byte_and_have_bounds() {
        let mut bytes = vec![7; 63];
        bytes.push(b'\n');
        assert_eq!(*read_key_file(file_with(&bytes).path()).unwrap(), bytes[..]);
        let shortest = KEY_FILE_BYTES_MIN;
        assert!(read_key_file(file_with(&vec![1; shortest]).path()).is_ok());
        let error = read_key_file(file_with(&vec![1; shortest - 1]).path()).unwrap_err();
        assert!(matches!(error, Error::KeyFileLength { len_bytes: 31, .. }), "{error}");
        let longest = KEY_FILE_BYTES_MAX;
        let error = read_key_file(file_with(&vec![1; longest + 1]).path()).unwrap_err();
        assert!(matches!(error, Error::KeyFileLength { .. }), "{error}");
    }

    #[test]
    fn a_missing_key_file_says_how_to_make_one() {
        let error = read_key_file(Path::new("/nonexistent/vault.key")).unwrap_err();
        assert!(error.chain().contains("/nonexistent/vault.key"), "{}", error.chain());
        assert!(error.hint().unwrap().contains("head -c 64 /dev/urandom"));
    }
}
