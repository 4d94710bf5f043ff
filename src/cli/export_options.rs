//! How an export is presented and to whom: keys of a `[[namespace]]` in the configuration file and options of `exports add`, from
//! one place, so that neither way can lack what the other one has.

use std::fmt::Display;
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::export_limits::LimitArgs;
use crate::nbd_server::{AddressRange, Allowed, CertificateName, ExportInfo};

/// The options of an export.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ExportOptions {
    /// Name of the export [default: the label, or the file's stem]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// A line for people, which clients are shown
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) description: String,
    /// It is a LUKS2 volume (of cryptsetup) and not a namespace
    #[arg(long)]
    pub(crate) luks2: bool,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Let discards punch holes from now on; media then shows which units are unused, and there is no way back
    #[arg(long)]
    pub(crate) allow_discards: bool,
    /// Serve it through TLS only, where the server leaves the choice to clients
    #[arg(long)]
    pub(crate) tls_required: bool,
    /// Users that may use it over a Unix socket. Without any rule every client may; with some, those that fulfil one
    #[arg(long, value_name = "UID,...", value_delimiter = ',')]
    pub(crate) allowed_uids: Vec<u32>,
    /// Groups that may use it over a Unix socket
    #[arg(long, value_name = "GID,...", value_delimiter = ',')]
    pub(crate) allowed_gids: Vec<u32>,
    /// Virtual machines that may use it over vsock
    #[arg(long, value_name = "CID,...", value_delimiter = ',')]
    pub(crate) allowed_cids: Vec<u32>,
    /// Addresses that may use it over TCP, such as 10.0.0.7 or 10.0.0.0/24
    #[arg(long, value_name = "ADDRESS,...", value_delimiter = ',')]
    #[serde(with = "texts")]
    pub(crate) allowed_addresses: Vec<AddressRange>,
    /// Names in TLS certificates of clients that may use it, such as dns:host.example
    #[arg(long, value_name = "KIND:NAME,...", value_delimiter = ',')]
    #[serde(with = "texts")]
    pub(crate) allowed_certificates: Vec<CertificateName>,
    /// Of those that may use it, users that may write. Without any such rule all may; it is read-only for others
    #[arg(long, value_name = "UID,...", value_delimiter = ',')]
    pub(crate) write_uids: Vec<u32>,
    /// Groups that may write
    #[arg(long, value_name = "GID,...", value_delimiter = ',')]
    pub(crate) write_gids: Vec<u32>,
    /// Virtual machines that may write
    #[arg(long, value_name = "CID,...", value_delimiter = ',')]
    pub(crate) write_cids: Vec<u32>,
    /// Addresses that may write
    #[arg(long, value_name = "ADDRESS,...", value_delimiter = ',')]
    #[serde(with = "texts")]
    pub(crate) write_addresses: Vec<AddressRange>,
    /// Names in certificates of clients that may write
    #[arg(long, value_name = "KIND:NAME,...", value_delimiter = ',')]
    #[serde(with = "texts")]
    pub(crate) write_certificates: Vec<CertificateName>,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
}

impl ExportOptions {
    /// Says what contradicts itself.
    pub(crate) fn check(&self) -> Result<(), String> {
        let both = |one: &str, other: &str| Err(format!("both {one} and {other}"));
        match () {
            () if self.read_only && self.allow_discards => both("read_only", "allow_discards"),
            () if self.luks2 && self.allow_discards => both("luks2", "allow_discards"),
            () if self.read_only && !self.writers().is_open() => both("read_only", "write_..."),
            () => Ok(()),
        }
    }

    fn allowed(&self) -> Allowed {
        Allowed {
            uids: self.allowed_uids.clone(),
            gids: self.allowed_gids.clone(),
            cids: self.allowed_cids.clone(),
            addresses: self.allowed_addresses.clone(),
            certificate_names: self.allowed_certificates.clone(),
        }
    }

    fn writers(&self) -> Allowed {
        Allowed {
            uids: self.write_uids.clone(),
            gids: self.write_gids.clone(),
            cids: self.write_cids.clone(),
            addresses: self.write_addresses.clone(),
            certificate_names: self.write_certificates.clone(),
        }
    }

    /// How it is presented to clients; without a name where the namespace itself has to say it.
    pub(crate) fn info(&self) -> ExportInfo {
        ExportInfo {
            name: self.name.clone().unwrap_or_default(),
            description: self.description.clone(),
            read_only: self.read_only,
            writers: self.writers(),
            tls_required: self.tls_required,
            allowed: self.allowed(),
            limits: self.limits.into(),
        }
    }

    /// Whether a rule of it needs the names in certificates.
    pub(crate) fn names_certificates(&self) -> bool {
        !self.allowed_certificates.is_empty() || !self.write_certificates.is_empty()
    }

    /// Whether something of it can be fulfilled with TLS only.
    pub(crate) fn needs_tls(&self) -> bool {
        self.tls_required || self.names_certificates()
    }
}

/// Values that are texts in files.
mod texts {
    use super::*;

    pub(super) fn serialize<T: Display, S: Serializer>(values: &[T], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(T::to_string))
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| text.parse().map_err(de::Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::{Command, FromArgMatches};

    use super::*;

    #[test]
    fn the_file_and_the_command_line_have_the_same_options() {
        let command = ExportOptions::augment_args(Command::new("add").no_binary_name(true));
        let options: Vec<_> = command.get_arguments().map(|arg| arg.get_id().to_string()).collect();
        let file = serde_json::to_value(ExportOptions::default()).unwrap();
        let limits = file["limits"].as_object().unwrap().keys();
        let keys: Vec<_> = file.as_object().unwrap().keys().filter(|key| *key != "limits").chain(limits).collect();
        assert_eq!(keys.len(), options.len());
        assert!(keys.iter().all(|key| options.contains(key)), "{keys:?} {options:?}");
    }

    /// A rule that is passed over would open the export to everybody.
    #[test]
    fn a_misspelt_rule_is_refused() {
        let error = serde_json::from_str::<ExportOptions>(r#"{"allowed_uid": [1000]}"#).unwrap_err().to_string();
        assert!(error.contains("allowed_uid"), "{error}");
    }

    #[test]
    fn what_is_said_on_the_command_line_arrives_whole() {
        let command = ExportOptions::augment_args(Command::new("add").no_binary_name(true));
        let args = ["--name", "n", "--description", "d", "--allow-discards", "--tls-required", "--allowed-uids", "1,2"];
        let more = ["--write-certificates", "cn:a,dns:b", "--allowed-addresses", "10.0.0.0/8,::1", "--max-iops", "9"];
        let options = ExportOptions::from_arg_matches(&command.get_matches_from([&args[..], &more].concat())).unwrap();
        let sent: ExportOptions = serde_json::from_str(&serde_json::to_string(&options).unwrap()).unwrap();
        let info = sent.info();
        assert_eq!((info.name.as_str(), info.description.as_str(), info.tls_required), ("n", "d", true));
        assert_eq!((info.allowed.uids.as_slice(), info.limits.all.requests_per_second), (&[1, 2][..], 9));
        assert_eq!(info.allowed.addresses.len(), 2);
        assert_eq!(
            info.writers.certificate_names.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["cn:a", "dns:b"]
        );
        assert!(sent.allow_discards && sent.check().is_ok() && sent.names_certificates());
    }
}
