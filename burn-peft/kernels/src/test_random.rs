//! Reproducible numbers for the tests: functions of a seed and an index.

/// Returns the seed that belongs to a text.
pub(crate) fn seed(text: &str) -> u64 {
    text.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)))
}

/// Returns number `index` of a seed, uniform over all of `u64`.
pub(crate) fn bits(seed: u64, index: u64) -> u64 {
    mix(mix(seed) ^ index)
}

/// Returns number `index` of a seed, uniform in `[0, 1)`.
pub(crate) fn uniform(seed: u64, index: u64) -> f64 {
    (bits(seed, index) >> 11) as f64 / (1u64 << 53) as f64
}

/// Returns `n` numbers of a seed, uniform in `[-1, 1)`.
pub(crate) fn numbers(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|index| (2.0 * uniform(seed, index) - 1.0) as f32).collect()
}

/// Computes one step of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
