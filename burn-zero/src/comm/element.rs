//! The data types of communicated values.

use half::{bf16, f16};

/// A data type that collectives can send and sum. Sums are accumulated in f32 and rounded once.
pub trait Element: Copy + Send + Sync + 'static {
    /// The bytes of one value.
    const SIZE: usize;
    /// The value 0.
    const ZERO: Self;

    /// Appends the values to a message.
    fn write(values: &[Self], message: &mut Vec<u8>);

    /// Fills `values` from the start of a message, which must be long enough.
    fn read(message: &[u8], values: &mut [Self]);

    /// Converts the value to f32, exactly.
    fn to_f32(self) -> f32;

    /// Rounds to the nearest value.
    fn from_f32(value: f32) -> Self;
}

macro_rules! element {
    ($type:ty, $size:literal, $zero:expr, $to:expr, $from:expr) => {
        impl Element for $type {
            const SIZE: usize = $size;
            const ZERO: Self = $zero;

            fn write(values: &[Self], message: &mut Vec<u8>) {
                let start = message.len();
                message.resize(start + values.len() * $size, 0);
                for (bytes, value) in message[start..].chunks_exact_mut($size).zip(values) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
            }

            fn read(message: &[u8], values: &mut [Self]) {
                for (bytes, value) in message.chunks_exact($size).zip(values) {
                    let mut array = [0; $size];
                    array.copy_from_slice(bytes);
                    *value = Self::from_le_bytes(array);
                }
            }

            fn to_f32(self) -> f32 {
                $to(self)
            }

            fn from_f32(value: f32) -> Self {
                $from(value)
            }
        }
    };
}

element!(f32, 4, 0.0, |value| value, |value| value);
element!(f16, 2, f16::ZERO, f16::to_f32, f16::from_f32);
element!(bf16, 2, bf16::ZERO, bf16::to_f32, bf16::from_f32);

/// Adds the values of a message to `sum`.
pub(super) fn add_message<T: Element>(sum: &mut [f32], message: &[u8]) {
    let mut values = [T::ZERO; 256];
    for (sum, message) in sum.chunks_mut(256).zip(message.chunks(256 * T::SIZE)) {
        let values = &mut values[..sum.len()];
        T::read(message, values);
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value.to_f32());
    }
}

/// Adds values to `sum`.
pub(super) fn add_values<T: Element>(sum: &mut [f32], values: &[T]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value.to_f32());
}
