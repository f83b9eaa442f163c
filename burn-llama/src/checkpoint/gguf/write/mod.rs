//! Writers of GGUF files that llama.cpp can load: a whole model, or a LoRA adapter.
//!
//! Names, metadata keys and row order are those of llama.cpp's converters; the format is described in ggml's
//! `docs/gguf.md`. A file is written tensor by tensor under a temporary name and renamed when complete. So there is no
//! second copy of the model in memory, and an incomplete file never has the requested name.

mod adapter;
mod config;
mod encode;
mod file;

pub use adapter::save_adapter;
pub use config::check;
pub(super) use config::permuted_head_dim;
pub use file::Metadata;

use super::{BlockType, MetadataValue, gguf_name, permutation::RowHeads};
use crate::{
    Error, Llama,
    checkpoint::parameters::{Parameter, parameters, require_dense},
    kernel::Kernels,
};
use burn::tensor::{DType, backend::Backend};
use file::PlannedTensor;
use std::path::Path;

/// Writes the model with matrices stored as `kind` (F32, F16 or Q8_0) and vectors as F32. `tokens` is the metadata of
/// the tokenizer, as returned by [`crate::Tokenizer::gguf_metadata`]. Adapters are not included: merge them first.
///
/// Matrices whose row length is not a multiple of the `Q8_0` block length are stored as F16, as in llama.cpp's
/// converter.
///
/// # Errors
/// If the file cannot be written, a value does not fit `kind`, or llama.cpp cannot run the model (see [`check`]).
pub fn save<B: Kernels>(model: &Llama<B>, tokens: Metadata, kind: BlockType, path: &Path) -> Result<(), Error> {
    check_kind(kind, &BlockType::WRITABLE)?;
    require_dense(model)?;
    let config = model.config();
    check(config)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut metadata = general_metadata(config::architecture(config), "model", name, kind);
    metadata.extend(config::metadata(config)?);
    metadata.extend(tokens);
    let parameters = parameters(model);
    let mut tensors: Vec<_> =
        parameters.iter().map(|parameter| plan_tensor(parameter, config::permuted_head_dim(config), kind)).collect();
    if let Some(divisors) = config::rope_freqs(config)? {
        tensors.push(PlannedTensor {
            name: "rope_freqs.weight".to_owned(),
            shape: vec![divisors.len()],
            kind: BlockType::F32,
            head_dim: None,
            values: Box::new(move || divisors.clone()),
        });
    }
    file::write(path, &metadata, &tensors)
}

/// Returns the metadata that every file begins with. The file type is llama.cpp's number for "mostly this format".
fn general_metadata(architecture: &str, what: &str, name: String, kind: BlockType) -> Metadata {
    let file_type = match kind {
        BlockType::Q8_0 => 7,
        BlockType::F16 => 1,
        _ => 0,
    };
    let text = |text: &str| MetadataValue::String(text.to_owned());
    vec![
        ("general.architecture".to_owned(), text(architecture)),
        ("general.type".to_owned(), text(what)),
        ("general.name".to_owned(), MetadataValue::String(name)),
        ("general.file_type".to_owned(), MetadataValue::Unsigned(file_type)),
        ("general.quantization_version".to_owned(), MetadataValue::Unsigned(2)),
    ]
}

/// Returns an error unless `kind` is one of the possible storage formats.
fn check_kind(kind: BlockType, possible: &[BlockType]) -> Result<(), Error> {
    if possible.contains(&kind) {
        return Ok(());
    }
    let names: Vec<_> = possible.iter().map(|kind| format!("{kind:?}")).collect();
    Err(Error::config("storage type", names.join(" or "), format!("{kind:?}")))
}

/// Describes how a parameter is written: its GGUF name, its storage format and the permutation of its rows.
fn plan_tensor<B: Backend>(parameter: &Parameter<B>, head_dim: Option<usize>, kind: BlockType) -> PlannedTensor<'_> {
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
    let head_dim = head_dim.filter(|_| RowHeads::from_name(&name).is_some());
    PlannedTensor { name, shape, kind, head_dim, values: Box::new(values) }
}
