//! Recovery phrases: passphrases that a person writes down once and can type on any keyboard.
//!
//! 40 characters of 32 that look like no other, in groups of five: 200 random bits. Guessing is hopeless without an
//! expensive key derivation, so a slot for one has the cheapest there is ([`KdfCost::LEAST`](super::KdfCost::LEAST)) and
//! opens quickly. Whoever types it from paper may forget the dashes, or write capitals: such a slot tries that too.

use super::kdf::Credential;
use crate::secret::{KeyError, SecretBytes};

/// No `l`, `o`, `0` and `1`; 32 of them, so that five bits choose one without bias.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const GROUPS: usize = 8;
const GROUP_CHARACTERS: usize = 5;

/// A new phrase, such as `k3v9f-...`.
///
/// # Errors
///
/// [`KeyError::Random`] when the kernel's generator fails.
pub fn recovery_phrase() -> Result<SecretBytes, KeyError> {
    let random = SecretBytes::random(GROUPS * GROUP_CHARACTERS)?;
    let mut characters = random;
    characters.iter_mut().for_each(|byte| *byte = ALPHABET[usize::from(*byte & 31)]);
    Ok(in_groups(&characters))
}

impl Credential {
    /// The recovery phrase that a passphrase stands for, written as it was printed: without regard to capitals, and to
    /// where dashes and spaces are. `None` when it is none.
    #[must_use]
    pub fn as_recovery_phrase(&self) -> Option<Self> {
        let Self::Passphrase(typed) = self else { return None };
        let mut characters = SecretBytes::zeroed(GROUPS * GROUP_CHARACTERS);
        let mut count = 0;
        for byte in typed.iter().filter(|byte| !b"- \t".contains(byte)).map(u8::to_ascii_lowercase) {
            if !ALPHABET.contains(&byte) {
                return None;
            }
            *characters.get_mut(count)? = byte;
            count += 1;
        }
        (count == characters.len()).then(|| Self::Passphrase(in_groups(&characters)))
    }
}

fn in_groups(characters: &[u8]) -> SecretBytes {
    let mut phrase = SecretBytes::zeroed(GROUPS * (GROUP_CHARACTERS + 1) - 1);
    phrase.fill(b'-');
    for (group, characters) in phrase.chunks_mut(GROUP_CHARACTERS + 1).zip(characters.chunks(GROUP_CHARACTERS)) {
        group[..GROUP_CHARACTERS].copy_from_slice(characters);
    }
    phrase
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_differ_and_have_groups_of_the_alphabet() {
        let (a, b) = (recovery_phrase().unwrap(), recovery_phrase().unwrap());
        assert_ne!(*a, *b);
        let text = std::str::from_utf8(&a).unwrap();
        let groups: Vec<_> = text.split('-').collect();
        assert_eq!(groups.len(), 8, "{text}");
        assert!(groups.iter().all(|group| group.len() == 5 && group.bytes().all(|c| ALPHABET.contains(&c))), "{text}");
        assert!(ALPHABET.iter().all(|c| ALPHABET.iter().filter(|&other| other == c).count() == 1));
    }

    #[test]
    fn a_phrase_is_known_however_it_is_typed_and_nothing_else_is_one() {
        let read = |text: &str| Credential::Passphrase(SecretBytes::copy_of(text.as_bytes())).as_recovery_phrase();
        let printed = "abcde-fghij-kmnpq-rstuv-wxyz2-34567-89abc-defgh";
        for typed in [
            printed.to_owned(),
            printed.to_uppercase(),
            printed.replace('-', ""),
            printed.replace('-', " "),
            format!(" {}- ", printed.replace("-f", "F")),
        ] {
            let Some(Credential::Passphrase(phrase)) = read(&typed) else { panic!("{typed}") };
            assert_eq!(&*phrase, printed.as_bytes());
        }
        for other in ["", "abcde", &printed[1..], &format!("{printed}a"), &printed.replace('a', "1")] {
            assert!(read(other).is_none(), "{other}");
        }
        assert!(Credential::KeyFile(SecretBytes::copy_of(printed.as_bytes())).as_recovery_phrase().is_none());
    }
}
