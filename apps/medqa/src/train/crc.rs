//! The checksums of record files.

/// The table of a reflected cyclic redundancy check of 32 bits.
pub(super) struct Crc32([u32; 256]);

/// CRC-32C (Castagnoli), as in TensorFlow's record files.
pub(super) static CRC32C: Crc32 = Crc32::new(0x82f6_3b78);
/// CRC-32 of zlib, as in W&B's record files.
pub(super) static CRC32: Crc32 = Crc32::new(0xedb8_8320);

impl Crc32 {
    const fn new(polynomial: u32) -> Self {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let (mut rest, mut bit) = (byte as u32, 0);
            while bit < 8 {
                rest = if rest & 1 == 1 { rest >> 1 ^ polynomial } else { rest >> 1 };
                bit += 1;
            }
            table[byte] = rest;
            byte += 1;
        }
        Self(table)
    }

    /// Returns the checksum over the bytes of all `parts`.
    pub(super) fn checksum(&self, parts: &[&[u8]]) -> u32 {
        let step = |rest: u32, &byte: &u8| self.0[(rest as u8 ^ byte) as usize] ^ rest >> 8;
        !parts.iter().copied().flatten().fold(u32::MAX, step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check values of the catalogue of parametrised CRC algorithms, and of RFC 3720, B.4.
    #[test]
    fn checksums_are_the_known_ones() {
        assert_eq!(CRC32C.checksum(&[b"123456789"]), 0xe306_9283);
        assert_eq!(CRC32C.checksum(&[&[0; 32]]), 0x8a91_36aa);
        assert_eq!(CRC32C.checksum(&[&[0xff; 32]]), 0x62a8_ab43);
        assert_eq!(CRC32.checksum(&[b"123456789"]), 0xcbf4_3926);
        assert_eq!(CRC32.checksum(&[b"1234", b"", b"56789"]), 0xcbf4_3926);
        assert_eq!(CRC32.checksum(&[]), 0);
    }
}
