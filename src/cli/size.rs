//! Sizes as people type and read them: binary multiples, `4G` = `4GiB` = 4 x 2^30 bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteSize(pub(crate) u64);

/// Why a size cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    #[error("a size is a number with an optional K, M, G, T or P (binary: 1K = 1024), such as 512M, 1.5T or 4G")]
    NotASize,
    #[error(
        "is {0} meant in powers of 1000, or of 1024? A size counts in powers of 1024: type {1}, or a number of bytes"
    )]
    Decimal(String, String),
    #[error("it names the whole size, not what is added or taken away: `daxcrypt info` tells the present size")]
    Difference,
    #[error("{0} are no whole number of bytes")]
    NotWhole(String),
    #[error("the size does not fit in 64 bits")]
    TooLarge,
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        if text.starts_with(['+', '-']) {
            return Err(SizeError::Difference);
        }
        let digits = text.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'.').count();
        let (number, suffix) = text.split_at(digits);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
            return Err(SizeError::NotASize);
        }
        let shift = match suffix.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KIB" => 10,
            "M" | "MIB" => 20,
            "G" | "GIB" => 30,
            "T" | "TIB" => 40,
            "P" | "PIB" => 50,
            "KB" | "MB" | "GB" | "TB" | "PB" => {
                let binary = text.trim_end_matches(['b', 'B']).to_owned();
                return Err(SizeError::Decimal(text.to_owned(), binary));
            }
            _ => return Err(SizeError::NotASize),
        };
        let whole: u64 = whole.parse().map_err(|_| SizeError::TooLarge)?;
        let whole = whole.checked_mul(1 << shift).ok_or(SizeError::TooLarge)?;
        let part = part_of(fraction, shift).ok_or_else(|| SizeError::NotWhole(text.to_owned()))?;
        whole.checked_add(part).map(Self).ok_or(SizeError::TooLarge)
    }
}

/// The bytes that the decimals `fraction` of 2^`shift` are; nothing where they are no whole number of bytes.
fn part_of(fraction: &str, shift: u32) -> Option<u64> {
    if fraction.is_empty() {
        return Some(0);
    }
    let decimals: u128 = fraction.parse().ok()?;
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let bytes = decimals.checked_mul(1 << shift)?;
    bytes.is_multiple_of(scale).then(|| u64::try_from(bytes / scale).ok())?
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    /// As people type it, in quotes.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit in which the number is at least 1, with one decimal where it is not whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        let Some((unit, shift)) = UNITS.iter().find(|(_, shift)| self.0 >> shift > 0) else {
            return write!(f, "{} bytes", self.0);
        };
        let (whole, rest) = (self.0 >> shift, self.0 & ((1 << shift) - 1));
        if rest == 0 {
            return write!(f, "{whole} {unit}");
        }
        // The remainder keeps ten bits, so that the product cannot overflow.
        write!(f, "{whole}.{} {unit}", ((rest >> (shift - 10)) * 10) >> 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_suffixes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("7b", 7),
            ("4k", 4096),
            ("64MiB", 64 << 20),
            ("4G", 4 << 30),
            ("1T", 1 << 40),
            ("1.5T", 3 << 39),
            ("0.25k", 256),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "G", "4 G", "0x10", "1E", ".5G", "1.G", "1.2.3G", "."] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::NotASize), "{text}");
        }
        assert_eq!("4GB".parse::<ByteSize>(), Err(SizeError::Decimal("4GB".into(), "4G".into())));
        for text in ["+4G", "-1"] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::Difference), "{text}");
        }
        for text in ["0.5", "1.0001K", &format!("1.{}G", "1".repeat(60))] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::NotWhole(text.into())), "{text}");
        }
        for text in ["18446744073709551616", "16777216T", "16384.5P"] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_with_one_decimal_at_most() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            ((4 << 30) + (2 << 20), "4.0 GiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16383.9 PiB"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }
}
