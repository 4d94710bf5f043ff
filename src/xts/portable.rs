//! The portable backend, and the specification of all others: AES-XTS over the `aes` crate, many blocks at a time.
//!
//! The `aes` crate takes the CPU's AES instructions where it finds them (AES-NI, VAES, ARMv8) and constant-time
//! bit-sliced software otherwise. Both want many blocks per call: whitening, cipher and whitening run over a batch, and
//! the first tweaks of several units are encrypted together.
//!
//! Bytes pass through a small array on the stack, because no slice may point into a mapping; it is wiped at the end.

use aes::cipher::consts::U16;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes256};
use zeroize::Zeroize;

use super::{BLOCK_BYTES, DataUnit, Direction, tweak};
use crate::memory::{Source, Target};
use crate::secret::{self, SecretBox};

/// Blocks in one call of the cipher: 64 of them are what the `aes` crate's widest code takes at a time.
const BATCH_BLOCKS: usize = 64;
const BATCH_BYTES: usize = BATCH_BLOCKS * BLOCK_BYTES;

/// Units whose first tweaks are encrypted together.
const BATCH_UNITS: usize = 16;

/// Both halves of the key, expanded. There is one per key, on a page of its own, so the variants' sizes do not matter.
#[allow(clippy::large_enum_variant)]
pub(super) enum PortableKey {
    Aes128(Halves<Aes128>),
    Aes256(Halves<Aes256>),
}

/// The cipher of each key half.
pub(super) struct Halves<C> {
    data: C,
    tweak: C,
}

impl PortableKey {
    /// Expands two halves of 16 or of 32 bytes.
    ///
    /// # Panics
    ///
    /// Panics for other lengths, which no volume key has.
    pub(super) fn boxed(data: &[u8], tweak: &[u8]) -> SecretBox<Self> {
        // The `aes` crate cannot expand a key in place.
        secret::with_wiped_stack(|| expand(data, tweak))
    }

    /// Blocks `first_block..` of the unit whose tweak is `tweak`.
    pub(super) fn blocks(
        &self,
        direction: Direction,
        tweak: u128,
        first_block: usize,
        src: Source<'_>,
        dst: Target<'_>,
    ) {
        match self {
            Self::Aes128(halves) => halves.blocks(direction, tweak, first_block, src, dst),
            Self::Aes256(halves) => halves.blocks(direction, tweak, first_block, src, dst),
        }
    }

    /// Whole units, the first of which has tweak value `tweak`.
    pub(super) fn units(&self, direction: Direction, unit: DataUnit, tweak: u64, src: Source<'_>, dst: Target<'_>) {
        match self {
            Self::Aes128(halves) => halves.units(direction, unit, tweak, src, dst),
            Self::Aes256(halves) => halves.units(direction, unit, tweak, src, dst),
        }
    }
}

impl<C> Halves<C>
where
    C: BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt,
{
    fn blocks(&self, direction: Direction, tweak: u128, first_block: usize, src: Source<'_>, dst: Target<'_>) {
        let mut first = [tweak.to_le_bytes()];
        self.tweak.encrypt_blocks(Array::cast_slice_from_core_mut(&mut first));
        let mut batch = Batch::new();
        batch.unit(&self.data, direction, tweak::advance(u128::from_le_bytes(first[0]), first_block), src, dst);
    }

    fn units(&self, direction: Direction, unit: DataUnit, tweak: u64, src: Source<'_>, mut dst: Target<'_>) {
        let mut batch = Batch::new();
        let mut tweak = tweak;
        let mut firsts = [[0; BLOCK_BYTES]; BATCH_UNITS];
        let mut at = 0;
        while at < src.len() {
            let unit_count = BATCH_UNITS.min((src.len() - at) / unit.len_bytes());
            let firsts = &mut firsts[..unit_count];
            for first in firsts.iter_mut() {
                *first = u128::from(tweak).to_le_bytes();
                tweak = tweak.wrapping_add(unit.tweak_step());
            }
            self.tweak.encrypt_blocks(Array::cast_slice_from_core_mut(firsts));
            for first in firsts.iter() {
                let range = at..at + unit.len_bytes();
                at = range.end;
                let whole = dst.reborrow().slice(range.clone());
                batch.unit(&self.data, direction, u128::from_le_bytes(*first), src.slice(range), whole);
            }
        }
    }
}

/// The blocks that are in the cipher, and what they are whitened with.
struct Batch {
    blocks: [[u8; BLOCK_BYTES]; BATCH_BLOCKS],
    tweaks: [u128; BATCH_BLOCKS],
}

impl Batch {
    const fn new() -> Self {
        Self { blocks: [[0; BLOCK_BYTES]; BATCH_BLOCKS], tweaks: [0; BATCH_BLOCKS] }
    }

    /// Blocks of one unit, the first of which is whitened with `tweak`.
    fn unit<C>(&mut self, cipher: &C, direction: Direction, mut tweak: u128, src: Source<'_>, mut dst: Target<'_>)
    where
        C: BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt,
    {
        let mut at = 0;
        while at < src.len() {
            let range = at..src.len().min(at + BATCH_BYTES);
            at = range.end;
            let blocks = &mut self.blocks[..range.len() / BLOCK_BYTES];
            let tweaks = &mut self.tweaks[..blocks.len()];
            for slot in tweaks.iter_mut() {
                *slot = tweak;
                tweak = tweak::double(tweak);
            }
            src.slice(range.clone()).copy_blocks_to(blocks.as_flattened_mut());
            whiten(blocks, tweaks);
            match direction {
                Direction::Encrypt => cipher.encrypt_blocks(Array::cast_slice_from_core_mut(blocks)),
                Direction::Decrypt => cipher.decrypt_blocks(Array::cast_slice_from_core_mut(blocks)),
            }
            whiten(blocks, tweaks);
            dst.reborrow().slice(range).copy_blocks_from(blocks.as_flattened());
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.blocks.zeroize();
        self.tweaks.zeroize();
    }
}

fn whiten(blocks: &mut [[u8; BLOCK_BYTES]], tweaks: &[u128]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

fn expand(data: &[u8], tweak: &[u8]) -> SecretBox<PortableKey> {
    let key = match data.len() {
        16 => PortableKey::Aes128(halves(data, tweak)),
        32 => PortableKey::Aes256(halves(data, tweak)),
        len_bytes => panic!("no half of a volume key has {len_bytes} bytes"),
    };
    SecretBox::new(key)
}

fn halves<C: KeyInit>(data: &[u8], tweak: &[u8]) -> Halves<C> {
    let expand = |half| C::new_from_slice(half).expect("the caller matched the length of the halves");
    Halves { data: expand(data), tweak: expand(tweak) }
}
