//! The anti-forensic splitter: a key blown up to stripes, all of which are needed to get it back (specification, section
//! 2.4; TKS1, Fruhwirth 2004). Whoever destroys one sector of a key slot destroys the slot.

use super::kdf::Hash;
use crate::secret::{KeyError, SecretBytes};

/// The number of stripes of every LUKS2 key slot; `cryptsetup` knows no other.
pub(super) const STRIPE_COUNT: usize = 4000;

/// The key that `material` was made of: `STRIPE_COUNT` stripes of the key's length.
pub(super) fn merge(material: &[u8], key_bytes: usize, hash: Hash) -> SecretBytes {
    let (mixed, last) = material.split_at((STRIPE_COUNT - 1) * key_bytes);
    let mut key = mix(mixed, key_bytes, hash);
    xor(&mut key, &last[..key_bytes]);
    key
}

/// Stripes that [`merge`] makes `key` of; all but the last one are random.
pub(super) fn split(key: &[u8], hash: Hash) -> Result<SecretBytes, KeyError> {
    let mut material = SecretBytes::random(STRIPE_COUNT * key.len())?;
    let (mixed, last) = material.split_at_mut((STRIPE_COUNT - 1) * key.len());
    last.copy_from_slice(&mix(mixed, key.len(), hash));
    xor(last, key);
    Ok(material)
}

fn mix(stripes: &[u8], key_bytes: usize, hash: Hash) -> SecretBytes {
    let mut state = SecretBytes::zeroed(key_bytes);
    for stripe in stripes.chunks_exact(key_bytes) {
        xor(&mut state, stripe);
        diffuse(&mut state, hash);
    }
    state
}

/// Replaces each piece of the digest's length by the digest of its number and itself.
fn diffuse(state: &mut [u8], hash: Hash) {
    for (number, piece) in (0_u32..).zip(state.chunks_mut(hash.len_bytes())) {
        let digest = hash.digest(&number.to_be_bytes(), piece);
        let len_bytes = piece.len();
        piece.copy_from_slice(&digest[..len_bytes]);
    }
}

fn xor(state: &mut [u8], with: &[u8]) {
    for (byte, with) in state.iter_mut().zip(with) {
        *byte ^= with;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_merges_again_and_needs_every_stripe() {
        for (key_bytes, hash) in [(32, Hash::Sha256), (64, Hash::Sha256), (64, Hash::Sha512), (48, Hash::Sha256)] {
            let key = SecretBytes::random(key_bytes).unwrap();
            let mut material = split(&key, hash).unwrap();
            assert_eq!(material.len(), STRIPE_COUNT * key_bytes);
            assert_eq!(*merge(&material, key_bytes, hash), *key);
            for at in [0, material.len() / 2, material.len() - 1] {
                material[at] ^= 1;
                assert_ne!(*merge(&material, key_bytes, hash), *key);
                material[at] ^= 1;
            }
        }
    }
}
