//! Counter-based random numbers: a function of their purpose, without a generator state.
//!
//! A number is computed from a key, for instance of (seed, step, row, path), and a counter. So activation
//! checkpointing, a resumed run and a different division of the same rows into batches all get the same numbers, and no
//! generator state has to be saved.

/// Computes one step of SplitMix64 (Steele, Lea and Flood, 2014): a bijection whose output bits all depend on every
/// input bit.
const fn splitmix64(value: u64) -> u64 {
    let z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Combines several parts into a key; their order matters.
pub fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |key, &part| splitmix64(key ^ splitmix64(part)))
}

/// Hashes a text, for instance a parameter path, to a key (FNV-1a, then SplitMix64).
pub const fn key_from_str(path: &str) -> u64 {
    let (bytes, mut hash, mut i) = (path.as_bytes(), 0xCBF2_9CE4_8422_2325_u64, 0);
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01B3);
        i += 1;
    }
    splitmix64(hash)
}

/// Returns the `counter`-th number of a key, uniform over all of `u64`.
pub const fn bits(key: u64, counter: u64) -> u64 {
    splitmix64(key ^ counter.wrapping_mul(0xD6E8_FEB8_6659_FD93))
}

/// Returns the `counter`-th number of a key, uniform in `[0, 1)` with 53 random bits.
pub fn uniform(key: u64, counter: u64) -> f64 {
    (bits(key, counter) >> 11) as f64 / (1u64 << 53) as f64
}

/// Returns the `counter`-th number of a key, from the standard normal distribution (Box and Muller, 1958).
pub fn normal(key: u64, counter: u64) -> f64 {
    // The logarithm of 1 - u, because u can be 0.
    let radius = (-2.0 * (1.0 - uniform(key, 2 * counter)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(key, 2 * counter + 1)).cos()
}

/// Returns the first `n` numbers of a key, uniform in `±bound`.
pub(crate) fn uniform_values(key: u64, n: usize, bound: f64) -> Vec<f32> {
    (0..n as u64).map(|i| ((2.0 * uniform(key, i) - 1.0) * bound) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_has_the_moments_of_a_uniform_distribution() {
        let (n, k) = (100_000u64, key(&[1, 2, 3]));
        let mean = (0..n).map(|i| uniform(k, i)).sum::<f64>() / n as f64;
        let square = (0..n).map(|i| uniform(k, i).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 4e-3, "mean {mean}");
        assert!((square - 1.0 / 3.0).abs() < 4e-3, "second moment {square}");
    }

    #[test]
    fn normal_has_the_moments_of_a_normal_distribution() {
        let (n, k) = (100_000u64, key(&[4, 5]));
        let mean = (0..n).map(|i| normal(k, i)).sum::<f64>() / n as f64;
        let square = (0..n).map(|i| normal(k, i).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.012, "mean {mean}");
        assert!((square - 1.0).abs() < 0.02, "second moment {square}");
    }

    #[test]
    fn keys_tell_their_parts_and_order_apart() {
        assert_ne!(key(&[1, 2]), key(&[2, 1]));
        assert_ne!(key(&[1]), key(&[1, 0]));
        assert_ne!(key_from_str("a.b"), key_from_str("a.c"));
        let k = key(&[7]);
        let distinct: std::collections::HashSet<u64> = (0..10_000).map(|i| bits(k, i)).collect();
        assert_eq!(distinct.len(), 10_000);
    }
}
