//! Values as the bytes of a GGUF file: metadata by type, tensors by storage format.

use super::super::{Array, BlockType, Value};
use half::f16;

/// Appends a text: its length in bytes, then UTF-8.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Appends a metadata value with its type: the 32-bit one if that holds the value, which is what llama.cpp asks for.
pub(super) fn value(out: &mut Vec<u8>, value: &Value) {
    let one = match value {
        Value::Unsigned(value) => Array::Unsigned(vec![*value]),
        Value::Signed(value) => Array::Signed(vec![*value]),
        Value::Float(value) => Array::Float(vec![*value]),
        Value::Bool(value) => Array::Bool(vec![*value]),
        Value::String(value) => {
            out.extend(8u32.to_le_bytes());
            return string(out, value);
        }
        Value::Array(array) => {
            out.extend(9u32.to_le_bytes());
            out.extend(kind(array).to_le_bytes());
            out.extend((len(array) as u64).to_le_bytes());
            return elements(out, array);
        }
    };
    out.extend(kind(&one).to_le_bytes());
    elements(out, &one);
}

/// The number of the type that holds every element.
fn kind(array: &Array) -> u32 {
    match array {
        Array::Unsigned(values) => {
            if values.iter().all(|value| u32::try_from(*value).is_ok()) {
                4
            } else {
                10
            }
        }
        Array::Signed(values) => {
            if values.iter().all(|value| i32::try_from(*value).is_ok()) {
                5
            } else {
                11
            }
        }
        Array::Float(values) => {
            let exact = |value: &f64| value.is_nan() || f64::from(*value as f32) == *value;
            if values.iter().all(exact) { 6 } else { 12 }
        }
        Array::Bool(_) => 7,
        Array::String(_) => 8,
    }
}

fn len(array: &Array) -> usize {
    match array {
        Array::Unsigned(values) => values.len(),
        Array::Signed(values) => values.len(),
        Array::Float(values) => values.len(),
        Array::Bool(values) => values.len(),
        Array::String(values) => values.len(),
    }
}

fn elements(out: &mut Vec<u8>, array: &Array) {
    match (array, kind(array)) {
        (Array::Unsigned(values), 4) => values.iter().for_each(|value| out.extend((*value as u32).to_le_bytes())),
        (Array::Unsigned(values), _) => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
        (Array::Signed(values), 5) => values.iter().for_each(|value| out.extend((*value as i32).to_le_bytes())),
        (Array::Signed(values), _) => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
        (Array::Float(values), 6) => values.iter().for_each(|value| out.extend((*value as f32).to_le_bytes())),
        (Array::Float(values), _) => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
        (Array::Bool(values), _) => out.extend(values.iter().map(|value| u8::from(*value))),
        (Array::String(values), _) => values.iter().for_each(|value| string(out, value)),
    }
}

impl BlockType {
    /// The formats that can be written.
    pub const WRITTEN: [Self; 3] = [Self::F32, Self::F16, Self::Q8_0];

    /// Appends whole blocks of values; the first value that the format cannot hold is the error. Halves round to even,
    /// and `Q8_0` is ggml's reference: scale `max|x| / 127`, quotients rounded away from zero.
    ///
    /// # Panics
    ///
    /// If the values are not whole blocks, or the format is not in [`Self::WRITTEN`].
    pub(super) fn quantize(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
        assert!(values.len().is_multiple_of(self.block_len()), "{self:?}: {} values are no blocks", values.len());
        match self {
            Self::F32 => values.iter().try_for_each(|&value| {
                out.extend(value.to_le_bytes());
                if value.is_finite() { Ok(()) } else { Err(value) }
            }),
            Self::F16 => values.iter().try_for_each(|&value| half(value, value, out)),
            Self::Q8_0 => values.as_chunks::<32>().0.iter().try_for_each(|block| q8_0(block, out)),
            other => panic!("{other:?} cannot be written, only {:?}", Self::WRITTEN),
        }
    }
}

/// Appends a half; `cause` is the error if it is not finite.
fn half(value: f32, cause: f32, out: &mut Vec<u8>) -> Result<(), f32> {
    let value = f16::from_f32(value);
    out.extend(value.to_le_bytes());
    if value.is_finite() { Ok(()) } else { Err(cause) }
}

fn q8_0(block: &[f32; 32], out: &mut Vec<u8>) -> Result<(), f32> {
    // A maximum passes NaN over, so it is looked for by itself.
    if let Some(&value) = block.iter().find(|value| !value.is_finite()) {
        return Err(value);
    }
    let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    half(scale, largest, out)?;
    // In a block of subnormal numbers the inverse is infinite; the conversion saturates, and the scale is zero anyway.
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
        q8_0(&block, &mut out).unwrap();
        assert_eq!(out[..2], f16::from_f32(2.0).to_le_bytes());
        assert_eq!(out[2..7].iter().map(|byte| *byte as i8).collect::<Vec<_>>(), [-127, 3, -3, 64, 0]);
        assert_eq!(out.len(), 34);
        out.clear();
        q8_0(&[0.0; 32], &mut out).unwrap();
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

    #[test]
    fn widths_are_the_narrowest_of_32_bits_that_hold_the_value() {
        for (found, expected) in [
            (Value::Unsigned(7), [4, 0, 0, 0, 7, 0, 0, 0].to_vec()),
            (Value::Unsigned(1 << 32), [10, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0].to_vec()),
            (Value::Signed(-1), [5, 0, 0, 0, 255, 255, 255, 255].to_vec()),
            (Value::Float(1.0), [6, 0, 0, 0, 0, 0, 128, 63].to_vec()),
            (Value::Bool(true), [7, 0, 0, 0, 1].to_vec()),
        ] {
            let mut out = Vec::new();
            value(&mut out, &found);
            assert_eq!(out, expected, "{found:?}");
        }
    }
}
