//! The configuration file of `serve`, in TOML.
//!
//! A key that is not known is an error that names it: a misspelt limit or allow list must not pass as none. Relative
//! paths count from the file's folder. The file names key files and holds no secret.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

use super::Plan;
use super::exports::Source;
use super::listeners::ListenTable;
use super::tls::{TlsMode, TlsPlan};
use crate::cli::credentials::KeyArgs;
use crate::cli::duration::Span;
use crate::cli::error::Error;
use crate::cli::export_options::ExportOptions;
use crate::cli::size::ByteSize;
use crate::nbd_server::Limits;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    keep_going: bool,
    control: Option<PathBuf>,
    metrics: Option<String>,
    poll_us: Option<u64>,
    threads: Option<u16>,
    #[serde(default)]
    hang_up: bool,
    #[serde(default, deserialize_with = "span")]
    lock_after: Option<Duration>,
    #[serde(default)]
    export_folders: Vec<PathBuf>,
    #[serde(default = "yes")]
    sandbox: bool,
    namespace: Vec<NamespaceTable>,
    #[serde(default)]
    listen: Vec<ListenTable>,
    #[serde(default)]
    limits: LimitsTable,
    #[serde(default)]
    tls: TlsTable,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NamespaceTable {
    path: PathBuf,
    key_file: Option<PathBuf>,
    passphrase_file: Option<PathBuf>,
    header: Option<PathBuf>,
    keyring: Option<String>,
    credential: Option<String>,
    passphrase_command: Option<String>,
    #[serde(flatten)]
    options: ExportOptions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsTable {
    connections: Option<usize>,
    handshaking: Option<usize>,
    #[serde(default, deserialize_with = "size")]
    buffer: Option<usize>,
    handshake_seconds: Option<u64>,
    drain_seconds: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    mode: Option<TlsMode>,
    certificates: Option<PathBuf>,
    #[serde(default)]
    verify_client: bool,
}

/// A size as on the command line, such as `"256M"`.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let ByteSize(bytes) = String::deserialize(deserializer)?.parse().map_err(de::Error::custom)?;
    usize::try_from(bytes).map(Some).map_err(de::Error::custom)
}

const fn yes() -> bool {
    true
}

/// A time as on the command line, such as `"10m"`.
fn span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let Span(duration) = String::deserialize(deserializer)?.parse().map_err(de::Error::custom)?;
    Ok(Some(duration))
}

/// Reads the file at `path`.
pub(super) fn read(path: &Path) -> Result<Plan, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::ConfigFile { path: path.into(), source })?;
    let file: File =
        toml::from_str(&text).map_err(|source| Error::Config { path: path.into(), source: Box::new(source) })?;
    let folder = path.parent().unwrap_or_else(|| Path::new(""));
    file.into_plan(folder).map_err(|reason| Error::Usage(format!("{}: {reason}", path.display())))
}

impl File {
    fn into_plan(self, folder: &Path) -> Result<Plan, String> {
        let namespaces = self.namespace.into_iter().map(|table| table.into_source(folder));
        let addresses = self.listen.into_iter().map(|table| table.into_address(folder));
        let tls = self.tls;
        let offered = if tls.certificates.is_some() { TlsMode::Require } else { TlsMode::Off };
        Ok(Plan {
            namespaces: namespaces.collect::<Result<_, _>>()?,
            addresses: addresses.collect::<Result<_, _>>()?,
            control: self.control.map(|path| folder.join(path)),
            metrics: self.metrics,
            tls: TlsPlan {
                mode: tls.mode.unwrap_or(offered),
                certificates: tls.certificates.map(|path| folder.join(path)),
                verify_client: tls.verify_client,
            },
            limits: self.limits.into_limits(),
            poll: self.poll_us.map(Duration::from_micros),
            threads: self.threads,
            hang_up: self.hang_up,
            keep_going: self.keep_going,
            lock_after: self.lock_after,
            export_folders: self.export_folders.iter().map(|path| folder.join(path)).collect(),
            sandbox: self.sandbox,
        })
    }
}

impl NamespaceTable {
    fn into_source(self, folder: &Path) -> Result<Source, String> {
        let path = self.path;
        let sources = [
            ("key_file", self.key_file.is_some()),
            ("passphrase_file", self.passphrase_file.is_some()),
            ("keyring", self.keyring.is_some()),
            ("credential", self.credential.is_some()),
            ("passphrase_command", self.passphrase_command.is_some()),
        ];
        let given: Vec<_> = sources.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
        if given.len() > 1 {
            return Err(format!("{} has both {}", path.display(), given.join(" and ")));
        }
        self.options.check().map_err(|reason| format!("{} has {reason}", path.display()))?;
        // "-" is standard input.
        let passphrase = self.passphrase_file;
        let passphrase_file = passphrase.map(|file| if file == Path::new("-") { file } else { folder.join(file) });
        Ok(Source {
            path: folder.join(path),
            key: KeyArgs {
                key_file: self.key_file.map(|file| folder.join(file)),
                passphrase_file,
                keyring: self.keyring,
                credential: self.credential,
                passphrase_command: self.passphrase_command,
                escrow_file: None,
            },
            header: self.header.map(|file| folder.join(file)),
            accept_data: false,
            options: self.options,
        })
    }
}

impl LimitsTable {
    fn into_limits(self) -> Limits {
        let defaults = Limits::default();
        let connections_max = self.connections.unwrap_or(defaults.connections_max);
        Limits {
            connections_max,
            handshaking_max: self.handshaking.unwrap_or(defaults.handshaking_max).min(connections_max),
            handshake_deadline: self.handshake_seconds.map_or(defaults.handshake_deadline, Duration::from_secs),
            buffer_bytes_max: self.buffer.unwrap_or(defaults.buffer_bytes_max),
            drain_deadline: self.drain_seconds.map_or(defaults.drain_deadline, Duration::from_secs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::listeners::Address;
    use super::*;
    use crate::nbd_server::SocketRights;

    #[test]
    fn the_example_file_is_a_plan() {
        let plan = read(Path::new("tools/systemd/daxcrypt.toml")).unwrap();
        assert!(!plan.namespaces.is_empty() && !plan.addresses.is_empty());
    }

    #[test]
    fn unknown_keys_are_named_wherever_they_stand() {
        let namespace = "[[namespace]]\npath = 'a.img'\n";
        for (text, key) in [
            (format!("nonsense = 1\n{namespace}"), "nonsense"),
            (format!("{namespace}readonly = true\n"), "readonly"),
            (format!("{namespace}[[listen]]\nudp = '127.0.0.1:1'\n"), "udp"),
            (format!("{namespace}[limits]\nconections = 3\n"), "conections"),
            (format!("{namespace}[tls]\nmode = 'maybe'\n"), "maybe"),
            (format!("{namespace}[limits]\nbuffer = '12 apples'\n"), "such as 512M"),
        ] {
            let error = toml::from_str::<File>(&text).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for (more, words) in
            [("key_file = 'k'\npassphrase_file = 'p'", "both"), ("read_only = true\nallow_discards = true", "both")]
        {
            let file: File = toml::from_str(&format!("[[namespace]]\npath = 'a.img'\n{more}\n")).unwrap();
            let reason = file.into_plan(Path::new("/etc")).unwrap_err();
            assert!(reason.contains(words) && reason.contains("a.img"), "{reason}");
        }
    }

    #[test]
    fn a_listener_is_one_thing_and_a_certificate_rule_names_its_kind() {
        let plan = |more: &str| {
            let text = format!("[[namespace]]\npath = 'a.img'\n{more}\n");
            toml::from_str::<File>(&text).unwrap().into_plan(Path::new("/etc/d"))
        };
        for more in ["tcp = 'a:1'\nunix = 's'", "mode = '0660'\ntcp = 'a:1'", "cids = [3]\nunix = 's'", ""] {
            assert!(plan(&format!("[[listen]]\n{more}")).unwrap_err().contains("one of unix"), "{more}");
        }
        let listen = plan("[[listen]]\nunix = 's'\nmode = '0660'\ngroup = 'root'\n[[listen]]\nvsock = 5\ncids = [3]");
        let rights = SocketRights { mode: 0o660, owner: None, group: Some(0) };
        let wanted = [Address::Unix("/etc/d/s".into(), rights), Address::Vsock(5, vec![3])];
        assert_eq!(listen.unwrap().addresses, wanted);
        let text = "[[namespace]]\npath = 'a.img'\nallowed_certificates = ['host1']\n";
        let error = toml::from_str::<File>(text).unwrap_err().to_string();
        assert!(error.contains("dns:host1"), "{error}");
        assert!(plan("allowed_certificates = ['dns:host1']\nallowed_cids = [3]").is_ok());
    }

    #[test]
    fn relative_paths_count_from_the_folder_and_standard_input_stays() {
        let text =
            "[[namespace]]\npath = 'a.img'\npassphrase_file = '-'\n[[listen]]\nunix = 's'\n[limits]\nbuffer = '2M'\n";
        let plan = toml::from_str::<File>(text).unwrap().into_plan(Path::new("/etc/d")).unwrap();
        assert_eq!(plan.namespaces[0].path, Path::new("/etc/d/a.img"));
        assert_eq!(plan.namespaces[0].key.passphrase_file.as_deref(), Some(Path::new("-")));
        assert_eq!(plan.addresses, [Address::Unix("/etc/d/s".into(), SocketRights::default())]);
        assert_eq!(plan.limits.buffer_bytes_max, 2 << 20);
    }
}
