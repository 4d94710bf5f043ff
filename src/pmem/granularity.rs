//! Granularity: which step makes a store durable on a mapped backing, and why that was chosen.
//!
//! Cache-line granularity is claimed only with proof: the kernel accepted a `MAP_SYNC` mapping *and* says itself that the
//! file is DAX (statx), or the device is device-DAX. A successful `MAP_SYNC` alone is not trusted, because a file system
//! that ignores unknown flags would accept it.

use std::ffi::OsStr;
use std::fmt;

use super::error::OpenError;

/// Environment variable that overrides the detected granularity: `page` or `cacheline`. For tests and measurements.
pub const FORCE_GRANULARITY_VARIABLE: &str = "DAXCRYPT_FORCE_GRANULARITY";

/// What makes a store durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// A mapping of the media itself: write back the cache line (CLWB), then wait (SFENCE).
    CacheLine,
    /// A mapping of the page cache: `msync` of the page, or `fdatasync`.
    Page,
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CacheLine => "cache line",
            Self::Page => "page",
        })
    }
}

/// What probing found out. Each variant implies a granularity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// Device-DAX maps the media and nothing else.
    DeviceDax,
    /// statx reports DAX, and the kernel accepted `MAP_SYNC`.
    DaxFile,
    /// statx reports DAX, but the kernel refused `MAP_SYNC`.
    MapSyncRefused,
    /// statx does not report DAX for the file.
    NotDaxFile,
    /// The kernel or the file system cannot report DAX at all.
    DaxUnknown,
    /// A block device, which the kernel maps through the page cache even where it is DAX-capable.
    BlockDevice {
        /// Whether the device's queue says that file systems on it can use DAX.
        dax_capable: bool,
    },
    /// A simulated medium.
    Simulated(Granularity),
    /// Memory that does not outlive the process.
    Volatile,
}

impl Finding {
    pub(super) const fn granularity(self) -> Granularity {
        match self {
            Self::DeviceDax | Self::DaxFile => Granularity::CacheLine,
            Self::Simulated(granularity) => granularity,
            Self::MapSyncRefused | Self::NotDaxFile | Self::DaxUnknown | Self::BlockDevice { .. } | Self::Volatile => {
                Granularity::Page
            }
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.granularity())?;
        f.write_str(match self {
            Self::DeviceDax => "a device-DAX mapping of the media",
            Self::DaxFile => "a synchronous DAX mapping of the media (MAP_SYNC, confirmed by statx)",
            Self::MapSyncRefused => "not a synchronous DAX mapping, because the kernel refuses MAP_SYNC for this file",
            Self::NotDaxFile => "not a DAX mapping, because statx does not report DAX for this file",
            Self::DaxUnknown => "not known to be a DAX mapping, because this file system cannot report DAX (statx)",
            Self::BlockDevice { dax_capable: false } => {
                "not a DAX mapping, because the block device is not DAX-capable"
            }
            Self::BlockDevice { dax_capable: true } => {
                "not a DAX mapping, because the kernel maps block devices through the page cache \
                 (use a file on a file system mounted with -o dax, or device-DAX)"
            }
            Self::Simulated(_) => "a simulated medium",
            Self::Volatile => "memory that ends with the process",
        })
    }
}

/// Why a backing has its granularity. `Display` gives one line for a person, such as "page: not a DAX mapping, because
/// statx does not report DAX for this file".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GranularityReason {
    finding: Finding,
    forced: Option<Granularity>,
}

impl GranularityReason {
    pub(super) const fn new(finding: Finding, forced: Option<Granularity>) -> Self {
        Self { finding, forced }
    }

    /// The granularity in use.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        self.forced.unwrap_or_else(|| self.finding.granularity())
    }

    /// The granularity that the override imposed, if there was one: a program reports this loudly, because durability
    /// is then not what the media give.
    #[must_use]
    pub const fn forced(&self) -> Option<Granularity> {
        self.forced
    }
}

impl fmt::Display for GranularityReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.forced {
            None => self.finding.fmt(f),
            Some(forced) => write!(f, "{forced}: forced by {FORCE_GRANULARITY_VARIABLE} (detected {})", self.finding),
        }
    }
}

/// Reads the override's value. Unset and empty mean no override.
pub(super) fn parse_override(value: Option<&OsStr>) -> Result<Option<Granularity>, OpenError> {
    match value.map(OsStr::as_encoded_bytes) {
        None | Some(b"") => Ok(None),
        Some(b"page") => Ok(Some(Granularity::Page)),
        Some(b"cacheline") => Ok(Some(Granularity::CacheLine)),
        Some(_) => Err(OpenError::BadOverride),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_override_is_page_or_cacheline_and_nothing_else() {
        let parse = |text: &str| parse_override(Some(OsStr::new(text)));
        assert_eq!(parse_override(None).unwrap(), None);
        assert_eq!(parse("").unwrap(), None);
        assert_eq!(parse("page").unwrap(), Some(Granularity::Page));
        assert_eq!(parse("cacheline").unwrap(), Some(Granularity::CacheLine));
        for bad in ["Page", "cache-line", "page ", "1"] {
            assert!(matches!(parse(bad), Err(OpenError::BadOverride)), "{bad:?}");
        }
    }

    #[test]
    fn only_proof_gives_cache_line_granularity() {
        for finding in [Finding::DeviceDax, Finding::DaxFile] {
            assert_eq!(finding.granularity(), Granularity::CacheLine);
        }
        let page = [
            Finding::MapSyncRefused,
            Finding::NotDaxFile,
            Finding::DaxUnknown,
            Finding::BlockDevice { dax_capable: true },
            Finding::BlockDevice { dax_capable: false },
        ];
        for finding in page {
            assert_eq!(finding.granularity(), Granularity::Page, "{finding:?}");
        }
    }

    #[test]
    fn the_reason_is_one_line_and_names_the_override() {
        let plain = GranularityReason::new(Finding::NotDaxFile, None);
        assert_eq!(plain.to_string(), "page: not a DAX mapping, because statx does not report DAX for this file");
        let forced = GranularityReason::new(Finding::NotDaxFile, Some(Granularity::CacheLine));
        assert_eq!(forced.granularity(), Granularity::CacheLine);
        assert_eq!(
            forced.to_string(),
            "cache line: forced by DAXCRYPT_FORCE_GRANULARITY (detected page: not a DAX mapping, because statx does \
             not report DAX for this file)"
        );
    }
}
