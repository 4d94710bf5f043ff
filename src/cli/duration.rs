//! Spans of time as people type them: `90s`, `10m`, `2h`.

use std::str::FromStr;
use std::time::Duration;

/// A span of time on the command line, of at least a millisecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

/// Why a span cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a time is a whole number above 0 with ms, s, m, h or d, such as 90s or 10m")]
pub(crate) struct SpanError;

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let milliseconds: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(SpanError),
        };
        let number: u64 = number.parse().map_err(|_| SpanError)?;
        let milliseconds = number.checked_mul(milliseconds).filter(|span| *span > 0).ok_or(SpanError)?;
        Ok(Self(Duration::from_millis(milliseconds)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_need_a_unit_and_are_never_nothing() {
        for (text, milliseconds) in
            [("1ms", 1), ("90s", 90_000), ("10m", 600_000), ("2h", 7_200_000), ("1d", 86_400_000)]
        {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(milliseconds))));
        }
        for text in ["", "10", "m", "0s", "-1s", "1.5h", "1 m", "18446744073709551615d", "1w"] {
            assert_eq!(text.parse::<Span>(), Err(SpanError), "{text}");
        }
    }
}
