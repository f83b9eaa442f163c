//! The weights of the test model, and reading of tensor files.

use crate::work::{TEMPLATE, fixture};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{collections::BTreeMap, fs, path::Path};

/// Returns the names and shapes of the parameters of a Llama with two blocks, two heads, one key-value head and an
/// untied head.
pub(crate) fn shapes(vocabulary: usize, hidden: usize) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("lm_head.weight".to_owned(), vec![vocabulary, hidden]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden / 2, hidden]),
            ("self_attn.v_proj", vec![hidden / 2, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![24, hidden]),
            ("mlp.up_proj", vec![24, hidden]),
            ("mlp.down_proj", vec![hidden, 24]),
        ] {
            all.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    all
}

/// Returns the f32 bytes of a pseudo-random tensor; norms are ones.
pub(crate) fn random(name: &str, shape: &[usize]) -> Vec<u8> {
    let mut state = name.bytes().fold(1u32, |state, byte| state.wrapping_mul(31).wrapping_add(byte.into()));
    let value = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if name.contains("norm") { 1.0 } else { (state >> 8) as f32 / (1 << 24) as f32 - 0.5 }
    };
    (0..shape.iter().product()).map(value).flat_map(f32::to_le_bytes).collect()
}

/// Returns a GGUF file of the same kind of model: the fixture's vocabulary with sizes, a chat template and tensors.
pub(crate) fn gguf() -> Vec<u8> {
    let vocabulary = fs::read(fixture("gguf/vocab-smollm.gguf")).unwrap();
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let value = |key: &str, kind: u32, value: &[u8]| [&string(key), &kind.to_le_bytes()[..], value].concat();
    let mut metadata: Vec<Vec<u8>> = [
        ("embedding_length", 16u32),
        ("block_count", 2),
        ("feed_forward_length", 24),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ]
    .map(|(key, size)| value(&format!("llama.{key}"), 4, &size.to_le_bytes()))
    .into();
    metadata.push(value("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes()));
    metadata.push(value("tokenizer.chat_template", 8, &string(TEMPLATE)));
    let (mut table, mut tensors) = (Vec::new(), Vec::new());
    let shapes = shapes(630, 16);
    for (key, shape) in &shapes {
        table.extend(string(&burn_llama::checkpoint::gguf::gguf_name(key).unwrap()));
        table.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| table.extend((*size as u64).to_le_bytes()));
        table.extend(0u32.to_le_bytes());
        table.extend((tensors.len() as u64).to_le_bytes());
        tensors.extend(random(key, shape));
        tensors.resize(tensors.len().next_multiple_of(32), 0);
    }
    // The last metadata value of the vocabulary is a string; the zero bytes after it are padding.
    let end = vocabulary.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let counts =
        [shapes.len() as u64, u64::from_le_bytes(vocabulary[16..24].try_into().unwrap()) + metadata.len() as u64];
    let counts = counts.map(u64::to_le_bytes).concat();
    let mut file = [&vocabulary[..8], &counts, &metadata.concat(), &vocabulary[24..end], &table].concat();
    file.resize(file.len().next_multiple_of(32), 0);
    [file, tensors].concat()
}

/// Reads the tensors of a safetensors file: type, shape and bytes by name.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor =
        |(name, view): (String, TensorView)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    file.tensors().into_iter().map(tensor).collect()
}

/// Decodes bytes as f32 values.
pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Returns the largest difference of two arrays of the same length.
pub(crate) fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0f32, |max, (a, b)| max.max((a - b).abs()))
}
