//! Encoding of metadata values as the bytes of a GGUF file.

use super::super::{MetadataArray, MetadataValue, value_type as types};

/// Appends a string: its length in bytes, then UTF-8.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Appends a metadata value preceded by its type: the 32-bit type if it can hold the value, as llama.cpp expects.
pub(super) fn value(out: &mut Vec<u8>, value: &MetadataValue) {
    let one = match value {
        MetadataValue::Unsigned(value) => MetadataArray::Unsigned(vec![*value]),
        MetadataValue::Signed(value) => MetadataArray::Signed(vec![*value]),
        MetadataValue::Float(value) => MetadataArray::Float(vec![*value]),
        MetadataValue::Bool(value) => MetadataArray::Bool(vec![*value]),
        MetadataValue::String(value) => {
            out.extend(types::STRING.to_le_bytes());
            return string(out, value);
        }
        MetadataValue::Array(array) => {
            out.extend(types::ARRAY.to_le_bytes());
            out.extend(value_type(array).to_le_bytes());
            out.extend((len(array) as u64).to_le_bytes());
            return elements(out, array);
        }
    };
    out.extend(value_type(&one).to_le_bytes());
    elements(out, &one);
}

/// Returns the GGUF number of the narrowest 32- or 64-bit type that can hold every element.
fn value_type(array: &MetadataArray) -> u32 {
    let (fits, narrow, wide) = match array {
        MetadataArray::Unsigned(values) => {
            (values.iter().all(|value| u32::try_from(*value).is_ok()), types::U32, types::U64)
        }
        MetadataArray::Signed(values) => {
            (values.iter().all(|value| i32::try_from(*value).is_ok()), types::I32, types::I64)
        }
        MetadataArray::Float(values) => {
            let exact = |value: &f64| value.is_nan() || f64::from(*value as f32) == *value;
            (values.iter().all(exact), types::F32, types::F64)
        }
        MetadataArray::Bool(_) => return types::BOOL,
        MetadataArray::String(_) => return types::STRING,
    };
    if fits { narrow } else { wide }
}

fn len(array: &MetadataArray) -> usize {
    match array {
        MetadataArray::Unsigned(values) => values.len(),
        MetadataArray::Signed(values) => values.len(),
        MetadataArray::Float(values) => values.len(),
        MetadataArray::Bool(values) => values.len(),
        MetadataArray::String(values) => values.len(),
    }
}

fn elements(out: &mut Vec<u8>, array: &MetadataArray) {
    match (array, value_type(array)) {
        (MetadataArray::Unsigned(values), types::U32) => {
            values.iter().for_each(|value| out.extend((*value as u32).to_le_bytes()))
        }
        (MetadataArray::Unsigned(values), _) => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
        (MetadataArray::Signed(values), types::I32) => {
            values.iter().for_each(|value| out.extend((*value as i32).to_le_bytes()))
        }
        (MetadataArray::Signed(values), _) => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
        (MetadataArray::Float(values), types::F32) => {
            values.iter().for_each(|value| out.extend((*value as f32).to_le_bytes()))
        }
        (MetadataArray::Float(values), _) => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
        (MetadataArray::Bool(values), _) => out.extend(values.iter().map(|value| u8::from(*value))),
        (MetadataArray::String(values), _) => values.iter().for_each(|value| string(out, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_the_narrowest_of_32_bits_that_hold_the_value() {
        for (found, expected) in [
            (MetadataValue::Unsigned(7), [4, 0, 0, 0, 7, 0, 0, 0].to_vec()),
            (MetadataValue::Unsigned(1 << 32), [10, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0].to_vec()),
            (MetadataValue::Signed(-1), [5, 0, 0, 0, 255, 255, 255, 255].to_vec()),
            (MetadataValue::Float(1.0), [6, 0, 0, 0, 0, 0, 128, 63].to_vec()),
            (MetadataValue::Bool(true), [7, 0, 0, 0, 1].to_vec()),
        ] {
            let mut out = Vec::new();
            value(&mut out, &found);
            assert_eq!(out, expected, "{found:?}");
        }
    }
}
