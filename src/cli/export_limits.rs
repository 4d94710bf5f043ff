//! How much may be asked of an export: options, keys of the configuration file and of the control socket alike.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::size::ByteSize;
use crate::nbd_server::{ExportLimits, Rates};

/// The limits of an export.
#[derive(Args, Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LimitArgs {
    /// Bytes a second that may be read and written of an export, by all of its clients together, such as 200M
    #[arg(long, value_name = "SIZE")]
    max_rate: Option<ByteSize>,
    /// Requests a second of an export
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_iops: Option<u64>,
    /// Bytes a second for each connection
    #[arg(long, value_name = "SIZE")]
    max_client_rate: Option<ByteSize>,
    /// Requests a second for each connection
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_client_iops: Option<u64>,
    /// Connections at a time of an export
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_export_connections: Option<u32>,
}

impl From<LimitArgs> for ExportLimits {
    fn from(args: LimitArgs) -> Self {
        let rates = |bytes: Option<ByteSize>, requests: Option<u64>| Rates {
            bytes_per_second: bytes.map_or(0, |ByteSize(bytes)| bytes),
            requests_per_second: requests.unwrap_or(0),
        };
        Self {
            rates: rates(args.max_rate, args.max_iops),
            client_rates: rates(args.max_client_rate, args.max_client_iops),
            connections_max: args.max_export_connections.unwrap_or(0) as usize,
        }
    }
}
