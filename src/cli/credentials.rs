//! Where a key comes from: the options of every command that needs one.
//!
//! No secret is ever an argument: arguments show in `ps`. How the sources are read is the business of `secrets`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::error::Error;
use super::output::warning;
use super::secrets;
use super::size::ByteSize;
use crate::namespace::{Credential, KdfCost};

/// The options that say where the key comes from; without one, the terminal is asked.
#[derive(Args, Clone, Debug, Default)]
#[group(multiple = false)]
pub(crate) struct KeyArgs {
    /// File whose exact bytes are the key (32 bytes at least, random)
    #[arg(long, value_name = "FILE", help_heading = "Key")]
    pub(crate) key_file: Option<PathBuf>,
    /// File that holds the passphrase (one newline at its end is not part of it; "-" is standard input)
    #[arg(long, value_name = "FILE", help_heading = "Key")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// Passphrase in the kernel's keyring (keyctl(1)), such as user:vault
    #[arg(long, value_name = "user:DESCRIPTION", help_heading = "Key")]
    pub(crate) keyring: Option<String>,
    /// Passphrase from systemd: the credential NAME in $CREDENTIALS_DIRECTORY (LoadCredential=, systemd-creds(1))
    #[arg(long, value_name = "NAME", help_heading = "Key")]
    pub(crate) credential: Option<String>,
    /// Program that prints the passphrase, with its arguments; quotes work as in a shell, but none is run
    #[arg(long, value_name = "COMMAND", help_heading = "Key")]
    pub(crate) passphrase_command: Option<String>,
    /// File that `key dump` wrote: the volume key itself
    #[arg(long, value_name = "FILE", help_heading = "Key")]
    pub(crate) escrow_file: Option<PathBuf>,
}

/// The options that say where a key for a key slot comes from; without one, the terminal is asked twice.
#[derive(Args, Debug)]
#[group(multiple = false)]
pub(crate) struct NewKeyArgs {
    /// File whose exact bytes are the new key (32 bytes at least, random)
    #[arg(long, value_name = "FILE", help_heading = "New key")]
    new_key_file: Option<PathBuf>,
    /// File that holds the new passphrase (one newline at its end is not part of it; "-" is standard input)
    #[arg(long, value_name = "FILE", help_heading = "New key")]
    new_passphrase_file: Option<PathBuf>,
    /// New passphrase in the kernel's keyring
    #[arg(long, value_name = "user:DESCRIPTION", help_heading = "New key")]
    new_keyring: Option<String>,
    /// New passphrase from systemd
    #[arg(long, value_name = "NAME", help_heading = "New key")]
    new_credential: Option<String>,
    /// Program that prints the new passphrase
    #[arg(long, value_name = "COMMAND", help_heading = "New key")]
    new_passphrase_command: Option<String>,
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

    /// Whether a source is named.
    pub(crate) fn is_given(&self) -> bool {
        self.as_key_args().is_given()
    }

    /// Reads the new key of the namespace at `path`.
    pub(crate) fn read(&self, path: &Path) -> Result<Credential, Error> {
        self.as_key_args().read(Prompt::Twice, &format!("the key slot of {}, new", path.display()))
    }

    fn as_key_args(&self) -> KeyArgs {
        KeyArgs {
            key_file: self.new_key_file.clone(),
            passphrase_file: self.new_passphrase_file.clone(),
            keyring: self.new_keyring.clone(),
            credential: self.new_credential.clone(),
            passphrase_command: self.new_passphrase_command.clone(),
            escrow_file: None,
        }
    }
}

/// Less memory than this deserves a word: no recommendation for passphrases is as low (OWASP, RFC 9106).
const KDF_MEMORY_KIB_WARN: u32 = 7 << 10;

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
    /// The cost of a new slot.
    pub(crate) fn cost(&self) -> Result<KdfCost, Error> {
        self.cost_from(KdfCost::default())
    }

    /// Memory in KiB and passes, where they are named.
    pub(crate) fn named(&self) -> Result<(Option<u32>, Option<u32>), Error> {
        let cost = self.cost_from(KdfCost::default())?;
        Ok((self.kdf_memory.map(|_| cost.memory_kib), self.kdf_time))
    }

    /// The cost of a slot that has `cost` so far: what the options do not name stays.
    pub(crate) fn cost_from(&self, mut cost: KdfCost) -> Result<KdfCost, Error> {
        if let Some(ByteSize(bytes)) = self.kdf_memory {
            cost.memory_kib = u32::try_from(bytes >> 10)
                .map_err(|_| Error::Usage(format!("--kdf-memory {} is too much", ByteSize(bytes))))?;
        }
        if let Some(passes) = self.kdf_time {
            cost.time = passes;
        }
        if cost.memory_kib < KDF_MEMORY_KIB_WARN {
            warning!(
                "Argon2id with {} of memory makes guessing cheap: it is for phrases that a machine made up",
                ByteSize(u64::from(cost.memory_kib) << 10)
            );
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
    /// Whether a source is named.
    pub(crate) const fn is_given(&self) -> bool {
        self.key_file.is_some()
            || self.passphrase_file.is_some()
            || self.keyring.is_some()
            || self.credential.is_some()
            || self.passphrase_command.is_some()
            || self.escrow_file.is_some()
    }

    /// Reads the key, which opens a slot; `what` names the namespace in the prompt.
    pub(crate) fn read(&self, prompt: Prompt, what: &str) -> Result<Credential, Error> {
        self.read_with(prompt, what, secrets::key_file_bytes_min())
    }

    /// As [`Self::read`], with key files of at least `key_file_bytes_min` bytes.
    pub(crate) fn read_with(&self, prompt: Prompt, what: &str, key_file_bytes_min: usize) -> Result<Credential, Error> {
        if let Some(path) = &self.key_file {
            let what = if prompt == Prompt::Twice { secrets::NEW_KEY_FILE } else { secrets::KEY_FILE };
            let key = secrets::key_file(what, path, key_file_bytes_min)?;
            if prompt == Prompt::Twice && key.iter().all(|byte| *byte == key[0]) {
                warning!("every byte of {} is the same: that is no key, and whoever tries it is in", path.display());
            }
            return Ok(Credential::KeyFile(key));
        }
        if self.escrow_file.is_some() {
            return Err(Error::Usage("--escrow-file unlocks a namespace, but cannot be the key of a key slot".into()));
        }
        let passphrase = if let Some(path) = &self.passphrase_file {
            secrets::passphrase_file(path)?
        } else if let Some(text) = &self.keyring {
            secrets::keyring(text)?
        } else if let Some(name) = &self.credential {
            secrets::credential(name)?
        } else if let Some(line) = &self.passphrase_command {
            secrets::command(line)?
        } else {
            secrets::terminal(prompt, what)?
        };
        if passphrase.is_empty() {
            return Err(Error::EmptyPassphrase);
        }
        Ok(Credential::Passphrase(passphrase))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_passphrase_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"\n").unwrap();
        let args = KeyArgs { passphrase_file: Some(file.path().into()), ..KeyArgs::default() };
        assert!(matches!(args.read(Prompt::Once, "x"), Err(Error::EmptyPassphrase)));
    }
}
