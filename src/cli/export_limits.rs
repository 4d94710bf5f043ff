//! How much may be asked of an export: options, keys of the configuration file and of the control socket alike.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::size::ByteSize;
use crate::nbd_server::{ExportLimits, Quota};

/// The limits of an export. A client is all connections with the same certificate names, Unix user, virtual machine or address.
#[derive(Args, Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LimitArgs {
    /// Bytes a second that may be read and written of an export, by all of its clients together, such as 200M
    #[arg(long, value_name = "SIZE")]
    max_rate: Option<ByteSize>,
    /// Requests a second of an export
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_iops: Option<u64>,
    /// Bytes of reads and writes of an export that have begun and are not answered; a larger one goes alone
    #[arg(long, value_name = "SIZE")]
    max_in_flight: Option<ByteSize>,
    /// Connections at a time of an export
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_export_connections: Option<u32>,
    /// Bytes a second for each client, over all of its connections: those with the same certificate names, Unix user, virtual
    /// machine or address
    #[arg(long, value_name = "SIZE")]
    max_client_rate: Option<ByteSize>,
    /// Requests a second for each client
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_client_iops: Option<u64>,
    /// Bytes in flight for each client
    #[arg(long, value_name = "SIZE")]
    max_client_in_flight: Option<ByteSize>,
    /// Connections at a time of each client to an export
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_client_connections: Option<u32>,
}

impl From<LimitArgs> for ExportLimits {
    fn from(args: LimitArgs) -> Self {
        let bytes = |size: Option<ByteSize>| size.map_or(0, |ByteSize(bytes)| bytes);
        Self {
            all: Quota {
                bytes_per_second: bytes(args.max_rate),
                requests_per_second: args.max_iops.unwrap_or(0),
                bytes_under_way: bytes(args.max_in_flight),
                connections: args.max_export_connections.unwrap_or(0) as usize,
            },
            each_client: Quota {
                bytes_per_second: bytes(args.max_client_rate),
                requests_per_second: args.max_client_iops.unwrap_or(0),
                bytes_under_way: bytes(args.max_client_in_flight),
                connections: args.max_client_connections.unwrap_or(0) as usize,
            },
        }
    }
}
