//! Arithmetic on tweaks: GF(2^128) modulo x^128 + x^7 + x^2 + x + 1 (IEEE 1619-2007, 5.2), alpha being x.
//!
//! A tweak is a `u128` read little-endian, so that alpha's power is the bit number. Everything here takes the same time
//! for every tweak; only positions, which are public, steer loops.

/// x^128 modulo the polynomial, without which it is x^7 + x^2 + x + 1.
const REDUCTION: u128 = 0x87;

/// The most powers of alpha that one shift can do: the folded overflow, 7 bits wider, must fit in 128.
const SHIFT_MAX: usize = 121;

/// `tweak * alpha`.
pub(super) const fn double(tweak: u128) -> u128 {
    let carry_mask = 0_u128.wrapping_sub(tweak >> 127);
    (tweak << 1) ^ (carry_mask & REDUCTION)
}

/// `tweak * alpha^power`, in steps of up to 121 powers.
pub(super) const fn advance(mut tweak: u128, mut power: usize) -> u128 {
    while power > 0 {
        let step = if power < SHIFT_MAX { power } else { SHIFT_MAX };
        let overflow = tweak >> (128 - step);
        tweak = (tweak << step) ^ overflow ^ (overflow << 1) ^ (overflow << 2) ^ (overflow << 7);
        power -= step;
    }
    tweak
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn doubling_folds_the_carry() {
        assert_eq!(double(1), 2);
        assert_eq!(double(1 << 127), 0x87);
        assert_eq!(double(u128::MAX), (u128::MAX << 1) ^ 0x87);
    }

    #[test]
    fn high_powers_of_alpha_are_reduced() {
        assert_eq!(advance(1, 127), 1 << 127);
        assert_eq!(advance(1, 128), 0x87);
        assert_eq!(advance(1, 256), 0x4015, "0x87 squared: every bit moves to twice its place");
    }

    proptest! {
        #[test]
        fn advancing_is_doubling_that_many_times(tweak: u128, power in 0_usize..600) {
            let doubled = (0..power).fold(tweak, |tweak, _| double(tweak));
            prop_assert_eq!(advance(tweak, power), doubled);
        }
    }
}
