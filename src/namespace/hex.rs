//! Byte strings in the JSON metadata: lowercase hexadecimal, two digits a byte.
//!
//! One spelling only, so that encoding what was decoded gives the same text. Not constant time: what the header holds
//! is public.

use serde::de::{Error, Unexpected};
use serde::{Deserialize, Deserializer, Serializer};

/// The digits of `bytes`.
pub(super) fn encode(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .map(char::from)
        .collect()
}

/// The bytes that `digits` spell, or `None` when an odd number of digits or anything else than `0-9a-f` is found.
pub(super) fn decode(digits: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect()
}

const fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    }
}

/// For `#[serde(with = "hex")]`.
pub(super) fn serialize<S: Serializer>(bytes: &impl AsRef<[u8]>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&encode(bytes.as_ref()))
}

/// For `#[serde(with = "hex")]`, into a byte array or a vector.
pub(super) fn deserialize<'de, D: Deserializer<'de>, B: TryFrom<Vec<u8>>>(deserializer: D) -> Result<B, D::Error> {
    let digits = String::deserialize(deserializer)?;
    let bytes =
        decode(&digits).ok_or_else(|| D::Error::invalid_value(Unexpected::Str(&digits), &"hexadecimal digits"))?;
    let len_bytes = bytes.len();
    bytes.try_into().map_err(|_| D::Error::invalid_length(len_bytes, &"another number of bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_spelling_only() {
        assert_eq!(encode(&[0, 0x1f, 0xa0]), "001fa0");
        assert_eq!(decode("001fa0"), Some(vec![0, 0x1f, 0xa0]));
        assert_eq!(decode(""), Some(vec![]));
        for refused in ["0", "0G", "0A", " 0", "é"] {
            assert_eq!(decode(refused), None, "{refused}");
        }
    }
}
