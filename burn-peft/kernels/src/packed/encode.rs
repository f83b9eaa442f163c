//! Encoding of values as blocks, for the formats that can be written.

use super::BlockType;
use half::f16;

impl BlockType {
    /// The formats that can be encoded.
    pub const WRITABLE: [Self; 3] = [Self::F32, Self::F16, Self::Q8_0];

    /// Encodes whole blocks of values and appends them to `out`. f16 values are rounded to nearest, ties to even.
    /// `Q8_0` follows ggml's reference: scale `max|x| / 127`, with quotients rounded half away from zero.
    ///
    /// # Panics
    ///
    /// If the values are not whole blocks, or the format is not in [`Self::WRITABLE`].
    ///
    /// # Errors
    /// Returns the first value that the format cannot hold.
    pub fn quantize(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
        assert!(values.len().is_multiple_of(self.block_len()), "{self:?}: {} values, not whole blocks", values.len());
        match self {
            Self::F32 => values.iter().try_for_each(|&value| {
                out.extend(value.to_le_bytes());
                if value.is_finite() { Ok(()) } else { Err(value) }
            }),
            Self::F16 => values.iter().try_for_each(|&value| push_f16(value, value, out)),
            Self::Q8_0 => values.as_chunks::<32>().0.iter().try_for_each(|block| quantize_q8_0(block, out)),
            other => panic!("{other:?} cannot be encoded, only {:?}", Self::WRITABLE),
        }
    }
}

/// Appends `value` as f16; returns `cause` as the error if it is not finite.
fn push_f16(value: f32, cause: f32, out: &mut Vec<u8>) -> Result<(), f32> {
    let value = f16::from_f32(value);
    out.extend(value.to_le_bytes());
    if value.is_finite() { Ok(()) } else { Err(cause) }
}

fn quantize_q8_0(block: &[f32; 32], out: &mut Vec<u8>) -> Result<(), f32> {
    // A maximum would skip NaN, so the block is searched for it first.
    if let Some(&value) = block.iter().find(|value| !value.is_finite()) {
        return Err(value);
    }
    let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    push_f16(scale, largest, out)?;
    // In a block of subnormal numbers the inverse is infinite; the conversion saturates, and the scale is zero in any
    // case.
    out.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_its_scale_and_quotients_rounded_away_from_zero() {
        let mut block = [0.0; 32];
        (block[0], block[1], block[2], block[3]) = (-254.0, 5.0, -5.0, 127.0);
        let mut out = Vec::new();
        quantize_q8_0(&block, &mut out).unwrap();
        assert_eq!(out[..2], f16::from_f32(2.0).to_le_bytes());
        assert_eq!(out[2..7].iter().map(|byte| *byte as i8).collect::<Vec<_>>(), [-127, 3, -3, 64, 0]);
        assert_eq!(out.len(), 34);
        out.clear();
        quantize_q8_0(&[0.0; 32], &mut out).unwrap();
        assert_eq!(out, [0; 34]);
    }

    #[test]
    fn what_a_format_cannot_hold_is_an_error() {
        for (kind, bad) in [
            (BlockType::F32, f32::NAN),
            (BlockType::F16, 65520.0),
            (BlockType::F16, f32::NEG_INFINITY),
            (BlockType::Q8_0, f32::NAN),
            (BlockType::Q8_0, 1e9),
        ] {
            let mut values = [1.0; 32];
            values[7] = bad;
            let found = kind.quantize(&values, &mut Vec::new()).unwrap_err();
            assert_eq!(found.to_bits(), bad.to_bits(), "{kind:?}");
        }
    }
}
