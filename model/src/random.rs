//! The five random streams: weights, data order, masking, dropout, sampling.
//!
//! Each is a pure function of the seed and of where it is used, never of what was drawn before, so
//! every layout, micro-batch size and resumed run draws the same numbers. Nothing here keeps state.

use sha2::{Digest, Sha256};

/// Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011).
pub fn philox(key: u64, counter: [u32; 4]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    for _ in 0..10 {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// Which stream a key belongs to; streams of one seed never overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Weights,
    Order,
    Masking,
    Dropout,
    Sampling,
    /// Which rows are validated on.
    Split,
}

/// The key of a stream at a place: the first 64 bits of SHA-256(seed, stream, place).
pub fn key(seed: u64, stream: Stream, place: &[u8]) -> u64 {
    let mut digest = Sha256::new();
    digest.update(seed.to_le_bytes());
    digest.update([stream as u8]);
    digest.update(place);
    let digest = digest.finalize();
    u64::from_le_bytes(std::array::from_fn(|i| digest[i]))
}

/// A uniform number in [0, 1) at `index` of the stream with this key.
pub fn uniform(key: u64, index: u64) -> f64 {
    let [a, b, ..] = philox(key, [index as u32, (index >> 32) as u32, 0, 0]);
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Initial values of the parameter `name`, from its number `first` on: normal with mean 0, by Box and Muller's transform.
pub fn normal(seed: u64, name: &str, std: f64, first: u64, values: &mut [f32]) {
    let key = key(seed, Stream::Weights, name.as_bytes());
    let (mut block, mut skipped) = (first / 4, (first % 4) as usize);
    let mut rest = values;
    while !rest.is_empty() {
        let bits = philox(key, [block as u32, (block >> 32) as u32, 0, 0]);
        // Into (0, 1], whose logarithm is finite.
        let u = bits.map(|bits| (f64::from(bits) + 1.0) / 4_294_967_296.0);
        let pair = |a: f64, b: f64| {
            let (radius, angle) = ((-2.0 * a.ln()).sqrt(), std::f64::consts::TAU * b);
            [radius * angle.cos(), radius * angle.sin()]
        };
        let [pair_one, pair_two] = [pair(u[0], u[1]), pair(u[2], u[3])];
        let normals = [pair_one[0], pair_one[1], pair_two[0], pair_two[1]];
        let (values, behind) = rest.split_at_mut((4 - skipped).min(rest.len()));
        for (value, normal) in values.iter_mut().zip(&normals[skipped..]) {
            *value = (normal * std) as f32;
        }
        (rest, block, skipped) = (behind, block + 1, 0);
    }
}

/// A keyed permutation of `0..len` with access at any index in constant time and memory: a balanced
/// Feistel network over the smallest even number of bits that holds `len`, walked until it lands
/// inside (Black & Rogaway, *Ciphers with arbitrary finite domains*, 2002).
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    key: u64,
    len: u64,
    half_bits: u32,
}

impl Permutation {
    /// The order of data in `epoch`.
    pub fn of_epoch(seed: u64, epoch: u64, len: u64) -> Permutation {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Permutation { key: key(seed, Stream::Order, &epoch.to_le_bytes()), len, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Where `index` (below `len`) goes.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.len, "index {index} of a permutation of {}", self.len);
        let mut value = index;
        loop {
            value = self.round_trip(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn round_trip(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..4 {
            let mixed = philox(self.key, [right as u32, (right >> 32) as u32, round, 1]);
            let mixed = u64::from(mixed[0]) << 32 | u64::from(mixed[1]);
            (left, right) = (right, left ^ (mixed & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        assert_eq!(philox(0, [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox(u64::MAX, [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn permutations_are_bijections_and_depend_on_seed_and_epoch() {
        for len in [1, 2, 3, 5, 64, 1000, 4097] {
            let all = |seed, epoch| {
                let permutation = Permutation::of_epoch(seed, epoch, len);
                (0..len).map(|index| permutation.at(index)).collect::<Vec<_>>()
            };
            let order = all(7, 0);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..len).collect::<Vec<_>>());
            assert_eq!(order, all(7, 0));
            if len > 64 {
                assert_ne!(order, all(7, 1));
                assert_ne!(order, all(8, 0));
                let fixed = order.iter().enumerate().filter(|&(index, &value)| index as u64 == value).count();
                assert!(fixed < 10, "{fixed} of {len} stay in place");
            }
        }
    }

    #[test]
    fn normals_have_their_moments_and_depend_on_the_name() {
        let mut values = vec![0f32; 40_001];
        normal(1, "a", 0.02, 0, &mut values);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.0005, "mean {mean}");
        assert!((variance.sqrt() - 0.02).abs() < 0.0005, "deviation {}", variance.sqrt());
        for first in 0..9 {
            let mut part = vec![0f32; 10];
            normal(1, "a", 0.02, first, &mut part);
            assert_eq!(part, values[first as usize..][..10]);
        }
        let mut other = vec![0f32; 10];
        normal(1, "b", 0.02, 0, &mut other);
        assert_ne!(values[..10], other);
    }
}
