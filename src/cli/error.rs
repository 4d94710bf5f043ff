//! The program's errors: what happened, the exit code, and what to try next.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use linux_keyutils::KeyError;

use super::secrets;
use super::size::ByteSize;
use crate::luks2;
use crate::namespace::{
    self, AdoptError, CredentialError, FormatError, KeySpecError, RegionError, RestoreError, Signature, SlideError,
    SlotError, TransformError, UnlockError, UpdateError, WriteError,
};
use crate::nbd_server::{ListenError, RegistryError, ServerError, TlsError};
use crate::ops::Operation;
use crate::ops::gate::Refusal;
use crate::pmem::{MediaError, OpenError};
use crate::secret::KeyError as VolumeKeyError;
use crate::volume::VolumeError;
use crate::xts::BackendError;
use crate::xts::bench::BenchError;

/// Exit codes, as `--help` lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    Usage = 1,
    WrongKey = 2,
    Damaged = 3,
    Io = 4,
    Busy = 5,
    Stopped = 6,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Usage(String),
    #[error("cannot read the {what} {path}", path = path.display())]
    SecretFile { what: &'static str, path: PathBuf, source: io::Error },
    #[error("the {what} {path} has {len_bytes} bytes, but must have {min_bytes} to {max_bytes}", path = path.display())]
    KeyFileLength { what: &'static str, path: PathBuf, len_bytes: usize, min_bytes: usize, max_bytes: usize },
    #[error("the passphrase is empty")]
    EmptyPassphrase,
    #[error("the two passphrases differ")]
    PassphrasesDiffer,
    #[error("cannot read the key {description}: {}", why_no_key(source))]
    Keyring { description: String, source: KeyError },
    #[error("the key {description} is of type logon, which the kernel uses but never shows to a program")]
    LogonKey { description: String },
    #[error("there is no credential {name}: systemd did not set CREDENTIALS_DIRECTORY")]
    NoCredentials { name: String },
    #[error("the passphrase command {program} failed")]
    PassphraseCommand { program: String, source: io::Error },
    #[error("cannot ask for a passphrase")]
    Prompt(#[source] io::Error),
    #[error("cannot open {path}", path = path.display())]
    Open { path: PathBuf, source: OpenError },
    #[error("{path} already holds data ({signature})", path = path.display())]
    WouldOverwrite { path: PathBuf, signature: Signature },
    #[error("{path}", path = path.display())]
    Namespace { path: PathBuf, source: namespace::OpenError },
    #[error("{path}", path = path.display())]
    Region { path: PathBuf, source: RegionError },
    #[error("{path}", path = path.display())]
    Luks2 { path: PathBuf, source: luks2::OpenError },
    #[error("cannot unlock {path}", path = path.display())]
    Luks2Unlock { path: PathBuf, source: luks2::UnlockError },
    #[error("cannot export a LUKS2 header of {path}", path = path.display())]
    Luks2Export { path: PathBuf, source: luks2::ExportError },
    #[error("cannot format {path}", path = path.display())]
    Format { path: PathBuf, source: FormatError },
    #[error("cannot unlock {path}", path = path.display())]
    Unlock { path: PathBuf, source: UnlockError },
    #[error("cannot change {path}", path = path.display())]
    Update { path: PathBuf, source: UpdateError },
    #[error("key slot {slot} is the one that the key given here opens: removing it may lock you out")]
    OwnSlot { slot: u32 },
    #[error("cannot re-key {path}", path = path.display())]
    Rekey { path: PathBuf, source: Box<TransformError> },
    #[error("{path}: stopped with {done} of {total} done", path = path.display())]
    RekeyStopped { path: PathBuf, done: ByteSize, total: ByteSize },
    #[error("cannot adopt {path}", path = path.display())]
    Adopt { path: PathBuf, source: Box<AdoptError> },
    #[error("cannot move {path}", path = path.display())]
    Slide { path: PathBuf, source: Box<SlideError> },
    #[error("{path}: its key is not given", path = path.display())]
    NoKeyGiven { path: PathBuf },
    #[error("{path}: stopped with {done} of {total} copied", path = path.display())]
    TransferStopped { path: PathBuf, done: ByteSize, total: ByteSize },
    #[error("{path} reads back other bytes than were written: CRC-32 {found:#010x}, not {written:#010x}", path = path.display())]
    NotVerified { path: PathBuf, written: u32, found: u32 },
    #[error("cannot read or write {path}", path = path.display())]
    Plain { path: PathBuf, source: io::Error },
    #[error("cannot {operation} {path}", path = path.display())]
    Gate {
        operation: Operation,
        path: PathBuf,
        #[source]
        refusal: Refusal,
    },
    #[error("{path} holds data, which would be overwritten", path = path.display())]
    HoldsData { path: PathBuf },
    #[error("{path} is formatted, but only {done} of its {total} are filled with noise", path = path.display())]
    WipeStopped { path: PathBuf, done: ByteSize, total: ByteSize },
    #[error("{name} is locked, but what was written to it may be lost: {reason}")]
    LockedWithLoss { name: String, reason: String },
    #[error("that key does not open {name}")]
    WrongKey { name: String },
    #[error("the server refuses: {reason}")]
    Refused { reason: String, help: Option<String> },
    #[error("{path}: the server could not go on with its re-key: {reason}", path = path.display())]
    RekeyDied { path: PathBuf, reason: String },
    #[error("the namespace has other key slots: {slots}")]
    OtherSlots { slots: String },
    #[error("cannot erase {path}: key material may be left", path = path.display())]
    Erase { path: PathBuf, source: WriteError },
    #[error("cannot use the escrow file {path}", path = path.display())]
    EscrowFile { path: PathBuf, source: VolumeKeyError },
    #[error("cannot use the key specification {path}", path = path.display())]
    KeySpec { path: PathBuf, source: KeySpecError },
    #[error("cannot write the {what} {path}", path = path.display())]
    WriteFile { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot read the {what} {path}", path = path.display())]
    ReadFile { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{path}", path = path.display())]
    Restore { path: PathBuf, source: RestoreError },
    #[error("{path}: the header was not replaced", path = path.display())]
    NotReplaced { path: PathBuf },
    #[error("that is not the {what}: nothing was erased")]
    NotConfirmed { what: &'static str },
    #[error("{path}", path = path.display())]
    Volume { path: PathBuf, source: VolumeError },
    #[error("{path}", path = path.display())]
    Media { path: PathBuf, source: MediaError },
    #[error("cannot choose an AES-XTS backend")]
    Backend(#[from] BackendError),
    #[error("cannot measure AES-XTS")]
    Bench(#[from] BenchError),
    #[error("cannot make a key")]
    Key(#[from] VolumeKeyError),
    #[error("the recovery phrase could not be written to standard output, so no key slot was made for it")]
    PhraseNotShown { source: io::Error },
    #[error("cannot serve {path}", path = path.display())]
    Export { path: PathBuf, source: RegistryError },
    #[error("{path}: cannot record that discards are allowed", path = path.display())]
    AllowDiscards { path: PathBuf, source: UpdateError },
    #[error("cannot read the configuration file {path}", path = path.display())]
    ConfigFile { path: PathBuf, source: io::Error },
    #[error("{path}", path = path.display())]
    Config { path: PathBuf, source: Box<toml::de::Error> },
    #[error("cannot set up TLS")]
    Tls(#[from] TlsError),
    #[error("cannot ask the server at {path}", path = path.display())]
    Control { path: PathBuf, source: io::Error },
    #[error("the server at {path} has stopped answering", path = path.display())]
    ServerGone { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("the NBD server failed")]
    Server(#[from] ServerError),
    #[error("{doing}")]
    Io { doing: &'static str, source: io::Error },
    #[error("the demo failed: {0}")]
    Demo(&'static str),
}

impl Error {
    /// A server has answered another question.
    pub(crate) fn unexpected_answer() -> Self {
        Self::Refused { reason: "its answer is to another question: is it of another version?".into(), help: None }
    }

    /// A failure of the volume at `path`; one of its header as what `key` and `resize` give without a server.
    pub(crate) fn of_volume(path: &Path, error: VolumeError) -> Self {
        match error {
            VolumeError::Update(source) => Self::Update { path: path.into(), source: *source },
            source => Self::Volume { path: path.into(), source },
        }
    }

    /// The file that is not there, or that is there and must not be, where that is all that is wrong.
    fn named(&self) -> Option<(&Path, io::ErrorKind)> {
        let (path, source) = match self {
            Self::Open { path, source: OpenError::NotFound } => return Some((path, io::ErrorKind::NotFound)),
            Self::SecretFile { path, source, .. }
            | Self::Plain { path, source }
            | Self::WriteFile { path, source, .. }
            | Self::ReadFile { path, source, .. }
            | Self::ConfigFile { path, source }
            | Self::Control { path, source }
            | Self::Listen(ListenError::Unix { path, source }) => (path, source),
            _ => return None,
        };
        let told = matches!(
            source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory
        );
        told.then_some((path, source.kind()))
    }

    /// The exit code for a script. A name that leads nowhere is the same everywhere.
    pub(crate) fn exit(&self) -> Exit {
        if self.named().is_some() { Exit::Usage } else { self.exit_of_kind() }
    }

    fn exit_of_kind(&self) -> Exit {
        match self {
            Self::Usage(_) | Self::PassphrasesDiffer | Self::WouldOverwrite { .. } | Self::EmptyPassphrase => {
                Exit::Usage
            }
            Self::KeyFileLength { .. } | Self::Backend(_) | Self::Export { .. } => Exit::Usage,
            Self::SecretFile { .. } | Self::Prompt(_) | Self::PassphraseCommand { .. } => Exit::Usage,
            Self::Keyring { .. } | Self::LogonKey { .. } | Self::NoCredentials { .. } => Exit::Usage,
            Self::Open {
                source: OpenError::NotFound | OpenError::NotMappable | OpenError::TooLarge { .. }, ..
            } => Exit::Usage,
            Self::Config { .. } | Self::Tls(_) => Exit::Usage,
            Self::EscrowFile { .. } | Self::KeySpec { .. } => Exit::Usage,
            Self::ReadFile { .. } => Exit::Usage,
            Self::WriteFile { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => Exit::Usage,
            Self::Restore { source: RestoreError::Write(_), .. } => Exit::Io,
            Self::Restore { source: RestoreError::OtherNamespace { .. } | RestoreError::Smaller { .. }, .. } => {
                Exit::Usage
            }
            Self::Restore { .. } => Exit::Damaged,
            Self::Open { source: OpenError::Busy, .. } | Self::Listen(ListenError::Busy { .. }) => Exit::Busy,
            Self::Open { source: OpenError::Empty, .. } => Exit::Damaged,
            Self::Namespace { source: namespace::OpenError::Media(_), .. } => Exit::Io,
            Self::Namespace { .. } => Exit::Damaged,
            Self::Region { source: RegionError::Media(_) | RegionError::Write(_), .. } => Exit::Io,
            Self::Region {
                source:
                    RegionError::NoTable
                    | RegionError::BothTablesDamaged { .. }
                    | RegionError::OutOfBounds { .. }
                    | RegionError::Overlap { .. }
                    | RegionError::ReadBack(_),
                ..
            } => Exit::Damaged,
            Self::Region { .. } => Exit::Usage,
            Self::Luks2 { .. } => Exit::Damaged,
            Self::Luks2Unlock { source: luks2::UnlockError::WrongPassphrase { .. }, .. } => Exit::WrongKey,
            Self::Luks2Unlock { source: luks2::UnlockError::Memory { .. } | luks2::UnlockError::Media(_), .. } => {
                Exit::Io
            }
            Self::Luks2Unlock { .. } => Exit::Damaged,
            Self::Luks2Export { source: luks2::ExportError::Memory { .. } | luks2::ExportError::Key(_), .. } => {
                Exit::Io
            }
            Self::Luks2Export { .. } => Exit::Usage,
            Self::Format { source: FormatError::Write(_), .. } => Exit::Io,
            Self::Format { .. } => Exit::Usage,
            Self::RekeyStopped { .. } | Self::TransferStopped { .. } | Self::WipeStopped { .. } => Exit::Stopped,
            Self::HoldsData { .. } => Exit::Usage,
            Self::Adopt { source, .. } => adopt_exit(source),
            Self::OtherSlots { .. } | Self::Refused { .. } | Self::Gate { .. } => Exit::Usage,
            Self::WrongKey { .. } => Exit::WrongKey,
            Self::Slide { .. } | Self::NoKeyGiven { .. } => Exit::Usage,
            Self::Rekey { source, .. } => rekey_exit(source),
            Self::OwnSlot { .. } | Self::NotConfirmed { .. } | Self::NotReplaced { .. } => Exit::Usage,
            Self::Update { source, .. } => update_exit(source),
            Self::Unlock { source, .. } => unlock_exit(source),
            Self::Volume { source: VolumeError::NoHeader | VolumeError::ReadOnly, .. } => Exit::Usage,
            _ => Exit::Io,
        }
    }

    /// What the user can do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        self.folder_hint().or_else(|| self.key_hint()).or_else(|| self.place_hint())
    }

    /// Where a name leads nowhere because a folder is missing, or somewhere already.
    fn folder_hint(&self) -> Option<String> {
        let (path, kind) = self.named()?;
        if kind == io::ErrorKind::AlreadyExists {
            return Some("nothing is overwritten: give another name".into());
        }
        let folder = path.ancestors().skip(1).find(|folder| folder.exists() || folder.as_os_str().is_empty())?;
        if folder.is_file() {
            return Some(format!("{} is a file and no folder", folder.display()));
        }
        let missing = path.parent().filter(|parent| *parent != folder)?;
        Some(format!("there is no folder {0}: mkdir -p {0}", missing.display()))
    }

    /// Where a key could not be had.
    fn key_hint(&self) -> Option<String> {
        match self {
            Self::SecretFile { what: secrets::NEW_KEY_FILE, path, source }
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Some(format!(
                    "make a key with: (umask 077; head -c 64 /dev/urandom > {0}), and keep a copy of it elsewhere",
                    path.display()
                ))
            }
            Self::KeyFileLength { what: secrets::NEW_KEY_FILE, path, .. } => {
                Some(format!("make a key with: (umask 077; head -c 64 /dev/urandom > {})", path.display()))
            }
            Self::SecretFile { what: secrets::KEY_FILE, .. } | Self::KeyFileLength { .. } => {
                Some("give the key file that it was made with; `daxcrypt key list` shows which slots there are".into())
            }
            Self::Prompt(_) => Some("give --key-file FILE or --passphrase-file FILE where there is no terminal".into()),
            Self::Keyring { source: KeyError::KeyDoesNotExist, description } => Some(format!(
                "`keyctl padd {} @u < FILE` adds it, `keyctl show @u` and `keyctl show @s` show what there is",
                description.replacen(':', " ", 1)
            )),
            Self::LogonKey { .. } => {
                Some("add it as a key of type user: keyctl padd user DESCRIPTION @u < FILE".into())
            }
            Self::NoCredentials { name } => Some(format!(
                "in the unit: LoadCredential={name}:/path or LoadCredentialEncrypted=; by hand: systemd-run -p"
            )),
            _ => None,
        }
    }

    /// Where something is in the way, or something else is there.
    fn place_hint(&self) -> Option<String> {
        match self {
            Self::Open { source: OpenError::Busy, .. } => Some(
                "stop the process that serves it first (`fuser -v` as root shows which), or open it with --read-only there; \
                 `rekey`, `resize` and `key add|remove|change` ask a running server with --control SOCKET"
                    .into(),
            ),
            Self::ServerGone { .. } => Some("`daxcrypt serve` starts one; its log says why the last one ended".into()),
            Self::Control { .. } => {
                Some("is a server running with --control SOCKET? The socket is its user's and root's alone".into())
            }
            Self::Luks2 { source: luks2::OpenError::DataInHeader { .. }, path } => {
                Some(format!("name the file or device of the data, with --header {}", path.display()))
            }
            Self::WouldOverwrite { .. } => Some("--force overwrites it, and what it holds is then lost".into()),
            Self::Volume { source: VolumeError::NoHeader, .. } => {
                Some("`cryptsetup resize` and its kin change a LUKS2 volume, while it is not served".into())
            }
            Self::Update { source: UpdateError::Shrinks { .. }, .. } => {
                Some("--force shrinks it all the same; shrink what is in it first".into())
            }
            Self::Region { source: RegionError::NoSuchName { .. }, path } => {
                Some(format!("`daxcrypt region list {}` shows which there are", path.display()))
            }
            Self::Update { source: UpdateError::OtherSlots { .. }, .. } => Some(
                "--replace-slots restores it all the same; who has a key that was removed since can then open the namespace"
                    .into(),
            ),
            Self::Update { source: UpdateError::OtherVolumeKey, path } => Some(format!(
                "keep the header that is there: it is the one that its data needs, and nothing was changed. `daxcrypt header \
                 repair {}` tells which of its copies a key opens",
                path.display()
            )),
            Self::Update { source: UpdateError::LastSlot { .. }, .. } => {
                Some("--force removes it all the same; `daxcrypt key add` makes another one first".into())
            }
            Self::Update { source: UpdateError::SlotInUse { .. } | UpdateError::SlotEmpty { .. }, .. } => {
                Some("`daxcrypt key list` shows which slots are in use".into())
            }
            Self::OtherSlots { .. } => {
                Some("--drop-slots goes on without them, --keep-slots lets them open the new volume key too".into())
            }
            Self::Refused { help, .. } => help.clone(),
            Self::HoldsData { .. } => Some("--force overwrites it, and what it holds is then lost".into()),
            Self::WipeStopped { path, .. } => Some(format!(
                "`daxcrypt format {} --wipe --force` begins again; until then media shows what is in use",
                path.display()
            )),
            Self::RekeyDied { path, .. } => Some(format!(
                "start the server again: a re-key goes on when its namespace {} is opened", path.display()
            )),
            Self::RekeyStopped { path, .. } => {
                Some(format!("`daxcrypt rekey --resume {0}` goes on, and so does `daxcrypt serve {0}`", path.display()))
            }
            Self::Rekey { source, path } if matches!(**source, TransformError::UnderWay) => {
                Some(format!("`daxcrypt rekey --resume {}` goes on with it", path.display()))
            }
            Self::Gate { refusal, path, .. } => refusal.help.command(path),
            Self::OwnSlot { .. } => Some("give the key of another slot, which proves that it works, or --force".into()),
            Self::Restore { source, .. } => restore_hint(source),
            Self::Namespace { source, path } => namespace_hint(source, path),
            Self::Unlock { source, path } => unlock_hint(source, path),
            Self::Adopt { source, path } => match &**source {
                AdoptError::Unlock(source) => unlock_hint(source, path),
                _ => None,
            },
            _ => None,
        }
    }

    /// The message and its causes, each said once.
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }
}

/// What to do about a namespace that does not unlock.
fn unlock_hint(error: &UnlockError, path: &Path) -> Option<String> {
    match error {
        UnlockError::OtherCopy { .. } => Some(format!(
            "`daxcrypt header repair {}` shows both copies and what your key says of each, and makes one the header",
            path.display()
        )),
        UnlockError::OtherData { .. } => Some(OTHER_DATA.into()),
        error if unlock_exit(error) == Exit::WrongKey => {
            Some("try another passphrase or key file; `daxcrypt info` shows which slots there are".into())
        }
        _ => None,
    }
}

/// What to do about data that has not the tag of its header.
const OTHER_DATA: &str = "are data and header the right ones? Nothing was changed. If they are, --accept-data takes the data as it \
     is, where it is opened for writing, and writes the tag anew over what is in its page";

/// What to do about a header that does not open.
fn namespace_hint(error: &namespace::OpenError, path: &Path) -> Option<String> {
    match error {
        namespace::OpenError::Relocated { .. } | namespace::OpenError::AddressChanged { .. } => Some(format!(
            "`daxcrypt relocate --in-place {}` re-keys it for this place; or move it back",
            path.display()
        )),
        namespace::OpenError::NotANamespace { found: Some(Signature::Known(found)) } => {
            if found.contains("LUKS2") || found.contains("LUKS volume") {
                return Some("`serve --luks2` and `info --luks2` open LUKS2 volumes".into());
            }
            found.contains("GPT").then(|| {
                format!(
                    "{0}#NAME is the namespace NAME of a region; `daxcrypt region list {0}` shows which there are",
                    path.display()
                )
            })
        }
        namespace::OpenError::Detached => Some("give the backing as PATH and this file with --header".into()),
        _ => None,
    }
}

/// An error's message and its causes, each said once.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        let message = message.trim_end();
        if !text.ends_with(message) {
            text.push_str(": ");
            text.push_str(message);
        }
        cause = error.source();
    }
    text
}

/// The keyring's errno in words.
fn why_no_key(error: &KeyError) -> &'static str {
    match error {
        KeyError::KeyDoesNotExist => "there is no such key in the session, user or user-session keyring",
        KeyError::KeyExpired => "it has expired",
        KeyError::KeyRevoked => "it has been revoked",
        KeyError::KeyRejected => "it was rejected",
        KeyError::AccessDenied | KeyError::PermissionDenied => "it may not be read by this user",
        KeyError::InvalidDescription => "its description cannot be one",
        _ => "the kernel's key service failed",
    }
}

/// What the command line or the namespace does not permit is usage; the rest is media or damage.
const fn rekey_exit(error: &TransformError) -> Exit {
    match error {
        TransformError::UnderWay | TransformError::NotUnderWay | TransformError::Ephemeral => Exit::Usage,
        TransformError::Credential => Exit::WrongKey,
        TransformError::Geometry(_) | TransformError::Slot(_) => Exit::Usage,
        TransformError::SourceKey | TransformError::JournalLost | TransformError::SavedWindow { .. } => Exit::Damaged,
        _ => Exit::Io,
    }
}

fn restore_hint(error: &RestoreError) -> Option<String> {
    let hint = match error {
        RestoreError::OtherNamespace { .. } => {
            "are backup and path the right ones? If the namespace here is not wanted any more, --force replaces its header, and \
             saves it to a file first"
        }
        RestoreError::Smaller { .. } => "keep the header that is there; `daxcrypt resize` makes the data area smaller",
        _ => return None,
    };
    Some(hint.into())
}

fn unlock_exit(error: &UnlockError) -> Exit {
    match error {
        UnlockError::Credential(CredentialError::Memory { .. }) => Exit::Io,
        UnlockError::Changed => Exit::Busy,
        UnlockError::EmptySlot { .. } | UnlockError::NotEphemeral | UnlockError::Ephemeral => Exit::Usage,
        UnlockError::Forged
        | UnlockError::Erased
        | UnlockError::Key(_)
        | UnlockError::Transform(_)
        | UnlockError::OtherCopy { .. }
        | UnlockError::OtherData { .. }
        | UnlockError::Work(_) => Exit::Damaged,
        _ => Exit::WrongKey,
    }
}

const fn update_exit(error: &UpdateError) -> Exit {
    match error {
        UpdateError::Slot(SlotError::Label(_) | SlotError::Cost(_) | SlotError::Work(_)) => Exit::Usage,
        UpdateError::Write(_) | UpdateError::Slot(_) | UpdateError::Key(_) => Exit::Io,
        UpdateError::RewrapFailed { .. } | UpdateError::SequenceExhausted => Exit::Damaged,
        _ => Exit::Usage,
    }
}

fn adopt_exit(error: &AdoptError) -> Exit {
    match error {
        AdoptError::NotMoved { .. } | AdoptError::Rekeying { .. } | AdoptError::Geometry(_) => Exit::Usage,
        AdoptError::Open(namespace::OpenError::Media(_)) => Exit::Io,
        AdoptError::Unlock(UnlockError::Forged | UnlockError::Transform(_) | UnlockError::OtherData { .. })
        | AdoptError::Open(_) => Exit::Damaged,
        AdoptError::Unlock(_) => Exit::WrongKey,
        AdoptError::Transform(error) => rekey_exit(error),
    }
}
