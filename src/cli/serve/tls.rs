//! TLS as an operator asks for it: the mode, the folder of certificates, and whether clients need one.
//!
//! Guards: a rule that only TLS can fulfil is refused where TLS is off, instead of locking everybody out.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::Deserialize;

use super::exports::Source;
use crate::cli::error::Error;
use crate::nbd_server::{ClientCertificates, Tls};

/// Whether clients may or must use TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum TlsMode {
    /// No TLS
    #[default]
    Off,
    /// Clients without TLS are refused
    Require,
    /// Clients choose, so that an attacker on the way can choose for them
    Allow,
}

/// What the options or the file say about TLS.
#[derive(Debug)]
pub(super) struct TlsPlan {
    pub(super) mode: TlsMode,
    pub(super) certificates: Option<PathBuf>,
    pub(super) verify_client: bool,
}

/// Reads the certificates, if TLS is on.
pub(super) fn set_up(plan: &TlsPlan, namespaces: &[Source]) -> Result<Option<Tls>, Error> {
    let refused = |reason: &str| Err(Error::Usage(reason.into()));
    let names_certificates = namespaces.iter().any(|source| source.options.names_certificates());
    let needs_tls = namespaces.iter().any(|source| source.options.needs_tls());
    match (plan.mode, &plan.certificates) {
        (TlsMode::Off, Some(_)) => refused("certificates for TLS are given, but TLS is off"),
        (TlsMode::Off, None) if plan.verify_client => refused("clients cannot be verified, because TLS is off"),
        (TlsMode::Off, None) if needs_tls => {
            refused("a namespace has tls_required, allowed_certificates or write_certificates, but TLS is off")
        }
        (TlsMode::Off, None) => Ok(None),
        (_, None) => refused("TLS needs a folder of certificates (--tls-certificates DIR)"),
        (mode, Some(folder)) => {
            let clients = match (plan.verify_client, names_certificates) {
                (true, _) => ClientCertificates::Required,
                (false, true) => ClientCertificates::Optional,
                (false, false) => ClientCertificates::Ignored,
            };
            Ok(Some(Tls::from_directory(folder, clients, mode == TlsMode::Require)?))
        }
    }
}
