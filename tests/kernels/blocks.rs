//! Packed weights for the kernel tests: their bytes, and their values decoded by the formulas of the formats, one
//! element at a time.

use crate::cases::{Case, CaseBuilder, Kernel, numbers};
use burn::tensor::{backend::Backend, f16};
use burn_peft::random;
use burn_peft_kernels::packed::{BlockType, Codec, PackedWeight, nf4};

/// Block formats with the byte offsets of their half-precision scales.
const BLOCKS: [(BlockType, &[usize]); 7] = [
    (BlockType::Q8_0, &[0]),
    (BlockType::Q4_0, &[0]),
    (BlockType::Q4_1, &[0, 2]),
    (BlockType::Q5_0, &[0]),
    (BlockType::Q5_1, &[0, 2]),
    (BlockType::Q4_K, &[0, 2]),
    (BlockType::Q6_K, &[208]),
];

/// A packed weight `[out, features]` with its decoded values.
#[derive(Clone)]
pub struct PackedRows {
    pub codec: Codec,
    pub features: usize,
    bytes: Vec<u8>,
    /// The decoded values, rounded to f32 like the activations of the test cases.
    pub values: Vec<f64>,
}

impl PackedRows {
    /// Generates random blocks with realistic half-precision scales, which lie at `scale_offsets` in a block.
    fn blocks(name: &str, kind: BlockType, scale_offsets: &[usize], [out, features]: [usize; 2]) -> Self {
        let (size, length, key) = (kind.block_bytes(), kind.block_len(), random::key_from_str(name));
        let mut bytes: Vec<u8> =
            (0..(out * features / length * size) as u64).map(|i| random::bits(key, i) as u8).collect();
        for (index, block) in bytes.chunks_exact_mut(size).enumerate() {
            for &at in scale_offsets {
                let value = f16::from_f64(0.01 * (random::uniform(key, (index + at) as u64) - 0.3));
                block[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
        }
        let values = bytes.chunks_exact(size).flat_map(|block| (0..length).map(|i| element(kind, block, i)));
        let values = values.map(|x| x as f32 as f64).collect();
        Self { codec: kind.into(), features, bytes, values }
    }

    fn nf4(name: &str, [out, features]: [usize; 2]) -> Self {
        let values: Vec<f32> = numbers(name, out * features, 1.0).into_iter().map(|x| x as f32).collect();
        let bytes = nf4::encode(&values, features).unwrap();
        let rows = bytes.chunks_exact(Codec::Nf4.row_bytes(features));
        let values = rows.flat_map(|row| (0..features).map(|i| nf4_element(row, features, i))).collect();
        Self { codec: Codec::Nf4, features, bytes, values }
    }

    /// Creates the packed weight on a backend.
    pub fn on<B: Backend>(&self, device: &B::Device) -> PackedWeight<B> {
        PackedWeight::new(
            self.codec,
            self.features,
            self.bytes.chunks_exact(self.codec.row_bytes(self.features)),
            device,
        )
    }
}

/// Decodes element `i` of a block in one of ggml's formats.
fn element(kind: BlockType, block: &[u8], i: usize) -> f64 {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f64();
    let four = |at: usize| f64::from(block[at + i % 16] >> (i / 16 * 4) & 15);
    let fifth = |at: usize| f64::from(block[at + i / 8] >> (i % 8) & 1) * 16.0;
    match kind {
        BlockType::Q8_0 => half(0) * f64::from(block[2 + i] as i8),
        BlockType::Q4_0 => half(0) * (four(2) - 8.0),
        BlockType::Q4_1 => half(0) * four(4) + half(2),
        BlockType::Q5_0 => half(0) * (four(6) + fifth(2) - 16.0),
        BlockType::Q5_1 => half(0) * (four(8) + fifth(4)) + half(2),
        BlockType::Q4_K => {
            let (group, six) = (i / 32, &block[4..16]);
            let (scale, minimum) = match group {
                0..4 => (six[group] & 63, six[group + 4] & 63),
                _ => (six[group + 4] & 15 | six[group - 4] >> 6 << 4, six[group + 4] >> 4 | six[group] >> 6 << 4),
            };
            let quant = block[16 + group / 2 * 32 + i % 32] >> (group % 2 * 4) & 15;
            half(0) * f64::from(scale) * f64::from(quant) - half(2) * f64::from(minimum)
        }
        BlockType::Q6_K => {
            let (part, quarter, at) = (i / 128, i % 128 / 32, i % 32);
            let low = block[part * 64 + quarter % 2 * 32 + at] >> (quarter / 2 * 4) & 15;
            let high = block[128 + part * 32 + at] >> (2 * quarter) & 3;
            half(208) * f64::from(block[192 + i / 16] as i8) * (f64::from(low) + 16.0 * f64::from(high) - 32.0)
        }
        other => panic!("{other:?} is not a packed format"),
    }
}

/// Decodes element `i` of an NF4 row with the steps of bitsandbytes, each of which rounds to f32.
fn nf4_element(row: &[u8], features: usize, i: usize) -> f64 {
    let (block, tail) = (i / 64, features / 64 * 33);
    let word = |at: usize| [0, 1, 2, 3].map(|byte| row[tail + 4 * at + byte]);
    let (in_first, mean) = (u32::from_le_bytes(word(0)) as usize, f32::from_le_bytes(word(1)));
    let group = if block < in_first { 0 } else { 1 + (block - in_first) / 256 };
    let largest = nf4::DYNAMIC_MAP[usize::from(row[block * 33])] * f32::from_le_bytes(word(2 + group)) + mean;
    let quant = row[block * 33 + 1 + i % 32] >> (i % 64 / 32 * 4) & 15;
    f64::from(nf4::VALUES[usize::from(quant)] * largest)
}

/// Adds cases for every codec: with one and with many rows of activations, and with more weight rows than are decoded
/// at a time.
pub fn products(table: &mut Vec<Case>) {
    let mut push = |codec: Codec, rows: &dyn Fn(&str, [usize; 2]) -> PackedRows| {
        let block = codec.block_len();
        for (n, features, out) in
            [(1, block, 9), (1, 3 * block, 33), (7, 2 * block, 20), (9, 3 * block, 13), (65, block, 33), (9, 768, 345)]
        {
            let row = CaseBuilder::new(format!("packed {codec}, {n} × {features} → {out}")).input(&[n, features], 1.0);
            let rows = rows(&row.name, [out, features]);
            table.push(row.case(Kernel::Packed(rows)));
        }
    };
    for (kind, scale_offsets) in BLOCKS {
        push(kind.into(), &|name, shape| PackedRows::blocks(name, kind, scale_offsets, shape));
    }
    push(Codec::Nf4, &|name, shape| PackedRows::nf4(name, shape));
}
