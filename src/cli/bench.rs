//! `daxcrypt bench`: how fast AES-XTS is here, as a table like that of `cryptsetup benchmark`, or as JSON.

use clap::Args;
use serde::Serialize;

use super::error::Error;
use super::output::{self, outln};
use crate::xts::Backend;
use crate::xts::bench::{self, Row};

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// One JSON object, for scripts
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    /// The backend that this program uses.
    xts_backend: &'static str,
    rows: Vec<Row>,
}

pub(crate) fn run(args: &BenchArgs) -> Result<(), Error> {
    let in_use = Backend::from_env()?;
    let rows = bench::measure(&Backend::available())?;
    let report = Report { xts_backend: in_use.name(), rows };
    if args.json { output::json(&report) } else { print(&report) }
}

fn print(report: &Report) -> Result<(), Error> {
    outln!("# One thread, in GB/s (10^9 bytes a second); memory stands in for persistent memory.")?;
    outln!("# The backend in use is {}.", report.xts_backend)?;
    outln!("{:<9} {:>4} {:>5}  {:<8} {:>9} {:>9}", "Backend", "Key", "Unit", "", "In cache", "In memory")?;
    let line = |row: &Row, backend, key_bits: &str, unit_bytes: &str, in_cache, out_of_cache| {
        outln!("{backend:<9} {key_bits:>4} {unit_bytes:>5}  {:<8} {in_cache:>9.2} {out_of_cache:>9.2}", row.direction)
    };
    for direction in ["encrypt", "decrypt"] {
        if let Some(row) = report.rows.iter().find(|row| row.direction == direction) {
            line(row, "memcpy", "", "", row.memcpy_in_cache_gb_s, row.memcpy_out_of_cache_gb_s)?;
        }
    }
    for row in &report.rows {
        let (key_bits, unit_bytes) = (row.key_bits.to_string(), row.unit_bytes.to_string());
        line(row, row.backend, &key_bits, &unit_bytes, row.in_cache_gb_s, row.out_of_cache_gb_s)?;
    }
    Ok(())
}
