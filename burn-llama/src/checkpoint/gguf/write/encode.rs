//! Metadata values as the bytes of a GGUF file.

use super::super::{Array, Value};

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

#[cfg(test)]
mod tests {
    use super::*;

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
