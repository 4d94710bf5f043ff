//! Recovery phrases: passphrases that a person writes down once and can type on any keyboard.
//!
//! 40 characters of 32 that look like no other, in groups of five: 200 random bits. Guessing is hopeless without an
//! expensive key derivation, so the slot has the cheapest one and opens quickly.

use super::error::Error;
use super::output;
use crate::namespace::{Credential, KdfCost, Namespace};
use crate::secret::SecretBytes;

/// No `l`, `o`, `0` and `1`; 32 of them, so that five bits choose one without bias.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const GROUPS: usize = 8;
const GROUP_CHARACTERS: usize = 5;

/// The name that the slot gets.
pub(super) const LABEL: &str = "recovery";

/// A new phrase, such as `k3v9f-...`.
pub(super) fn phrase() -> Result<SecretBytes, Error> {
    let random = SecretBytes::random(GROUPS * GROUP_CHARACTERS)?;
    let mut phrase = SecretBytes::zeroed(GROUPS * (GROUP_CHARACTERS + 1) - 1);
    phrase.fill(b'-');
    for (group, bytes) in phrase.chunks_mut(GROUP_CHARACTERS + 1).zip(random.chunks(GROUP_CHARACTERS)) {
        for (character, byte) in group.iter_mut().zip(bytes) {
            *character = ALPHABET[usize::from(byte & 31)];
        }
    }
    Ok(phrase)
}

/// Adds a slot that a new phrase opens, and prints the phrase when the slot is on media.
pub(super) fn add_slot(
    namespace: &mut Namespace,
    slot: Option<u32>,
    label: &str,
    failed: impl Fn(crate::namespace::UpdateError) -> Error,
) -> Result<(), Error> {
    let credential = Credential::Passphrase(phrase()?);
    let label = if label.is_empty() { LABEL } else { label };
    let id = namespace.add_slot(slot, label, &credential, KdfCost::LEAST).map_err(failed)?;
    let Credential::Passphrase(phrase) = &credential else { unreachable!("made above") };
    output::outln!("added key slot {id}; it opens with this recovery phrase, which is not shown again:")?;
    output::secret(phrase)?;
    output::secret(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_differ_and_have_groups_of_the_alphabet() {
        let (a, b) = (phrase().unwrap(), phrase().unwrap());
        assert_ne!(*a, *b);
        let text = std::str::from_utf8(&a).unwrap();
        let groups: Vec<_> = text.split('-').collect();
        assert_eq!(groups.len(), 8, "{text}");
        assert!(groups.iter().all(|group| group.len() == 5 && group.bytes().all(|c| ALPHABET.contains(&c))), "{text}");
        assert!(ALPHABET.iter().all(|c| ALPHABET.iter().filter(|&other| other == c).count() == 1));
    }
}
