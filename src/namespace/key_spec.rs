//! A volume key from an option string, in the words of the MKTME key-service proposal for Linux:
//! `type=user algorithm=aes-xts-128 key=HEX tweak=HEX` or `type=cpu algorithm=aes-xts-256`.
//!
//! With `type=user` the halves given are the key. With `type=cpu` the key comes from the kernel's generator, and halves
//! given are entropy that is XORed in: no entropy, whatever its value, can make the result less random. Option values
//! never appear in an error.

use super::metadata::Cipher;
use crate::secret::{KeyError, SecretBytes, VolumeKey};

/// Most bytes of an option string.
pub const KEY_SPEC_BYTES_MAX: usize = 4096;

const OPTIONS: [&str; 4] = ["type", "algorithm", "key", "tweak"];
const TYPE: usize = 0;
const ALGORITHM: usize = 1;
const KEY: usize = 2;
const TWEAK: usize = 3;

/// Why an option string gives no volume key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeySpecError {
    /// The string is too long.
    #[error("the key specification has {len_bytes} bytes, more than {KEY_SPEC_BYTES_MAX}")]
    Length {
        /// Bytes given.
        len_bytes: usize,
    },
    /// A word is not one of the options.
    #[error("word {position} of the key specification is none of type=, algorithm=, key=, tweak=")]
    Unknown {
        /// Position of the word, from 1.
        position: usize,
    },
    /// An option is there twice.
    #[error("option `{option}` is repeated")]
    Repeated {
        /// The option.
        option: &'static str,
    },
    /// An option is not there.
    #[error("option `{option}` is missing")]
    Missing {
        /// The option.
        option: &'static str,
    },
    /// An option has a value that is not one of its values.
    #[error("option `{option}` must be {expected}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its values.
        expected: &'static str,
    },
    /// A key half has the wrong number of digits.
    #[error("option `{option}` has {digits} digits, but the algorithm needs {expected_digits}")]
    Digits {
        /// The option.
        option: &'static str,
        /// Digits given.
        digits: usize,
        /// Digits needed.
        expected_digits: usize,
    },
    /// The key is not acceptable, for example because `key` and `tweak` are equal.
    #[error("options `key` and `tweak` do not make a volume key")]
    Key(#[from] KeyError),
}

/// The cipher and the volume key that an option string describes.
///
/// # Errors
///
/// [`KeySpecError`] names the option.
pub fn volume_key_from_spec(spec: &[u8]) -> Result<(Cipher, VolumeKey), KeySpecError> {
    if spec.len() > KEY_SPEC_BYTES_MAX {
        return Err(KeySpecError::Length { len_bytes: spec.len() });
    }
    let values = split_options(spec)?;
    let is_user = match required(&values, TYPE)? {
        b"user" => true,
        b"cpu" => false,
        _ => return Err(KeySpecError::Value { option: "type", expected: "user or cpu" }),
    };
    let cipher = match required(&values, ALGORITHM)? {
        b"aes-xts-128" => Cipher::Aes128Xts,
        b"aes-xts-256" => Cipher::Aes256Xts,
        _ => return Err(KeySpecError::Value { option: "algorithm", expected: "aes-xts-128 or aes-xts-256" }),
    };
    let key_bytes = cipher.key_bytes();
    let mut bytes = if is_user { SecretBytes::zeroed(key_bytes) } else { SecretBytes::random(key_bytes)? };
    for (option, half) in [KEY, TWEAK].into_iter().zip(bytes.chunks_exact_mut(key_bytes / 2)) {
        match values[option] {
            Some(digits) => xor_hex(OPTIONS[option], digits, half)?,
            None if is_user => return Err(KeySpecError::Missing { option: OPTIONS[option] }),
            None => {}
        }
    }
    Ok((cipher, VolumeKey::new(bytes)?))
}

fn split_options(spec: &[u8]) -> Result<[Option<&[u8]>; 4], KeySpecError> {
    let words = spec.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let mut values = [None; 4];
    for (position, word) in (1..).zip(words) {
        let option = OPTIONS
            .into_iter()
            .zip(&mut values)
            .find_map(|(name, slot)| Some((name, slot, word.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?)));
        match option {
            None => return Err(KeySpecError::Unknown { position }),
            Some((option, Some(_), _)) => return Err(KeySpecError::Repeated { option }),
            Some((_, slot, value)) => *slot = Some(value),
        }
    }
    Ok(values)
}

fn required<'a>(values: &[Option<&'a [u8]>; 4], option: usize) -> Result<&'a [u8], KeySpecError> {
    values[option].ok_or(KeySpecError::Missing { option: OPTIONS[option] })
}

fn xor_hex(option: &'static str, digits: &[u8], half: &mut [u8]) -> Result<(), KeySpecError> {
    let expected_digits = half.len() * 2;
    if digits.len() != expected_digits {
        return Err(KeySpecError::Digits { option, digits: digits.len(), expected_digits });
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(KeySpecError::Value { option, expected: "hexadecimal digits" }),
    };
    for (pair, byte) in digits.chunks_exact(2).zip(half) {
        *byte ^= value(pair[0])? << 4 | value(pair[1])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(spec: &str) -> KeySpecError {
        volume_key_from_spec(spec.as_bytes()).unwrap_err()
    }

    #[test]
    fn a_user_key_is_taken_as_given() {
        let (key, tweak) = ("0123456789abcdef0123456789ABCDEF", "ff".repeat(16));
        let spec = format!("tweak={tweak}\n algorithm=aes-xts-128 key={key} type=user\n");
        let (cipher, volume_key) = volume_key_from_spec(spec.as_bytes()).unwrap();
        assert_eq!(cipher, Cipher::Aes128Xts);
        let expected = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef].repeat(2);
        assert_eq!(volume_key.data_half(), expected);
        assert_eq!(volume_key.tweak_half(), [0xff; 16]);
    }

    #[test]
    fn a_cpu_key_is_random_whatever_the_entropy() {
        let ones = "ff".repeat(32);
        let spec = format!("type=cpu algorithm=aes-xts-256 key={ones} tweak={ones}");
        let keys = [0; 3].map(|_| volume_key_from_spec(spec.as_bytes()).unwrap().1);
        assert_ne!(keys[0].bytes(), keys[1].bytes());
        assert_ne!(keys[0].data_half(), [0xff; 32]);
        assert_eq!(volume_key_from_spec(b"type=cpu algorithm=aes-xts-128").unwrap().1.bytes().len(), 32);
    }

    #[test]
    fn every_mistake_names_its_option() {
        let half = "00".repeat(16);
        let other = "01".repeat(16);
        assert_eq!(refused(""), KeySpecError::Missing { option: "type" });
        assert_eq!(refused("type=user"), KeySpecError::Missing { option: "algorithm" });
        assert_eq!(refused("type=user algorithm=aes-xts-128"), KeySpecError::Missing { option: "key" });
        assert_eq!(
            refused(&format!("type=user algorithm=aes-xts-128 key={half}")),
            KeySpecError::Missing { option: "tweak" }
        );
        assert_eq!(refused("type=user type=user"), KeySpecError::Repeated { option: "type" });
        assert_eq!(refused("type=user keys=00"), KeySpecError::Unknown { position: 2 });
        assert_eq!(refused("type=user 0011"), KeySpecError::Unknown { position: 2 });
        assert_eq!(refused("type=none"), KeySpecError::Value { option: "type", expected: "user or cpu" });
        let null = refused("type=cpu algorithm=null");
        assert_eq!(null, KeySpecError::Value { option: "algorithm", expected: "aes-xts-128 or aes-xts-256" });
        let long = refused(&format!("type=user algorithm=aes-xts-256 key={half} tweak={other}"));
        assert_eq!(long, KeySpecError::Digits { option: "key", digits: 32, expected_digits: 64 });
        let digits = refused(&format!("type=cpu algorithm=aes-xts-128 tweak={}", "0g".repeat(16)));
        assert_eq!(digits, KeySpecError::Value { option: "tweak", expected: "hexadecimal digits" });
        let equal = refused(&format!("type=user algorithm=aes-xts-128 key={half} tweak={half}"));
        assert_eq!(equal, KeySpecError::Key(KeyError::EqualHalves));
        assert_eq!(refused(&" ".repeat(4097)), KeySpecError::Length { len_bytes: 4097 });
    }
}
