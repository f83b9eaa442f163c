//! GGUF files that llama.cpp loads: a whole model, or an adapter by itself.
//!
//! Names, metadata keys and row order are those of llama.cpp's converters; the format is ggml's `docs/gguf.md`. A file is
//! written tensor by tensor beside its place and renamed when it is whole, so that the model exists once, in the caller's
//! hands, and a half-written file never under the name that was asked for.

mod adapter;
mod config;
mod encode;
mod file;

pub use adapter::save_adapter;
pub(super) use config::paired;
pub use file::Metadata;

use super::{BlockType, Value, gguf_name};
use crate::{
    Error, Llama,
    checkpoint::parameters::{Parameter, all_floats, parameters},
    kernel::Kernels,
};
use burn::tensor::{DType, backend::Backend};
use file::Planned;
use std::path::Path;

/// Writes the model with matrices stored as `kind` (F32, F16 or Q8_0) and vectors as F32. `tokens` is the tokenizer's part of
/// the metadata, as [`crate::Tokenizer::gguf_metadata`] gives it. Adapters are not part of it: merge them first.
///
/// Matrices whose rows are no whole `Q8_0` blocks are stored as F16, as llama.cpp's converter does.
///
/// # Errors
/// If the file cannot be written, a value does not fit `kind`, or llama.cpp has no such rotary scaling.
pub fn save<B: Kernels>(model: &Llama<B>, tokens: Metadata, kind: BlockType, path: &Path) -> Result<(), Error> {
    check_kind(kind, &BlockType::WRITTEN)?;
    all_floats(model)?;
    let config = model.config();
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut metadata = general(config::architecture(config), "model", name, kind);
    metadata.extend(config::metadata(config)?);
    metadata.extend(tokens);
    let parameters = parameters(model);
    let mut tensors: Vec<_> =
        parameters.iter().map(|parameter| planned(parameter, config::paired(config), kind)).collect();
    if let Some(divisors) = config::divisors(config)? {
        tensors.push(Planned {
            name: "rope_freqs.weight".to_owned(),
            shape: vec![divisors.len()],
            kind: BlockType::F32,
            head_dim: None,
            values: Box::new(move || divisors.clone()),
        });
    }
    file::write(path, &metadata, &tensors)
}

/// What every file begins with. The file type is llama.cpp's number for "mostly this format".
fn general(architecture: &str, what: &str, name: String, kind: BlockType) -> Metadata {
    let file_type = match kind {
        BlockType::Q8_0 => 7,
        BlockType::F16 => 1,
        _ => 0,
    };
    let text = |text: &str| Value::String(text.to_owned());
    vec![
        ("general.architecture".to_owned(), text(architecture)),
        ("general.type".to_owned(), text(what)),
        ("general.name".to_owned(), Value::String(name)),
        ("general.file_type".to_owned(), Value::Unsigned(file_type)),
        ("general.quantization_version".to_owned(), Value::Unsigned(2)),
    ]
}

fn check_kind(kind: BlockType, possible: &[BlockType]) -> Result<(), Error> {
    if possible.contains(&kind) {
        return Ok(());
    }
    let names: Vec<_> = possible.iter().map(|kind| format!("{kind:?}")).collect();
    Err(Error::config("storage type", names.join(" or "), format!("{kind:?}")))
}

fn planned<B: Backend>(parameter: &Parameter<B>, paired: Option<usize>, kind: BlockType) -> Planned<'_> {
    let Some(name) = gguf_name(&parameter.path) else {
        panic!("{}: a parameter without a GGUF name", parameter.path);
    };
    let shape = parameter.shape.clone();
    let fits = shape.last().is_some_and(|row| row.is_multiple_of(kind.block_len()));
    let kind = match shape.len() {
        1 => BlockType::F32,
        _ if fits => kind,
        _ => BlockType::F16,
    };
    let values = || parameter.data(DType::F32).iter::<f32>().collect();
    Planned { head_dim: paired.filter(|_| in_pairs(&name)), name, shape, kind, values: Box::new(values) }
}

/// Whether the rows of the tensor are those of query or key heads.
pub(super) fn in_pairs(name: &str) -> bool {
    let part = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    matches!(part, Some((_, "attn_q.weight" | "attn_q.bias" | "attn_k.weight" | "attn_k.bias")))
}
